//! The command lines of the manual page nbdkit-captive(1), as they are printed there, with the clients that they name.
//! Elsewhere: the qemu-img line of "Writing plugin tests" (`real_data.rs`) and the probe of `--exit-with-parent` (`cli.rs`).

use std::fs;

use super::harness::{Room, nbdkit_differs};

/// "Running nbdkit captive under nbdsh for unit testing"
#[test]
fn nbdsh_reads_the_only_byte() {
    let room = Room::new();
    let mut launch = room.captive(["memory", "1"], r#"nbdsh -u "$uri" -c "print(h.pread(1, 0))""#);
    // Debian's own Python is the one that has libnbd.
    let path = std::env::var("PATH").unwrap_or_default();
    let output = launch.env("PATH", format!("/usr/bin:{path}")).run_to(0);
    assert_eq!(output.stdout, b"bytearray(b'\\x00')\n");
    room.assert_nothing_left();
}

/// "Running an fio benchmark"
#[test]
fn fio_runs_a_job_file_that_takes_the_uri_from_the_environment() {
    let room = Room::new();
    fs::create_dir_all(room.path("fio.git/examples")).expect("the room is empty");
    // As fio's own example, but for the amount of work.
    let job = "[global]\nbs=256k\nrw=randrw\nioengine=nbd\niodepth=32\nuri=${uri}\nio_size=64m\n\
               [job0]\noffset=0\nsize=25%\n[job1]\noffset=25%\nsize=25%\n\
               [job2]\noffset=50%\nsize=25%\n[job3]\noffset=75%\nsize=25%\n";
    fs::write(room.path("fio.git/examples/nbd.fio"), job).expect("there is room for it");
    let command = "export uri; fio fio.git/examples/nbd.fio > log 2>&1 || { cat log; exit 9; }";
    room.captive(["-f", "null", "1G"], command).run_to(0);
    let log = fs::read_to_string(room.path("log")).expect("fio wrote it");
    assert!(log.contains("job3") && log.matches("err= 0").count() == 4, "{log}");
    room.assert_nothing_left();
}

/// "nbdkit file data.tar --filter=tar tar-entry=disk.img --run 'qemu-img convert -n disk.img "$uri"'": the disk inside a tar
/// file is overwritten in place.
#[test]
fn qemu_img_writes_into_a_disk_inside_a_tar_file() {
    if nbdkit_differs("the tar filter needs no program named tar") {
        return;
    }
    let room = Room::new();
    let disk = |seed: u8| (0..1 << 20).map(|at: u32| (at / 777) as u8 ^ seed).collect::<Vec<_>>();
    fs::write(room.path("disk.img"), disk(1)).expect("there is room for it");
    fs::write(room.path("before"), "what stands before").expect("there is room for it");
    fs::write(room.path("behind"), "what stands behind").expect("there is room for it");
    room.tool("tar", ["-cf", "data.tar", "before", "disk.img", "behind"]).run_to(0);
    fs::write(room.path("disk.img"), disk(2)).expect("there is room for it");
    let mut launch = room
        .captive(["file", "data.tar", "--filter=tar", "tar-entry=disk.img"], "qemu-img convert -n disk.img \"$uri\"");
    launch.run_to(0);
    room.tool("mkdir", ["out"]).run_to(0);
    room.tool("tar", ["-xf", "data.tar", "-C", "out"]).run_to(0);
    assert!(fs::read(room.path("out/disk.img")).expect("it is there") == disk(2));
    for name in ["before", "behind"] {
        assert_eq!(
            fs::read_to_string(room.path("out").join(name)).expect("it is there"),
            format!("what stands {name}")
        );
    }
    room.assert_nothing_left();
}

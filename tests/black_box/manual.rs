//! The command lines of the manual page nbdkit-captive(1), as they are printed there, with the clients that they name.
//! Elsewhere: `$uri` and the other shell variables (`command.rs`, `environment.rs`), what happens when a parent ends
//! (`lifetime.rs`), and `--dump-config` (`cli.rs`).

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::harness::{Room, nbdkit_differs, server_path, wait_for};

/// Puts a program that does not come with the system under the name that the manual has for it.
fn program(room: &Room, name: &str, script: &str) -> OsString {
    fs::create_dir_all(room.path("bin")).expect("the room is empty");
    room.script(&format!("bin/{name}"), script);
    let mut all = room.path("bin").into_os_string();
    all.push(":");
    all.push(std::env::var_os("PATH").unwrap_or_default());
    all
}

/// A QEMU that runs guests: the system's, or the one that .ci/setup has unpacked. The words of a shell that start it.
fn guest_qemu() -> String {
    let installed = Path::new("/usr/bin/qemu-system-x86_64");
    if installed.exists() {
        return format!("exec {}", installed.display());
    }
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache");
    let root = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("nbdcaptive/qemu-system");
    let program = root.join("usr/bin/qemu-system-x86_64");
    assert!(program.exists(), "{} is missing: run .ci/setup", program.display());
    let libraries = fs::read_dir(root.join("usr/lib")).expect("it has libraries").flatten();
    let libraries: Vec<_> = libraries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    let libraries = std::env::join_paths(&libraries).expect("no colon in a name").into_string().expect("text");
    let root = root.display();
    format!(
        "LD_LIBRARY_PATH='{libraries}' exec '{root}/usr/bin/qemu-system-x86_64' -L '{root}/usr/share/qemu' -L '{root}/usr/share/seabios'"
    )
}

/// A boot sector that writes the text of the disk's second sector to the serial port and to the third sector, and turns the
/// machine off.
const BOOT_SECTOR: [u8; 62] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, // mov ds, ax; mov es, ax; mov ss, ax
    0xbc, 0x00, 0x7c, // mov sp, 0x7c00
    0xb8, 0x01, 0x02, // mov ax, 0x0201: read one sector
    0xbb, 0x00, 0x7e, // mov bx, 0x7e00
    0xb9, 0x02, 0x00, // mov cx, 2: cylinder 0, sector 2, counted from 1
    0xba, 0x80, 0x00, // mov dx, 0x80: head 0, the first disk
    0xcd, 0x13, // int 0x13
    0x72, 0x1c, // jc off
    0xbe, 0x00, 0x7e, // mov si, 0x7e00
    0xac, // next: lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x06, // jz write
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0xeb, 0xf5, // jmp next
    0xb8, 0x01, 0x03, // write: mov ax, 0x0301: write one sector
    0xbb, 0x00, 0x7e, // mov bx, 0x7e00
    0xb9, 0x03, 0x00, // mov cx, 3
    0xba, 0x80, 0x00, // mov dx, 0x80
    0xcd, 0x13, // int 0x13
    0xb0, 0xfe, 0xe6, 0x64, // off: mov al, 0xfe; out 0x64, al: reset
    0xf4, 0xeb, 0xfd, // hlt; jmp to it
];

/// "nbdkit file disk.img --run 'qemu -drive file="$uri",if=virtio'": a guest boots from the disk, reads and writes it. "When
/// qemu exits, nbdkit is killed and cleaned up automatically."
#[test]
fn qemu_boots_a_guest_from_the_disk() {
    const TEXT: &[u8] = b"The guest has read this from its disk.\n";
    let room = Room::new();
    let mut disk = vec![0; 1 << 20];
    disk[..BOOT_SECTOR.len()].copy_from_slice(&BOOT_SECTOR);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512..512 + TEXT.len()].copy_from_slice(TEXT);
    fs::write(room.path("disk.img"), &disk).expect("there is room for it");
    // Its own machine rather than a screen, and an end where it would start again.
    let machine = "-accel tcg -nodefaults -display none -serial stdio -no-reboot -m 32";
    let path = program(&room, "qemu", &format!("#!/bin/sh\n{} {machine} \"$@\"\n", guest_qemu()));
    let mut launch = room.captive(["file", "disk.img"], r#"qemu -drive file="$uri",if=virtio"#);
    let output = launch.env("PATH", path).run_to(0);
    assert!(output.stdout.starts_with(TEXT), "{output:#?}");
    let after = fs::read(room.path("disk.img")).expect("it is there");
    assert_eq!(&after[1024..1536], &disk[512..1024], "the guest has written");
    room.assert_nothing_left();
}

/// "nbdkit file disk.img --run 'guestfish --format=raw -a "$uri" -i'". guestfish itself cannot be had here: its package needs a
/// qemu-system that Debian's newer qemu-utils breaks, and it starts a guest made of some seventy installed packages and a
/// kernel. What stands in for it checks the words and does with the disk what guestfish's own QEMU would do first.
#[test]
fn guestfish_gets_the_disk_that_it_is_to_open() {
    let room = Room::new();
    let mut image = room.tool("mke2fs", ["-q", "-t", "ext2", "-L", "fish", "disk.img", "4m"]);
    image.run_to(0);
    let script = r#"#!/bin/sh
echo "guestfish: this is a stand-in, which looks at the disk and starts no guest" >&2
[ "$#" -eq 4 ] && [ "$1 $2 $4" = "--format=raw -a -i" ] || { echo "guestfish: unexpected words: $*" >&2; exit 2; }
qemu-img info --format=raw "$3" && nbdcopy "$3" copy.img && nbdinfo --size "$3"
"#;
    let path = program(&room, "guestfish", script);
    let mut launch = room.captive(["file", "disk.img"], r#"guestfish --format=raw -a "$uri" -i"#);
    let output = launch.env("PATH", path).run_to(0);
    eprint!("{}", output.stderr);
    assert!(output.text().ends_with("4194304\n"), "{output:#?}");
    let disk = fs::read(room.path("disk.img")).expect("it is there");
    assert!(fs::read(room.path("copy.img")).expect("it was copied") == disk);
    room.tool("e2fsck", ["-fn", "copy.img"]).run_to(0);
    room.assert_nothing_left();
}

/// "nbdkit example1 --run 'qemu-img convert "$uri" disk.img'"
#[test]
fn qemu_img_copies_the_disk_that_a_plugin_has_in_it() {
    let room = Room::new();
    room.captive(["example1"], r#"qemu-img convert "$uri" disk.img"#).run_to(0);
    let disk = fs::read(room.path("disk.img")).expect("it was copied");
    assert_eq!((disk.len(), &disk[510..512]), (100 << 20, &[0x55, 0xaa][..]));
    room.assert_nothing_left();
}

/// "If the source suffers from temporary network failures nbdkit-retry-filter(1) or nbdkit-retry-request-filter(1) may help."
#[test]
fn a_copy_is_made_through_failures_of_the_source() {
    let room = Room::new();
    for (filter, delay) in [("retry", "retry-delay=1ms"), ("retry-request", "retry-request-delay=1ms")] {
        // Every third read fails.
        let count = room.path("n").display().to_string();
        let pread = format!(
            "pread=n=$(cat '{count}'); echo $((n + 1)) > '{count}'; \
             [ $((n % 3)) -gt 0 ] || {{ echo EIO broken >&2; exit 1; }}; head -c $3 /dev/zero | tr '\\0' x"
        );
        fs::write(room.path("n"), "0").expect("there is room for it");
        let filter = format!("--filter={filter}");
        let arguments = ["eval", "get_size=echo 4M", &pread, &filter, delay];
        room.captive(arguments, r#"qemu-img convert "$uri" disk.img"#).run_to(0);
        assert!(fs::read(room.path("disk.img")).expect("it was copied") == vec![b'x'; 4 << 20], "{filter}");
        let reads: u32 = fs::read_to_string(room.path("n")).expect("it is there").trim().parse().expect("a number");
        assert!(reads > 1, "something has failed");
    }
    room.assert_nothing_left();
}

/// "nbdkit --exit-with-parent plugin ... &": "nbdkit will exit automatically if the parent program exits for any reason."
#[test]
fn a_script_that_ends_takes_its_server_along() {
    let room = Room::new();
    let script = format!(
        "'{}' --exit-with-parent -U socket -P pid null 1M &\n\
         until [ -s pid ]; do sleep 0.01; done\n\
         nbdinfo --size 'nbd+unix://?socket=socket'\n",
        server_path().display()
    );
    let output = room.tool("sh", ["-c", &script]).run_to(0);
    assert_eq!(output.text(), "1048576\n");
    if !nbdkit_differs("the socket and the pid file stay") {
        wait_for("the server's files to be gone", || {
            (!room.path("socket").exists() && !room.path("pid").exists()).then_some(())
        });
    }
    room.wait_until_nothing_left();
}

/// "nbdkit --exit-with-parent --version && echo "supported""
#[test]
fn a_script_can_ask_whether_a_server_can_follow_its_parent() {
    let room = Room::new();
    let server = server_path();
    let line = format!("'{}' --exit-with-parent --version && echo \"supported\"", server.display());
    let output = room.tool("sh", ["-c", &line]).run_to(0);
    assert!(output.text().ends_with("supported\n"), "{output:#?}");
    if !nbdkit_differs("it came with 1.34") {
        let output = room.server(["--dump-config"]).run_to(0);
        assert!(output.text().lines().any(|line| line == "exit_with_parent=yes"), "{output:#?}");
    }
}

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

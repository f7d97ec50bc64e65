//! Real file systems and real clients: what goes in comes out, and holes stay holes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::harness::{Room, nbdkit_differs, tool};

const TOOLS: [&str; 7] = ["qemu-img", "qemu-io", "nbdinfo", "nbdcopy", "mke2fs", "e2fsck", "fio"];

/// A room for a test whose commands use real clients: all of them must be there.
fn room() -> Room {
    TOOLS.iter().for_each(|name| drop(tool(name)));
    Room::new()
}

/// An ext4 image of 64 MiB with a few thousand files.
fn ext4(room: &Room) -> PathBuf {
    let tree = room.path("tree");
    for directory in 0..20 {
        let directory = tree.join(format!("directory {directory}"));
        fs::create_dir_all(&directory).expect("a directory in the room");
        for file in 0..50_usize {
            let content: Vec<u8> = (0..file * 211).map(|at| (at * 31 + file) as u8).collect();
            fs::write(directory.join(format!("file{file}")), content).expect("a file in the room");
        }
    }
    let image = room.path("ext4.img");
    let arguments = ["-q", "-t", "ext4", "-E", "lazy_itable_init=0", "-d"];
    let mut launch = room.tool("mke2fs", arguments);
    launch.args([tree.as_os_str(), image.as_os_str(), "64M".as_ref()]).run_to(0);
    image
}

#[track_caller]
fn assert_same(one: &Path, other: &Path) {
    let [one_bytes, other_bytes] = [one, other].map(|path| fs::read(path).expect("the image is there"));
    assert_eq!(one_bytes.len(), other_bytes.len());
    assert!(one_bytes == other_bytes, "{} and {} are the same", one.display(), other.display());
}

fn assert_clean(room: &Room, image: &Path) {
    let mut launch = room.tool("e2fsck", ["-f", "-n"]);
    launch.args([image]).run_to(0);
}

mod file_systems {
    use super::*;

    /// The job itself: `nbdcaptive file disk.img --run 'qemu-img convert "$uri" copy.img'`
    #[test]
    fn a_file_is_copied_out_by_qemu_img() {
        let room = room();
        let image = ext4(&room);
        room.captive(["file", "ext4.img"], "qemu-img convert \"$uri\" copy.img").run_to(0);
        assert_same(&image, &room.path("copy.img"));
        assert_clean(&room, &room.path("copy.img"));
        room.assert_nothing_left();
    }

    #[test]
    fn a_file_is_copied_out_by_nbdcopy() {
        let room = room();
        let image = ext4(&room);
        room.captive(["-r", "file", "ext4.img"], "nbdcopy \"$uri\" copy.img").run_to(0);
        assert_same(&image, &room.path("copy.img"));
        room.assert_nothing_left();
    }

    #[test]
    fn a_file_is_overwritten_by_qemu_img_and_nbdcopy() {
        for copy in ["qemu-img convert -n -f raw -O raw ext4.img \"$uri\"", "nbdcopy --flush ext4.img \"$uri\""] {
            let room = room();
            let image = ext4(&room);
            let disk = room.write("disk.img", vec![0xa5; 64 << 20]);
            room.captive(["file", "disk.img"], copy).run_to(0);
            assert_same(&image, &disk);
            assert_clean(&room, &disk);
            room.assert_nothing_left();
        }
    }

    #[test]
    fn memory_takes_an_image_in_and_gives_it_out() {
        let room = room();
        let image = ext4(&room);
        let command = "
            set -e
            qemu-img convert -n -f raw -O raw ext4.img \"$uri\"
            nbdcopy \"$uri\" by-nbdcopy.img
            nbdcopy by-nbdcopy.img \"$uri\"
            qemu-img convert -f raw -O raw \"$uri\" by-qemu.img
            qemu-img compare -f raw -F raw ext4.img \"$uri\"";
        room.captive(["memory", "64M"], command).run_to(0);
        assert_same(&image, &room.path("by-nbdcopy.img"));
        assert_same(&image, &room.path("by-qemu.img"));
        assert_clean(&room, &room.path("by-qemu.img"));
        room.assert_nothing_left();
    }

    #[test]
    fn an_image_goes_from_one_server_to_another() {
        let room = room();
        let image = ext4(&room);
        room.write("disk.img", vec![0xa5; 64 << 20]);
        let source = room.serve(["-r", "file", "ext4.img"]);
        let mut launch = room.captive(["file", "disk.img"], "nbdcopy --flush \"$SOURCE\" \"$uri\"");
        launch.env("SOURCE", source.uri()).run_to(0);
        assert_same(&image, &room.path("disk.img"));
        source.terminate().expect(0);
        room.assert_nothing_left();
    }

    #[test]
    fn a_readonly_file_is_served_read_only() {
        let room = room();
        let image = ext4(&room);
        let before = fs::read(&image).expect("the image is there");
        let command = "nbdcopy disk \"$uri\" 2> /dev/null && exit 9; nbdinfo --is readonly \"$uri\"";
        room.write("disk", [1; 4096]);
        room.captive(["-r", "file", "ext4.img"], command).run_to(0);
        assert!(fs::read(&image).expect("the image is there") == before);
    }
}

/// "nbdkit-example1-plugin(1) contains an embedded disk image. To copy it out:
/// nbdkit example1 --run 'qemu-img convert "$uri" disk.img'"
#[test]
fn the_example_is_a_disk_of_100_mb_with_one_partition() {
    if nbdkit_differs("Debian does not package example1") {
        return;
    }
    let room = room();
    room.captive(["example1"], "qemu-img convert \"$uri\" disk.img").run_to(0);
    let disk = fs::read(room.path("disk.img")).expect("it was copied out");
    assert_eq!(disk.len(), 104_857_600);
    assert_eq!(disk[510..512], [0x55, 0xaa], "the signature of a boot sector");
    let partition = &disk[446..462];
    assert_eq!(partition[4], 0x83, "a Linux partition");
    let be32 = |at: usize| u32::from_le_bytes(partition[at..at + 4].try_into().expect("four bytes"));
    assert!(be32(8) > 0 && u64::from(be32(8) + be32(12)) * 512 <= 104_857_600 + 1024 * 1024);
    assert_eq!(disk[462..510], [0; 48], "it is the only one");
    assert!(disk[512..].iter().all(|&byte| byte == 0));
    room.assert_nothing_left();
}

mod sparse {
    use super::*;

    #[test]
    fn memory_of_a_tebibyte_is_one_hole() {
        let room = room();
        let output =
            room.captive(["memory", "1T"], "nbdinfo --size \"$uri\"; nbdinfo --map --totals \"$uri\"").run_to(0);
        let words: Vec<&str> = output.text().split_whitespace().collect();
        assert_eq!(words, ["1099511627776", "1099511627776", "100.0%", "3", "hole,zero"]);
    }

    #[test]
    fn memory_of_the_largest_size_is_served() {
        let room = room();
        let command =
            "nbdinfo --size \"$uri\"; qemu-io -f raw -c 'write -P 7 4E 64k' -c 'read -P 7 4E 64k' \"$uri\" >&2";
        let output = room.captive(["memory", "9223372036854775807"], command).run();
        assert!(output.text().starts_with("9223372036854775807\n"), "{output:#?}");
    }

    #[test]
    fn discarded_and_zeroed_blocks_become_holes_again() {
        let room = room();
        let command = "
            set -e
            qemu-io -f raw -c 'write -P 1 0 4M' \"$uri\" > log
            qemu-img map --output=json -f raw \"$uri\" > written
            qemu-io -f raw -d unmap -c 'discard 0 1M' -c 'write -z -u 2M 1M' -c flush \"$uri\" >> log
            qemu-img map --output=json -f raw \"$uri\" > holes
            qemu-io -f raw -c 'read -P 0 0 1M' -c 'read -P 1 1M 1M' -c 'read -P 0 2M 1M' -c 'read -P 1 3M 1M' \"$uri\" >> log
            ! grep -i fail log";
        for arguments in [["memory", "8M"], ["file", "disk"]] {
            fs::File::create(room.path("disk")).and_then(|file| file.set_len(8 << 20)).expect("a sparse file");
            room.captive(arguments, command).run_to(0);
            assert_eq!(map(&room, "written"), [(0, 4 << 20, true), (4 << 20, 4 << 20, false)], "{arguments:?}");
            let data = |one: &(u64, u64, bool)| one.2;
            let holes = map(&room, "holes");
            assert_eq!(holes.iter().filter(|one| data(one)).map(|one| one.1).sum::<u64>(), 2 << 20, "{holes:?}");
            assert_eq!(holes[0], (0, 1 << 20, false));
        }
        let blocks = fs::metadata(room.path("disk")).expect("the disk is there").blocks() * 512;
        assert!((2 << 20..3 << 20).contains(&blocks), "the file has holes: {blocks} bytes are allocated");
    }

    /// A file's holes, as nbdkit shows them.
    #[test]
    fn the_map_of_a_file_is_that_of_nbdkit() {
        use std::os::unix::fs::FileExt;
        let room = room();
        let file = fs::File::create(room.path("disk")).expect("a file in the room");
        file.set_len(100 << 20).expect("a sparse file");
        for (offset, length) in [(0, 4096), (1 << 20, 1 << 20), ((10 << 20) + 8192, 4096), ((100 << 20) - 4096, 4096)] {
            file.write_all_at(&vec![7; length], offset).expect("room on the disk");
        }
        let map_of =
            "qemu-img map --output=json -f raw \"$uri\"; nbdinfo --map \"$uri\"; nbdinfo --map --totals \"$uri\"";
        let ours = room.captive(["file", "disk"], map_of).run_to(0);
        let theirs = room.nbdkit_captive(["file", "disk"], map_of).run_to(0);
        assert_eq!(ours.text(), theirs.text());
        assert!(ours.text().lines().count() > 10, "{ours:?}");
    }

    #[test]
    fn a_sparse_file_stays_sparse_when_it_is_copied() {
        let room = room();
        fs::File::create(room.path("disk")).and_then(|file| file.set_len(1 << 40)).expect("a sparse file");
        room.captive(["file", "disk"], "qemu-img convert -f raw -O raw \"$uri\" copy").run_to(0);
        let copy = fs::metadata(room.path("copy")).expect("it was copied");
        assert_eq!(copy.len(), 1 << 40);
        assert!(copy.blocks() < 1 << 12);
    }

    /// Start, length, whether it is data; from `qemu-img map --output=json`, one object on a line.
    fn map(room: &Room, name: &str) -> Vec<(u64, u64, bool)> {
        let text = fs::read_to_string(room.path(name)).expect("the map is there");
        let field = |line: &str, key: &str| -> String {
            let from = line.find(&format!("\"{key}\": ")).expect("the field is there") + key.len() + 4;
            line[from..].chars().take_while(|character| character.is_alphanumeric()).collect()
        };
        let number = |line: &str, key: &str| field(line, key).parse().expect("a number");
        text.lines()
            .map(|line| (number(line, "start"), number(line, "length"), field(line, "data") == "true"))
            .collect()
    }
}

mod clients {
    use super::*;

    #[test]
    fn qemu_io_reads_what_it_writes_zeroes_and_discards() {
        let room = room();
        room.write("disk", vec![0; 16 << 20]);
        let command = "
            set -e
            qemu-io -f raw \\
                -c 'write -P 17 0 1M' -c 'write -P 34 12345 6789' -c 'write -f -P 51 2M 512' \\
                -c 'write -z 3M 1M' -c 'write -z -u 4096 4096' -c 'discard 5M 1M' -c flush \\
                -c 'read -P 17 0 4096' -c 'read -P 0 4096 4096' -c 'read -P 17 8192 4153' -c 'read -P 34 12345 6789' \\
                -c 'read -P 51 2M 512' -c 'read -P 0 3M 1M' -c 'aio_write -P 68 6M 1M' -c 'aio_write -P 69 7M 1M' \\
                -c aio_flush -c 'read -P 68 6M 1M' -c 'read -P 69 7M 1M' \"$uri\" > log 2>&1 || { cat log; exit 9; }
            ! grep -iE 'fail|error' log";
        for arguments in [["memory", "16M"], ["file", "disk"]] {
            let output = room.captive(arguments, command).run();
            assert_eq!(output.status.code(), Some(0), "{output:#?}");
        }
        room.assert_nothing_left();
    }

    #[test]
    fn fio_verifies_what_it_wrote_at_random() {
        let room = room();
        for arguments in [["memory", "32M"], ["file", "disk"]] {
            room.write("disk", vec![0; 32 << 20]);
            let command = "fio --name=verify --ioengine=nbd --uri=\"$uri\" --rw=randrw --bsrange=512-64k --ba=512 \
                 --iodepth=32 --size=32M --io_size=48M --verify=crc32c --verify_fatal=1 --do_verify=1 \
                 --randseed=7 --output=log || { cat log; exit 9; }";
            let output = room.captive(arguments, command).run();
            assert_eq!(output.status.code(), Some(0), "{output:#?}");
        }
        room.assert_nothing_left();
    }

    #[test]
    fn many_clients_copy_at_the_same_time() {
        let room = room();
        let image = ext4(&room);
        let command = "
            for n in 1 2 3 4; do nbdcopy --connections=4 \"$uri\" copy$n & pids=\"$pids $!\"; done
            for pid in $pids; do wait $pid || exit 9; done";
        room.captive(["file", "ext4.img"], command).run_to(0);
        (1..=4).for_each(|number| assert_same(&image, &room.path(format!("copy{number}"))));
        room.assert_nothing_left();
    }

    #[test]
    fn nbdinfo_shows_what_the_export_can_do() {
        let room = room();
        let can = "
            for what in write flush fua trim zero fast-zero cache df multi-conn; do
                nbdinfo --can $what \"$uri\" || echo \"cannot $what\"
            done
            nbdinfo --list \"$uri\" | grep -c export=";
        let output = room.captive(["memory", "1M"], can).run_to(0);
        assert_eq!(output.text(), "1\n");
        room.write("disk", [0; 4096]);
        let ours = room.captive(["file", "disk"], can).run_to(0);
        let theirs = room.nbdkit_captive(["file", "disk"], can).run_to(0);
        assert_eq!(ours.text(), theirs.text());
    }
}

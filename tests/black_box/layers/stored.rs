//! Filters that keep data in temporary files, or that unpack it: `cow`, `cache`, `gzip`, `lzip`, `xz`, `tar`; and those that
//! look after the plugin: `readahead`, `scan`, `ddrescue`, `retry`, `retry-request`.

use std::fs;

use super::*;

/// `disk` in the room: 1 MiB and 100 bytes of data that repeats nowhere, and a hole in it.
fn disk(room: &Room) -> Vec<u8> {
    let mut state = 1u32;
    let mut data: Vec<u8> = (0..(1 << 20) + 100)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect();
    data[262_144..524_288].fill(0);
    room.write("disk", &data);
    let file = fs::File::options().write(true).open(room.path("disk")).expect("it was just written");
    let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(&file, punch, 262_144, 262_144).expect("the file system knows holes");
    data
}

#[track_caller]
fn shell(room: &Room, command: &str) {
    room.tool("sh", ["-c", command]).run_to(0);
}

const CHANGES: &[&str] = &[
    "blocks",
    "read 1048676 0",
    "extents 1048676 0",
    "write 3xaa 5",
    "write 200000xbb 60000",
    "write 100xcc 1048576",
    "write 0102 1048674 fua",
    "read 1048676 0",
    "read 12 0",
    "cache 300000 5",
    "flush",
    "read 65536 200000",
    "write 00 1048676",
    "read 2 1048675",
    "export other",
    "read 1048676 0",
];

#[test]
fn cow_leaves_the_plugin_as_it_is() {
    for parameter in
        ["cow-block-size=4096", "cow-on-cache=true", "cow-on-read=true", "cow-on-read=/", "cow-block-size=128K"]
    {
        let mut operations: Vec<&str> = CHANGES[..CHANGES.len() - 2].to_vec();
        operations.extend(["trim 200000 100000", "extents 1048676 0", "read 1048676 0", "export", "read 1048676 0"]);
        same_in(|room| drop(disk(room)), &["--filter=cow", "file", "disk", parameter], &operations);
    }
    let room = Room::new();
    let before = disk(&room);
    // Unlike nbdkit's, which has the function and does not offer it.
    let arguments = ["--filter=cow", "file", "disk"];
    let answers = answers_in(
        &room,
        &arguments,
        &[
            "info",
            "zero 300000 10",
            "zero 10 10 fast",
            "read 12 9",
            "extents 400000 0",
            "export other",
            "read 4 10",
            "export",
            "read 4 10",
        ],
    );
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let expected = format!(
        "info: 1048676 cache df fast_zero flush fua multi_conn trim zero extents=True\n\
         zero 300000 10: done\nzero 10 10 fast: ENOTSUP\nread 12 9: {}\nextents 400000 0: 327680:0 72320:3\n\
         export other: done\nread 4 10: {}\nexport: done\nread 4 10: 00000000\n",
        hex(&[before[9], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        hex(&before[10..14]),
    );
    assert_eq!(answers, expected);
    assert!(fs::read(room.path("disk")).expect("it is there") == before);
    room.assert_nothing_left();
}

#[test]
fn cow_tells_how_deep_data_lies() {
    let room = Room::new();
    let arguments = ["--filter=cow", "memory", "256K"];
    let command =
        "qemu-io -f raw -c 'write 70000 10' \"$uri\" >/dev/null && nbdinfo --map=qemu:allocation-depth \"$uri\"";
    let output = room.captive(arguments, command).run_to(0);
    let map: Vec<Vec<&str>> = output.text().lines().map(|line| line.split_whitespace().take(3).collect()).collect();
    assert_eq!(map, [["0", "65536", "2"], ["65536", "65536", "1"], ["131072", "131072", "2"]]);
}

#[test]
fn bad_parameters_are_refused() {
    for (filter, parameter) in [
        ("cow", "cow-block-size=1000"),
        ("cow", "cow-block-size=6000"),
        ("cow", "cow-on-read=maybe"),
        ("cache", "cache=never"),
        ("cache", "cache-min-block-size=512"),
        ("cache", "cache-max-size=1000"),
        ("cache", "cache-high-threshold=0"),
        ("cache", "cache-low-threshold=0"),
        ("cache", "cache-low-threshold=x"),
        ("lzip", "lzip-max-depth=0"),
        ("lzip", "lzip-max-block=1X"),
        ("xz", "xz-max-depth=0"),
        ("xz", "xz-max-block=1X"),
        ("scan", "scan-size=1000"),
        ("scan", "scan-size=64M"),
        ("retry", "retries=-1"),
        ("retry", "retry-delay=0"),
        ("retry", "retry-readonly=perhaps"),
        ("retry-request", "retry-request-retries=1001"),
        ("retry-request", "retry-request-delay=0"),
        ("retry-request", "retry-request-open=2"),
    ] {
        let arguments = ["--filter", filter, "null", parameter];
        match parameter {
            // What 1.32 has no word for, or other words than 1.45.
            "cow-block-size=1000" | "cow-block-size=6000" | "cache-min-block-size=512" | "xz-max-block=1X" => {
                drop(refusal(&arguments))
            }
            _ if ["lzip", "scan"].contains(&filter) => drop(refusal(&arguments)),
            _ => drop(same_refusal(&arguments)),
        }
    }
    assert_eq!(
        refusal(&["--filter=cow", "null", "cow-block-size=5000"]),
        "cow-block-size is out of range (4096..2G) or not a power of 2"
    );
    let arguments =
        ["--filter=cache", "null", "cache-max-size=1M", "cache-low-threshold=90", "cache-high-threshold=90"];
    assert_eq!(same_refusal(&arguments), "cache-low-threshold must be less than cache-high-threshold");
    assert_eq!(
        same_refusal(&["--filter=tar", "null", "tar-entry=a", "tar-entry=b"]),
        "only one tar-entry parameter can be given"
    );
    let room = Room::new();
    let missing = "no-such-map: ddrescue: fopen: No such file or directory";
    assert!(refusal_in(&room, &["--filter=ddrescue", "null", "ddrescue-mapfile=no-such-map"]).starts_with(missing));
}

#[test]
fn without_a_place_for_temporary_files_nothing_is_served() {
    for filter in ["cow", "cache", "gzip"] {
        let room = Room::new();
        let mut launch = room.captive(["--filter", filter, "null", "1M"], "echo served");
        let output = launch.env("TMPDIR", "/no/such/directory").run_to(1);
        output.expect_error_line(&["cannot make a temporary file in /no/such/directory: No such file or directory"]);
    }
}

#[test]
fn cache_writes_back_at_a_flush() {
    for parameter in [
        "cache=writeback",
        "cache=writethrough",
        "cache=unsafe",
        "cache-on-read=true",
        "cache-on-read=/",
        "cache-max-size=1M",
        "cache-min-block-size=4096",
    ] {
        let prepare = |room: &Room| drop(disk(room));
        let mut operations = vec!["info"];
        operations.extend(CHANGES);
        operations.extend(["zero 100000 300", "zero 5 5 fast", "flush", "read 1048676 0"]);
        // nbdkit has one cache for all exports, which here are all the same file.
        operations.retain(|operation| !operation.starts_with("export"));
        same_in(prepare, &["--filter=cache", "file", "disk", parameter], &operations);
        // And the file has it all at the end, flushed or not.
        let room = Room::new();
        let mut expected = disk(&room);
        let arguments = ["--filter=cache", "file", "disk", parameter];
        answers_in(&room, &arguments, &["write 3xaa 5", "write 100000xbb 70000"]);
        expected[5..8].fill(0xaa);
        expected[70_000..170_000].fill(0xbb);
        let is_there = fs::read(room.path("disk")).expect("it is there") == expected;
        assert_eq!(is_there, parameter != "cache=unsafe", "{parameter}");
        room.assert_nothing_left();
    }
}

#[test]
fn a_small_cache_gives_the_data_of_a_large_disk() {
    let room = Room::new();
    let arguments = ["--filter=cache", "memory", "16M", "cache-max-size=1M", "cache-on-read=true"];
    let commands = "-c 'write -P 7 0 8M' -c 'read -P 7 0 8M' -c flush -c 'read -P 7 0 8M' -c 'read -P 0 8M 8M'";
    let output = room.captive(arguments, format!("qemu-io -f raw {commands} \"$uri\"")).run_to(0);
    assert_eq!(output.text().matches(" at offset ").count(), 4, "{output:#?}");
    assert!(!output.text().contains("failed"), "{output:#?}");
}

/// A file system that is full is the client's error, and the server goes on.
#[test]
fn a_full_disk_is_an_error_of_the_request() {
    let room = Room::new();
    let script = format!(
        "mkdir small && mount -t tmpfs -o size=1m tmpfs small || exit 77\n\
         TMPDIR=$PWD/small '{}' -U {}/s --filter=$0 memory 16M --run 'qemu-io -f raw -c \"write -P 7 0 4M\" \
         -c \"read -P 0 8M 64k\" -c \"write -P 9 64k 64k\" \"$uri\"'\n\
         status=$?; umount small; exit $status",
        crate::harness::server_path().display(),
        room.tmpdir().display(),
    );
    for filter in ["cow", "cache"] {
        let output = room.tool("sh", ["-c", &script.replace("mkdir small", "mkdir -p small"), filter]).start().finish();
        if output.status.code() == Some(77) {
            panic!("the tests of a full disk need the right to mount: {output:#?}");
        }
        assert!(output.text().contains("write failed: No space left on device"), "{output:#?}");
        assert!(output.text().contains("read 65536/65536 bytes at offset 8388608"), "{output:#?}");
    }
}

#[test]
fn gzip_and_bzip2_are_unpacked() {
    for (format, suffix) in [("gzip", "gz"), ("bzip2", "bz2")] {
        let prepare = |room: &Room| {
            disk(room);
            shell(room, &format!("{format} -k disk"));
        };
        let (filter, packed) = (format!("--filter={format}"), format!("disk.{suffix}"));
        let gzip = |room: &Room| {
            disk(room);
            shell(room, "gzip -k disk");
        };
        let operations =
            ["info", "read 1048676 0", "read 100 1048576", "read 3 262143", "cache 1000 0", "read 2 1048675"];
        let arguments = [&*filter, "file", &packed];
        let room = Room::new();
        prepare(&room);
        let answers = answers_in(&room, &arguments, &operations);
        assert!(answers.starts_with("info: 1048676 "), "{answers}");
        // What it is packed as makes no difference; Debian's nbdkit has gzip alone.
        assert_eq!(answers, same_in(gzip, &["--filter=gzip", "file", "disk.gz"], &operations));
        // Which nbdkit takes for the first of them alone.
        let room = Room::new();
        shell(&room, &format!("{{ printf one | {format}; printf two | {format}; head -c 512 /dev/zero; }} > members"));
        let answers = answers_in(&room, &[&*filter, "file", "members"], &["read 6 0", "export", "read 3 3"]);
        assert_eq!(answers, "read 6 0: 6f6e6574776f\nexport: done\nread 3 3: 74776f\n");
        room.assert_nothing_left();
        for damage in ["cat disk", &format!("head -c 5 {packed}"), "cat /dev/null"] {
            let room = Room::new();
            prepare(&room);
            shell(&room, &format!("{damage} > damaged"));
            let line = refusal_in(&room, &[&*filter, "file", "damaged"]);
            assert!(line.starts_with(&format!("{format}: inflate: ")), "{damage}: {line}");
            room.assert_nothing_left();
        }
        // What is wrong further on shows when all is unpacked.
        let room = Room::new();
        shell(&room, &format!("head -c 2000000 /dev/urandom | {format} | head -c -100 > damaged"));
        let output = room.captive([&*filter, "file", "damaged"], "nbdinfo \"$uri\"; exit 0").run_to(0);
        assert!(output.stderr.contains(&format!("{format}: inflate: ")), "{output:#?}");
        room.assert_nothing_left();
    }
}

#[test]
fn xz_is_unpacked_block_by_block() {
    for (pack, parameter) in [
        ("xz -k disk", "xz-max-depth=1"),
        ("xz -k --block-size=65536 disk", "xz-max-depth=8"),
        ("xz -k -9 --check=sha256 --block-size=4096 disk", "xz-max-depth=2"),
        ("xz -k --check=crc32 --x86 --delta=dist=4 --lzma2 disk", "xz-max-block=1048676"),
        ("xz -k --check=none disk", "xz-max-block=2M"),
        (
            "head -c 300000 disk | xz > disk.xz; tail -c +300001 disk | xz --block-size=100000 >> disk.xz",
            "xz-max-depth=3",
        ),
    ] {
        let prepare = |room: &Room| {
            disk(room);
            shell(room, pack);
        };
        let operations = [
            "info",
            "read 1048676 0",
            "read 100 1048576",
            "read 3 262143",
            "read 70000 65530",
            "read 64 299990",
            "cache 1000 0",
            "read 2 1048675",
        ];
        let answers = same_in(prepare, &["--filter=xz", "file", "disk.xz", parameter], &operations);
        assert!(answers.starts_with("info: 1048676 "), "{answers}");
    }
}

#[track_caller]
fn is_refused(room: &Room, arguments: &[&str], why: &str) {
    let line = refusal_in(room, arguments);
    assert!(line.contains(why), "{line}");
}

#[test]
fn xz_that_is_damaged_or_too_large_is_refused() {
    let packed = |pack: &str| {
        let room = Room::new();
        disk(&room);
        shell(&room, pack);
        room
    };
    let check = |pack, parameter, why| is_refused(&packed(pack), &["--filter=xz", "file", "disk.xz", parameter], why);
    check(
        "xz disk",
        "xz-max-block=1M",
        "largest block is bigger than xz-max-block: 1048676 bytes, and xz-max-block is 1048576",
    );
    check("cp disk disk.xz", "xz-max-depth=1", "xz: not an xz file");
    check("xz disk; truncate -s -4 disk.xz", "xz-max-depth=1", "xz: invalid stream footer");
    check("xz disk; truncate -s -5 disk.xz", "xz-max-depth=1", "size is not a multiple of 4 bytes");
    check("truncate -s 5 disk.xz", "xz-max-depth=1", "xz: file too short");
    // In the data, which its check finds when it is read.
    let room = packed("xz disk; printf x | dd of=disk.xz bs=1 seek=400000 conv=notrunc");
    let arguments = ["--filter=xz", "file", "disk.xz"];
    let output = room.captive(arguments, "nbdcopy \"$uri\" copy; exit 0").run_to(0);
    assert!(output.stderr.contains("xz: block at 12: "), "{output:#?}");
}

/// Packs `from` in the room as plzip(1) does, with a member for each `size` bytes, or one for all.
#[track_caller]
fn lzip(room: &Room, size: usize, from: &str) {
    room.write("lzip.py", LZIP_PROGRAM);
    shell(room, &format!("/usr/bin/python3 lzip.py {size} < {from} >> disk.lz"));
}

#[test]
fn lzip_is_unpacked_member_by_member() {
    let operations = [
        "info",
        "read 1048676 0",
        "read 100 1048576",
        "read 3 262143",
        "read 70000 65530",
        "read 64 299990",
        "cache 1000 0",
        "read 2 1048675",
    ];
    // What it is packed as makes no difference; Debian's nbdkit has xz alone.
    let xz = |room: &Room| {
        disk(room);
        shell(room, "xz -k disk");
    };
    let expected = same_in(xz, &["--filter=xz", "file", "disk.xz"], &operations);
    assert!(expected.starts_with("info: 1048676 "), "{expected}");
    for (size, parameter) in [
        (0, "lzip-max-depth=1"),
        (65536, "lzip-max-depth=8"),
        (4096, "lzip-max-depth=2"),
        (0, "lzip-max-block=1048676"),
    ] {
        let room = Room::new();
        disk(&room);
        lzip(&room, size, "disk");
        // That it is lzip's format, not only our own.
        shell(&room, "xz --format=lzip -dc disk.lz | cmp - disk");
        assert_eq!(answers_in(&room, &["--filter=lzip", "file", "disk.lz", parameter], &operations), expected);
        room.assert_nothing_left();
    }
    // Members of any size, one of them without data.
    let room = Room::new();
    disk(&room);
    shell(&room, "head -c 300000 disk > one; tail -c +300001 disk > two");
    lzip(&room, 0, "one");
    lzip(&room, 0, "/dev/null");
    lzip(&room, 100_000, "two");
    assert_eq!(answers_in(&room, &["--filter=lzip", "file", "disk.lz"], &operations), expected);
}

#[test]
fn lzip_that_is_damaged_or_too_large_is_refused() {
    let packed = |change: &str| {
        let room = Room::new();
        disk(&room);
        lzip(&room, 0, "disk");
        shell(&room, change);
        room
    };
    let check =
        |change, parameter, why| is_refused(&packed(change), &["--filter=lzip", "file", "disk.lz", parameter], why);
    check(
        "true",
        "lzip-max-block=1M",
        "largest block is bigger than lzip-max-block: 1048676 bytes, and lzip-max-block is 1048576",
    );
    check("cp disk disk.lz", "lzip-max-depth=1", "lzip: not an lzip file");
    check("truncate -s -4 disk.lz", "lzip-max-depth=1", "lzip: no member ends at ");
    check("truncate -s +512 disk.lz", "lzip-max-depth=1", "behind its last member");
    check("truncate -s 25 disk.lz", "lzip-max-depth=1", "lzip: file too short");
    // In the data, its checksum, its length or the member's: this is found when it is read.
    for (change, why) in [
        ("printf x | dd of=disk.lz bs=1 seek=400000 conv=notrunc", ""),
        ("printf xxxx | dd of=disk.lz bs=1 seek=$(($(stat -c %s disk.lz) - 20)) conv=notrunc", "CRC"),
        (
            "printf '\\0' | dd of=disk.lz bs=1 seek=$(($(stat -c %s disk.lz) - 16)) conv=notrunc",
            "not as long as the index",
        ),
        ("printf '\\377' | dd of=disk.lz bs=1 seek=$(($(stat -c %s disk.lz) - 16)) conv=notrunc", "size mismatch"),
    ] {
        let room = packed(change);
        let output = room.captive(["--filter=lzip", "file", "disk.lz"], "nbdcopy \"$uri\" copy; exit 0").run_to(0);
        assert!(output.stderr.contains("lzip: block at 0: ") && output.stderr.contains(why), "{change}: {output:#?}");
    }
}

#[test]
fn tar_serves_an_entry_in_place() {
    let long = format!("{}/disk", "d".repeat(120));
    for format in ["gnu", "posix", "ustar", "v7", "oldgnu"] {
        let names: &[&str] = if format == "v7" { &["disk"] } else { &["disk", &long] };
        let prepare = |room: &Room| {
            disk(room);
            fs::create_dir(room.path("d".repeat(120))).expect("a directory in the room");
            fs::copy(room.path("disk"), room.path(&long)).expect("a copy in the room");
            let name = names.last().expect("there is one");
            shell(room, &format!("echo small > a; tar --format={format} -cf disk.tar a disk {name}"));
        };
        let operations = [
            "info",
            "read 1048676 0",
            "write 5xaa 1048671",
            "write aabb 3",
            "zero 4096 10000",
            "trim 4096 20000",
            "flush",
            "cache 4096 0",
            "read 1048676 0",
            "write 00 1048676",
            "extents 1048676 0",
        ];
        let answers = same_in(prepare, &["--filter=tar", "file", "disk.tar", "tar-entry=disk"], &operations);
        // A longer name has headers of its own, which nbdkit takes for the data.
        let room = Room::new();
        prepare(&room);
        let entry = format!("tar-entry={}", names.last().expect("there is one"));
        let other = answers_in(&room, &["--filter=tar", "file", "disk.tar", &entry], &operations[..10]);
        assert!(answers.starts_with(&other), "{other}");
        // What was written is in the archive, and nothing else has changed.
        let room = Room::new();
        prepare(&room);
        answers_in(
            &room,
            &["--filter=tar", "file", "disk.tar", "tar-entry=disk"],
            &["write 05xaa 0", "write 5xaa 1048671"],
        );
        shell(
            &room,
            "mkdir out && tar -xf disk.tar -C out && cmp a out/a && [ $(cmp -l disk out/disk | wc -l) -le 10 ]",
        );
    }
}

#[test]
fn tar_refuses_what_does_not_lie_there() {
    let room = Room::new();
    disk(&room);
    shell(
        &room,
        "ln -s disk symbolic; ln disk hard; truncate -s 10M sparse; echo data >> sparse; \
         for format in gnu posix; do tar --format=$format -S -cf $format.tar disk symbolic hard sparse .; done; \
         gzip -k gnu.tar; head -c 100000 gnu.tar > short.tar",
    );
    for (archive, entry, why) in [
        ("gnu.tar", "sparse", "tar: sparse is a sparse file, which cannot be served in place"),
        ("posix.tar", "sparse", "tar: sparse is a sparse file, which cannot be served in place"),
        ("posix.tar", "hard", "tar: hard is not a regular file"),
        ("gnu.tar", "symbolic", "tar: symbolic is not a regular file"),
        ("gnu.tar", "nothing", "tar: nothing was not found, check that the file really exists in the tarball"),
        ("gnu.tar.gz", "disk", "tar: this is no uncompressed tar archive"),
    ] {
        let entry = format!("tar-entry={entry}");
        assert!(refusal_in(&room, &["--filter=tar", "file", archive, &entry]).starts_with(why));
    }
}

/// An export that is not there, or cannot be read, is the client's matter: there may be others.
#[test]
fn what_a_plugin_cannot_serve_by_default_is_no_reason_not_to_start() {
    let room = Room::new();
    let disk = disk(&room);
    shell(&room, "mkdir dir && tar -cf dir/a.tar disk && cp disk dir/b");
    let arguments = ["--filter=tar", "file", "dir=dir", "tar-entry=disk"];
    let command =
        "nbdcopy \"nbd+unix:///a.tar?socket=$unixsocket\" copy && ! nbdinfo \"nbd+unix:///b?socket=$unixsocket\"";
    let output = room.captive(arguments, command).run_to(0);
    assert!(fs::read(room.path("copy")).expect("it was copied") == disk);
    assert!(output.stderr.contains("tar: this is no uncompressed tar archive"), "{output:#?}");
    let arguments = ["--filter=partition", "--filter=error", "memory", "1M", "partition=1", "error-rate=100%"];
    let output = room.captive(arguments, "nbdinfo \"$uri\"; exit 0").run_to(0);
    assert!(output.stderr.contains("injecting EIO error into pread"), "{output:#?}");
    // Nor what a plugin says when it is opened.
    let arguments = ["--filter=offset", "eval", "open=echo EIO not yet >&2; exit 1", "get_size=echo 512", "offset=1"];
    room.captive(arguments, "echo served").run_to(0);
    room.assert_nothing_left();
}

/// The manual's own example of two filters.
#[test]
fn tar_inside_gzip_and_xz() {
    let room = Room::new();
    let disk = disk(&room);
    shell(&room, "tar -cf disk.tar disk && gzip -k disk.tar && xz -k disk.tar");
    for (filter, archive) in [("gzip", "disk.tar.gz"), ("xz", "disk.tar.xz")] {
        let arguments = ["file", archive, "tar-entry=disk", "--filter=tar", "--filter", filter];
        room.captive(arguments, "nbdcopy \"$uri\" copy").run_to(0);
        assert!(fs::read(room.path("copy")).expect("it was copied") == disk);
        let arguments = ["file", archive, "tar-entry=disk", "--filter=cow", "--filter=tar", "--filter", filter];
        room.captive(arguments, "nbdcopy copy \"$uri\"").run_to(0);
        room.assert_nothing_left();
    }
}

#[test]
fn ddrescue_reads_only_what_was_rescued() {
    let prepare = |room: &Room| {
        disk(room);
        room.write(
            "map",
            "# Mapfile\n0x0 + 1\n0x00000000 0x00001000 +\n0x1000 0x1000 -\n8192 4096 +\n0x10000  512\t+\n",
        );
    };
    let operations = [
        "info",
        "read 4096 0",
        "read 4097 0",
        "read 1 4096",
        "read 4096 8192",
        "read 4096 8191",
        "read 512 65536",
        "read 513 65536",
        "read 1 1048675",
        "write 00 0",
    ];
    let answers = same_in(prepare, &["--filter=ddrescue", "file", "disk", "ddrescue-mapfile=map"], &operations);
    assert!(answers.contains("read 1 4096: EIO\n"), "{answers}");
    same_in(prepare, &["--filter=ddrescue", "file", "disk"], &["info", "read 1 0"]);
}

#[test]
fn readahead_and_scan_change_nothing_that_a_client_sees() {
    let operations = ["info", "read 1048676 0", "read 65536 0", "read 65536 65536", "read 65536 131072", "flush"];
    for filters in
        [&["--filter=readahead"][..], &["--filter=readahead", "--filter=cache"], &["--filter=scan", "--filter=cache"]]
    {
        let arguments = [filters, &["file", "disk"]].concat();
        if filters[0] == "--filter=readahead" {
            same_in(|room| drop(disk(room)), &arguments, &operations);
        } else {
            let room = Room::new();
            disk(&room);
            let plain = answers_in(&room, &["file", "disk"], &operations);
            let answers = answers_in(&room, &arguments, &operations);
            assert_eq!(answers.split_once('\n').expect("lines").1, plain.split_once('\n').expect("lines").1);
            let ahead =
                [&arguments[..], &["scan-ahead=no", "scan-clock=no", "scan-forever=yes", "scan-size=64K"]].concat();
            assert_eq!(answers_in(&room, &ahead, &operations), answers);
        }
    }
}

/// With a plugin that never fails they are not there.
#[test]
fn retrying_changes_nothing_where_nothing_fails() {
    let operations = [
        "info",
        "write 100xaa 5",
        "zero 4096 4096",
        "zero 4096 8192 fast",
        "trim 4096 65536 fua",
        "cache 100 0",
        "extents 1048576 0",
        "read 1048576 0",
        "flush",
        "write 00 1048576",
    ];
    for filter in ["retry", "retry-request"] {
        same(&["--filter", filter, "memory", "1M"], &operations);
    }
}

/// A plugin of 64 KiB whose METHOD fails the first TIMES times, and that notes in `log` what is called.
fn failing(method: &str, times: u32) -> Vec<String> {
    let scripts = [
        ("open", "echo handle"),
        ("close", ":"),
        ("get_size", "echo 65536"),
        ("pread", "head -c $3 /dev/zero"),
        ("pwrite", "cat > /dev/null"),
        ("flush", ":"),
        ("trim", ":"),
        ("zero", ":"),
        ("extents", "echo 0 65536"),
    ];
    let fails = format!(
        "count=$(cat count 2>/dev/null || echo 0); echo $((count + 1)) > count; \
         if [ $count -lt {times} ]; then echo 'ENOSPC failed' >&2; exit 1; fi; "
    );
    let script = |name: &str, script: &str| {
        let fails = if name == method { &fails } else { "" };
        // Scripts run in a directory of their own.
        let note = if name == "get_size" { "" } else { "echo $1 >> \"$LOG\"; cd \"${LOG%/*}\"; " };
        format!("{name}={note}{fails}{script}")
    };
    scripts.map(|(name, text)| script(name, text)).to_vec()
}

/// One server in front of a plugin that fails: the answers, and what the plugin was asked.
fn served(
    is_nbdkit: bool,
    filter: &str,
    parameters: &[&str],
    failing: &[String],
    operations: &[&str],
) -> (String, String) {
    let room = Room::new();
    let mut arguments = vec!["--filter", filter, "eval"];
    arguments.extend(failing.iter().map(String::as_str).chain(parameters.iter().copied()));
    let answers = operate(&room, operations, |command| {
        let mut launch =
            if is_nbdkit { room.nbdkit_captive(&arguments, command) } else { room.captive(&arguments, command) };
        launch.env("LOG", room.path("log"));
        launch
    });
    let log = fs::read_to_string(room.path("log")).expect("the plugin was opened").replace('\n', " ");
    // At the end this server flushes what was written.
    let end = if is_nbdkit { None } else { log.strip_suffix("flush close ") };
    (answers, end.map_or(log.clone(), |log| format!("{log}close ")))
}

/// As [`served`], by both.
fn retried(filter: &str, parameters: &[&str], failing: &[String], operations: &[&str]) -> (String, String) {
    let [ours, theirs] = [false, true].map(|is_nbdkit| served(is_nbdkit, filter, parameters, failing, operations));
    assert_eq!(ours, theirs, "left is ours, right is nbdkit's");
    ours
}

#[test]
fn retry_opens_the_plugin_again() {
    let fast = ["retry-delay=1", "retry-exponential=no", "retries=2"];
    for (method, operation) in [
        ("pread", "read 512 0"),
        ("pwrite", "write aabb 0"),
        ("flush", "flush"),
        ("trim", "trim 512 0"),
        ("zero", "zero 512 0"),
        ("extents", "extents 65536 0"),
    ] {
        let (answers, log) = retried("retry", &fast, &failing(method, 1), &[operation, "read 4 0"]);
        assert!(!answers.contains("ENOSPC"), "{answers}");
        assert_eq!(log, format!("open {method} close open {method} pread close "));
    }
    let (answers, _) = retried("retry", &fast, &failing("pread", 3), &["read 512 0", "read 4 0"]);
    assert_eq!(answers, "read 512 0: ENOSPC\nread 4 0: 00000000\n");
    let read_only = ["retry-delay=1", "retry-readonly=yes"];
    let (answers, _) =
        retried("retry", &read_only, &failing("pwrite", 1), &["write aabb 0", "write aabb 0", "read 4 0"]);
    assert_eq!(answers, "write aabb 0: EPERM\nwrite aabb 0: EPERM\nread 4 0: 00000000\n");
    // nbdkit did not do that before 1.34.
    let (answers, log) = served(false, "retry", &fast, &failing("open", 2), &["read 4 0"]);
    assert_eq!((&*answers, &*log), ("read 4 0: 00000000\n", "open open open pread close "));
}

#[test]
fn retry_request_repeats_requests() {
    let fast = ["retry-request-delay=1"];
    for (method, operation) in [
        ("pread", "read 512 0"),
        ("pwrite", "write aabb 0"),
        ("flush", "flush"),
        ("trim", "trim 512 0"),
        ("zero", "zero 512 0"),
        ("extents", "extents 65536 0"),
    ] {
        let (answers, log) = retried("retry-request", &fast, &failing(method, 1), &[operation, "read 4 0"]);
        assert!(!answers.contains("ENOSPC"), "{answers}");
        assert_eq!(log, format!("open {method} {method} pread close "));
    }
    let (answers, _) = retried("retry-request", &fast, &failing("pread", 3), &["read 512 0", "read 4 0"]);
    assert_eq!(answers, "read 512 0: ENOSPC\nread 4 0: 00000000\n");
    let (answers, log) = retried("retry-request", &fast, &failing("open", 2), &["read 4 0"]);
    assert_eq!((&*answers, &*log), ("read 4 0: 00000000\n", "open open open pread close "));
    let no_open = ["retry-request-delay=1", "retry-request-open=false"];
    let (answers, _) = retried("retry-request", &no_open, &failing("open", 1), &["export", "read 4 0"]);
    assert_eq!(answers, "export: refused\nread 4 0: 00000000\n");
}

/// A server that ends does not wait until a request has been tried often enough.
#[test]
fn retrying_ends_with_the_server() {
    for (filter, delay) in [("retry", "retry-delay=1000"), ("retry-request", "retry-request-delay=1000")] {
        let room = Room::new();
        let mut arguments = vec!["--filter".to_owned(), filter.to_owned(), "eval".to_owned(), delay.to_owned()];
        arguments.extend(failing("pread", 100));
        let server = room.serve_with(&arguments, |launch| {
            launch.env("LOG", room.path("log"));
        });
        let mut client = room.tool("qemu-io", ["-f", "raw", "-c", "read 0 512"]);
        let client = client.args([server.uri()]).start();
        crate::harness::wait_for("the first attempt", || fs::read_to_string(room.path("count")).ok().map(drop));
        server.terminate().expect(0);
        assert!(client.finish().text().contains("read failed"));
    }
}

#[test]
fn filters_that_can_do_nothing_say_so() {
    let room = Room::new();
    let output = room.captive(["--filter=readahead", "eval", "get_size=echo 1"], "nbdinfo --size \"$uri\"").run_to(0);
    assert!(output.stderr.contains("readahead: warning: underlying plugin does not support"), "{output:#?}");
    let output = room.captive(["--filter=scan", "memory", "1M", "-e", "name"], "nbdinfo --size \"$uri\"").run_to(0);
    assert!(output.stderr.contains("scan: warning: not the default export, not scanning"), "{output:#?}");
}

//! Plugins whose data is in files: `file`, `split`, `partitioning`.

use std::fs;

use super::*;

/// Data, a hole of 64 KiB, data: `name` of its length in bytes, which is at least 96 KiB.
fn with_hole(room: &Room, name: &str, length: u64, byte: u8) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(room.path(name)).expect("a file in the room");
    file.set_len(length).expect("a sparse file");
    file.write_all_at(&[byte; 16384], 0).expect("some data");
    file.write_all_at(&vec![byte; length as usize - 81920], 81920).expect("some data");
}

#[test]
fn split_is_its_files_one_behind_the_other() {
    let prepare = |room: &Room| {
        with_hole(room, "one", 98304, 1);
        room.write("empty", "");
        with_hole(room, "two", 131072, 2);
        room.write("three", "third");
    };
    let arguments = &["split", "one", "empty", "file=two", "three"];
    let answers = same_in(
        prepare,
        arguments,
        &[
            "info",
            "read 229381 0",
            "read 10 98300",
            "read 20 229366",
            "read 1 229381",
            "extents 229381 0",
            "extents 5 229376",
            "write 20000xaa 10000",
            "read 20000 10000",
            "zero 4096 0",
            "zero 4096 0 fast",
            "read 8 4092",
            "trim 512 0",
            "flush",
        ],
    );
    assert!(answers.contains("read 10 98300: 01010101020202020202"), "{answers}");
    // Of these nbdkit 1.32 dies, or never comes back.
    let room = Room::new();
    prepare(&room);
    let answers = answers_in(&room, arguments, &["extents 40000 90000", "cache 20000 90000"]);
    assert_eq!(answers, "extents 40000 90000: 24688:0 15312:3\ncache 20000 90000: done\n");
    let same_disk = same(&["split"], &["info", "read 1 0"]);
    assert!(same_disk.starts_with("info: 0 "), "{same_disk}");
    same_in(prepare, &["-r", "split", "one", "two"], &["info", "read 10 98300", "write 00 0"]);
    assert_eq!(refusal(&["split", "no-such-file"]), "realpath: no-such-file: No such file or directory");
}

/// nbdkit writes to the first file's offset in each.
/// "With req one, extents stop at file boundaries" (nbdkit's tests/test-split-extents.sh)
#[test]
fn one_extent_of_split_ends_with_its_file() {
    let prepare = |room: &Room| {
        room.write("one", vec![1; 1 << 20]);
        room.write("two", vec![1; 1 << 20]);
    };
    let operations = ["map 786432 1048576 one", "map 0 2097152 one", "map 1048576 512 one"];
    let text = crate::both::both(&["split", "one", "two"], &operations, prepare);
    assert!(text.starts_with("map 786432 1048576 one: [(262144, 0)]\n"), "{text}");
}

#[test]
fn a_write_to_split_goes_where_a_read_looks() {
    let room = Room::new();
    for (name, length) in [("one", 1000), ("two", 1000), ("three", 1000)] {
        room.write(name, vec![0; length]);
    }
    let answers =
        answers_in(&room, &["split", "one", "two", "three"], &["write 1200x77 900", "read 4 898", "read 4 2098"]);
    assert!(answers.ends_with("read 4 898: 00007777\nread 4 2098: 77770000\n"), "{answers}");
    let content = |name: &str| fs::read(room.path(name)).expect("it is there");
    assert_eq!(content("one"), [vec![0; 900], vec![0x77; 100]].concat());
    assert_eq!(content("two"), vec![0x77; 1000]);
    assert_eq!(content("three"), [vec![0x77; 100], vec![0; 900]].concat());
}

/// Files of odd lengths, as many as are wanted.
fn parts(count: usize) -> impl Fn(&Room) {
    move |room| {
        for part in 1..=count {
            room.write(format!("p{part}").as_str(), vec![part as u8; 70000 + part * 333]);
        }
    }
}

const WHOLE: &[&str] = &["info", "read 512 0", "read 4000000 512", "read 4000000 4000512", "extents 4000000 0"];

#[test]
fn an_mbr_with_four_files_or_fewer_is_nbdkits() {
    let rows: [&[&str]; 4] = [
        &["p1"],
        &["file=p1", "mbr-id=0x82", "p2", "mbr-id=default", "p3", "alignment=512", "p4"],
        &["alignment=4096", "p1", "partition-type=DOS", "p2", "mbr-id=7", "p3"],
        &["alignment=64k", "p1", "p2", "p3", "p4"],
    ];
    for row in rows {
        let arguments: Vec<&str> = ["partitioning"].iter().chain(row).copied().collect();
        same_in(parts(4), &arguments, &WHOLE[..2]);
        let size = |answers: &str| answers.split(' ').nth(1).and_then(|size| size.parse::<u64>().ok());
        let room = Room::new();
        parts(4)(&room);
        let bytes = size(&answers_in(&room, &arguments, &["info"])).expect("a size");
        same_in(parts(4), &arguments, &[&format!("read {bytes} 0"), &format!("extents {bytes} 0")]);
    }
}

#[test]
fn an_mbr_with_logical_partitions_is_nbdkits() {
    let mut arguments = vec!["partitioning", "partition-type=mbr", "alignment=8192"];
    arguments.extend(["p1", "p2", "p3", "p4", "mbr-id=0x0b", "p5", "p6", "p7"]);
    let read = &["info", "read 500000 0", "read 8 500000"];
    same_in(parts(7), &arguments, read);
}

/// All but what is random in it, and the checksums over that; those are tested where they are made.
#[test]
fn a_gpt_is_nbdkits() {
    let mut arguments = vec!["partitioning", "alignment=4096", "p1", "p2"];
    arguments.extend(["type-guid={6A82CB45-1DD2-11B2-99A6-080020736631}", "p3", "type-guid=default", "p4", "p5"]);
    let mut operations: Vec<String> = ["info", "read 512 0", "read 16 512", "read 64 532"].map(String::from).to_vec();
    operations.push("read 8 592".to_owned());
    for entry in 0..5 {
        let at = 1024 + entry * 128;
        operations.extend([format!("read 16 {at}"), format!("read 32 {}", at + 32), format!("read 64 {}", at + 64)]);
    }
    operations.push("read 15000 1664".to_owned());
    operations.push("read 300000 17408".to_owned());
    let operations: Vec<&str> = operations.iter().map(String::as_str).collect();
    let answers = same_in(parts(5), &arguments, &operations);
    // The file's name in UTF-16.
    assert!(answers.contains("7000310000000000"), "{answers}");
    assert!(answers.contains(": 45cb826ad21db21199a6080020736631"), "{answers}");
}

/// "-D partitioning.regions=1: Print the regions table."
#[test]
fn the_regions_of_a_disk_are_shown() {
    let table = |launch: &mut Launch| {
        let output = launch.run_to(0);
        output.debug_lines().filter(|line| line.starts_with("region[")).map(str::to_owned).collect::<Vec<_>>()
    };
    let room = Room::new();
    parts(6)(&room);
    for words in [
        &["p1", "p2"][..],
        &["partition-type=mbr", "alignment=8192", "p1", "p2", "p3", "p4", "p5", "p6"],
        &["p1", "alignment=512", "p2", "p3", "partition-type=gpt"],
    ] {
        let arguments = [&["-v", "-D", "partitioning.regions=1", "partitioning"], words].concat();
        let ours = table(&mut room.captive(&arguments, "true"));
        assert_eq!(ours, table(&mut room.nbdkit_captive(&arguments, "true")));
        assert!(ours.len() > 4, "{ours:#?}");
        assert_eq!(table(&mut room.captive([&["-v", "partitioning"], words].concat(), "true")), [""; 0]);
        assert_eq!(room.captive(&arguments[1..], "true").run_to(0).stderr, "");
    }
}

#[test]
fn partitions_can_be_written_and_what_is_between_them_cannot() {
    let operations = &[
        "write 1000x99 1048576",
        "read 1002 1048575",
        // The table, and what is there already.
        "write 00 510",
        "write 55aa 510",
        "write copy:512 0",
        // Padding.
        "write 512x00 512",
        "write 01 513",
        // From the end of the partition into what makes up its last sector.
        "write 8x98 1118905",
        "write 9800000000 1118908",
        "zero 4096 1048576",
        "read 16 1048576",
        "zero 512 0",
        "trim 512 1048576",
        "write ff 1048577 fua",
        "cache 4096 1048576",
        "flush",
    ];
    let answers = same_in(parts(1), &["partitioning", "p1"], operations);
    assert!(answers.contains("write 00 510: EIO\nwrite 55aa 510: done\n"), "{answers}");
    let room = Room::new();
    parts(1)(&room);
    answers_in(&room, &["partitioning", "p1"], operations);
    let content = fs::read(room.path("p1")).expect("it is there");
    assert_eq!(content.len(), 70333);
    assert_eq!((content[0], content[1], content[4096]), (0, 0xff, 1));
}

#[test]
fn partitioning_refuses_what_makes_no_sense() {
    let rows: [&[&str]; 8] = [
        &[],
        &["partition-type=amiga"],
        &["alignment=1"],
        &["alignment=2M"],
        &["alignment=1000"],
        &["mbr-id=256"],
        &["type-guid=123"],
        &["no-such-file"],
    ];
    for row in rows {
        let arguments: Vec<&str> = ["partitioning"].iter().chain(row).copied().collect();
        same_refusal(&arguments);
    }
    let room = Room::new();
    room.write("empty", "");
    assert_eq!(refusal_in(&room, &["partitioning", "empty"]), "empty: zero length partitions are not allowed");
    let large = fs::File::create(room.path("large")).expect("a file in the room");
    large.set_len(3 << 40).expect("a sparse file");
    let line = refusal_in(&room, &["partitioning", "large", "partition-type=mbr"]);
    assert!(line.contains("but you requested 1 partition(s) and a total size of 3298534883328 bytes"), "{line}");
    assert_eq!(refusal_in(&room, &["partitioning", "tmp"]), "tmp: Is a directory");
}

const FILE_OPERATIONS: &[&str] = &[
    "info",
    "list",
    "read 16 0",
    "read 3000 100000",
    "write 4x11 300 fua",
    "write 70000x22 100001",
    "read 8 299",
    "zero 5000 100100",
    "zero 5000 150000 nohole",
    "zero 10 200000 fua",
    "trim 65536 131072",
    "trim 3 7 fua",
    "cache 100000 0",
    "flush",
    "read 300777 0",
    "extents 300777 0",
    "read 2 300776",
    "write 0000 300776",
    "zero 2 300776",
    "trim 1 300777",
    "cache 1 300777",
    "export anything",
    "read 16 300",
];

/// Data, a hole, and an end that is no multiple of anything.
fn sparse(room: &Room, name: &str) {
    let mut data = vec![7; 65536];
    data[300..304].copy_from_slice(b"here");
    fs::write(room.path(name), data).expect("the room is ours");
    let file = fs::OpenOptions::new().write(true).open(room.path(name)).expect("it was just written");
    file.set_len(300_777).expect("the room is ours");
}

#[test]
fn a_file_is_served_as_by_nbdkit() {
    let prepare = |room: &Room| sparse(room, "disk");
    let rows: [&[&str]; 6] = [
        &["file", "disk"],
        &["file", "file=disk", "cache=none"],
        &["file", "disk", "fadvise=sequential", "cache=default"],
        &["file", "disk", "fadvise=random"],
        &["file", "disk", "fadvise=normal"],
        &["-r", "file", "disk"],
    ];
    for arguments in rows {
        let answers = same_in(prepare, arguments, FILE_OPERATIONS);
        assert!(answers.contains("info: 300777 "), "{answers}");
    }
    // A file that nobody may write.
    let prepare = |room: &Room| {
        sparse(room, "disk");
        fs::create_dir(room.path("files")).expect("the room is ours");
        sparse(room, "files/with space");
        sparse(room, "files/second");
        std::os::unix::fs::symlink("second", room.path("files/link")).expect("the room is ours");
        std::os::unix::fs::symlink("/dev/null", room.path("files/null")).expect("the room is ours");
        fs::create_dir(room.path("files/below")).expect("the room is ours");
    };
    let operations = [
        "list",
        "export second",
        "info",
        "read 16 300",
        "export link",
        "read 16 300",
        "export null",
        "export below",
        "export ..",
        "export ./second",
        "export below/x",
        "export /etc/passwd",
        "export nowhere",
        "export",
    ];
    same_in(prepare, &["file", "dir=files"], &operations);
    same_in(prepare, &["-r", "file", "directory=files"], &operations);
}

#[test]
fn file_refuses_what_makes_no_sense() {
    let room = Room::new();
    room.write("disk", "x");
    for row in [
        &["file"][..],
        &["file", "fd=2"],
        &["file", "fd=x"],
        &["file", "fd=99999"],
        &["file", "fadvise=often", "/etc/passwd"],
        &["file", "/etc/passwd", "cache=all"],
        &["file", "/etc/passwd", "fd=7"],
        &["file", "dir=/etc/passwd"],
        &["file", "/etc"],
        &["file", "/dev/null"],
        &["file", "/nowhere"],
        &["file", "file="],
    ] {
        let line = refusal(row);
        let output = Room::new().nbdkit_captive(row, "echo served").run_to(1);
        let theirs = line.replace("nbdcaptive", "nbdkit");
        // Debian's has no descriptors yet.
        let is_newer = row.iter().any(|word| word.starts_with("fd=")) || line.contains("or fd=<FD>");
        assert!(is_newer || output.stderr.contains(&theirs), "ours: {line}; nbdkit's: {}", output.stderr);
    }
    assert_eq!(refusal(&["file", "dirfd=1000"]), "dirfd is not a directory: 1000");
}

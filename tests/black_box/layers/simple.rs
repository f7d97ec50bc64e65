//! Plugins whose data follows from a few numbers: `zero`, `ones`, `pattern`, `random`, `full`, `sparse-random`, `info`,
//! and the examples.

use super::*;

#[test]
fn zero_has_no_bytes() {
    let answers = same(&["zero"], &["info", "list", "flush", "read 1 0", "extents 1 0"]);
    assert!(answers.starts_with("info: 0 "), "{answers}");
    assert_eq!(refusal(&["zero", "size=1"]), "zero: this plugin does not need command line configuration");
}

/// Newer than Debian's nbdkit. "nbdkit-ones-plugin is a test plugin which serves a constant byte".
#[test]
fn ones_are_one_byte_whatever_is_written() {
    let operations = &[
        "info",
        "read 8 1048568",
        "write 4x00 0 fua",
        "zero 4096 0 fast",
        "trim 4096 0",
        "cache 4096 0",
        "flush",
        "read 8 0",
        "extents 1048576 0",
        "read 1 1048576",
    ];
    let told = |byte: &str| {
        format!(
            "info: 1048576 cache df fast_zero flush fua multi_conn trim zero extents=True\n\
             read 8 1048568: {byte}\nwrite 4x00 0 fua: done\nzero 4096 0 fast: done\ntrim 4096 0: done\n\
             cache 4096 0: done\nflush: done\nread 8 0: {byte}\nextents 1048576 0: 1048576:0\nread 1 1048576: EINVAL\n"
        )
    };
    assert_eq!(answers(&["ones", "1M"], operations), told("ffffffffffffffff"));
    assert_eq!(answers(&["ones", "size=1M", "byte=0x5a"], operations), told("5a5a5a5a5a5a5a5a"));
    assert_eq!(refusal(&["ones", "byte=256"]), "byte: could not parse number: \"256\": Numerical result out of range");
}

#[test]
fn pattern_is_its_own_offset() {
    let answers = same(
        &["pattern", "7E"],
        &[
            "info",
            "read 64 0",
            "read 13 1152921504606846979",
            "read 1000000 1234567",
            "read 3000000 3",
            "read 1 8070450532247928831",
            "read 2 8070450532247928831",
            "write 00 0",
            "zero 1 0",
            "trim 1 0",
            "flush",
            "cache 4096 4096",
            "extents 4294967295 0",
        ],
    );
    assert!(answers.contains("read 64 0: 00000000000000000000000000000008"), "{answers}");
    assert_eq!(refusal(&["pattern", "x"]), "could not parse size string: x");
}

/// The same seed is the same disk, here and there.
#[test]
fn random_is_nbdkits_for_the_same_seed() {
    let operations = &[
        "info",
        "read 64 0",
        "read 65536 0",
        "read 70001 4093",
        "read 1048576 4294967290",
        "write copy:100000 17",
        "write copy:512 512 fua",
        "write 512x00 0",
        "write 00 8796093022207",
        "trim 512 0",
        "zero 512 0",
        "flush",
        "cache 512 0",
        "extents 65536 0",
    ];
    for seed in ["seed=0", "seed=42", "seed=0xffffffff"] {
        same(&["random", "8T", seed], operations);
    }
    same_refusal(&["random", "1M", "seed=4294967296"]);
    same_refusal(&["random", "1M", "seed=-1"]);
    let content = || answers(&["random", "1M"], &["read 4096 0", "read 4096 0"]);
    let lines = content();
    let lines: Vec<_> = lines.lines().collect();
    assert_eq!(lines[0], lines[1]);
}

#[test]
fn full_has_no_space_left() {
    let answers = same(
        &["full", "1M"],
        &[
            "info",
            "read 4096 4096",
            "write 512x00 0",
            "write 01 1048575",
            "zero 4096 0",
            "zero 4096 0 fast",
            "trim 4096 0",
            "flush",
            "extents 1048576 0",
            "read 1 1048576",
            "write 00 1048576",
        ],
    );
    assert!(answers.contains("write 01 1048575: ENOSPC"), "{answers}");
    assert_eq!(same_refusal(&["full"]), "size parameter is required");
}

#[test]
fn sparse_random_is_nbdkits_for_the_same_seed() {
    let operations = &[
        "info",
        "extents 16777216 0",
        "extents 1000000 12345",
        "read 8388608 0",
        "read 8388608 8388608",
        "read 5000 1048576",
        "write copy:8388608 8388608",
        "write copy:5000 1048576 fua",
        "write 4096x01 0",
        "write 16777216x00 0",
        "zero 16777216 0",
        "trim 4096 0",
        "trim 4096 4096",
        "zero 1 16777215",
        "flush",
        "cache 4096 0",
    ];
    let rows: [&[&str]; 5] = [
        &["seed=1", "percent=50", "runlength=65536"],
        &["seed=2", "percent=90", "runlength=4096", "random-content=true"],
        &["seed=3", "percent=12.5%", "runlength=1000000"],
        &["seed=4", "percent=0"],
        &["seed=5", "percent=100"],
    ];
    for row in rows {
        let arguments: Vec<&str> = ["sparse-random", "16M"].iter().chain(row).copied().collect();
        same(&arguments, operations);
    }
    // Newer than Debian's.
    assert_eq!(answers(&["sparse-random", "16M"], &["blocks"]), "blocks: [1, 4096]\n");
    // What is said of the whole of a large disk, with what is the default.
    same(&["sparse-random", "8G", "seed=6"], &["info", "extents 4294967295 0", "extents 4294967295 4294967295"]);
}

/// nbdkit's bytes depend on where a read begins; here a disk is a disk.
#[test]
fn sparse_random_has_the_same_bytes_in_every_window() {
    let arguments = &["sparse-random", "1M", "seed=1", "percent=100", "random-content=true"];
    let answers = answers(arguments, &["read 64 4096", "read 32 4128"]);
    let bytes: Vec<_> = answers.lines().map(|line| line.split(": ").nth(1).expect("a result")).collect();
    assert_eq!(bytes[0][64..], *bytes[1]);
}

#[test]
fn sparse_random_refuses_what_makes_no_sense() {
    for word in ["percent=-1", "percent=101", "percent=x", "runlength=0", "runlength=1k", "random-content=maybe"] {
        same_refusal(&["sparse-random", "1M", word]);
    }
}

#[test]
fn info_tells_the_export_name() {
    let operations = &[
        "info",
        "read 1 0",
        "export hello",
        "info",
        "read 5 0",
        "read 2 3",
        "write 00 0",
        "list",
        "export aGVs",
        "read 3 0",
        "export aGVsbG8=",
        "read 5 0",
        "export /base64/",
        "info",
    ];
    let rows: [&[&str]; 4] =
        [&["info"], &["info", "exportname"], &["info", "mode=Base64-Export-Name"], &["info", "address"]];
    for arguments in rows {
        same(arguments, &operations[..if arguments == ["info", "address"] { 9 } else { operations.len() }]);
    }
    same_refusal(&["info", "mode=unheard-of"]);
}

#[test]
fn info_tells_a_clients_address() {
    let room = Room::new();
    let port = crate::harness::free_port();
    let program =
        "import nbd, sys\nh = nbd.NBD()\nh.connect_uri(sys.argv[1])\nprint(h.pread(h.get_size(), 0).decode())";
    let command = format!("/usr/bin/python3 -c '{program}' \"$uri\"");
    let output = room.captive(["-i", "127.0.0.1", "-p", &port, "info", "mode=address"], command).run_to(0);
    let (host, from) = output.text().trim_end().rsplit_once(':').expect("an address and a port");
    assert_eq!(host, "127.0.0.1");
    assert!(from.parse::<u16>().expect("a port") != port.parse::<u16>().expect("a port"));
}

#[test]
fn info_tells_the_time() {
    let program = "
import nbd, struct, sys, time
h = nbd.NBD()
h.connect_uri(sys.argv[1])
assert h.get_size() == 12 and not h.can_multi_conn()
moments = [struct.unpack('>QI', h.pread(12, 0)) for _ in range(3)]
assert moments == sorted(moments) and moments[0] != moments[2], moments
assert all(micros < 1000000 for _, micros in moments)
mode = sys.argv[2]
now = time.time() if mode == 'time' else 30
assert now - 60 < moments[0][0] < now + 60, moments
";
    let room = Room::new();
    room.write("look.py", program);
    for mode in ["time", "uptime", "conntime"] {
        let command = format!("/usr/bin/python3 look.py \"$uri\" {mode}");
        room.captive(["info", mode], command).run_to(0);
    }
}

/// Forgets whatever it is told.
#[test]
fn null_reads_as_zeroes() {
    let operations = &[
        "info",
        "list",
        "write 4096x11 0 fua",
        "read 4096 0",
        "zero 4096 0 fua",
        "zero 4096 0 fast",
        "trim 4096 0 fua",
        "cache 4096 0",
        "flush",
        "extents 4294967295 0",
        "read 1 1048575",
        "read 2 1048575",
        "write 0000 1048575",
        "zero 2 1048575",
        "trim 2 1048575",
        "export any",
        "info",
    ];
    same(&["null", "1M"], operations);
    same(&["null", "1048577"], operations);
    same(&["-r", "null", "1M"], operations);
    let answers = same(&["null"], &["info", "read 1 0", "flush"]);
    assert!(answers.starts_with("info: 0 "), "{answers}");
    same(&["null", "9223372036854775807"], &["info", "read 64 9223372036854775743", "read 1 9223372036854775807"]);
    // Debian's says the same in other words.
    assert_eq!(refusal(&["null", "size=x"]), "could not parse size string: x");
    assert_eq!(refusal(&["null", "size=-1"]), "size cannot be negative: -1");
}

/// Not in Debian: its bytes were taken down once from nbdkit 1.45's source.
#[test]
fn example1_has_a_partition() {
    let operations = &[
        "info",
        "list",
        "read 2 510",
        "read 16 446",
        "extents 104857600 0",
        "write 00 0",
        "flush",
        "export x",
        "info",
    ];
    assert_eq!(
        answers(&["example1"], operations),
        "info: 104857600 df read_only extents=True\nlist: [('', '')]\nread 2 510: 55aa\n\
         read 16 446: 0002030083bc310c80000000011f0300\nextents 104857600 0: 104857600:0\nwrite 00 0: EPERM\n\
         flush: EINVAL\nexport x: done\ninfo: 104857600 df read_only extents=True\n"
    );
    refusal(&["example1", "size=1"]);
}

/// Not in Debian: as 1.45's example2.c has it.
#[test]
fn example2_serves_a_file_and_no_more() {
    let room = Room::new();
    room.write("disk", [&[0; 4096][..], b"data"].concat());
    let operations = &[
        "info",
        "list",
        "read 6 4094",
        "read 2 4099",
        "extents 4100 0",
        "write 00 0",
        "cache 4 0",
        "flush",
        "export x",
        "info",
    ];
    assert_eq!(
        answers_in(&room, &["example2", "file=disk"], operations),
        "info: 4100 df read_only extents=True\nlist: [('', '')]\nread 6 4094: 000064617461\nread 2 4099: EINVAL\n\
         extents 4100 0: 4100:0\nwrite 00 0: EPERM\ncache 4 0: EINVAL\nflush: EINVAL\nexport x: done\n\
         info: 4100 df read_only extents=True\n"
    );
    let line = "you must supply the file=<FILENAME> parameter after the plugin name on the command line";
    assert_eq!(refusal(&["example2"]), line);
    assert_eq!(refusal(&["example2", "file=missing"]), "realpath: missing: No such file or directory");
    // A file without its key is a script's name, as for every plugin that has no such key.
    assert!(refusal_in(&room, &["example2", "disk"]).starts_with("unknown parameter 'script'"));
    room.assert_nothing_left();
}

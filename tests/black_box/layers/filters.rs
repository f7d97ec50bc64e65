//! Filters that change requests, what is offered, or who may come. Where Debian's nbdkit has them, next to its own.

use super::*;

/// Requests of every kind, aligned and not, and past the end of a disk of 1 MiB.
const EVERY_KIND: &[&str] = &[
    "info",
    "read 64 0",
    "write 01020304 5 fua",
    "write 5000x77 4093",
    "write 1048576x31 0",
    "zero 4096 8192",
    "zero 100 8100 nohole",
    "zero 3 1 fua",
    "trim 65536 65536",
    "trim 10 262145 fua",
    "cache 4096 1000",
    "flush",
    "read 1048576 0",
    "read 11 4090",
    "extents 1048576 0",
    "extents 1000 8000",
    "read 2 1048575",
    "write 0000 1048575",
    "zero 2 1048575",
    "trim 2 1048575",
];

/// The same answers as nbdkit's to requests of every kind on a disk in memory, with these filters.
#[track_caller]
fn same_on_memory(words: &[&str]) -> String {
    let arguments: Vec<&str> = ["memory", "1M"].iter().chain(words).copied().collect();
    same(&arguments, EVERY_KIND)
}

/// What nbdkit 1.44's own test of it asks for; QEMU asks extent by extent.
#[test]
fn cacheextents_asks_the_plugin_once_until_something_is_written() {
    let script = r#"#!/bin/sh
        case "$1" in
            thread_model) echo parallel ;;
            get_size) echo 4M ;;
            can_extents | can_write | can_trim | can_zero) ;;
            extents) echo asked >> asked; for i in 0 1 2 3; do echo ${i}M 1M $i; done ;;
            pread) head -c "$3" /dev/zero ;;
            pwrite) cat > /dev/null ;;
            trim | zero) ;;
            *) exit 2 ;;
        esac"#;
    let asked = |room: &Room, commands: &str, is_nbdkit: bool| {
        room.script("disk.sh", script);
        room.write("asked", "");
        let disk = room.path("disk.sh");
        let arguments = ["--filter=cacheextents", "sh", disk.to_str().expect("the room's name is text")];
        let command = format!("cd {} && qemu-io -f raw {commands} \"$uri\"", room.path("").display());
        let mut launch = match is_nbdkit {
            true => room.nbdkit_captive(arguments, command),
            false => room.captive(arguments, command),
        };
        let map = launch.run_to(0).text().lines().filter(|line| line.contains("offset")).count();
        (map, std::fs::read_to_string(room.path("asked")).expect("it is there").lines().count())
    };
    for (commands, times) in [
        ("-c map -c map -c map", 1),
        ("-c map -c 'discard 0 1M' -c map", 2),
        ("-c map -c 'write 0 512' -c map", 2),
        ("-c map -c 'write -z 0 1M' -c map", 2),
        ("-c map -c 'alloc 0' -c 'read 0 512' -c map", 1),
    ] {
        let room = Room::new();
        let ours = asked(&room, commands, false);
        assert_eq!((ours.1, ours), (times, asked(&room, commands, true)), "{commands}");
    }
}

/// "Shows the offset and range of another plugin."
#[test]
fn offset_shows_a_part() {
    for words in [&["--filter=offset", "offset=0"][..], &["--filter=offset", "range=1M"]] {
        same_on_memory(words);
    }
    let operations =
        ["info", "write 200x55 0", "read 200 100", "zero 100 50", "extents 65536 0", "read 1 65536", "trim 65536 0"];
    let arguments = ["memory", "1M", "--filter=offset", "offset=100001", "range=65536"];
    let answers = same(&arguments, &operations);
    assert!(answers.starts_with("info: 65536 "), "{answers}");
    same(
        &["pattern", "1M", "--filter=offset", "offset=1048000"],
        &["info", "read 64 0", "read 576 0", "extents 576 0"],
    );
    let line = refusal(&["memory", "1M", "--filter=offset", "range=1MB"]);
    assert_eq!(line, "could not parse size: unknown suffix: B");
    // nbdkit tells each client.
    let why = "is larger than the real size (1048576) of the underlying file or device";
    assert_eq!(refusal(&["memory", "1M", "--filter=offset", "offset=2M"]), format!("offset (2097152) {why}"));
    let line = refusal(&["memory", "1M", "--filter=offset", "offset=1M", "range=1"]);
    assert_eq!(line, format!("offset+range (1048576+1) {why}"));
}

#[test]
fn truncate_gives_the_disk_another_size() {
    for words in
        [&["truncate=512k"][..], &["truncate=1048577"], &["truncate=2M"], &["round-up=1M"], &["round-down=64k"]]
    {
        let arguments = [&["memory", "1000000", "--filter=truncate"][..], words].concat();
        same(
            &arguments,
            &[
                "info",
                "write 999990x44 10",
                "write 100x44 999950",
                "write 100x00 999950",
                "read 1000 999500",
                "zero 65536 983000",
                "trim 65536 983000",
                "cache 65536 983000",
                "extents 65536 950000",
                "read 524288 0",
                "read 1 1048576",
            ],
        );
    }
    for word in ["round-up=0", "round-up=5", "round-down=8G"] {
        same_refusal(&["memory", "1M", "--filter=truncate", word]);
    }
}

#[test]
fn blocksize_takes_requests_of_any_size() {
    for words in [
        &["minblock=512"][..],
        &["minblock=64k"],
        &["minblock=4k", "maxdata=8k", "maxlen=16k"],
        &["maxdata=1000", "maxlen=3000"],
    ] {
        same_on_memory(&[&["--filter=blocksize"][..], words].concat());
    }
    for word in ["minblock=3", "minblock=128k", "minblock=0", "maxlen=4G"] {
        same_refusal(&["memory", "1M", "--filter=blocksize", word]);
    }
    same_refusal(&["memory", "1M", "--filter=blocksize", "minblock=4k", "maxdata=6k"]);
}

/// "If the plugin emulates FUA, a flush once at the end is cheaper": what is emulated is known to be so by every filter in
/// front, also by one behind a filter that changes nothing.
#[test]
fn what_is_emulated_is_seen_to_be_so_through_other_filters() {
    let logged = |mode: &str, operation: &str| {
        let room = Room::new();
        let filters = ["--filter=blocksize", "--filter=log", "--filter=swab", "--filter=fua", "memory", "1M"];
        let arguments = [&filters[..], &["swab-bits=8", "maxdata=4k", "maxlen=4k", "logfile=log", mode]].concat();
        answers_in(&room, &arguments, &[operation]);
        let text = std::fs::read_to_string(room.path("log")).expect("it was written");
        let requests = || text.lines().filter(|line| line.ends_with("..."));
        let count = |word: &str| requests().filter(|line| line.contains(word)).count();
        (count("fua=1"), count(" Flush "))
    };
    for operation in ["write 65536x01 0 fua", "zero 65536 0 fua", "trim 65536 0 fua"] {
        let [emulated, native] = ["emulate", "native"].map(|mode| logged(&format!("fuamode={mode}"), operation));
        assert_eq!((emulated.0, native.0), (0, 16), "{operation}");
        // Beside what there is at the end of every connection.
        assert_eq!(emulated.1, native.1 + 1, "{operation}");
    }
    // "Scan ... needs a plugin which supports NBD_CMD_CACHE": one that reads the data for it, and drops it, does not.
    let warned = |mode: &str| {
        let arguments = ["--filter=scan", "--filter=log", "--filter=nocache", "memory", "1M", "logfile=log", mode];
        let output = Room::new().captive([&arguments[..], &["-v"]].concat(), "nbdinfo \"$uri\" > info").run_to(0);
        output.stderr.contains("does not support NBD_CMD_CACHE")
    };
    assert!(warned("cachemode=emulate"));
    assert!(!warned("cachemode=nop"));
}

#[test]
fn blocksize_policy_states_sizes_and_refuses_what_breaks_them() {
    let sizes = ["blocksize-minimum=512", "blocksize-preferred=64k", "blocksize-maximum=1M"];
    for policy in ["blocksize-error-policy=allow", "blocksize-error-policy=error"] {
        let arguments = [&["memory", "1M", "--filter=blocksize-policy", policy][..], &sizes].concat();
        same(
            &arguments,
            &[
                "blocks",
                "read 512 0",
                "read 100 0",
                "write 01 512",
                "zero 512 100",
                "trim 100 0",
                "read 512 512",
                "flush",
            ],
        );
    }
    for word in ["blocksize-minimum=3", "blocksize-preferred=100", "blocksize-error-policy=x", "blocksize-minimum=128k"]
    {
        same_refusal(&["memory", "1M", "--filter=blocksize-policy", word]);
    }
    // Both know it since 1.34, and 1.44.
    let disconnects = ["memory", "1M", "--filter=blocksize-policy", "blocksize-write-disconnect=1k"];
    let answers = answers(&disconnects, &["write 1024x01 0", "write 1025x01 0", "export", "read 1 1024"]);
    assert!(answers.starts_with("write 1024x01 0: done\nwrite 1025x01 0: E"), "{answers}");
    assert!(answers.ends_with("export: done\nread 1 1024: 00\n"), "{answers}");
}

#[test]
fn what_is_offered_can_be_less() {
    for filters in [
        &["--filter=noextents"][..],
        &["--filter=nocache"],
        &["--filter=nocache", "cachemode=emulate"],
        &["--filter=nocache", "cachemode=nop"],
        &["--filter=nozero"],
        &["--filter=nozero", "zeromode=emulate"],
        &["--filter=nozero", "zeromode=notrim"],
        &["--filter=nozero", "zeromode=plugin", "fastzeromode=none"],
        &["--filter=nozero", "zeromode=plugin", "fastzeromode=slow"],
        &["--filter=fua"],
        &["--filter=fua", "fuamode=emulate"],
        &["--filter=fua", "fuamode=native"],
        &["--filter=fua", "fuamode=force"],
        &["--filter=fua", "fuamode=pass"],
        &["--filter=fua", "fuamode=discard"],
        &["--filter=noparallel"],
        &["--filter=noparallel", "serialize=all-requests"],
        &["--filter=multi-conn", "multi-conn-mode=disable"],
        &["--filter=multi-conn", "multi-conn-mode=emulate"],
        // In any order, one on the other.
        &["--filter=fua", "--filter=nozero", "--filter=noextents", "zeromode=emulate", "fuamode=force"],
    ] {
        same_on_memory(filters);
    }
    // What a fast zero comes to.
    for mode in ["none", "slow", "ignore", "default"] {
        let fast = format!("fastzeromode={mode}");
        let arguments = ["memory", "1M", "--filter=nozero", "zeromode=plugin", &fast];
        let operations: &[&str] = if mode == "none" { &["info"] } else { &["info", "zero 4096 0 fast"] };
        same(&arguments, operations);
    }
    for words in [
        &["--filter=nocache", "cachemode=x"][..],
        &["--filter=nozero", "zeromode=x"],
        &["--filter=nozero", "fastzeromode=x"],
        &["--filter=fua", "fuamode=x"],
        &["--filter=noparallel", "serialize=x"],
        &["--filter=multi-conn", "multi-conn-mode=x"],
        &["--filter=multi-conn", "multi-conn-track-dirty=x"],
    ] {
        same_refusal(&[&["memory", "1M"][..], words].concat());
    }
}

/// Newer than Debian's nbdkit: "Set the rotational property".
#[test]
fn rotational_says_that_the_disk_turns() {
    let turns = |words: &[&str]| answers(&[&["memory", "1M"][..], words].concat(), &["info"]).contains(" rotational");
    assert!(turns(&["--filter=rotational"]));
    assert!(turns(&["--filter=rotational", "rotational=true"]));
    assert!(!turns(&["--filter=rotational", "--filter=spinning", "rotational=false"]));
    assert_eq!(refusal(&["memory", "1M", "--filter=rotational", "rotational=x"]), "could not decipher boolean (x)");
}

/// Newer than Debian's nbdkit: "make the underlying plugin completely read-only", or while a file exists.
#[test]
fn readonly_lets_nothing_be_written() {
    let operations = ["info", "write 01 0", "zero 1 0", "trim 1 0", "flush", "read 1 0"];
    let always = answers(&["memory", "1M", "--filter=readonly"], &operations);
    assert_eq!(always, answers(&["memory", "1M", "-r"], &operations));
    let room = Room::new();
    let arguments = ["memory", "1M", "--filter=readonly", "readonly-file=ro"];
    let command = "w() { nbdsh -u \"$uri\" -c 'h.pwrite(b\"x\", 0)' 2>&1 | grep -o 'Operation not permitted'; }; \
                   PATH=/usr/bin:$PATH; w; touch ro; w; rm ro; w; true";
    let output = room.captive(arguments, command).run_to(0);
    assert_eq!(output.text(), "Operation not permitted\n", "{output:#?}");
}

#[test]
fn protect_lets_only_be_written_what_is_there() {
    let arguments = ["memory", "1M", "--filter=protect", "protect=0-0x1ff", "protect=~0-1000000"];
    same(
        &arguments,
        &[
            "info",
            "write 01 511",
            "write 00 511",
            "write 01 512",
            "write 1000000x01 512",
            "write 999489x01 512",
            "write 01 1000001",
            "write 01 1000000",
            "read 10 505",
        ],
    );
    // Debian's nbdkit dies of these.
    let zeroes = [
        "write 01 511",
        "zero 512 0",
        "zero 600 0",
        "write 07 600",
        "zero 601 0",
        "trim 601 0",
        "trim 600 1",
        "read 1 600",
    ];
    let answers = answers(&["memory", "1M", "--filter=protect", "protect=600-"], &zeroes);
    assert_eq!(
        answers,
        "write 01 511: done\nzero 512 0: done\nzero 600 0: done\nwrite 07 600: EPERM\nzero 601 0: done\n\
         trim 601 0: done\ntrim 600 1: done\nread 1 600: 00\n"
    );
    for word in ["protect=5", "protect=5-1", "protect=x-1"] {
        same_refusal(&["memory", "1M", "--filter=protect", word]);
    }
}

#[test]
fn swab_swaps_the_bytes_of_words() {
    // Debian's nbdkit writes nothing with 8 bits.
    for bits in ["16", "32", "64"] {
        let bits = format!("swab-bits={bits}");
        same(
            &["memory", "1000003", "--filter=swab", &bits],
            &[
                "info",
                "write 0102030405060708 8",
                "read 16 0",
                "write 65536x5a 512",
                "read 8 1",
                "read 3 0",
                "zero 8 8",
                "zero 1 0",
                "trim 64 64",
                "extents 65536 0",
                "read 1000 999000",
            ],
        );
    }
    same_refusal(&["memory", "1M", "--filter=swab", "swab-bits=24"]);
}

#[test]
fn errors_are_injected_into_what_they_are_for() {
    for words in [
        &["error-rate=100%"][..],
        &["error=ENOSPC", "error-rate=1"],
        &["error-pread-rate=100%"],
        &["error-pwrite=EPERM", "error-pwrite-rate=100%"],
        &["error-zero=ENOMEM", "error-zero-rate=1", "error-trim=ESHUTDOWN", "error-trim-rate=1"],
        &["error-extents=EINVAL", "error-extents-rate=1", "error-cache-rate=1"],
        &["error-rate=100%", "error-file=/no/such/file"],
        &["error=EPERM"],
    ] {
        same_on_memory(&[&["--filter=error"][..], words].concat());
    }
    for word in ["error=EXDEV", "error-rate=101%"] {
        same_refusal(&["memory", "1M", "--filter=error", word]);
    }
}

#[test]
fn delays_change_nothing_else() {
    let words =
        ["--filter=delay", "rdelay=1ms", "wdelay=1ms", "delay-extents=1ms", "delay-cache=1ms", "delay-open=1ms"];
    same_on_memory(&words);
    let slow = ["memory", "1M", "--filter=delay", "delay-zero=1ms", "delay-fast-zero=false"];
    same(&slow, &["info", "zero 4096 0 fast", "zero 4096 0"]);
    assert_eq!(
        refusal(&["memory", "1M", "--filter=delay", "rdelay=1m"]),
        "rdelay: could not parse delay or sleep: \"1m\""
    );
}

/// "Limit each connection", "Limit total bandwidth across all connections".
#[test]
fn rates_change_nothing_else() {
    same_on_memory(&["--filter=rate", "rate=10G", "connection-rate=10G"]);
    same_refusal(&["memory", "1M", "--filter=rate", "rate=0"]);
    // 2 Mbit are there at once; of 8 Mbit the rest takes six seconds, at this rate.
    let start = std::time::Instant::now();
    answers(
        &["memory", "1M", "--filter=rate", "rate=16M"],
        &["read 1048576 0", "read 1048576 0", "read 1048576 0", "read 1048576 0", "read 1048576 0"],
    );
    // 40 Mbit, of which 32 are there at once.
    assert!(start.elapsed() >= std::time::Duration::from_millis(450), "{:?}", start.elapsed());
}

#[test]
fn extentlist_is_placed_over_a_plugin() {
    let prepare = |room: &Room| {
        room.write("list", "4M 1M hole,zero\n0 1M\n2M\t64k hole\n3M 1k 2\n");
    };
    let operations = ["info", "extents 10485760 0", "extents 100 1048570", "extents 5000 3145000", "read 10 4194304"];
    same_in(prepare, &["null", "10M", "-r", "--filter=extentlist", "extentlist=list"], &operations);
    let room = Room::new();
    room.write("overlap", "0 1M\n1000 1\n");
    let line = refusal_in(&room, &["null", "10M", "--filter=extentlist", "extentlist=overlap"]);
    assert_eq!(line, "overlap: extents in the extent list are overlapping");
    same_refusal(&["null", "10M", "--filter=extentlist"]);
}

#[test]
fn checkwrite_takes_what_is_there() {
    same(
        &["data", "@32768 1 2 3", "size=1M", "--filter=checkwrite"],
        &[
            "info",
            "write 010203 32768",
            "write 010204 32768",
            "write copy:100000 0 fua",
            "zero 32768 0",
            "zero 32769 0",
            "trim 1000 40000",
            "trim 1048576 0",
            "flush",
            "extents 1048576 0",
        ],
    );
    let room = Room::new();
    room.captive(["data", "@32768 1", "--filter=checkwrite"], "nbdcopy \"$uri\" \"$uri\"").run_to(0);
}

/// "Partition numbers … count from 1."
#[test]
fn partition_shows_one_partition() {
    // A disk with an MBR, made by the plugin that makes disks of partitions.
    let prepare = |room: &Room| {
        room.write("one", vec![1; 100_000]);
        room.write("two", vec![2; 65536]);
        for (table, name) in [("mbr", "mbr.img"), ("gpt", "gpt.img")] {
            let kind = format!("partition-type={table}");
            let command = format!("nbdcopy \"$uri\" {name}");
            room.nbdkit_captive(["partitioning", &kind, "one", "two", "one", "two", "two"], command).run_to(0);
        }
    };
    let operations = ["info", "read 100000 0", "read 65536 0", "write 512x09 512", "read 512 512", "extents 65536 0"];
    for disk in ["mbr.img", "gpt.img"] {
        for part in ["partition=1", "partition=2", "partition=5"] {
            let answers = same_in(prepare, &["file", disk, "--filter=partition", part], &operations);
            assert!(answers.contains("write 512x09 512: done"), "{answers}");
        }
    }
    let room = Room::new();
    prepare(&room);
    for (disk, part, why) in [
        ("mbr.img", "partition=4", "MBR partition 4 not found"),
        ("gpt.img", "partition=6", "GPT partition 6 not found"),
        ("gpt.img", "partition=999", "GPT partition number out of range"),
        ("one", "partition=1", "disk does not contain MBR or GPT partition table signature"),
    ] {
        assert_eq!(refusal_in(&room, &["file", disk, "--filter=partition", part]), why);
    }
    same_refusal(&["memory", "1M", "--filter=partition"]);
    same_refusal(&["memory", "1M", "--filter=partition", "partition=0"]);
    let line = refusal(&["memory", "1M", "--filter=partition", "partition=1", "partition-sectorsize=1k"]);
    assert_eq!(line, "invalid partition-sectorsize, it must be '512' or '4096'");
}

/// "adjust export names between client and plugin"
#[test]
fn exportname_changes_names_and_descriptions() {
    let prepare = |room: &Room| {
        std::fs::create_dir(room.path("dir")).expect("the room is empty");
        for name in ["file1", "file2", "file3"] {
            room.write(&format!("dir/{name}"), name);
        }
    };
    let operations =
        ["list", "export", "read 5 0", "export file1", "read 5 0", "export file2", "read 5 0", "export file4"];
    for words in [
        &[][..],
        &["default-export=file2"],
        &["exportname-list=error"],
        &["exportname-list=empty"],
        &["exportname-list=defaultonly", "default-export=file3"],
        &["exportname-list=explicit", "exportname-strict=true", "exportname=file1", "exportname=file3"],
        &[
            "exportname=file1",
            "exportname=",
            "exportname-list=explicit",
            "exportname-strict=true",
            "default-export=file1",
        ],
        &["exportdesc=fixed:a b"],
        &["exportdesc=none"],
        &["exportdesc=script:echo \"<$name>\""],
    ] {
        same_in(prepare, &[&["file", "dir=dir", "--filter=exportname"][..], words].concat(), &operations);
    }
    for word in ["exportname-list=x", "exportname-strict=x", "exportdesc=x"] {
        same_refusal(&["null", "--filter=exportname", word]);
    }
}

/// A rule that matches lets in or keeps out, here and there.
#[test]
fn ip_lets_in_by_address() {
    let room = Room::new();
    let uid = nix::unistd::getuid();
    let gid = nix::unistd::getgid();
    let (uid, gid) = (format!("allow=uid:{uid}"), format!("allow=gid:{gid}"));
    for (words, enters) in [
        (&["allow=anyunix", "deny=all"][..], true),
        (&["allow=anyipv4,anyipv6", "deny=all"], false),
        (&["deny=allunix"], false),
        (&["deny=allipv4,allipv6"], true),
        (&[&uid, "deny=all"], true),
        (&[&gid, "deny=all"], true),
        (&["allow=uid:12345678", "deny=all"], false),
        (&["allow=pid:1", "deny=any"], false),
    ] {
        let arguments = [&["null", "1M", "--filter=ip"][..], words].concat();
        let command = "nbdinfo --size \"$uri\" 2>/dev/null || echo refused; exit 0";
        let expected = if enters { "1048576\n" } else { "refused\n" };
        assert_eq!(room.captive(&arguments, command).run_to(0).text(), expected, "{words:?}");
        assert_eq!(room.nbdkit_captive(&arguments, command).run_to(0).text(), expected, "{words:?}");
    }
    for (words, enters) in [
        (&["allow=127.0.0.1", "deny=all"][..], true),
        (&["allow=127.0.0.0/31,::1", "deny=all"], true),
        (&["deny=127.0.0.0/8"], false),
        (&["allow=anyunix,anyipv6", "deny=all"], false),
    ] {
        // Debian's nbdkit was built without what reads addresses.
        let port = crate::harness::free_port();
        let arguments = [&["-i", "127.0.0.1", "-p", &port, "null", "1M", "--filter=ip"][..], words].concat();
        let command = "nbdinfo --size nbd://127.0.0.1:$port 2>/dev/null || echo refused; exit 0";
        let expected = if enters { "1048576\n" } else { "refused\n" };
        assert_eq!(room.captive(&arguments, command).run_to(0).text(), expected, "{words:?}");
    }
    for word in ["allow=1.2.3", "allow=anyunix,,any", "allow=uid:x"] {
        same_refusal(&["null", "--filter=ip", word]);
    }
    assert_eq!(refusal(&["null", "--filter=ip", "deny=::/129"]), "prefix is > 128 in deny=::/129");
}

/// "Limit the number of concurrent clients to N."
#[test]
fn limit_refuses_one_client_more() {
    let room = Room::new();
    let program = "
import nbd, sys
def connect():
    h = nbd.NBD()
    h.connect_uri(sys.argv[1])
    return h
try:
    clients = [connect() for _ in range(3)]
    print('three')
except nbd.Error:
    print('not three')
clients = None
";
    room.write("clients.py", program);
    let command = "/usr/bin/python3 clients.py \"$uri\"";
    for (limit, expected) in
        [("limit=1", "not three\n"), ("limit=2", "not three\n"), ("limit=3", "three\n"), ("limit=0", "three\n")]
    {
        let arguments = ["null", "1M", "--filter=limit", limit];
        assert_eq!(room.captive(arguments, command).run_to(0).text(), expected, "{limit}");
        assert_eq!(room.nbdkit_captive(arguments, command).run_to(0).text(), expected, "{limit}");
    }
    same_refusal(&["null", "--filter=limit", "limit=-1"]);
}

/// "All lines start with a timestamp", the action and its numbers follow as nbdkit has them.
#[test]
fn log_is_written_line_by_line_as_nbdkits() {
    // It leaves without a flush of what it wrote last.
    let operations = [EVERY_KIND, &["write 01 0"]].concat();
    let arguments = ["--filter=log", "memory", "1M", "logfile=log"];
    let lines = |room: &Room, nbdkit: bool| -> Vec<String> {
        operate(room, &operations, |command| {
            if nbdkit { room.nbdkit_captive(arguments, command) } else { room.captive(arguments, command) }
        });
        let text = std::fs::read_to_string(room.path("log")).expect("it was written");
        let lines = text.lines().map(|line| {
            let (date, rest) = line.split_at("2020-08-06 02:07:23.080415".len());
            assert!(date.bytes().all(|byte| byte.is_ascii_digit() || b"-:. ".contains(&byte)), "{line}");
            rest.trim_start().to_owned()
        });
        // What they are known to do otherwise: one thread model, a fork, block sizes and other properties that are newer, and
        // how far a map goes.
        let lines = lines.filter(|line| !["Ready", "Fork"].iter().any(|word| line.starts_with(word)));
        lines
            .map(|line| match (line.find(" minsize="), line.find(" write="), line.find(" extents=(")) {
                (Some(from), Some(to), _) => format!("{}{}", &line[..from], line[to..].replace(" rotational=0", "")),
                (_, Some(from), _) => format!("{}{}", &line[..from], line[from..].replace(" rotational=0", "")),
                (_, _, Some(from)) => line[..from].to_owned(),
                _ => line,
            })
            .collect()
    };
    assert_eq!(lines(&Room::new(), false), lines(&Room::new(), true));
    let room = Room::new();
    room.write("log", "# My log\n");
    for (append, kept) in [("logappend=true", true), ("logappend=false", false)] {
        room.captive(["--filter=log", "null", "logfile=log", append], "true").run_to(0);
        let text = std::fs::read_to_string(room.path("log")).expect("it is there");
        assert_eq!(text.starts_with("# My log\n"), kept, "{text}");
    }
    let script = "logscript=echo $type $id $act $offset $count $return $error >> out";
    let output = room.captive(
        ["--filter=log", "--filter=error", "null", "1M", "error-pread-rate=100%", script],
        "nbdsh() { /usr/bin/python3 -m nbd \"$@\"; }; nbdsh -u \"$uri\" -c 'h.pwrite(b\"x\"*512, 512)' -c 'h.pread(1, 0)'; true",
    );
    drop({ output }.run_to(0));
    let out = std::fs::read_to_string(room.path("out")).expect("the script has written");
    for line in
        ["PRINT Ready", "ENTER 1 Write 0x200 0x200", "LEAVE 1 Write 0", "ENTER 2 Read 0x0 0x1", "LEAVE 2 Read -1 EIO"]
    {
        assert!(out.lines().any(|one| one.split_whitespace().collect::<Vec<_>>().join(" ") == line), "{line}: {out}");
    }
    same_refusal(&["null", "--filter=log", "logappend=x"]);
}

/// The numbers of requests and bytes are nbdkit's; times are not compared.
#[test]
fn stats_are_those_of_nbdkit() {
    let arguments = ["--filter=stats", "memory", "1M", "statsfile=stats"];
    let counted = |room: &Room, nbdkit: bool| -> String {
        // No two sizes as often as each other: nbdkit shows only one of those.
        let mut operations = vec!["trim 65536 65536", "zero 5000 8192", "zero 4096 512", "zero 512 0", "cache 512 0"];
        operations.extend(["read 4096 65536"; 3].into_iter().chain(["read 512 512"; 2]).chain(["read 1 1"]));
        // It leaves without a flush of what it wrote last: that the server makes one is no request.
        operations.extend(["write 512x01 1024"; 30].into_iter().chain(["flush", "write 1000x02 0", "extents 65536 0"]));
        operate(room, &operations, |command| {
            if nbdkit { room.nbdkit_captive(arguments, command) } else { room.captive(arguments, command) }
        });
        let text = std::fs::read_to_string(room.path("stats")).expect("it was written");
        let lines = text.lines().map(|line| match line.split_once(" ops, ") {
            // Operations and bytes of a line that has times in it.
            Some((what, rest)) => format!("{what} {}\n", rest.split(", ").nth(1).expect("bytes follow the time")),
            // nbdkit gives the bytes of all sizes for those of the others.
            None if line.contains("other sizes") => format!("{}\n", line.split(" reqs").next().unwrap_or_default()),
            None => format!("{line}\n"),
        });
        lines.collect()
    };
    assert_eq!(counted(&Room::new(), false), counted(&Room::new(), true));
    same_refusal(&["--filter=stats", "null"]);
    same_refusal(&["--filter=stats", "null", "statsfile=x", "statsthreshold=101"]);
}

/// Newer than Debian's nbdkit: "simply counts the number of bytes that are read, written, zeroed and trimmed".
#[test]
fn count_tells_bytes_at_the_end() {
    let room = Room::new();
    let output = {
        room.write("operations.py", OPERATIONS_PROGRAM);
        room.write("operations", "read 1000 0\nwrite 300x01 0\nzero 20 0\ntrim 4 0\nread 1 1048576\n");
        let command = "/usr/bin/python3 operations.py \"$uri\" < operations";
        room.captive(["-v", "--filter=count", "memory", "1M"], command).run_to(0)
    };
    assert!(output.stderr.contains("count bytes: read 1000, written 300, zeroed 20, trimmed 4"), "{output:#?}");
}

/// Newer than Debian's nbdkit: "opens the underlying plugin once (per export)".
#[test]
fn openonce_opens_each_export_once() {
    let room = Room::new();
    let plugin = ["eval", "open=echo \"$3\" >> opened", "close=echo >> closed", "get_size=echo 1M", "pread=exit 1"];
    let command = "for i in 1 2 3; do nbdinfo --size \"$uri\"; nbdinfo --size \"nbd+unix:///b?socket=$unixsocket\"; done; \
                   test ! -e closed";
    let arguments = [&["--filter=openonce"][..], &plugin].concat();
    room.captive(arguments, command).run_to(0);
    let lines = |name| std::fs::read_to_string(room.path(name)).expect("it was written").lines().count();
    assert_eq!((lines("opened"), lines("closed")), (2, 2));
}

/// "To pause NBD request processing you send character 'p' to the socket."
#[test]
fn pause_lets_requests_wait() {
    let room = Room::new();
    let command = "
say() { printf \"$1\" | socat -t 5 - UNIX-CONNECT:control; }
read1() { nbdsh -u \"$uri\" -c 'h.pread(1, 0)'; }
PATH=/usr/bin:$PATH
read1; say p; echo
{ read1; echo read > done; } & reading=$!
[ ! -e done ] && say 'px r'; echo
wait $reading; cat done";
    for nbdkit in [false, true] {
        let arguments = ["--filter=pause", "memory", "1M", "pause-control=control"];
        let mut launch =
            if nbdkit { room.nbdkit_captive(arguments, command) } else { room.captive(arguments, command) };
        let text = launch.run_to(0).text().to_owned();
        assert_eq!(text, "P\nPXR\nread\n");
        std::fs::remove_file(room.path("done")).expect("it is there");
        assert!(!room.path("control").exists());
    }
    same_refusal(&["--filter=pause", "null"]);
}

/// Newer than Debian's nbdkit: "After this time limit is exceeded, client commands are rejected".
#[test]
fn time_limit_ends_connections_that_ask_for_more() {
    let answers = answers(
        &["memory", "1M", "--filter=time-limit", "time-limit=1ns"],
        &["info", "flush", "read 1 0", "export", "info"],
    );
    assert!(answers.contains("flush: done\nread 1 0: E"), "{answers}");
    assert!(answers.contains("export: done\ninfo: 1048576 "), "{answers}");
    let line = refusal(&["null", "--filter=time-limit", "time-limit=-1"]);
    assert_eq!(line, "time-limit: could not parse delay or sleep: \"-1\"");
}

/// A client without TLS gets "a single read-only export with 512 bytes of data".
#[test]
fn tls_fallback_shows_its_message() {
    for words in [&[][..], &["tlsreadme=no disk for you"]] {
        let arguments = [&["memory", "1M", "--filter=tls-fallback"][..], words].concat();
        let operations =
            ["info", "list", "read 512 0", "export other", "read 64 0", "write 00 0", "flush", "read 1 512"];
        let answers = same(&arguments, &operations);
        assert!(answers.starts_with("info: 512 "), "{answers}");
    }
    let line = same_refusal(&["null", "--filter=tls-fallback", "--filter=noparallel", "serialize=connections"]);
    assert_eq!(line, "the tls-fallback filter requires parallel connection support");
}

/// Newer than Debian's nbdkit. "Fixed bits in the backing file are stuck randomly high or low."
#[test]
fn evil_corrupts_the_same_bits_for_the_same_seed() {
    let read = |words: &[&str]| {
        answers(
            &[&["memory", "1M", "--filter=evil"][..], words].concat(),
            &["read 1048576 0", "read 1048576 0", "read 65536 65536"],
        )
    };
    let seeded = ["evil-seed=5", "evil-probability=1e-4"];
    assert_eq!(read(&seeded), read(&seeded));
    assert_ne!(read(&seeded), read(&["evil-seed=6", "evil-probability=1e-4"]));
    let (clean, words) = (read(&["evil-probability=0"]), ["evil=cosmic-rays", "evil-probability=1e-4"]);
    assert!(read(&words) != clean);
    assert_eq!(read(&["evil-probability=1e-13"]), clean);
    assert_eq!(refusal(&["null", "--filter=evil", "evil=good"]), "evil: unknown mode: good");
}

/// Newer than Debian's nbdkit: "adds seek delays to simulate a spinning hard disk".
#[test]
fn spinning_takes_its_time_and_changes_no_data() {
    let times = ["min-seek-time=1ms", "half-seek-time=1ms", "max-seek-time=1ms", "heads=4", "separate-heads=true"];
    let spun = answers(&[&["memory", "1M", "--filter=spinning"][..], &times].concat(), EVERY_KIND);
    let plain = answers(&["memory", "1M"], EVERY_KIND);
    let rest = |answers: &str| answers.split_once('\n').expect("several lines").1.to_owned();
    assert_eq!(rest(&spun), rest(&plain));
    assert!(
        spun.lines().next().is_some_and(|line| line.contains("rotational") && !line.contains("multi_conn")),
        "{spun}"
    );
    assert_eq!(refusal(&["null", "--filter=spinning", "heads=65"]), "heads must be in the range [1..64] (was: 65)");
}

/// "A filter is a device that wraps a device": parameters go down until one takes them, and one that nobody takes is an error.
#[test]
fn filters_stack_in_the_order_of_the_command_line() {
    // The part is 512 bytes of the swapped disk, and not the other way round, which would swap from another place.
    let words = ["pattern", "1M", "--filter=offset", "--filter=swab", "swab-bits=64", "offset=8", "range=512"];
    let answers = same(&words, &["info", "read 16 0", "read 16 8"]);
    assert!(answers.starts_with("info: 512 "), "{answers}");
    same(
        &["pattern", "1M", "--filter=swab", "--filter=offset", "swab-bits=64", "offset=8", "range=512"],
        &["read 16 0"],
    );
    let line = refusal(&["memory", "1M", "--filter=offset", "--filter=swab", "sawb-bits=8"]);
    assert_eq!(line, "unknown parameter 'sawb-bits', did you mean 'swab-bits'?");
    let line = refusal(&["memory", "1M", "--filter=swab", "unheard-of=8"]);
    assert_eq!(line, "unknown parameter 'unheard-of', known are: swab-bits, size, allocator");
}

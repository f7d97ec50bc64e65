//! QEMU's block layer as a client: it splits, aligns and merges requests as virtual machines do, and is the one that speaks
//! extended headers.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::harness::wait_for;
use crate::raw_client::Client;

for_each_case! {
    images_are_converted_into_the_export
    the_export_is_converted_and_compared
    a_qcow2_lives_in_the_export
    an_overlay_is_committed_into_the_export
    the_map_has_the_holes
    qemu_io_finds_what_it_wrote
    qemu_io_has_many_requests_in_flight
    a_cache_that_writes_through_forces_every_write
    an_odd_size_is_served_to_its_last_byte
    huge_ranges_are_zeroed_and_discarded
    the_bench_of_qemu_img_runs
    qemu_nbd_serves_the_export_on
}

/// What QEMU speaks where the server does, since 8.2.
const SPOKEN: Spoken = Spoken::ExtendedHeaders;

fn images_are_converted_into_the_export(case: Case) {
    let export = case.serve(IMAGE);
    image_file(&export.room);
    let image = image();
    export.run("qemu-img convert -c -f raw -O qcow2 image compressed.qcow2");
    for (options, source) in [
        // First, because the export is zeroes only now.
        ("--target-is-zero -f raw", "image"),
        ("-f raw", "image"),
        ("-S 0 -f raw", "image"),
        ("-W -m 16 -f raw", "image"),
        ("-f qcow2", "compressed.qcow2"),
        ("-W -m 16 -S 4k -f qcow2", "compressed.qcow2"),
    ] {
        if !options.contains("target-is-zero") {
            export.put_old_data();
        }
        let convert = format!("qemu-img convert -n -O raw {options} {source} \"$uri\"");
        export.run(&convert);
        export.assert_content(&image, &convert);
    }
    export.end(SPOKEN);
}

fn the_export_is_converted_and_compared(case: Case) {
    let export = case.serve(IMAGE);
    image_file(&export.room);
    export.put(&pieces());
    for options in ["-O raw", "-S 0 -O raw", "-W -m 16 -O raw"] {
        let convert = format!("rm -f out; qemu-img convert -f raw {options} \"$uri\" out");
        export.run(&convert);
        assert_same(&fs::read(export.room.path("out")).expect("it was copied out"), &image(), &convert);
    }
    export.run(
        "
        qemu-img convert -c -f raw -O qcow2 \"$uri\" compressed.qcow2
        qemu-img check -q -f qcow2 compressed.qcow2
        qemu-img compare -f qcow2 -F raw compressed.qcow2 \"$uri\"
        qemu-img compare -s -f raw -F raw \"$uri\" \"$uri\"
        qemu-img compare -f raw -F raw image \"$uri\"
        qemu-io -f raw -c 'write -q -P 0 8M 1' \"$uri\"
        status=0; qemu-img compare -f raw -F raw image \"$uri\" || status=$?
        [ $status -eq 1 ]
        qemu-img info --output=json \"$uri\" > info
        grep -q '\"format\": \"raw\"' info && grep -q '\"virtual-size\": 16777216' info",
    );
    export.end(SPOKEN);
}

/// Its tables are small writes at odd places, which are read back, with flushes in between that must keep them in order.
fn a_qcow2_lives_in_the_export(case: Case) {
    let export = case.serve(40 * MIB);
    export.put_old_data();
    image_file(&export.room);
    export.run(
        "
        qemu-img create -q -f qcow2 -o cluster_size=4k \"$uri\" 16M
        qemu-img convert -n -f raw -O qcow2 image \"$uri\"
        qemu-img check -q -f qcow2 \"$uri\"
        qemu-img info --output=json \"$uri\" > info
        grep -q '\"format\": \"qcow2\"' info && grep -q '\"virtual-size\": 16777216' info
        qemu-img snapshot -c before \"$uri\"
        qemu-io -f qcow2 -c 'write -q -P 1 0 2M' -c 'write -q -z 2M 2M' -c 'discard -q 6M 3M' \"$uri\"
        bad qemu-img compare -q -f raw -F qcow2 image \"$uri\"
        qemu-img check -q -f qcow2 \"$uri\"
        qemu-img snapshot -a before \"$uri\"
        qemu-img snapshot -d before \"$uri\"
        qemu-img check -q -f qcow2 \"$uri\"
        qemu-img compare -f raw -F qcow2 image \"$uri\"
        qemu-img map -f qcow2 --output=json \"$uri\" > map
        grep -q '\"start\": 65536, \"length\": 983040, .*\"zero\": true' map
        qemu-img convert -f qcow2 -O raw \"$uri\" out && cmp image out",
    );
    export.end(SPOKEN);
}

fn an_overlay_is_committed_into_the_export(case: Case) {
    let export = case.serve(IMAGE);
    export.put(&pieces());
    export.run(
        "
        qemu-img create -q -f qcow2 -b \"$uri\" -F raw overlay.qcow2
        qemu-io -f qcow2 -c 'write -q -P 17 3M 100k' -c 'write -q -z 10M 1M' -c 'write -q -P 18 5000 1' overlay.qcow2
        qemu-img commit -q overlay.qcow2",
    );
    let mut expected = image();
    expected[3 << 20..][..100 << 10].fill(17);
    expected[10 << 20..][..1 << 20].fill(0);
    expected[5000] = 18;
    export.assert_content(&expected, "qemu-img commit");
    export.end(SPOKEN);
}

fn the_map_has_the_holes(case: Case) {
    let export = case.serve(IMAGE);
    let places = [(0, 64 * KIB), (MIB, 128 * KIB), (5 * MIB + 32 * KIB, 3 * MIB), (IMAGE - 32 * KIB, 32 * KIB)];
    export.put(&places.map(|(offset, length)| (offset, data(length, 1))));
    let output = export.run("qemu-img map -f raw \"$uri\"");
    // Offset, length, offset in the file, file.
    let hexadecimal = |word: Option<&str>| word.and_then(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    let number = |word: Option<&str>| if word == Some("0") { Some(0) } else { hexadecimal(word) };
    let rows = output.text().lines().skip(1).map(|line| {
        let mut words = line.split_whitespace();
        (number(words.next()).expect("an offset"), number(words.next()).expect("a length"))
    });
    let rows: Vec<(u64, u64)> = rows.collect();
    match case.replies {
        Replies::Structured => assert_eq!(rows, places),
        // Without block status all is data.
        Replies::Simple => assert_eq!(rows, [(0, IMAGE)]),
    }
    export.end(SPOKEN);
}

/// Runs qemu-io with these commands, which must succeed, each of its patterns verified.
#[track_caller]
fn qemu_io(export: &Served, options: &[&str], commands: &[impl AsRef<str>]) {
    let mut launch = export.room.tool("qemu-io", ["-f", "raw"]);
    launch.args(options);
    for command in commands {
        launch.args(["-c", command.as_ref()]);
    }
    let output = launch.args([export.server.uri()]).run_to(0);
    let said = output.text().to_lowercase() + &output.stderr;
    // What fails later than the command that began it does not show in the exit status.
    assert!(!said.contains("fail") && !said.contains("error"), "{output:#?}");
}

fn qemu_io_finds_what_it_wrote(case: Case) {
    let export = case.serve(IMAGE);
    export.put_old_data();
    qemu_io(
        &export,
        // Or else it forces every write.
        &["-t", "writeback", "-d", "unmap"],
        &[
            "write -P 1 0 4M",
            // Every alignment: inside a sector, a page, over their ends, to the last byte.
            "write -P 2 1 1",
            "write -P 3 511 2",
            "write -P 4 4095 4098",
            "write -P 5 65535 131074",
            "write -P 6 16777215 1",
            "read -P 1 0 1",
            "read -P 2 1 1",
            "read -P 1 2 509",
            "read -P 3 511 2",
            "read -P 1 513 3582",
            "read -P 4 4095 4098",
            "read -P 1 8193 57342",
            "read -P 5 65535 131074",
            "read -P 1 196609 3997695",
            "read -P 0xa5 4M 12582911",
            "read -P 6 16777215 1",
            // From several buffers and to several.
            "writev -P 7 1000001 1 513 4096 100000",
            "readv -P 7 1000001 100000 1 4609",
            "write -f -P 8 2M 5000",
            "read -P 8 2M 5000",
            // Zeroes, with and without holes, aligned and not.
            "write -z 5M 1M",
            "write -z -u 7M 1M",
            "write -z -f 9000001 3",
            "write -z -u -f 9100001 100001",
            "read -P 0 5M 1M",
            "read -P 0xa5 6M 1M",
            "read -P 0 7M 1M",
            "read -P 0xa5 8M 611393",
            "read -P 0 9000001 3",
            "read -P 0xa5 9000004 99997",
            "read -P 0 9100001 100001",
            "read -P 0xa5 9200002 1000",
            "discard 10M 1M",
            "read -P 0 10M 1M",
            "discard 11534337 1",
            "flush",
            // A place is used again.
            "write -P 9 10M 64k",
            "read -P 9 10M 64k",
            "read -P 0 10551296 983040",
            // More than fits into one of QEMU's buffers, and what nobody asked for before.
            "write -P 10 0 16M",
            "read -P 10 0 16M",
            "alloc 0 16M",
        ],
    );
    // Fast zeroes: done, or refused with nothing changed.
    let fast = match case.plugin {
        Plugin::Memory => "qemu-io -f raw -c 'write -z -n 1M 1M' -c 'read -P 0 1M 1M' \"$uri\" > log",
        Plugin::File => {
            "bad qemu-io -f raw -c 'write -z -n 1M 1M' \"$uri\" > log
            grep -q 'not supported' log
            qemu-io -f raw -c 'read -P 10 1M 1M' \"$uri\" > log"
        }
    };
    export.run(fast);
    export.run("qemu-io -f raw -c 'read -P 10 2M 1M' \"$uri\" > log; ! grep -i fail log");
    export.end(SPOKEN);
}

/// Requests that overlap nothing in flight, but come in between those that do.
fn qemu_io_has_many_requests_in_flight(case: Case) {
    const REQUESTS: u64 = 200;
    let export = case.serve(IMAGE);
    let mut expected = vec![0; IMAGE as usize];
    let mut commands = Vec::new();
    let place = |number: u64| (number * 81_920 + number * number % 1000, 1 + number * 409 % 70_000);
    for number in 0..REQUESTS {
        let (offset, length) = place(number);
        let pattern = number % 255 + 1;
        let force = if number % 16 == 0 { "-f" } else { "" };
        commands.push(format!("aio_write {force} -P {pattern} {offset} {length}"));
        expected[offset as usize..][..length as usize].fill(pattern as u8);
    }
    // Reads and zeroes are in flight with other writes.
    commands.push("aio_flush".to_owned());
    for number in 0..REQUESTS {
        let (offset, length) = place(number);
        let (pattern, range) = (number % 255 + 1, offset as usize..(offset + length) as usize);
        commands.push(match number % 4 {
            0 => {
                expected[range].fill(0);
                format!("aio_write -z -u {offset} {length}")
            }
            1 => {
                expected[range].fill(0xee);
                format!("aio_write -P 0xee {offset} {length}")
            }
            _ => format!("aio_read -P {pattern} {offset} {length}"),
        });
    }
    commands.push("aio_flush".to_owned());
    qemu_io(&export, &["-t", "writeback"], &commands);
    export.assert_content(&expected, "qemu-io");
    export.end(SPOKEN);
}

fn a_cache_that_writes_through_forces_every_write(case: Case) {
    let export = case.serve(IMAGE);
    let commands =
        ["write -P 1 0 1M", "write -z 4096 4096", "aio_write -P 2 2M 1M", "aio_write -P 3 3M 1M", "aio_flush"];
    for cache in ["writethrough", "directsync", "none", "unsafe"] {
        qemu_io(&export, &["-t", cache, "-d", "unmap"], &commands);
        qemu_io(&export, &["-t", cache], &["read -P 2 2M 1M", "read -P 0 4096 4096", "read -P 3 3M 1M", "flush"]);
    }
    export.end(SPOKEN);
}

/// QEMU counts in sectors and asks for nothing behind the end, but for all that is before it.
fn an_odd_size_is_served_to_its_last_byte(case: Case) {
    let size = MIB + 3;
    let export = case.serve(size);
    export.put_old_data();
    // With simple replies QEMU 10.0 waits for as many bytes as it rounded up to, and not as it asked for, of any server.
    if case.structured() {
        export.run("qemu-img convert -f raw -O raw \"$uri\" out");
        let out = fs::read(export.room.path("out")).expect("it was copied out");
        assert_eq!(out.len() as u64, size.next_multiple_of(512));
        assert!(out[..size as usize].iter().all(|&byte| byte == 0xa5));
        assert!(out[size as usize..].iter().all(|&byte| byte == 0));
    }
    export.run("nbdcopy \"$uri\" exact");
    assert_same(
        &fs::read(export.room.path("exact")).expect("it was copied out"),
        &vec![0xa5; size as usize],
        "nbdcopy",
    );
    qemu_io(
        &export,
        &[],
        &["write -P 4 1048574 5", "read -P 4 1048574 5", "write -z 1048576 2", "read -P 0 1048576 2"],
    );
    let mut expected = vec![0xa5; size as usize];
    expected[1_048_574..].copy_from_slice(&[4, 4, 0, 0, 4]);
    export.assert_content(&expected, "qemu-io at the end");
    end_with_newest(export);
}

/// With compact headers QEMU makes many requests of this, with extended ones a few.
fn huge_ranges_are_zeroed_and_discarded(case: Case) {
    let export = case.serve(1024 * GIB);
    export.put(&[0, 500, 1023].map(|at| (at * GIB + GIB / 2, vec![7; PIECE])));
    let mut commands = String::from("write -q -P 7 1 1\n");
    match case.plugin {
        Plugin::Memory => commands.push_str("write -q -z -u -n 0 1000G\n"),
        // No zeroes beyond 2 GiB at a time without -n.
        Plugin::File => commands.push_str("write -q -z -u 0 2147483136\n"),
    }
    let from = if case.plugin == Plugin::File { 1 } else { 511 };
    for number in from..512_u64 {
        let (offset, half) = (number * 2 * GIB, GIB);
        let _ = writeln!(commands, "discard -q {offset} {half}\ndiscard -q {} {half}", offset + half);
    }
    commands.push_str("read -q -P 0 0 1M\nread -q -P 0 512M 1M\n");
    let mut launch = export.room.tool("qemu-io", ["-f", "raw", "-t", "writeback", "-d", "unmap"]);
    let mut running = launch.args([export.server.uri()]).stdin(std::process::Stdio::piped()).start();
    std::io::Write::write_all(&mut running.stdin(), commands.as_bytes()).expect("qemu-io reads its commands");
    let output = running.finish().expect(0);
    assert!(!output.text().contains("fail") && output.stderr.is_empty(), "{output:#?}");
    let map = export.run("qemu-img map -f raw \"$uri\"");
    match case.replies {
        Replies::Structured => assert_eq!(map.text().lines().count(), 1, "the heading and no data: {map:#?}"),
        Replies::Simple => assert_eq!(map.text().lines().count(), 2, "all is data: {map:#?}"),
    }
    if case.plugin == Plugin::File {
        assert_eq!(fs::metadata(export.room.path("disk")).expect("the disk is there").blocks(), 0);
    }
    export.end(SPOKEN);
}

fn the_bench_of_qemu_img_runs(case: Case) {
    let export = case.serve(IMAGE);
    export.run(
        "
        qemu-img bench -q -f raw -c 4000 -d 64 -s 4096 -w --pattern=17 \"$uri\"
        qemu-img bench -q -f raw -c 500 -d 32 -s 65537 -S 30011 \"$uri\"
        qemu-img bench -q -f raw -c 200 -d 16 -s 8192 -w --pattern=18 --flush-interval=16 \"$uri\"",
    );
    let mut expected = vec![17; IMAGE as usize];
    expected[..200 * 8192].fill(18);
    expected[4000 * 4096..].fill(0);
    export.assert_content(&expected, "qemu-img bench");
    export.end(SPOKEN);
}

/// qemu-nbd is a server for the clients and a client of ours: what they ask of it, it asks of us in its own way.
fn qemu_nbd_serves_the_export_on(case: Case) {
    let export = case.serve(IMAGE);
    image_file(&export.room);
    let socket = export.room.path("second");
    let mut launch = export.room.tool("qemu-nbd", ["-f", "raw", "-t", "--shared=8", "--discard=unmap", "-k"]);
    let mut second = launch.args([&socket]).args([export.server.uri()]).start();
    second.wait_until_listening(&socket);
    let second_uri = format!("nbd+unix:///?socket={}", socket.display());
    let run = |commands: &str| export.shell(commands).env("second", &second_uri).run_to(0);
    run("nbdcopy --flush --connections=4 image \"$second\"");
    export.assert_content(&image(), "nbdcopy through qemu-nbd");
    run("nbdcopy --connections=4 \"$second\" out && cmp image out");
    run("nbdinfo --map \"$uri\" | sort > ours; nbdinfo --map \"$second\" | sort > theirs");
    if case.structured() {
        let ours = fs::read_to_string(export.room.path("ours")).expect("a map");
        let theirs = fs::read_to_string(export.room.path("theirs")).expect("a map");
        assert!(ours.contains("hole,zero") && ours.lines().count() > 5, "{ours}");
        assert_eq!(theirs, ours);
    }
    let mut expected = image();
    run("
        qemu-io -f raw -d unmap -c 'write -P 3 5000001 100001' -c 'write -z -u 1M 512k' -c 'discard 12M 1M' \\
            -c 'write -f -P 4 0 1' -c 'flush' -c 'read -P 3 5000001 100001' -c 'read -P 0 1M 512k' \\
            -c 'read -P 0 12M 1M' -c 'read -P 4 0 1' \"$second\" > log
        ! grep -iE 'fail|error' log");
    expected[5_000_001..][..100_001].fill(3);
    expected[1 << 20..][..512 << 10].fill(0);
    expected[12 << 20..][..1 << 20].fill(0);
    expected[0] = 4;
    export.assert_content(&expected, "qemu-io through qemu-nbd");
    // Also where the second server answers with extended headers and the first with others.
    let mut client = Client::connect(&socket);
    client.start();
    client.ask_for_structured_replies();
    client.go(b"");
    assert_same(&client.read(3 << 20, 4096), &expected[3 << 20..][..4096], "a read through qemu-nbd");
    client.disconnect();
    second.signal(nix::sys::signal::Signal::SIGTERM);
    second.finish().expect(0);
    wait_for("qemu-nbd's socket to go", || (!socket.exists()).then_some(()));
    let list = export.run("qemu-nbd --list -k \"$socket\"");
    assert!(list.text().contains("size:  16777216"), "{list:#?}");
    match case.replies {
        Replies::Structured => assert!(list.text().contains("base:allocation"), "{list:#?}"),
        Replies::Simple => assert!(!list.text().contains("base:allocation"), "{list:#?}"),
    }
    let newest = export.newest();
    let size = if newest == Spoken::ExtendedHeaders { 64 } else { 32 };
    assert!(list.text().contains(&format!("transaction size: {size}-bit")), "{list:#?}");
    end_with_newest(export);
}

/// Other clients than QEMU were there, too.
#[track_caller]
fn end_with_newest(export: Served) {
    let newest = export.newest();
    if let Some((spoken, log)) = export.end_of_several() {
        assert_eq!(spoken.into_iter().max(), Some(newest), "{log}");
    }
}

/// What a server says of an export that it does not give, QEMU shows to people.
#[test]
fn qemu_shows_why_an_export_is_refused() {
    let room = Room::new();
    fs::create_dir(room.path("images")).expect("there is room");
    let server = room.serve(["file", "dir=images"]);
    let uri = format!("nbd+unix:///missing?socket={}", server.socket.display());
    let output = room.tool("qemu-img", ["info", &uri]).run_to(1);
    assert!(output.stderr.contains("Requested export not available"), "{output:#?}");
    // nbdkit gives no reason.
    if !is_nbdkit() {
        let reason = output.stderr.lines().find_map(|line| line.strip_prefix("server reported: "));
        assert_eq!(reason, Some("open: missing: No such file or directory"));
    }
    server.terminate().expect(0);
}

//! libnbd's tools, and programs with libnbd for Python that use what the tools do not.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::*;
use crate::harness::{nbdkit_differs, server_path};

for_each_case! {
    nbdinfo_tells_all_of_the_export
    nbdinfo_says_what_the_export_can_and_is
    nbdinfo_maps_the_holes
    nbdcopy_copies_in
    nbdcopy_copies_out
    nbdcopy_copies_through_pipes
    nbdsh_reads_what_it_wrote
    a_pipeline_finds_what_it_wrote
    reads_come_in_chunks_that_cover_them
    bad_requests_are_refused_and_the_connection_goes_on
}

/// What libnbd 1.14 speaks.
const SPOKEN: Spoken = Spoken::Structured;

/// Runs a program for Python, which is Debian's own, because that has libnbd.
#[track_caller]
fn python(room: &Room, program: &str, arguments: &[&str]) -> Output {
    let mut launch = room.launch(Path::new("/usr/bin/python3"));
    launch.args(["-c", program]).args(arguments).run_to(0)
}

fn replies_name(case: Case) -> &'static str {
    match case.replies {
        Replies::Structured => "structured",
        Replies::Simple => "simple",
    }
}

fn nbdinfo_tells_all_of_the_export(case: Case) {
    let export = case.serve(IMAGE);
    let structured = case.structured();
    for list in ["", "--list"] {
        let output = export.run(&format!("nbdinfo {list} --json \"$uri\""));
        let text = output.text();
        let fast_zero = case.plugin == Plugin::Memory;
        let facts = [
            "\"protocol\": \"newstyle-fixed\"".to_owned(),
            "\"TLS\": false".to_owned(),
            format!("\"structured\": {structured}"),
            "\"export-name\": \"\"".to_owned(),
            format!("\"export-size\": {IMAGE}"),
            "\"is_read_only\": false".to_owned(),
            "\"is_rotational\": false".to_owned(),
            "\"can_cache\": true".to_owned(),
            format!("\"can_df\": {structured}"),
            format!("\"can_fast_zero\": {fast_zero}"),
            "\"can_flush\": true".to_owned(),
            "\"can_fua\": true".to_owned(),
            "\"can_multi_conn\": true".to_owned(),
            "\"can_trim\": true".to_owned(),
            "\"can_zero\": true".to_owned(),
        ];
        for fact in facts {
            assert!(text.contains(&fact), "{fact} is not in {text}");
        }
        assert_eq!(text.contains("\"base:allocation\""), structured, "{text}");
    }
    assert_eq!(export.run("nbdinfo --size \"$uri\"").text(), format!("{IMAGE}\n"));
    export.end(SPOKEN);
}

/// nbdinfo's status is 0 for yes and 2 for no.
fn nbdinfo_says_what_the_export_can_and_is(case: Case) {
    let export = case.serve(IMAGE);
    let structured = case.structured();
    let answers = [
        ("--can connect", true),
        ("--can read", true),
        ("--can write", true),
        ("--can flush", true),
        ("--can fua", true),
        ("--can trim", true),
        ("--can zero", true),
        ("--can fast-zero", case.plugin == Plugin::Memory),
        ("--can cache", true),
        ("--can multi-conn", true),
        ("--can df", structured),
        ("--can structured-reply", structured),
        ("--is read-only", false),
        ("--is rotational", false),
        ("--is tls", false),
    ];
    for (question, yes) in answers {
        let output = export.shell(&format!("exec nbdinfo {question} \"$uri\"")).run();
        assert_eq!(output.status.code(), Some(if yes { 0 } else { 2 }), "{question}: {output:#?}");
    }
    export.end(SPOKEN);
}

fn nbdinfo_maps_the_holes(case: Case) {
    let export = case.serve(IMAGE);
    let places = [(0, 64 * KIB), (MIB, 128 * KIB), (5 * MIB + 32 * KIB, 3 * MIB)];
    export.put(&places.map(|(offset, length)| (offset, data(length, 2))));
    if case.replies == Replies::Simple {
        let output = export.shell("nbdinfo --map \"$uri\"").run_to(1);
        assert!(output.stderr.contains("does not support metadata context"), "{output:#?}");
        return export.end(SPOKEN);
    }
    let map = export.run("nbdinfo --map \"$uri\"");
    let rows = map.text().lines().map(|line| {
        let mut words = line.split_whitespace();
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).expect("a number");
        (number(), number(), number())
    });
    let rows: Vec<(u64, u64, u64)> = rows.collect();
    let totals = export.run("nbdinfo --map=base:allocation --totals --json \"$uri\"");
    let mut at = 0;
    let mut expected = Vec::new();
    for (offset, length) in places {
        if offset > at {
            expected.push((at, offset - at, 3));
        }
        expected.push((offset, length, 0));
        at = offset + length;
    }
    expected.push((at, IMAGE - at, 3));
    assert_eq!(rows, expected);
    let written: u64 = places.iter().map(|place| place.1).sum();
    for (size, kind) in [(written, 0), (IMAGE - written, 3)] {
        let total = totals.text().split('}').find(|one| one.contains(&format!("\"type\": {kind}")));
        let total = total.unwrap_or_else(|| panic!("{kind} is not in {totals:#?}"));
        assert!(total.contains(&format!("\"size\": {size},")), "{total}");
    }
    export.end(SPOKEN);
}

/// How nbdcopy is told to go about it.
const WAYS: [&str; 7] = [
    "",
    "--connections=4 --requests=64",
    "--connections=1 --requests=128 --request-size=4096",
    "--connections=8 --threads=8 --request-size=33554432",
    "--synchronous",
    "--sparse=0 --allocated",
    "--no-extents --connections=4 --queue-size=1M",
];

fn nbdcopy_copies_in(case: Case) {
    let export = case.serve(IMAGE);
    image_file(&export.room);
    let copy = "nbdcopy --target-is-zero image \"$uri\"";
    export.run(copy);
    export.assert_content(&image(), copy);
    for way in WAYS {
        export.put_old_data();
        let copy = format!("nbdcopy --flush {way} image \"$uri\"");
        export.run(&copy);
        export.assert_content(&image(), &copy);
    }
    export.end(SPOKEN);
}

fn nbdcopy_copies_out(case: Case) {
    let export = case.serve(IMAGE);
    export.put(&pieces());
    for way in WAYS {
        let copy = format!("rm -f out; nbdcopy {way} \"$uri\" out");
        export.run(&copy);
        let out = export.room.path("out");
        assert_same(&fs::read(&out).expect("it was copied out"), &image(), &copy);
        // Without block status the synchronous copy keeps no hole.
        if !way.contains("--allocated") && (case.structured() || !way.contains("--synchronous")) {
            let allocated = fs::metadata(&out).expect("it is there").blocks() * 512;
            assert!(allocated < IMAGE / 2, "{copy} keeps holes: {allocated} bytes are allocated");
        }
    }
    export.run("nbdcopy --connections=4 --requests=128 \"$uri\" null:");
    export.end(SPOKEN);
}

fn nbdcopy_copies_through_pipes(case: Case) {
    let export = case.serve(IMAGE);
    image_file(&export.room);
    export.run("cat image | nbdcopy -- - \"$uri\"");
    export.assert_content(&image(), "nbdcopy from a pipe");
    export.run("nbdcopy \"$uri\" - | cmp image -");
    // To a server that the copy starts, and from there to ours.
    let mut launch = export.shell(
        "nbdcopy \"$uri\" -- [ \"$server\" --exit-with-parent file file=copy ]
        cmp image copy
        nbdcopy -- [ \"$server\" --exit-with-parent -r file file=copy ] \"$uri\"",
    );
    fs::File::create(export.room.path("copy")).and_then(|file| file.set_len(IMAGE)).expect("a sparse file");
    launch.env("server", server_path().as_os_str().to_str().expect("its path is text")).run_to(0);
    export.assert_content(&image(), "nbdcopy from a server of its own");
    export.end(SPOKEN);
}

fn nbdsh_reads_what_it_wrote(case: Case) {
    let export = case.serve(IMAGE);
    export.run(
        "
        # With Debian's own Python, which has libnbd.
        PATH=/usr/bin:$PATH
        nbdsh -u \"$uri\" -c 'h.pwrite(b\"from nbdsh\", 4090, nbd.CMD_FLAG_FUA)' -c 'h.flush()'
        nbdsh -u \"$uri\" -c 'assert h.pread(10, 4090) == b\"from nbdsh\"' -c 'h.trim(4096, 4096)' -c 'h.cache(512, 0)'",
    );
    let mut expected = vec![0; IMAGE as usize];
    expected[4090..][..6].copy_from_slice(b"from n");
    export.assert_content(&expected, "nbdsh");
    export.end(SPOKEN);
}

fn a_pipeline_finds_what_it_wrote(case: Case) {
    let export = case.serve(IMAGE);
    let uri = export.server.uri();
    let output = python(&export.room, include_str!("pipeline.py"), &[&uri, "1"]);
    let requests: u32 = output.text().trim().parse().expect("a number");
    assert!(requests > 1000, "{requests}");
    export.end(SPOKEN);
}

fn reads_come_in_chunks_that_cover_them(case: Case) {
    let export = case.serve(IMAGE);
    let uri = export.server.uri();
    let kinds: &[&str] = match case.replies {
        // nbdkit 1.32 sends the zeroes.
        _ if is_nbdkit() => &[],
        Replies::Structured => &["data", "hole"],
        Replies::Simple => &["data"],
    };
    python(&export.room, include_str!("chunks.py"), &[&[uri.as_str(), replies_name(case)], kinds].concat());
    // Block status that was not negotiated is an error in the log.
    let _ = export.end_with_errors();
    let export = case.serve(IMAGE);
    python(&export.room, include_str!("chunks.py"), &[&export.server.uri(), "declined"]);
    let log = export.end_with_errors();
    if !is_nbdkit() {
        assert_eq!(spoken(&log), [Spoken::Simple]);
    }
}

fn bad_requests_are_refused_and_the_connection_goes_on(case: Case) {
    let export = case.serve(65 * MIB);
    let read_only = Room::new();
    let mut arguments = case.arguments(&read_only, MIB);
    arguments.insert(0, "-r".to_owned());
    let second = read_only.serve(arguments);
    python(&export.room, include_str!("bad.py"), &[&export.server.uri(), &second.uri()]);
    second.terminate().expect(0);
    let log = export.end_with_errors();
    if !is_nbdkit() {
        let errors: Vec<&str> = log.lines().filter(|line| line.contains("error:")).collect();
        assert!(errors.len() > 50, "each has its line: {log}");
        assert!(errors.iter().all(|line| line.contains("invalid request:")), "{errors:#?}");
    }
}

/// "The server MAY process commands out of order, and MAY reply out of order"
/// A flush waits for the disk, which takes its time here; who asked for less is answered before it.
#[test]
fn what_waits_for_the_disk_holds_up_nothing_else() {
    for replies in [Replies::Structured, Replies::Simple] {
        // The longer ones are for a machine so busy that a flush is over before a read is looked at.
        let order = ["300ms", "3s", "20s"].iter().find_map(|delay| {
            let order = order_with_a_slow_flush(Case { plugin: Plugin::File, replies }, delay);
            let mut answered: Vec<&str> = order.split_whitespace().collect();
            let last = answered.last().copied() == Some("flush");
            answered.sort_unstable();
            assert_eq!(answered, ["flush", "read", "write"], "{order}");
            last.then_some(order)
        });
        assert!(order.is_some(), "the flush was answered before others, with {replies:?} replies");
    }
}

fn order_with_a_slow_flush(case: Case, delay: &str) -> String {
    let room = Room::new();
    let arguments = case.arguments(&room, IMAGE);
    let socket = room.path("socket");
    let slow = format!("inject=fdatasync:delay_enter={delay}");
    let mut launch = room.tool("strace", ["-f", "-qqq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", &slow]);
    let mut server = launch.args([server_path()]).args(["-f", "-U"]).args([&socket]).args(arguments).start();
    server.wait_until_listening(&socket);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    python(&room, include_str!("order.py"), &[&uri]).text().trim().to_owned()
    // Not ended in the orderly way, which would flush slowly once more: the room ends all that was started in it.
}

/// A directory of files has an export for each.
mod a_directory {
    use super::*;

    const NAMES: [&str; 4] = ["a", "image two", "na\u{ef}ve", "z%3F?&="];

    /// Each file has 4096 times its name.
    fn directory(room: &Room) {
        fs::create_dir(room.path("images")).expect("a directory in the room");
        for name in NAMES {
            room.write(&format!("images/{name}"), name.repeat(4096));
        }
    }

    fn serve(replies: Replies) -> (Room, Server) {
        let room = Room::new();
        directory(&room);
        let no_sr = if replies == Replies::Simple { &["--no-sr"][..] } else { &[] };
        let server = room.serve([no_sr, &["file", "dir=images"]].concat());
        (room, server)
    }

    #[test]
    fn is_listed_by_nbdinfo_and_qemu_nbd() {
        let (room, server) = serve(Replies::Structured);
        let list = room.tool("nbdinfo", ["--list", "--json", &server.uri()]).run_to(0);
        assert_eq!(list.text().matches("\"export-name\":").count(), NAMES.len(), "{list:#?}");
        for name in NAMES {
            assert!(list.text().contains(&format!("\"export-name\": \"{name}\"")), "{name} is not in {list:#?}");
        }
        let mut launch = room.tool("qemu-nbd", ["--list", "-k"]);
        let list = launch.args([&server.socket]).run_to(0);
        assert!(list.text().contains("exports available: 4"), "{list:#?}");
        for name in NAMES {
            assert!(list.text().contains(&format!("export: '{name}'")), "{name} is not in {list:#?}");
        }
        server.terminate().expect(0);
    }

    #[test]
    fn is_chosen_from_by_the_names_in_uris() {
        let (room, server) = serve(Replies::Structured);
        for (name, encoded) in NAMES.iter().zip(["a", "image%20two", "na%C3%AFve", "z%253F%3F%26%3D"]) {
            let uri = format!("nbd+unix:///{encoded}?socket={}", server.socket.display());
            for program in ["nbdcopy \"$uri\" out", "qemu-img convert -f raw -O raw \"$uri\" out"] {
                let mut launch = room.tool("sh", ["-ec", &format!("rm -f out; {program}")]);
                launch.env("uri", &uri).run_to(0);
                let out = fs::read(room.path("out")).expect("it was copied out");
                // QEMU rounds up to a sector.
                let expected = name.repeat(4096);
                assert_eq!(&out[..expected.len()], expected.as_bytes(), "{program}");
                assert_eq!(out.len(), expected.len(), "{program}");
            }
        }
        server.terminate().expect(0);
    }

    #[test]
    fn is_looked_at_option_by_option() {
        if nbdkit_differs("1.32 names no export where it is not asked for") {
            return;
        }
        for replies in [Replies::Structured, Replies::Simple] {
            let (room, server) = serve(replies);
            let how = if replies == Replies::Structured { "structured" } else { "simple" };
            let uri = server.uri();
            let arguments = [&[uri.as_str(), how][..], &NAMES].concat();
            python(&room, include_str!("options.py"), &arguments);
            server.terminate().expect(0);
        }
    }
}

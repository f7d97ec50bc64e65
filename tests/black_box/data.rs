//! `data`: a client finds what the command line describes, as with nbdkit. The language itself is tested beside its code.
//! Source: nbdkit-data-plugin(1), its examples; nbdkit's tests/test-data-*.sh.

use super::both::{both, ours};
use super::harness::{Launch, Room, nbdkit_differs};

const OPERATIONS: [&str; 9] =
    ["read 0 20", "map", "write 3 5 7", "zero 4 2", "trim 8 3", "read 0 20", "flush", "cache 0 512", "read 8000 192"];

#[test]
fn a_client_finds_what_nbdkit_would_have_made_of_it() {
    for arguments in [
        &["data", " ( 0x55 0xAA )*8192 "][..],
        &["data", " ( \"Hello\" )*4000 ", "size=16384"],
        &["data", "0 1 2 3 @0x1fe 0x55 0xaa", "size=1M"],
        &["data", "0 1 2 3 @^0x200 @-2 le16:0xaa55", "size=16384"],
        &["data", " <file1 @^512 <file2 @^512 </dev/zero[:512] $more", "more=<(cat file1)*3 @16384"],
        &["data", "( 0x55 0xAA ) -> \\boot-signature ( @0x1fe \\boot-signature ) -> \\sector \\sector*32"],
        &["data", "base64=MTIz", "size=1M"],
        &["data", "raw=Hello, world!", "size=16384"],
        &["data", "1*100 @40000 2*100", "size=1M", "allocator=malloc"],
        &["data", "1*100 @40000 2*100", "size=1M", "allocator=zstd"],
        &["-r", "data", "@32768 1 @65536 1 @131072 0 @163840 0", "size=1M"],
    ] {
        let text = both(arguments, &OPERATIONS, |room| {
            room.write("file1", [1; 300]);
            room.write("file2", [2; 700]);
        });
        assert!(text.contains("read 0 20: ") && text.contains("map: [("), "{text}");
    }
}

/// As 1.45 has it; Debian's nbdkit states no block sizes here.
#[test]
fn what_it_offers() {
    let text = ours(&Room::new(), &["data", "1", "size=1M"], &["about"]);
    let offers = "can_flush, can_fua, can_trim, can_zero, can_fast_zero, can_multi_conn, can_cache";
    assert_eq!(text, format!("about: size 1048576, {offers}, blocks 1 32768 4294967295, extents True, name ''\n"));
}

/// "-D data.AST=1: Print the Abstract Syntax Tree".
#[test]
fn what_a_description_was_understood_as_is_shown() {
    // What is between the first line and the last.
    let shown = |launch: &mut Launch| {
        let output = launch.run_to(0);
        let tree = output.debug_lines().skip_while(|line| *line != "BEGIN AST (-D data.AST=1)").skip(1);
        tree.take_while(|line| *line != "END AST").collect::<Vec<_>>().join("\n")
    };
    let room = Room::new();
    room.write("file", [1; 300]);
    for data in [
        "1 2 \"\\x80a\\n\" @4 (1 2 @^8)*3 -> \\x \\x <file[0:4] le16:0x102 (7)*5000",
        "( 0x55 0xAA ) -> \\boot-signature ( @0x1fe \\boot-signature ) -> \\sector \\sector*32",
        "$more (@+2 @-1 1 (2 (3 (4 @5 ((6)*2 7 7 7)*3)))) <(echo x)[:1]",
        "((((((((((((@1 1 @2 2) @1 3) @1 4) @1 5) @1 6) @1 7) @1 8) @1 9) @1 10) @1 11) @1 12) @1 13)",
        "\"abc\"[1:] \"abc\"[:1] 9*100[3:50] <file*2*3 () ()*5 1*0 (<file)[4:4]",
        "\"aaaa\" 97*5 97 \"b\"*3",
        "",
    ] {
        let arguments = ["-v", "-D", "data.AST=1", "data", data, "more=(1 <file 2)*2"];
        let ours = shown(&mut room.captive(arguments, "true"));
        assert!(!ours.is_empty(), "{data}");
        // Since 1.36 every line of it is quoted; Debian's is as it was.
        assert_eq!(ours.replace("\\\\", "\\"), shown(&mut room.nbdkit_captive(arguments, "true")), "{data}");
        assert_eq!(shown(&mut room.captive(["-v", "data", data, "more=1"], "true")), "");
        assert_eq!(room.captive(&arguments[1..], "true").run_to(0).stderr, "");
    }
}

#[test]
fn a_bad_description_is_one_line_and_status_1() {
    let room = Room::new();
    let refused = |arguments: &[&str], words: &[&str]| {
        room.captive([&["data"], arguments].concat(), "touch started").run_to(1).expect_error_line(words);
        room.assert_nothing_left();
        assert!(!room.path("started").exists());
    };
    refused(&[], &["raw|base64|data parameter was not specified"]);
    refused(&["raw=", "1"], &["raw|base64|data parameter must be specified exactly once"]);
    refused(&["raw=", "a=b"], &["extra parameters passed and not using data='...'"]);
    refused(&["256"], &["data parameter BYTE must be in the range 0..255"]);
    refused(&["1 ?"], &["data parameter: parsing error at offset 2"]);
    refused(&["</nowhere"], &["/nowhere: No such file or directory"]);
    refused(&["1", "size=x"], &["could not parse size string: x"]);
    if !nbdkit_differs("it would need the memory") {
        refused(&["1*7000000000000000000"], &["takes more than"]);
        assert!(ours(&room, &["data", "1*7000000000000000000", "size=4"], &["read 0 4"]).contains("01*4"));
    }
}

//! `data`: a client finds what the command line describes, as with nbdkit. The language itself is tested beside its code.
//! Source: nbdkit-data-plugin(1), its examples; nbdkit's tests/test-data-*.sh.

use super::both::{both, ours};
use super::harness::{Room, nbdkit_differs};

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

//! Extended headers: requests of 64 bits, and block status for chosen contexts. That each reply has the right header, offset,
//! chunk types and counts is checked by `raw_client.rs` for every request here. Source: NBD proto.md.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::thread;

use super::harness::{Room, Server, nbdkit_differs, wait_for};
use super::protocol::pattern;
use super::raw_client::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const HOLE_AND_ZERO: u64 = 3;

/// A disk, unless the server is nbdkit, which answers `NBD_OPT_EXTENDED_HEADERS` with `NBD_REP_ERR_UNSUP` up to 1.45.
fn serve(room: &Room, arguments: &[&str]) -> Option<Server> {
    (!nbdkit_differs("it has no extended headers")).then(|| room.serve(arguments))
}

fn memory(room: &Room) -> Option<Server> {
    serve(room, &["memory", "16M"])
}

/// All whose data is looked at, and the request that follows.
fn decoy() -> [u8; 32] {
    extended_request_bytes(NBD_CMD_DISC, 0, 0, 0, 0)
}

mod negotiation {
    use super::*;

    #[test]
    fn extended_headers_need_no_structured_replies_and_may_follow_them() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        for ask_first in [false, true] {
            let mut client = server.connect();
            client.start();
            if ask_first {
                client.ask_for_structured_replies();
            }
            client.ask_for_extended_headers();
            client.go(b"");
            assert_eq!(client.write(0, 5, b"here"), NBD_SUCCESS);
            assert_eq!(client.read(4, 6), b"\0here\0");
            client.disconnect();
        }
    }

    #[test]
    fn extended_headers_with_data_are_invalid_and_change_nothing() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.connect();
        client.start();
        for length in [1, 8, 4096] {
            client.expect_refused(NBD_OPT_EXTENDED_HEADERS, &vec![0; length], NBD_REP_ERR_INVALID);
        }
        client.go(b"");
        client.expect_alive();
        let mut client = server.connect();
        client.start();
        client.expect_refused(NBD_OPT_EXTENDED_HEADERS, b"x", NBD_REP_ERR_INVALID);
        client.ask_for_extended_headers();
        client.go(b"");
        client.expect_alive();
    }

    /// "if it does, the server MAY fail the repeated message with NBD_REP_ERR_INVALID"
    #[test]
    fn extended_headers_are_negotiated_once() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.connect();
        client.start();
        client.ask_for_extended_headers();
        client.expect_refused(NBD_OPT_EXTENDED_HEADERS, b"", NBD_REP_ERR_INVALID);
        client.go(b"");
        client.expect_alive();
    }

    /// "NBD_REP_ERR_EXT_HEADER_REQD: The client has already successfully negotiated extended headers"
    #[test]
    fn structured_replies_after_extended_headers_are_refused_and_change_nothing() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        for ask_first in [false, true] {
            let mut client = server.connect();
            client.start();
            if ask_first {
                client.ask_for_structured_replies();
            }
            client.ask_for_extended_headers();
            client.expect_refused(NBD_OPT_STRUCTURED_REPLY, b"", NBD_REP_ERR_EXT_HEADER_REQD);
            client.go(b"");
            client.expect_alive();
        }
    }

    /// "Once extended headers are successfully requested, a client MUST NOT use NBD_OPT_EXPORT_NAME."
    #[test]
    fn export_name_after_extended_headers_ends_the_connection() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.connect();
        client.start();
        client.ask_for_extended_headers();
        client.send_option(NBD_OPT_EXPORT_NAME, b"");
        client.expect_end();
        server.extended().expect_alive();
    }

    #[test]
    fn a_server_without_structured_replies_has_no_extended_headers() {
        let room = Room::new();
        let Some(server) = serve(&room, &["--no-sr", "memory", "16M"]) else { return };
        let mut client = server.connect();
        client.start();
        client.expect_refused(NBD_OPT_EXTENDED_HEADERS, b"", NBD_REP_ERR_UNSUP);
        client.expect_refused(NBD_OPT_STRUCTURED_REPLY, b"", NBD_REP_ERR_UNSUP);
        client.go(b"");
        client.expect_alive();
    }

    #[test]
    fn a_server_without_extended_headers_has_structured_replies() {
        let room = Room::new();
        for option in ["--no-eh", "--no-extended-headers"] {
            let Some(server) = serve(&room, &[option, "memory", "16M"]) else { return };
            let mut client = server.connect();
            client.start();
            client.expect_refused(NBD_OPT_EXTENDED_HEADERS, b"", NBD_REP_ERR_UNSUP);
            client.ask_for_structured_replies();
            client.go(b"");
            client.expect_alive();
        }
    }

    /// "Servers MUST NOT advertise [NBD_FLAG_BLOCK_STATUS_PAYLOAD] unless the client successfully negotiates extended headers
    /// [...], and SHOULD NOT [...] if the client does not negotiate metacontexts"
    #[test]
    fn block_status_with_payload_is_offered_with_extended_headers_and_a_context_only() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let has = |flags: u16| flags & NBD_FLAG_BLOCK_STATUS_PAYLOAD != 0;
        assert!(!has(server.simple().export.flags));
        assert!(!has(server.structured().export.flags));
        let mut without_context = server.connect();
        without_context.start();
        without_context.ask_for_extended_headers();
        without_context.go(b"");
        assert!(!has(without_context.export.flags));
        let mut other_export = server.connect();
        other_export.start();
        other_export.ask_for_extended_headers();
        other_export.ask_for_base_allocation(b"one");
        other_export.go(b"other");
        assert!(!has(other_export.export.flags));
        let extended = server.extended().export.flags;
        assert!(has(extended));
        assert_eq!(extended, server.structured().export.flags | NBD_FLAG_BLOCK_STATUS_PAYLOAD);
    }

    /// "the server MUST reply with the same set of information, such as transmission flags"
    #[test]
    fn info_says_what_go_will_say() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        for with_context in [false, true] {
            let mut client = server.connect();
            client.start();
            client.ask_for_extended_headers();
            if with_context {
                client.ask_for_base_allocation(b"name");
            }
            let requests = [NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE];
            let info = client.info(NBD_OPT_INFO, b"name", &requests);
            assert_eq!(client.info(NBD_OPT_GO, b"name", &requests), info);
            client.expect_alive();
        }
    }

    /// Nothing in between takes a context away: "with no intervening NBD_OPT_STARTTLS"
    #[test]
    fn a_context_that_was_set_before_extended_headers_holds() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.connect();
        client.start();
        client.ask_for_structured_replies();
        client.ask_for_base_allocation(b"");
        client.ask_for_extended_headers();
        client.go(b"");
        assert_eq!(client.blocks(0, 0, 16 * MIB), [(16 * MIB, HOLE_AND_ZERO)]);
    }

    #[test]
    fn extended_headers_alone_allow_contexts() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.connect();
        client.start();
        client.ask_for_extended_headers();
        let (replies, last) = client.option(NBD_OPT_LIST_META_CONTEXT, &context_bytes(b"", &[b"base:"]));
        assert_eq!(last, NBD_REP_ACK);
        assert_eq!(replies, [OptionReply { kind: NBD_REP_META_CONTEXT, data: b"\0\0\0\0base:allocation".to_vec() }]);
        client.ask_for_base_allocation(b"");
        client.go(b"");
        assert_eq!(client.blocks(0, 0, 16 * MIB), [(16 * MIB, HOLE_AND_ZERO)]);
    }

    #[test]
    fn each_kind_of_request_is_for_its_own_kind_of_session_only() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        // With enough after it for a header of the other kind.
        client.send(&[&request_bytes(NBD_CMD_READ, 0, 1, 0, 512)[..], &[0; 4]].concat());
        while client.reads_on() {}
        for mut client in [server.simple(), server.structured()] {
            client.send(&extended_request_bytes(NBD_CMD_READ, 0, 1, 0, 512));
            while client.reads_on() {}
        }
        server.extended().expect_alive();
    }
}

mod requests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        let data = pattern(3 * MIB as usize, 1);
        assert_eq!(client.write(0, 12_345, &data), NBD_SUCCESS);
        assert_eq!(client.write(NBD_CMD_FLAG_FUA, 16 * MIB - 3, b"end"), NBD_SUCCESS);
        assert!(client.read(12_345, 3 * MIB) == data);
        assert_eq!(client.read(16 * MIB - 4, 4), b"\0end");
        let reply = client.ask(NBD_CMD_READ, NBD_CMD_FLAG_DF, 12_345, 65536);
        assert_eq!((reply.error, reply.content.len()), (NBD_SUCCESS, 1));
        assert!(reply.data == data[..65536]);
        client.disconnect();
        assert!(server.simple().read(12_345, 3 * MIB) == data);
    }

    #[test]
    fn every_command_is_answered() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        assert_eq!(client.write(0, 0, &pattern(MIB as usize, 2)), NBD_SUCCESS);
        for (kind, flags, length) in [
            (NBD_CMD_FLUSH, 0, 0),
            (NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA, 0),
            (NBD_CMD_CACHE, 0, MIB),
            (NBD_CMD_TRIM, NBD_CMD_FLAG_FUA, 4096),
            (NBD_CMD_WRITE_ZEROES, 0, MIB),
            (NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FUA, MIB),
            (NBD_CMD_READ, NBD_CMD_FLAG_FUA, 4096),
        ] {
            assert_eq!(client.ask(kind, flags, 0, length).error, NBD_SUCCESS, "command {kind} with flags {flags:#x}");
        }
        assert_eq!(client.read(0, MIB), vec![0; MIB as usize]);
    }

    #[test]
    fn lengths_of_more_than_32_bits_reach_the_whole_disk() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "4T"]) else { return };
        let mut client = server.extended();
        let data = pattern(MIB as usize, 3);
        let places = [0, 5 * GIB, TIB + MIB, 3 * TIB, 4 * TIB - MIB];
        for kind in [NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM] {
            for offset in places {
                assert_eq!(client.write(0, offset, &data), NBD_SUCCESS);
            }
            let islands = [
                (MIB, 0),
                (5 * GIB - MIB, HOLE_AND_ZERO),
                (MIB, 0),
                (TIB - 5 * GIB, HOLE_AND_ZERO),
                (MIB, 0),
                (2 * TIB - 2 * MIB, HOLE_AND_ZERO),
                (MIB, 0),
                (TIB - 2 * MIB, HOLE_AND_ZERO),
                (MIB, 0),
            ];
            assert_eq!(client.blocks(0, 0, 4 * TIB), islands);
            assert_eq!(client.blocks(NBD_CMD_FLAG_REQ_ONE, MIB, 4 * TIB - MIB), [islands[1]]);
            assert_eq!(client.ask(NBD_CMD_CACHE, 0, MIB, 5 * GIB).error, NBD_SUCCESS);
            // All but the first and the last.
            assert_eq!(client.ask(kind, 0, MIB, 4 * TIB - 2 * MIB).error, NBD_SUCCESS);
            assert!(client.read(0, MIB) == data && client.read(4 * TIB - MIB, MIB) == data);
            assert_eq!(client.blocks(0, MIB, 4 * TIB - MIB), [(4 * TIB - 2 * MIB, HOLE_AND_ZERO), (MIB, 0)]);
            assert_eq!(client.ask(kind, 0, 0, 4 * TIB).error, NBD_SUCCESS);
            assert_eq!(client.blocks(0, 0, 4 * TIB), [(4 * TIB, HOLE_AND_ZERO)]);
        }
    }

    #[test]
    fn a_length_of_just_more_than_32_bits_is_not_cut_off() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "16G"]) else { return };
        let mut client = server.extended();
        let far = 4 * GIB + 4096;
        for kind in [NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM] {
            assert_eq!(client.write(0, far, &pattern(65536, 4)), NBD_SUCCESS);
            assert_eq!(client.ask(kind, 0, 0, far + 65536).error, NBD_SUCCESS);
            assert_eq!(client.read(far, 65536), vec![0; 65536], "command {kind}");
        }
    }

    #[test]
    fn a_disk_of_nearly_all_63_bits_is_one_request_long() {
        let room = Room::new();
        let Some(server) = serve(&room, &["null", "8191P"]) else { return };
        let size = 8191 << 50;
        let mut client = server.extended();
        assert_eq!(client.export.size, size);
        assert_eq!(client.blocks(0, 0, size), [(size, HOLE_AND_ZERO)]);
        assert_eq!(client.blocks(NBD_CMD_FLAG_REQ_ONE, 1 << 61, size - (1 << 61)), [(size - (1 << 61), HOLE_AND_ZERO)]);
        for (kind, flags) in [
            (NBD_CMD_TRIM, 0),
            (NBD_CMD_CACHE, 0),
            (NBD_CMD_WRITE_ZEROES, 0),
            (NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE),
            (NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FAST_ZERO),
        ] {
            assert_eq!(client.ask(kind, flags, 0, size).error, NBD_SUCCESS, "command {kind} with flags {flags:#x}");
        }
        assert_eq!(client.read(size - 4096, 4096), [0; 4096]);
        assert_eq!(client.ask(NBD_CMD_READ, 0, size, 1).error, NBD_EINVAL);
    }

    /// A session with compact requests sees as much of such a disk as 32 bits can say.
    #[test]
    fn block_status_of_a_huge_disk_fits_into_32_bits_without_extended_headers() {
        if nbdkit_differs("1.32 aborts") {
            return;
        }
        let room = Room::new();
        let server = room.serve(["null", "8191P"]);
        let mut client = server.structured();
        let blocks = client.blocks(0, 0, u32::MAX.into());
        assert_eq!(blocks.len(), 1, "{blocks:?}");
        assert!((4096..=u64::from(u32::MAX)).contains(&blocks[0].0), "{blocks:?}");
        assert_eq!(blocks[0].1, HOLE_AND_ZERO);
    }

    #[test]
    fn requests_past_the_end_are_errors_that_say_something_and_the_connection_goes_on() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        for (offset, length) in [
            (16 * MIB, 1),
            (16 * MIB - 1, 2),
            (1 << 63, 512),
            (u64::MAX, 2),
            (u64::MAX - 511, 512),
            (0, 16 * MIB + 1),
            (0, 1 << 32),
            (0, 1 << 63),
            (0, u64::MAX),
            (1, u64::MAX),
            (4096, u64::MAX - 4095),
            (u64::MAX, u64::MAX),
            // What is left of these in 32 bits would fit.
            (0, (1 << 32) + 512),
            (0, (1 << 63) + 512),
        ] {
            for (kind, wanted) in [
                (NBD_CMD_READ, NBD_EINVAL),
                (NBD_CMD_TRIM, NBD_EINVAL),
                (NBD_CMD_CACHE, NBD_EINVAL),
                (NBD_CMD_BLOCK_STATUS, NBD_EINVAL),
                (NBD_CMD_WRITE_ZEROES, NBD_ENOSPC),
            ] {
                let reply = client.ask(kind, 0, offset, length);
                assert_eq!(reply.error, wanted, "command {kind}, {length} at {offset}");
                assert!(!reply.message.is_empty(), "an error of command {kind} says what is wrong");
            }
        }
        for offset in [16 * MIB, 16 * MIB - 1, u64::MAX - 20] {
            assert_eq!(client.write(0, offset, &decoy()), NBD_ENOSPC);
        }
        client.expect_alive();
        assert_eq!(client.read(16 * MIB - 1, 1), [0], "nothing was written in part");
    }

    #[test]
    fn a_read_that_is_too_large_is_an_error_and_the_connection_goes_on() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "4T"]) else { return };
        let mut client = server.extended();
        for length in [MAX_PAYLOAD + 1, u64::from(u32::MAX), 1 << 32, (1 << 32) + 4096, 2 * TIB] {
            for flags in [0, NBD_CMD_FLAG_DF] {
                let error = client.ask(NBD_CMD_READ, flags, 0, length).error;
                assert!([NBD_ENOMEM, NBD_EINVAL, NBD_EOVERFLOW].contains(&error), "{length}: {error}");
            }
        }
        client.expect_alive();
    }

    #[test]
    fn requests_of_64_mib_are_served() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "100M"]) else { return };
        let mut client = server.extended();
        let data = pattern(MAX_PAYLOAD as usize, 7);
        assert_eq!(client.write(0, 1, &data), NBD_SUCCESS);
        assert!(client.read(1, MAX_PAYLOAD) == data, "what was written is read");
    }

    /// "the flag MUST be set for NBD_CMD_WRITE", but QEMU up to 10 at least does not set it, and sends the data all the same.
    #[test]
    fn a_write_without_the_payload_flag_has_a_payload_all_the_same() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        for (flags, offset, wanted) in [
            (0, 4096, NBD_SUCCESS),
            (NBD_CMD_FLAG_FUA, 8192, NBD_SUCCESS),
            (0, 1 << 40, NBD_ENOSPC),
            (NBD_CMD_FLAG_DF, 0, NBD_EINVAL),
        ] {
            let mut bytes = client.prepare_exactly(NBD_CMD_WRITE, flags, offset, 32);
            bytes.extend(decoy());
            client.send(&bytes);
            assert_eq!(client.next_reply().map(|reply| reply.error), Some(wanted), "{flags:#x} at {offset}");
        }
        assert_eq!(client.read(4096, 32), decoy());
        assert_eq!(client.read(8192, 32), decoy());
        for length in [MAX_PAYLOAD + 1, 1 << 32, (1 << 32) + 32, u64::MAX] {
            let mut client = server.extended();
            client.send(&extended_request_bytes(NBD_CMD_WRITE, 0, 7, 0, length));
            while client.reads_on() {}
        }
        client.expect_alive();
    }

    /// "in all other cases, a server SHOULD gracefully consume *length* bytes of payload (even if it then replies with an
    /// NBD_EINVAL failure because the particular command was not expecting a payload)"
    #[test]
    fn a_payload_where_none_belongs_is_passed_over_and_invalid() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        assert_eq!(client.write(0, 0, &[0xaa; 65536]), NBD_SUCCESS);
        let long = decoy().repeat(100_000);
        for kind in [NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES, 8, 100, u16::MAX] {
            for payload in [&[0][..], &decoy(), &[0x25, 0x60, 0x95, 0x13], &long] {
                client.request_with_payload(kind, 0, 0, payload);
                let error = client.next_reply().map(|reply| reply.error);
                assert_eq!(error, Some(NBD_EINVAL), "command {kind} with {} bytes", payload.len());
            }
        }
        assert_eq!(client.read(0, 65536), [0xaa; 65536], "nothing was trimmed or zeroed");
    }

    #[test]
    fn a_useless_payload_of_64_mib_is_passed_over() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        client.request_with_payload(NBD_CMD_TRIM, 0, 0, &vec![0x21; MAX_PAYLOAD as usize]);
        assert_eq!(client.next_reply().map(|reply| reply.error), Some(NBD_EINVAL));
        client.expect_alive();
    }

    /// "A server SHOULD initiate hard disconnect if a client sets the NBD_CMD_FLAG_PAYLOAD_LEN flag and uses a *length* larger
    /// than a server's advertised or default maximum payload length"
    #[test]
    fn a_payload_that_is_too_large_ends_this_connection_only() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "4T"]) else { return };
        let mut other = server.extended();
        for kind in [NBD_CMD_WRITE, NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_FLUSH, NBD_CMD_BLOCK_STATUS, 100] {
            for length in [MAX_PAYLOAD + 1, 1 << 31, 1 << 32, (1 << 32) + 512, 1 << 63, u64::MAX] {
                let mut client = server.extended();
                client.send(&extended_request_bytes(kind, NBD_CMD_FLAG_PAYLOAD_LEN, 7, 0, length));
                // It may say why before it hangs up; what it does not do is wait for so much.
                while client.reads_on() {}
            }
        }
        other.expect_alive();
        server.extended().expect_alive();
    }

    #[test]
    fn a_write_of_no_bytes_does_not_end_the_connection() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        for kind in [NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES] {
            let error = client.ask(kind, 0, 0, 0).error;
            assert!([NBD_SUCCESS, NBD_EINVAL, NBD_ENOSPC].contains(&error), "command {kind}: {error}");
        }
        client.expect_alive();
    }

    #[test]
    fn flags_that_are_unknown_or_of_another_command_are_invalid() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        for (kind, flags) in [
            (NBD_CMD_READ, 0x8000),
            (NBD_CMD_READ, 1 << 6),
            (NBD_CMD_READ, NBD_CMD_FLAG_NO_HOLE),
            (NBD_CMD_READ, NBD_CMD_FLAG_REQ_ONE),
            (NBD_CMD_TRIM, NBD_CMD_FLAG_FAST_ZERO),
            (NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_DF),
            (NBD_CMD_CACHE, NBD_CMD_FLAG_REQ_ONE),
            (NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_DF),
            (8, 0),
            (u16::MAX, 0),
        ] {
            assert_eq!(client.ask(kind, flags, 0, 512).error, NBD_EINVAL, "command {kind} with flags {flags:#x}");
        }
        for flags in [0x8000, 1 << 6, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_NO_HOLE] {
            assert_eq!(client.write(flags, 0, &decoy()), NBD_EINVAL, "write with flags {flags:#x}");
        }
        assert_eq!(client.ask(NBD_CMD_FLUSH, 0, 512, 0).error, NBD_EINVAL);
        assert_eq!(client.ask(NBD_CMD_FLUSH, 0, 0, 512).error, NBD_EINVAL);
        assert_eq!(client.read(0, 512), [0; 512], "nothing was written");
    }

    /// The flag is for extended headers only: "In the compact style, the client MUST NOT use" it.
    #[test]
    fn the_payload_flag_is_invalid_without_extended_headers() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        for mut client in [server.simple(), server.structured()] {
            for kind in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_CACHE, NBD_CMD_BLOCK_STATUS] {
                assert_eq!(client.ask(kind, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 512).error, NBD_EINVAL, "command {kind}");
            }
            assert_eq!(client.write(NBD_CMD_FLAG_PAYLOAD_LEN, 0, &[0xff; 512]), NBD_EINVAL);
            assert_eq!(client.read(0, 512), [0; 512]);
        }
    }

    #[test]
    fn a_readonly_export_permits_no_change_and_the_connection_goes_on() {
        let room = Room::new();
        let Some(server) = serve(&room, &["-r", "memory", "1M"]) else { return };
        let mut client = server.extended();
        assert_ne!(client.export.flags & NBD_FLAG_READ_ONLY, 0);
        assert_eq!(client.write(0, 0, &decoy()), NBD_EPERM);
        assert_eq!(client.ask(NBD_CMD_TRIM, 0, 0, MIB).error, NBD_EPERM);
        assert_eq!(client.ask(NBD_CMD_WRITE_ZEROES, 0, 0, MIB).error, NBD_EPERM);
        assert_eq!(client.blocks(0, 0, MIB), [(MIB, HOLE_AND_ZERO)]);
        client.expect_alive();
    }

    /// "The server MUST handle all outstanding requests" before it closes the connection.
    #[test]
    fn a_disconnect_comes_after_the_replies_to_what_was_asked_before() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        for number in 0..50 {
            client.request(NBD_CMD_WRITE, 0, number * 4096, 4096, &pattern(4096, number));
        }
        client.send(&extended_request_bytes(NBD_CMD_DISC, 0, 99, 0, 0));
        while let Some(reply) = client.next_reply() {
            assert_eq!(reply.error, NBD_SUCCESS);
        }
        assert_eq!(client.unanswered(), 0);
        let mut client = server.extended();
        (0..50).for_each(|number| assert_eq!(client.read(number * 4096, 4096), pattern(4096, number)));
    }

    #[test]
    fn thousands_of_pipelined_requests_are_answered_once_each() {
        const BLOCK: u64 = 4096;
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        // Every second block is a hole.
        for slot in (0..512).step_by(2) {
            assert_eq!(client.write(0, slot * BLOCK, &pattern(BLOCK as usize, slot)), NBD_SUCCESS);
        }
        let mut expected = std::collections::HashMap::new();
        let mut bytes = Vec::new();
        for number in 0..6000_u64 {
            let slot = number.wrapping_mul(2_654_435_761) % 512;
            let header = match number % 6 {
                // Written again with what is there, so that the order does not matter.
                0 => client.prepare(NBD_CMD_WRITE, 0, (slot & !1) * BLOCK, BLOCK),
                1 => client.prepare(NBD_CMD_FLUSH, 0, 0, 0),
                2 => client.prepare(NBD_CMD_READ, 0, 1 << 40, 1 << 40),
                3 => client.prepare_exactly(NBD_CMD_TRIM, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 32),
                4 => client.prepare(NBD_CMD_BLOCK_STATUS, 0, 0, 16 * MIB),
                _ => client.prepare(NBD_CMD_READ, 0, slot * BLOCK, BLOCK),
            };
            let cookie = u64::from_be_bytes(header[8..16].try_into().expect("eight bytes"));
            bytes.extend(header);
            match number % 6 {
                0 => bytes.extend(pattern(BLOCK as usize, slot & !1)),
                3 => bytes.extend(decoy()),
                _ => (),
            }
            expected.insert(cookie, (number % 6, slot));
        }
        let mut socket = client.socket.try_clone().expect("a descriptor");
        let writer = thread::spawn(move || socket.write_all(&bytes));
        while !expected.is_empty() {
            let reply = client.next_reply().expect("all are answered");
            match expected.remove(&reply.cookie).expect("each is answered once") {
                (2 | 3, _) => assert_eq!(reply.error, NBD_EINVAL),
                (5, slot) if slot % 2 == 0 => assert!(reply.data == pattern(BLOCK as usize, slot), "slot {slot}"),
                (5, slot) => assert!(reply.data == [0; BLOCK as usize], "slot {slot}"),
                _ => assert_eq!(reply.error, NBD_SUCCESS),
            }
        }
        writer.join().expect("the writer does not panic").expect("the server reads all");
    }
}

mod status {
    use super::*;

    /// 1 MiB of data after each MiB of hole.
    fn striped(server: &Server) -> Client {
        let mut client = server.extended();
        for offset in (MIB..16 * MIB).step_by(2 * MIB as usize) {
            assert_eq!(client.write(0, offset, &[0xff; MIB as usize]), NBD_SUCCESS);
        }
        client
    }

    #[test]
    fn blocks_are_as_without_extended_headers() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = striped(&server);
        let mut structured = server.structured();
        for (offset, length) in
            [(0, 16 * MIB), (1, 16 * MIB - 1), (MIB - 1, 2), (3 * MIB + 512, 5 * MIB), (15 * MIB, 1)]
        {
            for flags in [0, NBD_CMD_FLAG_REQ_ONE] {
                let blocks = client.blocks(flags, offset, length);
                assert_eq!(blocks, structured.blocks(flags, offset, length), "{length} at {offset}");
                let end: u64 = offset + blocks.iter().map(|(length, _)| length).sum::<u64>();
                assert!(end <= 16 * MIB, "blocks end with the disk: {blocks:?}");
            }
        }
        let whole = client.blocks(0, 0, 16 * MIB);
        assert!(whole.iter().copied().eq((0..16).map(|stripe| (MIB, [HOLE_AND_ZERO, 0][stripe % 2]))), "{whole:?}");
    }

    #[test]
    fn a_payload_names_the_contexts_that_are_answered() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = striped(&server);
        let id = client.base_allocation();
        for (offset, length) in [(0, 16 * MIB), (MIB - 1, 2), (3 * MIB + 512, 5 * MIB)] {
            let all = client.blocks(0, offset, length);
            let reply = client.ask_status_of(0, offset, length, &[id]);
            assert_eq!(reply.error, NBD_SUCCESS);
            assert_eq!(reply.blocks(), all);
            // The effect length that counts is in the payload.
            let one = client.ask_status_of(NBD_CMD_FLAG_REQ_ONE, offset, length, &[id]);
            assert_eq!(one.blocks(), client.blocks(NBD_CMD_FLAG_REQ_ONE, offset, length));
        }
    }

    #[test]
    fn an_effect_length_in_a_payload_has_64_bits() {
        let room = Room::new();
        let Some(server) = serve(&room, &["null", "8191P"]) else { return };
        let mut client = server.extended();
        let (id, size) = (client.base_allocation(), 8191 << 50);
        assert_eq!(client.ask_status_of(0, 0, size, &[id]).blocks(), [(size, HOLE_AND_ZERO)]);
        for (offset, length) in [(0, size + 1), (1, size), (0, u64::MAX), (u64::MAX, u64::MAX), (size, 1)] {
            assert_eq!(client.ask_status_of(0, offset, length, &[id]).error, NBD_EINVAL, "{length} at {offset}");
        }
        client.expect_alive();
    }

    /// "[If it] detects duplicate or unknown metacontext ids in the client's payload, the server MUST gracefully consume the
    /// client's payload before failing with NBD_EINVAL"
    #[test]
    fn duplicate_and_unknown_contexts_are_invalid() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        let id = client.base_allocation();
        let unknown = id.wrapping_add(1);
        for ids in [&[id, id][..], &[unknown], &[id, unknown], &[unknown, id], &[u32::MAX], &vec![id; 5000]] {
            assert_eq!(client.ask_status_of(0, 0, 4096, ids).error, NBD_EINVAL, "{ids:?}");
            assert_eq!(client.ask_status_of(0, 0, 4096, &[id]).error, NBD_SUCCESS);
        }
    }

    /// "The payload form MUST occupy 8 + n*4 bytes"
    #[test]
    fn a_payload_of_another_size_is_passed_over_and_invalid() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.extended();
        let id = client.base_allocation();
        let good = [&4096_u64.to_be_bytes()[..], &id.to_be_bytes()].concat();
        for length in [1, 4, 7, 9, 10, 11, 13, 15, 4097, 1 << 20 | 1] {
            let payload: Vec<u8> = good.iter().copied().cycle().take(length).collect();
            client.request_with_payload(NBD_CMD_BLOCK_STATUS, 0, 0, &payload);
            let error = client.next_reply().map(|reply| reply.error);
            assert_eq!(error, Some(NBD_EINVAL), "a payload of {length} bytes");
        }
        // No ids is no context: nothing to say, or an error.
        let reply = client.ask_status_of(0, 0, 4096, &[]);
        assert!([NBD_EINVAL, NBD_SUCCESS].contains(&reply.error), "{reply:?}");
        assert_eq!(client.ask_status_of(0, 0, 4096, &[id]).error, NBD_SUCCESS);
    }

    #[test]
    fn a_payload_without_a_context_that_was_negotiated_is_passed_over_and_invalid() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut client = server.connect();
        client.start();
        client.ask_for_extended_headers();
        client.go(b"");
        for id in [0, 1, 2, u32::MAX] {
            assert_eq!(client.ask_status_of(0, 0, 4096, &[id]).error, NBD_EINVAL);
        }
        assert_eq!(client.ask(NBD_CMD_BLOCK_STATUS, 0, 0, 4096).error, NBD_EINVAL);
        client.expect_alive();
    }
}

mod streams {
    use super::*;

    /// Descriptors and threads that the server has, without those of the pool that all clients share: it keeps them.
    fn counts(server: &Server) -> (usize, usize) {
        let entries = |what| {
            let path = format!("/proc/{}/{what}", server.running.pid());
            fs::read_dir(path).expect("the server is there").flatten().map(|entry| entry.path())
        };
        let is_of_pool = |thread: &PathBuf| {
            // A thread may end between these reads.
            fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.trim_end() == "nbd-call")
        };
        (entries("fd").count(), entries("task").filter(|thread| !is_of_pool(thread)).count())
    }

    /// All that a client says from the greeting on, with the places at which it is cut.
    fn conversation(after: &[u8]) -> (Vec<u8>, std::ops::Range<usize>) {
        let mut bytes = (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES).to_be_bytes().to_vec();
        bytes.extend(option_bytes(NBD_OPT_EXTENDED_HEADERS, b""));
        bytes.extend(option_bytes(NBD_OPT_SET_META_CONTEXT, &context_bytes(b"", &[b"base:allocation"])));
        bytes.extend(option_bytes(NBD_OPT_GO, &info_bytes(b"", &[])));
        let start = bytes.len();
        bytes.extend(after);
        let end = bytes.len();
        (bytes, start..end)
    }

    /// What it says in transmission, in the three forms that a payload has.
    fn conversations() -> Vec<(Vec<u8>, std::ops::Range<usize>)> {
        let with_payload = |kind, payload: &[u8]| {
            let header = extended_request_bytes(kind, NBD_CMD_FLAG_PAYLOAD_LEN, 1, 0, payload.len() as u64);
            conversation(&[&header[..], payload].concat())
        };
        let status = [&4096_u64.to_be_bytes()[..], &[0; 24]].concat();
        vec![
            with_payload(NBD_CMD_WRITE, &[0xff; 40]),
            with_payload(NBD_CMD_BLOCK_STATUS, &status),
            with_payload(NBD_CMD_TRIM, &[0xff; 40]),
        ]
    }

    #[test]
    fn a_client_that_leaves_at_any_byte_leaves_nothing() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut other = server.extended();
        let without = sockets(&server);
        let mut before = (0, 0);
        // The first round is for what the server makes once and keeps.
        for round in 0..2 {
            for (bytes, cuts) in conversations() {
                for cut in cuts {
                    let mut client = server.connect();
                    // It may have been ended by then.
                    let _ = client.socket.write_all(&bytes[..cut]);
                    // Half of them read what they get; what is unread makes the end of the others a reset.
                    if cut % 2 == 0 {
                        client.greeting();
                    }
                }
                other.expect_alive();
            }
            if round == 0 {
                wait_for("the clients' descriptors to be closed", || {
                    let now = counts(&server);
                    let is_same = now == before;
                    before = now;
                    (is_same && sockets(&server) <= without).then_some(())
                });
            }
        }
        wait_for(&format!("no more than these descriptors and threads: {before:?}"), || {
            let (descriptors, threads) = counts(&server);
            (descriptors <= before.0 && threads <= before.1).then_some(())
        });
        assert_eq!(other.read(0, 40), [0; 40], "half a write is no write");
    }

    /// Sockets that the server has open.
    fn sockets(server: &Server) -> usize {
        let entries = fs::read_dir(format!("/proc/{}/fd", server.running.pid())).expect("the server is there");
        let targets = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
    }

    #[test]
    fn clients_that_stop_at_every_byte_hold_up_nobody() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let mut other = server.extended();
        assert_eq!(other.write(0, 0, &[0xaa; 4096]), NBD_SUCCESS);
        let without = sockets(&server);
        let mut stopped = Vec::new();
        for (bytes, cuts) in conversations() {
            for cut in cuts {
                let mut client = server.connect();
                client.send(&bytes[..cut]);
                stopped.push(client);
            }
        }
        for number in 0..200 {
            let offset = 8 * MIB + number * 4096;
            assert_eq!(other.write(0, offset, &pattern(4096, number)), NBD_SUCCESS);
            assert_eq!(server.extended().read(offset, 4096), pattern(4096, number));
        }
        assert_eq!(other.read(0, 4096), [0xaa; 4096], "half a write is no write");
        drop(stopped);
        wait_for("their sockets to be closed", || (sockets(&server) <= without).then_some(()));
        server.terminate().expect(0);
    }

    #[test]
    fn a_session_may_arrive_in_pieces_of_any_size() {
        let room = Room::new();
        let Some(server) = memory(&room) else { return };
        let data = pattern(5000, 9);
        for piece in [1, 2, 7, 31, 33, 1000] {
            let mut client = server.connect();
            client.headers = Headers::Extended;
            let mut requests = client.prepare(NBD_CMD_WRITE, 0, 4096, 5000);
            requests.extend(&data);
            requests.extend(client.prepare_exactly(NBD_CMD_TRIM, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 32));
            requests.extend(decoy());
            requests.extend(client.prepare(NBD_CMD_WRITE, 0, 1 << 40, 32));
            requests.extend(decoy());
            requests.extend(client.prepare(NBD_CMD_READ, 0, 4096, 5000));
            requests.extend(decoy());
            let (bytes, _) = conversation(&requests);
            let mut socket = client.socket.try_clone().expect("a descriptor");
            let writer = thread::spawn(move || {
                bytes.chunks(piece).try_for_each(|piece| {
                    thread::yield_now();
                    socket.write_all(piece)
                })
            });
            client.greeting();
            assert_eq!(client.option_replies(NBD_OPT_EXTENDED_HEADERS), (vec![], NBD_REP_ACK));
            assert_eq!(client.option_replies(NBD_OPT_SET_META_CONTEXT).1, NBD_REP_ACK);
            assert_eq!(client.option_replies(NBD_OPT_GO).1, NBD_REP_ACK);
            let mut errors = Vec::new();
            while let Some(reply) = client.next_reply() {
                errors.push((reply.cookie & 0xff, reply.error));
            }
            errors.sort_unstable();
            assert_eq!(errors, [(0, NBD_SUCCESS), (1, NBD_EINVAL), (2, NBD_ENOSPC), (3, NBD_SUCCESS)], "{piece}");
            writer.join().expect("the writer does not panic").expect("the server reads all");
            assert_eq!(server.simple().read(4096, 5000), data);
        }
    }
}

mod clients {
    use super::*;

    /// qemu asks for extended headers and for `base:allocation`, and requests more than 4 GiB at once.
    #[test]
    fn qemu_copies_and_discards_with_extended_headers() {
        let room = Room::new();
        let Some(server) = serve(&room, &["-v", "memory", "64G"]) else { return };
        let uri = server.uri();
        let io = |command: &str| {
            let arguments = ["-f", "raw", "-d", "unmap", "-c", command, &uri];
            room.tool("qemu-io", arguments).run_to(0).text().to_owned()
        };
        io("write -P 0xab 10G 1M");
        io("write -P 0xcd 63G 1M");
        let map = room.tool("qemu-img", ["map", "-f", "raw", "--output=json", &uri]).run_to(0);
        let start = |offset: u64| format!("\"start\": {offset}, \"length\": {MIB}");
        assert!(map.text().contains(&start(10 * GIB)) && map.text().contains(&start(63 * GIB)), "{map:?}");
        room.tool("qemu-img", ["convert", "-f", "raw", "-O", "raw", &uri, "copy"]).run_to(0);
        let arguments = ["compare", "-f", "raw", "-F", "raw", "copy", &uri];
        room.tool("qemu-img", arguments).run_to(0);
        io("write -z -u -n 0 62G");
        assert_eq!(server.extended().read(10 * GIB, MIB), vec![0; MIB as usize]);
        assert_eq!(server.extended().read(63 * GIB, MIB), vec![0xcd; MIB as usize]);
    }
}

//! Every option and request of the protocol, byte by byte. Source: NBD proto.md; where it leaves a choice, the assertion does.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::thread;

use super::harness::{Room, Server, nbdkit_differs, wait_for};
use super::raw_client::*;

const MIB: u64 = 1 << 20;
const HOLE_AND_ZERO: u64 = 3;

/// A memory disk of 16 MiB.
fn memory(room: &Room) -> Server {
    room.serve(["memory", "16M"])
}

/// Data in which every place can be told from every other.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(length + 8);
    while data.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        data.extend((state >> 16).to_be_bytes());
    }
    data.truncate(length);
    data
}

mod handshake {
    use super::*;

    #[test]
    fn greets_with_fixed_newstyle_and_no_zeroes() {
        let room = Room::new();
        let server = memory(&room);
        assert_eq!(server.connect().greeting(), 3);
    }

    #[test]
    fn client_flags_that_were_not_offered_end_the_connection() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.greeting();
        client.send(&0x8000_0003_u32.to_be_bytes());
        client.expect_end();
        server.simple().expect_alive();
    }

    #[test]
    fn export_name_gives_size_and_flags_and_124_zeroes() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start_with(NBD_FLAG_FIXED_NEWSTYLE);
        client.send_option(NBD_OPT_EXPORT_NAME, b"");
        let reply = client.receive(134);
        assert_eq!(reply[..8], (16 * MIB).to_be_bytes());
        assert_ne!(u16::from_be_bytes([reply[8], reply[9]]) & NBD_FLAG_HAS_FLAGS, 0);
        assert!(reply[10..].iter().all(|&byte| byte == 0));
        client.expect_alive();
    }

    #[test]
    fn export_name_leaves_the_zeroes_out_for_a_client_that_says_so() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        client.send_option(NBD_OPT_EXPORT_NAME, b"some name");
        assert_eq!(client.receive(10)[..8], (16 * MIB).to_be_bytes());
        client.expect_alive();
    }

    #[test]
    fn export_name_works_for_a_client_without_any_flag() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start_with(0);
        client.send_option(NBD_OPT_EXPORT_NAME, b"");
        assert_eq!(client.receive(134)[..8], (16 * MIB).to_be_bytes());
        client.expect_alive();
    }

    #[test]
    fn abort_is_acknowledged_and_ends_the_connection() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        assert_eq!(client.option(NBD_OPT_ABORT, b""), (vec![], NBD_REP_ACK));
        client.expect_end();
        server.simple().expect_alive();
    }

    #[test]
    fn list_shows_the_default_export_and_the_session_goes_on() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        let (replies, last) = client.option(NBD_OPT_LIST, b"");
        assert_eq!(last, NBD_REP_ACK);
        assert_eq!(replies, [OptionReply { kind: NBD_REP_SERVER, data: vec![0, 0, 0, 0] }]);
        client.go(b"");
        client.expect_alive();
    }

    #[test]
    fn info_can_be_asked_again_and_again_and_does_not_choose_the_export() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        for name in [&b""[..], b"first", b"second"] {
            assert_eq!(client.info(NBD_OPT_INFO, name, &[]).map(|export| export.size), Ok(16 * MIB));
        }
        client.go(b"third");
        client.expect_alive();
    }

    #[test]
    fn info_and_go_answer_what_is_asked_for() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        let requests = [NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE, NBD_INFO_EXPORT, 0x1234];
        for option in [NBD_OPT_INFO, NBD_OPT_GO] {
            let export =
                client.info(option, "na\u{ef}ve \u{1f980}".as_bytes(), &requests).expect("the export is there");
            assert_eq!(export.size, 16 * MIB);
            assert_eq!(export.name.as_deref(), Some("na\u{ef}ve \u{1f980}".as_bytes()));
            if let Some([minimum, preferred, maximum]) = export.block_size {
                assert!(minimum.is_power_of_two() && minimum <= 65536, "{minimum}");
                assert!(preferred.is_power_of_two() && preferred >= minimum.max(512), "{preferred}");
                assert!(maximum >= preferred && (maximum == u32::MAX || maximum % minimum == 0), "{maximum}");
            }
        }
        client.expect_alive();
    }

    #[test]
    fn info_that_is_not_asked_for_is_not_sent() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        let export = client.info(NBD_OPT_INFO, b"x", &[]).expect("the export is there");
        assert_eq!((export.name, export.description), (None, None));
    }

    #[test]
    fn memory_offers_all_that_it_can_do() {
        let room = Room::new();
        let server = memory(&room);
        let wanted = NBD_FLAG_HAS_FLAGS
            | NBD_FLAG_SEND_FLUSH
            | NBD_FLAG_SEND_FUA
            | NBD_FLAG_SEND_TRIM
            | NBD_FLAG_SEND_WRITE_ZEROES
            | NBD_FLAG_CAN_MULTI_CONN
            | NBD_FLAG_SEND_CACHE
            | NBD_FLAG_SEND_FAST_ZERO;
        let simple = server.simple().export.flags;
        assert_eq!(simple & wanted, wanted, "{simple:#x}");
        assert_eq!(simple & (NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_DF), 0, "{simple:#x}: DF is for structured replies");
        let structured = server.structured().export.flags;
        assert_eq!(structured, simple | NBD_FLAG_SEND_DF, "{structured:#x}");
    }

    #[test]
    fn structured_replies_are_negotiated_once() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        client.ask_for_structured_replies();
        if !nbdkit_differs("1.32 acknowledges a second NBD_OPT_STRUCTURED_REPLY") {
            client.expect_refused(NBD_OPT_STRUCTURED_REPLY, b"", NBD_REP_ERR_INVALID);
        }
        client.go(b"");
        client.expect_alive();
    }

    /// "the server MUST ignore [unknown contexts] rather than report an error"
    #[test]
    fn meta_contexts_are_listed_and_set_by_name() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        client.ask_for_structured_replies();
        let mut names = |option, queries: &[&[u8]]| -> Vec<String> {
            let (replies, last) = client.option(option, &context_bytes(b"", queries));
            assert_eq!(last, NBD_REP_ACK, "{queries:?}");
            assert!(replies.iter().all(|reply| reply.kind == NBD_REP_META_CONTEXT));
            replies.iter().map(|reply| String::from_utf8_lossy(&reply.data[4..]).into_owned()).collect()
        };
        assert_eq!(names(NBD_OPT_LIST_META_CONTEXT, &[]), ["base:allocation"], "no query lists all");
        assert_eq!(names(NBD_OPT_LIST_META_CONTEXT, &[b"base:"]), ["base:allocation"], "a wildcard");
        assert_eq!(names(NBD_OPT_LIST_META_CONTEXT, &[b"base:allocation"]), ["base:allocation"]);
        assert_eq!(names(NBD_OPT_LIST_META_CONTEXT, &[b"base:other", b"qemu:dirty-bitmap:x", b""]), [""; 0]);
        assert_eq!(names(NBD_OPT_SET_META_CONTEXT, &[b"base:"]), [""; 0], "a wildcard sets nothing");
        assert_eq!(names(NBD_OPT_SET_META_CONTEXT, &[b"x-unknown:y"]), [""; 0]);
        assert_eq!(names(NBD_OPT_SET_META_CONTEXT, &[b"x-unknown:y", b"base:allocation"]), ["base:allocation"]);
        assert_eq!(names(NBD_OPT_SET_META_CONTEXT, &[]), [""; 0], "no query unsets all");
    }

    #[test]
    fn a_meta_context_needs_structured_replies() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        let data = context_bytes(b"", &[b"base:allocation"]);
        client.expect_refused(NBD_OPT_SET_META_CONTEXT, &data, NBD_REP_ERR_INVALID);
        client.go(b"");
        client.expect_alive();
    }

    /// "If the client subsequently uses NBD_OPT_GO on a different export, the contexts are not usable"
    #[test]
    fn a_meta_context_is_for_the_export_that_it_was_set_for() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        client.ask_for_structured_replies();
        client.ask_for_base_allocation(b"one");
        client.go(b"other");
        assert_eq!(client.ask(NBD_CMD_BLOCK_STATUS, 0, 0, 4096).error, NBD_EINVAL);
        client.expect_alive();
    }

    #[test]
    fn a_meta_context_that_was_set_anew_without_queries_is_gone() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        client.ask_for_structured_replies();
        client.ask_for_base_allocation(b"");
        assert_eq!(client.option(NBD_OPT_SET_META_CONTEXT, &context_bytes(b"", &[])), (vec![], NBD_REP_ACK));
        client.go(b"");
        assert_eq!(client.ask(NBD_CMD_BLOCK_STATUS, 0, 0, 4096).error, NBD_EINVAL);
        client.expect_alive();
    }

    /// nbdkit says "policy" where it was built with TLS and "unsupported" where not; clients take both for "no TLS here".
    #[test]
    fn starttls_is_refused_without_tls_and_the_session_goes_on() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        let (replies, last) = client.option(NBD_OPT_STARTTLS, b"");
        assert!(replies.is_empty());
        assert!([NBD_REP_ERR_POLICY, NBD_REP_ERR_UNSUP].contains(&last), "{last:#x}");
        client.go(b"");
        client.expect_alive();
    }

    #[test]
    fn unknown_options_are_unsupported_and_their_data_is_passed_over() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        client.expect_refused(0x4242, b"", NBD_REP_ERR_UNSUP);
        client.expect_refused(u32::MAX, &[0xff; 777], NBD_REP_ERR_UNSUP);
        // What looks like an option inside the data is none.
        client.expect_refused(4, &option_bytes(NBD_OPT_ABORT, b""), NBD_REP_ERR_UNSUP);
        client.go(b"");
        client.expect_alive();
    }

    #[test]
    fn options_of_wrong_length_are_invalid_and_the_session_goes_on() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        let long_name = [&9_u32.to_be_bytes()[..], b"short", &[0, 0]].concat();
        let huge_name = [&u32::MAX.to_be_bytes()[..], b"short", &[0, 0]].concat();
        for option in [NBD_OPT_INFO, NBD_OPT_GO] {
            for data in [&b""[..], b"x", &[0, 0, 0, 0, 0], &long_name, &huge_name, &[0, 0, 0, 0, 0, 2, 0, 0]] {
                client.expect_refused(option, data, NBD_REP_ERR_INVALID);
            }
            let trailing = [&info_bytes(b"name", &[NBD_INFO_NAME])[..], b"x"].concat();
            client.expect_refused(option, &trailing, NBD_REP_ERR_INVALID);
        }
        client.expect_refused(NBD_OPT_LIST, b"x", NBD_REP_ERR_INVALID);
        client.expect_refused(NBD_OPT_STARTTLS, b"x", NBD_REP_ERR_INVALID);
        client.expect_refused(NBD_OPT_STRUCTURED_REPLY, b"payload", NBD_REP_ERR_INVALID);
        client.ask_for_structured_replies();
        for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
            client.expect_refused(option, b"", NBD_REP_ERR_INVALID);
            client.expect_refused(option, &[0; 7], NBD_REP_ERR_INVALID);
            client.expect_refused(option, &huge_name, NBD_REP_ERR_INVALID);
            let more_queries_than_data = [&context_bytes(b"", &[])[..4], &1_u32.to_be_bytes()].concat();
            client.expect_refused(option, &more_queries_than_data, NBD_REP_ERR_INVALID);
            let query_past_end = [&more_queries_than_data[..], &100_u32.to_be_bytes(), b"base:"].concat();
            client.expect_refused(option, &query_past_end, NBD_REP_ERR_INVALID);
        }
        client.go(b"");
        client.expect_alive();
    }

    #[test]
    fn a_wrong_option_magic_ends_the_connection() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        client.send(b"NOT_IT!!\0\0\0\x03\0\0\0\0");
        client.expect_end();
        server.simple().expect_alive();
    }

    #[test]
    fn an_option_that_claims_gigabytes_ends_the_connection() {
        let room = Room::new();
        let server = memory(&room);
        for option in [NBD_OPT_EXPORT_NAME, NBD_OPT_GO, 0x4242] {
            let mut client = server.connect();
            client.start();
            let mut header = option_bytes(option, b"");
            header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
            client.send(&header);
            client.expect_end();
        }
        server.simple().expect_alive();
    }

    /// "The name is a UTF-8 string [...] up to 4096 bytes"
    #[test]
    fn export_names_may_be_4096_bytes_long() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.start();
        client.expect_refused(NBD_OPT_INFO, &info_bytes(&[b'n'; 4097], &[]), NBD_REP_ERR_INVALID);
        client.go(&[b'n'; 4096]);
        client.expect_alive();
    }

    #[test]
    fn a_client_that_leaves_at_any_byte_of_the_handshake_does_no_harm() {
        let room = Room::new();
        let server = memory(&room);
        let handshake = [&3_u32.to_be_bytes()[..], &option_bytes(NBD_OPT_GO, &info_bytes(b"name", &[3]))].concat();
        for length in 0..handshake.len() {
            let mut client = server.connect();
            client.greeting();
            client.send(&handshake[..length]);
        }
        server.simple().expect_alive();
    }
}

mod requests {
    use super::*;

    #[test]
    fn what_was_written_is_read_with_simple_and_structured_replies() {
        let room = Room::new();
        let server = memory(&room);
        let data = pattern(100_000, 1);
        for (mut client, offset) in [(server.simple(), 12_345), (server.structured(), 5 * MIB + 1)] {
            assert_eq!(client.write(0, offset, &data), NBD_SUCCESS);
            assert_eq!(client.read(offset, 100_000), data);
            assert_eq!(client.read(offset - 1, 1), [0]);
            assert_eq!(client.read(offset + 100_000, 1), [0]);
            client.disconnect();
        }
    }

    #[test]
    fn reads_and_writes_reach_the_very_last_byte() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.structured();
        assert_eq!(client.write(0, 16 * MIB - 3, b"end"), NBD_SUCCESS);
        assert_eq!(client.read(16 * MIB - 4, 4), b"\0end");
    }

    #[test]
    fn forced_unit_access_is_taken_with_every_command() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.simple();
        assert_eq!(client.write(NBD_CMD_FLAG_FUA, 0, b"forced"), NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_READ, NBD_CMD_FLAG_FUA, 0, 6).data, b"forced");
        assert_eq!(client.ask(NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA, 0, 0).error, NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FUA, 0, 3).error, NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_TRIM, NBD_CMD_FLAG_FUA, MIB, MIB).error, NBD_SUCCESS);
        assert_eq!(client.read(0, 6), b"\0\0\0ced");
    }

    #[test]
    fn flush_trim_zero_and_cache_succeed() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.structured();
        assert_eq!(client.write(0, 0, &pattern(3 * MIB as usize, 2)), NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_CACHE, 0, 0, 1 << 20).error, NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_WRITE_ZEROES, 0, 100, 1000).error, NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE, 2 * MIB, 1 << 20).error, NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_TRIM, 0, MIB, 1 << 20).error, NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_FLUSH, 0, 0, 0).error, NBD_SUCCESS);
        let mut wanted = pattern(MIB as usize, 2);
        wanted[100..1100].fill(0);
        assert_eq!(client.read(0, 1 << 20), wanted);
        assert!(client.read(2 * MIB, 1 << 20).iter().all(|&byte| byte == 0));
    }

    /// "[With FAST_ZERO] the server MUST fail quickly with NBD_ENOTSUP if [...] no faster than a write"
    #[test]
    fn fast_zero_is_done_or_changes_nothing() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.simple();
        let data = pattern(1 << 20, 3);
        assert_eq!(client.write(0, 0, &data), NBD_SUCCESS);
        let error = client.ask(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FAST_ZERO, 0, 1 << 20).error;
        let now = client.read(0, 1 << 20);
        match error {
            NBD_SUCCESS => assert!(now.iter().all(|&byte| byte == 0)),
            NBD_ENOTSUP => assert_eq!(now, data),
            other => panic!("error {other}"),
        }
    }

    #[test]
    fn block_status_knows_holes_and_trim_and_zero_give_them_back() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.structured();
        assert_eq!(client.blocks(0, 0, 16 << 20), [(16 << 20, HOLE_AND_ZERO)]);
        assert_eq!(client.write(0, MIB, &pattern(2 << 20, 4)), NBD_SUCCESS);
        let with_data = [(1 << 20, HOLE_AND_ZERO), (2 << 20, 0), (13 << 20, HOLE_AND_ZERO)];
        assert_eq!(client.blocks(0, 0, 16 << 20), with_data);
        assert_eq!(client.blocks(0, MIB + 4096, 4096)[0].1, 0);
        assert_eq!(client.ask(NBD_CMD_TRIM, 0, MIB, 1 << 20).error, NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_WRITE_ZEROES, 0, 2 * MIB, 1 << 20).error, NBD_SUCCESS);
        assert_eq!(client.blocks(0, 0, 16 << 20), [(16 << 20, HOLE_AND_ZERO)]);
    }

    #[test]
    fn block_status_with_req_one_gives_one_block_that_ends_with_the_request() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.structured();
        assert_eq!(client.write(0, MIB, &pattern(1 << 20, 5)), NBD_SUCCESS);
        assert_eq!(client.blocks(NBD_CMD_FLAG_REQ_ONE, 0, 16 << 20), [(1 << 20, HOLE_AND_ZERO)]);
        assert_eq!(client.blocks(NBD_CMD_FLAG_REQ_ONE, MIB, 4096), [(4096, 0)]);
    }

    #[test]
    fn block_status_needs_what_was_not_negotiated() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.simple();
        assert_eq!(client.ask(NBD_CMD_BLOCK_STATUS, 0, 0, 4096).error, NBD_EINVAL);
        client.expect_alive();
    }

    /// "[With DF] the server MUST support unfragmented reads [...] which do not exceed 65,536 bytes"
    #[test]
    fn a_read_with_df_comes_in_one_chunk_although_it_has_holes() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.structured();
        let data = pattern(4096, 6);
        for offset in [0, 8192, 32768, 61440] {
            assert_eq!(client.write(0, offset, &data), NBD_SUCCESS);
        }
        let reply = client.ask(NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 65536);
        assert_eq!((reply.error, reply.content.len()), (NBD_SUCCESS, 1));
        assert_eq!(reply.data, client.read(0, 65536));
        assert_eq!(reply.data[8192..12288], data);
    }

    #[test]
    fn requests_past_the_end_are_errors_and_the_connection_goes_on() {
        let room = Room::new();
        let server = memory(&room);
        for mut client in [server.simple(), server.structured()] {
            for (offset, length) in [
                (16 * MIB, 1),
                (16 * MIB - 1, 2),
                (16 * MIB + 1, 1),
                (1 << 63, 512),
                (u64::MAX, 2),
                (u64::MAX - 511, 512),
                (0, (16 << 20) + 1),
            ] {
                for (kind, wanted) in [
                    (NBD_CMD_READ, NBD_EINVAL),
                    (NBD_CMD_TRIM, NBD_EINVAL),
                    (NBD_CMD_CACHE, NBD_EINVAL),
                    (NBD_CMD_BLOCK_STATUS, NBD_EINVAL),
                    (NBD_CMD_WRITE_ZEROES, NBD_ENOSPC),
                ] {
                    assert_eq!(client.ask(kind, 0, offset, length).error, wanted, "{kind} {length} at {offset}");
                }
            }
            // The data of a write that is refused is passed over, whatever it looks like.
            for offset in [16 * MIB, 16 * MIB - 1, u64::MAX - 20] {
                let decoy = request_bytes(NBD_CMD_DISC, 0, 0, 0, 0);
                assert_eq!(client.write(0, offset, &decoy), NBD_ENOSPC);
            }
            assert_eq!(client.read(16 * MIB - 1, 1), [0], "nothing was written in part");
            client.expect_alive();
        }
    }

    #[test]
    fn unknown_commands_are_invalid_and_the_connection_goes_on() {
        let room = Room::new();
        let server = memory(&room);
        for mut client in [server.simple(), server.structured()] {
            for kind in [8, 100, u16::MAX] {
                assert_eq!(client.ask(kind, 0, 0, 512).error, NBD_EINVAL);
            }
            client.expect_alive();
        }
    }

    #[test]
    fn flags_that_are_unknown_or_of_another_command_are_invalid() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.structured();
        for (kind, flags) in [
            (NBD_CMD_READ, 0x8000),
            (NBD_CMD_READ, NBD_CMD_FLAG_NO_HOLE),
            (NBD_CMD_READ, NBD_CMD_FLAG_REQ_ONE),
            (NBD_CMD_READ, NBD_CMD_FLAG_FAST_ZERO),
            (NBD_CMD_TRIM, NBD_CMD_FLAG_NO_HOLE),
            (NBD_CMD_TRIM, NBD_CMD_FLAG_FAST_ZERO),
            (NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_DF),
            (NBD_CMD_WRITE_ZEROES, 0x100),
            (NBD_CMD_CACHE, NBD_CMD_FLAG_REQ_ONE),
            (NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_DF),
        ] {
            assert_eq!(client.ask(kind, flags, 0, 512).error, NBD_EINVAL, "command {kind} with flags {flags:#x}");
        }
        for flags in [0x8000, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_NO_HOLE] {
            assert_eq!(client.write(flags, 0, &[0xff; 512]), NBD_EINVAL, "write with flags {flags:#x}");
        }
        assert_eq!(client.read(0, 512), [0; 512], "nothing was written");
        let mut simple = server.simple();
        assert_eq!(simple.ask(NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 512).error, NBD_EINVAL);
        simple.expect_alive();
    }

    /// `-r`: "The export will be readonly."
    #[test]
    fn a_readonly_export_permits_no_change_and_the_connection_goes_on() {
        let room = Room::new();
        let server = room.serve(["-r", "memory", "1M"]);
        let mut client = server.structured();
        assert_ne!(client.export.flags & NBD_FLAG_READ_ONLY, 0);
        let decoy = request_bytes(NBD_CMD_DISC, 0, 0, 0, 0);
        assert_eq!(client.write(0, 0, &decoy), NBD_EPERM);
        assert_eq!(client.ask(NBD_CMD_TRIM, 0, 0, 512).error, NBD_EPERM);
        assert_eq!(client.ask(NBD_CMD_WRITE_ZEROES, 0, 0, 512).error, NBD_EPERM);
        assert_eq!(client.read(0, 28), [0; 28]);
        assert_eq!(client.blocks(0, 0, 1 << 20), [(1 << 20, HOLE_AND_ZERO)]);
    }

    #[test]
    fn requests_of_64_mib_are_served() {
        let room = Room::new();
        let server = room.serve(["memory", "100M"]);
        let mut client = server.simple();
        let data = pattern(64 << 20, 7);
        assert_eq!(client.write(0, 1, &data), NBD_SUCCESS);
        assert!(client.read(1, 64 << 20) == data, "what was written is read");
        let mut client = server.structured();
        assert!(client.read(1, 64 << 20) == data, "what was written is read");
    }

    #[test]
    fn a_read_that_is_too_large_is_an_error_and_the_connection_goes_on() {
        let room = Room::new();
        let server = room.serve(["memory", "100M"]);
        for mut client in [server.simple(), server.structured()] {
            for flags in [0, if client.export.flags & NBD_FLAG_SEND_DF != 0 { NBD_CMD_FLAG_DF } else { 0 }] {
                let error = client.ask(NBD_CMD_READ, flags, 0, (64 << 20) + 1).error;
                assert!([NBD_ENOMEM, NBD_EINVAL, NBD_EOVERFLOW].contains(&error), "{error}");
            }
            client.expect_alive();
        }
    }

    /// "The server [...] MAY initiate a hard disconnect if a payload length [...] would be deemed a denial of service"
    #[test]
    fn a_write_that_is_too_large_changes_nothing_and_harms_nobody_else() {
        let room = Room::new();
        let server = room.serve(["memory", "100M"]);
        let mut client = server.simple();
        let header = client.prepare(NBD_CMD_WRITE, 0, 0, (64 << 20) + 1);
        let mut socket = client.socket.try_clone().expect("a descriptor");
        let writer = thread::spawn(move || {
            // Fails where the server has hung up.
            let _ = socket.write_all(&header);
            let _ = socket.write_all(&vec![0xff; (64 << 20) + 1]);
        });
        let answer = client.next_reply();
        writer.join().expect("the writer does not panic");
        if let Some(reply) = answer {
            assert!([NBD_ENOMEM, NBD_EINVAL, NBD_EOVERFLOW, NBD_ENOSPC].contains(&reply.error), "{reply:?}");
            client.expect_alive();
        }
        assert_eq!(server.simple().read(0, 4096), [0; 4096]);
    }

    /// "The client SHOULD NOT request a length of 0; [...] the server SHOULD NOT disconnect"; nbdkit refuses it, and libnbd's
    /// tests/errors-server-zerosize.c wants that.
    #[test]
    fn requests_of_no_length_are_out_of_range_and_the_connection_goes_on() {
        let room = Room::new();
        let server = memory(&room);
        for mut client in [server.simple(), server.structured()] {
            for (kind, error) in [
                (NBD_CMD_READ, NBD_EINVAL),
                (NBD_CMD_WRITE, NBD_ENOSPC),
                (NBD_CMD_TRIM, NBD_EINVAL),
                (NBD_CMD_CACHE, NBD_EINVAL),
                (NBD_CMD_WRITE_ZEROES, NBD_ENOSPC),
            ] {
                for offset in [0, 4096] {
                    assert_eq!(client.ask(kind, 0, offset, 0).error, error, "command {kind}");
                }
            }
            client.expect_alive();
        }
    }

    #[test]
    fn a_flush_with_offset_or_length_is_invalid() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.simple();
        assert_eq!(client.ask(NBD_CMD_FLUSH, 0, 512, 0).error, NBD_EINVAL);
        assert_eq!(client.ask(NBD_CMD_FLUSH, 0, 0, 512).error, NBD_EINVAL);
        client.expect_alive();
    }

    #[test]
    fn a_wrong_request_magic_ends_this_connection_only() {
        let room = Room::new();
        let server = memory(&room);
        let mut other = server.simple();
        let mut client = server.simple();
        client.send(&[0x55; 28]);
        client.expect_end();
        other.expect_alive();
    }

    /// "The server MUST handle all outstanding requests" before it closes the connection.
    #[test]
    fn a_disconnect_comes_after_the_replies_to_what_was_asked_before() {
        if nbdkit_differs("some of its threads have seen the disconnect, and answer NBD_ESHUTDOWN to what came before")
        {
            return;
        }
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.simple();
        for number in 0..50 {
            client.request(NBD_CMD_WRITE, 0, number * 4096, 4096, &pattern(4096, number));
        }
        client.send(&request_bytes(NBD_CMD_DISC, 0, 99, 0, 0));
        while let Some(reply) = client.next_reply() {
            assert_eq!(reply.error, NBD_SUCCESS);
        }
        assert_eq!(client.unanswered(), 0);
        let mut client = server.simple();
        (0..50).for_each(|number| assert_eq!(client.read(number * 4096, 4096), pattern(4096, number)));
    }

    #[test]
    fn thousands_of_pipelined_requests_are_answered_once_each() {
        let room = Room::new();
        let server = memory(&room);
        for mut client in [server.simple(), server.structured()] {
            const SLOTS: u64 = 512;
            const BLOCK: u64 = 4096;
            let slots: Vec<Vec<u8>> = (0..SLOTS).map(|slot| pattern(BLOCK as usize, slot + 100)).collect();
            slots.iter().enumerate().for_each(|(slot, data)| {
                assert_eq!(client.write(0, slot as u64 * BLOCK, data), NBD_SUCCESS);
            });
            let mut expected = std::collections::HashMap::new();
            let mut bytes = Vec::new();
            for number in 0..8000_u64 {
                let slot = number.wrapping_mul(2_654_435_761) % SLOTS;
                let header = match number % 5 {
                    // Written again with what is there, so that the order does not matter.
                    0 => client.prepare(NBD_CMD_WRITE, 0, slot * BLOCK, BLOCK),
                    1 => client.prepare(NBD_CMD_FLUSH, 0, 0, 0),
                    2 => client.prepare(NBD_CMD_READ, 0, 1 << 40, 512),
                    _ => client.prepare(NBD_CMD_READ, 0, slot * BLOCK, BLOCK),
                };
                let cookie = u64::from_be_bytes(header[8..16].try_into().expect("eight bytes"));
                bytes.extend(header);
                if number % 5 == 0 {
                    bytes.extend(&slots[slot as usize]);
                }
                expected.insert(cookie, (number % 5, slot as usize));
            }
            let mut socket = client.socket.try_clone().expect("a descriptor");
            let writer = thread::spawn(move || socket.write_all(&bytes));
            while !expected.is_empty() {
                let reply = client.next_reply().expect("all are answered");
                match expected.remove(&reply.cookie).expect("each is answered once") {
                    (2, _) => assert_eq!(reply.error, NBD_EINVAL),
                    (3 | 4, slot) => assert!(reply.data == slots[slot], "the data of slot {slot}"),
                    _ => assert_eq!(reply.error, NBD_SUCCESS),
                }
            }
            writer.join().expect("the writer does not panic").expect("the server reads all");
        }
    }
}

mod streams {
    use super::*;

    nix::ioctl_read_bad!(
        /// `SIOCOUTQ`: memory of the peer's receive queue that holds what was sent; 0 when the peer has read all.
        unread_by_peer,
        nix::libc::TIOCOUTQ,
        nix::libc::c_int
    );

    /// Sends one byte at a time, each only after the server has taken the one before.
    fn send_byte_by_byte(client: &mut Client, bytes: &[u8]) {
        for byte in bytes {
            client.send(&[*byte]);
            wait_for("the server to take a byte", || {
                let mut unread = 0;
                // SAFETY: the descriptor is open and `unread` is an int.
                unsafe { unread_by_peer(client.socket.as_raw_fd(), &mut unread) }.expect("the socket knows SIOCOUTQ");
                (unread == 0).then_some(())
            });
        }
    }

    #[test]
    fn a_session_may_arrive_one_byte_at_a_time() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        client.greeting();
        send_byte_by_byte(&mut client, &3_u32.to_be_bytes());
        send_byte_by_byte(&mut client, &option_bytes(0x4242, b"data"));
        assert_eq!(client.option_replies(0x4242), (vec![], NBD_REP_ERR_UNSUP));
        send_byte_by_byte(&mut client, &option_bytes(NBD_OPT_GO, &info_bytes(b"name", &[])));
        assert_eq!(client.option_replies(NBD_OPT_GO).1, NBD_REP_ACK);
        let write = client.prepare(NBD_CMD_WRITE, 0, 4096, 40);
        send_byte_by_byte(&mut client, &[&write[..], &pattern(40, 8)].concat());
        assert_eq!(client.next_reply().map(|reply| reply.error), Some(NBD_SUCCESS));
        let refused = client.prepare(NBD_CMD_WRITE, 0, 1 << 40, 40);
        send_byte_by_byte(&mut client, &[&refused[..], &[0; 40]].concat());
        assert_eq!(client.next_reply().map(|reply| reply.error), Some(NBD_ENOSPC));
        let read = client.prepare(NBD_CMD_READ, 0, 4096, 40);
        send_byte_by_byte(&mut client, &read);
        assert_eq!(client.next_reply().map(|reply| reply.data), Some(pattern(40, 8)));
    }

    #[test]
    fn a_whole_session_may_arrive_at_once() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = server.connect();
        let data = pattern(5000, 9);
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        bytes.extend(option_bytes(NBD_OPT_INFO, &info_bytes(b"", &[])));
        bytes.extend(option_bytes(NBD_OPT_GO, &info_bytes(b"", &[])));
        bytes.extend(client.prepare(NBD_CMD_WRITE, 0, 4096, 5000));
        bytes.extend(&data);
        bytes.extend(client.prepare(NBD_CMD_FLUSH, 0, 0, 0));
        bytes.extend(request_bytes(NBD_CMD_DISC, 0, 0, 0, 0));
        client.send(&bytes);
        client.greeting();
        assert_eq!(client.option_replies(NBD_OPT_INFO).1, NBD_REP_ACK);
        assert_eq!(client.option_replies(NBD_OPT_GO).1, NBD_REP_ACK);
        while client.unanswered() > 0 {
            assert_eq!(client.next_reply().map(|reply| reply.error), Some(NBD_SUCCESS));
        }
        client.expect_end();
        assert_eq!(server.simple().read(4096, 5000), data);
    }

    #[test]
    fn a_client_that_stops_in_the_middle_does_not_hold_up_others() {
        let room = Room::new();
        let server = memory(&room);
        let mut in_handshake = server.connect();
        in_handshake.start();
        in_handshake.send(&option_bytes(NBD_OPT_GO, &info_bytes(b"name", &[]))[..20]);
        let mut in_payload = server.simple();
        let header = in_payload.prepare(NBD_CMD_WRITE, 0, 0, 65536);
        in_payload.send(&[&header[..], &[0xff; 1000]].concat());
        let mut does_not_read = server.simple();
        for _ in 0..64 {
            does_not_read.request(NBD_CMD_READ, 0, 0, 1 << 20, b"");
        }
        for _ in 0..20 {
            let mut client = server.structured();
            assert_eq!(client.write(0, 8 * MIB, b"others"), NBD_SUCCESS);
            assert_eq!(client.read(8 * MIB, 6), b"others");
        }
        drop(in_payload);
        assert_eq!(server.simple().read(0, 1000), [0; 1000], "half a write is no write");
    }

    /// `NBD_FLAG_CAN_MULTI_CONN`
    #[test]
    fn clients_at_the_same_time_see_each_others_writes() {
        let room = Room::new();
        let server = memory(&room);
        thread::scope(|scope| {
            for number in 0..8_u64 {
                let server = &server;
                scope.spawn(move || {
                    let (mut writer, mut reader) = (server.simple(), server.structured());
                    for round in 0..100 {
                        let offset = number * 2 * MIB + round * 7919;
                        let data = pattern(5000, number << 32 | round);
                        assert_eq!(writer.write(0, offset, &data), NBD_SUCCESS);
                        assert_eq!(reader.read(offset, 5000), data);
                    }
                });
            }
        });
    }
}

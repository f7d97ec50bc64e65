//! The handshakes before fixed newstyle: oldstyle, which is 152 bytes from the server and nothing from the client, and
//! newstyle without the fixed bit, in which `NBD_OPT_EXPORT_NAME` is the only option. Source: NBD proto.md.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::thread;

use super::harness::{Room, Server, is_nbdkit, nbdkit_differs, wait_for};
use super::protocol::pattern;
use super::raw_client::*;

const MIB: u64 = 1 << 20;

fn oldstyle(room: &Room, arguments: &[&str]) -> Server {
    room.serve([&["-o"], arguments].concat())
}

/// A client in transmission.
fn client(server: &Server) -> Client {
    let mut client = server.connect();
    client.oldstyle();
    client
}

mod handshake {
    use super::*;

    #[test]
    fn the_handshake_is_152_bytes_from_the_server() {
        let room = Room::new();
        let server = oldstyle(&room, &["memory", "16M"]);
        let mut client = server.connect();
        let bytes = client.receive(152);
        assert_eq!(&bytes[..8], b"NBDMAGIC");
        assert_eq!(bytes[8..16], [0x00, 0x00, 0x42, 0x02, 0x81, 0x86, 0x12, 0x53]);
        assert_eq!(bytes[16..24], (16 * MIB).to_be_bytes());
        assert_eq!(bytes[24..26], [0, 0], "there are no handshake flags in oldstyle");
        assert_ne!(u16::from_be_bytes([bytes[26], bytes[27]]) & NBD_FLAG_HAS_FLAGS, 0);
        assert_eq!(bytes[28..], [0; 124]);
        // And nothing more: what comes next is the reply to the first request.
        client.expect_alive();
        client.disconnect();
    }

    #[test]
    fn all_three_names_of_the_option_mean_oldstyle() {
        for name in ["-o", "--oldstyle", "--old-style"] {
            let room = Room::new();
            let server = room.serve([name, "memory", "1M"]);
            client(&server).expect_alive();
        }
    }

    #[test]
    fn newstyle_is_what_is_spoken_otherwise() {
        for name in ["-n", "--newstyle", "--new-style"] {
            let room = Room::new();
            let server = room.serve([name, "memory", "1M"]);
            server.simple().expect_alive();
        }
    }

    #[test]
    fn sizes_have_64_bits() {
        let room = Room::new();
        let server = oldstyle(&room, &["null", "8191P"]);
        let mut client = client(&server);
        assert_eq!(client.export.size, 8191 << 50);
        assert_eq!(client.read((8191 << 50) - 512, 512), [0; 512]);
        assert_eq!(client.ask(NBD_CMD_READ, 0, 8191 << 50, 1).error, NBD_EINVAL);
    }

    /// The flags of an export are those of a newstyle client with simple replies.
    #[test]
    fn flags_are_as_for_a_newstyle_client_with_simple_replies() {
        for arguments in [&["memory", "1M"][..], &["-r", "memory", "1M"], &["null", "1M"]] {
            let (old, new) = (Room::new(), Room::new());
            let flags = client(&oldstyle(&old, arguments)).export.flags;
            assert_eq!(flags, new.serve(arguments).simple().export.flags, "{arguments:?}");
            assert_eq!(flags & (NBD_FLAG_SEND_DF | NBD_FLAG_BLOCK_STATUS_PAYLOAD), 0, "{flags:#x}");
        }
    }

    /// Options that take newstyle features away have nothing to take away here.
    #[test]
    fn newstyle_restrictions_change_nothing() {
        if nbdkit_differs("1.32 has no --no-mc") {
            return;
        }
        let room = Room::new();
        let server = oldstyle(&room, &["--no-sr", "--no-mc", "--mask-handshake=0", "memory", "1M"]);
        client(&server).expect_alive();
    }

    /// A newstyle client sees the wrong magic; if it goes on all the same, what it says is no request.
    #[test]
    fn a_newstyle_client_is_ended() {
        let room = Room::new();
        let server = oldstyle(&room, &["memory", "1M"]);
        let mut newstyle = server.connect();
        newstyle.oldstyle();
        newstyle.send(&[&3_u32.to_be_bytes()[..], &option_bytes(NBD_OPT_GO, &info_bytes(b"name", &[]))].concat());
        newstyle.expect_end();
        client(&server).expect_alive();
    }

    #[test]
    fn clients_that_leave_at_once_do_no_harm() {
        let room = Room::new();
        let server = oldstyle(&room, &["memory", "1M"]);
        for length in [0, 1, 8, 151, 152] {
            for _ in 0..20 {
                server.connect().receive(length);
            }
        }
        client(&server).expect_alive();
        server.terminate().expect(0);
    }
}

mod requests {
    use super::*;

    #[test]
    fn every_command_has_a_simple_reply() {
        if nbdkit_differs(
            "it announces what it can do, and then can only read and write (1.32, and the source of 1.45)",
        ) {
            return;
        }
        let room = Room::new();
        let server = oldstyle(&room, &["memory", "16M"]);
        let mut client = client(&server);
        let data = pattern(100_000, 1);
        assert_eq!(client.write(NBD_CMD_FLAG_FUA, 12_345, &data), NBD_SUCCESS);
        assert_eq!(client.read(12_345, 100_000), data);
        assert_eq!(client.ask(NBD_CMD_FLUSH, 0, 0, 0).error, NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_CACHE, 0, 0, MIB).error, NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_TRIM, 0, MIB, MIB).error, NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE, 0, MIB).error, NBD_SUCCESS);
        assert_eq!(client.read(0, 2 * MIB), vec![0; 2 * MIB as usize]);
        client.disconnect();
    }

    #[test]
    fn what_needs_an_option_is_invalid_and_the_connection_goes_on() {
        let room = Room::new();
        let server = oldstyle(&room, &["memory", "16M"]);
        let mut client = client(&server);
        assert_eq!(client.ask(NBD_CMD_BLOCK_STATUS, 0, 0, 4096).error, NBD_EINVAL);
        assert_eq!(client.ask(NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 4096).error, NBD_EINVAL);
        assert_eq!(client.ask(NBD_CMD_READ, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 4096).error, NBD_EINVAL);
        assert_eq!(client.ask(100, 0, 0, 4096).error, NBD_EINVAL);
        client.expect_alive();
    }

    #[test]
    fn errors_are_as_in_newstyle() {
        if nbdkit_differs("1.32 aborts when a client writes to what it may only read") {
            return;
        }
        let room = Room::new();
        let server = oldstyle(&room, &["-r", "memory", "16M"]);
        let mut client = client(&server);
        let decoy = request_bytes(NBD_CMD_DISC, 0, 0, 0, 0);
        assert_eq!(client.write(0, 0, &decoy), NBD_EPERM);
        assert_eq!(client.ask(NBD_CMD_TRIM, 0, 0, 512).error, NBD_EPERM);
        assert_eq!(client.ask(NBD_CMD_READ, 0, 16 * MIB - 1, 2).error, NBD_EINVAL);
        assert_eq!(client.ask(NBD_CMD_READ, 0, u64::MAX, 512).error, NBD_EINVAL);
        client.expect_alive();
        client.send(&extended_request_bytes(NBD_CMD_READ, 0, 1, 0, 512));
        client.expect_end();
    }

    #[test]
    fn a_client_may_send_before_it_reads_the_handshake() {
        let room = Room::new();
        let server = oldstyle(&room, &["memory", "16M"]);
        let mut client = server.connect();
        for number in 0..50 {
            client.request(NBD_CMD_WRITE, 0, number * 4096, 4096, &pattern(4096, number));
        }
        client.send(&request_bytes(NBD_CMD_DISC, 0, 99, 0, 0));
        client.oldstyle();
        while let Some(reply) = client.next_reply() {
            assert!(reply.error == NBD_SUCCESS || is_nbdkit(), "{reply:?}");
        }
        assert!(client.unanswered() == 0 || is_nbdkit());
    }

    #[test]
    fn clients_at_the_same_time_see_each_others_writes() {
        let room = Room::new();
        let server = oldstyle(&room, &["memory", "16M"]);
        thread::scope(|scope| {
            for number in 0..8_u64 {
                let server = &server;
                scope.spawn(move || {
                    let (mut writer, mut reader) = (client(server), client(server));
                    for round in 0..50 {
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

mod programs {
    use super::*;

    #[test]
    fn a_command_is_served_in_oldstyle() {
        let room = Room::new();
        let output = room.captive(["-o", "memory", "3M"], r#"nbdinfo "$uri""#).run_to(0);
        assert!(output.text().contains("protocol: oldstyle"), "{output:?}");
        assert!(output.text().contains("3145728"), "{output:?}");
        room.assert_nothing_left();
    }

    #[test]
    fn qemu_and_libnbd_copy_through_an_oldstyle_server() {
        let room = Room::new();
        let data = pattern(3 * MIB as usize, 2);
        room.write("in", &data);
        let command = r#"qemu-img convert -n -f raw -O raw in "$uri" && nbdcopy "$uri" out"#;
        room.captive(["-o", "memory", "3M"], command).run_to(0);
        assert!(std::fs::read(room.path("out")).expect("the copy is there") == data);
    }

    /// `exitlast`: one client has been served, and it has left.
    #[test]
    fn an_oldstyle_client_is_one_that_exitlast_counts() {
        let room = Room::new();
        let mut server = oldstyle(&room, &["--filter=exitlast", "memory", "1M"]);
        // The harness's own look whether the server listens may have ended it already.
        wait_for("the server to end", || {
            if let Ok(mut socket) = UnixStream::connect(&server.socket) {
                let _ = socket.read_exact(&mut [0; 152]);
            }
            server.running.has_ended().then_some(())
        });
        server.running.finish().expect(0);
    }

    #[test]
    fn one_client_on_stdin_is_served_in_oldstyle() {
        let room = Room::new();
        let read = request_bytes(NBD_CMD_READ, 0, 7, 0, 4);
        let leave = request_bytes(NBD_CMD_DISC, 0, 8, 0, 0);
        let requests = room.write("requests", [read, leave].concat());
        let mut server = room.server(["-s", "-o", "memory", "3M"]);
        server.stdin(File::open(requests).expect("it was just made"));
        let output = server.run_to(0);
        let (handshake, reply) = output.stdout.split_at(152);
        assert_eq!(handshake[16..24], (3 * MIB).to_be_bytes());
        assert_eq!(reply, b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x07\0\0\0\0");
        room.wait_until_nothing_left();
    }
}

/// `--mask-handshake` takes bits of the handshake flags away: 1 is `NBD_FLAG_FIXED_NEWSTYLE`, 2 `NBD_FLAG_NO_ZEROES`.
mod masked {
    use super::*;

    fn masked(room: &Room, mask: &str) -> Server {
        room.serve(["--mask-handshake", mask, "memory", "16M"])
    }

    #[test]
    fn export_name_works_without_the_fixed_bit() {
        let room = Room::new();
        let server = masked(&room, "0");
        let mut client = server.connect();
        assert_eq!(client.greeting(), 0);
        client.send(&[0; 4]);
        client.send_option(NBD_OPT_EXPORT_NAME, b"any name");
        let reply = client.receive(134);
        assert_eq!(reply[..8], (16 * MIB).to_be_bytes());
        assert_eq!(reply[10..], [0; 124]);
        client.expect_alive();
        client.disconnect();
    }

    #[test]
    fn zeroes_are_left_out_with_or_without_the_fixed_bit() {
        let room = Room::new();
        let server = masked(&room, "2");
        let mut client = server.connect();
        client.start_with(NBD_FLAG_NO_ZEROES);
        client.send_option(NBD_OPT_EXPORT_NAME, b"");
        assert_eq!(client.receive(10)[..8], (16 * MIB).to_be_bytes());
        client.expect_alive();
    }

    #[test]
    fn zeroes_are_sent_where_leaving_them_out_was_not_offered() {
        let room = Room::new();
        let server = masked(&room, "1");
        let mut client = server.connect();
        client.start_with(NBD_FLAG_FIXED_NEWSTYLE);
        client.send_option(NBD_OPT_EXPORT_NAME, b"");
        assert_eq!(client.receive(134)[10..], [0; 124]);
        client.expect_alive();
    }

    /// "the server MUST drop the TCP connection if the client sets an unknown flag, or a flag that does not match something
    /// advertised by the server"
    #[test]
    fn flags_that_were_masked_end_the_connection() {
        for (mask, flags) in [("0", 1_u32), ("0", 2), ("0", 3), ("1", 2), ("1", 3), ("2", 1), ("2", 3), ("3", 4)] {
            let room = Room::new();
            let server = masked(&room, mask);
            let mut client = server.connect();
            let mask: u16 = mask.parse().expect("a number");
            assert_eq!(client.greeting(), mask);
            client.send(&flags.to_be_bytes());
            client.expect_end();
        }
    }

    /// "This is the only valid option in nonfixed newstyle negotiation."
    #[test]
    fn no_other_option_works_without_the_fixed_bit() {
        for mask in ["0", "2"] {
            let room = Room::new();
            let server = masked(&room, mask);
            for (option, data) in [
                (NBD_OPT_GO, info_bytes(b"", &[])),
                (NBD_OPT_INFO, info_bytes(b"", &[])),
                (NBD_OPT_LIST, vec![]),
                (NBD_OPT_STRUCTURED_REPLY, vec![]),
                (NBD_OPT_EXTENDED_HEADERS, vec![]),
                (NBD_OPT_STARTTLS, vec![]),
                (0x4242, vec![]),
            ] {
                let mut client = server.connect();
                client.greeting();
                client.send(&[0; 4]);
                client.send_option(option, &data);
                // A client that does not know option replies can only be hung up on; one that does gets an error at most.
                if let Some(reply) = client.option_reply_or_end(option) {
                    assert!(reply.kind >= 1 << 31, "option {option} with mask {mask}: {reply:?}");
                }
            }
        }
    }

    /// The same where the client does not say that it knows the fixed form, although the server does: "Servers MAY choose to
    /// honour fixed newstyle from clients that didn't set this bit".
    #[test]
    fn a_client_that_is_not_fixed_gets_what_it_asks_for_by_name() {
        let room = Room::new();
        let server = masked(&room, "3");
        let mut client = server.connect();
        assert_eq!(client.greeting(), 3);
        client.send(&[0; 4]);
        client.send_option(NBD_OPT_EXPORT_NAME, b"");
        assert_eq!(client.receive(134)[..8], (16 * MIB).to_be_bytes());
        client.expect_alive();
    }

    #[test]
    fn qemu_and_libnbd_use_a_server_without_the_fixed_bit() {
        let room = Room::new();
        let command = r#"nbdinfo "$uri" && qemu-img info --output=json "$uri""#;
        let output = room.captive(["--mask-handshake=0", "memory", "3M"], command).run_to(0);
        assert!(output.text().contains("protocol: newstyle "), "{output:?}");
        assert!(output.text().contains("\"virtual-size\": 3145728"), "{output:?}");
    }
}

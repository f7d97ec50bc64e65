//! How much of anything a client may send before it gets an error or the door: option data, options, names, queries, time,
//! connections, payloads. Source: NBD proto.md, which allows an end where "a client's behaviour constitutes a denial of
//! service"; the numbers are those of docs/protocol.md.

use std::io::{ErrorKind, Read, Write};
use std::thread;

use super::harness::{Room, Server, nbdkit_differs, wait_for};
use super::pressure::{forget_peak, is_idle, peak};
use super::protocol::pattern;
use super::raw_client::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// The longest data that an option is answered by what it says rather than by what it is.
const MAX_OPTION: usize = 64 << 10;
/// The longest data that is passed over.
const MAX_SKIPPED: usize = 64 << 20;
/// How many options a client has to choose an export.
const MAX_OPTIONS: usize = 32;
/// How many queries one option may have.
const MAX_QUERIES: usize = 1024;
/// What the server as a whole may take beside what it holds for clients, as in `pressure.rs`.
const FIXED: u64 = 8 * MIB;

fn memory(room: &Room) -> Server {
    room.serve(["memory", "16M"])
}

/// A client that has negotiated nothing yet.
fn started(server: &Server) -> Client {
    let mut client = server.connect();
    client.start();
    client
}

/// Sends an option of this many bytes, which hold nothing but other options, as far as the server reads it.
fn send_long_option(client: &mut Client, option: u32, length: usize) -> thread::JoinHandle<()> {
    let mut bytes = option_bytes(option, &[]);
    bytes[12..].copy_from_slice(&(length as u32).to_be_bytes());
    let decoy = option_bytes(NBD_OPT_ABORT, b"");
    bytes.extend(decoy.iter().copied().cycle().take(length));
    let mut socket = client.socket.try_clone().expect("a descriptor");
    // Fails where the server hangs up.
    thread::spawn(move || drop(socket.write_all(&bytes)))
}

mod option_data {
    use super::*;

    #[test]
    fn options_of_64_kib_are_read() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = started(&server);
        client.expect_refused(0x4242, &[0xff; MAX_OPTION], NBD_REP_ERR_UNSUP);
        if nbdkit_differs("it takes 16 KiB") {
            return;
        }
        let requests: Vec<u16> = (0..(MAX_OPTION - 6) as u16 / 2).collect();
        assert_eq!(info_bytes(b"", &requests).len(), MAX_OPTION);
        let export = client.info(NBD_OPT_GO, b"", &requests).expect("the export is there");
        assert_eq!(export.size, 16 * MIB);
        client.expect_alive();
    }

    #[test]
    fn longer_options_are_too_big_and_passed_over() {
        if nbdkit_differs("it ends the connection") {
            return;
        }
        let room = Room::new();
        let server = memory(&room);
        let mut client = started(&server);
        client.ask_for_structured_replies();
        for option in [NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_SET_META_CONTEXT, NBD_OPT_LIST_META_CONTEXT, 0x4242] {
            for length in [MAX_OPTION + 1, 1 << 20] {
                let writer = send_long_option(&mut client, option, length);
                let (replies, last) = client.option_replies(option);
                assert!(replies.is_empty(), "{replies:?}");
                let is_unknown = option == 0x4242 && last == NBD_REP_ERR_UNSUP;
                assert!(last == NBD_REP_ERR_TOO_BIG || is_unknown, "option {option} of {length} bytes: {last:#x}");
                writer.join().expect("the writer does not panic");
            }
        }
        client.go(b"");
        client.expect_alive();
    }

    /// These have no data, so that any is invalid; of how much of it there is, a server may complain too.
    #[test]
    fn options_that_have_no_data_refuse_any_amount() {
        if nbdkit_differs("it ends the connection") {
            return;
        }
        let room = Room::new();
        let server = memory(&room);
        let mut client = started(&server);
        for option in [NBD_OPT_LIST, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY, NBD_OPT_EXTENDED_HEADERS] {
            let writer = send_long_option(&mut client, option, MAX_OPTION + 1);
            let (_, last) = client.option_replies(option);
            assert!([NBD_REP_ERR_TOO_BIG, NBD_REP_ERR_INVALID].contains(&last), "option {option}: {last:#x}");
            writer.join().expect("the writer does not panic");
        }
        client.go(b"");
        assert_eq!(client.headers, Headers::Simple);
        client.expect_alive();
    }

    #[test]
    fn what_is_passed_over_may_be_64_mib() {
        if nbdkit_differs("it ends the connection") {
            return;
        }
        let room = Room::new();
        let server = memory(&room);
        let mut client = started(&server);
        let before = forget_peak(&server);
        let writer = send_long_option(&mut client, NBD_OPT_INFO, MAX_SKIPPED);
        assert_eq!(client.option_replies(NBD_OPT_INFO), (vec![], NBD_REP_ERR_TOO_BIG));
        writer.join().expect("the writer does not panic");
        client.go(b"");
        client.expect_alive();
        let grown = peak(&server).saturating_sub(before);
        assert!(grown <= FIXED, "what is passed over is not kept: {} KiB", grown / KIB);
    }

    #[test]
    fn more_than_64_mib_ends_the_connection() {
        let room = Room::new();
        let server = memory(&room);
        for option in [NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_LIST, NBD_OPT_EXPORT_NAME, 0x4242] {
            for length in [MAX_SKIPPED as u32 + 1, u32::MAX] {
                let mut client = started(&server);
                let mut header = option_bytes(option, &[]);
                header[12..].copy_from_slice(&length.to_be_bytes());
                client.send(&header);
                // It may say so; what it does not do is wait for all that.
                while client.reads_on() {}
            }
        }
        server.simple().expect_alive();
    }

    /// "MUST be no longer than 4096 bytes"
    #[test]
    fn names_and_queries_may_be_4096_bytes_long() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = started(&server);
        client.ask_for_structured_replies();
        let (name, long) = ([b'n'; NBD_MAX_STRING], [b'n'; NBD_MAX_STRING + 1]);
        for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
            client.expect_refused(option, &context_bytes(&long, &[b"base:allocation"]), NBD_REP_ERR_INVALID);
            let (replies, last) = client.option(option, &context_bytes(&name, &[b"base:allocation"]));
            assert_eq!((replies.len(), last), (1, NBD_REP_ACK));
            let query = [b"x-long:", &name[7..]].concat();
            assert_eq!(client.option(option, &context_bytes(b"", &[&query])), (vec![], NBD_REP_ACK));
            let query = [b"x-long:", &long[7..]].concat();
            client.expect_refused(option, &context_bytes(b"", &[&query]), NBD_REP_ERR_INVALID);
        }
        client.expect_refused(NBD_OPT_GO, &info_bytes(&long, &[]), NBD_REP_ERR_INVALID);
        client.go(&name);
        client.expect_alive();
        // Here there is no way to say what is wrong.
        let mut client = started(&server);
        client.send_option(NBD_OPT_EXPORT_NAME, &long);
        client.expect_end();
        let mut client = started(&server);
        client.send_option(NBD_OPT_EXPORT_NAME, &name);
        assert_eq!(client.receive(10)[..8], (16 * MIB).to_be_bytes());
        client.expect_alive();
    }

    #[test]
    fn a_meta_context_option_has_up_to_1024_queries() {
        if nbdkit_differs("it has no such limit, and repeats its answer") {
            return;
        }
        let room = Room::new();
        let server = memory(&room);
        let mut client = started(&server);
        client.ask_for_structured_replies();
        let queries = |count: usize| vec![&b"base:allocation"[..]; count];
        for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
            let (replies, last) = client.option(option, &context_bytes(b"", &queries(MAX_QUERIES)));
            assert_eq!((replies.len(), last), (1, NBD_REP_ACK), "a context is named once");
            client.expect_refused(option, &context_bytes(b"", &queries(MAX_QUERIES + 1)), NBD_REP_ERR_TOO_BIG);
            // As many as fit into an option.
            let most = vec![&b""[..]; (MAX_OPTION - 8) / 4];
            client.expect_refused(option, &context_bytes(b"", &most), NBD_REP_ERR_TOO_BIG);
            let mut no_such_number = context_bytes(b"", &[]);
            no_such_number[4..].copy_from_slice(&u32::MAX.to_be_bytes());
            let (_, last) = client.option(option, &no_such_number);
            assert!([NBD_REP_ERR_INVALID, NBD_REP_ERR_TOO_BIG].contains(&last), "{last:#x}");
        }
        client.ask_for_base_allocation(b"");
        client.go(b"");
        assert_eq!(client.blocks(0, 0, MIB).len(), 1);
    }

    /// "Issuing this command replaces all previously-set metadata contexts (including when this command fails)"
    #[test]
    fn a_meta_context_option_that_fails_leaves_no_context() {
        if nbdkit_differs("it keeps the contexts, and has no limits") {
            return;
        }
        let room = Room::new();
        let server = memory(&room);
        let failures = [
            context_bytes(b"", &[])[..6].to_vec(),
            context_bytes(&[b'n'; NBD_MAX_STRING + 1], &[b"base:allocation"]),
            context_bytes(b"", &vec![&b"base:"[..]; MAX_QUERIES + 1]),
            vec![0; MAX_OPTION + 1],
        ];
        for failure in failures {
            let mut client = started(&server);
            client.ask_for_structured_replies();
            client.ask_for_base_allocation(b"");
            let (_, last) = client.option(NBD_OPT_SET_META_CONTEXT, &failure);
            assert!([NBD_REP_ERR_INVALID, NBD_REP_ERR_TOO_BIG].contains(&last), "{last:#x}");
            client.contexts.clear();
            client.go(b"");
            let error = client.ask(NBD_CMD_BLOCK_STATUS, 0, 0, 4096).error;
            assert_eq!(error, NBD_EINVAL, "after {} bytes", failure.len());
        }
    }
}

mod options {
    use super::*;

    #[test]
    fn a_client_may_choose_with_its_32nd_option() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = started(&server);
        for _ in 1..MAX_OPTIONS {
            client.expect_refused(0x4242, b"", NBD_REP_ERR_UNSUP);
        }
        client.go(b"");
        client.expect_alive();
    }

    #[test]
    fn a_client_that_has_not_chosen_after_32_options_is_ended() {
        let room = Room::new();
        let server = memory(&room);
        let info = info_bytes(b"name", &[NBD_INFO_NAME]);
        for (option, data) in
            [(0x4242, &b"data"[..]), (NBD_OPT_INFO, &info), (NBD_OPT_GO, b"bad"), (NBD_OPT_STARTTLS, b"")]
        {
            let mut client = started(&server);
            for _ in 0..MAX_OPTIONS {
                client.option(option, data);
            }
            // It may be ended before it sends one more.
            let _ = client.socket.write_all(&option_bytes(NBD_OPT_GO, &info_bytes(b"", &[])));
            client.expect_end();
        }
        server.simple().expect_alive();
    }

    /// Who lists the exports may want to ask about each.
    #[test]
    fn a_list_is_worth_32_options_for_each_export_once() {
        let room = Room::new();
        let server = memory(&room);
        let mut client = started(&server);
        assert_eq!(client.option(NBD_OPT_LIST, b"").1, NBD_REP_ACK);
        for _ in 0..MAX_OPTIONS + 20 {
            assert!(client.info(NBD_OPT_INFO, b"", &[]).is_ok());
        }
        client.go(b"");
        client.expect_alive();
        // The second list is worth nothing, and so on.
        let mut client = started(&server);
        let mut answered = 0;
        while let Some(reply) = {
            // Fails where the server has hung up.
            let _ = client.socket.write_all(&option_bytes(NBD_OPT_LIST, b""));
            client.option_reply_or_end(NBD_OPT_LIST)
        } {
            if reply.kind == NBD_REP_SERVER {
                assert_eq!(client.option_reply(NBD_OPT_LIST).kind, NBD_REP_ACK);
            }
            answered += 1;
            assert!(answered <= 2 * MAX_OPTIONS + 2, "{answered} lists were answered");
        }
        assert!(answered >= MAX_OPTIONS, "{answered} lists were answered");
    }
}

mod time {
    use super::*;

    /// `--timeout`: from the connection to the choice of an export; a client that has chosen stays as long as it likes.
    #[test]
    fn a_client_that_does_not_choose_in_time_is_ended_and_others_are_not() {
        if nbdkit_differs("1.32 has no --timeout") {
            return;
        }
        let room = Room::new();
        let server = room.serve(["--timeout=5", "memory", "16M"]);
        // All at once, so that only a server that is stopped for that long could be late.
        let mut chosen = server.connect();
        let go = option_bytes(NBD_OPT_GO, &info_bytes(b"", &[]));
        chosen.send(&[&3_u32.to_be_bytes()[..], &go].concat());
        chosen.greeting();
        assert_eq!(chosen.option_replies(NBD_OPT_GO).1, NBD_REP_ACK);
        let handshake = [&3_u32.to_be_bytes()[..], &option_bytes(0x4242, b"data"), &go].concat();
        let mut late: Vec<Client> = Vec::new();
        for length in [0, 2, 4, 12, 20, 22, 24, 30, handshake.len() - 1] {
            let mut client = server.connect();
            client.send(&handshake[..length]);
            late.push(client);
        }
        for mut client in late {
            while client.reads_on() {}
        }
        chosen.expect_alive();
    }

    /// What a client sends meanwhile gives it no more time.
    #[test]
    fn a_client_that_sends_a_byte_now_and_then_is_ended_all_the_same() {
        if nbdkit_differs("1.32 has no --timeout") {
            return;
        }
        let room = Room::new();
        let server = room.serve(["--timeout=1", "memory", "16M"]);
        let mut client = server.connect();
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        bytes.extend(option_bytes(NBD_OPT_INFO, &info_bytes(&[b'n'; 4096], &[])));
        client.socket.set_nonblocking(true).expect("a socket can be non-blocking");
        let mut bytes = bytes.into_iter();
        let mut next = std::time::Instant::now();
        wait_for("the server to lose patience", || {
            if next.elapsed().as_millis() >= 20 {
                next = std::time::Instant::now();
                let byte = bytes.next().expect("it is ended long before");
                if let Err(error) = client.socket.write_all(&[byte]) {
                    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
                    return Some(());
                }
            }
            match client.socket.read(&mut [0; 64]) {
                Ok(0) => Some(()),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => Some(()),
                _ => None,
            }
        });
    }
}

mod clients {
    use super::*;

    /// A client that is let in, or nothing where the connection is closed before the greeting.
    fn admitted(server: &Server) -> Option<Client> {
        let mut client = server.connect();
        let mut first = [0];
        match client.socket.read(&mut first) {
            Ok(1) => {
                let rest = client.receive(17);
                assert_eq!([&first[..], &rest[..7]].concat(), b"NBDMAGIC");
                client.send(&(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES).to_be_bytes());
                client.go(b"");
                Some(client)
            }
            Ok(_) => None,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
            Err(error) => panic!("a client is let in or closed at once: {error}"),
        }
    }

    /// The harness was a client too, for a moment.
    fn wait_to_be_admitted(server: &Server) -> Client {
        wait_for("the server to let a client in", || admitted(server))
    }

    #[test]
    fn one_client_too_many_is_closed_and_the_next_is_served_when_one_has_left() {
        if nbdkit_differs("it has no such option") {
            return;
        }
        let room = Room::new();
        let server = room.serve(["--max-clients=3", "memory", "16M"]);
        let mut inside: Vec<Client> = (0..3).map(|_| wait_to_be_admitted(&server)).collect();
        let before = server.running.stderr();
        for _ in 0..20 {
            assert!(admitted(&server).is_none(), "a fourth client");
        }
        inside.iter_mut().for_each(Client::expect_alive);
        wait_for("a line in the log", || {
            let said = server.running.stderr().split_off(before.len());
            said.lines().any(|line| line.contains("client")).then_some(())
        });
        // Whether it says goodbye or is just gone.
        for is_orderly in [true, false] {
            let leaving = inside.remove(0);
            if is_orderly {
                leaving.disconnect();
            } else {
                drop(leaving);
            }
            inside.push(wait_to_be_admitted(&server));
            assert!(admitted(&server).is_none(), "a fourth client");
        }
        inside.iter_mut().for_each(Client::expect_alive);
        drop(inside);
        server.terminate().expect(0);
    }

    /// Who has not chosen an export yet is a client as well; `--timeout` is there for those that never do.
    #[test]
    fn clients_that_negotiate_count_too() {
        if nbdkit_differs("it has no such option") {
            return;
        }
        let room = Room::new();
        let server = room.serve(["--max-clients=1", "--timeout=5", "memory", "16M"]);
        drop(wait_to_be_admitted(&server));
        let silent = wait_for("the server to greet", || {
            let mut client = server.connect();
            (client.socket.read(&mut [0]).ok() == Some(1)).then_some(client)
        });
        // It stays until its time is up, and then there is room for others.
        wait_to_be_admitted(&server).expect_alive();
        drop(silent);
    }
}

mod hostile {
    use super::*;

    /// What one client that negotiates and does not read may cost: the data of one option and the replies to it.
    const NEGOTIATION: u64 = 256 * KIB;
    /// What one client in transmission may cost: `MAX_OWED`, as in `pressure.rs`.
    const OWED: u64 = 16 * MIB;
    /// More than any server takes from a client that does not read, and less than what would be passed over.
    const TOO_MUCH: usize = 48 << 20;

    /// Sends the message again and again without reading, until the server has hung up or takes no more.
    fn flood(server: &Server, clients: &mut [Client], message: &[u8]) {
        let mut sent = vec![0; clients.len()];
        let mut push = || {
            let before = sent.clone();
            for (client, sent) in clients.iter_mut().zip(&mut sent) {
                client.socket.set_nonblocking(true).expect("a socket can be non-blocking");
                // An error is that there is no room, or that the server has hung up.
                while let Ok(count) = client.socket.write(&message[*sent % message.len()..]) {
                    *sent += count;
                    assert!(*sent < TOO_MUCH, "the server takes whatever it is sent");
                }
            }
            sent != before
        };
        wait_for("the server to take no more", || (!push() && is_idle(server) && !push()).then_some(()));
    }

    #[test]
    fn clients_that_negotiate_and_never_read_cost_little() {
        const CLIENTS: u64 = 16;
        if nbdkit_differs("it has a thread for each") {
            return;
        }
        let room = Room::new();
        let server = memory(&room);
        let mut other = server.structured();
        let name = [b'n'; NBD_MAX_STRING];
        let queries = vec![&b"base:allocation"[..]; MAX_QUERIES];
        let infos = [NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE];
        for (what, message) in [
            ("LIST", option_bytes(NBD_OPT_LIST, b"")),
            ("LIST_META_CONTEXT", option_bytes(NBD_OPT_LIST_META_CONTEXT, &context_bytes(&name, &queries))),
            ("SET_META_CONTEXT", option_bytes(NBD_OPT_SET_META_CONTEXT, &context_bytes(&name, &queries))),
            ("INFO", option_bytes(NBD_OPT_INFO, &info_bytes(&name, &infos))),
            ("an unknown option", option_bytes(0x4242, &[0xff; MAX_OPTION])),
            ("a long option", option_bytes(NBD_OPT_INFO, &[0xff; 2 * MAX_OPTION])),
        ] {
            let mut clients: Vec<Client> = (0..CLIENTS).map(|_| started(&server)).collect();
            clients.iter_mut().for_each(Client::ask_for_structured_replies);
            let before = forget_peak(&server);
            flood(&server, &mut clients, &message);
            let grown = peak(&server).saturating_sub(before);
            eprintln!("{what}: {} KiB", grown / KIB);
            assert!(grown <= CLIENTS * NEGOTIATION + FIXED, "{what}: {grown} bytes for {CLIENTS} clients");
            other.expect_alive();
        }
        server.terminate().expect(0);
    }

    #[test]
    fn clients_with_extended_headers_that_never_read_cost_no_more_than_others() {
        const CLIENTS: u64 = 3;
        const STRIPE: u64 = 32 * KIB;
        if nbdkit_differs("it has no extended headers") {
            return;
        }
        let room = Room::new();
        let server = room.serve(["memory", "64M"]);
        let mut other = server.extended();
        for stripe in (0..64 * MIB / STRIPE).step_by(2) {
            assert_eq!(other.write(0, stripe * STRIPE, &[0xff; STRIPE as usize]), NBD_SUCCESS);
        }
        let id = other.base_allocation();
        let status = [&(64 * MIB).to_be_bytes()[..], &id.to_be_bytes()].concat();
        let request = |kind, offset, length| extended_request_bytes(kind, 0, 1, offset, length).to_vec();
        let with_payload = |kind, payload: &[u8]| {
            let header = extended_request_bytes(kind, NBD_CMD_FLAG_PAYLOAD_LEN, 1, 0, payload.len() as u64);
            [&header[..], payload].concat()
        };
        for (what, message, payload) in [
            ("block status", request(NBD_CMD_BLOCK_STATUS, 0, 64 * MIB), 0),
            ("block status with payload", with_payload(NBD_CMD_BLOCK_STATUS, &status), 0),
            ("reads with holes", request(NBD_CMD_READ, 0, 4 * MIB), 4 * MIB),
            ("reads past the end", request(NBD_CMD_READ, 64 * MIB, 4 * MIB), 0),
            ("useless payloads", with_payload(NBD_CMD_TRIM, &[0; 4096]), 4096),
        ] {
            let mut clients: Vec<Client> = (0..CLIENTS).map(|_| server.extended()).collect();
            let before = forget_peak(&server);
            flood(&server, &mut clients, &message);
            let grown = peak(&server).saturating_sub(before);
            eprintln!("{what}: {} KiB", grown / KIB);
            let bound = CLIENTS * (OWED + payload) + FIXED;
            assert!(grown <= bound, "{what}: {grown} bytes for {CLIENTS} clients");
            assert_eq!(other.read(0, 4096), [0xff; 4096]);
        }
        server.terminate().expect(0);
    }

    /// A payload that is passed over is not collected first.
    #[test]
    fn half_a_payload_that_is_useless_is_not_kept() {
        const CLIENTS: u64 = 4;
        if nbdkit_differs("it has no extended headers") {
            return;
        }
        let room = Room::new();
        let server = memory(&room);
        let mut other = server.extended();
        for kind in [NBD_CMD_TRIM, NBD_CMD_READ, NBD_CMD_BLOCK_STATUS, 100] {
            let mut clients: Vec<Client> = (0..CLIENTS).map(|_| server.extended()).collect();
            let before = forget_peak(&server);
            for client in &mut clients {
                client.send(&extended_request_bytes(kind, NBD_CMD_FLAG_PAYLOAD_LEN, 1, 0, MAX_PAYLOAD));
                client.send(&vec![0xff; MAX_PAYLOAD as usize - 1]);
            }
            wait_for("the server to be idle", || is_idle(&server).then_some(()));
            let grown = peak(&server).saturating_sub(before);
            eprintln!("command {kind}: {} KiB", grown / KIB);
            assert!(grown <= FIXED, "command {kind}: {grown} bytes");
            other.expect_alive();
        }
    }

    /// Names that are as long as they may be, in as many sessions as a test can have.
    #[test]
    fn two_hundred_half_open_clients_cost_what_they_sent() {
        const CLIENTS: u64 = 200;
        if nbdkit_differs("it has a thread for each") {
            return;
        }
        let room = Room::new();
        let server = memory(&room);
        let before = forget_peak(&server);
        let half = option_bytes(NBD_OPT_INFO, &pattern(MAX_OPTION, 1));
        let clients: Vec<Client> = (0..CLIENTS)
            .map(|_| {
                let mut client = started(&server);
                client.send(&half[..half.len() - 1]);
                client
            })
            .collect();
        wait_for("the server to be idle", || is_idle(&server).then_some(()));
        let grown = peak(&server).saturating_sub(before);
        eprintln!("{} KiB", grown / KIB);
        assert!(grown <= CLIENTS * NEGOTIATION + FIXED, "{grown} bytes for {CLIENTS} clients");
        server.simple().expect_alive();
        drop(clients);
    }
}

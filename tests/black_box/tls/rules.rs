//! What the protocol says of `NBD_OPT_STARTTLS`. Source: NBD proto.md "TLS support".

use std::time::Instant;

use nix::sys::signal::Signal;

use super::gate::{Gate, s_client, starttls, through};
use super::pki::Pki;
use super::{KINDS, Kind, Room, serve, wait_for_word};
use crate::harness::DEADLINE;
use crate::raw_client::*;

#[test]
fn with_require_nothing_but_tls_and_abort_is_done_before_and_no_name_is_told() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let server = serve(
        &room,
        &pki,
        Kind::Certificates,
        &[
            "--tls=require",
            "--filter=exportname",
            "memory",
            "1M",
            "exportname=secret-name",
            "default-export=secret-name",
            "exportdesc=fixed:secret-name",
        ],
    );
    let mut client = server.connect();
    client.start();
    let named = info_bytes(b"", &[NBD_INFO_NAME, NBD_INFO_DESCRIPTION]);
    let contexts = context_bytes(b"", &[b"base:allocation"]);
    for (option, data) in [
        (NBD_OPT_LIST, &b""[..]),
        (NBD_OPT_INFO, &named),
        (NBD_OPT_GO, &named),
        (NBD_OPT_STRUCTURED_REPLY, b""),
        (NBD_OPT_EXTENDED_HEADERS, b""),
        (NBD_OPT_LIST_META_CONTEXT, &contexts),
        (NBD_OPT_SET_META_CONTEXT, &contexts),
        (0x4242, b""),
    ] {
        client.send_option(option, data);
        let reply = client.option_reply(option);
        assert_eq!(reply.kind, NBD_REP_ERR_TLS_REQD, "option {option}");
        assert!(!String::from_utf8_lossy(&reply.data).contains("secret"), "{reply:?}");
    }
    assert_eq!(client.option(NBD_OPT_ABORT, b""), (vec![], NBD_REP_ACK));
    client.expect_end();
    // There is no reply to this one.
    let mut client = server.connect();
    client.start();
    client.send_option(NBD_OPT_EXPORT_NAME, b"secret-name");
    client.expect_end();
    wait_for_word(&server, "non-TLS client tried to connect in --tls=require mode");
    server.terminate().expect(0);
}

#[test]
fn with_on_a_client_may_do_without() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=on", "memory", "1M"]);
        server.simple().expect_alive();
        server.terminate().expect(0);
    }
}

#[test]
fn tls_begins_once() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=require", "memory", "1M"]);
        let gate = Gate::open(&server.socket);
        let (mut client, _running) = through(s_client(&room, &gate, &pki, kind, &[]));
        client.expect_refused(NBD_OPT_STARTTLS, b"", NBD_REP_ERR_INVALID);
        client.go(b"");
        client.expect_alive();
        server.terminate().expect(0);
    }
}

#[test]
fn starttls_with_data_is_invalid_and_changes_nothing() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let server = serve(&room, &pki, Kind::Certificates, &["--tls=on", "memory", "1M"]);
    let mut client = server.connect();
    client.start();
    client.expect_refused(NBD_OPT_STARTTLS, b"x", NBD_REP_ERR_INVALID);
    client.go(b"");
    client.expect_alive();
}

/// "the client and server MUST ... discard any data that was negotiated before": or whoever was in between then has a say.
#[test]
fn what_was_agreed_on_before_tls_is_forgotten() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let server = serve(&room, &pki, Kind::Certificates, &["--tls=on", "memory", "1M"]);
    let mut plain = server.connect();
    plain.start();
    plain.ask_for_structured_replies();
    plain.ask_for_base_allocation(b"");
    let gate = Gate::behind(plain);
    let (mut client, _running) = through(s_client(&room, &gate, &pki, Kind::Certificates, &[]));
    // Structured replies would have to be asked for again.
    client.expect_refused(NBD_OPT_SET_META_CONTEXT, &context_bytes(b"", &[b"base:allocation"]), NBD_REP_ERR_INVALID);
    client.go(b"");
    assert_eq!(client.read(0, 16), [0; 16], "a simple reply");
    assert_eq!(client.ask(NBD_CMD_BLOCK_STATUS, 0, 0, 512).error, NBD_EINVAL);
    server.terminate().expect(0);
}

/// What somebody in between put behind the option would count as the client's.
#[test]
fn plain_bytes_behind_starttls_end_the_connection() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=on", "memory", "1M"]);
        let mut client = server.connect();
        client.start();
        let both = [option_bytes(NBD_OPT_STARTTLS, b""), option_bytes(NBD_OPT_LIST, b"")].concat();
        client.send(&both);
        client.expect_end();
        wait_for_word(&server, "plain bytes came behind NBD_OPT_STARTTLS");
        server.simple().expect_alive();
        server.terminate().expect(0);
    }
}

#[test]
fn a_stream_that_is_cut_off_is_a_lost_connection_and_a_goodbye_is_none() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    const LOST: &str = "connection lost: the TLS connection ended without a word";
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=require", "memory", "1M"]);
        let gate = Gate::open(&server.socket);
        let (mut client, running) = through(s_client(&room, &gate, &pki, kind, &[]));
        client.go(b"");
        client.expect_alive();
        running.signal(Signal::SIGKILL);
        wait_for_word(&server, LOST);
        drop(running.finish());

        let (mut client, running) = through(s_client(&room, &gate, &pki, kind, &["-no_ign_eof"]));
        client.go(b"");
        client.expect_alive();
        // It ends at the end of its input, and says so.
        drop(client);
        drop(running.finish());
        wait_for_word(&server, "client disconnected");
        let output = server.terminate().expect(0);
        assert_eq!(output.stderr.matches(LOST).count(), 1, "{output:#?}");
    }
}

#[test]
fn a_client_that_stalls_in_the_handshake_is_dropped_by_timeout_and_delays_no_end() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=require", "--timeout=1", "memory", "1M"]);
        let start = Instant::now();
        let mut stalled = starttls(&server.socket);
        // Half a record.
        stalled.send(&[22, 3, 1, 1, 0, 1]);
        stalled.expect_end();
        assert!(start.elapsed() < DEADLINE);
        wait_for_word(&server, "the handshake took longer than --timeout allows");
        server.terminate().expect(0);

        let server = serve(&room, &pki, kind, &["--tls=require", "--drain-timeout=600", "memory", "1M"]);
        let _stalled: Vec<_> = (0..20).map(|_| starttls(&server.socket)).collect();
        server.terminate().expect(0);
    }
}

/// One handshake after another on one thread would let them wait for each other.
#[test]
fn clients_that_stall_in_the_handshake_keep_nobody_out() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=require", "memory", "1M"]);
        let _stalled: Vec<_> = (0..100).map(|_| starttls(&server.socket)).collect();
        room.tool("nbdinfo", ["--size", &pki.uri(kind, &server.socket)]).run_to(0);
        server.terminate().expect(0);
    }
}

#[test]
fn garbage_instead_of_a_handshake_ends_the_connection() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=require", "memory", "1M"]);
        for garbage in [
            &option_bytes(NBD_OPT_GO, b"")[..],
            &[0; 64],
            &[22, 3, 1, 255, 255, 1, 0],
            b"\x16\x03\x01\x00\x05\x01\xff\xff\xff\xff",
        ] {
            let mut client = starttls(&server.socket);
            client.send(garbage);
            let _ = client.socket.shutdown(std::net::Shutdown::Write);
            let mut rest = Vec::new();
            // An alert, perhaps, and then the end.
            let _ = std::io::Read::read_to_end(&mut client.socket, &mut rest);
            assert!(rest.len() < 64, "{rest:?}");
        }
        let output = server.terminate().expect(0);
        assert!(output.stderr.contains("TLS handshake: "), "{output:#?}");
        assert!(!output.stderr.contains("panicked"), "{output:#?}");
    }
}

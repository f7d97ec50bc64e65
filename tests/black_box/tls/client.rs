//! This program as the client: `--probe` and the `nbd` plugin.

use std::fs;

use super::pki::{EXPIRED, Pki};
use super::{KINDS, Kind, Room, serve};
use crate::harness::{free_port, program_name, wait_for};

#[test]
fn probe_speaks_tls_to_this_server_and_to_nbdkit() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let probe = crate::harness::server_path();
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=require", "--tls-verify-peer", "memory", "1M"]);
        let uri = pki.uri(kind, &server.socket);
        let output = room.server(["--probe", &uri, "--json"]).run_to(0);
        assert!(output.text().contains("\"TLS\": true") && output.text().contains("1048576"), "{output:#?}");
        server.terminate().expect(0);
        let (option, at) =
            (pki.option(kind), pki.uri(kind, std::path::Path::new("SOCKET")).replace("SOCKET", "'$unixsocket'"));
        let command = format!("'{}' --probe '{at}'", probe.display());
        let output =
            room.nbdkit_captive(["--tls=require", "--tls-verify-peer", &option, "memory", "1M"], command).run_to(0);
        assert!(output.text().starts_with("protocol: newstyle-fixed with TLS"), "{output:#?}");
    }
}

/// The chain of the manual page: plain clients of a proxy whose server is secure.
#[test]
fn the_nbd_plugin_serves_what_a_secure_server_has() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let image: Vec<u8> = (0..3_000_000u32).map(|at| ((at * 7) >> 3).to_le_bytes()[0]).collect();
    room.write("image", &image);
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=require", "memory", "3000000"]);
        let socket = format!("socket={}", server.socket.display());
        let mut arguments = vec!["nbd".to_owned(), socket.clone(), "tls=require".to_owned()];
        arguments.extend(pki.parameters(kind));
        room.captive(&arguments, "nbdcopy image \"$uri\" && nbdcopy \"$uri\" out").run_to(0);
        assert!(fs::read(room.path("out")).expect("it was copied") == image);
        // By a URI; and where it is not said, as soon as there is a parameter of TLS.
        room.captive(["nbd", &pki.uri(kind, &server.socket)], "nbdinfo --size \"$uri\"").run_to(0);
        let mut arguments = vec!["nbd".to_owned(), socket.clone()];
        arguments.extend(pki.parameters(kind));
        room.captive(&arguments, "nbdinfo --size \"$uri\"").run_to(0);
        // Without, the server does not want us.
        let output = room.captive(["nbd", &socket], "nbdinfo --size \"$uri\"").run_to(1);
        assert!(output.stderr.contains("the server wants TLS"), "{output:#?}");
        server.terminate().expect(0);
    }
}

#[test]
fn on_goes_without_where_the_server_has_no_tls_and_require_does_not() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let server = room.serve(["--tls=off", "memory", "1M"]);
    let socket = format!("socket={}", server.socket.display());
    for kind in KINDS {
        let with = |mode: &str| {
            let mut arguments = vec!["nbd".to_owned(), socket.clone(), format!("tls={mode}")];
            arguments.extend(pki.parameters(kind));
            arguments
        };
        room.captive(with("on"), "nbdinfo --size \"$uri\"").run_to(0);
        let output = room.captive(with("require"), "nbdinfo --size \"$uri\"").run_to(1);
        assert!(output.stderr.contains("the server refused NBD_OPT_STARTTLS"), "{output:#?}");
    }
}

#[test]
fn a_server_that_is_not_the_right_one_is_refused() {
    let room = Room::new();
    let (pki, other) = (Pki::new(&room, "pki"), Pki::new(&room, "other"));
    let certificates = format!("tls-certificates={}", pki.directory.display());
    let start = || {
        let port = free_port();
        let option = pki.option(Kind::Certificates);
        let running = room.server(["-f", "--tls=require", &option, "-p", &port, "memory", "1M"]).start();
        wait_for("the port", || std::net::TcpStream::connect(("localhost", port.parse().ok()?)).ok());
        (running, port)
    };
    let (running, port) = start();
    let probe = |host: &str, rest: &str, status: i32| {
        let uri = format!("nbds://{host}:{port}/?{rest}");
        let output = room.server(["--probe", &uri]).run_to(status);
        assert_eq!(output.stderr.lines().count(), usize::from(status != 0), "{output:#?}");
        output.stderr.strip_prefix(&format!("{}: {uri}: ", program_name())).unwrap_or_default().to_owned()
    };
    probe("localhost", &certificates, 0);
    let wrong_name = probe("127.0.0.1", &certificates, 1);
    assert!(wrong_name.contains("certificate not valid for name \"127.0.0.1\""), "{wrong_name}");
    probe("127.0.0.1", &format!("{certificates}&tls-hostname=localhost"), 0);
    probe("127.0.0.1", &format!("{certificates}&tls-verify-peer=0"), 0);
    let other = format!("tls-certificates={}", other.directory.display());
    assert!(probe("localhost", &other, 1).contains("invalid peer certificate: UnknownIssuer"));
    drop(running);
    pki.server(&room, EXPIRED);
    let (_running, port) = start();
    let uri = format!("nbds://localhost:{port}/?{certificates}");
    let output = room.server(["--probe", &uri]).run_to(1);
    assert!(output.stderr.contains("invalid peer certificate: certificate expired"), "{output:#?}");
}

#[test]
fn a_user_that_the_file_of_keys_does_not_have_is_said() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let server = serve(&room, &pki, Kind::Keys, &["--tls=require", "memory", "1M"]);
    let uri = pki.uri(Kind::Keys, &server.socket).replace("alice", "mallory");
    let output = room.server(["--probe", &uri]).run_to(1);
    assert!(output.stderr.contains("keys.psk: user mallory is not in it"), "{output:#?}");
}

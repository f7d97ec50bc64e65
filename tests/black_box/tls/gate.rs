//! The plain beginning of NBD for clients that know only TLS, and a raw client behind such a client.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;

use super::pki::{Pki, USER};
use super::{Kind, Launch, Room};
use crate::harness::Running;
use crate::raw_client::{Client, NBD_OPT_STARTTLS, NBD_REP_ACK};

/// A client that has been told that TLS may begin.
pub fn starttls(server: &Path) -> Client {
    let mut client = Client::connect(server);
    client.start();
    assert_eq!(client.option(NBD_OPT_STARTTLS, b""), (vec![], NBD_REP_ACK));
    client
}

/// A TCP port on which TLS is spoken at once: each connection is the server's, from behind `NBD_OPT_STARTTLS`.
pub struct Gate {
    pub port: u16,
}

impl Gate {
    pub fn open(server: &Path) -> Gate {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on loopback");
        let port = listener.local_addr().expect("it is bound").port();
        let server: PathBuf = server.to_owned();
        // Ends with the test program: nobody connects any more by then.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let plain = starttls(&server).socket;
                join(client, plain);
            }
        });
        Gate { port }
    }
}

impl Gate {
    /// For one connection, which goes on where this client is.
    pub fn behind(mut plain: Client) -> Gate {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on loopback");
        let port = listener.local_addr().expect("it is bound").port();
        thread::spawn(move || {
            let (client, _) = listener.accept().expect("somebody comes");
            assert_eq!(plain.option(NBD_OPT_STARTTLS, b""), (vec![], NBD_REP_ACK));
            join(client, plain.socket);
        });
        Gate { port }
    }
}

/// Carries bytes between the two until both have ended.
fn join(client: TcpStream, server: UnixStream) {
    let (client_in, server_in) = (client.try_clone().expect("a descriptor"), server.try_clone().expect("a descriptor"));
    server.set_read_timeout(None).expect("no timeout is one");
    thread::spawn(move || {
        carry(client_in, &server);
        let _ = server.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        carry(server_in, &client);
        let _ = client.shutdown(Shutdown::Write);
    });
}

fn carry(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
}

/// openssl s_client at a gate, with what it needs to be let in.
pub fn s_client(room: &Room, gate: &Gate, pki: &Pki, kind: Kind, more: &[&str]) -> Launch {
    let mut launch = room.tool("openssl", ["s_client", "-quiet", "-connect", &format!("localhost:{}", gate.port)]);
    match kind {
        Kind::Certificates => {
            let (ca, certificate, key) =
                (pki.file("ca-cert.pem"), pki.file("client-cert.pem"), pki.file("client-key.pem"));
            launch.args(["-CAfile", &ca, "-verify_return_error", "-verify_hostname", "localhost"]);
            launch.args(["-cert", &certificate, "-key", &key]);
        }
        Kind::Keys => {
            launch.args(["-psk_identity", USER, "-psk", &pki.secret(USER)]);
        }
    }
    launch.args(more);
    launch
}

/// gnutls-cli at a gate, with what it needs to be let in.
pub fn gnutls_cli(room: &Room, gate: &Gate, pki: &Pki, kind: Kind, versions: &str) -> Launch {
    let mut launch = room.tool("gnutls-cli", ["--port", &gate.port.to_string(), "--logfile", "/dev/null"]);
    match kind {
        Kind::Certificates => {
            launch.args(["--x509cafile", &pki.file("ca-cert.pem"), "--priority", &format!("NORMAL{versions}")]);
            launch.args(["--x509certfile", &pki.file("client-cert.pem"), "--x509keyfile", &pki.file("client-key.pem")]);
        }
        Kind::Keys => {
            let priority = format!("NORMAL:+ECDHE-PSK:+DHE-PSK:+PSK{versions}");
            launch.args(["--pskusername", USER, "--pskkey", &pki.secret(USER), "--priority", &priority]);
        }
    }
    launch.args(["localhost"]);
    launch
}

/// A raw client whose bytes a TLS client carries, from its stdin and to its stdout.
pub fn through(mut launch: Launch) -> (Client, Running) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let copy = File::from(OwnedFd::from(theirs.try_clone().expect("a descriptor")));
    launch.stdin(File::from(OwnedFd::from(theirs))).stdout(Stdio::from(copy));
    let running = launch.start();
    // What the launch still holds of the socket goes with it, so that its end is seen.
    drop(launch);
    (Client::over(ours), running)
}

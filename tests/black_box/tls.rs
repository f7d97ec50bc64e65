//! TLS: the protocol's rules, real peers with certificates and with pre-shared keys, and those who must not get in.
//!
//! - `pki.rs`: authorities, certificates, revocation lists and keys, made by certtool, openssl and psktool
//! - `gate.rs`: the plain beginning of NBD for clients that know only TLS, and a raw client behind such a client
//! - `rules.rs`: what the protocol says of `NBD_OPT_STARTTLS`
//! - `peers.rs`: nbdinfo, nbdcopy, qemu-img, nbd-client, openssl s_client, gnutls-cli
//! - `refused.rs`: who is not let in, and what files are not taken
//! - `client.rs`: this program as the client: `--probe` and the `nbd` plugin

use super::harness::{Launch, Output, Room, Server, wait_for};

#[path = "tls/client.rs"]
mod client;
#[path = "tls/gate.rs"]
mod gate;
#[path = "tls/peers.rs"]
mod peers;
#[path = "tls/pki.rs"]
mod pki;
#[path = "tls/refused.rs"]
mod refused;
#[path = "tls/rules.rs"]
mod rules;

/// How the two ends know each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Certificates,
    Keys,
}

const KINDS: [Kind; 2] = [Kind::Certificates, Kind::Keys];

/// A server with TLS on the socket of the room, with the files of `pki`.
fn serve(room: &Room, pki: &pki::Pki, kind: Kind, arguments: &[&str]) -> Server {
    let mut all = vec!["-v".to_owned(), pki.option(kind)];
    all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    room.serve(all)
}

/// What the server says must come to have this in it. It says so beside what it tells a client, who may know it first.
#[track_caller]
fn wait_for_word(server: &Server, word: &str) {
    wait_for_words(server, word, 1);
}

/// As [`wait_for_word`], so many times.
#[track_caller]
fn wait_for_words(server: &Server, word: &str, times: usize) {
    wait_for(word, || (server.running.stderr().matches(word).count() >= times).then_some(()));
}

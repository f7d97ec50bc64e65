//! Streams that are secure: TLS between the socket and the session, which does not know what kind.
//!
//! | file | what lives in it |
//! |---|---|
//! | `stream.rs` | a [`Transport`] over another, whatever seals and opens its records; the handshake |
//! | `wire.rs` | sealed bytes on their way, in buffers that are given back at rest |
//! | `session.rs` | a connection with certificates: rustls's handshake, then records |
//! | `record_layer.rs` | sealing and opening with the keys that rustls makes |
//! | `certificates.rs` | the server with certificates |
//! | `servers.rs` | the client of servers with certificates |
//! | `names.rs` | what certificates say of who has them; which of them were revoked |
//! | `keys.rs` | files of pre-shared keys |
//! | `psk.rs` | server and client with pre-shared keys: OpenSSL (feature `psk`) |
//!
//! An [`Acceptor`] is all that a session sees: it takes the client's stream and gives another back; a [`Connector`] does the
//! same for a client. Whoever embeds the engine may bring one of their own.

use std::fmt;
use std::io;
use std::pin::Pin;

use crate::transport::Transport;

mod certificates;
mod keys;
mod names;
#[cfg(feature = "psk")]
mod psk;
mod record_layer;
mod servers;
mod session;
mod stream;
mod wire;

pub use certificates::{Certificates, CertificatesError, Part, Pem};
pub use keys::{Keys, KeysError};
#[cfg(feature = "psk")]
pub use psk::{PreSharedKeys, SharedKey};
pub use servers::{Check, ClientPem, ServerCertificates};

/// What makes a client's stream secure: the server's end of a TLS handshake. Shared by all sessions.
pub trait Acceptor: fmt::Debug + Send + Sync {
    /// Does the handshake over `transport`, and gives the stream that is secure, whose [`Transport::security`] says how.
    ///
    /// Errors: the client is not let in, or broke the rules, or left; it has been told so, as far as that needs no waiting.
    /// Dropped before its end, the connection closes.
    fn accept(&self, transport: Box<dyn Transport>) -> Securing;
}

/// The same at the client's end.
pub trait Connector: fmt::Debug + Send + Sync {
    /// Does the handshake over `transport`. Errors: the server is none that is to be trusted, or does not let the client in, or
    /// broke the rules, or left. Dropped before its end, the connection closes.
    fn connect(&self, transport: Box<dyn Transport>) -> Securing;
}

/// A handshake under way.
pub type Securing = Pin<Box<dyn Future<Output = io::Result<Box<dyn Transport>>> + Send>>;

/// What is known of a stream that is secure.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Security {
    /// Version, ciphers and how the two ends know each other, for people. No secret is in it.
    pub summary: String,
    /// Who the other end is by its certificate; `None` where it showed none.
    pub names: Option<Names>,
}

/// The names in a certificate, as RFC 4514 writes them: the most specific first, `CN=client,O=Example`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// Whose certificate it is.
    pub subject: String,
    /// Who signed it.
    pub issuer: String,
}

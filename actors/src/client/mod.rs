//! A client of NBD servers, over any [`Transport`]: for a disk that is another server's, and to look at one.
//!
//! | file | what lives in it |
//! |---|---|
//! | `handshake.rs` | from the greeting to an export: [`Handshake`], [`negotiate`] |
//! | `connection.rs` | the actor that owns the transport once an export is chosen, and [`Requests`], how it is spoken to |
//! | `pending.rs` | which requests wait for which replies, and what a reply may say; without I/O |
//! | `input.rs` | bytes from the server that nobody has looked at |
//!
//! ```text
//!  Requests (many) ──request──> Connection ══transport══> server
//!        ^                          │
//!        └────reply, or why none────┘
//! ```
//!
//! Many requests may be under way, and their replies come in any order. Whatever the server does that the specification
//! forbids ends the connection, and so does its end; every request then fails with what was wrong. Nothing here has a
//! limit of time: drop the future.
//!
//! ```no_run
//! # async fn example(socket: std::os::fd::OwnedFd, executor: &smol::Executor<'static>) -> Result<(), Box<dyn std::error::Error>> {
//! use nbdcaptive_actors::client::{Wishes, negotiate};
//! use nbdcaptive_actors::transport::Socket;
//!
//! let agreed = negotiate(Box::new(Socket::on_reactor(socket)?), &Wishes::export("disk")).await?;
//! let (requests, connection) = agreed.start();
//! let task = executor.spawn(connection.run());
//! let first = requests.read(0, 512).await?;
//! requests.disconnect().await?;
//! task.await?;
//! # Ok(()) }
//! ```

mod connection;
mod handshake;
mod input;
mod pending;

use std::fmt;
use std::io;
use std::sync::Arc;

pub use crate::protocol::client::{Extent, OptionError, Violation};
use crate::protocol::client::{error_code, option_name, reply_name};
use crate::protocol::constants::{ErrorCode, NBD_REP_ERR_TLS_REQD, NBD_REP_ERR_UNSUP};
pub use crate::protocol::transmission::Headers;
use crate::protocol::transmission::command_name;
#[cfg(doc)]
use crate::transport::Transport;
pub use connection::{Connection, Requests};
pub use handshake::{Agreed, Export, Handshake, Listed, MetaContext, Protocol, Wishes, negotiate};
pub use pending::ContextStatus;

/// Why something was not done. Cheap to clone: when a connection ends, all who wait get the same.
#[derive(Clone, Debug)]
pub enum Error {
    /// The server refused an option. The handshake goes on.
    Refused(OptionError),
    /// The request failed. The connection goes on.
    Failed {
        /// `NBD_CMD_*`
        command: u16,
        /// The error as it came, known or not.
        error: u32,
        /// What the server said to it, perhaps nothing.
        text: String,
    },
    /// The request cannot be made of this server, and was not. The connection goes on.
    Impossible {
        /// `NBD_CMD_*`, or nothing for an option.
        command: Option<u16>,
        /// What the server would say to it.
        code: ErrorCode,
        /// Why not.
        why: &'static str,
    },
    /// The server did what the specification forbids. The connection is over.
    Violation(Violation),
    /// The server closed the connection, while it was to do this.
    Ended(&'static str),
    /// The transport failed. The connection is over.
    Transport(Arc<io::Error>),
    /// The connection was ended from this side.
    Closed,
}

impl Error {
    /// The protocol's code for it, for who serves others with what this server has.
    pub fn code(&self) -> ErrorCode {
        match self {
            Error::Failed { error, .. } => error_code(*error),
            Error::Impossible { code, .. } => *code,
            Error::Refused(_) => ErrorCode::Invalid,
            Error::Violation(_) | Error::Ended(_) | Error::Transport(_) | Error::Closed => ErrorCode::Shutdown,
        }
    }

    /// The server does not know the option.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Error::Refused(OptionError { reply: NBD_REP_ERR_UNSUP, .. }))
    }

    /// The server wants TLS first.
    pub fn wants_tls(&self) -> bool {
        matches!(self, Error::Refused(OptionError { reply: NBD_REP_ERR_TLS_REQD, .. }))
    }

    fn impossible(command: u16, code: ErrorCode, why: &'static str) -> Error {
        Error::Impossible { command: Some(command), code, why }
    }

    fn impossible_option(why: &'static str) -> Error {
        Error::Impossible { command: None, code: ErrorCode::Invalid, why }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Whoever reads it knows no names of options.
            Error::Refused(error) if self.wants_tls() => {
                write!(f, "the server wants TLS before {}", option_name(error.option))?;
                says(f, &error.text)
            }
            Error::Refused(OptionError { option, reply, text }) => {
                write!(f, "the server refused {} ({})", option_name(*option), reply_name(*reply))?;
                says(f, text)
            }
            Error::Failed { command, error, text } => {
                write!(f, "{}: {}", command_name(*command), sentence(error_code(*error)))?;
                says(f, text)
            }
            Error::Impossible { command: Some(command), why, .. } => write!(f, "{}: {why}", command_name(*command)),
            Error::Impossible { command: None, why, .. } => f.write_str(why),
            Error::Violation(violation) => write!(f, "the server {violation}"),
            Error::Ended(what) => write!(f, "the server closed the connection {what}"),
            Error::Transport(error) => write!(f, "the connection failed: {error}"),
            Error::Closed => f.write_str("the connection is closed"),
        }
    }
}

fn says(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    if text.is_empty() { Ok(()) } else { write!(f, ": {text}") }
}

/// An error value in words. Source: NBD proto.md "Error values".
fn sentence(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::NotPermitted => "operation not permitted",
        ErrorCode::Io => "input/output error",
        ErrorCode::NoMemory => "cannot allocate memory",
        ErrorCode::Invalid => "invalid argument",
        ErrorCode::NoSpace => "no space left on device",
        ErrorCode::Overflow => "value too large",
        ErrorCode::NotSupported => "operation not supported",
        ErrorCode::Shutdown => "the server is being shut down",
    }
}

impl std::error::Error for Error {}

impl From<Violation> for Error {
    fn from(violation: Violation) -> Error {
        Error::Violation(violation)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Error {
        Error::Transport(Arc::new(error))
    }
}

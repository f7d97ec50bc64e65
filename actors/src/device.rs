//! The one trait that every plugin and filter implements, and what opens a device for a client.
//!
//! A plugin is a [`Device`] that has the data; a filter is a [`Device`] that holds the next one. [`Exports`] makes them:
//! once for each client that asks for an export. The smallest device is a size and a read:
//!
//! ```
//! use nbdcaptive_actors::device::{Call, Device, Result};
//!
//! struct Ones;
//!
//! impl Device for Ones {
//!     fn size(&self) -> Result<u64> {
//!         Ok(1 << 20)
//!     }
//!     fn read(&self, buffer: &mut [u8], _offset: u64, _call: &Call) -> Result<()> {
//!         buffer.fill(1);
//!         Ok(())
//!     }
//! }
//! ```
//!
//! Sources: nbdkit docs/nbdkit-plugin.pod and docs/nbdkit-filter.pod for the operations and their defaults.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

pub use crate::blocks::{BLOCK, Block, Blocks};
pub use crate::connection::{Connection, ConnectionKey, Recall};
pub use crate::extents::{Extents, HOLE, ZERO};
pub use crate::protocol::ErrorCode;
pub use crate::segments::{Segments, Shared};
pub use crate::tls::Names;

/// What every operation of a device returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a device did not do what it was asked.
#[derive(Debug)]
pub enum Error {
    /// The call was [`Call::may_block`]` == false` and this request cannot be answered without waiting.
    /// The Backend makes the same call again on a thread that may wait, so nothing may have happened yet.
    WouldBlock,
    /// The request failed. The client sees `code`; the log, and clients with structured replies, also see `why`.
    Failed {
        /// What the client sees.
        code: ErrorCode,
        /// What a person can act on: what was tried, on what, and what the system said.
        why: Cow<'static, str>,
    },
}

impl Error {
    /// A failure with the protocol's code and a sentence for people.
    pub fn failed(code: ErrorCode, why: impl Into<Cow<'static, str>>) -> Error {
        let why = match why.into() {
            Cow::Owned(why) => without_number(why).into(),
            why => why,
        };
        Error::Failed { code, why }
    }

    /// A failed system call: `what` names the call and its object, the code follows from its errno.
    pub fn system(what: impl fmt::Display, error: impl Into<std::io::Error>) -> Error {
        let error = error.into();
        Error::failed(ErrorCode::from_io(&error), format!("{what}: {error}"))
    }

    /// The operation cannot be done on this device or this range: the caller may have another way.
    pub fn not_supported(what: &'static str) -> Error {
        Error::failed(ErrorCode::NotSupported, what)
    }

    /// What the client is told. `WouldBlock` never reaches a client; if a device returns it although it may block,
    /// that is an input/output error.
    pub fn code(&self) -> ErrorCode {
        match self {
            Error::WouldBlock => ErrorCode::Io,
            Error::Failed { code, .. } => *code,
        }
    }
}

/// What `perror` says of a failed system call. Std puts the number behind it, ` (os error 2)`, and clients show that to people.
fn without_number(mut why: String) -> String {
    let inside = why.strip_suffix(')').and_then(|why| why.rsplit_once(" (os error "));
    let sentence =
        inside.filter(|(_, number)| number.bytes().all(|byte| byte.is_ascii_digit())).map(|(before, _)| before.len());
    why.truncate(sentence.unwrap_or(why.len()));
    why
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::WouldBlock => f.write_str("the device would have to wait"),
            Error::Failed { why, .. } => f.write_str(why),
        }
    }
}

impl std::error::Error for Error {}

/// How one request is being made. Filters pass it on unchanged.
#[derive(Debug)]
pub struct Call {
    may_block: bool,
    is_farewell: bool,
}

impl Call {
    /// A call on a thread of its own, which may take as long as it needs.
    pub const BLOCKING: Call = Call { may_block: true, is_farewell: false };
    /// A call on the executor's thread, which other clients share: answer at once or return [`Error::WouldBlock`].
    pub const AT_ONCE: Call = Call { may_block: false, is_farewell: false };
    /// The flush before a device is closed, where a client has written and has left without one. May block.
    pub const FAREWELL: Call = Call { may_block: true, is_farewell: true };

    /// Whether this call may wait: for a disk, a lock that is held over I/O, another process, a clock.
    pub fn may_block(&self) -> bool {
        self.may_block
    }

    /// Whether no client asked for it ([`Call::FAREWELL`]): what counts, shows or refuses clients' requests lets it pass.
    pub fn is_farewell(&self) -> bool {
        self.is_farewell
    }
}

/// What a write, trim or zero must do beside its work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// `NBD_CMD_FLAG_FUA`: the effect is on stable storage before the call returns.
    /// Set only where [`Capabilities::fua`] is the device's own ([`Support::is_own`]).
    pub fua: bool,
    /// Zero only: the range may become a hole (the client did not send `NBD_CMD_FLAG_NO_HOLE`).
    pub may_trim: bool,
    /// Zero only, `NBD_CMD_FLAG_FAST_ZERO`: fail with [`ErrorCode::NotSupported`] rather than be as slow as a write.
    pub fast: bool,
}

/// Whether a device does something itself, has it done by the Backend in terms of other operations, or not at all.
/// Source: nbdkit `NBDKIT_FUA_*`, `NBDKIT_CACHE_*`, `NBDKIT_ZERO_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Support {
    /// Not offered to the client.
    #[default]
    None,
    /// Offered; the Backend makes it of other calls (FUA: a flush after; cache: a read; zero: writes).
    Emulate,
    /// Offered; the device's own method does it, and does no more than [`Support::Emulate`] says. What passes requests on to a
    /// device that has it done for it says this: it is called as one that does it itself, and who makes many requests of one
    /// knows that it is cheaper done once. The difference is none to a client.
    Emulated,
    /// Offered; the device's own method does it.
    Native,
}

impl Support {
    /// Whether the device's own method is called for it.
    pub fn is_own(self) -> bool {
        matches!(self, Support::Emulated | Support::Native)
    }

    /// Whether it is made of other calls, no matter by whom.
    pub fn is_emulated(self) -> bool {
        matches!(self, Support::Emulate | Support::Emulated)
    }

    /// As it is to those in front of the one that has it done, if that is what is needed.
    pub fn done(self) -> Support {
        if self == Support::Emulate { Support::Emulated } else { self }
    }
}

/// The block sizes of a device, in bytes. Source: NBD proto.md "Block size constraints".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Requests that are not aligned to this are refused. A power of two, 1 to 65536.
    pub minimum: u32,
    /// What performs well. A power of two, at least 512 and at least `minimum`.
    pub preferred: u32,
    /// The most data that one read or write may carry; `u32::MAX` where the device has no limit.
    pub maximum: u32,
}

/// What a device can do, asked once for each client, after it was opened. A filter edits its next device's answer.
/// The default is a read-only device that knows nothing but to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// `write` works. Without it the export is read-only, and none of trim, zero and FUA is offered.
    pub write: bool,
    /// `flush` works.
    pub flush: bool,
    /// `trim` works.
    pub trim: bool,
    /// How zeroes are written. The device's own falls back to writes where `zero` returns [`ErrorCode::NotSupported`].
    pub zero: Support,
    /// `zero` honours [`Flags::fast`]. Offered also where zero is emulated: it then always says "not supported".
    pub fast_zero: bool,
    /// How forced unit access is done.
    pub fua: Support,
    /// A flush on one connection covers what was acknowledged on another, and all see the same data.
    pub multi_conn: bool,
    /// How data is brought near.
    pub cache: Support,
    /// `extents` knows holes. Without it all is data.
    pub extents: bool,
    /// The medium turns (`NBD_FLAG_ROTATIONAL`).
    pub rotational: bool,
    /// Large writes come as [`Device::write_blocks`], for the device to keep the memory. Nothing that a client sees.
    pub takes_blocks: bool,
    /// Block sizes, where the device has any to state.
    pub block_size: Option<BlockSize>,
}

/// A disk, as one client sees it. Opened by [`Exports::open`], dropped after [`Device::close`].
///
/// Calls come from many threads at once, as far as [`Exports::thread_model`] allows. Ranges were checked against `size`
/// before any call, and are never empty. A call is never cancelled: a client that leaves is no reason to stop half way.
///
/// A filter that only forwards `read` is right, only slower: [`Device::read_segments`] then copies.
pub trait Device: Send + Sync {
    /// The size in bytes, at most 2^63 - 1. Asked once for each client. Errors refuse the export.
    fn size(&self) -> Result<u64>;

    /// What the device can do. Asked once for each client, after `size`. Errors refuse the export.
    fn capabilities(&self) -> Result<Capabilities> {
        Ok(Capabilities::default())
    }

    /// Whether calls that must not block ([`Call::AT_ONCE`]) are worth trying. With `false`, the safe default, every call
    /// is made on a thread that may wait, and the device need not look at its `call`. A filter that forwards this must
    /// itself do nothing that waits, and nothing that may not be done twice, in a call that must not block.
    fn answers_at_once(&self) -> bool {
        false
    }

    /// Whether requests come that are not aligned to [`Capabilities::block_size`], or are larger. With `false`, the default, the
    /// server refuses them; a device that says `true` tells clients what would be best and takes what it gets.
    fn takes_any_size(&self) -> bool {
        false
    }

    /// Fills `buffer` with the data at `offset` bytes from the start.
    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()>;

    /// Appends exactly `length` bytes from `offset` to the reply, as memory that the device shares, as zeroes, or by
    /// filling [`Segments::space`]. The default does the last, by `read`. What a failed call has appended is discarded.
    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        self.read(reply.space(length), offset, call)
    }

    /// Writes all of `data` at `offset`. Called only with [`Capabilities::write`].
    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let _ = (data, offset, flags, call);
        Err(Error::failed(ErrorCode::NotPermitted, "the device is read-only"))
    }

    /// Writes all of `data`, a large write, at `offset`. The device may take any block and leave another in its place, with
    /// anything in it, or [`Block::default`]. Called only with [`Capabilities::takes_blocks`]. The default copies and calls [`Device::write`].
    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.write(&data.to_vec(), offset, flags, call)
    }

    /// Puts everything acknowledged so far on stable storage. Called only with [`Capabilities::flush`].
    fn flush(&self, call: &Call) -> Result<()> {
        let _ = call;
        Ok(())
    }

    /// Tells the device that `length` bytes at `offset` are of no more use. Called only with [`Capabilities::trim`].
    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let _ = (length, offset, flags, call);
        Err(Error::not_supported("trim is not supported"))
    }

    /// Makes `length` bytes at `offset` read as zeroes. Called only with zeroes of its own ([`Support::is_own`]).
    /// With [`ErrorCode::NotSupported`] nothing was changed, and the Backend writes zeroes instead (unless
    /// [`Flags::fast`]).
    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let _ = (length, offset, flags, call);
        Err(Error::not_supported("zero is not supported"))
    }

    /// Brings `length` bytes at `offset` near. Called only with a cache of its own ([`Support::is_own`]). The default has all near.
    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        let _ = (length, offset, call);
        Ok(())
    }

    /// Describes the range that `extents` asks for, from its start and without gaps, at least one byte of it.
    /// Called only with [`Capabilities::extents`].
    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        let _ = call;
        extents.add(extents.offset(), extents.length(), 0);
        Ok(())
    }

    /// As [`Device::extents`], for number `context` of [`Exports::meta_contexts`].
    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        let _ = (context, extents, call);
        Err(Error::not_supported("no such metadata context"))
    }

    /// The last call, after every other has returned and after a flush: write back what a layer holds, let go of it.
    /// A filter closes its next device after itself. An error makes the server's exit status 1. May block.
    fn close(&self) -> Result<()> {
        Ok(())
    }
}

/// Which client a device is opened for. Source: nbdkit filter `.open`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Client {
    /// The export name that the client asked for, at most 4096 bytes, UTF-8 by the specification but not checked.
    pub export_name: Vec<u8>,
    /// The server was told to serve read-only (`-r`).
    pub read_only: bool,
    /// The connection is secured by TLS.
    pub is_tls: bool,
    /// Who the client is by the certificate that it showed, if it did. Source: nbdkit_peer_tls_dn(3).
    pub tls_names: Option<Names>,
    /// Who is at the other end, where that is known.
    pub peer: Option<Peer>,
    /// The label (or security context) that a security module has given the other end, where there is one.
    /// Source: nbdkit_peer_security_context(3).
    pub peer_label: Option<Vec<u8>>,
    /// The connection itself: to wait in, to end, to speak of. That of a client that only looks is over before long.
    pub connection: Connection,
}

/// The other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// An address and a port.
    Inet(SocketAddr),
    /// A process on this machine, as it was when it connected; where the system does not tell, a number is `None`.
    Unix {
        /// The process.
        pid: Option<i32>,
        /// Its user.
        uid: Option<u32>,
        /// Its group.
        gid: Option<u32>,
    },
    /// A virtual machine, or its host. Source: vsock(7).
    Vsock {
        /// Which of them: the host is 2.
        cid: u32,
        /// The port that the client connected from.
        port: u32,
    },
}

/// One line of `NBD_OPT_LIST`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The name to ask for.
    pub name: Vec<u8>,
    /// A sentence for people, or empty.
    pub description: String,
}

/// A metadata context of a device's own. Source: NBD proto.md "Metadata querying".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContext {
    /// A namespace, a colon and a leaf name: a namespace that was registered, or one that starts with `x-`.
    pub name: Cow<'static, str>,
    /// Its flags take more than 32 bits, so that it can be selected only by a client with extended headers.
    pub is_wide: bool,
}

/// How many requests a device takes at a time. Source: nbdkit-plugin.pod "Threads".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadModel {
    /// One client at a time.
    SerializeConnections,
    /// Many clients, one request at a time among them all.
    SerializeAllRequests,
    /// One request at a time for each client.
    SerializeRequests,
    /// Anything at any time.
    #[default]
    Parallel,
}

/// Makes devices: what a plugin is once it is configured, and what a filter is round another.
/// Every method may block; none is called on an executor's thread.
pub trait Exports: Send + Sync + 'static {
    /// Opens the export for one client. Errors are the client's (`NBD_REP_ERR_UNKNOWN`), and the server goes on.
    fn open(&self, client: &Client) -> Result<Box<dyn Device>>;

    /// Whether [`Exports::preconnect`] does anything. With `false`, the default, it is not called, which spares a thread.
    fn looks_at_clients(&self) -> bool {
        false
    }

    /// Called for a client that has connected and was told nothing yet; its export name is empty, and TLS is yet to come. An error
    /// closes the connection, and the log says why.
    fn preconnect(&self, client: &Client) -> Result<()> {
        let _ = client;
        Ok(())
    }

    /// What `NBD_OPT_LIST` shows. `client.export_name` is empty. The default is one export, the empty name.
    fn list(&self, client: &Client) -> Result<Vec<Export>> {
        let _ = client;
        Ok(vec![Export { name: Vec::new(), description: String::new() }])
    }

    /// The export that a client gets who asks for the empty name; `None` where there is none.
    fn default_export(&self, client: &Client) -> Result<Option<Vec<u8>>> {
        let _ = client;
        Ok(Some(Vec::new()))
    }

    /// The metadata contexts that an export has beside `base:allocation`; at most 31 of them can be selected. The default has
    /// none.
    fn meta_contexts(&self, client: &Client) -> Result<Vec<MetaContext>> {
        let _ = client;
        Ok(Vec::new())
    }

    /// A sentence about an export that was opened, for `NBD_INFO_DESCRIPTION`.
    fn description(&self, client: &Client) -> Option<String> {
        let _ = client;
        None
    }

    /// How many requests the devices take at a time. Asked once, before the first client.
    fn thread_model(&self) -> ThreadModel {
        ThreadModel::default()
    }

    /// Whether [`Exports::unload`] does anything. With `false` it is not called, which spares a thread at the end.
    fn unloads(&self) -> bool {
        true
    }

    /// The last call of all, after every device was closed; only what was asked for a client in the handshake and does not come
    /// back when it is recalled ([`Connection::recall`]) is not waited for. An error makes the server's exit status 1.
    fn unload(&self) -> Result<()> {
        Ok(())
    }
}

/// One device that all clients share: for devices without a state for each client.
#[derive(Clone, Debug)]
pub struct Same<D>(Arc<D>);

impl<D: Device + 'static> Same<D> {
    /// Serves `device` to every client, whatever export name it asks for.
    pub fn new(device: D) -> Same<D> {
        Same(Arc::new(device))
    }
}

impl<D: Device + 'static> Exports for Same<D> {
    fn unloads(&self) -> bool {
        false
    }

    fn open(&self, _client: &Client) -> Result<Box<dyn Device>> {
        Ok(Box::new(Arc::clone(&self.0)))
    }
}

/// A pointer to a device is that device, so that one can be shared among clients and filters.
impl<D: Device + ?Sized> Device for Arc<D> {
    fn size(&self) -> Result<u64> {
        (**self).size()
    }
    fn capabilities(&self) -> Result<Capabilities> {
        (**self).capabilities()
    }
    fn answers_at_once(&self) -> bool {
        (**self).answers_at_once()
    }
    fn takes_any_size(&self) -> bool {
        (**self).takes_any_size()
    }
    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        (**self).read(buffer, offset, call)
    }
    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        (**self).read_segments(reply, length, offset, call)
    }
    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        (**self).write(data, offset, flags, call)
    }
    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        (**self).write_blocks(data, offset, flags, call)
    }
    fn flush(&self, call: &Call) -> Result<()> {
        (**self).flush(call)
    }
    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        (**self).trim(length, offset, flags, call)
    }
    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        (**self).zero(length, offset, flags, call)
    }
    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        (**self).cache(length, offset, call)
    }
    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        (**self).extents(extents, call)
    }
    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        (**self).meta_context(context, extents, call)
    }
    fn close(&self) -> Result<()> {
        (**self).close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_system_call_is_a_sentence_without_a_number() {
        let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let numbered = || std::io::Error::from_raw_os_error(nix::libc::ENOENT);
        for (error, expected) in [
            (Error::system("open: disk", numbered()), "open: disk: No such file or directory"),
            (Error::system("open: disk", missing()), "open: disk: entity not found"),
            (Error::failed(ErrorCode::Io, format!("nbd: {}", numbered())), "nbd: No such file or directory"),
            (Error::failed(ErrorCode::Io, "a (os error x)".to_owned()), "a (os error x)"),
            (Error::failed(ErrorCode::Io, "disk (1)".to_owned()), "disk (1)"),
            (Error::failed(ErrorCode::Io, String::new()), ""),
        ] {
            assert_eq!(error.to_string(), expected);
        }
    }
}

//! The other end of the protocol: what a client sends, and everything that a server may send to it.
//!
//! Requests and options are encoded here and read by `handshake.rs` and `transmission.rs`; what comes back is parsed with
//! a bound on every length, and what the specification forbids is a [`Violation`] that says what was wrong. What needs to
//! know the request that is answered (ranges, cookies, contexts) is checked by `client/pending.rs`.
//! Source: NBD doc/proto.md.

use std::fmt;

use super::Reader;
use super::constants::*;
use super::handshake::{ExportQuery, MAX_OPTION_DATA, MetaContextQuery};
use super::replies::{CHUNK_HEADER, EXTENDED_CHUNK_HEADER, SIMPLE_REPLY_HEADER};
use super::transmission::{EXTENDED_REQUEST_HEADER, Headers, REQUEST_HEADER, command_name};
use crate::device::BlockSize;

/// What follows the greeting of an oldstyle server, in bytes.
pub const OLDSTYLE_EXPORT: usize = 136;
/// The length of an option reply's header, in bytes.
pub const OPTION_REPLY_HEADER: usize = 20;
/// The longest payload of a chunk that is taken, in bytes: the most data that a read may ask for, and its offset.
pub const MAX_CHUNK: u32 = MAX_PAYLOAD + 8;
/// The longest payload of an error chunk: its text has at most 4096 bytes; the rest is for kinds that are yet to come.
const MAX_ERROR_CHUNK: u32 = 64 * 1024;
/// The most extents in a chunk. Source: NBD proto.md "NBD_REPLY_TYPE_BLOCK_STATUS".
const MAX_EXTENTS: u32 = 1 << 20;

/// What is wrong with some bytes, as half a sentence about them.
pub type Flaw = &'static str;

/// What a server sent that the specification forbids, or that is longer than anything sensible. The connection is of no
/// more use then. Reads as half a sentence about the server.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each reads as its Display does")]
pub enum Violation {
    NotNbd([u8; 8]),
    UnknownProtocol(u64),
    OptionReplyMagic(u64),
    OtherOption { asked: u32, answered: u32 },
    UnexpectedReply { option: u32, reply: u32 },
    LongOptionReply { option: u32, length: u32 },
    LongAnswer { option: u32 },
    OptionReplyData { option: u32, reply: u32, why: Flaw },
    NoExportInfo,
    BlockSizes(u32, u32, u32),
    ReplyMagic { got: u32, headers: Headers },
    LongChunk { kind: u16, length: u32 },
    UnknownChunk(u16),
    ChunkData { kind: u16, length: u32, why: Flaw },
    UnknownCookie(u64),
    AfterLastReply(u64),
    SimpleReplyToRead,
    OtherOffset { asked: u64, answered: u64 },
    UnexpectedChunk { kind: u16, command: u16 },
    OutsideRequest { kind: u16, offset: u64, length: u64 },
    Twice { offset: u64, length: u64 },
    TooManyPieces,
    Missing { bytes: u64 },
    UnknownContext(u32),
    ContextTwice(u32),
    NoStatus,
    Extents(Flaw),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = chunk_name;
        match self {
            Violation::NotNbd(start) => write!(f, "is no NBD server: it starts with \"{}\"", start.escape_ascii()),
            Violation::UnknownProtocol(magic) => write!(f, "speaks no known kind of NBD (0x{magic:016x})"),
            Violation::OptionReplyMagic(magic) => {
                write!(f, "sent an option reply that starts with 0x{magic:x} and not with its magic number")
            }
            Violation::OtherOption { asked, answered } => {
                write!(f, "answered {} where it was asked {}", option_name(*answered), option_name(*asked))
            }
            Violation::UnexpectedReply { option, reply } => {
                write!(f, "answered {} with {}, which is no reply to it", option_name(*option), reply_name(*reply))
            }
            Violation::LongOptionReply { option, length } => {
                write!(f, "answered {} with {length} bytes, more than any reply has", option_name(*option))
            }
            Violation::LongAnswer { option } => write!(f, "answered {} without end", option_name(*option)),
            Violation::OptionReplyData { option, reply, why } => {
                write!(f, "answered {} with a malformed {}: {why}", option_name(*option), reply_name(*reply))
            }
            Violation::NoExportInfo => f.write_str("accepted the export without saying how large it is"),
            Violation::BlockSizes(minimum, preferred, maximum) => {
                write!(f, "has block sizes that cannot be: minimum {minimum}, preferred {preferred}, maximum {maximum}")
            }
            Violation::ReplyMagic { got, headers } => {
                write!(f, "sent a reply that starts with 0x{got:08x}, as no {headers} reply does")
            }
            Violation::LongChunk { kind, length } => {
                write!(f, "sent a chunk {} of {length} bytes or more, which is more than any has", name(*kind))
            }
            Violation::UnknownChunk(kind) => write!(f, "sent a chunk of the unknown type {kind}"),
            Violation::ChunkData { kind, length, why } => {
                write!(f, "sent a malformed chunk {} of {length} bytes: {why}", name(*kind))
            }
            Violation::UnknownCookie(cookie) => write!(f, "answered a request that was never made (cookie {cookie})"),
            Violation::AfterLastReply(cookie) => {
                write!(f, "went on to answer a request after its last reply (cookie {cookie})")
            }
            Violation::SimpleReplyToRead => f.write_str("answered a read with a simple reply, without data"),
            Violation::OtherOffset { asked, answered } => {
                write!(f, "answered a request at offset {asked} with a chunk for one at offset {answered}")
            }
            Violation::UnexpectedChunk { kind, command } => {
                write!(f, "answered {} with a chunk {}", command_name(*command), name(*kind))
            }
            Violation::OutsideRequest { kind, offset, length } => {
                write!(f, "sent {} for {length} bytes at {offset}, outside what was asked for", name(*kind))
            }
            Violation::Twice { offset, length } => {
                write!(f, "sent data twice, among the {length} bytes at {offset}")
            }
            Violation::TooManyPieces => f.write_str("answered a read in more pieces than can be kept track of"),
            Violation::Missing { bytes } => write!(f, "ended its answer to a read with {bytes} bytes missing"),
            Violation::UnknownContext(id) => write!(f, "sent the status of a context that was not asked for (id {id})"),
            Violation::ContextTwice(id) => write!(f, "sent the status of one context twice (id {id})"),
            Violation::NoStatus => f.write_str("ended its answer to a block status request with a context missing"),
            Violation::Extents(why) => write!(f, "sent a block status that cannot be: {why}"),
        }
    }
}

impl std::error::Error for Violation {}

/// The specification's name of an option.
pub fn option_name(option: u32) -> &'static str {
    match option {
        NBD_OPT_EXPORT_NAME => "NBD_OPT_EXPORT_NAME",
        NBD_OPT_ABORT => "NBD_OPT_ABORT",
        NBD_OPT_LIST => "NBD_OPT_LIST",
        NBD_OPT_STARTTLS => "NBD_OPT_STARTTLS",
        NBD_OPT_INFO => "NBD_OPT_INFO",
        NBD_OPT_GO => "NBD_OPT_GO",
        NBD_OPT_STRUCTURED_REPLY => "NBD_OPT_STRUCTURED_REPLY",
        NBD_OPT_LIST_META_CONTEXT => "NBD_OPT_LIST_META_CONTEXT",
        NBD_OPT_SET_META_CONTEXT => "NBD_OPT_SET_META_CONTEXT",
        NBD_OPT_EXTENDED_HEADERS => "NBD_OPT_EXTENDED_HEADERS",
        _ => "an unknown option",
    }
}

/// The specification's name of an option reply.
pub fn reply_name(reply: u32) -> &'static str {
    match reply {
        NBD_REP_ACK => "NBD_REP_ACK",
        NBD_REP_SERVER => "NBD_REP_SERVER",
        NBD_REP_INFO => "NBD_REP_INFO",
        NBD_REP_META_CONTEXT => "NBD_REP_META_CONTEXT",
        NBD_REP_ERR_UNSUP => "NBD_REP_ERR_UNSUP",
        NBD_REP_ERR_POLICY => "NBD_REP_ERR_POLICY",
        NBD_REP_ERR_INVALID => "NBD_REP_ERR_INVALID",
        NBD_REP_ERR_PLATFORM => "NBD_REP_ERR_PLATFORM",
        NBD_REP_ERR_TLS_REQD => "NBD_REP_ERR_TLS_REQD",
        NBD_REP_ERR_UNKNOWN => "NBD_REP_ERR_UNKNOWN",
        NBD_REP_ERR_SHUTDOWN => "NBD_REP_ERR_SHUTDOWN",
        NBD_REP_ERR_BLOCK_SIZE_REQD => "NBD_REP_ERR_BLOCK_SIZE_REQD",
        NBD_REP_ERR_TOO_BIG => "NBD_REP_ERR_TOO_BIG",
        NBD_REP_ERR_EXT_HEADER_REQD => "NBD_REP_ERR_EXT_HEADER_REQD",
        _ if is_error_reply(reply) => "an unknown error",
        _ => "an unknown reply",
    }
}

/// The specification's name of a chunk type, without the part that all share.
fn chunk_name(kind: u16) -> &'static str {
    match kind {
        NBD_REPLY_TYPE_NONE => "NONE",
        NBD_REPLY_TYPE_OFFSET_DATA => "OFFSET_DATA",
        NBD_REPLY_TYPE_OFFSET_HOLE => "OFFSET_HOLE",
        NBD_REPLY_TYPE_BLOCK_STATUS => "BLOCK_STATUS",
        NBD_REPLY_TYPE_BLOCK_STATUS_EXT => "BLOCK_STATUS_EXT",
        NBD_REPLY_TYPE_ERROR => "ERROR",
        NBD_REPLY_TYPE_ERROR_OFFSET => "ERROR_OFFSET",
        _ if is_error_chunk(kind) => "of an unknown error type",
        _ => "of an unknown type",
    }
}

/// Whether an option reply says that the option failed; it is the last reply then.
pub fn is_error_reply(reply: u32) -> bool {
    reply & (1 << 31) != 0
}

/// Whether a chunk says that the request failed.
pub fn is_error_chunk(kind: u16) -> bool {
    kind & (1 << 15) != 0
}

/// An error value as the client is to take it: one that is not known is as if it were `NBD_EINVAL`.
/// Source: NBD proto.md "Error values".
pub fn error_code(wire: u32) -> ErrorCode {
    use ErrorCode::*;
    let known = [NotPermitted, Io, NoMemory, Invalid, NoSpace, Overflow, NotSupported, Shutdown];
    known.into_iter().find(|code| code.wire() == wire).unwrap_or(Invalid)
}

// What a client sends in the handshake.

/// Appends an option and its data, at most [`MAX_OPTION_DATA`] bytes. Errors: there is more.
fn option(out: &mut Vec<u8>, option: u32, data: &[u8]) -> Result<(), Flaw> {
    let length = u32::try_from(data.len()).ok().filter(|length| *length <= MAX_OPTION_DATA);
    let length = length.ok_or("the option's data is too long")?;
    out.extend_from_slice(&NBD_OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(data);
    Ok(())
}

/// Appends an option that has no data: `NBD_OPT_ABORT`, `_LIST`, `_STARTTLS`, `_STRUCTURED_REPLY`, `_EXTENDED_HEADERS`.
pub fn plain_option(out: &mut Vec<u8>, kind: u32) {
    // No data is not too long.
    let _ = option(out, kind, &[]);
}

/// Appends `NBD_OPT_EXPORT_NAME`. Errors: no export can have that name.
pub fn export_name_option(out: &mut Vec<u8>, name: &[u8]) -> Result<(), Flaw> {
    check_string(name)?;
    option(out, NBD_OPT_EXPORT_NAME, name)
}

/// Appends `kind`, `NBD_OPT_INFO` or `NBD_OPT_GO`. Errors: no export can have that name.
pub fn export_query_option(out: &mut Vec<u8>, kind: u32, query: &ExportQuery) -> Result<(), Flaw> {
    let mut data = Vec::new();
    counted_string(&mut data, &query.name)?;
    let count = u16::try_from(query.infos.len()).map_err(|_| "too many information requests")?;
    data.extend_from_slice(&count.to_be_bytes());
    query.infos.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
    option(out, kind, &data)
}

/// Appends `kind`, `NBD_OPT_LIST_META_CONTEXT` or `NBD_OPT_SET_META_CONTEXT`. Errors: no export can have that name, no
/// context that of a query, or the queries are too many.
pub fn meta_context_option(out: &mut Vec<u8>, kind: u32, query: &MetaContextQuery) -> Result<(), Flaw> {
    let mut data = Vec::new();
    counted_string(&mut data, &query.name)?;
    let count = u32::try_from(query.queries.len()).map_err(|_| "too many queries")?;
    data.extend_from_slice(&count.to_be_bytes());
    query.queries.iter().try_for_each(|one| counted_string(&mut data, one))?;
    option(out, kind, &data)
}

fn check_string(bytes: &[u8]) -> Result<(), Flaw> {
    if bytes.len() > NBD_MAX_STRING {
        return Err("a string is longer than 4096 bytes");
    }
    if bytes.contains(&0) {
        return Err("a string may not include NUL bytes");
    }
    Ok(())
}

fn counted_string(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), Flaw> {
    check_string(bytes)?;
    // At most 4096.
    out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    out.extend_from_slice(bytes);
    Ok(())
}

// What a server sends in the handshake.

/// What kind of handshake follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// The 16 bits of handshake flags follow.
    Newstyle,
    /// [`OLDSTYLE_EXPORT`] bytes follow, and that is all.
    Oldstyle,
}

impl Greeting {
    /// Whether the server's first eight bytes are those of one.
    pub fn check_start(bytes: [u8; 8]) -> Result<(), Violation> {
        if u64::from_be_bytes(bytes) == NBD_MAGIC { Ok(()) } else { Err(Violation::NotNbd(bytes)) }
    }

    /// Reads the second eight bytes.
    pub fn parse(bytes: [u8; 8]) -> Result<Greeting, Violation> {
        match u64::from_be_bytes(bytes) {
            NBD_OPTION_MAGIC => Ok(Greeting::Newstyle),
            NBD_OLDSTYLE_MAGIC => Ok(Greeting::Oldstyle),
            other => Err(Violation::UnknownProtocol(other)),
        }
    }
}

/// What every kind of handshake tells of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizeAndFlags {
    /// Bytes.
    pub size: u64,
    /// `NBD_FLAG_*`, the transmission flags.
    pub flags: u16,
}

impl SizeAndFlags {
    /// What an oldstyle server tells. The upper half of its flags is where newstyle has the handshake flags.
    pub fn parse_oldstyle(bytes: &[u8; OLDSTYLE_EXPORT]) -> SizeAndFlags {
        let mut reader = Reader(bytes);
        // The array is long enough for both.
        let (size, flags) = (reader.u64().unwrap_or_default(), reader.u32().unwrap_or_default());
        SizeAndFlags { size, flags: (flags & 0xffff) as u16 }
    }

    /// How long the reply to `NBD_OPT_EXPORT_NAME` is, in bytes.
    pub fn export_name_reply_length(no_zeroes: bool) -> usize {
        if no_zeroes { 10 } else { 134 }
    }

    /// The reply to `NBD_OPT_EXPORT_NAME`, all of it; what the reserved bytes hold is nobody's business. `None` where it is
    /// too short.
    pub fn parse_export_name_reply(bytes: &[u8]) -> Option<SizeAndFlags> {
        let mut reader = Reader(bytes);
        Some(SizeAndFlags { size: reader.u64()?, flags: reader.u16()? })
    }
}

/// What precedes an option reply's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: u32,
    /// `NBD_REP_*`, known or not.
    pub reply: u32,
    /// Bytes of data that follow, at most [`MAX_OPTION_DATA`].
    pub length: u32,
}

impl OptionReplyHeader {
    /// Reads the header of a reply to `asked`.
    pub fn parse(asked: u32, bytes: &[u8; OPTION_REPLY_HEADER]) -> Result<OptionReplyHeader, Violation> {
        let mut reader = Reader(bytes);
        let magic = reader.u64().unwrap_or_default();
        let mut number = || reader.u32().unwrap_or_default();
        let header = OptionReplyHeader { option: number(), reply: number(), length: number() };
        if magic != NBD_OPTION_REPLY_MAGIC {
            return Err(Violation::OptionReplyMagic(magic));
        }
        if header.option != asked {
            return Err(Violation::OtherOption { asked, answered: header.option });
        }
        if header.length > MAX_OPTION_DATA {
            return Err(Violation::LongOptionReply { option: asked, length: header.length });
        }
        Ok(header)
    }
}

/// Why a server refused an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionError {
    /// `NBD_OPT_*`
    pub option: u32,
    /// `NBD_REP_ERR_*`, known or not.
    pub reply: u32,
    /// What the server said to it, perhaps nothing.
    pub text: String,
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was refused with {}", option_name(self.option), reply_name(self.reply))?;
        if self.text.is_empty() { Ok(()) } else { write!(f, ": {}", self.text) }
    }
}

/// `NBD_REP_INFO`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info {
    /// `NBD_INFO_EXPORT`
    Export(SizeAndFlags),
    /// `NBD_INFO_NAME`
    Name(Vec<u8>),
    /// `NBD_INFO_DESCRIPTION`
    Description(Vec<u8>),
    /// `NBD_INFO_BLOCK_SIZE`
    BlockSize(BlockSize),
    /// One that a client has to pass over.
    Unknown(u16),
}

/// A reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionReply {
    /// `NBD_REP_ACK`, the last.
    Ack,
    /// `NBD_REP_SERVER`
    #[allow(missing_docs, reason = "as they are called")]
    Server { name: Vec<u8>, description: Vec<u8> },
    /// `NBD_REP_INFO`
    Info(Info),
    /// `NBD_REP_META_CONTEXT`
    #[allow(missing_docs, reason = "as they are called")]
    MetaContext { id: u32, name: Vec<u8> },
    /// `NBD_REP_ERR_*`, the last.
    Error(OptionError),
}

impl OptionReply {
    /// Reads the data of the reply, all `header.length` bytes of it.
    pub fn parse(header: OptionReplyHeader, data: &[u8]) -> Result<OptionReply, Violation> {
        let OptionReplyHeader { option, reply, .. } = header;
        if is_error_reply(reply) {
            let text = String::from_utf8_lossy(data).into_owned();
            return Ok(OptionReply::Error(OptionError { option, reply, text }));
        }
        let fits = match reply {
            NBD_REP_ACK => true,
            NBD_REP_SERVER => option == NBD_OPT_LIST,
            NBD_REP_INFO => matches!(option, NBD_OPT_INFO | NBD_OPT_GO),
            NBD_REP_META_CONTEXT => matches!(option, NBD_OPT_LIST_META_CONTEXT | NBD_OPT_SET_META_CONTEXT),
            _ => false,
        };
        if !fits {
            return Err(Violation::UnexpectedReply { option, reply });
        }
        let malformed = |why| Violation::OptionReplyData { option, reply, why };
        match reply {
            NBD_REP_ACK if data.is_empty() => Ok(OptionReply::Ack),
            NBD_REP_ACK => Err(malformed("it has data")),
            NBD_REP_SERVER => server(data).map_err(malformed),
            NBD_REP_META_CONTEXT => meta_context(data).map_err(malformed),
            _ => info(data).map_err(malformed)?.map(OptionReply::Info),
        }
    }
}

const SHORT: Flaw = "it ends too early";

fn string(bytes: &[u8]) -> Result<Vec<u8>, Flaw> {
    check_string(bytes)?;
    Ok(bytes.to_vec())
}

fn server(data: &[u8]) -> Result<OptionReply, Flaw> {
    let mut reader = Reader(data);
    let length = reader.u32().ok_or(SHORT)? as usize;
    let name = string(reader.bytes(length).ok_or(SHORT)?)?;
    Ok(OptionReply::Server { name, description: string(reader.0)? })
}

fn meta_context(data: &[u8]) -> Result<OptionReply, Flaw> {
    let mut reader = Reader(data);
    let id = reader.u32().ok_or(SHORT)?;
    if reader.0.is_empty() {
        return Err("the context has no name");
    }
    Ok(OptionReply::MetaContext { id, name: string(reader.0)? })
}

/// The inner error is of what is well-formed and cannot be.
fn info(data: &[u8]) -> Result<Result<Info, Violation>, Flaw> {
    let mut reader = Reader(data);
    let kind = reader.u16().ok_or(SHORT)?;
    let exactly = |length: usize| if data.len() == length { Ok(()) } else { Err("it has the wrong length") };
    Ok(Ok(match kind {
        NBD_INFO_EXPORT => {
            exactly(12)?;
            let export = SizeAndFlags::parse_export_name_reply(reader.0).ok_or(SHORT)?;
            Info::Export(export)
        }
        NBD_INFO_NAME => Info::Name(string(reader.0)?),
        NBD_INFO_DESCRIPTION => Info::Description(string(reader.0)?),
        NBD_INFO_BLOCK_SIZE => {
            exactly(14)?;
            let mut number = || reader.u32().ok_or(SHORT);
            let (minimum, preferred, maximum) = (number()?, number()?, number()?);
            // As far as a client builds on it: that the preferred size has at least 512 bytes, it does not.
            let power = minimum.is_power_of_two() && preferred.is_power_of_two();
            if !power || minimum > 65536 || preferred < minimum || maximum < minimum {
                return Ok(Err(Violation::BlockSizes(minimum, preferred, maximum)));
            }
            Info::BlockSize(BlockSize { minimum, preferred, maximum })
        }
        other => Info::Unknown(other),
    }))
}

// What a client sends in transmission.

impl fmt::Display for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Headers::Simple => "simple",
            Headers::Structured => "structured",
            Headers::Extended => "extended",
        })
    }
}

/// A request's header, as it is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// `NBD_CMD_FLAG_*`. `NBD_CMD_FLAG_PAYLOAD_LEN` is set on a payload that has extended headers, and on nothing else.
    pub flags: u16,
    /// `NBD_CMD_*`
    pub kind: u16,
    /// The client's name for the request.
    pub cookie: u64,
    /// Bytes from the start of the export.
    pub offset: u64,
    /// Bytes: of the payload if there is one, else of the export.
    pub length: u64,
}

impl RequestHeader {
    /// The compact form. `None` where the length has no room in it, or where only the extended form has a payload.
    pub fn compact(&self) -> Option<[u8; REQUEST_HEADER]> {
        let length = u32::try_from(self.length).ok()?;
        if self.flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0 {
            return None;
        }
        let mut bytes = [0; REQUEST_HEADER];
        bytes[..24].copy_from_slice(&self.start(NBD_REQUEST_MAGIC));
        bytes[24..].copy_from_slice(&length.to_be_bytes());
        Some(bytes)
    }

    /// The extended form.
    pub fn extended(&self) -> [u8; EXTENDED_REQUEST_HEADER] {
        let mut bytes = [0; EXTENDED_REQUEST_HEADER];
        bytes[..24].copy_from_slice(&self.start(NBD_EXTENDED_REQUEST_MAGIC));
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// What both forms start with.
    fn start(&self, magic: u32) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..4].copy_from_slice(&magic.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..].copy_from_slice(&self.offset.to_be_bytes());
        bytes
    }
}

/// The payload of a block status request for some contexts only: `length` bytes of the export, and the contexts' ids.
/// Only with extended headers, and where the server has `NBD_FLAG_BLOCK_STATUS_PAYLOAD`.
pub fn block_status_payload(length: u64, contexts: &[u32]) -> Vec<u8> {
    let mut payload = length.to_be_bytes().to_vec();
    contexts.iter().for_each(|id| payload.extend_from_slice(&id.to_be_bytes()));
    payload
}

// What a server sends in transmission.

/// What precedes a reply's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply. The data of a read follows, if that is what was asked for and `error` is 0.
    #[allow(missing_docs, reason = "as they are called")]
    Simple { error: u32, cookie: u64 },
    /// A chunk of a structured or extended reply.
    Chunk(Chunk),
}

/// The header of a structured or extended chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// `NBD_REPLY_FLAG_DONE`; no other flag means anything.
    pub done: bool,
    /// `NBD_REPLY_TYPE_*`
    pub kind: u16,
    /// The client's name for the request.
    pub cookie: u64,
    /// The request's offset. Only extended chunks have it.
    pub offset: Option<u64>,
    /// Bytes of payload that follow, at most [`MAX_CHUNK`].
    pub length: u32,
}

impl ReplyHeader {
    /// Reads a header off the front of `bytes`, and how long it is; `None` where there is not enough of it yet.
    pub fn parse(headers: Headers, bytes: &[u8]) -> Result<Option<(ReplyHeader, usize)>, Violation> {
        let Some(magic) = Reader(bytes).u32() else { return Ok(None) };
        let (needed, simple) = match (headers, magic) {
            (Headers::Simple | Headers::Structured, NBD_SIMPLE_REPLY_MAGIC) => (SIMPLE_REPLY_HEADER, true),
            (Headers::Structured, NBD_STRUCTURED_REPLY_MAGIC) => (CHUNK_HEADER, false),
            (Headers::Extended, NBD_EXTENDED_REPLY_MAGIC) => (EXTENDED_CHUNK_HEADER, false),
            _ => return Err(Violation::ReplyMagic { got: magic, headers }),
        };
        let header = if simple { simple_header(bytes) } else { chunk_header(headers, bytes).map(ReplyHeader::Chunk) };
        let Some(header) = header else { return Ok(None) };
        if let ReplyHeader::Chunk(chunk) = header {
            // What has no room in 32 bits was cut to their largest, which is too long.
            chunk.check()?;
        }
        Ok(Some((header, needed)))
    }
}

fn simple_header(bytes: &[u8]) -> Option<ReplyHeader> {
    let mut reader = Reader(bytes);
    reader.u32()?;
    Some(ReplyHeader::Simple { error: reader.u32()?, cookie: reader.u64()? })
}

fn chunk_header(headers: Headers, bytes: &[u8]) -> Option<Chunk> {
    let mut reader = Reader(bytes);
    reader.u32()?;
    let (flags, kind, cookie) = (reader.u16()?, reader.u16()?, reader.u64()?);
    let (offset, length) = match headers {
        Headers::Extended => (Some(reader.u64()?), u32::try_from(reader.u64()?).unwrap_or(u32::MAX)),
        Headers::Simple | Headers::Structured => (None, reader.u32()?),
    };
    Some(Chunk { done: flags & NBD_REPLY_FLAG_DONE != 0, kind, cookie, offset, length })
}

impl Chunk {
    /// Whether such a chunk can be, from its header alone.
    fn check(&self) -> Result<(), Violation> {
        let Chunk { done, kind, length, .. } = *self;
        let (shortest, longest) = match kind {
            NBD_REPLY_TYPE_NONE => (0, 0),
            NBD_REPLY_TYPE_OFFSET_DATA => (9, MAX_CHUNK),
            NBD_REPLY_TYPE_OFFSET_HOLE => (12, 12),
            NBD_REPLY_TYPE_BLOCK_STATUS => (4 + 8, 4 + 8 * MAX_EXTENTS),
            NBD_REPLY_TYPE_BLOCK_STATUS_EXT => (8 + 16, 8 + 16 * MAX_EXTENTS),
            NBD_REPLY_TYPE_ERROR_OFFSET => (14, MAX_ERROR_CHUNK),
            _ if is_error_chunk(kind) => (6, MAX_ERROR_CHUNK),
            other => return Err(Violation::UnknownChunk(other)),
        };
        if length > MAX_CHUNK {
            return Err(Violation::LongChunk { kind, length });
        }
        let multiple = match kind {
            NBD_REPLY_TYPE_BLOCK_STATUS => length % 8 == 4,
            NBD_REPLY_TYPE_BLOCK_STATUS_EXT => length % 16 == 8,
            _ => true,
        };
        if length < shortest || length > longest || !multiple {
            return Err(Violation::ChunkData { kind, length, why: "it has the wrong length" });
        }
        if kind == NBD_REPLY_TYPE_NONE && !done {
            return Err(Violation::ChunkData { kind, length, why: "it is not the last of its reply" });
        }
        Ok(())
    }

    /// How much of the payload [`Body::parse`] wants to see, in bytes: all but the data of a read.
    pub fn head(&self) -> usize {
        if self.kind == NBD_REPLY_TYPE_OFFSET_DATA { 8 } else { self.length as usize }
    }
}

/// A stretch of the export with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, not 0.
    pub length: u64,
    /// What the context says of it.
    pub status: u64,
}

/// What a chunk says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields have the specification's names")]
pub enum Body {
    /// `NBD_REPLY_TYPE_NONE`
    Nothing,
    /// `NBD_REPLY_TYPE_OFFSET_DATA`: so much data follows, at least one byte.
    Data { offset: u64, length: u32 },
    /// `NBD_REPLY_TYPE_OFFSET_HOLE`, at least one byte
    Hole { offset: u64, length: u32 },
    /// `NBD_REPLY_TYPE_BLOCK_STATUS` and `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`: at least one extent, from the request's offset
    /// on.
    BlockStatus { context: u32, extents: Vec<Extent> },
    /// `NBD_REPLY_TYPE_ERROR`, `NBD_REPLY_TYPE_ERROR_OFFSET` and all errors that are yet to come.
    Error { error: u32, text: String, offset: Option<u64> },
}

impl Body {
    /// Reads the first [`Chunk::head`] bytes of the payload.
    pub fn parse(chunk: &Chunk, head: &[u8]) -> Result<Body, Violation> {
        let Chunk { kind, length, .. } = *chunk;
        let body = match kind {
            NBD_REPLY_TYPE_NONE => Ok(Body::Nothing),
            NBD_REPLY_TYPE_OFFSET_DATA => data(length, head),
            NBD_REPLY_TYPE_OFFSET_HOLE => hole(head),
            NBD_REPLY_TYPE_BLOCK_STATUS => block_status(head),
            NBD_REPLY_TYPE_BLOCK_STATUS_EXT => block_status_ext(head),
            _ if is_error_chunk(kind) => error(kind, head),
            other => return Err(Violation::UnknownChunk(other)),
        };
        body.map_err(|why| Violation::ChunkData { kind, length, why })
    }
}

fn data(length: u32, head: &[u8]) -> Result<Body, Flaw> {
    let offset = Reader(head).u64().ok_or(SHORT)?;
    Ok(Body::Data { offset, length: length.checked_sub(8).ok_or(SHORT)? })
}

fn hole(head: &[u8]) -> Result<Body, Flaw> {
    let mut reader = Reader(head);
    let (offset, length) = (reader.u64().ok_or(SHORT)?, reader.u32().ok_or(SHORT)?);
    if length == 0 {
        return Err("the hole is empty");
    }
    Ok(Body::Hole { offset, length })
}

fn block_status(head: &[u8]) -> Result<Body, Flaw> {
    let mut reader = Reader(head);
    let context = reader.u32().ok_or(SHORT)?;
    let mut extents = Vec::with_capacity(reader.0.len() / 8);
    while !reader.0.is_empty() {
        let (length, status) = (reader.u32().ok_or(SHORT)?, reader.u32().ok_or(SHORT)?);
        extents.push(Extent { length: length.into(), status: status.into() });
    }
    checked(context, extents)
}

fn block_status_ext(head: &[u8]) -> Result<Body, Flaw> {
    let mut reader = Reader(head);
    let (context, count) = (reader.u32().ok_or(SHORT)?, reader.u32().ok_or(SHORT)? as usize);
    if reader.0.len() % 16 != 0 || reader.0.len() / 16 != count {
        return Err("the number of extents does not match its length");
    }
    let mut extents = Vec::with_capacity(count);
    while !reader.0.is_empty() {
        extents.push(Extent { length: reader.u64().ok_or(SHORT)?, status: reader.u64().ok_or(SHORT)? });
    }
    checked(context, extents)
}

fn checked(context: u32, extents: Vec<Extent>) -> Result<Body, Flaw> {
    if extents.is_empty() {
        return Err("it has no extent");
    }
    if extents.iter().any(|extent| extent.length == 0) {
        return Err("an extent is empty");
    }
    Ok(Body::BlockStatus { context, extents })
}

fn error(kind: u16, head: &[u8]) -> Result<Body, Flaw> {
    let mut reader = Reader(head);
    let (error, length) = (reader.u32().ok_or(SHORT)?, usize::from(reader.u16().ok_or(SHORT)?));
    if error == 0 {
        return Err("the error is no error");
    }
    if length > NBD_MAX_STRING {
        return Err("its text is longer than 4096 bytes");
    }
    let text = reader.bytes(length).ok_or("its text is longer than the chunk")?;
    let offset = match kind {
        NBD_REPLY_TYPE_ERROR_OFFSET => Some(reader.u64().ok_or("its text leaves no room for the offset")?),
        _ => None,
    };
    Ok(Body::Error { error, text: String::from_utf8_lossy(text).into_owned(), offset })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extents::Extents;
    use crate::protocol::handshake::{HandshakeOption, OPTION_HEADER, OptionHeader, option_reply};
    use crate::protocol::handshake::{export_name_reply, info_block_size, info_export};
    use crate::protocol::replies::ReplyTo;
    use crate::protocol::transmission::{Contexts, Request};
    use crate::segments::Segments;

    /// What the server makes of an option.
    fn understood(encode: impl FnOnce(&mut Vec<u8>) -> Result<(), Flaw>) -> Result<HandshakeOption, Flaw> {
        let mut out = Vec::new();
        encode(&mut out)?;
        let (header, data) = out.split_first_chunk::<OPTION_HEADER>().expect("an option has a header");
        let header = OptionHeader::parse(header).expect("an option starts with its magic number");
        assert_eq!(header.length as usize, data.len());
        HandshakeOption::parse(header.option, data).map_err(|malformed| malformed.why)
    }

    #[test]
    fn the_server_reads_the_options_that_the_client_means() {
        use HandshakeOption::*;
        for (kind, option) in [
            (NBD_OPT_ABORT, Abort),
            (NBD_OPT_LIST, List),
            (NBD_OPT_STARTTLS, StartTls),
            (NBD_OPT_STRUCTURED_REPLY, StructuredReply),
            (NBD_OPT_EXTENDED_HEADERS, ExtendedHeaders),
        ] {
            let read = understood(|out| {
                plain_option(out, kind);
                Ok(())
            });
            assert_eq!(read, Ok(option));
        }
        let name = "na\u{ef}ve".as_bytes().to_vec();
        assert_eq!(understood(|out| export_name_option(out, &name)), Ok(ExportName(name.clone())));
        for infos in [vec![], vec![NBD_INFO_NAME, NBD_INFO_BLOCK_SIZE]] {
            let query = ExportQuery { name: name.clone(), infos };
            assert_eq!(understood(|out| export_query_option(out, NBD_OPT_INFO, &query)), Ok(Info(query.clone())));
            assert_eq!(understood(|out| export_query_option(out, NBD_OPT_GO, &query)), Ok(Go(query.clone())));
        }
        for queries in [vec![], vec![b"base:".to_vec(), b"qemu:dirty-bitmap:x".to_vec()]] {
            let query = MetaContextQuery { name: name.clone(), queries };
            let list = understood(|out| meta_context_option(out, NBD_OPT_LIST_META_CONTEXT, &query));
            assert_eq!(list, Ok(ListMetaContext(query.clone())));
            let set = understood(|out| meta_context_option(out, NBD_OPT_SET_META_CONTEXT, &query));
            assert_eq!(set, Ok(SetMetaContext(query.clone())));
        }
    }

    #[test]
    fn what_no_server_could_read_is_not_sent() {
        let mut out = Vec::new();
        let long = vec![b'x'; NBD_MAX_STRING + 1];
        assert!(export_name_option(&mut out, &long).is_err());
        assert!(export_name_option(&mut out, b"a\0b").is_err());
        let query = ExportQuery { name: long, infos: vec![] };
        assert!(export_query_option(&mut out, NBD_OPT_GO, &query).is_err());
        let query = MetaContextQuery { name: vec![], queries: vec![vec![b'x'; NBD_MAX_STRING]; 17] };
        assert!(meta_context_option(&mut out, NBD_OPT_SET_META_CONTEXT, &query).is_err());
        assert_eq!(out, []);
    }

    #[test]
    fn the_server_reads_the_requests_that_the_client_means() {
        let header = RequestHeader {
            flags: 3,
            kind: NBD_CMD_WRITE_ZEROES,
            cookie: 0x0102_0304_0506_0708,
            offset: 1 << 40,
            length: 0xffff_ffff,
        };
        let compact = header.compact().expect("the length has room");
        let long = RequestHeader { flags: NBD_CMD_FLAG_PAYLOAD_LEN, length: u64::MAX - 1, ..header };
        for (headers, sent, bytes) in
            [(Headers::Simple, header, &compact[..]), (Headers::Extended, long, &long.extended())]
        {
            let Request { flags, kind, cookie, offset, length } =
                Request::parse(headers, bytes).expect("the magic number is right");
            assert_eq!(RequestHeader { flags, kind, cookie, offset, length }, sent);
        }
        assert_eq!(RequestHeader { length: 1 << 32, ..header }.compact(), None);
        assert_eq!(RequestHeader { flags: NBD_CMD_FLAG_PAYLOAD_LEN, ..header }.compact(), None);
    }

    #[test]
    fn an_extended_request_is_as_the_specification_has_it() {
        let flags = NBD_CMD_FLAG_PAYLOAD_LEN | NBD_CMD_FLAG_REQ_ONE;
        let header = RequestHeader { flags, kind: NBD_CMD_BLOCK_STATUS, cookie: 7, offset: 1 << 33, length: 16 };
        let mut expected = vec![0x21, 0xe4, 0x1c, 0x71, 0, 0x28, 0, 7, 0, 0, 0, 0, 0, 0, 0, 7];
        expected.extend([0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16]);
        assert_eq!(header.extended()[..], expected[..]);
        let payload = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 5, 255, 0, 0, 0];
        assert_eq!(block_status_payload(1 << 32, &[5, 0xff00_0000]), payload);
    }

    #[test]
    fn a_greeting_is_told_by_its_first_bytes() {
        assert_eq!(Greeting::check_start(*b"NBDMAGIC"), Ok(()));
        assert_eq!(Greeting::parse(*b"IHAVEOPT"), Ok(Greeting::Newstyle));
        assert_eq!(Greeting::parse(NBD_OLDSTYLE_MAGIC.to_be_bytes()), Ok(Greeting::Oldstyle));
        let ssh = Greeting::check_start(*b"SSH-2.0-").expect_err("that is another protocol");
        assert_eq!(ssh.to_string(), "is no NBD server: it starts with \"SSH-2.0-\"");
        assert!(Greeting::parse(*b"NBDMAGIC").is_err());
        let mut old = [0; OLDSTYLE_EXPORT];
        old[..12].copy_from_slice(&[0, 0, 0, 0, 0, 16, 0, 0, 0, 3, 0, 5]);
        assert_eq!(SizeAndFlags::parse_oldstyle(&old), SizeAndFlags { size: 1 << 20, flags: 5 });
    }

    /// What the client makes of what the server replies.
    fn heard(option: u32, reply: u32, parts: &[&[u8]]) -> Result<OptionReply, Violation> {
        let mut out = Vec::new();
        option_reply(&mut out, option, reply, parts);
        let (header, data) = out.split_first_chunk().expect("a reply has a header");
        let header = OptionReplyHeader::parse(option, header)?;
        assert_eq!(header.length as usize, data.len());
        OptionReply::parse(header, data)
    }

    #[test]
    fn the_client_reads_the_replies_that_the_server_means() {
        assert_eq!(heard(NBD_OPT_LIST, NBD_REP_ACK, &[]), Ok(OptionReply::Ack));
        let listed = heard(NBD_OPT_LIST, NBD_REP_SERVER, &[&[0, 0, 0, 1], b"a", b"a disk"]);
        assert_eq!(listed, Ok(OptionReply::Server { name: b"a".to_vec(), description: b"a disk".to_vec() }));
        let info = |data: &[u8]| heard(NBD_OPT_GO, NBD_REP_INFO, &[data]);
        let told = SizeAndFlags { size: 1 << 40, flags: 0x1234 };
        assert_eq!(info(&info_export(1 << 40, 0x1234)), Ok(OptionReply::Info(Info::Export(told))));
        let size = BlockSize { minimum: 512, preferred: 4096, maximum: u32::MAX };
        assert_eq!(info(&info_block_size(size)), Ok(OptionReply::Info(Info::BlockSize(size))));
        assert_eq!(info(&[0, 1, b'n']), Ok(OptionReply::Info(Info::Name(b"n".to_vec()))));
        assert_eq!(info(&[0, 2]), Ok(OptionReply::Info(Info::Description(vec![]))));
        assert_eq!(info(&[0x12, 0x34, 5, 6]), Ok(OptionReply::Info(Info::Unknown(0x1234))));
        let context = heard(NBD_OPT_SET_META_CONTEXT, NBD_REP_META_CONTEXT, &[&[0, 0, 0, 9], b"base:allocation"]);
        assert_eq!(context, Ok(OptionReply::MetaContext { id: 9, name: b"base:allocation".to_vec() }));
        for reply in [NBD_REP_ERR_UNSUP, NBD_REP_ERR_EXT_HEADER_REQD, (1 << 31) | 77] {
            let error = OptionError { option: NBD_OPT_GO, reply, text: "no \u{fffd}".into() };
            assert_eq!(heard(NBD_OPT_GO, reply, &[b"no \xff"]), Ok(OptionReply::Error(error)));
        }
        for no_zeroes in [false, true] {
            let reply = export_name_reply(1 << 40, 0x1234, no_zeroes);
            assert_eq!(reply.len(), SizeAndFlags::export_name_reply_length(no_zeroes));
            assert_eq!(SizeAndFlags::parse_export_name_reply(&reply), Some(told));
        }
    }

    #[test]
    fn replies_that_cannot_be_are_refused() {
        for (option, reply, data) in [
            (NBD_OPT_LIST, NBD_REP_ACK, &b"x"[..]),
            (NBD_OPT_GO, NBD_REP_SERVER, &[0, 0, 0, 0]),
            (NBD_OPT_LIST, NBD_REP_INFO, &[0, 1]),
            (NBD_OPT_GO, NBD_REP_META_CONTEXT, &[0, 0, 0, 0, b'b']),
            (NBD_OPT_LIST, 99, &[]),
            (NBD_OPT_LIST, NBD_REP_SERVER, &[0, 0, 0]),
            (NBD_OPT_LIST, NBD_REP_SERVER, &[0, 0, 0, 2, b'a']),
            (NBD_OPT_LIST, NBD_REP_SERVER, &[255, 255, 255, 255, b'a']),
            (NBD_OPT_LIST, NBD_REP_SERVER, &[0, 0, 0, 1, 0]),
            (NBD_OPT_GO, NBD_REP_INFO, &[0]),
            (NBD_OPT_GO, NBD_REP_INFO, &[0, 0, 1, 2, 3]),
            (NBD_OPT_GO, NBD_REP_INFO, &[0; 13]),
            (NBD_OPT_GO, NBD_REP_INFO, &[0, 3, 0, 0, 2, 0]),
            (NBD_OPT_GO, NBD_REP_INFO, &[0, 3, 0, 0, 0, 3, 0, 0, 16, 0, 0, 16, 0, 0]),
            (NBD_OPT_GO, NBD_REP_INFO, &[0, 3, 0, 2, 0, 0, 0, 2, 0, 0, 0, 16, 0, 0]),
            (NBD_OPT_GO, NBD_REP_INFO, &[0, 3, 0, 0, 2, 0, 0, 0, 1, 0, 0, 16, 0, 0]),
            (NBD_OPT_LIST_META_CONTEXT, NBD_REP_META_CONTEXT, &[0, 0, 0]),
            (NBD_OPT_LIST_META_CONTEXT, NBD_REP_META_CONTEXT, &[0, 0, 0, 1]),
        ] {
            assert!(heard(option, reply, &[data]).is_err(), "{option} {reply} {data:?}");
        }
        let long = vec![b'x'; NBD_MAX_STRING + 1];
        assert!(heard(NBD_OPT_GO, NBD_REP_INFO, &[&[0, 2], &long]).is_err());
        assert!(heard(NBD_OPT_GO, NBD_REP_ERR_UNKNOWN, &[&vec![b'x'; MAX_OPTION_DATA as usize + 1]]).is_err());
        let mut out = Vec::new();
        option_reply(&mut out, NBD_OPT_LIST, NBD_REP_ACK, &[]);
        let header = *out.first_chunk().expect("a reply has a header");
        let other = Violation::OtherOption { asked: NBD_OPT_GO, answered: NBD_OPT_LIST };
        assert_eq!(OptionReplyHeader::parse(NBD_OPT_GO, &header), Err(other));
        out[0] = 1;
        let header = *out.first_chunk().expect("a reply has a header");
        assert!(matches!(OptionReplyHeader::parse(NBD_OPT_LIST, &header), Err(Violation::OptionReplyMagic(_))));
    }

    /// What the client makes of the reply that the server sends, to a request at 512 with the cookie 7.
    fn replied(headers: Headers, reply: impl FnOnce(&ReplyTo, &mut Segments)) -> (ReplyHeader, Option<Body>) {
        let mut out = Segments::default();
        reply(&ReplyTo { headers, cookie: 7, offset: 512 }, &mut out);
        let bytes = out.to_vec();
        let (header, length) = ReplyHeader::parse(headers, &bytes).expect("it is one").expect("all is here");
        for end in 0..length {
            assert_eq!(ReplyHeader::parse(headers, &bytes[..end]), Ok(None));
        }
        let ReplyHeader::Chunk(chunk) = header else { return (header, None) };
        assert_eq!((chunk.cookie, chunk.done), (7, true));
        assert_eq!(chunk.offset, (headers == Headers::Extended).then_some(512));
        let body = Body::parse(&chunk, &bytes[length..length + chunk.head()]).expect("the server made it");
        (header, Some(body))
    }

    #[test]
    fn the_client_reads_the_replies_to_requests_that_the_server_means() {
        let error = |reply: &ReplyTo, out: &mut Segments| reply.error(out, ErrorCode::NoSpace, "full");
        let mut extents = Extents::new(512, 4096, false);
        extents.add(512, 4096, 3);
        for headers in [Headers::Structured, Headers::Extended] {
            let full = Body::Error { error: 28, text: "full".into(), offset: None };
            assert_eq!(replied(headers, error).1, Some(full));
            let read = replied(headers, |reply, out| reply.read(out, 4096)).1;
            assert_eq!(read, Some(Body::Data { offset: 512, length: 4096 }));
            let status = replied(headers, |reply, out| reply.block_status(out, 0, &extents, 1 << 40, true)).1;
            let extents = vec![Extent { length: 4096, status: 3 }];
            assert_eq!(status, Some(Body::BlockStatus { context: Contexts::id(0), extents }));
        }
        let simple = |error| (ReplyHeader::Simple { error, cookie: 7 }, None);
        for headers in [Headers::Simple, Headers::Structured] {
            assert_eq!(replied(headers, |reply, out| reply.done(out)), simple(0));
        }
        assert_eq!(replied(Headers::Simple, error), simple(28));
        assert_eq!(replied(Headers::Extended, |reply, out| reply.done(out)).1, Some(Body::Nothing));
    }

    #[test]
    fn a_reply_of_headers_that_were_not_agreed_on_is_told_by_its_magic_number() {
        use Headers::*;
        for (agreed, magic) in [
            (Simple, NBD_STRUCTURED_REPLY_MAGIC),
            (Simple, NBD_EXTENDED_REPLY_MAGIC),
            (Structured, NBD_EXTENDED_REPLY_MAGIC),
            (Extended, NBD_SIMPLE_REPLY_MAGIC),
            (Extended, NBD_STRUCTURED_REPLY_MAGIC),
        ] {
            let refused = ReplyHeader::parse(agreed, &magic.to_be_bytes());
            assert_eq!(refused, Err(Violation::ReplyMagic { got: magic, headers: agreed }));
        }
    }

    fn extended(flags: u16, kind: u16, length: u64) -> Vec<u8> {
        let mut bytes = NBD_EXTENDED_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(1u64.to_be_bytes());
        bytes.extend(2u64.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    }

    #[test]
    fn a_chunk_that_cannot_be_is_told_by_its_header() {
        for (kind, length) in [
            (NBD_REPLY_TYPE_NONE, 1),
            (NBD_REPLY_TYPE_OFFSET_DATA, 8),
            (NBD_REPLY_TYPE_OFFSET_DATA, u64::from(MAX_CHUNK) + 1),
            (NBD_REPLY_TYPE_OFFSET_DATA, (1 << 32) + 9),
            (NBD_REPLY_TYPE_OFFSET_DATA, u64::MAX),
            (NBD_REPLY_TYPE_OFFSET_HOLE, 11),
            (NBD_REPLY_TYPE_OFFSET_HOLE, 13),
            (NBD_REPLY_TYPE_BLOCK_STATUS, 4),
            (NBD_REPLY_TYPE_BLOCK_STATUS, 13),
            (NBD_REPLY_TYPE_BLOCK_STATUS, 4 + 8 * ((1 << 20) + 1)),
            (NBD_REPLY_TYPE_BLOCK_STATUS_EXT, 8),
            (NBD_REPLY_TYPE_BLOCK_STATUS_EXT, 16),
            (NBD_REPLY_TYPE_BLOCK_STATUS_EXT, 8 + 16 * ((1 << 20) + 1)),
            (NBD_REPLY_TYPE_ERROR, 5),
            (NBD_REPLY_TYPE_ERROR, 1 << 20),
            (NBD_REPLY_TYPE_ERROR_OFFSET, 13),
            ((1 << 15) | 99, 5),
            (3, 0),
            (0x7fff, 0),
        ] {
            let refused = ReplyHeader::parse(Headers::Extended, &extended(NBD_REPLY_FLAG_DONE, kind, length));
            assert!(refused.is_err(), "{kind} {length}");
        }
        assert!(ReplyHeader::parse(Headers::Extended, &extended(0, NBD_REPLY_TYPE_NONE, 0)).is_err());
        let chunk = Chunk { done: true, kind: NBD_REPLY_TYPE_NONE, cookie: 1, offset: Some(2), length: 0 };
        // Flags that are not known are passed over.
        let parsed = ReplyHeader::parse(Headers::Extended, &extended(0xffff, NBD_REPLY_TYPE_NONE, 0));
        assert_eq!(parsed, Ok(Some((ReplyHeader::Chunk(chunk), EXTENDED_CHUNK_HEADER))));
    }

    fn body(kind: u16, payload: &[u8]) -> Result<Body, Violation> {
        let chunk = Chunk { done: true, kind, cookie: 1, offset: None, length: payload.len() as u32 };
        chunk.check()?;
        Body::parse(&chunk, &payload[..chunk.head()])
    }

    #[test]
    fn payloads_are_read_to_their_ends() {
        let data = body(NBD_REPLY_TYPE_OFFSET_DATA, &[0, 0, 0, 0, 0, 0, 1, 0, 9, 9]);
        assert_eq!(data, Ok(Body::Data { offset: 256, length: 2 }));
        let hole = body(NBD_REPLY_TYPE_OFFSET_HOLE, &[0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0]);
        assert_eq!(hole, Ok(Body::Hole { offset: 256, length: 65536 }));
        assert!(body(NBD_REPLY_TYPE_OFFSET_HOLE, &[0; 12]).is_err());

        let mut status = vec![0, 0, 0, 5];
        status.extend([0, 0, 16, 0, 0, 0, 0, 3]);
        let extent = |length, status| Extent { length, status };
        let expected = Body::BlockStatus { context: 5, extents: vec![extent(4096, 3)] };
        assert_eq!(body(NBD_REPLY_TYPE_BLOCK_STATUS, &status), Ok(expected));
        status.extend([0, 0, 0, 0, 0, 0, 0, 3]);
        assert!(body(NBD_REPLY_TYPE_BLOCK_STATUS, &status).is_err());

        let mut long = vec![0, 0, 0, 5, 0, 0, 0, 1];
        long.extend([0, 0, 0, 1, 0, 0, 0, 0]);
        long.extend([0, 0, 0, 0, 0, 0, 0, 2]);
        let expected = Body::BlockStatus { context: 5, extents: vec![extent(1 << 32, 2)] };
        assert_eq!(body(NBD_REPLY_TYPE_BLOCK_STATUS_EXT, &long), Ok(expected));
        long[7] = 2;
        assert!(body(NBD_REPLY_TYPE_BLOCK_STATUS_EXT, &long).is_err());
        long[4] = 0xff;
        assert!(body(NBD_REPLY_TYPE_BLOCK_STATUS_EXT, &long).is_err());
    }

    #[test]
    fn errors_are_read_known_or_not() {
        let error = |error, text: &str, offset| Ok(Body::Error { error, text: text.into(), offset });
        assert_eq!(body(NBD_REPLY_TYPE_ERROR, &[0, 0, 0, 5, 0, 0]), error(5, "", None));
        let with_offset = [0, 0, 0, 5, 0, 1, b'x', 0, 0, 0, 0, 0, 0, 2, 0];
        assert_eq!(body(NBD_REPLY_TYPE_ERROR_OFFSET, &with_offset), error(5, "x", Some(512)));
        // What follows the text of an error that is yet to come is not known.
        assert_eq!(body((1 << 15) | 99, &[0, 0, 0, 5, 0, 1, b'x', 1, 2, 3]), error(5, "x", None));
        for (kind, payload) in [
            (NBD_REPLY_TYPE_ERROR, &[0, 0, 0, 0, 0, 0][..]),
            (NBD_REPLY_TYPE_ERROR, &[0, 0, 0, 5, 0, 2, b'x']),
            ((1 << 15) | 99, &[0, 0, 0, 5, 255, 255, b'x']),
            (NBD_REPLY_TYPE_ERROR_OFFSET, &[0, 0, 0, 5, 0, 2, b'x', 0, 0, 0, 0, 0, 0, 2]),
        ] {
            assert!(body(kind, payload).is_err(), "{kind} {payload:?}");
        }
        let mut long = vec![0, 0, 0, 5, 0x10, 1];
        long.resize(6 + 4097, b'x');
        assert!(body(NBD_REPLY_TYPE_ERROR, &long).is_err());
        assert_eq!((error_code(28), error_code(1234)), (ErrorCode::NoSpace, ErrorCode::Invalid));
    }
}

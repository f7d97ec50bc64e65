//! The transmission phase: requests in, replies out. Source: NBD doc/proto.md "Transmission".

use std::fmt;

use super::Reader;
use super::constants::*;
use crate::device::{Capabilities, Support};
use crate::extents::Extents;
use crate::segments::Segments;

/// The length of a request's header, in bytes.
pub const REQUEST_HEADER: usize = 28;
/// The length of a simple reply's header, in bytes.
pub const SIMPLE_REPLY_HEADER: usize = 16;
/// The length of a structured reply chunk's header, in bytes.
pub const CHUNK_HEADER: usize = 20;

/// A request's header, as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// `NBD_CMD_FLAG_*`
    pub flags: u16,
    /// `NBD_CMD_*`
    pub kind: u16,
    /// The client's name for the request.
    pub cookie: u64,
    /// Bytes from the start of the export.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Request {
    /// `None` where the bytes do not start with the request magic: the stream is lost then.
    pub fn parse(bytes: &[u8; REQUEST_HEADER]) -> Option<Request> {
        let mut reader = Reader(bytes);
        if reader.u32()? != NBD_REQUEST_MAGIC {
            return None;
        }
        Some(Request {
            flags: reader.u16()?,
            kind: reader.u16()?,
            cookie: reader.u64()?,
            offset: reader.u64()?,
            length: reader.u32()?,
        })
    }

    /// How many bytes of data follow the header.
    pub fn payload(&self) -> u32 {
        if self.kind == NBD_CMD_WRITE { self.length } else { 0 }
    }
}

/// A request that may be carried out. Offsets and lengths are in bytes and within the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields have the specification's names")]
pub enum Command {
    /// `NBD_CMD_READ`
    Read { offset: u64, length: u32 },
    /// `NBD_CMD_WRITE`, whose data is the request's payload
    Write { offset: u64, length: u32, fua: bool },
    /// `NBD_CMD_FLUSH`
    Flush,
    /// `NBD_CMD_TRIM`
    Trim { offset: u64, length: u64, fua: bool },
    /// `NBD_CMD_CACHE`
    Cache { offset: u64, length: u64 },
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes { offset: u64, length: u64, fua: bool, may_trim: bool, fast: bool },
    /// `NBD_CMD_BLOCK_STATUS`
    BlockStatus { offset: u64, length: u64, one: bool },
    /// Nothing to do: a request of no length.
    Nothing,
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the client sees.
    pub code: ErrorCode,
    /// For the log, and for clients with structured replies.
    pub why: RefusalReason,
}

/// The fact behind a [`Refusal`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each reads as its Display does")]
pub enum RefusalReason {
    UnknownCommand(u16),
    UnknownFlags(u16),
    FlagsNotForCommand { kind: u16, flags: u16 },
    NotOffered(u16),
    ReadOnly(u16),
    PastEnd { offset: u64, length: u32, size: u64 },
    Misaligned { offset: u64, length: u32, minimum: u32 },
    TooLarge { length: u32, maximum: u32 },
    FlushRange,
    NoStructuredReplies,
    NoMetaContext,
    Shutdown,
}

impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RefusalReason::UnknownCommand(kind) => write!(f, "unknown command ({kind})"),
            RefusalReason::UnknownFlags(flags) => write!(f, "unknown flag (0x{flags:x})"),
            RefusalReason::FlagsNotForCommand { kind, flags } => {
                write!(f, "{}: the flags 0x{flags:x} are for other commands or were not offered", command_name(*kind))
            }
            RefusalReason::NotOffered(kind) => write!(f, "{}: operation not supported", command_name(*kind)),
            RefusalReason::ReadOnly(kind) => write!(f, "{}: write request on readonly connection", command_name(*kind)),
            RefusalReason::PastEnd { offset, length, size } => {
                write!(
                    f,
                    "offset and count are out of range: offset={offset} count={length}, the export has {size} bytes"
                )
            }
            RefusalReason::Misaligned { offset, length, minimum } => {
                write!(f, "offset={offset} count={length} are not multiples of the minimum block size {minimum}")
            }
            RefusalReason::TooLarge { length, maximum } => {
                write!(f, "data request is too large ({length} > {maximum})")
            }
            RefusalReason::FlushRange => f.write_str("NBD_CMD_FLUSH: expecting offset and count = 0"),
            RefusalReason::NoStructuredReplies => f.write_str("structured replies was not negotiated"),
            RefusalReason::NoMetaContext => f.write_str("base:allocation was not negotiated"),
            RefusalReason::Shutdown => f.write_str("the server is ending"),
        }
    }
}

/// The specification's name of a request type.
pub fn command_name(kind: u16) -> &'static str {
    match kind {
        NBD_CMD_READ => "NBD_CMD_READ",
        NBD_CMD_WRITE => "NBD_CMD_WRITE",
        NBD_CMD_DISC => "NBD_CMD_DISC",
        NBD_CMD_FLUSH => "NBD_CMD_FLUSH",
        NBD_CMD_TRIM => "NBD_CMD_TRIM",
        NBD_CMD_CACHE => "NBD_CMD_CACHE",
        NBD_CMD_WRITE_ZEROES => "NBD_CMD_WRITE_ZEROES",
        NBD_CMD_BLOCK_STATUS => "NBD_CMD_BLOCK_STATUS",
        _ => "unknown command",
    }
}

/// What was agreed in the handshake: all that a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Agreement {
    /// The export's size in bytes.
    pub size: u64,
    /// What the device can do, as offered: read-only is in it.
    pub offered: Capabilities,
    /// `NBD_OPT_STRUCTURED_REPLY` was agreed.
    pub structured: bool,
    /// `base:allocation` was selected.
    pub base_allocation: bool,
}

/// The id of `base:allocation` in replies.
pub const BASE_ALLOCATION_ID: u32 = 1;

impl Agreement {
    /// The transmission flags of the export. Source: NBD proto.md "Transmission flags".
    pub fn flags(&self, multi_conn: bool) -> u16 {
        let offered = &self.offered;
        let when = |yes: bool, flag: u16| if yes { flag } else { 0 };
        NBD_FLAG_HAS_FLAGS
            | when(!offered.write, NBD_FLAG_READ_ONLY)
            | when(offered.flush, NBD_FLAG_SEND_FLUSH)
            | when(offered.fua != Support::None, NBD_FLAG_SEND_FUA)
            | when(offered.rotational, NBD_FLAG_ROTATIONAL)
            | when(offered.trim, NBD_FLAG_SEND_TRIM)
            | when(offered.zero != Support::None, NBD_FLAG_SEND_WRITE_ZEROES)
            | when(offered.fast_zero, NBD_FLAG_SEND_FAST_ZERO)
            | when(self.structured, NBD_FLAG_SEND_DF)
            | when(multi_conn && offered.multi_conn, NBD_FLAG_CAN_MULTI_CONN)
            | when(offered.cache != Support::None, NBD_FLAG_SEND_CACHE)
    }

    /// Whether `request` may be carried out, and as what. Source: NBD proto.md "Request types"; the order of the checks
    /// is nbdkit's (server/protocol.c `validate_request`).
    pub fn check(&self, request: &Request) -> Result<Command, Refusal> {
        let Request { flags, kind, offset, length, .. } = *request;
        let offered = &self.offered;
        let refuse = |code, why| Err(Refusal { code, why });
        let has = |flag: u16| flags & flag != 0;

        if kind > NBD_CMD_BLOCK_STATUS || kind == NBD_CMD_DISC {
            return refuse(ErrorCode::Invalid, RefusalReason::UnknownCommand(kind));
        }
        let writes = matches!(kind, NBD_CMD_WRITE | NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES);
        if writes && !offered.write {
            return refuse(ErrorCode::NotPermitted, RefusalReason::ReadOnly(kind));
        }
        if kind == NBD_CMD_FLUSH {
            if offset != 0 || length != 0 {
                return refuse(ErrorCode::Invalid, RefusalReason::FlushRange);
            }
        } else if offset.checked_add(u64::from(length)).is_none_or(|end| end > self.size) {
            let past_end = RefusalReason::PastEnd { offset, length, size: self.size };
            let no_space = matches!(kind, NBD_CMD_WRITE | NBD_CMD_WRITE_ZEROES);
            return refuse(if no_space { ErrorCode::NoSpace } else { ErrorCode::Invalid }, past_end);
        }

        const KNOWN: u16 =
            NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_DF | NBD_CMD_FLAG_REQ_ONE | NBD_CMD_FLAG_FAST_ZERO;
        if flags & !KNOWN != 0 {
            return refuse(ErrorCode::Invalid, RefusalReason::UnknownFlags(flags & !KNOWN));
        }
        // FUA is valid for every command once offered; it means nothing to those that do not write.
        let mut allowed = if offered.fua != Support::None { NBD_CMD_FLAG_FUA } else { 0 };
        match kind {
            NBD_CMD_READ if self.structured => allowed |= NBD_CMD_FLAG_DF,
            NBD_CMD_WRITE_ZEROES => {
                allowed |= NBD_CMD_FLAG_NO_HOLE | if offered.fast_zero { NBD_CMD_FLAG_FAST_ZERO } else { 0 }
            }
            NBD_CMD_BLOCK_STATUS => allowed |= NBD_CMD_FLAG_REQ_ONE,
            _ => {}
        }
        if flags & !allowed != 0 {
            let why = RefusalReason::FlagsNotForCommand { kind, flags: flags & !allowed };
            return refuse(ErrorCode::Invalid, why);
        }

        let is_offered = match kind {
            NBD_CMD_FLUSH => offered.flush,
            NBD_CMD_TRIM => offered.trim,
            NBD_CMD_CACHE => offered.cache != Support::None,
            NBD_CMD_WRITE_ZEROES => offered.zero != Support::None,
            _ => true,
        };
        if !is_offered {
            return refuse(ErrorCode::Invalid, RefusalReason::NotOffered(kind));
        }
        if kind == NBD_CMD_BLOCK_STATUS && !self.structured {
            return refuse(ErrorCode::Invalid, RefusalReason::NoStructuredReplies);
        }
        if kind == NBD_CMD_BLOCK_STATUS && !self.base_allocation {
            return refuse(ErrorCode::Invalid, RefusalReason::NoMetaContext);
        }
        let limits = offered.block_size;
        if matches!(kind, NBD_CMD_READ | NBD_CMD_WRITE) {
            let maximum = limits.map_or(MAX_PAYLOAD, |limits| limits.maximum.min(MAX_PAYLOAD));
            if length > maximum {
                let code = if has(NBD_CMD_FLAG_DF) { ErrorCode::Overflow } else { ErrorCode::Invalid };
                return refuse(code, RefusalReason::TooLarge { length, maximum });
            }
        }
        let minimum = limits.map_or(1, |limits| limits.minimum.max(1));
        if offset % u64::from(minimum) != 0 || length % minimum != 0 {
            return refuse(ErrorCode::Invalid, RefusalReason::Misaligned { offset, length, minimum });
        }
        if kind == NBD_CMD_BLOCK_STATUS && length == 0 {
            return refuse(ErrorCode::Invalid, RefusalReason::PastEnd { offset, length, size: self.size });
        }

        let fua = has(NBD_CMD_FLAG_FUA);
        let long = u64::from(length);
        Ok(match kind {
            NBD_CMD_FLUSH => Command::Flush,
            // A read of nothing still has a reply with (no) data.
            NBD_CMD_READ => Command::Read { offset, length },
            _ if length == 0 => Command::Nothing,
            NBD_CMD_WRITE => Command::Write { offset, length, fua },
            NBD_CMD_TRIM => Command::Trim { offset, length: long, fua },
            NBD_CMD_CACHE => Command::Cache { offset, length: long },
            NBD_CMD_WRITE_ZEROES => Command::WriteZeroes {
                offset,
                length: long,
                fua,
                may_trim: !has(NBD_CMD_FLAG_NO_HOLE),
                fast: has(NBD_CMD_FLAG_FAST_ZERO),
            },
            _ => Command::BlockStatus { offset, length: long, one: has(NBD_CMD_FLAG_REQ_ONE) },
        })
    }
}

/// A simple reply's header: `error` is 0 or an [`ErrorCode`].
pub fn simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_REPLY_HEADER] {
    let mut bytes = [0; SIMPLE_REPLY_HEADER];
    bytes[..4].copy_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// A structured reply chunk's header, the last of its reply.
pub fn final_chunk(kind: u16, cookie: u64, length: u32) -> [u8; CHUNK_HEADER] {
    let mut bytes = [0; CHUNK_HEADER];
    bytes[..4].copy_from_slice(&NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&NBD_REPLY_FLAG_DONE.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Appends what precedes `length` bytes of read data at `offset`.
pub fn read_header(out: &mut Segments, structured: bool, cookie: u64, offset: u64, length: u32) {
    if structured && length == 0 {
        // A chunk of data has at least one byte.
        out.extend(&final_chunk(NBD_REPLY_TYPE_NONE, cookie, 0));
    } else if structured {
        // At most MAX_PAYLOAD, so the sum fits.
        out.extend(&final_chunk(NBD_REPLY_TYPE_OFFSET_DATA, cookie, length + 8));
        out.extend(&offset.to_be_bytes());
    } else {
        out.extend(&simple_reply(0, cookie));
    }
}

/// Appends the reply to a request that succeeded and has no data.
pub fn done(out: &mut Segments, cookie: u64) {
    out.extend(&simple_reply(0, cookie));
}

/// Appends a `base:allocation` chunk. Extents are at most 2^32 - 1 bytes long, as requests are.
pub fn block_status(out: &mut Segments, cookie: u64, extents: &Extents) {
    let list = extents.list();
    out.extend(&final_chunk(NBD_REPLY_TYPE_BLOCK_STATUS, cookie, 4 + 8 * list.len() as u32));
    out.extend(&BASE_ALLOCATION_ID.to_be_bytes());
    for extent in list {
        out.extend(&(extent.length as u32).to_be_bytes());
        out.extend(&extent.flags.to_be_bytes());
    }
}

/// Appends the reply to a request that failed: with `why`, where the client can take it.
pub fn error(out: &mut Segments, structured: bool, cookie: u64, code: ErrorCode, why: &str) {
    if !structured {
        out.extend(&simple_reply(code.wire(), cookie));
        return;
    }
    let mut end = why.len().min(NBD_MAX_STRING);
    while !why.is_char_boundary(end) {
        end -= 1;
    }
    out.extend(&final_chunk(NBD_REPLY_TYPE_ERROR, cookie, 6 + end as u32));
    out.extend(&code.wire().to_be_bytes());
    out.extend(&(end as u16).to_be_bytes());
    out.extend(&why.as_bytes()[..end]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::BlockSize;

    fn agreement() -> Agreement {
        let offered = Capabilities {
            write: true,
            flush: true,
            trim: true,
            zero: Support::Native,
            fast_zero: true,
            fua: Support::Native,
            cache: Support::Native,
            extents: true,
            block_size: Some(BlockSize { minimum: 512, preferred: 4096, maximum: 1 << 20 }),
            ..Capabilities::default()
        };
        Agreement { size: 1 << 20, offered, structured: true, base_allocation: true }
    }

    fn check(agreement: &Agreement, kind: u16, flags: u16, offset: u64, length: u32) -> Result<Command, ErrorCode> {
        let request = Request { flags, kind, cookie: 1, offset, length };
        agreement.check(&request).map_err(|refusal| refusal.code)
    }

    #[test]
    fn names_the_specifications_errors() {
        let all = agreement();
        let read_only = Agreement { offered: Capabilities::default(), ..all };
        let invalid = Err(ErrorCode::Invalid);
        assert_eq!(check(&all, NBD_CMD_READ, 0, 1 << 20, 512), invalid);
        assert_eq!(check(&all, NBD_CMD_READ, 0, u64::MAX, 512), invalid);
        assert_eq!(check(&all, NBD_CMD_WRITE, 0, 1 << 20, 512), Err(ErrorCode::NoSpace));
        assert_eq!(check(&all, NBD_CMD_WRITE_ZEROES, 0, 1 << 20, 512), Err(ErrorCode::NoSpace));
        assert_eq!(check(&all, NBD_CMD_TRIM, 0, 1 << 20, 512), invalid);
        assert_eq!(check(&all, NBD_CMD_READ, 0, 1, 512), invalid);
        assert_eq!(check(&all, NBD_CMD_READ, 0, 0, 1), invalid);
        assert_eq!(check(&all, 99, 0, 0, 512), invalid);
        assert_eq!(check(&all, NBD_CMD_READ, 1 << 15, 0, 512), invalid);
        assert_eq!(check(&all, NBD_CMD_READ, NBD_CMD_FLAG_NO_HOLE, 0, 512), invalid);
        assert_eq!(check(&all, NBD_CMD_FLUSH, 0, 0, 512), invalid);
        assert_eq!(check(&all, NBD_CMD_BLOCK_STATUS, 0, 0, 0), invalid);
        assert_eq!(check(&read_only, NBD_CMD_WRITE, 0, 0, 512), Err(ErrorCode::NotPermitted));
        assert_eq!(check(&read_only, NBD_CMD_TRIM, 0, 0, 512), Err(ErrorCode::NotPermitted));
        assert_eq!(check(&read_only, NBD_CMD_FLUSH, 0, 0, 0), invalid);
        assert_eq!(check(&read_only, NBD_CMD_READ, NBD_CMD_FLAG_FUA, 0, 512), invalid);
        assert_eq!(check(&Agreement { structured: false, ..all }, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 512), invalid);
        assert_eq!(check(&Agreement { base_allocation: false, ..all }, NBD_CMD_BLOCK_STATUS, 0, 0, 512), invalid);
    }

    #[test]
    fn too_much_data_is_refused_and_a_long_range_without_data_is_not() {
        let all = Agreement { size: 1 << 30, ..agreement() };
        assert_eq!(check(&all, NBD_CMD_READ, 0, 0, (1 << 20) + 512), Err(ErrorCode::Invalid));
        assert_eq!(check(&all, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, (1 << 20) + 512), Err(ErrorCode::Overflow));
        let long = check(&all, NBD_CMD_TRIM, 0, 0, 1 << 30);
        assert_eq!(long, Ok(Command::Trim { offset: 0, length: 1 << 30, fua: false }));
    }

    #[test]
    fn an_error_message_is_cut_between_characters() {
        let mut out = Segments::default();
        let why = "é".repeat(NBD_MAX_STRING);
        error(&mut out, true, 7, ErrorCode::Io, &format!("x{why}"));
        assert_eq!(out.len(), CHUNK_HEADER + 6 + NBD_MAX_STRING - 1);
    }
}

//! The transmission phase: requests, and what they are checked against. Source: NBD doc/proto.md "Transmission"; extended
//! headers on the document's branch extension-ext-header.

use std::fmt;

use super::Reader;
use super::constants::*;
use crate::device::{BlockSize, Capabilities, Support};

/// The length of a request's header, in bytes.
pub const REQUEST_HEADER: usize = 28;
/// The length of a request's header where extended headers were agreed on, in bytes.
pub const EXTENDED_REQUEST_HEADER: usize = 32;

/// How messages look in the transmission phase, from the oldest on. Which it is was agreed in the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Headers {
    /// Compact requests and simple replies.
    #[default]
    Simple,
    /// Compact requests, and replies in chunks where they have more to say than a simple reply can.
    Structured,
    /// Extended requests, with 64-bit lengths, and all replies in extended chunks.
    Extended,
}

impl Headers {
    /// The length of a request's header, in bytes.
    pub fn request_length(self) -> usize {
        if self == Headers::Extended { EXTENDED_REQUEST_HEADER } else { REQUEST_HEADER }
    }
}

/// Metadata contexts that were selected, by number: 0 is `base:allocation`, the device's own follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contexts(u32);

/// The name of context number 0.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// How many contexts there may be, with `base:allocation`.
pub const MAX_CONTEXTS: u32 = 32;

impl Contexts {
    /// `base:allocation` and nothing else.
    pub const BASE_ALLOCATION: Contexts = Contexts(1);

    /// Selects number `context`. `false` if it was selected already, or there can be no such context.
    pub fn select(&mut self, context: u32) -> bool {
        let bit = 1u32.checked_shl(context).unwrap_or(0);
        let fresh = bit & !self.0;
        self.0 |= fresh;
        fresh != 0
    }

    /// Whether nothing was selected.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many were selected.
    pub fn count(self) -> usize {
        self.0.count_ones() as usize
    }

    /// What was selected, in order.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        (0..MAX_CONTEXTS).filter(move |context| self.0 & (1 << context) != 0)
    }

    /// The id of number `context` on the wire.
    pub fn id(context: u32) -> u32 {
        context + 1
    }
}

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
    /// Bytes: of the payload, where there is one, else of the export.
    pub length: u64,
}

impl Request {
    /// Reads [`Headers::request_length`] bytes. `None` where they are fewer or do not start with the request magic: the stream
    /// is lost then.
    pub fn parse(headers: Headers, bytes: &[u8]) -> Option<Request> {
        let extended = headers == Headers::Extended;
        let mut reader = Reader(bytes);
        if reader.u32()? != if extended { NBD_EXTENDED_REQUEST_MAGIC } else { NBD_REQUEST_MAGIC } {
            return None;
        }
        Some(Request {
            flags: reader.u16()?,
            kind: reader.u16()?,
            cookie: reader.u64()?,
            offset: reader.u64()?,
            length: if extended { reader.u64()? } else { u64::from(reader.u32()?) },
        })
    }

    /// How many bytes of data follow the header.
    pub fn payload(&self, headers: Headers) -> u64 {
        // A write has some in any case: QEMU 10 does not set the flag, although it must be set, and sends the data.
        let says_so = headers == Headers::Extended && self.flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0;
        if self.kind == NBD_CMD_WRITE || says_so { self.length } else { 0 }
    }
}

/// A request that may be carried out. Offsets and lengths are in bytes and within the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields have the specification's names")]
pub enum Command {
    /// `NBD_CMD_READ`; `whole` is `NBD_CMD_FLAG_DF`
    Read { offset: u64, length: u32, whole: bool },
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
    BlockStatus { offset: u64, length: u64, one: bool, contexts: Contexts },
    /// `NBD_CMD_BLOCK_STATUS` with a payload that has the rest of it: see [`Agreement::narrow`]
    NarrowBlockStatus { offset: u64, one: bool },
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
    PastEnd { offset: u64, length: u64, size: u64 },
    Misaligned { offset: u64, length: u64, minimum: u32 },
    TooLarge { length: u64, maximum: u32 },
    UnexpectedPayload(u16),
    WrongContexts,
    FlushRange,
    NoStructuredReplies,
    NoMetaContext,
    NoMemory(u64),
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
            RefusalReason::UnexpectedPayload(kind) => write!(f, "{}: takes no payload", command_name(*kind)),
            RefusalReason::WrongContexts => {
                f.write_str("NBD_CMD_BLOCK_STATUS: the payload must be a length and ids that were selected, each once")
            }
            RefusalReason::NoMemory(length) => write!(f, "out of memory for {length} bytes of data"),
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

/// The payload of a block status request without ids, in bytes.
const NARROW_PAYLOAD: u64 = 8;

/// What was agreed in the handshake: all that a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Agreement {
    /// The export's size in bytes.
    pub size: u64,
    /// What the device can do, as offered: read-only is in it.
    pub offered: Capabilities,
    /// The block sizes in it are advice, which requests need not keep to.
    pub takes_any_size: bool,
    /// By `NBD_OPT_STRUCTURED_REPLY` or `NBD_OPT_EXTENDED_HEADERS`.
    pub headers: Headers,
    /// By `NBD_OPT_SET_META_CONTEXT`.
    pub contexts: Contexts,
}

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
            | when(self.headers >= Headers::Structured, NBD_FLAG_SEND_DF)
            | when(multi_conn && offered.multi_conn, NBD_FLAG_CAN_MULTI_CONN)
            | when(offered.cache != Support::None, NBD_FLAG_SEND_CACHE)
            | when(self.may_narrow(), NBD_FLAG_BLOCK_STATUS_PAYLOAD)
    }

    /// Whether `request` may be carried out, and as what. Source: NBD proto.md "Request types"; the order of the checks
    /// is nbdkit's (server/protocol.c `validate_request`).
    pub fn check(&self, request: &Request) -> Result<Command, Refusal> {
        let Request { flags, kind, offset, length, .. } = *request;
        let offered = &self.offered;
        let refuse = |code, why| Err(Refusal { code, why });
        let has = |bit: u16| flags & bit != 0;
        // Its length is that of its payload.
        let narrows = kind == NBD_CMD_BLOCK_STATUS && request.payload(self.headers) > 0;

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
        } else if !narrows && !self.is_within(offset, length) {
            let past_end = RefusalReason::PastEnd { offset, length, size: self.size };
            let no_space = matches!(kind, NBD_CMD_WRITE | NBD_CMD_WRITE_ZEROES);
            return refuse(if no_space { ErrorCode::NoSpace } else { ErrorCode::Invalid }, past_end);
        }

        let mut known =
            NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_DF | NBD_CMD_FLAG_REQ_ONE | NBD_CMD_FLAG_FAST_ZERO;
        if self.headers == Headers::Extended {
            known |= NBD_CMD_FLAG_PAYLOAD_LEN;
        }
        if flags & !known != 0 {
            return refuse(ErrorCode::Invalid, RefusalReason::UnknownFlags(flags & !known));
        }
        // FUA is valid for every command once offered; it means nothing to those that do not write.
        let mut allowed = if offered.fua != Support::None { NBD_CMD_FLAG_FUA } else { 0 };
        if self.headers == Headers::Extended {
            allowed |= NBD_CMD_FLAG_PAYLOAD_LEN;
            match (kind, has(NBD_CMD_FLAG_PAYLOAD_LEN)) {
                (NBD_CMD_WRITE, _) | (_, false) => {}
                (NBD_CMD_BLOCK_STATUS, true) if self.may_narrow() => {}
                (_, true) => return refuse(ErrorCode::Invalid, RefusalReason::UnexpectedPayload(kind)),
            }
        }
        match kind {
            NBD_CMD_READ if self.headers >= Headers::Structured => allowed |= NBD_CMD_FLAG_DF,
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
        if kind == NBD_CMD_BLOCK_STATUS && self.headers < Headers::Structured {
            return refuse(ErrorCode::Invalid, RefusalReason::NoStructuredReplies);
        }
        if kind == NBD_CMD_BLOCK_STATUS && self.contexts.is_empty() {
            return refuse(ErrorCode::Invalid, RefusalReason::NoMetaContext);
        }
        if matches!(kind, NBD_CMD_READ | NBD_CMD_WRITE) {
            let maximum = self.limits().map_or(MAX_PAYLOAD, |limits| limits.maximum.min(MAX_PAYLOAD));
            if length > u64::from(maximum) {
                let code = if has(NBD_CMD_FLAG_DF) { ErrorCode::Overflow } else { ErrorCode::Invalid };
                return refuse(code, RefusalReason::TooLarge { length, maximum });
            }
        }
        if narrows {
            if length > NARROW_PAYLOAD + 4 * self.contexts.count() as u64 {
                return refuse(ErrorCode::Invalid, RefusalReason::WrongContexts);
            }
            return Ok(Command::NarrowBlockStatus { offset, one: has(NBD_CMD_FLAG_REQ_ONE) });
        }
        self.check_alignment(offset, length)?;

        let fua = has(NBD_CMD_FLAG_FUA);
        // Of a read or a write it was checked that it fits.
        let short = u32::try_from(length).unwrap_or(u32::MAX);
        Ok(match kind {
            NBD_CMD_FLUSH => Command::Flush,
            NBD_CMD_READ => Command::Read { offset, length: short, whole: has(NBD_CMD_FLAG_DF) },
            NBD_CMD_WRITE => Command::Write { offset, length: short, fua },
            NBD_CMD_TRIM => Command::Trim { offset, length, fua },
            NBD_CMD_CACHE => Command::Cache { offset, length },
            NBD_CMD_WRITE_ZEROES => Command::WriteZeroes {
                offset,
                length,
                fua,
                may_trim: !has(NBD_CMD_FLAG_NO_HOLE),
                fast: has(NBD_CMD_FLAG_FAST_ZERO),
            },
            _ => Command::BlockStatus { offset, length, one: has(NBD_CMD_FLAG_REQ_ONE), contexts: self.contexts },
        })
    }

    /// Whether a block status request may have a payload.
    fn may_narrow(&self) -> bool {
        self.headers == Headers::Extended && !self.contexts.is_empty()
    }

    /// What a [`Command::NarrowBlockStatus`] with this payload asks for.
    pub fn narrow(&self, offset: u64, one: bool, payload: &[u8]) -> Result<Command, Refusal> {
        let wrong = Refusal { code: ErrorCode::Invalid, why: RefusalReason::WrongContexts };
        let mut reader = Reader(payload);
        let Some(length) = reader.u64() else { return Err(wrong) };
        let mut contexts = Contexts::default();
        while let Some(id) = reader.u32() {
            let context = self.contexts.iter().find(|&context| Contexts::id(context) == id);
            if !context.is_some_and(|context| contexts.select(context)) {
                return Err(wrong);
            }
        }
        if !reader.0.is_empty() || contexts.is_empty() {
            return Err(wrong);
        }
        if !self.is_within(offset, length) {
            let why = RefusalReason::PastEnd { offset, length, size: self.size };
            return Err(Refusal { code: ErrorCode::Invalid, why });
        }
        self.check_alignment(offset, length)?;
        Ok(Command::BlockStatus { offset, length, one, contexts })
    }

    /// Whether these bytes are some, and of the export. What becomes of a request of no length is left to servers; nbdkit
    /// refuses it (server/backend.c `backend_valid_range`), and its clients' tests count on that.
    fn is_within(&self, offset: u64, length: u64) -> bool {
        length > 0 && offset.checked_add(length).is_some_and(|end| end <= self.size)
    }

    /// The block sizes that requests must keep to.
    fn limits(&self) -> Option<BlockSize> {
        self.offered.block_size.filter(|_| !self.takes_any_size)
    }

    fn check_alignment(&self, offset: u64, length: u64) -> Result<(), Refusal> {
        let minimum = self.limits().map_or(1, |limits| limits.minimum.max(1));
        if offset.is_multiple_of(u64::from(minimum)) && length.is_multiple_of(u64::from(minimum)) {
            return Ok(());
        }
        let why = RefusalReason::Misaligned { offset, length, minimum };
        Err(Refusal { code: ErrorCode::Invalid, why })
    }

    /// What the offsets and lengths of replies are multiples of, in bytes, where those of the request are.
    pub fn minimum_block(&self) -> u32 {
        self.offered.block_size.map_or(1, |limits| limits.minimum.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        Agreement {
            size: 1 << 20,
            offered,
            takes_any_size: false,
            headers: Headers::Structured,
            contexts: Contexts::BASE_ALLOCATION,
        }
    }

    fn check(agreement: &Agreement, kind: u16, flags: u16, offset: u64, length: u64) -> Result<Command, ErrorCode> {
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
        for kind in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_BLOCK_STATUS] {
            assert_eq!(check(&all, kind, 0, 0, 0), invalid);
        }
        for kind in [NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES] {
            assert_eq!(check(&all, kind, 0, 0, 0), Err(ErrorCode::NoSpace));
        }
        assert_eq!(check(&read_only, NBD_CMD_WRITE, 0, 0, 512), Err(ErrorCode::NotPermitted));
        assert_eq!(check(&read_only, NBD_CMD_TRIM, 0, 0, 512), Err(ErrorCode::NotPermitted));
        assert_eq!(check(&read_only, NBD_CMD_FLUSH, 0, 0, 0), invalid);
        assert_eq!(check(&read_only, NBD_CMD_READ, NBD_CMD_FLAG_FUA, 0, 512), invalid);
        assert_eq!(
            check(&Agreement { headers: Headers::Simple, ..all }, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 512),
            invalid
        );
        assert_eq!(
            check(&Agreement { contexts: Contexts::default(), ..all }, NBD_CMD_BLOCK_STATUS, 0, 0, 512),
            invalid
        );
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
    fn block_sizes_that_are_advice_refuse_nothing() {
        let all = Agreement { size: 1 << 30, takes_any_size: true, ..agreement() };
        assert_eq!(
            check(&all, NBD_CMD_READ, 0, 1, (1 << 20) + 1),
            Ok(Command::Read { offset: 1, length: (1 << 20) + 1, whole: false })
        );
        assert_eq!(check(&all, NBD_CMD_READ, 0, 0, u64::from(MAX_PAYLOAD) + 1), Err(ErrorCode::Invalid));
        assert_eq!(all.minimum_block(), 512);
    }
}

//! The numbers of the specification, under the names that it gives them. Source: NBD doc/proto.md "Values".

/// `NBDMAGIC`, the first eight bytes of every server.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, the second eight bytes of a newstyle server, and the start of every option.
pub const NBD_OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// The second eight bytes of an oldstyle server (`cliserv_magic`).
pub const NBD_OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// The start of every option reply.
pub const NBD_OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// The start of every request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// The start of every simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// The start of every structured reply chunk.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// The start of every request, once extended headers are agreed on.
pub const NBD_EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// The start of every reply chunk, once extended headers are agreed on.
pub const NBD_EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flag, both sides.
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag, both sides: no 124 zeroes after `NBD_OPT_EXPORT_NAME`.
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;

/// Transmission flag.
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag.
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag.
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag.
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag.
pub const NBD_FLAG_ROTATIONAL: u16 = 1 << 4;
/// Transmission flag.
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag.
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag.
pub const NBD_FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag.
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag.
pub const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag.
pub const NBD_FLAG_SEND_FAST_ZERO: u16 = 1 << 11;
/// Transmission flag: a block status request may name the contexts that it asks for.
pub const NBD_FLAG_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

/// Option.
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// Option.
pub const NBD_OPT_ABORT: u32 = 2;
/// Option.
pub const NBD_OPT_LIST: u32 = 3;
/// Option.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Option.
pub const NBD_OPT_INFO: u32 = 6;
/// Option.
pub const NBD_OPT_GO: u32 = 7;
/// Option.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
/// Option.
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
/// Option.
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
/// Option.
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

/// Option reply.
pub const NBD_REP_ACK: u32 = 1;
/// Option reply.
pub const NBD_REP_SERVER: u32 = 2;
/// Option reply.
pub const NBD_REP_INFO: u32 = 3;
/// Option reply.
pub const NBD_REP_META_CONTEXT: u32 = 4;
/// Option reply: the option is not known.
pub const NBD_REP_ERR_UNSUP: u32 = (1 << 31) | 1;
/// Option reply: the server's policy forbids it.
pub const NBD_REP_ERR_POLICY: u32 = (1 << 31) | 2;
/// Option reply: the option's data is malformed.
pub const NBD_REP_ERR_INVALID: u32 = (1 << 31) | 3;
/// Option reply: not on this platform, or failed on it.
pub const NBD_REP_ERR_PLATFORM: u32 = (1 << 31) | 4;
/// Option reply: TLS first.
pub const NBD_REP_ERR_TLS_REQD: u32 = (1 << 31) | 5;
/// Option reply: no such export.
pub const NBD_REP_ERR_UNKNOWN: u32 = (1 << 31) | 6;
/// Option reply: the server is ending.
pub const NBD_REP_ERR_SHUTDOWN: u32 = (1 << 31) | 7;
/// Option reply: the client must respect block sizes.
pub const NBD_REP_ERR_BLOCK_SIZE_REQD: u32 = (1 << 31) | 8;
/// Option reply: the option's data is longer than the server takes.
pub const NBD_REP_ERR_TOO_BIG: u32 = (1 << 31) | 9;
/// Option reply: not without extended headers, or not with them.
pub const NBD_REP_ERR_EXT_HEADER_REQD: u32 = (1 << 31) | 10;

/// Information type.
pub const NBD_INFO_EXPORT: u16 = 0;
/// Information type.
pub const NBD_INFO_NAME: u16 = 1;
/// Information type.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// Information type.
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// Request type.
pub const NBD_CMD_READ: u16 = 0;
/// Request type.
pub const NBD_CMD_WRITE: u16 = 1;
/// Request type.
pub const NBD_CMD_DISC: u16 = 2;
/// Request type.
pub const NBD_CMD_FLUSH: u16 = 3;
/// Request type.
pub const NBD_CMD_TRIM: u16 = 4;
/// Request type.
pub const NBD_CMD_CACHE: u16 = 5;
/// Request type.
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;
/// Request type.
pub const NBD_CMD_BLOCK_STATUS: u16 = 7;

/// Command flag.
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag, write zeroes only.
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag, read only.
pub const NBD_CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag, block status only.
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag, write zeroes only.
pub const NBD_CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Command flag, with extended headers only: the header's length is that of a payload.
pub const NBD_CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Structured reply flag: the last chunk of a reply.
pub const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;
/// Chunk type.
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
/// Chunk type.
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Chunk type.
pub const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Chunk type.
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Chunk type, with extended headers only.
pub const NBD_REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
/// Chunk type.
pub const NBD_REPLY_TYPE_ERROR: u16 = (1 << 15) | 1;
/// Chunk type.
pub const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = (1 << 15) | 2;

/// The longest string on the wire: export names, descriptions, queries, error messages. Bytes.
pub const NBD_MAX_STRING: usize = 4096;
/// The most data that a read or a write may carry, in bytes: nbdkit's limit, twice that of the specification's advice.
pub const MAX_PAYLOAD: u32 = 64 * 1024 * 1024;

/// What a request failed with, as the client sees it. Source: NBD proto.md "Error values".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// `NBD_EPERM`: also a write to a read-only export.
    NotPermitted = 1,
    /// `NBD_EIO`.
    Io = 5,
    /// `NBD_ENOMEM`.
    NoMemory = 12,
    /// `NBD_EINVAL`.
    Invalid = 22,
    /// `NBD_ENOSPC`: also a write past the end.
    NoSpace = 28,
    /// `NBD_EOVERFLOW`: more data than one chunk can carry.
    Overflow = 75,
    /// `NBD_ENOTSUP`.
    NotSupported = 95,
    /// `NBD_ESHUTDOWN`: the server is ending.
    Shutdown = 108,
}

impl ErrorCode {
    /// The nearest code for a system error. Source: nbdkit server/protocol.c `nbd_errno`.
    pub fn from_io(error: &std::io::Error) -> ErrorCode {
        use nix::errno::Errno;
        let Some(raw) = error.raw_os_error() else { return ErrorCode::Io };
        match Errno::from_raw(raw) {
            Errno::EROFS | Errno::EPERM => ErrorCode::NotPermitted,
            Errno::ENOMEM => ErrorCode::NoMemory,
            Errno::EDQUOT | Errno::EFBIG | Errno::ENOSPC => ErrorCode::NoSpace,
            Errno::EINVAL => ErrorCode::Invalid,
            Errno::EOVERFLOW => ErrorCode::Overflow,
            Errno::EOPNOTSUPP => ErrorCode::NotSupported,
            Errno::ESHUTDOWN => ErrorCode::Shutdown,
            _ => ErrorCode::Io,
        }
    }

    /// The number on the wire.
    pub fn wire(self) -> u32 {
        self as u32
    }
}

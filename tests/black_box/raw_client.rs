//! A client that speaks the protocol byte by byte, written from the specification alone so that it cannot share a mistake
//! with the server. It checks what any client may rely on, and panics where the server breaks it.
//! Source: NBD proto.md.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::harness::DEADLINE;

pub const NBD_FLAG_FIXED_NEWSTYLE: u32 = 1;
pub const NBD_FLAG_NO_ZEROES: u32 = 2;

pub const NBD_OPT_EXPORT_NAME: u32 = 1;
pub const NBD_OPT_ABORT: u32 = 2;
pub const NBD_OPT_LIST: u32 = 3;
pub const NBD_OPT_STARTTLS: u32 = 5;
pub const NBD_OPT_INFO: u32 = 6;
pub const NBD_OPT_GO: u32 = 7;
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;

pub const NBD_REP_ACK: u32 = 1;
pub const NBD_REP_SERVER: u32 = 2;
pub const NBD_REP_INFO: u32 = 3;
pub const NBD_REP_META_CONTEXT: u32 = 4;
pub const NBD_REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub const NBD_REP_ERR_POLICY: u32 = (1 << 31) + 2;
pub const NBD_REP_ERR_INVALID: u32 = (1 << 31) + 3;

pub const NBD_INFO_EXPORT: u16 = 0;
pub const NBD_INFO_NAME: u16 = 1;
pub const NBD_INFO_DESCRIPTION: u16 = 2;
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub const NBD_FLAG_SEND_DF: u16 = 1 << 7;
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
pub const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;
pub const NBD_FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

pub const NBD_CMD_READ: u16 = 0;
pub const NBD_CMD_WRITE: u16 = 1;
pub const NBD_CMD_DISC: u16 = 2;
pub const NBD_CMD_FLUSH: u16 = 3;
pub const NBD_CMD_TRIM: u16 = 4;
pub const NBD_CMD_CACHE: u16 = 5;
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;
pub const NBD_CMD_BLOCK_STATUS: u16 = 7;

pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;
pub const NBD_CMD_FLAG_DF: u16 = 1 << 2;
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
pub const NBD_CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

pub const NBD_SUCCESS: u32 = 0;
pub const NBD_EPERM: u32 = 1;
pub const NBD_ENOMEM: u32 = 12;
pub const NBD_EINVAL: u32 = 22;
pub const NBD_ENOSPC: u32 = 28;
pub const NBD_EOVERFLOW: u32 = 75;
pub const NBD_ENOTSUP: u32 = 95;
pub const NBD_ESHUTDOWN: u32 = 108;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

const NBD_REPLY_FLAG_DONE: u16 = 1;
const NBD_REPLY_TYPE_NONE: u16 = 0;
const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
const NBD_REPLY_TYPE_ERROR: u16 = (1 << 15) + 1;
const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = (1 << 15) + 2;

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    pub kind: u32,
    pub data: Vec<u8>,
}

/// What the server said of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    pub size: u64,
    pub flags: u16,
    pub name: Option<Vec<u8>>,
    pub description: Option<Vec<u8>>,
    /// Minimum, preferred, maximum.
    pub block_size: Option<[u32; 3]>,
}

/// The whole reply to a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    /// `NBD_SUCCESS` or an `NBD_E*`.
    pub error: u32,
    pub data: Vec<u8>,
    /// Length and flags of each block that block status described.
    pub blocks: Vec<(u32, u32)>,
    /// How many chunks with data or holes it took; 0 for a simple reply.
    pub content_chunks: usize,
}

#[derive(Debug)]
struct Pending {
    kind: u16,
    flags: u16,
    offset: u64,
    covered: Vec<(u64, u64)>,
    reply: Reply,
}

/// A connection, and what it is waiting for.
#[derive(Debug)]
pub struct Client {
    pub socket: UnixStream,
    structured: bool,
    base_allocation: Option<u32>,
    pending: HashMap<u64, Pending>,
    next_cookie: u64,
    pub export: Export,
}

impl Client {
    pub fn connect(path: &Path) -> Client {
        Client::over(UnixStream::connect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    /// A client at a socket that is connected already.
    pub fn over(socket: UnixStream) -> Client {
        socket.set_read_timeout(Some(DEADLINE)).expect("a deadline is not zero");
        socket.set_write_timeout(Some(DEADLINE)).expect("a deadline is not zero");
        Client {
            socket,
            structured: false,
            base_allocation: None,
            pending: HashMap::new(),
            next_cookie: 0x1122_3344_5566_7700,
            export: Export::default(),
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the server reads what it is sent");
    }

    pub fn receive(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.socket.read_exact(&mut bytes).unwrap_or_else(|error| panic!("{length} bytes from the server: {error}"));
        bytes
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.receive(2).try_into().expect("two bytes"))
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.receive(4).try_into().expect("four bytes"))
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.receive(8).try_into().expect("eight bytes"))
    }

    /// The server must have closed the connection, with nothing more to say.
    #[track_caller]
    pub fn expect_end(&mut self) {
        let mut byte = [0];
        match self.socket.read(&mut byte) {
            Ok(0) => (),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => (),
            other => panic!("the connection is not closed: {other:?} {byte:?}"),
        }
    }

    /// Reads the greeting; returns the handshake flags.
    pub fn greeting(&mut self) -> u16 {
        assert_eq!(self.u64(), NBDMAGIC);
        assert_eq!(self.u64(), IHAVEOPT);
        self.u16()
    }

    /// Greeting and client flags.
    pub fn start(&mut self) {
        self.start_with(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    }

    pub fn start_with(&mut self, client_flags: u32) {
        let flags = u32::from(self.greeting());
        assert_eq!(flags & client_flags, client_flags, "the server offers what the client wants");
        self.send(&client_flags.to_be_bytes());
    }

    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        self.send(&option_bytes(option, data));
    }

    /// One reply to this option.
    #[track_caller]
    pub fn option_reply(&mut self, option: u32) -> OptionReply {
        assert_eq!(self.u64(), NBD_REP_MAGIC);
        assert_eq!(self.u32(), option);
        let kind = self.u32();
        let length = self.u32();
        assert!(length <= 64 << 10, "an option reply of {length} bytes");
        OptionReply { kind, data: self.receive(length as usize) }
    }

    /// All replies to this option, with the last, which is an acknowledgement or an error.
    #[track_caller]
    pub fn option(&mut self, option: u32, data: &[u8]) -> (Vec<OptionReply>, u32) {
        self.send_option(option, data);
        self.option_replies(option)
    }

    #[track_caller]
    pub fn option_replies(&mut self, option: u32) -> (Vec<OptionReply>, u32) {
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply(option);
            if reply.kind == NBD_REP_ACK || reply.kind >= 1 << 31 {
                return (replies, reply.kind);
            }
            replies.push(reply);
        }
    }

    /// The option must be refused with this error.
    #[track_caller]
    pub fn expect_refused(&mut self, option: u32, data: &[u8], error: u32) {
        let (replies, last) = self.option(option, data);
        assert_eq!(last, error, "option {option} with {data:?}");
        assert!(replies.is_empty(), "an error comes alone: {replies:?}");
    }

    /// `NBD_OPT_INFO` or `NBD_OPT_GO` with information requests; the error where it is refused.
    #[track_caller]
    pub fn info(&mut self, option: u32, name: &[u8], requests: &[u16]) -> Result<Export, u32> {
        let (replies, last) = self.option(option, &info_bytes(name, requests));
        if last != NBD_REP_ACK {
            return Err(last);
        }
        let mut export = Export::default();
        let mut seen_export = false;
        for OptionReply { kind, data } in replies {
            assert_eq!(kind, NBD_REP_INFO);
            let (info, data) = data.split_at(2);
            match u16::from_be_bytes(info.try_into().expect("two bytes")) {
                NBD_INFO_EXPORT => {
                    assert!(!seen_export, "NBD_INFO_EXPORT comes once");
                    seen_export = true;
                    export.size = u64::from_be_bytes(data[..8].try_into().expect("eight bytes"));
                    export.flags = u16::from_be_bytes(data[8..].try_into().expect("two bytes"));
                }
                NBD_INFO_NAME => export.name = Some(data.to_vec()),
                NBD_INFO_DESCRIPTION => export.description = Some(data.to_vec()),
                NBD_INFO_BLOCK_SIZE => {
                    assert_eq!(data.len(), 12);
                    let one = |at: usize| u32::from_be_bytes(data[at..at + 4].try_into().expect("four bytes"));
                    export.block_size = Some([one(0), one(4), one(8)]);
                }
                other => panic!("an information nobody asked for: {other}"),
            }
        }
        assert!(seen_export, "NBD_INFO_EXPORT always comes");
        Ok(export)
    }

    /// Enters transmission.
    #[track_caller]
    pub fn go(&mut self, name: &[u8]) {
        self.export = self.info(NBD_OPT_GO, name, &[]).expect("the export is there");
    }

    #[track_caller]
    pub fn ask_for_structured_replies(&mut self) {
        assert_eq!(self.option(NBD_OPT_STRUCTURED_REPLY, b""), (vec![], NBD_REP_ACK));
        self.structured = true;
    }

    #[track_caller]
    pub fn ask_for_base_allocation(&mut self, name: &[u8]) {
        let (replies, last) = self.option(NBD_OPT_SET_META_CONTEXT, &context_bytes(name, &[b"base:allocation"]));
        assert_eq!(last, NBD_REP_ACK);
        assert_eq!(replies.len(), 1, "{replies:?}");
        assert_eq!(replies[0].kind, NBD_REP_META_CONTEXT);
        assert_eq!(&replies[0].data[4..], b"base:allocation");
        self.base_allocation = Some(u32::from_be_bytes(replies[0].data[..4].try_into().expect("four bytes")));
    }

    /// Notes a request and gives its header; the caller sends it, and a write's data after it.
    pub fn prepare(&mut self, kind: u16, flags: u16, offset: u64, length: u32) -> [u8; 28] {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let reply = Reply { cookie, ..Reply::default() };
        let mut pending = Pending { kind, flags, offset, covered: Vec::new(), reply };
        if kind == NBD_CMD_READ {
            // Another value than zero, so that a hole must be written.
            pending.reply.data = vec![0xee; length as usize];
        }
        self.pending.insert(cookie, pending);
        request_bytes(kind, flags, cookie, offset, length)
    }

    /// Sends a request without waiting for its reply; returns its cookie.
    pub fn request(&mut self, kind: u16, flags: u16, offset: u64, length: u32, data: &[u8]) -> u64 {
        let header = self.prepare(kind, flags, offset, length);
        self.send(&[&header, data].concat());
        self.next_cookie - 1
    }

    /// How many requests have no reply yet.
    pub fn unanswered(&self) -> usize {
        self.pending.len()
    }

    /// The next reply that is complete, whichever request it is for. `None` when the server has closed the connection
    /// between two replies.
    #[track_caller]
    pub fn next_reply(&mut self) -> Option<Reply> {
        loop {
            let mut magic = [0; 4];
            match self.socket.read(&mut magic[..1]) {
                Ok(1) => (),
                Ok(_) => return None,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("a reply, with {} requests open: {error}", self.pending.len()),
            }
            magic[1..].copy_from_slice(&self.receive(3));
            match u32::from_be_bytes(magic) {
                NBD_SIMPLE_REPLY_MAGIC => return Some(self.simple_reply()),
                NBD_STRUCTURED_REPLY_MAGIC => {
                    if let Some(reply) = self.chunk() {
                        return Some(reply);
                    }
                }
                other => panic!("not the magic of a reply: {other:#x}"),
            }
        }
    }

    fn simple_reply(&mut self) -> Reply {
        let error = self.u32();
        let cookie = self.u64();
        let mut pending = self.pending.remove(&cookie).expect("a reply is for a request, once");
        assert!(!self.structured || pending.kind != NBD_CMD_READ, "reads get structured replies once negotiated");
        assert!(pending.kind != NBD_CMD_BLOCK_STATUS || error != NBD_SUCCESS, "block status needs a structured reply");
        pending.reply.error = error;
        if error != NBD_SUCCESS {
            pending.reply.data.clear();
        } else if pending.kind == NBD_CMD_READ {
            let length = pending.reply.data.len();
            pending.reply.data = self.receive(length);
        }
        pending.reply
    }

    fn chunk(&mut self) -> Option<Reply> {
        assert!(self.structured, "structured replies were not negotiated");
        let flags = self.u16();
        let kind = self.u16();
        let cookie = self.u64();
        let length = self.u32() as usize;
        let payload = self.receive(length);
        let pending = self.pending.get_mut(&cookie).expect("a chunk is for a request that has no final chunk yet");
        let be64 = |bytes: &[u8]| u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"));
        let be32 = |bytes: &[u8]| u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"));
        match kind {
            NBD_REPLY_TYPE_NONE => {
                assert_eq!(length, 0);
                assert_ne!(flags & NBD_REPLY_FLAG_DONE, 0, "a chunk of nothing is the last");
            }
            NBD_REPLY_TYPE_OFFSET_DATA | NBD_REPLY_TYPE_OFFSET_HOLE => {
                assert_eq!(pending.kind, NBD_CMD_READ);
                let at = be64(&payload);
                let size = match kind {
                    NBD_REPLY_TYPE_OFFSET_DATA => payload.len() - 8,
                    _ => be32(&payload[8..]) as usize,
                };
                assert!(size > 0, "a content chunk describes at least a byte");
                let from = at.checked_sub(pending.offset).expect("content lies in the request") as usize;
                let target = pending.reply.data.get_mut(from..from + size).expect("content lies in the request");
                match kind {
                    NBD_REPLY_TYPE_OFFSET_DATA => target.copy_from_slice(&payload[8..]),
                    _ => target.fill(0),
                }
                let (start, end) = (from as u64, (from + size) as u64);
                let overlap = pending.covered.iter().any(|&(from, to)| start < to && from < end);
                assert!(!overlap, "content chunks do not overlap");
                pending.covered.push((start, end));
                pending.reply.content_chunks += 1;
                let df = pending.flags & NBD_CMD_FLAG_DF != 0;
                assert!(!df || pending.reply.content_chunks == 1, "DF allows one content chunk");
            }
            NBD_REPLY_TYPE_BLOCK_STATUS => {
                assert_eq!(pending.kind, NBD_CMD_BLOCK_STATUS);
                assert_eq!(Some(be32(&payload)), self.base_allocation, "the context that was negotiated");
                assert_eq!((payload.len() - 4) % 8, 0);
                let blocks = payload[4..].chunks(8).map(|block| (be32(block), be32(&block[4..])));
                pending.reply.blocks.extend(blocks);
            }
            NBD_REPLY_TYPE_ERROR | NBD_REPLY_TYPE_ERROR_OFFSET => {
                let message = usize::from(u16::from_be_bytes(payload[4..6].try_into().expect("two bytes")));
                let text = std::str::from_utf8(&payload[6..6 + message]).expect("an error message is UTF-8");
                assert!(!text.contains('\0'), "an error message has no NUL");
                let rest = if kind == NBD_REPLY_TYPE_ERROR { 0 } else { 8 };
                assert_eq!(payload.len(), 6 + message + rest);
                pending.reply.error = be32(&payload);
                assert_ne!(pending.reply.error, NBD_SUCCESS, "an error chunk has an error");
            }
            other => panic!("a chunk of unknown type {other}"),
        }
        if flags & NBD_REPLY_FLAG_DONE == 0 {
            return None;
        }
        let pending = self.pending.remove(&cookie).expect("it was there above");
        let mut reply = pending.reply;
        if reply.error != NBD_SUCCESS {
            reply.data.clear();
        } else {
            let covered: u64 = pending.covered.iter().map(|(from, to)| to - from).sum();
            assert_eq!(covered, reply.data.len() as u64, "all of the read is described");
        }
        Some(reply)
    }

    /// A request and its reply; no other request may be open.
    #[track_caller]
    pub fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u32) -> Reply {
        self.request(kind, flags, offset, length, b"");
        self.next_reply().expect("a reply")
    }

    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        let reply = self.ask(NBD_CMD_READ, 0, offset, length);
        assert_eq!(reply.error, NBD_SUCCESS, "read of {length} at {offset}");
        reply.data
    }

    /// Writes, and returns the error.
    #[track_caller]
    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        self.request(NBD_CMD_WRITE, flags, offset, data.len() as u32, data);
        self.next_reply().expect("a reply").error
    }

    /// The flags and lengths of a range.
    #[track_caller]
    pub fn blocks(&mut self, flags: u16, offset: u64, length: u32) -> Vec<(u32, u32)> {
        let reply = self.ask(NBD_CMD_BLOCK_STATUS, flags, offset, length);
        assert_eq!(reply.error, NBD_SUCCESS, "block status of {length} at {offset}");
        reply.blocks
    }

    /// The connection must still work.
    #[track_caller]
    pub fn expect_alive(&mut self) {
        self.read(0, 512);
    }

    /// Leaves in the orderly way.
    pub fn disconnect(mut self) {
        self.request(NBD_CMD_DISC, 0, 0, 0, b"");
        self.expect_end();
    }
}

/// An option on the wire.
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
pub fn info_bytes(name: &[u8], requests: &[u16]) -> Vec<u8> {
    let mut data = [&(name.len() as u32).to_be_bytes()[..], name, &(requests.len() as u16).to_be_bytes()].concat();
    requests.iter().for_each(|request| data.extend(request.to_be_bytes()));
    data
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
pub fn context_bytes(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = [&(name.len() as u32).to_be_bytes()[..], name, &(queries.len() as u32).to_be_bytes()].concat();
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend_from_slice(query);
    }
    data
}

/// The header of a request on the wire.
pub fn request_bytes(kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&NBD_REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

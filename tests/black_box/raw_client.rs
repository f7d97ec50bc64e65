//! A client that speaks the protocol byte by byte, written from the specification alone so that it cannot share a mistake
//! with the server. It checks what any client may rely on, and panics where the server breaks it.
//! Source: NBD proto.md, with extended headers.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::harness::{DEADLINE, readable};

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
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

pub const NBD_REP_ACK: u32 = 1;
pub const NBD_REP_SERVER: u32 = 2;
pub const NBD_REP_INFO: u32 = 3;
pub const NBD_REP_META_CONTEXT: u32 = 4;
pub const NBD_REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub const NBD_REP_ERR_POLICY: u32 = (1 << 31) + 2;
pub const NBD_REP_ERR_INVALID: u32 = (1 << 31) + 3;
pub const NBD_REP_ERR_TLS_REQD: u32 = (1 << 31) + 5;
pub const NBD_REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;
pub const NBD_REP_ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;

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
pub const NBD_FLAG_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

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
pub const NBD_CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

pub const NBD_SUCCESS: u32 = 0;
pub const NBD_EPERM: u32 = 1;
pub const NBD_ENOMEM: u32 = 12;
pub const NBD_EINVAL: u32 = 22;
pub const NBD_ENOSPC: u32 = 28;
pub const NBD_EOVERFLOW: u32 = 75;
pub const NBD_ENOTSUP: u32 = 95;
pub const NBD_ESHUTDOWN: u32 = 108;

/// The longest that a string may be anywhere in the protocol.
pub const NBD_MAX_STRING: usize = 4096;
/// The most data that the servers here take in one payload.
pub const MAX_PAYLOAD: u64 = 64 << 20;
/// "Servers SHOULD NOT send more than 2^20 extents in a single reply chunk"
const MAX_EXTENTS: usize = 1 << 20;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const CLISERV_MAGIC: u64 = 0x0000_4202_8186_1253;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const NBD_EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const NBD_EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

const NBD_REPLY_FLAG_DONE: u16 = 1;
const NBD_REPLY_TYPE_NONE: u16 = 0;
const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
const NBD_REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
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

/// What was agreed on for the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Headers {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests and replies.
    Extended,
}

/// A content chunk of a read's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Content {
    /// From the start of the export.
    pub offset: u64,
    pub length: u64,
    pub is_hole: bool,
}

/// The whole reply to a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    /// `NBD_SUCCESS` or an `NBD_E*`.
    pub error: u32,
    /// What an error chunk says beside the number.
    pub message: String,
    pub data: Vec<u8>,
    /// What block status said, by context in the order that it came in: length and flags of each block.
    pub contexts: Vec<(u32, Vec<(u64, u64)>)>,
    /// The chunks with data or holes in the order that they came in; none for a simple reply.
    pub content: Vec<Content>,
}

impl Reply {
    /// Length and flags of each block, where one context was answered.
    #[track_caller]
    pub fn blocks(&self) -> &[(u64, u64)] {
        assert_eq!(self.contexts.len(), 1, "{self:?}");
        &self.contexts[0].1
    }
}

#[derive(Debug)]
struct Pending {
    kind: u16,
    flags: u16,
    offset: u64,
    /// What the request is about, in bytes of the export.
    length: u64,
    /// The contexts that a block status request is about.
    contexts: Vec<u32>,
    reply: Reply,
}

/// A connection, and what it is waiting for.
#[derive(Debug)]
pub struct Client {
    pub socket: UnixStream,
    pub headers: Headers,
    /// Id and name of the contexts that were set.
    pub contexts: Vec<(u32, Vec<u8>)>,
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
            headers: Headers::Simple,
            contexts: Vec::new(),
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

    /// Reads the whole oldstyle handshake, after which this is a client in transmission.
    pub fn oldstyle(&mut self) {
        assert_eq!(self.u64(), NBDMAGIC);
        assert_eq!(self.u64(), CLISERV_MAGIC);
        self.export.size = self.u64();
        assert_eq!(self.u16(), 0, "an oldstyle server has no handshake flags");
        self.export.flags = self.u16();
        assert_eq!(self.receive(124), [0; 124]);
    }

    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        self.send(&option_bytes(option, data));
    }

    /// One reply to this option.
    #[track_caller]
    pub fn option_reply(&mut self, option: u32) -> OptionReply {
        self.option_reply_or_end(option).expect("a reply to the option")
    }

    /// One reply to this option; `None` where the server has closed the connection instead.
    #[track_caller]
    pub fn option_reply_or_end(&mut self, option: u32) -> Option<OptionReply> {
        let mut magic = [0; 8];
        match self.socket.read(&mut magic[..1]) {
            Ok(1) => (),
            Ok(_) => return None,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("a reply to option {option}: {error}"),
        }
        magic[1..].copy_from_slice(&self.receive(7));
        assert_eq!(u64::from_be_bytes(magic), NBD_REP_MAGIC);
        assert_eq!(self.u32(), option);
        let kind = self.u32();
        let length = self.u32();
        assert!(length <= 64 << 10, "an option reply of {length} bytes");
        Some(OptionReply { kind, data: self.receive(length as usize) })
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
        self.headers = Headers::Structured;
    }

    #[track_caller]
    pub fn ask_for_extended_headers(&mut self) {
        assert_eq!(self.option(NBD_OPT_EXTENDED_HEADERS, b""), (vec![], NBD_REP_ACK));
        self.headers = Headers::Extended;
    }

    #[track_caller]
    pub fn ask_for_base_allocation(&mut self, name: &[u8]) {
        self.ask_for_contexts(name, &[b"base:allocation"]);
        let names: Vec<_> = self.contexts.iter().map(|(_, name)| String::from_utf8_lossy(name)).collect();
        assert_eq!(names, ["base:allocation"]);
    }

    /// Sets the contexts that the queries select.
    #[track_caller]
    pub fn ask_for_contexts(&mut self, name: &[u8], queries: &[&[u8]]) {
        let (replies, last) = self.option(NBD_OPT_SET_META_CONTEXT, &context_bytes(name, queries));
        assert_eq!(last, NBD_REP_ACK);
        self.contexts.clear();
        for OptionReply { kind, data } in replies {
            assert_eq!(kind, NBD_REP_META_CONTEXT);
            let id = be32(&data);
            let name = &data[4..];
            assert!((1..=NBD_MAX_STRING).contains(&name.len()), "a name of {} bytes", name.len());
            assert!(std::str::from_utf8(name).is_ok_and(|name| name.contains(':')), "{name:?}");
            let is_new = self.contexts.iter().all(|known| known.0 != id && known.1 != name);
            assert!(is_new, "each context has an id of its own: {:?} and {id}: {name:?}", self.contexts);
            self.contexts.push((id, name.to_vec()));
        }
    }

    /// The id of `base:allocation`.
    #[track_caller]
    pub fn base_allocation(&self) -> u32 {
        self.contexts.iter().find(|(_, name)| name == b"base:allocation").expect("it was asked for").0
    }

    /// Notes a request and gives its header; the caller sends it, and a payload after it.
    ///
    /// `flags` are as the specification has them, but for a write with extended headers, which gets
    /// `NBD_CMD_FLAG_PAYLOAD_LEN` as it must.
    pub fn prepare(&mut self, kind: u16, flags: u16, offset: u64, length: u64) -> Vec<u8> {
        let is_extended_write = self.headers == Headers::Extended && kind == NBD_CMD_WRITE;
        let flags = if is_extended_write { flags | NBD_CMD_FLAG_PAYLOAD_LEN } else { flags };
        self.prepare_exactly(kind, flags, offset, length)
    }

    /// As [`Client::prepare`], with just these flags.
    pub fn prepare_exactly(&mut self, kind: u16, flags: u16, offset: u64, length: u64) -> Vec<u8> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let reply = Reply { cookie, ..Reply::default() };
        let contexts = self.contexts.iter().map(|(id, _)| *id).collect();
        let mut pending = Pending { kind, flags, offset, length, contexts, reply };
        // A read of more is refused by every server here.
        if kind == NBD_CMD_READ && length <= 2 * MAX_PAYLOAD {
            // Another value than zero, so that a hole must be written.
            pending.reply.data = vec![0xee; length as usize];
        }
        self.pending.insert(cookie, pending);
        match self.headers {
            Headers::Extended => extended_request_bytes(kind, flags, cookie, offset, length).to_vec(),
            _ => {
                let length = u32::try_from(length).expect("a compact request has a length of 32 bits");
                request_bytes(kind, flags, cookie, offset, length).to_vec()
            }
        }
    }

    /// Sends a request without waiting for its reply; returns its cookie.
    pub fn request(&mut self, kind: u16, flags: u16, offset: u64, length: u64, data: &[u8]) -> u64 {
        let mut bytes = self.prepare(kind, flags, offset, length);
        bytes.extend_from_slice(data);
        self.send(&bytes);
        self.next_cookie - 1
    }

    /// Sends a request with a payload, whether the command has such a form or not, and with just these flags.
    pub fn request_with_payload(&mut self, kind: u16, flags: u16, offset: u64, payload: &[u8]) -> u64 {
        let flags = flags | NBD_CMD_FLAG_PAYLOAD_LEN;
        let mut bytes = self.prepare_exactly(kind, flags, offset, payload.len() as u64);
        bytes.extend_from_slice(payload);
        self.send(&bytes);
        self.next_cookie - 1
    }

    /// The reply to a block status request for some of the contexts only. No other request may be open.
    #[track_caller]
    pub fn ask_status_of(&mut self, flags: u16, offset: u64, length: u64, ids: &[u32]) -> Reply {
        let mut payload = length.to_be_bytes().to_vec();
        ids.iter().for_each(|id| payload.extend(id.to_be_bytes()));
        let cookie = self.request_with_payload(NBD_CMD_BLOCK_STATUS, flags, offset, &payload);
        let pending = self.pending.get_mut(&cookie).expect("it was just sent");
        pending.length = length;
        pending.contexts = ids.to_vec();
        self.next_reply().expect("a reply")
    }

    /// How many requests have no reply yet.
    pub fn unanswered(&self) -> usize {
        self.pending.len()
    }

    /// Waits until something of a reply is there, and takes nothing of it.
    #[track_caller]
    pub fn await_reply(&self) {
        assert!(readable(&self.socket, DEADLINE), "a reply, with {} requests open", self.pending.len());
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
                    assert_eq!(self.headers, Headers::Structured, "a structured reply");
                    if let Some(reply) = self.chunk() {
                        return Some(reply);
                    }
                }
                NBD_EXTENDED_REPLY_MAGIC => {
                    assert_eq!(self.headers, Headers::Extended, "an extended reply");
                    if let Some(reply) = self.chunk() {
                        return Some(reply);
                    }
                }
                other => panic!("not the magic of a reply: {other:#x}"),
            }
        }
    }

    fn simple_reply(&mut self) -> Reply {
        assert_ne!(self.headers, Headers::Extended, "with extended headers no reply is simple");
        let error = self.u32();
        let cookie = self.u64();
        let mut pending = self.pending.remove(&cookie).expect("a reply is for a request, once");
        let may_be_simple = self.headers == Headers::Simple || pending.kind != NBD_CMD_READ;
        assert!(may_be_simple, "reads get structured replies once negotiated");
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

    /// A structured or extended chunk, after its magic. The reply when it is the last.
    fn chunk(&mut self) -> Option<Reply> {
        let is_extended = self.headers == Headers::Extended;
        let flags = self.u16();
        let kind = self.u16();
        let cookie = self.u64();
        let offset = is_extended.then(|| self.u64());
        let length = if is_extended { self.u64() } else { self.u32().into() };
        assert!(length <= MAX_PAYLOAD + 8, "a chunk of {length} bytes");
        let payload = self.receive(length as usize);
        assert_eq!(flags & !NBD_REPLY_FLAG_DONE, 0, "no other flag was negotiated");
        let base_allocation = self.contexts.iter().find(|(_, name)| name == b"base:allocation").map(|(id, _)| *id);
        let pending = self.pending.get_mut(&cookie).expect("a chunk is for a request that has no final chunk yet");
        assert!(offset.is_none_or(|offset| offset == pending.offset), "{offset:?} in the reply to {pending:?}");
        match kind {
            NBD_REPLY_TYPE_NONE => {
                assert_eq!(length, 0);
                assert_ne!(flags & NBD_REPLY_FLAG_DONE, 0, "a chunk of nothing is the last");
            }
            NBD_REPLY_TYPE_OFFSET_DATA => {
                pending.content(be64(&payload), &payload[8..], payload.len() as u64 - 8, false)
            }
            NBD_REPLY_TYPE_OFFSET_HOLE => {
                assert_eq!(length, 12);
                pending.content(be64(&payload), &[], be32(&payload[8..]).into(), true);
            }
            NBD_REPLY_TYPE_BLOCK_STATUS => {
                assert!(!is_extended, "a short block status although extended headers were negotiated");
                assert_eq!((payload.len() - 4) % 8, 0);
                let blocks = payload[4..].chunks(8).map(|block| (be32(block).into(), be32(&block[4..]).into()));
                pending.status(be32(&payload), blocks.collect(), base_allocation);
            }
            NBD_REPLY_TYPE_BLOCK_STATUS_EXT => {
                assert!(is_extended, "an extended block status although extended headers were not negotiated");
                assert_eq!((payload.len() - 8) % 16, 0);
                let blocks: Vec<_> = payload[8..].chunks(16).map(|block| (be64(block), be64(&block[8..]))).collect();
                assert_eq!(be32(&payload[4..]) as usize, blocks.len(), "the count of the descriptors");
                pending.status(be32(&payload), blocks, base_allocation);
            }
            NBD_REPLY_TYPE_ERROR | NBD_REPLY_TYPE_ERROR_OFFSET => {
                let message = usize::from(u16::from_be_bytes(payload[4..6].try_into().expect("two bytes")));
                let text = std::str::from_utf8(&payload[6..6 + message]).expect("an error message is UTF-8");
                assert!(!text.contains('\0'), "an error message has no NUL");
                assert!(message <= NBD_MAX_STRING, "an error message of {message} bytes");
                if kind == NBD_REPLY_TYPE_ERROR {
                    assert_eq!(payload.len(), 6 + message);
                } else {
                    assert_eq!(payload.len(), 6 + message + 8);
                    let at = be64(&payload[6 + message..]).checked_sub(pending.offset);
                    assert!(at.is_some_and(|at| at < pending.length), "an error lies in the request: {pending:?}");
                }
                pending.reply.error = be32(&payload);
                pending.reply.message = text.to_owned();
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
            return Some(reply);
        }
        match pending.kind {
            NBD_CMD_READ => {
                let covered: u64 = reply.content.iter().map(|content| content.length).sum();
                assert_eq!(covered, pending.length, "all of the read is described");
            }
            NBD_CMD_BLOCK_STATUS => {
                let answered = |id: &u32| reply.contexts.iter().any(|(context, _)| context == id);
                assert!(pending.contexts.iter().all(answered), "{:?} in {reply:?}", pending.contexts);
            }
            _ => (),
        }
        Some(reply)
    }

    /// A request and its reply; no other request may be open.
    #[track_caller]
    pub fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u64) -> Reply {
        self.request(kind, flags, offset, length, b"");
        self.next_reply().expect("a reply")
    }

    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        let reply = self.ask(NBD_CMD_READ, 0, offset, length);
        assert_eq!(reply.error, NBD_SUCCESS, "read of {length} at {offset}");
        reply.data
    }

    /// Writes, and returns the error.
    #[track_caller]
    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        self.request(NBD_CMD_WRITE, flags, offset, data.len() as u64, data);
        self.next_reply().expect("a reply").error
    }

    /// The flags and lengths of a range.
    #[track_caller]
    pub fn blocks(&mut self, flags: u16, offset: u64, length: u64) -> Vec<(u64, u64)> {
        let reply = self.ask(NBD_CMD_BLOCK_STATUS, flags, offset, length);
        assert_eq!(reply.error, NBD_SUCCESS, "block status of {length} at {offset}");
        reply.blocks().to_vec()
    }

    /// The connection must still work.
    #[track_caller]
    pub fn expect_alive(&mut self) {
        self.read(0, 512);
    }

    /// Reads and drops what comes. Whether something came; else the server has closed the connection.
    pub fn reads_on(&mut self) -> bool {
        match self.socket.read(&mut [0; 4096]) {
            Ok(length) => length > 0,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("the connection is neither used nor closed: {error}"),
        }
    }

    /// Leaves in the orderly way.
    pub fn disconnect(mut self) {
        self.request(NBD_CMD_DISC, 0, 0, 0, b"");
        self.expect_end();
    }
}

impl Pending {
    /// A chunk of what is read.
    fn content(&mut self, offset: u64, data: &[u8], length: u64, is_hole: bool) {
        assert_eq!(self.kind, NBD_CMD_READ);
        assert!(length > 0, "a content chunk describes at least a byte");
        let from = offset.checked_sub(self.offset).expect("content lies in the request") as usize;
        let target = self.reply.data.get_mut(from..from + length as usize).expect("content lies in the request");
        if is_hole {
            target.fill(0)
        } else {
            target.copy_from_slice(data)
        }
        let overlaps = |other: &Content| offset < other.offset + other.length && other.offset < offset + length;
        assert!(!self.reply.content.iter().any(overlaps), "content chunks do not overlap");
        self.reply.content.push(Content { offset, length, is_hole });
        let df = self.flags & NBD_CMD_FLAG_DF != 0;
        assert!(!df || self.reply.content.len() == 1, "DF allows one content chunk");
    }

    /// A chunk of block status.
    fn status(&mut self, context: u32, blocks: Vec<(u64, u64)>, base_allocation: Option<u32>) {
        assert_eq!(self.kind, NBD_CMD_BLOCK_STATUS);
        assert!(self.contexts.contains(&context), "context {context} was not asked for: {self:?}");
        assert!(self.reply.contexts.iter().all(|(id, _)| *id != context), "a context is answered once");
        assert!((1..=MAX_EXTENTS).contains(&blocks.len()), "{} blocks", blocks.len());
        assert!(blocks.iter().all(|(length, _)| *length > 0), "a block has at least a byte");
        if Some(context) == base_allocation {
            let known = |flags: u64| flags & !3 == 0;
            assert!(blocks.iter().all(|(_, flags)| known(*flags)), "base:allocation has two flags");
        }
        let all_but_the_last: u64 = blocks[..blocks.len() - 1].iter().map(|(length, _)| length).sum();
        let is_needed = blocks.len() == 1 || all_but_the_last < self.length;
        assert!(is_needed, "blocks that begin after the request: {self:?}");
        if self.flags & NBD_CMD_FLAG_REQ_ONE != 0 {
            assert_eq!(blocks.len(), 1, "REQ_ONE allows one block");
            assert!(blocks[0].0 <= self.length, "REQ_ONE allows no block beyond the request");
        }
        self.reply.contexts.push((context, blocks));
    }
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
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

/// The header of a compact request on the wire.
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

/// The header of an extended request on the wire.
pub fn extended_request_bytes(kind: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&NBD_EXTENDED_REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

//! Transmission as a client sees it. The actor owns the transport; hears requests from every [`Requests`]; tells only those
//! who wait for a reply. Ends when the server or the stream fails, after [`Requests::disconnect`], or when nobody is left
//! who could ask.
//!
//! ```text
//!  a request ──> output ──> server          Reading::Header ──> Head ──> Data
//!       └──────> Table <── replies <── input        ^────────────┴────────┘
//! ```

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use async_channel::{Receiver, Sender, bounded};
use smol::stream::Stream;

use super::handshake::{Agreed, Export, ended};
use super::input::Input;
use super::pending::{Answer, Asked, ContextStatus, Step, Table};
use super::{Error, Headers};
use crate::device::Flags;
use crate::protocol::client::{Body, Chunk, ReplyHeader, RequestHeader, Violation, block_status_payload};
use crate::protocol::constants::*;
use crate::transport::Transport;

/// How many requests may be under way. More wait for their turn, which is what a bounded queue is for.
const IN_FLIGHT: usize = 256;
/// How many requests may wait to be taken.
const QUEUE: usize = 16;
/// No more requests are taken while so many bytes wait to be sent.
const OUTPUT: usize = 4 * 1024 * 1024;
/// How many pieces are sent at once.
const PIECES: usize = 64;
/// How often the actor goes on at once before it lets others have the thread.
const TURNS: usize = 32;
/// The longest range that a compact request is used for, in bytes: the largest that is a multiple of every block size.
const COMPACT: u64 = (1 << 32) - 65536;

type Reply = Sender<Result<Answer, Error>>;

/// What [`Requests`] tell the actor.
enum Message {
    Request {
        asked: Asked,
        header: RequestHeader,
        payload: Vec<u8>,
        reply: Reply,
    },
    /// Finish what is under way, say goodbye, and tell when that is done.
    Disconnect(Reply),
}

/// How a connection is spoken to. Cheap to clone. When all clones are gone, the connection is closed at once.
///
/// Dropped, a request's future forgets the reply; what it asked for may be done or not.
#[derive(Clone)]
pub struct Requests {
    inbox: Sender<Message>,
    /// Nothing is ever sent: that it is there says that somebody may still ask.
    _somebody: Sender<Infallible>,
    about: Arc<About>,
}

/// What a request is checked against before it is made.
struct About {
    export: Export,
    headers: Headers,
    /// Why the connection has ended. Written once, by the actor, before it is gone.
    end: OnceLock<Error>,
}

/// The actor of one connection, to be [run](Connection::run) on an executor. Dropped, the connection is closed.
pub struct Connection {
    transport: Box<dyn Transport>,
    input: Input,
    reading: Reading,
    /// Requests that are encoded; of the first piece so much was sent.
    output: VecDeque<Vec<u8>>,
    sent: usize,
    queued: usize,
    table: Table<Reply>,
    inbox: Pin<Box<Receiver<Message>>>,
    somebody: Pin<Box<Receiver<Infallible>>>,
    goodbye: Goodbye,
    about: Arc<About>,
}

/// What comes next from the server.
enum Reading {
    Header,
    /// The payload of a chunk as far as it is no data, of which this much is here.
    Head {
        chunk: Chunk,
        head: Vec<u8>,
    },
    /// Data of a read.
    Data {
        cookie: u64,
        at: usize,
        left: usize,
        last: bool,
    },
}

enum Goodbye {
    No,
    /// When nothing is under way any more.
    Soon(Reply),
    Said(Reply),
}

pub(super) fn new(agreed: Agreed) -> (Requests, Connection) {
    let Agreed { export, headers, transport, input } = agreed;
    let (inbox, messages) = bounded(QUEUE);
    let (somebody, anybody) = bounded(1);
    let about = Arc::new(About { export, headers, end: OnceLock::new() });
    let requests = Requests { inbox, _somebody: somebody, about: Arc::clone(&about) };
    let connection = Connection {
        transport,
        input,
        reading: Reading::Header,
        output: VecDeque::new(),
        sent: 0,
        queued: 0,
        table: Table::new(headers),
        inbox: Box::pin(messages),
        somebody: Box::pin(anybody),
        goodbye: Goodbye::No,
        about,
    };
    (requests, connection)
}

impl Requests {
    /// What the server told of the export.
    pub fn export(&self) -> &Export {
        &self.about.export
    }

    /// How requests and replies look.
    pub fn headers(&self) -> Headers {
        self.about.headers
    }

    /// Reads `length` bytes at `offset`, no more than [`Export::maximum_payload`]. Every byte has come, once.
    pub async fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        self.check(NBD_CMD_READ, offset, length.into())?;
        self.check_payload(NBD_CMD_READ, length.into())?;
        if length == 0 {
            return Ok(Vec::new());
        }
        match self.ask(NBD_CMD_READ, 0, offset, length.into(), Vec::new()).await? {
            Answer::Data(data) => Ok(data),
            Answer::Done | Answer::Status(_) => Ok(Vec::new()),
        }
    }

    /// Writes all of `data` at `offset`, no more than [`Export::maximum_payload`]. Of `flags` only `fua` means something.
    pub async fn write(&self, data: Vec<u8>, offset: u64, flags: Flags) -> Result<(), Error> {
        let (kind, length) = (NBD_CMD_WRITE, data.len() as u64);
        self.check_writable(kind, None)?;
        self.check(kind, offset, length)?;
        self.check_payload(kind, length)?;
        let mut flags = self.flags(kind, flags)?;
        if length == 0 {
            return Ok(());
        }
        if self.about.headers == Headers::Extended {
            flags |= NBD_CMD_FLAG_PAYLOAD_LEN;
        }
        self.ask(kind, flags, offset, length, data).await.map(drop)
    }

    /// Puts everything acknowledged so far on stable storage.
    pub async fn flush(&self) -> Result<(), Error> {
        self.check_offered(NBD_CMD_FLUSH, NBD_FLAG_SEND_FLUSH)?;
        self.ask(NBD_CMD_FLUSH, 0, 0, 0, Vec::new()).await.map(drop)
    }

    /// Tells the server that `length` bytes at `offset` are of no more use. Of `flags` only `fua` means something.
    pub async fn trim(&self, offset: u64, length: u64, flags: Flags) -> Result<(), Error> {
        self.check_writable(NBD_CMD_TRIM, Some(NBD_FLAG_SEND_TRIM))?;
        self.in_pieces(NBD_CMD_TRIM, self.flags(NBD_CMD_TRIM, flags)?, offset, length).await
    }

    /// Makes `length` bytes at `offset` read as zeroes. Not `may_trim` is `NBD_CMD_FLAG_NO_HOLE`.
    pub async fn write_zeroes(&self, offset: u64, length: u64, flags: Flags) -> Result<(), Error> {
        let kind = NBD_CMD_WRITE_ZEROES;
        self.check_writable(kind, Some(NBD_FLAG_SEND_WRITE_ZEROES))?;
        let mut wire = self.flags(kind, flags)?;
        if !flags.may_trim {
            wire |= NBD_CMD_FLAG_NO_HOLE;
        }
        if flags.fast {
            self.check_offered(kind, NBD_FLAG_SEND_FAST_ZERO)?;
            wire |= NBD_CMD_FLAG_FAST_ZERO;
        }
        self.in_pieces(kind, wire, offset, length).await
    }

    /// Has the server bring `length` bytes at `offset` near.
    pub async fn cache(&self, offset: u64, length: u64) -> Result<(), Error> {
        self.check_offered(NBD_CMD_CACHE, NBD_FLAG_SEND_CACHE)?;
        self.in_pieces(NBD_CMD_CACHE, 0, offset, length).await
    }

    /// What the selected contexts say about `length` bytes from `offset` on, at least of the first of them; with `one`, as
    /// one extent of each. Each context answers once.
    pub async fn block_status(&self, offset: u64, length: u64, one: bool) -> Result<Vec<ContextStatus>, Error> {
        self.status(offset, length, one, None).await
    }

    /// As [`Requests::block_status`], of these contexts only. Wants `NBD_FLAG_BLOCK_STATUS_PAYLOAD`.
    pub async fn block_status_of(
        &self,
        contexts: &[u32],
        offset: u64,
        length: u64,
        one: bool,
    ) -> Result<Vec<ContextStatus>, Error> {
        self.check_offered(NBD_CMD_BLOCK_STATUS, NBD_FLAG_BLOCK_STATUS_PAYLOAD)?;
        self.status(offset, length, one, Some(contexts)).await
    }

    async fn status(
        &self,
        offset: u64,
        length: u64,
        one: bool,
        only: Option<&[u32]>,
    ) -> Result<Vec<ContextStatus>, Error> {
        let kind = NBD_CMD_BLOCK_STATUS;
        let impossible = |why| Err(Error::impossible(kind, ErrorCode::Invalid, why));
        self.check(kind, offset, length)?;
        if length == 0 {
            return impossible("the range is empty");
        }
        let extended = self.about.headers == Headers::Extended;
        let all = self.about.export.contexts.iter().map(|one| (one.id, one.name.starts_with(b"base:")));
        let mut contexts: Vec<(u32, bool)> = all.collect();
        let mut flags = if one { NBD_CMD_FLAG_REQ_ONE } else { 0 };
        let length = if extended { length } else { length.min(COMPACT) };
        let mut payload = Vec::new();
        if let Some(only) = only {
            if !extended || only.iter().any(|id| !contexts.iter().any(|(known, _)| known == id)) {
                return impossible("the context was not selected");
            }
            contexts.retain(|(id, _)| only.contains(id));
            if contexts.len() != only.len() {
                return impossible("a context is named twice");
            }
            payload = block_status_payload(length, only);
            flags |= NBD_CMD_FLAG_PAYLOAD_LEN;
        }
        if contexts.is_empty() {
            return impossible("no context was selected");
        }
        let asked = Asked { kind, flags, offset, length, contexts };
        match self.send(asked, payload).await? {
            Answer::Status(status) => Ok(status),
            Answer::Done | Answer::Data(_) => Ok(Vec::new()),
        }
    }

    /// Waits for what is under way, says goodbye and closes. Other clones find it closed.
    pub async fn disconnect(&self) -> Result<(), Error> {
        let (reply, said) = bounded(1);
        self.tell(Message::Disconnect(reply), said).await.map(drop)
    }

    /// A request without a payload, for a range that may need several compact ones.
    async fn in_pieces(&self, kind: u16, flags: u16, mut offset: u64, mut length: u64) -> Result<(), Error> {
        self.check(kind, offset, length)?;
        while length > 0 {
            let piece = if self.about.headers == Headers::Extended { length } else { length.min(COMPACT) };
            self.ask(kind, flags, offset, piece, Vec::new()).await?;
            (offset, length) = (offset + piece, length - piece);
        }
        Ok(())
    }

    async fn ask(&self, kind: u16, flags: u16, offset: u64, length: u64, payload: Vec<u8>) -> Result<Answer, Error> {
        self.send(Asked { kind, flags, offset, length, contexts: Vec::new() }, payload).await
    }

    async fn send(&self, asked: Asked, payload: Vec<u8>) -> Result<Answer, Error> {
        let Asked { kind, flags, offset, length, .. } = asked;
        let length = if payload.is_empty() { length } else { payload.len() as u64 };
        // The actor knows which cookie is next.
        let header = RequestHeader { flags, kind, cookie: 0, offset, length };
        let (reply, answer) = bounded(1);
        self.tell(Message::Request { asked, header, payload, reply }, answer).await
    }

    async fn tell(&self, message: Message, answer: Receiver<Result<Answer, Error>>) -> Result<Answer, Error> {
        // An actor that is gone has said why, unless it was dropped.
        let gone = || self.about.end.get().cloned().unwrap_or(Error::Closed);
        self.inbox.send(message).await.map_err(|_| gone())?;
        answer.recv().await.unwrap_or_else(|_| Err(gone()))
    }

    /// What holds for every request with a range.
    fn check(&self, kind: u16, offset: u64, length: u64) -> Result<(), Error> {
        let export = &self.about.export;
        let writes = matches!(kind, NBD_CMD_WRITE | NBD_CMD_WRITE_ZEROES);
        if offset.checked_add(length).is_none_or(|end| end > export.size) {
            let code = if writes { ErrorCode::NoSpace } else { ErrorCode::Invalid };
            return Err(Error::impossible(kind, code, "the range goes past the end of the export"));
        }
        let minimum = u64::from(export.block_size.map_or(1, |size| size.minimum));
        if !offset.is_multiple_of(minimum) || !length.is_multiple_of(minimum) {
            let why = "the range is not made of whole blocks of the export";
            return Err(Error::impossible(kind, ErrorCode::Invalid, why));
        }
        Ok(())
    }

    fn check_payload(&self, kind: u16, length: u64) -> Result<(), Error> {
        if length > self.about.export.maximum_payload().into() {
            return Err(Error::impossible(kind, ErrorCode::Invalid, "the range is longer than the export's maximum"));
        }
        Ok(())
    }

    fn check_offered(&self, kind: u16, flag: u16) -> Result<(), Error> {
        if !self.about.export.has(flag) {
            return Err(Error::impossible(kind, ErrorCode::NotSupported, "the server does not offer it"));
        }
        Ok(())
    }

    fn check_writable(&self, kind: u16, flag: Option<u16>) -> Result<(), Error> {
        if self.about.export.has(NBD_FLAG_READ_ONLY) {
            return Err(Error::impossible(kind, ErrorCode::NotPermitted, "the export is read-only"));
        }
        flag.map_or(Ok(()), |flag| self.check_offered(kind, flag))
    }

    /// The command flags that all writing requests have.
    fn flags(&self, kind: u16, flags: Flags) -> Result<u16, Error> {
        if !flags.fua {
            return Ok(0);
        }
        self.check_offered(kind, NBD_FLAG_SEND_FUA).map(|()| NBD_CMD_FLAG_FUA)
    }
}

impl Connection {
    /// Serves requests to the connection's end. Errors: it was not this side that ended it. All who wait get the same error.
    pub async fn run(mut self) -> Result<(), Error> {
        // What the handshake has left.
        let end = match self.digest() {
            Ok(()) => poll_fn(|cx| self.poll(cx)).await,
            Err(violation) => Err(Error::Violation(violation)),
        };
        // Before anybody is told by a channel that closes.
        let why = end.as_ref().err().cloned().unwrap_or(Error::Closed);
        self.about.end.get_or_init(|| why);
        if let (Ok(()), Goodbye::Said(reply)) = (&end, &self.goodbye) {
            // Who asked may have gone.
            let _ = reply.try_send(Ok(Answer::Done));
        }
        end
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        for _ in 0..TURNS {
            // Nobody is left, so nobody waits either: a request's future borrows from who made it.
            if let Poll::Ready(None) = self.somebody.as_mut().poll_next(cx) {
                return Poll::Ready(Ok(()));
            }
            self.take_messages(cx);
            let sent = self.poll_send(cx)?;
            if sent.is_ready()
                && let Goodbye::Said(_) = self.goodbye
            {
                self.transport.finish();
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_receive(cx))?;
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes requests while there is room.
    fn take_messages(&mut self, cx: &mut Context<'_>) {
        while self.table.len() < IN_FLIGHT && self.queued < OUTPUT && matches!(self.goodbye, Goodbye::No) {
            match self.inbox.as_mut().poll_next(cx) {
                Poll::Ready(Some(Message::Request { asked, header, payload, reply })) => {
                    let cookie = self.table.add(asked, reply);
                    self.encode(RequestHeader { cookie, ..header }, payload);
                }
                Poll::Ready(Some(Message::Disconnect(reply))) => self.goodbye = Goodbye::Soon(reply),
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        if self.table.len() == 0
            && let Goodbye::Soon(_) = self.goodbye
            && let Goodbye::Soon(reply) = std::mem::replace(&mut self.goodbye, Goodbye::No)
        {
            let header = RequestHeader { flags: 0, kind: NBD_CMD_DISC, cookie: 0, offset: 0, length: 0 };
            self.encode(header, Vec::new());
            self.goodbye = Goodbye::Said(reply);
        }
    }

    fn encode(&mut self, header: RequestHeader, payload: Vec<u8>) {
        let encoded = match self.about.headers {
            Headers::Extended => header.extended().to_vec(),
            // Ranges that are too long were refused or cut.
            Headers::Simple | Headers::Structured => header.compact().map(Vec::from).unwrap_or_default(),
        };
        for piece in [encoded, payload] {
            if !piece.is_empty() {
                self.queued += piece.len();
                self.output.push_back(piece);
            }
        }
    }

    /// Ready when all is sent.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        while !self.output.is_empty() {
            let mut slices = Vec::with_capacity(self.output.len().min(PIECES));
            for (index, piece) in self.output.iter().take(PIECES).enumerate() {
                slices.push(IoSlice::new(if index == 0 { &piece[self.sent..] } else { piece }));
            }
            let sent = ready!(self.transport.poll_send(cx, &slices)).map_err(|error| ended(error, WHILE))?;
            if sent == 0 {
                return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into()));
            }
            self.queued -= sent.min(self.queued);
            self.sent += sent;
            while let Some(first) = self.output.front()
                && self.sent >= first.len()
            {
                self.sent -= first.len();
                self.output.pop_front();
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Receives once and looks at what has come.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Connection { reading, table, input, transport, .. } = self;
        let direct = match reading {
            Reading::Data { cookie, at, left, .. } => table.space(*cookie, *at).get_mut(..*left).unwrap_or_default(),
            Reading::Header | Reading::Head { .. } => &mut [],
        };
        let filled = ready!(input.poll_fill(cx, &mut **transport, direct)).map_err(|error| ended(error, WHILE))?;
        if let Reading::Data { at, left, .. } = reading {
            *at += filled;
            *left -= filled;
        }
        Poll::Ready(self.digest().map_err(Error::Violation))
    }

    /// Looks at the input as far as it goes: what is left is less than a header.
    fn digest(&mut self) -> Result<(), Violation> {
        loop {
            let step = match &mut self.reading {
                Reading::Header => {
                    let Some((header, length)) = ReplyHeader::parse(self.about.headers, self.input.bytes())? else {
                        return Ok(());
                    };
                    self.input.consume(length);
                    match header {
                        ReplyHeader::Simple { error, cookie } => (self.table.simple(error, cookie)?, cookie, true),
                        ReplyHeader::Chunk(chunk) => {
                            self.table.announce(&chunk)?;
                            self.reading = Reading::Head { chunk, head: Vec::new() };
                            continue;
                        }
                    }
                }
                Reading::Head { chunk, head } => {
                    let missing = chunk.head() - head.len();
                    head.extend_from_slice(self.input.take(missing));
                    if head.len() < chunk.head() {
                        return Ok(());
                    }
                    let body = Body::parse(chunk, head)?;
                    (self.table.chunk(chunk, body)?, chunk.cookie, chunk.done)
                }
                Reading::Data { cookie, at, left, last } => {
                    let here = self.input.take(*left);
                    self.table.space(*cookie, *at)[..here.len()].copy_from_slice(here);
                    *at += here.len();
                    *left -= here.len();
                    if *left > 0 {
                        return Ok(());
                    }
                    (if *last { Step::Last } else { Step::More }, *cookie, *last)
                }
            };
            self.reading = match step {
                (Step::More, ..) => Reading::Header,
                (Step::Data { at, length }, cookie, last) => Reading::Data { cookie, at, left: length, last },
                (Step::Last, cookie, _) => {
                    let (reply, answer) = self.table.finish(cookie)?;
                    // Who asked may have gone.
                    let _ = reply.try_send(answer);
                    Reading::Header
                }
            };
        }
    }
}

const WHILE: &str = "without being asked to";

impl Drop for Connection {
    fn drop(&mut self) {
        let end = self.about.end.get_or_init(|| Error::Closed);
        for reply in self.table.take_waiters() {
            // Who asked may have gone.
            let _ = reply.try_send(Err(end.clone()));
        }
        // What is in the queue would stay there for as long as anybody can ask, and its senders would wait.
        self.inbox.close();
        while let Ok(message) = self.inbox.try_recv() {
            drop(message);
        }
    }
}

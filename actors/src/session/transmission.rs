//! The transmission phase of one client: requests are received and checked in batches, replies are sent in batches.
//!
//! One loop does all of it, and waits for whatever comes first: bytes, room, replies, an order. Nothing in it is unbounded:
//! a client is owed replies to at most [`MAX_OWED`] bytes and [`MAX_REQUESTS`] requests, and is not listened to meanwhile.
//! Source: NBD doc/proto.md "Transmission".

use std::collections::VecDeque;
use std::fs::File;
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_channel::{Receiver, Sender};
use smol::future::or;
use smol::stream::Stream;

use super::{End, Input, Surroundings};
use crate::backend::{Batch, Payload, Replies, Work};
use crate::blocks::{BLOCK, Blocks};
use crate::buffers::{Buffers, RECEIVE};
use crate::connection::Connection;
use crate::coordinator::{Orders, Watch};
use crate::device::Support;
use crate::extents::MAX_EXTENTS;
use crate::log::Speaker;
use crate::protocol::constants::*;
use crate::protocol::replies::{FILE_ENDED, ReplyTo};
use crate::protocol::transmission::{Agreement, Command, Headers, Refusal, RefusalReason, Request, command_name};
use crate::segments::Piece;
use crate::transport::Transport;
use crate::world::{Timer, World};

/// Batches that may be on their way, each way.
pub(super) const BATCHES: usize = 4;
/// How many bytes of requests and replies one client may have on the way. One request more is taken when there is less, so
/// that the largest request can be served; so this, and one payload, is what a client can make the server hold.
const MAX_OWED: usize = 16 * 1024 * 1024;
/// How many requests one client may have on the way.
const MAX_REQUESTS: usize = 1024;
/// What a request costs beside its data, in bytes: its entry, its reply's header, its place in a queue.
const REQUEST_COST: usize = 256;
/// How long a client may take nothing of what waits for it, once the server is ending; then it is cut off. A client that
/// reads at all takes something in that time, so that one which does not (it is stopped, or gone without a word, or waits to
/// send before it reads) costs the end a second and not the whole drain. While the server is not ending it may take its time.
const STALL: Duration = Duration::from_secs(1);
/// How much of a large write's data has to be there before it is worth a receive, at most, in bytes. Over TCP each receive also
/// sends an acknowledgement, which the client's side has to work at.
const AWAITED: usize = 128 * 1024;
/// How long a client asks for nothing until it rests, at least, and at most twice as long. Long beside the microseconds that
/// the next spell takes to begin, and short where thousands of clients come one after another.
const LULL: Duration = Duration::from_millis(250);
/// How many receives at the end of a session are given to what the client has sent in vain.
const FAREWELLS: usize = 64;
/// What an extent takes in the answer to a block status, at most, in bytes.
const EXTENT: usize = 16;
/// How many pieces one send takes.
const PIECES: usize = 64;
/// How many pieces one receive takes: more than a socket holds.
const SLICES: usize = 16;
/// From here on a write is large, in bytes: it is received into blocks where the device takes them.
const LARGE: usize = 2 * BLOCK;
/// How much is received behind the data of a large write, in bytes. The next one's data follows its header, and what of it is
/// received here has to be copied.
const BEHIND_LARGE: usize = 4096;
/// The most data of a refused write that is read over; a client that announces more is cut off. Source: nbdkit
/// server/protocol.c `skip_over_write_buffer`.
const MAX_SKIP: u32 = 2 * MAX_PAYLOAD;

static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

pub(super) struct Transmission {
    agreement: Agreement,
    connection: Connection,
    buffers: Buffers,
    work: Sender<Batch>,
    replies: Pin<Box<Receiver<Replies>>>,

    input: Input,
    /// A request whose payload is still coming.
    partial: Option<Partial>,
    /// Data of a refused request that is still to come and of no use.
    skip: u64,
    /// What is refused when all of that has come: a client that is still sending may not listen yet (libnbd gives up).
    refusing: Option<(ReplyTo, Refusal)>,
    /// Requests that were parsed and not yet handed down.
    batch: Batch,
    listening: Listening,

    outgoing: VecDeque<Replies>,
    /// How much of the first of `outgoing` has been sent, in pieces and in bytes of the next piece.
    sent: (usize, usize),
    requests: usize,
    /// How many of `requests` were refused because the server is ending; the others were promised an answer.
    refused: usize,
    owed: usize,

    /// The server is ending.
    draining: bool,
    /// Runs while the server is ending and the client takes nothing of what waits for it. Boxed: an idle session has none.
    patience: Option<Box<Timer>>,
    /// Ticks to find out whether the client rests.
    lull: Timer,
    /// Something has moved since the last tick.
    busy: bool,
    world: World,
}

/// Why there is nothing more to do.
enum Over {
    Rests,
    /// Everything was answered, and nothing more is listened to.
    Done,
}

/// How a spell of work for the client was over.
pub(super) enum Spell {
    /// It has asked for nothing for a while, and is owed nothing.
    Rests,
    /// The session has ended; how to take leave of the client once the device has closed.
    Ended(End, Parting),
}

/// How to take leave of a client.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Parting {
    /// It is gone, or does not follow the protocol.
    Lost,
    /// All that it sent was heard.
    Heard,
    /// It may have sent more, in vain.
    Unheard,
}

/// Says to the client that nothing more will come. What it has sent in vain is read over, as far as it is there: on TCP a close
/// with bytes unread resets the connection, and the last replies could be lost with it.
pub(super) async fn part(transport: &mut dyn Transport, surroundings: &Surroundings, parting: Parting) {
    if parting != Parting::Lost {
        // A client that takes nothing does not hear it.
        let told = poll_fn(|cx| transport.poll_finish(cx));
        or(told, async { surroundings.world.after(STALL).await }).await;
    }
    transport.finish();
    if parting != Parting::Unheard {
        return;
    }
    let mut buffer = surroundings.buffers.receive();
    for _ in 0..FAREWELLS {
        let received = poll_fn(|cx| match transport.poll_receive(cx, &mut [IoSliceMut::new(&mut buffer)]) {
            Poll::Ready(received) => Poll::Ready(received.unwrap_or(0)),
            Poll::Pending => Poll::Ready(0),
        });
        if received.await == 0 {
            break;
        }
    }
    surroundings.buffers.give_back(buffer);
}

struct Partial {
    to: ReplyTo,
    command: Command,
    data: Data,
    /// How many of how many bytes have come.
    filled: usize,
    length: usize,
}

/// Where the data of a write goes that did not come whole.
enum Data {
    Bytes(Vec<u8>),
    Blocks(Blocks),
}

impl Partial {
    fn is_whole(&self) -> bool {
        self.filled == self.length
    }

    /// Takes memory for what one receive brings at most. `None`: there is none.
    fn provide(&mut self, buffers: &Buffers) -> Option<()> {
        match &mut self.data {
            Data::Bytes(_) => Some(()),
            Data::Blocks(blocks) => buffers.provide(blocks, self.filled, SLICES - 1),
        }
    }

    /// Takes what it needs of `bytes`, or what there is memory for. How much that was.
    fn fill(&mut self, mut bytes: &[u8], buffers: &Buffers) -> usize {
        let before = self.filled;
        let mut take = |piece: &mut [u8]| {
            let count = piece.len().min(bytes.len());
            piece[..count].copy_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            self.filled += count;
        };
        match &mut self.data {
            Data::Bytes(buffer) => take(&mut buffer[before..self.length]),
            Data::Blocks(blocks) => {
                let _ = buffers.provide(blocks, before, SLICES);
                blocks.rest(before).for_each(take);
            }
        }
        self.filled - before
    }
}

/// Whether more is wanted from the client.
#[derive(PartialEq)]
enum Listening {
    Yes,
    /// The server is ending: what comes gets `NBD_ESHUTDOWN`, for as long as requests from before are under way and once more
    /// after that.
    Refusing,
    /// It said that it is done, or the server is.
    No,
}

impl Transmission {
    pub(super) fn new(
        agreement: Agreement,
        input: Input,
        surroundings: &Surroundings,
        connection: &Connection,
        work: Sender<Batch>,
        replies: Receiver<Replies>,
    ) -> Transmission {
        let (buffers, world) = (&surroundings.buffers, &surroundings.world);
        Transmission {
            agreement,
            connection: connection.clone(),
            buffers: buffers.clone(),
            work,
            replies: Box::pin(replies),
            input,
            partial: None,
            skip: 0,
            refusing: None,
            batch: Batch::new(),
            listening: Listening::Yes,
            outgoing: VecDeque::new(),
            sent: (0, 0),
            requests: 0,
            refused: 0,
            owed: 0,
            draining: false,
            patience: None,
            lull: world.after(LULL),
            busy: true,
            world: world.clone(),
        }
    }

    /// Runs until the client rests or the session ends, and then closes the work channel, by which the Backend stops. Dropped
    /// before that, replies are lost.
    pub(super) async fn run(mut self, transport: &mut dyn Transport, orders: &Orders, speaker: &Speaker) -> Spell {
        let mut draining = orders.watch_draining();
        let over = poll_fn(|cx| self.poll(cx, transport, &mut draining, speaker)).await;
        if let Ok(Over::Rests) = over {
            return Spell::Rests;
        }
        self.connection.end();
        let parting = match (&over, self.draining) {
            (Err(_), _) => Parting::Lost,
            (Ok(_), false) => Parting::Heard,
            (Ok(_), true) => Parting::Unheard,
        };
        let end = match over {
            Ok(_) if orders.is_draining() => End::Drained,
            Ok(_) => End::Disconnected,
            Err(end) => {
                if self.requests > 0 {
                    speaker.debug(format_args!("{} requests were not answered", self.requests));
                }
                end
            }
        };
        Spell::Ended(end, parting)
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        transport: &mut dyn Transport,
        draining: &mut Watch,
        speaker: &Speaker,
    ) -> Poll<Result<Over, End>> {
        if !self.draining && draining.poll(cx).is_ready() {
            self.draining = true;
            if self.listening == Listening::Yes {
                self.listening = Listening::Refusing;
            }
        }
        loop {
            let mut moved = self.poll_replies(cx)?;
            if self.connection.is_cut() {
                return Poll::Ready(Err(End::Cut));
            }
            moved |= self.poll_send(cx, transport, speaker).map_err(End::Lost)?;
            moved |= self.hand_down()?;
            moved |= self.poll_receive(cx, transport)?;
            if self.listening == Listening::No {
                // What is asked for is still answered, but nobody makes the client wait for it.
                self.connection.end();
            }
            if self.listening == Listening::No && self.requests == 0 {
                return Poll::Ready(Ok(Over::Done));
            }
            if !moved {
                self.give_back_input();
                return match self.poll_lull(cx) {
                    Poll::Ready(()) => Poll::Ready(Ok(Over::Rests)),
                    Poll::Pending => self.poll_patience(cx).map(|()| Err(End::Stalled)),
                };
            }
            self.busy = true;
        }
    }

    /// Ready when the client has asked for nothing for a while and is owed nothing.
    fn poll_lull(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_idle = self.listening == Listening::Yes
            && self.requests == 0
            && self.skip == 0
            && self.partial.is_none()
            && self.input.bytes().is_empty();
        while is_idle && Pin::new(&mut self.lull).poll(cx).is_ready() {
            self.lull = self.world.after(LULL);
            if !std::mem::take(&mut self.busy) {
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }

    /// Ready when the server is ending and the client has taken nothing for too long.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.draining || self.outgoing.is_empty() {
            self.patience = None;
            return Poll::Pending;
        }
        let patience = self.patience.get_or_insert_with(|| Box::new(self.world.after(STALL)));
        Pin::new(&mut **patience).poll(cx)
    }

    /// Takes replies from the Backend. Whether there were any.
    fn poll_replies(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let mut any = false;
        while self.requests > 0 {
            match self.replies.as_mut().poll_next(cx) {
                Poll::Ready(Some(replies)) => {
                    any = true;
                    // Counted when they are sent: until then the client is owed them.
                    self.outgoing.push_back(replies);
                }
                Poll::Ready(None) => return Err(End::Broken("the backend of this connection has ended".into())),
                Poll::Pending => break,
            }
        }
        Ok(any)
    }

    /// Sends what there is. Whether anything was sent.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        transport: &mut dyn Transport,
        speaker: &Speaker,
    ) -> io::Result<bool> {
        let mut any = false;
        while !self.outgoing.is_empty() {
            let attempt = match self.next_file() {
                Some((file, offset, length)) => transport.poll_send_file(cx, file, offset, length),
                None => {
                    let mut slices = [IoSlice::new(&[]); PIECES];
                    let count = self.gather(&mut slices);
                    transport.poll_send(cx, &slices[..count])
                }
            };
            let sent = match attempt {
                Poll::Ready(sent) => sent?,
                Poll::Pending => break,
            };
            if sent == 0 && self.give_up_files(speaker) {
                continue;
            }
            if sent == 0 {
                return Err(io::Error::new(io::ErrorKind::WriteZero, "a reply could not be sent to its end"));
            }
            any = true;
            self.patience = None;
            self.advance(sent);
        }
        Ok(any)
    }

    /// What is to be sent next, if it is a piece of a file.
    fn next_file(&self) -> Option<(&File, u64, usize)> {
        let (piece, sent) = self.sent;
        match self.outgoing.front()?.segments.pieces().get(piece)? {
            Piece::File(file, offset, length) => Some((&**file, offset + sent as u64, length - sent)),
            _ => None,
        }
    }

    /// What is to be sent next is a piece of a file, and not there: zeroes take its place, and an error follows. False if the
    /// reply has no place for an error.
    fn give_up_files(&mut self, speaker: &Speaker) -> bool {
        let Some((_, offset, length)) = self.next_file() else { return false };
        speaker.error(format_args!("{FILE_ENDED}: {length} bytes at {offset}"));
        let piece = self.sent.0;
        self.outgoing.front_mut().is_some_and(|replies| replies.segments.give_up_files(piece))
    }

    /// The next pieces to send, up to one of a file.
    fn gather<'a>(&'a self, slices: &mut [IoSlice<'a>; PIECES]) -> usize {
        let mut count = 0;
        let (first, mut skip) = self.sent;
        let mut from = first;
        for replies in &self.outgoing {
            for piece in &replies.segments.pieces()[from..] {
                let mut bytes = match piece {
                    Piece::Own(range) | Piece::End(range, _) => &replies.segments.own()[range.clone()],
                    Piece::Lent(memory, range) => &(**memory).as_ref()[range.clone()],
                    Piece::File(..) => return count,
                    Piece::Zeroes(length) => {
                        let mut left = length - skip;
                        skip = 0;
                        while left > 0 && count < PIECES {
                            let bytes = &ZEROES[..left.min(ZEROES.len())];
                            slices[count] = IoSlice::new(bytes);
                            count += 1;
                            left -= bytes.len();
                        }
                        if count == PIECES {
                            return count;
                        }
                        continue;
                    }
                };
                bytes = &bytes[skip..];
                skip = 0;
                slices[count] = IoSlice::new(bytes);
                count += 1;
                if count == PIECES {
                    return count;
                }
            }
            from = 0;
        }
        count
    }

    /// Accounts for `count` bytes that were sent.
    fn advance(&mut self, mut count: usize) {
        while let Some(replies) = self.outgoing.front() {
            let pieces = replies.segments.pieces();
            while let Some(piece) = pieces.get(self.sent.0) {
                let left = crate::segments::piece_length(piece) - self.sent.1;
                if count < left {
                    self.sent.1 += count;
                    return;
                }
                count -= left;
                self.sent = (self.sent.0 + 1, 0);
            }
            self.sent = (0, 0);
            if let Some(replies) = self.outgoing.pop_front() {
                self.requests -= replies.requests;
                self.refused -= replies.refused;
                self.owed -= replies.weight;
                self.buffers.give_back_reply(replies.segments);
            }
        }
    }

    /// Hands the parsed requests to the Backend, if it has room. Whether it took them.
    fn hand_down(&mut self) -> Result<bool, End> {
        if self.batch.is_empty() {
            return Ok(false);
        }
        match self.work.try_send(std::mem::take(&mut self.batch)) {
            Ok(()) => Ok(true),
            Err(async_channel::TrySendError::Full(batch)) => {
                // It has replies to hand up before it takes more, and those wake us.
                self.batch = batch;
                Ok(false)
            }
            Err(async_channel::TrySendError::Closed(_)) => {
                Err(End::Broken("the backend of this connection has ended".into()))
            }
        }
    }

    /// Receives and parses, as far as the client may go on. Whether anything came.
    fn poll_receive(&mut self, cx: &mut Context<'_>, transport: &mut dyn Transport) -> Result<bool, End> {
        let mut moved = self.parse()?;
        while self.listening != Listening::No && self.may_take_more() {
            // A client that sends and sends is not listened to for ever.
            let last = self.listening == Listening::Refusing && self.requests == self.refused;
            if last {
                // What was there when the end was asked for gets its answer.
                transport.look_again();
            }
            let received = match self.poll_receive_once(cx, transport) {
                Poll::Ready(received) => received,
                Poll::Pending => {
                    // Half a request at the end of the last pass was never promised anything.
                    if last {
                        self.listening = Listening::No;
                        moved = true;
                    }
                    break;
                }
            };
            let full = match received {
                Ok(Some(full)) => full,
                Ok(None) => {
                    self.ended()?;
                    moved = true;
                    break;
                }
                Err(error) => return Err(End::Lost(error)),
            };
            // Also where no request was whole: only a receive that found nothing leaves word to be woken.
            moved = true;
            self.parse()?;
            if last {
                self.listening = Listening::No;
            }
            if !full || !self.batch.is_empty() {
                break;
            }
        }
        Ok(moved)
    }

    /// The stream has ended: orderly only between two requests.
    fn ended(&mut self) -> Result<(), End> {
        if self.partial.is_some() || self.skip > 0 || !self.input.bytes().is_empty() {
            return Err(End::Lost(io::ErrorKind::UnexpectedEof.into()));
        }
        self.listening = Listening::No;
        Ok(())
    }

    fn may_take_more(&self) -> bool {
        self.batch.is_empty() && self.has_room()
    }

    /// One receive, to where the next bytes belong: the rest of a write's data, and what is behind it. `None` at the end of the
    /// stream, else whether there may be more.
    fn poll_receive_once(
        &mut self,
        cx: &mut Context<'_>,
        transport: &mut dyn Transport,
    ) -> Poll<io::Result<Option<bool>>> {
        if let Some(partial) = self.partial.take_if(|partial| partial.provide(&self.buffers).is_none()) {
            self.give_up(partial);
        }
        let Transmission { partial, input, buffers, .. } = self;
        if input.buffer.is_empty() {
            input.buffer = buffers.receive();
            (input.start, input.end) = (0, 0);
        } else if input.end == input.buffer.len() || input.start == input.end {
            // What is left is less than a request's header; it moves to the front.
            input.buffer.copy_within(input.start..input.end, 0);
            (input.start, input.end) = (0, input.end - input.start);
        }
        let wanted = partial.as_ref().map_or(0, |partial| partial.length - partial.filled);
        let mut slices: [IoSliceMut<'_>; SLICES] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
        let mut count = 0;
        let mut behind = &mut input.buffer[input.end..];
        if let Some(partial) = partial {
            match &mut partial.data {
                Data::Bytes(buffer) => {
                    slices[0] = IoSliceMut::new(&mut buffer[partial.filled..partial.length]);
                    count = 1;
                }
                Data::Blocks(blocks) => {
                    for (slice, piece) in slices[..SLICES - 1].iter_mut().zip(blocks.rest(partial.filled)) {
                        *slice = IoSliceMut::new(piece);
                        count += 1;
                    }
                }
            }
            if partial.length >= LARGE {
                let most = behind.len().min(BEHIND_LARGE);
                behind = &mut behind[..most];
            }
        }
        let space = |slices: &[IoSliceMut<'_>]| slices.iter().map(|slice| slice.len()).sum::<usize>();
        if space(&slices[..count]) == wanted {
            slices[count] = IoSliceMut::new(behind);
            count += 1;
        }
        let room = space(&slices[..count]);
        let received = ready!(transport.poll_receive(cx, &mut slices[..count]))?;
        // What the data still wants comes first.
        let data = received.min(wanted);
        if let Some(partial) = partial {
            partial.filled += data;
            let rest = partial.length - partial.filled;
            transport.await_bytes(if rest < LARGE { 1 } else { rest.min(AWAITED) });
        }
        input.end += received - data;
        Poll::Ready(Ok((received > 0).then_some(received == room)))
    }

    /// Makes requests of the bytes that are there, and leaves those of a request that is not there whole. Whether any bytes
    /// were used.
    fn parse(&mut self) -> Result<bool, End> {
        let mut used = false;
        let mut whole = Vec::new();
        if let Some(partial) = self.partial.take_if(|partial| partial.is_whole()) {
            used = true;
            let (payload, weight) = match partial.data {
                Data::Bytes(buffer) => (Payload::Bytes(Arc::new(buffer), 0..partial.length), partial.length),
                Data::Blocks(blocks) => {
                    let weight = blocks.weight();
                    (Payload::Blocks(blocks), weight)
                }
            };
            match (partial.command, &payload) {
                (Command::NarrowBlockStatus { offset, one }, Payload::Bytes(bytes, range)) => {
                    let narrowed = self.agreement.narrow(offset, one, &bytes[range.clone()]);
                    self.push_without_payload(partial.to, narrowed);
                }
                (command, _) => self.push(partial.to, Ok(command), Some(payload), weight),
            }
        }
        while self.partial.is_none() && self.listening != Listening::No && self.has_room() {
            let here = self.input.bytes();
            if self.skip > 0 {
                let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(here.len());
                if skipped == 0 {
                    break;
                }
                self.input.start += skipped;
                self.skip -= skipped as u64;
                used = true;
                continue;
            }
            if let Some((to, refusal)) = self.refusing.take() {
                self.push(to, Err(refusal), None, 0);
                used = true;
                continue;
            }
            let headers = self.agreement.headers;
            let Some(header) = here.get(..headers.request_length()) else { break };
            let Some(request) = Request::parse(headers, header) else {
                return Err(End::Broken("a request does not start with the request magic".into()));
            };
            self.input.start += header.len();
            used = true;
            self.request(request, &mut whole)?;
        }
        self.share(whole);
        Ok(used)
    }

    fn has_room(&self) -> bool {
        self.owed < MAX_OWED && self.requests < MAX_REQUESTS
    }

    /// Takes one request whose header was read. Payloads that are whole in the input are noted in `whole`.
    fn request(&mut self, request: Request, whole: &mut Vec<(usize, std::ops::Range<usize>)>) -> Result<(), End> {
        if request.kind == NBD_CMD_DISC {
            self.listening = Listening::No;
            return Ok(());
        }
        let checked = if self.listening == Listening::Refusing {
            Err(Refusal { code: ErrorCode::Shutdown, why: RefusalReason::Shutdown })
        } else {
            self.agreement.check(&request)
        };
        let headers = self.agreement.headers;
        let to = ReplyTo { headers, cookie: request.cookie, offset: request.offset };
        let payload = request.payload(headers);
        let command = match checked {
            Ok(command) => command,
            Err(refusal) => {
                let is_end = refusal.code == ErrorCode::Shutdown;
                self.refused += usize::from(is_end);
                // With extended headers a client knows what is too long.
                let most = if headers == Headers::Extended { MAX_PAYLOAD } else { MAX_SKIP };
                if payload > u64::from(most) {
                    let why = format!("{}: {}: too much to skip", command_name(request.kind), refusal.why);
                    return Err(End::Broken(why));
                }
                self.skip = payload;
                // At the end nobody waits for what may never come.
                if is_end {
                    self.push(to, Err(refusal), None, 0)
                } else {
                    self.refusing = Some((to, refusal))
                }
                return Ok(());
            }
        };
        if payload == 0 {
            self.push_without_payload(to, Ok(command));
            return Ok(());
        }
        // What passed the check is at most MAX_PAYLOAD.
        let length = usize::try_from(payload).unwrap_or(usize::MAX).min(MAX_PAYLOAD as usize);
        let here = self.input.bytes();
        if let (Command::NarrowBlockStatus { offset, one }, Some(bytes)) = (command, here.get(..length)) {
            let narrowed = self.agreement.narrow(offset, one, bytes);
            self.input.start += length;
            self.push_without_payload(to, narrowed);
        } else if here.len() >= length {
            whole.push((self.batch.len(), self.input.start..self.input.start + length));
            self.input.start += length;
            self.push(to, Ok(command), None, length);
        } else {
            let data = self.place(command, length);
            let mut partial = Partial { to, command, data, filled: 0, length };
            let here = self.input.bytes();
            self.input.start += partial.fill(here, &self.buffers);
            if self.input.start == self.input.end {
                self.partial = Some(partial);
            } else {
                self.give_up(partial);
            }
        }
        Ok(())
    }

    /// There is no memory for the data of a write: what is still to come of it is read over, and the client may go on.
    /// Source: nbdkit server/protocol.c, `skip_over_write_buffer`.
    fn give_up(&mut self, partial: Partial) {
        self.skip = (partial.length - partial.filled) as u64;
        let why = RefusalReason::NoMemory(partial.length as u64);
        self.refusing = Some((partial.to, Refusal { code: ErrorCode::NoMemory, why }));
    }

    /// Memory for the data of a write.
    fn place(&self, command: Command, length: usize) -> Data {
        if let Command::Write { offset, .. } = command
            && length >= LARGE
            && self.agreement.offered.takes_blocks
        {
            return Data::Blocks(Blocks::new(offset, length));
        }
        Data::Bytes(self.buffers.payload(length))
    }

    /// Gives the receive buffer to the requests whose data is in it; what is behind them moves to a new one.
    fn share(&mut self, whole: Vec<(usize, std::ops::Range<usize>)>) {
        if whole.is_empty() {
            return;
        }
        let mut rest = Vec::new();
        let left = self.input.bytes();
        let length = left.len();
        if length > 0 {
            rest = if length <= RECEIVE { self.buffers.receive() } else { vec![0; length] };
            rest[..length].copy_from_slice(left);
        }
        let buffer = Arc::new(std::mem::replace(&mut self.input.buffer, rest));
        (self.input.start, self.input.end) = (0, length);
        // The first of them pays for what of the buffer is nobody's: small writes, one in each receive, keep it all.
        let used: usize = whole.iter().map(|(_, range)| range.len()).sum();
        let unused = buffer.len().saturating_sub(used);
        self.batch[whole[0].0].weight += unused;
        self.owed += unused;
        for (index, range) in whole {
            self.batch[index].payload = Some(Payload::Bytes(Arc::clone(&buffer), range));
        }
    }

    fn push_without_payload(&mut self, to: ReplyTo, command: Result<Command, Refusal>) {
        let weight = match command {
            Ok(Command::Read { length, .. }) => length as usize,
            // Read, if only to be forgotten.
            Ok(Command::Cache { length, .. }) if self.agreement.offered.cache == Support::Emulate => {
                length.min(u64::from(MAX_PAYLOAD)) as usize
            }
            // The longest answer; how long it will be is not known yet.
            Ok(Command::BlockStatus { one: false, length, contexts, .. }) => {
                usize::try_from(length).unwrap_or(MAX_EXTENTS).min(MAX_EXTENTS) * EXTENT * contexts.count()
            }
            _ => 0,
        };
        self.push(to, command, None, weight);
    }

    fn push(&mut self, to: ReplyTo, command: Result<Command, Refusal>, payload: Option<Payload>, data: usize) {
        let weight = data + REQUEST_COST;
        self.requests += 1;
        self.owed += weight;
        self.batch.push(Work { to, command, payload, weight });
    }

    /// Nothing to do for now: a session that waits keeps no buffer.
    fn give_back_input(&mut self) {
        if self.input.start == self.input.end && !self.input.buffer.is_empty() {
            self.buffers.give_back(std::mem::take(&mut self.input.buffer));
            (self.input.start, self.input.end) = (0, 0);
        }
    }
}

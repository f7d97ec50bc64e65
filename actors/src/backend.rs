//! Owns the device of one connection and carries out what the Session hands down, batch by batch.
//!
//! A request that the device answers at once costs no task and no thread. One that would wait goes to a pool of threads, at
//! most so many at a time, and its reply comes when it comes. Runs on the thread of its Session, spell by spell: it rests when the Session
//! has closed the work channel and every request has returned. At the client's end it flushes once more where that is due, and
//! closes the device.
//! A device that panics is answered for with an error, and is a fatal cause for the Coordinator: what it shares with other
//! clients may be half done.
//! Source of the emulations: nbdkit server/plugins.c.

use std::any::Any;
use std::collections::VecDeque;
use std::future::pending;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_channel::{Receiver, Sender};
use smol::future::or;
use smol::lock::{Mutex, MutexGuardArc, Semaphore, SemaphoreGuardArc};

use crate::blocks::Blocks;
use crate::buffers::Buffers;
use crate::connection::Connection;
use crate::coordinator::{self, Cause};
use crate::device::{
    Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Extents, Flags, Result, Segments, Support,
    ThreadModel,
};
use crate::log::Speaker;
use crate::protocol::constants::MAX_PAYLOAD;
use crate::protocol::replies::ReplyTo;
use crate::protocol::transmission::{Agreement, Command, Refusal};
use crate::session::Surroundings;
use crate::world::World;

/// Requests on their way down, in the order in which they came.
pub(crate) type Batch = Vec<Work>;

/// One request.
pub(crate) struct Work {
    pub to: ReplyTo,
    /// What to do, or why not: a refused request takes the same way, so that there is one way for replies.
    pub command: std::result::Result<Command, Refusal>,
    /// The data of a write.
    pub payload: Option<Payload>,
    /// What the Session counts this request as, in bytes.
    pub weight: usize,
}

/// The data of a write.
pub(crate) enum Payload {
    /// A piece of a buffer that was received, shared by the requests in it.
    Bytes(Arc<Vec<u8>>, Range<usize>),
    /// Received into blocks, for the device to keep.
    Blocks(Blocks),
}

/// Replies on their way up.
pub(crate) struct Replies {
    pub segments: Segments,
    pub requests: usize,
    /// How many of `requests` were refused because the server is ending.
    pub refused: usize,
    pub weight: usize,
}

/// Zeroes for small writes where zeroes are emulated.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];
/// The most that is read or written at a time where an operation is emulated, in bytes: what one request may carry, so that a
/// device for which each call is dear, a script say, is not called more often than need be. Source: nbdkit server/plugins.c.
const EMULATED: u32 = MAX_PAYLOAD;

/// How requests to a device are kept apart. Source: nbdkit-plugin.pod "Threads".
#[derive(Clone)]
pub(crate) struct Gates {
    model: ThreadModel,
    one: Arc<Mutex<()>>,
    places: Arc<Places>,
    world: World,
}

/// How many requests of all clients together may be on threads. The rest of those that a pool has (`pool.rs`) is for devices that
/// are opened and closed, so that a device which hangs does not keep new clients out.
const PLACES: usize = 400;

/// How many of them are for clients that have no request on a thread yet, so that devices which hang for some clients, who have
/// as many threads as they may, do not keep out the others.
const FIRST: usize = 100;

/// Places on threads.
struct Places {
    /// For any request.
    any: Line,
    /// For a client's first.
    first: Line,
}

impl Places {
    fn new() -> Places {
        Places { any: Line::new(PLACES - FIRST), first: Line::new(FIRST) }
    }

    /// A place for a client that has `running` already, if one is free and nobody waits for it.
    fn try_take(&self, running: usize) -> Option<Place> {
        self.any.try_take().or_else(|| if running == 0 { self.first.try_take() } else { None })
    }

    async fn take(&self, running: usize) -> Place {
        let first = async { if running == 0 { self.first.take().await } else { pending().await } };
        or(self.any.take(), first).await
    }
}

/// Some of the places: first come, first served.
struct Line {
    free: Arc<Semaphore>,
    /// How many wait for one.
    queue: AtomicUsize,
}

impl Line {
    fn new(places: usize) -> Line {
        Line { free: Arc::new(Semaphore::new(places)), queue: AtomicUsize::new(0) }
    }

    fn try_take(&self) -> Option<Place> {
        if self.queue.load(Ordering::Relaxed) > 0 { None } else { self.free.try_acquire_arc() }
    }

    async fn take(&self) -> Place {
        struct Leave<'a>(&'a AtomicUsize);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.queue.fetch_add(1, Ordering::Relaxed);
        let _leave = Leave(&self.queue);
        self.free.acquire_arc().await
    }
}

type Place = SemaphoreGuardArc;
pub(crate) type Turn = MutexGuardArc<()>;

/// What a request holds while it is on a thread.
struct Placed {
    _place: Place,
    _alone: Option<Turn>,
}

impl Gates {
    pub(crate) fn new(model: ThreadModel, world: World) -> Gates {
        Gates { model, one: Arc::default(), places: Arc::new(Places::new()), world }
    }

    /// Waits for the only place there is, where clients are served one after another.
    pub(crate) async fn enter(&self) -> Option<Turn> {
        match self.model {
            ThreadModel::SerializeConnections => Some(self.one.lock_arc().await),
            _ => None,
        }
    }

    /// Waits until no other call is made, where calls are made one by one: also those that are no requests.
    pub(crate) async fn alone(&self) -> Option<Turn> {
        match self.model {
            ThreadModel::SerializeAllRequests => Some(self.one.lock_arc().await),
            _ => None,
        }
    }

    /// Makes a call that is no request on a thread that may wait, alone where calls are made one by one. Dropped while it waits
    /// for that, the call is not made; after that it is, and its result is lost.
    pub(crate) async fn apart<T: Send + 'static>(&self, call: impl FnOnce() -> T + Send + 'static) -> T {
        let alone = self.alone().await;
        self.within(alone, call).await
    }

    /// As [`Gates::apart`], where the wait is over. Dropped, the call may be made all the same, and its result is lost.
    pub(crate) async fn within<T: Send + 'static>(
        &self,
        alone: Option<Turn>,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let call = move || {
            let _alone = alone;
            call()
        };
        self.world.unblock(call).await
    }

    /// As [`Gates::alone`], on a thread that may wait.
    fn alone_now(&self) -> Option<Turn> {
        smol::block_on(self.alone())
    }

    /// As [`Gates::alone`], if nothing has to be waited for: `Err`.
    fn try_alone(&self) -> std::result::Result<Option<Turn>, ()> {
        match self.model {
            ThreadModel::SerializeAllRequests => self.one.try_lock_arc().map(Some).ok_or(()),
            _ => Ok(None),
        }
    }

    /// What a request of a client needs that has `running` on threads, to go there too, if nothing has to be waited for.
    fn try_place(&self, running: usize) -> Option<Placed> {
        Some(Placed { _alone: self.try_alone().ok()?, _place: self.places.try_take(running)? })
    }

    /// Several connections may be open at once.
    pub(crate) fn multi_conn(&self) -> bool {
        self.model > ThreadModel::SerializeConnections
    }
}

/// A device that was opened for a client, and what was found out about it. Whoever has it hands it to a [`Backend`] or closes
/// it: just dropped, the device is never told that it is over.
pub(crate) struct Opened {
    device: Arc<dyn Device>,
    gates: Gates,
    coordinator: coordinator::Handle,
    pub size: u64,
    pub offered: Capabilities,
    /// The block sizes in it are advice.
    pub takes_any_size: bool,
}

/// Opens the export that `client` asks for, within the turn `alone`. May take as long as the device takes. Dropped, the open
/// finishes on its thread, where the device is then closed.
pub(crate) async fn open(
    exports: Arc<dyn Exports>,
    client: Client,
    gates: Gates,
    alone: Option<Turn>,
    coordinator: coordinator::Handle,
) -> Result<Opened> {
    let (sender, receiver) = async_channel::bounded(1);
    let awaited = Awaited { receiver, world: gates.world.clone() };
    let call = move || {
        let _alone = alone;
        let opened = open_now(&*exports, &client, gates, coordinator);
        if let Err(unwanted) = sender.try_send(opened)
            && let Ok(opened) = unwanted.into_inner()
        {
            opened.close_now();
        }
    };
    awaited.world.unblock_detached(call);
    let gone = || Error::failed(ErrorCode::Io, "the thread that opened the device has ended");
    awaited.receiver.recv().await.unwrap_or_else(|_| Err(gone()))
}

/// Who waits for a device to be opened.
struct Awaited {
    receiver: Receiver<Result<Opened>>,
    world: World,
}

impl Drop for Awaited {
    fn drop(&mut self) {
        // What comes now is closed by its thread; what has come already, here.
        self.receiver.close();
        if let Ok(Ok(opened)) = self.receiver.try_recv() {
            self.world.unblock_detached(move || {
                let _alone = opened.gates.alone_now();
                opened.close_now();
            });
        }
    }
}

fn open_now(exports: &dyn Exports, client: &Client, gates: Gates, coordinator: coordinator::Handle) -> Result<Opened> {
    let device: Arc<dyn Device> = Arc::from(calmly(&coordinator, || exports.open(client))?);
    let asked = calmly(&coordinator, || {
        let size = device.size()?;
        if size > i64::MAX as u64 {
            return Err(Error::failed(ErrorCode::Overflow, format!("the device's size {size} is over 2^63-1")));
        }
        let mut offered = device.capabilities()?;
        offered.write &= !client.read_only;
        Ok((size, settle(offered), device.takes_any_size()))
    });
    match asked {
        Ok((size, offered, takes_any_size)) => Ok(Opened { device, gates, coordinator, size, offered, takes_any_size }),
        Err(error) => {
            // It was opened, so it is closed; what was wrong with it first is what counts.
            let _ = calmly(&coordinator, || device.close());
            Err(error)
        }
    }
}

/// Makes capabilities agree with each other. Source: nbdkit server/backend.c.
pub(crate) fn settle(mut offered: Capabilities) -> Capabilities {
    if !offered.write {
        offered.trim = false;
        offered.zero = Support::None;
        offered.fua = Support::None;
    }
    if !offered.flush && offered.fua == Support::Emulate {
        offered.fua = Support::None;
    }
    offered.fast_zero &= offered.zero != Support::None;
    offered
}

impl Opened {
    /// Closes a device that nobody wants any more, on the thread that it was opened on. Nobody is left to hear of a failure.
    fn close_now(&self) {
        let _ = calmly(&self.coordinator, || self.device.close());
    }

    /// Closes a device that was only looked at.
    pub(crate) async fn close(self) -> Result<()> {
        let Opened { device, coordinator, gates, .. } = self;
        gates.apart(move || calmly(&coordinator, || device.close())).await
    }
}

/// Makes a call into a device or its exports; a panic there is an error of the call and a fatal cause.
pub(crate) fn calmly<T>(coordinator: &coordinator::Handle, call: impl FnOnce() -> Result<T>) -> Result<T> {
    // What the panic left half done is the device's own, and the server ends because of it.
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let why = match message(&*panic) {
            Some(message) => format!("the device panicked: {message}"),
            None => "the device panicked".to_owned(),
        };
        coordinator.shut_down(Cause::Fatal(why.clone()));
        Err(Error::failed(ErrorCode::Io, why))
    })
}

fn message(panic: &(dyn Any + Send)) -> Option<&str> {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str))
}

/// The Backend of one connection.
pub(crate) struct Backend {
    device: Arc<dyn Device>,
    agreement: Agreement,
    at_once: bool,
    gates: Gates,
    threads: usize,
    buffers: Buffers,
    connection: Connection,
    speaker: Speaker,
    coordinator: coordinator::Handle,
    waiting: VecDeque<Work>,
    running: usize,
    /// Only while something is running, because it is the largest thing here and most clients are idle.
    pool: Option<Pool>,
    written: Written,
}

/// Where threads put what they have done: room for as many as can be running, so that none ever waits.
struct Pool {
    done: Sender<Completion>,
    completions: Receiver<Completion>,
}

/// What the last flush has not covered. A flush covers what had returned when it was started, and nothing that returned, or
/// was even started, while it went on.
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    /// How many requests that change the device have returned.
    returned: u64,
    /// How many of them the last flush that succeeded has covered.
    covered: u64,
}

impl Written {
    /// A request has returned, whether it succeeded or not: a write that failed may have written something.
    fn note(&mut self, command: Command) {
        if matches!(command, Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. }) {
            self.returned += 1;
        }
    }

    /// A flush has succeeded that was started when `returned` was this.
    fn flushed(&mut self, returned: u64) {
        self.covered = self.covered.max(returned);
    }

    fn is_dirty(&self) -> bool {
        self.returned > self.covered
    }
}

/// What a thread of the pool made of a request.
struct Completion {
    replies: Replies,
    command: Option<Command>,
    /// For a flush that succeeded: how much it covers.
    flushed: Option<u64>,
}

/// What the Backend hears.
enum Event {
    Work(Batch),
    Done(Completion),
    /// One that waits may go to a thread.
    Placed(Placed),
    NoMoreWork,
}

impl Backend {
    pub(crate) fn new(
        opened: Opened,
        agreement: Agreement,
        surroundings: &Surroundings,
        connection: &Connection,
        speaker: Speaker,
    ) -> Backend {
        let (buffers, rules) = (&surroundings.buffers, &surroundings.rules);
        let parallel = opened.gates.model == ThreadModel::Parallel;
        Backend {
            at_once: opened.device.answers_at_once(),
            device: opened.device,
            agreement,
            gates: opened.gates,
            threads: if parallel { rules.threads.max(1) } else { 1 },
            buffers: buffers.clone(),
            connection: connection.clone(),
            speaker,
            coordinator: opened.coordinator,
            waiting: VecDeque::new(),
            running: 0,
            pool: None,
            written: Written::default(),
        }
    }

    pub(crate) fn agreement(&self) -> Agreement {
        self.agreement
    }

    /// Serves until `work` is closed and everything has returned. Replies are handed up when they are `enough` bytes, or all
    /// that there are. Dropped before that, requests on the pool still finish; their replies are lost.
    pub(crate) async fn run(
        &mut self,
        work: Receiver<Batch>,
        replies: Sender<Replies>,
        enough: usize,
        draining: impl Fn() -> bool,
    ) {
        let mut open = true;
        while open || self.running > 0 || !self.waiting.is_empty() {
            let finished = async {
                match &self.pool {
                    // Its other end is in it too, so it never closes.
                    Some(pool) => pool.completions.recv().await.map_or(Event::NoMoreWork, Event::Done),
                    None => pending().await,
                }
            };
            let placed = async {
                if self.waiting.is_empty() || self.running == self.threads {
                    return pending().await;
                }
                // In this order, because who waits to be alone needs no thread for it.
                let alone = self.gates.alone().await;
                Event::Placed(Placed { _place: self.gates.places.take(self.running).await, _alone: alone })
            };
            let finished = or(finished, placed);
            let event = if open {
                or(finished, async { work.recv().await.map_or(Event::NoMoreWork, Event::Work) }).await
            } else {
                finished.await
            };
            let mut placed = None;
            let returned = matches!(event, Event::Done(_));
            match event {
                Event::Work(batch) => self.serve(batch, &replies, enough).await,
                Event::Done(first) => {
                    hand_up(&replies, self.completed(first)).await;
                    while let Some(Ok(next)) = self.pool.as_ref().map(|pool| pool.completions.try_recv()) {
                        hand_up(&replies, self.completed(next)).await;
                    }
                }
                Event::NoMoreWork => open = false,
                Event::Placed(free) => placed = Some(free),
            }
            if replies.is_closed() && draining() {
                // A client that was cut off was promised nothing of what has not begun, and the end waits for us.
                self.waiting.clear();
            }
            if returned && self.threads == 1 && self.at_once {
                // They came behind the one that had to wait and were not tried yet; most of them need no thread.
                let behind = std::mem::take(&mut self.waiting);
                self.serve(behind, &replies, enough).await;
            }
            self.start_waiting(placed);
            if self.running == 0 {
                self.pool = None;
            }
        }
    }

    /// Flushes the device, if it was written to since it was flushed, and closes it. The result is that of the flush and the
    /// close. Dropped before its end, both go on if they have begun.
    pub(crate) async fn close(self) -> Result<()> {
        // Not only at the server's end: whether this client is the last, by which the server ends, is not known yet.
        let flush = self.written.is_dirty() && self.agreement.offered.flush;
        let Backend { device, coordinator, gates, .. } = self;
        let call = move || {
            let flushed = if flush { calmly(&coordinator, || device.flush(&Call::FAREWELL)) } else { Ok(()) };
            // Also after a flush that failed.
            let closed = calmly(&coordinator, || device.close());
            flushed.and(closed)
        };
        gates.apart(call).await
    }

    /// Answers what can be answered at once and keeps the rest.
    async fn serve(&mut self, batch: impl IntoIterator<Item = Work>, up: &Sender<Replies>, enough: usize) {
        let mut replies = self.fresh();
        for mut work in batch {
            if self.try_at_once(&mut work, &mut replies.segments) {
                replies.requests += 1;
                replies.refused += usize::from(work.is_refused_at_end());
                replies.weight += work.weight;
                recycle(&self.buffers, work.payload);
            } else {
                self.waiting.push_back(work);
            }
            if replies.segments.len() >= enough {
                let full = std::mem::replace(&mut replies, self.fresh());
                hand_up(up, full).await;
                // Let it be sent while its data is still in the processor's cache, and its buffer be the next one's.
                smol::future::yield_now().await;
            }
        }
        if replies.requests > 0 {
            hand_up(up, replies).await;
        } else {
            self.buffers.give_back_reply(replies.segments);
        }
    }

    fn fresh(&self) -> Replies {
        Replies { segments: self.buffers.reply(), requests: 0, refused: 0, weight: 0 }
    }

    /// Whether it was answered, if only with an error.
    fn try_at_once(&mut self, work: &mut Work, out: &mut Segments) -> bool {
        let command = match &work.command {
            Ok(command) => *command,
            Err(refusal) => {
                let why = format!("invalid request: {}", refusal.why);
                self.speaker.error(format_args!("{why}"));
                work.to.error(out, refusal.code, &why);
                return true;
            }
        };
        // What waits already goes first where requests go one by one; and a flush must not overtake writes that the client
        // knows to be done, but those have been answered, so it may go ahead of those that wait.
        if !self.at_once || (self.threads == 1 && !(self.waiting.is_empty() && self.running == 0)) {
            return false;
        }
        let Ok(alone) = self.gates.try_alone() else { return false };
        let payload = work.payload.as_mut();
        let Backend { device, agreement, connection, coordinator, .. } = self;
        let target = Target { device: &**device, agreement, connection, coordinator };
        let answered = answer(target, command, work.to, payload, &Call::AT_ONCE, out);
        drop(alone);
        match answered {
            Answer::Blocked => return false,
            Answer::Done if command == Command::Flush => self.written.flushed(self.written.returned),
            Answer::Done => {}
            Answer::Failed(why) => self.speaker.error(format_args!("{why}")),
        }
        self.written.note(command);
        true
    }

    /// Puts waiting requests on threads, as many as may be; the first as `placed`, if that is there.
    fn start_waiting(&mut self, mut placed: Option<Placed>) {
        while self.running < self.threads && !self.waiting.is_empty() {
            let Some(placed) = placed.take().or_else(|| self.gates.try_place(self.running)) else { return };
            let Some(mut work) = self.waiting.pop_front() else { return };
            self.running += 1;
            let device = Arc::clone(&self.device);
            let agreement = self.agreement;
            let mut segments = self.buffers.reply();
            let buffers = self.buffers.clone();
            let speaker = self.speaker.clone();
            let (connection, coordinator) = (self.connection.clone(), self.coordinator.clone());
            let returned = self.written.returned;
            let pool = self.pool.get_or_insert_with(|| {
                let (done, completions) = async_channel::bounded(self.threads);
                Pool { done, completions }
            });
            let done = pool.done.clone();
            // Its end is the message it sends, which always fits.
            self.gates.world.unblock_detached(move || {
                let mut flushed = None;
                let command = work.command.ok();
                if let Some(command) = command {
                    let target = Target {
                        device: &*device,
                        agreement: &agreement,
                        connection: &connection,
                        coordinator: &coordinator,
                    };
                    let answered =
                        answer(target, command, work.to, work.payload.as_mut(), &Call::BLOCKING, &mut segments);
                    if let Answer::Failed(why) = &answered {
                        speaker.error(format_args!("{why}"));
                    }
                    flushed = (command == Command::Flush && matches!(answered, Answer::Done)).then_some(returned);
                }
                recycle(&buffers, work.payload);
                // Before it is said, so that whoever hears of it finds all free.
                drop(placed);
                let replies = Replies { segments, requests: 1, refused: 0, weight: work.weight };
                let _ = done.try_send(Completion { replies, command, flushed });
            });
        }
    }

    fn completed(&mut self, completion: Completion) -> Replies {
        self.running -= 1;
        if let Some(returned) = completion.flushed {
            self.written.flushed(returned);
        }
        if let Some(command) = completion.command {
            self.written.note(command);
        }
        completion.replies
    }
}

async fn hand_up(up: &Sender<Replies>, replies: Replies) {
    // A Session that has left wants no replies; the work is done all the same.
    let _ = up.send(replies).await;
}

/// The last request that shares a buffer gives it back.
fn recycle(buffers: &Buffers, payload: Option<Payload>) {
    match payload {
        Some(Payload::Bytes(buffer, _)) => {
            if let Some(buffer) = Arc::into_inner(buffer) {
                buffers.give_back(buffer);
            }
        }
        Some(Payload::Blocks(blocks)) => buffers.give_back_blocks(blocks),
        None => {}
    }
}

impl Work {
    fn is_refused_at_end(&self) -> bool {
        self.command.as_ref().is_err_and(|refusal| refusal.code == ErrorCode::Shutdown)
    }
}

enum Answer {
    Done,
    Failed(String),
    Blocked,
}

/// What a request is carried out on, and who is told if that fails badly.
#[derive(Clone, Copy)]
struct Target<'a> {
    device: &'a dyn Device,
    agreement: &'a Agreement,
    connection: &'a Connection,
    coordinator: &'a coordinator::Handle,
}

/// Carries out `command` and appends its reply, or an error reply, to `out`; nothing if it would have to wait.
fn answer(
    Target { device, agreement, connection, coordinator }: Target<'_>,
    command: Command,
    to: ReplyTo,
    payload: Option<&mut Payload>,
    call: &Call,
    out: &mut Segments,
) -> Answer {
    if connection.refuses() {
        let why = "the device has disconnected the client";
        to.error(out, ErrorCode::Shutdown, why);
        return Answer::Failed(why.to_owned());
    }
    let start = out.mark();
    let attempt = calmly(coordinator, || carry_out(device, agreement, command, to, payload, call, out));
    let error = match attempt {
        Ok(()) => return Answer::Done,
        Err(error) => error,
    };
    out.truncate(start);
    if matches!(error, Error::WouldBlock) && !call.may_block() {
        return Answer::Blocked;
    }
    let fast = matches!(command, Command::WriteZeroes { fast: true, .. });
    let code = match error.code() {
        // The specification keeps these two for one case each; EOVERFLOW is given by the check of requests.
        ErrorCode::NotSupported if !fast => ErrorCode::Invalid,
        ErrorCode::Overflow => ErrorCode::Invalid,
        code => code,
    };
    let why = error.to_string();
    to.error(out, code, &why);
    // A client asks for fast zeroes to find out; that they are not to be had is no failure.
    if fast && code == ErrorCode::NotSupported { Answer::Done } else { Answer::Failed(why) }
}

fn carry_out(
    device: &dyn Device,
    agreement: &Agreement,
    command: Command,
    to: ReplyTo,
    payload: Option<&mut Payload>,
    call: &Call,
    out: &mut Segments,
) -> Result<()> {
    let offered = &agreement.offered;
    let native = |fua: bool| Flags { fua: fua && offered.fua.is_own(), ..Flags::default() };
    let mut flush_after = false;
    if let Command::Write { fua: true, .. } | Command::Trim { fua: true, .. } | Command::WriteZeroes { fua: true, .. } =
        command
        && offered.fua == Support::Emulate
        && !call.may_block()
    {
        // Where the flush would wait all of it is made again, and by then a device may have taken the data's blocks.
        return Err(Error::WouldBlock);
    }
    match command {
        Command::Read { offset, length, whole } => {
            let start = out.mark();
            to.read(out, length);
            let data = out.mark();
            let before = out.len();
            if length > 0 {
                device.read_segments(out, length as usize, offset, call)?;
            }
            let got = out.len() - before;
            if got != length as usize {
                let why = format!("the device gave {got} bytes for a read of {length}");
                return Err(Error::failed(ErrorCode::Io, why));
            }
            to.complete(out, start, data, (!whole).then(|| agreement.minimum_block()));
            return Ok(());
        }
        Command::BlockStatus { offset, length, one, contexts } => {
            let mut left = contexts.count();
            for context in contexts.iter() {
                let mut extents = Extents::new(offset, length, one);
                match context.checked_sub(1) {
                    Some(own) => device.meta_context(own as usize, &mut extents, call)?,
                    None if offered.extents => device.extents(&mut extents, call)?,
                    None => drop(extents.add(offset, length, 0)),
                }
                if extents.list().is_empty() {
                    return Err(Error::failed(ErrorCode::Io, "the device described no extent"));
                }
                left -= 1;
                to.block_status(out, context, &extents, agreement.size, left == 0);
            }
            return Ok(());
        }
        Command::Write { offset, fua, .. } => {
            match payload {
                Some(Payload::Bytes(buffer, range)) => {
                    device.write(&buffer[range.clone()], offset, native(fua), call)?
                }
                Some(Payload::Blocks(blocks)) => device.write_blocks(blocks, offset, native(fua), call)?,
                // Writes of nothing are answered without the device.
                None => {}
            }
            flush_after = fua;
        }
        Command::Flush => device.flush(call)?,
        Command::Trim { offset, length, fua } => {
            device.trim(length, offset, native(fua), call)?;
            flush_after = fua;
        }
        Command::WriteZeroes { offset, length, fua, may_trim, fast } => {
            let flags = Flags { may_trim, fast, ..native(fua) };
            zero(device, offered, length, offset, flags, call)?;
            flush_after = fua;
        }
        Command::Cache { offset, length } if offered.cache.is_own() => device.cache(length, offset, call)?,
        Command::Cache { offset, length } => read_through(device, offered, length, offset, call)?,
        Command::NarrowBlockStatus { .. } => {}
    }
    if flush_after && offered.fua == Support::Emulate {
        device.flush(call)?;
    }
    to.done(out);
    Ok(())
}

/// Zeroes by the device, or by writing them.
pub(crate) fn zero(
    device: &dyn Device,
    offered: &Capabilities,
    length: u64,
    offset: u64,
    flags: Flags,
    call: &Call,
) -> Result<()> {
    if offered.zero.is_own() {
        match device.zero(length, offset, flags, call) {
            Err(Error::Failed { code: ErrorCode::NotSupported, .. }) if !flags.fast => {}
            done => return done,
        }
    } else if flags.fast {
        return Err(Error::not_supported("zeroes would be no faster than a write"));
    }
    bounded(length)?;
    if !call.may_block() {
        return Err(Error::WouldBlock);
    }
    let write = Flags { fua: flags.fua, ..Flags::default() };
    let most = most(offered, length);
    // Nobody writes to them, so they cost the memory of one page.
    let many = if most > ZEROES.len() { vec![0; most] } else { Vec::new() };
    let zeroes = if many.is_empty() { &ZEROES[..] } else { &many };
    pieces(length, offset, most, |piece, at| device.write(&zeroes[..piece], at, write, call))
}

/// Brings data near by reading it.
pub(crate) fn read_through(
    device: &dyn Device,
    offered: &Capabilities,
    length: u64,
    offset: u64,
    call: &Call,
) -> Result<()> {
    bounded(length)?;
    if !call.may_block() {
        return Err(Error::WouldBlock);
    }
    let most = most(offered, length);
    let mut buffer = vec![0; most];
    pieces(length, offset, most, |piece, at| device.read(&mut buffer[..piece], at, call))
}

/// How much is read or written at a time: no more than there is to do, nor than the device takes.
fn most(offered: &Capabilities, length: u64) -> usize {
    let taken = offered.block_size.map_or(EMULATED, |size| size.maximum.max(size.minimum).min(EMULATED));
    length.min(u64::from(taken)) as usize
}

/// Refuses what would keep a thread busy for hours. As much as a compact request can ask for is done.
fn bounded(length: u64) -> Result<()> {
    if length > u64::from(u32::MAX) {
        let why =
            format!("the device does not do this by itself, and {length} bytes at once are too many to do it for it");
        return Err(Error::failed(ErrorCode::Invalid, why));
    }
    Ok(())
}

fn pieces(length: u64, offset: u64, most: usize, mut each: impl FnMut(usize, u64) -> Result<()>) -> Result<()> {
    let mut done = 0;
    while done < length {
        let piece = (length - done).min(most as u64);
        each(piece as usize, offset + done)?;
        done += piece;
    }
    Ok(())
}

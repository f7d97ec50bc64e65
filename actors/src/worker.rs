//! Threads that serve sessions, each with an executor and an edge-triggered epoll of its own.
//!
//! async-io re-arms every socket after every event and wakes through one reactor that all threads share: about six system
//! calls for a request that comes alone, where three do (receive, send, wait). A worker is that shortcut and nothing else:
//! sessions are the same futures on it as on any executor. Without workers the engine needs no thread of its own.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{UnixAddr, getsockname, getsockopt, sockopt};
use smol::LocalExecutor;

use crate::buffers::Buffers;
use crate::socket_options::unsent;

/// Something to do on a worker's thread: a session, with its socket.
pub(crate) type Job = Box<dyn FnOnce(&Worker) + Send>;

/// How many events one wait returns at most.
const EVENTS: usize = 256;
/// How many turns tasks that have more to do get, one after the other, before it is looked for events, which is a system call.
const TURNS: usize = 8;
/// How many full sockets are looked at: those of many clients that take nothing for long would cost more than they bring.
const MOST_FULL: usize = 16;
/// The token of the eventfd by which other threads wake a worker.
const WAKE: u64 = u64::MAX;

/// A handle to all workers. Dropping it ends their threads once their sessions have ended.
#[derive(Debug)]
pub(crate) struct Workers {
    workers: Vec<(Sender<Job>, Arc<AtomicUsize>)>,
}

impl Workers {
    /// Starts `count` threads, or as many as there is room for. Errors: for none.
    /// With `spin`, a thread looks for events that long before it sleeps.
    pub(crate) fn start(count: usize, spin: Duration) -> io::Result<Workers> {
        let mut workers = Vec::with_capacity(count);
        for number in 0..count {
            match Workers::start_one(number, spin) {
                Ok(worker) => workers.push(worker),
                Err(error) if workers.is_empty() => return Err(error),
                // One alone serves everybody.
                Err(_) => break,
            }
        }
        Ok(Workers { workers })
    }

    fn start_one(number: usize, spin: Duration) -> io::Result<(Sender<Job>, Arc<AtomicUsize>)> {
        let prepared = Prepared::new()?;
        // Bounded by the Listener, which waits while it is full.
        let (jobs, inbox) = async_channel::bounded::<Job>(64);
        let load = Arc::clone(&prepared.load);
        // Detached: it ends when `jobs` is closed and the last session has ended. The Coordinator waits for sessions.
        thread::Builder::new()
            .name(format!("nbd-worker-{number}"))
            .spawn(move || Worker::new(prepared, spin).run(inbox))?;
        Ok((jobs, load))
    }

    /// Hands `job` to the worker with the fewest sessions. `false` if that worker's thread is gone.
    pub(crate) async fn place(&self, job: Job) -> bool {
        let least = self.workers.iter().min_by_key(|(_, load)| load.load(Ordering::Relaxed));
        match least {
            Some((jobs, load)) => {
                load.fetch_add(1, Ordering::Relaxed);
                jobs.send(job).await.is_ok()
            }
            None => false,
        }
    }
}

/// What can fail, made before the thread is.
struct Prepared {
    poller: Arc<Poller>,
    waker: Arc<ThreadWaker>,
    load: Arc<AtomicUsize>,
}

impl Prepared {
    fn new() -> io::Result<Prepared> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        epoll.add(&event, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, WAKE))?;
        Ok(Prepared {
            poller: Arc::new(Poller { epoll, sources: Mutex::default() }),
            waker: Arc::new(ThreadWaker { state: AtomicU8::new(NOTIFIED), event }),
            load: Arc::default(),
        })
    }
}

/// The thread's own: what its sessions run on.
pub(crate) struct Worker {
    poller: Arc<Poller>,
    waker: Arc<ThreadWaker>,
    executor: LocalExecutor<'static>,
    load: Arc<AtomicUsize>,
    buffers: Buffers,
    spinning: Spinning,
    /// Every session holds a clone; `ended` is closed when the last is gone. The thread's own is taken when no more come.
    alive: RefCell<Option<Sender<Infallible>>>,
    ended: Receiver<Infallible>,
}

/// What registrations and the loop share.
struct Poller {
    epoll: Epoll,
    sources: Mutex<Sources>,
}

#[derive(Default)]
struct Sources {
    next: u64,
    by_token: HashMap<u64, Weak<Source>>,
    /// Those that had no room last.
    full: Vec<u64>,
}

impl Worker {
    fn new(prepared: Prepared, spin: Duration) -> Worker {
        let Prepared { poller, waker, load } = prepared;
        let (alive, ended) = async_channel::bounded(1);
        Worker {
            poller,
            waker,
            load,
            executor: LocalExecutor::new(),
            buffers: Buffers::default(),
            spinning: Spinning::new(spin),
            alive: RefCell::new(Some(alive)),
            ended,
        }
    }

    /// The buffers of this thread's sessions.
    pub(crate) fn buffers(&self) -> Buffers {
        self.buffers.clone()
    }

    /// Runs `session` on this thread until it ends.
    pub(crate) fn spawn(&self, session: impl Future<Output = ()> + 'static) {
        let load = Arc::clone(&self.load);
        let alive = self.alive.borrow().clone();
        // Boxed, because what a block captures and awaits would be in it twice.
        let session = Box::pin(session);
        // Detached: a session tells the Coordinator of its end itself, and the executor lives as long as the thread.
        self.executor
            .spawn(async move {
                session.await;
                load.fetch_sub(1, Ordering::Relaxed);
                drop(alive);
            })
            .detach();
    }

    /// Watches `socket`. Errors: epoll does not take it.
    pub(crate) fn register(&self, socket: OwnedFd) -> io::Result<Registration> {
        let source = {
            let mut sources = lock(&self.poller.sources);
            let token = sources.next;
            sources.next += 1;
            let source = Arc::new(Source {
                token,
                enough: if self.spinning.limit.is_zero() { 0 } else { enough(&socket) },
                socket,
                readable: AtomicBool::new(true),
                writable: AtomicBool::new(true),
                awaits_room: AtomicBool::new(false),
                hung_up: AtomicBool::new(false),
                wakers: Mutex::default(),
            });
            sources.by_token.insert(token, Arc::downgrade(&source));
            source
        };
        let registration = Registration { source, poller: Arc::clone(&self.poller) };
        let event = EpollEvent::new(INPUT, registration.source.token);
        self.poller.epoll.add(&registration, event)?;
        Ok(registration)
    }

    fn run(self, inbox: Receiver<Job>) {
        let accept = async {
            while let Ok(job) = inbox.recv().await {
                job(&self);
            }
            // No more will come: those that are here are served to their end.
            self.alive.take();
            let _ = self.ended.recv().await;
        };
        let mut main = pin!(self.executor.run(accept));
        let waker = Waker::from(Arc::clone(&self.waker));
        let mut cx = Context::from_waker(&waker);
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            for _ in 0..TURNS {
                self.waker.state.store(AWAKE, Ordering::SeqCst);
                if main.as_mut().poll(&mut cx).is_ready() {
                    return;
                }
                if self.waker.state.load(Ordering::SeqCst) != NOTIFIED {
                    break;
                }
            }
            if self.spin(&mut events) {
                continue;
            }
            // Asleep only if nobody has woken us since the poll began.
            let asleep = self.waker.state.compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst).is_ok();
            let timeout = if asleep { EpollTimeout::NONE } else { EpollTimeout::ZERO };
            self.dispatch(timeout, &mut events);
        }
    }

    /// Looks for events for a while. Whether there are any.
    fn spin(&self, events: &mut [EpollEvent]) -> bool {
        if !self.spinning.is_worth_it() {
            return false;
        }
        let look = |events: &mut [EpollEvent]| {
            self.dispatch(EpollTimeout::ZERO, events)
                || self.find_room()
                || self.waker.state.load(Ordering::SeqCst) == NOTIFIED
        };
        if look(events) {
            // Not waited for, so it says nothing of what waiting is worth.
            return true;
        }
        let start = Instant::now();
        let mut last = start;
        loop {
            // Whoever wants this core gets it.
            thread::yield_now();
            let happened = look(events);
            let now = Instant::now();
            // Somebody did: what we waited for would have come by itself, and sooner had we slept.
            let was_interrupted = now - last > INTERRUPTED;
            if happened && !was_interrupted {
                self.spinning.paid_off();
            } else if happened || now - start >= self.spinning.limit {
                self.spinning.was_in_vain();
            } else {
                last = now;
                continue;
            }
            return happened;
        }
    }

    /// Looks whether full sockets have room, and wakes whom it concerns. Whether there is any.
    fn find_room(&self) -> bool {
        let sources = &mut *lock(&self.poller.sources);
        let Sources { by_token, full, .. } = sources;
        let mut any = false;
        full.retain(|token| {
            let Some(source) = by_token.get(token).and_then(Weak::upgrade) else { return false };
            let is_full = !source.writable.load(Ordering::Relaxed);
            let has_room = is_full && unsent(&source.socket).is_ok_and(|held| held < source.enough);
            if has_room {
                source.happened(EpollFlags::EPOLLOUT);
                any = true;
            }
            is_full && !has_room
        });
        any
    }

    /// Waits for events and wakes whom they concern. Whether there were any.
    fn dispatch(&self, timeout: EpollTimeout, events: &mut [EpollEvent]) -> bool {
        // The only error a wait can meet here is an interruption, after which there are no events.
        let count = self.poller.epoll.wait(events, timeout).unwrap_or(0);
        // Awake again, before tasks are woken: a thread need not write to itself. Only from asleep: that another thread has
        // notified us must not be forgotten.
        let _ = self.waker.state.compare_exchange(ASLEEP, AWAKE, Ordering::SeqCst, Ordering::SeqCst);
        for event in &events[..count] {
            if event.data() == WAKE {
                let _ = self.waker.event.read();
                continue;
            }
            let source = lock(&self.poller.sources).by_token.get(&event.data()).and_then(Weak::upgrade);
            if let Some(source) = source {
                source.happened(event.events());
            }
        }
        count > 0
    }
}

/// How little a socket must hold for what is sent next to be worth it, in bytes; 0 where that is up to epoll, which tells of a
/// Unix socket only when it is almost empty: by the time that a client that waits for no more than the end of a reply has it,
/// there is nothing left for it to do.
fn enough(socket: &OwnedFd) -> u32 {
    let is_unix = getsockname::<UnixAddr>(socket.as_raw_fd()).is_ok();
    let holds = getsockopt(socket, sockopt::SndBuf).unwrap_or(0);
    if is_unix { (holds / 4 * 3).try_into().unwrap_or(u32::MAX) } else { 0 }
}

/// Whether to look for events instead of sleeping. It saves the wake-up, which is most of a lone request's time, where the
/// client answers soon and from another core. Where it does not, each attempt in vain doubles the number of sleeps before the
/// next one, so that what it costs stays below a thousandth.
struct Spinning {
    limit: Duration,
    in_vain: Cell<u32>,
    sleeps_left: Cell<u32>,
}

/// How long one look for events takes at most, if this thread is not interrupted: a system call, with room to spare.
const INTERRUPTED: Duration = Duration::from_micros(8);

impl Spinning {
    fn new(limit: Duration) -> Spinning {
        Spinning { limit, in_vain: Cell::new(0), sleeps_left: Cell::new(0) }
    }

    fn is_worth_it(&self) -> bool {
        let left = self.sleeps_left.get();
        self.sleeps_left.set(left.saturating_sub(1));
        left == 0 && !self.limit.is_zero()
    }

    fn paid_off(&self) {
        self.in_vain.set(0);
    }

    fn was_in_vain(&self) {
        let in_vain = (self.in_vain.get() + 1).min(10);
        self.in_vain.set(in_vain);
        self.sleeps_left.set(1 << in_vain);
    }
}

const AWAKE: u8 = 0;
const ASLEEP: u8 = 1;
const NOTIFIED: u8 = 2;

/// Wakes the thread out of its wait; costs no system call while it is awake.
struct ThreadWaker {
    state: AtomicU8,
    event: EventFd,
}

impl Wake for ThreadWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.swap(NOTIFIED, Ordering::SeqCst) == ASLEEP {
            // Fails only when the counter is full, and then the thread is being woken anyway.
            let _ = self.event.write(1);
        }
    }
}

const INPUT: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLRDHUP).union(EpollFlags::EPOLLET);
const OUTPUT: EpollFlags = EpollFlags::EPOLLOUT.union(EpollFlags::EPOLLET);

/// What the loop has seen of one socket. Flags are written by the worker's thread only.
struct Source {
    token: u64,
    socket: OwnedFd,
    /// How little must be in the socket for a send to be worth trying; 0 where only epoll says so.
    enough: u32,
    readable: AtomicBool,
    writable: AtomicBool,
    /// Epoll is armed for output.
    awaits_room: AtomicBool,
    /// The peer has ended its side or the socket failed: reading never waits any more.
    hung_up: AtomicBool,
    wakers: Mutex<Wakers>,
}

#[derive(Default)]
struct Wakers {
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Source {
    fn happened(&self, events: EpollFlags) {
        let ended = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        if events.intersects(ended | EpollFlags::EPOLLRDHUP) {
            self.hung_up.store(true, Ordering::Relaxed);
        }
        let wakers = lock(&self.wakers);
        if events.intersects(ended | EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP) {
            self.readable.store(true, Ordering::Relaxed);
            wakers.reader.iter().for_each(Waker::wake_by_ref);
        }
        if events.intersects(ended | EpollFlags::EPOLLOUT) {
            self.writable.store(true, Ordering::Relaxed);
            wakers.writer.iter().for_each(Waker::wake_by_ref);
        }
    }
}

/// A socket that a worker watches.
pub(crate) struct Registration {
    source: Arc<Source>,
    poller: Arc<Poller>,
}

impl AsFd for Registration {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.source.socket.as_fd()
    }
}

impl Registration {
    /// Whether a receive is worth trying; if not, the task is woken when it is.
    pub(crate) fn readable(&self, cx: &mut Context<'_>) -> bool {
        let ready = self.source.readable.load(Ordering::Relaxed);
        if !ready {
            keep(&mut lock(&self.source.wakers).reader, cx.waker());
            if self.source.writable.load(Ordering::Relaxed) && self.source.awaits_room.swap(false, Ordering::Relaxed) {
                // All was sent: back to input alone, because an armed output wakes us for every reply that is read. Not
                // before, because more often than not the room that there is does not last. Modifying reports anew what
                // is already there, so no input is missed.
                let _ = self.poller.epoll.modify(self, &mut EpollEvent::new(INPUT, self.source.token));
            }
        }
        ready
    }

    /// Whether a send is worth trying; if not, the task is woken when it is.
    pub(crate) fn writable(&self, cx: &mut Context<'_>) -> bool {
        let ready = self.source.writable.load(Ordering::Relaxed);
        if !ready {
            keep(&mut lock(&self.source.wakers).writer, cx.waker());
        }
        ready
    }

    /// A short receive: there is no more, unless the stream has ended, which no further event would say.
    pub(crate) fn drained(&self) {
        self.source.readable.store(self.source.hung_up.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Whatever was told last: the next receive is worth trying.
    pub(crate) fn may_be_readable(&self) {
        self.source.readable.store(true, Ordering::Relaxed);
    }

    pub(crate) fn would_block_receive(&self) {
        self.source.readable.store(false, Ordering::Relaxed);
    }

    /// Nothing fits, or no more: watches for room, and for nothing else until there is.
    pub(crate) fn would_block_send(&self) -> io::Result<()> {
        self.source.writable.store(false, Ordering::Relaxed);
        if self.source.enough > 0 {
            let full = &mut lock(&self.poller.sources).full;
            if !full.contains(&self.source.token) {
                if full.len() == MOST_FULL {
                    full.remove(0);
                }
                full.push(self.source.token);
            }
        }
        if self.source.awaits_room.swap(true, Ordering::Relaxed) {
            // Armed already, and edges that came since are still to be reported.
            return Ok(());
        }
        let mut event = EpollEvent::new(OUTPUT, self.source.token);
        Ok(self.poller.epoll.modify(self, &mut event)?)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Before the descriptor closes, so that its number cannot be another's yet.
        let _ = self.poller.epoll.delete(&*self);
        let sources = &mut *lock(&self.poller.sources);
        sources.by_token.remove(&self.source.token);
        sources.full.retain(|token| *token != self.source.token);
    }
}

fn keep(slot: &mut Option<Waker>, waker: &Waker) {
    if !slot.as_ref().is_some_and(|kept| kept.will_wake(waker)) {
        *slot = Some(waker.clone());
    }
}

/// A lock that is never held where anything could panic half way.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn worker(spin: Duration) -> Worker {
        Worker::new(Prepared::new().unwrap(), spin)
    }

    /// A registered socket, a second handle to it, and its other end.
    fn pair(worker: &Worker) -> (Registration, UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let registration = worker.register(ours.try_clone().unwrap().into()).unwrap();
        (registration, ours, theirs)
    }

    /// Sends until nothing fits. How much that was.
    fn fill(registration: &Registration, mut socket: &UnixStream) -> usize {
        let sent = std::iter::from_fn(|| socket.write(&[0; 4096]).ok()).sum();
        registration.would_block_send().unwrap();
        sent
    }

    #[test]
    fn a_little_room_is_found_where_epoll_waits_for_more() {
        let mut cx = Context::from_waker(Waker::noop());
        let mut events = [EpollEvent::empty(); EVENTS];
        for (spin, found) in [(Duration::from_micros(1), true), (Duration::ZERO, false)] {
            let worker = worker(spin);
            let (registration, ours, mut theirs) = pair(&worker);
            let sent = fill(&registration, &ours);
            worker.dispatch(EpollTimeout::ZERO, &mut events);
            assert!(!worker.find_room() && !registration.writable(&mut cx));

            let mut half = vec![0; sent / 2];
            theirs.read_exact(&mut half).unwrap();
            worker.dispatch(EpollTimeout::ZERO, &mut events);
            assert!(!registration.writable(&mut cx), "epoll tells of half a socket");
            assert_eq!((worker.find_room(), registration.writable(&mut cx)), (found, found));
            assert!(!worker.find_room(), "it is told once");

            fill(&registration, &ours);
            assert!(!worker.find_room() && !registration.writable(&mut cx));
            drop(registration);
            theirs.read_exact(&mut half).unwrap();
            assert!(!worker.find_room());
        }
    }

    #[test]
    fn of_many_full_sockets_few_are_looked_at_and_none_is_forgotten() {
        let worker = worker(Duration::from_micros(1));
        let mut cx = Context::from_waker(Waker::noop());
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut all: Vec<_> = (0..MOST_FULL + 3).map(|_| pair(&worker)).collect();
        for (registration, ours, theirs) in &mut all {
            let sent = fill(registration, ours);
            theirs.read_exact(&mut vec![0; sent]).unwrap();
        }
        assert_eq!(lock(&worker.poller.sources).full.len(), MOST_FULL);
        assert!(worker.find_room());
        let writable = all.iter().filter(|(registration, ..)| registration.writable(&mut cx)).count();
        assert_eq!(writable, MOST_FULL);
        worker.dispatch(EpollTimeout::ZERO, &mut events);
        assert!(all.iter().all(|(registration, ..)| registration.writable(&mut cx)));
    }
}

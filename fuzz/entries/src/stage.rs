//! A thread on which a whole server runs, and the wires to its clients. Nothing waits for anything else: neither a socket nor
//! a clock nor a thread of the system has a part in it.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::task::{Context, Poll, Waker};

use nbdcaptive_actors::simulation::Simulation;
use nbdcaptive_actors::transport::Transport;
use smol::Executor;

/// How often a task may run before all of them have nothing to do. A server that needs more has lost its way.
const MOST_TURNS: usize = 1_000_000;

/// How many bytes a wire holds at most.
const WIDEST: usize = 1 << 20;

thread_local! {
    static PANICS: Cell<usize> = const { Cell::new(0) };
}

/// Where the server's tasks run.
pub struct Stage {
    /// Runs when it is told to.
    pub executor: Arc<Executor<'static>>,
    /// Time and threads.
    pub simulation: Arc<Simulation>,
    panics: usize,
}

impl Stage {
    /// An empty one.
    pub fn new() -> Stage {
        // An actor's panic ends as an outcome, a device's as an error: seen where it happens, none is missed.
        static WATCH: Once = Once::new();
        WATCH.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                PANICS.set(PANICS.get() + 1);
                before(info);
            }));
        });
        Stage { executor: Arc::new(Executor::new()), simulation: Simulation::new(), panics: PANICS.get() }
    }

    /// Runs tasks until none has anything to do.
    pub fn settle(&self) {
        self.tick(MOST_TURNS);
        assert!(!self.executor.try_tick(), "the server is busy with nothing");
    }

    /// Runs so many tasks, each until it waits.
    pub fn tick(&self, count: usize) {
        for _ in 0..count {
            if !self.executor.try_tick() {
                break;
            }
        }
        assert_eq!(PANICS.get(), self.panics, "something in the server panicked");
    }

    /// Runs tasks and the calls that wait for a thread until there are none. Whether there were any calls.
    pub fn work(&self) -> bool {
        let mut any = false;
        self.settle();
        while self.simulation.run_call(0) {
            any = true;
            self.settle();
        }
        any
    }
}

/// What is between a client and the server. Both ends are held by it; dropped, a client's end cuts the connection.
#[derive(Clone)]
pub struct Wire(Arc<Mutex<Line>>);

struct Line {
    up: VecDeque<u8>,
    up_ended: bool,
    down: VecDeque<u8>,
    down_ended: bool,
    /// How many bytes of replies the wire holds until the client takes them.
    room: usize,
    cut: bool,
    receiver: Option<Waker>,
    sender: Option<Waker>,
    /// All bytes that the server has sent.
    carried: u64,
}

impl Line {
    fn wake(&mut self) -> [Option<Waker>; 2] {
        [self.receiver.take(), self.sender.take()]
    }
}

impl Wire {
    /// A wire that holds `room` bytes towards the client, and the server's end of it.
    pub fn new(room: usize) -> (Wire, ServersEnd) {
        let line = Line {
            up: VecDeque::new(),
            up_ended: false,
            down: VecDeque::new(),
            down_ended: false,
            room,
            cut: false,
            receiver: None,
            sender: None,
            carried: 0,
        };
        let line = Arc::new(Mutex::new(line));
        (Wire(Arc::clone(&line)), ServersEnd(line))
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        // What panicked with the lock held is found by other means.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Line)) {
        let mut line = self.line();
        change(&mut line);
        let woken = line.wake();
        drop(line);
        woken.into_iter().flatten().for_each(Waker::wake);
    }

    /// Sends to the server.
    pub fn send(&self, bytes: &[u8]) {
        self.change(|line| line.up.extend(bytes));
    }

    /// Takes up to `count` bytes of what the server sent. Where that was all that the wire holds it holds twice as much from
    /// then on, or a large reply would take for ever.
    pub fn take(&self, count: usize) -> Vec<u8> {
        let mut taken = Vec::new();
        if !self.line().down.is_empty() {
            self.change(|line| {
                if line.down.len() == line.room && count >= line.room {
                    line.room = (2 * line.room).min(WIDEST);
                }
                taken = vec![0; count.min(line.down.len())];
                let _ = line.down.read_exact(&mut taken);
            });
        }
        taken
    }

    /// Says that nothing more will be sent.
    pub fn finish(&self) {
        self.change(|line| line.up_ended = true);
    }

    /// The client is gone without a word.
    pub fn cut(&self) {
        self.change(|line| {
            line.cut = true;
            line.up.clear();
            line.down.clear();
        });
    }

    /// Whether the server has closed its end, and all that it sent was taken.
    pub fn is_over(&self) -> bool {
        let line = self.line();
        line.down_ended && line.down.is_empty()
    }

    /// Whether the other end was closed.
    pub fn is_closed(&self) -> bool {
        self.line().down_ended
    }

    /// Whether the server has taken all that was sent.
    pub fn all_taken(&self) -> bool {
        self.line().up.is_empty()
    }

    /// How many bytes the server has sent.
    pub fn carried(&self) -> u64 {
        self.line().carried
    }
}

/// What the server has of a [`Wire`].
pub struct ServersEnd(Arc<Mutex<Line>>);

impl ServersEnd {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transport for ServersEnd {
    fn poll_receive(&mut self, cx: &mut Context<'_>, slices: &mut [IoSliceMut<'_>]) -> Poll<io::Result<usize>> {
        let mut line = self.line();
        if line.cut {
            return Poll::Ready(Err(ErrorKind::ConnectionReset.into()));
        }
        if line.up.is_empty() && !line.up_ended {
            line.receiver = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let mut count = 0;
        for slice in slices {
            let part = slice.len().min(line.up.len());
            line.up.read_exact(&mut slice[..part])?;
            count += part;
        }
        Poll::Ready(Ok(count))
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut line = self.line();
        if line.up.is_empty() && !line.up_ended && !line.cut {
            line.receiver = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let mut line = self.line();
        assert!(!line.down_ended, "the server sends after it has said that it will not");
        if line.cut {
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
        }
        let mut count = 0;
        for slice in slices {
            let part = slice.len().min(line.room.saturating_sub(line.down.len()));
            line.down.extend(&slice[..part]);
            count += part;
        }
        line.carried += count as u64;
        if count == 0 && slices.iter().any(|slice| !slice.is_empty()) {
            line.sender = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(count))
    }

    /// Small, so that small conversations have many pieces.
    fn worth_sending(&self) -> usize {
        4096
    }

    fn finish(&mut self) {
        self.line().down_ended = true;
    }
}

impl Drop for ServersEnd {
    fn drop(&mut self) {
        self.line().down_ended = true;
    }
}

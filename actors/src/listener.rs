//! Accepts clients and hands each to a Session; closes at the Coordinator's word.
//!
//! Tells the Coordinator of every client before its Session exists, so that none can be missed, and that it has closed, after
//! which there are no more. Ends then.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use async_channel::Receiver;
use async_io::Async;
use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::socket::{SockFlag, accept4, setsockopt, sockopt};
use smol::Executor;
use smol::future::or;
use smol::lock::Semaphore;
use smol::stream::Stream as _;

use crate::coordinator::{self, Cause, Message};
use crate::server::Hook;
use crate::session::{self, Seat, SessionId, Surroundings, Visit};
use crate::transport::{Socket, Transport};
use crate::worker::{Worker, Workers};

/// How long nothing is accepted at most after the system had no descriptor or memory for a client; also how often at most
/// that is said.
const PAUSE: Duration = Duration::from_secs(1);

/// How many workers there are to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Threads {
    Count(usize),
    PerCore,
}

impl Threads {
    /// Asks the system, which reads files for it: so not before there is a client.
    fn count(self) -> usize {
        match self {
            Threads::Count(count) => count,
            Threads::PerCore => {
                std::thread::available_parallelism().map_or(2, std::num::NonZero::get).min(affordable())
            }
        }
    }
}

/// As many workers, each with two descriptors, as leave three quarters of what this process may have to its clients: there may
/// be more cores than that.
fn affordable() -> usize {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((RLIM_INFINITY, RLIM_INFINITY));
    usize::try_from(limit / 8).map_or(usize::MAX, |count| count.max(1))
}

/// Where sessions run.
pub(crate) enum Place {
    /// On the executor that was given.
    Executor,
    /// On threads of the server's own, that many, started with the first client; where there is room for none, on the executor.
    Workers { threads: Threads, spin: Duration, workers: Option<Workers> },
}

/// Clients whom somebody else has accepted.
type Arrivals = Pin<Box<Receiver<Box<dyn Transport>>>>;

pub(crate) struct Listener {
    pub sockets: Vec<Async<OwnedFd>>,
    pub arrivals: Option<Arrivals>,
    /// A seat for each client that may be connected at a time.
    pub seats: Option<Arc<Semaphore>>,
    /// Not held: it holds this actor, and neither would ever go.
    pub executor: Weak<Executor<'static>>,
    pub place: Place,
    pub surroundings: Surroundings,
    pub keepalive: bool,
    pub before_refusing: Option<Hook>,
}

impl Listener {
    /// Accepts until it is told to stop. Dropped before that, the sockets close.
    pub(crate) async fn run(mut self) {
        let coordinator = self.surroundings.coordinator.clone();
        // In this order, and also if a hook panics: first why it ends, then that it has.
        let closed = Closed(coordinator.clone());
        let guard = coordinator.guard("the Listener");
        let orders = self.surroundings.orders.clone();
        let mut next = 1;
        let mut complaints = Complaints::default();
        loop {
            let stopped = async {
                orders.stopping().await;
                None
            };
            let (sockets, arrivals) = (&self.sockets, &mut self.arrivals);
            match or(stopped, async { Some(accept(sockets, arrivals).await) }).await {
                None => break,
                Some(Ok(client)) => {
                    let id = SessionId(next);
                    next += 1;
                    let Some(seat) = self.seat() else {
                        let line = format_args!("client {id} was turned away: as many are connected as may be");
                        complaints.say(&self.surroundings, line);
                        continue;
                    };
                    if let Err(error) = self.serve(id, client, seat).await {
                        complaints.say(&self.surroundings, format_args!("cannot serve client {id}: {error}"));
                        pause(&self.surroundings).await;
                    }
                }
                Some(Err(error)) => {
                    complaints.say(&self.surroundings, format_args!("accept: {error}"));
                    if !is_shortage(error) {
                        coordinator.shut_down(Cause::Fatal(format!("cannot accept clients: {error}")));
                        break;
                    }
                    pause(&self.surroundings).await;
                }
            }
        }
        if let Some(hook) = self.before_refusing.take() {
            hook();
        }
        // Closed before it is said, so that whoever connects after the end began is refused. Whoever sends clients may hold
        // the channel for longer, and what is in it with it.
        if let Some(arrivals) = self.arrivals.take() {
            arrivals.close();
            while arrivals.try_recv().is_ok() {}
        }
        drop(self);
        drop(guard);
        drop(closed);
    }

    /// Runs a session on the executor that was given. Errors: that is gone.
    fn spawn(&self, session: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
        let executor = self.executor.upgrade().ok_or_else(|| io::Error::other("the executor is gone"))?;
        // Detached: the Coordinator waits for its last word.
        executor.spawn(session).detach();
        Ok(())
    }

    /// A seat for one more client; `None` where all are taken.
    fn seat(&self) -> Option<Seat> {
        let Some(seats) = &self.seats else { return Some(Seat::default()) };
        seats.try_acquire_arc().map(Some)
    }

    /// Starts the session of a client. Errors: its thread has ended, or the socket cannot be watched.
    async fn serve(&mut self, id: SessionId, client: Arrived, seat: Seat) -> io::Result<()> {
        let surroundings = self.surroundings.clone();
        let visit = Visit::begin(id, &surroundings, seat);
        let socket = match client {
            Arrived::Socket(socket) => socket,
            Arrived::Transport(transport) => {
                // Only whoever made it knows what wakes it, so it runs where anything does.
                return self.spawn(session::run(visit, transport, surroundings));
            }
        };
        // Neither is worth losing a client for; a Unix socket has neither.
        let _ = setsockopt(&socket, sockopt::TcpNoDelay, &true);
        if self.keepalive {
            keep_alive(&socket);
        }
        if let Place::Workers { threads, spin, workers: workers @ None } = &mut self.place {
            match Workers::start(threads.count(), *spin) {
                Ok(started) => *workers = Some(started),
                // Served more slowly is better than not at all, and the next client may find room for them.
                Err(error) => {
                    surroundings.speaker.debug(format_args!("client {id} is served without workers: {error}"))
                }
            }
        }
        match &self.place {
            Place::Workers { workers: Some(workers), .. } => {
                place_on_worker(workers, visit, socket, surroundings).await
            }
            Place::Executor | Place::Workers { workers: None, .. } => {
                let socket = Socket::on_reactor(socket)?;
                self.spawn(session::run(visit, Box::new(socket), surroundings))
            }
        }
    }
}

/// Has the system notice a client that vanished after a minute of silence and five probes, ten seconds apart; by itself it
/// would look after two hours. Where one of these cannot be set, the system's own value stands.
fn keep_alive(socket: &OwnedFd) {
    let _ = setsockopt(socket, sockopt::KeepAlive, &true);
    #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
    {
        let _ = setsockopt(socket, sockopt::TcpKeepIdle, &60);
        let _ = setsockopt(socket, sockopt::TcpKeepInterval, &10);
        let _ = setsockopt(socket, sockopt::TcpKeepCount, &5);
    }
}

/// Waits until a client has left or a while has passed, or until the end.
async fn pause(surroundings: &Surroundings) {
    let room = surroundings.room.listen();
    let passed = surroundings.world.after(PAUSE);
    or(surroundings.orders.stopping(), or(room, passed)).await;
}

/// Says that something is short, but not for every client: clients that try again would fill the log.
#[derive(Default)]
struct Complaints {
    last: Option<Instant>,
}

impl Complaints {
    fn say(&mut self, surroundings: &Surroundings, line: fmt::Arguments<'_>) {
        let now = surroundings.world.now();
        if self.last.is_none_or(|last| now.duration_since(last) >= PAUSE) {
            self.last = Some(now);
            surroundings.speaker.error(line);
        }
    }
}

/// Says that the Listener is closed, also when it panicked: the end waits for it.
struct Closed(coordinator::Handle);

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.tell(Message::ListenerClosed);
    }
}

async fn place_on_worker(
    workers: &Workers,
    visit: Visit,
    socket: OwnedFd,
    mut surroundings: Surroundings,
) -> io::Result<()> {
    let job = Box::new(move |worker: &Worker| {
        surroundings.buffers = worker.buffers();
        match worker.register(socket) {
            Ok(registration) => {
                let transport: Box<dyn Transport> = Box::new(Socket::on_worker(registration));
                worker.spawn(session::run(visit, transport, surroundings));
            }
            Err(error) => {
                surroundings.speaker.error(format_args!("cannot serve client {}: {error}", visit.id()));
                drop(visit);
                worker.spawn(async {});
            }
        }
    });
    if workers.place(job).await { Ok(()) } else { Err(io::Error::other("the worker thread has ended")) }
}

/// A client before it has a session.
enum Arrived {
    Socket(OwnedFd),
    Transport(Box<dyn Transport>),
}

/// The next client on any of the sockets, or of those that others accept. Dropped, nobody was accepted.
async fn accept(sockets: &[Async<OwnedFd>], arrivals: &mut Option<Arrivals>) -> Result<Arrived, Errno> {
    poll_fn(|cx| {
        if let Some(receiver) = arrivals {
            match receiver.as_mut().poll_next(cx) {
                Poll::Ready(Some(transport)) => return Poll::Ready(Ok(Arrived::Transport(transport))),
                // No more of these.
                Poll::Ready(None) => *arrivals = None,
                Poll::Pending => {}
            }
        }
        for socket in sockets {
            loop {
                match accept4(socket.as_fd().as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
                    // SAFETY: accept4 has just made the descriptor, and nobody else knows of it.
                    Ok(client) => return Poll::Ready(Ok(Arrived::Socket(unsafe { OwnedFd::from_raw_fd(client) }))),
                    // A client that left before it was accepted is no failure.
                    Err(Errno::EINTR | Errno::ECONNABORTED | Errno::EPROTO) => {}
                    Err(Errno::EAGAIN) => match socket.poll_readable(cx) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(_)) => return Poll::Ready(Err(Errno::EIO)),
                        Poll::Pending => break,
                    },
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
        }
        Poll::Pending
    })
    .await
}

/// The system is short of something now, and may not be later.
fn is_shortage(error: Errno) -> bool {
    !matches!(error, Errno::EBADF | Errno::EINVAL | Errno::ENOTSOCK | Errno::EOPNOTSUPP | Errno::EIO)
}

//! Accepts clients and hands each socket to a Session; closes at the Coordinator's word.
//!
//! Tells the Coordinator of every client before its Session exists, so that none can be missed, and that it has closed, after
//! which there are no more. Ends then.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use async_io::Async;
use nix::errno::Errno;
use nix::sys::socket::{SockFlag, accept4, setsockopt, sockopt};
use smol::future::or;
use smol::{Executor, Timer};

use crate::coordinator::{Cause, Message};
use crate::server::Hook;
use crate::session::{self, SessionId, Surroundings};
use crate::transport::{Socket, Transport};
use crate::worker::{Worker, Workers};

/// How long nothing is accepted after the system had no descriptor or memory for a client; also how often that is said.
const PAUSE: Duration = Duration::from_secs(1);

/// Where sessions run.
pub(crate) enum Place {
    /// On the executor that was given.
    Executor(Arc<Executor<'static>>),
    /// On threads of the server's own, that many, started with the first client.
    Workers { count: usize, workers: Option<Workers> },
}

pub(crate) struct Listener {
    pub sockets: Vec<Async<OwnedFd>>,
    pub place: Place,
    pub surroundings: Surroundings,
    pub keepalive: bool,
    pub before_refusing: Option<Hook>,
}

impl Listener {
    /// Accepts until it is told to stop. Dropped before that, the sockets close.
    pub(crate) async fn run(mut self) {
        let coordinator = self.surroundings.coordinator.clone();
        let guard = coordinator.guard("the Listener");
        let orders = self.surroundings.orders.clone();
        let mut next = 1;
        loop {
            let stopped = async {
                orders.stopping().await;
                None
            };
            match or(stopped, async { Some(accept(&self.sockets).await) }).await {
                None => break,
                Some(Ok(socket)) => {
                    self.serve(SessionId(next), socket).await;
                    next += 1;
                }
                Some(Err(error)) => {
                    self.surroundings.speaker.error(format_args!("accept: {error}"));
                    if !is_shortage(error) {
                        coordinator.shut_down(Cause::Fatal(format!("cannot accept clients: {error}")));
                        break;
                    }
                    or(orders.stopping(), async {
                        Timer::after(PAUSE).await;
                    })
                    .await;
                }
            }
        }
        if let Some(hook) = self.before_refusing.take() {
            hook();
        }
        // Closed before it is said, so that whoever connects after the end began is refused.
        drop(self);
        coordinator.tell(Message::ListenerClosed);
        drop(guard);
    }

    async fn serve(&mut self, id: SessionId, socket: OwnedFd) {
        // Neither is worth losing a client for; a Unix socket has neither.
        let _ = setsockopt(&socket, sockopt::TcpNoDelay, &true);
        if self.keepalive {
            let _ = setsockopt(&socket, sockopt::KeepAlive, &true);
        }
        let surroundings = self.surroundings.clone();
        let coordinator = surroundings.coordinator.clone();
        coordinator.tell(Message::SessionOpened(id));
        let placed = match &mut self.place {
            Place::Executor(executor) => Socket::on_reactor(socket).map(|socket| {
                // Detached: the Coordinator waits for its last word.
                executor.spawn(session::run(id, Box::new(socket), surroundings)).detach();
            }),
            Place::Workers { count, workers } => place_on_workers(*count, workers, id, socket, surroundings).await,
        };
        if let Err(error) = placed {
            self.surroundings.speaker.error(format_args!("cannot serve client {id}: {error}"));
            coordinator.tell(Message::SessionClosed { id, failure: None });
        }
    }
}

async fn place_on_workers(
    count: usize,
    workers: &mut Option<Workers>,
    id: SessionId,
    socket: OwnedFd,
    mut surroundings: Surroundings,
) -> io::Result<()> {
    let workers = match workers {
        Some(workers) => workers,
        None => workers.insert(Workers::start(count)?),
    };
    let job = Box::new(move |worker: &Worker| {
        surroundings.buffers = worker.buffers();
        match worker.register(socket) {
            Ok(registration) => {
                let transport: Box<dyn Transport> = Box::new(Socket::on_worker(registration));
                worker.spawn(session::run(id, transport, surroundings));
            }
            Err(error) => {
                surroundings.speaker.error(format_args!("cannot serve client {id}: {error}"));
                surroundings.coordinator.tell(Message::SessionClosed { id, failure: None });
                worker.spawn(async {});
            }
        }
    });
    if workers.place(job).await { Ok(()) } else { Err(io::Error::other("the worker thread has ended")) }
}

/// The next client on any of the sockets. Dropped, nobody was accepted.
async fn accept(sockets: &[Async<OwnedFd>]) -> Result<OwnedFd, Errno> {
    poll_fn(|cx| {
        for socket in sockets {
            loop {
                match accept4(socket.as_fd().as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
                    // SAFETY: accept4 has just made the descriptor, and nobody else knows of it.
                    Ok(client) => return Poll::Ready(Ok(unsafe { OwnedFd::from_raw_fd(client) })),
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

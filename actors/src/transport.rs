//! A client's byte stream, as the Session sees it: receive what is there, send what fits, be woken when it changes.
//!
//! [`Socket`] is the plain one. Whether readiness comes from async-io (on any executor) or from a worker's own epoll
//! (`worker.rs`) is decided when it is made and seen nowhere else.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::task::{Context, Poll};

use async_io::Async;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send, sendmsg};

use crate::worker::Registration;

/// What a Session talks to its client through.
///
/// Both methods may be called from one task, and a `Pending` from one does not forget the other's.
pub trait Transport: Send {
    /// Receives into `buffer`. `Ok(0)` is the end of the stream. A short receive means that there is no more for now.
    fn poll_receive(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>>;

    /// Sends from the front of `slices`, as much as is taken at once.
    fn poll_send(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>>;

    /// Says that nothing more will be sent, so that the client sees the end after the last reply.
    fn finish(&mut self);
}

/// A connected stream socket, non-blocking.
pub struct Socket {
    readiness: Readiness,
}

enum Readiness {
    Reactor(Async<OwnedFd>),
    Worker(Registration),
}

impl Socket {
    /// A socket whose readiness comes from async-io's reactor, for use on any executor.
    /// Errors: it cannot be made non-blocking or be watched.
    pub fn on_reactor(socket: OwnedFd) -> io::Result<Socket> {
        Ok(Socket { readiness: Readiness::Reactor(Async::new(socket)?) })
    }

    pub(crate) fn on_worker(registration: Registration) -> Socket {
        Socket { readiness: Readiness::Worker(registration) }
    }

    fn fd(&self) -> i32 {
        match &self.readiness {
            Readiness::Reactor(source) => source.as_fd().as_raw_fd(),
            Readiness::Worker(registration) => registration.as_fd().as_raw_fd(),
        }
    }
}

impl Transport for Socket {
    fn poll_receive(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            if let Readiness::Worker(registration) = &self.readiness
                && !registration.readable(cx)
            {
                return Poll::Pending;
            }
            match recv(self.fd(), buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(count) => {
                    if let Readiness::Worker(registration) = &self.readiness
                        && count < buffer.len()
                    {
                        registration.drained();
                    }
                    return Poll::Ready(Ok(count));
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => match &self.readiness {
                    Readiness::Reactor(source) => match source.poll_readable(cx) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                        Poll::Pending => return Poll::Pending,
                    },
                    Readiness::Worker(registration) => registration.would_block_receive(),
                },
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        // An embedder may have left SIGPIPE at its default.
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            if let Readiness::Worker(registration) = &self.readiness
                && !registration.writable(cx)
            {
                return Poll::Pending;
            }
            let sent = match slices {
                [one] => send(self.fd(), one, flags),
                _ => sendmsg::<()>(self.fd(), slices, &[], flags, None),
            };
            match sent {
                Ok(count) => return Poll::Ready(Ok(count)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => match &self.readiness {
                    Readiness::Reactor(source) => match source.poll_writable(cx) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                        Poll::Pending => return Poll::Pending,
                    },
                    Readiness::Worker(registration) => registration.would_block_send()?,
                },
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn finish(&mut self) {
        // The client may have gone already, and then there is nobody to tell.
        let _ = nix::sys::socket::shutdown(self.fd(), nix::sys::socket::Shutdown::Write);
    }
}

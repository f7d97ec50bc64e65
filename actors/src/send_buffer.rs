//! How much of what is sent a Unix socket holds until the client takes it.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use nix::sys::socket::{getsockopt, setsockopt, sockopt};

/// How much a Unix socket holds: twice as much while replies are large, so that one of 256 KiB fits and its end with it, and
/// neither side waits for the other in the middle of it. Not always, because then many small ones fit, too, and are sent before the
/// client has had a turn; the batches become small.
pub(crate) struct SendBuffer {
    /// What it holds by default, in bytes.
    usual: u32,
    is_large: bool,
    /// Sends since the last large one.
    small: u8,
}

impl SendBuffer {
    /// More than this to be sent at once is large, in bytes.
    pub(crate) const LARGE: usize = 128 * 1024;
    /// After so many sends of less it is as it was.
    pub(crate) const SMALL: u8 = 32;

    /// For a Unix socket. `None`: somebody has chosen what it holds, or it cannot be doubled and halved.
    pub(crate) fn of(socket: &impl AsFd) -> Option<SendBuffer> {
        let holds = getsockopt(socket, sockopt::SndBuf).ok()?;
        let usual = u32::try_from(holds).ok()?;
        (holds == SendBuffer::most()).then_some(SendBuffer { usual, is_large: false, small: 0 })
    }

    /// What every socket holds at first, in bytes, if that can be doubled and halved: the system may not allow so much, and not every
    /// one doubles what it is given. Found out by a socket that is nobody's.
    pub(crate) fn most() -> usize {
        static MOST: OnceLock<usize> = OnceLock::new();
        let holds = |socket: &UnixStream| getsockopt(socket, sockopt::SndBuf).unwrap_or(0);
        let becomes =
            |socket: &UnixStream, size: usize| setsockopt(socket, sockopt::SndBuf, &size).map(|()| holds(socket));
        *MOST.get_or_init(|| {
            let Ok((socket, _)) = UnixStream::pair() else { return 0 };
            let usual = holds(&socket);
            let works = becomes(&socket, usual) == Ok(2 * usual) && becomes(&socket, usual / 2) == Ok(usual);
            if works { usual } else { 0 }
        })
    }

    /// The value that the option is to be given before so much is sent, if another than it has. Linux doubles it (socket(7)).
    pub(crate) fn fit(&mut self, length: usize) -> Option<usize> {
        self.small = if length > SendBuffer::LARGE { 0 } else { self.small.saturating_add(1) };
        let is_large = self.small == 0 || (self.is_large && self.small < SendBuffer::SMALL);
        let changes = std::mem::replace(&mut self.is_large, is_large) != is_large;
        changes.then_some(if is_large { self.usual } else { self.usual / 2 } as usize)
    }
}

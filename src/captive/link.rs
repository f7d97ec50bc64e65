//! Messages between front, guardian and server, over sequenced-packet socket pairs: each message whole or not at all, and the
//! end of the stream when the other process is gone.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nbdcaptive_actors::CommandEnd;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use rustix::buffer::spare_capacity;
use rustix::net::RecvFlags;

/// The longest message, in bytes: the shell variables, whose names are four paths of at most 4096 bytes, quoted.
pub(super) const LONGEST: usize = 64 * 1024;

/// One end.
#[derive(Debug)]
pub struct Link(OwnedFd);

/// All that is ever said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// Front to guardian, guardian to server: a signal that asks for the end was sent to us.
    Signal(i32),
    /// Guardian to server: it was sent once more.
    SignalAgain(i32),
    /// Front to guardian: a signal that asks for the end was sent to our whole group, so the command has got it.
    GroupSignal(i32),
    /// Front to guardian: a signal was typed at the terminal. The command, while there is one, got it from there.
    Typed(i32),
    /// Front to guardian: a signal for the command, which means nothing to us.
    PassOn(i32),
    /// Server to front, through the guardian's end: this is my pid.
    ServerPid(i32),
    /// Guardian to server and front: this is the command's pid.
    CommandPid(i32),
    /// Server to guardian, which hands it on unread: clients can connect, the command may start. See
    /// [`super::command::Errand`].
    Ready(Vec<u8>),
    /// Server to guardian: pass this signal on to the command and its tree.
    SignalCommand(i32),
    /// Server to guardian: kill the command and its tree.
    KillCommand,
    /// Guardian to server: the command has ended.
    CommandEnded(CommandEnd),
    /// Guardian to server: the front process is gone.
    FrontEnded,
    /// Front to guardian, guardian to server: the parent that the server was to live as long as is gone. Said only where it
    /// cannot be watched from everywhere.
    ParentEnded,
    /// Server to guardian: all is done, and this is the exit status. Guardian to front: the same, and whether the command was
    /// killed by a signal.
    Outcome {
        /// 0 to 255.
        status: i32,
        /// 0, or the signal that killed the command.
        signal: i32,
    },
}

impl Link {
    /// Two ends, non-blocking, not inherited by programs.
    pub fn pair() -> io::Result<(Link, Link)> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (one, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Link(one), Link(other)))
    }

    /// A second handle to this end. The end is gone only when both are.
    pub fn duplicate(&self) -> io::Result<Link> {
        Ok(Link(self.0.try_clone()?))
    }

    /// Says something. Errors: the other process is gone; or it has not listened for so long that there is no room.
    pub fn say(&self, word: &Word) -> io::Result<()> {
        let bytes = encode(word);
        loop {
            match send(self.0.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What was said: `Ok(None)` when the other process is gone. Errors: `WouldBlock` when nothing was said.
    pub fn hear(&self) -> io::Result<Option<Word>> {
        // Room that is not touched is not paid for: nearly all words are short.
        let mut bytes = Vec::with_capacity(LONGEST);
        loop {
            match rustix::net::recv(&self.0, spare_capacity(&mut bytes), RecvFlags::empty()) {
                Ok((0, _)) => return Ok(None),
                // What cannot be read is from a process that is not ours, which there is none of.
                Ok(_) => match decode(&bytes) {
                    Some(word) => return Ok(Some(word)),
                    None => return Err(io::ErrorKind::InvalidData.into()),
                },
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Link> for OwnedFd {
    fn from(link: Link) -> OwnedFd {
        link.0
    }
}

impl From<OwnedFd> for Link {
    fn from(fd: OwnedFd) -> Link {
        Link(fd)
    }
}

fn encode(word: &Word) -> Vec<u8> {
    let (tag, numbers, text): (u8, [i32; 2], &[u8]) = match word {
        Word::Signal(number) => (1, [*number, 0], &[]),
        Word::PassOn(number) => (2, [*number, 0], &[]),
        Word::ServerPid(pid) => (3, [*pid, 0], &[]),
        Word::CommandPid(pid) => (4, [*pid, 0], &[]),
        Word::Ready(errand) => (5, [0, 0], errand),
        Word::SignalCommand(number) => (6, [*number, 0], &[]),
        Word::KillCommand => (7, [0, 0], &[]),
        Word::CommandEnded(CommandEnd::Exited(status)) => (8, [*status, 0], &[]),
        Word::CommandEnded(CommandEnd::Killed(signal)) => (8, [*signal, 1], &[]),
        Word::FrontEnded => (9, [0, 0], &[]),
        Word::Outcome { status, signal } => (10, [*status, *signal], &[]),
        Word::ParentEnded => (11, [0, 0], &[]),
        Word::GroupSignal(number) => (13, [*number, 0], &[]),
        Word::SignalAgain(number) => (14, [*number, 0], &[]),
        Word::Typed(number) => (12, [*number, 0], &[]),
    };
    let mut bytes = vec![tag];
    numbers.iter().for_each(|number| bytes.extend_from_slice(&number.to_ne_bytes()));
    bytes.extend_from_slice(text);
    bytes
}

fn decode(bytes: &[u8]) -> Option<Word> {
    let (tag, rest) = bytes.split_first()?;
    let (first, rest) = rest.split_first_chunk()?;
    let (second, text) = rest.split_first_chunk()?;
    let (first, second) = (i32::from_ne_bytes(*first), i32::from_ne_bytes(*second));
    Some(match tag {
        1 => Word::Signal(first),
        2 => Word::PassOn(first),
        3 => Word::ServerPid(first),
        4 => Word::CommandPid(first),
        5 => Word::Ready(text.to_vec()),
        6 => Word::SignalCommand(first),
        7 => Word::KillCommand,
        8 if second == 0 => Word::CommandEnded(CommandEnd::Exited(first)),
        8 => Word::CommandEnded(CommandEnd::Killed(first)),
        9 => Word::FrontEnded,
        10 => Word::Outcome { status: first, signal: second },
        11 => Word::ParentEnded,
        12 => Word::Typed(first),
        13 => Word::GroupSignal(first),
        14 => Word::SignalAgain(first),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_arrives_as_it_was_said() {
        let (here, there) = Link::pair().unwrap();
        let words = [
            Word::Signal(15),
            Word::GroupSignal(15),
            Word::SignalAgain(15),
            Word::Typed(2),
            Word::PassOn(10),
            Word::ServerPid(12),
            Word::CommandPid(13),
            Word::Ready(vec![b'x'; LONGEST - 100]),
            Word::SignalCommand(2),
            Word::KillCommand,
            Word::CommandEnded(CommandEnd::Exited(3)),
            Word::CommandEnded(CommandEnd::Killed(9)),
            Word::FrontEnded,
            Word::ParentEnded,
            Word::Outcome { status: 130, signal: 2 },
        ];
        for word in &words {
            here.say(word).unwrap();
            assert_eq!(there.hear().unwrap().as_ref(), Some(word));
        }
        assert_eq!(there.hear().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(here);
        // Another test may be starting a program just now, whose process holds a copy until it has become that program.
        let mut fds = [nix::poll::PollFd::new(there.as_fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, nix::poll::PollTimeout::NONE).unwrap();
        assert_eq!(there.hear().unwrap(), None);
    }
}

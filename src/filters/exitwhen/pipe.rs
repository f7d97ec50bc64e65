//! A descriptor whose other end is waited to be closed. Nothing is ever read from it.
//!
//! What is asked of epoll is the closing alone, not that there is data: a pipe full of data that nobody reads is quiet, and
//! so is the epoll descriptor, which in turn is watched as any other. Closed is: no writer is left (a pipe's read end), no
//! reader is left (its write end), the peer has closed or shut down its sending side (a socket). A copy of the other end that
//! this process or one that it runs was given as well counts as any other: while it is open, nothing is closed.
//! Source: epoll_ctl(2), pipe(7); nbdkit polls for POLLHUP.

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use rustix::event::epoll;
use rustix::io::Errno;

use super::{is_readable, readable};

/// How often it is looked at where it cannot be watched.
const LOOK: Duration = Duration::from_secs(1);

/// A descriptor that the caller gave us.
#[derive(Debug)]
pub struct Pipe {
    /// The number that the caller knows it by.
    pub number: RawFd,
    epoll: OwnedFd,
    // Held, because a registration ends with the last descriptor of what it is for.
    _fd: OwnedFd,
}

impl Pipe {
    /// Takes hold of an inherited descriptor, and keeps it from the programs that this process runs. Errors: it is not open,
    /// or of a kind that has no other end, as a line.
    pub fn take(number: RawFd) -> Result<Pipe, String> {
        let fd = take_over(number).ok_or_else(|| format!("invalid file descriptor: {number} is not open"))?;
        let no_watch = |error: Errno| format!("cannot watch file descriptor {number}: {error}");
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(no_watch)?;
        let closing = epoll::EventFlags::HUP | epoll::EventFlags::ERR | epoll::EventFlags::RDHUP;
        match epoll::add(&epoll, &fd, epoll::EventData::new_u64(0), closing) {
            Ok(()) => Ok(Pipe { number, epoll, _fd: fd }),
            // What a file that is always ready gets.
            Err(Errno::PERM) => Err(format!("file descriptor {number} is neither a pipe nor a socket")),
            Err(error) => Err(no_watch(error)),
        }
    }

    /// Whether it is closed by now.
    pub fn is_closed(&self) -> bool {
        is_readable(&self.epoll, Duration::ZERO)
    }

    /// Done when it is closed.
    pub async fn closes(&self) -> String {
        readable(&self.epoll, LOOK).await;
        self.line()
    }

    /// What has happened.
    pub fn line(&self) -> String {
        format!("exit-when-pipe-closed: the other end of file descriptor {} was closed", self.number)
    }
}

/// A second descriptor of what the caller's number `number` means, if it is the caller's.
fn take_over(number: RawFd) -> Option<OwnedFd> {
    if number < 0 {
        return None;
    }
    // SAFETY: only looked at and duplicated here, by calls that fail if it is not open; no other thread runs yet that could
    // close it in between.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).ok()?);
    // What survived an exec does not have this flag, and all that we open ourselves does.
    if flags.contains(FdFlag::FD_CLOEXEC) {
        return None;
    }
    let own = fd.try_clone_to_owned().ok()?;
    // Programs that we run would hold this end open for as long as they live, unseen by the other side's owner. Standard
    // error is what they may need, and the other two are replaced anyway.
    if number > 2 {
        let _ = fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
    }
    Some(own)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::fd::{AsFd, AsRawFd};
    use std::os::unix::net::UnixStream;

    use super::super::tests::{never, until, within};
    use super::*;

    /// As if the caller had left it open for us.
    fn inherited(fd: impl Into<OwnedFd>) -> OwnedFd {
        let fd = fd.into();
        fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        fd
    }

    fn take(fd: &OwnedFd) -> Pipe {
        Pipe::take(fd.as_raw_fd()).unwrap()
    }

    /// D8; "The filter does not read any data from the pipe."
    #[test]
    fn a_pipe_is_closed_when_its_last_writer_is_gone_and_not_when_it_has_data() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let reader = inherited(reader);
        let pipe = take(&reader);
        let second = writer.try_clone().unwrap();
        writer.write_all(b"unread").unwrap();
        drop(writer);
        assert!(!pipe.is_closed());
        let mut closes = Box::pin(pipe.closes());
        never(&mut closes);
        drop(second);
        let line = format!("exit-when-pipe-closed: the other end of file descriptor {} was closed", reader.as_raw_fd());
        assert_eq!(within(closes), line);
        let mut left = String::new();
        std::fs::File::from(reader).read_to_string(&mut left).unwrap();
        assert_eq!(left, "unread");
    }

    /// D10: "Write end: POLLERR = closed."
    #[test]
    fn a_write_end_is_closed_when_its_reader_is_gone() {
        let (reader, writer) = std::io::pipe().unwrap();
        let pipe = take(&inherited(writer));
        assert!(!pipe.is_closed());
        drop(reader);
        until("the pipe to be closed", || pipe.is_closed());
        within(pipe.closes());
    }

    /// D11
    #[test]
    fn a_socket_is_closed_when_its_peer_is_or_says_no_more() {
        for leave in [drop as fn(UnixStream), |peer| {
            peer.shutdown(Shutdown::Write).unwrap();
            std::mem::forget(peer);
        }] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let pipe = take(&inherited(ours));
            theirs.write_all(b"unread").unwrap();
            assert!(!pipe.is_closed());
            leave(theirs);
            within(pipe.closes());
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let theirs = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let pipe = take(&inherited(listener.accept().unwrap().0));
        assert!(!pipe.is_closed());
        drop(theirs);
        within(pipe.closes());
    }

    /// D9, D10
    #[test]
    fn what_is_not_open_not_inherited_or_has_no_other_end_is_refused() {
        assert_eq!(Pipe::take(-1).unwrap_err(), "invalid file descriptor: -1 is not open");
        assert_eq!(Pipe::take(999_999).unwrap_err(), "invalid file descriptor: 999999 is not open");
        let (own, _writer) = std::io::pipe().unwrap();
        let number = own.as_raw_fd();
        assert_eq!(Pipe::take(number).unwrap_err(), format!("invalid file descriptor: {number} is not open"));
        for path in ["/etc/passwd", "/dev/null", "/"] {
            let file = inherited(std::fs::File::open(path).unwrap());
            let number = file.as_raw_fd();
            let error = format!("file descriptor {number} is neither a pipe nor a socket");
            assert_eq!(Pipe::take(number).unwrap_err(), error);
        }
    }

    /// D12
    #[test]
    fn what_was_taken_is_kept_from_programs() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let reader = inherited(reader);
        let _pipe = take(&reader);
        assert_eq!(fcntl(&reader, FcntlArg::F_GETFD), Ok(FdFlag::FD_CLOEXEC.bits()));
    }
}

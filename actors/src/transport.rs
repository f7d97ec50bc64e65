//! A client's byte stream, as the Session sees it: receive what is there, send what fits, be woken when it changes.
//!
//! [`Socket`] is the plain one. Whether readiness comes from async-io (on any executor) or from a worker's own epoll
//! (`worker.rs`) is decided when it is made and seen nowhere else.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::task::{Context, Poll};

use async_io::Async;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
#[cfg(any(target_os = "linux", target_os = "android"))]
use nix::sys::sendfile::sendfile;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockaddrLike as _, SockaddrStorage, getpeername, getsockname, getsockopt, recv, recvmsg,
    send, sendmsg, setsockopt, sockopt,
};

use crate::device::Peer;
use crate::send_buffer::SendBuffer;
use crate::socket_options;
use crate::tls::Security;
use crate::worker::Registration;

/// What a Session talks to its client through.
///
/// Receiving and sending may be polled from one task, and a `Pending` from one does not forget the other's.
pub trait Transport: Send {
    /// Receives into `slices`, one after the other. `Ok(0)` is the end of the stream. Less than they hold means that there is no
    /// more for now.
    fn poll_receive(&mut self, cx: &mut Context<'_>, slices: &mut [IoSliceMut<'_>]) -> Poll<io::Result<usize>>;

    /// Ready when a receive is worth trying. The default tries at once; who can say more lets a client that asks for nothing
    /// cost next to nothing.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _ = cx;
        Poll::Ready(Ok(()))
    }

    /// Has the next receive look at the stream itself, and not at what was last told of it: what has just come may not have
    /// been told yet. The default looks in any case.
    fn look_again(&mut self) {}

    /// Says that fewer than `count` bytes are of no use: who can wait for so many does not wake anybody for each that comes. It
    /// holds until it is said anew, and is advice: whatever is there is received. The default takes none.
    fn await_bytes(&mut self, count: usize) {
        let _ = count;
    }

    /// Sends from the front of `slices`, as much as is taken at once. What was offered and not taken comes first the next time:
    /// some of it may be on its way.
    fn poll_send(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>>;

    /// Sends from `file` at `offset`, at most `length` bytes, as many as are taken at once. `Ok(0)`: the file has ended before
    /// that, or cannot be read there. The default copies through memory.
    fn poll_send_file(
        &mut self,
        cx: &mut Context<'_>,
        file: &File,
        offset: u64,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        send_copy(self, cx, file, offset, length)
    }

    /// How many bytes of replies are worth a send of their own while there are more to come.
    fn worth_sending(&self) -> usize {
        MUCH
    }

    /// Who is at the other end, where that is known. The default does not know.
    fn peer(&self) -> Option<Peer> {
        None
    }

    /// The label that a security module has given the other end, where there is one. The default has none.
    fn peer_label(&self) -> Option<Vec<u8>> {
        None
    }

    /// How the stream is secured; `None` where it is not. The default is not.
    fn security(&self) -> Option<&Security> {
        None
    }

    /// Says that nothing more will be sent, so that the client sees the end after the last reply. Does not wait: what would
    /// have to is left out.
    fn finish(&mut self);

    /// As `finish`, and waits until it is said. The default has nothing to wait for.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let _ = cx;
        self.finish();
        Poll::Ready(())
    }
}

/// Sends from a file by copying through memory.
fn send_copy(
    transport: &mut (impl Transport + ?Sized),
    cx: &mut Context<'_>,
    file: &File,
    offset: u64,
    length: usize,
) -> Poll<io::Result<usize>> {
    let mut piece = [0; 16 * 1024];
    loop {
        return match file.read_at(&mut piece[..length.min(16 * 1024)], offset) {
            Ok(0) => Poll::Ready(Ok(0)),
            Ok(count) => transport.poll_send(cx, &[IoSlice::new(&piece[..count])]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => Poll::Ready(Ok(0)),
        };
    }
}

/// What is left of a stream that was taken to be made secure: its end.
pub(crate) struct Gone;

impl Transport for Gone {
    fn poll_receive(&mut self, _cx: &mut Context<'_>, _slices: &mut [IoSliceMut<'_>]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(0))
    }

    fn poll_send(&mut self, _cx: &mut Context<'_>, _slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }

    fn finish(&mut self) {}
}

/// What is worth a send where the kernel takes in megabytes: the fewer sends, the larger the segments.
const MUCH: usize = 1024 * 1024;
/// What is worth a send to a Unix socket: the client has something to do while the rest of a batch is served, and is not done
/// with it when there is room for more. Such a socket tells of room when no more than a quarter of what it holds, 52 KiB, is
/// left; with larger pieces nothing would be left.
const LITTLE: usize = 48 * 1024;

/// A connected stream socket, non-blocking.
pub struct Socket {
    readiness: Readiness,
    kind: SocketKind,
}

enum SocketKind {
    /// How many bytes make it readable: Linux looks at that mark for no other sockets.
    Tcp {
        low_water: i32,
    },
    Unix(Option<SendBuffer>),
    Other,
}

impl SocketKind {
    fn of(socket: &impl AsFd) -> SocketKind {
        let family = getsockname::<SockaddrStorage>(socket.as_fd().as_raw_fd()).ok().and_then(|name| name.family());
        match family {
            Some(AddressFamily::Inet | AddressFamily::Inet6) => {
                do_not_pace_at_home(socket);
                SocketKind::Tcp { low_water: 1 }
            }
            Some(AddressFamily::Unix) => SocketKind::Unix(SendBuffer::of(socket)),
            _ => SocketKind::Other,
        }
    }
}

enum Readiness {
    Reactor(Async<OwnedFd>),
    Worker(Registration),
}

impl Socket {
    /// A socket whose readiness comes from async-io's reactor, for use on any executor.
    /// Errors: it cannot be made non-blocking or be watched.
    pub fn on_reactor(socket: OwnedFd) -> io::Result<Socket> {
        let kind = SocketKind::of(&socket);
        Ok(Socket { readiness: Readiness::Reactor(Async::new(socket)?), kind })
    }

    pub(crate) fn on_worker(registration: Registration) -> Socket {
        let kind = SocketKind::of(&registration);
        Socket { readiness: Readiness::Worker(registration), kind }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.readiness {
            Readiness::Reactor(source) => source.as_fd(),
            Readiness::Worker(registration) => registration.as_fd(),
        }
    }
}

impl Transport for Socket {
    fn poll_receive(&mut self, cx: &mut Context<'_>, slices: &mut [IoSliceMut<'_>]) -> Poll<io::Result<usize>> {
        let room: usize = slices.iter().map(|slice| slice.len()).sum();
        loop {
            if let Readiness::Worker(registration) = &self.readiness
                && !registration.readable(cx)
            {
                return Poll::Pending;
            }
            match receive(self.fd().as_raw_fd(), slices) {
                Ok(count) => {
                    if let Readiness::Worker(registration) = &self.readiness
                        && count < room
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

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.readiness {
            Readiness::Reactor(source) => source.poll_readable(cx),
            Readiness::Worker(registration) if registration.readable(cx) => Poll::Ready(Ok(())),
            Readiness::Worker(_) => Poll::Pending,
        }
    }

    fn look_again(&mut self) {
        if let Readiness::Worker(registration) = &self.readiness {
            registration.may_be_readable();
        }
    }

    fn await_bytes(&mut self, count: usize) {
        let count = i32::try_from(count).unwrap_or(i32::MAX);
        if let SocketKind::Tcp { low_water } = &mut self.kind
            && *low_water != count
        {
            *low_water = count;
            // Where it fails we are woken more often.
            let _ = match &self.readiness {
                Readiness::Reactor(source) => socket_options::set_low_water(source, count),
                Readiness::Worker(registration) => socket_options::set_low_water(registration, count),
            };
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let length = slices.iter().map(|slice| slice.len()).sum();
        self.fit_buffer(length);
        // An embedder may have left SIGPIPE at its default.
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let attempt = self.poll_send_by(cx, |fd| match slices {
            [one] => send(fd.as_raw_fd(), one, flags),
            _ => sendmsg::<()>(fd.as_raw_fd(), slices, &[], flags, None),
        });
        if let (Poll::Ready(Ok(count)), Readiness::Worker(registration)) = (&attempt, &self.readiness)
            && *count < length
        {
            // It would say so the next time.
            registration.would_block_send()?;
        }
        attempt
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn poll_send_file(
        &mut self,
        cx: &mut Context<'_>,
        file: &File,
        offset: u64,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        self.fit_buffer(length);
        let Ok(start) = i64::try_from(offset) else { return Poll::Ready(Ok(0)) };
        let attempt = self.poll_send_by(cx, |fd| sendfile(fd, file, Some(&mut { start }), length));
        match &attempt {
            Poll::Ready(Err(error)) => match error.raw_os_error().map(Errno::from_raw) {
                // Of the two only the file fails so.
                Some(Errno::EIO) => Poll::Ready(Ok(0)),
                // Not every file system can.
                Some(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => send_copy(self, cx, file, offset, length),
                _ => attempt,
            },
            _ => attempt,
        }
    }

    fn worth_sending(&self) -> usize {
        if let SocketKind::Tcp { .. } = self.kind { MUCH } else { LITTLE }
    }

    fn peer(&self) -> Option<Peer> {
        peer(self.fd())
    }

    fn peer_label(&self) -> Option<Vec<u8>> {
        socket_options::peer_label(self.fd())
    }

    fn finish(&mut self) {
        // The client may have gone already, and then there is nobody to tell.
        let _ = nix::sys::socket::shutdown(self.fd().as_raw_fd(), nix::sys::socket::Shutdown::Write);
    }
}

impl Socket {
    fn fit_buffer(&mut self, length: usize) {
        if let SocketKind::Unix(Some(buffer)) = &mut self.kind
            && let Some(size) = buffer.fit(length)
        {
            // Where it fails sends are smaller, or more is on its way.
            let _ = setsockopt(&self.fd(), sockopt::SndBuf, &size);
        }
    }

    /// Attempts to send until it worked, or waits for room.
    fn poll_send_by(
        &mut self,
        cx: &mut Context<'_>,
        mut attempt: impl FnMut(BorrowedFd<'_>) -> nix::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Readiness::Worker(registration) = &self.readiness
                && !registration.writable(cx)
            {
                return Poll::Pending;
            }
            match attempt(self.fd()) {
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
}

/// Has a TCP connection that does not leave this machine send as fast as the other end takes it. BBR measures how fast that is and sets
/// a timer for almost every segment, on the loopback as well, where nothing is ever lost and there is nobody to be fair to. What it
/// becomes is in every kernel and allowed to everybody; where it is not, all is as it was.
#[cfg(any(target_os = "linux", target_os = "freebsd"))]
fn do_not_pace_at_home(socket: &impl AsFd) {
    let fd = socket.as_fd().as_raw_fd();
    let ip = |address: nix::Result<SockaddrStorage>| {
        let address = address.ok()?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().to_canonical()))
    };
    let (ours, theirs) = (ip(getsockname(fd)), ip(getpeername(fd)));
    if ours.is_some()
        && ours == theirs
        && getsockopt(socket, sockopt::TcpCongestion).is_ok_and(|name| name.as_encoded_bytes().starts_with(b"bbr"))
    {
        let _ = setsockopt(socket, sockopt::TcpCongestion, &OsString::from("reno"));
    }
}

#[cfg(not(any(target_os = "linux", target_os = "freebsd")))]
fn do_not_pace_at_home(_socket: &impl AsFd) {}

/// Who is at the other end of a socket.
fn peer(socket: BorrowedFd<'_>) -> Option<Peer> {
    let address = getpeername::<SockaddrStorage>(socket.as_raw_fd()).ok()?;
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(Peer::Inet(SocketAddrV4::from(*v4).into()));
    }
    if let Some(v6) = address.as_sockaddr_in6() {
        return Some(Peer::Inet(SocketAddrV6::from(*v6).into()));
    }
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if let Some(vsock) = address.as_vsock_addr() {
        return Some(Peer::Vsock { cid: vsock.cid(), port: vsock.port() });
    }
    (address.family() == Some(AddressFamily::Unix)).then(|| unix_peer(socket))
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn unix_peer(socket: BorrowedFd<'_>) -> Peer {
    let who = getsockopt(&socket, sockopt::PeerCredentials).ok();
    Peer::Unix { pid: who.map(|who| who.pid()), uid: who.map(|who| who.uid()), gid: who.map(|who| who.gid()) }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn unix_peer(_socket: BorrowedFd<'_>) -> Peer {
    Peer::Unix { pid: None, uid: None, gid: None }
}

fn receive(fd: i32, slices: &mut [IoSliceMut<'_>]) -> nix::Result<usize> {
    match slices {
        [one] => recv(fd, one, MsgFlags::MSG_DONTWAIT),
        _ => recvmsg::<()>(fd, slices, None, MsgFlags::MSG_DONTWAIT).map(|received| received.bytes),
    }
}

/// Two descriptors that somebody else made, one to receive from and one to send to: pipes, terminals, files, sockets.
///
/// Their mode is left alone, because whoever else holds them shares it: each attempt says by itself that it does not want to
/// wait. A reader that has gone raises SIGPIPE, which the program must block or ignore.
pub struct Descriptors {
    input: Descriptor,
    /// Closed to say that nothing more will be sent.
    output: Option<Descriptor>,
}

/// One of the two.
struct Descriptor {
    kind: Kind,
    readiness: Waits,
}

/// How not to wait at it.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Socket,
    /// Each call says so.
    Pipe,
    /// What is ready takes or gives something; no more is tried than that.
    Other,
}

enum Waits {
    Reactor(Async<OwnedFd>),
    /// A file or device that never makes anybody wait for long, and that cannot be watched.
    Never(OwnedFd),
}

/// As much as a pipe or terminal that says that it has room does take at once.
const AT_ONCE: usize = 4096;

impl Descriptor {
    fn new(fd: OwnedFd) -> io::Result<Descriptor> {
        let kind = match nix::sys::stat::fstat(&fd)?.st_mode & nix::libc::S_IFMT {
            nix::libc::S_IFSOCK => Kind::Socket,
            nix::libc::S_IFIFO => Kind::Pipe,
            _ => Kind::Other,
        };
        // Registering takes the descriptor, also where it fails.
        let spare = fd.try_clone()?;
        let readiness = match Async::new_nonblocking(fd) {
            Ok(source) => Waits::Reactor(source),
            // epoll says so of files and of devices like /dev/null.
            Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => Waits::Never(spare),
            Err(error) => return Err(error),
        };
        Ok(Descriptor { kind, readiness })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.readiness {
            Waits::Reactor(source) => source.as_fd(),
            Waits::Never(fd) => fd.as_fd(),
        }
    }

    /// Tries `attempt` until it does not say "not now".
    fn poll(
        &mut self,
        mut attempt: impl FnMut(BorrowedFd<'_>, Kind) -> Result<usize, Errno>,
        mut ready: impl FnMut(&Async<OwnedFd>) -> Poll<io::Result<()>>,
    ) -> Poll<io::Result<usize>> {
        loop {
            match attempt(self.fd(), self.kind) {
                Ok(count) => return Poll::Ready(Ok(count)),
                Err(Errno::EINTR) => {}
                // Old kernels cannot be asked not to wait at a pipe.
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) if self.kind == Kind::Pipe => self.kind = Kind::Other,
                Err(Errno::EAGAIN) => match &self.readiness {
                    Waits::Reactor(source) => match ready(source) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                        Poll::Pending => return Poll::Pending,
                    },
                    Waits::Never(_) => return Poll::Ready(Err(Errno::EAGAIN.into())),
                },
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl Descriptors {
    /// Errors: one cannot be looked at or watched.
    pub fn on_reactor(input: OwnedFd, output: OwnedFd) -> io::Result<Descriptors> {
        Ok(Descriptors { input: Descriptor::new(input)?, output: Some(Descriptor::new(output)?) })
    }
}

impl Transport for Descriptors {
    fn poll_receive(&mut self, cx: &mut Context<'_>, slices: &mut [IoSliceMut<'_>]) -> Poll<io::Result<usize>> {
        let can_wait = matches!(self.input.readiness, Waits::Reactor(_));
        self.input.poll(
            |fd, kind| match kind {
                Kind::Socket => receive(fd.as_raw_fd(), slices),
                #[cfg(any(target_os = "linux", target_os = "android"))]
                Kind::Pipe => {
                    without_waiting(rustix::io::preadv2(fd, slices, u64::MAX, rustix::io::ReadWriteFlags::NOWAIT))
                }
                _ => at_once(fd, PollFlags::POLLIN, can_wait).and_then(|()| nix::sys::uio::readv(fd, slices)),
            },
            |source| source.poll_readable(cx),
        )
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.input.readiness {
            Waits::Reactor(source) => source.poll_readable(cx),
            Waits::Never(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let Some(output) = &mut self.output else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
        let can_wait = matches!(output.readiness, Waits::Reactor(_));
        output.poll(
            |fd, kind| match kind {
                Kind::Socket => {
                    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                    // Who is gone from one end of a socket is gone from the other: that is no broken pipe.
                    sendmsg::<()>(fd.as_raw_fd(), slices, &[], flags, None).map_err(|error| match error {
                        Errno::EPIPE => Errno::ECONNRESET,
                        error => error,
                    })
                }
                #[cfg(any(target_os = "linux", target_os = "android"))]
                Kind::Pipe => {
                    without_waiting(rustix::io::pwritev2(fd, slices, u64::MAX, rustix::io::ReadWriteFlags::NOWAIT))
                }
                _ => {
                    let first = slices.iter().find(|slice| !slice.is_empty()).map_or(&[][..], |slice| slice);
                    let first = &first[..first.len().min(AT_ONCE)];
                    at_once(fd, PollFlags::POLLOUT, can_wait).and_then(|()| nix::unistd::write(fd, first))
                }
            },
            |source| source.poll_writable(cx),
        )
    }

    fn peer(&self) -> Option<Peer> {
        peer(self.input.fd())
    }

    fn finish(&mut self) {
        if let Some(output) = self.output.take()
            && output.kind == Kind::Socket
        {
            // Others may hold it too. The client may have gone already, and then there is nobody to tell.
            let _ = nix::sys::socket::shutdown(output.fd().as_raw_fd(), nix::sys::socket::Shutdown::Write);
        }
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn without_waiting(result: rustix::io::Result<usize>) -> Result<usize, Errno> {
    result.map_err(|error| Errno::from_raw(error.raw_os_error()))
}

/// Whether the next call would not wait; `EAGAIN` if it would.
fn at_once(fd: BorrowedFd<'_>, what: PollFlags, can_wait: bool) -> Result<(), Errno> {
    if can_wait && poll(&mut [PollFd::new(fd, what)], PollTimeout::ZERO)? == 0 {
        return Err(Errno::EAGAIN);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::task::Waker;

    fn holds(socket: &Socket) -> usize {
        getsockopt(&socket.fd(), sockopt::SndBuf).expect("a socket has one")
    }

    fn send(socket: &mut Socket, length: usize) {
        let mut cx = Context::from_waker(Waker::noop());
        let bytes = vec![0; length];
        match socket.poll_send(&mut cx, &[IoSlice::new(&bytes)]) {
            Poll::Ready(sent) => drop(sent.expect("the other end is there")),
            Poll::Pending => {}
        }
    }

    #[test]
    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn a_socket_holds_more_while_replies_are_large() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut socket = Socket::on_reactor(ours.into()).unwrap();
        let usual = holds(&socket);
        send(&mut socket, SendBuffer::LARGE);
        assert_eq!(holds(&socket), usual);
        for _ in 0..2 {
            send(&mut socket, SendBuffer::LARGE + 1);
            assert!(holds(&socket) > usual);
            // The header of the next one, say.
            (1..SendBuffer::SMALL).for_each(|_| send(&mut socket, 28));
            assert!(holds(&socket) > usual);
            send(&mut socket, 28);
            assert_eq!(holds(&socket), usual);
        }
        let file = File::open("/dev/zero").unwrap();
        let _ = socket.poll_send_file(&mut Context::from_waker(Waker::noop()), &file, 0, SendBuffer::LARGE + 1);
        assert!(holds(&socket) > usual);
    }

    #[test]
    fn what_somebody_has_chosen_stays() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        setsockopt(&ours, sockopt::SndBuf, &SendBuffer::most()).unwrap();
        let mut socket = Socket::on_reactor(ours.into()).unwrap();
        let chosen = holds(&socket);
        send(&mut socket, SendBuffer::LARGE + 1);
        assert_eq!(holds(&socket), chosen);
    }

    #[test]
    #[cfg(any(target_os = "linux", target_os = "freebsd"))]
    fn a_connection_that_stays_on_this_machine_is_not_paced() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for name in ["bbr", "reno"] {
            let ours = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            if setsockopt(&ours, sockopt::TcpCongestion, &OsString::from(name)).is_err() {
                // A kernel without it has nothing to change.
                println!("SKIPPED: this kernel has no {name}");
                continue;
            }
            let socket = Socket::on_reactor(ours.into()).unwrap();
            let now = getsockopt(&socket.fd(), sockopt::TcpCongestion).unwrap();
            assert!(now.as_encoded_bytes().starts_with(b"reno"), "{now:?}");
        }
    }
}

//! Sockets to listen on, private directories, pid files: everything that is made on disk, and how it is taken away again.
//!
//! Whatever is made has its name before it exists, and every process of ours knows the names, so that whoever is left can
//! remove it. Nothing is removed that is not ours: a pid file only while it holds our pid, a socket only while nobody answers
//! at it. Source: nbdkit server/sockets.c, server/main.c `write_pidfile`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::kept;
use crate::values;
use dns_lookup::{AddrFamily, AddrInfoHints, SockType as LookupType, getaddrinfo};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, UnixAddr, bind, connect, getsockname, getsockopt,
    listen, setsockopt, socket, sockopt,
};

use crate::cli::{Family, Options, Unix};
use crate::identity;
use crate::report::Report;

/// The longest path that a Unix socket can have, in bytes.
const LONGEST_SOCKET_PATH: usize = 107;
/// The port that NBD clients take by themselves.
const DEFAULT_PORT: &str = "10809";

/// A directory of our own for a socket of our own: a name that was chosen, and may or may not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrivateDirectory(PathBuf);

impl PrivateDirectory {
    /// Chooses a name that nobody else has, under `$TMPDIR`, or under /tmp where the socket's path would be too long.
    /// Makes nothing. Errors: the system gives no random numbers.
    pub fn choose() -> io::Result<PrivateDirectory> {
        let mut random = [0; 12];
        let count = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
        let name: String = random[..count].iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)])).collect();
        let name = format!("nbdcaptive-{name}");
        let wanted = std::env::var_os("TMPDIR").map(PathBuf::from).filter(|path| path.is_absolute());
        let choices =
            wanted.into_iter().chain([PathBuf::from("/tmp")]).map(|parent| PrivateDirectory(parent.join(&name)));
        let fits = |choice: &PrivateDirectory| choice.socket().as_os_str().len() <= LONGEST_SOCKET_PATH;
        choices.into_iter().find(fits).ok_or_else(|| io::ErrorKind::InvalidFilename.into())
    }

    /// Where the socket is.
    pub fn socket(&self) -> PathBuf {
        self.0.join("socket")
    }

    fn make(&self) -> Result<(), String> {
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&self.0)
            .map_err(|error| format!("cannot make the socket's directory {}: {error}", self.0.display()))
    }

    fn remove(&self) {
        let _ = fs::remove_file(self.socket());
        let _ = fs::remove_dir(&self.0);
    }
}

/// What a server listens at.
pub struct Listening {
    /// To accept from.
    pub sockets: Vec<OwnedFd>,
    /// Where that is, for people.
    pub place: String,
    /// The port, where it is TCP: a number, or as the command line has it.
    pub port: Option<String>,
    /// Where it is a Unix socket.
    pub unix: Option<UnixSocket>,
}

/// A Unix socket that this process has made.
#[derive(Debug)]
pub struct UnixSocket {
    /// Where it was made.
    pub path: PathBuf,
    /// Device and inode of the name, by which another's at the same place is told apart.
    identity: Option<(u64, u64)>,
}

impl UnixSocket {
    /// What was just made at `path`.
    fn made(path: &Path) -> UnixSocket {
        UnixSocket { path: path.to_owned(), identity: identity(path) }
    }

    /// Removes its name, unless that is another's by now.
    pub fn unlink(&self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|about| (about.dev(), about.ino()))
}

/// What came with the process, as systemd gives it to a service; usually nothing.
#[derive(Debug, Default)]
pub struct Activation {
    /// To listen on.
    pub sockets: Vec<OwnedFd>,
    /// The variables that told of them, as they were in the environment.
    pub told: Vec<(&'static str, OsString)>,
}

/// The sockets that came with the process. Takes them out of the
/// environment, so that no process that is started from here takes them for its own. Errors: what was announced is not
/// there, as a line for people. To be called once, before any thread and any descriptor exists.
/// Source: sd_listen_fds(3); nbdkit server/socket-activation.c.
pub fn activated() -> Result<Activation, String> {
    let number = |name: &str| {
        let value = std::env::var_os(name)?;
        // As in nbdkit: what cannot be read is not for us.
        crate::values::unsigned(name, &value.to_string_lossy()).inspect_err(|error| Report::early().error(error)).ok()
    };
    let Some(pid) = number("LISTEN_PID") else { return Ok(Activation::default()) };
    if pid != std::process::id() {
        Report::early().say("LISTEN_PID was not for us (ignored)");
        return Ok(Activation::default());
    }
    let Some(count) = number("LISTEN_FDS") else { return Ok(Activation::default()) };
    if !(1..=MOST_ACTIVATED).contains(&count) {
        return Err(format!("socket activation: LISTEN_FDS={count} out of range"));
    }
    let mut told = Vec::new();
    for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"] {
        told.extend(std::env::var_os(name).map(|value| (name, value)));
        // SAFETY: there is no other thread that could read the environment meanwhile.
        unsafe { std::env::remove_var(name) };
    }
    let sockets = (FIRST_ACTIVATED..).take(count as usize).map(activated_socket).collect::<Result<_, _>>()?;
    Ok(Activation { sockets, told })
}

/// The first descriptor of socket activation: those below are stdin, stdout and stderr.
const FIRST_ACTIVATED: i32 = 3;
/// As many as nbdkit takes.
const MOST_ACTIVATED: u32 = 16;

fn activated_socket(number: i32) -> Result<OwnedFd, String> {
    let invalid = |error: Errno| format!("socket activation: invalid file descriptor fd = {number}: {}", error.desc());
    // SAFETY: borrowed only to ask whether there is such a descriptor.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(invalid)?;
    if !getsockopt(&borrowed, sockopt::AcceptConn).map_err(invalid)? {
        return Err(format!("socket activation: fd = {number} is a socket that does not listen"));
    }
    // SAFETY: it is open, the caller has handed it over by name, and nothing else here knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Begins to listen as `options` say. Errors: a line for people; nothing is left on disk then.
pub fn start(options: &Options, private: Option<&PrivateDirectory>) -> Result<Listening, String> {
    let label = options.selinux_label.as_deref();
    match (&options.unix, private) {
        (Some(Unix::Path(path)), _) => unix(path, label),
        (Some(Unix::Private), Some(private)) => {
            private.make()?;
            unix(&private.socket(), label).inspect_err(|_| private.remove())
        }
        (Some(Unix::Private), None) => Err("there is no private directory for the socket".to_owned()),
        (None, _) if options.vsock => vsock(options),
        (None, _) => tcp(options),
    }
}

/// Where a thread tells the kernel the SELinux label of the sockets that it makes. Source: libselinux setsockcreatecon(3).
const SOCKET_LABEL: &str = "/proc/thread-self/attr/sockcreate";

/// Makes sockets with a SELinux label, if one is wanted (`--selinux-label`). Errors: those of `make`, or that there can be no such
/// label. `attribute` is [`SOCKET_LABEL`].
fn labelled<T>(label: Option<&OsStr>, attribute: &str, make: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let Some(label) = label else { return make() };
    let set = |value: &[u8]| fs::OpenOptions::new().write(true).open(attribute).and_then(|mut to| to.write_all(value));
    // libselinux ends the label with a NUL, and the kernel takes a line end alone for no label.
    set(&[label.as_bytes(), b"\0"].concat()).map_err(|error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
        let hint = if Path::new("/sys/fs/selinux").exists() { "" } else { "; this system has no SELinux" };
        format!("selinux-label: setsockcreatecon_raw: {}{hint}", errno.desc())
    })?;
    let made = make();
    let cleared = set(b"\n").map_err(|error| format!("selinux-label: setsockcreatecon_raw(NULL): {error}"));
    made.and_then(|made| cleared.map(|()| made))
}

fn unix(path: &Path, label: Option<&OsStr>) -> Result<Listening, String> {
    let length = path.as_os_str().len();
    if length > LONGEST_SOCKET_PATH {
        let path = path.display();
        return Err(format!("-U: path too long: length {length} > max {LONGEST_SOCKET_PATH} bytes: {path}"));
    }
    // Held until we listen, so that no other server of ours takes a socket for dead that is only not ready yet.
    let turn = take_turn(path);
    let mut made = None;
    let mut attempt = |socket: OwnedFd| -> Result<OwnedFd, Errno> {
        let address = UnixAddr::new(path)?;
        match bind(socket.as_raw_fd(), &address) {
            // A server that was killed may have left it, and nobody answers there.
            Err(Errno::EADDRINUSE) if turn.is_some() && remove_dead_socket(path) => bind(socket.as_raw_fd(), &address)?,
            bound => bound?,
        }
        made = Some(UnixSocket::made(path));
        listen(&socket, BACKLOG)?;
        Ok(socket)
    };
    let failed = |error: Errno| format!("{}: {}", path.display(), error.desc());
    let attempted = labelled(label, SOCKET_LABEL, || {
        let socket = socket(AddressFamily::Unix, SockType::Stream, FLAGS, None).map_err(failed)?;
        attempt(socket).map_err(failed)
    });
    drop(turn);
    let place = format!("unix socket {}", path.display());
    match attempted {
        Ok(socket) => Ok(Listening { sockets: vec![socket], place, port: None, unix: made }),
        Err(line) => {
            made.iter().for_each(UnixSocket::unlink);
            Err(line)
        }
    }
}

const FLAGS: SockFlag = SockFlag::SOCK_CLOEXEC.union(SockFlag::SOCK_NONBLOCK);
const BACKLOG: Backlog = Backlog::MAXALLOWABLE;

fn tcp(options: &Options) -> Result<Listening, String> {
    let port = options.port.as_deref().unwrap_or(DEFAULT_PORT);
    let host = options.ip_address.as_deref();
    let addresses = look_up(host, port, options.family)?;
    let label = options.selinux_label.as_deref();
    let mut bound = labelled(label, SOCKET_LABEL, || tcp_sockets(&addresses))?;
    for _ in 0..MOST_PORTS_TRIED {
        // A port that was chosen for one address may be another server's at the next, and clients would come there.
        if !bound.is_chosen || bound.in_use != Some(Errno::EADDRINUSE) {
            break;
        }
        bound = labelled(label, SOCKET_LABEL, || tcp_sockets(&addresses))?;
    }
    let shown = host.unwrap_or("<any>");
    let Some(number) = bound.port else {
        let why = bound.in_use.map(|error| format!(": {}", error.desc())).unwrap_or_default();
        return Err(format!("unable to bind to any TCP/IP sockets at {shown}:{port}{why}"));
    };
    let count = bound.sockets.len();
    let place = format!("IP address {shown}:{} ({count} socket(s))", if bound.is_chosen { &number } else { port });
    let port = if bound.is_chosen { Some(number) } else { options.port.clone() };
    Ok(Listening { sockets: bound.sockets, place, port, unix: None })
}

/// How often another port is chosen for all addresses. Each time it is a random one of some 28000.
const MOST_PORTS_TRIED: usize = 16;

/// What became of several addresses.
struct Bound {
    sockets: Vec<OwnedFd>,
    /// The port of the first socket; `None` if there is none.
    port: Option<String>,
    /// The caller left the port to the system.
    is_chosen: bool,
    /// Why an address was left out.
    in_use: Option<Errno>,
}

/// Listens at each address that can be had. Errors: one cannot, and not because it is another's or of a family that is not there.
fn tcp_sockets(addresses: &[SocketAddr]) -> Result<Bound, String> {
    let is_chosen = addresses.iter().any(|address| address.port() == 0);
    let mut bound = Bound { sockets: Vec::new(), port: None, is_chosen, in_use: None };
    let mut chosen = 0;
    for address in addresses {
        let mut address = *address;
        // With port 0 the first socket's port is everybody's.
        if address.port() == 0 {
            address.set_port(chosen);
        }
        match tcp_socket(address) {
            Ok((socket, port)) => {
                chosen = port;
                bound.port.get_or_insert_with(|| port.to_string());
                bound.sockets.push(socket);
            }
            // A system may know addresses that it cannot serve.
            Err(error @ (Errno::EAFNOSUPPORT | Errno::EADDRINUSE)) => bound.in_use = Some(error),
            Err(error) => return Err(format!("bind: {address}: {}", error.desc())),
        }
    }
    Ok(bound)
}

/// Ports are 32 bits wide there, and of a space of their own. Errors: a line for people.
/// Source: vsock(7); nbdkit server/sockets.c `bind_vsock`.
#[cfg(target_os = "linux")]
fn vsock(options: &Options) -> Result<Listening, String> {
    use nix::sys::socket::VsockAddr;
    let given = options.port.as_deref().map(|port| values::unsigned("port", port)).transpose();
    let given = given.map_err(|error| format!("error: {error}"))?;
    // 0 lets the system choose, as elsewhere. Nobody could mean it: no client can be told to connect there.
    let wanted = match given {
        None => 10809,
        Some(0) => nix::libc::VMADDR_PORT_ANY,
        Some(port) => port,
    };
    let attempt = || -> Result<(OwnedFd, u32), Errno> {
        let socket = socket(AddressFamily::Vsock, SockType::Stream, FLAGS, None)?;
        bind(socket.as_raw_fd(), &VsockAddr::new(nix::libc::VMADDR_CID_ANY, wanted))?;
        listen(&socket, BACKLOG)?;
        let bound: VsockAddr = getsockname(socket.as_raw_fd())?;
        Ok((socket, bound.port()))
    };
    let (socket, port) = attempt().map_err(|error| match error {
        Errno::EAFNOSUPPORT => "--vsock: this kernel has no AF_VSOCK (modprobe vsock)".to_owned(),
        error => format!("--vsock: port {wanted}: {}", error.desc()),
    })?;
    let place = format!("vsock any:{port}");
    let port = if wanted == nix::libc::VMADDR_PORT_ANY { Some(port.to_string()) } else { options.port.clone() };
    Ok(Listening { sockets: vec![socket], place, port, unix: None })
}

#[cfg(not(target_os = "linux"))]
fn vsock(_options: &Options) -> Result<Listening, String> {
    Err("AF_VSOCK is not supported on this platform".to_owned())
}

fn look_up(host: Option<&str>, port: &str, family: Family) -> Result<Vec<SocketAddr>, String> {
    // The C library takes any number, and its last 16 bits for the port.
    if port.bytes().all(|byte| byte.is_ascii_digit()) && !port.is_empty() && port.parse::<u16>().is_err() {
        return Err(format!(
            "getaddrinfo: {}: {port}: a TCP port is a number from 0 to 65535",
            host.unwrap_or("<any>")
        ));
    }
    let hints = AddrInfoHints {
        flags: nix::libc::AI_PASSIVE,
        address: match family {
            Family::Any => 0,
            Family::V4 => AddrFamily::Inet.into(),
            Family::V6 => AddrFamily::Inet6.into(),
        },
        socktype: LookupType::Stream.into(),
        ..AddrInfoHints::default()
    };
    let found = getaddrinfo(host, Some(port), Some(hints)).map_err(|error| {
        let error = io::Error::from(error).to_string();
        // As gai_strerror has it: the crate puts the same words before every reason.
        let why = error.strip_prefix("failed to lookup address information: ").unwrap_or(&error);
        format!("getaddrinfo: {}: {port}: {why}", host.unwrap_or("<any>"))
    })?;
    Ok(found.filter_map(Result::ok).map(|info| info.sockaddr).collect())
}

fn tcp_socket(address: SocketAddr) -> Result<(OwnedFd, u16), Errno> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, FLAGS, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        // The other family has a socket of its own.
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&socket, BACKLOG)?;
    let bound: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    let port = bound.as_sockaddr_in().map(|v4| v4.port()).or_else(|| bound.as_sockaddr_in6().map(|v6| v6.port()));
    Ok((socket, port.unwrap_or(address.port())))
}

/// Writes the pid file: whole or not at all. Errors: a line for people.
pub fn write_pidfile(path: &Path) -> Result<(), String> {
    let text = format!("{}\n", std::process::id());
    let attempt = || -> io::Result<()> {
        // A device or a pipe cannot be replaced by a file.
        let special = fs::metadata(path).is_ok_and(|about| !about.file_type().is_file());
        let target = if special { path.to_owned() } else { temporary(path, std::process::id().cast_signed()) };
        let mut options = fs::OpenOptions::new();
        options.write(true).create(!special).truncate(!special).mode(0o644);
        options.custom_flags(nix::libc::O_NOCTTY | nix::libc::O_NONBLOCK);
        let mut file = if special { kept::starting(open_special(&options, path))?? } else { options.open(&target)? };
        // A full disk may show only when the data is written back; a device has no such thing.
        let written = file.write_all(text.as_bytes()).and_then(|()| if special { Ok(()) } else { file.sync_data() });
        let placed = written.and_then(|()| if special { Ok(()) } else { fs::rename(&target, path) });
        if placed.is_err() && !special {
            let _ = fs::remove_file(&target);
        }
        placed
    };
    attempt().map_err(|error| format!("{}: {error}", path.display()))
}

/// Waits for a pipe to have a reader, as an open that blocks does; but that would hear no signal.
async fn open_special(options: &fs::OpenOptions, path: &Path) -> io::Result<fs::File> {
    /// How often it is looked for.
    const LOOK: Duration = Duration::from_millis(10);
    loop {
        match options.open(path) {
            Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) => async_io::Timer::after(LOOK).await,
            opened => return opened,
        };
    }
}

/// Where the pid file of process `pid` is written, before it gets its name.
fn temporary(path: &Path, pid: i32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{pid}"));
    PathBuf::from(name)
}

/// Removes the pid file if it still holds `pid`.
pub fn remove_pidfile(path: &Path, pid: i32) {
    let is_file = fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_file());
    if is_file && fs::read(path).is_ok_and(|text| text == format!("{pid}\n").as_bytes()) {
        let _ = fs::remove_file(path);
    }
}

/// Removes what a server with `options`, whose pid was `pid`, has left behind. Safe to be called by several processes, at any
/// time after that server's end.
pub fn sweep(options: &Options, private: Option<&PrivateDirectory>, pid: i32) {
    if let Some(private) = private {
        private.remove();
    }
    if let Some(Unix::Path(path)) = &options.unix {
        remove_dead_socket(path);
    }
    // One that was killed while it wrote its pid file.
    if let Some(path) = &options.pidfile {
        let temporary = temporary(path, pid);
        if fs::symlink_metadata(&temporary).is_ok_and(|about| about.file_type().is_file()) {
            let _ = fs::remove_file(temporary);
        }
    }
    // nbdkit leaves it, and scripts that call it read there after the end which process it was.
    if let Some(path) = &options.pidfile
        && identity::package() != identity::NBDKIT
    {
        remove_pidfile(path, pid);
    }
}

/// Removes the socket at `path` if it is our user's and nobody listens there. Whether it was removed.
fn remove_dead_socket(path: &Path) -> bool {
    let user = nix::unistd::geteuid().as_raw();
    let ours = fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_socket() && about.uid() == user);
    // Without waiting: at a queue that is full somebody listens, and may never accept.
    let refused = || -> nix::Result<bool> {
        let socket = socket(AddressFamily::Unix, SockType::Stream, FLAGS, None)?;
        Ok(connect(socket.as_raw_fd(), &UnixAddr::new(path)?) == Err(Errno::ECONNREFUSED))
    };
    ours && refused() == Ok(true) && fs::remove_file(path).is_ok()
}

/// One server at a time makes a socket in a directory: a lock on the directory itself, which leaves no file behind. `None`
/// where that is not to be had; then nothing is taken over.
fn take_turn(path: &Path) -> Option<Flock<fs::File>> {
    let directory = fs::File::open(path.parent()?).ok()?;
    // Held by others only for an instant; by somebody else's program for ever, perhaps, and then we go without.
    let mut waiting = Some(directory);
    for _ in 0..100 {
        match Flock::lock(waiting.take()?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((directory, Errno::EAGAIN)) => waiting = Some(directory),
            Err(_) => return None,
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a socket that is made under a label would see, and what is there afterwards. A file stands in for the kernel's.
    #[test]
    fn a_label_is_set_while_sockets_are_made_and_not_longer() {
        let attribute = tempfile::NamedTempFile::new().unwrap();
        let path = attribute.path().to_str().unwrap();
        let seen = || fs::read(path).unwrap();
        let label = OsStr::new("system_u:object_r:svirt_socket_t:s0");
        let made = labelled(Some(label), path, || Ok(seen())).unwrap();
        assert_eq!(made, b"system_u:object_r:svirt_socket_t:s0\0");
        assert!(seen().starts_with(b"\n"), "a line end takes it away again");
        assert_eq!(labelled(Some(label), path, || Err::<(), _>("no socket".to_owned())).unwrap_err(), "no socket");
        assert!(seen().starts_with(b"\n"), "whatever came of it");
        let untouched = labelled(None, "/nowhere/attribute", || Ok(5));
        assert_eq!(untouched, Ok(5));
        let refused = labelled(Some(label), "/nowhere/attribute", || Ok(5)).unwrap_err();
        assert!(refused.starts_with("selinux-label: setsockcreatecon_raw: No such file or directory"), "{refused}");
    }

    #[test]
    fn what_a_server_leaves_that_is_killed_while_it_writes_its_pid_file_is_swept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        fs::write(temporary(&path, 12345), "123").unwrap();
        fs::write(temporary(&path, 12346), "another's").unwrap();
        sweep(&Options { pidfile: Some(path.clone()), ..Options::default() }, None, 12345);
        let left: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["pid.12346"]);
    }

    #[test]
    fn a_port_has_16_bits() {
        for port in ["65536", "99999", "18446744073709551616"] {
            let error = look_up(None, port, Family::Any).unwrap_err();
            assert_eq!(error, format!("getaddrinfo: <any>: {port}: a TCP port is a number from 0 to 65535"));
        }
        let found = look_up(Some("127.0.0.1"), "65535", Family::Any).unwrap();
        assert!(found.iter().all(|address| address.port() == 65535) && !found.is_empty());
    }
}

//! A server that runs, and a client that may take so long and no longer.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nbdcaptive_actors::watch_process;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Result;
use crate::rows::{Disk, Link};
use crate::servers::{Pin, Server};
use crate::workspace::Workspace;

/// How long a server may take until it greets, to answer, and to end after SIGTERM. Generous: only a broken one needs
/// it.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// How often a condition without an event (a socket that appears) is looked at.
const POLL: Duration = Duration::from_millis(2);

/// Where a server listens.
pub enum Address {
    Unix(PathBuf),
    /// On 127.0.0.1.
    Tcp(u16),
}

impl Address {
    /// Errors: there is no port to be had.
    fn choose(link: Link, workspace: &Workspace) -> Result<Address> {
        match link {
            Link::Unix => Ok(Address::Unix(workspace.socket())),
            Link::Tcp => {
                let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|socket| socket.local_addr());
                Ok(Address::Tcp(port.map_err(|error| format!("127.0.0.1: {error}"))?.port()))
            }
        }
    }

    pub fn uri(&self) -> String {
        match self {
            Address::Unix(socket) => format!("nbd+unix:///?socket={}", percent_encoded(socket)),
            Address::Tcp(port) => format!("nbd://127.0.0.1:{port}"),
        }
    }

    /// Connects and reads NBD's greeting. A client that left earlier would make some servers die of SIGPIPE.
    fn is_greeted(&self) -> io::Result<()> {
        match self {
            Address::Unix(socket) => {
                let stream = UnixStream::connect(socket)?;
                stream.set_read_timeout(Some(DEADLINE))?;
                greeting(stream)
            }
            Address::Tcp(port) => {
                let stream = TcpStream::connect(("127.0.0.1", *port))?;
                stream.set_read_timeout(Some(DEADLINE))?;
                greeting(stream)
            }
        }
    }
}

fn greeting(mut stream: impl Read) -> io::Result<()> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if greeting.starts_with(b"NBDMAGIC") { Ok(()) } else { Err(io::Error::other("no NBD server is there")) }
}

fn percent_encoded(path: &Path) -> String {
    let mut text = String::new();
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

/// A server that has greeted a client. Dropped, it is killed and reaped.
pub struct Running {
    child: Child,
    pub address: Address,
    ended: bool,
}

impl Running {
    pub fn start(workspace: &Workspace, server: &Server, disk: Disk, link: Link, pin: Pin) -> Result<Running> {
        let address = Address::choose(link, workspace)?;
        let log = File::create(workspace.server_log()).map_err(|error| format!("log: {error}"))?;
        let child = server
            .command(pin, &address, disk, workspace)
            .current_dir(&workspace.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| format!("{}: {error}", server.program.to_string_lossy()))?;
        let mut running = Running { child, address, ended: false };
        workspace.note(&running.pid().to_string())?;
        let deadline = Instant::now() + DEADLINE;
        while let Err(error) = running.address.is_greeted() {
            let ended = running.child.try_wait().map_err(|error| error.to_string())?;
            let told = match ended {
                Some(status) => format!("ended at once ({status})"),
                None if Instant::now() > deadline => format!("does not listen: {error}"),
                None => {
                    thread::sleep(POLL);
                    continue;
                }
            };
            let log = running.stop(workspace)?;
            return Err(with_log(told, &log));
        }
        Ok(running)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends the server, removes its socket, and returns what it wrote on stderr.
    pub fn stop(&mut self, workspace: &Workspace) -> Result<String> {
        self.end();
        workspace.note("")?;
        let _ = fs::remove_file(workspace.socket());
        Ok(fs::read(workspace.server_log()).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default())
    }

    fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        if !self.has_ended() {
            // Not reaped yet, so the pid is still its own.
            let _ = kill(Pid::from_raw(self.pid().cast_signed()), Signal::SIGTERM);
            let _ = wait_within(&mut self.child, DEADLINE);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// The error with the last line that the server wrote.
pub fn with_log(error: String, log: &str) -> String {
    match log.lines().last() {
        Some(line) => format!("{error}; the server said: {line}"),
        None => error,
    }
}

/// Waits for a process without being in its way; `None` if it is still there after `limit`.
fn wait_within(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let until = Instant::now() + limit;
    let ended = watch_process(child.id().cast_signed()).ok().flatten();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        match &ended {
            Some(ended) => {
                let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
                // Interrupted or not, it is looked at again.
                let _ = poll(&mut [PollFd::new(ended.as_fd(), PollFlags::POLLIN)], timeout);
            }
            None => thread::sleep(POLL.min(left)),
        }
    }
}

/// What a client said.
pub struct Said {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Said {
    pub fn error(&self, name: &str) -> String {
        format!("{name} failed ({}): {}", self.status, self.stderr.lines().last().unwrap_or("no message"))
    }
}

/// Runs a client to its end. Errors: it cannot be started, or takes longer than `limit` and was killed.
pub fn run_within(command: &mut Command, workspace: &Workspace, limit: Duration) -> Result<Said> {
    let name = Path::new(command.get_program()).file_name().map(OsStr::to_os_string).unwrap_or_default();
    let failed = |error: io::Error| format!("{}: {error}", name.to_string_lossy());
    // Into files: a pipe that nobody empties would stop it.
    let files = ["stdout", "stderr"].map(|name| workspace.dir.join(name));
    let [stdout, stderr] = files.each_ref().map(File::create);
    command.current_dir(&workspace.dir).stdin(Stdio::null());
    let mut child = command.stdout(stdout.map_err(failed)?).stderr(stderr.map_err(failed)?).spawn().map_err(failed)?;
    let waited = wait_within(&mut child, limit);
    if !matches!(waited, Ok(Some(_))) {
        let _ = child.kill();
        let _ = child.wait();
    }
    let [stdout, stderr] = files.map(|file| {
        let text = fs::read(file).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    });
    match waited.map_err(failed)? {
        Some(status) => Ok(Said { status, stdout, stderr }),
        None => Err(format!("{} took more than {limit:?} and was killed", name.to_string_lossy())),
    }
}

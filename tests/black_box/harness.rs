//! What every test here stands on: a private room, processes with a deadline, and proof that nothing was left behind.
//!
//! - [`Room`]: a directory of its own with a private `TMPDIR`, and a mark in the environment of all that is started from it.
//! - [`Launch`], [`Running`], [`Output`]: a command line, its process, its end.
//! - [`Server`]: a server on a Unix socket that accepts connections.
//! - [`Witness`]: a pipe whose write end the server and all that it starts inherit; its end of file means that all are gone.
//! - [`Fifo`]: how a command and a test wait for each other.
//! - [`alone`], [`wait_until_unread`]: what this program has closed is closed, also in the processes that other tests are starting
//!   just now.
//!
//! Whatever a test shares with the rest of the machine has a name of its own: rooms, marks, ports. So several copies of this
//! program may run at once, also in pid namespaces of their own, where process numbers are the same.
//!
//! Nothing sleeps to give something time: [`wait_for`] looks again until a deadline, which only a failing test reaches.

use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, signal, sigprocmask};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo, pipe2};

use super::raw_client::Client;

/// How long a test waits for what must come. Long, because the machine may be busy; a test that passes never waits so long.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// How long a program may take that was started, from when a test waits for its end. Longer, because a client may have much to do
/// and get little of a machine's time for it.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The variable that marks all processes of a room.
const MARK: &str = "NBDCAPTIVE_TEST_MARK";

/// The server under test.
pub fn server_path() -> PathBuf {
    match std::env::var_os("NBDCAPTIVE_TEST_SERVER") {
        Some(path) => path.into(),
        None => env!("CARGO_BIN_EXE_nbdcaptive").into(),
    }
}

/// Whether the server under test is nbdkit rather than ours.
pub fn is_nbdkit() -> bool {
    std::env::var_os("NBDCAPTIVE_TEST_SERVER").is_some()
}

/// Whether the server is nbdkit, of which it is known (Debian's 1.32.5) that it does not do this; the test then ends. With
/// the server of this project it is always false: no test of ours is left out.
pub fn nbdkit_differs(how: &str) -> bool {
    if is_nbdkit() {
        eprintln!("nbdkit differs: {how}");
    }
    is_nbdkit()
}

/// The name that a server gives itself in messages.
pub fn program_name() -> String {
    server_path().file_name().expect("the server is a file").to_string_lossy().into_owned()
}

/// The path of a program. Panics with what to install where it is missing: no test is left out in silence.
pub fn tool(name: &str) -> PathBuf {
    const SYSTEM: [&str; 4] = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
    let package = match name {
        "qemu-img" | "qemu-io" => "qemu-utils",
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "mke2fs" | "e2fsck" => "e2fsprogs",
        "systemd-socket-activate" => "systemd",
        "man" => "man-db",
        "groff" => "groff-base",
        "certtool" | "psktool" | "gnutls-cli" => "gnutls-bin",
        other => other,
    };
    let found = SYSTEM.iter().map(|directory| Path::new(directory).join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} is missing: apt install {package}"))
}

/// Looks until there is something to see. Panics at the deadline with what was waited for.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(start.elapsed() < DEADLINE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A TCP port that is the caller's alone, of this and of all other copies of this program: nobody gets it by chance, because it
/// is none of those that the system picks, and each that was given is claimed until this program ends.
pub fn free_port() -> String {
    static CLAIMS: Mutex<(u32, Vec<UnixListener>)> = Mutex::new((0, Vec::new()));
    /// Where ports are that are nobody's by convention; the last one is the port of NBD.
    const PORTS: std::ops::RangeInclusive<u32> = 10810..=65535;
    let picked = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").expect("the kernel has a range");
    let picked: Vec<u32> = picked.split_whitespace().map(|port| port.parse().expect("a number")).collect();
    let mut free: Vec<u32> = PORTS.filter(|port| !(picked[0]..=picked[1]).contains(port)).collect();
    if free.is_empty() {
        free = PORTS.collect();
    }
    let (next, claims) = &mut *CLAIMS.lock().unwrap_or_else(PoisonError::into_inner);
    // Copies begin at different places.
    let start = std::process::id().wrapping_mul(251);
    let port = wait_for("a free port", || {
        *next += 1;
        let port = free[start.wrapping_add(*next) as usize % free.len()];
        // An abstract name is of the network namespace, as ports are.
        let name = SocketAddr::from_abstract_name(format!("nbdcaptive-test-port-{port}")).expect("it is short");
        let claim = UnixListener::bind_addr(&name).ok()?;
        // Listened at for a moment.
        let is_taken = |address: &str| {
            let bound = alone(|| std::net::TcpListener::bind(format!("{address}:{port}")).map(drop));
            bound.is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse)
        };
        if is_taken("0.0.0.0") || is_taken("[::]") {
            return None;
        }
        claims.push(claim);
        Some(port)
    });
    port.to_string()
}

/// Held to be shared by whoever starts a process, until that has become its program.
static STARTING: RwLock<()> = RwLock::new(());

/// Starts a process, as everybody here has to.
pub fn spawn(command: &mut Command) -> std::io::Result<Child> {
    let _starting = STARTING.read().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Does something while no process is being started. Until it has become its program, and for an instant more, a process has a
/// copy of all that this program had open when it was started: a listener that was dropped still listens, a file that was
/// written is "busy" for who wants to execute it. What `act` opens and closes, no other process ever has.
pub fn alone<T>(act: impl FnOnce() -> T) -> T {
    let _alone = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    act()
}

/// Waits until nobody has the other end of this pipe to read from, also of those that were started meanwhile and have a copy
/// until they have become their programs.
pub fn wait_until_unread(pipe: &OwnedFd) {
    wait_for("the last reader of a pipe to be gone", || {
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO).expect("poll on a pipe");
        fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR)).then_some(())
    });
}

/// Leaves a socket at which nobody answers.
pub fn dead_socket(path: &Path) {
    alone(|| drop(UnixListener::bind(path).expect("a socket in the room")));
}

/// What a program finds that a shell starts at a terminal, whatever this program was started by: nohup(1), a script's background
/// and others ignore or block signals. To be called between fork and exec.
fn forget_signals() -> std::io::Result<()> {
    for one in Signal::iterator().filter(|one| ![Signal::SIGKILL, Signal::SIGSTOP].contains(one)) {
        // SAFETY: no handler is installed.
        unsafe { signal(one, SigHandler::SigDfl) }?;
    }
    Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?)
}

/// A process of a room, found by its mark.
#[derive(Clone)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    pub executable: PathBuf,
    pub arguments: String,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Process { pid, parent, executable, arguments } = self;
        write!(f, "{pid}, child of {parent}: {} ({arguments})", executable.display())
    }
}

/// A directory for one test; all that was started in it ends with it.
pub struct Room {
    path: PathBuf,
    mark: String,
}

impl Room {
    pub fn new() -> Room {
        // Not std::env::temp_dir: a socket's path has room for 107 bytes only.
        let made = tempfile::Builder::new().prefix("nc").rand_bytes(8).tempdir_in("/tmp");
        let path = made.expect("a new directory in /tmp").keep();
        fs::create_dir(path.join("tmp")).expect("a directory in the room");
        let mark = path.file_name().expect("it has a name").to_string_lossy().into_owned();
        Room { path, mark }
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// The `TMPDIR` of all that is started from here.
    pub fn tmpdir(&self) -> PathBuf {
        self.path("tmp")
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).expect("a file in the room");
        path
    }

    /// A program that can be executed at once, by everybody who may enter the room.
    pub fn script(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = alone(|| self.write(name, content));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("the file is ours");
        path
    }

    /// Lets everybody enter the room and write in it, and puts a copy of the server there, which may be where they cannot read it.
    pub fn open_to_all(&self) -> PathBuf {
        for path in ["", "tmp"] {
            fs::set_permissions(self.path(path), fs::Permissions::from_mode(0o777)).expect("it is ours");
        }
        let server = self.path(program_name());
        if !server.exists() {
            self.script(&program_name(), fs::read(server_path()).expect("the server is there"));
        }
        server
    }

    pub fn fifo(&self, name: &str) -> Fifo {
        Fifo::new(self.path(name))
    }

    /// A program, run in the room.
    pub fn tool<A: AsRef<OsStr>>(&self, program: &str, arguments: impl IntoIterator<Item = A>) -> Launch {
        let mut launch = self.launch(&tool(program));
        launch.args(arguments);
        launch
    }

    /// The server with just these arguments.
    pub fn server<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Launch {
        let mut launch = self.launch(&server_path());
        launch.args(arguments);
        launch
    }

    /// The server with these arguments and `--run=COMMAND`.
    pub fn captive<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        command: impl AsRef<OsStr>,
    ) -> Launch {
        self.captive_by(&server_path(), is_nbdkit(), arguments, command)
    }

    /// As [`Room::captive`], with Debian's nbdkit as the server whatever is tested.
    pub fn nbdkit_captive<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        command: impl AsRef<OsStr>,
    ) -> Launch {
        self.captive_by(nbdkit(), true, arguments, command)
    }

    /// nbdkit before 1.36 listens on TCP port 10809 where nothing else is said, which two tests cannot do at once: what
    /// `--run` implies since then is said to it.
    fn captive_by<A: AsRef<OsStr>>(
        &self,
        program: &Path,
        is_nbdkit: bool,
        arguments: impl IntoIterator<Item = A>,
        command: impl AsRef<OsStr>,
    ) -> Launch {
        const ENDPOINT: [&str; 5] = ["-U", "-p", "--unix", "--port", "--vsock"];
        let arguments: Vec<OsString> = arguments.into_iter().map(|argument| argument.as_ref().to_owned()).collect();
        let says_where = arguments.iter().any(|one| ENDPOINT.iter().any(|option| one == option));
        let mut launch = self.launch(program);
        if is_nbdkit && !says_where {
            launch.args(["-U", "-"]);
        }
        launch.args(arguments).args(["--run"]).args([command.as_ref()]);
        launch
    }

    /// Starts a program in the room.
    pub fn launch(&self, program: &Path) -> Launch {
        let mut command = Command::new(program);
        command.current_dir(&self.path).env(MARK, &self.mark).env("TMPDIR", self.tmpdir()).env("LC_ALL", "C.UTF-8");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut launch = Launch { command, keep: Vec::new() };
        launch.in_child(forget_signals);
        launch
    }

    /// A server on the socket `socket` of the room that accepts connections.
    pub fn serve<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Server {
        self.serve_with(arguments, |_| ())
    }

    /// As [`Room::serve`], with a hand in how it is started.
    pub fn serve_with<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        prepare: impl FnOnce(&mut Launch),
    ) -> Server {
        let socket = self.path("socket");
        let mut launch = self.server(["-f", "-U"]);
        launch.args([&socket]).args(arguments);
        prepare(&mut launch);
        let mut running = launch.start();
        running.wait_until_listening(&socket);
        Server { running, socket }
    }

    /// All living processes that were started from this room, and theirs.
    pub fn processes(&self) -> Vec<Process> {
        let wanted = format!("{MARK}={}", self.mark);
        let all = fs::read_dir("/proc").expect("/proc is there").flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter_map(|pid| {
            // A process may go at any moment between these reads; a zombie has no environment.
            let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
            environment.split(|&byte| byte == 0).find(|&one| one == wanted.as_bytes())?;
            let executable = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
            Some(Process { pid, parent, executable, arguments })
        })
        .collect()
    }

    /// The processes of the server itself, in the order of their pids, without what it runs.
    pub fn server_processes(&self) -> Vec<Process> {
        let server = server_path().canonicalize().expect("the server is there");
        let mut found: Vec<Process> = self.processes().into_iter().filter(|one| one.executable == server).collect();
        found.sort_by_key(|one| one.pid);
        found
    }

    /// Nothing is in `TMPDIR`, and no process is left. At once: whoever waits for the server never sees leftovers.
    pub fn assert_nothing_left(&self) {
        self.assert_tmpdir_empty();
        let left = self.processes();
        assert!(left.is_empty(), "processes are left: {left:#?}");
    }

    /// As [`Room::assert_nothing_left`], for an end that nobody could wait for.
    pub fn wait_until_nothing_left(&self) {
        let start = Instant::now();
        while let left @ [_, ..] = &self.processes()[..] {
            assert!(start.elapsed() < DEADLINE, "processes are left: {left:#?}");
            thread::sleep(Duration::from_millis(1));
        }
        wait_for("TMPDIR to be empty", || self.in_tmpdir().is_empty().then_some(()));
    }

    pub fn assert_tmpdir_empty(&self) {
        // Says nothing of nbdkit 1.32, which does not look at TMPDIR.
        let left = self.in_tmpdir();
        assert!(left.is_empty(), "left in TMPDIR: {left:?}");
    }

    fn in_tmpdir(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.tmpdir()).expect("TMPDIR is there");
        entries.flatten().map(|entry| entry.path()).collect()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // Only processes that this room started, by their pids; several rounds, because they may be forking.
        for _ in 0..100 {
            let left = self.processes();
            if left.is_empty() {
                break;
            }
            for process in left {
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(1));
        }
        let _ = fs::set_permissions(&self.path, fs::Permissions::from_mode(0o700));
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A command line that is about to be started.
pub struct Launch {
    command: Command,
    /// What the process inherits; ours to close once it runs.
    keep: Vec<OwnedFd>,
}

impl Launch {
    pub fn args<A: AsRef<OsStr>>(&mut self, arguments: impl IntoIterator<Item = A>) -> &mut Launch {
        self.command.args(arguments);
        self
    }

    /// The name that the program sees itself called by.
    pub fn named(&mut self, name: &str) -> &mut Launch {
        self.command.arg0(name);
        self
    }

    pub fn env(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Launch {
        self.command.env(name, value);
        self
    }

    pub fn stdin(&mut self, stdin: impl Into<Stdio>) -> &mut Launch {
        self.command.stdin(stdin);
        self
    }

    pub fn stdout(&mut self, stdout: impl Into<Stdio>) -> &mut Launch {
        self.command.stdout(stdout);
        self
    }

    /// Lets the process inherit a descriptor, with the number that it has here, and no other process of this test program.
    pub fn inherit(&mut self, fd: OwnedFd) -> &mut Launch {
        let number = fd.as_raw_fd();
        self.keep.push(fd);
        self.in_child(move || {
            // SAFETY: the number is that of an open descriptor, which `keep` holds until the process has started.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            Ok(())
        })
    }

    /// Does something between fork and exec: only what is safe there (system calls, no allocation, no lock).
    pub fn in_child(&mut self, hook: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static) -> &mut Launch {
        // SAFETY: the callers' hooks make system calls and nothing else.
        unsafe { self.command.pre_exec(hook) };
        self
    }

    /// Starts the process.
    pub fn start(&mut self) -> Running {
        let what = format!("{:?}", self.command);
        let mut child = spawn(&mut self.command).unwrap_or_else(|error| panic!("{what}: {error}"));
        self.keep.clear();
        let stdout = child.stdout.take().map(Collected::new);
        let stderr = child.stderr.take().map(Collected::new);
        Running { child, what, stdout, stderr, status: None }
    }

    /// Runs the process to its end.
    pub fn run(&mut self) -> Output {
        self.start().finish()
    }

    /// Runs the process to its end, which must be this exit status.
    pub fn run_to(&mut self, status: i32) -> Output {
        self.run().expect(status)
    }
}

/// What a process writes, read by a thread as it comes.
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Collected {
    fn new(mut from: impl Read + Send + 'static) -> Collected {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let to = Arc::clone(&bytes);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                to.lock().expect("no reader panics").extend_from_slice(&buffer[..length]);
            }
        });
        Collected { bytes, reader }
    }

    fn so_far(&self) -> Vec<u8> {
        self.bytes.lock().expect("no reader panics").clone()
    }
}

/// A process that a test has started. Killed when the test leaves it.
pub struct Running {
    child: Child,
    what: String,
    stdout: Option<Collected>,
    stderr: Option<Collected>,
    status: Option<ExitStatus>,
}

impl Running {
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("pids are small")
    }

    pub fn stdin(&mut self) -> std::process::ChildStdin {
        self.child.stdin.take().expect("stdin is a pipe")
    }

    pub fn stdout(&self) -> String {
        let bytes = self.stdout.as_ref().map(Collected::so_far).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub fn stderr(&self) -> String {
        let bytes = self.stderr.as_ref().map(Collected::so_far).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub fn signal(&self, signal: Signal) {
        assert!(self.status.is_none(), "{}: has ended already", self.what);
        kill(Pid::from_raw(self.pid()), signal).expect("the process is there");
    }

    /// Stops the process, wherever it is.
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        wait_for("a process to be stopped", || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).ok()?;
            stat.contains(") T ").then_some(())
        });
    }

    /// Whether the process has ended, without waiting.
    pub fn has_ended(&mut self) -> bool {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("the process is ours");
        }
        self.status.is_some()
    }

    /// Waits until a connection to the path is accepted.
    pub fn wait_until_listening(&mut self, socket: &Path) {
        wait_for(&format!("{} to listen", self.what), || {
            let ended = self.has_ended();
            assert!(!ended, "{}: ended with {:?}: {}", self.what, self.status, self.stderr());
            UnixStream::connect(socket).ok().map(drop)
        });
    }

    /// Waits for the end, and until nobody holds stdout and stderr any more.
    pub fn finish(mut self) -> Output {
        let start = Instant::now();
        while !self.has_ended() {
            if start.elapsed() > PATIENCE {
                panic!("{}: does not end; stderr so far: {}", self.what, self.stderr());
            }
            thread::sleep(Duration::from_millis(1));
        }
        let [stdout, stderr] =
            [("stdout", self.stdout.take()), ("stderr", self.stderr.take())].map(|(name, stream)| {
                let Some(stream) = stream else { return Vec::new() };
                wait_for(&format!("{}: {name} to be closed by all", self.what), || {
                    stream.reader.is_finished().then_some(())
                });
                stream.so_far()
            });
        let status = self.status.expect("it has ended");
        Output { what: self.what.clone(), status, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// How a process ended, and what it said.
pub struct Output {
    pub what: String,
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Output { what, status, stdout, stderr } = self;
        let stdout = String::from_utf8_lossy(stdout);
        write!(f, "{what}\nended with {status}\nstdout: {stdout:?}\nstderr: {stderr:?}")
    }
}

impl Output {
    /// The exit status must be this one.
    #[track_caller]
    pub fn expect(self, status: i32) -> Output {
        assert_eq!(self.status.code(), Some(status), "{self:#?}");
        self
    }

    /// It must have been ended by this signal.
    #[track_caller]
    pub fn expect_signal(self, signal: Signal) -> Output {
        assert_eq!(self.status.signal(), Some(signal as i32), "{self:#?}");
        self
    }

    /// The number that a shell has in `$?`: the exit status, or 128 and the signal.
    pub fn shell_status(&self) -> i32 {
        self.status.code().or(self.status.signal().map(|signal| 128 + signal)).expect("it has ended")
    }

    /// stdout as text.
    #[track_caller]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("text on stdout")
    }

    /// What the lines for `-v` say on stderr.
    pub fn debug_lines(&self) -> impl Iterator<Item = &str> {
        self.stderr.lines().filter_map(|line| Some(line.split_once(": debug: ")?.1))
    }

    /// The one line on stderr, which must begin with the server's name and contain all of these.
    #[track_caller]
    pub fn expect_error_line(&self, words: &[&str]) {
        // nbdkit adds advice to some messages, and begins some without its name.
        if !is_nbdkit() {
            assert_eq!(self.stderr.lines().count(), 1, "one line on stderr: {self:#?}");
            let prefix = format!("{}: ", program_name());
            assert!(self.stderr.starts_with(&prefix), "the program's name comes first: {self:#?}");
        }
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in the message: {self:#?}");
        }
    }
}

/// A server that accepts connections on a Unix socket.
pub struct Server {
    pub running: Running,
    pub socket: PathBuf,
}

impl Server {
    /// A client that has not read the greeting yet.
    pub fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    /// A client in transmission on the default export, with simple replies only.
    pub fn simple(&self) -> Client {
        let mut client = self.connect();
        client.start();
        client.go(b"");
        client
    }

    /// A client in transmission on the default export, with structured replies and `base:allocation`.
    pub fn structured(&self) -> Client {
        let mut client = self.connect();
        client.start();
        client.ask_for_structured_replies();
        client.ask_for_base_allocation(b"");
        client.go(b"");
        client
    }

    /// A client in transmission on the default export, with extended headers and `base:allocation`.
    pub fn extended(&self) -> Client {
        let mut client = self.connect();
        client.start();
        client.ask_for_extended_headers();
        client.ask_for_base_allocation(b"");
        client.go(b"");
        client
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix://?socket={}", self.socket.display())
    }

    /// Sends SIGTERM and waits for the end.
    pub fn terminate(self) -> Output {
        self.running.signal(Signal::SIGTERM);
        self.running.finish()
    }
}

/// A pipe whose write end a server inherits, with all that it starts.
pub struct Witness(OwnedFd);

impl Witness {
    pub fn new(launch: &mut Launch) -> Witness {
        // The process opens a write end for itself, so that no other of this program's ever has one.
        let (read, _) = alone(|| pipe2(OFlag::O_CLOEXEC).map(|(read, write)| (read, drop(write)))).expect("a pipe");
        // Nor does the process get another thing by this number.
        let high = fcntl(&read, FcntlArg::F_DUPFD_CLOEXEC(100)).expect("a descriptor");
        // SAFETY: it was just made, and nobody else knows of it.
        let read = unsafe { OwnedFd::from_raw_fd(high) };
        let path = CString::new(format!("/proc/self/fd/{}", read.as_raw_fd())).expect("a path has no NUL");
        launch.in_child(move || {
            let write = open(&*path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
            // Not one of those that the caller may have closed.
            fcntl(&write, FcntlArg::F_DUPFD(10))?;
            Ok(())
        });
        Witness(read)
    }

    /// Waits until no process holds the write end.
    pub fn wait_until_all_are_gone(&self) {
        assert!(readable(&self.0, DEADLINE), "some process is left");
    }

    pub fn all_are_gone(&self) -> bool {
        readable(&self.0, Duration::ZERO)
    }
}

/// Whether there is something to read, or the end, within the time.
pub fn readable(fd: &impl AsFd, timeout: Duration) -> bool {
    let timeout = PollTimeout::try_from(timeout).expect("deadlines are short");
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, timeout).expect("poll on a pipe") > 0
}

/// A named pipe on which a command and a test tell each other how far they are. In a shell: `echo here > NAME` and
/// `read x < NAME`.
pub struct Fifo {
    path: PathBuf,
    file: BufReader<File>,
}

impl Fifo {
    fn new(path: PathBuf) -> Fifo {
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).expect("a named pipe in the room");
        // For both, so that neither open nor write ever waits, whoever else is there.
        let file = File::options().read(true).write(true).open(&path).expect("the pipe was just made");
        Fifo { path, file: BufReader::new(file) }
    }

    /// Lets the reader in the command go on.
    pub fn tell(&mut self) {
        self.file.get_mut().write_all(b"go\n").expect("the pipe is open");
    }

    /// Waits for a line from the command.
    pub fn hear(&mut self) -> String {
        if self.file.buffer().is_empty() {
            let ready = readable(self.file.get_ref(), DEADLINE);
            assert!(ready, "the command said nothing on {}", self.path.display());
        }
        let mut line = String::new();
        self.file.read_line(&mut line).expect("a line of text");
        line.trim_end().to_owned()
    }
}

/// nbdkit, to compare with.
pub fn nbdkit() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| tool("nbdkit"))
}

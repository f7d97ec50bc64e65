//! Processes that plugins start, kept so that none outlives the server; and the directory that their scripts may use.
//!
//! ```text
//!  server ─┬─ group    leads the process group that all of them are in   blocks every signal
//!          ├─ keeper   waits at a pipe of ours, in a session of its own  blocks every signal
//!          └─ script, ...                                                in the group
//! ```
//!
//! At an orderly end [`end`] kills the group and has the keeper remove the directory. Should the server be killed, the keeper
//! sees the pipe close and does both, with half a second between SIGTERM and SIGKILL for who has something to write. The
//! keeper is not in the group, so that it can outlive it; nor in our session, whose processes a guardian kills when we are
//! gone. The group's leader does nothing: as long as it was not waited for, the group's number is nobody else's. Both are
//! started with the first process that is to be kept.
//!
//! What is started has its standard streams and no other descriptor of ours, for all are closed by exec; no signal blocked,
//! and SIGPIPE as it was by default. Nothing here handles SIGCHLD or waits for another's child.
//! Source: posix_spawn(3), setpgid(2); nbdkit plugins/sh/call.c, plugins/sh/tmpdir.c.

use std::ffi::{CStr, CString, OsStr};
use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use nbdcaptive_actors::device::{Connection, Recall};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, killpg, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};
use smol::future::FutureExt as _;

use crate::captive::tree;
use crate::leave::leave;

/// How long the keeper may take to remove a directory at the end. It goes on by itself after that.
const SWEEP: Duration = Duration::from_secs(10);

/// How long the group's leader may take to be gone once it was killed.
const LEADER: Duration = Duration::from_secs(1);

/// Leads the group. It outlives us for a moment, so that the keeper finds the group by its number; the keeper ends it.
const GROUP: &CStr = c"read x; sleep 10";

/// `$1` is the group, `$2` the directory. A line says that the group is dead; no line, that we are.
const KEEPER: &CStr = c"read x || {
    kill -s TERM -- \"-$1\"
    sleep 0.5
    kill -s KILL -- \"-$1\"
    n=0
    while kill -s 0 -- \"-$1\" && test $n -lt 100; do n=$((n+1)); sleep 0.01; done
}
cd / && rm -rf -- \"$2\"";

/// Where [`directory`] is where `$TMPDIR` says nothing.
static PREFERRED: OnceLock<&str> = OnceLock::new();

/// What is kept in this process.
static KEPT: Mutex<Option<Kept>> = Mutex::new(None);

/// See the module.
struct Kept {
    group: Pid,
    keeper: Pid,
    we_are_there: PipeWriter,
    /// Its name; it need not be there.
    directory: PathBuf,
    /// How many directories were made in it.
    count: u32,
    /// What is to be removed when nobody can be writing to it any more.
    abandoned: Vec<PathBuf>,
}

fn kept() -> MutexGuard<'static, Option<Kept>> {
    // What a panic can leave behind in it is whole.
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn started(kept: &mut Option<Kept>) -> io::Result<&mut Kept> {
    match kept {
        Some(kept) => Ok(kept),
        None => Ok(kept.insert(Kept::start()?)),
    }
}

/// Puts directories there where `$TMPDIR` says nothing, instead of in /tmp. To be called before anything is started.
pub fn prefer(parent: &'static str) {
    // The first who says so is the only one: there is one plugin.
    let _ = PREFERRED.set(parent);
}

/// Makes a directory that only this user may look into, and that is removed at the end with all that is in it.
pub fn directory() -> io::Result<PathBuf> {
    let mut kept = kept();
    let kept = started(&mut kept)?;
    let mut builder = fs::DirBuilder::new();
    builder.mode(0o700).recursive(true).create(&kept.directory)?;
    kept.count += 1;
    let path = kept.directory.join(kept.count.to_string());
    builder.recursive(false).create(&path)?;
    Ok(path)
}

/// Removes a file at the end, which a process that was given up may still be writing.
pub fn abandon(path: PathBuf) {
    if let Some(kept) = &mut *kept() {
        kept.abandoned.push(path);
    }
}

/// Kills what was started and is still there, and removes directories. To be called when nothing is to be started any more.
pub fn end() {
    let Some(Kept { group, keeper, mut we_are_there, abandoned, .. }) = kept().take() else { return };
    let is_there = |pid| waitpid(pid, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive);
    let deadline = Instant::now() + SWEEP;
    // Its leader is ours and was not waited for, so it is the group that we mean.
    let _ = killpg(group, Signal::SIGKILL);
    // A server that has become another user may not kill the leader; the keeper, which has not, may.
    let mut leads = true;
    while leads && deadline.saturating_duration_since(Instant::now()) > SWEEP - LEADER {
        leads = is_there(group);
        std::thread::sleep(Duration::from_millis(if leads { 1 } else { 0 }));
    }
    for path in abandoned {
        // It may never have been made.
        let _ = fs::remove_file(path);
    }
    if !leads {
        // A keeper that was killed is not there to hear it.
        let _ = we_are_there.write_all(b"\n");
    }
    drop(we_are_there);
    let mut sweeps = true;
    while (leads || sweeps) && Instant::now() < deadline {
        leads = leads && is_there(group);
        sweeps = sweeps && is_there(keeper);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// All of stdin, no more than `limit` bytes. Signals that ask for the end do so. To be called before anything is made.
pub fn read_input(limit: usize) -> io::Result<Vec<u8>> {
    let mut input = Some(PipeReader::from(io::stdin().as_fd().try_clone_to_owned()?));
    let signals = Signals::of(Phase::Starting)?;
    let mut all = Vec::new();
    loop {
        let ready = Ready::wait(None, input.as_ref(), None, signals.as_ref().map(Signals::as_fd))?;
        if ready.other {
            signals.iter().for_each(Signals::obey);
        }
        if ready.from && !pour(&mut input, &mut all, limit + 1)? {
            break;
        }
        if all.len() > limit {
            return Err(io::Error::other(format!("more than {limit} bytes")));
        }
    }
    Ok(all)
}

impl Kept {
    fn start() -> io::Result<Kept> {
        let directory = choose_directory()?;
        let (reader, we_are_there) = io::pipe()?;
        let environment = environment(&[]);
        let start = |script: &CStr, words: &[&CStr], flags: PosixSpawnFlags| -> io::Result<Pid> {
            let mut actions = PosixSpawnFileActions::init()?;
            actions.add_dup2(reader.as_raw_fd(), 0)?;
            for stream in [1, 2] {
                actions.add_open(stream, c"/dev/null", OFlag::O_RDWR, Mode::empty())?;
            }
            let mut attributes = PosixSpawnAttr::init()?;
            attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | flags)?;
            attributes.set_sigmask(&SigSet::all())?;
            let words = [&[c"sh", c"-c", script, c"sh"], words].concat();
            Ok(posix_spawn(c"/bin/sh", &actions, &attributes, &words, &environment)?)
        };
        // Group 0 is a new one of its own.
        let group = start(GROUP, &[], PosixSpawnFlags::POSIX_SPAWN_SETPGROUP)?;
        let (number, path) =
            (CString::new(group.as_raw().to_string())?, CString::new(directory.as_os_str().as_bytes())?);
        // nix has no name for this one.
        let session = PosixSpawnFlags::from_bits_retain(libc::POSIX_SPAWN_SETSID.into());
        let keeper = start(KEEPER, &[&number, &path], session).inspect_err(|_| {
            let _ = killpg(group, Signal::SIGKILL);
            while waitpid(group, None) == Err(Errno::EINTR) {}
        })?;
        Ok(Kept { group, keeper, we_are_there, directory, count: 0, abandoned: Vec::new() })
    }
}

/// Where [`directory`] makes its directories: `$TMPDIR`, or where [`prefer`] says.
pub fn parent() -> PathBuf {
    let preferred = PREFERRED.get();
    // There may be a socket in it, whose path must be short; not in one that is for disks.
    let fits = |path: &PathBuf| path.is_absolute() && (preferred.is_some() || path.as_os_str().len() <= LONGEST_PARENT);
    let parent = std::env::var_os("TMPDIR").map(PathBuf::from).filter(fits);
    parent.unwrap_or_else(|| PathBuf::from(preferred.unwrap_or(&"/tmp")))
}

/// A name that nobody else has. Nothing is made.
fn choose_directory() -> io::Result<PathBuf> {
    let mut random = [0; 12];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let name: String =
        random.iter().map(|byte| char::from(b"abcdefghijklmnopqrstuvwxyz234567"[*byte as usize % 32])).collect();
    Ok(parent().join(format!("nbdcaptive-scripts-{name}")))
}

/// This process's environment with these in place of what is there by their names.
pub fn environment(changed: &[(&str, &OsStr)]) -> Vec<CString> {
    let own = std::env::vars_os().filter(|(name, _)| !changed.iter().any(|(changed, _)| name == changed));
    let own = own.map(|(name, value)| (name.into_vec(), value.into_vec()));
    let changed = changed.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()));
    let words = own.chain(changed).filter_map(|(mut word, value)| {
        word.push(b'=');
        word.extend_from_slice(&value);
        CString::new(word).ok()
    });
    words.collect()
}

/// A program and what it is started with. A program without `#!` is run by the shell, as execvp(3) does it.
#[derive(Debug, Clone, Copy)]
pub struct Program<'a> {
    /// Its path.
    pub path: &'a CStr,
    /// From its name on.
    pub words: &'a [&'a CStr],
    /// `NAME=value`
    pub environment: &'a [CString],
}

/// The standard streams of a process that is to be started.
#[derive(Debug, Default)]
pub struct Streams {
    /// Nothing: /dev/null.
    pub input: Option<OwnedFd>,
    /// Nothing: /dev/null.
    pub output: Option<OwnedFd>,
    /// Nothing: ours.
    pub errors: Option<OwnedFd>,
    /// What it is to have as descriptor 3.
    pub third: Option<OwnedFd>,
}

/// Starts a process that does not outlive this one. Whoever started it waits for it.
pub fn spawn(program: Program<'_>, streams: &Streams) -> io::Result<Pid> {
    let mut kept = kept();
    let kept = started(&mut kept)?;
    let mut actions = PosixSpawnFileActions::init()?;
    // None of ours is below 3, for all were filled at the start; but one of them may be 3.
    for (number, stream) in [(0, &streams.input), (1, &streams.output), (2, &streams.errors), (3, &streams.third)] {
        match stream {
            Some(stream) if stream.as_raw_fd() == number => {
                return Err(io::Error::other("a descriptor is in the way"));
            }
            Some(stream) => actions.add_dup2(stream.as_raw_fd(), number)?,
            None if number < 2 => actions.add_open(number, c"/dev/null", OFlag::O_RDWR, Mode::empty())?,
            None => {}
        }
    }
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
            | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF
            | PosixSpawnFlags::POSIX_SPAWN_SETPGROUP,
    )?;
    attributes.set_sigmask(&SigSet::empty())?;
    // A shell cannot undo that it is ignored.
    attributes.set_sigdefault(&SigSet::from_iter([Signal::SIGPIPE]))?;
    attributes.set_pgroup(kept.group)?;
    match posix_spawn(program.path, &actions, &attributes, program.words, program.environment) {
        Err(Errno::ENOEXEC) => {
            let words = [&[c"/bin/sh", program.path], program.words.get(1..).unwrap_or_default()].concat();
            Ok(posix_spawn(c"/bin/sh", &actions, &attributes, &words, program.environment)?)
        }
        spawned => Ok(spawned?),
    }
}

/// When a program is run, and so how it is given up: while the server starts nobody else hears signals.
#[derive(Debug, Clone, Copy)]
pub enum Phase<'a> {
    /// A signal that asks for the end ends this process at once, and so does its parent's end, if it is to live as long.
    Starting,
    /// The Coordinator decides. For a client in the handshake it recalls the program, which is then told to end (SIGTERM), with
    /// all that it has started; and killed when it is given up. Any other has as long as it likes, until [`end`] is called.
    Serving(&'a Connection),
}

/// What a program that was run has come to.
#[derive(Debug)]
pub struct Ran {
    /// Its exit status, or the signal that killed it.
    pub status: WaitStatus,
    /// Its output, up to what was enough.
    pub output: Vec<u8>,
    /// The start of what it wrote to stderr, if that was wanted.
    pub errors: Vec<u8>,
    /// It was told to end, because nobody waits for it any more.
    pub recalled: bool,
}

/// The most of stderr that is kept, in bytes.
const ERRORS: usize = 64 * 1024;
/// The longest name of a directory that ours is made in, in bytes.
const LONGEST_PARENT: usize = 60;
/// How much is read or written at once, in bytes: what a pipe holds.
const PIECE: usize = 64 * 1024;

/// Runs a program and waits for its end and that of its output. Once `enough` bytes of output have come, the pipe is closed;
/// what `input` it does not want is dropped.
///
/// Errors: it cannot be started. Blocks for as long as the program likes.
pub fn run(program: Program<'_>, input: &[u8], enough: usize, keep_errors: bool, phase: Phase<'_>) -> io::Result<Ran> {
    let (mut streams, mut input) = (Streams::default(), input);
    let mut to = None;
    if !input.is_empty() {
        let (theirs, ours) = io::pipe()?;
        unblocked(&ours)?;
        (streams.input, to) = (Some(theirs.into()), Some(ours));
    }
    let (ours, theirs) = io::pipe()?;
    streams.output = Some(theirs.into());
    let mut from = Some(ours);
    let mut complaints = None;
    if keep_errors {
        let (ours, theirs) = io::pipe()?;
        (streams.errors, complaints) = (Some(theirs.into()), Some(ours));
    }
    let mut wanted = Wanted::of(phase)?;
    let pid = spawn(program, &streams)?;
    drop(streams);
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    while from.is_some() || complaints.is_some() {
        // One that was killed is gone; what holds its output is no more waited for.
        if wanted.look_at(pid) == Some(Signal::SIGKILL) {
            break;
        }
        let ready = Ready::wait(to.as_ref(), from.as_ref(), complaints.as_ref(), wanted.descriptor())?;
        if let Some(pipe) = to.take_if(|_| ready.to) {
            match nix::unistd::write(&pipe, &input[..input.len().min(PIECE)]) {
                Ok(count) => input = &input[count..],
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                // It has heard enough, or is gone; which of both shows at its status.
                Err(_) => input = &[],
            }
            if !input.is_empty() {
                to = Some(pipe);
            }
        }
        if ready.from && (!pour(&mut from, &mut output, enough)? || output.len() >= enough) {
            from = None;
        }
        if ready.complaints && !pour(&mut complaints, &mut errors, usize::MAX)? {
            complaints = None;
        }
        errors.truncate(ERRORS);
    }
    drop(to);
    let status = wait(pid, &mut wanted)?;
    Ok(Ran { status, output, errors, recalled: wanted.has_told.is_some() })
}

/// Runs a program that reads nothing and whose output nobody wants. Dropped, the program is killed; what it has started itself
/// lives until [`end`]. Errors: it cannot be started.
pub async fn run_quietly(program: Program<'_>) -> io::Result<WaitStatus> {
    let mut child = Child(Some(spawn(program, &Streams::default())?));
    let Some(pid) = child.0 else { return Err(io::ErrorKind::NotFound.into()) };
    let pidfd = rustix::process::Pid::from_raw(pid.as_raw()).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    // Where there are none it cannot be given up.
    if let Some(Ok(pidfd)) = pidfd {
        async_io::Async::new_nonblocking(pidfd)?.readable().await?;
    }
    child.0 = None;
    wait(pid, &mut Wanted::default())
}

/// A process that was not waited for.
struct Child(Option<Pid>);

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
            let _ = wait(pid, &mut Wanted::default());
        }
    }
}

/// Reads once, no more than is `enough`. Whether there may be more.
fn pour(from: &mut Option<PipeReader>, into: &mut Vec<u8>, enough: usize) -> io::Result<bool> {
    let Some(pipe) = from else { return Ok(false) };
    let start = into.len();
    into.resize(start + PIECE.min(enough.saturating_sub(start)), 0);
    let read = loop {
        match pipe.read(&mut into[start..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => break read,
        }
    };
    into.truncate(start + *read.as_ref().unwrap_or(&0));
    Ok(read? > 0)
}

fn unblocked(pipe: &PipeWriter) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, fcntl};
    fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop).map_err(io::Error::from)
}

/// What a running program wants.
struct Ready {
    to: bool,
    from: bool,
    complaints: bool,
    other: bool,
}

impl Ready {
    fn wait(
        to: Option<&PipeWriter>,
        from: Option<&PipeReader>,
        complaints: Option<&PipeReader>,
        other: Option<BorrowedFd<'_>>,
    ) -> io::Result<Ready> {
        let ends = [
            to.map(|pipe| (pipe.as_fd(), PollFlags::POLLOUT)),
            from.map(|pipe| (pipe.as_fd(), PollFlags::POLLIN)),
            complaints.map(|pipe| (pipe.as_fd(), PollFlags::POLLIN)),
            other.map(|other| (other, PollFlags::POLLIN)),
        ];
        let mut fds: Vec<_> = ends.iter().flatten().map(|(fd, events)| PollFd::new(*fd, *events)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
        let mut found = fds.iter().map(|fd| fd.any().unwrap_or(false));
        let [to, from, complaints, other] = ends.map(|end| end.is_some() && found.next().unwrap_or(false));
        Ok(Ready { to, from, complaints, other })
    }
}

/// Whether a program is still wanted, to be looked at whenever the descriptor is readable, and once before.
#[derive(Default)]
struct Wanted {
    signals: Option<Signals>,
    recalls: Option<Recalls>,
    /// What the program was told last because it is not.
    has_told: Option<Signal>,
}

impl Wanted {
    fn of(phase: Phase<'_>) -> io::Result<Wanted> {
        let recalls = match phase {
            Phase::Starting => None,
            Phase::Serving(connection) => connection.recall().map(Recalls::of).transpose()?,
        };
        Ok(Wanted { signals: Signals::of(phase)?, recalls, has_told: None })
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        let recalls = self.recalls.as_ref().map(Recalls::as_fd);
        self.signals.as_ref().map(Signals::as_fd).or(recalls)
    }

    /// Obeys a signal; tells the program `pid`, which was not waited for, and what descends from it that it is to end. What it has
    /// been told so far.
    fn look_at(&mut self, pid: Pid) -> Option<Signal> {
        self.signals.iter().for_each(Signals::obey);
        while let Some(signal) = self.recalls.as_mut().and_then(Recalls::next) {
            let below = tree::descendants(pid, &[]);
            tree::signal_child(pid, signal as i32);
            tree::signal_child(pid, Signal::SIGCONT as i32);
            for process in below {
                tree::signal(&process, signal as i32);
                // One that is stopped would not notice.
                tree::signal(&process, Signal::SIGCONT as i32);
            }
            self.has_told = Some(signal);
        }
        self.has_told
    }
}

/// A recall as a descriptor, for who waits by poll(2): readable when there may be more to hear.
struct Recalls {
    stirs: Arc<Stirs>,
    /// What is waited for, and the signal that it means.
    next: Option<(Signal, smol::future::Boxed<()>)>,
    recall: Recall,
}

struct Stirs(EventFd);

impl Wake for Stirs {
    fn wake(self: Arc<Stirs>) {
        // Fails only when the counter is full, and then it is readable.
        let _ = self.0.write(1);
    }
}

impl Recalls {
    fn of(recall: Recall) -> io::Result<Recalls> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let recalled = recall.clone();
        let next = Some((Signal::SIGTERM, async move { recalled.recalled().await }.boxed()));
        Ok(Recalls { stirs: Arc::new(Stirs(event)), next, recall })
    }

    /// The signal that is due now, if any. Each comes once.
    fn next(&mut self) -> Option<Signal> {
        // Nothing to read is as good as having read it.
        let _ = self.stirs.0.read();
        let (signal, waits) = self.next.as_mut()?;
        let waker = Waker::from(Arc::clone(&self.stirs));
        if waits.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            return None;
        }
        let due = *signal;
        let recall = self.recall.clone();
        self.next = (due == Signal::SIGTERM).then(|| (Signal::SIGKILL, async move { recall.given_up().await }.boxed()));
        Some(due)
    }
}

impl AsFd for Recalls {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stirs.0.as_fd()
    }
}

/// What asks for the end while the server starts, where nobody else hears it: signals, and the end of the parent that the server is
/// to live as long as.
struct Signals {
    signals: SignalFd,
    /// Readable when there may be something to obey.
    all: Epoll,
}

/// See [`give_up_with`].
static PARENT: OnceLock<OwnedFd> = OnceLock::new();

/// Has a start be given up when `parent`, which is readable then, has ended. To be called before anything is started.
pub fn give_up_with(parent: OwnedFd) {
    // There is one parent.
    let _ = PARENT.set(parent);
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.all.0.as_fd()
    }
}

impl Signals {
    fn of(phase: Phase<'_>) -> io::Result<Option<Signals>> {
        if let Phase::Serving(_) = phase {
            return Ok(None);
        }
        let mut set = SigSet::from_iter([Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM]);
        if !hangup_is_ignored() {
            set.add(Signal::SIGHUP);
        }
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let all = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for descriptor in [Some(signals.as_fd()), PARENT.get().map(AsFd::as_fd)].into_iter().flatten() {
            all.add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        }
        Ok(Some(Signals { signals, all }))
    }

    /// Lets the signal do what it does by default, after all that was started; or just ends, with the parent.
    fn obey(&self) {
        if let Some(parent) = PARENT.get()
            && poll(&mut [PollFd::new(parent.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(1)
        {
            end();
            leave(0);
        }
        let Ok(Some(info)) = self.signals.read_signal() else { return };
        let Ok(signal) = Signal::try_from(info.ssi_signo as i32) else { return };
        end();
        let _ = nix::sys::signal::kill(Pid::this(), signal);
        let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&SigSet::from_iter([signal])), None);
    }
}

/// Waits for something while the server starts. A signal that asks for the end ends this process.
pub fn starting<T>(something: impl Future<Output = T>) -> io::Result<T> {
    let Some(signals) = Signals::of(Phase::Starting)? else { return Ok(async_io::block_on(something)) };
    let signals = async_io::Async::new_nonblocking(signals)?;
    let obeyed = async {
        loop {
            let _ = signals.readable().await;
            signals.get_ref().obey();
        }
    };
    Ok(async_io::block_on(smol::future::or(something, obeyed)))
}

/// As nohup(1) has it.
fn hangup_is_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    tree::has_signal(&status, "SigIgn:", Signal::SIGHUP as i32) == Some(true)
}

/// Waits for a process that was started here.
fn wait(pid: Pid, wanted: &mut Wanted) -> io::Result<WaitStatus> {
    if wanted.descriptor().is_some()
        && let Some(raw) = rustix::process::Pid::from_raw(pid.as_raw())
        && let Ok(pidfd) = pidfd_open(raw, PidfdFlags::empty())
    {
        // Killed, it is waited for by no more than that.
        while wanted.look_at(pid) != Some(Signal::SIGKILL)
            && let Some(descriptor) = wanted.descriptor()
        {
            let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN), PollFd::new(descriptor, PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::NONE);
            if fds[0].any().unwrap_or(true) {
                break;
            }
        }
    }
    loop {
        match waitpid(pid, None) {
            Err(Errno::EINTR) => {}
            waited => return Ok(waited?),
        }
    }
}

/// A path for [`Program`]. Errors: a NUL inside.
pub fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, input: &[u8], enough: usize) -> Ran {
        let script = CString::new(script).unwrap();
        let words: [&CStr; 3] = [c"sh", c"-c", &script];
        let environment = environment(&[("tmpdir", OsStr::new("/there"))]);
        let program = Program { path: c"/bin/sh", words: &words, environment: &environment };
        run(program, input, enough, true, Phase::Serving(&Connection::default())).unwrap()
    }

    #[test]
    fn streams_and_status_are_the_programs() {
        let ran = sh("cat; echo \"$tmpdir\"; echo wrong >&2; exit 3", b"in ", 1 << 20);
        assert_eq!((&*ran.output, &*ran.errors), (&b"in /there\n"[..], &b"wrong\n"[..]));
        assert!(matches!(ran.status, WaitStatus::Exited(_, 3)));
        assert!(matches!(sh("kill -s KILL $$", b"", 0).status, WaitStatus::Signaled(_, Signal::SIGKILL, _)));
    }

    /// More than a pipe holds, in both directions at once.
    #[test]
    fn neither_side_waits_for_the_other() {
        let data = vec![7; 3 << 20];
        let ran = sh("cat; cat /dev/null", &data, usize::MAX);
        assert!(ran.output == data);
        // Input that nobody wants is no failure.
        assert!(matches!(sh("exit 0", &data, 0).status, WaitStatus::Exited(_, 0)));
    }

    #[test]
    fn output_without_an_end_is_cut() {
        assert_eq!(sh("yes", b"", 1000).output.len(), 1000);
        let ran = sh("head -c 1000000 /dev/zero >&2", b"", 0);
        assert_eq!(ran.errors.len(), ERRORS);
    }

    /// What is on its way out is so for moments only: here are its neighbours, which a wait for the end must not take for it.
    #[test]
    fn who_lives_and_who_has_ended_is_not_ending() {
        use crate::captive::tree::is_ending;
        assert!(!is_ending(Pid::this().as_raw()));
        let environment = environment(&[]);
        let program = Program { path: c"/bin/true", words: &[c"true"], environment: &environment };
        let pid = spawn(program, &Streams::default()).unwrap();
        let pidfd = pidfd_open(rustix::process::Pid::from_raw(pid.as_raw()).unwrap(), PidfdFlags::empty()).unwrap();
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(30_000_u16)), Ok(1));
        assert!(!is_ending(pid.as_raw()));
        assert!(matches!(waitpid(pid, None), Ok(WaitStatus::Exited(_, 0))));
        assert!(!is_ending(pid.as_raw()));
    }

    #[test]
    fn a_program_gets_its_standard_streams_and_nothing_else() {
        let script = "ls -l /proc/self/fd | sed 's/.*: //' >&2; grep SigBlk /proc/self/status; ps -o pgid= -p $$";
        let ran = sh(script, b"", 1 << 20);
        let text = String::from_utf8(ran.output).unwrap();
        assert!(text.starts_with("SigBlk:\t0000000000000000\n"), "{text}");
        let open = String::from_utf8(ran.errors).unwrap();
        assert!(!open.contains("socket:") && !open.contains("anon_inode:"), "{open}");
        let group = text.lines().last().unwrap().trim();
        assert_eq!(group, kept().as_ref().unwrap().group.to_string());
    }
}

//! A command that is run again and again to be asked whether the event has happened: status 88 says so.
//!
//! It runs as system(3) runs one, by `/bin/sh -c`, but nothing waits for it: it is started by posix_spawn(3), which does not
//! copy this process, and its end is told by a pidfd. No SIGCHLD is handled, and no other child is waited for. It has a session
//! of its own, so that it can be ended with all that it has started; the signal mask is empty, because this process blocks
//! everything; stdin and stdout are /dev/null.
//!
//! Nor does it outlive this process. [`Run`] ends it when dropped; for the end by SIGKILL there is its [`Keeper`], a shell
//! that reads from a pipe of ours, so it sees us gone, and then kills the session.
//! Source: system(3), posix_spawn(3), waitid(2); nbdkit filters/exitwhen/exitwhen.c and nbdkit-exitwhen-filter.pod.

use std::ffi::{CStr, CString};
use std::io::{self, PipeWriter};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, Instant};

use async_io::Timer;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};

use super::{is_readable, readable};
use crate::layer::ConfigError;
use crate::report::Report;

/// The status that says "it has happened".
const HAPPENED: i32 = 88;

/// How often a script is looked at where there are no pidfds.
const LOOK: Duration = Duration::from_millis(50);

/// How long one that was killed is waited for, so that nothing of it is left when we return. All but a process that hangs in
/// the kernel is gone much sooner.
const KILLED: Duration = Duration::from_millis(100);

/// Kills the session of `$1` when nobody holds the other end of its stdin any more.
const KEEPER: &CStr = c"read x; kill -s KILL -- \"-$1\"";

/// What a run has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing, and that is fine.
    Nothing,
    /// The event.
    Happened,
    /// Neither: a line for people. It does not count as the event.
    Failed(String),
}

/// The sentences are those of nbdkit's `exit_status_to_nbd_error`.
fn verdict(status: WaitStatus) -> Verdict {
    match status {
        WaitStatus::Exited(_, 0) => Verdict::Nothing,
        WaitStatus::Exited(_, HAPPENED) => Verdict::Happened,
        WaitStatus::Exited(_, status) => {
            Verdict::Failed(format!("exit-when-script: command failed with exit code {status}"))
        }
        WaitStatus::Signaled(_, signal, _) => {
            Verdict::Failed(format!("exit-when-script: command was killed by signal {}", signal as i32))
        }
        // Not asked for.
        _ => Verdict::Nothing,
    }
}

/// A script, and its run if it is running.
#[derive(Debug)]
pub struct Script {
    command: CString,
    run: Option<Run>,
}

impl Script {
    /// Errors: a NUL inside, which no command line has.
    pub fn new(command: &[u8]) -> Result<Script, ConfigError> {
        let command = CString::new(command).map_err(|error| ConfigError(format!("exit-when-script: {error}")))?;
        Ok(Script { command, run: None })
    }

    /// Starts it. If it cannot be started now it may be the next time.
    pub fn start(&mut self) {
        match Run::start(&self.command) {
            Ok(run) => self.run = Some(run),
            Err(error) => Report::early().error(format_args!("exit-when-script: cannot run it: {error}")),
        }
    }

    /// Waits for the end of its run until `deadline`. `None`: it is still running.
    pub fn wait_until(&mut self, deadline: Instant) -> Option<Verdict> {
        loop {
            let verdict = self.take();
            let left = deadline.saturating_duration_since(Instant::now());
            if verdict.is_some() || left.is_zero() {
                return verdict;
            }
            match self.run.as_ref()?.pidfd.as_ref() {
                Some(pidfd) => {
                    is_readable(pidfd, left);
                }
                None => std::thread::sleep(left.min(LOOK)),
            }
        }
    }

    /// Done when a run has said so. The next one is started `poll` after the end of the last.
    pub async fn happens(mut self, poll: Duration) -> String {
        loop {
            if let Some(run) = &self.run {
                match &run.pidfd {
                    Some(pidfd) => readable(pidfd, LOOK).await,
                    None => {
                        Timer::after(LOOK).await;
                    }
                }
                if self.take() == Some(Verdict::Happened) {
                    return self.line();
                }
            } else {
                Timer::after(poll).await;
                self.start();
            }
        }
    }

    /// What the run has come to, if it has ended. What went wrong is said.
    fn take(&mut self) -> Option<Verdict> {
        let verdict = self.run.as_mut()?.end()?;
        self.run = None;
        if let Verdict::Failed(line) = &verdict {
            Report::early().error(line);
        }
        Some(verdict)
    }

    /// What has happened.
    pub fn line(&self) -> String {
        format!("exit-when-script: exit code {HAPPENED} from: {}", self.command.to_string_lossy())
    }
}

/// A script that was started and not waited for. Dropped, it is killed with its session.
#[derive(Debug)]
struct Run {
    pid: Pid,
    /// `None` where there are none.
    pidfd: Option<OwnedFd>,
    keeper: Option<Keeper>,
    waited_for: bool,
}

impl Run {
    fn start(command: &CStr) -> io::Result<Run> {
        let mut streams = Streams::new()?;
        streams.null(0)?;
        streams.null(1)?;
        let pid = streams.shell(&[c"sh", c"-c", command])?;
        let pidfd =
            rustix::process::Pid::from_raw(pid.as_raw()).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        // Without one the script still ends with everything but a SIGKILL.
        let keeper = Keeper::start(pid).ok();
        Ok(Run { pid, pidfd, keeper, waited_for: false })
    }

    /// What it has come to, if it has ended. Never waits for it.
    fn end(&mut self) -> Option<Verdict> {
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(self.pid), look) {
            Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => return None,
            Ok(_) => {}
            Err(error) => {
                // Somebody else has waited for it: the number is no longer ours.
                self.waited_for = true;
                return Some(Verdict::Failed(format!("exit-when-script: {error}")));
            }
        }
        // First, because its number may be another's once we have waited. What it has left running is left alone.
        self.keeper = None;
        self.waited_for = true;
        Some(
            waitpid(self.pid, Some(WaitPidFlag::WNOHANG))
                .map_or_else(|error| Verdict::Failed(format!("exit-when-script: {error}")), verdict),
        )
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.waited_for {
            return;
        }
        // Ours, because we have not waited for it; and the group has its number, because it leads a session.
        let _ = killpg(self.pid, Signal::SIGKILL);
        self.keeper = None;
        let deadline = Instant::now() + KILLED;
        let until_gone = |gone: &dyn Fn() -> bool| {
            while !gone() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        until_gone(&|| waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) != Ok(WaitStatus::StillAlive));
        // Nothing is sent: this looks for what else was in the session.
        until_gone(&|| killpg(self.pid, None).is_err());
    }
}

/// Kills a script's session if this process ends without doing so. Dropped, it is ended itself.
#[derive(Debug)]
struct Keeper {
    pid: Pid,
    _we_are_there: PipeWriter,
}

impl Keeper {
    fn start(script: Pid) -> io::Result<Keeper> {
        let (reader, writer) = io::pipe()?;
        let mut streams = Streams::new()?;
        streams.actions.add_dup2(reader.as_raw_fd(), 0)?;
        streams.null(1)?;
        streams.null(2)?;
        let number = CString::new(script.as_raw().to_string())?;
        let pid = streams.shell(&[c"sh", c"-c", KEEPER, c"sh", &number])?;
        Ok(Keeper { pid, _we_are_there: writer })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        // It must be gone before the script's number is given away. It does nothing that could hold it up.
        while waitpid(self.pid, None) == Err(Errno::EINTR) {}
    }
}

/// The standard streams of a process that is to be started.
struct Streams {
    actions: PosixSpawnFileActions,
}

impl Streams {
    fn new() -> io::Result<Streams> {
        Ok(Streams { actions: PosixSpawnFileActions::init()? })
    }

    fn null(&mut self, number: i32) -> io::Result<()> {
        Ok(self.actions.add_open(number, c"/dev/null", OFlag::O_RDWR, Mode::empty())?)
    }

    /// Starts `/bin/sh` in a session of its own, with no signal blocked.
    fn shell(&self, words: &[&CStr]) -> io::Result<Pid> {
        // nix has no name for this one.
        let session = PosixSpawnFlags::from_bits_retain(libc::POSIX_SPAWN_SETSID.into());
        let mut attributes = PosixSpawnAttr::init()?;
        attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | session)?;
        attributes.set_sigmask(&SigSet::empty())?;
        let environment: Vec<CString> = std::env::vars_os()
            .filter_map(|(name, value)| {
                let mut word = name.into_vec();
                word.push(b'=');
                word.extend_from_slice(value.as_bytes());
                CString::new(word).ok()
            })
            .collect();
        Ok(posix_spawn(c"/bin/sh", &self.actions, &attributes, words, &environment)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Room, never, within};
    use super::*;

    const SOON: Duration = Duration::from_millis(1);

    fn run(command: &str) -> Verdict {
        let mut script = Script::new(command.as_bytes()).unwrap();
        script.start();
        script.wait_until(Instant::now() + Duration::from_secs(30)).unwrap()
    }

    /// "The script should exit with code 88 if the event is detected."
    #[test]
    fn the_status_says_what_has_happened() {
        let failed = |line: &str| Verdict::Failed(format!("exit-when-script: command {line}"));
        assert_eq!(run("exit 0"), Verdict::Nothing);
        assert_eq!(run("exit 88"), Verdict::Happened);
        assert_eq!(run("exit 1"), failed("failed with exit code 1"));
        assert_eq!(run("exit 87"), failed("failed with exit code 87"));
        assert_eq!(run("exit 89"), failed("failed with exit code 89"));
        assert_eq!(run("no-such-program-anywhere 2>&1"), failed("failed with exit code 127"));
        assert_eq!(run("kill -s KILL $$"), failed("was killed by signal 9"));
    }

    #[test]
    fn it_has_no_blocked_signal_a_session_and_no_input() {
        let before = SigSet::all().thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_SETMASK).unwrap();
        assert_eq!(run("grep -q '^SigBlk:[[:space:]]*0*$' /proc/self/status && exit 88"), Verdict::Happened);
        assert_eq!(run("read x || exit 88"), Verdict::Happened);
        assert_eq!(run("set -- $(cat /proc/$$/stat); test $5 = $$ && test $6 = $$ && exit 88"), Verdict::Happened);
        // The shell that asks is /bin/sh itself, as with system(3).
        assert_eq!(run(&format!("test $PPID = {} && exit 88", std::process::id())), Verdict::Happened);
        before.thread_set_mask().unwrap();
    }

    #[test]
    fn it_is_run_until_it_says_so() {
        let room = Room::new("script");
        let count = room.0.join("count");
        let command = format!("echo >> '{0}'; test $(wc -l < '{0}') = 3 && exit 88; exit 0", count.display());
        let script = Script::new(command.as_bytes()).unwrap();
        let line = script.line();
        assert_eq!(within(script.happens(SOON)), line);
    }

    /// D14: "killed with its tree at shutdown"
    #[test]
    fn all_of_its_session_is_killed_when_nobody_waits_for_it_any_more() {
        let (reader, writer) = io::pipe().unwrap();
        nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
        let mut script = Script::new(b"(trap '' TERM; sleep 1000; :) & sleep 1000; :").unwrap();
        script.start();
        drop(writer);
        assert_eq!(script.wait_until(Instant::now()), None);
        let mut happens = Box::pin(script.happens(SOON));
        never(&mut happens);
        assert!(!is_readable(&reader, Duration::ZERO));
        drop(happens);
        // Nobody holds the other end any more.
        assert!(is_readable(&reader, Duration::from_secs(30)));
    }

    /// What the kernel does to our end of its stdin when this process is killed.
    #[test]
    fn its_keeper_kills_its_session_when_we_are_gone() {
        let mut script = Script::new(b"sleep 1000 & sleep 1000; :").unwrap();
        script.start();
        let Some(Run { keeper: Some(keeper), .. }) = &mut script.run else { panic!("it was started") };
        keeper._we_are_there = io::pipe().unwrap().1;
        let failed = Verdict::Failed("exit-when-script: command was killed by signal 9".to_owned());
        assert_eq!(script.wait_until(Instant::now() + Duration::from_secs(30)), Some(failed));
    }
}

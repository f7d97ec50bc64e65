//! The process that the caller started, whose pid and exit status the caller sees. It waits, passes signals on, and stands by
//! in case the guardian is killed.
//!
//! It stays in the caller's session and group and holds the caller's output until everything else has ended, so whoever waits
//! for it never sees leftovers.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, raise, sigaction, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};

use super::fork::{Side, split};
use super::guardian::{self, Charge};
use super::link::{Link, Word};
use super::tree;
use crate::cli::{Options, Unix};
use crate::inherited::{Inherited, all_signals};
use crate::listen::{self, PrivateDirectory};
use crate::report::Report;
use crate::server;

/// How often the tree is looked at while it is to end.
const LOOK: Duration = Duration::from_millis(20);
/// How much longer than its drain a server may take before it is killed.
const SLACK: Duration = Duration::from_secs(1);

/// Runs `options.run` as a captive server does, and returns the exit status, or dies of the signal that the command died of.
/// To be called in a process without threads.
pub fn run(options: &Options, inherited: &Inherited) -> i32 {
    let report = match Report::new(options) {
        Ok(report) => report,
        Err(error) => {
            Report::early().say(error);
            return 1;
        }
    };
    match start(options, inherited, &report) {
        Ok(Some(front)) => front.wait(),
        // The parent is gone already, and so are we.
        Ok(None) => 0,
        Err(error) => {
            report.error(format_args!("cannot start: {error}"));
            1
        }
    }
}

struct Front<'a> {
    options: &'a Options,
    inherited: &'a Inherited,
    report: &'a Report,
    signals: SignalFd,
    link: Link,
    guardian: Pid,
    private: Option<PrivateDirectory>,
    /// Children that the caller had before it executed us: not ours to end.
    strangers: Vec<i32>,
    server: Option<i32>,
    /// Signals that this process got itself.
    got: Vec<i32>,
    outcome: Option<(i32, i32)>,
    standing_by: bool,
}

fn start<'a>(options: &'a Options, inherited: &'a Inherited, report: &'a Report) -> io::Result<Option<Front<'a>>> {
    // First of all, so that a parent that ends now is still seen.
    let parent = match server::parent(options.exit_with_parent)? {
        server::Parent::Gone => return Ok(None),
        server::Parent::NotWatched => None,
        server::Parent::Watched(pidfd) => Some(pidfd),
    };
    let front = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    // Should the guardian be killed, what it held comes to us.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let strangers = tree::descendants(Pid::this(), &[]).iter().map(|process| process.pid).collect();
    let private = match options.unix {
        Some(Unix::Private) => Some(PrivateDirectory::choose()?),
        _ => None,
    };
    let signals = SignalFd::with_flags(&all_signals(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let (link, front_link) = Link::pair()?;
    let guardian = match split()? {
        Side::Parent(pid) => pid,
        Side::Child => {
            drop((link, signals));
            let report = report.clone();
            let charge = Charge { options, inherited, front_link, front, parent, private, report };
            std::process::exit(guardian::run(charge));
        }
    };
    drop::<(Link, OwnedFd, Option<OwnedFd>)>((front_link, front, parent));
    Ok(Some(Front {
        options,
        inherited,
        report,
        signals,
        link,
        guardian,
        private,
        strangers,
        server: None,
        got: Vec::new(),
        outcome: None,
        standing_by: false,
    }))
}

impl Front<'_> {
    fn wait(mut self) -> i32 {
        loop {
            self.poll(PollTimeout::NONE);
            self.hear();
            if let Some(status) = self.reap() {
                // What it said last.
                self.hear();
                return match (self.outcome, status) {
                    (Some((status, signal)), _) => self.leave(status, signal),
                    (None, Some(status)) => status,
                    (None, None) => self.stand_by(),
                };
            }
        }
    }

    fn poll(&mut self, timeout: PollTimeout) {
        let mut fds =
            [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN), PollFd::new(self.link.as_fd(), PollFlags::POLLIN)];
        // At its end the link is readable for ever.
        let count = if self.outcome.is_some() || self.standing_by { 1 } else { 2 };
        // An interruption is as good as a timeout: everything is looked at anyway.
        let _ = poll(&mut fds[..count], timeout);
        while let Ok(Some(info)) = self.signals.read_signal() {
            self.on_signal(&info);
        }
    }

    fn hear(&mut self) {
        while let Ok(Some(word)) = self.link.hear() {
            match word {
                Word::ServerPid(pid) => self.server = Some(pid),
                Word::Outcome { status, signal } => self.outcome = Some((status, signal)),
                _ => {}
            }
        }
    }

    /// Waits for whoever has ended: `Some` if the guardian has, with its status, or without one if it was killed.
    fn reap(&self) -> Option<Option<i32>> {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) if pid == self.guardian => return Some(Some(status)),
                Ok(WaitStatus::Signaled(pid, ..)) if pid == self.guardian => return Some(None),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return None,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return None,
            }
        }
    }

    fn on_signal(&mut self, info: &siginfo) {
        let number = info.ssi_signo as i32;
        // Signals of the terminal carry a positive code, and the command got its own.
        let typed = info.ssi_code > 0;
        let Ok(signal) = Signal::try_from(number) else {
            // A real-time signal.
            return self.say(Word::PassOn(number));
        };
        match signal {
            Signal::SIGCHLD | Signal::SIGPIPE | Signal::SIGTTIN | Signal::SIGTTOU => {}
            Signal::SIGHUP if self.inherited.ignores_hangup() => {}
            Signal::SIGINT | Signal::SIGQUIT if typed => self.got.push(number),
            Signal::SIGTERM | Signal::SIGHUP | Signal::SIGINT | Signal::SIGQUIT => {
                self.got.push(number);
                self.say(Word::Signal(number));
            }
            Signal::SIGTSTP => {
                if !typed {
                    self.say(Word::PassOn(number));
                }
                // The caller's shell must see that the job is stopped.
                let _ = raise(Signal::SIGSTOP);
            }
            _ if typed => {}
            _ => self.say(Word::PassOn(number)),
        }
    }

    fn say(&self, word: Word) {
        // A guardian that is gone is reaped next, and then it is ours to act.
        let _ = self.link.say(&word);
    }

    /// Ends with `status`, or of `signal` if that ended the command and came to us as well: so a shell's loop stops.
    fn leave(&self, status: i32, signal: i32) -> i32 {
        if self.got.contains(&signal)
            && let Ok(signal) = Signal::try_from(signal)
        {
            let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
            let mut set = SigSet::empty();
            set.add(signal);
            // SAFETY: the default action, no code of ours.
            let _ = unsafe { sigaction(signal, &default) };
            // No core: it was not us who failed.
            let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
            let _ = raise(signal);
            let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&set), None);
        }
        status
    }

    /// The guardian was killed: everything comes to an end. The server notices by itself and drains; the command's tree, which
    /// has come to us, is ended here.
    fn stand_by(&mut self) -> i32 {
        self.report.error("the guardian process was killed");
        self.standing_by = true;
        let now = Instant::now();
        let kill_tree_at = now + self.options.grace_period;
        let kill_server_at = now + self.options.drain_timeout + SLACK;
        let mut told = false;
        loop {
            let _ = self.reap();
            let server = self.server.and_then(tree::find).filter(tree::is_alive);
            let except: Vec<i32> = self.strangers.iter().copied().chain(self.server).collect();
            let left = tree::descendants(Pid::this(), &except);
            if left.is_empty() && server.is_none() {
                break;
            }
            let now = Instant::now();
            let number = match (told, now >= kill_tree_at) {
                (_, true) => Some(9),
                (false, false) => Some(15),
                (true, false) => None,
            };
            for process in &left {
                if let Some(number) = number {
                    tree::signal(process, number);
                    tree::signal(process, 18);
                }
            }
            told = true;
            if now >= kill_server_at
                && let Some(server) = &server
            {
                tree::signal(server, 9);
            }
            self.poll(PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO));
        }
        listen::sweep(self.options, self.private.as_ref(), self.server.unwrap_or(0));
        128 + 9
    }
}

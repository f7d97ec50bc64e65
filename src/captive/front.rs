//! The process that the caller started, whose pid and exit status the caller sees. It waits, passes signals on, and stands by
//! in case the guardian is killed.
//!
//! It stays in the caller's session and group and holds the caller's output until everything else has ended, so whoever waits
//! for it never sees leftovers.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nbdcaptive_actors::repeats;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, raise, sigaction, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::fork::{Side, split};
use super::guardian::{self, Charge};
use super::link::{Link, Word};
use super::tree;
use crate::cli::{Options, Unix};
use crate::inherited::{Inherited, all_signals};
use crate::leave::leave;
use crate::listen::{self, PrivateDirectory};
use crate::report::Report;
use crate::server;

/// How much longer than its drain a server may take before it is killed.
const SLACK: Duration = Duration::from_secs(1);
/// How long a signal from our parent is held back, for SIGCONT to follow it: timeout(1) and shells that end a job send both to
/// our whole group, and the command, which has got the first then, may be about to end in a way of its own. Source: GNU
/// coreutils timeout.c, `cleanup`.
const GROUP_SIGNAL: Duration = Duration::from_millis(20);
/// How long it is held back at most, where our parent is still running then: a busy machine may keep it from the second signal.
const GROUP_SIGNAL_MOST: Duration = Duration::from_secs(1);

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
    server: Option<tree::Process>,
    server_pid: i32,
    command_pid: Option<i32>,
    /// Signals that this process got itself.
    got: Vec<i32>,
    outcome: Option<(i32, i32)>,
    held: Option<Held>,
    /// It got a stop from us, and is to get its end from us too.
    stopped_command: bool,
    standing_by: Option<Instant>,
    /// Somebody asked for the end a second time.
    urgent: bool,
    /// The parent that the server is to live as long as, where it can be watched only from here.
    parent: Option<server::Parent>,
}

fn start<'a>(options: &'a Options, inherited: &'a Inherited, report: &'a Report) -> io::Result<Option<Front<'a>>> {
    // First of all, so that a parent that ends now is still seen.
    let (parent, parent_here) = match server::parent(options.exit_with_parent, report)? {
        server::Parent::Gone => return Ok(None),
        server::Parent::NotWatched => (None, None),
        server::Parent::Watched(ended) => (Some(ended), None),
        here @ (server::Parent::Polled(_) | server::Parent::Signals) => (None, Some(here)),
    };
    // Should the guardian be killed, what it held comes to us.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let strangers = tree::children();
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
            let charge = Charge { options, inherited, front_link, parent, private, report };
            leave(guardian::run(charge));
        }
    };
    drop((front_link, parent));
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
        server_pid: 0,
        command_pid: None,
        got: Vec::new(),
        outcome: None,
        held: None,
        stopped_command: false,
        standing_by: None,
        urgent: false,
        parent: parent_here,
    }))
}

/// A signal from our parent that is held back for what shows that it was for the whole group.
#[derive(Clone, Copy)]
struct Held {
    number: i32,
    sender: i32,
    since: Instant,
    /// When to look whether to wait any longer.
    until: Instant,
}

impl Front<'_> {
    /// How long to wait for whatever comes.
    fn patience(&self) -> PollTimeout {
        if let Some(held) = self.held {
            let left = held.until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            return PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        }
        match self.parent {
            Some(server::Parent::Polled(_)) => PollTimeout::try_from(server::ASK).unwrap_or(PollTimeout::ZERO),
            _ => PollTimeout::NONE,
        }
    }

    fn look_at_parent(&mut self) {
        if let Some(server::Parent::Polled(pid)) = self.parent
            && nix::unistd::getppid().as_raw() != pid
        {
            self.parent = None;
            self.say(Word::ParentEnded);
        }
    }

    fn look_at_held(&mut self) {
        let now = Instant::now();
        let Some(held) = self.held.filter(|held| now >= held.until) else { return };
        // Who waits for something has sent all that it was going to.
        if tree::is_running(held.sender) && now.duration_since(held.since) < GROUP_SIGNAL_MOST {
            self.held = Some(Held { until: now + GROUP_SIGNAL, ..held });
        } else {
            self.held = None;
            self.say(Word::Signal(held.number));
        }
    }

    fn wait(mut self) -> i32 {
        loop {
            self.poll(self.patience());
            self.look_at_parent();
            self.look_at_held();
            self.hear();
            if let Some(status) = self.reap() {
                // What it said last, and what has ended the command and was sent to us as well: both were there before the
                // guardian's end, and may have come since we looked.
                self.hear();
                self.read_signals();
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
        let count = if self.outcome.is_some() || self.standing_by.is_some() { 1 } else { 2 };
        // An interruption is as good as a timeout: everything is looked at anyway.
        let _ = poll(&mut fds[..count], timeout);
        self.read_signals();
    }

    fn read_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            self.on_signal(&info);
        }
    }

    fn hear(&mut self) {
        while let Ok(Some(word)) = self.link.hear() {
            match word {
                Word::ServerPid(pid) => {
                    self.server = tree::find(pid);
                    self.server_pid = pid;
                }
                Word::CommandPid(pid) => self.command_pid = Some(pid),
                Word::Outcome { status, signal } => self.outcome = Some((status, signal)),
                _ => {}
            }
        }
    }

    /// Waits for whoever has ended: `Some` if the guardian has, with its status, or without one if it was killed.
    fn reap(&self) -> Option<Option<i32>> {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
                // Nobody would be left to act on anything.
                Ok(WaitStatus::Stopped(pid, _)) if pid == self.guardian => {
                    self.report.debug("the guardian process was stopped, and is told to go on");
                    tree::signal_child(pid, Signal::SIGCONT as i32);
                }
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
        // Signals of the terminal and of the kernel carry a positive code.
        let typed = info.ssi_code > 0;
        let Ok(signal) = Signal::try_from(number) else {
            // A real-time signal.
            return self.say(Word::PassOn(number));
        };
        match signal {
            Signal::SIGCHLD | Signal::SIGPIPE | Signal::SIGTTIN | Signal::SIGTTOU => {}
            Signal::SIGHUP if self.inherited.ignores_hangup() => {}
            _ if number == server::PARENT_ENDED && matches!(self.parent, Some(server::Parent::Signals)) => {
                self.say(Word::ParentEnded);
            }
            Signal::SIGTERM | Signal::SIGHUP | Signal::SIGINT | Signal::SIGQUIT => {
                self.got.push(number);
                if self.standing_by.is_some_and(|since| since.elapsed() >= repeats::SAME) {
                    self.urgent = true;
                }
                if typed && matches!(signal, Signal::SIGINT | Signal::SIGQUIT) {
                    self.say(Word::Typed(number));
                } else if typed || !self.is_of_the_command(info.ssi_pid.cast_signed()) {
                    self.report.debug(format_args!("received signal {number} from process {}", info.ssi_pid));
                    let sender = info.ssi_pid.cast_signed();
                    if self.held.is_none() && !typed && sender == nix::unistd::getppid().as_raw() {
                        let since = Instant::now();
                        self.held = Some(Held { number, sender, since, until: since + GROUP_SIGNAL });
                    } else {
                        self.say(Word::Signal(number));
                    }
                }
            }
            Signal::SIGTSTP => {
                if !typed {
                    self.stopped_command = true;
                    self.say(Word::PassOn(number));
                }
                // The caller's shell must see that the job is stopped.
                self.suffer(signal);
            }
            Signal::SIGCONT if self.held.is_some_and(|held| held.sender == info.ssi_pid.cast_signed()) => {
                if let Some(Held { number, .. }) = self.held.take() {
                    self.report.debug(format_args!("signal {number} was for the whole group: the command has got it"));
                    self.say(Word::GroupSignal(number));
                }
            }
            // A shell continues the whole group, and the command may have been stopped once more until ours gets there.
            Signal::SIGCONT if !std::mem::take(&mut self.stopped_command) => {}
            // A timer that the caller set before it executed us: they outlive exec, and the command has none.
            Signal::SIGALRM | Signal::SIGVTALRM | Signal::SIGPROF => self.say(Word::PassOn(number)),
            // The command has got its own.
            _ if typed => {}
            _ => self.say(Word::PassOn(number)),
        }
    }

    /// Whether the sender of a signal is the command or descends from it. What they send is for their whole group, as with
    /// `kill 0`, and the command has it already.
    fn is_of_the_command(&self, sender: i32) -> bool {
        // One that has ended by now can be known by its number only.
        self.command_pid == Some(sender) || tree::is_below(sender, self.guardian.as_raw(), self.server_pid)
    }

    /// Lets `signal` do what it does by default: unlike a stop that nobody can refuse, one from the terminal stops nothing in a
    /// group that nobody would ever continue.
    fn suffer(&self, signal: Signal) {
        let set = SigSet::from_iter([signal]);
        let _ = raise(signal);
        let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&set), None);
        let _ = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None);
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
            // SAFETY: the default action, no code of ours.
            let _ = unsafe { sigaction(signal, &default) };
            // No core: it was not us who failed.
            let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
            self.suffer(signal);
            // Still here: the first process of a container does not die of its own signals.
        }
        status
    }

    /// The guardian was killed: everything comes to an end. The server notices by itself and drains; the command's tree, which
    /// has come to us, is ended here.
    fn stand_by(&mut self) -> i32 {
        let began = Instant::now();
        self.standing_by = Some(began);
        self.report.error("the guardian process was killed");
        let mut rounds = tree::Rounds::new();
        let mut told = false;
        let mut killing_since = None;
        loop {
            let _ = self.reap();
            // It may have said so only now.
            self.hear();
            let server = self.server.filter(tree::is_alive);
            let except: Vec<i32> = self.strangers.iter().copied().chain([self.server_pid]).collect();
            let mut left = tree::descendants(Pid::this(), &except);
            // What the server has lost, and ends itself while it lives.
            left.retain(|process| server.is_none() || process.session != self.server_pid);
            if !told {
                let waiting: Vec<_> = left.iter().copied().chain(server).collect();
                let waiting = if waiting.is_empty() { "nothing".to_owned() } else { tree::list(&waiting) };
                self.report.debug(format_args!("ending: the guardian process was killed; waiting for {waiting}"));
                for process in &left {
                    tree::signal(process, Signal::SIGTERM as i32);
                    tree::signal(process, Signal::SIGCONT as i32);
                }
                told = true;
            }
            if left.is_empty() && server.is_none() {
                break;
            }
            let kill_tree_at = if self.urgent { began } else { began + self.options.grace_period };
            let kill_server_at = if self.urgent { began + SLACK } else { began + self.options.drain_timeout + SLACK };
            let now = Instant::now();
            if now >= kill_tree_at {
                left.iter().for_each(|process| {
                    tree::signal(process, Signal::SIGKILL as i32);
                });
            }
            if now >= kill_server_at
                && let Some(server) = &server
            {
                tree::signal(server, Signal::SIGKILL as i32);
            }
            if now >= kill_tree_at.max(kill_server_at) {
                let since = *killing_since.get_or_insert(now);
                if now.duration_since(since) >= guardian::LAST_WAIT {
                    let left: Vec<_> = left.into_iter().chain(server).collect();
                    self.report.error(format_args!("cannot end these processes: {}", tree::list(&left)));
                    break;
                }
            }
            // The last of them to go is a child of ours, whose end wakes us.
            let next = [kill_tree_at, kill_server_at].into_iter().filter(|time| *time > now).min();
            let wait = if now >= kill_tree_at || next.is_none() { Some(rounds.wait()) } else { None };
            let until = next.map(|time| time.duration_since(now) + Duration::from_millis(1));
            let timeout = wait.into_iter().chain(until).min().unwrap_or(SLACK);
            self.poll(PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX));
        }
        listen::sweep(self.options, self.private.as_ref(), self.server_pid);
        let status = 128 + Signal::SIGKILL as i32;
        let took = began.elapsed();
        self.report.debug(format_args!("all has ended after {took:.3?}, exit status {status}"));
        status
    }
}

//! The process between front and server: it starts the command and the server, holds the command's tree, and sees to it that
//! of all of them nothing is left.
//!
//! It has one thread, no plugin code and no data. In the ordinary case it only carries words between the front process, the
//! server's Coordinator and the command. By itself it acts where the Coordinator cannot: the server was killed, does not
//! answer, or does not end. As a subreaper it inherits every orphan of the command's tree, so it can end all of it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nbdcaptive_actors::CommandEnd;
use nbdcaptive_actors::log::{Level, Log};
use nbdcaptive_actors::repeats::{Heard, Repeats, Witness};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};

use super::command::{self, Starter};
use super::fork::{Side, split};
use super::link::{Link, Word};
use super::tree;
use crate::cli::Options;
use crate::inherited::{Inherited, all_signals};
use crate::leave::leave;
use crate::listen::{self, PrivateDirectory};
use crate::report::Report;
use crate::server;

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;
const SIGCONT: i32 = 18;

/// How long a command whose server was killed gets to fail by itself, before it is told to end.
const CRASH_GRACE: Duration = Duration::from_secs(2);
/// How long the server may take to answer to a signal that was handed to it.
const ANSWER: Duration = Duration::from_secs(1);
/// How long killed processes may take to go. What is left then waits for a device that does not answer, or belongs to another
/// user, and is said to be left.
pub const LAST_WAIT: Duration = Duration::from_secs(10);

/// What the front process gives its guardian.
pub struct Charge<'a> {
    /// The command line.
    pub options: &'a Options,
    /// What the command gets back.
    pub inherited: &'a Inherited,
    /// To the front process.
    pub front_link: Link,
    /// The parent that the server is to live as long as.
    pub parent: Option<OwnedFd>,
    /// Where the private socket will be, if there will be one.
    pub private: Option<PrivateDirectory>,
    /// Lines to stderr.
    pub report: Report,
}

/// Something that happens by itself at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alarm {
    /// The server has not answered to a signal.
    ServerSilent(i32),
    /// The command had its time to notice that its server was killed.
    CrashGraceOver,
    /// The tree had its time to end.
    GraceOver,
    /// The server had its time to end.
    DrainOver,
    /// Time to look whether what was killed has gone, and to kill what it forked meanwhile.
    KillAgain,
    /// What was killed has had its time to go.
    LastWaitOver,
}

struct Guardian<'a> {
    charge: Charge<'a>,
    link: Option<Link>,
    server: Option<Pid>,
    server_pid: Pid,
    command: Option<Pid>,
    starter: Option<Starter>,
    started: bool,
    command_end: Option<CommandEnd>,
    front_gone: bool,
    /// What the server said at its end.
    outcome: Option<i32>,
    /// It had to be killed, because it did not end.
    server_killed: bool,
    /// How it ended without saying so.
    crash: Option<i32>,
    /// Signals for the command that came before it was started.
    early: Vec<i32>,
    /// Signals that asked for the end, and since when they are counted.
    asked: Repeats,
    began: Instant,
    /// Somebody asked a second time.
    urgent: bool,
    /// The signal that came before the command was started, which it never will be now.
    forestalled: Option<i32>,
    /// What the first signal is meant for: processes that were there when it came. What a command that got it as well, as one
    /// of a group, starts in its trap is its way to end.
    aim: Option<Vec<tree::Process>>,
    /// What has been told to end.
    told: Vec<tree::Process>,
    /// The command's tree is to end, and not only the command.
    ending: bool,
    ending_since: Option<Instant>,
    killing: bool,
    rounds: tree::Rounds,
    /// What was killed does not go, and is no longer waited for.
    given_up: bool,
    /// There is nobody to wait for, and so no tree.
    childless: bool,
    alarms: Vec<(Instant, Alarm)>,
}

/// Runs as the guardian until everything else has ended, and returns the exit status. Called in a process of its own, which
/// has one thread.
pub fn run(charge: Charge<'_>) -> i32 {
    let report = charge.report.clone();
    match start(charge) {
        Ok(guardian) => guardian.guard(),
        Err(error) => {
            report.error(format_args!("cannot start: {error}"));
            1
        }
    }
}

/// Starts command and server. Returns in the guardian only: both children end by exit.
fn start(charge: Charge<'_>) -> io::Result<Guardian<'_>> {
    name(c"nbdguard");
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let (starter, wait) = command::starter()?;
    // The command first: what is made from here on must not reach it, and it must stay in the caller's session.
    let command = match split()? {
        Side::Parent(pid) => pid,
        Side::Child => {
            let Charge { options, inherited, report, front_link, parent, .. } = charge;
            // Until it may go it holds nothing by whose end another process is to notice something.
            drop((starter, front_link, parent));
            command::keep_descriptors(&options.parameters);
            let run = options.run.as_deref().unwrap_or_default();
            let status = match command::become_command(wait, run, inherited) {
                Ok(_) => 1,
                Err(error) => {
                    report.error(format_args!("failure to execute external command: {error}"));
                    1
                }
            };
            leave(status);
        }
    };
    drop(wait);
    match start_server(charge, command, starter) {
        Ok(guardian) => Ok(guardian),
        Err(error) => {
            // Its starter is gone, and so will it be.
            while waitpid(command, None) == Err(Errno::EINTR) {}
            Err(error)
        }
    }
}

fn start_server(charge: Charge<'_>, command: Pid, starter: Starter) -> io::Result<Guardian<'_>> {
    // Out of the caller's session and group, so that neither the terminal nor a signal to the group reaches us.
    setsid()?;
    // Whoever waits for the end of the caller's output must not wait for us.
    detach_stdio()?;
    let (link, server_link) = Link::pair()?;
    let server = match split()? {
        Side::Parent(pid) => pid,
        Side::Child => {
            name(c"nbdserve");
            drop((link, starter));
            // The front process must know us should the guardian be killed.
            let _ = charge.front_link.say(&Word::ServerPid(nix::unistd::getpid().as_raw()));
            let Charge { options, inherited, parent, private, front_link, .. } = charge;
            drop(front_link);
            inherited.stay_deaf_to_hangup();
            let status = match setsid() {
                Ok(_) => server::run(options, server::Role::Captive { link: server_link, parent, private }),
                Err(_) => 1,
            };
            leave(status);
        }
    };
    drop(server_link);
    // So that it knows whose signals came from the command itself. If it is gone, that shows soon.
    let _ = charge.front_link.say(&Word::CommandPid(command.as_raw()));
    Ok(Guardian {
        charge,
        link: Some(link),
        server: Some(server),
        server_pid: server,
        command: Some(command),
        starter: Some(starter),
        started: false,
        command_end: None,
        front_gone: false,
        outcome: None,
        server_killed: false,
        crash: None,
        early: Vec::new(),
        asked: Repeats::default(),
        began: Instant::now(),
        urgent: false,
        forestalled: None,
        aim: None,
        told: Vec::new(),
        ending: false,
        ending_since: None,
        killing: false,
        rounds: tree::Rounds::new(),
        given_up: false,
        childless: false,
        alarms: Vec::new(),
    })
}

/// What ps(1) shows. Only for people.
fn name(name: &std::ffi::CStr) {
    let _ = nix::sys::prctl::set_name(name);
}

fn detach_stdio() -> io::Result<()> {
    use nix::fcntl::{OFlag, open};
    let null = open("/dev/null", OFlag::O_RDWR, nix::sys::stat::Mode::empty())?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}

/// What woke the guardian.
#[derive(Default)]
struct Woken {
    signals: bool,
    server: bool,
    front: bool,
}

impl Guardian<'_> {
    fn guard(mut self) -> i32 {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = match SignalFd::with_flags(&all_signals(), flags) {
            Ok(signals) => signals,
            Err(error) => {
                // Without hearing signals nothing can be promised: end all before it begins.
                self.charge.report.error(format_args!("signalfd: {error}"));
                self.starter = None;
                self.kill_tree();
                self.server.iter().for_each(|server| tree::signal_child(*server, SIGKILL));
                return 1;
            }
        };
        while !self.is_done() {
            let woken = self.wait(&signals);
            // Words first: what the server said before it ended must be known before its end is.
            if woken.server {
                self.hear_server();
            }
            if woken.front {
                self.hear_front();
            }
            if woken.signals {
                self.hear_signals(&signals);
            }
            self.reap();
            self.ring();
        }
        self.finish()
    }

    /// Whether all has ended that is to end. What is left when a server has ended is killed.
    fn is_done(&mut self) -> bool {
        if self.server.is_some() || self.command.is_some() {
            return false;
        }
        // The last of a tree to go is always a child of ours, so its end wakes us: nothing has to be looked at again and
        // again.
        if self.given_up || self.childless {
            return true;
        }
        let left = self.left();
        if !left.is_empty() && !self.ending && !self.killing {
            self.kill_left();
        }
        left.is_empty()
    }

    /// What is to end and has not, of all that descends from us: the command's tree if it is to end; what the server had
    /// started if the server has ended, which shows at its session.
    fn left(&self) -> Vec<tree::Process> {
        let (mut helpers, mut tree) = self.below_us();
        if self.server.is_some() {
            helpers.clear();
        }
        if !self.ending {
            tree.clear();
        }
        [helpers, tree].concat()
    }

    /// All that descends from us without the server: what the server had started and has lost, which shows at its session; and
    /// the command with its tree.
    fn below_us(&self) -> (Vec<tree::Process>, Vec<tree::Process>) {
        let server = self.server_pid.as_raw();
        tree::descendants(Pid::this(), &[server]).into_iter().partition(|process| process.session == server)
    }

    fn wait(&self, signals: &SignalFd) -> Woken {
        let next = self.alarms.iter().map(|(time, _)| *time).min();
        let timeout = match next {
            None => PollTimeout::NONE,
            Some(time) => {
                // A millisecond more, so that the alarm is due when we wake.
                let left = time.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if !self.front_gone {
            fds.push(PollFd::new(self.charge.front_link.as_fd(), PollFlags::POLLIN));
        }
        if let Some(link) = &self.link {
            fds.push(PollFd::new(link.as_fd(), PollFlags::POLLIN));
        }
        if poll(&mut fds, timeout).is_err() {
            return Woken::default();
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
        let mut next = || ready.next().unwrap_or(false);
        let mut woken = Woken { signals: next(), ..Woken::default() };
        if !self.front_gone {
            woken.front = next();
        }
        woken.server = next();
        woken
    }

    fn hear_server(&mut self) {
        while let Some(link) = &self.link {
            match link.hear() {
                Ok(Some(word)) => self.on_server_word(word),
                Ok(None) => self.link = None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.link = None,
            }
        }
    }

    fn on_server_word(&mut self, word: Word) {
        match word {
            Word::Ready(errand) => {
                if let (Some(starter), Some(command)) = (self.starter.take(), self.command) {
                    self.started = true;
                    let pid = command.as_raw();
                    self.tell_server(&Word::CommandPid(pid));
                    // If it was killed while it waited, that is its end, and is reaped as such.
                    let _ = starter.go(&errand);
                    // It would have got them by now.
                    self.early.drain(..).for_each(|number| tree::signal_child(command, number));
                }
            }
            Word::SignalCommand(number) => {
                self.silence_is_broken();
                self.end_tree(number);
            }
            Word::KillCommand => {
                self.silence_is_broken();
                self.kill_tree();
            }
            Word::Outcome { status, .. } => self.outcome = Some(status),
            _ => {}
        }
    }

    fn hear_front(&mut self) {
        while !self.front_gone {
            match self.charge.front_link.hear() {
                Ok(Some(Word::Signal(number))) => self.on_signal(number, Witness::Beside),
                Ok(Some(Word::GroupSignal(number))) => {
                    self.on_signal(number, Witness::Beside);
                    // The grace period begins, and nobody has to be told.
                    if self.started {
                        self.aim = Some(Vec::new());
                    }
                }
                // While there is a command it is the command's. Before and after, it can be meant only for us.
                Ok(Some(Word::Typed(number))) if self.started && self.command.is_some() => {
                    self.charge.report.debug(format_args!("signal {number} was typed: the command has got it"));
                }
                Ok(Some(Word::Typed(number))) => self.on_signal(number, Witness::Beside),
                Ok(Some(Word::PassOn(number))) => {
                    if let (Some(command), true) = (self.command, self.started) {
                        tree::signal_child(command, number);
                    } else if !self.early.contains(&number) {
                        self.early.push(number);
                    }
                }
                Ok(Some(Word::ParentEnded)) => self.on_parent_ended(),
                Ok(Some(_)) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Nobody else holds the other end.
                Ok(None) | Err(_) => self.on_front_gone(),
            }
        }
    }

    fn hear_signals(&mut self, signals: &SignalFd) {
        while let Ok(Some(info)) = signals.read_signal() {
            let number = info.ssi_signo as i32;
            // A signal to us is meant for all of us.
            if matches!(number, 1 | 2 | 3 | SIGTERM) && !(number == 1 && self.charge.inherited.ignores_hangup()) {
                self.on_signal(number, Witness::Here);
            }
        }
    }

    /// Somebody asks for the end: the Coordinator decides what follows, unless it does not answer.
    fn on_signal(&mut self, number: i32, witness: Witness) {
        let heard = self.asked.hear(number, witness, self.began.elapsed());
        if !self.started && self.forestalled.is_none() && self.command_end.is_none() {
            self.forestall(number);
        }
        let word = match heard {
            Heard::First => Word::Signal(number),
            Heard::Again => Word::SignalAgain(number),
            Heard::Echo => return,
        };
        let told = self.tell_server(&word);
        if heard == Heard::Again {
            let is_known = std::mem::replace(&mut self.urgent, true);
            if told && !is_known {
                self.arm(ANSWER, Alarm::ServerSilent(number));
            } else if !is_known {
                self.kill_tree();
            }
        } else if self.command.is_some() {
            if told {
                self.aim = Some(self.below_us().1);
                self.arm(ANSWER, Alarm::ServerSilent(number));
            } else {
                self.end_tree(number);
            }
        }
    }

    /// The end was asked for before the command was started: it never will be. A server that is still getting ready has as
    /// long as a command would have.
    fn forestall(&mut self, number: i32) {
        self.charge.report.debug(format_args!("ending: received signal {number} before the command was started"));
        self.forestalled = Some(number);
        self.starter = None;
        self.arm(self.charge.options.grace_period, Alarm::DrainOver);
    }

    /// The front process has seen it, because the server cannot.
    fn on_parent_ended(&mut self) {
        self.charge.report.debug("ending: the parent process has ended");
        if !self.tell_server(&Word::ParentEnded) || !self.started {
            self.end_tree(SIGTERM);
        } else if self.command.is_some() {
            self.arm(ANSWER, Alarm::ServerSilent(SIGTERM));
        }
    }

    fn on_front_gone(&mut self) {
        self.front_gone = true;
        self.charge.report.debug("ending: the front process was killed");
        if !self.tell_server(&Word::FrontEnded) || !self.started {
            self.end_tree(SIGTERM);
        } else if self.command.is_some() {
            self.arm(ANSWER, Alarm::ServerSilent(SIGTERM));
        }
    }

    /// Whether there is a server that can be told.
    fn tell_server(&self, word: &Word) -> bool {
        self.link.as_ref().is_some_and(|link| link.say(word).is_ok())
    }

    fn silence_is_broken(&mut self) {
        self.alarms.retain(|(_, alarm)| !matches!(alarm, Alarm::ServerSilent(_)));
    }

    /// Tells the command and all that descends from it to end, from the top down, and gives them the grace period.
    fn end_tree(&mut self, number: i32) {
        if !self.ending {
            self.ending = true;
            self.ending_since = Some(Instant::now());
            self.arm(self.charge.options.grace_period, Alarm::GraceOver);
        }
        // One that waits for its start is told by never being started.
        self.starter = None;
        // Before the first signal: what the command starts because of it, in a trap, is its way to end.
        let aim = self.aim.take();
        if aim.as_ref().is_some_and(Vec::is_empty) {
            return;
        }
        let targets = aim.unwrap_or_else(|| self.below_us().1);
        self.signal_all(&targets, number);
        self.told.extend(targets);
    }

    /// What the command has started since it was told to end had its time when the command has ended. So had what was told
    /// and would be gone if it had heard it: a shell's child that is not yet its program hears it as the shell, and forgets it.
    fn end_rest(&mut self) {
        let mut rest = self.left();
        rest.retain(|process| {
            !self.told.iter().any(|told| told.is_same(process)) || tree::dies_of(process.pid, SIGTERM)
        });
        self.signal_all(&rest, SIGTERM);
        self.told.extend(rest);
    }

    fn kill_tree(&mut self) {
        self.ending = true;
        self.ending_since.get_or_insert_with(Instant::now);
        self.starter = None;
        self.alarms.retain(|(_, alarm)| *alarm != Alarm::GraceOver);
        self.kill_left();
    }

    /// Kills what is to end, and sees to it until nothing is left.
    fn kill_left(&mut self) {
        if !self.killing {
            self.killing = true;
            self.arm(LAST_WAIT, Alarm::LastWaitOver);
        }
        self.signal_all(&self.left(), SIGKILL);
        let wait = self.rounds.wait();
        self.arm(wait, Alarm::KillAgain);
    }

    fn signal_all(&self, processes: &[tree::Process], number: i32) {
        // The command's own pid is ours to signal as long as we have not waited for it.
        if let (Some(command), true) = (self.command, self.ending) {
            tree::signal_child(command, number);
        }
        for process in processes {
            if Some(process.pid) != self.command.map(Pid::as_raw) {
                tree::signal(process, number);
            }
            // One that is stopped would not notice anything but SIGKILL.
            if number != SIGKILL {
                tree::signal(process, SIGCONT);
            }
        }
    }

    fn reap(&mut self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) => self.on_end(pid, CommandEnd::Exited(status)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => self.on_end(pid, CommandEnd::Killed(signal as i32)),
                Ok(WaitStatus::StillAlive) => return,
                Err(Errno::ECHILD) => {
                    self.childless = true;
                    return;
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    fn on_end(&mut self, pid: Pid, end: CommandEnd) {
        if Some(pid) == self.server {
            // What it said last may still be on its way.
            self.hear_server();
            self.server = None;
            self.link = None;
            if !self.started {
                // Nobody will ever say "go".
                self.starter = None;
            }
            self.alarms.retain(|(_, alarm)| *alarm != Alarm::DrainOver);
            if self.outcome.is_none() && !self.server_killed {
                self.on_crash(end);
            }
            // What it was asked last it will not answer any more.
            let now = Instant::now();
            for (time, alarm) in &mut self.alarms {
                if matches!(alarm, Alarm::ServerSilent(_)) {
                    *time = now;
                }
            }
        } else if Some(pid) == self.command {
            self.command = None;
            if let (CommandEnd::Killed(signal), true) = (end, self.started) {
                self.charge.report.say(format_args!("external command was killed by signal {signal}"));
            }
            // Where it did not end by itself, neither does it leave anything on purpose.
            let by_itself = matches!(end, CommandEnd::Exited(_)) && self.crash.is_none() && !self.front_gone;
            if self.started && !by_itself && !self.ending {
                self.aim = None;
                self.end_tree(SIGTERM);
            } else if self.ending && !self.killing {
                self.end_rest();
            }
            self.on_command_end(end);
        }
        // Anybody else is an orphan of the command's tree, and has now been waited for.
    }

    fn on_command_end(&mut self, end: CommandEnd) {
        self.command = None;
        self.command_end = Some(end);
        self.tell_server(&Word::CommandEnded(end));
        let options = self.charge.options;
        let patience = match (self.started, self.urgent) {
            (_, true) => ANSWER,
            (true, false) => options.drain_timeout + ANSWER,
            // There is no client yet.
            (false, false) => options.grace_period,
        };
        // It may be armed already, if the end was asked for before the start.
        if !self.alarms.iter().any(|(_, alarm)| *alarm == Alarm::DrainOver) {
            self.arm(patience, Alarm::DrainOver);
        }
        if self.ending && self.charge.report.wants(Level::Debug) {
            let rest = self.left();
            if !rest.is_empty() {
                let rest = tree::list(&rest);
                self.charge.report.debug(format_args!("waiting for the rest of the command's tree: {rest}"));
            }
        }
    }

    /// The server ended without a word.
    fn on_crash(&mut self, end: CommandEnd) {
        match end {
            CommandEnd::Exited(status) if !self.started => {
                // It could not start, and has said why.
                self.outcome = Some(if status == 0 { 1 } else { status });
                self.starter = None;
            }
            CommandEnd::Exited(status) => {
                self.charge.report.error(format_args!("the server ended with status {status}"));
                self.crash = Some(if status == 0 { 1 } else { status });
            }
            CommandEnd::Killed(signal) => {
                self.charge.report.say(format_args!("nbdcaptive server was killed by signal {signal}"));
                self.crash = Some(128 + signal);
                self.starter = None;
            }
        }
        // What it had started, for its clients, goes with it.
        self.below_us().0.iter().for_each(|helper| {
            tree::signal(helper, SIGKILL);
        });
        // Whoever looks for the socket finds none, while the command notices that it is gone.
        self.sweep();
        if self.command.is_some() && self.started && !self.ending {
            let patience = CRASH_GRACE.min(self.charge.options.grace_period);
            self.charge.report.debug(format_args!("waiting for the command, {patience:?} at most, to fail by itself"));
            self.arm(patience, Alarm::CrashGraceOver);
        }
    }

    fn arm(&mut self, after: Duration, alarm: Alarm) {
        self.alarms.retain(|(_, armed)| *armed != alarm);
        self.alarms.push((Instant::now() + after, alarm));
    }

    fn ring(&mut self) {
        let now = Instant::now();
        while let Some(index) = self.alarms.iter().position(|(time, _)| *time <= now) {
            match self.alarms.swap_remove(index).1 {
                Alarm::ServerSilent(number) => self.act_for_server(number),
                Alarm::CrashGraceOver if self.command.is_none() => {}
                Alarm::CrashGraceOver => {
                    self.charge.report.debug("the command has not noticed that its server is gone, and is told to end");
                    self.end_tree(SIGTERM);
                }
                Alarm::GraceOver => {
                    let left = self.left();
                    if !left.is_empty() {
                        let (grace, left) = (self.charge.options.grace_period, tree::list(&left));
                        self.charge.report.debug(format_args!("killing what has not ended within {grace:?}: {left}"));
                    }
                    self.kill_tree();
                }
                Alarm::DrainOver => self.end_server(),
                Alarm::KillAgain => {
                    if !self.given_up && !self.childless {
                        self.kill_left();
                    }
                }
                Alarm::LastWaitOver => self.give_up(),
            }
        }
    }

    /// The server was told of a signal, and did not answer.
    fn act_for_server(&mut self, number: i32) {
        if self.server.is_some() {
            self.charge.report.debug(format_args!("the server does not answer to signal {number}: ending without it"));
        }
        if self.urgent {
            self.kill_tree();
            self.end_server();
        } else if self.command.is_some() {
            self.end_tree(number);
        }
    }

    /// The server has not ended in its time: it is stopped, or hangs in a device.
    fn end_server(&mut self) {
        if let Some(server) = self.server {
            self.charge.report.error("the server did not end in time and is killed");
            self.server_killed = true;
            tree::signal_child(server, SIGCONT);
            tree::signal_child(server, SIGKILL);
        }
    }

    /// Some of what was killed is still there.
    fn give_up(&mut self) {
        let left = self.left();
        if left.is_empty() && self.command.is_none() {
            return;
        }
        self.charge.report.error(format_args!("cannot end these processes: {}", tree::list(&left)));
        self.given_up = true;
        if self.command.is_some() {
            self.on_command_end(CommandEnd::Killed(SIGKILL));
        }
    }

    /// The command's status, or `own` where that would be 0 or there is none.
    fn command_status(&self, own: i32) -> i32 {
        match self.command_end {
            Some(CommandEnd::Killed(signal)) => 128 + signal,
            Some(CommandEnd::Exited(status)) if status != 0 => status,
            _ => own,
        }
    }

    /// Removes what the server would have removed.
    fn sweep(&self) {
        listen::sweep(self.charge.options, self.charge.private.as_ref(), self.server_pid.as_raw());
    }

    fn finish(self) -> i32 {
        self.sweep();
        let report = &self.charge.report;
        if !self.childless && !self.ending && report.wants(Level::Debug) {
            let left = tree::list(&self.below_us().1);
            report.debug(format_args!("the command has left these behind, without a server: {left}"));
        }
        let own = if self.server_killed { self.command_status(1) } else { self.crash.or(self.outcome).unwrap_or(1) };
        let (status, signal) = match (self.forestalled, own, self.command_end) {
            (Some(signal), ..) => (128 + signal, signal),
            (None, status, Some(CommandEnd::Killed(signal))) if status == 128 + signal => (status, signal),
            (None, status, _) => (status, 0),
        };
        if let Some(since) = self.ending_since {
            let took = since.elapsed();
            report.debug(format_args!("all has ended {took:.3?} after it was told to, exit status {status}"));
        } else if self.crash.or(self.forestalled).is_some() {
            report.debug(format_args!("all has ended, exit status {status}"));
        }
        // The front process may be gone, and then nobody wants to know.
        let _ = self.charge.front_link.say(&Word::Outcome { status, signal });
        status
    }
}

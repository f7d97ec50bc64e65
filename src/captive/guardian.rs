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
/// How often the tree is looked at while it is to end: orphans that end are told by SIGCHLD, deeper ones are not.
const LOOK: Duration = Duration::from_millis(20);

/// What the front process gives its guardian.
pub struct Charge<'a> {
    /// The command line.
    pub options: &'a Options,
    /// What the command gets back.
    pub inherited: &'a Inherited,
    /// To the front process.
    pub front_link: Link,
    /// The front process.
    pub front: OwnedFd,
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
    /// Time to look at the tree again.
    Look,
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
    /// How it ended without saying so.
    crash: Option<i32>,
    /// The command's tree is to end, and not only the command.
    ending: bool,
    killing: bool,
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
            let Charge { options, inherited, report, front_link, front, parent, .. } = charge;
            // Until it may go it holds nothing by whose end another process is to notice something.
            drop((starter, front_link, front, parent));
            let run = options.run.as_deref().unwrap_or_default();
            let status = match command::become_command(wait, run, inherited) {
                Ok(_) => 1,
                Err(error) => {
                    report.error(format_args!("failure to execute external command: {error}"));
                    1
                }
            };
            std::process::exit(status);
        }
    };
    drop(wait);
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
            let Charge { options, front, parent, private, front_link, .. } = charge;
            drop((front_link, front));
            let status = match setsid() {
                Ok(_) => server::run(options, server::Role::Captive { link: server_link, parent, private }),
                Err(_) => 1,
            };
            std::process::exit(status);
        }
    };
    drop(server_link);
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
        crash: None,
        ending: false,
        killing: false,
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
    front_gone: bool,
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
            if woken.front_gone && !self.front_gone {
                self.on_front_gone();
            }
            if woken.signals {
                self.hear_signals(&signals);
            }
            self.reap();
            self.ring();
        }
        self.finish()
    }

    fn is_done(&self) -> bool {
        let tree_gone = !self.ending || tree::descendants(Pid::this(), &[]).is_empty();
        self.server.is_none() && self.command.is_none() && tree_gone
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
            fds.push(PollFd::new(self.charge.front.as_fd(), PollFlags::POLLIN));
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
            woken.front_gone = next();
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
        loop {
            match self.charge.front_link.hear() {
                Ok(Some(Word::Signal(number))) => self.on_signal(number),
                Ok(Some(Word::PassOn(number))) => {
                    if let (Some(command), true) = (self.command, self.started) {
                        tree::signal_child(command, number);
                    }
                }
                Ok(Some(_)) => {}
                // Its end shows at its pidfd as well, and is dealt with there.
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn hear_signals(&mut self, signals: &SignalFd) {
        while let Ok(Some(info)) = signals.read_signal() {
            let number = info.ssi_signo as i32;
            // A signal to us is meant for all of us.
            if matches!(number, 1 | 2 | 3 | SIGTERM) && !(number == 1 && self.charge.inherited.ignores_hangup()) {
                self.on_signal(number);
            }
        }
    }

    /// Somebody asks for the end: the Coordinator decides what follows, unless it does not answer.
    fn on_signal(&mut self, number: i32) {
        if self.tell_server(&Word::Signal(number)) {
            if self.command.is_some() && !self.ending {
                self.arm(ANSWER, Alarm::ServerSilent(number));
            }
        } else {
            self.end_tree(number);
        }
    }

    fn on_front_gone(&mut self) {
        self.front_gone = true;
        if !self.tell_server(&Word::FrontEnded) || !self.started {
            self.end_tree(SIGTERM);
        } else {
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
            self.arm(self.charge.options.grace_period, Alarm::GraceOver);
            self.arm(LOOK, Alarm::Look);
        }
        // One that waits for its start is told by never being started.
        self.starter = None;
        self.signal_tree(number);
    }

    fn kill_tree(&mut self) {
        self.ending = true;
        self.killing = true;
        self.starter = None;
        self.arm(LOOK, Alarm::Look);
        self.signal_tree(SIGKILL);
    }

    fn signal_tree(&self, number: i32) {
        // Before the first signal: what the command starts because of it, in a trap, is its way to end.
        let processes = tree::descendants(Pid::this(), &[self.server_pid.as_raw()]);
        // The command's own pid is ours to signal as long as we have not waited for it.
        if let Some(command) = self.command {
            tree::signal_child(command, number);
        }
        for process in processes {
            if Some(process.pid) != self.command.map(Pid::as_raw) {
                tree::signal(&process, number);
            }
            // One that is stopped would not notice anything but SIGKILL.
            if number == SIGTERM {
                tree::signal(&process, SIGCONT);
            }
        }
    }

    fn reap(&mut self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) => self.on_end(pid, CommandEnd::Exited(status)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => self.on_end(pid, CommandEnd::Killed(signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
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
            self.silence_is_broken();
            self.alarms.retain(|(_, alarm)| *alarm != Alarm::DrainOver);
            if self.outcome.is_none() {
                self.on_crash(end);
            }
        } else if Some(pid) == self.command {
            self.command = None;
            self.command_end = Some(end);
            if let (CommandEnd::Killed(signal), true) = (end, self.started) {
                self.charge.report.say(format_args!("external command was killed by signal {signal}"));
                // It did not end by itself, so neither does it leave anything on purpose.
                if !self.ending {
                    self.end_tree(SIGTERM);
                }
            }
            self.tell_server(&Word::CommandEnded(end));
            let patience = self.charge.options.drain_timeout + ANSWER;
            self.arm(patience, Alarm::DrainOver);
        }
        // Anybody else is an orphan of the command's tree, and has now been waited for.
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
        // Whoever looks for the socket finds none, while the command notices that it is gone.
        self.sweep();
        if self.command.is_some() && !self.ending {
            self.arm(CRASH_GRACE.min(self.charge.options.grace_period), Alarm::CrashGraceOver);
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
                Alarm::ServerSilent(number) => self.end_tree(number),
                Alarm::CrashGraceOver => self.end_tree(SIGTERM),
                Alarm::GraceOver => self.kill_tree(),
                Alarm::DrainOver => self.end_server(),
                Alarm::Look => {
                    if self.killing {
                        self.signal_tree(SIGKILL);
                    }
                    if self.ending {
                        self.arm(LOOK, Alarm::Look);
                    }
                }
            }
        }
    }

    /// The server has not ended in its time: it is stopped, or hangs in a device.
    fn end_server(&mut self) {
        if let Some(server) = self.server {
            self.charge.report.error("the server did not end in time and is killed");
            self.outcome = Some(self.command_status(1));
            tree::signal_child(server, SIGCONT);
            tree::signal_child(server, SIGKILL);
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
        let status = self.crash.or(self.outcome).unwrap_or(1);
        let signal = match self.command_end {
            Some(CommandEnd::Killed(signal)) if status == 128 + signal => signal,
            _ => 0,
        };
        // The front process may be gone, and then nobody wants to know.
        let _ = self.charge.front_link.say(&Word::Outcome { status, signal });
        status
    }
}

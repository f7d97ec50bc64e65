//! The process that serves: configures, listens, says that it is ready, waits for the engine, cleans up.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use async_io::Async;
use nbdcaptive_actors::child_supervisor::{Captor, CommandEvent, CommandOrder};
use nbdcaptive_actors::{CommandEnd, Handle, Running, Server};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::getppid;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use smol::Executor;

use crate::captive::command::Errand;
use crate::captive::environment::Environment;
use crate::captive::link::{Link, Word};
use crate::captive::tree;
use crate::captive::uri::{Endpoint, print_uri_text, uri};
use crate::cli::{ExitWithParent, Options, Tls, Unix};
use crate::config::{Layers, Stack};
use crate::daemon::Launcher;
use crate::inherited::{Inherited, all_signals};
use crate::listen::{self, Listening, PrivateDirectory};
use crate::report::{Report, print};
use crate::sweeper::Sweeper;

/// How often a tree that is to end is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Which process this is.
pub enum Role<'a> {
    /// The only one.
    Alone {
        /// What the caller gave us.
        inherited: &'a Inherited,
        /// Who waits to hear that the server is ready, if it goes into the background.
        daemon: Option<Launcher>,
    },
    /// The server below a guardian.
    Captive {
        /// To the guardian.
        link: Link,
        /// The parent that the server is to live as long as.
        parent: Option<OwnedFd>,
        /// Where the private socket is to be.
        private: Option<PrivateDirectory>,
    },
}

/// Serves until the end, and returns the exit status. To be called in a process without threads.
pub fn run(options: &Options, role: Role<'_>) -> i32 {
    match prepare(options, role) {
        Ok(Some(ready)) => ready.serve(),
        Ok(None) => 0,
        Err(Failure { report, line, is_config }) => {
            // As nbdkit: what the configuration says is an error, what the system says stands for itself.
            if is_config {
                report.error(line)
            } else {
                report.say(line)
            }
            1
        }
    }
}

struct Failure {
    report: Report,
    line: String,
    is_config: bool,
}

/// A server that listens, with everything it needs to go on.
struct Ready<'a> {
    options: &'a Options,
    report: Report,
    server: Server,
    /// For the command's process.
    errand: Errand,
    captivity: Option<Captivity>,
    sweeper: Option<Sweeper>,
    hangup_is_ignored: bool,
}

/// What a captive server has of the other processes.
struct Captivity {
    link: Link,
}

fn prepare<'a>(options: &'a Options, role: Role<'_>) -> Result<Option<Ready<'a>>, Failure> {
    let report = match Report::new(options) {
        Ok(report) => report,
        Err(line) => return Err(Failure { report: Report::early(), line, is_config: false }),
    };
    let system = |line: String| Failure { report: report.clone(), line, is_config: false };
    report.debug(format_args!("nbdcaptive {}", env!("CARGO_PKG_VERSION")));

    // First, so that a parent that ends while a plugin takes its time is seen.
    let (parent, captivity, private, daemon, hangup_is_ignored) = match role {
        Role::Alone { inherited, daemon } => {
            let parent = match parent(options.exit_with_parent) {
                Ok(Parent::Gone) => return Ok(None),
                Ok(Parent::NotWatched) => None,
                Ok(Parent::Watched(pidfd)) => Some(pidfd),
                Err(error) => return Err(system(format!("--exit-with-parent: {error}"))),
            };
            let private = match options.unix {
                Some(Unix::Private) => Some(PrivateDirectory::choose().map_err(|error| system(error.to_string()))?),
                _ => None,
            };
            (parent, None, private, daemon, inherited.ignores_hangup())
        }
        Role::Captive { link, parent, private } => (parent, Some(Captivity { link }), private, None, false),
    };

    let config = |error: crate::layer::ConfigError| Failure { report: report.clone(), line: error.0, is_config: true };
    if options.tls_given && options.tls != Tls::Off {
        let line = "TLS cannot be enabled because this binary was compiled without TLS".to_owned();
        return Err(Failure { report, line, is_config: true });
    }
    let layers = Layers::find(options).map_err(config)?;
    let way: Vec<_> = layers.about().map(|(kind, about)| format!("{} ({kind})", about.name)).collect();
    report.debug(format_args!("request processing: {}", way.join(" -> ")));
    let Stack { exports, lifetime, plugin } = layers.configure(&options.parameters).map_err(config)?;
    let report = report.clone().about_plugin(plugin);

    if let Some(event) = &lifetime.already {
        report.say(format_args!("nothing to serve: {event}"));
        if let Some(Captivity { link }) = &captivity {
            // Status 0 without a word would be taken for a failure. Without a guardian nobody wants to know.
            let _ = link.say(&Word::Outcome { status: 0, signal: 0 });
        }
        return Ok(None);
    }

    // From here on there is something to clean up.
    let system = |line: String| Failure { report: report.clone(), line, is_config: false };
    // The last fork: no thread has been started yet.
    let makes_files = options.unix.is_some() || options.pidfile.is_some();
    let sweeper = match captivity {
        // The guardian sweeps.
        Some(_) => None,
        None if !makes_files => None,
        None => Some(Sweeper::start(options, private.as_ref()).map_err(|error| system(error.to_string()))?),
    };
    let listening = match listen::start(options, private.as_ref()) {
        Ok(listening) => listening,
        Err(line) => {
            sweeper.into_iter().for_each(Sweeper::dismiss);
            return Err(system(line));
        }
    };
    let pid = std::process::id().cast_signed();
    let clean_up = {
        let (options, private) = (options.clone(), private.clone());
        move || listen::sweep(&options, private.as_ref(), pid)
    };
    let unlisted = listening.unix.clone();
    let environment = environment(options, &listening);
    report.debug(format_args!("NBD URI: {}", String::from_utf8_lossy(&environment.uri)));
    let mut errand = Errand { print: Vec::new(), prelude: environment.prelude() };
    if options.print_uri {
        let text = print_uri_text(&environment.uri);
        // A captive server has no stdout: it is the command's.
        if captivity.is_some() { errand.print = text } else { print(&text) }
    }
    let finish_start = || -> Result<(), String> {
        if let Some(path) = &options.pidfile {
            listen::write_pidfile(path)?;
            report.debug(format_args!("written pidfile {}", path.display()));
        }
        if let Some(launcher) = daemon {
            launcher.detach().map_err(|error| format!("going into the background: {error}"))?;
        }
        Ok(())
    };
    let started = finish_start();
    if let Err(line) = started {
        drop(listening);
        clean_up();
        sweeper.into_iter().for_each(Sweeper::dismiss);
        return Err(system(line));
    }

    let workers = std::thread::available_parallelism().map_or(2, |count| count.get());
    let mut server = Server::new(exports)
        .read_only(options.read_only)
        .structured_replies(!options.no_structured_replies)
        .meta_contexts(!options.no_meta_contexts)
        .mask_handshake(options.mask_handshake as u16)
        .handshake_timeout(options.timeout)
        .keepalive(options.keepalive)
        .threads(options.threads.map_or(16, |count| count.get() as usize))
        .workers(workers)
        .exit_last(lifetime.exit_last)
        .grace_period(options.grace_period)
        .drain_timeout(options.drain_timeout)
        .log(Arc::new(report.clone()))
        .before_refusing(move || {
            // Whoever connects from now on finds nothing, rather than a socket at which nobody answers.
            if let Some(path) = unlisted {
                let _ = std::fs::remove_file(path);
            }
        })
        .at_end(clean_up);
    for socket in listening.sockets {
        server = server.listen(socket);
    }
    for event in lifetime.exit_when {
        server = server.exit_when(event);
    }
    if let Some(pidfd) = parent {
        server = server.parent(pidfd);
    }
    Ok(Some(Ready { options, report, server, errand, captivity, sweeper, hangup_is_ignored }))
}

fn environment(options: &Options, listening: &Listening) -> Environment {
    let endpoint = match &listening.unix {
        Some(path) => Endpoint::Unix(path.clone()),
        None => Endpoint::Tcp { port: listening.port.clone() },
    };
    let (certificates, psk) = (options.tls_certificates.as_deref(), options.tls_psk.as_deref());
    Environment {
        uri: uri(&endpoint, &options.export_name, options.tls, certificates, psk),
        exportname: options.export_name.clone(),
        port: listening.port.clone(),
        unixsocket: listening.unix.clone(),
        tls: options.tls,
        tls_certificates: options.tls_certificates.clone(),
        tls_psk: options.tls_psk.clone(),
    }
}

impl Ready<'_> {
    fn serve(self) -> i32 {
        let Ready { options, report, mut server, errand, captivity, sweeper, hangup_is_ignored } = self;
        let executor = Arc::new(Executor::new());
        let ended = async_io::block_on(executor.run(async {
            let signals = signals()?;
            let bridge = match captivity {
                Some(Captivity { link }) => {
                    let (captor, bridge) = Bridge::new(link)?;
                    server = server.captor(captor);
                    Some(bridge)
                }
                None => None,
            };
            let running = server.start(&executor)?;
            let handle = running.handle();
            // Both live as long as the server: dropped with these bindings.
            let child = sweeper.as_ref().map(Sweeper::pid);
            let _signals = executor.spawn(pass_signals(signals, handle, hangup_is_ignored, child));
            let status = match bridge {
                Some(bridge) => bridge.serve(&running, &errand, options.grace_period).await,
                None => running.wait().await.exit_status(),
            };
            io::Result::Ok(status)
        }));
        sweeper.into_iter().for_each(Sweeper::dismiss);
        ended.unwrap_or_else(|error| {
            report.error(format_args!("cannot serve: {error}"));
            1
        })
    }
}

/// The signals of this process, to be read.
fn signals() -> io::Result<Async<SignalFd>> {
    Async::new_nonblocking(SignalFd::with_flags(&all_signals(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// Turns signals into messages to the Coordinator. Others do to this process what they do by default.
async fn pass_signals(
    signals: Async<SignalFd>,
    handle: Handle,
    hangup_is_ignored: bool,
    sweeper: Option<nix::unistd::Pid>,
) {
    while signals.readable().await.is_ok() {
        while let Ok(Some(info)) = signals.get_ref().read_signal() {
            match info.ssi_signo as i32 {
                1 if hangup_is_ignored => {}
                17 => sweeper.into_iter().for_each(Sweeper::reap),
                number @ (1 | 2 | 3 | 15) => handle.signal(number),
                // USR1 and the like: nobody sends them to a server but to end it.
                number @ (10 | 12 | 14 | 26 | 27) => handle.signal(number),
                _ => {}
            }
        }
    }
}

/// Carries words between the guardian and the engine.
struct Bridge {
    link: Async<Link>,
    orders: Receiver<CommandOrder>,
    events: Sender<CommandEvent>,
}

impl Bridge {
    fn new(link: Link) -> io::Result<(Captor, Bridge)> {
        // Orders are a handful in all; the bound is never met.
        let (orders, orders_inbox) = async_channel::bounded(64);
        let (events, events_inbox) = async_channel::bounded(64);
        let bridge = Bridge { link: Async::new_nonblocking(link)?, orders: orders_inbox, events };
        Ok((Captor { orders, events: events_inbox }, bridge))
    }

    /// Serves to the end and says the outcome to the guardian.
    async fn serve(self, running: &Running, errand: &Errand, grace: Duration) -> i32 {
        let Bridge { link, orders, events } = self;
        // Clients are taken from here on, so the command may start. A guardian that is gone shows below.
        let _ = link.get_ref().say(&Word::Ready(errand.encode()));
        let pass_orders = async {
            while let Ok(order) = orders.recv().await {
                let word = match order {
                    CommandOrder::Signal(number) => Word::SignalCommand(number),
                    CommandOrder::Kill => Word::KillCommand,
                };
                // A guardian that is gone shows at the other direction.
                let _ = link.get_ref().say(&word);
            }
            std::future::pending::<i32>().await
        };
        let pass_events = async {
            let mut command = None;
            while let Ok(Some(word)) = link.read_with(Link::hear).await {
                let event = match word {
                    Word::Signal(number) => CommandEvent::Signal(number),
                    Word::CommandEnded(end) => CommandEvent::Ended(end),
                    Word::FrontEnded => CommandEvent::FrontEnded,
                    Word::CommandPid(pid) => {
                        command = tree::find(pid);
                        continue;
                    }
                    _ => continue,
                };
                let _ = events.send(event).await;
            }
            // The guardian was killed. The front process, if it still stands, ends the command; if not, we are the last. Both
            // may do so at once, and it does no harm.
            let _ = events.send(CommandEvent::FrontEnded).await;
            end_command(command, grace).await;
            let _ = events.send(CommandEvent::Ended(CommandEnd::Killed(9))).await;
            std::future::pending::<i32>().await
        };
        let finished = async {
            let status = running.wait().await.exit_status();
            let _ = link.get_ref().say(&Word::Outcome { status, signal: 0 });
            status
        };
        smol::future::or(finished, smol::future::or(pass_events, pass_orders)).await
    }
}

/// Ends a command that nobody else is left to end, and what descends from it.
async fn end_command(command: Option<tree::Process>, grace: Duration) {
    let Some(command) = command else { return };
    let kill_at = Instant::now() + grace;
    let all = |command: &tree::Process| {
        let root = nix::unistd::Pid::from_raw(command.pid);
        [*command].into_iter().chain(tree::descendants(root, &[])).collect::<Vec<_>>()
    };
    // Looked up once: when the command has ended, its children are no longer found under it.
    let processes = all(&command);
    processes.iter().for_each(|process| {
        tree::signal(process, 15);
        tree::signal(process, 18);
    });
    while processes.iter().any(tree::is_alive) {
        if Instant::now() >= kill_at {
            processes.iter().for_each(|process| {
                tree::signal(process, 9);
            });
        }
        async_io::Timer::after(LOOK).await;
    }
}

/// What became of looking at the parent.
pub enum Parent {
    /// Nobody asked for it.
    NotWatched,
    /// Its pidfd, readable when it has ended.
    Watched(OwnedFd),
    /// It has ended already.
    Gone,
}

/// Takes hold of the process that `--exit-with-parent` means. Errors: this system has no pidfds.
/// Source: pidfd_open(2), which opens the process and not the thread that forked us.
pub fn parent(wanted: ExitWithParent) -> io::Result<Parent> {
    let pid = match wanted {
        ExitWithParent::No => return Ok(Parent::NotWatched),
        ExitWithParent::Pid(pid) => pid.cast_signed(),
        ExitWithParent::Parent => getppid().as_raw(),
    };
    if wanted != ExitWithParent::Parent && getppid().as_raw() != pid {
        return Ok(Parent::Gone);
    }
    let Some(process) = Pid::from_raw(pid) else {
        return Err(io::Error::other("the parent process is outside this pid namespace and cannot be watched"));
    };
    let pidfd = match pidfd_open(process, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(Parent::Gone),
        Err(error) => return Err(error.into()),
    };
    // If it ended before it was opened, the number may be another's by now, but then we have another parent.
    if getppid().as_raw() != pid || is_adopted(pid) {
        return Ok(Parent::Gone);
    }
    Ok(Parent::Watched(pidfd))
}

/// Whether `parent` cannot be who made us: a process shares its maker's session unless it has left it.
fn is_adopted(parent: i32) -> bool {
    use nix::unistd::{Pid, getsid};
    let parent = getsid(Some(Pid::from_raw(parent)));
    match (getsid(None), parent) {
        (Ok(own), Ok(parents)) => own != Pid::this() && own != parents,
        // Outside what we may look at: no reason to think so.
        _ => false,
    }
}

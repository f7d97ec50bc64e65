//! The process that serves: configures, listens, says that it is ready, waits for the engine, cleans up.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use async_io::Async;
use nbdcaptive_actors::child_supervisor::{Captor, CommandEvent, CommandOrder};
use nbdcaptive_actors::transport::Descriptors;
use nbdcaptive_actors::{Cause, CommandEnd, Handle, Running, Server, watch_process};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::getppid;
use smol::Executor;

use crate::captive::command::Errand;
use crate::captive::environment::Environment;
use crate::captive::link::{Link, Word};
use crate::captive::tree;
use crate::captive::uri::{Credentials, Endpoint, print_uri_text, uri};
use crate::cli::{ExitWithParent, Options, Tls, Unix};
use crate::config::{Layers, Stack};
use crate::daemon::Launcher;
use crate::identity;
use crate::inherited::{Inherited, all_signals};
use crate::kept;
use crate::listen::{self, Activation, Listening, PrivateDirectory};
use crate::report::{Report, print};
use crate::sweeper::Sweeper;
use crate::tls;
use crate::trace::Trace;
use crate::user;

/// Which process this is.
pub enum Role<'a> {
    /// The only one.
    Alone {
        /// What the caller gave us.
        inherited: &'a Inherited,
        /// Who waits to hear that the server is ready, if it goes into the background.
        daemon: Option<Launcher>,
        /// Sockets to listen on that came with the process.
        activated: Activation,
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
    let status = match prepare(options, role) {
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
    };
    kept::end();
    status
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
    leftovers: Leftovers,
    daemon: Option<Launcher>,
    signals: Meaning,
    /// A message asks for the end.
    asked: Receiver<()>,
}

/// What certain signals mean to this process.
#[derive(Clone, Copy)]
struct Meaning {
    hangup_is_ignored: bool,
    /// [`PARENT_ENDED`] does.
    parent_signals: bool,
}

/// What is to be removed at the end, whatever end it is.
#[derive(Clone)]
struct Leftovers {
    options: Options,
    private: Option<PrivateDirectory>,
}

impl Leftovers {
    fn sweep(&self) {
        listen::sweep(&self.options, self.private.as_ref(), std::process::id().cast_signed());
    }
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
    report.debug(identity::package());

    // First, so that a parent that ends while a plugin takes its time is seen.
    let (parent, captivity, private, daemon, activated, hangup_is_ignored) = match role {
        Role::Alone { inherited, daemon, activated } => {
            let parent = match parent(options.exit_with_parent, &report) {
                Ok(Parent::Gone) => return Ok(None),
                Ok(parent) => parent,
                Err(error) => return Err(system(format!("--exit-with-parent: {error}"))),
            };
            let private = match options.unix {
                Some(Unix::Private) => Some(PrivateDirectory::choose().map_err(|error| system(error.to_string()))?),
                _ => None,
            };
            (parent, None, private, daemon, activated, inherited.ignores_hangup())
        }
        Role::Captive { link, parent, private } => {
            let parent = parent.map_or(Parent::NotWatched, Parent::Watched);
            (parent, Some(Captivity { link }), private, None, Activation::default(), false)
        }
    };
    if let Parent::Watched(parent) = &parent {
        kept::give_up_with(parent.try_clone().map_err(|error| system(format!("--exit-with-parent: {error}")))?);
    }
    // Before anything else can write to what is the client's.
    let client = match options.single {
        true => Some(take_stdio().map_err(&system)?),
        false => None,
    };

    let config = |error: crate::layer::ConfigError| Failure { report: report.clone(), line: error.0, is_config: true };
    // Before anything is made, and while we may still read the keys.
    let secure = tls::offer(options, &report).map_err(&system)?;
    let mut layers = Layers::find(options).map_err(config)?;
    let (flags, warnings) = layers.set_debug_flags(&options.debug_flags);
    warnings.iter().for_each(|warning| report.warn(warning));
    if options.verbose {
        layers.trace(Trace::new(&flags, &report));
        if flags.environ != 0 {
            show_environment(&report, &activated.told);
        }
    }
    report.debug(format_args!("service mode: {}", service_mode(options, !activated.sockets.is_empty())));
    report.debug(format_args!("request processing: {}", way(&layers)));
    let Stack { exports, lifetime, plugin, after_fork, asked } =
        layers.configure(&options.parameters).map_err(config)?;
    let report = report.clone().about_plugin(plugin);

    if let Some(event) = &lifetime.already {
        report.say(format_args!("nothing to serve: {event}"));
        if let Some(Captivity { link }) = &captivity {
            // Status 0 without a word would be taken for a failure. Without a guardian nobody wants to know.
            let _ = link.say(&Word::Outcome { status: 0, signal: 0 });
        }
        daemon.into_iter().for_each(Launcher::dismiss);
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
    let leftovers = Leftovers { options: options.clone(), private: private.clone() };
    let mut errand = Errand::default();
    let start = || -> Result<Source, String> {
        if options.swap {
            lock_memory(options)?;
            report.debug("mlockall done");
        }
        // Its thread is the first of several, so it is known now if there is no room for them.
        start_reactor()?;
        let source = match client {
            Some((stdin, stdout)) => Source::One(
                Descriptors::on_reactor(stdin, stdout).map_err(|error| format!("stdin and stdout: {error}"))?,
            ),
            None if !activated.sockets.is_empty() => {
                report.debug(format_args!("using socket activation, nr_socks = {}", activated.sockets.len()));
                Source::Many(Listening { sockets: activated.sockets, place: String::new(), port: None, unix: None })
            }
            None => {
                let listening = listen::start(options, private.as_ref())?;
                let environment = environment(options, &secure, &listening);
                report.debug(format_args!("bound to {}", listening.place));
                report.debug(format_args!("NBD URI: {}", String::from_utf8_lossy(&environment.uri)));
                errand.prelude = environment.prelude();
                if options.print_uri {
                    let text = print_uri_text(&environment.uri);
                    if captivity.is_some() {
                        // A captive server has no stdout: it is the command's.
                        errand.print = text;
                    } else {
                        // Clients may know where we are all the same.
                        let _ = print(&text);
                    }
                }
                if let Some(run) = &options.run {
                    errand.fits(run)?;
                }
                Source::Many(listening)
            }
        };
        if let Some(path) = &options.pidfile {
            listen::write_pidfile(path)?;
            report.debug(format_args!("written pidfile {}", path.display()));
        }
        if user::is_wanted(options) {
            user::change(options)?;
            for (what, name) in [("group", &options.group), ("user", &options.user)] {
                name.iter().for_each(|name| report.debug(format_args!("changed {what} to {name}")));
            }
        }
        for step in after_fork {
            step().map_err(|error| format!("error: {error}"))?;
        }
        Ok(source)
    };
    let source = match start() {
        Ok(source) => source,
        Err(line) => {
            leftovers.sweep();
            sweeper.into_iter().for_each(Sweeper::sweep);
            return Err(system(line));
        }
    };
    // A background server's lines go elsewhere once the launcher has left; up to then they are the launcher's.
    let log = if daemon.is_some() { report.clone().in_background() } else { report.clone() };

    let mut server = Server::new(exports)
        .read_only(options.read_only)
        .oldstyle(options.oldstyle)
        .max_clients(options.max_clients.map(|limit| limit.get() as usize))
        .structured_replies(!options.no_structured_replies)
        .extended_headers(!options.no_extended_headers)
        .meta_contexts(!options.no_meta_contexts)
        .mask_handshake(options.mask_handshake as u16)
        .handshake_timeout(options.timeout)
        .keepalive(options.keepalive)
        .threads(options.threads.map_or(16, |count| count.get() as usize))
        .workers_per_core()
        .spin(options.spin)
        .exit_last(lifetime.exit_last)
        .grace_period(options.grace_period)
        .drain_timeout(options.drain_timeout)
        .log(Arc::new(log))
        .at_end({
            let leftovers = leftovers.clone();
            move || leftovers.sweep()
        });
    if let Some(acceptor) = secure.acceptor {
        server = server.tls(acceptor, secure.mode == Tls::Require);
    }
    match source {
        Source::One(client) => server = server.serve_one(client),
        Source::Many(listening) => {
            for socket in listening.sockets {
                server = server.listen(socket);
            }
            if let Some(socket) = listening.unix {
                // Whoever connects from now on finds nothing, rather than a socket at which nobody answers.
                server = server.before_refusing(move || socket.unlink());
            }
        }
    }
    for event in lifetime.exit_when {
        server = server.exit_when(event);
    }
    let signals = Meaning { hangup_is_ignored, parent_signals: matches!(parent, Parent::Signals) };
    match parent {
        Parent::Watched(ended) => server = server.parent(ended),
        Parent::Polled(pid) => server = server.parent_polled(move || getppid().as_raw() != pid),
        Parent::NotWatched | Parent::Signals | Parent::Gone => {}
    }
    Ok(Some(Ready { options, report, server, errand, captivity, sweeper, leftovers, daemon, signals, asked }))
}

/// Where clients come from, in nbdkit's words.
fn service_mode(options: &Options, is_activated: bool) -> &'static str {
    match options {
        _ if is_activated => "socket activation",
        Options { single: true, .. } => "listen stdin",
        Options { unix: Some(_), .. } => "unix socket",
        Options { vsock: true, .. } => "vsock",
        _ => "TCP/IP",
    }
}

/// The layers on the way of a request, in nbdkit's words.
fn way(layers: &Layers) -> String {
    let layers: Vec<_> = layers.about().collect();
    let last = layers.len() - 1;
    let place = |index| match index {
        0 => ", first",
        index if index == last => ", last",
        _ => "",
    };
    let shown = layers.iter().enumerate().map(|(at, (kind, about))| format!("{} ({kind}{})", about.name, place(at)));
    shown.collect::<Vec<_>>().join(" -> ")
}

/// Below this limit of locked memory a server is not started with `--swap`: it begins with some 80 MiB of address space, all of
/// which counts, and takes more with each thread and client.
const LEAST_LOCKED: u64 = 512 << 20;

/// Locks all memory, present and future (`--swap`). Errors: a line for people.
fn lock_memory(options: &Options) -> Result<(), String> {
    use nix::sys::mman::{MlockAllFlags, mlockall};
    let error =
        |why: &str| format!("--swap: mlockall: {why}; start as root, or raise the limit of locked memory (ulimit -l)");
    // Only some may raise it. It holds for the user that this process may become, too.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    let (limit, _) = getrlimit(Resource::RLIMIT_MEMLOCK).map_err(|errno| error(errno.desc()))?;
    if limit < LEAST_LOCKED && !may_lock_any_memory(options) {
        // Later there would be no memory to be had, in the midst of anything.
        return Err(error(&format!(
            "no more than {} KiB may be locked, and {} KiB may be needed",
            limit >> 10,
            LEAST_LOCKED >> 10
        )));
    }
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE).map_err(|errno| error(errno.desc()))
}

/// Whether this process is above the limit of locked memory, and will be as the user that it becomes.
fn may_lock_any_memory(options: &Options) -> bool {
    let has_capability = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::IPC_LOCK));
    has_capability && options.user.as_deref().is_none_or(user::is_root)
}

/// `-D nbdkit.environ=1`: what the caller gave, with the variables of socket activation that are gone by now.
fn show_environment(report: &Report, told: &[(&'static str, OsString)]) {
    let told = told.iter().map(|(name, value)| (name.into(), value.clone()));
    for (name, value) in told.chain(std::env::vars_os()) {
        report.debug(format_args!("{}={}", name.to_string_lossy(), value.to_string_lossy()));
    }
}

/// How many descriptors must be left once the reactor has its own: signals, a socket to listen on, a client, a worker for it
/// (two), and two for what a device opens.
const LEAST_DESCRIPTORS: usize = 7;

/// Starts async-io's reactor, which has a thread and descriptors of its own and panics where it cannot have them. Errors: a line
/// for people; also where it leaves too few descriptors.
fn start_reactor() -> Result<(), String> {
    let failed = |error: io::Error| format!("cannot start: {error}");
    let watched = io::pipe().map_err(failed)?.0;
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    // The descriptors on this thread, where that can be caught, and only then the reactor's own thread.
    let started = std::panic::catch_unwind(|| Async::new(watched).map(|_| async_io::block_on(async {})));
    std::panic::set_hook(hook);
    let shortage = || "cannot start: there is no thread or descriptor to be had for the reactor".to_owned();
    started.map_err(|_| shortage())?.map_err(failed)?;
    let spare = std::iter::repeat_with(|| io::stderr().as_fd().try_clone_to_owned()).take(LEAST_DESCRIPTORS);
    let spare = spare.collect::<io::Result<Vec<_>>>();
    spare.map(drop).map_err(|error| {
        format!("cannot start: {error}; a server and its first client need {LEAST_DESCRIPTORS} more (ulimit -n)")
    })
}

/// Where clients come from.
enum Source {
    One(Descriptors),
    Many(Listening),
}

/// Takes stdin and stdout for the client of `-s`, and puts /dev/null there. Errors: one was closed, or there are no more
/// descriptors; a line for people. Source: nbdkit server/main.c `switch_stdio`.
fn take_stdio() -> Result<(OwnedFd, OwnedFd), String> {
    let attempt = || -> io::Result<(OwnedFd, OwnedFd)> {
        // What a caller hands over survives an exec; what does not was put there by us, because it was closed.
        let ours = |fd| fcntl(fd, FcntlArg::F_GETFD).is_ok_and(|flags| flags & FdFlag::FD_CLOEXEC.bits() != 0);
        let (stdin, stdout) = (io::stdin(), io::stdout());
        if ours(stdin.as_fd()) || ours(stdout.as_fd()) {
            return Err(Errno::EBADF.into());
        }
        let taken = (stdin.as_fd().try_clone_to_owned()?, stdout.as_fd().try_clone_to_owned()?);
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(&null)?;
        Ok(taken)
    };
    attempt().map_err(|error| format!("expecting stdin/stdout to be opened: {error}"))
}

fn environment(options: &Options, secure: &tls::Offer, listening: &Listening) -> Environment {
    let unix = listening.unix.as_ref().map(|socket| socket.path.clone());
    let endpoint = match &unix {
        Some(path) => Endpoint::Unix(path.clone()),
        None if options.vsock => Endpoint::Vsock { port: listening.port.clone() },
        None => Endpoint::Tcp { port: listening.port.clone() },
    };
    let keys = options.tls_psk.as_deref().zip(secure.user.as_deref());
    let credentials = Credentials::of(options.tls_certificates.as_deref(), keys);
    Environment {
        uri: uri(&endpoint, &options.export_name, secure.mode, credentials),
        exportname: options.export_name.clone(),
        port: listening.port.clone(),
        unixsocket: unix,
        tls: secure.mode,
        tls_certificates: options.tls_certificates.clone(),
        tls_psk: options.tls_psk.clone(),
    }
}

impl Ready<'_> {
    fn serve(self) -> i32 {
        let Ready {
            options,
            report,
            mut server,
            errand,
            captivity,
            sweeper,
            leftovers,
            daemon,
            signals: meaning,
            asked,
        } = self;
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
            if let Some(launcher) = daemon {
                launcher.detach(options.verbose)?;
            }
            let handle = running.handle();
            let _asked = executor.spawn({
                let handle = handle.clone();
                async move {
                    if asked.recv().await.is_ok() {
                        handle.shut_down(Cause::Requested);
                    }
                }
            });
            // Both live as long as the server: dropped with these bindings.
            let child = sweeper.as_ref().map(Sweeper::pid);
            let _signals = executor.spawn(pass_signals(signals, handle, meaning, child));
            let status = match bridge {
                Some(bridge) => bridge.serve(&running, &errand, options.grace_period).await,
                None => running.wait().await.exit_status(),
            };
            io::Result::Ok(status)
        }));
        // With it go sockets that nothing has closed yet, so that nobody seems to answer there.
        drop(executor);
        let status = ended.unwrap_or_else(|error| {
            leftovers.sweep();
            // The launcher is still there, if there is one.
            report.error(format_args!("cannot serve: {error}"));
            1
        });
        // Another user may not remove what the caller made; the sweeper is still the caller's.
        let swept = !user::is_wanted(options);
        sweeper.into_iter().for_each(|sweeper| if swept { sweeper.dismiss() } else { sweeper.sweep() });
        status
    }
}

/// The signals of this process, to be read.
fn signals() -> io::Result<Async<SignalFd>> {
    Async::new_nonblocking(SignalFd::with_flags(&all_signals(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// Turns signals into messages to the Coordinator. Others do to this process what they do by default.
async fn pass_signals(signals: Async<SignalFd>, handle: Handle, meaning: Meaning, sweeper: Option<nix::unistd::Pid>) {
    while signals.readable().await.is_ok() {
        while let Ok(Some(info)) = signals.get_ref().read_signal() {
            match info.ssi_signo as i32 {
                1 if meaning.hangup_is_ignored => {}
                PARENT_ENDED if meaning.parent_signals => handle.shut_down(Cause::ParentEnded),
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
                    Word::SignalAgain(number) => CommandEvent::SignalAgain(number),
                    Word::CommandEnded(end) => CommandEvent::Ended(end),
                    Word::FrontEnded => CommandEvent::FrontEnded,
                    Word::ParentEnded => CommandEvent::ParentEnded,
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
    let root = nix::unistd::Pid::from_raw(command.pid);
    let mut processes = vec![command];
    // Nobody adopts for us what loses its parent, so what is forked while we look would be lost: they are stopped first, from
    // the top down, until there are no new ones. Each round finds at least one; it is bounded against one that cannot be
    // stopped.
    tree::signal(&command, 19);
    for _ in 0..100 {
        let mut new = tree::descendants(root, &[]);
        new.retain(|found| !processes.iter().any(|known| known.is_same(found)));
        if new.is_empty() {
            break;
        }
        new.iter().for_each(|process| {
            tree::signal(process, 19);
        });
        processes.extend(new);
    }
    for number in [15, 18] {
        processes.iter().for_each(|process| {
            tree::signal(process, number);
        });
    }
    let mut rounds = tree::Rounds::new();
    while processes.iter().any(tree::is_alive) {
        if Instant::now() >= kill_at {
            // What it has started in order to end is below it as long as it lives.
            processes.extend(tree::descendants(root, &[]));
            processes.iter().for_each(|process| {
                tree::signal(process, 9);
            });
        }
        // No longer than until they are to be killed.
        let left = kill_at.saturating_duration_since(Instant::now());
        let wait = rounds.wait();
        async_io::Timer::after(if left.is_zero() { wait } else { wait.min(left) }).await;
    }
}

/// What became of looking at the parent.
pub enum Parent {
    /// Nobody asked for it.
    NotWatched,
    /// Readable when it has ended.
    Watched(OwnedFd),
    /// It has ended when this is no longer the number of our parent. Only its child can see that.
    Polled(i32),
    /// [`PARENT_ENDED`] comes when it has ended. Only to its child.
    Signals,
    /// It has ended already.
    Gone,
}

/// How often a parent is looked at that cannot be watched.
pub const ASK: Duration = Duration::from_millis(50);
/// `SIGPWR`, which nobody else sends to anything but init.
pub const PARENT_ENDED: i32 = 30;

/// Takes hold of the process that `--exit-with-parent` means. To be called by that process's child itself. Errors: there are
/// no more descriptors. Source: pidfd_open(2), which opens the process and not the thread that forked us.
pub fn parent(wanted: ExitWithParent, report: &Report) -> io::Result<Parent> {
    let pid = match wanted {
        ExitWithParent::No => return Ok(Parent::NotWatched),
        ExitWithParent::Pid(pid) => pid.cast_signed(),
        ExitWithParent::Parent => getppid().as_raw(),
    };
    if wanted != ExitWithParent::Parent && getppid().as_raw() != pid {
        return Ok(Parent::Gone);
    }
    #[cfg(target_os = "linux")]
    if pid == 0 {
        // It has no number here. The signal is that of the thread that forked us, which is better than nothing.
        report.debug("the parent process is outside this pid namespace and is watched by a signal");
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::POWER))?;
        return Ok(Parent::Signals);
    }
    let watched = watch(pid, "the parent process", report)?;
    // If it ended before it was opened, the number may be another's by now, but then we have another parent.
    if getppid().as_raw() != pid || is_adopted(pid) {
        return Ok(Parent::Gone);
    }
    Ok(watched.map_or(Parent::Polled(pid), Parent::Watched))
}

/// A descriptor that is readable when a process has ended. `None` where there are none here, which is said under `-v` with
/// `what` is not watched; or where there is no such process, which the caller finds out by itself.
/// Errors: there are no more descriptors.
pub fn watch(pid: i32, what: &str, report: &Report) -> io::Result<Option<OwnedFd>> {
    watch_process(pid).or_else(|error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM) => Err(error),
        // Old kernels know no pidfds, and some sandboxes allow none.
        _ => {
            report.debug(format_args!("pidfd_open: {error}; {what} is looked at every {ASK:?} instead"));
            Ok(None)
        }
    })
}

/// Whether `parent` cannot be who made us: a process shares its maker's session unless it has left it.
fn is_adopted(parent: i32) -> bool {
    use nix::unistd::{Pid, getpgid, getpgrp, getsid};
    let maker = Some(Pid::from_raw(parent));
    match (getsid(None), getsid(maker)) {
        (Ok(own), Ok(other)) if own != other => own != Pid::this(),
        // All that live in a small container or virtual machine may be in the session of pid 1, which adopts. A process
        // shares its maker's group, too, unless it leads one; or unless its maker has a terminal and is a shell that put it
        // into a pipeline.
        (Ok(_), Ok(_)) if parent == 1 => {
            let has_terminal = || tree::find(parent).is_none_or(|parent| parent.has_terminal);
            getpgrp() != Pid::this() && getpgid(maker).is_ok_and(|group| group != getpgrp()) && !has_terminal()
        }
        // Outside what we may look at: no reason to think so.
        _ => false,
    }
}

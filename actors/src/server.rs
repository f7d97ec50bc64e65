//! Puts the actors together: what an embedder configures, starts and waits for.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use async_channel::Receiver;
use async_io::Async;
use smol::lock::Semaphore;
use smol::{Executor, Task};

use crate::backend::Gates;
use crate::buffers::Buffers;
use crate::child_supervisor::{self, Captor};
use crate::coordinator::{Cause, Coordinator, Handle, Limits, Message, Outcome};
use crate::device::Exports;
use crate::exit_policy::{self, Event};
use crate::listener::{Listener, Place, Threads};
use crate::log::{Log, Silent, Speaker};
use crate::parent_watcher::{self, Parent};
use crate::session::{self, Common, Rules, SessionId, Surroundings, Tls, Visit};
use crate::tls::Acceptor;
use crate::transport::Transport;
use crate::world::World;

/// A server that is not running yet.
pub struct Server {
    exports: Arc<dyn Exports>,
    sockets: Vec<OwnedFd>,
    arrivals: Option<Receiver<Box<dyn Transport>>>,
    max_clients: Option<usize>,
    only: Option<Box<dyn Transport>>,
    rules: Rules,
    limits: Limits,
    log: Arc<dyn Log>,
    workers: Option<Threads>,
    spin: Duration,
    keepalive: bool,
    exit_last: bool,
    events: Vec<Event>,
    parent: Option<Parent>,
    captor: Option<Captor>,
    before_refusing: Option<Hook>,
    at_end: Option<Hook>,
    world: World,
}

/// Something short to do once.
pub(crate) type Hook = Box<dyn FnOnce() + Send>;

impl Server {
    /// Serves `exports`, to nobody yet: see [`Server::listen`].
    pub fn new(exports: Arc<dyn Exports>) -> Server {
        Server {
            exports,
            sockets: Vec::new(),
            arrivals: None,
            max_clients: None,
            only: None,
            rules: Rules {
                read_only: false,
                oldstyle: false,
                structured_replies: true,
                extended_headers: true,
                meta_contexts: true,
                handshake_flags: u16::MAX,
                handshake_timeout: None,
                threads: 16,
                tls: None,
            },
            limits: Limits { grace: Duration::from_secs(5), drain: Duration::from_secs(30) },
            log: Arc::new(Silent),
            workers: None,
            spin: Duration::ZERO,
            keepalive: false,
            exit_last: false,
            events: Vec::new(),
            parent: None,
            captor: None,
            before_refusing: None,
            at_end: None,
            world: World::default(),
        }
    }

    /// Accepts clients from `socket`, a listening stream socket of any family. May be called several times.
    pub fn listen(mut self, socket: impl Into<OwnedFd>) -> Server {
        self.sockets.push(socket.into());
        self
    }

    /// Serves clients that somebody else has accepted, over whatever they came: each is served on the executor that is given to
    /// [`Server::start`]. A closed channel means that no more will come this way. What is in the channel when no more clients
    /// are taken is dropped with it.
    pub fn clients(mut self, arrivals: Receiver<Box<dyn Transport>>) -> Server {
        self.arrivals = Some(arrivals);
        self
    }

    /// How many clients may be connected at a time; more are closed at once, and a line in the log says so. Without a limit, the
    /// default, it is the system's of open files: more then wait to be accepted.
    pub fn max_clients(mut self, limit: Option<usize>) -> Server {
        self.max_clients = limit;
        self
    }

    /// Runs in a simulation: with its time and its threads.
    #[cfg(feature = "simulation")]
    pub fn simulated(mut self, simulation: &Arc<crate::simulation::Simulation>) -> Server {
        self.world.simulation = Some(Arc::clone(simulation));
        self
    }

    /// Serves this one client instead of listening, and ends when it has left: with [`Cause::ClientGone`].
    pub fn serve_one(mut self, transport: impl Transport + 'static) -> Server {
        self.only = Some(Box::new(transport));
        self
    }

    /// Takes no writes.
    pub fn read_only(mut self, yes: bool) -> Server {
        self.rules.read_only = yes;
        self
    }

    /// Speaks the oldstyle handshake, without options: the client gets the export with the empty name.
    pub fn oldstyle(mut self, yes: bool) -> Server {
        self.rules.oldstyle = yes;
        self
    }

    /// Offers structured replies (the default). Without them there are no extended headers either.
    pub fn structured_replies(mut self, yes: bool) -> Server {
        self.rules.structured_replies = yes;
        self
    }

    /// Offers extended headers (the default), if structured replies are offered.
    pub fn extended_headers(mut self, yes: bool) -> Server {
        self.rules.extended_headers = yes;
        self
    }

    /// Offers metadata contexts (the default).
    pub fn meta_contexts(mut self, yes: bool) -> Server {
        self.rules.meta_contexts = yes;
        self
    }

    /// Offers only those of the handshake flags.
    pub fn mask_handshake(mut self, flags: u16) -> Server {
        self.rules.handshake_flags = flags;
        self
    }

    /// Lets clients make the stream secure by `acceptor`; where it is required, they can do nothing else before. Not offered by
    /// default, nor to clients of the oldstyle handshake, which has no way to ask for it.
    pub fn tls(mut self, acceptor: Arc<dyn Acceptor>, is_required: bool) -> Server {
        self.rules.tls = Some(Tls { acceptor, is_required });
        self
    }

    /// Drops a client that takes longer than this to negotiate. Without a limit by default.
    pub fn handshake_timeout(mut self, limit: Option<Duration>) -> Server {
        self.rules.handshake_timeout = limit;
        self
    }

    /// How many requests of one client may wait for the device at a time, on as many threads. Default 16.
    pub fn threads(mut self, count: usize) -> Server {
        self.rules.threads = count;
        self
    }

    /// Runs sessions on `count` threads of the server's own, each with an epoll of its own, started with the first client:
    /// about half the system calls of a session on a plain executor. With 0, the default, sessions run on the executor that
    /// is given to [`Server::start`].
    pub fn workers(mut self, count: usize) -> Server {
        self.workers = (count > 0).then_some(Threads::Count(count));
        self
    }

    /// As [`Server::workers`], with as many threads as this process has cores when the first client comes.
    pub fn workers_per_core(mut self) -> Server {
        self.workers = Some(Threads::PerCore);
        self
    }

    /// Lets a worker that has nothing to do look for requests this long before it sleeps. With 50 microseconds a client that
    /// waits for each reply is served about twice as fast, from another core, for one core's time while it is active.
    /// Nothing by default; without workers it means nothing.
    pub fn spin(mut self, limit: Duration) -> Server {
        self.spin = limit;
        self
    }

    /// Asks the system to notice clients that vanished (`SO_KEEPALIVE`).
    pub fn keepalive(mut self, yes: bool) -> Server {
        self.keepalive = yes;
        self
    }

    /// Ends when the last client that reached the transmission phase has left.
    pub fn exit_last(mut self, yes: bool) -> Server {
        self.exit_last = yes;
        self
    }

    /// Takes no more clients once `event` is done, and ends when the last has left. `event` says in a line what has happened;
    /// it runs on the server's executor and must not block. May be called several times; any of them counts.
    pub fn exit_when(mut self, event: Event) -> Server {
        self.events.push(event);
        self
    }

    /// Ends when the process behind `ended` has: see [`crate::watch_process`].
    pub fn parent(mut self, ended: OwnedFd) -> Server {
        self.parent = Some(Parent::Watched(ended));
        self
    }

    /// Ends soon after `has_ended` says so, which is asked again and again: for systems where a process cannot be watched.
    /// It must not block.
    pub fn parent_polled(mut self, has_ended: impl FnMut() -> bool + Send + 'static) -> Server {
        self.parent = Some(Parent::Polled(Box::new(has_ended)));
        self
    }

    /// Is captive of a command, which somebody else holds.
    pub fn captor(mut self, captor: Captor) -> Server {
        self.captor = Some(captor);
        self
    }

    /// How long a command may take after it was told to end, before it is killed. Default 5 seconds.
    pub fn grace_period(mut self, period: Duration) -> Server {
        self.limits.grace = period;
        self
    }

    /// How long requests that are under way at the end may take. Default 30 seconds.
    pub fn drain_timeout(mut self, limit: Duration) -> Server {
        self.limits.drain = limit;
        self
    }

    /// Called once, before the sockets close, when no more clients are taken: to remove the names by which they are found.
    /// Must not block.
    pub fn before_refusing(mut self, hook: impl FnOnce() + Send + 'static) -> Server {
        self.before_refusing = Some(Box::new(hook));
        self
    }

    /// Called once, when everything has ended and before [`Running::wait`] returns. Must not block.
    pub fn at_end(mut self, hook: impl FnOnce() + Send + 'static) -> Server {
        self.at_end = Some(Box::new(hook));
        self
    }

    /// Where lines for people go. Nowhere by default.
    pub fn log(mut self, log: Arc<dyn Log>) -> Server {
        self.log = log;
        self
    }

    /// Starts every actor on `executor`, which somebody must run. Clients that have connected already are served.
    ///
    /// Errors: a socket cannot be watched, or there is no room for a thread.
    pub fn start(self, executor: &Arc<Executor<'static>>) -> io::Result<Running> {
        // Now, when it can be said that there is none; devices cannot do without.
        self.world.start()?;
        let speaker = Speaker::new(self.log);
        let sockets = self.sockets.into_iter().map(Async::new).collect::<io::Result<Vec<_>>>()?;
        let gates = Gates::new(self.exports.thread_model(), self.world.clone());
        let exports = Arc::clone(&self.exports);
        let world = self.world;
        let (mut coordinator, ends) =
            Coordinator::new(exports, self.limits, speaker.clone(), self.captor.is_some(), world.clone());
        let mut tasks = Vec::new();
        let command = self.captor.map(|captor| {
            let (handle, actor) = child_supervisor::new(captor, ends.handle.clone());
            tasks.push(executor.spawn(actor));
            handle
        });
        let policy = (self.exit_last || !self.events.is_empty()).then(|| {
            let (handle, actor) = exit_policy::new(self.exit_last, self.events, ends.handle.clone(), world.clone());
            tasks.push(executor.spawn(actor));
            handle
        });
        if let Some(parent) = self.parent {
            tasks.push(executor.spawn(parent_watcher::run(parent, ends.handle.clone(), world.clone())));
        }
        coordinator.introduce(command, policy, self.at_end);
        let common = Common {
            rules: self.rules,
            exports: self.exports,
            gates,
            coordinator: ends.handle.clone(),
            orders: ends.orders,
            speaker,
            world,
            room: Arc::default(),
        };
        let surroundings = Surroundings { common: Arc::new(common), buffers: Buffers::default() };
        if let Some(transport) = self.only {
            let id = SessionId(1);
            let visit = Visit::begin(id, &surroundings, None);
            // Nobody else will come.
            ends.handle.tell(Message::ListenerClosed);
            tasks.push(executor.spawn(session::run_only(visit, transport, surroundings)));
            tasks.push(executor.spawn(coordinator.run()));
            return Ok(Running { handle: ends.handle, outcome: ends.outcome, _tasks: tasks });
        }
        let place = match self.workers {
            None => Place::Executor,
            Some(threads) => Place::Workers { threads, spin: self.spin, workers: None },
        };
        let listener = Listener {
            sockets,
            arrivals: self.arrivals.map(Box::pin),
            seats: self.max_clients.map(|limit| Arc::new(Semaphore::new(limit))),
            executor: Arc::downgrade(executor),
            place,
            surroundings,
            keepalive: self.keepalive,
            before_refusing: self.before_refusing,
        };
        tasks.push(executor.spawn(listener.run()));
        tasks.push(executor.spawn(coordinator.run()));
        Ok(Running { handle: ends.handle, outcome: ends.outcome, _tasks: tasks })
    }
}

/// A server that runs. Dropped, all its actors are: connections close, nothing is drained.
#[derive(Debug)]
pub struct Running {
    handle: Handle,
    outcome: Receiver<Outcome>,
    _tasks: Vec<Task<()>>,
}

impl Running {
    /// What to ask for the end through.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits for the end: every session closed, every device flushed and closed, the exports unloaded. Dropped, the server
    /// runs on for as long as `self` lives.
    pub async fn wait(&self) -> Outcome {
        // The Coordinator always tells, unless it panicked.
        self.outcome.recv().await.unwrap_or_else(|_| {
            let why = "the Coordinator panicked".to_owned();
            Outcome { cause: Cause::Fatal(why.clone()), command: None, failure: Some(why) }
        })
    }
}

//! The one place where the server's end is decided: every reason to end arrives here as a message, and only from here go
//! orders out.
//!
//! `State` is the decision alone: messages in, orders out, no clock and no channel. The actor round it carries the orders
//! out. The phase only moves forward; the first cause is kept; a later one may make the end sooner, never later.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;
use std::future::{pending, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use smol::future::or;
use smol::stream::Stream;

use crate::child_supervisor;
use crate::device::Exports;
use crate::exit_policy;
use crate::log::Speaker;
use crate::repeats::{Heard, Repeats, Witness};
use crate::server::Hook;
use crate::session::SessionId;
use crate::world::{Timer, World};

/// Why a server ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The command has ended.
    CommandEnded(CommandEnd),
    /// Somebody sent this signal.
    Signal(i32),
    /// The process that the server was to live as long as is gone.
    ParentEnded,
    /// The processes that hold the command and its status are gone.
    FrontEnded,
    /// The last client has left.
    LastClientLeft,
    /// The only client of a server that serves one has left.
    ClientGone {
        /// It negotiated, and got all that it was sent.
        served: bool,
    },
    /// Something that was waited for has happened.
    Event(String),
    /// The embedding program or a device asked for it.
    Requested,
    /// Something without which the server cannot go on has failed.
    Fatal(String),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::CommandEnded(end) => write!(f, "the command {end}"),
            Cause::Signal(number) => write!(f, "received signal {number}"),
            Cause::ParentEnded => f.write_str("the parent process has ended"),
            Cause::FrontEnded => f.write_str("the process that waits for the command has ended"),
            Cause::LastClientLeft => f.write_str("the last client has left"),
            Cause::ClientGone { served: true } => f.write_str("the client has left"),
            Cause::ClientGone { served: false } => f.write_str("the client has left without having been served"),
            Cause::Event(event) => f.write_str(event),
            Cause::Requested => f.write_str("a shutdown was requested"),
            Cause::Fatal(why) => f.write_str(why),
        }
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CommandEnd {
    /// With this status, 0 to 255.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl fmt::Display for CommandEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CommandEnd::Exited(status) => write!(f, "ended with status {status}"),
            CommandEnd::Killed(signal) => write!(f, "was killed by signal {signal}"),
        }
    }
}

/// How a server ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Outcome {
    /// The first cause.
    pub cause: Cause,
    /// How the command ended, if there was one.
    pub command: Option<CommandEnd>,
    /// What went wrong on the way: a flush or close that failed, requests that were given up.
    pub failure: Option<String>,
}

impl Outcome {
    /// The exit status of a program that is this server. The one place that turns cause, command and drain into it.
    pub fn exit_status(&self) -> i32 {
        if self.cause == Cause::ParentEnded && self.failure.is_none() {
            return 0;
        }
        // A server of one client has nobody else to tell that it was of no use.
        let in_vain = self.cause == Cause::ClientGone { served: false };
        let own = i32::from(self.failure.is_some() || in_vain);
        match self.command {
            Some(CommandEnd::Killed(signal)) => 128 + signal,
            Some(CommandEnd::Exited(0)) | None => own,
            Some(CommandEnd::Exited(status)) => status,
        }
    }
}

/// What the Coordinator hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// A reason to end.
    Cause(Cause),
    /// A signal that asks for the end, which process got it, and when it was heard of, since the server's start.
    Signal { number: i32, witness: Witness, at: Duration },
    /// Another process has got such a signal a second time, as it finds.
    SignalAgain(i32),
    /// A client was accepted.
    SessionOpened(SessionId),
    /// It reached the transmission phase.
    SessionNegotiated(SessionId),
    /// It is gone. `failure`: its device could not be flushed or closed.
    SessionClosed { id: SessionId, failure: Option<String> },
    /// Nothing more will be accepted.
    ListenerClosed,
    /// A time that was asked for is over.
    Deadline(Deadline),
    /// The exports were unloaded, or could not be.
    Unloaded(Option<String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deadline {
    /// For the command, since it was told to end.
    Grace,
    /// For the sessions, since they were told to drain.
    Drain,
    /// For devices that sessions in the handshake wait for, since the drain began.
    Recall,
    /// For the same devices, since they were told that nobody wants their answers.
    GiveUp,
    /// For the sessions, since they were told to stop at once.
    Close,
}

/// What the Coordinator says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// To the Listener: accept nothing more.
    StopListening,
    /// To every Session: finish what is under way, take nothing new.
    DrainSessions,
    /// To the devices that Sessions in the handshake wait for: nobody wants the answer, come back.
    RecallHandshakes,
    /// To them once more, for the last time; and to those Sessions: leave soon, without an answer.
    GiveUpHandshakes,
    /// To every Session: stop now.
    CloseSessions,
    /// To the ChildSupervisor: pass this signal on to the command.
    SignalCommand(i32),
    /// To the ChildSupervisor: kill the command and its tree.
    KillCommand,
    /// To itself: say when this time is over.
    Arm(Deadline),
    /// To the exports: let go of everything.
    Unload,
    /// To who waits for the server.
    Finish(Outcome),
}

/// Only moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Phase {
    Serving,
    /// New clients are refused, present ones served.
    Refusing,
    Draining,
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Command {
    None,
    Running,
    Ended(CommandEnd),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Unload {
    NotYet,
    Asked,
    Done,
}

/// How long sessions may take to say that they have stopped, when they were told to at once. They wait for nothing then, so
/// one that takes longer never will.
const CLOSE: Duration = Duration::from_secs(1);

/// How long what a device was asked by clients in the handshake may take at most once the server drains. Nobody is promised an
/// answer; but what opens in time is closed in order, so what is only slow is left to finish.
const RECALL: Duration = Duration::from_secs(2);

/// `SIGTERM`, by its number, since the engine sends no signals itself.
const SIGTERM: i32 = 15;

/// What an end that has begun still waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Waits {
    command: bool,
    listener: bool,
    clients: usize,
    /// Their devices to be unloaded.
    unload: bool,
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clients = match self.clients {
            0 => None,
            1 => Some("1 client".to_owned()),
            count => Some(format!("{count} clients")),
        };
        let when = |yes: bool, what: &str| yes.then(|| what.to_owned());
        let command = when(self.command, "the command");
        let unload = when(self.unload, "the plugin to unload");
        let all: Vec<_> =
            [command, when(self.listener, "the listener"), clients, unload].into_iter().flatten().collect();
        f.write_str(if all.is_empty() { "nothing" } else { "" })?;
        f.write_str(&all.join(", "))
    }
}

/// The decision: what is known, and what follows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    phase: Phase,
    cause: Option<Cause>,
    sessions: BTreeSet<SessionId>,
    /// Those of them that reached the transmission phase: the others were promised nothing yet.
    negotiated: BTreeSet<SessionId>,
    listening: bool,
    command: Command,
    grace_armed: bool,
    killed: bool,
    closed: bool,
    /// It was closed because somebody asked a second time, and not everything had been done.
    hurried: bool,
    signals: Repeats,
    failure: Option<String>,
    unload: Unload,
}

impl State {
    /// A server that listens, with or without a command.
    pub(crate) fn new(has_command: bool) -> State {
        State {
            phase: Phase::Serving,
            cause: None,
            sessions: BTreeSet::new(),
            negotiated: BTreeSet::new(),
            listening: true,
            command: if has_command { Command::Running } else { Command::None },
            grace_armed: false,
            killed: false,
            closed: false,
            hurried: false,
            signals: Repeats::default(),
            failure: None,
            unload: Unload::NotYet,
        }
    }

    /// The first cause, once there is one.
    pub(crate) fn cause(&self) -> Option<&Cause> {
        self.cause.as_ref()
    }

    /// What is missing to the end, if it has begun.
    fn waits(&self) -> Option<Waits> {
        self.cause.as_ref()?;
        Some(Waits {
            command: self.command == Command::Running,
            listener: self.listening,
            clients: self.sessions.len(),
            unload: self.unload != Unload::Done,
        })
    }

    /// How many clients are in the handshake.
    fn handshakes(&self) -> usize {
        self.sessions.difference(&self.negotiated).count()
    }

    /// Takes one message and says what follows from it.
    pub(crate) fn on(&mut self, message: Message) -> Vec<Order> {
        let mut orders = Vec::new();
        if self.phase == Phase::Stopped {
            return orders;
        }
        match message {
            Message::Cause(cause) => self.on_cause(cause, &mut orders),
            Message::Signal { number, witness, at } => self.on_signal(number, witness, at, &mut orders),
            Message::SignalAgain(number) => {
                self.cause.get_or_insert(Cause::Signal(number));
                self.hurry(&mut orders);
            }
            Message::SessionOpened(id) => {
                self.sessions.insert(id);
            }
            Message::SessionNegotiated(id) => {
                self.negotiated.insert(id);
            }
            Message::SessionClosed { id, failure } => {
                self.sessions.remove(&id);
                self.negotiated.remove(&id);
                self.fail(failure);
            }
            Message::ListenerClosed => self.listening = false,
            Message::Deadline(Deadline::Grace) => self.kill(&mut orders),
            Message::Deadline(Deadline::Drain) => {
                if self.unload != Unload::Done {
                    let why = match (self.sessions.len(), self.unload) {
                        (0, Unload::Asked) => "the drain timed out: the plugin was not unloaded".to_owned(),
                        (left, _) => format!("the drain timed out: {left} clients were cut off"),
                    };
                    self.fail(Some(why));
                    self.close(&mut orders);
                }
            }
            // No new ones come: who is told to drain asks the device for nothing more.
            Message::Deadline(Deadline::Recall) => {
                if self.handshakes() > 0 && !self.closed {
                    orders.push(Order::RecallHandshakes);
                    orders.push(Order::Arm(Deadline::GiveUp));
                }
            }
            Message::Deadline(Deadline::GiveUp) => {
                if self.handshakes() > 0 && !self.closed {
                    orders.push(Order::GiveUpHandshakes);
                }
            }
            Message::Deadline(Deadline::Close) => {
                // Their threads hang in a device that was not to make anybody wait; or the Listener waits for such a thread.
                self.sessions.clear();
                self.listening = false;
            }
            Message::Unloaded(failure) => {
                self.unload = Unload::Done;
                self.fail(failure);
            }
        }
        self.settle(&mut orders);
        orders
    }

    fn on_cause(&mut self, cause: Cause, orders: &mut Vec<Order>) {
        self.cause.get_or_insert_with(|| cause.clone());
        match cause {
            Cause::CommandEnded(end) => {
                if self.command == Command::Running {
                    self.command = Command::Ended(end);
                }
                self.drain(orders);
            }
            // As a signal, which comes with its time.
            Cause::Signal(number) => self.end_command(number, orders),
            Cause::ParentEnded => self.end_command(SIGTERM, orders),
            Cause::FrontEnded => {
                self.end_command(SIGTERM, orders);
                self.drain(orders);
            }
            Cause::Fatal(why) => {
                self.fail(Some(why));
                self.end_command(SIGTERM, orders);
                self.drain(orders);
            }
            Cause::LastClientLeft | Cause::ClientGone { .. } | Cause::Requested => self.drain(orders),
            Cause::Event(_) => self.refuse(orders),
        }
    }

    fn on_signal(&mut self, number: i32, witness: Witness, at: Duration, orders: &mut Vec<Order>) {
        self.cause.get_or_insert(Cause::Signal(number));
        match self.signals.hear(number, witness, at) {
            Heard::First => self.end_command(number, orders),
            Heard::Again => self.hurry(orders),
            Heard::Echo => {}
        }
    }

    /// Somebody has asked a second time.
    fn hurry(&mut self, orders: &mut Vec<Order>) {
        self.kill(orders);
        self.drain(orders);
        let cuts_off = !self.negotiated.is_empty() || self.unload == Unload::Asked || self.command == Command::None;
        self.hurried |= !self.closed && self.unload != Unload::Done && cuts_off;
        self.close(orders);
    }

    /// Tells the command to end, and serves it meanwhile; without one, drains.
    fn end_command(&mut self, signal: i32, orders: &mut Vec<Order>) {
        if self.command != Command::Running {
            return self.drain(orders);
        }
        orders.push(Order::SignalCommand(signal));
        if !self.grace_armed {
            self.grace_armed = true;
            orders.push(Order::Arm(Deadline::Grace));
        }
    }

    fn kill(&mut self, orders: &mut Vec<Order>) {
        if self.command == Command::Running && !self.killed {
            self.killed = true;
            orders.push(Order::KillCommand);
        }
    }

    fn refuse(&mut self, orders: &mut Vec<Order>) {
        if self.phase < Phase::Refusing {
            self.phase = Phase::Refusing;
            orders.push(Order::StopListening);
        }
    }

    fn drain(&mut self, orders: &mut Vec<Order>) {
        self.refuse(orders);
        if self.phase < Phase::Draining {
            self.phase = Phase::Draining;
            orders.push(Order::DrainSessions);
            orders.push(Order::Arm(Deadline::Drain));
            if self.listening || self.handshakes() > 0 {
                orders.push(Order::Arm(Deadline::Recall));
            }
        }
    }

    /// Stops without waiting for anything that is under way.
    fn close(&mut self, orders: &mut Vec<Order>) {
        if !self.closed {
            self.closed = true;
            orders.push(Order::CloseSessions);
            orders.push(Order::Arm(Deadline::Close));
        }
    }

    /// Keeps the first failure.
    fn fail(&mut self, failure: Option<String>) {
        if self.failure.is_none() {
            self.failure = failure;
        }
    }

    /// Goes as far forward as the facts allow.
    fn settle(&mut self, orders: &mut Vec<Order>) {
        let nobody_left = !self.listening && self.sessions.is_empty();
        if self.phase == Phase::Refusing && !self.listening && self.negotiated.is_empty() {
            self.drain(orders);
        }
        if self.phase != Phase::Draining || !nobody_left {
            return;
        }
        match self.unload {
            // What hangs in the device would hang its unloading too.
            Unload::NotYet | Unload::Asked if self.closed => self.unload = Unload::Done,
            Unload::NotYet => {
                self.unload = Unload::Asked;
                orders.push(Order::Unload);
            }
            Unload::Asked | Unload::Done => {}
        }
        let command = match self.command {
            Command::Running => return,
            Command::Ended(end) => Some(end),
            Command::None => None,
        };
        if self.unload == Unload::Done
            && let Some(cause) = self.cause.clone()
        {
            let mut outcome = Outcome { cause, command, failure: self.failure.take() };
            // Any other status speaks for itself.
            if self.hurried && outcome.exit_status() == 0 {
                outcome.failure = Some("a second signal ended the drain".into());
            }
            self.phase = Phase::Stopped;
            orders.push(Order::Finish(outcome));
        }
    }
}

/// All that other actors hold of the Coordinator. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    // Unbounded, because telling a death must never wait. What comes in is small and counted: three messages for each
    // client, and causes.
    inbox: Sender<Message>,
    started: Instant,
    world: World,
}

impl Handle {
    pub(crate) fn tell(&self, message: Message) {
        // A Coordinator that is gone needs no more reasons.
        let _ = self.inbox.try_send(message);
    }

    /// Gives the server a reason to end. Returns at once; the end is told by [`crate::Running::wait`].
    pub fn shut_down(&self, cause: Cause) {
        self.tell(Message::Cause(cause));
    }

    /// A signal that asks for the end has come: the first ends the server orderly, the same again a quarter of a second or
    /// more later at once.
    pub fn signal(&self, number: i32) {
        self.signal_of(number, Witness::Here);
    }

    /// As [`Handle::signal`], of a signal that this process or another of the same server's has got: one that was sent to all of
    /// them is one request.
    pub(crate) fn signal_of(&self, number: i32, witness: Witness) {
        self.tell(Message::Signal { number, witness, at: self.world.now().duration_since(self.started) });
    }

    /// The second request, of a process that has made sure that it is one.
    pub(crate) fn signal_again(&self, number: i32) {
        self.tell(Message::SignalAgain(number));
    }

    /// For an actor to hold while it runs: if it panics, that is a fatal cause.
    pub(crate) fn guard(&self, actor: &'static str) -> Guard {
        Guard { actor, coordinator: self.clone() }
    }
}

pub(crate) struct Guard {
    actor: &'static str,
    coordinator: Handle,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.coordinator.shut_down(Cause::Fatal(format!("{} panicked", self.actor)));
        }
    }
}

/// What all sessions and the Listener watch. Nothing is ever sent: an order is given by closing its channel, which reaches
/// every receiver.
#[derive(Clone, Debug)]
pub(crate) struct Orders {
    stop: Receiver<Infallible>,
    drain: Receiver<Infallible>,
    recall: Receiver<Infallible>,
    give_up: Receiver<Infallible>,
    close: Receiver<Infallible>,
}

impl Orders {
    /// Ends when the Listener is to stop.
    pub(crate) async fn stopping(&self) {
        let _ = self.stop.recv().await;
    }

    /// Ends when sessions are to drain.
    pub(crate) async fn draining(&self) {
        let _ = self.drain.recv().await;
    }

    /// Ends when nobody wants an answer any more that is asked for in a handshake.
    pub(crate) async fn recalling(&self) {
        let _ = self.recall.recv().await;
    }

    /// Ends when sessions in the handshake are to leave without an answer of the device's.
    pub(crate) async fn giving_up(&self) {
        let _ = self.give_up.recv().await;
    }

    /// Ends when sessions are to stop now.
    pub(crate) async fn closing(&self) {
        let _ = self.close.recv().await;
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.drain.is_closed()
    }

    pub(crate) fn watch_draining(&self) -> Watch {
        Watch(Box::pin(self.drain.clone()))
    }
}

/// Waits for an order beside other things.
pub(crate) struct Watch(Pin<Box<Receiver<Infallible>>>);

impl Watch {
    /// Ready once the order was given, and ever after.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll_next(cx).map(|_| ())
    }
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub grace: Duration,
    pub drain: Duration,
}

/// The other ends of what the actor holds.
pub(crate) struct Ends {
    pub handle: Handle,
    pub orders: Orders,
    pub outcome: Receiver<Outcome>,
}

/// The actor: carries out what [`State`] decides.
pub(crate) struct Coordinator {
    inbox: Receiver<Message>,
    state: State,
    limits: Limits,
    exports: Arc<dyn Exports>,
    speaker: Speaker,
    command: Option<child_supervisor::Handle>,
    exit_policy: Option<exit_policy::Handle>,
    stop: Option<Sender<Infallible>>,
    drain: Option<Sender<Infallible>>,
    recall: Option<Sender<Infallible>>,
    give_up: Option<Sender<Infallible>>,
    close: Option<Sender<Infallible>>,
    outcome: Sender<Outcome>,
    /// No more than there are kinds.
    timers: Vec<(Deadline, Timer)>,
    unloading: Option<Pin<Box<dyn Future<Output = Option<String>> + Send>>>,
    ending_since: Option<Instant>,
    at_end: Option<Hook>,
    world: World,
}

impl Coordinator {
    pub(crate) fn new(
        exports: Arc<dyn Exports>,
        limits: Limits,
        speaker: Speaker,
        has_command: bool,
        world: World,
    ) -> (Coordinator, Ends) {
        let (inbox_sender, inbox) = async_channel::unbounded();
        // Nothing is ever sent through these five.
        let (stop, stopping) = async_channel::bounded(1);
        let (drain, draining) = async_channel::bounded(1);
        let (recall, recalling) = async_channel::bounded(1);
        let (give_up, giving_up) = async_channel::bounded(1);
        let (close, closing) = async_channel::bounded(1);
        let (outcome, outcome_receiver) = async_channel::bounded(1);
        let coordinator = Coordinator {
            inbox,
            state: State::new(has_command),
            limits,
            exports,
            speaker,
            command: None,
            exit_policy: None,
            stop: Some(stop),
            drain: Some(drain),
            recall: Some(recall),
            give_up: Some(give_up),
            close: Some(close),
            outcome,
            timers: Vec::new(),
            unloading: None,
            ending_since: None,
            at_end: None,
            world: world.clone(),
        };
        let ends = Ends {
            handle: Handle { inbox: inbox_sender, started: world.now(), world },
            orders: Orders { stop: stopping, drain: draining, recall: recalling, give_up: giving_up, close: closing },
            outcome: outcome_receiver,
        };
        (coordinator, ends)
    }

    /// Whom to give orders about the command, whom to tell of sessions, and what to do last.
    pub(crate) fn introduce(
        &mut self,
        command: Option<child_supervisor::Handle>,
        exit_policy: Option<exit_policy::Handle>,
        at_end: Option<Hook>,
    ) {
        self.command = command;
        self.exit_policy = exit_policy;
        self.at_end = at_end;
    }

    /// Runs until the outcome has been told. Dropped before that, everybody's orders are given at once: all channels close.
    pub(crate) async fn run(mut self) {
        while let Some(message) = self.next().await {
            if let Some(policy) = &self.exit_policy {
                policy.hear(&message);
            }
            let known = self.state.cause().is_some();
            if known && let Message::Cause(cause) = &message {
                self.speaker.debug(format_args!("also: {cause}"));
            }
            let waited = self.state.waits();
            let orders = self.state.on(message);
            if !known && let Some(cause) = self.state.cause() {
                self.ending_since = Some(self.world.now());
                self.speaker.debug(format_args!("ending: {cause}"));
            }
            let waits = self.state.waits();
            if waits != waited
                && let Some(waits) = waits
            {
                self.speaker.debug(format_args!("waiting for {waits}"));
            }
            for order in orders {
                if let Order::Finish(outcome) = order {
                    self.finish(outcome);
                    return;
                }
                self.carry_out(order);
            }
        }
    }

    async fn next(&mut self) -> Option<Message> {
        let heard = async { self.inbox.recv().await.ok() };
        let over = poll_fn(|cx| {
            let mut timers = self.timers.iter_mut();
            let over = timers.find_map(|(deadline, timer)| Pin::new(timer).poll(cx).is_ready().then_some(*deadline));
            over.map_or(Poll::Pending, |deadline| Poll::Ready(Some(Message::Deadline(deadline))))
        });
        let unloaded = async {
            match &mut self.unloading {
                Some(task) => Some(Message::Unloaded(task.await)),
                None => pending().await,
            }
        };
        let message = or(heard, or(over, unloaded)).await;
        match &message {
            Some(Message::Deadline(over)) => self.timers.retain(|(deadline, _)| deadline != over),
            Some(Message::Unloaded(_)) => self.unloading = None,
            _ => {}
        }
        message
    }

    fn carry_out(&mut self, order: Order) {
        let debug = |line: fmt::Arguments<'_>| self.speaker.debug(line);
        match order {
            Order::StopListening => self.stop = None,
            Order::DrainSessions => self.drain = None,
            Order::RecallHandshakes => {
                debug(format_args!(
                    "telling the device that {} clients in the handshake have gone",
                    self.state.handshakes()
                ));
                self.recall = None;
            }
            Order::GiveUpHandshakes => self.give_up = None,
            Order::CloseSessions => {
                debug(format_args!("closing {} clients at once", self.state.sessions.len()));
                self.close = None;
            }
            Order::SignalCommand(signal) => {
                debug(format_args!("passing signal {signal} on to the command"));
                self.command.iter().for_each(|command| command.signal(signal));
            }
            Order::KillCommand => {
                debug(format_args!("killing the command"));
                self.command.iter().for_each(child_supervisor::Handle::kill);
            }
            Order::Arm(deadline) => {
                let time = match deadline {
                    Deadline::Grace | Deadline::GiveUp => self.limits.grace,
                    Deadline::Drain => self.limits.drain,
                    Deadline::Recall => self.limits.grace.min(RECALL),
                    Deadline::Close => CLOSE,
                };
                self.timers.push((deadline, self.world.after(time)));
            }
            Order::Unload if !self.exports.unloads() => self.unloading = Some(Box::pin(std::future::ready(None))),
            Order::Unload => {
                let exports = Arc::clone(&self.exports);
                let world = self.world.clone();
                self.unloading = Some(Box::pin(async move {
                    // As a device's close that panics: a failure, and not the Coordinator's own panic.
                    let unload = move || {
                        catch_unwind(AssertUnwindSafe(|| exports.unload().err().map(|error| error.to_string())))
                            .unwrap_or_else(|_| Some("the device panicked while it was unloaded".to_owned()))
                    };
                    world.unblock(unload).await
                }));
            }
            Order::Finish(_) => {}
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        if let Some(failure) = &outcome.failure {
            self.speaker.error(format_args!("{failure}"));
        }
        let took = self.ending_since.map_or(Duration::ZERO, |since| self.world.now().duration_since(since));
        let status = outcome.exit_status();
        self.speaker.debug(format_args!("ended after {took:.3?}, exit status {status}: {}", outcome.cause));
        if let Some(hook) = self.at_end.take() {
            hook();
        }
        // Nobody may be waiting any more.
        let _ = self.outcome.try_send(outcome);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const ONE: SessionId = SessionId(1);

    fn finished(orders: &[Order]) -> Option<&Outcome> {
        orders.iter().find_map(|order| if let Order::Finish(outcome) = order { Some(outcome) } else { None })
    }

    /// Plays the messages and returns the last orders.
    fn play(state: &mut State, messages: impl IntoIterator<Item = Message>) -> Vec<Order> {
        messages.into_iter().map(|message| state.on(message)).last().unwrap_or_default()
    }

    #[test]
    fn the_end_waits_for_listener_sessions_unload_and_command() {
        let mut state = State::new(true);
        play(&mut state, [Message::SessionOpened(ONE)]);
        let ended = Message::Cause(Cause::CommandEnded(CommandEnd::Exited(3)));
        let orders = state.on(ended);
        let armed = [Order::Arm(Deadline::Drain), Order::Arm(Deadline::Recall)];
        assert_eq!(orders[..2], [Order::StopListening, Order::DrainSessions]);
        assert_eq!(orders[2..], armed);
        assert_eq!(state.on(Message::ListenerClosed), []);
        assert_eq!(state.on(Message::SessionClosed { id: ONE, failure: None }), [Order::Unload]);
        let orders = state.on(Message::Unloaded(None));
        assert_eq!(finished(&orders).map(Outcome::exit_status), Some(3));
    }

    #[test]
    fn a_signal_is_passed_on_and_clients_are_served_until_the_command_has_ended() {
        let mut state = State::new(true);
        let orders = state.on(Message::Signal { number: 15, witness: Witness::Here, at: Duration::ZERO });
        assert_eq!(orders, [Order::SignalCommand(15), Order::Arm(Deadline::Grace)]);
        assert_eq!(state.on(Message::Deadline(Deadline::Grace)), [Order::KillCommand]);
        let orders = state.on(Message::Cause(Cause::CommandEnded(CommandEnd::Killed(9))));
        assert!(orders.contains(&Order::DrainSessions));
        let orders = play(&mut state, [Message::ListenerClosed, Message::Unloaded(None)]);
        assert_eq!(finished(&orders).map(Outcome::exit_status), Some(137));
    }

    #[test]
    fn a_second_signal_counts_only_after_a_quarter_of_a_second() {
        let mut state = State::new(false);
        play(&mut state, [Message::SessionOpened(ONE)]);
        let signal = |at| Message::Signal { number: 15, witness: Witness::Here, at: Duration::from_millis(at) };
        assert!(state.on(signal(0)).contains(&Order::DrainSessions));
        assert_eq!(state.on(signal(249)), []);
        assert_eq!(state.on(signal(250)), [Order::CloseSessions, Order::Arm(Deadline::Close)]);
        let closed = Message::SessionClosed { id: ONE, failure: None };
        let orders = play(&mut state, [Message::ListenerClosed, closed]);
        assert_eq!(finished(&orders).map(Outcome::exit_status), Some(1));
    }

    #[test]
    fn a_second_signal_that_another_process_is_sure_of_counts_at_once() {
        let mut state = State::new(false);
        let first = Message::Signal { number: 15, witness: Witness::Beside, at: Duration::ZERO };
        play(&mut state, [Message::SessionOpened(ONE), first]);
        assert_eq!(state.on(Message::SignalAgain(15)), [Order::CloseSessions, Order::Arm(Deadline::Close)]);
    }

    #[test]
    fn a_command_that_succeeded_is_no_success_if_a_second_signal_cut_its_clients_off() {
        for (status, want) in [(0, 1), (3, 3)] {
            let mut state = State::new(true);
            let first = Message::Signal { number: 15, witness: Witness::Beside, at: Duration::ZERO };
            let ended = Message::Cause(Cause::CommandEnded(CommandEnd::Exited(status)));
            let opened = [Message::SessionOpened(ONE), Message::SessionNegotiated(ONE)];
            play(
                &mut state,
                opened.into_iter().chain([first, ended, Message::ListenerClosed, Message::SignalAgain(15)]),
            );
            let orders = state.on(Message::SessionClosed { id: ONE, failure: None });
            assert_eq!(finished(&orders).map(Outcome::exit_status), Some(want));
        }
    }

    #[test]
    fn what_clients_in_the_handshake_wait_for_is_recalled_and_then_given_up_without_a_failure() {
        let mut state = State::new(true);
        let opened = [Message::SessionOpened(ONE), Message::SessionOpened(TWO), Message::SessionNegotiated(TWO)];
        let ended = Message::Cause(Cause::CommandEnded(CommandEnd::Exited(0)));
        play(&mut state, opened.into_iter().chain([ended, Message::ListenerClosed]));
        let recall = Message::Deadline(Deadline::Recall);
        assert_eq!(state.on(recall), [Order::RecallHandshakes, Order::Arm(Deadline::GiveUp)]);
        assert_eq!(state.on(Message::Deadline(Deadline::GiveUp)), [Order::GiveUpHandshakes]);
        assert_eq!(state.on(Message::SessionClosed { id: ONE, failure: None }), []);
        // Who was let in has the time of the drain.
        assert_eq!(state.on(Message::SessionClosed { id: TWO, failure: None }), [Order::Unload]);
        let orders = state.on(Message::Unloaded(None));
        assert_eq!(finished(&orders).map(Outcome::exit_status), Some(0));
    }

    #[test]
    fn nobody_is_recalled_where_everybody_was_let_in() {
        let mut state = State::new(false);
        play(&mut state, [Message::SessionOpened(ONE), Message::SessionNegotiated(ONE)]);
        play(&mut state, [Message::Cause(Cause::Requested), Message::ListenerClosed]);
        assert_eq!(state.on(Message::Deadline(Deadline::Recall)), []);
    }

    #[test]
    fn an_event_refuses_new_clients_and_serves_the_present_ones() {
        let mut state = State::new(false);
        play(&mut state, [Message::SessionOpened(ONE), Message::SessionNegotiated(ONE)]);
        assert_eq!(state.on(Message::Cause(Cause::Event("the file is there".into()))), [Order::StopListening]);
        assert_eq!(state.on(Message::ListenerClosed), []);
        let orders = state.on(Message::SessionClosed { id: ONE, failure: None });
        assert!(orders.contains(&Order::DrainSessions) && orders.contains(&Order::Unload));
    }

    #[test]
    fn a_client_that_has_not_negotiated_does_not_hold_up_the_end_after_an_event() {
        let mut state = State::new(false);
        let event = Message::Cause(Cause::Event("the file is there".into()));
        let orders = play(&mut state, [Message::SessionOpened(ONE), event, Message::ListenerClosed]);
        assert!(orders.contains(&Order::DrainSessions));
    }

    #[test]
    fn a_failed_close_is_status_1_only_if_the_command_had_none() {
        for (status, want) in [(0, 1), (7, 7)] {
            let mut state = State::new(true);
            let failure = Some("no space".to_owned());
            let ended = Message::Cause(Cause::CommandEnded(CommandEnd::Exited(status)));
            let closed = Message::SessionClosed { id: ONE, failure };
            let messages =
                [Message::SessionOpened(ONE), closed, ended, Message::ListenerClosed, Message::Unloaded(None)];
            let orders = play(&mut state, messages);
            assert_eq!(finished(&orders).map(Outcome::exit_status), Some(want));
        }
    }

    #[test]
    fn the_last_client_does_not_end_the_command() {
        let mut state = State::new(true);
        let orders = play(&mut state, [Message::Cause(Cause::LastClientLeft), Message::ListenerClosed]);
        assert_eq!(orders, [Order::Unload]);
        assert_eq!(state.on(Message::Unloaded(None)), []);
        let orders = state.on(Message::Cause(Cause::CommandEnded(CommandEnd::Exited(4))));
        assert_eq!(finished(&orders).map(Outcome::exit_status), Some(4));
    }

    /// F7
    #[test]
    fn a_session_whose_thread_hangs_is_given_up_when_it_was_told_to_stop() {
        let mut state = State::new(false);
        play(&mut state, [Message::SessionOpened(ONE), Message::Cause(Cause::Requested), Message::ListenerClosed]);
        let orders = state.on(Message::Deadline(Deadline::Drain));
        assert_eq!(orders, [Order::CloseSessions, Order::Arm(Deadline::Close)]);
        let orders = state.on(Message::Deadline(Deadline::Close));
        assert_eq!(finished(&orders).map(Outcome::exit_status), Some(1));
    }

    #[test]
    fn a_server_of_one_client_ends_with_it_and_says_whether_it_was_served() {
        for (served, want) in [(true, 0), (false, 1)] {
            let mut state = State::new(false);
            let opened = [Message::SessionOpened(ONE), Message::ListenerClosed];
            assert_eq!(play(&mut state, opened), [], "nobody else will come, and that is no reason to end");
            let closed = Message::SessionClosed { id: ONE, failure: None };
            let gone = Message::Cause(Cause::ClientGone { served });
            assert!(play(&mut state, [closed, gone]).contains(&Order::Unload));
            let orders = state.on(Message::Unloaded(None));
            assert_eq!(finished(&orders).map(Outcome::exit_status), Some(want));
        }
    }

    const TWO: SessionId = SessionId(2);
    const FAILED: &str = "no space left";

    /// In the handshake.
    const THREE: SessionId = SessionId(3);

    /// Everything that can come, in any order in which it can come.
    fn alphabet() -> Vec<Message> {
        let cause = Message::Cause;
        let signal = |at| Message::Signal { number: SIGTERM, witness: Witness::Here, at: Duration::from_millis(at) };
        vec![
            cause(Cause::CommandEnded(CommandEnd::Exited(3))),
            cause(Cause::CommandEnded(CommandEnd::Exited(0))),
            cause(Cause::CommandEnded(CommandEnd::Killed(9))),
            signal(0),
            signal(400),
            Message::SignalAgain(SIGTERM),
            cause(Cause::ParentEnded),
            cause(Cause::FrontEnded),
            cause(Cause::LastClientLeft),
            cause(Cause::ClientGone { served: true }),
            cause(Cause::ClientGone { served: false }),
            cause(Cause::Event("it happened".into())),
            cause(Cause::Requested),
            cause(Cause::Fatal("it broke".into())),
            Message::SessionClosed { id: ONE, failure: None },
            Message::SessionClosed { id: TWO, failure: Some(FAILED.into()) },
            Message::SessionClosed { id: THREE, failure: None },
            Message::SessionNegotiated(THREE),
            Message::ListenerClosed,
            Message::Unloaded(None),
            Message::Unloaded(Some(FAILED.into())),
            Message::Deadline(Deadline::Grace),
            Message::Deadline(Deadline::Recall),
            Message::Deadline(Deadline::GiveUp),
            Message::Deadline(Deadline::Drain),
        ]
    }

    /// The kind of an order, as a bit.
    fn bit(order: &Order) -> u32 {
        let number = match order {
            Order::StopListening => 0,
            Order::DrainSessions => 1,
            Order::RecallHandshakes => 2,
            Order::GiveUpHandshakes => 3,
            Order::CloseSessions => 4,
            Order::SignalCommand(_) => 5,
            Order::KillCommand => 6,
            Order::Unload => 7,
            Order::Finish(_) => 8,
            Order::Arm(Deadline::Grace) => 9,
            Order::Arm(Deadline::Drain) => 10,
            Order::Arm(Deadline::Recall) => 11,
            Order::Arm(Deadline::GiveUp) => 12,
            Order::Arm(Deadline::Close) => 13,
        };
        1 << number
    }

    /// What the world outside knows: what may come next, and what has been promised. Two orders of messages that lead to the same
    /// are the same from there on.
    #[derive(Clone, PartialEq, Eq, Hash)]
    struct World {
        state: State,
        sessions: Vec<SessionId>,
        handshake: bool,
        listening: bool,
        command: Option<Option<CommandEnd>>,
        first_cause: Option<Cause>,
        failures: bool,
        /// Somebody who was let in was told to stop at once.
        cut_off: bool,
        /// Kinds of orders.
        ordered: u32,
        unloaded: bool,
        /// Which of the alphabet have come.
        come: u32,
        outcome: Option<Outcome>,
    }

    impl World {
        fn new(has_command: bool) -> World {
            let mut state = State::new(has_command);
            for id in [ONE, TWO, THREE] {
                state.on(Message::SessionOpened(id));
            }
            for id in [ONE, TWO] {
                state.on(Message::SessionNegotiated(id));
            }
            World {
                state,
                sessions: vec![ONE, TWO, THREE],
                handshake: true,
                listening: true,
                command: has_command.then_some(None),
                first_cause: None,
                failures: false,
                cut_off: false,
                ordered: 0,
                unloaded: false,
                come: 0,
                outcome: None,
            }
        }

        fn was_ordered(&self, order: &Order) -> bool {
            self.ordered & bit(order) != 0
        }

        /// Whether `message`, which has not come yet, can come now.
        fn can(&self, message: &Message) -> bool {
            match message {
                Message::Cause(Cause::CommandEnded(_)) => self.command == Some(None),
                // The second comes after the first; it may be the other process's alone that is heard here.
                Message::Signal { at, .. } => at.is_zero() || self.come & 1 << 3 != 0,
                Message::SignalAgain(_) | Message::Cause(_) => true,
                Message::SessionClosed { id, .. } => self.sessions.contains(id),
                Message::SessionNegotiated(id) => self.handshake && self.sessions.contains(id),
                Message::ListenerClosed => self.listening && self.was_ordered(&Order::StopListening),
                Message::Unloaded(_) => self.was_ordered(&Order::Unload) && !self.unloaded,
                Message::Deadline(deadline) => self.was_ordered(&Order::Arm(*deadline)),
                Message::SessionOpened(_) => false,
            }
        }

        fn play(&mut self, message: Message, path: &[Message]) {
            let before = self.state.waits();
            match &message {
                Message::Cause(cause) => {
                    self.first_cause.get_or_insert(cause.clone());
                    if let Cause::CommandEnded(end) = cause {
                        self.command = Some(Some(*end));
                    }
                    self.failures |= matches!(cause, Cause::Fatal(_));
                }
                Message::Signal { number, .. } | Message::SignalAgain(number) => {
                    self.first_cause.get_or_insert(Cause::Signal(*number));
                }
                Message::SessionClosed { id, failure } => {
                    self.sessions.retain(|open| open != id);
                    self.handshake &= *id != THREE;
                    self.failures |= failure.is_some();
                }
                Message::SessionNegotiated(_) => self.handshake = false,
                Message::ListenerClosed => self.listening = false,
                Message::Unloaded(failure) => {
                    self.unloaded = true;
                    self.failures |= failure.is_some();
                }
                _ => {}
            }
            let is_cause = matches!(message, Message::Cause(_) | Message::Signal { .. } | Message::SignalAgain(_));
            let orders = self.state.on(message);
            self.check(&orders, before.filter(|_| is_cause), path);
        }

        fn check(&mut self, orders: &[Order], before: Option<Waits>, path: &[Message]) {
            if let (Some(before), Some(now)) = (before, self.state.waits()) {
                let later = (now.command && !before.command)
                    || (now.listener && !before.listener)
                    || now.clients > before.clients
                    || (now.unload && !before.unload);
                assert!(!later, "a later cause made the end later: {path:?}");
            }
            for order in orders {
                assert!(self.outcome.is_none(), "an order after the end: {path:?}");
                // Signals may be passed on several times; everything else is ordered once.
                if !matches!(order, Order::SignalCommand(_)) {
                    assert!(!self.was_ordered(order), "ordered twice: {order:?} {path:?}");
                }
                match order {
                    Order::RecallHandshakes | Order::GiveUpHandshakes => {
                        assert!(self.was_ordered(&Order::DrainSessions), "given up without a drain: {path:?}");
                        assert!(self.handshake, "given up without a handshake: {path:?}");
                        assert!(!self.was_ordered(&Order::CloseSessions), "given up after all: {path:?}");
                    }
                    Order::CloseSessions => self.cut_off = self.sessions.len() > usize::from(self.handshake),
                    Order::Unload => {
                        assert!(self.sessions.is_empty() && !self.listening, "unloaded under clients: {path:?}");
                    }
                    Order::SignalCommand(_) | Order::KillCommand => {
                        assert_eq!(self.command, Some(None), "an order to no command: {path:?}");
                    }
                    Order::Finish(outcome) => {
                        assert!(self.sessions.is_empty() && !self.listening, "ended under clients: {path:?}");
                        assert_ne!(self.command, Some(None), "ended before the command: {path:?}");
                        let given_up = self.was_ordered(&Order::CloseSessions);
                        assert!(self.unloaded || given_up, "ended without a flush and unload: {path:?}");
                        assert_eq!(Some(&outcome.cause), self.first_cause.as_ref(), "not the first cause: {path:?}");
                        assert_eq!(outcome.command, self.command.flatten(), "{path:?}");
                        assert!(outcome.failure.is_some() || !self.failures, "a failure was forgotten: {path:?}");
                        let failed = self.failures || given_up;
                        assert!(outcome.failure.is_none() || failed, "a failure was made up: {path:?}");
                        self.outcome = Some(outcome.clone());
                    }
                    _ => {}
                }
                self.ordered |= bit(order);
            }
        }

        /// The rest of the world does what it was told, in the most ordinary order.
        fn complete(mut self, path: &[Message]) {
            if self.first_cause.is_none() {
                assert_eq!(self.ordered, 0, "an order without a cause: {path:?}");
                return;
            }
            for _ in 0..10 {
                let told = [Order::SignalCommand(0), Order::KillCommand].iter().any(|order| self.was_ordered(order));
                let leave = self.was_ordered(&Order::DrainSessions) || self.was_ordered(&Order::CloseSessions);
                let next = if self.can(&Message::ListenerClosed) {
                    Message::ListenerClosed
                } else if let (Some(id), true) = (self.sessions.first(), leave || !told) {
                    // Told to, or by itself, as after an event.
                    Message::SessionClosed { id: *id, failure: None }
                } else if self.can(&Message::Unloaded(None)) {
                    Message::Unloaded(None)
                } else if self.command == Some(None) {
                    // Told to, or by itself: an end that is no fault waits for it.
                    Message::Cause(Cause::CommandEnded(CommandEnd::Exited(3)))
                } else {
                    break;
                };
                self.play(next, path);
            }
            let outcome = self.outcome.as_ref().unwrap_or_else(|| panic!("it never ends: {path:?}"));
            let status = outcome.exit_status();
            let want = match (&outcome.cause, outcome.command, &outcome.failure) {
                (Cause::ParentEnded, _, None) => 0,
                (_, Some(CommandEnd::Killed(signal)), _) => 128 + signal,
                (Cause::ClientGone { served: false }, Some(CommandEnd::Exited(0)) | None, _) => 1,
                (_, Some(CommandEnd::Exited(0)) | None, None) => 0,
                (_, Some(CommandEnd::Exited(0)) | None, Some(_)) => 1,
                (_, Some(CommandEnd::Exited(status)), _) => status,
            };
            assert_eq!(status, want, "{path:?}");
            assert!(status != 0 || !self.cut_off, "a success, although clients were cut off: {path:?}");
        }
    }

    /// Exactly one exit status; the first cause wins; never later because of another; flushed and unloaded before the end;
    /// every session accounted for; nobody cut off by a success: in every order of five causes and completions, and then to the
    /// end. Orders that lead to the same are gone on with once.
    #[test]
    fn every_order_of_five_causes_and_completions_ends_once_and_right() {
        let alphabet = alphabet();
        let (mut orders, mut seen) = (0, 0);
        for has_command in [false, true] {
            // Each with one way that leads there, and how many there are.
            let mut worlds = HashMap::from([(World::new(has_command), (Vec::new(), 1))]);
            for depth in 0.. {
                for (world, (path, ways)) in &worlds {
                    (orders, seen) = (orders + ways, seen + 1);
                    world.clone().complete(path);
                }
                if depth == 5 {
                    break;
                }
                let mut next = HashMap::new();
                for (world, (path, ways)) in worlds.iter().filter(|(world, _)| world.outcome.is_none()) {
                    for (index, message) in alphabet.iter().enumerate() {
                        if world.come & 1 << index != 0 || !world.can(message) {
                            continue;
                        }
                        let path = [&path[..], std::slice::from_ref(message)].concat();
                        let mut world = world.clone();
                        world.come |= 1 << index;
                        world.play(message.clone(), &path);
                        next.entry(world).or_insert((path, 0)).1 += ways;
                    }
                }
                worlds = next;
            }
        }
        assert!(orders > 1_000_000, "only {orders} orders were possible, of {seen} worlds");
    }
}

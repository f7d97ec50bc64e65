//! One client: handshake, transmission, replies. Knows nothing of why the server may end; hears only "drain" and "close".
//!
//! Tells the Coordinator that it negotiated and that it ended, whatever way it ended. Hands requests down to a Backend of
//! its own, which runs in the same task, so that a request and its reply stay on one thread.

mod handshake;
mod transmission;

use std::fmt;
use std::future::poll_fn;
use std::ops::Deref;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use async_channel::Receiver;

use event_listener::Event;
use smol::future::or;
use smol::lock::SemaphoreGuardArc;

use self::handshake::Agreed;
use self::transmission::{Spell, Transmission};
use crate::backend::{self, Backend, Gates, Replies};
use crate::buffers::Buffers;
use crate::connection::{Connection, Ends};
use crate::coordinator::{self, Cause, Message, Orders};
use crate::device::Exports;
use crate::log::Speaker;
use crate::tls::Acceptor;
use crate::transport::Transport;
use crate::world::World;

/// A client's number, from 1 in the order of acceptance, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What all sessions of a server are told to do. Does not change while it runs.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub read_only: bool,
    /// Speak the oldstyle handshake.
    pub oldstyle: bool,
    /// Offer structured replies.
    pub structured_replies: bool,
    /// Offer extended headers, where structured replies are offered.
    pub extended_headers: bool,
    /// Offer metadata contexts.
    pub meta_contexts: bool,
    /// Handshake flags that may be offered.
    pub handshake_flags: u16,
    /// How long a client may take to negotiate.
    pub handshake_timeout: Option<Duration>,
    /// Requests of one client that may wait for the device at a time.
    pub threads: usize,
    pub tls: Option<Tls>,
}

/// That clients may use TLS, and how.
#[derive(Clone, Debug)]
pub(crate) struct Tls {
    pub acceptor: Arc<dyn Acceptor>,
    /// They must, before anything else.
    pub is_required: bool,
}

/// All that a session needs from the rest of the server.
#[derive(Clone)]
pub(crate) struct Surroundings {
    /// One for all sessions: most of them are idle, and each would pay for its own.
    pub common: Arc<Common>,
    /// Those of the thread that it runs on.
    pub buffers: Buffers,
}

/// What is the same for all sessions of a server.
pub(crate) struct Common {
    pub rules: Rules,
    pub exports: Arc<dyn Exports>,
    pub gates: Gates,
    pub coordinator: coordinator::Handle,
    pub orders: Orders,
    pub speaker: Speaker,
    pub world: World,
    /// Notified when a session has let go of everything: there is room for another.
    pub room: Arc<Event>,
}

impl Deref for Surroundings {
    type Target = Common;

    fn deref(&self) -> &Common {
        &self.common
    }
}

/// Why a session ended. Only the log wants to know.
#[derive(Debug)]
pub(crate) enum End {
    /// `NBD_CMD_DISC` or `NBD_OPT_ABORT`, or the stream ended between two messages.
    Disconnected,
    /// The stream failed, or ended inside a message.
    Lost(std::io::Error),
    /// The client broke a rule after which the stream cannot be understood.
    Broken(String),
    /// The TLS handshake failed: why.
    Insecure(String),
    /// The server is ending.
    Drained,
    /// The client took longer to negotiate than it may.
    TooSlow,
    /// The server is ending, and the client did not take its replies.
    Stalled,
    /// The server is ending, and the device does not answer what was asked in the handshake.
    LeftBehind,
    /// The device wants no more of the client.
    Cut,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Disconnected => f.write_str("client disconnected"),
            End::Lost(error) => write!(f, "connection lost: {error}"),
            End::Broken(why) => write!(f, "connection closed: {why}"),
            End::Insecure(why) => write!(f, "connection closed: TLS handshake: {why}"),
            End::Drained => f.write_str("connection closed: the server is ending"),
            End::TooSlow => f.write_str("connection closed: the handshake took longer than --timeout allows"),
            End::LeftBehind => f.write_str(
                "connection closed: the server is ending, and the device did not answer what was asked in the handshake",
            ),
            End::Cut => f.write_str("connection closed: the device ended it"),
            End::Stalled => f.write_str("connection closed: the server is ending and the client took no replies"),
        }
    }
}

/// Says to the Coordinator that a client has come, and, dropped, that it is gone: also when its session panicked, or never
/// began because its thread was gone. So each is told once, whatever happens, and an end never waits for nobody.
pub(crate) struct Visit {
    id: SessionId,
    coordinator: coordinator::Handle,
    room: Arc<Event>,
    failure: Option<String>,
    negotiated: bool,
    /// It negotiated, and got all that it was sent.
    served: bool,
    /// The server ends with it.
    is_only: bool,
    _seat: Seat,
}

/// What a client holds for as long as it is connected, where not everybody may be at once.
pub(crate) type Seat = Option<SemaphoreGuardArc>;

impl Visit {
    pub(crate) fn begin(id: SessionId, surroundings: &Surroundings, seat: Seat) -> Visit {
        let (coordinator, room) = (surroundings.coordinator.clone(), Arc::clone(&surroundings.room));
        coordinator.tell(Message::SessionOpened(id));
        Visit { id, coordinator, room, failure: None, negotiated: false, served: false, is_only: false, _seat: seat }
    }

    pub(crate) fn id(&self) -> SessionId {
        self.id
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.coordinator.tell(Message::Cause(Cause::Fatal(format!("the session of client {} panicked", self.id))));
        }
        self.coordinator.tell(Message::SessionClosed { id: self.id, failure: self.failure.take() });
        if self.is_only {
            self.coordinator.shut_down(Cause::ClientGone { served: self.served });
        }
        self.room.notify(1);
    }
}

/// Serves one client from the greeting to the end. Dropped before its end, the connection closes and requests that were on
/// a thread finish unanswered.
#[expect(clippy::manual_async_fn, reason = "that would hold each argument twice, and most clients are idle")]
pub(crate) fn run(
    mut visit: Visit,
    mut transport: Box<dyn Transport>,
    surroundings: Surroundings,
) -> impl Future<Output = ()> + Send {
    async move {
        let speaker = surroundings.speaker.of(visit.id);
        speaker.debug(format_args!("accepted connection"));
        let end = serve(&mut transport, &surroundings, &speaker, &mut visit).await;
        match &end {
            // Nobody else can tell whoever started a server for one client.
            End::Lost(_) | End::Disconnected if visit.is_only && !visit.negotiated => {
                speaker.error(format_args!("the client left before it had negotiated a session"));
            }
            // A probe: somebody looked whether there is a server, and left.
            End::Lost(error) if !visit.negotiated && is_departure(error) => speaker.debug(format_args!("{end}")),
            End::Lost(_) | End::Broken(_) | End::Insecure(_) | End::TooSlow | End::Stalled | End::LeftBehind => {
                speaker.error(format_args!("{end}"))
            }
            End::Disconnected | End::Drained | End::Cut => speaker.debug(format_args!("{end}")),
        }
        // Before the Coordinator hears of it: whoever sees the server gone sees the connection closed.
        drop(transport);
        let is_no_fault = match &end {
            End::Disconnected | End::Drained => true,
            // A client that went, however it did, is no fault; one that is there and takes no replies is.
            End::Lost(error) => error.kind() != std::io::ErrorKind::BrokenPipe && is_departure(error),
            End::Broken(_) | End::Insecure(_) | End::TooSlow | End::Stalled | End::LeftBehind | End::Cut => false,
        };
        visit.served = visit.negotiated && is_no_fault;
        drop(visit);
    }
}

/// As [`run`], for the only client of a server, which ends with it.
pub(crate) fn run_only(
    mut visit: Visit,
    transport: Box<dyn Transport>,
    surroundings: Surroundings,
) -> impl Future<Output = ()> + Send {
    visit.is_only = true;
    run(visit, transport, surroundings)
}

/// Whether the client just went, rather than the stream failed.
fn is_departure(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

async fn serve(
    transport: &mut Box<dyn Transport>,
    surroundings: &Surroundings,
    speaker: &Speaker,
    visit: &mut Visit,
) -> End {
    let orders = &surroundings.orders;
    // Told to stop now, nothing is waited for: what is on a thread finishes there and its result is lost.
    let closed_at_once = async {
        orders.closing().await;
        Err(End::Drained)
    };
    let connection = Connection::new(orders.clone(), speaker.clone(), surroundings.world.clone());
    let ends = Ends(connection.clone());
    let handshake = handshake::run(transport, surroundings, &connection, speaker, visit.id, &mut visit.failure);
    let agreed = match or(closed_at_once, handshake).await {
        Ok(agreed) => agreed,
        Err(end) => return end,
    };
    visit.negotiated = true;

    let Agreed { opened, agreement, left_over, turn } = agreed;
    let backend = Backend::new(opened, agreement, surroundings, &connection, speaker.clone());
    let closed_at_once = async {
        orders.closing().await;
        (End::Drained, Ok(()))
    };
    // Boxed, so that they are not here twice.
    let attending =
        Box::pin(attend(Box::new(backend), left_over, &mut **transport, surroundings, &connection, speaker));
    let (end, closed) = or(closed_at_once, attending).await;
    drop(ends);
    drop(turn);
    if let Err(error) = closed {
        speaker.error(format_args!("closing the device: {error}"));
        visit.failure = Some(error.to_string());
    }
    end
}

/// Transmission, spell by spell, and then the device's close.
async fn attend(
    mut backend: Box<Backend>,
    mut input: Input,
    transport: &mut dyn Transport,
    surroundings: &Surroundings,
    connection: &Connection,
    speaker: &Speaker,
) -> (End, crate::device::Result<()>) {
    loop {
        if input.bytes().is_empty() {
            input = Input::default();
            stirred(transport, &surroundings.orders).await;
        }
        // Boxed, so that a client that rests does not pay for it.
        let input = std::mem::take(&mut input);
        match Box::pin(spell(&mut backend, input, transport, surroundings, connection, speaker)).await {
            Spell::Rests => {}
            // The stream ends after the device has closed: a client that waits for it to end knows all to be done.
            Spell::Ended(end, parting) => {
                let closed = Box::pin(backend.close()).await;
                Box::pin(transmission::part(transport, surroundings, parting)).await;
                return (end, closed);
            }
        }
    }
}

/// Waits until there is something to do: bytes from the client, or the server's end.
async fn stirred(transport: &mut dyn Transport, orders: &Orders) {
    let mut draining = orders.watch_draining();
    poll_fn(|cx| {
        let drains = draining.poll(cx).is_ready();
        // What is wrong with the stream shows when it is read.
        if drains { Poll::Ready(()) } else { transport.poll_readable(cx).map(drop) }
    })
    .await;
}

/// Serves the client until it has asked for nothing for a while, or to its end. What this takes (channels, buffers, the two
/// futures) is gone afterwards: of ten thousand clients few are busy.
async fn spell(
    backend: &mut Backend,
    input: Input,
    transport: &mut dyn Transport,
    surroundings: &Surroundings,
    connection: &Connection,
    speaker: &Speaker,
) -> Spell {
    let orders = &surroundings.orders;
    // As many as may be under way, so that handing up does not wait for the client.
    let (work, work_inbox) = async_channel::bounded(transmission::BATCHES);
    let (replies, replies_inbox) = async_channel::bounded(transmission::BATCHES);
    let handed_up = replies_inbox.clone();
    let transmission = Transmission::new(backend.agreement(), input, surroundings, connection, work, replies_inbox);
    let enough = transport.worth_sending();
    let sending = pin!(transmission.run(transport, orders, speaker));
    let serving = pin!(backend.run(work_inbox, replies, enough, || orders.is_draining()));
    together(sending, serving, handed_up).await.0
}

/// Runs Session and Backend in one task. What the Backend has handed up is sent in the same turn in which the requests were
/// handed down, without a round through the executor.
async fn together<A, B>(
    mut sending: Pin<&mut impl Future<Output = A>>,
    mut serving: Pin<&mut impl Future<Output = B>>,
    handed_up: Receiver<Replies>,
) -> (A, B) {
    let (mut sent, mut served) = (None, None);
    let mut handed_up = Some(handed_up);
    poll_fn(|cx| {
        if sent.is_none() {
            sent = ready(sending.as_mut().poll(cx));
        }
        if sent.is_some() {
            // By its end the Backend knows that nobody wants replies any more.
            handed_up = None;
        }
        if served.is_none() {
            served = ready(serving.as_mut().poll(cx));
        }
        if handed_up.as_ref().is_some_and(|replies| !replies.is_empty()) {
            sent = ready(sending.as_mut().poll(cx));
        }
        match (sent.take(), served.take()) {
            (Some(sent), Some(served)) => Poll::Ready((sent, served)),
            (a, b) => {
                (sent, served) = (a, b);
                Poll::Pending
            }
        }
    })
    .await
}

fn ready<T>(poll: Poll<T>) -> Option<T> {
    match poll {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// Bytes from the client that nobody has looked at.
#[derive(Default)]
pub(crate) struct Input {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }
}

/// Receives some bytes; `Ok(0)` is the end of the stream. Dropped, it has taken nothing.
async fn receive(transport: &mut dyn Transport, buffer: &mut [u8]) -> std::io::Result<usize> {
    poll_fn(|cx| transport.poll_receive(cx, &mut [std::io::IoSliceMut::new(buffer)])).await
}

/// Sends all of `bytes`. Dropped, some of them may have been sent.
async fn send_all(transport: &mut dyn Transport, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let sent = poll_fn(|cx| transport.poll_send(cx, &[std::io::IoSlice::new(bytes)])).await?;
        if sent == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[sent..];
    }
    Ok(())
}

pub(crate) use backend::Opened;

//! One client: handshake, transmission, replies. Knows nothing of why the server may end; hears only "drain" and "close".
//!
//! Tells the Coordinator that it negotiated and that it ended, whatever way it ended. Hands requests down to a Backend of
//! its own, which runs in the same task, so that a request and its reply stay on one thread.

mod handshake;
mod transmission;

use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use smol::future::{or, zip};

use crate::backend::{self, Backend, Gates};
use crate::buffers::Buffers;
use crate::coordinator::{self, Cause, Message, Orders};
use crate::device::Exports;
use crate::log::Speaker;
use crate::transport::Transport;

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
    /// Offer structured replies.
    pub structured_replies: bool,
    /// Offer metadata contexts.
    pub meta_contexts: bool,
    /// Handshake flags that may be offered.
    pub handshake_flags: u16,
    /// How long a client may take to negotiate.
    pub handshake_timeout: Option<Duration>,
    /// Requests of one client that may wait for the device at a time.
    pub threads: usize,
}

/// All that a session needs from the rest of the server.
#[derive(Clone)]
pub(crate) struct Surroundings {
    pub rules: Arc<Rules>,
    pub exports: Arc<dyn Exports>,
    pub gates: Gates,
    pub coordinator: coordinator::Handle,
    pub orders: Orders,
    pub buffers: Buffers,
    pub speaker: Speaker,
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
    /// The server is ending.
    Drained,
    /// The client took longer to negotiate than it may.
    TooSlow,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Disconnected => f.write_str("client disconnected"),
            End::Lost(error) => write!(f, "connection lost: {error}"),
            End::Broken(why) => write!(f, "connection closed: {why}"),
            End::Drained => f.write_str("connection closed: the server is ending"),
            End::TooSlow => f.write_str("connection closed: the handshake took longer than --timeout allows"),
        }
    }
}

/// Says to the Coordinator that the session is over, also when it panicked.
struct Farewell {
    id: SessionId,
    coordinator: coordinator::Handle,
    failure: Option<String>,
    negotiated: bool,
    orderly: bool,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        if !self.orderly && std::thread::panicking() {
            self.coordinator.tell(Message::Cause(Cause::Fatal(format!("the session of client {} panicked", self.id))));
        }
        self.coordinator.tell(Message::SessionClosed { id: self.id, failure: self.failure.take() });
    }
}

/// Serves one client from the greeting to the end. The Coordinator has been told of `id` already. Dropped before its end,
/// the connection closes and requests that were on a thread finish unanswered.
pub(crate) async fn run(id: SessionId, mut transport: Box<dyn Transport>, surroundings: Surroundings) {
    let speaker = surroundings.speaker.of(id);
    speaker.debug(format_args!("accepted connection"));
    let coordinator = surroundings.coordinator.clone();
    let mut farewell = Farewell { id, coordinator, failure: None, negotiated: false, orderly: false };
    let end = serve(id, &mut *transport, &surroundings, &speaker, &mut farewell).await;
    match &end {
        // A probe: somebody looked whether there is a server, and left.
        End::Lost(error) if !farewell.negotiated && is_departure(error) => speaker.debug(format_args!("{end}")),
        End::Lost(_) | End::Broken(_) | End::TooSlow => speaker.error(format_args!("{end}")),
        End::Disconnected | End::Drained => speaker.debug(format_args!("{end}")),
    }
    drop(transport);
    farewell.orderly = true;
}

/// Whether the client just went, rather than the stream failed.
fn is_departure(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

async fn serve(
    id: SessionId,
    transport: &mut dyn Transport,
    surroundings: &Surroundings,
    speaker: &Speaker,
    farewell: &mut Farewell,
) -> End {
    let Surroundings { rules, buffers, orders, .. } = surroundings;
    // An order to drain closes a client that has not negotiated: it was promised nothing yet.
    let negotiated = or(
        async {
            orders.draining().await;
            Err(End::Drained)
        },
        or(handshake::run(transport, surroundings, speaker), too_slow(rules.handshake_timeout)),
    );
    let agreed = match negotiated.await {
        Ok(agreed) => agreed,
        Err(end) => return end,
    };
    farewell.coordinator.tell(Message::SessionNegotiated(id));
    farewell.negotiated = true;

    // As many as may be under way, so that handing up does not wait for the client.
    let (work, work_inbox) = async_channel::bounded(transmission::BATCHES);
    let (replies, replies_inbox) = async_channel::bounded(transmission::BATCHES);
    let backend = Backend::new(
        agreed.opened,
        agreed.agreement,
        &surroundings.gates,
        rules.threads,
        buffers.clone(),
        speaker.clone(),
        replies,
    );
    let drain = orders.clone();
    let transmission =
        transmission::Transmission::new(agreed.agreement, agreed.left_over, buffers.clone(), work, replies_inbox);
    // Boxed, so that a client in its handshake does not pay for what comes after.
    let both = Box::pin(zip(
        transmission.run(transport, orders, speaker),
        backend.run(work_inbox, move || drain.is_draining()),
    ));
    // Told to stop now, nothing is waited for: what is on a thread finishes there and its reply is lost.
    let closed_at_once = async {
        orders.closing().await;
        (End::Drained, Ok(()))
    };
    let (end, closed) = or(closed_at_once, both).await;
    drop(agreed.turn);
    if let Err(error) = closed {
        speaker.error(format_args!("closing the device: {error}"));
        farewell.failure = Some(error.to_string());
    }
    end
}

async fn too_slow<T>(limit: Option<Duration>) -> Result<T, End> {
    match limit {
        Some(limit) => {
            smol::Timer::after(limit).await;
            Err(End::TooSlow)
        }
        None => std::future::pending().await,
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
    poll_fn(|cx| transport.poll_receive(cx, buffer)).await
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

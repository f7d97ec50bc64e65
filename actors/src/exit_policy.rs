//! Decides when a server leaves by itself: after its last client (`exitlast`), or after an event (`exitwhen`).
//!
//! Hears of sessions from the Coordinator and of events by the futures that it was given; tells only the Coordinator. Ends
//! when it has told all it can, or when the Coordinator is gone.
//! Source: nbdkit filters/exitlast/exitlast.c, filters/exitwhen/exitwhen.c.

use std::collections::HashSet;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use async_channel::{Receiver, Sender};
use smol::future::or;

use crate::coordinator::{self, Cause, Message};
use crate::session::SessionId;
use crate::world::{Timer, World};

/// Something that ends the server when it happens: it is then done, and says in a line what has happened.
pub type Event = Pin<Box<dyn Future<Output = String> + Send>>;

/// How long a client that is still negotiating may hold up the end after the last one has left.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What is told of sessions. A session counts when it reaches the transmission phase, so that a probe or a listing neither
/// counts nor ends anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fact {
    Opened(SessionId),
    Negotiated(SessionId),
    Closed(SessionId),
}

/// All that the Coordinator holds of it.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    // Unbounded: three small messages for each client, taken at once.
    inbox: Sender<Fact>,
}

impl Handle {
    /// Passes on what concerns sessions.
    pub(crate) fn hear(&self, message: &Message) {
        let fact = match message {
            Message::SessionOpened(id) => Fact::Opened(*id),
            Message::SessionNegotiated(id) => Fact::Negotiated(*id),
            Message::SessionClosed { id, .. } => Fact::Closed(*id),
            _ => return,
        };
        // It may have decided already.
        let _ = self.inbox.try_send(fact);
    }
}

/// What follows from a fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    Stay,
    /// The last client has left, but one is negotiating: it decides, if it does so in time.
    Wait,
    End,
}

/// The decision alone.
#[derive(Debug, Default)]
struct State {
    negotiating: HashSet<SessionId>,
    served: HashSet<SessionId>,
    any_served: bool,
}

impl State {
    fn on(&mut self, fact: Fact) -> Decision {
        match fact {
            Fact::Opened(id) => {
                self.negotiating.insert(id);
            }
            Fact::Negotiated(id) => {
                self.negotiating.remove(&id);
                self.served.insert(id);
                self.any_served = true;
            }
            Fact::Closed(id) => {
                self.negotiating.remove(&id);
                self.served.remove(&id);
            }
        }
        if !self.any_served || !self.served.is_empty() {
            Decision::Stay
        } else if self.negotiating.is_empty() {
            Decision::End
        } else {
            Decision::Wait
        }
    }
}

/// The actor: the handle that the Coordinator tells facts through, and the actor's future.
pub(crate) fn new(
    exit_last: bool,
    events: Vec<Event>,
    coordinator: coordinator::Handle,
    world: World,
) -> (Handle, impl Future<Output = ()> + Send) {
    let (inbox, facts) = async_channel::unbounded();
    let happened = watch(events, coordinator.clone());
    let left = async move {
        if exit_last {
            run(State::default(), facts, coordinator, world).await;
        }
    };
    (Handle { inbox }, async {
        smol::future::zip(happened, left).await;
    })
}

/// Tells of each event once, when it happens. Dropped, none is missed that has not happened.
async fn watch(mut events: Vec<Event>, coordinator: coordinator::Handle) {
    let _guard = coordinator.guard("the ExitPolicy");
    while !events.is_empty() {
        let (index, what) = poll_fn(|cx| {
            let poll = |(index, event): (usize, &mut Event)| match event.as_mut().poll(cx) {
                Poll::Ready(what) => Some((index, what)),
                Poll::Pending => None,
            };
            events.iter_mut().enumerate().find_map(poll).map_or(Poll::Pending, Poll::Ready)
        })
        .await;
        drop(events.swap_remove(index));
        coordinator.shut_down(Cause::Event(what));
    }
}

async fn run(mut state: State, facts: Receiver<Fact>, coordinator: coordinator::Handle, world: World) {
    let _guard = coordinator.guard("the ExitPolicy");
    let mut patience = Timer::never();
    loop {
        let fact = or(async { facts.recv().await.ok() }, async {
            (&mut patience).await;
            None
        });
        let decision = match fact.await {
            Some(fact) => state.on(fact),
            // Either the wait is over or the Coordinator is; telling the latter does no harm.
            None => Decision::End,
        };
        match decision {
            Decision::Stay => patience = Timer::never(),
            Decision::Wait if patience.will_fire() => {}
            Decision::Wait => patience = world.after(HANDSHAKE),
            Decision::End => return coordinator.shut_down(Cause::LastClientLeft),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);

    #[test]
    fn a_probe_neither_counts_nor_ends_anything() {
        let mut state = State::default();
        assert_eq!(state.on(Fact::Opened(A)), Decision::Stay);
        assert_eq!(state.on(Fact::Closed(A)), Decision::Stay);
    }

    #[test]
    fn ends_when_the_last_of_two_clients_leaves() {
        let mut state = State::default();
        for fact in [Fact::Opened(A), Fact::Opened(B), Fact::Negotiated(A), Fact::Negotiated(B), Fact::Closed(A)] {
            assert_eq!(state.on(fact), Decision::Stay);
        }
        assert_eq!(state.on(Fact::Closed(B)), Decision::End);
    }

    #[test]
    fn a_client_that_is_negotiating_decides() {
        let mut state = State::default();
        for fact in [Fact::Opened(A), Fact::Negotiated(A), Fact::Opened(B)] {
            assert_eq!(state.on(fact), Decision::Stay);
        }
        assert_eq!(state.on(Fact::Closed(A)), Decision::Wait);
        assert_eq!(state.on(Fact::Negotiated(B)), Decision::Stay);
        assert_eq!(state.on(Fact::Closed(B)), Decision::End);
    }
}

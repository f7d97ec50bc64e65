//! The command that the server is captive of, as the server sees it: it runs, it is told to end, it has ended.
//!
//! The engine starts no process. Whoever holds the command gives two channels: orders to it and events from it. The
//! ChildSupervisor passes orders down while the command runs, and turns events into causes; if the holder is gone, that is
//! a cause as well. Ends when its holder is gone: what that hears after the command's end, a second signal say, counts too.

use async_channel::{Receiver, Sender};

use crate::coordinator::{self, Cause, CommandEnd};
use crate::repeats::Witness;

/// What the holder of the command is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandOrder {
    /// Pass this signal on to the command and its tree.
    Signal(i32),
    /// Kill the command and its tree.
    Kill,
}

/// What the holder of the command tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandEvent {
    /// The command has ended.
    Ended(CommandEnd),
    /// Another process of this server's got this signal, which asks for the end.
    Signal(i32),
    /// It got it once more, and that was no echo of the first ([`crate::repeats`]): everything is to end at once.
    SignalAgain(i32),
    /// The front process is gone.
    FrontEnded,
    /// The parent that the server was to live as long as is gone.
    ParentEnded,
}

/// The two channels to who holds the command.
#[derive(Debug)]
pub struct Captor {
    /// Orders to it.
    pub orders: Sender<CommandOrder>,
    /// Events from it. Closed when it is gone.
    pub events: Receiver<CommandEvent>,
}

/// All that the Coordinator holds of it.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    orders: Sender<CommandOrder>,
}

impl Handle {
    pub(crate) fn signal(&self, number: i32) {
        self.give(CommandOrder::Signal(number));
    }

    pub(crate) fn kill(&self) {
        self.give(CommandOrder::Kill);
    }

    fn give(&self, order: CommandOrder) {
        // A holder that is gone or does not listen is dealt with by the events' end and by the grace period.
        let _ = self.orders.try_send(order);
    }
}

/// The actor. Returns what the Coordinator gives orders through, and the actor's future.
pub(crate) fn new(captor: Captor, coordinator: coordinator::Handle) -> (Handle, impl Future<Output = ()> + Send) {
    (Handle { orders: captor.orders }, run(captor.events, coordinator))
}

async fn run(events: Receiver<CommandEvent>, coordinator: coordinator::Handle) {
    let _guard = coordinator.guard("the ChildSupervisor");
    let mut has_ended = false;
    while let Ok(event) = events.recv().await {
        match event {
            CommandEvent::Ended(end) => {
                has_ended = true;
                coordinator.shut_down(Cause::CommandEnded(end));
            }
            CommandEvent::Signal(number) => coordinator.signal_of(number, Witness::Beside),
            CommandEvent::SignalAgain(number) => coordinator.signal_again(number),
            CommandEvent::FrontEnded => coordinator.shut_down(Cause::FrontEnded),
            CommandEvent::ParentEnded => coordinator.shut_down(Cause::ParentEnded),
        }
    }
    if has_ended {
        return;
    }
    // Its holder went without a word. The command is no longer ours to wait for.
    coordinator.shut_down(Cause::FrontEnded);
    coordinator.shut_down(Cause::CommandEnded(CommandEnd::Killed(9)));
}

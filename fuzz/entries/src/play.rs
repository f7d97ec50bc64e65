//! A server and its clients on a stage, and what must hold at its end.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nbdcaptive_actors::log::{Level, Log};
use nbdcaptive_actors::transport::Transport;
use nbdcaptive_actors::{Cause, Handle, Outcome, Server, SessionId};
use smol::Task;

use crate::conversation::{Conversation, SharedModel};
use crate::disk::Setting;
use crate::model::Model;
use crate::stage::{Stage, Wire};

/// What a client may make the server hold beside a reply of the largest size, in bytes.
const OWED: u64 = 16 << 20;
/// The largest reply, and what is round it.
const LARGEST: u64 = (64 << 20) + 4096;
/// How long the end may take once every client has left, in the server's time.
const END: Duration = Duration::from_secs(5);

/// See the module.
pub struct Play {
    pub stage: Stage,
    pub setting: Setting,
    pub handle: Handle,
    pub clients: Vec<Client>,
    /// `None`: no more can come.
    door: Option<async_channel::Sender<Box<dyn Transport>>>,
    model: Option<SharedModel>,
    outcome: Task<Outcome>,
    given: Arc<AtomicU64>,
    lines: Shown,
    /// Somebody has asked for the end.
    pub is_ending: bool,
}

/// One client.
pub struct Client {
    pub wire: Wire,
    pub talk: Conversation,
    /// What it wants to send and has not sent yet.
    pub held: Vec<u8>,
    /// It has begun to send.
    pub has_begun: bool,
    /// The connection is no more.
    pub is_gone: bool,
    /// By the client's doing.
    pub was_cut: bool,
    /// It has said that it will send nothing more.
    has_left: bool,
}

/// Makes every line, as `-v` would, and keeps the last of them.
#[derive(Default)]
struct Lines(Mutex<VecDeque<String>>);

impl Log for Lines {
    fn wants(&self, _level: Level) -> bool {
        true
    }

    fn line(&self, _level: Level, session: Option<SessionId>, line: std::fmt::Arguments<'_>) {
        let who = session.map_or_else(|| "server".to_owned(), |session| format!("client {session}"));
        let line = format!("{who}: {line}");
        assert!(line.len() <= 64 * 1024, "a line that nobody can read");
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == 50 {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

/// Shows the lines where something is wrong.
struct Shown(Arc<Lines>);

impl Drop for Shown {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let lines = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
            lines.iter().for_each(|line| eprintln!("{line}"));
        }
    }
}

impl Play {
    /// A server that waits for clients.
    pub fn new(setting: Setting) -> Play {
        let (door, arrivals) = async_channel::unbounded();
        let mut play = Play::start(setting, |server| server.clients(arrivals));
        play.door = Some(door);
        play
    }

    /// A server for one client, who is there.
    pub fn of_one(setting: Setting, room: usize) -> Play {
        let (wire, transport) = Wire::new(room);
        let mut play = Play::start(setting, |server| server.serve_one(transport));
        play.add(wire);
        play
    }

    fn start(setting: Setting, finish: impl FnOnce(Server) -> Server) -> Play {
        let stage = Stage::new();
        let (server, given) = setting.server();
        let lines = Arc::<Lines>::default();
        let server = finish(server.simulated(&stage.simulation).log(lines.clone()));
        let running = server.start(&stage.executor).expect("there are no sockets to watch");
        let handle = running.handle();
        let outcome = stage.executor.spawn(async move { running.wait().await });
        let model = setting.is_small().then(|| Rc::new(RefCell::new(Model::new(setting.size() as usize))));
        Play {
            stage,
            setting,
            handle,
            clients: Vec::new(),
            door: None,
            model,
            outcome,
            given,
            lines: Shown(lines),
            is_ending: false,
        }
    }

    /// One client more, whose wire holds `room` bytes of replies.
    pub fn connect(&mut self, room: usize) {
        let (wire, transport) = Wire::new(room);
        if let Some(door) = &self.door {
            // After the end has begun nobody takes them.
            let _ = door.try_send(Box::new(transport));
            self.add(wire);
        }
    }

    fn add(&mut self, wire: Wire) {
        let mut talk = Conversation::new(self.setting, self.model.clone());
        let may_be_full = self.setting.max_clients().is_some_and(|most| self.clients.len() >= most);
        if may_be_full || self.is_ending || self.setting.exit_last() || self.setting.handshake_timeout().is_some() {
            talk.may_close();
        }
        self.clients.push(Client {
            wire,
            talk,
            held: Vec::new(),
            has_begun: false,
            is_gone: false,
            was_cut: false,
            has_left: false,
        });
    }

    /// Looks at what has come, and at what must hold at any time.
    pub fn look(&mut self) {
        let mut carried = 0;
        for client in &mut self.clients {
            carried += client.wire.carried();
            if client.wire.is_over() && !client.is_gone {
                client.is_gone = true;
                client.talk.closed();
            }
        }
        let most = (OWED + LARGEST) * self.clients.len() as u64;
        let owed = self.given.load(Ordering::Relaxed).saturating_sub(carried);
        // Of zeroes a structured reply may say in a few bytes how many they are.
        let all_simple = self.clients.iter().all(|client| client.talk.is_simple());
        assert!(owed <= most || !all_simple, "{owed} bytes of replies are kept for clients that do not take them");
    }

    /// Lets everything happen that can without time passing, with clients that take what they are sent; up to so many bytes.
    /// Whether there may be more.
    pub fn exhaust(&mut self, mut most: usize) -> bool {
        loop {
            let mut moved = self.stage.work();
            for index in 0..self.clients.len() {
                let taken = self.clients[index].take(most.min(1 << 20));
                moved |= taken > 0;
                most -= taken;
            }
            self.look();
            if !moved || most == 0 {
                return most == 0;
            }
        }
    }

    /// Everybody has been answered who has asked for something, and everything sent was taken.
    pub fn assert_answered(&self) {
        use nbdcaptive_actors::device::ThreadModel;
        let one_by_one = self.setting.thread_model() == ThreadModel::SerializeConnections;
        for client in self.clients.iter().filter(|client| !client.is_gone) {
            let waits = one_by_one && self.clients.len() > 1 && !client.talk.is_transmission();
            assert!(waits || client.talk.is_answered(), "a client waits for an answer that does not come");
            assert!(waits || client.wire.all_taken(), "the server does not listen to a client that it owes nothing");
        }
    }

    /// Asks for the end.
    pub fn shut_down(&mut self, cause: impl FnOnce(&Handle)) {
        if !self.is_ending {
            self.is_ending = true;
            self.clients.iter_mut().for_each(|client| client.talk.promise());
        }
        cause(&self.handle);
    }

    /// Everybody leaves and the server ends.
    pub fn end(mut self) -> Outcome {
        for client in &mut self.clients {
            client.leave();
        }
        self.exhaust(usize::MAX);
        if let Some(door) = self.door.take()
            && !self.is_ending
            && !self.setting.exit_last()
        {
            drop(door);
            self.shut_down(|handle| handle.shut_down(Cause::Requested));
        } else if self.setting.exit_last() && !self.outcome.is_finished() {
            // Perhaps nobody was ever let in.
            self.shut_down(|handle| handle.shut_down(Cause::Requested));
        }
        let all_gone = self.stage.simulation.elapsed();
        loop {
            self.exhaust(usize::MAX);
            if self.outcome.is_finished() {
                break;
            }
            assert!(self.stage.simulation.advance(), "the server hangs at its end");
            let taken = self.stage.simulation.elapsed() - all_gone;
            assert!(taken <= END, "everybody has left, and after {taken:?} the server has not ended");
        }
        let Play { stage, outcome, clients, lines: _lines, .. } = self;
        drop(clients);
        let outcome = smol::future::block_on(outcome);
        stage.work();
        assert!(stage.executor.is_empty(), "something of the server goes on after its end");
        assert!(!matches!(outcome.cause, Cause::Fatal(_)), "{outcome:?}");
        outcome
    }
}

impl Client {
    /// Sends `count` bytes of what is held.
    pub fn send_held(&mut self, count: usize) {
        let rest = self.held.split_off(count.min(self.held.len()));
        let bytes = std::mem::replace(&mut self.held, rest);
        if !self.is_gone && !self.has_left {
            self.wire.send(&bytes);
            self.talk.sent(&bytes);
        }
    }

    /// Takes up to `count` bytes. How many there were.
    pub fn take(&mut self, count: usize) -> usize {
        let bytes = self.wire.take(count);
        self.talk.received(&bytes);
        bytes.len()
    }

    /// Nothing more will be sent.
    pub fn leave(&mut self) {
        self.has_left = true;
        self.talk.may_close();
        self.wire.finish();
    }

    /// Gone without a word.
    pub fn cut(&mut self) {
        (self.is_gone, self.was_cut) = (true, true);
        self.wire.cut();
    }
}

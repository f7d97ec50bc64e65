//! Drives one world: ticks the server, lets calls return, bytes arrive, clients act and time pass, all as the dice fall; and
//! looks whether everything that was promised comes true.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use async_channel::Sender;
use nbdcaptive_actors::device::ThreadModel;
use nbdcaptive_actors::log::{Level, Log};
use nbdcaptive_actors::simulation::Simulation;
use nbdcaptive_actors::transport::Transport;
use nbdcaptive_actors::{Cause, Handle, Running, Server, SessionId};
use smol::Executor;

use crate::chance::Chance;
use crate::disk::{Disk, Shelf};
use crate::trace::Entry;
use crate::universe::*;
use crate::wire::Wire;

pub struct World {
    shared: Shared,
    simulation: Arc<Simulation>,
    executor: Arc<Executor<'static>>,
    arrivals: Sender<Box<dyn Transport>>,
    handle: Handle,
}

/// A promise that was broken, and what led to it.
pub struct Failure {
    pub why: String,
    pub trace: Vec<Entry>,
}

/// How often a world that is to settle is looked at before it is said to run in circles.
const ROUNDS: usize = 200_000;
/// How deep calls are under way within calls.
const DEPTH: usize = 3;

struct Lines(Shared);

impl Log for Lines {
    fn wants(&self, _level: Level) -> bool {
        lock(&self.0).whole_trace
    }
    fn line(&self, _level: Level, session: Option<SessionId>, line: std::fmt::Arguments<'_>) {
        let mut universe = lock(&self.0);
        if universe.whole_trace {
            let line = session.map_or(format!("{line}"), |session| format!("{session}: {line}"));
            let at = universe.simulation.elapsed();
            universe.trace.push(Entry::Line { at, line });
        }
    }
}

/// The event of `Server::exit_when`.
struct Fired(Shared);

impl Future for Fired {
    type Output = String;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<String> {
        let end = &mut lock(&self.0).end;
        if end.event_fired {
            return Poll::Ready("it has happened".into());
        }
        end.event_waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Plays the world of this seed to its end. With `whole`, the trace has the server's log in it.
pub fn play(seed: u64, whole: bool) -> Result<Vec<Entry>, Failure> {
    let mut chance = Chance::new(seed);
    let config = Config::random(&mut chance);
    let simulation = Simulation::new();
    // Half of it holds nothing.
    let mut bytes = PATTERN[..config.data].to_vec();
    bytes.chunks_mut(16 << 10).for_each(|chunk| chunk[..4096].fill(0));
    bytes[config.data / 2..].fill(0);
    let universe = Universe {
        config,
        chance,
        simulation: Arc::clone(&simulation),
        clients: Vec::new(),
        disk: Disk { bytes, ..Disk::default() },
        end: End::default(),
        clock: 0,
        generous: false,
        within: Vec::new(),
        hung: 0,
        trace: Vec::new(),
        whole_trace: whole,
        broken: None,
    };
    let shared = Arc::new(Mutex::new(universe));
    let played = catch_unwind(AssertUnwindSafe(|| World::run(&shared, &simulation)));
    let mut universe = lock(&shared);
    if whole {
        let line = format!("{:?}", universe.config);
        universe.trace.insert(0, Entry::Line { at: Duration::ZERO, line });
    }
    let trace = std::mem::take(&mut universe.trace);
    match (played, universe.broken.take()) {
        (_, Some(why)) => Err(Failure { why, trace }),
        (Err(_), None) => Err(Failure { why: "the server panicked".into(), trace }),
        (Ok(()), None) => Ok(trace),
    }
}

impl World {
    fn run(shared: &Shared, simulation: &Arc<Simulation>) {
        let executor = Arc::new(Executor::new());
        let (arrivals, clients) = async_channel::unbounded();
        let (world, running) = World::start(shared, simulation, &executor, arrivals, clients);
        world.serve();
        world.finish();
        world.clean_up(running);
        drop(world);
        // With it goes what was detached.
        drop(executor);
        let universe = &mut *lock(shared);
        // Calls that never return hold on to what they were made with.
        if universe.hung == 0
            && let Some(left) = universe.disk.instances.iter().find(|instance| !instance.dropped)
        {
            let client = left.client;
            universe.break_promise(Some(client), "its device is still there when all is over".into());
        }
        if let Some(id) = universe.clients.iter().position(|client| client.alive) {
            universe.break_promise(Some(id), "its connection is still there when all is over".into());
        }
    }

    fn start(
        shared: &Shared,
        simulation: &Arc<Simulation>,
        executor: &Arc<Executor<'static>>,
        arrivals: Sender<Box<dyn Transport>>,
        clients: async_channel::Receiver<Box<dyn Transport>>,
    ) -> (Arc<World>, Arc<Running>) {
        let only = {
            let universe = &mut *lock(shared);
            universe.config.only.then(|| {
                let client = universe.new_client();
                Wire { shared: Arc::clone(shared), client }
            })
        };
        let mut started = None;
        let world = Arc::new_cyclic(|world| {
            let shelf = Shelf { shared: Arc::clone(shared), world: world.clone() };
            let mut server =
                Server::new(Arc::new(shelf)).simulated(simulation).log(Arc::new(Lines(Arc::clone(shared))));
            {
                let config = &lock(shared).config;
                server = server
                    .threads(config.threads)
                    .read_only(config.read_only)
                    .structured_replies(config.structured)
                    .meta_contexts(config.contexts)
                    .mask_handshake(config.handshake_flags)
                    .handshake_timeout(config.handshake_timeout)
                    .drain_timeout(config.drain)
                    .max_clients(config.max_clients)
                    .exit_last(config.exit_last);
                if config.event {
                    server = server.exit_when(Box::pin(Fired(Arc::clone(shared))));
                }
            }
            let (refusing, ending) = (Arc::clone(shared), Arc::clone(shared));
            server = server
                .before_refusing(move || lock(&refusing).end.refused_hooks += 1)
                .at_end(move || lock(&ending).end.end_hooks += 1);
            server = match only {
                Some(wire) => server.serve_one(wire),
                None => server.clients(clients),
            };
            // Nothing that could fail was asked for: there is no socket.
            let running = Arc::new(server.start(executor).expect("a server without sockets starts"));
            let handle = running.handle();
            started = Some(running);
            World {
                shared: Arc::clone(shared),
                simulation: Arc::clone(simulation),
                executor: Arc::clone(executor),
                arrivals,
                handle,
            }
        });
        let running = started.expect("the closure has run");
        let (waiting, told) = (Arc::clone(&running), Arc::clone(shared));
        let task = executor.spawn(async move {
            let outcome = waiting.wait().await;
            let mut universe = lock(&told);
            universe.note(None, "the outcome is told", outcome.exit_status() as u64, 0);
            universe.end.outcome = Some((outcome, universe.simulation.elapsed()));
        });
        task.detach();
        (world, running)
    }

    fn is_over(&self) -> bool {
        let universe = lock(&self.shared);
        universe.broken.is_some() || universe.end.outcome.is_some()
    }

    /// Until the server ends, or enough has happened.
    fn serve(&self) {
        let steps = lock(&self.shared).config.steps;
        for _ in 0..steps {
            if self.is_over() {
                return;
            }
            self.step(true);
            if lock(&self.shared).chance.one_in(150) {
                self.settle();
            }
        }
        self.settle();
    }

    /// Does one thing, and says whether there was anything to do. Time passes by itself only with `hasty`.
    fn step(&self, hasty: bool) -> bool {
        const WAYS: usize = 8;
        let (first, haste) = {
            let universe = &mut *lock(&self.shared);
            let first = universe.chance.below(WAYS);
            let haste = universe.config.haste;
            (first, hasty && universe.chance.one_in(haste))
        };
        if haste && self.pass_time() {
            let universe = &mut *lock(&self.shared);
            universe.end.hurried |= universe.may_drain();
            return true;
        }
        (0..WAYS).any(|way| match (first + way) % WAYS {
            0 | 1 => self.tick(),
            2 => self.let_a_call_return(),
            3 => self.somebody(|world, id| world.wake(id)),
            4 => self.somebody(|world, id| lock(&world.shared).think(id)),
            5 => self.somebody(|world, id| lock(&world.shared).arrive(id)),
            6 => self.somebody(|world, id| lock(&world.shared).read(id)),
            _ => self.connect() || self.order(),
        })
    }

    /// Runs some of the server, as a thread that may be interrupted anywhere would.
    fn tick(&self) -> bool {
        let count = lock(&self.shared).chance.piece(40);
        (0..count).take_while(|_| self.executor.try_tick()).count() > 0
    }

    fn let_a_call_return(&self) -> bool {
        let waiting = self.simulation.calls();
        let index = {
            let universe = &mut *lock(&self.shared);
            if universe.config.hangs
                && !universe.generous
                && universe.hung < waiting.min(2)
                && universe.chance.one_in(20)
            {
                universe.hung += 1;
                universe.note(None, "a call will never return", 0, 0);
            }
            if waiting <= universe.hung {
                return false;
            }
            let index = universe.hung + universe.chance.below(waiting - universe.hung);
            universe.note(None, "a thread makes call", index as u64, waiting as u64);
            index
        };
        self.simulation.run_call(index)
    }

    /// Any client for whom this does something.
    fn somebody(&self, act: impl Fn(&World, usize) -> bool) -> bool {
        let (count, first) = {
            let universe = &mut *lock(&self.shared);
            let count = universe.clients.len();
            if count == 0 {
                return false;
            }
            (count, universe.chance.below(count))
        };
        (0..count).any(|next| act(self, (first + next) % count))
    }

    /// Wakes the server for what has become possible.
    fn wake(&self, id: usize) -> bool {
        let word = {
            let universe = &mut *lock(&self.shared);
            let client = &mut universe.clients[id];
            let receive = client.receive_due.then(|| client.receiver.take()).flatten();
            let send = client.send_due.then(|| client.sender.take()).flatten();
            (client.receive_due, client.send_due) = (false, false);
            let word = receive.into_iter().chain(send).collect::<Vec<_>>();
            if !word.is_empty() {
                universe.note(Some(id), "wakes the server", word.len() as u64, 0);
            }
            word
        };
        let any = !word.is_empty();
        word.into_iter().for_each(std::task::Waker::wake);
        any
    }

    fn connect(&self) -> bool {
        let wire = {
            let universe = &mut *lock(&self.shared);
            if universe.clients.len() >= universe.config.clients || !universe.chance.one_in(3) {
                return false;
            }
            let client = universe.new_client();
            universe.clients[client].since = self.simulation.elapsed();
            universe.note(Some(client), "connects", 0, 0);
            Wire { shared: Arc::clone(&self.shared), client }
        };
        // Where nobody listens any more it is dropped.
        let _ = self.arrivals.try_send(Box::new(wire));
        true
    }

    /// Gives a reason to end, if it is time for one.
    fn order(&self) -> bool {
        let waker = {
            let universe = &mut *lock(&self.shared);
            let (ends, steps) = (universe.config.ends, universe.config.steps as u32);
            if universe.chance.one_in(ends) {
                let signal = universe.chance.one_in(2);
                Self::give_order(universe, &self.handle, signal);
                return true;
            }
            if !universe.config.event || universe.end.event_fired || !universe.chance.one_in(steps / 8) {
                return false;
            }
            universe.fire();
            universe.end.event_waker.take()
        };
        waker.into_iter().for_each(std::task::Waker::wake);
        true
    }

    fn give_order(universe: &mut Universe, handle: &Handle, signal: bool) {
        let now = universe.simulation.elapsed();
        let cause = if signal { Cause::Signal(15) } else { Cause::Requested };
        universe.note(None, "the server is told to end", u64::from(signal), 0);
        if signal {
            handle.signal(15);
            let first = *universe.end.first_signal.get_or_insert(now);
            universe.end.at_once |= now >= first + SECOND_SIGNAL;
        } else {
            handle.shut_down(Cause::Requested);
        }
        universe.end.orders.push(cause);
        universe.end.ordered.get_or_insert(now);
    }

    fn pass_time(&self) -> bool {
        // Threads, clients and wires may be slow; the server itself is quick beside any time that is waited for.
        let mut ticked = false;
        while self.executor.try_tick() {
            ticked = true;
        }
        let passed = self.simulation.advance();
        let universe = &mut *lock(&self.shared);
        if passed {
            universe.note(None, "time passes", 0, 0);
        }
        if let Some(ordered) = universe.end.ordered
            && universe.end.outcome.is_none()
            && self.simulation.elapsed() > ordered + universe.config.drain + CLOSE
        {
            universe
                .break_promise(None, "the end takes longer than its drain timeout and what a close may take".into());
        }
        passed || ticked
    }

    /// For a call of the device that may wait: the world goes on during it.
    pub fn dwell(&self, id: usize) {
        let (steps, settles) = {
            let universe = &mut *lock(&self.shared);
            let dwells = universe.config.dwells;
            if universe.generous || universe.within.len() >= DEPTH || !universe.chance.one_in(dwells) {
                return;
            }
            universe.within.push(id);
            (universe.chance.piece(30), universe.chance.one_in(20))
        };
        for _ in 0..steps {
            if self.is_over() || !self.step(true) {
                break;
            }
        }
        if settles {
            self.settle();
        }
        lock(&self.shared).within.pop();
    }

    /// Lets happen all that can happen without more time, new clients or new requests. Then nobody may be waiting who need not.
    fn settle(&self) {
        {
            let universe = &mut *lock(&self.shared);
            if universe.hung > 0 || universe.generous || universe.end.outcome.is_some() {
                return;
            }
            universe.note(None, "settles", 0, 0);
            universe.generous = true;
        }
        let clients = lock(&self.shared).clients.len();
        for round in 0.. {
            let mut any = self.tick();
            any |= self.let_a_call_return();
            for id in 0..clients {
                any |= self.wake(id);
                let universe = &mut *lock(&self.shared);
                if universe.clients[id].is_willing() {
                    any |= universe.arrive(id);
                    any |= universe.read(id);
                }
            }
            if !any || self.is_over() {
                break;
            }
            if round > ROUNDS {
                lock(&self.shared).break_promise(None, "the server runs in circles".into());
                break;
            }
        }
        let universe = &mut *lock(&self.shared);
        universe.generous = false;
        universe.note(None, "has settled", 0, 0);
        if universe.end.outcome.is_none() && universe.broken.is_none() {
            universe.check_settled();
        }
    }

    /// Ends the server, if nothing else has, and waits for the outcome.
    fn finish(&self) {
        if !self.is_over() {
            let universe = &mut *lock(&self.shared);
            if universe.end.orders.is_empty() {
                let signal = universe.chance.one_in(2);
                Self::give_order(universe, &self.handle, signal);
            }
        }
        while !self.is_over() {
            let (calm, second, settles) = {
                let universe = &mut *lock(&self.shared);
                let second = universe.config.ends > 0 && universe.chance.one_in(40);
                (universe.config.calm, second, universe.chance.one_in(40))
            };
            if second {
                Self::give_order(&mut lock(&self.shared), &self.handle, true);
            }
            if settles {
                self.settle();
            }
            if !self.is_over() && !self.step(!calm) && !self.pass_time() {
                let universe = &mut *lock(&self.shared);
                universe
                    .break_promise(None, "nothing can happen any more, and the outcome was not told: it hangs".into());
            }
        }
        // The one who is told may have been so while others were in the middle of something.
        let universe = &mut *lock(&self.shared);
        if universe.broken.is_none() {
            universe.check_outcome();
        }
    }

    fn clean_up(&self, running: Arc<Running>) {
        lock(&self.shared).generous = true;
        while self.executor.try_tick() {}
        drop(running);
        // What hung returns after all, to nobody.
        while self.simulation.run_call(0) {
            while self.executor.try_tick() {}
        }
        lock(&self.shared).hung = 0;
        while self.executor.try_tick() {}
    }
}

impl Universe {
    fn fire(&mut self) {
        self.note(None, "the event happens", 0, 0);
        self.end.event_fired = true;
        self.end.lonely |= !self.clients.iter().any(|client| client.alive && client.stage == Stage::Transmission);
        self.end.lonely_since = self.end.lonely_since.or_else(|| self.end.lonely.then(|| self.simulation.elapsed()));
    }

    /// Some of what the client has sent arrives. Whether there was anything.
    fn arrive(&mut self, id: usize) -> bool {
        let client = &mut self.clients[id];
        if client.stalled || client.over.is_some() || !client.alive {
            return false;
        }
        let coming = client.up.len() - client.arrived;
        let room = client.capacity.saturating_sub(client.arrived);
        let mut count = coming.min(if self.generous { coming } else { room });
        if count == 0 && (coming > 0 || client.leaving.is_none()) {
            return false;
        }
        if self.config.in_pieces && !self.generous && count > 0 {
            count = self.chance.piece(count);
        }
        let there = client.taken + client.arrived as u64;
        if let Some(at) = client.cut_up {
            count = count.min((at.max(there) - there) as usize);
        }
        client.arrived += count;
        let is_cut = client.cut_up.is_some_and(|at| client.taken + client.arrived as u64 >= at);
        if is_cut {
            client.up.truncate(client.arrived);
            client.may_be_closed = true;
            client.leaving = Some(self.chance.pick(&[Over::Eof, Over::Reset]));
            client.lost_its_way = true;
        }
        if client.arrived == client.up.len() && client.leaving.is_some() {
            client.over = client.leaving;
            if client.over == Some(Over::Reset) || (is_cut && self.chance.one_in(2)) {
                client.broken_pipe =
                    Some(self.chance.pick(&[std::io::ErrorKind::BrokenPipe, std::io::ErrorKind::ConnectionReset]));
            }
        }
        client.receive_due |= client.is_readable();
        client.send_due |= client.broken_pipe.is_some();
        let over = client.over.is_some();
        self.note(Some(id), "bytes arrive", count as u64, u64::from(over));
        true
    }

    /// The client reads some of what it was sent. Whether there was anything.
    fn read(&mut self, id: usize) -> bool {
        let client = &mut self.clients[id];
        if client.floods && self.chance.one_in(400) {
            client.floods = false;
            client.room = usize::MAX;
        }
        let there = client.sent - client.read;
        if client.stalled || client.floods && client.stage == Stage::Transmission || there == 0 {
            return false;
        }
        let mut count = there;
        if self.config.in_pieces && !self.generous {
            count = self.chance.piece(there as usize) as u64;
        }
        client.read += count;
        while client.unread.front().is_some_and(|end| *end <= client.read) {
            client.unread.pop_front();
        }
        client.send_due = true;
        self.note(Some(id), "reads", count, 0);
        true
    }

    /// Nothing more happens by itself: whoever is willing has got what is due to it.
    fn check_settled(&mut self) {
        let hard = !self.end.orders.is_empty() || self.end.panicked;
        let alive = self.clients.iter().filter(|client| client.alive).count();
        if self.config.max_clients.is_some_and(|most| alive > most) && !self.config.only {
            return self.break_promise(None, format!("{alive} clients are connected"));
        }
        // One call at a time, and one is under way: everybody waits for it.
        if !self.within.is_empty() && (self.config.model == ThreadModel::SerializeAllRequests || hard) {
            return;
        }
        let now = self.simulation.elapsed();
        let mut waited_for = 0;
        for id in 0..self.clients.len() {
            let client = &self.clients[id];
            let is_busy = self.within.contains(&id);
            let takes_turns = self.config.model == ThreadModel::SerializeConnections
                && alive > 1
                && client.stage == Stage::Options
                && !client.asked.is_empty();
            if !client.alive || is_busy {
                continue;
            }
            let late = client.stage != Stage::Transmission
                && self.config.handshake_timeout.is_some_and(|limit| now > client.since + limit);
            if late {
                let why = format!("it negotiates since {:?}, which is longer than it may", client.since);
                return self.break_promise(Some(id), why);
            }
            if !client.is_willing() {
                waited_for += usize::from(!client.inbox.is_empty() || client.stage == Stage::Transmission);
                continue;
            }
            if hard {
                return self.break_promise(Some(id), "it is still connected although the server is ending".into());
            }
            if takes_turns || self.may_drain() {
                continue;
            }
            if let Some((asked, _)) = client.asked.front() {
                return self.break_promise(Some(id), format!("{asked:?} is not answered"));
            }
            if let Some(index) = client.open.values().next()
                && !client.lost_its_way
            {
                let why = format!("{:?} is not answered", client.requests[*index]);
                return self.break_promise(Some(id), why);
            }
            if !client.up.is_empty() {
                let why = format!("{} bytes of it are not taken", client.up.len());
                return self.break_promise(Some(id), why);
            }
            if client.said_goodbye {
                return self.break_promise(Some(id), "it has said goodbye and is still connected".into());
            }
        }
        if !self.within.is_empty() {
            return;
        }
        if hard && waited_for == 0 {
            return self.break_promise(None, "nobody is waited for, and the outcome is not told".into());
        }
        // Where it counts, the last has left.
        if alive == 0 && (self.end.any_served && self.config.exit_last || self.config.only) {
            return self.break_promise(None, "the last client has left, and the server has not ended".into());
        }
        if alive == 0 && self.end.event_fired {
            self.break_promise(None, "the event has happened and nobody is there, and the server has not ended".into());
        }
    }

    /// The server says that it has ended: is it so, and for the right reason?
    fn check_outcome(&mut self) {
        let Some((outcome, at)) = self.end.outcome.clone() else { return };
        let cut_off = self.may_be_cut_off();
        if let Some(ordered) = self.end.ordered
            && at > ordered + self.config.drain + CLOSE
        {
            self.break_promise(None, format!("ordered at {ordered:?}, the end came at {at:?}"));
        }
        // Where all that could happen has happened before time went on, only those who take no replies were waited for.
        if let Some(ordered) = self.end.ordered
            && !self.end.hurried
            && self.hung == 0
            && at > ordered + STALL
        {
            self.break_promise(None, format!("ordered at {ordered:?}, the end came at {at:?} for no reason"));
        }
        let end = &self.end;
        let possible = match &outcome.cause {
            Cause::LastClientLeft => self.config.exit_last && end.any_counted,
            Cause::ClientGone { .. } => self.config.only,
            Cause::Event(what) => end.event_fired && what == "it has happened",
            Cause::Fatal(why) => end.panicked && why.contains("as the dice fell"),
            cause => end.orders.first() == Some(cause),
        };
        // An order counts from the moment it is given, unless something else has come before it.
        let nothing_else = !end.lonely && !end.event_fired && !end.panicked;
        if !possible || (nothing_else && end.orders.first() != Some(&outcome.cause)) {
            let why = format!("it ended because of {:?}, and the orders were {:?}", outcome.cause, end.orders);
            return self.break_promise(None, why);
        }
        let hooks = (end.refused_hooks, end.end_hooks);
        if hooks != (u32::from(!self.config.only), 1) {
            return self.break_promise(None, format!("the hooks were called {hooks:?} times"));
        }
        // A result may be lost with whoever waited for it, where the server gave up.
        let failed = end.failed || end.panicked;
        if !cut_off && failed != outcome.failure.is_some() {
            return self.break_promise(None, format!("the failure is told as {:?}", outcome.failure));
        }
        if cut_off {
            return;
        }
        if let Some(id) = self.clients.iter().position(|client| client.alive) {
            return self.break_promise(Some(id), "the server has ended and its connection is open".into());
        }
        let waited_for = |client| !self.may_be_left_behind(client);
        if let Some(open) = self.disk.instances.iter().find(|open| !open.closed && waited_for(open.client)) {
            let id = open.client;
            return self.break_promise(Some(id), "the server has ended and its device was not closed".into());
        }
        if self.disk.unloaded != u32::from(self.config.unloads) {
            let why = format!("the disk was unloaded {} times", self.disk.unloaded);
            return self.break_promise(None, why);
        }
        if self.config.capabilities.flush && outcome.failure.is_none() {
            let lost = self.disk.acknowledged.iter().find(|effect| self.disk.effects[**effect].durable.is_none());
            if let Some(lost) = lost {
                let why = format!("acknowledged and not on stable storage at the end: {:?}", self.disk.effects[*lost]);
                return self.break_promise(None, why);
            }
        }
        if self.end.hurried {
            return;
        }
        for id in 0..self.clients.len() {
            let client = &self.clients[id];
            // Whoever reads gets the answer to what was begun.
            let deaf = client.stalled
                || client.flooded
                || client.cut_down.is_some()
                || client.lost_its_way
                || client.over == Some(Over::Reset);
            let begun = |index: &usize| client.requests[*index].called != Called::No;
            if !deaf && let Some(index) = client.open.values().copied().find(|index| begun(index)) {
                let why = format!("{:?} was begun and never answered", client.requests[index]);
                return self.break_promise(Some(id), why);
            }
        }
    }
}

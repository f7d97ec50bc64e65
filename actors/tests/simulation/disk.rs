//! The disk that is served: plain bytes, what of it is on stable storage, and every call that the server makes.
//!
//! It is as unkind as the contract of a device allows: a flush covers only what had returned when it began, and only of its own
//! connection unless it says otherwise; what a call would have to wait for is up to chance; and where a call may wait, the world
//! goes on during it.

use std::sync::{Arc, Weak};

use nbdcaptive_actors::device::{
    Blocks, Call, Capabilities, Client, Device, Error, ErrorCode, Export, Exports, Extents, Flags, MetaContext, Result,
    Segments, Support, ThreadModel,
};

use crate::codec::*;
use crate::judge::is_zero;
use crate::universe::{Bytes, Called, PATTERN, Request, Shared, Universe, lock};
use crate::world::World;

/// A change of the disk.
#[derive(Debug)]
pub struct Effect {
    pub client: usize,
    pub instance: usize,
    pub returned: Option<u64>,
    /// When it was on stable storage.
    pub durable: Option<u64>,
}

/// One that was opened.
#[derive(Debug, Default)]
pub struct Instance {
    pub client: usize,
    pub closed: bool,
    pub dropped: bool,
    /// How many of its calls are under way.
    pub active: usize,
    /// When its last flush has failed, by the clock.
    pub flush_failed: Option<u64>,
}

#[derive(Default)]
pub struct Disk {
    pub bytes: Vec<u8>,
    pub effects: Vec<Effect>,
    /// Those of them that are not on stable storage.
    pub volatile: Vec<usize>,
    /// Those whose requests were answered, in that order.
    pub acknowledged: Vec<usize>,
    pub instances: Vec<Instance>,
    /// What a call that has just returned must be followed by, on the same thread and before anything else: the request's rest.
    pub straight: Option<(usize, usize)>,
    /// Calls of any kind that are under way.
    pub active: usize,
    pub unloaded: u32,
}

/// What a device is asked.
enum Ask<'a> {
    Read { length: u64, offset: u64, whole: bool },
    Write { data: &'a [u8], offset: u64, flags: Flags },
    Flush,
    Trim { length: u64, offset: u64, flags: Flags },
    Zero { length: u64, offset: u64, flags: Flags },
    Cache { length: u64, offset: u64 },
    Map { length: u64, offset: u64, one: bool, context: usize },
}

/// A call under way.
struct Ticket {
    request: Option<usize>,
    effect: Option<usize>,
    /// What a flush covers.
    covers: Vec<usize>,
    began: u64,
}

impl Universe {
    /// The request that this call is for: among those that the server has and that no call was made for.
    fn match_request(&self, id: usize, kind: u16, offset: u64, fits: impl Fn(&Request) -> bool) -> Option<usize> {
        let client = &self.clients[id];
        client.ranges.get(&(kind, offset))?.iter().copied().find(|index| {
            let request = &client.requests[*index];
            request.taken.is_some() && request.called == Called::No && fits(request)
        })
    }

    /// Takes a call in. `None`: it would have to wait.
    fn begin(&mut self, instance: usize, ask: &Ask<'_>, may_block: bool) -> Option<Ticket> {
        let id = self.disk.instances[instance].client;
        let straight = self.disk.straight.take();
        if straight.is_some_and(|(client, _)| client != id) {
            self.break_promise(Some(id), "its call comes in the middle of another client's request".into());
        }
        if !may_block && self.chance.one_in(self.config.would_block) {
            self.note(Some(id), "the device would have to wait", 0, 0);
            if let Some((client, index)) = straight {
                // All of it is done again.
                self.clients[client].requests[index].called = Called::No;
                self.clients[client].begun -= 1;
                self.clients[client].requests[index].progress = 0;
                self.clients[client].requests[index].maps.clear();
            }
            return None;
        }
        self.check_turn(instance, may_block);
        let emulated = |support: Support| support == Support::Emulate;
        // What is written or read at a time where zeroes or caching are emulated: as much as a client could ask for.
        let piece = self.config.max_payload();
        let wants_fua = |universe: &Universe, request: &Request| {
            request.flags & FUA != 0 && universe.config.capabilities.fua == Support::Native
        };
        let mut effect = false;
        let request = match *ask {
            Ask::Flush => {
                // After a write with FUA, or for a request of its own; which one does not matter.
                straight.map(|(_, index)| index)
            }
            Ask::Read { length, offset, whole: true } => {
                self.match_request(id, READ, offset, |request| (request.offset, request.length) == (offset, length))
            }
            Ask::Read { length, offset, whole: false } => {
                let next = |request: &Request| {
                    request.offset + request.progress == offset
                        && length == piece.min(request.length - request.progress)
                };
                let found = straight.map(|(_, index)| index).or_else(|| self.match_request(id, CACHE, offset, next));
                found.filter(|index| {
                    emulated(self.config.capabilities.cache) && next(&self.clients[id].requests[*index])
                })
            }
            Ask::Write { data, offset, flags } => {
                effect = true;
                let zeroes = data.first() == Some(&0);
                let next = |request: &Request| {
                    request.offset + request.progress == offset
                        && data.len() as u64 == piece.min(request.length - request.progress)
                };
                let found = if zeroes {
                    straight
                        .map(|(_, index)| index)
                        .or_else(|| self.match_request(id, WRITE_ZEROES, offset, next))
                        .filter(|index| data.iter().all(|byte| *byte == 0) && next(&self.clients[id].requests[*index]))
                } else {
                    self.match_request(id, WRITE, offset, |request| {
                        (request.offset, request.length) == (offset, data.len() as u64)
                    })
                };
                if let Some(request) = found.map(|index| &self.clients[id].requests[index]) {
                    if !zeroes && PATTERN[request.data.clone()] != *data {
                        let why = format!("other data than it wrote reaches the device at {offset}");
                        self.break_promise(Some(id), why);
                    } else if flags.fua != wants_fua(self, request) {
                        self.break_promise(Some(id), format!("a write at {offset} has the wrong FUA flag"));
                    }
                }
                found
            }
            Ask::Trim { length, offset, flags } => {
                effect = true;
                let found = self
                    .match_request(id, TRIM, offset, |request| (request.offset, request.length) == (offset, length));
                found.filter(|index| flags.fua == wants_fua(self, &self.clients[id].requests[*index]))
            }
            Ask::Zero { length, offset, flags } => {
                effect = true;
                let found = self.match_request(id, WRITE_ZEROES, offset, |request| {
                    (request.offset, request.length) == (offset, length)
                });
                found.filter(|index| {
                    let request = &self.clients[id].requests[*index];
                    flags.fua == wants_fua(self, request)
                        && flags.may_trim == (request.flags & NO_HOLE == 0)
                        && flags.fast == (request.flags & FAST_ZERO != 0)
                })
            }
            Ask::Cache { length, offset } => {
                self.match_request(id, CACHE, offset, |request| (request.offset, request.length) == (offset, length))
            }
            Ask::Map { length, offset, one, context } => {
                let fits = |request: &Request| {
                    (request.offset, request.length, request.flags & REQ_ONE != 0) == (offset, length, one)
                        && self.maps(request).any(|other| other == context)
                        && request.maps.iter().all(|(other, _)| *other != context)
                };
                let found =
                    straight.map(|(_, index)| index).or_else(|| self.match_request(id, BLOCK_STATUS, offset, fits));
                found.filter(|index| fits(&self.clients[id].requests[*index]))
            }
        };
        let (what, offset, length) = match ask {
            Ask::Read { length, offset, .. } => ("the device reads", *offset, *length),
            Ask::Write { data, offset, .. } => ("the device writes", *offset, data.len() as u64),
            Ask::Flush => ("the device flushes", 0, 0),
            Ask::Trim { length, offset, .. } => ("the device trims", *offset, *length),
            Ask::Zero { length, offset, .. } => ("the device zeroes", *offset, *length),
            Ask::Cache { length, offset } => ("the device caches", *offset, *length),
            Ask::Map { length, offset, .. } => ("the device maps", *offset, *length),
        };
        self.note(Some(id), what, offset, length);
        match request {
            Some(index) => {
                if !self.faults(id, index).is_empty() {
                    self.break_promise(Some(id), format!("{what} at {offset} for a request that is illegal"));
                }
                let was = std::mem::replace(&mut self.clients[id].requests[index].called, Called::Running);
                self.clients[id].begun += usize::from(was == Called::No);
            }
            None if matches!(ask, Ask::Flush) => {}
            None => self.break_promise(Some(id), format!("{what} {length} at {offset}, which nobody asked for")),
        }
        let effect = effect.then(|| {
            let effect = self.disk.effects.len();
            self.disk.effects.push(Effect { client: id, instance, returned: None, durable: None });
            self.disk.volatile.push(effect);
            if let Some(index) = request {
                self.clients[id].requests[index].effects.push(effect);
            }
            effect
        });
        let mut covers = Vec::new();
        if matches!(ask, Ask::Flush) {
            let shared = self.config.capabilities.multi_conn;
            covers = self.disk.volatile.clone();
            covers.retain(|effect| {
                let effect = &self.disk.effects[*effect];
                effect.returned.is_some() && (shared || effect.client == id)
            });
        }
        self.disk.active += 1;
        self.disk.instances[instance].active += 1;
        Some(Ticket { request, effect, covers, began: self.clock })
    }

    /// The contexts for which the device is asked.
    fn maps(&self, request: &Request) -> impl Iterator<Item = usize> {
        let all = self.config.capabilities.extents;
        request.contexts.iter().copied().filter(move |context| all || *context > 0)
    }

    /// Whether as many calls are made at once as was agreed.
    fn check_turn(&mut self, instance: usize, may_block: bool) {
        let state = &self.disk.instances[instance];
        let (id, others, all) = (state.client, state.active, self.disk.active);
        let most = match self.config.model {
            ThreadModel::Parallel => self.config.threads - usize::from(may_block),
            _ => 0,
        };
        if state.closed {
            self.break_promise(Some(id), "a call is made after the close".into());
        } else if others > most {
            self.break_promise(Some(id), format!("{others} calls are under way and one more is made"));
        } else if all > 0 && self.config.model == ThreadModel::SerializeAllRequests {
            self.break_promise(Some(id), "two calls are made at once".into());
        }
    }

    /// Takes in a call that is no request.
    fn begin_alone(&mut self, id: usize) {
        if self.disk.active > 0 && self.config.model == ThreadModel::SerializeAllRequests {
            self.break_promise(Some(id), "two calls are made at once".into());
        }
        self.disk.active += 1;
    }

    /// Ends a call: `Ok` if it has done what it was asked.
    fn end(&mut self, instance: usize, ask: &Ask<'_>, ticket: Ticket) -> std::result::Result<(), ErrorCode> {
        self.disk.active -= 1;
        self.disk.instances[instance].active -= 1;
        let id = self.disk.instances[instance].client;
        let mut result = Ok(());
        if self.chance.one_in(self.config.fails) {
            result = Err(self.chance.pick(&[
                ErrorCode::Io,
                ErrorCode::NoSpace,
                ErrorCode::NotPermitted,
                ErrorCode::Invalid,
                ErrorCode::NoMemory,
                ErrorCode::NotSupported,
                ErrorCode::Overflow,
                ErrorCode::Shutdown,
            ]));
        }
        if matches!(ask, Ask::Zero { .. }) && self.config.gives_up_zeroes {
            result = Err(ErrorCode::NotSupported);
        }
        self.note(Some(id), "the device returns", result.map_or_else(|code| u64::from(code.wire()), |()| 0), 0);
        if let Some(effect) = ticket.effect {
            self.change(ask, result.is_ok());
            self.disk.effects[effect].returned = Some(self.clock);
            if matches!(ask, Ask::Zero { .. }) && result == Err(ErrorCode::NotSupported) {
                // By contract nothing was changed.
                self.make_durable(&[effect]);
            }
        }
        if matches!(ask, Ask::Flush) {
            self.disk.instances[instance].flush_failed = result.is_err().then_some(self.clock);
            if result.is_ok() {
                self.make_durable(&ticket.covers);
            }
            if ticket.request.is_none() {
                let seen = result.map_err(|code| seen(code, false));
                self.clients[id].flushes.push((ticket.began, seen));
            }
        }
        let capabilities = self.config.capabilities;
        if let Some(index) = ticket.request {
            let maps = self.maps(&self.clients[id].requests[index]).count() as u64;
            let request = &mut self.clients[id].requests[index];
            let fast = request.kind == WRITE_ZEROES && request.flags & FAST_ZERO != 0;
            let fua = request.flags & FUA != 0;
            let changes = matches!(request.kind, WRITE | TRIM | WRITE_ZEROES);
            let mut more = false;
            match ask {
                Ask::Read { length, whole: false, .. } => {
                    request.progress += length;
                    more = request.progress < request.length;
                }
                Ask::Map { .. } => {
                    request.progress += 1;
                    more = request.progress < maps;
                }
                Ask::Write { data, .. } if request.kind == WRITE_ZEROES => {
                    request.progress += data.len() as u64;
                    more = request.progress < request.length;
                }
                _ => {}
            }
            let is_flush = matches!(ask, Ask::Flush);
            more |= changes && !more && !is_flush && fua && capabilities.fua == Support::Emulate;
            // Zeroes that the device cannot make are written.
            let retried = matches!(ask, Ask::Zero { .. }) && result == Err(ErrorCode::NotSupported) && !fast;
            request.called = match result {
                Ok(()) if more => Called::Running,
                _ if retried => Called::Running,
                result => Called::Returned(result.map_err(|code| seen(code, fast))),
            };
            if retried {
                // The writes come on a thread that may wait, which this one may be.
                self.clients[id].requests[index].called = Called::No;
                self.clients[id].begun -= 1;
            } else if more && result.is_ok() {
                self.disk.straight = Some((id, index));
            }
            if let (Some(effect), true, true) =
                (ticket.effect, result.is_ok(), fua && capabilities.fua == Support::Native)
            {
                self.make_durable(&[effect]);
            }
        }
        result
    }

    fn make_durable(&mut self, effects: &[usize]) {
        for effect in effects {
            self.disk.effects[*effect].durable.get_or_insert(self.clock);
        }
        let Disk { volatile, effects, .. } = &mut self.disk;
        volatile.retain(|effect| effects[*effect].durable.is_none());
    }

    /// Changes the bytes; a call that fails may have done so, too.
    fn change(&mut self, ask: &Ask<'_>, success: bool) {
        if !success && self.chance.one_in(2) {
            return;
        }
        let has = self.disk.bytes.len() as u64;
        let part = |offset: u64, length: u64| offset.min(has) as usize..offset.saturating_add(length).min(has) as usize;
        match *ask {
            Ask::Write { data, offset, .. } => {
                let part = part(offset, data.len() as u64);
                let length = part.len();
                self.disk.bytes[part].copy_from_slice(&data[..length]);
            }
            Ask::Zero { length, offset, .. } if success => self.disk.bytes[part(offset, length)].fill(0),
            Ask::Trim { length, offset, .. } if self.chance.one_in(2) => self.disk.bytes[part(offset, length)].fill(0),
            _ => {}
        }
    }
}

/// What a client sees of a device's error. Source: proto.md "Error values": two of them are for one case each.
fn seen(code: ErrorCode, fast: bool) -> u32 {
    match code {
        ErrorCode::NotSupported if !fast => EINVAL,
        ErrorCode::Overflow => EINVAL,
        code => code.wire(),
    }
}

/// What opens the disk for a client.
pub struct Shelf {
    pub shared: Shared,
    pub world: Weak<World>,
}

impl Exports for Shelf {
    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let mut universe = lock(&self.shared);
        let known = universe.clients.iter().position(|known| known.name == client.export_name);
        let Some(id) = known else {
            universe.note(None, "an export is asked for that is not there", 0, 0);
            return Err(Error::failed(ErrorCode::Invalid, "no such export"));
        };
        if client.read_only != universe.config.read_only {
            universe.break_promise(Some(id), "the device is not told whether it is served read-only".into());
        }
        let open = universe.disk.instances.iter().any(|instance| !instance.closed && !instance.dropped);
        if universe.config.model == ThreadModel::SerializeConnections && open && !universe.may_be_cut_off() {
            universe.break_promise(Some(id), "it is opened while another client is served".into());
        }
        universe.note(Some(id), "the device is opened", 0, 0);
        universe.begin_alone(id);
        drop(universe);
        if let Some(world) = self.world.upgrade() {
            world.dwell(id);
        }
        let mut universe = lock(&self.shared);
        universe.disk.active -= 1;
        let fails = universe.config.open_fails;
        if universe.chance.one_in(fails) {
            universe.note(Some(id), "the open fails", 0, 0);
            return Err(Error::failed(ErrorCode::Io, "the open failed"));
        }
        let number = universe.disk.instances.len();
        universe.disk.instances.push(Instance { client: id, ..Instance::default() });
        Ok(Box::new(Opened { shared: Arc::clone(&self.shared), world: Weak::clone(&self.world), instance: number }))
    }

    fn list(&self, _client: &Client) -> Result<Vec<Export>> {
        let export = |name: &str| Export { name: name.into(), description: "a disk".into() };
        Ok(vec![export("one"), export("two")])
    }

    fn meta_contexts(&self, client: &Client) -> Result<Vec<MetaContext>> {
        let universe = lock(&self.shared);
        if !universe.clients.iter().any(|known| known.name == client.export_name) {
            return Err(Error::failed(ErrorCode::Invalid, "no such export"));
        }
        let own = universe.config.own_contexts;
        Ok((1..=own).map(|number| MetaContext { name: context_name(number).into(), is_wide: number == own }).collect())
    }

    fn thread_model(&self) -> ThreadModel {
        lock(&self.shared).config.model
    }

    fn unloads(&self) -> bool {
        lock(&self.shared).config.unloads
    }

    fn unload(&self) -> Result<()> {
        let mut universe = lock(&self.shared);
        universe.note(None, "the disk is unloaded", 0, 0);
        universe.disk.unloaded += 1;
        let waited_for = |client| !universe.may_be_left_behind(client);
        let is_open = universe.disk.instances.iter().any(|instance| !instance.closed && waited_for(instance.client));
        if is_open && !universe.may_be_cut_off() {
            universe.break_promise(None, "the disk is unloaded before all is closed".into());
        }
        let fails = universe.config.unload_fails;
        if universe.chance.one_in(fails) {
            universe.end.failed = true;
            return Err(Error::failed(ErrorCode::Io, "the unloading failed"));
        }
        Ok(())
    }
}

/// The disk, as one client has it.
pub struct Opened {
    shared: Shared,
    world: Weak<World>,
    instance: usize,
}

impl Opened {
    /// Makes a call. `with` fills in the answer, after it has succeeded.
    fn make(&self, call: &Call, ask: Ask<'_>, with: impl FnOnce(&mut Universe, usize, Option<usize>)) -> Result<()> {
        let mut universe = lock(&self.shared);
        let Some(ticket) = universe.begin(self.instance, &ask, call.may_block()) else {
            return Err(Error::WouldBlock);
        };
        let id = universe.disk.instances[self.instance].client;
        drop(universe);
        if call.may_block()
            && let Some(world) = self.world.upgrade()
        {
            world.dwell(id);
        }
        let mut universe = lock(&self.shared);
        let panics = universe.config.panics;
        if universe.chance.one_in(panics) {
            self.panic(universe, ticket);
        }
        let request = ticket.request;
        match universe.end(self.instance, &ask, ticket) {
            Ok(()) => {
                let client = universe.disk.instances[self.instance].client;
                with(&mut universe, client, request);
                Ok(())
            }
            Err(code) => Err(Error::failed(code, "the device failed")),
        }
    }

    fn map(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        let (mut at, length, one) = (extents.offset(), extents.length(), extents.one());
        let end = at + length;
        self.make(call, Ask::Map { length, offset: at, one, context }, |universe, id, index| {
            let unit = universe.config.min_block().max(512);
            let most = if context == 0 { 3 } else { u64::from(u32::MAX) };
            let wide = context > 0 && context == universe.config.own_contexts;
            let mut given = Vec::new();
            while at < end && given.len() < 20 {
                let length = (universe.chance.between(1, 64) * unit).min(end - at);
                let flags = universe.chance.between(0, most) << if wide { 20 } else { 0 };
                extents.add(at, length, flags);
                given.push((length, flags));
                at += length;
            }
            if let Some(index) = index {
                universe.clients[id].requests[index].maps.push((context, given));
            }
        })
    }

    fn panic(&self, mut universe: std::sync::MutexGuard<'_, Universe>, ticket: Ticket) -> ! {
        universe.end.panicked = true;
        let now = universe.simulation.elapsed();
        universe.end.ordered.get_or_insert(now);
        universe.disk.active -= 1;
        universe.disk.instances[self.instance].active -= 1;
        let id = universe.disk.instances[self.instance].client;
        universe.note(Some(id), "the device panics", 0, 0);
        if let Some(effect) = ticket.effect {
            universe.disk.effects[effect].returned = Some(universe.clock);
        }
        match ticket.request {
            Some(index) => universe.clients[id].requests[index].called = Called::Returned(Err(EIO)),
            None => universe.clients[id].flushes.push((ticket.began, Err(EIO))),
        }
        universe.disk.instances[self.instance].flush_failed = Some(universe.clock);
        drop(universe);
        // Not by `panic!`, which would print a line.
        std::panic::resume_unwind(Box::new("as the dice fell"));
    }
}

impl Device for Opened {
    fn size(&self) -> Result<u64> {
        Ok(lock(&self.shared).config.size)
    }

    fn capabilities(&self) -> Result<Capabilities> {
        Ok(lock(&self.shared).config.capabilities)
    }

    fn answers_at_once(&self) -> bool {
        lock(&self.shared).config.at_once
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        buffer.fill(0);
        self.make(call, Ask::Read { length: buffer.len() as u64, offset, whole: false }, |_, _, _| {})
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        let ask = Ask::Read { length: length as u64, offset, whole: true };
        let fill = |universe: &mut Universe, id: usize, index: Option<usize>| {
            let has = universe.disk.bytes.len() as u64;
            let part = offset.min(has) as usize..(offset + length as u64).min(has) as usize;
            let given = universe.disk.bytes[part].to_vec();
            universe.clients[id].produced += length as u64;
            universe.check_memory(id);
            let mut left = &given[..];
            while !left.is_empty() {
                let (piece, rest) = left.split_at(universe.chance.piece(left.len()).max(left.len() / 8));
                left = rest;
                match universe.chance.below(3) {
                    0 => reply.space(piece.len()).copy_from_slice(piece),
                    1 if is_zero(piece) => reply.zeroes(piece.len()),
                    // A part of what is lent, as of a page.
                    _ => reply.shared(Arc::new([&[0; 3][..], piece, &[0; 5]].concat()), 3..3 + piece.len()),
                }
            }
            if given.len() < length {
                reply.zeroes(length - given.len());
            }
            if let Some(index) = index {
                universe.clients[id].requests[index].given = Bytes(given);
            }
        };
        self.make(call, ask, fill)
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.make(call, Ask::Write { data, offset, flags }, |_, _, _| {})
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let whole = data.to_vec();
        self.make(call, Ask::Write { data: &whole, offset, flags }, |universe, _, _| {
            // Some blocks are kept; what is left in their place is of no use to anybody.
            for (block, _) in data.parts() {
                if universe.chance.one_in(2) {
                    drop(std::mem::take(block));
                } else {
                    block.bytes_mut().iter_mut().take(8).for_each(|byte| *byte = 0xee);
                }
            }
        })
    }

    fn flush(&self, call: &Call) -> Result<()> {
        self.make(call, Ask::Flush, |_, _, _| {})
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.make(call, Ask::Trim { length, offset, flags }, |_, _, _| {})
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.make(call, Ask::Zero { length, offset, flags }, |_, _, _| {})
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        self.make(call, Ask::Cache { length, offset }, |_, _, _| {})
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        self.map(0, extents, call)
    }

    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        self.map(context + 1, extents, call)
    }

    fn close(&self) -> Result<()> {
        // The last flush is made in the same breath, so that nothing can have happened since.
        let (id, flush_failed) = {
            let universe = &mut *lock(&self.shared);
            let Instance { client, flush_failed, .. } = universe.disk.instances[self.instance];
            universe.begin_alone(client);
            (client, flush_failed == Some(universe.clock))
        };
        if let Some(world) = self.world.upgrade() {
            world.dwell(id);
        }
        let mut universe = lock(&self.shared);
        universe.disk.active -= 1;
        let state = &universe.disk.instances[self.instance];
        let (closed, active) = (state.closed, state.active);
        universe.note(Some(id), "the device is closed", 0, 0);
        if closed {
            universe.break_promise(Some(id), "its device is closed twice".into());
        }
        if active > 0 {
            universe.break_promise(Some(id), format!("its device is closed during {active} calls"));
        }
        universe.disk.instances[self.instance].closed = true;
        let lost = universe.disk.volatile.iter().any(|effect| universe.disk.effects[*effect].instance == self.instance);
        if universe.config.capabilities.flush && lost && !flush_failed {
            universe.break_promise(Some(id), "its device is closed and was not flushed".into());
        }
        universe.end.failed |= flush_failed;
        let fails = universe.config.close_fails;
        if universe.chance.one_in(fails) {
            universe.end.failed = true;
            return Err(Error::failed(ErrorCode::Io, "the close failed"));
        }
        Ok(())
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut universe = lock(&self.shared);
        universe.disk.instances[self.instance].dropped = true;
        let id = universe.disk.instances[self.instance].client;
        universe.note(Some(id), "the device is dropped", 0, 0);
    }
}

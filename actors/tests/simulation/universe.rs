//! All that is known about one world: how it was made, its clients and their wires, the disk, and what was promised.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::ErrorKind;
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use nbdcaptive_actors::device::{BlockSize, Capabilities, Support, ThreadModel};
use nbdcaptive_actors::simulation::Simulation;
use nbdcaptive_actors::{Cause, Outcome};

use crate::chance::Chance;
use crate::codec::*;
use crate::disk::Disk;
use crate::trace::Entry;

/// What the server may hold of one client's requests or replies, in bytes, beside one request: `MAX_OWED` in
/// `session/transmission.rs`.
pub const MAX_OWED: u64 = 16 << 20;
/// How many requests of one client the server takes at a time: `MAX_REQUESTS` there.
pub const MAX_REQUESTS: usize = 1024;
/// What it may hold beside that: a receive buffer that was not looked at, and one behind it. Bytes.
pub const UNSEEN: u64 = 256 << 10;
/// The most that a request may carry where the device says nothing, in bytes: nbdkit's limit.
pub const MAX_PAYLOAD: u64 = 64 << 20;
/// How long sessions may take to stop when they are told to at once: `CLOSE` in `coordinator.rs`.
pub const CLOSE: Duration = Duration::from_secs(1);
/// How long the disk may take at the end for a client in the handshake: `RECALL` in `coordinator.rs`, the grace period, and
/// `COME_BACK` in `session/handshake.rs`.
pub const LEFT_BEHIND: Duration = Duration::from_secs(2 + 5 + 1);
/// How long a client that takes no replies may hold up the end: `STALL` in `session/transmission.rs`.
pub const STALL: Duration = Duration::from_secs(1);
/// When the same signal counts as a second one: `SECOND_SIGNAL` there.
pub const SECOND_SIGNAL: Duration = Duration::from_millis(250);

/// What clients write: no byte of it is zero, so that it cannot be mistaken for zeroes that the server writes.
pub static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = fastrand::Rng::with_seed(1);
    std::iter::repeat_with(|| random.u8(1..)).take(512 << 10).collect()
});

/// Everything about a world that does not change.
#[derive(Debug)]
pub struct Config {
    pub threads: usize,
    pub read_only: bool,
    pub structured: bool,
    pub contexts: bool,
    pub handshake_flags: u16,
    pub handshake_timeout: Option<Duration>,
    pub drain: Duration,
    pub max_clients: Option<usize>,
    pub exit_last: bool,
    /// Serves one client that was there before.
    pub only: bool,
    /// Speaks the oldstyle handshake, to one client.
    pub oldstyle: bool,
    /// Has an event to wait for.
    pub event: bool,

    pub model: ThreadModel,
    pub capabilities: Capabilities,
    /// How much of the disk has contents, in bytes; the rest reads as zeroes.
    pub data: usize,
    pub size: u64,
    pub at_once: bool,
    /// One call in so many that must not wait says that it would. 0 is never, here and below.
    pub would_block: u32,
    pub fails: u32,
    pub open_fails: u32,
    pub close_fails: u32,
    pub unload_fails: u32,
    pub panics: u32,
    /// `zero` says "not supported".
    pub gives_up_zeroes: bool,
    pub unloads: bool,
    /// How many metadata contexts the device has of its own; the last of them has wide flags.
    pub own_contexts: usize,
    /// During one call in so many the world goes on.
    pub dwells: u32,

    /// One attempt in so many to receive or send waits although it could go on.
    pub moody: u32,
    /// Deliveries are of random sizes.
    pub in_pieces: bool,
    /// One client in so many is cut off at some byte.
    pub cuts: u32,

    pub clients: usize,
    pub steps: usize,
    /// Time goes on at one step in so many, although something else could happen.
    pub haste: u32,
    /// Some calls never return.
    pub hangs: bool,
    /// At the end time goes on only where nothing else can happen.
    pub calm: bool,
    /// An order to end comes at one step in so many.
    pub ends: u32,
    /// One request in so many is illegal.
    pub illegal: u32,
    /// One client in so many floods the server with requests and reads nothing.
    pub floods: u32,
    /// One client in so many stops for ever at some time.
    pub stalls: u32,
}

impl Config {
    pub fn random(chance: &mut Chance) -> Config {
        let yes = |chance: &mut Chance| chance.one_in(2);
        let support =
            |chance: &mut Chance| chance.pick(&[Support::None, Support::Emulate, Support::Native, Support::Native]);
        let block_size = chance.one_in(4).then(|| BlockSize {
            minimum: chance.pick(&[1, 512, 4096]),
            preferred: 4096,
            maximum: chance.pick(&[64 << 10, 1 << 20, u32::MAX]),
        });
        let data = (chance.below(64) + 1) * 4096;
        let tail = chance.pick(&[0, 0, 0, 1 << 20, 1 << 40]);
        let odd = if block_size.is_none() && yes(chance) { chance.below(512) as u64 } else { 0 };
        let only = chance.one_in(20);
        let oldstyle = chance.one_in(30);
        Config {
            threads: chance.pick(&[1, 2, 3, 16]),
            read_only: chance.one_in(16),
            structured: !chance.one_in(8),
            contexts: !chance.one_in(8),
            handshake_flags: if chance.one_in(32) { chance.pick(&[0, NO_ZEROES]) } else { u16::MAX },
            handshake_timeout: chance.one_in(8).then(|| Duration::from_secs(chance.between(1, 20))),
            drain: Duration::from_millis(chance.pick(&[0, 100, 1000, 30_000, 30_000, 30_000, 30_000, 30_000])),
            max_clients: chance.one_in(4).then(|| chance.below(3) + 1),
            exit_last: chance.one_in(6),
            only,
            oldstyle,
            event: chance.one_in(6),
            model: chance.pick(&[
                ThreadModel::Parallel,
                ThreadModel::Parallel,
                ThreadModel::Parallel,
                ThreadModel::SerializeRequests,
                ThreadModel::SerializeAllRequests,
                ThreadModel::SerializeConnections,
            ]),
            capabilities: Capabilities {
                write: !chance.one_in(8),
                flush: !chance.one_in(8),
                trim: yes(chance),
                zero: support(chance),
                fast_zero: yes(chance),
                fua: support(chance),
                multi_conn: yes(chance),
                cache: support(chance),
                extents: yes(chance),
                rotational: chance.one_in(4),
                takes_blocks: yes(chance),
                block_size,
            },
            data,
            size: data as u64 + tail + odd,
            at_once: yes(chance),
            would_block: chance.pick(&[0, 2, 4]),
            fails: chance.pick(&[0, 0, 0, 3, 20]),
            open_fails: chance.pick(&[0, 0, 0, 6]),
            close_fails: chance.pick(&[0, 0, 0, 0, 4]),
            unload_fails: chance.pick(&[0, 0, 0, 0, 2]),
            panics: if chance.one_in(40) { 60 } else { 0 },
            gives_up_zeroes: chance.one_in(4),
            unloads: !chance.one_in(4),
            own_contexts: chance.pick(&[0, 0, 1, 3]),
            dwells: chance.pick(&[0, 2, 6]),
            moody: chance.pick(&[0, 0, 3, 8]),
            in_pieces: yes(chance),
            cuts: chance.pick(&[0, 0, 4]),
            clients: if only || oldstyle { 1 } else { chance.pick(&[1, 2, 3, 4, 6, 10]) },
            steps: chance.pick(&[100, 300, 800, 1500]),
            haste: chance.pick(&[0, 12, 80]),
            hangs: chance.one_in(8),
            calm: yes(chance),
            ends: chance.pick(&[0, 0, 0, 150]),
            illegal: chance.pick(&[0, 0, 10]),
            floods: chance.pick(&[0, 0, 0, 2]),
            stalls: chance.pick(&[0, 0, 5]),
        }
    }

    /// The most that a read or a write may carry.
    pub fn max_payload(&self) -> u64 {
        self.capabilities.block_size.map_or(MAX_PAYLOAD, |limits| u64::from(limits.maximum).min(MAX_PAYLOAD))
    }

    pub fn min_block(&self) -> u64 {
        self.capabilities.block_size.map_or(1, |limits| u64::from(limits.minimum))
    }

    pub fn writable(&self) -> bool {
        self.capabilities.write && !self.read_only
    }

    /// The transmission flags that a client must be told. Source: proto.md "Transmission flags".
    pub fn flags(&self, structured: bool, narrow: bool) -> u16 {
        let device = &self.capabilities;
        let writable = self.writable();
        let zero = writable && device.zero != Support::None;
        let fua = match device.fua {
            Support::None => false,
            Support::Emulate => device.flush,
            Support::Emulated | Support::Native => true,
        };
        let several = device.multi_conn && self.model != ThreadModel::SerializeConnections;
        [
            (true, HAS_FLAGS),
            (!writable, READ_ONLY),
            (device.flush, SEND_FLUSH),
            (writable && fua, SEND_FUA),
            (device.rotational, ROTATIONAL),
            (writable && device.trim, SEND_TRIM),
            (zero, SEND_WRITE_ZEROES),
            (zero && device.fast_zero, SEND_FAST_ZERO),
            (structured, SEND_DF),
            (several, CAN_MULTI_CONN),
            (device.cache != Support::None, SEND_CACHE),
            (narrow, BLOCK_STATUS_PAYLOAD),
        ]
        .iter()
        .filter(|(yes, _)| *yes)
        .fold(0, |all, (_, flag)| all | flag)
    }
}

/// What a client may ask in a handshake.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Asked {
    Structured,
    Extended,
    List,
    ListContexts,
    /// With the client's own export's name, or another; for the contexts that have a bit in `wanted`, by number.
    SetContext {
        own: bool,
        wanted: u32,
    },
    Info,
    Go {
        own: bool,
    },
    ExportName,
    Unknown,
    TooBig,
    Malformed(u32),
    Abort,
}

/// How far a client has come, as the bytes that it was sent say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stage {
    Greeting,
    Options,
    Transmission,
}

/// How a client leaves when it has nothing more to ask.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goodbye {
    /// Says so when all was answered.
    Polite,
    /// Says so at once.
    Early,
    /// Ends its stream, and reads on.
    Eof,
    /// Is gone without a word.
    Reset,
    /// Does not.
    Never,
}

/// How a client's stream ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Over {
    Eof,
    Reset,
}

/// What became of a request in the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Called {
    No,
    /// Now, or again in a moment.
    Running,
    Returned(Result<(), u32>),
}

/// Shown by their number alone.
#[derive(Default)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// One request, from its first byte to the last of its reply. Moments are the world's clock.
#[derive(Debug)]
pub struct Request {
    pub cookie: u64,
    pub kind: u16,
    pub flags: u16,
    pub offset: u64,
    pub length: u64,
    /// Its data, in [`PATTERN`].
    pub data: Range<usize>,
    /// Extended headers: a payload that is no write's.
    pub payload: Vec<u8>,
    /// It has no business to have that, or not such a one.
    pub stray: bool,
    /// The numbers of the contexts that a block status is to tell of.
    pub contexts: Vec<usize>,
    /// Where it is in the client's stream.
    pub start: u64,
    pub end: u64,
    /// When the server had all of it.
    pub taken: Option<u64>,
    pub called: Called,
    /// How much of emulated zeroes or caching is done, in bytes; how many contexts the device was asked for.
    pub progress: u64,
    /// What it changed on the disk.
    pub effects: Vec<usize>,
    /// How many acknowledged writes a flush is to cover.
    pub covers: usize,
    /// What the device gave for a read; what is missing is zeroes.
    pub given: Bytes,
    /// What the device gave for a block status, by context.
    pub maps: Vec<(usize, Vec<(u64, u64)>)>,
    /// What the chunks of the reply said so far.
    pub content: Vec<Range<u64>>,
    pub error: Option<u32>,
    pub described: Vec<usize>,
}

pub struct Client {
    // The wire, from the client's end.
    pub name: Vec<u8>,
    /// Bytes that the server has not taken. The first of them have arrived.
    pub up: VecDeque<u8>,
    pub arrived: usize,
    pub taken: u64,
    /// How much the wire holds on its way up, and down at most, in bytes.
    pub capacity: usize,
    pub room: usize,
    /// The client sends no more.
    pub leaving: Option<Over>,
    /// And the server sees it.
    pub over: Option<Over>,
    pub cut_up: Option<u64>,
    pub receiver: Option<Waker>,
    pub receive_due: bool,
    pub low_water: usize,
    pub heeds_low_water: bool,
    pub sent: u64,
    pub read: u64,
    pub cut_down: Option<(u64, ErrorKind)>,
    pub broken_pipe: Option<ErrorKind>,
    pub sender: Option<Waker>,
    pub send_due: bool,
    pub worth_sending: usize,
    /// The server has looked at it.
    pub polled: bool,
    pub finished: bool,
    pub alive: bool,
    pub since: Duration,

    // What it does.
    pub plan: VecDeque<Asked>,
    pub hasty: bool,
    pub flagged: bool,
    pub client_flags: u32,
    pub depth: usize,
    pub left: usize,
    pub large: bool,
    pub goodbye: Goodbye,
    pub said_goodbye: bool,
    /// What it sent last is no request.
    pub lost_its_way: bool,
    /// It sends and does not read; and whether it began so.
    pub floods: bool,
    pub flooded: bool,
    pub stalled: bool,
    pub stall_at: Option<u64>,
    /// It gave the server a reason to close the connection.
    pub may_be_closed: bool,

    // What it was told.
    pub inbox: Vec<u8>,
    pub reply_began: u64,
    pub stage: Stage,
    pub asked: VecDeque<(Asked, u64)>,
    pub options_asked: usize,
    /// Where the last answer to an option ended.
    pub told: u64,
    pub replies_to_option: usize,
    pub structured: bool,
    pub extended: bool,
    /// The contexts that were selected: their ids and numbers, and whether for its own export.
    pub contexts: Vec<(u32, usize)>,
    pub contexts_are_own: bool,
    pub export: Option<(u64, u16)>,
    /// Where the transmission phase begins in the client's stream.
    pub transmission: u64,
    /// How many bytes of requests were answered.
    pub settled: u64,
    /// How many bytes of data the device gave for it, and how many of them were sent, in whole replies.
    pub produced: u64,
    pub delivered: u64,
    pub largest: u64,
    pub requests: Vec<Request>,
    pub next_taken: usize,
    /// Requests that are not answered, by cookie; and by type and offset, without flushes.
    pub open: BTreeMap<u64, usize>,
    pub ranges: BTreeMap<(u16, u64), Vec<usize>>,
    /// How many of them the device was asked for.
    pub begun: usize,
    /// Where replies end that the client has not read.
    pub unread: VecDeque<u64>,
    /// Flushes of the device that belong to no write: when they began, and their result.
    pub flushes: Vec<(u64, Result<(), u32>)>,
}

impl Client {
    /// What the client has written to its stream, in bytes.
    pub fn written(&self) -> u64 {
        self.taken + self.up.len() as u64
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.up.extend(bytes);
    }

    /// It sends and reads as it should, and nothing was cut.
    pub fn is_willing(&self) -> bool {
        self.alive && !self.stalled && !self.floods && self.over != Some(Over::Reset) && self.broken_pipe.is_none()
    }

    pub fn in_flight(&self) -> usize {
        self.open.len() + self.unread.len()
    }

    /// Whether a server that waits for bytes would be woken.
    pub fn is_readable(&self) -> bool {
        let wanted = if self.heeds_low_water { self.low_water.clamp(1, self.capacity) } else { 1 };
        self.arrived >= wanted || self.over.is_some()
    }
}

impl Client {
    /// The contexts that it may ask for.
    pub fn usable_contexts(&self) -> &[(u32, usize)] {
        if self.contexts_are_own { &self.contexts } else { &[] }
    }

    /// Whether a block status may have a payload.
    pub fn may_narrow(&self) -> bool {
        self.extended && !self.usable_contexts().is_empty()
    }
}

/// What the world knows of the server's end.
#[derive(Default)]
pub struct End {
    /// Orders to end that leave no choice, in their order.
    pub orders: Vec<Cause>,
    /// When the first of them was given.
    pub ordered: Option<Duration>,
    pub first_signal: Option<Duration>,
    /// A second signal came: nothing is waited for.
    pub at_once: bool,
    pub event_fired: bool,
    pub event_waker: Option<Waker>,
    /// Somebody has reached the transmission phase.
    pub any_served: bool,
    /// Somebody has, or was about to hear that it had, and has left.
    pub any_counted: bool,
    /// There was a moment at which the server could end for want of clients.
    pub lonely: bool,
    /// Since when: no drain that nobody ordered began earlier.
    pub lonely_since: Option<Duration>,
    /// Time has passed during the drain although somebody had something to do.
    pub hurried: bool,
    /// A device has panicked.
    pub panicked: bool,
    /// A final flush, a close or the unloading has failed.
    pub failed: bool,
    pub refused_hooks: u32,
    pub end_hooks: u32,
    pub outcome: Option<(Outcome, Duration)>,
}

pub struct Universe {
    pub config: Config,
    pub chance: Chance,
    pub simulation: Arc<Simulation>,
    pub clients: Vec<Client>,
    pub disk: Disk,
    pub end: End,
    /// Goes on with everything that happens.
    pub clock: u64,
    /// Nothing is delayed for now, to see whether all settles.
    pub generous: bool,
    /// For which clients calls are under way whose device lets the world go on, each within the one before it.
    pub within: Vec<usize>,
    /// How many of the calls that wait never return.
    pub hung: usize,
    pub trace: Vec<Entry>,
    pub whole_trace: bool,
    /// The first promise that was broken.
    pub broken: Option<String>,
}

pub type Shared = Arc<Mutex<Universe>>;

pub fn lock(shared: &Shared) -> MutexGuard<'_, Universe> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Universe {
    pub fn note(&mut self, client: Option<usize>, what: &'static str, a: u64, b: u64) {
        self.clock += 1;
        self.trace.push(Entry::Fact { at: self.simulation.elapsed(), client, what, a, b });
    }

    /// Nothing here panics where the server could catch it; whoever drives the world looks for this.
    pub fn break_promise(&mut self, client: Option<usize>, why: String) {
        self.note(client, "A PROMISE IS BROKEN", 0, 0);
        let whose = client.map_or(String::new(), |client| format!("client {client}: "));
        self.broken.get_or_insert(format!("{whose}{why}"));
    }

    /// Whether the server may be draining, so that any client may be told to leave.
    pub fn may_drain(&self) -> bool {
        !self.end.orders.is_empty() || self.end.lonely || self.end.panicked
    }

    /// Whether the server may have left behind what it asked the disk for this client, who was in the handshake.
    pub fn may_be_left_behind(&self, client: usize) -> bool {
        let drained = self.end.ordered.into_iter().chain(self.end.lonely_since).min();
        let is_late = |since: Duration| self.simulation.elapsed() >= since + LEFT_BEHIND;
        self.clients[client].stage != Stage::Transmission && drained.is_some_and(is_late)
    }

    /// Whether the server may have given up what was under way.
    pub fn may_be_cut_off(&self) -> bool {
        let now = self.simulation.elapsed();
        let late = |since: Duration| now >= since + self.config.drain;
        // Where the end was nobody's order its drain began at a moment that is not known here.
        self.end.at_once
            || self.end.ordered.map_or(self.end.lonely, late)
            || self.end.lonely_since.is_some_and(late)
            || (self.end.lonely && self.config.drain < CLOSE)
    }
}

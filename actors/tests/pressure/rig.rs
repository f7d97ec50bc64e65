//! A device that counts who is in it, a gate in that device, a server round it, and a client of a few lines.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nbdcaptive_actors::device::{
    Call, Capabilities, Client as Who, Device, Error, Exports, Flags, Result, Support, ThreadModel,
};
use nbdcaptive_actors::{Outcome, Running, Server};
use smol::Executor;

/// How long a test waits for what must come. A test that passes never waits so long.
const DEADLINE: Duration = Duration::from_secs(30);
/// The size of the disk, in bytes. Nothing is allocated for it.
const SIZE: u64 = 1 << 40;
/// Reads from here on wait at the gate.
pub const GATED: u64 = 1 << 30;
/// The length of every read and write, in bytes.
pub const BLOCK: u64 = 4096;

pub const NBD_CMD_READ: u16 = 0;
pub const NBD_CMD_WRITE: u16 = 1;
pub const NBD_CMD_FLUSH: u16 = 3;
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
pub const NBD_OPT_INFO: u32 = 6;
pub const NBD_OPT_GO: u32 = 7;
const NBD_OPT_EXPORT_NAME: u32 = 1;

/// Looks until there is something to see.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(start.elapsed() < DEADLINE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Where sessions run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place {
    /// On the embedder's executor, which has one thread.
    Executor,
    /// On so many threads of the server's own.
    Workers(usize),
}

/// One thread for all sessions, of either kind.
pub const ONE_THREAD: [Place; 2] = [Place::Executor, Place::Workers(1)];

/// How the device answers what need not wait.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Answers {
    /// On the session's thread.
    AtOnce,
    /// On a thread of the pool, as everything.
    OnThreads,
}

pub const EITHER_WAY: [Answers; 2] = [Answers::AtOnce, Answers::OnThreads];

/// How many are in the device at the same time, how many were at most, and how many have been there.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    pub now: usize,
    pub most: usize,
    pub ever: usize,
    by_connection: HashMap<usize, usize>,
    pub most_of_one_connection: usize,
}

impl Meter {
    fn enter(&mut self, connection: usize) {
        self.now += 1;
        self.ever += 1;
        self.most = self.most.max(self.now);
        let of_one = self.by_connection.entry(connection).or_default();
        *of_one += 1;
        self.most_of_one_connection = self.most_of_one_connection.max(*of_one);
    }

    fn leave(&mut self, connection: usize) {
        self.now -= 1;
        *self.by_connection.get_mut(&connection).expect("it has entered") -= 1;
    }
}

/// What a client's device lived through.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Life {
    Opened(usize),
    Closed(usize),
}

#[derive(Default)]
struct State {
    /// Requests of any kind, also those that were attempted at once in vain.
    requests: Meter,
    /// Requests that may block.
    blocking: Meter,
    is_open: bool,
    permits: usize,
    at_gate: usize,
    clients: usize,
    lives: Vec<Life>,
}

/// A disk whose every block is filled with the block's number, and that has a gate: reads at or behind [`GATED`] wait there,
/// and so does the call that a client's export name names.
#[derive(Clone)]
pub struct Disk(Arc<Inner>);

struct Inner {
    model: ThreadModel,
    answers: Answers,
    state: Mutex<State>,
    changed: Condvar,
}

impl Disk {
    pub fn new(answers: Answers) -> Disk {
        Disk::with_model(ThreadModel::Parallel, answers)
    }

    pub fn with_model(model: ThreadModel, answers: Answers) -> Disk {
        Disk(Arc::new(Inner { model, answers, state: Mutex::default(), changed: Condvar::new() }))
    }

    fn look<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.0.state.lock().expect("nobody panics while looking"))
    }

    /// All requests, however they are made.
    pub fn requests(&self) -> Meter {
        self.look(|state| state.requests.clone())
    }

    /// Requests that may block.
    pub fn blocking(&self) -> Meter {
        self.look(|state| state.blocking.clone())
    }

    pub fn lives(&self) -> Vec<Life> {
        self.look(|state| state.lives.clone())
    }

    /// Lets one through the gate.
    pub fn let_one_through(&self) {
        self.look(|state| state.permits += 1);
        self.0.changed.notify_all();
    }

    /// Lets all through, for ever.
    pub fn open_gate(&self) {
        self.look(|state| state.is_open = true);
        self.0.changed.notify_all();
    }

    /// Waits until so many wait at the gate: so many, and those who got a permit are gone.
    #[track_caller]
    pub fn wait_until_at_gate(&self, count: usize) {
        wait_for(&format!("{count} to be at the gate"), || {
            self.look(|state| (state.at_gate == count && state.permits == 0).then_some(()))
        });
    }

    fn pass_gate(&self) {
        let mut state = self.0.state.lock().expect("nobody panics while looking");
        state.at_gate += 1;
        state =
            self.0.changed.wait_while(state, |state| !state.is_open && state.permits == 0).expect("nobody panics here");
        state.permits = state.permits.saturating_sub(1);
        state.at_gate -= 1;
    }
}

impl Exports for Disk {
    fn open(&self, client: &Who) -> Result<Box<dyn Device>> {
        let number = self.look(|state| {
            state.clients += 1;
            state.lives.push(Life::Opened(state.clients));
            state.clients
        });
        let device = Connection { disk: self.clone(), number, waits_in: client.export_name.clone() };
        device.reach("open");
        Ok(Box::new(device))
    }

    fn thread_model(&self) -> ThreadModel {
        self.0.model
    }
}

/// The disk as one client has it.
struct Connection {
    disk: Disk,
    number: usize,
    /// The name of the call that waits at the gate.
    waits_in: Vec<u8>,
}

impl Connection {
    /// Waits at the gate in calls of this name, if this client's are to.
    fn reach(&self, name: &str) {
        if self.waits_in == name.as_bytes() {
            self.disk.pass_gate();
        }
    }

    /// A request, counted from its beginning to its end.
    fn request(&self, call: &Call, carry_out: impl FnOnce() -> Result<()>) -> Result<()> {
        self.disk.look(|state| {
            state.requests.enter(self.number);
            if call.may_block() {
                state.blocking.enter(self.number);
            }
        });
        let result = carry_out();
        // Another who ought not to be here may come in now.
        thread::yield_now();
        self.disk.look(|state| {
            state.requests.leave(self.number);
            if call.may_block() {
                state.blocking.leave(self.number);
            }
        });
        result
    }
}

impl Device for Connection {
    fn size(&self) -> Result<u64> {
        self.reach("size");
        Ok(SIZE)
    }

    fn capabilities(&self) -> Result<Capabilities> {
        self.reach("capabilities");
        let all = Capabilities { write: true, flush: true, fua: Support::Emulate, ..Capabilities::default() };
        Ok(Capabilities { multi_conn: true, ..all })
    }

    fn answers_at_once(&self) -> bool {
        self.disk.0.answers == Answers::AtOnce
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.request(call, || {
            if offset >= GATED {
                if !call.may_block() {
                    return Err(Error::WouldBlock);
                }
                self.disk.pass_gate();
            }
            buffer.fill(content(offset));
            Ok(())
        })
    }

    fn write(&self, _data: &[u8], _offset: u64, _flags: Flags, call: &Call) -> Result<()> {
        self.request(call, || Ok(()))
    }

    fn flush(&self, call: &Call) -> Result<()> {
        if self.waits_in == b"flush" && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        self.request(call, || {
            self.reach("flush");
            Ok(())
        })
    }

    fn close(&self) -> Result<()> {
        self.reach("close");
        self.disk.look(|state| state.lives.push(Life::Closed(self.number)));
        Ok(())
    }
}

/// What the block at an offset is filled with.
fn content(offset: u64) -> u8 {
    (offset / BLOCK) as u8
}

/// A server that runs, and the thread that runs its executor.
pub struct Rig {
    directory: PathBuf,
    disk: Disk,
    pub executor: Arc<Executor<'static>>,
    running: Option<Running>,
    stop: Option<async_channel::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Rig {
    pub fn start(place: Place, disk: &Disk) -> Rig {
        Rig::start_with(place, disk, |server| server)
    }

    pub fn start_with(place: Place, disk: &Disk, configure: impl FnOnce(Server) -> Server) -> Rig {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Another run may have left one, or be in a pid namespace where it has the same number.
        let directory = loop {
            // Not std::env::temp_dir: a socket's path has room for 107 bytes only.
            let name = format!("/tmp/ncp{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            match fs::create_dir(&name) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                made => break made.map(|()| PathBuf::from(name)).expect("a new directory in /tmp"),
            }
        };
        let listener = UnixListener::bind(directory.join("s")).expect("a socket in it");
        let mut server = Server::new(Arc::new(disk.clone())).listen(listener);
        if let Place::Workers(count) = place {
            server = server.workers(count);
        }
        let executor = Arc::new(Executor::new());
        let running = configure(server).start(&executor).expect("it starts");
        let (stop, stopped) = async_channel::bounded(1);
        let runs = Arc::clone(&executor);
        let thread = thread::spawn(move || {
            let _ = smol::block_on(runs.run(stopped.recv()));
        });
        let disk = disk.clone();
        Rig { directory, disk, executor, running: Some(running), stop: Some(stop), thread: Some(thread) }
    }

    /// A client that has sent its flags and read the greeting.
    pub fn connect(&self) -> Client {
        let socket = UnixStream::connect(self.directory.join("s")).expect("the server listens");
        socket.set_read_timeout(Some(DEADLINE)).expect("it is not zero");
        socket.set_write_timeout(Some(DEADLINE)).expect("it is not zero");
        let mut client = Client { socket, flags: 0 };
        client.receive::<18>();
        client.send(&3_u32.to_be_bytes());
        client
    }

    /// A client in transmission.
    pub fn client(&self) -> Client {
        let mut client = self.connect();
        client.ask_for_export("");
        client.enter();
        client
    }

    /// Waits until the session of `client` has received all that was sent, and has done with it what can be done now. Only for
    /// a server whose sessions run on one thread: another client's turn is then the end of this one's.
    pub fn wait_until_considered(&self, client: &Client) {
        wait_for("the server to receive all", || (client.unread_by_server() == 0).then_some(()));
        // Nobody but the session answers an unknown option.
        let mut other = self.connect();
        other.send(&option(0x4242, b""));
        other.receive::<20>();
    }

    /// Asks for the end, as a signal does, and waits for it.
    pub fn end(&self) -> Outcome {
        let running = self.running.as_ref().expect("until the end");
        running.handle().signal(15);
        let ended = smol::future::or(async { Some(running.wait().await) }, async {
            smol::Timer::after(DEADLINE).await;
            None
        });
        smol::block_on(ended).expect("the server ends")
    }
}

/// What is stuck goes on at the test's end, however it ends, so that threads do.
impl Drop for Rig {
    fn drop(&mut self) {
        self.disk.open_gate();
        drop(self.running.take());
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && !thread::panicking()
        {
            thread.join().expect("no actor's panic reaches who runs the executor");
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A client that speaks simple replies. A request's cookie is the offset that it asks for.
pub struct Client {
    pub socket: UnixStream,
    /// Of the export.
    pub flags: u16,
}

impl Client {
    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the server reads");
    }

    pub fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.socket.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    /// Sends `NBD_OPT_EXPORT_NAME`. The name is that of the call that waits at the gate for this client, if any.
    pub fn ask_for_export(&mut self, name: &str) {
        self.send(&option(NBD_OPT_EXPORT_NAME, name.as_bytes()));
    }

    /// Waits for the answer to it.
    pub fn enter(&mut self) {
        let reply = self.receive::<10>();
        assert_eq!(reply[..8], SIZE.to_be_bytes());
        self.flags = u16::from_be_bytes([reply[8], reply[9]]);
    }

    /// `NBD_OPT_INFO` or `NBD_OPT_GO` for the empty name, to its end.
    pub fn info(&mut self, option_code: u32) {
        const NBD_REP_ACK: u32 = 1;
        self.send(&option(option_code, &[0; 6]));
        loop {
            let header = self.receive::<20>();
            let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
            assert_eq!(word(8), option_code);
            let mut data = vec![0; word(16) as usize];
            self.socket.read_exact(&mut data).expect("the server answers");
            match word(12) {
                NBD_REP_ACK => return,
                kind => assert!(kind < 1 << 31, "the export is refused: {kind:#x}"),
            }
        }
    }

    /// Whether there is something to read, or the end.
    pub fn has_answer(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).expect("a socket can be polled") > 0
    }

    /// Memory of what the server has not received, in bytes.
    fn unread_by_server(&self) -> i32 {
        let mut unread: nix::libc::c_int = 0;
        // SAFETY: the descriptor is open, and the request (SIOCOUTQ) writes one int.
        let result = unsafe { nix::libc::ioctl(self.socket.as_raw_fd(), nix::libc::TIOCOUTQ, &raw mut unread) };
        assert_eq!(result, 0, "the socket knows SIOCOUTQ");
        unread
    }

    /// Asks for a block of each offset, in one message.
    pub fn ask_for(&mut self, offsets: impl IntoIterator<Item = u64>) {
        let all: Vec<u8> = offsets.into_iter().flat_map(|offset| request(NBD_CMD_READ, offset)).collect();
        self.send(&all);
    }

    /// Waits for one block that was asked for, whichever it is; returns its offset.
    pub fn block(&mut self) -> u64 {
        let offset = self.reply();
        assert_eq!(self.receive::<{ BLOCK as usize }>(), [content(offset); BLOCK as usize], "the block at {offset}");
        offset
    }

    /// Waits for so many blocks; returns their offsets in order.
    pub fn blocks(&mut self, count: usize) -> Vec<u64> {
        let mut offsets: Vec<u64> = (0..count).map(|_| self.block()).collect();
        offsets.sort_unstable();
        offsets
    }

    /// Waits for a reply without data; returns its cookie.
    pub fn reply(&mut self) -> u64 {
        let bytes = self.receive::<16>();
        assert_eq!(bytes[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "a simple reply that says success");
        u64::from_be_bytes(bytes[8..].try_into().expect("eight bytes"))
    }

    /// So many reads, writes and flushes, one after another, away from the gate.
    pub fn work(&mut self, rounds: u64) {
        for round in 0..rounds {
            let offset = round * BLOCK;
            self.ask_for([offset]);
            assert_eq!(self.block(), offset);
            self.send(&[&request(NBD_CMD_WRITE, offset)[..], &[0; BLOCK as usize]].concat());
            assert_eq!(self.reply(), offset);
            self.flush();
            assert_eq!(self.reply(), 0);
        }
    }

    pub fn flush(&mut self) {
        self.send(&request(NBD_CMD_FLUSH, 0));
    }
}

/// An option on the wire.
fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &option.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

/// A request of one block, whose cookie is its offset; a flush has neither.
pub fn request(kind: u16, offset: u64) -> [u8; 28] {
    let length = if kind == NBD_CMD_FLUSH { 0 } else { BLOCK as u32 };
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&offset.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Offsets of so many blocks from `from` on.
pub fn offsets(from: u64, count: usize) -> Vec<u64> {
    (0..count as u64).map(|number| from + number * BLOCK).collect()
}

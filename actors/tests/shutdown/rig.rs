//! A server with a device that does what a test says, and a client of a few lines.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nbdcaptive_actors::device::{Call, Capabilities, Client as Who, Device, Exports, Flags, Result, Segments, Support};
use nbdcaptive_actors::{Handle, Outcome, Running, Server};
use smol::Executor;

/// How long a test waits for what must come. A test that passes never waits so long.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// A drain timeout that no test lives to see: what ends, ends by itself.
pub const NEVER: Duration = Duration::from_secs(3600);
/// The size of the disk, in bytes. Nothing is allocated for it.
pub const SIZE: u64 = 1 << 40;

pub const SIGTERM: i32 = 15;
pub const NBD_CMD_READ: u16 = 0;
pub const NBD_CMD_WRITE: u16 = 1;
pub const NBD_CMD_DISC: u16 = 2;
pub const NBD_CMD_FLUSH: u16 = 3;
pub const NBD_EIO: u32 = 5;
pub const NBD_ESHUTDOWN: u32 = 108;

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
    Executor,
    Workers,
}

/// Plays a test in both places.
pub fn everywhere(test: impl Fn(Place)) {
    for place in [Place::Executor, Place::Workers] {
        // Shown where the test fails.
        eprintln!("{place:?}");
        test(place);
    }
}

/// What the device was asked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    Open,
    Read,
    Write,
    Flush,
    Close,
    Unload,
}

/// What the device does before it does what it was asked: nothing, wait, fail, panic.
pub type Act = Box<dyn Fn(Op) -> Result<()> + Send + Sync>;

/// A disk of zeroes that remembers what it was asked, and does what a test says.
#[derive(Clone)]
pub struct Disk(Arc<Inner>);

struct Inner {
    act: Act,
    at_once: bool,
    begun: Mutex<Vec<Op>>,
    done: Mutex<Vec<Op>>,
}

impl Disk {
    pub fn new(act: impl Fn(Op) -> Result<()> + Send + Sync + 'static) -> Disk {
        Disk(Arc::new(Inner { act: Box::new(act), at_once: false, begun: Mutex::default(), done: Mutex::default() }))
    }

    /// The same, answering on the thread of the session.
    pub fn at_once(act: impl Fn(Op) -> Result<()> + Send + Sync + 'static) -> Disk {
        Disk(Arc::new(Inner { act: Box::new(act), at_once: true, begun: Mutex::default(), done: Mutex::default() }))
    }

    /// What returned, in that order, whether or not it succeeded.
    pub fn done(&self) -> Vec<Op> {
        self.0.done.lock().unwrap().clone()
    }

    pub fn count(&self, op: Op) -> usize {
        self.done().iter().filter(|done| **done == op).count()
    }

    pub fn wait_until_begun(&self, op: Op) {
        self.wait_until_begun_times(op, 1);
    }

    pub fn wait_until_begun_times(&self, op: Op, times: usize) {
        let begun = || self.0.begun.lock().unwrap().iter().filter(|begun| **begun == op).count();
        wait_for(&format!("{op:?} to reach the device"), || (begun() >= times).then_some(()));
    }

    pub fn wait_until_done(&self, op: Op) {
        wait_for(&format!("{op:?} to be done"), || self.done().contains(&op).then_some(()));
    }

    fn ask(&self, op: Op) -> Result<()> {
        self.0.begun.lock().unwrap().push(op);
        let result = (self.0.act)(op);
        self.0.done.lock().unwrap().push(op);
        result
    }
}

impl Exports for Disk {
    fn open(&self, _client: &Who) -> Result<Box<dyn Device>> {
        self.ask(Op::Open)?;
        Ok(Box::new(self.clone()))
    }

    fn unload(&self) -> Result<()> {
        self.ask(Op::Unload)
    }
}

impl Device for Disk {
    fn size(&self) -> Result<u64> {
        Ok(SIZE)
    }

    fn capabilities(&self) -> Result<Capabilities> {
        Ok(Capabilities { write: true, flush: true, fua: Support::Emulate, ..Capabilities::default() })
    }

    fn answers_at_once(&self) -> bool {
        self.0.at_once
    }

    fn read(&self, buffer: &mut [u8], _offset: u64, _call: &Call) -> Result<()> {
        buffer.fill(0);
        self.ask(Op::Read)
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, _offset: u64, _call: &Call) -> Result<()> {
        reply.zeroes(length);
        self.ask(Op::Read)
    }

    fn write(&self, _data: &[u8], _offset: u64, _flags: Flags, _call: &Call) -> Result<()> {
        self.ask(Op::Write)
    }

    fn flush(&self, _call: &Call) -> Result<()> {
        self.ask(Op::Flush)
    }

    fn close(&self) -> Result<()> {
        self.ask(Op::Close)
    }
}

/// Where a device waits until a test lets it go on.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn pass(&self) {
        let (open, changed) = &*self.0;
        drop(changed.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
    }

    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }
}

/// What is stuck goes on at the test's end, however it ends, so that threads do.
impl Drop for Rig {
    fn drop(&mut self) {
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

/// A server that runs, and the thread that runs its executor.
pub struct Rig {
    directory: PathBuf,
    running: Option<Running>,
    stop: Option<async_channel::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Rig {
    pub fn start(place: Place, disk: &Disk) -> Rig {
        Rig::start_with(place, disk, |server| server)
    }

    pub fn start_with(place: Place, disk: &Disk, configure: impl FnOnce(Server) -> Server) -> Rig {
        Rig::serve(place, disk.clone(), configure)
    }

    pub fn serve(place: Place, exports: impl Exports, configure: impl FnOnce(Server) -> Server) -> Rig {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Another run may have left one, or be in a pid namespace where it has the same number.
        let directory = loop {
            // Not std::env::temp_dir: a socket's path has room for 107 bytes only.
            let name = format!("/tmp/nca{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            match fs::create_dir(&name) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                made => break made.map(|()| PathBuf::from(name)).expect("a new directory in /tmp"),
            }
        };
        let listener = UnixListener::bind(directory.join("s")).expect("a socket in it");
        let server = Server::new(Arc::new(exports)).listen(listener).drain_timeout(NEVER);
        let server = if place == Place::Workers { server.workers(2).spin(Duration::from_micros(50)) } else { server };
        let executor = Arc::new(Executor::new());
        let running = configure(server).start(&executor).expect("it starts");
        let (stop, stopped) = async_channel::bounded(1);
        let thread = thread::spawn(move || {
            let _ = smol::block_on(executor.run(stopped.recv()));
        });
        Rig { directory, running: Some(running), stop: Some(stop), thread: Some(thread) }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("s")
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("until the end")
    }

    pub fn handle(&self) -> Handle {
        self.running().handle()
    }

    /// A client in transmission.
    pub fn client(&self) -> Client {
        let mut client = self.connect();
        client.negotiate();
        client
    }

    /// A client that has said nothing.
    pub fn connect(&self) -> Client {
        Client::new(UnixStream::connect(self.socket()).expect("the server listens"))
    }

    /// Waits until the end has begun, which shows in that nobody is accepted any more.
    pub fn wait_until_draining(&self) {
        wait_for("new clients to be refused", || UnixStream::connect(self.socket()).is_err().then_some(()));
    }

    /// The outcome, if it is there within `limit`.
    pub fn outcome_within(&self, limit: Duration) -> Option<Outcome> {
        smol::block_on(smol::future::or(async { Some(self.running().wait().await) }, async {
            smol::Timer::after(limit).await;
            None
        }))
    }

    pub fn outcome(&self) -> Outcome {
        self.outcome_within(DEADLINE).expect("the server ends")
    }

    /// Asks for the end, as a signal does, and waits for it.
    pub fn end(&self) -> Outcome {
        self.handle().signal(SIGTERM);
        self.outcome()
    }
}

/// A client that speaks simple replies.
pub struct Client {
    pub socket: UnixStream,
}

impl Client {
    fn new(socket: UnixStream) -> Client {
        socket.set_read_timeout(Some(DEADLINE)).expect("it is not zero");
        socket.set_write_timeout(Some(DEADLINE)).expect("it is not zero");
        Client { socket }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the server reads");
    }

    pub fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.socket.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    /// Enters transmission by `NBD_OPT_EXPORT_NAME`.
    pub fn negotiate(&mut self) {
        self.receive::<18>();
        self.send(&handshake());
        self.receive::<10>();
    }

    pub fn request(&mut self, kind: u16, cookie: u64, length: u32) {
        self.send(&request(kind, cookie, length));
    }

    pub fn write(&mut self, cookie: u64, data: &[u8]) {
        self.send(&[&request(NBD_CMD_WRITE, cookie, data.len() as u32)[..], data].concat());
    }

    /// The cookie and the error of the next reply, without data.
    pub fn reply(&mut self) -> (u64, u32) {
        let bytes = self.receive::<16>();
        assert_eq!(bytes[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        (u64::from_be_bytes(bytes[8..].try_into().unwrap()), error)
    }

    /// The connection must be closed, with nothing more to read.
    pub fn expect_end(&mut self) {
        match self.socket.read(&mut [0; 64]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("the connection is not closed: {other:?}"),
        }
    }
}

/// The client's flags and `NBD_OPT_EXPORT_NAME` for the empty name.
pub fn handshake() -> Vec<u8> {
    let option: [&[u8]; 4] = [&3_u32.to_be_bytes(), b"IHAVEOPT", &1_u32.to_be_bytes(), &0_u32.to_be_bytes()];
    option.concat()
}

/// A request at offset 0.
pub fn request(kind: u16, cookie: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

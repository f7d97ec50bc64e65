//! One measurement of connections that do nothing, or do not read. The clients are this program itself, for no other
//! holds ten thousand.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt::SendTimeout,
};
use nix::sys::time::TimeVal;

use crate::Result;
use crate::measure::Sample;
use crate::process::{DEADLINE, Running};
use crate::rows::SIZE;
use crate::system::{Meter, cpu_seconds, peak_kib, resident_kib, threads_left};

/// Of the threads that the system has room for, those that a measurement leaves to everybody else.
const SPARE_THREADS: u64 = 1024;
/// How often it is looked whether so many are left. Some servers start seventeen threads for a connection.
const LOOK_EVERY: usize = 16;
/// How many clients do not read their replies, and how many requests of how many bytes each sends.
const SILENT: usize = 16;
const REQUESTS: usize = 64;
const REQUEST_SIZE: usize = 256 << 10;
/// A server is at rest when its CPU time and memory stay the same for so many looks, so long one after the other.
const REST: (u32, Duration) = (10, Duration::from_millis(20));

// The NBD protocol's numbers. Source: NBD proto.md.
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const FIXED_NEWSTYLE_AND_NO_ZEROES: u16 = 3;
const NBD_OPT_EXPORT_NAME: u32 = 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const NBD_CMD_READ: u16 = 0;
const NBD_CMD_WRITE: u16 = 1;

/// A connection in the transmission phase, with simple replies. Nothing that it does takes longer than [`DEADLINE`].
struct Client {
    stream: UnixStream,
}

impl Client {
    fn connect(path: &Path) -> io::Result<Client> {
        let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // Also for the wait until a server with many clients accepts one more.
        setsockopt(&socket, SendTimeout, &TimeVal::new(DEADLINE.as_secs().cast_signed(), 0))?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        let mut stream = UnixStream::from(socket);
        stream.set_read_timeout(Some(DEADLINE))?;

        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        let all = FIXED_NEWSTYLE_AND_NO_ZEROES;
        if !greeting.starts_with(b"NBDMAGICIHAVEOPT") || flags & all != all {
            return Err(io::Error::other("the server's greeting lacks something"));
        }
        let mut words = Vec::new();
        words.extend(u32::from(all).to_be_bytes());
        words.extend(IHAVEOPT.to_be_bytes());
        words.extend(NBD_OPT_EXPORT_NAME.to_be_bytes());
        // The default export has no name.
        words.extend(0_u32.to_be_bytes());
        stream.write_all(&words)?;
        // Size and flags.
        let mut export = [0; 10];
        stream.read_exact(&mut export)?;
        Ok(Client { stream })
    }

    fn request(command: u16, cookie: usize, offset: usize, length: usize) -> Vec<u8> {
        let mut words = Vec::new();
        words.extend(REQUEST_MAGIC.to_be_bytes());
        words.extend(0_u16.to_be_bytes());
        words.extend(command.to_be_bytes());
        words.extend((cookie as u64).to_be_bytes());
        words.extend((offset as u64).to_be_bytes());
        words.extend((length as u32).to_be_bytes());
        words
    }

    /// Reads the header of a reply, and `length` bytes of data after it.
    fn reply(&mut self, length: usize) -> io::Result<()> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        if header[..4] != SIMPLE_REPLY_MAGIC.to_be_bytes() || header[4..8] != [0; 4] {
            return Err(io::Error::other("a request was refused"));
        }
        self.stream.read_exact(&mut vec![0; length])
    }

    fn read(&mut self, length: usize) -> io::Result<()> {
        self.stream.write_all(&Client::request(NBD_CMD_READ, 0, 0, length))?;
        self.reply(length)
    }

    /// Whether the server has not hung up.
    fn is_held(&mut self) -> bool {
        let looked = self.stream.set_nonblocking(true).and_then(|()| self.stream.read(&mut [0]));
        let back = self.stream.set_nonblocking(false);
        back.is_ok() && looked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }
}

/// A new connection is served.
fn probe(path: &Path) -> io::Result<()> {
    Client::connect(path)?.read(4096)
}

/// Memory for each of `wanted` connections that have negotiated and then do nothing. A server that holds fewer is
/// measured with those. Errors: it holds none; or it holds all and serves no more.
pub fn idle(running: &mut Running, path: &Path, wanted: usize) -> Result<Sample> {
    let pid = running.pid();
    let at_first = resident_kib(pid);
    let (meter, cpu) = (Meter::start(), cpu_seconds(pid));
    probe(path).map_err(|error| format!("before the first connection: {error}"))?;
    let Crowd { mut clients, mut resident, why } = Crowd::gather(pid, path, wanted);
    let held = clients.len();
    if held == 0 {
        return Err(format!("holds no connection: {}", why.unwrap_or_default()));
    }
    if why.is_none() {
        probe(path).map_err(|error| format!("beside {held} idle connections: {error}"))?;
    }
    if !running.has_ended() {
        resident = resident_kib(pid);
    }
    if why.is_none() {
        // Ten of them, from the first on.
        for (number, client) in clients.iter_mut().enumerate().step_by(held.div_ceil(10)) {
            client.read(4096).map_err(|error| format!("connection {number} of {held}, after idling: {error}"))?;
        }
    }
    let value = (resident as f64 - at_first as f64) / held as f64;
    let note = why.map(|why| format!("held {held} of {wanted}: {why}"));
    let others = meter.others(cpu_seconds(pid) - cpu);
    Ok(Sample { value, cpu: None, peak_kib: peak_kib(pid), others, note })
}

/// Clients that do nothing.
struct Crowd {
    /// Those that the server holds.
    clients: Vec<Client>,
    /// What the server needed at some time with them, in KiB.
    resident: u64,
    /// Why there are no more.
    why: Option<String>,
}

impl Crowd {
    fn gather(server: u32, path: &Path, wanted: usize) -> Crowd {
        let mut crowd = Crowd { clients: Vec::new(), resident: 0, why: None };
        while crowd.clients.len() < wanted && crowd.why.is_none() {
            if crowd.clients.len().is_multiple_of(LOOK_EVERY) {
                crowd.look(server);
            }
            match Client::connect(path) {
                Ok(client) => crowd.clients.push(client),
                Err(error) => crowd.why = Some(error.to_string()),
            }
        }
        crowd.clients.retain_mut(Client::is_held);
        if crowd.clients.len() < wanted {
            crowd.why.get_or_insert("the server hung up on others".to_string());
        }
        crowd
    }

    fn look(&mut self, server: u32) {
        // Now, in case that it does not survive those that are to come.
        self.resident = self.resident.max(resident_kib(server));
        if threads_left().is_some_and(|left| left < SPARE_THREADS) {
            self.why = Some(format!("the system has room for less than {SPARE_THREADS} more threads"));
        }
    }
}

/// The most memory beyond the disk while clients have sent requests and read no reply. All replies are read in the end.
pub fn unread(running: &Running, path: &Path) -> Result<Sample> {
    let failed = |error: io::Error| format!("replies that nobody reads: {error}");
    // Every page is there, written in small pieces so that this takes little memory.
    let mut writer = Client::connect(path).map_err(failed)?;
    for offset in (0..SIZE as usize).step_by(REQUEST_SIZE) {
        let mut request = Client::request(NBD_CMD_WRITE, 0, offset, REQUEST_SIZE);
        request.resize(request.len() + REQUEST_SIZE, 1);
        writer.stream.write_all(&request).and_then(|()| writer.reply(0)).map_err(failed)?;
    }
    drop(writer);
    let disk = resident_kib(running.pid());
    let (meter, cpu) = (Meter::start(), cpu_seconds(running.pid()));
    let mut clients = Vec::new();
    for _ in 0..SILENT {
        let mut client = Client::connect(path).map_err(failed)?;
        let requests: Vec<u8> = (0..REQUESTS)
            .flat_map(|number| Client::request(NBD_CMD_READ, number, number * REQUEST_SIZE, REQUEST_SIZE))
            .collect();
        client.stream.write_all(&requests).map_err(failed)?;
        clients.push(client);
    }
    wait_for_rest(running)?;
    let peak = peak_kib(running.pid());
    for client in &mut clients {
        (0..REQUESTS).try_for_each(|_| client.reply(REQUEST_SIZE)).map_err(failed)?;
    }
    let others = meter.others(cpu_seconds(running.pid()) - cpu);
    let value = peak.saturating_sub(disk) as f64 / 1024.0;
    Ok(Sample { value, cpu: None, peak_kib: peak, others, note: None })
}

fn wait_for_rest(running: &Running) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    let (looks, pause) = REST;
    let mut same = 0;
    let mut last = (0.0, 0);
    while same < looks {
        if Instant::now() > deadline {
            return Err("does not come to rest with replies that nobody reads".to_string());
        }
        thread::sleep(pause);
        let now = (cpu_seconds(running.pid()), resident_kib(running.pid()));
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    Ok(())
}

//! What clients that send and never read cost: memory that has a bound, and nobody else's time. And what they get when they
//! do read: all of it.
//!
//! How much a server holds for one client is stated where it is kept, in actors/src/session/transmission.rs: requests and
//! replies of [`OWED`] bytes, and one payload more. Nothing here measures time: a server is looked at when all of its
//! threads sleep, and then it goes on only if a client does something.

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::thread;

use nix::sys::socket::{setsockopt, sockopt};

use super::harness::*;
use super::raw_client::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// `MAX_OWED`: bytes of requests and replies that one client may have on the way.
const OWED: u64 = 16 * MIB;
/// What the server as a whole may take beside what it holds for clients: threads, and buffers that are kept for the next
/// request. Measured: 1 to 4 MiB.
const FIXED: u64 = 8 * MIB;
/// More requests than any client gets rid of without reading.
const TOO_MANY: usize = 50_000;

/// How much of the disk has data in it that depends on the place, from its start.
const DATA: u64 = 32 * MIB;
/// Where clients write, each in a part of its own.
const WRITTEN: u64 = 64 * MIB;
const PART: u64 = 128 * KIB;
const PARTS: u64 = 64;
/// Where every second page is a hole, and how long that goes on.
const HOLES: u64 = 128 * MIB;
const HOLED: u64 = 16 * MIB;
/// What the memory plugin takes and gives back at a time.
const PAGE: u64 = 32 * KIB;

const SIZE: &str = "size=256M";

/// What is in the first part of the disk: each 8 bytes are a number of their own.
fn data() -> Vec<u8> {
    (0..DATA / 8).flat_map(|number| (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1).to_be_bytes()).collect()
}

/// What one request of a client writes, and where.
fn piece(client: u64, number: usize) -> (u64, [u8; 64]) {
    let place = number as u64 % (PART / 64);
    (WRITTEN + client % PARTS * PART + place * 64, [(1 + (client * 31 + place) % 250) as u8; 64])
}

/// A number of `/proc/PID/status` that is in kB there, in bytes.
fn status(server: &Server, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.running.pid())).expect("the server is there");
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel tells");
    let number = line.trim_matches(|letter: char| !letter.is_ascii_digit());
    number.parse::<u64>().expect("a number") * KIB
}

/// The most memory that was resident since the last [`forget_peak`].
pub fn peak(server: &Server) -> u64 {
    status(server, "VmHWM:")
}

/// Makes the peak what is resident now; returns that.
pub fn forget_peak(server: &Server) -> u64 {
    fs::write(format!("/proc/{}/clear_refs", server.running.pid()), "5").expect("the server is ours");
    status(server, "VmRSS:")
}

/// How often each thread of the server has gone to sleep or was put off; `None` if one does not sleep.
fn sleepers(server: &Server) -> Option<HashMap<String, (String, String)>> {
    let threads = fs::read_dir(format!("/proc/{}/task", server.running.pid())).expect("the server is there");
    let mut all = HashMap::new();
    for thread in threads.flatten() {
        // A thread may end between these reads: not asleep, then.
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        let field = |name| status.lines().find_map(|line: &str| line.strip_prefix(name)).map(str::to_owned);
        if !field("State:")?.contains('S') {
            return None;
        }
        let switches = (field("voluntary_ctxt_switches:")?, field("nonvoluntary_ctxt_switches:")?);
        all.insert(thread.file_name().to_string_lossy().into_owned(), switches);
    }
    Some(all)
}

/// Whether there was a moment during this call at which all threads of the server slept: each was asleep before and after
/// it, and did not run in between.
pub fn is_idle(server: &Server) -> bool {
    let before = sleepers(server);
    before.is_some() && before == sleepers(server)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ask {
    Read {
        offset: u64,
        length: u64,
    },
    /// Of a [`piece`], in the client's part.
    Write,
    /// Of the data that is there already.
    Rewrite {
        offset: u64,
        length: u64,
    },
    /// Of all that is [`HOLED`].
    Blocks,
}

/// A client that sends and does not read.
struct Stuck<'a> {
    number: u64,
    /// Of the disk.
    data: &'a [u8],
    client: Client,
    /// By their cookies, from 0 on. A structured client's are in `client`.
    asked: Vec<Ask>,
    /// Requests on their way, and how much of them went out.
    sending: (Vec<u8>, usize),
}

impl<'a> Stuck<'a> {
    fn new(server: &Server, number: u64, data: &'a [u8], is_structured: bool) -> Stuck<'a> {
        let client = if is_structured { server.structured() } else { server.simple() };
        client.socket.set_nonblocking(true).expect("a socket can be non-blocking");
        Stuck { number, data, client, asked: Vec::new(), sending: (Vec::new(), 0) }
    }

    fn message(&mut self, ask: Ask) -> Vec<u8> {
        let number = self.asked.len();
        let cookie = number as u64;
        match ask {
            Ask::Read { offset, length } => request_bytes(NBD_CMD_READ, 0, cookie, offset, length as u32).to_vec(),
            Ask::Write => {
                let (offset, data) = piece(self.number, number);
                [&request_bytes(NBD_CMD_WRITE, 0, cookie, offset, 64)[..], &data].concat()
            }
            Ask::Rewrite { offset, length } => {
                let header = request_bytes(NBD_CMD_WRITE, 0, cookie, offset, length as u32);
                [&header[..], &self.data[offset as usize..(offset + length) as usize]].concat()
            }
            Ask::Blocks => self.client.prepare(NBD_CMD_BLOCK_STATUS, 0, HOLES, HOLED),
        }
    }

    /// Sends what is to be sent. Whether all of it went out.
    fn send(&mut self) -> bool {
        let (bytes, sent) = &mut self.sending;
        while *sent < bytes.len() {
            match self.client.socket.write(&bytes[*sent..]) {
                Ok(count) => *sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(error) => panic!("the server reads or waits: {error}"),
            }
        }
        true
    }

    /// Sends many requests at once, and more one by one until the server takes no more, and will not: the socket is full
    /// although the server is idle.
    fn send_until_stuck(&mut self, server: &Server, (_, payload, next): Kind) {
        // Four times what it may be owed, as far as it fits: the server can see it before the first reply cannot be sent.
        let at_once = (4 * OWED / (payload + 256) + 1).min(6000) as usize;
        for number in 0..at_once {
            let ask = next(number);
            let message = self.message(ask);
            self.sending.0.extend(message);
            self.asked.push(ask);
        }
        self.send();
        // The least there is, so that few wait in the socket beside those.
        setsockopt(&self.client.socket, sockopt::SndBuf, &0).expect("a size for the send buffer");
        wait_for("the server to stop taking requests", || {
            while self.send() {
                let number = self.asked.len();
                assert!(number < TOO_MANY, "the server takes whatever it is sent");
                let ask = next(number);
                self.sending = (self.message(ask), 0);
                self.asked.push(ask);
            }
            // Nobody else sends anything meanwhile, so an idle server stays so.
            (is_idle(server) && !self.send()).then_some(())
        });
    }

    /// Reads what it is owed: a reply to each request, full and correct.
    fn read_all(mut self, is_structured: bool) {
        self.client.socket.set_nonblocking(false).expect("a socket can be blocking");
        let mut socket = self.client.socket.try_clone().expect("a descriptor");
        let (bytes, sent) = std::mem::take(&mut self.sending);
        let writer = thread::spawn(move || socket.write_all(&bytes[sent..]));
        if is_structured {
            self.read_blocks();
        } else {
            self.read_simple();
        }
        writer.join().expect("the writer does not panic").expect("the server reads all");
        self.client.disconnect();
    }

    fn read_blocks(&mut self) {
        while self.client.unanswered() > 0 {
            let reply = self.client.next_reply().expect("all are answered");
            assert_eq!(reply.error, NBD_SUCCESS);
            let expected = (0..(HOLED / PAGE) as usize).map(|page| (PAGE, [0, 3][page % 2]));
            assert!(reply.blocks().iter().copied().eq(expected), "{:?}", reply.contexts);
        }
    }

    fn read_simple(&mut self) {
        let mut open: Vec<Option<Ask>> = self.asked.iter().copied().map(Some).collect();
        let mut buffer = vec![0; 256 * KIB as usize];
        for _ in 0..self.asked.len() {
            let header = self.client.receive(16);
            assert_eq!(header[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "a reply that says success");
            let cookie = u64::from_be_bytes(header[8..].try_into().expect("eight bytes")) as usize;
            let ask = open.get_mut(cookie).and_then(Option::take).expect("each request is answered once");
            let Ask::Read { offset, length } = ask else { continue };
            for expected in self.data[offset as usize..(offset + length) as usize].chunks(buffer.len()) {
                let buffer = &mut buffer[..expected.len()];
                self.client.socket.read_exact(buffer).expect("the whole reply comes");
                assert!(buffer == expected, "the data of {ask:?}");
            }
        }
    }
}

/// A server whose disk holds what the requests of this file are about.
fn serve(room: &Room, data: &[u8]) -> Server {
    let server = room.serve(["memory", SIZE]);
    let mut client = server.simple();
    for (part, offset) in data.chunks(MIB as usize).zip((0..).step_by(MIB as usize)) {
        assert_eq!(client.write(0, offset, part), NBD_SUCCESS);
    }
    for page in (0..HOLED / PAGE).step_by(2) {
        assert_eq!(client.write(0, HOLES + page * PAGE, &[0xff; PAGE as usize]), NBD_SUCCESS);
    }
    // All pages that will be written to are there, so that they do not count as memory for a client.
    for page in 0..PARTS * PART / PAGE {
        assert_eq!(client.write(0, WRITTEN + page * PAGE, &[0xff; PAGE as usize]), NBD_SUCCESS);
    }
    client.disconnect();
    server
}

/// All that a client may ask for, of every size, as its `number`th request.
fn anything(number: usize) -> Ask {
    let number = number as u64;
    match number % 4 {
        0 => Ask::Read { offset: number * 4099 % (DATA - MIB), length: 256 * KIB },
        1 => Ask::Write,
        2 => Ask::Read { offset: number * 8191 % (DATA - MIB), length: 10_000 },
        _ => Ask::Read { offset: number * 511 % (DATA - MIB), length: 1 },
    }
}

/// A client as a reason to be stuck, the largest payload of its requests, and what it asks for.
type Kind = (&'static str, u64, fn(usize) -> Ask);

const KINDS: [Kind; 7] = [
    ("small writes", 64, |_| Ask::Write),
    ("writes of 256 KiB", 256 * KIB, |number| Ask::Rewrite {
        offset: number as u64 * 4096 % (31 * MIB),
        length: 256 * KIB,
    }),
    ("block status", 256 * KIB, |_| Ask::Blocks),
    ("reads of 256 KiB", 256 * KIB, |number| Ask::Read {
        offset: number as u64 * 4096 % (31 * MIB),
        length: 256 * KIB,
    }),
    ("reads of 32 MiB", 32 * MIB, |_| Ask::Read { offset: 0, length: 32 * MIB }),
    ("a mixture", 256 * KIB, anything),
    // What the plugin copies, because it is less than it lends. Last, because what comes after it finds memory to use again.
    ("reads of 16000 bytes", 16_000, |number| Ask::Read { offset: number as u64 * 4096 % (31 * MIB), length: 16_000 }),
];

/// "a client is owed replies to at most MAX_OWED bytes and MAX_REQUESTS requests, and is not listened to meanwhile"
#[test]
fn a_client_that_never_reads_is_not_listened_to_and_costs_little() {
    if nbdkit_differs("it has a thread and a buffer for each request") {
        return;
    }
    let data = data();
    let room = Room::new();
    let server = serve(&room, &data);
    for kind in KINDS {
        let (name, payload, _) = kind;
        let before = forget_peak(&server);
        let is_structured = name == "block status";
        let mut stuck = Stuck::new(&server, 0, &data, is_structured);
        stuck.send_until_stuck(&server, kind);
        let grown = peak(&server).saturating_sub(before);
        eprintln!("{name}: {} requests, {} KiB", stuck.asked.len(), grown / KIB);
        assert!(grown <= OWED + payload + FIXED, "{name}: {grown} bytes for one client");
        let asked = stuck.asked.clone();
        stuck.read_all(is_structured);
        // What was written while nobody read was written.
        let mut reader = server.simple();
        let writes = asked.iter().enumerate().filter(|(_, ask)| **ask == Ask::Write);
        for (offset, written) in writes.map(|(number, _)| piece(0, number)).take((PART / 64) as usize) {
            assert_eq!(reader.read(offset, 64), written, "{name}: what was written at {offset}");
        }
        let whole = peak(&server).saturating_sub(before);
        assert!(whole <= OWED + payload + FIXED, "{name}: {whole} bytes for one client that reads at last");
    }
    server.terminate().expect(0);
}

/// The same for many together, more than there are threads to serve them: each costs what one costs, others are served
/// meanwhile, and in the end each gets all that it asked for. A second round costs no more than the first.
#[test]
fn clients_that_never_read_are_no_burden_to_others() {
    if nbdkit_differs("it has a thread and a buffer for each request") {
        return;
    }
    let data = data();
    let room = Room::new();
    let server = serve(&room, &data);
    let workers = thread::available_parallelism().map_or(2, usize::from) as u64;
    // The large reads are left to one: their replies take long to read.
    let kinds: Vec<Kind> = KINDS.into_iter().filter(|(kind, ..)| *kind != "reads of 32 MiB").collect();
    let before = forget_peak(&server);
    for round in 0..2 {
        let mut bound = FIXED;
        let mut stuck = Vec::new();
        for number in 0..(2 * workers + 1).max(kinds.len() as u64) {
            let kind = kinds[number as usize % kinds.len()];
            let (name, payload, _) = kind;
            let is_structured = name == "block status";
            let mut client = Stuck::new(&server, number, &data, is_structured);
            client.send_until_stuck(&server, kind);
            bound += OWED + payload;
            stuck.push((client, is_structured));
        }
        // Stuck in other ways: with half a header, half a payload, half an option.
        let mut half = Vec::new();
        for number in 0..2 * workers {
            let mut client = server.connect();
            client.start();
            if number % 2 == 0 {
                client.send(&option_bytes(NBD_OPT_GO, &info_bytes(b"name", &[]))[..20]);
            } else {
                client.go(b"");
                client.send(&request_bytes(NBD_CMD_WRITE, 0, 1, DATA, 8192)[..]);
                client.send(&[0xff; 4096]);
                bound += 8192;
            }
            half.push(client);
        }
        // On each of the threads there is one of these and some of those.
        let mut others: Vec<Client> = (0..2 * workers).map(|_| server.structured()).collect();
        for turn in 0..4000 / others.len() as u64 {
            for (number, client) in (0..).zip(&mut others) {
                let offset = DATA + MIB + number * MIB + turn % 128 * 4096;
                let block = [(turn + number) as u8; 4096];
                assert_eq!(client.write(0, offset, &block), NBD_SUCCESS);
                assert_eq!(client.read(offset, 4096), block);
            }
        }
        let grown = peak(&server).saturating_sub(before);
        eprintln!("round {round}: {} clients, {} KiB", stuck.len(), grown / KIB);
        assert!(grown <= bound, "round {round}: {grown} bytes, more than {bound}");
        drop(half);
        for (client, is_structured) in stuck {
            client.read_all(is_structured);
        }
    }
    server.terminate().expect(0);
}

/// A reply borrows pages of the disk; who writes to those meanwhile makes new ones, and the old ones are what the reply costs.
#[test]
fn replies_that_nobody_reads_keep_no_more_of_the_disk_than_is_owed() {
    if nbdkit_differs("it has a thread and a buffer for each request") {
        return;
    }
    // Four times what a client may be owed, in small pieces and in pieces that are more than that alone.
    for (pieces, length) in [(64, MIB), (2, 32 * MIB)] {
        let room = Room::new();
        let server = room.serve(["memory", SIZE]);
        let mut other = server.simple();
        let mut fill = |value: u8| {
            for offset in (0..64 * MIB).step_by(MIB as usize) {
                assert_eq!(other.write(0, offset, &[value + (offset / MIB) as u8; MIB as usize]), NBD_SUCCESS);
            }
        };
        fill(0);
        let mut client = server.simple();
        let before = forget_peak(&server);
        let all = (0..pieces).flat_map(|piece| request_bytes(NBD_CMD_READ, 0, piece, piece * length, length as u32));
        client.send(&all.collect::<Vec<u8>>());
        wait_for("the server to be idle", || is_idle(&server).then_some(()));
        fill(100);
        let grown = peak(&server).saturating_sub(before);
        eprintln!("{pieces} reads of {length} bytes: {} KiB", grown / KIB);
        assert!(grown <= OWED + length + FIXED, "{grown} bytes for one client");
        let mut old = 0;
        for _ in 0..pieces {
            let header = client.receive(16);
            assert_eq!(header[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "a reply that says success");
            let offset = u64::from(header[15]) * length;
            let data = client.receive(length as usize);
            for (at, part) in (offset..).step_by(MIB as usize).zip(data.chunks(MIB as usize)) {
                let was = (at / MIB) as u8;
                assert!(part[0] == was || part[0] == was + 100, "{} at {at}", part[0]);
                assert!(part.iter().all(|byte| *byte == part[0]), "all of one write is there at {at}");
                old += u64::from(part[0] == was) * MIB;
            }
        }
        // What was carried out before the writes is answered with what was there then, whenever it is read.
        assert!((OWED..=OWED + length).contains(&old), "{old} bytes of replies were kept");
        server.terminate().expect(0);
    }
}

/// Who announces much and sends part of it makes the server hold that part, and holds up nobody.
#[test]
fn half_a_write_costs_no_more_than_half_a_write() {
    const LENGTH: u64 = 32 * MIB;
    const CLIENTS: u64 = 4;
    if nbdkit_differs("it keeps such a buffer for each of 16 threads") {
        return;
    }
    let room = Room::new();
    let server = room.serve(["memory", SIZE]);
    let mut other = server.simple();
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| server.simple()).collect();
    for round in [1, 2] {
        let content = |number: u64| round * 10 + number as u8;
        let before = forget_peak(&server);
        for (number, client) in (0..).zip(&mut clients) {
            let header = client.prepare(NBD_CMD_WRITE, 0, number * LENGTH, LENGTH);
            client.send(&header);
        }
        let mut sent = 0;
        for upto in [0, MIB, LENGTH - 1] {
            for (number, client) in (0..).zip(&mut clients) {
                client.send(&vec![content(number); (upto - sent) as usize]);
            }
            sent = upto;
            wait_for("the server to be idle", || is_idle(&server).then_some(()));
            let grown = peak(&server).saturating_sub(before);
            eprintln!("round {round}, {upto} bytes each: {} KiB", grown / KIB);
            assert!(grown <= CLIENTS * upto + FIXED, "{grown} bytes for {upto} bytes from each of {CLIENTS}");
        }
        // Nothing of it is on the disk yet, as others see.
        for number in 0..CLIENTS {
            assert_ne!(other.read(number * LENGTH, 4096)[0], content(number));
        }
        for (number, client) in (0..).zip(&mut clients) {
            client.send(&[content(number)]);
            assert_eq!(client.next_reply().map(|reply| reply.error), Some(NBD_SUCCESS));
        }
        for number in 0..CLIENTS {
            let data = other.read(number * LENGTH, LENGTH);
            assert!(data.iter().all(|byte| *byte == content(number)), "the data of client {number}");
        }
    }
    server.terminate().expect(0);
}

//! The clients that people have, against each plugin that can be written, with structured and with simple replies.
//!
//! An operation is a function that takes a [`Case`]; [`for_each_case`] makes a test of it for each plugin and kind of reply.
//! What an operation did is looked at past the client under test ([`Served::content`]), and at its end the server's log must
//! say that each client spoke as the case has it, and tell of no error ([`Served::end`]).
//!
//! - `qemu.rs`: qemu-img, qemu-io, and qemu-nbd as a client that serves others
//! - `libnbd.rs`: nbdinfo, nbdcopy, and programs with libnbd for Python (`*.py`)
//! - `fio.rs`: fio's nbd engine, which verifies what it wrote
//! - `nbd_client.rs`: nbd-client
//! - `oldstyle.rs`: those of them that know the old handshake, at a server that speaks nothing else
//! - `stable.rs`: what several connections and stable storage are promised

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::harness::{Launch, Output, Room, Server, is_nbdkit};
use super::raw_client::{NBD_REP_ACK, NBD_SUCCESS};

#[path = "peers/fio.rs"]
mod fio;
#[path = "peers/libnbd.rs"]
mod libnbd;
#[path = "peers/nbd_client.rs"]
mod nbd_client;
#[path = "peers/oldstyle.rs"]
mod oldstyle;
#[path = "peers/qemu.rs"]
mod qemu;
#[path = "peers/stable.rs"]
mod stable;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// How much of an export is looked at in one request of the raw client. Bytes.
const PIECE: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plugin {
    Memory,
    File,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Replies {
    /// What the server offers where nothing is said; a client takes what it knows of it.
    Structured,
    /// `--no-sr`
    Simple,
}

/// One row of the matrix.
#[derive(Clone, Copy, Debug)]
struct Case {
    plugin: Plugin,
    replies: Replies,
}

/// A test for each plugin with each kind of replies, in a module with the name of the operation.
macro_rules! for_each_case {
    ($($operation:ident)*) => {$(
        mod $operation {
            use crate::peers::{Case, Plugin, Replies};

            #[test]
            fn memory_with_structured_replies() {
                super::$operation(Case { plugin: Plugin::Memory, replies: Replies::Structured });
            }

            #[test]
            fn memory_with_simple_replies() {
                super::$operation(Case { plugin: Plugin::Memory, replies: Replies::Simple });
            }

            #[test]
            fn file_with_structured_replies() {
                super::$operation(Case { plugin: Plugin::File, replies: Replies::Structured });
            }

            #[test]
            fn file_with_simple_replies() {
                super::$operation(Case { plugin: Plugin::File, replies: Replies::Simple });
            }
        }
    )*};
}
use for_each_case;

impl Case {
    /// A server whose export has this many bytes, all of them a hole.
    fn serve(self, size: u64) -> Served {
        let room = Room::new();
        let server = room.serve(self.arguments(&room, size));
        Served { room, server, case: self, size }
    }

    /// The server's command line, without the socket. Makes the file.
    fn arguments(self, room: &Room, size: u64) -> Vec<String> {
        let mut arguments = Vec::new();
        // nbdkit's log would have a line for each request, and is not looked at.
        if !is_nbdkit() {
            arguments.push("-v".to_owned());
        }
        if self.replies == Replies::Simple {
            arguments.push("--no-sr".to_owned());
        }
        match self.plugin {
            Plugin::Memory => arguments.extend(["memory".to_owned(), size.to_string()]),
            Plugin::File => {
                let disk = fs::File::create(room.path("disk"));
                disk.and_then(|file| file.set_len(size)).expect("a sparse file");
                arguments.extend(["file".to_owned(), "disk".to_owned()]);
            }
        }
        arguments
    }

    fn structured(self) -> bool {
        self.replies == Replies::Structured
    }
}

/// A server for one operation, with all that belongs to it.
struct Served {
    room: Room,
    server: Server,
    case: Case,
    size: u64,
}

/// What a session that reached the transmission phase has agreed on, or could; newer is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Spoken {
    Simple,
    Structured,
    ExtendedHeaders,
}

impl Served {
    /// The newest that a client can speak here that knows all there is.
    fn newest(&self) -> Spoken {
        const NBD_OPT_EXTENDED_HEADERS: u32 = 11;
        let mut client = self.server.connect();
        client.start();
        match client.option(NBD_OPT_EXTENDED_HEADERS, b"") {
            _ if !self.case.structured() => Spoken::Simple,
            // nbdkit does not know them.
            (_, last) if last != NBD_REP_ACK => Spoken::Structured,
            _ => Spoken::ExtendedHeaders,
        }
    }

    /// Commands for a shell that stops at the first failure. They see `$uri` and, for programs, `uri` in their environment;
    /// `bad COMMAND` says that the command must fail.
    fn shell(&self, commands: &str) -> Launch {
        const BAD: &str = "bad() { if \"$@\"; then echo \"did not fail: $*\" >&2; exit 99; fi; }\n";
        let mut launch = self.room.tool("sh", ["-ec", &format!("{BAD}{commands}")]);
        launch.env("uri", self.server.uri()).env("socket", &self.server.socket);
        launch
    }

    /// Runs commands, which must succeed.
    #[track_caller]
    fn run(&self, commands: &str) -> Output {
        self.shell(commands).run_to(0)
    }

    /// The whole content, as seen by a client that is none of those under test.
    fn content(&self) -> Vec<u8> {
        if self.case.plugin == Plugin::File {
            return fs::read(self.room.path("disk")).expect("the disk is there");
        }
        let mut client = self.server.simple();
        let mut content = Vec::new();
        while content.len() as u64 != self.size {
            let length = (self.size - content.len() as u64).min(PIECE as u64);
            content.extend(client.read(content.len() as u64, length));
        }
        client.disconnect();
        content
    }

    #[track_caller]
    fn assert_content(&self, expected: &[u8], after: &str) {
        assert_same(&self.content(), expected, after);
    }

    /// Writes these pieces, past the clients under test.
    fn put(&self, pieces: &[(u64, Vec<u8>)]) {
        let mut client = self.server.simple();
        for (offset, data) in pieces {
            for (number, piece) in data.chunks(PIECE).enumerate() {
                assert_eq!(client.write(0, offset + (number * PIECE) as u64, piece), NBD_SUCCESS);
            }
        }
        client.disconnect();
    }

    /// Fills the export, so that what is not written afterwards can be told from zeroes.
    fn put_old_data(&self) {
        self.put(&[(0, vec![0xa5; self.size as usize])]);
    }

    /// Ends the server, whose log must say that all sessions of the clients under test spoke the newest that they and the
    /// server know, and that there was no error.
    #[track_caller]
    fn end(self, client: Spoken) {
        let expected = client.min(self.newest());
        if let Some((spoken, log)) = self.end_of_several() {
            assert!(spoken.contains(&expected), "{spoken:?} in {log}");
            // The raw client of `content` and `put` speaks simply.
            assert!(spoken.iter().all(|one| [expected, Spoken::Simple].contains(one)), "{spoken:?} in {log}");
        }
    }

    /// As [`Served::end`], for clients that know different things: how each of them spoke, and the log. `None` for nbdkit.
    #[track_caller]
    fn end_of_several(self) -> Option<(Vec<Spoken>, String)> {
        let log = self.end_with_errors();
        if is_nbdkit() {
            return None;
        }
        assert!(!log.contains("error:"), "{log}");
        Some((spoken(&log), log))
    }

    /// Ends the server, whose log may tell of errors that the clients were meant to cause.
    fn end_with_errors(self) -> String {
        let log = self.server.terminate().expect(0).stderr;
        self.room.assert_nothing_left();
        log
    }
}

/// How the sessions in a log spoke that reached transmission.
fn spoken(log: &str) -> Vec<Spoken> {
    const OPTION: &str = "replying to option ";
    let mut sessions: BTreeMap<&str, (Spoken, bool)> = BTreeMap::new();
    for line in log.lines() {
        let Some((who, what)) = line.split_once(OPTION) else { continue };
        let (_, session) = sessions.entry(who).or_insert((Spoken::Simple, false)).to_owned();
        let spoken = sessions[who].0;
        let now = match what {
            "7 with 0x1" => (spoken, true),
            "8 with 0x1" => (spoken.max(Spoken::Structured), session),
            "11 with 0x1" => (Spoken::ExtendedHeaders, session),
            _ => (spoken, session),
        };
        sessions.insert(who, now);
    }
    sessions.into_values().filter_map(|(spoken, transmission)| transmission.then_some(spoken)).collect()
}

/// Data without a zero byte in which every place can be told from every other.
fn data(length: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8 | 1
    };
    (0..length).map(next).collect()
}

/// What lies in the sparse image that goes in and out; the rest of it is zeroes. Offsets and lengths with every alignment.
fn pieces() -> Vec<(u64, Vec<u8>)> {
    let places = [
        (0, 64 * KIB),
        (MIB, MIB),
        (3 * MIB + 512, 1000),
        (8 * MIB - 4096, 8192),
        (10 * MIB + 1, 2 * MIB),
        (IMAGE - 513, 513),
    ];
    places.map(|(offset, length)| (offset, data(length, offset))).to_vec()
}

/// The size of that image, in bytes.
const IMAGE: u64 = 16 * MIB;

/// The bytes of that image.
fn image() -> Vec<u8> {
    let mut bytes = vec![0; IMAGE as usize];
    for (offset, data) in pieces() {
        bytes[offset as usize..][..data.len()].copy_from_slice(&data);
    }
    bytes
}

/// That image as a sparse file in the room.
fn image_file(room: &Room) -> PathBuf {
    let path = room.path("image");
    let file = fs::File::create(&path).expect("a file in the room");
    file.set_len(IMAGE).expect("a sparse file");
    for (offset, data) in pieces() {
        file.write_all_at(&data, offset).expect("room on the disk");
    }
    path
}

/// As `assert_eq`, which would print megabytes.
#[track_caller]
fn assert_same(bytes: &[u8], expected: &[u8], after: &str) {
    assert_eq!(bytes.len(), expected.len(), "{after}");
    // By far the quicker way where they are the same.
    if bytes != expected {
        let different = bytes.iter().zip(expected).position(|(one, other)| one != other);
        panic!("{after}: the first byte that differs is at {different:?}");
    }
}

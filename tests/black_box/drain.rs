//! What a server's end does to its clients and to their data: many clients at once, in every state there is, and writes under
//! load, whatever process is told to end or killed.
//! The letters and numbers in the comments are the rows of the lifetime catalogue in docs/; sentences in quotes are from there.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{DEADLINE, Room, Witness, free_port, nbdkit_differs, server_path, wait_for};
use super::raw_client::*;

/// No test lives to see the end of this one: what ends, ends by itself.
const NO_DRAIN_TIMEOUT: &str = "--drain-timeout=3600";

/// F3: what a client sent before the signal has its answer, also where the server was not told yet that it is there.
#[test]
fn a_request_that_was_sent_just_before_the_signal_is_answered() {
    for round in 0..40 {
        let room = Room::new();
        let slow = ["memory", "1M", "--filter=noparallel", "--filter=delay", "rdelay=50ms"];
        let server = room.serve(if round % 2 == 0 { &slow[..2] } else { &slow[..] });
        let mut client = server.simple();
        let cookies: Vec<u64> =
            (0..1 + round % 4).map(|at| client.request(NBD_CMD_READ, 0, at * 512, 512, b"")).collect();
        server.running.signal(Signal::SIGTERM);
        for _ in &cookies {
            let reply = client.next_reply().expect("an answer to each");
            assert!(
                cookies.contains(&reply.cookie) && [NBD_SUCCESS, NBD_ESHUTDOWN].contains(&reply.error),
                "{reply:?}"
            );
        }
        client.expect_end();
        server.running.finish().expect(0);
    }
}

/// A client in one of the states that there are, by its number.
fn client_in_some_state(socket: &Path, number: usize) -> Client {
    let mut client = Client::connect(socket);
    let state = number % 10;
    if state == 0 {
        // Has not read the greeting.
        return client;
    }
    client.start();
    let option = option_bytes(NBD_OPT_GO, &info_bytes(b"", &[]));
    match state {
        1 => return client,
        2 => {
            // Half a handshake, each at another byte.
            client.send(&option[..1 + number / 10 % (option.len() - 1)]);
            return client;
        }
        3 => {
            // An option whose answer it has not read.
            client.send_option(NBD_OPT_LIST, b"");
            return client;
        }
        _ => client.go(b""),
    }
    match state {
        4 => client.expect_alive(),
        5 => {
            let header = client.prepare(NBD_CMD_READ, 0, 0, 512);
            client.send(&header[..1 + number / 10 % 27]);
        }
        6 => {
            // In the middle of a payload.
            let header = client.prepare(NBD_CMD_WRITE, 0, 0, 1 << 20);
            client.send(&header);
            client.send(&vec![0xff; 1 + number * 100]);
        }
        7 => {
            // Reads nothing of much.
            client.request(NBD_CMD_READ, 0, 0, 8 << 20, b"");
        }
        8 => {
            // Has said that it is done, and reads nothing.
            client.request(NBD_CMD_READ, 0, 0, 8 << 20, b"");
            client.request(NBD_CMD_DISC, 0, 0, 0, b"");
        }
        _ => {
            // Has closed its side.
            client.request(NBD_CMD_READ, 0, 0, 8 << 20, b"");
            client.socket.shutdown(Shutdown::Write).expect("the server is there");
        }
    }
    client
}

/// F1, F4, F5, F12: "closed at once", "dropped", "does not hold up shutdown"
#[test]
fn two_hundred_clients_in_every_state_do_not_hold_up_the_end() {
    if nbdkit_differs("F1, F4, F5: hangs for ever") {
        return;
    }
    let room = Room::new();
    let server = room.serve([NO_DRAIN_TIMEOUT, "memory", "64M"]);
    let clients: Vec<_> = (0..200).map(|number| client_in_some_state(&server.socket, number)).collect();
    server.terminate().expect(0);
    room.assert_nothing_left();
    drop(clients);
}

/// A6, F1, F12: "in-flight requests are answered, idle connections closed at once; status of C"
#[test]
fn two_hundred_clients_in_every_state_do_not_hold_up_the_end_of_a_command() {
    if nbdkit_differs("A6: hangs until the clients leave") {
        return;
    }
    let room = Room::new();
    let (mut ready, mut go) = (room.fifo("ready"), room.fifo("go"));
    let command = "printf '%s\\n' \"$unixsocket\" > ready; read x < go; exit 3";
    let running = room.captive([NO_DRAIN_TIMEOUT, "memory", "64M"], command).start();
    let socket = ready.hear();
    let clients: Vec<_> = (0..200).map(|number| client_in_some_state(Path::new(&socket), number)).collect();
    go.tell();
    running.finish().expect(3);
    room.assert_nothing_left();
    drop(clients);
}

/// D18, D22: who is stopped in the handshake is given up when its time is over, and was never there
#[test]
fn clients_that_stop_in_the_handshake_do_not_keep_an_exitlast_server() {
    if nbdkit_differs("D22: hangs") {
        return;
    }
    let room = Room::new();
    let server = room.serve(["--timeout=1", "--filter=exitlast", "memory", "64M"]);
    let stopped: Vec<_> = (0..4).map(|state| client_in_some_state(&server.socket, state)).collect();
    server.simple().disconnect();
    server.running.finish().expect(0);
    room.assert_nothing_left();
    drop(stopped);
}

/// D18: who is stopped later is there, until it is killed
#[test]
fn clients_that_stop_in_transmission_keep_an_exitlast_server_until_they_are_gone() {
    let room = Room::new();
    let server = room.serve(["--filter=exitlast", "memory", "64M"]);
    let mut stopped: Vec<_> = (4..10).map(|state| client_in_some_state(&server.socket, state)).collect();
    while let Some(one) = stopped.pop() {
        let mut client = server.simple();
        client.expect_alive();
        client.disconnect();
        drop(one);
    }
    server.running.finish().expect(0);
    room.assert_nothing_left();
}

/// Writes its own stretch of the disk over and over, whole, each time with the next byte, and says each that was acknowledged.
const WRITER: &str = "
import nbd, sys
at, length = int(sys.argv[2]), 1 << 20
h = nbd.NBD()
h.connect_unix(sys.argv[1])
for number in range(1, 1 << 30):
    h.pwrite(bytes([number % 251]) * length, at * length)
    print(number, flush=True)
";

/// B1, C13, F2, F4, F12: programs that are stopped wherever they are, most of them in the midst of a request's data
#[test]
fn programs_that_are_stopped_hold_up_no_end_and_lose_nothing() {
    if nbdkit_differs("F1, F4: hangs for ever") {
        return;
    }
    const STRETCH: usize = 1 << 20;
    for how in ["the command's end", "SIGTERM", "the parent's end"] {
        // Shown where the test fails.
        eprintln!("{how}");
        let room = Room::new();
        let disk = room.write("disk", vec![0; 4 * STRETCH]);
        let (mut ready, mut go) = (room.fifo("ready"), room.fifo("go"));
        let command = "printf '%s\\n' \"$unixsocket\" > ready; read x < go; exit 3";
        let mut launch = room.tool("sh", ["-c", "\"$@\" & echo $! > front; wait $!", "sh"]);
        launch.args([server_path()]).args([NO_DRAIN_TIMEOUT, "--exit-with-parent", "file", "disk", "--run", command]);
        let witness = Witness::new(&mut launch);
        let parent = launch.start();
        let socket = ready.hear();
        let writers: Vec<_> =
            (0..4).map(|at| room.tool("python3", ["-c", WRITER, &socket, &at.to_string()]).start()).collect();
        for writer in &writers {
            wait_for("a writer to get somewhere", || (writer.stdout().lines().count() >= 3).then_some(()));
            writer.stop();
        }
        match how {
            "SIGTERM" => {
                let front = fs::read_to_string(room.path("front")).expect("the shell has written it");
                kill(Pid::from_raw(front.trim().parse().expect("a pid")), Signal::SIGTERM).expect("it is there");
            }
            "the command's end" => go.tell(),
            _ => parent.signal(Signal::SIGKILL),
        }
        witness.wait_until_all_are_gone();
        let status = parent.finish().status;
        match how {
            "SIGTERM" => assert_eq!(status.code(), Some(128 + Signal::SIGTERM as i32)),
            "the command's end" => assert_eq!(status.code(), Some(3)),
            _ => assert_eq!(status.code(), None),
        }
        let disk = fs::read(disk).expect("the disk is there");
        for (stretch, writer) in disk.chunks(STRETCH).zip(&writers) {
            let acknowledged = writer.stdout().lines().count();
            let found = stretch[0];
            assert!(stretch.iter().all(|&byte| byte == found), "half a write");
            // The next one may be there, too, acknowledged or not.
            let wanted = [acknowledged, acknowledged + 1].map(|number| number % 251);
            assert!(wanted.contains(&usize::from(found)), "{found}, and {acknowledged} were acknowledged");
        }
        drop(writers);
        room.wait_until_nothing_left();
    }
}

const BLOCK: usize = 4096;
/// How many blocks each writer has to itself.
const BLOCKS: usize = 256;
const WRITERS: usize = 6;
/// How many writes a writer has open.
const DEPTH: usize = 8;

/// What a writer's nth write puts into a block: its number, over and over.
fn content(number: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    block.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&number.to_be_bytes()));
    block
}

/// Writes until the server hangs up, to blocks in an order that looks like chance, never to one that has a write open. Says so
/// once a few writes were acknowledged. Returns the last write that was acknowledged for each block.
fn write_until_the_end(socket: &Path, writer: usize, started: &mpsc::Sender<()>) -> HashMap<usize, u64> {
    let mut client = Client::connect(socket);
    client.start();
    client.go(b"");
    let mut acknowledged = HashMap::new();
    let mut open: HashMap<u64, (usize, u64)> = HashMap::new();
    let mut number = 0_u64;
    let mut hung_up = false;
    loop {
        while open.len() < DEPTH && !hung_up {
            number += 1;
            let mut block = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % BLOCKS;
            while open.values().any(|(busy, _)| *busy == block) {
                block = (block + 1) % BLOCKS;
            }
            let offset = ((writer * BLOCKS + block) * BLOCK) as u64;
            let header = client.prepare(NBD_CMD_WRITE, 0, offset, BLOCK as u64);
            let cookie = u64::from_be_bytes(header[8..16].try_into().expect("eight bytes"));
            open.insert(cookie, (block, number));
            hung_up = client.socket.write_all(&[&header[..], &content(number)].concat()).is_err();
        }
        let Some(reply) = client.next_reply() else { return acknowledged };
        let (block, number) = open.remove(&reply.cookie).expect("a reply is for a request");
        match reply.error {
            NBD_SUCCESS => {
                acknowledged.insert(block, number);
                if number == 50 {
                    started.send(()).expect("the test waits for it");
                }
            }
            NBD_ESHUTDOWN => hung_up = true,
            other => panic!("error {other}"),
        }
    }
}

/// F2, F9, B9: "Every acknowledged write is in the device at the end", whoever is told to end, or killed.
#[test]
fn every_write_that_was_acknowledged_under_load_is_in_the_file() {
    if nbdkit_differs("F1, B9: hangs, or stays behind") {
        return;
    }
    for how in ["SIGTERM", "the command's end", "SIGTERM to all", "SIGKILL of the front process"] {
        // Shown where the test fails.
        eprintln!("{how}");
        let room = Room::new();
        let disk = room.write("disk", vec![0; WRITERS * BLOCKS * BLOCK]);
        let (mut ready, mut go) = (room.fifo("ready"), room.fifo("go"));
        let command = "printf '%s\\n' \"$unixsocket\" > ready; read x < go; exit 3";
        let mut launch = room.captive([NO_DRAIN_TIMEOUT, "file", "disk"], command);
        let witness = Witness::new(&mut launch);
        let running = launch.start();
        let socket = ready.hear();
        let (started, starts) = mpsc::channel();
        let acknowledged: Vec<_> = thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    let (started, socket) = (started.clone(), Path::new(&socket));
                    scope.spawn(move || write_until_the_end(socket, writer, &started))
                })
                .collect();
            for _ in 0..WRITERS {
                starts.recv_timeout(DEADLINE).expect("every writer gets somewhere");
            }
            match how {
                "SIGTERM" => running.signal(Signal::SIGTERM),
                "the command's end" => go.tell(),
                "SIGTERM to all" => room.server_processes().iter().for_each(|one| {
                    // One may have gone already because of the other.
                    let _ = kill(Pid::from_raw(one.pid), Signal::SIGTERM);
                }),
                _ => running.signal(Signal::SIGKILL),
            }
            writers.into_iter().map(|writer| writer.join().expect("no writer panics")).collect()
        });
        running.finish();
        witness.wait_until_all_are_gone();
        room.wait_until_nothing_left();
        let disk = fs::read(disk).expect("the disk is there");
        for (writer, acknowledged) in acknowledged.iter().enumerate() {
            for (&block, &number) in acknowledged {
                let bytes = &disk[(writer * BLOCKS + block) * BLOCK..][..BLOCK];
                let found = u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"));
                // One that was not acknowledged may be there too, whole.
                assert!(found >= number, "writer {writer}, block {block}: {found}, but {number} was acknowledged");
                assert!(bytes == content(found), "writer {writer}, block {block}: half a write");
            }
        }
    }
}

/// F9: "kept whatever is killed": every subset of our processes, all of them too.
#[test]
fn what_was_flushed_or_forced_is_kept_whatever_is_killed() {
    if nbdkit_differs("B12: any one leaves something") {
        return;
    }
    let mut subset: u32 = 1;
    loop {
        let room = Room::new();
        let disk = room.write("disk", [0; 65536]);
        let mut ready = room.fifo("ready");
        let command = "printf '%s\\n' \"$unixsocket\" > ready; exec sleep 1000";
        let _running = room.captive(["file", "disk"], command).start();
        let socket = ready.hear();
        let mut client = Client::connect(Path::new(&socket));
        client.start();
        client.go(b"");
        assert_eq!(client.write(0, 4096, b"flushed"), NBD_SUCCESS);
        assert_eq!(client.ask(NBD_CMD_FLUSH, 0, 0, 0).error, NBD_SUCCESS);
        assert_eq!(client.write(NBD_CMD_FLAG_FUA, 8192, b"forced"), NBD_SUCCESS);
        let ours = room.server_processes();
        assert!(ours.len() < 6, "{ours:#?}");
        if subset >= 1 << ours.len() {
            break;
        }
        let chosen = || ours.iter().enumerate().filter(|(index, _)| subset & 1 << index != 0);
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            chosen().for_each(|(_, one)| kill(Pid::from_raw(one.pid), signal).expect("the process is there"));
        }
        wait_for("our processes to end", || room.server_processes().is_empty().then_some(()));
        let disk = fs::read(disk).expect("the disk is there");
        assert_eq!((&disk[4096..4103], &disk[8192..8198]), (&b"flushed"[..], &b"forced"[..]), "{subset:#b}");
        subset += 1;
    }
}

/// The timer that the system has for a connection of this server: which, and in how many hundredths of a second.
#[cfg(target_os = "linux")]
fn timer(port: &str) -> Option<(u32, u64)> {
    let port = format!(":{:04X}", port.parse::<u16>().expect("a port"));
    let table = fs::read_to_string("/proc/net/tcp").expect("the table of connections");
    table.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        // Local address, established, "timer:when".
        if !fields.get(1)?.ends_with(&port) || *fields.get(3)? != "01" {
            return None;
        }
        let (which, when) = fields.get(5)?.split_once(':')?;
        Some((which.parse().ok()?, u64::from_str_radix(when, 16).ok()?))
    })
}

/// D19: "`--keepalive` with 60/10/5"
#[cfg(target_os = "linux")]
#[test]
fn a_client_that_vanished_is_looked_for_after_a_minute() {
    if nbdkit_differs("D19: the system's default of 2 hours") {
        return;
    }
    const KEEPALIVE: u32 = 2;
    for (options, wanted) in [(&["--keepalive"][..], true), (&[], false)] {
        let room = Room::new();
        let port = free_port();
        let mut running =
            room.server(["-f", "-i", "127.0.0.1", "-p", &port]).args(options).args(["memory", "1M"]).start();
        let mut client = wait_for("the server to listen", || {
            assert!(!running.has_ended());
            TcpStream::connect(format!("127.0.0.1:{port}")).ok()
        });
        client.read_exact(&mut [0; 18]).expect("the greeting");
        let is_right = |(which, when): (u32, u64)| which == KEEPALIVE && when <= 6000;
        if wanted {
            // The greeting has to be acknowledged first.
            wait_for("the timer to be that of keepalive", || timer(&port).filter(|&timer| is_right(timer)));
        } else {
            assert!(!timer(&port).is_some_and(is_right));
        }
        running.signal(Signal::SIGTERM);
        running.finish().expect(0);
    }
}

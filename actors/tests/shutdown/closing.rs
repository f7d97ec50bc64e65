//! Every session ends, whatever its client sends and wherever it stops.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread;

use async_channel::Sender;
use nbdcaptive_actors::transport::Transport;
use nbdcaptive_actors::{Cause, Server};
use nix::libc::linger;
use nix::sys::socket::{setsockopt, sockopt};
use smol::Executor;

use super::rig::*;

/// A small generator of numbers that are random enough, so that a failure can be repeated from its seed.
struct Random(u64);

impl Random {
    /// A number below `limit`, which is not 0.
    fn below(&mut self, limit: usize) -> usize {
        // xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// All that a client says, of which a part is sent.
fn dialogue(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    if random.below(8) == 0 {
        // Nonsense.
        bytes.extend((0..random.below(200)).map(|_| random.below(256) as u8));
        return bytes;
    }
    bytes.extend(handshake());
    for cookie in 0..random.below(40) as u64 {
        match random.below(6) {
            0 => bytes.extend(request(NBD_CMD_FLUSH, cookie, 0)),
            1 => bytes.extend(request(NBD_CMD_READ, cookie, 1 << random.below(22))),
            // No such command.
            2 => bytes.extend(request(99, cookie, 1)),
            3 if random.below(10) == 0 => bytes.extend(request(NBD_CMD_DISC, cookie, 0)),
            _ => {
                let length = 1 << random.below(18);
                bytes.extend(request(NBD_CMD_WRITE, cookie, length));
                bytes.resize(bytes.len() + length as usize, 0xdd);
            }
        }
    }
    bytes
}

/// Sends the start of a dialogue in pieces, reads some or all or nothing, and leaves.
fn play<S: Read + Write>(mut socket: S, random: &mut Random, half_close: impl FnOnce(&S)) {
    let all = dialogue(random);
    let part = &all[..if random.below(3) == 0 { all.len() } else { random.below(all.len() + 1) }];
    let reads = random.below(3);
    let mut sink = vec![0; 1 << 16];
    let mut sent = 0;
    while sent < part.len() {
        let most = 1 << random.below(17);
        let end = (sent + 1 + random.below(most)).min(part.len());
        // The server hangs up on nonsense; and where it is not read from, it stops to listen.
        match socket.write(&part[sent..end]) {
            Ok(count) => sent += count,
            Err(_) => break,
        }
        if reads > 0 && random.below(4) == 0 && !matches!(socket.read(&mut sink[..random.below(4096) + 1]), Ok(1..)) {
            break;
        }
    }
    if random.below(2) == 0 {
        half_close(&socket);
        if reads == 2 {
            while matches!(socket.read(&mut sink), Ok(1..)) {}
        }
    }
}

/// D18: "DISC, close, RST, killed". This is where lost wake-ups would show: data and the end of the stream in one event, the end while a reply
/// waits for room, a reset.
#[test]
fn every_session_ends_wherever_its_client_stops() {
    const CLIENTS: u64 = 2000;
    const THREADS: u64 = 4;
    everywhere(|place| {
        for at_once in [true, false] {
            let disk = if at_once { Disk::at_once(|_| Ok(())) } else { Disk::new(|_| Ok(())) };
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let (leave, left) = async_channel::bounded::<()>(1);
            let rig = Rig::start_with(place, &disk, |server| {
                server.listen(listener).exit_when(Box::pin(async move {
                    let _ = left.recv().await;
                    "all clients have left".to_owned()
                }))
            });
            let socket = rig.socket();
            thread::scope(|scope| {
                for number in 0..THREADS {
                    let socket = &socket;
                    scope.spawn(move || {
                        for round in 0..CLIENTS / THREADS {
                            let seed = ((number << 32) | (round + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                            let random = &mut Random(seed);
                            let short = Some(std::time::Duration::from_millis(2));
                            if random.below(2) == 0 {
                                let client = UnixStream::connect(socket).unwrap();
                                client.set_write_timeout(short).unwrap();
                                client.set_read_timeout(short).unwrap();
                                play(client, random, |client| drop(client.shutdown(std::net::Shutdown::Write)));
                            } else {
                                let client = TcpStream::connect(address).unwrap();
                                client.set_write_timeout(short).unwrap();
                                client.set_read_timeout(short).unwrap();
                                if random.below(2) == 0 {
                                    // A close is a reset.
                                    let at_once = linger { l_onoff: 1, l_linger: 0 };
                                    setsockopt(&client.as_fd(), sockopt::Linger, &at_once).unwrap();
                                }
                                play(client, random, |client| drop(client.shutdown(std::net::Shutdown::Write)));
                            }
                        }
                    });
                }
            });
            // An event refuses new clients and waits for those that are there: nobody is told to drain.
            drop(leave);
            let outcome = rig.outcome();
            assert_eq!(outcome.cause, Cause::Event("all clients have left".into()));
            assert_eq!(outcome.exit_status(), 0, "{outcome:?}");
            assert_eq!(disk.count(Op::Open), disk.count(Op::Close));
            assert!(disk.count(Op::Open) > 100 && disk.count(Op::Write) > 100, "the clients got somewhere");
        }
    });
}

#[test]
fn a_client_that_was_handed_over_too_late_is_closed_although_more_could_be_handed_over() {
    /// Its channel closes with it.
    struct Late {
        _open: Sender<()>,
    }

    impl Transport for Late {
        fn poll_receive(&mut self, _: &mut Context<'_>, _: &mut [IoSliceMut<'_>]) -> Poll<io::Result<usize>> {
            Poll::Pending
        }
        fn poll_send(&mut self, _: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()))
        }
        fn finish(&mut self) {}
    }

    let executor = Arc::new(Executor::new());
    let (door, arrivals) = async_channel::unbounded::<Box<dyn Transport>>();
    let (open, closed) = async_channel::bounded(1);
    let hand_over = door.clone();
    let running = Server::new(Arc::new(Disk::new(|_| Ok(()))))
        .clients(arrivals)
        // No more clients are taken, and the channel is still there.
        .before_refusing(move || drop(hand_over.try_send(Box::new(Late { _open: open }))))
        .start(&executor)
        .unwrap();
    running.handle().shut_down(Cause::Requested);
    smol::block_on(executor.run(running.wait()));
    assert!(closed.is_closed(), "the server has ended, and the client is still connected");
    assert!(door.is_closed());
}

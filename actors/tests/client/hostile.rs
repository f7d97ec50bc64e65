//! Servers that are rare, broken or hostile, by script.

use std::sync::mpsc;

use nbdcaptive_actors::client::{Error, Extent, Handshake, Headers, Protocol, Requests, Wishes, negotiate};
use nbdcaptive_actors::device::Flags;
use nbdcaptive_actors::protocol::ErrorCode;
use nbdcaptive_actors::protocol::constants::*;
use smol::future::{poll_once, zip};

use super::rig::*;

const ALL: u16 = NBD_FLAG_HAS_FLAGS
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_SEND_FAST_ZERO
    | NBD_FLAG_SEND_CACHE;
const DONE: u16 = NBD_REPLY_FLAG_DONE;

fn wishes() -> Wishes {
    let contexts = vec![b"base:allocation".to_vec(), b"x:y".to_vec()];
    Wishes { contexts, ..Wishes::export("disk") }
}

/// What a read of 16 bytes at 512 comes to, answered with these bytes and then with the end.
fn read_answered(headers: u32, reply: Vec<u8>) -> Result<Vec<u8>, Error> {
    let script = move |mut peer: Peer| {
        peer.shake_hands(headers, ALL);
        peer.receive(if headers == NBD_OPT_EXTENDED_HEADERS { 32 } else { 28 });
        peer.send(&reply);
    };
    with_script(script, async |executor, transport| {
        let (requests, _connection) = connect(executor, transport, &wishes()).await;
        requests.read(512, 16).await
    })
}

#[test]
fn what_a_server_must_not_send_ends_the_connection_with_what_it_was() {
    const STRUCTURED: u32 = NBD_OPT_STRUCTURED_REPLY;
    const EXTENDED: u32 = NBD_OPT_EXTENDED_HEADERS;
    const DATA: u16 = NBD_REPLY_TYPE_OFFSET_DATA;
    let half = data(512, &[1; 8]);
    let other = extended_chunk(DONE, DATA, 1, 513, &data(512, &[1; 16]));
    let zero_error = chunk(DONE, NBD_REPLY_TYPE_ERROR, 1, &[0; 6]);
    for (headers, reply, expected) in [
        (0, simple(0, 2), "answered a request that was never made (cookie 2)"),
        (0, chunk(DONE, DATA, 1, &half), "as no simple reply does"),
        (0, [simple(5, 1), simple(5, 1)].concat(), "input/output error"),
        (STRUCTURED, simple(0, 1), "answered a read with a simple reply"),
        (STRUCTURED, simple(5, 1), "answered a read with a simple reply"),
        (STRUCTURED, chunk(DONE, DATA, 1, &half), "with 8 bytes missing"),
        (STRUCTURED, chunk(DONE, NBD_REPLY_TYPE_NONE, 1, &[]), "with 16 bytes missing"),
        (STRUCTURED, [chunk(0, DATA, 1, &half), chunk(0, DATA, 1, &half)].concat(), "sent data twice"),
        (STRUCTURED, chunk(0, DATA, 1, &data(511, &[1; 4])), "outside what was asked for"),
        (STRUCTURED, chunk(0, DATA, 1, &data(520, &[1; 9])), "outside what was asked for"),
        (STRUCTURED, chunk(0, 77, 1, &[]), "unknown type 77"),
        (STRUCTURED, chunk(0, NBD_REPLY_TYPE_NONE, 1, &[]), "not the last of its reply"),
        (STRUCTURED, chunk(DONE, NBD_REPLY_TYPE_BLOCK_STATUS, 1, &[1; 12]), "answered NBD_CMD_READ with a chunk"),
        (STRUCTURED, zero_error, "the error is no error"),
        (STRUCTURED, chunk(0, NBD_REPLY_TYPE_ERROR, 1, &[0, 0, 0, 5, 1, 0]), "its text is longer than the chunk"),
        (STRUCTURED, extended_chunk(DONE, DATA, 1, 512, &half), "as no structured reply does"),
        (EXTENDED, simple(0, 1), "as no extended reply does"),
        (EXTENDED, chunk(DONE, DATA, 1, &half), "as no extended reply does"),
        (EXTENDED, other, "answered a request at offset 512 with a chunk for one at offset 513"),
        (EXTENDED, extended_chunk(DONE, DATA, 9, 512, &half), "never made (cookie 9)"),
    ] {
        let error = read_answered(headers, reply).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}, not {expected}");
    }
    // A chunk longer than any is refused before anything of it has come.
    let mut long = chunk(DONE, DATA, 1, &[]);
    long[16..20].copy_from_slice(&[0xff; 4]);
    let error = read_answered(STRUCTURED, long).expect_err("it is too long").to_string();
    assert!(error.contains("more than any has"), "{error}");
    // A reply that goes on after its end spoils the next request.
    let twice = chunk(DONE, NBD_REPLY_TYPE_ERROR, 1, &[0, 0, 0, 5, 0, 0]).repeat(2);
    assert_eq!(read_answered(STRUCTURED, twice).expect_err("it failed").code(), ErrorCode::Io);
}

#[test]
fn an_error_of_an_unknown_type_is_an_error_and_the_connection_goes_on() {
    let script = |mut peer: Peer| {
        peer.shake_hands(NBD_OPT_STRUCTURED_REPLY, ALL);
        peer.receive(28);
        peer.send(&chunk(DONE, (1 << 15) | 99, 1, &[0, 0, 0, 28, 0, 1, b'x', 9, 9]));
        peer.receive(28);
        peer.send(&simple(0, 2));
        peer.expect_end();
    };
    with_script(script, async |executor, transport| {
        let (requests, _connection) = connect(executor, transport, &wishes()).await;
        let error = requests.read(0, 1).await.expect_err("it failed");
        assert_eq!(error.to_string(), "NBD_CMD_READ: no space left on device: x");
        requests.flush().await.expect("the connection is as good as before");
    });
}

#[test]
fn every_request_gets_the_end_of_the_connection_with_its_reason() {
    let script = |mut peer: Peer| {
        peer.shake_hands(NBD_OPT_STRUCTURED_REPLY, ALL);
        peer.receive(2 * 28);
        peer.send(&simple(0, 1234));
        peer.expect_end();
    };
    with_script(script, async |executor, transport| {
        let (requests, connection) = connect(executor, transport, &wishes()).await;
        let (first, second) = zip(requests.read(0, 1), requests.flush()).await;
        let third = requests.trim(0, 1, Flags::default()).await;
        for error in [first.map(drop), second, third, connection.await] {
            let error = error.expect_err("the connection is over");
            assert_eq!(error.code(), ErrorCode::Shutdown);
            assert!(error.to_string().contains("cookie 1234"), "{error}");
        }
    });
}

#[test]
fn replies_come_in_any_order_and_their_chunks_among_each_other() {
    let script = |mut peer: Peer| {
        peer.shake_hands(NBD_OPT_EXTENDED_HEADERS, ALL);
        let (_, _, first, first_offset, _) = peer.extended_request();
        let (_, _, second, second_offset, length) = peer.extended_request();
        assert_eq!(length, 1 << 19);
        let part = |cookie, of, offset, bytes: &[u8]| {
            extended_chunk(0, NBD_REPLY_TYPE_OFFSET_DATA, cookie, of, &data(offset, bytes))
        };
        let hole = [&second_offset.to_be_bytes()[..], &(1u32 << 18).to_be_bytes()].concat();
        peer.send(&part(second, second_offset, second_offset + (1 << 18), &vec![7; 1 << 18]));
        peer.send(&part(first, first_offset, first_offset + 1, b"b"));
        peer.send(&extended_chunk(0, NBD_REPLY_TYPE_OFFSET_HOLE, second, second_offset, &hole));
        peer.send(&part(first, first_offset, first_offset, b"a"));
        peer.send(&extended_chunk(DONE, NBD_REPLY_TYPE_NONE, second, second_offset, &[]));
        peer.send(&extended_chunk(DONE, NBD_REPLY_TYPE_NONE, first, first_offset, &[]));
        peer.expect_end();
    };
    with_script(script, async |executor, transport| {
        let (requests, _connection) = connect(executor, transport, &wishes()).await;
        let (first, second) = zip(requests.read(9, 2), requests.read(4096, 1 << 19)).await;
        assert_eq!(first.expect("all of it came"), b"ab");
        let second = second.expect("all of it came");
        assert!(second[..1 << 18].iter().all(|&byte| byte == 0) && second[1 << 18..].iter().all(|&byte| byte == 7));
    });
}

#[test]
fn extended_requests_are_as_the_specification_has_them() {
    let script = |mut peer: Peer| {
        peer.shake_hands(NBD_OPT_EXTENDED_HEADERS, ALL | NBD_FLAG_BLOCK_STATUS_PAYLOAD);
        let none = |cookie, offset| extended_chunk(DONE, NBD_REPLY_TYPE_NONE, cookie, offset, &[]);
        let (flags, kind, cookie, offset, length) = peer.extended_request();
        assert_eq!((flags, kind, offset, length), (NBD_CMD_FLAG_PAYLOAD_LEN | NBD_CMD_FLAG_FUA, NBD_CMD_WRITE, 3, 5));
        assert_eq!(peer.receive(5), b"hello");
        peer.send(&none(cookie, offset));
        let (flags, kind, cookie, offset, length) = peer.extended_request();
        let fast = NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
        assert_eq!((flags, kind, offset, length), (fast, NBD_CMD_WRITE_ZEROES, 0, SIZE as u64));
        peer.send(&none(cookie, offset));

        let extent = |length: u64, status: u64| [length.to_be_bytes(), status.to_be_bytes()].concat();
        let status = |id: u8, extents: &[Vec<u8>]| {
            [&[0, 0, 0, id, 0, 0, 0, extents.len() as u8][..], &extents.concat()].concat()
        };
        let (flags, kind, cookie, offset, length) = peer.extended_request();
        assert_eq!((flags, kind, offset, length), (0, NBD_CMD_BLOCK_STATUS, 512, 1024));
        let kind = NBD_REPLY_TYPE_BLOCK_STATUS_EXT;
        let long = status(6, &[extent(512, 1 << 40), extent(1 << 40, 0)]);
        peer.send(&extended_chunk(0, kind, cookie, offset, &long));
        peer.send(&extended_chunk(DONE, kind, cookie, offset, &status(5, &[extent(512, 3)])));

        let (flags, _, cookie, offset, length) = peer.extended_request();
        assert_eq!((flags, offset, length), (NBD_CMD_FLAG_PAYLOAD_LEN | NBD_CMD_FLAG_REQ_ONE, 512, 12));
        assert_eq!(peer.receive(12), [0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 6]);
        peer.send(&extended_chunk(DONE, kind, cookie, offset, &status(6, &[extent(512, 9)])));
        let (flags, kind, _, offset, length) = peer.extended_request();
        assert_eq!((flags, kind, offset, length), (0, NBD_CMD_DISC, 0, 0));
        peer.expect_end();
    };
    with_script(script, async |executor, transport| {
        let (requests, connection) = connect(executor, transport, &wishes()).await;
        assert_eq!(requests.headers(), Headers::Extended);
        let fua = Flags { fua: true, ..Flags::default() };
        requests.write(b"hello".to_vec(), 3, fua).await.expect("it was acknowledged");
        let fast = Flags { fast: true, ..Flags::default() };
        requests.write_zeroes(0, SIZE as u64, fast).await.expect("it was acknowledged");
        let status = requests.block_status(512, 1024, false).await.expect("both contexts answered");
        assert_eq!(status.iter().map(|one| one.id).collect::<Vec<_>>(), [6, 5]);
        let extents = [Extent { length: 512, status: 1 << 40 }, Extent { length: 1 << 40, status: 0 }];
        assert_eq!(status[0].extents, extents);
        let one = requests.block_status_of(&[6], 512, 1024, true).await.expect("the context answered");
        assert_eq!((one.len(), one[0].id), (1, 6));
        assert!(requests.block_status_of(&[7], 512, 1024, true).await.is_err());
        requests.disconnect().await.expect("nothing is in its way");
        connection.await.expect("it was we who ended it");
    });
}

/// A session of a handshake and two requests of `request` bytes, with a server that goes after so many of the bytes that it
/// has to send, once for each number. Each call ends, and with an error if there is anything missing.
fn dies_at_every_byte(
    answers: [Vec<u8>; 3],
    request: usize,
    session: impl AsyncFn(Requests) -> Result<(), Error> + Copy,
) {
    let whole: usize = answers.iter().map(Vec::len).sum();
    for length in 0..=whole {
        let answers = answers.clone();
        let script = move |mut peer: Peer| {
            let mut left = length;
            for (number, answer) in answers.iter().enumerate() {
                match number {
                    0 => {}
                    1 => {
                        peer.receive(4);
                        while peer.option().0 != NBD_OPT_GO {}
                        peer.receive(request);
                    }
                    _ => drop(peer.receive(request)),
                }
                peer.send(&answer[..left.min(answer.len())]);
                if left < answer.len() {
                    return;
                }
                left -= answer.len();
            }
            peer.expect_end();
        };
        let result = with_script(script, async |executor, transport| {
            let agreed = negotiate(transport, &wishes()).await?;
            let (requests, connection) = agreed.start();
            let _connection = executor.spawn(connection.run());
            session(requests).await
        });
        assert_eq!(result.is_ok(), length == whole, "{length} of {whole}: {result:?}");
    }
}

/// What a server with those headers sends in the handshake.
fn handshake(headers: u32) -> Vec<u8> {
    let mut bytes = greeting(3);
    for option in [NBD_OPT_EXTENDED_HEADERS, NBD_OPT_STRUCTURED_REPLY] {
        if option == headers {
            bytes.extend(option_reply(option, NBD_REP_ACK, &[]));
            break;
        }
        bytes.extend(option_reply(option, NBD_REP_ERR_UNSUP, b"no"));
    }
    if headers != 0 {
        for context in [&b"\0\0\0\x05base:allocation"[..], b"\0\0\0\x06x:y"] {
            bytes.extend(option_reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_META_CONTEXT, context));
        }
        bytes.extend(option_reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, &[]));
    }
    bytes.extend(option_reply(NBD_OPT_GO, NBD_REP_INFO, &info_export(SIZE as u64, ALL)));
    bytes.extend(option_reply(NBD_OPT_GO, NBD_REP_ACK, &[]));
    bytes
}

#[test]
fn a_server_may_die_at_any_byte() {
    let extended = [
        handshake(NBD_OPT_EXTENDED_HEADERS),
        [
            extended_chunk(0, NBD_REPLY_TYPE_OFFSET_DATA, 1, 8, &data(8, b"abcd")),
            extended_chunk(DONE, NBD_REPLY_TYPE_OFFSET_HOLE, 1, 8, &[0, 0, 0, 0, 0, 0, 0, 12, 0, 0, 0, 4]),
        ]
        .concat(),
        extended_chunk(DONE, NBD_REPLY_TYPE_NONE, 2, 0, &[]),
    ];
    let structured = [
        handshake(NBD_OPT_STRUCTURED_REPLY),
        [chunk(0, NBD_REPLY_TYPE_OFFSET_DATA, 1, &data(8, b"abcdefgh")), chunk(DONE, NBD_REPLY_TYPE_NONE, 1, &[])]
            .concat(),
        simple(0, 2),
    ];
    let plain = [handshake(0), [simple(0, 1), b"abcdefgh".to_vec()].concat(), simple(0, 2)];
    for (answers, request) in [(extended, 32), (structured, 28), (plain, 28)] {
        dies_at_every_byte(answers, request, async |requests| {
            let read = requests.read(8, 8).await?;
            assert_eq!(read[..4], *b"abcd");
            requests.flush().await
        });
    }
}

#[test]
fn an_oldstyle_server_has_one_export() {
    let script = |mut peer: Peer| {
        let mut old = b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53".to_vec();
        old.extend((SIZE as u64).to_be_bytes());
        old.extend(u32::from(ALL).to_be_bytes());
        old.resize(old.len() + 124, 0);
        peer.send(&old);
        assert_eq!(peer.receive(28)[4..8], [0, 0, 0, 0]);
        peer.send(&[simple(0, 1), b"abcd".to_vec()].concat());
        peer.expect_end();
    };
    with_script(script, async |executor, transport| {
        let mut handshake = Handshake::begin(transport).await.expect("it is a server");
        assert_eq!(handshake.protocol(), Protocol::Oldstyle);
        assert!(matches!(handshake.list().await, Err(Error::Impossible { .. })));
        let (requests, connection) = handshake.go(b"whatever").await.expect("it has one export").start();
        let _connection = executor.spawn(connection.run());
        assert!(requests.export().has(ALL));
        assert_eq!(requests.read(0, 4).await.expect("it can be read"), b"abcd");
    });
}

#[test]
fn a_handshake_that_makes_no_sense_ends_with_what_was_wrong() {
    let answer = |reply: Vec<u8>| [greeting(3), reply].concat();
    let info = |data: &[u8]| option_reply(NBD_OPT_INFO, NBD_REP_INFO, data);
    let mut long = option_reply(NBD_OPT_INFO, NBD_REP_INFO, &[]);
    long[16..20].copy_from_slice(&[0xff; 4]);
    for (bytes, expected) in [
        (b"HTTP/1.1 400 Bad Request".to_vec(), "is no NBD server: it starts with \"HTTP/1.1\""),
        (b"NBDMAGICNBDMAGIC".to_vec(), "no known kind of NBD"),
        (answer(vec![0; 20]), "not with its magic number"),
        (answer(option_reply(NBD_OPT_GO, NBD_REP_ACK, &[])), "answered NBD_OPT_GO where it was asked NBD_OPT_INFO"),
        (answer(option_reply(NBD_OPT_INFO, NBD_REP_ACK, &[])), "without saying how large it is"),
        (answer(option_reply(NBD_OPT_INFO, NBD_REP_SERVER, &[0; 4])), "which is no reply to it"),
        (answer(info(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])), "block sizes that cannot be"),
        (answer(long), "more than any reply has"),
        (answer(info(&[0, 99]).repeat(MANY)), "without end"),
    ] {
        let script = move |mut peer: Peer| {
            peer.send(&bytes);
            peer.expect_end();
        };
        let error = with_script(script, async |_, transport| {
            let mut handshake = Handshake::begin(transport).await?;
            handshake.info(b"").await
        });
        let error = error.expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}, not {expected}");
    }
}

/// More replies than an answer may have.
const MANY: usize = 300_000;

#[test]
fn a_reply_that_nobody_waits_for_any_more_is_passed_over() {
    let (sent, asked) = mpsc::channel();
    let script = move |mut peer: Peer| {
        peer.shake_hands(0, ALL);
        peer.receive(28);
        sent.send(()).expect("the test waits for it");
        peer.receive(28);
        peer.send(&simple(0, 2));
        peer.send(&[simple(0, 1), b"abcd".to_vec()].concat());
        peer.receive(28);
        peer.send(&simple(0, 3));
        peer.expect_end();
    };
    with_script(script, async |executor, transport| {
        let (requests, _connection) = connect(executor, transport, &wishes()).await;
        let mut read = Box::pin(requests.read(0, 4));
        assert!(poll_once(&mut read).await.is_none());
        // It is asked before it is dropped.
        smol::unblock(move || asked.recv()).await.expect("the server was asked");
        drop(read);
        requests.flush().await.expect("the connection is as good as before");
        requests.flush().await.expect("the connection is as good as before");
    });
}

#[test]
fn the_socket_is_closed_when_nobody_can_ask_although_the_server_owes_a_reply() {
    let (sent, asked) = mpsc::channel();
    let script = move |mut peer: Peer| {
        peer.shake_hands(0, ALL);
        peer.receive(28);
        sent.send(()).expect("the test waits for it");
        // Never answered; ends only when the client closes.
        peer.expect_end();
    };
    with_script(script, async |executor, transport| {
        let (requests, connection) = connect(executor, transport, &wishes()).await;
        let mut read = Box::pin(requests.read(0, 4));
        assert!(poll_once(&mut read).await.is_none());
        smol::unblock(move || asked.recv()).await.expect("the server was asked");
        drop(read);
        drop(requests);
        connection.await.expect("it was we who ended it");
    });
}

#[test]
fn an_actor_that_is_dropped_fails_what_is_under_way_and_what_waits_for_its_turn() {
    let script = |mut peer: Peer| {
        peer.shake_hands(0, ALL);
        peer.expect_end();
    };
    with_script(script, async |executor, transport| {
        let (requests, connection) = connect(executor, transport, &wishes()).await;
        let waiting: Vec<_> = (0..1000)
            .map(|_| {
                let requests = requests.clone();
                executor.spawn(async move { requests.flush().await })
            })
            .collect();
        // As much as can be asked has been asked.
        for _ in 0..5000 {
            smol::future::yield_now().await;
        }
        drop(connection);
        for task in waiting {
            assert!(matches!(task.await, Err(Error::Closed)));
        }
        assert!(matches!(requests.read(0, 1).await, Err(Error::Closed)));
    });
}

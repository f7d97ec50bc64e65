//! Ordinary behaviour, against the engine.

use nbdcaptive_actors::Server;
use nbdcaptive_actors::client::{Error, Handshake, Headers, Protocol, Wishes, negotiate};
use nbdcaptive_actors::device::Flags;
use nbdcaptive_actors::protocol::ErrorCode;
use nbdcaptive_actors::protocol::constants::*;
use smol::future::zip;

use super::rig::*;

const NO_FLAGS: Flags = Flags { fua: false, may_trim: false, fast: false };

fn as_it_is(server: Server) -> Server {
    server
}

fn wishes(headers: Headers) -> Wishes {
    Wishes { headers, ..Wishes::export("disk") }
}

#[test]
fn what_is_written_is_read_with_every_kind_of_headers() {
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        let disk = Disk::new();
        with_engine(disk.clone(), as_it_is, async |executor, transport| {
            let (requests, connection) = connect(executor, transport, &wishes(headers)).await;
            assert_eq!(requests.headers(), headers);
            assert_eq!(requests.export().size, SIZE as u64);
            let data: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
            requests.write(data.clone(), 4097, Flags { fua: true, ..NO_FLAGS }).await.expect("it can be written");
            assert_eq!(requests.read(4097, 300_000).await.expect("it can be read"), data);
            requests.write_zeroes(4100, 100, Flags { may_trim: true, ..NO_FLAGS }).await.expect("it can be zeroed");
            requests.trim(8000, 10, NO_FLAGS).await.expect("it can be trimmed");
            requests.cache(0, 4096).await.expect("it can be cached");
            requests.flush().await.expect("it can be flushed");
            assert_eq!(requests.read(4096, 6).await.expect("it can be read"), [0, 0, 1, 2, 0, 0]);
            assert_eq!(requests.read(0, 0).await.expect("nothing can be read"), []);
            requests.disconnect().await.expect("nothing is in its way");
            connection.await.expect("it was we who ended it");
            assert!(matches!(requests.flush().await, Err(Error::Closed)));
        });
        assert_eq!(disk.0.lock().expect("nobody panics here")[4097..4100], [0, 1, 2]);
    }
}

#[test]
fn block_status_tells_holes_from_data() {
    with_engine(Disk::new(), as_it_is, async |executor, transport| {
        let (requests, _connection) = connect(executor, transport, &Wishes::export("")).await;
        let id = requests.export().contexts[0].id;
        requests.write(vec![1; 4096], 8192, NO_FLAGS).await.expect("it can be written");
        let status = requests.block_status(0, SIZE as u64, false).await.expect("it is known");
        assert_eq!(status.len(), 1);
        assert_eq!(status[0].id, id);
        let extents: Vec<_> = status[0].extents.iter().map(|extent| (extent.length, extent.status)).collect();
        assert_eq!(extents, [(8192, 3), (4096, 0), (SIZE as u64 - 12288, 3)]);
        let one = requests.block_status(4096, 8192, true).await.expect("it is known");
        assert_eq!(one[0].extents.iter().map(|extent| extent.length).collect::<Vec<_>>(), [4096]);
        assert!(requests.export().has(NBD_FLAG_BLOCK_STATUS_PAYLOAD));
        assert_eq!(requests.block_status_of(&[id], 4096, 8192, true).await.expect("it is known"), one);
        // A long read, of holes and data.
        let read = requests.read(0, 900_000).await.expect("it can be read");
        assert!(read.len() == 900_000 && (0..900_000).all(|at| read[at] == u8::from((8192..12288).contains(&at))));
        requests.disconnect().await.expect("nothing is in its way");
    });
}

#[test]
fn many_requests_are_under_way_at_once() {
    with_engine(Disk::new(), as_it_is, async |executor, transport| {
        let (requests, connection) = connect(executor, transport, &Wishes::export("")).await;
        // More than there may be under way, and more bytes than sockets hold.
        let tasks: Vec<_> = (0..2000u64)
            .map(|n| {
                let requests = requests.clone();
                executor.spawn(async move {
                    let offset = n % 200 * 4096;
                    requests.write(vec![(n % 200) as u8; 4096], offset, NO_FLAGS).await.expect("it can be written");
                    let read = requests.read(offset, 4096).await.expect("it can be read");
                    assert!(read.iter().all(|&byte| byte == (n % 200) as u8), "{n}");
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        requests.disconnect().await.expect("nothing is in its way");
        connection.await.expect("it was we who ended it");
    });
}

#[test]
fn a_request_that_fails_is_the_only_one_that_does() {
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        with_engine(Disk::new(), as_it_is, async |executor, transport| {
            let (requests, _connection) = connect(executor, transport, &wishes(headers)).await;
            let (bad, good) = zip(requests.read(BAD, 1), requests.read(BAD + 1, 1)).await;
            let bad = bad.expect_err("the device refuses");
            assert_eq!(bad.code(), ErrorCode::Io);
            assert_eq!(bad.to_string().contains("a bad byte"), requests.headers() > Headers::Simple, "{bad}");
            good.expect("that is another byte");
            assert_eq!(requests.write(vec![1], BAD, NO_FLAGS).await.map_err(|error| error.code()), Err(ErrorCode::Io));
            requests.flush().await.expect("the connection is as good as before");
            requests.disconnect().await.expect("nothing is in its way");
        });
    }
}

#[test]
fn what_cannot_be_is_not_asked_for() {
    with_engine(
        Disk::new(),
        |server| server.read_only(true),
        async |executor, transport| {
            let (requests, _connection) = connect(executor, transport, &Wishes::export("")).await;
            let size = SIZE as u64;
            assert!(requests.export().has(NBD_FLAG_READ_ONLY));
            let code = |error: Error| error.code();
            assert_eq!(requests.read(size, 1).await.map_err(code), Err(ErrorCode::Invalid));
            assert_eq!(requests.read(u64::MAX, 1).await.map_err(code), Err(ErrorCode::Invalid));
            assert_eq!(requests.write(vec![1], 0, NO_FLAGS).await.map_err(code), Err(ErrorCode::NotPermitted));
            assert_eq!(requests.trim(0, 1, NO_FLAGS).await.map_err(code), Err(ErrorCode::NotPermitted));
            assert!(requests.block_status_of(&[77], 0, 1, false).await.is_err());
            assert_eq!(requests.block_status(0, 0, false).await.map(drop).map_err(code), Err(ErrorCode::Invalid));
            requests.disconnect().await.expect("nothing is in its way");
        },
    );
}

#[test]
fn a_handshake_tells_what_there_is_and_goes_on_after_a_refusal() {
    with_engine(Disk::new(), as_it_is, async |executor, transport| {
        let mut handshake = Handshake::begin(transport).await.expect("it is a server");
        assert_eq!((handshake.protocol(), handshake.headers()), (Protocol::FixedNewstyle, Headers::Simple));
        assert_eq!(handshake.ask_for_headers(Headers::Structured).await.expect("it has options"), Headers::Structured);
        let listed = handshake.list().await.expect("it lists");
        assert_eq!(listed.iter().map(|export| &export.name[..]).collect::<Vec<_>>(), [b""]);
        let refused = handshake.info(b"none").await.expect_err("there is no such export");
        let text = refused.to_string();
        assert!(matches!(refused, Error::Refused(_)) && text.contains("no such disk"), "{text}");
        let info = handshake.info(b"some").await.expect("there is such an export");
        assert_eq!((info.size, info.description), (SIZE as u64, Some(b"a disk in memory".to_vec())));
        let contexts = handshake.list_meta_contexts(b"some", &[]).await.expect("it has contexts");
        assert_eq!(contexts.iter().map(|context| &context.name[..]).collect::<Vec<_>>(), [b"base:allocation"]);
        // What was selected for another export is nobody's.
        handshake.set_meta_contexts(b"other", &[b"base:allocation".to_vec()]).await.expect("it has contexts");
        let long = handshake.info(&[b'x'; 4097]).await;
        assert!(matches!(long, Err(Error::Impossible { .. })));
        let (requests, connection) = handshake.go(b"some").await.expect("there is such an export").start();
        let _connection = executor.spawn(connection.run());
        assert!(requests.export().contexts.is_empty());
        assert_eq!(
            requests.block_status(0, 1, false).await.map(drop).map_err(|error| error.code()),
            Err(ErrorCode::Invalid)
        );
        requests.disconnect().await.expect("nothing is in its way");
    });
}

#[test]
fn a_server_that_offers_less_is_spoken_to_all_the_same() {
    for flags in [0, NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES] {
        with_engine(
            Disk::new(),
            |server| server.mask_handshake(flags).structured_replies(false),
            async |executor, transport| {
                let (requests, _connection) = connect(executor, transport, &Wishes::export("disk")).await;
                assert_eq!((requests.headers(), requests.export().size), (Headers::Simple, SIZE as u64));
                assert_eq!(requests.read(0, 4).await.expect("it can be read"), [0; 4]);
                requests.disconnect().await.expect("nothing is in its way");
            },
        );
    }
}

#[test]
fn an_export_that_is_not_there_is_an_error_with_the_servers_word() {
    with_engine(Disk::new(), as_it_is, async |_, transport| {
        let error = negotiate(transport, &Wishes::export("nothing")).await.map(drop).expect_err("there is none");
        assert!(error.to_string().contains("no such disk"), "{error}");
    });
    with_engine(
        Disk::new(),
        |server| server.mask_handshake(0),
        async |_, transport| {
            let error = negotiate(transport, &Wishes::export("nothing")).await.map(drop).expect_err("there is none");
            assert!(matches!(error, Error::Ended(_)), "{error}");
        },
    );
}

//! The server that leaves with its last client.

use std::time::Duration;

use nbdcaptive_actors::{Cause, Outcome};

use super::rig::*;

fn start(place: Place) -> (Disk, Rig) {
    let disk = Disk::new(|_| Ok(()));
    let rig = Rig::start_with(place, &disk, |server| server.exit_last(true));
    (disk, rig)
}

fn expect_left(outcome: &Outcome) {
    assert_eq!((&outcome.cause, outcome.exit_status()), (&Cause::LastClientLeft, 0), "{outcome:?}");
}

/// D18: "last client leaves: DISC, close, RST, killed": "0, clean"
#[test]
fn ends_however_the_last_client_leaves() {
    everywhere(|place| {
        for how in ["DISC", "close", "half a request", "unread replies"] {
            let (disk, rig) = start(place);
            let mut client = rig.client();
            match how {
                "DISC" => client.request(NBD_CMD_DISC, 1, 0),
                "half a request" => client.send(&request(NBD_CMD_READ, 1, 1)[..13]),
                "unread replies" => client.request(NBD_CMD_READ, 1, 8 << 20),
                _ => {}
            }
            drop(client);
            expect_left(&rig.outcome());
            assert_eq!(disk.count(Op::Close), 1, "{how}");
        }
    });
}

/// D20: "counts connections that reached transmission (GO/EXPORT_NAME) only"
#[test]
fn probes_and_aborted_handshakes_neither_count_nor_end_anything() {
    everywhere(|place| {
        let (disk, rig) = start(place);
        for bytes in 0..handshake().len() {
            let mut client = rig.connect();
            client.receive::<18>();
            client.send(&handshake()[..bytes]);
        }
        let mut client = rig.client();
        drop(rig.connect());
        client.request(NBD_CMD_FLUSH, 1, 0);
        assert_eq!(client.reply(), (1, 0));
        drop(client);
        expect_left(&rig.outcome());
        assert_eq!(disk.count(Op::Open), 1);
    });
}

/// D21: "one client: OPT_INFO, then OPT_GO, then READ": "works"
#[test]
fn a_look_before_the_choice_does_not_end_the_server() {
    everywhere(|place| {
        let (disk, rig) = start(place);
        let mut client = rig.connect();
        client.receive::<18>();
        client.send(&3_u32.to_be_bytes());
        for option in [6_u32, 7] {
            let bytes: [&[u8]; 4] = [b"IHAVEOPT", &option.to_be_bytes(), &6_u32.to_be_bytes(), &[0; 6]];
            client.send(&bytes.concat());
            // NBD_INFO_EXPORT and the acknowledgement.
            client.receive::<32>();
            client.receive::<20>();
        }
        assert_eq!(disk.done(), [Op::Open, Op::Close, Op::Open]);
        client.request(NBD_CMD_FLUSH, 1, 0);
        assert_eq!(client.reply(), (1, 0));
        drop(client);
        expect_left(&rig.outcome());
    });
}

/// D22: "the handshaking one decides"
#[test]
fn a_client_in_its_handshake_decides() {
    everywhere(|place| {
        // It is served; it leaves; it takes too long.
        for what in ["go", "leave", "stay"] {
            let disk = Disk::new(|_| Ok(()));
            let limit = Duration::from_secs(if what == "stay" { 3 } else { 60 });
            let rig = Rig::start_with(place, &disk, |server| server.exit_last(true).handshake_timeout(Some(limit)));
            let client = rig.client();
            let mut late = rig.connect();
            late.receive::<18>();
            drop(client);
            disk.wait_until_done(Op::Close);
            match what {
                "go" => {
                    late.send(&handshake());
                    late.receive::<10>();
                    late.request(NBD_CMD_FLUSH, 1, 0);
                    assert_eq!(late.reply(), (1, 0));
                    drop(late);
                }
                "leave" => drop(late),
                _ => late.expect_end(),
            }
            expect_left(&rig.outcome());
        }
    });
}

/// D24: "first cause wins the log line": whatever comes at once with the last client's leave, there is one end, and it is
/// an orderly one.
#[test]
fn several_reasons_at_once_make_one_end() {
    everywhere(|place| {
        for _ in 0..20 {
            let (disk, rig) = start(place);
            let mut client = rig.client();
            client.write(1, b"data");
            assert_eq!(client.reply(), (1, 0));
            let (signals, requests) = (rig.handle(), rig.handle());
            let threads = [
                std::thread::spawn(move || drop(client)),
                std::thread::spawn(move || signals.signal(SIGTERM)),
                std::thread::spawn(move || requests.shut_down(Cause::Requested)),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            let outcome = rig.outcome();
            assert_eq!(outcome.exit_status(), 0);
            assert!([Cause::LastClientLeft, Cause::Signal(SIGTERM), Cause::Requested].contains(&outcome.cause));
            assert_eq!(disk.done(), [Op::Open, Op::Write, Op::Flush, Op::Close, Op::Unload]);
        }
    });
}

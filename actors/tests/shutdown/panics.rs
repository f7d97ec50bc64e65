//! A panic is a fatal cause, and not a silent gap: the client gets its error, the others are served to the end.

use std::fmt;
use std::sync::Arc;

use nbdcaptive_actors::device::Result;
use nbdcaptive_actors::log::{Level, Log};
use nbdcaptive_actors::{Cause, Outcome, SessionId};

use super::rig::*;

fn expect_fatal(outcome: &Outcome, words: &str) {
    assert!(matches!(&outcome.cause, Cause::Fatal(why) if why.contains(words)), "{outcome:?}");
    assert_eq!(outcome.exit_status(), 1);
}

fn panicking(at: Op) -> impl Fn(Op) -> Result<()> + Clone {
    move |op| if op == at { panic!("as a test wants it") } else { Ok(()) }
}

#[test]
fn a_device_that_panics_in_a_request_answers_with_an_error_and_ends_the_server() {
    everywhere(|place| {
        for disk in [Disk::new(panicking(Op::Read)), Disk::at_once(panicking(Op::Read))] {
            let rig = Rig::start(place, &disk);
            let mut other = rig.client();
            let mut client = rig.client();
            client.request(NBD_CMD_READ, 1, 512);
            assert_eq!(client.reply(), (1, NBD_EIO));
            client.expect_end();
            other.expect_end();
            expect_fatal(&rig.outcome(), "the device panicked: as a test wants it");
            assert_eq!(disk.count(Op::Close), 2);
            assert_eq!(disk.count(Op::Unload), 1);
        }
    });
}

#[test]
fn requests_beside_one_that_panics_are_answered() {
    everywhere(|place| {
        let gate = Gate::default();
        let here = gate.clone();
        let disk = Disk::new(move |op| match op {
            Op::Read => panic!("as a test wants it"),
            Op::Write => {
                here.pass();
                Ok(())
            }
            _ => Ok(()),
        });
        let rig = Rig::start(place, &disk);
        let mut writer = rig.client();
        writer.write(1, b"data");
        disk.wait_until_begun(Op::Write);
        let mut reader = rig.client();
        reader.request(NBD_CMD_READ, 2, 512);
        assert_eq!(reader.reply(), (2, NBD_EIO));
        rig.wait_until_draining();
        gate.open();
        assert_eq!(writer.reply(), (1, 0));
        expect_fatal(&rig.outcome(), "the device panicked");
        assert_eq!(disk.count(Op::Flush), 1);
    });
}

#[test]
fn a_device_that_panics_while_it_is_opened_or_closed_ends_the_server() {
    everywhere(|place| {
        for at in [Op::Open, Op::Close] {
            let disk = Disk::new(panicking(at));
            let rig = Rig::start(place, &disk);
            let mut client = rig.connect();
            client.receive::<18>();
            client.send(&handshake());
            if at == Op::Close {
                client.receive::<10>();
                client.request(NBD_CMD_DISC, 1, 0);
            }
            client.expect_end();
            expect_fatal(&rig.outcome(), "the device panicked");
        }
    });
}

#[test]
fn a_panic_in_the_last_flush_close_or_unload_shows_in_the_status() {
    everywhere(|place| {
        for at in [Op::Flush, Op::Close, Op::Unload] {
            let disk = Disk::new(panicking(at));
            let rig = Rig::start(place, &disk);
            let mut client = rig.client();
            client.write(1, b"data");
            assert_eq!(client.reply(), (1, 0));
            let outcome = rig.end();
            assert_eq!(outcome.exit_status(), 1, "{at:?}: {outcome:?}");
            assert_eq!(outcome.cause, Cause::Signal(SIGTERM));
        }
    });
}

/// Panics at the line that begins so.
struct Explosive(&'static str);

impl Log for Explosive {
    fn wants(&self, _level: Level) -> bool {
        true
    }

    fn line(&self, _level: Level, _session: Option<SessionId>, line: fmt::Arguments<'_>) {
        assert!(!line.to_string().starts_with(self.0), "as a test wants it");
    }
}

#[test]
fn a_session_that_panics_ends_the_server_and_the_others_are_drained() {
    everywhere(|place| {
        // In the handshake, and at the very end.
        for line in ["newstyle negotiation: client flags", "client disconnected"] {
            let disk = Disk::new(|_| Ok(()));
            let rig = Rig::start_with(place, &disk, |server| server.log(Arc::new(Explosive(line))));
            let mut client = rig.connect();
            client.receive::<18>();
            client.send(&handshake());
            if line.starts_with("client") {
                client.receive::<10>();
                client.request(NBD_CMD_DISC, 1, 0);
            }
            client.expect_end();
            expect_fatal(&rig.outcome(), "the session of client 1 panicked");
            assert_eq!(disk.count(Op::Open), disk.count(Op::Close));
            assert_eq!(disk.count(Op::Unload), 1);
        }
    });
}

#[test]
fn every_actor_that_panics_ends_the_server() {
    everywhere(|place| {
        let disk = Disk::new(|_| Ok(()));
        let event = Box::pin(async { panic!("as a test wants it") });
        let rig = Rig::start_with(place, &disk, |server| server.exit_when(event));
        expect_fatal(&rig.outcome(), "the ExitPolicy panicked");
        assert_eq!(disk.done(), [Op::Unload]);

        // The Listener, which the end waits for.
        let rig = Rig::start_with(place, &disk, |server| server.before_refusing(|| panic!("as a test wants it")));
        let mut client = rig.client();
        let outcome = rig.end();
        assert_eq!(outcome.exit_status(), 1, "{outcome:?}");
        client.expect_end();

        let rig = Rig::start_with(place, &disk, |server| server.at_end(|| panic!("as a test wants it")));
        expect_fatal(&rig.end(), "the Coordinator panicked");
    });
}

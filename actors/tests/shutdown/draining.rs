//! What becomes of clients and of their data when the server is told to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nbdcaptive_actors::child_supervisor::{Captor, CommandEvent};
use nbdcaptive_actors::device::{Client as Who, Device, Error, ErrorCode, Exports, Result, ThreadModel};
use nbdcaptive_actors::{Cause, CommandEnd};

use super::rig::*;

fn willing(_: Op) -> Result<()> {
    Ok(())
}

/// A device that waits at the gate before it does `waits`.
fn gated(waits: Op) -> (Disk, Gate) {
    let gate = Gate::default();
    let here = gate.clone();
    let act = move |op| {
        if op == waits {
            here.pass();
        }
        Ok(())
    };
    (Disk::new(act), gate)
}

/// A device that fails at `fails`.
fn failing(fails: Op) -> Disk {
    Disk::new(move |op| if op == fails { Err(Error::failed(ErrorCode::Io, "it failed")) } else { Ok(()) })
}

/// F1: "closed at once"
#[test]
fn an_idle_client_is_closed_at_once() {
    everywhere(|place| {
        let disk = Disk::new(willing);
        let rig = Rig::start(place, &disk);
        let mut client = rig.client();
        rig.handle().signal(SIGTERM);
        client.expect_end();
        let outcome = rig.outcome();
        assert_eq!((outcome.exit_status(), outcome.cause), (0, Cause::Signal(SIGTERM)));
        assert_eq!(disk.done(), [Op::Open, Op::Close, Op::Unload]);
    });
}

/// F2: "finished and answered up to DRAIN, then connection closed"
#[test]
fn a_request_in_flight_is_finished_and_answered() {
    everywhere(|place| {
        let (disk, gate) = gated(Op::Write);
        let rig = Rig::start(place, &disk);
        let mut client = rig.client();
        client.write(7, b"data");
        disk.wait_until_begun(Op::Write);
        rig.handle().signal(SIGTERM);
        rig.wait_until_draining();
        gate.open();
        assert_eq!(client.reply(), (7, 0));
        client.expect_end();
        assert_eq!(rig.outcome().exit_status(), 0);
        assert_eq!(disk.done(), [Op::Open, Op::Write, Op::Flush, Op::Close, Op::Unload]);
    });
}

/// F3: "ESHUTDOWN, then close"
#[test]
fn a_request_that_arrives_after_the_end_began_is_refused() {
    everywhere(|place| {
        let (disk, gate) = gated(Op::Read);
        let rig = Rig::start(place, &disk);
        let mut client = rig.client();
        client.request(NBD_CMD_READ, 1, 1);
        disk.wait_until_begun(Op::Read);
        rig.handle().signal(SIGTERM);
        rig.wait_until_draining();
        client.write(2, &[0xff; 100_000]);
        assert_eq!(client.reply(), (2, NBD_ESHUTDOWN));
        // Its data was read over, and the stream is still understood.
        client.request(NBD_CMD_FLUSH, 3, 0);
        assert_eq!(client.reply(), (3, NBD_ESHUTDOWN));
        gate.open();
        assert_eq!(client.reply(), (1, 0));
        client.receive::<1>();
        client.expect_end();
        assert_eq!(rig.outcome().exit_status(), 0);
        assert_eq!(disk.done(), [Op::Open, Op::Read, Op::Close, Op::Unload]);
    });
}

/// F3: a client that never stops asking is answered and does not hold up the end.
#[test]
fn a_client_that_goes_on_asking_does_not_hold_up_the_end() {
    everywhere(|place| {
        let disk = Disk::at_once(willing);
        let rig = Rig::start(place, &disk);
        let mut client = rig.client();
        let mut asking = client.socket.try_clone().unwrap();
        let asker = std::thread::spawn(move || {
            use std::io::Write;
            let many: Vec<u8> = (0..100).flat_map(|cookie| request(NBD_CMD_FLUSH, cookie, 0)).collect();
            // Until the server hangs up.
            while asking.write_all(&many).is_ok() {}
        });
        assert_eq!(client.reply(), (0, 0));
        let reader =
            std::thread::spawn(
                move || while matches!(std::io::Read::read(&mut client.socket, &mut [0; 4096]), Ok(1..)) {},
            );
        assert_eq!(rig.end().exit_status(), 0);
        reader.join().unwrap();
        asker.join().unwrap();
    });
}

/// F4: "dropped (never acknowledged), no partial write to the backend"
#[test]
fn half_a_payload_is_dropped() {
    everywhere(|place| {
        let disk = Disk::new(willing);
        let rig = Rig::start(place, &disk);
        let mut client = rig.client();
        client.request(NBD_CMD_WRITE, 1, 65536);
        client.send(&[0xff; 1000]);
        assert_eq!(rig.end().exit_status(), 0);
        // Refused, if the end came before its header; acknowledged never.
        let mut rest = Vec::new();
        let _ = std::io::Read::read_to_end(&mut client.socket, &mut rest);
        assert!(rest.is_empty() || rest[4..8] == NBD_ESHUTDOWN.to_be_bytes(), "{rest:?}");
        assert_eq!(disk.done(), [Op::Open, Op::Close, Op::Unload]);
    });
}

/// F5: "dropped"
#[test]
fn half_a_handshake_is_dropped() {
    everywhere(|place| {
        let disk = Disk::new(willing);
        let rig = Rig::start(place, &disk);
        let mut clients: Vec<_> = (0..handshake().len()).map(|_| rig.connect()).collect();
        for (bytes, client) in clients.iter_mut().enumerate() {
            client.receive::<18>();
            client.send(&handshake()[..bytes]);
        }
        assert_eq!(rig.end().exit_status(), 0);
        clients.iter_mut().for_each(Client::expect_end);
        assert_eq!(disk.done(), [Op::Unload]);
    });
}

/// F5, F8: an export that is being opened when the end begins is closed again, before the exports are unloaded.
#[test]
fn a_device_that_is_being_opened_is_closed_before_the_unload() {
    everywhere(|place| {
        let (disk, gate) = gated(Op::Open);
        let rig = Rig::start(place, &disk);
        let mut client = rig.connect();
        client.receive::<18>();
        client.send(&handshake());
        disk.wait_until_begun(Op::Open);
        rig.handle().signal(SIGTERM);
        rig.wait_until_draining();
        assert_eq!(disk.done(), []);
        gate.open();
        assert_eq!(rig.outcome().exit_status(), 0);
        assert_eq!(disk.done(), [Op::Open, Op::Close, Op::Unload]);
    });
}

/// F8: also a device whose client has gone while it was opened.
#[test]
fn a_device_whose_client_left_while_it_was_opened_is_closed() {
    everywhere(|place| {
        let (disk, gate) = gated(Op::Open);
        let rig = Rig::start(place, &disk);
        let mut client = rig.connect();
        client.receive::<18>();
        client.send(&handshake());
        disk.wait_until_begun(Op::Open);
        drop(client);
        gate.open();
        disk.wait_until_done(Op::Close);
        assert_eq!(rig.end().exit_status(), 0);
        assert_eq!(disk.done(), [Op::Open, Op::Close, Op::Unload]);
    });
}

/// F6: "reply only after the backend's fdatasync"
#[test]
fn a_slow_flush_is_answered_only_when_it_is_done() {
    everywhere(|place| {
        let (disk, gate) = gated(Op::Flush);
        let rig = Rig::start(place, &disk);
        let mut client = rig.client();
        client.request(NBD_CMD_FLUSH, 1, 0);
        disk.wait_until_begun(Op::Flush);
        rig.handle().signal(SIGTERM);
        rig.wait_until_draining();
        gate.open();
        assert_eq!(client.reply(), (1, 0));
        assert!(disk.done().contains(&Op::Flush));
        client.expect_end();
        assert_eq!(rig.outcome().exit_status(), 0);
    });
}

/// F6, F7: "after DRAIN abandoned unanswered", "stuck backend": the end comes although a thread hangs, and says so.
#[test]
fn a_stuck_device_is_given_up_after_the_drain_timeout() {
    everywhere(|place| {
        for stuck in [Op::Read, Op::Flush, Op::Open, Op::Close] {
            let (disk, gate) = gated(stuck);
            let rig = Rig::start_with(place, &disk, |server| server.drain_timeout(Duration::from_millis(50)));
            let mut client = rig.connect();
            client.receive::<18>();
            client.send(&handshake());
            let mut idle = None;
            if stuck != Op::Open {
                client.receive::<10>();
                idle = Some(rig.client());
            }
            match stuck {
                Op::Read => client.request(NBD_CMD_READ, 1, 512),
                Op::Flush => client.request(NBD_CMD_FLUSH, 1, 0),
                _ => {}
            }
            if stuck != Op::Close {
                disk.wait_until_begun(stuck);
            }
            let outcome = rig.end();
            assert!(outcome.failure.is_some(), "{outcome:?}");
            assert_eq!(outcome.exit_status(), 1);
            client.expect_end();
            idle.iter_mut().for_each(Client::expect_end);
            assert_eq!(disk.count(Op::Unload), 0, "what hangs in the device would hang its unloading too");
            gate.open();
        }
    });
}

/// A grace period that is over soon, for what must come after it.
const SOON: Duration = Duration::from_millis(10);

/// F5: nobody was promised anything yet, so what hangs holds up nobody, is no failure, and is closed should it ever come back.
#[test]
fn a_device_that_hangs_for_a_client_in_the_handshake_is_left_behind() {
    everywhere(|place| {
        let (disk, gate) = gated(Op::Open);
        let rig = Rig::start_with(place, &disk, |server| server.grace_period(SOON));
        let mut client = rig.connect();
        client.receive::<18>();
        client.send(&handshake());
        disk.wait_until_begun(Op::Open);
        rig.handle().signal(SIGTERM);
        client.expect_end();
        let outcome = rig.outcome();
        assert_eq!((outcome.exit_status(), outcome.failure), (0, None));
        assert_eq!(disk.done(), [Op::Unload]);
        gate.open();
        disk.wait_until_done(Op::Close);
        assert_eq!(disk.done(), [Op::Unload, Op::Open, Op::Close]);
    });
}

/// F2 beside it: who was let in has the time of the drain.
#[test]
fn a_request_is_answered_although_another_client_was_left_behind() {
    everywhere(|place| {
        let (read, open) = (Gate::default(), Gate::default());
        let (in_read, in_open, opened) = (read.clone(), open.clone(), AtomicBool::new(false));
        let disk = Disk::new(move |op| {
            match op {
                Op::Open if opened.swap(true, Ordering::SeqCst) => in_open.pass(),
                Op::Read => in_read.pass(),
                _ => {}
            }
            Ok(())
        });
        let rig = Rig::start_with(place, &disk, |server| server.grace_period(SOON));
        let mut client = rig.client();
        client.request(NBD_CMD_READ, 1, 512);
        disk.wait_until_begun(Op::Read);
        let mut other = rig.connect();
        other.receive::<18>();
        other.send(&handshake());
        disk.wait_until_begun_times(Op::Open, 2);
        rig.handle().signal(SIGTERM);
        other.expect_end();
        assert!(rig.outcome_within(Duration::from_millis(100)).is_none(), "the request is under way");
        read.open();
        assert_eq!(client.reply(), (1, 0));
        client.receive::<512>();
        client.expect_end();
        let outcome = rig.outcome();
        assert_eq!((outcome.exit_status(), outcome.failure), (0, None));
        assert_eq!(disk.done(), [Op::Open, Op::Read, Op::Close, Op::Unload]);
        open.open();
    });
}

/// Opens nothing before it is told that nobody waits any more; then it would wait for ever, but for that.
struct Obedient(Disk);

impl Exports for Obedient {
    fn open(&self, client: &Who) -> Result<Box<dyn Device>> {
        let recall = client.connection.recall().expect("a client in the handshake may be recalled");
        self.0.open(client)?;
        smol::block_on(recall.recalled());
        Err(Error::failed(ErrorCode::Shutdown, "nobody waits"))
    }

    fn unload(&self) -> Result<()> {
        self.0.unload()
    }
}

#[test]
fn a_device_that_hears_that_nobody_waits_is_waited_for() {
    everywhere(|place| {
        let disk = Disk::new(willing);
        let recalled = Duration::from_millis(10);
        let rig = Rig::serve(place, Obedient(disk.clone()), |server| server.grace_period(recalled));
        let mut client = rig.connect();
        client.receive::<18>();
        client.send(&handshake());
        disk.wait_until_begun(Op::Open);
        assert_eq!(rig.end().exit_status(), 0);
        client.expect_end();
        assert_eq!(disk.done(), [Op::Open, Op::Unload]);
    });
}

/// One call at a time.
struct OneByOne(Disk);

impl Exports for OneByOne {
    fn thread_model(&self) -> ThreadModel {
        ThreadModel::SerializeAllRequests
    }

    fn open(&self, client: &Who) -> Result<Box<dyn Device>> {
        self.0.open(client)
    }

    fn unload(&self) -> Result<()> {
        self.0.unload()
    }
}

#[test]
fn who_waits_for_a_turn_at_the_end_does_not_get_it() {
    everywhere(|place| {
        let (disk, gate) = gated(Op::Open);
        let rig = Rig::serve(place, OneByOne(disk.clone()), |server| server);
        let mut clients = [rig.connect(), rig.connect()];
        for client in &mut clients {
            client.receive::<18>();
            client.send(&handshake());
        }
        disk.wait_until_begun(Op::Open);
        rig.handle().signal(SIGTERM);
        clients.iter_mut().for_each(Client::expect_end);
        gate.open();
        assert_eq!(rig.outcome().exit_status(), 0);
        assert_eq!(disk.done(), [Op::Open, Op::Close, Op::Unload]);
    });
}

/// F7: a device that makes the thread wait on which all its clients are served.
#[test]
fn a_device_that_hangs_where_it_must_not_wait_is_given_up_too() {
    let gate = Gate::default();
    let here = gate.clone();
    let disk = Disk::at_once(move |op| {
        if op == Op::Read {
            here.pass();
        }
        Ok(())
    });
    let short = Duration::from_millis(50);
    let rig = Rig::start_with(Place::Workers, &disk, |server| server.drain_timeout(short));
    let mut client = rig.client();
    client.request(NBD_CMD_READ, 1, 512);
    disk.wait_until_begun(Op::Read);
    assert_eq!(rig.end().exit_status(), 1);
    gate.open();
}

/// B15: "second SIGTERM while draining", "immediate", "in-flight I/O abandoned"
#[test]
fn a_second_signal_ends_the_wait_for_a_stuck_device() {
    everywhere(|place| {
        let (disk, gate) = gated(Op::Read);
        let rig = Rig::start(place, &disk);
        let mut client = rig.client();
        client.request(NBD_CMD_READ, 1, 512);
        disk.wait_until_begun(Op::Read);
        rig.handle().signal(SIGTERM);
        // One request for the end, as `timeout` makes it.
        rig.handle().signal(SIGTERM);
        // Again and again: those that come too soon after the first do not count.
        let outcome = wait_for("the end", || {
            rig.handle().signal(SIGTERM);
            rig.outcome_within(Duration::from_millis(10))
        });
        assert_eq!(outcome.exit_status(), 1);
        assert!(outcome.failure.is_some_and(|why| why.contains("second signal")));
        client.expect_end();
        gate.open();
    });
}

/// B15, after the command's end: its holder is who hears signals.
#[test]
fn a_second_signal_is_heard_although_the_command_has_ended() {
    everywhere(|place| {
        let (disk, gate) = gated(Op::Read);
        let (orders, _orders) = async_channel::bounded(8);
        let (holder, events) = async_channel::bounded(8);
        let rig = Rig::start_with(place, &disk, |server| server.captor(Captor { orders, events }));
        let mut client = rig.client();
        client.request(NBD_CMD_READ, 1, 512);
        disk.wait_until_begun(Op::Read);
        holder.try_send(CommandEvent::Ended(CommandEnd::Exited(0))).expect("there is room");
        rig.wait_until_draining();
        for event in [CommandEvent::Signal(SIGTERM), CommandEvent::SignalAgain(SIGTERM)] {
            holder.try_send(event).expect("somebody hears it");
        }
        let outcome = rig.outcome();
        assert_eq!(outcome.exit_status(), 1, "the command's success is not that of who was cut off");
        assert_eq!(outcome.cause, Cause::CommandEnded(CommandEnd::Exited(0)));
        client.expect_end();
        gate.open();
    });
}

/// F8: "close of every open handle, then unload"
#[test]
fn every_open_device_is_closed_and_then_all_is_unloaded() {
    everywhere(|place| {
        let disk = Disk::new(willing);
        let rig = Rig::start(place, &disk);
        let clients: Vec<_> = (0..20).map(|_| rig.client()).collect();
        assert_eq!(rig.end().exit_status(), 0);
        assert_eq!(disk.count(Op::Close), 20);
        assert_eq!(disk.count(Op::Unload), 1);
        assert_eq!(disk.done().last(), Some(&Op::Unload));
        drop(clients);
    });
}

/// F8: "a failing final flush/close = status 1"
#[test]
fn a_last_flush_close_or_unload_that_fails_shows_in_the_status() {
    everywhere(|place| {
        for fails in [Op::Flush, Op::Close, Op::Unload] {
            let disk = failing(fails);
            let rig = Rig::start(place, &disk);
            let mut client = rig.client();
            client.write(1, b"data");
            assert_eq!(client.reply(), (1, 0));
            let outcome = rig.end();
            assert_eq!(outcome.exit_status(), 1, "{fails:?}");
            assert_eq!(outcome.failure.as_deref(), Some("it failed"));
            // One that fails is no reason to leave out the next.
            assert_eq!(disk.done(), [Op::Open, Op::Write, Op::Flush, Op::Close, Op::Unload]);
        }
    });
}

/// F8: also of a client that left long before, and of one that only looked.
#[test]
fn a_close_that_failed_before_the_end_shows_in_the_status() {
    everywhere(|place| {
        let disk = failing(Op::Close);
        let rig = Rig::start(place, &disk);
        drop(rig.client());
        disk.wait_until_done(Op::Close);
        assert_eq!(rig.end().exit_status(), 1);

        let disk = failing(Op::Close);
        let rig = Rig::start(place, &disk);
        let mut client = rig.connect();
        client.receive::<18>();
        // NBD_OPT_INFO for the empty name.
        let option: [&[u8]; 5] =
            [&3_u32.to_be_bytes(), b"IHAVEOPT", &6_u32.to_be_bytes(), &6_u32.to_be_bytes(), &[0; 6]];
        client.send(&option.concat());
        disk.wait_until_done(Op::Close);
        assert_eq!(rig.end().exit_status(), 1);
    });
}

/// F10: "final flush of write-back layers on every orderly end (B1, B9, C1, D*)"
#[test]
fn a_device_that_was_written_to_is_flushed_at_every_orderly_end() {
    const CAUSES: [&str; 6] = ["signal", "request", "command", "front", "parent", "last client"];
    everywhere(|place| {
        for cause in CAUSES {
            let disk = Disk::new(willing);
            let (orders, _orders) = async_channel::bounded(8);
            let (events, events_inbox) = async_channel::bounded(8);
            let rig = Rig::start_with(place, &disk, |server| match cause {
                "command" | "front" | "parent" => server.captor(Captor { orders, events: events_inbox }),
                "last client" => server.exit_last(true),
                _ => server,
            });
            let mut client = rig.client();
            client.write(1, b"data");
            assert_eq!(client.reply(), (1, 0));
            let ended = CommandEvent::Ended(CommandEnd::Exited(0));
            match cause {
                "signal" => rig.handle().signal(SIGTERM),
                "request" => rig.handle().shut_down(Cause::Requested),
                "command" => events.try_send(ended).unwrap(),
                "front" => [CommandEvent::FrontEnded, ended].into_iter().for_each(|one| events.try_send(one).unwrap()),
                "parent" => {
                    [CommandEvent::ParentEnded, ended].into_iter().for_each(|one| events.try_send(one).unwrap())
                }
                _ => client.request(NBD_CMD_DISC, 2, 0),
            }
            assert_eq!(rig.outcome().exit_status(), 0, "{cause}");
            let want = [Op::Open, Op::Write, Op::Flush, Op::Close, Op::Unload];
            assert_eq!(disk.done(), want, "{cause}");
        }
    });
}

/// F10: what a flush has covered is not flushed again.
#[test]
fn a_device_that_was_flushed_is_just_closed() {
    everywhere(|place| {
        for disk in [Disk::new(willing), Disk::at_once(willing)] {
            let rig = Rig::start(place, &disk);
            let mut client = rig.client();
            client.write(1, b"data");
            assert_eq!(client.reply(), (1, 0));
            client.request(NBD_CMD_FLUSH, 2, 0);
            assert_eq!(client.reply(), (2, 0));
            assert_eq!(rig.end().exit_status(), 0);
            assert_eq!(disk.done(), [Op::Open, Op::Write, Op::Flush, Op::Close, Op::Unload]);
        }
    });
}

/// F10: a write that was acknowledged while a flush went on is not covered by it.
#[test]
fn a_write_beside_a_flush_is_flushed_at_the_end() {
    everywhere(|place| {
        let (disk, gate) = gated(Op::Flush);
        let rig = Rig::start(place, &disk);
        let mut client = rig.client();
        client.request(NBD_CMD_FLUSH, 1, 0);
        disk.wait_until_begun(Op::Flush);
        client.write(2, b"data");
        assert_eq!(client.reply(), (2, 0));
        gate.open();
        assert_eq!(client.reply(), (1, 0));
        assert_eq!(rig.end().exit_status(), 0);
        assert_eq!(disk.done(), [Op::Open, Op::Write, Op::Flush, Op::Flush, Op::Close, Op::Unload]);
    });
}

/// F12: "does not hold up shutdown"
#[test]
fn a_client_that_does_not_read_its_replies_does_not_hold_up_the_end() {
    everywhere(|place| {
        // It may also have said that it is done.
        for leaves in [false, true] {
            let disk = Disk::new(willing);
            let rig = Rig::start(place, &disk);
            let mut client = rig.client();
            client.write(1, b"data");
            client.request(NBD_CMD_READ, 2, 8 << 20);
            if leaves {
                client.request(NBD_CMD_DISC, 3, 0);
            }
            disk.wait_until_done(Op::Read);
            let outcome = rig.end();
            // It is the client's fault, so it is no failure of the server.
            assert_eq!(outcome.exit_status(), 0, "{outcome:?}");
            assert_eq!(disk.done()[3..], [Op::Flush, Op::Close, Op::Unload]);
        }
    });
}

/// F2, F12: a client that reads gets all of its replies, however many there are.
#[test]
fn a_client_that_reads_late_gets_all_of_its_replies() {
    everywhere(|place| {
        let disk = Disk::new(willing);
        let rig = Rig::start(place, &disk);
        let mut client = rig.client();
        client.request(NBD_CMD_READ, 1, 8 << 20);
        disk.wait_until_done(Op::Read);
        rig.handle().signal(SIGTERM);
        rig.wait_until_draining();
        let mut all = Vec::new();
        std::io::Read::read_to_end(&mut client.socket, &mut all).unwrap();
        assert_eq!(all.len(), 16 + (8 << 20));
        assert_eq!(rig.outcome().exit_status(), 0);
    });
}

/// F12: what has not begun for a client that was cut off is left out.
#[test]
fn requests_that_wait_for_a_client_that_was_cut_off_are_not_carried_out() {
    everywhere(|place| {
        let gate = Gate::default();
        let here = gate.clone();
        let first = Arc::new(AtomicBool::new(true));
        let disk = Disk::new(move |op| {
            if op == Op::Write && !first.swap(false, Ordering::Relaxed) {
                here.pass();
            }
            Ok(())
        });
        let rig = Rig::start_with(place, &disk, |server| server.threads(1));
        let mut client = rig.client();
        client.request(NBD_CMD_READ, 1, 8 << 20);
        disk.wait_until_done(Op::Read);
        for cookie in 2..50 {
            client.write(cookie, b"data");
        }
        rig.handle().signal(SIGTERM);
        rig.wait_until_draining();
        drop(client);
        gate.open();
        assert_eq!(rig.outcome().exit_status(), 0);
        assert_eq!(disk.done().last(), Some(&Op::Unload));
    });
}

/// F11: "ENOSPC to client, server goes on"
#[test]
fn a_full_disk_is_the_clients_error_and_the_server_goes_on() {
    const NBD_ENOSPC: u32 = 28;
    everywhere(|place| {
        let full = |op| match op {
            Op::Write => Err(Error::system("pwrite", std::io::Error::from_raw_os_error(nix::libc::ENOSPC))),
            _ => Ok(()),
        };
        for disk in [Disk::new(full), Disk::at_once(full)] {
            let rig = Rig::start(place, &disk);
            let mut client = rig.client();
            client.write(1, b"data");
            assert_eq!(client.reply(), (1, NBD_ENOSPC));
            client.request(NBD_CMD_FLUSH, 2, 0);
            assert_eq!(client.reply(), (2, 0));
            assert_eq!(rig.end().exit_status(), 0);
        }
    });
}

/// A client is owed 16 MiB at most: one that asks and never reads is not listened to beyond that.
#[test]
fn a_client_that_never_reads_cannot_make_the_server_hold_much() {
    everywhere(|place| {
        for disk in [Disk::new(willing), Disk::at_once(willing)] {
            let rig = Rig::start(place, &disk);
            let mut client = rig.client();
            let many: Vec<u8> = (0..1000).flat_map(|cookie| request(NBD_CMD_READ, cookie, 1 << 20)).collect();
            client.send(&many);
            wait_for("the server to be busy", || (disk.count(Op::Read) >= 16).then_some(()));
            assert_eq!(rig.end().exit_status(), 0);
            let served = disk.count(Op::Read);
            assert!(served <= 20, "{served} requests of a megabyte were carried out");
        }
    });
}

//! The four thread models: what a device is promised never to see at the same time, whether it answers at once or waits.
//! Source: nbdkit-plugin.pod "Threads", quoted below.

use nbdcaptive_actors::device::ThreadModel;

use super::rig::*;

/// Requests that wait, with others among them that need not.
fn mixed(count: u64) -> Vec<u64> {
    (0..count).flat_map(|number| [number * BLOCK, GATED + number * BLOCK]).collect()
}

fn sorted(mut offsets: Vec<u64>) -> Vec<u64> {
    offsets.sort_unstable();
    offsets
}

/// "Multiple handles can be open and multiple data requests can happen in parallel. However only one request will happen per
/// handle at a time (but requests on different handles might happen concurrently)."
#[test]
fn serialize_requests_is_one_at_a_time_for_each_client() {
    for place in ONE_THREAD {
        for answers in EITHER_WAY {
            let disk = Disk::with_model(ThreadModel::SerializeRequests, answers);
            let rig = Rig::start(place, &disk);
            let mut clients: Vec<Client> = (0..3).map(|_| rig.client()).collect();
            for client in &mut clients {
                client.ask_for(mixed(10));
            }
            disk.wait_until_at_gate(3);
            // More comes while a request is under way, which could be answered at once.
            for client in &mut clients {
                client.ask_for(offsets(GATED / 2, 10));
                rig.wait_until_considered(client);
            }
            // Through the gate one by one, and each time all three are there again, whoever it was: each has ten to come.
            for _ in 0..9 {
                disk.let_one_through();
                disk.wait_until_at_gate(3);
            }
            disk.open_gate();
            for client in &mut clients {
                let all = [mixed(10), offsets(GATED / 2, 10)].concat();
                assert_eq!(client.blocks(all.len()), sorted(all));
                client.work(20);
            }
            assert_eq!(disk.requests().most_of_one_connection, 1, "{place:?}, {answers:?}");
            assert_eq!(disk.blocking().most, 3, "{place:?}, {answers:?}");
        }
    }
}

/// One that has to wait is no reason to send all that came behind it to threads, one by one.
#[test]
fn only_what_has_to_wait_goes_to_a_thread_where_requests_go_one_by_one() {
    for place in ONE_THREAD {
        for model in [ThreadModel::SerializeRequests, ThreadModel::SerializeAllRequests] {
            let disk = Disk::with_model(model, Answers::AtOnce);
            let rig = Rig::start(place, &disk);
            let mut client = rig.client();
            // The thread that opened the device may still have its turn.
            client.work(1);
            let before = disk.blocking().ever;
            let all = [offsets(0, 5), vec![GATED], offsets(0, 100), vec![GATED], offsets(0, 5)].concat();
            client.ask_for(all.iter().copied());
            disk.wait_until_at_gate(1);
            rig.wait_until_considered(&client);
            disk.open_gate();
            let answered: Vec<u64> = all.iter().map(|_| client.block()).collect();
            assert_eq!(answered, all, "{place:?}, {model:?}");
            assert_eq!(disk.blocking().ever - before, 2, "{place:?}, {model:?}");
        }
    }
}

/// "Multiple handles can be open at the same time, but requests are serialized so that for the plugin as a whole only one
/// ... request will be in progress at any time."
#[test]
fn serialize_all_requests_is_one_at_a_time_for_all_clients() {
    for place in ONE_THREAD {
        for answers in EITHER_WAY {
            let disk = Disk::with_model(ThreadModel::SerializeAllRequests, answers);
            let rig = Rig::start(place, &disk);
            let mut clients: Vec<Client> = (0..4).map(|_| rig.client()).collect();
            clients[0].ask_for(mixed(10));
            disk.wait_until_at_gate(1);
            for client in &mut clients[1..] {
                client.ask_for(mixed(10));
                rig.wait_until_considered(client);
            }
            // Nobody's turn but the first client's, also for what could be answered at once.
            assert_eq!((disk.requests().now, disk.requests().most), (1, 1), "{place:?}, {answers:?}");
            assert!(clients[1..].iter().all(|client| !client.has_answer()));
            for _ in 0..20 {
                disk.let_one_through();
                disk.wait_until_at_gate(1);
            }
            disk.open_gate();
            for client in &mut clients {
                assert_eq!(client.blocks(20), sorted(mixed(10)));
            }
            assert_eq!(disk.requests().most, 1, "{place:?}, {answers:?}");
        }
    }
}

/// "only one open/read/write/close (etc) request will be in progress at any time"
#[test]
fn serialize_all_requests_holds_for_open_and_for_the_last_flush_and_close() {
    for place in ONE_THREAD {
        let disk = Disk::with_model(ThreadModel::SerializeAllRequests, Answers::AtOnce);
        let rig = Rig::start(place, &disk);
        let (mut first, mut second) = (rig.client(), rig.client());
        second.send(&[&request(NBD_CMD_WRITE, 0)[..], &[0; BLOCK as usize]].concat());
        second.reply();
        first.ask_for([GATED]);
        disk.wait_until_at_gate(1);
        // It leaves, and is owed a flush and a close; another comes.
        drop(second);
        let mut third = rig.connect();
        third.ask_for_export("");
        rig.wait_until_considered(&third);
        assert!(!disk.lives().contains(&Life::Closed(2)), "{place:?}");
        disk.open_gate();
        first.block();
        third.enter();
        third.work(1);
        wait_for("the close", || disk.lives().contains(&Life::Closed(2)).then_some(()));
        assert_eq!(disk.requests().most, 1, "{place:?}");
    }
}

/// The same on several threads, which all want the one place there is.
#[test]
fn serialize_all_requests_holds_under_load_and_gives_everyone_a_turn() {
    for answers in EITHER_WAY {
        let disk = Disk::with_model(ThreadModel::SerializeAllRequests, answers);
        disk.open_gate();
        let rig = Rig::start(Place::Workers(3), &disk);
        std::thread::scope(|scope| {
            for number in 0..6 {
                let mut client = rig.client();
                scope.spawn(move || {
                    // Half of them always wait on a thread, half of them do if the device answers nothing at once.
                    let from = if number % 2 == 0 { 0 } else { GATED };
                    for _ in 0..10 {
                        client.ask_for(offsets(from, 50));
                        assert_eq!(client.blocks(50), offsets(from, 50));
                    }
                });
            }
        });
        assert_eq!(disk.requests().most, 1, "{answers:?}");
    }
}

/// "Only a single handle can be open at any time ... If a second client tries to connect it will block waiting for the first
/// client to close the connection."
#[test]
fn serialize_connections_is_one_client_after_another() {
    for place in ONE_THREAD {
        for answers in EITHER_WAY {
            let disk = Disk::with_model(ThreadModel::SerializeConnections, answers);
            let rig = Rig::start(place, &disk);
            let mut first = rig.client();
            assert_eq!(first.flags & NBD_FLAG_CAN_MULTI_CONN, 0, "there cannot be several");
            let mut others: Vec<Client> = (0..3).map(|_| rig.connect()).collect();
            for client in &mut others {
                client.ask_for_export("");
                rig.wait_until_considered(client);
            }
            // One at a time, also for this client.
            first.ask_for(mixed(10));
            for _ in 0..10 {
                disk.wait_until_at_gate(1);
                disk.let_one_through();
            }
            assert_eq!(first.blocks(20), sorted(mixed(10)));
            assert_eq!(disk.lives(), [Life::Opened(1)]);
            assert!(others.iter().all(|client| !client.has_answer()));
            // Gone with a request under way: the others wait for that, and for the close.
            first.ask_for([GATED]);
            disk.wait_until_at_gate(1);
            drop(first);
            let mut probe = rig.connect();
            probe.ask_for_export("");
            rig.wait_until_considered(&probe);
            assert_eq!(disk.lives(), [Life::Opened(1)]);
            disk.open_gate();
            // In whatever order: each is let in when the one before it has left.
            others.push(probe);
            while !others.is_empty() {
                let next = wait_for("a client to be let in", || others.iter().position(Client::has_answer));
                let mut client = others.swap_remove(next);
                client.enter();
                client.work(5);
                assert!(others.iter().all(|client| !client.has_answer()));
            }
            wait_for("the last device to be closed", || (disk.lives().len() == 10).then_some(()));
            let one_by_one: Vec<Life> =
                (1..=5).flat_map(|number| [Life::Opened(number), Life::Closed(number)]).collect();
            assert_eq!(disk.lives(), one_by_one, "{place:?}, {answers:?}");
            assert_eq!(disk.requests().most, 1, "{place:?}, {answers:?}");
        }
    }
}

#[test]
fn a_client_that_left_while_it_waited_for_its_turn_holds_up_nobody() {
    for place in ONE_THREAD {
        let disk = Disk::with_model(ThreadModel::SerializeConnections, Answers::AtOnce);
        let rig = Rig::start(place, &disk);
        let mut first = rig.client();
        let mut gone = rig.connect();
        gone.ask_for_export("");
        rig.wait_until_considered(&gone);
        drop(gone);
        let mut last = rig.connect();
        last.ask_for_export("");
        rig.wait_until_considered(&last);
        first.work(5);
        drop(first);
        last.enter();
        last.work(5);
        assert_eq!(disk.requests().most, 1);
    }
}

/// A look at the export opens it too; its turn ends with the look.
#[test]
fn a_look_does_not_keep_its_turn() {
    for place in ONE_THREAD {
        let disk = Disk::with_model(ThreadModel::SerializeConnections, Answers::AtOnce);
        let rig = Rig::start(place, &disk);
        let (mut one, mut other) = (rig.connect(), rig.connect());
        one.info(NBD_OPT_INFO);
        other.info(NBD_OPT_INFO);
        one.info(NBD_OPT_INFO);
        other.info(NBD_OPT_GO);
        other.work(5);
        drop(other);
        one.info(NBD_OPT_GO);
        one.work(5);
        let lives = disk.lives();
        for pair in lives.chunks(2) {
            assert!(matches!(pair, [Life::Opened(a), Life::Closed(b)] if a == b) || pair.len() == 1, "{lives:?}");
        }
    }
}

#[test]
fn a_client_that_waits_for_its_turn_does_not_hold_up_the_end() {
    for place in ONE_THREAD {
        let disk = Disk::with_model(ThreadModel::SerializeConnections, Answers::AtOnce);
        let rig = Rig::start(place, &disk);
        let mut first = rig.client();
        let mut waits = rig.connect();
        waits.ask_for_export("");
        rig.wait_until_considered(&waits);
        first.ask_for([GATED]);
        disk.wait_until_at_gate(1);
        disk.let_one_through();
        assert_eq!(rig.end().exit_status(), 0);
        assert_eq!(disk.lives()[..2], [Life::Opened(1), Life::Closed(1)]);
    }
}

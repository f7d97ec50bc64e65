//! Requests that wait for the device: how many at a time, and who does not wait with them.

use super::rig::*;

/// The default of `Server::threads`.
const THREADS: usize = 16;

/// "How many requests of one client may wait for the device at a time, on as many threads."
#[test]
fn requests_run_at_the_same_time_up_to_the_limit_and_never_beyond() {
    for place in [Place::Executor, Place::Workers(2)] {
        for answers in EITHER_WAY {
            for limit in [None, Some(1), Some(3)] {
                let threads = limit.unwrap_or(THREADS);
                for asked in [2, threads + 24] {
                    let here = format!("{place:?}, {answers:?}, {limit:?} threads, {asked} requests");
                    let disk = Disk::new(answers);
                    let rig = Rig::start_with(place, &disk, |server| match limit {
                        Some(limit) => server.threads(limit),
                        None => server,
                    });
                    let mut client = rig.client();
                    client.ask_for(offsets(GATED, asked));
                    disk.wait_until_at_gate(asked.min(threads));
                    // As one leaves the next comes in.
                    let mut answered = Vec::new();
                    for left in (0..asked).rev() {
                        disk.let_one_through();
                        answered.push(client.block());
                        disk.wait_until_at_gate(left.min(threads));
                    }
                    answered.sort_unstable();
                    assert_eq!(answered, offsets(GATED, asked), "{here}");
                    assert_eq!(disk.blocking().most, asked.min(threads), "{here}");
                }
            }
        }
    }
}

/// The limit is each client's own.
#[test]
fn every_client_has_as_many_threads() {
    for place in [Place::Executor, Place::Workers(2)] {
        let disk = Disk::new(Answers::OnThreads);
        let rig = Rig::start_with(place, &disk, |server| server.threads(5));
        let mut clients: Vec<Client> = (0..4).map(|_| rig.client()).collect();
        for client in &mut clients {
            client.ask_for(offsets(GATED, 50));
        }
        disk.wait_until_at_gate(4 * 5);
        disk.open_gate();
        for client in &mut clients {
            assert_eq!(client.blocks(50), offsets(GATED, 50));
        }
        assert_eq!(disk.blocking().most_of_one_connection, 5);
    }
}

#[test]
fn what_can_be_answered_at_once_does_not_wait_for_what_cannot() {
    for place in [Place::Executor, Place::Workers(2)] {
        let disk = Disk::new(Answers::AtOnce);
        let rig = Rig::start(place, &disk);
        let mut client = rig.client();
        // All threads are taken, and more than those wait.
        let blocked = offsets(GATED, 3 * THREADS);
        client.ask_for(blocked.iter().copied());
        disk.wait_until_at_gate(THREADS);
        client.work(300);
        // Also in one message with such, before and after it.
        let mixed = (0..100).flat_map(|number| [number * BLOCK, GATED * 2 + number * BLOCK]);
        client.ask_for(mixed);
        assert_eq!(client.blocks(100), offsets(0, 100));
        assert!(!client.has_answer());
        disk.open_gate();
        let all = [blocked, offsets(GATED * 2, 100)].concat();
        assert_eq!(client.blocks(all.len()), all);
    }
}

#[test]
fn one_thread_that_is_left_serves_all_that_does_not_block() {
    for place in [Place::Executor, Place::Workers(2)] {
        let disk = Disk::new(Answers::OnThreads);
        let rig = Rig::start(place, &disk);
        let mut client = rig.client();
        client.ask_for(offsets(GATED, THREADS - 1));
        disk.wait_until_at_gate(THREADS - 1);
        client.work(100);
        client.ask_for(offsets(0, 500));
        assert_eq!(client.blocks(500), offsets(0, 500));
        assert!(!client.has_answer());
        disk.open_gate();
        assert_eq!(client.blocks(THREADS - 1), offsets(GATED, THREADS - 1));
    }
}

#[test]
fn clients_do_not_wait_for_a_device_that_others_wait_for() {
    for place in [Place::Executor, Place::Workers(1), Place::Workers(2)] {
        for answers in EITHER_WAY {
            let disk = Disk::new(answers);
            let rig = Rig::start(place, &disk);
            // Those who are here already, and those who come now.
            let mut before: Vec<Client> = (0..3).map(|_| rig.client()).collect();
            let mut stuck: Vec<Client> = (0..5).map(|_| rig.client()).collect();
            for client in &mut stuck {
                client.ask_for(offsets(GATED, 4 * THREADS));
            }
            disk.wait_until_at_gate(5 * THREADS);
            let mut after: Vec<Client> = (0..3).map(|_| rig.client()).collect();
            for client in before.iter_mut().chain(&mut after) {
                client.work(50);
            }
            assert!(stuck.iter().all(|client| !client.has_answer()));
            disk.open_gate();
            for client in &mut stuck {
                assert_eq!(client.blocks(4 * THREADS), offsets(GATED, 4 * THREADS));
            }
        }
    }
}

/// "Every method may block; none is called on an executor's thread." With one thread for everything, whatever waited on it
/// would be waited for by all.
#[test]
fn an_executor_of_one_thread_goes_on_whatever_the_device_waits_in() {
    for answers in EITHER_WAY {
        for waits_in in ["read", "open", "size", "capabilities", "flush", "close"] {
            let disk = Disk::new(answers);
            let rig = Rig::start(Place::Executor, &disk);
            let mut stuck = rig.connect();
            stuck.ask_for_export(waits_in);
            let mut at_gate = 1;
            match waits_in {
                "read" => {
                    stuck.enter();
                    stuck.ask_for(offsets(GATED, THREADS));
                    at_gate = THREADS;
                }
                "flush" => {
                    stuck.enter();
                    stuck.flush();
                }
                "close" => {
                    stuck.enter();
                    stuck.socket.shutdown(std::net::Shutdown::Write).expect("it is connected");
                }
                _ => {}
            }
            disk.wait_until_at_gate(at_gate);
            // Somebody else on the embedder's executor.
            let (ask, asked) = async_channel::bounded::<u32>(1);
            let (answer, answered) = async_channel::bounded(1);
            let echo = rig.executor.spawn(async move {
                while let Ok(number) = asked.recv().await {
                    let _ = answer.send(number).await;
                }
            });
            for number in 0..200 {
                ask.send_blocking(number).expect("the task is there");
                assert_eq!(wait_for("the other task", || answered.try_recv().ok()), number);
            }
            drop(ask);
            smol::block_on(echo);
            rig.client().work(30);
            disk.wait_until_at_gate(at_gate);
            disk.open_gate();
            match waits_in {
                "read" => assert_eq!(stuck.blocks(THREADS), offsets(GATED, THREADS)),
                "flush" => assert_eq!(stuck.reply(), 0),
                "close" => {}
                _ => stuck.enter(),
            }
            assert_eq!(rig.end().exit_status(), 0, "{waits_in}");
        }
    }
}

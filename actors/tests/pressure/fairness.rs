//! Clients that share one thread: who asks for much is served much, and who asks for little is served as well.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::rig::*;

/// As many requests as one client may have under way (`MAX_REQUESTS`).
const IN_FLIGHT: usize = 1024;
/// How many replies are awaited before as many requests follow them.
const STEP: usize = 64;

/// Tells busy clients to stop when the test's own part ends, also if it fails: only then does the failure show.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A client that always has [`IN_FLIGHT`] reads under way, until it is told to stop.
fn be_busy(mut client: Client, served: &AtomicUsize, stop: &AtomicBool) {
    let mut under_way = 0;
    let mut next = 0_usize;
    loop {
        let wanted = if stop.load(Ordering::Relaxed) { 0 } else { IN_FLIGHT };
        if under_way < wanted {
            client.ask_for(offsets(next as u64 % 1000 * BLOCK, wanted - under_way));
            next += wanted - under_way;
            under_way = wanted;
        }
        for _ in 0..under_way.min(STEP) {
            client.block();
            served.fetch_add(1, Ordering::Relaxed);
        }
        under_way -= under_way.min(STEP);
        if under_way == 0 {
            return;
        }
    }
}

/// Neither starves the other: the one with a single request at a time gets its answers while the other always has as many
/// under way as it may, and that one goes on as well.
fn share(place: Place, answers: Answers, busy_clients: usize) {
    let disk = Disk::new(answers);
    let rig = Rig::start(place, &disk);
    let served: Vec<AtomicUsize> = (0..busy_clients).map(|_| AtomicUsize::new(0)).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        for served in &served {
            let (client, stop) = (rig.client(), &stop);
            scope.spawn(move || be_busy(client, served, stop));
        }
        let mut client = rig.client();
        let progress = |served: &AtomicUsize, from: usize| {
            wait_for("the busy client's requests to be served", || {
                (served.load(Ordering::Relaxed) > from + STEP).then_some(())
            });
        };
        served.iter().for_each(|served| progress(served, IN_FLIGHT));
        for _ in 0..4 {
            let before: Vec<usize> = served.iter().map(|served| served.load(Ordering::Relaxed)).collect();
            for number in 0..50 {
                client.ask_for([number * BLOCK]);
                assert_eq!(client.block(), number * BLOCK);
            }
            served.iter().zip(before).for_each(|(served, before)| progress(served, before));
        }
    });
}

#[test]
fn a_client_with_one_request_is_served_beside_one_with_a_thousand() {
    for place in ONE_THREAD {
        for answers in EITHER_WAY {
            share(place, answers, 1);
        }
    }
}

#[test]
fn a_client_with_one_request_is_served_beside_many_with_a_thousand() {
    for place in ONE_THREAD {
        share(place, Answers::AtOnce, 4);
    }
}

/// A request that waits for its turn at a serialized device is not passed by for ever by those that need not wait.
#[test]
fn a_request_on_a_thread_is_served_beside_a_thousand_at_once() {
    use nbdcaptive_actors::device::ThreadModel;
    for place in ONE_THREAD {
        let disk = Disk::with_model(ThreadModel::SerializeAllRequests, Answers::AtOnce);
        disk.open_gate();
        let rig = Rig::start(place, &disk);
        let (served, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            let (busy, mut client) = (rig.client(), rig.client());
            scope.spawn(|| be_busy(busy, &served, &stop));
            wait_for("the busy client to be busy", || (served.load(Ordering::Relaxed) > IN_FLIGHT).then_some(()));
            for number in 0..50 {
                client.ask_for([GATED + number * BLOCK]);
                assert_eq!(client.block(), GATED + number * BLOCK);
            }
        });
        assert_eq!(disk.requests().most, 1);
    }
}

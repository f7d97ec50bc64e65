//! More requests wait at a device than there are threads for them. In a program of its own, because it takes so many.

#[allow(dead_code, reason = "shared with other tests")]
#[path = "pressure/rig.rs"]
mod rig;

use rig::{Answers, Client, Disk, GATED, Place, Rig, offsets, wait_for};

/// The threads for requests: `PLACES` of backend.rs, and how many of them are for whoever has none: `FIRST`.
const PLACES: usize = 400;
const FIRST: usize = 100;
/// A client's own, the default of `Server::threads`.
const THREADS: usize = 16;

#[test]
fn clients_at_a_device_that_waits_keep_nobody_out() {
    for place in [Place::Executor, Place::Workers(2)] {
        let disk = Disk::new(Answers::AtOnce);
        let rig = Rig::start(place, &disk);
        let mut early = rig.client();
        let mut stuck: Vec<Client> = (0..PLACES).map(|_| rig.client()).collect();
        // One after another, so that the first have all they may have.
        let mut at_gate = 0;
        for client in &mut stuck {
            client.ask_for(offsets(GATED, THREADS));
            let any = (PLACES - FIRST).saturating_sub(at_gate).min(THREADS);
            at_gate = (at_gate + any.max(1)).min(PLACES);
            disk.wait_until_at_gate(at_gate);
        }
        assert_eq!(at_gate, PLACES);
        // Its export is opened on a thread, too.
        let mut late = rig.client();
        early.work(10);
        late.work(10);
        assert_eq!(disk.blocking().most, PLACES, "{place:?}");
        // Whoever found no place gets one as others leave, also a client that has none at all.
        late.ask_for(offsets(GATED, THREADS));
        disk.open_gate();
        assert_eq!(late.blocks(THREADS), offsets(GATED, THREADS));
        for client in &mut stuck {
            assert_eq!(client.blocks(THREADS), offsets(GATED, THREADS));
        }
        assert_eq!(disk.blocking().most, PLACES, "{place:?}");
    }
}

/// Where every request needs a thread.
#[test]
fn clients_with_all_the_threads_they_may_have_leave_one_to_each_of_the_others() {
    for place in [Place::Executor, Place::Workers(2)] {
        let disk = Disk::new(Answers::OnThreads);
        let rig = Rig::start(place, &disk);
        let mut early = rig.client();
        let mut stuck: Vec<Client> = (0..(PLACES - FIRST).div_ceil(THREADS)).map(|_| rig.client()).collect();
        for client in &mut stuck {
            client.ask_for(offsets(GATED, THREADS));
        }
        wait_for("all other threads to be taken", || (disk.blocking().now >= PLACES - FIRST).then_some(()));
        let mut late = rig.client();
        early.work(10);
        late.work(10);
        late.ask_for(offsets(0, 2 * THREADS));
        assert_eq!(late.blocks(2 * THREADS), offsets(0, 2 * THREADS));
        disk.open_gate();
        for client in &mut stuck {
            assert_eq!(client.blocks(THREADS), offsets(GATED, THREADS));
        }
    }
}

//! More requests wait at a device than there are threads for them. In a program of its own, because all servers of a process
//! share those threads.

#[allow(dead_code, reason = "shared with other tests")]
#[path = "pressure/rig.rs"]
mod rig;

use rig::{Answers, Client, Disk, GATED, Place, Rig, offsets};

/// The threads for requests: `PLACES` of backend.rs.
const PLACES: usize = 400;

#[test]
fn clients_at_a_device_that_waits_keep_nobody_out() {
    for place in [Place::Executor, Place::Workers(2)] {
        let disk = Disk::new(Answers::AtOnce);
        let rig = Rig::start(place, &disk);
        let mut early = rig.client();
        let mut stuck: Vec<Client> = (0..40).map(|_| rig.client()).collect();
        for client in &mut stuck {
            client.ask_for(offsets(GATED, 16));
        }
        disk.wait_until_at_gate(PLACES);
        // Its export is opened on a thread, too.
        let mut late = rig.client();
        early.work(10);
        late.work(10);
        assert_eq!(disk.blocking().most, PLACES, "{place:?}");
        // Whoever found no place gets one as others leave, also a client that has none at all.
        late.ask_for(offsets(GATED, 16));
        disk.open_gate();
        assert_eq!(late.blocks(16), offsets(GATED, 16));
        for client in &mut stuck {
            assert_eq!(client.blocks(16), offsets(GATED, 16));
        }
        assert_eq!(disk.blocking().most, PLACES, "{place:?}");
    }
}

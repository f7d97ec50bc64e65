//! Five hundred short lives, each cut short at a moment that chance picks, and nothing is left of any.
//! The letters and numbers in the comments are the rows of the lifetime catalogue in docs/; sentences in quotes are from there.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, setpgid};

use super::harness::{Room, Witness, nbdkit_differs, wait_for};

const RUNS: u64 = 500;
const THREADS: u64 = 4;
/// A captive server starts in about a tenth of this, so a moment before it is in the start, in the work, or in the end of a
/// command that ends by itself.
const LATEST: u64 = 40_000;

/// The same every time for the same seed.
struct Random(u64);

impl Random {
    /// A number below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }
}

fn one_life(seed: u64) {
    const COMMANDS: [&str; 5] = [
        "exit 3",
        "exec sleep 1000",
        "sleep 1000; :",
        "sleep 1000 & setsid sleep 1000 & sleep 1000; :",
        // Work, for as long as there is somebody to do it.
        "while nbdinfo --size \"$uri\" > /dev/null 2>&1; do :; done",
    ];
    let random = &mut Random(seed);
    let room = Room::new();
    // A short grace, for jobs in the background, which ignore SIGINT.
    let command = random.one_of(&COMMANDS);
    let mut launch = room.captive(["--grace-period=1", "-P", "pid", "memory", "1M"], command);
    launch.in_child(|| Ok(setpgid(Pid::from_raw(0), Pid::from_raw(0))?));
    let witness = Witness::new(&mut launch);
    let running = launch.start();
    // Not to wait for something: the moment is what varies. More often early, where more happens.
    let latest = *random.one_of(&[1000, 5000, 10_000, LATEST]);
    let moment = Duration::from_micros(random.below(latest));
    thread::sleep(moment);
    let (signals, group) = ([Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT], random.below(4) == 0);
    if group {
        // Shown where the test fails.
        eprintln!("{command:?}: after {moment:?} SIGKILL to the group");
        // It may have ended.
        let _ = killpg(Pid::from_raw(running.pid()), Signal::SIGKILL);
    } else {
        let ours = room.server_processes();
        let chosen = match ours.len() {
            0 => running.pid(),
            _ => random.one_of(&ours).pid,
        };
        let signal = *random.one_of(&signals);
        eprintln!("{command:?}: after {moment:?} {signal} to {chosen} of {ours:#?}");
        let _ = kill(Pid::from_raw(chosen), signal);
        // Between the look and the signal the process that waited to become the command may have done so; a shell that
        // waits for its child takes no notice of SIGINT, and nobody of ours knows of it.
        let ours = room.server_processes();
        if room.processes().iter().any(|one| one.pid == chosen) && !ours.iter().any(|one| one.pid == chosen) {
            let _ = kill(Pid::from_raw(chosen), Signal::SIGKILL);
        }
    }
    // The processes first, because they can be named.
    room.wait_until_nothing_left();
    witness.wait_until_all_are_gone();
    wait_for("the pid file to go", || (!room.path("pid").exists()).then_some(()));
    running.finish();
}

/// B12, B13, B18: "SIGKILL of any *one* of nbdcaptive's own processes at any moment from the first instruction on, and SIGKILL
/// of the caller's whole process group"
#[test]
fn nothing_is_left_of_five_hundred_lives_cut_short_at_random() {
    if nbdkit_differs("B8, B9, B13, B18: processes and directories are left") {
        return;
    }
    let base = match std::env::var("NBDCAPTIVE_TEST_SEED") {
        Ok(seed) => seed.parse().expect("a number"),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64 >> 10),
    };
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let run = next.fetch_add(1, Ordering::Relaxed);
                    if run >= RUNS {
                        return;
                    }
                    let seed = base.wrapping_add(run);
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| one_life(seed))) {
                        eprintln!("to repeat this run first: NBDCAPTIVE_TEST_SEED={seed}");
                        // The others need not go on.
                        next.store(RUNS, Ordering::Relaxed);
                        resume_unwind(panic);
                    }
                }
            });
        }
    });
}

//! Whole servers in made-up worlds: the real actors on one thread, with time, threads, connections, clients and a disk that are
//! all decided by one stream of chance, and every promise looked at all the while.
//!
//! One seed is one world. What a world is made of is in `simulation/universe.rs` (`Config`); what can happen in it, in
//! `world.rs`; what must come true, in `judge.rs` (replies), `disk.rs` (calls, flushes, closes), `wire.rs` (connections) and
//! `world.rs` (nobody waits in vain, the end comes). Clients are written from the specification.
//!
//! - `cargo test -p nbdcaptive-actors --test simulation` plays ten thousand worlds; `SIMULATION_SEEDS=n` plays `n`, and
//!   `SIMULATION_FIRST=n` begins elsewhere.
//! - `SIMULATION_SEED=n` plays only that one and prints its whole trace, with the server's log: what a failure says first is
//!   that number. The same seed gives the same trace for as long as neither the test nor the server's order of doing things is
//!   changed.
//!
//! A trace is read from its end: the last line is where the promise broke. The number in front is the made-up time in seconds.

#[path = "simulation/chance.rs"]
mod chance;
#[path = "simulation/client.rs"]
mod client;
#[path = "simulation/codec.rs"]
mod codec;
#[path = "simulation/disk.rs"]
mod disk;
#[path = "simulation/judge.rs"]
mod judge;
#[path = "simulation/trace.rs"]
mod trace;
#[path = "simulation/universe.rs"]
mod universe;
#[path = "simulation/wire.rs"]
mod wire;
#[path = "simulation/world.rs"]
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::trace::Entry;
use crate::world::{Failure, play};

/// How much of a trace is shown where nobody asked for all of it.
const SHOWN: usize = 150;

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

fn show(trace: &[Entry]) {
    trace.iter().for_each(|entry| eprintln!("{entry}"));
}

/// Fails with the seed, and with the end of the trace.
fn report(seed: u64) -> ! {
    match play(seed, true) {
        Err(Failure { why, trace }) => {
            if let Some(config) = trace.first() {
                eprintln!("{config}");
            }
            show(&trace[trace.len().saturating_sub(SHOWN)..]);
            panic!("SIMULATION_SEED={seed}: {why}");
        }
        Ok(_) => {
            panic!("SIMULATION_SEED={seed} failed, and did not when it was played again: something is left to chance")
        }
    }
}

#[test]
fn every_promise_comes_true_in_every_world() {
    if let Some(seed) = number("SIMULATION_SEED") {
        match play(seed, true) {
            Ok(trace) => show(&trace),
            Err(Failure { why, trace }) => {
                show(&trace);
                panic!("SIMULATION_SEED={seed}: {why}");
            }
        }
        return;
    }
    let first = number("SIMULATION_FIRST").unwrap_or(0);
    let next = AtomicU64::new(first);
    let end = first + number("SIMULATION_SEEDS").unwrap_or(10_000);
    let failed = AtomicBool::new(false);
    let lowest = Mutex::new(u64::MAX);
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get().max(2));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    if play(seed, false).is_err() {
                        failed.store(true, Ordering::Relaxed);
                        let mut lowest = lowest.lock().expect("nobody panics with it");
                        *lowest = seed.min(*lowest);
                    }
                }
            });
        }
    });
    let seed = lowest.into_inner().expect("nobody panics with it");
    if seed != u64::MAX {
        report(seed);
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..100 {
        let [one, two] = [play(seed, true), play(seed, true)].map(|played| match played {
            Ok(trace) => trace,
            Err(Failure { trace, .. }) => trace,
        });
        if let Some(at) = (0..one.len().max(two.len())).find(|at| one.get(*at) != two.get(*at)) {
            show(&one[at.saturating_sub(20)..at]);
            panic!("seed {seed} is played in two ways: {:?} or {:?}", one.get(at), two.get(at));
        }
    }
}

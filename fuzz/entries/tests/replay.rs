//! Every input in the corpus, and mutations of them, through the functions that cargo-fuzz calls.
//!
//! How often is fixed, so that it ends whatever the machine: less than a minute on two cores without optimisation. The
//! numbers are the same in every run, unless `FUZZ_SEED` or `FUZZ_RUNS` says otherwise.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::{env, fs};

use nbdcaptive_fuzz_entries::{ALL, Entry};

const SEED: u64 = 1;

fn number(variable: &str, default: u64) -> u64 {
    env::var(variable).ok().map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

/// The corpus of a target, in the order of the names.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(target);
    let files = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut paths: Vec<_> = files.map(|file| file.expect("the directory can be read").path()).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        (path, bytes)
    };
    paths.into_iter().map(read).collect()
}

fn entry(target: &str) -> Entry {
    ALL.iter().find(|(name, _)| *name == target).expect("a target of that name").1
}

/// Every file of the corpus, and then so many mutations.
fn replay(target: &str, runs: u64) {
    let call = entry(target);
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "an empty corpus tests nothing");
    for (path, input) in &corpus {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| call(input))) {
            eprintln!("{target} fails on {}", path.display());
            resume_unwind(panic);
        }
    }
    let seed = number("FUZZ_SEED", SEED);
    let mut random = Random(seed.wrapping_mul(2) | 1);
    for run in 0..number("FUZZ_RUNS", runs) {
        let input = mutation(&corpus, &mut random);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| call(&input))) {
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}-{seed}-{run}"));
            fs::write(&path, &input).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            eprintln!("{target} fails on run {run} of FUZZ_SEED={seed}; the input is in {}", path.display());
            resume_unwind(panic);
        }
    }
}

/// The same numbers on every run. Source: Marsaglia, "Xorshift RNGs".
struct Random(u64);

impl Random {
    /// A number from 0 to `limit` - 1; 0 where there is none.
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit.max(1)
    }
}

/// An input of the corpus that was changed in a few places.
fn mutation(corpus: &[(PathBuf, Vec<u8>)], random: &mut Random) -> Vec<u8> {
    let mut input = corpus[random.below(corpus.len())].1.clone();
    for _ in 0..=random.below(4) {
        let at = random.below(input.len());
        match random.below(7) {
            0 if !input.is_empty() => input[at] ^= 1 << random.below(8),
            1 if !input.is_empty() => input[at] = random.below(256) as u8,
            // Numbers on the wire have 2, 4 or 8 bytes, and it is their ends that go wrong.
            2 | 3 => {
                let width = 2 << random.below(3);
                let numbers = [0, 1, 2, 0x7f, 0xff, 0x1000, 0x1_0000, 1 << 26, (1 << 26) + 1, u64::MAX >> 1, u64::MAX];
                let number = numbers[random.below(numbers.len())].wrapping_sub(random.below(2) as u64);
                if let Some(field) = input.get_mut(at..at + width) {
                    field.copy_from_slice(&number.to_be_bytes()[8 - width..]);
                }
            }
            4 => {
                let end = (at + random.below(40)).min(input.len());
                input.drain(at..end);
            }
            5 => {
                let end = (at + random.below(64)).min(input.len());
                let again = input[at..end].to_vec();
                let to = random.below(input.len());
                input.splice(to..to, again);
            }
            _ => {
                let other = &corpus[random.below(corpus.len())].1;
                let start = random.below(other.len());
                input.truncate(at);
                input.extend(&other[start..]);
                input.truncate(8192);
            }
        }
    }
    input
}

#[test]
fn any_handshake_is_answered_or_refused() {
    replay("handshake", 12_000);
}

#[test]
fn any_requests_are_answered_or_refused() {
    replay("transmission", 12_000);
}

#[test]
fn several_clients_get_what_they_ask_for_and_the_server_ends() {
    replay("session", 12_000);
}

#[test]
fn what_is_built_from_any_bytes_can_be_taken_apart() {
    replay("uri", 100_000);
}

#[test]
fn any_text_is_a_value_or_an_error() {
    replay("size", 100_000);
}

#[test]
fn any_server_is_understood_or_left() {
    replay("client", 100_000);
}

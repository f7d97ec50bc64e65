//! fio's nbd engine: every block that it writes has a header and a checksum, with which it knows what it reads.
//!
//! Each test writes 64 MiB and reads them again. `NBDCAPTIVE_TEST_FIO_MIB` makes that any amount of data, for a long run:
//!
//! ```text
//! NBDCAPTIVE_TEST_FIO_MIB=50000 cargo test --release --test black_box peers::fio::jobs -- --nocapture --test-threads=1
//! ```

use std::time::Instant;

use super::*;

for_each_case! {
    one_job_verifies_what_it_wrote_at_random
    jobs_on_ranges_of_their_own_verify
    jobs_that_read_and_write_at_once_verify
    a_byte_that_changed_is_found
}

/// What libnbd 1.14 speaks, which the engine is made of.
const SPOKEN: Spoken = Spoken::Structured;

/// How much one run of fio writes at most, in MiB, so that it ends well before the deadline of the harness.
const MOST: u64 = 256;

/// How much to write in all, in MiB, and how that is cut into runs of fio.
fn runs() -> impl Iterator<Item = u64> {
    let work = match std::env::var("NBDCAPTIVE_TEST_FIO_MIB") {
        Ok(work) => work.parse::<u64>().expect("NBDCAPTIVE_TEST_FIO_MIB is a number of MiB").max(64),
        Err(_) => 64,
    };
    // fio's jobs want the same share each, so every run is of whole 64 MiB.
    let all = work.div_ceil(64);
    (0..all.div_ceil(MOST / 64)).map(move |run| 64 * (MOST / 64).min(all - run * (MOST / 64)))
}

/// What all runs have in common.
const VERIFY: &str = "fio --name=verify --ioengine=nbd --uri=\"$uri\" --bsrange=512-64k --ba=512 --iodepth=32 \
     --verify=crc32c --verify_fatal=1 --do_verify=1 --group_reporting --output=log";

/// Runs fio with what is common and these options, and shows its output where it fails.
#[track_caller]
fn fio(export: &Served, options: &str) {
    export.run(&format!("{VERIFY} {options} || {{ tail -n 50 log; exit 9; }}"));
}

/// An export without holes, so that a file does not become thousands of fragments, whose removal takes seconds on some disks.
fn written(case: Case, size: u64) -> Served {
    let export = case.serve(size);
    export.put_old_data();
    export
}

/// For whoever asked for a long run.
fn tell(case: Case, since: Instant) {
    let (mebibytes, time) = (runs().sum::<u64>(), since.elapsed().as_secs_f64());
    eprintln!("fio: {case:?}: {mebibytes} MiB of random writes, and as much verified, in {time:.1} s");
}

fn one_job_verifies_what_it_wrote_at_random(case: Case) {
    let export = written(case, 16 * MIB);
    let since = Instant::now();
    for (seed, mebibytes) in runs().enumerate() {
        fio(&export, &format!("--rw=randwrite --size=16M --loops={} --randseed={seed}", mebibytes / 16));
    }
    tell(case, since);
    export.end(SPOKEN);
}

/// A connection for each job.
fn jobs_on_ranges_of_their_own_verify(case: Case) {
    let export = written(case, 32 * MIB);
    let since = Instant::now();
    for (seed, mebibytes) in runs().enumerate() {
        let jobs = "--rw=randwrite --numjobs=8 --size=4M --offset_increment=4M";
        fio(&export, &format!("{jobs} --loops={} --randseed={seed}", mebibytes / 32));
    }
    tell(case, since);
    export.end(SPOKEN);
}

/// fio takes what an earlier run or loop left for damage where it reads before it writes (3.33, of a plain file too): each
/// run is on zeroes.
fn jobs_that_read_and_write_at_once_verify(case: Case) {
    let export = case.serve(2 * runs().max().unwrap_or(0) * MIB);
    let since = Instant::now();
    for (seed, mebibytes) in runs().enumerate() {
        // Data rather than holes, for the reason of `written`.
        export.put(&[(0, vec![0; export.size as usize])]);
        // Half of the requests are writes.
        let share = 2 * mebibytes / 4;
        let jobs = format!("--rw=randrw --numjobs=4 --size={share}M --offset_increment={share}M");
        fio(&export, &format!("{jobs} --randseed={seed}"));
    }
    tell(case, since);
    export.end(SPOKEN);
}

/// The other tests here could not fail without it.
fn a_byte_that_changed_is_found(case: Case) {
    let export = case.serve(MIB);
    fio(&export, "--rw=write --size=1M --do_verify=0 --randseed=1");
    fio(&export, "--rw=write --size=1M --verify_only --randseed=1");
    let content = export.content();
    export.put(&[(500_000, vec![content[500_000] ^ 1])]);
    let damaged = export.shell(&format!("{VERIFY} --rw=write --size=1M --verify_only --randseed=1")).run();
    assert_ne!(damaged.status.code(), Some(0), "{damaged:#?}");
    assert!(damaged.stderr.contains("verify"), "{damaged:#?}");
    export.end(SPOKEN);
}

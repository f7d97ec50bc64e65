//! `memory` with each of its allocators.

use super::*;
use crate::harness::wait_for;

const OPERATIONS: &[&str] = &[
    "info",
    "read 65536 0",
    "write 65536x11 0",
    "write 100000x22 50000 fua",
    "write 01 10485759",
    "read 300000 0",
    "read 3 10485757",
    "read 3 10485758",
    "zero 40000 30000",
    "zero 4096 60000 nohole",
    "zero 4096 70000 fast",
    "trim 32768 98304",
    "read 300000 0",
    "write 4096x00 0",
    "read 8 4092",
    "cache 65536 0",
    "flush",
];

#[test]
fn every_allocator_serves_what_nbdkits_does() {
    let expected = same(&["memory", "10M"], OPERATIONS);
    let rest = |answers: &str| answers.split_once('\n').map(|(_, rest)| rest.to_owned());
    for allocator in ["allocator=sparse", "allocator=malloc", "allocator=malloc,mlock=true", "allocator=zstd"] {
        let answers = same(&["memory", "10M", allocator], OPERATIONS);
        assert_eq!(rest(&answers), rest(&expected), "{allocator}");
    }
}

#[test]
fn each_has_its_own_map() {
    let operations = &["write 32768x55 0", "write 65536x00 32768", "zero 32768 65536", "extents 131072 0", "blocks"];
    let map = |allocator: &str| {
        let answers = answers(&["memory", "131072", allocator], operations);
        answers.lines().skip(3).map(str::to_owned).collect::<Vec<_>>()
    };
    let sparse = ["extents 131072 0: 32768:0 32768:2 65536:3", "blocks: [1, 32768]"];
    assert_eq!(map("allocator=sparse"), sparse);
    assert_eq!(map("allocator=zstd"), sparse);
    // "No sparseness is possible".
    assert_eq!(map("allocator=malloc"), ["extents 131072 0: 131072:0", "blocks: [1, 512]"]);
}

#[test]
fn a_disk_of_any_size_can_be_compressed() {
    let answers = answers(
        &["memory", "9223372036854775807", "allocator=zstd"],
        &["info", "write 0102 9223372036854775805", "read 4 9223372036854775803", "extents 4294967295 0"],
    );
    assert!(
        answers.ends_with("read 4 9223372036854775803: 00000102\nextents 4294967295 0: 4294967295:3\n"),
        "{answers}"
    );
}

/// "the array is locked into RAM using mlock(2)"
#[test]
fn what_is_locked_is_all_of_the_disk() {
    let room = Room::new();
    for (allocator, locked) in [("allocator=malloc,mlock=true", 8192), ("allocator=malloc", 0)] {
        let server = room.serve(["memory", "8M", allocator]);
        let pid = server.running.pid();
        let kib = wait_for("the server's memory", || {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"))?;
            line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
        });
        // A piece of memory need not begin at a page.
        assert!((locked..=locked + 4).contains(&kib), "{allocator}: {kib} KiB are locked");
        server.terminate().expect(0);
    }
}

#[test]
fn allocators_that_are_not_there_are_refused() {
    for allocator in ["allocator=malloc,foo=1", "allocator=zstd,level=9", "allocator=malloc,mlock=maybe"] {
        same_refusal(&["memory", "1M", allocator]);
    }
    let line = refusal(&["memory", "1M", "allocator=heap"]);
    assert_eq!(line, "unknown allocator \"heap\" (available: sparse, malloc, zstd)");
    let line = refusal(&["memory", "4E", "allocator=malloc"]);
    assert_eq!(line, "allocator=malloc: no memory for a disk of 4611686018427387904 bytes");
}

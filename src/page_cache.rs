//! Whether a range of a file is in the page cache, so that it can be sent without waiting for a disk.
//! Source: Linux cachestat(2), since 6.5; there is no wrapper for it.

use std::os::fd::{AsRawFd, BorrowedFd};

/// The call's number, the same on every architecture.
const CACHESTAT: nix::libc::c_long = 451;

#[repr(C)]
struct Range {
    offset: u64,
    length: u64,
}

#[repr(C)]
#[derive(Default)]
struct Statistics {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// How many pages of `length` bytes at `offset` are in the page cache. `None` where the kernel cannot tell.
pub fn cached_pages(file: BorrowedFd<'_>, offset: u64, length: u64) -> Option<u64> {
    let range = Range { offset, length };
    let mut statistics = Statistics::default();
    // SAFETY: the call reads `range` and writes `statistics`, both of the layout that it documents and alive here; it keeps
    // neither. A kernel without it answers ENOSYS and touches nothing.
    let result = unsafe { nix::libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut statistics, 0) };
    (result == 0).then_some(statistics.cached)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_was_just_written_is_cached() {
        let mut file = tempfile::tempfile().expect("there is room");
        file.write_all(&[1; 8192]).expect("there is room");
        // A kernel without the call says so, and then there is nothing more to know.
        if let Some(pages) = cached_pages(file.as_fd(), 0, 8192) {
            assert!(pages >= 1);
            assert_eq!(cached_pages(file.as_fd(), 1 << 30, 8192), Some(0));
        }
    }
}

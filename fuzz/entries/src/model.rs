//! What a disk holds, as far as its clients can know.

use std::collections::BTreeMap;
use std::ops::Range;

/// A request on its way that reads or changes a range.
struct Pending {
    range: Range<usize>,
    changes: bool,
    /// Another request, one of them a change, was on its way to the same bytes: what this one does is not known.
    tainted: bool,
}

/// The bytes that all clients of a server see.
pub struct Model {
    bytes: Vec<u8>,
    known: Vec<bool>,
    pending: BTreeMap<u64, Pending>,
    next: u64,
    given_up: bool,
}

impl Model {
    /// A disk of so many zeroes.
    pub fn new(size: usize) -> Model {
        Model { bytes: vec![0; size], known: vec![true; size], pending: BTreeMap::new(), next: 0, given_up: false }
    }

    /// Something was sent of which it is not known when it happens: from now on nothing is known.
    pub fn give_up(&mut self) {
        self.given_up = true;
    }

    /// A request was sent for a range within the disk. What is returned names it.
    pub fn begin(&mut self, offset: u64, length: u64, changes: bool) -> Option<u64> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(length).ok()?).filter(|end| *end <= self.bytes.len())?;
        let range = start..end;
        let mut tainted = false;
        for other in self.pending.values_mut() {
            let overlaps = other.range.start < range.end && range.start < other.range.end;
            if overlaps && (changes || other.changes) {
                other.tainted |= changes;
                tainted |= other.changes;
            }
        }
        if changes {
            self.known[range.clone()].fill(false);
        }
        self.next += 1;
        self.pending.insert(self.next, Pending { range, changes, tainted });
        Some(self.next)
    }

    /// It was answered; `Some` is what it has written, if it has written all.
    pub fn end(&mut self, name: u64, written: Option<&[u8]>) {
        let Some(pending) = self.pending.remove(&name) else { return };
        if let Some(written) = written.filter(|written| pending.changes && written.len() == pending.range.len())
            && !pending.tainted
        {
            self.bytes[pending.range.clone()].copy_from_slice(written);
            self.known[pending.range].fill(true);
        }
    }

    /// A piece of the answer to the read `name`, `offset` bytes from the start of the disk.
    pub fn check(&self, name: u64, offset: u64, data: &[u8]) {
        let Some(read) = self.pending.get(&name).filter(|read| !read.tainted) else { return };
        let start = offset as usize;
        let end = start + data.len();
        assert!(read.range.start <= start && end <= read.range.end, "data of another range than was asked for");
        if self.given_up || self.bytes[start..end] == *data {
            return;
        }
        for (place, byte) in (start..end).zip(data) {
            assert!(!self.known[place] || self.bytes[place] == *byte, "wrong data at {place}");
        }
    }
}

//! The map of a range that a device gives in answer to `NBD_CMD_BLOCK_STATUS`.
//! Source: NBD proto.md "Metadata querying"; nbdkit server/extents.c.

/// `NBD_STATE_HOLE`: the range takes no space on the medium.
pub const HOLE: u64 = 1;
/// `NBD_STATE_ZERO`: the range reads as zeroes.
pub const ZERO: u64 = 2;

/// The most extents that one answer holds; a longer map is cut there, which the specification allows.
pub(crate) const MAX_EXTENTS: usize = 32 * 1024;

/// A stretch of the export that is all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub length: u64,
    /// [`HOLE`] and [`ZERO`], or 0 for data; of another context than `base:allocation`, what that says.
    pub flags: u64,
}

/// Collects extents, from the first byte asked for and without gaps. Neighbours of one kind become one.
#[derive(Debug)]
pub struct Extents {
    offset: u64,
    length: u64,
    one: bool,
    described: u64,
    /// How far the last extent goes on behind the range.
    beyond: u64,
    list: Vec<Extent>,
}

impl Extents {
    /// Asks for the map of `length` bytes at `offset`; with `one` (`NBD_CMD_FLAG_REQ_ONE`) only for its first extent.
    pub fn new(offset: u64, length: u64, one: bool) -> Extents {
        Extents { offset, length, one, described: 0, beyond: 0, list: Vec::new() }
    }

    /// Where the range starts, in bytes from the start of the export.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How long the range is, in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Whether only the first extent is wanted.
    pub fn one(&self) -> bool {
        self.one
    }

    /// Adds the extent of `length` bytes at `offset`. It may begin before what is asked for and end after it; what was
    /// described already, or is not asked for, is passed over. Returns whether more is wanted.
    ///
    /// An extent that leaves a gap is not taken: the map then ends before the gap.
    pub fn add(&mut self, offset: u64, length: u64, flags: u64) -> bool {
        let next = self.offset + self.described;
        let whole_end = offset.saturating_add(length);
        let end = whole_end.min(self.offset.saturating_add(self.length));
        if offset > next {
            return false;
        }
        if end <= next {
            return self.described < self.length;
        }
        let fresh = end - next;
        let full = self.list.len() == if self.one { 1 } else { MAX_EXTENTS };
        match self.list.last_mut() {
            Some(last) if last.flags == flags => last.length += fresh,
            _ if full => return false,
            _ => self.list.push(Extent { length: fresh, flags }),
        }
        self.described += fresh;
        self.beyond = whole_end - end;
        self.described < self.length
    }

    /// The map so far, of what was asked for.
    pub fn list(&self) -> &[Extent] {
        &self.list
    }

    /// The map for a client: unless it wants one extent only, the last may go on behind what it asked for, and saves it the next
    /// question, but not behind the export's `size`.
    pub(crate) fn answer(&self, size: u64) -> impl ExactSizeIterator<Item = Extent> {
        let end = self.offset.saturating_add(self.length);
        let beyond = if self.one { 0 } else { self.beyond.min(size.saturating_sub(end)) };
        let last = self.list.len().saturating_sub(1);
        self.list.iter().enumerate().map(move |(number, extent)| {
            let length = if number == last { extent.length + beyond } else { extent.length };
            Extent { length, ..*extent }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_neighbours_and_cuts_both_ends() {
        let mut extents = Extents::new(100, 50, false);
        assert!(extents.add(0, 110, 0));
        assert!(extents.add(110, 10, 0));
        assert!(!extents.add(120, 1000, HOLE | ZERO));
        let want = [Extent { length: 20, flags: 0 }, Extent { length: 30, flags: HOLE | ZERO }];
        assert_eq!(extents.list(), want);
    }

    #[test]
    fn one_stops_at_the_first_change() {
        let mut extents = Extents::new(0, 50, true);
        assert!(extents.add(0, 10, 0));
        assert!(extents.add(10, 10, 0));
        assert!(!extents.add(20, 10, ZERO));
        assert_eq!(extents.list(), [Extent { length: 20, flags: 0 }]);
    }

    #[test]
    fn the_last_may_tell_more_than_was_asked_for() {
        let answer = |one, size| {
            let mut extents = Extents::new(100, 50, one);
            extents.add(90, 20, 0);
            extents.add(110, 1000, ZERO);
            extents.add(1110, 10, 0);
            extents.answer(size).map(|extent| extent.length).collect::<Vec<_>>()
        };
        assert_eq!(answer(false, 10_000), [10, 1000]);
        assert_eq!(answer(false, 200), [10, 90]);
        assert_eq!(answer(false, 150), [10, 40]);
        assert_eq!(answer(true, 10_000), [10]);
        let mut whole = Extents::new(0, 10, true);
        whole.add(0, 100, 0);
        assert_eq!(whole.answer(100).map(|extent| extent.length).collect::<Vec<_>>(), [10]);
    }

    #[test]
    fn a_gap_ends_the_map() {
        let mut extents = Extents::new(0, 50, false);
        assert!(!extents.add(1, 49, 0));
        assert!(extents.list().is_empty());
    }
}

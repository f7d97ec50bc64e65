//! Memory that changes hands: the data of a large write is received into blocks, and a device that keeps its data in blocks
//! of the same size takes them as they are instead of copying what is in them.

use std::ops::Range;

use slabs::Piece;

mod slabs;

/// Bytes of a [`Block`].
pub const BLOCK: usize = 32 * 1024;

/// [`BLOCK`] bytes, or what is left when they were taken: nothing.
#[derive(Default)]
pub struct Block(Option<Piece>);

impl Block {
    /// A block of three parts, which are [`BLOCK`] bytes together; what is missing is zero, and what is too much is left out.
    /// `None`: no memory.
    pub fn of(before: &[u8], data: &[u8], after: &[u8]) -> Option<Block> {
        let mut piece = Piece::take()?;
        let mut rest = piece.bytes_mut();
        for part in [before, data, after] {
            let (place, behind) = rest.split_at_mut(part.len().min(rest.len()));
            place.copy_from_slice(&part[..place.len()]);
            rest = behind;
        }
        rest.fill(0);
        Some(Block(Some(piece)))
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], Piece::bytes)
    }

    /// All of it, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_mut().map_or(&mut [], Piece::bytes_mut)
    }
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Block").field("length", &self.bytes().len()).finish()
    }
}

/// The data of one write, in blocks as they lie on the disk: a block's border in it is a block's border there.
#[derive(Debug)]
pub struct Blocks {
    blocks: Vec<Block>,
    /// Where the data begins in the first block.
    start: usize,
    length: usize,
}

impl Blocks {
    /// Places for `length` bytes at `offset`, without memory yet: a client that announces much and sends little costs little.
    pub(crate) fn new(offset: u64, length: usize) -> Blocks {
        let start = offset as usize % BLOCK;
        let blocks = (0..(start + length).div_ceil(BLOCK)).map(|_| Block::default()).collect();
        Blocks { blocks, start, length }
    }

    /// Takes memory for the next `count` blocks behind the first `filled` bytes of data. `None`: there is none.
    pub(crate) fn provide(
        &mut self,
        filled: usize,
        count: usize,
        mut take: impl FnMut() -> Option<Block>,
    ) -> Option<()> {
        for block in self.blocks.iter_mut().skip((self.start + filled) / BLOCK).take(count) {
            if block.0.is_none() {
                *block = take()?;
            }
        }
        Some(())
    }

    /// How many bytes of data these are.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it is no data at all.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Where the data begins in the first block, in bytes. A device that is not offered the client's own offsets (under a
    /// filter that shifts them) must look at it before it takes blocks for its own.
    pub fn start(&self) -> usize {
        self.start
    }

    /// The blocks in order, each with the part of it that is data.
    pub fn parts(&mut self) -> impl Iterator<Item = (&mut Block, Range<usize>)> {
        let (start, end) = (self.start, self.start + self.length);
        self.blocks.iter_mut().enumerate().map(move |(number, block)| (block, part(number, start, end)))
    }

    /// The data in one piece, a copy.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.length);
        for (number, block) in self.blocks.iter().enumerate() {
            all.extend_from_slice(&block.bytes()[part(number, self.start, self.start + self.length)]);
        }
        all
    }

    /// The memory behind the first `filled` bytes of data, piece by piece, as far as there is any.
    pub(crate) fn rest(&mut self, filled: usize) -> impl Iterator<Item = &mut [u8]> {
        let from = self.start + filled;
        let there = self.parts().skip(from / BLOCK).take_while(|(block, _)| block.0.is_some());
        there.enumerate().map(move |(number, (block, part))| {
            let start = if number == 0 { from % BLOCK } else { part.start };
            &mut block.bytes_mut()[start.min(part.end)..part.end]
        })
    }

    /// How much memory it is, in bytes.
    pub(crate) fn weight(&self) -> usize {
        self.blocks.len() * BLOCK
    }

    pub(crate) fn into_blocks(self) -> Vec<Block> {
        self.blocks
    }
}

/// What of block `number` lies between `start` and `end`, which count from the first block.
fn part(number: usize, start: usize, end: usize) -> Range<usize> {
    let first = number * BLOCK;
    start.saturating_sub(first)..(end - first).min(BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(offset: u64, length: usize) -> Blocks {
        let mut blocks = Blocks::new(offset, length);
        blocks.provide(0, usize::MAX, || Block::of(&[], &[], &[])).unwrap();
        blocks
    }

    #[test]
    fn data_lies_in_blocks_as_on_the_disk() {
        let block = BLOCK as u64;
        for (offset, length, parts) in [
            (0, BLOCK, &[(0, BLOCK)][..]),
            (7 * block, 2 * BLOCK, &[(0, BLOCK), (0, BLOCK)]),
            (block + 1, BLOCK, &[(1, BLOCK), (0, 1)]),
            (block - 1, BLOCK + 2, &[(BLOCK - 1, BLOCK), (0, BLOCK), (0, 1)]),
            (5, 10, &[(5, 15)]),
        ] {
            let mut these = blocks(offset, length);
            assert_eq!(
                these.parts().map(|(_, part)| (part.start, part.end)).collect::<Vec<_>>(),
                parts,
                "{length} bytes at {offset}"
            );
            assert_eq!(these.weight(), parts.len() * BLOCK);
        }
    }

    #[test]
    fn what_is_received_piece_by_piece_is_the_data() {
        let data: Vec<u8> = (0..3 * BLOCK).map(|at| (at % 251) as u8).collect();
        for (offset, step) in [(0, 1000), (100, 4096), (BLOCK as u64 - 1, BLOCK), (77, 3 * BLOCK), (0, BLOCK)] {
            let mut these = blocks(offset, data.len());
            let mut filled = 0;
            while filled < data.len() {
                let mut left = step.min(data.len() - filled);
                for piece in these.rest(filled) {
                    let count = piece.len().min(left);
                    piece[..count].copy_from_slice(&data[filled..filled + count]);
                    filled += count;
                    left -= count;
                    if left == 0 {
                        break;
                    }
                }
            }
            assert_eq!(these.rest(filled).map(|piece| piece.len()).sum::<usize>(), 0);
            assert!(these.to_vec() == data, "at {offset} in steps of {step}");
        }
    }

    #[test]
    fn memory_is_taken_as_it_is_needed() {
        let mut taken = 0;
        let mut blocks = Blocks::new(100, 10 * BLOCK);
        let mut take = || {
            taken += 1;
            Block::of(&[], &[], &[])
        };
        assert_eq!(blocks.rest(0).count(), 0);
        blocks.provide(0, 3, &mut take).unwrap();
        assert_eq!(blocks.rest(0).map(|piece| piece.len()).sum::<usize>(), 3 * BLOCK - 100);
        blocks.provide(2 * BLOCK, 2, &mut take).unwrap();
        assert_eq!(blocks.rest(2 * BLOCK).map(|piece| piece.len()).sum::<usize>(), 2 * BLOCK - 100);
        assert_eq!(taken, 4);
        assert!(blocks.provide(0, usize::MAX, || None).is_none());
    }

    #[test]
    fn a_block_is_never_more_or_less_than_a_block() {
        assert_eq!(
            Block::of(&[1; 10], &[2; BLOCK], &[3; 10]).unwrap().bytes()[..12],
            [[1; 10].as_slice(), &[2; 2]].concat()
        );
        assert_eq!(Block::of(&[], &[4], &[]).unwrap().bytes().len(), BLOCK);
    }
}

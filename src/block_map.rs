//! In which of four states each block of a device is, for layers that keep some of its data elsewhere.
//!
//! A tree whose nodes have 64 children; what is all of one state is one node, however large. So a map of 2^63 bytes that
//! nothing has happened to costs nothing, a trim of all of it is quick, and blocks that were written here and there cost
//! three bits each, or less.

use std::ops::Range;

/// The state of a block, 0 to 3. All begin as 0.
pub type State = u8;

/// Each level of the tree takes so many bits of a block's number.
const BITS: u32 = 6;
const FAN: usize = 1 << BITS;
/// The root's. With blocks of 4096 bytes and more, 2^54 of them are more than 2^63 bytes.
const HEIGHT: u32 = 8;

#[derive(Debug)]
enum Node {
    All(State),
    /// The low and the high bit of 64 states; only at height 0.
    Each(u64, u64),
    Split(Box<[Node; FAN]>),
}

/// See the module.
#[derive(Debug)]
pub struct BlockMap {
    root: Node,
}

impl Default for BlockMap {
    fn default() -> BlockMap {
        BlockMap { root: Node::All(0) }
    }
}

impl BlockMap {
    /// The most blocks that a map has.
    pub const BLOCKS: u64 = span(HEIGHT);

    /// The state of a block.
    pub fn get(&self, block: u64) -> State {
        let mut node = &self.root;
        let mut height = HEIGHT;
        loop {
            match node {
                Node::All(state) => return *state,
                Node::Each(low, high) => {
                    let bit = block % FAN as u64;
                    return (low >> bit & 1) as State | ((high >> bit & 1) as State) << 1;
                }
                Node::Split(children) => {
                    node = &children[(block >> (BITS * height)) as usize % FAN];
                    height = height.saturating_sub(1);
                }
            }
        }
    }

    /// Puts all of these blocks into this state.
    pub fn set(&mut self, blocks: Range<u64>, state: State) {
        let blocks = blocks.start..blocks.end.min(BlockMap::BLOCKS);
        if !blocks.is_empty() {
            self.root.set(HEIGHT, blocks, state & 3);
        }
    }

    /// The first block from `from` on whose state is wanted.
    pub fn find(&self, from: u64, wanted: impl Fn(State) -> bool) -> Option<u64> {
        if from >= BlockMap::BLOCKS {
            return None;
        }
        self.root.find(HEIGHT, from, &wanted)
    }

    /// The state of block `from`, and the end of the run of blocks in that state, `end` at most.
    pub fn run(&self, from: u64, end: u64) -> (State, u64) {
        let state = self.get(from);
        (state, self.find(from, |other| other != state).map_or(end, |other| other.min(end)))
    }
}

/// How many blocks a node stands for.
const fn span(height: u32) -> u64 {
    1 << (BITS * (height + 1))
}

impl Node {
    /// `blocks` count from this node's first, are all in it, and at least one.
    fn set(&mut self, height: u32, blocks: Range<u64>, state: State) {
        if blocks == (0..span(height)) {
            *self = Node::All(state);
            return;
        }
        if let Node::All(all) = *self {
            let plane = |bit: State| if all & bit != 0 { u64::MAX } else { 0 };
            *self = match height {
                _ if all == state => return,
                0 => Node::Each(plane(1), plane(2)),
                _ => Node::Split(Box::new(std::array::from_fn(|_| Node::All(all)))),
            };
        }
        match self {
            Node::All(_) => {}
            Node::Each(low, high) => {
                let mask = (u64::MAX >> (FAN as u64 - (blocks.end - blocks.start))) << blocks.start;
                for (plane, bit) in [(&mut *low, 1), (&mut *high, 2)] {
                    if state & bit != 0 { *plane |= mask } else { *plane &= !mask }
                }
                if matches!(*low, 0 | u64::MAX) && matches!(*high, 0 | u64::MAX) {
                    *self = Node::All((*low & 1) as State | ((*high & 1) as State) << 1);
                }
            }
            Node::Split(children) => {
                let part = span(height - 1);
                for index in blocks.start / part..=(blocks.end - 1) / part {
                    let first = index * part;
                    let inside = blocks.start.max(first) - first..blocks.end.min(first + part) - first;
                    children[index as usize].set(height - 1, inside, state);
                }
                if children.iter().all(|child| matches!(child, Node::All(all) if *all == state)) {
                    *self = Node::All(state);
                }
            }
        }
    }

    /// As [`BlockMap::find`]; both numbers count from this node's first block.
    fn find(&self, height: u32, from: u64, wanted: &impl Fn(State) -> bool) -> Option<u64> {
        match self {
            Node::All(state) => wanted(*state).then_some(from),
            Node::Each(low, high) => {
                let of = |state: State| {
                    let plane = |plane: u64, bit: State| if state & bit != 0 { plane } else { !plane };
                    plane(*low, 1) & plane(*high, 2)
                };
                let bits = (0..4).filter(|state| wanted(*state)).fold(0, |bits, state| bits | of(state));
                let bits = bits & u64::MAX << from;
                (bits != 0).then(|| u64::from(bits.trailing_zeros()))
            }
            Node::Split(children) => {
                let part = span(height - 1);
                let first = from / part;
                children.iter().enumerate().skip(first as usize).find_map(|(index, child)| {
                    let start = index as u64 * part;
                    Some(start + child.find(height - 1, from.saturating_sub(start), wanted)?)
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::testing::Random;

    #[test]
    fn does_what_a_list_of_states_does() {
        let mut random = Random(5);
        let mut map = BlockMap::default();
        const SIZE: u64 = 64 * 64 * 3 + 5;
        let mut list = vec![0; SIZE as usize];
        for _ in 0..3000 {
            let blocks = random.range(SIZE);
            let state = random.below(4) as State;
            map.set(blocks.clone(), state);
            list[blocks.start as usize..blocks.end as usize].fill(state);
            let from = random.below(SIZE);
            assert_eq!(map.get(from), list[from as usize]);
            let other = list[from as usize..].iter().position(|state| *state != list[from as usize]);
            let end = other.map_or(SIZE, |length| from + length as u64);
            assert_eq!(map.run(from, SIZE), (list[from as usize], end));
            let wanted = random.below(4) as State;
            let place = list[from as usize..].iter().position(|state| *state == wanted).map(|at| from + at as u64);
            assert_eq!(map.find(from, |state| state == wanted).filter(|at| *at < SIZE), place);
        }
    }

    #[test]
    fn the_largest_device_is_one_node_again_after_all_of_it_was_set() {
        let mut map = BlockMap::default();
        let end = (i64::MAX as u64).div_ceil(4096);
        map.set(end - 1..end, 1);
        assert_eq!((map.get(end - 2), map.get(end - 1)), (0, 1));
        assert_eq!(map.find(0, |state| state == 1), Some(end - 1));
        map.set(0..end, 3);
        assert_eq!(map.run(0, end), (3, end));
        map.set(0..BlockMap::BLOCKS, 2);
        assert!(matches!(map.root, Node::All(2)));
        map.set(7..8, 1);
        map.set(7..8, 2);
        assert!(matches!(map.root, Node::All(2)));
    }
}

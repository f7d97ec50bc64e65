//! `memory`: a disk in memory that costs what was written to it, whatever its size. Gone when the server ends.
//!
//! ```text
//! root ─> inner node ─> ... ─> leaf ─> slot (lock) ─> page of 32 KiB
//!         512 children         512 slots             shared with replies that are being sent
//! ```
//! The tree only grows and is read without a lock; as deep as the size asks for, one leaf up to 16 MiB, three levels at
//! 1 TiB. Absent nodes and empty slots read as zeroes. Pages come and go under their slot's lock, which is held for no
//! longer than one page takes to copy. A reply borrows a page by counting itself in; who then writes to the page makes
//! a new one, so what is on its way to a client never changes.
//!
//! So much of `allocator=sparse`, the default; the others are in `memory/`.
//!
//! Source: nbdkit plugins/memory/memory.c, common/allocators/sparse.c, plugins/memory/nbdkit-memory-plugin.pod.

use std::ops::Range;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nbdcaptive_actors::device::{
    self, BLOCK, Block, BlockSize, Blocks, Call, Capabilities, Device, Error, ErrorCode, Exports, Extents, Flags, HOLE,
    Same, Segments, Support, ThreadModel, ZERO,
};

use crate::layer::{About, ConfigError, Parameter, Plugin, Value};
use crate::values;

mod malloc;
mod zstd;

/// See the module.
pub static ABOUT: About = About {
    name: "memory",
    summary: "a disk in memory, which starts empty and is lost at the end

        Whatever its size, it takes only as much memory as has been written to it, unless `allocator=malloc` takes
        all of it at the start. What is trimmed or zeroed is given back. All clients see the same disk.

        # Examples

        A scratch disk for a command:

            nbdcaptive memory 1G \\
                --run 'nbdcopy disk.img \"$uri\" && nbdinfo --map \"$uri\"'

        One of 1 EiB, compressed in memory:

            nbdcaptive memory 1E allocator=zstd --run 'nbdinfo --size \"$uri\"'
        ",
    parameters: &[
        Parameter { key: "size", value: "<SIZE>", help: "size of the disk, up to 2^63-1 bytes", required: true },
        Parameter {
            key: "allocator",
            value: "sparse|malloc[,mlock=true]|zstd",
            help: "how memory is taken: as it is written to; all at the start, and locked; compressed",
            required: false,
        },
    ],
    magic_key: Some("size"),
    thread_model: ThreadModel::Parallel,
    dump: &[("mlock", "yes"), ("zstd", "yes")],
};

/// The plugin.
#[derive(Debug, Default)]
pub struct Memory {
    size: Option<u64>,
    allocator: Option<String>,
    chosen: Allocator,
}

/// How memory is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Allocator {
    #[default]
    Sparse,
    Malloc {
        mlock: bool,
    },
    Zstd,
}

impl Plugin for Memory {
    fn callbacks(&self) -> &'static str {
        "unload dump_plugin config config_complete config_help get_ready open get_size block_size \
         can_fast_zero can_fua can_multi_conn can_cache pread pwrite flush trim zero extents"
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "size" => self.size = Some(values::size(value.text(key)?).map_err(ConfigError)?),
            "allocator" => self.allocator = Some(value.text(key)?.to_owned()),
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        if self.size.is_none() {
            return Err(ConfigError("you must specify size=<SIZE> on the command line".to_owned()));
        }
        if let Some(text) = &self.allocator {
            self.chosen = Allocator::parse(text)?;
        }
        Ok(())
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        let size = self.size.unwrap_or(0);
        Ok(match self.chosen {
            Allocator::Sparse => Arc::new(Same::new(Disk::new(size))),
            Allocator::Malloc { mlock } => Arc::new(Same::new(malloc::Flat::new(size, mlock)?)),
            Allocator::Zstd => Arc::new(Same::new(zstd::Compressed::new(size))),
        })
    }
}

impl Allocator {
    /// The grammar is `NAME[,KEY[=VALUE]]...`; a key alone is switched on.
    pub(super) fn parse(text: &str) -> Result<Allocator, ConfigError> {
        let mut words = text.split(',');
        let mut allocator = match words.next() {
            Some("sparse") => Allocator::Sparse,
            Some("malloc") => Allocator::Malloc { mlock: false },
            Some("zstd") => Allocator::Zstd,
            _ => {
                return Err(ConfigError(format!("unknown allocator \"{text}\" (available: sparse, malloc, zstd)")));
            }
        };
        for word in words.filter(|word| !word.is_empty()) {
            let (key, value) = word.split_once('=').unwrap_or((word, "1"));
            match (&mut allocator, key) {
                (_, "") => return Err(ConfigError("invalid allocator parameter".to_owned())),
                (Allocator::Malloc { mlock }, "mlock") => *mlock = values::boolean(value).map_err(ConfigError)?,
                (Allocator::Malloc { .. }, _) => {
                    return Err(ConfigError(format!("allocator=malloc: unknown parameter {key}")));
                }
                (Allocator::Sparse, _) => {
                    return Err(ConfigError("allocator=sparse does not take extra parameters".to_owned()));
                }
                (Allocator::Zstd, _) => {
                    return Err(ConfigError("allocator=zstd does not take extra parameters".to_owned()));
                }
            }
        }
        Ok(allocator)
    }

    /// A disk that is empty.
    pub(super) fn disk(self, size: u64) -> Result<Arc<dyn Device>, ConfigError> {
        Ok(match self {
            Allocator::Sparse => Arc::new(Disk::new(size)),
            Allocator::Malloc { mlock } => Arc::new(malloc::Flat::new(size, mlock)?),
            Allocator::Zstd => Arc::new(zstd::Compressed::new(size)),
        })
    }
}

/// What a disk in memory can do, whatever it is in.
fn capabilities(preferred: u32, takes_blocks: bool) -> Capabilities {
    Capabilities {
        write: true,
        flush: true,
        trim: true,
        zero: Support::Native,
        fast_zero: true,
        // Nothing outlives the server, so there is nothing to force.
        fua: Support::Native,
        multi_conn: true,
        cache: Support::Native,
        extents: true,
        rotational: false,
        takes_blocks,
        block_size: Some(BlockSize { minimum: 1, preferred, maximum: u32::MAX }),
    }
}

/// Bytes of a page, which is what is taken and given back at a time.
const PAGE: usize = BLOCK;

/// Children of a node, and slots of a leaf: 2^BITS.
const FANOUT: usize = 1 << BITS;
const BITS: u32 = 9;

/// What an absent page reads as.
static ZEROES: [u8; PAGE] = [0; PAGE];

/// From here on a part of a page is lent to the reply; copying less than this is cheaper than keeping count of it, and
/// than the copy of a page that a write to a lent page costs. Bytes.
const LEND: usize = 16 * 1024;

/// The most that a call that must not wait copies. Bytes; a few milliseconds.
const COPY_AT_ONCE: usize = 4 << 20;

/// The most that a call that must not wait zeroes or trims. Bytes.
const ZERO_AT_ONCE: u64 = 64 << 20;

/// The most slots that a call that must not wait looks into for extents; one that holds a page of zeroes takes about a
/// microsecond.
const LOOK_AT_ONCE: u32 = 4096;

/// Makes a page of three parts, which are [`PAGE`] bytes together. Errors: no memory.
fn page_of(before: &[u8], data: &[u8], after: &[u8]) -> device::Result<Block> {
    Block::of(before, data, after)
        .ok_or_else(|| Error::failed(ErrorCode::NoMemory, "memory: no memory left for what is being written"))
}

/// A page, or none. One that was never lent is in the slot itself: who writes a little here and a little there need not look
/// whether it is shared, which would be one more place in memory that is not in the cache.
#[derive(Default)]
enum Page {
    #[default]
    Absent,
    Own(Block),
    /// Replies have it too, or had it.
    Lent(Arc<Block>),
}

impl Page {
    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Page::Absent => None,
            Page::Own(block) => Some(block.bytes()),
            Page::Lent(block) => Some(block.bytes()),
        }
    }

    /// To be changed, if nobody else has it.
    fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        if let Page::Lent(_) = self {
            *self = match std::mem::take(self) {
                Page::Lent(block) => Arc::try_unwrap(block).map_or_else(Page::Lent, Page::Own),
                page => page,
            };
        }
        match self {
            Page::Own(block) => Some(block.bytes_mut()),
            _ => None,
        }
    }

    fn write(&mut self, data: &[u8], start: usize) -> device::Result<()> {
        let end = start + data.len();
        if let Some(bytes) = self.bytes_mut() {
            bytes[start..end].copy_from_slice(data);
            return Ok(());
        }
        let old = self.bytes().unwrap_or(&ZEROES);
        *self = Page::Own(page_of(&old[..start], data, &old[end..])?);
        Ok(())
    }
}

/// A place for a page.
#[derive(Default)]
struct Slot(RwLock<Page>);

impl Slot {
    // A slot whose holder panicked is still whole: it is a pointer, and a page is bytes.
    fn shared(&self) -> RwLockReadGuard<'_, Page> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, Page> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The page, to be kept as it is for as long as somebody needs it. `None`: it is absent.
    fn lend(&self) -> Option<Arc<Block>> {
        match &*self.shared() {
            Page::Absent => return None,
            Page::Lent(block) => return Some(Arc::clone(block)),
            Page::Own(_) => {}
        }
        let mut page = self.exclusive();
        let block = match std::mem::take(&mut *page) {
            Page::Absent => return None,
            Page::Own(block) => Arc::new(block),
            Page::Lent(block) => block,
        };
        *page = Page::Lent(Arc::clone(&block));
        Some(block)
    }

    fn write(&self, data: &[u8], start: usize) -> device::Result<()> {
        self.exclusive().write(data, start)
    }

    /// Takes a whole page for its own and leaves the one before in its place, if there was one that nobody else has.
    fn take(&self, block: &mut Block) {
        let old = std::mem::replace(&mut *self.exclusive(), Page::Own(std::mem::take(block)));
        *block = match old {
            Page::Absent => Block::default(),
            Page::Own(block) => block,
            Page::Lent(block) => Arc::into_inner(block).unwrap_or_default(),
        };
    }

    /// Gives the page back if it then holds nothing but zeroes.
    fn zero(&self, range: Range<usize>) -> device::Result<()> {
        let mut page = self.exclusive();
        let Some(bytes) = page.bytes() else { return Ok(()) };
        let rest = [&bytes[..range.start], &bytes[range.end..]];
        if rest.iter().any(|part| **part != ZEROES[..part.len()]) {
            return page.write(&ZEROES[range.clone()], range.start);
        }
        let empty = std::mem::take(&mut *page);
        // Giving back takes longer than the lock need be held.
        drop(page);
        drop(empty);
        Ok(())
    }
}

/// A part of the tree. A node that spans 2^n pages has children that span 2^(n-BITS).
enum Node<S> {
    Inner(Box<[OnceLock<Node<S>>; FANOUT]>),
    Leaf(Box<[S; FANOUT]>),
}

impl<S: Default> Node<S> {
    /// An empty node that spans 2^`span` pages.
    fn new(span: u32) -> Node<S> {
        if span > BITS {
            Node::Inner(Box::new(std::array::from_fn(|_| OnceLock::new())))
        } else {
            Node::Leaf(Box::new(std::array::from_fn(|_| S::default())))
        }
    }
}

/// Where a page is looked for.
enum Found<'a, S> {
    Slot(&'a S),
    /// No node: this page and those behind it, so many together, read as zeroes. At least 1.
    Absent(u64),
}

/// The slots of all pages, as far as they were written to.
struct Tree<S> {
    root: OnceLock<Node<S>>,
    /// The root spans 2^`span` pages; a multiple of [`BITS`], at most 54.
    span: u32,
}

impl<S: Default> Tree<S> {
    fn new(size: u64) -> Tree<S> {
        let pages = size.div_ceil(PAGE as u64);
        let mut span = BITS;
        while pages > 1 << span {
            span += BITS;
        }
        Tree { root: OnceLock::new(), span }
    }

    fn find(&self, page: u64) -> Found<'_, S> {
        let (mut node, mut span) = (&self.root, self.span);
        loop {
            match node.get() {
                None => return Found::Absent((1 << span) - (page & ((1 << span) - 1))),
                Some(Node::Leaf(slots)) => return Found::Slot(&slots[page as usize % FANOUT]),
                Some(Node::Inner(children)) => {
                    span -= BITS;
                    node = &children[(page >> span) as usize % FANOUT];
                }
            }
        }
    }

    /// The slot of a page, with the nodes that lead to it.
    fn slot(&self, page: u64) -> &S {
        let (mut node, mut span) = (&self.root, self.span);
        loop {
            match node.get_or_init(|| Node::new(span)) {
                Node::Leaf(slots) => return &slots[page as usize % FANOUT],
                Node::Inner(children) => {
                    span -= BITS;
                    node = &children[(page >> span) as usize % FANOUT];
                }
            }
        }
    }
}

struct Disk {
    size: u64,
    tree: Tree<Slot>,
}

impl Disk {
    fn new(size: u64) -> Disk {
        Disk { size, tree: Tree::new(size) }
    }

    /// Gives the pages of a range in order, each with the part that is meant; `None` reads as zeroes, for so long.
    fn borrow(&self, length: usize, mut offset: u64, mut give: impl FnMut(Option<Arc<Block>>, Range<usize>)) {
        let end = offset + length as u64;
        while offset < end {
            let (page, range) = match self.tree.find(offset / PAGE as u64) {
                // No longer than what is asked for, which is a `usize`.
                Found::Absent(pages) => (None, 0..remaining(offset, pages).min(end - offset) as usize),
                Found::Slot(slot) => (slot.lend(), within(offset, end - offset)),
            };
            offset += range.len() as u64;
            give(page, range);
        }
    }
}

/// Bytes from `offset` to the end of the `pages` pages of which the first holds it.
fn remaining(offset: u64, pages: u64) -> u64 {
    pages.saturating_mul(PAGE as u64) - offset % PAGE as u64
}

/// The part of its page that `length` bytes at `offset` cover.
fn within(offset: u64, length: u64) -> Range<usize> {
    let start = offset as usize % PAGE;
    start..start + length.min((PAGE - start) as u64) as usize
}

impl Device for Disk {
    fn size(&self) -> device::Result<u64> {
        Ok(self.size)
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(capabilities(PAGE as u32, true))
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, mut buffer: &mut [u8], mut offset: u64, call: &Call) -> device::Result<()> {
        if buffer.len() > COPY_AT_ONCE && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        while !buffer.is_empty() {
            let length = buffer.len() as u64;
            let part;
            match self.tree.find(offset / PAGE as u64) {
                Found::Absent(pages) => {
                    // No longer than the buffer, so it fits.
                    let absent = remaining(offset, pages).min(length) as usize;
                    (part, buffer) = buffer.split_at_mut(absent);
                    part.fill(0);
                }
                Found::Slot(slot) => {
                    let range = within(offset, length);
                    (part, buffer) = buffer.split_at_mut(range.len());
                    match slot.shared().bytes() {
                        Some(page) => part.copy_from_slice(&page[range]),
                        None => part.fill(0),
                    }
                }
            }
            offset += part.len() as u64;
        }
        Ok(())
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> device::Result<()> {
        if length < LEND {
            return self.read(reply.space(length), offset, call);
        }
        self.borrow(length, offset, |page, range| match page {
            Some(page) if range.len() < LEND => reply.space(range.len()).copy_from_slice(&page.bytes()[range]),
            Some(page) => reply.shared(page, range),
            None => reply.zeroes(range.len()),
        });
        Ok(())
    }

    fn write(&self, mut data: &[u8], mut offset: u64, _flags: Flags, call: &Call) -> device::Result<()> {
        if data.len() > COPY_AT_ONCE && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        while !data.is_empty() {
            let range = within(offset, data.len() as u64);
            let (part, rest) = data.split_at(range.len());
            self.tree.slot(offset / PAGE as u64).write(part, range.start)?;
            data = rest;
            offset += part.len() as u64;
        }
        Ok(())
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        // Under a filter that shifts offsets the borders of these blocks are none of a page.
        let fits = data.start() == offset as usize % PAGE;
        let mut offset = offset;
        for (block, part) in data.parts() {
            let length = part.len() as u64;
            if fits && part.len() == PAGE {
                self.tree.slot(offset / PAGE as u64).take(block);
            } else {
                self.write(&block.bytes()[part], offset, flags, call)?;
            }
            offset += length;
        }
        Ok(())
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        self.zero(length, offset, flags, call)
    }

    /// Gives back pages that are covered, and those that then hold nothing but zeroes, also where the client asked for
    /// no holes: as in nbdkit, and nothing is promised by keeping them.
    fn zero(&self, length: u64, offset: u64, _flags: Flags, call: &Call) -> device::Result<()> {
        if length > ZERO_AT_ONCE && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        let end = offset + length;
        let mut offset = offset;
        while offset < end {
            offset = match self.tree.find(offset / PAGE as u64) {
                Found::Absent(pages) => offset.saturating_add(remaining(offset, pages)),
                Found::Slot(slot) => {
                    let range = within(offset, end - offset);
                    slot.zero(range.clone())?;
                    offset + range.len() as u64
                }
            }
        }
        Ok(())
    }

    /// A page that is there but holds zeroes (from where it is looked at) is a zero, and no hole.
    fn extents(&self, extents: &mut Extents, call: &Call) -> device::Result<()> {
        let mut offset = extents.offset();
        let end = offset + extents.length();
        let mut looked = 0;
        while offset < end {
            let (length, flags) = match self.tree.find(offset / PAGE as u64) {
                Found::Absent(pages) => (remaining(offset, pages), HOLE | ZERO),
                Found::Slot(slot) => {
                    looked += 1;
                    if looked > LOOK_AT_ONCE && !call.may_block() {
                        return Err(Error::WouldBlock);
                    }
                    let range = within(offset, PAGE as u64);
                    let flags = match slot.shared().bytes() {
                        None => HOLE | ZERO,
                        Some(page) if page[range.clone()] == ZEROES[range.clone()] => ZERO,
                        Some(_) => 0,
                    };
                    (range.len() as u64, flags)
                }
            };
            if !extents.add(offset, length, flags) {
                break;
            }
            offset = offset.saturating_add(length);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::testing::{Random, ready};
    use nbdcaptive_actors::device::Client;

    const NONE: Flags = Flags { fua: false, may_trim: false, fast: false };
    const NOW: &Call = &Call::AT_ONCE;
    const P: u64 = PAGE as u64;

    impl Disk {
        fn live_pages(&self) -> usize {
            fn count(node: &OnceLock<Node<Slot>>) -> usize {
                match node.get() {
                    None => 0,
                    Some(Node::Inner(children)) => children.iter().map(count).sum(),
                    Some(Node::Leaf(slots)) => slots.iter().filter(|slot| slot.shared().bytes().is_some()).count(),
                }
            }
            count(&self.tree.root)
        }

        fn bytes(&self, length: usize, offset: u64) -> Vec<u8> {
            let mut buffer = vec![0xee; length];
            self.read(&mut buffer, offset, &Call::BLOCKING).unwrap();
            buffer
        }

        fn lend(&self, length: usize, offset: u64) -> Lent {
            let mut reply = Segments::default();
            self.read_segments(&mut reply, length, offset, NOW).unwrap();
            assert_eq!(reply.len(), length);
            let mut lent = Vec::new();
            self.borrow(length, offset, |page, range| lent.push((page, range)));
            lent
        }

        fn map(&self, offset: u64, length: u64) -> Vec<(u64, u64)> {
            let mut extents = Extents::new(offset, length, false);
            self.extents(&mut extents, NOW).unwrap();
            extents.list().iter().map(|extent| (extent.length, extent.flags)).collect()
        }
    }

    #[test]
    fn size_is_required_and_errors_are_nbdkits() {
        let error = |parameters: &[(&str, &str)]| {
            let parameters: Vec<_> = parameters.iter().map(|(key, value)| (*key, (*value).as_ref())).collect();
            ready("memory", &parameters).err().map(|error| error.to_string())
        };
        assert_eq!(error(&[]).unwrap(), "you must specify size=<SIZE> on the command line");
        assert_eq!(error(&[("size", "1M"), ("allocator", "foo")]).unwrap(), {
            "unknown allocator \"foo\" (available: sparse, malloc, zstd)"
        });
        assert_eq!(error(&[("size", "1M"), ("allocator", "sparse,mlock=true")]).unwrap(), {
            "allocator=sparse does not take extra parameters"
        });
        for (allocator, wanted) in [
            ("zstd,level=1", "allocator=zstd does not take extra parameters"),
            ("malloc,foo=1", "allocator=malloc: unknown parameter foo"),
            ("malloc,=1", "invalid allocator parameter"),
            ("malloc,mlock=perhaps", "could not decipher boolean (perhaps)"),
        ] {
            assert_eq!(error(&[("size", "1M"), ("allocator", allocator)]).unwrap(), wanted);
        }
        let error_of_size = error(&[("size", "9223372036854775807"), ("allocator", "malloc")]).unwrap();
        assert!(error_of_size.starts_with("allocator=malloc: no memory"), "{error_of_size}");
        for allocator in ["sparse,", "malloc", "malloc,mlock=false", "malloc,,mlock=0", "zstd"] {
            assert_eq!(error(&[("size", "1M"), ("allocator", allocator)]), None, "{allocator}");
        }
        let exports = ready("memory", &[("size", "9223372036854775807".as_ref())]).unwrap();
        assert_eq!(exports.open(&Client::default()).unwrap().size().unwrap(), i64::MAX as u64);
    }

    #[test]
    fn agrees_with_a_vector_after_any_operations() {
        const SIZE: u64 = 20 * P + 777;
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        // Leaves that are far apart, in one tree.
        for base in [0, (1 << 24) - 5 * P - 100, (1 << 42) - 7 * P] {
            let disk = Disk::new(1 << 43);
            let mut model = vec![0; SIZE as usize];
            let mut borrowed = Vec::new();
            for step in 0..4000 {
                let range = random.range(SIZE);
                let (length, offset) = (range.end - range.start, base + range.start);
                let range = range.start as usize..range.end as usize;
                match random.below(5) {
                    0 | 1 => {
                        let data = random.bytes(range.len());
                        disk.write(&data, offset, NONE, NOW).unwrap();
                        model[range].copy_from_slice(&data);
                    }
                    2 => {
                        disk.zero(length, offset, NONE, NOW).unwrap();
                        model[range].fill(0);
                    }
                    3 => assert_eq!(disk.bytes(range.len(), offset), model[range], "step {step}"),
                    _ => {
                        borrowed.push((disk.lend(range.len(), offset), model[range].to_vec()));
                        if borrowed.len() > 8 {
                            let (reply, then) = borrowed.swap_remove(random.below(8) as usize);
                            assert!(content(&reply) == then, "step {step}: a reply has changed on its way");
                        }
                    }
                }
            }
            assert!(disk.bytes(SIZE as usize, base) == model);
            // Every run of the map says what is there.
            let mut at = 0;
            for (length, flags) in disk.map(base, SIZE) {
                let run = &model[at..at + length as usize];
                assert!(flags == 0 || run.iter().all(|byte| *byte == 0));
                at += length as usize;
            }
            assert_eq!(at, model.len());
            disk.zero(SIZE, base, NONE, NOW).unwrap();
            assert_eq!(disk.live_pages(), 0);
        }
    }

    #[test]
    fn every_allocator_agrees_with_a_vector() {
        const SIZE: usize = (1 << 20) + 777;
        for allocator in ["sparse", "malloc", "zstd"] {
            let parameters = [("size", SIZE.to_string()), ("allocator", allocator.to_owned())];
            let parameters: Vec<_> = parameters.iter().map(|(key, value)| (*key, value.as_ref())).collect();
            let device = ready("memory", &parameters).unwrap().open(&Client::default()).unwrap();
            let mut random = Random(0x9e37_79b9_7f4a_7c15);
            let mut model = vec![0; SIZE];
            for step in 0..600 {
                let range = random.range(SIZE as u64);
                let (offset, length) = (range.start, range.end - range.start);
                let range = range.start as usize..range.end as usize;
                match random.below(4) {
                    0 => {
                        let data = random.bytes(range.len());
                        device.write(&data, offset, NONE, &Call::BLOCKING).unwrap();
                        model[range].copy_from_slice(&data);
                    }
                    1 => {
                        device.zero(length, offset, NONE, &Call::BLOCKING).unwrap();
                        model[range].fill(0);
                    }
                    2 => {
                        let mut buffer = vec![1; range.len()];
                        device.read(&mut buffer, offset, &Call::BLOCKING).unwrap();
                        assert!(buffer == model[range], "{allocator}: step {step}");
                    }
                    _ => {
                        let mut reply = Segments::default();
                        device.read_segments(&mut reply, range.len(), offset, &Call::BLOCKING).unwrap();
                        assert!(reply.to_vec() == model[range.clone()], "{allocator}: step {step}");
                        let mut extents = Extents::new(offset, length, false);
                        device.extents(&mut extents, &Call::BLOCKING).unwrap();
                        let mut at = range.start;
                        for extent in extents.list() {
                            let run = &model[at..at + extent.length as usize];
                            assert!(extent.flags == 0 || run.iter().all(|byte| *byte == 0), "{allocator}: step {step}");
                            at += run.len();
                        }
                        assert_eq!(at, range.end, "{allocator}: step {step}");
                    }
                }
            }
        }
    }

    #[test]
    fn memory_is_given_back() {
        let disk = Disk::new(1 << 30);
        disk.write(&vec![1; 4 * PAGE], P / 2, NONE, NOW).unwrap();
        assert_eq!(disk.live_pages(), 5);
        disk.trim(P, P / 2, NONE, NOW).unwrap();
        assert_eq!(disk.live_pages(), 4, "the first page holds only zeroes, the second half of its data");
        disk.zero(P / 2, P * 3 / 2, NONE, NOW).unwrap();
        assert_eq!(disk.live_pages(), 3);

        // A page on its way to a client lives until it is there, and not in the disk.
        let mut reply = Segments::default();
        disk.read_segments(&mut reply, PAGE, 2 * P, NOW).unwrap();
        let Found::Slot(slot) = disk.tree.find(2) else { panic!("it was written") };
        let page = Arc::downgrade(&slot.lend().expect("it was written"));
        disk.zero(1 << 30, 0, NONE, &Call::BLOCKING).unwrap();
        assert_eq!(disk.live_pages(), 0);
        assert!(page.upgrade().is_some());
        drop(reply);
        assert!(page.upgrade().is_none());
    }

    #[test]
    fn the_largest_disk_costs_what_is_written() {
        let size = i64::MAX as u64;
        let disk = Disk::new(size);
        assert_eq!(disk.map(0, size), [(size, HOLE | ZERO)]);
        disk.write(b"first", 0, NONE, NOW).unwrap();
        disk.write(b"last", size - 4, NONE, NOW).unwrap();
        disk.write(b"middle", 1 << 62, NONE, NOW).unwrap();
        assert_eq!(disk.live_pages(), 3);
        assert_eq!(disk.bytes(4, size - 4), b"last");
        assert_eq!(disk.bytes(8, (1 << 62) - 1), b"\0middle\0");
        let hole = HOLE | ZERO;
        let last = size / P * P;
        assert_eq!(disk.map(0, size), {
            [(P, 0), ((1 << 62) - P, hole), (P, 0), (last - (1 << 62) - P, hole), (size - last, 0)]
        });
        disk.zero(size, 0, NONE, &Call::BLOCKING).unwrap();
        assert_eq!(disk.live_pages(), 0);
        assert!(matches!(disk.zero(size, 0, NONE, NOW), Err(Error::WouldBlock)));
    }

    #[test]
    fn a_page_of_written_zeroes_is_a_zero_and_no_hole() {
        let disk = Disk::new(16 * P);
        disk.write(&vec![0; PAGE], P, NONE, NOW).unwrap();
        disk.write(&[1], 2 * P, NONE, NOW).unwrap();
        let hole = HOLE | ZERO;
        assert_eq!(disk.map(0, 16 * P), [(P, hole), (P, ZERO), (P, 0), (13 * P, hole)]);
        assert_eq!(disk.map(2 * P + 1, P), [(P - 1, ZERO), (1, hole)]);
        let mut first = Extents::new(100, P, true);
        disk.extents(&mut first, NOW).unwrap();
        assert_eq!(first.list().iter().map(|extent| extent.length).collect::<Vec<_>>(), [P - 100]);
    }

    #[test]
    fn readers_never_see_half_a_write_to_a_page() {
        const PAGES: u64 = 4;
        let disk = Disk::new(PAGES * P);
        std::thread::scope(|scope| {
            for writer in 0..2 {
                let disk = &disk;
                scope.spawn(move || {
                    for round in 0..1500_u64 {
                        let at = (round * 7 + u64::from(writer)) % PAGES * P;
                        match round % 16 {
                            0 => disk.zero(P, at, NONE, NOW).unwrap(),
                            _ => disk.write(&vec![(round * 2) as u8 | writer; PAGE], at, NONE, NOW).unwrap(),
                        }
                    }
                });
            }
            for reader in 0..2 {
                let disk = &disk;
                scope.spawn(move || {
                    for round in 0..1500 {
                        let bytes = if reader == 0 {
                            disk.bytes(PAGE, round % PAGES * P)
                        } else {
                            content(&disk.lend(PAGE, round % PAGES * P))
                        };
                        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                    }
                });
            }
        });
    }

    #[test]
    fn what_takes_long_is_not_done_at_once() {
        let disk = Disk::new(1 << 30);
        let mut buffer = vec![0; COPY_AT_ONCE + 1];
        assert!(matches!(disk.write(&buffer, 0, NONE, NOW), Err(Error::WouldBlock)));
        assert_eq!(disk.live_pages(), 0);
        assert!(matches!(disk.read(&mut buffer, 0, NOW), Err(Error::WouldBlock)));
        // Of lent pages nothing is copied.
        let mut reply = Segments::default();
        disk.read_segments(&mut reply, buffer.len(), 0, NOW).unwrap();
        disk.write(&[1], 0, NONE, NOW).unwrap();
        disk.write(&[1], (1 << 30) - 1, NONE, NOW).unwrap();
        for leaf in 0..64 {
            disk.write(&[1], leaf * P * FANOUT as u64, NONE, NOW).unwrap();
        }
        let mut extents = Extents::new(0, 1 << 30, false);
        assert!(matches!(disk.extents(&mut extents, NOW), Err(Error::WouldBlock)));
        disk.extents(&mut extents, &Call::BLOCKING).unwrap();
        assert_eq!(extents.list().iter().map(|extent| extent.length).sum::<u64>(), 1 << 30);
    }

    type Lent = Vec<(Option<Arc<Block>>, Range<usize>)>;

    fn content(reply: &Lent) -> Vec<u8> {
        let part = |(page, range): &(Option<Arc<Block>>, Range<usize>)| match page {
            Some(page) => page.bytes()[range.clone()].to_vec(),
            None => vec![0; range.len()],
        };
        reply.iter().flat_map(part).collect()
    }
}

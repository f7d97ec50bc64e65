//! Where the memory of blocks comes from: slabs of 64 blocks, which lie on the border of a huge page and ask the kernel for one.
//!
//! A disk of many small allocations has its data all over the address space: each random access then misses the translation
//! cache, which in a virtual machine costs more than the access. And what a general allocator is given back in the middle of its
//! heap it keeps; here an empty slab goes back to the kernel, and so do the free blocks of the others beyond [`KEPT`].
//!
//! One set for the process, as the allocator is: blocks wander from sessions to devices and between servers.
//!
//! Source: mmap(2), madvise(2) (MADV_HUGEPAGE, MADV_DONTNEED), Linux Documentation/admin-guide/mm/transhuge.rst.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::BLOCK;

/// Bytes of a slab: a huge page of x86-64, and of others one or several.
const SLAB: usize = 64 * BLOCK;

/// How many free blocks of slabs in use keep their memory for the next that are taken: 8 MiB.
const KEPT: usize = 256;

static SLABS: Mutex<Slabs> = Mutex::new(Slabs { all: BTreeMap::new(), open: BTreeSet::new(), warm: 0 });

/// [`BLOCK`] bytes that nobody else has, of anything.
pub(super) struct Piece(NonNull<u8>);

// SAFETY: a piece is the one owner of its bytes, as a box is; where it is dropped makes no difference.
unsafe impl Send for Piece {}
// SAFETY: through a shared reference its bytes are only read.
unsafe impl Sync for Piece {}

impl Piece {
    /// `None`: no memory.
    pub(super) fn take() -> Option<Piece> {
        let mut slabs = slabs();
        if let Some(piece) = slabs.take() {
            return Some(piece);
        }
        let is_first = slabs.all.is_empty();
        // Not under the lock, as the kernel may take a while to find a huge page.
        drop(slabs);
        let start = map(!is_first)?;
        let mut slabs = self::slabs();
        slabs.add(start);
        slabs.take()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: BLOCK bytes of a mapping that stays while any of its pieces is there; they were never uninitialized, as
        // the kernel gives zeroes; nobody else changes them.
        unsafe { slice::from_raw_parts(self.0.as_ptr(), BLOCK) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and nobody else can read them while `self` is borrowed for changes.
        unsafe { slice::from_raw_parts_mut(self.0.as_ptr(), BLOCK) }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let is_cold = slabs().has_enough(self.0);
        if is_cold {
            // SAFETY: the bytes are this piece's and it ends here; whoever gets them next expects anything. Locked memory
            // stays, which loses nothing.
            let _ = unsafe { madvise(self.0.as_ptr().cast(), BLOCK, Advice::LinuxDontNeed) };
        }
        if let Some(slab) = slabs().give_back(self.0, is_cold) {
            unmap(slab, SLAB);
        }
    }
}

struct Slabs {
    /// By address.
    all: BTreeMap<usize, Slab>,
    /// Those that have a free block. The lowest is taken from first, so that the others have a chance to become empty.
    open: BTreeSet<usize>,
    /// How many free blocks have memory.
    warm: usize,
}

/// A bit for each block.
struct Slab {
    start: NonNull<u8>,
    used: u64,
    /// Those of the free that have no memory, as far as is known.
    cold: u64,
}

// SAFETY: the pointer is an address to make pieces of, each of which has bytes of its own.
unsafe impl Send for Slab {}

// A panic leaves it whole: nothing in it can panic but the allocation of a node, and that before a change.
fn slabs() -> MutexGuard<'static, Slabs> {
    SLABS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The slab that a piece is of, and its bit there.
fn place(piece: NonNull<u8>) -> (usize, u64) {
    let address = piece.as_ptr().addr();
    (address / SLAB * SLAB, 1 << (address % SLAB / BLOCK))
}

impl Slabs {
    fn add(&mut self, start: NonNull<u8>) {
        self.all.insert(start.as_ptr().addr(), Slab { start, used: 0, cold: u64::MAX });
        self.open.insert(start.as_ptr().addr());
    }

    /// A block that is free, if there is one.
    fn take(&mut self) -> Option<Piece> {
        let address = *self.open.first()?;
        let slab = self.all.get_mut(&address)?;
        let warm = !slab.used & !slab.cold;
        let number = if warm != 0 { warm } else { slab.cold }.trailing_zeros();
        self.warm -= usize::from(warm != 0);
        slab.cold &= !(1 << number);
        slab.used |= 1 << number;
        if slab.used == u64::MAX {
            self.open.remove(&address);
        }
        // SAFETY: the number is below 64, so it stays in the mapping.
        Some(Piece(unsafe { slab.start.add(number as usize * BLOCK) }))
    }

    /// Whether the memory of a piece need not be kept. The last of its slab goes with the slab.
    fn has_enough(&self, piece: NonNull<u8>) -> bool {
        let (address, bit) = place(piece);
        self.warm >= KEPT && self.all.get(&address).is_some_and(|slab| slab.used != bit)
    }

    /// Returns a slab that nobody has a piece of and that is no longer known here, to be given back.
    fn give_back(&mut self, piece: NonNull<u8>, is_cold: bool) -> Option<NonNull<u8>> {
        let (address, bit) = place(piece);
        let slab = self.all.get_mut(&address)?;
        slab.used &= !bit;
        if is_cold {
            slab.cold |= bit;
        } else {
            self.warm += 1;
        }
        self.open.insert(address);
        // One that is alone is kept, so that writing and trimming in turns is no matter of the kernel's.
        if slab.used != 0 || self.open.len() == 1 {
            return None;
        }
        self.warm -= (!slab.cold).count_ones() as usize;
        self.open.remove(&address);
        self.all.remove(&address).map(|slab| slab.start)
    }
}

/// A slab's memory. Without `huge` it is taken page by page as it is touched, so that a disk with little in it costs little.
fn map(huge: bool) -> Option<NonNull<u8>> {
    // Linux puts a mapping of this size on its border since 6.7; what is too much is cut off.
    let start = anonymous(SLAB)?;
    let start = if start.as_ptr().addr() % SLAB == 0 {
        start
    } else {
        unmap(start, SLAB);
        let wide = anonymous(2 * SLAB)?;
        let before = wide.as_ptr().addr().next_multiple_of(SLAB) - wide.as_ptr().addr();
        // SAFETY: at most SLAB bytes into a mapping of twice as many.
        let (start, end) = unsafe { (wide.add(before), wide.add(before + SLAB)) };
        unmap(wide, before);
        unmap(end, SLAB - before);
        start
    };
    if huge {
        // A kernel without huge pages says so, and all else is the same.
        // SAFETY: advice about a mapping of our own, which changes nothing in it.
        let _ = unsafe { madvise(start.as_ptr().cast(), SLAB, Advice::LinuxHugepage) };
    }
    Some(start)
}

fn anonymous(length: usize) -> Option<NonNull<u8>> {
    // SAFETY: a new mapping where the kernel finds room touches nothing that is there.
    let start =
        unsafe { mmap_anonymous(ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE).ok()? };
    NonNull::new(start.cast())
}

/// Gives a part of a mapping back that nobody has any more.
fn unmap(start: NonNull<u8>, length: usize) {
    if length == 0 {
        return;
    }
    let start: *mut c_void = start.as_ptr().cast();
    // SAFETY: `map` made it, and no piece of it is left.
    if unsafe { munmap(start, length) }.is_err() {
        // Too many mappings: one in the middle of others is one more. At least the memory goes.
        // SAFETY: as above.
        let _ = unsafe { madvise(start, length, Advice::LinuxDontNeed) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::mem::ManuallyDrop;
    use std::os::unix::fs::FileExt;

    /// The slabs are the whole process's, and so of all tests; those that take many are not to meet.
    static MANY: Mutex<()> = Mutex::new(());

    fn alone() -> MutexGuard<'static, ()> {
        MANY.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(count: usize) -> Vec<Piece> {
        (0..count).map(|_| Piece::take().expect("there is memory")).collect()
    }

    #[test]
    fn pieces_do_not_overlap_and_keep_what_is_written() {
        let _alone = alone();
        let mut pieces = take(200);
        for (number, piece) in pieces.iter_mut().enumerate() {
            piece.bytes_mut().fill(number as u8);
        }
        for (number, piece) in pieces.iter().enumerate() {
            assert_eq!(piece.bytes().len(), BLOCK);
            assert!(piece.bytes().iter().all(|byte| *byte == number as u8));
            assert_eq!(piece.0.as_ptr().addr() % BLOCK, 0);
        }
        // Every other one is taken anew, and its neighbours do not notice.
        for number in (0..200).step_by(2) {
            pieces[number] = Piece::take().expect("there is memory");
            pieces[number].bytes_mut().fill(!(number as u8));
        }
        for (number, piece) in pieces.iter().enumerate() {
            let wanted = if number % 2 == 0 { !(number as u8) } else { number as u8 };
            assert!(piece.bytes().iter().all(|byte| *byte == wanted), "{number}");
        }
    }

    #[test]
    fn threads_take_and_give_back_at_the_same_time() {
        let _alone = alone();
        std::thread::scope(|scope| {
            for thread in 0..4_u8 {
                scope.spawn(move || {
                    let mut pieces = Vec::new();
                    for round in 0..3000_usize {
                        let mut piece = Piece::take().expect("there is memory");
                        piece.bytes_mut()[..16].fill(thread);
                        pieces.push(piece);
                        if pieces.len() > 150 {
                            let piece = pieces.swap_remove(round * 7 % 150);
                            assert_eq!(piece.bytes()[..16], [thread; 16]);
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn what_has_memory_is_taken_first_and_an_empty_slab_goes() {
        let mut slabs = Slabs { all: BTreeMap::new(), open: BTreeSet::new(), warm: 0 };
        let all = |slabs: &mut Slabs| -> Vec<NonNull<u8>> {
            std::iter::from_fn(|| slabs.take()).map(|piece| ManuallyDrop::new(piece).0).collect()
        };
        let first = map(false).expect("there is memory");
        slabs.add(first);
        let pieces = all(&mut slabs);
        assert_eq!(pieces.len(), 64);

        // Cold, and it lies before the warm one.
        assert!(slabs.give_back(pieces[3], true).is_none());
        assert!(slabs.give_back(pieces[9], false).is_none());
        assert_eq!(slabs.warm, 1);
        assert_eq!(all(&mut slabs), [pieces[9], pieces[3]]);
        assert_eq!(slabs.warm, 0);

        let second = map(true).expect("there is memory");
        slabs.add(second);
        let others = all(&mut slabs);
        assert!(slabs.give_back(pieces[0], false).is_none());
        for piece in &others[1..] {
            assert!(slabs.give_back(*piece, false).is_none());
        }
        assert_eq!(slabs.warm, 64);
        assert_eq!(slabs.give_back(others[0], false), Some(second));
        assert_eq!(slabs.warm, 1);
        // The last one is kept for the next that writes.
        assert!(pieces[1..].iter().all(|piece| slabs.give_back(*piece, false).is_none()));
        assert_eq!((slabs.warm, slabs.all.len()), (64, 1));
        unmap(first, SLAB);
        unmap(second, SLAB);
    }

    #[test]
    fn blocks_that_are_freed_here_and_there_do_not_keep_their_memory() {
        let _alone = alone();
        let mut pieces = take(64 * 20);
        for piece in &mut pieces {
            piece.bytes_mut().fill(1);
        }
        assert!(pieces.iter().all(|piece| is_resident(piece.0)));
        // One of each sixteen stays, so that every slab stays.
        let (mut kept, mut freed) = (Vec::new(), Vec::new());
        for (number, piece) in pieces.into_iter().enumerate() {
            if number % 16 == 0 {
                kept.push(piece);
            } else {
                freed.push(piece.0);
            }
        }
        // Other tests may have taken a few meanwhile.
        let resident = freed.iter().filter(|piece| is_resident(**piece)).count();
        assert!(resident < 2 * KEPT, "{resident} of {}", freed.len());
        for piece in &kept {
            assert!(piece.bytes().iter().all(|byte| *byte == 1));
        }
    }

    /// Whether its first page has memory, by pagemap (Documentation/admin-guide/mm/pagemap.rst).
    fn is_resident(piece: NonNull<u8>) -> bool {
        let map = File::open("/proc/self/pagemap").expect("/proc is there");
        let mut entry = [0; 8];
        let page = piece.as_ptr().addr() / rustix::param::page_size();
        map.read_exact_at(&mut entry, page as u64 * 8).expect("it has every address");
        u64::from_ne_bytes(entry) >> 63 == 1
    }
}

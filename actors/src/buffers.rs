//! Memory that goes round with requests and replies and comes back, so that the steady state allocates nothing.
//!
//! One set for each worker thread (or each server without workers). It holds no state of any session: a session that waits
//! for its client holds no buffer at all, which is what keeps ten thousand idle clients cheap.

use std::sync::{Arc, Mutex, PoisonError};

use crate::blocks::{Block, Blocks};
use crate::segments::Segments;

/// What one receive takes at most, in bytes: all that a Unix socket holds by default (208 KiB), so that a client which fills it is
/// emptied in one turn, and is answered in one.
pub(crate) const RECEIVE: usize = 256 * 1024;
/// How much is kept of what requests were received into, in bytes. Where devices wait, several are under way.
const KEPT_RECEIVE: usize = 16 * RECEIVE;
/// How much is kept of the data of writes, in bytes.
const KEPT_PAYLOAD: usize = 4 * 1024 * 1024;
/// How many blocks of large writes are kept: 2 MiB.
const KEPT_BLOCKS: usize = 64;
/// How much is kept of replies, in bytes.
const KEPT_REPLIES: usize = 4 * 1024 * 1024;
/// The largest data of a write or a reply that is kept, in bytes: one that is larger would leave no room for others.
const LARGEST: usize = 1024 * 1024;
/// How many replies are kept, some of which hold no memory to speak of.
const REPLIES: usize = 32;

/// Buffers of one kind, and how much they are together.
#[derive(Default)]
struct Shelf<T> {
    items: Vec<T>,
    bytes: usize,
}

impl<T> Shelf<T> {
    /// Keeps `item` of `bytes` unless there would be more than `most` then.
    fn keep(&mut self, item: T, bytes: usize, most: usize) {
        if self.bytes + bytes <= most {
            self.bytes += bytes;
            self.items.push(item);
        }
    }

    /// The last one that `fits`. `bytes` says how large it is.
    fn take(&mut self, fits: impl Fn(&T) -> bool, bytes: impl Fn(&T) -> usize) -> Option<T> {
        let at = self.items.iter().rposition(fits)?;
        let item = self.items.swap_remove(at);
        self.bytes -= bytes(&item);
        Some(item)
    }
}

/// A set of spare buffers. Cheap to clone; all clones are one set.
#[derive(Clone, Default)]
pub(crate) struct Buffers(Arc<Mutex<Spare>>);

#[derive(Default)]
struct Spare {
    receive: Shelf<Vec<u8>>,
    payload: Shelf<Vec<u8>>,
    blocks: Vec<Block>,
    replies: Shelf<Segments>,
}

impl Buffers {
    fn spare(&self) -> std::sync::MutexGuard<'_, Spare> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`RECEIVE`] bytes of anything.
    pub(crate) fn receive(&self) -> Vec<u8> {
        let spare = self.spare().receive.take(|_| true, Vec::len);
        spare.unwrap_or_else(|| vec![0; RECEIVE])
    }

    /// `length` bytes of anything.
    pub(crate) fn payload(&self, length: usize) -> Vec<u8> {
        let mut spare = self.spare();
        let found = spare.payload.take(|buffer| buffer.len() >= length, Vec::len);
        // Data of just that length comes back as one of those.
        let found = found.or_else(|| if length == RECEIVE { spare.receive.take(|_| true, Vec::len) } else { None });
        drop(spare);
        found.unwrap_or_else(|| vec![0; length])
    }

    /// Memory for the next `count` blocks behind the first `filled` bytes, of anything. `None`: there is none.
    pub(crate) fn provide(&self, blocks: &mut Blocks, filled: usize, count: usize) -> Option<()> {
        let mut spare = self.spare();
        blocks.provide(filled, count, || spare.blocks.pop().or_else(|| Block::of(&[], &[], &[])))
    }

    /// An empty reply.
    pub(crate) fn reply(&self) -> Segments {
        let spare = self.spare().replies.take(|_| true, Segments::capacity);
        spare.unwrap_or_default()
    }

    /// Takes back a buffer from [`Buffers::receive`] or [`Buffers::payload`].
    pub(crate) fn give_back(&self, buffer: Vec<u8>) {
        let mut spare = self.spare();
        let bytes = buffer.len();
        match bytes {
            RECEIVE => spare.receive.keep(buffer, bytes, KEPT_RECEIVE),
            1..=LARGEST => spare.payload.keep(buffer, bytes, KEPT_PAYLOAD),
            _ => {}
        }
    }

    /// Takes back what a device has left of the blocks from [`Buffers::provide`].
    pub(crate) fn give_back_blocks(&self, blocks: Blocks) {
        let mut spare = self.spare();
        for block in blocks.into_blocks() {
            if spare.blocks.len() < KEPT_BLOCKS && !block.bytes().is_empty() {
                spare.blocks.push(block);
            }
        }
    }

    /// Takes back a reply that was sent.
    pub(crate) fn give_back_reply(&self, mut reply: Segments) {
        reply.clear(LARGEST);
        let mut spare = self.spare();
        if spare.replies.items.len() < REPLIES {
            let bytes = reply.capacity();
            spare.replies.keep(reply, bytes, KEPT_REPLIES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(buffers: &Buffers) -> usize {
        let spare = buffers.spare();
        spare.receive.bytes + spare.payload.bytes + spare.replies.bytes
    }

    #[test]
    fn what_was_given_back_is_used_again() {
        let buffers = Buffers::default();
        for length in [4096, RECEIVE - 1, RECEIVE, RECEIVE + 1, LARGEST] {
            let buffer = buffers.payload(length);
            let place = buffer.as_ptr();
            buffers.give_back(buffer);
            let again = buffers.payload(length);
            assert_eq!(again.as_ptr(), place, "{length}");
        }
        let buffer = buffers.receive();
        let place = buffer.as_ptr();
        buffers.give_back(buffer);
        let again = buffers.receive();
        assert_eq!(again.as_ptr(), place);
    }

    #[test]
    fn what_is_kept_has_a_bound_in_bytes_and_comes_back() {
        let buffers = Buffers::default();
        for length in [RECEIVE, 4096, 65_536, 1024 * 1024, 32 * 1024 * 1024] {
            let all: Vec<_> = (0..100).map(|_| buffers.payload(length)).collect();
            assert!(all.iter().all(|buffer| buffer.len() >= length));
            all.into_iter().for_each(|buffer| buffers.give_back(buffer));
        }
        let most = KEPT_RECEIVE + KEPT_PAYLOAD;
        assert!(kept(&buffers) <= most, "{} bytes", kept(&buffers));

        // Taken and given back, as a request does it, nothing is new.
        let before = kept(&buffers);
        let buffer = buffers.receive();
        let address = buffer.as_ptr();
        assert_eq!(kept(&buffers), before - RECEIVE);
        buffers.give_back(buffer);
        let again = buffers.receive();
        assert_eq!(again.as_ptr(), address);
    }

    #[test]
    fn large_replies_are_kept_to_a_bound_as_well() {
        let buffers = Buffers::default();
        let all: Vec<_> = (0..100)
            .map(|_| {
                let mut reply = buffers.reply();
                reply.space(LARGEST);
                reply
            })
            .collect();
        all.into_iter().for_each(|reply| buffers.give_back_reply(reply));
        assert!(kept(&buffers) <= KEPT_REPLIES, "{} bytes", kept(&buffers));
        assert_eq!(buffers.reply().len(), 0);
    }
}

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
/// The largest payload whose memory is kept for the next, in bytes.
const KEPT_PAYLOAD: usize = 1024 * 1024;
/// How much memory of each kind is kept, in pieces.
const KEPT: usize = 32;
/// How many blocks of large writes are kept: 2 MiB.
const KEPT_BLOCKS: usize = 64;
/// The largest reply buffer that is kept, in bytes.
const KEPT_REPLY: usize = 1024 * 1024;

/// A set of spare buffers. Cheap to clone; all clones are one set.
#[derive(Clone, Default)]
pub(crate) struct Buffers(Arc<Mutex<Spare>>);

#[derive(Default)]
struct Spare {
    receive: Vec<Vec<u8>>,
    payload: Vec<Vec<u8>>,
    blocks: Vec<Block>,
    replies: Vec<Segments>,
}

impl Buffers {
    fn spare(&self) -> std::sync::MutexGuard<'_, Spare> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`RECEIVE`] bytes of anything.
    pub(crate) fn receive(&self) -> Vec<u8> {
        let spare = self.spare().receive.pop();
        spare.unwrap_or_else(|| vec![0; RECEIVE])
    }

    /// `length` bytes of anything.
    pub(crate) fn payload(&self, length: usize) -> Vec<u8> {
        if length <= KEPT_PAYLOAD {
            let mut spare = self.spare();
            if let Some(at) = spare.payload.iter().rposition(|buffer| buffer.len() >= length) {
                return spare.payload.swap_remove(at);
            }
        }
        vec![0; length]
    }

    /// Memory for the next `count` blocks behind the first `filled` bytes, of anything. `None`: there is none.
    pub(crate) fn provide(&self, blocks: &mut Blocks, filled: usize, count: usize) -> Option<()> {
        let mut spare = self.spare();
        blocks.provide(filled, count, || spare.blocks.pop().or_else(|| Block::of(&[], &[], &[])))
    }

    /// An empty reply.
    pub(crate) fn reply(&self) -> Segments {
        let spare = self.spare().replies.pop();
        spare.unwrap_or_default()
    }

    /// Takes back a buffer from [`Buffers::receive`] or [`Buffers::payload`].
    pub(crate) fn give_back(&self, buffer: Vec<u8>) {
        let mut spare = self.spare();
        let kept = if buffer.len() == RECEIVE { &mut spare.receive } else { &mut spare.payload };
        if kept.len() < KEPT && buffer.len() <= KEPT_PAYLOAD {
            kept.push(buffer);
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
        reply.clear(KEPT_REPLY);
        let mut spare = self.spare();
        if spare.replies.len() < KEPT {
            spare.replies.push(reply);
        }
    }
}

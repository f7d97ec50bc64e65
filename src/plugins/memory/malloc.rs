//! `allocator=malloc`: all of the disk in one piece of memory, taken at the start, locked into RAM if that is wanted.
//!
//! Each piece of it has a lock, so that clients at different places do not meet.
//! Source: nbdkit common/allocators/malloc.c.

use std::sync::{PoisonError, RwLock};

use nbdcaptive_actors::device::{self, Call, Capabilities, Device, Error, Extents, Flags};

use super::{COPY_AT_ONCE, capabilities};
use crate::layer::ConfigError;

/// Bytes behind one lock.
const PIECE: usize = 256 * 1024;

/// See the module.
pub(super) struct Flat {
    size: u64,
    pieces: Vec<RwLock<&'static mut [u8]>>,
}

impl Flat {
    /// Takes the memory, all of it, and touches it, so that what is missing is missed now. It is never given back: the server
    /// has it to its end. Errors: there is not so much, or it may not be locked.
    pub(super) fn new(size: u64, lock: bool) -> Result<Flat, ConfigError> {
        let mut memory: Vec<u8> = Vec::new();
        let length = usize::try_from(size).ok().filter(|length| memory.try_reserve_exact(*length).is_ok());
        let Some(length) = length else {
            return Err(ConfigError(format!("allocator=malloc: no memory for a disk of {size} bytes")));
        };
        memory.resize(length, 0);
        if lock && length > 0 {
            let guard = region::lock(memory.as_ptr(), length);
            let failed = |error| match error {
                region::Error::SystemCall(error) => ConfigError(format!("allocator=malloc: mlock: {error}")),
                error => ConfigError(format!("allocator=malloc: mlock: {error}")),
            };
            // Locked for as long as there is this process.
            std::mem::forget(guard.map_err(failed)?);
        }
        let pieces = memory.leak().chunks_mut(PIECE).map(RwLock::new).collect();
        Ok(Flat { size, pieces })
    }

    /// The pieces of a range in order, each with the part that is meant.
    fn parts(
        &self,
        offset: u64,
        length: u64,
    ) -> impl Iterator<Item = (&RwLock<&'static mut [u8]>, std::ops::Range<usize>)> {
        let mut at = offset;
        let end = offset + length;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let start = at as usize % PIECE;
                let stop = PIECE.min(start + (end - at).min(PIECE as u64) as usize);
                let piece = &self.pieces[(at / PIECE as u64) as usize];
                at += (stop - start) as u64;
                (piece, start..stop)
            })
        })
    }
}

fn would_block(length: u64, call: &Call) -> bool {
    length > COPY_AT_ONCE as u64 && !call.may_block()
}

// A piece whose holder panicked is still whole: it is bytes.
impl Device for Flat {
    fn size(&self) -> device::Result<u64> {
        Ok(self.size)
    }

    /// The preferred size is a general one, as there is none for this.
    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(capabilities(512, false))
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, mut buffer: &mut [u8], offset: u64, call: &Call) -> device::Result<()> {
        if would_block(buffer.len() as u64, call) {
            return Err(Error::WouldBlock);
        }
        for (piece, range) in self.parts(offset, buffer.len() as u64) {
            let part;
            (part, buffer) = buffer.split_at_mut(range.len());
            part.copy_from_slice(&piece.read().unwrap_or_else(PoisonError::into_inner)[range]);
        }
        Ok(())
    }

    fn write(&self, mut data: &[u8], offset: u64, _flags: Flags, call: &Call) -> device::Result<()> {
        if would_block(data.len() as u64, call) {
            return Err(Error::WouldBlock);
        }
        for (piece, range) in self.parts(offset, data.len() as u64) {
            let part;
            (part, data) = data.split_at(range.len());
            piece.write().unwrap_or_else(PoisonError::into_inner)[range].copy_from_slice(part);
        }
        Ok(())
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        self.zero(length, offset, flags, call)
    }

    fn zero(&self, length: u64, offset: u64, _flags: Flags, call: &Call) -> device::Result<()> {
        if would_block(length, call) {
            return Err(Error::WouldBlock);
        }
        for (piece, range) in self.parts(offset, length) {
            piece.write().unwrap_or_else(PoisonError::into_inner)[range].fill(0);
        }
        Ok(())
    }

    /// All of it takes memory, whatever is in it.
    fn extents(&self, extents: &mut Extents, _call: &Call) -> device::Result<()> {
        extents.add(0, self.size, 0);
        Ok(())
    }
}

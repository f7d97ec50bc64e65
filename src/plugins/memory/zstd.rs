//! `allocator=zstd`: pages come and go as with `sparse`, and are compressed.
//!
//! A page is worked on under its slot's lock: unpacked, changed, packed again. Only small reads are tried at once; to pack a
//! page takes some hundred microseconds.
//! Source: nbdkit common/allocators/zstd.c; RFC 8878.

use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, TryLockError};

use nbdcaptive_actors::device::{
    self, Call, Capabilities, Device, Error, ErrorCode, Extents, Flags, HOLE, Segments, ZERO,
};
use zstd::bulk::{Compressor, Decompressor};

use super::{Found, PAGE, Tree, ZEROES, capabilities, remaining, within};

/// The longest read that is tried at once, in bytes.
const READ_AT_ONCE: usize = 64 * 1024;

/// How many tools are kept for the next who need one.
const TOOLS: usize = 16;

/// A place for a packed page.
#[derive(Default)]
struct Slot(RwLock<Option<Box<[u8]>>>);

impl Slot {
    // A slot whose holder panicked is still whole: it is a pointer, and a page is bytes.
    fn shared(&self, call: &Call) -> device::Result<RwLockReadGuard<'_, Option<Box<[u8]>>>> {
        if call.may_block() {
            return Ok(self.0.read().unwrap_or_else(PoisonError::into_inner));
        }
        match self.0.try_read() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(guard)) => Ok(guard.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Error::WouldBlock),
        }
    }

    /// Changes the page by `change`, to which an absent one is a page of zeroes. `covers`: all of it is written.
    fn change(&self, tool: &mut Tool, covers: bool, change: impl FnOnce(&mut [u8])) -> device::Result<()> {
        let mut packed = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match &*packed {
            Some(packed) if !covers => tool.unpack(packed)?,
            _ => tool.page.fill(0),
        }
        change(&mut tool.page);
        *packed = Some(tool.pack()?);
        Ok(())
    }

    /// Gives the page back if it then holds nothing but zeroes.
    fn zero(&self, tool: &mut Tool, range: std::ops::Range<usize>) -> device::Result<()> {
        let mut packed = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Some(old) = &*packed else { return Ok(()) };
        if range.len() < PAGE {
            tool.unpack(old)?;
            tool.page[range].fill(0);
            if tool.page != ZEROES {
                *packed = Some(tool.pack()?);
                return Ok(());
            }
        }
        *packed = None;
        Ok(())
    }
}

/// What packs and unpacks, and has a page in hand.
struct Tool {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
    page: Vec<u8>,
    packed: Vec<u8>,
}

fn failed(error: std::io::Error) -> Error {
    Error::failed(ErrorCode::Io, format!("memory: zstd: {error}"))
}

impl Tool {
    fn new() -> device::Result<Tool> {
        Ok(Tool {
            // 0 is the library's own choice of level.
            compressor: Compressor::new(0).map_err(failed)?,
            decompressor: Decompressor::new().map_err(failed)?,
            page: vec![0; PAGE],
            packed: Vec::with_capacity(zstd::zstd_safe::compress_bound(PAGE)),
        })
    }

    fn unpack(&mut self, packed: &[u8]) -> device::Result<()> {
        let length = self.decompressor.decompress_to_buffer(packed, self.page.as_mut_slice()).map_err(failed)?;
        if length != PAGE {
            return Err(Error::failed(ErrorCode::Io, "memory: zstd: a page has the wrong length"));
        }
        Ok(())
    }

    fn pack(&mut self) -> device::Result<Box<[u8]>> {
        self.packed.clear();
        self.compressor.compress_to_buffer(&self.page, &mut self.packed).map_err(failed)?;
        let mut packed = Vec::new();
        packed
            .try_reserve_exact(self.packed.len())
            .map_err(|_| Error::failed(ErrorCode::NoMemory, "memory: no memory left for what is being written"))?;
        packed.extend_from_slice(&self.packed);
        Ok(packed.into_boxed_slice())
    }
}

/// See the module.
pub(super) struct Compressed {
    size: u64,
    tree: Tree<Slot>,
    tools: Mutex<Vec<Tool>>,
}

impl Compressed {
    pub(super) fn new(size: u64) -> Compressed {
        Compressed { size, tree: Tree::new(size), tools: Mutex::default() }
    }

    /// Does something with a tool of one's own.
    fn with<T>(&self, work: impl FnOnce(&mut Tool) -> device::Result<T>) -> device::Result<T> {
        let tools = || self.tools.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = tools().pop();
        let mut tool = match kept {
            Some(tool) => tool,
            None => Tool::new()?,
        };
        let result = work(&mut tool);
        let mut tools = tools();
        if tools.len() < TOOLS {
            tools.push(tool);
        }
        result
    }

    /// Gives the pages of a range in order, each the part that is meant, or for how long all is absent.
    fn look(
        &self,
        length: u64,
        mut offset: u64,
        call: &Call,
        mut give: impl FnMut(Option<&[u8]>, u64) -> bool,
    ) -> device::Result<()> {
        self.with(|tool| {
            let end = offset + length;
            while offset < end {
                let (page, length) = match self.tree.find(offset / PAGE as u64) {
                    Found::Absent(pages) => (None, remaining(offset, pages).min(end - offset)),
                    Found::Slot(slot) => {
                        let range = within(offset, end - offset);
                        let length = range.len() as u64;
                        match &*slot.shared(call)? {
                            None => (None, length),
                            Some(packed) => {
                                tool.unpack(packed)?;
                                (Some(&tool.page[range]), length)
                            }
                        }
                    }
                };
                if !give(page, length) {
                    break;
                }
                offset += length;
            }
            Ok(())
        })
    }
}

impl Device for Compressed {
    fn size(&self) -> device::Result<u64> {
        Ok(self.size)
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(capabilities(PAGE as u32, false))
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, mut buffer: &mut [u8], offset: u64, call: &Call) -> device::Result<()> {
        if buffer.len() > READ_AT_ONCE && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        self.look(buffer.len() as u64, offset, call, |page, length| {
            let (part, rest) = std::mem::take(&mut buffer).split_at_mut(length as usize);
            match page {
                Some(page) => part.copy_from_slice(page),
                None => part.fill(0),
            }
            buffer = rest;
            true
        })
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> device::Result<()> {
        if length > READ_AT_ONCE && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        self.look(length as u64, offset, call, |page, length| {
            match page {
                Some(page) => reply.space(page.len()).copy_from_slice(page),
                None => reply.zeroes(length as usize),
            }
            true
        })
    }

    fn write(&self, mut data: &[u8], mut offset: u64, _flags: Flags, call: &Call) -> device::Result<()> {
        if !call.may_block() {
            return Err(Error::WouldBlock);
        }
        self.with(|tool| {
            while !data.is_empty() {
                let range = within(offset, data.len() as u64);
                let (part, rest) = data.split_at(range.len());
                let slot = self.tree.slot(offset / PAGE as u64);
                slot.change(tool, part.len() == PAGE, |page| page[range].copy_from_slice(part))?;
                data = rest;
                offset += part.len() as u64;
            }
            Ok(())
        })
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        self.zero(length, offset, flags, call)
    }

    fn zero(&self, length: u64, mut offset: u64, _flags: Flags, call: &Call) -> device::Result<()> {
        if !call.may_block() {
            return Err(Error::WouldBlock);
        }
        let end = offset + length;
        self.with(|tool| {
            while offset < end {
                offset = match self.tree.find(offset / PAGE as u64) {
                    Found::Absent(pages) => offset.saturating_add(remaining(offset, pages)),
                    Found::Slot(slot) => {
                        let range = within(offset, end - offset);
                        slot.zero(tool, range.clone())?;
                        offset + range.len() as u64
                    }
                }
            }
            Ok(())
        })
    }

    /// As with `sparse`: a page that is there but holds zeroes is a zero, and no hole.
    fn extents(&self, extents: &mut Extents, call: &Call) -> device::Result<()> {
        if !call.may_block() {
            return Err(Error::WouldBlock);
        }
        let mut offset = extents.offset();
        self.look(extents.length(), offset, call, |page, length| {
            let flags = match page {
                None => HOLE | ZERO,
                Some(page) if *page == ZEROES[..page.len()] => ZERO,
                Some(_) => 0,
            };
            let more = extents.add(offset, length, flags);
            offset += length;
            more
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_compressed_takes_less() {
        let disk = Compressed::new(1 << 40);
        disk.write(&[7; 4 * PAGE], 1 << 39, Flags::default(), &Call::BLOCKING).unwrap();
        let Found::Slot(slot) = disk.tree.find((1 << 39) / PAGE as u64) else { panic!("it was written") };
        let packed = slot.shared(&Call::BLOCKING).unwrap().as_ref().map(|packed| packed.len());
        assert!(packed.is_some_and(|length| length < 100), "{packed:?}");
        disk.zero(PAGE as u64 - 1, 1 << 39, Flags::default(), &Call::BLOCKING).unwrap();
        assert!(slot.shared(&Call::BLOCKING).unwrap().is_some());
        disk.zero(1, (1 << 39) + PAGE as u64 - 1, Flags::default(), &Call::BLOCKING).unwrap();
        assert!(slot.shared(&Call::BLOCKING).unwrap().is_none());
    }
}

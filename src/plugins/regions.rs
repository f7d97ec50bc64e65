//! A disk that is put together of parts: other devices, bytes that do not change, and zeroes between them.
//! Source: nbdkit common/regions.

use std::ops::Range;

use nbdcaptive_actors::device::{self, Call, Device, Error, ErrorCode, Extents, Flags, HOLE, Segments, ZERO};

/// What a part holds.
pub enum Content {
    /// A device, from its start.
    Device(Box<dyn Device>),
    /// These bytes, as many as the part is long. They can be written, if nothing changes.
    Bytes(Vec<u8>),
    /// Nothing, and only that can be written.
    Zeroes,
}

/// A part.
pub struct Region {
    /// Where it is on the disk, in bytes.
    pub range: Range<u64>,
    /// What it holds.
    pub content: Content,
}

/// Parts one behind the other, without gaps, none of them empty.
#[derive(Default)]
pub struct Regions {
    list: Vec<Region>,
}

impl Regions {
    /// Bytes up to the end of the last part.
    pub fn size(&self) -> u64 {
        self.list.last().map_or(0, |region| region.range.end)
    }

    /// Appends a part; an empty one is passed over. `None`: the disk would be larger than the protocol allows.
    #[must_use]
    pub fn push(&mut self, length: u64, content: Content) -> Option<()> {
        let start = self.size();
        let end = start.checked_add(length).filter(|end| i64::try_from(*end).is_ok())?;
        if length > 0 {
            self.list.push(Region { range: start..end, content });
        }
        Some(())
    }

    /// Appends zeroes up to a multiple of `alignment`. `None` as for [`Regions::push`].
    #[must_use]
    pub fn align(&mut self, alignment: u64) -> Option<()> {
        let size = self.size();
        self.push(size.checked_next_multiple_of(alignment)? - size, Content::Zeroes)
    }

    /// All parts.
    pub fn list(&self) -> &[Region] {
        &self.list
    }

    /// All parts, to be filled in.
    pub fn list_mut(&mut self) -> &mut [Region] {
        &mut self.list
    }

    /// The devices among them.
    pub fn devices(&self) -> impl Iterator<Item = &dyn Device> {
        self.list.iter().filter_map(|region| match &region.content {
            Content::Device(device) => Some(&**device),
            _ => None,
        })
    }

    /// What a range of the disk touches, in order: the content, the offset in it, and how many bytes.
    fn parts(&self, offset: u64, length: u64) -> impl Iterator<Item = (&Content, u64, u64)> {
        let first = self.list.partition_point(|region| region.range.end <= offset);
        let end = offset.saturating_add(length);
        self.list[first..].iter().take_while(move |region| region.range.start < end).map(move |region| {
            let start = offset.max(region.range.start);
            (&region.content, start - region.range.start, end.min(region.range.end) - start)
        })
    }

    /// As [`Device::read`].
    pub fn read(&self, mut buffer: &mut [u8], offset: u64, call: &Call) -> device::Result<()> {
        for (content, at, length) in self.parts(offset, buffer.len() as u64) {
            let part;
            (part, buffer) = buffer.split_at_mut(length as usize);
            match content {
                Content::Device(device) => device.read(part, at, call)?,
                Content::Bytes(bytes) => part.copy_from_slice(&bytes[at as usize..][..part.len()]),
                Content::Zeroes => part.fill(0),
            }
        }
        Ok(())
    }

    /// As [`Device::read_segments`].
    pub fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> device::Result<()> {
        for (content, at, length) in self.parts(offset, length as u64) {
            let length = length as usize;
            match content {
                Content::Device(device) => device.read_segments(reply, length, at, call)?,
                Content::Bytes(bytes) => reply.space(length).copy_from_slice(&bytes[at as usize..][..length]),
                Content::Zeroes => reply.zeroes(length),
            }
        }
        Ok(())
    }

    /// As [`Device::write`]. In a call that must not block a part may be written before another would wait; writing it once
    /// more does no harm. Errors: what cannot be changed would be, with `fixed` in the words for bytes.
    pub fn write(
        &self,
        mut data: &[u8],
        offset: u64,
        flags: Flags,
        fixed: &'static str,
        call: &Call,
    ) -> device::Result<()> {
        for (content, at, length) in self.parts(offset, data.len() as u64) {
            let part;
            (part, data) = data.split_at(length as usize);
            match content {
                Content::Device(device) => device.write(part, at, flags, call)?,
                Content::Bytes(bytes) if bytes[at as usize..][..part.len()] == *part => {}
                Content::Bytes(_) => return Err(Error::failed(ErrorCode::Io, fixed)),
                Content::Zeroes if part.iter().all(|byte| *byte == 0) => {}
                Content::Zeroes => return Err(Error::failed(ErrorCode::Io, "write non-zeroes to padding region")),
            }
        }
        Ok(())
    }

    /// As [`Device::cache`].
    pub fn cache(&self, length: u64, offset: u64, call: &Call) -> device::Result<()> {
        for (content, at, length) in self.parts(offset, length) {
            if let Content::Device(device) = content {
                device.cache(length, at, call)?;
            }
        }
        Ok(())
    }

    /// As [`Device::extents`].
    pub fn extents(&self, extents: &mut Extents, call: &Call) -> device::Result<()> {
        let one = extents.one();
        let mut offset = extents.offset();
        for (content, at, length) in self.parts(offset, extents.length()) {
            let mut add = |length, flags| {
                let more = extents.add(offset, length, flags);
                offset += length;
                more
            };
            let more = match content {
                Content::Bytes(_) => add(length, 0),
                Content::Zeroes => add(length, HOLE | ZERO),
                Content::Device(device) if device.capabilities()?.extents => {
                    let mut inside = Extents::new(at, length, one);
                    device.extents(&mut inside, call)?;
                    let described: u64 = inside.list().iter().map(|extent| extent.length).sum();
                    inside.list().iter().all(|extent| add(extent.length, extent.flags)) && described == length
                }
                Content::Device(_) => add(length, 0),
            };
            // nbdkit ends it where the part does, although more of the same may follow.
            if !more || one {
                break;
            }
        }
        Ok(())
    }
}

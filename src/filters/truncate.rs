//! `truncate`: another size for the disk. What is behind its real end reads as zeroes, and only zeroes may be written there.
//! Source: nbdkit filters/truncate/truncate.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{
    Blocks, Call, Capabilities, Device, Error, ErrorCode, Exports, Extents, Flags, HOLE, Result, Segments, ThreadModel,
    ZERO,
};
use nbdcaptive_actors::filter::{self, Filtered, Next};

use super::kit::{copy, each, is_zero, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "truncate",
    summary: "give the disk another size

        Made longer, the disk reads as zeroes behind its end, and nothing but zeroes may be written there. Made
        shorter, the rest cannot be seen. First the size is set, then it is rounded.

        # Examples

            nbdcaptive --filter=truncate file disk.img round-up=1M \\
                --run 'nbdinfo --size \"$uri\"'
        ",
    parameters: &[
        optional("truncate", "<SIZE>", "the new size"),
        optional("round-up", "<N>", "round up to the next multiple of N, a power of 2"),
        optional("round-down", "<N>", "round down to a multiple of N, a power of 2"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter. What is asked for is done in this order.
#[derive(Debug, Default)]
pub struct Truncate {
    size: Option<u64>,
    round_up: Option<u64>,
    round_down: Option<u64>,
}

fn power_of_2(key: &str, text: &str) -> std::result::Result<u64, ConfigError> {
    let number = values::size(text).map_err(ConfigError)?;
    let why = match number {
        0 => format!("if set, the {key} parameter must be > 0"),
        number if number > u64::from(u32::MAX) => format!("the {key} parameter is too large"),
        number if !number.is_power_of_two() => format!("the {key} parameter must be a power of 2"),
        number => return Ok(number),
    };
    Err(ConfigError(why))
}

impl Filter for Truncate {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        match key {
            "truncate" => self.size = Some(values::size(text).map_err(ConfigError)?),
            "round-up" => self.round_up = Some(power_of_2(key, text)?),
            "round-down" => self.round_down = Some(power_of_2(key, text)?),
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(each(next, move |next, client| {
            let (next, size) = Next::open(next, client)?.look(|next| self.apply(next.bytes()))?;
            Ok(Filtered(Disk { next, size }))
        }))
    }
}

impl Truncate {
    /// What becomes of a size.
    fn apply(&self, size: u64) -> Result<u64> {
        let mut size = self.size.unwrap_or(size);
        if let Some(unit) = self.round_up {
            let rounded = size.checked_next_multiple_of(unit).filter(|&size| size <= i64::MAX as u64);
            size = rounded.ok_or_else(|| {
                Error::failed(ErrorCode::Overflow, format!("cannot round size {size} up to next boundary of {unit}"))
            })?;
        }
        Ok(size - self.round_down.map_or(0, |unit| size % unit))
    }
}

struct Disk {
    next: Next,
    size: u64,
}

impl Disk {
    /// How many of `length` bytes at `offset` the next device has.
    fn real(&self, length: u64, offset: u64) -> u64 {
        self.next.bytes().saturating_sub(offset).min(length)
    }
}

impl filter::Filter for Disk {
    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn size(&self) -> Result<u64> {
        Ok(self.size)
    }

    fn capabilities(&self) -> Result<Capabilities> {
        // What is behind the end is known to be a hole, and is zeroed at once.
        Ok(Capabilities { extents: true, fast_zero: true, ..self.next.capabilities()? })
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        let (real, behind) = buffer.split_at_mut(self.real(buffer.len() as u64, offset) as usize);
        behind.fill(0);
        if real.is_empty() { Ok(()) } else { self.next.read(real, offset, call) }
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        let real = self.real(length as u64, offset) as usize;
        if real > 0 {
            self.next.read_segments(reply, real, offset, call)?;
        }
        if real < length {
            reply.zeroes(length - real);
        }
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let (real, behind) = data.split_at(self.real(data.len() as u64, offset) as usize);
        if !is_zero(behind) {
            return Err(Error::failed(ErrorCode::NoSpace, "truncate: write beyond end of underlying device"));
        }
        if real.is_empty() { Ok(()) } else { self.next.write(real, offset, flags, call) }
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let length = data.len() as u64;
        if self.real(length, offset) == length {
            return self.next.write_blocks(data, offset, flags, call);
        }
        self.write(&data.to_vec(), offset, flags, call)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        match self.real(length, offset) {
            0 => Ok(()),
            real => self.next.trim(real, offset, flags, call),
        }
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        match self.real(length, offset) {
            0 => Ok(()),
            _ if flags.fast && !self.next.offered().fast_zero => {
                Err(Error::not_supported("the underlying device has no fast zeroes"))
            }
            real => self.next.zero(real, offset, flags, call),
        }
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        match self.real(length, offset) {
            0 => Ok(()),
            real => self.next.cache(real, offset, call),
        }
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        let (offset, end) = (extents.offset(), self.next.bytes());
        let real = self.real(extents.length(), offset);
        if real > 0 && self.next.offered().extents {
            let mut there = Extents::new(offset, real, extents.one());
            self.next.extents(&mut there, call)?;
            copy(&there, extents, offset);
        } else if real > 0 {
            extents.add(offset, real, 0);
        }
        // Passed over where something before it was not described.
        extents.add(end, self.size.saturating_sub(end), HOLE | ZERO);
        Ok(())
    }

    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        let offset = extents.offset();
        match self.real(extents.length(), offset) {
            0 => drop(extents.add(offset, extents.length(), 0)),
            real => {
                let mut there = Extents::new(offset, real, extents.one());
                self.next.meta_context(context, &mut there, call)?;
                copy(&there, extents, offset);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{device, map, read, refused};

    #[test]
    fn sizes_are_set_then_rounded_up_then_down() {
        let size = |parameters: &[(&str, &str)]| device("1000", "truncate", parameters).size().unwrap();
        assert_eq!(size(&[]), 1000);
        assert_eq!(size(&[("truncate", "5")]), 5);
        assert_eq!(size(&[("round-up", "512")]), 1024);
        assert_eq!(size(&[("round-down", "512")]), 512);
        assert_eq!(size(&[("truncate", "513"), ("round-up", "4"), ("round-down", "256")]), 512);
        let large = Truncate { size: Some(i64::MAX as u64), round_up: Some(1 << 20), round_down: None };
        assert!(large.apply(0).is_err());
    }

    #[test]
    fn behind_the_end_there_is_a_hole_in_which_only_zeroes_can_be_written() {
        let disk = device("1000", "truncate", &[("truncate", "3000")]);
        let write = |data: &[u8], offset| {
            disk.write(data, offset, Flags::default(), &Call::BLOCKING).map_err(|error| error.code())
        };
        assert_eq!(write(&[7; 10], 990), Ok(()));
        assert_eq!(write(&[7; 10], 991), Err(ErrorCode::NoSpace));
        assert_eq!(write(&[7; 10], 2000), Err(ErrorCode::NoSpace));
        assert_eq!(write(&[0; 10], 2000), Ok(()));
        assert_eq!(read(&*disk, 989, 12), [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
        assert_eq!(read(&*disk, 2000, 1000), [0; 1000]);
        assert_eq!(map(&*disk, 0, 3000), [(1000, 0), (2000, 3)]);
        assert_eq!(map(&*disk, 2000, 100), [(100, 3)]);
        disk.zero(2000, 500, Flags { fast: true, ..Flags::default() }, &Call::BLOCKING).unwrap();
        disk.trim(100, 2000, Flags::default(), &Call::BLOCKING).unwrap();
        disk.cache(3000, 0, &Call::BLOCKING).unwrap();
        assert_eq!(read(&*disk, 0, 3000), [0; 3000]);
    }

    #[test]
    fn what_is_no_power_of_2_is_refused() {
        let why = |value| refused("truncate", &[("round-up", value)]);
        assert_eq!(why("0"), "if set, the round-up parameter must be > 0");
        assert_eq!(why("8G"), "the round-up parameter is too large");
        assert_eq!(why("3"), "the round-up parameter must be a power of 2");
    }
}

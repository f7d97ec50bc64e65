//! `offset`: shows a part of the disk, `range` bytes from `offset` on. Source: nbdkit filters/offset/offset.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{
    Blocks, Call, Device, Error, ErrorCode, Exports, Extents, Flags, Result, Segments, ThreadModel,
};
use nbdcaptive_actors::filter::{self, Filtered, Next};

use super::kit::{each, optional, shifted, unknown};
use super::next::look_at_start;
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "offset",
    summary: "show a part of the disk

        The part begins at `offset`, and is `range` bytes long. It has to be within the disk.

        # Examples

            nbdcaptive --filter=offset file disk.img offset=64k range=128k \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        optional("offset", "<OFFSET>", "where the part starts, 0 unless given"),
        optional("range", "<LENGTH>", "how long it is, up to the end of the disk unless given"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Clone, Copy, Debug, Default)]
pub struct Offset {
    offset: u64,
    range: Option<u64>,
}

impl Filter for Offset {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let size = || values::size(value.text(key)?).map_err(ConfigError);
        match key {
            "offset" => self.offset = size()?,
            "range" => self.range = Some(size()?),
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let wanted = *self;
        look_at_start(&next, lifetime, move |next, _| wanted.length(next.bytes()).map(drop));
        Ok(each(next, move |next, client| {
            let (next, length) = Next::open(next, client)?.look(|next| wanted.length(next.bytes()))?;
            Ok(Filtered(Window { next, start: wanted.offset, length }))
        }))
    }
}

impl Offset {
    /// How long the part of a disk of `size` bytes is.
    fn length(&self, size: u64) -> Result<u64> {
        let offset = self.offset;
        let why = match self.range {
            Some(range) if range > size || offset > size - range => format!("offset+range ({offset}+{range})"),
            Some(range) => return Ok(range),
            None if offset > size => format!("offset ({offset})"),
            None => return Ok(size - offset),
        };
        let why = format!("{why} is larger than the real size ({size}) of the underlying file or device");
        Err(Error::failed(ErrorCode::Invalid, why))
    }
}

/// A part of a device, in bytes. It is inside the device.
pub(super) struct Window {
    pub next: Next,
    pub start: u64,
    pub length: u64,
}

impl filter::Filter for Window {
    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn size(&self) -> Result<u64> {
        Ok(self.length)
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.next.read(buffer, offset + self.start, call)
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        self.next.read_segments(reply, length, offset + self.start, call)
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next.write(data, offset + self.start, flags, call)
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next.write_blocks(data, offset + self.start, flags, call)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next.trim(length, offset + self.start, flags, call)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next.zero(length, offset + self.start, flags, call)
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        self.next.cache(length, offset + self.start, call)
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        shifted(extents, self.start, |there| self.next.extents(there, call))
    }

    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        shifted(extents, self.start, |there| self.next.meta_context(context, there, call))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{device, map, memory, over, read};
    use nbdcaptive_actors::device::Client;

    #[test]
    fn every_request_is_shifted() {
        let exports = memory("1M");
        let whole = exports.open(&Client::default()).unwrap();
        let window = over(exports, "offset", &[("offset", "64k"), ("range", "128k")]).unwrap();
        let window = window.open(&Client::default()).unwrap();
        assert_eq!(window.size().unwrap(), 128 << 10);
        window.write(b"data", 10, Flags::default(), &Call::BLOCKING).unwrap();
        assert_eq!(read(&*whole, (64 << 10) + 10, 4), b"data");
        assert_eq!(read(&*window, 8, 8), b"\0\0data\0\0");
        assert_eq!(map(&*window, 0, 128 << 10), [(32 << 10, 0), (96 << 10, 3)]);
        whole.write(b"after", 192 << 10, Flags::default(), &Call::BLOCKING).unwrap();
        assert_eq!(map(&*window, 0, 128 << 10).iter().map(|(length, _)| length).sum::<u64>(), 128 << 10);
        window.zero(64 << 10, 0, Flags::default(), &Call::BLOCKING).unwrap();
        assert_eq!(read(&*whole, (64 << 10) + 10, 4), [0; 4]);
        let (mut whole_map, mut window_map) = (Extents::new(0, 1 << 20, true), Extents::new(0, 1, true));
        whole.extents(&mut whole_map, &Call::BLOCKING).unwrap();
        window.extents(&mut window_map, &Call::BLOCKING).unwrap();
        assert_eq!(window_map.list().len(), 1);
    }

    #[test]
    fn the_rest_of_the_disk_is_shown_where_no_range_is_given() {
        assert_eq!(device("1M", "offset", &[("offset", "1000k")]).size().unwrap(), 24 << 10);
        assert_eq!(device("1M", "offset", &[("offset", "1M")]).size().unwrap(), 0);
        assert_eq!(device("1M", "offset", &[]).size().unwrap(), 1 << 20);
    }

    #[test]
    fn a_part_that_is_not_on_the_disk_is_refused() {
        for (parameters, what) in [
            (&[("offset", "2M")][..], "offset (2097152)"),
            (&[("offset", "1M"), ("range", "1")], "offset+range (1048576+1)"),
            (&[("range", "9223372036854775807")], "offset+range (0+9223372036854775807)"),
        ] {
            let exports = over(memory("1M"), "offset", parameters).unwrap();
            let Err(error) = exports.open(&Client::default()) else { panic!("{parameters:?} is opened") };
            let end = "is larger than the real size (1048576) of the underlying file or device";
            assert_eq!(error.to_string(), format!("{what} {end}"));
        }
    }
}

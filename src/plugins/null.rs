//! `null`: reads give zeroes, writes go nowhere. For measuring and testing everything else.
//! Source: nbdkit plugins/null/null.c, plugins/null/nbdkit-null-plugin.pod.

use std::sync::Arc;

use nbdcaptive_actors::device::{
    self, Call, Capabilities, Device, Exports, Extents, Flags, HOLE, Same, Segments, Support, ThreadModel, ZERO,
};

use crate::layer::{About, ConfigError, Parameter, Plugin, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "null",
    summary: "a disk that reads as zeroes and drops what is written

        Writes, trims and zeroes do nothing and are always fine. For measuring everything but the disk.

        # Examples

            nbdcaptive null 1T --run 'nbdinfo \"$uri\"'
            nbdcaptive null 1G --run 'nbdcopy \"$uri\" null:'
        ",
    parameters: &[Parameter {
        key: "size",
        value: "<SIZE>",
        help: "size of the disk, 0 unless given",
        required: false,
    }],
    magic_key: Some("size"),
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The plugin.
#[derive(Debug, Default)]
pub struct Null {
    size: u64,
}

impl Plugin for Null {
    fn callbacks(&self) -> &'static str {
        "config config_help open get_size can_fast_zero can_fua can_multi_conn can_cache pread pwrite \
         flush trim zero extents"
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "size" => self.size = values::size(value.text(key)?).map_err(ConfigError)?,
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(Same::new(Nothing { size: self.size })))
    }
}

struct Nothing {
    size: u64,
}

impl Device for Nothing {
    fn size(&self) -> device::Result<u64> {
        Ok(self.size)
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities {
            write: true,
            flush: true,
            trim: true,
            zero: Support::Native,
            fast_zero: true,
            fua: Support::Native,
            multi_conn: true,
            cache: Support::Native,
            extents: true,
            rotational: false,
            takes_blocks: false,
            block_size: None,
        })
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, buffer: &mut [u8], _offset: u64, _call: &Call) -> device::Result<()> {
        buffer.fill(0);
        Ok(())
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, _offset: u64, _call: &Call) -> device::Result<()> {
        reply.zeroes(length);
        Ok(())
    }

    fn write(&self, _data: &[u8], _offset: u64, _flags: Flags, _call: &Call) -> device::Result<()> {
        Ok(())
    }

    fn trim(&self, _length: u64, _offset: u64, _flags: Flags, _call: &Call) -> device::Result<()> {
        Ok(())
    }

    fn zero(&self, _length: u64, _offset: u64, _flags: Flags, _call: &Call) -> device::Result<()> {
        Ok(())
    }

    fn extents(&self, extents: &mut Extents, _call: &Call) -> device::Result<()> {
        extents.add(0, self.size, HOLE | ZERO);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::testing::ready;
    use nbdcaptive_actors::device::Client;

    #[test]
    fn has_no_bytes_unless_a_size_is_given() {
        let exports = ready("null", &[]).expect("no parameter is required");
        assert_eq!(exports.open(&Client::default()).unwrap().size().unwrap(), 0);
    }

    #[test]
    fn forgets_what_is_written() {
        let exports = ready("null", &[("size", "1M".as_ref())]).unwrap();
        let device = exports.open(&Client::default()).unwrap();
        assert_eq!(device.size().unwrap(), 1 << 20);
        device.write(b"data", 10, Flags::default(), &Call::AT_ONCE).unwrap();
        let mut buffer = *b"full";
        device.read(&mut buffer, 10, &Call::AT_ONCE).unwrap();
        assert_eq!(buffer, [0; 4]);
        let mut extents = Extents::new(512, 1024, false);
        device.extents(&mut extents, &Call::AT_ONCE).unwrap();
        assert_eq!(extents.list().iter().map(|e| (e.length, e.flags)).collect::<Vec<_>>(), [(1024, HOLE | ZERO)]);
    }
}

//! `full`: reads give zeroes, and there is no space left for any write.
//! Source: nbdkit plugins/full/full.c, plugins/full/nbdkit-full-plugin.pod.

use std::sync::Arc;

use nbdcaptive_actors::device::{
    self, Call, Capabilities, Device, Error, ErrorCode, Exports, Extents, Flags, HOLE, Same, Segments, Support,
    ThreadModel, ZERO,
};

use crate::layer::{About, ConfigError, Parameter, Plugin, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "full",
    summary: "a disk that reads as zeroes and has no space left for writes

        A write, a trim or zeroes get the error ENOSPC, so it shows how a client takes a disk that has become full.

        # Examples

            nbdcaptive full 1G --run 'nbdsh -u \"$uri\" -c \"h.pread(512, 0)\"'

        To see one become full in the midst of it, let the rest of a disk be it: nbdcaptive-error-filter(1) with
        `error-pwrite=ENOSPC` begins when a file appears.
        ",
    parameters: &[Parameter { key: "size", value: "<SIZE>", help: "size of the disk", required: true }],
    magic_key: Some("size"),
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The plugin.
#[derive(Debug, Default)]
pub struct Full {
    size: Option<u64>,
}

impl Plugin for Full {
    fn callbacks(&self) -> &'static str {
        "config config_complete config_help open get_size can_multi_conn can_cache pread pwrite trim \
         extents"
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "size" => self.size = Some(values::size(value.text(key)?).map_err(ConfigError)?),
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        if self.size.is_none() {
            return Err(ConfigError("size parameter is required".to_owned()));
        }
        Ok(())
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(Same::new(Disk { size: self.size.unwrap_or(0) })))
    }
}

struct Disk {
    size: u64,
}

fn no_space() -> Error {
    Error::failed(ErrorCode::NoSpace, "full: no space left on device")
}

impl Device for Disk {
    fn size(&self) -> device::Result<u64> {
        Ok(self.size)
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities {
            write: true,
            trim: true,
            // Which then meets the writes' error.
            zero: Support::Emulate,
            fast_zero: true,
            multi_conn: true,
            cache: Support::Native,
            extents: true,
            ..Capabilities::default()
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
        Err(no_space())
    }

    fn trim(&self, _length: u64, _offset: u64, _flags: Flags, _call: &Call) -> device::Result<()> {
        Err(no_space())
    }

    fn extents(&self, extents: &mut Extents, _call: &Call) -> device::Result<()> {
        extents.add(0, self.size, HOLE | ZERO);
        Ok(())
    }
}

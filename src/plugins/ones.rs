//! `ones`: reads give one byte again and again, 0xff unless told otherwise; writes go nowhere.
//! Source: nbdkit plugins/ones/ones.c, plugins/ones/nbdkit-ones-plugin.pod.

use std::sync::Arc;

use nbdcaptive_actors::device::{self, Call, Capabilities, Device, Error, Exports, Flags, Same, Support, ThreadModel};

use crate::layer::{About, ConfigError, Parameter, Plugin, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "ones",
    summary: "a disk that reads as one byte repeated and drops what is written

        As nbdcaptive-null-plugin(1), with another byte than zero.

        # Examples

            nbdcaptive ones 1M byte=0x55 --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        Parameter { key: "size", value: "<SIZE>", help: "size of the disk, 0 unless given", required: false },
        Parameter { key: "byte", value: "<BYTE>", help: "the byte, 0xff unless given", required: false },
    ],
    magic_key: Some("size"),
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The most that a call that must not wait fills, in bytes; under a millisecond.
const AT_ONCE: usize = 4 << 20;

/// The plugin.
#[derive(Debug)]
pub struct Ones {
    size: u64,
    byte: u8,
}

impl Default for Ones {
    fn default() -> Ones {
        Ones { size: 0, byte: 0xff }
    }
}

impl Plugin for Ones {
    fn callbacks(&self) -> &'static str {
        "config config_help open get_size can_fast_zero can_fua can_multi_conn can_cache pread pwrite \
         flush trim zero extents"
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "size" => self.size = values::size(value.text(key)?).map_err(ConfigError)?,
            "byte" => self.byte = values::byte(key, value.text(key)?).map_err(ConfigError)?,
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(Same::new(Disk { size: self.size, byte: self.byte })))
    }
}

struct Disk {
    size: u64,
    byte: u8,
}

impl Device for Disk {
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
            // All of it is data, which is what is said where nothing is known; saying so is nbdkit's.
            extents: true,
            ..Capabilities::default()
        })
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, buffer: &mut [u8], _offset: u64, call: &Call) -> device::Result<()> {
        if buffer.len() > AT_ONCE && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        buffer.fill(self.byte);
        Ok(())
    }

    fn write(&self, _data: &[u8], _offset: u64, _flags: Flags, _call: &Call) -> device::Result<()> {
        Ok(())
    }

    fn trim(&self, _length: u64, _offset: u64, _flags: Flags, _call: &Call) -> device::Result<()> {
        Ok(())
    }

    /// Dropped as any other write: the disk reads as before.
    fn zero(&self, _length: u64, _offset: u64, _flags: Flags, _call: &Call) -> device::Result<()> {
        Ok(())
    }
}

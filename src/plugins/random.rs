//! `random`: random bytes, at every offset the same each time it is read, and for a seed the same as nbdkit's. Writes
//! succeed only with what is there already, so a copy onto itself is a test of the copying.
//! Source: nbdkit plugins/random/random.c, plugins/random/nbdkit-random-plugin.pod.

use std::sync::Arc;

use nbdcaptive_actors::device::{
    self, Call, Capabilities, Device, Error, ErrorCode, Exports, Flags, Same, Support, ThreadModel,
};

use crate::layer::{About, ConfigError, Parameter, Plugin, Value};
use crate::values;
use crate::xoshiro::{self, Xoshiro};

/// See the module.
pub static ABOUT: About = About {
    name: "random",
    summary: "a disk of random bytes, which takes only writes that change nothing

        At an offset there is always the same byte as long as the seed is the same. Only a write of what is there
        already succeeds: so a copy of the disk onto itself shows that the copying is right.

        # Examples

            nbdcaptive random 1M seed=1 --run 'nbdcopy \"$uri\" \"$uri\"'
        ",
    parameters: &[
        Parameter { key: "size", value: "<SIZE>", help: "size of the disk, 0 unless given", required: false },
        Parameter {
            key: "seed",
            value: "<SEED>",
            help: "where the random bytes start from, the time unless given",
            required: false,
        },
    ],
    magic_key: Some("size"),
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The most that a call that must not wait makes, in bytes; each is some ten nanoseconds.
const AT_ONCE: usize = 64 * 1024;

/// The plugin.
#[derive(Debug, Default)]
pub struct Random {
    size: u64,
    seed: Option<u32>,
}

impl Plugin for Random {
    fn callbacks(&self) -> &'static str {
        "load config config_help open get_size can_multi_conn can_cache pread pwrite trim zero"
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "size" => self.size = values::size(value.text(key)?).map_err(ConfigError)?,
            "seed" => self.seed = Some(values::unsigned(key, value.text(key)?).map_err(ConfigError)?),
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        let seed = self.seed.unwrap_or_else(xoshiro::seed);
        Ok(Arc::new(Same::new(Disk { size: self.size, seed: u64::from(seed) })))
    }
}

struct Disk {
    size: u64,
    seed: u64,
}

impl Disk {
    /// The byte at `offset`: the third that a generator gives that starts from seed and offset.
    fn byte(&self, offset: u64) -> u8 {
        let mut random = Xoshiro::new(self.seed.wrapping_add(offset));
        random.word();
        random.word();
        random.byte()
    }
}

fn not_sparse() -> Error {
    Error::failed(ErrorCode::Io, "attempt to trim or zero non-sparse random disk")
}

impl Device for Disk {
    fn size(&self) -> device::Result<u64> {
        Ok(self.size)
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities {
            write: true,
            trim: true,
            zero: Support::Native,
            multi_conn: true,
            cache: Support::Native,
            ..Capabilities::default()
        })
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> device::Result<()> {
        if buffer.len() > AT_ONCE && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        for (byte, offset) in buffer.iter_mut().zip(offset..) {
            *byte = self.byte(offset);
        }
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64, _flags: Flags, call: &Call) -> device::Result<()> {
        if data.len() > AT_ONCE && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        if data.iter().zip(offset..).any(|(byte, offset)| *byte != self.byte(offset)) {
            return Err(Error::failed(ErrorCode::Io, "data written does not match expected"));
        }
        Ok(())
    }

    fn trim(&self, _length: u64, _offset: u64, _flags: Flags, _call: &Call) -> device::Result<()> {
        Err(not_sparse())
    }

    fn zero(&self, _length: u64, _offset: u64, _flags: Flags, _call: &Call) -> device::Result<()> {
        Err(not_sparse())
    }
}

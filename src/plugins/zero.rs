//! `zero`: a read-only disk without a single byte, the smallest that there is.
//! Source: nbdkit plugins/zero/zero.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{
    self, Call, Capabilities, Device, Error, ErrorCode, Exports, Same, Support, ThreadModel,
};

use crate::layer::{About, ConfigError, Plugin, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "zero",
    summary: "a read-only disk of no bytes

        For tests of what clients do with nothing at all.

        # Examples

            nbdcaptive zero --run 'nbdinfo --size \"$uri\"'
        ",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The plugin.
#[derive(Debug)]
pub struct Zero;

impl Plugin for Zero {
    fn callbacks(&self) -> &'static str {
        "open get_size can_multi_conn can_cache pread"
    }

    fn config(&mut self, key: &str, _value: Value<'_>) -> Result<(), ConfigError> {
        Err(ConfigError(format!("unknown parameter '{key}'")))
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(Same::new(Empty)))
    }
}

struct Empty;

impl Device for Empty {
    fn size(&self) -> device::Result<u64> {
        Ok(0)
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities { multi_conn: true, cache: Support::Native, ..Capabilities::default() })
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    /// No range is inside the disk, so nobody calls this.
    fn read(&self, _buffer: &mut [u8], _offset: u64, _call: &Call) -> device::Result<()> {
        Err(Error::failed(ErrorCode::Io, "unexpected call to pread"))
    }
}

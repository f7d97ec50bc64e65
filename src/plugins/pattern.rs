//! `pattern`: a read-only disk where every eight bytes hold their own offset, most significant byte first, so that data
//! that went to the wrong place is seen at a glance.
//! Source: nbdkit plugins/pattern/pattern.c, plugins/pattern/nbdkit-pattern-plugin.pod.

use std::sync::Arc;

use nbdcaptive_actors::device::{self, Call, Capabilities, Device, Error, Exports, Same, Support, ThreadModel};

use crate::layer::{About, ConfigError, Parameter, Plugin, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "pattern",
    summary: "a read-only disk in which every eight bytes are their own offset

        Each eight bytes are their own offset, with the most significant byte first. Data that has been copied to
        the wrong place can be told at once. It cannot be written; nbdcaptive-checkwrite-filter(1) in front of it
        takes writes that are right.

        # Examples

            nbdcaptive pattern 1M \\
                --run 'nbdcopy \"$uri\" - | od -A d -t x1 | head -3'
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

/// The most that a call that must not wait makes, in bytes; about a millisecond.
const AT_ONCE: usize = 1 << 20;

/// The plugin.
#[derive(Debug, Default)]
pub struct Pattern {
    size: u64,
}

impl Plugin for Pattern {
    fn callbacks(&self) -> &'static str {
        "config config_help open get_size can_multi_conn can_cache pread"
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "size" => self.size = values::size(value.text(key)?).map_err(ConfigError)?,
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(Same::new(Disk { size: self.size })))
    }
}

struct Disk {
    size: u64,
}

/// Fills a buffer with what is at `offset`.
fn fill(mut buffer: &mut [u8], mut offset: u64) {
    while !buffer.is_empty() {
        let word = (offset & !7).to_be_bytes();
        let rest = &word[offset as usize % 8..];
        let length = rest.len().min(buffer.len());
        let part;
        (part, buffer) = buffer.split_at_mut(length);
        part.copy_from_slice(&rest[..length]);
        offset += length as u64;
    }
}

impl Device for Disk {
    fn size(&self) -> device::Result<u64> {
        Ok(self.size)
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities { multi_conn: true, cache: Support::Native, ..Capabilities::default() })
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> device::Result<()> {
        if buffer.len() > AT_ONCE && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        fill(buffer, offset);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_window_shows_the_same_bytes() {
        let mut whole = [0; 64];
        fill(&mut whole, 0x0102_0304_0506_0700);
        assert_eq!(whole[8..16], [1, 2, 3, 4, 5, 6, 7, 8]);
        for start in 0..20 {
            for end in start..40 {
                let mut part = vec![0; end - start];
                fill(&mut part, 0x0102_0304_0506_0700 + start as u64);
                assert_eq!(part, whole[start..end]);
            }
        }
    }
}

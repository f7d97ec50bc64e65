//! `swab`: swaps the bytes of 16, 32 or 64 bit words. Source: nbdkit filters/swab/swab.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{
    BlockSize, Call, Capabilities, Device, Error, ErrorCode, Exports, Extents, Flags, Result, ThreadModel,
};
use nbdcaptive_actors::filter::{self, Filtered, Next};

use super::kit::{aligned, each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "swab",
    summary: "swap the bytes of words

        For disks that were written by a machine of the other byte order. Requests have to be of whole words.

        # Examples

            nbdcaptive --filter=swab pattern 1M swab-bits=64 \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[optional("swab-bits", "8|16|32|64", "how long a word is, 16 unless given; 8 swaps nothing")],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter: bytes of a word.
#[derive(Debug)]
pub struct Swab(usize);

impl Default for Swab {
    fn default() -> Swab {
        Swab(2)
    }
}

impl Filter for Swab {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "swab-bits" => {
                self.0 = match values::int(key, value.text(key)?).map_err(ConfigError)? {
                    8 => 1,
                    16 => 2,
                    32 => 4,
                    64 => 8,
                    _ => return Err(ConfigError("invalid swab-bits, must be 8, 16, 32 or 64".to_owned())),
                }
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(each(next, move |next, client| Ok(Filtered(Disk { next: Next::open(next, client)?, word: self.0 }))))
    }
}

struct Disk {
    next: Next,
    /// Bytes.
    word: usize,
}

impl Disk {
    fn check(&self, length: u64, offset: u64) -> Result<()> {
        let word = self.word as u64;
        if length.is_multiple_of(word) && offset.is_multiple_of(word) {
            return Ok(());
        }
        Err(Error::failed(ErrorCode::Invalid, "swab: requests to this filter must be aligned"))
    }

    fn swap(&self, data: &mut [u8]) {
        data.chunks_exact_mut(self.word).for_each(<[u8]>::reverse);
    }
}

impl filter::Filter for Disk {
    const CHANGES_DATA: bool = true;

    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn size(&self) -> Result<u64> {
        let size = self.next.bytes();
        Ok(size - size % self.word as u64)
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let next = self.next.capabilities()?;
        let word = self.word as u32;
        let sizes = match next.block_size {
            None => BlockSize { minimum: word, preferred: 512, maximum: u32::MAX },
            Some(sizes) => BlockSize { minimum: sizes.minimum.max(word), ..sizes },
        };
        Ok(Capabilities { block_size: Some(sizes), ..next })
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.check(buffer.len() as u64, offset)?;
        self.next.read(buffer, offset, call)?;
        self.swap(buffer);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.check(data.len() as u64, offset)?;
        let mut data = data.to_vec();
        self.swap(&mut data);
        self.next.write(&data, offset, flags, call)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.check(length, offset)?;
        self.next.trim(length, offset, flags, call)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.check(length, offset)?;
        self.next.zero(length, offset, flags, call)
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        self.check(length, offset)?;
        self.next.cache(length, offset, call)
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        self.check(extents.length(), extents.offset())?;
        aligned(extents, self.word as u64, |map| self.next.extents(map, call))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{device, memory, over, read, refused};
    use nbdcaptive_actors::device::Client;

    #[test]
    fn words_of_every_length_are_swapped_both_ways() {
        for (bits, stored) in [("8", b"abcdefgh"), ("16", b"badcfehg"), ("32", b"dcbahgfe"), ("64", b"hgfedcba")] {
            let plain = memory("1M");
            let disk = over(Arc::clone(&plain), "swab", &[("swab-bits", bits)]).unwrap();
            let (plain, disk) = (plain.open(&Client::default()).unwrap(), disk.open(&Client::default()).unwrap());
            disk.write(b"abcdefgh", 8, Flags::default(), &Call::BLOCKING).unwrap();
            assert_eq!(read(&*plain, 8, 8), stored);
            assert_eq!(read(&*disk, 8, 8), b"abcdefgh");
        }
    }

    #[test]
    fn half_words_are_refused_and_not_shown() {
        let disk = device("1023", "swab", &[("swab-bits", "32")]);
        assert_eq!(disk.size().unwrap(), 1020);
        let code = |result: Result<()>| result.unwrap_err().code();
        assert_eq!(code(disk.read(&mut [0; 3], 0, &Call::BLOCKING)), ErrorCode::Invalid);
        assert_eq!(code(disk.zero(4, 2, Flags::default(), &Call::BLOCKING)), ErrorCode::Invalid);
        assert_eq!(disk.capabilities().unwrap().block_size.unwrap().minimum, 4);
        assert_eq!(refused("swab", &[("swab-bits", "24")]), "invalid swab-bits, must be 8, 16, 32 or 64");
    }
}

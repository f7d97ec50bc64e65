//! What `xz` and `lzip` share: the next device is packed in blocks, and its indexes tell where they are. A block that is read
//! is unpacked as a whole and kept, so many of them for each client; so a client costs so many times the largest block at
//! most, and what unpacks one.

use std::io::{self, BufRead, BufReader, Read};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use nbdcaptive_actors::device::{
    Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Result, Segments, ThreadModel,
};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports, Next};

use super::kit::unknown;
use super::next::{Stream, look_at_start};
use super::unpacked;
use crate::layer::{ConfigError, Filter, Lifetime, Value};
use crate::overlay::Sink;
use crate::values;

/// How a file is packed: in blocks, each of which can be unpacked without the others.
pub trait Format: Send + Sync + 'static {
    /// The filter, which is called after it.
    const NAME: &'static str;
    /// What has to be known of a block to unpack it, besides where it is.
    type Kind: Send + Sync;

    /// Finds the blocks of a file of `size` bytes, in order and without gaps. `read` fills a buffer with bytes of the file.
    /// Errors: it is damaged, or no such file.
    fn blocks(size: u64, read: impl Fn(&mut [u8], u64) -> Result<()>) -> Result<Vec<Block<Self::Kind>>>;

    /// Unpacks a block of at most `max_block` bytes, of which `packed` reads what is in the file. Whoever reads to the end
    /// has its check verified.
    fn decoder<R: BufRead>(block: &Block<Self::Kind>, packed: R, max_block: u64) -> impl Read;
}

/// A block of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block<K> {
    /// Where it lies in the file.
    pub packed: Range<u64>,
    /// Where its data starts, and how long it is.
    pub start: u64,
    /// See `start`.
    pub length: u64,
    /// What the format knows of it.
    pub kind: K,
}

/// Where the data ends that is `length` bytes behind `start`.
pub fn end<F: Format>(start: u64, length: u64) -> Result<u64> {
    let end = start.checked_add(length).filter(|end| *end <= i64::MAX as u64);
    end.ok_or_else(|| failed::<F>("the uncompressed data is larger than 2^63-1"))
}

/// A failure to unpack.
pub fn failed<F: Format>(why: impl std::fmt::Display) -> Error {
    Error::failed(ErrorCode::Io, format!("{}: {why}", F::NAME))
}

/// What is read of the next device at once, in bytes.
pub const INPUT: usize = 1 << 20;

/// The filter for files that are packed as `F`.
#[derive(Debug)]
pub struct Unpack<F> {
    settings: Settings,
    format: PhantomData<F>,
}

#[derive(Clone, Copy, Debug)]
struct Settings {
    max_block: u64,
    max_depth: usize,
}

impl<F> Default for Unpack<F> {
    fn default() -> Unpack<F> {
        Unpack { settings: Settings { max_block: 512 << 20, max_depth: 8 }, format: PhantomData }
    }
}

impl<F: Format> Filter for Unpack<F> {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        match key.strip_prefix(F::NAME) {
            Some("-max-block") => self.settings.max_block = values::size(text).map_err(ConfigError)?,
            Some("-max-depth") => match values::unsigned(key, text).map_err(ConfigError)? {
                0 => return Err(ConfigError(format!("'{key}' parameter must be >= 1"))),
                depth => self.settings.max_depth = depth as usize,
            },
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let settings = self.settings;
        look_at_start(&next, lifetime, move |next, _| blocks::<F>(next, settings.max_block).map(drop));
        Ok(Arc::new(FilteredExports(Files::<F> { next, settings, format: PhantomData })))
    }
}

/// The blocks of a file. Errors: it is damaged, or the largest of them is larger than wanted.
fn blocks<F: Format>(next: &Next, max_block: u64) -> Result<Vec<Block<F::Kind>>> {
    let blocks = F::blocks(next.bytes(), |buffer, at| next.read(buffer, at, &Call::BLOCKING))?;
    let largest = blocks.iter().map(|block| block.length).max().unwrap_or(0);
    if largest > max_block {
        let name = F::NAME;
        return Err(failed::<F>(format!(
            "{name} file largest block is bigger than {name}-max-block: {largest} bytes, and {name}-max-block is \
             {max_block}; either recompress the {name} file with smaller blocks or make {name}-max-block bigger"
        )));
    }
    Ok(blocks)
}

struct Files<F> {
    next: Arc<dyn Exports>,
    settings: Settings,
    format: PhantomData<F>,
}

impl<F: Format> FilterExports for Files<F> {
    const THREAD_MODEL: ThreadModel = ThreadModel::SerializeRequests;

    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = Next::open(&*self.next, &Client { read_only: true, ..client.clone() })?;
        let (next, blocks) = next.look(|next| blocks::<F>(next, self.settings.max_block))?;
        Ok(Box::new(Filtered(File::<F> { next, blocks, settings: self.settings, unpacked: Mutex::default() })))
    }

    fn description(&self, client: &Client) -> Option<String> {
        let base = self.next.description(client)?;
        Some(format!("expansion of {}-compressed image: {base}", F::NAME))
    }
}

/// One client's device.
struct File<F: Format> {
    next: Next,
    /// In order.
    blocks: Vec<Block<F::Kind>>,
    settings: Settings,
    /// With the start of their data, the one that was used last at the end.
    unpacked: Mutex<Vec<(u64, Arc<Vec<u8>>)>>,
}

impl<F: Format> File<F> {
    /// The data of a block. One request at a time is made, so no two unpack the same.
    fn data(&self, block: &Block<F::Kind>) -> Result<Arc<Vec<u8>>> {
        {
            let mut unpacked = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(index) = unpacked.iter().position(|(start, _)| *start == block.start) {
                let found = unpacked.remove(index);
                unpacked.push(found.clone());
                return Ok(found.1);
            }
            if unpacked.len() >= self.settings.max_depth {
                // Before the next one, so that there are never more.
                unpacked.remove(0);
            }
        }
        let data = Arc::new(self.unpack(block)?);
        let mut unpacked = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        unpacked.push((block.start, Arc::clone(&data)));
        Ok(data)
    }

    fn unpack(&self, block: &Block<F::Kind>) -> Result<Vec<u8>> {
        // At most max_block.
        let length = block.length as usize;
        let mut data = Vec::new();
        data.try_reserve_exact(length).map_err(|error| {
            let why = format!("{}: {length} bytes: {error}; recompress the file with a smaller block size", F::NAME);
            Error::failed(ErrorCode::NoMemory, why)
        })?;
        let mut input = Stream::new(&self.next, block.packed.clone());
        let mut result = {
            let packed = BufReader::with_capacity(INPUT, &mut input);
            let decoder = F::decoder(block, packed, self.settings.max_block);
            // One byte more than there should be, which also has the check verified.
            decoder.take(block.length + 1).read_to_end(&mut data)
        };
        if matches!(result, Ok(got) if got != length) {
            result = Err(io::Error::other("it is not as long as the index says"));
        }
        match result {
            Ok(_) => Ok(data),
            Err(error) => Err(input.error(&format!("{}: block at {}", F::NAME, block.packed.start), error)),
        }
    }

    fn read_into(&self, mut sink: Sink<'_>, length: usize, offset: u64) -> Result<()> {
        let end = offset + length as u64;
        let mut at = offset;
        while at < end {
            let after = self.blocks.partition_point(|block| block.start <= at);
            let block = after.checked_sub(1).and_then(|index| self.blocks.get(index));
            let missing = || failed::<F>(format!("cannot find offset {at} in the {} file", F::NAME));
            let block = block.ok_or_else(missing)?;
            let data = self.data(block)?;
            let part = (at - block.start) as usize..(end.min(block.start + block.length) - block.start) as usize;
            at += part.len() as u64;
            match &mut sink {
                Sink::Buffer(_) => sink.space(part.len()).copy_from_slice(&data[part]),
                Sink::Reply(reply) => reply.shared(data, part),
            }
        }
        Ok(())
    }
}

impl<F: Format> filter::Filter for File<F> {
    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn size(&self) -> Result<u64> {
        Ok(self.blocks.last().map_or(0, |block| block.start + block.length))
    }

    fn capabilities(&self) -> Result<Capabilities> {
        Ok(unpacked::capabilities(self.next.capabilities()?))
    }

    fn answers_at_once(&self) -> bool {
        false
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _call: &Call) -> Result<()> {
        let length = buffer.len();
        self.read_into(Sink::Buffer(buffer), length, offset)
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, _call: &Call) -> Result<()> {
        self.read_into(Sink::Reply(reply), length, offset)
    }
}

/// What the tests of the formats share.
#[cfg(test)]
pub(super) mod testing {
    use super::{Block, Format, Result};

    /// The blocks of a file that is in memory.
    pub fn blocks_of<F: Format>(file: &[u8]) -> Result<Vec<Block<F::Kind>>> {
        F::blocks(file.len() as u64, |buffer, at| {
            buffer.copy_from_slice(&file[at as usize..][..buffer.len()]);
            Ok(())
        })
    }

    /// Whatever bit is wrong, the file is refused or read without a panic.
    pub fn damage_every_bit<F: Format>(file: &[u8]) {
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut damaged = file.to_vec();
                damaged[at] ^= 1 << bit;
                let _ = blocks_of::<F>(&damaged);
            }
        }
    }
}

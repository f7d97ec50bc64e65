//! `sparse-random`: runs of random data and holes between them, in the shape of a virtual machine's disk; for a seed the same
//! as nbdkit's. Writes succeed only with what is there already.
//!
//! Where a block's data is asked for from its middle on, nbdkit gives other bytes than the ones that are in the middle of the
//! whole block; here every byte has one value, that of nbdkit's reads of whole blocks.
//! Source: nbdkit plugins/sparse-random/sparse-random.c, plugins/sparse-random/nbdkit-sparse-random-plugin.pod.

use std::ops::Range;
use std::sync::Arc;

use nbdcaptive_actors::device::{
    self, BlockSize, Call, Capabilities, Device, Error, ErrorCode, Exports, Extents, Flags, HOLE, Same, Segments,
    Support, ThreadModel, ZERO,
};

use crate::layer::{About, ConfigError, Parameter, Plugin, Value};
use crate::values;
use crate::xoshiro::{self, Xoshiro};

/// See the module.
pub static ABOUT: About = About {
    name: "sparse-random",
    summary: "runs of random data between holes; takes only writes that change nothing

        Made like the disk of a virtual machine: runs of data of different lengths, and more holes than data. For
        testing programs that copy. At an offset there is always the same as long as the parameters are the same,
        and only a write of what is there already succeeds.

        # Examples

            nbdcaptive sparse-random 1G seed=1 \\
                --run 'nbdinfo --map --totals \"$uri\"'
            nbdcaptive sparse-random 64M seed=1 --run 'nbdcopy \"$uri\" \"$uri\"'
        ",
    parameters: &[
        Parameter { key: "size", value: "<SIZE>", help: "size of the disk, 0 unless given", required: false },
        Parameter {
            key: "seed",
            value: "<SEED>",
            help: "where data and holes start from, the time unless given",
            required: false,
        },
        Parameter {
            key: "percent",
            value: "<PERCENT>",
            help: "how much of the disk is data, 10 unless given",
            required: false,
        },
        Parameter {
            key: "runlength",
            value: "<BYTES>",
            help: "how long a run of data is on average, 16777216 bytes unless given",
            required: false,
        },
        Parameter {
            key: "random-content",
            value: "<BOOL>",
            help: "every byte of a block is random, and not one byte repeated",
            required: false,
        },
    ],
    magic_key: Some("size"),
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// Bytes of a block, which is all data or all hole.
const BLOCK: usize = 4096;
const BLOCK_SIZE: u64 = BLOCK as u64;

/// The most that a call that must not wait makes, in bytes, of one byte for each block; and of random bytes.
const FILL_AT_ONCE: usize = 4 << 20;
const RANDOM_AT_ONCE: usize = 256 * 1024;

/// The most blocks that a call that must not wait looks at.
const LOOK_AT_ONCE: u64 = 1 << 20;

/// The plugin.
#[derive(Debug)]
pub struct SparseRandom {
    size: u64,
    seed: Option<u32>,
    percent: f64,
    run_length: u64,
    random_content: bool,
}

impl Default for SparseRandom {
    fn default() -> SparseRandom {
        SparseRandom { size: 0, seed: None, percent: 10.0, run_length: 16 << 20, random_content: false }
    }
}

impl Plugin for SparseRandom {
    fn callbacks(&self) -> &'static str {
        "load unload config config_help get_ready open get_size block_size can_multi_conn can_cache pread \
         pwrite flush trim zero extents"
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        let text = value.text(key)?;
        match key {
            "size" => self.size = values::size(text).map_err(ConfigError)?,
            "seed" => self.seed = Some(values::unsigned(key, text).map_err(ConfigError)?),
            "percent" => {
                // What follows the number is passed over, as in nbdkit: `10%` is a habit.
                let percent = values::fraction(text).map(|(number, _)| number);
                self.percent = percent
                    .filter(|percent| (0.0..=100.0).contains(percent))
                    .ok_or_else(|| ConfigError(format!("cannot parse percent parameter: {text}")))?;
            }
            "runlength" => {
                self.run_length = values::u64(key, text).map_err(ConfigError)?;
                if self.run_length == 0 {
                    return Err(ConfigError("runlength parameter must be > 0".to_owned()));
                }
            }
            "random-content" => self.random_content = values::boolean(text).map_err(ConfigError)?,
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        let seed = self.seed.unwrap_or_else(xoshiro::seed);
        let blocks = self.size.div_ceil(BLOCK_SIZE);
        let map = Map::new(blocks, self.percent, self.run_length, seed)
            .ok_or_else(|| ConfigError(format!("no memory for the map of a disk of {} bytes", self.size)))?;
        let disk = Disk { size: self.size, seed: u64::from(seed), map, random_content: self.random_content };
        Ok(Arc::new(Same::new(disk)))
    }
}

/// Which blocks are data.
enum Map {
    All(bool),
    /// A bit for each block.
    Bits(Vec<u64>),
}

impl Map {
    /// Walks from block to block; data ends and begins with the probabilities that give the percentage and the average
    /// length of a run. `None`: no memory.
    fn new(blocks: u64, percent: f64, run_length: u64, seed: u32) -> Option<Map> {
        if percent == 0.0 || percent == 100.0 {
            return Some(Map::All(percent > 0.0));
        }
        // The order of the operations decides about the last bit of the result, and so is nbdkit's.
        let end_of_data = 1.0 / (run_length as f64 / BLOCK as f64);
        let end_of_hole = (percent / 100.0) * end_of_data / (1.0 - (percent / 100.0));
        let words = usize::try_from(blocks.div_ceil(64)).ok()?;
        let mut bits = Vec::new();
        bits.try_reserve_exact(words).ok()?;
        let mut random = Xoshiro::new(u64::from(seed));
        let mut is_data = false;
        for word in 0..words as u64 {
            let mut set = 0_u64;
            for bit in 0..(blocks - word * 64).min(64) {
                set |= u64::from(is_data) << bit;
                let end = if is_data { end_of_data } else { end_of_hole };
                is_data ^= random.word() as f64 <= end * u64::MAX as f64;
            }
            bits.push(set);
        }
        Some(Map::Bits(bits))
    }

    fn is_data(&self, block: u64) -> bool {
        match self {
            Map::All(data) => *data,
            Map::Bits(bits) => bits[(block / 64) as usize] >> (block % 64) & 1 == 1,
        }
    }

    /// The first block of `range` that is not as its first one is, or its end. The range is not empty.
    fn end_of_run(&self, range: Range<u64>) -> u64 {
        let Map::Bits(bits) = self else { return range.end };
        let flip = if self.is_data(range.start) { u64::MAX } else { 0 };
        let mut at = range.start;
        while at < range.end {
            // One where the run has ended.
            let word = (bits[(at / 64) as usize] ^ flip) >> (at % 64);
            if word != 0 {
                return (at + u64::from(word.trailing_zeros())).min(range.end);
            }
            at = (at / 64 + 1) * 64;
        }
        range.end
    }
}

struct Disk {
    size: u64,
    seed: u64,
    map: Map,
    random_content: bool,
}

/// A run of blocks of one kind, as far as it is asked for.
struct Run {
    range: Range<u64>,
    is_data: bool,
}

impl Disk {
    /// The runs of a range, in order.
    fn runs(&self, offset: u64, length: u64) -> impl Iterator<Item = Run> {
        let end = offset + length;
        let mut at = offset;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let block = at / BLOCK_SIZE;
                let to = self.map.end_of_run(block..end.div_ceil(BLOCK_SIZE)).saturating_mul(BLOCK_SIZE).min(end);
                let run = Run { range: at..to, is_data: self.map.is_data(block) };
                at = to;
                run
            })
        })
    }

    /// Makes the data of a range, which is all data.
    fn fill(&self, mut buffer: &mut [u8], mut offset: u64) {
        while !buffer.is_empty() {
            let start = offset as usize % BLOCK;
            let part;
            (part, buffer) = buffer.split_at_mut(buffer.len().min(BLOCK - start));
            let mut random = Xoshiro::new(self.seed.wrapping_add(offset - start as u64));
            if self.random_content {
                for _ in 0..start {
                    random.word();
                }
                part.fill_with(|| random.byte());
            } else {
                part.fill(random.byte().max(1));
            }
            offset += part.len() as u64;
        }
    }

    fn would_block(&self, length: usize, call: &Call) -> bool {
        length > if self.random_content { RANDOM_AT_ONCE } else { FILL_AT_ONCE } && !call.may_block()
    }
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
            // Nothing is ever changed, so there is nothing to force.
            fua: Support::Native,
            multi_conn: true,
            cache: Support::Native,
            extents: true,
            block_size: Some(BlockSize { minimum: 1, preferred: BLOCK as u32, maximum: u32::MAX }),
            ..Capabilities::default()
        })
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, mut buffer: &mut [u8], offset: u64, call: &Call) -> device::Result<()> {
        if self.would_block(buffer.len(), call) {
            return Err(Error::WouldBlock);
        }
        for run in self.runs(offset, buffer.len() as u64) {
            let part;
            (part, buffer) = buffer.split_at_mut((run.range.end - run.range.start) as usize);
            if run.is_data { self.fill(part, run.range.start) } else { part.fill(0) }
        }
        Ok(())
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> device::Result<()> {
        if self.would_block(length, call) {
            return Err(Error::WouldBlock);
        }
        for run in self.runs(offset, length as u64) {
            let length = (run.range.end - run.range.start) as usize;
            if run.is_data { self.fill(reply.space(length), run.range.start) } else { reply.zeroes(length) }
        }
        Ok(())
    }

    fn write(&self, mut data: &[u8], offset: u64, _flags: Flags, call: &Call) -> device::Result<()> {
        if self.would_block(data.len(), call) {
            return Err(Error::WouldBlock);
        }
        let mut expected = [0; BLOCK];
        let end = offset + data.len() as u64;
        let mut at = offset;
        while at < end {
            let block = at / BLOCK_SIZE;
            let length = (BLOCK_SIZE - at % BLOCK_SIZE).min(end - at) as usize;
            let part;
            (part, data) = data.split_at(length);
            let expected = &mut expected[..length];
            if self.map.is_data(block) {
                self.fill(expected, at)
            } else {
                expected.fill(0)
            }
            if part != expected {
                return Err(Error::failed(ErrorCode::Io, "data written does not match expected"));
            }
            at += length as u64;
        }
        Ok(())
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        self.zero(length, offset, flags, call)
    }

    fn zero(&self, length: u64, offset: u64, _flags: Flags, call: &Call) -> device::Result<()> {
        if length / BLOCK_SIZE > LOOK_AT_ONCE && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        if self.runs(offset, length).any(|run| run.is_data) {
            return Err(Error::failed(ErrorCode::Io, "trying to trim or zero non-hole in disk"));
        }
        Ok(())
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> device::Result<()> {
        if extents.length() / BLOCK_SIZE > LOOK_AT_ONCE && !call.may_block() {
            return Err(Error::WouldBlock);
        }
        for run in self.runs(extents.offset(), extents.length()) {
            let flags = if run.is_data { 0 } else { HOLE | ZERO };
            if !extents.add(run.range.start, run.range.end - run.range.start, flags) {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::testing::{Random, ready};
    use nbdcaptive_actors::device::Client;

    fn disk(parameters: &[(&str, &str)]) -> Box<dyn Device> {
        let parameters: Vec<_> = parameters.iter().map(|(key, value)| (*key, value.as_ref())).collect();
        ready("sparse-random", &parameters).unwrap().open(&Client::default()).unwrap()
    }

    #[test]
    fn every_window_shows_the_same_bytes_and_takes_them_back() {
        for content in ["false", "true"] {
            let size = 64 * BLOCK + 100;
            let device = disk(&[
                ("size", &size.to_string()),
                ("seed", "7"),
                ("percent", "50"),
                ("runlength", "8192"),
                ("random-content", content),
            ]);
            let mut whole = vec![1; size];
            device.read(&mut whole, 0, &Call::BLOCKING).unwrap();
            let mut extents = Extents::new(0, size as u64, false);
            device.extents(&mut extents, &Call::BLOCKING).unwrap();
            assert!(extents.list().len() > 8, "{extents:?}");
            let mut at = 0;
            for extent in extents.list() {
                let run = &whole[at..at + extent.length as usize];
                assert_eq!(run.iter().all(|byte| *byte == 0), extent.flags == HOLE | ZERO);
                let zero = device.zero(extent.length, at as u64, Flags::default(), &Call::BLOCKING);
                assert_eq!(zero.is_ok(), extent.flags == HOLE | ZERO);
                at += run.len();
            }
            let mut random = Random(42);
            for _ in 0..500 {
                let range = random.range(size as u64);
                let wanted = &whole[range.start as usize..range.end as usize];
                let mut part = vec![1; wanted.len()];
                device.read(&mut part, range.start, &Call::BLOCKING).unwrap();
                assert!(part == wanted);
                let mut reply = Segments::default();
                device.read_segments(&mut reply, wanted.len(), range.start, &Call::BLOCKING).unwrap();
                assert!(reply.to_vec() == wanted);
                device.write(wanted, range.start, Flags::default(), &Call::BLOCKING).unwrap();
                let last = part.len() - 1;
                part[last] ^= 1;
                device.write(&part, range.start, Flags::default(), &Call::BLOCKING).unwrap_err();
            }
        }
    }

    #[test]
    fn the_largest_disk_is_there_if_it_is_all_data_or_all_hole() {
        let size = i64::MAX as u64;
        for (percent, flags) in [("0", HOLE | ZERO), ("100", 0)] {
            let device = disk(&[("size", &size.to_string()), ("percent", percent)]);
            let mut extents = Extents::new(0, size, false);
            device.extents(&mut extents, &Call::BLOCKING).unwrap();
            assert_eq!(extents.list().iter().map(|e| (e.length, e.flags)).collect::<Vec<_>>(), [(size, flags)]);
        }
        let size = size.to_string();
        let error = ready("sparse-random", &[("size", size.as_ref())]).err().expect("there is not that much memory");
        assert!(error.0.contains("no memory"), "{error}");
    }
}

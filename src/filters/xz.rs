//! `xz`: unpacks the next device while it is read, block by block, read-only.
//!
//! The indexes at the end of the file's streams tell where its blocks are. A block that is read is unpacked as a whole and
//! kept, `xz-max-depth` of them for each client; so a client costs so many times the largest block at most, and files with
//! many small blocks are the quickest (`xz --block-size`). Each block is given to the decoder as a stream of its own, made
//! up round it, so that its check is verified.
//! Source: nbdkit filters/xz/xz.c, xzfile.c, nbdkit-xz-filter.pod; The .xz File Format 1.2.1.

use std::io::{BufReader, Cursor, Read};
use std::sync::{Arc, Mutex, PoisonError};

use lzma_rust2::XzReader;
use nbdcaptive_actors::device::{
    Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Result, Segments, ThreadModel,
};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports, Next};

use super::kit::unknown;
use super::next::{Stream, look_at_start};
use super::unpacked;
use crate::layer::{About, ConfigError, Filter, Lifetime, Parameter, Value};
use crate::overlay::Sink;
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "xz",
    summary: "unpack an xz file, read-only

        Nothing is unpacked before it is read, and no temporary file is made. But a block is always unpacked as a
        whole: a file should have many small ones, as `xz --block-size=16M` makes them.

        # Examples

            nbdcaptive --filter=xz file disk.img.xz \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        Parameter {
            key: "xz-max-block",
            value: "<SIZE>",
            help: "refuse files with larger blocks, 512M unless given",
            required: false,
        },
        Parameter {
            key: "xz-max-depth",
            value: "<N>",
            help: "blocks that are kept for each client, 8 unless given",
            required: false,
        },
    ],
    magic_key: None,
    thread_model: ThreadModel::SerializeRequests,
    dump: &[],
};

/// The first and the last bytes of a stream.
const HEADER_MAGIC: [u8; 6] = *b"\xfd7zXZ\0";
const FOOTER_MAGIC: [u8; 2] = *b"YZ";
/// How long both are, in bytes.
const ENDS: u64 = 12;
/// The longest indexes that are read, of all streams together, in bytes: those of some ten million blocks.
const LONGEST_INDEX: u64 = 64 << 20;
/// What is read of the next device at once, in bytes.
const INPUT: usize = 1 << 20;
/// The dictionary of `xz -9` in KiB, which also files with small blocks ask for, and what the decoder needs besides.
const LEAST_MEMORY: u64 = 65 << 10;

/// The filter.
#[derive(Clone, Copy, Debug)]
pub struct Xz {
    max_block: u64,
    max_depth: usize,
}

impl Default for Xz {
    fn default() -> Xz {
        Xz { max_block: 512 << 20, max_depth: 8 }
    }
}

impl Filter for Xz {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        match key {
            "xz-max-block" => self.max_block = values::size(text).map_err(ConfigError)?,
            "xz-max-depth" => match values::unsigned(key, text).map_err(ConfigError)? {
                0 => return Err(ConfigError("'xz-max-depth' parameter must be >= 1".to_owned())),
                depth => self.max_depth = depth as usize,
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
        let settings = *self;
        look_at_start(&next, lifetime, move |next, _| settings.blocks(next).map(drop));
        Ok(Arc::new(FilteredExports(Files { next, settings })))
    }
}

impl Xz {
    /// The blocks of a file. Errors: it is damaged, or the largest of them is larger than wanted.
    fn blocks(&self, next: &Next) -> Result<Vec<Block>> {
        let blocks = parse(next.bytes(), |buffer, at| next.read(buffer, at, &Call::BLOCKING))?;
        let largest = blocks.iter().map(|block| block.length).max().unwrap_or(0);
        let limit = self.max_block;
        if largest > limit {
            return Err(failed(format!(
                "xz file largest block is bigger than xz-max-block: {largest} bytes, and xz-max-block is {limit}; \
                 either recompress the xz file with smaller blocks or make xz-max-block bigger"
            )));
        }
        Ok(blocks)
    }
}

struct Files {
    next: Arc<dyn Exports>,
    settings: Xz,
}

impl FilterExports for Files {
    const THREAD_MODEL: ThreadModel = ThreadModel::SerializeRequests;

    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = Next::open(&*self.next, &Client { read_only: true, ..client.clone() })?;
        let (next, blocks) = next.look(|next| self.settings.blocks(next))?;
        Ok(Box::new(Filtered(File { next, blocks, settings: self.settings, unpacked: Mutex::default() })))
    }

    fn description(&self, client: &Client) -> Option<String> {
        let base = self.next.description(client)?;
        Some(format!("expansion of xz-compressed image: {base}"))
    }
}

fn failed(why: impl std::fmt::Display) -> Error {
    Error::failed(ErrorCode::Io, format!("xz: {why}"))
}

/// A block of the file. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    /// Where it starts in the file.
    at: u64,
    /// How long it is there, without the padding behind it.
    unpadded: u64,
    /// Where its data starts, and how long it is.
    start: u64,
    length: u64,
    /// The stream flags, which tell its check.
    flags: [u8; 2],
}

fn padded(length: u64) -> Option<u64> {
    length.checked_next_multiple_of(4)
}

fn le32(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// Finds the blocks of a file of `size` bytes. `read` fills a buffer with bytes of the file.
fn parse(size: u64, read: impl Fn(&mut [u8], u64) -> Result<()>) -> Result<Vec<Block>> {
    let ends = |at: u64| {
        let mut bytes = [0; ENDS as usize];
        read(&mut bytes, at).map(|()| bytes)
    };
    if size < ENDS {
        return Err(failed("file too short"));
    }
    if !ends(0)?.starts_with(&HEADER_MAGIC) {
        return Err(failed("not an xz file"));
    }
    if !size.is_multiple_of(4) {
        return Err(failed("not an xz file: size is not a multiple of 4 bytes"));
    }
    // From the last stream to the first, so each one's blocks come before those that are known.
    let mut streams = Vec::new();
    let mut index_left = LONGEST_INDEX;
    let mut position = size;
    while position > 0 {
        let corrupted = |what: &str| failed(format!("{what} at {position}"));
        if position < ENDS {
            return Err(corrupted("corrupted file"));
        }
        let footer = ends(position - ENDS)?;
        if footer[8..] == [0; 4] {
            // Padding between streams.
            position -= 4;
            continue;
        }
        if footer[10..] != FOOTER_MAGIC || le32(&footer[..4]) != crc32fast::hash(&footer[4..10]) {
            return Err(corrupted("invalid stream footer"));
        }
        let index_length = (u64::from(le32(&footer[4..8])) + 1) * 4;
        let index_at = (position - ENDS).checked_sub(index_length).ok_or_else(|| corrupted("invalid stream footer"))?;
        index_left = index_left.checked_sub(index_length).ok_or_else(|| corrupted("the index is too large"))?;
        let mut index = vec![0; index_length as usize];
        for (number, piece) in index.chunks_mut(INPUT).enumerate() {
            read(piece, index_at + (number * INPUT) as u64)?;
        }
        let records = records(&index).ok_or_else(|| corrupted("could not parse index"))?;
        let total = records.iter().try_fold(0u64, |sum, (unpadded, _)| sum.checked_add(padded(*unpadded)?));
        let start = total.and_then(|total| index_at.checked_sub(total)?.checked_sub(ENDS));
        let start = start.ok_or_else(|| corrupted("could not parse index"))?;
        let header = ends(start)?;
        if !header.starts_with(&HEADER_MAGIC) || le32(&header[8..]) != crc32fast::hash(&header[6..8]) {
            return Err(corrupted("invalid stream header"));
        }
        if header[6..8] != footer[8..10] {
            return Err(corrupted("header and footer of stream are not equal"));
        }
        streams.push((start + ENDS, [header[6], header[7]], records));
        position = start;
    }
    let mut blocks = Vec::new();
    let mut from = 0u64;
    for (mut at, flags, records) in streams.into_iter().rev() {
        for (unpadded, length) in records {
            if length > 0 {
                blocks.push(Block { at, unpadded, start: from, length, flags });
            }
            // All of them lie in the file, as was found above.
            at += padded(unpadded).unwrap_or(unpadded);
            let end = from.checked_add(length).filter(|end| *end <= i64::MAX as u64);
            from = end.ok_or_else(|| failed("the uncompressed data is larger than 2^63-1"))?;
        }
    }
    Ok(blocks)
}

/// The records of an index: how long each block is, packed and unpacked.
fn records(index: &[u8]) -> Option<Vec<(u64, u64)>> {
    let (content, crc) = index.split_at_checked(index.len().checked_sub(4)?)?;
    if le32(crc) != crc32fast::hash(content) {
        return None;
    }
    let mut rest = content.strip_prefix(&[0])?;
    let count = number(&mut rest)?;
    let mut records = Vec::new();
    for _ in 0..count {
        let unpadded = number(&mut rest).filter(|unpadded| *unpadded > 0)?;
        records.push((unpadded, number(&mut rest)?));
    }
    (rest.len() < 4 && rest.iter().all(|byte| *byte == 0)).then_some(records)
}

/// Takes a number of the format's: seven bits in each byte, the lowest first, and a one above them if more follow.
fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for place in 0..9 {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn put_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

impl Block {
    /// What goes before the block in a stream that has only this one.
    fn header(&self) -> Vec<u8> {
        let crc = crc32fast::hash(&self.flags).to_le_bytes();
        [&HEADER_MAGIC[..], &self.flags, &crc].concat()
    }

    /// And what comes behind it: an index with one record, and a footer.
    fn footer(&self) -> Vec<u8> {
        let mut bytes = vec![0, 1];
        put_number(&mut bytes, self.unpadded);
        put_number(&mut bytes, self.length);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        let mut footer = (bytes.len() as u32 / 4 - 1).to_le_bytes().to_vec();
        footer.extend(self.flags);
        bytes.extend(crc32fast::hash(&footer).to_le_bytes());
        bytes.extend(footer);
        bytes.extend(FOOTER_MAGIC);
        bytes
    }
}

/// One client's device.
struct File {
    next: Next,
    /// In order.
    blocks: Vec<Block>,
    settings: Xz,
    /// With the start of their data, the one that was used last at the end.
    unpacked: Mutex<Vec<(u64, Arc<Vec<u8>>)>>,
}

impl File {
    /// The data of a block. One request at a time is made, so no two unpack the same.
    fn data(&self, block: &Block) -> Result<Arc<Vec<u8>>> {
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

    fn unpack(&self, block: &Block) -> Result<Vec<u8>> {
        let why = |what: &dyn std::fmt::Display| failed(format!("block at {}: {what}", block.at));
        // At most xz-max-block.
        let length = block.length as usize;
        let mut data = Vec::new();
        data.try_reserve_exact(length).map_err(|error| {
            let why = format!("xz: {length} bytes: {error}; recompress the file with a smaller block size");
            Error::failed(ErrorCode::NoMemory, why)
        })?;
        let end = padded(block.unpadded).and_then(|length| block.at.checked_add(length));
        let mut input = Stream::new(&self.next, block.at..end.ok_or_else(|| why(&"invalid size"))?);
        let memory = u32::try_from((self.settings.max_block / 1024).saturating_add(1024).max(LEAST_MEMORY));
        let mut result = {
            let packed = BufReader::with_capacity(INPUT, &mut input);
            let stream = Cursor::new(block.header()).chain(packed).chain(Cursor::new(block.footer()));
            let mut decoder = XzReader::new_mem_limit(stream, false, memory.unwrap_or(u32::MAX));
            // One byte more than there should be, which also has the check verified.
            decoder.by_ref().take(block.length + 1).read_to_end(&mut data)
        };
        if matches!(result, Ok(got) if got != length) {
            result = Err(std::io::Error::other("it is not as long as the index says"));
        }
        match result {
            Ok(_) => Ok(data),
            Err(error) => Err(input.error(&format!("xz: block at {}", block.at), error)),
        }
    }

    fn read_into(&self, mut sink: Sink<'_>, length: usize, offset: u64) -> Result<()> {
        let end = offset + length as u64;
        let mut at = offset;
        while at < end {
            let after = self.blocks.partition_point(|block| block.start <= at);
            let block = after.checked_sub(1).and_then(|index| self.blocks.get(index));
            let block = block.ok_or_else(|| failed(format!("cannot find offset {at} in the xz file")))?;
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

impl filter::Filter for File {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn from(bytes: &[u8]) -> impl Fn(&mut [u8], u64) -> Result<()> + '_ {
        |buffer, at| {
            buffer.copy_from_slice(&bytes[at as usize..][..buffer.len()]);
            Ok(())
        }
    }

    /// A stream of one block that is not looked into.
    fn stream(unpadded: u64, length: u64) -> Vec<u8> {
        let block = Block { at: 0, unpadded, start: 0, length, flags: [0, 4] };
        [block.header(), vec![0xff; padded(unpadded).unwrap() as usize], block.footer()].concat()
    }

    #[test]
    fn streams_follow_each_other_with_padding_between() {
        let one = stream(17, 1000);
        let other = stream(200, 300);
        let file = [&one[..], &[0; 8], &other[..], &[0; 4]].concat();
        let blocks = parse(file.len() as u64, from(&file)).unwrap();
        let second = one.len() as u64 + 8 + ENDS;
        let flags = [0, 4];
        assert_eq!(
            blocks,
            [
                Block { at: 12, unpadded: 17, start: 0, length: 1000, flags },
                Block { at: second, unpadded: 200, start: 1000, length: 300, flags },
            ]
        );
    }

    #[test]
    fn no_damage_is_worse_than_an_error() {
        let file = [stream(17, 1000), stream(200, 300)].concat();
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut damaged = file.clone();
                damaged[at] ^= 1 << bit;
                let _ = parse(damaged.len() as u64, from(&damaged));
            }
        }
        for length in 0..file.len() {
            assert!(parse(length as u64, from(&file[..length])).is_err() || length == stream(17, 1000).len());
        }
    }

    #[test]
    fn numbers_are_seven_bits_to_a_byte() {
        for value in [0, 1, 127, 128, 300, 1 << 35, (1 << 63) - 1] {
            let mut bytes = Vec::new();
            put_number(&mut bytes, value);
            assert_eq!(number(&mut &bytes[..]), Some(value));
        }
        assert_eq!(number(&mut &[0x80; 20][..]), None);
    }
}

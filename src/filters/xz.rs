//! `xz`: unpacks the next device while it is read, block by block, read-only (see `unpacked_blocks.rs`).
//!
//! The indexes at the end of the file's streams tell where its blocks are. Files with many small blocks are the quickest
//! (`xz --block-size`). Each block is given to the decoder as a stream of its own, made up round it, so that its check is
//! verified.
//! Source: nbdkit filters/xz/xz.c, xzfile.c, nbdkit-xz-filter.pod; The .xz File Format 1.2.1.

use std::io::{BufRead, Cursor, Read};

use lzma_rust2::XzReader;
use nbdcaptive_actors::device::{Error, Result, ThreadModel};

use super::unpacked_blocks::{self, Format, INPUT, Unpack};
use crate::layer::{About, Parameter};

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
/// The dictionary of `xz -9` in KiB, which also files with small blocks ask for, and what the decoder needs besides.
const LEAST_MEMORY: u64 = 65 << 10;

/// The filter.
pub type Filter = Unpack<Xz>;

/// The format.
#[derive(Debug)]
pub struct Xz;

type Block = unpacked_blocks::Block<Kind>;

/// What unpacks a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// How long it is in the file without the padding behind it, in bytes.
    unpadded: u64,
    /// The stream flags, which tell its check.
    flags: [u8; 2],
}

impl Format for Xz {
    const NAME: &'static str = ABOUT.name;
    type Kind = Kind;

    fn blocks(size: u64, read: impl Fn(&mut [u8], u64) -> Result<()>) -> Result<Vec<Block>> {
        parse(size, read)
    }

    fn decoder<R: BufRead>(block: &Block, packed: R, max_block: u64) -> impl Read {
        let memory = u32::try_from((max_block / 1024).saturating_add(1024).max(LEAST_MEMORY));
        let stream = Cursor::new(header(block.kind)).chain(packed).chain(Cursor::new(footer(block)));
        XzReader::new_mem_limit(stream, false, memory.unwrap_or(u32::MAX))
    }
}

fn failed(why: impl std::fmt::Display) -> Error {
    unpacked_blocks::failed::<Xz>(why)
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
            // All of them lie in the file, as was found above.
            let end = at + padded(unpadded).unwrap_or(unpadded);
            if length > 0 {
                blocks.push(Block { packed: at..end, start: from, length, kind: Kind { unpadded, flags } });
            }
            at = end;
            from = unpacked_blocks::end::<Xz>(from, length)?;
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

/// What goes before a block in a stream that has only this one.
fn header(kind: Kind) -> Vec<u8> {
    let crc = crc32fast::hash(&kind.flags).to_le_bytes();
    [&HEADER_MAGIC[..], &kind.flags, &crc].concat()
}

/// And what comes behind it: an index with one record, and a footer.
fn footer(block: &Block) -> Vec<u8> {
    let mut bytes = vec![0, 1];
    put_number(&mut bytes, block.kind.unpadded);
    put_number(&mut bytes, block.length);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    let mut footer = (bytes.len() as u32 / 4 - 1).to_le_bytes().to_vec();
    footer.extend(block.kind.flags);
    bytes.extend(crc32fast::hash(&footer).to_le_bytes());
    bytes.extend(footer);
    bytes.extend(FOOTER_MAGIC);
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::unpacked_blocks::testing::{blocks_of, damage_every_bit};
    use super::*;

    /// A stream of one block that is not looked into.
    fn stream(unpadded: u64, length: u64) -> Vec<u8> {
        let block = Block { packed: 0..0, start: 0, length, kind: Kind { unpadded, flags: [0, 4] } };
        [header(block.kind), vec![0xff; padded(unpadded).unwrap() as usize], footer(&block)].concat()
    }

    #[test]
    fn streams_follow_each_other_with_padding_between() {
        let one = stream(17, 1000);
        let other = stream(200, 300);
        let file = [&one[..], &[0; 8], &other[..], &[0; 4]].concat();
        let second = one.len() as u64 + 8 + ENDS;
        let flags = [0, 4];
        assert_eq!(
            blocks_of::<Xz>(&file).unwrap(),
            [
                Block { packed: 12..32, start: 0, length: 1000, kind: Kind { unpadded: 17, flags } },
                Block { packed: second..second + 200, start: 1000, length: 300, kind: Kind { unpadded: 200, flags } },
            ]
        );
    }

    #[test]
    fn no_damage_is_worse_than_an_error() {
        let file = [stream(17, 1000), stream(200, 300)].concat();
        damage_every_bit::<Xz>(&file);
        for length in 0..file.len() {
            assert!(blocks_of::<Xz>(&file[..length]).is_err() || length == stream(17, 1000).len());
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

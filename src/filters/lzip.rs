//! `lzip`: unpacks the next device while it is read, member by member, read-only (see `unpacked_blocks.rs`).
//!
//! A member's trailer tells how long the member is, and so where the one before it ends: they are found from the end of the
//! file. Files with many small members are the quickest (plzip --data-size).
//! Source: nbdkit filters/lzip/lzip.c, lzipfile.c, nbdkit-lzip-filter.pod; the lzip manual, "File format".

use std::io::{BufRead, Read};

use lzma_rust2::LzipReader;
use nbdcaptive_actors::device::{Error, Result, ThreadModel};

use super::kit::u64_at;
use super::unpacked_blocks::{self, Format, Unpack};
use crate::layer::{About, Parameter};

/// See the module.
pub static ABOUT: About = About {
    name: "lzip",
    summary: "unpack an lzip file, read-only

        Nothing is unpacked before it is read, and no temporary file is made. But a member is always unpacked as a
        whole: a file should have many small ones, as `plzip --data-size=16MiB` makes them. lzip(1) makes a single
        one of all of its input, for which `lzip-max-block` must be large enough.

        # Examples

            nbdcaptive --filter=lzip file disk.img.lz \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        Parameter {
            key: "lzip-max-block",
            value: "<SIZE>",
            help: "refuse files with larger members, unpacked; 512M unless given",
            required: false,
        },
        Parameter {
            key: "lzip-max-depth",
            value: "<N>",
            help: "members that are kept for each client, 8 unless given",
            required: false,
        },
    ],
    magic_key: None,
    thread_model: ThreadModel::SerializeRequests,
    dump: &[],
};

/// What a member begins with, the version included. Behind it comes a byte that tells the dictionary's size.
const MAGIC: [u8; 5] = *b"LZIP\x01";
/// How long a member's header and trailer are, in bytes.
const HEADER: usize = 6;
const TRAILER: usize = 20;
const ENDS: u64 = (HEADER + TRAILER) as u64;
/// The lowest five bits of the dictionary's byte: the power of two that is its size, or a little more than that.
const DICTIONARIES: std::ops::RangeInclusive<u8> = 12..=29;
/// The most members that are read, as each takes memory: those of 64 TiB as plzip packs it.
const MOST_MEMBERS: usize = 4 << 20;

/// The filter.
pub type Filter = Unpack<Lzip>;

/// The format. Nothing has to be known of a member to unpack it.
#[derive(Debug)]
pub struct Lzip;

type Block = unpacked_blocks::Block<()>;

impl Format for Lzip {
    const NAME: &'static str = ABOUT.name;
    type Kind = ();

    fn blocks(size: u64, read: impl Fn(&mut [u8], u64) -> Result<()>) -> Result<Vec<Block>> {
        if size < ENDS {
            return Err(failed("file too short"));
        }
        let mut header = [0; HEADER];
        read(&mut header, 0)?;
        if !header.starts_with(&MAGIC) {
            return Err(failed("not an lzip file"));
        }
        let mut trailer = [0; TRAILER];
        read(&mut trailer, size - TRAILER as u64)?;
        let mut blocks = Vec::new();
        let mut end = size;
        while end > 0 {
            if blocks.len() == MOST_MEMBERS {
                return Err(failed(format!("the file has more than {MOST_MEMBERS} members")));
            }
            let (length, member_size) = (u64_at(&trailer, 4), u64_at(&trailer, 12));
            let at = end.checked_sub(member_size).filter(|_| end >= ENDS && member_size >= ENDS);
            let at = at.ok_or_else(|| {
                failed(format!(
                    "no member ends at {end}: the file is damaged, cut short, or has something behind its last member"
                ))
            })?;
            // The member before this one ends here, so its trailer comes along.
            let before = at.min(TRAILER as u64) as usize;
            let mut bytes = [0; HEADER + TRAILER];
            read(&mut bytes[TRAILER - before..], at - before as u64)?;
            trailer.copy_from_slice(&bytes[..TRAILER]);
            let header = &bytes[TRAILER..];
            if !header.starts_with(&MAGIC) || !DICTIONARIES.contains(&(header[HEADER - 1] & 0x1f)) {
                return Err(failed(format!("invalid member header at {at}")));
            }
            blocks.push(Block { packed: at..end, start: 0, length, kind: () });
            end = at;
        }
        blocks.reverse();
        let mut from = 0;
        for block in &mut blocks {
            block.start = from;
            from = unpacked_blocks::end::<Lzip>(from, block.length)?;
        }
        blocks.retain(|block| block.length > 0);
        Ok(blocks)
    }

    /// Its dictionary grows with what is unpacked, whatever size the header asks for.
    fn decoder<R: BufRead>(_block: &Block, packed: R, _max_block: u64) -> impl Read {
        LzipReader::new(packed)
    }
}

fn failed(why: impl std::fmt::Display) -> Error {
    unpacked_blocks::failed::<Lzip>(why)
}

#[cfg(test)]
mod tests {
    use super::super::unpacked_blocks::testing::{blocks_of, damage_every_bit};
    use super::*;

    /// A member that is not looked into: `packed` bytes between its header and its trailer.
    fn member(packed: usize, length: u64) -> Vec<u8> {
        let size = (packed + HEADER + TRAILER) as u64;
        let middle = vec![0xff; packed];
        [&MAGIC[..], &[20], &middle, &[0; 4], &length.to_le_bytes(), &size.to_le_bytes()].concat()
    }

    fn refusal(file: &[u8]) -> String {
        blocks_of::<Lzip>(file).unwrap_err().to_string()
    }

    #[test]
    fn members_follow_each_other() {
        // The second one has no data, as lzip makes them of nothing.
        let file = [member(10, 1000), member(5, 0), member(100, 300)].concat();
        assert_eq!(
            blocks_of::<Lzip>(&file).unwrap(),
            [
                Block { packed: 0..36, start: 0, length: 1000, kind: () },
                Block { packed: 67..193, start: 1000, length: 300, kind: () },
            ]
        );
        assert_eq!(blocks_of::<Lzip>(&member(5, 0)).unwrap(), []);
    }

    #[test]
    fn what_is_no_row_of_members_is_refused() {
        let two = [member(10, 1000), member(100, 300)].concat();
        let with = |at: usize, bytes: &[u8]| {
            let mut file = two.clone();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            refusal(&file)
        };
        let last = two.len() - 8;
        assert_eq!(refusal(&two[..25]), "lzip: file too short");
        assert_eq!(with(0, b"x"), "lzip: not an lzip file");
        assert_eq!(with(4, &[0]), "lzip: not an lzip file");
        assert_eq!(with(5, &[11]), "lzip: invalid member header at 0");
        assert_eq!(with(36 + 5, &[0xfe]), "lzip: invalid member header at 36");
        assert_eq!(with(36, b"x"), "lzip: invalid member header at 36");
        for size in [25, 163, u64::MAX] {
            assert!(with(last, &size.to_le_bytes()).starts_with("lzip: no member ends at 162: "));
        }
        assert_eq!(with(28, &35u64.to_le_bytes()), "lzip: invalid member header at 1");
        // Where the first one would have to begin there is too little for it.
        let short = [&MAGIC[..], &[0; 20], &member(9, 1)].concat();
        assert!(refusal(&short).starts_with("lzip: no member ends at 25: "));
        // What follows the last member is no part of the format.
        assert!(refusal(&[&two[..], &[0; 512]].concat()).starts_with("lzip: no member ends at 674: "));
        let huge = [member(10, 1 << 62), member(10, 1 << 62)].concat();
        assert_eq!(refusal(&huge), "lzip: the uncompressed data is larger than 2^63-1");
    }

    #[test]
    fn no_damage_is_worse_than_an_error() {
        let file = [member(17, 1000), member(5, 0), member(200, 300)].concat();
        damage_every_bit::<Lzip>(&file);
        for length in 0..file.len() {
            assert!(blocks_of::<Lzip>(&file[..length]).is_err() || [43, 43 + 31].contains(&length));
        }
    }
}

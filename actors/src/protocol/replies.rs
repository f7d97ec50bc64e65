//! The transmission phase: replies. Source: NBD doc/proto.md "Simple reply message", "Structured reply chunk message",
//! "Extended reply chunk message" and "Reply types".

use std::ops::Range;

use super::constants::*;
use super::transmission::{Contexts, Headers};
use crate::extents::Extents;
use crate::segments::{Mark, Piece, Segments, piece_length};

/// The length of a simple reply's header, in bytes.
pub const SIMPLE_REPLY_HEADER: usize = 16;
/// The length of a structured reply chunk's header, in bytes.
pub const CHUNK_HEADER: usize = 20;
/// The length of an extended reply chunk's header, in bytes.
pub const EXTENDED_CHUNK_HEADER: usize = 32;
/// Why a read fails that is sent from a file.
pub(crate) const FILE_ENDED: &str = "the file ended while it was read, or could not be read";
/// Where the flags are in a chunk's header of either kind.
const CHUNK_FLAGS: Range<usize> = 4..6;
/// From here on zeroes are worth a chunk of their own, in bytes: it takes 32 or 44.
const HOLE_WORTH: usize = 4096;
/// The longest extent of a compact reply, in bytes: what is cut off there is still aligned to every block size that can be
/// agreed on. Source: nbdkit server/protocol.c `extents_to_block_descriptors`.
const LONGEST_EXTENT: u32 = 0xffff_0000;

/// Which request a reply is for, and how it looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// As agreed.
    pub headers: Headers,
    /// The request's.
    pub cookie: u64,
    /// The request's: extended headers repeat it.
    pub offset: u64,
}

impl ReplyTo {
    /// A chunk's header; `length` is that of its payload.
    fn chunk(&self, out: &mut Segments, flags: u16, kind: u16, length: u32) {
        if self.headers == Headers::Extended {
            let mut bytes = [0; EXTENDED_CHUNK_HEADER];
            bytes[..4].copy_from_slice(&NBD_EXTENDED_REPLY_MAGIC.to_be_bytes());
            bytes[4..6].copy_from_slice(&flags.to_be_bytes());
            bytes[6..8].copy_from_slice(&kind.to_be_bytes());
            bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
            bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
            bytes[24..].copy_from_slice(&u64::from(length).to_be_bytes());
            out.extend(&bytes);
        } else {
            let mut bytes = [0; CHUNK_HEADER];
            bytes[..4].copy_from_slice(&NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes());
            bytes[4..6].copy_from_slice(&flags.to_be_bytes());
            bytes[6..8].copy_from_slice(&kind.to_be_bytes());
            bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
            bytes[16..].copy_from_slice(&length.to_be_bytes());
            out.extend(&bytes);
        }
    }

    fn simple(&self, out: &mut Segments, error: u32) {
        let mut bytes = [0; SIMPLE_REPLY_HEADER];
        bytes[..4].copy_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&error.to_be_bytes());
        bytes[8..].copy_from_slice(&self.cookie.to_be_bytes());
        out.extend(&bytes);
    }

    /// Appends what precedes the data of a read, all of it in one chunk: `length` bytes, at most [`MAX_PAYLOAD`].
    pub fn read(&self, out: &mut Segments, length: u32) {
        if self.headers == Headers::Simple {
            self.simple(out, 0);
        } else if length == 0 {
            // A chunk of data has at least one byte.
            self.chunk(out, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, 0);
        } else {
            self.data(out, NBD_REPLY_FLAG_DONE, self.offset, length);
        }
    }

    fn data(&self, out: &mut Segments, flags: u16, offset: u64, length: u32) {
        self.chunk(out, flags, NBD_REPLY_TYPE_OFFSET_DATA, length + 8);
        out.extend(&offset.to_be_bytes());
    }

    fn hole(&self, out: &mut Segments, flags: u16, offset: u64, length: u32) {
        self.chunk(out, flags, NBD_REPLY_TYPE_OFFSET_HOLE, 12);
        out.extend(&offset.to_be_bytes());
        out.extend(&length.to_be_bytes());
    }

    /// Completes a reply in one chunk, which begins at `start` and whose data, now all there, begins at `data`. With a `block` it
    /// becomes one that says where the data is nothing but zeroes, if there is enough of that; chunks then begin and end at
    /// multiples of so many bytes. What is sent from files may still fail: then the chunk behind the data says how that went.
    pub(crate) fn complete(&self, out: &mut Segments, start: Mark, data: Mark, block: Option<u32>) {
        if self.headers == Headers::Simple {
            return;
        }
        let may_fail = out.has_files(data);
        let done = if may_fail { 0 } else { NBD_REPLY_FLAG_DONE };
        let is_sparse = block.is_some_and(|block| self.make_sparse(out, start, data, block, done));
        if may_fail {
            if !is_sparse {
                out.own_since(start)[CHUNK_FLAGS].copy_from_slice(&done.to_be_bytes());
            }
            let start = out.mark();
            self.chunk(out, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, 0);
            let between = out.mark();
            self.error(out, ErrorCode::Io, FILE_ENDED);
            out.end_by_files(start, between);
        }
    }

    /// Makes one chunk into several, if there are zeroes enough; the last has the flag `done`. Whether it did.
    fn make_sparse(&self, out: &mut Segments, start: Mark, data: Mark, block: u32, done: u16) -> bool {
        let block = u64::from(block.max(1));
        let is_hole = |offset: u64, zeroes: usize| {
            zeroes >= HOLE_WORTH && offset.is_multiple_of(block) && (zeroes as u64).is_multiple_of(block)
        };
        let mut offset = self.offset;
        let any = out.since(data).any(|(length, zeroes)| {
            let found = zeroes && is_hole(offset, length);
            offset += length as u64;
            found
        });
        if !any {
            return false;
        }
        // A read has at most MAX_PAYLOAD bytes, so that every length below fits.
        let mut offset = self.offset;
        let pieces = out.lift(start, data);
        let mut rest = &pieces[..];
        while let Some(first) = rest.first() {
            let is_end = |rest: &[_]| if rest.is_empty() { done } else { 0 };
            if is_zeroes(first) && is_hole(offset, piece_length(first)) {
                rest = &rest[1..];
                self.hole(out, is_end(rest), offset, piece_length(first) as u32);
                offset += piece_length(first) as u64;
                continue;
            }
            let (mut count, mut length) = (0, 0);
            for piece in rest {
                if is_zeroes(piece) && is_hole(offset + length as u64, piece_length(piece)) {
                    break;
                }
                count += 1;
                length += piece_length(piece);
            }
            let (these, others) = rest.split_at(count);
            rest = others;
            self.data(out, is_end(rest), offset, length as u32);
            these.iter().for_each(|piece| out.put_back(piece.clone()));
            offset += length as u64;
        }
        true
    }

    /// Appends the reply to a request that succeeded and has no data.
    pub fn done(&self, out: &mut Segments) {
        if self.headers == Headers::Extended {
            self.chunk(out, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, 0);
        } else {
            self.simple(out, 0);
        }
    }

    /// Appends the extents of number `context` of an export of `size` bytes, the `last` of a reply or not. For a compact request
    /// an extent that is too long for it ends the map.
    pub fn block_status(&self, out: &mut Segments, context: u32, extents: &Extents, size: u64, last: bool) {
        let flags = if last { NBD_REPLY_FLAG_DONE } else { 0 };
        let list = extents.answer(size);
        if self.headers == Headers::Extended {
            // There are at most MAX_EXTENTS of them.
            let count = list.len() as u32;
            self.chunk(out, flags, NBD_REPLY_TYPE_BLOCK_STATUS_EXT, 8 + 16 * count);
            out.extend(&Contexts::id(context).to_be_bytes());
            out.extend(&count.to_be_bytes());
            for extent in list {
                out.extend(&extent.length.to_be_bytes());
                out.extend(&extent.flags.to_be_bytes());
            }
        } else {
            let mut list: Vec<_> = list.collect();
            if let Some(long) =
                list.iter().position(|extent| extent.length > u64::from(LONGEST_EXTENT) && !extents.one())
            {
                list.truncate(long + 1);
                list[long].length = u64::from(LONGEST_EXTENT);
            }
            self.chunk(out, flags, NBD_REPLY_TYPE_BLOCK_STATUS, 4 + 8 * list.len() as u32);
            out.extend(&Contexts::id(context).to_be_bytes());
            for extent in list {
                out.extend(&(extent.length as u32).to_be_bytes());
                // Contexts with wider flags are not selected without extended headers.
                out.extend(&(extent.flags as u32).to_be_bytes());
            }
        }
    }

    /// Appends the reply to a request that failed: with `why`, where the client can take it.
    pub fn error(&self, out: &mut Segments, code: ErrorCode, why: &str) {
        if self.headers == Headers::Simple {
            self.simple(out, code.wire());
            return;
        }
        let mut end = why.len().min(NBD_MAX_STRING);
        while !why.is_char_boundary(end) {
            end -= 1;
        }
        self.chunk(out, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, 6 + end as u32);
        out.extend(&code.wire().to_be_bytes());
        out.extend(&(end as u16).to_be_bytes());
        out.extend(&why.as_bytes()[..end]);
    }
}

fn is_zeroes(piece: &Piece) -> bool {
    matches!(piece, Piece::Zeroes(_))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segments::Shared;
    use std::sync::Arc;

    const TO: ReplyTo = ReplyTo { headers: Headers::Structured, cookie: 7, offset: 8192 };

    /// The type, the flags and the payload of each chunk.
    fn all_chunks(out: &Segments) -> Vec<(u16, u16, Vec<u8>)> {
        let all = out.to_vec();
        let mut rest = &all[..];
        let mut chunks = Vec::new();
        while let Some((header, behind)) = rest.split_first_chunk::<CHUNK_HEADER>() {
            let number = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
            let length = usize::from(number(16)) << 16 | usize::from(number(18));
            chunks.push((number(6), number(4), behind[..length].to_vec()));
            rest = &behind[length..];
        }
        chunks
    }

    /// Offset, length and whether it is a hole, of each chunk; the last must say that it is, and no other.
    fn chunks(out: &Segments) -> Vec<(u64, usize, bool)> {
        let all = all_chunks(out);
        let number = |bytes: &[u8]| bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
        let content = |(at, (kind, flags, payload)): (usize, &(u16, u16, Vec<u8>))| {
            assert_eq!(*flags == NBD_REPLY_FLAG_DONE, at + 1 == all.len(), "the flag of the last chunk");
            let is_hole = *kind == NBD_REPLY_TYPE_OFFSET_HOLE;
            let covers = if is_hole { number(&payload[8..12]) as usize } else { payload.len() - 8 };
            (number(&payload[..8]), covers, is_hole)
        };
        all.iter().enumerate().map(content).collect()
    }

    fn sparse(fill: impl Fn(&mut Segments), block: u32) -> Segments {
        let mut out = Segments::default();
        fill(&mut out);
        let length = out.len() as u32;
        out.clear(0);
        out.extend(b"");
        let start = out.mark();
        TO.read(&mut out, length);
        let data = out.mark();
        fill(&mut out);
        TO.complete(&mut out, start, data, Some(block));
        out
    }

    #[test]
    fn zeroes_between_data_are_a_hole() {
        let lent: Shared = Arc::new(*b"xyz");
        let out = sparse(
            |out| {
                out.extend(b"ab");
                out.shared(Arc::clone(&lent), 1..3);
                out.zeroes(4096);
                out.extend(b"cd");
            },
            1,
        );
        assert_eq!(chunks(&out), [(8192, 4, false), (8196, 4096, true), (12292, 2, false)]);
        let all = out.to_vec();
        assert_eq!(&all[CHUNK_HEADER + 8..][..4], b"abyz");
        assert_eq!(&all[all.len() - 2..], b"cd");
    }

    #[test]
    fn few_zeroes_or_crooked_ones_are_data() {
        let few = sparse(|out| out.zeroes(4095), 1);
        assert_eq!(few.len(), CHUNK_HEADER + 8 + 4095);
        let crooked = |out: &mut Segments| {
            out.zeroes(4608);
            out.extend(&[1; 3584]);
        };
        assert_eq!(chunks(&sparse(crooked, 512)), [(8192, 4608, true), (12800, 3584, false)]);
        assert_eq!(sparse(crooked, 1024).len(), CHUNK_HEADER + 8 + 8192);
    }

    #[test]
    fn nothing_but_zeroes_is_one_hole() {
        assert_eq!(chunks(&sparse(|out| out.zeroes(1 << 20), 1)), [(8192, 1 << 20, true)]);
    }

    #[test]
    fn a_reply_before_it_stays_as_it_is() {
        let mut out = Segments::default();
        TO.done(&mut out);
        let start = out.mark();
        TO.read(&mut out, 4098);
        let data = out.mark();
        out.extend(b"ab");
        out.zeroes(4096);
        TO.complete(&mut out, start, data, Some(1));
        let all = out.to_vec();
        assert_eq!(all.len(), SIMPLE_REPLY_HEADER + CHUNK_HEADER + 8 + 2 + CHUNK_HEADER + 12);
        assert_eq!(out.len(), all.len());
        out.truncate(start);
        assert_eq!(out.to_vec(), all[..SIMPLE_REPLY_HEADER]);
    }

    /// "MUST NOT do so for a content chunk if it would still be possible to detect an error while transmitting the chunk".
    #[test]
    fn what_is_sent_from_files_ends_with_how_that_went() {
        let file = Arc::new(std::fs::File::open("/dev/zero").unwrap());
        let from_file = |out: &mut Segments| out.file(Arc::clone(&file), 0, 10);
        let between_zeroes = |out: &mut Segments| {
            out.file(Arc::clone(&file), 0, 512);
            out.zeroes(4096);
            out.file(Arc::clone(&file), 0, 512);
            out.file(Arc::clone(&file), 0, 512);
        };
        for (mut out, content) in [(sparse(from_file, 1), vec![1]), (sparse(between_zeroes, 512), vec![1, 2, 1])] {
            TO.done(&mut out);
            // The end of a later reply is its own.
            let start = out.mark();
            TO.read(&mut out, 10);
            let data = out.mark();
            out.file(Arc::clone(&file), 0, 10);
            TO.complete(&mut out, start, data, None);
            let simple = SIMPLE_REPLY_HEADER;
            let second = CHUNK_HEADER + 8 + 10 + CHUNK_HEADER;

            let first = out.to_vec().len() - simple - second;
            let kinds = |out: &Segments, from: usize, to: usize| {
                let mut part = Segments::default();
                part.extend(&out.to_vec()[from..to]);
                let chunks = all_chunks(&part);
                let (last, before) = chunks.split_last().unwrap();
                assert_eq!(last.1, NBD_REPLY_FLAG_DONE);
                assert!(before.iter().all(|(_, flags, _)| *flags == 0));
                (before.iter().map(|(kind, ..)| *kind).collect::<Vec<_>>(), last.0, last.2.clone())
            };
            assert_eq!(kinds(&out, 0, first), (content.clone(), NBD_REPLY_TYPE_NONE, vec![]));

            let place = out.pieces().iter().position(|piece| matches!(piece, Piece::File(..))).unwrap();
            assert!(out.give_up_files(place));
            let all = out.to_vec().len();
            let (before, last, why) = kinds(&out, 0, all - simple - second);
            assert_eq!((before, last, &why[..4]), (content, NBD_REPLY_TYPE_ERROR, &[0, 0, 0, 5][..]));
            assert_eq!(kinds(&out, all - second, all), (vec![1], NBD_REPLY_TYPE_NONE, vec![]));
        }
        let simple = ReplyTo { headers: Headers::Simple, ..TO };
        let mut out = Segments::default();
        let start = out.mark();
        simple.read(&mut out, 10);
        let data = out.mark();
        from_file(&mut out);
        simple.complete(&mut out, start, data, Some(1));
        assert_eq!(out.len(), SIMPLE_REPLY_HEADER + 10);
        assert!(!out.give_up_files(1), "there is no place for an error");
    }

    #[test]
    fn an_error_message_is_cut_between_characters() {
        let mut out = Segments::default();
        let why = "é".repeat(NBD_MAX_STRING);
        TO.error(&mut out, ErrorCode::Io, &format!("x{why}"));
        assert_eq!(out.len(), CHUNK_HEADER + 6 + NBD_MAX_STRING - 1);
    }
}

//! Content that is being described: pieces at offsets, and nothing between them, which reads as zeroes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use nbdcaptive_actors::device::{Call, Device, Flags};

use super::LIMIT;

/// The most pieces that content may have.
const MAX_PIECES: usize = 1 << 20;
/// Repeated content of more pieces than this becomes one, if it is not too large.
const FLATTEN: u64 = 64;
/// The largest offset.
const MAX_OFFSET: u64 = i64::MAX as u64;

/// Bytes at one place.
#[derive(Debug, Clone)]
enum Piece {
    /// A range of bytes that others may have too.
    Bytes(Rc<[u8]>, Range<usize>),
    /// One byte so often, at least once.
    Fill(u8, u64),
}

impl Piece {
    fn length(&self) -> u64 {
        match self {
            Piece::Bytes(_, range) => range.len() as u64,
            Piece::Fill(_, count) => *count,
        }
    }

    /// A part of it, which is not empty.
    fn part(&self, range: Range<u64>) -> Piece {
        match self {
            // No longer than the bytes, whose count is a `usize`.
            Piece::Bytes(bytes, whole) => {
                Piece::Bytes(Rc::clone(bytes), whole.start + range.start as usize..whole.start + range.end as usize)
            }
            Piece::Fill(byte, _) => Piece::Fill(*byte, range.end - range.start),
        }
    }
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Content {
    size: u64,
    /// By offset; none overlaps another, none is empty.
    pieces: BTreeMap<u64, Piece>,
}

const TOO_LARGE: &str = "data parameter: the content is larger than 2^63-1 bytes";

/// An offset that is `length` further on.
pub fn advance(offset: u64, length: u64) -> Result<u64, String> {
    offset.checked_add(length).filter(|end| *end <= MAX_OFFSET).ok_or_else(|| TOO_LARGE.to_owned())
}

impl Content {
    /// These bytes.
    pub fn bytes(bytes: Vec<u8>) -> Content {
        let size = bytes.len() as u64;
        let whole = 0..bytes.len();
        let piece = (!bytes.is_empty()).then(|| (0, Piece::Bytes(bytes.into(), whole)));
        Content { size, pieces: piece.into_iter().collect() }
    }

    /// Bytes, up to the furthest offset that was reached.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// An offset was reached.
    pub fn reach(&mut self, offset: u64) {
        self.size = self.size.max(offset);
    }

    /// Empties a range.
    fn clear(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let before = self.pieces.range(..range.start).next_back().map(|(start, _)| *start);
        let first = before.filter(|start| start + self.pieces[start].length() > range.start).unwrap_or(range.start);
        let touched: Vec<u64> = self.pieces.range(first..range.end).map(|(start, _)| *start).collect();
        for start in touched {
            let Some(piece) = self.pieces.remove(&start) else { continue };
            let end = start + piece.length();
            if start < range.start {
                self.pieces.insert(start, piece.part(0..range.start - start));
            }
            if end > range.end {
                self.pieces.insert(range.end, piece.part(range.end - start..end - start));
            }
        }
    }

    /// Puts a part of other content at an offset, over what is there, and says where it ends.
    pub fn put(&mut self, at: u64, other: &Content, part: Range<u64>) -> Result<u64, String> {
        let end = advance(at, part.end - part.start)?;
        self.clear(at..end);
        let before = other.pieces.range(..part.start).next_back().map_or(part.start, |(start, _)| *start);
        for (start, piece) in other.pieces.range(before..part.end) {
            let from = (*start).max(part.start);
            let to = (start + piece.length()).min(part.end);
            if from < to {
                self.pieces.insert(at + (from - part.start), piece.part(from - start..to - start));
            }
        }
        if self.pieces.len() > MAX_PIECES {
            return Err(format!("data parameter: the content has more than {MAX_PIECES} pieces"));
        }
        self.reach(end);
        Ok(end)
    }

    /// This content `count` times in a row.
    pub fn repeated(&self, count: u64) -> Result<Content, String> {
        let size =
            self.size.checked_mul(count).filter(|size| *size <= MAX_OFFSET).ok_or_else(|| {
                format!("data parameter: multiplication overflow: {} bytes, {count} times", self.size)
            })?;
        let mut all = Content { size, pieces: BTreeMap::new() };
        match self.single_byte() {
            _ if size == 0 || self.pieces.is_empty() => return Ok(all),
            // What is filled with zeroes takes no memory.
            Some(0) => return Ok(all),
            Some(byte) => {
                all.pieces.insert(0, Piece::Fill(byte, size));
                return Ok(all);
            }
            None => {}
        }
        let pieces = count.saturating_mul(self.pieces.len() as u64);
        // Not what is mostly nothing: that stays in pieces.
        if pieces > FLATTEN && size <= LIMIT && size / pieces < 4096 {
            let once = self.flat();
            return Ok(Content::bytes(once.repeat(count as usize)));
        }
        if pieces > MAX_PIECES as u64 {
            return Err(format!("data parameter: the content has more than {MAX_PIECES} pieces"));
        }
        let mut at = 0;
        for _ in 0..count {
            at = all.put(at, self, 0..self.size)?;
        }
        Ok(all)
    }

    /// The byte that all of it is, if it is so without a look at more than one byte and a fill.
    fn single_byte(&self) -> Option<u8> {
        let (start, piece) = self.pieces.first_key_value()?;
        if *start != 0 || piece.length() != self.size {
            return None;
        }
        match piece {
            Piece::Fill(byte, _) => Some(*byte),
            Piece::Bytes(bytes, range) => {
                let first = bytes.get(range.start)?;
                bytes[range.clone()].iter().all(|byte| byte == first).then_some(*first)
            }
        }
    }

    /// All bytes. Its size was checked.
    fn flat(&self) -> Vec<u8> {
        let mut all = vec![0; self.size as usize];
        for (start, piece) in &self.pieces {
            let place = &mut all[*start as usize..][..piece.length() as usize];
            match piece {
                Piece::Bytes(bytes, range) => place.copy_from_slice(&bytes[range.clone()]),
                Piece::Fill(byte, _) => place.fill(*byte),
            }
        }
        all
    }

    /// Writes what lies below `size`.
    pub fn write_to(&self, disk: &dyn Device, size: u64) -> Result<(), String> {
        const AT_ONCE: u64 = 64 * 1024;
        let mut left = LIMIT;
        let parts = self.pieces.range(..size).map(|(start, piece)| (*start, piece, piece.length().min(size - start)));
        for (start, piece, length) in parts {
            left = left
                .checked_sub(length)
                .ok_or_else(|| format!("data parameter: the content takes more than {LIMIT} bytes"))?;
            let mut done = 0;
            while done < length {
                let part = piece.part(done..length.min(done + AT_ONCE));
                let buffer;
                let bytes = match &part {
                    Piece::Bytes(bytes, range) => &bytes[range.clone()],
                    Piece::Fill(byte, count) => {
                        buffer = vec![*byte; *count as usize];
                        &buffer
                    }
                };
                let written = disk.write(bytes, start + done, Flags::default(), &Call::BLOCKING);
                written.map_err(|error| error.to_string())?;
                done += part.length();
            }
        }
        Ok(())
    }
}

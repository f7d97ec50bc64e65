//! The data of a read on its way out: pieces of memory in the order in which they are sent, copied only where there is
//! no other way.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Memory that a device lends for as long as a reply takes to be sent.
pub type Shared = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// One piece of what is to be sent.
#[derive(Clone)]
pub(crate) enum Piece {
    /// A range of the owner's own buffer.
    Own(Range<usize>),
    /// A range of memory that a device lent.
    Lent(Shared, Range<usize>),
    /// So many bytes of a file from an offset.
    File(Arc<File>, u64, usize),
    /// So many zeroes.
    Zeroes(usize),
    /// The end of a reply with pieces of files before it: the first range of the owner's own buffer if all of them could be
    /// sent, else the second.
    End(Range<usize>, Range<usize>),
}

/// What a read appends its data to. See [`crate::device::Device::read_segments`].
///
/// The buffer in it is used again and again, so that in the steady state nothing is allocated and nothing is cleared.
#[derive(Default)]
pub struct Segments {
    /// Bytes up to `used` belong to pieces; those behind are left over from earlier use.
    own: Vec<u8>,
    used: usize,
    pieces: Vec<Piece>,
    length: usize,
}

/// A place to return to: see [`Segments::truncate`].
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    used: usize,
    pieces: usize,
    length: usize,
}

impl Segments {
    /// Appends `length` bytes for the caller to fill. They hold anything before that, also other replies' data.
    pub fn space(&mut self, length: usize) -> &mut [u8] {
        if length == 0 {
            return &mut [];
        }
        let start = self.used;
        let end = start + length;
        if end > self.own.len() {
            self.own.resize(end.next_multiple_of(4096), 0);
        }
        match self.pieces.last_mut() {
            Some(Piece::Own(range)) if range.end == start => range.end = end,
            _ => self.pieces.push(Piece::Own(start..end)),
        }
        self.used = end;
        self.length += length;
        &mut self.own[start..end]
    }

    /// Appends `range` of memory that the device shares. Nothing is copied; it must not change until it is dropped.
    pub fn shared(&mut self, memory: Shared, range: Range<usize>) {
        if !range.is_empty() {
            self.length += range.len();
            self.pieces.push(Piece::Lent(memory, range));
        }
    }

    /// Appends `length` bytes of `file` from `offset`, which go from the page cache to the client without a copy in this
    /// process. They should be in the cache: whoever sends them waits for a disk otherwise. Where the file has ended before
    /// them by then, or cannot be read, the read fails with `NBD_EIO`; a client without structured replies is disconnected, for
    /// its reply has begun and has no place for an error (NBD doc/proto.md `NBD_CMD_READ`). Where SIGPIPE is neither blocked nor
    /// ignored, a client that goes meanwhile raises it.
    pub fn file(&mut self, file: Arc<File>, offset: u64, length: usize) {
        if length > 0 {
            self.length += length;
            self.pieces.push(Piece::File(file, offset, length));
        }
    }

    /// Appends `length` zeroes.
    pub fn zeroes(&mut self, length: usize) {
        if length == 0 {
            return;
        }
        self.length += length;
        match self.pieces.last_mut() {
            Some(Piece::Zeroes(before)) => *before += length,
            _ => self.pieces.push(Piece::Zeroes(length)),
        }
    }

    /// How many bytes were appended.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing was appended.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// How many of the bytes were appended as zeroes, by [`Segments::zeroes`].
    pub fn holes(&self) -> usize {
        let zeroes = |piece: &Piece| if let Piece::Zeroes(count) = piece { *count } else { 0 };
        self.pieces.iter().map(zeroes).sum()
    }

    /// A copy of all that was appended, which reads files and may wait for them; zeroes stand where that fails. For a filter that changes the data of the next device, and for tests.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.length);
        for piece in &self.pieces {
            match piece {
                Piece::Own(range) => all.extend_from_slice(&self.own[range.clone()]),
                Piece::Lent(memory, range) => all.extend_from_slice(&(**memory).as_ref()[range.clone()]),
                Piece::File(file, offset, count) => {
                    let start = all.len();
                    all.resize(start + count, 0);
                    let _ = file.read_exact_at(&mut all[start..], *offset);
                }
                Piece::Zeroes(count) => all.resize(all.len() + count, 0),
                Piece::End(sent, _) => all.extend_from_slice(&self.own[sent.clone()]),
            }
        }
        all
    }

    pub(crate) fn extend(&mut self, bytes: &[u8]) {
        self.space(bytes.len()).copy_from_slice(bytes);
    }

    /// Where [`Segments::truncate`] returns to.
    pub fn mark(&self) -> Mark {
        Mark { used: self.used, pieces: self.pieces.len(), length: self.length }
    }

    /// Forgets all that was appended since `mark`.
    pub fn truncate(&mut self, mark: Mark) {
        self.pieces.truncate(mark.pieces);
        // A piece that began before the mark and grew after it is cut back.
        if let Some(Piece::Own(range)) = self.pieces.last_mut() {
            range.end = range.end.min(mark.used);
        }
        if let Some((Piece::Zeroes(count), before)) = self.pieces.split_last_mut() {
            *count = mark.length - before.iter().map(piece_length).sum::<usize>();
        }
        self.used = mark.used;
        self.length = mark.length;
    }

    /// The lengths of the pieces since `mark`, and which are nothing but zeroes. Zeroes since `mark` are pieces of their own if
    /// what is before it is not zeroes.
    pub(crate) fn since(&self, mark: Mark) -> impl Iterator<Item = (usize, bool)> {
        let grown = mark.pieces.checked_sub(1).and_then(|last| match &self.pieces[last] {
            Piece::Own(range) => Some((range.end - mark.used, false)),
            _ => None,
        });
        let fresh = self.pieces[mark.pieces..].iter();
        grown.into_iter().chain(fresh.map(|piece| (piece_length(piece), matches!(piece, Piece::Zeroes(_)))))
    }

    /// Takes out all that was appended since `from` and returns what of it was appended since `to`, for
    /// [`Segments::put_back`]. Behind both marks there must be something that is not zeroes, or nothing.
    pub(crate) fn lift(&mut self, from: Mark, to: Mark) -> Vec<Piece> {
        let used = self.used;
        let mut lifted = Vec::with_capacity(self.pieces.len() - to.pieces + 1);
        if let Some(Piece::Own(range)) = to.pieces.checked_sub(1).map(|last| &self.pieces[last])
            && range.end > to.used
        {
            lifted.push(Piece::Own(to.used..range.end));
        }
        lifted.extend(self.pieces.drain(to.pieces..));
        self.truncate(from);
        // What was lifted is still there.
        self.used = used;
        lifted
    }

    /// Appends what was lifted.
    pub(crate) fn put_back(&mut self, piece: Piece) {
        self.length += piece_length(&piece);
        self.pieces.push(piece);
    }

    /// Whether there are pieces of files among what was appended since `mark`.
    pub(crate) fn has_files(&self, mark: Mark) -> bool {
        self.pieces[mark.pieces..].iter().any(|piece| matches!(piece, Piece::File(..)))
    }

    /// Has what was appended from `start` to `between` sent if all the pieces of files before it could be, else what was
    /// appended after `between`. Both must have been copied here.
    pub(crate) fn end_by_files(&mut self, start: Mark, between: Mark) {
        let used = self.used;
        self.truncate(start);
        self.used = used;
        self.length += between.used - start.used;
        self.pieces.push(Piece::End(start.used..between.used, between.used..used));
    }

    /// The file of piece `index` does not have what is to be sent of it: zeroes take its place and that of all other files in the
    /// same reply, which ends as it does then. Whether it has such an end.
    pub(crate) fn give_up_files(&mut self, index: usize) -> bool {
        let Some(end) = self.pieces[index..].iter().position(|piece| matches!(piece, Piece::End(..))) else {
            return false;
        };
        for piece in &mut self.pieces[index..=index + end] {
            match piece {
                Piece::File(_, _, count) => *piece = Piece::Zeroes(*count),
                Piece::End(_, failed) => *piece = Piece::Own(failed.clone()),
                _ => {}
            }
        }
        true
    }

    /// The copied bytes since `mark`, to be changed.
    pub(crate) fn own_since(&mut self, mark: Mark) -> &mut [u8] {
        &mut self.own[mark.used..self.used]
    }

    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    pub(crate) fn own(&self) -> &[u8] {
        &self.own
    }

    /// How many bytes of memory it holds for copies.
    pub(crate) fn capacity(&self) -> usize {
        self.own.capacity()
    }

    /// Empties it and keeps the buffer, unless the buffer has grown past `keep` bytes.
    pub(crate) fn clear(&mut self, keep: usize) {
        self.pieces.clear();
        self.used = 0;
        self.length = 0;
        if self.own.len() > keep {
            self.own = Vec::new();
        }
    }
}

pub(crate) fn piece_length(piece: &Piece) -> usize {
    match piece {
        Piece::Own(range) | Piece::Lent(_, range) | Piece::End(range, _) => range.len(),
        Piece::File(_, _, count) | Piece::Zeroes(count) => *count,
    }
}

impl fmt::Debug for Segments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segments").field("length", &self.length).field("pieces", &self.pieces.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(segments: &Segments) -> Vec<u8> {
        let all = segments.to_vec();
        assert_eq!(all.len(), segments.len());
        all
    }

    #[test]
    fn pieces_keep_their_order() {
        let mut segments = Segments::default();
        segments.extend(b"ab");
        segments.shared(Arc::new(*b"cdef"), 1..3);
        segments.zeroes(2);
        segments.extend(b"g");
        assert_eq!(bytes(&segments), b"abde\0\0g");
    }

    #[test]
    fn nothing_is_no_piece() {
        let mut segments = Segments::default();
        segments.space(0);
        segments.shared(Arc::new(*b"abc"), 1..1);
        segments.zeroes(0);
        segments.file(Arc::new(File::open("/dev/zero").unwrap()), 0, 0);
        assert!(segments.pieces().is_empty() && segments.is_empty());
    }

    #[test]
    fn truncate_returns_to_the_mark_inside_a_piece() {
        let mut segments = Segments::default();
        segments.extend(b"ab");
        segments.zeroes(2);
        let mark = segments.mark();
        segments.zeroes(3);
        segments.extend(b"xyz");
        segments.truncate(mark);
        assert_eq!(bytes(&segments), b"ab\0\0");
        segments.extend(b"c");
        assert_eq!(bytes(&segments), b"ab\0\0c");
        let mut segments = Segments::default();
        segments.extend(b"ab");
        let mark = segments.mark();
        segments.extend(b"cd");
        segments.truncate(mark);
        assert_eq!(bytes(&segments), b"ab");
    }
}

//! Which requests wait for which replies, and what a reply may say. No channel and no socket, so a test is a list of
//! chunks. Source: NBD doc/proto.md "Structured reply types", "Request types".

use std::collections::{BTreeMap, HashMap};

use super::Error;
use crate::protocol::client::{Body, Chunk, Extent, Violation};
use crate::protocol::constants::*;
use crate::protocol::transmission::Headers;

/// The most stretches of data with gaps between them that are kept track of in one reply. Pieces of 512 bytes that all
/// leave a gap of 512 bytes, in the longest read there is, are as many.
const MAX_PIECES: usize = 65536;

/// What one context says about a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextStatus {
    /// The context's id, as in [`super::Export::contexts`].
    pub id: u32,
    /// At least one extent, from the request's offset on. All may end before the range does, and the last may go on behind it.
    pub extents: Vec<Extent>,
}

/// What a request comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    Data(Vec<u8>),
    Status(Vec<ContextStatus>),
}

/// What replies to a request are checked against.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// `NBD_CMD_*`
    pub kind: u16,
    /// `NBD_CMD_FLAG_*`
    pub flags: u16,
    pub offset: u64,
    /// Bytes of the export.
    pub length: u64,
    /// The contexts that a block status is asked of, with whether each is of the namespace `base:`.
    pub contexts: Vec<(u32, bool)>,
}

/// What becomes of a reply.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is more to come.
    More,
    /// So much data follows, for this place in [`Table::space`].
    Data { at: usize, length: usize },
    /// The request is answered: to be taken by [`Table::finish`].
    Last,
}

/// A request whose last reply has not come.
struct Pending<W> {
    asked: Asked,
    /// Who waits for it.
    waiter: W,
    data: Vec<u8>,
    covered: Coverage,
    status: Vec<ContextStatus>,
    /// The first error, with its text.
    failure: Option<(u32, String)>,
}

/// All requests that are under way. `W` is who waits for one.
pub(super) struct Table<W> {
    headers: Headers,
    /// Never used twice, so that a reply to what was answered already is told from one to what was never asked.
    next_cookie: u64,
    pending: HashMap<u64, Pending<W>>,
}

impl<W> Table<W> {
    pub(super) fn new(headers: Headers) -> Table<W> {
        Table { headers, next_cookie: 1, pending: HashMap::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.pending.len()
    }

    /// Notes a request, and says by which cookie it goes.
    pub(super) fn add(&mut self, asked: Asked, waiter: W) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let (data, covered, status) = (Vec::new(), Coverage::default(), Vec::new());
        self.pending.insert(cookie, Pending { asked, waiter, data, covered, status, failure: None });
        cookie
    }

    /// All who wait, for nothing any more.
    pub(super) fn take_waiters(&mut self) -> impl Iterator<Item = W> {
        std::mem::take(&mut self.pending).into_values().map(|pending| pending.waiter)
    }

    fn get(&mut self, cookie: u64) -> Result<&mut Pending<W>, Violation> {
        match self.pending.get_mut(&cookie) {
            Some(pending) => Ok(pending),
            None if (1..self.next_cookie).contains(&cookie) => Err(Violation::AfterLastReply(cookie)),
            None => Err(Violation::UnknownCookie(cookie)),
        }
    }

    /// A simple reply.
    pub(super) fn simple(&mut self, error: u32, cookie: u64) -> Result<Step, Violation> {
        let structured = self.headers >= Headers::Structured;
        let pending = self.get(cookie)?;
        let is_read = pending.asked.kind == NBD_CMD_READ;
        if is_read && structured {
            return Err(Violation::SimpleReplyToRead);
        }
        if pending.failure.is_none() && error != 0 {
            pending.failure = Some((error, String::new()));
        }
        if is_read && error == 0 {
            let length = pending.asked.length;
            return pending.content(NBD_REPLY_TYPE_OFFSET_DATA, pending.asked.offset, length);
        }
        Ok(Step::Last)
    }

    /// A chunk of which only the header is known: whether there can be such a one.
    pub(super) fn announce(&mut self, chunk: &Chunk) -> Result<(), Violation> {
        let extended = self.headers == Headers::Extended;
        let asked = &self.get(chunk.cookie)?.asked;
        if let Some(answered) = chunk.offset
            && answered != asked.offset
        {
            return Err(Violation::OtherOffset { asked: asked.offset, answered });
        }
        let fits = match chunk.kind {
            NBD_REPLY_TYPE_OFFSET_DATA | NBD_REPLY_TYPE_OFFSET_HOLE => asked.kind == NBD_CMD_READ,
            NBD_REPLY_TYPE_BLOCK_STATUS => asked.kind == NBD_CMD_BLOCK_STATUS && !extended,
            NBD_REPLY_TYPE_BLOCK_STATUS_EXT => asked.kind == NBD_CMD_BLOCK_STATUS && extended,
            // There is no place in a flush at which something can go wrong.
            NBD_REPLY_TYPE_ERROR_OFFSET => asked.kind != NBD_CMD_FLUSH,
            _ => true,
        };
        if fits { Ok(()) } else { Err(Violation::UnexpectedChunk { kind: chunk.kind, command: asked.kind }) }
    }

    /// A chunk that was announced.
    pub(super) fn chunk(&mut self, chunk: &Chunk, body: Body) -> Result<Step, Violation> {
        let pending = self.get(chunk.cookie)?;
        let step = match body {
            Body::Nothing => Step::More,
            Body::Data { offset, length } => pending.content(chunk.kind, offset, length.into())?,
            Body::Hole { offset, length } => {
                // The memory is zeroes to begin with, and no data comes twice.
                pending.content(chunk.kind, offset, length.into())?;
                Step::More
            }
            Body::BlockStatus { context, extents } => {
                pending.status(context, extents)?;
                Step::More
            }
            Body::Error { error, text, offset } => {
                if let Some(offset) = offset {
                    pending.asked.place(chunk.kind, offset, 1)?;
                }
                pending.failure.get_or_insert((error, text));
                Step::More
            }
        };
        Ok(if step == Step::More && chunk.done { Step::Last } else { step })
    }

    /// Where the data of [`Step::Data`] goes, all that is behind `at`.
    pub(super) fn space(&mut self, cookie: u64, at: usize) -> &mut [u8] {
        self.pending.get_mut(&cookie).and_then(|pending| pending.data.get_mut(at..)).unwrap_or_default()
    }

    /// Takes a request out whose last reply has come. The inner error is the request's, the outer the connection's.
    pub(super) fn finish(&mut self, cookie: u64) -> Result<(W, Result<Answer, Error>), Violation> {
        self.get(cookie)?.check_complete()?;
        let Some(Pending { asked, waiter, data, status, failure, .. }) = self.pending.remove(&cookie) else {
            return Err(Violation::UnknownCookie(cookie));
        };
        let answer = match failure {
            Some((error, text)) => Err(Error::Failed { command: asked.kind, error, text }),
            None => Ok(match asked.kind {
                NBD_CMD_READ => Answer::Data(data),
                NBD_CMD_BLOCK_STATUS => Answer::Status(status),
                _ => Answer::Done,
            }),
        };
        Ok((waiter, answer))
    }
}

impl Asked {
    /// Where in the request `length` bytes at `offset` of the export are.
    fn place(&self, kind: u16, offset: u64, length: u64) -> Result<u64, Violation> {
        let at = offset.checked_sub(self.offset);
        let at = at.filter(|at| at.checked_add(length).is_some_and(|end| end <= self.length));
        at.ok_or(Violation::OutsideRequest { kind, offset, length })
    }
}

impl<W> Pending<W> {
    /// Takes note of `length` bytes that come for `offset`.
    fn content(&mut self, kind: u16, offset: u64, length: u64) -> Result<Step, Violation> {
        let at = self.asked.place(kind, offset, length)?;
        if self.data.is_empty() {
            // No more than MAX_PAYLOAD, or it would not have been asked for.
            self.data = vec![0; self.asked.length as usize];
        }
        match self.covered.add(at, at + length) {
            Ok(()) => Ok(Step::Data { at: at as usize, length: length as usize }),
            Err(Overlap::Twice) => Err(Violation::Twice { offset, length }),
            Err(Overlap::TooMany) => Err(Violation::TooManyPieces),
        }
    }

    fn status(&mut self, id: u32, extents: Vec<Extent>) -> Result<(), Violation> {
        let context = self.asked.contexts.iter().find(|(known, _)| *known == id);
        let (_, is_base) = context.ok_or(Violation::UnknownContext(id))?;
        if self.status.iter().any(|status| status.id == id) {
            return Err(Violation::ContextTwice(id));
        }
        if *is_base && extents.iter().any(|extent| extent.status > u64::from(u32::MAX)) {
            return Err(Violation::Extents("a context of the namespace base: has more than 32 bits of status"));
        }
        let length = self.asked.length;
        if self.asked.flags & NBD_CMD_FLAG_REQ_ONE != 0
            && (extents.len() != 1 || extents.iter().any(|extent| extent.length > length))
        {
            return Err(Violation::Extents("one extent within the range was asked for"));
        }
        let mut end = 0u64;
        for extent in &extents {
            if end >= length {
                return Err(Violation::Extents("an extent starts behind the range that was asked for"));
            }
            end = end.checked_add(extent.length).ok_or(Violation::Extents("the extents have no end"))?;
        }
        if self.asked.offset.checked_add(end).is_none() {
            return Err(Violation::Extents("the extents have no end"));
        }
        self.status.push(ContextStatus { id, extents });
        Ok(())
    }

    /// Whether all is there that a request needs to succeed.
    fn check_complete(&self) -> Result<(), Violation> {
        if self.failure.is_some() {
            return Ok(());
        }
        match self.asked.kind {
            NBD_CMD_READ => match self.asked.length - self.covered.total {
                0 => Ok(()),
                bytes => Err(Violation::Missing { bytes }),
            },
            NBD_CMD_BLOCK_STATUS if self.status.len() != self.asked.contexts.len() => Err(Violation::NoStatus),
            _ => Ok(()),
        }
    }
}

/// Which parts of a range have come. Neighbours are one part.
#[derive(Default)]
struct Coverage {
    /// Start and end.
    parts: BTreeMap<u64, u64>,
    total: u64,
}

enum Overlap {
    Twice,
    TooMany,
}

impl Coverage {
    /// Adds a part that is not empty. Errors: some of it is there, or there are too many parts.
    fn add(&mut self, start: u64, end: u64) -> Result<(), Overlap> {
        let before = self.parts.range(..end).next_back().map(|(start, end)| (*start, *end));
        if before.is_some_and(|(_, reached)| reached > start) {
            return Err(Overlap::Twice);
        }
        let joined = before.filter(|(_, reached)| *reached == start).map_or(start, |(from, _)| from);
        let until = self.parts.remove(&end).unwrap_or(end);
        self.parts.insert(joined, until);
        self.total += end - start;
        if self.parts.len() > MAX_PIECES { Err(Overlap::TooMany) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table with one request, whose cookie is 1.
    fn table(headers: Headers, kind: u16, flags: u16, offset: u64, length: u64) -> Table<()> {
        let mut table = Table::new(headers);
        let contexts = vec![(3, true), (7, false)];
        assert_eq!(table.add(Asked { kind, flags, offset, length, contexts }, ()), 1);
        table
    }

    fn chunk(kind: u16, done: bool) -> Chunk {
        Chunk { done, kind, cookie: 1, offset: None, length: 0 }
    }

    fn read() -> Table<()> {
        table(Headers::Structured, NBD_CMD_READ, 0, 100, 10)
    }

    fn data(table: &mut Table<()>, offset: u64, length: u32, done: bool) -> Result<Step, Violation> {
        let chunk = chunk(NBD_REPLY_TYPE_OFFSET_DATA, done);
        table.announce(&chunk)?;
        table.chunk(&chunk, Body::Data { offset, length })
    }

    fn hole(table: &mut Table<()>, offset: u64, length: u32, done: bool) -> Result<Step, Violation> {
        let chunk = chunk(NBD_REPLY_TYPE_OFFSET_HOLE, done);
        table.announce(&chunk)?;
        table.chunk(&chunk, Body::Hole { offset, length })
    }

    fn status(table: &mut Table<()>, context: u32, extents: &[(u64, u64)]) -> Result<Step, Violation> {
        let extents = extents.iter().map(|&(length, status)| Extent { length, status }).collect();
        table.chunk(&chunk(NBD_REPLY_TYPE_BLOCK_STATUS, false), Body::BlockStatus { context, extents })
    }

    #[test]
    fn a_read_comes_in_any_order_and_holes_are_zeroes() {
        let mut table = read();
        assert_eq!(data(&mut table, 106, 4, false), Ok(Step::Data { at: 6, length: 4 }));
        table.space(1, 6)[..4].copy_from_slice(b"tail");
        assert_eq!(data(&mut table, 100, 2, false), Ok(Step::Data { at: 0, length: 2 }));
        table.space(1, 0)[..2].copy_from_slice(b"he");
        assert_eq!(hole(&mut table, 102, 4, true), Ok(Step::Last));
        let (_, answer) = table.finish(1).expect("all of it has come");
        assert_eq!(answer.expect("no error came"), Answer::Data(b"he\0\0\0\0tail".to_vec()));
        assert_eq!(data(&mut table, 100, 1, true), Err(Violation::AfterLastReply(1)));
    }

    #[test]
    fn data_comes_once_and_from_where_it_was_asked() {
        let outside = |offset, length| Violation::OutsideRequest { kind: NBD_REPLY_TYPE_OFFSET_DATA, offset, length };
        for (offset, length) in [(99, 1), (99, 11), (100, 11), (110, 1), (0, 1), (u64::MAX, 1), (109, u32::MAX)] {
            assert_eq!(data(&mut read(), offset, length, false), Err(outside(offset, length.into())));
        }
        for (offset, length) in [(102, 2), (101, 2), (103, 2), (100, 10), (103, 1), (102, 8)] {
            let mut table = read();
            data(&mut table, 102, 2, false).expect("the first");
            let twice = Err(Violation::Twice { offset, length: length.into() });
            assert_eq!(data(&mut table, offset, length, false), twice, "{offset} {length}");
            let mut table = read();
            hole(&mut table, 102, 2, false).expect("the first");
            assert_eq!(hole(&mut table, offset, length, false), twice, "{offset} {length}");
        }
    }

    #[test]
    fn a_read_that_ends_early_is_no_success_but_may_be_a_failure() {
        let mut table = read();
        hole(&mut table, 100, 9, true).expect("it is within the range");
        assert_eq!(table.finish(1).map(|_| ()), Err(Violation::Missing { bytes: 1 }));
        let mut table = read();
        data(&mut table, 100, 9, false).expect("it is within the range");
        let body = Body::Error { error: 5, text: "bad".into(), offset: Some(109) };
        assert_eq!(table.chunk(&chunk(NBD_REPLY_TYPE_ERROR_OFFSET, true), body), Ok(Step::Last));
        let (_, answer) = table.finish(1).expect("it failed, and that is no fault");
        assert_eq!(answer.expect_err("it failed").to_string(), "NBD_CMD_READ: input/output error: bad");
    }

    #[test]
    fn the_first_error_counts_and_has_to_be_within_the_range() {
        let mut table = read();
        let error = |error, offset| Body::Error { error, text: String::new(), offset };
        let chunk = chunk(NBD_REPLY_TYPE_ERROR_OFFSET, false);
        assert_eq!(table.chunk(&chunk, error(28, Some(101))), Ok(Step::More));
        assert_eq!(table.chunk(&chunk, error(5, None)), Ok(Step::More));
        assert!(matches!(table.chunk(&chunk, error(5, Some(110))), Err(Violation::OutsideRequest { .. })));
        let answer = table.finish(1).expect("it failed, and that is no fault").1;
        assert_eq!(answer.expect_err("it failed").code(), ErrorCode::NoSpace);
    }

    #[test]
    fn scattered_pieces_are_kept_track_of_up_to_a_bound() {
        let mut table = table(Headers::Structured, NBD_CMD_READ, 0, 0, MAX_PAYLOAD.into());
        for piece in 0..MAX_PIECES as u64 {
            hole(&mut table, 2 * piece, 1, false).expect("so many are kept track of");
        }
        assert_eq!(hole(&mut table, 2 * MAX_PIECES as u64, 1, false), Err(Violation::TooManyPieces));
    }

    #[test]
    fn what_was_not_asked_for_is_not_taken() {
        let mut write = table(Headers::Structured, NBD_CMD_WRITE, 0, 0, 10);
        assert!(matches!(data(&mut write, 0, 1, true), Err(Violation::UnexpectedChunk { .. })));
        let mut flush = table(Headers::Structured, NBD_CMD_FLUSH, 0, 0, 0);
        let announced = flush.announce(&chunk(NBD_REPLY_TYPE_ERROR_OFFSET, true));
        assert!(matches!(announced, Err(Violation::UnexpectedChunk { .. })));
        assert_eq!(flush.simple(0, 2), Err(Violation::UnknownCookie(2)));
        assert_eq!(flush.simple(0, 0), Err(Violation::UnknownCookie(0)));
        assert_eq!(read().simple(0, 1), Err(Violation::SimpleReplyToRead));
        assert_eq!(read().simple(5, 1), Err(Violation::SimpleReplyToRead));
        // Structured and extended have each their own block status, and extended chunks name the request's offset.
        for (headers, kind) in
            [(Headers::Structured, NBD_REPLY_TYPE_BLOCK_STATUS_EXT), (Headers::Extended, NBD_REPLY_TYPE_BLOCK_STATUS)]
        {
            let mut table = table(headers, NBD_CMD_BLOCK_STATUS, 0, 0, 10);
            assert!(matches!(table.announce(&chunk(kind, false)), Err(Violation::UnexpectedChunk { .. })));
        }
        let mut table = table(Headers::Extended, NBD_CMD_READ, 0, 100, 10);
        let other = Chunk { offset: Some(101), ..chunk(NBD_REPLY_TYPE_OFFSET_DATA, false) };
        assert_eq!(table.announce(&other), Err(Violation::OtherOffset { asked: 100, answered: 101 }));
    }

    #[test]
    fn every_context_tells_its_status_once() {
        let ask = |flags| table(Headers::Structured, NBD_CMD_BLOCK_STATUS, flags, 0, 10);
        let mut table = ask(0);
        assert_eq!(status(&mut table, 7, &[(4, 1 << 40), (100, 0)]), Ok(Step::More));
        assert_eq!(status(&mut table, 7, &[(10, 0)]), Err(Violation::ContextTwice(7)));
        assert_eq!(status(&mut table, 1, &[(10, 0)]), Err(Violation::UnknownContext(1)));
        assert_eq!(table.finish(1).map(|_| ()), Err(Violation::NoStatus));
        assert_eq!(status(&mut table, 3, &[(5, 3)]), Ok(Step::More));
        let Ok((_, Ok(Answer::Status(status_of)))) = table.finish(1) else { panic!("both have come") };
        assert_eq!(
            status_of.iter().map(|status| (status.id, status.extents.len())).collect::<Vec<_>>(),
            [(7, 2), (3, 1)]
        );

        let bad = |flags, context, extents: &[(u64, u64)]| status(&mut ask(flags), context, extents);
        for (flags, context, extents) in [
            (0, 3, &[(10, 0), (1, 0)][..]),
            (0, 3, &[(10, 1 << 32)]),
            (0, 7, &[(1, 0), (u64::MAX, 0)]),
            (NBD_CMD_FLAG_REQ_ONE, 3, &[(5, 0), (5, 0)]),
            (NBD_CMD_FLAG_REQ_ONE, 3, &[(11, 0)]),
        ] {
            assert!(
                matches!(bad(flags, context, extents), Err(Violation::Extents(_))),
                "{flags} {context} {extents:?}"
            );
        }
        // Success without a word is none.
        let mut table = ask(0);
        assert_eq!(table.simple(0, 1), Ok(Step::Last));
        assert_eq!(table.finish(1).map(|_| ()), Err(Violation::NoStatus));
    }
}

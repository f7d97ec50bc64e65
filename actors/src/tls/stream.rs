//! A [`Transport`] over another that seals what is sent and opens what is received.
//!
//! What is sealed is accounted for record by record: bytes count as sent when the record that they are in has been handed on.
//! So whoever sends knows what is still on its way, and a client that takes nothing is seen to.

use std::collections::VecDeque;
use std::fs::File;
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::task::{Context, Poll, Waker, ready};

use super::wire::Wire;
use super::{Securing, Security};
use crate::device::Peer;
use crate::transport::Transport;

/// The most plain bytes in one record. Source: RFC 8446 section 5.1.
pub(super) const RECORD: usize = 16 * 1024;
/// How many plain bytes are sealed before any are sent, to a record: as many as keep the client busy opening them meanwhile.
const SEAL: usize = 4 * RECORD;
/// How many slices are sealed at a time.
const SLICES: usize = 64;

/// What turns plain bytes into records and back: one connection of a TLS library.
pub(super) trait Records: Send {
    /// Where its records come from and go to.
    fn wire(&mut self) -> &mut Wire;

    /// Goes on with the handshake as far as what came allows. Whether it is done. Errors: it failed; what is to be said of it is
    /// on the wire.
    fn shake_hands(&mut self) -> io::Result<bool>;

    /// What is known after the handshake.
    fn security(&self) -> Security;

    /// Seals from the front of `slices`, which are not empty. How many bytes that were: at least one, and no more than a few
    /// records.
    fn seal(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Opens into `slice`, which is not empty.
    fn open(&mut self, slice: &mut [u8]) -> io::Result<Opened>;

    /// Says that nothing more will come.
    fn close(&mut self);
}

/// What became of opening.
pub(super) enum Opened {
    /// So many bytes, at least one.
    Bytes(usize),
    /// There is no whole record.
    Starved,
    /// The other end has said that nothing more will come.
    Closed,
}

/// Does the handshake and gives the stream.
pub(super) fn secure<R: Records + 'static>(records: io::Result<R>, transport: Box<dyn Transport>) -> Securing {
    Box::pin(async move {
        let mut stream = Stream::new(records?, transport);
        stream.shake_hands().await?;
        Ok(Box::new(stream) as Box<dyn Transport>)
    })
}

/// See the module.
pub(super) struct Stream<R> {
    transport: Box<dyn Transport>,
    records: R,
    security: Security,
    /// How many bytes at the front of what is to be sent are sealed already.
    ahead: usize,
    /// How long each sealed piece is that has not gone, and how many of the bytes `ahead` are in it.
    sealed: VecDeque<(usize, usize)>,
    /// There is nothing to open.
    is_starved: bool,
    /// The transport may have more to receive.
    has_more: bool,
    /// The other end is to hear nothing more.
    is_closed: bool,
}

impl<R: Records> Stream<R> {
    fn new(records: R, transport: Box<dyn Transport>) -> Stream<R> {
        Stream {
            transport,
            records,
            security: Security::default(),
            ahead: 0,
            sealed: VecDeque::new(),
            is_starved: false,
            has_more: true,
            is_closed: false,
        }
    }

    async fn shake_hands(&mut self) -> io::Result<()> {
        loop {
            let step = self.records.shake_hands();
            if let Err(error) = step {
                // The other end may take its time to hear of it, which is not waited for.
                let _ = self.poll_flush(&mut Context::from_waker(Waker::noop()));
                self.transport.finish();
                return Err(error);
            }
            poll_fn(|cx| self.poll_flush(cx)).await?;
            if step? {
                break;
            }
            poll_fn(|cx| self.poll_more(cx)).await?;
        }
        self.security = self.records.security();
        Ok(())
    }

    /// Receives more of what is to be opened. Errors: the stream has ended, which nobody had said.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = self.records.wire();
        let room = wire.room();
        let size = room.len();
        let count = ready!(self.transport.poll_receive(cx, &mut [IoSliceMut::new(room)]))?;
        if count == 0 {
            let why = "the TLS connection ended without a word";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, why)));
        }
        wire.came(count);
        self.has_more = count == size;
        self.is_starved = false;
        Poll::Ready(Ok(()))
    }

    /// Hands on once what is sealed. How many plain bytes are known to be gone by that; pending where nothing went.
    fn poll_hand_on(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let wire = self.records.wire();
        let mut count = ready!(self.transport.poll_send(cx, &[IoSlice::new(wire.unsent())]))?;
        if count == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        wire.went(count);
        let mut gone = 0;
        while let Some((length, plain)) = self.sealed.front_mut() {
            if count < *length {
                *length -= count;
                break;
            }
            count -= *length;
            gone += *plain;
            self.sealed.pop_front();
        }
        self.ahead -= gone;
        Poll::Ready(Ok(gone))
    }

    /// Hands on what is sealed until some of the bytes that were to be sent are gone. None, if there are none.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        while self.ahead > 0 {
            let gone = ready!(self.poll_hand_on(cx))?;
            if gone > 0 {
                return Poll::Ready(Ok(gone));
            }
        }
        Poll::Ready(Ok(0))
    }

    /// Hands on all that is sealed and belongs to nobody: what the TLS library has to say by itself.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.records.wire().unsent().is_empty() {
            ready!(self.poll_hand_on(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Sends what the TLS library has to say to what was opened, where nobody else is about to send.
    fn answer(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.ahead == 0
            && let Poll::Ready(flushed) = self.poll_flush(cx)
        {
            flushed?;
        }
        Ok(())
    }

    /// Notes what was sealed since the wire held `before` bytes.
    fn note(&mut self, before: usize, plain: usize) {
        let length = self.records.wire().unsent().len() - before;
        self.sealed.push_back((length, plain));
        self.ahead += plain;
    }

    /// Seals from `slices` without their first `skip` bytes, up to a limit.
    fn seal(&mut self, slices: &[IoSlice<'_>], mut skip: usize) -> io::Result<()> {
        let mut left = SEAL;
        let mut few: [IoSlice<'_>; SLICES] = [IoSlice::new(&[]); SLICES];
        let mut count = 0;
        for slice in slices {
            let rest = slice.get(skip..).unwrap_or_default();
            skip = skip.saturating_sub(slice.len());
            // Not cut but between two records: what is left of a large slice would need one more.
            let rest = &rest[..rest.len().min(left.next_multiple_of(RECORD))];
            if rest.is_empty() {
                continue;
            }
            left = left.saturating_sub(rest.len());
            few[count] = IoSlice::new(rest);
            count += 1;
            if left == 0 || count == SLICES {
                break;
            }
        }
        let mut few = &mut few[..count];
        while !few.is_empty() {
            let before = self.records.wire().unsent().len();
            let plain = self.records.seal(few)?;
            self.note(before, plain);
            IoSlice::advance_slices(&mut few, plain);
        }
        Ok(())
    }

    fn close(&mut self) {
        if !std::mem::replace(&mut self.is_closed, true) {
            let before = self.records.wire().unsent().len();
            self.records.close();
            self.note(before, 0);
        }
    }
}

impl<R: Records> Transport for Stream<R> {
    fn poll_receive(&mut self, cx: &mut Context<'_>, slices: &mut [IoSliceMut<'_>]) -> Poll<io::Result<usize>> {
        let mut total = 0;
        let mut slices = slices.iter_mut();
        let mut slice: &mut [u8] = &mut [];
        loop {
            if slice.is_empty() {
                match slices.next() {
                    Some(next) => slice = next,
                    None => return Poll::Ready(Ok(total)),
                }
                continue;
            }
            let opened = match self.records.open(slice) {
                Ok(opened) => opened,
                Err(error) => {
                    // The other end hears what was wrong, if it can be told at once.
                    let _ = self.poll_flush(&mut Context::from_waker(Waker::noop()));
                    return Poll::Ready(Err(error));
                }
            };
            match opened {
                Opened::Bytes(count) => {
                    total += count;
                    slice = &mut slice[count..];
                }
                Opened::Closed => return Poll::Ready(Ok(total)),
                Opened::Starved => {
                    self.is_starved = true;
                    self.answer(cx)?;
                    if total > 0 && !self.has_more {
                        return Poll::Ready(Ok(total));
                    }
                    match self.poll_more(cx) {
                        Poll::Ready(more) => match (more, total) {
                            (Ok(()), _) => {}
                            (Err(error), 0) => return Poll::Ready(Err(error)),
                            // It will be found again.
                            (Err(_), _) => return Poll::Ready(Ok(total)),
                        },
                        Poll::Pending if total > 0 => return Poll::Ready(Ok(total)),
                        Poll::Pending => return Poll::Pending,
                    }
                }
            }
        }
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.is_starved {
            return Poll::Ready(Ok(()));
        }
        self.answer(cx)?;
        self.records.wire().rest();
        self.sealed.shrink_to_fit();
        self.transport.poll_readable(cx)
    }

    fn look_again(&mut self) {
        self.transport.look_again();
    }

    fn await_bytes(&mut self, count: usize) {
        // What is here of a record is part of what is awaited.
        let here = self.records.wire().unread().len();
        self.transport.await_bytes(count.saturating_sub(here).max(1));
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.ahead < SEAL {
            self.seal(slices, self.ahead)?;
        }
        self.poll_gone(cx)
    }

    fn poll_send_file(
        &mut self,
        cx: &mut Context<'_>,
        file: &File,
        offset: u64,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        // What is sealed already is not read again.
        let length = length.min(SEAL);
        if self.ahead < length {
            let mut piece = vec![0; length - self.ahead];
            let mut there = 0;
            while there < piece.len() {
                match file.read_at(&mut piece[there..], offset + (self.ahead + there) as u64)? {
                    0 => break,
                    count => there += count,
                }
            }
            self.seal(&[IoSlice::new(&piece[..there])], 0)?;
        }
        self.poll_gone(cx)
    }

    fn worth_sending(&self) -> usize {
        self.transport.worth_sending()
    }

    fn peer(&self) -> Option<Peer> {
        self.transport.peer()
    }

    fn peer_label(&self) -> Option<Vec<u8>> {
        self.transport.peer_label()
    }

    fn security(&self) -> Option<&Security> {
        Some(&self.security)
    }

    fn finish(&mut self) {
        let _ = self.poll_finish(&mut Context::from_waker(Waker::noop()));
        self.transport.finish();
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.close();
        // Who is gone need not hear it.
        let _ = ready!(self.poll_flush(cx));
        self.transport.poll_finish(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex, MutexGuard};

    use super::*;

    /// Records that hide nothing: a length in front of the bytes. No bytes at all are the goodbye.
    #[derive(Default)]
    struct Plain {
        wire: Wire,
    }

    /// Short, so that there are many.
    const MOST: usize = 100;

    impl Records for Plain {
        fn wire(&mut self) -> &mut Wire {
            &mut self.wire
        }

        fn shake_hands(&mut self) -> io::Result<bool> {
            Ok(true)
        }

        fn security(&self) -> Security {
            Security::default()
        }

        fn seal(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
            let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).take(MOST).collect();
            self.wire.write_all(&[bytes.len() as u8])?;
            self.wire.write_all(&bytes)?;
            Ok(bytes.len())
        }

        fn open(&mut self, slice: &mut [u8]) -> io::Result<Opened> {
            let unread = self.wire.unread();
            let Some(length) = unread.first().map(|length| usize::from(*length)) else { return Ok(Opened::Starved) };
            if length == 0 {
                return Ok(Opened::Closed);
            }
            assert!(slice.len() >= length, "the tests have room for a record");
            let Some(bytes) = unread.get(1..=length) else { return Ok(Opened::Starved) };
            slice[..length].copy_from_slice(bytes);
            io::copy(&mut io::Read::take(&mut self.wire, 1 + length as u64), &mut io::sink())?;
            Ok(Opened::Bytes(length))
        }

        fn close(&mut self) {
            let _ = self.wire.write_all(&[0]);
        }
    }

    /// What has gone, what is to come, and for how many bytes there is room.
    #[derive(Default)]
    struct Line {
        gone: Vec<u8>,
        room: usize,
        coming: Vec<u8>,
        has_ended: bool,
        is_finished: bool,
    }

    #[derive(Clone, Default)]
    struct Slow(Arc<Mutex<Line>>);

    impl Slow {
        fn line(&self) -> MutexGuard<'_, Line> {
            self.0.lock().unwrap()
        }
    }

    impl Transport for Slow {
        fn poll_receive(&mut self, _cx: &mut Context<'_>, slices: &mut [IoSliceMut<'_>]) -> Poll<io::Result<usize>> {
            let mut line = self.line();
            let count = line.coming.len().min(slices[0].len());
            if count == 0 && !line.has_ended {
                return Poll::Pending;
            }
            slices[0][..count].copy_from_slice(&line.coming[..count]);
            line.coming.drain(..count);
            Poll::Ready(Ok(count))
        }

        fn poll_send(&mut self, _cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
            let mut line = self.line();
            let count = slices[0].len().min(line.room);
            if count == 0 {
                return Poll::Pending;
            }
            line.room -= count;
            line.gone.extend_from_slice(&slices[0][..count]);
            Poll::Ready(Ok(count))
        }

        fn finish(&mut self) {
            self.line().is_finished = true;
        }
    }

    fn stream() -> (Stream<Plain>, Slow) {
        let slow = Slow::default();
        (Stream::new(Plain::default(), Box::new(slow.clone())), slow)
    }

    fn opened(sealed: &[u8]) -> Vec<u8> {
        let mut plain = Vec::new();
        let mut rest = sealed;
        while let [length, after @ ..] = rest {
            plain.extend_from_slice(&after[..usize::from(*length)]);
            rest = &after[usize::from(*length)..];
        }
        plain
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|at| (at * 7) as u8).collect()
    }

    #[test]
    fn bytes_count_as_sent_when_their_record_is_gone_and_none_is_sealed_twice() {
        let (mut stream, slow) = stream();
        let mut cx = Context::from_waker(Waker::noop());
        let all = bytes(1000);
        let mut sent = 0;
        // Always less than a record.
        for _ in 0..1000 {
            slow.line().room = 37;
            let rest = &all[sent..];
            let (front, back) = rest.split_at(rest.len() / 3);
            if let Poll::Ready(count) = stream.poll_send(&mut cx, &[IoSlice::new(front), IoSlice::new(back)]) {
                sent += count.unwrap();
            }
            assert!(opened_whole(&slow.line().gone) == sent, "as much as is gone in whole records");
            if sent == all.len() {
                break;
            }
        }
        assert_eq!(opened(&slow.line().gone), all);
    }

    /// How many bytes are in records that are there to their end.
    fn opened_whole(mut sealed: &[u8]) -> usize {
        let mut count = 0;
        while let [length, after @ ..] = sealed {
            let Some(rest) = after.get(usize::from(*length)..) else { break };
            count += usize::from(*length);
            sealed = rest;
        }
        count
    }

    #[test]
    fn a_file_is_sealed_once_however_often_it_is_offered() {
        let (mut stream, slow) = stream();
        let mut cx = Context::from_waker(Waker::noop());
        let all = bytes(700);
        let path = std::env::temp_dir().join(format!("nbdcaptive-stream-{}", std::process::id()));
        std::fs::write(&path, &all).unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut sent = 0;
        while sent < all.len() {
            slow.line().room = 150;
            if let Poll::Ready(count) = stream.poll_send_file(&mut cx, &file, sent as u64, all.len() - sent) {
                sent += count.unwrap();
            }
        }
        assert_eq!(opened(&slow.line().gone), all);
        assert!(matches!(stream.poll_send_file(&mut cx, &file, 700, 1), Poll::Ready(Ok(0))), "the end of the file");
    }

    #[test]
    fn an_end_without_a_word_is_an_error_and_a_goodbye_is_the_end() {
        let (mut stream, slow) = stream();
        let mut cx = Context::from_waker(Waker::noop());
        let mut buffer = [0; 300];
        let mut receive =
            |stream: &mut Stream<Plain>| stream.poll_receive(&mut cx, &mut [IoSliceMut::new(&mut buffer)]);
        slow.line().coming = vec![2, 8, 9, 3, 1];
        assert!(matches!(receive(&mut stream), Poll::Ready(Ok(2))));
        assert!(receive(&mut stream).is_pending(), "half a record");
        slow.line().has_ended = true;
        let Poll::Ready(Err(error)) = receive(&mut stream) else { panic!("it has ended") };
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        slow.line().coming = vec![2, 3, 0];
        assert!(matches!(receive(&mut stream), Poll::Ready(Ok(3))));
        assert!(matches!(receive(&mut stream), Poll::Ready(Ok(0))));
        assert!(matches!(receive(&mut stream), Poll::Ready(Ok(0))), "again and again");
    }

    #[test]
    fn the_goodbye_is_waited_for_until_there_is_room() {
        let (mut stream, slow) = stream();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(stream.poll_finish(&mut cx).is_pending());
        assert!(!slow.line().is_finished);
        slow.line().room = 10;
        assert!(stream.poll_finish(&mut cx).is_ready());
        assert!(slow.line().is_finished);
        stream.finish();
        assert_eq!(slow.line().gone, [0], "said once");
    }
}

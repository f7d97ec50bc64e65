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
/// How many plain bytes are sealed before any are sent, at most: as many as keep the client busy opening them meanwhile.
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

    /// Seals from the front of `slices`, up to a limit.
    fn seal(&mut self, slices: &[IoSlice<'_>]) -> io::Result<()> {
        let mut skip = self.ahead;
        let mut left = SEAL;
        let mut few: [IoSlice<'_>; SLICES] = [IoSlice::new(&[]); SLICES];
        let mut count = 0;
        for slice in slices {
            let rest = slice.get(skip..).unwrap_or_default();
            skip = skip.saturating_sub(slice.len());
            let rest = &rest[..rest.len().min(left)];
            if rest.is_empty() {
                continue;
            }
            left -= rest.len();
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
        loop {
            if self.ahead < SEAL {
                self.seal(slices)?;
            }
            if self.records.wire().unsent().is_empty() {
                // There is nothing in the slices.
                return Poll::Ready(Ok(0));
            }
            let gone = ready!(self.poll_hand_on(cx))?;
            if gone > 0 {
                return Poll::Ready(Ok(gone));
            }
        }
    }

    fn poll_send_file(
        &mut self,
        cx: &mut Context<'_>,
        file: &File,
        offset: u64,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        // What is sealed already is not read again: only its length counts.
        let length = length.min(SEAL);
        let mut piece = vec![0; length];
        let mut there = self.ahead.min(length);
        while there < length {
            match file.read_at(&mut piece[there..], offset + there as u64)? {
                0 => break,
                count => there += count,
            }
        }
        if there == 0 {
            return Poll::Ready(Ok(0));
        }
        self.poll_send(cx, &[IoSlice::new(&piece[..there])])
    }

    fn worth_sending(&self) -> usize {
        self.transport.worth_sending()
    }

    fn peer(&self) -> Option<Peer> {
        self.transport.peer()
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

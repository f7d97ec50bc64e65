//! Bytes from the server that nobody has looked at.

use std::io::{self, IoSliceMut};
use std::task::{Context, Poll};

use crate::transport::Transport;

/// What is received at a time, in bytes.
const SIZE: usize = 64 * 1024;

/// A buffer that is filled at its end and looked at from its front.
#[derive(Default)]
pub(super) struct Input {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Forgets the first `count` bytes, of as many as there are.
    pub(super) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }

    /// Takes up to `count` bytes off the front.
    pub(super) fn take(&mut self, count: usize) -> &[u8] {
        let from = self.start;
        self.consume(count);
        &self.buffer[from..self.start]
    }

    /// Receives into `first`, and what it does not hold behind what is here. Returns how much of `first` was filled.
    /// Errors: the stream has failed, or ended (`UnexpectedEof`).
    pub(super) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        transport: &mut dyn Transport,
        first: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if self.buffer.is_empty() {
            self.buffer = vec![0; SIZE];
        }
        if self.start > 0 {
            // Little is left over: less than a header, or nothing.
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = first.len();
        let space = IoSliceMut::new(&mut self.buffer[self.end..]);
        let received = if room == 0 {
            transport.poll_receive(cx, &mut [space])
        } else {
            transport.poll_receive(cx, &mut [IoSliceMut::new(first), space])
        };
        received
            .map_ok(|count| {
                self.end += count.saturating_sub(room);
                (count, count.min(room))
            })
            .map(|result| match result {
                Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, filled)) => Ok(filled),
                Err(error) => Err(error),
            })
    }
}

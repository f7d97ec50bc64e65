//! Sealed bytes on their way: those that came and were not opened, and those that were sealed and not sent.

use std::io::{self, Read, Write};

/// How much is received at a time, in bytes: several records, so that a system call is shared among them.
const INCOMING: usize = 64 * 1024;

/// Both buffers of one stream. Neither is there while nothing is on its way.
#[derive(Default)]
pub(super) struct Wire {
    incoming: Vec<u8>,
    /// What of `incoming` is to be opened.
    start: usize,
    end: usize,
    outgoing: Vec<u8>,
    /// What of `outgoing` is to be sent.
    sent: usize,
    sealed: usize,
}

impl Wire {
    /// What came and was not opened.
    pub(super) fn unread(&self) -> &[u8] {
        &self.incoming[self.start..self.end]
    }

    /// As `unread`, to be opened where it is.
    pub(super) fn unread_mut(&mut self) -> &mut [u8] {
        &mut self.incoming[self.start..self.end]
    }

    /// `count` bytes at the front of what came were opened.
    pub(super) fn used(&mut self, count: usize) {
        self.start += count;
    }

    /// Room behind what came. Never empty: at most a record is not opened for want of its rest.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            self.incoming.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.incoming.len() {
            self.incoming.resize(self.end + INCOMING, 0);
        }
        &mut self.incoming[self.end..]
    }

    /// `count` bytes were put where there was room.
    pub(super) fn came(&mut self, count: usize) {
        self.end += count;
    }

    /// What was sealed and not sent.
    pub(super) fn unsent(&self) -> &[u8] {
        &self.outgoing[self.sent..self.sealed]
    }

    /// Room for `count` bytes behind what is to be sent, with anything in it.
    pub(super) fn place(&mut self, count: usize) -> &mut [u8] {
        let end = self.sealed + count;
        if self.outgoing.len() < end {
            self.outgoing.resize(end, 0);
        }
        &mut self.outgoing[self.sealed..end]
    }

    /// `count` bytes were put in their place.
    pub(super) fn put(&mut self, count: usize) {
        self.sealed += count;
    }

    /// `count` bytes have been sent.
    pub(super) fn went(&mut self, count: usize) {
        self.sent += count;
        if self.sent == self.sealed {
            (self.sent, self.sealed) = (0, 0);
        }
    }

    /// Gives back the memory of what is empty.
    pub(super) fn rest(&mut self) {
        if self.start == self.end {
            self.incoming = Vec::new();
            (self.start, self.end) = (0, 0);
        }
        if self.unsent().is_empty() {
            self.outgoing = Vec::new();
            (self.sent, self.sealed) = (0, 0);
        }
    }
}

/// The other end of the wire, as a TLS library sees it: reading never waits.
impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let unread = self.unread();
        if unread.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = unread.len().min(buffer.len());
        buffer[..count].copy_from_slice(&unread[..count]);
        self.used(count);
        Ok(count)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.place(bytes.len()).copy_from_slice(bytes);
        self.put(bytes.len());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

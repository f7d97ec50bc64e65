//! A connection of rustls, of either end: what turns plain bytes into records and back.

use std::io::{self, IoSlice, Read, Write};

use rustls::Connection;

use super::stream::{Opened, Records};
use super::wire::Wire;
use super::{Names, Security};

pub(super) fn failed(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

/// One connection.
pub(super) struct Session {
    connection: Connection,
    wire: Wire,
}

impl Session {
    pub(super) fn new(connection: impl Into<Connection>) -> Session {
        Session { connection: connection.into(), wire: Wire::default() }
    }

    /// Takes what came as far as it is needed. Whether anything did.
    fn take(&mut self) -> io::Result<bool> {
        let Session { connection, wire } = self;
        if wire.unread().is_empty() {
            return Ok(false);
        }
        connection.read_tls(wire)?;
        let processed = connection.process_new_packets();
        self.put();
        processed.map_err(failed)?;
        Ok(true)
    }

    /// Puts on the wire what there is to say.
    fn put(&mut self) {
        let Session { connection, wire } = self;
        while connection.wants_write() {
            // The wire takes everything.
            let _ = connection.write_tls(wire);
        }
    }
}

impl Records for Session {
    fn wire(&mut self) -> &mut Wire {
        &mut self.wire
    }

    fn shake_hands(&mut self) -> io::Result<bool> {
        // A client begins.
        self.put();
        while self.connection.is_handshaking() && self.take()? {}
        Ok(!self.connection.is_handshaking())
    }

    fn security(&self) -> Security {
        let names = self.connection.peer_certificates().and_then(|chain| Names::of(chain.first()?));
        let version = self.connection.protocol_version().and_then(|version| version.as_str()).unwrap_or_default();
        let suite = self.connection.negotiated_cipher_suite().map(|suite| suite.suite());
        let suite = suite.and_then(|suite| suite.as_str()).unwrap_or_default();
        Security { summary: format!("{version} {suite}, X.509 certificates"), names }
    }

    fn seal(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let count = self.connection.writer().write_vectored(slices)?;
        self.put();
        Ok(count)
    }

    fn open(&mut self, slice: &mut [u8]) -> io::Result<Opened> {
        loop {
            match self.connection.reader().read(slice) {
                Ok(0) => return Ok(Opened::Closed),
                Ok(count) => return Ok(Opened::Bytes(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if !self.take()? {
                return Ok(Opened::Starved);
            }
        }
    }

    fn close(&mut self) {
        self.connection.send_close_notify();
        self.put();
    }
}

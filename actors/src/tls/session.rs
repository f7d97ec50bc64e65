//! A connection with certificates, of either end: rustls does the handshake, and then there are records.

use std::io::{self, IoSlice, Write};
use std::mem;

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{CommonState, Error};

use super::record_layer::{Keys, RecordLayer};
use super::stream::{Opened, Records};
use super::wire::Wire;
use super::{Names, Security};

/// How much of a handshake is kept that is not whole, in bytes: its longest message in records of the usual length, and some.
const HANDSHAKE: usize = 128 * 1024;

pub(super) fn failed(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

/// One connection.
pub(super) struct Session {
    wire: Wire,
    phase: Phase,
    security: Security,
    /// Data that rustls has opened, because it came along with the end of the handshake.
    early: Vec<u8>,
}

enum Phase {
    Handshake(Handshake),
    Records(Box<RecordLayer>),
    Failed,
}

/// A handshake under way.
pub(super) enum Handshake {
    Server(Box<UnbufferedServerConnection>),
    Client(Box<UnbufferedClientConnection>),
}

/// How far a handshake has come.
#[derive(PartialEq)]
enum Step {
    On,
    Starved,
    /// The other end has said that nothing more will come.
    Over,
    Done,
}

impl Handshake {
    /// Goes on with the handshake by `incoming`. How much of that is of no more use. What is to be said goes to `outgoing`, and
    /// data to `early`.
    fn step(
        &mut self,
        incoming: &mut [u8],
        outgoing: &mut Vec<u8>,
        early: &mut Vec<u8>,
    ) -> (usize, Result<Step, Error>) {
        match self {
            Handshake::Server(server) => take(server.process_tls_records(incoming), outgoing, early),
            Handshake::Client(client) => take(client.process_tls_records(incoming), outgoing, early),
        }
    }

    /// Goes on with what came, as far as that allows. Whether it is done, and whether the other end has said already that
    /// nothing more will come.
    fn go_on(&mut self, wire: &mut Wire, outgoing: &mut Vec<u8>, early: &mut Vec<u8>) -> Result<Option<bool>, Error> {
        let mut is_over = false;
        loop {
            let (used, step) = self.step(wire.unread_mut(), outgoing, early);
            wire.used(used);
            match step? {
                Step::On => {}
                Step::Over => is_over = true,
                Step::Starved if wire.unread().len() > HANDSHAKE => {
                    return Err(Error::General("the handshake is too long".to_owned()));
                }
                Step::Starved => return Ok(None),
                // A server might speak before the client has ended its part.
                Step::Done if self.state().is_handshaking() => return Ok(None),
                Step::Done => return Ok(Some(is_over)),
            }
        }
    }

    fn state(&self) -> &CommonState {
        match self {
            Handshake::Server(server) => server,
            Handshake::Client(client) => client,
        }
    }

    fn security(&self) -> Security {
        let state = self.state();
        let names = state.peer_certificates().and_then(|chain| Names::of(chain.first()?));
        let version = state.protocol_version().and_then(|version| version.as_str()).unwrap_or_default();
        let suite = state.negotiated_cipher_suite().map(|suite| suite.suite());
        let suite = suite.and_then(|suite| suite.as_str()).unwrap_or_default();
        Security { summary: format!("{version} {suite}, X.509 certificates"), names }
    }

    /// The records that follow.
    fn finish(self, is_over: bool) -> Result<RecordLayer, Error> {
        let (secrets, keys) = match self {
            Handshake::Server(server) => {
                let (secrets, keys) = server.dangerous_into_kernel_connection()?;
                (secrets, Keys::Server(keys))
            }
            Handshake::Client(client) => {
                let (secrets, keys) = client.dangerous_into_kernel_connection()?;
                (secrets, Keys::Client(keys))
            }
        };
        RecordLayer::new(keys, secrets, is_over)
    }
}

/// Does what rustls wants done. How many bytes at the front of what came are of no more use.
fn take<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    said: &mut Vec<u8>,
    early: &mut Vec<u8>,
) -> (usize, Result<Step, Error>) {
    let UnbufferedStatus { mut discard, state } = status;
    let step = match state {
        Err(error) => Err(error),
        Ok(ConnectionState::EncodeTlsData(mut message)) => {
            let start = said.len();
            let mut encoded = message.encode(&mut said[start..]);
            if let Err(EncodeError::InsufficientSize(size)) = encoded {
                said.resize(start + size.required_size, 0);
                encoded = message.encode(&mut said[start..]);
            }
            encoded.map(|_| Step::On).map_err(|error| Error::General(error.to_string()))
        }
        Ok(ConnectionState::TransmitTlsData(transmit)) => {
            // The wire has it.
            transmit.done();
            Ok(Step::On)
        }
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            let mut step = Ok(Step::On);
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        discard += record.discard;
                        early.extend_from_slice(record.payload);
                    }
                    Err(error) => step = Err(error),
                }
            }
            step
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Starved),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Done),
        Ok(ConnectionState::PeerClosed) => Ok(Step::Over),
        Ok(_) => Err(Error::General("the handshake has ended".to_owned())),
    };
    (discard, step)
}

impl From<UnbufferedServerConnection> for Handshake {
    fn from(server: UnbufferedServerConnection) -> Handshake {
        Handshake::Server(Box::new(server))
    }
}

impl From<UnbufferedClientConnection> for Handshake {
    fn from(client: UnbufferedClientConnection) -> Handshake {
        Handshake::Client(Box::new(client))
    }
}

impl Session {
    pub(super) fn new(handshake: impl Into<Handshake>) -> Session {
        Session {
            wire: Wire::default(),
            phase: Phase::Handshake(handshake.into()),
            security: Security::default(),
            early: Vec::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn record_layer(&mut self) -> Option<(&mut RecordLayer, &mut Wire)> {
        match &mut self.phase {
            Phase::Records(records) => Some((records, &mut self.wire)),
            Phase::Handshake(_) | Phase::Failed => None,
        }
    }
}

impl Records for Session {
    fn wire(&mut self) -> &mut Wire {
        &mut self.wire
    }

    fn shake_hands(&mut self) -> io::Result<bool> {
        let Session { wire, phase, security, early } = self;
        let Phase::Handshake(handshake) = phase else { return Ok(true) };
        let mut outgoing = Vec::new();
        let done = handshake.go_on(wire, &mut outgoing, early);
        if done.is_err() {
            // The alert. Nothing that came is looked at for that.
            while handshake.state().wants_write()
                && matches!(handshake.step(&mut [], &mut outgoing, &mut Vec::new()), (_, Ok(Step::On)))
            {}
        }
        wire.write_all(&outgoing)?;
        let Some(is_over) = done.map_err(failed)? else { return Ok(false) };
        *security = handshake.security();
        if let Phase::Handshake(handshake) = mem::replace(phase, Phase::Failed) {
            *phase = Phase::Records(Box::new(handshake.finish(is_over).map_err(failed)?));
        }
        Ok(true)
    }

    fn security(&self) -> Security {
        self.security.clone()
    }

    fn seal(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.phase {
            Phase::Records(records) => records.seal(slices, &mut self.wire),
            Phase::Handshake(_) | Phase::Failed => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn open(&mut self, slice: &mut [u8]) -> io::Result<Opened> {
        if !self.early.is_empty() {
            let count = self.early.len().min(slice.len());
            slice[..count].copy_from_slice(&self.early[..count]);
            self.early.drain(..count);
            if self.early.is_empty() {
                self.early = Vec::new();
            }
            return Ok(Opened::Bytes(count));
        }
        match &mut self.phase {
            Phase::Records(records) => records.open(slice, &mut self.wire),
            Phase::Handshake(_) | Phase::Failed => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn close(&mut self) {
        if let Phase::Records(records) = &mut self.phase {
            records.close(&mut self.wire);
        }
    }
}

//! The records of a TLS connection whose handshake rustls has done.
//!
//! rustls makes the keys, here and when one end changes them; sealing and opening is done here, so that what is sent is sealed
//! straight from where it lies to where it is sent from, and what came is opened straight to where it is wanted, or where it
//! was received. rustls by itself copies each byte twice more. Source: RFC 8446 sections 4.6.3, 5 and 6; RFC 5246 section 6.2.3.3, RFC 5288, RFC 7905.

use std::io::{self, IoSlice};
use std::ops::Range;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets, HandshakeType, InvalidMessage,
    PeerMisbehaved, ProtocolVersion, SupportedCipherSuite,
};

use super::session::failed;
use super::stream::{Opened, RECORD};
use super::wire::Wire;

/// What is in front of each record: its type, version and length.
const HEADER: usize = 5;
const TAG: usize = 16;
const NONCE: usize = 12;
/// The part of a nonce that TLS 1.2 with AES-GCM says in each record. Source: RFC 5288 section 3.
const EXPLICIT: usize = 8;
/// The version that records say they are of, TLS 1.2, also where it is 1.3.
const VERSION: [u8; 2] = [3, 3];
/// How much longer than its plain bytes a record may be. Source: RFC 8446 section 5.2; for TLS 1.2 it is what its ciphers add.
const EXPANSION: usize = 256;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

const WARNING: u8 = 1;
const FATAL: u8 = 2;

const HELLO_REQUEST: u8 = 0;
const CLIENT_HELLO: u8 = 1;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// The longest handshake message that is put together, in bytes, as rustls has it.
const MESSAGE: usize = 65535;
/// How many warnings are heard until it is enough. Source: BoringSSL `kMaxWarningAlerts`.
const WARNINGS: u8 = 4;
/// How often the other end may change its keys with no data between. Source: BoringSSL `kMaxKeyUpdates`.
const KEY_UPDATES: u8 = 32;

/// How the keys are made that come after these.
pub(super) enum Keys {
    Server(KernelConnection<ServerConnectionData>),
    Client(KernelConnection<ClientConnectionData>),
}

impl Keys {
    fn version(&self) -> ProtocolVersion {
        match self {
            Keys::Server(keys) => keys.protocol_version(),
            Keys::Client(keys) => keys.protocol_version(),
        }
    }

    fn suite(&self) -> SupportedCipherSuite {
        match self {
            Keys::Server(keys) => keys.negotiated_cipher_suite(),
            Keys::Client(keys) => keys.negotiated_cipher_suite(),
        }
    }

    fn next_to_seal(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Keys::Server(keys) => keys.update_tx_secret(),
            Keys::Client(keys) => keys.update_tx_secret(),
        }
    }

    fn next_to_open(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Keys::Server(keys) => keys.update_rx_secret(),
            Keys::Client(keys) => keys.update_rx_secret(),
        }
    }
}

/// How records are made, by version and cipher.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Tls13,
    /// TLS 1.2 with AES-GCM.
    Explicit,
    /// TLS 1.2 with ChaCha20-Poly1305.
    Implicit,
}

/// How the other end has broken the rules, and what it is told of that, if anything.
struct Broken(Option<AlertDescription>, Error);

impl From<Error> for Broken {
    fn from(error: Error) -> Broken {
        Broken(Some(AlertDescription::InternalError), error)
    }
}

fn too_long() -> Broken {
    Broken(Some(AlertDescription::RecordOverflow), Error::PeerSentOversizedRecord)
}

/// What came is known, but not wanted now.
fn unexpected(why: PeerMisbehaved) -> Broken {
    Broken(Some(AlertDescription::UnexpectedMessage), why.into())
}

/// A record of a type that is not to come.
fn unwanted(kind: u8) -> Broken {
    let expect_types = vec![ContentType::ApplicationData];
    let got_type = ContentType::from(kind);
    Broken(Some(AlertDescription::UnexpectedMessage), Error::InappropriateMessage { expect_types, got_type })
}

/// One direction.
struct Direction {
    key: LessSafeKey,
    iv: [u8; NONCE],
    /// Of the next record. Never twice the same with one key.
    number: u64,
    form: Form,
}

/// Where the bytes of a record were opened to.
enum Place {
    /// To the front of where they were wanted, so many.
    There(usize),
    /// In the record's own place, counted from its body.
    Here(Range<usize>),
}

impl Direction {
    fn new((number, secrets): (u64, ConnectionTrafficSecrets), is_13: bool) -> Result<Direction, Error> {
        let unknown = || Error::General("there is no such cipher here".to_owned());
        let (algorithm, key, iv, form) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv, Form::Explicit),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv, Form::Explicit),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv, Form::Implicit),
            _ => return Err(unknown()),
        };
        let key = LessSafeKey::new(UnboundKey::new(algorithm, key.as_ref()).map_err(|_| unknown())?);
        let iv = iv.as_ref().try_into().map_err(|_| unknown())?;
        Ok(Direction { key, iv, number, form: if is_13 { Form::Tls13 } else { form } })
    }

    /// The nonce of the next record. Source: RFC 8446 section 5.3; rustls and RFC 7905 have it so for TLS 1.2 as well.
    fn nonce(&self) -> [u8; NONCE] {
        let mut nonce = self.iv;
        for (byte, number) in nonce[NONCE - 8..].iter_mut().zip(self.number.to_be_bytes()) {
            *byte ^= number;
        }
        nonce
    }

    /// What a record of TLS 1.2 is known by beside its bytes. Source: RFC 5246 section 6.2.3.3.
    fn additional(&self, kind: u8, length: usize) -> [u8; 13] {
        let mut additional = [0; 13];
        additional[..8].copy_from_slice(&self.number.to_be_bytes());
        additional[8] = kind;
        additional[9..11].copy_from_slice(&VERSION);
        additional[11..].copy_from_slice(&(length as u16).to_be_bytes());
        additional
    }

    /// Seals a record of `plain`, at most [`RECORD`] bytes, onto the wire. Not one with a number that was used before.
    fn seal(&mut self, kind: u8, plain: Plain<'_>, wire: &mut Wire) -> Result<(), Error> {
        let length = plain.length();
        let nonce = self.nonce();
        // In front of the sealed bytes, and sealed behind them.
        let (outer, explicit, inner) = match self.form {
            Form::Tls13 => (APPLICATION_DATA, 0, &[kind][..]),
            Form::Explicit => (kind, EXPLICIT, &[][..]),
            Form::Implicit => (kind, 0, &[][..]),
        };
        let body = explicit + length + inner.len() + TAG;
        let record = wire.place(HEADER + body);
        let (header, rest) = record.split_at_mut(HEADER);
        header[0] = outer;
        header[1..3].copy_from_slice(&VERSION);
        header[3..].copy_from_slice(&(body as u16).to_be_bytes());
        let (front, rest) = rest.split_at_mut(explicit);
        front.copy_from_slice(&nonce[NONCE - explicit..]);
        let (sealed, tag) = rest.split_at_mut(length);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let additional = self.additional(kind, length);
        let additional = Aad::from(if self.form == Form::Tls13 { &header[..] } else { &additional[..] });
        let done = match plain {
            Plain::Whole(bytes) => self.key.seal_out_of_place_scatter(nonce, additional, bytes, sealed, inner, tag),
            Plain::Pieces(pieces, _) => {
                let mut rest = &mut *sealed;
                for piece in pieces {
                    let (place, behind) = rest.split_at_mut(piece.len().min(rest.len()));
                    place.copy_from_slice(&piece[..place.len()]);
                    rest = behind;
                }
                self.key.seal_in_place_scatter(nonce, additional, sealed, inner, tag)
            }
        };
        done.map_err(|_| Error::EncryptError)?;
        wire.put(HEADER + body);
        self.number += 1;
        Ok(())
    }

    /// Opens a record: into `slice`, if all that is in it surely fits there, or where it is. Its type and where its bytes are.
    fn open(&mut self, header: [u8; HEADER], body: &mut [u8], slice: &mut [u8]) -> Result<(u8, Place), Broken> {
        let bad = || Broken(Some(AlertDescription::BadRecordMac), Error::DecryptError);
        let explicit = if self.form == Form::Explicit { EXPLICIT } else { 0 };
        let length = body.len().checked_sub(explicit + TAG).ok_or_else(bad)?;
        let mut nonce = self.nonce();
        nonce[NONCE - explicit..].copy_from_slice(&body[..explicit]);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let additional = self.additional(header[0], length);
        let additional = Aad::from(if self.form == Form::Tls13 { &header[..] } else { &additional[..] });
        let (sealed, tag) = body[explicit..].split_at_mut(length);
        let there = slice.get_mut(..length);
        let (opened, is_there) = match there {
            Some(there) => (self.key.open_separate_gather(nonce, additional, sealed, tag, there).map(|()| there), true),
            None => (self.key.open_in_place_separate_tag(nonce, additional, tag, sealed), false),
        };
        let opened = opened.map_err(|_| bad())?;
        let (kind, length) = match self.form {
            Form::Explicit | Form::Implicit => (header[0], length),
            // Behind the bytes is their type, and behind that there may be zeroes. Source: RFC 8446 section 5.4.
            Form::Tls13 => match opened.iter().rposition(|byte| *byte != 0) {
                Some(end) => (opened[end], end),
                None => return Err(unexpected(PeerMisbehaved::IllegalTlsInnerPlaintext)),
            },
        };
        // Zeroes count, too.
        if opened.len() > RECORD + usize::from(self.form == Form::Tls13) {
            return Err(too_long());
        }
        self.number += 1;
        Ok((kind, if is_there { Place::There(length) } else { Place::Here(explicit..explicit + length) }))
    }
}

/// What is sealed into one record.
enum Plain<'a> {
    Whole(&'a [u8]),
    /// The front of these, so many bytes.
    Pieces(&'a [IoSlice<'a>], usize),
}

impl Plain<'_> {
    /// What goes into the next record. What is large is sealed from where it is; what is small is gathered, up to what is large.
    fn of<'a>(slices: &'a [IoSlice<'a>]) -> Plain<'a> {
        match slices {
            [only] => Plain::Whole(&only[..only.len().min(RECORD)]),
            [first, ..] if first.len() >= RECORD => Plain::Whole(&first[..RECORD]),
            _ => {
                let small = slices.iter().take_while(|slice| slice.len() < RECORD);
                Plain::Pieces(slices, small.map(|slice| slice.len()).sum::<usize>().min(RECORD))
            }
        }
    }

    fn length(&self) -> usize {
        match self {
            Plain::Whole(bytes) => bytes.len(),
            Plain::Pieces(_, length) => *length,
        }
    }
}

/// See the module.
pub(super) struct RecordLayer {
    keys: Keys,
    is_13: bool,
    sealing: Direction,
    opening: Direction,
    /// How many records are sealed with one key.
    limit: u64,
    /// A handshake message whose end has not come.
    message: Vec<u8>,
    /// What of the record at the front of what came is opened and not taken yet, and how long that record is.
    opened: Range<usize>,
    record: usize,
    /// The other end is to be told that keys were changed, before anything else.
    owes_update: bool,
    /// The other end has said that nothing more will come.
    is_over: bool,
    /// Nothing more may be said.
    is_silent: bool,
    warnings_left: u8,
    updates_left: u8,
    was_renegotiation_refused: bool,
}

impl RecordLayer {
    pub(super) fn new(keys: Keys, secrets: ExtractedSecrets, is_over: bool) -> Result<RecordLayer, Error> {
        let is_13 = keys.version() == ProtocolVersion::TLSv1_3;
        let limit = match keys.suite() {
            SupportedCipherSuite::Tls12(suite) => suite.common.confidentiality_limit,
            SupportedCipherSuite::Tls13(suite) => suite.common.confidentiality_limit,
        };
        Ok(RecordLayer {
            keys,
            is_13,
            sealing: Direction::new(secrets.tx, is_13)?,
            opening: Direction::new(secrets.rx, is_13)?,
            limit,
            message: Vec::new(),
            opened: 0..0,
            record: 0,
            owes_update: false,
            is_over,
            is_silent: false,
            warnings_left: WARNINGS,
            updates_left: KEY_UPDATES,
            was_renegotiation_refused: false,
        })
    }

    /// Seals a record from the front of `slices`, which are not empty. How many bytes that were.
    pub(super) fn seal(&mut self, slices: &[IoSlice<'_>], wire: &mut Wire) -> io::Result<usize> {
        if self.is_silent {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let plain = Plain::of(slices);
        let length = plain.length();
        self.say(APPLICATION_DATA, plain, wire).map_err(failed)?;
        Ok(length)
    }

    /// Seals a record, with new keys where those that there are have been used enough.
    fn say(&mut self, kind: u8, plain: Plain<'_>, wire: &mut Wire) -> Result<(), Error> {
        if self.owes_update || (self.is_13 && self.sealing.number >= self.limit) {
            // What is asked for with it: nothing.
            let update = [KEY_UPDATE, 0, 0, 1, 0];
            self.sealing.seal(HANDSHAKE, Plain::Whole(&update), wire)?;
            self.sealing = Direction::new(self.keys.next_to_seal()?, self.is_13)?;
            self.owes_update = false;
        }
        // TLS 1.2 has no way to go on, but to say goodbye.
        if self.sealing.number >= self.limit && kind == APPLICATION_DATA {
            self.close(wire);
            return Err(Error::General("the keys of this connection have been used up".to_owned()));
        }
        self.sealing.seal(kind, plain, wire)
    }

    fn alert(&mut self, level: u8, what: AlertDescription, wire: &mut Wire) {
        if !self.is_silent {
            // Who cannot be told is told by the end of the stream.
            let _ = self.say(ALERT, Plain::Whole(&[level, u8::from(what)]), wire);
        }
    }

    /// Says that nothing more will come.
    pub(super) fn close(&mut self, wire: &mut Wire) {
        self.alert(WARNING, AlertDescription::CloseNotify, wire);
        self.is_silent = true;
    }

    /// Opens into `slice`, which is not empty. Errors: the other end has broken the rules, which it was told, or has said that
    /// this has.
    pub(super) fn open(&mut self, slice: &mut [u8], wire: &mut Wire) -> io::Result<Opened> {
        loop {
            if !self.opened.is_empty() {
                let count = self.opened.len().min(slice.len());
                let from = self.opened.start;
                slice[..count].copy_from_slice(&wire.unread()[from..from + count]);
                self.opened.start += count;
                self.forget(wire);
                return Ok(Opened::Bytes(count));
            }
            if self.is_over {
                return Ok(Opened::Closed);
            }
            match self.next(slice, wire) {
                Ok(Some(0)) => {}
                Ok(Some(count)) => return Ok(Opened::Bytes(count)),
                Ok(None) => return Ok(Opened::Starved),
                Err(Broken(alert, error)) => {
                    if let Some(alert) = alert {
                        self.alert(FATAL, alert, wire);
                    }
                    self.is_silent = true;
                    return Err(failed(error));
                }
            }
        }
    }

    /// The record at the front is not needed any more, if nothing of it is left.
    fn forget(&mut self, wire: &mut Wire) {
        if self.opened.is_empty() {
            wire.used(self.record);
            (self.opened, self.record) = (0..0, 0);
        }
    }

    /// Opens the next record. How many bytes of it are in `slice` by now; what does not fit there is still to be taken. `None`:
    /// there is no whole record.
    fn next(&mut self, slice: &mut [u8], wire: &mut Wire) -> Result<Option<usize>, Broken> {
        let Some(header) = wire.unread().first_chunk::<HEADER>().copied() else { return Ok(None) };
        let [outer, major, _, high, low] = header;
        let length = usize::from(u16::from_be_bytes([high, low]));
        if major != VERSION[0] {
            let why = InvalidMessage::UnknownProtocolVersion;
            return Err(Broken(Some(AlertDescription::DecodeError), why.into()));
        }
        if self.is_13 && outer != APPLICATION_DATA {
            return Err(unwanted(outer));
        }
        if length > RECORD + EXPANSION {
            return Err(too_long());
        }
        let Some(body) = wire.unread_mut().get_mut(HEADER..HEADER + length) else { return Ok(None) };
        let (kind, place) = self.opening.open(header, body, slice)?;
        self.record = HEADER + length;
        if kind == APPLICATION_DATA && self.message.is_empty() {
            self.updates_left = KEY_UPDATES;
            let there = match place {
                Place::There(count) => count,
                Place::Here(range) => {
                    self.opened = HEADER + range.start..HEADER + range.end;
                    0
                }
            };
            self.forget(wire);
            return Ok(Some(there));
        }
        let content = match place {
            Place::There(count) => slice[..count].to_vec(),
            Place::Here(range) => body[range].to_vec(),
        };
        self.forget(wire);
        match kind {
            ALERT if self.message.is_empty() => self.hear(&content)?,
            HANDSHAKE if !content.is_empty() => self.shake_hands(&content, wire)?,
            _ if !self.message.is_empty() => {
                return Err(unexpected(PeerMisbehaved::MessageInterleavedWithHandshakeMessage));
            }
            _ => return Err(unwanted(kind)),
        }
        Ok(Some(0))
    }

    /// Hears an alert. Errors: one that ends the connection. Source: RFC 8446 section 6, which leaves two that do not; RFC 5246
    /// section 7.2.
    fn hear(&mut self, content: &[u8]) -> Result<(), Broken> {
        let &[level, what] = content else {
            return Err(Broken(Some(AlertDescription::DecodeError), InvalidMessage::InvalidContentType.into()));
        };
        let what = AlertDescription::from(what);
        if what == AlertDescription::CloseNotify {
            self.is_over = true;
            return Ok(());
        }
        let error = Error::AlertReceived(what);
        match level {
            WARNING if self.is_13 && what != AlertDescription::UserCanceled => {
                Err(Broken(Some(AlertDescription::DecodeError), error))
            }
            WARNING => match self.warnings_left.checked_sub(1) {
                Some(left) => {
                    self.warnings_left = left;
                    Ok(())
                }
                None => Err(unexpected(PeerMisbehaved::TooManyWarningAlertsReceived)),
            },
            FATAL => Err(Broken(None, error)),
            _ => Err(Broken(Some(AlertDescription::IllegalParameter), error)),
        }
    }

    /// Hears what is left to say of a handshake that is done. Errors: it is not that.
    fn shake_hands(&mut self, content: &[u8], wire: &mut Wire) -> Result<(), Broken> {
        self.message.extend_from_slice(content);
        while let Some(&[kind, high, middle, low]) = self.message.first_chunk::<4>() {
            let length = u32::from_be_bytes([0, high, middle, low]) as usize;
            if length > MESSAGE {
                return Err(Broken(
                    Some(AlertDescription::DecodeError),
                    InvalidMessage::HandshakePayloadTooLarge.into(),
                ));
            }
            let Some(body) = self.message.get(4..4 + length) else { return Ok(()) };
            let asks_for_ours = body == [1];
            let is_update = asks_for_ours || body == [0];
            self.message.drain(..4 + length);
            match (kind, &self.keys) {
                (KEY_UPDATE, _) if self.is_13 && is_update => self.renew(asks_for_ours)?,
                // To come back with, which nobody here does.
                (NEW_SESSION_TICKET, Keys::Client(_)) if self.is_13 => {}
                (CLIENT_HELLO, Keys::Server(_)) | (HELLO_REQUEST, Keys::Client(_)) if !self.is_13 => {
                    // Once it is a question, and twice it is more.
                    if std::mem::replace(&mut self.was_renegotiation_refused, true) {
                        return Err(unexpected(PeerMisbehaved::TooManyRenegotiationRequests));
                    }
                    self.alert(WARNING, AlertDescription::NoRenegotiation, wire);
                }
                (KEY_UPDATE, _) if self.is_13 => {
                    let why = InvalidMessage::InvalidKeyUpdate;
                    return Err(Broken(Some(AlertDescription::IllegalParameter), why.into()));
                }
                _ => {
                    let error = Error::InappropriateHandshakeMessage {
                        expect_types: Vec::new(),
                        got_type: HandshakeType::from(kind),
                    };
                    return Err(Broken(Some(AlertDescription::UnexpectedMessage), error));
                }
            }
        }
        Ok(())
    }

    /// The other end has changed its keys, and wants to have ours changed as well, or not.
    fn renew(&mut self, ours: bool) -> Result<(), Broken> {
        // What is behind it has to be in a record of its own. Source: RFC 8446 section 5.1.
        if !self.message.is_empty() {
            return Err(unexpected(PeerMisbehaved::KeyEpochWithPendingFragment));
        }
        self.updates_left = match self.updates_left.checked_sub(1) {
            Some(left) => left,
            None => return Err(unexpected(PeerMisbehaved::TooManyKeyUpdateRequests)),
        };
        self.opening = Direction::new(self.keys.next_to_open()?, self.is_13)?;
        // Once, however often it is asked for before something is sent.
        self.owes_update |= ours;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::Arc;

    use rustls::client::{UnbufferedClientConnection, WebPkiServerVerifier};
    use rustls::crypto::{CryptoProvider, aws_lc_rs};
    use rustls::pki_types::{PrivateKeyDer, ServerName};
    use rustls::server::UnbufferedServerConnection;
    use rustls::{
        CipherSuite, ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
    };

    use super::super::session::Session;
    use super::super::stream::Records;
    use super::*;

    /// Both ends of connections of one cipher.
    struct Configs {
        server: Arc<ServerConfig>,
        client: Arc<ClientConfig>,
    }

    fn configs(suite: SupportedCipherSuite) -> Configs {
        let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let provider = aws_lc_rs::default_provider();
        let provider = Arc::new(CryptoProvider { cipher_suites: vec![suite], ..provider });
        let chain = vec![own.cert.der().clone()];
        let key = PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(chain[0].clone()).unwrap();
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        let versions = [suite.version()];
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&versions);
        let client = ClientConfig::builder_with_provider(provider).with_protocol_versions(&versions);
        let mut server = server.unwrap().with_no_client_auth().with_single_cert(chain, key).unwrap();
        let mut client = client.unwrap().with_webpki_verifier(verifier.build().unwrap()).with_no_client_auth();
        server.enable_secret_extraction = true;
        client.enable_secret_extraction = true;
        Configs { server: Arc::new(server), client: Arc::new(client) }
    }

    /// The end that is tested, and the other: all of it by rustls.
    struct Ends {
        here: Session,
        there: Connection,
        /// What the other end has opened.
        received: Vec<u8>,
    }

    fn ends(configs: &Configs, is_server: bool) -> Ends {
        let name = ServerName::try_from("localhost").unwrap();
        let (server, client) = (Arc::clone(&configs.server), Arc::clone(&configs.client));
        if is_server {
            let here = Session::new(UnbufferedServerConnection::new(server).unwrap());
            Ends { here, there: ClientConnection::new(client, name).unwrap().into(), received: Vec::new() }
        } else {
            let here = Session::new(UnbufferedClientConnection::new(client, name).unwrap());
            Ends { here, there: ServerConnection::new(server).unwrap().into(), received: Vec::new() }
        }
    }

    impl Ends {
        /// Takes to the other end what this has to say.
        fn speak(&mut self) -> Result<(), Error> {
            let wire = self.here.wire();
            while !wire.unsent().is_empty() {
                let count = self.there.read_tls(&mut wire.unsent()).unwrap();
                wire.went(count);
                self.there.process_new_packets()?;
                // Without goodbye there is an error at the end of what was opened.
                if let Err(error) = self.there.reader().read_to_end(&mut self.received) {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                }
            }
            Ok(())
        }

        /// Takes here what the other end has to say.
        fn listen(&mut self) {
            let mut said = Vec::new();
            while self.there.wants_write() {
                self.there.write_tls(&mut said).unwrap();
            }
            self.come(&said);
        }

        fn come(&mut self, mut said: &[u8]) {
            while !said.is_empty() {
                let room = self.here.wire().room();
                let count = room.len().min(said.len());
                room[..count].copy_from_slice(&said[..count]);
                self.here.wire().came(count);
                said = &said[count..];
            }
        }

        fn shake_hands(&mut self) {
            for _ in 0..10 {
                self.listen();
                let is_done = self.here.shake_hands().unwrap();
                self.speak().unwrap();
                if is_done && !self.there.is_handshaking() {
                    return;
                }
            }
            panic!("the handshake does not end");
        }

        /// Seals all of `bytes`, cut into slices of these lengths in turn.
        fn send(&mut self, mut bytes: &[u8], lengths: &[usize]) -> io::Result<()> {
            let mut cut = Vec::new();
            for length in lengths.iter().cycle() {
                if bytes.is_empty() {
                    break;
                }
                let (piece, rest) = bytes.split_at((*length).min(bytes.len()));
                cut.push(IoSlice::new(piece));
                bytes = rest;
            }
            let mut cut = &mut cut[..];
            while !cut.is_empty() {
                let count = self.here.seal(cut)?;
                assert!((1..=RECORD).contains(&count));
                IoSlice::advance_slices(&mut cut, count);
            }
            Ok(())
        }

        /// What there is to open, into slices of these lengths in turn; an error, or whether the other end has said goodbye.
        fn receive(&mut self, lengths: &[usize]) -> (Vec<u8>, io::Result<bool>) {
            let mut bytes = Vec::new();
            for length in lengths.iter().cycle() {
                let mut slice = vec![0; *length];
                match self.here.open(&mut slice) {
                    Ok(Opened::Bytes(count)) => bytes.extend_from_slice(&slice[..count]),
                    Ok(Opened::Starved) => return (bytes, Ok(false)),
                    Ok(Opened::Closed) => return (bytes, Ok(true)),
                    Err(error) => return (bytes, Err(error)),
                }
            }
            unreachable!("there are lengths")
        }

        fn received_there(&mut self) -> Vec<u8> {
            std::mem::take(&mut self.received)
        }

        fn layer(&mut self) -> &mut RecordLayer {
            self.here.record_layer().unwrap().0
        }
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|at| (at * 7 + at / 251) as u8).collect()
    }

    fn suite(name: CipherSuite) -> SupportedCipherSuite {
        *aws_lc_rs::ALL_CIPHER_SUITES.iter().find(|suite| suite.suite() == name).unwrap()
    }

    fn of_13() -> SupportedCipherSuite {
        suite(CipherSuite::TLS13_AES_128_GCM_SHA256)
    }

    fn of_12() -> SupportedCipherSuite {
        suite(CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256)
    }

    const PIECES: [usize; 8] = [1, 20, 16, 16384, 4096, 40000, 5, 16383];

    #[test]
    fn rustls_and_the_records_understand_each_other_by_every_cipher() {
        let all = bytes(300_000);
        let mut tried = 0;
        for suite in aws_lc_rs::ALL_CIPHER_SUITES {
            // A key of one kind signs for half of those of TLS 1.2, and the others differ in nothing else.
            if suite.suite().as_str().unwrap().contains("_RSA_") {
                continue;
            }
            tried += 1;
            let configs = configs(*suite);
            for is_server in [true, false] {
                let mut ends = ends(&configs, is_server);
                ends.shake_hands();
                for round in 0..3 {
                    ends.send(&all, &PIECES[round..]).unwrap();
                    ends.speak().unwrap();
                    assert!(ends.received_there() == all, "{suite:?}");
                    for piece in all.chunks(30_000 + round) {
                        ends.there.writer().write_all(piece).unwrap();
                        ends.listen();
                        let (opened, end) = ends.receive(&PIECES[round..]);
                        assert!(opened == piece && !end.unwrap(), "{suite:?}");
                    }
                }
            }
        }
        assert_eq!(tried, 6);
    }

    #[test]
    fn data_that_comes_along_with_the_end_of_the_handshake_is_not_lost() {
        for suite in [of_13(), of_12()] {
            let mut ends = ends(&configs(suite), true);
            let all = bytes(40_000);
            while ends.there.is_handshaking() {
                ends.listen();
                ends.here.shake_hands().unwrap();
                ends.speak().unwrap();
            }
            ends.there.writer().write_all(&all).unwrap();
            ends.there.send_close_notify();
            ends.listen();
            assert!(ends.here.shake_hands().unwrap());
            let (opened, end) = ends.receive(&[1000]);
            assert!(opened == all && end.unwrap());
        }
    }

    #[test]
    fn either_end_may_change_its_keys_at_any_time() {
        for is_server in [true, false] {
            let mut ends = ends(&configs(of_13()), is_server);
            ends.shake_hands();
            for round in 0..100 {
                let all = bytes(round * 100 + 1);
                match round % 3 {
                    0 => ends.there.refresh_traffic_keys().unwrap(),
                    1 => ends.layer().limit = ends.layer().sealing.number,
                    _ => ends.layer().limit = u64::MAX,
                }
                ends.there.writer().write_all(&all).unwrap();
                ends.listen();
                let (opened, end) = ends.receive(&[50]);
                assert!(opened == all && !end.unwrap());
                ends.send(&all, &[30]).unwrap();
                ends.speak().unwrap();
                assert!(ends.received_there() == all);
            }
        }
    }

    #[test]
    fn keys_are_changed_when_they_have_been_used_enough() {
        let mut ends = ends(&configs(of_13()), true);
        ends.shake_hands();
        ends.layer().limit = 3;
        for _ in 0..20 {
            ends.send(b"data", &[4]).unwrap();
            assert!(ends.layer().sealing.number <= 3 + 1);
            ends.speak().unwrap();
            assert_eq!(ends.received_there(), b"data");
        }
    }

    #[test]
    fn with_tls_1_2_a_connection_whose_keys_are_used_up_says_goodbye() {
        let mut ends = ends(&configs(of_12()), true);
        ends.shake_hands();
        ends.layer().limit = ends.layer().sealing.number + 1;
        ends.send(b"data", &[4]).unwrap();
        assert!(ends.send(b"more", &[4]).is_err());
        ends.speak().unwrap();
        assert!(ends.there.reader().read(&mut [0]).is_ok(), "the end, and not that there is nothing");
        assert_eq!(ends.received_there(), b"data");
    }

    #[test]
    fn a_peer_that_changes_its_keys_and_says_nothing_is_not_followed_for_ever() {
        let mut ends = ends(&configs(of_13()), true);
        ends.shake_hands();
        let mut error = None;
        for _ in 0..100 {
            ends.there.refresh_traffic_keys().unwrap();
            ends.listen();
            error = ends.receive(&[50]).1.err();
            if error.is_some() {
                break;
            }
        }
        assert!(error.unwrap().to_string().contains("TooManyKeyUpdateRequests"));
        // And it was answered once, if at all.
        assert!(ends.here.wire().unsent().len() < 100);
    }

    #[test]
    fn a_record_that_was_changed_ends_the_connection_and_the_other_end_hears_why() {
        for suite in [of_13(), of_12()] {
            for at in [HEADER, HEADER + 30, HEADER + 1000] {
                for room in [100, 20_000] {
                    let mut ends = ends(&configs(suite), true);
                    ends.shake_hands();
                    ends.there.writer().write_all(&bytes(2000)).unwrap();
                    let mut said = Vec::new();
                    ends.there.write_tls(&mut said).unwrap();
                    said[at] ^= 1;
                    ends.come(&said);
                    let (opened, end) = ends.receive(&[room]);
                    assert!(opened.is_empty());
                    assert_eq!(end.unwrap_err().to_string(), Error::DecryptError.to_string());
                    let heard = ends.speak().unwrap_err();
                    assert_eq!(heard, Error::AlertReceived(AlertDescription::BadRecordMac));
                    // That was the last word.
                    ends.here.close();
                    assert!(ends.here.wire().unsent().is_empty());
                    assert!(ends.send(b"more", &[4]).is_err());
                }
            }
        }
    }

    #[test]
    fn a_record_is_opened_once() {
        let mut ends = ends(&configs(of_13()), true);
        ends.shake_hands();
        ends.there.writer().write_all(b"once").unwrap();
        let mut said = Vec::new();
        ends.there.write_tls(&mut said).unwrap();
        ends.come(&said);
        ends.come(&said);
        let (opened, end) = ends.receive(&[100]);
        assert!(opened == b"once" && end.is_err());
    }

    #[test]
    fn goodbyes_are_said_and_heard_once() {
        for suite in [of_13(), of_12()] {
            let mut ends = ends(&configs(suite), true);
            ends.shake_hands();
            ends.there.writer().write_all(b"last").unwrap();
            ends.there.send_close_notify();
            ends.listen();
            let (opened, end) = ends.receive(&[3]);
            assert!(opened == b"last" && end.unwrap());
            // Who has nothing more to say may still listen.
            ends.send(b"still here", &[10]).unwrap();
            ends.here.close();
            ends.here.close();
            ends.speak().unwrap();
            assert!(ends.there.reader().read(&mut [0]).is_ok(), "the end, and not that there is nothing");
            assert_eq!(ends.received_there(), b"still here");
        }
    }

    /// Whatever it is: nobody has sealed it, or the other end has, and it is no record that is to come.
    #[test]
    fn no_record_is_too_strange() {
        let mut random = fastrand::Rng::with_seed(7);
        for suite in [of_13(), of_12()] {
            let configs = configs(suite);
            for round in 0..200 {
                let mut here = ends(&configs, round % 2 == 0).here;
                let mut there = ends(&configs, round % 2 == 1).here;
                while !(here.shake_hands().unwrap() & there.shake_hands().unwrap()) {
                    carry(&mut here, &mut there);
                    carry(&mut there, &mut here);
                }
                carry(&mut here, &mut there);
                carry(&mut there, &mut here);
                for _ in 0..4 {
                    let kind = random.u8(19..25);
                    let mut content = vec![0; random.usize(0..40)];
                    random.fill(&mut content);
                    if random.bool() && content.len() >= 4 {
                        let length = content.len() - 4;
                        let kinds = [HELLO_REQUEST, CLIENT_HELLO, NEW_SESSION_TICKET, KEY_UPDATE, 20];
                        content[0] = kinds[random.usize(0..kinds.len())];
                        content[1..4].copy_from_slice(&[0, 0, length as u8]);
                    }
                    if random.u8(0..4) == 0 {
                        let header = [kind, 3, 3, 0, content.len() as u8];
                        there.wire().write_all(&header).unwrap();
                        there.wire().write_all(&content).unwrap();
                    } else {
                        let (records, wire) = there.record_layer().unwrap();
                        records.say(kind, Plain::Whole(&content), wire).unwrap();
                    }
                    carry(&mut there, &mut here);
                    let mut slice = vec![0; random.usize(1..60)];
                    while let Ok(Opened::Bytes(count)) = here.open(&mut slice) {
                        assert_eq!(kind, APPLICATION_DATA);
                        assert!(count <= content.len());
                    }
                }
            }
        }
    }

    /// Takes to one end what the other has to say.
    fn carry(from: &mut Session, to: &mut Session) {
        let said = from.wire().unsent().to_vec();
        from.wire().went(said.len());
        to.wire().room()[..said.len()].copy_from_slice(&said);
        to.wire().came(said.len());
    }
}

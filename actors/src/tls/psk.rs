//! TLS with pre-shared keys, both ends, by OpenSSL, because rustls has none that come from outside.

use std::fmt;
use std::io::{self, IoSlice};

use openssl::dh::Dh;
use openssl::error::ErrorStack;
use openssl::ssl::{
    ErrorCode, Ssl, SslContext, SslContextBuilder, SslMethod, SslMode, SslOptions, SslSessionCacheMode, SslStream,
    SslVerifyMode, SslVersion,
};

use super::certificates::has_fast_aes;
use super::keys::Keys;
use super::stream::{Opened, RECORD, Records, secure};
use super::wire::Wire;
use super::{Acceptor, Connector, Securing, Security};
use crate::transport::Transport;

/// What is spoken by TLS 1.3. Keys from outside go with SHA-256, and only with that, where the peer does not say otherwise.
const SUITES: [&str; 2] = ["TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"];
/// What is spoken by TLS 1.2: first what keeps old traffic safe when a key becomes known, the fast before the slow.
const CIPHERS: [&str; 7] = [
    "DHE-PSK-AES128-GCM-SHA256",
    "DHE-PSK-AES256-GCM-SHA384",
    "ECDHE-PSK-CHACHA20-POLY1305",
    "DHE-PSK-CHACHA20-POLY1305",
    "PSK-AES128-GCM-SHA256",
    "PSK-AES256-GCM-SHA384",
    "PSK-CHACHA20-POLY1305",
];

/// The group ffdhe2048, which clients know by name. Source: RFC 7919 appendix A.1, as `openssl genpkey -genparam` writes it.
const FFDHE2048: &[u8] = b"\
-----BEGIN DH PARAMETERS-----\n\
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz\n\
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a\n\
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7\n\
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi\n\
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD\n\
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==\n\
-----END DH PARAMETERS-----\n";

/// Lets clients in by pre-shared keys: TLS 1.2 and 1.3.
#[derive(Clone)]
pub struct PreSharedKeys(SslContext);

impl fmt::Debug for PreSharedKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PreSharedKeys")
    }
}

impl PreSharedKeys {
    /// Lets in whoever has one of these keys. Errors: the library does not do what is needed, for people.
    pub fn new(keys: Keys) -> Result<PreSharedKeys, String> {
        let directory = Directory::new(keys);
        let context = context(SslMethod::tls_server(), |builder| {
            builder.set_tmp_dh(&*Dh::params_from_pem(FFDHE2048)?)?;
            builder.set_num_tickets(0)?;
            builder.set_psk_server_callback(move |_, user, key| directory.look_up(user.unwrap_or_default(), key));
            Ok(())
        });
        context.map(PreSharedKeys).map_err(|error| format!("OpenSSL: {error}"))
    }
}

impl Acceptor for PreSharedKeys {
    fn accept(&self, transport: Box<dyn Transport>) -> Securing {
        secure(Session::new(&self.0, SslStream::accept), transport)
    }
}

/// Goes to servers by a pre-shared key: TLS 1.2 and 1.3.
#[derive(Clone)]
pub struct SharedKey(SslContext);

impl fmt::Debug for SharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedKey")
    }
}

impl SharedKey {
    /// As `user`, with the key that `keys` has of it. Errors: it has none; the library does not do what is needed, for people.
    pub fn new(keys: &Keys, user: &[u8]) -> Result<SharedKey, String> {
        let found = keys.all().iter().find(|(known, _)| known == user);
        let Some((user, key)) = found.cloned() else {
            return Err(format!("user {} is not in it", user.escape_ascii()));
        };
        let context = context(SslMethod::tls_client(), |builder| {
            builder.set_psk_client_callback(move |_, _, place_of_user, place_of_key| {
                // A string of C.
                let Some((place, end)) = place_of_user.split_at_mut_checked(user.len()) else { return Ok(0) };
                let (Some(end), Some(place_of_key)) = (end.first_mut(), place_of_key.get_mut(..key.len())) else {
                    return Ok(0);
                };
                place.copy_from_slice(&user);
                *end = 0;
                place_of_key.copy_from_slice(&key);
                Ok(key.len())
            });
            // Nobody who does not know the key gets so far.
            builder.set_verify(SslVerifyMode::NONE);
            Ok(())
        });
        context.map(SharedKey).map_err(|error| format!("OpenSSL: {error}"))
    }
}

impl Connector for SharedKey {
    fn connect(&self, transport: Box<dyn Transport>) -> Securing {
        secure(Session::new(&self.0, SslStream::connect), transport)
    }
}

/// What both ends have, and what one of them has besides.
fn context(
    method: SslMethod,
    besides: impl FnOnce(&mut SslContextBuilder) -> Result<(), ErrorStack>,
) -> Result<SslContext, ErrorStack> {
    let mut builder = SslContextBuilder::new(method)?;
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    builder.set_options(
        SslOptions::CIPHER_SERVER_PREFERENCE
            | SslOptions::NO_COMPRESSION
            | SslOptions::NO_RENEGOTIATION
            | SslOptions::NO_TICKET,
    );
    let mut suites = SUITES;
    if !has_fast_aes() {
        suites.reverse();
    }
    builder.set_ciphersuites(&suites.join(":"))?;
    builder.set_cipher_list(&CIPHERS.join(":"))?;
    // Nothing to come back with: a client is asked for its key each time.
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    // An idle client holds no buffers.
    builder.set_mode(SslMode::RELEASE_BUFFERS);
    builder.set_read_ahead(true);
    besides(&mut builder)?;
    Ok(builder.build())
}

/// Whose key is what.
struct Directory(Keys);

impl Directory {
    fn new(keys: Keys) -> Directory {
        Directory(keys)
    }

    /// Writes the key of `user` to the front of `key`. How long it is. Somebody whom nobody knows gets a key that nobody has, so
    /// that both fail alike, in what is said and in how long it takes; so all are looked at, too.
    fn look_up(&self, user: &[u8], key: &mut [u8]) -> Result<usize, ErrorStack> {
        let mut found = Vec::new();
        let mut longest = 0;
        for (known, secret) in self.0.all().iter().rev() {
            longest = longest.max(secret.len());
            if known.len() == user.len() && openssl::memcmp::eq(known, user) {
                found.clone_from(secret);
            }
        }
        if found.is_empty() {
            found = vec![0; longest];
            openssl::rand::rand_bytes(&mut found)?;
        }
        match key.get_mut(..found.len()) {
            Some(place) => {
                place.copy_from_slice(&found);
                Ok(found.len())
            }
            None => Ok(0),
        }
    }
}

/// One connection.
struct Session {
    stream: SslStream<Wire>,
    /// Goes on with the handshake, from this end.
    step: fn(&mut SslStream<Wire>) -> Result<(), openssl::ssl::Error>,
}

impl Session {
    fn new(
        context: &SslContext,
        step: fn(&mut SslStream<Wire>) -> Result<(), openssl::ssl::Error>,
    ) -> io::Result<Session> {
        let stream = SslStream::new(Ssl::new(context)?, Wire::default())?;
        Ok(Session { stream, step })
    }
}

/// What OpenSSL says, in one line and without what only its makers understand.
fn failed(error: &openssl::ssl::Error) -> io::Error {
    let why = match error.ssl_error().and_then(|stack| stack.errors().first()) {
        Some(error) => error.reason().unwrap_or("unknown error").to_owned(),
        None => error.to_string(),
    };
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Records for Session {
    fn wire(&mut self) -> &mut Wire {
        self.stream.get_mut()
    }

    fn shake_hands(&mut self) -> io::Result<bool> {
        match (self.step)(&mut self.stream) {
            Ok(()) => Ok(true),
            Err(error) if is_hungry(&error) => Ok(false),
            Err(error) => Err(failed(&error)),
        }
    }

    fn security(&self) -> Security {
        let ssl = self.stream.ssl();
        let cipher = ssl.current_cipher().map_or("", |cipher| cipher.name());
        Security { summary: format!("{} {cipher}, pre-shared key", ssl.version_str()), names: None }
    }

    fn seal(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut gathered = [0; RECORD];
        let plain = match slices {
            [only] => &only[..only.len().min(RECORD)],
            [first, ..] if first.len() >= RECORD => &first[..RECORD],
            _ => {
                let mut length = 0;
                for slice in slices {
                    let count = slice.len().min(RECORD - length);
                    gathered[length..length + count].copy_from_slice(&slice[..count]);
                    length += count;
                }
                &gathered[..length]
            }
        };
        self.stream.ssl_write(plain).map_err(|error| failed(&error))
    }

    fn open(&mut self, slice: &mut [u8]) -> io::Result<Opened> {
        match self.stream.ssl_read(slice) {
            Ok(count) => Ok(Opened::Bytes(count)),
            Err(error) if error.code() == ErrorCode::ZERO_RETURN => Ok(Opened::Closed),
            Err(error) if is_hungry(&error) => Ok(Opened::Starved),
            Err(error) => Err(failed(&error)),
        }
    }

    fn close(&mut self) {
        // Only what is put on the wire matters.
        let _ = self.stream.shutdown();
    }
}

/// It would go on if more had come: the wire takes all that is written.
fn is_hungry(error: &openssl::ssl::Error) -> bool {
    error.code() == ErrorCode::WANT_READ
}

//! `info`: a read-only disk that tells the client about itself or the server: the export name it asked for, its own
//! address, the time. What a client sends is given back to it, no more of it than it sent, and nothing of the machine.
//! Source: nbdkit plugins/info/info.c, plugins/info/nbdkit-info-plugin.pod.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nbdcaptive_actors::device::{
    self, Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Peer, Support, ThreadModel,
};

use crate::layer::{About, ConfigError, Parameter, Plugin, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "info",
    summary: "a read-only disk that tells the client about itself or the server

        The disk is as long as what it says, and that is all of it: no line end, no padding. A client can find out
        in which way its connection arrives.

        # Examples

        What the server takes the client's address for, and what the time is there (16 bytes, seconds and
        microseconds, with the most significant byte first):

            nbdcaptive info mode=address --run 'nbdcopy \"$uri\" - | cat'
            nbdcaptive info mode=time --run 'nbdcopy \"$uri\" - | od -t x1'
        ",
    parameters: &[Parameter {
        key: "mode",
        value: "exportname|base64exportname|address|time|uptime|conntime|version",
        help: "what is told, the export name unless given",
        required: false,
    }],
    magic_key: Some("mode"),
    thread_model: ThreadModel::Parallel,
    dump: &[("info_address", "yes"), ("info_base64", "yes")],
};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    ExportName,
    Base64ExportName,
    Address,
    Time,
    Uptime,
    ConnectionTime,
    Version,
}

/// The plugin.
#[derive(Debug)]
pub struct Info {
    mode: Mode,
    loaded: Instant,
}

impl Default for Info {
    fn default() -> Info {
        Info { mode: Mode::default(), loaded: Instant::now() }
    }
}

impl Plugin for Info {
    fn callbacks(&self) -> &'static str {
        "load dump_plugin config config_help open close get_size can_multi_conn can_cache pread"
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        if key != "mode" {
            return Err(ConfigError(format!("unknown parameter '{key}'")));
        }
        let text = value.text(key)?;
        self.mode = match text.to_ascii_lowercase().as_str() {
            "exportname" | "export-name" => Mode::ExportName,
            "base64exportname" | "base64-export-name" => Mode::Base64ExportName,
            "address" => Mode::Address,
            "time" => Mode::Time,
            "uptime" => Mode::Uptime,
            "conntime" => Mode::ConnectionTime,
            "version" => Mode::Version,
            _ => return Err(ConfigError(format!("unknown mode: '{text}'"))),
        };
        Ok(())
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(Disks { mode: self.mode, loaded: self.loaded }))
    }
}

struct Disks {
    mode: Mode,
    loaded: Instant,
}

impl Exports for Disks {
    fn unloads(&self) -> bool {
        false
    }

    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        let content = match self.mode {
            Mode::ExportName => Content::Bytes(client.export_name.clone()),
            Mode::Base64ExportName => Content::Bytes(
                base64(&client.export_name)
                    .ok_or_else(|| Error::failed(ErrorCode::Invalid, "base64: the export name cannot be decoded"))?,
            ),
            Mode::Address => Content::Bytes(address(client.peer)),
            Mode::Time => Content::Now,
            Mode::Uptime => Content::Since(self.loaded),
            Mode::ConnectionTime => Content::Since(Instant::now()),
            Mode::Version => Content::Bytes(crate::identity::package().version.into()),
        };
        // Elsewhere two connections of one client may see different bytes.
        let multi_conn = matches!(self.mode, Mode::ExportName | Mode::Base64ExportName | Mode::Version);
        Ok(Box::new(Disk { content, multi_conn }))
    }
}

/// How a socket address is written; a Unix socket is just that, because its path is the machine's own affair.
fn address(peer: Option<Peer>) -> Vec<u8> {
    match peer {
        // Not as Rust writes it, which adds the scope of a link-local address.
        Some(Peer::Inet(std::net::SocketAddr::V6(peer))) => format!("[{}]:{}", peer.ip(), peer.port()).into(),
        Some(Peer::Inet(peer)) => peer.to_string().into(),
        Some(Peer::Unix { .. }) => "unix".into(),
        Some(Peer::Vsock { cid, port }) => format!("vsock:{cid}:{port}").into(),
        None => Vec::new(),
    }
}

/// The bytes that stand behind base64, in which white space does not count. `None`: it is not base64.
/// Source: RFC 4648 section 4.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let text: Vec<u8> = text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let padding = text.iter().rev().take_while(|byte| **byte == b'=').count();
    let digits = &text[..text.len() - padding];
    // A group is four, of which padding may be one or two.
    if !text.len().is_multiple_of(4) || padding > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in digits.chunks(4) {
        let mut number = 0_u32;
        for digit in group {
            let value = match digit {
                b'A'..=b'Z' => digit - b'A',
                b'a'..=b'z' => digit - b'a' + 26,
                b'0'..=b'9' => digit - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            number = number << 6 | u32::from(value);
        }
        number <<= 6 * (4 - group.len());
        let [_, three @ ..] = number.to_be_bytes();
        bytes.extend_from_slice(&three[..group.len() - 1]);
    }
    Some(bytes)
}

enum Content {
    Bytes(Vec<u8>),
    /// The time of day, each time it is read.
    Now,
    /// How long ago this was, each time it is read.
    Since(Instant),
}

/// Seconds in eight bytes and microseconds in four, each with the most significant byte first.
fn packed(time: Duration) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&time.as_secs().to_be_bytes());
    bytes[8..].copy_from_slice(&time.subsec_micros().to_be_bytes());
    bytes
}

struct Disk {
    content: Content,
    multi_conn: bool,
}

impl Device for Disk {
    fn size(&self) -> device::Result<u64> {
        Ok(match &self.content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Now | Content::Since(_) => 12,
        })
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities { multi_conn: self.multi_conn, cache: Support::Native, ..Capabilities::default() })
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _call: &Call) -> device::Result<()> {
        let time;
        let bytes = match &self.content {
            Content::Bytes(bytes) => bytes.as_slice(),
            Content::Now => {
                time = packed(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
                &time
            }
            Content::Since(start) => {
                time = packed(start.elapsed());
                &time
            }
        };
        // The range was checked against the size, which is the length of these bytes.
        buffer.copy_from_slice(&bytes[offset as usize..][..buffer.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4648 section 10.
    #[test]
    fn base64_is_decoded_as_the_rfc_has_it() {
        let cases: [(&str, &str); 9] = [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9vYg==", "foob"),
            ("Zm9vYmE=", "fooba"),
            ("Zm9vYmFy", "foobar"),
            ("Zm9v\nYmFy\n", "foobar"),
            ("Pz8/", "???"),
        ];
        for (text, bytes) in cases {
            assert_eq!(base64(text.as_bytes()).as_deref(), Some(bytes.as_bytes()), "{text}");
        }
        assert_eq!(base64(b"//79"), Some(vec![0xff, 0xfe, 0xfd]));
        for text in ["Z", "Zg", "Zg=", "Zg===", "=", "====", "Zm9vZ", "Zm9-", "Z=9v", "Zm9v\0"] {
            assert_eq!(base64(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn an_address_is_written_as_in_a_uri() {
        let inet = |text: &str| address(Some(Peer::Inet(text.parse().unwrap())));
        assert_eq!(inet("127.0.0.1:80"), b"127.0.0.1:80");
        assert_eq!(inet("[fe80::1%2]:80"), b"[fe80::1]:80");
        assert_eq!(address(Some(Peer::Unix { pid: None, uid: None, gid: None })), b"unix");
        assert_eq!(address(None), b"");
    }

    #[test]
    fn a_time_is_seconds_and_microseconds() {
        let time = packed(Duration::new(0x0102_0304, 5_000_999));
        assert_eq!(time, [0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0x13, 0x88]);
    }
}

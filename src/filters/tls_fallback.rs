//! `tls-fallback`: clients without TLS get a small read-only disk that says so, and nothing of the plugin. What is behind is
//! not even opened for them, so that they cannot wear it out.
//! Source: nbdkit filters/tls-fallback/tls-fallback.c, nbdkit-tls-fallback-filter.pod.

use std::sync::Arc;

use nbdcaptive_actors::device::{self, Call, Client, Device, Export, Exports, MetaContext, Segments, ThreadModel};
use nbdcaptive_actors::filter::{FilterExports, FilteredExports};

use crate::layer::{About, ConfigError, Filter, Lifetime, Parameter, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "tls-fallback",
    summary: "give clients without TLS a message instead of the disk",
    parameters: &[Parameter {
        key: "tlsreadme",
        value: "<MESSAGE>",
        help: "what clients without TLS read, at most 512 bytes",
        required: false,
    }],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The size of the small disk, in bytes.
const SIZE: usize = 512;

type Message = Arc<[u8; SIZE]>;

/// The filter.
#[derive(Debug)]
pub struct TlsFallback {
    message: [u8; SIZE],
}

impl Default for TlsFallback {
    fn default() -> Self {
        TlsFallback {
            message: padded(b"This NBD server requires TLS authentication before it will serve useful data.\n"),
        }
    }
}

/// Cut or filled up with zeroes.
fn padded(text: &[u8]) -> [u8; SIZE] {
    let mut message = [0; SIZE];
    let length = text.len().min(SIZE);
    message[..length].copy_from_slice(&text[..length]);
    message
}

impl Filter for TlsFallback {
    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "tlsreadme" => self.message = padded(value.bytes()),
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> Result<Arc<dyn Exports>, ConfigError> {
        // One who stays would keep everybody else out.
        if next.thread_model() == ThreadModel::SerializeConnections {
            return Err(ConfigError("the tls-fallback filter requires parallel connection support".into()));
        }
        Ok(Arc::new(FilteredExports(Fallback { next, message: Arc::new(self.message) })))
    }
}

struct Fallback {
    next: Arc<dyn Exports>,
    message: Message,
}

impl FilterExports for Fallback {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }
    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        if client.is_tls { self.next.open(client) } else { Ok(Box::new(Readme(Arc::clone(&self.message)))) }
    }
    fn list(&self, client: &Client) -> device::Result<Vec<Export>> {
        if client.is_tls {
            return self.next.list(client);
        }
        Ok(vec![Export { name: Vec::new(), description: String::new() }])
    }
    fn default_export(&self, client: &Client) -> device::Result<Option<Vec<u8>>> {
        if client.is_tls { self.next.default_export(client) } else { Ok(Some(Vec::new())) }
    }
    fn meta_contexts(&self, client: &Client) -> device::Result<Vec<MetaContext>> {
        if client.is_tls { self.next.meta_contexts(client) } else { Ok(Vec::new()) }
    }
    fn description(&self, client: &Client) -> Option<String> {
        if client.is_tls { self.next.description(client) } else { None }
    }
}

/// What a client without TLS gets.
struct Readme(Message);

impl Device for Readme {
    fn size(&self) -> device::Result<u64> {
        Ok(SIZE as u64)
    }
    fn answers_at_once(&self) -> bool {
        true
    }
    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> device::Result<()> {
        let mut reply = Segments::default();
        self.read_segments(&mut reply, buffer.len(), offset, call)?;
        buffer.copy_from_slice(&reply.to_vec());
        Ok(())
    }
    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, _call: &Call) -> device::Result<()> {
        // Ranges were checked against the size.
        let start = usize::try_from(offset).unwrap_or(SIZE).min(SIZE);
        let end = start.saturating_add(length).min(SIZE);
        reply.space(end - start).copy_from_slice(&self.0[start..end]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::testing::ready;

    fn over_null(parameters: &[(&str, &str)]) -> Arc<dyn Exports> {
        let next = ready("null", &[("size", "1M".as_ref())]).expect("it is a size");
        let mut filter = TlsFallback::default();
        for (key, value) in parameters {
            filter.config(key, Value(value.as_ref())).expect("it is a parameter");
        }
        Box::new(filter).ready(next, &mut Lifetime::default()).expect("it is complete")
    }

    #[test]
    fn a_client_without_tls_reads_the_message_and_one_with_tls_the_disk() {
        let exports = over_null(&[("tlsreadme", "come back with TLS")]);
        let plain = exports.open(&Client { export_name: b"any".to_vec(), ..Client::default() }).unwrap();
        assert_eq!(plain.size().unwrap(), 512);
        assert!(!plain.capabilities().unwrap().write);
        let mut buffer = [1; 20];
        plain.read(&mut buffer, 10, &Call::AT_ONCE).unwrap();
        assert_eq!(&buffer, b"with TLS\0\0\0\0\0\0\0\0\0\0\0\0");
        let secured = exports.open(&Client { is_tls: true, ..Client::default() }).unwrap();
        assert_eq!(secured.size().unwrap(), 1 << 20);
    }

    #[test]
    fn a_long_message_is_cut() {
        let exports = over_null(&[("tlsreadme", &"x".repeat(600))]);
        let plain = exports.open(&Client::default()).unwrap();
        let mut buffer = [0; 512];
        plain.read(&mut buffer, 0, &Call::AT_ONCE).unwrap();
        assert_eq!(buffer, [b'x'; 512]);
    }
}

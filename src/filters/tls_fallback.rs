//! `tls-fallback`: a client without TLS sees a message instead of the disk. Source: nbdkit filters/tls-fallback/tls-fallback.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{Call, Client, Device, Export, Exports, MetaContext, Result, ThreadModel};
use nbdcaptive_actors::filter::{FilterExports, FilteredExports};

use super::kit::{optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "tls-fallback",
    summary: "show a message to clients without TLS

        With `--tls=on` clients may do without TLS. With this filter they then see a disk that holds the message,
        read-only, and clients with TLS see the real one.

        # Examples

            nbdcaptive --tls=off --filter=tls-fallback memory 1M \\
                tlsreadme='use TLS' --run 'nbdcopy \"$uri\" - | head -1'
        ",
    parameters: &[optional("tlsreadme", "<MESSAGE>", "the message; what is over 512 bytes is cut off")],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// Bytes of the disk that holds the message.
const SIZE: usize = 512;

/// The filter: the message.
#[derive(Clone, Debug)]
pub struct TlsFallback(Vec<u8>);

impl Default for TlsFallback {
    fn default() -> TlsFallback {
        TlsFallback(b"This NBD server requires TLS authentication before it will serve useful data.\n".to_vec())
    }
}

impl Filter for TlsFallback {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "tlsreadme" => self.0 = value.bytes().to_owned(),
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        // Those with the message would keep out those with TLS.
        if next.thread_model() == ThreadModel::SerializeConnections {
            return Err(ConfigError("the tls-fallback filter requires parallel connection support".to_owned()));
        }
        let mut message = [0; SIZE];
        let length = self.0.len().min(SIZE);
        message[..length].copy_from_slice(&self.0[..length]);
        Ok(Arc::new(FilteredExports(Fallback { next, message: Message(message) })))
    }
}

struct Fallback {
    next: Arc<dyn Exports>,
    message: Message,
}

/// A client without TLS hears nothing of the next layer, and costs it nothing. CVE-2019-14850.
impl FilterExports for Fallback {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        if client.is_tls { self.next.open(client) } else { Ok(Box::new(self.message)) }
    }

    fn list(&self, client: &Client) -> Result<Vec<Export>> {
        if client.is_tls {
            return self.next.list(client);
        }
        Ok(vec![Export { name: Vec::new(), description: String::new() }])
    }

    fn default_export(&self, client: &Client) -> Result<Option<Vec<u8>>> {
        if client.is_tls { self.next.default_export(client) } else { Ok(Some(Vec::new())) }
    }

    fn meta_contexts(&self, client: &Client) -> Result<Vec<MetaContext>> {
        if client.is_tls { self.next.meta_contexts(client) } else { Ok(Vec::new()) }
    }

    fn description(&self, client: &Client) -> Option<String> {
        if client.is_tls { self.next.description(client) } else { None }
    }
}

#[derive(Clone, Copy)]
struct Message([u8; SIZE]);

impl Device for Message {
    fn size(&self) -> Result<u64> {
        Ok(SIZE as u64)
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _call: &Call) -> Result<()> {
        // Requests are inside the disk.
        buffer.copy_from_slice(&self.0[offset as usize..][..buffer.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{memory, over, read};

    #[test]
    fn only_a_client_with_tls_sees_the_disk() {
        let exports = over(memory("1M"), "tls-fallback", &[("tlsreadme", "use TLS")]).unwrap();
        let plain = exports.open(&Client::default()).unwrap();
        assert_eq!((plain.size().unwrap(), plain.capabilities().unwrap().write), (512, false));
        assert_eq!(read(&*plain, 4, 5), b"TLS\0\0");
        let secure = exports.open(&Client { is_tls: true, ..Client::default() }).unwrap();
        assert_eq!((secure.size().unwrap(), secure.capabilities().unwrap().write), (1 << 20, true));
    }

    #[test]
    fn does_not_go_with_one_client_at_a_time() {
        let serial = over(memory("1M"), "noparallel", &[("serialize", "connections")]).unwrap();
        let Err(error) = over(serial, "tls-fallback", &[]) else { panic!("it is taken") };
        assert_eq!(error.0, "the tls-fallback filter requires parallel connection support");
    }
}

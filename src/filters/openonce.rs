//! `openonce`: the plugin is opened once for each export and stays open, for plugins that take long to open.
//! Source: nbdkit filters/openonce/openonce.c, nbdkit-openonce-filter.pod.

use std::sync::{Arc, Mutex, PoisonError};

use nbdcaptive_actors::device::{self, Client, Device, Exports, ThreadModel};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports};

use crate::layer::{About, ConfigError, Filter, Lifetime};

/// See the module.
pub static ABOUT: About = About {
    name: "openonce",
    summary: "open the plugin once and keep it open

        For plugins that take long to open. Each export is opened for the first client that asks for it, and stays
        open until the server ends.

        # Examples

            nbdcaptive --filter=openonce file disk.img --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct OpenOnce;

impl Filter for OpenOnce {
    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Once { next, open: Mutex::default() })))
    }
}

struct Once {
    next: Arc<dyn Exports>,
    /// With the name, and whether it is read-only and for clients with TLS.
    open: Mutex<Vec<(Key, Arc<dyn Device>)>>,
}

#[derive(PartialEq)]
struct Key {
    export_name: Vec<u8>,
    read_only: bool,
    is_tls: bool,
}

impl FilterExports for Once {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        let Client { export_name, read_only, is_tls, .. } = client.clone();
        let key = Key { export_name, read_only, is_tls };
        // Held while it opens, so that two who come at once do not open it twice.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let device = match open.iter().find(|(known, _)| *known == key) {
            Some((_, device)) => Arc::clone(device),
            None => {
                // It outlives this client, and is nobody's in particular.
                let anybody = |connection| Client { peer: None, peer_label: None, connection, ..client.clone() };
                let opened = client.connection.outlived(|connection| self.next.open(&anybody(connection)));
                let device: Arc<dyn Device> = Arc::from(opened?);
                open.push((key, Arc::clone(&device)));
                device
            }
        };
        Ok(Box::new(Filtered(Shared(device))))
    }

    /// Clients share what each had for itself.
    fn thread_model(&self) -> ThreadModel {
        match self.next.thread_model() {
            ThreadModel::SerializeRequests => ThreadModel::SerializeAllRequests,
            model => model,
        }
    }

    fn unloads(&self) -> bool {
        true
    }

    fn unload(&self) -> device::Result<()> {
        let open = std::mem::take(&mut *self.open.lock().unwrap_or_else(PoisonError::into_inner));
        // All are closed, and the first that fails is told.
        open.into_iter().map(|(_, device)| device.close()).fold(Ok(()), Result::and)
    }
}

/// A device that is kept open.
struct Shared(Arc<dyn Device>);

impl filter::Filter for Shared {
    const OWNS_NEXT: bool = false;

    fn next(&self) -> &dyn Device {
        &*self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbdcaptive_actors::device::{Call, Result};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Counts how often it was opened and closed.
    #[derive(Default)]
    struct Counted {
        opened: AtomicUsize,
        closed: Arc<AtomicUsize>,
    }

    struct Disk(Arc<AtomicUsize>);

    impl Device for Disk {
        fn size(&self) -> Result<u64> {
            Ok(512)
        }
        fn read(&self, buffer: &mut [u8], _offset: u64, _call: &Call) -> Result<()> {
            buffer.fill(1);
            Ok(())
        }
        fn close(&self) -> Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    impl Exports for Counted {
        fn open(&self, _client: &Client) -> Result<Box<dyn Device>> {
            self.opened.fetch_add(1, Ordering::Relaxed);
            Ok(Box::new(Disk(Arc::clone(&self.closed))))
        }
        fn thread_model(&self) -> ThreadModel {
            ThreadModel::SerializeRequests
        }
    }

    #[test]
    fn opens_each_export_once_and_closes_it_at_the_end() {
        let counted = Arc::new(Counted::default());
        let next: Arc<dyn Exports> = counted.clone();
        let exports = Box::new(OpenOnce).ready(next, &mut Lifetime::default()).expect("it has nothing to refuse");
        assert_eq!(exports.thread_model(), ThreadModel::SerializeAllRequests);
        let named = |name: &str| Client { export_name: name.into(), ..Client::default() };
        for client in [named("a"), named("a"), named("b"), Client { read_only: true, ..named("a") }, named("b")] {
            let device = exports.open(&client).unwrap();
            assert_eq!(device.size().unwrap(), 512);
            device.close().unwrap();
        }
        let counts = || (counted.opened.load(Ordering::Relaxed), counted.closed.load(Ordering::Relaxed));
        assert_eq!(counts(), (3, 0));
        assert!(exports.unloads());
        exports.unload().unwrap();
        assert_eq!(counts(), (3, 3));
    }
}

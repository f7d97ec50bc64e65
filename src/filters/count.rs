//! `count`: counts the bytes that go by, for `-v` at the end. Source: nbdkit filters/count/count.c.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use nbdcaptive_actors::device::{Call, Client, Connection, Device, Exports, Extents, Result, ThreadModel};
use nbdcaptive_actors::filter::{FilterExports, Filtered, FilteredExports, Next};

use super::kit::{Gate, Gated, Request};
use crate::layer::{About, ConfigError, Filter, Lifetime};

/// See the module.
pub static ABOUT: About = About {
    name: "count",
    summary: "count the bytes that are read, written, zeroed and trimmed

        The numbers are said at the end, with `-v`.

        # Examples

            nbdcaptive -v --filter=count memory 1M --run 'nbdcopy \"$uri\" null:'
        ",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct Count;

impl Filter for Count {
    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Counted { next, counts: Arc::default(), speaker: OnceLock::new() })))
    }
}

/// Bytes.
#[derive(Debug, Default)]
struct Counts {
    read: AtomicU64,
    written: AtomicU64,
    zeroed: AtomicU64,
    trimmed: AtomicU64,
}

struct Counted {
    next: Arc<dyn Exports>,
    counts: Arc<Counts>,
    /// Through whom the end is told: the first who came.
    speaker: OnceLock<Connection>,
}

impl FilterExports for Counted {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        self.speaker.get_or_init(|| client.connection.of_the_server());
        Ok(Box::new(Filtered(Gated(Disk { next: Next::open(&*self.next, client)?, counts: Arc::clone(&self.counts) }))))
    }

    fn unloads(&self) -> bool {
        true
    }

    fn unload(&self) -> Result<()> {
        let Counts { read, written, zeroed, trimmed } = &*self.counts;
        let [read, written, zeroed, trimmed] = [read, written, zeroed, trimmed].map(|one| one.load(Ordering::Relaxed));
        if let Some(speaker) = self.speaker.get() {
            speaker
                .debug(format_args!("count bytes: read {read}, written {written}, zeroed {zeroed}, trimmed {trimmed}"));
        }
        Ok(())
    }
}

struct Disk {
    next: Next,
    counts: Arc<Counts>,
}

impl Gate for Disk {
    type Pass = ();

    fn next(&self) -> &Next {
        &self.next
    }

    fn before(&self, _request: &Request, _call: &Call) -> Result<()> {
        Ok(())
    }

    fn after(&self, (): (), request: &Request, result: &Result<()>, _map: Option<&Extents>) {
        let (count, length) = match request {
            Request::Read { length, .. } => (&self.counts.read, length),
            Request::Write { length, .. } => (&self.counts.written, length),
            Request::Zero { length, .. } => (&self.counts.zeroed, length),
            Request::Trim { length, .. } => (&self.counts.trimmed, length),
            Request::Flush | Request::Cache { .. } | Request::Extents { .. } => return,
        };
        if result.is_ok() {
            count.fetch_add(*length, Ordering::Relaxed);
        }
    }
}

//! `nocache`: how requests to bring data near are offered and passed on. Source: nbdkit filters/nocache/nocache.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{Call, Capabilities, Device, Exports, Result, Support, ThreadModel};
use nbdcaptive_actors::filter::{self, Filtered, Next};

use super::kit::{each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "nocache",
    summary: "change how data is brought near

        Clients can ask for data to be brought near before they read it. `none` offers that no more; `emulate` reads
        the data and drops it; `nop` offers it and does nothing.

        # Examples

            nbdcaptive --filter=nocache file disk.img cachemode=nop \\
                --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[optional("cachemode", "none|emulate|nop", "not, by reads, or by doing nothing; none")],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter: how it is offered.
#[derive(Debug, Default)]
pub struct NoCache(Support);

impl Filter for NoCache {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        self.0 = match (key, value.text(key)?) {
            ("cachemode", "none") => Support::None,
            ("cachemode", "emulate") => Support::Emulate,
            ("cachemode", "nop" | "no-op") => Support::Native,
            ("cachemode", text) => return Err(ConfigError(format!("unknown cachemode '{text}'"))),
            _ => return Err(unknown(key)),
        };
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(each(next, move |next, client| Ok(Filtered(Disk { next: Next::open(next, client)?, support: self.0 }))))
    }
}

struct Disk {
    next: Next,
    support: Support,
}

impl filter::Filter for Disk {
    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn capabilities(&self) -> Result<Capabilities> {
        Ok(Capabilities { cache: self.support, ..self.next.capabilities()? })
    }

    fn cache(&self, _length: u64, _offset: u64, _call: &Call) -> Result<()> {
        Ok(())
    }
}

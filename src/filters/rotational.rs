//! `rotational`: says of the disk that it turns, or that it does not. Source: nbdkit filters/rotational/rotational.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{Capabilities, Device, Exports, Result, ThreadModel};
use nbdcaptive_actors::filter::{self, Filtered, Next};

use super::kit::{each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "rotational",
    summary: "say whether the disk turns

        Some clients read in another order from disks that turn. Without this filter the plugin says.

        # Examples

            nbdcaptive --filter=rotational memory 1M --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[optional("rotational", "<BOOL>", "whether it does; true unless given")],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct Rotational(bool);

impl Default for Rotational {
    fn default() -> Rotational {
        Rotational(true)
    }
}

impl Filter for Rotational {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "rotational" => self.0 = values::boolean(value.text(key)?).map_err(ConfigError)?,
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(each(next, move |next, client| Ok(Filtered(Disk { next: Next::open(next, client)?, turns: self.0 }))))
    }
}

struct Disk {
    next: Next,
    turns: bool,
}

impl filter::Filter for Disk {
    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn capabilities(&self) -> Result<Capabilities> {
        Ok(Capabilities { rotational: self.turns, ..self.next.capabilities()? })
    }
}

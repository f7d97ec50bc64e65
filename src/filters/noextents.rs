//! `noextents`: clients are not told of holes. Source: nbdkit filters/noextents/noextents.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{Capabilities, Device, Exports, Result, ThreadModel};
use nbdcaptive_actors::filter::{self, Filtered, Next};

use super::kit::each;
use crate::layer::{About, ConfigError, Filter, Lifetime};

/// See the module.
pub static ABOUT: About = About {
    name: "noextents",
    summary: "do not tell clients of holes

        To clients all of the disk is data. For file systems that take long to say where holes are.

        # Examples

            nbdcaptive --filter=noextents memory 1M --run 'nbdinfo --map \"$uri\"'
        ",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct NoExtents;

impl Filter for NoExtents {
    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(each(next, |next, client| Ok(Filtered(Disk(Next::open(next, client)?)))))
    }
}

struct Disk(Next);

impl filter::Filter for Disk {
    fn next(&self) -> &dyn Device {
        &self.0
    }

    fn capabilities(&self) -> Result<Capabilities> {
        Ok(Capabilities { extents: false, ..self.0.capabilities()? })
    }
}

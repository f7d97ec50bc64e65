//! `nofilter`: nothing, in a layer of its own. Source: nbdkit filters/nofilter/nofilter.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{Exports, ThreadModel};

use crate::layer::{About, ConfigError, Filter, Lifetime};

/// See the module.
pub static ABOUT: About = About {
    name: "nofilter",
    summary: "pass everything on

What a stack with one filter more costs can be measured with it, and a script that may put a filter in has one to name where
it wants none.

# Examples

Two servers for the same disk:

    nbdcaptive memory 64M --run 'nbdinfo \"$uri\"'
    nbdcaptive --filter=nofilter memory 64M --run 'nbdinfo \"$uri\"'
",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct NoFilter;

impl Filter for NoFilter {
    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(next)
    }
}

//! `exitlast`: the server ends when its last client has left. Which clients count is the engine's to know; nothing
//! changes in the requests' way. Source: nbdkit filters/exitlast/exitlast.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{Exports, ThreadModel};

use crate::layer::{About, ConfigError, Filter, Lifetime};

/// See the module.
pub static ABOUT: About = About {
    name: "exitlast",
    summary: "end when the last client has left

        The server ends, with status 0, when nobody is connected any more who has got as far as an export. Clients
        that only look around, list exports say, do not count: neither as the first nor as the last. If a client is
        in the midst of its handshake when the last other one leaves, it decides.

        With `--run` the command goes on, and its exit status counts. Another `--filter=exitwhen` may be given as
        well.

        # Examples

            nbdcaptive -f -U /tmp/disk.sock --filter=exitlast file disk.img
        ",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct ExitLast;

impl Filter for ExitLast {
    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        lifetime: &mut Lifetime,
    ) -> Result<Arc<dyn Exports>, ConfigError> {
        lifetime.exit_last = true;
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asks_for_the_end_and_changes_nothing_else() {
        let next = crate::plugins::testing::ready("null", &[]).expect("no parameter is required");
        let mut lifetime = Lifetime::default();
        let after = Box::new(ExitLast).ready(Arc::clone(&next), &mut lifetime).expect("it has nothing to refuse");
        assert!(lifetime.exit_last);
        assert!(Arc::ptr_eq(&next, &after));
    }
}

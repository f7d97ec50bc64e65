//! `noparallel`: fewer requests at a time. Source: nbdkit filters/noparallel/noparallel.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{Exports, ThreadModel};
use nbdcaptive_actors::filter::{FilterExports, FilteredExports};

use super::kit::{optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "noparallel",
    summary: "serve one request at a time

        `requests` takes the next request of a client when the one before is answered; `all-requests` takes one of
        all clients together; `connections` serves one client at a time, and others wait.

        # Examples

            nbdcaptive --filter=noparallel file disk.img serialize=all-requests \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        optional("serialize", "requests|all-requests|connections", "of each client, of all, or one client; requests"),
        optional("serialise", "requests|all-requests|connections", "another name for serialize"),
    ],
    magic_key: None,
    thread_model: ThreadModel::SerializeRequests,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct NoParallel(ThreadModel);

impl Default for NoParallel {
    fn default() -> NoParallel {
        NoParallel(ThreadModel::SerializeRequests)
    }
}

impl Filter for NoParallel {
    fn thread_model(&self) -> Option<ThreadModel> {
        Some(self.0)
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        self.0 = match (key, value.text(key)?) {
            ("serialize" | "serialise", "connections") => ThreadModel::SerializeConnections,
            ("serialize" | "serialise", "all-requests" | "all_requests") => ThreadModel::SerializeAllRequests,
            ("serialize" | "serialise", "requests") => ThreadModel::SerializeRequests,
            ("serialize" | "serialise", text) => {
                return Err(ConfigError(format!("unknown noparallel serialize mode '{text}'")));
            }
            _ => return Err(unknown(key)),
        };
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Serial { next, model: self.0 })))
    }
}

struct Serial {
    next: Arc<dyn Exports>,
    model: ThreadModel,
}

impl FilterExports for Serial {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn thread_model(&self) -> ThreadModel {
        self.model.min(self.next.thread_model())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{memory, over, refused};

    #[test]
    fn makes_the_model_stricter_and_never_looser() {
        let model = |mode| over(memory("1M"), "noparallel", &[("serialize", mode)]).unwrap().thread_model();
        assert_eq!(model("requests"), ThreadModel::SerializeRequests);
        assert_eq!(model("all_requests"), ThreadModel::SerializeAllRequests);
        assert_eq!(model("connections"), ThreadModel::SerializeConnections);
        assert_eq!(over(memory("1M"), "noparallel", &[]).unwrap().thread_model(), ThreadModel::SerializeRequests);
        let strict = crate::plugins::testing::ready("example1", &[]).unwrap();
        assert_eq!(over(strict, "noparallel", &[]).unwrap().thread_model(), ThreadModel::SerializeAllRequests);
        assert_eq!(refused("noparallel", &[("serialise", "x")]), "unknown noparallel serialize mode 'x'");
    }
}

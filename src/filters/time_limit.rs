//! `time-limit`: a client that asks for something after its time is up is disconnected. Source: nbdkit
//! filters/time-limit/time-limit.c.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nbdcaptive_actors::device::{Call, Client, Connection, Error, ErrorCode, Exports, Result, ThreadModel};
use nbdcaptive_actors::filter::{Filtered, Next};

use super::kit::{Gate, Gated, Request, each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "time-limit",
    summary: "disconnect clients after some time

        The time runs from the moment when the export is opened. What the client asks for after it fails, but for a
        flush, and the connection is closed.

        # Examples

            nbdcaptive --filter=time-limit memory 1M time-limit=30 \\
                --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[
        optional("time-limit", "<TIME>", "how long a client may stay, 60 seconds unless given; 0 for ever"),
        optional("time_limit", "<TIME>", "another name for time-limit"),
        optional("timelimit", "<TIME>", "another name for time-limit"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct TimeLimit(Duration);

impl Default for TimeLimit {
    fn default() -> TimeLimit {
        TimeLimit(Duration::from_secs(60))
    }
}

impl Filter for TimeLimit {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "time-limit" | "time_limit" | "timelimit" => {
                self.0 = values::delay(key, value.text(key)?).map_err(ConfigError)?;
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let limit = Some(self.0).filter(|limit| !limit.is_zero());
        Ok(each(next, move |next, client: &Client| {
            let until = limit.and_then(|limit| Instant::now().checked_add(limit));
            let connection = client.connection.clone();
            Ok(Filtered(Gated(Disk { next: Next::open(next, client)?, until, connection })))
        }))
    }
}

struct Disk {
    next: Next,
    /// `None`: for ever.
    until: Option<Instant>,
    connection: Connection,
}

impl Gate for Disk {
    type Pass = ();

    fn next(&self) -> &Next {
        &self.next
    }

    fn before(&self, request: &Request, _call: &Call) -> Result<()> {
        if *request == Request::Flush || self.until.is_none_or(|until| Instant::now() <= until) {
            return Ok(());
        }
        self.connection.debug(format_args!("time-limit: time limit exceeded, connection closed"));
        self.connection.disconnect();
        Err(Error::failed(ErrorCode::Shutdown, "time-limit: time limit exceeded"))
    }
}

//! `delay`: requests take longer. A delay ends when the client leaves or the server ends; what was delayed then fails.
//! Source: nbdkit filters/delay/delay.c.

use std::sync::Arc;
use std::time::Duration;

use nbdcaptive_actors::device::{Call, Capabilities, Client, Connection, Device, Error, Exports, Result, ThreadModel};
use nbdcaptive_actors::filter::{Filtered, Next};

use super::kit::{Gate, Gated, Request, each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

const TIME: &str = "<NN>[ms|us|ns]";

/// See the module.
pub static ABOUT: About = About {
    name: "delay",
    summary: "let requests take longer

        For seeing how a client does with a slow disk. Requests of a client that come at the same time are delayed
        at the same time, up to `--threads`. A delay ends when the client leaves or the server ends.

        # Examples

            nbdcaptive --filter=delay memory 1M rdelay=100ms wdelay=200ms \\
                --run 'nbdcopy \"$uri\" null:'
        ",
    parameters: &[
        optional("rdelay", TIME, "how long a read is delayed, in seconds unless it says otherwise"),
        optional("delay-read", TIME, "another name for rdelay"),
        optional("delay-reads", TIME, "another name for rdelay"),
        optional("wdelay", TIME, "how long writes, zeroes and trims are delayed"),
        optional("delay-write", TIME, "how long writes are delayed"),
        optional("delay-writes", TIME, "another name for delay-write"),
        optional("delay-zero", TIME, "how long zeroes are delayed"),
        optional("delay-zeroes", TIME, "another name for delay-zero"),
        optional("delay-trim", TIME, "how long trims are delayed"),
        optional("delay-trims", TIME, "another name for delay-trim"),
        optional("delay-discard", TIME, "another name for delay-trim"),
        optional("delay-discards", TIME, "another name for delay-trim"),
        optional("delay-extents", TIME, "how long block status is delayed"),
        optional("delay-extent", TIME, "another name for delay-extents"),
        optional("delay-cache", TIME, "how long cache is delayed"),
        optional("delay-fast-zero", "<BOOL>", "delay fast zeroes too, rather than refuse them; true"),
        optional("delay-open", TIME, "how long the opening of an export is delayed"),
        optional("delay-close", TIME, "how long the end of a connection is delayed"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Clone, Copy, Debug)]
pub struct Delay {
    read: Duration,
    write: Duration,
    zero: Duration,
    trim: Duration,
    extents: Duration,
    cache: Duration,
    open: Duration,
    close: Duration,
    fast_zero: bool,
}

impl Default for Delay {
    fn default() -> Delay {
        let none = Duration::ZERO;
        Delay {
            read: none,
            write: none,
            zero: none,
            trim: none,
            extents: none,
            cache: none,
            open: none,
            close: none,
            fast_zero: true,
        }
    }
}

impl Filter for Delay {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        let time = match key {
            "rdelay" | "delay-read" | "delay-reads" => &mut self.read,
            "wdelay" => {
                let time = values::delay(key, text).map_err(ConfigError)?;
                (self.write, self.zero, self.trim) = (time, time, time);
                return Ok(());
            }
            "delay-write" | "delay-writes" => &mut self.write,
            "delay-zero" | "delay-zeroes" => &mut self.zero,
            "delay-trim" | "delay-trims" | "delay-discard" | "delay-discards" => &mut self.trim,
            "delay-extent" | "delay-extents" => &mut self.extents,
            "delay-cache" => &mut self.cache,
            "delay-open" => &mut self.open,
            "delay-close" => &mut self.close,
            "delay-fast-zero" => {
                self.fast_zero = values::boolean(text).map_err(ConfigError)?;
                return Ok(());
            }
            _ => return Err(unknown(key)),
        };
        *time = values::delay(key, text).map_err(ConfigError)?;
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let delay = *self;
        Ok(each(next, move |next, client: &Client| {
            let connection = client.connection.clone();
            wait(&connection, delay.open, &Call::BLOCKING)?;
            Ok(Filtered(Gated(Disk { next: Next::open(next, client)?, delay, connection })))
        }))
    }
}

fn wait(connection: &Connection, time: Duration, call: &Call) -> Result<()> {
    if time.is_zero() { Ok(()) } else { connection.sleep(call, time) }
}

struct Disk {
    next: Next,
    delay: Delay,
    connection: Connection,
}

impl Disk {
    /// Fast zeroes are refused, because with the delay they would not be fast.
    fn refuses_fast_zeroes(&self) -> bool {
        !self.delay.zero.is_zero() && !self.delay.fast_zero
    }
}

impl Gate for Disk {
    type Pass = ();

    fn next(&self) -> &Next {
        &self.next
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let next = self.next.capabilities()?;
        Ok(Capabilities { fast_zero: next.fast_zero || self.refuses_fast_zeroes(), ..next })
    }

    fn before(&self, request: &Request, call: &Call) -> Result<()> {
        let time = match request {
            Request::Read { .. } => self.delay.read,
            Request::Write { .. } => self.delay.write,
            Request::Zero { flags, .. } if flags.fast && self.refuses_fast_zeroes() => {
                return Err(Error::not_supported("delay: zeroes are not fast"));
            }
            Request::Zero { .. } => self.delay.zero,
            Request::Trim { .. } => self.delay.trim,
            Request::Extents { .. } => self.delay.extents,
            Request::Cache { .. } => self.delay.cache,
            Request::Flush => Duration::ZERO,
        };
        wait(&self.connection, time, call)
    }

    fn close(&self) -> Result<()> {
        // The client has gone by now. The server's end cuts it short, and that is no failure of the close.
        let _ = wait(&self.connection.of_the_server(), self.delay.close, &Call::BLOCKING);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{device, refused};
    use nbdcaptive_actors::device::{ErrorCode, Flags};
    use std::time::Instant;

    /// Long enough to tell, short enough to wait for.
    const WHILE: Duration = Duration::from_millis(20);

    type Attempt<'a> = &'a dyn Fn(&Call) -> Result<()>;

    /// Which of read, write, zero, trim and cache are delayed.
    fn delayed(parameters: &[(&str, &str)]) -> [bool; 5] {
        let disk = device("1M", "delay", parameters);
        let calls: [Attempt<'_>; 5] = [
            &|call| disk.read(&mut [0; 4], 0, call),
            &|call| disk.write(b"data", 0, Flags::default(), call),
            &|call| disk.zero(4, 0, Flags::default(), call),
            &|call| disk.trim(4, 0, Flags::default(), call),
            &|call| disk.cache(4, 0, call),
        ];
        calls.map(|call| {
            let may_not_wait = call(&Call::AT_ONCE);
            let start = Instant::now();
            call(&Call::BLOCKING).unwrap();
            let waited = start.elapsed() >= WHILE;
            // One that does not wait may still be slow on a busy machine.
            assert!(waited || may_not_wait.is_ok());
            matches!(may_not_wait, Err(Error::WouldBlock))
        })
    }

    #[test]
    fn parameters_are_for_one_kind_or_for_all_that_change_something() {
        assert_eq!(delayed(&[]), [false; 5]);
        assert_eq!(delayed(&[("rdelay", "20ms")]), [true, false, false, false, false]);
        assert_eq!(delayed(&[("wdelay", "20ms")]), [false, true, true, true, false]);
        assert_eq!(delayed(&[("wdelay", "20ms"), ("delay-zeroes", "0")]), [false, true, false, true, false]);
        assert_eq!(delayed(&[("delay-discard", "20ms"), ("delay-cache", ".02")]), [false, false, false, true, true]);
    }

    #[test]
    fn fast_zeroes_are_refused_where_they_are_not_to_be_delayed() {
        let fast = Flags { fast: true, ..Flags::default() };
        let disk = device("1M", "delay", &[("delay-zero", "1000000"), ("delay-fast-zero", "no")]);
        assert!(disk.capabilities().unwrap().fast_zero);
        let error = disk.zero(4, 0, fast, &Call::BLOCKING).unwrap_err();
        assert_eq!(error.code(), ErrorCode::NotSupported);
        let disk = device("1M", "delay", &[("delay-fast-zero", "no")]);
        disk.zero(4, 0, fast, &Call::BLOCKING).unwrap();
    }

    #[test]
    fn what_is_no_delay_is_refused() {
        assert_eq!(refused("delay", &[("rdelay", "1m")]), "rdelay: could not parse delay or sleep: \"1m\"");
    }
}

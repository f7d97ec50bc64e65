//! `retry-request`: when a request fails, waits and makes it again, on the same device.
//! Source: nbdkit filters/retry-request/retry-request.c, nbdkit-retry-request-filter.pod.

use std::sync::Arc;
use std::time::Duration;

use nbdcaptive_actors::device::{
    Blocks, Call, Capabilities, Client, Connection, Device, ErrorCode, Exports, Extents, Flags, Result, Segments,
    ThreadModel,
};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports};

use super::kit::{optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "retry-request",
    summary: "repeat requests that fail

        For plugins that fail now and then but need not be opened again for that; else nbdcaptive-retry-filter(1)
        does.

        # Examples

            nbdcaptive --filter=retry-request --filter=error memory 1M \\
                error-pread-rate=10% retry-request-retries=10 \\
                retry-request-delay=1ms --run 'nbdcopy \"$uri\" null:'
        ",
    parameters: &[
        optional("retry-request-retries", "<N>", "how often, twice unless given"),
        optional("retry-request-delay", "<TIME>", "how long to wait before each time, 2 seconds unless given"),
        optional("retry-request-open", "<BOOL>", "also when the plugin cannot be opened, which is the default"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The most times that a request may be repeated.
const MAX_RETRIES: u32 = 1000;

/// How it waits. Not the whole time where the client leaves or the server ends.
type Sleep = fn(&Connection, Duration) -> Result<()>;

fn sleep(connection: &Connection, delay: Duration) -> Result<()> {
    connection.sleep(&Call::BLOCKING, delay)
}

/// The filter.
#[derive(Clone, Debug)]
pub struct RetryRequest {
    retries: u32,
    delay: Duration,
    open: bool,
    sleep: Sleep,
}

impl Default for RetryRequest {
    fn default() -> RetryRequest {
        RetryRequest { retries: 2, delay: Duration::from_secs(2), open: true, sleep }
    }
}

impl Filter for RetryRequest {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        match key {
            "retry-request-retries" => {
                self.retries = values::unsigned(key, text).map_err(ConfigError)?;
                if self.retries > MAX_RETRIES {
                    return Err(ConfigError("retry-request-retries: value too large".to_owned()));
                }
            }
            "retry-request-delay" => {
                self.delay = values::delay(key, text).map_err(ConfigError)?;
                if self.delay.is_zero() {
                    return Err(ConfigError("retry-request-delay cannot be 0".to_owned()));
                }
            }
            "retry-request-open" => self.open = values::boolean(text).map_err(ConfigError)?,
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Retries { next, settings: *self })))
    }
}

impl RetryRequest {
    fn retry<T>(&self, connection: &Connection, mut what: impl FnMut() -> Result<T>) -> Result<T> {
        let mut tries = 0;
        loop {
            let error = match what() {
                Err(error) if tries < self.retries => error,
                done => return done,
            };
            tries += 1;
            connection.debug(format_args!("retry {tries}: {error}; waiting {:?} before retrying", self.delay));
            if (self.sleep)(connection, self.delay).is_err() {
                return Err(error);
            }
        }
    }
}

struct Retries {
    next: Arc<dyn Exports>,
    settings: RetryRequest,
}

impl FilterExports for Retries {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let open = || self.next.open(client);
        let next = if self.settings.open { self.settings.retry(&client.connection, open) } else { open() }?;
        let connection = client.connection.clone();
        Ok(Box::new(Filtered(RetryDevice { next, settings: self.settings.clone(), connection })))
    }
}

/// One client's device.
struct RetryDevice {
    next: Box<dyn Device>,
    settings: RetryRequest,
    connection: Connection,
}

impl RetryDevice {
    fn retry<T>(&self, what: impl FnMut() -> Result<T>) -> Result<T> {
        self.settings.retry(&self.connection, what)
    }

    fn retry_extents(&self, extents: &mut Extents, what: impl Fn(&mut Extents) -> Result<()>) -> Result<()> {
        *extents = self.retry(|| {
            // What a failed attempt has described is forgotten.
            let mut fresh = Extents::new(extents.offset(), extents.length(), extents.one());
            what(&mut fresh)?;
            Ok(fresh)
        })?;
        Ok(())
    }
}

impl filter::Filter for RetryDevice {
    fn next(&self) -> &dyn Device {
        &*self.next
    }

    fn size(&self) -> Result<u64> {
        self.retry(|| self.next.size())
    }

    fn capabilities(&self) -> Result<Capabilities> {
        // Blocks that a failed write has taken are gone.
        Ok(Capabilities { takes_blocks: false, ..self.next.capabilities()? })
    }

    fn answers_at_once(&self) -> bool {
        false
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.retry(|| self.next.read(buffer, offset, call))
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        let start = reply.mark();
        self.retry(|| {
            reply.truncate(start);
            self.next.read_segments(reply, length, offset, call)
        })
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.retry(|| self.next.write(data, offset, flags, call))
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.write(&data.to_vec(), offset, flags, call)
    }

    fn flush(&self, call: &Call) -> Result<()> {
        self.retry(|| self.next.flush(call))
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.retry(|| self.next.trim(length, offset, flags, call))
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        // That zeroes have to be written is an answer, and no failure.
        self.retry(|| match self.next.zero(length, offset, flags, call) {
            Err(error) if error.code() == ErrorCode::NotSupported => Ok(Err(error)),
            done => done.map(Ok),
        })?
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        self.retry(|| self.next.cache(length, offset, call))
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        self.retry_extents(extents, |extents| self.next.extents(extents, call))
    }

    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        self.retry_extents(extents, |extents| self.next.meta_context(context, extents, call))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::next::testing::{Script, Scripted};

    fn open(script: &Arc<Script>, settings: RetryRequest) -> Result<Box<dyn Device>> {
        let next = Arc::new(Scripted(Arc::clone(script)));
        let settings = RetryRequest { sleep: no_sleep, ..settings };
        FilteredExports(Retries { next, settings }).open(&Client::default())
    }

    fn no_sleep(_: &Connection, delay: Duration) -> Result<()> {
        assert_eq!(delay, Duration::from_secs(2));
        Ok(())
    }

    const CALL: &Call = &Call::BLOCKING;

    #[test]
    fn nothing_is_tried_any_more_for_a_client_that_has_gone() {
        let script = Script::new(vec![0; 10]);
        let gone: Sleep = |_, _| Err(nbdcaptive_actors::device::Error::failed(ErrorCode::Shutdown, "gone"));
        let settings = RetryRequest { sleep: gone, ..RetryRequest::default() };
        let next = Arc::new(Scripted(Arc::clone(&script)));
        let device = FilteredExports(Retries { next, settings }).open(&Client::default()).unwrap();
        script.fail("flush", 1);
        assert_eq!(device.flush(CALL).unwrap_err().code(), ErrorCode::NoSpace);
    }

    #[test]
    fn a_request_is_made_three_times_at_most() {
        let script = Script::new(b"0123456789".to_vec());
        let device = open(&script, RetryRequest::default()).unwrap();
        for times in 0..=3 {
            let all = |result: Result<()>| assert_eq!(result.is_ok(), times < 3);
            let flags = Flags::default();
            for call in ["read", "write", "flush", "trim", "zero", "cache", "extents"] {
                script.fail(call, times);
            }
            all(device.read(&mut [0; 2], 0, CALL));
            script.fail("read", times);
            let mut reply = Segments::default();
            all(device.read_segments(&mut reply, 3, 1, CALL));
            if times < 3 {
                assert_eq!(reply.to_vec(), script.disk.lock().unwrap()[1..4]);
            }
            all(device.write(b"ab", 0, flags, CALL));
            all(device.flush(CALL));
            all(device.trim(1, 0, flags, CALL));
            all(device.zero(1, 0, flags, CALL));
            all(device.cache(1, 0, CALL));
            let mut extents = Extents::new(2, 5, false);
            all(device.extents(&mut extents, CALL));
        }
        assert!(!script.log().contains("close"));
    }

    #[test]
    fn opening_is_repeated_unless_that_is_not_wanted() {
        let script = Script::new(vec![0; 10]);
        script.fail("open", 2);
        assert!(open(&script, RetryRequest::default()).is_ok());
        script.fail("open", 1);
        assert!(open(&script, RetryRequest { open: false, ..RetryRequest::default() }).is_err());
    }

    #[test]
    fn that_zeroes_have_to_be_written_is_no_failure() {
        let script = Script::new(vec![0; 10]);
        let device = open(&script, RetryRequest::default()).unwrap();
        let fast = Flags { fast: true, ..Flags::default() };
        assert_eq!(device.zero(1, 0, fast, CALL).unwrap_err().code(), ErrorCode::NotSupported);
        assert_eq!(script.log(), "open zero:0+1");
    }
}

//! `retry`: when a request fails, closes the next device, waits, opens it again and makes the request again.
//!
//! What the client was told of the device is what it was when the client came. The one that is opened later may be smaller,
//! or may do less; then what asks for more fails, and is tried again like anything else.
//! Source: nbdkit filters/retry/retry.c, nbdkit-retry-filter.pod.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nbdcaptive_actors::device::{
    Call, Capabilities, Client, Connection, Device, Error, ErrorCode, Exports, Extents, Flags, Result, Segments,
    Support, ThreadModel,
};
use nbdcaptive_actors::filter::{FilterExports, FilteredExports};

use super::kit::{optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "retry",
    summary: "open the plugin again when a request fails, and repeat the request

        For plugins that lose their connection to something. When a request fails, the plugin is closed and opened
        again and the request is repeated, after a wait that grows. Clients notice nothing but the time.
        nbdcaptive-retry-request-filter(1) does it without opening the plugin again.

        # Examples

            nbdcaptive --filter=retry file disk.img retries=3 retry-delay=1 \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        optional("retries", "<N>", "how often, 5 times unless given"),
        optional("retry-delay", "<TIME>", "how long to wait before the first time, 2 seconds unless given"),
        optional("retry-exponential", "<BOOL>", "wait twice as long each time, which is the default"),
        optional("retry-readonly", "<BOOL>", "open it read-only after a failure"),
    ],
    magic_key: None,
    thread_model: ThreadModel::SerializeRequests,
    dump: &[],
};

/// The filter.
#[derive(Clone, Debug)]
pub struct Retry {
    retries: u32,
    delay: Duration,
    exponential: bool,
    read_only: bool,
}

impl Default for Retry {
    fn default() -> Retry {
        Retry { retries: 5, delay: Duration::from_secs(2), exponential: true, read_only: false }
    }
}

impl Filter for Retry {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        match key {
            "retries" => self.retries = values::unsigned(key, text).map_err(ConfigError)?,
            "retry-delay" => {
                self.delay = values::delay(key, text).map_err(ConfigError)?;
                if self.delay.is_zero() {
                    return Err(ConfigError("retry-delay cannot be 0".to_owned()));
                }
            }
            "retry-exponential" => self.exponential = values::boolean(text).map_err(ConfigError)?,
            "retry-readonly" => self.read_only = values::boolean(text).map_err(ConfigError)?,
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Retries { next, settings: *self, sleep })))
    }
}

/// How it waits. Not the whole time where the client leaves or the server ends.
type Sleep = fn(&Connection, Duration) -> Result<()>;

fn sleep(connection: &Connection, delay: Duration) -> Result<()> {
    connection.sleep(&Call::BLOCKING, delay)
}

struct Retries {
    next: Arc<dyn Exports>,
    settings: Retry,
    sleep: Sleep,
}

impl FilterExports for Retries {
    // The next device is closed and opened between two requests of a client.
    const THREAD_MODEL: ThreadModel = ThreadModel::SerializeRequests;

    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let device = RetryDevice {
            next: Arc::clone(&self.next),
            settings: self.settings.clone(),
            sleep: self.sleep,
            client: client.clone(),
            state: Mutex::default(),
        };
        device.first_open()?;
        Ok(Box::new(device))
    }
}

/// A device that was opened, and what it said of itself.
#[derive(Clone)]
struct Opened {
    device: Arc<dyn Device>,
    size: u64,
    capabilities: Capabilities,
}

#[derive(Default)]
struct State {
    opened: Option<Opened>,
    /// It was opened again at least once, or that was tried.
    reopened: bool,
    /// A device could not be closed, so what was written to it may be lost: nothing more is done.
    lost: bool,
}

/// One client's device.
struct RetryDevice {
    next: Arc<dyn Exports>,
    settings: Retry,
    sleep: Sleep,
    client: Client,
    /// Not held while the next device does something: it is only ever one request that does.
    state: Mutex<State>,
}

/// What becomes of a request that failed.
enum Failure {
    /// It may be better with a device that is opened anew.
    Again(Error),
    /// It is not worth it.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Again(error)
    }
}

/// Fails as a device would that cannot do this.
fn lacking(code: ErrorCode, why: &'static str) -> Failure {
    Failure::Again(Error::failed(code, why))
}

/// The device can be written, or FUA is not asked for.
fn fua_works(opened: &Opened, flags: Flags) -> std::result::Result<(), Failure> {
    match opened.capabilities.fua {
        Support::None if flags.fua => Err(lacking(ErrorCode::Io, "the device cannot do FUA any more")),
        _ => Ok(()),
    }
}

/// What a device does that no longer has FUA itself.
fn finish(opened: &Opened, flags: Flags, call: &Call) -> Result<()> {
    if flags.fua && opened.capabilities.fua == Support::Emulate { opened.device.flush(call) } else { Ok(()) }
}

/// The flags that a device understands.
fn understood(opened: &Opened, flags: Flags) -> Flags {
    Flags { fua: flags.fua && opened.capabilities.fua.is_own(), ..flags }
}

impl RetryDevice {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self) -> Result<Opened> {
        let state = self.state();
        state.opened.clone().ok_or_else(|| Error::failed(ErrorCode::Shutdown, "retry: the device is not open"))
    }

    fn open(&self, read_only: bool) -> Result<()> {
        let client = Client { read_only, ..self.client.clone() };
        let device: Arc<dyn Device> = Arc::from(self.next.open(&client)?);
        let asked = || {
            let mut capabilities = device.capabilities()?;
            capabilities.write &= !read_only;
            Ok((device.size()?, capabilities))
        };
        match asked() {
            Ok((size, capabilities)) => {
                self.state().opened = Some(Opened { device, size, capabilities });
                Ok(())
            }
            Err(error) => {
                let _ = device.close();
                Err(error)
            }
        }
    }

    fn first_open(&self) -> Result<()> {
        let Err(error) = self.open(self.client.read_only) else { return Ok(()) };
        let mut tries = self.tries();
        self.reopen(&mut tries, error)
    }

    /// The times to wait before each time that a request is tried again.
    fn tries(&self) -> impl Iterator<Item = Duration> + use<> {
        let factor = if self.settings.exponential { 2 } else { 1 };
        let longer = move |delay: &Duration| Some(delay.saturating_mul(factor));
        std::iter::successors(Some(self.settings.delay), longer).take(self.settings.retries as usize)
    }

    /// Closes the device, waits, and opens it, until it opens. Errors: that of the request, or of the last attempt to open.
    fn reopen(&self, tries: &mut impl Iterator<Item = Duration>, mut error: Error) -> Result<()> {
        for delay in tries {
            let connection = &self.client.connection;
            connection.debug(format_args!("retry: {error}; waiting {delay:?} before retrying"));
            if (self.sleep)(connection, delay).is_err() {
                break;
            }
            let before = {
                let mut state = self.state();
                state.reopened = true;
                state.opened.take()
            };
            if let Some(before) = before
                && let Err(why) = before.device.close()
            {
                self.state().lost = true;
                return Err(Error::failed(
                    ErrorCode::Shutdown,
                    format!("retry: the device could not be closed: {why}"),
                ));
            }
            match self.open(self.client.read_only || self.settings.read_only) {
                Ok(()) => return Ok(()),
                Err(why) => error = Error::failed(ErrorCode::Shutdown, format!("retry: {why}")),
            }
        }
        Err(error)
    }

    /// Does something until it works or is tried no more.
    fn retry(&self, mut what: impl FnMut(&Opened) -> std::result::Result<(), Failure>) -> Result<()> {
        let mut tries = self.tries();
        loop {
            if self.state().lost {
                return Err(Error::failed(ErrorCode::Shutdown, "retry: the device could not be closed before"));
            }
            let attempt = match self.opened() {
                Ok(opened) => what(&opened),
                Err(error) => Err(Failure::Again(error)),
            };
            match attempt {
                Ok(()) => return Ok(()),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(error)) => self.reopen(&mut tries, error)?,
            }
        }
    }

    /// As [`RetryDevice::retry`], for what reads a range.
    fn retry_range(
        &self,
        length: u64,
        offset: u64,
        past_end: ErrorCode,
        mut what: impl FnMut(&Opened) -> std::result::Result<(), Failure>,
    ) -> Result<()> {
        self.retry(|opened| {
            if offset + length > opened.size {
                return Err(lacking(past_end, "the request is past the end that the device has now"));
            }
            what(opened)
        })
    }

    /// As [`RetryDevice::retry`], for what changes a range.
    fn retry_change(
        &self,
        length: u64,
        offset: u64,
        mut what: impl FnMut(&Opened) -> std::result::Result<(), Failure>,
    ) -> Result<()> {
        if self.is_read_only() {
            return Err(read_only());
        }
        self.retry_range(length, offset, ErrorCode::NoSpace, |opened| {
            if self.is_read_only() {
                return Err(Failure::Final(read_only()));
            }
            what(opened)
        })
    }

    /// `retry-readonly`, and something has failed.
    fn is_read_only(&self) -> bool {
        self.settings.read_only && self.state().reopened
    }
}

fn read_only() -> Error {
    Error::failed(ErrorCode::NotPermitted, "the device is read-only since it was opened again")
}

impl Device for RetryDevice {
    fn size(&self) -> Result<u64> {
        Ok(self.opened()?.size)
    }

    fn capabilities(&self) -> Result<Capabilities> {
        Ok(Capabilities { takes_blocks: false, ..self.opened()?.capabilities })
    }

    fn takes_any_size(&self) -> bool {
        self.opened().is_ok_and(|opened| opened.device.takes_any_size())
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        let length = buffer.len() as u64;
        self.retry_range(length, offset, ErrorCode::Io, |opened| Ok(opened.device.read(buffer, offset, call)?))
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        let start = reply.mark();
        self.retry_range(length as u64, offset, ErrorCode::Io, |opened| {
            reply.truncate(start);
            Ok(opened.device.read_segments(reply, length, offset, call)?)
        })
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.retry_change(data.len() as u64, offset, |opened| {
            if !opened.capabilities.write {
                return Err(Failure::Again(read_only()));
            }
            fua_works(opened, flags)?;
            opened.device.write(data, offset, understood(opened, flags), call)?;
            Ok(finish(opened, flags, call)?)
        })
    }

    fn flush(&self, call: &Call) -> Result<()> {
        self.retry(|opened| {
            if !opened.capabilities.flush {
                return Err(lacking(ErrorCode::Io, "the device cannot be flushed any more"));
            }
            Ok(opened.device.flush(call)?)
        })
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.retry_change(length, offset, |opened| {
            if !opened.capabilities.write || !opened.capabilities.trim {
                return Err(Failure::Again(read_only()));
            }
            fua_works(opened, flags)?;
            opened.device.trim(length, offset, understood(opened, flags), call)?;
            Ok(finish(opened, flags, call)?)
        })
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.retry_change(length, offset, |opened| {
            let capabilities = opened.capabilities;
            if flags.fast && !(capabilities.fast_zero && capabilities.zero.is_own()) {
                return Err(Failure::Final(Error::not_supported("the device has no fast zeroes any more")));
            }
            match capabilities.zero {
                _ if !capabilities.write => return Err(Failure::Again(read_only())),
                Support::None => return Err(Failure::Again(read_only())),
                Support::Emulate => return Err(Failure::Final(Error::not_supported("zeroes have to be written"))),
                Support::Emulated | Support::Native => {}
            }
            fua_works(opened, flags)?;
            match opened.device.zero(length, offset, understood(opened, flags), call) {
                // That is an answer: zeroes have to be written then.
                Err(error) if error.code() == ErrorCode::NotSupported => Err(Failure::Final(error)),
                done => Ok(done.and_then(|()| finish(opened, flags, call))?),
            }
        })
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        self.retry_range(length, offset, ErrorCode::Io, |opened| match opened.capabilities.cache {
            Support::None => Err(lacking(ErrorCode::Io, "the device cannot prefetch any more")),
            // A hint, with which it can do nothing.
            Support::Emulate => Ok(()),
            Support::Emulated | Support::Native => Ok(opened.device.cache(length, offset, call)?),
        })
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        self.retry_extents(extents, |opened, extents| match opened.capabilities.extents {
            false => Err(lacking(ErrorCode::Io, "the device has no map any more")),
            true => Ok(opened.device.extents(extents, call)?),
        })
    }

    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        self.retry_extents(extents, |opened, extents| Ok(opened.device.meta_context(context, extents, call)?))
    }

    fn close(&self) -> Result<()> {
        let opened = self.state().opened.take();
        opened.map_or(Ok(()), |opened| opened.device.close())
    }
}

impl RetryDevice {
    fn retry_extents(
        &self,
        extents: &mut Extents,
        mut what: impl FnMut(&Opened, &mut Extents) -> std::result::Result<(), Failure>,
    ) -> Result<()> {
        let (offset, length) = (extents.offset(), extents.length());
        self.retry_range(length, offset, ErrorCode::Io, |opened| {
            // What a failed attempt has described is forgotten.
            let mut fresh = Extents::new(offset, length, extents.one());
            what(opened, &mut fresh)?;
            *extents = fresh;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::next::testing::{Script, Scripted};

    std::thread_local! {
        static SLEPT: std::cell::RefCell<Vec<u64>> = const { std::cell::RefCell::new(Vec::new()) };
    }

    /// Notes the seconds instead of waiting for them; after a minute the client has gone.
    fn sleep(_: &Connection, delay: Duration) -> Result<()> {
        SLEPT.with_borrow_mut(|slept| slept.push(delay.as_secs()));
        if delay.as_secs() > 60 { Err(Error::failed(ErrorCode::Shutdown, "gone")) } else { Ok(()) }
    }

    fn slept() -> Vec<u64> {
        SLEPT.take()
    }

    fn open(script: &Arc<Script>, settings: Retry) -> Result<Box<dyn Device>> {
        let next = Arc::new(Scripted(Arc::clone(script)));
        FilteredExports(Retries { next, settings, sleep }).open(&Client::default())
    }

    const CALL: &Call = &Call::BLOCKING;

    #[test]
    fn a_request_that_fails_is_made_again_on_a_new_device() {
        let script = Script::new(b"0123456789".to_vec());
        let device = open(&script, Retry::default()).unwrap();
        script.fail("read", 2);
        let mut buffer = [0; 3];
        device.read(&mut buffer, 4, CALL).unwrap();
        assert_eq!(&buffer, b"456");
        assert_eq!(script.log(), "open read:4+3 close open read:4+3 close open read:4+3");
        assert_eq!(slept(), [2, 4]);
        // And counts from the beginning for the next.
        script.fail("write", 5);
        device.write(b"ab", 1, Flags::default(), CALL).unwrap();
        assert_eq!(slept(), [2, 4, 8, 16, 32]);
        assert_eq!(script.disk.lock().unwrap()[..4], *b"0ab3");
        device.close().unwrap();
        assert!(script.log().ends_with("write:1+2 close"));
    }

    #[test]
    fn the_error_is_the_requests_own_when_nothing_helps() {
        let script = Script::new(vec![0; 10]);
        let settings = Retry { retries: 2, exponential: false, ..Retry::default() };
        let device = open(&script, settings).unwrap();
        script.fail("flush", 3);
        assert_eq!(device.flush(CALL).unwrap_err().code(), ErrorCode::NoSpace);
        assert_eq!(slept(), [2, 2]);
        device.flush(CALL).unwrap();
    }

    #[test]
    fn nothing_is_tried_any_more_for_a_client_that_has_gone() {
        let script = Script::new(vec![0; 10]);
        let device = open(&script, Retry { retries: 100, ..Retry::default() }).unwrap();
        script.fail("flush", 100);
        assert_eq!(device.flush(CALL).unwrap_err().code(), ErrorCode::NoSpace);
        assert_eq!(slept(), [2, 4, 8, 16, 32, 64]);
    }

    #[test]
    fn without_retries_it_is_as_if_it_were_not_there() {
        let script = Script::new(vec![0; 10]);
        let device = open(&script, Retry { retries: 0, ..Retry::default() }).unwrap();
        script.fail("read", 1);
        assert_eq!(device.read(&mut [0], 0, CALL).unwrap_err().code(), ErrorCode::NoSpace);
        assert_eq!(script.log(), "open read:0+1");
        assert!(slept().is_empty());
    }

    #[test]
    fn a_device_that_does_not_open_is_tried_again() {
        let script = Script::new(vec![0; 10]);
        script.fail("open", 3);
        assert!(open(&script, Retry::default()).is_ok());
        assert_eq!(slept(), [2, 4, 8]);
        script.fail("open", 100);
        let error = open(&script, Retry { retries: 1, ..Retry::default() }).err().unwrap();
        assert_eq!(error.code(), ErrorCode::Shutdown);
        // Also when it was open before: then the next request begins with it.
        script.fail("open", 0);
        let device = open(&script, Retry { retries: 1, ..Retry::default() }).unwrap();
        script.fail("open", 1);
        script.fail("read", 1);
        assert_eq!(device.read(&mut [0], 0, CALL).unwrap_err().code(), ErrorCode::Shutdown);
        script.log();
        device.read(&mut [0], 0, CALL).unwrap();
        assert_eq!(script.log(), "open read:0+1");
    }

    #[test]
    fn a_device_that_could_not_be_closed_is_the_end() {
        let script = Script::new(vec![0; 10]);
        let device = open(&script, Retry::default()).unwrap();
        script.fail("read", 1);
        script.fail("close", 1);
        assert_eq!(device.read(&mut [0], 0, CALL).unwrap_err().code(), ErrorCode::Shutdown);
        assert_eq!(device.read(&mut [0], 0, CALL).unwrap_err().code(), ErrorCode::Shutdown);
        assert_eq!(script.log(), "open read:0+1 close");
    }

    #[test]
    fn readonly_is_for_the_rest_of_the_connection() {
        let script = Script::new(vec![0; 10]);
        let device = open(&script, Retry { read_only: true, ..Retry::default() }).unwrap();
        device.write(b"a", 0, Flags::default(), CALL).unwrap();
        script.fail("read", 1);
        device.read(&mut [0], 0, CALL).unwrap();
        assert_eq!(script.log(), "open write:0+1 read:0+1 close open:ro read:0+1");
        slept();
        for result in [
            device.write(b"a", 0, Flags::default(), CALL),
            device.trim(1, 0, Flags::default(), CALL),
            device.zero(1, 0, Flags::default(), CALL),
        ] {
            assert_eq!(result.unwrap_err().code(), ErrorCode::NotPermitted);
        }
        assert!(slept().is_empty());
        // Also a write that fails itself.
        let device = open(&script, Retry { read_only: true, ..Retry::default() }).unwrap();
        script.fail("write", 1);
        let error = device.write(b"a", 0, Flags::default(), CALL).unwrap_err();
        assert_eq!(error.code(), ErrorCode::NotPermitted);
    }

    #[test]
    fn a_device_that_has_shrunk_has_no_space_behind_its_end() {
        let script = Script::new(vec![0; 10]);
        let device = open(&script, Retry { retries: 1, ..Retry::default() }).unwrap();
        script.fail("flush", 1);
        script.disk.lock().unwrap().truncate(5);
        device.flush(CALL).unwrap();
        assert_eq!(device.size().unwrap(), 5);
        assert_eq!(device.read(&mut [0], 7, CALL).unwrap_err().code(), ErrorCode::Io);
        assert_eq!(device.write(b"a", 7, Flags::default(), CALL).unwrap_err().code(), ErrorCode::NoSpace);
        // It may grow again meanwhile.
        script.disk.lock().unwrap().resize(10, 0);
        device.write(b"a", 7, Flags::default(), CALL).unwrap();
    }

    #[test]
    fn fua_is_a_flush_where_the_new_device_has_no_other() {
        let script = Script::new(vec![0; 10]);
        let device = open(&script, Retry::default()).unwrap();
        let fua = Flags { fua: true, ..Flags::default() };
        device.write(b"a", 0, fua, CALL).unwrap();
        script.fail("write", 1);
        script.capabilities.lock().unwrap().fua = Support::Emulate;
        device.write(b"a", 0, fua, CALL).unwrap();
        assert_eq!(script.log(), "open write:0+1fua write:0+1fua close open write:0+1 flush");
        script.fail("write", 1);
        script.capabilities.lock().unwrap().fua = Support::None;
        let error = device.write(b"a", 0, fua, CALL).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Io);
        slept();
    }

    #[test]
    fn that_zeroes_have_to_be_written_is_no_failure() {
        let script = Script::new(vec![0; 10]);
        let device = open(&script, Retry::default()).unwrap();
        script.capabilities.lock().unwrap().fast_zero = true;
        let fast = Flags { fast: true, ..Flags::default() };
        assert_eq!(device.zero(1, 0, fast, CALL).unwrap_err().code(), ErrorCode::NotSupported);
        assert!(slept().is_empty());
        script.fail("zero", 1);
        device.zero(1, 0, Flags::default(), CALL).unwrap();
        assert_eq!(slept(), [2]);
    }

    #[test]
    fn what_a_failed_attempt_gave_does_not_count() {
        let script = Script::new(b"0123456789".to_vec());
        let device = open(&script, Retry::default()).unwrap();
        script.fail("extents", 2);
        let mut extents = Extents::new(2, 5, false);
        device.extents(&mut extents, CALL).unwrap();
        assert_eq!(
            extents.list().iter().map(|extent| (extent.length, extent.flags)).collect::<Vec<_>>(),
            [(1, 3), (4, 0)]
        );
        script.fail("read", 2);
        let mut reply = Segments::default();
        reply.zeroes(1);
        device.read_segments(&mut reply, 3, 1, CALL).unwrap();
        assert_eq!(reply.to_vec(), b"\x00123");
        slept();
    }
}

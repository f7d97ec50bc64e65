//! `retry`: when a request fails, closes the next device, waits, opens it again and makes the request again.
//!
//! What the client was told of the device is what it was when the client came. The one that is opened later may be smaller,
//! or may do less; then what asks for more fails, and is tried again like anything else.
//! Source: nbdkit filters/retry/retry.c, nbdkit-retry-filter.pod.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nbdcaptive_actors::device::{
    Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Extents, Flags, Result, Segments, Support,
    ThreadModel,
};
use nbdcaptive_actors::filter::{FilterExports, FilteredExports};

use crate::layer::{About, ConfigError, Filter, Lifetime, Parameter, Value};
use crate::values;

const fn parameter(key: &'static str, value: &'static str, help: &'static str) -> Parameter {
    Parameter { key, value, help, required: false }
}

/// See the module.
pub static ABOUT: About = About {
    name: "retry",
    summary: "open the plugin again when a request fails, and repeat the request",
    parameters: &[
        parameter("retries", "<N>", "how often, 5 times unless given"),
        parameter("retry-delay", "<TIME>", "how long to wait before the first time, 2 seconds unless given"),
        parameter("retry-exponential", "<BOOL>", "wait twice as long each time, which is the default"),
        parameter("retry-readonly", "<BOOL>", "open it read-only after a failure"),
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
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Retries { next, settings: *self, sleep: std::thread::sleep })))
    }
}

struct Retries {
    next: Arc<dyn Exports>,
    settings: Retry,
    sleep: fn(Duration),
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
    sleep: fn(Duration),
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
    Flags { fua: flags.fua && opened.capabilities.fua == Support::Native, ..flags }
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
            (self.sleep)(delay);
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
            if flags.fast && !(capabilities.fast_zero && capabilities.zero == Support::Native) {
                return Err(Failure::Final(Error::not_supported("the device has no fast zeroes any more")));
            }
            match capabilities.zero {
                _ if !capabilities.write => return Err(Failure::Again(read_only())),
                Support::None => return Err(Failure::Again(read_only())),
                Support::Emulate => return Err(Failure::Final(Error::not_supported("zeroes have to be written"))),
                Support::Native => {}
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
            Support::Native => Ok(opened.device.cache(length, offset, call)?),
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

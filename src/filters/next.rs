//! What filters do with the device behind them before there is a filter: look at it before the server starts, read it from
//! its start to its end. And one for their tests, which fails when it is told to.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nbdcaptive_actors::device::{Call, Client, Device, Error, ErrorCode, Exports, Result};
use nbdcaptive_actors::filter::{Filter, FilterExports, Filtered, FilteredExports, Next};

use crate::layer::{ConfigError, Lifetime};

/// Has the next layer's default export looked at before the server starts: what `look` refuses is a reason not to, because no
/// client could be served what the parameters promise. An export that cannot be opened or read is the next layer's matter and
/// a client's, who may ask for another one.
pub(crate) fn look_at_start(
    next: &Arc<dyn Exports>,
    lifetime: &mut Lifetime,
    look: impl FnOnce(&Next, &Client) -> Result<()> + Send + 'static,
) {
    let failed = Arc::new(AtomicBool::new(false));
    let exports = FilteredExports(Watched { next: Arc::clone(next), failed: Arc::clone(&failed) });
    lifetime.after_fork.push(Box::new(move || {
        let client = Client { read_only: true, ..Client::default() };
        let Ok(Some(export_name)) = exports.default_export(&client) else { return Ok(()) };
        let client = Client { export_name, ..client };
        let Ok(device) = Next::open(&exports, &client) else { return Ok(()) };
        let looked = look(&device, &client);
        // It was only read.
        let _ = device.close();
        match looked {
            Err(error) if !failed.load(Ordering::Relaxed) => Err(ConfigError(error.to_string())),
            _ => Ok(()),
        }
    }));
}

/// Devices of which it is noted whether a read has failed.
struct Watched {
    next: Arc<dyn Exports>,
    failed: Arc<AtomicBool>,
}

struct WatchedDevice {
    next: Box<dyn Device>,
    failed: Arc<AtomicBool>,
}

impl FilterExports for Watched {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        Ok(Box::new(Filtered(WatchedDevice { next: self.next.open(client)?, failed: Arc::clone(&self.failed) })))
    }
}

impl Filter for WatchedDevice {
    // Every read comes this way.
    const CHANGES_DATA: bool = true;

    fn next(&self) -> &dyn Device {
        &*self.next
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.next.read(buffer, offset, call).inspect_err(|_| self.failed.store(true, Ordering::Relaxed))
    }
}

/// A range of a device as what programs read that know nothing of devices.
pub(crate) struct Stream<'a> {
    device: &'a dyn Device,
    left: Range<u64>,
    /// What the device said when it failed.
    error: Option<Error>,
}

impl<'a> Stream<'a> {
    pub(crate) fn new(device: &'a dyn Device, range: Range<u64>) -> Stream<'a> {
        Stream { device, left: range, error: None }
    }

    /// What was wrong with reading: what the device said, or else what the reader did.
    pub(crate) fn error(self, what: &str, error: io::Error) -> Error {
        self.error.unwrap_or_else(|| Error::failed(ErrorCode::Io, format!("{what}: {error}")))
    }
}

impl io::Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = (self.left.end - self.left.start).min(buffer.len() as u64) as usize;
        if length == 0 {
            return Ok(0);
        }
        match self.device.read(&mut buffer[..length], self.left.start, &Call::BLOCKING) {
            Ok(()) => {
                self.left.start += length as u64;
                Ok(length)
            }
            Err(error) => {
                let told = io::Error::other(error.to_string());
                self.error = Some(error);
                Err(told)
            }
        }
    }
}

/// What the filters' tests share.
#[cfg(test)]
pub(crate) mod testing {
    use std::collections::HashMap;
    use std::ffi::OsStr;
    use std::sync::{Arc, Mutex};

    use nbdcaptive_actors::device::{
        Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Extents, Flags, Result, Support,
    };

    use crate::layer::{ConfigError, Lifetime, Value};

    /// Configures the filter `name` before `next` as the command line would.
    pub fn before(
        next: Arc<dyn Exports>,
        name: &str,
        parameters: &[(&str, &str)],
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let mut filter = (crate::filters::find(name).expect("a filter of that name").new)();
        for (key, value) in parameters {
            filter.config(key, Value(OsStr::new(value)))?;
        }
        filter.config_complete()?;
        filter.ready(next, &mut Lifetime::default())
    }

    /// A disk that fails when it is told to, and notes what is done with it.
    pub struct Script {
        pub disk: Mutex<Vec<u8>>,
        pub capabilities: Mutex<Capabilities>,
        pub log: Mutex<Vec<String>>,
        /// How many calls of each kind will fail.
        failures: Mutex<HashMap<String, u32>>,
    }

    impl Script {
        pub fn new(disk: Vec<u8>) -> Arc<Script> {
            let capabilities = Capabilities {
                write: true,
                flush: true,
                trim: true,
                zero: Support::Native,
                fua: Support::Native,
                cache: Support::Native,
                extents: true,
                ..Capabilities::default()
            };
            Arc::new(Script {
                disk: Mutex::new(disk),
                capabilities: Mutex::new(capabilities),
                log: Mutex::default(),
                failures: Mutex::default(),
            })
        }

        /// The next `times` calls of this kind fail.
        pub fn fail(&self, call: &str, times: u32) {
            self.failures.lock().unwrap().insert(call.to_owned(), times);
        }

        /// What was done since the last question.
        pub fn log(&self) -> String {
            std::mem::take(&mut *self.log.lock().unwrap()).join(" ")
        }

        fn note(&self, call: &str, detail: impl std::fmt::Display) -> Result<()> {
            self.log.lock().unwrap().push(format!("{call}{detail}"));
            match self.failures.lock().unwrap().get_mut(call) {
                Some(left) if *left > 0 => {
                    *left -= 1;
                    Err(Error::failed(ErrorCode::NoSpace, format!("{call} was told to fail")))
                }
                _ => Ok(()),
            }
        }
    }

    /// Opens devices of a [`Script`].
    pub struct Scripted(pub Arc<Script>);

    impl Exports for Scripted {
        fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
            self.0.note("open", if client.read_only { ":ro" } else { "" })?;
            Ok(Box::new(ScriptedDevice(Arc::clone(&self.0))))
        }
    }

    struct ScriptedDevice(Arc<Script>);

    impl Device for ScriptedDevice {
        fn size(&self) -> Result<u64> {
            Ok(self.0.disk.lock().unwrap().len() as u64)
        }
        fn capabilities(&self) -> Result<Capabilities> {
            Ok(*self.0.capabilities.lock().unwrap())
        }
        fn read(&self, buffer: &mut [u8], offset: u64, _call: &Call) -> Result<()> {
            self.0.note("read", format_args!(":{offset}+{}", buffer.len()))?;
            buffer.copy_from_slice(&self.0.disk.lock().unwrap()[offset as usize..][..buffer.len()]);
            Ok(())
        }
        fn write(&self, data: &[u8], offset: u64, flags: Flags, _call: &Call) -> Result<()> {
            let fua = if flags.fua { "fua" } else { "" };
            self.0.note("write", format_args!(":{offset}+{}{fua}", data.len()))?;
            self.0.disk.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
            Ok(())
        }
        fn flush(&self, _call: &Call) -> Result<()> {
            self.0.note("flush", "")
        }
        fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
            self.0.note("trim", format_args!(":{offset}+{length}"))?;
            let _ = (flags, call);
            Ok(())
        }
        fn zero(&self, length: u64, offset: u64, flags: Flags, _call: &Call) -> Result<()> {
            self.0.note("zero", format_args!(":{offset}+{length}"))?;
            if flags.fast {
                return Err(Error::not_supported("not fast"));
            }
            self.0.disk.lock().unwrap()[offset as usize..][..length as usize].fill(0);
            Ok(())
        }
        fn cache(&self, length: u64, offset: u64, _call: &Call) -> Result<()> {
            self.0.note("cache", format_args!(":{offset}+{length}"))
        }
        fn extents(&self, extents: &mut Extents, _call: &Call) -> Result<()> {
            // Something is said before it fails, which must not count.
            extents.add(extents.offset(), 1, 3);
            self.0.note("extents", "")?;
            extents.add(extents.offset(), extents.length(), 0);
            Ok(())
        }
        fn close(&self) -> Result<()> {
            self.0.note("close", "")
        }
    }
}

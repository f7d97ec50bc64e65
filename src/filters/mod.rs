//! The filters: one file each, and the table of them all.

use std::io;
use std::ops::Range;

use nbdcaptive_actors::device::{Call, Device, Error, ErrorCode, Result};

use crate::layer::{About, Filter};

pub mod blocksize;
pub mod blocksize_policy;
pub mod cache;
pub mod checkwrite;
pub mod count;
pub mod cow;
pub mod ddrescue;
pub mod delay;
pub mod error;
pub mod evil;
pub mod exitlast;
pub mod exitwhen;
pub mod exportname;
pub mod extentlist;
pub mod fua;
pub mod gzip;
pub mod ip;
pub(crate) mod kit;
pub mod limit;
pub mod log;
pub mod multi_conn;
pub mod nocache;
pub mod noextents;
pub mod noparallel;
pub mod nozero;
pub mod offset;
pub mod openonce;
pub mod partition;
pub mod pause;
pub mod protect;
pub(crate) mod random;
pub mod rate;
pub mod readahead;
pub mod readonly;
pub mod retry;
pub mod retry_request;
pub mod rotational;
pub mod scan;
pub mod spinning;
pub mod stats;
pub mod swab;
pub mod tar;
pub mod time_limit;
pub mod tls_fallback;
pub mod truncate;
pub mod xz;

/// A filter by name.
#[derive(Debug)]
pub struct Entry {
    /// What it says of itself.
    pub about: &'static About,
    /// A fresh one, to be configured.
    pub new: fn() -> Box<dyn Filter>,
}

/// Every filter, in alphabetical order, as help lists them.
pub static ALL: &[Entry] = &[
    Entry { about: &blocksize::ABOUT, new: || Box::<blocksize::Blocksize>::default() },
    Entry { about: &blocksize_policy::ABOUT, new: || Box::<blocksize_policy::Policy>::default() },
    Entry { about: &cache::ABOUT, new: || Box::<cache::Cache>::default() },
    Entry { about: &checkwrite::ABOUT, new: || Box::new(checkwrite::CheckWrite) },
    Entry { about: &count::ABOUT, new: || Box::new(count::Count) },
    Entry { about: &cow::ABOUT, new: || Box::<cow::Cow>::default() },
    Entry { about: &ddrescue::ABOUT, new: || Box::<ddrescue::Ddrescue>::default() },
    Entry { about: &delay::ABOUT, new: || Box::<delay::Delay>::default() },
    Entry { about: &error::ABOUT, new: || Box::<error::ErrorInject>::default() },
    Entry { about: &evil::ABOUT, new: || Box::<evil::Evil>::default() },
    Entry { about: &exitlast::ABOUT, new: || Box::new(exitlast::ExitLast) },
    Entry { about: &exitwhen::ABOUT, new: || Box::<exitwhen::ExitWhen>::default() },
    Entry { about: &exportname::ABOUT, new: || Box::<exportname::ExportName>::default() },
    Entry { about: &extentlist::ABOUT, new: || Box::<extentlist::ExtentList>::default() },
    Entry { about: &fua::ABOUT, new: || Box::<fua::Fua>::default() },
    Entry { about: &gzip::ABOUT, new: || Box::new(gzip::Gzip) },
    Entry { about: &ip::ABOUT, new: || Box::<ip::Ip>::default() },
    Entry { about: &limit::ABOUT, new: || Box::<limit::Limit>::default() },
    Entry { about: &log::ABOUT, new: || Box::<log::LogFilter>::default() },
    Entry { about: &multi_conn::ABOUT, new: || Box::<multi_conn::MultiConn>::default() },
    Entry { about: &nocache::ABOUT, new: || Box::<nocache::NoCache>::default() },
    Entry { about: &noextents::ABOUT, new: || Box::new(noextents::NoExtents) },
    Entry { about: &noparallel::ABOUT, new: || Box::<noparallel::NoParallel>::default() },
    Entry { about: &nozero::ABOUT, new: || Box::<nozero::NoZero>::default() },
    Entry { about: &offset::ABOUT, new: || Box::<offset::Offset>::default() },
    Entry { about: &openonce::ABOUT, new: || Box::new(openonce::OpenOnce) },
    Entry { about: &partition::ABOUT, new: || Box::<partition::Partition>::default() },
    Entry { about: &pause::ABOUT, new: || Box::<pause::Pause>::default() },
    Entry { about: &protect::ABOUT, new: || Box::<protect::Protect>::default() },
    Entry { about: &rate::ABOUT, new: || Box::<rate::Rate>::default() },
    Entry { about: &readahead::ABOUT, new: || Box::new(readahead::Readahead) },
    Entry { about: &readonly::ABOUT, new: || Box::<readonly::ReadOnly>::default() },
    Entry { about: &retry::ABOUT, new: || Box::<retry::Retry>::default() },
    Entry { about: &retry_request::ABOUT, new: || Box::<retry_request::RetryRequest>::default() },
    Entry { about: &rotational::ABOUT, new: || Box::<rotational::Rotational>::default() },
    Entry { about: &scan::ABOUT, new: || Box::<scan::Scan>::default() },
    Entry { about: &spinning::ABOUT, new: || Box::<spinning::Spinning>::default() },
    Entry { about: &stats::ABOUT, new: || Box::<stats::Stats>::default() },
    Entry { about: &swab::ABOUT, new: || Box::<swab::Swab>::default() },
    Entry { about: &tar::ABOUT, new: || Box::<tar::Tar>::default() },
    Entry { about: &time_limit::ABOUT, new: || Box::<time_limit::TimeLimit>::default() },
    Entry { about: &tls_fallback::ABOUT, new: || Box::<tls_fallback::TlsFallback>::default() },
    Entry { about: &truncate::ABOUT, new: || Box::<truncate::Truncate>::default() },
    Entry { about: &xz::ABOUT, new: || Box::<xz::Xz>::default() },
];

/// The filter of that name.
pub fn find(name: &str) -> Option<&'static Entry> {
    ALL.iter().find(|entry| entry.about.name == name)
}

/// Asks a device that was just opened what a filter must know of it, and closes it if it does not say.
pub(crate) fn ask<T>(
    next: Box<dyn Device>,
    question: impl FnOnce(&dyn Device) -> Result<T>,
) -> Result<(Box<dyn Device>, T)> {
    match question(&*next) {
        Ok(answer) => Ok((next, answer)),
        Err(error) => {
            // What was wrong first is what counts.
            let _ = next.close();
            Err(error)
        }
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
        let mut filter = (super::find(name).expect("a filter of that name").new)();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_finds_every_filter() {
        assert!(ALL.is_sorted_by_key(|entry| entry.about.name));
        for Entry { about, .. } in ALL {
            assert!(std::ptr::eq(find(about.name).expect("it is in the table").about, *about));
        }
        assert!(find("no-such-filter").is_none());
    }
}

//! `error`: requests fail, as often as is asked for, always or while a file exists. Source: nbdkit filters/error/error.c.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nbdcaptive_actors::device::{Call, Error, ErrorCode, Exports, Result, ThreadModel};
use nbdcaptive_actors::filter::{Filtered, Next};

use super::kit::{Gate, Gated, Request, absolute, each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Parameter, Value};
use crate::values;
use crate::xoshiro::{self, Xoshiro};

const ERRORS: &str = "EPERM|EIO|ENOMEM|EINVAL|ENOSPC|ESHUTDOWN";

const PARAMETERS: &[Parameter] = &[
    optional("error", ERRORS, "how requests fail; EIO"),
    optional("error-rate", "0..1|0%..100%", "how often they do; never"),
    optional("error-file", "<TRIGGER>", "only while this file exists"),
    optional("error-pread", ERRORS, "the same for reads only"),
    optional("error-pread-rate", "0..1|0%..100%", "the same for reads only"),
    optional("error-pread-file", "<TRIGGER>", "the same for reads only"),
    optional("error-pwrite", ERRORS, "the same for writes only"),
    optional("error-pwrite-rate", "0..1|0%..100%", "the same for writes only"),
    optional("error-pwrite-file", "<TRIGGER>", "the same for writes only"),
    optional("error-trim", ERRORS, "the same for trims only"),
    optional("error-trim-rate", "0..1|0%..100%", "the same for trims only"),
    optional("error-trim-file", "<TRIGGER>", "the same for trims only"),
    optional("error-zero", ERRORS, "the same for zeroes only"),
    optional("error-zero-rate", "0..1|0%..100%", "the same for zeroes only"),
    optional("error-zero-file", "<TRIGGER>", "the same for zeroes only"),
    optional("error-extents", ERRORS, "the same for block status only"),
    optional("error-extents-rate", "0..1|0%..100%", "the same for block status only"),
    optional("error-extents-file", "<TRIGGER>", "the same for block status only"),
    optional("error-cache", ERRORS, "the same for cache only"),
    optional("error-cache-rate", "0..1|0%..100%", "the same for cache only"),
    optional("error-cache-file", "<TRIGGER>", "the same for cache only"),
];

/// See the module.
pub static ABOUT: About = About {
    name: "error",
    summary: "let requests fail

        For seeing how a client does with a disk that fails. Without a rate nothing fails; a rate of 1 or 100% is
        always. With a file nothing fails until it appears. The parameters without a kind of request in their name
        are for all kinds; those that stand further behind on the command line count.

        # Examples

            nbdcaptive --filter=error memory 1M error-pread=EIO \\
                error-pread-rate=50% error-pread-file=fail \\
                --run 'nbdcopy \"$uri\" null:'
        ",
    parameters: PARAMETERS,
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The kinds of requests that can fail, by the names that parameters have for them.
const KINDS: [&str; 6] = ["pread", "pwrite", "trim", "zero", "extents", "cache"];

/// How one kind of request fails.
#[derive(Clone, Debug)]
struct Failure {
    code: ErrorCode,
    name: &'static str,
    /// From 0, never, to 1, always.
    rate: f64,
    file: Option<PathBuf>,
}

/// The filter.
#[derive(Debug)]
pub struct ErrorInject {
    /// In the order of [`KINDS`].
    failures: [Failure; KINDS.len()],
}

impl Default for ErrorInject {
    fn default() -> ErrorInject {
        let failure = Failure { code: ErrorCode::Io, name: "EIO", rate: 0.0, file: None };
        ErrorInject { failures: std::array::from_fn(|_| failure.clone()) }
    }
}

fn error(key: &str, text: &str) -> std::result::Result<(ErrorCode, &'static str), ConfigError> {
    Ok(match text {
        "EPERM" => (ErrorCode::NotPermitted, "EPERM"),
        "EIO" => (ErrorCode::Io, "EIO"),
        "ENOMEM" => (ErrorCode::NoMemory, "ENOMEM"),
        "EINVAL" => (ErrorCode::Invalid, "EINVAL"),
        "ENOSPC" => (ErrorCode::NoSpace, "ENOSPC"),
        "ESHUTDOWN" => (ErrorCode::Shutdown, "ESHUTDOWN"),
        _ => return Err(ConfigError(format!("{key}: unknown error name '{text}'"))),
    })
}

fn rate(key: &str, text: &str) -> std::result::Result<f64, ConfigError> {
    let rate = values::probability(key, text).map_err(ConfigError)?;
    if rate > 1.0 {
        return Err(ConfigError(format!("{key}: rate out of range: '{text}' parsed as {rate}")));
    }
    Ok(rate)
}

impl Filter for ErrorInject {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let name = key.strip_prefix("error").ok_or_else(|| unknown(key))?;
        let name = name.strip_prefix('-').unwrap_or(name);
        let kind = KINDS.iter().position(|kind| name == *kind || name.starts_with(&format!("{kind}-")));
        let (failures, what) = match kind {
            Some(kind) => (&mut self.failures[kind..=kind], name[KINDS[kind].len()..].trim_start_matches('-')),
            None => (&mut self.failures[..], name),
        };
        match what {
            "" => {
                let (code, name) = error(key, value.text(key)?)?;
                failures.iter_mut().for_each(|failure| (failure.code, failure.name) = (code, name));
            }
            "rate" => {
                let rate = rate(key, value.text(key)?)?;
                failures.iter_mut().for_each(|failure| failure.rate = rate);
            }
            "file" => {
                let file = absolute(value)?;
                failures.iter_mut().for_each(|failure| failure.file = Some(file.clone()));
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
        let rules =
            Arc::new(Rules { failures: self.failures, random: Mutex::new(Xoshiro::new(xoshiro::seed().into())) });
        Ok(each(next, move |next, client| {
            Ok(Filtered(Gated(Disk { next: Next::open(next, client)?, rules: Arc::clone(&rules) })))
        }))
    }
}

struct Rules {
    failures: [Failure; KINDS.len()],
    random: Mutex<Xoshiro>,
}

impl Rules {
    fn fails(&self, failure: &Failure) -> bool {
        if failure.rate <= 0.0 || !failure.file.as_deref().is_none_or(Path::exists) {
            return false;
        }
        // Numbers have no state that a panic could leave half done.
        let number = || self.random.lock().unwrap_or_else(PoisonError::into_inner).word() as u32;
        failure.rate >= 1.0 || f64::from(number()) < failure.rate * f64::from(u32::MAX)
    }
}

struct Disk {
    next: Next,
    rules: Arc<Rules>,
}

impl Gate for Disk {
    type Pass = ();

    fn next(&self) -> &Next {
        &self.next
    }

    /// Whether a request fails is to be decided once.
    fn answers_at_once(&self) -> bool {
        false
    }

    fn before(&self, request: &Request, _call: &Call) -> Result<()> {
        let Some(kind) = KINDS.iter().position(|kind| *kind == request.name()) else { return Ok(()) };
        let failure = &self.rules.failures[kind];
        if self.rules.fails(failure) {
            let why = format!("injecting {} error into {}", failure.name, request.name());
            return Err(Error::failed(failure.code, why));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{device, refused};
    use nbdcaptive_actors::device::{Device, Flags};

    fn write(device: &dyn Device) -> std::result::Result<(), ErrorCode> {
        device.write(b"data", 0, Flags::default(), &Call::BLOCKING).map_err(|error| error.code())
    }

    fn zero(device: &dyn Device) -> std::result::Result<(), ErrorCode> {
        device.zero(4, 0, Flags::default(), &Call::BLOCKING).map_err(|error| error.code())
    }

    #[test]
    fn parameters_are_for_all_kinds_or_for_one() {
        let disk = device("1M", "error", &[("error-rate", "100%"), ("error-zero", "ENOSPC")]);
        assert_eq!((write(&*disk), zero(&*disk)), (Err(ErrorCode::Io), Err(ErrorCode::NoSpace)));
        assert!(disk.flush(&Call::BLOCKING).is_ok(), "a flush never fails");
        let disk = device("1M", "error", &[("error", "EPERM"), ("error-pwrite-rate", "1")]);
        assert_eq!((write(&*disk), zero(&*disk)), (Err(ErrorCode::NotPermitted), Ok(())));
        let disk = device("1M", "error", &[("error", "EPERM")]);
        assert_eq!((write(&*disk), zero(&*disk)), (Ok(()), Ok(())));
        let disk = device("1M", "error", &[("error-rate", "1"), ("error-zero-file", "/no/such/file")]);
        assert_eq!((write(&*disk), zero(&*disk)), (Err(ErrorCode::Io), Ok(())));
    }

    #[test]
    fn a_rate_is_about_so_many() {
        let disk = device("1M", "error", &[("error-rate", "1/4")]);
        let failed = (0..10_000).filter(|_| write(&*disk).is_err()).count();
        // Eleven standard deviations.
        assert!((2000..3000).contains(&failed), "{failed} of 10000");
    }

    #[test]
    fn what_is_no_error_or_rate_is_refused() {
        assert_eq!(refused("error", &[("error-trim", "ENOENT")]), "error-trim: unknown error name 'ENOENT'");
        assert_eq!(refused("error", &[("error-rate", "1.5")]), "error-rate: rate out of range: '1.5' parsed as 1.5");
        assert!(refused("error", &[("error-cache-rate", "x")]).starts_with("error-cache-rate: could not parse"));
        let nonsense = ["error-flush", "error-", "error-preadrate", "error-pread-", "errors", "erro"];
        for key in nonsense.iter().filter(|key| **key != "error-" && **key != "error-pread-") {
            assert_eq!(refused("error", &[(key, "1")]), format!("unknown parameter '{key}'"));
        }
        for Parameter { key, .. } in PARAMETERS {
            let value = if key.ends_with("-rate") {
                "0"
            } else if key.ends_with("-file") {
                "x"
            } else {
                "EIO"
            };
            device("1M", "error", &[(key, value)]);
        }
    }
}

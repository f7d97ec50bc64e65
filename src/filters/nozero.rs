//! `nozero`: how requests to write zeroes are offered and passed on. Source: nbdkit filters/nozero/nozero.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{
    Call, Capabilities, Device, Error, ErrorCode, Exports, Flags, Result, Support, ThreadModel,
};
use nbdcaptive_actors::filter::{self, Filtered, Next};

use super::kit::{each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "nozero",
    summary: "change how zeroes are written

        Clients can ask for a range to be zeroed without sending zeroes. `none` offers that no more; `emulate`
        writes zeroes, as data; `notrim` does not let holes be made of it; `plugin` offers it whether or not the
        plugin says it can. `fastzeromode` says the same of requests that are to fail unless they are quick: not
        offered, refused, or treated like others.

        # Examples

            nbdcaptive --filter=nozero file disk.img zeromode=notrim \\
                --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[
        optional("zeromode", "none|emulate|notrim|plugin", "not, by writes, without holes, as the plugin does; none"),
        optional("fastzeromode", "default|none|slow|ignore", "what becomes of requests for fast zeroes"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    None,
    Emulate,
    NoTrim,
    Plugin,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum FastMode {
    #[default]
    Default,
    None,
    Slow,
    Ignore,
}

/// The filter.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoZero {
    mode: Mode,
    fast: FastMode,
}

impl Filter for NoZero {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        match (key, text) {
            ("zeromode", "none") => self.mode = Mode::None,
            ("zeromode", "emulate") => self.mode = Mode::Emulate,
            ("zeromode", "notrim") => self.mode = Mode::NoTrim,
            ("zeromode", "plugin") => self.mode = Mode::Plugin,
            ("fastzeromode", "default") => self.fast = FastMode::Default,
            ("fastzeromode", "none") => self.fast = FastMode::None,
            ("fastzeromode", "slow") => self.fast = FastMode::Slow,
            ("fastzeromode", "ignore") => self.fast = FastMode::Ignore,
            ("zeromode" | "fastzeromode", _) => return Err(ConfigError(format!("unknown {key} '{text}'"))),
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let wanted = *self;
        let needs = match wanted.mode {
            Mode::NoTrim => Some("notrim"),
            Mode::Plugin => Some("plugin"),
            Mode::None | Mode::Emulate => None,
        };
        Ok(each(next, move |next, client| {
            let look = |next: &Next| match needs {
                // To a client that may not write it makes no difference.
                Some(mode) if next.offered().zero == Support::None && !client.read_only => {
                    let why = format!("zeromode '{mode}' requires plugin zero support");
                    Err(Error::failed(ErrorCode::Invalid, why))
                }
                _ => Ok(()),
            };
            let (next, ()) = Next::open(next, client)?.look(look)?;
            Ok(Filtered(Disk { next, wanted }))
        }))
    }
}

struct Disk {
    next: Next,
    wanted: NoZero,
}

impl filter::Filter for Disk {
    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let NoZero { mode, fast } = self.wanted;
        let next = self.next.capabilities()?;
        let zero = match mode {
            Mode::None => Support::None,
            Mode::Emulate => Support::Emulate,
            Mode::NoTrim | Mode::Plugin => next.zero,
        };
        let fast_zero = match (mode, fast) {
            (Mode::None, _) => false,
            (Mode::NoTrim | Mode::Plugin, FastMode::Default) => next.fast_zero,
            (_, fast) => fast != FastMode::None,
        };
        Ok(Capabilities { zero, fast_zero, ..next })
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let NoZero { mode, fast } = self.wanted;
        if flags.fast && fast == FastMode::Slow {
            return Err(Error::not_supported("nozero: there are no fast zeroes"));
        }
        let may_trim = flags.may_trim && mode != Mode::NoTrim;
        let flags = Flags { may_trim, fast: flags.fast && fast != FastMode::Ignore, ..flags };
        self.next.zero(length, offset, flags, call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{device, memory, over, refused};
    use crate::plugins::testing::ready;
    use nbdcaptive_actors::device::Client;

    #[test]
    fn modes_decide_what_is_offered() {
        for (parameters, zero, fast) in [
            (&[][..], Support::None, false),
            (&[("zeromode", "emulate")], Support::Emulate, true),
            (&[("zeromode", "emulate"), ("fastzeromode", "none")], Support::Emulate, false),
            (&[("zeromode", "notrim")], Support::Native, true),
            (&[("zeromode", "plugin"), ("fastzeromode", "slow")], Support::Native, true),
            (&[("zeromode", "plugin"), ("fastzeromode", "none")], Support::Native, false),
        ] {
            let offered = device("1M", "nozero", parameters).capabilities().unwrap();
            assert_eq!((offered.zero, offered.fast_zero), (zero, fast), "{parameters:?}");
        }
    }

    #[test]
    fn slow_refuses_fast_zeroes_and_ignore_takes_them_for_slow_ones() {
        let fast = Flags { fast: true, ..Flags::default() };
        let zero = |mode| {
            let disk = device("1M", "nozero", &[("zeromode", "plugin"), ("fastzeromode", mode)]);
            disk.zero(512, 0, fast, &Call::BLOCKING).map_err(|error| error.code())
        };
        assert_eq!(zero("slow"), Err(ErrorCode::NotSupported));
        assert_eq!(zero("ignore"), Ok(()));
    }

    #[test]
    fn a_plugin_that_cannot_be_written_to_has_no_zeroes_to_pass_on() {
        let example = ready("example1", &[]).unwrap();
        let exports = over(example, "nozero", &[("zeromode", "notrim")]).unwrap();
        let Err(error) = exports.open(&Client::default()) else { panic!("it opens") };
        assert_eq!(error.to_string(), "zeromode 'notrim' requires plugin zero support");
        exports.open(&Client { read_only: true, ..Client::default() }).unwrap();
        assert_eq!(refused("nozero", &[("zeromode", "x")]), "unknown zeromode 'x'");
        assert_eq!(refused("nozero", &[("fastzeromode", "")]), "unknown fastzeromode ''");
        assert!(over(memory("1M"), "nozero", &[("zeromode", "none"), ("fastzeromode", "default")]).is_ok());
    }
}

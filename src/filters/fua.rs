//! `fua`: how forced unit access is offered and passed on. Source: nbdkit filters/fua/fua.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{
    Blocks, Call, Capabilities, Device, Error, ErrorCode, Exports, Flags, Result, Support, ThreadModel,
};
use nbdcaptive_actors::filter::{self, Filtered, Next};

use super::kit::{each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "fua",
    summary: "change how forced unit access is done

        A write with forced unit access (FUA) is to be on stable storage when it is answered. `none` offers that no
        more; `emulate` lets a flush follow such a write; `native` has the plugin do it, which has to be able to;
        `force` makes it of every write, so that a flush has nothing to do; `pass` changes nothing; `discard` offers
        it, and forgets about it and about flushes.

        # Examples

            nbdcaptive --filter=fua file disk.img fuamode=force \\
                --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[
        optional("fuamode", "none|emulate|native|force|pass|discard", "not, by flushes, as it is, always, ...; none"),
        optional("flush-on-close", "<BOOL>", "flush when a client leaves"),
        optional("flush_on_close", "<BOOL>", "another name for flush-on-close"),
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
    Native,
    /// Every write is forced, so that a flush has nothing to do.
    Force,
    Pass,
    /// Nothing is forced and nothing is flushed.
    Discard,
}

/// The filter.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fua {
    mode: Mode,
    flush_on_close: bool,
}

impl Filter for Fua {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        match key {
            "fuamode" => {
                self.mode = match text {
                    "none" => Mode::None,
                    "emulate" => Mode::Emulate,
                    "native" => Mode::Native,
                    "force" => Mode::Force,
                    "pass" => Mode::Pass,
                    "discard" => Mode::Discard,
                    _ => return Err(ConfigError(format!("unknown fuamode '{text}'"))),
                }
            }
            "flush-on-close" | "flush_on_close" => self.flush_on_close = values::boolean(text).map_err(ConfigError)?,
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
        Ok(each(next, move |next, client| {
            // To a client that may not write it makes no difference.
            let check = |next: &Next| if client.read_only { Ok(()) } else { wanted.check(next.offered()) };
            let (next, ()) = Next::open(next, client)?.look(check)?;
            Ok(Filtered(Disk { next, wanted }))
        }))
    }
}

impl Fua {
    /// Whether the device can do what is wanted of it.
    fn check(&self, offered: &Capabilities) -> Result<()> {
        let needs = |what: &str, support: &str| {
            Err(Error::failed(ErrorCode::Invalid, format!("{what} requires plugin {support} support")))
        };
        match self.mode {
            Mode::Emulate if !offered.flush => needs("fuamode 'emulate'", "flush"),
            Mode::Native if offered.fua == Support::None => needs("fuamode 'native'", "fua"),
            Mode::Force if offered.fua == Support::None => needs("fuamode 'force'", "fua"),
            _ if self.flush_on_close && !offered.flush => needs("flush-on-close", "flush"),
            _ => Ok(()),
        }
    }
}

struct Disk {
    next: Next,
    wanted: Fua,
}

impl Disk {
    fn flags(&self, flags: Flags) -> Flags {
        match self.wanted.mode {
            Mode::Force => Flags { fua: true, ..flags },
            Mode::Discard => Flags { fua: false, ..flags },
            Mode::None | Mode::Emulate | Mode::Native | Mode::Pass => flags,
        }
    }
}

impl filter::Filter for Disk {
    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let next = self.next.capabilities()?;
        let fua = match self.wanted.mode {
            Mode::None => Support::None,
            Mode::Emulate => Support::Emulate,
            Mode::Native | Mode::Force | Mode::Discard => Support::Native,
            Mode::Pass => next.fua,
        };
        // A flush that does nothing is offered also where the device has none.
        let flush = next.flush || matches!(self.wanted.mode, Mode::Force | Mode::Discard);
        Ok(Capabilities { fua, flush, ..next })
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next.write(data, offset, self.flags(flags), call)
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next.write_blocks(data, offset, self.flags(flags), call)
    }

    fn flush(&self, call: &Call) -> Result<()> {
        match self.wanted.mode {
            Mode::Force | Mode::Discard => Ok(()),
            Mode::None | Mode::Emulate | Mode::Native | Mode::Pass => self.next.flush(call),
        }
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next.trim(length, offset, self.flags(flags), call)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next.zero(length, offset, self.flags(flags), call)
    }

    fn close(&self) -> Result<()> {
        if self.wanted.flush_on_close && self.next.offered().flush {
            return self.next.flush(&Call::BLOCKING);
        }
        Ok(())
    }
}

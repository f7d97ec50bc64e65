//! `blocksize-policy`: what block sizes clients are told, and what becomes of requests that break them.
//! Source: nbdkit filters/blocksize-policy/policy.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{
    BlockSize, Call, Capabilities, Client, Connection, Device, Error, ErrorCode, Exports, Extents, Result, ThreadModel,
};
use nbdcaptive_actors::filter::{Filtered, Next};

use super::kit::{Gate, Gated, Request, aligned, each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "blocksize-policy",
    summary: "tell clients block sizes, and refuse requests that break them

        Clients are told these sizes instead of the plugin's. Most clients keep to them; with
        `blocksize-error-policy=error` requests of those that do not get EINVAL.

        # Examples

            nbdcaptive --filter=blocksize-policy memory 1M \\
                blocksize-minimum=4k blocksize-preferred=64k \\
                blocksize-error-policy=error --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[
        optional("blocksize-error-policy", "allow|error|strict", "what becomes of requests that break them; allow"),
        optional("blocksize-minimum", "<SIZE>", "what requests are to be multiples of, a power of 2 up to 64k"),
        optional("blocksize-preferred", "<SIZE>", "what performs well, a power of 2 from 512 to 32M"),
        optional("blocksize-maximum", "<SIZE>", "the most that is to be read or written at a time"),
        optional("blocksize-write-disconnect", "<SIZE>", "disconnect a client that writes more than this at a time"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Breach {
    #[default]
    Allow,
    /// Refused, but for a request that ends where the disk does.
    Error,
    Strict,
}

/// The filter. Sizes in bytes; 0: not given.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    minimum: u32,
    preferred: u32,
    maximum: u32,
    disconnect: u32,
    breach: Breach,
}

impl Filter for Policy {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        let size = match key {
            "blocksize-error-policy" => {
                self.breach = match text {
                    "allow" => Breach::Allow,
                    "error" => Breach::Error,
                    "strict" | "strict-error" => Breach::Strict,
                    _ => return Err(ConfigError(format!("unknown {key}: {text}"))),
                };
                return Ok(());
            }
            "blocksize-minimum" => &mut self.minimum,
            "blocksize-preferred" => &mut self.preferred,
            "blocksize-maximum" => &mut self.maximum,
            "blocksize-write-disconnect" => &mut self.disconnect,
            _ => return Err(unknown(key)),
        };
        let parsed = values::size(text).ok().and_then(|size| u32::try_from(size).ok());
        *size = parsed.ok_or_else(|| ConfigError(format!("{key}: could not parse {text}")))?;
        Ok(())
    }

    fn config_complete(&mut self) -> std::result::Result<(), ConfigError> {
        let Policy { minimum, preferred, maximum, disconnect, .. } = *self;
        let is_given = |sizes: &[u32]| sizes.iter().all(|size| *size > 0);
        let why = if is_given(&[minimum]) && !minimum.is_power_of_two() {
            "blocksize-minimum must be a power of 2"
        } else if minimum > 65536 {
            "blocksize-minimum must be <= 64K"
        } else if is_given(&[preferred]) && !preferred.is_power_of_two() {
            "blocksize-preferred must be a power of 2"
        } else if is_given(&[preferred]) && !(512..=32 << 20).contains(&preferred) {
            "blocksize-preferred must be between 512 and 32M"
        } else if is_given(&[minimum, maximum]) && maximum != u32::MAX && !maximum.is_multiple_of(minimum) {
            "blocksize-maximum must be -1 or a multiple of blocksize-minimum"
        } else if is_given(&[minimum, preferred]) && minimum > preferred {
            "blocksize-minimum must be <= blocksize-preferred"
        } else if is_given(&[preferred, maximum]) && preferred > maximum {
            "blocksize-preferred must be <= blocksize-maximum"
        } else if is_given(&[minimum, disconnect]) && disconnect <= minimum {
            "blocksize-write-disconnect must be larger than blocksize-minimum"
        } else {
            return Ok(());
        };
        Err(ConfigError(why.to_owned()))
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let policy = *self;
        Ok(each(next, move |next, client: &Client| {
            let (next, sizes) = Next::open(next, client)?.look(|next| policy.sizes(next.offered().block_size))?;
            Ok(Filtered(Gated(Disk { next, policy, sizes, connection: client.connection.clone() })))
        }))
    }
}

impl Policy {
    /// What clients are told, over a device that has these block sizes.
    fn sizes(&self, next: Option<BlockSize>) -> Result<Option<BlockSize>> {
        let or = |given: u32, other: u32| if given > 0 { given } else { other };
        if self.minimum == 0 && self.preferred == 0 && self.maximum == 0 {
            return Ok(next);
        }
        let sizes = next.unwrap_or_else(|| {
            let minimum = or(self.minimum, 1);
            let maximum = match self.disconnect {
                0 => u32::MAX,
                limit => limit - limit % minimum,
            };
            BlockSize { minimum, preferred: 4096, maximum }
        });
        let minimum = or(self.minimum, sizes.minimum);
        let preferred = or(self.preferred, sizes.preferred);
        let maximum = or(self.maximum, sizes.maximum);
        if minimum > preferred || preferred > maximum {
            return Err(Error::failed(
                ErrorCode::Invalid,
                format!(
                    "computed block size values are invalid, minimum {minimum} > preferred {preferred} \
                     or preferred > maximum {maximum}"
                ),
            ));
        }
        Ok(Some(BlockSize { minimum, preferred, maximum }))
    }
}

struct Disk {
    next: Next,
    policy: Policy,
    sizes: Option<BlockSize>,
    connection: Connection,
}

impl Disk {
    /// Source: NBD proto.md "Block size constraints": a breach is `NBD_EINVAL`.
    fn check(&self, name: &str, length: u64, offset: u64, has_data: bool) -> Result<()> {
        let Some(BlockSize { minimum, maximum, .. }) = self.sizes else { return Ok(()) };
        let (minimum, maximum) = (u64::from(minimum).max(1), u64::from(maximum));
        let whole = match self.policy.breach {
            Breach::Allow => return Ok(()),
            Breach::Error if offset + length == self.next.bytes() => length.next_multiple_of(minimum),
            Breach::Error | Breach::Strict => length,
        };
        let what = if !offset.is_multiple_of(minimum) {
            format!("offset {offset} is not aligned to a multiple of minimum size {minimum}")
        } else if whole < minimum {
            format!("count {length} is smaller than minimum size {minimum}")
        } else if has_data && length > maximum {
            format!("count {length} is larger than maximum size {maximum}")
        } else if !whole.is_multiple_of(minimum) {
            format!("count {length} is not a multiple of minimum size {minimum}")
        } else {
            return Ok(());
        };
        Err(Error::failed(ErrorCode::Invalid, format!("client {name} request rejected: {what}")))
    }
}

impl Gate for Disk {
    type Pass = ();

    fn next(&self) -> &Next {
        &self.next
    }

    fn capabilities(&self) -> Result<Capabilities> {
        // Without a map of its own the server would describe what is not aligned.
        Ok(Capabilities { block_size: self.sizes, extents: true, ..self.next.capabilities()? })
    }

    fn takes_any_size(&self) -> bool {
        true
    }

    fn before(&self, request: &Request, _call: &Call) -> Result<()> {
        let name = request.name();
        match *request {
            Request::Flush => Ok(()),
            Request::Write { length, .. } if self.policy.disconnect > 0 && length > self.policy.disconnect.into() => {
                self.connection.disconnect();
                Err(Error::failed(ErrorCode::Shutdown, "disconnecting client due to oversize write request"))
            }
            Request::Read { length, offset } | Request::Write { length, offset, .. } => {
                self.check(name, length, offset, true)
            }
            Request::Trim { length, offset, .. }
            | Request::Zero { length, offset, .. }
            | Request::Cache { length, offset }
            | Request::Extents { length, offset, .. } => self.check(name, length, offset, false),
        }
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        if !self.next.offered().extents {
            extents.add(extents.offset(), extents.length(), 0);
            return Ok(());
        }
        // What breaks the sizes and was let pass gets the map as it is.
        let minimum = self.sizes.map_or(1, |sizes| u64::from(sizes.minimum).max(1));
        let align = if extents.offset().is_multiple_of(minimum) { minimum } else { 1 };
        aligned(extents, align, |map| self.next.extents(map, call))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{device, refused};
    use nbdcaptive_actors::device::Flags;

    fn sizes(parameters: &[(&str, &str)], next: Option<BlockSize>) -> [u32; 3] {
        let mut policy = Policy::default();
        for (key, value) in parameters {
            policy.config(key, Value(value.as_ref())).unwrap();
        }
        policy.sizes(next).unwrap().map_or([0; 3], |sizes| [sizes.minimum, sizes.preferred, sizes.maximum])
    }

    #[test]
    fn what_is_not_given_is_the_devices_or_a_default() {
        let next = Some(BlockSize { minimum: 2, preferred: 1024, maximum: 1 << 20 });
        assert_eq!(sizes(&[], None), [0; 3]);
        assert_eq!(sizes(&[], next), [2, 1024, 1 << 20]);
        assert_eq!(sizes(&[("blocksize-minimum", "512")], None), [512, 4096, u32::MAX]);
        assert_eq!(sizes(&[("blocksize-minimum", "512")], next), [512, 1024, 1 << 20]);
        let disconnect = [("blocksize-minimum", "512"), ("blocksize-write-disconnect", "10000")];
        assert_eq!(sizes(&disconnect, None), [512, 4096, 9728]);
        assert!(Policy { minimum: 4096, ..Policy::default() }.sizes(next).is_err());
    }

    #[test]
    fn breaches_are_errors_as_the_policy_says() {
        let code = |policy, length, offset| {
            let parameters = [
                ("blocksize-error-policy", policy),
                ("blocksize-minimum", "512"),
                ("blocksize-preferred", "512"),
                ("blocksize-maximum", "1k"),
            ];
            let disk = device("2000", "blocksize-policy", &parameters);
            disk.write(&vec![0; length], offset, Flags::default(), &Call::BLOCKING).map_err(|error| error.to_string())
        };
        for (policy, length, offset, why) in [
            ("allow", 100, 3, ""),
            ("error", 512, 0, ""),
            ("error", 464, 1536, ""),
            ("strict", 464, 1536, "count 464 is smaller than minimum size 512"),
            ("error", 512, 3, "offset 3 is not aligned to a multiple of minimum size 512"),
            ("error", 100, 0, "count 100 is smaller than minimum size 512"),
            ("error", 1536, 0, "count 1536 is larger than maximum size 1024"),
            ("error", 1000, 0, "count 1000 is not a multiple of minimum size 512"),
        ] {
            let want = if why.is_empty() { Ok(()) } else { Err(format!("client pwrite request rejected: {why}")) };
            assert_eq!(code(policy, length, offset), want);
        }
        let disk = device("1M", "blocksize-policy", &[("blocksize-write-disconnect", "1000")]);
        let error = disk.write(&[0; 1001], 0, Flags::default(), &Call::BLOCKING).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Shutdown);
        disk.write(&[0; 1000], 0, Flags::default(), &Call::BLOCKING).unwrap();
    }

    #[test]
    fn sizes_that_do_not_go_together_are_refused() {
        let why = |parameters: &[(&str, &str)]| refused("blocksize-policy", parameters);
        assert_eq!(why(&[("blocksize-minimum", "3")]), "blocksize-minimum must be a power of 2");
        assert_eq!(why(&[("blocksize-minimum", "128k")]), "blocksize-minimum must be <= 64K");
        assert_eq!(why(&[("blocksize-preferred", "64M")]), "blocksize-preferred must be between 512 and 32M");
        assert_eq!(why(&[("blocksize-maximum", "x")]), "blocksize-maximum: could not parse x");
        assert_eq!(why(&[("blocksize-error-policy", "x")]), "unknown blocksize-error-policy: x");
        let disconnect = [("blocksize-minimum", "512"), ("blocksize-write-disconnect", "512")];
        assert_eq!(why(&disconnect), "blocksize-write-disconnect must be larger than blocksize-minimum");
        let order = [("blocksize-preferred", "4k"), ("blocksize-maximum", "1k")];
        assert_eq!(why(&order), "blocksize-preferred must be <= blocksize-maximum");
    }
}

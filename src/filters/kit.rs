//! What several filters are made with: a gate that sees every request, maps that are shifted or aligned, and small things.

use std::path::PathBuf;
use std::sync::Arc;

use nbdcaptive_actors::device::{
    Blocks, Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Extents, Flags, Result, Segments,
};
use nbdcaptive_actors::filter::{Filter, FilterExports, FilteredExports, Next};

use crate::layer::{ConfigError, Parameter, Value};

/// A parameter that need not be given.
pub const fn optional(key: &'static str, value: &'static str, help: &'static str) -> Parameter {
    Parameter { key, value, help, required: false }
}

/// A parameter that has to be given.
pub const fn required(key: &'static str, value: &'static str, help: &'static str) -> Parameter {
    Parameter { key, value, help, required: true }
}

/// The number of four bytes, the lowest first, that stands there.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes are four"))
}

/// The same of eight bytes.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes are eight"))
}

/// A key that is none of the layer's.
pub fn unknown(key: &str) -> ConfigError {
    ConfigError(format!("unknown parameter '{key}'"))
}

/// A path that stays what it is when the server goes into the background. Source: nbdkit server/public.c
/// `nbdkit_absolute_path`.
pub fn absolute(value: Value<'_>) -> std::result::Result<PathBuf, ConfigError> {
    if value.bytes().is_empty() {
        return Err(ConfigError("cannot convert null or empty path to an absolute path".to_owned()));
    }
    std::path::absolute(value.path()).map_err(|error| ConfigError(format!("{}: {error}", value.path().display())))
}

/// Exports of which a filter changes the devices and nothing else: `open` makes them.
pub fn each<D: Device + 'static>(
    next: Arc<dyn Exports>,
    open: impl Fn(&dyn Exports, &Client) -> Result<D> + Send + Sync + 'static,
) -> Arc<dyn Exports> {
    Arc::new(FilteredExports(Each { next, open }))
}

struct Each<O> {
    next: Arc<dyn Exports>,
    open: O,
}

impl<O, D> FilterExports for Each<O>
where
    O: Fn(&dyn Exports, &Client) -> Result<D> + Send + Sync + 'static,
    D: Device + 'static,
{
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        Ok(Box::new((self.open)(&*self.next, client)?))
    }
}

/// A request, as a client made it. Lengths and offsets are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are those of the methods of Device")]
pub enum Request {
    Read {
        length: u64,
        offset: u64,
    },
    Write {
        length: u64,
        offset: u64,
        flags: Flags,
    },
    Flush,
    Trim {
        length: u64,
        offset: u64,
        flags: Flags,
    },
    Zero {
        length: u64,
        offset: u64,
        flags: Flags,
    },
    Cache {
        length: u64,
        offset: u64,
    },
    /// Of any metadata context.
    Extents {
        length: u64,
        offset: u64,
        one: bool,
    },
}

impl Request {
    /// What nbdkit calls the function that is called for it.
    pub fn name(&self) -> &'static str {
        match self {
            Request::Read { .. } => "pread",
            Request::Write { .. } => "pwrite",
            Request::Flush => "flush",
            Request::Trim { .. } => "trim",
            Request::Zero { .. } => "zero",
            Request::Cache { .. } => "cache",
            Request::Extents { .. } => "extents",
        }
    }
}

/// A filter that changes no data and may have a word before and after each request of a client's.
pub trait Gate: Send + Sync {
    /// What it knows from before a request until after it.
    type Pass;

    /// The device behind it.
    fn next(&self) -> &Next;

    /// Before a request. An error is the request's. In a call that may not wait this must not; it may come twice for a request
    /// if the next device has to wait.
    fn before(&self, request: &Request, call: &Call) -> Result<Self::Pass>;

    /// After a request that was let pass, with what came of it; of block status that succeeded, the map.
    fn after(&self, pass: Self::Pass, request: &Request, result: &Result<()>, map: Option<&Extents>) {
        let _ = (pass, request, result, map);
    }

    /// Whether calls that may not wait are worth trying: see [`Device::answers_at_once`].
    fn answers_at_once(&self) -> bool {
        self.next().answers_at_once()
    }

    /// As [`Device::capabilities`].
    fn capabilities(&self) -> Result<Capabilities> {
        self.next().capabilities()
    }

    /// As [`Device::takes_any_size`].
    fn takes_any_size(&self) -> bool {
        self.next().takes_any_size()
    }

    /// Asks the next device for extents.
    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        self.next().extents(extents, call)
    }

    /// Has the next device flushed.
    fn flush(&self, call: &Call) -> Result<()> {
        self.next().flush(call)
    }

    /// As [`Filter::close`].
    fn close(&self) -> Result<()> {
        Ok(())
    }
}

/// Makes a filter of a gate.
pub struct Gated<G>(pub G);

impl<G: Gate> Gated<G> {
    fn pass(&self, request: Request, call: &Call, make: impl FnOnce(&Next) -> Result<()>) -> Result<()> {
        let pass = self.0.before(&request, call)?;
        let result = make(self.0.next());
        self.0.after(pass, &request, &result, None);
        result
    }
}

impl<G: Gate> Filter for Gated<G> {
    fn next(&self) -> &dyn Device {
        self.0.next()
    }

    fn capabilities(&self) -> Result<Capabilities> {
        self.0.capabilities()
    }

    fn answers_at_once(&self) -> bool {
        self.0.answers_at_once()
    }

    fn takes_any_size(&self) -> bool {
        self.0.takes_any_size()
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        let request = Request::Read { length: buffer.len() as u64, offset };
        self.pass(request, call, |next| next.read(buffer, offset, call))
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        let request = Request::Read { length: length as u64, offset };
        self.pass(request, call, |next| next.read_segments(reply, length, offset, call))
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let request = Request::Write { length: data.len() as u64, offset, flags };
        self.pass(request, call, |next| next.write(data, offset, flags, call))
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let request = Request::Write { length: data.len() as u64, offset, flags };
        self.pass(request, call, |next| next.write_blocks(data, offset, flags, call))
    }

    fn flush(&self, call: &Call) -> Result<()> {
        if call.is_farewell() {
            return self.0.flush(call);
        }
        self.pass(Request::Flush, call, |_| self.0.flush(call))
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.pass(Request::Trim { length, offset, flags }, call, |next| next.trim(length, offset, flags, call))
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.pass(Request::Zero { length, offset, flags }, call, |next| next.zero(length, offset, flags, call))
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        self.pass(Request::Cache { length, offset }, call, |next| next.cache(length, offset, call))
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        let request = Request::Extents { length: extents.length(), offset: extents.offset(), one: extents.one() };
        let pass = self.0.before(&request, call)?;
        let result = self.0.extents(extents, call);
        self.0.after(pass, &request, &result, result.is_ok().then_some(extents));
        result
    }

    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        let request = Request::Extents { length: extents.length(), offset: extents.offset(), one: extents.one() };
        let pass = self.0.before(&request, call)?;
        let result = self.0.next().meta_context(context, extents, call);
        self.0.after(pass, &request, &result, result.is_ok().then_some(extents));
        result
    }

    fn close(&self) -> Result<()> {
        self.0.close()
    }
}

/// Answers `extents` with what `ask` says of a range that begins `shift` bytes further on.
pub fn shifted(extents: &mut Extents, shift: u64, ask: impl FnOnce(&mut Extents) -> Result<()>) -> Result<()> {
    let mut there = Extents::new(extents.offset() + shift, extents.length(), extents.one());
    ask(&mut there)?;
    copy(&there, extents, there.offset() - shift);
    Ok(())
}

/// Adds a map to another, from `offset` on. What `to` does not ask for is passed over.
pub fn copy(from: &Extents, to: &mut Extents, mut offset: u64) {
    for extent in from.list() {
        if !to.add(offset, extent.length, extent.flags) {
            break;
        }
        offset += extent.length;
    }
}

/// Answers `extents` with a map whose borders are multiples of `align`, or the end of the range that is asked for. Where what
/// `ask` says has a border inside a block, the block is what all of it is: only what every part of it is can be said of the
/// whole. `ask` may be called several times. `align` is a power of two. Source: nbdkit server/extents.c `nbdkit_extents_aligned`.
pub fn aligned(extents: &mut Extents, align: u64, ask: impl Fn(&mut Extents) -> Result<()>) -> Result<()> {
    let (start, end) = (extents.offset(), extents.offset() + extents.length());
    let mut map = Extents::new(start, extents.length(), extents.one());
    ask(&mut map)?;
    let first = map.list().first().copied().ok_or_else(|| Error::failed(ErrorCode::Io, "no extent was described"))?;
    let align_end = end.min(start.saturating_add(align));
    if start + first.length < align_end {
        // The first block is of several kinds.
        let (mut described, mut flags) = (0, u64::MAX);
        while start + described < align_end {
            let at = start + described;
            let mut part = Extents::new(at, align_end - at, false);
            ask(&mut part)?;
            for extent in part.list() {
                flags &= extent.flags;
                described += extent.length;
            }
            if part.list().is_empty() {
                return Err(Error::failed(ErrorCode::Io, "no extent was described"));
            }
        }
        extents.add(start, align_end - start, flags);
        return Ok(());
    }
    let mut at = start;
    for extent in map.list() {
        let next = at + extent.length;
        if !next.is_multiple_of(align) && next != end {
            let whole = next - next % align;
            if whole > at {
                extents.add(at, whole - at, extent.flags);
            }
            break;
        }
        if !extents.add(at, extent.length, extent.flags) {
            break;
        }
        at = next;
    }
    Ok(())
}

/// Whether all is zero.
pub fn is_zero(data: &[u8]) -> bool {
    data.iter().all(|&byte| byte == 0)
}

/// What the filters' tests share.
#[cfg(test)]
pub(crate) mod testing {
    use std::sync::Arc;

    use nbdcaptive_actors::device::{Call, Client, Device, Exports, Extents};

    use crate::layer::{ConfigError, Lifetime, Value};

    /// Configures the filter `name` over `next` as the command line would.
    pub fn over(
        next: Arc<dyn Exports>,
        name: &str,
        parameters: &[(&str, &str)],
    ) -> Result<Arc<dyn Exports>, ConfigError> {
        let mut filter = (super::super::find(name).expect("a filter of that name").new)();
        for (key, value) in parameters {
            filter.config(key, Value(value.as_ref()))?;
        }
        filter.config_complete()?;
        filter.ready(next, &mut Lifetime::default())
    }

    /// A disk in memory.
    pub fn memory(size: &str) -> Arc<dyn Exports> {
        crate::plugins::testing::ready("memory", &[("size", size.as_ref())]).expect("a size that is one")
    }

    /// A device of the filter `name` over a disk in memory.
    pub fn device(size: &str, name: &str, parameters: &[(&str, &str)]) -> Box<dyn Device> {
        over(memory(size), name, parameters)
            .expect("parameters that are right")
            .open(&Client::default())
            .expect("it opens")
    }

    /// Why the filter does not take these parameters.
    pub fn refused(name: &str, parameters: &[(&str, &str)]) -> String {
        match over(memory("1M"), name, parameters) {
            Ok(_) => panic!("{name} takes {parameters:?}"),
            Err(ConfigError(line)) => line,
        }
    }

    /// Reads.
    pub fn read(device: &dyn Device, offset: u64, length: usize) -> Vec<u8> {
        let mut buffer = vec![0xee; length];
        device.read(&mut buffer, offset, &Call::BLOCKING).expect("it can be read");
        let mut reply = Default::default();
        device.read_segments(&mut reply, length, offset, &Call::BLOCKING).expect("it can be read");
        assert_eq!(reply.to_vec(), buffer, "both kinds of read give the same");
        buffer
    }

    /// The map of a range: lengths and flags.
    pub fn map(device: &dyn Device, offset: u64, length: u64) -> Vec<(u64, u64)> {
        let mut extents = Extents::new(offset, length, false);
        device.extents(&mut extents, &Call::BLOCKING).expect("it has a map");
        extents.list().iter().map(|extent| (extent.length, extent.flags)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map with a border at each of these.
    fn striped(extents: &mut Extents, borders: &[u64]) -> Result<()> {
        let mut start = 0;
        for (number, &end) in borders.iter().enumerate() {
            extents.add(start, end - start, if number % 2 == 0 { 3 } else { 2 });
            start = end;
        }
        Ok(())
    }

    fn aligned_map(offset: u64, length: u64, align: u64, borders: &[u64]) -> Vec<(u64, u64)> {
        let mut extents = Extents::new(offset, length, false);
        aligned(&mut extents, align, |map| striped(map, borders)).unwrap();
        extents.list().iter().map(|extent| (extent.length, extent.flags)).collect()
    }

    #[test]
    fn an_aligned_map_is_cut_or_joined_at_blocks() {
        assert_eq!(aligned_map(0, 4096, 512, &[1024, 4096]), [(1024, 3), (3072, 2)]);
        assert_eq!(aligned_map(0, 4096, 512, &[1000, 4096]), [(512, 3)]);
        assert_eq!(aligned_map(512, 4096 - 512, 512, &[1000, 4096]), [(512, 2)]);
        assert_eq!(aligned_map(512, 1024, 512, &[520, 530, 540, 4096]), [(512, 2)]);
        assert_eq!(aligned_map(0, 1000, 512, &[1000]), [(1000, 3)], "the end may be anywhere");
        assert_eq!(aligned_map(512, 488, 512, &[700, 1000]), [(488, 2)]);
    }
}

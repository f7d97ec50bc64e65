//! What a filter is made of: a device, and what opens devices, that pass every call on unless they say otherwise.
//!
//! A filter says what it changes and nothing else. Here is one that shows only the first half of the next device:
//!
//! ```
//! use std::sync::Arc;
//! use nbdcaptive_actors::device::{Client, Device, Exports, Result};
//! use nbdcaptive_actors::filter::{Filter, FilterExports, Filtered, FilteredExports};
//!
//! struct Half(Box<dyn Device>);
//!
//! impl Filter for Half {
//!     fn next(&self) -> &dyn Device {
//!         &*self.0
//!     }
//!     fn size(&self) -> Result<u64> {
//!         Ok(self.next().size()? / 2)
//!     }
//! }
//!
//! struct Halves(Arc<dyn Exports>);
//!
//! impl FilterExports for Halves {
//!     fn next(&self) -> &dyn Exports {
//!         &*self.0
//!     }
//!     fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
//!         Ok(Box::new(Filtered(Half(self.next().open(client)?))))
//!     }
//! }
//!
//! fn over(next: Arc<dyn Exports>) -> Arc<dyn Exports> {
//!     Arc::new(FilteredExports(Halves(next)))
//! }
//! ```
//!
//! Source: nbdkit docs/nbdkit-filter.pod.

use crate::blocks::Blocks;
use crate::device::{
    Call, Capabilities, Client, Device, Export, Exports, Extents, Flags, MetaContext, Result, Segments, ThreadModel,
};

/// A device in front of another. Every method is that of [`Device`] of the same name, and passes the call on by default.
///
/// The calls of [`Device`] have a [`Call`] that says whether they may wait. What a filter does in one that may not must be done
/// at once and must do no harm when the same call comes again; where it cannot promise that, [`Filter::answers_at_once`] is
/// `false`.
pub trait Filter: Send + Sync {
    /// The data that clients see, or where it is, is not the next device's: [`Filter::read`] and [`Filter::write`] then stand for
    /// reads and writes of all kinds. Otherwise a filter that has its own `read` needs its own `read_segments`, and one with a
    /// `write` a `write_blocks`.
    const CHANGES_DATA: bool = false;
    /// The next device is others' too, and somebody else closes it.
    const LEAVES_OPEN: bool = false;

    /// The device behind this one.
    fn next(&self) -> &dyn Device;

    #[allow(missing_docs, reason = "see Device")]
    fn size(&self) -> Result<u64> {
        self.next().size()
    }
    #[allow(missing_docs, reason = "see Device")]
    fn capabilities(&self) -> Result<Capabilities> {
        self.next().capabilities()
    }
    #[allow(missing_docs, reason = "see Device")]
    fn answers_at_once(&self) -> bool {
        self.next().answers_at_once()
    }
    #[allow(missing_docs, reason = "see Device")]
    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.next().read(buffer, offset, call)
    }
    #[allow(missing_docs, reason = "see Device")]
    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        self.next().read_segments(reply, length, offset, call)
    }
    #[allow(missing_docs, reason = "see Device")]
    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next().write(data, offset, flags, call)
    }
    #[allow(missing_docs, reason = "see Device")]
    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next().write_blocks(data, offset, flags, call)
    }
    #[allow(missing_docs, reason = "see Device")]
    fn flush(&self, call: &Call) -> Result<()> {
        self.next().flush(call)
    }
    #[allow(missing_docs, reason = "see Device")]
    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next().trim(length, offset, flags, call)
    }
    #[allow(missing_docs, reason = "see Device")]
    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.next().zero(length, offset, flags, call)
    }
    #[allow(missing_docs, reason = "see Device")]
    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        self.next().cache(length, offset, call)
    }
    #[allow(missing_docs, reason = "see Device")]
    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        self.next().extents(extents, call)
    }
    #[allow(missing_docs, reason = "see Device")]
    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        self.next().meta_context(context, extents, call)
    }
    /// Called before the next device's, which is then closed whatever this one says. The default has nothing to do.
    fn close(&self) -> Result<()> {
        Ok(())
    }
}

/// Makes a device of a filter.
#[derive(Debug)]
pub struct Filtered<F>(pub F);

impl<F: Filter> Device for Filtered<F> {
    fn size(&self) -> Result<u64> {
        self.0.size()
    }
    fn capabilities(&self) -> Result<Capabilities> {
        let mut capabilities = self.0.capabilities()?;
        capabilities.takes_blocks &= !F::CHANGES_DATA;
        Ok(capabilities)
    }
    fn answers_at_once(&self) -> bool {
        self.0.answers_at_once()
    }
    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.0.read(buffer, offset, call)
    }
    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        if F::CHANGES_DATA {
            return self.0.read(reply.space(length), offset, call);
        }
        self.0.read_segments(reply, length, offset, call)
    }
    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.0.write(data, offset, flags, call)
    }
    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        if F::CHANGES_DATA {
            return self.0.write(&data.to_vec(), offset, flags, call);
        }
        self.0.write_blocks(data, offset, flags, call)
    }
    fn flush(&self, call: &Call) -> Result<()> {
        self.0.flush(call)
    }
    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.0.trim(length, offset, flags, call)
    }
    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.0.zero(length, offset, flags, call)
    }
    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        self.0.cache(length, offset, call)
    }
    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        self.0.extents(extents, call)
    }
    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        self.0.meta_context(context, extents, call)
    }
    fn close(&self) -> Result<()> {
        let closed = self.0.close();
        if F::LEAVES_OPEN { closed } else { self.0.next().close().and(closed) }
    }
}

/// What opens a filter's devices. Every method is that of [`Exports`] of the same name, and passes the call on by default.
pub trait FilterExports: Send + Sync + 'static {
    /// What opens the devices behind.
    fn next(&self) -> &dyn Exports;

    /// How many requests this filter takes at a time; the next one's is regarded as well.
    const THREAD_MODEL: ThreadModel = ThreadModel::Parallel;

    #[allow(missing_docs, reason = "see Exports")]
    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        self.next().open(client)
    }
    #[allow(missing_docs, reason = "see Exports")]
    fn looks_at_clients(&self) -> bool {
        self.next().looks_at_clients()
    }
    #[allow(missing_docs, reason = "see Exports")]
    fn preconnect(&self, client: &Client) -> Result<()> {
        self.next().preconnect(client)
    }
    #[allow(missing_docs, reason = "see Exports")]
    fn list(&self, client: &Client) -> Result<Vec<Export>> {
        self.next().list(client)
    }
    #[allow(missing_docs, reason = "see Exports")]
    fn default_export(&self, client: &Client) -> Result<Option<Vec<u8>>> {
        self.next().default_export(client)
    }
    #[allow(missing_docs, reason = "see Exports")]
    fn meta_contexts(&self, client: &Client) -> Result<Vec<MetaContext>> {
        self.next().meta_contexts(client)
    }
    #[allow(missing_docs, reason = "see Exports")]
    fn description(&self, client: &Client) -> Option<String> {
        self.next().description(client)
    }
    #[allow(missing_docs, reason = "see Exports")]
    fn thread_model(&self) -> ThreadModel {
        Self::THREAD_MODEL.min(self.next().thread_model())
    }
    /// Whether this filter has something to do at the end.
    fn unloads(&self) -> bool {
        false
    }
    /// Called before the next one's, which is then unloaded whatever this one says.
    fn unload(&self) -> Result<()> {
        Ok(())
    }
}

/// Makes [`Exports`] of a filter's.
#[derive(Debug)]
pub struct FilteredExports<F>(pub F);

impl<F: FilterExports> Exports for FilteredExports<F> {
    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        self.0.open(client)
    }
    fn looks_at_clients(&self) -> bool {
        self.0.looks_at_clients()
    }
    fn preconnect(&self, client: &Client) -> Result<()> {
        self.0.preconnect(client)
    }
    fn list(&self, client: &Client) -> Result<Vec<Export>> {
        self.0.list(client)
    }
    fn default_export(&self, client: &Client) -> Result<Option<Vec<u8>>> {
        self.0.default_export(client)
    }
    fn meta_contexts(&self, client: &Client) -> Result<Vec<MetaContext>> {
        self.0.meta_contexts(client)
    }
    fn description(&self, client: &Client) -> Option<String> {
        self.0.description(client)
    }
    fn thread_model(&self) -> ThreadModel {
        self.0.thread_model()
    }
    fn unloads(&self) -> bool {
        self.0.unloads() || self.0.next().unloads()
    }
    fn unload(&self) -> Result<()> {
        let own = if self.0.unloads() { self.0.unload() } else { Ok(()) };
        let next = self.0.next();
        let unloaded = if next.unloads() { next.unload() } else { Ok(()) };
        unloaded.and(own)
    }
}

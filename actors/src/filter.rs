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

use std::fmt;

use crate::backend;
use crate::blocks::Blocks;
use crate::device::{
    Call, Capabilities, Client, Device, Export, Exports, Extents, Flags, MetaContext, Result, Segments, Support,
    ThreadModel,
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

    /// The next device is this one's own, to be closed after it. Otherwise others have it too.
    const OWNS_NEXT: bool = true;

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
    fn takes_any_size(&self) -> bool {
        self.next().takes_any_size()
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
    fn takes_any_size(&self) -> bool {
        self.0.takes_any_size()
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
        if F::OWNS_NEXT { self.0.next().close().and(closed) } else { closed }
    }
}

/// A device of which the Backend has nothing to emulate: what the next device has done for it in terms of other calls, this
/// one does. A filter in front of it sees each request as the client made it, and not what the Backend would make of it.
///
/// It also knows the size and the capabilities, which a device is asked for once.
pub struct Whole {
    next: Box<dyn Device>,
    size: u64,
    offered: Capabilities,
}

/// A [`Whole`] as a device.
pub type Next = Filtered<Whole>;

impl Next {
    /// Opens a device for a client, and asks it. What was opened is closed if it does not answer.
    pub fn open(exports: &dyn Exports, client: &Client) -> Result<Next> {
        let next = exports.open(client)?;
        let asked = next.size().and_then(|size| Ok((size, next.capabilities()?)));
        match asked {
            Ok((size, mut offered)) => {
                offered.write &= !client.read_only;
                Ok(Filtered(Whole { next, size, offered: backend::settle(offered) }))
            }
            Err(error) => {
                // What was wrong with it first is what counts.
                let _ = next.close();
                Err(error)
            }
        }
    }

    /// Looks at it before it is put behind a filter. An error refuses it, and it is closed.
    pub fn look<T>(self, look: impl FnOnce(&Next) -> Result<T>) -> Result<(Next, T)> {
        match look(&self) {
            Ok(seen) => Ok((self, seen)),
            Err(error) => {
                // As above.
                let _ = self.close();
                Err(error)
            }
        }
    }

    /// The next device's size.
    pub fn bytes(&self) -> u64 {
        self.0.size
    }

    /// What the next device offers this client, by itself or emulated.
    pub fn offered(&self) -> &Capabilities {
        &self.0.offered
    }
}

impl Whole {
    /// Does what is to be durable when it returns.
    fn durably(&self, flags: Flags, call: &Call, change: impl FnOnce(Flags) -> Result<()>) -> Result<()> {
        change(Flags { fua: flags.fua && self.offered.fua.is_own(), ..flags })?;
        if flags.fua && self.offered.fua == Support::Emulate {
            return self.next.flush(call);
        }
        Ok(())
    }
}

impl Filter for Whole {
    fn next(&self) -> &dyn Device {
        &*self.next
    }

    fn size(&self) -> Result<u64> {
        Ok(self.size)
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let Capabilities { zero, fua, cache, .. } = self.offered;
        Ok(Capabilities { zero: zero.done(), fua: fua.done(), cache: cache.done(), ..self.offered })
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.durably(flags, call, |flags| self.next.write(data, offset, flags, call))
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        if flags.fua && self.offered.fua == Support::Emulate && !call.may_block() {
            // The flush might have to wait, and by then the device has taken the blocks.
            return Err(crate::device::Error::WouldBlock);
        }
        self.durably(flags, call, |flags| self.next.write_blocks(data, offset, flags, call))
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.durably(flags, call, |flags| self.next.trim(length, offset, flags, call))
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let zero = |flags| backend::zero(&*self.next, &self.offered, length, offset, flags, call);
        self.durably(flags, call, zero)
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        match self.offered.cache {
            own if own.is_own() => self.next.cache(length, offset, call),
            _ => backend::read_through(&*self.next, &self.offered, length, offset, call),
        }
    }
}

impl fmt::Debug for Whole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Whole").field("size", &self.size).field("offered", &self.offered).finish_non_exhaustive()
    }
}

/// What opens a filter's devices. Every method is that of [`Exports`] of the same name, and passes the call on by default.
pub trait FilterExports: Send + Sync + 'static {
    /// What opens the devices behind.
    fn next(&self) -> &dyn Exports;

    /// How many requests this filter takes at a time; the next one's is regarded as well.
    const THREAD_MODEL: ThreadModel = ThreadModel::Parallel;

    /// How many requests both together take at a time. The default is what the stricter of the two takes.
    fn thread_model(&self) -> ThreadModel {
        Self::THREAD_MODEL.min(self.next().thread_model())
    }

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

//! `cacheextents`: keeps the last map that the next device told, and answers from it as long as nobody writes.
//!
//! It is of all clients of one export, as they all see the same. What writes makes it void when it begins, and again when it
//! has ended: a map that was asked for meanwhile may be of before it.
//! Source: nbdkit 1.44 filters/cacheextents/cacheextents.c, nbdkit-cacheextents-filter.pod; removed in 1.45.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nbdcaptive_actors::blocks::Blocks;
use nbdcaptive_actors::connection::Connection;
use nbdcaptive_actors::device::{Call, Device, Exports, Extents, Flags, Result, ThreadModel};
use nbdcaptive_actors::filter::{self, Filtered};

use super::kit::each;
use crate::layer::{About, ConfigError, Filter, Flag, Lifetime};

/// See the module.
pub static ABOUT: About = About {
    name: "cacheextents",
    summary: "keep the last map of holes and zeroes

        For clients that ask for a map extent by extent, where the plugin takes its time for each question and can
        tell many extents at once. The plugin is asked for all that lie in what the client asks for. A write makes
        what is kept void.

        # Examples

            nbdcaptive --filter=cacheextents file disk.img \\
                --run 'qemu-img map \"$uri\"'
        ",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug, Default)]
pub struct CacheExtents {
    /// `-D cacheextents.cache=1`: says what comes from the cache and what goes into it.
    debug_cache: i32,
}

impl Filter for CacheExtents {
    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        vec![("cache", &mut self.debug_cache)]
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let debug = self.debug_cache != 0;
        let kept = Arc::<Mutex<Kept>>::default();
        Ok(each(next, move |next, client| {
            let (export, kept) = (client.export_name.clone(), Arc::clone(&kept));
            let debug = debug.then(|| client.connection.clone());
            Ok(Filtered(Disk { next: next.open(client)?, export, kept, debug }))
        }))
    }
}

/// What is kept, of all clients.
#[derive(Default)]
struct Kept {
    map: Option<Map>,
    /// Another one whenever something was written, so that who asked before does not keep what he was told.
    writes: u64,
}

/// A map without gaps. Never longer than an answer to a client.
struct Map {
    export: Vec<u8>,
    start: u64,
    end: u64,
    /// Offset, length and flags, in order.
    extents: Vec<(u64, u64, u64)>,
}

struct Disk {
    next: Box<dyn Device>,
    export: Vec<u8>,
    kept: Arc<Mutex<Kept>>,
    /// Where to say what is done, if that is wanted.
    debug: Option<Connection>,
}

impl Disk {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self) {
        let mut kept = self.kept();
        kept.map = None;
        kept.writes += 1;
    }

    fn change(&self, change: impl FnOnce() -> Result<()>) -> Result<()> {
        self.forget();
        let changed = change();
        self.forget();
        changed
    }

    fn say(&self, what: std::fmt::Arguments<'_>) {
        if let Some(debug) = &self.debug {
            debug.debug(format_args!("cacheextents: {what}"));
        }
    }

    /// Answers from what is kept. `Err` is how much had been written when there was no answer.
    fn answer(&self, extents: &mut Extents) -> std::result::Result<(), u64> {
        let kept = self.kept();
        let map = kept.map.as_ref();
        let (start, end) = map.map_or((0, 0), |map| (map.start, map.end));
        self.say(format_args!("cache_start={start} cache_end={end}"));
        let covers = |map: &&Map| map.export == self.export && (start..end).contains(&extents.offset());
        let map = map.filter(covers).ok_or(kept.writes)?;
        let first = map.extents.partition_point(|(at, length, _)| at + length <= extents.offset());
        for (at, length, flags) in &map.extents[first..] {
            if !extents.add(*at, *length, *flags) {
                break;
            }
        }
        Ok(())
    }

    /// Keeps a map, unless something was written since it was asked for.
    fn keep(&self, told: &Extents, writes: u64) {
        let mut at = told.offset();
        let extents = told.list().iter().map(|extent| {
            let here = at;
            at += extent.length;
            self.say(format_args!(
                "updating cache with: offset={here} length={} type={:x}",
                extent.length, extent.flags
            ));
            (here, extent.length, extent.flags)
        });
        let extents = extents.collect();
        let mut kept = self.kept();
        if kept.writes == writes {
            kept.map = Some(Map { export: self.export.clone(), start: told.offset(), end: at, extents });
        }
    }
}

impl filter::Filter for Disk {
    fn next(&self) -> &dyn Device {
        &*self.next
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        let Err(writes) = self.answer(extents) else {
            self.say(format_args!("returning from cache"));
            return Ok(());
        };
        self.say(format_args!("cache miss"));
        if !extents.one() {
            self.next.extents(extents, call)?;
            self.keep(extents, writes);
            return Ok(());
        }
        let mut all = Extents::new(extents.offset(), extents.length(), false);
        self.next.extents(&mut all, call)?;
        if let Some(first) = all.list().first() {
            extents.add(all.offset(), first.length, first.flags);
        }
        self.keep(&all, writes);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.change(|| self.next.write(data, offset, flags, call))
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.change(|| self.next.write_blocks(data, offset, flags, call))
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.change(|| self.next.trim(length, offset, flags, call))
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.change(|| self.next.zero(length, offset, flags, call))
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use nbdcaptive_actors::device::{Client, ZERO};

    use super::super::next::testing::before;
    use super::*;

    /// A disk of extents of 10 bytes, data and zeroes by turns, that counts how often it is asked. What `meanwhile` says is
    /// done when it has been.
    #[derive(Default)]
    struct Stripes {
        asked: Mutex<u32>,
        meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    }

    struct StripesExports(Arc<Stripes>);
    struct StripesDevice(Arc<Stripes>);

    impl Exports for StripesExports {
        fn open(&self, _client: &Client) -> Result<Box<dyn Device>> {
            Ok(Box::new(StripesDevice(Arc::clone(&self.0))))
        }
    }

    impl Device for StripesDevice {
        fn size(&self) -> Result<u64> {
            Ok(1000)
        }
        fn read(&self, buffer: &mut [u8], _offset: u64, _call: &Call) -> Result<()> {
            buffer.fill(0);
            Ok(())
        }
        fn write(&self, _data: &[u8], _offset: u64, _flags: Flags, _call: &Call) -> Result<()> {
            Ok(())
        }
        fn extents(&self, extents: &mut Extents, _call: &Call) -> Result<()> {
            *self.0.asked.lock().unwrap() += 1;
            for number in extents.offset() / 10.. {
                if !extents.add(number * 10, 10, (number % 2) * ZERO) {
                    break;
                }
            }
            let meanwhile = self.0.meanwhile.lock().unwrap().take();
            meanwhile.into_iter().for_each(|act| act());
            Ok(())
        }
    }

    fn cached() -> (Arc<Stripes>, Arc<dyn Exports>) {
        let stripes = Arc::<Stripes>::default();
        let exports = Arc::new(StripesExports(Arc::clone(&stripes)));
        (stripes, before(exports, "cacheextents", &[]).unwrap())
    }

    fn map(device: &dyn Device, range: Range<u64>, one: bool) -> Vec<(u64, u64)> {
        let mut extents = Extents::new(range.start, range.end - range.start, one);
        device.extents(&mut extents, &Call::BLOCKING).unwrap();
        extents.list().iter().map(|extent| (extent.length, extent.flags)).collect()
    }

    fn open(exports: &Arc<dyn Exports>, name: &str) -> Box<dyn Device> {
        exports.open(&Client { export_name: name.into(), ..Client::default() }).unwrap()
    }

    #[test]
    fn who_asks_extent_by_extent_asks_the_plugin_once() {
        let (stripes, exports) = cached();
        let device = open(&exports, "");
        for start in 0..300 {
            let length = 10 - start % 10;
            let flags = start / 10 % 2 * ZERO;
            assert_eq!(map(&*device, start..300, true), [(length.min(300 - start), flags)], "{start}");
        }
        assert_eq!(*stripes.asked.lock().unwrap(), 1);
        // The end of what is kept is the end of the answer.
        assert_eq!(map(&*device, 285..600, false), [(5, 0), (10, ZERO)]);
        assert_eq!(*stripes.asked.lock().unwrap(), 1);
        assert_eq!(map(&*device, 300..325, false), [(10, 0), (10, ZERO), (5, 0)]);
        assert_eq!(*stripes.asked.lock().unwrap(), 2);
        // Another client of the export asks for the same, and one of another export for something else.
        map(&*open(&exports, ""), 310..320, false);
        assert_eq!(*stripes.asked.lock().unwrap(), 2);
        map(&*open(&exports, "other"), 310..320, false);
        assert_eq!(*stripes.asked.lock().unwrap(), 3);
    }

    #[test]
    fn what_is_written_makes_the_map_void_also_one_that_is_being_asked_for() {
        let (stripes, exports) = cached();
        let (device, other) = (open(&exports, ""), open(&exports, "other"));
        fn write(device: &dyn Device) {
            device.write(&[1], 0, Flags::default(), &Call::BLOCKING).unwrap();
        }
        let none = Flags::default();
        map(&*device, 0..100, false);
        write(&*other);
        map(&*device, 0..100, false);
        assert_eq!(*stripes.asked.lock().unwrap(), 2);
        let _ = device.trim(10, 0, none, &Call::BLOCKING);
        map(&*device, 0..100, false);
        let _ = device.zero(10, 0, none, &Call::BLOCKING);
        assert_eq!(*stripes.asked.lock().unwrap(), 3);
        *stripes.meanwhile.lock().unwrap() = Some(Box::new(move || write(&*other)));
        map(&*device, 0..100, false);
        map(&*device, 0..100, false);
        assert_eq!(*stripes.asked.lock().unwrap(), 5);
        map(&*device, 0..100, false);
        assert_eq!(*stripes.asked.lock().unwrap(), 5);
    }
}

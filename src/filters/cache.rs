//! `cache`: keeps data of the next device in a temporary file, by blocks that all clients of an export share.
//!
//! | `cache=` | a write | a flush |
//! |---|---|---|
//! | `writeback` | stays in the file, except with FUA | writes back all that was written, then flushes the next device |
//! | `writethrough` | goes to both | flushes the next device |
//! | `unsafe` | stays in the file | does nothing |
//!
//! Where `cache-max-size` is given, blocks go when there are too many, those first that were not used for long. nbdkit throws
//! them away even where they were not written back yet; here they are written to the next device first, and if that cannot
//! be done the request fails for which there was no room. nbdkit also has one cache for all exports; here each has its own.
//! Source: nbdkit filters/cache/cache.c, blk.c, lru.c, reclaim.c, nbdkit-cache-filter.pod.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nbdcaptive_actors::device::{
    BlockSize, Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Extents, Flags, Result, Segments,
    Support, ThreadModel,
};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports, Next};

use super::kit::{optional, unknown};
use crate::block_map::{BlockMap, State};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::overlay::{self, OnRead, Sink, Stripes, Temporary};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "cache",
    summary: "keep data in a temporary file, so that the plugin is asked less

        For plugins that are slow. What clients write is kept, and goes to the plugin at a flush; with
        `cache-on-read` what they read is kept as well. The file is in `$TMPDIR`, or `/var/tmp`, has no name, and is
        gone at the end. With `cache=unsafe` what was written is lost if it has not been written back by something
        else.

        # Examples

            nbdcaptive --filter=cache --filter=delay file disk.img rdelay=10ms \\
                cache-on-read=true --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        optional("cache", "writeback|writethrough|unsafe", "when writes go to the plugin, at a flush unless given"),
        optional("cache-min-block-size", "<SIZE>", "what is cached at a time, at least, 64K"),
        optional("cache-max-size", "<SIZE>", "the space that the cache may take"),
        optional("cache-high-threshold", "<PERCENT>", "how full it gets before something is thrown out, 95"),
        optional("cache-low-threshold", "<PERCENT>", "how full it is after that, 80"),
        optional("cache-on-read", "<BOOL>|/PATH", "cache what is read; with a path, as long as that exists"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

const NOT_CACHED: State = 0;
const CLEAN: State = 1;
const DIRTY: State = 3;

/// The longest piece of a block that is in memory at once, in bytes.
const PIECE: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Writeback,
    Writethrough,
    Unsafe,
}

/// The filter.
#[derive(Clone, Debug)]
pub struct Cache {
    mode: Mode,
    block_size: u64,
    max_size: Option<u64>,
    high: u32,
    low: u32,
    on_read: OnRead,
    directory: PathBuf,
}

impl Default for Cache {
    fn default() -> Cache {
        Cache {
            mode: Mode::Writeback,
            block_size: 65536,
            max_size: None,
            high: 95,
            low: 80,
            on_read: OnRead::No,
            directory: PathBuf::new(),
        }
    }
}

fn error<T>(line: impl Into<String>) -> std::result::Result<T, ConfigError> {
    Err(ConfigError(line.into()))
}

impl Filter for Cache {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let size = || values::size(value.text(key)?).map_err(ConfigError);
        let percent = || match values::unsigned(key, value.text(key)?).map_err(ConfigError)? {
            0 => error(format!("{key} must be greater than zero")),
            percent => Ok(percent),
        };
        match key {
            "cache" => {
                self.mode = match value.bytes() {
                    b"writeback" => Mode::Writeback,
                    b"writethrough" => Mode::Writethrough,
                    b"unsafe" => Mode::Unsafe,
                    _ => return error("invalid cache parameter, should be writeback|writethrough|unsafe"),
                }
            }
            "cache-min-block-size" => {
                self.block_size = size()?;
                if !(4096..=u64::from(u32::MAX)).contains(&self.block_size) || !self.block_size.is_power_of_two() {
                    return error("cache-min-block-size is not a power of 2, or is too small or too large");
                }
            }
            "cache-max-size" => {
                let size = size()?;
                if size < 1 << 20 {
                    return error("cache-max-size is too small");
                }
                self.max_size = Some(size);
            }
            "cache-high-threshold" => self.high = percent()?,
            "cache-low-threshold" => self.low = percent()?,
            "cache-on-read" => self.on_read = OnRead::parse(key, value)?,
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> std::result::Result<(), ConfigError> {
        if self.max_size.is_some() && self.low >= self.high {
            return error("cache-low-threshold must be less than cache-high-threshold");
        }
        Ok(())
    }

    fn ready(
        mut self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        self.directory = overlay::directory()?;
        // Smaller blocks could not be given back to the file system.
        if let Ok(system) = rustix::fs::statvfs(&self.directory)
            && (self.block_size..=u64::from(u32::MAX)).contains(&system.f_bsize)
            && system.f_bsize.is_power_of_two()
        {
            self.block_size = system.f_bsize;
        }
        Ok(Arc::new(FilteredExports(Caches { next, settings: Arc::new(*self), stores: Mutex::default() })))
    }
}

struct Caches {
    next: Arc<dyn Exports>,
    settings: Arc<Cache>,
    /// By export name.
    stores: Mutex<HashMap<Vec<u8>, Arc<Store>>>,
}

impl FilterExports for Caches {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = Next::open(&*self.next, client)?;
        let store = {
            let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
            // Any client can ask for any name: what holds nothing is not kept.
            stores.retain(|_, store| Arc::strong_count(store) > 1 || store.file.get().is_some());
            Arc::clone(stores.entry(client.export_name.clone()).or_default())
        };
        let settings = Arc::clone(&self.settings);
        Ok(Box::new(Filtered(CacheDevice { next, settings, store })))
    }

    fn unloads(&self) -> bool {
        self.settings.mode == Mode::Writeback
    }

    fn unload(&self) -> Result<()> {
        let stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        match stores.values().any(|store| store.is_dirty()) {
            true => Err(Error::failed(ErrorCode::Io, "cache: not all that was written could be written back")),
            false => Ok(()),
        }
    }
}

/// What is cached of one export.
#[derive(Default)]
struct Store {
    index: Mutex<Index>,
    /// Held by who changes a block, here or in the next device.
    stripes: Stripes,
    /// Made when it is first needed.
    file: OnceLock<Temporary>,
    making: Mutex<()>,
}

impl Store {
    /// There is something that the next device has not got.
    fn is_dirty(&self) -> bool {
        let index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        index.map.find(0, |state| state == DIRTY).is_some()
    }
}

/// Which blocks there are.
#[derive(Default)]
struct Index {
    map: BlockMap,
    /// How many blocks are cached.
    count: u64,
    /// Blocks used lately: those of this turn and those of the one before.
    recent: [BlockMap; 2],
    /// How many of this turn.
    recent_count: u64,
    /// Between the high threshold and the low one.
    reclaiming: bool,
    /// Where the next block is looked for that goes.
    hand: u64,
}

impl Index {
    fn set(&mut self, block: u64, state: State) {
        let (before, after) = (self.map.get(block) != NOT_CACHED, state != NOT_CACHED);
        self.count = self.count - u64::from(before) + u64::from(after);
        self.map.set(block..block + 1, state);
    }

    /// Notes that a block was used; `turn` different ones later that is forgotten by half.
    fn used(&mut self, block: u64, turn: u64) {
        if self.recent[0].get(block) == 0 {
            self.recent[0].set(block..block + 1, 1);
            self.recent_count += 1;
            if self.recent_count >= turn {
                self.recent.swap(0, 1);
                self.recent[0] = BlockMap::default();
                self.recent_count = 0;
            }
        }
    }

    fn is_recent(&self, block: u64) -> bool {
        self.recent.iter().any(|turn| turn.get(block) != 0)
    }

    /// The next cached block to go: one that was not used lately, or else any.
    fn victim(&mut self) -> Option<u64> {
        let cached = |from: u64| self.map.find(from, |state| state != NOT_CACHED);
        let first = cached(self.hand).or_else(|| cached(0))?;
        let mut block = first;
        // More than this and looking costs more than reading a block again.
        for _ in 0..1024 {
            if !self.is_recent(block) {
                self.hand = block + 1;
                return Some(block);
            }
            block = cached(block + 1).or_else(|| cached(0))?;
            if block == first {
                break;
            }
        }
        self.hand = block + 1;
        Some(block)
    }
}

/// One client's device.
struct CacheDevice {
    next: Next,
    settings: Arc<Cache>,
    store: Arc<Store>,
}

impl CacheDevice {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.store.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self) -> Result<&Temporary> {
        if let Some(file) = self.store.file.get() {
            return Ok(file);
        }
        let _making = self.store.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = self.store.file.get() {
            return Ok(file);
        }
        let file = Temporary::new(&self.settings.directory)?;
        Ok(self.store.file.get_or_init(|| file))
    }

    /// The bytes of a block.
    fn bytes(&self, block: u64) -> Range<u64> {
        let size = self.settings.block_size;
        block * size..(block + 1).saturating_mul(size).min(self.next.bytes())
    }

    /// The blocks that a range touches, each with the part of it that is in the range.
    fn parts(&self, bytes: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> + '_ {
        let size = self.settings.block_size;
        (bytes.start / size..bytes.end.div_ceil(size)).map(move |block| {
            let all = self.bytes(block);
            (block, all.start.max(bytes.start)..all.end.min(bytes.end))
        })
    }

    /// A quarter of the blocks that there may be are remembered as used lately, in two turns.
    fn turn(&self) -> u64 {
        (self.settings.max_size.unwrap_or(self.next.bytes()) / self.settings.block_size / 4).max(100) / 2
    }

    fn used(&self, block: u64) {
        if self.settings.max_size.is_some() {
            let turn = self.turn();
            self.index().used(block, turn);
        }
    }

    /// Puts a block into a state. Called with its lock.
    fn set(&self, block: u64, state: State) {
        self.index().set(block, state);
        self.used(block);
    }

    /// What bytes `at` and following are, cached or not, up to where that changes or `end`.
    fn run(&self, at: u64, end: u64) -> (bool, u64) {
        let size = self.settings.block_size;
        let index = self.index();
        let cached = index.map.get(at / size) != NOT_CACHED;
        let other = index.map.find(at / size, |state| (state != NOT_CACHED) != cached);
        (cached, other.map_or(end, |other| other.saturating_mul(size).min(end)))
    }

    /// Makes room for one more block, if there may not be any number of them. Two go where one comes. Called without a lock.
    fn make_room(&self, call: &Call) -> Result<()> {
        let Some(max_size) = self.settings.max_size else { return Ok(()) };
        let percent = |percent: u32| (u128::from(max_size) * u128::from(percent) / 100) as u64;
        for _ in 0..2 {
            let victim = {
                let mut index = self.index();
                let full = index.count.saturating_mul(self.settings.block_size);
                index.reclaiming =
                    full >= percent(if index.reclaiming { self.settings.low } else { self.settings.high });
                if !index.reclaiming {
                    return Ok(());
                }
                index.victim()
            };
            let Some(block) = victim else { return Ok(()) };
            let _lock = self.store.stripes.of(block);
            self.write_back(block, Flags::default(), call)?;
            self.index().set(block, NOT_CACHED);
            let bytes = self.bytes(block);
            self.file()?.punch(bytes.start, self.settings.block_size)?;
        }
        Ok(())
    }

    fn read_into(&self, mut sink: Sink<'_>, bytes: Range<u64>, call: &Call) -> Result<()> {
        let mut at = bytes.start;
        while at < bytes.end {
            let (cached, run) = self.run(at, bytes.end);
            if !cached && !self.settings.on_read.is_on() {
                // Whether a block comes into the cache meanwhile does not matter: who wrote it has no answer yet.
                sink.read(&self.next, (run - at) as usize, at, call)?;
                at = run;
                continue;
            }
            for (block, part) in self.parts(at..run) {
                // Without room for it, what is read is just not kept.
                let keep = !cached && self.make_room(call).is_ok();
                let lock = self.store.stripes.of(block);
                let mut is_here = self.index().map.get(block) != NOT_CACHED;
                if !is_here && keep && self.copy_in(self.bytes(block), call).is_ok() {
                    self.index().set(block, CLEAN);
                    is_here = true;
                }
                let length = (part.end - part.start) as usize;
                if is_here {
                    self.file()?.read(sink.space(length), part.start)?;
                    self.used(block);
                } else {
                    drop(lock);
                    sink.read(&self.next, length, part.start, call)?;
                }
            }
            at = run;
        }
        Ok(())
    }

    /// Copies a block from the next device into the file. Called with the block's lock.
    fn copy_in(&self, bytes: Range<u64>, call: &Call) -> Result<()> {
        let file = self.file()?;
        self.pieces(bytes, |buffer, at| {
            self.next.read(buffer, at, call)?;
            file.write(buffer, at)
        })
    }

    /// Copies a range from the file into the next device. Called with the block's lock.
    fn copy_out(&self, bytes: Range<u64>, flags: Flags, call: &Call) -> Result<()> {
        let file = self.file()?;
        self.pieces(bytes, |buffer, at| {
            file.read(buffer, at)?;
            self.next.write(buffer, at, flags, call)
        })
    }

    fn pieces(&self, bytes: Range<u64>, mut each: impl FnMut(&mut [u8], u64) -> Result<()>) -> Result<()> {
        let mut buffer = vec![0; (bytes.end - bytes.start).min(PIECE) as usize];
        let mut at = bytes.start;
        while at < bytes.end {
            let length = (bytes.end - at).min(PIECE);
            each(&mut buffer[..length as usize], at)?;
            at += length;
        }
        Ok(())
    }

    /// Writes a block to the next device, if that has not got it. Called with its lock.
    fn write_back(&self, block: u64, flags: Flags, call: &Call) -> Result<()> {
        if self.index().map.get(block) == DIRTY {
            self.copy_out(self.bytes(block), flags, call)?;
            self.index().set(block, CLEAN);
        }
        Ok(())
    }

    /// Writes all to the next device that it has not got. Goes on after an error, and returns the first.
    fn write_all_back(&self, call: &Call) -> Result<()> {
        let mut result = Ok(());
        let mut from = 0;
        loop {
            let dirty = self.index().map.find(from, |state| state == DIRTY);
            let Some(block) = dirty else { return result };
            let _lock = self.store.stripes.of(block);
            if let Err(error) = self.write_back(block, Flags::default(), call)
                && result.is_ok()
            {
                let why = format!("cache: flush of block {block} failed: {error}");
                result = Err(Error::Failed { code: error.code(), why: why.into() });
            }
            from = block + 1;
        }
    }

    /// Changes a part of a block by `write`, in the file and where that is wanted in the next device.
    fn change(
        &self,
        block: u64,
        part: Range<u64>,
        fua: bool,
        call: &Call,
        write: impl Fn(&Temporary) -> Result<()>,
    ) -> Result<()> {
        self.make_room(call)?;
        let _lock = self.store.stripes.of(block);
        let state = self.index().map.get(block);
        let all = self.bytes(block);
        if state == NOT_CACHED && part != all {
            self.copy_in(all, call)?;
        }
        if let Err(error) = write(self.file()?) {
            // Half of it may be there, which the next device does not have.
            if state == CLEAN {
                self.index().set(block, NOT_CACHED);
            }
            return Err(error);
        }
        let through = match self.settings.mode {
            Mode::Writethrough => true,
            Mode::Writeback => fua,
            Mode::Unsafe => false,
        };
        if !through {
            self.set(block, DIRTY);
            return Ok(());
        }
        // What the next device does not have yet of this block must be as safe as what is written now.
        let out = if state == DIRTY { self.bytes(block) } else { part };
        let done = self.copy_out(out, Flags { fua, ..Flags::default() }, call);
        // If it failed nobody knows what is there now: it has to be written again, or read again.
        let after = match (&done, state, self.settings.mode) {
            (Ok(()), ..) => CLEAN,
            (Err(_), _, Mode::Writeback) | (Err(_), DIRTY, _) => DIRTY,
            (Err(_), ..) => NOT_CACHED,
        };
        self.set(block, after);
        done
    }
}

impl filter::Filter for CacheDevice {
    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let next = *self.next.offered();
        let is_unsafe = self.settings.mode == Mode::Unsafe;
        // A power of two below 2^32.
        let block = self.settings.block_size as u32;
        let block_size = match next.block_size {
            None => BlockSize { minimum: 1, preferred: block, maximum: u32::MAX },
            Some(size) if size.maximum >= block => BlockSize { preferred: size.preferred.max(block), ..size },
            Some(size) => size,
        };
        Ok(Capabilities {
            flush: is_unsafe || next.flush,
            zero: if next.zero == Support::None { Support::None } else { Support::Native },
            fast_zero: true,
            fua: if is_unsafe { Support::Native } else { next.fua },
            multi_conn: self.settings.mode != Mode::Writethrough || next.multi_conn,
            cache: Support::Native,
            takes_blocks: false,
            block_size: Some(block_size),
            ..next
        })
    }

    fn answers_at_once(&self) -> bool {
        false
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        let end = offset + buffer.len() as u64;
        self.read_into(Sink::Buffer(buffer), offset..end, call)
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        self.read_into(Sink::Reply(reply), offset..offset + length as u64, call)
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        for (block, part) in self.parts(offset..offset + data.len() as u64) {
            let data = &data[(part.start - offset) as usize..(part.end - offset) as usize];
            self.change(block, part.clone(), flags.fua, call, |file| file.write(data, part.start))?;
        }
        Ok(())
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        if flags.fast {
            return Err(Error::not_supported("cache: zeroes may be no faster than a write"));
        }
        for (block, part) in self.parts(offset..offset + length) {
            let write = |file: &Temporary| file.zero(part.start, part.end - part.start);
            self.change(block, part.clone(), flags.fua, call, write)?;
        }
        Ok(())
    }

    fn flush(&self, call: &Call) -> Result<()> {
        if self.settings.mode == Mode::Unsafe {
            return Ok(());
        }
        let written = self.write_all_back(call);
        let flushed = self.next.flush(call);
        written.and(flushed)
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        for (block, part) in self.parts(offset..offset + length) {
            self.make_room(call)?;
            let _lock = self.store.stripes.of(block);
            if self.index().map.get(block) == NOT_CACHED {
                self.copy_in(self.bytes(block), call)?;
                self.set(block, CLEAN);
            } else {
                self.file()?.will_need(part.start, part.end - part.start);
                self.used(block);
            }
        }
        Ok(())
    }

    /// The next device may have something else there afterwards. What it has not got yet stays, and will be written.
    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let size = self.settings.block_size;
        let blocks = offset / size..(offset + length).div_ceil(size);
        let _locks = self.store.stripes.lock(blocks.clone());
        let trimmed = self.next.trim(length, offset, flags, call);
        let mut index = self.index();
        let mut from = blocks.start;
        while let Some(block) = index.map.find(from, |state| state == CLEAN).filter(|block| *block < blocks.end) {
            index.set(block, NOT_CACHED);
            from = block + 1;
        }
        trimmed
    }

    /// The next device's, but what it has not got yet is data.
    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        let size = self.settings.block_size;
        let end = extents.offset() + extents.length();
        let mut at = extents.offset();
        while at < end {
            let (dirty, run) = {
                let index = self.index();
                let dirty = index.map.get(at / size) == DIRTY;
                let other = index.map.find(at / size, |state| (state == DIRTY) != dirty);
                (dirty, other.map_or(end, |other| other.saturating_mul(size).min(end)))
            };
            let more = if dirty {
                extents.add(at, run - at, 0)
            } else {
                let mut part = Extents::new(at, run - at, extents.one());
                self.next.extents(&mut part, call)?;
                let mut from = at;
                part.list().iter().all(|extent| {
                    let start = from;
                    from += extent.length;
                    extents.add(start, extent.length, extent.flags)
                }) && from == run
            };
            if !more {
                break;
            }
            at = run;
        }
        Ok(())
    }

    /// Nobody may have asked for a flush: the next device has none, or a filter in front keeps them to itself. What fails is
    /// tried again by the next client; if there is none, the end tells.
    fn close(&self) -> Result<()> {
        let offered = self.next.offered();
        let is_due = self.settings.mode == Mode::Writeback && offered.write && self.store.is_dirty();
        if is_due && self.write_all_back(&Call::BLOCKING).is_ok() && offered.flush {
            return self.next.flush(&Call::BLOCKING);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::next::testing::{Script, Scripted, before};
    use crate::plugins::testing::Random;

    const CALL: &Call = &Call::BLOCKING;

    fn open(script: &Arc<Script>, parameters: &[(&str, &str)]) -> Box<dyn Device> {
        let next = Arc::new(Scripted(Arc::clone(script)));
        before(next, "cache", parameters).unwrap().open(&Client::default()).unwrap()
    }

    fn write(device: &dyn Device, data: &[u8], offset: u64) -> Result<()> {
        device.write(data, offset, Flags::default(), CALL)
    }

    #[test]
    fn clients_see_one_disk_and_the_plugin_has_it_after_a_flush() {
        let mut random = Random(23);
        for mode in ["writeback", "writethrough", "unsafe"] {
            for on_read in ["false", "true"] {
                for max_size in [None, Some(("cache-max-size", "1M"))] {
                    let size = 3_000_000 + random.below(10_000) as usize;
                    let mut model = random.bytes(size);
                    let script = Script::new(model.clone());
                    let mut parameters = vec![("cache", mode), ("cache-on-read", on_read)];
                    parameters.extend(max_size);
                    let device = open(&script, &parameters);
                    for _ in 0..300 {
                        let range = random.range(size as u64);
                        let range = range.start..range.end.min(range.start + 300_000);
                        let (offset, length) = (range.start, range.end - range.start);
                        let inside = range.start as usize..range.end as usize;
                        match random.below(5) {
                            0 => {
                                let data = random.bytes(length as usize);
                                let fua = random.below(2) == 1;
                                device.write(&data, offset, Flags { fua, ..Flags::default() }, CALL).unwrap();
                                model[inside].copy_from_slice(&data);
                            }
                            1 => {
                                device.zero(length, offset, Flags::default(), CALL).unwrap();
                                model[inside].fill(0);
                            }
                            2 => device.cache(length, offset, CALL).unwrap(),
                            3 if mode != "unsafe" => {
                                device.flush(CALL).unwrap();
                                assert!(*script.disk.lock().unwrap() == model);
                            }
                            _ => {
                                let mut buffer = vec![1; length as usize];
                                device.read(&mut buffer, offset, CALL).unwrap();
                                assert!(buffer == model[inside.clone()], "{range:?} {mode} {on_read} {max_size:?}");
                                let mut reply = Segments::default();
                                device.read_segments(&mut reply, length as usize, offset, CALL).unwrap();
                                assert!(reply.to_vec() == model[inside]);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_mode_says_when_the_plugin_is_written() {
        for (mode, after_write, after_flush) in [
            ("writeback", "open read:0+65536", "write:0+65536 flush"),
            ("writethrough", "open read:0+65536 write:3+2", "flush"),
            ("unsafe", "open read:0+65536", ""),
        ] {
            let script = Script::new(vec![1; 200_000]);
            let device = open(&script, &[("cache", mode)]);
            write(&*device, b"ab", 3).unwrap();
            assert_eq!(script.log(), after_write, "{mode}");
            device.flush(CALL).unwrap();
            assert_eq!(script.log(), after_flush, "{mode}");
            device.flush(CALL).unwrap();
            assert_eq!(script.log(), if mode == "unsafe" { "" } else { "flush" });
        }
    }

    #[test]
    fn fua_in_writeback_takes_along_what_was_written_of_the_block() {
        let script = Script::new(vec![1; 200_000]);
        let device = open(&script, &[]);
        let fua = Flags { fua: true, ..Flags::default() };
        device.write(b"a", 5, fua, CALL).unwrap();
        assert_eq!(script.log(), "open read:0+65536 write:5+1fua");
        write(&*device, b"b", 7).unwrap();
        device.write(b"c", 9, fua, CALL).unwrap();
        assert_eq!(script.log(), "write:0+65536fua");
        assert_eq!(script.disk.lock().unwrap()[5..10], *b"a\x01b\x01c");
    }

    #[test]
    fn a_flush_that_fails_has_lost_nothing() {
        let script = Script::new(vec![1; 200_000]);
        let device = open(&script, &[]);
        write(&*device, b"a", 5).unwrap();
        write(&*device, b"b", 70_000).unwrap();
        script.fail("write", 1);
        let error = device.flush(CALL).unwrap_err();
        assert_eq!(error.to_string(), "cache: flush of block 0 failed: write was told to fail");
        assert_eq!(script.disk.lock().unwrap()[70_000], b'b');
        device.flush(CALL).unwrap();
        assert_eq!(script.disk.lock().unwrap()[5], b'a');
    }

    #[test]
    fn a_cache_that_is_full_gives_up_what_was_not_used_for_long_and_writes_it_back_first() {
        let script = Script::new(vec![1; 64 << 20]);
        let device = open(&script, &[("cache-max-size", "4M"), ("cache", "unsafe")]);
        for block in 0..1024 {
            write(&*device, &[block as u8; 65536], block * 65536).unwrap();
        }
        let written = script.log().split(' ').filter(|call| call.starts_with("write")).count();
        assert!((1024 - 64..1024 - 40).contains(&written), "{written}");
        for block in 0..1024 {
            let mut buffer = [0; 1];
            device.read(&mut buffer, block * 65536 + 100, CALL).unwrap();
            assert_eq!(buffer, [block as u8]);
        }
        let read = script.log().split(' ').filter(|call| call.starts_with("read")).count();
        assert_eq!(read, written);
    }

    #[test]
    fn a_write_fails_for_which_there_is_no_room() {
        let script = Script::new(vec![1; 64 << 20]);
        let device = open(&script, &[("cache-max-size", "1M")]);
        script.fail("write", u32::MAX);
        let failed = (0..100).filter(|block| write(&*device, &[7; 65536], block * 65536).is_err()).count();
        assert_eq!(failed, 84);
        script.fail("write", 0);
        device.flush(CALL).unwrap();
        assert_eq!(script.disk.lock().unwrap().iter().filter(|byte| **byte == 7).count(), 16 * 65536);
    }

    #[test]
    fn what_was_read_is_not_asked_for_again_if_that_is_wanted() {
        let script = Script::new(vec![1; 200_000]);
        let device = open(&script, &[("cache-on-read", "true")]);
        device.read(&mut [0; 100], 199_000, CALL).unwrap();
        assert_eq!(script.log(), "open read:196608+3392");
        device.read(&mut [0; 1000], 199_000, CALL).unwrap();
        assert_eq!(script.log(), "");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("on");
        let device = open(&script, &[("cache-on-read", path.to_str().unwrap())]);
        device.read(&mut [0; 10], 0, CALL).unwrap();
        assert_eq!(script.log(), "open read:0+10");
        std::fs::write(&path, "").unwrap();
        device.read(&mut [0; 10], 0, CALL).unwrap();
        device.read(&mut [0; 10], 0, CALL).unwrap();
        assert_eq!(script.log(), "read:0+65536");
    }

    #[test]
    fn what_is_not_written_back_yet_is_data_in_the_map() {
        let script = Script::new(vec![1; 200_000]);
        let device = open(&script, &[]);
        let first = || {
            let mut extents = Extents::new(0, 200_000, true);
            device.extents(&mut extents, CALL).unwrap();
            (extents.list()[0].length, extents.list()[0].flags)
        };
        assert_eq!(first(), (1, 3));
        write(&*device, b"a", 5).unwrap();
        assert_eq!(first(), (65536, 0));
        device.flush(CALL).unwrap();
        assert_eq!(first(), (1, 3));
    }

    #[test]
    fn a_trim_changes_what_is_cached_and_what_is_not_written_back_stays() {
        let script = Script::new(vec![1; 300_000]);
        let device = open(&script, &[("cache-on-read", "true")]);
        device.read(&mut [0; 300_000], 0, CALL).unwrap();
        write(&*device, b"a", 70_000).unwrap();
        script.log();
        device.trim(200_000, 10, Flags::default(), CALL).unwrap();
        assert_eq!(script.log(), "trim:10+200000");
        script.disk.lock().unwrap()[..200_000].fill(9);
        let mut buffer = [0; 300_000];
        device.read(&mut buffer, 0, CALL).unwrap();
        assert_eq!((buffer[20], buffer[70_000], buffer[70_001], buffer[140_000], buffer[299_999]), (9, b'a', 1, 9, 1));
        assert_eq!(script.log(), "read:0+65536 read:131072+65536 read:196608+65536");
    }

    #[test]
    fn what_nobody_flushes_is_written_back_when_a_client_leaves_or_the_end_says_that_it_is_lost() {
        let script = Script::new(vec![1; 200_000]);
        let next = Arc::new(Scripted(Arc::clone(&script)));
        let exports = before(next, "cache", &[]).unwrap();
        let device = exports.open(&Client::default()).unwrap();
        write(&*device, b"a", 5).unwrap();
        script.fail("write", 1);
        device.close().unwrap();
        let lost = exports.unload().unwrap_err().to_string();
        assert_eq!(lost, "cache: not all that was written could be written back");
        // The next client tries again.
        exports.open(&Client::default()).unwrap().close().unwrap();
        exports.unload().unwrap();
        assert_eq!(script.disk.lock().unwrap()[5], b'a');
        assert!(script.log().ends_with("open write:0+65536 flush close"));
    }

    #[test]
    fn nothing_is_lost_before_a_plugin_that_cannot_be_flushed() {
        let script = Script::new(vec![1; 200_000]);
        script.capabilities.lock().unwrap().flush = false;
        let device = open(&script, &[]);
        assert!(!device.capabilities().unwrap().flush);
        write(&*device, b"a", 5).unwrap();
        device.close().unwrap();
        assert_eq!(script.log(), "open read:0+65536 write:0+65536 close");
    }
}

//! `cow`: what is written goes into a temporary file in front of the next device, which is opened read-only. All clients of
//! an export see the same; when the server ends it is gone.
//!
//! The next device may not change, so a block is the next device's until it is written, and then never again.
//! Beside `base:allocation` there is the context `qemu:allocation-depth`: 1 for what is in the overlay, 2 for what is not.
//! Source: nbdkit filters/cow/cow.c, filters/cow/blk.c, nbdkit-cow-filter.pod; qemu docs/interop/nbd.txt.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use nbdcaptive_actors::device::{
    BlockSize, Call, Capabilities, Client, Device, Error, Exports, Extents, Flags, HOLE, MetaContext, Result, Segments,
    Support, ThreadModel, ZERO,
};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports, Next};

use super::kit::unknown;
use crate::block_map::{BlockMap, State};
use crate::layer::{About, ConfigError, Filter, Lifetime, Parameter, Value};
use crate::overlay::{self, OnRead, Sink, Stripes, Temporary};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "cow",
    summary: "keep writes in a temporary file, and leave the plugin as it is

        Clients may write although the plugin may not be written, or is not to be. What they write is kept in a file
        in `$TMPDIR`, or `/var/tmp`, which has no name and is gone at the end. All clients see the same. The plugin
        must not change meanwhile.

        Where clients ask for the context `qemu:allocation-depth` they are told which blocks have been written.

        # Examples

            nbdcaptive --filter=cow file disk.img --run 'nbdcopy new.img \"$uri\"'
        ",
    parameters: &[
        Parameter { key: "cow-block-size", value: "<SIZE>", help: "what is copied at a time, 64K", required: false },
        Parameter {
            key: "cow-on-cache",
            value: "<BOOL>",
            help: "copy what is prefetched into the overlay",
            required: false,
        },
        Parameter {
            key: "cow-on-read",
            value: "<BOOL>|/PATH",
            help: "copy what is read into the overlay; with a path, as long as that exists",
            required: false,
        },
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

const NOT_ALLOCATED: State = 0;
const ALLOCATED: State = 1;
const TRIMMED: State = 3;

/// The largest piece that is copied from the next device at once, in bytes.
const PIECE: u64 = 1 << 20;

/// The context's name, and what it says of a block that is in the overlay, or is not.
const DEPTH: &str = "qemu:allocation-depth";
const DEPTH_OVERLAY: u64 = 1;
const DEPTH_NEXT: u64 = 2;

/// The filter.
#[derive(Clone, Debug)]
pub struct Cow {
    block_size: u64,
    on_cache: bool,
    on_read: OnRead,
    directory: PathBuf,
}

impl Default for Cow {
    fn default() -> Cow {
        Cow { block_size: 65536, on_cache: false, on_read: OnRead::No, directory: PathBuf::new() }
    }
}

impl Filter for Cow {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "cow-block-size" => {
                let size = values::size(value.text(key)?).map_err(ConfigError)?;
                if !(4096..=u64::from(u32::MAX)).contains(&size) || !size.is_power_of_two() {
                    return Err(ConfigError(
                        "cow-block-size is out of range (4096..2G) or not a power of 2".to_owned(),
                    ));
                }
                self.block_size = size;
            }
            "cow-on-cache" => self.on_cache = values::boolean(value.text(key)?).map_err(ConfigError)?,
            "cow-on-read" => self.on_read = OnRead::parse(key, value)?,
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        mut self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        self.directory = overlay::directory()?;
        Ok(Arc::new(FilteredExports(Overlays { next, settings: Arc::new(*self), overlays: Mutex::default() })))
    }
}

struct Overlays {
    next: Arc<dyn Exports>,
    settings: Arc<Cow>,
    /// By export name.
    overlays: Mutex<HashMap<Vec<u8>, Arc<Overlay>>>,
}

impl FilterExports for Overlays {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = Next::open(&*self.next, &Client { read_only: true, ..client.clone() })?;
        let (next, depth) = next.look(|_| self.own_context(client))?;
        let overlay = {
            let mut overlays = self.overlays.lock().unwrap_or_else(PoisonError::into_inner);
            // Any client can ask for any name: what nobody has written to is not kept.
            overlays.retain(|_, overlay| Arc::strong_count(overlay) > 1 || overlay.is_changed());
            Arc::clone(overlays.entry(client.export_name.clone()).or_default())
        };
        let settings = Arc::clone(&self.settings);
        Ok(Box::new(Filtered(CowDevice { next, settings, overlay, depth })))
    }

    fn meta_contexts(&self, client: &Client) -> Result<Vec<MetaContext>> {
        let mut contexts = self.next.meta_contexts(client)?;
        if !contexts.iter().any(|context| context.name == DEPTH) {
            contexts.push(MetaContext { name: DEPTH.into(), is_wide: false });
        }
        Ok(contexts)
    }
}

impl Overlays {
    /// The number of the context that is ours, unless the next device has one of that name.
    fn own_context(&self, client: &Client) -> Result<Option<usize>> {
        let contexts = self.next.meta_contexts(client)?;
        Ok((!contexts.iter().any(|context| context.name == DEPTH)).then_some(contexts.len()))
    }
}

/// What was written to one export.
#[derive(Default)]
struct Overlay {
    content: RwLock<Content>,
    /// Held by who changes a block, so that the rest of it is not lost.
    stripes: Stripes,
}

#[derive(Default)]
struct Content {
    map: BlockMap,
    /// Only when there is something in it.
    file: Option<Arc<Temporary>>,
}

impl Overlay {
    fn is_changed(&self) -> bool {
        let content = self.content.read().unwrap_or_else(PoisonError::into_inner);
        content.file.is_some() || content.map.find(0, |state| state != NOT_ALLOCATED).is_some()
    }
}

/// One client's device.
struct CowDevice {
    next: Next,
    settings: Arc<Cow>,
    overlay: Arc<Overlay>,
    /// The number of our own context.
    depth: Option<usize>,
}

impl CowDevice {
    /// What bytes `at` and following are, up to where that changes or `end`.
    fn run(&self, at: u64, end: u64) -> (State, Range<u64>) {
        let size = self.settings.block_size;
        let content = self.overlay.content.read().unwrap_or_else(PoisonError::into_inner);
        let (state, run) = content.map.run(at / size, end.div_ceil(size));
        (state, at..run.saturating_mul(size).min(end))
    }

    fn state(&self, block: u64) -> State {
        self.overlay.content.read().unwrap_or_else(PoisonError::into_inner).map.get(block)
    }

    fn set(&self, blocks: Range<u64>, state: State) {
        self.overlay.content.write().unwrap_or_else(PoisonError::into_inner).map.set(blocks, state);
    }

    /// The temporary file, made when it is first needed.
    fn file(&self) -> Result<Arc<Temporary>> {
        if let Some(file) = &self.overlay.content.read().unwrap_or_else(PoisonError::into_inner).file {
            return Ok(Arc::clone(file));
        }
        let mut content = self.overlay.content.write().unwrap_or_else(PoisonError::into_inner);
        match &content.file {
            Some(file) => Ok(Arc::clone(file)),
            None => {
                let file = Arc::new(Temporary::new(&self.settings.directory)?);
                Ok(Arc::clone(content.file.insert(file)))
            }
        }
    }

    /// The bytes of these blocks.
    fn bytes(&self, blocks: Range<u64>) -> Range<u64> {
        let size = self.settings.block_size;
        blocks.start * size..blocks.end.saturating_mul(size).min(self.next.bytes())
    }

    /// Copies one block from the next device into the file, all but `except`. Called with the block's lock.
    fn copy(&self, block: u64, except: Range<u64>, call: &Call) -> Result<()> {
        let file = self.file()?;
        let bytes = self.bytes(block..block + 1);
        let mut buffer = Vec::new();
        for part in [
            bytes.start..except.start.clamp(bytes.start, bytes.end),
            except.end.clamp(bytes.start, bytes.end)..bytes.end,
        ] {
            let mut at = part.start;
            while at < part.end {
                let length = (part.end - at).min(PIECE);
                buffer.resize(length as usize, 0);
                self.next.read(&mut buffer, at, call)?;
                file.write(&buffer, at)?;
                at += length;
            }
        }
        Ok(())
    }

    /// Copies what is not in the overlay yet.
    fn fill(&self, bytes: Range<u64>, call: &Call) -> Result<()> {
        let size = self.settings.block_size;
        for block in bytes.start / size..bytes.end.div_ceil(size) {
            let _lock = self.overlay.stripes.of(block);
            if self.state(block) == NOT_ALLOCATED {
                self.copy(block, self.next.bytes()..self.next.bytes(), call)?;
                self.set(block..block + 1, ALLOCATED);
            }
        }
        Ok(())
    }

    fn read_into(&self, mut sink: Sink<'_>, bytes: Range<u64>, call: &Call) -> Result<()> {
        let mut at = bytes.start;
        while at < bytes.end {
            let (state, run) = self.run(at, bytes.end);
            let length = (run.end - at) as usize;
            match state {
                NOT_ALLOCATED if !self.fill_on_read(&run, call)? => sink.read(&self.next, length, at, call)?,
                TRIMMED => sink.zeroes(length),
                _ => self.file()?.read(sink.space(length), at)?,
            }
            at = run.end;
        }
        Ok(())
    }

    /// Brings a run that is not in the overlay into it, if that is wanted, and says whether it did.
    fn fill_on_read(&self, bytes: &Range<u64>, call: &Call) -> Result<bool> {
        if !self.settings.on_read.is_on() {
            return Ok(false);
        }
        self.fill(bytes.clone(), call)?;
        Ok(true)
    }

    /// Changes a range: `whole` where that is whole blocks, `part` with the block's number where it is part of one.
    fn change(
        &self,
        bytes: Range<u64>,
        whole: impl Fn(Range<u64>) -> Result<()>,
        part: impl Fn(u64, Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let size = self.settings.block_size;
        let mut at = bytes.start;
        while at < bytes.end {
            let block = at / size;
            let inside = self.bytes(block..block + 1);
            let end = if inside.start == at && bytes.end >= inside.end {
                // The last block of the device may be short and is whole all the same.
                let last = if bytes.end == self.next.bytes() { bytes.end.div_ceil(size) } else { bytes.end / size };
                let _locks = self.overlay.stripes.lock(block..last);
                whole(block..last)?;
                self.bytes(block..last).end
            } else {
                let end = inside.end.min(bytes.end);
                let _lock = self.overlay.stripes.of(block);
                part(block, at..end)?;
                end
            };
            at = end;
        }
        Ok(())
    }

    /// Makes a part of a block of the overlay's, then writes it by `write`. Called with the block's lock.
    fn change_part(
        &self,
        block: u64,
        bytes: Range<u64>,
        call: &Call,
        write: impl Fn(&Temporary) -> Result<()>,
    ) -> Result<()> {
        let file = self.file()?;
        match self.state(block) {
            NOT_ALLOCATED => self.copy(block, bytes, call)?,
            TRIMMED => {
                let all = self.bytes(block..block + 1);
                file.zero(all.start, all.end - all.start)?;
            }
            _ => {}
        }
        write(&file)?;
        self.set(block..block + 1, ALLOCATED);
        Ok(())
    }

    fn zero_part(&self, block: u64, bytes: Range<u64>, call: &Call) -> Result<()> {
        self.change_part(block, bytes.clone(), call, |file| file.zero(bytes.start, bytes.end - bytes.start))
    }
}

impl filter::Filter for CowDevice {
    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn capabilities(&self) -> Result<Capabilities> {
        // A power of two below 2^32.
        let block = self.settings.block_size as u32;
        let block_size = match self.next.offered().block_size {
            None => BlockSize { minimum: 1, preferred: block, maximum: u32::MAX },
            Some(next) if next.maximum >= block => BlockSize { preferred: next.preferred.max(block), ..next },
            Some(next) => next,
        };
        Ok(Capabilities {
            write: true,
            flush: true,
            trim: true,
            zero: Support::Native,
            fast_zero: true,
            fua: Support::Native,
            multi_conn: true,
            cache: Support::Native,
            extents: true,
            takes_blocks: false,
            block_size: Some(block_size),
            ..self.next.capabilities()?
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

    // FUA and flush have nothing to do: what is here does not outlive the server.
    fn write(&self, data: &[u8], offset: u64, _flags: Flags, call: &Call) -> Result<()> {
        let bytes = offset..offset + data.len() as u64;
        let data = |part: &Range<u64>| &data[(part.start - offset) as usize..(part.end - offset) as usize];
        self.change(
            bytes,
            |blocks| {
                let part = self.bytes(blocks.clone());
                self.file()?.write(data(&part), part.start)?;
                self.set(blocks, ALLOCATED);
                Ok(())
            },
            |block, part| self.change_part(block, part.clone(), call, |file| file.write(data(&part), part.start)),
        )
    }

    fn flush(&self, _call: &Call) -> Result<()> {
        Ok(())
    }

    fn trim(&self, length: u64, offset: u64, _flags: Flags, call: &Call) -> Result<()> {
        self.change(
            offset..offset + length,
            |blocks| {
                self.set(blocks.clone(), TRIMMED);
                let content = self.overlay.content.read().unwrap_or_else(PoisonError::into_inner);
                let file = content.file.clone();
                drop(content);
                if let Some(file) = file {
                    let part = self.bytes(blocks);
                    // Only to save space.
                    let _ = file.punch(part.start, part.end - part.start);
                }
                Ok(())
            },
            |block, part| self.zero_part(block, part, call),
        )
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        if flags.fast {
            return Err(Error::not_supported("cow: zeroes may be no faster than a write"));
        }
        self.change(
            offset..offset + length,
            |blocks| {
                let part = self.bytes(blocks.clone());
                self.file()?.zero(part.start, part.end - part.start)?;
                self.set(blocks, ALLOCATED);
                Ok(())
            },
            |block, part| self.zero_part(block, part, call),
        )
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let (state, run) = self.run(at, end);
            let length = run.end - at;
            match state {
                NOT_ALLOCATED if self.settings.on_cache => self.fill(run.clone(), call)?,
                NOT_ALLOCATED if self.next.offered().cache != Support::None => self.next.cache(length, at, call)?,
                ALLOCATED => self.file()?.will_need(at, length),
                _ => {}
            }
            at = run.end;
        }
        Ok(())
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        let end = extents.offset() + extents.length();
        let mut at = extents.offset();
        while at < end {
            let (state, run) = self.run(at, end);
            let length = run.end - at;
            let more = match state {
                NOT_ALLOCATED if self.next.offered().extents => {
                    let mut part = Extents::new(at, length, extents.one());
                    self.next.extents(&mut part, call)?;
                    let mut from = at;
                    part.list().iter().all(|extent| {
                        let start = from;
                        from += extent.length;
                        extents.add(start, extent.length, extent.flags)
                    }) && from == run.end
                }
                TRIMMED => extents.add(at, length, HOLE | ZERO),
                _ => extents.add(at, length, 0),
            };
            if !more {
                break;
            }
            at = run.end;
        }
        Ok(())
    }

    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        if self.depth != Some(context) {
            return self.next.meta_context(context, extents, call);
        }
        let end = extents.offset() + extents.length();
        let mut at = extents.offset();
        while at < end {
            let (state, run) = self.run(at, end);
            let depth = if state == NOT_ALLOCATED { DEPTH_NEXT } else { DEPTH_OVERLAY };
            if !extents.add(at, run.end - at, depth) {
                break;
            }
            at = run.end;
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

    fn open(exports: &Arc<dyn Exports>, name: &str) -> Box<dyn Device> {
        exports.open(&Client { export_name: name.into(), ..Client::default() }).unwrap()
    }

    fn cow(script: &Arc<Script>, parameters: &[(&str, &str)]) -> Arc<dyn Exports> {
        before(Arc::new(Scripted(Arc::clone(script))), "cow", parameters).unwrap()
    }

    #[test]
    fn clients_see_a_disk_that_is_written_to_and_the_plugin_none_of_it() {
        let mut random = Random(11);
        for size in [1, 4095, 4096, 100_000] {
            for on_read in ["false", "true"] {
                let base = random.bytes(size);
                let script = Script::new(base.clone());
                let exports = cow(&script, &[("cow-block-size", "4k"), ("cow-on-read", on_read)]);
                let (one, other) = (open(&exports, ""), open(&exports, ""));
                let mut model = base.clone();
                for _ in 0..300 {
                    let range = random.range(size as u64);
                    let (offset, length) = (range.start, range.end - range.start);
                    let inside = range.start as usize..range.end as usize;
                    match random.below(5) {
                        0 => {
                            let data = random.bytes(length as usize);
                            one.write(&data, offset, Flags::default(), CALL).unwrap();
                            model[inside].copy_from_slice(&data);
                        }
                        1 => {
                            one.zero(length, offset, Flags::default(), CALL).unwrap();
                            model[inside].fill(0);
                        }
                        2 => {
                            one.trim(length, offset, Flags::default(), CALL).unwrap();
                            model[inside].fill(0);
                        }
                        3 => other.cache(length, offset, CALL).unwrap(),
                        _ => {
                            let mut buffer = vec![1; length as usize];
                            other.read(&mut buffer, offset, CALL).unwrap();
                            assert!(buffer == model[inside.clone()], "{range:?} of {size}");
                            let mut reply = Segments::default();
                            other.read_segments(&mut reply, length as usize, offset, CALL).unwrap();
                            assert!(reply.to_vec() == model[inside]);
                        }
                    }
                }
                assert!(*script.disk.lock().unwrap() == base);
                assert!(!script.log().contains("write"));
            }
        }
    }

    #[test]
    fn what_was_read_or_prefetched_is_not_asked_for_again_if_that_is_wanted() {
        let script = Script::new(vec![7; 300_000]);
        let exports = cow(&script, &[("cow-on-read", "1")]);
        let device = open(&exports, "");
        let mut buffer = [0; 10];
        device.read(&mut buffer, 65530, CALL).unwrap();
        assert_eq!(script.log(), "open:ro read:0+65536 read:65536+65536");
        device.read(&mut buffer, 100_000, CALL).unwrap();
        assert_eq!((script.log(), buffer), (String::new(), [7; 10]));
        let exports = cow(&script, &[("cow-on-cache", "1")]);
        let device = open(&exports, "");
        device.cache(1, 299_999, CALL).unwrap();
        assert_eq!(script.log(), "open:ro read:262144+37856");
        device.read(&mut buffer, 280_000, CALL).unwrap();
        assert_eq!(script.log(), "");
        device.read(&mut buffer, 0, CALL).unwrap();
        assert_eq!(script.log(), "read:0+10");
        let device = open(&cow(&script, &[]), "");
        device.cache(100_000, 0, CALL).unwrap();
        assert_eq!(script.log(), "open:ro cache:0+100000");
    }

    #[test]
    fn each_export_has_an_overlay_of_its_own_that_outlives_its_clients() {
        let script = Script::new(vec![0; 10]);
        let exports = cow(&script, &[]);
        let device = open(&exports, "a");
        device.write(b"a", 3, Flags::default(), CALL).unwrap();
        drop(device);
        let mut buffer = [9];
        open(&exports, "b").read(&mut buffer, 3, CALL).unwrap();
        assert_eq!(&buffer, b"\0");
        open(&exports, "a").read(&mut buffer, 3, CALL).unwrap();
        assert_eq!(&buffer, b"a");
    }

    #[test]
    fn a_write_whose_rest_cannot_be_read_fails_and_changes_nothing() {
        let script = Script::new(vec![5; 10_000]);
        let exports = cow(&script, &[]);
        let device = open(&exports, "");
        script.fail("read", 1);
        assert!(device.write(b"a", 3, Flags::default(), CALL).is_err());
        let mut buffer = [0; 5];
        device.read(&mut buffer, 0, CALL).unwrap();
        assert_eq!(buffer, [5; 5]);
    }

    fn map(extents: &Extents) -> Vec<(u64, u64)> {
        extents.list().iter().map(|extent| (extent.length, extent.flags)).collect()
    }

    #[test]
    fn the_maps_tell_what_is_in_the_overlay() {
        const BLOCK: u64 = 65536;
        let script = Script::new(vec![5; 6 * BLOCK as usize]);
        let exports = cow(&script, &[]);
        let device = open(&exports, "");
        device.write(b"a", BLOCK + 3, Flags::default(), CALL).unwrap();
        device.trim(2 * BLOCK, 2 * BLOCK, Flags::default(), CALL).unwrap();
        let mut extents = Extents::new(10, 6 * BLOCK - 10, false);
        device.extents(&mut extents, CALL).unwrap();
        // The scripted device says that the first byte of each answer is a hole.
        let tail = [(1, 3), (2 * BLOCK - 1, 0)];
        assert_eq!(map(&extents), [&[(1, 3), (2 * BLOCK - 11, 0), (2 * BLOCK + 1, 3)][..], &tail[1..]].concat());
        let contexts = exports.meta_contexts(&Client::default()).unwrap();
        assert_eq!(contexts.iter().map(|context| &*context.name).collect::<Vec<_>>(), [DEPTH]);
        let mut extents = Extents::new(10, 6 * BLOCK - 10, false);
        device.meta_context(0, &mut extents, CALL).unwrap();
        assert_eq!(map(&extents), [(BLOCK - 10, DEPTH_NEXT), (3 * BLOCK, DEPTH_OVERLAY), (2 * BLOCK, DEPTH_NEXT)]);
    }

    #[test]
    fn a_part_of_a_block_is_not_lost_when_another_is_written_at_the_same_time() {
        let script = Script::new(vec![0; 4096]);
        let exports = cow(&script, &[("cow-block-size", "4k")]);
        std::thread::scope(|scope| {
            for part in 0..8_u64 {
                let device = open(&exports, "");
                scope.spawn(move || {
                    for at in part * 512..(part + 1) * 512 {
                        device.write(&[part as u8 + 1], at, Flags::default(), CALL).unwrap();
                    }
                });
            }
        });
        let mut all = [0; 4096];
        open(&exports, "").read(&mut all, 0, CALL).unwrap();
        assert!(all.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at / 512 + 1));
    }
}

//! `blocksize`: turns requests of any size into those that the next device takes: aligned to `minblock`, with at most `maxdata`
//! bytes of data, or `maxlen` bytes without. Source: nbdkit filters/blocksize/blocksize.c.
//!
//! A write to a part of a block reads the block and writes it whole. Meanwhile no other write may come, or it would be undone:
//! that is what the lock is for. Those that cover whole blocks go side by side. Whoever holds it waits for nothing but the next
//! device, which knows nothing of it.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nbdcaptive_actors::device::{
    BlockSize, Blocks, Call, Capabilities, Device, Error, ErrorCode, Exports, Extents, Flags, Result, Segments,
    ThreadModel,
};
use nbdcaptive_actors::filter::{self, Filtered, Next};

use super::kit::{aligned, copy, each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "blocksize",
    summary: "let requests be of any size

        For plugins that take only requests of a certain alignment, or only small ones. A request that is too long
        is divided; of one that begins or ends within a block the rest is read and written along with it. Clients
        are told of no limits any more.

        # Examples

            nbdcaptive --filter=blocksize file disk.img minblock=4k maxdata=64k \\
                --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[
        optional("minblock", "<SIZE>", "what the next layer's requests are multiples of, a power of 2 up to 64k"),
        optional("maxdata", "<SIZE>", "the most that it reads or writes at a time, 64M unless given"),
        optional("maxlen", "<SIZE>", "the most that it trims or zeroes at a time, almost 4G unless given"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The largest `minblock`, in bytes.
const MAX_MINIMUM: u32 = 64 * 1024;

/// `maxdata` unless it is given.
const MAX_DATA: u32 = 64 << 20;

/// The filter. All in bytes; `None`: not given.
#[derive(Clone, Copy, Debug, Default)]
pub struct Blocksize {
    minimum: Option<u32>,
    data: Option<u32>,
    length: Option<u32>,
}

fn parse(key: &str, text: &str) -> std::result::Result<u32, ConfigError> {
    let size = values::size(text).map_err(ConfigError)?;
    match u32::try_from(size) {
        Ok(0) => Err(ConfigError(format!("parameter '{key}' must be non-zero if specified"))),
        Ok(size) => Ok(size),
        Err(_) => Err(ConfigError(format!("parameter '{key}' too large"))),
    }
}

impl Filter for Blocksize {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        match key {
            "minblock" => self.minimum = Some(parse(key, text)?),
            "maxdata" => self.data = Some(parse(key, text)?),
            "maxlen" => self.length = Some(parse(key, text)?),
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> std::result::Result<(), ConfigError> {
        let Some(minimum) = self.minimum else { return Ok(()) };
        let why = if !minimum.is_power_of_two() {
            "minblock must be a power of 2".to_owned()
        } else if minimum > MAX_MINIMUM {
            format!("minblock must not exceed {MAX_MINIMUM}")
        } else if self.data.is_some_and(|data| data % minimum != 0) {
            format!("maxdata must be a multiple of {minimum}")
        } else if self.length.is_some_and(|length| length % minimum != 0) {
            format!("maxlen must be a multiple of {minimum}")
        } else {
            return Ok(());
        };
        Err(ConfigError(why))
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let lock = Arc::new(RwLock::new(()));
        Ok(each(next, move |next, client| {
            let (next, limits) = Next::open(next, client)?.look(|next| self.limits(next.offered()))?;
            Ok(Filtered(Disk { next, limits, lock: Arc::clone(&lock) }))
        }))
    }
}

/// What the next device takes, in bytes. All are multiples of `block`, a power of 2.
#[derive(Clone, Copy, Debug)]
struct Limits {
    block: u64,
    data: u64,
    length: u64,
}

impl Blocksize {
    fn limits(&self, offered: &Capabilities) -> Result<Limits> {
        let sizes = offered.block_size.unwrap_or(BlockSize { minimum: 1, preferred: 512, maximum: u32::MAX });
        let block = self.minimum.unwrap_or(1).max(sizes.minimum);
        let down = |size: u32| u64::from(size - size % block);
        let data = self.data.unwrap_or(self.length.map_or(MAX_DATA, |length| length.min(MAX_DATA)));
        let (data, length) =
            (down(data.min(sizes.maximum)), self.length.map_or(u64::from(u32::MAX) + 1 - u64::from(block), down));
        if data == 0 || length == 0 {
            let why = format!("blocksize: maxdata and maxlen must not be less than the minimum block size {block}");
            return Err(Error::failed(ErrorCode::Invalid, why));
        }
        Ok(Limits { block: block.into(), data, length })
    }
}

struct Disk {
    next: Next,
    limits: Limits,
    lock: Arc<RwLock<()>>,
}

/// A piece of a request.
enum Piece {
    /// A part of one block: where it starts in the block.
    Part { start: u64 },
    /// Whole blocks.
    Whole,
}

impl Limits {
    /// Cuts a range into parts of blocks at both ends, and runs of whole blocks of at most `most` bytes between them. Each is
    /// given with its offset and its length.
    fn cut(
        self,
        length: u64,
        offset: u64,
        most: u64,
        mut each: impl FnMut(Piece, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let start = at % self.block;
            let left = end - at;
            let (piece, length) = if start > 0 || left < self.block {
                (Piece::Part { start }, left.min(self.block - start))
            } else {
                (Piece::Whole, (left - left % self.block).min(most))
            };
            each(piece, at, length)?;
            at += length;
        }
        Ok(())
    }

    fn is_one_piece(self, length: u64, offset: u64, most: u64) -> bool {
        offset.is_multiple_of(self.block) && length.is_multiple_of(self.block) && length <= most
    }
}

impl Disk {
    // There is nothing behind the lock that a panic could leave half done.
    fn alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.lock.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn beside_others(&self, call: &Call) -> Result<RwLockReadGuard<'_, ()>> {
        if call.may_block() {
            return Ok(self.lock.read().unwrap_or_else(PoisonError::into_inner));
        }
        self.lock.try_read().map_err(|_| Error::WouldBlock)
    }

    /// Refuses to do at once what takes several calls, of which the first might be done when the second would wait.
    fn check_at_once(&self, length: u64, offset: u64, most: u64, call: &Call) -> Result<()> {
        let at_once = call.may_block() || self.limits.is_one_piece(length, offset, most);
        if at_once { Ok(()) } else { Err(Error::WouldBlock) }
    }

    /// The block that `at`, `start` bytes behind its first, is in.
    fn block(&self, at: u64, start: u64, call: &Call) -> Result<Vec<u8>> {
        // At most 64 KiB.
        let mut block = vec![0; self.limits.block as usize];
        self.next.read(&mut block, at - start, call)?;
        Ok(block)
    }

    /// Changes a part of a block.
    fn change(&self, at: u64, start: u64, flags: Flags, call: &Call, change: impl FnOnce(&mut [u8])) -> Result<()> {
        let _alone = self.alone();
        let mut block = self.block(at, start, call)?;
        change(&mut block[start as usize..]);
        self.next.write(&block, at - start, flags, call)
    }

    /// Makes the calls that a change consists of; a flush at the end does for all of them, where that is how they are made
    /// durable.
    fn durably(&self, flags: Flags, call: &Call, change: impl FnOnce(Flags) -> Result<()>) -> Result<()> {
        if !flags.fua || !self.next.offered().fua.is_emulated() {
            return change(flags);
        }
        change(Flags { fua: false, ..flags })?;
        self.next.flush(call)
    }
}

impl filter::Filter for Disk {
    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn size(&self) -> Result<u64> {
        let size = self.next.bytes();
        Ok(size - size % self.limits.block)
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let next = self.next.capabilities()?;
        let preferred = next.block_size.map_or(0, |sizes| sizes.preferred).max(4096).max(self.limits.block as u32);
        Ok(Capabilities { block_size: Some(BlockSize { minimum: 1, preferred, maximum: u32::MAX }), ..next })
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.limits.cut(buffer.len() as u64, offset, self.limits.data, |piece, at, length| {
            let buffer = &mut buffer[(at - offset) as usize..][..length as usize];
            match piece {
                Piece::Whole => self.next.read(buffer, at, call),
                Piece::Part { start } => {
                    let block = self.block(at, start, call)?;
                    buffer.copy_from_slice(&block[start as usize..][..length as usize]);
                    Ok(())
                }
            }
        })
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        self.limits.cut(length as u64, offset, self.limits.data, |piece, at, length| match piece {
            Piece::Whole => self.next.read_segments(reply, length as usize, at, call),
            Piece::Part { start } => {
                let block = self.block(at, start, call)?;
                reply.space(length as usize).copy_from_slice(&block[start as usize..][..length as usize]);
                Ok(())
            }
        })
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let most = self.limits.data;
        self.check_at_once(data.len() as u64, offset, most, call)?;
        self.durably(flags, call, |flags| {
            self.limits.cut(data.len() as u64, offset, most, |piece, at, length| {
                let data = &data[(at - offset) as usize..][..length as usize];
                match piece {
                    Piece::Part { start } => {
                        self.change(at, start, flags, call, |block| block[..data.len()].copy_from_slice(data))
                    }
                    Piece::Whole => {
                        let _beside = self.beside_others(call)?;
                        self.next.write(data, at, flags, call)
                    }
                }
            })
        })
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let length = data.len() as u64;
        self.check_at_once(length, offset, self.limits.data, call)?;
        if !self.limits.is_one_piece(length, offset, self.limits.data) {
            return self.write(&data.to_vec(), offset, flags, call);
        }
        let _beside = self.beside_others(call)?;
        self.next.write_blocks(data, offset, flags, call)
    }

    /// Parts of blocks are left as they are: a trim promises nothing.
    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.check_at_once(length, offset, self.limits.length, call)?;
        self.durably(flags, call, |flags| {
            self.limits.cut(length, offset, self.limits.length, |piece, at, length| match piece {
                Piece::Part { .. } => Ok(()),
                Piece::Whole => {
                    let _beside = self.beside_others(call)?;
                    self.next.trim(length, at, flags, call)
                }
            })
        })
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let most = self.limits.length;
        if flags.fast && !self.limits.is_one_piece(length, offset, most) {
            // One of several calls could fail after others have taken their time.
            return Err(Error::not_supported("blocksize: zeroes that are several requests are not fast"));
        }
        self.check_at_once(length, offset, most, call)?;
        self.durably(flags, call, |flags| {
            self.limits.cut(length, offset, most, |piece, at, length| match piece {
                Piece::Part { start } => {
                    let write = Flags { may_trim: false, ..flags };
                    self.change(at, start, write, call, |block| block[..length as usize].fill(0))
                }
                Piece::Whole => {
                    let _beside = self.beside_others(call)?;
                    self.next.zero(length, at, flags, call)
                }
            })
        })
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        let Limits { block, data, .. } = self.limits;
        let (start, end) = (offset - offset % block, (offset + length).next_multiple_of(block));
        self.limits.cut(end - start, start, data, |_, at, length| self.next.cache(length, at, call))
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        let Limits { block, length, .. } = self.limits;
        let (start, end) = (extents.offset(), extents.offset() + extents.length());
        let (from, to) = (start - start % block, end.next_multiple_of(block));
        // Less than is asked for is fine.
        let mut map = Extents::new(from, (to - from).min(length), extents.one());
        aligned(&mut map, block, |map| self.next.extents(map, call))?;
        copy(&map, extents, from);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{device, map, memory, over, read, refused};
    use crate::plugins::testing::Random;
    use nbdcaptive_actors::device::Client;
    use std::sync::Mutex;

    /// A disk that notes what it is asked, and refuses what breaks its rules.
    #[derive(Clone)]
    struct Strict {
        inner: Arc<dyn Exports>,
        asked: Arc<Mutex<Vec<(char, u64, u64)>>>,
    }

    struct StrictDisk {
        next: Box<dyn Device>,
        asked: Arc<Mutex<Vec<(char, u64, u64)>>>,
    }

    impl filter::FilterExports for Strict {
        fn next(&self) -> &dyn Exports {
            &*self.inner
        }
        fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
            let next = self.inner.open(client)?;
            Ok(Box::new(Filtered(StrictDisk { next, asked: Arc::clone(&self.asked) })))
        }
    }

    impl StrictDisk {
        fn note(&self, what: char, length: u64, offset: u64) {
            assert!(length.is_multiple_of(512) && offset.is_multiple_of(512) && length > 0, "{what} {length} {offset}");
            assert!(length <= 4096, "{what} {length}");
            self.asked.lock().unwrap().push((what, length, offset));
        }
    }

    impl filter::Filter for StrictDisk {
        const CHANGES_DATA: bool = true;
        fn next(&self) -> &dyn Device {
            &*self.next
        }
        fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
            self.note('r', buffer.len() as u64, offset);
            self.next.read(buffer, offset, call)
        }
        fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
            self.note('w', data.len() as u64, offset);
            self.next.write(data, offset, flags, call)
        }
        fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
            self.note('t', length, offset);
            self.next.trim(length, offset, flags, call)
        }
        fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
            self.note('z', length, offset);
            self.next.zero(length, offset, flags, call)
        }
    }

    type Asked = Arc<Mutex<Vec<(char, u64, u64)>>>;

    fn strict() -> (Box<dyn Device>, Asked) {
        let asked = Asked::default();
        let inner: Arc<dyn Exports> =
            Arc::new(filter::FilteredExports(Strict { inner: memory("64k"), asked: Arc::clone(&asked) }));
        let parameters = [("minblock", "512"), ("maxdata", "2k"), ("maxlen", "4k")];
        let disk = over(inner, "blocksize", &parameters).unwrap().open(&Client::default()).unwrap();
        (disk, asked)
    }

    #[test]
    fn requests_are_cut_at_blocks_and_limits() {
        let (disk, asked) = strict();
        let take = || std::mem::take(&mut *asked.lock().unwrap());
        let flags = Flags::default();
        disk.write(&[1; 5000], 500, flags, &Call::BLOCKING).unwrap();
        let want = [
            ('r', 512, 0),
            ('w', 512, 0),
            ('w', 2048, 512),
            ('w', 2048, 2560),
            ('w', 512, 4608),
            ('r', 512, 5120),
            ('w', 512, 5120),
        ];
        assert_eq!(take(), want);
        disk.zero(5000, 600, flags, &Call::BLOCKING).unwrap();
        assert_eq!(take(), [('r', 512, 512), ('w', 512, 512), ('z', 4096, 1024), ('r', 512, 5120), ('w', 512, 5120)]);
        disk.trim(5000, 600, flags, &Call::BLOCKING).unwrap();
        assert_eq!(take(), [('t', 4096, 1024)]);
        disk.trim(10, 600, flags, &Call::BLOCKING).unwrap();
        assert_eq!(take(), []);
        disk.write(&[1; 10], 600, flags, &Call::BLOCKING).unwrap();
        assert_eq!(take(), [('r', 512, 512), ('w', 512, 512)]);
    }

    #[test]
    fn any_requests_give_the_data_of_a_plain_disk() {
        let (disk, _) = strict();
        let mut random = Random(77);
        let mut model = vec![0; 64 << 10];
        for _ in 0..500 {
            let range = random.range(64 << 10);
            let (start, length) = (range.start, range.end - range.start);
            let bytes = range.start as usize..range.end as usize;
            match random.below(3) {
                0 => {
                    let data = random.bytes(length as usize);
                    disk.write(&data, start, Flags::default(), &Call::BLOCKING).unwrap();
                    model[bytes].copy_from_slice(&data);
                }
                1 => {
                    disk.zero(length, start, Flags::default(), &Call::BLOCKING).unwrap();
                    model[bytes].fill(0);
                }
                _ => assert_eq!(read(&*disk, start, length as usize), model[bytes]),
            }
        }
        assert_eq!(read(&*disk, 0, 64 << 10), model);
    }

    #[test]
    fn parts_of_a_block_that_are_written_at_the_same_time_are_all_there() {
        let (disk, _) = strict();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let disk = &disk;
                scope.spawn(move || {
                    for at in (thread..512).step_by(4) {
                        disk.write(&[7], at, Flags::default(), &Call::BLOCKING).unwrap();
                    }
                });
            }
        });
        assert_eq!(read(&*disk, 0, 512), [7; 512]);
    }

    #[test]
    fn nothing_that_is_several_calls_is_done_at_once() {
        let (disk, asked) = strict();
        let would_block = |result| matches!(result, Err(Error::WouldBlock));
        let flags = Flags::default();
        assert!(would_block(disk.write(&[1; 10], 0, flags, &Call::AT_ONCE)));
        assert!(would_block(disk.write(&[1; 4096], 0, flags, &Call::AT_ONCE)));
        assert!(would_block(disk.zero(8192, 0, flags, &Call::AT_ONCE)));
        assert!(asked.lock().unwrap().is_empty());
        disk.write(&[1; 2048], 0, flags, &Call::AT_ONCE).unwrap();
        let fast = Flags { fast: true, ..flags };
        assert_eq!(disk.zero(8192, 0, fast, &Call::BLOCKING).unwrap_err().code(), ErrorCode::NotSupported);
    }

    #[test]
    fn sizes_are_rounded_and_maps_are_aligned() {
        let disk = device("1000", "blocksize", &[("minblock", "512")]);
        assert_eq!(disk.size().unwrap(), 512);
        assert_eq!(disk.capabilities().unwrap().block_size.unwrap().minimum, 1);
        let disk = device("256k", "blocksize", &[("minblock", "64k")]);
        disk.write(&[1], 40 << 10, Flags::default(), &Call::BLOCKING).unwrap();
        assert_eq!(map(&*disk, 0, 256 << 10), [(64 << 10, 0)], "a map may be shorter than what is asked for");
        assert_eq!(map(&*disk, 64 << 10, 192 << 10), [(192 << 10, 3)]);
        assert_eq!(map(&*disk, 1000, 10), [(10, 0)]);
    }

    #[test]
    fn sizes_that_do_not_go_together_are_refused() {
        let why = |parameters: &[(&str, &str)]| refused("blocksize", parameters);
        assert_eq!(why(&[("minblock", "0")]), "parameter 'minblock' must be non-zero if specified");
        assert_eq!(why(&[("maxlen", "4G")]), "parameter 'maxlen' too large");
        assert_eq!(why(&[("minblock", "1000")]), "minblock must be a power of 2");
        assert_eq!(why(&[("minblock", "128k")]), "minblock must not exceed 65536");
        assert_eq!(why(&[("minblock", "512"), ("maxdata", "1000")]), "maxdata must be a multiple of 512");
        assert_eq!(why(&[("minblock", "512"), ("maxlen", "1000")]), "maxlen must be a multiple of 512");
    }
}

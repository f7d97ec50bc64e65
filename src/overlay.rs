//! What the filters `cow`, `cache` and `gzip` keep data in: a file without a name, of which nothing stays behind whatever
//! dies; and locks for the blocks in it.
//! Source: nbdkit filters/cow/blk.c, filters/cache/blk.c, filters/gzip/gzip.c; open(2) O_TMPFILE, fallocate(2).

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nbdcaptive_actors::device::{Call, Device, Error, Result, Segments};
use rustix::fs::{Advice, FallocateFlags};

use crate::layer::{ConfigError, Value};
use crate::values;

/// Where large temporary files go unless `TMPDIR` says otherwise: /tmp is often memory. Source: nbdkit's LARGE_TMPDIR.
const DIRECTORY: &str = "/var/tmp";

/// The directory of temporary files, which can hold some. Absolute, because a server in the background leaves its own.
/// Errors: it cannot be written, as a line.
pub fn directory() -> std::result::Result<PathBuf, ConfigError> {
    let directory = std::env::var_os("TMPDIR").filter(|path| !path.is_empty()).map_or(DIRECTORY.into(), PathBuf::from);
    let attempt = || {
        let directory = std::path::absolute(&directory)?;
        tempfile::tempfile_in(&directory)?;
        Ok(directory)
    };
    attempt().map_err(|error: io::Error| {
        ConfigError(format!("cannot make a temporary file in {}: {error}", directory.display()))
    })
}

/// A temporary file. Behind its end, and where nothing was written, it is zeroes.
#[derive(Debug)]
pub struct Temporary(File);

impl Temporary {
    /// A new one in `directory`.
    pub fn new(directory: &Path) -> Result<Temporary> {
        let file = tempfile::tempfile_in(directory);
        file.map(Temporary)
            .map_err(|error| Error::system(format_args!("temporary file in {}", directory.display()), error))
    }

    /// Fills `buffer`.
    pub fn read(&self, mut buffer: &mut [u8], mut offset: u64) -> Result<()> {
        while !buffer.is_empty() {
            match self.0.read_at(buffer, offset) {
                Ok(0) => {
                    buffer.fill(0);
                    break;
                }
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::system("pread: temporary file", error)),
            }
        }
        Ok(())
    }

    /// Writes all of `data`. A disk that is full is an error of this call.
    pub fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.0.write_all_at(data, offset).map_err(|error| Error::system("pwrite: temporary file", error))
    }

    /// Makes a range zeroes that take no space. Errors also where the file system cannot.
    pub fn punch(&self, offset: u64, length: u64) -> Result<()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.0, mode, offset, length))
            .map_err(|error| Error::system("fallocate: temporary file", error))
    }

    /// Makes a range zeroes in one way or another.
    pub fn zero(&self, offset: u64, length: u64) -> Result<()> {
        static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];
        if self.punch(offset, length).is_ok() {
            return Ok(());
        }
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(ZEROES.len() as u64);
            self.write(&ZEROES[..piece as usize], offset + done)?;
            done += piece;
        }
        Ok(())
    }

    /// The range will be read soon.
    pub fn will_need(&self, offset: u64, length: u64) {
        if let Some(length) = NonZeroU64::new(length) {
            // A hint: what becomes of it does not matter.
            let _ = rustix::fs::fadvise(&self.0, offset, Some(length), Advice::WillNeed);
        }
    }
}

/// Where the data of a read goes that is put together from several places.
pub enum Sink<'a> {
    /// What is left of a buffer.
    Buffer(&'a mut [u8]),
    /// A reply, to which data of the next device can be passed on without a copy.
    Reply(&'a mut Segments),
}

impl Sink<'_> {
    /// The next `length` bytes, to be filled. Never more in all than the read asks for.
    pub fn space(&mut self, length: usize) -> &mut [u8] {
        match self {
            Sink::Buffer(left) => {
                let (head, tail) = std::mem::take(left).split_at_mut(length);
                *left = tail;
                head
            }
            Sink::Reply(reply) => reply.space(length),
        }
    }

    /// The next `length` bytes are zeroes.
    pub fn zeroes(&mut self, length: usize) {
        match self {
            Sink::Buffer(_) => self.space(length).fill(0),
            Sink::Reply(reply) => reply.zeroes(length),
        }
    }

    /// The next `length` bytes are those of a device.
    pub fn read(&mut self, device: &dyn Device, length: usize, offset: u64, call: &Call) -> Result<()> {
        match self {
            Sink::Buffer(_) => device.read(self.space(length), offset, call),
            Sink::Reply(reply) => device.read_segments(reply, length, offset, call),
        }
    }
}

const STRIPES: u64 = 64;

/// Locks for blocks, fewer than there are blocks. Who holds one may call the next device, but takes no other.
#[derive(Debug)]
pub struct Stripes([Mutex<()>; STRIPES as usize]);

impl Default for Stripes {
    fn default() -> Stripes {
        Stripes(std::array::from_fn(|_| Mutex::default()))
    }
}

impl Stripes {
    /// Waits until nobody else has any of these blocks. Always in the same order, so that no two wait for each other.
    pub fn lock(&self, blocks: Range<u64>) -> Vec<MutexGuard<'_, ()>> {
        let chosen = |stripe: u64| {
            let distance = (stripe + STRIPES - blocks.start % STRIPES) % STRIPES;
            blocks.start + distance < blocks.end
        };
        (0..STRIPES).filter(|stripe| chosen(*stripe)).map(|stripe| self.of(stripe)).collect()
    }

    /// As [`Stripes::lock`] for one block.
    pub fn of(&self, block: u64) -> MutexGuard<'_, ()> {
        self.0[(block % STRIPES) as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether what was read is kept (`cow-on-read`, `cache-on-read`).
#[derive(Clone, Debug, Default)]
pub enum OnRead {
    /// `false`.
    #[default]
    No,
    /// `true`.
    Yes,
    /// As long as there is something of this name.
    While(PathBuf),
}

impl OnRead {
    /// From a parameter's value.
    pub fn parse(key: &str, value: Value<'_>) -> std::result::Result<OnRead, ConfigError> {
        if value.bytes().starts_with(b"/") {
            return Ok(OnRead::While(value.path().to_owned()));
        }
        let yes = values::boolean(value.text(key)?).map_err(ConfigError)?;
        Ok(if yes { OnRead::Yes } else { OnRead::No })
    }

    /// Whether it is so now.
    pub fn is_on(&self) -> bool {
        match self {
            OnRead::No => false,
            OnRead::Yes => true,
            OnRead::While(path) => path.exists(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_written_is_zeroes() {
        let file = Temporary::new(&std::env::temp_dir()).unwrap();
        file.write(b"abc", 10).unwrap();
        let mut buffer = [1; 8];
        file.read(&mut buffer, 8).unwrap();
        assert_eq!(&buffer, b"\0\0abc\0\0\0");
        file.zero(11, 1).unwrap();
        file.read(&mut buffer, 8).unwrap();
        assert_eq!(&buffer, b"\0\0a\0c\0\0\0");
        file.read(&mut buffer, 1 << 50).unwrap();
        assert_eq!(buffer, [0; 8]);
    }

    #[test]
    fn a_range_of_blocks_takes_each_of_its_locks_once() {
        let stripes = Stripes::default();
        for (blocks, count) in [(5..6, 1), (62..67, 5), (0..64, 64), (3..1000, 64), (63..127, 64), (100..163, 63)] {
            assert_eq!(stripes.lock(blocks.clone()).len(), count, "{blocks:?}");
        }
    }
}

//! What `gzip` and `bzip2` share: the next device is unpacked into a temporary file when the first client comes, and that is
//! served read-only. Its size is not known before all is unpacked.
//!
//! All members of the file are unpacked, as gzip(1) and bzip2(1) do; nbdkit stops after the first. What follows them and is no
//! member, such as the zeroes that fill a block device, is passed over.

use std::io::{self, BufRead, BufReader, Read};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nbdcaptive_actors::device::{Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Result, Support};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports, Next};

use super::next::{Stream, look_at_start};
use crate::layer::{ConfigError, Lifetime};
use crate::overlay::{self, Temporary};

/// How a file is packed: as members, one after the other, which end by themselves.
pub trait Format: Send + Sync + 'static {
    /// The filter, which is called after it.
    const NAME: &'static str;
    /// What every member begins with.
    const MAGIC: &'static [u8];
    /// What unpacks one.
    type Member<R: BufRead>: Read;

    /// Unpacks the member that comes next.
    fn member<R: BufRead>(input: R) -> Self::Member<R>;

    /// What follows the member, once it was read to its end.
    fn rest<R: BufRead>(member: Self::Member<R>) -> R;
}

/// What is read of the next device at once, in bytes: generous, because some of them are far away.
const INPUT: usize = 4 << 20;
/// What is written at once, or left out where it is zeroes, in bytes.
const OUTPUT: usize = 64 << 10;
/// So many exports stay unpacked that nobody uses.
const IDLE: usize = 8;

/// Opens what is packed as `F`. The default export is looked at before the server starts.
pub fn exports<F: Format>(
    next: Arc<dyn Exports>,
    lifetime: &mut Lifetime,
) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
    look_at_start(&next, lifetime, |next, _| begins_well::<F>(next));
    let directory = overlay::directory()?;
    Ok(Arc::new(FilteredExports(Files::<F> { next, directory, slots: Mutex::default(), format: PhantomData })))
}

struct Files<F> {
    next: Arc<dyn Exports>,
    directory: PathBuf,
    /// By export name, the one that was used last at the end.
    slots: Mutex<Vec<(Vec<u8>, Arc<Slot>)>>,
    format: PhantomData<F>,
}

/// One export. Locked while it is unpacked, so that others wait for that.
type Slot = Mutex<Option<Arc<Unpacked>>>;

struct Unpacked {
    file: Temporary,
    size: u64,
    /// The next device's size when it was unpacked.
    compressed: u64,
}

impl<F> Files<F> {
    fn slot(&self, export: &[u8]) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let known = slots.iter().position(|(name, _)| name == export);
        let slot = match known {
            Some(index) => slots.remove(index),
            None => (export.to_vec(), Arc::default()),
        };
        let is_idle = |slot: &Arc<Slot>| {
            let content = slot.try_lock();
            content.is_ok_and(|content| content.as_ref().is_none_or(|unpacked| Arc::strong_count(unpacked) == 1))
        };
        // Any client can ask for any name.
        let idle = slots.iter().filter(|(_, slot)| is_idle(slot)).count();
        if idle >= IDLE
            && let Some(oldest) = slots.iter().position(|(_, slot)| is_idle(slot))
        {
            slots.remove(oldest);
        }
        slots.push(slot.clone());
        slot.1
    }
}

impl<F: Format> FilterExports for Files<F> {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = Next::open(&*self.next, &Client { read_only: true, ..client.clone() })?;
        let slot = self.slot(&client.export_name);
        let (next, unpacked) = next.look(|next| {
            let compressed = next.bytes();
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            let unpacked = match &*slot {
                Some(unpacked) => Arc::clone(unpacked),
                None => {
                    let unpacked = Arc::new(unpack::<F>(next, compressed, &self.directory)?);
                    Arc::clone(slot.insert(unpacked))
                }
            };
            if unpacked.compressed != compressed {
                let name = F::NAME;
                let why = format!(
                    "{name}: plugin size changed unexpectedly: you must restart the server so the {name} filter can \
                     uncompress the data again"
                );
                return Err(Error::failed(ErrorCode::Io, why));
            }
            Ok(unpacked)
        })?;
        Ok(Box::new(Filtered(File { next, unpacked })))
    }

    fn description(&self, client: &Client) -> Option<String> {
        let base = self.next.description(client)?;
        Some(format!("expansion of {}-compressed image: {base}", F::NAME))
    }
}

/// A failure to unpack.
fn failed<F: Format>(input: Stream<'_>, what: &str, error: io::Error) -> Error {
    input.error(&format!("{}: {what}", F::NAME), error)
}

/// Unpacks the beginning of a device, which takes no time. Errors: it is no such file.
fn begins_well<F: Format>(device: &Next) -> Result<()> {
    let mut input = BufReader::with_capacity(OUTPUT, Stream::new(device, 0..device.bytes()));
    let begun = F::member(&mut input).read(&mut vec![0; OUTPUT]);
    begun.map(drop).map_err(|error| failed::<F>(input.into_inner(), "inflate", error))
}

/// Unpacks all of a device. What was written is gone again if that fails.
fn unpack<F: Format>(device: &dyn Device, compressed: u64, directory: &Path) -> Result<Unpacked> {
    let file = Temporary::new(directory)?;
    let mut input = BufReader::with_capacity(INPUT, Stream::new(device, 0..compressed));
    let mut buffer = vec![0; OUTPUT];
    let mut size = 0;
    loop {
        let mut member = F::member(input);
        loop {
            let length = match fill(&mut member, &mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) => return Err(failed::<F>(F::rest(member).into_inner(), "inflate", error)),
            };
            if buffer[..length].iter().any(|byte| *byte != 0) {
                file.write(&buffer[..length], size)?;
            }
            size += length as u64;
        }
        input = F::rest(member);
        match input.fill_buf() {
            Ok(rest) if rest.starts_with(F::MAGIC) => {}
            Ok(_) => return Ok(Unpacked { file, size, compressed }),
            Err(error) => return Err(failed::<F>(input.into_inner(), "read", error)),
        }
    }
}

/// Reads until the buffer is full or there is no more.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match from.read(&mut buffer[length..])? {
            0 => break,
            count => length += count,
        }
    }
    Ok(length)
}

/// One client's device.
struct File {
    /// Not read any more, but a client's for as long as it is there.
    next: Next,
    unpacked: Arc<Unpacked>,
}

impl filter::Filter for File {
    const CHANGES_DATA: bool = true;

    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn size(&self) -> Result<u64> {
        Ok(self.unpacked.size)
    }

    fn capabilities(&self) -> Result<Capabilities> {
        Ok(capabilities(self.next.capabilities()?))
    }

    fn answers_at_once(&self) -> bool {
        false
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _call: &Call) -> Result<()> {
        self.unpacked.file.read(buffer, offset)
    }
}

/// What can be done with what is unpacked of a device that can do `packed`: read it, the same for every client.
pub(super) fn capabilities(packed: Capabilities) -> Capabilities {
    Capabilities { write: false, multi_conn: true, extents: false, cache: Support::Emulate, block_size: None, ..packed }
}

//! `checkwrite`: writes are compared with what is there already, and fail where they differ. For testing programs that copy.
//! The plugin is opened read-only. Source: nbdkit filters/checkwrite/checkwrite.c, nbdkit-checkwrite-filter.pod.

use std::sync::Arc;

use nbdcaptive_actors::device::{
    self, Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Extents, Flags, Support, ThreadModel, ZERO,
};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports, Next};

use crate::layer::{About, ConfigError, Filter, Lifetime};

/// See the module.
pub static ABOUT: About = About {
    name: "checkwrite",
    summary: "check that what is written is what is there already

        A write that would change something fails with EIO; one that writes what is there already succeeds. So a
        program that copies is tested by letting it copy a disk onto itself, or onto one that is the same. The
        plugin need not be writable.

        # Examples

            nbdcaptive --filter=checkwrite file disk.img \\
                --run 'nbdcopy disk.img \"$uri\"'
        ",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// How much is read at a time to be compared, in bytes.
const PIECE: usize = 1 << 20;

/// The filter.
#[derive(Debug)]
pub struct CheckWrite;

impl Filter for CheckWrite {
    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Checks(next))))
    }
}

struct Checks(Arc<dyn Exports>);

impl FilterExports for Checks {
    fn next(&self) -> &dyn Exports {
        &*self.0
    }
    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        Ok(Box::new(Filtered(Check(Next::open(&*self.0, &Client { read_only: true, ..client.clone() })?))))
    }
}

struct Check(Next);

impl Check {
    /// Compares what is at `offset` with `data`, or with so many zeroes.
    fn compare(&self, length: u64, offset: u64, data: Option<&[u8]>, call: &Call) -> device::Result<()> {
        let mut buffer = vec![0; PIECE.min(usize::try_from(length).unwrap_or(PIECE))];
        let mut done = 0;
        while done < length {
            let count = buffer.len().min(usize::try_from(length - done).unwrap_or(PIECE));
            let there = &mut buffer[..count];
            self.0.read(there, offset + done, call)?;
            let same = match data {
                Some(data) => *there == data[done as usize..done as usize + count],
                None => there.iter().all(|byte| *byte == 0),
            };
            if !same {
                return Err(Error::failed(ErrorCode::Io, "data written does not match expected"));
            }
            done += count as u64;
        }
        Ok(())
    }

    fn expect_zeroes(&self, length: u64, offset: u64, fast: bool, call: &Call) -> device::Result<()> {
        if !call.may_block() {
            return Err(Error::WouldBlock);
        }
        let compare = |length, offset| {
            if fast {
                return Err(Error::not_supported("the data has to be read"));
            }
            self.compare(length, offset, None, call)
        };
        if !self.0.offered().extents {
            return compare(length, offset);
        }
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let mut extents = Extents::new(at, end - at, false);
            self.0.extents(&mut extents, call)?;
            if extents.list().is_empty() {
                return Err(Error::failed(ErrorCode::Io, "the device described no extent"));
            }
            for extent in extents.list() {
                if extent.flags & ZERO == 0 {
                    compare(extent.length, at)?;
                }
                at += extent.length;
            }
        }
        Ok(())
    }
}

impl filter::Filter for Check {
    fn next(&self) -> &dyn Device {
        &self.0
    }
    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities {
            write: true,
            flush: true,
            trim: true,
            zero: Support::Native,
            fast_zero: true,
            fua: Support::Native,
            multi_conn: true,
            takes_blocks: false,
            ..self.0.capabilities()?
        })
    }
    fn write(&self, data: &[u8], offset: u64, _flags: Flags, call: &Call) -> device::Result<()> {
        self.compare(data.len() as u64, offset, Some(data), call)
    }
    fn flush(&self, _call: &Call) -> device::Result<()> {
        Ok(())
    }
    fn trim(&self, length: u64, offset: u64, _flags: Flags, call: &Call) -> device::Result<()> {
        self.expect_zeroes(length, offset, false, call)
    }
    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        self.expect_zeroes(length, offset, flags.fast, call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::testing::ready;

    #[test]
    fn takes_only_what_is_there() {
        let next = ready("memory", &[("size", "4M".as_ref())]).expect("it is a size");
        let below = next.open(&Client::default()).unwrap();
        let (none, call) = (Flags::default(), &Call::BLOCKING);
        below.write(&[7; 5000], 1 << 20, none, call).unwrap();
        let exports = Box::new(CheckWrite).ready(next, &mut Lifetime::default()).expect("it has nothing to refuse");
        let device = exports.open(&Client::default()).unwrap();
        let is_io = |result: device::Result<()>| matches!(result, Err(Error::Failed { code: ErrorCode::Io, .. }));
        device.write(&[7; 5000], 1 << 20, none, call).unwrap();
        device.write(&[0; 10], 0, none, call).unwrap();
        assert!(is_io(device.write(&[7; 5001], 1 << 20, none, call)));
        device.trim(1 << 20, 0, none, call).unwrap();
        device.zero((3 << 20) - 5000, (1 << 20) + 5000, none, call).unwrap();
        assert!(is_io(device.trim(4 << 20, 0, none, call)));
        assert!(is_io(device.zero(1, (1 << 20) + 4999, none, call)));
        let fast = Flags { fast: true, ..none };
        device.zero(1 << 19, 0, fast, call).unwrap();
        let slow = device.zero(1 << 21, 0, fast, call);
        assert!(matches!(slow, Err(Error::Failed { code: ErrorCode::NotSupported, .. })));
        let mut buffer = [0; 5000];
        below.read(&mut buffer, 1 << 20, call).unwrap();
        assert_eq!(buffer, [7; 5000], "nothing was written");
    }
}

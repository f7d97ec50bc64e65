//! `protect`: parts of the disk cannot be changed. A write there is fine only if it writes what is there already.
//! Source: nbdkit filters/protect/protect.c.

use std::sync::Arc;

use nbdcaptive_actors::connection::Connection;
use nbdcaptive_actors::device::{Blocks, Call, Device, Error, ErrorCode, Exports, Flags, Result, ThreadModel};
use nbdcaptive_actors::filter::{self, Filtered, Next};

use super::kit::{each, is_zero, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Flag, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "protect",
    summary: "protect parts of the disk from being changed

        A write to these bytes succeeds if it writes what is there already, and fails with EPERM otherwise. Either
        end may be left out. With `~` the range is what may be changed, and the rest is protected.

        # Examples

            nbdcaptive --filter=protect file disk.img protect=0-511 \\
                --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[optional(
        "protect",
        "[~]<START>-<END>",
        "the bytes from START to END, with ~ all others; may be given again",
    )],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// How much is compared at a time, in bytes.
const PIECE: usize = 64 * 1024;

/// The last byte that a disk may have.
const LAST: u64 = i64::MAX as u64;

/// Bytes that cannot be changed, both ends included.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Range {
    start: u64,
    end: u64,
    /// As it was written.
    text: String,
}

/// The filter.
#[derive(Debug, Default)]
pub struct Protect {
    ranges: Vec<Range>,
    /// `-D protect.write=1`: says what is looked at before each change.
    debug_write: i32,
}

impl Protect {
    fn add(&mut self, text: &str) -> std::result::Result<(), ConfigError> {
        let (others, range) = text.strip_prefix('~').map_or((false, text), |range| (true, range));
        let Some((start, end)) = range.split_once('-') else {
            return Err(ConfigError(format!("cannot parse range, missing '-': {text}")));
        };
        let number = |text, default| match text {
            "" => Ok(default),
            text => values::u64("range", text).map_err(ConfigError),
        };
        let (start, end) = (number(start, 0)?, number(end, LAST)?);
        if end < start {
            return Err(ConfigError(format!("invalid range, end < start: {text}")));
        }
        let mut add = |start, end| self.ranges.push(Range { start, end, text: text.to_owned() });
        if !others {
            add(start, end);
            return Ok(());
        }
        if let Some(end) = start.checked_sub(1) {
            add(0, end);
        }
        if end < LAST {
            add(end + 1, LAST);
        }
        Ok(())
    }

    /// In order, and none touching another.
    fn joined(mut self) -> Vec<Range> {
        self.ranges.sort_by_key(|range| range.start);
        let mut joined: Vec<Range> = Vec::new();
        for range in self.ranges {
            match joined.last_mut() {
                Some(last) if last.end >= range.start.saturating_sub(1) => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        joined
    }
}

impl Filter for Protect {
    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        vec![("write", &mut self.debug_write)]
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "protect" => self.add(value.text(key)?),
            _ => Err(unknown(key)),
        }
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let debug = self.debug_write != 0;
        let ranges: Arc<[Range]> = self.joined().into();
        Ok(each(next, move |next, client| {
            let debug = debug.then(|| client.connection.clone());
            Ok(Filtered(Disk { next: Next::open(next, client)?, ranges: Arc::clone(&ranges), debug }))
        }))
    }
}

struct Disk {
    next: Next,
    ranges: Arc<[Range]>,
    /// Where to say what is looked at, if that is wanted.
    debug: Option<Connection>,
}

impl Disk {
    /// Looks whether a change leaves what is protected as it is. `same` says whether the bytes that are there, at this distance
    /// from `offset`, are those that are to be there.
    fn check(&self, length: u64, offset: u64, call: &Call, same: impl Fn(&[u8], u64) -> bool) -> Result<()> {
        let last = offset + (length - 1);
        if !self.touches(length, offset) {
            return Ok(());
        }
        let first = self.ranges.partition_point(|range| range.end < offset);
        for range in self.ranges[first..].iter().take_while(|range| range.start <= last) {
            let (mut at, end) = (range.start.max(offset), range.end.min(last) + 1);
            if let Some(debug) = &self.debug {
                let length = end - at;
                debug.debug(format_args!("protect: checking protected region offset {at} length {length}"));
            }
            let mut there = vec![0; (end - at).min(PIECE as u64) as usize];
            while at < end {
                let there = &mut there[..(end - at).min(PIECE as u64) as usize];
                self.next.read(there, at, call)?;
                if !same(there, at - offset) {
                    let why = format!("protect filter prevented write to protected range {}", range.text);
                    return Err(Error::failed(ErrorCode::NotPermitted, why));
                }
                at += there.len() as u64;
            }
        }
        Ok(())
    }

    fn check_zero(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        self.check(length, offset, call, |there, _| is_zero(there))
    }

    fn touches(&self, length: u64, offset: u64) -> bool {
        let first = self.ranges.partition_point(|range| range.end < offset);
        let touches = self.ranges.get(first).is_some_and(|range| range.start < offset + length);
        if let (Some(debug), false) = (&self.debug, touches) {
            debug.debug(format_args!("protect: skipping unprotected region offset {offset} length {length}"));
        }
        touches
    }
}

impl filter::Filter for Disk {
    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        let same = |there: &[u8], from: u64| data[from as usize..][..there.len()] == *there;
        self.check(data.len() as u64, offset, call, same)?;
        self.next.write(data, offset, flags, call)
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        if self.touches(data.len() as u64, offset) {
            return self.write(&data.to_vec(), offset, flags, call);
        }
        self.next.write_blocks(data, offset, flags, call)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.check_zero(length, offset, call)?;
        self.next.trim(length, offset, flags, call)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.check_zero(length, offset, call)?;
        self.next.zero(length, offset, flags, call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{device, memory, over, refused};
    use nbdcaptive_actors::device::Client;

    fn joined(texts: &[&str]) -> Vec<(u64, u64)> {
        let mut protect = Protect::default();
        texts.iter().for_each(|text| protect.add(text).unwrap());
        protect.joined().iter().map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn ranges_are_joined() {
        assert_eq!(joined(&["0-1023"]), [(0, 1023)]);
        assert_eq!(joined(&["-10", "20-"]), [(0, 10), (20, LAST)]);
        assert_eq!(joined(&["~10-20"]), [(0, 9), (21, LAST)]);
        assert_eq!(joined(&["~0-20"]), [(21, LAST)]);
        assert_eq!(joined(&["~-"]), []);
        assert_eq!(joined(&["30-40", "10-19", "20-25", "0x1f-35"]), [(10, 25), (30, 40)]);
        assert_eq!(joined(&["0-100", "10-20"]), [(0, 100)]);
    }

    #[test]
    fn only_what_changes_something_is_refused() {
        let disk = device("1M", "protect", &[("protect", "1000-1999")]);
        let write = |data: &[u8], offset| {
            disk.write(data, offset, Flags::default(), &Call::BLOCKING).map_err(|error| error.to_string())
        };
        assert_eq!(write(&[1; 1000], 0), Ok(()));
        assert_eq!(write(&[1; 1000], 2000), Ok(()));
        assert_eq!(write(&[0; 10], 1500), Ok(()), "there are zeroes already");
        let no = Err("protect filter prevented write to protected range 1000-1999".to_owned());
        assert_eq!(write(&[1; 1], 1000), no);
        assert_eq!(write(&[1; 1], 1999), no);
        assert_eq!(write(&[1; 4096], 0), no);
        disk.trim(1 << 20, 0, Flags::default(), &Call::BLOCKING).unwrap();
        assert_eq!(write(&[1; 1], 2000), Ok(()));
    }

    #[test]
    fn what_is_protected_stays_also_against_zeroes() {
        let plain = memory("1M");
        let disk = over(Arc::clone(&plain), "protect", &[("protect", "600k-700k")]);
        assert!(disk.is_err(), "numbers have no suffixes");
        let disk = over(Arc::clone(&plain), "protect", &[("protect", "600000-700000")]).unwrap();
        let (plain, disk) = (plain.open(&Client::default()).unwrap(), disk.open(&Client::default()).unwrap());
        plain.write(&[1], 699_999, Flags::default(), &Call::BLOCKING).unwrap();
        let code = |result: Result<()>| result.map_err(|error| error.code());
        assert_eq!(code(disk.zero(1 << 20, 0, Flags::default(), &Call::BLOCKING)), Err(ErrorCode::NotPermitted));
        assert_eq!(code(disk.trim(1, 699_999, Flags::default(), &Call::BLOCKING)), Err(ErrorCode::NotPermitted));
        assert_eq!(code(disk.zero(99_999, 600_000, Flags::default(), &Call::BLOCKING)), Ok(()));
    }

    #[test]
    fn what_is_no_range_is_refused() {
        let why = |text| refused("protect", &[("protect", text)]);
        assert_eq!(why("10"), "cannot parse range, missing '-': 10");
        assert_eq!(why("20-10"), "invalid range, end < start: 20-10");
        assert_eq!(why("~x-10"), "range: empty string where we expected a number");
    }
}

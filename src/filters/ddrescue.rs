//! `ddrescue`: only what GNU ddrescue's map file calls rescued can be read; the rest fails as it did on the broken disk.
//!
//! The map is lines of a start, a length and a status, of which `+` is rescued, and a status line before them. nbdkit fails
//! also reads across the border of two rescued ranges; here they are one.
//! Source: nbdkit filters/ddrescue/ddrescue.c; GNU ddrescue manual, "Mapfile structure".

use std::io::{BufRead, BufReader};
use std::sync::Arc;

use nbdcaptive_actors::device::{
    Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Result, Segments, Support, ThreadModel,
};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports};

use super::kit::unknown;
use crate::layer::{About, ConfigError, Filter, Lifetime, Parameter, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "ddrescue",
    summary: "let reads fail that are not in a map of ddrescue

        For an image that GNU ddrescue has made of a broken disk: what could not be rescued cannot be read here
        either, instead of reading as zeroes. It is served read-only.

        # Examples

            nbdcaptive --filter=ddrescue file disk.img \\
                ddrescue-mapfile=disk.map \\
                --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[Parameter {
        key: "ddrescue-mapfile",
        value: "<FILENAME>",
        help: "the map; without it all reads fail",
        required: false,
    }],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug, Default)]
pub struct Ddrescue {
    /// Start and end of what is rescued, in bytes.
    ranges: Vec<(u64, u64)>,
}

impl Filter for Ddrescue {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        if key != "ddrescue-mapfile" {
            return Err(unknown(key));
        }
        let name = value.path().display();
        let file = std::fs::File::open(value.path())
            .map_err(|error| ConfigError(format!("{name}: ddrescue: fopen: {error}")))?;
        parse(BufReader::new(file), &mut self.ranges).map_err(|why| ConfigError(format!("{name}: {why}")))
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Maps { next, map: joined(self.ranges).into() })))
    }
}

/// Adds the rescued ranges of a map. Lines that are none are passed over, as nbdkit does.
fn parse(mut map: impl BufRead, ranges: &mut Vec<(u64, u64)>) -> std::result::Result<(), String> {
    let mut status_seen = false;
    let mut line = Vec::new();
    loop {
        line.clear();
        // No line of a map is long; what is longer is no map.
        let read = std::io::Read::take(&mut map, 64 * 1024).read_until(b'\n', &mut line);
        if read.map_err(|error| error.to_string())? == 0 {
            return Ok(());
        }
        let Ok(text) = std::str::from_utf8(&line) else { return Err("not a map of ddrescue".to_owned()) };
        let text = text.trim_end_matches('\n');
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        if !status_seen {
            // Where ddrescue was when it stopped.
            status_seen = true;
            continue;
        }
        let mut words = text.split_ascii_whitespace();
        let (Some(start), Some(length), Some(status)) = (words.next(), words.next(), words.next()) else { continue };
        if start.starts_with('-') {
            return Err("block offset must not be negative".to_owned());
        }
        if length.starts_with('-') {
            return Err("block length must not be negative".to_owned());
        }
        let (Ok(start), Ok(length)) = (values::u64("offset", start), values::u64("length", length)) else { continue };
        if status.starts_with('+') {
            ranges.push((start, start.saturating_add(length)));
        }
    }
}

/// In order, and none touches another.
fn joined(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match joined.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    joined
}

struct Maps {
    next: Arc<dyn Exports>,
    map: Arc<[(u64, u64)]>,
}

impl FilterExports for Maps {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = self.next.open(&Client { read_only: true, ..client.clone() })?;
        Ok(Box::new(Filtered(Map { next, map: Arc::clone(&self.map) })))
    }
}

struct Map {
    next: Box<dyn Device>,
    map: Arc<[(u64, u64)]>,
}

impl Map {
    fn check(&self, length: usize, offset: u64) -> Result<()> {
        let end = offset + length as u64;
        let after = self.map.partition_point(|(start, _)| *start <= offset);
        if after > 0 && end <= self.map[after - 1].1 {
            return Ok(());
        }
        Err(Error::failed(ErrorCode::Io, format!("ddrescue: {length} bytes at {offset} were not all rescued")))
    }
}

impl filter::Filter for Map {
    fn next(&self) -> &dyn Device {
        &*self.next
    }

    fn capabilities(&self) -> Result<Capabilities> {
        Ok(Capabilities { write: false, cache: Support::None, ..self.next.capabilities()? })
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.check(buffer.len(), offset)?;
        self.next.read(buffer, offset, call)
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        self.check(length, offset)?;
        self.next.read_segments(reply, length, offset, call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_lines_of_start_length_and_status() {
        let map = b"# Mapfile. Created by GNU ddrescue\n# comment\n0x00020000     +               1\n\
            0x00000000  0x00010000  +\n0x00010000\t0x100\t-\n65792 512 +\n66304 512 + 1 2\nnonsense\n\
            0x00030000  0x00010000  ?\n010 8 +\n";
        let mut ranges = Vec::new();
        parse(&map[..], &mut ranges).unwrap();
        assert_eq!(joined(ranges), [(0, 0x10000), (65792, 66816)]);
    }

    #[test]
    fn negative_numbers_are_refused() {
        for (line, why) in
            [("-1 5 +", "block offset must not be negative"), ("1 -5 +", "block length must not be negative")]
        {
            assert_eq!(parse(format!("0 +\n{line}\n").as_bytes(), &mut Vec::new()), Err(why.to_owned()));
        }
    }
}

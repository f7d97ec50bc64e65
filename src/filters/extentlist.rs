//! `extentlist`: a map of holes from a file, over a plugin that knows none.
//! Source: nbdkit filters/extentlist/extentlist.c, nbdkit-extentlist-filter.pod.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use nbdcaptive_actors::connection::Connection;
use nbdcaptive_actors::device::{self, Call, Capabilities, Client, Device, Exports, Extents, HOLE, ThreadModel, ZERO};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports};

use super::kit::unknown;
use crate::layer::{About, ConfigError, Filter, Flag, Lifetime, Parameter, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "extentlist",
    summary: "place a list of extents over a plugin

        Clients are told of the holes that the list says, and of no others. What is in none of its lines is a hole
        that reads as zeroes. The lines need not be in order; lengths and offsets are sizes, and what an extent is
        like is `hole`, `zero`, both, or nothing for data.

        # Examples

            printf '0 64k\\n1M 64k hole,zero\\n' > list
            nbdcaptive --filter=extentlist memory 2M extentlist=list \\
                --run 'nbdinfo --map \"$uri\"'
        ",
    parameters: &[Parameter {
        key: "extentlist",
        value: "<FILENAME>",
        help: "the list: lines of OFFSET LENGTH [hole,zero]",
        required: true,
    }],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug, Default)]
pub struct ExtentList {
    path: Option<PathBuf>,
    /// `-D extentlist.lookup=1`: says what is found in the list.
    debug_lookup: i32,
}

impl Filter for ExtentList {
    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        vec![("lookup", &mut self.debug_lookup)]
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "extentlist" if self.path.is_some() => Err(ConfigError("extentlist cannot appear twice".into())),
            "extentlist" => {
                self.path = Some(value.path().to_owned());
                Ok(())
            }
            _ => Err(unknown(key)),
        }
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        if self.path.is_none() {
            return Err(ConfigError("you must supply the extentlist parameter on the command line".into()));
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> Result<Arc<dyn Exports>, ConfigError> {
        let debug = self.debug_lookup != 0;
        let path = self.path.unwrap_or_default();
        let shown = path.display();
        let text = fs::read_to_string(&path).map_err(|error| ConfigError(format!("open: {shown}: {error}")))?;
        let list = parse(&text).map_err(|why| ConfigError(format!("{shown}: {why}")))?;
        Ok(Arc::new(FilteredExports(Listed { next, list: list.into(), debug })))
    }
}

/// A line of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    offset: u64,
    /// At least 1.
    length: u64,
    flags: u64,
}

/// The list in order. Errors: a line that is none, or extents that overlap.
fn parse(text: &str) -> Result<Vec<Stretch>, String> {
    let mut list = Vec::new();
    for line in text.lines().filter_map(values::extent_line) {
        let mut words = line.split([' ', '\t']).filter(|word| !word.is_empty());
        let (Some(offset), Some(length)) = (words.next(), words.next()) else {
            return Err(format!("cannot parse {line}"));
        };
        let (offset, length) = (values::size(offset)?, values::size(length)?);
        let flags = words.next().map_or(0, flags);
        if length > 0 {
            list.push(Stretch { offset, length, flags });
        }
    }
    list.sort_by_key(|stretch| stretch.offset);
    // Sizes are below 2^63, so that the sum of two fits.
    if list.windows(2).any(|pair| pair[0].offset + pair[0].length > pair[1].offset) {
        return Err("extents in the extent list are overlapping".to_owned());
    }
    Ok(list)
}

/// A number, or any text with the words in it.
fn flags(word: &str) -> u64 {
    let digits = word.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    if let Ok(number) = digits.parse::<u32>() {
        return u64::from(number);
    }
    let when = |name: &str, flag: u64| if word.contains(name) { flag } else { 0 };
    when("hole", HOLE) | when("zero", ZERO)
}

struct Listed {
    next: Arc<dyn Exports>,
    list: Arc<[Stretch]>,
    debug: bool,
}

impl FilterExports for Listed {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }
    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        let (next, list) = (self.next.open(client)?, Arc::clone(&self.list));
        let debug = self.debug.then(|| client.connection.clone());
        Ok(Box::new(Filtered(Over { next, list, debug })))
    }
}

struct Over {
    next: Box<dyn Device>,
    list: Arc<[Stretch]>,
    /// Where to say what is found, if that is wanted.
    debug: Option<Connection>,
}

impl filter::Filter for Over {
    fn next(&self) -> &dyn Device {
        &*self.next
    }
    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities { extents: true, ..self.next.capabilities()? })
    }
    fn extents(&self, extents: &mut Extents, _call: &Call) -> device::Result<()> {
        let mut at = extents.offset();
        // What is wanted is inside the disk.
        let end = at + extents.length();
        let first = self.list.partition_point(|stretch| stretch.offset + stretch.length <= at);
        for (number, stretch) in self.list.iter().enumerate().skip(first) {
            if let Some(debug) = &self.debug {
                let count = end - at;
                debug.debug(format_args!("extentlist lookup: loop i={number} count={count} offset={at}"));
            }
            // What the list leaves out is a hole.
            if stretch.offset > at && !extents.add(at, stretch.offset - at, HOLE | ZERO) {
                return Ok(());
            }
            if !extents.add(stretch.offset, stretch.length, stretch.flags) {
                return Ok(());
            }
            at = stretch.offset + stretch.length;
        }
        if at < end {
            extents.add(at, end - at, HOLE | ZERO);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::testing::ready;

    #[test]
    fn reads_sizes_and_words_in_any_order() {
        let list = parse("# a list\n4M 1M hole,zero\n\n0  1k # first\n8192\t0 hole\n1k 1k 2 and more\n").unwrap();
        let stretch = |offset, length, flags| Stretch { offset, length, flags };
        assert_eq!(list, [stretch(0, 1024, 0), stretch(1024, 1024, ZERO), stretch(4 << 20, 1 << 20, HOLE | ZERO)]);
        assert!(parse("").unwrap().is_empty());
        for wrong in ["0", "x 1", "0 1\n-1 1", "0 1M\n1023k 1"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_the_list_leaves_out_is_a_hole() {
        let next = ready("null", &[("size", "10M".as_ref())]).expect("it is a size");
        let list = parse("1M 1M\n2M 1M\n5M 1M hole").unwrap();
        let exports = FilteredExports(Listed { next, list: list.into(), debug: false });
        let device = exports.open(&Client::default()).unwrap();
        assert!(device.capabilities().unwrap().extents);
        let map = |offset: u64, length: u64| {
            let mut extents = Extents::new(offset, length, false);
            device.extents(&mut extents, &Call::AT_ONCE).unwrap();
            extents.list().iter().map(|extent| (extent.length >> 20, extent.flags)).collect::<Vec<_>>()
        };
        let hole = HOLE | ZERO;
        assert_eq!(map(0, 10 << 20), [(1, hole), (2, 0), (2, hole), (1, HOLE), (4, hole)]);
        assert_eq!(map(2 << 20, 1 << 20), [(1, 0)]);
        assert_eq!(map(6 << 20, 4 << 20), [(4, hole)]);
    }
}

//! `stats`: how many requests of what size took how long, written to a file at the end.
//! Source: nbdkit filters/stats/stats.cpp, nbdkit-stats-filter.pod.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nbdcaptive_actors::device::{Call, Client, Device, Error, Exports, Extents, Result, ThreadModel};
use nbdcaptive_actors::filter::{FilterExports, Filtered, FilteredExports, Next};

use super::kit::{Gate, Gated, Request, absolute, optional, required, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "stats",
    summary: "write statistics of the requests to a file

        For each kind of request how many there were, how many bytes, how long they took, and at the end what sizes
        and alignments they had. It is what arrives at this filter: with one before and one behind another filter it
        is seen what that changes.

        # Examples

            nbdcaptive --filter=stats memory 1M statsfile=stats.txt \\
                --run 'nbdcopy disk.img \"$uri\"'
        ",
    parameters: &[
        required("statsfile", "<FILE>", "the file to write them to, at the end"),
        optional("statsappend", "<BOOL>", "keep what is in it; false"),
        optional("statsthreshold", "0..100", "what part of the requests is broken down by size, in percent; 95"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct Stats {
    file: Option<PathBuf>,
    append: bool,
    /// From 0 to 1.
    threshold: f64,
}

impl Default for Stats {
    fn default() -> Stats {
        Stats { file: None, append: false, threshold: 0.95 }
    }
}

impl Filter for Stats {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "statsfile" => self.file = Some(absolute(value)?),
            "statsappend" => self.append = values::boolean(value.text(key)?).map_err(ConfigError)?,
            "statsthreshold" => {
                let percent = values::int("printing threshold", value.text(key)?).map_err(ConfigError)?;
                if !(0..=100).contains(&percent) {
                    return Err(ConfigError("statsthreshold must be between 0 and 100 (percent)".to_owned()));
                }
                self.threshold = f64::from(percent) / 100.0;
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> std::result::Result<(), ConfigError> {
        match self.file {
            Some(_) => Ok(()),
            None => Err(ConfigError("stats filter requires statsfile parameter".to_owned())),
        }
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let file = super::log::open(&self.file.unwrap_or_default(), self.append)?;
        let book = Book { threshold: self.threshold, accounts: Mutex::default() };
        Ok(Arc::new(FilteredExports(Counted { next, file, start: Instant::now(), book: Arc::new(book) })))
    }
}

struct Counted {
    next: Arc<dyn Exports>,
    file: File,
    start: Instant,
    book: Arc<Book>,
}

impl FilterExports for Counted {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        Ok(Box::new(Filtered(Gated(Disk { next: Next::open(&*self.next, client)?, book: Arc::clone(&self.book) }))))
    }

    fn unloads(&self) -> bool {
        true
    }

    fn unload(&self) -> Result<()> {
        let text = self.book.text(self.start.elapsed());
        (&self.file).write_all(text.as_bytes()).map_err(|error| Error::system("statsfile", error))
    }
}

/// What there are accounts of, in the order in which they are shown.
const NAMES: [&str; 7] = ["read", "write", "trim", "zero", "extents", "cache", "flush"];

/// In an account of alignments: that of offset 0, which is a multiple of everything.
const ANY: i32 = -1;

/// Requests of one kind.
#[derive(Debug, Default)]
struct Account {
    requests: u64,
    bytes: u64,
    time: Duration,
    /// By the number of bits of their length, from 0 for a byte.
    sizes: HashMap<u32, Size>,
}

/// Requests of one kind and about one size.
#[derive(Debug, Default)]
struct Size {
    bytes: u64,
    /// By how many bits at the end of their offset are 0.
    alignments: BTreeMap<i32, u64>,
}

struct Book {
    threshold: f64,
    /// In the order of [`NAMES`].
    accounts: Mutex<[Account; NAMES.len()]>,
}

impl Book {
    fn accounts(&self) -> MutexGuard<'_, [Account; NAMES.len()]> {
        // Numbers have no state that a panic could leave half done.
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, request: &Request, time: Duration) {
        let (kind, length, offset) = match *request {
            Request::Read { length, offset } => (0, length, offset),
            Request::Write { length, offset, .. } => (1, length, offset),
            Request::Trim { length, offset, .. } => (2, length, offset),
            Request::Zero { length, offset, .. } => (3, length, offset),
            Request::Extents { length, offset, .. } => (4, length, offset),
            Request::Cache { length, offset } => (5, length, offset),
            Request::Flush => (6, 0, 0),
        };
        let account = &mut self.accounts()[kind];
        account.requests += 1;
        account.bytes += length;
        account.time += time;
        if self.threshold == 0.0 {
            return;
        }
        if let Some(bits) = length.checked_ilog2() {
            let size = account.sizes.entry(bits).or_default();
            size.bytes += length;
            let alignment = if offset == 0 { ANY } else { offset.trailing_zeros() as i32 };
            *size.alignments.entry(alignment).or_default() += 1;
        }
    }

    fn text(&self, time: Duration) -> String {
        let accounts = self.accounts();
        let [read, write, trim, zero, extents, _cache, flush] = &*accounts;
        let requests: u64 = [read, write, trim, zero, extents, flush].map(|account| account.requests).iter().sum();
        let bytes: u64 = [read, write, trim, zero].map(|account| account.bytes).iter().sum();
        let mut text = String::new();
        let seconds = time.as_micros() as f64 / 1e6;
        let _ = writeln!(text, "total: {requests} ops, {seconds:.6} s, {}, {}/s", size(bytes), rate(bytes, seconds));
        for (name, account) in NAMES.iter().zip(&*accounts) {
            if account.requests > 0 {
                account.write(&mut text, name, seconds, self.threshold);
            }
        }
        text
    }
}

impl Account {
    fn write(&self, text: &mut String, name: &str, total: f64, threshold: f64) {
        let Account { requests, bytes, time, sizes } = self;
        let seconds = time.as_micros() as f64 / 1e6;
        let _ = writeln!(
            text,
            "{name}: {requests} ops, {seconds:.6} s, {}, {}/s op, {}/s total",
            size(*bytes),
            rate(*bytes, seconds),
            rate(*bytes, total)
        );
        if sizes.is_empty() {
            return;
        }
        let _ = writeln!(text, "  Request size and alignment breakdown:");
        // The most frequent first.
        let mut frequent: Vec<_> = sizes.iter().map(|(bits, size)| (size.requests(), *bits, size)).collect();
        frequent.sort_by_key(|(requests, bits, _)| std::cmp::Reverse((*requests, *bits)));
        let enough = (threshold * *requests as f64) as u64;
        let (mut shown, mut shown_bytes) = (0, 0);
        for (count, bits, one) in frequent {
            if shown >= enough {
                let rest = requests - shown;
                let _ = writeln!(
                    text,
                    "    other sizes: {:4.1}% ({rest} reqs, {} total)",
                    percent(rest, *requests),
                    size(bytes - shown_bytes)
                );
                break;
            }
            let share = percent(count, *requests);
            let _ = writeln!(text, "    {bits:2} bits: {share:4.1}% ({count} reqs, {} total)", size(one.bytes));
            shown += count;
            shown_bytes += one.bytes;
            one.write(text, threshold);
        }
        text.push('\n');
    }
}

impl Size {
    fn requests(&self) -> u64 {
        self.alignments.values().sum()
    }

    fn write(&self, text: &mut String, threshold: f64) {
        let total = self.requests();
        let cutoff = ((1.0 - threshold) * total as f64) as u64;
        // What is aligned to more is aligned to less as well.
        let mut left = total;
        let mut rows = Vec::new();
        for (&bits, &count) in self.alignments.range(0..) {
            rows.push((bits, left));
            left -= count;
        }
        for (at, &(bits, count)) in rows.iter().enumerate() {
            if count < cutoff {
                let share = percent(count, total);
                let _ = writeln!(text, "         {bits:2}+ bit-aligned: {share:4.1}% ({count})");
                break;
            }
            if rows.get(at + 1).is_none_or(|(_, next)| *next != count) {
                let share = percent(count, total);
                let _ = writeln!(text, "         {bits:2} bit aligned: {share:5.1}% ({count})");
            }
        }
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64 * 100.0
}

fn size(bytes: u64) -> String {
    match bytes {
        0..0x400 => format!("{bytes} bytes"),
        0x400..0x10_0000 => format!("{:.2} KiB", bytes as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.2} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

fn rate(bytes: u64, seconds: f64) -> String {
    if seconds == 0.0 { "(n/a)".to_owned() } else { size((bytes as f64 / seconds) as u64) }
}

struct Disk {
    next: Next,
    book: Arc<Book>,
}

impl Gate for Disk {
    /// When it began.
    type Pass = Instant;

    fn next(&self) -> &Next {
        &self.next
    }

    fn before(&self, _request: &Request, _call: &Call) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn after(&self, start: Instant, request: &Request, result: &Result<()>, _map: Option<&Extents>) {
        if result.is_ok() {
            self.book.note(request, start.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::refused;

    /// The example of the man page, in small: 9 reads of 64 KiB, aligned to 16 bits but one, and one of 512 bytes.
    #[test]
    fn the_text_is_that_of_nbdkit() {
        let book = Book { threshold: 0.9, accounts: Mutex::default() };
        for number in 0..8 {
            book.note(&Request::Read { length: 65536, offset: number << 16 }, Duration::from_millis(10));
        }
        book.note(&Request::Read { length: 65536, offset: 512 }, Duration::from_millis(10));
        book.note(&Request::Read { length: 512, offset: 512 }, Duration::from_millis(10));
        book.note(&Request::Flush, Duration::ZERO);
        let text = book.text(Duration::from_secs(2));
        let want = "\
total: 11 ops, 2.000000 s, 576.50 KiB, 288.25 KiB/s
read: 10 ops, 0.100000 s, 576.50 KiB, 5.63 MiB/s op, 288.25 KiB/s total
  Request size and alignment breakdown:
    16 bits: 90.0% (9 reqs, 576.00 KiB total)
          9 bit aligned: 100.0% (9)
         16 bit aligned:  88.9% (8)
         17 bit aligned:  44.4% (4)
         18 bit aligned:  22.2% (2)
    other sizes: 10.0% (1 reqs, 512 bytes total)

flush: 1 ops, 0.000000 s, 0 bytes, (n/a)/s op, 0 bytes/s total
";
        assert_eq!(text, want);
    }

    #[test]
    fn a_threshold_of_0_leaves_the_breakdown_out() {
        let book = Book { threshold: 0.0, accounts: Mutex::default() };
        book.note(&Request::Read { length: 512, offset: 0 }, Duration::ZERO);
        assert!(!book.text(Duration::from_secs(1)).contains("breakdown"));
    }

    #[test]
    fn the_file_must_be_given() {
        assert_eq!(refused("stats", &[]), "stats filter requires statsfile parameter");
        let threshold = |value| refused("stats", &[("statsthreshold", value)]);
        assert_eq!(threshold("101"), "statsthreshold must be between 0 and 100 (percent)");
        assert_eq!(refused("stats", &[("statsfile", "")]), "cannot convert null or empty path to an absolute path");
        assert!(refused("stats", &[("statsfile", "/no/such/directory/x")]).starts_with("open: /no/such/directory/x: "));
    }
}

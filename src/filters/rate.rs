//! `rate`: limits how many bits are read and written in a second, by all clients together and by each. Buckets hold tokens, one
//! for a bit, and fill at the rate that is wanted up to what a burst may take; who finds too few waits until those that are
//! lacking have come. (In nbdkit a request that is larger than a burst waits for the same tokens again and again.)
//! Source: nbdkit filters/rate/rate.c, bucket.c, nbdkit-rate-filter.pod.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nbdcaptive_actors::device::{Call, Client, Connection, Exports, Result, ThreadModel};
use nbdcaptive_actors::filter::{Filtered, Next};

use super::kit::{Gate, Gated, Request, absolute, each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Flag, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "rate",
    summary: "limit the bandwidth

        Rates are in bits a second, with the suffixes of sizes: `10M` is 10 mebibits. Reads and writes have a rate
        each. The files are looked at again and again, so the rate can be changed while the server runs.

        # Examples

            nbdcaptive --filter=rate memory 1M rate=100M \\
                --run 'nbdcopy \"$uri\" null:'
        ",
    parameters: &[
        optional("rate", "<BITSPERSEC>", "of all clients together"),
        optional("connection-rate", "<BITSPERSEC>", "of each client"),
        optional("rate-file", "<FILENAME>", "a file with the rate, read again and again"),
        optional("connection-rate-file", "<FILENAME>", "a file with the rate of each client"),
        optional("burstiness", "<SECS>", "how much may come at once, in seconds at the rate; 2.0"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The longest line of a file with a rate, in bytes.
const MAX_LINE: u64 = 100;

/// The filter. Bits in a second; 0: not given.
#[derive(Debug)]
pub struct Rate {
    all: u64,
    each: u64,
    all_file: Option<PathBuf>,
    each_file: Option<PathBuf>,
    burst: f64,
    /// `-D rate.bucket=1`: says what is taken from each bucket.
    debug_bucket: i32,
}

impl Default for Rate {
    fn default() -> Rate {
        Rate { all: 0, each: 0, all_file: None, each_file: None, burst: 2.0, debug_bucket: 0 }
    }
}

impl Filter for Rate {
    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        vec![("bucket", &mut self.debug_bucket)]
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "rate" | "connection-rate" => {
                let rate = if key == "rate" { &mut self.all } else { &mut self.each };
                if *rate > 0 {
                    return Err(ConfigError(format!("{key} set twice on the command line")));
                }
                *rate = values::size(value.text(key)?).map_err(ConfigError)?;
                if *rate == 0 {
                    return Err(ConfigError(format!("{key} cannot be set to 0")));
                }
            }
            "rate-file" => self.all_file = Some(absolute(value)?),
            "connection-rate-file" => self.each_file = Some(absolute(value)?),
            "burstiness" => {
                let seconds = value.text(key)?.trim().parse().ok().filter(|seconds| (0.0..=1e9).contains(seconds));
                let line = "burstiness must be a floating point number (seconds)";
                self.burst = seconds.ok_or_else(|| ConfigError(line.to_owned()))?;
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let Rate { all, each: one, all_file, each_file, burst, debug_bucket } = *self;
        let debug = debug_bucket != 0;
        let all = Arc::new(Limit { debug, ..Limit::new(all, burst, all_file) });
        Ok(each(next, move |next, client: &Client| {
            let each = Limit { debug, ..Limit::new(one, burst, each_file.clone()) };
            let connection = client.connection.clone();
            Ok(Filtered(Gated(Disk { next: Next::open(next, client)?, all: Arc::clone(&all), each, connection })))
        }))
    }
}

/// Tokens for bits.
#[derive(Debug)]
struct Bucket {
    /// Tokens in a second; 0: there is no limit.
    rate: u64,
    /// How many seconds it takes to fill.
    burst: f64,
    /// Negative where tokens were taken that are yet to come.
    level: i128,
    filled: Instant,
}

impl Bucket {
    /// A full one.
    fn new(rate: u64, burst: f64) -> Bucket {
        let mut bucket = Bucket { rate, burst, level: 0, filled: Instant::now() };
        bucket.level = bucket.capacity();
        bucket
    }

    fn capacity(&self) -> i128 {
        (self.rate as f64 * self.burst) as i128
    }

    fn give_back(&mut self, tokens: u64) {
        self.level = self.level.saturating_add(tokens.into()).min(self.capacity());
    }

    fn adjust(&mut self, rate: u64) {
        self.rate = rate;
        self.level = self.level.min(self.capacity());
    }

    /// Takes `wanted` tokens; those that are lacking are owed. How long it takes until they are there.
    fn take(&mut self, wanted: u64, now: Instant) -> Option<Duration> {
        if self.rate == 0 {
            return None;
        }
        let elapsed = now.saturating_duration_since(self.filled).as_micros();
        let fresh = i128::try_from(u128::from(self.rate) * elapsed / 1_000_000).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(fresh).min(self.capacity());
        // A time that gave no token counts the next time.
        if fresh > 0 || self.level == self.capacity() {
            self.filled = now;
        }
        self.level = self.level.saturating_sub(wanted.into());
        let nanoseconds = self.level.min(0).unsigned_abs().saturating_mul(1_000_000_000) / u128::from(self.rate);
        (self.level < 0).then(|| Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)))
    }
}

/// A bucket for what is read and one for what is written.
struct Limit {
    read: Mutex<Bucket>,
    write: Mutex<Bucket>,
    file: Option<PathBuf>,
    /// Says what is taken.
    debug: bool,
}

impl Limit {
    fn new(rate: u64, burst: f64, file: Option<PathBuf>) -> Limit {
        let bucket = || Mutex::new(Bucket::new(rate, burst));
        Limit { read: bucket(), write: bucket(), file, debug: false }
    }

    fn wait(&self, is_read: bool, bytes: u64, connection: &Connection, call: &Call) -> Result<()> {
        let bucket = || {
            let bucket = if is_read { &self.read } else { &self.write };
            // Numbers have no state that a panic could leave half done.
            bucket.lock().unwrap_or_else(PoisonError::into_inner)
        };
        if let Some(rate) = self.file.as_deref().and_then(rate_in) {
            let mut bucket = bucket();
            if bucket.rate != rate {
                connection.debug(format_args!("rate adjusted from {} to {rate}", bucket.rate));
                bucket.adjust(rate);
            }
        }
        let bits = bytes.saturating_mul(8);
        let (time, level) = {
            let mut bucket = bucket();
            (bucket.take(bits, Instant::now()), bucket.level)
        };
        if self.debug {
            let name = if is_read { "read" } else { "write" };
            connection.debug(format_args!("bucket {name}: deducting {bits} tokens, new level {level}"));
            time.iter().for_each(|time| connection.debug(format_args!("bucket {name}: sleeping for {time:.1?}")));
        }
        let Some(time) = time else { return Ok(()) };
        // What a client has not waited for it does not get.
        connection.sleep(call, time).inspect_err(|_| bucket().give_back(bits))
    }
}

/// What the first line of a file says. `None`: there is no file, or nothing that could be a rate, and the last one stays.
fn rate_in(path: &Path) -> Option<u64> {
    let mut line = String::new();
    BufReader::new(File::open(path).ok()?.take(MAX_LINE)).read_line(&mut line).ok().filter(|&length| length > 0)?;
    values::size(line.strip_suffix('\n').unwrap_or(&line)).ok()
}

struct Disk {
    next: Next,
    all: Arc<Limit>,
    each: Limit,
    connection: Connection,
}

impl Gate for Disk {
    type Pass = ();

    fn next(&self) -> &Next {
        &self.next
    }

    /// Tokens are to be taken once.
    fn answers_at_once(&self) -> bool {
        false
    }

    fn before(&self, request: &Request, call: &Call) -> Result<()> {
        let (is_read, length) = match *request {
            Request::Read { length, .. } => (true, length),
            Request::Write { length, .. } => (false, length),
            _ => return Ok(()),
        };
        self.all.wait(is_read, length, &self.connection, call)?;
        self.each.wait(is_read, length, &self.connection, call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::refused;

    #[test]
    fn a_bucket_starts_full_and_fills_at_its_rate() {
        let mut bucket = Bucket::new(1000, 2.0);
        let start = bucket.filled;
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        assert_eq!(bucket.take(1500, at(0)), None);
        assert_eq!(bucket.take(1500, at(0)), Some(Duration::from_secs(1)));
        // Whoever comes next waits behind that.
        assert_eq!(bucket.take(1000, at(500)), Some(Duration::from_millis(1500)));
        bucket.give_back(1000);
        assert_eq!(bucket.take(1000, at(500)), Some(Duration::from_millis(1500)));
        assert_eq!(bucket.take(0, at(2000)), None);
        assert_eq!(bucket.take(500, at(2500)), None);
        assert_eq!(bucket.take(2001, at(100_000)), Some(Duration::from_millis(1)));
    }

    #[test]
    fn without_a_burst_every_request_waits_for_its_own_length() {
        let mut bucket = Bucket::new(1000, 0.0);
        let start = bucket.filled;
        assert_eq!(bucket.take(4000, start), Some(Duration::from_secs(4)));
        assert_eq!(bucket.take(1000, start + Duration::from_secs(10)), Some(Duration::from_secs(1)));
    }

    #[test]
    fn short_times_are_not_lost() {
        let mut bucket = Bucket::new(1000, 1.0);
        let start = bucket.filled;
        assert_eq!(bucket.take(1000, start), None);
        for step in 1..=1000 {
            let _ = bucket.take(0, start + Duration::from_micros(step * 100));
        }
        assert_eq!(bucket.level, 100);
    }

    #[test]
    fn a_rate_can_change_and_large_numbers_do_no_harm() {
        let mut bucket = Bucket::new(0, 2.0);
        assert_eq!(bucket.take(u64::MAX, Instant::now()), None);
        bucket.adjust(i64::MAX as u64);
        let later = bucket.filled + Duration::from_secs(1 << 40);
        let _ = bucket.take(u64::MAX, later);
        let _ = bucket.take(0, later + Duration::from_secs(1 << 40));
        bucket.adjust(1);
        assert_eq!(bucket.level, 2);
        assert_eq!(bucket.take(12, later), Some(Duration::from_secs(10)));
        let _ = bucket.take(u64::MAX, later);
    }

    #[test]
    fn what_is_no_rate_is_refused() {
        assert_eq!(refused("rate", &[("rate", "0")]), "rate cannot be set to 0");
        let twice = [("connection-rate", "1M"), ("connection-rate", "1M")];
        assert_eq!(refused("rate", &twice), "connection-rate set twice on the command line");
        for text in ["x", "-1", "inf", "nan", ""] {
            let why = refused("rate", &[("burstiness", text)]);
            assert_eq!(why, "burstiness must be a floating point number (seconds)");
        }
    }
}

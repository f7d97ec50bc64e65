//! `spinning`: a disk whose heads take time to get somewhere. A seek takes as long as a quadratic curve through three points says.
//! Source: nbdkit filters/spinning/spinning.c, nbdkit-spinning-filter.pod.

use std::sync::Arc;
use std::time::Duration;

use nbdcaptive_actors::device::{Call, Capabilities, Client, Connection, Device, Exports, Result, ThreadModel};
use nbdcaptive_actors::filter::{Filtered, Next};
use smol::lock::Mutex;

use super::kit::{Gate, Gated, Request, each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Flag, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "spinning",
    summary: "take as long as a disk with heads that move

        Requests take as long as heads take to get to their place from that of the request before, once a time for
        the next track, for half and for the whole way is given. To see how a client does on a disk of that kind.

        # Examples

            nbdcaptive --filter=spinning memory 1M min-seek-time=1ms \\
                half-seek-time=2ms max-seek-time=3ms \\
                --run 'nbdcopy \"$uri\" null:'
        ",
    parameters: &[
        optional("heads", "<N>", "how many heads there are, 1 to 64; 1"),
        optional("separate-heads", "<BOOL>", "they move apart from each other; false"),
        optional("min-seek-time", "<TIME>", "how long the next track takes; 0.01 s"),
        optional("half-seek-time", "<TIME>", "how long half the way takes; 0.2 s"),
        optional("max-seek-time", "<TIME>", "how long the whole way takes; 0.5 s"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// A head that moves no further than this takes no time for it, in bytes.
const TRACK: u64 = 128 * 1024;

/// How exactly the curve must go through its points, in seconds.
const EXACT: f64 = 0.0005;

/// The filter.
#[derive(Clone, Copy, Debug)]
pub struct Spinning {
    heads: u32,
    separate: bool,
    /// Seconds for no way, half of it and all of it.
    times: [f64; 3],
    /// `-D spinning.verbose=1`: says how the heads move.
    debug_verbose: i32,
}

impl Default for Spinning {
    fn default() -> Spinning {
        Spinning { heads: 1, separate: false, times: [0.01, 0.2, 0.5], debug_verbose: 0 }
    }
}

impl Filter for Spinning {
    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        vec![("verbose", &mut self.debug_verbose)]
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        let time = match key {
            "heads" => {
                self.heads = values::unsigned(key, text).map_err(ConfigError)?;
                if !(1..=64).contains(&self.heads) {
                    let line = format!("heads must be in the range [1..64] (was: {})", self.heads);
                    return Err(ConfigError(line));
                }
                return Ok(());
            }
            "separate-heads" => {
                self.separate = values::boolean(text).map_err(ConfigError)?;
                return Ok(());
            }
            "min-seek-time" => &mut self.times[0],
            "half-seek-time" => &mut self.times[1],
            "max-seek-time" => &mut self.times[2],
            _ => return Err(unknown(key)),
        };
        *time = values::delay(key, text).map_err(ConfigError)?.as_secs_f64();
        Ok(())
    }

    fn config_complete(&mut self) -> std::result::Result<(), ConfigError> {
        let curve = Curve::through(self.times);
        let points = [0.0, 0.5, 1.0].into_iter().zip(self.times);
        if points.into_iter().any(|(way, time)| (curve.time(way) - time).abs() >= EXACT) {
            let line = "in the spinning filter, seek time quadratic is not stable, \
                        try using different {min,half,max}-seek-time parameters";
            return Err(ConfigError(line.to_owned()));
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let Spinning { heads, separate, times, debug_verbose } = *self;
        let debug = debug_verbose != 0;
        let curve = Curve::through(times);
        Ok(each(next, move |next, client: &Client| {
            let next = Next::open(next, client)?;
            let heads = Head::split(next.bytes(), heads, separate);
            Ok(Filtered(Gated(Disk { next, heads, curve, connection: client.connection.clone(), debug })))
        }))
    }
}

/// How long a seek takes: ax² + bx + c seconds for the part x of the whole way.
#[derive(Clone, Copy, Debug)]
struct Curve {
    a: f64,
    b: f64,
    c: f64,
}

impl Curve {
    fn through([min, half, max]: [f64; 3]) -> Curve {
        let a = 2.0 * (max - 2.0 * half + min);
        Curve { a, b: 2.0 * (half - min - a / 4.0), c: min }
    }

    fn time(self, way: f64) -> f64 {
        (self.a * way + self.b) * way + self.c
    }
}

/// What moves as one: a head, or an arm with all of them.
struct Arm {
    /// How far from the start of its head's range it stands, in bytes.
    at: Arc<Mutex<u64>>,
}

/// A range of the disk that one head reads and writes, in bytes.
struct Head {
    start: u64,
    end: u64,
    arm: Arm,
}

impl Head {
    /// A disk has as many heads as it has bytes, at most.
    fn split(size: u64, count: u32, separate: bool) -> Vec<Head> {
        let count = u64::from(count).min(size);
        let common = Arc::new(Mutex::new(0));
        let head = |number| {
            let step = size / count;
            let end = if number + 1 == count { size } else { (number + 1) * step };
            let at = if separate { Arc::new(Mutex::new(0)) } else { Arc::clone(&common) };
            Head { start: number * step, end, arm: Arm { at } }
        };
        (0..count).map(head).collect()
    }
}

struct Disk {
    next: Next,
    heads: Vec<Head>,
    curve: Curve,
    connection: Connection,
    /// Says how the heads move.
    debug: bool,
}

impl Disk {
    /// How long a head takes for a way.
    fn time(&self, head: &Head, way: u64) -> Option<Duration> {
        let part = way as f64 / (head.end - head.start) as f64;
        Duration::try_from_secs_f64(self.curve.time(part)).ok().filter(|time| way > TRACK && !time.is_zero())
    }

    /// Moves a head to a place. Who comes meanwhile waits for it.
    fn seek(&self, offset: u64, call: &Call) -> Result<()> {
        let Some(head) = self.heads.iter().find(|head| offset < head.end) else { return Ok(()) };
        let place = offset - head.start;
        self.connection.wait(call, async {
            let mut at = head.arm.at.lock().await;
            let way = at.abs_diff(place);
            *at = place;
            let time = self.time(head, way);
            if self.debug {
                let start = head.start;
                self.connection.debug(format_args!("spinning: do_seek: head at {start}: move by {way} to {offset}"));
                if let Some(time) = time {
                    self.connection.debug(format_args!("spinning: do_seek: sleeping for {time:?}"));
                }
            }
            if let Some(time) = time {
                smol::Timer::after(time).await;
            }
        })
    }
}

impl Gate for Disk {
    type Pass = ();

    fn next(&self) -> &Next {
        &self.next
    }

    fn answers_at_once(&self) -> bool {
        false
    }

    fn capabilities(&self) -> Result<Capabilities> {
        // Each connection has heads of its own.
        Ok(Capabilities { rotational: true, multi_conn: false, ..self.next.capabilities()? })
    }

    fn before(&self, request: &Request, call: &Call) -> Result<()> {
        match *request {
            Request::Read { offset, .. } | Request::Write { offset, .. } | Request::Zero { offset, .. } => {
                self.seek(offset, call)
            }
            Request::Flush | Request::Trim { .. } | Request::Cache { .. } | Request::Extents { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{device, memory, refused};
    use std::time::Instant;

    #[test]
    fn the_curve_goes_through_its_points() {
        let curve = Curve::through([0.01, 0.2, 0.5]);
        for (way, time) in [(0.0, 0.01), (0.5, 0.2), (1.0, 0.5)] {
            assert!((curve.time(way) - time).abs() < 1e-9, "{way}");
        }
        assert!(curve.time(0.25) > 0.01 && curve.time(0.25) < 0.2);
    }

    #[test]
    fn a_disk_is_split_among_its_heads() {
        let split =
            |size, count| Head::split(size, count, true).iter().map(|head| (head.start, head.end)).collect::<Vec<_>>();
        assert_eq!(split(10, 3), [(0, 3), (3, 6), (6, 10)]);
        assert_eq!(split(2, 64), [(0, 1), (1, 2)]);
        assert_eq!(split(0, 4), []);
    }

    /// How the arms of a disk of 1 GiB with two heads stand after seeks.
    fn arms(separate: bool) -> Vec<u64> {
        let heads = Head::split(1 << 30, 2, separate);
        let next = Next::open(&*memory("1G"), &Client::default()).unwrap();
        let curve = Curve::through([0.0; 3]);
        let disk = Disk { next, heads, curve, connection: Connection::default(), debug: false };
        disk.seek(100, &Call::BLOCKING).unwrap();
        disk.seek((512 << 20) + 200, &Call::BLOCKING).unwrap();
        disk.heads.iter().map(|head| *head.arm.at.lock_blocking()).collect()
    }

    #[test]
    fn heads_move_together_or_apart() {
        assert_eq!(arms(false), [200, 200]);
        assert_eq!(arms(true), [100, 200]);
    }

    #[test]
    fn a_long_way_takes_time_and_a_short_one_none() {
        let times = [("min-seek-time", "50ms"), ("half-seek-time", "50ms"), ("max-seek-time", "50ms")];
        let disk = device("1G", "spinning", &times);
        assert!(disk.capabilities().unwrap().rotational && !disk.capabilities().unwrap().multi_conn);
        let seek = |offset| {
            let start = Instant::now();
            disk.read(&mut [0], offset, &Call::BLOCKING).unwrap();
            start.elapsed()
        };
        assert!(seek(1 << 20) >= Duration::from_millis(50));
        // The best of several, because a busy machine may take time as well.
        let short = (0..20).map(|step| seek((1 << 20) + step * 4096)).min();
        assert!(short < Some(Duration::from_millis(50)));
        assert!(seek(0) >= Duration::from_millis(50));
    }

    #[test]
    fn heads_are_1_to_64() {
        assert_eq!(refused("spinning", &[("heads", "0")]), "heads must be in the range [1..64] (was: 0)");
        assert_eq!(refused("spinning", &[("heads", "65")]), "heads must be in the range [1..64] (was: 65)");
    }
}

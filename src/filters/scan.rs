//! `scan`: as long as a client is connected, has the next device prefetch the whole disk from its start to its end.
//!
//! It does nothing unless the client is on the default export, and the next device prefetches by itself and takes requests in
//! parallel. Each client has a thread for it; all of them share how far they are.
//! Source: nbdkit filters/scan/scan.c, bgthread.c, nbdkit-scan-filter.pod.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use nbdcaptive_actors::device::{Call, Client, Device, Exports, Result, Segments, Support, ThreadModel};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports, Next};

use super::kit::{optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "scan",
    summary: "prefetch the whole disk while clients are connected

        From the start to the end, in the order of the disk, while at least one client is connected. That needs a
        plugin that can bring data near, or nbdcaptive-cache-filter(1) behind this filter.

        # Examples

            nbdcaptive --filter=scan file disk.img --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        optional("scan-ahead", "<BOOL>", "skip to where the client reads, if that is further, which is the default"),
        optional("scan-clock", "<BOOL>", "go on where the last client's scan stopped, which is the default"),
        optional("scan-forever", "<BOOL>", "begin again at the end"),
        optional("scan-size", "<SIZE>", "what is prefetched at a time, 2M unless given"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Clone, Debug)]
pub struct Scan {
    ahead: bool,
    clock: bool,
    forever: bool,
    size: u64,
}

impl Default for Scan {
    fn default() -> Scan {
        Scan { ahead: true, clock: true, forever: false, size: 2 << 20 }
    }
}

impl Filter for Scan {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        let boolean = || values::boolean(text).map_err(ConfigError);
        match key {
            "scan-ahead" => self.ahead = boolean()?,
            "scan-clock" => self.clock = boolean()?,
            "scan-forever" => self.forever = boolean()?,
            "scan-size" => self.size = values::size(text).map_err(ConfigError)?,
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> std::result::Result<(), ConfigError> {
        if !(512..=32 << 20).contains(&self.size) || !self.size.is_power_of_two() {
            return Err(ConfigError("scan-size parameter should be [512..32M] and a power of two".to_owned()));
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Scans { next, settings: *self, clock: Arc::default() })))
    }
}

struct Scans {
    next: Arc<dyn Exports>,
    settings: Scan,
    clock: Arc<AtomicU64>,
}

impl FilterExports for Scans {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = Next::open(&*self.next, client)?;
        let hindrance = if !client.export_name.is_empty() {
            Some("not the default export, not scanning")
        } else if self.next.thread_model() != ThreadModel::Parallel {
            Some("underlying plugin does not support the PARALLEL thread model, not scanning")
        } else if next.offered().cache != Support::Native {
            Some(
                "underlying plugin does not support NBD_CMD_CACHE, not scanning; try adding --filter=cache after this \
                 filter",
            )
        } else {
            None
        };
        if let Some(hindrance) = hindrance {
            client.connection.error(format_args!("scan: warning: {hindrance}"));
            return Ok(Box::new(next));
        }
        let next = Arc::new(next);
        let scanner = Arc::new(Scanner {
            settings: self.settings.clone(),
            size: next.bytes(),
            clock: Arc::clone(&self.clock),
            read_up_to: AtomicU64::new(0),
            quit: AtomicBool::new(false),
        });
        let run = {
            let (scanner, next) = (Arc::clone(&scanner), Arc::clone(&next));
            move || scanner.run(|length, offset| drop(next.cache(length, offset, &Call::BLOCKING)))
        };
        // Without a thread there is no prefetch.
        let thread = thread::Builder::new().name("scan".to_owned()).spawn(run).ok();
        Ok(Box::new(Filtered(Reader { next, scanner, thread: Mutex::new(thread) })))
    }
}

/// What a client's thread knows. Relaxed everywhere: each number stands for itself.
struct Scanner {
    settings: Scan,
    size: u64,
    /// How far any client's scan was.
    clock: Arc<AtomicU64>,
    /// How far the client has read since the last look.
    read_up_to: AtomicU64,
    quit: AtomicBool,
}

impl Scanner {
    /// Prefetches all there is, by calls with length and offset, unless it is told to quit.
    fn run(&self, prefetch: impl Fn(u64, u64)) {
        let Scan { size: piece, clock, forever, .. } = self.settings;
        loop {
            let mut offset = if clock { self.clock.load(Ordering::Relaxed) } else { 0 };
            while offset < self.size {
                if self.quit.load(Ordering::Relaxed) {
                    return;
                }
                offset = offset.max(self.read_up_to.swap(0, Ordering::Relaxed));
                self.clock.fetch_max(offset, Ordering::Relaxed);
                if offset < self.size {
                    prefetch(piece.min(self.size - offset), offset);
                }
                offset = offset.saturating_add(piece);
            }
            if !forever || self.size == 0 || self.quit.load(Ordering::Relaxed) {
                return;
            }
            self.clock.store(0, Ordering::Relaxed);
        }
    }
}

/// One client's device.
struct Reader {
    next: Arc<Next>,
    scanner: Arc<Scanner>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Reader {
    fn note(&self, length: usize, offset: u64) {
        if self.scanner.settings.ahead {
            self.scanner.read_up_to.fetch_max(offset + length as u64, Ordering::Relaxed);
        }
    }
}

impl filter::Filter for Reader {
    fn next(&self) -> &dyn Device {
        &*self.next
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.note(buffer.len(), offset);
        self.next.read(buffer, offset, call)
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        self.note(length, offset);
        self.next.read_segments(reply, length, offset, call)
    }

    fn close(&self) -> Result<()> {
        self.scanner.quit.store(true, Ordering::Relaxed);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scanner(settings: Scan, size: u64) -> Scanner {
        let (read_up_to, quit) = (AtomicU64::new(0), AtomicBool::new(false));
        Scanner { settings, size, clock: Arc::default(), read_up_to, quit }
    }

    /// What is prefetched, until it ends or `quit_after` pieces.
    fn pieces(scanner: &Scanner, quit_after: usize) -> Vec<(u64, u64)> {
        let pieces = Mutex::new(Vec::new());
        scanner.run(|length, offset| {
            let mut pieces = pieces.lock().unwrap();
            pieces.push((length, offset));
            if pieces.len() == quit_after {
                scanner.quit.store(true, Ordering::Relaxed);
            }
        });
        scanner.quit.store(false, Ordering::Relaxed);
        pieces.into_inner().unwrap()
    }

    #[test]
    fn scans_all_of_the_disk_once() {
        let scanner = scanner(Scan { size: 1024, ..Scan::default() }, 2500);
        assert_eq!(pieces(&scanner, 100), [(1024, 0), (1024, 1024), (452, 2048)]);
    }

    #[test]
    fn goes_on_where_it_was_or_begins_again() {
        let mut scanner = scanner(Scan { size: 1024, ..Scan::default() }, 8192);
        assert_eq!(pieces(&scanner, 3).len(), 3);
        assert_eq!(pieces(&scanner, 1), [(1024, 2048)]);
        scanner.settings.clock = false;
        assert_eq!(pieces(&scanner, 1), [(1024, 0)]);
    }

    #[test]
    fn skips_to_where_the_client_reads() {
        let scanner = scanner(Scan { size: 1024, ..Scan::default() }, 8192);
        scanner.read_up_to.store(5000, Ordering::Relaxed);
        assert_eq!(pieces(&scanner, 100), [(1024, 5000), (1024, 6024), (1024, 7048), (120, 8072)]);
    }

    #[test]
    fn forever_begins_again_at_the_end_but_not_on_an_empty_disk() {
        let mut scanner = scanner(Scan { size: 1024, forever: true, ..Scan::default() }, 2048);
        assert_eq!(pieces(&scanner, 5).iter().map(|(_, offset)| *offset).collect::<Vec<_>>(), [0, 1024, 0, 1024, 0]);
        scanner.size = 0;
        assert_eq!(pieces(&scanner, 1), []);
    }
}

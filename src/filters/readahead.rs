//! `readahead`: while a client reads in order, has the next device prefetch what will be read next.
//!
//! The window grows from 32 KiB to 4 MiB as long as reads go past what was prefetched, and is small again when they go back.
//! It does nothing unless the next device prefetches by itself and takes requests in parallel. Each client that reads has a
//! thread for it, which knows of one prefetch: a newer one takes its place.
//! Source: nbdkit filters/readahead/readahead.c, bgthread.c, nbdkit-readahead-filter.pod.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use nbdcaptive_actors::device::{Call, Client, Device, Exports, Result, Segments, Support, ThreadModel};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports, Next};

use crate::layer::{About, ConfigError, Filter, Lifetime};

/// See the module.
pub static ABOUT: About = About {
    name: "readahead",
    summary: "prefetch ahead of clients that read in order

        As long as a client reads in order, the plugin is told to bring near what comes next, more and more of it.
        That needs a plugin that can, or nbdcaptive-cache-filter(1) behind this filter.

        # Examples

            nbdcaptive --filter=readahead file disk.img \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

const SMALLEST: u64 = 32 << 10;
const LARGEST: u64 = 4 << 20;

/// The filter.
#[derive(Debug)]
pub struct Readahead;

impl Filter for Readahead {
    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Readaheads { next, window: Arc::default() })))
    }
}

struct Readaheads {
    next: Arc<dyn Exports>,
    window: Arc<Mutex<Window>>,
}

impl FilterExports for Readaheads {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = Next::open(&*self.next, client)?;
        let parallel = self.next.thread_model() == ThreadModel::Parallel;
        if next.offered().cache != Support::Native || !parallel {
            client.connection.error(format_args!(
                "readahead: warning: underlying plugin does not support NBD_CMD_CACHE or PARALLEL thread model, so the \
                 filter won't do anything{}",
                if parallel { "; try adding --filter=cache after this filter" } else { "" }
            ));
            return Ok(Box::new(next));
        }
        let next = Arc::new(next);
        let window = Arc::clone(&self.window);
        Ok(Box::new(Filtered(Reader { next, window, helper: Arc::default(), thread: Mutex::default() })))
    }
}

/// How far ahead; of all clients, as in nbdkit.
#[derive(Debug)]
struct Window {
    length: u64,
    last_read: u64,
    /// The end of what was prefetched last.
    last_prefetched: u64,
}

impl Default for Window {
    fn default() -> Window {
        Window { length: SMALLEST, last_read: 0, last_prefetched: 0 }
    }
}

impl Window {
    /// What to prefetch because of a read, if anything, in bytes: offset and length.
    fn advance(&mut self, offset: u64, length: u64, size: u64) -> Option<(u64, u64)> {
        let start = offset + length;
        let prefetch = (start < size).then(|| (start, self.length.min(size - start)));
        if self.last_prefetched < offset {
            self.length = (self.length * 2).min(LARGEST);
        } else if self.last_read >= offset {
            self.length = SMALLEST;
        }
        self.last_read = offset;
        self.last_prefetched = prefetch.map_or(start, |(start, length)| start + length);
        prefetch
    }
}

/// What the thread is told.
#[derive(Default)]
struct Helper {
    order: Mutex<Order>,
    changed: Condvar,
}

#[derive(Default)]
struct Order {
    prefetch: Option<(u64, u64)>,
    quit: bool,
}

impl Helper {
    fn tell(&self, tell: impl FnOnce(&mut Order)) {
        tell(&mut self.order.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
    }

    fn run(&self, device: &dyn Device) {
        loop {
            let idle = |order: &mut Order| order.prefetch.is_none() && !order.quit;
            let order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
            let mut order = self.changed.wait_while(order, idle).unwrap_or_else(PoisonError::into_inner);
            let Some((offset, length)) = order.prefetch.take().filter(|_| !order.quit) else { return };
            drop(order);
            // A hint: what becomes of it does not matter.
            let _ = device.cache(length, offset, &Call::BLOCKING);
        }
    }
}

/// One client's device.
struct Reader {
    next: Arc<Next>,
    window: Arc<Mutex<Window>>,
    helper: Arc<Helper>,
    /// Only once there is something for it to do: many clients never read.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Reader {
    fn advance(&self, offset: u64, length: u64) {
        let prefetch =
            self.window.lock().unwrap_or_else(PoisonError::into_inner).advance(offset, length, self.next.bytes());
        if prefetch.is_none() {
            return;
        }
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let (helper, next) = (Arc::clone(&self.helper), Arc::clone(&self.next));
            let run = move || helper.run(&*next);
            // Without a thread there is no prefetch.
            *thread = thread::Builder::new().name("readahead".to_owned()).spawn(run).ok();
        }
        drop(thread);
        self.helper.tell(|order| order.prefetch = prefetch);
    }

    /// Has the next pieces prefetched while it reads, or afterwards where a read that must not wait may yet come again.
    fn read(&self, length: usize, offset: u64, call: &Call, read: impl FnOnce() -> Result<()>) -> Result<()> {
        if call.may_block() {
            self.advance(offset, length as u64);
        }
        read()?;
        if !call.may_block() {
            self.advance(offset, length as u64);
        }
        Ok(())
    }
}

impl filter::Filter for Reader {
    fn next(&self) -> &dyn Device {
        &*self.next
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.read(buffer.len(), offset, call, || self.next.read(buffer, offset, call))
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        self.read(length, offset, call, || self.next.read_segments(reply, length, offset, call))
    }

    fn close(&self) -> Result<()> {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            self.helper.tell(|order| order.quit = true);
            let _ = thread.join();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 30;

    #[test]
    fn the_window_grows_while_reads_overtake_it_and_no_further_than_4_mib() {
        let mut window = Window::default();
        let (mut at, mut longest) = (1, 0);
        for _ in 0..12 {
            let (start, length) = window.advance(at, 512, SIZE).unwrap();
            assert_eq!(start, at + 512);
            assert!(length >= longest);
            longest = length;
            at = start + length + 1;
        }
        assert_eq!(longest, LARGEST);
        // What was prefetched is read now.
        assert_eq!(window.advance(at - 1000, 512, SIZE).unwrap().1, LARGEST);
        // And back.
        window.advance(0, 512, SIZE);
        assert_eq!(window.advance(100, 512, SIZE).unwrap().1, SMALLEST);
    }

    #[test]
    fn nothing_is_prefetched_behind_the_end() {
        let mut window = Window::default();
        assert_eq!(window.advance(0, 4096, 5000), Some((4096, 904)));
        assert_eq!(window.advance(4096, 904, 5000), None);
    }
}

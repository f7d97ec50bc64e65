//! Threads for calls that may wait, a device's for the most part: as many as there is work for, up to a bound. Where the system
//! has room for no more, those that are there do all of it.
//!
//! `smol::unblock` does the same but for the last sentence: blocking 1.7 tries to start the thread that there is no room for
//! until it succeeds, with its lock held, and every call in the process waits.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How many threads there are at most. One that waits costs little, and what it waits for does not end sooner for others.
const MOST: usize = 500;
/// How many calls may wait for each idle thread before there is one thread more: most calls are over in a moment.
const CALLS_PER_THREAD: usize = 5;
/// How long a thread without work stays. The last one always does.
const IDLE: Duration = Duration::from_secs(10);

type Call = Box<dyn FnOnce() + Send>;

/// The threads end when this is dropped and the calls that were put are made.
pub struct Pool(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    most: usize,
}

#[derive(Default)]
struct State {
    calls: VecDeque<Call>,
    threads: usize,
    /// How many of them make no call.
    idle: usize,
    is_over: bool,
}

impl Pool {
    /// One that has no thread yet, and at most `most`.
    fn of(most: usize) -> Pool {
        Pool(Arc::new(Shared { state: Mutex::default(), work: Condvar::new(), most }))
    }

    /// Starts the first thread, which stays. Errors: there is no room for it.
    pub fn start(&self) -> io::Result<()> {
        let mut state = self.0.state();
        if state.threads > 0 { Ok(()) } else { Shared::add_thread(&self.0, &mut state) }
    }

    /// Makes `call` on a thread, and passes on its panic. Dropped before that has begun, it is not made; after that it is, and
    /// its result is lost.
    pub async fn unblock<T: Send + 'static>(&self, call: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = async_channel::bounded(1);
        self.put(move || {
            if !done.is_closed() {
                // Whoever asked may have gone meanwhile.
                let _ = done.try_send(catch_unwind(AssertUnwindSafe(call)));
            }
        });
        let result = result.recv().await.expect("every call that was put is made, and sends");
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Has `call` made on a thread. What it panics with is lost.
    pub fn put(&self, call: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state();
        state.calls.push_back(Box::new(call));
        self.0.work.notify_one();
        Shared::grow(&self.0, &mut state);
        if state.threads == 0 {
            // Better here, where others wait for it, than never.
            let calls = std::mem::take(&mut state.calls);
            drop(state);
            calls.into_iter().for_each(make);
        }
    }
}

impl Default for Pool {
    fn default() -> Pool {
        Pool::of(MOST)
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state();
        f.debug_struct("Pool").field("threads", &state.threads).field("calls", &state.calls.len()).finish()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.0.state().is_over = true;
        self.0.work.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Calls are made without the lock, so that a panic leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts one more thread where there is work for it and room.
    fn grow(shared: &Arc<Shared>, state: &mut State) {
        if state.calls.len() > state.idle * CALLS_PER_THREAD && state.threads < shared.most {
            // Without it the calls wait for the others. It is tried again when the next call comes, or one is begun.
            let _ = Shared::add_thread(shared, state);
        }
    }

    fn add_thread(shared: &Arc<Shared>, state: &mut State) -> io::Result<()> {
        let its = Arc::clone(shared);
        // Detached: it ends when it has been idle for long, or with the pool.
        thread::Builder::new().name("nbd-call".to_owned()).spawn(move || Shared::work(&its))?;
        state.threads += 1;
        state.idle += 1;
        Ok(())
    }

    fn work(shared: &Arc<Shared>) {
        let mut state = shared.state();
        loop {
            if let Some(call) = state.calls.pop_front() {
                state.idle -= 1;
                Shared::grow(shared, &mut state);
                drop(state);
                make(call);
                state = shared.state();
                state.idle += 1;
                continue;
            }
            if state.is_over {
                break;
            }
            let (woken, waited) = shared.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            if waited.timed_out() && state.calls.is_empty() && state.threads > 1 {
                break;
            }
        }
        state.idle -= 1;
        state.threads -= 1;
    }
}

fn make(call: Call) {
    let _ = catch_unwind(AssertUnwindSafe(call));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::mpsc;

    #[test]
    fn calls_that_wait_for_each_other_all_get_a_thread() {
        const CALLS: usize = 40;
        let pool = Pool::default();
        let all = Arc::new(Barrier::new(CALLS + 1));
        for _ in 0..CALLS {
            let all = Arc::clone(&all);
            pool.put(move || {
                all.wait();
            });
        }
        all.wait();
    }

    #[test]
    fn one_thread_makes_all_calls_in_their_order_and_without_any_they_are_made_at_once() {
        for most in [1, 0] {
            let pool = Pool::of(most);
            assert_eq!(pool.0.state().threads, 0);
            let (made, calls) = mpsc::channel();
            for number in 0..100 {
                let made = made.clone();
                pool.put(move || made.send((number, thread::current().id())).unwrap());
            }
            drop(made);
            let (numbers, threads): (Vec<_>, Vec<_>) = calls.iter().unzip();
            assert!(numbers.into_iter().eq(0..100));
            assert!(threads.iter().all(|one| *one == threads[0]));
            assert_eq!(threads[0] == thread::current().id(), most == 0);
        }
    }

    #[test]
    fn a_result_comes_back_and_a_panic_too() {
        let pool = Pool::default();
        assert_eq!(smol::block_on(pool.unblock(|| 5)), 5);
        let panic = catch_unwind(AssertUnwindSafe(|| smol::block_on(pool.unblock(|| panic!("on purpose")))));
        assert_eq!(panic.unwrap_err().downcast_ref(), Some(&"on purpose"));
        assert_eq!(smol::block_on(pool.unblock(|| 6)), 6, "the thread goes on");
    }

    #[test]
    fn a_call_that_nobody_waits_for_any_more_is_not_begun() {
        let pool = Pool::of(1);
        let (go, wait) = mpsc::channel::<()>();
        pool.put(move || wait.recv().unwrap());
        let (made, calls) = mpsc::channel::<()>();
        let mut unwanted = Box::pin(pool.unblock(move || made.send(())));
        assert!(smol::block_on(smol::future::poll_once(&mut unwanted)).is_none());
        drop(unwanted);
        go.send(()).unwrap();
        assert!(calls.recv().is_err());
    }

    #[test]
    fn threads_end_with_the_pool_once_all_calls_are_made() {
        let pool = Pool::default();
        pool.start().unwrap();
        assert_eq!(pool.0.state().threads, 1);
        let (made, calls) = mpsc::channel();
        for number in 0..20 {
            let made = made.clone();
            pool.put(move || made.send(number).unwrap());
        }
        drop(made);
        let shared = Arc::downgrade(&pool.0);
        drop(pool);
        assert_eq!(calls.iter().count(), 20);
        while shared.strong_count() > 0 {
            thread::yield_now();
        }
    }
}

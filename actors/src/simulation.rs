//! Made-up time and threads, for tests that run a whole server on one thread and the same way each time.
//!
//! Nothing here goes on by itself. Whoever runs the simulation ticks the executor until nothing more happens, and then decides
//! what happens next: one of the calls that a thread would make ([`Simulation::run_call`]), or the next moment at which a timer
//! fires ([`Simulation::advance`]). If there is neither, and somebody waits, the server hangs.
//!
//! Needs the crate's feature `simulation`. What runs in it must not wait for anything else: devices answer when they are called,
//! and clients come through [`crate::Server::clients`].

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// A call that a thread would make.
type Call = Box<dyn FnOnce() + Send>;

/// Time that stands still and threads that wait to be told. See the module.
pub struct Simulation {
    start: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Since `start`.
    now: Duration,
    /// Who is to be woken, by moment and then in the order in which they came.
    sleepers: BTreeMap<(Duration, u64), Waker>,
    next: u64,
    calls: Vec<Call>,
}

impl fmt::Debug for Simulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Simulation").field("elapsed", &self.elapsed()).finish_non_exhaustive()
    }
}

impl Simulation {
    /// A world in which nothing has happened yet.
    pub fn new() -> Arc<Simulation> {
        Arc::new(Simulation { start: Instant::now(), state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time in there. Moments are counted from when the simulation was made.
    pub fn now(&self) -> Instant {
        self.start + self.elapsed()
    }

    /// How much time has passed in there.
    pub fn elapsed(&self) -> Duration {
        self.state().now
    }

    /// Moves on to the next moment at which a timer fires, and wakes who waits for it. `false` if nobody waits.
    pub fn advance(&self) -> bool {
        let mut woken = Vec::new();
        {
            let mut state = self.state();
            let Some((&(moment, _), _)) = state.sleepers.first_key_value() else { return false };
            state.now = moment;
            while let Some(first) = state.sleepers.first_entry()
                && first.key().0 <= moment
            {
                woken.push(first.remove());
            }
        }
        woken.into_iter().for_each(Waker::wake);
        true
    }

    /// How many calls wait for a thread.
    pub fn calls(&self) -> usize {
        self.state().calls.len()
    }

    /// Makes the call number `index` of those that wait; they are in the order in which they came. `false` if there is none.
    pub fn run_call(&self, index: usize) -> bool {
        let mut state = self.state();
        if index >= state.calls.len() {
            return false;
        }
        let call = state.calls.remove(index);
        drop(state);
        call();
        true
    }

    pub(crate) fn put(&self, call: Call) {
        self.state().calls.push(call);
    }

    pub(crate) async fn unblock<T: Send + 'static>(&self, call: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = async_channel::bounded(1);
        self.put(Box::new(move || {
            // Whoever asked may have gone.
            let _ = done.try_send(call());
        }));
        match result.recv().await {
            Ok(result) => result,
            // Only at the end of a simulation that is thrown away with calls in it.
            Err(_) => std::future::pending().await,
        }
    }

    /// Ready when `delay` has passed in there.
    pub fn sleep(simulation: &Arc<Simulation>, delay: Duration) -> Sleep {
        let mut state = simulation.state();
        let key = (state.now.saturating_add(delay), state.next);
        state.next += 1;
        drop(state);
        Sleep { simulation: Arc::clone(simulation), key }
    }
}

/// See [`Simulation::sleep`].
pub struct Sleep {
    simulation: Arc<Simulation>,
    key: (Duration, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.simulation.state();
        if state.now >= self.key.0 {
            return Poll::Ready(());
        }
        state.sleepers.insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let forgotten = self.simulation.state().sleepers.remove(&self.key);
        // Outside the lock: a waker may be anybody's.
        drop(forgotten);
    }
}

//! Time and threads, as the actors have them: the system's, or those of a simulation.
//!
//! No other file asks for the time, sets a timer or starts something on a thread that may wait, so that a whole server can be
//! run through hours of its life in a moment, and the same way again.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::pool::Pool;
#[cfg(feature = "simulation")]
use crate::simulation::{Simulation, Sleep};

/// Cheap to clone. The default is the system's.
#[derive(Clone, Debug, Default)]
pub(crate) struct World {
    pool: Arc<Pool>,
    #[cfg(feature = "simulation")]
    pub simulation: Option<Arc<Simulation>>,
}

impl World {
    pub(crate) fn now(&self) -> Instant {
        #[cfg(feature = "simulation")]
        if let Some(simulation) = &self.simulation {
            return simulation.now();
        }
        Instant::now()
    }

    /// Fires once, `delay` from now.
    pub(crate) fn after(&self, delay: Duration) -> Timer {
        #[cfg(feature = "simulation")]
        if let Some(simulation) = &self.simulation {
            return Timer(Kind::Simulated(Simulation::sleep(simulation, delay)));
        }
        Timer(Kind::System(smol::Timer::after(delay)))
    }

    /// Starts the first of the threads that may wait. Errors: there is no room for it.
    pub(crate) fn start(&self) -> std::io::Result<()> {
        #[cfg(feature = "simulation")]
        if self.simulation.is_some() {
            return Ok(());
        }
        self.pool.start()
    }

    /// Makes `call` on a thread that may wait. Dropped, the call may be made all the same, and its result is lost.
    pub(crate) async fn unblock<T: Send + 'static>(&self, call: impl FnOnce() -> T + Send + 'static) -> T {
        #[cfg(feature = "simulation")]
        if let Some(simulation) = &self.simulation {
            return simulation.unblock(call).await;
        }
        self.pool.unblock(call).await
    }

    /// As [`World::unblock`], for a call that tells its end itself.
    pub(crate) fn unblock_detached(&self, call: impl FnOnce() + Send + 'static) {
        #[cfg(feature = "simulation")]
        if let Some(simulation) = &self.simulation {
            return simulation.put(Box::new(call));
        }
        self.pool.put(call);
    }
}

/// Ready once it has fired; after that it must not be polled. Dropped, it never fires.
pub(crate) struct Timer(Kind);

enum Kind {
    System(smol::Timer),
    #[cfg(feature = "simulation")]
    Simulated(Sleep),
}

impl Timer {
    /// One that never fires.
    pub(crate) fn never() -> Timer {
        Timer(Kind::System(smol::Timer::never()))
    }

    /// Whether it was set and has not fired.
    pub(crate) fn will_fire(&self) -> bool {
        match &self.0 {
            Kind::System(timer) => timer.will_fire(),
            #[cfg(feature = "simulation")]
            Kind::Simulated(_) => true,
        }
    }
}

impl Future for Timer {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.0 {
            Kind::System(timer) => Pin::new(timer).poll(cx).map(drop),
            #[cfg(feature = "simulation")]
            Kind::Simulated(sleep) => Pin::new(sleep).poll(cx),
        }
    }
}

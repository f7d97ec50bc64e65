//! Watches the process that the server is to live as long as (`--exit-with-parent`). Tells only the Coordinator. Ends with
//! its message.
//!
//! The process is watched by pidfd, which is readable when its last thread has ended, reaped or not, and stays quiet when one
//! thread of several ends or another executes a program. Source: pidfd_open(2).

use std::io;
use std::os::fd::OwnedFd;

use async_io::Async;

use crate::coordinator::{self, Cause};

/// Waits for the process behind `pidfd`. Dropped, nothing is told.
pub(crate) async fn run(pidfd: OwnedFd, coordinator: coordinator::Handle) {
    let _guard = coordinator.guard("the ParentWatcher");
    let ended = async {
        let source = Async::new_nonblocking(pidfd)?;
        source.readable().await?;
        io::Result::Ok(())
    };
    let cause = match ended.await {
        Ok(()) => Cause::ParentEnded,
        // Better to end than to outlive a parent that cannot be seen.
        Err(error) => Cause::Fatal(format!("cannot watch the parent process: {error}")),
    };
    coordinator.shut_down(cause);
}

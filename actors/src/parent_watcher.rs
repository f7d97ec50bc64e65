//! Watches the process that the server is to live as long as (`--exit-with-parent`). Tells only the Coordinator. Ends with
//! its message.
//!
//! The process is watched through a descriptor that is readable when its last thread has ended, reaped or not, and stays
//! quiet when one thread of several ends or another executes a program: a pidfd on Linux, a kqueue elsewhere. Where there is
//! neither, it is asked for again and again. Source: pidfd_open(2), kqueue(2).

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use async_io::Async;

use crate::coordinator::{self, Cause};
use crate::world::World;

/// How often a process is asked for that cannot be watched.
const ASK: Duration = Duration::from_millis(50);

/// How the end of the process shows.
pub(crate) enum Parent {
    /// This is readable then.
    Watched(OwnedFd),
    /// This is true from then on.
    Polled(Box<dyn FnMut() -> bool + Send>),
}

/// A descriptor that is readable when the process `pid` has ended, for [`crate::Server::parent`]. `None`: there is no such
/// process. Errors: there are no such descriptors here, or no more of them.
///
/// The number may be another process's by the time it is looked at. Who watches a parent looks afterwards whether it still
/// is the parent.
pub fn watch_process(pid: i32) -> io::Result<Option<OwnedFd>> {
    system::watch(pid)
}

/// Linux: a pidfd.
#[cfg(any(target_os = "linux", target_os = "android"))]
mod system {
    use std::io;
    use std::os::fd::OwnedFd;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    pub(super) fn watch(pid: i32) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(pid) else { return Ok(None) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Some(pidfd)),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// FreeBSD and macOS: a kqueue, which is itself readable when it has an event, and here it can have one only.
#[cfg(any(target_os = "freebsd", target_vendor = "apple"))]
mod system {
    use std::io;
    use std::os::fd::OwnedFd;

    use nix::errno::Errno;
    use nix::sys::event::{EvFlags, EventFilter, FilterFlag, KEvent, Kqueue};

    pub(super) fn watch(pid: i32) -> io::Result<Option<OwnedFd>> {
        let Ok(number) = usize::try_from(pid) else { return Ok(None) };
        let queue = Kqueue::new()?;
        let exit = KEvent::new(number, EventFilter::EVFILT_PROC, EvFlags::EV_ADD, FilterFlag::NOTE_EXIT, 0, 0);
        // Without room for events an error in the change is the call's error.
        match queue.kevent(&[exit], &mut [], None) {
            Ok(_) => Ok(Some(queue.into())),
            // macOS says so of a process that has ended and was not waited for, too.
            Err(Errno::ESRCH) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd", target_vendor = "apple")))]
mod system {
    use std::io;
    use std::os::fd::OwnedFd;

    pub(super) fn watch(_pid: i32) -> io::Result<Option<OwnedFd>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Waits for the process to end. Dropped, nothing is told.
pub(crate) async fn run(parent: Parent, coordinator: coordinator::Handle, world: World) {
    let _guard = coordinator.guard("the ParentWatcher");
    let ended = async {
        match parent {
            Parent::Watched(descriptor) => Async::new_nonblocking(descriptor)?.readable().await?,
            Parent::Polled(mut has_ended) => {
                while !has_ended() {
                    world.after(ASK).await;
                }
            }
        }
        io::Result::Ok(())
    };
    let cause = match ended.await {
        Ok(()) => Cause::ParentEnded,
        // Better to end than to outlive a parent that cannot be seen.
        Err(error) => Cause::Fatal(format!("cannot watch the parent process: {error}")),
    };
    coordinator.shut_down(cause);
}

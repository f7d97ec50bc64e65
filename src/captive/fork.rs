//! fork(2), where it is sound: in a process with one thread.

use std::io;

use nix::unistd::{ForkResult, Pid, fork};

/// Which of the two processes this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that called; with the child's pid.
    Parent(Pid),
    /// The new one.
    Child,
}

/// Makes a second process. Errors: the system has no room for one, or this process has more than one thread.
pub fn split() -> io::Result<Side> {
    // Another thread could hold a lock, of the allocator say, which nobody in the child would ever release.
    if std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() > 1) {
        return Err(io::Error::other("cannot fork a process that has threads"));
    }
    // SAFETY: with one thread the child is a whole copy of its parent, and may do all that the parent may. Where /proc is not
    // mounted, the callers' order holds: all forks come before the first thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Side::Parent(child)),
        ForkResult::Child => Ok(Side::Child),
    }
}

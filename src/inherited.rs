//! What the caller gave this process: signal mask, dispositions, umask, closed descriptors. Taken at the first instruction,
//! given back to the command of `--run` at the last before its program.
//!
//! Between the two every signal that can be is blocked, so that none is lost and none kills a process half way; they are read
//! from a signalfd. Source: LSB and POSIX sigaction(2), sigprocmask(2); Linux signalfd(2): a blocked signal is kept even
//! where it is ignored.

use std::os::fd::AsRawFd;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};
use nix::sys::stat::{Mode, umask};

/// Signals that say that this process itself is broken. Blocking them would hide it.
const FAULTS: [Signal; 7] =
    [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP, Signal::SIGABRT, Signal::SIGSYS];

/// The caller's.
#[derive(Debug)]
pub struct Inherited {
    mask: SigSet,
    umask: Mode,
    ignored_hangup: bool,
    child: Option<SigAction>,
}

/// Every signal that is read and not suffered.
pub fn all_signals() -> SigSet {
    let mut set = SigSet::all();
    FAULTS.iter().for_each(|fault| set.remove(*fault));
    set
}

impl Inherited {
    /// Takes over: blocks all signals, lets children be waited for, fills closed descriptors 0 to 2 so that none of ours can
    /// land there. To be called once, before any thread and any descriptor exists.
    pub fn take() -> Inherited {
        let mut mask = SigSet::empty();
        // None of these can fail with these arguments.
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all_signals()), Some(&mut mask));
        fill_closed_descriptors();
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler is the default one, no code of ours.
        let child = unsafe { sigaction(Signal::SIGCHLD, &default) }.ok();
        let hangup = disposition(Signal::SIGHUP);
        Inherited {
            mask,
            umask: umask(Mode::from_bits_truncate(0o022)),
            ignored_hangup: matches!(hangup.map(|action| action.handler()), Some(SigHandler::SigIgn)),
            child,
        }
    }

    /// Whether the caller had SIGHUP ignored, as nohup(1) does: then it stays so.
    pub fn ignores_hangup(&self) -> bool {
        self.ignored_hangup
    }

    /// Lets SIGHUP be ignored at once, and not be read, in this process and the threads that it will start; if the caller had it
    /// ignored.
    pub fn stay_deaf_to_hangup(&self) {
        if self.ignored_hangup {
            let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&SigSet::from_iter([Signal::SIGHUP])), None);
        }
    }

    /// Gives all of it back. To be called in the command's process, right before its program is executed. Descriptors that
    /// were closed are so again then, because what fills them is closed by exec.
    pub fn give_back(&self) {
        umask(self.umask);
        if let Some(action) = &self.child {
            // SAFETY: handlers do not outlive exec, so this was the default or "ignore", no code.
            let _ = unsafe { sigaction(Signal::SIGCHLD, action) };
        }
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.mask), None);
    }
}

/// Closes the caller's descriptor `number`, if there is one, when this process executes a program.
pub fn close_at_exec(number: i32) {
    // SAFETY: fcntl(2) with F_SETFD touches no memory; a number that is not open is refused. The descriptor is the caller's,
    // and nothing in this process owns it.
    unsafe { nix::libc::fcntl(number, nix::libc::F_SETFD, nix::libc::FD_CLOEXEC) };
}

/// What is done on `signal` now.
fn disposition(signal: Signal) -> Option<SigAction> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: both are the default or "ignore", no code of ours, and the signal is blocked in between.
    unsafe {
        let was = sigaction(signal, &default).ok()?;
        let _ = sigaction(signal, &was);
        Some(was)
    }
}

fn fill_closed_descriptors() {
    use nix::fcntl::{OFlag, open};
    // The lowest free number is taken, so this fills the gaps from below; the first that lands higher shows that there are
    // no more gaps, and is closed again.
    while let Ok(null) = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()) {
        if null.as_raw_fd() > 2 {
            break;
        }
        std::mem::forget(null);
    }
}

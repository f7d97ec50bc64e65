//! The end of a process.

/// Ends this process with `status`, at once. What libraries have put in place for an orderly end (OpenSSL and aws-lc give back what
/// they have) is left out: the kernel gives back all of it in less time, and a thread that still waits for a device may be using
/// it. Whole lines on stdout are out already; nothing else may be written there. Source: _exit(2), atexit(3).
pub fn leave(status: i32) -> ! {
    // SAFETY: it takes a number and does not come back, so that nothing here can be used wrongly after it.
    unsafe { nix::libc::_exit(status) }
}

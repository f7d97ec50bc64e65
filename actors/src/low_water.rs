//! `SO_RCVLOWAT`: how many bytes make a socket readable. Neither nix nor rustix has it.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::libc;

/// Sets it. Errors: not a socket. Source: socket(7); for TCP Linux tells at once what is readable by the new mark.
pub(crate) fn set(socket: &impl AsFd, count: i32) -> nix::Result<()> {
    // SAFETY: the option's value is an int, which is read during the call and not kept.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const count).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

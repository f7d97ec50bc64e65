//! Socket options that neither nix nor rustix has.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::libc;

/// The longest label, in bytes; Linux has none that is longer than a page.
#[cfg(any(target_os = "linux", target_os = "android"))]
const LABEL: usize = 4096;

/// Sets `SO_RCVLOWAT`, how many bytes make a socket readable. Errors: not a socket. Source: socket(7); for TCP Linux tells at
/// once what is readable by the new mark.
pub(crate) fn set_low_water(socket: &impl AsFd, count: i32) -> nix::Result<()> {
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

/// `SIOCOUTQ`, how many bytes a socket holds that the other end has not taken, and what the kernel needs to hold them. Errors:
/// not a socket. Source: Linux net/unix/af_unix.c `unix_outq_len`; of TCP it tells something else.
pub(crate) fn unsent(socket: &impl AsFd) -> nix::Result<u32> {
    let mut count: libc::c_int = 0;
    // SAFETY: an int is written to `count` during the call.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    Errno::result(result).map(|_| count.try_into().unwrap_or(0))
}

/// `SO_PEERSEC`, the label that a security module (SELinux, Smack, AppArmor) has given the other end. `None`: there is no such
/// module, or it has no label for it. Source: socket(7); nbdkit server/public.c `nbdkit_peer_security_context`.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn peer_label(socket: impl AsFd) -> Option<Vec<u8>> {
    let mut label = [0; LABEL];
    let mut length = LABEL as libc::socklen_t;
    // SAFETY: at most `length` bytes are written to `label`, which is as long, and to `length` how many they were; both during
    // the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERSEC,
            label.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(result).ok()?;
    let label = label.get(..length as usize)?;
    // Whether there is a NUL byte at the end is up to the module.
    label.split(|byte| *byte == 0).next().map(<[u8]>::to_vec)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn peer_label(_socket: impl AsFd) -> Option<Vec<u8>> {
    None
}

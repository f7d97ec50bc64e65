//! The system log, through its socket. The C library's syslog(3) waits while the log's reader is behind; this does not.
//! Source: RFC 3164 and syslog(3) for the lines; nbdkit server/log-syslog.c for facility and severity.

use std::fmt;
use std::os::unix::net::UnixDatagram;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::identity;

/// Where the system's log listens.
#[cfg(not(any(target_os = "freebsd", target_vendor = "apple")))]
const LOG: &str = "/dev/log";
#[cfg(target_os = "freebsd")]
const LOG: &str = "/var/run/log";
#[cfg(target_vendor = "apple")]
const LOG: &str = "/var/run/syslog";

/// `LOG_DAEMON | LOG_ERR`.
const PRIORITY: u32 = (3 << 3) | 3;

/// A way to the system log.
#[derive(Debug)]
pub(super) struct Syslog {
    /// Made once, so that a shortage of descriptors can be logged. None: there was a shortage already, and nothing is.
    socket: Option<UnixDatagram>,
    path: &'static str,
}

impl Syslog {
    /// To the log of this system, if there is one.
    pub(super) fn new() -> Syslog {
        Syslog::at(LOG)
    }

    fn at(path: &'static str) -> Syslog {
        let socket = UnixDatagram::unbound().and_then(|socket| socket.set_nonblocking(true).map(|()| socket));
        Syslog { socket: socket.ok(), path }
    }

    /// Sends a line. One that nobody takes now is dropped.
    pub(super) fn write(&self, line: fmt::Arguments<'_>) {
        let Some(socket) = &self.socket else { return };
        let text = format!("<{PRIORITY}>{}{}[{}]: {line}", Now, identity::name(), std::process::id());
        // Addressed anew each time: a log that was restarted is found again.
        let _ = socket.send_to(text.as_bytes(), self.path);
    }
}

/// The local time as RFC 3164 has it, with a space behind it, or nothing where it is not known.
struct Now;

impl fmt::Display for Now {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let Ok(seconds) = nix::libc::time_t::try_from(seconds) else { return Ok(()) };
        let mut broken = std::mem::MaybeUninit::<nix::libc::tm>::zeroed();
        // SAFETY: both pointers are to memory of ours of the right type, and zeroes are a valid `tm`.
        let time = unsafe {
            nix::libc::localtime_r(&seconds, broken.as_mut_ptr());
            broken.assume_init()
        };
        let month = usize::try_from(time.tm_mon).ok().and_then(|month| MONTHS.get(month)).unwrap_or(&MONTHS[0]);
        write!(f, "{month} {:2} {:02}:{:02}:{:02} ", time.tm_mday, time.tm_hour, time.tm_min, time.tm_sec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_is_not_there_or_does_not_read_holds_nobody_up() {
        Syslog::at("/nowhere/log").write(format_args!("lost"));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = UnixDatagram::bind(&path).unwrap();
        let syslog = Syslog::at(Box::leak(path.to_str().unwrap().to_owned().into_boxed_str()));
        // More than any queue holds.
        for number in 0..10_000 {
            syslog.write(format_args!("line {number}"));
        }
        std::fs::remove_file(&path).unwrap();
        let mut buffer = [0; 1000];
        let length = log.recv(&mut buffer).unwrap();
        let text = std::str::from_utf8(&buffer[..length]).unwrap();
        assert!(text.starts_with("<27>"), "{text}");
        assert!(text.ends_with(&format!(" nbdcaptive[{}]: line 0", std::process::id())), "{text}");
    }
}

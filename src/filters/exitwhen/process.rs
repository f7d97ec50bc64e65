//! A process that is waited for. It has exited when its last thread has, whether or not anybody has waited for it: a pidfd is
//! readable then. Once it is open the number may be given to another process, and nothing is mistaken for anything.
//! Source: pidfd_open(2); nbdkit keeps /proc/PID/stat open instead, as this does where there are no pidfds.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use async_io::Timer;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{is_readable, readable};

/// How often it is looked at where it cannot be watched.
const LOOK: Duration = Duration::from_secs(1);

/// A process that was there when it was taken hold of.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    watch: Watch,
}

#[derive(Debug)]
enum Watch {
    Pidfd(OwnedFd),
    /// Its `/proc/PID/stat`, held open: it says ESRCH when the process is gone, whoever has its number then.
    Stat(File),
}

impl Process {
    /// Takes hold of a process; `None` if there is none of that number. Errors: the number is a thread's, or it cannot be
    /// looked at, as a line.
    pub fn take(pid: i32) -> Result<Option<Process>, String> {
        let Some(process) = Pid::from_raw(pid) else { return Ok(None) };
        match pidfd_open(process, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Some(Process { pid, watch: Watch::Pidfd(pidfd) })),
            Err(Errno::SRCH) => Ok(None),
            Err(Errno::INVAL | Errno::NOENT) => Err(format!("{pid} is a thread and not a process")),
            // An old kernel, or one that is told to behave like one.
            Err(_) => Process::take_by_stat(pid),
        }
    }

    fn take_by_stat(pid: i32) -> Result<Option<Process>, String> {
        let path = format!("/proc/{pid}/stat");
        match File::open(&path) {
            Ok(stat) => Ok(Some(Process { pid, watch: Watch::Stat(stat) })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(format!("{path}: {error}")),
        }
    }

    /// Whether it has exited by now.
    pub fn has_exited(&self) -> bool {
        match &self.watch {
            Watch::Pidfd(pidfd) => is_readable(pidfd, Duration::ZERO),
            Watch::Stat(stat) => {
                // A name of 15 bytes and 51 numbers.
                let mut text = [0; 2048];
                match stat.read_at(&mut text, 0) {
                    Ok(length) => is_dead(&text[..length]),
                    Err(error) => error.raw_os_error() == Some(Errno::SRCH.raw_os_error()),
                }
            }
        }
    }

    /// Done when it has exited.
    pub async fn exits(&self) -> String {
        match &self.watch {
            Watch::Pidfd(pidfd) => readable(pidfd, LOOK).await,
            Watch::Stat(_) => {
                while !self.has_exited() {
                    Timer::after(LOOK).await;
                }
            }
        }
        self.line()
    }

    /// What has happened.
    pub fn line(&self) -> String {
        format!("exit-when-process-exits: process {} has exited", self.pid)
    }
}

/// Whether a line of `/proc/PID/stat` is that of a process without a living thread. The state alone does not say it: it is
/// that of the first thread, which may have ended before the others. Source: proc(5).
fn is_dead(stat: &[u8]) -> bool {
    // The name is in parentheses and may hold any byte, parentheses too.
    let rest = stat.iter().rposition(|byte| *byte == b')').and_then(|end| stat.get(end + 1..)).unwrap_or_default();
    let fields: Vec<_> = rest.split(|byte| *byte == b' ').filter(|field| !field.is_empty()).collect();
    // The third field of all, and the 20th, the number of threads: 0 for a zombie whose threads are all gone.
    matches!(fields.first(), Some(&(b"Z" | b"X"))) && matches!(fields.get(17), Some(&(b"0" | b"1")))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::super::tests::within;
    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    fn both_ways(child: &Child) -> [Process; 2] {
        let pid = child.id().cast_signed();
        [Process::take(pid).unwrap().unwrap(), Process::take_by_stat(pid).unwrap().unwrap()]
    }

    /// D5: "at exit not at reap"
    #[test]
    fn an_exit_is_seen_before_anybody_has_waited() {
        let mut child = sleeper();
        let watched = both_ways(&child);
        assert!(!watched.iter().any(Process::has_exited));
        child.kill().unwrap();
        for process in watched {
            let line = process.line();
            assert_eq!(within(process.exits()), line);
        }
        // It can be taken hold of as long as nobody has waited, and has then exited already.
        assert!(both_ways(&child).iter().all(Process::has_exited));
        child.wait().unwrap();
    }

    #[test]
    fn an_exit_is_seen_after_somebody_has_waited() {
        let mut child = sleeper();
        let watched = both_ways(&child);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(watched.iter().all(Process::has_exited));
    }

    /// D6
    #[test]
    fn a_process_that_never_was_is_none() {
        // More than the kernel's limit, which is 2^22.
        assert!(Process::take(i32::MAX).unwrap().is_none());
        assert!(Process::take_by_stat(i32::MAX).unwrap().is_none());
        assert!(Process::take(0).unwrap().is_none());
    }

    #[test]
    fn a_thread_is_no_process() {
        let (tell, hear) = std::sync::mpsc::channel();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = stopped.recv();
        });
        let tid = hear.recv().unwrap();
        assert_eq!(Process::take(tid).unwrap_err(), format!("{tid} is a thread and not a process"));
        drop(stop);
        thread.join().unwrap();
    }

    /// D7: "its leader thread exits, process lives"
    #[test]
    fn a_process_is_dead_when_its_last_thread_is() {
        let stat = |state: &str, threads: u32| {
            format!("7 (a) Z (b) {state} 1 7 7 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 {threads} 0 9\n").into_bytes()
        };
        assert!(is_dead(&stat("Z", 0)) && is_dead(&stat("Z", 1)) && is_dead(&stat("X", 0)));
        assert!(!is_dead(&stat("Z", 2)) && !is_dead(&stat("S", 1)) && !is_dead(b"") && !is_dead(b"7 (a)"));
    }
}

//! A small process beside a server without a command, which removes the server's socket and pid file should the server be
//! killed before it can do so itself.
//!
//! The server is the process that the caller started, so that `$!`, the pid file, a debugger and a service manager all mean the
//! same process; hence the sweeper is its child and not its parent. It has a session of its own, holds nothing of the
//! caller's, and waits at a pipe: a byte means that the server has swept itself, the end that it was killed.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, setsid};

use crate::captive::fork::{Side, split};
use crate::cli::Options;
use crate::leave::leave;
use crate::listen::{self, PrivateDirectory};

/// The server's side of it.
#[derive(Debug)]
pub struct Sweeper {
    pid: Pid,
    pipe: PipeWriter,
}

impl Sweeper {
    /// Starts a sweeper for this process. To be called without threads. Errors: there is no room for a process.
    pub fn start(options: &Options, private: Option<&PrivateDirectory>) -> io::Result<Sweeper> {
        let (reader, pipe) = io::pipe()?;
        let server = std::process::id().cast_signed();
        match split()? {
            Side::Parent(pid) => Ok(Sweeper { pid, pipe }),
            Side::Child => {
                drop(pipe);
                if !watch(reader).unwrap_or(false) {
                    listen::sweep(options, private, server);
                }
                leave(0);
            }
        }
    }

    /// The process's number.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Ends the sweeper, whose work is done, and waits for its end.
    pub fn dismiss(mut self) {
        // If it was killed, there is nobody to tell.
        let _ = self.pipe.write_all(&[0]);
        self.sweep();
    }

    /// Lets the sweeper do its work, unless it was told that this is done, and waits for its end.
    pub fn sweep(self) {
        drop(self.pipe);
        while waitpid(self.pid, None) == Err(Errno::EINTR) {}
    }

    /// Waits for a sweeper that was killed, so that no zombie stays.
    pub fn reap(pid: Pid) {
        let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
    }
}

/// Whether the server ended orderly.
fn watch(mut pipe: PipeReader) -> io::Result<bool> {
    let _ = nix::sys::prctl::set_name(c"nbdsweep");
    setsid()?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(null.as_fd())?;
    nix::unistd::dup2_stdout(null.as_fd())?;
    nix::unistd::dup2_stderr(null.as_fd())?;
    let mut byte = [0];
    Ok(pipe.read(&mut byte)? > 0)
}

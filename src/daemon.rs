//! Going into the background: the process that the caller started waits until the server is ready, says how that went by its
//! exit status, and leaves the server behind in a session of its own. Source: nbdkit server/background.c, daemon(7).

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};

use crate::captive::fork::{Side, split};
use crate::cli::Options;
use crate::inherited::{Inherited, all_signals};
use crate::leave::leave;
use crate::listen::Activation;
use crate::report::Report;
use crate::server;

/// Who waits for a server that is going into the background.
#[derive(Debug)]
pub struct Launcher(PipeWriter);

impl Launcher {
    /// Tells the launcher that all is well, although there is nothing to serve. It may be gone, and does not matter then.
    pub fn dismiss(mut self) {
        let _ = self.0.write_all(&[0]);
    }

    /// Lets go of the caller's directory and descriptors 0 to 2, and tells the launcher that all is well. Dropped instead, the
    /// launcher waits for this process to end and takes over its status. With `keep_stderr` what `-v` says goes on to be said
    /// to the caller. Errors: the launcher was killed, and nobody knows of this server.
    pub fn detach(mut self, keep_stderr: bool) -> io::Result<()> {
        std::env::set_current_dir("/")?;
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stdin(null.as_fd())?;
        nix::unistd::dup2_stdout(null.as_fd())?;
        // Told before stderr is let go: what fails up to here is said to the caller.
        self.0.write_all(&[0])?;
        if !keep_stderr {
            nix::unistd::dup2_stderr(null.as_fd())?;
        }
        Ok(())
    }
}

/// Serves in the background; returns in the foreground when the server is ready or has failed, with the exit status.
/// To be called in a process without threads.
pub fn run(options: &Options, inherited: &Inherited) -> i32 {
    let attempt = || -> io::Result<i32> {
        let (reader, writer) = io::pipe()?;
        match split()? {
            Side::Parent(server) => {
                drop(writer);
                wait(reader, server, inherited)
            }
            Side::Child => {
                drop(reader);
                let daemon = Some(Launcher(writer));
                let role = server::Role::Alone { inherited, daemon, activated: Activation::default() };
                let status = match setsid() {
                    Ok(_) => server::run(options, role),
                    Err(_) => 1,
                };
                leave(status);
            }
        }
    };
    attempt().unwrap_or_else(|error| {
        Report::early().error(format_args!("cannot start: {error}"));
        1
    })
}

/// Waits for the server's word that it is ready, or for its end. Signals that ask for the end are the server's: it has left
/// our session and hears of none by itself.
fn wait(mut reader: PipeReader, server: Pid, inherited: &Inherited) -> io::Result<i32> {
    let signals = SignalFd::with_flags(&all_signals(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    loop {
        let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        // An interruption is as good as an event: both are looked at.
        let _ = poll(&mut fds, PollTimeout::NONE);
        let told = fds[0].any().unwrap_or(false);
        while let Ok(Some(info)) = signals.read_signal() {
            let signal = Signal::try_from(info.ssi_signo as i32);
            if let Ok(signal @ (Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM | Signal::SIGHUP)) = signal
                && !(signal == Signal::SIGHUP && inherited.ignores_hangup())
            {
                // Our child, not waited for.
                let _ = kill(server, signal);
            }
        }
        if told {
            break;
        }
    }
    // One byte and not to the end: a sweeper holds the other end for as long as the server lives.
    let mut word = [0];
    if reader.read(&mut word)? > 0 {
        return Ok(0);
    }
    Ok(match waitpid(server, None)? {
        WaitStatus::Exited(_, status) if status != 0 => status,
        WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
        _ => 1,
    })
}

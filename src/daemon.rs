//! Going into the background: the process that the caller started waits until the server is ready, says how that went by its
//! exit status, and leaves the server behind in a session of its own. Source: nbdkit server/background.c, daemon(7).

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;

use nix::unistd::setsid;

use crate::captive::fork::{Side, split};
use crate::cli::Options;
use crate::inherited::Inherited;
use crate::report::Report;
use crate::server;

/// Who waits for a server that is going into the background.
#[derive(Debug)]
pub struct Launcher(PipeWriter);

impl Launcher {
    /// Lets go of the caller's session, directory and descriptors 0 to 2, and tells the launcher that all is well. Dropped
    /// instead, the launcher waits for this process to end and takes over its status.
    pub fn detach(mut self) -> io::Result<()> {
        std::env::set_current_dir("/")?;
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
        // Told first: stderr is the launcher's to the last moment.
        self.0.write_all(&[0])?;
        nix::unistd::dup2_stdin(null.as_fd())?;
        nix::unistd::dup2_stdout(null.as_fd())?;
        nix::unistd::dup2_stderr(null.as_fd())?;
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
                wait(reader, server)
            }
            Side::Child => {
                drop(reader);
                let role = server::Role::Alone { inherited, daemon: Some(Launcher(writer)) };
                let status = match setsid() {
                    Ok(_) => server::run(options, role),
                    Err(_) => 1,
                };
                std::process::exit(status);
            }
        }
    };
    attempt().unwrap_or_else(|error| {
        Report::early().error(format_args!("cannot start: {error}"));
        1
    })
}

fn wait(mut reader: PipeReader, server: nix::unistd::Pid) -> io::Result<i32> {
    use nix::sys::wait::{WaitStatus, waitpid};
    let mut word = Vec::new();
    reader.read_to_end(&mut word)?;
    if !word.is_empty() {
        return Ok(0);
    }
    Ok(match waitpid(server, None)? {
        WaitStatus::Exited(_, status) if status != 0 => status,
        _ => 1,
    })
}

//! Lines to people on stderr, as nbdkit writes them. Never blocks, never fails: a line that cannot be written is dropped,
//! because a server that waits for its log serves nobody.
//! Source: nbdkit server/log-stderr.c, server/debug.c.

use std::fmt;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nbdcaptive_actors::SessionId;
use nbdcaptive_actors::log::{Level, Log};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cli::{LogTo, Options};

/// The name in front of every line.
pub const PROGRAM: &str = "nbdcaptive";

/// Where lines go.
#[derive(Debug, Clone)]
enum Sink {
    Stderr,
    Null,
    File(Arc<OwnedFd>),
}

/// Lines of this process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Report {
    verbose: bool,
    sink: Sink,
    plugin: Option<String>,
}

impl Report {
    /// To stderr, errors only: for the time before the options are known.
    pub fn early() -> Report {
        Report { verbose: false, sink: Sink::Stderr, plugin: None }
    }

    /// As the options say. Errors: the log file cannot be opened, as a line for people.
    pub fn new(options: &Options) -> Result<Report, String> {
        let sink = match &options.log {
            LogTo::Null => Sink::Null,
            LogTo::File(path) => {
                let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
                Sink::File(Arc::new(file.map_err(|error| format!("{}: {error}", path.display()))?.into()))
            }
            LogTo::Default | LogTo::Stderr | LogTo::Syslog => Sink::Stderr,
        };
        Ok(Report { verbose: options.verbose, sink, plugin: None })
    }

    /// Names the plugin in lines about clients.
    pub fn about_plugin(mut self, name: &str) -> Report {
        self.plugin = Some(name.to_owned());
        self
    }

    /// Something that failed.
    pub fn error(&self, line: impl fmt::Display) {
        self.write(format_args!("{PROGRAM}: error: {line}\n"));
    }

    /// Something that a person should know, without "error".
    pub fn say(&self, line: impl fmt::Display) {
        self.write(format_args!("{PROGRAM}: {line}\n"));
    }

    /// Something for `-v`.
    pub fn debug(&self, line: impl fmt::Display) {
        if self.verbose {
            self.write(format_args!("{PROGRAM}: debug: {line}\n"));
        }
    }

    fn write(&self, line: fmt::Arguments<'_>) {
        let text = line.to_string();
        let stderr = std::io::stderr();
        match &self.sink {
            Sink::Null => {}
            Sink::Stderr => write_unless_full(stderr.as_fd(), text.as_bytes()),
            Sink::File(file) => write_unless_full(file.as_fd(), text.as_bytes()),
        }
    }
}

fn write_unless_full(fd: std::os::fd::BorrowedFd<'_>, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // A pipe says that it is writable when at least this much fits.
        const AT_ONCE: usize = 4096;
        let mut ready = [PollFd::new(fd, PollFlags::POLLOUT)];
        if poll(&mut ready, PollTimeout::ZERO) != Ok(1) {
            return;
        }
        match nix::unistd::write(fd, &bytes[..bytes.len().min(AT_ONCE)]) {
            Ok(count) => bytes = &bytes[count..],
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}

impl Log for Report {
    fn wants(&self, level: Level) -> bool {
        level == Level::Error || self.verbose
    }

    fn line(&self, level: Level, session: Option<SessionId>, line: fmt::Arguments<'_>) {
        let what = match level {
            Level::Error => "error",
            Level::Debug => "debug",
        };
        match (session, &self.plugin) {
            (Some(id), Some(plugin)) => self.write(format_args!("{PROGRAM}: {plugin}[{id}]: {what}: {line}\n")),
            (Some(id), None) => self.write(format_args!("{PROGRAM}: [{id}]: {what}: {line}\n")),
            (None, _) => self.write(format_args!("{PROGRAM}: {what}: {line}\n")),
        }
    }
}

/// Writes `text` to stdout, for options that ask for it. A reader that has gone is no error of ours.
pub fn print(text: &[u8]) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text).and_then(|()| out.flush());
}

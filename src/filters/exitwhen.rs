//! `exitwhen`: after an event no more clients are taken, and the server ends when those that are there have left. What an
//! event does to the server is the engine's to know; here is how it is noticed, when it happens and not at the next look:
//!
//! | parameter | file | noticed by |
//! |---|---|---|
//! | `exit-when-file-created`, `-deleted` | `files.rs` | inotify on every directory that the name leads through |
//! | `exit-when-process-exits` | `process.rs` | pidfd |
//! | `exit-when-pipe-closed` | `pipe.rs` | epoll, for the other end's closing only |
//! | `exit-when-script` | `script.rs` | running it every `exit-when-poll` seconds |
//!
//! Names, processes and descriptors are taken hold of when the parameter is read, so what happens from then on is seen, and
//! what had happened before ends the server before it starts. Where the system has no such thing (network file systems, old
//! kernels), looking every `exit-when-poll` seconds stands in for it.
//! Source: nbdkit filters/exitwhen/exitwhen.c, filters/exitwhen/nbdkit-exitwhen-filter.pod.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_io::{Async, Timer};
use nbdcaptive_actors::Event;
use nbdcaptive_actors::device::{self, Client, Error, ErrorCode, Exports, ThreadModel};
use nbdcaptive_actors::filter::{FilterExports, FilteredExports};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::kit::{optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

mod files;
mod pipe;
mod process;
mod script;

use files::{Files, Wanted};
use pipe::Pipe;
use process::Process;
use script::{Script, Verdict};

/// How long a server waits at its start for scripts to say whether the event has happened already: less than whoever waits
/// for the server's answer to a signal does. A script that takes longer, or hangs, is waited for while the server serves.
const FIRST_RUN: Duration = Duration::from_millis(500);

/// See the module.
pub static ABOUT: About = About {
    name: "exitwhen",
    summary: "take no more clients after an event, and end when the last has left

        After the first of the events that are given no new clients are taken, and a socket of `-U` is removed.
        Those that are connected are served until they leave; then the server ends, with status 0. With `--run` the
        command goes on, and its exit status counts. If an event has happened before the start, nothing is served
        and the command is never started.

        Files, processes and pipes are noticed when it happens; scripts are run every `exit-when-poll` seconds, and
        one that takes long delays nobody. All parameters but `exit-when-poll` may be given again.

        # Examples

            nbdcaptive -f -U /tmp/disk.sock --filter=exitwhen file disk.img \\
                exit-when-file-created=/tmp/stop
            nbdcaptive -f -U /tmp/disk.sock --filter=exitwhen file disk.img \\
                exit-when-process-exits=$PPID
        ",
    parameters: &[
        optional("exit-when-file-created", "<FILENAME>", "when this file is there and can be read"),
        optional("exit-when-file-deleted", "<FILENAME>", "when this file is no longer there"),
        optional("exit-when-pipe-closed", "<FD>", "when the other end of this pipe or socket is closed"),
        optional("exit-when-fd-closed", "<FD>", "another name for exit-when-pipe-closed"),
        optional("exit-when-process-exits", "<PID>", "when this process exits"),
        optional("exit-when-pid-exits", "<PID>", "another name for exit-when-process-exits"),
        optional("exit-when-script", "<SCRIPT>", "when this command of /bin/sh exits with status 88"),
        optional("exit-when-poll", "<SECS>", "run scripts this often, 60 unless given"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[
        ("exitwhen_file_created", "yes"),
        ("exitwhen_file_deleted", "yes"),
        ("exitwhen_process_exits", "yes"),
        ("exitwhen_pipe_closed", "yes"),
        ("exitwhen_script", "yes"),
    ],
};

/// The filter: all that may end the server, taken hold of but not waited for yet.
#[derive(Debug)]
pub struct ExitWhen {
    files: Files,
    processes: Vec<Arc<Process>>,
    pipes: Vec<Arc<Pipe>>,
    scripts: Vec<Script>,
    poll: Duration,
    /// What had happened before we looked.
    already: Option<String>,
}

impl Default for ExitWhen {
    fn default() -> ExitWhen {
        ExitWhen {
            files: Files::default(),
            processes: Vec::new(),
            pipes: Vec::new(),
            scripts: Vec::new(),
            poll: Duration::from_secs(60),
            already: None,
        }
    }
}

impl ExitWhen {
    fn file(&mut self, wanted: Wanted, value: Value<'_>) -> Result<(), ConfigError> {
        // The words of nbdkit's nbdkit_absolute_path.
        if value.bytes().is_empty() {
            return Err(ConfigError("cannot convert null or empty path to an absolute path".to_owned()));
        }
        // A server that goes into the background leaves its directory.
        let path = std::path::absolute(value.path())
            .map_err(|error| ConfigError(format!("{}: {error}", value.path().display())))?;
        self.files.add(wanted, path);
        Ok(())
    }

    fn process(&mut self, value: Value<'_>) -> Result<(), ConfigError> {
        const KEY: &str = "exit-when-process-exits";
        let text = value.text(KEY)?;
        let number = values::u64(KEY, text).map_err(ConfigError)?;
        let pid = i32::try_from(number).ok().filter(|pid| *pid > 0);
        let pid = pid.ok_or_else(|| ConfigError(format!("{KEY}: not the number of a process: {text}")))?;
        match Process::take(pid).map_err(|error| ConfigError(format!("{KEY}: {error}")))? {
            Some(process) => self.processes.push(Arc::new(process)),
            None => {
                self.already.get_or_insert_with(|| format!("{KEY}: there is no process {pid}"));
            }
        }
        Ok(())
    }

    fn pipe(&mut self, value: Value<'_>) -> Result<(), ConfigError> {
        const KEY: &str = "exit-when-pipe-closed";
        let number = values::int(KEY, value.text(KEY)?).map_err(ConfigError)?;
        // Named twice it is the same event, and is no longer the caller's to be taken.
        if !self.pipes.iter().any(|pipe| pipe.number == number) {
            let pipe = Pipe::take(number).map_err(|error| ConfigError(format!("{KEY}: {error}")))?;
            self.pipes.push(Arc::new(pipe));
        }
        Ok(())
    }

    /// What has happened already, if anything has. Waits [`FIRST_RUN`] at most.
    fn look(&mut self) -> Option<String> {
        if self.already.is_some() {
            return self.already.take();
        }
        if let Some(line) = self.files.start() {
            return Some(line);
        }
        if let Some(process) = self.processes.iter().find(|process| process.has_exited()) {
            return Some(process.line());
        }
        if let Some(pipe) = self.pipes.iter().find(|pipe| pipe.is_closed()) {
            return Some(pipe.line());
        }
        // All at once, so that they share the wait.
        self.scripts.iter_mut().for_each(Script::start);
        let deadline = Instant::now() + FIRST_RUN;
        let verdicts = self.scripts.iter_mut().map(|script| (script.wait_until(deadline), script));
        verdicts.filter(|(verdict, _)| *verdict == Some(Verdict::Happened)).map(|(_, script)| script.line()).next()
    }

    /// All that may still happen.
    fn events(self) -> Vec<Event> {
        let ExitWhen { files, processes, pipes, scripts, poll, already: _ } = self;
        let mut events: Vec<Event> = Vec::new();
        if !files.is_empty() {
            events.push(Box::pin(files.happens(poll)));
        }
        events.extend(processes.into_iter().map(|process| Box::pin(async move { process.exits().await }) as Event));
        events.extend(pipes.into_iter().map(|pipe| Box::pin(async move { pipe.closes().await }) as Event));
        events.extend(scripts.into_iter().map(|script| Box::pin(script.happens(poll)) as Event));
        events
    }
}

impl Filter for ExitWhen {
    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "exit-when-file-created" => self.file(Wanted::Created, value),
            "exit-when-file-deleted" => self.file(Wanted::Deleted, value),
            "exit-when-process-exits" | "exit-when-pid-exits" => self.process(value),
            "exit-when-pipe-closed" | "exit-when-fd-closed" => self.pipe(value),
            "exit-when-script" => {
                self.scripts.push(Script::new(value.bytes())?);
                Ok(())
            }
            "exit-when-poll" => {
                let seconds = values::unsigned(key, value.text(key)?).map_err(ConfigError)?;
                if seconds == 0 {
                    return Err(ConfigError(format!("{key}: must be at least 1 second")));
                }
                self.poll = Duration::from_secs(seconds.into());
                Ok(())
            }
            _ => Err(unknown(key)),
        }
    }

    fn ready(
        mut self: Box<Self>,
        next: Arc<dyn Exports>,
        lifetime: &mut Lifetime,
    ) -> Result<Arc<dyn Exports>, ConfigError> {
        // Nothing will be served, so there is nothing to look for.
        if lifetime.already.is_none() {
            lifetime.already = self.look();
        }
        if lifetime.already.is_some() {
            return Ok(next);
        }
        let (files, processes, pipes) = (self.files.names(), self.processes.clone(), self.pipes.clone());
        lifetime.exit_when.extend(self.events());
        if files.is_empty() && processes.is_empty() && pipes.is_empty() {
            return Ok(next);
        }
        Ok(Arc::new(FilteredExports(Door { next, files, processes, pipes })))
    }
}

/// Keeps out whoever comes after an event that is not told yet: who made it happen and then connects is not served.
struct Door {
    next: Arc<dyn Exports>,
    files: Vec<(Wanted, PathBuf)>,
    processes: Vec<Arc<Process>>,
    pipes: Vec<Arc<Pipe>>,
}

impl Door {
    fn is_closed(&self) -> bool {
        self.files.iter().any(|(wanted, path)| wanted.is_so(path))
            || self.processes.iter().any(|process| process.has_exited())
            || self.pipes.iter().any(|pipe| pipe.is_closed())
    }
}

impl FilterExports for Door {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn looks_at_clients(&self) -> bool {
        true
    }

    fn preconnect(&self, client: &Client) -> device::Result<()> {
        if self.is_closed() {
            let why = "exitwhen: the server is exiting: rejecting new connection";
            return Err(Error::failed(ErrorCode::Shutdown, why));
        }
        if self.next.looks_at_clients() { self.next.preconnect(client) } else { Ok(()) }
    }
}

/// Whether there is something to read from `fd` now, or its other end is closed.
fn is_readable(fd: impl AsFd, patience: Duration) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX)).is_ok_and(|count| count > 0)
}

/// Waits for [`is_readable`]. Where the descriptor cannot be watched, looks every so often.
async fn readable(fd: impl AsFd, look: Duration) {
    if let Ok(source) = Async::new_nonblocking(fd.as_fd()) {
        while !is_readable(&fd, Duration::ZERO) {
            if source.readable().await.is_err() {
                break;
            }
        }
    }
    while !is_readable(&fd, Duration::ZERO) {
        Timer::after(look).await;
    }
}

#[cfg(test)]
mod tests;

//! Lines to people on stderr, as nbdkit writes them, or to a file or the system log. Never blocks, never fails: a line that
//! cannot be written is dropped, because a server that waits for its log serves nobody.
//! Source: nbdkit server/log.c, server/log-stderr.c, server/log-syslog.c, server/debug.c.

mod syslog;

use std::fmt;
use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nbdcaptive_actors::SessionId;
use nbdcaptive_actors::log::{Level, Log};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::fstat;
use rustix::io::ReadWriteFlags;

use crate::cli::{LogTo, Options};
use crate::identity;
use syslog::Syslog;

/// Where errors go. What `-v` says goes to stderr whatever this is, as in nbdkit.
#[derive(Debug, Clone)]
enum Sink {
    Stderr,
    Null,
    File(Arc<LogFile>),
    Syslog(Arc<Syslog>),
}

/// A file that lines are appended to.
#[derive(Debug)]
struct LogFile {
    file: OwnedFd,
    whole: WholeLines,
}

/// Keeps lines apart in a file that there is not always room in: what follows a part of a line is a line of its own.
#[derive(Debug, Default)]
pub struct WholeLines {
    /// There was room for a part of the last line only.
    is_torn: AtomicBool,
}

impl WholeLines {
    /// Has `write` write a line, or what of it fits. It returns how many of its bytes there was no room for.
    pub fn write(&self, line: &str, write: impl FnOnce(&[u8]) -> usize) {
        let was_torn = self.is_torn.swap(false, Ordering::Relaxed);
        let text = if was_torn { format!("\n{line}") } else { line.to_owned() };
        let lost = write(text.as_bytes());
        let is_torn = if lost == text.len() { was_torn } else { lost > 0 };
        self.is_torn.fetch_or(is_torn, Ordering::Relaxed);
    }
}

/// Lines of this process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Report {
    verbose: bool,
    sink: Sink,
    /// Nobody said where errors go.
    by_default: bool,
    plugin: Option<String>,
}

impl Report {
    /// To stderr, errors only: for the time before the options are known.
    pub fn early() -> Report {
        Report { verbose: false, sink: Sink::Stderr, by_default: true, plugin: None }
    }

    /// As the options say. Errors: the log file cannot be opened, as a line for people.
    pub fn new(options: &Options) -> Result<Report, String> {
        let sink = match &options.log {
            LogTo::Null => Sink::Null,
            LogTo::File(path) => {
                let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
                let file = file.map_err(|error| format!("{}: fopen: {error}", path.display()))?;
                Sink::File(Arc::new(LogFile { file: file.into(), whole: WholeLines::default() }))
            }
            LogTo::Syslog => Sink::Syslog(Arc::new(Syslog::new())),
            LogTo::Default | LogTo::Stderr => Sink::Stderr,
        };
        Ok(Report { verbose: options.verbose, sink, by_default: options.log == LogTo::Default, plugin: None })
    }

    /// For a process that goes into the background, where nobody reads stderr: to the system log, unless somebody said
    /// where to.
    pub fn in_background(mut self) -> Report {
        if self.by_default {
            self.sink = Sink::Syslog(Arc::new(Syslog::new()));
        }
        self
    }

    /// Names the plugin in lines about clients.
    pub fn about_plugin(mut self, name: &str) -> Report {
        self.plugin = Some(name.to_owned());
        self
    }

    /// Something that failed.
    pub fn error(&self, line: impl fmt::Display) {
        self.write("", "error: ", format_args!("{line}"));
    }

    /// Something that a person should know, without "error".
    pub fn say(&self, line: impl fmt::Display) {
        self.write("", "", format_args!("{line}"));
    }

    /// Something about the command line that a person should see, wherever errors go.
    pub fn warn(&self, line: impl fmt::Display) {
        to_stderr(&format!("{}: {line}\n", identity::name()));
    }

    /// Something for `-v`.
    pub fn debug(&self, line: impl fmt::Display) {
        self.write_debug("", format_args!("{line}"));
    }

    /// `who` and `what` are empty, or end with what sets them apart from the next.
    fn write(&self, who: &str, what: &str, line: fmt::Arguments<'_>) {
        let line = &one_line(without_error_numbers(&line.to_string()));
        let text = || format!("{}: {who}{what}{line}\n", identity::name());
        match &self.sink {
            Sink::Null => {}
            Sink::Stderr => to_stderr(&text()),
            Sink::File(log) => log.whole.write(&text(), |line| write_unless_full(log.file.as_fd(), line)),
            // Its lines carry the program's name and how bad they are by themselves.
            Sink::Syslog(syslog) => syslog.write(format_args!("{who}{line}")),
        }
    }

    fn write_debug(&self, who: &str, line: fmt::Arguments<'_>) {
        if self.verbose {
            to_stderr(&format!("{}: {who}debug: {}\n", identity::name(), Quoted(line)));
        }
    }
}

/// A line that stays one, whatever names are in it.
fn one_line(text: String) -> String {
    if !text.contains(char::is_control) {
        return text;
    }
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// Text as one line, as nbdkit's debug lines have it: backslashes and control characters as in C. What can be printed stays.
struct Quoted<'a>(fmt::Arguments<'a>);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Write::write_fmt(&mut Quoting(f), self.0)
    }
}

struct Quoting<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for Quoting<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match c {
            '\\' => self.0.write_str("\\\\"),
            '\u{7}' => self.0.write_str("\\a"),
            '\u{8}' => self.0.write_str("\\b"),
            '\u{c}' => self.0.write_str("\\f"),
            '\n' => self.0.write_str("\\n"),
            '\r' => self.0.write_str("\\r"),
            '\t' => self.0.write_str("\\t"),
            '\u{b}' => self.0.write_str("\\v"),
            c if c.is_control() => write!(self.0, "\\x{:02x}", u32::from(c)),
            c => self.0.write_char(c),
        })
    }
}

impl Log for Report {
    fn wants(&self, level: Level) -> bool {
        level == Level::Error || self.verbose
    }

    fn line(&self, level: Level, session: Option<SessionId>, line: fmt::Arguments<'_>) {
        let who = match (session, &self.plugin) {
            (Some(id), Some(plugin)) => format!("{plugin}[{id}]: "),
            (Some(id), None) => format!("[{id}]: "),
            (None, _) => String::new(),
        };
        match level {
            Level::Error => self.write(&who, "error: ", line),
            Level::Debug => self.write_debug(&who, line),
        }
    }
}

/// A line without the number that std puts behind what the system says of an error, ` (os error 2)`: `perror` and nbdkit do not
/// have it, and it says nothing that the sentence does not.
fn without_error_numbers(line: &str) -> String {
    const BEFORE: &str = " (os error ";
    let mut parts = line.split(BEFORE);
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix(')') {
            Some(rest) if rest.len() + 1 < part.len() => kept += rest,
            _ => kept.extend([BEFORE, part]),
        }
    }
    kept
}

/// Writes to stderr what fits.
pub fn to_stderr(text: &str) {
    write_unless_full(std::io::stderr().as_fd(), text.as_bytes());
}

/// How many of the bytes there was no room for.
fn write_unless_full(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> usize {
    let kind = fstat(fd).map_or(0, |about| about.st_mode & nix::libc::S_IFMT);
    while !bytes.is_empty() {
        match write_some(fd, kind, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EINTR) => {}
            Err(_) => break,
        }
    }
    bytes.len()
}

/// Writes some of it without waiting. The mode of the descriptor is left alone: others share it. Errors: `EAGAIN` if there is
/// no room, and whatever else can be.
fn write_some(fd: BorrowedFd<'_>, kind: nix::libc::mode_t, bytes: &[u8]) -> Result<usize, Errno> {
    // A pipe or terminal that says that it has room takes at least this much. Another process or thread may be quicker, so
    // where the call itself can be told not to wait, it is.
    const AT_ONCE: usize = 4096;
    let bytes = &bytes[..bytes.len().min(AT_ONCE)];
    match kind {
        nix::libc::S_IFSOCK => {
            return send(fd.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
        }
        nix::libc::S_IFIFO => {
            match rustix::io::pwritev2(fd, &[IoSlice::new(bytes)], u64::MAX, ReadWriteFlags::NOWAIT) {
                Ok(count) => return Ok(count),
                // Older kernels cannot be asked this.
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
                Err(error) => return Err(Errno::from_raw(error.raw_os_error())),
            }
        }
        _ => {}
    }
    if poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], PollTimeout::ZERO)? == 0 {
        return Err(Errno::EAGAIN);
    }
    nix::unistd::write(fd, bytes)
}

/// Writes `text` to stdout, for options that ask for it. A reader that has gone is no error of ours. Errors: it is not all there.
pub fn print(text: &[u8]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_error_is_a_sentence_without_a_number() {
        let missing = std::io::Error::from_raw_os_error(nix::libc::ENOENT);
        for (line, expected) in [
            (format!("disk: {missing}"), "disk: No such file or directory"),
            (format!("{missing}, and {missing}."), "No such file or directory, and No such file or directory."),
            ("a (os error ) b".to_owned(), "a (os error ) b"),
            ("a (os error x)".to_owned(), "a (os error x)"),
            ("a (os error 2".to_owned(), "a (os error 2"),
            (String::new(), ""),
        ] {
            assert_eq!(without_error_numbers(&line), expected);
        }
    }

    #[test]
    fn a_name_with_a_line_end_makes_no_further_line() {
        assert_eq!(one_line("a\nb\u{1b}é\\".to_owned()), "a\\nb\\u{1b}é\\");
    }

    #[test]
    fn a_debug_line_stays_one_line() {
        assert_eq!(Quoted(format_args!("a\\{}\u{1}é\u{7f}", "\n")).to_string(), "a\\\\\\n\\x01é\\x7f");
    }
}

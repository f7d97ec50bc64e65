//! `log`: a line for each request and what came of it, in a file or to a script. Nothing of it is done at once, because the
//! file may be slow. Source: nbdkit filters/log/log.c, output.c, nbdkit-log-filter.pod.

use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nbdcaptive_actors::device::{
    Call, Client, Connection, Device, ErrorCode, Export, Exports, Extents, HOLE, Result, Support, ThreadModel, ZERO,
};
use nbdcaptive_actors::filter::{FilterExports, Filtered, FilteredExports, Next};

use super::kit::{Gate, Gated, Request, optional, unknown};
use crate::captive::quote::shell_quote;
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::report::WholeLines;
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "log",
    summary: "log all requests to a file or a script

        Each request is written down as it comes and as it is answered, with the time, the connection, and a number
        that says which belongs to which. Without a file or a script it goes where `-v` does. What is logged are
        requests as they arrive at this filter: it matters where it stands.

        # Examples

            nbdcaptive --filter=log memory 1M logfile=requests.log \\
                --run 'nbdcopy disk.img \"$uri\"'
        ",
    parameters: &[
        optional("logfile", "<FILE>", "the file to log to"),
        optional("logappend", "<BOOL>", "keep what is in it; false"),
        optional("logscript", "<SCRIPT>", "a script to run for each line"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug, Default)]
pub struct LogFilter {
    file: Option<PathBuf>,
    append: bool,
    script: Option<Vec<u8>>,
}

impl Filter for LogFilter {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "logfile" => self.file = Some(value.path().to_owned()),
            "logappend" => self.append = values::boolean(value.text(key)?).map_err(ConfigError)?,
            "logscript" => self.script = Some(value.bytes().to_owned()),
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let file = match &self.file {
            Some(path) => Some(open(path, self.append)?),
            None => None,
        };
        let file = file.map(|file| Mutex::new(Lines { file, whole: WholeLines::default(), has_complained: false }));
        let log = Log { file, script: self.script, connections: AtomicU64::new(0) };
        let model = next.thread_model() as u32;
        log.line(&Connection::default(), None, "Ready", Kind::Print, 0, format_args!("thread_model={model}"));
        let (lists, preconnects) = Default::default();
        Ok(Arc::new(FilteredExports(Logged { next, log: Arc::new(log), lists, preconnects })))
    }
}

/// Opens a file to write to, as the filters that write one do. Errors: as a line.
pub(super) fn open(path: &std::path::Path, append: bool) -> std::result::Result<File, ConfigError> {
    let file = File::options().write(true).create(true).append(append).truncate(!append).open(path);
    file.map_err(|error| ConfigError(format!("open: {}: {error}", path.display())))
}

/// Which line it is of the two that most things have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Enter,
    Leave,
    Print,
}

/// A file that lines are written to.
struct Lines {
    file: File,
    whole: WholeLines,
    has_complained: bool,
}

impl Lines {
    /// Writes a line, or what of it fits.
    fn write(&mut self, line: &str) -> io::Result<()> {
        let mut written = Ok(());
        let Lines { file, whole, .. } = self;
        whole.write(line, |mut rest| {
            // One call where it can be, so that lines of several servers do not mix.
            while written.is_ok() && !rest.is_empty() {
                match file.write(rest) {
                    Ok(0) => written = Err(io::ErrorKind::WriteZero.into()),
                    Ok(count) => rest = &rest[count..],
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => written = Err(error),
                }
            }
            rest.len()
        });
        written
    }
}

struct Log {
    file: Option<Mutex<Lines>>,
    script: Option<Vec<u8>>,
    connections: AtomicU64,
}

impl Log {
    /// A line. It is lost where it cannot be written; the requests go on. `id` is 0 where there is none.
    fn line(
        &self,
        connection: &Connection,
        number: Option<u64>,
        act: &str,
        kind: Kind,
        id: u64,
        text: fmt::Arguments<'_>,
    ) {
        if let Some(file) = &self.file {
            let mut line = timestamp(SystemTime::now());
            if let Some(number) = number {
                let _ = write!(line, " connection={number}");
            }
            let _ = write!(line, " {}{act}", if kind == Kind::Leave { "..." } else { "" });
            if id > 0 {
                let _ = write!(line, " id={id}");
            }
            let text = text.to_string();
            if !text.is_empty() {
                let _ = write!(line, " {text}");
            }
            line.push_str(if kind == Kind::Enter { " ...\n" } else { "\n" });
            // A file is whole whoever panicked.
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            // Said once, by a client's line: there is nobody to say it at the start.
            if let Err(error) = file.write(&line)
                && number.is_some()
                && !std::mem::replace(&mut file.has_complained, true)
            {
                connection.error(format_args!("logfile: {error}: lines are lost"));
            }
        }
        if let Some(script) = &self.script {
            let mut words = format!("act={act}\n");
            if let Some(number) = number {
                let _ = writeln!(words, "connection={number}");
            }
            let _ = writeln!(words, "type={}", format!("{kind:?}").to_uppercase());
            if id > 0 {
                let _ = writeln!(words, "id={id}");
            }
            let _ = writeln!(words, "{text}");
            let command = OsString::from_vec([words.as_bytes(), script].concat());
            match Command::new("/bin/sh").arg("-c").arg(command).status() {
                Ok(status) if status.success() => {}
                Ok(status) => connection.error(format_args!("logscript: command failed: {status}")),
                Err(error) => connection.error(format_args!("logscript: {error}")),
            }
        }
    }

    /// The end of something that has no more to say than how it went.
    fn leave(&self, connection: &Connection, number: Option<u64>, act: &str, id: u64, result: &Result<()>) {
        let (value, error) = match result {
            Ok(()) => (0, ""),
            Err(error) => (-1, error_name(error.code())),
        };
        self.line(connection, number, act, Kind::Leave, id, format_args!("return={value}{error}"));
    }
}

fn error_name(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::NotPermitted => " error=EPERM",
        ErrorCode::Io => " error=EIO",
        ErrorCode::NoMemory => " error=ENOMEM",
        ErrorCode::Invalid => " error=EINVAL",
        ErrorCode::NoSpace => " error=ENOSPC",
        ErrorCode::Overflow => " error=EOVERFLOW",
        ErrorCode::NotSupported => " error=ENOTSUP",
        ErrorCode::Shutdown => " error=ESHUTDOWN",
    }
}

/// `2020-08-06 02:07:23.080415`, in UTC. Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms",
/// `civil_from_days`.
fn timestamp(time: SystemTime) -> String {
    let Ok(since) = time.duration_since(UNIX_EPOCH) else { return "Time unknown".to_owned() };
    let (days, second) = (since.as_secs() / 86400, since.as_secs() % 86400);
    // Days since 0000-03-01, so that a leap day is a year's last.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:06}", since.subsec_micros())
}

fn quoted(name: &[u8]) -> String {
    String::from_utf8_lossy(&shell_quote(name)).into_owned()
}

struct Logged {
    next: Arc<dyn Exports>,
    log: Arc<Log>,
    lists: AtomicU64,
    preconnects: AtomicU64,
}

impl FilterExports for Logged {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn looks_at_clients(&self) -> bool {
        true
    }

    fn preconnect(&self, client: &Client) -> Result<()> {
        let (connection, act) = (&client.connection, "Preconnect");
        let id = self.preconnects.fetch_add(1, Ordering::Relaxed) + 1;
        let readonly = u8::from(client.read_only);
        self.log.line(connection, None, act, Kind::Enter, id, format_args!("readonly={readonly}"));
        let result = if self.next.looks_at_clients() { self.next.preconnect(client) } else { Ok(()) };
        self.log.leave(connection, None, act, id, &result);
        result
    }

    fn list(&self, client: &Client) -> Result<Vec<Export>> {
        let (connection, act) = (&client.connection, "ListExports");
        let id = self.lists.fetch_add(1, Ordering::Relaxed) + 1;
        let (readonly, tls) = (u8::from(client.read_only), u8::from(client.is_tls));
        self.log.line(connection, None, act, Kind::Enter, id, format_args!("readonly={readonly} tls={tls}"));
        let result = self.next.list(client);
        match &result {
            Ok(exports) => {
                let names: Vec<_> = exports.iter().map(|export| quoted(&export.name)).collect();
                let names = names.join(" ");
                self.log.line(connection, None, act, Kind::Leave, id, format_args!("exports=({names}) return=0"));
            }
            Err(error) => {
                let error = error_name(error.code());
                self.log.line(connection, None, act, Kind::Leave, id, format_args!("return=-1{error}"));
            }
        }
        result
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = Next::open(&*self.next, client)?;
        let number = self.log.connections.fetch_add(1, Ordering::Relaxed) + 1;
        let log = Arc::clone(&self.log);
        let disk = Disk { next, log, number, connection: client.connection.clone(), requests: AtomicU64::new(0) };
        disk.log_connect(client);
        Ok(Box::new(Filtered(Gated(disk))))
    }
}

struct Disk {
    next: Next,
    log: Arc<Log>,
    number: u64,
    connection: Connection,
    requests: AtomicU64,
}

impl Disk {
    fn line(&self, act: &str, kind: Kind, id: u64, text: fmt::Arguments<'_>) {
        self.log.line(&self.connection, Some(self.number), act, kind, id, text);
    }

    fn log_connect(&self, client: &Client) {
        let offered = self.next.offered();
        // nbdkit's numbers, NBDKIT_FUA_NONE and so on.
        let support = |support: Support| match support {
            Support::None => 0,
            Support::Emulate | Support::Emulated => 1,
            Support::Native => 2,
        };
        let [minimum, preferred, maximum] =
            offered.block_size.map_or([0; 3], |sizes| [sizes.minimum, sizes.preferred, sizes.maximum]);
        self.line(
            "Connect",
            Kind::Print,
            0,
            format_args!(
                "export={} tls={} size=0x{:x} minsize=0x{minimum:x} prefsize=0x{preferred:x} maxsize=0x{maximum:x} \
                 write={} flush={} rotational={} trim={} zero={} fua={} extents={} cache={} fast_zero={}",
                quoted(&client.export_name),
                u8::from(client.is_tls),
                self.next.bytes(),
                u8::from(offered.write),
                u8::from(offered.flush),
                u8::from(offered.rotational),
                u8::from(offered.trim),
                support(offered.zero),
                support(offered.fua),
                u8::from(offered.extents),
                support(offered.cache),
                u8::from(offered.fast_zero),
            ),
        );
    }
}

/// What a request is called in the log.
fn act(request: &Request) -> &'static str {
    match request {
        Request::Read { .. } => "Read",
        Request::Write { .. } => "Write",
        Request::Flush => "Flush",
        Request::Trim { .. } => "Trim",
        Request::Zero { .. } => "Zero",
        Request::Cache { .. } => "Cache",
        Request::Extents { .. } => "Extents",
    }
}

impl Gate for Disk {
    /// The request's number.
    type Pass = u64;

    fn next(&self) -> &Next {
        &self.next
    }

    fn answers_at_once(&self) -> bool {
        false
    }

    fn before(&self, request: &Request, _call: &Call) -> Result<u64> {
        let id = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let bit = u8::from;
        let enter = |text: fmt::Arguments<'_>| self.line(act(request), Kind::Enter, id, text);
        match *request {
            Request::Read { length, offset } | Request::Cache { length, offset } => {
                enter(format_args!("offset=0x{offset:x} count=0x{length:x}"));
            }
            Request::Write { length, offset, flags } | Request::Trim { length, offset, flags } => {
                enter(format_args!("offset=0x{offset:x} count=0x{length:x} fua={}", bit(flags.fua)));
            }
            Request::Zero { length, offset, flags } => enter(format_args!(
                "offset=0x{offset:x} count=0x{length:x} trim={} fua={} fast={}",
                bit(flags.may_trim),
                bit(flags.fua),
                bit(flags.fast)
            )),
            Request::Flush => enter(format_args!("")),
            Request::Extents { length, offset, one } => {
                enter(format_args!("offset=0x{offset:x} count=0x{length:x} req_one={}", bit(one)));
            }
        }
        Ok(id)
    }

    fn after(&self, id: u64, request: &Request, result: &Result<()>, map: Option<&Extents>) {
        let Some(map) = map else {
            return self.log.leave(&self.connection, Some(self.number), act(request), id, result);
        };
        let mut at = map.offset();
        let extents: Vec<_> = map
            .list()
            .iter()
            .map(|extent| {
                let start = at;
                at += extent.length;
                let kind = match extent.flags & (HOLE | ZERO) {
                    0 => "",
                    HOLE => "hole",
                    ZERO => "zero",
                    _ => "hole,zero",
                };
                format!("0x{start:x} 0x{:x} \"{kind}\"", extent.length)
            })
            .collect();
        let extents = extents.join(" ");
        self.line(act(request), Kind::Leave, id, format_args!("extents=({extents}) return=0"));
    }

    fn close(&self) -> Result<()> {
        let requests = self.requests.load(Ordering::Relaxed);
        self.line("Disconnect", Kind::Print, 0, format_args!("transactions={requests}"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_written_as_dates() {
        for (seconds, date) in [
            (0, "1970-01-01 00:00:00.000000"),
            (951_782_399, "2000-02-28 23:59:59.000000"),
            (951_782_400, "2000-02-29 00:00:00.000000"),
            (951_868_800, "2000-03-01 00:00:00.000000"),
            (1_596_679_643, "2020-08-06 02:07:23.000000"),
            (4_102_444_799, "2099-12-31 23:59:59.000000"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), date);
        }
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_micros(80_415)), "1970-01-01 00:00:00.080415");
    }
}

//! What `sh` and `eval` share: a method is a script that is run, and its exit status and streams are the answer.
//! Source: nbdkit plugins/sh/call.c, plugins/sh/methods.c, plugins/sh/nbdkit-sh-plugin.pod; server/plugins.c for block sizes.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nbdcaptive_actors::device::{
    self, BlockSize, Call, Capabilities, Client, Connection, ConnectionKey, Device, Error, ErrorCode, Export, Exports,
    Extents, Flags, Segments, Support, ThreadModel,
};
use nbdcaptive_actors::protocol::constants::NBD_MAX_STRING;
use nix::sys::wait::WaitStatus;

use crate::kept::{self, Phase, Program};
use crate::layer::{ConfigError, Server};
use crate::values;

/// The highest exit status that means something of its own.
pub const MAX_KNOWN_STATUS: u32 = 8;

/// The most text that is read from a method, in bytes.
const TEXT: usize = 16 * 1024 * 1024;
/// How much more than was asked for is read, in bytes, so that a script that gives too much is told how much.
const TOO_MUCH: usize = 1024 * 1024;
/// The most exports of a list. Source: nbdkit server/exports.c.
const MAX_EXPORTS: usize = 10_000;

/// Which program a method is.
#[derive(Debug)]
pub enum Source {
    /// One for all of them.
    One(CString),
    /// One each; one for those that are not there.
    Each {
        /// Those that are there.
        methods: BTreeMap<&'static str, CString>,
        /// In place of those that are not.
        missing: CString,
    },
}

impl Source {
    fn of(&self, method: &str) -> &CStr {
        match self {
            Source::One(path) => path,
            Source::Each { methods, missing } => methods.get(method).unwrap_or(missing),
        }
    }
}

/// Runs methods.
#[derive(Debug)]
pub struct Scripts {
    /// The methods.
    pub source: Source,
    environment: Vec<CString>,
    server: Option<Server>,
}

/// What a method has answered, if it did not fail.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Status 0, with the output.
    Done(Vec<u8>),
    /// Status 2: there is no such method.
    Missing,
    /// Status 3.
    False,
}

/// How a method is called.
struct Asked<'a> {
    words: &'a [&'a [u8]],
    input: &'a [u8],
    enough: usize,
    /// The server is not serving yet.
    starts: bool,
    /// Which the script may end.
    connection: Connection,
}

impl<'a> Asked<'a> {
    fn of(words: &'a [&'a [u8]]) -> Asked<'a> {
        Asked { words, input: &[], enough: TEXT + 1, starts: false, connection: Connection::default() }
    }

    fn by(connection: &Connection, words: &'a [&'a [u8]]) -> Asked<'a> {
        Asked { connection: connection.clone(), ..Asked::of(words) }
    }
}

impl Scripts {
    /// `directory` is what scripts find in `$tmpdir`.
    pub fn new(source: Source, directory: &Path, server: Option<Server>) -> Scripts {
        Scripts { source, environment: kept::environment(&[("tmpdir", directory.as_os_str())]), server }
    }

    fn name(&self, method: &str) -> String {
        self.source.of(method).to_string_lossy().into_owned()
    }

    fn call(&self, method: &str, asked: Asked<'_>) -> device::Result<Answer> {
        let path = self.source.of(method);
        let name = path.to_string_lossy();
        let system = |error: std::io::Error| Error::system(&name, error);
        let mut words = vec![path.to_owned()];
        for word in [&[method.as_bytes()], asked.words].concat() {
            let word = CString::new(word).map_err(|_| {
                Error::failed(ErrorCode::Invalid, format!("{name}: {method}: an argument has a NUL byte in it"))
            })?;
            words.push(word);
        }
        let words: Vec<&CStr> = words.iter().map(CString::as_c_str).collect();
        let program = Program { path, words: &words, environment: &self.environment };
        let phase = if asked.starts { Phase::Starting } else { Phase::Serving(&asked.connection) };
        let ran = kept::run(program, asked.input, asked.enough, true, phase).map_err(system)?;
        let status = match ran.status {
            WaitStatus::Exited(_, status) => status,
            WaitStatus::Signaled(..) if ran.recalled => {
                let why = format!("{name}: {method}: the server is ending and the script was killed");
                return Err(Error::failed(ErrorCode::Shutdown, why));
            }
            WaitStatus::Signaled(_, signal, _) => {
                let why = format!("{name}: script terminated by signal {}", signal as i32);
                return Err(Error::failed(ErrorCode::Io, why));
            }
            other => return Err(Error::failed(ErrorCode::Io, format!("{name}: unexpected end: {other:?}"))),
        };
        match status {
            4 | 5 => self.server.iter().for_each(Server::shut_down),
            6 => asked.connection.disconnect(),
            7 | 8 => asked.connection.refuse(),
            _ => {}
        }
        match status {
            0 | 4 | 7 => Ok(Answer::Done(ran.output)),
            2 => Ok(Answer::Missing),
            3 => Ok(Answer::False),
            6 => Err(Error::failed(ErrorCode::Shutdown, format!("{name}: {method}: the client is to be disconnected"))),
            _ => {
                let default = if let 5 | 8 = status { ErrorCode::Shutdown } else { ErrorCode::Io };
                let (code, why) = complaint(&ran.errors, default);
                Err(Error::failed(code, format!("{name}: {why}")))
            }
        }
    }

    fn text(&self, method: &str, asked: Asked<'_>) -> device::Result<Option<Vec<u8>>> {
        match self.call(method, asked)? {
            Answer::Done(mut text) if text.len() <= TEXT => {
                // As C reads it.
                text.truncate(text.iter().position(|byte| *byte == 0).unwrap_or(text.len()));
                Ok(Some(text))
            }
            Answer::Done(_) => Err(self.io(method, format_args!("its output is longer than {TEXT} bytes"))),
            Answer::Missing => Ok(None),
            Answer::False => Err(self.unexpected_false(method)),
        }
    }

    /// As [`Scripts::text`], without a newline at the end.
    fn line(&self, method: &str, asked: Asked<'_>) -> device::Result<Option<Vec<u8>>> {
        let mut line = self.text(method, asked)?;
        if let Some(line) = &mut line {
            let _ = line.pop_if(|last| *last == b'\n');
        }
        Ok(line)
    }

    /// A method that only has to succeed. Whether it is there.
    fn done(&self, method: &str, asked: Asked<'_>) -> device::Result<bool> {
        match self.call(method, Asked { enough: 0, ..asked })? {
            Answer::Done(_) => Ok(true),
            Answer::Missing => Ok(false),
            Answer::False => Err(self.unexpected_false(method)),
        }
    }

    fn io(&self, method: &str, why: impl std::fmt::Display) -> Error {
        Error::failed(ErrorCode::Io, format!("{}: {method}: {why}", self.name(method)))
    }

    fn unexpected_false(&self, method: &str) -> Error {
        let why = format!("{}: {method} method returned unexpected code (3/false)", self.name(method));
        Error::failed(ErrorCode::Io, why)
    }

    /// Runs a method while the server starts. Whether it is there.
    pub fn starting(&self, method: &str, words: &[&[u8]]) -> Result<bool, ConfigError> {
        self.done(method, Asked { starts: true, ..Asked::of(words) }).map_err(config_error)
    }

    /// As [`Scripts::starting`], for its output.
    pub fn starting_line(&self, method: &str) -> Result<Option<Vec<u8>>, ConfigError> {
        self.line(method, Asked { starts: true, ..Asked::of(&[]) }).map_err(config_error)
    }

    /// What the script wants; what cannot be read is the safe one.
    pub fn thread_model(&self) -> Result<ThreadModel, ConfigError> {
        let line = self.starting_line("thread_model")?.unwrap_or_default();
        let line = String::from_utf8_lossy(&line).to_ascii_lowercase().replace('-', "_");
        Ok(match &*line {
            "parallel" => ThreadModel::Parallel,
            "serialize_requests" => ThreadModel::SerializeRequests,
            "serialize_connections" => ThreadModel::SerializeConnections,
            _ => ThreadModel::SerializeAllRequests,
        })
    }

    /// Lines for `--dump-plugin`.
    pub fn dump(&self) -> Result<Vec<u8>, ConfigError> {
        let asked = Asked { starts: true, ..Asked::of(&[]) };
        let own = format!("max_known_status={MAX_KNOWN_STATUS}\n").into_bytes();
        Ok([own, self.text("dump_plugin", asked).map_err(config_error)?.unwrap_or_default()].concat())
    }

    /// Serves by these scripts.
    pub fn exports(self: Arc<Scripts>) -> Result<Arc<dyn Exports>, ConfigError> {
        let model = self.thread_model()?;
        self.starting("get_ready", &[])?;
        Ok(Arc::new(ScriptExports { scripts: self, model, open: Mutex::default(), defaults: Mutex::default() }))
    }
}

fn config_error(error: Error) -> ConfigError {
    ConfigError(error.to_string())
}

/// What a script has said of its failure: `ERRNO message`, of which the first line is for people.
fn complaint(errors: &[u8], default: ErrorCode) -> (ErrorCode, String) {
    const CODES: [(&str, ErrorCode); 12] = [
        ("EPERM", ErrorCode::NotPermitted),
        ("EIO", ErrorCode::Io),
        ("ENOMEM", ErrorCode::NoMemory),
        ("EINVAL", ErrorCode::Invalid),
        ("ENOSPC", ErrorCode::NoSpace),
        ("EOVERFLOW", ErrorCode::Overflow),
        ("ESHUTDOWN", ErrorCode::Shutdown),
        ("ENOTSUP", ErrorCode::NotSupported),
        ("EOPNOTSUPP", ErrorCode::NotSupported),
        ("EROFS", ErrorCode::NotPermitted),
        ("EDQUOT", ErrorCode::NoSpace),
        ("EFBIG", ErrorCode::NoSpace),
    ];
    let text = String::from_utf8_lossy(errors);
    let text = text.split('\0').next().unwrap_or_default();
    let is_space = |c: char| c.is_ascii_whitespace() || c == '\u{b}';
    let starts =
        |name: &str| text.as_bytes().get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name.as_bytes()));
    let (code, rest) = match CODES.iter().find(|(name, _)| starts(name)) {
        None => (default, text),
        Some((name, code)) => {
            // Such a start is ASCII, so the rest is text too.
            let rest = &text[name.len()..];
            match rest.starts_with(is_space) || rest.is_empty() {
                true => (*code, rest.trim_start_matches(is_space)),
                // `EINVALID` is no name of an error.
                false => (ErrorCode::Io, text),
            }
        }
    };
    if text.trim_end_matches('\n').is_empty() {
        return (code, "script exited with error, but did not print an error message on stderr".to_owned());
    }
    (code, rest.split('\n').next().unwrap_or_default().to_owned())
}

/// Exports of scripts.
struct ScriptExports {
    scripts: Arc<Scripts>,
    model: ThreadModel,
    /// For descriptions, which are asked for by client: what is open for whom, the newest last.
    open: Mutex<Vec<(Client, Weak<State>)>>,
    /// A script is asked once for each connection, and again if TLS was begun since.
    defaults: Mutex<Vec<DefaultName>>,
}

/// What the empty name stands for, on a connection.
struct DefaultName {
    connection: ConnectionKey,
    is_tls: bool,
    /// `None`: there is none.
    name: Option<Vec<u8>>,
}

fn boolean(yes: bool) -> &'static [u8] {
    if yes { b"true" } else { b"false" }
}

impl ScriptExports {
    /// The name for the empty name. Nothing: there is none.
    fn resolve_default(&self, client: &Client) -> device::Result<Option<Vec<u8>>> {
        let lock = || self.defaults.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |known: &&DefaultName| known.connection.is(&client.connection) && known.is_tls == client.is_tls;
        if let Some(known) = lock().iter().find(same) {
            return Ok(known.name.clone());
        }
        let name = self.ask_default(client)?;
        if let Some(connection) = client.connection.key() {
            let mut defaults = lock();
            defaults.retain(|known| !known.connection.is_gone());
            defaults.push(DefaultName { connection, is_tls: client.is_tls, name: name.clone() });
        }
        Ok(name)
    }

    fn ask_default(&self, client: &Client) -> device::Result<Option<Vec<u8>>> {
        let words = [boolean(client.read_only), boolean(client.is_tls)];
        let asked = Asked::by(&client.connection, &words);
        let Some(text) = self.scripts.text("default_export", asked)? else { return Ok(Some(Vec::new())) };
        let (_, list) = list_format(&text);
        let name = list.split(|byte| *byte == b'\n').next().unwrap_or_default();
        Ok((name.len() <= NBD_MAX_STRING).then(|| name.to_vec()))
    }
}

impl Exports for ScriptExports {
    fn thread_model(&self) -> ThreadModel {
        self.model
    }

    fn looks_at_clients(&self) -> bool {
        match &self.scripts.source {
            Source::One(_) => true,
            Source::Each { methods, .. } => methods.contains_key("preconnect") || methods.contains_key("missing"),
        }
    }

    fn preconnect(&self, client: &Client) -> device::Result<()> {
        self.scripts.done("preconnect", Asked::by(&client.connection, &[boolean(client.read_only)])).map(drop)
    }

    fn list(&self, client: &Client) -> device::Result<Vec<Export>> {
        let words = [boolean(client.read_only), boolean(client.is_tls)];
        match self.scripts.text("list_exports", Asked::by(&client.connection, &words))? {
            Some(text) => exports(&text),
            None => {
                let name = self.resolve_default(client).ok().flatten();
                Ok(name.into_iter().map(|name| Export { name, description: String::new() }).collect())
            }
        }
    }

    fn default_export(&self, client: &Client) -> device::Result<Option<Vec<u8>>> {
        self.resolve_default(client)
    }

    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        let mut name = client.export_name.clone();
        if name.is_empty() {
            let no_default = || Error::failed(ErrorCode::Invalid, "default export (\"\") not permitted");
            name = self.resolve_default(client)?.ok_or_else(no_default)?;
        }
        let connection = client.connection.clone();
        let words = [boolean(client.read_only), &name, boolean(client.is_tls)];
        let handle = self.scripts.line("open", Asked::by(&connection, &words))?.unwrap_or_default();
        let scripts = Arc::clone(&self.scripts);
        let state = Arc::new(State { scripts, handle, is_read_only: client.read_only, connection });
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, state)| state.strong_count() > 0);
        open.push((client.clone(), Arc::downgrade(&state)));
        Ok(Box::new(state))
    }

    fn description(&self, client: &Client) -> Option<String> {
        let state = {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.iter().rev().find(|(one, _)| one == client).and_then(|(_, state)| state.upgrade())
        }?;
        let line = self.scripts.line("export_description", state.asked(&[&state.handle])).ok().flatten();
        line.map(|line| String::from_utf8_lossy(&line).into_owned())
    }

    fn unload(&self) -> device::Result<()> {
        // As in nbdkit, what goes wrong with it is of no interest.
        let _ = self.scripts.done("unload", Asked::of(&[]));
        Ok(())
    }
}

/// Takes the line off by which a list says how it is written.
fn list_format(text: &[u8]) -> (Format, &[u8]) {
    let formats: [(&[u8], Format); 3] = [
        (b"INTERLEAVED\n", Format::Interleaved),
        (b"NAMES+DESCRIPTIONS\n", Format::NamesThenDescriptions),
        (b"NAMES\n", Format::Names),
    ];
    let found = formats.into_iter().find_map(|(line, format)| Some((format, text.strip_prefix(line)?)));
    found.unwrap_or((Format::Names, text))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Names,
    Interleaved,
    NamesThenDescriptions,
}

/// A list of exports. A line without an end is none, and a description that is not there is empty.
fn exports(text: &[u8]) -> device::Result<Vec<Export>> {
    let (format, list) = list_format(text);
    let lines: Vec<_> =
        list.split_inclusive(|byte| *byte == b'\n').filter_map(|line| line.strip_suffix(b"\n")).collect();
    let names = lines.len().div_ceil(2);
    let export = |(name, description): (&[u8], Option<&&[u8]>)| {
        let description = description.copied().unwrap_or_default();
        if name.len() > NBD_MAX_STRING || description.len() > NBD_MAX_STRING {
            return Err(Error::failed(ErrorCode::Invalid, "nbdkit_add_export: string too long"));
        }
        Ok(Export { name: name.to_vec(), description: String::from_utf8_lossy(description).into_owned() })
    };
    let exports: Vec<_> = match format {
        Format::Names => lines.iter().map(|name| export((name, None))).take(MAX_EXPORTS + 1).collect(),
        Format::Interleaved => {
            lines.chunks(2).map(|pair| export((pair[0], pair.get(1)))).take(MAX_EXPORTS + 1).collect()
        }
        Format::NamesThenDescriptions => {
            (0..names).map(|i| export((lines[i], lines.get(names + i)))).take(MAX_EXPORTS + 1).collect()
        }
    };
    if exports.len() > MAX_EXPORTS {
        return Err(Error::failed(ErrorCode::Invalid, "nbdkit_add_export: too many exports"));
    }
    exports.into_iter().collect()
}

/// An export that was opened for a client.
struct State {
    scripts: Arc<Scripts>,
    handle: Vec<u8>,
    is_read_only: bool,
    connection: Connection,
}

/// Flags as scripts are given them.
fn flag_words(flags: Flags) -> String {
    let words = [(flags.fua, "fua"), (flags.may_trim, "may_trim"), (flags.fast, "fast")];
    words.iter().filter(|(set, _)| *set).map(|(_, word)| *word).collect::<Vec<_>>().join(",")
}

impl State {
    fn asked<'a>(&'a self, words: &'a [&'a [u8]]) -> Asked<'a> {
        Asked::by(&self.connection, words)
    }

    /// A method about a range. Whether it is there.
    fn ranged(
        &self,
        method: &str,
        length: u64,
        offset: u64,
        flags: Option<Flags>,
        data: &[u8],
    ) -> device::Result<bool> {
        let (length, offset, flags) = (length.to_string(), offset.to_string(), flags.map(flag_words));
        let mut words = vec![&*self.handle, length.as_bytes(), offset.as_bytes()];
        words.extend(flags.as_ref().map(String::as_bytes));
        self.scripts.done(method, Asked { input: data, ..self.asked(&words) })
    }

    fn can(&self, method: &str) -> device::Result<Option<bool>> {
        let words = [&*self.handle];
        match self.scripts.call(method, Asked { enough: 0, ..self.asked(&words) })? {
            Answer::Done(_) => Ok(Some(true)),
            Answer::False => Ok(Some(false)),
            Answer::Missing => Ok(None),
        }
    }

    fn support(&self, method: &str) -> device::Result<Option<Support>> {
        let Some(line) = self.scripts.line(method, self.asked(&[&self.handle]))? else { return Ok(None) };
        let line = String::from_utf8_lossy(&line);
        match &*line.to_ascii_lowercase() {
            "none" => Ok(Some(Support::None)),
            "emulate" => Ok(Some(Support::Emulate)),
            "native" => Ok(Some(Support::Native)),
            _ => {
                let name = self.scripts.name(method);
                let why = format!("{name}: could not parse output from {method} method: {}", line.escape_debug());
                Err(Error::failed(ErrorCode::Io, why))
            }
        }
    }

    fn block_size(&self) -> device::Result<Option<BlockSize>> {
        let method = "block_size";
        let Some(text) = self.scripts.text(method, self.asked(&[&self.handle]))? else { return Ok(None) };
        let text = String::from_utf8_lossy(&text);
        let mut sizes = text.split([' ', '\t', '\n']).filter(|word| !word.is_empty()).map(|word| {
            let size = values::size(word).ok().and_then(|size| u32::try_from(size).ok());
            size.ok_or(())
        });
        let mut next = || sizes.next().unwrap_or(Err(()));
        let (Ok(minimum), Ok(preferred), Ok(maximum)) = (next(), next(), next()) else {
            let why = format!("{}: {method} method cannot be parsed", self.scripts.name(method));
            return Err(Error::failed(ErrorCode::Io, why));
        };
        check_block_size(BlockSize { minimum, preferred, maximum })
    }

    fn pread(&self, length: usize, offset: u64) -> device::Result<Vec<u8>> {
        let method = "pread";
        let (count, at) = (length.to_string(), offset.to_string());
        let words = [&*self.handle, count.as_bytes(), at.as_bytes()];
        let enough = length + TOO_MUCH;
        let data = match self.scripts.call(method, Asked { enough, ..self.asked(&words) })? {
            Answer::Done(data) => data,
            Answer::Missing => {
                let why = format!("{}: the pread method is required", self.scripts.name(method));
                return Err(Error::failed(ErrorCode::Io, why));
            }
            Answer::False => return Err(self.scripts.unexpected_false(method)),
        };
        if data.len() != length {
            let (name, got) = (self.scripts.name(method), data.len());
            let least = if got == enough { "at least " } else { "" };
            let why = format!(
                "{name}: incorrect amount of data read: expecting {length} bytes but received {least}{got} bytes from the \
                 script"
            );
            return Err(Error::failed(ErrorCode::Io, why));
        }
        Ok(data)
    }
}

/// What nbdkit wants of a plugin's block sizes. Three zeroes say nothing.
fn check_block_size(size: BlockSize) -> device::Result<Option<BlockSize>> {
    let BlockSize { minimum, preferred, maximum } = size;
    if (minimum, preferred, maximum) == (0, 0, 0) {
        return Ok(None);
    }
    let rules = [
        ((1..=65536).contains(&minimum), "minimum block size between 1 and 64K"),
        (minimum.is_power_of_two(), "minimum block size to a power of 2"),
        (preferred.is_power_of_two(), "preferred block size to a power of 2"),
        ((512..=32 << 20).contains(&preferred), "preferred block size between 512 and 32M"),
        (
            maximum == u32::MAX || maximum.is_multiple_of(minimum.max(1)),
            "maximum block size to -1 or a multiple of minimum block size",
        ),
        (minimum <= preferred && preferred <= maximum, "minimum block size <= preferred <= maximum"),
    ];
    match rules.iter().find(|(holds, _)| !holds) {
        Some((_, rule)) => Err(Error::failed(ErrorCode::Io, format!("plugin must set {rule}"))),
        None => Ok(Some(size)),
    }
}

impl Device for State {
    fn size(&self) -> device::Result<u64> {
        let method = "get_size";
        let name = || self.scripts.name(method);
        let Some(line) = self.scripts.line(method, self.asked(&[&self.handle]))? else {
            return Err(Error::failed(ErrorCode::Io, format!("{}: the get_size method is required", name())));
        };
        let line = String::from_utf8_lossy(&line);
        values::size(&line).map_err(|why| {
            let line = line.escape_debug();
            let why = format!("{}: could not parse output from get_size method: {line}: {why}", name());
            Error::failed(ErrorCode::Io, why.replace('\n', "\\n"))
        })
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        let yes = |method| Ok::<_, Error>(self.can(method)?.unwrap_or(false));
        let block_size = self.block_size()?;
        let write = !self.is_read_only && yes("can_write")?;
        let flush = yes("can_flush")?;
        let (mut trim, mut zero, mut fast_zero, mut fua) = (false, Support::None, false, Support::None);
        if write {
            let native = yes("can_zero")?;
            zero = if native { Support::Native } else { Support::Emulate };
            // Without zeroes of its own the script would be asked to write them, and so the answer to a fast one is quick.
            fast_zero = self.can("can_fast_zero")?.unwrap_or(!native);
            trim = yes("can_trim")?;
            let default = if flush { Support::Emulate } else { Support::None };
            fua = self.support("can_fua")?.unwrap_or(default);
        }
        Ok(Capabilities {
            write,
            flush,
            trim,
            zero,
            fast_zero,
            fua,
            rotational: yes("is_rotational")?,
            multi_conn: yes("can_multi_conn")?,
            cache: self.support("can_cache")?.unwrap_or_default(),
            extents: yes("can_extents")?,
            block_size,
            ..Capabilities::default()
        })
    }

    /// The script decides, as nbdkit-plugin(3) has it: "nbdkit passes all requests through to the plugin".
    fn takes_any_size(&self) -> bool {
        true
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _call: &Call) -> device::Result<()> {
        buffer.copy_from_slice(&self.pread(buffer.len(), offset)?);
        Ok(())
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, _call: &Call) -> device::Result<()> {
        reply.shared(Arc::new(self.pread(length, offset)?), 0..length);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, _call: &Call) -> device::Result<()> {
        match self.ranged("pwrite", data.len() as u64, offset, Some(flags), data)? {
            true => Ok(()),
            false => Err(Error::failed(ErrorCode::Io, "pwrite not implemented")),
        }
    }

    fn flush(&self, _call: &Call) -> device::Result<()> {
        self.scripts.done("flush", self.asked(&[&self.handle])).map(drop)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, _call: &Call) -> device::Result<()> {
        self.ranged("trim", length, offset, Some(flags), &[]).map(drop)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, _call: &Call) -> device::Result<()> {
        match self.ranged("zero", length, offset, Some(flags), &[])? {
            true => Ok(()),
            false => Err(Error::not_supported("zero falling back to pwrite")),
        }
    }

    fn cache(&self, length: u64, offset: u64, _call: &Call) -> device::Result<()> {
        self.ranged("cache", length, offset, None, &[]).map(drop)
    }

    fn extents(&self, extents: &mut Extents, _call: &Call) -> device::Result<()> {
        let method = "extents";
        let (length, offset) = (extents.length().to_string(), extents.offset().to_string());
        let flags: &[u8] = if extents.one() { b"req_one" } else { b"" };
        let words = [&*self.handle, length.as_bytes(), offset.as_bytes(), flags];
        match self.scripts.text(method, self.asked(&words))? {
            Some(text) => {
                let name = self.scripts.name(method);
                add_extents(extents, &text)
                    .map_err(|why| Error::failed(ErrorCode::Io, format!("{name}: extents: {why}")))
            }
            None => {
                let name = self.scripts.name(method);
                let why = format!("{name}: can_extents returned true, but extents method is not defined");
                Err(Error::failed(ErrorCode::Io, why))
            }
        }
    }

    fn close(&self) -> device::Result<()> {
        // As in nbdkit, what goes wrong with it is of no interest.
        let _ = self.scripts.done("close", Asked::of(&[&self.handle]));
        Ok(())
    }
}

/// Lines of offset, length and kind.
fn add_extents(extents: &mut Extents, text: &[u8]) -> Result<(), String> {
    let mut next = None;
    let text = String::from_utf8_lossy(text);
    for line in text.split('\n').filter_map(values::extent_line) {
        let mut words = line.split([' ', '\t']).filter(|word| !word.is_empty());
        let (Some(offset), Some(length)) = (words.next(), words.next()) else {
            return Err(format!("cannot parse {}", line.escape_debug()));
        };
        let (offset, length) = (values::size(offset)?, values::size(length)?);
        let kind = words.next().map_or(0, extent_kind);
        if next.is_some_and(|next| next != offset) {
            return Err("nbdkit_add_extent: extents must be added in ascending order and must be contiguous".to_owned());
        }
        if next.is_none() && offset > extents.offset() {
            return Err(format!("nbdkit_add_extent: first extent must not be > start ({})", extents.offset()));
        }
        next = Some(offset.saturating_add(length));
        if length > 0 {
            extents.add(offset, length, kind);
        }
    }
    Ok(())
}

/// A number, or words among which are `hole` and `zero`.
fn extent_kind(word: &str) -> u64 {
    use nbdcaptive_actors::device::{HOLE, ZERO};
    let digits = word.find(|c: char| !c.is_ascii_digit()).unwrap_or(word.len());
    match word[..digits].parse::<u64>() {
        Ok(number) => number & (HOLE | ZERO),
        Err(_) => {
            [("hole", HOLE), ("zero", ZERO)].iter().filter(|(name, _)| word.contains(name)).map(|(_, bit)| bit).sum()
        }
    }
}

/// Makes a script of `text` that only this user can run.
pub fn write_script(directory: &Path, name: &str, text: &[u8]) -> std::io::Result<PathBuf> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = directory.join(name);
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o500).open(&path)?;
    file.write_all(text)?;
    Ok(path)
}

/// A directory for scripts.
pub fn directory() -> Result<PathBuf, ConfigError> {
    let failed = |error| format!("cannot make a directory for scripts in {}: {error}", kept::parent().display());
    kept::directory().map_err(|error| ConfigError(failed(error)))
}

/// A path as [`Source`] has it.
pub fn c_path(path: &Path) -> Result<CString, ConfigError> {
    kept::c_path(path).map_err(|error| ConfigError(format!("{}: {error}", path.display())))
}

/// A value as a word for a script.
pub fn word(value: &OsStr) -> &[u8] {
    std::os::unix::ffi::OsStrExt::as_bytes(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_a_name_and_a_message() {
        for (text, code, line) in [
            ("ENOSPC Out of space\n", ErrorCode::NoSpace, "Out of space"),
            ("eperm", ErrorCode::NotPermitted, ""),
            ("ESHUTDOWN\nline one\nline two\n", ErrorCode::Shutdown, "line one"),
            ("EINVALID", ErrorCode::Io, "EINVALID"),
            ("EPIPE", ErrorCode::Io, "EPIPE"),
            ("EOPNOTSUPP  x", ErrorCode::NotSupported, "x"),
            ("EROFS", ErrorCode::NotPermitted, ""),
            ("EFBIG", ErrorCode::NoSpace, ""),
            ("no more\nof it", ErrorCode::Io, "no more"),
            ("\n\n", ErrorCode::Io, "script exited with error, but did not print an error message on stderr"),
        ] {
            assert_eq!(complaint(text.as_bytes(), ErrorCode::Io), (code, line.to_owned()), "{text}");
        }
        assert_eq!(complaint(b"", ErrorCode::Shutdown).0, ErrorCode::Shutdown);
        assert_eq!(complaint(b"\xff\xc3", ErrorCode::Io).0, ErrorCode::Io);
    }

    /// nbdkit's tests/test-eval-exports.sh.
    #[test]
    fn a_list_of_exports_has_three_forms() {
        let listed = |text: &str| {
            let list = exports(text.as_bytes()).unwrap();
            let one = |export: Export| format!("{}={}", String::from_utf8(export.name).unwrap(), export.description);
            list.into_iter().map(one).collect::<Vec<_>>().join(",")
        };
        for empty in ["", "NAMES\n", "INTERLEAVED\n", "NAMES+DESCRIPTIONS\n", "no newline"] {
            assert!(exports(empty.as_bytes()).unwrap().is_empty(), "{empty}");
        }
        for default in ["\n", "NAMES\n\n", "INTERLEAVED\n\n", "INTERLEAVED\n\n\n", "NAMES+DESCRIPTIONS\n\n\n"] {
            assert_eq!(listed(default), "=", "{default}");
        }
        assert_eq!(listed("a\nb\n"), "a=,b=");
        assert_eq!(listed("INTERLEAVED\na\nA\nb\nB\n"), "a=A,b=B");
        assert_eq!(listed("INTERLEAVED\na\nA\nb\n"), "a=A,b=");
        assert_eq!(listed("NAMES+DESCRIPTIONS\na\nb\nA\nB\n"), "a=A,b=B");
        assert_eq!(listed("NAMES+DESCRIPTIONS\na\nb\nA\n"), "a=A,b=");
        let long = "x".repeat(NBD_MAX_STRING);
        assert_eq!(exports(format!("{long}\n").as_bytes()).unwrap().len(), 1);
        assert!(exports(format!("{long}x\n").as_bytes()).is_err());
        assert_eq!(exports("x\n".repeat(MAX_EXPORTS).as_bytes()).unwrap().len(), MAX_EXPORTS);
        assert!(exports("x\n".repeat(MAX_EXPORTS + 1).as_bytes()).is_err());
    }

    #[test]
    fn extents_are_lines_without_gaps() {
        let map = |text: &str| {
            let mut extents = Extents::new(100, 50, false);
            let added = add_extents(&mut extents, text.as_bytes());
            added.map(|()| extents.list().iter().map(|extent| (extent.length, extent.flags)).collect::<Vec<_>>())
        };
        assert_eq!(map("0 1K hole,zero\n").unwrap(), [(50, 3)]);
        assert_eq!(map("0 110\n110 1k\tzero").unwrap(), [(10, 0), (40, 2)]);
        assert_eq!(map("0 110 1\n110 0\n110 1k 2\n").unwrap(), [(10, 1), (40, 2)]);
        assert!(map("").unwrap().is_empty());
        assert_eq!(
            map("# offset, length\n\n0 110 hole# one\n \t\n  110 1k zero # two\n\n").unwrap(),
            [(10, 1), (40, 2)]
        );
        assert!(map("0 110\n111 10\n").unwrap_err().contains("contiguous"));
        assert!(map("101 10\n").unwrap_err().contains("must not be > start (100)"));
        assert!(map("0\n").unwrap_err().contains("cannot parse 0"));
        assert!(map("0 x\n").is_err());
    }

    #[test]
    fn block_sizes_are_checked_as_nbdkit_does() {
        let check = |minimum, preferred, maximum| check_block_size(BlockSize { minimum, preferred, maximum });
        assert_eq!(check(0, 0, 0).unwrap(), None);
        assert!(check(1, 512, u32::MAX).unwrap().is_some());
        assert!(check(512, 4096, 1 << 20).unwrap().is_some());
        for (minimum, preferred, maximum) in [
            (0, 512, 512),
            (3, 512, 512),
            (1, 256, 512),
            (1, 513, 1024),
            (512, 512, 1000),
            (1024, 512, 1024),
            (1, 1024, 512),
        ] {
            assert!(check(minimum, preferred, maximum).is_err(), "{minimum} {preferred} {maximum}");
        }
    }
}

//! The command line: words in, [`Options`] or one clear line out. Pure: nothing is opened, read or looked up.
//!
//! ```text
//!   argv ──> spell_out ──> clap ──> setters of the table ──> finish ──> (Request, Options)
//!            getopt_long's  one     one per option           what follows from what,
//!            reading        form    ([`options`])            and what excludes what
//! ```
//!
//! clap reads a command line otherwise than `getopt_long`, which nbdkit uses: `-e=x`, abbreviations of aliases, options
//! that answer before the next word is looked at, and every error line. So `spell_out` first writes each option in
//! the one form that both read alike, `--name=value`, and finds the mistakes that `getopt_long` finds.
//! Source: nbdkit server/main.c, glibc getopt_long(3).

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::num::NonZeroU32;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub mod candidates;
pub mod completion;
pub mod dump_config;
pub mod help;
pub mod man;
pub mod options;

use options::{Effect, OPTIONS, OptionSpec, WORDS};

use crate::identity::{NBDKIT, Package};

/// What the command line asks for. In rising order of who wins where several are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Request {
    /// To serve.
    Serve,
    /// `--probe`, which goes with nothing that has to do with serving.
    Probe,
    /// `--dump-plugin`. There is a plugin.
    DumpPlugin,
    /// `--completion`: a script for a shell.
    Completion,
    /// `--man`: a manual page, or the list of them.
    Man,
    /// `--version`, of the plugin and filters too if there is a plugin.
    Version,
    /// `--help`, for the plugin and filters too if there is a plugin.
    Help,
    /// `--dump-config`, whatever else there is.
    DumpConfig,
    /// `--short-options`, whatever else there is.
    ShortOptions,
    /// `--long-options`, whatever else there is.
    LongOptions,
    /// `--candidates`, from the script of a shell: the words that follow are a command line that is being typed.
    Candidates,
}

/// Which addresses to listen on and to look up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Neither `-4` nor `-6`.
    Any,
    /// `-4`
    V4,
    /// `-6`
    V6,
}

/// Where error messages go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogTo {
    /// stderr in the foreground, else the system log.
    Default,
    /// stderr
    Stderr,
    /// The system log.
    Syslog,
    /// Nowhere.
    Null,
    /// The end of this file. The path is absolute.
    File(PathBuf),
}

/// A Unix socket to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unix {
    /// A socket of ours in a directory of ours.
    Private,
    /// This path. It is absolute.
    Path(PathBuf),
}

/// What is asked of clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// TLS is not offered.
    Off,
    /// Clients may use TLS or not.
    On,
    /// Clients must use TLS.
    Require,
}

/// Whose end is the server's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitWithParent {
    /// Nobody's.
    No,
    /// The process that started this one.
    Parent,
    /// This process, 1 to 2^31-1.
    Pid(u32),
}

/// A number for one part of the server, that makes it say more, or less, with `-v` (`-D NAME.FLAG=N`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DebugFlag {
    /// Whose it is: the name of a plugin or filter, or `nbdkit` for the server's own.
    pub name: String,
    /// Its own name, which may have dots in it.
    pub flag: String,
    /// What it is set to.
    pub value: i32,
}

impl DebugFlag {
    /// Takes `NAME.FLAG=N` apart: at the first dot and at the first equals sign. Source: nbdkit server/debug-flags.c.
    fn parse(text: &str) -> Option<DebugFlag> {
        let (key, value) = text.split_once('=')?;
        let (name, flag) = key.split_once('.')?;
        let value = crate::values::int("flag", value).ok()?;
        (!name.is_empty() && !flag.is_empty()).then(|| DebugFlag {
            name: name.to_owned(),
            flag: flag.to_owned(),
            value,
        })
    }
}

/// Everything that the command line says, checked for itself but against nothing outside. `Default` is what an empty
/// command line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// `-4`, `-6`; the last one counts.
    pub family: Family,
    /// `--completion`: for which shell.
    pub completion: Option<completion::Shell>,
    /// `-D`, in the order of the command line.
    pub debug_flags: Vec<DebugFlag>,
    /// `--drain-timeout`: how long requests in flight may take to be finished.
    pub drain_timeout: Duration,
    /// `--exit-with-parent`
    pub exit_with_parent: ExitWithParent,
    /// `-e`; empty is the default export.
    pub export_name: OsString,
    /// `--filter`, the first one being next to the client.
    pub filters: Vec<OsString>,
    /// `-f`, or implied by `--run`, `-s` or `--exit-with-parent`.
    pub foreground: bool,
    /// `-g`: a name or a number.
    pub group: Option<String>,
    /// `--grace-period`: how long the command may take after it was told to end.
    pub grace_period: Duration,
    /// `-i`: an address or a name.
    pub ip_address: Option<String>,
    /// `--json`, only with `probe`
    pub json: bool,
    /// `--keepalive`
    pub keepalive: bool,
    /// `--log`
    pub log: LogTo,
    /// `--man`: the page, empty where it is [`Options::plugin`], or none is named.
    pub man: Option<OsString>,
    /// `--mask-handshake`: which NBD handshake flags may be offered.
    pub mask_handshake: u32,
    /// `-o`: the oldstyle handshake.
    pub oldstyle: bool,
    /// `--max-clients`: how many may be connected at a time.
    pub max_clients: Option<NonZeroU32>,
    /// `--no-mc`
    pub no_meta_contexts: bool,
    /// `--no-eh`
    pub no_extended_headers: bool,
    /// `--no-sr`
    pub no_structured_replies: bool,
    /// `-P`, absolute.
    pub pidfile: Option<PathBuf>,
    /// `-p`: a number or the name of a service.
    pub port: Option<String>,
    /// `--print-uri`
    pub print_uri: bool,
    /// `--probe`: the URI of a server to look at, as written.
    pub probe: Option<OsString>,
    /// `-r`
    pub read_only: bool,
    /// `--run`: a command for the shell.
    pub run: Option<OsString>,
    /// `--selinux-label`: the label of the sockets to listen on, of IP and Unix.
    pub selinux_label: Option<OsString>,
    /// `-s`: one client, on stdin and stdout. Never together with `port`, `unix`, `vsock` or `run`.
    pub single: bool,
    /// `--spin`: how long a thread looks for requests before it sleeps, where that pays.
    pub spin: Duration,
    /// `--swap`: all memory is to be locked.
    pub swap: bool,
    /// `-t`; none is the server's choice, and so is 0.
    pub threads: Option<NonZeroU32>,
    /// `--timeout`: how long a client may take to negotiate; none is for ever, and so is 0.
    pub timeout: Option<Duration>,
    /// `--tls`
    pub tls: Tls,
    /// `--tls` was on the command line, so that what cannot be had is an error.
    pub tls_given: bool,
    /// `--tls-certificates`, as written.
    pub tls_certificates: Option<PathBuf>,
    /// `--tls-psk`, as written. Used before `tls_certificates`.
    pub tls_psk: Option<PathBuf>,
    /// `--tls-verify-peer`
    pub tls_verify_peer: bool,
    /// `-U`, or implied by `--run` without `-p`. Never together with `port`.
    pub unix: Option<Unix>,
    /// `-u`: a name or a number.
    pub user: Option<String>,
    /// `-v`
    pub verbose: bool,
    /// `--vsock`. Never together with `unix`.
    pub vsock: bool,
    /// The first word that is not an option: a short name or a path. `None` only where the request needs none.
    pub plugin: Option<OsString>,
    /// The words after it, for [`split_parameter`]; or those that follow an option that answers at once.
    pub parameters: Vec<OsString>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            family: Family::Any,
            completion: None,
            debug_flags: Vec::new(),
            drain_timeout: Duration::from_secs(30),
            exit_with_parent: ExitWithParent::No,
            export_name: OsString::new(),
            filters: Vec::new(),
            foreground: false,
            group: None,
            grace_period: Duration::from_secs(5),
            ip_address: None,
            json: false,
            keepalive: false,
            log: LogTo::Default,
            man: None,
            mask_handshake: u32::MAX,
            oldstyle: false,
            max_clients: None,
            no_meta_contexts: false,
            no_extended_headers: false,
            no_structured_replies: false,
            pidfile: None,
            port: None,
            print_uri: false,
            probe: None,
            read_only: false,
            run: None,
            selinux_label: None,
            single: false,
            spin: Duration::from_micros(50),
            swap: false,
            threads: None,
            timeout: None,
            tls: Tls::On,
            tls_given: false,
            tls_certificates: None,
            tls_psk: None,
            tls_verify_peer: false,
            unix: None,
            user: None,
            verbose: false,
            vsock: false,
            plugin: None,
            parameters: Vec::new(),
        }
    }
}

/// A command line that cannot be followed. Reads as exactly one line, without the program's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UsageError {
    /// A word that starts with `--` and is no option, and the name that may have been meant.
    UnknownOption(String, Option<&'static str>),
    /// A letter that is no option.
    UnknownLetter(char),
    /// The start of several names.
    Ambiguous(String, Vec<&'static str>),
    /// An option, by its long name, that ends the line but wants a value.
    MissingValue(&'static str),
    /// The same, by its letter.
    MissingValueOfLetter(char),
    /// An option, by its long name, that takes no value but got one with `=`.
    UnwantedValue(&'static str),
    /// A value that its option refuses, with the sentence that says so.
    BadValue(String),
    /// A `--log` that is nowhere.
    BadLog,
    /// A `-D` that is not `NAME.FLAG=N`.
    BadDebugFlag,
    /// `--tls=require` with a protocol that knows no TLS.
    OldstyleTls,
    /// An empty path.
    EmptyPath,
    /// A relative path, where the current directory is not known.
    NoCurrentDirectory(PathBuf),
    /// Nothing to serve.
    NoPlugin,
    /// `--dump-plugin` of nothing.
    NoPluginToDump,
    /// An option or plugin together with `--probe`, which serves nothing.
    NotWithProbe(String),
    /// `--json` of something else.
    OnlyWithProbe,
    /// Options that exclude each other.
    Combination,
    /// An option that says where to listen, where the sockets came with the process.
    Activated(&'static str),
}

impl UsageError {
    /// What goes to stderr: every line of it, with the program's name and the line ends.
    pub fn report(&self, program: &str) -> String {
        let hint = match self {
            UsageError::NoPlugin => {
                format!("Use '{program} --help' or read the nbdkit(1) manual page for documentation.\n")
            }
            _ => String::new(),
        };
        // As nbdkit: what its parsers of values say is an error, what the command line is told of itself stands for itself.
        let kind = match self {
            UsageError::BadValue(_) | UsageError::EmptyPath => "error: ",
            _ => "",
        };
        format!("{program}: {kind}{self}\n{hint}")
    }
}

impl From<String> for UsageError {
    fn from(sentence: String) -> UsageError {
        UsageError::BadValue(sentence)
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = match self {
            UsageError::UnknownOption(word, None) => format!("unrecognized option '{word}'"),
            UsageError::UnknownOption(word, Some(name)) => {
                format!("unrecognized option '{word}'; did you mean '--{name}'?")
            }
            UsageError::UnknownLetter(letter) => format!("invalid option -- '{letter}'"),
            UsageError::Ambiguous(word, names) => {
                let names: Vec<_> = names.iter().map(|name| format!("'--{name}'")).collect();
                format!("option '{word}' is ambiguous; possibilities: {}", names.join(" "))
            }
            UsageError::MissingValue(name) => format!("option '--{name}' requires an argument"),
            UsageError::MissingValueOfLetter(letter) => format!("option requires an argument -- '{letter}'"),
            UsageError::UnwantedValue(name) => format!("option '--{name}' doesn't allow an argument"),
            UsageError::BadValue(sentence) => sentence.clone(),
            UsageError::BadLog => r#"--log must be "stderr", "syslog", "null", or an absolute path"#.to_owned(),
            UsageError::BadDebugFlag => "-D (Debug Flag) must have the format NAME.FLAG=N".to_owned(),
            UsageError::OldstyleTls => "cannot use oldstyle protocol (-o) and require TLS".to_owned(),
            UsageError::EmptyPath => "cannot convert null or empty path to an absolute path".to_owned(),
            UsageError::NoCurrentDirectory(path) => {
                format!("cannot make '{}' absolute: the current directory is not known", path.display())
            }
            UsageError::NoPlugin => "no plugins given on the command line.".to_owned(),
            UsageError::NoPluginToDump => {
                "--dump-plugin wants a plugin; to find out about the server use --dump-config".to_owned()
            }
            UsageError::NotWithProbe(word) => format!("--probe serves nothing: it cannot be used with {word}"),
            UsageError::OnlyWithProbe => "--json says how --probe answers: it cannot be used without it".to_owned(),
            UsageError::Activated(option) => format!("cannot use socket activation with {option} flag"),
            UsageError::Combination => {
                "--dump-plugin, -p, --run, -s, -U or --vsock options cannot be used in this combination".to_owned()
            }
        };
        // Whatever a value was made of, the line stays one line.
        line.chars().try_for_each(|c| match c {
            c if c.is_control() => write!(f, "{}", c.escape_default()),
            c => write!(f, "{c}"),
        })
    }
}

impl std::error::Error for UsageError {}

/// Reads a command line, without the program's name. `current_directory` is where relative paths start; it is needed
/// only if there are any. Of several mistakes, one in how options are written comes before one in a value.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    current_directory: Option<&Path>,
) -> Result<(Request, Options), UsageError> {
    let mut options = Options::default();
    let words = match spell_out(args)? {
        Spelled::Words(words) => words,
        Spelled::Answer(request, rest) => {
            options.parameters = rest;
            return Ok((request, options));
        }
    };
    // What `spell_out` lets through, clap takes; if it ever does not, its word for the fault is better than a panic.
    let mut matches = options::command()
        .try_get_matches_from(words)
        .map_err(|error| UsageError::BadValue(error.kind().to_string()))?;

    // In the order of the command line, so that the last one wins and the first mistake is the one reported.
    let mut met = Vec::new();
    for spec in OPTIONS {
        match spec.effect {
            Effect::Flag(_) | Effect::Ask(_) | Effect::AskAtOnce(_) if matches.get_flag(spec.name()) => {
                met.push((matches.index_of(spec.name()), spec, OsString::new()));
            }
            Effect::Flag(_) | Effect::Ask(_) | Effect::AskAtOnce(_) => {}
            Effect::Value(..) | Effect::Optional(..) => {
                let indices: Vec<_> = matches.indices_of(spec.name()).into_iter().flatten().collect();
                let values = matches.remove_many::<OsString>(spec.name()).into_iter().flatten();
                met.extend(indices.into_iter().zip(values).map(|(index, value)| (Some(index), spec, value)));
            }
        }
    }
    met.sort_by_key(|(index, ..)| *index);
    let mut request = Request::Serve;
    let mut beside_probe = None;
    for (_, spec, value) in met {
        if !matches!(spec.name(), "probe" | "json" | "timeout") {
            beside_probe = beside_probe.or(Some(spec.name()));
        }
        match spec.effect {
            Effect::Flag(set) => set(&mut options),
            Effect::Ask(asked) | Effect::AskAtOnce(asked) => request = request.max(asked),
            Effect::Value(_, set) | Effect::Optional(_, _, set) => {
                set(&mut options, &value)?;
            }
        }
    }
    let mut words = matches.remove_many::<OsString>(WORDS).into_iter().flatten();
    options.plugin = words.next();
    options.parameters = words.collect();
    let asked = [(options.completion.is_some(), Request::Completion), (options.man.is_some(), Request::Man)];
    let request = asked.into_iter().filter(|(given, _)| *given).fold(request, |so_far, (_, one)| so_far.max(one));
    let request = probe_or(request, &options, beside_probe)?;
    finish(request, &mut options, current_directory)?;
    Ok((request, options))
}

/// What is asked for, with `--probe` in mind: it is asked for where nothing else is. `beside` is another option that was given.
fn probe_or(request: Request, options: &Options, beside: Option<&str>) -> Result<Request, UsageError> {
    match (request, &options.probe, beside, &options.plugin) {
        (Request::Serve, None, ..) if options.json => Err(UsageError::OnlyWithProbe),
        (Request::Serve, Some(_), Some(option), _) => Err(UsageError::NotWithProbe(format!("--{option}"))),
        (Request::Serve, Some(_), None, Some(plugin)) => {
            Err(UsageError::NotWithProbe(format!("the plugin '{}'", plugin.to_string_lossy())))
        }
        (Request::Serve, Some(_), None, None) => Ok(Request::Probe),
        _ => Ok(request),
    }
}

/// What [`spell_out`] makes of a command line.
enum Spelled {
    /// Options as `--name` or `--name=value`, then `--`, then everything else.
    Words(Vec<OsString>),
    /// An option that answers at once was met. With the words that follow it.
    Answer(Request, Vec<OsString>),
}

/// Reads words as `getopt_long` does: options may come anywhere before `--`, long names may be cut short while they
/// remain clear, letters may be clustered, and an option that needs a value takes the next word whatever it looks like.
fn spell_out(args: impl IntoIterator<Item = OsString>) -> Result<Spelled, UsageError> {
    let mut spelled = Vec::new();
    let mut others = Vec::new();
    let mut args = args.into_iter();
    while let Some(word) = args.next() {
        match word.as_bytes() {
            b"--" => others.extend(args.by_ref()),
            [b'-', b'-', ..] => {
                let (name, spec, mut value) = long_option(&word)?;
                if let Effect::AskAtOnce(request) = spec.effect {
                    return Ok(Spelled::Answer(request, args.collect()));
                }
                if matches!(spec.effect, Effect::Value(..)) && value.is_none() {
                    value = Some(args.next().ok_or(UsageError::MissingValue(name))?);
                }
                spelled.push(plain(spec, value.as_deref()));
            }
            [b'-', letters @ ..] if !letters.is_empty() => {
                let mut letters = letters;
                while let Some((letter, rest)) = letters.split_first() {
                    let Some(spec) = OPTIONS.iter().find(|spec| spec.short == Some(char::from(*letter))) else {
                        let letter = String::from_utf8_lossy(letters).chars().next();
                        return Err(UsageError::UnknownLetter(letter.unwrap_or(char::REPLACEMENT_CHARACTER)));
                    };
                    letters = rest;
                    let value = match spec.effect {
                        Effect::AskAtOnce(request) => return Ok(Spelled::Answer(request, args.collect())),
                        Effect::Value(..) if rest.is_empty() => {
                            let missing = UsageError::MissingValueOfLetter(char::from(*letter));
                            Some(args.next().ok_or(missing)?)
                        }
                        Effect::Value(..) => {
                            letters = &[];
                            Some(OsStr::from_bytes(rest).to_owned())
                        }
                        Effect::Flag(_) | Effect::Ask(_) | Effect::Optional(..) => None,
                    };
                    spelled.push(plain(spec, value.as_deref()));
                }
            }
            _ => others.push(word),
        }
    }
    spelled.push(OsString::from("--"));
    spelled.append(&mut others);
    Ok(Spelled::Words(spelled))
}

/// The form that needs no further reading: the full name, and `=` before a value.
fn plain(spec: &OptionSpec, value: Option<&OsStr>) -> OsString {
    let mut word = OsString::from("--");
    word.push(spec.name());
    if let Some(value) = value {
        word.push("=");
        word.push(value);
    }
    word
}

/// Takes a word that starts with `--` apart: the full name that was meant, its option, and what stood after `=`.
fn long_option(word: &OsStr) -> Result<(&'static str, &'static OptionSpec, Option<OsString>), UsageError> {
    let bytes = &word.as_bytes()[2..];
    let (start, value) = match bytes.iter().position(|byte| *byte == b'=') {
        Some(equals) => (&bytes[..equals], Some(OsString::from_vec(bytes[equals + 1..].to_vec()))),
        None => (bytes, None),
    };
    let names = options::long_names();
    let mut possible: Vec<_> = names.iter().filter(|(name, _)| name.as_bytes().starts_with(start)).collect();
    if let Some(exact) = possible.iter().position(|(name, _)| name.len() == start.len()) {
        possible = vec![possible[exact]];
    }
    // What is short for an option of nbdkit's stays so.
    if possible.iter().any(|(name, _)| !options::OUR_OWN.contains(name)) {
        possible.retain(|(name, _)| !options::OUR_OWN.contains(name));
    }
    let Some((name, spec)) = possible.first() else {
        let meant = closest(&String::from_utf8_lossy(start), names.iter().map(|(name, _)| *name));
        return Err(UsageError::UnknownOption(word.to_string_lossy().into_owned(), meant));
    };
    // Aliases of one option do not make its start unclear, and `getopt_long` names only what differs from the first.
    let rivals = possible[1..].iter().filter(|(_, other)| !std::ptr::eq(*other, *spec)).map(|(name, _)| *name);
    let rivals: Vec<_> = rivals.collect();
    if !rivals.is_empty() {
        let names = std::iter::once(*name).chain(rivals).collect();
        return Err(UsageError::Ambiguous(word.to_string_lossy().into_owned(), names));
    }
    if value.is_some() && spec.value().is_none() {
        return Err(UsageError::UnwantedValue(name));
    }
    Ok((name, spec, value))
}

/// What follows from what was said, and what cannot be said together.
fn finish(request: Request, options: &mut Options, current_directory: Option<&Path>) -> Result<(), UsageError> {
    // First, because a path that cannot be is a bad value, which is one whatever is asked for.
    if let Some(Unix::Path(path)) = &mut options.unix {
        make_absolute(path, current_directory)?;
    }
    if let Some(path) = &mut options.pidfile {
        make_absolute(path, current_directory)?;
    }
    if options.plugin.is_none() {
        return match request {
            Request::Serve => Err(UsageError::NoPlugin),
            Request::DumpPlugin => Err(UsageError::NoPluginToDump),
            _ => Ok(()),
        };
    }
    if options.tls == Tls::Require && options.oldstyle {
        return Err(UsageError::OldstyleTls);
    }
    let [port, unix, run] = [options.port.is_some(), options.unix.is_some(), options.run.is_some()];
    let not_single = port || unix || run || options.vsock || request == Request::DumpPlugin;
    if (unix && (port || options.vsock)) || (options.single && not_single) {
        return Err(UsageError::Combination);
    }
    if run && !port && !options.vsock {
        options.unix.get_or_insert(Unix::Private);
    }
    let stays = options.run.is_some() || options.single || options.exit_with_parent != ExitWithParent::No;
    options.foreground |= stays;
    Ok(())
}

/// What the command line must not say where the sockets to listen on came with the process.
pub fn check_activated(options: &Options) -> Result<(), UsageError> {
    let given = [
        (options.run.is_some(), "--run"),
        (options.ip_address.is_some(), "-i"),
        (options.port.is_some(), "-p"),
        (options.single, "-s"),
        (options.unix.is_some(), "-U"),
    ];
    match given.into_iter().find(|(given, _)| *given) {
        Some((_, option)) => Err(UsageError::Activated(option)),
        None => Ok(()),
    }
}

/// Symbolic links, `.` and `..` stay as they are, as in nbdkit: the path need not exist yet.
fn make_absolute(path: &mut PathBuf, current_directory: Option<&Path>) -> Result<(), UsageError> {
    if path.as_os_str().is_empty() {
        return Err(UsageError::EmptyPath);
    }
    if path.is_relative() {
        let start = current_directory.ok_or_else(|| UsageError::NoCurrentDirectory(path.clone()))?;
        *path = start.join(&*path);
    }
    Ok(())
}

/// The candidate that differs from `word` in the fewest letters, if that is few enough to be a slip: one in three, and
/// at least one.
pub fn closest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let slips = (word.chars().count() / 3).max(1);
    // Lengths alone rule out most, and keep a very long word cheap.
    let alike = |candidate: &&str| word.chars().count().abs_diff(candidate.chars().count()) <= slips;
    let near = candidates.into_iter().filter(alike).map(|candidate| (distance(word, candidate), candidate));
    near.filter(|(distance, _)| *distance <= slips)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// How many letters have to be put in, taken out or changed, or neighbours exchanged, to turn one word into the other.
/// Source: the optimal string alignment distance.
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<_>, Vec<_>) = (from.chars().collect(), to.chars().collect());
    // Rows of the table of distances between prefixes; the two before the last are all that is looked at.
    let mut before = Vec::new();
    let mut last: Vec<_> = (0..=to.len()).collect();
    for i in 1..=from.len() {
        let mut row = vec![i];
        for j in 1..=to.len() {
            let changed = last[j - 1] + usize::from(from[i - 1] != to[j - 1]);
            let mut best = changed.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                best = best.min(before[j - 2] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[to.len()]
}

/// A word after the plugin's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parameter {
    /// `key=value`
    KeyValue(String, OsString),
    /// Anything else: a value for the plugin's magic key.
    Bare(OsString),
}

/// Splits at the first `=`, if what is before it can be a key: a letter, then letters, digits, `.`, `_` and `-`. So
/// `./a=b` is a file name. Source: nbdkit server/main.c `is_config_key`.
pub fn split_parameter(arg: &OsStr) -> Parameter {
    let bytes = arg.as_bytes();
    let key = bytes.iter().position(|byte| *byte == b'=').map(|equals| &bytes[..equals]);
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    match key {
        Some(key) if key.first().is_some_and(u8::is_ascii_alphabetic) && key.iter().all(allowed) => {
            let value = OsStr::from_bytes(&bytes[key.len() + 1..]).to_owned();
            // Every allowed byte is ASCII, so nothing is lost.
            Parameter::KeyValue(String::from_utf8_lossy(key).into_owned(), value)
        }
        _ => Parameter::Bare(arg.to_owned()),
    }
}

/// The answer to `--long-options`: every long name but those that only completion asks for, one per line. As nbdkit those that
/// nbdkit has, for scripts hold them against its manual.
pub fn long_options(package: Package) -> String {
    let is_said = |name: &str| package != NBDKIT || !options::OUR_OWN.contains(&name);
    let names = options::long_names().into_iter();
    let said = names.filter(|(name, spec)| !spec.help.is_empty() && is_said(name));
    said.map(|(name, _)| format!("--{name}\n")).collect()
}

/// The answer to `--short-options`: every letter, one per line.
pub fn short_options() -> String {
    let mut letters: Vec<_> = OPTIONS.iter().filter_map(|spec| spec.short).collect();
    letters.sort_unstable();
    letters.into_iter().map(|letter| format!("-{letter}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::OURS;

    fn parse_words(words: &[&str]) -> Result<(Request, Options), UsageError> {
        parse(words.iter().map(OsString::from), Some(Path::new("/here")))
    }

    #[track_caller]
    fn served(words: &[&str]) -> Options {
        let (request, options) = parse_words(words).expect("the command line is good");
        assert_eq!(request, Request::Serve);
        options
    }

    #[track_caller]
    fn asked(words: &[&str]) -> Request {
        parse_words(words).expect("the command line is good").0
    }

    #[track_caller]
    fn refused(words: &[&str]) -> String {
        parse_words(words).expect_err("the command line is bad").to_string()
    }

    #[test]
    fn says_nothing_but_the_plugin_unless_told() {
        assert_eq!(served(&["null"]), Options { plugin: Some("null".into()), ..Options::default() });
    }

    #[test]
    fn options_come_anywhere_before_a_double_dash() {
        let options = served(&["-r", "memory", "1M", "--verbose", "-", "a=b", "-p", "1", "--", "-f", "--", "--help"]);
        assert!(options.read_only && options.verbose && !options.foreground);
        assert_eq!(options.port.as_deref(), Some("1"));
        assert_eq!(options.plugin, Some("memory".into()));
        assert_eq!(options.parameters, ["1M", "-", "a=b", "-f", "--", "--help"]);
    }

    #[test]
    fn every_name_of_every_option_is_known_in_full() {
        for spec in OPTIONS {
            for name in spec.long {
                let (found, same, value) = long_option(OsStr::new(&format!("--{name}"))).expect("it is in the table");
                assert_eq!((found, value), (*name, None));
                assert!(std::ptr::eq(same, spec));
            }
        }
    }

    #[test]
    fn a_long_name_may_be_cut_short_while_it_is_clear() {
        assert_eq!(served(&["--expo=x", "null"]).export_name, "x");
        assert_eq!(served(&["--filt", "a", "null", "--filter=b"]).filters, ["a", "b"]);
        assert!(served(&["--verb", "null"]).verbose);
        // Exact names win over longer ones.
        assert_eq!(served(&["--tls=off", "null"]).tls, Tls::Off);
        assert_eq!(
            refused(&["--t"]),
            "option '--t' is ambiguous; possibilities: '--threads' '--time-out' '--timeout' '--tls' \
             '--tls-certificates' '--tls-psk' '--tls-verify-peer'"
        );
        assert!(served(&["--pri", "null"]).print_uri && served(&["--pr", "null"]).print_uri);
        // Aliases of the first are not listed.
        assert_eq!(
            refused(&["--p=1"]),
            "option '--p=1' is ambiguous; possibilities: '--pid-file' '--port' \
                                         '--print-uri' '--print-url'"
        );
    }

    #[test]
    fn letters_cluster_and_values_may_be_glued_on() {
        let options = served(&["-rfvp1234", "null"]);
        assert!(options.read_only && options.foreground && options.verbose);
        assert_eq!(options.port.as_deref(), Some("1234"));
        assert_eq!(served(&["-U-", "null"]).unix, Some(Unix::Private));
        // As in getopt, the equals sign belongs to the value of a letter.
        assert_eq!(served(&["-e=x", "null"]).export_name, "=x");
        assert_eq!(served(&["--export==x", "null"]).export_name, "=x");
        assert_eq!(served(&["-e", "", "null"]).export_name, "");
    }

    #[test]
    fn a_wanted_value_is_the_next_word_whatever_it_looks_like() {
        assert_eq!(served(&["-U", "-", "null"]).unix, Some(Unix::Private));
        assert_eq!(served(&["-e", "--", "null"]).export_name, "--");
        assert_eq!(served(&["--run", "--help", "null"]).run, Some("--help".into()));
        assert_eq!(served(&["--exportname", "-v", "null"]).export_name, "-v");
    }

    #[test]
    fn the_last_of_several_wins() {
        let options =
            served(&["-p1", "-4", "-p", "2", "-6", "--port=3", "-r", "-r", "null", "--log=null", "--log=stderr"]);
        assert_eq!(options.port.as_deref(), Some("3"));
        assert_eq!(options.family, Family::V6);
        assert_eq!(options.log, LogTo::Stderr);
        assert_eq!(served(&["-6", "-4", "null"]).family, Family::V4);
    }

    #[test]
    fn exit_with_parent_never_takes_the_next_word() {
        let options = served(&["--exit-with-parent", "123"]);
        assert_eq!(options.exit_with_parent, ExitWithParent::Parent);
        assert_eq!(options.plugin, Some("123".into()));
        assert!(options.foreground);
        assert_eq!(served(&["--exit-with-parent=123", "null"]).exit_with_parent, ExitWithParent::Pid(123));
        assert_eq!(refused(&["--exit-with-parent=0", "null"]), "exit-with-parent: not a process id: \"0\"");
        assert_eq!(
            refused(&["--exit-with-parent=", "null"]),
            "exit-with-parent: empty string where we expected a number"
        );
        assert_eq!(asked(&["--exit-with-parent", "--version"]), Request::Version);
    }

    #[test]
    fn run_implies_the_foreground_and_a_private_socket() {
        let options = served(&["null", "--run", "true"]);
        assert!(options.foreground);
        assert_eq!(options.unix, Some(Unix::Private));
        let options = served(&["-p", "1", "null", "--run", ""]);
        assert_eq!((options.unix, options.run), (None, Some("".into())));
        assert_eq!(served(&["-Ux", "null", "--run", "true"]).unix, Some(Unix::Path("/here/x".into())));
    }

    #[test]
    fn a_single_client_implies_the_foreground_and_excludes_what_says_where_to_listen() {
        for word in ["-s", "--single", "--stdin"] {
            let options = served(&[word, "memory"]);
            assert!(options.single && options.foreground && options.unix.is_none());
        }
        for others in [&["-p", "1"][..], &["-U", "-"], &["--run", "true"], &["--dump-plugin"]] {
            let words = [&["-s", "memory"], others].concat();
            assert_eq!(parse_words(&words).expect_err("excluded"), UsageError::Combination);
        }
    }

    #[test]
    fn sockets_that_came_with_the_process_exclude_what_says_where_to_listen() {
        assert_eq!(check_activated(&served(&["-f", "-P", "pid", "memory"])), Ok(()));
        for (word, flag) in [("--run=true", "--run"), ("-i::1", "-i"), ("-p1", "-p"), ("-s", "-s"), ("-Us", "-U")] {
            let error = check_activated(&served(&[word, "memory"])).expect_err("excluded");
            assert_eq!(error.to_string(), format!("cannot use socket activation with {flag} flag"));
        }
    }

    #[test]
    fn paths_of_our_own_files_become_absolute() {
        let options = served(&["-U", "a/../s", "-P", "/p", "null"]);
        assert_eq!(options.unix, Some(Unix::Path("/here/a/../s".into())));
        assert_eq!(options.pidfile, Some("/p".into()));
        for words in [&["-P", "", "null"][..], &["--version", "-P", ""], &["-U", ""]] {
            assert_eq!(refused(words), "cannot convert null or empty path to an absolute path");
        }
        let nowhere = |path: &str| parse(["-U", path, "null"].map(OsString::from), None);
        assert!(nowhere("/s").is_ok());
        assert_eq!(nowhere("s"), Err(UsageError::NoCurrentDirectory("s".into())));
    }

    #[test]
    fn what_is_asked_for_has_an_order() {
        assert_eq!(asked(&["--help", "--version", "--dump-plugin"]), Request::Help);
        assert_eq!(asked(&["--dump-plugin", "-V", "null"]), Request::Version);
        assert_eq!(asked(&["null", "--dump-plugin"]), Request::DumpPlugin);
        assert_eq!(asked(&["--dump-config", "--no-such-option"]), Request::DumpConfig);
        assert_eq!(asked(&["--help", "--long-options"]), Request::LongOptions);
        assert_eq!(asked(&["-fr", "--short-options"]), Request::ShortOptions);
        assert_eq!(refused(&["--no-such-option", "--dump-config"]), "unrecognized option '--no-such-option'");
    }

    #[test]
    fn a_probe_serves_nothing() {
        assert_eq!(asked(&["--probe", "nbd://x", "--json", "--timeout=1"]), Request::Probe);
        assert_eq!(asked(&["--probe=nbd://x", "-r", "--help"]), Request::Help);
        assert_eq!(refused(&["--probe=nbd://x", "-r"]), "--probe serves nothing: it cannot be used with --readonly");
        let plugin = "--probe serves nothing: it cannot be used with the plugin 'null'";
        assert_eq!(refused(&["--probe=nbd://x", "null"]), plugin);
        assert_eq!(refused(&["--json", "null"]), "--json says how --probe answers: it cannot be used without it");
        assert_eq!(refused(&["--probe"]), "option '--probe' requires an argument");
    }

    #[test]
    fn a_debug_flag_is_a_name_a_flag_and_a_number() {
        let flag = |name: &str, flag: &str, value| DebugFlag { name: name.to_owned(), flag: flag.to_owned(), value };
        let options = served(&["-Dmemory.dir=1", "null", "--debug", "nbdkit.backend.datapath=-0x10"]);
        assert_eq!(options.debug_flags, [flag("memory", "dir", 1), flag("nbdkit", "backend.datapath", -16)]);
        for bad in ["", "=", ".", "=.", ".=", ".extra=1", "x.=1", "x.y=", "x.y", "x=1.2", "x.y=z", "x.y=1 "] {
            assert_eq!(refused(&["-D", bad, "null"]), "-D (Debug Flag) must have the format NAME.FLAG=N", "{bad}");
        }
    }

    #[test]
    fn vsock_takes_a_port_and_no_other_place() {
        let options = served(&["--vsock", "-p", "70000", "null", "--run", "true"]);
        assert!(options.vsock && options.unix.is_none());
        for other in [&["-U", "s"][..], &["-s"]] {
            let words = [&["--vsock", "null"], other].concat();
            assert_eq!(parse_words(&words).expect_err("excluded"), UsageError::Combination);
        }
    }

    #[test]
    fn the_oldstyle_protocol_knows_no_tls() {
        assert_eq!(refused(&["-o", "--tls=require", "null"]), "cannot use oldstyle protocol (-o) and require TLS");
        assert_eq!(served(&["-o", "--tls=require", "null", "-n"]).tls, Tls::Require);
    }

    #[test]
    fn what_nbdkits_parsers_refuse_is_called_an_error() {
        let report = |words: &[&str]| parse_words(words).expect_err("it is bad").report("nbdkit");
        assert_eq!(report(&["-t", "x", "null"]), "nbdkit: error: threads: empty string where we expected a number\n");
        assert!(report(&["-P", "", "null"]).starts_with("nbdkit: error: cannot convert"));
        assert!(report(&["--log=x", "null"]).starts_with("nbdkit: --log must be"));
    }

    #[test]
    fn values_are_typed() {
        let options = served(&[
            "--mask-handshake=0x3",
            "-t",
            "017",
            "--timeout=1500ms",
            "--grace-period=0",
            "--drain-timeout",
            "1.5",
            "--tls=FORCE",
            "--log=/l",
            "null",
        ]);
        assert_eq!(options.mask_handshake, 3);
        assert_eq!(options.threads, NonZeroU32::new(15));
        assert_eq!(options.timeout, Some(Duration::from_millis(1500)));
        assert_eq!((options.grace_period, options.drain_timeout), (Duration::ZERO, Duration::from_millis(1500)));
        assert_eq!((options.tls, options.tls_given), (Tls::Require, true));
        assert_eq!(options.log, LogTo::File("/l".into()));
        let options = served(&["-t0", "--timeout=0", "null"]);
        assert_eq!((options.threads, options.timeout), (None, None));
    }

    #[test]
    fn the_first_bad_value_is_reported_and_fits_one_line() {
        assert_eq!(refused(&["--timeout=x", "-t", "y", "null"]), "timeout: could not parse delay or sleep: \"x\"");
        assert_eq!(refused(&["-t", "y", "-t", "1", "--timeout=x"]), "threads: empty string where we expected a number");
        assert_eq!(refused(&["--tls=a\nb", "null"]), "could not decipher boolean (a\\nb)");
    }

    #[test]
    fn names_and_paths_need_not_be_utf8() {
        let odd = OsString::from_vec(b"\xff".to_vec());
        let line = ["-e", "\u{1}", "null"].map(OsString::from).into_iter();
        let line = line.map(|word| if word == "\u{1}" { odd.clone() } else { word });
        let (_, options) = parse(line.chain([odd.clone()]), None).expect("the command line is good");
        assert_eq!((options.export_name, options.parameters), (odd.clone(), vec![odd.clone()]));
        let mut word = OsString::from("--filter=");
        word.push(&odd);
        assert_eq!(parse([word, odd.clone()], None).expect("the command line is good").1.filters, vec![odd.clone()]);
        let mut word = OsString::from("--");
        word.push(&odd);
        assert_eq!(parse([word], None), Err(UsageError::UnknownOption("--\u{fffd}".to_owned(), None)));
        assert_eq!(parse([OsString::from("-é")], None), Err(UsageError::UnknownLetter('é')));
        let refused = parse([OsString::from("-i"), odd, OsString::from("null")], None);
        assert_eq!(refused, Err(UsageError::BadValue("ipaddr: not valid UTF-8: \u{fffd}".to_owned())));
    }

    #[test]
    fn a_slip_gets_a_suggestion_and_nonsense_does_not() {
        assert_eq!(refused(&["--prot=1"]), "unrecognized option '--prot=1'; did you mean '--port'?");
        assert_eq!(refused(&["--read_only"]), "unrecognized option '--read_only'; did you mean '--read-only'?");
        assert_eq!(refused(&["--xyzzy"]), "unrecognized option '--xyzzy'");
        assert_eq!(closest("memroy", ["file", "memory"]), Some("memory"));
        assert_eq!(distance("abc", "abc"), 0);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
    }

    #[test]
    fn a_key_starts_with_a_letter() {
        let key_value = |key: &str, value: &str| Parameter::KeyValue(key.to_owned(), value.into());
        for (word, expected) in [
            ("size=1M", key_value("size", "1M")),
            ("a.b_c-9=x=y", key_value("a.b_c-9", "x=y")),
            ("k=", key_value("k", "")),
            ("./a=b", Parameter::Bare("./a=b".into())),
            ("9a=b", Parameter::Bare("9a=b".into())),
            ("é=b", Parameter::Bare("é=b".into())),
            ("=b", Parameter::Bare("=b".into())),
            ("size", Parameter::Bare("size".into())),
            ("", Parameter::Bare("".into())),
        ] {
            assert_eq!(split_parameter(OsStr::new(word)), expected, "{word}");
        }
    }

    #[test]
    fn completion_gets_every_name_but_the_two_of_its_own() {
        let (long, short) = (long_options(OURS), short_options());
        assert!(long.lines().any(|line| line == "--pid-file") && !long.contains("-options"));
        let as_nbdkit = long_options(NBDKIT);
        let ours: Vec<_> = long.lines().filter(|line| !as_nbdkit.lines().any(|other| other == *line)).collect();
        assert!(ours.contains(&"--drain-timeout") && !ours.contains(&"--timeout"), "{ours:?}");
        assert!(short.starts_with("-4\n-6\n") && short.contains("-U\n"));
    }
}

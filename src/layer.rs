//! What a plugin and a filter are to the command line: a name, parameters, and how they become the engine's
//! [`Exports`]. Each declares itself in its own file; [`crate::plugins::ALL`] and [`crate::filters::ALL`] list them.
//! Source: nbdkit docs/nbdkit-plugin.pod "CALLBACKS" and docs/nbdkit-filter.pod.

use std::fmt::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use nbdcaptive_actors::device::{Exports, ThreadModel};

use crate::report::Report;
use crate::text;

/// The help of a parameter that is another name of the one before it.
pub const ANOTHER_NAME: &str = "the same";

/// A `key=value` that a layer takes.
#[derive(Debug)]
pub struct Parameter {
    /// The key, as nbdkit spells it.
    pub key: &'static str,
    /// What stands for the value in help: `<SIZE>`, `<BOOL>|/PATH`, `none|emulate`. Completion reads it too.
    pub value: &'static str,
    /// What it is for: a [`text`] with its line, or [`ANOTHER_NAME`].
    pub help: &'static str,
    /// The layer does not work without it.
    pub required: bool,
}

/// Parameters whose value is the number of a descriptor that the command of `--run` must not hold, for while it does the
/// server cannot see the other end go (`exitwhen`).
pub const KEPT_FROM_COMMAND: [&str; 2] = ["exit-when-pipe-closed", "exit-when-fd-closed"];

/// What a layer says of itself. Help, completion, man pages and `--dump-plugin` are made from it.
#[derive(Debug)]
pub struct About {
    /// The short name on the command line.
    pub name: &'static str,
    /// What it is: a [`text`] with its line. The rest describes it in the manual page, which lists the parameters itself, and
    /// has a section `# Examples` of commands that work as they stand.
    pub summary: &'static str,
    /// Everything it takes.
    pub parameters: &'static [Parameter],
    /// The key that a bare value stands for (nbdkit's `magic_config_key`).
    pub magic_key: Option<&'static str>,
    /// How many requests it takes at a time, at most.
    pub thread_model: ThreadModel,
    /// Further `key=value` lines of `--dump-plugin`.
    pub dump: &'static [(&'static str, &'static str)],
}

impl Parameter {
    /// What it is for, in one line.
    pub fn line(&self) -> &'static str {
        text::line(self.help)
    }

    /// Whether it is another name of the parameter before it.
    pub fn is_another_name(&self) -> bool {
        self.help == ANOTHER_NAME
    }
}

impl About {
    /// What it is, in one line.
    pub fn line(&self) -> &'static str {
        text::line(self.summary)
    }
}

/// A parameter, or the set of them, that a layer cannot work with. Reads as one line, without the program's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(pub String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whatever a value was made of, the line stays one line.
        self.0.chars().try_for_each(|c| match c {
            c if c.is_control() => write!(f, "{}", c.escape_default()),
            c => f.write_char(c),
        })
    }
}

impl std::error::Error for ConfigError {}

/// A value from the command line: bytes, because a file name may be any.
#[derive(Debug, Clone, Copy)]
pub struct Value<'a>(pub &'a std::ffi::OsStr);

impl<'a> Value<'a> {
    /// The value as text. Errors: it is not UTF-8.
    pub fn text(self, key: &str) -> Result<&'a str, ConfigError> {
        self.0.to_str().ok_or_else(|| ConfigError(format!("{key}: not valid UTF-8: {}", self.0.to_string_lossy())))
    }

    /// The value as bytes.
    pub fn bytes(self) -> &'a [u8] {
        self.0.as_bytes()
    }

    /// The value as a path.
    pub fn path(self) -> &'a std::path::Path {
        std::path::Path::new(self.0)
    }
}

/// What a plugin may ask of the server that it will be in.
#[derive(Clone, Debug)]
pub struct Server {
    asked: async_channel::Sender<()>,
    report: Option<Report>,
}

impl Server {
    /// The plugin's end of it, and where what it asks is heard. What it says goes to `report`.
    pub fn new(report: Option<Report>) -> (Server, async_channel::Receiver<()>) {
        let (asked, hears) = async_channel::bounded(1);
        (Server { asked, report }, hears)
    }

    /// A line for `-v`, where there is no client yet. Source: nbdkit_debug(3).
    pub fn debug(&self, line: fmt::Arguments<'_>) {
        self.report.iter().for_each(|report| report.debug(line));
    }

    /// The server is to end, soon. Source: nbdkit_shutdown(3).
    pub fn shut_down(&self) {
        // Once is enough.
        let _ = self.asked.try_send(());
    }
}

/// A debug flag (`-D`): its name, and where its value is kept. What it makes a layer say goes to
/// [`Connection::debug`](nbdcaptive_actors::connection::Connection::debug) or [`Server::debug`], and so is seen only with `-v`.
/// Source: nbdkit docs/nbdkit-plugin.pod "Debug Flags".
pub type Flag<'a> = (&'static str, &'a mut i32);

/// Something to be done once, or why it could not be, as a line.
pub type Step = Box<dyn FnOnce() -> Result<(), ConfigError> + Send>;

/// A plugin being configured. Order of calls: `meet`, `config` for each parameter, `config_complete` once, `after_fork` once,
/// `ready` once. With `--dump-plugin`, `dump` after the parameters.
pub trait Plugin {
    /// Tells the plugin where it will be.
    fn meet(&mut self, server: &Server) {
        let _ = server;
    }

    /// The debug flags that it has. They are set before its first parameter comes.
    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        Vec::new()
    }

    /// The callbacks that nbdkit's plugin of the same name has, in nbdkit's order and with a space between: what `has_…` of
    /// `--dump-plugin` says, where scripts look for what a plugin can do.
    fn callbacks(&self) -> &'static str {
        ""
    }

    /// Whether `config` takes keys that are not in [`About::parameters`] too, and says itself which it does not know.
    fn takes_other_keys(&self) -> bool {
        false
    }

    /// What the configured plugin adds to `--dump-plugin`: its thread model if that is another than [`About`] says, and lines.
    fn dump(&mut self) -> Result<(Option<ThreadModel>, Vec<u8>), ConfigError> {
        Ok((None, Vec::new()))
    }

    /// What is to be done when the server listens, as the user that it serves as, before the first client: where threads may
    /// be started. An error ends the server. Source: nbdkit-plugin.pod `.after_fork`.
    fn after_fork(&mut self) -> Option<Step> {
        None
    }

    /// Takes one parameter; the key is one of [`About::parameters`].
    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError>;

    /// Checks the whole; may look at files, and open them, but creates nothing.
    fn config_complete(&mut self) -> Result<(), ConfigError> {
        Ok(())
    }

    /// Becomes what serves. Called before anything listens.
    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError>;
}

/// A filter being configured. Order of calls: as for a plugin, from the one next to the plugin outwards.
pub trait Filter {
    /// How many requests it takes at a time with the parameters that it has got, for `--dump-plugin`; `None` is what [`About`] says.
    fn thread_model(&self) -> Option<ThreadModel> {
        None
    }

    /// As [`Plugin::debug_flags`].
    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        Vec::new()
    }

    /// Takes one parameter; the key is one of [`About::parameters`]. The default is that of a filter that has none.
    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        let _ = value;
        Err(ConfigError(format!("unknown parameter '{key}'")))
    }

    /// Checks the whole.
    fn config_complete(&mut self) -> Result<(), ConfigError> {
        Ok(())
    }

    /// Wraps what serves below it. A filter that only decides when the server ends returns `next` as it is.
    fn ready(self: Box<Self>, next: Arc<dyn Exports>, lifetime: &mut Lifetime)
    -> Result<Arc<dyn Exports>, ConfigError>;
}

/// What filters may say about when the server begins and ends.
#[derive(Default)]
pub struct Lifetime {
    /// What is to be done when the server listens, before the first client, after what the plugin wants done then.
    pub after_fork: Vec<Step>,
    /// End when the last client has left (`exitlast`).
    pub exit_last: bool,
    /// End when any of these has happened (`exitwhen`).
    pub exit_when: Vec<nbdcaptive_actors::Event>,
    /// One of them has happened before the server could start: it serves nothing then and ends with status 0. The line says
    /// what has happened.
    pub already: Option<String>,
}

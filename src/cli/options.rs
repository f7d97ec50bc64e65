//! The one table of options. The parser, `--help`, `--long-options` and `--short-options` all read it, so an option is
//! added by one entry here and, if it says something new, one field of [`Options`].
//! Source: nbdkit server/options.h for names and aliases, server/main.c and docs/nbdkit.pod for what they do.

use std::ffi::{OsStr, OsString};
use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Arg, ArgAction, Command, value_parser};

use super::completion::Shell;
use super::{DebugFlag, ExitWithParent, Family, LogTo, Options, Request, Tls, Unix, UsageError};
use crate::{text, values};

/// One option: how it is written, what it says to people, and what it sets.
#[derive(Debug)]
pub struct OptionSpec {
    /// The letter after a single `-`. ASCII.
    pub short: Option<char>,
    /// The names after `--`. The first is the one in help and in clap; the others are nbdkit's aliases.
    pub long: &'static [&'static str],
    /// What it does: a [`text`] with its line. Empty: not for people.
    pub help: &'static str,
    pub(super) effect: Effect,
}

/// Names that nbdkit does not have.
pub(super) const OUR_OWN: &[&str] = &[
    "candidates",
    "completion",
    "drain-timeout",
    "grace-period",
    "json",
    "man",
    "max-clients",
    "no-eh",
    "no-extended-headers",
    "probe",
    "spin",
];

/// What an option does when it is met. A setter's error that is a sentence is one without the program's name.
#[derive(Debug)]
pub(super) enum Effect {
    /// Takes no value.
    Flag(fn(&mut Options)),
    /// Takes a value: the next word, or what is glued on, whatever it looks like. The first part stands for it in help.
    Value(&'static str, fn(&mut Options, &OsStr) -> Result<(), UsageError>),
    /// Takes a value only as `--name=VALUE`, never the next word. The second part is the value where none is given.
    Optional(&'static str, &'static str, fn(&mut Options, &OsStr) -> Result<(), UsageError>),
    /// Asks for something else than to serve, once the whole line has been read.
    Ask(Request),
    /// As `Ask`, and what follows is not even looked at.
    AskAtOnce(Request),
}

impl OptionSpec {
    /// What stands for the value in help, for an option that takes one.
    pub fn value(&self) -> Option<&'static str> {
        match self.effect {
            Effect::Value(name, _) | Effect::Optional(name, ..) => Some(name),
            Effect::Flag(_) | Effect::Ask(_) | Effect::AskAtOnce(_) => None,
        }
    }

    /// Whether the value may be left out.
    pub fn value_is_optional(&self) -> bool {
        matches!(self.effect, Effect::Optional(..))
    }

    /// What it does, in one line.
    pub fn line(&self) -> &'static str {
        text::line(self.help)
    }

    /// The name that stands for the option wherever one is enough.
    pub fn name(&self) -> &'static str {
        // An entry without a long name would be of no use in help; a test keeps them out.
        self.long.first().copied().unwrap_or_default()
    }
}

/// A value that has to be text. Errors: it is not UTF-8.
fn text<'a>(what: &str, value: &'a OsStr) -> Result<&'a str, String> {
    value.to_str().ok_or_else(|| format!("{what}: not valid UTF-8: {}", value.to_string_lossy()))
}

/// Every option, in the order of help: by the name that people look for.
pub static OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        short: Some('4'),
        long: &["ipv4-only"],
        help: "Listen on, and look up, IPv4 addresses only

            Where `-i` is given, its name is looked up among IPv4 addresses only; without it the server listens on
            0.0.0.0 only. Of `-4` and `-6` the last one counts.
        ",
        effect: Effect::Flag(|options| options.family = Family::V4),
    },
    OptionSpec {
        short: Some('6'),
        long: &["ipv6-only"],
        help: "Listen on, and look up, IPv6 addresses only

            As `-4`, with IPv6 addresses and `::`.
        ",
        effect: Effect::Flag(|options| options.family = Family::V6),
    },
    OptionSpec { short: None, long: &["candidates"], help: "", effect: Effect::AskAtOnce(Request::Candidates) },
    OptionSpec {
        short: None,
        long: &["completion"],
        help: "Print what completes command lines in a shell

            To try it in the shell you are in:

                source <(nbdcaptive --completion bash)
                source <(nbdcaptive --completion zsh)
                nbdcaptive --completion fish | source

            At each Tab the script asks the program itself for options, their values, plugins, filters and the
            parameters of those that are on the command line.
        ",
        effect: Effect::Value("bash|zsh|fish", |options, value| {
            options.completion = Some(Shell::find(&value.to_string_lossy())?);
            Ok(())
        }),
    },
    OptionSpec {
        short: Some('D'),
        long: &["debug"],
        help: "Set a debug flag of a layer, or of nbdkit

            Flags are whole numbers. With `-v`, the server's show what goes through its layers: `nbdkit.backend.controlpath` the
            calls that open and ask them, `nbdkit.backend.datapath` those that move data; both are 1, and 0 leaves them out.
            `nbdkit.environ=1` shows the environment at the start, `nbdkit.tls.session=1` what was agreed on in a TLS handshake.
            Plugins and filters may have flags of their own. May be repeated.
        ",
        effect: Effect::Value("NAME.FLAG=N", |options, value| {
            options.debug_flags.push(DebugFlag::parse(&value.to_string_lossy()).ok_or(UsageError::BadDebugFlag)?);
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["drain-timeout"],
        help: "Time for requests in flight at the end [30]

            At the end requests in flight are finished and answered, and devices are flushed and closed. What is not
            done by then is given up, and the exit status is 1 if it would have been 0. See
            nbdcaptive-captive(1).
        ",
        effect: Effect::Value("SECS", |options, value| {
            options.drain_timeout = values::delay("drain-timeout", &value.to_string_lossy())?;
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["dump-config"],
        help: "Print facts about this program, one per line

            Lines of *key*`=`*value* for scripts, with nbdkit's keys. Those that say where nbdkit's loadable modules
            are have no meaning here and are left out.
        ",
        effect: Effect::AskAtOnce(Request::DumpConfig),
    },
    OptionSpec {
        short: None,
        long: &["dump-plugin"],
        help: "Print facts about the plugin, one per line

            Lines of *key*`=`*value* for scripts: name and version of the plugin, how many requests it takes at a
            time, its magic parameter, and what it has been built with. Parameters may be given too; some plugins
            say more then.
        ",
        effect: Effect::Ask(Request::DumpPlugin),
    },
    OptionSpec {
        short: None,
        long: &["exit-with-parent"],
        help: "End when the parent, or process PID, has ended

            The server ends within 50 ms when the process that started it has ended, by whatever means: it need not
            be a shell, nor live up to a clean end of its own. With *PID* it is that process. Implies `-f`. See
            nbdcaptive-captive(1).
        ",
        effect: Effect::Optional("PID", PARENT, |options, value| {
            options.exit_with_parent = match value.to_str() {
                Some(PARENT) => ExitWithParent::Parent,
                _ => ExitWithParent::Pid(process_id(value)?),
            };
            Ok(())
        }),
    },
    OptionSpec {
        short: Some('e'),
        long: &["exportname", "export", "export-name"],
        help: "The export that $uri and $exportname name

            It does not change what is served; plugins that serve different data under different names see the name
            that the client asks for. Without this option the name is empty, which is the default export.
        ",
        effect: Effect::Value("NAME", |options, value| {
            options.export_name = value.to_owned();
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["filter"],
        help: "Put a filter before the plugin; may be repeated

            The first one is next to the client, the last one next to the plugin. A filter's parameters follow the
            plugin's name, like the plugin's own. `--help` lists all filters.
        ",
        effect: Effect::Value("FILTER", |options, value| {
            options.filters.push(value.to_owned());
            Ok(())
        }),
    },
    OptionSpec {
        short: Some('f'),
        long: &["foreground", "no-fork"],
        help: "Do not go into the background

            Without it the command returns when the server listens, with status 0, and the server goes on in a
            session of its own, with `/` as its directory; or it returns with status 1 and a line on stderr.
        ",
        effect: Effect::Flag(|options| options.foreground = true),
    },
    OptionSpec {
        short: None,
        long: &["grace-period"],
        help: "Time for COMMAND to end once told to [5]

            When the server is told to end while the command of `--run` is running, the command and all that it
            started get the signal first. What is still there when the time is over is killed. A
            script of a plugin's that still runs for a client who was not let in yet is told to end two seconds after the
            server was, and killed when this time is over as well.
        ",
        effect: Effect::Value("SECS", |options, value| {
            options.grace_period = values::delay("grace-period", &value.to_string_lossy())?;
            Ok(())
        }),
    },
    OptionSpec {
        short: Some('g'),
        long: &["group"],
        help: "Become this group once listening

            A name or a number. For this the server has to be started as root.
        ",
        effect: Effect::Value("GROUP", |options, value| {
            options.group = Some(value.to_string_lossy().into_owned());
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["help"],
        help: "Print this; with a plugin, its parameters too

            With filters or a plugin on the command line, what they are and their parameters follow.
        ",
        effect: Effect::Ask(Request::Help),
    },
    OptionSpec {
        short: Some('i'),
        long: &["ipaddr", "ip-addr"],
        help: "Listen on this address or host name only

            Without it the server listens on all of them.
        ",
        effect: Effect::Value("IPADDR", |options, value| {
            options.ip_address = Some(text("ipaddr", value)?.to_owned());
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["json"],
        help: "Let --probe answer in JSON",
        effect: Effect::Flag(|options| options.json = true),
    },
    OptionSpec {
        short: None,
        long: &["keepalive", "keep-alive"],
        help: "Notice TCP clients that are gone without a word

            The system looks for a client that has been silent for long (`SO_KEEPALIVE`), and disconnects one that
            does not answer. After how long is the system's choice.
        ",
        effect: Effect::Flag(|options| options.keepalive = true),
    },
    OptionSpec {
        short: None,
        long: &["log"],
        help: "Where errors go

            To stderr; to the system log; nowhere; or to the end of a file, whose path has to be absolute. Without
            this option, or with `default`, to stderr in the foreground and to the system log in the background.
            What `-v` says goes to stderr in any case.
        ",
        effect: Effect::Value("stderr|syslog|null|/PATH", |options, value| {
            options.log = match value.to_str() {
                Some("default") => LogTo::Default,
                Some("stderr") => LogTo::Stderr,
                Some("syslog") => LogTo::Syslog,
                Some("null") => LogTo::Null,
                _ if PathBuf::from(value).is_absolute() => LogTo::File(PathBuf::from(value)),
                _ => return Err(UsageError::BadLog),
            };
            Ok(())
        }),
    },
    OptionSpec { short: None, long: &["long-options"], help: "", effect: Effect::AskAtOnce(Request::LongOptions) },
    OptionSpec {
        short: None,
        long: &["man"],
        help: "Print a manual page, or list them all

            *PAGE* is the name of the page, or as much of it as a plugin or filter is called: `--man=file`. It may
            be a word of its own. To read one without installing it:

                nbdcaptive --man nbdcaptive-file-plugin | man -l -
        ",
        effect: Effect::Optional("PAGE", "", |options, value| {
            options.man = Some(value.to_owned());
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["mask-handshake"],
        help: "The handshake flags that may be offered

            A number; the flags of the handshake that are not in it are not offered. For tests of clients.
        ",
        effect: Effect::Value("MASK", |options, value| {
            options.mask_handshake = values::unsigned("mask-handshake", &value.to_string_lossy())?;
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["max-clients"],
        help: "How many clients may be connected at a time

            Any further ones are disconnected at once. Without it the system's limit of open files is the only one.
        ",
        effect: Effect::Value("N", |options, value| {
            let limit = values::unsigned("max-clients", &value.to_string_lossy())?;
            options.max_clients =
                Some(NonZeroU32::new(limit).ok_or_else(|| "--max-clients must be at least 1".to_owned())?);
            Ok(())
        }),
    },
    OptionSpec {
        short: Some('n'),
        long: &["newstyle", "new-style"],
        help: "Speak the newstyle protocol (the default)",
        effect: Effect::Flag(|options| options.oldstyle = false),
    },
    OptionSpec {
        short: None,
        long: &["no-eh", "no-extended-headers"],
        help: "Do not offer extended headers

            For tests of clients, which then use structured replies, as with servers that have no extended headers.
        ",
        effect: Effect::Flag(|options| options.no_extended_headers = true),
    },
    OptionSpec {
        short: None,
        long: &["no-mc", "no-meta-contexts"],
        help: "Do not offer meta contexts

            For tests of clients, which then cannot ask which parts of the disk are in use.
        ",
        effect: Effect::Flag(|options| options.no_meta_contexts = true),
    },
    OptionSpec {
        short: None,
        long: &["no-sr", "no-structured-replies"],
        help: "Do not offer structured replies

            For tests of clients, which then cannot be told of holes in what they read. There are no extended headers then
            either.
        ",
        effect: Effect::Flag(|options| options.no_structured_replies = true),
    },
    OptionSpec {
        short: Some('o'),
        long: &["oldstyle", "old-style"],
        help: "Speak the oldstyle protocol, for old clients

            There are no export names then, and no options to negotiate, TLS among them.
        ",
        effect: Effect::Flag(|options| options.oldstyle = true),
    },
    OptionSpec {
        short: Some('P'),
        long: &["pidfile", "pid-file"],
        help: "Write the process id here when ready to serve

            It is written when clients can connect, and removed at the end if it still holds the server's process
            id. With `--run` it is there before the command starts.
        ",
        effect: Effect::Value("PIDFILE", |options, value| {
            options.pidfile = Some(PathBuf::from(value));
            Ok(())
        }),
    },
    OptionSpec {
        short: Some('p'),
        long: &["port"],
        help: "Listen on this TCP port or service [10809]

            A number, or the name of a service. Not together with `-U`.
        ",
        effect: Effect::Value("PORT", |options, value| {
            options.port = Some(text("port", value)?.to_owned());
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["print-uri", "print-url", "show-uri", "show-url"],
        help: "Print the URI for clients

            It goes to stdout when the server listens, also quoted for a shell, with a command that looks at it.
        ",
        effect: Effect::Flag(|options| options.print_uri = true),
    },
    OptionSpec {
        short: None,
        long: &["probe"],
        help: "Only say what the NBD server at URI offers

            The protocol, the exports, their sizes, and what can be done with them. Nothing is served, so there is
            no plugin, and the only other options are `--json` and `--timeout`, which is 10 seconds for each step
            unless given.

                nbdcaptive --probe nbd://localhost
        ",
        effect: Effect::Value("URI", |options, value| {
            options.probe = Some(value.to_owned());
            Ok(())
        }),
    },
    OptionSpec {
        short: Some('r'),
        long: &["readonly", "read-only"],
        help: "Clients may not write

            Some plugins and filters never let them. The nbdcaptive-cow-filter(1) makes any disk writable, for
            as long as the server runs.
        ",
        effect: Effect::Flag(|options| options.read_only = true),
    },
    OptionSpec {
        short: None,
        long: &["run"],
        help: "Serve while this shell command runs, then end

            The command is given to `/bin/sh -c` when clients can connect. It finds the server by the variables
            `$uri`, `$port`, `$unixsocket` and others, and its exit status becomes that of nbdcaptive. Implies `-f`,
            and `-U -` where no `-p` is given. See nbdcaptive-captive(1).
        ",
        effect: Effect::Value("COMMAND", |options, value| {
            options.run = Some(value.to_owned());
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["selinux-label"],
        help: "The SELinux label of the listening socket

            For guests that libvirt confines. Without SELinux in the system it is an error.
        ",
        effect: Effect::Value("LABEL", |options, value| {
            options.selinux_label = Some(value.to_owned());
            Ok(())
        }),
    },
    OptionSpec { short: None, long: &["short-options"], help: "", effect: Effect::AskAtOnce(Request::ShortOptions) },
    OptionSpec {
        short: Some('s'),
        long: &["single", "stdin"],
        help: "Serve one client on stdin and stdout

            The server ends when that client has left. For inetd(8) and the like. Implies `-f`; not together with
            `-p`, `-U` or `--run`.
        ",
        effect: Effect::Flag(|options| options.single = true),
    },
    OptionSpec {
        short: None,
        long: &["spin"],
        help: "Time to look for requests before sleeping [50us]

            A thread whose client has just asked something looks for its next request that long before it goes to
            sleep, if processors are idle. More makes answers faster, and costs power; 0 never looks.
        ",
        effect: Effect::Value("TIME", |options, value| {
            options.spin = values::delay("spin", &value.to_string_lossy())?;
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["swap"],
        help: "Lock all memory, to serve swap space

            A server whose disk the same machine swaps to must never be swapped out itself. Root may lock as much as it likes,
            others as much as `ulimit -l` says.
        ",
        effect: Effect::Flag(|options| options.swap = true),
    },
    OptionSpec {
        short: Some('t'),
        long: &["threads"],
        help: "How many requests of a client run at once

            For plugins that take several requests at a time, 16 unless given. With 1 they are answered in the order
            in which they come.
        ",
        effect: Effect::Value("THREADS", |options, value| {
            options.threads = NonZeroU32::new(values::unsigned("threads", &value.to_string_lossy())?);
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["timeout", "time-out"],
        help: "Drop clients that take longer to negotiate

            The time runs from the connection up to the end of the negotiation. Without this option, or with 0,
            there is no limit. With `--probe` it is how long the server may take for a step.
        ",
        effect: Effect::Value("SECS", |options, value| {
            let timeout = values::delay("timeout", &value.to_string_lossy())?;
            options.timeout = Some(timeout).filter(|timeout| !timeout.is_zero());
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["tls"],
        help: "Encrypt: never, if the client wants to, always

            With `on` the client decides; with `require` one that does not use TLS is shown nothing. See TLS.
        ",
        effect: Effect::Value("off|on|require", |options, value| {
            let value = value.to_string_lossy();
            options.tls = match value.to_ascii_lowercase().as_str() {
                "require" | "required" | "force" => Tls::Require,
                _ if values::boolean(&value)? => Tls::On,
                _ => Tls::Off,
            };
            options.tls_given = true;
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["tls-certificates"],
        help: "Where the server's TLS certificates are

            A directory with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`. See TLS.
        ",
        effect: Effect::Value("DIR", |options, value| {
            options.tls_certificates = Some(PathBuf::from(value));
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["tls-psk"],
        help: "The file of pre-shared keys; it goes before DIR

            Each line is a user's name, a colon, and the key in hexadecimal, as psktool(1) makes them. See TLS.
        ",
        effect: Effect::Value("FILE", |options, value| {
            options.tls_psk = Some(PathBuf::from(value));
            Ok(())
        }),
    },
    OptionSpec {
        short: None,
        long: &["tls-verify-peer"],
        help: "Clients must show a certificate

            One that is signed by an authority of `ca-cert.pem`. Without this option it is not asked for.
        ",
        effect: Effect::Flag(|options| options.tls_verify_peer = true),
    },
    OptionSpec {
        short: Some('U'),
        long: &["unix"],
        help: "Listen on this Unix socket; - is a private one

            A dead socket that is there already is taken over; anything else at that place is an error and left
            alone. The socket is removed when no more clients are taken. `-` stands for a socket in a new directory
            that only the same user can look into, which `--print-uri` tells of. Not together with `-p`.
        ",
        effect: Effect::Value("SOCKET", |options, value| {
            options.unix = Some(if value == "-" { Unix::Private } else { Unix::Path(PathBuf::from(value)) });
            Ok(())
        }),
    },
    OptionSpec {
        short: Some('u'),
        long: &["user"],
        help: "Become this user once listening

            A name or a number. For this the server has to be started as root. With `--run` the command stays who
            the caller is.
        ",
        effect: Effect::Value("USER", |options, value| {
            options.user = Some(value.to_string_lossy().into_owned());
            Ok(())
        }),
    },
    OptionSpec {
        short: Some('v'),
        long: &["verbose"],
        help: "Say on stderr what happens

            Useful together with `-f`.
        ",
        effect: Effect::Flag(|options| options.verbose = true),
    },
    OptionSpec {
        short: Some('V'),
        long: &["version"],
        help: "Print the version",
        effect: Effect::Ask(Request::Version),
    },
    OptionSpec {
        short: None,
        long: &["vsock"],
        help: "Listen for virtual machines, at port PORT

            Instead of TCP, in the address family AF_VSOCK, which needs no network. The port is that of `-p`, 10809 unless
            given. Not together with `-U`.
        ",
        effect: Effect::Flag(|options| options.vsock = true),
    },
];

/// What `--exit-with-parent` without a value stands for.
const PARENT: &str = "parent";

/// A process id, 1 to 2^31-1. Errors: it is none.
fn process_id(value: &OsStr) -> Result<u32, String> {
    let text = value.to_string_lossy();
    let pid = values::unsigned("exit-with-parent", &text)?;
    if pid == 0 || i32::try_from(pid).is_err() {
        return Err(format!("exit-with-parent: not a process id: \"{text}\""));
    }
    Ok(pid)
}

/// Every long name with its option, sorted, as a search by prefix wants them.
pub(super) fn long_names() -> Vec<(&'static str, &'static OptionSpec)> {
    let mut names: Vec<_> = OPTIONS.iter().flat_map(|spec| spec.long.iter().map(move |name| (*name, spec))).collect();
    names.sort_unstable_by_key(|(name, _)| *name);
    names
}

/// What clap calls the words that are not options.
pub(super) const WORDS: &str = "words";

/// The table as a clap command, for the parser and for whatever is generated from clap.
pub fn command() -> Command {
    let options = OPTIONS.iter().map(|spec| {
        let arg = Arg::new(spec.name()).long(spec.name()).aliases(&spec.long[1..]).short(spec.short);
        let arg = arg.help(spec.line()).hide(spec.help.is_empty());
        match spec.effect {
            Effect::Flag(_) | Effect::Ask(_) | Effect::AskAtOnce(_) => arg.action(ArgAction::SetTrue),
            Effect::Value(name, _) => arg
                .action(ArgAction::Append)
                .value_name(name)
                .value_parser(value_parser!(OsString))
                .allow_hyphen_values(true),
            Effect::Optional(name, missing, _) => arg
                .action(ArgAction::Append)
                .value_name(name)
                .value_parser(value_parser!(OsString))
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value(missing),
        }
    });
    let words = Arg::new(WORDS).value_name("PLUGIN").num_args(0..).value_parser(value_parser!(OsString));
    Command::new(env!("CARGO_PKG_NAME"))
        .version(env!("CARGO_PKG_VERSION"))
        .about(env!("CARGO_PKG_DESCRIPTION"))
        .no_binary_name(true)
        .disable_help_flag(true)
        .disable_version_flag(true)
        .args_override_self(true)
        .args(options)
        .arg(words)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn clap_finds_no_fault_in_the_table() {
        command().debug_assert();
    }

    /// Every name that nbdkit 1.45 has, a letter where it has one, and whether a value follows.
    #[test]
    fn nbdkits_options_are_all_there() {
        const NBDKIT: &str = "4 ipv4-only|6 ipv6-only|D: debug|dump-config|dump-plugin|exit-with-parent|\
            e: export export-name exportname|:filter|f foreground no-fork|g: group|help|i: ip-addr ipaddr|\
            keepalive keep-alive|:log|long-options|:mask-handshake|n new-style newstyle|no-mc no-meta-contexts|\
            no-sr no-structured-replies|o old-style oldstyle|P: pid-file pidfile|\
            print-uri print-url show-uri show-url|p: port|r read-only readonly|:run|:selinux-label|short-options|\
            s single stdin|swap|t: threads|:timeout time-out|:tls|:tls-certificates|:tls-psk|tls-verify-peer|U: unix|\
            u: user|v verbose|V version|vsock";
        for option in NBDKIT.split('|') {
            let (letter, names) = match option.split_once(' ') {
                Some((first, names)) if first.trim_end_matches(':').len() == 1 => (first.chars().next(), names),
                _ => (None, option.trim_start_matches(':')),
            };
            let names: Vec<_> = names.split(' ').collect();
            let spec = OPTIONS.iter().find(|spec| spec.long.contains(&names[0])).expect(names[0]);
            assert!(names.iter().all(|name| spec.long.contains(name)), "{option}");
            assert_eq!(spec.short, letter, "{option}");
            let takes_value = spec.value().is_some() && !spec.value_is_optional();
            assert_eq!(takes_value, option.contains(':'), "{option}");
        }
    }

    #[test]
    fn no_name_is_taken_twice_and_every_option_has_one() {
        let mut long = HashSet::new();
        let mut short = HashSet::new();
        for spec in OPTIONS {
            assert!(!spec.long.is_empty());
            assert!(spec.long.iter().all(|name| long.insert(*name)), "{spec:?}");
            assert!(spec.short.is_none_or(|letter| letter.is_ascii_alphanumeric() && short.insert(letter)), "{spec:?}");
        }
    }
}

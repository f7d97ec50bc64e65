//! What people and scripts read: the URI, the variables of `--run` as a real shell sees them, the text of
//! `--print-uri`, help, error lines and `--dump-config`.
//!
//! Snapshots show them; what must hold for every one of them is asserted. "The following shell variables may be used in
//! the command", nbdkit-captive(1).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nbdcaptive::captive::environment::Environment;
use nbdcaptive::captive::uri::{Credentials, Endpoint, print_uri_text, uri};
use nbdcaptive::cli::{self, Tls};
use nbdcaptive::layer::{About, Parameter};

/// Every snapshot of this file goes through here: one place, one naming.
fn snapshot(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

/// Bytes as people can read them and tell them apart: UTF-8 as it is, all else as `\xff`, line ends as `\n`.
fn readable(bytes: &[u8]) -> String {
    bytes.utf8_chunks().fold(String::new(), |mut text, chunk| {
        for c in chunk.valid().chars() {
            match c {
                c if c.is_control() || c == '\\' => text.extend(c.escape_default()),
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
        text
    })
}

/// One way to be served.
struct Case {
    name: &'static str,
    endpoint: Endpoint,
    export_name: OsString,
    tls: Tls,
    tls_certificates: Option<PathBuf>,
    tls_psk: Option<PathBuf>,
}

/// In the order of the prelude.
const VARIABLES: [&str; 8] = ["uri", "nbd", "exportname", "port", "unixsocket", "tls", "tls_certificates", "tls_psk"];

impl Case {
    fn new(name: &'static str, endpoint: Endpoint) -> Case {
        let export_name = OsString::new();
        Case { name, endpoint, export_name, tls: Tls::Off, tls_certificates: None, tls_psk: None }
    }

    fn export(mut self, name: &[u8]) -> Case {
        self.export_name = OsStr::from_bytes(name).to_owned();
        self
    }

    fn tls(mut self, tls: Tls) -> Case {
        self.tls = tls;
        self
    }

    fn certificates(mut self, path: &[u8]) -> Case {
        self.tls_certificates = Some(OsStr::from_bytes(path).into());
        self
    }

    fn psk(mut self, path: &[u8]) -> Case {
        self.tls_psk = Some(OsStr::from_bytes(path).into());
        self
    }

    fn uri(&self) -> Vec<u8> {
        let keys = self.tls_psk.as_deref().map(|file| (file, &b"alice"[..]));
        let credentials = Credentials::of(self.tls_certificates.as_deref(), keys);
        uri(&self.endpoint, &self.export_name, self.tls, credentials)
    }

    fn environment(&self) -> Environment {
        let (port, unixsocket) = match &self.endpoint {
            Endpoint::Tcp { port } | Endpoint::Vsock { port } => (port.clone(), None),
            Endpoint::Unix(path) => (None, Some(path.clone())),
        };
        Environment {
            uri: self.uri(),
            exportname: self.export_name.clone(),
            port,
            unixsocket,
            tls: self.tls,
            tls_certificates: self.tls_certificates.clone(),
            tls_psk: self.tls_psk.clone(),
        }
    }

    /// What every variable has to be, `None` being not set at all.
    fn expected(&self) -> [Option<Vec<u8>>; 8] {
        let environment = self.environment();
        let path = |path: &Option<PathBuf>| Some(path.clone().unwrap_or_default().into_os_string().into_vec());
        [
            Some(self.uri()),
            Some(self.uri()),
            Some(self.export_name.as_bytes().to_vec()),
            Some(environment.port.unwrap_or_default().into_bytes()),
            path(&environment.unixsocket),
            match self.tls {
                Tls::Off => None,
                Tls::On => Some(b"1".to_vec()),
                Tls::Require => Some(b"2".to_vec()),
            },
            path(&self.tls_certificates),
            path(&self.tls_psk),
        ]
    }
}

/// Runs a script after the prelude in the system's shell, as `--run` does. `variables` is the caller's environment.
fn run_after(prelude: Vec<u8>, script: &str, variables: &[(&str, &str)]) -> Vec<u8> {
    let mut text = prelude;
    text.extend_from_slice(script.as_bytes());
    let mut shell = Command::new("/bin/sh");
    shell.env_clear().env("PATH", "/usr/bin:/bin").envs(variables.iter().copied());
    let output = shell.arg("-c").arg(OsString::from_vec(text)).output().expect("POSIX has a /bin/sh");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    output.stdout
}

/// What the shell sees in each variable.
fn seen(prelude: Vec<u8>, variables: &[(&str, &str)]) -> Vec<Option<Vec<u8>>> {
    let script: String = VARIABLES
        .iter()
        .map(|name| format!("if [ \"${{{name}+set}}\" ]; then printf 'set%s\\0' \"${name}\"; else printf '\\0'; fi\n"))
        .collect();
    let output = run_after(prelude, &script, variables);
    let mut values: Vec<_> = output.split(|byte| *byte == 0).collect();
    assert_eq!(values.pop(), Some(&b""[..]), "each value ends with a NUL");
    values.into_iter().map(|value| value.strip_prefix(b"set").map(<[u8]>::to_vec)).collect()
}

fn tcp() -> Endpoint {
    Endpoint::Tcp { port: None }
}

fn port(port: &str) -> Endpoint {
    Endpoint::Tcp { port: Some(port.to_owned()) }
}

fn unix(path: &[u8]) -> Endpoint {
    Endpoint::Unix(OsStr::from_bytes(path).into())
}

/// Where a private socket is.
fn private() -> Endpoint {
    unix(b"/tmp/nbdcaptiveXyZ012/socket")
}

fn cases() -> Vec<Case> {
    let nasty = b"a b/'\"$(exit 9)`exit 9`\\%\n\xc3\xa9\xff";
    let case = Case::new;
    vec![
        // Transports.
        case("tcp-default-port", tcp()),
        case("tcp-port", port("10810")),
        case("tcp-service-name", port("nbd")),
        case("vsock-default-port", Endpoint::Vsock { port: None }),
        case("vsock-port-export", Endpoint::Vsock { port: Some("70000".to_owned()) }).export(b"a b"),
        case("vsock-tls-require-psk", Endpoint::Vsock { port: None }).tls(Tls::Require).psk(b"/etc/psk file"),
        case("unix-path", unix(b"/run/nbd.sock")),
        case("unix-path-spaces", unix(b"/run/my disks/nbd sock")),
        case("unix-path-quotes", unix(b"/run/it's \"here\"")),
        case("unix-path-query-characters", unix(b"/run/a?b&c=d#e+f")),
        case("unix-path-bytes", unix(b"/run/\xff$x\\\xfe")),
        case("private", private()),
        // Export names, over both kinds of transport.
        case("tcp-export", port("10810")).export(b"disk"),
        case("private-export", private()).export(b"disk"),
        case("private-export-spaces", private()).export(b" a  b "),
        case("private-export-slashes", private()).export(b"/a/b//c/"),
        case("private-export-dots", private()).export(b"../..//."),
        case("private-export-percent", private()).export(b"100%25%"),
        case("private-export-query-characters", private()).export(b"a?socket=/b&c#d"),
        case("private-export-single-quotes", private()).export(b"it's 'x'"),
        case("private-export-double-quotes", private()).export(b"say \"x\""),
        case("private-export-dollar", private()).export(b"$HOME ${x} $(exit 9) $$"),
        case("private-export-backtick", private()).export(b"`exit 9`"),
        case("private-export-backslash", private()).export(b"a\\b\\\\c\\"),
        case("private-export-newline", private()).export(b"a\nb\n\n"),
        case("private-export-controls", private()).export(b"\x01\t\r\x1b[0m\x7f"),
        case("private-export-unicode", private()).export("päivä-日本-🦀".as_bytes()),
        case("private-export-bytes", private()).export(b"\xff\xfe\x80"),
        case("private-export-bytes-and-dollar", private()).export(b"\x81$x\x81`y"),
        case("private-export-shell-words", private()).export(b"*;&|<>()#~!{a,b}"),
        case("private-export-dash", private()).export(b"-n"),
        case("private-export-assignment", private()).export(b"uri=x"),
        case("tcp-export-nasty", tcp()).export(nasty),
        // TLS.
        case("tcp-tls-on", port("10810")).tls(Tls::On),
        case("tcp-tls-on-certificates", port("10810")).tls(Tls::On).certificates(b"/etc/pki/nbd"),
        case("tcp-tls-require", port("10810")).tls(Tls::Require),
        case("tcp-tls-require-certificates", port("10810")).tls(Tls::Require).certificates(b"/etc/pki/nbd"),
        case("tcp-tls-require-psk", port("10810")).tls(Tls::Require).psk(b"/etc/keys.psk"),
        case("tcp-tls-off-certificates", port("10810")).certificates(b"/etc/pki/nbd"),
        case("private-tls-on-psk", private()).tls(Tls::On).psk(b"/etc/keys.psk").export(b"disk"),
        case("private-tls-require", private()).tls(Tls::Require),
        case("private-tls-require-certificates", private()).tls(Tls::Require).certificates(b"/etc/pki/nbd"),
        case("private-tls-require-psk", private()).tls(Tls::Require).psk(b"keys.psk").export(b"disk"),
        case("private-tls-require-both", private()).tls(Tls::Require).certificates(b"pki").psk(b"keys.psk"),
        case("tcp-tls-require-odd-paths", tcp()).tls(Tls::Require).certificates(nasty).export(nasty),
        case("unix-tls-require-odd-paths", unix(nasty)).tls(Tls::Require).psk(nasty).export(nasty),
    ]
}

#[test]
fn the_command_sees_what_the_server_serves() {
    for case in cases() {
        let prelude = case.environment().prelude();
        let seen = seen(prelude, &[]);
        assert_eq!(seen, case.expected(), "{}", case.name);

        let mut text = format!("URI\n  {}\n\nVariables\n", readable(&case.uri()));
        for (name, value) in VARIABLES.iter().zip(&seen) {
            let value = value.as_ref().map_or("unset".to_owned(), |value| format!("<{}>", readable(value)));
            text += &format!("  {name:<16}  {value}\n");
        }
        text += "\n--print-uri\n";
        for line in String::from_utf8(print_uri_text(&case.uri())).expect("a URI is ASCII").lines() {
            text += &format!("  {line}\n");
        }
        snapshot(&format!("environment-{}", case.name), &text);
    }
}

#[test]
fn at_least_thirty_ways_to_be_served_have_names_of_their_own() {
    let names: std::collections::HashSet<_> = cases().iter().map(|case| case.name).collect();
    assert_eq!(names.len(), cases().len());
    assert!(names.len() >= 30, "{}", names.len());
}

#[test]
fn the_callers_variables_of_the_same_names_are_not_seen() {
    let callers: Vec<_> = VARIABLES.iter().map(|name| (*name, "the caller's")).collect();
    for case in cases() {
        assert_eq!(seen(case.environment().prelude(), &callers), case.expected(), "{}", case.name);
    }
}

#[test]
fn the_variables_are_not_exported() {
    for case in cases() {
        let output = run_after(case.environment().prelude(), "env", &[]);
        for name in VARIABLES {
            let start = format!("{name}=");
            assert!(
                !output.split(|byte| *byte == b'\n').any(|line| line.starts_with(start.as_bytes())),
                "{}",
                case.name
            );
        }
    }
}

/// The second way to the same words: what `--print-uri` prints for people to paste is the URI again.
#[test]
fn the_printed_uri_can_be_pasted_into_a_shell() {
    for case in cases() {
        let text = String::from_utf8(print_uri_text(&case.uri())).expect("a URI is ASCII");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[0].as_bytes(), case.uri());
        let quoted = lines[1].strip_prefix("Shell-quoted URI: ").expect("the second line has the URI");
        assert_eq!(run_after(Vec::new(), &format!("printf %s {quoted}"), &[]), case.uri());
        assert_eq!(lines[3], format!("  nbdinfo {quoted}"));
    }
}

/// Layers for help that do not change when the real ones do.
static PLUGIN: About = About {
    name: "sample",
    summary: "a plugin for this test",
    parameters: &[
        Parameter { key: "size", value: "<SIZE>", help: "The size of the disk.", required: true },
        Parameter { key: "mode", value: "fast|safe", help: "What matters more; fast if not given.", required: false },
    ],
    thread_model: nbdcaptive_actors::device::ThreadModel::Parallel,
    magic_key: Some("size"),
    dump: &[],
};
static FILTER: About = About {
    name: "exitlast",
    summary: "end when the last client has left",
    parameters: &[],
    thread_model: nbdcaptive_actors::device::ThreadModel::Parallel,
    magic_key: None,
    dump: &[],
};

#[test]
fn help_reads_well() {
    snapshot("cli-help", &cli::help::help("nbdcaptive", &[&PLUGIN], &[&FILTER]));
    let layers = cli::help::layer_help("nbdcaptive", "plugin", &PLUGIN)
        + &cli::help::layer_help("nbdcaptive", "filter", &FILTER);
    snapshot("cli-help-layers", &layers);
}

#[test]
fn completion_words_are_stable() {
    snapshot("cli-long-options", &cli::long_options(nbdcaptive::identity::package()));
    snapshot("cli-short-options", &cli::short_options());
}

#[test]
fn every_bad_command_line_gets_one_clear_line() {
    let lines = [
        "",
        "--foo null",
        "--filtre=x null",
        "--t null",
        "--p null",
        "--run",
        "--filt",
        "-p",
        "null -fU",
        "-x null",
        "-fx null",
        "--foreground=yes null",
        "--no-fork= null",
        "-p 10809 -U - null",
        "-p 10809 -U /tmp/sock null --run true",
        "--log=file.log null",
        "--tls=maybe null",
        "-t many null",
        "-t -1 null",
        "-t 99999999999 null",
        "--timeout=soon null",
        "--grace-period=-1 null",
        "--drain-timeout=1h null",
        "--mask-handshake=0x1g null",
        "--exit-with-parent=0 null",
        "--exit-with-parent=me null",
        "--dump-plugin",
        "-D memory.flag memory",
        "-D memory=1 memory",
        "-D .flag=1 memory",
        "-D memory.flag=x memory",
        "--vsock -U - null",
        "--vsock -s null",
        "-o --tls=require null",
        "--selinux-label",
        "--swap=yes null",
    ];
    let mut text = String::new();
    for line in lines {
        let words = line.split_whitespace().map(OsString::from);
        let error = cli::parse(words, Some(Path::new("/"))).expect_err(line);
        assert_eq!(error.to_string().lines().count(), 1, "{line}");
        text += &format!("$ nbdcaptive {line}\n{}\n", error.report("nbdcaptive"));
    }
    snapshot("cli-errors", &text);
}

#[test]
fn dump_config_is_nbdkits_for_scripts() {
    /// What depends on where and how this was built.
    const HOST: [&str; 5] = ["binary", "bindir", "sbindir", "host_cpu", "host_os"];
    let text = String::from_utf8(cli::dump_config::dump_config(nbdcaptive::identity::package()))
        .expect("the test's own path is UTF-8");
    let mut filtered = String::new();
    for line in text.lines() {
        let (key, value) = line.split_once('=').expect("every line is key=value");
        let value = match key {
            key if HOST.contains(&key) => "[host]",
            key if key.starts_with("version") => "[version]",
            _ => value,
        };
        filtered += &format!("{key}={value}\n");
    }
    snapshot("cli-dump-config", &filtered);
}

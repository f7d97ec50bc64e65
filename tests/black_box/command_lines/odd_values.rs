//! Command lines that nobody writes on purpose: whatever an option or a parameter is given, the answer is status 0 or 1 and lines
//! that can be read, and never a panic. What there is to be given is asked of the server itself, so that nothing is left out.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::super::harness::{Room, nbdkit_differs, program_name};
use super::{AT_ONCE, turn};

/// What options are given.
fn odd_values() -> Vec<OsString> {
    let control: Vec<u8> = (1..32).collect();
    let long = "a".repeat(100_000);
    let text = [
        "",
        "=",
        "-",
        "--",
        "%s%n%d",
        "'\"$(;",
        "🦀 漢字 ünï",
        "-1",
        "0x",
        "1e999",
        "99999999999999999999999",
        "nan",
        &long,
    ];
    let bytes = [&b"\xff\xfe\x80"[..], b"\xe9t\xe9", &control];
    text.into_iter().map(OsString::from).chain(bytes.map(|bytes| OsStr::from_bytes(bytes).to_owned())).collect()
}

/// A word with a value behind it.
fn with(word: &str, value: &OsStr) -> OsString {
    OsString::from_vec([word.as_bytes(), value.as_bytes()].concat())
}

/// Every command line ends with status 0 or 1, with few lines on stderr that begin with the server's name, and without a panic.
fn survives(command_lines: &[Vec<OsString>]) {
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    let _turn = turn();
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                let room = Room::new();
                while let Some(words) = command_lines.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let output = room.server(words).run();
                    let orderly = matches!(output.status.code(), Some(0 | 1));
                    // Some values are scripts, of which a shell speaks.
                    let prefixes = [format!("{}: ", program_name()), "sh: ".to_owned(), "/bin/sh: ".to_owned()];
                    let first = output.stderr.lines().next();
                    let readable = first.is_none_or(|line| prefixes.iter().any(|prefix| line.starts_with(prefix)));
                    if !orderly || !readable || output.stderr.contains("panicked") {
                        wrong.lock().expect("nothing panics with it").push(format!("{output:?}"));
                    }
                }
                room.assert_nothing_left();
            });
        }
    });
    let wrong = wrong.into_inner().expect("nothing panics with it");
    // The longest values would drown the rest.
    let shown: Vec<_> = wrong.iter().map(|one| one.chars().take(2000).collect::<String>()).collect();
    assert!(shown.is_empty(), "{} command lines: {}", shown.len(), shown.join("\n\n"));
}

fn lines_of(arguments: &[&str]) -> Vec<String> {
    Room::new().server(arguments).run_to(0).text().lines().map(str::to_owned).collect()
}

/// `--run` first, so that no server goes into the background; the plugin is there, so that most values are used.
fn line(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let start = ["--run", "exit 0", "-i", "127.0.0.1", "memory", "1M"].map(OsString::from);
    start.into_iter().chain(words).collect()
}

#[test]
fn no_value_of_an_option_makes_it_panic() {
    if nbdkit_differs("it is this server's options that are asked for") {
        return;
    }
    // What these are given is for others to read: a shell, the resolver.
    let elsewhere = ["--run", "--ipaddr", "--ip-addr", "-i"];
    let mut command_lines = Vec::new();
    let options = [lines_of(&["--long-options"]), lines_of(&["--short-options"])].concat();
    for option in options.iter().filter(|option| !elsewhere.contains(&option.as_str())) {
        for value in odd_values() {
            // Each alias is tried, in one of the two ways to give a value to each.
            let glued = if option.starts_with("--") { format!("{option}=") } else { option.clone() };
            if command_lines.len() % 2 == 0 {
                command_lines.push(line([with(&glued, &value)]));
            } else {
                command_lines.push(line([OsString::from(option), value]));
            }
        }
    }
    // As the name of an option, a plugin, a filter; with nothing else at all.
    for value in odd_values() {
        for start in ["--", "-", "--filter=", "--no-such-option="] {
            command_lines.push(line([with(start, &value)]));
        }
        command_lines.push(vec!["--run=exit 0".into(), value.clone()]);
        command_lines.push(vec!["--run=exit 0".into(), "--".into(), value]);
    }
    survives(&command_lines);
}

/// The keys that `--help` names for a plugin or filter: lines that start with `KEY=`, or `[KEY=]` where it may be left out.
fn keys(help: &[String], heading: &str) -> Vec<String> {
    let section = help.iter().skip_while(|line| !line.starts_with(heading)).skip(1);
    let section = section.take_while(|line| !line.starts_with("filter: ") && !line.starts_with("plugin: "));
    let key = |line: &String| Some(line.strip_prefix('[').unwrap_or(line).split_once('=')?.0.to_owned());
    section.filter_map(key).filter(|key| !key.contains(char::is_whitespace)).collect()
}

#[test]
fn no_value_of_a_parameter_makes_it_panic() {
    if nbdkit_differs("it is this server's parameters that are asked for") {
        return;
    }
    // These would look for a host, or wait for what does not come.
    let elsewhere = ["nbd"];
    let help = lines_of(&["--help"]);
    let names = |heading: &str, next: &str| -> Vec<String> {
        let section = help.iter().skip_while(|line| *line != heading).skip(1).take_while(|line| *line != next);
        let name = |line: &String| line.strip_prefix("  ")?.split(' ').next().map(str::to_owned);
        section.filter_map(name).filter(|name| !name.is_empty() && !elsewhere.contains(&name.as_str())).collect()
    };
    let (plugins, filters) = (names("Plugins:", "Filters:"), names("Filters:", "Examples:"));
    assert!(plugins.len() > 10 && filters.len() > 30, "{plugins:?} {filters:?}");
    let mut command_lines = Vec::new();
    let mut add = |layer: &[String], keys: &[String]| {
        for key in keys {
            for value in odd_values() {
                let mut words: Vec<OsString> = vec!["--run".into(), "exit 0".into()];
                words.extend(layer.iter().map(OsString::from));
                words.push(with(&format!("{key}="), &value));
                command_lines.push(words);
            }
        }
    };
    for plugin in plugins {
        let keys = keys(&lines_of(&[&plugin, "--help"]), "plugin: ");
        add(&[plugin], &keys);
    }
    for filter in filters {
        let filter = format!("--filter={filter}");
        let keys = keys(&lines_of(&[&filter, "null", "--help"]), "filter: ");
        add(&[filter, "memory".to_owned(), "1M".to_owned()], &keys);
    }
    assert!(command_lines.len() > 1000, "{}", command_lines.len());
    survives(&command_lines);
}

/// The kernel lets a word of a command line have 128 KiB, and what the command is told of the server is in one with it.
#[test]
fn a_command_that_is_too_long_to_be_started_is_refused_before_anything_is_served() {
    if nbdkit_differs("it starts a shell, which then cannot be started") {
        return;
    }
    let room = Room::new();
    let spaces = |count| format!("exit 3{}", " ".repeat(count));
    room.captive(["memory", "1M"], spaces(100_000)).run_to(3);
    room.captive(["-e", &"x".repeat(4096), "memory", "1M"], "exit 3").run_to(3);
    for (name, command) in [("x".repeat(100_000), spaces(0)), ("x".repeat(4096), spaces(125_000))] {
        let output = room.captive(["--export", &name, "memory", "1M"], command).run_to(1);
        output.expect_error_line(&["--run: ", "too long"]);
        room.assert_nothing_left();
    }
}

/// A generator of numbers that is the same on every machine.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % end as u64) as usize
    }
}

#[test]
fn no_words_in_any_order_make_it_panic() {
    if nbdkit_differs("it is this server's words that are mixed") {
        return;
    }
    let words = [
        "memory",
        "1M",
        "null",
        "file",
        "text",
        "sh",
        "eval",
        "data",
        "'1 2'",
        "size=1M",
        "size=",
        "=",
        "-",
        "--",
        "-f",
        "-r",
        "-s",
        "-o",
        "-n",
        "-v",
        "-e",
        "-t",
        "4",
        "0",
        "-1",
        "--filter",
        "--filter=cow",
        "--filter=offset",
        "cow",
        "offset=1",
        "offset=99G",
        "--tls=off",
        "--no-sr",
        "--no-mc",
        "--mask-handshake",
        "0x3",
        "--timeout=1",
        "--log",
        "null",
        "-U",
        "socket",
        "-P",
        "pid",
        "--exit-with-parent",
        "--dump-plugin",
        "--version",
        "--print-uri",
        "--expo",
        "--t",
        "-x",
        "-fr",
        "get_size=echo 1",
        "pread=exit 1",
        "script=./text",
        "a=b",
        "9=1",
        "é=1",
        "--json",
        "--spin=0",
        "--max-clients",
        "--max-clients=1",
        "--exportname=",
        "--grace-period=0",
        "--drain-timeout=1",
    ];
    let mut dice = Dice(1);
    let mut command_lines = Vec::new();
    for _ in 0..600 {
        let mut line: Vec<OsString> = vec!["--run".into(), "exit 0".into()];
        line.extend((0..1 + dice.below(7)).map(|_| OsString::from(words[dice.below(words.len())])));
        command_lines.push(line);
    }
    survives(&command_lines);
}

//! `--completion`: what the scripts offer, asked of real shells at a Tab.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::symlink;

use nbdcaptive::cli::options::OPTIONS;
use nbdcaptive::layer::About;
use nbdcaptive::{filters, plugins};

use super::harness::{Launch, Output, Room, nbdkit_differs, server_path};

const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];

/// A shell's answer to a line that is typed and a Tab behind it.
#[derive(Debug)]
struct Answer {
    typed: String,
    /// The line after the Tab; not known of fish.
    line: Option<String>,
    offered: Vec<String>,
}

/// A shell in a room where the program is found by its name, and where there are two disks.
struct Shell {
    room: Room,
    name: &'static str,
}

impl Shell {
    fn new(name: &'static str) -> Shell {
        let room = Room::new();
        fs::create_dir(room.path("bin")).expect("the room is empty");
        symlink(server_path(), room.path("bin/nbdcaptive")).expect("there is no such file yet");
        fs::create_dir(room.path("disks")).expect("the room is empty");
        room.write("disk one.img", "");
        room.write("disks/two.img", "");
        Shell { room, name }
    }

    fn launch(&self, program: &str, words: &[OsString]) -> Launch {
        let mut launch = self.room.tool(program, words);
        let path = std::env::var("PATH").unwrap_or_default();
        launch.env("PATH", format!("{}:{path}", self.room.path("bin").display()));
        launch.env("HOME", self.room.path("")).env("TERM", "dumb").env("ANSWERS", self.room.path("answers"));
        launch
    }

    /// Types each of the lines, and Tab.
    fn ask<L: AsRef<str>>(&self, lines: &[L]) -> Vec<Answer> {
        let lines: Vec<&str> = lines.iter().map(AsRef::as_ref).collect();
        let words = |first: &[&OsStr]| {
            let first = first.iter().map(|word| (*word).to_owned());
            first.chain(lines.iter().map(OsString::from)).collect::<Vec<OsString>>()
        };
        let text = match self.name {
            "fish" => {
                let script = self.room.write("complete.fish", include_str!("shells/complete.fish"));
                let words = words(&["--no-config".as_ref(), script.as_os_str()]);
                self.launch("fish", &words).run_to(0).text().to_owned()
            }
            name => {
                let script = self.room.write("tab.zsh", include_str!("shells/tab.zsh"));
                let words = words(&["-f".as_ref(), script.as_os_str(), name.as_ref()]);
                self.launch("zsh", &words).run_to(0);
                fs::read_to_string(self.room.path("answers")).expect("the shells wrote it")
            }
        };
        let answers: Vec<_> = text.split_terminator("END\n").collect();
        assert_eq!(answers.len(), lines.len(), "{text}");
        let answer = |(typed, part): (&&str, &str)| {
            let mut offered = part.lines().map(str::to_owned);
            let line = if self.name == "fish" { None } else { offered.next() };
            Answer { typed: (*typed).to_owned(), line, offered: offered.filter(|word| !word.is_empty()).collect() }
        };
        let answers = lines.iter().zip(answers).map(answer).collect();
        if self.name != "fish" {
            fs::remove_file(self.room.path("answers")).expect("it was read");
        }
        answers
    }
}

impl Answer {
    /// What stands before the part of a word that this shell completes: bash goes on behind an `=`.
    fn offers(&self, shell: &Shell, word: &str) -> bool {
        let word = match (shell.name, word.trim_end_matches('=').rfind('=')) {
            ("bash", Some(equals)) => &word[equals + 1..],
            _ => word,
        };
        self.offered.iter().any(|one| one == word)
    }
}

/// What is typed, what is to be offered, and what is not.
type Case = (&'static str, &'static [&'static str], &'static [&'static str]);

const CASES: &[Case] = &[
    ("nbdcaptive --fil", &["--filter="], &["--foreground"]),
    ("nbdcaptive --exit", &["--exit-with-parent"], &["--exportname="]),
    ("nbdcaptive --filter=", &["--filter=cow", "--filter=exitlast"], &["--filter=memory"]),
    ("nbdcaptive -f --filter ex", &["exitlast", "exitwhen"], &["cow"]),
    ("nbdcaptive --tls=", &["--tls=off", "--tls=on", "--tls=require"], &[]),
    ("nbdcaptive --log=s", &["--log=stderr", "--log=syslog"], &["--log=null"]),
    ("nbdcaptive --run true m", &["memory"], &["file"]),
    ("nbdcaptive memory ", &["size=", "allocator="], &["cow-on-read=", "memory"]),
    ("nbdcaptive --filter cow --filter=error memory 1M ", &["cow-on-read=", "error-rate=", "size="], &["rate="]),
    ("nbdcaptive memory allocator=s", &["allocator=sparse"], &["allocator=zstd"]),
    ("nbdcaptive --filter=cow null cow-on-cache=t", &["cow-on-cache=true"], &[]),
    ("nbdcaptive --man nbdcaptive-cap", &["nbdcaptive-captive"], &["nbdcaptive"]),
];

#[test]
fn every_shell_offers_options_their_values_plugins_and_parameters() {
    if nbdkit_differs("its completion is bash's only, and comes apart from the program") {
        return;
    }
    for name in SHELLS {
        let shell = Shell::new(name);
        let lines: Vec<_> = CASES.iter().map(|(typed, ..)| *typed).collect();
        for (answer, (_, words, others)) in shell.ask(&lines).iter().zip(CASES) {
            for word in *words {
                assert!(answer.offers(&shell, word), "{name}, {}: {word} in {:?}", answer.typed, answer.offered);
            }
            for word in *others {
                assert!(!answer.offers(&shell, word), "{name}, {}: no {word} in {:?}", answer.typed, answer.offered);
            }
        }
    }
}

#[test]
fn every_shell_offers_files_where_a_value_is_a_path() {
    if nbdkit_differs("its completion is bash's only, and comes apart from the program") {
        return;
    }
    for name in SHELLS {
        let shell = Shell::new(name);
        let lines = [
            ("nbdcaptive file disks/", "disks/two.img"),
            ("nbdcaptive file file=disks/t", "file=disks/two.img"),
            ("nbdcaptive -P disks/t", "disks/two.img"),
            ("nbdcaptive --pidfile=disks/t", "--pidfile=disks/two.img"),
            ("nbdcaptive -fUdisks/t", "-fUdisks/two.img"),
            ("nbdcaptive file dir=d", "dir=disks/"),
            ("nbdcaptive --log=/etc/passw", "--log=/etc/passwd"),
        ];
        let typed: Vec<_> = lines.iter().map(|(typed, _)| *typed).chain(["nbdcaptive memory size=d"]).collect();
        let mut answers = shell.ask(&typed);
        let no_path = answers.pop().expect("there are answers");
        assert!(no_path.offered.is_empty(), "{name}: {no_path:?}");
        for (answer, (typed, word)) in answers.iter().zip(lines) {
            match &answer.line {
                None => assert!(answer.offered.iter().any(|one| one == word), "{name}: {word} in {answer:?}"),
                Some(line) => {
                    let start = typed.rfind(' ').expect("there are words") + 1;
                    assert_eq!(line.trim_end(), format!("{}{word}", &typed[..start]), "{name}: {answer:?}");
                }
            }
        }
    }
}

#[test]
fn a_file_with_a_blank_in_its_name_is_quoted() {
    if nbdkit_differs("its completion is bash's only, and comes apart from the program") {
        return;
    }
    for name in ["bash", "zsh"] {
        let shell = Shell::new(name);
        let lines = [
            ("nbdcaptive file 'disk o", "nbdcaptive file 'disk one.img'"),
            ("nbdcaptive file file=disk\\ o", "nbdcaptive file file=disk\\ one.img"),
        ];
        for (answer, (_, wanted)) in shell.ask(&lines.map(|(typed, _)| typed)).iter().zip(lines) {
            assert_eq!(answer.line.as_deref().map(str::trim_end), Some(wanted), "{name}: {answer:?}");
        }
        // Where a parameter might be meant too.
        fs::remove_dir_all(shell.room.path("disks")).expect("it is there");
        let answer = shell.ask(&["nbdcaptive file disk"]).remove(0);
        assert_eq!(answer.line.as_deref().map(str::trim_end), Some("nbdcaptive file disk\\ one.img"), "{name}");
    }
}

/// By construction; this is for the construction.
#[test]
fn every_shell_offers_every_option_plugin_filter_and_parameter() {
    if nbdkit_differs("its completion is bash's only, and comes apart from the program") {
        return;
    }
    let plugins: Vec<&About> = plugins::ALL.iter().map(|entry| entry.about).collect();
    let filters: Vec<&About> = filters::ALL.iter().map(|entry| entry.about).collect();
    let mut wanted: Vec<(String, Vec<String>)> = Vec::new();
    let options = OPTIONS.iter().filter(|spec| !spec.help.is_empty());
    let names = options.map(|spec| match spec.value() {
        Some(_) if !spec.value_is_optional() => format!("--{}=", spec.name()),
        _ => format!("--{}", spec.name()),
    });
    wanted.push(("nbdcaptive --".to_owned(), names.collect()));
    let letters = OPTIONS.iter().filter_map(|spec| spec.short).map(|letter| format!("-{letter}"));
    wanted.push(("nbdcaptive -".to_owned(), letters.collect()));
    let names = |layers: &[&About]| layers.iter().map(|about| about.name.to_owned()).collect::<Vec<_>>();
    wanted.push(("nbdcaptive ".to_owned(), names(&plugins)));
    wanted.push(("nbdcaptive --filter ".to_owned(), names(&filters)));
    let keys = |about: &About| about.parameters.iter().map(|parameter| format!("{}=", parameter.key)).collect();
    wanted.extend(plugins.iter().map(|about| (format!("nbdcaptive {} ", about.name), keys(about))));
    wanted.extend(filters.iter().map(|about| (format!("nbdcaptive --filter={} null ", about.name), keys(about))));
    let lines: Vec<_> = wanted.iter().map(|(line, _)| line.clone()).collect();
    for name in SHELLS {
        let shell = Shell::new(name);
        for (answer, (_, words)) in shell.ask(&lines).iter().zip(&wanted) {
            for word in words {
                assert!(answer.offers(&shell, word), "{name}, {}: {word} in {:?}", answer.typed, answer.offered);
            }
        }
    }
}

/// Without a line editor, as tests of completions call them, and with the words divided or not.
#[test]
fn bash_s_function_needs_nothing_but_words() {
    if nbdkit_differs("its completion comes apart from the program") {
        return;
    }
    let shell = Shell::new("bash");
    let script = "source <(nbdcaptive --completion bash)
        try() { COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); _nbdcaptive; echo \"${COMPREPLY[*]}\"; }
        try nbdcaptive --filter = exitl
        try nbdcaptive --filter=exitl
        try nbdcaptive --tls =
        try nbdcaptive memory ''
        try nbdcaptive file file=disks/t";
    let Output { stdout, .. } = shell.launch("bash", &["--norc".into(), "-c".into(), script.into()]).run_to(0);
    let text = String::from_utf8(stdout).expect("it is UTF-8");
    let wanted = "exitlast\n--filter=exitlast\noff on require\nsize= allocator=\nfile=disks/two.img\n";
    assert_eq!(text, wanted);
}

/// A link named nbdkit is completed too, and a program of that name which is another is not.
#[test]
fn the_name_nbdkit_is_completed_where_it_is_this_program() {
    if nbdkit_differs("it is nbdkit") {
        return;
    }
    let shell = Shell::new("bash");
    let script = "source <(nbdcaptive --completion bash); complete -p nbdkit";
    let run = |status| shell.launch("bash", &["--norc".into(), "-c".into(), script.into()]).run_to(status);
    run(1);
    symlink(server_path(), shell.room.path("bin/nbdkit")).expect("there is no such file yet");
    assert_eq!(run(0).text(), "complete -F _nbdcaptive nbdkit\n");
}

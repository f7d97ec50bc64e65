//! A table of command lines, each given to this server and to Debian's nbdkit: exit status, stdout and stderr are the same,
//! but for the name in front of a line, or the table names why not. `command_lines.table` begins with how it is read.
//!
//! `UPDATE_COMMAND_LINES=1 cargo test --test black_box command_lines::` writes into the table what was seen; a difference that
//! nobody has named yet is then called `?`, and fails.
//!
//! `COMMAND_LINES_NBDKIT=/path/to/a/newer/nbdkit` compares with that one: where the reason for a difference is what nbdkit has
//! changed since Debian's version, so that its name begins with `debian-`, it must not differ.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStringExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{fs, thread};

use super::harness::{Output, Room, nbdkit, nbdkit_differs, server_path};

#[path = "command_lines/odd_values.rs"]
mod odd_values;

/// How many command lines of a section run at once.
const AT_ONCE: usize = 4;

/// An output of more lines than this is not for a table: its first line stands for it. What is in it has tests of its own.
const READABLE: usize = 12;

/// The reason that says that this server's line is nbdkit's and goes on: with what would be right.
const HINT: &str = "hint";

/// How the line of a row begins that says so; why follows.
const NOT_ASKED: &str = "nbdkit is not asked again:";

/// Another nbdkit than Debian's to compare with.
fn newer_nbdkit() -> Option<PathBuf> {
    std::env::var_os("COMMAND_LINES_NBDKIT").map(PathBuf::from)
}

/// Whether the table is to be written.
fn is_update() -> bool {
    std::env::var_os("UPDATE_COMMAND_LINES").is_some() && newer_nbdkit().is_none()
}

/// What a command line came to, as the table writes it: lines without their ends, bytes that are not text escaped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Outcome {
    status: String,
    stdout: Vec<String>,
    stderr: Vec<String>,
}

impl Outcome {
    fn of(output: &Output, room: &Room) -> Outcome {
        let lines = |bytes: &[u8]| -> Vec<String> {
            let text = bytes.utf8_chunks().fold(String::new(), |mut text, chunk| {
                text.push_str(chunk.valid());
                let _ = write!(text, "{}", chunk.invalid().escape_ascii());
                text
            });
            let text = text.replace(&*server_path().to_string_lossy(), "PROGRAM");
            let text = text.replace(&*room.path("").to_string_lossy(), "ROOM/");
            let text = text.replace(room.path("").to_string_lossy().trim_end_matches('/'), "ROOM");
            text.lines().map(readable).collect()
        };
        let status = match output.status.code() {
            Some(status) => status.to_string(),
            None => output.status.to_string(),
        };
        Outcome { status, stdout: lines(&output.stdout), stderr: lines(output.stderr.as_bytes()) }
    }

    /// Takes a line of the table; `rest` is what stands behind a name at its start. Whether it was one of an outcome.
    fn read(&mut self, rest: impl Fn(&str) -> Option<String>) -> bool {
        if let Some(status) = rest("status") {
            self.status = status;
        } else if let Some(line) = rest("stdout |") {
            self.stdout.push(line);
        } else if let Some(line) = rest("stderr |") {
            self.stderr.push(line);
        } else {
            return false;
        }
        true
    }

    /// As it is in the table.
    fn abbreviated(mut self) -> Outcome {
        for lines in [&mut self.stdout, &mut self.stderr] {
            if lines.len() > READABLE {
                lines.truncate(1);
                lines.push("...".to_owned());
            }
        }
        self
    }

    /// A part of it by its name in the table.
    fn part(&self, name: &str) -> String {
        match name {
            "status" => self.status.clone(),
            "stdout" => self.stdout.join("\n"),
            "stderr" => self.stderr.join("\n"),
            other => panic!("{other:?} is none of status, stdout and stderr"),
        }
    }

    /// Which parts differ from nbdkit's, the names of both programs taken for the same.
    fn differs_from(&self, theirs: &Outcome) -> BTreeSet<String> {
        let same = |name| self.part(name).replace("nbdcaptive", "nbdkit") == theirs.part(name);
        ["status", "stdout", "stderr"].into_iter().filter(|name| !same(name)).map(str::to_owned).collect()
    }

    /// In the table.
    fn write(&self, to: &mut String, parts: &BTreeSet<String>, prefix: &str) {
        let all = parts.is_empty();
        if all || parts.contains("status") {
            let _ = writeln!(to, "  {prefix}status {}", self.status);
        }
        for (name, lines) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            match lines.len() {
                _ if !all && !parts.contains(name) => {}
                0 if !all => drop(writeln!(to, "  {prefix}{name} nothing")),
                _ => lines.iter().for_each(|line| {
                    let _ = writeln!(to, "{}", format!("  {prefix}{name} | {line}").trim_end());
                }),
            }
        }
    }
}

/// A line without what a terminal would not show, without random names, and without what changes with every plugin and filter that
/// is added.
fn readable(line: &str) -> String {
    let control = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    let mut line: String = line.chars().map(control).collect();
    for (start, end) in [("/nbdcaptive-scripts-", "/"), ("/tmp/nbdkit", "/")] {
        if let Some((before, name)) = line.split_once(start)
            && let Some((_, after)) = name.split_once(end)
        {
            line = format!("{before}{start}...{end}{after}");
        }
    }
    for list in ["there are: ", "known are: "] {
        if let Some(start) = line.find(list) {
            line.truncate(start + list.len());
            line.push_str("...");
        }
    }
    line.trim_end().to_owned()
}

/// A command line of the table.
#[derive(Clone, Debug)]
struct Row {
    /// As written.
    line: String,
    /// What the table says.
    outcome: Outcome,
    /// The parts in which nbdkit's is another, and the names of the reasons.
    differences: BTreeMap<String, String>,
    /// nbdkit's, as written.
    theirs: String,
    /// Why nbdkit is not asked again, and what it said once: it leaves files behind, or now says this and now that.
    remembered: Option<(String, Outcome)>,
}

impl Row {
    fn new(line: &str) -> Row {
        Row {
            line: line.to_owned(),
            outcome: Outcome::default(),
            differences: BTreeMap::new(),
            theirs: String::new(),
            remembered: None,
        }
    }

    /// nbdkit's outcome as it belongs in this row.
    fn written(&self, theirs: &Outcome, differs: &BTreeSet<String>) -> String {
        let mut text = String::new();
        let theirs = theirs.clone().abbreviated();
        match self.remembered {
            Some(_) => theirs.write(&mut text, &BTreeSet::new(), "nbdkit "),
            None if differs.is_empty() => {}
            None => theirs.write(&mut text, differs, "nbdkit "),
        }
        text
    }
}

/// A part of the table with a heading.
#[derive(Clone, Debug)]
struct Section {
    name: String,
    /// Lines before the first row.
    prose: String,
    rows: Vec<Row>,
}

#[derive(Clone, Debug)]
struct Table {
    prose: String,
    /// What a word with `@` stands for.
    short: BTreeMap<String, String>,
    /// The reasons for differences, by name.
    reasons: BTreeMap<String, String>,
    sections: Vec<Section>,
}

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/black_box/command_lines.table")
}

impl Table {
    fn read() -> Table {
        let text = fs::read_to_string(path()).expect("the table is there");
        let mut table =
            Table { prose: String::new(), short: BTreeMap::new(), reasons: BTreeMap::new(), sections: Vec::new() };
        for (number, line) in text.lines().enumerate() {
            table.add(line).unwrap_or_else(|| panic!("line {} of the table: {line}", number + 1));
        }
        table
    }

    fn add(&mut self, line: &str) -> Option<()> {
        if let Some(name) = line.strip_prefix("## ") {
            self.sections.push(Section { name: name.to_owned(), prose: String::new(), rows: Vec::new() });
            return Some(());
        }
        let Some(section) = self.sections.last_mut() else {
            self.prose += &format!("{line}\n");
            match line.split_once(": ") {
                Some((short, words)) if short.starts_with('@') => {
                    self.short.insert(short.to_owned(), words.to_owned());
                }
                Some((name, reason)) if name.starts_with("= ") => {
                    self.reasons.insert(name["= ".len()..].to_owned(), reason.to_owned());
                }
                _ => {}
            }
            return Some(());
        };
        if let Some(line) = line.strip_prefix("$ ").or((line == "$").then_some("")) {
            section.rows.push(Row::new(line));
            return Some(());
        }
        let Some(row) = section.rows.last_mut() else {
            section.prose += &format!("{line}\n");
            return Some(());
        };
        let rest = |name: &str| -> Option<String> {
            let rest = line.strip_prefix("  ")?.strip_prefix(name)?;
            rest.strip_prefix(" ").or((rest.is_empty()).then_some("")).map(str::to_owned)
        };
        if line.is_empty() || row.outcome.read(rest) {
        } else if let Some(why) = rest(NOT_ASKED) {
            row.remembered = Some((why, Outcome::default()));
        } else if let Some(difference) = rest("differs") {
            let (part, reason) = difference.split_once(": ")?;
            row.differences.insert(part.to_owned(), reason.to_owned());
        } else if rest("nbdkit").is_some() {
            if let Some((_, theirs)) = &mut row.remembered {
                theirs.read(|name| rest(&format!("nbdkit {name}")));
            }
            row.theirs += &format!("{line}\n");
        } else {
            return None;
        }
        Some(())
    }

    fn write(&self) -> String {
        let mut text = self.prose.clone();
        for section in &self.sections {
            let _ = write!(text, "## {}\n{}", section.name, section.prose);
            for (index, row) in section.rows.iter().enumerate() {
                let _ = writeln!(text, "{}", format!("$ {}", row.line).trim_end());
                row.outcome.write(&mut text, &BTreeSet::new(), "");
                for (part, reason) in &row.differences {
                    let _ = writeln!(text, "  differs {part}: {reason}");
                }
                if let Some((why, _)) = &row.remembered {
                    let _ = writeln!(text, "  {NOT_ASKED} {why}");
                }
                text += &row.theirs;
                if index + 1 < section.rows.len() {
                    text.push('\n');
                }
            }
            text.push('\n');
        }
        format!("{}\n", text.trim_end())
    }

    /// The words of a row. Panics at what cannot be read.
    fn words(&self, line: &str) -> Vec<OsString> {
        let mut line = line.to_owned();
        for (short, words) in &self.short {
            line = line.replace(short, words);
        }
        words(&line).unwrap_or_else(|| panic!("this cannot be split into words: {line}"))
    }
}

/// Splits a line as a shell does: `'...'` and `"..."` keep everything but the quote, `$'...'` knows `\xNN`, `\n` and `\\`.
fn words(line: &str) -> Option<Vec<OsString>> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut rest = line.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        match (byte, rest) {
            (b' ', _) => words.extend(word.take()),
            (b'\'' | b'"', _) => {
                let end = rest.iter().position(|one| one == byte)?;
                word.get_or_insert_default().extend(&rest[..end]);
                rest = &rest[end + 1..];
            }
            (b'$', [b'\'', after @ ..]) => {
                rest = after;
                let word = word.get_or_insert_default();
                loop {
                    match rest {
                        [b'\'', after @ ..] => {
                            rest = after;
                            break;
                        }
                        [b'\\', b'x', high, low, after @ ..] => {
                            let digits = [*high, *low];
                            word.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
                            rest = after;
                        }
                        [b'\\', letter, after @ ..] => {
                            word.push(match letter {
                                b'n' => b'\n',
                                b't' => b'\t',
                                b'\\' => b'\\',
                                _ => return None,
                            });
                            rest = after;
                        }
                        [byte, after @ ..] => {
                            word.push(*byte);
                            rest = after;
                        }
                        [] => return None,
                    }
                }
            }
            _ => word.get_or_insert_default().push(*byte),
        }
    }
    words.extend(word);
    Some(words.into_iter().map(OsString::from_vec).collect())
}

/// What every room of a row holds.
fn furnish(room: &Room) {
    room.write("disk", [0; 65536]);
    room.write("a=b", [1; 1024]);
    room.write("part", [2; 512]);
    room.write("empty", "");
    room.write("text", "hello\n");
    room.write("key", "secret\n");
    fs::create_dir(room.path("dir")).expect("a directory in the room");
    room.write("dir/one", [0; 512]);
    room.script("script", "case \"$1\" in get_size) echo 4096;; pread) head -c $3 /dev/zero;; *) exit 2;; esac");
    room.script("failing", "echo no luck >&2; exit 1\n");
}

fn names(room: &Room) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(room.path("")).expect("the room is there");
    entries.flatten().map(|entry| entry.path()).collect()
}

/// What this server makes of a command line. Nothing is left behind.
fn ours(words: &[OsString]) -> Outcome {
    let room = Room::new();
    furnish(&room);
    let before = names(&room);
    let output = room.server(words).run();
    room.assert_nothing_left();
    assert_eq!(names(&room), before, "files are left: {output:#?}");
    Outcome::of(&output, &room)
}

/// What Debian's nbdkit makes of it. It does not take `--run` for a reason to make a socket of its own, as nbdkit does since
/// 1.36, so it is given one where nothing else is said.
fn theirs(words: &[OsString]) -> Outcome {
    const ELSEWHERE: [&str; 6] = ["-U", "-p", "-s", "--unix", "--port", "--single"];
    let room = Room::new();
    furnish(&room);
    let starts = |word: &OsString, start: &str| word.to_string_lossy().starts_with(start);
    let run = words.iter().any(|word| starts(word, "--run"));
    let elsewhere = words.iter().any(|word| ELSEWHERE.iter().any(|start| starts(word, start)));
    let newer = newer_nbdkit();
    let mut launch = room.launch(newer.as_deref().unwrap_or_else(|| nbdkit()));
    launch.named("nbdkit");
    if run && !elsewhere {
        launch.args(["-U", "socket"]);
    }
    let output = launch.args(words).run();
    Outcome::of(&output, &room)
}

/// Both outcomes of a row, or why there are none.
fn run(row: &Row, words: &[OsString]) -> Result<(Outcome, Outcome), String> {
    let remembered = row.remembered.clone().map(|(_, outcome)| outcome);
    let remembered = remembered.filter(|outcome| !outcome.status.is_empty());
    let caught = catch_unwind(AssertUnwindSafe(|| (ours(words), remembered.unwrap_or_else(|| theirs(words)))));
    caught.map_err(|panic| match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
        (Some(text), _) => text.clone(),
        (None, Some(text)) => (*text).to_owned(),
        (None, None) => "a panic without words".to_owned(),
    })
}

/// What is wrong with a row, given what was seen.
fn judge(row: &Row, seen: &Outcome, theirs: &Outcome) -> Vec<String> {
    let mut wrong = Vec::new();
    let short = seen.clone().abbreviated();
    for part in ["status", "stdout", "stderr"] {
        if short.part(part) != row.outcome.part(part) {
            wrong.push(format!("{part} is not what the table says: {:?}", row.outcome.part(part)));
        }
    }
    let differs = seen.differs_from(theirs);
    let newer = newer_nbdkit().is_some() && row.remembered.is_none();
    let named = row.differences.iter().filter(|(_, reason)| !(newer && reason.starts_with("debian-")));
    let named: BTreeSet<_> = named.map(|(part, _)| part.clone()).collect();
    for part in differs.difference(&named) {
        wrong.push(format!("{part} is not nbdkit's, and the table does not say why"));
    }
    for part in named.difference(&differs) {
        wrong.push(format!("{part} is nbdkit's, and the table says that it differs"));
    }
    if row.written(theirs, &differs) != row.theirs && !newer {
        wrong.push(format!("nbdkit's outcome is not what the table says:\n{}", row.theirs));
    }
    for (part, _) in row.differences.iter().filter(|(_, reason)| *reason == HINT) {
        let (ours, theirs) = (seen.part(part).replace("nbdcaptive", "nbdkit"), theirs.part(part));
        let first = theirs.lines().next().unwrap_or_default();
        if !(ours.starts_with(first) && ours.lines().count() <= theirs.lines().count()) {
            wrong.push(format!("{part} is not nbdkit's line with something added"));
        }
    }
    wrong.extend(
        row.differences.values().filter(|reason| *reason == "?").map(|_| "a difference has no name".to_owned()),
    );
    wrong
}

static WRITING: Mutex<()> = Mutex::new(());

/// Held while a section runs, so that few command lines run at once whatever the number of tests that do.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the rows of a section, and says of all that are wrong what they came to.
fn check(name: &str) {
    if nbdkit_differs("it is compared with itself") {
        return;
    }
    let table = Table::read();
    let section = table.sections.iter().find(|section| section.name == name).expect("the table has this section");
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    {
        let _turn = turn();
        thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| {
                    while let Some(row) = section.rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let outcome = run(row, &table.words(&row.line));
                        outcomes.lock().expect("no row panics").push((row.line.clone(), outcome));
                    }
                });
            }
        });
    }
    let outcomes: BTreeMap<_, _> = outcomes.into_inner().expect("no row panics").into_iter().collect();
    if is_update() {
        update(name, &outcomes);
    }
    let mut report = String::new();
    for row in &section.rows {
        let wrong = match &outcomes[&row.line] {
            Err(why) => vec![why.clone()],
            Ok((seen, theirs)) => judge(row, seen, theirs),
        };
        if wrong.is_empty() {
            continue;
        }
        let _ = write!(report, "\n$ nbdcaptive {}\n{}\n", row.line, wrong.join("\n"));
        if let Ok((seen, theirs)) = &outcomes[&row.line] {
            seen.clone().abbreviated().write(&mut report, &BTreeSet::new(), "");
            theirs.clone().abbreviated().write(&mut report, &BTreeSet::new(), "nbdkit ");
        }
    }
    assert!(report.is_empty(), "{report}");
}

fn update(name: &str, outcomes: &BTreeMap<String, Result<(Outcome, Outcome), String>>) {
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut table = Table::read();
    let section = table.sections.iter_mut().find(|section| section.name == name).expect("it was there");
    for row in &mut section.rows {
        let Some(Ok((seen, theirs))) = outcomes.get(&row.line) else { continue };
        let differs = seen.differs_from(theirs);
        row.outcome = seen.clone().abbreviated();
        row.differences.retain(|part, _| differs.contains(part));
        for part in &differs {
            row.differences.entry(part.clone()).or_insert_with(|| "?".to_owned());
        }
        row.theirs = row.written(theirs, &differs);
    }
    fs::write(path(), table.write()).expect("the table can be written");
}

/// A test for each section.
macro_rules! sections {
    ($($test:ident: $name:literal,)*) => {
        const SECTIONS: &[&str] = &[$($name),*];
        $(#[test]
        fn $test() {
            check($name);
        })*
    };
}

sections! {
    how_options_are_written: "How options are written",
    the_values_of_options: "The values of options",
    options_that_go_together_or_not: "Options that go together, or not",
    what_is_answered_without_serving: "What is answered without serving",
    how_parameters_are_written: "How parameters are written",
    sizes: "Sizes",
    whole_numbers: "Whole numbers",
    switches: "Switches",
    delays: "Delays",
    probabilities: "Probabilities",
    plugins: "Plugins",
    filters: "Filters",
    statuses: "Statuses",
}

#[test]
fn the_table_is_whole() {
    let table = Table::read();
    let names: Vec<_> = table.sections.iter().map(|section| section.name.as_str()).collect();
    assert_eq!(names, SECTIONS);
    assert_eq!(table.write(), fs::read_to_string(path()).expect("the table is there"), "it is written as it is read");
    let mut seen = BTreeSet::new();
    let mut used = BTreeSet::new();
    for row in table.sections.iter().flat_map(|section| &section.rows) {
        assert!(seen.insert(&row.line), "twice in the table: {}", row.line);
        for reason in row.differences.values() {
            let known = table.reasons.contains_key(reason);
            assert!(known, "{}: {reason:?} is no reason at the top of the table", row.line);
            used.insert(reason);
        }
    }
    let unused: Vec<_> = table.reasons.keys().filter(|reason| !used.contains(reason)).collect();
    assert!(unused.is_empty(), "reasons that no row has: {unused:?}");
}

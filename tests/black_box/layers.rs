//! Plugins and filters, each next to nbdkit's: the same operations give the same answers ([`same`]), and a command line that
//! makes no sense the same line ([`same_refusal`]). What Debian's nbdkit does not have, or does otherwise, is asserted of this
//! server alone ([`answers`], [`refusal`]).
//!
//! The operations are described at the top of `layers/operations.py`. One module for each group of layers.

use std::ffi::OsStr;
use std::path::Path;

use super::harness::{Launch, Room, nbdkit};

#[path = "layers/allocators.rs"]
mod allocators;
#[path = "layers/files.rs"]
mod files;
#[path = "layers/filters.rs"]
mod filters;
#[path = "layers/made.rs"]
mod made;
#[path = "layers/simple.rs"]
mod simple;
#[path = "layers/stored.rs"]
mod stored;

/// What drives both servers.
const OPERATIONS_PROGRAM: &str = include_str!("layers/operations.py");

/// What packs as lzip(1) does.
pub const LZIP_PROGRAM: &str = include_str!("layers/lzip.py");

/// What this server answers, line for line. The room may hold files that the arguments name.
#[track_caller]
pub fn answers_in<A: AsRef<OsStr>>(room: &Room, arguments: &[A], operations: &[&str]) -> String {
    operate(room, operations, |command| room.captive(arguments, command))
}

/// As [`answers_in`], where nothing but the arguments matters.
#[track_caller]
pub fn answers<A: AsRef<OsStr>>(arguments: &[A], operations: &[&str]) -> String {
    answers_in(&Room::new(), arguments, operations)
}

/// What both servers answer, which is the same. `prepare` fills the room of each.
#[track_caller]
pub fn same_in<A: AsRef<OsStr>>(prepare: impl Fn(&Room), arguments: &[A], operations: &[&str]) -> String {
    let (ours, theirs) = (Room::new(), Room::new());
    prepare(&ours);
    prepare(&theirs);
    let answers = answers_in(&ours, arguments, operations);
    let expected = operate(&theirs, operations, |command| theirs.nbdkit_captive(arguments, command));
    for (ours, theirs) in answers.lines().zip(expected.lines()) {
        assert_eq!(ours, theirs, "left is ours, right is nbdkit's");
    }
    assert_eq!(answers.lines().count(), operations.len());
    answers
}

/// As [`same_in`], where nothing but the arguments matters.
#[track_caller]
pub fn same<A: AsRef<OsStr>>(arguments: &[A], operations: &[&str]) -> String {
    same_in(|_| (), arguments, operations)
}

/// The line with which this server refuses the arguments, without its name. Nothing was served.
#[track_caller]
pub fn refusal_in<A: AsRef<OsStr>>(room: &Room, arguments: &[A]) -> String {
    let output = room.captive(arguments, "echo served").run_to(1);
    assert_eq!(output.text(), "", "{output:#?}");
    output.expect_error_line(&[]);
    let line = output.stderr.split_once(": ").expect("it begins with the program's name").1;
    line.strip_prefix("error: ").unwrap_or(line).trim_end().to_owned()
}

/// As [`refusal_in`], where nothing but the arguments matters.
#[track_caller]
pub fn refusal<A: AsRef<OsStr>>(arguments: &[A]) -> String {
    refusal_in(&Room::new(), arguments)
}

/// The line with which both servers refuse the arguments. nbdkit may have more to say.
#[track_caller]
pub fn same_refusal<A: AsRef<OsStr>>(arguments: &[A]) -> String {
    let line = refusal(arguments);
    let output = Room::new().nbdkit_captive(arguments, "echo served").run_to(1);
    assert!(output.stderr.contains(&line), "ours: {line}; nbdkit's: {}", output.stderr);
    line
}

#[track_caller]
fn operate(room: &Room, operations: &[&str], captive: impl FnOnce(String) -> Launch) -> String {
    // Debian's own, because that has libnbd.
    let python = Path::new("/usr/bin/python3");
    assert!(python.exists() && nbdkit().exists(), "apt install python3-libnbd nbdkit");
    room.write("operations.py", OPERATIONS_PROGRAM);
    room.write("operations", operations.join("\n") + "\n");
    let command = format!("{} operations.py \"$uri\" < operations", python.display());
    captive(command).run_to(0).text().to_owned()
}

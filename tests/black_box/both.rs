//! The same operations on a plugin of nbdkit's and on ours: what a client sees of both is the same.

use super::harness::Room;

/// What `operate.py` is run with.
pub const OPERATE: &str = include_str!("both/operate.py");

/// The command of `--run` that does these operations. It needs the room's `operate.py`.
pub fn command(operations: &[&str]) -> String {
    // Debian's own Python, because that has libnbd. No operation has a quote in it.
    let words: Vec<_> = operations.iter().map(|one| format!("'{one}'")).collect();
    format!("/usr/bin/python3 operate.py \"$uri\" {}", words.join(" "))
}

/// Serves with these arguments and says what the operations came to. Nothing is left behind.
#[track_caller]
pub fn ours(room: &Room, arguments: &[&str], operations: &[&str]) -> String {
    room.write("operate.py", OPERATE);
    let output = room.captive(arguments, command(operations)).run_to(0);
    room.assert_nothing_left();
    output.text().to_owned()
}

/// As [`ours`], and the same with Debian's nbdkit, in another room that `prepare` has made the same.
#[track_caller]
pub fn both(arguments: &[&str], operations: &[&str], prepare: impl Fn(&Room)) -> String {
    let (room, other) = (Room::new(), Room::new());
    prepare(&room);
    prepare(&other);
    other.write("operate.py", OPERATE);
    let theirs = other.nbdkit_captive(arguments, command(operations)).run_to(0);
    let ours = ours(&room, arguments, operations);
    assert_eq!(ours, theirs.text(), "{arguments:?}: ours is first");
    ours
}

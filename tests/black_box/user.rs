//! `-u` and `-g`: another user and group from the moment on that the server listens. The tests run as root, who alone may.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;

use crate::harness::{Room, server_path};

/// The four user ids, group ids, and supplementary groups of a process.
fn identity(pid: i32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
    let lines = status.lines().filter(|line| ["Uid:", "Gid:", "Groups:"].iter().any(|key| line.starts_with(key)));
    lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") + "\n").collect()
}

/// E9: "removed", also by a server that may no longer write to the directory
#[test]
fn a_server_that_became_another_user_leaves_nothing() {
    let room = Room::new();
    let server = room.serve(["-u", "12345", "-g", "23456", "-P", "pid", "memory", "1M"]);
    let want = "Uid: 12345 12345 12345 12345\nGid: 23456 23456 23456 23456\nGroups: 23456\n";
    // A client that is served comes after the change; one that is only connected may not.
    server.simple().expect_alive();
    assert_eq!(identity(server.running.pid()), want);
    server.terminate().expect(0);
    assert!(!room.path("socket").exists() && !room.path("pid").exists());
    room.assert_nothing_left();
}

/// E9: the private socket and its directory; and the command is run as before
#[test]
fn the_command_stays_who_the_caller_is() {
    let room = Room::new();
    let output = room.captive(["-u", "nobody", "memory", "1M"], "id -u; nbdinfo --size \"$uri\"").run_to(0);
    assert_eq!(output.text(), "0\n1048576\n");
    room.assert_nothing_left();
}

#[test]
fn an_unknown_user_is_an_error_and_the_command_never_starts() {
    let room = Room::new();
    let output = room.captive(["-u", "nosuchuser", "memory", "1M"], "echo started").run_to(1);
    assert_eq!(output.text(), "");
    assert!(output.stderr.contains("-u option: nosuchuser is not a valid user name or uid"), "{}", output.stderr);
    room.assert_nothing_left();
}

/// C12: the change of user does not lose the parent
#[test]
fn the_parent_is_watched_by_another_user_too() {
    let room = Room::new();
    let socket = room.path("socket");
    let mut launch = room.launch(Path::new("/bin/sh"));
    launch.args(["-c", "\"$0\" --exit-with-parent -U socket -u nobody memory 1M & wait"]).args([server_path()]);
    let mut parent = launch.start();
    parent.wait_until_listening(&socket);
    parent.signal(Signal::SIGKILL);
    room.wait_until_nothing_left();
    assert!(!socket.exists());
}

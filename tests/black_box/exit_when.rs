//! `exitwhen`: events that end the server, noticed when they happen and not at the next of nbdkit's looks, 60 seconds later.
//! The letters and numbers in the comments are the rows of the lifetime catalogue in docs/; sentences in quotes are from
//! nbdkit's man pages and from that catalogue.

use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::harness::{
    Launch, Output, Room, Running, Server, Witness, nbdkit_differs, program_name, server_path, spawn, wait_for,
};

const EXITWHEN: [&str; 3] = ["--filter=exitwhen", "memory", "1M"];

/// nbdkit looks only so often, and misses what is not there at that moment.
fn looks_too_seldom() -> bool {
    nbdkit_differs("D1: up to 60 s late")
}

/// An event is noticed at once. This is long for a busy machine, and shorter than the 60 seconds until the next look.
const AT_ONCE: Duration = Duration::from_secs(45);

/// Something that ends well, before there is another look.
#[track_caller]
fn ends_at_once(running: Running) -> Output {
    let start = Instant::now();
    let output = running.finish().expect(0);
    assert!(start.elapsed() < AT_ONCE, "it took {:?}: {output:#?}", start.elapsed());
    output
}

/// A server that waits for this event and serves a client meanwhile.
fn serve(room: &Room, parameters: &[&str]) -> Server {
    serve_with(room, parameters, |_| ())
}

fn serve_with(room: &Room, parameters: &[&str], prepare: impl FnOnce(&mut Launch)) -> Server {
    let server = room.serve_with(EXITWHEN.iter().chain(parameters), prepare);
    // One that has come and gone changes nothing.
    let mut client = server.simple();
    client.expect_alive();
    client.disconnect();
    server
}

/// After the event nobody is connected, so the server ends, and leaves nothing.
#[track_caller]
fn ends_and_leaves_nothing(room: &Room, server: Server) {
    ends_at_once(server.running);
    assert!(!server.socket.exists());
    room.assert_nothing_left();
}

fn touch(path: impl AsRef<Path>) {
    fs::write(path, "").expect("a file in the room");
}

/// Lets the server inherit a descriptor, and makes the parameter that names it.
fn pipe_closed(launch: &mut Launch, fd: impl Into<OwnedFd>) -> String {
    let fd = fd.into();
    let parameter = format!("exit-when-pipe-closed={}", fd.as_raw_fd());
    launch.inherit(fd);
    parameter
}

/// A server that waits for the end of what `fd` is one end of.
fn serve_until_closed(room: &Room, fd: impl Into<OwnedFd>) -> Server {
    serve_with(room, &[], |launch| {
        let parameter = pipe_closed(launch, fd);
        launch.args([parameter]);
    })
}

fn pipe() -> (PipeReader, PipeWriter) {
    std::io::pipe().expect("a pipe")
}

mod files {
    use super::*;

    /// D1: "nbdkit will run normally until something creates /tmp/stop [...] If /tmp/stop exists before nbdkit starts, it will
    /// exit immediately."
    #[test]
    fn ends_when_the_file_is_created() {
        if looks_too_seldom() {
            return;
        }
        let room = Room::new();
        let server = serve(&room, &["exit-when-file-created=stop"]);
        touch(room.path("stop"));
        ends_and_leaves_nothing(&room, server);
        let output = room.server(["-f", "-U", "s"]).args(EXITWHEN).args(["exit-when-file-created=stop"]).run_to(0);
        output.expect_error_line(&["exit-when-file-created: ", "stop is there"]);
    }

    /// D1
    #[test]
    fn ends_when_the_file_is_deleted() {
        if looks_too_seldom() {
            return;
        }
        let room = Room::new();
        touch(room.path("alive"));
        let server = serve(&room, &["exit-when-file-deleted=alive"]);
        fs::remove_file(room.path("alive")).expect("it is there");
        ends_and_leaves_nothing(&room, server);
    }

    /// D1: "inotify on the nearest existing ancestor"
    #[test]
    fn ends_when_the_file_is_created_in_a_directory_that_was_not_there() {
        if looks_too_seldom() {
            return;
        }
        let room = Room::new();
        let server = serve(&room, &["exit-when-file-created=a/b/stop"]);
        fs::create_dir_all(room.path("aside/b")).expect("the room is there");
        touch(room.path("aside/b/stop"));
        fs::rename(room.path("aside"), room.path("a")).expect("it is there");
        ends_and_leaves_nothing(&room, server);
    }

    /// D2: "created and removed again between polls: seen"
    #[test]
    fn ends_when_the_file_was_there_for_a_moment() {
        if looks_too_seldom() {
            return;
        }
        let room = Room::new();
        let server = serve(&room, &["exit-when-file-created=stop"]);
        touch(room.path("stop"));
        fs::remove_file(room.path("stop")).expect("it is there");
        ends_and_leaves_nothing(&room, server);
    }

    /// D3: "rename yes; symlink counts only if it resolves"
    #[test]
    fn a_dangling_link_is_no_file_and_a_renamed_one_is() {
        if looks_too_seldom() {
            return;
        }
        let room = Room::new();
        let mut server = serve(&room, &["exit-when-file-created=stop"]);
        symlink("nowhere", room.path("stop")).expect("the room is there");
        (0..100).for_each(|_| drop(server.simple()));
        assert!(!server.running.has_ended());
        touch(room.path("other"));
        fs::rename(room.path("other"), room.path("nowhere")).expect("it is there");
        ends_and_leaves_nothing(&room, server);
    }

    /// "nbdkit changes directory when it daemonizes", and the name means what it meant before.
    #[test]
    fn a_server_in_the_background_finds_the_file() {
        if looks_too_seldom() {
            return;
        }
        let room = Room::new();
        let mut launch = room.server(["-U", "s"]);
        let witness = Witness::new(&mut launch);
        launch.args(EXITWHEN).args(["exit-when-file-created=stop"]).run_to(0);
        assert!(!witness.all_are_gone());
        touch(room.path("stop"));
        witness.wait_until_all_are_gone();
        room.assert_nothing_left();
        assert!(!room.path("s").exists());
    }

    /// G8: "poll fallback, [...] same results slower"
    #[test]
    fn ends_where_there_is_neither_inotify_nor_pidfd() {
        if nbdkit_differs("it needs neither") {
            return;
        }
        let room = Room::new();
        for event in ["file", "process", "script"] {
            let mut other = processes::sleeper();
            let process = format!("exit-when-process-exits={}", other.id());
            let file = format!("exit-when-file-created=stop-{event}");
            let script = format!("exit-when-script=test -e asked-{event} && exit 88; exit 0");
            let mut launch = room.tool("strace", ["-f", "-o", "/dev/null", "-e", "trace=inotify_init1,pidfd_open"]);
            launch.args(["-e", "inject=inotify_init1,pidfd_open:error=ENOSYS"]).args([server_path()]);
            launch.args(["-f", "-U", "s"]).args(EXITWHEN).args([&file, &process, &script, "exit-when-poll=1"]);
            let mut running = launch.start();
            running.wait_until_listening(&room.path("s"));
            match event {
                "file" => touch(room.path("stop-file")),
                "script" => touch(room.path("asked-script")),
                _ => other.kill().expect("it is ours"),
            }
            running.finish().expect(0);
            let _ = other.kill();
            other.wait().expect("it is ours");
        }
        room.assert_nothing_left();
    }
}

mod processes {
    use super::*;

    pub fn sleeper() -> std::process::Child {
        spawn(Command::new("sleep").arg("1000").stdin(Stdio::null())).expect("sleep is there")
    }

    /// D5: "< 100 ms, at exit not at reap"
    #[test]
    fn ends_when_the_process_does_although_nobody_has_waited_for_it() {
        if looks_too_seldom() {
            return;
        }
        let room = Room::new();
        let mut other = sleeper();
        let server = serve(&room, &[&format!("exit-when-process-exits={}", other.id())]);
        other.kill().expect("it is ours");
        ends_and_leaves_nothing(&room, server);
        other.wait().expect("it is ours");
    }

    /// D6: "event is true: status 0 and one stderr line (a typo must be visible)"
    #[test]
    fn a_process_that_is_gone_has_exited() {
        if nbdkit_differs("D6: status 1") {
            return;
        }
        let room = Room::new();
        let mut other = sleeper();
        let pid = other.id();
        other.kill().expect("it is ours");
        // Nobody has waited for it yet.
        let parameter = format!("exit-when-process-exits={pid}");
        wait_for("the process to be a zombie", || {
            fs::read_to_string(format!("/proc/{pid}/stat")).ok()?.contains(") Z ").then_some(())
        });
        let run = || room.server(["-f", "-U", "s"]).args(EXITWHEN).args([&parameter]).run_to(0);
        run().expect_error_line(&["exit-when-process-exits: ", &pid.to_string()]);
        other.wait().expect("it is ours");
        run().expect_error_line(&["exit-when-process-exits: there is no process ", &pid.to_string()]);
        room.assert_nothing_left();
    }

    /// "A bad value (a descriptor that is not open, a pid that is no number, a poll of 0, an unknown `exit-when-` name) is an
    /// error at the start."
    #[test]
    fn bad_values_are_errors() {
        if nbdkit_differs("a poll of 0 and the number 0 are taken") {
            return;
        }
        let room = Room::new();
        for (parameter, words) in [
            ("exit-when-process-exits=init", "exit-when-process-exits: empty string where we expected a number"),
            ("exit-when-process-exits=-1", "exit-when-process-exits: negative numbers are not allowed"),
            ("exit-when-process-exits=0", "exit-when-process-exits: not the number of a process: 0"),
            ("exit-when-poll=0", "exit-when-poll: must be at least 1 second"),
            ("exit-when-poll=1h", "exit-when-poll: could not parse number: \"1h\": trailing garbage"),
            ("exit-when-file-created=", "cannot convert null or empty path to an absolute path"),
            ("exit-when-sun-sets=1", "unknown parameter 'exit-when-sun-sets'"),
        ] {
            let output = room.server(["-f", "-U", "s"]).args(EXITWHEN).args([parameter]).run_to(1);
            output.expect_error_line(&[words]);
            let output = room.captive(EXITWHEN.iter().chain(&[parameter]), "echo ran").run_to(1);
            output.expect_error_line(&[words]);
            assert_eq!(output.text(), "");
            room.assert_nothing_left();
        }
    }
}

mod pipes {
    use super::*;

    /// D8: "Exit when the pipe is closed. The filter does not read any data from the pipe."
    #[test]
    fn ends_when_the_pipe_is_closed_and_not_when_it_has_data() {
        if looks_too_seldom() {
            return;
        }
        let room = Room::new();
        let (reader, mut writer) = pipe();
        let mut ours = reader.try_clone().expect("a descriptor");
        let mut server = serve_until_closed(&room, reader);
        writer.write_all(b"unread").expect("the pipe is open");
        (0..100).for_each(|_| drop(server.simple()));
        assert!(!server.running.has_ended());
        drop(writer);
        ends_and_leaves_nothing(&room, server);
        assert_eq!(std::io::read_to_string(&mut ours).expect("our end is open"), "unread");
    }

    /// D9: "status 1"
    #[test]
    fn a_descriptor_that_is_not_open_is_an_error() {
        if nbdkit_differs("D9: status 0") {
            return;
        }
        let room = Room::new();
        // The last is one that servers have for themselves.
        for number in ["999999", "-1", "3", "4", "5", "6", "7"] {
            let parameter = format!("exit-when-fd-closed={number}");
            let error = format!("exit-when-pipe-closed: invalid file descriptor: {number} is not open");
            let mut launch = room.server(["-f", "-U", "s"]);
            launch.args(EXITWHEN).args([&parameter]).in_child(close_all).run_to(1).expect_error_line(&[&error]);
            let mut launch = room.captive(EXITWHEN.iter().copied().chain([parameter.as_str()]), "echo ran");
            launch.in_child(close_all).run_to(1).expect_error_line(&[&error]);
            room.assert_nothing_left();
        }
    }

    /// Marks for closing what a test program started by cargo may have been given.
    fn close_all() -> std::io::Result<()> {
        for number in 3..256 {
            // SAFETY: changes a flag of this process only, which is about to execute another program.
            unsafe { nix::libc::fcntl(number, nix::libc::F_SETFD, nix::libc::FD_CLOEXEC) };
        }
        Ok(())
    }

    /// D10: "regular file: status 1 at start"
    #[test]
    fn a_descriptor_that_has_no_other_end_is_an_error() {
        if nbdkit_differs("D10: never fires, silently") {
            return;
        }
        let room = Room::new();
        let file = fs::File::create(room.path("file")).expect("the room is there");
        let mut launch = room.server(["-f", "-U", "s"]);
        let parameter = pipe_closed(&mut launch, file);
        let output = launch.args(EXITWHEN).args([parameter]).run_to(1);
        output.expect_error_line(&["exit-when-pipe-closed: ", "is neither a pipe nor a socket"]);
    }

    /// D10: "Write end: POLLERR = closed."
    #[test]
    fn ends_when_the_reader_of_a_write_end_is_gone() {
        if looks_too_seldom() {
            return;
        }
        let room = Room::new();
        let (reader, writer) = pipe();
        let server = serve_until_closed(&room, writer);
        drop(reader);
        ends_and_leaves_nothing(&room, server);
    }

    /// D11: "peer close fires"
    #[test]
    fn ends_when_the_peer_of_a_socket_is_gone() {
        if looks_too_seldom() {
            return;
        }
        let room = Room::new();
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let server = serve_until_closed(&room, theirs);
        drop(ours);
        ends_and_leaves_nothing(&room, server);
    }

    /// D12: "not in S's children"
    #[test]
    fn programs_of_the_server_do_not_get_the_descriptor() {
        if nbdkit_differs("D12: they do") {
            return;
        }
        let room = Room::new();
        let (reader, writer) = pipe();
        let mut said = room.fifo("said");
        let number = reader.as_raw_fd();
        let script = format!("exit-when-script=test -e /proc/self/fd/{number}; echo $? > said");
        let server = serve_with(&room, &[], |launch| {
            let parameter = pipe_closed(launch, reader);
            launch.args([parameter, script]);
        });
        assert_eq!(said.hear(), "1");
        drop(writer);
        ends_and_leaves_nothing(&room, server);
    }
}

mod scripts {
    use super::*;

    /// D13: "The script should exit with code 88 if the event is detected.": with another, "an error is logged, but the event is
    /// not triggered".
    #[test]
    fn the_status_of_the_script_decides() {
        let room = Room::new();
        let mut asked = room.fifo("asked");
        let script = "exit-when-script=echo asked > asked; read status < status; exit $status";
        room.write("status", "0");
        let mut server = serve(&room, &[script, "exit-when-poll=1"]);
        (0..2).for_each(|_| drop(asked.hear()));
        assert!(!server.running.has_ended());
        assert_eq!(server.running.stderr(), "");
        for status in ["1", "87", "89"] {
            // In one step, so that no script reads half of it.
            fs::rename(room.write("new", status), room.path("status")).expect("it was just written");
            let line = format!("error: exit-when-script: command failed with exit code {status}\n");
            wait_for("the error to be logged", || server.running.stderr().contains(&line).then_some(()));
            assert!(!server.running.has_ended());
        }
        server.simple().expect_alive();
        fs::rename(room.write("new", "88"), room.path("status")).expect("it was just written");
        let output = server.running.finish().expect(0);
        assert!(!output.stderr.contains("exit code 88"), "{output:#?}");
        if !nbdkit_differs("E6: the path is left") {
            assert!(!server.socket.exists());
        }
        room.assert_nothing_left();
    }

    /// D14: "script never delays accept, I/O or shutdown; [...] killed with its tree at shutdown"
    #[test]
    fn a_script_that_hangs_delays_nobody_and_ends_with_the_server() {
        if nbdkit_differs("D14: start-up blocked") {
            return;
        }
        for signal in [Some(Signal::SIGTERM), Some(Signal::SIGKILL), None] {
            let room = Room::new();
            let mut asked = room.fifo("asked");
            let script =
                "exit-when-script=trap '' TERM; sleep 1000 & sleep 1000 < /dev/null & echo asked > asked; wait";
            let mut witness = None;
            let server = serve_with(&room, &[script, "exit-when-poll=1", "exit-when-file-created=stop"], |launch| {
                witness = Some(Witness::new(launch));
            });
            asked.hear();
            match signal {
                Some(signal) => server.running.signal(signal),
                None => touch(room.path("stop")),
            }
            if signal == Some(Signal::SIGKILL) {
                server.running.finish().expect_signal(Signal::SIGKILL);
                witness.expect("it was launched").wait_until_all_are_gone();
                room.wait_until_nothing_left();
            } else {
                ends_and_leaves_nothing(&room, server);
            }
        }
    }

    /// D14: "one at a time"
    #[test]
    fn a_script_is_not_started_while_it_is_running() {
        if nbdkit_differs("D14: start-up blocked") {
            return;
        }
        let room = Room::new();
        let (mut asked, mut go, mut clock) = (room.fifo("asked"), room.fifo("go"), room.fifo("clock"));
        let script =
            "exit-when-script=mkdir running || exit 88; echo asked > asked; read x < go; rmdir running; exit 0";
        // Its neighbour, which is run as often, says when it would have been its turn.
        let mut server = serve(&room, &[script, "exit-when-script=echo tick > clock", "exit-when-poll=1"]);
        for _ in 0..2 {
            asked.hear();
            (0..2).for_each(|_| drop(clock.hear()));
            assert!(!server.running.has_ended());
            go.tell();
        }
        server.terminate().expect(0);
        room.assert_nothing_left();
    }

    /// A SIGINT that comes while a script runs: nbdkit's system(3) ignores it.
    #[test]
    fn signals_are_heard_while_a_script_runs() {
        if nbdkit_differs("D14: SIGINT is lost") {
            return;
        }
        let room = Room::new();
        let server = serve(&room, &["exit-when-script=sleep 1000"]);
        server.running.signal(Signal::SIGINT);
        ends_and_leaves_nothing(&room, server);
    }

    /// D14, with a command: the guardian sees to nothing of it.
    #[test]
    fn a_captive_server_ends_its_script() {
        if nbdkit_differs("D14: start-up blocked") {
            return;
        }
        let room = Room::new();
        let parameter = "exit-when-script=trap '' TERM; sleep 1000 & sleep 1000; :";
        let command = "nbdinfo --size \"$uri\"; exit 4";
        let output = room.captive(EXITWHEN.iter().copied().chain([parameter]), command).run_to(4);
        assert_eq!(output.text(), "1048576\n");
        room.assert_nothing_left();
    }
}

/// D4: "same statuses, one stderr line, clean": "with `--run 'exit 9'` the command never runs and the status is 0"
#[test]
fn what_is_true_at_the_start_serves_nothing() {
    let room = Room::new();
    let mut launch = room.captive(EXITWHEN.iter().copied().chain(["exit-when-script=exit 88"]), "echo ran; exit 9");
    let output = launch.args(["-P", "pid"]).run_to(0);
    assert_eq!(output.text(), "");
    assert!(!room.path("pid").exists());
    if nbdkit_differs("D4: no line, and the directory is left") {
        return;
    }
    output.expect_error_line(&["nothing to serve: exit-when-script: ", "exit 88"]);
    room.assert_nothing_left();
    touch(room.path("there"));
    for parameter in ["exit-when-file-created=there", "exit-when-file-deleted=nowhere"] {
        for place in ["-", "socket"] {
            let both = [parameter, "exit-when-file-created=nowhere"];
            let output = room.server(["-f", "-P", "pid", "-U", place]).args(EXITWHEN).args(both).run_to(0);
            output.expect_error_line(&["nothing to serve: exit-when-file-"]);
            assert!(output.stderr.starts_with(&program_name()));
            assert!(!room.path("pid").exists() && !room.path("socket").exists());
            room.assert_nothing_left();
        }
    }
}

/// D15: "new ones refused, waits": "*the listener is closed and the path unlinked at the event*"; "nbdkit will refuse new
/// connections and exit as soon as the last client has disconnected."
#[test]
fn clients_that_are_there_are_served_after_the_event() {
    if looks_too_seldom() {
        return;
    }
    let room = Room::new();
    let mut server = serve(&room, &["exit-when-file-created=stop"]);
    let mut first = server.simple();
    let mut second = server.simple();
    touch(room.path("stop"));
    wait_for("the path to be gone", || (!server.socket.exists()).then_some(()));
    assert!(UnixStream::connect(&server.socket).is_err());
    assert_eq!(first.write(0, 4096, &[1; 4096]), 0);
    first.disconnect();
    (0..100).for_each(|_| second.expect_alive());
    assert_eq!(second.read(4096, 4096), [1; 4096]);
    assert!(!server.running.has_ended());
    second.disconnect();
    ends_and_leaves_nothing(&room, server);
}

/// D15: "refused clients get … not a half handshake", also one that comes before the event was told.
#[test]
fn a_client_that_comes_right_after_the_event_is_refused() {
    if nbdkit_differs("a client is told that it is refused") {
        return;
    }
    for _ in 0..10 {
        let room = Room::new();
        let server = serve(&room, &["exit-when-file-created=stop"]);
        let mut first = server.simple();
        touch(room.path("stop"));
        if let Ok(mut second) = UnixStream::connect(&server.socket) {
            let mut greeting = [0; 18];
            assert!(!matches!(second.read(&mut greeting), Ok(1..)), "it was greeted");
        }
        first.expect_alive();
        first.disconnect();
        ends_and_leaves_nothing(&room, server);
    }
}

/// D16: "ends at the event"
#[test]
fn ends_although_a_client_was_refused() {
    if nbdkit_differs("D16: lives on until next poll") {
        return;
    }
    let room = Room::new();
    let server = serve(&room, &["exit-when-file-created=stop"]);
    touch(room.path("stop"));
    // Until it is refused; before that it is accepted and goes again.
    wait_for("a client to be refused", || UnixStream::connect(&server.socket).is_err().then_some(()));
    ends_and_leaves_nothing(&room, server);
}

/// D17: "server leaves, C runs on, status C's"
#[test]
fn the_command_goes_on_after_the_event_and_its_status_counts() {
    if looks_too_seldom() {
        return;
    }
    let room = Room::new();
    let mut go = room.fifo("go");
    let command = "nbdinfo --size \"$uri\"; : > stop; while test -S \"$unixsocket\"; do :; done; \
                   nbdinfo --size \"$uri\" 2> /dev/null || echo gone; read x < go; echo \"$x\"; exit 7";
    let mut running = room.captive(EXITWHEN.iter().copied().chain(["exit-when-file-created=stop"]), command).start();
    wait_for("the event", || room.path("stop").exists().then_some(()));
    assert!(!running.has_ended());
    go.tell();
    let output = running.finish().expect(7);
    assert_eq!(output.text(), "1048576\ngone\ngo\n");
    room.assert_nothing_left();
}

/// D24: "first cause wins the log line; status by rules": several events, a signal and the last client at once.
#[test]
fn several_events_at_once_are_one_end() {
    if looks_too_seldom() {
        return;
    }
    for round in 0..10 {
        let room = Room::new();
        let (reader, writer) = pipe();
        touch(room.path("alive"));
        let server = serve_with(&room, &["exit-when-file-created=stop", "exit-when-file-deleted=alive"], |launch| {
            let parameter = pipe_closed(launch, reader);
            launch.args([parameter]);
        });
        let client = server.simple();
        drop(writer);
        touch(room.path("stop"));
        fs::remove_file(room.path("alive")).expect("it is there");
        if round % 2 == 0 {
            server.running.signal(Signal::SIGTERM);
        }
        // Without a word: the server may have closed the connection already.
        drop(client);
        ends_and_leaves_nothing(&room, server);
    }
}

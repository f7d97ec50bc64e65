//! The ways in which a server can be started, and what happens when the system is short of something: `-s`, socket
//! activation, the background, paths, parents of odd kinds, faults. The letters and numbers in the comments are the rows of
//! the lifetime catalogue; sentences in quotes are from it or from nbdkit's man pages.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::unistd::{Pid, pipe2};

use super::harness::{
    Launch, Room, Running, Witness, dead_socket, is_nbdkit, nbdkit_differs, program_name, server_path, wait_for,
    wait_until_unread,
};
use super::raw_client::*;

/// Gives the process `fd` as its descriptor `number`. Nobody else keeps it once `launch` is dropped.
fn give(launch: &mut Launch, number: RawFd, fd: impl Into<OwnedFd>) {
    let fd = fd.into();
    launch.in_child(move || {
        // SAFETY: duplicates a descriptor that the closure owns; touches no memory.
        match unsafe { nix::libc::dup2(fd.as_raw_fd(), number) } {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        }
    });
}

/// The server below a shell that does `how` to it, which ends in `"$@"`.
fn under(room: &Room, how: &str, arguments: &[&str]) -> Launch {
    let mut launch = room.tool("sh", ["-c", how, "sh"]);
    launch.args([server_path()]).args(arguments);
    launch
}

/// A pipe that no other process gets but by [`give`].
fn pipe() -> (OwnedFd, OwnedFd) {
    pipe2(OFlag::O_CLOEXEC).expect("a pipe")
}

/// The option, where the server knows it: nbdkit does since 1.36.
fn print_uri() -> &'static [&'static str] {
    if is_nbdkit() { &[] } else { &["--print-uri"] }
}

/// What a client sends to be in transmission.
fn handshake() -> Vec<u8> {
    let flags = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES;
    [&flags.to_be_bytes()[..], &option_bytes(NBD_OPT_GO, &info_bytes(b"", &[]))].concat()
}

fn read_request(cookie: u64) -> [u8; 28] {
    request_bytes(NBD_CMD_READ, 0, cookie, 0, 4096)
}

/// How often a pattern is in a text.
fn count(text: &[u8], pattern: &[u8]) -> usize {
    text.windows(pattern.len()).filter(|window| *window == pattern).count()
}

/// `-s`: "Serve exactly one client on stdin/stdout"
mod single {
    use super::*;

    /// A server with one socket as stdin and stdout, and its client.
    fn at_a_socket(room: &Room, arguments: &[&str]) -> (Running, Client, Witness) {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let mut launch = room.server(["-s"]);
        launch.args(arguments);
        give(&mut launch, 0, theirs.try_clone().expect("a descriptor"));
        give(&mut launch, 1, theirs);
        let witness = Witness::new(&mut launch);
        let running = launch.start();
        (running, Client::over(ours), witness)
    }

    /// E12: "peer closes / EOF: 0"
    #[test]
    fn ends_with_0_when_the_client_at_a_socket_has_left() {
        for is_told in [true, false] {
            let room = Room::new();
            let (running, mut client, witness) = at_a_socket(&room, &["memory", "1M"]);
            client.start();
            client.go(b"");
            assert_eq!(client.write(0, 512, b"data"), NBD_SUCCESS);
            assert_eq!(client.read(512, 4), b"data");
            if is_told {
                client.disconnect()
            } else {
                drop(client)
            }
            let output = running.finish().expect(0);
            assert_eq!(output.stderr, "");
            witness.wait_until_all_are_gone();
            room.assert_nothing_left();
        }
    }

    /// E12: the two may be pipes, and what was asked before the end of stdin is answered.
    #[test]
    fn answers_everything_that_came_before_the_end_of_a_pipe() {
        let room = Room::new();
        let mut launch = room.server(["-s", "memory", "1M"]);
        let mut running = launch.stdin(Stdio::piped()).start();
        let requests: Vec<u8> = (0..200).flat_map(read_request).collect();
        let mut stdin = running.stdin();
        stdin.write_all(&[handshake(), requests].concat()).expect("the server reads");
        drop(stdin);
        let output = running.finish().expect(0);
        assert!(output.stdout.len() > 200 * 4096, "{} bytes", output.stdout.len());
        assert_eq!(output.stderr, "");
    }

    /// E12: neither files nor /dev/null can be waited for.
    #[test]
    fn stdin_and_stdout_may_be_files() {
        let room = Room::new();
        let requests: Vec<u8> = (0..200).flat_map(read_request).collect();
        room.write("requests", [handshake(), requests].concat());
        under(&room, "exec \"$@\" < requests > replies", &["-s", "memory", "1M"]).run_to(0);
        assert!(fs::metadata(room.path("replies")).expect("it was made").len() > 200 * 4096);
        under(&room, "exec \"$@\" < requests > /dev/null", &["-s", "memory", "1M"]).run_to(0);
    }

    /// The mode of a pipe belongs to all that hold it.
    #[test]
    fn the_caller_s_descriptors_stay_blocking() {
        let room = Room::new();
        let (input, requests) = pipe();
        let mut requests = File::from(requests);
        let (replies, output) = pipe();
        let mut replies = File::from(replies);
        let kept = [input.try_clone().expect("a descriptor"), output.try_clone().expect("a descriptor")];
        let mut launch = room.server(["-s", "memory", "1M"]);
        give(&mut launch, 0, input);
        give(&mut launch, 1, output);
        let running = launch.start();
        requests.write_all(&handshake()).expect("the server reads");
        replies.read_exact(&mut [0; 18 + 20]).expect("a greeting and a reply");
        for fd in &kept {
            let flags = fcntl(fd, FcntlArg::F_GETFL).expect("it is open");
            assert!(!OFlag::from_bits_truncate(flags).contains(OFlag::O_NONBLOCK));
        }
        drop((launch, requests));
        running.finish().expect(0);
    }

    /// E13: "ends < 100 ms, 0"
    #[test]
    fn a_signal_ends_it_although_the_client_is_idle() {
        if nbdkit_differs("E13: ignored until the peer closes") {
            return;
        }
        for greeted in [true, false] {
            let room = Room::new();
            let (running, mut client, witness) = at_a_socket(&room, &["memory", "1M"]);
            client.start();
            if greeted {
                client.go(b"");
                client.expect_alive();
            }
            running.signal(Signal::SIGTERM);
            running.finish().expect(0);
            client.expect_end();
            witness.wait_until_all_are_gone();
        }
    }

    /// E14: "garbage or failed handshake: 1"
    #[test]
    fn a_client_that_never_negotiates_is_status_1_and_a_line() {
        if nbdkit_differs("E14: 0") {
            return;
        }
        let room = Room::new();
        let flags_only = handshake()[..4].to_vec();
        for input in [b"".to_vec(), b"garbage, and more of it".to_vec(), flags_only] {
            let file = room.write("input", &input);
            let mut launch = room.server(["-s", "memory", "1M"]);
            let output = launch.stdin(File::open(file).expect("it was just written")).run_to(1);
            output.expect_error_line(&[]);
        }
        let (running, client, _) = at_a_socket(&room, &["memory", "1M"]);
        drop(client);
        running.finish().expect(1).expect_error_line(&[]);
    }

    /// E15: "stdout reader gone: 1, no SIGPIPE death"
    #[test]
    fn a_client_that_takes_no_replies_is_status_1() {
        if nbdkit_differs("E15: 0") {
            return;
        }
        let room = Room::new();
        let (replies, output) = pipe();
        let mut replies = File::from(replies);
        let mut launch = room.server(["-s", "memory", "1M"]);
        launch.stdin(Stdio::piped());
        give(&mut launch, 1, output.try_clone().expect("a descriptor"));
        let mut running = launch.start();
        drop(launch);
        let mut stdin = running.stdin();
        stdin.write_all(&handshake()).expect("the server reads");
        replies.read_exact(&mut [0; 18 + 20]).expect("a greeting and a reply");
        drop(replies);
        wait_until_unread(&output);
        // Either this request finds the reader gone, or the rest of the handshake's replies has.
        let _ = stdin.write_all(&read_request(1));
        running.finish().expect(1).expect_error_line(&[]);
    }

    /// G2: "expecting stdin/stdout to be opened"
    #[test]
    fn a_closed_stdin_or_stdout_is_an_error() {
        let room = Room::new();
        for closed in ["<&-", ">&-"] {
            let output = under(&room, &format!("exec \"$@\" {closed}"), &["-s", "memory", "1M"]).run_to(1);
            output.expect_error_line(&["expecting stdin/stdout to be opened"]);
        }
    }

    /// E12: with a pid file; stdout is the client's alone.
    #[test]
    fn a_pid_file_is_there_while_it_serves_and_nothing_else_is_on_stdout() {
        let room = Room::new();
        let (running, mut client, _) = at_a_socket(&room, &[&["-P", "pid", "memory", "1M"], print_uri()].concat());
        client.start();
        client.go(b"");
        let pid = fs::read_to_string(room.path("pid")).expect("there is a client, so there is a server");
        assert_eq!(pid, format!("{}\n", running.pid()));
        client.disconnect();
        running.finish().expect(0);
        if !nbdkit_differs("E11: left") {
            assert!(!room.path("pid").exists());
        }
    }
}

/// "Socket activation (sometimes called systemd socket activation)"
mod activation {
    use super::*;

    /// A server that is given these listening sockets, as systemd gives them.
    fn with_sockets(room: &Room, sockets: Vec<OwnedFd>, arguments: &[&str]) -> Launch {
        let how = format!("LISTEN_PID=$$ LISTEN_FDS={} exec \"$@\"", sockets.len());
        let mut launch = under(room, &how, arguments);
        for (number, socket) in (3..).zip(sockets) {
            // First out of the way of what is given.
            let high = fcntl(&socket, FcntlArg::F_DUPFD_CLOEXEC(100)).expect("a descriptor");
            // SAFETY: it is new, and nobody else's.
            let high = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(high) };
            give(&mut launch, number, high);
        }
        launch
    }

    fn at(room: &Room, name: &str) -> OwnedFd {
        UnixListener::bind(room.path(name)).expect("a socket in the room").into()
    }

    /// E16: several sockets, of both kinds; "path kept"
    #[test]
    fn serves_at_every_socket_and_leaves_them_where_they_are() {
        let room = Room::new();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port on loopback");
        let port = tcp.local_addr().expect("it is bound").port();
        let sockets = vec![at(&room, "one"), tcp.into(), at(&room, "two")];
        let mut launch = with_sockets(&room, sockets, &["-P", "pid", "memory", "1M"]);
        launch.args(print_uri());
        let running = launch.start();
        drop(launch);
        for uri in ["nbd+unix://?socket=one", "nbd+unix://?socket=two", &format!("nbd://127.0.0.1:{port}")] {
            assert_eq!(room.tool("nbdinfo", ["--size", uri]).run_to(0).text(), "1048576\n");
        }
        // "-f is implied": the process is the one that was given the sockets.
        let pid = fs::read_to_string(room.path("pid")).expect("there is a client, so there is a server");
        assert_eq!(pid, format!("{}\n", running.pid()));
        running.signal(Signal::SIGTERM);
        let output = running.finish().expect(0);
        assert_eq!(output.text(), "", "there is no URI to print");
        assert!(room.path("one").exists() && room.path("two").exists());
        if !nbdkit_differs("E11: left") {
            assert!(!room.path("pid").exists());
        }
        room.assert_nothing_left();
    }

    /// "-D nbdkit.environ=1: Print nbdkit's environment variables in the debug output at start up", as they were given.
    #[test]
    fn the_variables_of_the_announcement_are_shown_where_asked_for() {
        if nbdkit_differs("1.32 does not have it") {
            return;
        }
        let room = Room::new();
        let arguments = ["-v", "-D", "nbdkit.environ=1", "--filter=exitlast", "memory", "1M"];
        let mut launch = with_sockets(&room, vec![at(&room, "s")], &arguments);
        let running = launch.env("LISTEN_FDNAMES", "hello").start();
        drop(launch);
        room.tool("nbdinfo", ["--size", "nbd+unix://?socket=s"]).run_to(0);
        let pid = running.pid();
        let output = running.finish().expect(0);
        for line in [format!("LISTEN_PID={pid}"), "LISTEN_FDS=1".to_owned(), "LISTEN_FDNAMES=hello".to_owned()] {
            assert!(output.stderr.contains(&format!("debug: {line}\n")), "{line}: {output:#?}");
        }
    }

    /// E16: "SIGKILL: path kept", "no guardian (nothing of ours on disk)"
    #[test]
    fn is_one_process_whose_kill_leaves_the_path() {
        let room = Room::new();
        let mut launch = with_sockets(&room, vec![at(&room, "s")], &["memory", "1M"]);
        let witness = Witness::new(&mut launch);
        let mut running = launch.start();
        drop(launch);
        running.wait_until_listening(&room.path("s"));
        room.tool("nbdinfo", ["--size", "nbd+unix://?socket=s"]).run_to(0);
        assert_eq!(room.server_processes().len(), 1, "{:#?}", room.server_processes());
        running.signal(Signal::SIGKILL);
        running.finish().expect_signal(Signal::SIGKILL);
        witness.wait_until_all_are_gone();
        assert!(room.path("s").exists());
        room.assert_nothing_left();
    }

    /// E16: "LISTEN_* unset for children; fds CLOEXEC"
    #[test]
    fn what_the_server_starts_gets_neither_the_sockets_nor_their_announcement() {
        if nbdkit_differs("its exitwhen script gets both at least in 1.32") {
            return;
        }
        let room = Room::new();
        let script = "exit-when-script=env > env.tmp; ls -l /proc/self/fd > fds; mv env.tmp env; exit 0";
        let filter = ["--filter=exitwhen", "memory", "1M", script, "exit-when-poll=1"];
        let mut launch = with_sockets(&room, vec![at(&room, "s")], &filter);
        let running = launch.env("LISTEN_FDNAMES", "one").start();
        let environment = wait_for("the script to run", || fs::read_to_string(room.path("env")).ok());
        assert!(!environment.contains("LISTEN_"), "{environment}");
        let descriptors = fs::read_to_string(room.path("fds")).expect("it was written first");
        assert!(!descriptors.contains("socket:"), "{descriptors}");
        running.signal(Signal::SIGTERM);
        running.finish().expect(0);
    }

    /// E17: "status 1", "cannot use socket activation with --run flag"
    #[test]
    fn options_that_say_where_to_listen_are_refused() {
        let room = Room::new();
        for (arguments, flag) in [
            (&["--run", "touch ran"][..], "--run"),
            (&["-p", "10809"], "-p"),
            (&["-i", "::1"], "-i"),
            (&["-U", "s"], "-U"),
            (&["-U", "-"], "-U"),
            (&["-s"], "-s"),
        ] {
            let _ = fs::remove_file(room.path("given"));
            let all = [arguments, &["memory", "1M"]].concat();
            let output = with_sockets(&room, vec![at(&room, "given")], &all).run_to(1);
            output.expect_error_line(&[&format!("cannot use socket activation with {flag} flag")]);
            assert!(!room.path("ran").exists() && !room.path("s").exists());
            room.assert_nothing_left();
        }
    }

    /// E16: "LISTEN_PID was not for us (ignored)"
    #[test]
    fn an_announcement_for_another_process_is_ignored() {
        let room = Room::new();
        let mut launch = room.captive(["memory", "1M"], "nbdinfo --size \"$uri\"; echo $LISTEN_PID");
        let output = launch.env("LISTEN_PID", "1").env("LISTEN_FDS", "1").run_to(0);
        assert_eq!(output.text(), "1048576\n1\n");
        assert!(output.stderr.contains("LISTEN_PID was not for us"), "{output:#?}");
    }

    /// E16
    #[test]
    fn an_announcement_that_is_not_true_is_an_error() {
        let room = Room::new();
        for (how, words) in [
            ("LISTEN_PID=$$ LISTEN_FDS=0 exec \"$@\"", "LISTEN_FDS=0 out of range"),
            ("LISTEN_PID=$$ LISTEN_FDS=17 exec \"$@\"", "LISTEN_FDS=17 out of range"),
            ("LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3>&-", "invalid file descriptor fd = 3"),
        ] {
            under(&room, how, &["memory", "1M"]).run_to(1).expect_error_line(&[words]);
        }
        if !nbdkit_differs("it does not look") {
            let how = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3</dev/null";
            under(&room, how, &["memory", "1M"]).run_to(1).expect_error_line(&["fd = 3"]);
        }
    }

    /// E16: as libnbd's tools start servers.
    #[test]
    fn nbdinfo_and_nbdcopy_start_it_by_themselves() {
        let room = Room::new();
        let server = server_path();
        let server = server.to_str().expect("a path of text");
        let output = room.tool("nbdinfo", ["--size", "[", server, "memory", "1M", "]"]).run_to(0);
        assert_eq!(output.text(), "1048576\n");
        room.write("disk", vec![7; 1 << 20]);
        let to = ["nbdcopy", "--", "disk", "[", server, "--filter=exitlast", "file", "copy", "]"];
        room.write("copy", vec![0; 1 << 20]);
        room.tool(to[0], &to[1..]).run_to(0);
        assert_eq!(fs::read(room.path("copy")).expect("it is there"), vec![7; 1 << 20]);
        room.wait_until_nothing_left();
    }
}

mod daemon {
    use super::*;

    /// What `/proc/PID/stat` says from the state on.
    fn stat(pid: &str) -> Vec<String> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process is there");
        let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
        fields.split_whitespace().map(str::to_owned).collect()
    }

    fn end(room: &Room, pid: &str) {
        let pid = Pid::from_raw(pid.trim().parse().expect("a number"));
        kill(pid, Signal::SIGTERM).expect("the server is there");
        room.wait_until_nothing_left();
    }

    /// E1: "launcher returns 0 only when listening, plugin ready, pidfile complete"
    #[test]
    fn pid_file_and_socket_are_ready_when_the_launcher_returns() {
        if nbdkit_differs("E1: missing or empty in a quarter of the starts") {
            return;
        }
        let room = Room::new();
        for round in 0..50 {
            room.server(["-P", "pid", "-U", "s", "memory", "1M"]).run_to(0);
            let pid = fs::read_to_string(room.path("pid")).expect("the pid file is there");
            assert!(pid.ends_with('\n'), "round {round}: {pid:?}");
            let mut client = Client::connect(&room.path("s"));
            client.start();
            client.go(b"");
            client.expect_alive();
            end(&room, &pid);
            assert!(!room.path("pid").exists() && !room.path("s").exists(), "round {round}");
        }
    }

    /// E2: "non-zero, message on the launcher's stderr, clean"
    #[test]
    fn a_failure_is_the_launcher_s_status_and_on_its_stderr() {
        if nbdkit_differs("E2: launcher says 0, server dead") {
            return;
        }
        let room = Room::new();
        fs::create_dir(room.path("directory")).expect("a directory in the room");
        room.write("taken", "");
        for (arguments, words) in [
            (&["-P", "/dev/full", "-U", "s", "memory", "1M"][..], "/dev/full"),
            (&["-P", "no/such/place", "-U", "s", "memory", "1M"], "no/such/place"),
            (&["-P", "directory", "-U", "s", "memory", "1M"], "directory"),
            (&["-P", "pid", "-U", "taken", "memory", "1M"], "taken"),
            (&["-P", "pid", "-U", "s", "file", "no-such-file"], "no-such-file"),
            (&["-P", "pid", "-U", "s", "memory"], "size"),
        ] {
            room.server(arguments).run_to(1).expect_error_line(&[words]);
            assert!(!room.path("s").exists() && !room.path("pid").exists(), "{arguments:?}");
            room.assert_nothing_left();
        }
        assert!(fs::metadata(room.path("taken")).expect("it is there").is_file(), "what is not ours is left");
    }

    /// E3: "own session, fds 0-2 to /dev/null, cwd /"
    #[test]
    fn it_holds_nothing_of_the_caller_s() {
        let room = Room::new();
        room.write("disk", vec![0; 4096]);
        // A relative name still means what it meant to the caller. The output ends although the server lives on.
        let output = room.server(["-P", "pid", "-U", "s", "file", "disk"]).run_to(0);
        assert_eq!((output.text(), output.stderr.as_str()), ("", ""));
        let pid = wait_for("the pid file", || fs::read_to_string(room.path("pid")).ok().filter(|pid| !pid.is_empty()));
        let pid = pid.trim();
        let size = room.tool("nbdinfo", ["--size", "nbd+unix://?socket=s"]).run_to(0);
        assert_eq!(size.text(), "4096\n");
        for descriptor in 0..3 {
            let target = fs::read_link(format!("/proc/{pid}/fd/{descriptor}")).expect("it is open");
            assert_eq!(target, Path::new("/dev/null"), "descriptor {descriptor}");
        }
        assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).expect("it has one"), Path::new("/"));
        if !nbdkit_differs("E3: the launcher's session") {
            let stat = stat(pid);
            // Group and session, the third and fourth from the state on, which is the first.
            assert_eq!([&stat[2], &stat[3]], [pid, pid]);
            // Its helper as well.
            for process in room.server_processes() {
                let fd = format!("/proc/{}/fd/0", process.pid);
                assert_eq!(fs::read_link(fd).expect("it is open"), Path::new("/dev/null"));
            }
        }
        if !nbdkit_differs("E6") {
            end(&room, pid);
        }
    }

    /// E3: "its launcher's group and terminal are not its own"
    #[test]
    fn the_end_of_the_launcher_s_group_is_not_its_end() {
        if nbdkit_differs("E3: dies with its launcher's group") {
            return;
        }
        let room = Room::new();
        let how = "\"$@\" && echo up > up; exec sleep 1000";
        let mut launch = under(&room, how, &["-P", "pid", "-U", "s", "memory", "1M"]);
        launch.in_child(|| Ok(nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0))?));
        let script = launch.start();
        wait_for("the launcher to return", || room.path("up").exists().then_some(()));
        nix::sys::signal::killpg(Pid::from_raw(script.pid()), Signal::SIGKILL).expect("the group is there");
        script.finish().expect_signal(Signal::SIGKILL);
        room.tool("nbdinfo", ["--size", "nbd+unix://?socket=s"]).run_to(0);
        end(&room, &fs::read_to_string(room.path("pid")).expect("the server is there"));
    }

    /// E1, B18: the launcher is killed at any moment: either there is a whole server or nothing.
    #[test]
    fn a_launcher_that_is_killed_leaves_a_server_or_nothing() {
        if nbdkit_differs("E1: the pid file may be missing") {
            return;
        }
        let rounds = (0..30_u32).flat_map(|round| [(round, Signal::SIGKILL), (round, Signal::SIGTERM)]);
        for (round, signal) in rounds {
            let room = Room::new();
            let launcher = room.server(["-P", "pid", "-U", "s", "memory", "1M"]).start();
            std::thread::sleep(Duration::from_micros(u64::from(round) * 150));
            launcher.signal(signal);
            let output = launcher.finish();
            assert!(output.status.code().is_none_or(|status| status == 0), "{output:#?}");
            // What goes on starting has not heard of it; what has started is whole.
            wait_for("a server or nothing", || {
                let settled = room.path("pid").exists() || room.server_processes().is_empty();
                settled.then_some(())
            });
            match fs::read_to_string(room.path("pid")) {
                Ok(pid) => {
                    // It may be on its way out: nobody has heard of it.
                    let _ = kill(Pid::from_raw(pid.trim().parse().expect("a number")), Signal::SIGTERM);
                    room.wait_until_nothing_left();
                }
                Err(_) => room.wait_until_nothing_left(),
            }
            assert!(!room.path("pid").exists() && !room.path("s").exists(), "round {round}");
        }
    }

    /// "send error messages to stderr, unless nbdkit forks into the background in which case they are sent to syslog"; G7:
    /// "log file/syslog gone at run time: ignored"
    #[test]
    fn errors_of_a_server_in_the_background_go_to_the_system_log() {
        let room = Room::new();
        let log = std::os::unix::net::UnixDatagram::bind(room.path("log")).expect("a socket in the room");
        log.set_read_timeout(Some(super::super::harness::DEADLINE)).expect("a deadline is not zero");
        // A /dev of its own, whose log is ours. Needs the right to mount.
        let how = "mount -t tmpfs none /mnt && touch /mnt/null && mount --bind /dev/null /mnt/null && \
                   ln -s \"$PWD/log\" /mnt/log && mount --move /mnt /dev && exec \"$@\"";
        let mut launch = room.tool("unshare", ["--mount", "sh", "-c", how, "sh"]);
        launch.args([server_path()]).args(["-P", "pid", "-U", "s", "memory", "1M"]).run_to(0);
        let mut client = Client::connect(&room.path("s"));
        client.greeting();
        client.send(b"garbage");
        client.expect_end();
        let mut buffer = [0; 4096];
        let length = log.recv(&mut buffer).expect("a line in the log");
        let line = String::from_utf8_lossy(&buffer[..length]).into_owned();
        assert!(line.starts_with("<27>") && line.contains("memory[1]: "), "{line}");
        // The log is gone, and nobody minds.
        drop(log);
        fs::remove_file(room.path("log")).expect("it is there");
        let mut client = Client::connect(&room.path("s"));
        client.greeting();
        client.send(b"garbage");
        client.expect_end();
        let mut client = Client::connect(&room.path("s"));
        client.start();
        client.go(b"");
        client.expect_alive();
        if !nbdkit_differs("F1: does not end") {
            end(&room, &fs::read_to_string(room.path("pid")).expect("the server is there"));
        }
    }
}

mod paths {
    use super::*;

    /// E6: "unlinked at the start of shutdown"; "restart in a loop"
    #[test]
    fn the_same_path_can_be_used_again_and_again() {
        if nbdkit_differs("E6: next start address already in use") {
            return;
        }
        let room = Room::new();
        for _ in 0..10 {
            let server = room.serve(["memory", "1M"]);
            let socket = server.socket.clone();
            server.terminate().expect(0);
            assert!(!socket.exists());
        }
    }

    /// E7: "somebody answers: status 1, untouched; not a socket: status 1, untouched"
    #[test]
    fn what_is_not_a_dead_socket_is_left_alone() {
        let room = Room::new();
        let server = room.serve(["memory", "1M"]);
        room.write("file", "precious");
        fs::create_dir(room.path("directory")).expect("a directory in the room");
        room.fifo("fifo");
        for path in ["socket", "file", "directory", "fifo"] {
            let before = fs::metadata(room.path(path)).expect("it is there");
            let output = room.server(["-f", "-U", path, "memory", "1M"]).run_to(1);
            output.expect_error_line(&["Address already in use"]);
            let after = fs::metadata(room.path(path)).expect("it is still there");
            let about = |metadata: &fs::Metadata| {
                use std::os::unix::fs::MetadataExt;
                (metadata.dev(), metadata.ino(), metadata.file_type().is_socket())
            };
            assert_eq!(about(&before), about(&after), "{path}");
        }
        assert_eq!(fs::read(room.path("file")).expect("it is there"), b"precious");
        server.simple().expect_alive();
        if !nbdkit_differs("it needs the last client to go") {
            server.terminate().expect(0);
        }
    }

    /// E7: "somebody answers", only not now: whoever listens there is busy, or stopped, and its queue is full.
    #[test]
    fn a_socket_whose_queue_is_full_is_left_alone_at_once() {
        use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
        let room = Room::new();
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let new = || socket(AddressFamily::Unix, SockType::Stream, flags, None).expect("a socket");
        let (busy, address) = (new(), UnixAddr::new(&room.path("socket")).expect("a short path"));
        bind(busy.as_raw_fd(), &address).expect("nothing is there");
        listen(&busy, Backlog::new(0).expect("it is small")).expect("it is bound");
        let mut waiting = Vec::new();
        wait_for("the queue to be full", || {
            waiting.push(new());
            connect(waiting.last()?.as_raw_fd(), &address).is_err().then_some(())
        });
        let output = room.server(["-f", "-U", "socket", "memory", "1M"]).run_to(1);
        output.expect_error_line(&["Address already in use"]);
        assert!(room.path("socket").exists());
    }

    /// E7: "nobody answers and it is a socket of our uid: take over"
    #[test]
    fn a_dead_socket_is_taken_over() {
        if nbdkit_differs("E7: status 1") {
            return;
        }
        let room = Room::new();
        dead_socket(&room.path("socket"));
        let server = room.serve(["memory", "1M"]);
        server.simple().expect_alive();
        server.terminate().expect(0);
        assert!(!room.path("socket").exists());
    }

    /// B18, where the start waits for somebody to read the number.
    #[test]
    fn a_pid_file_that_is_a_pipe_waits_for_its_reader_and_hears_signals() {
        let room = Room::new();
        nix::unistd::mkfifo(&room.path("pid"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe in the room");
        let start = || {
            let mut running = room.server(["-f", "-U", "socket", "-P", "pid", "memory", "1M"]).start();
            running.wait_until_listening(&room.path("socket"));
            running
        };
        let running = start();
        running.signal(Signal::SIGTERM);
        running.finish().expect_signal(Signal::SIGTERM);
        if !nbdkit_differs("the socket's path is left") {
            wait_for("the socket to be removed", || (!room.path("socket").exists()).then_some(()));
        }
        room.wait_until_nothing_left();
        let _ = fs::remove_file(room.path("socket"));
        let running = start();
        let number = fs::read_to_string(room.path("pid")).expect("it is written");
        assert_eq!(number, format!("{}\n", running.pid()));
        running.signal(Signal::SIGTERM);
        running.finish().expect(0);
        room.assert_nothing_left();
    }

    /// E7: "two starters at once"
    #[test]
    fn of_two_that_start_at_once_one_serves_and_one_fails() {
        if nbdkit_differs("E7: both fail") {
            return;
        }
        for round in 0..20 {
            let room = Room::new();
            dead_socket(&room.path("s"));
            let arguments = ["-f", "-U", "s", "memory", "1M"];
            let mut both = [room.server(arguments).start(), room.server(arguments).start()];
            let loser = wait_for("one to fail", || both.iter_mut().position(Running::has_ended));
            let [first, second] = both;
            let (lost, mut won) = if loser == 0 { (first, second) } else { (second, first) };
            lost.finish().expect(1).expect_error_line(&["Address already in use"]);
            won.wait_until_listening(&room.path("s"));
            let mut client = Client::connect(&room.path("s"));
            client.start();
            client.go(b"");
            client.expect_alive();
            won.signal(Signal::SIGTERM);
            won.finish().expect(0);
            assert!(!room.path("s").exists(), "round {round}");
            room.assert_nothing_left();
        }
    }

    /// E6: "only if (dev,ino) is ours"
    #[test]
    fn a_path_that_is_another_s_by_now_is_left() {
        if nbdkit_differs("E6: never unlinked") {
            return;
        }
        let room = Room::new();
        let server = room.serve(["memory", "1M"]);
        fs::remove_file(&server.socket).expect("it is there");
        let other = UnixListener::bind(&server.socket).expect("the name is free");
        let socket = server.socket.clone();
        server.terminate().expect(0);
        assert!(socket.exists(), "another server's socket");
        drop(other);
    }
}

mod parents {
    use super::*;

    /// For bash, which reaps what it adopts: until no child is left.
    const UNTIL_ALONE: &str = "while read -r child < /proc/$$/task/$$/children; [ -n \"$child\" ]; do :; done";

    /// For who ends when it is alone.
    fn the_server_was_silent_and_is_gone(room: &Room, mut launch: Launch, round: u32) {
        let output = launch.run_to(0);
        assert_eq!((output.text(), output.stderr.as_str()), ("", ""), "round {round}: silent");
        assert!(!room.path("s").exists(), "round {round}");
    }

    /// Which helper this test program is to be, and what it starts.
    const HELPER: &str = "NBDCAPTIVE_TEST_PARENT";

    /// This test program as a parent of a server; see [`be_a_parent`].
    fn parent(room: &Room, kind: &str, arguments: &[&str]) -> Launch {
        let program = std::env::current_exe().expect("this program has a path");
        let mut launch = room.launch(&program);
        launch.args(["modes::parents::be_a_parent", "--exact", "--test-threads=1", "--nocapture"]);
        let server = server_path().to_str().expect("a path of text").to_owned();
        launch.env(HELPER, kind).env("NBDCAPTIVE_TEST_COMMAND", server + "\n" + &arguments.join("\n"));
        launch
    }

    /// Not a test: what [`parent`] runs, in a process of its own.
    #[test]
    fn be_a_parent() {
        let Some(kind) = std::env::var_os(HELPER) else { return };
        let words = std::env::var("NBDCAPTIVE_TEST_COMMAND").expect("it comes with the kind");
        let words: Vec<_> = words.split('\n').collect();
        let mut command = std::process::Command::new(words[0]);
        command.args(&words[1..]).stdout(Stdio::null());
        // Nobody waits for it: this process is killed.
        #[allow(clippy::zombie_processes)]
        let _server = command.spawn().expect("the server starts");
        wait_for("the server to listen", || UnixStream::connect("s").ok());
        assert_ne!(nix::unistd::gettid(), Pid::this(), "tests have threads of their own");
        if kind == "exec" {
            let error = std::os::unix::process::CommandExt::exec(std::process::Command::new("/bin/sleep").arg("1000"));
            panic!("sleep: {error}");
        }
        let action = SigAction::new(SigHandler::Handler(leave), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler makes one system call, and the process has no other use for the signal.
        unsafe { sigaction(Signal::SIGUSR1, &action) }.expect("a handler");
        // SAFETY: sends a signal to the thread that has the process's number, the main one.
        unsafe {
            nix::libc::syscall(nix::libc::SYS_tgkill, std::process::id(), std::process::id(), Signal::SIGUSR1 as i32)
        };
        wait_for("the main thread to end", || {
            fs::read_to_string("/proc/self/stat").ok()?.contains(") Z ").then_some(())
        });
        fs::write("leaderless", "").expect("a file in the room");
        std::thread::sleep(super::super::harness::DEADLINE * 4);
    }

    /// Ends the thread that it is called on, and no other.
    extern "C" fn leave(_: i32) {
        // SAFETY: the thread's stack is used by nobody else.
        unsafe { nix::libc::syscall(nix::libc::SYS_exit, 0) };
    }

    fn stays_and_then_goes(room: &Room, parent: Running, witness: &Witness) {
        for _ in 0..50 {
            let mut client = Client::connect(&room.path("s"));
            client.start();
            client.go(b"");
            client.expect_alive();
        }
        parent.signal(Signal::SIGKILL);
        parent.finish().expect_signal(Signal::SIGKILL);
        witness.wait_until_all_are_gone();
        room.wait_until_nothing_left();
        assert!(!room.path("s").exists());
    }

    /// C4: "parent's main thread pthread_exits, others live: ignored"
    #[test]
    fn the_server_stays_when_its_parent_s_main_thread_ends() {
        if nbdkit_differs("C4: server killed") {
            return;
        }
        let room = Room::new();
        let mut launch = parent(&room, "leaderless", &["--exit-with-parent", "-U", "s", "memory", "1M"]);
        let witness = Witness::new(&mut launch);
        let parent = launch.start();
        wait_for("the parent to have no main thread", || room.path("leaderless").exists().then_some(()));
        stays_and_then_goes(&room, parent, &witness);
    }

    /// C6: "parent's other thread execs: fine"
    #[test]
    fn the_server_stays_when_a_thread_of_its_parent_executes_a_program() {
        if nbdkit_differs("C6: server killed") {
            return;
        }
        let room = Room::new();
        let mut launch = parent(&room, "exec", &["--exit-with-parent", "-U", "s", "memory", "1M"]);
        let witness = Witness::new(&mut launch);
        let parent = launch.start();
        wait_for("the parent to be sleep", || {
            let executable = fs::read_link(format!("/proc/{}/exe", parent.pid())).ok()?;
            executable.ends_with("sleep").then_some(())
        });
        stays_and_then_goes(&room, parent, &witness);
    }

    /// C8, C7: "reparented to a subreaper"; "exit right after fork, 20 times"; "Silent, status 0"
    #[test]
    fn the_server_ends_when_its_parent_died_and_a_subreaper_has_taken_it() {
        if nbdkit_differs("C8: watches the subreaper") {
            return;
        }
        for round in 0..20 {
            let room = Room::new();
            // The outer shell is the subreaper, in another session than the inner one, as a user's systemd is.
            let how = format!("setsid sh -c '\"$@\" & exec true' sh \"$@\"; {UNTIL_ALONE}");
            let mut launch = room.tool("bash", ["-c", &how, "sh"]);
            launch.args([server_path()]).args(["--exit-with-parent", "-U", "s", "memory", "1M"]);
            launch.in_child(|| {
                rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
                Ok(())
            });
            the_server_was_silent_and_is_gone(&room, launch, round);
        }
    }

    /// C8, C7: pid 1 of a small container or machine adopts, and may share its session with everything there
    #[test]
    fn the_server_ends_when_its_parent_died_and_pid_1_of_its_session_has_taken_it() {
        if nbdkit_differs("C8: watches pid 1") {
            return;
        }
        for round in 0..20 {
            let room = Room::new();
            // With `set -m` of bash the inner shell leads a group of its own, as what a supervisor starts does.
            let how = format!("set -m; sh -c '\"$@\" & exec true' sh \"$@\"; {UNTIL_ALONE}");
            let mut launch = room.tool("unshare", ["--pid", "--fork", "--mount-proc", "bash", "-c", &how, "sh"]);
            launch.args([server_path()]).args(["--exit-with-parent", "-U", "s", "memory", "1M"]);
            the_server_was_silent_and_is_gone(&room, launch, round);
        }
    }

    /// C7: "`--exit-with-parent=PID` given and differs"; "Silent, status 0"
    #[test]
    fn a_parent_that_is_named_and_is_not_ours_is_gone() {
        if nbdkit_differs("the option takes no value") {
            return;
        }
        let room = Room::new();
        for arguments in [&["-U", "s"][..], &["--run", "touch ran"], &["-P", "pid", "-U", "-"]] {
            // The first process of a pid namespace may be this one.
            let mut launch = room.server([format!("--exit-with-parent={}", 3 - std::process::id().min(2))]);
            let output = launch.args(arguments).args(["memory", "1M"]).run_to(0);
            assert_eq!((output.text(), output.stderr.as_str()), ("", ""));
            assert!(!room.path("ran").exists() && !room.path("s").exists() && !room.path("pid").exists());
            room.assert_nothing_left();
        }
        let own = format!("--exit-with-parent={}", std::process::id());
        room.captive([&own[..], "memory", "1M"], "nbdinfo --size \"$uri\"").run_to(0);
    }

    /// C9: "parent is pid 1 of a container and did start us: runs"
    #[test]
    fn a_parent_that_is_pid_1_of_a_container_is_a_parent() {
        let room = Room::new();
        // The shell is pid 1 there. It outlives the client, and the server ends with it.
        let how = "\"$@\" & while ! nbdinfo --size nbd+unix://?socket=s 2>/dev/null; do :; done; \
                   nbdinfo --size nbd+unix://?socket=s";
        let mut launch = room.tool("unshare", ["--pid", "--fork", "--mount-proc", "sh", "-c", how, "sh"]);
        launch.args([server_path()]).args(["--exit-with-parent", "-f", "-U", "s", "memory", "1M"]);
        let output = launch.run_to(0);
        assert_eq!(output.text(), "1048576\n1048576\n");
        room.wait_until_nothing_left();
    }

    /// C10: "parent outside our pid namespace: PDEATHSIG fallback, debug line"
    #[test]
    fn a_parent_outside_the_pid_namespace_is_watched_by_a_signal() {
        let room = Room::new();
        for arguments in [&["-U", "s"][..], &["-U", "s", "--run", "sleep 1000"]] {
            let mut launch = room.tool("unshare", ["--pid", "--fork", "--mount-proc"]);
            launch.args([server_path()]).args(["--exit-with-parent", "-v"]).args(arguments).args(["memory", "1M"]);
            let witness = Witness::new(&mut launch);
            let mut parent = launch.start();
            parent.wait_until_listening(&room.path("s"));
            if !nbdkit_differs("it is what it always does; C13: with --run nothing dies") {
                wait_for("the line", || parent.stderr().contains("outside this pid namespace").then_some(()));
            }
            parent.signal(Signal::SIGKILL);
            parent.finish().expect_signal(Signal::SIGKILL);
            witness.wait_until_all_are_gone();
            room.wait_until_nothing_left();
            if is_nbdkit() {
                return;
            }
            assert!(!room.path("s").exists());
        }
    }

    /// C15: "one shutdown, status C's"
    #[test]
    fn parent_and_command_may_end_together() {
        if nbdkit_differs("C13: nothing dies with the parent") {
            return;
        }
        let room = Room::new();
        let mut ready = room.fifo("ready");
        let mut launch = under(&room, "\"$@\" & wait", &["--exit-with-parent", "memory", "1M"]);
        launch.args(["--run", "echo $$ > ready; exec sleep 1000"]);
        let witness = Witness::new(&mut launch);
        let parent = launch.start();
        let command = Pid::from_raw(ready.hear().parse().expect("a pid"));
        let both = [Pid::from_raw(parent.pid()), command];
        both.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).expect("it is there"));
        both.iter().for_each(|pid| kill(*pid, Signal::SIGKILL).expect("it is there"));
        parent.finish().expect_signal(Signal::SIGKILL);
        witness.wait_until_all_are_gone();
        room.wait_until_nothing_left();
    }

    /// C16: "parent only stopped: fine"
    #[test]
    fn a_parent_that_is_stopped_has_not_ended() {
        let room = Room::new();
        let mut launch = under(&room, "\"$@\" & wait", &["--exit-with-parent", "-U", "s", "memory", "1M"]);
        let witness = Witness::new(&mut launch);
        let mut parent = launch.start();
        parent.wait_until_listening(&room.path("s"));
        parent.stop();
        if nbdkit_differs("E6: the path is left") {
            return;
        }
        stays_and_then_goes(&room, parent, &witness);
    }

    /// C17: "implies -f"
    #[test]
    fn exit_with_parent_implies_the_foreground() {
        let room = Room::new();
        let mut running = room.server(["--exit-with-parent", "-P", "pid", "-U", "s", "memory", "1M"]).start();
        running.wait_until_listening(&room.path("s"));
        let pid = wait_for("the pid file", || fs::read_to_string(room.path("pid")).ok().filter(|pid| !pid.is_empty()));
        assert_eq!(pid, format!("{}\n", running.pid()));
        running.signal(Signal::SIGTERM);
        running.finish().expect(0);
    }
}

mod resources {
    use super::*;

    /// Processor time of a process so far, in ticks of 10 ms.
    fn ticks(pid: i32) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process is there");
        let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
        let fields: Vec<u64> = fields.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
        fields[11] + fields[12]
    }

    /// G1: "one line per second at most, accept paused until a connection closes, shutdown still works"
    #[test]
    fn without_descriptors_it_waits_in_peace_and_goes_on_when_clients_leave() {
        if nbdkit_differs("G1: half a core and megabytes of messages") {
            return;
        }
        let room = Room::new();
        let how = "ulimit -n 24; exec \"$@\"";
        let mut running = under(&room, how, &["-f", "-U", "s", "memory", "1M"]).start();
        running.wait_until_listening(&room.path("s"));
        let start = Instant::now();
        let mut clients: Vec<_> = (0..30).map(|_| Client::connect(&room.path("s"))).collect();
        let lines = |running: &Running| running.stderr().lines().filter(|line| line.contains("accept")).count();
        wait_for("the first line", || (lines(&running) >= 1).then_some(()));
        let before = ticks(running.pid());
        wait_for("the third line", || (lines(&running) >= 3).then_some(()));
        let spent = ticks(running.pid()) - before;
        let seconds = start.elapsed().as_secs() as usize + 1;
        let stderr = running.stderr();
        assert!(stderr.lines().count() <= seconds + 1, "{seconds} seconds: {stderr}");
        assert!(spent < 50, "{spent} ticks in two seconds of waiting");
        // The last one is not served yet; the first ones leave, and it is.
        let mut last = clients.pop().expect("there are 30");
        clients.drain(..).for_each(drop);
        last.start();
        last.go(b"");
        last.expect_alive();
        let mut many: Vec<_> = (0..30).map(|_| Client::connect(&room.path("s"))).collect();
        let seen = lines(&running);
        wait_for("another line", || (lines(&running) > seen).then_some(()));
        running.signal(Signal::SIGTERM);
        running.finish().expect(0);
        many.iter_mut().for_each(|client| {
            // Those that were greeted and those that were not.
            let _ = client.socket.read_to_end(&mut Vec::new());
        });
        assert!(!room.path("s").exists());
        room.assert_nothing_left();
    }

    /// Source: nbdkit server/protocol.c: a write without memory for its data is read over and gets ENOMEM.
    #[test]
    fn without_memory_for_a_write_it_says_so_and_goes_on() {
        if nbdkit_differs("its allocator takes memory in another way") {
            return;
        }
        const STEP: u64 = 4 << 20;
        let room = Room::new();
        let how = "ulimit -v 1000000; exec \"$@\"";
        let mut running = under(&room, how, &["-f", "-U", "s", "memory", "4G"]).start();
        running.wait_until_listening(&room.path("s"));
        let mut client = Client::connect(&room.path("s"));
        client.start();
        client.go(b"");
        let data = vec![7; STEP as usize];
        let mut written = 0;
        let error = loop {
            match client.write(0, written, &data) {
                0 => written += STEP,
                error => break error,
            }
            assert!(written < 1 << 30, "more than there is");
        };
        assert_eq!(error, NBD_ENOMEM);
        assert!(written >= 256 << 20, "{written}");
        // Nothing is lost that was written, and what is given back can be had again, if elsewhere.
        assert!(client.read(written - STEP, STEP) == data);
        assert_eq!(client.ask(NBD_CMD_TRIM, 0, 0, 64 << 20).error, 0);
        for at in (0..32 << 20).step_by(STEP as usize) {
            assert_eq!(client.write(0, (2 << 30) + at, &data), 0);
        }
        client.disconnect();
        running.signal(Signal::SIGTERM);
        let stderr = running.finish().expect(0).stderr;
        assert!(stderr.contains("out of memory for 4194304 bytes of data"), "{stderr}");
        room.assert_nothing_left();
    }

    /// G2: "C gets exactly the closed fd; our own fds never land on 0-2"
    #[test]
    fn every_set_of_closed_descriptors_reaches_the_command_and_nobody_uses_them() {
        if nbdkit_differs("G2: status 1") {
            return;
        }
        for closed in 1..8 {
            let room = Room::new();
            let command = "all=; for fd in 0 1 2; do if test -e /proc/$$/fd/$fd; then all=$all+; else all=$all-; fi; done; echo $all > fds; \
                           for pid in $(cat pid) $PPID; do ls -l /proc/$pid/fd/0 /proc/$pid/fd/1 /proc/$pid/fd/2; \
                           done > server; nbdinfo --size \"$uri\" > size";
            let mut launch = room.captive(["-P", "pid", "memory", "1M"], command);
            launch.in_child(move || {
                for fd in 0..3 {
                    if closed & (1 << fd) != 0 {
                        nix::unistd::close(fd)?;
                    }
                }
                Ok(())
            });
            let output = launch.run_to(0);
            let want: String = (0..3).map(|fd| if closed & (1 << fd) != 0 { '-' } else { '+' }).collect();
            let seen = fs::read_to_string(room.path("fds")).expect("the command ran");
            assert_eq!(seen.trim(), want, "{output:#?}");
            assert_eq!(fs::read(room.path("size")).expect("the command ran"), b"1048576\n");
            let server = fs::read_to_string(room.path("server")).expect("the command ran");
            assert!(!server.contains("socket:") && !server.contains("anon_inode"), "{server}");
            room.assert_nothing_left();
        }
    }

    /// G2: the same without a command, and for errors: "stderr closed: silent 1"
    #[test]
    fn a_server_without_a_command_works_with_all_three_closed() {
        let room = Room::new();
        let how = "exec \"$@\" <&- >&- 2>&-";
        if !nbdkit_differs("G2: status 1") {
            let mut running = under(&room, how, &["-f", "-U", "s", "memory", "1M"]).start();
            running.wait_until_listening(&room.path("s"));
            let mut client = Client::connect(&room.path("s"));
            client.start();
            client.go(b"");
            client.expect_alive();
            running.signal(Signal::SIGTERM);
            running.finish().expect(0);
        }
        under(&room, how, &["no-such-plugin"]).run_to(1);
        room.assert_nothing_left();
    }

    /// G3: "/dev/full, `2>&1 | true`"; "our logging never blocks or kills"
    #[test]
    fn an_output_that_takes_nothing_changes_nothing() {
        let room = Room::new();
        for how in ["exec \"$@\" > /dev/full", "exec \"$@\" 2> /dev/full", "exec \"$@\" > /dev/full 2>&1"] {
            let command = "nbdinfo --size \"$uri\" > size; exit 7";
            let mut launch = under(&room, how, &["-v", "-U", "-", "memory", "1M", "--run", command]);
            launch.args(print_uri());
            launch.run_to(7);
            assert_eq!(fs::read(room.path("size")).expect("the command ran"), b"1048576\n");
            fs::remove_file(room.path("size")).expect("it is there");
            room.assert_nothing_left();
        }
        if nbdkit_differs("1.32 dies of SIGPIPE under -v") {
            return;
        }
        // A pipe that nobody reads any more.
        let (read, write) = pipe();
        drop(read);
        wait_until_unread(&write);
        let mut launch = room.captive(["-v", "memory", "1M"], "nbdinfo --size \"$uri\" > size; exit 7");
        give(&mut launch, 1, write.try_clone().expect("a descriptor"));
        give(&mut launch, 2, write);
        launch.run_to(7);
        assert_eq!(fs::read(room.path("size")).expect("the command ran"), b"1048576\n");
        room.assert_nothing_left();
    }

    /// G3: "stderr a full non-blocking pipe", and a full blocking one
    #[test]
    fn a_stderr_that_is_full_holds_nobody_up() {
        if nbdkit_differs("G3: waits in write") {
            return;
        }
        for blocking in [true, false] {
            let room = Room::new();
            let (read, write) = pipe();
            let flags = OFlag::from_bits_truncate(fcntl(&write, FcntlArg::F_GETFL).expect("it is open"));
            fcntl(&write, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).expect("it is open");
            while nix::unistd::write(&write, &[b'x'; 4096]).is_ok() {}
            while nix::unistd::write(&write, b"x").is_ok() {}
            if blocking {
                fcntl(&write, FcntlArg::F_SETFL(flags)).expect("it is open");
            }
            let mut launch = room.server(["-v", "-f", "-U", "s", "memory", "1M"]);
            give(&mut launch, 2, write);
            let mut running = launch.start();
            drop(launch);
            running.wait_until_listening(&room.path("s"));
            for _ in 0..20 {
                let mut garbage = Client::connect(&room.path("s"));
                garbage.greeting();
                garbage.send(b"garbage");
                garbage.expect_end();
                let mut client = Client::connect(&room.path("s"));
                client.start();
                client.go(b"");
                client.expect_alive();
            }
            running.signal(Signal::SIGTERM);
            running.finish().expect(0);
            let mut said = Vec::new();
            File::from(read).read_to_end(&mut said).expect("a pipe can be read");
            assert_eq!(count(&said, b"x"), said.len(), "nothing fitted, so nothing is there");
            room.assert_nothing_left();
        }
    }

    /// G4: "status 1, message, clean"
    #[test]
    fn a_pid_file_on_a_full_disk_is_an_error() {
        if nbdkit_differs("G4: not noticed: empty pidfile, no message") {
            return;
        }
        let room = Room::new();
        // Room for names, but for not a byte. Needs the right to mount.
        let how =
            "mkdir full && mount -t tmpfs -o size=4k none full && head -c 4096 /dev/zero > full/zeroes && exec \"$@\"";
        for arguments in [&["-f"][..], &[], &["--run", "touch ran"]] {
            let mut launch = room.tool("unshare", ["--mount", "sh", "-c", how, "sh"]);
            launch.args([server_path()]).args(["-P", "full/pid", "-U", "s", "memory", "1M"]).args(arguments);
            launch.run_to(1).expect_error_line(&["full/pid", "No space left on device"]);
            fs::remove_dir(room.path("full")).expect("the mount is gone with its namespace");
            assert!(!room.path("ran").exists() && !room.path("s").exists());
            room.assert_nothing_left();
        }
    }

    /// G5: "status 1, message, clean"; E10
    #[test]
    fn a_temporary_directory_that_takes_nothing_is_an_error() {
        let room = Room::new();
        for mount in ["-o nr_inodes=1", "-o ro"] {
            let how = format!("mount -t tmpfs {mount} none tmp && exec \"$@\"");
            for arguments in [&["-f", "-U", "-"][..], &["--run", "touch ran"]] {
                if nbdkit_differs("E10: TMPDIR is ignored") {
                    return;
                }
                let mut launch = room.tool("unshare", ["--mount", "sh", "-c", &how, "sh"]);
                launch.args([server_path()]).args(["memory", "1M"]).args(arguments);
                launch.run_to(1).expect_error_line(&["tmp"]);
                assert!(!room.path("ran").exists());
                room.assert_nothing_left();
            }
        }
    }

    /// A server whose system calls fail as `faults` say.
    fn with_faults(room: &Room, faults: &[&str], how: &str, arguments: &[&str]) -> Launch {
        let mut launch = room
            .tool("strace", ["-f", "-qqq", "-o", "/dev/null", "-e", "trace=clone,clone3,pidfd_open,pidfd_send_signal"]);
        faults.iter().for_each(|fault| {
            launch.args(["-e", fault]);
        });
        launch.args(["sh", "-c", how, "sh"]).args([server_path()]).args(arguments);
        launch
    }

    /// G6: "status 1, clean, C not run half way"
    #[test]
    fn a_process_or_thread_that_cannot_be_made_is_an_error() {
        if nbdkit_differs("G6: temp dir left") {
            return;
        }
        let command = ["-P", "pid", "memory", "1M", "--run", "echo > ran"];
        let plain = ["-f", "-P", "pid", "-U", "s", "memory", "1M"];
        let background = ["-P", "pid", "-U", "s", "memory", "1M"];
        let mut failed = 0;
        for calls in ["clone", "clone3"] {
            for number in 1..=3 {
                for arguments in [&command[..], &plain, &background] {
                    let room = Room::new();
                    let fault = format!("inject={calls}:error=EAGAIN:when={number}");
                    let mut running = with_faults(&room, &[&fault], "exec \"$@\"", arguments).start();
                    // A later fault may not be met, and then there is a server: it has its pid file last of all. One that listens
                    // may still fail.
                    let pid = wait_for("the end, or a server", || {
                        let pid = fs::read_to_string(room.path("pid")).ok().filter(|pid| pid.ends_with('\n'));
                        let is_over = running.has_ended() && room.server_processes().is_empty();
                        if pid.is_some() || is_over { Some(pid) } else { None }
                    });
                    if let Some(pid) = pid {
                        let pid = Pid::from_raw(pid.trim().parse().expect("a number"));
                        let _ = kill(pid, Signal::SIGTERM);
                        let _ = running.finish();
                        room.wait_until_nothing_left();
                        continue;
                    }
                    let output = running.finish();
                    if output.status.code() != Some(0) {
                        failed += 1;
                        assert!(!room.path("ran").exists(), "{fault}: {output:#?}");
                        let output = output.expect(1);
                        assert!(!output.stderr.is_empty(), "{fault}: {output:#?}");
                    }
                    assert!(!room.path("s").exists() && !room.path("pid").exists(), "{fault}");
                    room.assert_nothing_left();
                }
            }
        }
        assert!(failed >= 7, "only {failed} faults were met");
    }

    /// G6: "RLIMIT_NPROC as nobody"
    #[test]
    fn a_user_who_may_have_no_more_processes_gets_an_error() {
        if nbdkit_differs("G6: temp dir left") {
            return;
        }
        let room = Room::new();
        room.open_to_all();
        // A user of its own, so that nobody else's processes count.
        let mut launch = room.tool("setpriv", ["--reuid=61234", "--regid=61234", "--clear-groups"]);
        launch.args(["prlimit", "--nproc=1:1", &format!("./{}", program_name()), "memory", "1M", "--run", "touch ran"]);
        launch.run_to(1).expect_error_line(&["Resource temporarily unavailable"]);
        assert!(!room.path("ran").exists());
        room.assert_nothing_left();
    }

    /// G8: "poll fallback, debug line, same results slower"
    #[test]
    fn without_pidfds_a_server_still_ends_with_its_parent() {
        if nbdkit_differs("it uses none") {
            return;
        }
        for error in ["ENOSYS", "EPERM"] {
            let room = Room::new();
            let fault = format!("inject=pidfd_open:error={error}");
            let mut ready = room.fifo("ready");
            let arguments = ["-v", "--exit-with-parent", "-P", "pid", "-U", "s", "memory", "1M"];
            let mut launch = with_faults(&room, &[&fault], "\"$@\" & echo $$ > ready; wait", &arguments);
            let witness = Witness::new(&mut launch);
            let mut running = launch.start();
            let parent = Pid::from_raw(ready.hear().parse().expect("a pid"));
            running.wait_until_listening(&room.path("s"));
            wait_for("the line", || running.stderr().contains("pidfd_open").then_some(()));
            let mut client = Client::connect(&room.path("s"));
            client.start();
            client.go(b"");
            client.expect_alive();
            kill(parent, Signal::SIGKILL).expect("the parent is there");
            client.expect_end();
            running.finish();
            witness.wait_until_all_are_gone();
            assert!(!room.path("s").exists() && !room.path("pid").exists());
            room.wait_until_nothing_left();
        }
    }

    /// G8, C13, B9: the same with a command: its parent, or the front process, is killed.
    #[test]
    fn without_pidfds_a_captive_server_still_leaves_nothing() {
        if nbdkit_differs("it uses none") {
            return;
        }
        for whom in ["parent", "front"] {
            let room = Room::new();
            let mut ready = room.fifo("ready");
            let mut started = room.fifo("started");
            let command = "sleep 1000 & setsid sleep 1000 & nbdinfo --size \"$uri\" > size; echo > started; sleep 1000";
            let arguments = ["--exit-with-parent", "memory", "1M", "--run", command];
            let how = "\"$@\" & echo $$ $! > ready; wait";
            let faults = ["inject=pidfd_open:error=ENOSYS", "inject=pidfd_send_signal:error=ENOSYS"];
            let mut launch = with_faults(&room, &faults, how, &arguments);
            let witness = Witness::new(&mut launch);
            let running = launch.start();
            let pids = ready.hear();
            let (parent, front) = pids.split_once(' ').expect("two pids");
            started.hear();
            assert_eq!(fs::read(room.path("size")).expect("the command ran"), b"1048576\n");
            let pid = if whom == "parent" { parent } else { front };
            kill(Pid::from_raw(pid.parse().expect("a pid")), Signal::SIGKILL).expect("it is there");
            running.finish();
            witness.wait_until_all_are_gone();
            room.wait_until_nothing_left();
        }
    }
}

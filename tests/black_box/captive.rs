//! `--run`: the command's life, what it sees, and what is left when it has ended.
//! The letters and numbers in the comments are the rows of the lifetime catalogue in docs/; sentences in quotes are from
//! nbdkit-captive(1).

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;
use std::process::Stdio;

use nix::fcntl::OFlag;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::sys::stat::{Mode, umask};
use nix::unistd::pipe2;

use super::harness::{Output, Room, Witness, dead_socket, free_port, nbdkit_differs, program_name};
use super::raw_client::Client;

/// One word of `$variable`, as text.
fn word(output: &Output) -> &str {
    output.text().trim_end_matches('\n')
}

mod exit_status {
    use super::*;

    /// A1
    #[test]
    fn the_command_s_exit_status_is_ours() {
        for status in [0, 1, 2, 3, 77, 124, 128, 130, 137, 143, 255] {
            let room = Room::new();
            let mut launch = room.captive(["memory", "1M"], format!("exit {status}"));
            let witness = Witness::new(&mut launch);
            let output = launch.run_to(status);
            assert_eq!((output.text(), output.stderr.as_str()), ("", ""));
            assert!(witness.all_are_gone(), "whoever waits for the server never sees leftovers");
            room.assert_nothing_left();
        }
    }

    /// A3
    #[test]
    fn a_command_that_is_not_found_is_127() {
        let room = Room::new();
        let output = room.captive(["memory", "1M"], "no-such-command-anywhere").run_to(127);
        assert!(output.stderr.contains("not found"), "{}", output.stderr);
        room.assert_nothing_left();
    }

    /// A3
    #[test]
    fn a_command_that_cannot_be_executed_is_126() {
        let room = Room::new();
        room.write("not-executable", "#!/bin/sh\nexit 0\n");
        let output = room.captive(["memory", "1M"], "./not-executable").run_to(126);
        assert!(output.stderr.contains("denied"), "{}", output.stderr);
        room.assert_nothing_left();
    }

    #[test]
    fn a_command_that_is_no_shell_is_2() {
        let room = Room::new();
        room.captive(["memory", "1M"], "if").run_to(2);
        room.assert_nothing_left();
    }

    /// A2
    #[test]
    fn a_command_killed_by_a_signal_is_128_and_the_signal_and_one_line_says_so() {
        for (name, number) in [("KILL", 9), ("TERM", 15), ("SEGV", 11), ("ABRT", 6), ("USR1", 10)] {
            let room = Room::new();
            let output = room.captive(["memory", "1M"], format!("kill -{name} $$")).run_to(128 + number);
            output.expect_error_line(&["external command was killed by signal", &number.to_string()]);
            assert_eq!(output.text(), "");
            room.assert_nothing_left();
        }
    }

    #[test]
    fn an_empty_command_succeeds() {
        let room = Room::new();
        room.captive(["memory", "1M"], "").run_to(0);
        room.assert_nothing_left();
    }

    /// A10
    #[test]
    fn the_status_is_right_although_the_caller_ignores_sigchld() {
        if nbdkit_differs("A10: status 1, the real one is lost") {
            return;
        }
        let room = Room::new();
        room.captive(["memory", "1M"], "exit 3").in_child(|| ignore(Signal::SIGCHLD)).run_to(3);
        room.assert_nothing_left();
    }

    /// A4: "job survives", because the command ended by itself and may leave jobs on purpose.
    #[test]
    fn a_background_job_is_left_alone() {
        let room = Room::new();
        let mut alive = room.fifo("alive");
        let mut go = room.fifo("go");
        room.captive(["memory", "1M"], "{ read x < go; echo still-here > alive; } > /dev/null 2>&1 & exit 3").run_to(3);
        room.assert_tmpdir_empty();
        assert!(room.server_processes().is_empty(), "{:#?}", room.server_processes());
        go.tell();
        assert_eq!(alive.hear(), "still-here");
    }

    /// A5
    #[test]
    fn a_daemon_in_its_own_session_is_left_alone() {
        let room = Room::new();
        let mut alive = room.fifo("alive");
        let mut go = room.fifo("go");
        let command = "setsid sh -c 'read x < go; echo still-here > alive' > /dev/null 2>&1 & exit 3";
        room.captive(["memory", "1M"], command).run_to(3);
        room.assert_tmpdir_empty();
        go.tell();
        assert_eq!(alive.hear(), "still-here");
    }

    /// A7
    #[test]
    fn when_the_command_is_killed_the_rest_of_its_tree_is_ended() {
        if nbdkit_differs("A7: the command's children live on") {
            return;
        }
        let room = Room::new();
        let command = "sleep 1000 & setsid sleep 1000 & sh -c 'sleep 1000; :' & kill -KILL $$";
        let mut launch = room.captive(["memory", "1M"], command);
        let witness = Witness::new(&mut launch);
        launch.run_to(137);
        assert!(witness.all_are_gone());
        room.assert_nothing_left();
    }

    /// A6: "in-flight requests are answered, idle connections closed at once"
    #[test]
    fn a_client_that_holds_a_connection_does_not_hold_up_the_end() {
        if nbdkit_differs("A6: hangs until that client goes") {
            return;
        }
        let room = Room::new();
        let mut ready = room.fifo("ready");
        let mut go = room.fifo("go");
        let command = "printf '%s\\n' \"$unixsocket\" > ready; read x < go; exit 3";
        let running = room.captive(["memory", "1M"], command).start();
        let socket = ready.hear();
        let mut in_handshake = Client::connect(Path::new(&socket));
        in_handshake.greeting();
        let mut idle = Client::connect(Path::new(&socket));
        idle.start();
        idle.go(b"");
        idle.expect_alive();
        go.tell();
        running.finish().expect(3);
        room.assert_nothing_left();
        idle.expect_end();
        in_handshake.expect_end();
    }

    /// A8
    #[test]
    fn a_command_that_stops_itself_and_goes_on_changes_nothing() {
        let room = Room::new();
        let mut ready = room.fifo("ready");
        let running = room.captive(["memory", "1M"], "echo $$ > ready; kill -STOP $$; nbdinfo --size \"$uri\"; exit 3");
        let running = { running }.start();
        let pid = ready.hear();
        super::super::harness::wait_for("the command to stop", || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the command is there");
            stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T')).then_some(())
        });
        room.tool("kill", ["-CONT", &pid]).run_to(0);
        let output = running.finish().expect(3);
        assert_eq!(word(&output), "1048576");
        room.assert_nothing_left();
    }

    /// A12
    #[test]
    fn a_command_that_signals_its_whole_group_as_it_ends_gets_its_own_status() {
        if nbdkit_differs("A12: the whole group gets TERM, 143") {
            return;
        }
        let room = Room::new();
        // Its own group, or the signal would reach this test.
        let mut launch = room.captive(["memory", "1M"], "trap 'trap \"\" TERM; kill 0' EXIT; exit 3");
        launch.in_child(|| Ok(nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0))?));
        launch.run_to(3);
        room.assert_nothing_left();
    }
}

mod start {
    use super::*;

    /// "The command starts when clients can connect [...], not before"
    #[test]
    fn the_first_thing_that_the_command_does_may_be_to_connect() {
        for _ in 0..10 {
            let room = Room::new();
            let output = room.captive(["memory", "1M"], "exec nbdinfo --size \"$uri\"").run_to(0);
            assert_eq!(word(&output), "1048576");
            room.assert_nothing_left();
        }
    }

    /// E4
    #[test]
    fn the_pid_file_is_complete_when_the_command_starts() {
        if nbdkit_differs("E4: it may not be there yet") {
            return;
        }
        let room = Room::new();
        let command = "cat server.pid; kill -0 $(cat server.pid)";
        let output = room.captive(["-P", "server.pid", "memory", "1M"], command).run_to(0);
        assert!(output.text().ends_with('\n'), "{output:?}");
        assert!(word(&output).parse::<i32>().is_ok_and(|pid| pid > 1), "{output:?}");
        room.assert_nothing_left();
        assert!(!room.path("server.pid").exists(), "E11: a pid file that is ours is removed");
    }

    /// E11
    #[test]
    fn a_pid_file_that_is_another_s_by_now_is_left() {
        let room = Room::new();
        room.captive(["-P", "server.pid", "memory", "1M"], "echo 1 > other; mv other server.pid").run_to(0);
        assert_eq!(fs::read_to_string(room.path("server.pid")).expect("it is left"), "1\n");
        room.assert_nothing_left();
    }

    /// "`--run` alone implies a private Unix socket in a directory of mode 0700 under `$TMPDIR`"
    #[test]
    fn the_private_socket_is_in_a_private_directory_under_tmpdir() {
        if nbdkit_differs("E10: TMPDIR is ignored") {
            return;
        }
        let room = Room::new();
        let mut ready = room.fifo("ready");
        let mut go = room.fifo("go");
        let command = "printf '%s\\n' \"$unixsocket\" > ready; read x < go";
        let mut launch = room.captive(["memory", "1M"], command);
        launch.in_child(|| {
            umask(Mode::empty());
            Ok(())
        });
        let running = launch.start();
        let socket = ready.hear();
        let socket = Path::new(&socket);
        let directory = socket.parent().expect("an absolute path");
        assert_eq!(directory.parent(), Some(room.tmpdir().as_path()));
        let about = fs::metadata(directory).expect("the directory is there");
        assert_eq!((about.mode() & 0o7777, about.uid()), (0o700, nix::unistd::geteuid().as_raw()));
        assert!(fs::metadata(socket).expect("the socket is there").file_type().is_socket());
        go.tell();
        running.finish().expect(0);
        room.assert_nothing_left();
    }

    /// E10: "/tmp, where the path would be too long for a socket"
    #[test]
    fn a_tmpdir_that_is_too_long_for_a_socket_is_replaced_by_tmp() {
        let room = Room::new();
        let long = room.path("x".repeat(100));
        fs::create_dir(&long).expect("a directory in the room");
        let command = "nbdinfo --size \"$uri\" >&2 || exit 9; printf '%s\\n' \"$unixsocket\"";
        let output = room.captive(["memory", "1M"], command).env("TMPDIR", &long).run_to(0);
        let socket = Path::new(word(&output));
        assert!(socket.starts_with("/tmp"), "{socket:?}");
        assert!(!socket.parent().expect("an absolute path").exists(), "{socket:?}");
        assert_eq!(fs::read_dir(&long).expect("it is there").count(), 0);
        room.assert_nothing_left();
    }

    #[test]
    fn a_tmpdir_that_is_not_there_is_replaced_by_tmp_or_a_clear_error() {
        let room = Room::new();
        let output = room.captive(["memory", "1M"], "nbdinfo --size \"$uri\"").env("TMPDIR", "/no/such/place").run();
        match output.status.code() {
            Some(0) => assert_eq!(word(&output), "1048576"),
            _ => output.expect(1).expect_error_line(&["/no/such/place"]),
        }
        room.assert_nothing_left();
    }

    #[test]
    fn a_chosen_socket_is_used_and_removed() {
        let room = Room::new();
        let command = "nbdinfo --size \"$uri\"; printf '%s\\n' \"$unixsocket\" \"$uri\"";
        let output = room.captive(["-U", "my.sock", "memory", "1M"], command).run_to(0);
        let socket = room.path("my.sock");
        let path = socket.display();
        assert_eq!(output.text(), format!("1048576\n{path}\nnbd+unix://?socket={path}\n"));
        if !nbdkit_differs("E6: the path is left on every exit") {
            assert!(!socket.exists());
        }
        room.assert_nothing_left();
    }

    #[test]
    fn a_chosen_tcp_port_is_used() {
        let room = Room::new();
        let port = free_port();
        let command = "nbdinfo --size \"$uri\"; printf '%s\\n' \"$port\" \"$uri\" \"$unixsocket\"";
        let output = room.captive(["-i", "127.0.0.1", "-p", &port, "memory", "1M"], command).run_to(0);
        assert_eq!(output.text(), format!("1048576\n{port}\nnbd://localhost:{port}\n\n"));
        room.assert_nothing_left();
    }

    /// "cannot start [...]: the command is never started; 1, one clear line on stderr", E8: nothing is left.
    #[test]
    fn a_server_that_cannot_start_says_why_and_never_starts_the_command() {
        let room = Room::new();
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port on loopback");
        let port = taken.local_addr().expect("the socket is bound").port().to_string();
        let _live = std::os::unix::net::UnixListener::bind(room.path("live")).expect("a socket in the room");
        room.write("not-a-socket", "precious");
        room.write("disk", [0; 512]);
        let cases: &[(&[&str], &[&str])] = &[
            (&["file", "missing.img"], &["missing.img", "No such file"]),
            (&["file"], &["file"]),
            (&["file", "."], &[]),
            (&["file", "file=disk", "file=disk"], &["file"]),
            (&["file", "disk", "no-such-key=1"], &["no-such-key"]),
            (&["no-such-plugin"], &["no-such-plugin"]),
            (&["memory", "12xyz"], &["xyz"]),
            (&["memory"], &["size"]),
            (&["memory", "size=-1"], &["-1"]),
            (&["memory", "1M", "no-such-key=1"], &["no-such-key"]),
            (&["--filter=no-such-filter", "memory", "1M"], &["no-such-filter"]),
            (&["-i", "127.0.0.1", "-p", &port, "memory", "1M"], &["Address already in use"]),
            (&["-U", "live", "memory", "1M"], &["Address already in use"]),
            (&["-U", "not-a-socket", "memory", "1M"], &["Address already in use"]),
            (&["-U", "no/such/directory/s", "memory", "1M"], &["No such file"]),
            (&["-P", "/no/such/directory/pid", "memory", "1M"], &["/no/such/directory/pid"]),
            (&["-t", "many", "memory", "1M"], &["threads"]),
        ];
        for (arguments, words) in cases {
            if arguments.contains(&"-P") && nbdkit_differs("the pid file's failure is found after the command started")
            {
                continue;
            }
            if *arguments == ["file", "file=disk", "file=disk"] && nbdkit_differs("1.32 takes the last of two files") {
                continue;
            }
            let output = room.captive(*arguments, "touch started; exit 0").run();
            assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:#?}");
            assert_eq!(output.text(), "");
            output.expect_error_line(words);
            assert!(!room.path("started").exists(), "{arguments:?}");
            room.assert_nothing_left();
        }
        assert_eq!(fs::read(room.path("not-a-socket")).expect("it is untouched"), b"precious");
        assert!(room.path("live").exists(), "another server's socket is untouched");
    }

    #[test]
    fn the_socket_of_a_dead_server_is_taken_over() {
        if nbdkit_differs("E7: status 1, address already in use") {
            return;
        }
        let room = Room::new();
        dead_socket(&room.path("s"));
        let output = room.captive(["-U", "s", "memory", "1M"], "nbdinfo --size \"$uri\"").run_to(0);
        assert_eq!(word(&output), "1048576");
        assert!(!room.path("s").exists());
        room.assert_nothing_left();
    }

    /// G4
    #[test]
    fn a_pid_file_that_cannot_be_written_is_an_error() {
        if nbdkit_differs("G4: not noticed") {
            return;
        }
        let room = Room::new();
        let output = room.captive(["-P", "/dev/full", "memory", "1M"], "touch started").run_to(1);
        output.expect_error_line(&["/dev/full"]);
        assert!(!room.path("started").exists());
        room.assert_nothing_left();
    }
}

mod what_the_command_gets {
    use super::*;

    #[test]
    fn stdin_stdout_and_stderr_are_the_caller_s() {
        let room = Room::new();
        let mut launch = room.captive(["memory", "1M"], "cat; echo to-stderr >&2; exit 3");
        let mut running = launch.stdin(Stdio::piped()).start();
        running.stdin().write_all(b"from stdin\n").expect("the command reads");
        let output = running.finish().expect(3);
        assert_eq!((output.text(), output.stderr.as_str()), ("from stdin\n", "to-stderr\n"));
    }

    #[test]
    fn stdin_is_read_by_the_command_alone() {
        let room = Room::new();
        let lines = room.write("lines", "first\nsecond\nthird\n");
        let file = File::open(&lines).expect("it was just written");
        let same = file.try_clone().expect("a descriptor");
        let mut launch = room.captive(["memory", "1M"], "exit 0");
        launch.stdin(file).run_to(0);
        let rest = std::io::read_to_string(same).expect("the rest of the file");
        assert_eq!(rest, "first\nsecond\nthird\n", "nothing was read by the server");
    }

    #[test]
    fn nothing_is_on_stdout_but_what_the_command_writes() {
        let room = Room::new();
        let output = room.captive(["-v", "memory", "1M"], "nbdinfo --size \"$uri\" >&2").run_to(0);
        assert_eq!(output.text(), "");
    }

    /// G2: "the command gets exactly the closed fd"
    #[test]
    fn a_closed_stdin_stays_closed_and_the_server_works() {
        if nbdkit_differs("G2: status 1 with a message") {
            return;
        }
        let room = Room::new();
        let command = "nbdinfo --size \"$uri\"; if test -e /proc/$$/fd/0; then echo open; else echo closed; fi";
        let mut launch = room.captive(["memory", "1M"], command);
        launch.in_child(|| Ok(nix::unistd::close(0)?));
        let output = launch.run_to(0);
        assert_eq!(output.text(), "1048576\nclosed\n");
        room.assert_nothing_left();
    }

    /// "with the caller's [...] other inherited descriptors"
    #[test]
    fn an_inherited_descriptor_reaches_the_command() {
        let room = Room::new();
        let (read, write): (OwnedFd, OwnedFd) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        // Through bash: dash knows descriptors of one digit only.
        let command = format!("bash -c 'echo through >&{}'", write.as_raw_fd());
        room.captive(["memory", "1M"], command).inherit(write).run_to(0);
        assert_eq!(std::io::read_to_string(File::from(read)).expect("the pipe is text"), "through\n");
    }

    /// "None of nbdcaptive's own descriptors reach it"
    #[test]
    fn no_descriptor_of_the_server_reaches_the_command() {
        if nbdkit_differs("its saved stdin and stdout reach the command") {
            return;
        }
        let room = Room::new();
        let command = "ls /proc/self/fd";
        let alone = room.tool("sh", ["-c", command]).run_to(0);
        for endpoint in [&["-P", "pid"][..], &["-U", "s"], &["-p", &free_port()]] {
            let output = room.captive([endpoint, &["memory", "1M"]].concat(), command).run_to(0);
            assert_eq!(output.text(), alone.text(), "as without a server");
        }
    }

    /// A11: "umask forced to 0022 (caller had 077)"
    #[test]
    fn the_umask_is_the_caller_s() {
        if nbdkit_differs("A11: it is 0022") {
            return;
        }
        for mask in [0o077, 0o000, 0o027] {
            let room = Room::new();
            let mut launch = room.captive(["memory", "1M"], "umask");
            launch.in_child(move || {
                umask(Mode::from_bits_truncate(mask));
                Ok(())
            });
            assert_eq!(word(&launch.run_to(0)), format!("{mask:04o}"));
        }
    }

    /// A11: "SIGPIPE ignored in C (`yes | head` prints "Broken pipe")"
    #[test]
    fn a_pipeline_whose_reader_leaves_ends_in_silence() {
        if nbdkit_differs("A11: SIGPIPE is ignored in the command") {
            return;
        }
        let room = Room::new();
        let output = room.captive(["memory", "1M"], "yes | head -n 1").run_to(0);
        assert_eq!((output.text(), output.stderr.as_str()), ("y\n", ""));
    }

    /// A11: "the caller's signal dispositions and mask"
    #[test]
    fn signal_dispositions_and_mask_are_the_caller_s() {
        if nbdkit_differs("A11: SIGPIPE is ignored, SIGHUP and SIGINT are not") {
            return;
        }
        let command = "grep -E '^Sig(Blk|Ign)' /proc/self/status";
        let room = Room::new();
        let compare = |prepare: fn() -> std::io::Result<()>| {
            // The shell itself changes some of it, so both are seen through one.
            let alone = room.tool("sh", ["-c", command]).in_child(prepare).run_to(0);
            let captive = room.captive(["memory", "1M"], command).in_child(prepare).run_to(0);
            assert_eq!(signal_sets(&captive), signal_sets(&alone), "as without a server");
            signal_sets(&alone)
        };
        let sets = compare(|| Ok(()));
        assert_eq!(sets[..2], [0, 0], "nothing is blocked or ignored");
        let sets = compare(|| [Signal::SIGHUP, Signal::SIGINT, Signal::SIGPIPE].into_iter().try_for_each(ignore));
        assert_eq!(sets[1], bits(&[Signal::SIGHUP, Signal::SIGINT, Signal::SIGPIPE]));
        compare(|| {
            [Signal::SIGQUIT, Signal::SIGUSR2, Signal::SIGTERM, Signal::SIGTTOU].into_iter().try_for_each(ignore)
        });
        compare(|| ignore(Signal::SIGCHLD));
        compare(|| {
            let set = SigSet::from_iter([Signal::SIGTERM, Signal::SIGALRM, Signal::SIGWINCH, Signal::SIGCHLD]);
            Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&set), None)?)
        });
        room.assert_nothing_left();
    }

    /// "Runs in the caller's session, process group, [...] directory, environment, [...] limits"
    #[test]
    fn session_group_directory_limits_and_environment_are_the_caller_s() {
        let room = Room::new();
        let command = "cut -d' ' -f5,6 /proc/$$/stat; pwd; ulimit -n; ulimit -c; printf '%s\\n' \"$CALLER\"";
        let mut launch = room.captive(["memory", "1M"], command);
        launch.env("CALLER", "a 'quoted' value");
        launch.in_child(|| {
            use rustix::process::{Resource, Rlimit, setrlimit};
            setrlimit(Resource::Nofile, Rlimit { current: Some(300), maximum: Some(400) })?;
            Ok(setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?)
        });
        let output = launch.run_to(0);
        let stat = fs::read_to_string("/proc/self/stat").expect("our own");
        let mine: Vec<&str> = stat.rsplit_once(')').expect("the name is in brackets").1.split_whitespace().collect();
        let room_path = room.path("");
        let directory = room_path.to_str().expect("text").trim_end_matches('/');
        assert_eq!(output.text(), format!("{} {}\n{directory}\n300\n0\na 'quoted' value\n", mine[2], mine[3]));
        assert_eq!(output.stderr, "");
    }

    /// "(local to the run script unless you use `export`)"
    #[test]
    fn the_variables_are_not_exported() {
        let room = Room::new();
        let command = "env | grep -E '^(uri|nbd|port|unixsocket|exportname|tls)' ; export uri; env | grep -c ^uri=";
        let output = room.captive(["memory", "1M"], command).run_to(0);
        assert_eq!(output.text(), "1\n");
        // But those that the caller has exported stay so, as assignments of the shell have it.
        let mut launch = room.captive(["memory", "1M"], "test \"$(printenv uri)\" = \"$uri\" && printenv nbd");
        launch.env("uri", "");
        launch.run_to(1);
    }

    #[test]
    fn variables_of_the_caller_do_not_show_through() {
        let room = Room::new();
        let mut launch = room.captive(["memory", "1M"], "printf '%s,' \"$port\" \"$exportname\" \"${tls-unset}\"");
        launch.env("port", "666").env("exportname", "evil");
        assert_eq!(launch.run_to(0).text(), ",,unset,");
    }

    #[test]
    fn the_server_runs_in_a_directory_whose_name_is_odd() {
        let room = Room::new();
        let odd = room.path("o d'd \"$x`\\");
        fs::create_dir(&odd).expect("a directory in the room");
        symlink(&odd, room.path("link")).expect("a link in the room");
        let command = "nbdinfo --size \"$uri\"; test -S \"$unixsocket\" && echo there";
        let output = room.captive(["-U", "link/../o d'd \"$x`\\/s", "memory", "1M"], command).run_to(0);
        assert_eq!(output.text(), "1048576\nthere\n");
    }

    /// "$uri is substituted automatically with the right NBD path so it can connect to nbdkit."
    #[test]
    fn the_uri_works_for_every_client() {
        let room = Room::new();
        room.write("data", "x".repeat(65536));
        room.tool("true", [""; 0]).run_to(0);
        for tool in ["qemu-img", "nbdinfo", "nbdcopy"] {
            super::super::harness::tool(tool);
        }
        let command = "
            set -e
            nbdcopy data \"$uri\"
            nbdcopy \"$nbd\" - | cmp - data
            qemu-img info --output=json \"$uri\" | grep '\"virtual-size\": 65536'
            qemu-img compare -f raw -F raw data \"$uri\"
            nbdinfo --size \"$uri\"";
        for endpoint in [vec![], vec!["-U".to_owned(), "s".into()], vec!["-p".into(), free_port()]] {
            let arguments = endpoint.iter().map(String::as_str).chain(["memory", "64K"]);
            let output = room.captive(arguments, command).run_to(0);
            assert!(output.text().ends_with("65536\n"), "{output:#?}");
        }
        room.assert_nothing_left();
    }
}

/// The set of these signals, as /proc shows it.
fn bits(signals: &[Signal]) -> u64 {
    signals.iter().fold(0, |bits, one| bits | 1 << (*one as i32 - 1))
}

/// The sets that /proc shows, without signals 32 and 33, which libc keeps to itself (posix_spawn ignores them).
fn signal_sets(output: &Output) -> Vec<u64> {
    let sets = output.text().lines().map(|line| line.split_whitespace().last().expect("name and set"));
    sets.map(|set| u64::from_str_radix(set, 16).expect("a set in hex") & !(3 << 31)).collect()
}

/// Ignores a signal, between fork and exec.
fn ignore(one: Signal) -> std::io::Result<()> {
    // SAFETY: no handler is installed.
    unsafe { signal(one, SigHandler::SigIgn) }?;
    Ok(())
}

/// The one thing that a command and its server may never disagree on.
#[test]
fn the_message_names_the_program() {
    let room = Room::new();
    let output = room.captive(["no-such-plugin"], "exit 0").run_to(1);
    assert!(output.stderr.starts_with(&format!("{}: ", program_name())), "{output:#?}");
}

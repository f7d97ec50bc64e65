//! When a server ends, and what is left after any end: parents, last clients, signals, SIGKILL of each process.
//! The letters and numbers in the comments are the rows of the lifetime catalogue in docs/; sentences in quotes are from
//! nbdkit's man pages.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, killpg, sigprocmask};
use nix::unistd::{Pid, setpgid};

use super::harness::{Launch, Room, Running, Witness, nbdkit_differs, server_path, wait_for};
use super::raw_client::*;

/// A command that says where the server is, and then stays for ever.
const READY_AND_STAY: &str = "printf '%s\\n' \"$unixsocket\" > ready; exec sleep 1000";

/// A shell that starts the server as its child, and stays for ever.
fn under_a_shell(room: &Room, arguments: &[&str]) -> Launch {
    let mut launch = room.tool("sh", ["-c", "\"$@\" & wait", "sh"]);
    launch.args([server_path()]).args(arguments);
    launch
}

/// A captive server whose command is [`READY_AND_STAY`], and the socket that it has told of.
fn captive_that_stays(room: &Room, arguments: &[&str]) -> (Running, Witness, String) {
    captive_that_runs(room, arguments, READY_AND_STAY)
}

fn captive_that_runs(room: &Room, arguments: &[&str], command: &str) -> (Running, Witness, String) {
    let mut ready = room.fifo("ready");
    let mut launch = room.captive(arguments, command);
    let witness = Witness::new(&mut launch);
    let running = launch.start();
    let socket = ready.hear();
    (running, witness, socket)
}

/// A client that is in transmission and asks for nothing.
fn idle_client(socket: impl AsRef<Path>) -> Client {
    let mut client = Client::connect(socket.as_ref());
    client.start();
    client.go(b"");
    client.expect_alive();
    client
}

mod parent {
    use super::*;

    /// C1: "nbdkit will exit automatically if the parent program exits for any reason."
    #[test]
    fn the_server_ends_when_its_parent_is_killed() {
        let room = Room::new();
        let mut launch = under_a_shell(&room, &["--exit-with-parent", "-P", "pid", "-U", "s", "memory", "1M"]);
        let witness = Witness::new(&mut launch);
        let mut parent = launch.start();
        parent.wait_until_listening(&room.path("s"));
        assert!(!witness.all_are_gone());
        parent.signal(Signal::SIGKILL);
        parent.finish().expect_signal(Signal::SIGKILL);
        witness.wait_until_all_are_gone();
        room.wait_until_nothing_left();
        if !nbdkit_differs("C1: the socket's path is left") {
            assert!(!room.path("s").exists());
            assert!(!room.path("pid").exists());
        }
    }

    /// C2: the parent is a zombie.
    #[test]
    fn the_server_ends_although_nobody_waits_for_its_dead_parent() {
        let room = Room::new();
        let mut launch = under_a_shell(&room, &["--exit-with-parent", "-U", "s", "memory", "1M"]);
        let witness = Witness::new(&mut launch);
        let mut parent = launch.start();
        parent.wait_until_listening(&room.path("s"));
        parent.signal(Signal::SIGKILL);
        // Before anybody waits for it.
        witness.wait_until_all_are_gone();
        parent.finish().expect_signal(Signal::SIGKILL);
    }

    /// C3: "a thread of it that exits [...] changes nothing"
    #[test]
    fn the_server_stays_when_only_the_thread_that_started_it_ends() {
        if nbdkit_differs("C3: killed though the parent lives") {
            return;
        }
        let room = Room::new();
        let socket = room.path("s");
        let mut launch = room.server(["--exit-with-parent", "-U", "s", "memory", "1M"]);
        let mut running = thread::spawn(move || launch.start()).join().expect("the process starts");
        running.wait_until_listening(&socket);
        let mut client = idle_client(&socket);
        (0..500).for_each(|_| client.expect_alive());
        (0..50).for_each(|_| drop(idle_client(&socket)));
        assert!(!running.has_ended());
        running.signal(Signal::SIGTERM);
        running.finish().expect(0);
    }

    /// C5
    #[test]
    fn the_server_stays_when_its_parent_executes_another_program() {
        let room = Room::new();
        let mut launch = room.tool("sh", ["-c", "\"$@\" & exec sleep 1000", "sh"]);
        launch.args([server_path()]).args(["--exit-with-parent", "-U", "s", "memory", "1M"]);
        let witness = Witness::new(&mut launch);
        let mut parent = launch.start();
        parent.wait_until_listening(&room.path("s"));
        wait_for("the parent to be sleep", || {
            let executable = fs::read_link(format!("/proc/{}/exe", parent.pid())).ok()?;
            executable.ends_with("sleep").then_some(())
        });
        (0..50).for_each(|_| drop(idle_client(room.path("s"))));
        parent.signal(Signal::SIGKILL);
        parent.finish().expect_signal(Signal::SIGKILL);
        witness.wait_until_all_are_gone();
        room.wait_until_nothing_left();
    }

    /// C7
    #[test]
    fn the_server_ends_when_its_parent_died_before_it_could_look() {
        if nbdkit_differs("C7: runs for ever") {
            return;
        }
        for round in 0..20 {
            let room = Room::new();
            // The shell is gone as soon as it has forked.
            let mut launch = room.tool("sh", ["-c", "\"$@\" > /dev/null 2>&1 &", "sh"]);
            launch.args([server_path()]).args(["--exit-with-parent", "-U", "s", "memory", "1M"]);
            let witness = Witness::new(&mut launch);
            // Where these tests are run they may share session and group with pid 1, and then nothing tells the two apart.
            launch.in_child(|| Ok(nix::unistd::setsid().map(drop)?));
            launch.run_to(0);
            witness.wait_until_all_are_gone();
            room.wait_until_nothing_left();
            assert!(!room.path("s").exists(), "round {round}");
        }
    }

    /// C11
    #[test]
    fn the_server_ends_with_its_parent_although_clients_are_connected() {
        if nbdkit_differs("C11: never exits") {
            return;
        }
        let room = Room::new();
        let mut launch = under_a_shell(&room, &["--exit-with-parent", "-U", "s", "memory", "1M"]);
        let witness = Witness::new(&mut launch);
        let mut parent = launch.start();
        parent.wait_until_listening(&room.path("s"));
        let mut client = idle_client(room.path("s"));
        parent.signal(Signal::SIGKILL);
        parent.finish().expect_signal(Signal::SIGKILL);
        client.expect_end();
        witness.wait_until_all_are_gone();
        room.wait_until_nothing_left();
        assert!(!room.path("s").exists());
    }

    /// C13
    #[test]
    fn a_captive_server_and_its_command_end_with_the_parent() {
        if nbdkit_differs("C13: nothing at all dies") {
            return;
        }
        let room = Room::new();
        let mut ready = room.fifo("ready");
        let command = "sleep 1000 & setsid sleep 1000 & echo here > ready; sleep 1000";
        let mut launch = under_a_shell(&room, &["--exit-with-parent", "memory", "1M", "--run", command]);
        let witness = Witness::new(&mut launch);
        let parent = launch.start();
        ready.hear();
        parent.signal(Signal::SIGKILL);
        witness.wait_until_all_are_gone();
        room.wait_until_nothing_left();
    }

    /// C14: "when it blocks signals"
    #[test]
    fn the_server_ends_with_its_parent_although_signals_are_blocked() {
        if nbdkit_differs("C14: never exits") {
            return;
        }
        let room = Room::new();
        let mut launch = under_a_shell(&room, &["--exit-with-parent", "-U", "s", "memory", "1M"]);
        launch.in_child(block_all);
        let witness = Witness::new(&mut launch);
        let mut parent = launch.start();
        parent.wait_until_listening(&room.path("s"));
        parent.signal(Signal::SIGKILL);
        parent.finish().expect_signal(Signal::SIGKILL);
        witness.wait_until_all_are_gone();
        room.wait_until_nothing_left();
    }

    /// "--run: the command's status", as without the option.
    #[test]
    fn exit_with_parent_does_not_change_how_a_command_ends() {
        let room = Room::new();
        room.captive(["--exit-with-parent", "memory", "1M"], "nbdinfo --size \"$uri\"; exit 3").run_to(3);
        room.assert_nothing_left();
    }
}

mod exitlast {
    use super::*;

    const EXITLAST: [&str; 3] = ["--filter=exitlast", "memory", "1M"];

    /// "exit after the last client connection"
    #[test]
    fn exits_when_the_last_of_two_clients_leaves() {
        let room = Room::new();
        let mut server = room.serve(EXITLAST);
        let first = server.simple();
        let mut second = server.simple();
        first.disconnect();
        (0..100).for_each(|_| second.expect_alive());
        assert!(!server.running.has_ended());
        second.disconnect();
        server.running.finish().expect(0);
        if !nbdkit_differs("E6: the path is left") {
            assert!(!server.socket.exists());
        }
        room.assert_nothing_left();
    }

    /// D20: "a probe, a listing or an INFO neither counts nor ends anything"
    #[test]
    fn probes_listings_and_info_do_not_end_the_server() {
        if nbdkit_differs("D20: an INFO ends it") {
            return;
        }
        let room = Room::new();
        let server = room.serve(EXITLAST);
        for _ in 0..3 {
            drop(server.connect());
            let mut greeted = server.connect();
            greeted.start();
            drop(greeted);
            let mut asking = server.connect();
            asking.start();
            assert_eq!(asking.option(NBD_OPT_LIST, b"").1, NBD_REP_ACK);
            assert!(asking.info(NBD_OPT_INFO, b"", &[]).is_ok());
            assert_eq!(asking.option(NBD_OPT_ABORT, b"").1, NBD_REP_ACK);
            asking.expect_end();
        }
        room.tool("nbdinfo", ["--list", &server.uri()]).run_to(0);
        let mut client = server.simple();
        client.expect_alive();
        client.disconnect();
        server.running.finish().expect(0);
    }

    /// D21
    #[test]
    fn a_client_that_asks_for_info_before_it_goes_is_served() {
        if nbdkit_differs("D21: connection reset") {
            return;
        }
        let room = Room::new();
        let server = room.serve(EXITLAST);
        let mut client = server.connect();
        client.start();
        assert!(client.info(NBD_OPT_INFO, b"", &[]).is_ok());
        client.go(b"");
        client.expect_alive();
        client.disconnect();
        server.running.finish().expect(0);
    }

    /// D18
    #[test]
    fn exits_however_the_last_client_leaves() {
        for (name, leave) in [
            ("disconnects", (|client: Client| client.disconnect()) as fn(Client)),
            ("closes", drop),
            ("closes in a request", |mut client| client.send(&[0x25; 10])),
            ("closes before the reply", |mut client| assert_ne!(client.request(NBD_CMD_READ, 0, 0, 1 << 20, b""), 0)),
        ] {
            let room = Room::new();
            let server = room.serve(EXITLAST);
            // Shown where the test fails.
            eprintln!("{name}");
            leave(server.simple());
            server.running.finish().expect(0);
            room.assert_nothing_left();
        }
    }

    /// D22: "the handshaking one decides"
    #[test]
    fn a_client_in_its_handshake_is_served_when_the_last_other_leaves() {
        if nbdkit_differs("D22: hangs") {
            return;
        }
        let room = Room::new();
        let server = room.serve(EXITLAST);
        let leaving = server.simple();
        let mut coming = server.connect();
        coming.start();
        leaving.disconnect();
        coming.go(b"");
        coming.expect_alive();
        coming.disconnect();
        server.running.finish().expect(0);
    }

    /// "last client left: [the command is] waited for, never killed; the command's [status]"
    #[test]
    fn the_command_is_waited_for_when_the_last_client_has_left() {
        let room = Room::new();
        let command = "nbdinfo --size \"$uri\" && echo still here; exit 5";
        let output = room.captive(EXITLAST, command).run_to(5);
        assert_eq!(output.text(), "1048576\nstill here\n");
        room.assert_nothing_left();
    }

    /// D18, D23
    #[test]
    fn the_command_outlives_the_server_that_its_client_has_ended() {
        let room = Room::new();
        // nbdinfo fails to connect sooner or later: the server has ended, and the command is told so by nothing else.
        let command = "nbdinfo --size \"$uri\"; while nbdinfo --size \"$uri\" > /dev/null 2>&1; do :; done; exit 6";
        let output = room.captive(EXITLAST, command).run_to(6);
        assert_eq!(output.text(), "1048576\n");
        room.assert_nothing_left();
    }
}

mod signals {
    use super::*;

    #[test]
    fn a_server_without_a_command_ends_with_0_at_each_signal_that_asks_for_it() {
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
            let room = Room::new();
            let server = room.serve(["-P", "pid", "memory", "1M"]);
            let socket = server.socket.clone();
            server.running.signal(signal);
            let output = server.running.finish().expect(0);
            assert_eq!(output.text(), "");
            room.assert_nothing_left();
            if !nbdkit_differs("it complains of a probe; E6, E11: socket and pid file are left") {
                assert_eq!(output.stderr, "");
                assert!(!socket.exists());
                assert!(!room.path("pid").exists());
            }
        }
    }

    /// F1, F5: "idle and half-open connections are closed at once"
    #[test]
    fn idle_and_half_open_connections_do_not_hold_up_the_end() {
        if nbdkit_differs("F1, F4, F5: hangs for ever") {
            return;
        }
        let room = Room::new();
        let server = room.serve(["memory", "1M"]);
        let silent = server.connect();
        let mut half_open = server.connect();
        half_open.start();
        half_open.send(&option_bytes(NBD_OPT_GO, &info_bytes(b"name", &[]))[..15]);
        let idle = idle_client(&server.socket);
        let mut half_header = idle_client(&server.socket);
        half_header.send(&request_bytes(NBD_CMD_READ, 0, 1, 0, 512)[..20]);
        let mut half_payload = idle_client(&server.socket);
        let header = half_payload.prepare(NBD_CMD_WRITE, 0, 0, 65536);
        half_payload.send(&[&header[..], &[0xff; 1000]].concat());
        server.terminate().expect(0);
        room.assert_nothing_left();
        let mut silent = silent;
        silent.greeting();
        for mut client in [silent, half_open, idle, half_header] {
            client.expect_end();
        }
        // The write may be refused, never acknowledged.
        let refusal = half_payload.next_reply().map(|reply| reply.error);
        assert!([None, Some(NBD_ESHUTDOWN)].contains(&refusal), "{refusal:?}");
    }

    /// F2, F9: "requests in flight are finished and answered", "Every acknowledged write is in the device at the end"
    #[test]
    fn what_was_acknowledged_before_the_end_is_in_the_file() {
        if nbdkit_differs("F1: hangs while a client is connected") {
            return;
        }
        for round in 0..5_u64 {
            let room = Room::new();
            let disk = room.write("disk", vec![0; 16 << 20]);
            let server = room.serve(["file", "disk"]);
            let mut client = server.simple();
            let mut bytes = Vec::new();
            let mut offsets = std::collections::HashMap::new();
            for number in 0..512 {
                let header = client.prepare(NBD_CMD_WRITE, 0, number * 32768, 32768);
                offsets.insert(u64::from_be_bytes(header[8..16].try_into().expect("eight bytes")), number);
                bytes.extend(header);
                bytes.extend([(number % 251) as u8 + 1; 32768]);
            }
            let mut socket = client.socket.try_clone().expect("a descriptor");
            // Fails when the server has hung up, which is what this is about.
            let writer = thread::spawn(move || drop(socket.write_all(&bytes)));
            let mut acknowledged = Vec::new();
            let mut after_signal = 0;
            while let Some(reply) = client.next_reply() {
                match reply.error {
                    NBD_SUCCESS => acknowledged.push(offsets[&reply.cookie]),
                    NBD_ESHUTDOWN => after_signal += 1,
                    other => panic!("error {other}"),
                }
                if acknowledged.len() as u64 == 1 + round * 20 && after_signal == 0 {
                    let _ = kill(Pid::from_raw(server.running.pid()), Signal::SIGTERM);
                }
            }
            server.running.finish().expect(0);
            writer.join().expect("the writer does not panic");
            let content = fs::read(&disk).expect("the disk is there");
            for number in acknowledged {
                let block = &content[number as usize * 32768..][..32768];
                assert!(block.iter().all(|&byte| byte == (number % 251) as u8 + 1), "block {number} was acknowledged");
            }
            room.assert_nothing_left();
        }
    }

    /// F12
    #[test]
    fn a_client_that_does_not_read_its_replies_does_not_hold_up_the_end() {
        if nbdkit_differs("F12: hangs") {
            return;
        }
        let room = Room::new();
        let server = room.serve(["--drain-timeout=1", "memory", "64M"]);
        let mut client = server.simple();
        for _ in 0..4 {
            client.request(NBD_CMD_READ, 0, 0, 32 << 20, b"");
        }
        // The reply has begun.
        client.receive(4);
        let status = server.terminate().shell_status();
        assert!([0, 1].contains(&status), "{status}");
        room.assert_nothing_left();
    }

    /// B1, A2: "TERM to C"; "O dies of that signal"
    #[test]
    fn sigterm_ends_the_command_and_then_the_server() {
        if nbdkit_differs("B1: ignored until the command ends") {
            return;
        }
        let room = Room::new();
        let (running, witness, _) = captive_that_stays(&room, &["memory", "1M"]);
        running.signal(Signal::SIGTERM);
        assert_eq!(running.finish().shell_status(), 143);
        assert!(witness.all_are_gone());
        room.assert_nothing_left();
    }

    /// A2, B4: "of the signal itself if the front process got that signal too (so that a shell loop stops)"
    #[test]
    fn a_server_whose_command_dies_of_the_signal_that_both_got_dies_of_it_too() {
        if nbdkit_differs("B1, B3: ignored") {
            return;
        }
        for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
            let room = Room::new();
            let (running, _, _) = captive_that_stays(&room, &["memory", "1M"]);
            running.signal(signal);
            running.finish().expect_signal(signal);
            room.assert_nothing_left();
        }
    }

    /// B1: "S serves until C is gone", "status = C's (143, or what its trap chose)"
    #[test]
    fn the_server_serves_until_the_command_has_ended_after_sigterm() {
        if nbdkit_differs("B1: ignored until the command ends") {
            return;
        }
        let room = Room::new();
        let command = "trap 'nbdinfo --size \"$uri\"; exit 7' TERM; echo here > ready; sleep 1000 & wait";
        let (running, witness, _) = captive_that_runs(&room, &["memory", "1M"], command);
        running.signal(Signal::SIGTERM);
        let output = running.finish().expect(7);
        assert_eq!(output.text(), "1048576\n");
        assert!(witness.all_are_gone(), "the rest of the command's tree as well");
        room.assert_nothing_left();
    }

    /// B1: "GRACE -> KILL tree"
    #[test]
    fn a_command_that_ignores_sigterm_is_killed_after_the_grace() {
        if nbdkit_differs("B1: ignored until the command ends") {
            return;
        }
        let room = Room::new();
        let command = "trap '' TERM; echo here > ready; sleep 1000; sleep 1000";
        let (running, witness, _) = captive_that_runs(&room, &["--grace-period=1", "memory", "1M"], command);
        running.signal(Signal::SIGTERM);
        assert_eq!(running.finish().shell_status(), 137);
        assert!(witness.all_are_gone());
        room.assert_nothing_left();
    }

    /// B15: "the same signal again, 250 ms or more later: stop at once"
    #[test]
    fn a_second_sigterm_ends_the_grace() {
        if nbdkit_differs("B15: no effect, ever") {
            return;
        }
        let room = Room::new();
        let command = "trap '' TERM; echo here > ready; sleep 1000; sleep 1000";
        let (running, _, _) = captive_that_runs(&room, &["-v", "--grace-period=3600", "memory", "1M"], command);
        running.signal(Signal::SIGTERM);
        // Two that wait together are one.
        wait_for("the first to be seen", || running.stderr().contains("received signal 15").then_some(()));
        // Not to wait for something: the time between the two is what tells them from one.
        thread::sleep(Duration::from_millis(400));
        running.signal(Signal::SIGTERM);
        assert_eq!(running.finish().shell_status(), 137);
        room.assert_nothing_left();
    }

    /// B8: "forwarded to C (USR1, USR2, WINCH, ALRM, RT)"
    #[test]
    fn other_signals_are_passed_on_to_the_command() {
        if nbdkit_differs("B8: the front process dies of it") {
            return;
        }
        for (signal, name) in [(Signal::SIGUSR1, "USR1"), (Signal::SIGUSR2, "USR2"), (Signal::SIGALRM, "ALRM")] {
            let room = Room::new();
            let command = format!("trap 'kill $!; exit 21' {name}; sleep 1000 & echo here > ready; wait");
            let (running, _, _) = captive_that_runs(&room, &["memory", "1M"], &command);
            running.signal(signal);
            running.finish().expect(21);
            room.assert_nothing_left();
        }
    }

    /// B11: "same as B1 (orderly end of the whole captive group)"
    #[test]
    fn sigterm_to_the_pid_in_the_pid_file_ends_all() {
        if nbdkit_differs("B11: the command runs on without a server") {
            return;
        }
        let room = Room::new();
        let (running, witness, _) = captive_that_stays(&room, &["-P", "pid", "memory", "1M"]);
        let pid = fs::read_to_string(room.path("pid")).expect("the pid file is there");
        kill(Pid::from_raw(pid.trim().parse().expect("a number")), Signal::SIGTERM).expect("the process is there");
        assert_eq!(running.finish().shell_status(), 143);
        assert!(witness.all_are_gone());
        room.assert_nothing_left();
    }

    /// B8, nbdkit tests/test-captive.sh: "Check that nbdkit death from unhandled signal affects exit status."
    #[test]
    fn a_server_that_dies_of_a_signal_says_so_in_the_status() {
        let room = Room::new();
        let command = "while ! test -s pid; do :; done; kill -s USR1 $(cat pid); sleep 3";
        let output = room.captive(["-P", "pid", "memory", "1M"], command).run();
        assert_eq!(output.shell_status(), 128 + Signal::SIGUSR1 as i32, "{output:#?}");
        assert!(!output.stderr.is_empty(), "a line says so");
        if !nbdkit_differs("E11: the pid file is left") {
            assert!(!room.path("pid").exists());
        }
        room.assert_nothing_left();
    }

    /// B16
    #[test]
    fn a_server_that_inherits_a_mask_can_still_be_ended() {
        if nbdkit_differs("B16: cannot be terminated at all") {
            return;
        }
        let room = Room::new();
        let prepare = |launch: &mut Launch| {
            launch.in_child(block_all);
        };
        room.serve_with(["memory", "1M"], prepare).terminate().expect(0);
        room.assert_nothing_left();
    }

    /// B17
    #[test]
    fn a_server_that_is_stopped_does_not_hold_up_the_end() {
        if nbdkit_differs("B17: waits for ever") {
            return;
        }
        let room = Room::new();
        let command = "kill -STOP $(cat pid); exit 3";
        room.captive(["--drain-timeout=1", "-P", "pid", "memory", "1M"], command).run_to(3);
        room.assert_nothing_left();
        assert!(!room.path("pid").exists());
    }
}

mod sigkill {
    use super::*;

    /// B9
    #[test]
    fn when_the_front_process_is_killed_nothing_is_left() {
        if nbdkit_differs("B9: server, command and its children live on") {
            return;
        }
        let room = Room::new();
        let command = "sleep 1000 & setsid sleep 1000 & printf '%s\\n' \"$unixsocket\" > ready; sleep 1000; :";
        let (running, witness, socket) = captive_that_runs(&room, &["memory", "1M"], command);
        let mut client = idle_client(&socket);
        running.signal(Signal::SIGKILL);
        client.expect_end();
        witness.wait_until_all_are_gone();
        room.wait_until_nothing_left();
        running.finish().expect_signal(Signal::SIGKILL);
    }

    /// B9, F9: "Even unflushed acknowledged writes survive, because S is not what was killed"
    #[test]
    fn acknowledged_writes_survive_the_kill_of_the_front_process() {
        if nbdkit_differs("B9") {
            return;
        }
        let room = Room::new();
        let disk = room.write("disk", [0; 65536]);
        let (running, witness, socket) = captive_that_stays(&room, &["file", "disk"]);
        let mut client = idle_client(&socket);
        assert_eq!(client.write(0, 4096, b"acknowledged"), NBD_SUCCESS);
        running.signal(Signal::SIGKILL);
        witness.wait_until_all_are_gone();
        assert_eq!(&fs::read(disk).expect("the disk is there")[4096..4108], b"acknowledged");
        room.wait_until_nothing_left();
    }

    /// B10: "128+s; clean", "stderr line at once"
    #[test]
    fn when_the_serving_process_is_killed_the_command_is_ended_and_the_status_says_why() {
        if nbdkit_differs("B10: the command runs on") {
            return;
        }
        let room = Room::new();
        let (running, witness, socket) = captive_that_stays(&room, &["-P", "pid", "memory", "1M"]);
        let pid = fs::read_to_string(room.path("pid")).expect("the pid file is there");
        kill(Pid::from_raw(pid.trim().parse().expect("a number")), Signal::SIGKILL).expect("the process is there");
        let output = running.finish();
        assert_eq!(output.shell_status(), 137, "{output:#?}");
        assert!(!output.stderr.is_empty(), "a line says so");
        assert!(witness.all_are_gone());
        assert!(!Path::new(&socket).exists());
        room.assert_nothing_left();
    }

    /// B10: "connects refused at once"
    #[test]
    fn when_the_serving_process_is_killed_the_command_cannot_hang_in_a_connect() {
        if nbdkit_differs("B10: a new connect hangs for ever") {
            return;
        }
        let room = Room::new();
        let command = "kill -KILL $(cat pid); while nbdinfo \"$uri\" > /dev/null 2>&1; do :; done; echo refused";
        let output = room.captive(["-P", "pid", "memory", "1M"], command).run();
        assert_eq!(output.text(), "refused\n");
        assert_eq!(output.shell_status(), 137, "{output:#?}");
        room.assert_nothing_left();
    }

    /// B12: "nothing left for every subset of {O,G,S} except all three at once"
    #[test]
    fn whichever_of_our_processes_are_killed_nothing_is_left() {
        if nbdkit_differs("B12: any one leaves something") {
            return;
        }
        let mut subset: u32 = 1;
        loop {
            let room = Room::new();
            let command = "sleep 1000 & printf '%s\\n' \"$unixsocket\" > ready; sleep 1000; :";
            let (_running, witness, _) = captive_that_runs(&room, &["-P", "pid", "memory", "1M"], command);
            let ours = room.server_processes();
            assert!(ours.len() < 6, "{ours:#?}");
            if subset + 1 >= 1 << ours.len() {
                break;
            }
            let chosen = || ours.iter().enumerate().filter(|(index, _)| subset & 1 << index != 0);
            // Shown where the test fails.
            eprintln!("kill {:#?} of {ours:#?}", chosen().collect::<Vec<_>>());
            for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
                chosen().for_each(|(_, one)| kill(Pid::from_raw(one.pid), signal).expect("the process is there"));
            }
            room.wait_until_nothing_left();
            witness.wait_until_all_are_gone();
            wait_for(&format!("the pid file to go after {subset:#b} were killed"), || {
                (!room.path("pid").exists()).then_some(())
            });
            subset += 1;
        }
    }

    /// The same without a command: "no Unix socket and no pid file that nbdcaptive made"
    #[test]
    fn whichever_process_of_a_server_without_a_command_is_killed_nothing_is_left() {
        if nbdkit_differs("E6, E11: socket and pid file are left") {
            return;
        }
        let mut index = 0;
        loop {
            let room = Room::new();
            let server = room.serve(["-P", "pid", "memory", "1M"]);
            let Some(one) = room.server_processes().get(index).cloned() else { break };
            kill(Pid::from_raw(one.pid), Signal::SIGKILL).expect("the process is there");
            if one.pid != server.running.pid() {
                // The front process is not gone: it serves on, leaves no zombie, and sweeps when its time comes.
                server.simple().expect_alive();
                kill(Pid::from_raw(server.running.pid()), Signal::SIGTERM).expect("the server is there");
            }
            wait_for(&format!("all to end after process {index} was killed"), || {
                room.processes().is_empty().then_some(())
            });
            for left in [&server.socket, &room.path("pid")] {
                wait_for(&format!("{} to go after process {index} was killed", left.display()), || {
                    (!left.exists()).then_some(())
                });
            }
            index += 1;
        }
        assert!(index > 0);
    }

    /// B13, B18: "SIGKILL of the caller's whole process group", "clean at every instant of start"
    #[test]
    fn a_kill_of_the_whole_group_at_any_moment_of_the_start_leaves_nothing() {
        if nbdkit_differs("B18: temporary directories are left") {
            return;
        }
        for round in 0..60_u64 {
            let room = Room::new();
            let mut launch = room.captive(["-P", "pid", "memory", "1M"], "sleep 1000");
            launch.in_child(|| Ok(setpgid(Pid::from_raw(0), Pid::from_raw(0))?));
            let witness = Witness::new(&mut launch);
            let running = launch.start();
            // Not to wait for something: the moment is what varies, from 0 to 20 ms.
            thread::sleep(Duration::from_micros(round * 337));
            let signal = if round % 2 == 0 { Signal::SIGKILL } else { Signal::SIGTERM };
            killpg(Pid::from_raw(running.pid()), signal).expect("the group is there");
            witness.wait_until_all_are_gone();
            room.wait_until_nothing_left();
            running.finish();
            assert!(!room.path("pid").exists(), "round {round}");
        }
    }

    /// B14: "the next start removes or takes over it"
    #[test]
    fn after_a_kill_of_everything_at_once_the_next_start_finds_its_way() {
        if nbdkit_differs("B14, E7: left, address already in use") {
            return;
        }
        let room = Room::new();
        let server = room.serve(["memory", "1M"]);
        let ours = room.server_processes();
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            ours.iter().for_each(|one| kill(Pid::from_raw(one.pid), signal).expect("the process is there"));
        }
        wait_for("all to end", || room.processes().is_empty().then_some(()));
        drop(server);
        let server = room.serve(["memory", "1M"]);
        server.simple().expect_alive();
        server.terminate().expect(0);
        assert!(!room.path("socket").exists());
        room.assert_nothing_left();
    }
}

/// Blocks all signals that can be, between fork and exec.
fn block_all() -> std::io::Result<()> {
    Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?)
}

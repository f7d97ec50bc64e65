//! `--run`: what the command inherits to the last bit, and what signals do to it, to the front process and to the guardian.
//! At a terminal: see `terminal.rs`. The letters and numbers in the comments are the rows of the lifetime catalogue in docs/.

use std::fs;
use std::io;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SaFlags, SigAction};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, sigaction, signal, sigprocmask};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo, setpgid};

use super::harness::{Launch, Process, Room, Running, Witness, nbdkit_differs, server_path, wait_for};
use super::raw_client::Client;

/// Its own group, or signals to the group would reach this test.
fn own_group() -> io::Result<()> {
    Ok(setpgid(Pid::from_raw(0), Pid::from_raw(0))?)
}

/// Starts a command that says "here" on the named pipe `ready` when it is there.
fn start(room: &Room, arguments: &[&str], command: &str) -> Running {
    let mut ready = room.fifo("ready");
    let mut launch = room.captive(arguments, command);
    launch.in_child(|| {
        // A test that runs in the background of a script has them ignored, and so would the command.
        for one in [Signal::SIGINT, Signal::SIGQUIT] {
            // SAFETY: no handler is installed.
            unsafe { signal(one, SigHandler::SigDfl) }?;
        }
        Ok(())
    });
    let running = launch.start();
    ready.hear();
    running
}

/// The pid of one of our processes, by the name that it has given itself.
fn our_process(room: &Room, name: &str) -> Pid {
    let is_it = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name);
    let found = room.server_processes().into_iter().find(|one| is_it(one.pid));
    Pid::from_raw(found.unwrap_or_else(|| panic!("no {name} in {:#?}", room.server_processes())).pid)
}

fn idle_client(room: &Room) -> Client {
    let mut client = Client::connect(&room.path("s"));
    client.start();
    client.go(b"");
    client.expect_alive();
    client
}

mod what_it_inherits {
    use super::*;

    /// Ignores every signal that can be.
    fn ignore_all() -> io::Result<()> {
        for number in 1..=64 {
            // SAFETY: no handler is installed. Two cannot be ignored and two are libc's; both say so.
            unsafe { nix::libc::signal(number, nix::libc::SIG_IGN) };
        }
        Ok(())
    }

    fn block_all() -> io::Result<()> {
        Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?)
    }

    /// As a daemon manager may leave it: SIGCHLD at its default, but with zombies refused.
    fn refuse_zombies() -> io::Result<()> {
        let action = SigAction::new(SigHandler::SigDfl, SaFlags::SA_NOCLDWAIT, SigSet::empty());
        // SAFETY: no handler is installed.
        unsafe { sigaction(Signal::SIGCHLD, &action) }?;
        Ok(())
    }

    fn limit() -> io::Result<()> {
        use rustix::process::{Resource, Rlimit, setrlimit};
        nix::sys::stat::umask(Mode::from_bits_truncate(0o027));
        for (resource, value) in [
            (Resource::Nofile, 200),
            (Resource::Core, 0),
            (Resource::Fsize, 1 << 30),
            (Resource::Cpu, 1000),
            (Resource::Stack, 4 << 20),
            (Resource::Memlock, 4096),
        ] {
            setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?;
        }
        Ok(())
    }

    /// A11: "signal mask, every disposition, umask, cwd, rlimits [...] = the caller's", A10
    #[test]
    fn every_disposition_the_mask_and_the_limits_are_as_without_a_server() {
        if nbdkit_differs("A11: SIGPIPE is ignored, SIGINT and SIGHUP are not, umask is 0022") {
            return;
        }
        // No shell that looks: what is executed last shows what it was given.
        let commands = [
            "exec grep -E '^(SigPnd|SigBlk|SigIgn|SigCgt|ShdPnd|Umask|NoNewPrivs|Seccomp:|Groups|Cap|Cpus_allowed:)' /proc/self/status",
            "exec cat /proc/self/limits /proc/self/timerslack_ns /proc/self/oom_score_adj /proc/self/coredump_filter",
            "exec readlink /proc/self/cwd /proc/self/root",
            "exec python3 -c 'import signal
for number in range(1, 65):
    try: print(number, signal.getsignal(number))
    except ValueError: pass
print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))'",
        ];
        let room = Room::new();
        let prepare: [fn() -> io::Result<()>; 5] = [|| Ok(()), ignore_all, block_all, refuse_zombies, limit];
        for (index, prepare) in prepare.into_iter().enumerate() {
            for command in commands {
                let alone = room.tool("sh", ["-c", command]).in_child(prepare).run_to(0);
                let captive = room.captive(["memory", "1M"], command).in_child(prepare).run_to(0);
                assert_eq!(captive.text(), alone.text(), "{command}, prepared as {index}");
                assert_eq!(captive.stderr, alone.stderr);
            }
        }
        room.assert_nothing_left();
    }

    /// A10, B16: "works; C still gets the caller's mask"
    #[test]
    fn with_every_signal_blocked_or_ignored_the_status_is_right() {
        if nbdkit_differs("A10: status 1, the real one is lost") {
            return;
        }
        for prepare in [ignore_all as fn() -> io::Result<()>, block_all, refuse_zombies] {
            let room = Room::new();
            room.captive(["memory", "1M"], "nbdinfo --size \"$uri\"; exit 3").in_child(prepare).run_to(3);
            room.assert_nothing_left();
        }
    }

    /// B16: SIGTERM works although it is blocked; the command has it blocked too, so the grace period ends it
    #[test]
    fn a_captive_server_that_inherits_a_mask_can_still_be_ended() {
        if nbdkit_differs("B16: cannot be terminated at all") {
            return;
        }
        let room = Room::new();
        let mut ready = room.fifo("ready");
        let mut launch = room.captive(["--grace-period=0.1", "memory", "1M"], "echo here > ready; exec sleep 1000");
        let running = launch.in_child(block_all).start();
        ready.hear();
        running.signal(Signal::SIGTERM);
        running.finish().expect(137);
        room.assert_nothing_left();
    }
}

mod how_it_ends {
    use super::*;

    /// A5: "left alone as A4, one `-v` line that names pid and what it lost"
    #[test]
    fn what_a_command_leaves_behind_is_named() {
        if nbdkit_differs("A5: nothing says so") {
            return;
        }
        let room = Room::new();
        let mut ready = room.fifo("ready");
        let mut go = room.fifo("go");
        let command = "setsid sh -c 'echo $$ > ready; read x < go' > /dev/null 2>&1 & read x < started; exit 3";
        let mut started = room.fifo("started");
        let running = room.captive(["-v", "memory", "1M"], command).start();
        let pid = ready.hear();
        started.tell();
        let output = running.finish().expect(3);
        let named = format!("the command has left these behind, without a server: {pid} (sh)");
        assert!(output.stderr.contains(&named), "{output:#?}");
        go.tell();
    }

    /// A12, without any precaution: "status of C, clean"
    #[test]
    fn a_command_that_signals_its_group_as_it_ends_ends_us_as_it_would_have_ended_a_shell() {
        let room = Room::new();
        let mut launch = room.captive(["memory", "1M"], "trap 'kill 0' EXIT; exit 3");
        let output = launch.in_child(own_group).run();
        assert_eq!(output.shell_status(), 143, "{output:#?}");
        room.assert_nothing_left();
    }

    /// A12: "never forwarded back"
    #[test]
    fn a_signal_that_the_command_sends_to_its_group_does_not_come_back_to_it() {
        if nbdkit_differs("A12: the whole group gets TERM, 143") {
            return;
        }
        for sender in ["kill 0", "sh -c 'trap \"\" TERM; kill 0; read x < go' &"] {
            let room = Room::new();
            let mut ready = room.fifo("ready");
            let mut go = room.fifo("go");
            // The front process gets SIGTERM and then, by itself, SIGWINCH, which it passes on in that order. A shell that waits in
            // read for something else may not look at a signal that came just before.
            let command = format!(
                "trap 'echo again >> terms' TERM; trap 'echo winch > ready' WINCH
                 {sender}
                 while ! test -s terms; do :; done; echo here > ready; while ! test -e leave; do :; done; exit 3"
            );
            let mut launch = room.captive(["-v", "memory", "1M"], command);
            let running = launch.in_child(own_group).start();
            ready.hear();
            running.signal(Signal::SIGWINCH);
            assert_eq!(ready.hear(), "winch");
            go.tell();
            room.write("leave", "");
            let output = running.finish().expect(3);
            assert!(!output.stderr.contains("received signal 15"), "{output:#?}");
            assert_eq!(fs::read_to_string(room.path("terms")).expect("it was told"), "again\n");
            room.assert_nothing_left();
        }
    }

    /// A13: "survives; we only reap it", whatever ends us
    #[test]
    fn children_that_the_caller_had_before_it_executed_us_survive() {
        for end in ["exit", "TERM", "guardian"] {
            let room = Room::new();
            let mut ready = room.fifo("ready");
            let mut alive = room.fifo("alive");
            let mut go = room.fifo("go");
            let script = "{ read x < go; echo alive > alive; } > /dev/null 2>&1 & exec \"$@\"";
            let mut launch = room.tool("sh", ["-c", script, "sh"]);
            launch.args([server_path()]).args(["-U", "s", "memory", "1M", "--run"]);
            launch.args([if end == "exit" { "echo here > ready; exit 3" } else { "echo here > ready; sleep 1000" }]);
            let running = launch.start();
            ready.hear();
            let status = match end {
                "exit" => 3,
                _ if nbdkit_differs("B1, B12") => continue,
                "TERM" => {
                    running.signal(Signal::SIGTERM);
                    143
                }
                _ => {
                    kill(our_process(&room, "nbdguard"), Signal::SIGKILL).expect("the process is there");
                    137
                }
            };
            assert_eq!(running.finish().shell_status(), status, "{end}");
            assert!(room.server_processes().is_empty());
            go.tell();
            assert_eq!(alive.hear(), "alive", "{end}");
            room.wait_until_nothing_left();
        }
    }
}

mod signals {
    use super::*;

    /// B2: "if HUP was ignored at our start (`nohup`) it stays ignored", whichever of our processes gets it
    #[test]
    fn a_hangup_is_ignored_if_the_caller_ignored_it() {
        if nbdkit_differs("B2: nbdkit under nohup exits on HUP") {
            return;
        }
        let room = Room::new();
        let mut ready = room.fifo("ready");
        let command = "trap 'nbdinfo --size \"$uri\"; kill $!; exit 4' USR1; sleep 1000 & echo here > ready; wait";
        let mut launch = room.captive(["-v", "memory", "1M"], command);
        launch.in_child(|| {
            // SAFETY: no handler is installed.
            unsafe { signal(Signal::SIGHUP, SigHandler::SigIgn) }?;
            Ok(())
        });
        let running = launch.start();
        ready.hear();
        for name in ["nbdserve", "nbdguard", "nbdcaptive"] {
            kill(our_process(&room, name), Signal::SIGHUP).expect("the process is there");
        }
        // Read after the other, whose number is lower.
        running.signal(Signal::SIGUSR1);
        let output = running.finish().expect(4);
        assert_eq!(output.text(), "1048576\n");
        assert!(!output.stderr.contains("received signal 1\n"), "{output:#?}");
        room.assert_nothing_left();
    }

    /// B2: "as B1 but C gets HUP"
    #[test]
    fn a_hangup_is_passed_on() {
        if nbdkit_differs("B2: as B1") {
            return;
        }
        let room = Room::new();
        let command = "trap 'nbdinfo --size \"$uri\"; exit 8' HUP; sh -c 'echo here > ready; exec sleep 1000'; :";
        let running = start(&room, &["memory", "1M"], command);
        running.signal(Signal::SIGHUP);
        let output = running.finish().expect(8);
        assert_eq!(output.text(), "1048576\n");
        room.assert_nothing_left();
    }

    /// B3: "forwarded to C's session, as the terminal would have; 130/131"
    #[test]
    fn an_interrupt_by_kill_reaches_what_the_command_waits_for() {
        if nbdkit_differs("B3: ignored") {
            return;
        }
        for (signal, name) in [(Signal::SIGINT, "INT"), (Signal::SIGQUIT, "QUIT")] {
            let room = Room::new();
            // The shell looks at its trap only when its child has ended.
            let child = "sh -c 'echo here > ready; exec sleep 1000'";
            let command = format!("ulimit -c 0; trap 'exit 9' {name}; {child}; :");
            let running = start(&room, &["memory", "1M"], &command);
            running.signal(signal);
            running.finish().expect(9);
            room.assert_nothing_left();
        }
    }

    /// B1: one that is stopped is told as well
    #[test]
    fn a_command_that_is_stopped_is_ended() {
        if nbdkit_differs("B1: ignored until the command ends") {
            return;
        }
        for signal in [Signal::SIGTERM, Signal::SIGHUP] {
            let room = Room::new();
            let command = "sh -c 'kill -STOP $$; :' & echo $$ > ready; kill -STOP $$; wait";
            let mut ready = room.fifo("ready");
            let running = room.captive(["--grace-period=3600", "memory", "1M"], command).start();
            let pid = ready.hear();
            wait_for("the command to stop", || is_in_state(&pid, 'T').then_some(()));
            running.signal(signal);
            running.finish().expect_signal(signal);
            room.assert_nothing_left();
        }
    }

    /// B8: "forwarded to C (USR1, USR2, WINCH, ALRM, RT)"
    #[test]
    fn window_changes_and_real_time_signals_are_passed_on() {
        if nbdkit_differs("B8: the front process dies of it") {
            return;
        }
        for number in [Signal::SIGWINCH as i32, Signal::SIGURG as i32, Signal::SIGIO as i32, 40, 64] {
            let room = Room::new();
            // Waits for a signal that is blocked: none can come between.
            let script =
                "import signal, sys; number = int(sys.argv[1]); signal.pthread_sigmask(signal.SIG_BLOCK, [number])
open('ready', 'w').write('here\\n'); sys.exit(21 if signal.sigwait([number]) == number else 1)";
            let running = start(&room, &["memory", "1M"], &format!("exec python3 -c \"{script}\" {number}"));
            // SAFETY: kill(2) touches no memory of ours, and the process is ours.
            assert_eq!(unsafe { nix::libc::kill(running.pid(), number) }, 0);
            running.finish().expect(21);
            room.assert_nothing_left();
        }
    }

    /// B8: an alarm that the caller set before it executed us is the command's, as it would be without us
    #[test]
    fn an_alarm_that_was_set_before_reaches_the_command() {
        if nbdkit_differs("B8: the front process dies of it") {
            return;
        }
        let room = Room::new();
        // The command has it blocked as the caller has, and so it waits for the command to wait for it, whoever is slower.
        let script = "import signal, sys; sys.exit(21 if signal.sigwait([signal.SIGALRM]) == signal.SIGALRM else 1)";
        let mut launch = room.captive(["memory", "1M"], format!("exec python3 -c '{script}'"));
        launch.in_child(|| {
            let set = SigSet::from_iter([Signal::SIGALRM]);
            sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
            nix::unistd::alarm::set(1);
            Ok(())
        });
        launch.run_to(21);
        room.assert_nothing_left();
    }

    /// B8, B18: a signal for the command that comes before it was started is not lost
    #[test]
    fn a_signal_for_the_command_waits_for_its_start() {
        if nbdkit_differs("B8: the front process dies of it") {
            return;
        }
        let room = Room::new();
        mkfifo(&room.path("pid"), Mode::S_IRUSR | Mode::S_IWUSR).expect("a named pipe in the room");
        let running = room.captive(["-P", "pid", "memory", "1M"], "sleep 1000; :").start();
        wait_for("all processes", || (room.server_processes().len() == 4).then_some(()));
        running.signal(Signal::SIGUSR2);
        // Now the server can go on.
        fs::read(room.path("pid")).expect("a pid");
        running.finish().expect(128 + Signal::SIGUSR2 as i32);
        room.assert_nothing_left();
    }

    /// B11: "same as B1", for each of our processes: signals to the guardian end everything orderly too
    #[test]
    fn sigterm_to_any_of_our_processes_is_an_orderly_end() {
        if nbdkit_differs("B11: the command runs on without a server") {
            return;
        }
        for name in ["nbdserve", "nbdguard", "nbdcaptive"] {
            let room = Room::new();
            let command = "trap 'nbdinfo --size \"$uri\"; exit 7' TERM; sleep 1000 & echo here > ready; wait";
            let running = start(&room, &["memory", "1M"], command);
            kill(our_process(&room, name), Signal::SIGTERM).expect("the process is there");
            let output = running.finish().expect(7);
            assert_eq!(output.text(), "1048576\n", "{name}");
            room.assert_nothing_left();
        }
    }

    /// B1: a shell's child is a shell until it executes its program, and what it is told until then the program never hears
    #[test]
    fn a_process_that_was_told_before_it_became_its_program_is_told_again_when_the_command_has_ended() {
        if nbdkit_differs("B1: ignored until the command ends") {
            return;
        }
        let room = Room::new();
        let command = "sh -c 'trap : TERM; echo here > ready; while ! test -e go-on; do :; done; exec sleep 1000' &
            trap 'touch go-on; while ! grep -q sleep /proc/$!/comm; do :; done; exit 7' TERM; wait";
        let running = start(&room, &["--grace-period=3600", "memory", "1M"], command);
        // It catches them, and so does the shell above it, once it waits.
        wait_for("both to catch the signal", || {
            let caught = |process: &Process| {
                let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap_or_default();
                let set = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or_default();
                u64::from_str_radix(set.trim(), 16).unwrap_or_default() & 1 << 14 != 0
            };
            let is_shell = |one: &&Process| one.executable.file_name().is_some_and(|name| name != "nbdcaptive");
            (room.processes().iter().filter(is_shell).filter(|one| caught(one)).count() == 2).then_some(())
        });
        running.signal(Signal::SIGTERM);
        running.finish().expect(7);
        room.assert_nothing_left();
    }

    /// B15: "Earlier repeats are one request"
    #[test]
    fn several_repeats_at_once_are_one_request() {
        if nbdkit_differs("B1: ignored until the command ends") {
            return;
        }
        let room = Room::new();
        let mut asked = room.fifo("asked");
        let mut go = room.fifo("go");
        let command = "trap 'trap \"\" TERM; echo asked > asked; read x < go; nbdinfo --size \"$uri\"; exit 7' TERM
            echo here > ready; sleep 1000 & wait";
        let running = start(&room, &["-v", "memory", "1M"], command);
        // Looked up before, so that they come within the quarter of a second.
        let ours = ["nbdserve", "nbdguard", "nbdcaptive", "nbdguard", "nbdcaptive", "nbdserve"];
        for pid in ours.map(|name| our_process(&room, name)) {
            kill(pid, Signal::SIGTERM).expect("the process is there");
        }
        asked.hear();
        go.tell();
        let output = running.finish().expect(7);
        assert_eq!(output.text(), "1048576\n");
        assert!(!output.stderr.contains("killing"), "{output:#?}");
        room.assert_nothing_left();
    }

    /// B15: "`timeout(1)` signals our pid and then its whole group plus SIGCONT"; "`timeout 1` must still be graceful"
    #[test]
    fn timeout_ends_a_command_gracefully() {
        if nbdkit_differs("B1: ignored until the command ends") {
            return;
        }
        let room = Room::new();
        let mut ready = room.fifo("ready");
        let command = "trap 'nbdinfo --size \"$uri\"; exit 7' TERM; sleep 1000 & echo here > ready; wait";
        let mut launch = room.tool("timeout", ["1000"]);
        launch.args([server_path()]).args(["memory", "1M", "--run", command]);
        let timeout = launch.start();
        ready.hear();
        // Its timer sends it no other.
        timeout.signal(Signal::SIGALRM);
        let output = timeout.finish().expect(124);
        assert_eq!(output.text(), "1048576\n", "{output:#?}");
        room.assert_nothing_left();
    }

    /// B15: "immediate KILL of tree, in-flight I/O abandoned, still clean", where the server does not answer either
    #[test]
    fn a_second_sigterm_ends_a_server_that_is_stopped() {
        if nbdkit_differs("B15: no effect, ever") {
            return;
        }
        let room = Room::new();
        let command = "trap '' TERM; echo here > ready; sleep 1000; sleep 1000";
        let slow = ["-v", "--grace-period=3600", "--drain-timeout=3600", "-P", "pid", "memory", "1M"];
        let running = start(&room, &slow, command);
        kill(our_process(&room, "nbdserve"), Signal::SIGSTOP).expect("the process is there");
        running.signal(Signal::SIGTERM);
        // Two that wait together are one.
        wait_for("the first to be seen", || running.stderr().contains("received signal 15").then_some(()));
        // Not to wait for something: the time between the two is what tells them from one.
        thread::sleep(Duration::from_millis(400));
        running.signal(Signal::SIGTERM);
        assert_eq!(running.finish().shell_status(), 137);
        assert!(!room.path("pid").exists());
        room.assert_nothing_left();
    }

    /// B17: "status 1 if C's was 0", "message"
    #[test]
    fn a_server_that_is_stopped_is_killed_after_the_drain() {
        if nbdkit_differs("B17: waits for ever") {
            return;
        }
        let room = Room::new();
        let arguments = ["--drain-timeout=0.1", "-P", "pid", "memory", "1M"];
        let output = room.captive(arguments, "kill -STOP $(cat pid); exit 0").run_to(1);
        output.expect_error_line(&["the server did not end in time"]);
        assert!(!room.path("pid").exists());
        room.assert_nothing_left();
    }

    /// B1, B17: as a server, so the guardian: stopped, it goes on at once, because nobody else could act for it
    #[test]
    fn a_guardian_that_is_stopped_goes_on() {
        if nbdkit_differs("it has none") {
            return;
        }
        let room = Room::new();
        let running = start(&room, &["memory", "1M"], "echo here > ready; exec sleep 1000");
        for _ in 0..3 {
            kill(our_process(&room, "nbdguard"), Signal::SIGSTOP).expect("the process is there");
        }
        running.signal(Signal::SIGTERM);
        running.finish().expect_signal(Signal::SIGTERM);
        room.assert_nothing_left();
    }

    /// B18: "clean at every instant of start", "[the command] is never started"
    #[test]
    fn a_signal_before_the_command_was_started_ends_us_and_it_never_is() {
        if nbdkit_differs("B18: temporary directories are left") {
            return;
        }
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
            let room = Room::new();
            // The server gets no further than this, because nobody reads.
            mkfifo(&room.path("pid"), Mode::S_IRUSR | Mode::S_IWUSR).expect("a named pipe in the room");
            let arguments = ["-P", "pid", "--grace-period=0.1", "memory", "1M"];
            let mut launch = room.captive(arguments, "touch started");
            let witness = Witness::new(&mut launch);
            let running = launch.start();
            wait_for("all processes", || (room.server_processes().len() == 4).then_some(()));
            running.signal(signal);
            running.finish().expect_signal(signal);
            assert!(witness.all_are_gone());
            assert!(!room.path("started").exists());
            room.assert_nothing_left();
        }
    }

    /// B18: the same, with a server that is ready soon after: it ends by itself, in order
    #[test]
    fn a_server_that_becomes_ready_after_the_signal_ends_in_order() {
        if nbdkit_differs("B18: dies at once, temporary directories are left") {
            return;
        }
        let room = Room::new();
        mkfifo(&room.path("pid"), Mode::S_IRUSR | Mode::S_IWUSR).expect("a named pipe in the room");
        let mut launch = room.captive(["-v", "-P", "pid", "--grace-period=3600", "memory", "1M"], "touch started");
        let running = launch.start();
        wait_for("all processes", || (room.server_processes().len() == 4).then_some(()));
        running.signal(Signal::SIGTERM);
        wait_for("the guardian to know", || running.stderr().contains("before the command was started").then_some(()));
        fs::read(room.path("pid")).expect("a pid");
        let output = running.finish().expect_signal(Signal::SIGTERM);
        assert!(!output.stderr.contains("error"), "{output:#?}");
        assert!(!room.path("started").exists());
        room.assert_nothing_left();
    }

    /// B18: R, one process at a time: SIGTERM to the front process, and SIGKILL to it or the newest of the others
    #[test]
    fn a_signal_at_any_moment_of_the_start_leaves_nothing() {
        if nbdkit_differs("B18: temporary directories are left") {
            return;
        }
        for round in 0..60_u64 {
            let room = Room::new();
            let mut launch = room.captive(["--grace-period=0.1", "-P", "pid", "memory", "1M"], "sleep 1000");
            let witness = Witness::new(&mut launch);
            let running = launch.start();
            // Not to wait for something: the moment is what varies, from 0 to 10 ms.
            thread::sleep(Duration::from_micros(round / 3 * 500));
            let newest = room.server_processes().last().map_or(running.pid(), |one| one.pid);
            let (pid, signal) = match round % 3 {
                0 => (running.pid(), Signal::SIGTERM),
                1 => (running.pid(), Signal::SIGKILL),
                _ => (newest, Signal::SIGKILL),
            };
            // It may have become the command, or have gone.
            let _ = kill(Pid::from_raw(pid), signal);
            witness.wait_until_all_are_gone();
            room.wait_until_nothing_left();
            let output = running.finish();
            assert_ne!(output.status.code(), Some(0), "round {round}: {output:#?}");
            assert!(!room.path("pid").exists(), "round {round}");
        }
    }

    /// B1: "why it is ending, what it is waiting for, how long that took, and the exit status", each on one line of `-v`
    #[test]
    fn verbose_lines_tell_the_end() {
        if nbdkit_differs("its lines are others") {
            return;
        }
        let room = Room::new();
        let command = "trap '' TERM; (exec 2> /dev/null; sleep 1000) & echo here > ready; sleep 1000; sleep 1000";
        let running = start(&room, &["-v", "--grace-period=0.1", "memory", "1M"], command);
        running.signal(Signal::SIGTERM);
        let output = running.finish().expect(137);
        for line in [
            "debug: received signal 15 from process",
            "debug: ending: received signal 15",
            "debug: waiting for the command",
            "external command was killed by signal 9",
            "after it was told to, exit status 137",
        ] {
            let count = output.stderr.lines().filter(|one| one.contains(line)).count();
            assert!(count >= 1, "{line:?} is not in {output:#?}");
        }
        // By itself, where the guardian was killed.
        let room = Room::new();
        let running = start(&room, &["-v", "memory", "1M"], "echo here > ready; exec sleep 1000");
        kill(our_process(&room, "nbdguard"), Signal::SIGKILL).expect("the process is there");
        let output = running.finish().expect(137);
        for line in [
            "error: the guardian process was killed",
            "debug: ending: the guardian process was killed; waiting for ",
            ", exit status 137",
        ] {
            assert!(output.stderr.contains(line), "{line:?} is not in {output:#?}");
        }
        room.assert_nothing_left();
    }
}

mod idle {
    use super::*;

    /// What a process has used, in clock ticks, and how often it was woken.
    fn used(pid: Pid) -> (u64, u64) {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process is there");
        let fields: Vec<&str> = stat.rsplit_once(')').expect("the name is in brackets").1.split_whitespace().collect();
        let ticks = |index: usize| fields[index].parse::<u64>().expect("a number");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
        let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        (ticks(11) + ticks(12), switches.expect("a line of its own").trim().parse().expect("a number"))
    }

    /// All of our processes of a room come to sleep: there is a second in which each does next to nothing. Who spins has none.
    fn expect_idle(room: &Room, what: &str) {
        let ours: Vec<Pid> = room.server_processes().iter().map(|one| Pid::from_raw(one.pid)).collect();
        assert!(!ours.is_empty());
        wait_for(&format!("{what}: our processes to sleep"), || {
            let before: Vec<_> = ours.iter().map(|pid| used(*pid)).collect();
            // Not to wait for something: this is how long is measured.
            thread::sleep(Duration::from_secs(1));
            let idle = |(pid, before): (&Pid, &(u64, u64))| {
                let after = used(*pid);
                let (ticks, wakes) = (after.0 - before.0, after.1 - before.1);
                // Shown where the test fails.
                eprintln!("{what}: {pid} used {ticks} ticks and woke {wakes} times in a second");
                ticks <= 5 && wakes <= 20
            };
            let busy = ours.iter().zip(&before).filter(|one| !idle(*one)).count();
            (busy == 0).then_some(())
        });
    }

    const STUBBORN: &str = "trap '' TERM; echo here > ready; sleep 1000; sleep 1000";
    const PATIENT: [&str; 7] = ["-v", "--grace-period=3600", "--drain-timeout=3600", "-U", "s", "memory", "1M"];

    /// B1: "S spins at 50-97 % CPU" (T), in every state that can last
    #[test]
    fn nobody_spins_while_a_stubborn_command_is_waited_for() {
        if nbdkit_differs("B1: the server spins") {
            return;
        }
        let room = Room::new();
        let running = start(&room, &PATIENT, STUBBORN);
        let _client = idle_client(&room);
        expect_idle(&room, "before the end");
        running.signal(Signal::SIGTERM);
        wait_for("the signal to be seen", || running.stderr().contains("waiting for the command").then_some(()));
        expect_idle(&room, "in the grace period");
    }

    /// B1: the same, while the rest of a tree is waited for
    #[test]
    fn nobody_spins_while_the_rest_of_a_tree_is_waited_for() {
        if nbdkit_differs("B1: the server spins") {
            return;
        }
        let room = Room::new();
        let command = "sh -c 'trap \"\" TERM; sh -c \"echo here > ready; sleep 1000; sleep 1000\"; :' & wait";
        let running = start(&room, &PATIENT, command);
        running.signal(Signal::SIGTERM);
        wait_for("the server to end", || (room.server_processes().len() == 2).then_some(()));
        expect_idle(&room, "while a tree is left");
    }

    /// B12, B17: the same, where the front process stands by for its guardian, and where a server is stopped
    #[test]
    fn nobody_spins_where_one_of_us_is_missing() {
        if nbdkit_differs("it has no guardian") {
            return;
        }
        let room = Room::new();
        let running = start(&room, &PATIENT, STUBBORN);
        kill(our_process(&room, "nbdguard"), Signal::SIGKILL).expect("the process is there");
        let standing_by = "ending: the guardian process was killed";
        wait_for("the end of the guardian to be seen", || running.stderr().contains(standing_by).then_some(()));
        expect_idle(&room, "standing by");

        let room = Room::new();
        let running = start(&room, &PATIENT, STUBBORN);
        kill(our_process(&room, "nbdserve"), Signal::SIGSTOP).expect("the process is there");
        running.signal(Signal::SIGTERM);
        let without_it = "the server does not answer to signal 15";
        wait_for("the server to be given up", || running.stderr().contains(without_it).then_some(()));
        expect_idle(&room, "with a server that is stopped");

        let room = Room::new();
        let running = start(&room, &PATIENT, STUBBORN);
        running.signal(Signal::SIGKILL);
        let alone = "ending: the front process was killed";
        wait_for("its end to be seen", || running.stderr().contains(alone).then_some(()));
        expect_idle(&room, "without a front process");
    }
}

/// Whether a process is in this state, as /proc has it.
fn is_in_state(pid: &str, state: char) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(state))
}

/// B17, B12: a server whose guardian was killed while it could not say who it is, is ended too
#[test]
fn a_guardian_that_is_killed_before_the_server_is_ready_leaves_nothing() {
    if nbdkit_differs("it has none") {
        return;
    }
    let room = Room::new();
    mkfifo(&room.path("pid"), Mode::S_IRUSR | Mode::S_IWUSR).expect("a named pipe in the room");
    let arguments = ["-P", "pid", "--grace-period=0.1", "--drain-timeout=0.1", "memory", "1M"];
    let mut launch: Launch = room.captive(arguments, "touch started");
    let running = launch.start();
    wait_for("all processes", || (room.server_processes().len() == 4).then_some(()));
    kill(our_process(&room, "nbdguard"), Signal::SIGKILL).expect("the process is there");
    running.finish().expect(137);
    assert!(!room.path("started").exists());
    room.assert_nothing_left();
}

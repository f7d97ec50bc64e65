//! `--run` at a terminal: what is typed is the command's, and the caller's shell sees what it would see without a server.
//! A real pseudo-terminal, and mostly a real `bash -i` on it, as the controlling terminal of a session of its own.
//! The letters and numbers in the comments are the rows of the lifetime catalogue in docs/.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

use super::harness::{DEADLINE, Launch, Room, Witness, nbdkit_differs, server_path, wait_for};
use super::raw_client::Client;

const CTRL_C: &str = "\x03";
const CTRL_BACKSLASH: &str = "\x1c";
const CTRL_Z: &str = "\x1a";
const PROMPT: &str = "prompt> ";

/// The side of a terminal where people sit. Dropped, it hangs up.
struct Terminal {
    master: OwnedFd,
    text: String,
    /// What was waited for ends here.
    seen: usize,
}

impl Terminal {
    /// Makes `launch` the leader of a session on a new terminal, which does not show what is typed.
    fn new(launch: &mut Launch) -> Terminal {
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).expect("a pseudo-terminal");
        grantpt(&master).expect("it is ours");
        unlockpt(&master).expect("it is ours");
        let name = ptsname_r(&master).expect("it has a name");
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let slave = open(Path::new(&name), flags, Mode::empty()).expect("the other side");
        let mut settings = tcgetattr(&slave).expect("a terminal");
        settings.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(&slave, SetArg::TCSANOW, &settings).expect("a terminal");
        let number = slave.as_raw_fd();
        launch.inherit(slave);
        launch.in_child(move || {
            nix::unistd::setsid()?;
            // A test that runs in the background of a script has them ignored, and so would the command.
            for one in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTSTP] {
                // SAFETY: no handler is installed.
                unsafe { nix::sys::signal::signal(one, nix::sys::signal::SigHandler::SigDfl) }?;
            }
            // SAFETY: plain system calls on a descriptor that `inherit` keeps open until the process has started.
            unsafe {
                if libc::ioctl(number, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                for stdio in 0..3 {
                    if libc::dup2(number, stdio) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                libc::close(number);
            }
            Ok(())
        });
        Terminal { master: into_fd(master), text: String::new(), seen: 0 }
    }

    fn type_in(&self, text: &str) {
        let mut bytes = text.as_bytes();
        while !bytes.is_empty() {
            let count = nix::unistd::write(&self.master, bytes).expect("the terminal takes what is typed");
            bytes = &bytes[count..];
        }
    }

    /// Waits until the terminal shows this, after what was waited for before, and says what it showed since then.
    #[track_caller]
    fn wait_for(&mut self, wanted: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(at) = self.text[self.seen..].find(wanted) {
                let since = self.text[self.seen..][..at].to_owned();
                self.seen += at + wanted.len();
                return since;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PollTimeout::try_from(left).expect("deadlines are short"));
            assert_eq!(ready, Ok(1), "{wanted:?} was not shown: {:?}", self.text);
            let mut buffer = [0; 4096];
            let count = nix::unistd::read(&self.master, &mut buffer).unwrap_or(0);
            assert!(count > 0, "nobody is left at the terminal, and {wanted:?} was not shown: {:?}", self.text);
            self.text += &String::from_utf8_lossy(&buffer[..count]);
        }
    }
}

fn into_fd(master: nix::pty::PtyMaster) -> OwnedFd {
    // SAFETY: the number is that of an open descriptor, of which the former owner lets go here.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(master)) }
}

/// An interactive shell at a terminal, at its first prompt. `$SERVER` is the server.
fn bash(room: &Room) -> (super::harness::Running, Terminal) {
    let mut launch = room.tool("bash", ["--norc", "--noprofile", "--noediting", "-i"]);
    launch.env("PS1", PROMPT).env("SERVER", server_path()).env("HISTFILE", "");
    let mut terminal = Terminal::new(&mut launch);
    let running = launch.start();
    terminal.wait_for(PROMPT);
    (running, terminal)
}

/// Whether a process is stopped.
fn is_stopped(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
}

fn idle_client(room: &Room) -> Client {
    let mut client = Client::connect(&room.path("s"));
    client.start();
    client.go(b"");
    client.expect_alive();
    client
}

/// B4: "O dies of SIGINT (`$?`=130), loop stops", A2
#[test]
fn ctrl_c_stops_the_loop_of_an_interactive_shell() {
    if nbdkit_differs("B4: exits 130 normally, so the loop goes on") {
        return;
    }
    let room = Room::new();
    let (running, mut terminal) = bash(&room);
    let round = "\"$SERVER\" memory 1M --run 'echo here; exec sleep 1000'";
    terminal.type_in(&format!("for i in 1 2 3; do {round}; done; echo loop-$((40 + 2))\n"));
    terminal.wait_for("here");
    terminal.type_in(CTRL_C);
    let shown = terminal.wait_for(PROMPT);
    assert!(!shown.contains("loop-42") && !shown.contains("here"), "{shown:?}");
    terminal.type_in("echo status-$?\n");
    assert_eq!(terminal.wait_for("\r\n"), "status-130");
    room.assert_tmpdir_empty();
    terminal.wait_for(PROMPT);
    terminal.type_in("exit\n");
    running.finish().expect(0);
    room.assert_nothing_left();
}

/// B4: a script as well as an interactive shell: each waits for its child and looks how it ended
#[test]
fn ctrl_c_ends_the_script_that_started_us() {
    if nbdkit_differs("B4: exits 130 normally, so the loop goes on") {
        return;
    }
    let room = Room::new();
    let script = "for i in 1 2 3; do \"$SERVER\" memory 1M --run 'echo here; exec sleep 1000'; done; echo loop-done";
    let mut launch = room.tool("bash", ["-c", script]);
    launch.env("SERVER", server_path());
    let mut terminal = Terminal::new(&mut launch);
    let running = launch.start();
    terminal.wait_for("here");
    terminal.type_in(CTRL_C);
    running.finish().expect_signal(Signal::SIGINT);
    room.assert_nothing_left();
}

/// B5: "S never sees terminal signals; C goes on working; status C's"
#[test]
fn a_command_that_handles_ctrl_c_goes_on_working_with_its_disk() {
    if nbdkit_differs("B5: the server dies, the command lives on without its disk") {
        return;
    }
    let room = Room::new();
    let (running, mut terminal) = bash(&room);
    // A shell that waits in read may not look at a signal that came just before, so it does not while signals come.
    let command = "trap \"nbdinfo --size \\\"\\$uri\\\"\" INT QUIT; echo here
        while ! test -e quiet; do :; done; echo reading; read x; nbdinfo --size \"$uri\"; exit 5";
    terminal.type_in(&format!("\"$SERVER\" -U s memory 1M --run '{command}'\n"));
    terminal.wait_for("here");
    let mut client = idle_client(&room);
    for key in [CTRL_C, CTRL_BACKSLASH, CTRL_C] {
        terminal.type_in(key);
        terminal.wait_for("1048576");
    }
    client.expect_alive();
    room.write("quiet", "");
    terminal.wait_for("reading");
    terminal.type_in("go on\n");
    terminal.wait_for("1048576");
    terminal.wait_for(PROMPT);
    client.expect_end();
    terminal.type_in("echo status-$?\n");
    assert_eq!(terminal.wait_for("\r\n"), "status-5");
    terminal.wait_for(PROMPT);
    terminal.type_in("exit\n");
    running.finish().expect(0);
    room.assert_nothing_left();
}

/// B6: "as B4/B5, 131"
#[test]
fn ctrl_backslash_ends_the_command_and_us() {
    if nbdkit_differs("B6: as B5") {
        return;
    }
    let room = Room::new();
    let mut launch = room.captive(["memory", "1M"], "ulimit -c 0; echo here; exec sleep 1000");
    let mut terminal = Terminal::new(&mut launch);
    let witness = Witness::new(&mut launch);
    let running = launch.start();
    terminal.wait_for("here");
    terminal.type_in(CTRL_BACKSLASH);
    let output = running.finish().expect_signal(Signal::SIGQUIT);
    assert_eq!(output.shell_status(), 131);
    assert!(witness.all_are_gone());
    room.assert_nothing_left();
}

/// B7: "tree TERM/HUP, clean", below a shell and as the first process of the session
#[test]
fn a_hangup_of_the_terminal_ends_everything() {
    let command = "sleep 1000 & setsid sleep 1000 & echo here; sleep 1000; :";
    for below_a_shell in [true, false] {
        let room = Room::new();
        let (running, mut terminal, witness) = if below_a_shell {
            let mut launch = room.tool("bash", ["--norc", "--noprofile", "--noediting", "-i"]);
            launch.env("PS1", PROMPT).env("SERVER", server_path()).env("HISTFILE", "");
            let mut terminal = Terminal::new(&mut launch);
            let witness = Witness::new(&mut launch);
            let running = launch.start();
            terminal.wait_for(PROMPT);
            terminal.type_in(&format!("\"$SERVER\" -P pid memory 1M --run '{command}'\n"));
            (running, terminal, witness)
        } else {
            let mut launch = room.captive(["-P", "pid", "memory", "1M"], command);
            let terminal = Terminal::new(&mut launch);
            let witness = Witness::new(&mut launch);
            (launch.start(), terminal, witness)
        };
        terminal.wait_for("here");
        if nbdkit_differs("B7: the pid file and detached parts of the command are left") {
            return;
        }
        drop(terminal);
        witness.wait_until_all_are_gone();
        room.wait_until_nothing_left();
        assert!(!room.path("pid").exists());
        running.finish();
    }
}

/// A9: "O and C stop (shell sees a stopped job), S keeps serving others; `fg` resumes, status right"
#[test]
fn ctrl_z_stops_the_job_while_others_are_served_and_fg_resumes_it() {
    if nbdkit_differs("A9: the server stops too") {
        return;
    }
    let room = Room::new();
    let mut pid = room.fifo("pid");
    let (running, mut terminal) = bash(&room);
    let command = "echo $$ > pid; echo here; read x; echo \"got $x\"; exit 7";
    terminal.type_in(&format!("\"$SERVER\" -U s memory 1M --run '{command}'\n"));
    let command: i32 = pid.hear().parse().expect("a number");
    terminal.wait_for("here");
    let mut client = idle_client(&room);
    for round in 0..3 {
        terminal.type_in(CTRL_Z);
        terminal.wait_for("Stopped");
        terminal.wait_for(PROMPT);
        wait_for("the command to stop", || is_stopped(command).then_some(()));
        client.expect_alive();
        idle_client(&room).disconnect();
        let stopped = room.server_processes().iter().filter(|one| is_stopped(one.pid)).count();
        assert_eq!(stopped, 1, "round {round}: only the front process is stopped");
        // Shows the job's command line, which has the same words.
        terminal.type_in("fg\n");
        terminal.wait_for("exit 7");
        wait_for("the job to go on", || {
            (!is_stopped(command) && room.server_processes().iter().all(|one| !is_stopped(one.pid))).then_some(())
        });
    }
    terminal.type_in("on\n");
    terminal.wait_for("got on");
    terminal.wait_for(PROMPT);
    terminal.type_in("echo status-$?\n");
    assert_eq!(terminal.wait_for("\r\n"), "status-7");
    client.expect_end();
    terminal.wait_for(PROMPT);
    terminal.type_in("exit\n");
    running.finish().expect(0);
    room.assert_nothing_left();
}

/// A9, where nobody could ever continue us: the kernel stops nobody in an orphaned group, and so we do not stop either
#[test]
fn ctrl_z_stops_nothing_where_there_is_no_shell_to_go_back_to() {
    let room = Room::new();
    let mut launch = room.captive(["memory", "1M"], "echo here; read x; echo \"got $x\"; exit 7");
    let mut terminal = Terminal::new(&mut launch);
    let running = launch.start();
    terminal.wait_for("here");
    terminal.type_in(CTRL_Z);
    terminal.type_in("on\n");
    terminal.wait_for("got on");
    running.finish().expect(7);
    room.assert_nothing_left();
}

/// B8, A9: SIGTSTP and SIGCONT by kill to the front process alone reach the command
#[test]
fn a_stop_by_kill_stops_the_command_and_a_continue_resumes_it() {
    if nbdkit_differs("B8: only the front process stops") {
        return;
    }
    let room = Room::new();
    let mut pid = room.fifo("pid");
    let mut go = room.fifo("go");
    // A group of its own, whose parent is in the same session: as a shell makes one.
    let mut launch = room.captive(["-U", "s", "memory", "1M"], "echo $$ > pid; read x < go; exit 6");
    launch.in_child(|| Ok(nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0))?));
    let running = launch.start();
    let command: i32 = pid.hear().parse().expect("a number");
    let stopped = || room.server_processes().iter().filter(|one| is_stopped(one.pid)).count();
    for _ in 0..3 {
        running.signal(Signal::SIGTSTP);
        wait_for("both to stop", || (is_stopped(command) && stopped() == 1).then_some(()));
        idle_client(&room).disconnect();
        running.signal(Signal::SIGCONT);
        wait_for("both to go on", || (!is_stopped(command) && stopped() == 0).then_some(()));
    }
    go.tell();
    running.finish().expect(6);
    room.assert_nothing_left();
}

/// B4, when there is no command: before it was started and after it has ended what is typed can be meant only for us
#[test]
fn ctrl_c_before_the_command_was_started_ends_us() {
    if nbdkit_differs("waits for a reader of the pid file") {
        return;
    }
    let room = Room::new();
    // The server gets no further than this, because nobody reads.
    nix::unistd::mkfifo(&room.path("pid"), Mode::S_IRUSR | Mode::S_IWUSR).expect("a named pipe in the room");
    let mut launch = room.captive(["-P", "pid", "--grace-period=0.2", "memory", "1M"], "touch started");
    let terminal = Terminal::new(&mut launch);
    let witness = Witness::new(&mut launch);
    let running = launch.start();
    // Front process, guardian, server, and the command's process before its shell is executed.
    wait_for("all processes", || (room.server_processes().len() == 4).then_some(()));
    terminal.type_in(CTRL_C);
    running.finish().expect_signal(Signal::SIGINT);
    assert!(witness.all_are_gone());
    assert!(!room.path("started").exists());
    room.assert_nothing_left();
}

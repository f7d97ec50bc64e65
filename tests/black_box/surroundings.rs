//! Surroundings that nobody would choose: directories of odd names and none at all, an empty environment, hardly a descriptor
//! or process to be had, full disks. The server works, or says in a line why not. The letters and numbers in the comments are
//! the rows of the lifetime catalogue; sentences in quotes are from it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{Launch, Output, Room, nbdkit_differs, server_path, wait_for};

/// A plugin of one file, for `sh`, that needs its directory.
const SCRIPT: &str = "#!/bin/sh
case $1 in
    get_size) echo 64K > \"$tmpdir/size\" && cat \"$tmpdir/size\" ;;
    pread) head -c \"$3\" /dev/zero ;;
    *) exit 2 ;;
esac
";

/// The server below a shell that does `how`, which ends in `"$@"`.
fn under<A: AsRef<OsStr>>(room: &Room, how: &str, arguments: impl IntoIterator<Item = A>) -> Launch {
    let mut launch = room.tool("sh", ["-c", how, "sh"]);
    launch.args([server_path()]).args(arguments);
    launch
}

/// Keeps what cargo and others have open from the process, so that it is known how many descriptors it has.
fn with_three_descriptors(launch: &mut Launch) {
    launch.in_child(|| {
        // SAFETY: marks descriptors, and touches no memory.
        match unsafe { nix::libc::close_range(3, u32::MAX, nix::libc::CLOSE_RANGE_CLOEXEC as i32) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    });
}

/// Ends the server in the background whose pid file this is.
fn end_by_pid_file(room: &Room, pid_file: &Path) {
    let pid = fs::read_to_string(pid_file).expect("it is whole when the launcher returns");
    kill(Pid::from_raw(pid.trim().parse().expect("a pid")), Signal::SIGTERM).expect("it serves");
    wait_for("the pid file to be removed", || (!pid_file.exists()).then_some(()));
    room.wait_until_nothing_left();
}

mod names {
    use super::*;

    /// E10: "under `$TMPDIR`", whatever that is called
    #[test]
    fn private_directories_are_made_wherever_tmpdir_is() {
        if nbdkit_differs("E10: TMPDIR is ignored") {
            return;
        }
        let names = [&b"two words"[..], b"$(touch x)`'\"\\", b"100%?&#;*", b"\xff\xfe not text", b"a\nline"];
        for name in names {
            let room = Room::new();
            let tmpdir = room.path(OsStr::from_bytes(name));
            fs::create_dir(&tmpdir).expect("a directory in the room");
            let script = room.script("script", SCRIPT);
            let command = "nbdinfo --size \"$uri\" && printf %s \"$unixsocket\" > where && test -S \"$unixsocket\"";
            for plugin in [&[OsStr::new("memory"), "64K".as_ref()][..], &["sh".as_ref(), script.as_ref()]] {
                let output = room.captive(plugin, command).env("TMPDIR", &tmpdir).run_to(0);
                assert_eq!((output.text(), output.stderr.as_str()), ("65536\n", ""));
                let socket = fs::read(room.path("where")).expect("the command ran");
                assert!(socket.starts_with(tmpdir.as_os_str().as_bytes()), "{}", socket.escape_ascii());
                assert_eq!(fs::read_dir(&tmpdir).expect("it is still there").count(), 0, "{}", name.escape_ascii());
                room.assert_nothing_left();
            }
        }
    }

    /// What is wrong, with which path, and what would be right: the path is not what the caller wrote.
    #[test]
    fn a_socket_s_path_that_is_too_long_is_named() {
        let room = Room::new();
        let long = "x".repeat(110);
        fs::create_dir(room.path(&long)).expect("a directory in the room");
        let path = room.path(&long).join("s");
        let length = path.as_os_str().len();
        for arguments in [&["-f"][..], &[], &["--run", "touch started"]] {
            let how = format!("cd {long} && exec \"$@\"");
            let output = under(&room, &how, [arguments, &["-U", "s", "-P", "pid", "memory", "1M"]].concat()).run_to(1);
            output.expect_error_line(&[&format!("-U: path too long: length {length} > max 107 bytes")]);
            if !nbdkit_differs("it does not say which path") {
                output.expect_error_line(&[path.to_str().expect("text")]);
            }
            assert_eq!(fs::read_dir(room.path(&long)).expect("it is there").count(), 0);
            room.assert_nothing_left();
        }
    }

    /// G5: for the directory of scripts, too
    #[test]
    fn a_directory_for_scripts_that_cannot_be_made_is_named() {
        if nbdkit_differs("E10: TMPDIR is ignored") {
            return;
        }
        let room = Room::new();
        let how = "mount -t tmpfs -o ro none tmp && exec \"$@\"";
        for plugin in [&["sh", "script"][..], &["eval", "get_size=echo 1M", "pread=exit 1"]] {
            room.script("script", SCRIPT);
            let mut launch = room.tool("unshare", ["--mount", "sh", "-c", how, "sh"]);
            launch.args([server_path()]).args(["-f", "-U", "s"]).args(plugin);
            let tmpdir = room.tmpdir();
            launch.run_to(1).expect_error_line(&["scripts", tmpdir.to_str().expect("text"), "Read-only file system"]);
            assert!(!room.path("s").exists());
            room.assert_nothing_left();
        }
    }
}

mod without {
    use super::*;

    /// Neither `PATH` nor `HOME` nor anything else but what marks the room's processes
    #[test]
    fn an_environment_that_is_all_but_empty_is_enough() {
        let room = Room::new();
        let script = room.script("script", SCRIPT);
        let script = script.to_str().expect("text");
        let how = "exec env -u PATH -u HOME -u LC_ALL -u USER -u SHELL -u LOGNAME -u LANG -u PWD \"$@\"";
        let log = "logscript=echo \"$act\" >> acts";
        for arguments in [&["memory", "64K"][..], &["sh", script], &["--filter=log", "memory", "64K", log]] {
            let command = "test -z \"${HOME-}\" && /usr/bin/nbdinfo --size \"$uri\"";
            let arguments = [&["-U", "-"], arguments, &["--run", command]].concat();
            let output = under(&room, how, arguments).run_to(0);
            assert_eq!((output.text(), output.stderr.as_str()), ("65536\n", ""));
            room.assert_nothing_left();
        }
        assert!(fs::read_to_string(room.path("acts")).expect("the log's script ran").contains("Connect"));
    }

    /// The directory that the server is started in is no more.
    #[test]
    fn a_directory_that_is_gone_is_missed_only_by_relative_paths() {
        if nbdkit_differs("it needs to know where it is") {
            return;
        }
        let room = Room::new();
        room.script("script", SCRIPT);
        let how = "mkdir gone && cd gone && rmdir ../gone && exec \"$@\"";
        let absolute = |name: &str| room.path(name).to_str().expect("text").to_owned();
        let (socket, pid, script) = (absolute("s"), absolute("pid"), absolute("script"));
        for arguments in [&["memory", "64K"][..], &["-U", &socket, "-P", &pid, "memory", "64K"], &["sh", &script]] {
            let output = under(&room, how, [arguments, &["--run", "nbdinfo --size \"$uri\""]].concat()).run_to(0);
            assert_eq!(output.text(), "65536\n", "{output:#?}");
            room.assert_nothing_left();
        }
        for (arguments, name) in [
            (&["-U", "s", "memory", "64K"][..], "'s'"),
            (&["-U", &socket, "-P", "pid", "memory", "64K"], "'pid'"),
            (&["-U", &socket, "file", "disk"], "disk"),
        ] {
            for mode in [&["-f"][..], &[], &["--run", "touch started"]] {
                under(&room, how, [mode, arguments].concat()).run_to(1).expect_error_line(&[name]);
                assert!(!Path::new(&socket).exists());
                room.assert_nothing_left();
            }
        }
        under(&room, how, ["-U", &socket, "-P", &pid, "memory", "64K"]).run_to(0);
        end_by_pid_file(&room, Path::new(&pid));
    }

    /// A11: "umask": nobody may do anything with a file of the caller's, and the server's are as ever
    #[test]
    fn a_umask_that_forbids_everything_keeps_nobody_out() {
        if nbdkit_differs("A11: it is 0022 in the command, too") {
            return;
        }
        let room = Room::new();
        let script = room.script("script", SCRIPT);
        // As another user, for whom permissions count.
        let server = room.open_to_all();
        let how = "umask 0777 && exec setpriv --reuid=61236 --regid=61236 --clear-groups \"$@\"";
        let command = "umask; cat pid > /dev/null && nbdinfo --size \"$uri\"";
        for plugin in [&[OsStr::new("memory"), "64K".as_ref()][..], &["sh".as_ref(), script.as_ref()]] {
            let mut launch = room.tool("sh", ["-c", how, "sh"]);
            launch.args([&server]).args(["--filter=log", "-P", "pid"]).args(plugin);
            let output = launch.args(["logfile=log", "--run", command]).run_to(0);
            assert_eq!((output.text(), output.stderr.as_str()), ("0777\n65536\n", ""));
            assert!(fs::read_to_string(room.path("log")).expect("it was made").contains("Connect"));
            room.assert_nothing_left();
        }
    }
}

mod short {
    use super::*;

    /// Either it serves, or it says in a line why it cannot; never does it listen and serve nobody. Whether it serves.
    fn serves_or_says_why(output: Output, size: &Path, why: &[&str]) -> bool {
        let served = fs::read(size).is_ok_and(|size| size == b"65536\n");
        let _ = fs::remove_file(size);
        if output.status.code() != Some(0) {
            assert!(!served, "{output:#?}");
            let output = output.expect(1);
            output.expect_error_line(&[]);
            assert!(why.iter().any(|why| output.stderr.contains(why)), "{output:#?}");
        } else {
            assert!(served, "{output:#?}");
        }
        served
    }

    /// G1: at the start: "status 1 and a line"
    #[test]
    fn a_server_that_may_have_few_descriptors_serves_or_says_why() {
        if nbdkit_differs("it serves nobody") {
            return;
        }
        const WHY: [&str; 2] = ["Too many open files", "descriptor"];
        let room = Room::new();
        room.write("disk", [0; 65536]);
        let size = room.path("size");
        // The command needs more.
        let command = "ulimit -n 1024; exec nbdinfo --size \"$uri\" > size";
        for plugin in [&["memory", "64K"][..], &["file", "disk"]] {
            let mut least = None;
            // With 3, which are those that it comes with, not even the program can be loaded.
            for limit in 4..=20 {
                let how = format!("exec prlimit --nofile={limit}:1024 \"$@\"");
                let mut launch = under(&room, &how, [plugin, &["--run", command]].concat());
                with_three_descriptors(&mut launch);
                let served = serves_or_says_why(launch.run(), &size, &WHY);
                assert!(served || least.is_none(), "served with fewer than {limit}");
                least = least.or(served.then_some(limit));
                room.assert_nothing_left();

                let mut launch = under(&room, &how, [&["-U", "s", "-P", "pid"], plugin].concat());
                with_three_descriptors(&mut launch);
                let output = launch.run();
                if output.status.code() == Some(0) {
                    let client = room.tool("nbdinfo", ["--size", "nbd+unix://?socket=s"]).run_to(0);
                    assert_eq!(client.text(), "65536\n", "{limit} descriptors");
                    end_by_pid_file(&room, &room.path("pid"));
                } else {
                    serves_or_says_why(output, &size, &WHY);
                    assert!(!room.path("s").exists() && !room.path("pid").exists());
                    room.assert_nothing_left();
                }
            }
            assert!(least.is_some_and(|least| least <= 16), "{least:?}");
        }
    }

    /// G6: threads are processes, too
    #[test]
    fn a_user_who_may_have_few_processes_is_served_or_told_why() {
        if nbdkit_differs("it serves nobody") {
            return;
        }
        const WHY: [&str; 2] = ["Resource temporarily unavailable", "thread"];
        let room = Room::new();
        let server = room.open_to_all();
        room.write("disk", [0; 65536]);
        let size = room.path("size");
        // One of its own, so that nobody else's processes count.
        let user = 1_000_000 + std::process::id();
        // A shell that knows this limit, and need not fork to raise it.
        let command = "exec bash -c 'ulimit -u 200; exec nbdinfo --size \"$0\" > size' \"$uri\"";
        let mut least = None;
        for limit in 1..=14 {
            let mut launch = room.tool("setpriv", [format!("--reuid={user}"), format!("--regid={user}")]);
            launch.args(["--clear-groups", "prlimit", &format!("--nproc={limit}:200")]);
            launch.args([&server]).args(["-r", "file", "disk", "--run", command]);
            let served = serves_or_says_why(launch.run(), &size, &WHY);
            assert!(served || least.is_none(), "served with fewer than {limit}");
            least = least.or(served.then_some(limit));
            room.assert_nothing_left();
        }
        assert!(least.is_some(), "14 are enough");
    }
}

mod full {
    use super::*;

    /// Whoever asked for it must not take half an answer for one, or none.
    #[test]
    fn an_answer_that_does_not_fit_on_stdout_is_an_error() {
        if nbdkit_differs("status 0") {
            return;
        }
        let room = Room::new();
        for question in [
            &["--help"][..],
            &["--version"],
            &["--dump-config"],
            &["--dump-plugin", "memory"],
            &["--man", "nbdcaptive"],
            &["--completion=bash"],
        ] {
            let output = under(&room, "exec \"$@\" > /dev/full", question).run_to(1);
            output.expect_error_line(&["stdout", "No space left on device"]);
        }
        let server = room.serve(["memory", "1M"]);
        let output = under(&room, "exec \"$@\" > /dev/full", ["--probe", &server.uri()]).run_to(1);
        output.expect_error_line(&["stdout", "No space left on device"]);
        server.terminate().expect(0);
    }

    /// A file system with room for names, and for a page of data.
    fn small(room: &Room) -> (PathBuf, &'static str) {
        (room.path("small"), "mkdir small && mount -t tmpfs -o size=4k none small && exec \"$@\"")
    }

    /// The requests go on, what is lost is said, and what is in the log are whole lines but for the last.
    #[test]
    fn a_log_of_requests_on_a_full_disk_holds_nobody_up() {
        let room = Room::new();
        let (small, how) = small(&room);
        let log = format!("logfile={}", small.join("log").display());
        // Room comes back when the filler goes, in the midst of a line.
        let command = "
            head -c 1000000 /dev/zero > data
            nbdcopy --request-size=4096 data \"$uri\" && nbdcopy --request-size=4096 \"$uri\" - | cmp -n 1000000 - data || exit 9
            cp small/log before; : > small/log
            nbdinfo --size \"$uri\"; cp small/log after";
        let mut launch = room.tool("unshare", ["--mount", "sh", "-c", how, "sh"]);
        launch.args([server_path()]).args(["-U", "-", "--filter=log", "memory", "1M", &log, "logappend=true"]);
        let output = launch.args(["--run", command]).run_to(0);
        assert_eq!(output.text(), "1048576\n");
        if !nbdkit_differs("it says nothing, and goes on in the midst of a line") {
            output.expect_error_line(&["logfile: No space left on device"]);
            let before = fs::read_to_string(room.path("before")).expect("the command ran");
            assert_eq!(before.len(), 4096);
            let after = fs::read_to_string(room.path("after")).expect("the command ran");
            let mut lines = after.lines();
            assert_eq!(lines.next(), Some(""), "what follows half a line is on a line of its own: {after}");
            assert!(lines.all(|line| line.starts_with("20")), "{after}");
        }
        room.assert_nothing_left();
    }

    /// G3: as with stderr
    #[test]
    fn a_log_of_errors_on_a_full_disk_holds_nobody_up() {
        if nbdkit_differs("1.32 has no --log=FILE") {
            return;
        }
        let room = Room::new();
        let (small, how) = small(&room);
        let log = format!("--log={}", small.join("log").display());
        let command = "
            fail() { i=0; while test $i -lt $1; do i=$((i+1)); nbdinfo --size \"$uri\" 2> /dev/null && exit 9; done; }
            fail 100; cp small/log before; : > small/log; fail 3; cp small/log after; exit 7";
        let mut launch = room.tool("unshare", ["--mount", "sh", "-c", how, "sh"]);
        launch.args([server_path()]).args(["-U", "-", &log, "file", "dir=.", "--run", command]).run_to(7);
        let before = fs::read_to_string(room.path("before")).expect("the command ran");
        assert_eq!(before.len(), 4096);
        let after = fs::read_to_string(room.path("after")).expect("the command ran");
        let lines: Vec<_> = after.lines().collect();
        assert_eq!(lines.len(), 4, "{after}");
        assert!(lines[0].is_empty() && lines[1..].iter().all(|line| line.contains(": error: ")), "{after}");
        room.assert_nothing_left();
    }
}

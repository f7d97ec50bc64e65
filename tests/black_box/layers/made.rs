//! Plugins that make a disk when a client asks for it: `tmpdisk`, `ondemand`.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use super::*;
use crate::harness::wait_for;

/// Makes a disk of zeroes with a few bytes at its start.
const COMMAND: &str = "command=truncate -s $size \"$disk\"; printf 'made: %s' \"$what\" | dd of=\"$disk\" conv=notrunc";

const OPERATIONS: &[&str] = &[
    "info",
    "read 16 0",
    "write 8x77 6 fua",
    "read 16 0",
    "trim 8192 8192 fua",
    "zero 8 8",
    "zero 8 8 fast",
    "write 4096xaa 1044480",
    "write 01 1048576",
    "flush",
    "cache 4096 0",
    "extents 1048576 0",
    "read 16 0",
    "read 16 1048560",
];

#[test]
fn tmpdisk_serves_what_the_command_makes() {
    let answers = same(&["tmpdisk", "1M", COMMAND, "what=something"], OPERATIONS);
    assert!(answers.contains("read 16 0: 6d6164653a20736f6d657468696e6700"), "{answers}");
    same(&["-r", "tmpdisk", "1M", COMMAND], &["info", "read 16 0", "write 00 0", "trim 512 0"]);
    // "size is only a request".
    let other =
        answers_in(&Room::new(), &["tmpdisk", "size=0", "command=printf 12345 > \"$disk\""], &["info", "read 5 0"]);
    assert!(other.starts_with("info: 5 ") && other.ends_with("3132333435\n"), "{other}");
}

#[test]
fn tmpdisk_makes_a_file_system() {
    // The magic number of ext4, and the label.
    let operations = &["info", "read 2 1080", "read 16 1144"];
    let answers = same(&["tmpdisk", "16M", "label=some label"], operations);
    assert!(answers.contains(": 53ef\n") && answers.contains(": 736f6d65206c6162656c0000"), "{answers}");
    same(&["tmpdisk", "16M", "type=ext2"], operations);
}

#[test]
fn every_client_of_tmpdisk_has_its_own_disk() {
    let operations = &["write 8x77 0", "read 8 0", "export", "read 8 0", "export name", "read 8 0"];
    let answers = same(&["tmpdisk", "1M", COMMAND], operations);
    assert_eq!(answers.matches("6d6164653a200000").count(), 2, "{answers}");
}

#[test]
fn parameters_are_the_commands_variables_whatever_is_in_them() {
    let value = "it's $HOME, `pwd`, \"a\\b\" & *; é\n";
    let arguments = ["tmpdisk", "1", "command=printf %s \"$odd_1\" > \"$disk\"", &format!("odd_1={value}")];
    let answers = answers(&arguments, &[&format!("read {} 0", value.len())]);
    let hex: String = value.bytes().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(answers, format!("read {} 0: {hex}\n", value.len()));
    for plugin in [&["tmpdisk", "1M"][..], &["ondemand", "1M", "dir=."]] {
        let refused = |word| same_refusal(&[plugin, &[word]].concat());
        assert_eq!(refused("disk=/etc/passwd"), "'disk' parameter cannot be set on the command line");
        // Debian's takes it.
        assert_eq!(refusal(&[plugin, &["no-variable=1"]].concat()), "unknown parameter 'no-variable'");
    }
    assert_eq!(same_refusal(&["tmpdisk"]), "size parameter is required");
    assert_eq!(same_refusal(&["ondemand", "1M"]), "dir and size parameters are required");
    assert_eq!(same_refusal(&["ondemand", "dir=."]), "dir and size parameters are required");
    same_refusal(&["ondemand", "1M", "dir=.", "wait=2"]);
    let line = refusal(&["ondemand", "1M", "dir=.", "share=perhaps"]);
    assert_eq!(line, "could not decipher boolean (perhaps)");
    assert_eq!(refusal(&["ondemand", "1M", "dir=nowhere"]), "realpath: nowhere: No such file or directory");
}

#[test]
fn a_command_that_fails_is_the_clients_error_alone() {
    let operations = &["export one", "export two"];
    for (command, why) in [
        ("command=exit 3", "command exited with code 3"),
        ("command=kill -s TERM $$", "command killed by signal 15"),
        ("command=mkdir \"$disk\"", "Is a directory"),
        ("command=:", "No such file or directory"),
    ] {
        for plugin in [&["tmpdisk", "1M"][..], &["ondemand", "1M", "dir=."]] {
            let room = Room::new();
            let arguments = [plugin, &[command]].concat();
            room.write("operations.py", OPERATIONS_PROGRAM);
            room.write("operations", operations.join("\n") + "\n");
            let command = "/usr/bin/python3 operations.py \"$uri\" < operations";
            let output = room.captive(&arguments, command).run_to(0);
            assert_eq!(output.text(), "export one: refused\nexport two: refused\n");
            assert!(output.stderr.contains(why), "{why}: {output:#?}");
            room.assert_nothing_left();
        }
    }
}

/// "we hold a file descriptor ..., so unlink the disk"
#[test]
fn a_tmpdisk_in_use_has_no_name() {
    let room = Room::new();
    let server = room.serve(["tmpdisk", "1M", COMMAND]);
    let mut client = server.simple();
    client.read(0, 4096);
    let names = || {
        let mut found = Vec::new();
        let mut directories = vec![room.tmpdir()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).expect("a directory").flatten() {
                if entry.path().is_dir() { directories.push(entry.path()) } else { found.push(entry.path()) }
            }
        }
        found
    };
    assert_eq!(names(), Vec::<PathBuf>::new());
    server.terminate().expect(0);
    room.assert_nothing_left();
}

/// Whatever ends the server, a command that is still at work and what it has made so far end with it. A drain does not wait
/// for it: its client was promised nothing yet.
#[test]
fn a_command_at_work_does_not_outlive_the_server() {
    for plugin in [&["tmpdisk", "1M"][..], &["ondemand", "1M", "dir=disks"]] {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            let room = Room::new();
            fs::create_dir(room.path("disks")).expect("a directory in the room");
            let mut started = room.fifo("started");
            let path = room.path("started");
            // What the shell has started is killed as well, and writes the disk for as long as it lives.
            let loops = "while :; do echo > \"$disk\"; sleep 0.01; done";
            let command = format!(
                "command=echo > \"$disk\"; ({loops}) & echo now > {}; (trap '' TERM; sleep 1000)",
                path.display()
            );
            let arguments = [&["--drain-timeout=1000"], plugin, &[&command]].concat();
            let server = room.serve(arguments);
            let mut client = server.connect();
            client.start();
            client.send_option(7, &[0, 0, 0, 0, 0, 0]);
            started.hear();
            server.running.signal(signal);
            let output = server.running.finish();
            if signal == Signal::SIGTERM {
                output.expect(0);
                room.assert_nothing_left();
                assert_eq!(fs::read_dir(room.path("disks")).expect("it is there").count(), 0);
            }
            room.wait_until_nothing_left();
        }
    }
}

/// A disk that another server has locked is not waited for either.
#[test]
fn the_server_ends_while_another_server_has_the_disk() {
    let (room, other) = (Room::new(), Room::new());
    let directory = format!("dir={}", room.path("").display());
    let arguments = ["--drain-timeout=1000", "ondemand", "1M", &directory, COMMAND, "wait=true"];
    let (first, second) = (room.serve(arguments), other.serve(arguments));
    let holder = first.simple();
    let mut waiting = second.connect();
    waiting.start();
    waiting.send_option(7, &[0, 0, 0, 0, 0, 0]);
    wait_until_a_lock_is_waited_for(second.running.pid());
    second.terminate().expect(0);
    drop(holder);
    first.terminate().expect(0);
}

#[test]
fn ondemand_makes_disks_by_name_and_keeps_them() {
    let prepare = |room: &Room| fs::create_dir(room.path("disks")).expect("a directory in the room");
    let arguments = &["ondemand", "1M", "dir=disks", "wait=true", COMMAND];
    let operations: Vec<&str> = [
        "list",
        "info",
        "write 4x11 100 fua",
        "export one",
        "write 4x22 100",
        "read 8 98",
        "export default",
        "read 8 98",
        "export one",
        "read 8 98",
        "list",
        "export .hidden",
        "export ..",
        "export a/b",
        "export /etc/passwd",
        "export two",
    ]
    .iter()
    .chain(OPERATIONS)
    .copied()
    .collect();
    let answers = same_in(prepare, arguments, &operations);
    assert!(answers.contains("list: [('', ''), ('one', '')]"), "{answers}");
    assert_eq!(answers.matches("read 8 98: 0000222222220000").count(), 2, "{answers}");
    // What a server before this one has made is there.
    let room = Room::new();
    prepare(&room);
    answers_in(&room, arguments, &["export kept", "write 4x33 0"]);
    let again = ["ondemand", "1M", "dir=disks", "command=exit 1"];
    assert!(answers_in(&room, &again, &["export kept", "read 4 0"]).ends_with("read 4 0: 33333333\n"));
    assert_eq!(fs::metadata(room.path("disks/kept")).expect("it is there").len(), 1 << 20);
}

#[test]
fn ondemand_makes_a_file_system() {
    let answers = same(&["ondemand", "16M", "dir=.", "label=some"], &["info", "read 2 1080", "read 8 1144"]);
    assert!(answers.contains(": 53ef\n") && answers.contains(": 736f6d6500000000"), "{answers}");
}

/// What the locks do, from the side of clients; `sys.argv[2]` is what is to happen to the second one.
const TWO_CLIENTS: &str = "
import nbd, sys, threading

def connect(name):
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(sys.argv[1])
    handle.set_export_name(name)
    handle.opt_go()
    return handle

first = connect('one')
connect('other')
first.pwrite(b'from the first', 0)
if sys.argv[2] == 'refused':
    try:
        connect('one')
        raise SystemExit('it has two clients')
    except nbd.Error as error:
        pass
elif sys.argv[2] == 'shared':
    assert connect('one').pread(14, 0) == b'from the first'
else:
    came = []
    second = threading.Thread(target=lambda: came.append(connect('one').pread(14, 0)))
    second.start()
    # Others are served meanwhile, and disks are made.
    connect('third')
    assert not came
    first.shutdown()
    second.join()
    assert came == [b'from the first'], came
";

#[test]
fn a_disk_of_ondemand_has_one_client_unless_it_is_shared() {
    for (parameter, second) in [("wait=no", "refused"), ("share=true", "shared"), ("wait=true", "waits")] {
        let room = Room::new();
        room.write("clients.py", TWO_CLIENTS);
        let command = format!("/usr/bin/python3 clients.py \"$uri\" {second}");
        let output = room.captive(["ondemand", "1M", "dir=.", COMMAND, parameter], command).run_to(0);
        let locked = output.stderr.contains("one: filesystem is locked by another client");
        assert_eq!(locked, second == "refused", "{output:#?}");
    }
}

fn wait_until_a_lock_is_waited_for(pid: impl std::fmt::Display) {
    wait_for("a thread that waits for a lock", || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
        let calls = tasks.filter_map(|task| fs::read_to_string(task.path().join("syscall")).ok());
        // fcntl(2) on x86-64 and on arm64, with F_OFD_SETLKW.
        calls.map(|call| call.split(' ').map(str::to_owned).collect::<Vec<_>>()).find(|call| {
            matches!(call[0].as_str(), "72" | "25") && call.get(2).is_some_and(|command| command == "0x26")
        })
    });
}

/// A client that waits for a lock keeps nobody else, and not the server's end.
#[test]
fn the_server_ends_while_a_client_waits_for_a_disk() {
    let room = Room::new();
    let server = room.serve(["ondemand", "1M", "dir=.", COMMAND, "wait=true"]);
    let first = server.simple();
    let mut second = server.connect();
    second.start();
    second.send_option(7, &[0, 0, 0, 0, 0, 0]);
    wait_until_a_lock_is_waited_for(server.running.pid());
    server.terminate().expect(0);
    drop(first);
    room.assert_nothing_left();
}

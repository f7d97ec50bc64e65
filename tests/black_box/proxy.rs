//! `nbd`: another server's disk, by every way to it. Source: nbdkit-nbd-plugin(1); nbdkit's tests/test-nbd-*.sh.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::signal::Signal;

use super::both::{both, ours};
use super::harness::{Room, free_port, nbdkit, nbdkit_differs, server_path, tool};
use super::raw_client::*;

/// `NBD_EIO`
const EIO: u32 = 5;

const OPERATIONS: [&str; 19] = [
    "about",
    "list",
    "write 10 100000 7",
    "write 5 1 9 fua",
    "read 0 16",
    "read 0 200000",
    "read 0 1048576",
    "zero 20 1000",
    "zero 30 10 no_hole",
    "zero 30 10 fast",
    "zero 30 10 fua",
    "trim 4096 4096",
    "trim 131072 65536 fua",
    "cache 0 65536",
    "flush",
    "map 0 1048576",
    "map 0 131072 one",
    "read 1048575 2",
    "write 1048575 2 1",
];

/// A server that is started sees the socket as systemd gives it.
#[test]
fn a_command_is_the_server() {
    let nbdkit = nbdkit().to_str().expect("/usr is ASCII").to_owned();
    let command = format!("command={nbdkit}");
    let text = both(&["nbd", &command, "arg=memory", "arg=1M"], &OPERATIONS, |_| ());
    assert!(text.contains("size 1048576") && text.contains("can_fast_zero"), "{text}");
    both(&["nbd", &command, "arg=-r", "arg=memory", "arg=1M"], &OPERATIONS[..6], |_| ());
    // A server with little to offer, and none of structured replies.
    let arguments = ["nbd", &command, "arg=--no-sr", "arg=eval", "arg=get_size=echo 1M", "arg=pwrite=cat > /dev/null"];
    both(&arguments, &["about", "map 0 65536", "trim 0 512", "zero 0 512", "write 0 512 1 fua", "read 0 1"], |_| ());
    // Ours behind ours, with extended headers between them.
    let room = Room::new();
    let own = format!("command={}", server_path().display());
    let text = ours(&room, &["nbd", &own, "arg=memory", "arg=1M"], &OPERATIONS);
    assert!(text.contains("read 0 16: 00*5 09*1 00*4 07*6"), "{text}");
}

/// "With qemu-nbd(8), read and write qcow2 files": what was written is in the file when the server has ended.
#[test]
fn qemu_nbd_is_cleaned_up_and_its_image_is_whole() {
    let room = Room::new();
    let image = room.path("disk.qcow2");
    let path = image.to_str().expect("rooms are ASCII");
    room.tool("qemu-img", ["create", "-q", "-f", "qcow2", path, "16M"]).run_to(0);
    let (command, argument) = (format!("command={}", tool("qemu-nbd").display()), format!("arg={path}"));
    let arguments = ["nbd", &command, "arg=-f", "arg=qcow2", &argument];
    let text =
        ours(&room, &arguments, &["about", "write 100 100000 7", "zero 65536 512", "map 0 1048576", "read 65530 12"]);
    assert!(text.contains("read 65530 12: 07*6 00*6"), "{text}");
    room.tool("qemu-img", ["check", "-q", path]).run_to(0);
    let text = room.tool("qemu-io", ["-r", "-c", "read -P 7 100 65436", path]).run_to(0).text().to_owned();
    assert!(!text.contains("verification failed"), "{text}");
}

#[test]
fn every_way_to_a_server() {
    let room = Room::new();
    let behind = room.serve(["memory", "1M"]);
    let socket = behind.socket.display();
    let operations = ["about", "write 3 4 5", "read 0 10"];
    let size =
        |text: String| assert!(text.contains("size 1048576") && text.contains("read 0 10: 00*3 05*4 00*3"), "{text}");
    let proxy = Room::new();
    size(ours(&proxy, &["nbd", &format!("nbd+unix:///?socket={socket}")], &operations));
    size(ours(&proxy, &["nbd", &format!("socket={socket}"), "shared=true", "export=x"], &operations));
    // A descriptor that the caller has connected.
    proxy.write("operate.py", super::both::OPERATE);
    let connected = UnixStream::connect(&behind.socket).expect("the server listens");
    let number = std::os::fd::AsRawFd::as_raw_fd(&connected);
    let mut launch = proxy.captive(["nbd", &format!("socket-fd={number}")], super::both::command(&operations));
    size(launch.inherit(OwnedFd::from(connected)).run_to(0).text().to_owned());
    proxy.assert_nothing_left();
    behind.terminate().expect(0);

    let (room, port) = (Room::new(), free_port());
    let mut behind = room.server(["-f", "-i", "127.0.0.1", "-p", &port, "memory", "1M"]).start();
    super::harness::wait_for("the port", || std::net::TcpStream::connect(("127.0.0.1", port.parse().ok()?)).ok());
    size(ours(&proxy, &["nbd", "hostname=localhost", &format!("port={port}")], &operations));
    size(ours(&proxy, &["nbd", &format!("uri=nbd://127.0.0.1:{port}/x")], &operations));
    assert!(!behind.has_ended());
    behind.signal(Signal::SIGTERM);
    behind.finish().expect(0);
}

/// nbdkit's tests/test-nbd-dynamic-*.sh.
#[test]
fn the_export_is_the_clients_with_dynamic_export() {
    let arguments = |room: &Room| {
        // A server whose exports differ by name.
        room.write("exports", "INTERLEAVED\nfirst\nthe first\nsecond one\n\n");
    };
    let nbdkit = nbdkit().display().to_string();
    let (room, other) = (Room::new(), Room::new());
    arguments(&room);
    let exports = room.path("exports").display().to_string();
    let socket = room.path("behind");
    let behind = [
        "-f".to_owned(),
        "-U".to_owned(),
        socket.display().to_string(),
        "eval".to_owned(),
        format!("list_exports=cat {exports}"),
        "default_export=echo first".to_owned(),
        "open=echo \"$3\"".to_owned(),
        "get_size=printf %s \"$2\" | wc -c".to_owned(),
        "export_description=echo \"of $2\"".to_owned(),
        "pread=printf %s \"$2\" | tail -c +$(($4 + 1)) | head -c $3".to_owned(),
    ];
    let mut behind = room.launch(std::path::Path::new(&nbdkit)).args(behind).start();
    behind.wait_until_listening(&socket);
    let way = format!("socket={}", socket.display());
    let uri = format!("nbd+unix:///ignored?socket={}", socket.display());
    let operations = [
        "list",
        "about",
        "as first",
        "about",
        "as second one",
        "about",
        "read 0 10",
        "as /",
        "about",
        "as テスト",
        "about",
        "read 0 9",
    ];
    other.write("operate.py", super::both::OPERATE);
    for arguments in [
        vec!["nbd", &way, "dynamic-export=true"],
        vec!["nbd", &uri, "dynamic-export=on"],
        vec!["nbd", &way, "export=first"],
        vec!["nbd", &uri],
    ] {
        let theirs = other.nbdkit_captive(&arguments, super::both::command(&operations)).run_to(0);
        let text = ours(&other, &arguments, &operations);
        assert_eq!(text, theirs.text(), "{arguments:?}: ours is first");
        assert!(text.contains("description 'of "), "{text}");
    }
    behind.signal(Signal::SIGTERM);
    behind.finish();
}

#[test]
fn bad_configurations_are_one_line_and_status_1() {
    let room = Room::new();
    let refused = |arguments: &[&str], words: &[&str]| {
        room.captive([&["nbd"], arguments].concat(), "touch started").run_to(1).expect_error_line(words);
        room.assert_nothing_left();
        assert!(!room.path("started").exists());
    };
    refused(
        &[],
        &[
            "exactly one of ‘socket’, ‘hostname’, ‘vsock’, ‘command’, ‘socket-fd’ and ‘uri’ parameters must be specified",
        ],
    );
    refused(&["socket=a", "hostname=b"], &["cannot mix Unix ‘socket’, TCP ‘hostname’/‘port’"]);
    refused(&["socket=a", "port=1"], &["‘port’ parameter should only be used with ‘hostname’ or ‘vsock’"]);
    refused(
        &["socket=a", "export=b", "dynamic-export=true"],
        &["cannot mix 'dynamic-export' with explicit export name"],
    );
    refused(
        &["socket=a", "shared=true", "dynamic-export=true"],
        &["cannot use 'dynamic-export' with shared connection"],
    );
    refused(&["command=true", "dynamic-export=true"], &["cannot use 'dynamic-export' with shared connection"]);
    refused(&["vsock=x"], &["vsock_cid: empty string where we expected a number"]);
    refused(&["cid=4294967296"], &["vsock_cid: could not parse number"]);
    refused(&["vsock=2", "port=nbd"], &["port: empty string where we expected a number"]);
    refused(&["socket-fd=-1"], &["socket-fd must be >= 0"]);
    refused(&["retry=x", "socket=a"], &["retry"]);
    refused(&["shared=x", "socket=a"], &["could not decipher boolean (x)"]);
    refused(&[&format!("socket={}", "x".repeat(200))], &["socket file name too large"]);
    if nbdkit_differs("it has libnbd's sentences") {
        return;
    }
    refused(&["http://x"], &["uri: http://x: an NBD URI starts with"]);
    refused(&["socket-fd=987"], &["socket-fd=987", "Bad file descriptor"]);
    refused(&["socket=nowhere", "shared=true"], &["nowhere", "No such file"]);
    refused(&["command=false"], &["nbd: ", "false ended with status 1"]);
    refused(&["command=/bin/sh", "arg=-c", "arg=kill -s KILL $$"], &["/bin/sh was killed by signal 9"]);
    refused(&["command=/nowhere"], &["nbd: command: /nowhere: not found"]);
    refused(&["command="], &["nbd: command: : not found"]);
    let file = fs::File::open("/dev/null").expect("it is there");
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    let mut launch = room.captive(["nbd", &format!("socket-fd={number}")], "touch started");
    launch.inherit(OwnedFd::from(file)).run_to(1).expect_error_line(&["this descriptor is no socket"]);
}

/// Each way to a server, in the words of the client's error and of the log.
#[test]
fn who_is_not_there_is_named() {
    let port = free_port();
    let rows: [(&[&str], &str); 4] = [
        (&["socket=nowhere"], "nowhere: No such file or directory"),
        (&["hostname=127.0.0.1", &format!("port={port}")], &format!("cannot connect to 127.0.0.1:{port}: ")),
        // Nobody has this one.
        (&["vsock=4294967294", "port=1"], "cannot connect to vsock 4294967294:1: "),
        (&["nbd+vsock://4294967294"], "cannot connect to vsock 4294967294:10809: "),
    ];
    for (arguments, line) in rows {
        let room = Room::new();
        let output = room.captive([&["nbd"], arguments].concat(), "nbdinfo \"$uri\"").run_to(1);
        assert!(nbdkit_differs("it has libnbd's sentences") || output.stderr.contains(line), "{line}: {output:#?}");
        room.assert_nothing_left();
    }
}

/// Whatever the other server answers, the client is told the same.
#[test]
fn errors_of_the_other_server_are_passed_on() {
    let command = format!("command={}", nbdkit().display());
    // Of ENOTSUP for a write nbdkit 1.32 dies.
    let errors = "EPERM EIO ENOMEM EINVAL ENOSPC EOVERFLOW ESHUTDOWN EROFS";
    let fail = format!("set -- \"$1\" \"$4\" {errors}; shift $(($2 / 512 + 2)); echo \"$1\" >&2; exit 1");
    let arguments: Vec<String> = [
        "nbd".to_owned(),
        command,
        "arg=eval".to_owned(),
        "arg=get_size=echo 1M".to_owned(),
        format!("arg=pread={fail}"),
        format!("arg=pwrite=cat > /dev/null; {fail}"),
        format!("arg=zero={fail}"),
        format!("arg=trim={fail}"),
        format!("arg=cache={fail}"),
        format!("arg=extents={fail}"),
        "arg=flush=echo ENOSPC >&2; exit 1".to_owned(),
    ]
    .to_vec();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut operations = vec!["flush".to_owned()];
    for offset in (0..8).map(|number| number * 512) {
        let requests = ["read", "zero", "trim", "cache", "map"].map(|request| format!("{request} {offset} 512"));
        operations.extend(requests);
        operations.push(format!("write {offset} 512 1"));
    }
    let operations: Vec<&str> = operations.iter().map(String::as_str).collect();
    // At the end of a connection there is a flush of ours more, which fails.
    let (room, other) = (Room::new(), Room::new());
    for room in [&room, &other] {
        room.write("operate.py", super::both::OPERATE);
    }
    let theirs = other.nbdkit_captive(&arguments, super::both::command(&operations)).run_to(0);
    let ours = room.captive(&arguments, super::both::command(&operations)).run_to(1);
    assert_eq!(ours.text(), theirs.text(), "ours is first");
    assert!(ours.text().contains("ESHUTDOWN") && ours.text().contains("ENOMEM"), "{}", ours.text());
}

/// "Retry connection up to N seconds": a command that did not become a server is started again.
#[test]
fn a_command_that_fails_is_started_again() {
    let room = Room::new();
    let script = format!("arg=test -e tried && exec {} null 3K; echo > tried", nbdkit().display());
    let arguments = ["nbd", "command=/bin/sh", "arg=-c", &script, "retry=30"];
    let output = room.captive(arguments, "nbdinfo --size \"$uri\"").run_to(0);
    assert_eq!(output.text(), "3072\n");
    fs::remove_file(room.path("tried")).expect("the command has made it");
    room.assert_nothing_left();
}

#[test]
fn a_server_that_is_not_there_yet_is_waited_for() {
    let room = Room::new();
    let socket = room.path("behind");
    let way = format!("socket={}", socket.display());
    // The second attempt comes a second later.
    let mut proxy = room.captive(["nbd", &way, "shared=true", "retry=30"], "nbdinfo --size \"$uri\"");
    let proxy = proxy.start();
    let behind = Room::new();
    let mut server = behind.server(["-f", "-U", socket.to_str().expect("rooms are ASCII"), "memory", "3K"]).start();
    server.wait_until_listening(&socket);
    assert_eq!(proxy.finish().expect(0).text(), "3072\n");
    server.signal(Signal::SIGTERM);
    server.finish().expect(0);
}

#[test]
fn when_the_other_server_goes_requests_fail_and_new_clients_get_a_new_connection() {
    let room = Room::new();
    let behind = Room::new();
    let server = behind.serve(["memory", "1M"]);
    let socket = server.socket.clone();
    let proxy = room.serve(["nbd", &format!("socket={}", socket.display())]);
    let mut client = proxy.simple();
    assert_eq!(client.write(0, 0, &[7; 512]), 0);
    server.terminate();
    assert_eq!(client.ask(NBD_CMD_READ, 0, 0, 1).error, EIO);
    // The client is no worse than that.
    assert_eq!(client.ask(NBD_CMD_READ, 0, 1 << 20, 1).error, NBD_EINVAL);
    let server = behind.serve(["memory", "1M"]);
    assert_eq!(proxy.simple().read(0, 1), [0]);
    server.terminate().expect(0);
    // What was written was not flushed, and is lost.
    proxy.terminate().expect(1);
}

/// What is under way when the other server dies, and all that comes later, fails as a disk would; the client stays.
#[test]
fn a_server_that_dies_is_an_input_output_error() {
    if nbdkit_differs("it says EINVAL, which is what it makes of ENOTCONN") {
        return;
    }
    for shared in ["shared=true", "shared=false"] {
        let (room, behind) = (Room::new(), Room::new());
        let mut hanging = behind.fifo("hanging");
        let pread = format!("pread=echo hanging > {}; sleep 1000", behind.path("hanging").display());
        let server =
            behind.serve(["eval", "get_size=echo 1M", &pread, "trim=exit 0", "pwrite=cat > /dev/null", "cache=exit 0"]);
        let proxy = room.serve(["nbd", &format!("socket={}", server.socket.display()), shared]);
        let mut client = proxy.simple();
        client.request(NBD_CMD_READ, 0, 0, 512, b"");
        assert_eq!(hanging.hear(), "hanging");
        server.running.signal(Signal::SIGKILL);
        assert_eq!(client.next_reply().expect("a reply").error, EIO);
        for kind in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES] {
            assert_eq!(client.ask(kind, 0, 0, 512).error, EIO, "{kind}");
        }
        assert_eq!(client.write(0, 0, &[7; 512]), EIO);
        client.disconnect();
        proxy.running.signal(Signal::SIGTERM);
        proxy.running.finish();
        room.assert_nothing_left();
        server.running.finish();
        behind.wait_until_nothing_left();
    }
}

#[test]
fn what_was_started_does_not_outlive_the_server() {
    if nbdkit_differs("it leaves its directory") {
        return;
    }
    let own = format!("command={}", server_path().display());
    let arguments = ["nbd", &own, "arg=memory", "arg=1M"];
    let room = Room::new();
    let server = room.serve(arguments);
    assert_eq!(server.simple().read(0, 1), [0]);
    server.running.signal(Signal::SIGKILL);
    room.wait_until_nothing_left();

    // One that neither listens nor ends.
    let mut here = room.fifo("here");
    let arguments =
        ["-f", "-U", "-", "nbd", "command=/bin/sh", "arg=-c", "arg=trap '' TERM; echo here > here; sleep 1000; :"];
    let server = room.server(arguments).start();
    assert_eq!(here.hear(), "here");
    server.signal(Signal::SIGTERM);
    server.finish().expect_signal(Signal::SIGTERM);
    room.wait_until_nothing_left();
}

/// Requests of one client are under way together: one that is not answered holds up no other.
#[test]
fn many_requests_share_a_connection() {
    let room = Room::new();
    let mut hanging = room.fifo("hanging");
    let mut go = room.fifo("go");
    let behind = Room::new();
    let (told, heard) = (room.path("hanging"), room.path("go"));
    let pread = format!(
        "pread=if test $4 = 0; then echo hanging > {}; read x < {}; fi; head -c $3 /dev/zero",
        told.display(),
        heard.display()
    );
    let server = behind.serve(["eval", "get_size=echo 1M", "thread_model=echo parallel", &pread]);
    for shared in ["shared=true", "shared=false"] {
        let proxy = room.serve(["nbd", &format!("socket={}", server.socket.display()), shared]);
        let mut client = proxy.simple();
        client.request(NBD_CMD_READ, 0, 0, 512, b"");
        assert_eq!(hanging.hear(), "hanging");
        let second = client.request(NBD_CMD_READ, 0, 512, 512, b"");
        assert_eq!(client.next_reply().expect("a reply").cookie, second);
        assert_eq!(proxy.simple().read(512, 1), [0]);
        go.tell();
        assert!(client.next_reply().is_some());
        proxy.terminate().expect(0);
        fs::remove_file(room.path("socket")).ok();
    }
    server.terminate().expect(0);
}

/// A server that greets and says nothing more.
#[test]
fn a_server_that_does_not_answer_is_no_reason_to_stay() {
    if nbdkit_differs("it waits for the server") {
        return;
    }
    let room = Room::new();
    let socket = room.path("behind");
    let listener = UnixListener::bind(&socket).expect("the room is ours");
    let way = format!("socket={}", socket.display());
    let server = room.server(["-f", "-U", "-", "nbd", &way, "shared=1"]).start();
    let (_silent, _) = listener.accept().expect("the proxy connects");
    server.signal(Signal::SIGTERM);
    server.finish().expect_signal(Signal::SIGTERM);
    room.wait_until_nothing_left();
    // Where a client asks for it, the client is as good as not there.
    for (parameter, option) in
        [("retry=0", 7), ("retry=1000", 7), ("dynamic-export=true", 3), ("dynamic-export=true", 7)]
    {
        let server = room.serve(["--drain-timeout=1000", "nbd", &way, parameter]);
        let mut client = server.connect();
        client.start();
        client.send_option(option, if option == 3 { b"" } else { &[0, 0, 0, 0, 0, 0] });
        let (_silent, _) = listener.accept().expect("the proxy connects");
        server.running.signal(Signal::SIGTERM);
        client.expect_end();
        server.running.finish().expect(0);
    }
    // Nor is one waited for that may be there later.
    drop(listener);
    let server = room.serve(["--drain-timeout=1000", "nbd", &way, "retry=1000000"]);
    let mut client = server.connect();
    client.start();
    client.send_option(7, &[0, 0, 0, 0, 0, 0]);
    server.running.signal(Signal::SIGTERM);
    client.expect_end();
    server.running.finish().expect(0);
}

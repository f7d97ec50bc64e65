//! `--probe`, against this server and others, and against what is no server.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;

use serde_json::Value;

use super::harness::{Launch, Output, Room, free_port, is_nbdkit, nbdkit, tool};

/// `--probe` is ours alone, whatever server is tested.
fn ours() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_nbdcaptive"))
}

fn probe(room: &Room, arguments: &[&str]) -> Output {
    let mut launch = room.launch(ours());
    launch.args(["--probe"]).args(arguments);
    launch.start().finish()
}

fn json(output: Output) -> Value {
    let output = output.expect(0);
    assert_eq!(output.stderr, "");
    serde_json::from_slice(&output.stdout).expect("it is JSON")
}

/// The exports of an answer by their names.
fn exports(answer: &Value) -> BTreeMap<String, Value> {
    let all = answer["exports"].as_array().expect("there is a list of them");
    let name = |export: &Value| export["export-name"].as_str().expect("an export has a name").to_owned();
    all.iter().map(|export| (name(export), export.clone())).collect()
}

/// A server of somebody else's, while the probe runs as its command.
fn under_nbdkit(room: &Room, arguments: &[&str], options: &str) -> Output {
    let mut launch = room.launch(nbdkit());
    launch
        .args(["-U", "-"])
        .args(arguments)
        .args(["--run", &format!("'{}' --probe \"$uri\" {options}", ours().display())]);
    launch.start().finish()
}

/// qemu-nbd on a socket that listens, with the URI of it.
fn under_qemu(room: &Room, arguments: &[&str]) -> (super::harness::Running, String) {
    let socket = room.path("qemu");
    let mut launch: Launch = room.launch(&tool("qemu-nbd"));
    launch.args(["--persistent", "-k"]).args([&socket]).args(arguments);
    let mut running = launch.start();
    running.wait_until_listening(&socket);
    (running, format!("nbd+unix:///?socket={}", socket.display()))
}

#[test]
fn this_server_is_seen_as_it_is() {
    let room = Room::new();
    let command = format!("'{}' --probe \"$uri\" --json", ours().display());
    let answer = json(room.captive(["-r", "memory", "16M"], &command).start().finish());
    assert_eq!(answer["protocol"], "newstyle-fixed");
    assert_eq!(answer["TLS"], false);
    assert_ne!(answer["structured"], answer["extended"]);
    assert_eq!(answer["extended"], !is_nbdkit());
    let export = &exports(&answer)[""];
    assert_eq!((&export["export-size"], &export["export-size-str"]), (&16_777_216.into(), &"16M".into()));
    assert_eq!((&export["is_read_only"], &export["can_zero"]), (&true.into(), &false.into()));
    assert_eq!(export["contexts"], Value::from(vec!["base:allocation"]));
    let uri = export["uri"].as_str().expect("it has a URI");
    assert!(uri.starts_with("nbd+unix:///?socket=/"), "{uri}");
    room.assert_nothing_left();
}

#[test]
fn people_read_it_too() {
    let room = Room::new();
    let disk = room.write("disk", [0; 1536]);
    let socket = room.serve([Path::new("file"), &disk]);
    let output = probe(&room, &[&socket.uri()]).expect(0);
    let text = String::from_utf8(output.stdout).expect("it is text");
    for line in ["export=\"\":", "\texport-size: 1536 (1536)", "\tis_read_only: no", "\tcontexts: base:allocation"] {
        assert!(text.lines().any(|one| one == line), "no {line:?} in {text}");
    }
    assert!(text.starts_with("protocol: newstyle-fixed without TLS, using "), "{text}");
}

#[test]
fn a_probe_over_tcp_does_not_count_as_a_client() {
    let room = Room::new();
    let port = free_port();
    let command = format!("for n in 1 2; do '{}' --probe \"$uri\" > out || exit 9; done", ours().display());
    room.captive(["--filter=exitlast", "-p", &port, "memory", "1M"], &command).start().finish().expect(0);
}

#[test]
fn every_export_that_is_listed_is_looked_at() {
    let room = Room::new();
    std::fs::create_dir(room.path("disks")).expect("a directory in the room");
    // More than nbdkit answers options for on one connection.
    let names: Vec<_> = (0..40).map(|n| format!("disk {n}")).collect();
    for (size, name) in names.iter().enumerate() {
        room.write(&format!("disks/{name}"), vec![0; 512 * size]);
    }
    let answer = json(under_nbdkit(&room, &["file", "dir=disks"], "--json"));
    let exports = exports(&answer);
    assert_eq!(answer["list"].as_array().map(Vec::len), Some(names.len()));
    for (size, name) in names.iter().enumerate() {
        assert_eq!(exports[name]["export-size"], 512 * size, "{name}");
        assert!(exports[name]["uri"].as_str().is_some_and(|uri| uri.contains(&name.replace(' ', "%20"))));
    }
    let one = json(under_nbdkit(&room, &["-e", "disk 7", "file", "dir=disks"], "--json"));
    assert_eq!(self::exports(&one).keys().collect::<Vec<_>>(), ["disk 7"]);
    let none = under_nbdkit(&room, &["-e", "none", "file", "dir=disks"], "").expect(1);
    assert!(none.stderr.lines().any(|line| line.contains("export \"none\": the server refused")), "{none:?}");
}

#[test]
fn qemu_has_contexts_of_its_own_and_extended_headers() {
    let room = Room::new();
    let disk = room.path("disk.qcow2").display().to_string();
    room.tool("qemu-img", ["create", "-q", "-f", "qcow2", &disk, "1M"]).start().finish().expect(0);
    room.tool("qemu-img", ["bitmap", "--add", &disk, "dirty"]).start().finish().expect(0);
    let options = ["-r", "-A", "-B", "dirty", "-f", "qcow2", "-x", "the disk", "-D", "a disk of qemu's", &disk];
    let (_server, uri) = under_qemu(&room, &options);
    let answer = json(probe(&room, &[&uri, "--json"]));
    let export = &exports(&answer)["the disk"];
    assert_eq!((&answer["extended"], &answer["structured"]), (&true.into(), &false.into()));
    assert_eq!((&export["is_read_only"], &export["description"]), (&true.into(), &"a disk of qemu's".into()));
    let contexts = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:dirty"];
    assert_eq!(export["contexts"], Value::from(contexts.to_vec()));
    assert_eq!(export["block_size_maximum"], 32 << 20);
    assert_eq!(answer["list"][0]["description"], "a disk of qemu's");
}

#[test]
fn what_it_says_is_what_nbdinfo_says() {
    let room = Room::new();
    let nbdinfo = tool("nbdinfo");
    let both = format!(
        "'{}' --json \"$uri\" > theirs && '{}' --probe \"$uri\" --json > ours",
        nbdinfo.display(),
        ours().display()
    );
    for arguments in [&["memory", "3M"][..], &["-r", "null", "1G"]] {
        let mut launch = room.launch(nbdkit());
        launch.args(["-U", "-"]).args(arguments).args(["--run", &both]).start().finish().expect(0);
        let read = |name: &str| -> Value {
            serde_json::from_slice(&std::fs::read(room.path(name)).expect("it was written")).expect("it is JSON")
        };
        let (ours, theirs) = (read("ours"), read("theirs"));
        assert_eq!((&ours["protocol"], &ours["TLS"]), (&theirs["protocol"], &theirs["TLS"]));
        let (ours, theirs) = (&ours["exports"][0], theirs["exports"][0].as_object().expect("an export"));
        for (key, value) in theirs {
            // What the data is like takes a read; how a URI of the same thing is written is a matter of taste.
            if !matches!(key.as_str(), "content" | "uri") {
                assert_eq!(&ours[key], value, "{key}");
            }
        }
    }
}

#[test]
fn old_handshakes_are_understood() {
    let room = Room::new();
    for (option, protocol) in [("-o", "oldstyle"), ("--mask-handshake=0", "newstyle")] {
        let answer = json(under_nbdkit(&room, &[option, "memory", "1M"], "--json"));
        assert_eq!(answer["protocol"], protocol);
        assert_eq!(exports(&answer)[""]["export-size"], 1 << 20);
        assert!(answer.get("list").is_none());
    }
}

#[test]
fn nobody_there_is_one_line_that_names_the_uri() {
    let room = Room::new();
    let uri = format!("nbd://localhost:{}", free_port());
    let output = probe(&room, &[&uri]).expect(1);
    assert_eq!((output.stderr.lines().count(), output.stdout.len()), (1, 0));
    assert!(output.stderr.starts_with(&format!("nbdcaptive: {uri}: cannot connect to ")), "{output:?}");
    for (uri, why) in [
        ("nbd+unix:///?socket=/no/such/socket", "cannot connect to /no/such/socket: No such file"),
        ("nbds://localhost?tls-type=anon", "tls-type: only psk and x509"),
        ("nbds://localhost?tls-psk-file=/no/such/file", "/no/such/file: No such file"),
        ("nbd+vsock://2", "cannot connect to vsock 2:10809"),
        ("localhost:10809", "an NBD URI starts with nbd://"),
        ("nbd://localhost/%zz", "a % that two hexadecimal digits do not follow"),
    ] {
        let output = probe(&room, &[uri]).expect(1);
        assert!(output.stderr.starts_with(&format!("nbdcaptive: {uri}: {why}")), "{output:?}");
        assert_eq!(output.stderr.lines().count(), 1);
    }
}

#[test]
fn what_has_to_do_with_serving_does_not_go_with_it() {
    let room = Room::new();
    for (arguments, word) in [
        (&["nbd://localhost", "memory", "1M"][..], "the plugin 'memory'"),
        (&["nbd://localhost", "-r"], "--readonly"),
        (&["nbd://localhost", "--run", "true"], "--run"),
        (&["nbd://localhost", "-U", "-"], "--unix"),
    ] {
        let output = probe(&room, arguments).expect(1);
        assert_eq!(output.stderr, format!("nbdcaptive: --probe serves nothing: it cannot be used with {word}\n"));
    }
}

/// Answers each of `count` clients with what `answer` makes of its number, then hangs up.
fn script(
    room: &Room,
    count: usize,
    answer: impl Fn(usize) -> Vec<u8> + Send + 'static,
) -> (thread::JoinHandle<()>, String) {
    let path = room.path("script");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket in the room");
    let server = thread::spawn(move || {
        for number in 0..count {
            let (mut client, _) = listener.accept().expect("a client comes");
            // The client may have heard enough.
            let _ = client.write_all(&answer(number));
            let _ = client.shutdown(std::net::Shutdown::Write);
            let _ = client.read_to_end(&mut Vec::new());
        }
    });
    (server, format!("nbd+unix:///?socket={}", path.display()))
}

#[test]
fn rubbish_is_told_from_a_server() {
    let room = Room::new();
    for (rubbish, why) in [
        (&b"SSH-2.0-OpenSSH_9\r\n"[..], "the server is no NBD server: it starts with \"SSH-2.0-\""),
        (b"NBDMAGIC\0\0\0\0\0\0\0\0", "the server speaks no known kind of NBD"),
        (b"NBDMAGICIHAVEOPT\0\x03rubbish rubbish rubbish", "starts with 0x7275626269736820"),
        (b"\n\x1b[2J\n\n\n\n\n\n", "it starts with \"\\n\\x1b[2J\\n"),
    ] {
        let (server, uri) = script(&room, 1, |_| rubbish.to_vec());
        let output = probe(&room, &[&uri]).expect(1);
        assert!(output.stderr.contains(why) && output.stderr.lines().count() == 1, "{output:?}, not {why}");
        server.join().expect("the script was followed");
    }
}

#[test]
fn a_server_that_hangs_up_at_any_byte_is_an_error() {
    let room = Room::new();
    let reply = |option: u32, reply: u32, data: &[u8]| {
        let numbers = [option, reply, data.len() as u32].map(u32::to_be_bytes).concat();
        [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &numbers, data].concat()
    };
    const UNSUP: u32 = (1 << 31) | 1;
    let whole = [
        b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
        reply(11, UNSUP, b""),
        reply(8, UNSUP, b""),
        reply(3, 2, b"\0\0\0\x01d"),
        reply(3, 1, b""),
        reply(6, 3, b"\0\0\0\0\0\0\0\0\x10\0\0\x01"),
        reply(6, 1, b""),
    ]
    .concat();
    let length = whole.len();
    let (server, uri) = script(&room, length + 1, move |number| whole[..number].to_vec());
    for number in 0..length {
        let output = probe(&room, &[&uri]).expect(1);
        assert!(output.stderr.contains("the server closed the connection"), "{number}: {output:?}");
    }
    let answer = json(probe(&room, &[&uri, "--json"]));
    assert_eq!(exports(&answer)["d"]["export-size"], 4096);
    server.join().expect("the script was followed");
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let room = Room::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on loopback");
    let uri = format!("nbd://{}", listener.local_addr().expect("the socket is bound"));
    let output = probe(&room, &[&uri, "--timeout=2"]).expect(1);
    let line = format!("nbdcaptive: {uri}: gave up after 2 seconds, waiting for the greeting\n");
    assert_eq!(output.stderr, line);
}

#[test]
fn names_and_texts_of_a_server_move_no_cursor() {
    let room = Room::new();
    let name = "a%0A%1B%5B2J";
    let server = room.serve(["memory", "1M"]);
    let uri = server.uri().replace("nbd+unix://", &format!("nbd+unix:///{name}"));
    let text = String::from_utf8(probe(&room, &[&uri]).expect(0).stdout).expect("it is text");
    assert!(text.contains("export=\"a\\n\\u{1b}[2J\":\n") && !text.contains('\x1b'), "{text}");
}

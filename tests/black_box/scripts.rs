//! `sh` and `eval`: what scripts are asked, what they may answer, and that nothing of them outlives the server.
//! Source: nbdkit-sh-plugin(3), nbdkit-eval-plugin(1); nbdkit's tests/test-sh-*.sh and test-eval-*.sh.

use std::fs;
use std::process::Stdio;

use nix::sys::signal::Signal;

use super::both::{both, ours};
use super::harness::{Room, nbdkit_differs, server_path};
use super::raw_client::*;

/// A disk in a file of its own, with every method. Each call about data leaves a line in `calls`.
const DISK: &str = r#"#!/bin/sh
disk="$tmpdir/disk"
case "$1" in
    config) echo "$1 $2 $3" >> calls ;;
    config_complete) truncate -s 1M "$disk" ;;
    thread_model) echo serialize_requests ;;
    open) echo "handle of $2, $3, $4" ;;
    export_description) echo "of $2" ;;
    default_export) printf 'INTERLEAVED\nfirst\nthe first\n' ;;
    list_exports) printf 'INTERLEAVED\nfirst\nthe first\nsecond\nthe second\n' ;;
    get_size) stat -c %s "$disk" ;;
    block_size) echo 1 "4K  1M" ;;
    can_write | can_flush | can_trim | can_zero | can_extents | can_multi_conn | can_fast_zero) exit 0 ;;
    is_rotational) exit 3 ;;
    can_fua) echo native ;;
    can_cache) echo native ;;
    pread) echo "$@" >> calls; dd if="$disk" skip="$4" count="$3" iflag=count_bytes,skip_bytes status=none ;;
    pwrite) echo "$@" >> calls; dd of="$disk" seek="$4" conv=notrunc oflag=seek_bytes status=none ;;
    zero)
        echo "$@" >> calls
        case "$5" in *fast*) echo ENOTSUP >&2; exit 1 ;; esac
        dd if=/dev/zero of="$disk" seek="$4" count="$3" conv=notrunc oflag=seek_bytes iflag=count_bytes status=none ;;
    trim | flush | cache) echo "$@" >> calls ;;
    extents) echo "$@" >> calls; echo "0 512K"; echo "512K 256K zero"; echo "768K 1M hole,zero" ;;
    *) exit 2 ;;
esac
"#;

#[test]
fn a_script_with_every_method_is_asked_as_by_nbdkit() {
    let operations = [
        "about",
        "list",
        "write 10 100000 7",
        "write 5 1 9 fua",
        "read 0 16",
        "read 0 200000",
        "zero 20 1000",
        "zero 20 1000 no_hole",
        "zero 30 10 fast",
        "zero 30 10 fua",
        "trim 4096 4096",
        "trim 4096 4096 fua",
        "cache 0 65536",
        "flush",
        "map 0 1048576",
        "map 524288 65536 one",
        "read 1048575 2",
        "as second",
        "about",
    ];
    let calls = |arguments: &[&str]| {
        let rooms = std::cell::RefCell::new(Vec::new());
        let text = both(arguments, &operations, |room| {
            room.script("disk", DISK);
            rooms.borrow_mut().push(room.path("calls"));
        });
        (text, rooms)
    };
    let (text, _) = calls(&["sh", "disk", "a=b", "c=d e"]);
    assert!(text.contains("zero 30 10 fast: failed: ENOTSUP"), "{text}");
    assert!(text.contains("description 'of handle of false, second, false'"), "{text}");
    // As one who may only read.
    let text =
        both(&["-r", "sh", "disk"], &["about", "read 0 10", "map 0 1048576"], |room| drop(room.script("disk", DISK)));
    assert!(text.contains("is_read_only"), "{text}");
}

#[test]
fn the_words_of_each_call_are_nbdkits() {
    let operations =
        ["write 5 100 7 fua", "zero 20 1000", "zero 20 10 no_hole", "trim 0 512", "read 0 3", "map 0 100 one"];
    let calls = |room: &Room| {
        let text = fs::read_to_string(room.path("calls")).expect("the script has written it");
        // At the end of a connection there is a flush of ours more.
        text.lines().filter(|line| !line.starts_with("flush")).collect::<Vec<_>>().join("\n")
    };
    let (room, other) = (Room::new(), Room::new());
    let arguments = ["sh", "disk", "key=value"];
    for room in [&room, &other] {
        room.script("disk", DISK);
    }
    other.write("operate.py", super::both::OPERATE);
    other.nbdkit_captive(arguments, super::both::command(&operations)).run_to(0);
    ours(&room, &arguments, &operations);
    assert_eq!(calls(&room), calls(&other));
    assert!(calls(&room).contains("zero handle of false, first, false 1000 20 may_trim"), "{}", calls(&room));
}

/// "If the script doesn't print anything or the output cannot be parsed then nbdkit assumes error EIO."
#[test]
fn errors_have_the_numbers_that_scripts_name() {
    const ERRORS: &str = r#"#!/bin/sh
case "$1" in
    get_size) echo 64K ;;
    can_write | can_zero) echo ENOMEM >&2; exit 0 ;;
    zero) echo ENOTSUP >&2; exit 1 ;;
    pwrite) cat > /dev/null; echo ENOSPC full >&2; exit 1 ;;
    pread)
        case "$4" in
            0) printf ENOMEM >&2; exit 1 ;;
            1) echo eperm >&2; exit 1 ;;
            2) echo ENOSPC custom message >&2; exit 1 ;;
            3) printf 'ESHUTDOWN\nline one\nline two\n' >&2; exit 1 ;;
            4) echo EPIPE >&2; exit 1 ;;
            5) echo EINVALID >&2; exit 1 ;;
            6) exit 1 ;;
            7) exit 3 ;;
            8) exit 2 ;;
            9) echo too much for one ;;
            10) printf '' ;;
            11) kill -s KILL $$ ;;
            12) echo EINVAL >&2; exit 77 ;;
            13) echo EROFS >&2; exit 1 ;;
            14) echo EFBIG >&2; exit 1 ;;
        esac ;;
    *) exit 2 ;;
esac
"#;
    let mut operations: Vec<_> = (0..15).map(|number| format!("read {number} 1")).collect();
    operations.extend(["write 0 1 1".to_owned(), "zero 0 512".to_owned(), "write 0 65536 1".to_owned()]);
    let operations: Vec<_> = operations.iter().map(String::as_str).collect();
    let text = both(&["sh", "errors"], &operations, |room| drop(room.script("errors", ERRORS)));
    for line in
        ["read 0 1: failed: ENOMEM", "read 5 1: failed: EIO", "read 11 1: failed: EIO", "zero 0 512: failed: ENOSPC"]
    {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[test]
fn eval_knows_which_methods_are_there() {
    let disk = [
        "eval",
        "config=ln -sf \"$PWD/$3\" $tmpdir/file",
        "get_size=stat -Lc %s $tmpdir/file",
        "pread=dd if=$tmpdir/file skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
        "pwrite=dd of=$tmpdir/file seek=$4 conv=notrunc oflag=seek_bytes status=none",
        "extents=echo 0 1M hole,zero",
        "cache=exit 0",
        "trim=exit 0",
        "flush=exit 0",
        "file=disk.img",
    ];
    let operations = [
        "about",
        "write 3 10 5",
        "read 0 20",
        "zero 4 2",
        "read 0 20",
        "trim 0 10",
        "flush",
        "cache 0 9",
        "map 0 65536",
    ];
    let text = both(&disk, &operations, |room| drop(room.write("disk.img", vec![1; 65536])));
    assert!(text.contains("can_zero") && text.contains("can_cache"), "{text}");
    // Nothing but what must be.
    let text = both(&["eval", "get_size=echo 1K"], &["about", "read 0 1", "list", "as x", "about"], |_| ());
    assert!(text.contains("is_read_only"), "{text}");
    both(
        &[
            "eval",
            "get_size=echo 1K",
            "missing=test $1 != can_fua || exec echo native; test $1 != can_write; exit $((2+$?))",
        ],
        &["list", "about"],
        |_| (),
    );
    both(&["eval", "get_size=echo 1K", "default_export=echo hello"], &["list", "about"], |_| ());
    both(&["eval", "get_size=echo 1K", "default_export=exit 1"], &["list", "about", "as x", "about"], |_| ());
    both(&["eval", "get_size=echo 1K", "open=exit 1"], &["list", "about"], |_| ());
}

#[test]
fn bad_configurations_are_one_line_and_status_1() {
    let room = Room::new();
    room.script("errors", "#!/bin/sh\nexec sh ./$1.sh \"$@\"\n");
    room.script("ok", "case \"$1\" in get_size) echo 0 ;; *) exit 2 ;; esac\n");
    room.script("refuses", "case \"$1\" in config) echo EINVAL no such key $2 >&2; exit 1 ;; *) exit 2 ;; esac\n");
    room.script("model", "case \"$1\" in thread_model) exit 1 ;; *) exit 2 ;; esac\n");
    room.script("false", "exit 3\n");
    room.script("late", "case \"$1\" in after_fork) echo too late >&2; exit 1 ;; *) exit 2 ;; esac\n");
    room.write("data", "exit 0\n");
    let refused = |arguments: &[&str], words: &[&str]| {
        let output = room.captive(arguments, "touch started").run_to(1);
        output.expect_error_line(words);
        room.assert_nothing_left();
        assert!(!room.path("started").exists());
    };
    refused(&["sh"], &["missing script parameter"]);
    refused(&["sh", "script="], &["No such file"]);
    refused(&["sh", "nowhere"], &["nowhere", "No such file"]);
    refused(&["sh", "data"], &["data", "Permission denied"]);
    refused(&["sh", "a=b"], &["the first parameter must be script=/path/to/script"]);
    refused(&["sh", "ok", "a=b"], &["this plugin does not need command line configuration"]);
    refused(&["sh", "ok", "b"], &["expecting key=value on the command line but got: b"]);
    refused(&["sh", "refuses", "key=b"], &["no such key key"]);
    refused(&["sh", "model"], &["script exited with error, but did not print an error message on stderr"]);
    refused(&["sh", "false"], &["load method returned unexpected code (3/false)"]);
    refused(&["sh", "late"], &["too late"]);
    refused(&["eval"], &["'get_size' method is required"]);
    refused(
        &["eval", "get_size=echo 1", "get_size=echo 2"],
        &["method get_size defined more than once on the command line"],
    );
    refused(&["eval", "get_size=echo 1", "x=y"], &["'x' is unknown, and there is no 'config' callback to handle it"]);
}

#[test]
fn the_script_tells_more_of_itself() {
    let room = Room::new();
    room.script("disk", DISK);
    room.script("more", "case \"$1\" in dump_plugin) echo extra=stuff ;; *) exit 2 ;; esac\n");
    let text = room.server(["sh", "disk", "--dump-plugin"]).run_to(0).text().to_owned();
    assert!(text.contains("\nmax_thread_model=parallel\nthread_model=serialize_requests\n"), "{text}");
    assert!(text.contains("\nmagic_config_key=script\n"), "{text}");
    assert!(nbdkit_differs("1.34 is the first to print it") || text.contains("\nmax_known_status=8\n"), "{text}");
    let text = room.server(["--dump-plugin", "sh", "more"]).run_to(0).text().to_owned();
    assert!(text.contains("\nthread_model=serialize_all_requests\n") && text.ends_with("\nextra=stuff\n"), "{text}");
    let text = room.server(["--dump-plugin", "eval", "dump_plugin=echo extra=stuff"]).run_to(0).text().to_owned();
    assert!(text.ends_with("\nextra=stuff\n"), "{text}");
    room.assert_nothing_left();
}

/// "If a magic config key is needed, this should echo it to stdout."
#[test]
fn a_bare_value_is_the_scripts_own() {
    let magic = "case \"$1\" in magic_config_key) echo file ;; config) echo $2 $3 >> calls ;; get_size) echo 0 ;; *) exit 2 ;; esac\n";
    let text = both(&["sh", "magic", "value", "other=1"], &["about"], |room| drop(room.script("magic", magic)));
    assert!(text.contains("size 0"), "{text}");
}

#[test]
fn a_script_from_stdin() {
    const TEXT: &str = "case \"$1\" in get_size) echo 3K ;; pread) printf '%*s' $3 x ;; *) exit 2 ;; esac\n";
    let room = Room::new();
    room.write("text", TEXT);
    let stdin = || fs::File::open(room.path("text")).expect("it was just written");
    let output = room.captive(["sh", "-"], "nbdinfo --size \"$uri\"; cat").stdin(stdin()).run_to(0);
    assert_eq!(output.text(), "3072\n");
    room.assert_nothing_left();
    let output = room.captive(["sh", "script=-", "a=b"], "true").stdin(stdin()).run_to(1);
    output.expect_error_line(&["does not need command line configuration"]);
    if !nbdkit_differs("it wants to be told where to listen") {
        room.server(["-s", "sh", "-"])
            .stdin(stdin())
            .run_to(1)
            .expect_error_line(&["inline script is incompatible with -s"]);
        // Nobody writes, and somebody has had enough.
        let waiting = room.server(["-f", "-U", "-", "sh", "-"]).stdin(Stdio::piped()).start();
        waiting.signal(Signal::SIGTERM);
        waiting.finish().expect_signal(Signal::SIGTERM);
        // In the background.
        let (socket, pidfile) = (room.path("socket"), room.path("pid"));
        let arguments =
            ["-U".as_ref(), socket.as_os_str(), "-P".as_ref(), pidfile.as_os_str(), "sh".as_ref(), "-".as_ref()];
        room.server(arguments).stdin(stdin()).run_to(0);
        let size = room.tool("nbdinfo", ["--size", &format!("nbd+unix://?socket={}", socket.display())]).run_to(0);
        assert_eq!(size.text(), "3072\n");
        let pid =
            fs::read_to_string(pidfile).expect("it is there when the server is").trim().parse().expect("a number");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).expect("the server is there");
    }
    room.wait_until_nothing_left();
}

/// nbdkit's tests/test-eval-disconnect.sh: statuses 4 to 8.
#[test]
fn a_script_may_end_server_and_client() {
    if nbdkit_differs("1.34 is the first to know these statuses") {
        return;
    }
    let serve = |room: &Room, status: &str| {
        let status = format!("pwrite=cat > /dev/null; echo EPERM >&2; exit {status}");
        room.serve(["eval", "get_size=echo 1024", "flush=echo flush >> log", &status])
    };
    let after = |status: &str, first: u32, then: u32| {
        let room = Room::new();
        let server = serve(&room, status);
        let mut client = server.simple();
        assert_eq!(client.write(0, 0, b"x"), first, "{status}");
        assert_eq!(client.ask(NBD_CMD_FLUSH, 0, 0, 0).error, then, "{status}");
        // Others are not touched.
        assert_eq!(server.simple().ask(NBD_CMD_FLUSH, 0, 0, 0).error, 0, "{status}");
        server.terminate().expect(0);
        // Also what a client has written that the script has disconnected.
        assert_eq!(fs::read_to_string(room.path("log")).expect("the script has written it"), "flush\n".repeat(2));
    };
    after("7", 0, NBD_ESHUTDOWN);
    after("8", NBD_EPERM, NBD_ESHUTDOWN);
    after("9", NBD_EPERM, 0);
    // "requests an abrupt disconnect of the current client"
    let room = Room::new();
    let server = serve(&room, "6");
    let mut client = server.simple();
    client.request(NBD_CMD_WRITE, 0, 0, 1, b"x");
    assert!(client.next_reply().is_none());
    assert_eq!(server.simple().ask(NBD_CMD_FLUSH, 0, 0, 0).error, 0);
    server.terminate().expect(0);
    for status in ["4", "5"] {
        let room = Room::new();
        let server = serve(&room, status);
        let mut client = server.simple();
        client.request(NBD_CMD_WRITE, 0, 0, 1, b"x");
        server.running.finish().expect(0);
        room.assert_nothing_left();
    }
}

/// "A client could still ignore the constraints. nbdkit passes all requests through to the plugin [...]. It might decide to serve
/// the requests correctly anyway, or reject them with an error." nbdkit-plugin(3); libnbd's tests/errors-server-oversize.c
#[test]
fn block_sizes_of_a_script_are_advice_and_it_is_asked_for_anything() {
    let room = Room::new();
    let server = room.serve([
        "eval",
        "get_size=echo 1M",
        "block_size=echo 512 4K 64K",
        "pread=echo pread $3 $4 >> log; head -c $3 /dev/zero",
        "pwrite=cat > /dev/null; echo pwrite $3 $4 >> log; if [ $3 -gt 131072 ]; then echo EOVERFLOW >&2; exit 1; fi",
    ]);
    let mut client = server.structured();
    assert_eq!(client.read(1, 3), [0; 3]);
    assert_eq!(client.read(512, 128 << 10).len(), 128 << 10);
    assert_eq!(client.write(0, 5, b"x"), NBD_SUCCESS);
    assert_eq!(client.write(0, 0, &vec![1; 256 << 10]), NBD_EINVAL);
    drop(client);
    server.terminate().expect(0);
    let log = fs::read_to_string(room.path("log")).expect("the script wrote it");
    assert_eq!(log, "pread 3 1\npread 131072 512\npwrite 1 5\npwrite 262144 0\n");
}

/// "future client requests are rejected with ESHUTDOWN without calling into the plugin": whichever method says so, and what
/// the client has sent already but the script was not asked.
#[test]
fn a_script_may_end_a_client_in_any_method() {
    if nbdkit_differs("1.34 is the first to know these statuses") {
        return;
    }
    for method in ["preconnect", "open", "can_write", "get_size", "can_extents"] {
        for status in ["6", "7"] {
            let room = Room::new();
            let line = format!("{method}=echo 1024; exit {status}");
            let mut arguments = vec!["eval", &line, "pread=echo pread >> log; head -c $3 /dev/zero"];
            if method != "get_size" {
                arguments.push("get_size=echo 1024");
            }
            let server = room.serve(arguments);
            if status == "7" {
                assert_eq!(server.simple().ask(NBD_CMD_READ, 0, 0, 1).error, NBD_ESHUTDOWN, "{method}");
            } else {
                let mut client = server.connect();
                if method != "preconnect" {
                    client.start();
                    client.send_option(7, &[0, 0, 0, 0, 0, 0]);
                }
                client.expect_end();
            }
            server.terminate().expect(0);
            assert!(!room.path("log").exists(), "{method} {status}");
            room.assert_nothing_left();
        }
    }
    let room = Room::new();
    let server = room.serve([
        "eval",
        "get_size=echo 1M",
        "thread_model=echo serialize_requests",
        "pread=echo $4 >> log; head -c $3 /dev/zero; exit 7",
    ]);
    let mut client = server.simple();
    for offset in [0, 512, 1024] {
        client.request(NBD_CMD_READ, 0, offset, 512, b"");
    }
    let replies: Vec<u32> = (0..3).map(|_| client.next_reply().expect("a reply").error).collect();
    assert_eq!(replies, [0, NBD_ESHUTDOWN, NBD_ESHUTDOWN]);
    assert_eq!(fs::read_to_string(room.path("log")).expect("the script has written it"), "0\n");
    server.terminate().expect(0);
}

/// "half-open connections are closed at once", also one for which a script is at work; that is waited for, as a request would be.
#[test]
fn a_client_in_the_handshake_is_gone_before_its_script_is() {
    if nbdkit_differs("it waits for the script") {
        return;
    }
    for method in ["preconnect", "list_exports", "default_export", "open", "get_size"] {
        let room = Room::new();
        let (mut started, mut go) = (room.fifo("started"), room.fifo("go"));
        let (told, heard) = (room.path("started"), room.path("go"));
        let rest = if method == "open" { "" } else { "echo 1M" };
        // However long that takes here: it would be told to end before long, and killed only after the grace period.
        let line =
            format!("{method}=trap '' TERM; echo now > {}; read x < {}; {rest}", told.display(), heard.display());
        let mut arguments = vec![
            "--drain-timeout=1000",
            "--grace-period=1000",
            "eval",
            &line,
            "close=echo close >> log",
            "unload=echo unload >> log",
        ];
        if method != "get_size" {
            arguments.push("get_size=echo 1M");
        }
        let server = room.serve(arguments);
        let mut client = server.connect();
        if method != "preconnect" {
            client.start();
            let option = if method == "list_exports" { 3 } else { 7 };
            client.send_option(option, if option == 3 { b"" } else { &[0, 0, 0, 0, 0, 0] });
        }
        assert_eq!(started.hear(), "now", "{method}");
        server.running.signal(Signal::SIGTERM);
        client.expect_end();
        go.tell();
        // Who looked whether the server listens is a client, too.
        go.tell();
        server.running.finish().expect(0);
        let log = fs::read_to_string(room.path("log")).expect("the scripts have written it");
        let opened = matches!(method, "open" | "get_size" | "default_export");
        assert_eq!(log, if opened { "close\nunload\n" } else { "unload\n" }, "{method}");
        room.assert_nothing_left();
    }
}

/// As few calls as may be, and each once: nbdkit's tests/test-eflags.sh and test-eval-cache.sh.
#[test]
fn a_script_is_called_no_more_often_than_need_be() {
    let log = |room: &Room| fs::read_to_string(room.path("log")).unwrap_or_default();
    let room = Room::new();
    let arguments = ["eval", "get_size=echo 1M", "default_export=echo default_export >> log; echo name"];
    // It asks for a list, and then for facts about the one that is there.
    room.captive(arguments, "qemu-nbd --list -k \"$unixsocket\"").run_to(0);
    assert_eq!(log(&room), "default_export\n");
    let room = Room::new();
    let arguments = [
        "eval",
        "get_size=echo 200M",
        "can_cache=echo emulate",
        "can_write=exit 0",
        "pread=echo \"$1 $3 $4\" >> log; head -c $3 /dev/zero",
        "pwrite=cat > /dev/null; echo \"$1 $3 $4\" >> log",
    ];
    let operations = ["cache 0 134217728", "zero 1 134217728", "cache 512 1000", "zero 0 65536"];
    ours(&room, &arguments, &operations);
    let most = 64 << 20;
    let whole = |name: &str, start: u64| format!("{name} {most} {start}\n{name} {most} {}\n", start + most);
    assert_eq!(
        log(&room),
        [&*whole("pread", 0), &*whole("pwrite", 1), "pread 1000 512\n", "pwrite 65536 0\n"].concat()
    );
}

/// What hangs, where `$tmpdir/hang` says so.
const HANGING: [&str; 4] = [
    "eval",
    "get_size=echo 1M",
    "thread_model=echo parallel",
    "pread=trap '' TERM INT; echo hanging > hanging; (setsid -f true; sleep 1000; :)",
];

/// B19: the server's "own children die with it"
#[test]
fn a_script_does_not_outlive_a_server_that_is_killed() {
    let room = Room::new();
    let mut hanging = room.fifo("hanging");
    let server = room.serve(HANGING);
    let mut client = server.simple();
    client.request(NBD_CMD_READ, 0, 0, 1, b"");
    assert_eq!(hanging.hear(), "hanging");
    if nbdkit_differs("it leaves the script and its directory") {
        return;
    }
    server.running.signal(Signal::SIGKILL);
    room.wait_until_nothing_left();
    // Captive, where a guardian looks after the server.
    let arguments = [&["--drain-timeout=0.1"], &HANGING[..]].concat();
    let mut captive = room.captive(arguments, "echo $PPID > front; /usr/bin/python3 -c 'import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); h.pread(1, 0)' \"$uri\"");
    let captive = captive.start();
    assert_eq!(hanging.hear(), "hanging");
    captive.signal(Signal::SIGKILL);
    room.wait_until_nothing_left();
}

#[test]
fn a_script_that_hangs_does_not_hold_up_the_end() {
    if nbdkit_differs("it waits for the script") {
        return;
    }
    let room = Room::new();
    let mut hanging = room.fifo("hanging");
    let mut arguments = vec!["--drain-timeout=0.1"];
    arguments.extend(HANGING);
    let server = room.serve(arguments);
    let mut client = server.simple();
    client.request(NBD_CMD_READ, 0, 0, 1, b"");
    assert_eq!(hanging.hear(), "hanging");
    // Others are served meanwhile.
    assert_eq!(server.simple().ask(NBD_CMD_READ, 0, 1 << 20, 1).error, NBD_EINVAL);
    server.terminate().expect(1);
    room.assert_nothing_left();
}

/// What hangs for a client in the handshake: it is told to end, and if it does not hear that, killed.
const IN_THE_HANDSHAKE: [&str; 2] = [
    "echo hanging > hanging; sleep 1000; :",
    "trap '' TERM; echo hanging > hanging; setsid sleep 1000 & sleep 1000; sleep 1000; :",
];

/// The server's arguments for a script that hangs in `method`, for the grace period.
fn hanging_in(method: &str, script: &str, grace: &str) -> Vec<String> {
    let mut arguments = vec![format!("--grace-period={grace}"), "--drain-timeout=1000".to_owned(), "eval".to_owned()];
    arguments.push(format!("{method}={script}"));
    arguments.extend(["pread=exit 1", "close=echo close >> log", "unload=echo unload >> log"].map(str::to_owned));
    if method != "get_size" {
        arguments.push("get_size=echo 1M".to_owned());
    }
    arguments
}

/// F5: a client in the handshake was promised nothing, so what hangs for it does not get the time of the drain, and is no failure.
/// What was opened is closed, and all is unloaded.
#[test]
fn a_script_that_hangs_in_a_handshake_does_not_hold_up_the_end() {
    if nbdkit_differs("it waits for the script") {
        return;
    }
    for method in ["preconnect", "list_exports", "default_export", "open", "get_size", "can_write"] {
        for script in IN_THE_HANDSHAKE {
            let room = Room::new();
            let mut hanging = room.fifo("hanging");
            let server = room.serve(hanging_in(method, script, "0.1"));
            // A client of its own, which need not be told that it has no server any more.
            let probe = format!("nbdinfo --list '{}' > probe 2>&1 & exit 0", server.uri());
            room.tool("sh", ["-c", &probe]).run_to(0);
            assert_eq!(hanging.hear(), "hanging", "{method}");
            let output = server.terminate().expect(0);
            let why = format!("{method}: the server is ending and the script was killed");
            // Without a list the default export would be listed, and without that nothing is: no failure.
            assert!(output.stderr.contains(&why) || method == "default_export", "{output:#?}");
            let log = fs::read_to_string(room.path("log")).expect("the scripts have written it");
            let opened = matches!(method, "get_size" | "can_write");
            assert_eq!(log, if opened { "close\nunload\n" } else { "unload\n" }, "{method}");
            room.wait_until_nothing_left();
        }
    }
}

/// Also where it is opened for others too.
#[test]
fn a_script_that_hangs_in_an_open_that_clients_share_does_not_hold_up_the_end() {
    if nbdkit_differs("it waits for the script") {
        return;
    }
    let room = Room::new();
    let _hanging = room.fifo("hanging");
    let arguments = hanging_in("open", IN_THE_HANDSHAKE[0], "0.1");
    let command = "nbdinfo \"$uri\" > probe 2>&1 & read x < hanging; exit 0";
    let arguments = [&["--filter=openonce".to_owned()], &arguments[..]].concat();
    room.captive(&arguments, command).run_to(0);
    assert_eq!(fs::read_to_string(room.path("log")).expect("it was unloaded"), "unload\n");
    room.wait_until_nothing_left();
}

/// The same where the command has ended, by itself or told to, and where the parent has.
#[test]
fn a_script_that_hangs_in_a_handshake_holds_up_neither_command_nor_parent() {
    if nbdkit_differs("it waits for the script") {
        return;
    }
    for method in ["preconnect", "list_exports", "open"] {
        let arguments = hanging_in(method, IN_THE_HANDSHAKE[0], "0.1");
        let log = |room: &Room| fs::read_to_string(room.path("log")).unwrap_or_default();
        // The command ends by itself.
        let room = Room::new();
        let _hanging = room.fifo("hanging");
        let command = "nbdinfo --list \"$uri\" > probe 2>&1 & read x < hanging; exit 3";
        room.captive(&arguments, command).run_to(3);
        assert_eq!(log(&room), "unload\n", "{method}");
        room.wait_until_nothing_left();
        // It is told to, and waits for the script as well.
        let room = Room::new();
        let mut hanging = room.fifo("hanging");
        let captive = room.captive(&arguments, "exec nbdinfo --list \"$uri\"").start();
        assert_eq!(hanging.hear(), "hanging");
        captive.signal(Signal::SIGTERM);
        captive.finish().expect_signal(Signal::SIGTERM);
        assert_eq!(log(&room), "unload\n", "{method}");
        room.assert_nothing_left();
        // The parent ends.
        let room = Room::new();
        let mut hanging = room.fifo("hanging");
        let mut parent = room.tool("sh", ["-c", "\"$@\" & wait", "sh"]);
        parent.args([server_path()]).args(["--exit-with-parent", "-U", "socket"]).args(&arguments);
        let mut parent = parent.start();
        parent.wait_until_listening(&room.path("socket"));
        let probe =
            format!("nbdinfo --list 'nbd+unix:///?socket={}' > probe 2>&1 & exit 0", room.path("socket").display());
        room.tool("sh", ["-c", &probe]).run_to(0);
        assert_eq!(hanging.hear(), "hanging");
        parent.signal(Signal::SIGKILL);
        parent.finish().expect_signal(Signal::SIGKILL);
        room.wait_until_nothing_left();
        assert_eq!(log(&room), "unload\n", "{method}");
    }
}

/// B18: "clean at every instant of start"
#[test]
fn a_signal_ends_a_server_whose_script_hangs_at_the_start() {
    if nbdkit_differs("it leaves the script and its directory") {
        return;
    }
    for method in ["config", "config_complete", "get_ready", "after_fork"] {
        let room = Room::new();
        let mut hanging = room.fifo("hanging");
        let script = format!("{method}=exec >&- 2>&-; echo hanging > hanging; sleep 1000; :");
        let arguments = ["eval", "get_size=echo 1M", &script, "key=value"];
        let words = |mode: &[&'static str]| [mode, &arguments[..]].concat();
        let arguments =
            if method == "config" { words(&["-f", "-U", "-"]) } else { words(&["-f", "-U", "-"])[..6].to_vec() };
        let server = room.server(arguments.iter().map(|word| word.to_string())).start();
        assert_eq!(hanging.hear(), "hanging");
        server.signal(Signal::SIGTERM);
        server.finish().expect_signal(Signal::SIGTERM);
        room.wait_until_nothing_left();
    }
}

/// C1, C13: "by whatever means", also before the server serves.
#[test]
fn a_parent_s_end_ends_a_server_whose_script_hangs_at_the_start() {
    if nbdkit_differs("it leaves the script and its directory") {
        return;
    }
    for method in ["config_complete", "get_ready", "after_fork"] {
        for command in [&[][..], &["--run", "touch ran"]] {
            let room = Room::new();
            let mut hanging = room.fifo("hanging");
            let script = format!("{method}=exec >&- 2>&-; echo hanging > hanging; sleep 1000; :");
            let mut parent = room.tool("sh", ["-c", "\"$@\" & wait", "sh"]);
            parent.args([server_path()]).args([
                "--exit-with-parent",
                "-U",
                "socket",
                "-P",
                "pid",
                "eval",
                "get_size=echo 1M",
            ]);
            let parent = parent.args([script]).args(command).start();
            assert_eq!(hanging.hear(), "hanging");
            parent.signal(Signal::SIGKILL);
            room.wait_until_nothing_left();
            parent.finish().expect_signal(Signal::SIGKILL);
            assert!(!room.path("ran").exists(), "the command is never started");
            assert!(!room.path("socket").exists() && !room.path("pid").exists(), "{method}");
        }
    }
}

#[test]
fn scripts_hold_no_descriptor_of_clients() {
    let room = Room::new();
    let server = room.serve(["eval", "get_size=echo 1M", "pread=ls -l /proc/self/fd > open; head -c $3 /dev/zero"]);
    let mut clients: Vec<_> = (0..5).map(|_| server.simple()).collect();
    clients.iter_mut().for_each(|client| drop(client.read(0, 512)));
    // What the caller of this test had open is there, but nothing of the server's.
    let open = fs::read_to_string(room.path("open")).expect("the script has written it");
    assert!(!open.contains("socket:") && !open.contains("anon_inode:") && !open.contains("memfd:"), "{open}");
    assert!(open.contains("pipe:"), "{open}");
    server.terminate().expect(0);
    room.wait_until_nothing_left();
}

#[test]
fn the_last_method_is_unload() {
    let room = Room::new();
    let log = |method: &str| format!("{method}=echo {method} >> log; test {method} != get_size || echo 1M");
    let methods =
        ["get_ready", "after_fork", "preconnect", "open", "close", "get_size", "config_complete", "unload"].map(log);
    let mut arguments = vec!["eval".to_owned()];
    arguments.extend(methods);
    room.captive(&arguments, "nbdinfo --size \"$uri\"").run_to(0);
    let text = fs::read_to_string(room.path("log")).expect("the scripts have written it");
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..5], ["config_complete", "get_ready", "after_fork", "preconnect", "open"], "{text}");
    assert_eq!(lines[lines.len() - 2..], ["close", "unload"], "{text}");
    room.assert_nothing_left();
}

/// What the raw client of libnbd prints of `base:allocation`, question by question.
fn statuses(room: &Room, arguments: &[&str], questions: &str) -> String {
    let script = format!(
        "import sys, nbd\nh = nbd.NBD()\nh.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)\nh.connect_uri(sys.argv[1])\n\
         def ask(*question):\n    h.block_status(*question[:2], lambda context, offset, extents, error: print(extents), *question[2:])\n\
         {questions}"
    );
    room.write("ask.py", script);
    let output = room.captive(arguments, "/usr/bin/python3 ask.py \"$uri\"").run_to(0);
    room.assert_nothing_left();
    output.text().to_owned()
}

/// Newer than the nbdkit that the other tests have beside them.
#[test]
fn lists_of_extents_have_comments_and_descriptions_of_data_base64() {
    if nbdkit_differs("since 1.46") {
        return;
    }
    let room = Room::new();
    let extents = r"extents=printf '# all of it\n\n 0 64K # data\n64K 1M hole # and none\n'";
    let map = r#"nbdinfo --map "$uri""#;
    let words = ["eval", "get_size=echo 1M", "pread=exit 1", "can_extents=exit 0", extents];
    let lines = |output: super::harness::Output| -> Vec<Vec<String>> {
        let words = |line: &str| line.split_whitespace().take(3).map(str::to_owned).collect();
        output.text().lines().map(words).collect()
    };
    let expected = [["0", "65536", "0"], ["65536", "983040", "1"]];
    assert_eq!(lines(room.captive(words, map).run_to(0)), expected);
    room.write("list", "# all of it\n\n 0 64K # data\n64K 1M hole # and none\n");
    let words = ["--filter=extentlist", "memory", "1M", "extentlist=list"];
    assert_eq!(lines(room.captive(words, map).run_to(0)), expected);
    let words = ["data", "base64:aGVsbG8= 33", "size=6"];
    assert_eq!(room.captive(words, r#"nbdcopy "$uri" -"#).run_to(0).text(), "hello!");
}

/// What is cut off an extent that is too long leaves it aligned. Source: nbdkit's tests/test-eval-extents.sh.
#[test]
fn an_extent_that_is_too_long_for_a_compact_reply_ends_the_map_on_a_border() {
    let arguments = [
        "eval",
        "get_size=echo 5G",
        "pread=dd if=/dev/zero count=$3 iflag=count_bytes",
        "extents=echo 0 4G 1; echo 4G 1G 2",
    ];
    let room = Room::new();
    let questions = "ask(2**32-1, 2)\nask(2**32-1, 1)\nask(2**32-1, 0)\nask(2**32-1, 0, nbd.CMD_FLAG_REQ_ONE)\n";
    assert_eq!(
        statuses(&room, &arguments, questions),
        "[4294901760, 1]\n[4294901760, 1]\n[4294901760, 1]\n[4294967295, 1]\n"
    );
}

#[test]
fn the_last_extent_tells_all_that_the_device_said_and_no_more_than_the_export_has() {
    let arguments = ["eval", "get_size=echo 1M", "pread=exit 1", "extents=echo 0 4096; echo 4096 8M hole,zero"];
    let room = Room::new();
    let questions =
        "ask(512, 512)\nask(8192, 0)\nask(8192, 0, nbd.CMD_FLAG_REQ_ONE)\nask(512, 8192, nbd.CMD_FLAG_REQ_ONE)\n";
    assert_eq!(statuses(&room, &arguments, questions), "[3584, 0]\n[4096, 0, 1044480, 3]\n[4096, 0]\n[512, 3]\n");
}

/// A client that waits for the end of the stream knows that the device is closed.
#[test]
fn the_stream_ends_after_the_device_has_closed() {
    let room = Room::new();
    let close = "close=while ! test -e go; do sleep 0.1; done; touch closed";
    let wait = "import sys, nbd\nh = nbd.NBD()\nh.connect_uri(sys.argv[1])\nopen('go', 'w')\nh.shutdown()\n";
    room.write("wait.py", wait);
    room.captive(
        ["eval", "get_size=echo 1M", "pread=exit 1", close],
        "/usr/bin/python3 wait.py \"$uri\" && test -e closed",
    )
    .run_to(0);
    room.assert_nothing_left();
}

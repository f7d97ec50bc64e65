//! A server as a service, and as nbdkit: systemd-socket-activate, an inetd, users who are not root, virtual machines, swap, a
//! link named `nbdkit`, debug flags. Sentences in quotes are from nbdkit's manual pages.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{Launch, Room, free_port, nbdkit_differs, program_name, server_path, wait_for};
use super::raw_client::Client;

/// A snapshot by name, with the others.
fn snapshot(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../../snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

/// The server by a link of another name.
fn called(room: &Room, name: &str, arguments: &[&str]) -> Launch {
    let link = room.path(name);
    if !link.exists() {
        symlink(server_path(), &link).expect("a link in the room");
    }
    let mut launch = room.launch(&link);
    launch.args(arguments);
    launch
}

/// The pid in a pid file, once it is there.
fn pid_in(room: &Room, name: &str) -> i32 {
    wait_for("the pid file", || fs::read_to_string(room.path(name)).ok()?.trim().parse().ok())
}

/// A client of a TCP server has read the greeting.
fn greets_at(address: &str) {
    let mut stream = wait_for("the port to be open", || TcpStream::connect(address).ok());
    let mut greeting = [0; 8];
    stream.read_exact(&mut greeting).expect("a greeting");
    assert_eq!(&greeting, b"NBDMAGIC");
}

/// "nbdkit supports socket activation (sometimes called systemd socket activation)"
mod systemd {
    use super::*;

    /// systemd's own program that does what systemd does, and becomes the server at the first client.
    fn activate<A: AsRef<OsStr>>(room: &Room, how: &[A], arguments: &[&str]) -> Launch {
        let mut launch = room.tool("systemd-socket-activate", how);
        launch.args([server_path()]).args(arguments);
        launch
    }

    #[test]
    fn several_sockets_with_names_are_served_by_one_server() {
        if nbdkit_differs("1.32 does not name the service mode") {
            return;
        }
        let room = Room::new();
        let port = free_port();
        let listen = [room.path("one").display().to_string(), room.path("two").display().to_string()];
        let how = ["-l", &listen[0], "-l", &listen[1], "-l", &format!("127.0.0.1:{port}"), "--fdname=one:two:three"];
        let running = activate(&room, &how, &["-v", "memory", "1M"]).start();
        // Whoever comes first has the server started.
        let socket = room.path("one");
        wait_for("the socket", || UnixStream::connect(&socket).ok());
        let mut client = Client::connect(&room.path("one"));
        client.start();
        client.go(b"");
        client.write(0, 512, b"seen");
        let mut other = Client::connect(&room.path("two"));
        other.start();
        other.go(b"");
        assert_eq!(other.read(512, 4), b"seen");
        greets_at(&format!("127.0.0.1:{port}"));
        drop((client, other));
        running.signal(Signal::SIGTERM);
        let output = running.finish().expect(0);
        assert!(output.stderr.contains("nr_socks = 3"), "{output:#?}");
        assert!(output.stderr.contains("service mode: socket activation"), "{output:#?}");
        assert!(room.path("one").exists() && room.path("two").exists(), "they are systemd's");
        room.assert_nothing_left();
    }

    /// "In this mode using -i, -p, --run, -s or -U flags on the command line will cause an error."
    #[test]
    fn options_that_say_where_to_listen_are_refused() {
        for option in ["-s", "-U-", "-p1", "-i::1", "--run=true"] {
            let room = Room::new();
            let socket = room.path("one").display().to_string();
            let running = activate(&room, &["-l", &socket], &[option, "memory", "1M"]).start();
            let client = wait_for("the socket", || UnixStream::connect(&socket).ok());
            let output = running.finish().expect(1);
            let flag = if option.starts_with("--") { "--run" } else { &option[..2] };
            let line = format!("cannot use socket activation with {flag} flag");
            assert!(output.stderr.contains(&line), "{output:#?}");
            drop(client);
        }
    }

    /// "Optional settings to run as non-root: User=nbd"
    #[test]
    fn a_server_may_become_another_user_at_a_socket_that_is_root_s() {
        if nbdkit_differs("it resets a client that sends nothing and leaves") {
            return;
        }
        let room = Room::new();
        let socket = room.path("one").display().to_string();
        let running = activate(&room, &["-l", &socket], &["-u", "nobody", "-P", "pid", "memory", "1M"]).start();
        wait_for("the socket", || UnixStream::connect(&socket).ok());
        let mut client = Client::connect(&room.path("one"));
        client.start();
        client.go(b"");
        client.expect_alive();
        let pid = pid_in(&room, "pid");
        assert_eq!(pid, running.pid());
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it is there");
        assert!(status.lines().any(|line| line.starts_with("Uid:\t65534\t65534")), "{status}");
        drop(client);
        running.signal(Signal::SIGTERM);
        running.finish().expect(0);
        assert!(!room.path("pid").exists() || nbdkit_differs("it leaves the pid file"));
    }

    /// One process for each client, as with `Accept=yes` and `StandardInput=socket`.
    #[test]
    fn one_client_at_stdin_for_each_connection() {
        let room = Room::new();
        let socket = room.path("one").display().to_string();
        let how = ["--inetd", "--accept", "-l", &socket];
        let running = activate(&room, &how, &["-s", "memory", "1M"]).start();
        wait_for("the socket", || UnixStream::connect(&socket).ok());
        for _ in 0..2 {
            let mut client = Client::connect(&room.path("one"));
            client.start();
            client.go(b"");
            // Each has a disk of its own.
            assert_eq!(client.read(0, 4), [0; 4]);
            client.write(0, 0, b"mine");
            client.disconnect();
        }
        running.signal(Signal::SIGTERM);
        running.finish();
        room.wait_until_nothing_left();
    }
}

/// "nbd stream tcp nowait root /usr/sbin/nbdkit nbdkit -s file /tmp/disk.img". socat stands in for inetd: it accepts, and starts a
/// program for each client that has the connection as stdin and stdout.
mod inetd {
    use super::*;

    #[test]
    fn each_connection_gets_a_server_of_its_own() {
        for how in ["", ",pipes"] {
            let room = Room::new();
            fs::write(room.path("disk"), vec![b'x'; 1 << 20]).expect("a file in the room");
            let port = free_port();
            // socat parts words at blanks, and is not asked to leave those of a path alone.
            symlink(server_path(), room.path("server")).expect("a link in the room");
            let program = format!("EXEC:./server -r -s file disk{how}");
            let mut inetd =
                room.tool("socat", [format!("TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork"), program]).start();
            greets_at(&format!("127.0.0.1:{port}"));
            let uri = format!("nbd://127.0.0.1:{port}");
            for _ in 0..2 {
                let output = room.tool("nbdinfo", ["--size", &uri]).run_to(0);
                assert_eq!(output.text(), "1048576\n");
            }
            room.tool("nbdcopy", [uri.as_str(), "copy"]).run_to(0);
            assert!(fs::read(room.path("copy")).expect("it was copied").iter().all(|byte| *byte == b'x'));
            assert!(!inetd.has_ended());
            inetd.signal(Signal::SIGTERM);
            inetd.finish();
            room.wait_until_nothing_left();
        }
    }
}

/// What a user may do who is not root.
mod unprivileged {
    use super::*;

    /// The server below a user of its own, in a room that all may write in.
    fn as_somebody(room: &Room, arguments: &[&str]) -> Launch {
        let server = room.open_to_all();
        let mut launch = room.tool("setpriv", ["--reuid=61235", "--regid=61235", "--clear-groups"]);
        launch.args([server]).args(arguments);
        launch
    }

    #[test]
    fn every_service_mode_works() {
        if nbdkit_differs("it tells of port 0") {
            return;
        }
        let room = Room::new();
        let command = ["memory", "1M", "--run", "id -u; nbdinfo --size \"$uri\""];
        assert_eq!(as_somebody(&room, &command).run_to(0).text(), "61235\n1048576\n");
        let command = ["-p", "0", "memory", "1M", "--run", "nbdinfo --size \"$uri\""];
        assert_eq!(as_somebody(&room, &command).run_to(0).text(), "1048576\n");
        as_somebody(&room, &["-s", "memory", "1M"]).run_to(1).expect_error_line(&[]);

        as_somebody(&room, &["-P", "pid", "-U", "socket", "memory", "1M"]).run_to(0);
        let mut client = Client::connect(&room.path("socket"));
        client.start();
        client.go(b"");
        client.expect_alive();
        drop(client);
        kill(Pid::from_raw(pid_in(&room, "pid")), Signal::SIGTERM).expect("it is there");
        room.wait_until_nothing_left();
        assert!(!room.path("socket").exists() && !room.path("pid").exists());
    }

    /// "The server needs sufficient permissions to be able to do this."
    #[test]
    fn nobody_but_root_becomes_somebody_else_but_all_may_stay_who_they_are() {
        if nbdkit_differs("the command runs although the server could not start") {
            return;
        }
        let room = Room::new();
        for (option, call) in [("-u0", "set"), ("-unobody", "set"), ("-g0", "setgroups")] {
            let mut launch = as_somebody(&room, &[option, "memory", "1M", "--run", "touch ran"]);
            launch.run_to(1).expect_error_line(&[call, "Operation not permitted"]);
            assert!(!room.path("ran").exists());
        }
        let command = ["-u", "61235", "memory", "1M", "--run", "nbdinfo --size \"$uri\""];
        assert_eq!(as_somebody(&room, &command).run_to(0).text(), "1048576\n");
        room.assert_nothing_left();
    }

    #[test]
    fn what_may_not_be_written_is_an_error_and_names_the_place() {
        if nbdkit_differs("G4, E2: the launcher says 0") {
            return;
        }
        let room = Room::new();
        fs::create_dir(room.path("closed")).expect("a directory in the room");
        fs::set_permissions(room.path("closed"), fs::Permissions::from_mode(0o755)).expect("it is ours");
        let log = format!("--log={}", room.path("closed/log").display());
        for arguments in [&["-P", "closed/pid"][..], &["-U", "closed/socket"], &[&log]] {
            for more in [&["-f"][..], &[], &["--run", "touch ran"]] {
                let arguments =
                    [arguments, &["memory", "1M", "-p0"][..if arguments[0] == "-U" { 2 } else { 3 }], more].concat();
                as_somebody(&room, &arguments).run_to(1).expect_error_line(&["closed/", "Permission denied"]);
                assert!(!room.path("ran").exists());
                room.assert_nothing_left();
            }
        }
    }
}

/// "Lock the whole nbdkit process into memory using mlockall(2)"
mod swap {
    use super::*;

    fn locked(pid: i32) -> u64 {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
        let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).expect("Linux says so");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    #[test]
    fn the_server_that_serves_is_locked_in_every_mode_and_the_command_is_not() {
        let room = Room::new();
        let server = room.serve(["--swap", "memory", "1M"]);
        server.simple().expect_alive();
        assert!(locked(server.running.pid()) > 0);
        server.terminate().expect(0);

        // Locks do not outlive a fork, which nbdkit 1.45 forgets.
        if nbdkit_differs("in the background it is not locked") {
            return;
        }
        room.server(["--swap", "-P", "pid", "-U", "s", "memory", "1M"]).run_to(0);
        let pid = pid_in(&room, "pid");
        assert!(locked(pid) > 0);
        kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it is there");
        room.wait_until_nothing_left();

        let command = "nbdinfo --size \"$uri\"; for pid in $$ $(cat pid); do grep VmLck /proc/$pid/status; done";
        let output = room.captive(["--swap", "-P", "pid", "memory", "1M"], command).run_to(0);
        let lines: Vec<_> = output.text().lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!(lines[0], ["1048576"]);
        assert_eq!(lines[1], ["VmLck:", "0", "kB"], "the command");
        assert_ne!(lines[2], ["VmLck:", "0", "kB"], "the server");
    }

    /// "This may require additional permissions, such as starting the server as root or raising the RLIMIT_MEMLOCK limit"
    #[test]
    fn a_limit_that_is_too_low_is_an_error_and_no_death_in_the_midst_of_work() {
        if nbdkit_differs("it does not say what to do") {
            return;
        }
        let room = Room::new();
        room.open_to_all();
        for limit in ["0", "65536", "8000000"] {
            let arguments = ["--reuid=61236", "--regid=61236", "--clear-groups", "prlimit"];
            let mut launch = room.tool("setpriv", arguments);
            launch.args([format!("--memlock={limit}:{limit}"), format!("./{}", program_name())]);
            launch
                .args(["--swap", "-p0", "-f", "memory", "1M"])
                .run_to(1)
                .expect_error_line(&["mlockall", "ulimit -l"]);
        }
    }
}

/// "On Linux nbdkit supports the AF_VSOCK address family / protocol."
mod vsock {
    use super::*;

    #[test]
    fn a_port_of_its_own_is_listened_at_and_told() {
        if nbdkit_differs("1.32 says vsock URIs of another kind") {
            return;
        }
        let room = Room::new();
        let command = "echo \"$uri|$port|$unixsocket\"; \"$SERVER\" -f --vsock -p \"$port\" null";
        let mut launch = room.captive(["--vsock", "-p", "0", "-e", "a b", "memory", "1M"], command);
        // Nobody else can have the port, so it is taken; where a machine can connect to itself the command could look.
        let output = launch.env("SERVER", server_path()).run_to(1);
        let port = output.text().trim_end().split('|').nth(1).expect("a port");
        assert!(port.parse::<u32>().expect("a number") > 0);
        assert_eq!(output.text(), format!("nbd+vsock://1:{port}/a%20b|{port}|\n"));
        let line = format!("{}: --vsock: port {port}: Address already in use\n", program_name());
        assert_eq!(output.stderr, line);
    }

    #[test]
    fn its_ports_are_numbers_of_32_bits() {
        let room = Room::new();
        for (port, why) in [("nbd", "expected a number"), ("-1", "negative"), ("4294967296", "out of range")] {
            room.server(["-f", "--vsock", "-p", port, "null"]).run_to(1).expect_error_line(&["port: ", why]);
        }
        for other in [&["-U", "s"][..], &["-s"]] {
            let arguments = [&["--vsock", "null"], other].concat();
            room.server(arguments).run_to(1).expect_error_line(&["--vsock"]);
        }
    }
}

/// `-p 0`: the system chooses the port, and all are told which.
mod any_port {
    use super::*;

    #[test]
    fn the_port_that_was_chosen_is_one_for_both_families_and_told_everywhere() {
        if nbdkit_differs("it tells of port 0") {
            return;
        }
        let room = Room::new();
        let command = "echo \"$port\"; nbdinfo --size \"nbd://127.0.0.1:$port\"; nbdinfo --size \"$uri\"";
        let output = room.captive(["--print-uri", "-p", "0", "memory", "1M"], command).run_to(0);
        let lines: Vec<_> = output.text().lines().collect();
        let port = lines[4];
        assert_ne!(port, "0");
        assert_eq!(lines[0], format!("nbd://localhost:{port}"));
        assert_eq!(lines[5..], ["1048576", "1048576"]);

        for mode in [&["-f"][..], &[]] {
            let mut running = room.server([mode, &["--print-uri", "-p0", "-P", "pid", "memory", "1M"]].concat());
            let running = running.start();
            let pid = pid_in(&room, "pid");
            let uri = wait_for("the URI", || running.stdout().lines().next().map(str::to_owned));
            assert_eq!(room.tool("nbdinfo", ["--size", &uri]).run_to(0).text(), "1048576\n");
            kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it is there");
            running.finish().expect(0);
            room.wait_until_nothing_left();
        }
    }
}

/// A program that calls nbdkit, and gets this one by a link of that name.
mod as_nbdkit {
    use super::*;

    /// What depends on the machine and the build.
    fn filtered(room: &Room, text: &str) -> String {
        let server = server_path().canonicalize().expect("the server is there");
        let directory = server.parent().expect("it is in a directory").to_owned();
        let prefix = directory.parent().expect("below another").display().to_string();
        let text = text.replace(&server.display().to_string(), "[binary]");
        let text = text.replace(&directory.display().to_string(), "[bindir]").replace(&prefix, "[prefix]");
        let text = text.replace(env!("CARGO_PKG_VERSION"), "[version]").replace(std::env::consts::ARCH, "[cpu]");
        let text = text.replace("\ntls=yes\n", "\ntls=[built in]\n").replace("\ntls=no\n", "\ntls=[built in]\n");
        text.replace(&room.path("").display().to_string(), "[room]/")
    }

    #[test]
    fn version_and_configuration_are_nbdkits() {
        if nbdkit_differs("it is nbdkit") {
            return;
        }
        let room = Room::new();
        let mut text = String::new();
        for line in [
            "--version",
            "memory --version --filter=cow",
            "--dump-config",
            "--long-options",
            "memory --dump-plugin",
            "null --filter=cow --dump-plugin",
            "info mode=version --run nbdcopy\u{a0}\"$uri\"\u{a0}-",
            "--print-uri -U socket null --run true",
        ] {
            let words: Vec<_> = line.split(' ').map(|word| word.replace('\u{a0}', " ")).collect();
            let words: Vec<_> = words.iter().map(String::as_str).collect();
            let output = called(&room, "nbdkit", &words).run_to(0);
            assert_eq!(output.stderr, "");
            text += &format!("$ nbdkit {}\n{}\n", words.join(" "), output.text().replace('\0', ""));
        }
        // However deep it is called.
        let link = room.path("nbdkit");
        assert!(room.launch(&link).args(["-V"]).run_to(0).text().starts_with("nbdkit 1.45."));
        snapshot("as-nbdkit", &filtered(&room, &text));
    }

    #[test]
    fn by_its_own_name_it_says_its_own_version() {
        if nbdkit_differs("its name is another") {
            return;
        }
        let room = Room::new();
        for name in ["nbdcaptive", "server"] {
            let version = called(&room, name, &["--version"]).run_to(0);
            assert_eq!(version.text(), concat!("nbdcaptive ", env!("CARGO_PKG_VERSION"), "\n"));
        }
    }

    #[test]
    fn its_lines_begin_with_the_name_it_was_called_by() {
        if nbdkit_differs("getopt begins its lines with the whole path") {
            return;
        }
        let room = Room::new();
        for name in ["nbdkit", "nbdcaptive", "my-server"] {
            let output = called(&room, name, &["-v", "file", "missing", "-U", "s", "-f"]).run_to(1);
            let prefix = format!("{name}: ");
            assert!(output.stderr.lines().all(|line| line.starts_with(&prefix)), "{output:#?}");
            let error = output.stderr.lines().last().expect("a line");
            assert!(error.starts_with(&format!("{name}: error: ")) && error.contains("missing"), "{error}");
        }
        let refused = called(&room, "nbdkit", &["--no-such-option"]).run_to(1);
        assert!(refused.stderr.starts_with("nbdkit: unrecognized option '--no-such-option'"), "{refused:#?}");
    }

    /// Scripts read in it which process it was, when that has ended: nbdkit tests/test-exitwhen-file-created.sh.
    #[test]
    fn the_pid_file_stays_at_the_end() {
        let room = Room::new();
        called(&room, "nbdkit", &["-P", "pid", "null", "--run", "cp pid seen"]).run_to(0);
        let read = |name| std::fs::read_to_string(room.path(name)).expect("it is there");
        assert_eq!(read("pid"), read("seen"));
        assert!(read("pid").trim().parse::<u32>().is_ok_and(|pid| pid > 1));
        room.wait_until_nothing_left();
    }

    /// nbdkit tests/test-verbose.sh: "debug: nbdkit 1\."
    #[test]
    fn the_first_line_of_verbose_is_the_version() {
        if nbdkit_differs("its version is another") {
            return;
        }
        let room = Room::new();
        let output = called(&room, "nbdkit", &["--verbose", "null", "--run", "true"]).run_to(0);
        assert!(output.stderr.starts_with("nbdkit: debug: nbdkit 1.45."), "{output:#?}");
        assert_eq!(output.text(), "");
    }

    /// Programs look there for what a plugin can do: libnbd's tests for `has_list_exports=1` of the sh plugin.
    #[test]
    fn what_a_plugin_has_is_said_by_dump_plugin() {
        let room = Room::new();
        for (plugin, says) in [
            ("sh", &["has_list_exports=1", "has_can_cache=1", "has_thread_model=1"][..]),
            ("eval", &["has_list_exports=1", "has_extents=1"]),
            ("memory", &["has_pwrite=1", "mlock=yes"]),
        ] {
            let output = called(&room, "nbdkit", &[plugin, "--dump-plugin"]).run_to(0);
            let lines: Vec<_> = output.text().lines().collect();
            for line in says {
                assert_eq!(lines.iter().filter(|one| *one == line).count(), 1, "{line}: {output:#?}");
            }
        }
        let output = called(&room, "nbdkit", &["zero", "--dump-plugin"]).run_to(0);
        assert!(!output.text().contains("has_pwrite"), "{output:#?}");
    }

    /// nbdkit-probing(1): "List all plugins in the plugin directory", "Detect if a plugin is installed", "Detect if a filter is
    /// installed"
    #[test]
    fn the_ways_to_probe_work() {
        let room = Room::new();
        called(&room, "nbdkit", &["memory", "--version"]).run_to(0);
        called(&room, "nbdkit", &["--version", "--filter=cow", "null"]).run_to(0);
        called(&room, "nbdkit", &["nosuchplugin", "--version"]).run_to(1);
        called(&room, "nbdkit", &["--version", "--filter=nosuchfilter", "null"]).run_to(1);
        let script = r#"
            PATH="$PWD:$PATH"
            plugindir=`nbdkit --dump-config | grep ^plugindir= | sed 's/[^=]*=//'`
            nbdkit "$plugindir/nbdkit-file-plugin.so" --version >/dev/null || exit 5
            minor=$( nbdkit --dump-config | grep ^version_minor | cut -d= -f2 )
            [ $minor -ge 32 ]
        "#;
        room.tool("sh", ["-c", script]).run_to(0);
    }
}

/// "Set the plugin or filter Debug Flag called FLAG to the integer value N."
mod debug_flags {
    use super::*;

    fn verbose(room: &Room, flags: &[&str]) -> String {
        let arguments = [&["-v", "--filter=cow", "pattern", "1M"], flags].concat();
        let command = "nbdcopy \"$uri\" null:; nbdinfo --size \"$uri\" >/dev/null";
        room.captive(arguments, command).run_to(0).stderr
    }

    /// "These flags control the verbosity of nbdkit backend debugging messages (the ones which show every request processed by
    /// the server)."
    #[test]
    fn control_and_data_path_are_shown_of_every_layer_unless_told_otherwise() {
        let room = Room::new();
        let (control, data) = ("-Dnbdkit.backend.controlpath=0", "-Dnbdkit.backend.datapath=0");
        for (flags, shows_control, shows_data) in
            [(&[][..], true, true), (&[control], false, true), (&[data], true, false), (&[control, data], false, false)]
        {
            let said = verbose(&room, flags);
            for layer in ["cow", "pattern"] {
                let shown = |call: &str| said.lines().any(|line| line.contains(&format!("debug: {layer}: {call}")));
                assert_eq!(shown("open readonly="), shows_control, "{layer}: {said}");
                assert_eq!(shown("close"), shows_control, "{layer}: {said}");
                assert_eq!(shown("pread count="), shows_data, "{layer}: {said}");
            }
            if shows_data {
                let at = |what: &str| said.find(what).unwrap_or_else(|| panic!("no {what} in {said}"));
                assert!(at("cow: pread count=") < at("pattern: pread count="), "from the client inwards: {said}");
            }
        }
        let quiet = room.captive(["memory", "1M"], "nbdcopy \"$uri\" null:").run_to(0);
        assert_eq!(quiet.stderr, "");
    }

    /// Each call is shown once, although the server may try one twice.
    #[test]
    fn a_request_is_shown_once_in_each_layer() {
        let room = Room::new();
        let server = room.serve(["-v", "--filter=cow", "memory", "1M"]);
        let mut client = server.simple();
        client.write(0, 4096, b"data");
        assert_eq!(client.read(4096, 4), b"data");
        drop(client);
        let output = server.terminate().expect(0);
        let count = |what: &str| output.stderr.lines().filter(|line| line.contains(what)).count();
        assert_eq!(count("debug: cow: pwrite count=4 offset=4096 fua=0"), 1, "{output:#?}");
        assert_eq!(count("debug: cow: pread count=4 offset=4096"), 1, "{output:#?}");
    }

    /// "-D nbdkit.environ=1: Print nbdkit's environment variables in the debug output at start up."; tests/test-verbose.sh
    #[test]
    fn the_environment_is_shown_where_asked_for_and_stays_on_its_lines() {
        if nbdkit_differs("1.32 does not have it") {
            return;
        }
        let room = Room::new();
        let mut launch = room.captive(["-v", "-D", "nbdkit.environ=1", "null"], "true");
        let said = launch.env("some_special", "a\u{7}\u{8}\t\n\\\u{1b}z").run_to(0).stderr;
        let line = format!("{}: debug: some_special=a\\a\\b\\t\\n\\\\\\x1bz", program_name());
        assert!(said.lines().any(|one| one == line), "{said}");
        assert!(!verbose(&room, &[]).contains("TMPDIR="));
        let quiet = room.captive(["-D", "nbdkit.environ=1", "null"], "true").run_to(0);
        assert_eq!(quiet.stderr, "");
    }

    /// What each layer says of itself where it is asked to, and not otherwise.
    #[test]
    fn the_flags_of_layers_make_them_say_what_they_do() {
        if nbdkit_differs("its sentences are its own") {
            return;
        }
        let room = Room::new();
        fs::write(room.path("disk"), vec![b'x'; 1 << 20]).expect("a file in the room");
        fs::write(room.path("list"), "0 64k\n").expect("a file in the room");
        let write = "nbdcopy disk \"$uri\"";
        let read = "nbdcopy \"$uri\" null:";
        let zero = "/usr/bin/python3 -c 'import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); \
                    h.zero(65536, 0); h.shutdown()' \"$uri\"";
        for (flag, arguments, command, says) in [
            (
                "ip.rules=1",
                &["--filter=ip", "memory", "1M", "allow=anyunix", "deny=all"][..],
                read,
                "ip: match client with allow: ",
            ),
            (
                "protect.write=1",
                &["--filter=protect", "memory", "1M"],
                write,
                "protect: skipping unprotected region offset ",
            ),
            ("rate.bucket=1", &["--filter=rate", "pattern", "1M", "rate=1G"], read, "bucket read: deducting "),
            ("spinning.verbose=1", &["--filter=spinning", "pattern", "64k"], read, "spinning: do_seek: "),
            (
                "extentlist.lookup=1",
                &["--filter=extentlist", "pattern", "1M", "extentlist=list"],
                read,
                "extentlist lookup: loop i=0 ",
            ),
            (
                "cacheextents.cache=1",
                &["--filter=cacheextents", "memory", "1M"],
                "nbdinfo --map \"$uri\"",
                "cacheextents: updating cache with: offset=0 length=1048576 type=3\n",
            ),
            ("file.zero=1", &["file", "disk"], zero, "/disk: zero succeeded using fallocate"),
            (
                "example2.extra=1",
                &["example2", "file=disk"],
                read,
                "debug: extra debugging: statbuf.st_size = 1048576\n",
            ),
        ] {
            let said = |more: &[&str]| room.captive([arguments, more].concat(), command).run_to(0).stderr;
            assert!(said(&["-v", "-D", flag]).contains(says), "{flag}: {}", said(&["-v", "-D", flag]));
            assert!(!said(&["-v"]).contains(says), "{flag}");
            assert_eq!(said(&["-D", flag]), "", "{flag}");
        }
    }

    /// nbdkit tests/test-debug-flags.sh
    #[test]
    fn a_flag_that_nothing_has_is_a_warning() {
        let room = Room::new();
        let name = program_name();
        for (flag, warning) in [
            (
                "memory.unknown=1",
                "-D memory.unknown: memory does not contain a global variable called memory_debug_unknown",
            ),
            ("file.zero=1", "debug flag -D file.zero was not used"),
        ] {
            for arguments in
                [&["memory", "1M", "--run", "exit 3"][..], &["memory", "--help"], &["memory", "--dump-plugin"]]
            {
                let output = room.server([&["-D", flag], arguments].concat()).run();
                assert_eq!(output.status.code(), Some(if arguments.len() == 4 { 3 } else { 0 }), "{output:#?}");
                assert_eq!(output.stderr.lines().count(), 1, "{output:#?}");
                assert!(output.stderr.starts_with(&format!("{name}: warning: {warning}")), "{output:#?}");
            }
        }
        for bad in ["=", ".", "x.y=", "x.=1", ".y=1", "x.y=z"] {
            let line = room.server(["-D", bad, "null"]).run_to(1);
            line.expect_error_line(&["-D (Debug Flag) must have the format NAME.FLAG=N"]);
        }
    }
}

/// "Apply the SELinux label SOCKET-LABEL to the nbdkit listening socket."
#[test]
fn a_selinux_label_that_cannot_be_had_is_an_error_and_nothing_is_served() {
    if nbdkit_differs("it does not say why") {
        return;
    }
    let room = Room::new();
    let has_selinux = PathBuf::from("/sys/fs/selinux/enforce").exists();
    for arguments in [&["-f", "-U", "s"][..], &["-f", "-p0"], &["--run", "touch ran"]] {
        // No policy knows it; without SELinux there is no label at all.
        let arguments = [&["--selinux-label=no:such:label:", "memory", "1M"], arguments].concat();
        let words: &[&str] = if has_selinux { &["selinux-label: "] } else { &["selinux-label: ", "has no SELinux"] };
        room.server(arguments).run_to(1).expect_error_line(words);
        assert!(!room.path("s").exists() && !room.path("ran").exists());
        room.assert_nothing_left();
    }
}

/// Whatever a command line is made of, there is an answer: status 0 or 1, and for the latter a line. Never a panic.
#[test]
fn no_value_of_any_option_is_a_panic() {
    if nbdkit_differs("G4: a pid file that cannot be written is not noticed") {
        return;
    }
    let room = Room::new();
    let options = called(&room, &program_name(), &["--long-options"]).run_to(0);
    let values =
        ["", "=", "=-1", "=0", "=18446744073709551616", "=\u{1F980}\n", "=%", "=a.b=1", "=/", "=1e999", "=-", "=:"];
    for option in options.text().lines() {
        for value in values {
            // Never served: the pid file cannot be written, whatever else is said.
            let word = format!("{option}{value}");
            let output = called(&room, &program_name(), &["-U-", "null", &word, "-P", "/nowhere/pid"]).run();
            let status = output.shell_status();
            assert!(status <= 1, "{word:?}: {output:#?}");
            assert!(
                !output.stderr.contains("panicked") && !output.stderr.contains("backtrace"),
                "{word:?}: {output:#?}"
            );
            assert_eq!(status == 1, !output.stderr.is_empty(), "{word:?}: {output:#?}");
            let errors =
                output.stderr.lines().filter(|line| !line.contains(": warning: ") && !line.contains(": debug: "));
            assert!(errors.count() <= 1, "{word:?}: {output:#?}");
        }
    }
    room.assert_nothing_left();
}

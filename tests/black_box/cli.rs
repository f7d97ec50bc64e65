//! What the command line answers without a client: help, version, errors, aliases. The wording is pinned by snapshots elsewhere.

use super::harness::{Room, nbdkit_differs, program_name};

#[test]
fn version_is_one_line_with_name_and_number() {
    let room = Room::new();
    for option in ["--version", "-V"] {
        let output = room.server([option]).run_to(0);
        let line = output.text().trim_end_matches('\n');
        assert!(!line.contains('\n'), "{line:?}");
        let (name, number) = line.split_once(' ').expect("name and number");
        assert_eq!(name, program_name());
        assert!(number.starts_with(|first: char| first.is_ascii_digit()), "{number:?}");
        assert_eq!(output.stderr, "");
    }
}

#[test]
fn help_names_every_option_and_succeeds() {
    let room = Room::new();
    let output = room.server(["--help"]).run_to(0);
    for option in
        ["--run", "--exit-with-parent", "--filter", "--pidfile", "--readonly", "--unix", "--port", "--threads"]
    {
        assert!(output.text().contains(option), "{option} in {}", output.text());
    }
    assert_eq!(output.stderr, "");
}

#[test]
fn help_and_version_work_with_a_plugin_and_say_something_of_it() {
    let room = Room::new();
    for option in ["--help", "--version"] {
        let output = room.server(["memory", option]).run_to(0);
        assert!(output.text().contains("memory"), "{output:#?}");
    }
}

/// "To test if the current binary supports this feature [...]: nbdkit --exit-with-parent --version && echo "supported""
#[test]
fn exit_with_parent_and_version_succeed() {
    let room = Room::new();
    let output = room.server(["--exit-with-parent", "--version"]).run_to(0);
    assert!(output.text().starts_with(&program_name()));
}

/// "nbdkit --dump-config prints either exit_with_parent=yes or exit_with_parent=no"
#[test]
fn dump_config_says_exit_with_parent() {
    let room = Room::new();
    let output = room.server(["--dump-config"]).run_to(0);
    assert!(output.text().lines().any(|line| line == "exit_with_parent=yes"), "{output:#?}");
    assert!(output.text().lines().all(|line| line.contains('=')), "key=value lines: {output:#?}");
}

#[test]
fn dump_plugin_says_name_and_thread_model() {
    let room = Room::new();
    let output = room.server(["memory", "--dump-plugin"]).run_to(0);
    for wanted in ["name=memory", "thread_model=parallel", "magic_config_key=size"] {
        assert!(output.text().lines().any(|line| line == wanted), "{wanted} in {}", output.text());
    }
}

#[test]
fn no_plugin_is_an_error() {
    let room = Room::new();
    let output = room.server([""; 0]).run_to(1);
    // With nbdkit's hint in a second line.
    let first = output.stderr.lines().next().expect("a line on stderr");
    assert_eq!(first, format!("{}: no plugins given on the command line.", program_name()));
    assert_eq!(output.text(), "");
}

#[test]
fn an_unknown_option_is_an_error_that_names_it() {
    let room = Room::new();
    for arguments in [&["--no-such-option", "memory", "1M"][..], &["memory", "1M", "--no-such-option"]] {
        room.server(arguments).run_to(1).expect_error_line(&["no-such-option"]);
    }
    room.server(["-X", "memory", "1M"]).run_to(1).expect_error_line(&["X"]);
}

#[test]
fn an_option_without_its_value_is_an_error_that_names_it() {
    let room = Room::new();
    room.server(["memory", "1M", "--run"]).run_to(1).expect_error_line(&["run"]);
    room.server(["memory", "1M", "-p"]).run_to(1).expect_error_line(&["p"]);
    room.server(["--exit-last=yes", "memory", "1M"]).run_to(1).expect_error_line(&["exit-last"]);
}

#[test]
fn a_value_that_cannot_be_is_an_error_that_names_it() {
    let room = Room::new();
    for (arguments, words) in [
        (["-t", "several", "memory", "1M"], ["threads"]),
        (["--tls", "perhaps", "memory", "1M"], ["perhaps"]),
        (["--mask-handshake", "0xzz", "memory", "1M"], ["mask-handshake"]),
    ] {
        room.server(arguments).run_to(1).expect_error_line(&words);
    }
    room.server(["--log=nowhere", "memory", "1M"]).run_to(1).expect_error_line(&["log"]);
}

#[test]
fn options_that_cannot_go_together_are_an_error() {
    let room = Room::new();
    for arguments in [
        &["-U", "s", "-p", "10809", "memory", "1M"][..],
        &["-s", "-p", "10809", "memory", "1M"],
        &["-s", "-U", "s", "memory", "1M"],
        &["-s", "memory", "1M", "--run", "true"],
    ] {
        let output = room.server(arguments).run_to(1);
        output.expect_error_line(&[]);
        room.assert_nothing_left();
    }
}

#[test]
fn options_may_come_after_the_plugin_and_between_parameters() {
    let room = Room::new();
    let mut launch =
        room.server(["memory", "-U", "s", "size=1M", "-e", "name", "--run", "echo \"$exportname\" \"$uri\""]);
    let output = launch.run_to(0);
    let socket = room.path("s");
    assert_eq!(output.text(), format!("name nbd+unix:///name?socket={}\n", socket.display()));
}

#[test]
fn a_parameter_may_be_key_and_value_or_the_bare_value() {
    let room = Room::new();
    room.write("a=b", [0; 1024]);
    room.write("disk", [0; 2048]);
    for (arguments, size) in [
        (["memory", "64K"], "65536\n"),
        (["memory", "size=64K"], "65536\n"),
        (["file", "disk"], "2048\n"),
        (["file", "file=disk"], "2048\n"),
        (["file", "file=a=b"], "1024\n"),
        (["file", "./a=b"], "1024\n"),
    ] {
        let output = room.captive(arguments, "nbdinfo --size \"$uri\"").run_to(0);
        assert_eq!(output.text(), size, "{arguments:?}");
    }
}

#[test]
fn two_dashes_end_the_options() {
    let room = Room::new();
    let mut launch = room.server(["-U", "s", "--run", "nbdinfo --size \"$uri\"", "--", "memory", "64K"]);
    assert_eq!(launch.run_to(0).text(), "65536\n");
}

/// The aliases of nbdkit(1) and of its option table.
#[test]
fn every_alias_does_what_its_option_does() {
    let room = Room::new();
    let command = "test -s pid && echo \"$exportname\"; nbdinfo --json \"$uri\" | grep '\"is_read_only\"'";
    for (foreground, pid_file, name, read_only) in [
        ("-f", "-P", "-e", "-r"),
        ("--foreground", "--pidfile", "--exportname", "--readonly"),
        ("--no-fork", "--pid-file", "--export-name", "--read-only"),
        ("--no-fork", "--pid-file", "--export", "--read-only"),
    ] {
        // The command waits for the pid file itself, because nbdkit writes it when it likes.
        let command = format!("while ! test -s pid; do :; done; {command}");
        let mut launch =
            room.captive([foreground, pid_file, "pid", name, "hello", read_only, "memory", "64K"], command);
        let output = launch.run_to(0);
        assert!(output.text().starts_with("hello\n"), "{output:#?}");
        assert!(output.text().contains("\"is_read_only\": true"), "{output:#?}");
        let _ = std::fs::remove_file(room.path("pid"));
    }
}

/// "Print a URI [...] in the preferred form", nbdkit tests/test-print-uri.sh
#[test]
fn print_uri_shows_the_uri_how_to_quote_it_and_a_command() {
    if nbdkit_differs("1.32 has no --print-uri") {
        return;
    }
    let room = Room::new();
    let uri = format!("nbd+unix://?socket={}", room.path("s").display());
    for option in ["--print-uri", "--print-url", "--show-uri", "--show-url"] {
        let output = room.server([option, "-U", "s", "memory", "1M", "--run", "exit 0"]).run_to(0);
        let wanted =
            format!("{uri}\nShell-quoted URI: \"{uri}\"\nCommand to query the NBD endpoint:\n  nbdinfo \"{uri}\"\n");
        assert_eq!(output.text(), wanted);
    }
}

#[test]
fn log_to_stderr_and_to_nowhere() {
    let room = Room::new();
    let missing = ["file", "missing"];
    let output = room.captive([&["--log=stderr"][..], &missing].concat(), "exit 0").run_to(1);
    output.expect_error_line(&["missing"]);
    room.captive(["--log=null", "memory", "1M"], "exit 3").run_to(3);
    room.captive(["--log=stderr", "memory", "1M"], "exit 3").run_to(3);
}

#[test]
fn verbose_shows_debug_lines_on_stderr() {
    let room = Room::new();
    let output = room.captive(["-v", "memory", "1M"], "exit 3").run_to(3);
    assert!(output.stderr.contains(&format!("{}: debug: ", program_name())), "{output:#?}");
    assert_eq!(output.text(), "");
    let quiet = room.captive(["memory", "1M"], "exit 3").run_to(3);
    assert_eq!(quiet.stderr, "");
}

#[test]
fn verbose_says_why_the_server_ends() {
    if nbdkit_differs("it does not say") {
        return;
    }
    let room = Room::new();
    let output = room.captive(["-v", "memory", "1M"], "exit 3").run_to(3);
    assert!(output.stderr.to_lowercase().contains("command"), "{output:#?}");
    let output = room.serve(["-v", "memory", "1M"]).terminate().expect(0);
    assert!(output.stderr.contains("SIGTERM") || output.stderr.contains("signal"), "{output:#?}");
}

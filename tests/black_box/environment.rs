//! The variables of the command, beside those that Debian's nbdkit gives for the same command line, byte by byte.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::harness::{Room, free_port, nbdkit};

const VARIABLES: [&str; 8] = ["uri", "nbd", "port", "unixsocket", "exportname", "tls", "tls_certificates", "tls_psk"];

/// Says `NAME=VALUE` or `NAME is unset` of each variable, with a NUL after each.
const PRINT: &str = r#"
for name in uri nbd port unixsocket exportname tls tls_certificates tls_psk; do
    eval "state=\${$name+set}; value=\$$name"
    if [ "$state" ]; then printf '%s=%s\0' "$name" "$value"; else printf '%s is unset\0' "$name"; fi
done"#;

/// What a command saw: a line for each of [`VARIABLES`].
type Seen = Vec<Vec<u8>>;

fn seen(output: &[u8]) -> Seen {
    let mut seen: Seen = output.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect();
    assert_eq!(seen.pop().as_deref(), Some(&b""[..]), "a NUL ends the last");
    assert_eq!(seen.len(), VARIABLES.len());
    seen
}

/// The one place where the two may differ, and why:
/// - the path of a private socket is made up at each start (and nbdkit does not look at TMPDIR), so it is replaced;
/// - 1.32 knows no `tls*` variables; 1.45 sets `tls_certificates` and `tls_psk` to the empty string where nothing was said,
///   and leaves `tls` unset without TLS (server/captive.c), so that is what nbdkit's lines are replaced by;
/// - 1.32 does not imply `-U -` with `--run`; the harness says it there.
fn normalise(mut seen: Seen, private_socket: bool, is_1_32: bool) -> Vec<String> {
    if private_socket {
        let socket = seen[3].strip_prefix(b"unixsocket=").expect("it is set").to_vec();
        assert!(socket.starts_with(b"/"), "{}", String::from_utf8_lossy(&socket));
        for line in &mut seen {
            *line = replaced(line, &socket, b"PRIVATE");
        }
    }
    if is_1_32 {
        seen[5] = b"tls is unset".to_vec();
        seen[6] = b"tls_certificates=".to_vec();
        seen[7] = b"tls_psk=".to_vec();
    }
    seen.iter().map(|line| line.escape_ascii().to_string()).collect()
}

fn replaced(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    match text.windows(from.len()).position(|window| window == from) {
        Some(at) => [&text[..at], to, &text[at + from.len()..]].concat(),
        None => text.to_vec(),
    }
}

/// Runs both servers with these arguments before `memory 1M`, and compares.
fn compare(room: &Room, arguments: &[&OsStr]) {
    let private_socket = !arguments.iter().any(|one| ["-p", "-U"].map(OsStr::new).contains(one))
        || arguments.windows(2).any(|pair| pair == ["-U", "-"]);
    let arguments: Vec<OsString> =
        arguments.iter().map(|&one| one.to_owned()).chain(["memory".into(), "1M".into()]).collect();
    let socket = arguments.iter().position(|one| one == "-U").map(|at| room.path(&arguments[at + 1]));
    // nbdkit leaves its socket.
    let remove_socket = || socket.as_ref().map(fs::remove_file);
    remove_socket();
    let theirs = room.nbdkit_captive(&arguments, PRINT).run_to(0);
    remove_socket();
    let ours = room.captive(&arguments, PRINT).run_to(0);
    let is_1_32 = super::harness::is_nbdkit();
    assert_eq!(
        normalise(seen(&ours.stdout), private_socket, is_1_32),
        normalise(seen(&theirs.stdout), private_socket, true),
        "{arguments:?}"
    );
    room.assert_tmpdir_empty();
}

fn odd_names() -> Vec<OsString> {
    let mut names: Vec<Vec<u8>> = [
        "",
        "name",
        "with space",
        "a/b/c",
        "/",
        "//",
        "-",
        "--",
        "-n",
        "+",
        "*",
        "?",
        "[a-z]",
        "~",
        "~root",
        "#",
        "%",
        "%41",
        "$",
        "$$",
        "$HOME",
        "${HOME}",
        "$(echo no)",
        "`echo no`",
        "\\",
        "\\\\",
        "\\n",
        "a\\",
        "'",
        "''",
        "it's",
        "\"",
        "\"\"",
        "a\"b'c",
        "a\nb",
        "a\n",
        "\n",
        "\n\n",
        "\t",
        " ",
        "  lead and trail  ",
        "a;b",
        "a&b",
        "a|b",
        "a>b",
        "a<b",
        "(a)",
        "{a,b}",
        "a!b",
        "!!",
        "a=b",
        "a:b",
        "a@b",
        "a,b",
        "a^b",
        "\u{e9}",
        "\u{1f980}",
        "\u{202e}rtl",
        "na\u{ef}ve/\u{6f22}\u{5b57}",
        "?socket=/evil",
        "a?b=c&d=e",
        "nbd://evil",
        "EOF",
        "exit 9",
        "\r\n",
        "\u{7f}",
        "\u{1b}[31m",
    ]
    .into_iter()
    .map(|name| name.as_bytes().to_vec())
    .collect();
    // Not UTF-8: a name is bytes.
    names.extend([&b"\xff"[..], b"\x80", b"\xc3", b"a\xfe\xffb", b"\x81\x82\x88", b"\xed\xa0\x80"].map(<[u8]>::to_vec));
    names.push((1..=255).collect());
    names.push(vec![b'x'; 4096]);
    names.into_iter().map(OsString::from_vec).collect()
}

/// "`$exportname`: The export name (which may be "") that the process should use"
#[test]
fn every_export_name_arrives_as_it_does_from_nbdkit() {
    nbdkit();
    let room = Room::new();
    for name in odd_names() {
        compare(&room, &[OsStr::new("-e"), &name]);
    }
}

/// Not by comparison: what comes out is what went in.
#[test]
fn every_export_name_arrives_as_it_was_given() {
    let room = Room::new();
    for name in odd_names() {
        let output = room.captive([OsStr::new("-e"), &name, "memory".as_ref(), "1M".as_ref()], PRINT).run_to(0);
        let wanted = [b"exportname=", name.as_bytes()].concat();
        assert_eq!(seen(&output.stdout)[4].escape_ascii().to_string(), wanted.escape_ascii().to_string());
    }
}

/// "A URI that refers to the nbdkit port or socket": a client finds the export's name in it.
#[test]
fn every_export_name_is_in_the_uri_as_clients_read_it() {
    let room = Room::new();
    for name in odd_names() {
        // libnbd takes UTF-8 without control characters in a URI's path, as its parser defines.
        let Some(text) = name.to_str().filter(|text| !text.is_empty() && !text.starts_with('/')) else { continue };
        let mut launch = room.captive(["-e", text, "memory", "1M"], "nbdinfo --size \"$uri\" && nbdinfo \"$uri\"");
        let output = launch.run_to(0);
        assert!(output.text().starts_with("1048576\n"), "{output:#?}");
    }
}

#[test]
fn sockets_and_ports_arrive_as_they_do_from_nbdkit() {
    let room = Room::new();
    let port = free_port();
    let cases: &[&[&str]] = &[
        &[],
        &["-U", "-"],
        &["-U", "s"],
        &["-U", "./s"],
        &["-U", "with space"],
        &["-U", "it's \"odd\" $HOME `x` \\ ? & # %41"],
        &["-U", "gr\u{fc}n"],
        &["-i", "127.0.0.1", "-p", &port],
        &["-i", "127.0.0.1", "-p", &port, "-e", "a name"],
        &["-i", "127.0.0.1", "-p", &port, "-e", "?a/b#c"],
        &["-i", "localhost", "-p", &port],
        &["-4", "-i", "localhost", "-p", &port],
        &["-U", "s", "-e", "na me"],
        &["-U", "s p", "-e", "a\"b"],
        &["-U", "-", "-e", "x", "-e", "the last"],
        &["-r", "-e", "read-only"],
        &["--exportname", "long option"],
        &["-f", "-t", "2", "--newstyle", "-e", "with others"],
    ];
    for arguments in cases {
        let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        compare(&room, &arguments);
    }
}

/// 1.45's server/captive.c, which 1.32 cannot show: the values are copied, valid or not, also without `--tls`.
#[test]
fn tls_variables_say_what_was_passed() {
    if super::harness::nbdkit_differs("1.32 has no tls variables") {
        return;
    }
    let room = Room::new();
    let output = room.captive(["--tls=off", "memory", "1M"], PRINT).run_to(0);
    let [tls, certificates, psk] = &seen(&output.stdout)[5..] else { panic!("three variables") };
    assert_eq!(
        (&tls[..], &certificates[..], &psk[..]),
        (&b"tls is unset"[..], &b"tls_certificates="[..], &b"tls_psk="[..])
    );
    let arguments = ["--tls=off", "--tls-certificates=/no/su'ch \"dir\"", "--tls-psk=$no such", "memory", "1M"];
    let output = room.captive(arguments, PRINT).run_to(0);
    let [tls, certificates, psk] = &seen(&output.stdout)[5..] else { panic!("three variables") };
    assert_eq!(tls, b"tls is unset");
    assert_eq!(certificates, b"tls_certificates=/no/su'ch \"dir\"");
    assert_eq!(psk, b"tls_psk=$no such");
}

/// "`--run` [...] the shell": what follows the variables is the command as it was given.
#[test]
fn the_command_is_given_to_the_shell_as_it_is() {
    let room = Room::new();
    let command = OsString::from_vec(b"printf '%s' 'a\xff$b`\"\\' \"$0\" \"$#\"\n# comment\n".to_vec());
    let output = room.captive(["memory", "1M"], &command).run_to(0);
    assert!(output.stdout.starts_with(b"a\xff$b`\"\\"), "{output:?}");
    assert!(output.stdout.ends_with(b"sh0"), "{output:?}");
}

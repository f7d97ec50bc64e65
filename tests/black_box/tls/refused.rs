//! Who is not let in, and what files are not taken.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::gate::{Gate, s_client};
use super::pki::{EXPIRED, NOT_YET, OTHER, Pki, USER};
use super::{KINDS, Kind, Output, Room, serve, wait_for_word, wait_for_words};

/// A client of this server with these files must not get in, for this reason in the server's log.
#[track_caller]
fn assert_kept_out(room: &Room, pki: &Pki, change: impl FnOnce(), why: &str) {
    let server = serve(room, pki, Kind::Certificates, &["--tls=require", "--tls-verify-peer", "memory", "1M"]);
    let uri = pki.uri(Kind::Certificates, &server.socket);
    change();
    room.tool("nbdinfo", ["--size", &uri]).run_to(1);
    // A client may hear of it first.
    wait_for_word(&server, &format!("TLS handshake: {why}"));
    server.terminate().expect(0);
}

#[test]
fn certificates_that_are_not_valid_now_are_refused() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    assert_kept_out(&room, &pki, || pki.client(&room, EXPIRED), "invalid peer certificate: certificate expired");
    assert_kept_out(&room, &pki, || pki.client(&room, NOT_YET), "invalid peer certificate: certificate not valid yet");
}

#[test]
fn a_client_without_a_certificate_or_with_anothers_is_refused() {
    let room = Room::new();
    let (pki, other) = (Pki::new(&room, "pki"), Pki::new(&room, "other"));
    let server = serve(&room, &pki, Kind::Certificates, &["--tls=require", "--tls-verify-peer", "memory", "1M"]);
    let gate = Gate::open(&server.socket);
    // openssl sends what it is told to; GnuTLS nothing that the server will not take.
    let foreign = ["-cert", &other.file("client-cert.pem"), "-key", &other.file("client-key.pem")];
    s_client(&room, &gate, &pki, Kind::Certificates, &foreign).run_to(1);
    wait_for_word(&server, "TLS handshake: invalid peer certificate: UnknownIssuer");
    server.terminate().expect(0);
    let none = || fs::remove_file(pki.file("client-cert.pem")).expect("it was there");
    assert_kept_out(&room, &pki, none, "peer sent no certificates");
    // Who is not asked for one gets in without.
    let server = serve(&room, &pki, Kind::Certificates, &["--tls=require", "memory", "1M"]);
    room.tool("nbdinfo", ["--size", &pki.uri(Kind::Certificates, &server.socket)]).run_to(0);
    server.terminate().expect(0);
}

/// Also by a list of an authority whose certificate does not say that it signs lists, as nbdkit-tls(1) makes it.
#[test]
fn a_certificate_that_was_taken_back_is_refused_and_another_is_not() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    pki.revoke_client(&room);
    assert_kept_out(&room, &pki, || (), "invalid peer certificate: Revoked");
    pki.client(&room, "");
    let server = serve(&room, &pki, Kind::Certificates, &["--tls=require", "--tls-verify-peer", "memory", "1M"]);
    room.tool("nbdinfo", ["--size", &pki.uri(Kind::Certificates, &server.socket)]).run_to(0);
    server.terminate().expect(0);
}

#[test]
fn old_versions_are_refused() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=require", "memory", "1M"]);
        let gate = Gate::open(&server.socket);
        for version in ["-tls1_1", "-tls1"] {
            s_client(&room, &gate, &pki, kind, &[version, "-cipher", "ALL:PSK:@SECLEVEL=0"]).run_to(1);
        }
        wait_for_words(&server, "TLS handshake: ", 2);
        let output = server.terminate().expect(0);
        assert_eq!(output.stderr.matches("error: connection closed: TLS handshake: ").count(), 2, "{output:#?}");
    }
}

/// The alert, or what else there was, with which openssl was turned away.
fn alert(output: &Output) -> String {
    let line = output.stderr.lines().find(|line| line.contains("alert")).unwrap_or_else(|| panic!("{output:#?}"));
    // Behind the number of the thread and the place in OpenSSL's source.
    line[line.find("alert").expect("it is in there")..].to_owned()
}

#[test]
fn unknown_users_and_wrong_keys_are_told_the_same_and_no_key_is_in_the_log() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let server = serve(&room, &pki, Kind::Keys, &["--tls=require", "memory", "1M"]);
    let gate = Gate::open(&server.socket);
    let wrong = pki.secret(OTHER);
    for version in ["-tls1_3", "-tls1_2"] {
        let turned_away = |user: &str| {
            s_client(&room, &gate, &pki, Kind::Keys, &[version, "-psk_identity", user, "-psk", &wrong]).run_to(1)
        };
        let alerts = [USER, "mallory", "alicf"].map(|user| alert(&turned_away(user)));
        assert_eq!((&alerts[0], &alerts[0]), (&alerts[1], &alerts[2]), "{version}");
    }
    wait_for_words(&server, "TLS handshake: ", 6);
    let output = server.terminate().expect(0);
    for secret in [pki.secret(USER), wrong] {
        assert!(!output.stderr.to_lowercase().contains(&secret.to_lowercase()), "{output:#?}");
    }
    let why: Vec<_> = output.stderr.lines().filter_map(|line| line.split_once("TLS handshake: ")).collect();
    assert_eq!(why.len(), 6, "{output:#?}");
}

/// A server with these arguments must not start, with this on stderr, before its command does.
#[track_caller]
fn assert_no_start(room: &Room, arguments: &[&str], words: &[&str]) -> Output {
    let output = room.captive(arguments, "touch started").run_to(1);
    assert!(!room.path("started").exists(), "the command has run");
    for word in words {
        assert!(output.stderr.contains(word), "{word:?}: {output:#?}");
    }
    assert_eq!(output.stderr.lines().count(), 1, "{output:#?}");
    assert!(!output.stderr.contains("\\n"), "{output:#?}");
    output
}

#[test]
fn without_certificates_require_is_an_error_and_on_a_warning() {
    let room = Room::new();
    fs::create_dir(room.path("empty")).expect("a directory");
    let certificates = "--tls-certificates=empty";
    assert_no_start(
        &room,
        &["--tls=require", certificates, "memory", "1M"],
        &[
            "--tls=require but could not load TLS certificates.",
            "Try setting ‘--tls-certificates=/path/to/certificates’",
        ],
    );
    let output =
        room.captive(["--tls=on", certificates, "memory", "1M"], "echo \"$uri $tls\"; nbdinfo \"$uri\"").run_to(0);
    assert_eq!(output.stderr.lines().count(), 1, "{output:#?}");
    assert!(output.stderr.contains("warning: --tls=on but could not load TLS certificates."), "{output:#?}");
    assert!(output.text().starts_with("nbd+unix://?socket="), "{output:#?}");
    assert!(output.text().lines().next().is_some_and(|line| line.ends_with(' ')), "$tls is not set: {output:#?}");
    // Nothing was said of it, and nothing is.
    let output = room.captive(["memory", "1M", certificates], "true").run_to(0);
    assert_eq!(output.stderr, "");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let (directory, keys) = (pki.option(Kind::Certificates), pki.option(Kind::Keys));
    let good = |file: &str| fs::read(pki.file(file)).expect("it was made");
    for (file, content, why) in [
        ("server-key.pem", &b"secret"[..], "there is no private key in it"),
        (
            "server-key.pem",
            b"-----BEGIN PRIVATE KEY-----\n!secret\n-----END PRIVATE KEY-----\n",
            "it is not in PEM format",
        ),
        (
            "server-key.pem",
            b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
            "the key is encrypted",
        ),
        ("server-key.pem", &good("client-key.pem"), "it is not the key of the certificate"),
        ("server-cert.pem", b"", "there is no certificate in it"),
        ("ca-cert.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", ""),
        ("ca-crl.pem", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", "no revocation list"),
    ] {
        let before = fs::read(pki.file(file)).ok();
        fs::write(pki.file(file), content).expect("a file in the room");
        let line = format!("TLS: loading {}: {why}", pki.file(file));
        let output = assert_no_start(&room, &["--tls=require", &directory, "memory", "1M"], &[&line]);
        assert_eq!((output.stderr.lines().count(), output.stderr.contains("secret")), (1, false), "{output:#?}");
        match before {
            Some(before) => fs::write(pki.file(file), before).expect("a file in the room"),
            None => fs::remove_file(pki.file(file)).expect("it was there"),
        }
    }
    for (content, why) in [
        ("", "there is no USER:KEY in it"),
        ("alice:00\nhunter2", "line 2 is not USER:KEY"),
        ("a:secret", "line 1: the key"),
    ] {
        fs::write(pki.file("keys.psk"), content).expect("a file in the room");
        let output =
            assert_no_start(&room, &[&keys, "memory", "1M"], &[&format!("--tls-psk: {}: {why}", pki.file("keys.psk"))]);
        assert!(!output.stderr.contains("secret") && !output.stderr.contains("hunter2"), "{output:#?}");
    }
    assert_no_start(&room, &["--tls-psk=/no/such/file", "memory", "1M"], &["/no/such/file: No such file or directory"]);
    // What is off reads nothing.
    room.captive(["--tls=off", "--tls-psk=/no/such/file", "memory", "1M"], "true").run_to(0);
}

#[test]
fn keys_that_everybody_can_read_get_a_warning_and_serve() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for (kind, file) in [(Kind::Certificates, "server-key.pem"), (Kind::Keys, "keys.psk")] {
        for (mode, lines) in [(0o600, 0), (0o644, 1)] {
            fs::set_permissions(pki.file(file), fs::Permissions::from_mode(mode)).expect("the file is ours");
            let option = pki.option(kind);
            let output = room.captive(["--tls=require", &option, "memory", "1M"], "nbdinfo --size \"$uri\"").run_to(0);
            assert_eq!(output.stderr.lines().count(), lines, "{output:#?}");
            assert!(lines == 0 || output.stderr.contains(&format!("warning: {}: ", pki.file(file))), "{output:#?}");
        }
    }
}

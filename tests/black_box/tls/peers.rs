//! Clients that people have.

use std::fs;

use super::gate::{Gate, gnutls_cli, s_client, through};
use super::pki::{Algorithm, OTHER, Pki, USER};
use super::{KINDS, Kind, Room, serve, wait_for_word};
use crate::harness::{free_port, wait_for};
use crate::raw_client::*;

const MIB: usize = 1 << 20;

fn data(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at ^ at >> 8 ^ at >> 16).to_le_bytes()[0]).collect()
}

/// The captive example, with nothing else said: also where the client has no login and is no user of the file.
#[test]
fn nbdinfo_finds_the_way_by_the_uri_alone() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for kind in KINDS {
        let arguments = ["--tls=require".to_owned(), pki.option(kind), "memory".to_owned(), "1M".to_owned()];
        let output = room.captive(&arguments, "unset LOGNAME; nbdinfo --json \"$uri\"").run_to(0);
        assert!(output.text().contains("\"TLS\": true"), "{output:#?}");
        let port = free_port();
        let arguments = [&["-p".to_owned(), port][..], &arguments].concat();
        let output = room.captive(&arguments, "unset LOGNAME; nbdinfo --json \"$uri\"").run_to(0);
        assert!(output.text().contains("\"TLS\": true"), "{output:#?}");
    }
}

/// F5, for a client that has come through TLS.
#[test]
fn a_script_that_hangs_behind_tls_does_not_hold_up_the_end() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let _hanging = room.fifo("hanging");
    for kind in KINDS {
        for method in ["list_exports", "open"] {
            let hang = format!("{method}=echo hanging > hanging; sleep 1000; :");
            let server = ["--tls=require", "--grace-period=0.1", "--drain-timeout=1000", &pki.option(kind), "eval"];
            let scripts = ["get_size=echo 1M", "pread=exit 1", "unload=echo unload > log", &hang];
            let command = "nbdinfo --list \"$uri\" > probe 2>&1 & read x < hanging; exit 3";
            room.captive([&server[..], &scripts].concat(), command).run_to(3);
            assert_eq!(fs::read_to_string(room.path("log")).expect("it was unloaded"), "unload\n");
            fs::remove_file(room.path("log")).expect("it is there");
            room.wait_until_nothing_left();
        }
    }
}

#[test]
fn nbdcopy_copies_in_and_out() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let image = data(4 * MIB + 512);
    room.write("image", &image);
    for kind in KINDS {
        for plugin in ["memory 4194816", "file disk"] {
            fs::File::create(room.path("disk")).and_then(|disk| disk.set_len(image.len() as u64)).expect("a file");
            let mut arguments = vec!["--tls=require".to_owned(), pki.option(kind)];
            arguments.extend(plugin.split(' ').map(str::to_owned));
            let command = "nbdcopy image \"$uri\" && nbdcopy \"$uri\" out && \
                           nbdcopy --connections=1 --requests=1 --request-size=32768 \"$uri\" small && cmp out small";
            room.captive(&arguments, command).run_to(0);
            assert!(fs::read(room.path("out")).expect("it was copied") == image, "{kind:?} {plugin}");
        }
        assert!(fs::read(room.path("disk")).expect("it is there") == image);
    }
}

#[test]
fn qemu_img_copies_in_and_out() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    // It wants certificates that may also encipher keys, which others than RSA's cannot.
    pki.key(&room, "client-key.pem", Algorithm::CerttoolRsa);
    pki.client(&room, "");
    let image = data(5 * MIB);
    room.write("image", &image);
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=require", "--tls-verify-peer", "memory", "5M"]);
        let (directory, socket) = (pki.directory.display(), server.socket.display());
        // It wants a file of this name.
        fs::copy(pki.file("keys.psk"), pki.file("keys")).expect("a copy");
        let object = match kind {
            // There is no host name to look for.
            Kind::Certificates => format!("tls-creds-x509,id=t,endpoint=client,dir={directory}"),
            Kind::Keys => format!("tls-creds-psk,id=t,endpoint=client,dir={directory},username={USER}"),
        };
        let remote = format!("driver=nbd,path={socket},tls-creds=t,tls-hostname=localhost");
        let copy = |from: &[&str], to: &[&str]| {
            let mut launch = room.tool("qemu-img", ["convert", "-n", "--object", &object]);
            launch.args(from).args(to).run_to(0);
        };
        room.tool("qemu-img", ["info", "--object", &object, "--image-opts", &remote]).run_to(0);
        copy(
            &["-f", "raw", "image"],
            &[
                "--target-image-opts",
                &format!("driver=raw,file.driver=nbd,file.path={socket},file.tls-creds=t,file.tls-hostname=localhost"),
            ],
        );
        room.write("back", vec![0; image.len()]);
        copy(&["--image-opts", &remote], &["-O", "raw", "back"]);
        assert!(fs::read(room.path("back")).expect("it was copied") == image, "{kind:?}");
        // The same library as gnutls-cli's.
        let old = format!("{object},priority=NORMAL:-VERS-TLS1.3");
        room.tool("qemu-img", ["info", "--object", &old, "--image-opts", &remote]).run_to(0);
        let output = server.terminate().expect(0);
        let word = if kind == Kind::Keys { "TLSv1.2 DHE-PSK-AES128-GCM" } else { "TLSv1_2 TLS_ECDHE_ECDSA" };
        assert!(output.stderr.contains(word), "{output:#?}");
        let wrong: Vec<_> = output.stderr.lines().filter(|line| line.contains(" error: ")).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

/// Every version and way to agree on a key that is offered, with all sizes of requests.
#[test]
fn openssl_and_gnutls_speak_tls_1_2_and_1_3() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let openssl: [(Kind, &[&str], &str); 10] = [
        (Kind::Certificates, &["-tls1_3"], "TLSv1_3 TLS13_AES_128_GCM_SHA256"),
        (Kind::Certificates, &["-tls1_3", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"], "TLSv1_3 TLS13_CHACHA20"),
        (Kind::Certificates, &["-tls1_3", "-ciphersuites", "TLS_AES_256_GCM_SHA384"], "TLSv1_3 TLS13_AES_256_GCM"),
        (Kind::Certificates, &["-tls1_2"], "TLSv1_2 TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"),
        (
            Kind::Certificates,
            &["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"],
            "TLSv1_2 TLS_ECDHE_ECDSA_WITH_CHACHA20",
        ),
        (Kind::Keys, &["-tls1_3"], "TLSv1.3 TLS_AES_128_GCM_SHA256"),
        (Kind::Keys, &["-tls1_2"], "TLSv1.2 DHE-PSK-AES128-GCM-SHA256"),
        (Kind::Keys, &["-tls1_2", "-cipher", "PSK-AES256-GCM-SHA384"], "TLSv1.2 PSK-AES256-GCM-SHA384"),
        (Kind::Keys, &["-tls1_2", "-cipher", "ECDHE-PSK-CHACHA20-POLY1305"], "TLSv1.2 ECDHE-PSK-CHACHA20-POLY1305"),
        (Kind::Keys, &["-tls1_2", "-cipher", "DHE-PSK-AES256-GCM-SHA384"], "TLSv1.2 DHE-PSK-AES256-GCM-SHA384"),
    ];
    let gnutls = [
        (Kind::Certificates, "", "TLSv1_3 TLS13_AES_128_GCM_SHA256"),
        (Kind::Certificates, ":-VERS-TLS1.3", "TLSv1_2 TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"),
        (Kind::Keys, "", "TLSv1.3 TLS_AES_128_GCM_SHA256"),
        // gnutls-cli 3.7 crashes where it would show how the keys were agreed on; qemu-img does that above.
        (Kind::Keys, ":-VERS-TLS1.3:-DHE-PSK:-ECDHE-PSK", "TLSv1.2 PSK-AES128-GCM-SHA256"),
    ];
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=require", "--tls-verify-peer", "memory", "8M"]);
        let gate = Gate::open(&server.socket);
        let openssl = openssl.iter().filter(|(one, ..)| *one == kind);
        let openssl = openssl.map(|(_, more, word)| (s_client(&room, &gate, &pki, kind, more), *word));
        let gnutls = gnutls.iter().filter(|(one, ..)| *one == kind);
        let gnutls = gnutls.map(|(_, versions, word)| (gnutls_cli(&room, &gate, &pki, kind, versions), *word));
        for (launch, word) in openssl.chain(gnutls) {
            let (mut client, running) = through(launch);
            client.ask_for_structured_replies();
            client.go(b"");
            for length in [1, 512, 16 * 1024, 16 * 1024 + 1, MIB + 3] {
                let bytes = data(length);
                assert_eq!(client.write(0, 77, &bytes), NBD_SUCCESS, "{word}");
                assert!(client.read(77, length as u64) == bytes, "{word}");
            }
            client.disconnect();
            drop(running);
            wait_for_word(&server, word);
        }
        server.terminate().expect(0);
    }
}

/// openssl takes single letters as orders: one to change its own keys, and one to have the server's changed, too.
#[test]
fn a_client_may_change_keys_in_the_middle() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for kind in KINDS {
        let server = serve(&room, &pki, kind, &["--tls=require", "memory", "1M"]);
        let gate = Gate::open(&server.socket);
        let (mut client, running) = through(s_client(&room, &gate, &pki, kind, &["-tls1_3", "-no_ign_eof"]));
        client.go(b"");
        for (round, order) in [b"k\n", b"K\n", b"K\n", b"k\n"].into_iter().enumerate() {
            client.send(order);
            wait_for("the order", || (running.stderr().matches("KEYUPDATE").count() > round).then_some(()));
            let bytes = data(700 + round);
            assert_eq!(client.write(0, 77, &bytes), NBD_SUCCESS, "{kind:?}");
            assert!(client.read(77, bytes.len() as u64) == bytes, "{kind:?}");
        }
        client.disconnect();
        drop(running);
        let output = server.terminate().expect(0);
        assert!(!output.stderr.contains(" error: "), "{output:#?}");
    }
}

#[test]
fn nbd_client_lists_with_certificates() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let port = free_port();
    let mut server = room.server(["-f", "-v", "--tls=require", "--tls-verify-peer", "-i", "localhost", "-p", &port]);
    let running = server.args([pki.option(Kind::Certificates).as_str(), "memory", "1M"]).start();
    wait_for("the port", || std::net::TcpStream::connect(("localhost", port.parse().ok()?)).ok());
    let (ca, certificate, key) = (pki.file("ca-cert.pem"), pki.file("client-cert.pem"), pki.file("client-key.pem"));
    let arguments = [
        "-l",
        "localhost",
        &port,
        "-cacertfile",
        &ca,
        "-certfile",
        &certificate,
        "-keyfile",
        &key,
        "-tlshostname",
        "localhost",
    ];
    let output = room.tool("nbd-client", arguments).run_to(0);
    running.signal(nix::sys::signal::Signal::SIGTERM);
    let log = running.finish().expect(0).stderr;
    assert!(log.contains("TLS client certificate: CN=client.example.com"), "{output:#?} {log}");
}

#[test]
fn keys_of_every_kind_that_the_tools_write_serve() {
    use Algorithm::*;
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for algorithm in [CerttoolRsa, CerttoolP521, CerttoolEd25519, OpensslPkcs8Rsa, OpensslPkcs1Rsa, OpensslSec1] {
        pki.key(&room, "server-key.pem", algorithm);
        pki.server(&room, "");
        pki.key(&room, "client-key.pem", algorithm);
        pki.client(&room, "");
        let server = serve(&room, &pki, Kind::Certificates, &["--tls=require", "--tls-verify-peer", "memory", "1M"]);
        let uri = pki.uri(Kind::Certificates, &server.socket);
        room.tool("nbdinfo", ["--size", &uri]).run_to(0);
        let output = server.terminate().expect(0);
        let names = "TLS client certificate: CN=client.example.com,O=BigCo,ST=New York,C=US, issued by CN=pki";
        assert!(output.stderr.contains(names), "{algorithm:?}: {output:#?}");
    }
}

#[test]
fn filters_see_who_a_client_is() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for (rule, is_let_in) in
        [("allow=dn:*,O=BigCo,*", true), ("allow=issuer-dn:cn=pki", true), ("allow=dn:*Other*", false)]
    {
        let server = serve(
            &room,
            &pki,
            Kind::Certificates,
            &["--tls=require", "--tls-verify-peer", "--filter=ip", "memory", "1M", rule, "deny=all"],
        );
        let uri = pki.uri(Kind::Certificates, &server.socket);
        room.tool("nbdinfo", ["--size", &uri]).run_to(i32::from(!is_let_in));
        server.terminate().expect(0);
    }
}

#[test]
fn tls_fallback_shows_the_disk_to_secure_clients_only() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    for kind in KINDS {
        let server =
            serve(&room, &pki, kind, &["--tls=on", "--filter=tls-fallback", "memory", "1M", "tlsreadme=plain"]);
        let uri = pki.uri(kind, &server.socket);
        assert_eq!(room.tool("nbdinfo", ["--size", &uri]).run_to(0).text(), "1048576\n");
        assert_eq!(server.simple().read(0, 5), b"plain");
        server.terminate().expect(0);
    }
}

/// Every user of the file gets in, with the user's own key.
#[test]
fn each_user_has_a_key() {
    let room = Room::new();
    let pki = Pki::new(&room, "pki");
    let server = serve(&room, &pki, Kind::Keys, &["--tls=require", "memory", "1M"]);
    for user in [USER, OTHER] {
        let uri = pki.uri(Kind::Keys, &server.socket).replace(USER, user);
        room.tool("nbdinfo", ["--size", &uri]).run_to(0);
    }
    let output = server.terminate().expect(0);
    for user in [USER, OTHER] {
        assert!(!output.stderr.contains(&pki.secret(user)), "no secret is in the log");
    }
}

//! Authorities, certificates, revocation lists and keys, made by the tools that people make them with.

use std::fs;
use std::path::PathBuf;

use super::{Kind, Room};

/// A directory as nbdkit-tls(1) has it, and with the client's files of libnbd.
pub struct Pki {
    pub directory: PathBuf,
}

/// Kinds of private keys, and what makes them.
#[derive(Clone, Copy, Debug)]
pub enum Algorithm {
    CerttoolEcdsa,
    CerttoolRsa,
    CerttoolP521,
    CerttoolEd25519,
    OpensslPkcs8Rsa,
    OpensslPkcs1Rsa,
    OpensslSec1,
}

/// What is special about a certificate, as lines of certtool's templates.
pub const EXPIRED: &str = "activation_date = \"2020-01-01 00:00:00\"\nexpiration_date = \"2020-02-01 00:00:00\"\n";
pub const NOT_YET: &str = "activation_date = \"2090-01-01 00:00:00\"\nexpiration_date = \"2091-01-01 00:00:00\"\n";

/// The user of the keys, and another.
pub const USER: &str = "alice";
pub const OTHER: &str = "bob";

impl Pki {
    /// An authority, a server `localhost` and a client `client.example.com`, and the keys of two users.
    pub fn new(room: &Room, name: &str) -> Pki {
        let directory = room.path(name);
        fs::create_dir(&directory).expect("a directory in the room");
        let pki = Pki { directory };
        pki.key(room, "ca-key.pem", Algorithm::CerttoolEcdsa);
        pki.write("ca.info", &format!("cn = {name}\nca\ncert_signing_key\n"));
        pki.certtool(room, "--generate-self-signed --load-privkey ca-key.pem --template ca.info --outfile ca-cert.pem");
        pki.key(room, "server-key.pem", Algorithm::CerttoolEcdsa);
        pki.server(room, "");
        pki.key(room, "client-key.pem", Algorithm::CerttoolEcdsa);
        pki.client(room, "");
        for user in [USER, OTHER] {
            pki.run(room, "psktool", &format!("-u {user} -p keys.psk"));
        }
        pki
    }

    /// A server's certificate for `localhost` alone, with more lines of a template.
    pub fn server(&self, room: &Room, lines: &str) {
        let usage = "tls_www_server\nencryption_key\nsigning_key\n";
        self.write("server.info", &format!("cn = localhost\ndns_name = localhost\n{usage}{lines}"));
        self.sign(room, "server");
    }

    /// A client's certificate, with more lines of a template.
    pub fn client(&self, room: &Room, lines: &str) {
        let name = "country = US\nstate = New York\norganization = BigCo\ncn = client.example.com\n";
        let usage = "tls_www_client\nencryption_key\nsigning_key\n";
        self.write("client.info", &format!("{name}{usage}{lines}"));
        self.sign(room, "client");
    }

    /// Takes the client's certificate back.
    pub fn revoke_client(&self, room: &Room) {
        self.write("crl.info", "crl_next_update = 30\ncrl_number = 1\n");
        self.certtool(
            room,
            "--generate-crl --load-ca-privkey ca-key.pem --load-ca-certificate ca-cert.pem \
             --load-certificate client-cert.pem --template crl.info --outfile ca-crl.pem",
        );
    }

    pub fn key(&self, room: &Room, file: &str, algorithm: Algorithm) {
        match algorithm {
            Algorithm::CerttoolEcdsa => {
                self.certtool(room, &format!("--generate-privkey --key-type=ecdsa --outfile {file}"))
            }
            Algorithm::CerttoolRsa => {
                self.certtool(room, &format!("--generate-privkey --key-type=rsa --bits=2048 --outfile {file}"));
            }
            Algorithm::CerttoolP521 => {
                self.certtool(room, &format!("--generate-privkey --key-type=ecdsa --curve=secp521r1 --outfile {file}"));
            }
            Algorithm::CerttoolEd25519 => {
                self.certtool(room, &format!("--generate-privkey --key-type=ed25519 --outfile {file}"));
            }
            Algorithm::OpensslPkcs8Rsa => self.run(room, "openssl", &format!("genpkey -algorithm RSA -out {file}")),
            Algorithm::OpensslPkcs1Rsa => self.run(room, "openssl", &format!("genrsa -traditional -out {file} 2048")),
            // With the parameters of the curve in front.
            Algorithm::OpensslSec1 => {
                self.run(room, "openssl", &format!("ecparam -name secp384r1 -genkey -out {file}"));
            }
        }
        self.run(room, "chmod", &format!("600 {file}"));
    }

    /// The option that makes a server use these files.
    pub fn option(&self, kind: Kind) -> String {
        match kind {
            Kind::Certificates => format!("--tls-certificates={}", self.directory.display()),
            Kind::Keys => format!("--tls-psk={}", self.file("keys.psk")),
        }
    }

    /// The same for a client, as parameters of the `nbd` plugin.
    pub fn parameters(&self, kind: Kind) -> Vec<String> {
        let option = self.option(kind);
        let mut parameters = vec![option.trim_start_matches('-').to_owned()];
        if kind == Kind::Keys {
            parameters.push(format!("tls-username={USER}"));
        }
        parameters
    }

    /// The URI of the server at a Unix socket.
    pub fn uri(&self, kind: Kind, socket: &std::path::Path) -> String {
        let socket = socket.display();
        match kind {
            Kind::Certificates => {
                format!("nbds+unix:///?socket={socket}&tls-certificates={}", self.directory.display())
            }
            Kind::Keys => format!("nbds+unix://{USER}@/?socket={socket}&tls-psk-file={}", self.file("keys.psk")),
        }
    }

    /// A user's key in hexadecimal digits.
    pub fn secret(&self, user: &str) -> String {
        let keys = fs::read_to_string(self.file("keys.psk")).expect("the file was made");
        let key = keys.lines().find_map(|line| line.strip_prefix(user)?.strip_prefix(':'));
        key.expect("the user is in it").to_owned()
    }

    pub fn file(&self, name: &str) -> String {
        self.directory.join(name).to_str().expect("the room has a plain name").to_owned()
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.file(name), text).expect("a file in the room");
    }

    fn sign(&self, room: &Room, who: &str) {
        self.certtool(
            room,
            &format!(
                "--generate-certificate --load-ca-certificate ca-cert.pem --load-ca-privkey ca-key.pem \
                 --load-privkey {who}-key.pem --template {who}.info --outfile {who}-cert.pem"
            ),
        );
    }

    fn certtool(&self, room: &Room, words: &str) {
        self.run(room, "certtool", words);
    }

    fn run(&self, room: &Room, program: &str, words: &str) {
        let directory = self.directory.display();
        room.tool("sh", ["-c", &format!("cd {directory} && exec {program} {words}")]).run_to(0);
    }
}

//! The NBD URI of the server, as clients of libnbd and qemu read it. Source: nbdkit server/uri.c; the NBD project's
//! doc/uri.md.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::quote::{shell_quote, uri_quote};
use crate::cli::Tls;

/// Where clients connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// TCP on this host. `None` is the port that NBD clients take by themselves, 10809.
    Tcp {
        /// A number or the name of a service.
        port: Option<String>,
    },
    /// A Unix socket.
    Unix(PathBuf),
    /// AF_VSOCK on this machine itself. `None` is port 10809.
    Vsock {
        /// A number.
        port: Option<String>,
    },
}

/// What a client needs to speak TLS.
#[derive(Debug, Clone, Copy)]
pub enum Credentials<'a> {
    /// Nothing that could be named.
    None,
    /// A directory of certificates.
    Certificates(&'a Path),
    /// A file of keys, and one of the users in it: a client without a login has no name of its own.
    Keys(&'a Path, &'a [u8]),
}

impl<'a> Credentials<'a> {
    /// What `--tls-certificates`, and `--tls-psk` with a user of the file, come to. Keys go before certificates, as they do in
    /// the server; nbdkit's URI names the certificates there, with which no client gets in.
    pub fn of(certificates: Option<&'a Path>, keys: Option<(&'a Path, &'a [u8])>) -> Credentials<'a> {
        match (keys, certificates) {
            (Some((file, user)), _) => Credentials::Keys(file, user),
            (None, Some(directory)) => Credentials::Certificates(directory),
            (None, None) => Credentials::None,
        }
    }
}

/// The URI of an export. The credentials are named only where TLS is required; a client that may do without gets a URI
/// without.
pub fn uri(endpoint: &Endpoint, export_name: &OsStr, tls: Tls, credentials: Credentials<'_>) -> Vec<u8> {
    let required = tls == Tls::Require;
    let mut uri = match endpoint {
        Endpoint::Tcp { .. } if required => b"nbds://".to_vec(),
        Endpoint::Tcp { .. } => b"nbd://".to_vec(),
        Endpoint::Vsock { .. } if required => b"nbds+vsock://".to_vec(),
        Endpoint::Vsock { .. } => b"nbd+vsock://".to_vec(),
        Endpoint::Unix(_) if required => b"nbds+unix://".to_vec(),
        Endpoint::Unix(_) => b"nbd+unix://".to_vec(),
    };
    let user = match credentials {
        Credentials::Keys(_, user) if required => Some(user),
        _ => None,
    };
    if let Some(user) = user {
        // Between the slashes it would end there.
        let quoted = uri_quote(user).into_iter().flat_map(|byte| match byte {
            b'/' => b"%2F".to_vec(),
            byte => vec![byte],
        });
        uri.extend(quoted);
        uri.push(b'@');
    }
    uri.extend_from_slice(match endpoint {
        Endpoint::Tcp { .. } => b"localhost",
        // VMADDR_CID_LOCAL.
        Endpoint::Vsock { .. } => b"1",
        Endpoint::Unix(_) => b"",
    });
    if let Endpoint::Tcp { port: Some(port) } | Endpoint::Vsock { port: Some(port) } = endpoint {
        uri.push(b':');
        uri.extend(uri_quote(port.as_bytes()));
    }
    if !export_name.is_empty() {
        uri.push(b'/');
        uri.extend(uri_quote(export_name.as_bytes()));
    } else if let (Endpoint::Unix(_), Some(_)) = (endpoint, user) {
        // A client could take what follows for a part of the host.
        uri.push(b'/');
    }
    let socket = match endpoint {
        Endpoint::Unix(path) => Some(("socket", path.as_path())),
        Endpoint::Tcp { .. } | Endpoint::Vsock { .. } => None,
    };
    let credentials = match credentials {
        _ if !required => None,
        Credentials::Certificates(directory) => Some(("tls-certificates", directory)),
        Credentials::Keys(file, _) => Some(("tls-psk-file", file)),
        Credentials::None => None,
    };
    for ((key, path), separator) in socket.into_iter().chain(credentials).zip([b'?', b'&']) {
        uri.push(separator);
        uri.extend_from_slice(key.as_bytes());
        uri.push(b'=');
        uri.extend(uri_quote(path.as_os_str().as_bytes()));
    }
    uri
}

/// What `--print-uri` prints, to the last line end.
pub fn print_uri_text(uri: &[u8]) -> Vec<u8> {
    let quoted = shell_quote(uri);
    let lines: [&[u8]; 7] = [
        uri,
        b"\nShell-quoted URI: ",
        &quoted,
        b"\nCommand to query the NBD endpoint:\n",
        b"  nbdinfo ",
        &quoted,
        b"\n",
    ];
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(endpoint: &Endpoint, export_name: &str, tls: Tls, certificates: Option<&str>, psk: Option<&str>) -> String {
        let keys = psk.map(|file| (Path::new(file), &b"al/i ce"[..]));
        let credentials = Credentials::of(certificates.map(Path::new), keys);
        let uri = uri(endpoint, OsStr::new(export_name), tls, credentials);
        String::from_utf8(uri).expect("all else is quoted")
    }

    #[test]
    fn tcp_names_the_port_only_if_it_was_given() {
        let (none, some) = (Endpoint::Tcp { port: None }, Endpoint::Tcp { port: Some("1".to_owned()) });
        assert_eq!(text(&none, "", Tls::Off, None, None), "nbd://localhost");
        assert_eq!(text(&some, "a b", Tls::On, Some("/c"), None), "nbd://localhost:1/a%20b");
        assert_eq!(text(&some, "", Tls::Require, Some("/c"), None), "nbds://localhost:1?tls-certificates=/c");
        assert_eq!(text(&none, "/x", Tls::Require, None, None), "nbds://localhost//x");
    }

    #[test]
    fn vsock_names_this_machine_and_the_port_if_it_was_given() {
        let (none, some) = (Endpoint::Vsock { port: None }, Endpoint::Vsock { port: Some("70000".to_owned()) });
        assert_eq!(text(&none, "", Tls::Off, None, None), "nbd+vsock://1");
        assert_eq!(
            text(&some, "e", Tls::Require, None, Some("/p")),
            "nbds+vsock://al%2Fi%20ce@1:70000/e?tls-psk-file=/p"
        );
    }

    #[test]
    fn a_unix_socket_is_in_the_query() {
        let unix = Endpoint::Unix("/tmp/a socket".into());
        assert_eq!(text(&unix, "", Tls::Off, None, None), "nbd+unix://?socket=/tmp/a%20socket");
        assert_eq!(text(&unix, "e", Tls::Off, None, Some("/p")), "nbd+unix:///e?socket=/tmp/a%20socket");
        let certificates = text(&unix, "e", Tls::Require, Some("/c"), None);
        assert_eq!(certificates, "nbds+unix:///e?socket=/tmp/a%20socket&tls-certificates=/c");
    }

    #[test]
    fn keys_come_with_a_user_and_before_certificates() {
        let (unix, tcp) = (Endpoint::Unix("/s".into()), Endpoint::Tcp { port: Some("1".to_owned()) });
        let uri = |endpoint, name| text(endpoint, name, Tls::Require, Some("/c"), Some("/p&q"));
        assert_eq!(uri(&unix, ""), "nbds+unix://al%2Fi%20ce@/?socket=/s&tls-psk-file=/p%26q");
        assert_eq!(uri(&unix, "e"), "nbds+unix://al%2Fi%20ce@/e?socket=/s&tls-psk-file=/p%26q");
        assert_eq!(uri(&tcp, ""), "nbds://al%2Fi%20ce@localhost:1?tls-psk-file=/p%26q");
        assert_eq!(text(&tcp, "", Tls::On, None, Some("/p")), "nbd://localhost:1");
    }
}

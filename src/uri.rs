//! NBD URIs as a client reads them, and the way to the server that they name. (`captive/uri.rs` writes them.)
//!
//! ```text
//!  nbd://user@example.com:10809/export?tls-hostname=example.org
//!  nbd+unix:///export?socket=/tmp/sock
//! ```
//! Source: the NBD project's doc/uri.md; RFC 3986.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixStream};
use std::path::PathBuf;

use async_io::Async;
use nbdcaptive_actors::protocol::constants::NBD_MAX_STRING;
use nbdcaptive_actors::transport::{Socket, Transport};

use crate::captive::quote::uri_quote;
use crate::unblock::unblock;

/// The port of NBD. Source: IANA.
const PORT: u16 = 10809;
/// The longest URI that is read, in bytes: every part of it that has a limit of its own fits three times over.
const LONGEST: usize = 32 * 1024;

/// An NBD URI that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// TLS is required: `nbds`.
    pub tls: bool,
    /// Where the server is.
    pub address: Address,
    /// Who the client says that it is, for TLS.
    pub user: Option<Vec<u8>>,
    /// The export to ask for, at most 4096 bytes without a NUL.
    pub export_name: Vec<u8>,
    /// The parameters whose names start with `tls-`.
    pub tls_parameters: Vec<(String, Vec<u8>)>,
    /// The URI up to the export's name, and from behind it, as written.
    around: (String, String),
}

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `nbd`
    #[allow(missing_docs, reason = "as they are called")]
    Tcp { host: String, port: u16 },
    /// `nbd+unix`. One that starts with a NUL is of Linux's abstract namespace.
    Unix(PathBuf),
    /// `nbd+vsock`
    #[allow(missing_docs, reason = "as they are called")]
    Vsock { cid: u32, port: u32 },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix(path) => write!(f, "{}", path.as_os_str().as_bytes().escape_ascii()),
            Address::Vsock { cid, port } => write!(f, "vsock {cid}:{port}"),
        }
    }
}

/// Why a URI cannot be read. One line, without the URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(String);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Malformed {}

fn malformed<T>(why: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed(why.into()))
}

/// What a scheme says of the way to the server.
enum Way {
    Tcp,
    Unix,
    Vsock,
}

impl Uri {
    /// Reads a URI. Nothing is looked up.
    pub fn parse(text: &str) -> Result<Uri, Malformed> {
        const SCHEMES: &str = "an NBD URI starts with nbd://, nbds://, nbd+unix://, nbds+unix:// or nbd+vsock://";
        if text.len() > LONGEST {
            return malformed(format!("the URI is longer than {LONGEST} bytes"));
        }
        if text.contains(|c: char| c.is_control() || c == ' ') {
            return malformed("a URI has no spaces and control characters: a space is written as %20");
        }
        if text.contains('#') {
            return malformed("an NBD URI has no part behind a #: in a name it is written as %23");
        }
        let Some((scheme, rest)) = text.split_once("://") else { return malformed(SCHEMES) };
        let (tls, way) = match scheme.to_ascii_lowercase().as_str() {
            "nbd" => (false, Way::Tcp),
            "nbds" => (true, Way::Tcp),
            "nbd+unix" => (false, Way::Unix),
            "nbds+unix" => (true, Way::Unix),
            "nbd+vsock" => (false, Way::Vsock),
            "nbds+vsock" => (true, Way::Vsock),
            _ => return malformed(SCHEMES),
        };
        let (before, query) = rest.split_at(rest.find('?').unwrap_or(rest.len()));
        let (authority, path) = before.split_at(before.find('/').unwrap_or(before.len()));

        let export_name = decode(path.strip_prefix('/').unwrap_or(path))?;
        if export_name.len() > NBD_MAX_STRING {
            return malformed(format!("the export's name is longer than {NBD_MAX_STRING} bytes"));
        }
        if export_name.contains(&0) {
            return malformed("the export's name may not include NUL bytes");
        }
        let mut socket = None;
        let mut tls_parameters = Vec::new();
        for parameter in query.strip_prefix('?').unwrap_or_default().split('&').filter(|one| !one.is_empty()) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let (key, value) = (utf8(decode(key)?)?, decode(value)?);
            match key.as_str() {
                "socket" if socket.is_some() => return malformed("the parameter socket is there twice"),
                "socket" => socket = Some(value),
                // Experimental ones; who does not know them passes over them.
                _ if key.starts_with("x-") => {}
                _ if key.starts_with("tls-") => tls_parameters.push((key, value)),
                _ => return malformed(format!("unknown parameter \"{}\"", key.escape_debug())),
            }
        }

        let (user, host_port) = match authority.rsplit_once('@') {
            Some((user, rest)) => (Some(decode(user)?), rest),
            None => (None, authority),
        };
        let (host, port) = host_and_port(host_port)?;
        let address = match (way, socket) {
            (Way::Unix, None) => return malformed("a URI of a Unix socket needs ?socket=PATH"),
            (Way::Unix, Some(path)) if path.is_empty() => return malformed("the path of the socket is empty"),
            (Way::Unix, Some(_)) if !host_port.is_empty() => {
                return malformed("a URI of a Unix socket names no host: there are three slashes before the export");
            }
            (Way::Unix, Some(path)) => Address::Unix(std::ffi::OsStr::from_bytes(&path).into()),
            (_, Some(_)) => return malformed("the parameter socket is for Unix sockets only: nbd+unix://"),
            (Way::Tcp, None) => {
                let host = if host.is_empty() { "localhost".to_owned() } else { host };
                Address::Tcp { host, port: number(port, PORT, "the port is no number from 0 to 65535")? }
            }
            (Way::Vsock, None) => {
                // Without one, the host that a virtual machine runs on. Source: vsock(7) VMADDR_CID_HOST.
                let cid = number(Some(&*host).filter(|host| !host.is_empty()), 2, "the vsock CID is no number")?;
                Address::Vsock { cid, port: number(port, u32::from(PORT), "the vsock port is no number")? }
            }
        };
        let around = (format!("{scheme}://{authority}"), query.to_owned());
        Ok(Uri { tls, address, user, export_name, tls_parameters, around })
    }

    /// The URI of another export of the same server.
    pub fn of_export(&self, name: &[u8]) -> String {
        let (before, after) = &self.around;
        // What is quoted is ASCII.
        format!("{before}/{}{after}", String::from_utf8_lossy(&uri_quote(name)))
    }

    /// Connects, to each address of the host in turn, and no more: see [`crate::tls::Wanted::by_uri`]. Dropped, nothing remains.
    /// Errors: nobody answers, or the way there is none that we know, as a line for people.
    pub async fn connect(&self) -> Result<Box<dyn Transport>, String> {
        let failed = |error: io::Error| format!("cannot connect to {}: {error}", self.address);
        let socket: OwnedFd = match &self.address {
            Address::Tcp { host, port } => tcp(host.clone(), *port).await.map_err(failed)?,
            // Waits where the server's queue is full, which cannot be watched.
            Address::Unix(path) => {
                let path = path.clone();
                unblock(move || unix(&path)).await.map_err(failed)?.into()
            }
            // Nobody who is not there is waited for longer than two seconds.
            Address::Vsock { cid, port } => {
                let (cid, port) = (*cid, *port);
                unblock(move || vsock(cid, port)).await.map_err(failed)?
            }
        };
        Ok(Box::new(Socket::on_reactor(socket).map_err(failed)?))
    }
}

async fn tcp(host: String, port: u16) -> io::Result<OwnedFd> {
    let addresses = unblock(move || (host, port).to_socket_addrs().map(Vec::from_iter)).await?;
    connect_to_any(addresses).await
}

/// Connects to the first of these where somebody answers. Dropped, nothing remains.
pub(crate) async fn connect_to_any(addresses: Vec<SocketAddr>) -> io::Result<OwnedFd> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in addresses {
        match Async::<TcpStream>::connect(address).await {
            Ok(stream) => {
                // Requests are small, and answers are waited for.
                stream.get_ref().set_nodelay(true)?;
                return Ok(stream.into_inner()?.into());
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Connects, and waits where the server's queue is full.
pub(crate) fn unix(path: &std::path::Path) -> io::Result<UnixStream> {
    #[cfg(target_os = "linux")]
    if let [0, name @ ..] = path.as_os_str().as_bytes() {
        use std::os::linux::net::SocketAddrExt;
        return UnixStream::connect_addr(&UnixAddress::from_abstract_name(name)?);
    }
    UnixStream::connect_addr(&UnixAddress::from_pathname(path)?)
}

/// Connects to a virtual machine, or from one to its host. Source: vsock(7).
#[cfg(target_os = "linux")]
pub(crate) fn vsock(cid: u32, port: u32) -> io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&stream), &VsockAddr::new(cid, port))?;
    Ok(stream)
}

/// See above.
#[cfg(not(target_os = "linux"))]
pub(crate) fn vsock(_cid: u32, _port: u32) -> io::Result<OwnedFd> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "vsock is Linux's"))
}

/// `host`, `host:port`, `[address]:port` or nothing.
fn host_and_port(text: &str) -> Result<(String, Option<&str>), Malformed> {
    let (host, rest) = match text.strip_prefix('[') {
        Some(address) => {
            let Some((address, rest)) = address.split_once(']') else { return malformed("a [ without a ]") };
            // A zone is written as %25.
            let host = utf8(decode(address)?)?;
            if host.split('%').next().is_none_or(|host| host.parse::<std::net::Ipv6Addr>().is_err()) {
                return malformed("what is in [ ] is no IPv6 address");
            }
            (host, rest)
        }
        None => {
            let (host, rest) = text.split_at(text.find(':').unwrap_or(text.len()));
            if rest.matches(':').count() > 1 {
                return malformed("an IPv6 address is written in [ ]");
            }
            let host = utf8(decode(host)?)?;
            if host.contains('\0') {
                return malformed("the host may not include NUL bytes");
            }
            (host, rest)
        }
    };
    match rest.strip_prefix(':') {
        // RFC 3986 lets a URI end with the colon.
        Some(port) => Ok((host, Some(port).filter(|port| !port.is_empty()))),
        None if rest.is_empty() => Ok((host, None)),
        None => malformed("only a port may follow the ]"),
    }
}

fn number<T: std::str::FromStr>(text: Option<&str>, default: T, why: &str) -> Result<T, Malformed> {
    let Some(text) = text else { return Ok(default) };
    // `parse` would take a sign too.
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits).map_or_else(|| malformed(why), Ok)
}

fn utf8(bytes: Vec<u8>) -> Result<String, Malformed> {
    String::from_utf8(bytes).map_err(|_| Malformed("the host or a parameter's name is not valid UTF-8".to_owned()))
}

/// `%XX` to bytes. Unlike a web browser, we refuse a `%` that is none: a name that was quoted once too seldom is another.
fn decode(text: &str) -> Result<Vec<u8>, Malformed> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                match (digit(), digit()) {
                    (Some(high), Some(low)) => (16 * high + low) as u8,
                    _ => return malformed("a % that two hexadecimal digits do not follow: it is written as %25"),
                }
            }
            byte => byte,
        });
    }
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;
    use crate::captive::uri::{Credentials, Endpoint, uri};
    use crate::cli::Tls;

    fn read(text: &str) -> Uri {
        Uri::parse(text).unwrap_or_else(|why| panic!("{text}: {why}"))
    }

    fn refused(text: &str) -> String {
        Uri::parse(text).expect_err(text).to_string()
    }

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn the_examples_of_the_specification() {
        for (text, name) in [
            ("nbd://example.com/disk", "disk"),
            ("nbd+unix:///disk?socket=sock", "disk"),
            ("nbd://example.com/", ""),
            ("nbd://example.com", ""),
            ("nbd://example.com//disk", "/disk"),
            ("nbd://example.com/hello%20world", "hello world"),
            ("nbd+unix:///?socket=%00/abstract", ""),
        ] {
            assert_eq!(read(text).export_name, name.as_bytes(), "{text}");
        }
        assert_eq!(read("nbd+unix:///?socket=%00/abstract").address, Address::Unix("\0/abstract".into()));
        assert_eq!(read("nbd://example.com:10810/x").address, tcp("example.com", 10810));
    }

    #[test]
    fn hosts_and_ports() {
        for (text, address) in [
            ("NBD://h", tcp("h", 10809)),
            ("nbd://h:", tcp("h", 10809)),
            ("nbd://h:65535", tcp("h", 65535)),
            ("nbd://", tcp("localhost", 10809)),
            ("nbd://:1/x", tcp("localhost", 1)),
            ("nbd://[::1]", tcp("::1", 10809)),
            ("nbd://[::1]:2/x", tcp("::1", 2)),
            ("nbd://[fe80::1%25eth0]:2/x", tcp("fe80::1%eth0", 2)),
            ("nbd://%68", tcp("h", 10809)),
            ("nbd+vsock://3:4/x", Address::Vsock { cid: 3, port: 4 }),
            ("nbd+vsock:///x", Address::Vsock { cid: 2, port: 10809 }),
        ] {
            assert_eq!(read(text).address, address, "{text}");
        }
        let user = read("nbds://al%69ce@[::1]/x?tls-type=psk&x-odd=1&tls-psk-file=/a%26b&tls-verify-peer");
        assert_eq!((user.tls, user.user.as_deref()), (true, Some(&b"alice"[..])));
        let tls = [("tls-type", "psk"), ("tls-psk-file", "/a&b"), ("tls-verify-peer", "")];
        let tls = tls.map(|(key, value)| (key.to_owned(), value.as_bytes().to_vec()));
        assert_eq!(user.tls_parameters, tls);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, why) in [
            ("", "an NBD URI starts with"),
            ("http://x", "an NBD URI starts with"),
            ("nbd:unix:/tmp/sock", "an NBD URI starts with"),
            ("localhost:10809", "an NBD URI starts with"),
            ("nbd+unix:///", "needs ?socket="),
            ("nbd+unix:///?socket=", "is empty"),
            ("nbd+unix://?socket=a&socket=b", "there twice"),
            ("nbd+unix://host/x?socket=a", "names no host"),
            ("nbd://h/x?socket=a", "for Unix sockets only"),
            ("nbd://h:x", "no number from 0 to 65535"),
            ("nbd://h:65536", "no number from 0 to 65535"),
            ("nbd://h:+1", "no number from 0 to 65535"),
            ("nbd://::1", "written in [ ]"),
            ("nbd://[::1", "a [ without a ]"),
            ("nbd://[x]", "no IPv6 address"),
            ("nbd://[::1]x", "only a port"),
            ("nbd://h/%", "two hexadecimal digits"),
            ("nbd://h/%4", "two hexadecimal digits"),
            ("nbd://h/%+4", "two hexadecimal digits"),
            ("nbd://h/%00", "NUL"),
            ("nbd://h%00", "NUL"),
            ("nbd://h%ff", "UTF-8"),
            ("nbd://h/x?colour=red", "unknown parameter \"colour\""),
            ("nbd://h/x#y", "%23"),
            ("nbd://h/x y", "%20"),
            ("nbd://h/x\n", "%20"),
            ("nbd+vsock://x", "CID"),
        ] {
            let line = refused(text);
            assert!(line.contains(why) && !line.contains('\n'), "{text}: {line}");
        }
        assert!(refused(&format!("nbd://h/{}", "x".repeat(4097))).contains("4096"));
        assert!(refused(&format!("nbd://h/{}", "x".repeat(LONGEST))).contains("longer"));
    }

    #[test]
    fn what_this_program_writes_it_reads() {
        let path = "/tmp/a socket&b%#?";
        let name = OsStr::from_bytes(b"/na\xff\xc3\xafve ?&#%");
        let written = uri(&Endpoint::Unix(path.into()), name, Tls::Off, Credentials::None);
        let text = String::from_utf8(written).expect("all else is quoted");
        let read = read(&text);
        assert_eq!(read.address, Address::Unix(path.into()));
        assert_eq!(read.export_name, name.as_bytes());
        assert_eq!(read.of_export(name.as_bytes()), text);
        let written = uri(
            &Endpoint::Tcp { port: Some("7".into()) },
            name,
            Tls::Require,
            Credentials::Keys("/p".as_ref(), b"al/\xffce"),
        );
        let read = super::Uri::parse(&String::from_utf8(written).expect("all else is quoted")).expect("it is one");
        assert_eq!((read.tls, &read.address, &*read.export_name), (true, &tcp("localhost", 7), name.as_bytes()));
        assert_eq!(read.user.as_deref(), Some(&b"al/\xffce"[..]));
    }
}

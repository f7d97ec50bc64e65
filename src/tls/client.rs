//! What is spoken to other servers: by `--probe` and the `nbd` plugin. The files and their places are libnbd's.
//! Source: libnbd lib/crypto.c, lib/uri.c; the NBD project's doc/uri.md; nbdkit plugins/nbd/nbdkit-nbd-plugin.pod.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nbdcaptive_actors::client::{Error, Handshake};
use nbdcaptive_actors::tls::{Check, ClientPem, Connector, ServerCertificates};
use nbdcaptive_actors::transport::Transport;

use super::files::{Files, places, read_if_there, unreadable, unusable};
use crate::cli::Tls;
use crate::uri::{Address, Uri};
use crate::values;

/// Files of the authorities that the system trusts, the first that is there. Source: Debian's ca-certificates, Fedora's, SUSE's.
const SYSTEM: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"];

/// Which TLS a client wants to speak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Off, on where the server has it, or required.
    pub mode: Tls,
    /// The directory of certificates, instead of the usual places.
    pub certificates: Option<PathBuf>,
    /// A file of keys, which goes before certificates.
    pub keys: Option<PathBuf>,
    /// The user in it, instead of the one who runs this.
    pub user: Option<Vec<u8>>,
    /// Whether it matters who the server is.
    pub verify: bool,
    /// The name to look for in the server's certificate; without one, any that an authority has signed will do.
    pub hostname: Option<String>,
}

impl Default for Wanted {
    fn default() -> Wanted {
        let (certificates, keys, user, hostname) = (None, None, None, None);
        Wanted { mode: Tls::Off, certificates, keys, user, verify: true, hostname }
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub enum Failed {
    /// A file, or what the server has, as a line for people.
    Line(String),
    /// The connection.
    Client(Error),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failed::Line(line) => f.write_str(line),
            Failed::Client(error) => error.fmt(f),
        }
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Failed {
        Failed::Client(error)
    }
}

impl Wanted {
    /// What a URI says. Errors: a parameter that cannot be understood, or that cannot be had, as a line for people.
    pub fn by_uri(uri: &Uri) -> Result<Wanted, String> {
        let mut wanted = Wanted { user: uri.user.clone(), ..Wanted::default() };
        if uri.tls {
            wanted.mode = Tls::Require;
        }
        if let Address::Tcp { host, .. } = &uri.address {
            wanted.hostname = Some(host.clone());
        }
        for (key, value) in &uri.tls_parameters {
            let text = || String::from_utf8(value.clone()).map_err(|_| format!("{key}: not valid UTF-8"));
            match key.as_str() {
                "tls-certificates" => wanted.certificates = Some(OsStr::from_bytes(value).into()),
                "tls-psk-file" => wanted.keys = Some(OsStr::from_bytes(value).into()),
                "tls-hostname" => wanted.hostname = Some(text()?),
                "tls-verify-peer" => {
                    wanted.verify = values::boolean(&text()?).map_err(|why| format!("{key}: {why}"))?
                }
                // Which it is follows from the file.
                "tls-type" if ["psk", "x509"].contains(&&*text()?) => {}
                "tls-type" => return Err(format!("{key}: only psk and x509")),
                // Priorities are GnuTLS's own words.
                _ => return Err(format!("the parameter {key} is not known here")),
            }
        }
        Ok(wanted)
    }

    /// Reads the files that it takes. Errors: one cannot be used, as a line for people.
    pub fn ready(&self) -> Result<Ready, String> {
        let connector = match (self.mode, &self.keys) {
            (Tls::Off, _) => None,
            (_, Some(file)) => Some(self.by_key(file)?),
            (_, None) => Some(self.by_certificates()?),
        };
        Ok(Ready { connector, is_required: self.mode == Tls::Require })
    }

    fn check(&self) -> Check {
        match &self.hostname {
            _ if !self.verify => Check::Nothing,
            Some(name) => Check::Name(name.clone()),
            None => Check::Signature,
        }
    }

    fn by_certificates(&self) -> Result<Arc<dyn Connector>, String> {
        let check = self.check();
        for directory in places(self.certificates.as_deref(), "libnbd") {
            let files = Files::of(&directory, "client");
            // Only this one has to be there.
            let Some(authorities_pem) = read_if_there(&files.authorities) else { continue };
            let read = |path: &Path| read_if_there(path).transpose().map_err(|error| unreadable(path, &error));
            let own = read(&files.certificate)?.zip(read(&files.key)?);
            let revoked = read(&files.revoked)?;
            let pem = ClientPem {
                authorities: &authorities_pem.map_err(|error| unreadable(&files.authorities, &error))?,
                own: own.as_ref().map(|(certificate, key)| (&certificate[..], &key[..])),
                revoked: revoked.as_deref(),
            };
            let made = ServerCertificates::new(pem, &check).map_err(|error| files.unusable(&error))?;
            return Ok(Arc::new(made));
        }
        if let Some(directory) = &self.certificates
            && self.verify
        {
            return Err(format!("there is no ca-cert.pem in {}", directory.display()));
        }
        let system = SYSTEM.iter().find_map(|path| Some((path, read_if_there(Path::new(path))?)));
        let (path, authorities) = match system {
            Some((path, read)) => (*path, read.map_err(|error| unreadable(Path::new(path), &error))?),
            None if self.verify => return Err("TLS: there is no ca-cert.pem, and the system trusts nobody".to_owned()),
            None => ("", Vec::new()),
        };
        let pem = ClientPem { authorities: &authorities, own: None, revoked: None };
        let made = ServerCertificates::new(pem, &check).map_err(|error| unusable(Path::new(path), &error))?;
        Ok(Arc::new(made))
    }

    #[cfg(feature = "psk")]
    fn by_key(&self, file: &Path) -> Result<Arc<dyn Connector>, String> {
        use nbdcaptive_actors::tls::{Keys, SharedKey};
        let wrong = |why: &dyn fmt::Display| unusable(file, why);
        let text = super::files::read(file).map_err(|error| unreadable(file, &error))?;
        let keys = Keys::parse(&text).map_err(|error| wrong(&error))?;
        let user = self.user.clone().map_or_else(user, Ok).map_err(|error| wrong(&error))?;
        Ok(Arc::new(SharedKey::new(&keys, &user).map_err(|error| wrong(&error))?))
    }

    #[cfg(not(feature = "psk"))]
    fn by_key(&self, _file: &Path) -> Result<Arc<dyn Connector>, String> {
        Err("this program was built without pre-shared keys (the cargo feature \"psk\")".to_owned())
    }
}

/// A [`Wanted`] whose files are read.
#[derive(Clone, Debug)]
pub struct Ready {
    connector: Option<Arc<dyn Connector>>,
    is_required: bool,
}

impl Ready {
    /// Hears the greeting and makes the stream secure, as it is wanted.
    pub async fn begin(&self, transport: Box<dyn Transport>) -> Result<Handshake, Failed> {
        let mut handshake = Handshake::begin(transport).await?;
        let Some(connector) = &self.connector else { return Ok(handshake) };
        match handshake.start_tls(&**connector).await {
            Ok(()) => Ok(handshake),
            Err(Error::Refused(_) | Error::Impossible { .. }) if !self.is_required => Ok(handshake),
            Err(Error::Impossible { .. }) => Err(Failed::Line("the server knows no TLS".to_owned())),
            Err(error) => Err(error.into()),
        }
    }
}

/// Who runs this: `$LOGNAME`, which a person may change, or the name of the user that we are.
#[cfg_attr(not(feature = "psk"), allow(dead_code, reason = "only keys have users"))]
fn user() -> io::Result<Vec<u8>> {
    if let Some(name) = std::env::var_os("LOGNAME") {
        return Ok(name.into_vec());
    }
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid())?;
    user.map(|user| user.name.into_bytes()).ok_or_else(|| io::Error::other("there is no user to be: say which"))
}

//! Reading the files of certificates and keys.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nbdcaptive_actors::tls::{CertificatesError, Part};

use crate::report::Report;

/// What is read of a file at most, in bytes: a revocation list of a large authority fits.
const MOST: u64 = 64 * 1024 * 1024;

/// The directories to look in for the certificates of `package`: the one that was given, or root's, or those of other users.
/// Source: nbdkit docs/nbdkit-tls.pod "Default location of certificates".
pub(super) fn places(given: Option<&Path>, package: &str) -> Vec<PathBuf> {
    if let Some(directory) = given {
        return vec![directory.to_owned()];
    }
    if nix::unistd::geteuid().is_root() {
        return vec![Path::new(ROOT).join(package)];
    }
    let home = std::env::var_os("HOME").map(PathBuf::from);
    home.iter().flat_map(|home| HOME.map(|place| home.join(place).join(package))).collect()
}

/// Where root's are.
const ROOT: &str = "/etc/pki";
/// Where those of other users are, below their home directory, in the order in which they are looked at.
const HOME: [&str; 2] = [".pki", ".config/pki"];

/// The files of one directory of certificates.
pub(super) struct Files {
    pub(super) authorities: PathBuf,
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
    pub(super) revoked: PathBuf,
}

impl Files {
    /// Those of the `end` of the connection that is to be: `server` or `client`.
    pub(super) fn of(directory: &Path, end: &str) -> Files {
        Files {
            authorities: directory.join("ca-cert.pem"),
            certificate: directory.join(format!("{end}-cert.pem")),
            key: directory.join(format!("{end}-key.pem")),
            revoked: directory.join("ca-crl.pem"),
        }
    }

    /// What people are told of one that cannot be used.
    pub(super) fn unusable(&self, error: &CertificatesError) -> String {
        let path = match error.part {
            Part::Authorities => &self.authorities,
            Part::Certificate => &self.certificate,
            Part::Key => &self.key,
            Part::Revoked => &self.revoked,
        };
        unusable(path, error)
    }
}

/// What people are told of a file that could be read and not be used.
pub(super) fn unusable(path: &Path, why: &dyn fmt::Display) -> String {
    format!("TLS: loading {}: {why}", path.display())
}

/// A key that everybody can read is no secret. Who has put it there may have a reason.
pub(super) fn warn_if_open(path: &Path, report: &Report) {
    const OTHERS_READ: u32 = 0o004;
    let is_open = path.metadata().is_ok_and(|about| about.is_file() && about.permissions().mode() & OTHERS_READ != 0);
    if is_open {
        let path = path.display();
        report.warn(format_args!("warning: {path}: every user of this machine can read this secret; chmod 600 it"));
    }
}

pub(super) fn unreadable(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

/// A file's content; `None` where there is no such file that we may read.
pub(super) fn read_if_there(path: &Path) -> Option<io::Result<Vec<u8>>> {
    match read(path) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => None,
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => None,
        result => Some(result),
    }
}

pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(MOST).read_to_end(&mut content)?;
    if content.len() as u64 == MOST {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(content)
}

//! What is served: the files of `--tls-certificates` and `--tls-psk`, and what becomes of `--tls` where there are none. Source: nbdkit server/crypto.c, docs/nbdkit-tls.pod.

use std::path::Path;
use std::sync::Arc;

use nbdcaptive_actors::tls::{Acceptor, Certificates, Pem};

#[cfg(feature = "psk")]
use super::files::read;
use super::files::{Files, places, read_if_there, unreadable, warn_if_open};
use crate::cli::{Options, Tls};
use crate::report::Report;

/// Where the certificates of a server that root starts are, unless it is said.
pub const ROOT_CERTIFICATES: &str = "/etc/pki/nbdkit";

/// What clients are offered.
#[derive(Debug)]
pub struct Offer {
    /// `--tls`, or off where there is nothing to serve it with.
    pub mode: Tls,
    /// There unless it is off.
    pub acceptor: Option<Arc<dyn Acceptor>>,
    /// A user of the pre-shared keys, for clients that have no name of their own: the first.
    pub user: Option<Vec<u8>>,
}

/// Reads the files that `options` ask for. Errors: files that are there cannot be used, or TLS is required and there are none;
/// lines for people.
pub fn offer(options: &Options, report: &Report) -> Result<Offer, String> {
    let off = Offer { mode: Tls::Off, acceptor: None, user: None };
    if options.tls == Tls::Off {
        return Ok(off);
    }
    // They go before certificates.
    if let Some(file) = &options.tls_psk {
        let (user, acceptor) = keys(file, report)?;
        report.debug("TLS enabled using: Pre-Shared Keys (PSK)");
        return Ok(Offer { mode: options.tls, acceptor: Some(acceptor), user: Some(user) });
    }
    if let Some(acceptor) = certificates(options, report)? {
        report.debug("TLS enabled using: X.509 certificates");
        return Ok(Offer { mode: options.tls, acceptor: Some(acceptor), user: None });
    }
    const ADVICE: &str =
        "Try setting ‘--tls-certificates=/path/to/certificates’ or read the \"TLS\" section in nbdkit(1).";
    match options.tls {
        Tls::Require => {
            return Err(format!("--tls=require but could not load TLS certificates. {ADVICE}"));
        }
        Tls::On if options.tls_given => report.warn(format_args!(
            "warning: --tls=on but could not load TLS certificates. \
             TLS will be disabled and TLS connections will be rejected. {ADVICE}"
        )),
        Tls::On | Tls::Off => {}
    }
    report.debug("TLS disabled: could not load TLS certificates");
    Ok(off)
}

/// A server with the certificates of the first directory that has what is needed.
fn certificates(options: &Options, report: &Report) -> Result<Option<Arc<dyn Acceptor>>, String> {
    for directory in places(options.tls_certificates.as_deref(), "nbdkit") {
        let files = Files::of(&directory, "server");
        // A directory without one of these is no such directory.
        let needed = [&files.authorities, &files.certificate, &files.key].map(|path| read_if_there(path));
        let [Some(authorities_pem), Some(certificate_pem), Some(key_pem)] = needed else {
            report.debug(format_args!("no TLS certificates in {}", directory.display()));
            continue;
        };
        let revoked_pem = read_if_there(&files.revoked).transpose();
        let revoked_pem = revoked_pem.map_err(|error| unreadable(&files.revoked, &error))?;
        let pem = Pem {
            authorities: &authorities_pem.map_err(|error| unreadable(&files.authorities, &error))?,
            certificate: &certificate_pem.map_err(|error| unreadable(&files.certificate, &error))?,
            key: &key_pem.map_err(|error| unreadable(&files.key, &error))?,
            revoked: revoked_pem.as_deref(),
        };
        let made = Certificates::new(pem, options.tls_verify_peer).map_err(|error| files.unusable(&error))?;
        warn_if_open(&files.key, report);
        report.debug(format_args!("successfully loaded TLS certificates from {}", directory.display()));
        return Ok(Some(Arc::new(made)));
    }
    Ok(None)
}

/// A server with the keys of `file`, and the first user.
#[cfg(feature = "psk")]
fn keys(file: &Path, report: &Report) -> Result<(Vec<u8>, Arc<dyn Acceptor>), String> {
    let text = read(file).map_err(|error| unreadable(file, &error))?;
    let keys = nbdcaptive_actors::tls::Keys::parse(&text)
        .map_err(|error| format!("--tls-psk: {}: {error}", file.display()))?;
    warn_if_open(file, report);
    let user = keys.users().next().unwrap_or_default().to_vec();
    let made = nbdcaptive_actors::tls::PreSharedKeys::new(keys).map_err(|error| format!("--tls-psk: {error}"))?;
    Ok((user, Arc::new(made)))
}

#[cfg(not(feature = "psk"))]
fn keys(_file: &Path, _report: &Report) -> Result<(Vec<u8>, Arc<dyn Acceptor>), String> {
    Err("--tls-psk: this program was built without pre-shared keys (the cargo feature \"psk\")".to_owned())
}

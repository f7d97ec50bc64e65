//! The shell variables that the command of `--run` sees. They are set in front of the command, in the same shell, and
//! not exported: what the command starts does not inherit them, unless the caller has exported variables of these names.
//! Source: nbdkit server/captive.c.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::quote::shell_quote;
use crate::cli::Tls;

/// What the variables say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// `$uri`, and `$nbd` for old scripts. Empty if there is none.
    pub uri: Vec<u8>,
    /// `$exportname`
    pub exportname: OsString,
    /// `$port`, where TCP is served. Empty otherwise.
    pub port: Option<String>,
    /// `$unixsocket`, where a Unix socket is served. Empty otherwise.
    pub unixsocket: Option<PathBuf>,
    /// `$tls`: 1 on, 2 required. Not set when off.
    pub tls: Tls,
    /// `$tls_certificates`. Empty otherwise.
    pub tls_certificates: Option<PathBuf>,
    /// `$tls_psk`. Empty otherwise.
    pub tls_psk: Option<PathBuf>,
}

impl Environment {
    /// The text to put before the command: assignments, each on a line of its own.
    pub fn prelude(&self) -> Vec<u8> {
        let path = |path: &'_ Option<PathBuf>| path.clone().map(|path| path.into_os_string().into_vec());
        // The others are set in any case; those that the caller has exported stay so, which scripts rely on.
        let mut text = b"unset tls\n".to_vec();
        assign(&mut text, "uri", Some(&self.uri));
        assign(&mut text, "nbd", Some(&self.uri));
        assign(&mut text, "exportname", Some(self.exportname.as_bytes()));
        assign(&mut text, "port", self.port.as_ref().map(String::as_bytes));
        assign(&mut text, "unixsocket", path(&self.unixsocket).as_deref());
        match self.tls {
            Tls::Off => {}
            Tls::On => assign(&mut text, "tls", Some(b"1")),
            Tls::Require => assign(&mut text, "tls", Some(b"2")),
        }
        assign(&mut text, "tls_certificates", path(&self.tls_certificates).as_deref());
        assign(&mut text, "tls_psk", path(&self.tls_psk).as_deref());
        text
    }
}

/// Without a value the variable is empty, but set.
fn assign(text: &mut Vec<u8>, name: &str, value: Option<&[u8]>) {
    text.extend_from_slice(name.as_bytes());
    text.push(b'=');
    text.extend(value.map(shell_quote).unwrap_or_default());
    text.push(b'\n');
}

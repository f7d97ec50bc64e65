//! Who this program says it is: by the name that it was called by, as nbdkit does, so that a link named `nbdkit` is nbdkit to
//! whoever calls it. Source: nbdkit server/internal.h `program_name`, configure.ac and server/main.c for the version.

use std::ffi::OsStr;
use std::fmt;
use std::path::Path;
use std::sync::OnceLock;

/// The nbdkit whose command line this is.
pub(crate) const NBDKIT: Package = Package { name: "nbdkit", version: "1.45.1" };
/// This program.
pub(crate) const OURS: Package = Package { name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION") };

/// A name and a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Package {
    /// The name, as scripts look for it.
    pub name: &'static str,
    /// The version: numbers and dots, three of them.
    pub version: &'static str,
}

impl Package {
    /// The first and the second number of the version.
    pub fn major_and_minor(&self) -> (&'static str, &'static str) {
        let mut numbers = self.version.split('.');
        (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
    }

    /// What is said behind the version, where it is not the program's own: which program this is in truth.
    pub fn extra(&self) -> Option<String> {
        (*self != OURS).then(|| OURS.to_string())
    }
}

impl fmt::Display for Package {
    /// As `--version` has it: nbdkit, too, puts what packagers add to its version in parentheses.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.version)?;
        match self.extra() {
            Some(extra) => write!(f, " ({extra})"),
            None => Ok(()),
        }
    }
}

/// Set once, by [`take`].
static NAME: OnceLock<String> = OnceLock::new();

/// Takes the name from the first word of the command line: what is behind its last slash. To be called before anything is said.
pub fn take(word: Option<&OsStr>) {
    // Whoever comes second finds it as it is.
    let _ = NAME.set(name_in(word));
}

fn name_in(word: Option<&OsStr>) -> String {
    let name = word.and_then(|word| Path::new(word).file_name()).unwrap_or_default().to_string_lossy();
    if name.is_empty() {
        return OURS.name.to_owned();
    }
    // It starts every line, and each is to stay one.
    name.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// The name in front of every line that is said.
pub fn name() -> &'static str {
    NAME.get().map_or(OURS.name, String::as_str)
}

/// What `--version` and `--dump-config` speak of: nbdkit where this was called so, else this program.
pub fn package() -> Package {
    package_called(name())
}

fn package_called(name: &str) -> Package {
    if name == NBDKIT.name { NBDKIT } else { OURS }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_what_is_behind_the_last_slash() {
        for (word, name) in [
            ("nbdkit", "nbdkit"),
            ("/usr/sbin/nbdkit", "nbdkit"),
            ("../nbdcaptive", "nbdcaptive"),
            ("my\nserver", "my\\nserver"),
            ("", "nbdcaptive"),
            ("/", "nbdcaptive"),
        ] {
            assert_eq!(name_in(Some(OsStr::new(word))), name, "{word:?}");
        }
        assert_eq!(name_in(None), "nbdcaptive");
    }

    #[test]
    fn a_link_named_nbdkit_is_the_nbdkit_it_follows_and_says_what_it_is() {
        let ours = concat!("nbdcaptive ", env!("CARGO_PKG_VERSION"));
        assert_eq!(package_called("nbdkit").to_string(), format!("nbdkit 1.45.1 ({ours})"));
        assert_eq!(package_called("nbdkit").major_and_minor(), ("1", "45"));
        for other in ["nbdcaptive", "nbdkit-1.45", "server"] {
            assert_eq!(package_called(other).to_string(), ours, "{other}");
        }
    }
}

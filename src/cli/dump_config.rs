//! `--dump-config`: facts for scripts, one `key=value` per line.
//!
//! The keys and their order are nbdkit's. What nbdkit has in directories of its own is built in here, and is said to be. Keys
//! about loadable modules are answered only in nbdkit's name, to callers that count on them.
//! Source: nbdkit server/main.c `dump_config`, docs/nbdkit-probing.pod.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::identity::Package;
use crate::tls::ROOT_CERTIFICATES;

/// The answer to `--dump-config`, by the name of `package`. Looks up where this program is; without an answer, `binary` and the
/// directories made from it are left out, as in nbdkit.
pub fn dump_config(package: Package) -> Vec<u8> {
    lines(package, std::env::current_exe().ok().as_deref())
}

/// What stands for a directory of plugins, filters or libraries.
const BUILT_IN: &str = "built-in";

fn lines(package: Package, binary: Option<&Path>) -> Vec<u8> {
    let yes = |fact: bool| Some(if fact { "yes" } else { "no" }.to_owned());
    let text = |text: &str| Some(text.to_owned());
    // nbdkit says what config.guess says, which is the system and the C library.
    let host_os = if cfg!(target_env = "gnu") { "linux-gnu" } else { std::env::consts::OS };
    let directory = binary.and_then(Path::parent);
    let manuals = directory.and_then(Path::parent).map(|prefix| prefix.join("share/man"));
    let in_its_name = |value: &str| package.extra().map(|_| value.to_owned());
    let (major, minor) = package.major_and_minor();
    let path = |path: Option<&Path>| path.map(Path::to_owned);
    let line = |key: &'static str, value: Option<String>| (key, value.map(PathBuf::from));
    let pairs = [
        ("binary", path(binary)),
        ("bindir", path(directory)),
        line("exit_with_parent", yes(cfg!(target_os = "linux"))),
        line("filterdir", text(BUILT_IN)),
        line("host_cpu", text(std::env::consts::ARCH)),
        line("host_os", text(host_os)),
        line("libdir", in_its_name(BUILT_IN)),
        ("mandir", manuals.filter(|_| package.extra().is_some())),
        // That of nbdkit's plugins, of which the built-in ones are.
        line("max_api_version", in_its_name("2")),
        line("name", text(package.name)),
        line("plugindir", text(BUILT_IN)),
        line("root_tls_certificates_dir", text(ROOT_CERTIFICATES)),
        line("run_default_socket", text("Unix")),
        ("sbindir", path(directory)),
        line("selinux", yes(cfg!(target_os = "linux"))),
        line("soext", in_its_name("so")),
        line("sysconfdir", text("/etc")),
        line("timeout_option", yes(true)),
        line("tls", yes(true)),
        line("version", text(package.version)),
        line("version_extra", package.extra()),
        line("version_major", text(major)),
        line("version_minor", text(minor)),
        line("vsock_option", yes(cfg!(target_os = "linux"))),
        line("zstd", yes(true)),
    ];
    let mut text = Vec::new();
    for (key, value) in pairs {
        if let Some(value) = value {
            text.extend([key.as_bytes(), b"=", OsStr::as_bytes(value.as_os_str()), b"\n"].concat());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity;

    fn pairs(package: Package) -> Vec<(String, String)> {
        let text = lines(package, Some(Path::new("/opt/bin/nbdcaptive")));
        let text = String::from_utf8(text).expect("it is ASCII");
        let pair = |line: &str| line.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        text.lines().map(|line| pair(line).expect("key=value")).collect()
    }

    #[test]
    fn keys_are_sorted_and_every_line_has_a_value() {
        for package in [identity::OURS, identity::NBDKIT] {
            let pairs = pairs(package);
            assert!(pairs.is_sorted_by_key(|(key, _)| key.clone()));
            assert!(pairs.iter().all(|(_, value)| !value.is_empty()));
            for (key, value) in [("binary", "/opt/bin/nbdcaptive"), ("bindir", "/opt/bin"), ("name", package.name)] {
                assert!(pairs.contains(&(key.to_owned(), value.to_owned())), "{key}={value}");
            }
        }
    }

    /// The keys of nbdkit 1.45 on Linux, with SELinux, TLS and zstd.
    #[test]
    fn in_nbdkits_name_every_key_of_nbdkits_is_there() {
        let keys: Vec<_> = pairs(identity::NBDKIT).into_iter().map(|(key, _)| key).collect();
        let nbdkits = "binary bindir exit_with_parent filterdir host_cpu host_os libdir mandir max_api_version name plugindir \
                       root_tls_certificates_dir run_default_socket sbindir selinux soext sysconfdir timeout_option tls \
                       version version_extra version_major version_minor vsock_option zstd";
        assert_eq!(keys.join(" "), nbdkits);
    }

    #[test]
    fn a_program_that_cannot_be_found_says_the_rest() {
        let text = lines(identity::OURS, None);
        assert!(text.starts_with(b"exit_with_parent=") && text.ends_with(b"zstd=yes\n"));
    }
}

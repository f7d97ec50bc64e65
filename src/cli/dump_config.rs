//! `--dump-config`: facts for scripts, one `key=value` per line.
//!
//! The keys and their order are nbdkit's. Left out are those that say where nbdkit's loadable modules and libraries
//! are (`libdir`, `mandir`, `max_api_version`, `soext`): nothing is loaded here, and a made-up value would mislead.
//! Source: nbdkit server/main.c `dump_config`, docs/nbdkit-probing.pod.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::TLS_BUILT_IN;

/// The answer to `--dump-config`. Looks up where this program is; without an answer, `binary` and the two directories
/// made from it are left out, as in nbdkit.
pub fn dump_config() -> Vec<u8> {
    lines(std::env::current_exe().ok().as_deref())
}

fn lines(binary: Option<&Path>) -> Vec<u8> {
    let yes = |fact: bool| if fact { "yes" } else { "no" };
    // nbdkit says what config.guess says, which is the system and the C library.
    let host_os = if cfg!(target_env = "gnu") { "linux-gnu" } else { std::env::consts::OS };
    let directory = binary.and_then(Path::parent);
    let mut text = Vec::new();
    let mut line = |key: &str, value: &[u8]| {
        text.extend_from_slice(key.as_bytes());
        text.push(b'=');
        text.extend_from_slice(value);
        text.push(b'\n');
    };
    if let Some(binary) = binary {
        line("binary", binary.as_os_str().as_bytes());
    }
    if let Some(directory) = directory {
        line("bindir", directory.as_os_str().as_bytes());
    }
    line("exit_with_parent", yes(cfg!(target_os = "linux")).as_bytes());
    line("filterdir", b"built-in");
    line("host_cpu", std::env::consts::ARCH.as_bytes());
    line("host_os", host_os.as_bytes());
    line("name", env!("CARGO_PKG_NAME").as_bytes());
    line("plugindir", b"built-in");
    line("root_tls_certificates_dir", b"/etc/pki/nbdkit");
    line("run_default_socket", b"Unix");
    if let Some(directory) = directory {
        line("sbindir", directory.as_os_str().as_bytes());
    }
    line("selinux", b"no");
    line("sysconfdir", b"/etc");
    line("timeout_option", b"yes");
    line("tls", yes(TLS_BUILT_IN).as_bytes());
    line("version", env!("CARGO_PKG_VERSION").as_bytes());
    line("version_major", env!("CARGO_PKG_VERSION_MAJOR").as_bytes());
    line("version_minor", env!("CARGO_PKG_VERSION_MINOR").as_bytes());
    line("vsock_option", b"no");
    line("zstd", b"no");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_sorted_and_every_line_has_a_value() {
        let text = String::from_utf8(lines(Some(Path::new("/opt/bin/nbdcaptive")))).expect("it is ASCII");
        let pairs: Vec<_> = text.lines().map(|line| line.split_once('=').expect("key=value")).collect();
        assert!(pairs.is_sorted_by_key(|(key, _)| *key));
        assert!(pairs.iter().all(|(_, value)| !value.is_empty()));
        assert!(pairs.contains(&("binary", "/opt/bin/nbdcaptive")) && pairs.contains(&("bindir", "/opt/bin")));
    }

    #[test]
    fn a_program_that_cannot_be_found_says_the_rest() {
        let text = lines(None);
        assert!(text.starts_with(b"exit_with_parent=") && text.ends_with(b"zstd=no\n"));
    }
}

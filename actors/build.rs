//! Links OpenSSL into the program where the system has its archives beside the shared libraries.
//!
//! Loading the shared ones takes every start some 2 ms, a third of what a start and an end take, and only a server with
//! `--tls-psk` ever uses them; rustls and its cryptography are linked in anyway. `OPENSSL_STATIC=0` asks for the shared
//! libraries, as it does of `openssl-sys`, which looks for them; without archives it is them as well.

use std::env;
use std::error::Error;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

const ARCHIVES: [&str; 2] = ["libssl.a", "libcrypto.a"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    for name in ["OPENSSL_STATIC", "OPENSSL_DIR", "OPENSSL_LIB_DIR", "PKG_CONFIG_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let vendored = env::var_os("CARGO_FEATURE_VENDORED_OPENSSL").is_some();
    // Who says where OpenSSL is has said to openssl-sys how to link it too.
    let told = ["OPENSSL_STATIC", "OPENSSL_DIR", "OPENSSL_LIB_DIR"].into_iter().any(|name| env::var_os(name).is_some());
    if vendored || told {
        return Ok(());
    }
    if let Some(libraries) = archives() {
        // The linker takes the first directory that has a library in any form, and the archive where there is nothing else.
        let alone = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join("openssl");
        fs::create_dir_all(&alone)?;
        for name in ARCHIVES {
            let link = alone.join(name);
            if link.symlink_metadata().is_ok() {
                fs::remove_file(&link)?;
            }
            symlink(libraries.join(name), link)?;
        }
        println!("cargo::rustc-link-search=native={}", alone.display());
    }
    Ok(())
}

/// Where both archives are, if the system's OpenSSL has them and needs nothing else to be linked with.
#[cfg(feature = "psk")]
fn archives() -> Option<PathBuf> {
    // Whoever links with the C library has these as well.
    const KNOWN: [&str; 5] = ["ssl", "crypto", "dl", "pthread", "c"];
    let library =
        pkg_config::Config::new().statik(true).cargo_metadata(false).print_system_libs(true).probe("openssl").ok()?;
    if library.libs.iter().any(|name| !KNOWN.contains(&name.as_str())) {
        return None;
    }
    let has_both = |directory: &&PathBuf| ARCHIVES.iter().all(|name| directory.join(name).is_file());
    library.link_paths.iter().find(has_both).cloned()
}

/// What would look for them is not there, either.
#[cfg(not(feature = "psk"))]
fn archives() -> Option<PathBuf> {
    None
}

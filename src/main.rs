//! The program: takes the process as the caller made it, and hands over to the library.
//!
//! It has a `main` of C's, because the one of Rust ignores SIGPIPE and opens closed descriptors before any code of ours
//! runs, and the command of `--run` must find both as the caller left them.

#![no_main]

use std::ffi::{CStr, OsString, c_char, c_int};
use std::os::unix::ffi::OsStringExt;

/// The program's start.
///
/// # Safety
/// Called once, by the C runtime, with `argc` strings in `argv`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    let count = usize::try_from(argc).unwrap_or(0);
    let words = (0..count)
        .map(|index| {
            // SAFETY: the C runtime guarantees `argc` strings, each ended by NUL, which live as long as the process.
            let word = unsafe { CStr::from_ptr(*argv.add(index)) };
            OsString::from_vec(word.to_bytes().to_vec())
        })
        .collect();
    nbdcaptive::leave::leave(nbdcaptive::program::run(words))
}

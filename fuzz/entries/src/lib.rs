//! What the fuzzers call, one function for each kind of bytes that strangers send. The same functions are called by cargo-fuzz
//! (`fuzz/fuzz_targets`) and on stable by `tests/replay.rs`, so that an input means the same to both.
//!
//! A function returns where all is well and panics where something is wrong.
//!
//! | file | what lives in it |
//! |---|---|
//! | `stage.rs` | the thread on which a whole server runs, and the wires to its clients |
//! | `disk.rs` | the server under test and its device of many moods |
//! | `conversation.rs` | a client's view: what was asked, and whether that is an answer |
//! | `model.rs` | what the disk holds, as far as clients can know |
//! | `play.rs` | a server and its clients on a stage, and the end of it |
//! | `streams.rs` | `handshake` and `transmission`: any bytes, in any pieces |
//! | `session.rs` | `session`: several clients that mostly know what they do |
//! | `client.rs` | `client`: any bytes of a server, in any pieces |
//! | `values.rs` | `size` and `uri`: text |

mod client;
mod conversation;
mod disk;
mod model;
mod play;
mod session;
mod stage;
mod streams;
mod values;

pub use client::client;
pub use session::session;
pub use streams::{handshake, transmission};
pub use values::{size, uri};

/// What a target is.
pub type Entry = fn(&[u8]);

/// Every function by its name, as in `fuzz/corpus`.
pub const ALL: &[(&str, Entry)] = &[
    ("handshake", handshake),
    ("transmission", transmission),
    ("session", session),
    ("uri", uri),
    ("size", size),
    ("client", client),
];

//! TLS as the command line has it: which files, and what for.
//!
//! | file | what lives in it |
//! |---|---|
//! | `server.rs` | what is served: `--tls` and its companions |
//! | `client.rs` | what is spoken to other servers: by `--probe` and the `nbd` plugin |
//! | `files.rs` | where files are looked for, and reading them |

mod client;
mod files;
mod server;

pub use client::{Failed, Ready, Wanted};
pub use server::{Offer, ROOT_CERTIFICATES, offer};

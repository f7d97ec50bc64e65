//! How a server ends, seen by a program that embeds it: public API only, real sockets, and devices that are slow, stuck,
//! failing or panicking. Each test runs with sessions on a plain executor and on the server's own workers.
//!
//! The letters and numbers in the comments are the rows of the lifetime catalogue in docs/; what is in quotes is from there.

#[path = "shutdown/closing.rs"]
mod closing;
#[path = "shutdown/draining.rs"]
mod draining;
#[path = "shutdown/last_client.rs"]
mod last_client;
#[path = "shutdown/panics.rs"]
mod panics;
#[path = "shutdown/rig.rs"]
mod rig;

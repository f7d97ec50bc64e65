//! The engine of nbdcaptive: an NBD server made of actors, to embed in a smol program.
//!
//! It has no argv, no standard output, no exit status, no signal handler and no global. What serves the data is a
//! [`device::Device`], opened for each client by [`device::Exports`]; a [`Server`] is told where to listen and is started on an
//! executor; [`Running`] tells how it ended.
//!
//! # The map
//!
//! | file | what lives in it |
//! |---|---|
//! | `server.rs` | puts the actors together; what an embedder configures |
//! | `coordinator.rs` | the one place where the end is decided: a pure state machine and a thin actor round it |
//! | `repeats.rs` | signals that are sent once more, told from one that reaches several processes |
//! | `listener.rs` | accepts clients, hands each socket to a Session, closes at the Coordinator's word |
//! | `session/` | one client: `handshake.rs`, then `transmission.rs` |
//! | `backend.rs` | owns the device of one connection; carries out batches of requests |
//! | `child_supervisor.rs` | the command that the server is captive of, as the server sees it |
//! | `parent_watcher.rs` | the process that the server is to live as long as |
//! | `exit_policy.rs` | `exitlast` and `exitwhen`: sessions and events in, causes out |
//! | `device.rs` | the trait of every plugin and filter, with its contract |
//! | `filter.rs` | what a filter is made of: it says what it changes, and passes on the rest |
//! | `extents.rs`, `segments.rs` | what a device answers with: a map of holes, the data of a read |
//! | `protocol/` | bytes to types and back, without I/O |
//! | `client/` | the other end: a connection to an NBD server, as an actor |
//! | `transport.rs` | a client's byte stream, and where its readiness comes from |
//! | `tls/` | streams that are secure |
//! | `send_buffer.rs` | how much a Unix socket holds, by how large replies are |
//! | `socket_options.rs` | the socket options that no library has |
//! | `worker.rs` | threads with an epoll of their own, for speed |
//! | `buffers.rs` | memory that goes round with requests and replies |
//! | `connection.rs` | what a device may know of the connection it serves, and wait for |
//! | `blocks.rs`, `blocks/slabs.rs` | memory that a large write is received into and that a device may keep; where it comes from |
//! | `pool.rs` | threads for calls that may wait |
//! | `world.rs` | time and threads: the system's, or a simulation's |
//! | `simulation.rs` | time that stands still, for tests (feature `simulation`) |
//! | `log.rs` | lines for people |
//!
//! # Who tells what to whom
//!
//! ```text
//!                  causes (unbounded, never wait)                      orders
//!  ChildSupervisor ─┐                                   ┌─> Listener         stop accepting
//!  ParentWatcher   ─┤                                   ├─> Session *        drain, or close
//!  ExitPolicy      ─┼──────────> Coordinator ───────────┼─> ChildSupervisor  signal or kill the command
//!  Listener        ─┤   (facts: opened, negotiated,     ├─> ExitPolicy       (the facts, passed on)
//!  Session *       ─┘    closed, failed)                └─> Running          the outcome
//!
//!  Listener ──socket──> Session ──batch of requests──> Backend ──batch of replies──> Session
//! ```
//!
//! A byte goes `transport` → `session/transmission` → `protocol/transmission` (parsed and checked) → `backend` → device, and
//! its reply the same way back. A reason to end goes from any actor to `coordinator`, and orders go out from there alone.

pub mod blocks;
pub mod child_supervisor;
pub mod client;
pub mod connection;
pub mod coordinator;
pub mod device;
pub mod extents;
pub mod filter;
pub mod log;
pub mod protocol;
pub mod repeats;
pub mod segments;
#[cfg(feature = "simulation")]
pub mod simulation;
pub mod tls;
pub mod transport;

mod backend;
mod buffers;
mod exit_policy;
mod listener;
mod parent_watcher;
mod pool;
mod send_buffer;
mod server;
mod session;
mod socket_options;
mod worker;
mod world;

pub use coordinator::{Cause, CommandEnd, Handle, Outcome};
pub use exit_policy::Event;
pub use parent_watcher::watch_process;
pub use pool::Pool;
pub use server::{Running, Server};
pub use session::SessionId;

//! `--run`: the server lives exactly as long as a command.
//!
//! ```text
//! caller ── front      waits, passes signals on       caller's session and group   nbdcaptive
//!            └─ guardian  holds the command's tree     a session of its own         nbdguard
//!                ├─ command  /bin/sh -c CMD            CALLER's session and group
//!                └─ server   the engine, with threads  a session of its own         nbdserve
//! ```
//!
//! Each of the three watches the others, and any one or two of them may be killed: whoever is left ends what is left. All
//! forks happen before any process has a thread. What each tells another is in [`link`]. Reasons to end reach the server's
//! Coordinator as messages; the guardian acts by itself only where the server is gone or does not answer.
//!
//! | file | what lives in it |
//! |---|---|
//! | `front.rs` | the process that the caller started |
//! | `guardian.rs` | the process between: starts command and server, ends the command's tree |
//! | `command.rs` | the command's process until its shell is executed |
//! | `link.rs` | messages between the processes |
//! | `tree.rs` | finding and signalling all that descends from a process |
//! | `fork.rs` | fork, where it is sound |
//! | `environment.rs`, `uri.rs`, `quote.rs` | what the command sees |

pub mod command;
pub mod environment;
pub mod fork;
pub mod front;
pub mod guardian;
pub mod link;
pub mod quote;
pub mod tree;
pub mod uri;

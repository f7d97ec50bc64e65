//! nbdcaptive: an NBD server with nbdkit's command line and lifetimes that can be relied on.
//!
//! This is the front end as a library; the engine, for programs that embed a server, is [`nbdcaptive_actors`].
//!
//! # The map
//!
//! | file | what lives in it |
//! |---|---|
//! | `main.rs`, `program.rs` | parse, answer or start, exit status |
//! | `cli/` | the command line: one table of options |
//! | `values.rs` | sizes, delays, booleans, numbers as nbdkit writes them |
//! | `config.rs` | words become a stack of plugin and filters; files are opened here, nothing is created |
//! | `layer.rs` | what a plugin and a filter are to the command line |
//! | `text.rs` | how help and manual pages get their texts from what they describe |
//! | `plugins/`, `filters/` | one file each |
//! | `server.rs` | the process that serves: listens, tells it is ready, waits for the engine, cleans up |
//! | `leave.rs` | the end of a process |
//! | `listen.rs` | sockets, private directories, pid files: what is made on disk and taken away again |
//! | `captive/` | `--run`: the front process, the guardian, the command, `$uri` and the shell's variables |
//! | `debug.rs`, `trace.rs` | debug flags (`-D`), and the lines of `-v` about every call of every layer |
//! | `daemon.rs` | going into the background |
//! | `identity.rs` | the name and version it goes by, `nbdkit`'s where it is called so |
//! | `inherited.rs` | what the caller gave this process, and how the command gets it back |
//! | `kept.rs` | processes that plugins start, kept so that none outlives the server |
//! | `user.rs` | becoming another user and group |
//! | `sweeper.rs` | a process that removes the socket of a server that was killed |
//! | `tls/` | TLS as the command line has it: finding and reading certificates and keys |
//! | `uri.rs` | NBD URIs as a client reads them, and the way to the server that they name |
//! | `unblock.rs` | calls that may wait, outside a server |
//! | `probe.rs` | `--probe`: what an NBD server offers |
//! | `overlay.rs`, `block_map.rs` | where filters keep data that is not the plugin's: temporary files, and which blocks are in them |
//! | `page_cache.rs` | whether a file's data can be had without waiting |
//! | `report.rs`, `report/` | lines to stderr, to a file, to the system log |
//! | `xoshiro.rs` | nbdkit's random numbers |

pub mod block_map;
pub mod captive;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod debug;
pub mod filters;
pub mod identity;
pub mod inherited;
pub mod kept;
pub mod layer;
pub mod leave;
pub mod listen;
pub mod overlay;
pub mod page_cache;
pub mod plugins;
pub mod probe;
pub mod program;
pub mod report;
pub mod server;
pub mod sweeper;
pub mod text;
pub mod tls;
pub mod trace;
pub mod unblock;
pub mod uri;
pub mod user;
pub mod values;
pub mod xoshiro;

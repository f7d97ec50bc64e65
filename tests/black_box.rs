//! The binary from outside: real command lines, real clients and raw bytes. Start with `harness.rs`.
//!
//! `NBDCAPTIVE_TEST_SERVER=/usr/bin/nbdkit cargo test --test black_box` asks the same of nbdkit; what it is known to answer
//! otherwise is named where it is asked, by `harness::nbdkit_differs`.

#[path = "black_box/both.rs"]
mod both;
#[path = "black_box/captive.rs"]
mod captive;
#[path = "black_box/cli.rs"]
mod cli;
#[path = "black_box/command.rs"]
mod command;
#[path = "black_box/command_lines.rs"]
mod command_lines;
#[path = "black_box/completion.rs"]
mod completion;
#[path = "black_box/data.rs"]
mod data;
#[path = "black_box/drain.rs"]
mod drain;
#[path = "black_box/environment.rs"]
mod environment;
#[path = "black_box/exit_when.rs"]
mod exit_when;
#[path = "black_box/extended.rs"]
mod extended;
#[path = "black_box/harness.rs"]
mod harness;
#[path = "black_box/layers.rs"]
mod layers;
#[path = "black_box/lifetime.rs"]
mod lifetime;
#[path = "black_box/limits.rs"]
mod limits;
#[path = "black_box/manual.rs"]
mod manual;
#[path = "black_box/modes.rs"]
mod modes;
#[path = "black_box/oldstyle.rs"]
mod oldstyle;
#[path = "black_box/pages.rs"]
mod pages;
#[path = "black_box/peers.rs"]
mod peers;
#[path = "black_box/pressure.rs"]
mod pressure;
#[path = "black_box/probe.rs"]
mod probe;
#[path = "black_box/protocol.rs"]
mod protocol;
#[path = "black_box/proxy.rs"]
mod proxy;
#[path = "black_box/raw_client.rs"]
mod raw_client;
#[path = "black_box/real_data.rs"]
mod real_data;
#[path = "black_box/scripts.rs"]
mod scripts;
#[path = "black_box/service.rs"]
mod service;
#[path = "black_box/soak.rs"]
mod soak;
#[path = "black_box/sparse_reads.rs"]
mod sparse_reads;
#[path = "black_box/surroundings.rs"]
mod surroundings;
#[path = "black_box/terminal.rs"]
mod terminal;
#[path = "black_box/tls.rs"]
mod tls;
#[path = "black_box/user.rs"]
mod user;

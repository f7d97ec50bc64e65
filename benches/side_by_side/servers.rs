//! Who is measured.

use std::ffi::{OsStr, OsString};
use std::process::Command;

use crate::process::Address;
use crate::rows::{Disk, Link, Row, SIZE, Work};
use crate::workspace::Workspace;

/// Where processes may run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pin {
    None,
    One,
    Two,
}

impl Pin {
    pub fn name(self) -> &'static str {
        match self {
            Pin::None => "none",
            Pin::One => "one",
            Pin::Two => "two",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Pin::None => "not pinned",
            Pin::One => "server and client on cpu 0",
            Pin::Two => "server on cpu 0, client on cpu 1",
        }
    }

    /// `program`, confined to where the server (or else the client) belongs. taskset turns into it and keeps its pid.
    pub fn command(self, program: &OsStr, is_server: bool) -> Command {
        let cpu = match self {
            Pin::None => return Command::new(program),
            Pin::Two if !is_server => "1",
            Pin::One | Pin::Two => "0",
        };
        let mut command = Command::new("taskset");
        command.arg("-c").arg(cpu).arg(program);
        command
    }
}

/// Which rows a server has that is there for comparison.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rows {
    /// Of memory, with one connection over a Unix socket.
    Memory,
    /// All of fio's.
    OfFio,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Has nbdkit's command line.
    Nbdkit,
    /// The same, told to send simple replies only: a client makes two system calls for each, and four for a structured
    /// one.
    NoStructuredReplies(Rows),
    QemuNbd,
    /// Takes a socket or a port, and a size or a file.
    Against(Rows),
    /// This program itself, which takes a word, a socket and a size.
    Embedded,
}

pub struct Server {
    pub name: String,
    pub kind: Kind,
    pub program: OsString,
}

impl Server {
    pub fn serves(&self, row: &Row) -> bool {
        let connections = match row.work {
            Work::Fio(job) if row.disk == Disk::Memory && row.link == Link::Unix => Some(job.connections),
            _ => None,
        };
        match self.kind {
            Kind::Nbdkit => true,
            Kind::QemuNbd => matches!(row.disk, Disk::File | Disk::Sparse | Disk::Full),
            Kind::NoStructuredReplies(Rows::Memory) | Kind::Against(Rows::Memory) => connections == Some(1),
            Kind::NoStructuredReplies(Rows::OfFio) | Kind::Against(Rows::OfFio) => matches!(row.work, Work::Fio(_)),
            Kind::Embedded => connections.is_some(),
        }
    }

    pub fn command(&self, pin: Pin, address: &Address, disk: Disk, workspace: &Workspace) -> Command {
        let mut command = pin.command(&self.program, true);
        match self.kind {
            Kind::Nbdkit | Kind::NoStructuredReplies(_) => {
                command.arg("-f");
                match address {
                    Address::Unix(socket) => command.arg("-U").arg(socket),
                    Address::Tcp(port) => command.args(["-i", "127.0.0.1", "-p", &port.to_string()]),
                };
                if matches!(self.kind, Kind::NoStructuredReplies(_)) {
                    command.arg("--no-sr");
                }
                match disk {
                    Disk::Memory => command.arg("memory").arg(SIZE.to_string()),
                    Disk::Null => command.args(["null", "1M"]),
                    Disk::File | Disk::Sparse | Disk::Full => command.arg("file").arg(workspace.disk(disk)),
                };
            }
            Kind::QemuNbd => {
                command.args(["-t", "-f", "raw", "-e", "8", "--cache=writeback", "-k"]);
                command.arg(workspace.socket()).arg(workspace.disk(disk));
            }
            Kind::Against(_) => {
                match address {
                    Address::Unix(socket) => command.arg(socket),
                    Address::Tcp(port) => command.arg(port.to_string()),
                };
                match disk {
                    Disk::File => command.arg(workspace.disk(disk)),
                    _ => command.arg(SIZE.to_string()),
                };
            }
            Kind::Embedded => {
                command.arg(crate::embedded::WORD).arg(workspace.socket()).arg(SIZE.to_string());
            }
        }
        command
    }
}

/// Which servers' numbers are divided, by their places: the first of all by each other, that is nbdcaptive wherever it
/// is measured; what is embedded by that; and simple replies by whoever knows no others.
pub fn ratios(servers: &[Server]) -> Vec<(usize, usize)> {
    let which = |is: fn(Kind) -> bool| (0..servers.len()).filter(move |&at| is(servers[at].kind));
    let mut pairs: Vec<_> = (1..servers.len())
        .map(|other| if servers[other].kind == Kind::Embedded { (other, 0) } else { (0, other) })
        .collect();
    for simple in which(|kind| matches!(kind, Kind::NoStructuredReplies(_))).filter(|&simple| simple > 0) {
        pairs.extend(which(|kind| matches!(kind, Kind::Against(_))).map(|against| (simple, against)));
    }
    pairs
}

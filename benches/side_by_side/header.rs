//! What the numbers were measured with.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use crate::Result;
use crate::options::Options;
use crate::rows::Work;
use crate::servers::{Kind, Pin, Server};
use crate::system::after;

pub struct Header {
    /// (name, value) in the order of printing.
    pub lines: Vec<(String, String)>,
}

impl Header {
    /// Errors: a program that is needed does not run; says which package has it.
    pub fn gather(options: &Options, servers: &[Server]) -> Result<Header> {
        let mut lines = programs(options, servers)?;
        let cores = thread::available_parallelism().map_or(0, usize::from);
        let cpu = after("/proc/cpuinfo", "model name").unwrap_or_default();
        let memory = after("/proc/meminfo", "MemTotal")
            .and_then(|text| text.trim_end_matches("kB").trim().parse::<u64>().ok())
            .map_or_else(|| "?".to_string(), |kib| format!("{:.1} GiB", kib as f64 / f64::from(1 << 20)));
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let filesystem =
            first_line(Command::new("stat").args(["-f", "-c", "%T"]).arg(&options.dir)).unwrap_or_default();
        if filesystem == "tmpfs" {
            let dir = options.dir.display();
            let _ = writeln!(io::stderr(), "warning: {dir} is a tmpfs; file rows mean more with --dir on a disk");
        }
        let date = first_line(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"])).unwrap_or_default();
        for (name, value) in [
            ("cores", format!("{cores} ({cpu})")),
            ("memory", memory),
            ("kernel", kernel.trim().to_string()),
            ("filesystem", filesystem),
            // Above 0 at the start means that somebody else uses the machine.
            ("load", load.split_whitespace().next().unwrap_or_default().to_string()),
            ("date", date),
            ("runs", format!("{} of {} s", options.runs, options.millis as f64 / 1000.0)),
        ] {
            lines.push((name.to_string(), value));
        }
        Ok(Header { lines })
    }

    pub fn text(&self) -> String {
        let width = self.lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let mut text = String::new();
        for (name, value) in &self.lines {
            let _ = writeln!(text, "{name:width$}  {value}");
        }
        text
    }
}

/// The versions of the clients that the rows need, and of the servers.
fn programs(options: &Options, servers: &[Server]) -> Result<Vec<(String, String)>> {
    let mut lines = Vec::new();
    let rows = options.rows();
    if rows.iter().any(|row| matches!(row.work, Work::Fio(_))) {
        lines.push(("fio".to_string(), version(OsStr::new("fio"), "install the package fio")?));
        let engine = Command::new("fio").arg("--enghelp=nbd").output();
        if !engine.is_ok_and(|output| output.status.success()) {
            return Err("this fio has no nbd engine; on Debian, apt-get install fio brings one that has".into());
        }
    }
    if rows.iter().any(|row| row.work == Work::Copy) {
        lines.push(("nbdcopy".to_string(), version(OsStr::new("nbdcopy"), "install the package libnbd-bin")?));
    }
    for server in servers {
        let program = Path::new(&server.program);
        let line = match server.kind {
            Kind::Against(_) => program
                .exists()
                .then(|| program.to_string_lossy().into_owned())
                .ok_or(format!("--against: {}: no such file", program.display()))?,
            Kind::Embedded => "this program".to_string(),
            Kind::QemuNbd => version(&server.program, "install the package qemu-utils")?,
            Kind::Nbdkit if server.name == "nbdkit" => version(&server.program, "install the package nbdkit")?,
            Kind::Nbdkit | Kind::NoStructuredReplies(_) => version(&server.program, "cargo build --release makes it")?,
        };
        lines.push((server.name.clone(), line));
    }
    if options.pins != [Pin::None] {
        version(OsStr::new("taskset"), "install the package util-linux")?;
    }
    Ok(lines)
}

/// The first line of `program --version`. Errors: it does not run; `advice` says what to do.
fn version(program: &OsStr, advice: &str) -> Result<String> {
    first_line(Command::new(program).arg("--version")).map_err(|error| {
        let program = program.to_string_lossy();
        format!("{program} does not run ({error}); {advice}")
    })
}

fn first_line(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(output.status.to_string());
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().trim().to_string())
}

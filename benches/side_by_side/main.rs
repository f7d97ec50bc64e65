//! Measures nbdcaptive, nbdkit and qemu-nbd side by side: fio's nbd engine over a Unix socket and over TCP, nbdcopy,
//! starting and stopping, and what connections cost. What the rows and columns mean is in `docs/benchmarks.md`; the
//! options are in `options.rs`.
//!
//! Every measurement has a server of its own, started for it and stopped after it, so that no idle neighbour is in the
//! way; the servers take turns row by row, so that a machine that slows down slows all of them.
//!
//! | file | what lives in it |
//! |---|---|
//! | `options.rs` | the command line, and which rows and servers it asks for |
//! | `rows.rs` | what is measured: the rows, their names and units |
//! | `servers.rs` | who is measured: how each is started for a row, where it is pinned, which ratios are shown |
//! | `header.rs` | what the numbers were measured with |
//! | `workspace.rs` | the directory with the disks and sockets, and who cleans it up |
//! | `process.rs` | a server that runs, a client that may take so long and no longer |
//! | `system.rs` | CPU time and memory from /proc, limits |
//! | `measure.rs` | one measurement of fio, nbdcopy, or starts and stops |
//! | `connections.rs` | one measurement of connections that do nothing, or do not read |
//! | `embedded.rs` | a server that is this program itself |
//! | `report.rs` | tables and JSON |

mod connections;
mod embedded;
mod header;
mod measure;
mod options;
mod process;
mod report;
mod rows;
mod servers;
mod system;
mod workspace;

use std::io::{self, Write};
use std::process::ExitCode;

use header::Header;
use options::Options;
use report::{Report, Results};
use servers::Pin;
use workspace::Workspace;

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.split_first() {
        Some((first, rest)) if first == embedded::WORD => embedded::serve(rest),
        _ => run(words),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "side_by_side: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: Vec<String>) -> Result<()> {
    let Some(options) = Options::parse(words.into_iter())? else {
        return Ok(());
    };
    if cfg!(debug_assertions) && options.nbdcaptive.is_none() {
        // `cargo test --all-targets` comes here: the server beside this program is a debug build.
        return say("side_by_side: not a release build, nothing measured; use: cargo bench --bench side_by_side\n");
    }
    let servers = options.servers()?;
    let rows = options.rows();
    let header = Header::gather(&options, &servers)?;
    say(&header.text())?;

    // Each row once for every pinning that it knows.
    let mut plan: Vec<(Pin, usize)> = Vec::new();
    for &pin in &options.pins {
        plan.extend(rows.iter().enumerate().filter(|(_, row)| row.is_pinned()).map(|(number, _)| (pin, number)));
    }
    plan.extend(rows.iter().enumerate().filter(|(_, row)| !row.is_pinned()).map(|(number, _)| (Pin::None, number)));

    let workspace = Workspace::create(&options.dir, &rows)?;
    let mut results = Results::default();
    let served = |number: usize| servers.iter().filter(|server| server.serves(&rows[number])).count();
    let total = options.runs * plan.iter().map(|&(_, number)| served(number)).sum::<usize>();
    let mut done = 0;
    for turn in 0..options.runs {
        for &(pin, number) in &plan {
            let row = &rows[number];
            // Another server goes first in each run: whoever follows a write finds a busier disk.
            for place in 0..servers.len() {
                let server_number = (turn + place) % servers.len();
                let server = &servers[server_number];
                if !server.serves(row) {
                    continue;
                }
                let (name, unit) = (row.name(), row.unit());
                let sample = measure::measure(&workspace, server, row, pin, &options)
                    .map_err(|error| format!("{}: {name}: {error}", server.name))?;
                done += 1;
                let value = unit.show(sample.value);
                // Progress only: a closed stderr is no reason to stop.
                let _ = writeln!(io::stderr(), "[{done}/{total}] {}: {name}: {value} {}", server.name, unit.value);
                results.add(pin, number, server_number, sample);
            }
        }
    }
    drop(workspace);

    let report = Report { servers: &servers, rows: &rows, results: &results };
    say(&report.text())?;
    if let Some(path) = &options.json {
        std::fs::write(path, report.json(&header)).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// `print!` that does not panic when nobody reads.
fn say(text: &str) -> Result<()> {
    io::stdout().write_all(text.as_bytes()).map_err(|error| format!("stdout: {error}"))
}

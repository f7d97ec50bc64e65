//! One measurement of fio, nbdcopy, or starts and stops.

use std::ffi::OsStr;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::Result;
use crate::connections;
use crate::options::Options;
use crate::process::{DEADLINE, Running, run_within, with_log};
use crate::rows::{Disk, IMAGE_SIZE, Job, Row, Work};
use crate::servers::{Pin, Server};
use crate::system::{FileLimit, Meter, children_seconds, cpu_seconds, peak_kib};
use crate::workspace::{Workspace, settle};

/// How long a client may take beyond the time that it is given. Generous: only a broken server needs it.
const CLIENT_LIMIT: Duration = Duration::from_secs(60);
/// Descriptors that the connections of a row need beside their own.
const SPARE_FILES: u64 = 200;

pub struct Sample {
    /// In the unit of the row.
    pub value: f64,
    /// The server's CPU time, in the unit of the row.
    pub cpu: Option<f64>,
    /// The most memory that the server had at once, in KiB; 0 where there is no such server.
    pub peak_kib: u64,
    /// How many cpus others than the server, the client and this program kept busy meanwhile: 0.5 is half of one.
    pub others: f64,
    /// What else is to be said.
    pub note: Option<String>,
}

pub fn measure(workspace: &Workspace, server: &Server, row: &Row, pin: Pin, options: &Options) -> Result<Sample> {
    if row.work == Work::Start {
        return start_and_stop(workspace, server, options.millis);
    }
    if matches!(row.disk, Disk::File | Disk::Sparse | Disk::Full) {
        settle(&workspace.disk(row.disk))?;
    }
    // Before the server starts, which is to have it as well.
    let _limit = match row.work {
        Work::Idle => Some(FileLimit::raise(options.idle as u64 + SPARE_FILES)?),
        _ => None,
    };
    let mut running = Running::start(workspace, server, row.disk, row.link, pin)?;
    let measured = match row.work {
        Work::Fio(job) => random_or_sequential(workspace, &running, row.disk, job, pin, options.millis),
        Work::Copy => copy(workspace, &running, pin, options.millis),
        Work::Idle => connections::idle(&mut running, &workspace.socket(), options.idle),
        Work::Unread => connections::unread(&running, &workspace.socket()),
        Work::Start => Err("has no server that runs".to_string()),
    };
    let log = running.stop(workspace)?;
    measured.map_err(|error| with_log(error, &log))
}

/// What a client got done.
struct Done {
    bytes: f64,
    seconds: f64,
}

fn random_or_sequential(
    workspace: &Workspace,
    running: &Running,
    disk: Disk,
    job: Job,
    pin: Pin,
    millis: u64,
) -> Result<Sample> {
    if disk == Disk::Memory {
        // Every page is there before it is timed.
        fio(workspace, running, pin, &["--rw=write", "--bs=1m", "--iodepth=4"], CLIENT_LIMIT)?;
    }
    let mut words = vec![
        format!("--rw={}", job.rw),
        format!("--bs={}", job.block),
        format!("--iodepth={}", job.depth),
        format!("--runtime={millis}ms"),
        "--time_based".to_string(),
    ];
    if job.rw == "randrw" {
        words.push("--rwmixread=70".to_string());
    }
    if job.connections > 1 {
        words.extend([format!("--numjobs={}", job.connections), "--thread".into(), "--group_reporting".into()]);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let limit = CLIENT_LIMIT + Duration::from_millis(millis);
    let (done, cpu, others) = metered(running, || fio(workspace, running, pin, &words, limit))?;
    let requests = done.bytes / job.block as f64;
    let (value, cpu) = if job.is_small() {
        (requests / done.seconds, cpu / (requests / 1e6))
    } else {
        (done.bytes / 1e6 / done.seconds, cpu / (done.bytes / 1e9))
    };
    Ok(Sample { value, cpu: Some(cpu), peak_kib: peak_kib(running.pid()), others, note: None })
}

/// As many whole copies as it takes, and each of them with the start of nbdcopy.
fn copy(workspace: &Workspace, running: &Running, pin: Pin, millis: u64) -> Result<Sample> {
    let uri = running.address.uri();
    let copies = || {
        let start = Instant::now();
        let mut done = Done { bytes: 0.0, seconds: 0.0 };
        while done.seconds * 1000.0 < millis as f64 {
            let mut command = pin.command(OsStr::new("nbdcopy"), false);
            let said = run_within(command.arg(&uri).arg("null:"), workspace, CLIENT_LIMIT)?;
            if !said.status.success() {
                return Err(said.error("nbdcopy"));
            }
            done = Done { bytes: done.bytes + IMAGE_SIZE as f64, seconds: start.elapsed().as_secs_f64() };
        }
        Ok(done)
    };
    let (done, cpu, others) = metered(running, copies)?;
    Ok(Sample {
        value: done.bytes / 1e6 / done.seconds,
        cpu: Some(cpu / (done.bytes / 1e9)),
        peak_kib: peak_kib(running.pid()),
        others,
        note: None,
    })
}

/// With the server's CPU time in seconds, and how many cpus others kept busy.
fn metered<T>(running: &Running, work: impl FnOnce() -> Result<T>) -> Result<(T, f64, f64)> {
    let before = cpu_seconds(running.pid());
    let meter = Meter::start();
    let done = work()?;
    let cpu = cpu_seconds(running.pid()) - before;
    Ok((done, cpu, meter.others(cpu)))
}

/// As many as fit into the time; their mean.
fn start_and_stop(workspace: &Workspace, server: &Server, millis: u64) -> Result<Sample> {
    let (before, meter, start) = (children_seconds(), Meter::start(), Instant::now());
    let mut starts = 0;
    while starts == 0 || start.elapsed().as_millis() < u128::from(millis) {
        let mut command = Command::new(&server.program);
        let said = run_within(command.args(["-U", "-", "null", "1M", "--run", "true"]), workspace, DEADLINE)?;
        if !said.status.success() {
            return Err(said.error("it"));
        }
        starts += 1;
    }
    let each = |seconds: f64| seconds * 1000.0 / f64::from(starts);
    let (value, cpu) = (each(start.elapsed().as_secs_f64()), each(children_seconds() - before));
    // All of them are children that were waited for.
    Ok(Sample { value, cpu: Some(cpu), peak_kib: 0, others: meter.others(0.0), note: None })
}

/// Runs fio with one group of jobs. Errors: fio's own words.
fn fio(workspace: &Workspace, running: &Running, pin: Pin, job: &[&str], limit: Duration) -> Result<Done> {
    let mut command = pin.command(OsStr::new("fio"), false);
    command
        .args(["--name=row", "--ioengine=nbd", "--output-format=terse", "--terse-version=3"])
        // A client that is cheap: without a map of the blocks it has seen, and with few looks at the clock.
        .args(["--norandommap=1", "--gtod_reduce=1"])
        .arg(format!("--uri={}", running.address.uri()))
        .args(job);
    let said = run_within(&mut command, workspace, limit)?;
    let error = || said.error("fio");
    // Other lines, such as "connected to NBD server", have no semicolons. Source: fio HOWTO, "Terse output".
    let line = said.stdout.lines().find(|line| line.starts_with("3;")).ok_or_else(error)?;
    let fields: Vec<&str> = line.split(';').collect();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).ok_or_else(error);
    // Error; KiB and milliseconds read; KiB and milliseconds written.
    let (failed, read, read_time, written, write_time) = (number(4)?, number(5)?, number(8)?, number(46)?, number(49)?);
    // Whoever reads and writes does so at the same time.
    let done = Done { bytes: (read + written) * 1024.0, seconds: read_time.max(write_time) / 1000.0 };
    if !said.status.success() || failed != 0.0 || done.bytes <= 0.0 || done.seconds <= 0.0 {
        return Err(error());
    }
    Ok(done)
}

//! CPU time and memory from /proc, limits.

use std::fs;
use std::time::Instant;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::Result;

/// Linux's USER_HZ, the unit of the times in /proc/PID/stat. It is 100 wherever Debian's servers run.
const TICKS_PER_SECOND: f64 = 100.0;

/// What follows `key` and a colon in a file of /proc.
pub fn after(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let (_, value) = text.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == key)?;
    Some(value.trim().to_string())
}

/// The process and all that descend from it: a server may have put its work into a child.
fn tree(root: u32) -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        let parent = pid.and_then(stat_fields).and_then(|fields| fields.get(1)?.parse::<u32>().ok());
        if let (Some(pid), Some(parent)) = (pid, parent) {
            parents.push((pid, parent));
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&one) = found.get(next) {
        found.extend(parents.iter().filter(|&&(pid, parent)| parent == one && pid != one).map(|&(pid, _)| pid));
        next += 1;
    }
    found
}

/// What follows the name in /proc/PID/stat, from the state on. The name may itself have spaces and parentheses.
fn stat_fields(pid: u32) -> Option<Vec<String>> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    Some(text.rsplit_once(')')?.1.split_whitespace().map(str::to_string).collect())
}

/// The sum of `count` fields.
fn ticks(fields: &[String], first: usize, count: usize) -> f64 {
    fields.iter().skip(first).take(count).filter_map(|field| field.parse::<f64>().ok()).sum()
}

/// User and system time of the server until now, in seconds.
pub fn cpu_seconds(root: u32) -> f64 {
    // utime and stime are fields 14 and 15 of the file, and the state is the third. Source: proc_pid_stat(5).
    tree(root).into_iter().filter_map(stat_fields).map(|fields| ticks(&fields, 11, 2)).sum::<f64>() / TICKS_PER_SECOND
}

/// The same of the children of this program that it has waited for, and of those that they have.
pub fn children_seconds() -> f64 {
    // cutime and cstime follow utime and stime.
    stat_fields(std::process::id()).map_or(0.0, |fields| ticks(&fields, 13, 2)) / TICKS_PER_SECOND
}

/// The same of this program and of the children that it has waited for: the clients.
fn own_seconds() -> f64 {
    stat_fields(std::process::id()).map_or(0.0, |fields| ticks(&fields, 11, 4)) / TICKS_PER_SECOND
}

/// The time that all cpus together were at work since the machine started, in seconds.
fn busy_seconds() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<String> = text.lines().next().unwrap_or_default().split_whitespace().map(str::to_string).collect();
    // "cpu", user, nice, system, idle, iowait, irq, softirq, steal. Source: proc_stat(5).
    (ticks(&fields, 1, 3) + ticks(&fields, 6, 3)) / TICKS_PER_SECOND
}

/// Sees who else uses the cpus meanwhile.
pub struct Meter {
    busy: f64,
    own: f64,
    start: Instant,
}

impl Meter {
    pub fn start() -> Meter {
        Meter { busy: busy_seconds(), own: own_seconds(), start: Instant::now() }
    }

    /// How many cpus others kept busy since then; `server` is what the server, no child that was waited for, has used.
    pub fn others(&self, server: f64) -> f64 {
        let took = self.start.elapsed().as_secs_f64();
        // Each of the three is rounded to ticks, so the difference may come out a little below nothing.
        ((busy_seconds() - self.busy - (own_seconds() - self.own) - server) / took).max(0.0)
    }
}

/// The most memory that the server had at once, in KiB.
pub fn peak_kib(root: u32) -> u64 {
    memory(root, "VmHWM")
}

/// The memory that the server has, in KiB.
pub fn resident_kib(root: u32) -> u64 {
    memory(root, "VmRSS")
}

fn memory(root: u32, key: &str) -> u64 {
    let one = |pid| after(&format!("/proc/{pid}/status"), key)?.trim_end_matches("kB").trim().parse::<u64>().ok();
    tree(root).into_iter().filter_map(one).sum()
}

/// How many more threads the system has room for. Those of all processes count, so whoever takes the last ones keeps
/// everybody else from starting anything.
pub fn threads_left() -> Option<u64> {
    let limit = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let most = limit("/proc/sys/kernel/pid_max")?.min(limit("/proc/sys/kernel/threads-max")?);
    // "0.00 0.00 0.00 1/80 1234": the fourth has all threads behind the slash. Source: proc_loadavg(5).
    let load = fs::read_to_string("/proc/loadavg").ok()?;
    let there = load.split_whitespace().nth(3)?.split_once('/')?.1.parse::<u64>().ok()?;
    Some(most.saturating_sub(there))
}

/// A limit of open files that is raised, for this program and what it starts, until it is dropped.
pub struct FileLimit {
    before: Rlimit,
}

impl FileLimit {
    /// Errors: this user may not have so many.
    pub fn raise(count: u64) -> Result<FileLimit> {
        let before = getrlimit(Resource::Nofile);
        let atleast = |limit: Option<u64>| limit.map(|limit| limit.max(count));
        let wanted = Rlimit { current: atleast(before.current), maximum: atleast(before.maximum) };
        setrlimit(Resource::Nofile, wanted).map_err(|error| format!("{count} open files are not allowed: {error}"))?;
        Ok(FileLimit { before })
    }
}

impl Drop for FileLimit {
    fn drop(&mut self) {
        let _ = setrlimit(Resource::Nofile, self.before);
    }
}

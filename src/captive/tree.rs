//! All that descends from a process, and how to signal it without hitting a stranger.
//!
//! A process is found by its number and its parent's, and numbers are used again. So each is held by a pidfd first, then
//! looked at once more, and only then signalled through the pidfd: what was reused in between is seen, and left alone.
//! Order is from the top down: a shell that saw its child die first would take that for the child's failure and go on.
//! Source: Linux proc(5), pidfd_send_signal(2).

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use nix::unistd::Pid;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process that was found: its number, its parent's and its session's, and when it started. Number and start together no
/// other process ever has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its session's: that of whoever called setsid(2) last above it.
    pub session: i32,
    /// Whether it has a controlling terminal.
    pub has_terminal: bool,
    parent: i32,
    started: u64,
    zombie: bool,
    running: bool,
    ending: bool,
}

impl Process {
    /// Whether this is the process that `other` was. Its parent may have changed since.
    pub fn is_same(&self, other: &Process) -> bool {
        (self.pid, self.started) == (other.pid, other.started)
    }
}

/// Whether `pid` is a process below `ancestor`, and not below `except` nor that itself.
pub fn is_below(pid: i32, ancestor: i32, except: i32) -> bool {
    let mut current = look_at(pid);
    // A chain cannot be longer than there are processes; this one changes while it is walked.
    for _ in 0..1000 {
        match current {
            None => return false,
            Some(process) if process.pid == except => return false,
            Some(process) if process.parent == ancestor => return true,
            Some(process) => current = look_at(process.parent),
        }
    }
    false
}

/// The children of this process, which has one thread. The kernel's list spares looking at every process there is.
/// Source: proc(5) `/proc/[pid]/task/[tid]/children`.
pub fn children() -> Vec<i32> {
    match fs::read_to_string("/proc/thread-self/children") {
        Ok(list) => list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect(),
        // A kernel without that file.
        Err(_) => {
            let own = Pid::this().as_raw();
            let all = descendants(Pid::this(), &[]);
            all.iter().filter(|process| process.parent == own).map(|process| process.pid).collect()
        }
    }
}

/// Everything that descends from `root`, parents before children, without `root`, without zombies, and without the subtrees
/// of `except`.
pub fn descendants(root: Pid, except: &[i32]) -> Vec<Process> {
    let mut by_parent: HashMap<i32, Vec<Process>> = HashMap::new();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    for entry in entries.flatten() {
        if let Some(process) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(look_at) {
            by_parent.entry(process.parent).or_default().push(process);
        }
    }
    let mut found = Vec::new();
    let mut generation = vec![root.as_raw()];
    while let Some(parent) = generation.pop() {
        for child in by_parent.remove(&parent).unwrap_or_default() {
            if !except.contains(&child.pid) {
                generation.push(child.pid);
                if !child.zombie {
                    found.push(child);
                }
            }
        }
    }
    found
}

/// Signals one process, if it is still the one that was found. Whether it was signalled.
pub fn signal(process: &Process, number: i32) -> bool {
    let Some(pid) = rustix::process::Pid::from_raw(process.pid) else { return false };
    let Some(number) = Signal::from_named_raw(number) else { return false };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        // No pidfds here: a small chance of a stranger is better than a certain orphan.
        return is_still(process) && rustix::process::kill_process(pid, number).is_ok();
    };
    is_still(process) && pidfd_send_signal(&pidfd, number).is_ok()
}

/// Signals a child of this process that it has not waited for, with any signal there is, real-time ones too.
pub fn signal_child(child: Pid, number: i32) {
    // SAFETY: kill(2) touches no memory of ours. The number is our child's as long as it was not waited for.
    unsafe { nix::libc::kill(child.as_raw(), number) };
}

/// One process, by its number, for [`signal`] later on.
pub fn find(pid: i32) -> Option<Process> {
    look_at(pid)
}

/// Whether it has not ended.
pub fn is_alive(process: &Process) -> bool {
    look_at(process.pid).is_some_and(|now| now.started == process.started && !now.zombie)
}

/// Whether it is running, or would if others were not: its leading thread, that is.
pub fn is_running(pid: i32) -> bool {
    look_at(pid).is_some_and(|process| process.running)
}

/// Whether a process would not survive this signal: it neither catches nor ignores nor blocks it. Source: proc(5)
/// `/proc/[pid]/status`.
pub fn dies_of(pid: i32, number: i32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
    ["SigBlk:", "SigIgn:", "SigCgt:"].into_iter().all(|set| has_signal(&status, set, number) == Some(false))
}

/// Whether a set of signals in the text of `/proc/[pid]/status` has this one. `None`: there is no such set.
pub fn has_signal(status: &str, set: &str, number: i32) -> Option<bool> {
    let mask = status.lines().find_map(|line| line.strip_prefix(set))?;
    let mask = u64::from_str_radix(mask.trim(), 16).ok()?;
    Some(mask & 1 << (number - 1) != 0)
}

/// Whether the kernel is taking it apart: it runs no instruction of its own any more, its descriptors may be closed already, and
/// sooner or later it can be waited for. Says no of one that has come to that, and where the kernel does not tell.
pub fn is_ending(pid: i32) -> bool {
    // Of a leader whose threads go on nobody knows when they end.
    look_at(pid).is_some_and(|process| process.ending && !process.zombie)
}

fn is_still(process: &Process) -> bool {
    // The parent may have changed: an orphan has a new one.
    look_at(process.pid).is_some_and(|now| now.started == process.started)
}

/// Linux include/linux/sched.h.
const PF_EXITING: u32 = 4;

fn look_at(pid: i32) -> Option<Process> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold any byte, parentheses too.
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let fields = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    // Behind the parent's number comes the group's.
    let session = fields.nth(1)?.parse().ok()?;
    let has_terminal = fields.next()? != "0";
    // The flags are the ninth field of all, and the start time the 22nd; two are before the name's end.
    let flags: u32 = fields.nth(1)?.parse().ok()?;
    let started = fields.nth(12)?.parse().ok()?;
    let (zombie, running) = (matches!(state, "Z" | "X"), state == "R");
    Some(Process { pid, session, parent, has_terminal, started, zombie, running, ending: flags & PF_EXITING != 0 })
}

/// Numbers and names of processes, for people.
pub fn list(processes: &[Process]) -> String {
    let one = |process: &Process| {
        let name = fs::read(format!("/proc/{}/comm", process.pid)).unwrap_or_default();
        let name = String::from_utf8_lossy(&name);
        format!("{} ({})", process.pid, name.trim_end().escape_debug())
    };
    processes.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// When to look again at processes that are being killed: at once, because they may be forking, and ever more seldom, because
/// what does not go then waits for a disk or a network, and may for minutes.
#[derive(Debug, Clone, Copy)]
pub struct Rounds(Duration);

impl Rounds {
    /// Ready for the first round.
    pub fn new() -> Rounds {
        Rounds(Duration::from_millis(5))
    }

    /// How long to wait until the next round.
    pub fn wait(&mut self) -> Duration {
        let wait = self.0;
        self.0 = (wait * 2).min(Duration::from_secs(1));
        wait
    }
}

impl Default for Rounds {
    fn default() -> Rounds {
        Rounds::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_what_dies_of_a_signal() {
        for (script, dies) in [("", true), ("trap '' TERM;", false), ("trap : TERM;", false)] {
            let script = format!("{script} echo; read x");
            let mut command = std::process::Command::new("/bin/sh");
            command.args(["-c", &script]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
            let mut child = command.spawn().unwrap();
            std::io::Read::read_exact(&mut child.stdout.take().unwrap(), &mut [0]).unwrap();
            assert_eq!(dies_of(child.id().cast_signed(), 15), dies, "{script}");
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(!dies_of(child.id().cast_signed(), 15));
        }
    }

    #[test]
    fn finds_children_of_children_and_signals_them() {
        // Its own output, so that a test that fails holds nobody's.
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "sleep 1000 & echo; wait"])
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The shell says so when its own child exists.
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let pid = child.id() as i32;
        let found = descendants(Pid::this(), &[]);
        let shell = found.iter().position(|process| process.pid == pid).unwrap();
        let sleep = found.iter().position(|process| process.parent == pid).unwrap();
        assert!(shell < sleep);
        let session = nix::unistd::getsid(None).unwrap().as_raw();
        assert_eq!([found[shell].session, found[sleep].session], [session; 2]);
        assert!(is_below(found[sleep].pid, Pid::this().as_raw(), 0) && is_below(found[sleep].pid, pid, 0));
        assert!(!is_below(found[sleep].pid, Pid::this().as_raw(), pid) && !is_below(1, pid, 0));
        // It may not have become `sleep` yet.
        assert!(list(&found[sleep..=sleep]).starts_with(&format!("{} (s", found[sleep].pid)));
        assert!(!descendants(Pid::this(), &[pid]).iter().any(|process| process.parent == pid));
        assert!(signal(&found[shell], 9) && signal(&found[sleep], 9));
        child.wait().unwrap();
        assert!(!signal(&found[shell], 9), "a process that is gone is not signalled");
    }
}

//! Measures how long ends take: from the death of the parent, from the end of the command, and from SIGKILL of the front
//! process, until nothing is left; and what a start and a stop cost beside nbdkit. The options are in `HELP` below.
//!
//! "Nothing is left" means that every process that was there is gone (or waits only to be reaped by somebody else), and that
//! the private directory, the socket and the pid file are. Only std is used, so that it also builds without
//! cargo: `rustc -O --edition 2024 lifetimes.rs`.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

mod shared;

const HELP: &str = "\
Usage: cargo bench --bench lifetimes -- [OPTIONS]

  --runs N              how often every row is measured (default 100)
  --nbdcaptive PATH     this binary instead of the one that cargo built
  --nbdkit PATH         to compare with (default nbdkit; left out where there is none)
";

/// How long anything may take. Generous: only what is broken needs it.
const DEADLINE: Duration = Duration::from_secs(20);
/// How often a condition without an event is looked at. Small beside what is measured.
const POLL: Duration = Duration::from_micros(50);
/// What marks all processes of one measurement.
const MARK: &str = "NBDCAPTIVE_BENCH_MARK";

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "lifetimes: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut runs = 100;
    let Some(programs) = shared::options(HELP, &mut [("--runs", &mut runs)])? else { return Ok(()) };
    let shared::Programs { nbdcaptive: ours, nbdkit } = programs;
    println!("{:<44} {:>9} {:>9} {:>9}", format!("milliseconds, {runs} runs"), "median", "min", "max");
    let mut rows = [
        Row::new("parent killed -> nothing left"),
        Row::new("parent killed, --run -> nothing left"),
        Row::new("command ended -> front process gone"),
        Row::new("front process SIGKILLed -> nothing left"),
    ];
    for _ in 0..runs {
        rows[0].add(after_parent(&ours, false)?);
        rows[1].add(after_parent(&ours, true)?);
        rows[2].add(after_command(&ours)?);
        rows[3].add(after_sigkill(&ours)?);
    }
    rows.iter().for_each(Row::print);
    let mut rows = [Row::new("nbdcaptive null 1M --run true"), Row::new("nbdkit -U - null 1M --run true")];
    for _ in 0..runs {
        rows[0].add(start_and_stop(&ours, &["null", "1M", "--run", "true"])?);
        // What is not installed is left out.
        if let Ok(took) = start_and_stop(&nbdkit, &["-U", "-", "null", "1M", "--run", "true"]) {
            rows[1].add(took);
        }
    }
    rows.iter().for_each(Row::print);
    Ok(())
}

/// A line of the table.
struct Row {
    name: &'static str,
    took: Vec<Duration>,
}

impl Row {
    fn new(name: &'static str) -> Row {
        Row { name, took: Vec::new() }
    }

    fn add(&mut self, took: Duration) {
        self.took.push(took);
    }

    fn print(&self) {
        let mut sorted = self.took.clone();
        sorted.sort();
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else { return };
        let median = sorted[sorted.len() / 2];
        let [median, min, max] = [&median, min, max].map(|took| took.as_secs_f64() * 1000.0);
        println!("{:<44} {median:>9.2} {min:>9.2} {max:>9.2}", self.name);
    }
}

/// A directory for one measurement, and the mark of its processes.
struct Room {
    path: PathBuf,
    mark: String,
}

impl Room {
    fn new() -> Result<Room> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mark = format!("ncb{}-{number}", std::process::id());
        // Not the usual place: a socket's path has room for 107 bytes only.
        let path = Path::new("/tmp").join(&mark);
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Room { path, mark })
    }

    fn start(&self, program: &Path, arguments: &[&str]) -> Result<Child> {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&self.path).env(MARK, &self.mark).env("TMPDIR", &self.path);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map_err(|error| format!("{}: {error}", program.display()))
    }

    /// The processes that were started from here, with all that they have started.
    fn processes(&self) -> Vec<u32> {
        let wanted = format!("{MARK}={}", self.mark);
        let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
        let pids = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let marked = |pid: &u32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|one| one == wanted.as_bytes())
        };
        pids.filter(marked).collect()
    }

    fn is_empty(&self) -> bool {
        fs::read_dir(&self.path).is_ok_and(|mut entries| entries.next().is_none())
    }

    /// How long after `since` all of these processes were gone, and all files.
    fn clean(&self, processes: &[u32], since: Instant) -> Result<Duration> {
        wait_for("everything to go", || processes.iter().all(|pid| is_gone(*pid)) && self.is_empty())?;
        let took = since.elapsed();
        match &self.processes()[..] {
            [] => Ok(took),
            left => Err(format!("processes are left: {left:?}")),
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn wait_for(what: &str, mut look: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !look() {
        if start.elapsed() > DEADLINE {
            return Err(format!("waited in vain for {what}"));
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// Whether a process has ended, reaped or not.
fn is_gone(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next());
    matches!(state, None | Some("Z" | "X"))
}

fn kill(child: &mut Child) -> Result<()> {
    child.kill().map_err(|error| format!("kill: {error}"))
}

fn after_parent(ours: &Path, captive: bool) -> Result<Duration> {
    let room = Room::new()?;
    let path = ours.to_str().ok_or("the path of nbdcaptive is not text")?;
    let mut arguments = vec!["-c", "\"$@\" & wait", "sh", path, "--exit-with-parent", "-U", "s", "memory", "1M"];
    if captive {
        arguments.extend(["--run", "echo > started; exec sleep 1000"]);
    } else {
        arguments.extend(["-P", "pid"]);
    }
    let mut parent = room.start(Path::new("/bin/sh"), &arguments)?;
    wait_for("the server to listen", || UnixStream::connect(room.path.join("s")).is_ok())?;
    if captive {
        wait_for("the command to start", || room.path.join("started").exists())?;
        fs::remove_file(room.path.join("started")).map_err(|error| error.to_string())?;
    }
    let processes = room.processes();
    let since = Instant::now();
    kill(&mut parent)?;
    let took = room.clean(&processes, since);
    let _ = parent.wait();
    took
}

/// A captive server whose command has begun, reads a line and ends.
fn captive(room: &Room, ours: &Path) -> Result<(Child, Vec<u32>)> {
    let front = room.start(ours, &["memory", "1M", "--run", "echo > started; read x"])?;
    let started = room.path.join("started");
    wait_for("the command to start", || started.exists())?;
    fs::remove_file(started).map_err(|error| error.to_string())?;
    let processes = room.processes();
    Ok((front, processes))
}

fn after_command(ours: &Path) -> Result<Duration> {
    let room = Room::new()?;
    let (mut front, processes) = captive(&room, ours)?;
    let since = Instant::now();
    if let Some(mut stdin) = front.stdin.take() {
        stdin.write_all(b"\n").map_err(|error| error.to_string())?;
    }
    front.wait().map_err(|error| error.to_string())?;
    let took = since.elapsed();
    // At once: whoever waits for the front process never sees leftovers.
    if !processes.iter().all(|pid| is_gone(*pid)) || !room.is_empty() {
        return Err("the front process ended before the others did".into());
    }
    Ok(took)
}

fn after_sigkill(ours: &Path) -> Result<Duration> {
    let room = Room::new()?;
    let (mut front, processes) = captive(&room, ours)?;
    let since = Instant::now();
    kill(&mut front)?;
    let took = room.clean(&processes, since);
    let _ = front.wait();
    took
}

fn start_and_stop(program: &Path, arguments: &[&str]) -> Result<Duration> {
    let room = Room::new()?;
    let since = Instant::now();
    let mut child = room.start(program, arguments)?;
    let status = child.wait().map_err(|error| error.to_string())?;
    let took = since.elapsed();
    if status.success() { Ok(took) } else { Err(format!("{}: {status}", program.display())) }
}

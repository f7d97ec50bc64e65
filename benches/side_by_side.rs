//! Measures nbdcaptive, nbdkit and qemu-nbd side by side with fio's nbd engine, on one connection over a Unix socket.
//! What the rows and columns mean is in `docs/benchmarks.md`; the options are in `HELP` below.
//!
//! Every measurement has a server of its own, started for it and stopped after it, so that no idle neighbour is in the
//! way; the servers take turns row by row, so that a machine that slows down slows all of them. Only std is used, so
//! the file also builds alone: `rustc -O --edition 2024 side_by_side.rs`.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const HELP: &str = "\
Usage: cargo bench --bench side_by_side -- [OPTIONS]

  --runs N              how often every row is measured; the median counts (default 5)
  --seconds S           how long one measurement lasts, such as 2 or 0.5 (default 2)
  --quick               one run of half a second: does everything work?
  --rows TEXT[,TEXT]    only rows whose name has all words of one TEXT, such as 'memory 4k,file write'
  --only NAME[,NAME]    only these of nbdcaptive, nbdkit, qemu-nbd
  --against NAME=PATH   a further server for the memory rows, started as PATH SOCKET SIZE; may be repeated
  --nbdcaptive PATH     this binary instead of the one that cargo built
  --pin one|two|both|none
                        one: server and fio on cpu 0; two: server on cpu 0, fio on cpu 1; both: all rows in each of
                        these two ways; none: as the scheduler likes (default)
  --dir DIR             where the file and the sockets are (default $TMPDIR, else /var/tmp)
  --json FILE           also write the results there, with every sample
  --list                print the names of the rows and stop
";

/// Bytes in the exported disk.
const SIZE: u64 = 256 << 20;
/// The same for a command line.
const SIZE_WORD: &str = "256M";
/// How long a server may take until it greets, and to end after SIGTERM. Generous: only a broken one needs it.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often a condition without an event (a socket that appears, a process that ends) is looked at.
const POLL: Duration = Duration::from_millis(2);
/// How many cpus others may keep busy before a measurement counts as disturbed. An idle machine's own threads, and the
/// kernel's that write a file back, stay below.
const DISTURBED: f64 = 0.2;
/// Linux's USER_HZ, the unit of the times in /proc/PID/stat. It is 100 wherever Debian's servers run.
const TICKS_PER_SECOND: f64 = 100.0;

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "side_by_side: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let Some(options) = Options::parse(std::env::args().skip(1))? else {
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

    let workspace = Workspace::create(&options.dir, rows.iter().any(|row| row.disk == Disk::File))?;
    let mut results = Results::default();
    let total = options.runs
        * options.pins.len()
        * rows.iter().map(|row| servers.iter().filter(|server| server.serves(row.disk)).count()).sum::<usize>();
    let mut done = 0;
    for turn in 0..options.runs {
        for &pin in &options.pins {
            for (row_number, row) in rows.iter().enumerate() {
                // Another server goes first in each run: whoever follows a write finds a busier disk.
                for place in 0..servers.len() {
                    let number = (turn + place) % servers.len();
                    let server = &servers[number];
                    if !server.serves(row.disk) {
                        continue;
                    }
                    let sample = measure(&workspace, server, row, pin, options.millis)
                        .map_err(|error| format!("{}: {}: {error}", server.name, row.name()))?;
                    done += 1;
                    // Progress only: a closed stderr is no reason to stop.
                    let _ = writeln!(
                        io::stderr(),
                        "[{done}/{total}] {} {}: {:.0} {}",
                        server.name,
                        row.name(),
                        sample.rate,
                        row.rate_unit()
                    );
                    results.samples.entry((pin, row_number, number)).or_default().push(sample);
                }
            }
        }
    }
    drop(workspace);

    let report = Report { options: &options, servers: &servers, rows: &rows, results: &results };
    say(&report.text())?;
    if let Some(path) = &options.json {
        fs::write(path, report.json(&header)).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// `print!` that does not panic when nobody reads.
fn say(text: &str) -> Result<()> {
    io::stdout().write_all(text.as_bytes()).map_err(|error| format!("stdout: {error}"))
}

// ---- what to measure ----

#[derive(Clone, Copy, PartialEq, Eq)]
enum Disk {
    Memory,
    File,
}

struct Row {
    disk: Disk,
    /// What fio calls it.
    rw: &'static str,
    /// Bytes in one request.
    block: u64,
    depth: u32,
}

impl Row {
    fn all() -> Vec<Row> {
        let mut rows = Vec::new();
        for disk in [Disk::Memory, Disk::File] {
            for (rw, block, depth) in [
                ("randread", 4 << 10, 1),
                ("randread", 4 << 10, 64),
                ("randwrite", 4 << 10, 1),
                ("randwrite", 4 << 10, 64),
                ("read", 256 << 10, 8),
                ("write", 256 << 10, 8),
            ] {
                rows.push(Row { disk, rw, block, depth });
            }
        }
        rows
    }

    fn is_small(&self) -> bool {
        self.block < 64 << 10
    }

    fn name(&self) -> String {
        let disk = if self.disk == Disk::Memory { "memory" } else { "file" };
        let order = if self.rw.starts_with("rand") { "random" } else { "sequential" };
        let action = if self.rw.ends_with("read") { "read" } else { "write" };
        format!("{disk} {}k {order} {action} q{}", self.block >> 10, self.depth)
    }

    fn rate_unit(&self) -> &'static str {
        if self.is_small() { "IOPS" } else { "MB/s" }
    }

    fn cpu_unit(&self) -> &'static str {
        if self.is_small() { "s/million" } else { "s/GB" }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Pin {
    None,
    One,
    Two,
}

impl Pin {
    fn name(self) -> &'static str {
        match self {
            Pin::None => "none",
            Pin::One => "one",
            Pin::Two => "two",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Pin::None => "not pinned",
            Pin::One => "server and fio on cpu 0",
            Pin::Two => "server on cpu 0, fio on cpu 1",
        }
    }

    /// `program`, confined to where the server (or else fio) belongs. taskset turns into it and keeps its pid.
    fn command(self, program: &OsStr, is_server: bool) -> Command {
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Has nbdkit's command line.
    Nbdkit,
    QemuNbd,
    /// Takes a socket and a size.
    Against,
}

struct Server {
    name: String,
    kind: Kind,
    program: OsString,
}

impl Server {
    fn serves(&self, disk: Disk) -> bool {
        match self.kind {
            Kind::Nbdkit => true,
            Kind::QemuNbd => disk == Disk::File,
            Kind::Against => disk == Disk::Memory,
        }
    }

    fn command(&self, pin: Pin, socket: &Path, disk: Disk, file: &Path) -> Command {
        let mut command = pin.command(&self.program, true);
        match self.kind {
            Kind::Nbdkit => {
                command.arg("-f").arg("-U").arg(socket);
                match disk {
                    Disk::Memory => command.arg("memory").arg(SIZE_WORD),
                    Disk::File => command.arg("file").arg(file),
                };
            }
            Kind::QemuNbd => {
                command.args(["-t", "-f", "raw", "-e", "8", "--cache=writeback", "-k"]).arg(socket).arg(file);
            }
            Kind::Against => {
                command.arg(socket).arg(SIZE.to_string());
            }
        }
        command
    }
}

struct Options {
    runs: usize,
    millis: u64,
    rows: Vec<String>,
    pins: Vec<Pin>,
    only: Vec<String>,
    against: Vec<(String, OsString)>,
    nbdcaptive: Option<PathBuf>,
    dir: PathBuf,
    json: Option<PathBuf>,
}

impl Options {
    /// `None` when the question was answered here (`--help`, `--list`).
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Options>> {
        let mut options = Options {
            runs: 5,
            millis: 2000,
            rows: Vec::new(),
            pins: vec![Pin::None],
            only: Vec::new(),
            against: Vec::new(),
            nbdcaptive: None,
            // Not /tmp: that may be a tmpfs, and the file rows are about a file in the page cache of a disk.
            dir: std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).unwrap_or("/var/tmp".into()).into(),
            json: None,
        };
        while let Some(word) = words.next() {
            let (name, inline) = match word.split_once('=') {
                Some((name, value)) => (name.to_string(), Some(value.to_string())),
                None => (word, None),
            };
            let flag = matches!(name.as_str(), "--quick" | "--list" | "--help" | "-h" | "--bench");
            if flag && inline.is_some() {
                return Err(format!("{name}: takes no value"));
            }
            let mut value = || inline.clone().or_else(|| words.next()).ok_or(format!("{name}: needs a value"));
            match name.as_str() {
                "--runs" => {
                    let text = value()?;
                    options.runs = match text.parse() {
                        Ok(runs) if runs > 0 => runs,
                        _ => return Err(format!("--runs: not a number of runs: {text}")),
                    };
                }
                "--seconds" => {
                    let text = value()?;
                    options.millis = match text.parse::<f64>() {
                        Ok(seconds) if (0.05..=86400.0).contains(&seconds) => (seconds * 1000.0).round() as u64,
                        _ => return Err(format!("--seconds: not between 0.05 and 86400: {text}")),
                    };
                }
                "--quick" => (options.runs, options.millis) = (1, 500),
                "--rows" => options.rows.extend(list(&value()?)),
                "--only" => options.only.extend(list(&value()?)),
                "--against" => {
                    let text = value()?;
                    match text.split_once('=') {
                        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                            options.against.push((name.to_string(), path.into()));
                        }
                        _ => return Err(format!("--against: not NAME=PATH: {text}")),
                    }
                }
                "--nbdcaptive" => options.nbdcaptive = Some(value()?.into()),
                "--pin" => {
                    let text = value()?;
                    options.pins = match text.as_str() {
                        "one" => vec![Pin::One],
                        "two" => vec![Pin::Two],
                        "both" => vec![Pin::One, Pin::Two],
                        "none" => vec![Pin::None],
                        _ => return Err(format!("--pin: not one of one, two, both, none: {text}")),
                    };
                }
                "--dir" => options.dir = value()?.into(),
                "--json" => options.json = Some(value()?.into()),
                // cargo says this to every benchmark.
                "--bench" => {}
                "--list" => {
                    for row in Row::all() {
                        say(&format!("{}\n", row.name()))?;
                    }
                    return Ok(None);
                }
                "-h" | "--help" => {
                    say(HELP)?;
                    return Ok(None);
                }
                _ => return Err(format!("unknown option {name}; try --help")),
            }
        }
        if options.rows().is_empty() {
            return Err("--rows: no row has such a name; --list shows them".into());
        }
        if options.pins.contains(&Pin::Two) && thread::available_parallelism().is_ok_and(|cores| cores.get() < 2) {
            return Err("--pin two: this machine has one cpu".into());
        }
        Ok(Some(options))
    }

    fn rows(&self) -> Vec<Row> {
        let wanted = |row: &Row| {
            let name = row.name();
            self.rows.is_empty() || self.rows.iter().any(|text| text.split_whitespace().all(|word| name.contains(word)))
        };
        Row::all().into_iter().filter(wanted).collect()
    }

    fn servers(&self) -> Result<Vec<Server>> {
        let known = ["nbdcaptive", "nbdkit", "qemu-nbd"];
        if let Some(name) = self.only.iter().find(|name| !known.contains(&name.as_str())) {
            return Err(format!("--only: not one of nbdcaptive, nbdkit, qemu-nbd: {name}"));
        }
        let mut servers = Vec::new();
        for name in known {
            if !self.only.is_empty() && !self.only.iter().any(|only| only == name) {
                continue;
            }
            let program = match name {
                "nbdcaptive" => match (&self.nbdcaptive, option_env!("CARGO_BIN_EXE_nbdcaptive")) {
                    (Some(path), _) => path.into(),
                    (None, Some(path)) => path.into(),
                    (None, None) => return Err("built without cargo: say --nbdcaptive PATH or --only".into()),
                },
                _ => name.into(),
            };
            let kind = if name == "qemu-nbd" { Kind::QemuNbd } else { Kind::Nbdkit };
            servers.push(Server { name: name.to_string(), kind, program });
        }
        for (name, program) in &self.against {
            if servers.iter().any(|server| server.name == *name) {
                return Err(format!("--against: {name} is measured already; choose another name"));
            }
            servers.push(Server { name: name.clone(), kind: Kind::Against, program: program.clone() });
        }
        let rows = self.rows();
        servers.retain(|server| rows.iter().any(|row| server.serves(row.disk)));
        if servers.is_empty() {
            return Err("no server is left that has one of these rows (qemu-nbd has the file rows only)".into());
        }
        Ok(servers)
    }
}

fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_string).collect()
}

// ---- what the numbers were measured with ----

struct Header {
    /// (name, value) in the order of printing.
    lines: Vec<(String, String)>,
}

impl Header {
    /// Errors: a program that is needed does not run; says which package has it.
    fn gather(options: &Options, servers: &[Server]) -> Result<Header> {
        let mut lines = vec![("fio".to_string(), version(OsStr::new("fio"), "install the package fio")?)];
        let engine = Command::new("fio").arg("--enghelp=nbd").output();
        if !engine.is_ok_and(|output| output.status.success()) {
            return Err("this fio has no nbd engine; on Debian, apt-get install fio brings one that has".into());
        }
        for server in servers {
            let line = match server.kind {
                Kind::Against => Path::new(&server.program)
                    .exists()
                    .then(|| server.program.to_string_lossy().into_owned())
                    .ok_or(format!("--against: {}: no such file", server.program.to_string_lossy()))?,
                Kind::QemuNbd => version(&server.program, "install the package qemu-utils")?,
                Kind::Nbdkit if server.name == "nbdkit" => version(&server.program, "install the package nbdkit")?,
                Kind::Nbdkit => version(&server.program, "cargo build --release makes it")?,
            };
            lines.push((server.name.clone(), line));
        }
        if options.pins != [Pin::None] {
            version(OsStr::new("taskset"), "install the package util-linux")?;
        }
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

    fn text(&self) -> String {
        let width = self.lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let mut text = String::new();
        for (name, value) in &self.lines {
            let _ = writeln!(text, "{name:width$}  {value}");
        }
        text
    }
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

/// What follows `key` and a colon in a file of /proc.
fn after(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let (_, value) = text.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == key)?;
    Some(value.trim().to_string())
}

// ---- one measurement ----

/// A private directory, and a shell that removes it.
///
/// The shell reads the pid of the server that runs from a pipe. At the pipe's end, which comes even when this program
/// is killed, it ends that server and removes the directory; so there is one way of cleaning up, and it always happens.
struct Workspace {
    dir: PathBuf,
    cleaner: Child,
    /// Gone only in `drop`.
    pids: Option<ChildStdin>,
}

impl Workspace {
    fn create(parent: &Path, with_file: bool) -> Result<Workspace> {
        let said = |error: io::Error| format!("{}: {error}", parent.display());
        let parent = parent.canonicalize().map_err(said)?;
        let dir = parent.join(format!("nbd-bench.{}", std::process::id()));
        // sun_path has 108 bytes with its final NUL.
        if dir.as_os_str().len() + "/socket".len() > 107 {
            return Err(format!("{}: too long for a Unix socket; choose another --dir", dir.display()));
        }
        DirBuilder::new().mode(0o700).create(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let script = "trap '' HUP INT QUIT TERM; pid=
            while read -r line; do pid=$line; done
            if [ -n \"$pid\" ]; then kill \"$pid\" 2>/dev/null; fi
            rm -rf -- \"$1\"";
        let spawned =
            Command::new("sh").arg("-c").arg(script).arg("sh").arg(&dir).current_dir("/").stdin(Stdio::piped()).spawn();
        let mut cleaner = match spawned {
            Ok(cleaner) => cleaner,
            Err(error) => {
                let _ = fs::remove_dir(&dir);
                return Err(format!("sh: {error}"));
            }
        };
        let pids = cleaner.stdin.take();
        let workspace = Workspace { dir, cleaner, pids };
        if with_file {
            write_file(&workspace.file()).map_err(|error| format!("{}: {error}", workspace.file().display()))?;
        }
        Ok(workspace)
    }

    fn file(&self) -> PathBuf {
        self.dir.join("disk")
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("socket")
    }

    fn server_log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Tells the cleaner which server runs; empty for none.
    fn note(&self, pid: &str) -> Result<()> {
        match &self.pids {
            Some(pids) => {
                let mut pids: &ChildStdin = pids;
                pids.write_all(format!("{pid}\n").as_bytes()).map_err(|error| format!("sh: {error}"))
            }
            None => Ok(()),
        }
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        drop(self.pids.take());
        let _ = self.cleaner.wait();
    }
}

/// Fills every block of the disk with something that no server can take for a hole.
fn write_file(path: &Path) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut block = Vec::with_capacity(1 << 20);
    for _ in 0..SIZE >> 20 {
        block.clear();
        while block.len() < 1 << 20 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block)?;
    }
    file.sync_all()
}

/// Leaves the file in the page cache, with nothing to write back: no server pays for what another has written.
fn settle(path: &Path) -> Result<()> {
    let settled = (|| {
        let mut file = File::open(path)?;
        file.sync_all()?;
        let mut block = vec![0; 1 << 20];
        while file.read(&mut block)? > 0 {}
        Ok::<_, io::Error>(())
    })();
    settled.map_err(|error| format!("{}: {error}", path.display()))
}

#[derive(Clone, Copy)]
struct Sample {
    /// IOPS, or 10^6 bytes a second.
    rate: f64,
    /// Seconds of the server's CPU time, for a million requests or for 10^9 bytes.
    cpu: f64,
    /// The most memory that the server had at once, in KiB.
    peak_kib: u64,
    /// How many cpus others than the server, fio and this program kept busy meanwhile: 0.5 is half of one.
    others: f64,
}

fn measure(workspace: &Workspace, server: &Server, row: &Row, pin: Pin, millis: u64) -> Result<Sample> {
    if row.disk == Disk::File {
        settle(&workspace.file())?;
    }
    let mut running = Running::start(workspace, server, row.disk, pin)?;
    let measured = (|| {
        if row.disk == Disk::Memory {
            // Every page is there before it is timed.
            fio(workspace, pin, &["--rw=write", "--bs=1m", "--iodepth=4"])?;
        }
        let before = cpu_seconds(running.child.id());
        let (busy, own, start) = (busy_seconds(), own_seconds(), Instant::now());
        let job = [
            format!("--rw={}", row.rw),
            format!("--bs={}", row.block),
            format!("--iodepth={}", row.depth),
            format!("--runtime={millis}ms"),
            "--time_based".to_string(),
        ];
        let done = fio(workspace, pin, &job.each_ref().map(String::as_str))?;
        let took = start.elapsed().as_secs_f64();
        let cpu = cpu_seconds(running.child.id()) - before;
        // Each of the three is rounded to ticks, so the difference may come out a little below nothing.
        let others = ((busy_seconds() - busy - (own_seconds() - own) - cpu) / took).max(0.0);
        let requests = done.bytes / row.block as f64;
        let (rate, cpu) = if row.is_small() {
            (requests / done.seconds, cpu / (requests / 1e6))
        } else {
            (done.bytes / 1e6 / done.seconds, cpu / (done.bytes / 1e9))
        };
        Ok(Sample { rate, cpu, peak_kib: peak_kib(running.child.id()), others })
    })();
    let log = running.stop(workspace)?;
    measured.map_err(|error: String| with_log(error, &log))
}

fn with_log(error: String, log: &str) -> String {
    match log.lines().last() {
        Some(line) => format!("{error}; the server said: {line}"),
        None => error,
    }
}

/// A server that has greeted a client. Dropped, it is killed and reaped.
struct Running {
    child: Child,
    ended: bool,
}

impl Running {
    fn start(workspace: &Workspace, server: &Server, disk: Disk, pin: Pin) -> Result<Running> {
        let socket = workspace.socket();
        let log = File::create(workspace.server_log()).map_err(|error| format!("log: {error}"))?;
        let child = server
            .command(pin, &socket, disk, &workspace.file())
            .current_dir(&workspace.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| format!("{}: {error}", server.program.to_string_lossy()))?;
        let mut running = Running { child, ended: false };
        workspace.note(&running.child.id().to_string())?;
        let deadline = Instant::now() + DEADLINE;
        while let Err(error) = greeted(&socket) {
            let ended = running.child.try_wait().map_err(|error| error.to_string())?;
            let told = match ended {
                Some(status) => format!("ended at once ({status})"),
                None if Instant::now() > deadline => format!("does not listen: {error}"),
                None => {
                    thread::sleep(POLL);
                    continue;
                }
            };
            let log = running.stop(workspace)?;
            return Err(with_log(told, &log));
        }
        Ok(running)
    }

    /// Ends the server, removes its socket, and returns what it wrote on stderr.
    fn stop(&mut self, workspace: &Workspace) -> Result<String> {
        self.end();
        workspace.note("")?;
        let _ = fs::remove_file(workspace.socket());
        Ok(fs::read(workspace.server_log()).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default())
    }

    fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        // std has only SIGKILL; a shell has `kill` built in. The child is not reaped yet, so the pid is still its own.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = Command::new("sh").args(["-c", "kill -TERM \"$1\"", "sh", &self.child.id().to_string()]).status();
            let deadline = Instant::now() + DEADLINE;
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                thread::sleep(POLL);
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// Connects and reads NBD's greeting. A client that left earlier would make some servers die of SIGPIPE.
fn greeted(socket: &Path) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if greeting.starts_with(b"NBDMAGIC") { Ok(()) } else { Err(io::Error::other("no NBD server is there")) }
}

struct Done {
    bytes: f64,
    seconds: f64,
}

/// Runs fio on the socket. Errors: fio's own words.
fn fio(workspace: &Workspace, pin: Pin, job: &[&str]) -> Result<Done> {
    let output = pin
        .command(OsStr::new("fio"), false)
        .args(["--name=row", "--ioengine=nbd", "--output-format=terse", "--terse-version=3"])
        // A client that is cheap: without a map of the blocks it has seen, and with few looks at the clock.
        .args(["--norandommap=1", "--gtod_reduce=1"])
        .arg(format!("--uri=nbd+unix:///?socket={}", percent_encoded(&workspace.socket())))
        .args(job)
        .current_dir(&workspace.dir)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("fio: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = || {
        let errors = String::from_utf8_lossy(&output.stderr);
        format!("fio failed ({}): {}", output.status, errors.lines().last().unwrap_or("no message"))
    };
    // Other lines, such as "connected to NBD server", have no semicolons. Source: fio HOWTO, "Terse output".
    let fields: Vec<&str> = text.lines().find(|line| line.starts_with("3;")).ok_or_else(said)?.split(';').collect();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).ok_or_else(said);
    // Error; KiB and milliseconds read; KiB and milliseconds written.
    let (error, read, read_time, written, write_time) = (number(4)?, number(5)?, number(8)?, number(46)?, number(49)?);
    let done = Done { bytes: (read + written) * 1024.0, seconds: (read_time + write_time) / 1000.0 };
    if !output.status.success() || error != 0.0 || done.bytes <= 0.0 || done.seconds <= 0.0 {
        return Err(said());
    }
    Ok(done)
}

fn percent_encoded(path: &Path) -> String {
    let mut text = String::new();
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
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

/// User and system time of the server until now, in seconds.
fn cpu_seconds(root: u32) -> f64 {
    // utime and stime are fields 14 and 15 of the file, and the state is the third. Source: proc_pid_stat(5).
    tree(root).into_iter().filter_map(stat_fields).map(|fields| ticks(&fields, 11, 2)).sum::<f64>() / TICKS_PER_SECOND
}

/// The same of this program and of the children that it has waited for: fio.
fn own_seconds() -> f64 {
    // cutime and cstime follow utime and stime.
    stat_fields(std::process::id()).map_or(0.0, |fields| ticks(&fields, 11, 4)) / TICKS_PER_SECOND
}

/// The time that all cpus together were at work since the machine started, in seconds.
fn busy_seconds() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<String> = text.lines().next().unwrap_or_default().split_whitespace().map(str::to_string).collect();
    // "cpu", user, nice, system, idle, iowait, irq, softirq, steal. Source: proc_stat(5).
    (ticks(&fields, 1, 3) + ticks(&fields, 6, 3)) / TICKS_PER_SECOND
}

/// The sum of `count` fields.
fn ticks(fields: &[String], first: usize, count: usize) -> f64 {
    fields.iter().skip(first).take(count).filter_map(|field| field.parse::<f64>().ok()).sum()
}

fn peak_kib(root: u32) -> u64 {
    let peak = |pid| after(&format!("/proc/{pid}/status"), "VmHWM")?.trim_end_matches("kB").trim().parse::<u64>().ok();
    tree(root).into_iter().filter_map(peak).sum()
}

// ---- what came out ----

#[derive(Default)]
struct Results {
    /// By pinning, row and server.
    samples: BTreeMap<(Pin, usize, usize), Vec<Sample>>,
}

struct Summary {
    median: f64,
    min: f64,
    max: f64,
}

impl Summary {
    /// `None` without numbers.
    fn of(numbers: impl Iterator<Item = f64>) -> Option<Summary> {
        let mut numbers: Vec<f64> = numbers.collect();
        numbers.sort_by(f64::total_cmp);
        let (&min, &max) = (numbers.first()?, numbers.last()?);
        let middle = numbers.len() / 2;
        let median =
            if numbers.len() % 2 == 1 { numbers[middle] } else { f64::midpoint(numbers[middle - 1], numbers[middle]) };
        Some(Summary { median, min, max })
    }
}

struct Report<'a> {
    options: &'a Options,
    servers: &'a [Server],
    rows: &'a [Row],
    results: &'a Results,
}

impl Report<'_> {
    fn samples(&self, pin: Pin, row: usize, server: usize) -> &[Sample] {
        self.results.samples.get(&(pin, row, server)).map_or(&[], Vec::as_slice)
    }

    fn rates(&self, pin: Pin, row: usize, server: usize) -> Option<Summary> {
        Summary::of(self.samples(pin, row, server).iter().map(|sample| sample.rate))
    }

    fn cpu(&self, pin: Pin, row: usize, server: usize) -> Option<f64> {
        Summary::of(self.samples(pin, row, server).iter().map(|sample| sample.cpu)).map(|summary| summary.median)
    }

    /// The most memory over all runs and rows of a disk, in KiB.
    fn peak(&self, disk: Disk, server: usize) -> Option<u64> {
        let of_disk = |&(_, row, number): &(Pin, usize, usize)| number == server && self.rows[row].disk == disk;
        let samples = self.results.samples.iter().filter(|(key, _)| of_disk(key)).flat_map(|(_, samples)| samples);
        samples.map(|sample| sample.peak_kib).max()
    }

    /// What is divided by the others: nbdcaptive, which is the first wherever it is measured.
    fn ratio(&self, pin: Pin, row: usize, other: usize) -> Option<f64> {
        Some(self.rates(pin, row, 0)?.median / self.rates(pin, row, other)?.median)
    }

    /// The row in which nbdcaptive does least well against nbdkit, and how.
    fn smallest(&self) -> Option<(f64, String)> {
        let nbdkit = self.servers.iter().position(|server| server.name == "nbdkit")?;
        if self.servers[0].name != "nbdcaptive" {
            return None;
        }
        let mut all = Vec::new();
        for &pin in &self.options.pins {
            for (number, row) in self.rows.iter().enumerate() {
                let name = if pin == Pin::None { row.name() } else { format!("{}, {}", row.name(), pin.title()) };
                all.extend(self.ratio(pin, number, nbdkit).map(|ratio| (ratio, name)));
            }
        }
        all.into_iter().min_by(|one, other| one.0.total_cmp(&other.0))
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let dash = || "-".to_string();
        for &pin in &self.options.pins {
            let mut rates = vec![vec![String::new(), "unit".to_string()]];
            let mut costs = vec![vec![String::new(), "unit".to_string()]];
            rates[0].extend(self.servers.iter().map(|server| server.name.clone()));
            rates[0].extend(self.servers[1..].iter().map(|server| format!("{}/{}", self.servers[0].name, server.name)));
            costs[0].extend(self.servers.iter().map(|server| server.name.clone()));
            for (number, row) in self.rows.iter().enumerate() {
                let mut line = vec![row.name(), row.rate_unit().to_string()];
                line.extend((0..self.servers.len()).map(|server| match self.rates(pin, number, server) {
                    Some(rate) => format!("{:.0} ({:.0}..{:.0})", rate.median, rate.min, rate.max),
                    None => dash(),
                }));
                line.extend((1..self.servers.len()).map(|other| match self.ratio(pin, number, other) {
                    Some(ratio) => format!("{ratio:.2}"),
                    None => dash(),
                }));
                rates.push(line);
                let mut line = vec![row.name(), row.cpu_unit().to_string()];
                line.extend(
                    (0..self.servers.len())
                        .map(|server| self.cpu(pin, number, server).map_or_else(dash, |cpu| format!("{cpu:.2}"))),
                );
                costs.push(line);
            }
            let _ = write!(text, "\nSpeed, median (least..most), {}\n{}", pin.title(), table(&rates));
            let _ = write!(text, "\nThe server's CPU time, median, {}\n{}", pin.title(), table(&costs));
        }
        let mut peaks = vec![vec![String::new(), "unit".to_string()]];
        peaks[0].extend(self.servers.iter().map(|server| server.name.clone()));
        for (disk, name) in [(Disk::Memory, "memory rows, the disk included"), (Disk::File, "file rows")] {
            if self.rows.iter().any(|row| row.disk == disk) {
                let mut line = vec![name.to_string(), "MiB".to_string()];
                line.extend((0..self.servers.len()).map(|server| {
                    self.peak(disk, server).map_or_else(dash, |kib| format!("{:.1}", kib as f64 / 1024.0))
                }));
                peaks.push(line);
            }
        }
        let _ = write!(text, "\nThe most resident memory\n{}\n", table(&peaks));
        let disturbed = self.results.samples.values().flatten().filter(|sample| sample.others > DISTURBED).count();
        let all = self.results.samples.values().map(Vec::len).sum::<usize>();
        let _ = writeln!(
            text,
            "Measurements during which others kept more than {DISTURBED} of a cpu busy: {disturbed} of {all}"
        );
        let _ = match self.smallest() {
            Some((ratio, row)) => writeln!(text, "Smallest nbdcaptive/nbdkit: {ratio:.2} ({row})"),
            None => writeln!(text, "Smallest nbdcaptive/nbdkit: not measured"),
        };
        text
    }

    fn json(&self, header: &Header) -> String {
        let about: Vec<String> =
            header.lines.iter().map(|(name, value)| format!("{}: {}", quoted(name), quoted(value))).collect();
        let mut rows = Vec::new();
        for &pin in &self.options.pins {
            for (number, row) in self.rows.iter().enumerate() {
                let mut servers = Vec::new();
                for (server, about) in self.servers.iter().enumerate() {
                    let (Some(rate), Some(cpu)) = (self.rates(pin, number, server), self.cpu(pin, number, server))
                    else {
                        continue;
                    };
                    let samples: Vec<String> = self
                        .samples(pin, number, server)
                        .iter()
                        .map(|sample| {
                            let Sample { rate, cpu, peak_kib, others } = sample;
                            format!(
                                "{{\"rate\": {rate:.1}, \"cpu\": {cpu:.4}, \"peak_kib\": {peak_kib}, \
                                 \"others\": {others:.3}}}"
                            )
                        })
                        .collect();
                    let ratio = self.ratio(pin, number, server).filter(|_| server > 0);
                    servers.push(format!(
                        "{}: {{\"median\": {:.1}, \"min\": {:.1}, \"max\": {:.1}, \"cpu\": {cpu:.4}, \
                         \"ratio\": {}, \"samples\": [{}]}}",
                        quoted(&about.name),
                        rate.median,
                        rate.min,
                        rate.max,
                        ratio.map_or_else(|| "null".to_string(), |ratio| format!("{ratio:.4}")),
                        samples.join(", ")
                    ));
                }
                rows.push(format!(
                    "    {{\"row\": {}, \"pin\": {}, \"unit\": {}, \"cpu_unit\": {}, \
                     \"servers\": {{\n      {}\n    }}}}",
                    quoted(&row.name()),
                    quoted(pin.name()),
                    quoted(row.rate_unit()),
                    quoted(row.cpu_unit()),
                    servers.join(",\n      ")
                ));
            }
        }
        let smallest = self.smallest().map_or_else(
            || "null".to_string(),
            |(ratio, row)| format!("{{\"ratio\": {ratio:.4}, \"row\": {}}}", quoted(&row)),
        );
        format!(
            "{{\n  \"about\": {{{}}},\n  \"ratio_of\": {},\n  \"rows\": [\n{}\n  ],\n  \"smallest\": {smallest}\n}}\n",
            about.join(", "),
            quoted(&self.servers[0].name),
            rows.join(",\n")
        )
    }
}

/// Columns side by side: the first to the left, the others to the right. All lines have as many cells as the first.
fn table(lines: &[Vec<String>]) -> String {
    let mut widths = Vec::new();
    for line in lines {
        widths.resize(widths.len().max(line.len()), 0);
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    for line in lines {
        let mut shown = String::new();
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let _ = if column == 0 { write!(shown, "{cell:width$}") } else { write!(shown, "  {cell:>width$}") };
        }
        let _ = writeln!(text, "{}", shown.trim_end());
    }
    text
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control < ' ' => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(control));
            }
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}

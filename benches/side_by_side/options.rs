//! The command line, and which rows and servers it asks for.

use std::ffi::OsString;
use std::path::PathBuf;
use std::thread;

use crate::rows::Row;
use crate::servers::{Kind, Pin, Rows, Server};
use crate::{Result, say};

const HELP: &str = "\
Usage: cargo bench --bench side_by_side -- [OPTIONS]

  --runs N              how often every row is measured; the median counts (default 5)
  --seconds S           how long one measurement lasts, such as 2 or 0.5 (default 2)
  --quick               one run of half a second: does everything work?
  --rows TEXT[,TEXT]    only rows whose name has all words of one TEXT and none that stands after a '-', such as
                        'memory 4k -tcp,file write'
  --only NAME[,NAME]    only these of nbdcaptive, nbdkit, qemu-nbd, 'nbdcaptive --no-sr', embedded
  --against NAME=PATH   a further server for the memory rows, started as PATH SOCKET SIZE; may be repeated. It is taken
                        to send simple replies only, so 'nbdcaptive --no-sr' is measured beside it
  --against-all NAME=PATH
                        the same for all rows of fio: started as PATH ADDRESS DISK, where ADDRESS is the path of a
                        socket or a port of 127.0.0.1, and DISK a size in bytes or the absolute path of a file
  --embedded            also nbdcaptive's engine inside another program, for the memory rows over a Unix socket
  --nbdcaptive PATH     this binary instead of the one that cargo built
  --pin one|two|both|none
                        one: server and client on cpu 0; two: server on cpu 0, client on cpu 1; both: all rows of
                        fio and nbdcopy in each of these two ways; none: as the scheduler likes (default)
  --idle N              how many connections the row 'idle connections' holds (default 10000)
  --dir DIR             where the files and the sockets are (default $TMPDIR, else /var/tmp)
  --json FILE           also write the results there, with every sample
  --list                print the names of the rows and stop
";

/// nbdcaptive, started with that option.
const SIMPLE: &str = "nbdcaptive --no-sr";
/// All that `--only` knows, in the order of the columns. What is named by `--against` comes before the last.
const KNOWN: [&str; 5] = ["nbdcaptive", "nbdkit", "qemu-nbd", SIMPLE, "embedded"];

/// What `--against` and `--against-all` name.
struct Against {
    name: String,
    program: OsString,
    rows: Rows,
}

pub struct Options {
    pub runs: usize,
    pub millis: u64,
    rows: Vec<String>,
    pub pins: Vec<Pin>,
    only: Vec<String>,
    against: Vec<Against>,
    embedded: bool,
    pub nbdcaptive: Option<PathBuf>,
    /// How many connections [`crate::rows::Work::Idle`] holds.
    pub idle: usize,
    pub dir: PathBuf,
    pub json: Option<PathBuf>,
}

impl Options {
    /// `None` when the question was answered here (`--help`, `--list`).
    pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Options>> {
        let mut options = Options {
            runs: 5,
            millis: 2000,
            rows: Vec::new(),
            pins: vec![Pin::None],
            only: Vec::new(),
            against: Vec::new(),
            embedded: false,
            nbdcaptive: None,
            idle: 10_000,
            // Not /tmp: that may be a tmpfs, and the file rows are about a file in the page cache of a disk.
            dir: std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).unwrap_or("/var/tmp".into()).into(),
            json: None,
        };
        while let Some(word) = words.next() {
            let (name, inline) = match word.split_once('=') {
                Some((name, value)) => (name.to_string(), Some(value.to_string())),
                None => (word, None),
            };
            match name.as_str() {
                "--quick" | "--embedded" | "--list" | "--help" | "-h" | "--bench" if inline.is_some() => {
                    return Err(format!("{name}: takes no value"));
                }
                "--quick" => (options.runs, options.millis) = (1, 500),
                "--embedded" => options.embedded = true,
                // cargo says this to every benchmark.
                "--bench" => {}
                "--list" => {
                    let names = Row::all().iter().map(|row| row.name() + "\n").collect::<String>();
                    return say(&names).map(|()| None);
                }
                "-h" | "--help" => return say(HELP).map(|()| None),
                _ => options.set(&name, || inline.or_else(|| words.next()).ok_or(format!("{name}: needs a value")))?,
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

    /// Takes an option that has a value.
    fn set(&mut self, name: &str, value: impl FnOnce() -> Result<String>) -> Result<()> {
        match name {
            "--runs" => self.runs = count(name, &value()?)?,
            "--idle" => self.idle = count(name, &value()?)?,
            "--seconds" => {
                let text = value()?;
                self.millis = match text.parse::<f64>() {
                    Ok(seconds) if (0.05..=86400.0).contains(&seconds) => (seconds * 1000.0).round() as u64,
                    _ => return Err(format!("--seconds: not between 0.05 and 86400: {text}")),
                };
            }
            "--rows" => self.rows.extend(list(&value()?)),
            "--only" => self.only.extend(list(&value()?)),
            "--against" | "--against-all" => {
                let rows = if name == "--against" { Rows::Memory } else { Rows::OfFio };
                let text = value()?;
                match text.split_once('=') {
                    Some((server, path)) if !server.is_empty() && !path.is_empty() => {
                        self.against.push(Against { name: server.to_string(), program: path.into(), rows });
                    }
                    _ => return Err(format!("{name}: not NAME=PATH: {text}")),
                }
            }
            "--nbdcaptive" => self.nbdcaptive = Some(value()?.into()),
            "--pin" => {
                let text = value()?;
                self.pins = match text.as_str() {
                    "one" => vec![Pin::One],
                    "two" => vec![Pin::Two],
                    "both" => vec![Pin::One, Pin::Two],
                    "none" => vec![Pin::None],
                    _ => return Err(format!("--pin: not one of one, two, both, none: {text}")),
                };
            }
            "--dir" => self.dir = value()?.into(),
            "--json" => self.json = Some(value()?.into()),
            _ => return Err(format!("unknown option {name}; try --help")),
        }
        Ok(())
    }

    pub fn rows(&self) -> Vec<Row> {
        let has = |name: &str, word: &str| match word.strip_prefix('-') {
            Some(unwanted) => !name.contains(unwanted),
            None => name.contains(word),
        };
        let wanted = |row: &Row| {
            let name = row.name();
            self.rows.is_empty() || self.rows.iter().any(|text| text.split_whitespace().all(|word| has(&name, word)))
        };
        Row::all().into_iter().filter(wanted).collect()
    }

    /// Whether one of [`KNOWN`] is to be measured.
    fn wants(&self, name: &str) -> bool {
        let named = |name: &str| self.only.iter().any(|only| only == name);
        match name {
            SIMPLE => named(SIMPLE) || !self.against.is_empty() && self.wants("nbdcaptive"),
            "embedded" => named(name) || self.embedded,
            _ => named(name) || self.only.is_empty(),
        }
    }

    /// In the order of the columns. Errors: a name that is unknown or there twice; no server has any of the rows.
    pub fn servers(&self) -> Result<Vec<Server>> {
        if let Some(name) = self.only.iter().find(|name| !KNOWN.contains(&name.as_str())) {
            return Err(format!("--only: not one of {}: {name}", KNOWN.join(", ")));
        }
        let mut servers = Vec::new();
        let simple = self.against.iter().map(|against| against.rows).max().unwrap_or(Rows::Memory);
        for name in KNOWN.into_iter().filter(|name| self.wants(name)) {
            let (kind, program) = match name {
                "nbdcaptive" => (Kind::Nbdkit, self.own_program()?),
                SIMPLE => (Kind::NoStructuredReplies(simple), self.own_program()?),
                "qemu-nbd" => (Kind::QemuNbd, name.into()),
                "embedded" => {
                    let program = std::env::current_exe().map_err(|error| format!("--embedded: {error}"))?;
                    (Kind::Embedded, program.into())
                }
                _ => (Kind::Nbdkit, name.into()),
            };
            servers.push(Server { name: name.to_string(), kind, program });
        }
        for Against { name, program, rows } in &self.against {
            if KNOWN.contains(&name.as_str()) || servers.iter().any(|server| server.name == *name) {
                return Err(format!("--against: {name} is measured already; choose another name"));
            }
            let place = servers.iter().position(|server| server.kind == Kind::Embedded).unwrap_or(servers.len());
            servers.insert(place, Server { name: name.clone(), kind: Kind::Against(*rows), program: program.clone() });
        }
        let rows = self.rows();
        servers.retain(|server| rows.iter().any(|row| server.serves(row)));
        if servers.is_empty() {
            return Err("no server is left that has one of these rows; docs/benchmarks.md says which has which".into());
        }
        Ok(servers)
    }

    fn own_program(&self) -> Result<OsString> {
        match (&self.nbdcaptive, option_env!("CARGO_BIN_EXE_nbdcaptive")) {
            (Some(path), _) => Ok(path.into()),
            (None, Some(path)) => Ok(path.into()),
            (None, None) => Err("built without cargo: say --nbdcaptive PATH or --only".into()),
        }
    }
}

fn count(name: &str, text: &str) -> Result<usize> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(format!("{name}: not a number above 0: {text}")),
    }
}

fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_string).collect()
}

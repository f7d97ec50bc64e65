//! Measures TLS beside nbdkit, with certificates and with pre-shared keys, over a Unix socket: nbdcopy in and out, small random
//! requests many at once, and handshakes. The servers take turns. The options are in `HELP` below.
//!
//! The client of the small requests is this program (fio's engine takes no TLS files): the engine's own, on one thread. It
//! speaks to both servers alike.

use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nbdcaptive_actors::client::{Handshake, Requests, Wishes};
use nbdcaptive_actors::device::Flags;
use nbdcaptive_actors::tls::{Check, ClientPem, Connector, ServerCertificates};
use nbdcaptive_actors::transport::Socket;
use smol::{Executor, block_on};

mod shared;

const HELP: &str = "\
Usage: cargo bench --bench tls -- [OPTIONS]

  --runs N              how often every row is measured (default 5)
  --size MIB            of the disk that is copied (default 512)
  --requests N          small requests for each measurement (default 100000)
  --handshakes N        for each measurement (default 1000)
  --nbdcaptive PATH     this binary instead of the one that cargo built
  --nbdkit PATH         to compare with (default nbdkit)
";

/// How long a server may take to listen.
const DEADLINE: Duration = Duration::from_secs(20);
/// Small requests that are under way at a time, and their length in bytes.
const DEPTH: usize = 64;
const SMALL: u32 = 4096;
const USER: &str = "bench";

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "tls: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Settings {
    runs: usize,
    /// MiB
    size: usize,
    requests: usize,
    handshakes: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Certificates,
    Keys,
}

/// What is measured; more is better in all of them.
const ROWS: [&str; 5] = [
    "nbdcopy in, MiB/s",
    "nbdcopy out, MiB/s",
    "4k random read q64, IOPS",
    "4k random write q64, IOPS",
    "handshakes/s",
];

fn run() -> Result<()> {
    let mut settings = Settings { runs: 5, size: 512, requests: 100_000, handshakes: 1000 };
    let mut numbers = [
        ("--runs", &mut settings.runs),
        ("--size", &mut settings.size),
        ("--requests", &mut settings.requests),
        ("--handshakes", &mut settings.handshakes),
    ];
    let Some(programs) = shared::options(HELP, &mut numbers)? else { return Ok(()) };
    let servers = [programs.nbdcaptive, programs.nbdkit];
    let place = Place::new(settings.size)?;
    println!("{:<32} {:>26} {:>26} {:>8}", "median (least..most)", "nbdcaptive", "nbdkit", "/nbdkit");
    for (kind, name) in [(Kind::Certificates, "certificates"), (Kind::Keys, "pre-shared keys")] {
        let mut found = [const { [const { Vec::new() }; ROWS.len()] }; 2];
        for run in 0..settings.runs {
            for turn in 0..2 {
                let which = (run + turn) % 2;
                let measured = measure(&place, &servers[which], kind, &settings)?;
                for (values, value) in found[which].iter_mut().zip(measured) {
                    values.push(value);
                }
            }
        }
        println!("{name}");
        for (row, title) in ROWS.iter().enumerate() {
            let [ours, theirs] = [0, 1].map(|which| Summary::of(&mut found[which][row]));
            println!("  {title:<30} {:>26} {:>26} {:>8.2}", ours.show(), theirs.show(), ours.median / theirs.median);
        }
    }
    Ok(())
}

struct Summary {
    median: f64,
    least: f64,
    most: f64,
}

impl Summary {
    fn of(values: &mut [f64]) -> Summary {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Summary { median: at(values.len() / 2), least: at(0), most: at(values.len().saturating_sub(1)) }
    }

    fn show(&self) -> String {
        format!("{:.0} ({:.0}..{:.0})", self.median, self.least, self.most)
    }
}

/// A private directory with certificates, keys and an image.
struct Place(PathBuf);

impl Place {
    fn new(size: usize) -> Result<Place> {
        let path = PathBuf::from(format!("/tmp/nbdcaptive-bench-tls-{}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let place = Place(path);
        place.shell(
            "certtool --generate-privkey --outfile ca-key.pem && \
             printf 'cn = bench\\nca\\ncert_signing_key\\n' > ca.info && \
             certtool --generate-self-signed --load-privkey ca-key.pem --template ca.info --outfile ca-cert.pem && \
             certtool --generate-privkey --outfile server-key.pem && \
             printf 'cn = localhost\\ndns_name = localhost\\ntls_www_server\\nencryption_key\\nsigning_key\\n' > server.info && \
             certtool --generate-certificate --load-ca-certificate ca-cert.pem --load-ca-privkey ca-key.pem \
                      --load-privkey server-key.pem --template server.info --outfile server-cert.pem && \
             psktool -u bench -p keys.psk",
        )?;
        // Nothing that could be left out or shortened.
        place.shell(&format!("head -c {size}M /dev/urandom > image"))?;
        Ok(place)
    }

    fn shell(&self, script: &str) -> Result<()> {
        let output = Command::new("sh").arg("-c").arg(script).current_dir(&self.0).output();
        let output = output.map_err(|error| format!("sh: {error}"))?;
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        fs::read(self.0.join(name)).map_err(|error| format!("{name}: {error}"))
    }

    fn show(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn connector(&self, kind: Kind) -> Result<Arc<dyn Connector>> {
        match kind {
            Kind::Certificates => {
                let authorities = self.read("ca-cert.pem")?;
                let pem = ClientPem { authorities: &authorities, own: None, revoked: None };
                let check = Check::Name("localhost".to_owned());
                Ok(Arc::new(ServerCertificates::new(pem, &check).map_err(|error| error.to_string())?))
            }
            #[cfg(feature = "psk")]
            Kind::Keys => {
                use nbdcaptive_actors::tls::{Keys, SharedKey};
                let keys = Keys::parse(&self.read("keys.psk")?).map_err(|error| error.to_string())?;
                Ok(Arc::new(SharedKey::new(&keys, USER.as_bytes())?))
            }
            #[cfg(not(feature = "psk"))]
            Kind::Keys => Err("built without the feature psk".to_owned()),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A server that is killed at the end.
struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn measure(place: &Place, server: &Path, kind: Kind, settings: &Settings) -> Result<[f64; ROWS.len()]> {
    let socket = place.0.join("socket");
    let _ = fs::remove_file(&socket);
    let (option, credentials) = match kind {
        Kind::Certificates => {
            (format!("--tls-certificates={}", place.0.display()), format!("tls-certificates={}", place.0.display()))
        }
        Kind::Keys => {
            (format!("--tls-psk={}", place.show("keys.psk")), format!("tls-psk-file={}", place.show("keys.psk")))
        }
    };
    let child = Command::new(server)
        .args(["-f", "--tls=require", &option, "-U"])
        .arg(&socket)
        .args(["memory", &format!("{}M", settings.size)])
        .stderr(Stdio::null())
        .spawn();
    let _serving = Serving(child.map_err(|error| format!("{}: {error}", server.display()))?);
    let start = Instant::now();
    while greeted(&socket).is_none() {
        if start.elapsed() > DEADLINE {
            return Err(format!("{} does not listen", server.display()));
        }
        thread::sleep(Duration::from_millis(5));
    }
    let uri = format!("nbds+unix://{USER}@/?socket={}&{credentials}", socket.display());
    let image = place.show("image");
    let size = settings.size as f64;
    let timed_copy = |from: &str, to: &str| {
        let start = Instant::now();
        let status = Command::new("nbdcopy").args(["--allocated", from, to]).status();
        match status {
            Ok(status) if status.success() => Ok(size / start.elapsed().as_secs_f64()),
            Ok(status) => Err(format!("nbdcopy: {status}")),
            Err(error) => Err(format!("nbdcopy: {error}")),
        }
    };
    // Twice: the first time the server's memory is new.
    timed_copy(&image, &uri)?;
    let copied = [timed_copy(&image, &uri)?, timed_copy(&uri, "null:")?];
    let connector = place.connector(kind)?;
    let small = [false, true].map(|writes| small(&socket, &connector, settings, writes));
    let [reads, writes] = small;
    Ok([copied[0], copied[1], reads?, writes?, handshakes(&socket, &connector, settings.handshakes)?])
}

/// Whether somebody says something at the socket.
fn greeted(socket: &Path) -> Option<()> {
    UnixStream::connect(socket).ok()?.read_exact(&mut [0; 18]).ok()
}

async fn secure(socket: &Path, connector: &Arc<dyn Connector>) -> Result<Handshake> {
    let stream = UnixStream::connect(socket).map_err(|error| format!("connect: {error}"))?;
    let transport = Socket::on_reactor(OwnedFd::from(stream)).map_err(|error| error.to_string())?;
    let mut handshake = Handshake::begin(Box::new(transport)).await.map_err(|error| error.to_string())?;
    handshake.start_tls(&**connector).await.map_err(|error| error.to_string())?;
    Ok(handshake)
}

/// Random requests over one connection, [`DEPTH`] at a time: how many a second.
fn small(socket: &Path, connector: &Arc<dyn Connector>, settings: &Settings, writes: bool) -> Result<f64> {
    let executor = Executor::new();
    let blocks = (settings.size << 20) as u64 / u64::from(SMALL);
    let each = settings.requests.div_ceil(DEPTH);
    block_on(executor.run(async {
        let handshake = secure(socket, connector).await?;
        let agreed = handshake.choose(&Wishes::export("")).await.map_err(|error| error.to_string())?;
        let (requests, connection) = agreed.start();
        let connection = executor.spawn(connection.run());
        let start = Instant::now();
        let tasks: Vec<_> = (0..DEPTH as u64)
            .map(|number| executor.spawn(one_after_another(requests.clone(), number, each, blocks, writes)))
            .collect();
        for task in tasks {
            task.await?;
        }
        let taken = start.elapsed().as_secs_f64();
        requests.disconnect().await.map_err(|error| error.to_string())?;
        connection.await.map_err(|error| error.to_string())?;
        Ok((each * DEPTH) as f64 / taken)
    }))
}

async fn one_after_another(requests: Requests, number: u64, count: usize, blocks: u64, writes: bool) -> Result<()> {
    // Marsaglia's xorshift: it has to be quick and the same for both servers, and no more.
    let mut random = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for _ in 0..count {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let offset = random % blocks * u64::from(SMALL);
        let done = if writes {
            requests.write(vec![number as u8; SMALL as usize], offset, Flags::default()).await
        } else {
            requests.read(offset, SMALL).await.map(drop)
        };
        done.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Connections, one after another, from connecting to the end of the TLS handshake: how many a second.
fn handshakes(socket: &Path, connector: &Arc<dyn Connector>, count: usize) -> Result<f64> {
    block_on(async {
        let start = Instant::now();
        for _ in 0..count {
            let handshake = secure(socket, connector).await?;
            handshake.abort().await.map_err(|error| error.to_string())?;
        }
        Ok(count as f64 / start.elapsed().as_secs_f64())
    })
}

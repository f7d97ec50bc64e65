//! `nbd`: the disk is another NBD server's. One connection for each client, or one for all.
//!
//! ```text
//!  a client's request ── thread that may wait ──Requests──> Connection, on a thread of its own ══> the other server
//! ```
//! Requests of one client go over the connection as they come, up to `--threads` at a time, and their replies as they come. A
//! connection that has ended stays so: its requests fail, and a new client gets a new one.
//! Source: nbdkit plugins/nbd/nbd.c, plugins/nbd/nbdkit-nbd-plugin.pod; libnbd generator/states-connect-socket-activation.c.

use std::ffi::{CStr, CString, OsString};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_io::Timer;
use dns_lookup::{AddrInfoHints, SockType, getaddrinfo};
use nbdcaptive_actors::client::{self, Handshake, Requests, Wishes};
use nbdcaptive_actors::device::{
    self, Call, Capabilities, Client, Device, Error, ErrorCode, Export, Exports, Extents, Flags, Segments, Support,
    ThreadModel,
};
use nbdcaptive_actors::protocol::constants::*;
use nbdcaptive_actors::transport::{Socket, Transport};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use smol::future::block_on;

use crate::captive::tree;
use crate::cli::Tls;
use crate::kept::{self, Program, Streams};
use crate::layer::{ANOTHER_NAME, About, ConfigError, Parameter, Plugin, Step, Value};
use crate::tls::{Ready, Wanted};
use crate::unblock::unblock;
use crate::uri::{self, Uri};
use crate::values;

const fn optional(key: &'static str, value: &'static str, help: &'static str) -> Parameter {
    Parameter { key, value, help, required: false }
}

/// See the module.
pub static ABOUT: About = About {
    name: "nbd",
    summary: "the disk of another NBD server

        nbdcaptive is a client of that server and passes everything on, so that filters can stand between it and its
        clients, or clients that speak an older dialect of the protocol can use it. Where the server is has to be
        said in one way: by a URI, a socket, a host, a command to start, or a descriptor.

        Each client has a connection of its own to the server, unless `shared=true`.

        # Examples

        Look at another server through a filter that makes errors:

            nbdcaptive memory 1M --run '
                nbdcaptive --filter=error nbd \"$uri\" error-rate=0 \\
                    --run \"nbdinfo \\\"\\$uri\\\"\"'

        A server that is started for it, and ends with it:

            nbdcaptive nbd command=nbdcaptive arg=-f arg=memory arg=1M \\
                --run 'nbdinfo --size \"$uri\"'
        ",
    parameters: &[
        optional("uri", "<URI>", "the server and its export"),
        optional("socket", "<SOCKNAME>", "the server's Unix socket"),
        optional("hostname", "<HOST>", "the server's host, for TCP"),
        optional("port", "<PORT>", "its port or the name of one, 10809 by default"),
        optional("vsock", "<CID>", "the server's vsock CID; port is then a number"),
        optional("cid", "<CID>", ANOTHER_NAME),
        optional("command", "<COMMAND>", "a server to start, which takes a socket as systemd gives it"),
        optional("arg", "<ARG>", "an argument for the command; may be repeated"),
        optional("socket-fd", "<FD>", "a descriptor that is connected to the server"),
        optional("export", "<NAME>", "the export to ask for, \"\" by default"),
        optional("dynamic-export", "<BOOL>", "ask for the export that the client asks for"),
        optional("retry", "<N>", "try so many times more to connect, a second apart"),
        optional("shared", "<BOOL>", "one connection for all clients, from the start on"),
        optional("tls", "<MODE>", "whether to use TLS: off, on where the server has it, or require"),
        optional("tls-certificates", "<DIR>", "the directory of the certificates to use"),
        optional("tls-verify", "<BOOL>", "false: anybody may be the server"),
        optional("tls-username", "<NAME>", "the user of the pre-shared key"),
        optional("tls-psk", "<FILE>", "the file of pre-shared keys; it goes before DIR"),
    ],
    magic_key: Some("uri"),
    thread_model: ThreadModel::Parallel,
    // Named as scripts know them, although there is no libnbd here.
    dump: &[("libnbd_tls", "1"), ("libnbd_uri", "1"), ("libnbd_vsock", "1"), ("libnbd_dynamic_list", "1")],
};

/// How long a server that was started may take to end after its only client has left, and then again after SIGTERM.
const LEAVE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

/// The longest path of a Unix socket, in bytes. Source: unix(7).
const LONGEST_PATH: usize = 107;

/// The plugin.
#[derive(Debug, Default)]
pub struct Nbd {
    uri: Option<String>,
    socket: Option<PathBuf>,
    hostname: Option<String>,
    port: Option<String>,
    vsock: Option<String>,
    command: Vec<OsString>,
    socket_fd: Option<RawFd>,
    export: Option<Vec<u8>>,
    dynamic_export: bool,
    retry: u32,
    shared: bool,
    /// `tls`, if it is said.
    tls: Option<Tls>,
    tls_certificates: Option<PathBuf>,
    tls_verify: Option<bool>,
    tls_username: Option<Vec<u8>>,
    tls_psk: Option<PathBuf>,
    remote: Option<Arc<Remote>>,
}

fn error<T>(line: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(line.into()))
}

fn absolute(value: Value<'_>) -> Result<PathBuf, ConfigError> {
    std::path::absolute(value.path()).map_err(|error| ConfigError(format!("{}: {error}", value.path().display())))
}

impl Nbd {
    /// What the parameters say of TLS, over what the URI did. One that needs it gets it.
    fn say_tls(&self, wanted: &mut Wanted) {
        let Nbd { tls, tls_certificates, tls_verify, tls_username, tls_psk, .. } = self;
        let is_given =
            tls_certificates.is_some() || tls_verify.is_some() || tls_username.is_some() || tls_psk.is_some();
        if wanted.mode != Tls::Require {
            wanted.mode = tls.unwrap_or(if is_given { Tls::On } else { Tls::Off });
        }
        let Wanted { certificates, keys, user, verify, .. } = wanted;
        if tls_certificates.is_some() {
            certificates.clone_from(tls_certificates);
        }
        if tls_psk.is_some() {
            keys.clone_from(tls_psk);
        }
        if tls_username.is_some() {
            user.clone_from(tls_username);
        }
        *verify = tls_verify.unwrap_or(*verify);
    }
}

impl Plugin for Nbd {
    fn callbacks(&self) -> &'static str {
        "longname unload dump_plugin config config_complete config_help after_fork list_exports \
         default_export open close export_description get_size block_size can_write can_flush \
         is_rotational can_trim can_zero can_fast_zero can_extents can_fua can_multi_conn can_cache pread \
         pwrite flush trim zero extents cache"
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        let boolean = || values::boolean(value.text(key)?).map_err(ConfigError);
        match key {
            "uri" => self.uri = Some(value.text(key)?.to_owned()),
            "socket" => self.socket = Some(absolute(value)?),
            "hostname" => self.hostname = Some(value.text(key)?.to_owned()),
            "port" => self.port = Some(value.text(key)?.to_owned()),
            "vsock" | "cid" => self.vsock = Some(value.text(key)?.to_owned()),
            "command" | "arg" => self.command.push(value.0.to_owned()),
            "socket-fd" => {
                let number = values::int(key, value.text(key)?).map_err(ConfigError)?;
                if number < 0 {
                    return error("socket-fd must be >= 0");
                }
                self.socket_fd = Some(number);
            }
            "export" => self.export = Some(value.bytes().to_vec()),
            "dynamic-export" => self.dynamic_export = boolean()?,
            "retry" => self.retry = values::unsigned(key, value.text(key)?).map_err(ConfigError)?,
            "shared" => self.shared = boolean()?,
            "tls" => {
                let forced = matches!(&*value.text(key)?.to_ascii_lowercase(), "require" | "required" | "force");
                self.tls = Some(match forced || boolean()? {
                    true if forced => Tls::Require,
                    true => Tls::On,
                    false => Tls::Off,
                });
            }
            "tls-certificates" => self.tls_certificates = Some(absolute(value)?),
            "tls-verify" => self.tls_verify = Some(boolean()?),
            "tls-username" => self.tls_username = Some(value.bytes().to_vec()),
            "tls-psk" => self.tls_psk = Some(absolute(value)?),
            _ => return error(format!("unknown parameter '{key}'")),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        let ways = [
            self.socket.is_some(),
            self.hostname.is_some(),
            self.uri.is_some(),
            !self.command.is_empty(),
            self.socket_fd.is_some(),
            self.vsock.is_some(),
        ];
        match ways.iter().filter(|given| **given).count() {
            0 => {
                return error(
                    "exactly one of ‘socket’, ‘hostname’, ‘vsock’, ‘command’, ‘socket-fd’ and ‘uri’ parameters must be \
                     specified",
                );
            }
            1 => {}
            _ => {
                return error(
                    "cannot mix Unix ‘socket’, TCP ‘hostname’/‘port’, ‘vsock’, ‘command’, ‘socket-fd’ and ‘uri’ \
                     parameters",
                );
            }
        }
        if self.port.is_some() && self.hostname.is_none() && self.vsock.is_none() {
            return error("‘port’ parameter should only be used with ‘hostname’ or ‘vsock’");
        }
        let export = self.export.clone().unwrap_or_default();
        if export.len() > NBD_MAX_STRING {
            return error(format!("export: the name is longer than {NBD_MAX_STRING} bytes"));
        }
        self.shared |= !self.command.is_empty() || self.socket_fd.is_some();
        if self.dynamic_export && self.export.is_some() {
            return error("cannot mix 'dynamic-export' with explicit export name");
        }
        if self.dynamic_export && self.shared {
            return error("cannot use 'dynamic-export' with shared connection");
        }
        let mut name = export.clone();
        let mut wanted = Wanted { hostname: self.hostname.clone(), ..Wanted::default() };
        let way = if let Some(text) = &self.uri {
            let uri = Uri::parse(text).map_err(|why| ConfigError(format!("uri: {text}: {why}")))?;
            wanted = Wanted::by_uri(&uri).map_err(|why| ConfigError(format!("uri: {text}: {why}")))?;
            name.clone_from(&uri.export_name);
            Way::Uri(uri)
        } else if let Some(path) = &self.socket {
            if path.as_os_str().len() > LONGEST_PATH {
                return error("socket file name too large");
            }
            Way::Unix(path.clone())
        } else if let Some(host) = &self.hostname {
            Way::Tcp { host: host.clone(), port: self.port.clone().unwrap_or_else(|| "10809".to_owned()) }
        } else if !self.command.is_empty() {
            let words = self.command.iter().map(|word| CString::new(word.as_bytes()));
            // They are words of the command line.
            Way::Command(words.collect::<Result<_, _>>().map_err(|error| ConfigError(format!("command: {error}")))?)
        } else if let Some(number) = self.socket_fd {
            Way::Taken(Mutex::new(Some(take_descriptor(number)?)))
        } else {
            // nbdkit's name for it.
            let cid = values::unsigned("vsock_cid", self.vsock.as_deref().unwrap_or_default()).map_err(ConfigError)?;
            let port = values::unsigned("port", self.port.as_deref().unwrap_or("10809")).map_err(ConfigError)?;
            Way::Vsock { cid, port }
        };
        self.say_tls(&mut wanted);
        self.remote = Some(Arc::new(Remote {
            way,
            tls: wanted.ready().map_err(ConfigError)?,
            name,
            // As in nbdkit, which does not look into the URI for this.
            default_name: export,
            dynamic: self.dynamic_export,
            retry: self.retry,
            command: Mutex::default(),
            shared: OnceLock::new(),
            open: Mutex::default(),
        }));
        Ok(())
    }

    fn after_fork(&mut self) -> Option<Step> {
        let remote = self.remote.clone().filter(|_| self.shared)?;
        Some(Box::new(move || {
            let connected = kept::starting(remote.connect(&remote.name));
            let connected = connected.map_err(|error| ConfigError(format!("nbd: {error}")))?;
            let link = connected.and_then(Link::start).map_err(|error| ConfigError(error.to_string()))?;
            // It is called once.
            let _ = remote.shared.set(Arc::new(link));
            Ok(())
        }))
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        let shared = self.shared;
        match self.remote {
            Some(remote) => Ok(Arc::new(RemoteExports { remote, shared })),
            None => error("exactly one of the parameters that name a server must be specified"),
        }
    }
}

/// Takes a descriptor of the caller's over, and leaves the original to no program that is started. Errors: it is not open.
fn take_descriptor(number: RawFd) -> Result<OwnedFd, ConfigError> {
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
    let taken =
        pidfd_open(getpid(), PidfdFlags::empty()).and_then(|own| pidfd_getfd(own, number, PidfdGetfdFlags::empty()));
    let taken = taken.map_err(|error| ConfigError(format!("socket-fd={number}: {error}")))?;
    let stat = rustix::fs::fstat(&taken).map_err(|error| ConfigError(format!("socket-fd={number}: {error}")))?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Socket {
        return error(format!("socket-fd={number}: this descriptor is no socket"));
    }
    crate::inherited::close_at_exec(number);
    Ok(taken)
}

/// The way to the server.
#[derive(Debug)]
enum Way {
    Uri(Uri),
    Unix(PathBuf),
    Tcp {
        host: String,
        /// A number, or the name of a service.
        port: String,
    },
    Vsock {
        cid: u32,
        port: u32,
    },
    Command(Vec<CString>),
    /// There until it is used.
    Taken(Mutex<Option<OwnedFd>>),
}

/// The other server.
#[derive(Debug)]
struct Remote {
    way: Way,
    tls: Ready,
    /// The export to ask for.
    name: Vec<u8>,
    /// What is said to be the name of the default export.
    default_name: Vec<u8>,
    /// The client's name is asked for instead.
    dynamic: bool,
    retry: u32,
    /// What was started and not waited for.
    command: Mutex<Option<Pid>>,
    /// The connection that all share, if they do.
    shared: OnceLock<Arc<Link>>,
    /// For descriptions, which are asked for by client: what is open for whom, the newest last.
    open: Mutex<Vec<(Client, Weak<Link>)>>,
}

fn failed(why: impl std::fmt::Display) -> Error {
    Error::failed(ErrorCode::Io, format!("nbd: {why}"))
}

impl Remote {
    async fn transport(&self) -> device::Result<Box<dyn Transport>> {
        let socket: OwnedFd = match &self.way {
            Way::Uri(uri) => return uri.connect().await.map_err(failed),
            Way::Unix(path) => connect_unix(path.clone()).await?,
            Way::Tcp { host, port } => {
                let name = format!("{host}:{port}");
                let cannot = |error| failed(format_args!("cannot connect to {name}: {error}"));
                let (host, port) = (host.clone(), port.clone());
                let addresses = unblock(move || {
                    let hints = AddrInfoHints { socktype: SockType::Stream.into(), ..AddrInfoHints::default() };
                    let found = getaddrinfo(Some(&host), Some(&port), Some(hints)).map_err(std::io::Error::from)?;
                    Ok(found.filter_map(Result::ok).map(|info| info.sockaddr).collect())
                });
                uri::connect_to_any(addresses.await.map_err(cannot)?).await.map_err(cannot)?
            }
            Way::Command(words) => {
                let (path, command) = start(words).map_err(|error| {
                    failed(format_args!(
                        "cannot start {}: {error}",
                        words.first().map_or("".into(), |word| word.to_string_lossy())
                    ))
                })?;
                // It is called once, for the connection is shared; and again only if it failed.
                let before = self.command.lock().unwrap_or_else(PoisonError::into_inner).replace(command);
                if let Some(before) = before {
                    let _ = kill(before, Signal::SIGKILL);
                    let _ = waitpid(before, None);
                }
                connect_unix(path).await?
            }
            Way::Vsock { cid, port } => {
                let (cid, port) = (*cid, *port);
                let connected = unblock(move || uri::vsock(cid, port)).await;
                connected.map_err(|error| failed(format_args!("cannot connect to vsock {cid}:{port}: {error}")))?
            }
            Way::Taken(socket) => {
                let taken = socket.lock().unwrap_or_else(PoisonError::into_inner).take();
                taken.ok_or_else(|| failed("socket-fd: the connection is over"))?
            }
        };
        Ok(Box::new(Socket::on_reactor(socket).map_err(failed)?))
    }

    /// Connects, and makes it secure where that is wanted.
    async fn begin(&self) -> device::Result<Handshake> {
        self.tls.begin(self.transport().await?).await.map_err(failed)
    }

    /// Connects and asks for the export `name`, again and again if need be.
    async fn connect(&self, name: &[u8]) -> device::Result<client::Agreed> {
        let wishes = Wishes::export(name);
        let mut left = self.retry;
        loop {
            let attempt = async { self.begin().await?.choose(&wishes).await.map_err(failed) };
            let attempt = match attempt.await {
                Err(error) => Err(self.why_it_failed(error).await),
                done => done,
            };
            match attempt {
                // A connection that was made by somebody else is there once.
                Err(_) if left > 0 && !matches!(self.way, Way::Taken(_)) => left -= 1,
                done => return done,
            }
            Timer::after(Duration::from_secs(1)).await;
        }
    }

    /// What became of the command that was to be the server, where that says more.
    async fn why_it_failed(&self, error: Error) -> Error {
        let Way::Command(words) = &self.way else { return error };
        let command = || self.command.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(pid) = *command() else { return error };
        // Who ends lets go of its socket first, and takes as long for the rest as a busy machine lets it. Who let go of it
        // on purpose, or has answered, may go on for ever.
        let deadline = Instant::now() + LEAVE[0];
        let ended = loop {
            match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) if Instant::now() < deadline || tree::is_ending(pid.as_raw()) => {
                    Timer::after(Duration::from_millis(1)).await;
                }
                Ok(WaitStatus::StillAlive) => return error,
                ended => break ended,
            }
        };
        *command() = None;
        let name = words.first().map_or("".into(), |word| word.to_string_lossy());
        match ended {
            Ok(WaitStatus::Exited(_, 127)) => failed(format_args!("command: {name}: not found")),
            Ok(WaitStatus::Exited(_, status)) => {
                Error::failed(ErrorCode::Io, format!("{error}: {name} ended with status {status}"))
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                Error::failed(ErrorCode::Io, format!("{error}: {name} was killed by signal {}", signal as i32))
            }
            _ => error,
        }
    }

    /// Asks the server something without choosing an export, for as long as the client is there to hear it.
    fn ask<T>(
        &self,
        client: &Client,
        question: impl AsyncFnOnce(&mut Handshake) -> Result<T, client::Error>,
    ) -> device::Result<T> {
        client.connection.wait(&Call::BLOCKING, self.asked(question))?
    }

    async fn asked<T>(
        &self,
        question: impl AsyncFnOnce(&mut Handshake) -> Result<T, client::Error>,
    ) -> device::Result<T> {
        let mut handshake = self.begin().await?;
        let answer = question(&mut handshake).await.map_err(failed)?;
        // It was answered; what becomes of the connection does not matter.
        let _ = handshake.abort().await;
        Ok(answer)
    }

    /// The name that the server has for its default export, where it tells.
    fn canonical_default(&self, client: &Client) -> Vec<u8> {
        let told = self.ask(client, async |handshake| handshake.info(b"").await);
        told.ok().and_then(|export| export.canonical_name).unwrap_or_default()
    }
}

async fn connect_unix(path: PathBuf) -> device::Result<OwnedFd> {
    let shown = path.display().to_string();
    let connected = unblock(move || uri::unix(&path)).await;
    Ok(connected.map_err(|error| failed(format_args!("cannot connect to {shown}: {error}")))?.into())
}

/// Starts a server with a socket as its descriptor 3, at which it is to listen. Where that is, and which process it is.
/// Source: sd_listen_fds(3).
fn start(words: &[CString]) -> std::io::Result<(PathBuf, Pid)> {
    let path = kept::directory()?.join("sock");
    let listener = OwnedFd::from(UnixListener::bind(&path)?);
    // Not 3 itself, which it is to become.
    let high = fcntl(&listener, FcntlArg::F_DUPFD_CLOEXEC(10))?;
    let third = take_descriptor(high).map_err(|error| std::io::Error::other(error.0))?;
    let _ = nix::unistd::close(high);
    // Only the process itself knows its number. What is not there is for us to say, see `why_it_failed`.
    let become_it = c"command -v -- \"$1\" >/dev/null 2>&1 || exit 127; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"";
    let environment: Vec<_> =
        kept::environment(&[]).into_iter().filter(|word| !word.as_bytes().starts_with(b"LISTEN_")).collect();
    let mut all: Vec<&CStr> = vec![c"sh", c"-c", become_it, c"sh"];
    all.extend(words.iter().map(CString::as_c_str));
    let program = Program { path: c"/bin/sh", words: &all, environment: &environment };
    let pid = kept::spawn(program, &Streams { third: Some(third), ..Streams::default() })?;
    Ok((path, pid))
}

/// A connection, with its export.
#[derive(Debug)]
struct Link {
    requests: RequestsOf,
}

/// [`Requests`] that can be shown.
struct RequestsOf(Requests);

impl std::fmt::Debug for RequestsOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Requests")
    }
}

impl Link {
    /// Gives the connection a thread, which ends with it.
    fn start(agreed: client::Agreed) -> device::Result<Link> {
        let (requests, connection) = agreed.start();
        // How it ended is told to whoever asks something of it.
        let thread = std::thread::Builder::new().name("nbd".to_owned());
        thread.spawn(move || drop(async_io::block_on(connection.run()))).map_err(failed)?;
        Ok(Link { requests: RequestsOf(requests) })
    }

    fn requests(&self) -> &Requests {
        &self.requests.0
    }

    /// The most that is asked for at once, in bytes: whole blocks.
    fn piece(&self) -> usize {
        let export = self.requests().export();
        let minimum = export.block_size.map_or(1, |size| size.minimum.max(1));
        let most = export.maximum_payload().min(MAX_PAYLOAD);
        (most - most % minimum).max(minimum) as usize
    }
}

/// What the server's error is to our clients.
fn told(error: client::Error) -> Error {
    let code = match &error {
        // It is not this server that is being shut down.
        client::Error::Violation(_) | client::Error::Ended(_) | client::Error::Transport(_) | client::Error::Closed => {
            ErrorCode::Io
        }
        error => error.code(),
    };
    Error::failed(code, format!("nbd: {error}"))
}

/// Devices of the other server.
struct RemoteExports {
    remote: Arc<Remote>,
    shared: bool,
}

impl Exports for RemoteExports {
    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        let remote = &self.remote;
        let link = match remote.shared.get() {
            Some(link) => Arc::clone(link),
            None if self.shared => return Err(failed("there is no connection")),
            None => {
                let name = match (remote.dynamic, client.export_name.is_empty()) {
                    (false, _) => remote.name.clone(),
                    (true, false) => client.export_name.clone(),
                    (true, true) => remote.canonical_default(client),
                };
                // Neither a server that does not answer nor one that is not there yet is waited for when this one ends.
                let agreed = client.connection.wait(&Call::BLOCKING, remote.connect(&name))??;
                Arc::new(Link::start(agreed)?)
            }
        };
        let mut open = remote.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, link)| link.strong_count() > 0);
        if !self.shared {
            open.push((client.clone(), Arc::downgrade(&link)));
        }
        Ok(Box::new(RemoteDevice { link, is_shared: self.shared }))
    }

    fn list(&self, client: &Client) -> device::Result<Vec<Export>> {
        let remote = &self.remote;
        if !remote.dynamic {
            let name = self.default_export(client)?.unwrap_or_default();
            return Ok(vec![Export { name, description: String::new() }]);
        }
        let listed = remote.ask(client, async |handshake| handshake.list().await)?;
        let export = |one: client::Listed| Export {
            name: one.name,
            description: String::from_utf8_lossy(&one.description).into_owned(),
        };
        Ok(listed.into_iter().map(export).collect())
    }

    fn default_export(&self, client: &Client) -> device::Result<Option<Vec<u8>>> {
        let remote = &self.remote;
        Ok(Some(if remote.dynamic { remote.canonical_default(client) } else { remote.default_name.clone() }))
    }

    fn description(&self, client: &Client) -> Option<String> {
        let link = match self.remote.shared.get() {
            Some(link) => Arc::clone(link),
            None => {
                let open = self.remote.open.lock().unwrap_or_else(PoisonError::into_inner);
                open.iter().rev().find(|(one, _)| one == client)?.1.upgrade()?
            }
        };
        let text = link.requests().export().description.clone()?;
        Some(String::from_utf8_lossy(&text).into_owned())
    }

    fn unloads(&self) -> bool {
        self.shared
    }

    fn unload(&self) -> device::Result<()> {
        if let Some(link) = self.remote.shared.get() {
            // A connection that has ended needs no goodbye.
            let _ = block_on(link.requests().disconnect());
        }
        let command = self.remote.command.lock().unwrap_or_else(PoisonError::into_inner).take();
        command.into_iter().for_each(leave);
        Ok(())
    }
}

/// Lets a server that was started end. It may have something to write first. What does not end is killed with all that we have
/// started.
fn leave(command: Pid) {
    for (patience, signal) in LEAVE.into_iter().zip([Some(Signal::SIGTERM), None]) {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if waitpid(command, Some(WaitPidFlag::WNOHANG)) != Ok(WaitStatus::StillAlive) {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // Ours, and not waited for.
        let _ = signal.map(|signal| kill(command, signal));
    }
}

/// One export of the other server.
struct RemoteDevice {
    link: Arc<Link>,
    is_shared: bool,
}

impl RemoteDevice {
    fn requests(&self) -> &Requests {
        self.link.requests()
    }

    /// Does something for each piece of a range that is no longer than one request may be.
    fn pieces(
        &self,
        length: usize,
        mut each: impl FnMut(std::ops::Range<usize>) -> Result<(), client::Error>,
    ) -> device::Result<()> {
        let piece = self.link.piece();
        let mut start = 0;
        while start < length {
            let end = length.min(start + piece);
            each(start..end).map_err(told)?;
            start = end;
        }
        Ok(())
    }
}

impl Device for RemoteDevice {
    fn size(&self) -> device::Result<u64> {
        Ok(self.requests().export().size)
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        let export = self.requests().export();
        let native = |flag, otherwise| if export.has(flag) { Support::Native } else { otherwise };
        Ok(Capabilities {
            write: !export.has(NBD_FLAG_READ_ONLY),
            flush: export.has(NBD_FLAG_SEND_FLUSH),
            trim: export.has(NBD_FLAG_SEND_TRIM),
            zero: native(NBD_FLAG_SEND_WRITE_ZEROES, Support::Emulate),
            fast_zero: export.has(NBD_FLAG_SEND_FAST_ZERO),
            fua: native(NBD_FLAG_SEND_FUA, Support::None),
            multi_conn: export.has(NBD_FLAG_CAN_MULTI_CONN),
            cache: native(NBD_FLAG_SEND_CACHE, Support::None),
            extents: export.contexts.iter().any(|context| context.name == b"base:allocation"),
            rotational: export.has(NBD_FLAG_ROTATIONAL),
            block_size: export.block_size,
            ..Capabilities::default()
        })
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _call: &Call) -> device::Result<()> {
        self.pieces(buffer.len(), |range| {
            // A range of a buffer that is no longer than a request may be.
            let data = block_on(self.requests().read(offset + range.start as u64, range.len() as u32))?;
            buffer[range].copy_from_slice(&data);
            Ok(())
        })
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, _call: &Call) -> device::Result<()> {
        self.pieces(length, |range| {
            let data = block_on(self.requests().read(offset + range.start as u64, range.len() as u32))?;
            reply.shared(Arc::new(data), 0..range.len());
            Ok(())
        })
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, _call: &Call) -> device::Result<()> {
        self.pieces(data.len(), |range| {
            let at = offset + range.start as u64;
            block_on(self.requests().write(data[range].to_vec(), at, flags))
        })
    }

    fn flush(&self, _call: &Call) -> device::Result<()> {
        block_on(self.requests().flush()).map_err(told)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, _call: &Call) -> device::Result<()> {
        block_on(self.requests().trim(offset, length, flags)).map_err(told)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, _call: &Call) -> device::Result<()> {
        block_on(self.requests().write_zeroes(offset, length, flags)).map_err(told)
    }

    fn cache(&self, length: u64, offset: u64, _call: &Call) -> device::Result<()> {
        block_on(self.requests().cache(offset, length)).map_err(told)
    }

    fn extents(&self, extents: &mut Extents, _call: &Call) -> device::Result<()> {
        let requests = self.requests();
        let (mut offset, length) = (extents.offset(), extents.length());
        let contexts = block_on(requests.block_status(offset, length, extents.one())).map_err(told)?;
        let allocation = requests.export().contexts.iter().find(|context| context.name == b"base:allocation");
        let id = allocation.map(|context| context.id);
        for extent in contexts.into_iter().filter(|context| Some(context.id) == id).flat_map(|context| context.extents)
        {
            if !extents.add(offset, extent.length, extent.status & (device::HOLE | device::ZERO)) {
                break;
            }
            offset = offset.saturating_add(extent.length);
        }
        Ok(())
    }

    fn close(&self) -> device::Result<()> {
        if !self.is_shared {
            // A connection that has ended needs no goodbye; what it has lost was told by a flush.
            let _ = block_on(self.requests().disconnect());
        }
        Ok(())
    }
}

//! `pause`: requests wait while somebody has said so on a socket: `p` to pause, `r` to resume, each answered with its capital when
//! it is so. Source: nbdkit filters/pause/pause.c, nbdkit-pause-filter.pod.

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_io::{Async, Timer};
use event_listener::{Event, listener};
use nbdcaptive_actors::device::{Call, Client, Connection, Device, Error, Exports, Extents, Result, ThreadModel};
use nbdcaptive_actors::filter::{FilterExports, Filtered, FilteredExports, Next};
use smol::io::{AsyncReadExt, AsyncWriteExt};

use super::kit::{Gate, Gated, Request, absolute, required, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "pause",
    summary: "let requests wait while somebody says so

        Whoever connects to the socket and sends `p` makes requests wait; `P` comes back when those that had begun
        are answered. `r` lets them go on, and `R` comes back. It matters to nobody but whoever wants to look at a
        disk that stands still.

        # Examples

            nbdcaptive --filter=pause memory 1M pause-control=pause.sock \\
                --run 'printf pr | socat - UNIX-CONNECT:pause.sock'
        ",
    parameters: &[required("pause-control", "<SOCKET>", "the Unix socket to say it on; whatever is there is removed")],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The longest path of a socket, in bytes, without the byte at its end.
const MAX_PATH: usize = 107;

/// How long the control socket is left alone when a connection cannot be accepted, for want of descriptors.
const REST: Duration = Duration::from_millis(100);

/// The filter.
#[derive(Debug, Default)]
pub struct Pause(Option<PathBuf>);

impl Filter for Pause {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "pause-control" => self.0 = Some(absolute(value)?),
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> std::result::Result<(), ConfigError> {
        let Some(path) = &self.0 else { return Err(ConfigError("pause-control socket was not set".to_owned())) };
        let length = path.as_os_str().len();
        if length > MAX_PATH {
            let line = format!("pause-control socket path too long: length {length} > max {MAX_PATH} bytes");
            return Err(ConfigError(line));
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let path = self.0.unwrap_or_default();
        // It may be left over from a server that was killed. What is wrong with it shows next.
        let _ = std::fs::remove_file(&path);
        let failed = |error: io::Error| ConfigError(format!("{}: {error}", path.display()));
        let socket = UnixListener::bind(&path).map_err(failed)?;
        let state = Arc::new(State::default());
        // An event that never happens: what the server runs beside everything else, to its end.
        let listening = Arc::clone(&state);
        lifetime.exit_when.push(Box::pin(async move {
            match listening.control(socket).await {
                Ok(never) => match never {},
                // A server that can no longer be told to go on is of no use.
                Err(error) => format!("pause-control: {error}"),
            }
        }));
        Ok(Arc::new(FilteredExports(Paused { next, state, path: Mutex::new(Some(path)) })))
    }
}

/// Whether requests wait, and how many are under way.
#[derive(Default)]
struct State {
    is_paused: AtomicBool,
    requests: AtomicUsize,
    /// One of the two has changed.
    changed: Event,
}

impl State {
    /// Serves the control socket, one connection after another. Errors: the socket cannot be used.
    async fn control(&self, socket: UnixListener) -> io::Result<Infallible> {
        let socket = Async::new(socket)?;
        loop {
            match socket.accept().await {
                // Whoever has said something bad or has left is of no more interest.
                Ok((mut stream, _)) => drop(self.obey(&mut stream).await),
                Err(_) => drop(Timer::after(REST).await),
            }
        }
    }

    async fn obey<S: AsyncReadExt + AsyncWriteExt + Unpin>(&self, stream: &mut S) -> io::Result<()> {
        let mut word = [0];
        while stream.read(&mut word).await? == 1 {
            let answer = match word[0] {
                b'p' => {
                    self.is_paused.store(true, Ordering::SeqCst);
                    self.until(|| self.requests.load(Ordering::SeqCst) == 0).await;
                    b'P'
                }
                b'r' => {
                    self.is_paused.store(false, Ordering::SeqCst);
                    self.changed.notify(usize::MAX);
                    b'R'
                }
                b'\n' | b'\t' | b' ' => continue,
                _ => b'X',
            };
            stream.write_all(&[answer]).await?;
        }
        Ok(())
    }

    /// Waits until it is so. It must become so with a change that is told.
    async fn until(&self, is_so: impl Fn() -> bool) {
        loop {
            listener!(self.changed => listener);
            if is_so() {
                return;
            }
            listener.await;
        }
    }

    /// Counts a request in, unless requests wait.
    fn enter(&self) -> bool {
        self.requests.fetch_add(1, Ordering::SeqCst);
        // After it was counted: either it is seen here that requests wait, or whoever let them wait sees the request.
        let enters = !self.is_paused.load(Ordering::SeqCst);
        if !enters {
            self.leave();
        }
        enters
    }

    fn leave(&self) {
        self.requests.fetch_sub(1, Ordering::SeqCst);
        self.changed.notify(usize::MAX);
    }
}

struct Paused {
    next: Arc<dyn Exports>,
    state: Arc<State>,
    /// The socket, until it is removed.
    path: Mutex<Option<PathBuf>>,
}

impl Paused {
    fn remove(&self) {
        if let Some(path) = self.path.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Whoever removed it before us has done no harm.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Also of a server that never started.
impl Drop for Paused {
    fn drop(&mut self) {
        self.remove();
    }
}

impl FilterExports for Paused {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = Next::open(&*self.next, client)?;
        let (state, connection) = (Arc::clone(&self.state), client.connection.clone());
        Ok(Box::new(Filtered(Gated(Disk { next, state, connection }))))
    }

    fn unloads(&self) -> bool {
        true
    }

    fn unload(&self) -> Result<()> {
        self.remove();
        Ok(())
    }
}

struct Disk {
    next: Next,
    state: Arc<State>,
    connection: Connection,
}

impl Gate for Disk {
    /// Whether it was counted.
    type Pass = bool;

    fn next(&self) -> &Next {
        &self.next
    }

    fn before(&self, request: &Request, call: &Call) -> Result<bool> {
        if *request == Request::Flush {
            return Ok(false);
        }
        while !self.state.enter() {
            if !call.may_block() {
                return Err(Error::WouldBlock);
            }
            self.connection.wait(call, self.state.until(|| !self.state.is_paused.load(Ordering::SeqCst)))?;
        }
        Ok(true)
    }

    fn after(&self, counted: bool, _request: &Request, _result: &Result<()>, _map: Option<&Extents>) {
        if counted {
            self.state.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{memory, refused};
    use std::thread;

    fn disk(state: &Arc<State>) -> Box<dyn Device> {
        let next = Next::open(&*memory("1M"), &Client::default()).unwrap();
        Box::new(Filtered(Gated(Disk { next, state: Arc::clone(state), connection: Connection::default() })))
    }

    /// What is answered to these words, once they are all answered.
    fn say(state: &State, words: &[u8]) -> Vec<u8> {
        let mut stream = Conversation { said: words.to_vec(), heard: Vec::new() };
        smol::block_on(state.obey(&mut stream)).unwrap();
        stream.heard
    }

    struct Conversation {
        said: Vec<u8>,
        heard: Vec<u8>,
    }

    impl smol::io::AsyncRead for Conversation {
        fn poll_read(
            mut self: std::pin::Pin<&mut Self>,
            _cx: &mut std::task::Context<'_>,
            buffer: &mut [u8],
        ) -> std::task::Poll<io::Result<usize>> {
            if self.said.is_empty() {
                return std::task::Poll::Ready(Ok(0));
            }
            buffer[0] = self.said.remove(0);
            std::task::Poll::Ready(Ok(1))
        }
    }

    impl smol::io::AsyncWrite for Conversation {
        fn poll_write(
            mut self: std::pin::Pin<&mut Self>,
            _cx: &mut std::task::Context<'_>,
            bytes: &[u8],
        ) -> std::task::Poll<io::Result<usize>> {
            self.heard.extend_from_slice(bytes);
            std::task::Poll::Ready(Ok(bytes.len()))
        }
        fn poll_flush(
            self: std::pin::Pin<&mut Self>,
            _cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            std::task::Poll::Ready(Ok(()))
        }
        fn poll_close(
            self: std::pin::Pin<&mut Self>,
            _cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            std::task::Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn words_are_answered_with_capitals() {
        assert_eq!(say(&State::default(), b"p p\nr\trx"), b"PPRRX");
    }

    #[test]
    fn requests_wait_until_they_may_go_on() {
        let state = Arc::new(State::default());
        let disk = disk(&state);
        disk.read(&mut [0], 0, &Call::AT_ONCE).unwrap();
        assert_eq!(say(&state, b"p"), b"P");
        assert!(matches!(disk.read(&mut [0], 0, &Call::AT_ONCE), Err(Error::WouldBlock)));
        disk.flush(&Call::AT_ONCE).unwrap();
        let waiting = thread::spawn(move || disk.read(&mut [0], 0, &Call::BLOCKING));
        assert_eq!(say(&state, b"r"), b"R");
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn a_pause_waits_for_requests_that_are_under_way() {
        let state = Arc::new(State::default());
        assert!(state.enter());
        let pausing = {
            let state = Arc::clone(&state);
            thread::spawn(move || say(&state, b"p"))
        };
        while !state.is_paused.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        assert!(!state.enter());
        assert!(!pausing.is_finished());
        state.leave();
        assert_eq!(pausing.join().unwrap(), b"P");
    }

    #[test]
    fn the_socket_must_be_given_and_fit() {
        assert_eq!(refused("pause", &[]), "pause-control socket was not set");
        let long = format!("/{}", "x".repeat(107));
        let why = refused("pause", &[("pause-control", &long)]);
        assert_eq!(why, "pause-control socket path too long: length 108 > max 107 bytes");
        assert!(refused("pause", &[("pause-control", "/no/such/directory/x")]).starts_with("/no/such/directory/x: "));
    }
}

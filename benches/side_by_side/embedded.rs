//! A server that is this program itself: what a program pays that embeds the engine. It has the memory plugin's disk,
//! and the threads and the spinning that the command line has by default.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use nbdcaptive::layer::{ConfigError, Plugin, Value};
use nbdcaptive::plugins::memory::Memory;
use nbdcaptive_actors::Server;
use nbdcaptive_actors::device::Exports;
use smol::Executor;

use crate::Result;

/// What stands before SOCKET and SIZE on the command line.
pub const WORD: &str = "--serve-embedded";
/// As the default of `--spin`.
const SPIN: Duration = Duration::from_micros(50);

/// Serves until the process is ended.
pub fn serve(words: &[String]) -> Result<()> {
    let [socket, size] = words else { return Err(format!("{WORD}: takes SOCKET and SIZE")) };
    let exports = memory(size).map_err(|error| error.to_string())?;
    let executor = Arc::new(Executor::new());
    let ended = smol::block_on(executor.run(async {
        let socket = UnixListener::bind(socket)?;
        let server = Server::new(exports).listen(socket).workers_per_core().spin(SPIN).start(&executor)?;
        Ok(server.wait().await)
    }));
    match ended.map_err(|error: std::io::Error| format!("{socket}: {error}"))?.failure {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

/// A disk of the memory plugin.
fn memory(size: &str) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
    let mut plugin: Box<dyn Plugin> = Box::<Memory>::default();
    plugin.config("size", Value(size.as_ref()))?;
    plugin.config_complete()?;
    plugin.ready()
}

//! A smol program of its own that serves a disk of its own inside its own executor.
//!
//! The disk is a pattern that the compiler made: nothing is stored. The program listens on a Unix socket, serves until the
//! first client has come and gone (or until it is told to stop by a line on stdin), asks the server to end, and waits until
//! every request in flight was answered.
//!
//! ```text
//! cargo run --example embed /tmp/pattern.sock
//! nbdinfo 'nbd+unix:///?socket=/tmp/pattern.sock'
//! ```

use std::os::unix::net::UnixListener;
use std::sync::Arc;

use nbdcaptive_actors::device::{Call, Capabilities, Device, Result, Same};
use nbdcaptive_actors::{Cause, Server};
use smol::Executor;
use smol::io::{AsyncBufReadExt, BufReader};

/// Every eight bytes say where they are, as a big-endian number.
struct Pattern;

/// One page of the pattern, made at compile time; only the page's number is missing in it.
const PAGE: [u8; 4096] = {
    let mut page = [0; 4096];
    let mut at = 0;
    while at < page.len() {
        page[at + 6] = (at >> 8) as u8;
        page[at + 7] = at as u8;
        at += 8;
    }
    page
};

impl Device for Pattern {
    fn size(&self) -> Result<u64> {
        Ok(1 << 30)
    }

    fn capabilities(&self) -> Result<Capabilities> {
        // The same for everyone and for ever, so any number of connections may read it.
        Ok(Capabilities { multi_conn: true, ..Capabilities::default() })
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _call: &Call) -> Result<()> {
        for (byte, at) in buffer.iter_mut().zip(offset..) {
            let word = (at & !0xfff) | u64::from(PAGE[(at & 0xff8) as usize + 6]) << 8;
            let word = word | u64::from(PAGE[(at & 0xff8) as usize + 7]);
            *byte = word.to_be_bytes()[(at % 8) as usize];
        }
        Ok(())
    }
}

fn main() -> std::io::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "/tmp/nbdcaptive-embed.sock".to_owned());
    let executor = Arc::new(Executor::new());
    smol::block_on(executor.run(async {
        let socket = UnixListener::bind(&path)?;
        let server = Server::new(Arc::new(Same::new(Pattern))).listen(socket).exit_last(true).start(&executor)?;
        println!("serving at nbd+unix:///?socket={path}");

        // Anything of the program's own may end it: here, a line or the end of stdin.
        let handle = server.handle();
        let stop = executor.spawn(async move {
            let mut line = String::new();
            let _ = BufReader::new(smol::Unblock::new(std::io::stdin())).read_line(&mut line).await;
            handle.shut_down(Cause::Requested);
        });

        let outcome = server.wait().await;
        drop(stop);
        std::fs::remove_file(&path)?;
        println!("ended because {}; nothing was left unanswered", outcome.cause);
        Ok(())
    }))
}

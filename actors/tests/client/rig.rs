//! A client and its server at the two ends of a socket: the engine with a disk in memory, or a script.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use nbdcaptive_actors::Server;
use nbdcaptive_actors::client::{Agreed, Connection, Error, Requests, Wishes, negotiate};
use nbdcaptive_actors::device::{
    Call, Capabilities, Client, Device, Error as DeviceError, Exports, Extents, Flags, Result, Support,
};
use nbdcaptive_actors::protocol::ErrorCode;
use nbdcaptive_actors::protocol::constants::*;
use nbdcaptive_actors::transport::{Socket, Transport};
use smol::{Executor, Task};

/// The size of the disk, in bytes.
pub const SIZE: usize = 1 << 20;
/// Reads and writes of this byte fail.
pub const BAD: u64 = 999_999;

/// A disk in memory. An export whose name starts with `no` is not to be had.
#[derive(Clone)]
pub struct Disk(pub Arc<Mutex<Vec<u8>>>);

impl Disk {
    pub fn new() -> Disk {
        Disk(Arc::new(Mutex::new(vec![0; SIZE])))
    }

    fn with<T>(&self, offset: u64, length: u64, work: impl FnOnce(&mut [u8]) -> T) -> Result<T> {
        if (offset..offset + length).contains(&BAD) {
            return Err(DeviceError::failed(ErrorCode::Io, "a bad byte"));
        }
        let mut bytes = self.0.lock().expect("nobody panics here");
        Ok(work(&mut bytes[offset as usize..(offset + length) as usize]))
    }
}

impl Exports for Disk {
    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        if client.export_name.starts_with(b"no") {
            return Err(DeviceError::failed(ErrorCode::Invalid, "no such disk"));
        }
        Ok(Box::new(self.clone()))
    }

    fn description(&self, _client: &Client) -> Option<String> {
        Some("a disk in memory".into())
    }
}

impl Device for Disk {
    fn size(&self) -> Result<u64> {
        Ok(SIZE as u64)
    }

    fn capabilities(&self) -> Result<Capabilities> {
        Ok(Capabilities {
            write: true,
            flush: true,
            trim: true,
            zero: Support::Native,
            fast_zero: true,
            fua: Support::Native,
            multi_conn: true,
            cache: Support::Native,
            extents: true,
            ..Capabilities::default()
        })
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _call: &Call) -> Result<()> {
        self.with(offset, buffer.len() as u64, |bytes| buffer.copy_from_slice(bytes))
    }

    fn write(&self, data: &[u8], offset: u64, _flags: Flags, _call: &Call) -> Result<()> {
        self.with(offset, data.len() as u64, |bytes| bytes.copy_from_slice(data))
    }

    fn trim(&self, length: u64, offset: u64, _flags: Flags, _call: &Call) -> Result<()> {
        self.with(offset, length, |bytes| bytes.fill(0))
    }

    fn zero(&self, length: u64, offset: u64, _flags: Flags, _call: &Call) -> Result<()> {
        self.with(offset, length, |bytes| bytes.fill(0))
    }

    /// Blocks of zeroes are holes.
    fn extents(&self, extents: &mut Extents, _call: &Call) -> Result<()> {
        let bytes = self.0.lock().expect("nobody panics here");
        let mut offset = extents.offset();
        for block in bytes[offset as usize..(offset + extents.length()) as usize].chunks(4096) {
            let hole = block.iter().all(|&byte| byte == 0);
            extents.add(offset, block.len() as u64, if hole { 3 } else { 0 });
            offset += block.len() as u64;
        }
        Ok(())
    }
}

pub fn transport(socket: UnixStream) -> Box<dyn Transport> {
    Box::new(Socket::on_reactor(socket.into()).expect("a socket can be watched"))
}

/// Runs a client against the engine, set up by `prepare`. The server has ended when this returns.
pub fn with_engine<T>(
    disk: Disk,
    prepare: impl FnOnce(Server) -> Server,
    client: impl AsyncFnOnce(&Executor<'static>, Box<dyn Transport>) -> T,
) -> T {
    with_exports(disk, prepare, client)
}

/// As [`with_engine`], of any device.
pub fn with_exports<T>(
    exports: impl Exports,
    prepare: impl FnOnce(Server) -> Server,
    client: impl AsyncFnOnce(&Executor<'static>, Box<dyn Transport>) -> T,
) -> T {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let executor = Arc::new(Executor::new());
    smol::block_on(executor.run(async {
        let socket = Socket::on_reactor(theirs.into()).expect("a socket can be watched");
        let server = prepare(Server::new(Arc::new(exports))).serve_one(socket);
        let running = server.start(&executor).expect("nothing is in its way");
        let result = client(&executor, transport(ours)).await;
        running.wait().await;
        result
    }))
}

/// Runs a client against a server that does what the script says.
pub fn with_script<T>(
    server: impl FnOnce(Peer) + Send + 'static,
    client: impl AsyncFnOnce(&Executor<'static>, Box<dyn Transport>) -> T,
) -> T {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let server = thread::spawn(move || server(Peer(theirs)));
    let executor = Executor::new();
    let result = smol::block_on(executor.run(client(&executor, transport(ours))));
    // With it goes what is still to be dropped, sockets among it.
    drop(executor);
    server.join().expect("the script was followed");
    result
}

/// Chooses the export and starts the actor.
pub async fn connect(
    executor: &Executor<'static>,
    transport: Box<dyn Transport>,
    wishes: &Wishes,
) -> (Requests, Task<std::result::Result<(), Error>>) {
    let agreed: Agreed = negotiate(transport, wishes).await.expect("the export is there");
    let (requests, connection): (Requests, Connection) = agreed.start();
    (requests, executor.spawn(connection.run()))
}

/// A server's end of the socket, in a thread of its own. Who finds the client gone has nothing more to do.
pub struct Peer(pub UnixStream);

impl Peer {
    pub fn send(&mut self, bytes: &[u8]) {
        // The client may have seen enough.
        let _ = self.0.write_all(bytes);
    }

    /// So many bytes from the client, or less at its end.
    pub fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = Read::by_ref(&mut self.0).take(count as u64).read_to_end(&mut bytes);
        bytes
    }

    /// An option that the client sends: what it is, and its data.
    pub fn option(&mut self) -> (u32, Vec<u8>) {
        let header = self.receive(16);
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let data = self.receive(number(12) as usize);
        (number(8), data)
    }

    pub fn reply(&mut self, option: u32, reply: u32, data: &[u8]) {
        self.send(&option_reply(option, reply, data));
    }

    /// The handshake of a server that has those headers, contexts 5 (`base:allocation`) and 6, and one export.
    pub fn shake_hands(&mut self, headers: u32, flags: u16) {
        self.send(&greeting(3));
        assert_eq!(self.receive(4), [0, 0, 0, 3]);
        loop {
            let (option, _) = self.option();
            match option {
                NBD_OPT_EXTENDED_HEADERS | NBD_OPT_STRUCTURED_REPLY if option == headers => {
                    self.reply(option, NBD_REP_ACK, &[]);
                }
                NBD_OPT_SET_META_CONTEXT => {
                    self.reply(option, NBD_REP_META_CONTEXT, b"\0\0\0\x05base:allocation");
                    self.reply(option, NBD_REP_META_CONTEXT, b"\0\0\0\x06x:y");
                    self.reply(option, NBD_REP_ACK, &[]);
                }
                NBD_OPT_GO => {
                    self.reply(option, NBD_REP_INFO, &info_export(SIZE as u64, flags));
                    self.reply(option, NBD_REP_ACK, &[]);
                    return;
                }
                _ => self.reply(option, NBD_REP_ERR_UNSUP, b"not here"),
            }
        }
    }

    /// A request in extended form, without its payload: flags, type, cookie, offset, length.
    pub fn extended_request(&mut self) -> (u16, u16, u64, u64, u64) {
        let bytes = self.receive(32);
        assert_eq!(bytes[..4], NBD_EXTENDED_REQUEST_MAGIC.to_be_bytes());
        let short = |at: usize| u16::from_be_bytes(bytes[at..at + 2].try_into().expect("two bytes"));
        let long = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        (short(4), short(6), long(8), long(16), long(24))
    }

    /// Waits for the client to go.
    pub fn expect_end(&mut self) {
        let mut rest = Vec::new();
        let _ = self.0.read_to_end(&mut rest);
    }
}

pub fn greeting(flags: u16) -> Vec<u8> {
    [&b"NBDMAGICIHAVEOPT"[..], &flags.to_be_bytes()].concat()
}

pub fn option_reply(option: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = NBD_OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    for number in [option, reply, data.len() as u32] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(data);
    bytes
}

pub fn info_export(size: u64, flags: u16) -> Vec<u8> {
    [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
}

pub fn simple(error: u32, cookie: u64) -> Vec<u8> {
    [&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

/// A structured chunk.
pub fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// An extended chunk.
pub fn extended_chunk(flags: u16, kind: u16, cookie: u64, offset: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = NBD_EXTENDED_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    for number in [cookie, offset, payload.len() as u64] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(payload);
    bytes
}

pub fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes()[..], bytes].concat()
}

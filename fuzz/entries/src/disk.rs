//! The server under test: the memory plugin behind a device of many moods, and a server whose settings are a few bytes.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nbdcaptive::layer::Value;
use nbdcaptive::plugins;
use nbdcaptive_actors::Server;
use nbdcaptive_actors::device::{
    BlockSize, Blocks, Call, Capabilities, Client, Device, Error, ErrorCode, Export, Exports, Extents, Flags,
    MetaContext, Result, Segments, Support, ThreadModel,
};

/// What a server and its device are like. All zeroes are the plainest.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    server: u8,
    device: u8,
    without: u8,
}

/// How many bytes a [`Setting`] is made of.
pub const SETTING: usize = 3;

impl Setting {
    /// From bytes that may be any.
    pub fn new([server, device, without]: [u8; SETTING]) -> Setting {
        Setting { server, device, without }
    }

    /// No client may write.
    pub fn read_only(&self) -> bool {
        self.server & 1 != 0
    }

    /// How calls are kept apart.
    pub fn thread_model(&self) -> ThreadModel {
        match self.server >> 3 & 3 {
            0 => ThreadModel::Parallel,
            1 => ThreadModel::SerializeRequests,
            2 => ThreadModel::SerializeAllRequests,
            _ => ThreadModel::SerializeConnections,
        }
    }

    /// Ends with its last client.
    pub fn exit_last(&self) -> bool {
        self.server & 1 << 6 != 0
    }

    /// Speaks the oldstyle handshake.
    pub fn oldstyle(&self) -> bool {
        self.server & 1 << 5 != 0 && self.without & 3 == 3
    }

    /// How many clients may be there at a time.
    pub fn max_clients(&self) -> Option<usize> {
        (self.without & 1 != 0).then_some(3)
    }

    /// How long a handshake may take.
    pub fn handshake_timeout(&self) -> Option<Duration> {
        (self.server & 1 << 7 != 0).then_some(Duration::from_secs(10))
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        match self.device >> 3 & 7 {
            0 | 1 => 1 << 20,
            2 => 0,
            3 => 1,
            4 => 100_001,
            5 => 200 << 20,
            6 => 1 << 40,
            _ => i64::MAX as u64,
        }
    }

    /// Small enough to be kept twice.
    pub fn is_small(&self) -> bool {
        self.size() <= 1 << 20
    }

    /// Every reply comes in the order of the requests, because each is answered when it comes.
    pub fn in_order(&self) -> bool {
        // What is much, and what is made of other calls, takes a thread also where the device does not wait.
        let made_of_others = self.without & (1 << 3 | 1 << 5) != 0 || self.fails();
        self.is_small() && !made_of_others && !matches!(self.device & 3, 1 | 2)
    }

    /// Some requests fail.
    pub fn fails(&self) -> bool {
        self.device & 1 << 2 != 0
    }

    fn block_size(&self) -> Option<BlockSize> {
        match self.device >> 6 {
            0 => None,
            1 => Some(BlockSize { minimum: 1, preferred: 4096, maximum: 1 << 16 }),
            2 => Some(BlockSize { minimum: 512, preferred: 4096, maximum: u32::MAX }),
            _ => Some(BlockSize { minimum: 65536, preferred: 65536, maximum: 1 << 25 }),
        }
    }

    /// The server, and what counts the bytes that its devices have given for reads.
    pub fn server(self) -> (Server, Arc<AtomicU64>) {
        let given = Arc::new(AtomicU64::new(0));
        let exports = Moody { setting: self, disk: memory(self.size()), given: Arc::clone(&given) };
        let server = Server::new(Arc::new(exports))
            .read_only(self.read_only())
            .structured_replies(self.server & 1 << 1 == 0)
            .meta_contexts(self.server & 1 << 2 == 0)
            .mask_handshake(if self.server & 1 << 5 == 0 { u16::MAX } else { u16::from(self.without & 3) })
            .oldstyle(self.oldstyle())
            .max_clients(self.max_clients())
            .exit_last(self.exit_last())
            .handshake_timeout(self.handshake_timeout())
            .threads(if self.without & 1 == 0 { 16 } else { 2 });
        (server, given)
    }
}

/// The memory plugin as the command line makes it.
fn memory(size: u64) -> Arc<dyn Exports> {
    let ready = || {
        let mut plugin = (plugins::find("memory")?.new)();
        plugin.config("size", Value(OsStr::new(&size.to_string()))).ok()?;
        plugin.config_complete().ok()?;
        plugin.ready().ok()
    };
    ready().expect("the memory plugin takes every size")
}

struct Moody {
    setting: Setting,
    disk: Arc<dyn Exports>,
    given: Arc<AtomicU64>,
}

impl Exports for Moody {
    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        if client.export_name.first() == Some(&b'!') {
            return Err(Error::failed(ErrorCode::Invalid, "there is no such export"));
        }
        let disk = self.disk.open(client)?;
        Ok(Box::new(MoodyDisk {
            setting: self.setting,
            disk,
            given: Arc::clone(&self.given),
            asked: AtomicU64::new(0),
        }))
    }

    fn list(&self, _client: &Client) -> Result<Vec<Export>> {
        let export =
            |name: &[u8], description: &str| Export { name: name.to_vec(), description: description.to_owned() };
        Ok(vec![export(b"", ""), export(b"name", "with a description"), export(&[b'x'; 5000], "too long")])
    }

    fn description(&self, client: &Client) -> Option<String> {
        (!client.export_name.is_empty()).then(|| "with a description".to_owned())
    }

    fn meta_contexts(&self, client: &Client) -> Result<Vec<MetaContext>> {
        let context = |name: &'static str, is_wide| MetaContext { name: name.into(), is_wide };
        let own = vec![context("x-fuzz:narrow", false), context("x-fuzz:wide", true)];
        Ok(if client.export_name.is_empty() { own } else { Vec::new() })
    }

    fn thread_model(&self) -> ThreadModel {
        self.setting.thread_model()
    }
}

struct MoodyDisk {
    setting: Setting,
    disk: Box<dyn Device>,
    given: Arc<AtomicU64>,
    asked: AtomicU64,
}

/// Requests that touch this byte fail, where some do.
const BAD: u64 = 12_345;

impl MoodyDisk {
    fn mood(&self, offset: u64, length: u64, call: &Call) -> Result<()> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        if !call.may_block() && self.setting.device & 3 == 1 && !number.is_multiple_of(3) {
            return Err(Error::WouldBlock);
        }
        if self.setting.fails() && offset <= BAD && BAD - offset < length {
            return Err(Error::failed(ErrorCode::Io, "a bad byte"));
        }
        Ok(())
    }
}

impl Device for MoodyDisk {
    fn size(&self) -> Result<u64> {
        self.disk.size()
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let all = self.disk.capabilities()?;
        let without = |bit: u32| self.setting.without & 1 << bit != 0;
        // What is made of reads and writes takes its time over a large disk, and in memory its place.
        let small = self.setting.is_small();
        let less = |bit: u32, support: Support| if without(bit) && small { Support::Emulate } else { support };
        Ok(Capabilities {
            flush: all.flush && !without(1),
            trim: all.trim && !without(2),
            zero: less(3, all.zero),
            fua: less(4, all.fua),
            cache: less(5, all.cache),
            extents: all.extents && !without(6),
            takes_blocks: all.takes_blocks && !without(7),
            block_size: self.setting.block_size(),
            ..all
        })
    }

    fn answers_at_once(&self) -> bool {
        self.setting.device & 3 != 2
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.mood(offset, buffer.len() as u64, call)?;
        self.disk.read(buffer, offset, call)
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> Result<()> {
        self.mood(offset, length as u64, call)?;
        self.disk.read_segments(reply, length, offset, call)?;
        self.given.fetch_add(length as u64, Ordering::Relaxed);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.mood(offset, data.len() as u64, call)?;
        self.disk.write(data, offset, flags, call)
    }

    fn write_blocks(&self, data: &mut Blocks, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.mood(offset, 1, call)?;
        self.disk.write_blocks(data, offset, flags, call)
    }

    fn flush(&self, call: &Call) -> Result<()> {
        self.mood(u64::MAX, 0, call)?;
        self.disk.flush(call)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.mood(offset, length, call)?;
        self.disk.trim(length, offset, flags, call)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> Result<()> {
        self.mood(offset, length, call)?;
        if self.setting.fails() && self.setting.is_small() && offset % 2 == 1 {
            return Err(Error::not_supported("not there"));
        }
        self.disk.zero(length, offset, flags, call)
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> Result<()> {
        self.mood(offset, length, call)?;
        self.disk.cache(length, offset, call)
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> Result<()> {
        self.mood(extents.offset(), extents.length(), call)?;
        self.disk.extents(extents, call)
    }

    fn meta_context(&self, context: usize, extents: &mut Extents, call: &Call) -> Result<()> {
        self.mood(extents.offset(), extents.length(), call)?;
        let (mut at, mut flags) = (extents.offset(), context as u64);
        // Longer and longer, so that there are few of them in the largest range.
        while extents.add(at, (at / 2).max(1000), flags) {
            at = at.saturating_add((at / 2).max(1000));
            flags = flags.wrapping_mul(3).wrapping_add(1);
        }
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.disk.close()
    }
}

//! `example1`: a read-only disk of 100 MiB that holds a partition table with one empty partition. The smallest plugin,
//! to copy from when starting one, and byte for byte the disk of nbdkit's plugin of that name.
//! Source: nbdkit plugins/example1/example1.c.

use std::sync::Arc;

use nbdcaptive_actors::device::{self, Call, Client, Device, Exports, Segments, ThreadModel};

use crate::layer::{About, ConfigError, Plugin, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "example1",
    summary: "a read-only example disk of 100 MiB with one empty partition

        For trying things out where no disk is at hand, and for programmers: its source is the smallest that a
        plugin can have.

        # Examples

            nbdcaptive example1 --run 'qemu-img convert \"$uri\" out.img'
        ",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::SerializeAllRequests,
    dump: &[],
};

/// Bytes.
const SIZE: u64 = 100 << 20;

/// Bytes of the boot sector; all behind it is zero.
const SECTOR: usize = 512;

/// The x86 code that partition editors put there: moves itself to 0:0600 and starts the active partition.
const BOOT_CODE: [u8; 75] = [
    0xfa, // cli
    0xb8, 0x00, 0x10, 0x8e, 0xd0, // ss = 0x1000
    0xbc, 0x00, 0xb0, // sp = 0xb000
    0xb8, 0x00, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, // ds = es = 0
    0xfb, // sti
    0xbe, 0x00, 0x7c, 0xbf, 0x00, 0x06, 0xb9, 0x00, 0x02, 0xf3, 0xa4, // copy 512 bytes from 0x7c00 to 0x0600
    0xea, 0x21, 0x06, 0x00, 0x00, // jump there
    0xbe, 0xbe, 0x07, // si = the first partition's entry
    0x38, 0x04, 0x75, 0x0b, // is it active?
    0x83, 0xc6, 0x10, 0x81, 0xfe, 0xfe, 0x07, 0x75, 0xf3, // the next of the four
    0xeb, 0x16, // none: hang
    0xb4, 0x02, 0xb0, 0x01, 0xbb, 0x00, 0x7c, // read one sector to 0x7c00
    0xb2, 0x80, 0x8a, 0x74, 0x01, 0x8b, 0x4c, 0x02, 0xcd, 0x13, // from the first disk, at the entry's start
    0xea, 0x00, 0x7c, 0x00, 0x00, // and jump to it
    0xeb, 0xfe, // hang
];

/// The disk's number, little endian, and where it stands.
const DISK_SIGNATURE: (usize, [u8; 4]) = (440, 0x0002_5be1_u32.to_le_bytes());

/// The first partition's entry and where it stands: not active, from head 2 sector 3 to head 188 sector 49 of cylinder
/// 12, of type 0x83 (Linux), 204545 sectors from sector 128 on.
const PARTITION: (usize, [u8; 16]) =
    (446, [0x00, 0x02, 0x03, 0x00, 0x83, 0xbc, 0x31, 0x0c, 0x80, 0x00, 0x00, 0x00, 0x01, 0x1f, 0x03, 0x00]);

/// What marks a boot sector, and where it stands.
const BOOT_SIGNATURE: (usize, [u8; 2]) = (510, [0x55, 0xaa]);

fn boot_sector() -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    let parts: [(usize, &[u8]); 4] = [
        (0, &BOOT_CODE),
        (DISK_SIGNATURE.0, &DISK_SIGNATURE.1),
        (PARTITION.0, &PARTITION.1),
        (BOOT_SIGNATURE.0, &BOOT_SIGNATURE.1),
    ];
    for (offset, bytes) in parts {
        sector[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    sector
}

/// The plugin.
#[derive(Debug)]
pub struct Example1;

impl Plugin for Example1 {
    fn callbacks(&self) -> &'static str {
        "load open get_size pread"
    }

    fn config(&mut self, _key: &str, _value: Value<'_>) -> Result<(), ConfigError> {
        Err(ConfigError("example1: this plugin does not need command line configuration".to_owned()))
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(Disk { boot_sector: boot_sector() }))
    }
}

/// The disk is its own maker: nothing in it belongs to one client.
#[derive(Clone)]
struct Disk {
    boot_sector: [u8; SECTOR],
}

impl Exports for Disk {
    fn unloads(&self) -> bool {
        false
    }

    fn open(&self, _client: &Client) -> device::Result<Box<dyn Device>> {
        Ok(Box::new(self.clone()))
    }

    /// Parallel would do; nbdkit keeps the safest for those who copy its example, and clients can see the difference.
    fn thread_model(&self) -> ThreadModel {
        ABOUT.thread_model
    }
}

impl Device for Disk {
    fn size(&self) -> device::Result<u64> {
        Ok(SIZE)
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _call: &Call) -> device::Result<()> {
        let code = match usize::try_from(offset) {
            Ok(start) if start < SECTOR => &self.boot_sector[start..SECTOR.min(start + buffer.len())],
            _ => &[],
        };
        buffer[..code.len()].copy_from_slice(code);
        buffer[code.len()..].fill(0);
        Ok(())
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> device::Result<()> {
        let code = (SECTOR as u64).saturating_sub(offset).min(length as u64) as usize;
        if code > 0 {
            self.read(reply.space(code), offset, call)?;
        }
        if length > code {
            reply.zeroes(length - code);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::testing::ready;

    fn device() -> Box<dyn Device> {
        let exports = ready("example1", &[]).expect("it takes no parameter");
        assert_eq!(exports.thread_model(), ThreadModel::SerializeAllRequests);
        exports.open(&Client::default()).expect("it always opens")
    }

    #[test]
    fn has_one_linux_partition_that_ends_inside_the_disk() {
        let device = device();
        let mut sector = [1; 512];
        device.read(&mut sector, 0, &Call::AT_ONCE).unwrap();
        assert_eq!(sector[510..], [0x55, 0xaa]);
        assert_eq!(sector[450], 0x83);
        let number = |at: usize| u64::from(u32::from_le_bytes(sector[at..at + 4].try_into().unwrap()));
        assert_eq!((number(454), number(458)), (128, 204_545));
        assert!((number(454) + number(458)) * 512 <= device.size().unwrap());
        assert_eq!(sector[462..510], [0; 48]);
    }

    #[test]
    fn every_window_of_the_disk_shows_the_same_bytes() {
        let device = device();
        let mut whole = vec![1; 2048];
        device.read(&mut whole, 0, &Call::AT_ONCE).unwrap();
        for offset in [0, 1, 445, 511, 512, 513] {
            for length in [1, 2, 66, 512, 1024] {
                let mut buffer = vec![1; length];
                device.read(&mut buffer, offset as u64, &Call::AT_ONCE).unwrap();
                assert_eq!(buffer, whole[offset..offset + length]);
                let mut reply = Segments::default();
                device.read_segments(&mut reply, length, offset as u64, &Call::AT_ONCE).unwrap();
                assert_eq!(reply.len(), length);
            }
        }
        let mut end = vec![1; 512];
        device.read(&mut end, SIZE - 512, &Call::AT_ONCE).unwrap();
        assert_eq!(end, [0; 512]);
    }

    #[test]
    fn is_read_only() {
        assert!(!device().capabilities().unwrap().write);
    }
}

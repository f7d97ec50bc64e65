//! `partition`: shows one partition of a disk with an MBR (primary and logical partitions) or a GPT.
//! Source: nbdkit filters/partition/partition.c, partition-mbr.c, partition-gpt.c; UEFI Specification 2.10, section 5.

use std::sync::Arc;

use nbdcaptive_actors::device::{Call, Client, Device, Error, ErrorCode, Exports, Result, ThreadModel};
use nbdcaptive_actors::filter::{FilterExports, Filtered, FilteredExports, Next};

use super::kit::{is_zero, optional, required, u32_at, u64_at, unknown};
use super::next::look_at_start;
use super::offset::Window;
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "partition",
    summary: "show one partition of the disk

        Of a disk with an MBR, primary partitions are numbers 1 to 4 and logical ones 5 and up; of one with a GPT
        they count from 1. Clients see that partition and nothing else.

        # Examples

            nbdcaptive --filter=partition example1 partition=1 \\
                --run 'nbdinfo --size \"$uri\"'
        ",
    parameters: &[
        required("partition", "<PART>", "its number, from 1; logical partitions start at 5"),
        optional("partition-sectorsize", "512|4k", "the disk's sectors; 512 unless the disk says otherwise"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The sizes of sectors that there are, in bytes.
const SECTORS: [u64; 2] = [512, 4096];

/// The filter.
#[derive(Clone, Copy, Debug, Default)]
pub struct Partition {
    number: u32,
    sector: Option<u64>,
}

impl Filter for Partition {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        match key {
            "partition" => {
                self.number = values::unsigned(key, text).map_err(ConfigError)?;
                if self.number == 0 {
                    return Err(ConfigError("invalid partition number".to_owned()));
                }
            }
            "partition-sectorsize" => {
                let size = values::size(text).map_err(ConfigError)?;
                if !SECTORS.contains(&size) {
                    let line = "invalid partition-sectorsize, it must be '512' or '4096'";
                    return Err(ConfigError(line.to_owned()));
                }
                self.sector = Some(size);
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> std::result::Result<(), ConfigError> {
        if self.number == 0 {
            return Err(ConfigError("you must supply the partition parameter on the command line".to_owned()));
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let wanted = *self;
        look_at_start(&next, lifetime, move |next, _| wanted.find(next).map(drop));
        Ok(Arc::new(FilteredExports(Partitions { next, wanted })))
    }
}

struct Partitions {
    next: Arc<dyn Exports>,
    wanted: Partition,
}

impl FilterExports for Partitions {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let (next, found) = Next::open(&*self.next, client)?.look(|next| self.wanted.find(next))?;
        let Found { start, length, .. } = found;
        client.connection.debug(format_args!("partition offset={start} range={length}"));
        Ok(Box::new(Filtered(Window { next, start, length })))
    }

    fn description(&self, client: &Client) -> Option<String> {
        let disk = self.next.description(client)?;
        // What kind of table the disk has is known once it was looked at.
        let (next, found) = Next::open(&*self.next, client).ok()?.look(|next| self.wanted.find(next)).ok()?;
        // Nothing was written to it.
        let _ = next.close();
        Some(format!("partition {} of {} disk: {disk}", self.wanted.number, found.table))
    }
}

/// A partition, in bytes.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    start: u64,
    length: u64,
    table: &'static str,
}

fn no(why: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::failed(ErrorCode::Invalid, why)
}

impl Partition {
    fn find(&self, disk: &Next) -> Result<Found> {
        let minimum = disk.offered().block_size.map_or(0, |sizes| u64::from(sizes.minimum));
        let known = SECTORS.into_iter().find(|&size| size == minimum);
        let sector = self.sector.or(known).unwrap_or(SECTORS[0]);
        let size = disk.bytes();
        if size < 2 * sector {
            return Err(no("disk is too small to be a partitioned disk"));
        }
        let mut first = vec![0; 2 * sector as usize];
        disk.read(&mut first, 0, &Call::BLOCKING)?;
        let (mbr, header) = first.split_at(sector as usize);
        let table = Table { disk, size, sector, number: self.number };
        let (found, table) = if size >= 3 * sector + 2 * 128 * 128 && header.starts_with(b"EFI PART") {
            (table.gpt(header)?, "GPT")
        } else if mbr[0x1fe..0x200] == [0x55, 0xaa] {
            (table.mbr(mbr)?, "MBR")
        } else {
            return Err(no("disk does not contain MBR or GPT partition table signature"));
        };
        match found {
            Some((start, length)) if start.checked_add(length).is_some_and(|end| end <= size) => {
                Ok(Found { start, length, table })
            }
            _ => Err(no("partition is outside the disk")),
        }
    }
}

/// Where a partition is looked for.
struct Table<'a> {
    disk: &'a Next,
    size: u64,
    sector: u64,
    number: u32,
}

/// Start and length, in bytes. `None` where they are no numbers of bytes.
type Place = Option<(u64, u64)>;

/// An entry of an MBR or of the boot record of a logical partition.
struct Entry {
    kind: u8,
    start: u64,
    sectors: u64,
}

impl Entry {
    /// Entry `number`, from 0 to 3, of a boot sector.
    fn of(sector: &[u8], number: usize) -> Entry {
        let entry = &sector[0x1be + 16 * number..][..16];
        Entry { kind: entry[4], start: u32_at(entry, 8).into(), sectors: u32_at(entry, 12).into() }
    }

    /// Source: linux block/partitions/msdos.c `is_extended_partition`.
    fn is_extended(&self) -> bool {
        self.sectors > 0 && matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

impl Table<'_> {
    fn mbr(&self, mbr: &[u8]) -> Result<Place> {
        let number = self.number;
        let not_found = || no(format!("MBR partition {number} not found"));
        if number > 4 {
            return self.logical(mbr)?.ok_or_else(not_found).map(Some);
        }
        let entry = Entry::of(mbr, number as usize - 1);
        if entry.sectors == 0 || entry.kind == 0 || entry.is_extended() {
            return Err(not_found());
        }
        if entry.kind == 0xee {
            let hint = match self.sector {
                512 => "the underlying storage uses 4K sectors try using partition-sectorsize=4k",
                _ => "the underlying storage uses 512 byte sectors try using partition-sectorsize=512",
            };
            return Err(no(format!("rejecting GPT protective entry from MBR, if {hint}")));
        }
        Ok(Some((entry.start * self.sector, entry.sectors * self.sector)))
    }

    /// Follows the chain of boot records. It ends, because each is behind the one before.
    fn logical(&self, mbr: &[u8]) -> Result<Place> {
        let extended = (0..4).map(|number| Entry::of(mbr, number)).find(Entry::is_extended).ok_or_else(|| {
            no("MBR logical partition selected, but there is no extended partition in the partition table")
        })?;
        let mut record = extended.start * self.sector;
        for number in 5.. {
            if record < self.sector || record >= self.size - self.sector {
                return Err(no("invalid EBR chain: next EBR boot sector is located outside disk boundary"));
            }
            let mut sector = vec![0; self.sector as usize];
            self.disk.read(&mut sector, record, &Call::BLOCKING)?;
            if number == self.number {
                let entry = Entry::of(&sector, 0);
                let (start, length) = (record + entry.start * self.sector, entry.sectors * self.sector);
                if start <= record || start + length > (extended.start + extended.sectors) * self.sector {
                    return Err(no(format!(
                        "logical partition start or size out of range \
                         (offset={start}, range={length}, ep:startsect={}, ep:nrsects={})",
                        extended.start, extended.sectors
                    )));
                }
                return Ok(Some((start, length)));
            }
            let link = Entry::of(&sector, 1);
            if link.start == 0 && link.sectors == 0 {
                return Ok(None);
            }
            let next = (extended.start + link.start) * self.sector;
            if next <= record {
                return Err(no(format!("invalid EBR chain: next EBR {next} <= current EBR {record}")));
            }
            record = next;
        }
        Ok(None)
    }

    fn gpt(&self, header: &[u8]) -> Result<Place> {
        let Table { sector, number, .. } = *self;
        if u64_at(header, 72) != 2 {
            return Err(no("non-standard GPT layout: partition entries are not adjacent to header"));
        }
        let (entries, size) = (u32_at(header, 80), u64::from(u32_at(header, 84)));
        if number > entries {
            return Err(no("GPT partition number out of range"));
        }
        if size < 128 || size > sector || !sector.is_multiple_of(size) {
            return Err(no(format!("GPT partition entry size is invalid ({size} bytes)")));
        }
        // The table is there twice.
        if self.size < 3 * sector + 2 * u64::from(entries) * size {
            return Err(no("GPT partition table is too large for this disk"));
        }
        let at = u64::from(number - 1) * size;
        let mut bytes = vec![0; sector as usize];
        self.disk.read(&mut bytes, (2 + at / sector) * sector, &Call::BLOCKING)?;
        let entry = &bytes[(at % sector) as usize..][..size as usize];
        // The kind of partition; zeroes say that the entry is not used.
        if is_zero(&entry[..16]) {
            return Err(no(format!("GPT partition {number} not found")));
        }
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let bytes = |sectors: u64| sectors.checked_mul(sector);
        let sectors = last.checked_add(1).and_then(|end| end.checked_sub(first));
        Ok(bytes(first).zip(sectors.and_then(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{memory, over};
    use nbdcaptive_actors::device::Flags;

    const KIND: u8 = 0x83;

    /// A disk of 8 MiB with these bytes at these places.
    fn disk(parts: &[(u64, Vec<u8>)]) -> Arc<dyn Exports> {
        let exports = memory("8M");
        let device = exports.open(&Client::default()).unwrap();
        for (offset, bytes) in parts {
            device.write(bytes, *offset, Flags::default(), &Call::BLOCKING).unwrap();
        }
        exports
    }

    /// A boot sector with these entries: kind, start, sectors.
    fn boot(entries: &[(u8, u32, u32)]) -> Vec<u8> {
        let mut sector = vec![0; 512];
        for (number, (kind, start, sectors)) in entries.iter().enumerate() {
            let entry = &mut sector[0x1be + 16 * number..][..16];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry[12..16].copy_from_slice(&sectors.to_le_bytes());
        }
        sector[0x1fe..].copy_from_slice(&[0x55, 0xaa]);
        sector
    }

    fn header(entries: u32, size: u32) -> Vec<u8> {
        let mut header = vec![0; 512];
        header[..8].copy_from_slice(b"EFI PART");
        header[72] = 2;
        header[80..84].copy_from_slice(&entries.to_le_bytes());
        header[84..88].copy_from_slice(&size.to_le_bytes());
        header
    }

    fn entry(first: u64, last: u64) -> Vec<u8> {
        let mut entry = vec![0; 128];
        entry[0] = 1;
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
        entry
    }

    /// Where partition `number` is, or why it is nowhere.
    fn find(exports: &Arc<dyn Exports>, number: u32, sector: Option<u64>) -> std::result::Result<(u64, u64), String> {
        let next = Next::open(&**exports, &Client::default()).unwrap();
        let found = Partition { number, sector }.find(&next);
        found.map(|found| (found.start, found.length)).map_err(|error| error.to_string())
    }

    #[test]
    fn primary_and_logical_partitions_are_found() {
        // Of the extended partition from sector 100 on: two partitions, the second of which is linked to.
        let exports = disk(&[
            (0, boot(&[(KIND, 10, 20), (0, 0, 0), (0x0f, 100, 1000), (KIND, 2000, 5)])),
            (100 * 512, boot(&[(KIND, 1, 50), (5, 60, 30)])),
            (160 * 512, boot(&[(KIND, 2, 20)])),
        ]);
        assert_eq!(find(&exports, 1, None), Ok((5120, 10240)));
        assert_eq!(find(&exports, 4, None), Ok((2000 * 512, 5 * 512)));
        assert_eq!(find(&exports, 5, None), Ok((101 * 512, 50 * 512)));
        assert_eq!(find(&exports, 6, None), Ok((162 * 512, 20 * 512)));
        for number in [2, 3, 7] {
            assert_eq!(find(&exports, number, None), Err(format!("MBR partition {number} not found")));
        }
    }

    #[test]
    fn broken_chains_of_logical_partitions_end() {
        let first = |entries: &[(u8, u32, u32)]| disk(&[(0, boot(&[(5, 100, 1000)])), (51200, boot(entries))]);
        let no_extended = disk(&[(0, boot(&[(KIND, 10, 20)]))]);
        assert!(find(&no_extended, 5, None).unwrap_err().contains("there is no extended partition"));
        let back = first(&[(KIND, 1, 1), (5, 0, 1)]);
        assert_eq!(find(&back, 6, None), Err("invalid EBR chain: next EBR 51200 <= current EBR 51200".to_owned()));
        let outside = first(&[(KIND, 1, 1), (5, 1 << 20, 1)]);
        assert!(find(&outside, 6, None).unwrap_err().contains("located outside disk boundary"));
        let long = first(&[(KIND, 1, 1000)]);
        assert!(find(&long, 5, None).unwrap_err().starts_with("logical partition start or size out of range (offset="));
        let itself = first(&[(KIND, 0, 1)]);
        assert!(find(&itself, 5, None).unwrap_err().starts_with("logical partition start or size out of range"));
    }

    #[test]
    fn partitions_of_a_gpt_are_found_in_sectors_of_both_sizes() {
        for sector in SECTORS {
            let at = |lba: u64| lba * sector;
            let parts = [(0, boot(&[(0xee, 1, 100)])), (at(1), header(128, 128)), (at(2) + 128, entry(50, 59))];
            let exports = disk(&parts);
            assert_eq!(find(&exports, 2, Some(sector)), Ok((50 * sector, 10 * sector)));
            assert_eq!(find(&exports, 1, Some(sector)), Err("GPT partition 1 not found".to_owned()));
            assert_eq!(find(&exports, 129, Some(sector)), Err("GPT partition number out of range".to_owned()));
            let other = SECTORS[usize::from(sector == 512)];
            assert!(find(&exports, 1, Some(other)).unwrap_err().starts_with("rejecting GPT protective entry"));
        }
    }

    #[test]
    fn a_gpt_that_cannot_be_is_refused() {
        let with = |header: Vec<u8>, entry: Vec<u8>| {
            find(&disk(&[(0, boot(&[(0xee, 1, 100)])), (512, header), (1024, entry)]), 1, None).unwrap_err()
        };
        assert_eq!(with(header(128, 100), entry(1, 2)), "GPT partition entry size is invalid (100 bytes)");
        assert_eq!(with(header(u32::MAX, 128), entry(1, 2)), "GPT partition table is too large for this disk");
        for (first, last) in [(50, 40), (0, u64::MAX), (u64::MAX, u64::MAX), (1, u64::MAX / 2), (16000, 20000)] {
            assert_eq!(with(header(128, 128), entry(first, last)), "partition is outside the disk", "{first} {last}");
        }
    }

    #[test]
    fn a_disk_without_a_table_is_refused() {
        let exports = disk(&[]);
        assert_eq!(
            find(&exports, 1, None),
            Err("disk does not contain MBR or GPT partition table signature".to_owned())
        );
        let exports = memory("1000");
        assert_eq!(find(&exports, 1, None), Err("disk is too small to be a partitioned disk".to_owned()));
    }

    #[test]
    fn the_number_must_be_given() {
        use crate::filters::kit::testing::refused;
        assert_eq!(refused("partition", &[]), "you must supply the partition parameter on the command line");
        assert_eq!(refused("partition", &[("partition", "0")]), "invalid partition number");
        assert!(refused("partition", &[("partition-sectorsize", "1k")]).contains("it must be '512' or '4096'"));
        assert!(over(memory("1M"), "partition", &[("partition", "1"), ("partition-sectorsize", "4k")]).is_ok());
    }
}

//! `partitioning`: files become the partitions of a disk, whose partition table is made up. Partitions can be written, the
//! table and what is between them only with what is there.
//!
//! ```text
//! MBR   | MBR | p1 | p2 | p3 | EBR | p5 | EBR | p6 | ...      (four files or fewer need no EBR)
//! GPT   | protective MBR, header, entries | p1 | p2 | ... | entries, header |
//! ```
//! Every partition starts at a multiple of its alignment and is made up to a whole sector with zeroes.
//! Source: nbdkit plugins/partitioning and nbdkit-partitioning-plugin.pod; UEFI 2.10 chapter 5, for the GPT.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use nbdcaptive_actors::device::{
    self, Call, Capabilities, Device, Exports, Flags, Same, Segments, Support, ThreadModel,
};
use nix::errno::Errno;
use rustix::fs::{Mode, OFlags};

use super::file;
use super::regions::{Content, Region, Regions};
use crate::layer::{About, ConfigError, Flag, Parameter, Plugin, Server, Value};
use crate::values;
use crate::xoshiro::{self, Xoshiro};

/// See the module.
pub static ABOUT: About = About {
    name: "partitioning",
    summary: "a disk with a partition table, whose partitions are files

        A partition table is made up, an MBR or a GPT, and each file is a partition behind it. Clients write to the
        files through their partitions; what is not part of any file can only be written with what is there already.

        `alignment`, `mbr-id` and `type-guid` are for the files that follow them.

        # Examples

        A disk with two partitions:

            nbdcaptive partitioning disk.img new.img \\
                --run 'nbdinfo \"$uri\"'
            nbdcaptive partitioning disk.img partition-type=gpt \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        Parameter {
            key: "file",
            value: "<FILENAME>",
            help: "a file that holds a partition, given again for each",
            required: true,
        },
        Parameter {
            key: "partition-type",
            value: "mbr|gpt",
            help: "kind of the table, mbr unless there are more than four files or they are too large",
            required: false,
        },
        Parameter {
            key: "alignment",
            value: "<SIZE>",
            help: "what the files that follow are aligned to, 1M unless given",
            required: false,
        },
        Parameter {
            key: "mbr-id",
            value: "default|<BYTE>",
            help: "MBR type of the files that follow, 0x83 unless given",
            required: false,
        },
        Parameter {
            key: "type-guid",
            value: "default|<GUID>",
            help: "GPT type of the files that follow, a Linux file system unless given",
            required: false,
        },
    ],
    magic_key: Some("file"),
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// Bytes.
const SECTOR: u64 = 512;
/// The largest alignment, and the one where none is given. Bytes.
const ALIGNMENT: u64 = 2048 * SECTOR;
/// The most that the files may have together for an MBR, which counts sectors in 32 bits: room is left for what is between them.
const MAX_MBR_FILES: u64 = u32::MAX as u64 * SECTOR - 5 * ALIGNMENT;
/// The type of a Linux file system in an MBR, and in a GPT.
const MBR_LINUX: u8 = 0x83;
const GPT_LINUX: &str = "0FC63DAF-8483-4772-8E79-3D69D8477DE4";
/// The type of an extended partition, and of what hides a GPT from those who know only the MBR.
const MBR_EXTENDED: u8 = 0x0f;
const MBR_PROTECTIVE: u8 = 0xee;
/// Where an MBR's four entries of 16 bytes are, and what marks a boot sector.
const MBR_ENTRIES: usize = 446;
const BOOT_SIGNATURE: (usize, [u8; 2]) = (510, [0x55, 0xaa]);
/// The entries of a GPT come in so many, each of so many bytes.
const GPT_ENTRIES: u64 = 128;
const GPT_ENTRY: u64 = 128;
/// Bytes of a GPT's header that its checksum covers: the 92 that have a meaning, and four more as in nbdkit.
const GPT_HEADER: u32 = 96;
/// Characters that fit in a GPT's name.
const GPT_NAME: usize = 36;

/// A GUID as it is stored.
type Guid = [u8; 16];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Table {
    Mbr,
    Gpt,
}

/// A file, and what was said of files before it.
#[derive(Debug)]
struct Part {
    name: OsString,
    size: u64,
    alignment: u64,
    mbr_id: u8,
    type_guid: Guid,
    /// Another one at every start.
    guid: Guid,
    /// `None` once it is in the layout.
    file: Option<OwnedFd>,
}

/// The plugin.
#[derive(Debug)]
pub struct Partitioning {
    parts: Vec<Part>,
    table: Option<Table>,
    alignment: u64,
    mbr_id: u8,
    type_guid: Guid,
    random: Xoshiro,
    server: Option<Server>,
    /// `-D partitioning.regions=1`: shows what the disk is put together of.
    debug_regions: i32,
}

impl Default for Partitioning {
    fn default() -> Partitioning {
        Partitioning {
            parts: Vec::new(),
            table: None,
            alignment: ALIGNMENT,
            mbr_id: MBR_LINUX,
            type_guid: linux_guid(),
            random: Xoshiro::new(u64::from(xoshiro::seed())),
            server: None,
            debug_regions: 0,
        }
    }
}

fn error<T>(line: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(line.into()))
}

impl Plugin for Partitioning {
    fn callbacks(&self) -> &'static str {
        "load unload config config_complete config_help get_ready open get_size can_multi_conn can_cache \
         pread pwrite flush"
    }

    fn meet(&mut self, server: &Server) {
        self.server = Some(server.clone());
    }

    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        vec![("regions", &mut self.debug_regions)]
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "file" => self.add(value)?,
            "partition-type" => {
                let text = value.text(key)?;
                self.table = match text.to_ascii_lowercase().as_str() {
                    "mbr" | "dos" => Some(Table::Mbr),
                    "gpt" => Some(Table::Gpt),
                    _ => return error(format!("unknown partition-type: {text}")),
                }
            }
            "alignment" => {
                let size = values::size(value.text(key)?).map_err(ConfigError)?;
                if !(SECTOR..=ALIGNMENT).contains(&size) {
                    return error(format!(
                        "partition alignment {size} should be >= sector size {SECTOR} and <= maximum alignment \
                         {ALIGNMENT}"
                    ));
                }
                if !size.is_multiple_of(SECTOR) {
                    return error(format!("partition alignment {size} should be a multiple of sector size {SECTOR}"));
                }
                self.alignment = size;
            }
            "mbr-id" => {
                let text = value.text(key)?;
                self.mbr_id = if text.eq_ignore_ascii_case("default") {
                    MBR_LINUX
                } else {
                    values::byte(key, text).map_err(ConfigError)?
                };
            }
            "type-guid" => {
                let text = value.text(key)?;
                self.type_guid = if text.eq_ignore_ascii_case("default") {
                    linux_guid()
                } else {
                    guid(text).ok_or_else(|| ConfigError(format!("could not validate GUID: {text}")))?
                };
            }
            _ => return error(format!("unknown parameter '{key}'")),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        if self.parts.is_empty() {
            return error("at least one file= parameter must be supplied");
        }
        let total = self.parts.iter().fold(0_u64, |sum, part| sum.saturating_add(part.size));
        let count = self.parts.len();
        if self.table == Some(Table::Mbr) && total > MAX_MBR_FILES {
            return error(format!(
                "MBR partition table type supports a maximum virtual disk size of about 2 TB, but you requested \
                 {count} partition(s) and a total size of {total} bytes (> {MAX_MBR_FILES}).  Try using: \
                 partition-type=gpt"
            ));
        }
        let chosen = if total > MAX_MBR_FILES || count > 4 { Table::Gpt } else { Table::Mbr };
        self.table.get_or_insert(chosen);
        Ok(())
    }

    fn ready(mut self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        let table = self.table.unwrap_or(Table::Mbr);
        let mut contents = Vec::new();
        for part in &mut self.parts {
            let Some(file) = part.file.take() else { return error("a file is missing") };
            let name = part.name.to_string_lossy().into_owned();
            contents.push(file::serve(file, true, name).map_err(|error| ConfigError(error.to_string()))?);
        }
        let Some(regions) = layout(table, &self.parts, contents) else {
            return error("the disk would be larger than its partition table allows");
        };
        if let (Some(server), true) = (&self.server, self.debug_regions != 0) {
            show(&regions, &self.parts, server);
        }
        Ok(Arc::new(Same::new(Disk { regions })))
    }
}

impl Partitioning {
    fn add(&mut self, value: Value<'_>) -> Result<(), ConfigError> {
        let name = value.0.to_owned();
        let failed = |what: &str, errno: Errno| ConfigError(format!("{}: {what}{}", name.display(), errno.desc()));
        let open = |path| rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty());
        let file = open(value.path()).map_err(|errno| failed("", Errno::from_raw(errno.raw_os_error())))?;
        // The one that keeps it is made once all files are known; this one looks at what it is.
        let size = file
            .try_clone()
            .map_err(|error| device::Error::system("dup", error))
            .and_then(|file| file::serve(file, true, name.to_string_lossy().into_owned())?.size())
            .map_err(|error| ConfigError(error.to_string()))?;
        if size == 0 {
            return error(format!("{}: zero length partitions are not allowed", name.display()));
        }
        let guid = std::array::from_fn(|_| self.random.byte());
        self.parts.push(Part {
            name,
            size,
            alignment: self.alignment,
            mbr_id: self.mbr_id,
            type_guid: self.type_guid,
            guid,
            file: Some(file),
        });
        Ok(())
    }
}

fn linux_guid() -> Guid {
    guid(GPT_LINUX).unwrap_or_default()
}

/// Reads a GUID, which may be in braces. The first three groups are stored least significant byte first, the others as they
/// are read. Source: UEFI 2.10 appendix A.
fn guid(text: &str) -> Option<Guid> {
    let text = text.strip_prefix('{').map_or(Some(text), |rest| rest.strip_suffix('}'))?;
    let groups: Vec<&str> = text.split('-').collect();
    if !groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]) {
        return None;
    }
    let mut bytes = Vec::with_capacity(16);
    for (index, group) in groups.iter().enumerate() {
        let start = bytes.len();
        for pair in group.as_bytes().chunks(2) {
            let digit = |byte: u8| char::from(byte).to_digit(16);
            bytes.push((digit(pair[0])? << 4 | digit(pair[1])?) as u8);
        }
        if index < 3 {
            bytes[start..].reverse();
        }
    }
    bytes.try_into().ok()
}

/// Puts everything in its place, then makes the tables of where it is. `None`: too large.
fn layout(table: Table, parts: &[Part], contents: Vec<Box<dyn Device>>) -> Option<Regions> {
    let mut regions = Regions::default();
    let entries = (parts.len() as u64).next_multiple_of(GPT_ENTRIES) * GPT_ENTRY;
    let blank = |sectors: u64| (sectors * SECTOR, Content::Bytes(vec![0; (sectors * SECTOR) as usize]));
    let (length, content) = match table {
        Table::Mbr => blank(1),
        Table::Gpt => blank(2 + entries / SECTOR),
    };
    regions.push(length, content)?;
    let mut places = Vec::new();
    for (index, (part, device)) in parts.iter().zip(contents).enumerate() {
        // A logical partition has a boot record of its own before it.
        let boot_record = (table == Table::Mbr && parts.len() > 4 && index >= 3).then(|| regions.list().len());
        if boot_record.is_some() {
            let (length, content) = blank(1);
            regions.push(length, content)?;
        }
        regions.align(part.alignment)?;
        let region = regions.list().len();
        regions.push(part.size, Content::Device(device))?;
        regions.align(SECTOR)?;
        places.push(Place { region, boot_record });
    }
    match table {
        Table::Mbr => master_boot_record(&mut regions, parts, &places)?,
        Table::Gpt => {
            let (length, content) = blank(entries / SECTOR + 1);
            regions.push(length, content)?;
            guid_table(&mut regions, parts, &places, entries);
        }
    }
    Some(regions)
}

/// Shows what the disk is put together of. Source: nbdkit plugins/partitioning/virtual-disk.c.
fn show(regions: &Regions, parts: &[Part], server: &Server) {
    let mut files = parts.iter();
    for (number, Region { range, content }) in regions.list().iter().enumerate() {
        let kind = match content {
            // Each file is one region, in their order.
            Content::Device(_) => files.next().map_or("file".into(), |part| part.name.to_string_lossy()),
            Content::Bytes(_) => "data".into(),
            Content::Zeroes => "zero".into(),
        };
        server.debug(format_args!("region[{number}]: {:x}-{:x} type={kind}", range.start, range.end - 1));
    }
}

/// Where in the list of regions a file and its boot record are.
struct Place {
    region: usize,
    boot_record: Option<usize>,
}

fn bytes(region: &mut Region) -> &mut [u8] {
    match &mut region.content {
        Content::Bytes(bytes) => bytes,
        _ => &mut [],
    }
}

fn put(sector: &mut [u8], at: usize, bytes: &[u8]) {
    sector[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An entry of an MBR or EBR, for a range that starts at a sector. `None`: it does not fit 32 bits.
fn mbr_entry(start: u64, length: u64, is_active: bool, id: u8) -> Option<[u8; 16]> {
    // Cylinder 1023, head 254, sector 63: it is too large to be said so.
    const TOO_LARGE: [u8; 3] = [254, 0xc0 | 63, 0xff];
    let start = u32::try_from(start / SECTOR).ok()?;
    let sectors = u32::try_from(length.div_ceil(SECTOR)).ok()?;
    let mut entry = [0; 16];
    entry[0] = if is_active { 0x80 } else { 0 };
    put(&mut entry, 1, &TOO_LARGE);
    entry[4] = id;
    put(&mut entry, 5, &TOO_LARGE);
    put(&mut entry, 8, &start.to_le_bytes());
    put(&mut entry, 12, &sectors.to_le_bytes());
    Some(entry)
}

fn master_boot_record(regions: &mut Regions, parts: &[Part], places: &[Place]) -> Option<()> {
    let size = regions.size();
    let range = |index: usize| regions.list()[index].range.clone();
    // What goes where: number of the region, number of the entry, entry.
    let mut entries = Vec::new();
    let extended = places.iter().find_map(|place| place.boot_record).map(range);
    for (index, (part, place)) in parts.iter().zip(places).enumerate() {
        let file = range(place.region);
        let length = file.end - file.start;
        let (Some(record), Some(extended)) = (place.boot_record, &extended) else {
            entries.push((0, index, mbr_entry(file.start, length, index == 0, part.mbr_id)?));
            continue;
        };
        // From its own boot record to the partition.
        let offset = file.start - range(record).start;
        entries.push((record, 0, mbr_entry(offset, length, false, part.mbr_id)?));
        if let Some(Place { region, boot_record: Some(next) }) = places.get(index + 1) {
            // From the first boot record to the next one, which counts as a part of the next partition.
            let next = range(*next).start;
            let length = range(*region).end - next;
            entries.push((record, 1, mbr_entry(next - extended.start, length, false, MBR_EXTENDED)?));
        }
    }
    if let Some(extended) = extended {
        entries.push((0, 3, mbr_entry(extended.start, size - extended.start, false, MBR_EXTENDED)?));
    }
    // Sectors are counted from the start of the disk, so all of it must be within reach.
    u32::try_from(size / SECTOR).ok()?;
    for (region, number, entry) in entries {
        let sector = bytes(&mut regions.list_mut()[region]);
        put(sector, MBR_ENTRIES + 16 * number, &entry);
        put(sector, BOOT_SIGNATURE.0, &BOOT_SIGNATURE.1);
    }
    Some(())
}

/// Fills in the first and the last region. `entries` is how many bytes the entries take.
fn guid_table(regions: &mut Regions, parts: &[Part], places: &[Place], entries: u64) {
    let size = regions.size();
    let mut array = vec![0; entries as usize];
    for (index, (part, place)) in parts.iter().zip(places).enumerate() {
        let range = &regions.list()[place.region].range;
        let entry = &mut array[index * GPT_ENTRY as usize..][..GPT_ENTRY as usize];
        put(entry, 0, &part.type_guid);
        put(entry, 16, &part.guid);
        put(entry, 32, &(range.start / SECTOR).to_le_bytes());
        put(entry, 40, &((range.end - 1) / SECTOR).to_le_bytes());
        // The first one is what old firmware boots from.
        put(entry, 48, &(if index == 0 { 4_u64 } else { 0 }).to_le_bytes());
        let name = part.name.as_bytes();
        if name.len() < GPT_NAME && name.is_ascii() {
            for (index, byte) in name.iter().enumerate() {
                entry[56 + 2 * index] = *byte;
            }
        }
    }
    let sectors = size / SECTOR;
    let array_sectors = entries / SECTOR;
    let header = |this: u64, other: u64, array_at: u64| {
        let mut header = [0; SECTOR as usize];
        put(&mut header, 0, b"EFI PART");
        // Revision 1.0
        put(&mut header, 8, &[0, 0, 1, 0]);
        put(&mut header, 12, &GPT_HEADER.to_le_bytes());
        put(&mut header, 24, &this.to_le_bytes());
        put(&mut header, 32, &other.to_le_bytes());
        put(&mut header, 40, &(2 + array_sectors).to_le_bytes());
        put(&mut header, 48, &(sectors - array_sectors - 2).to_le_bytes());
        put(&mut header, 72, &array_at.to_le_bytes());
        put(&mut header, 80, &((entries / GPT_ENTRY) as u32).to_le_bytes());
        put(&mut header, 84, &(GPT_ENTRY as u32).to_le_bytes());
        put(&mut header, 88, &crc32fast::hash(&array).to_le_bytes());
        // Over the header with zeroes in its own place.
        let checksum = crc32fast::hash(&header[..GPT_HEADER as usize]);
        put(&mut header, 16, &checksum.to_le_bytes());
        header
    };
    // As much of the disk as an MBR can count.
    let covered = (size - SECTOR).min(u64::from(u32::MAX) * SECTOR - SECTOR + 1);
    let protective = mbr_entry(SECTOR, covered, false, MBR_PROTECTIVE).unwrap_or_default();
    let (first, second) = (header(1, sectors - 1, 2), header(sectors - 1, 1, sectors - array_sectors - 1));
    if let [primary, .., secondary] = regions.list_mut() {
        let primary = bytes(primary);
        put(primary, MBR_ENTRIES, &protective);
        put(primary, BOOT_SIGNATURE.0, &BOOT_SIGNATURE.1);
        put(primary, SECTOR as usize, &first);
        put(primary, 2 * SECTOR as usize, &array);
        let secondary = bytes(secondary);
        put(secondary, 0, &array);
        put(secondary, entries as usize, &second);
    }
}

struct Disk {
    regions: Regions,
}

impl Device for Disk {
    fn size(&self) -> device::Result<u64> {
        Ok(self.regions.size())
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities {
            write: true,
            flush: true,
            zero: Support::Emulate,
            fast_zero: true,
            fua: Support::Emulate,
            multi_conn: true,
            cache: Support::Emulate,
            ..Capabilities::default()
        })
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> device::Result<()> {
        self.regions.read(buffer, offset, call)
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> device::Result<()> {
        self.regions.read_segments(reply, length, offset, call)
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        self.regions.write(data, offset, flags, "attempt to change partition table of virtual disk", call)
    }

    fn flush(&self, call: &Call) -> device::Result<()> {
        self.regions.devices().try_for_each(|device| device.flush(call))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guid_is_stored_with_its_first_groups_turned_round() {
        let stored = [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4];
        assert_eq!(guid(GPT_LINUX), Some(stored));
        assert_eq!(guid("{0fc63daf-8483-4772-8e79-3d69d8477de4}"), Some(stored));
        for text in [
            "",
            "{}",
            "0FC63DAF-8483-4772-8E79-3D69D8477DE",
            "0FC63DAF-8483-4772-8E79-3D69D8477DEG",
            "{0FC63DAF-8483-4772-8E79-3D69D8477DE4",
            "0FC63DAF-8483-4772-8E79-3D69D8477DE4}",
            "0FC63DAF8483-4772-8E79-3D69-D8477DE4",
            "+FC63DAF-8483-4772-8E79-3D69D8477DE4",
            "0FC63DAé-8483-4772-8E79-3D69D8477DE4",
        ] {
            assert_eq!(guid(text), None, "{text}");
        }
    }

    struct Blank(u64);

    impl Device for Blank {
        fn size(&self) -> device::Result<u64> {
            Ok(self.0)
        }
        fn read(&self, buffer: &mut [u8], _offset: u64, _call: &Call) -> device::Result<()> {
            buffer.fill(0);
            Ok(())
        }
    }

    fn disk(table: Table, sizes: &[u64]) -> Option<Disk> {
        let part = |size: &u64| Part {
            name: "part".into(),
            size: *size,
            alignment: ALIGNMENT,
            mbr_id: MBR_LINUX,
            type_guid: linux_guid(),
            guid: [7; 16],
            file: None,
        };
        let contents = sizes.iter().map(|size| Box::new(Blank(*size)) as Box<dyn Device>).collect();
        Some(Disk { regions: layout(table, &sizes.iter().map(part).collect::<Vec<_>>(), contents)? })
    }

    fn number(sector: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(sector[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn both_tables_of_a_gpt_agree_and_their_checksums_hold() {
        for count in [1, 128, 129, 300] {
            let disk = disk(Table::Gpt, &vec![1000; count]).unwrap();
            let size = disk.size().unwrap();
            let read = |sector: u64, length: usize| {
                let mut buffer = vec![0; length];
                disk.read(&mut buffer, sector * SECTOR, &Call::BLOCKING).unwrap();
                buffer
            };
            let last = size / SECTOR - 1;
            assert_eq!(size % SECTOR, 0);
            for (here, there) in [(1, last), (last, 1)] {
                let header = read(here, 512);
                assert_eq!((number(&header, 24), number(&header, 32)), (here, there));
                let checksum = &header[16..20];
                let mut covered = header[..96].to_vec();
                covered[16..20].fill(0);
                assert_eq!(crc32fast::hash(&covered).to_le_bytes(), checksum);
                let entries = number(&header, 80) & 0xffff_ffff;
                assert!(entries >= count as u64 && entries.is_multiple_of(128));
                let array = read(number(&header, 72), entries as usize * 128);
                assert_eq!(crc32fast::hash(&array).to_le_bytes(), header[88..92]);
                let (first, end) = (number(&header, 40), number(&header, 48));
                let mut before = first - 1;
                for entry in array.chunks(128).take(count) {
                    assert!(number(entry, 32) > before && number(entry, 40) == number(entry, 32) + 1);
                    assert_eq!(number(entry, 32) % 2048, 0);
                    before = number(entry, 40);
                }
                assert!(before <= end && array[count * 128..].iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn what_an_mbr_cannot_count_is_refused() {
        assert!(disk(Table::Mbr, &[MAX_MBR_FILES]).is_some());
        assert!(disk(Table::Mbr, &[MAX_MBR_FILES, 4 * ALIGNMENT]).is_none());
        let gpt = disk(Table::Gpt, &[MAX_MBR_FILES * 4]).unwrap();
        let mut sector = [0; 512];
        gpt.read(&mut sector, 0, &Call::BLOCKING).unwrap();
        assert_eq!(sector[450], MBR_PROTECTIVE);
        assert_eq!(sector[458..462], [0xff; 4]);
        assert!(disk(Table::Gpt, &[i64::MAX as u64]).is_none());
    }
}

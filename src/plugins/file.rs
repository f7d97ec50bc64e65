//! `file`: serves a file or a block device, or all of those in a directory, chosen by export name.
//!
//! What the page cache has is read at once; what it has not, and everything that waits for a disk, asks for a thread.
//! Every read and write carries its own offset. Only `lseek` for extents moves the position of the open file: its
//! answer does not depend on where the position was and nothing here reads it, so it needs no lock, also where `fd=`
//! makes all clients share one.
//!
//! Source: nbdkit plugins/file/file.c, plugins/file/nbdkit-file-plugin.pod; preadv2(2), fallocate(2), lseek(2).

use std::ffi::OsStr;
use std::fs;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nbdcaptive_actors::connection::Connection;
use nbdcaptive_actors::device::{
    self, BlockSize, Call, Capabilities, Client, Device, Error, ErrorCode, Export, Exports, Extents, Flags, HOLE,
    Segments, Support, ThreadModel, ZERO,
};
use nix::errno::Errno;
use rustix::fs::{Advice, AtFlags, CWD, FallocateFlags, FileType, FsWord, Mode, OFlags, SeekFrom, Stat};
use rustix::io::ReadWriteFlags;
use rustix::process::{PidfdFlags, PidfdGetfdFlags};

use crate::layer::{ANOTHER_NAME, About, ConfigError, Flag, Parameter, Plugin, Value};
use crate::page_cache::cached_pages;
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "file",
    summary: "a file, a block device, or a directory of them

        A file or block device is served as it is, holes included: they are told to clients, and zeroes and trims
        make new ones where the file system can. With `dir=` each file or block device of a directory is an export
        of its name, and links to such are; what is in directories below is not.

        The file stays open as long as the server runs. One that may not be written is served read-only.

        # Examples

        Serve an image for reading only:

            nbdcaptive -r file disk.img --run 'nbdinfo \"$uri\"'

        Serve all images of a directory, and choose one:

            nbdcaptive file dir=images -e two.img --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[
        Parameter { key: "file", value: "<FILENAME>", help: "the file or block device to serve", required: false },
        Parameter {
            key: "dir",
            value: "<DIRNAME>",
            help: "serve the files in this directory, chosen by export name",
            required: false,
        },
        Parameter { key: "directory", value: "<DIRNAME>", help: ANOTHER_NAME, required: false },
        Parameter { key: "fd", value: "<FD>", help: "serve the file open as this descriptor", required: false },
        Parameter {
            key: "dirfd",
            value: "<FD>",
            help: "serve the files in the directory open as this descriptor",
            required: false,
        },
        Parameter {
            key: "cache",
            value: "default|none",
            help: "none: keep what is read and written out of the page cache",
            required: false,
        },
        Parameter {
            key: "fadvise",
            value: "normal|random|sequential",
            help: "what the kernel is told about how the file will be read",
            required: false,
        },
    ],
    magic_key: Some("file"),
    thread_model: ThreadModel::Parallel,
    // Of nbdkit's lines, those whose feature is here; no ioctl is used.
    dump: &[
        ("file_block_size", "yes"),
        ("file_blkrotational", "yes"),
        ("file_extents", "yes"),
        ("file_falloc_fl_punch_hole", "yes"),
        ("file_falloc_fl_zero_range", "yes"),
    ],
};

/// Reads of this length and more are sent from the page cache without a copy, in bytes. For smaller ones the copy is cheaper
/// than the further system calls.
const SEND_FROM_CACHE: usize = 64 * 1024;
/// From here on a read of a file that has holes is worth a look for them, in bytes: a question takes about as long as to copy
/// a few pages.
const SPARSE_WORTH: usize = 64 * 1024;
/// What the page cache counts in, in bytes. Where pages are larger fewer of them are needed, and then data is copied.
const PAGE: u64 = 4096;

/// The longest read that is tried at once. Bytes; about 100 us of copying.
const READ_AT_ONCE: usize = 1 << 20;

/// The longest write that is made at once. Bytes; about 300 us of copying. On a thread the data would have left the processor's
/// cache by then.
const WRITE_AT_ONCE: usize = 1 << 20;

/// A write at once that took longer has met the disk: several times what copying [`WRITE_AT_ONCE`] bytes may take.
const SLOW_WRITE: Duration = Duration::from_millis(2);

/// So many writes go to threads after a slow one, before another is tried at once.
const WRITES_TO_THREADS: u32 = 256;

/// With `cache=none`, so many bytes are written before they are forced out of the page cache.
const UNSYNCED: u64 = 32 << 20;

/// The page cache has a file in pieces of at most so many bytes, at multiples of their size, and drops a piece only as a whole.
/// Those of a page table's entry, which are the largest where pages are of [`PAGE`] bytes.
const LARGEST_FOLIO: u64 = 2 << 20;

/// What statfs(2) calls a tmpfs. Its files are in memory, but it refuses RWF_NOWAIT.
const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// The range becomes a hole, and the file stays as long as it is.
const PUNCH_HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// The most exports that a list holds. Source: nbdkit server/exports.c.
const MAX_EXPORTS: usize = 10_000;

#[derive(Debug, Default)]
enum Source {
    #[default]
    Nothing,
    File(PathBuf),
    Directory(PathBuf),
    Fd(i32),
    DirFd(i32),
}

/// The plugin.
#[derive(Debug)]
pub struct File {
    source: Source,
    /// The descriptor of `fd=` and `dirfd=`, once it was looked at.
    descriptor: Option<OwnedFd>,
    cache: bool,
    advice: Advice,
    /// `-D file.zero=1`: says how zeroes are made.
    debug_zero: i32,
}

impl Default for File {
    fn default() -> File {
        File { source: Source::Nothing, descriptor: None, cache: true, advice: Advice::Normal, debug_zero: 0 }
    }
}

impl Plugin for File {
    fn callbacks(&self) -> &'static str {
        "longname unload dump_plugin config config_complete config_help list_exports open close get_size \
         block_size can_write is_rotational can_trim can_extents can_fua can_multi_conn can_cache pread \
         pwrite flush trim zero extents cache"
    }

    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        vec![("zero", &mut self.debug_zero)]
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        if matches!(key, "file" | "dir" | "directory" | "fd" | "dirfd") && !matches!(self.source, Source::Nothing) {
            return error("file|dir|fd|dirfd parameter can only appear once on the command line");
        }
        match key {
            "file" => self.source = Source::File(real_path(value)?),
            "dir" | "directory" => self.source = Source::Directory(real_path(value)?),
            "fd" => self.source = Source::Fd(descriptor_number(key, value)?),
            "dirfd" => self.source = Source::DirFd(descriptor_number(key, value)?),
            "cache" => {
                self.cache = match value.bytes() {
                    b"default" => true,
                    b"none" => false,
                    _ => return error(format!("unknown cache mode: {}", value.0.to_string_lossy())),
                }
            }
            "fadvise" => {
                self.advice = match value.bytes() {
                    b"normal" => Advice::Normal,
                    b"random" => Advice::Random,
                    b"sequential" => Advice::Sequential,
                    _ => return error(format!("unknown fadvise mode: {}", value.0.to_string_lossy())),
                }
            }
            _ => return error(format!("unknown parameter '{key}'")),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        match &self.source {
            Source::Nothing => error(
                "you must supply [file=]<FILENAME>, dir=<DIRNAME> or fd=<FD> parameter after the plugin name on the \
                 command line",
            ),
            Source::File(path) => match rustix::fs::stat(path) {
                Ok(stat) if file_type(&stat) == FileType::Directory => {
                    error(format!("use dir= to serve files within {}", path.display()))
                }
                Ok(stat) if is_servable(&stat) => Ok(()),
                _ => error(format!("file is not regular or block device: {}", path.display())),
            },
            Source::Directory(path) => match rustix::fs::stat(path) {
                Ok(stat) if file_type(&stat) == FileType::Directory => Ok(()),
                _ => error(format!("expecting a directory: {}", path.display())),
            },
            Source::Fd(number) => {
                self.descriptor = duplicate(*number).ok().filter(|fd| fstat(fd).is_some_and(|stat| is_servable(&stat)));
                match self.descriptor {
                    Some(_) => Ok(()),
                    None => error(format!("fd is not regular or block device: {number}")),
                }
            }
            Source::DirFd(number) => {
                let directory = |fd: &OwnedFd| fstat(fd).is_some_and(|stat| file_type(&stat) == FileType::Directory);
                self.descriptor = duplicate(*number).ok().filter(directory);
                match self.descriptor {
                    Some(_) => Ok(()),
                    None => error(format!("dirfd is not a directory: {number}")),
                }
            }
        }
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        let place = match (self.source, self.descriptor) {
            (Source::File(path), _) => Place::File(path),
            (Source::Directory(path), _) => Place::Directory(path),
            (Source::Fd(number), Some(fd)) => Place::Fd(number, fd),
            (Source::DirFd(_), Some(fd)) => Place::DirFd(fd),
            _ => return error("the file plugin was not configured"),
        };
        Ok(Arc::new(Files {
            place,
            cache: self.cache,
            advice: self.advice,
            pace: Arc::default(),
            debug_zero: self.debug_zero != 0,
        }))
    }
}

fn error<T>(line: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(line.into()))
}

/// The absolute path without symbolic links, so that the server may change its directory. Errors: nothing is there.
pub(super) fn real_path(value: Value<'_>) -> Result<PathBuf, ConfigError> {
    if value.0.is_empty() {
        return error("cannot resolve a null or empty path");
    }
    fs::canonicalize(value.path()).map_err(|failure| {
        let reason = Errno::from_raw(failure.raw_os_error().unwrap_or_default()).desc();
        ConfigError(format!("realpath: {}: {reason}", value.path().display()))
    })
}

fn descriptor_number(key: &str, value: Value<'_>) -> Result<i32, ConfigError> {
    let number = values::int(key, value.text(key)?).map_err(ConfigError)?;
    if number <= 2 {
        return error("file descriptor must be > 2 because stdin, stdout and stderr are reserved for nbdcaptive");
    }
    Ok(number)
}

/// A descriptor of our own for the file that this process has open as `number`. The number comes from the command line
/// and may be no descriptor at all, so the standard library offers nothing that would be safe.
fn duplicate(number: i32) -> io::Result<OwnedFd> {
    use rustix::io::Errno;
    let this = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty());
    match this.and_then(|this| rustix::process::pidfd_getfd(this, number, PidfdGetfdFlags::empty())) {
        // Kernels before 5.6 do not have the call, and containers may forbid it.
        Err(Errno::NOSYS | Errno::PERM | Errno::INVAL) => reopen(number),
        result => Ok(result?),
    }
}

/// Opens anew, for the same access, what this process has open as `number`. That asks for permission again.
fn reopen(number: i32) -> io::Result<OwnedFd> {
    // Source: proc_pid_fdinfo(5); the flags are octal.
    let facts = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
    let flags = facts.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
    let flags = OFlags::from_bits_retain(flags.unwrap_or_default()) & (OFlags::ACCMODE | OFlags::APPEND);
    Ok(rustix::fs::open(format!("/proc/self/fd/{number}"), flags | OFlags::CLOEXEC, Mode::empty())?)
}

fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn is_servable(stat: &Stat) -> bool {
    matches!(file_type(stat), FileType::RegularFile | FileType::BlockDevice)
}

fn fstat(fd: &OwnedFd) -> Option<Stat> {
    rustix::fs::fstat(fd).ok()
}

enum Place {
    File(PathBuf),
    Directory(PathBuf),
    Fd(i32, OwnedFd),
    DirFd(OwnedFd),
}

struct Files {
    place: Place,
    cache: bool,
    advice: Advice,
    pace: Arc<Pace>,
    debug_zero: bool,
}

impl Exports for Files {
    fn unloads(&self) -> bool {
        false
    }

    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        let (fd, writable, name) = match &self.place {
            Place::File(path) => {
                let (fd, writable) = open_at(CWD, path, client.read_only)?;
                (fd, writable, path.display().to_string())
            }
            Place::Directory(path) => {
                let directory = open_directory(path)?;
                open_in(&directory, client)?
            }
            Place::DirFd(directory) => open_in(directory, client)?,
            Place::Fd(number, fd) => {
                let name = format!("fd={number}");
                let fd = fd.try_clone().map_err(|error| Error::system(format_args!("dup: {name}"), error))?;
                let flags = rustix::fs::fcntl_getfl(&fd)
                    .map_err(|error| Error::system(format_args!("fcntl: {name}: F_GETFL"), error))?;
                // With O_APPEND pwrite(2) ignores its offset: what a client writes would go to the wrong place.
                let writable = flags & OFlags::ACCMODE != OFlags::RDONLY && !flags.contains(OFlags::APPEND);
                (fd, writable && !client.read_only, name)
            }
        };
        let mut open = OpenFile::new(fd, writable, name, self.cache, self.advice, &self.pace)?;
        open.debug_zero = self.debug_zero.then(|| client.connection.clone());
        Ok(Box::new(open))
    }

    fn list(&self, _client: &Client) -> device::Result<Vec<Export>> {
        // In the directory's own order, as nbdkit has them.
        let names = match &self.place {
            Place::File(_) | Place::Fd(..) => vec![Vec::new()],
            Place::Directory(path) => names_in(&open_directory(path)?)?,
            Place::DirFd(directory) => names_in(directory)?,
        };
        Ok(names.into_iter().map(|name| Export { name, description: String::new() }).collect())
    }
}

fn open_directory(path: &Path) -> device::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Error::system(format_args!("open {}", path.display()), error))
}

pub(super) fn names_in(directory: &OwnedFd) -> device::Result<Vec<Vec<u8>>> {
    // `read_from` opens the directory anew, so that two lists at a time do not share a position.
    let entries = rustix::fs::Dir::read_from(directory).map_err(|error| Error::system("opendir", error))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::system("readdir", error))?;
        let servable = match entry.file_type() {
            FileType::RegularFile | FileType::BlockDevice => true,
            FileType::Symlink | FileType::Unknown => {
                rustix::fs::statat(directory, entry.file_name(), AtFlags::empty()).is_ok_and(|stat| is_servable(&stat))
            }
            _ => false,
        };
        if servable {
            if names.len() == MAX_EXPORTS {
                return Err(Error::failed(ErrorCode::Invalid, "too many exports in the directory to list"));
            }
            names.push(entry.file_name().to_bytes().to_vec());
        }
    }
    Ok(names)
}

/// Opens the file that the export name names.
fn open_in(directory: &OwnedFd, client: &Client) -> device::Result<(OwnedFd, bool, String)> {
    let path = Path::new(OsStr::from_bytes(&client.export_name));
    let name = path.display().to_string();
    if client.export_name.contains(&b'/') {
        return Err(Error::failed(ErrorCode::Invalid, format!("{name}: exportname cannot contain /")));
    }
    if client.export_name.is_empty() {
        return Err(Error::failed(ErrorCode::Io, "open: cannot use empty file name or export name (\"\")"));
    }
    // Looked at first, because opening a FIFO waits and opening some devices has effects.
    let stat = rustix::fs::statat(directory, path, AtFlags::empty());
    if !is_servable(&stat.map_err(|error| Error::system(format_args!("open: {name}"), error))?) {
        return Err(not_servable(&name));
    }
    let (fd, writable) = open_at(directory, path, client.read_only)?;
    Ok((fd, writable, name))
}

fn not_servable(name: &str) -> Error {
    Error::failed(ErrorCode::Io, format!("file is not regular or block device: {name}"))
}

/// Opens for reading and writing or, where that fails, for reading. Returns whether it can be written.
fn open_at(directory: impl AsFd, path: &Path, read_only: bool) -> device::Result<(OwnedFd, bool)> {
    let open = |access| rustix::fs::openat(&directory, path, access | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty());
    if !read_only && let Ok(fd) = open(OFlags::RDWR) {
        return Ok((fd, true));
    }
    match open(OFlags::RDONLY) {
        Ok(fd) => Ok((fd, false)),
        Err(error) => Err(Error::system(format_args!("open: {}", path.display()), error)),
    }
}

/// An open file or block device as a device, for plugins that keep their data in files. `name` is for messages. Errors: it is
/// something else.
pub(super) fn serve(fd: OwnedFd, writable: bool, name: String) -> device::Result<Box<dyn Device>> {
    Ok(Box::new(OpenFile::new(fd, writable, name, true, Advice::Normal, &Arc::default())?))
}

/// What is known of a block device. Source: Linux Documentation/ABI/stable/sysfs-block; nbdkit asks by ioctl.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// Ranges that are not aligned to it cannot be zeroed or trimmed. Bytes.
    sector: u64,
    rotational: bool,
    size: Option<BlockSize>,
}

impl Block {
    fn of(stat: &Stat) -> Block {
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        let number = |file: &str| -> Option<u64> {
            // A partition has no queue of its own; its disk is the directory above.
            let text = fs::read_to_string(device.join("queue").join(file))
                .or_else(|_| fs::read_to_string(device.join("../queue").join(file)));
            text.ok()?.trim().parse().ok()
        };
        Block {
            // 4096 is safe where the kernel does not say.
            sector: number("logical_block_size").filter(|size| size.is_power_of_two()).unwrap_or(4096),
            rotational: number("rotational") == Some(1),
            size: Block::size(number("minimum_io_size").unwrap_or(0), number("optimal_io_size").unwrap_or(0)),
        }
    }

    /// The block sizes to state, if what the device says makes sense and the protocol has room for it.
    fn size(minimum: u64, optimal: u64) -> Option<BlockSize> {
        // Most devices do not say what is optimal.
        let preferred = if optimal == 0 { minimum.max(4096) } else { optimal };
        let sane = (512..=65536).contains(&minimum)
            && minimum.is_power_of_two()
            && (minimum..=32 << 20).contains(&preferred)
            && preferred.is_power_of_two();
        sane.then_some(BlockSize { minimum: minimum as u32, preferred: preferred as u32, maximum: u32::MAX })
    }
}

/// Whether writes are made on the executor's thread. A write into the page cache takes microseconds, much less than the
/// way to another thread and back; but nothing says beforehand that it will wait, for a slow disk that the cache is
/// ahead of or for a file server. So it is measured: one slow write, and the next ones go to threads, until one is
/// tried again. A disk that is always slow so holds up the executor once in [`WRITES_TO_THREADS`] writes, however many
/// clients there are.
#[derive(Debug, Default)]
struct Pace {
    to_threads: AtomicU32,
}

impl Pace {
    fn at_once(&self) -> bool {
        // Relaxed: a count that nothing else depends on.
        let one_less = |count: u32| count.checked_sub(1);
        self.to_threads.load(Ordering::Relaxed) == 0
            || self.to_threads.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_err()
    }

    fn took(&self, time: Duration) {
        if time > SLOW_WRITE {
            self.to_threads.store(WRITES_TO_THREADS, Ordering::Relaxed);
        }
    }
}

/// What was written since the last time that all of it was on disk, with `cache=none`.
#[derive(Debug, Default)]
struct Unsynced {
    bytes: u64,
    /// From the first byte written to behind the last.
    range: Range<u64>,
}

/// The last places where data was found, so that whoever reads there is not made to wait for another look. As many as a copy
/// has in hand at a time, by the map of one stretch.
#[derive(Debug, Default)]
struct KnownData {
    places: [Range<u64>; 16],
    next: usize,
}

impl KnownData {
    fn add(&mut self, data: Range<u64>) {
        let meets = |place: &Range<u64>| !place.is_empty() && place.start <= data.end && data.start <= place.end;
        let seen = self.places.iter().position(meets);
        let at = seen.unwrap_or(self.next);
        if seen.is_none() {
            self.next = (self.next + 1) % self.places.len();
        }
        self.places[at] = data;
    }

    fn covers(&self, length: usize, offset: u64) -> bool {
        self.places.iter().any(|place| place.contains(&offset) && place.end - offset >= length as u64)
    }
}

/// One client's open file.
struct OpenFile {
    file: Arc<fs::File>,
    name: String,
    writable: bool,
    block: Option<Block>,
    /// The file system knows holes.
    extents: bool,
    /// There may be some. Relaxed: a read that misses a hole gives its zeroes.
    may_have_holes: AtomicBool,
    /// A hole that is made there later may be read as data as well.
    data: Mutex<KnownData>,
    /// Every read is a copy. Not for block devices, whose name is in a tmpfs but not their data.
    in_memory: bool,
    /// `cache=none`.
    unsynced: Option<Mutex<Unsynced>>,
    pace: Arc<Pace>,
    /// Where to say how zeroes were made, if that is wanted.
    debug_zero: Option<Connection>,
    // What was found not to be supported becomes false. Relaxed: two threads may find it out, no more.
    can_read_nowait: AtomicBool,
    can_punch_hole: AtomicBool,
    can_zero_range: AtomicBool,
    can_allocate: AtomicBool,
}

impl OpenFile {
    fn new(
        fd: OwnedFd,
        writable: bool,
        name: String,
        cache: bool,
        advice: Advice,
        pace: &Arc<Pace>,
    ) -> device::Result<OpenFile> {
        let stat = rustix::fs::fstat(&fd).map_err(|error| Error::system(format_args!("fstat: {name}"), error))?;
        if !is_servable(&stat) {
            return Err(not_servable(&name));
        }
        // A hint: what becomes of it does not matter.
        let _ = rustix::fs::fadvise(&fd, 0, None, advice);
        let block = (file_type(&stat) == FileType::BlockDevice).then(|| Block::of(&stat));
        let extents = rustix::fs::seek(&fd, SeekFrom::Hole(0)).is_ok();
        let may_have_holes =
            extents && block.is_none() && (stat.st_blocks as u64).saturating_mul(512) < stat.st_size as u64;
        let in_memory = block.is_none() && rustix::fs::fstatfs(&fd).is_ok_and(|system| system.f_type == TMPFS_MAGIC);
        let file = OpenFile {
            file: Arc::new(fd.into()),
            name,
            writable,
            block,
            extents,
            may_have_holes: AtomicBool::new(may_have_holes),
            data: Mutex::default(),
            in_memory,
            unsynced: (!cache).then(Mutex::default),
            pace: Arc::clone(pace),
            debug_zero: None,
            can_read_nowait: AtomicBool::new(true),
            can_punch_hole: AtomicBool::new(true),
            can_zero_range: AtomicBool::new(true),
            can_allocate: AtomicBool::new(true),
        };
        Ok(file)
    }

    /// Whether the data can be sent without waiting for a disk: all of its pages are in the page cache, and the first and the
    /// last of them, between which a readahead may still be going on, have their data.
    fn is_cached(&self, length: usize, offset: u64) -> bool {
        let end = offset + length as u64;
        let pages = end.div_ceil(PAGE) - offset / PAGE;
        let has_data = |at| self.in_memory || self.read_now(&mut [0], at).is_ok();
        cached_pages(self.file.as_fd(), offset, length as u64).is_some_and(|cached| cached >= pages)
            && has_data(offset)
            && has_data(end - 1)
    }

    /// Whether a large read is worth a look for holes, which may have to wait for a disk.
    fn may_meet_holes(&self, length: usize, offset: u64) -> bool {
        self.may_have_holes.load(Ordering::Relaxed) && {
            // Whoever has it is about to know it better.
            let data = self.data.try_lock();
            !data.is_ok_and(|data| data.covers(length, offset))
        }
    }

    /// What a client has asked the map of, it reads next.
    fn learn(&self, data: Range<u64>) {
        if let Ok(mut known) = self.data.lock() {
            known.add(data);
        }
    }

    /// Has the reply sent from the page cache, if that is worth it and all of it is there.
    fn send_from_cache(&self, reply: &mut Segments, length: usize, offset: u64) -> bool {
        let can = length >= SEND_FROM_CACHE && self.unsynced.is_none() && self.is_cached(length, offset);
        if can {
            reply.file(Arc::clone(&self.file), offset, length);
        }
        can
    }

    /// Reads only what is there, and gives zeroes for holes.
    fn read_round_holes(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> device::Result<()> {
        let seek = |to: SeekFrom, what: &str, at: u64| match rustix::fs::seek(&self.file, to) {
            Ok(found) => Ok(Some(found)),
            // Nothing but a hole up to the end of the file.
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => Err(Error::system(format_args!("lseek: {what}: {at}"), error)),
        };
        let end = offset + length as u64;
        let mut at = offset;
        while at < end {
            let data = match seek(SeekFrom::Data(at), "SEEK_DATA", at)? {
                Some(data) => data.min(end),
                // A file that has become shorter has an end there, and no hole.
                None if self.size()? < end => at,
                None => end,
            };
            reply.zeroes((data - at) as usize);
            if data == end {
                break;
            }
            let hole = seek(SeekFrom::Hole(data), "SEEK_HOLE", data)?.unwrap_or(data);
            self.learn(data..hole);
            // Data that went away in between is read as it is now.
            at = if hole > data { hole.min(end) } else { end };
            let length = (at - data) as usize;
            if !self.send_from_cache(reply, length, data) {
                self.read(reply.space(length), data, call)?;
            }
        }
        Ok(())
    }

    /// Reads what the page cache has; anything else is for a thread, which also says what is wrong.
    fn read_now(&self, mut buffer: &mut [u8], mut offset: u64) -> device::Result<()> {
        if buffer.len() > READ_AT_ONCE || !self.can_read_nowait.load(Ordering::Relaxed) {
            return Err(Error::WouldBlock);
        }
        while !buffer.is_empty() {
            let mut into = [IoSliceMut::new(buffer)];
            match rustix::io::preadv2(&self.file, &mut into, offset, ReadWriteFlags::NOWAIT) {
                // Zero is the end of the file, or a kernel that means "not now".
                Ok(0) | Err(rustix::io::Errno::AGAIN) => return Err(Error::WouldBlock),
                Ok(length) => {
                    buffer = &mut buffer[length..];
                    offset += length as u64;
                }
                Err(rustix::io::Errno::INTR) => (),
                Err(error) => {
                    if error == rustix::io::Errno::OPNOTSUPP {
                        self.can_read_nowait.store(false, Ordering::Relaxed);
                    }
                    return Err(Error::WouldBlock);
                }
            }
        }
        Ok(())
    }

    /// A failed call, in nbdkit's words.
    fn failed(&self, call: &str, offset: u64, count: u64, error: impl Into<io::Error>) -> Error {
        Error::system(format_args!("{call}: {}: offset={offset}, count={count}", self.name), error)
    }

    /// All that was written is on disk when this returns.
    fn sync(&self) -> device::Result<()> {
        // Taken before, so that what is written meanwhile stays for the next time.
        let evict = self
            .unsynced
            .as_ref()
            .map(|unsynced| std::mem::take(&mut *unsynced.lock().unwrap_or_else(PoisonError::into_inner)).range);
        rustix::io::retry_on_intr(|| rustix::fs::fdatasync(&self.file))
            .map_err(|error| Error::system(format_args!("fdatasync: {}", self.name), error))?;
        if let Some(range) = evict {
            self.evict(range.start, range.end - range.start);
        }
        Ok(())
    }

    /// Takes a range out of the page cache, except pages that are not on disk yet; those start on their way there.
    fn evict(&self, offset: u64, length: u64) {
        if let Some(length) = NonZeroU64::new(length) {
            // A hint: what becomes of it does not matter.
            let _ = rustix::fs::fadvise(&self.file, offset, Some(length), Advice::DontNeed);
        }
    }

    /// Keeps a fresh write from staying in the page cache. Nothing safe wraps sync_file_range(2), with which nbdkit
    /// waits for eight writes before. Here the kernel is told to start writing at once, and every [`UNSYNCED`] bytes
    /// all is waited for and evicted, which bounds what is dirty as well.
    fn evict_written(&self, unsynced: &Mutex<Unsynced>, offset: u64, length: u64) -> device::Result<()> {
        self.evict(offset, length);
        let full = {
            let mut unsynced = unsynced.lock().unwrap_or_else(PoisonError::into_inner);
            unsynced.range = match unsynced.bytes {
                0 => offset..offset + length,
                _ => unsynced.range.start.min(offset)..unsynced.range.end.max(offset + length),
            };
            unsynced.bytes += length;
            unsynced.bytes >= UNSYNCED
        };
        if full { self.sync() } else { Ok(()) }
    }

    /// Tries one way of fallocate(2). `false`: this file does not have it, and will not be asked again.
    fn fallocate(
        &self,
        able: &AtomicBool,
        mode: FallocateFlags,
        offset: u64,
        length: u64,
    ) -> Result<bool, rustix::io::Errno> {
        use rustix::io::Errno;
        if !able.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, mode, offset, length)) {
            Ok(()) => Ok(true),
            // ENODEV was the answer for block devices before Linux 4.9.
            Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::NOSYS) => {
                able.store(false, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Block devices refuse ranges that are not made of sectors.
    fn is_aligned(&self, offset: u64, length: u64) -> bool {
        self.block.is_none_or(|block| (offset | length).is_multiple_of(block.sector))
    }

    /// Whether a way was found. The ways that make holes first where holes are wanted, then those that only zero.
    fn zero_somehow(&self, may_trim: bool, offset: u64, length: u64) -> Result<bool, rustix::io::Errno> {
        let punch_hole = || self.fallocate(&self.can_punch_hole, PUNCH_HOLE, offset, length);
        if !self.is_aligned(offset, length) {
            return Ok(false);
        }
        if may_trim && punch_hole()? {
            return Ok(true);
        }
        if self.fallocate(&self.can_zero_range, FallocateFlags::ZERO_RANGE, offset, length)? {
            return Ok(true);
        }
        // A hole that is filled up again reads as zeroes, and is quicker than writing them.
        Ok(self.can_allocate.load(Ordering::Relaxed)
            && punch_hole()?
            && self.fallocate(&self.can_allocate, FallocateFlags::empty(), offset, length)?)
    }
}

impl Device for OpenFile {
    fn size(&self) -> device::Result<u64> {
        let size = match self.block {
            None => rustix::fs::fstat(&self.file).map(|stat| stat.st_size as u64),
            Some(_) => rustix::fs::seek(&self.file, SeekFrom::End(0)),
        };
        size.map_err(|error| Error::system(format_args!("device_size: {}", self.name), error))
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities {
            write: self.writable,
            flush: true,
            trim: true,
            zero: Support::Native,
            // As nbdkit: that zeroing beats writing cannot be known before it is tried.
            fast_zero: false,
            fua: Support::Native,
            multi_conn: true,
            cache: Support::Native,
            extents: self.extents,
            rotational: self.block.is_some_and(|block| block.rotational),
            takes_blocks: false,
            block_size: self.block.and_then(|block| block.size),
        })
    }

    /// Evicting may wait, so with `cache=none` nothing is tried at once.
    fn answers_at_once(&self) -> bool {
        self.unsynced.is_none()
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> device::Result<()> {
        let is_copy = self.in_memory && buffer.len() <= READ_AT_ONCE;
        if !call.may_block() && !is_copy {
            return self.read_now(buffer, offset);
        }
        match self.file.read_exact_at(buffer, offset) {
            Ok(()) => (),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let why = format!("pread: {}: unexpected end of file", self.name);
                return Err(Error::failed(ErrorCode::Io, why));
            }
            Err(error) => return Err(self.failed("pread", offset, buffer.len() as u64, error)),
        }
        if self.unsynced.is_some() {
            // Read ahead makes pieces larger than most requests: each goes with the request that reaches its end.
            let start = offset - offset % LARGEST_FOLIO;
            self.evict(start, offset - start + buffer.len() as u64);
        }
        Ok(())
    }

    fn read_segments(&self, reply: &mut Segments, length: usize, offset: u64, call: &Call) -> device::Result<()> {
        if length >= SPARSE_WORTH && self.may_meet_holes(length, offset) {
            if !call.may_block() {
                return Err(Error::WouldBlock);
            }
            return self.read_round_holes(reply, length, offset, call);
        }
        // On a thread it is because it is not in the cache.
        if !call.may_block() && self.send_from_cache(reply, length, offset) {
            return Ok(());
        }
        self.read(reply.space(length), offset, call)
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        let length = data.len() as u64;
        let write =
            || self.file.write_all_at(data, offset).map_err(|error| self.failed("pwrite", offset, length, error));
        if !call.may_block() {
            if flags.fua || data.len() > WRITE_AT_ONCE || self.unsynced.is_some() || !self.pace.at_once() {
                return Err(Error::WouldBlock);
            }
            let start = Instant::now();
            let result = write();
            self.pace.took(start.elapsed());
            return result;
        }
        write()?;
        if flags.fua {
            self.sync()?;
        }
        match &self.unsynced {
            Some(unsynced) => self.evict_written(unsynced, offset, length),
            None => Ok(()),
        }
    }

    fn flush(&self, call: &Call) -> device::Result<()> {
        if !call.may_block() {
            return Err(Error::WouldBlock);
        }
        self.sync()
    }

    /// Advice: where nothing can be trimmed, nothing happens.
    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        if !call.may_block() {
            return Err(Error::WouldBlock);
        }
        self.may_have_holes.store(self.extents, Ordering::Relaxed);
        let trimmed = self.is_aligned(offset, length)
            && self
                .fallocate(&self.can_punch_hole, PUNCH_HOLE, offset, length)
                .map_err(|error| self.failed("fallocate", offset, length, error))?;
        if trimmed && flags.fua { self.sync() } else { Ok(()) }
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        if flags.fast {
            return Err(Error::not_supported("fast zero is not supported"));
        }
        if !call.may_block() {
            return Err(Error::WouldBlock);
        }
        self.may_have_holes.store(self.extents, Ordering::Relaxed);
        let zeroed = self.zero_somehow(flags.may_trim, offset, length);
        if let Some(debug) = &self.debug_zero {
            let how = match &zeroed {
                Ok(true) => "succeeded using fallocate".to_owned(),
                Ok(false) => "falling back to writing".to_owned(),
                Err(error) => error.to_string(),
            };
            debug.debug(format_args!("{}: zero {how}", self.name));
        }
        match zeroed {
            Ok(true) if flags.fua => self.sync(),
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::not_supported("the file has no way to zero but to write")),
            Err(error) => Err(self.failed("zero", offset, length, error)),
        }
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> device::Result<()> {
        if !call.may_block() {
            return Err(Error::WouldBlock);
        }
        rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(length), Advice::WillNeed)
            .map_err(|error| self.failed("posix_fadvise", offset, length, error))
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> device::Result<()> {
        if !call.may_block() {
            return Err(Error::WouldBlock);
        }
        let mut offset = extents.offset();
        let end = offset + extents.length();
        while offset < end {
            let data = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
                Ok(data) => data,
                // No more data up to the end of the file.
                Err(rustix::io::Errno::NXIO) => end,
                Err(error) => return Err(Error::system(format_args!("lseek: SEEK_DATA: {offset}"), error)),
            };
            if data > offset && (!extents.add(offset, data - offset, HOLE | ZERO) || extents.one()) {
                break;
            }
            if data >= end {
                break;
            }
            let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(data))
                .map_err(|error| Error::system(format_args!("lseek: SEEK_HOLE: {data}"), error))?;
            self.learn(data..hole);
            // Data that went away in between is looked at anew.
            if hole > data && (!extents.add(data, hole - data, 0) || extents.one()) {
                break;
            }
            offset = hole;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::testing::{Random, ready};
    use std::os::fd::AsRawFd;

    const NONE: Flags = Flags { fua: false, may_trim: false, fast: false };
    const BLOCKING: &Call = &Call::BLOCKING;
    const NOW: &Call = &Call::AT_ONCE;

    /// A directory that is gone after the test.
    struct Directory(PathBuf, #[allow(dead_code, reason = "removes it")] tempfile::TempDir);

    impl Directory {
        fn new(name: &str) -> Directory {
            let directory = tempfile::Builder::new().prefix(&format!("nbdcaptive-file-{name}-")).tempdir().unwrap();
            Directory(directory.path().canonicalize().unwrap(), directory)
        }

        fn file(&self, name: &str, size: u64) -> PathBuf {
            let path = self.0.join(name);
            fs::File::create(&path).unwrap().set_len(size).unwrap();
            path
        }
    }

    fn client(export_name: &str, read_only: bool) -> Client {
        Client { export_name: export_name.into(), read_only, ..Client::default() }
    }

    fn error(parameters: &[(&str, &OsStr)]) -> String {
        ready("file", parameters).err().expect("an error").to_string()
    }

    fn open(parameters: &[(&str, &OsStr)]) -> Box<dyn Device> {
        ready("file", parameters).unwrap().open(&client("", false)).unwrap()
    }

    fn bytes(device: &dyn Device, length: usize, offset: u64) -> Vec<u8> {
        let mut buffer = vec![0xee; length];
        device.read(&mut buffer, offset, BLOCKING).unwrap();
        buffer
    }

    fn map(device: &dyn Device, offset: u64, length: u64, one: bool) -> Vec<(u64, u64)> {
        let mut extents = Extents::new(offset, length, one);
        device.extents(&mut extents, BLOCKING).unwrap();
        extents.list().iter().map(|extent| (extent.length, extent.flags)).collect()
    }

    #[test]
    fn parameters_are_refused_in_nbdkits_words() {
        let directory = Directory::new("refused");
        let (path, file) = (directory.0.display(), directory.file("file", 512));
        let file = file.as_os_str();
        assert_eq!(
            error(&[]),
            "you must supply [file=]<FILENAME>, dir=<DIRNAME> or fd=<FD> parameter after the plugin name \
             on the command line"
        );
        let missing = directory.0.join("missing");
        assert_eq!(
            error(&[("file", missing.as_os_str())]),
            format!("realpath: {path}/missing: No such file or directory")
        );
        assert_eq!(error(&[("file", "".as_ref())]), "cannot resolve a null or empty path");
        assert_eq!(error(&[("file", directory.0.as_os_str())]), format!("use dir= to serve files within {path}"));
        assert_eq!(error(&[("file", "/dev/null".as_ref())]), "file is not regular or block device: /dev/null");
        assert_eq!(error(&[("dir", file)]), format!("expecting a directory: {path}/file"));
        assert_eq!(
            error(&[("file", file), ("fd", "9".as_ref())]),
            "file|dir|fd|dirfd parameter can only appear once on the command line"
        );
        assert_eq!(error(&[("fd", "1000000".as_ref())]), "fd is not regular or block device: 1000000");
        assert_eq!(error(&[("dirfd", "1000000".as_ref())]), "dirfd is not a directory: 1000000");
        assert!(error(&[("fd", "2".as_ref())]).starts_with("file descriptor must be > 2 because"));
        assert_eq!(error(&[("file", file), ("cache", "x".as_ref())]), "unknown cache mode: x");
        assert_eq!(error(&[("file", file), ("fadvise", "x".as_ref())]), "unknown fadvise mode: x");
    }

    #[test]
    fn agrees_with_a_vector_after_any_operations() {
        const SIZE: u64 = 300_777;
        let directory = Directory::new("model");
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        for cache in ["default", "none"] {
            let path = directory.file(cache, SIZE);
            let device = open(&[("file", path.as_os_str()), ("cache", cache.as_ref())]);
            assert_eq!(device.size().unwrap(), SIZE);
            let mut model = vec![0; SIZE as usize];
            for step in 0..600 {
                let range = random.range(SIZE);
                let (length, offset) = (range.end - range.start, range.start);
                let range = range.start as usize..range.end as usize;
                let flags = Flags { fua: random.below(20) == 0, may_trim: random.below(2) == 0, fast: false };
                match random.below(6) {
                    0 | 1 => {
                        let data = random.bytes(range.len());
                        // As the Backend does it.
                        match device.write(&data, offset, flags, NOW) {
                            Err(Error::WouldBlock) => device.write(&data, offset, flags, BLOCKING).unwrap(),
                            result => result.unwrap(),
                        }
                        model[range].copy_from_slice(&data);
                    }
                    2 => match device.zero(length, offset, flags, BLOCKING) {
                        Ok(()) => model[range].fill(0),
                        Err(error) => assert_eq!(error.code(), ErrorCode::NotSupported),
                    },
                    3 => {
                        device.trim(length, offset, flags, BLOCKING).unwrap();
                        // Advice: the model learns what came of it, which is all or nothing.
                        let now = bytes(&*device, range.len(), offset);
                        assert!(now == model[range.clone()] || now.iter().all(|byte| *byte == 0));
                        model[range].copy_from_slice(&now);
                    }
                    4 => {
                        let mut buffer = vec![0xee; range.len()];
                        match device.read(&mut buffer, offset, NOW) {
                            Err(Error::WouldBlock) => device.read(&mut buffer, offset, BLOCKING).unwrap(),
                            result => result.unwrap(),
                        }
                        assert!(buffer == model[range], "step {step}");
                    }
                    _ => {
                        let mut at = range.start;
                        for (length, flags) in map(&*device, offset, length, false) {
                            let run = &model[at..at + length as usize];
                            assert!(flags == 0 || run.iter().all(|byte| *byte == 0), "step {step}");
                            at += length as usize;
                        }
                        assert_eq!(at, range.end);
                        device.cache(length, offset, BLOCKING).unwrap();
                    }
                }
            }
            device.flush(BLOCKING).unwrap();
            device.close().unwrap();
            assert!(fs::read(&path).unwrap() == model);
        }
    }

    #[test]
    fn trim_and_zero_make_holes_where_the_file_system_has_them() {
        const SIZE: u64 = 1 << 20;
        let directory = Directory::new("holes");
        let path = directory.file("file", SIZE);
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let device = open(&[("file", path.as_os_str())]);
        device.write(&vec![1; SIZE as usize], 0, NONE, BLOCKING).unwrap();
        let (offset, length) = (256 << 10, 128 << 10);
        if rustix::fs::fallocate(&file, PUNCH_HOLE, offset, length).is_err() {
            return;
        }
        let data = [(offset, 0), (length, HOLE | ZERO), (SIZE - offset - length, 0)];
        let supported = map(&*device, 0, SIZE, false) == data;
        for way in 0..2 {
            device.write(&vec![1; SIZE as usize], 0, NONE, BLOCKING).unwrap();
            match way {
                0 => device.trim(length, offset, NONE, BLOCKING).unwrap(),
                _ => device.zero(length, offset, Flags { may_trim: true, ..NONE }, BLOCKING).unwrap(),
            }
            assert_eq!(bytes(&*device, length as usize, offset), vec![0; length as usize]);
            if supported {
                assert_eq!(map(&*device, 0, SIZE, false), data);
                assert_eq!(map(&*device, 0, SIZE, true), data[..1]);
                assert_eq!(map(&*device, offset + 1, SIZE - offset - 1, true), [(length - 1, HOLE | ZERO)]);
            }
        }
        // A file that ends in a hole, asked for a range inside it.
        device.trim(SIZE / 2, SIZE / 2, NONE, BLOCKING).unwrap();
        if supported {
            assert_eq!(map(&*device, SIZE / 4 * 3, 4096, false), [(4096, HOLE | ZERO)]);
        }
    }

    /// What a large read gives, and how much of it is zeroes that nobody has read.
    fn large(device: &dyn Device, length: usize, offset: u64, call: &Call) -> device::Result<(Vec<u8>, usize)> {
        let mut reply = Segments::default();
        device.read_segments(&mut reply, length, offset, call)?;
        let whole = format!("{reply:?}");
        assert!(whole.contains(&format!("length: {length}")), "{whole}");
        Ok((reply.to_vec(), reply.holes()))
    }

    #[test]
    fn data_that_the_map_told_of_is_known_in_several_places() {
        let directory = Directory::new("known-data");
        let path = directory.file("file", 1 << 20);
        let fd = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap().into();
        let file = OpenFile::new(fd, true, "file".to_owned(), true, Advice::Normal, &Arc::default()).unwrap();
        let length = 64 << 10;
        let places = [0, 256 << 10, 768 << 10];
        for place in places {
            file.write(&vec![1; length], place, NONE, BLOCKING).unwrap();
        }
        let told = map(&file, 0, 1 << 20, false);
        if told.iter().filter(|(_, flags)| *flags == 0).count() != places.len() {
            return;
        }
        for place in places {
            assert!(!file.may_meet_holes(length, place), "{place}");
            assert!(file.may_meet_holes(length + 1, place), "{place}");
        }

        // The oldest is forgotten, and what is found again is not there twice.
        let mut known = KnownData::default();
        for place in 0..20 {
            known.add(place * 100..place * 100 + 50);
            known.add(1900..1960);
        }
        assert!(known.covers(50, 1800) && known.covers(60, 1900) && known.covers(1, 549));
        assert!(!known.covers(1, 350) && !known.covers(51, 1800) && !known.covers(1, 0));
    }

    #[test]
    fn a_large_read_goes_round_holes() {
        const SIZE: u64 = 1 << 20;
        let directory = Directory::new("round-holes");
        let path = directory.file("file", SIZE);
        let device = open(&[("file", path.as_os_str())]);
        let (offset, length) = (256 << 10, 128 << 10);
        device.write(&vec![7; length], offset, NONE, BLOCKING).unwrap();
        if map(&*device, 0, SIZE, false)
            != [(offset, HOLE | ZERO), (length as u64, 0), (SIZE - offset - length as u64, HOLE | ZERO)]
        {
            return;
        }
        let (all, zeroes) = large(&*device, SIZE as usize, 0, BLOCKING).unwrap();
        assert_eq!(all, bytes(&*device, SIZE as usize, 0));
        assert_eq!(zeroes, SIZE as usize - length);
        assert!(matches!(large(&*device, 64 << 10, 0, NOW), Err(Error::WouldBlock)), "it may have to wait for the map");
        // Where data was found nobody has to look again, and what is small is not worth it.
        large(&*device, 64 << 10, offset, BLOCKING).unwrap();
        let (all, zeroes) = large(&*device, 64 << 10, offset, NOW).unwrap();
        assert_eq!((all, zeroes), (vec![7; 64 << 10], 0));
        assert_eq!(large(&*device, 4096, 0, BLOCKING).unwrap().1, 0);
        // What has become shorter is an error, as ever, and no hole.
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(SIZE / 2).unwrap();
        assert!(large(&*device, SIZE as usize, 0, BLOCKING).is_err());
    }

    #[test]
    fn what_waits_for_a_disk_is_not_done_at_once() {
        let directory = Directory::new("at-once");
        let path = directory.file("file", 4 << 20);
        let device = open(&[("file", path.as_os_str())]);
        assert!(device.answers_at_once());
        let blocks = |result: device::Result<()>| matches!(result, Err(Error::WouldBlock));
        let fua = Flags { fua: true, ..NONE };
        assert!(blocks(device.write(&[1; 512], 0, fua, NOW)));
        assert!(blocks(device.write(&vec![1; WRITE_AT_ONCE + 1], 0, NONE, NOW)));
        assert!(blocks(device.flush(NOW)));
        assert!(blocks(device.trim(512, 0, NONE, NOW)));
        assert!(blocks(device.zero(512, 0, NONE, NOW)));
        assert!(blocks(device.cache(512, 0, NOW)));
        assert!(blocks(device.extents(&mut Extents::new(0, 512, false), NOW)));
        assert_eq!(bytes(&*device, 512, 0), [0; 512], "nothing has happened yet");
        let device = open(&[("file", path.as_os_str()), ("cache", "none".as_ref())]);
        assert!(!device.answers_at_once());
        assert!(blocks(device.write(&[1; 512], 0, NONE, NOW)));
    }

    #[test]
    fn without_a_cache_what_was_read_does_not_stay_in_it() {
        const SIZE: usize = 16 << 20;
        let directory = Directory::new("evicted");
        let path = directory.file("file", 0);
        fs::write(&path, vec![1; SIZE]).unwrap();
        let file = fs::File::open(&path).unwrap();
        file.sync_all().unwrap();
        let drop_all = || rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let cached = || cached_pages(file.as_fd(), 0, SIZE as u64);
        drop_all();
        let device = open(&[("file", path.as_os_str()), ("cache", "none".as_ref())]);
        let mut buffer = vec![0; 256 << 10];
        for offset in (0..SIZE).step_by(buffer.len()) {
            device.read(&mut buffer, offset as u64, BLOCKING).unwrap();
        }
        let left = cached();
        // A tmpfs keeps everything.
        drop_all();
        assert_eq!(left, cached(), "pages of {}", path.display());
    }

    #[test]
    fn a_slow_write_sends_the_next_ones_to_threads_for_a_while() {
        let pace = Pace::default();
        assert!(pace.at_once());
        pace.took(SLOW_WRITE);
        assert!(pace.at_once());
        pace.took(SLOW_WRITE * 2);
        assert_eq!((0..WRITES_TO_THREADS).filter(|_| pace.at_once()).count(), 0);
        assert!(pace.at_once());
        assert!(pace.at_once());
    }

    #[test]
    fn a_file_that_shrank_is_an_error_and_no_data() {
        let directory = Directory::new("shrank");
        let path = directory.file("file", 8192);
        let device = open(&[("file", path.as_os_str())]);
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
        let mut buffer = [0; 8192];
        assert!(device.read(&mut buffer, 0, NOW).is_err());
        let error = device.read(&mut buffer, 0, BLOCKING).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Io);
        assert_eq!(error.to_string(), format!("pread: {}: unexpected end of file", path.display()));
    }

    #[test]
    fn a_read_only_client_or_file_is_not_offered_writes() {
        let directory = Directory::new("read-only");
        let path = directory.file("file", 4096);
        let writes = |parameters: &[(&str, &OsStr)], read_only| {
            let device = ready("file", parameters).unwrap().open(&client("", read_only)).unwrap();
            device.capabilities().unwrap().write
        };
        assert!(writes(&[("file", path.as_os_str())], false));
        assert!(!writes(&[("file", path.as_os_str())], true));
        let mut how = fs::OpenOptions::new();
        for (how, expected) in [
            (how.read(true).clone(), false),
            (how.write(true).clone(), true),
            // Its writes would all go to the end.
            (how.append(true).clone(), false),
        ] {
            let file = how.open(&path).unwrap();
            let number = file.as_raw_fd().to_string();
            assert_eq!(writes(&[("fd", number.as_ref())], false), expected);
            assert!(!writes(&[("fd", number.as_ref())], true));
        }
    }

    #[test]
    fn descriptors_serve_what_they_have_open() {
        let directory = Directory::new("descriptors");
        let path = directory.file("file", 4096);
        fs::write(&path, vec![7; 4096]).unwrap();
        let file = fs::File::open(&path).unwrap();
        let exports = ready("file", &[("fd", file.as_raw_fd().to_string().as_ref())]).unwrap();
        // The plugin has its own, and needs no name.
        drop(file);
        fs::rename(&path, directory.0.join("other")).unwrap();
        for _ in 0..2 {
            assert_eq!(bytes(&*exports.open(&client("any", false)).unwrap(), 4096, 0), [7; 4096]);
        }
        assert_eq!(exports.list(&client("", false)).unwrap().len(), 1);

        let file = fs::File::open(&directory.0).unwrap();
        let exports = ready("file", &[("dirfd", file.as_raw_fd().to_string().as_ref())]).unwrap();
        drop(file);
        assert_eq!(bytes(&*exports.open(&client("other", false)).unwrap(), 4096, 0), [7; 4096]);
        assert_eq!(exports.list(&client("", false)).unwrap()[0].name, b"other");
    }

    #[test]
    fn a_descriptor_can_be_had_without_pidfd_getfd() {
        let directory = Directory::new("reopen");
        let path = directory.file("file", 4096);
        let file = fs::File::open(&path).unwrap();
        let fd = reopen(file.as_raw_fd()).unwrap();
        assert_eq!(rustix::fs::fcntl_getfl(&fd).unwrap() & OFlags::ACCMODE, OFlags::RDONLY);
        let file = fs::OpenOptions::new().read(true).append(true).open(&path).unwrap();
        let fd = reopen(file.as_raw_fd()).unwrap();
        let flags = rustix::fs::fcntl_getfl(&fd).unwrap();
        assert_eq!(flags & (OFlags::ACCMODE | OFlags::APPEND), OFlags::RDWR | OFlags::APPEND);
    }

    #[test]
    fn a_directory_serves_its_files_by_export_name() {
        let directory = Directory::new("directory");
        directory.file("b", 512);
        directory.file("a", 1024);
        fs::create_dir(directory.0.join("d")).unwrap();
        std::os::unix::fs::symlink("a", directory.0.join("link")).unwrap();
        std::os::unix::fs::symlink("missing", directory.0.join("dangling")).unwrap();
        rustix::fs::mknodat(CWD, directory.0.join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        for key in ["dir", "directory"] {
            let exports = ready("file", &[(key, directory.0.as_os_str())]).unwrap();
            let mut names: Vec<_> = exports.list(&client("", false)).unwrap().into_iter().map(|e| e.name).collect();
            names.sort_unstable();
            assert_eq!(names, [&b"a"[..], b"b", b"link"]);
            for read_only in [false, true] {
                let open = |name| exports.open(&client(name, read_only));
                assert_eq!(open("a").unwrap().size().unwrap(), 1024);
                assert_eq!(open("link").unwrap().size().unwrap(), 1024);
                let error = |name| open(name).err().expect("an error").to_string();
                assert!(error("missing").starts_with("open: missing: No such file or directory"));
                assert_eq!(error("../x"), "../x: exportname cannot contain /");
                assert_eq!(error("d"), "file is not regular or block device: d");
                assert_eq!(error("fifo"), "file is not regular or block device: fifo");
                assert_eq!(error(".."), "file is not regular or block device: ..");
                assert_eq!(error(""), "open: cannot use empty file name or export name (\"\")");
                assert!(open("a\0b").is_err());
            }
        }
    }

    #[test]
    fn block_sizes_are_stated_only_if_they_make_sense() {
        let size = |minimum, optimal| Block::size(minimum, optimal).map(|size| (size.minimum, size.preferred));
        assert_eq!(size(512, 0), Some((512, 4096)));
        assert_eq!(size(8192, 0), Some((8192, 8192)));
        assert_eq!(size(4096, 65536), Some((4096, 65536)));
        assert_eq!(size(0, 0), None);
        assert_eq!(size(512, 520 * 512), None);
        assert_eq!(size(4096, 512), None);
        assert_eq!(size(1 << 19, 1 << 20), None);
    }

    #[test]
    fn only_whole_sectors_of_a_block_device_are_zeroed() {
        let directory = Directory::new("sectors");
        let path = directory.file("file", 8192);
        let mut file = {
            let fd = open_at(CWD, &path, false).unwrap().0;
            let files = Files {
                place: Place::File(path),
                cache: true,
                advice: Advice::Normal,
                pace: Arc::default(),
                debug_zero: false,
            };
            OpenFile::new(fd, true, "file".to_owned(), files.cache, files.advice, &files.pace).unwrap()
        };
        file.block = Some(Block { sector: 512, rotational: true, size: None });
        assert!(file.capabilities().unwrap().rotational);
        assert_eq!(file.size().unwrap(), 8192);
        file.write(&[1; 1024], 0, NONE, BLOCKING).unwrap();
        let error = file.zero(512, 1, NONE, BLOCKING).unwrap_err();
        assert_eq!(error.code(), ErrorCode::NotSupported);
        file.trim(511, 0, NONE, BLOCKING).unwrap();
        assert_eq!(bytes(&file, 1024, 0), [1; 1024]);
    }
}

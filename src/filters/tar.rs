//! `tar`: serves one file of a tar archive where it lies, to read and to write, without unpacking anything.
//!
//! The entry is looked for before the server starts, in another export than the default when a client comes: header by
//! header; what lies between headers is not read. nbdkit runs tar(1) for that, which `tar=` names; here nothing is run. An entry that does not lie there as it is (a sparse file, a link, a
//! directory) is refused, and so is a compressed archive: `--filter=gzip` or `xz` behind this one unpacks it.
//! Source: nbdkit filters/tar/tar.c, nbdkit-tar-filter.pod; GNU tar manual, "Basic Tar Format"; POSIX pax.

use std::sync::{Arc, Mutex, PoisonError};

use nbdcaptive_actors::device::{Call, Client, Device, Error, ErrorCode, Exports, Result, ThreadModel};
use nbdcaptive_actors::filter::{FilterExports, Filtered, FilteredExports, Next};
use tar::{EntryType, Header, PaxExtensions};

use super::kit::unknown;
use super::next::look_at_start;
use super::offset::Window;
use crate::layer::{About, ConfigError, Filter, Lifetime, Parameter, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "tar",
    summary: "one file inside a tar archive

        The file is served where it lies in the archive, so it can be written too; its size stays. The archive must
        not be compressed, unless another filter behind this one unpacks it. Sparse files, links and directories
        cannot be served.

        # Examples

            nbdcaptive --filter=tar file data.tar tar-entry=disk.img \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        Parameter { key: "tar-entry", value: "<FILENAME>", help: "its name, as tar lists it", required: true },
        Parameter {
            key: "tar-limit",
            value: "<SIZE>",
            help: "look no further for it; 0, the default, is no limit",
            required: false,
        },
        Parameter { key: "tar", value: "<PATH>", help: "for nbdkit's command lines; no tar is run", required: false },
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// What tar counts in, in bytes.
const BLOCK: u64 = 512;
/// What is read at once while looking, in bytes. No device has a larger minimum block size.
const VIEW: u64 = 64 * 1024;
/// The longest name or extended header that is looked at, in bytes.
const LONGEST: u64 = 1 << 20;

/// The filter.
#[derive(Clone, Debug, Default)]
pub struct Tar {
    entry: Option<Vec<u8>>,
    limit: u64,
}

impl Filter for Tar {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "tar-entry" if self.entry.is_some() => {
                return Err(ConfigError("only one tar-entry parameter can be given".to_owned()));
            }
            "tar-entry" => self.entry = Some(value.bytes().to_vec()),
            "tar-limit" => self.limit = values::size(value.text(key)?).map_err(ConfigError)?,
            "tar" => {}
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> std::result::Result<(), ConfigError> {
        match self.entry {
            None => Err(ConfigError("you must supply the tar-entry=<FILENAME> parameter".to_owned())),
            Some(_) => Ok(()),
        }
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let (entry, found) = (self.entry.unwrap_or_default(), Mutex::default());
        let archives = Arc::new(FilteredExports(Archives { next: Arc::clone(&next), entry, limit: self.limit, found }));
        let looking = Arc::clone(&archives);
        look_at_start(&next, lifetime, move |next, client| looking.0.place(next, client).map(drop));
        Ok(archives)
    }
}

struct Archives {
    next: Arc<dyn Exports>,
    entry: Vec<u8>,
    limit: u64,
    /// Of the export that was looked through last.
    found: Mutex<Option<(Vec<u8>, Place)>>,
}

/// Where the entry's data lies, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    offset: u64,
    size: u64,
}

impl FilterExports for Archives {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = Next::open(&*self.next, client)?;
        let (next, Place { offset: start, size: length }) = next.look(|next| self.place(next, client))?;
        Ok(Box::new(Filtered(Window { next, start, length })))
    }

    fn description(&self, client: &Client) -> Option<String> {
        let base = self.next.description(client)?;
        Some(format!("embedded {} from within tar file: {base}", String::from_utf8_lossy(&self.entry)))
    }
}

impl Archives {
    /// Where the entry is in the archive that this client has opened.
    fn place(&self, next: &Next, client: &Client) -> Result<Place> {
        let known = self.found.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let size = next.bytes();
        let place = match known.filter(|(export, _)| *export == client.export_name) {
            Some((_, place)) => place,
            None => {
                let limit = if self.limit > 0 { size.min(self.limit) } else { size };
                let mut view = View { device: next, size, start: 0, data: Vec::new() };
                find(&self.entry, limit, |at, length| view.read(at, length))?
            }
        };
        if place.offset.checked_add(place.size).is_none_or(|end| end > size) {
            return Err(failed(format!("{}: the archive ends inside of it", self.entry.escape_ascii())));
        }
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some((client.export_name.clone(), place));
        Ok(place)
    }
}

fn failed(why: impl std::fmt::Display) -> Error {
    Error::failed(ErrorCode::Io, format!("tar: {why}"))
}

/// The part of the archive that was read last: headers of small entries lie close together.
struct View<'a> {
    device: &'a dyn Device,
    size: u64,
    start: u64,
    data: Vec<u8>,
}

impl View<'_> {
    fn read(&mut self, at: u64, length: usize) -> Result<Vec<u8>> {
        let mut all = Vec::with_capacity(length);
        while all.len() < length {
            let from = at + all.len() as u64;
            if !(self.start..self.start + self.data.len() as u64).contains(&from) {
                self.start = from - from % VIEW;
                self.data.resize(self.size.saturating_sub(self.start).min(VIEW) as usize, 0);
                if from >= self.start + self.data.len() as u64 {
                    return Err(failed("the archive ends inside a header"));
                }
                self.device.read(&mut self.data, self.start, &Call::BLOCKING)?;
            }
            let part = &self.data[(from - self.start) as usize..];
            all.extend_from_slice(&part[..part.len().min(length - all.len())]);
        }
        Ok(all)
    }
}

/// Looks for the entry among the headers below `limit`. `read` gives bytes of the archive.
fn find(entry: &[u8], limit: u64, mut read: impl FnMut(u64, usize) -> Result<Vec<u8>>) -> Result<Place> {
    let shown = entry.escape_ascii();
    let mut at = 0;
    // What extended headers say of the next entry.
    let mut name: Option<Vec<u8>> = None;
    let mut size: Option<u64> = None;
    let mut sparse = false;
    while at + BLOCK <= limit {
        let block = read(at, BLOCK as usize)?;
        if block.iter().all(|byte| *byte == 0) {
            break;
        }
        let header = Header::from_byte_slice(&block);
        if header.cksum().ok() != Some(checksum(&block)) {
            let what = if at == 0 { "this is no uncompressed tar archive" } else { "the archive is damaged" };
            return Err(failed(format!("{what}: no header at {at}")));
        }
        let kind = header.entry_type();
        let own = |error| failed(format!("header at {at}: {error}"));
        // Links have no data, whatever their header says.
        let length = if kind == EntryType::Link { 0 } else { header.entry_size().map_err(own)? };
        let mut data = at + BLOCK;
        let is_extension = kind.is_gnu_longname() || kind.is_pax_local_extensions();
        if is_extension {
            if length > LONGEST {
                return Err(failed(format!("header at {at}: {length} bytes are too long for a name")));
            }
            let content = read(data, length as usize)?;
            if kind.is_gnu_longname() {
                name = Some(content.split(|byte| *byte == 0).next().unwrap_or_default().to_vec());
            } else {
                for extension in PaxExtensions::new(&content).flatten() {
                    match extension.key_bytes() {
                        b"path" if name.is_none() || !sparse => name = Some(extension.value_bytes().to_vec()),
                        b"GNU.sparse.name" => name = Some(extension.value_bytes().to_vec()),
                        b"size" => size = extension.value().ok().and_then(|value| value.parse().ok()),
                        _ => {}
                    }
                    sparse |= extension.key_bytes().starts_with(b"GNU.sparse.");
                }
            }
        }
        let length = if is_extension { length } else { size.take().unwrap_or(length) };
        if kind.is_gnu_sparse() {
            sparse = true;
            let mut more = header.as_gnu().is_some_and(|header| header.is_extended());
            while more {
                // The last byte but seven says whether another follows.
                more = read(data, BLOCK as usize)?[504] == 1;
                data += BLOCK;
            }
        }
        let is_entry = !(is_extension || kind.is_pax_global_extensions() || kind.is_gnu_longlink());
        if is_entry {
            let this = name.take().unwrap_or_else(|| header.path_bytes().into_owned());
            let is_sparse = std::mem::take(&mut sparse);
            if this == entry {
                return match kind {
                    _ if is_sparse => Err(failed(format!("{shown} is a sparse file, which cannot be served in place"))),
                    EntryType::Regular | EntryType::Continuous => Ok(Place { offset: data, size: length }),
                    _ => Err(failed(format!("{shown} is not a regular file"))),
                };
            }
        }
        let end = length.checked_next_multiple_of(BLOCK).and_then(|length| data.checked_add(length));
        at = end.ok_or_else(|| failed(format!("header at {at}: the size is too large")))?;
    }
    Err(failed(format!("{shown} was not found, check that the file really exists in the tarball")))
}

/// The sum of all bytes of a header, with spaces where it stands itself.
fn checksum(block: &[u8]) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    sum(&block[..148]) + 8 * u32::from(b' ') + sum(&block[156..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use tar::{Builder, EntryType};

    fn entry(builder: &mut Builder<Vec<u8>>, name: &str, kind: EntryType, data: &[u8]) {
        let mut header = Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_entry_type(kind);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, data).unwrap();
    }

    fn look(archive: &[u8], name: &str, limit: u64) -> std::result::Result<Vec<u8>, String> {
        let read = |at: u64, length: usize| {
            let part = archive.get(at as usize..).and_then(|rest| rest.get(..length));
            part.map(<[u8]>::to_vec).ok_or_else(|| failed("too short"))
        };
        let place = find(name.as_bytes(), limit.min(archive.len() as u64), read).map_err(|error| error.to_string())?;
        Ok(archive[place.offset as usize..][..place.size as usize].to_vec())
    }

    #[test]
    fn an_entry_is_found_by_its_whole_name_however_long() {
        let long = format!("{}disk.img", "directory/".repeat(40));
        let mut builder = Builder::new(Vec::new());
        entry(&mut builder, "a", EntryType::Regular, &[1; 513]);
        entry(&mut builder, "directory", EntryType::Directory, &[]);
        entry(&mut builder, &long, EntryType::Regular, b"long");
        entry(&mut builder, "link", EntryType::Symlink, &[]);
        entry(&mut builder, "disk.img", EntryType::Regular, b"short");
        entry(&mut builder, "disk.img", EntryType::Regular, b"again");
        entry(&mut builder, "empty", EntryType::Regular, b"");
        let archive = builder.into_inner().unwrap();
        assert_eq!(look(&archive, &long, u64::MAX).unwrap(), b"long");
        assert_eq!(look(&archive, "disk.img", u64::MAX).unwrap(), b"short");
        assert_eq!(look(&archive, "a", 512).unwrap(), [1; 513]);
        assert_eq!(look(&archive, "empty", u64::MAX).unwrap(), b"");
        let not_found = " was not found, check that the file really exists in the tarball";
        assert_eq!(look(&archive, "disk", u64::MAX).unwrap_err(), format!("tar: disk{not_found}"));
        assert_eq!(look(&archive, "disk.img", 2048).unwrap_err(), format!("tar: disk.img{not_found}"));
        for name in ["link", "directory"] {
            assert_eq!(look(&archive, name, u64::MAX).unwrap_err(), format!("tar: {name} is not a regular file"));
        }
    }

    #[test]
    fn what_is_no_archive_is_refused() {
        assert!(look(&[7; 2000], "a", u64::MAX).unwrap_err().starts_with("tar: this is no uncompressed tar archive"));
        assert!(look(&[], "a", u64::MAX).unwrap_err().contains("not found"));
        let mut builder = Builder::new(Vec::new());
        entry(&mut builder, "a", EntryType::Regular, &[1; 100]);
        let archive = builder.into_inner().unwrap();
        for at in 0..512 {
            let mut damaged = archive.clone();
            damaged[at] ^= 0x44;
            assert!(look(&damaged, "a", u64::MAX).is_err(), "{at}");
        }
    }

    #[test]
    fn a_name_that_is_said_to_be_huge_is_not_read() {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_cksum();
        let archive = header.as_bytes().to_vec();
        assert!(look(&archive, "a", u64::MAX).unwrap_err().contains("too long for a name"));
    }
}

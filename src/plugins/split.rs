//! `split`: one disk of several files, one behind the other.
//!
//! nbdkit 1.45 writes to the wrong place in all files but the first; here a write goes where a read of it looks.
//! Source: nbdkit plugins/split/split.c, plugins/split/nbdkit-split-plugin.pod.

use std::path::PathBuf;
use std::sync::Arc;

use nbdcaptive_actors::device::{
    self, Call, Capabilities, Client, Device, Error, Exports, Extents, Flags, Segments, Support, ThreadModel,
};
use rustix::fs::{Mode, OFlags};

use super::file;
use super::regions::{Content, Regions};
use crate::layer::{About, ConfigError, Parameter, Plugin, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "split",
    summary: "one disk of several files, one behind the other

        The files need not be of whole sectors. Writes go to the file that they fall into; a file's size does not
        change.

        # Examples

            nbdcaptive split disk.img new.img --run 'nbdinfo --size \"$uri\"'
        ",
    parameters: &[Parameter {
        key: "file",
        value: "<FILENAME>",
        help: "a file, given again for each that follows; size and content are those of all",
        required: true,
    }],
    magic_key: Some("file"),
    thread_model: ThreadModel::SerializeRequests,
    dump: &[],
};

/// The plugin.
#[derive(Debug, Default)]
pub struct Split {
    files: Vec<PathBuf>,
}

impl Plugin for Split {
    fn callbacks(&self) -> &'static str {
        "unload config config_help open close get_size can_cache pread pwrite extents cache"
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "file" => self.files.push(file::real_path(value)?),
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(Files { paths: self.files }))
    }
}

struct Files {
    paths: Vec<PathBuf>,
}

impl Exports for Files {
    fn unloads(&self) -> bool {
        false
    }

    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        let access = if client.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let mut regions = Regions::default();
        for path in &self.paths {
            let name = path.display().to_string();
            let fd = rustix::fs::open(path, access | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
                .map_err(|error| Error::system(format_args!("open: {name}"), error))?;
            let device = file::serve(fd, !client.read_only, name)?;
            let size = device.size()?;
            regions.push(size, Content::Device(device)).ok_or_else(|| {
                Error::failed(device::ErrorCode::Overflow, "the files together are over 2^63-1 bytes")
            })?;
        }
        Ok(Box::new(Disk { regions, writable: !client.read_only }))
    }

    fn thread_model(&self) -> ThreadModel {
        ABOUT.thread_model
    }
}

struct Disk {
    regions: Regions,
    writable: bool,
}

impl Device for Disk {
    fn size(&self) -> device::Result<u64> {
        Ok(self.regions.size())
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities {
            write: self.writable,
            zero: Support::Emulate,
            fast_zero: true,
            cache: Support::Native,
            extents: true,
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
        self.regions.write(data, offset, flags, "", call)
    }

    fn cache(&self, length: u64, offset: u64, call: &Call) -> device::Result<()> {
        self.regions.cache(length, offset, call)
    }

    fn extents(&self, extents: &mut Extents, call: &Call) -> device::Result<()> {
        self.regions.extents(extents, call)
    }

    fn close(&self) -> device::Result<()> {
        self.regions.devices().try_for_each(|device| device.close())
    }
}

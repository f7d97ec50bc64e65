//! `tmpdisk`: a fresh disk for each client, gone when it leaves. mkfs(8) makes it, or a command that is given.
//!
//! The disk is made in a directory that nobody else can look into, and loses its name once it is open. It need not be
//! anywhere when its client has gone, so nothing is ever forced to stable storage.
//! Source: nbdkit plugins/tmpdisk/tmpdisk.c, plugins/tmpdisk/nbdkit-tmpdisk-plugin.pod.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use nbdcaptive_actors::device::{self, Client, Device, Error, Exports, ThreadModel};
use rustix::fs::{Mode, OFlags};

use super::made::{self, Recipe};
use crate::kept;
use crate::layer::{About, ConfigError, Plugin, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "tmpdisk",
    summary: "a fresh disk with a file system for each client, gone when it leaves

        Each connection gets a disk of its own, which nobody else sees and which is gone when the client leaves.
        `mkfs` makes a file system on it, or `command` makes the disk, which finds the path in `$disk`, and `$size`,
        `$label` and `$type` as they were given. Any further parameters become variables of the command too. Nothing
        is ever forced to stable storage.

        # Examples

            nbdcaptive tmpdisk 64M label=scratch --run 'nbdcopy \"$uri\" out.img'
            nbdcaptive tmpdisk 64M command='truncate -s $size \"$disk\"' \\
                --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[made::SIZE, made::LABEL, made::TYPE, made::COMMAND],
    magic_key: Some("size"),
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The plugin.
#[derive(Debug, Default)]
pub struct TmpDisk {
    recipe: Recipe,
}

impl Plugin for TmpDisk {
    fn callbacks(&self) -> &'static str {
        "load unload config config_complete config_help open close get_size can_trim can_fua \
         can_multi_conn pread pwrite flush trim"
    }

    fn takes_other_keys(&self) -> bool {
        true
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        self.recipe.config(key, value)
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        if self.recipe.size.is_none() {
            return Err(ConfigError("size parameter is required".to_owned()));
        }
        Ok(())
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        // Where disks have room; /tmp is often in memory.
        kept::prefer("/var/tmp");
        Ok(Arc::new(Disks { recipe: self.recipe }))
    }
}

struct Disks {
    recipe: Recipe,
}

/// Removed when dropped; the disk in it lives on for those who have it open.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        // What cannot be removed now is removed when the server ends.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Exports for Disks {
    fn unloads(&self) -> bool {
        false
    }

    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        let directory = Directory(kept::directory().map_err(|error| Error::system("mkdtemp", error))?);
        let disk = directory.0.join("disk");
        self.recipe.make(&disk, &client.connection)?;
        let access = if client.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let fd = rustix::fs::open(&disk, access | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
            .map_err(|error| Error::system(format_args!("open: {}", disk.display()), error))?;
        made::serve(fd, !client.read_only, disk.display().to_string(), false)
    }

    fn thread_model(&self) -> ThreadModel {
        ABOUT.thread_model
    }
}

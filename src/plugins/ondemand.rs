//! `ondemand`: a directory of disks, where every export name that is asked for is a disk: it is made when it is not there.
//! Only one client at a time may have it.
//! Source: nbdkit plugins/ondemand/ondemand.c, plugins/ondemand/nbdkit-ondemand-plugin.pod; fcntl(2) "Open file description
//! locks".

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nbdcaptive_actors::device::{self, Call, Client, Device, Error, ErrorCode, Export, Exports, ThreadModel};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{Mode, OFlags};

use super::file;
use super::made::{self, Recipe};
use crate::kept;
use crate::layer::{About, ConfigError, Parameter, Plugin, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "ondemand",
    summary: "a directory of disks with file systems, made when they are asked for by name

        Each name that a client asks for is a disk: a file of that name in `dir`, which is made when it is not
        there. `mkfs` makes it, or `command`, which finds the path in `$disk`, and `$size`, `$label` and `$type` as
        they were given. Any further parameters become variables of the command too. The default export is the disk
        named `default`.

        One client at a time may have a disk, unless `share` says otherwise.

        # Examples

            nbdcaptive ondemand dir=images size=64M \\
                command='truncate -s $size \"$disk\"' \\
                -e mine --run 'nbdinfo --size \"$uri\"'
        ",
    parameters: &[
        Parameter { key: "dir", value: "<DIRNAME>", help: "where the disks are", required: true },
        made::SIZE,
        made::LABEL,
        made::TYPE,
        Parameter {
            key: "share",
            value: "<BOOL>",
            help: "several clients may have a disk at a time; a file system does not survive that",
            required: false,
        },
        Parameter {
            key: "wait",
            value: "<BOOL>",
            help: "a client waits until another has left the disk, instead of being refused",
            required: false,
        },
        made::COMMAND,
    ],
    magic_key: Some("size"),
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// What the empty export name stands for.
const DEFAULT: &[u8] = b"default";

/// The longest name of a file, in bytes.
const NAME_MAX: usize = 255;

/// The plugin.
#[derive(Debug, Default)]
pub struct OnDemand {
    recipe: Recipe,
    directory: Option<PathBuf>,
    share: bool,
    wait: bool,
}

impl Plugin for OnDemand {
    fn callbacks(&self) -> &'static str {
        "unload config config_complete config_help get_ready list_exports default_export open close \
         get_size can_trim can_fua can_multi_conn pread pwrite flush trim"
    }

    fn takes_other_keys(&self) -> bool {
        true
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        let switch = || value.text(key).and_then(|text| values::boolean(text).map_err(ConfigError));
        match key {
            "dir" => self.directory = Some(file::real_path(value)?),
            "share" => self.share = switch()?,
            "wait" => self.wait = switch()?,
            _ => return self.recipe.config(key, value),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        if self.directory.is_none() || self.recipe.size.is_none() {
            return Err(ConfigError("dir and size parameters are required".to_owned()));
        }
        Ok(())
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        let path = self.directory.unwrap_or_default();
        let directory = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| {
                let why = Errno::from_raw(errno.raw_os_error()).desc();
                ConfigError(format!("opendir: {}: {why}", path.display()))
            })?;
        Ok(Arc::new(Disks {
            recipe: self.recipe,
            path,
            directory,
            share: self.share,
            wait: self.wait,
            making: Mutex::default(),
        }))
    }
}

struct Disks {
    recipe: Recipe,
    path: PathBuf,
    directory: OwnedFd,
    share: bool,
    wait: bool,
    /// Commands are run one by one, so none need fear another; and of two who ask for a name only one makes it.
    making: Mutex<()>,
}

/// Whether this names a file in the directory that is not hidden.
fn is_valid(name: &[u8]) -> bool {
    (1..=NAME_MAX).contains(&name.len()) && name[0] != b'.' && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

impl Disks {
    /// Opens the disk, and makes it if it is not there.
    fn open_or_make(&self, name: &[u8], client: &Client) -> device::Result<OwnedFd> {
        let access = if client.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let file = Path::new(OsStr::from_bytes(name));
        let path = self.path.join(file);
        let open = || rustix::fs::openat(&self.directory, file, flags, Mode::empty());
        let failed = |error| Error::system(format_args!("open: {}", path.display()), error);
        // It guards nothing that a panic could leave half done.
        let _alone = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        match open() {
            Err(rustix::io::Errno::NOENT) => {}
            result => return result.map_err(failed),
        }
        if let Err(error) = self.recipe.make(&path, &client.connection) {
            // The next who asks gets a whole one.
            let _ = std::fs::remove_file(&path);
            if error.code() == ErrorCode::Shutdown {
                // What the command has started may be at it still.
                kept::abandon(path);
            }
            return Err(error);
        }
        open().map_err(failed)
    }

    /// Locks the file for the client, against clients of other servers too. Unlocked when the file is closed.
    fn lock(&self, fd: OwnedFd, name: &str, client: &Client) -> device::Result<OwnedFd> {
        let lock = libc::flock {
            l_type: if client.read_only { libc::F_RDLCK } else { libc::F_WRLCK } as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        let failed = |error| Error::system(format_args!("fcntl: {}/{name}", self.path.display()), error);
        match fcntl(&fd, FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => return Ok(fd),
            Err(Errno::EACCES | Errno::EAGAIN) if self.wait => {}
            Err(Errno::EACCES | Errno::EAGAIN) => {
                let why = format!("{name}: filesystem is locked by another client");
                return Err(Error::failed(ErrorCode::Invalid, why));
            }
            Err(error) => return Err(failed(error)),
        }
        // On a thread of its own, because only there it can be given up; one that comes too late unlocks what it has locked.
        let (locked, unlocked) = async_channel::bounded(1);
        let waiting = move || {
            let result = loop {
                match fcntl(&fd, FcntlArg::F_OFD_SETLKW(&lock)) {
                    Ok(_) => break Ok(fd),
                    Err(Errno::EINTR) => {}
                    Err(error) => break Err(error),
                }
            };
            let _ = locked.try_send(result);
        };
        std::thread::Builder::new()
            .name("lock".to_owned())
            .spawn(waiting)
            .map_err(|error| Error::system("lock", error))?;
        // The thread says something before it ends.
        let result =
            client.connection.wait(&Call::BLOCKING, async { unlocked.recv().await.unwrap_or(Err(Errno::EIO)) })?;
        result.map_err(failed)
    }
}

impl Exports for Disks {
    fn unloads(&self) -> bool {
        false
    }

    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        let name = if client.export_name.is_empty() { DEFAULT } else { &client.export_name };
        let shown = String::from_utf8_lossy(name).into_owned();
        if !is_valid(name) {
            return Err(Error::failed(ErrorCode::Invalid, format!("invalid exportname ‘{shown}’ rejected")));
        }
        let mut fd = self.open_or_make(name, client)?;
        if !self.share {
            fd = self.lock(fd, &shown, client)?;
        }
        made::serve(fd, !client.read_only, shown, true)
    }

    /// The default first, which is there whenever somebody asks for it.
    fn list(&self, _client: &Client) -> device::Result<Vec<Export>> {
        let mut names = file::names_in(&self.directory)?;
        names.retain(|name| is_valid(name) && name != DEFAULT);
        names.sort_unstable();
        let names = std::iter::once(Vec::new()).chain(names);
        Ok(names.map(|name| Export { name, description: String::new() }).collect())
    }

    fn default_export(&self, _client: &Client) -> device::Result<Option<Vec<u8>>> {
        Ok(Some(DEFAULT.to_vec()))
    }

    fn thread_model(&self) -> ThreadModel {
        ABOUT.thread_model
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_in_the_directory() {
        for name in [&b"disk"[..], b"a.b", b"\xff\xfe", &[b'x'; 255]] {
            assert!(is_valid(name));
        }
        for name in [&b""[..], b".", b"..", b".hidden", b"/etc/passwd", b"a/b", b"a\0b", &[b'x'; 256]] {
            assert!(!is_valid(name));
        }
    }
}

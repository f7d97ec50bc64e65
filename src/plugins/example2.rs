//! `example2`: serves a file, read-only. A plugin with a parameter, a file for each client and a debug flag, to copy from when
//! starting one; who wants to serve files takes `file`.
//! Source: nbdkit plugins/example2/example2.c.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use nbdcaptive_actors::connection::Connection;
use nbdcaptive_actors::device::{self, Call, Client, Device, Error, ErrorCode, Exports, ThreadModel};
use rustix::fs::OFlags;

use super::file;
use crate::layer::{About, ConfigError, Flag, Parameter, Plugin, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "example2",
    summary: "a read-only file, an example for programmers

        It does no more than such a plugin must: no holes are told, and one request is made at a time.
        nbdcaptive-file-plugin(1) serves files better.

        # Examples

            nbdcaptive example2 file=disk.img --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[Parameter { key: "file", value: "<FILENAME>", help: "the file to serve", required: true }],
    magic_key: None,
    thread_model: ThreadModel::SerializeAllRequests,
    dump: &[("example2_extra", "hello")],
};

/// The plugin.
#[derive(Debug, Default)]
pub struct Example2 {
    path: Option<PathBuf>,
    /// `-D example2.extra=1`: says how large the file is whenever that is asked for.
    debug_extra: i32,
}

impl Plugin for Example2 {
    fn callbacks(&self) -> &'static str {
        "unload dump_plugin config config_complete config_help open close get_size pread"
    }

    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        vec![("extra", &mut self.debug_extra)]
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "file" => self.path = Some(file::real_path(value)?),
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        match self.path {
            Some(_) => Ok(()),
            None => Err(ConfigError(
                "you must supply the file=<FILENAME> parameter after the plugin name on the command line".to_owned(),
            )),
        }
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(Files { path: self.path.unwrap_or_default(), debug: self.debug_extra != 0 }))
    }
}

struct Files {
    path: PathBuf,
    debug: bool,
}

impl Exports for Files {
    fn unloads(&self) -> bool {
        false
    }

    /// Each client has the file opened anew, so that one that was replaced is the next client's.
    fn open(&self, client: &Client) -> device::Result<Box<dyn Device>> {
        // Does not wait for who would write to it, if it is a pipe.
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::options().read(true).custom_flags(flags.bits() as i32).open(&self.path);
        let file = file.map_err(|error| Error::system(format_args!("open: {}", self.path.display()), error))?;
        Ok(Box::new(OpenFile { file, debug: self.debug.then(|| client.connection.clone()) }))
    }

    /// As nbdkit, which keeps the safest for those who copy its example.
    fn thread_model(&self) -> ThreadModel {
        ABOUT.thread_model
    }
}

struct OpenFile {
    file: File,
    debug: Option<Connection>,
}

impl Device for OpenFile {
    fn size(&self) -> device::Result<u64> {
        let facts = self.file.metadata().map_err(|error| Error::system("stat", error))?;
        if facts.file_type().is_block_device() {
            // Its size is not what stat(2) says.
            let why = "stat: file parameter points to a block device, not a normal file";
            return Err(Error::failed(ErrorCode::Io, why));
        }
        if let Some(debug) = &self.debug {
            debug.debug(format_args!("extra debugging: statbuf.st_size = {}", facts.len()));
        }
        Ok(facts.len())
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _call: &Call) -> device::Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Error::failed(ErrorCode::Io, "pread: unexpected end of file"),
            _ => Error::system("pread", error),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::testing::ready;

    #[test]
    fn serves_what_is_there_when_a_client_comes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, "first").unwrap();
        let exports = ready("example2", &[("file", path.as_os_str())]).unwrap();
        assert_eq!(exports.thread_model(), ThreadModel::SerializeAllRequests);
        let open = || exports.open(&Client::default());
        let first = open().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(open().err().unwrap().to_string().starts_with("open: "));
        std::fs::write(&path, "the second").unwrap();
        let second = open().unwrap();
        let mut buffer = [0; 4];
        first.read(&mut buffer, 1, &Call::BLOCKING).unwrap();
        assert_eq!((first.size().unwrap(), &buffer), (5, b"irst"));
        second.read(&mut buffer, 6, &Call::BLOCKING).unwrap();
        assert_eq!((second.size().unwrap(), &buffer), (10, b"cond"));
        // One that became shorter.
        std::fs::write(&path, "the").unwrap();
        let error = second.read(&mut buffer, 6, &Call::BLOCKING).unwrap_err();
        assert_eq!((error.code(), error.to_string()), (ErrorCode::Io, "pread: unexpected end of file".to_owned()));
        assert!(!second.capabilities().unwrap().write);
        // A pipe that nobody writes to is no reason to wait.
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(open().unwrap().size().unwrap(), 0);
    }
}

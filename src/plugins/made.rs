//! Disks that a command of the shell makes when a client asks for them: what `ondemand` and `tmpdisk` share.
//!
//! The command is run as system(3) runs one, with shell variables for the disk's path, its size, and every other parameter of
//! the plugin. It does not outlive the server ([`crate::kept`]).
//! Source: nbdkit plugins/ondemand/ondemand.c, plugins/tmpdisk/tmpdisk.c.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nbdcaptive_actors::device::{self, Call, Capabilities, Connection, Device, Error, ErrorCode, Flags, Support};
use nbdcaptive_actors::filter::{Filter, Filtered};
use nix::sys::wait::WaitStatus;

use super::file;
use crate::captive::quote::shell_quote;
use crate::kept::{self, Program};
use crate::layer::{ConfigError, Parameter, Value};
use crate::values;

/// Makes a file system where no command is given. Each mkfs has its own way to be told not to ask, and of naming a label.
const DEFAULT_COMMAND: &str = r#"
name=-L
case ${type:=ext4} in
    ext?) set -- -F ;;
    xfs) set -- -f ;;
    ntfs) set -- -Q -F; name=-n ;;
    *fat | msdos) set -- -I; name=-n ;;
    *) set -- ;;
esac
test -z "${label:-}" || set -- "$@" "$name" "$label"
truncate -s "$size" "$disk" && exec mkfs -t "$type" "$@" "$disk"
"#;

/// What help says of the parameters that both plugins have.
pub const SIZE: Parameter =
    Parameter { key: "size", value: "<SIZE>", help: "size of the disk, as the command is told", required: true };
/// See [`SIZE`].
pub const LABEL: Parameter =
    Parameter { key: "label", value: "<LABEL>", help: "label of the file system, none unless given", required: false };
/// See [`SIZE`].
pub const TYPE: Parameter =
    Parameter { key: "type", value: "<TYPE>", help: "type of the file system, ext4 unless given", required: false };
/// See [`SIZE`].
pub const COMMAND: Parameter = Parameter {
    key: "command",
    value: "<COMMAND>",
    help: "what makes \"$disk\" of $size bytes instead of mkfs, for /bin/sh; other parameters are its variables",
    required: false,
};

/// How disks are made.
#[derive(Debug, Default)]
pub struct Recipe {
    /// What was asked for; the command may make less or more.
    pub size: Option<u64>,
    command: Option<Vec<u8>>,
    /// In the order in which they were given.
    variables: Vec<(String, Vec<u8>)>,
}

impl Recipe {
    /// Takes a parameter that is not the plugin's own.
    pub fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        match key {
            "command" => self.command = Some(value.bytes().to_vec()),
            "size" => self.size = Some(values::size(value.text(key)?).map_err(ConfigError)?),
            // It tells the command where to.
            "disk" => return Err(ConfigError("'disk' parameter cannot be set on the command line".to_owned())),
            _ if is_shell_variable(key) => self.variables.push((key.to_owned(), value.bytes().to_vec())),
            _ => return Err(ConfigError(format!("unknown parameter '{key}'"))),
        }
        Ok(())
    }

    /// What the shell is given to do.
    fn script(&self, disk: &Path) -> Vec<u8> {
        // With -s our stdout is the client's.
        let mut script = b"exec </dev/null >/dev/null\n".to_vec();
        let mut set = |name: &str, value: &[u8]| {
            script.extend_from_slice(name.as_bytes());
            script.push(b'=');
            script.extend_from_slice(&shell_quote(value));
            script.push(b'\n');
        };
        set("disk", disk.as_os_str().as_bytes());
        set("size", self.size.unwrap_or(0).to_string().as_bytes());
        for (name, value) in &self.variables {
            set(name, value);
        }
        script.extend_from_slice(self.command.as_deref().unwrap_or(DEFAULT_COMMAND.as_bytes()));
        script
    }

    /// Runs the command, for as long as it takes, but not when the server ends: nobody was promised the disk yet.
    /// Errors: it cannot be run, did not succeed, or was killed because of that.
    pub fn make(&self, disk: &Path, connection: &Connection) -> device::Result<()> {
        let failed = |why: String| Err(Error::failed(ErrorCode::Io, why));
        let Ok(script) = CString::new(self.script(disk)) else {
            return failed("a NUL in the command or the name of the disk".to_owned());
        };
        let words: [&CStr; 3] = [c"sh", c"-c", &script];
        let environment = kept::environment(&[]);
        let program = Program { path: c"/bin/sh", words: &words, environment: &environment };
        match connection.wait(&Call::BLOCKING, async { kept::run_quietly(program).await })? {
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            Ok(WaitStatus::Exited(_, status)) => failed(format!("command exited with code {status}")),
            Ok(WaitStatus::Signaled(_, signal, _)) => failed(format!("command killed by signal {}", signal as i32)),
            Ok(_) => failed("command did not end".to_owned()),
            Err(error) => Err(Error::system("failed to execute command", error)),
        }
    }
}

/// Whether a shell can have a variable of that name. Source: nbdkit common/utils/utils.c `is_shell_variable`.
fn is_shell_variable(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && name.bytes().next().is_some_and(|first| !first.is_ascii_digit())
}

/// Serves a disk that was made, with what nbdkit offers for it. `keep`: it outlives its client, so what is to be on stable
/// storage goes there.
pub fn serve(fd: OwnedFd, writable: bool, name: String, keep: bool) -> device::Result<Box<dyn Device>> {
    Ok(Box::new(Filtered(Disk { next: file::serve(fd, writable, name)?, keep })))
}

struct Disk {
    next: Box<dyn Device>,
    keep: bool,
}

impl Disk {
    fn flags(&self, flags: Flags) -> Flags {
        Flags { fua: flags.fua && self.keep, ..flags }
    }
}

impl Filter for Disk {
    fn next(&self) -> &dyn Device {
        &*self.next
    }

    fn capabilities(&self) -> device::Result<Capabilities> {
        Ok(Capabilities {
            write: self.next.capabilities()?.write,
            flush: true,
            trim: true,
            zero: Support::Emulate,
            fast_zero: true,
            fua: Support::Native,
            ..Capabilities::default()
        })
    }

    fn write(&self, data: &[u8], offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        self.next.write(data, offset, self.flags(flags), call)
    }

    fn flush(&self, call: &Call) -> device::Result<()> {
        if self.keep { self.next.flush(call) } else { Ok(()) }
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags, call: &Call) -> device::Result<()> {
        self.next.trim(length, offset, self.flags(flags), call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_is_what_a_shell_takes_for_one() {
        for name in ["a", "_", "A1", "some_thing"] {
            assert!(is_shell_variable(name), "{name}");
        }
        for name in ["", "1a", "a-b", "a.b", "é"] {
            assert!(!is_shell_variable(name), "{name}");
        }
    }
}

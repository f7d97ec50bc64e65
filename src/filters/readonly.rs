//! `readonly`: nothing can be written, always or while a file exists. Source: nbdkit filters/readonly/readonly.c.

use std::path::PathBuf;
use std::sync::Arc;

use nbdcaptive_actors::device::{
    Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Result, Support, ThreadModel,
};
use nbdcaptive_actors::filter::{Filtered, Next};
use nix::unistd::{AccessFlags, access};

use super::kit::{Gate, Gated, Request, absolute, each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};

/// See the module.
pub static ABOUT: About = About {
    name: "readonly",
    summary: "let nothing be written

        Clients are told that they cannot write. With a file they may be told that they can, and writes fail with
        EPERM as long as the file is there.

        # Examples

            nbdcaptive --filter=readonly memory 1M --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[optional("readonly-file", "<FILENAME>", "only while this file is there and can be read")],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug, Default)]
pub struct ReadOnly {
    file: Option<PathBuf>,
}

impl Filter for ReadOnly {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "readonly-file" if self.file.is_some() => {
                return Err(ConfigError("readonly-file parameter appears multiple times".to_owned()));
            }
            "readonly-file" => self.file = Some(absolute(value)?),
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let file = self.file.map(Arc::new);
        Ok(each(next, move |next, client| {
            let client = Client { read_only: client.read_only || file.is_none(), ..client.clone() };
            let next = Next::open(next, &client)?;
            Ok(Filtered(Gated(Disk { next, file: file.clone() })))
        }))
    }
}

struct Disk {
    next: Next,
    /// `None`: always.
    file: Option<Arc<PathBuf>>,
}

impl Gate for Disk {
    type Pass = ();

    fn next(&self) -> &Next {
        &self.next
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let next = self.next.capabilities()?;
        Ok(match self.file {
            Some(_) => next,
            None => Capabilities { write: false, trim: false, zero: Support::None, fua: Support::None, ..next },
        })
    }

    fn before(&self, request: &Request, _call: &Call) -> Result<()> {
        let changes = matches!(request, Request::Write { .. } | Request::Trim { .. } | Request::Zero { .. });
        let is_on = || self.file.as_ref().is_none_or(|file| access(&**file, AccessFlags::R_OK).is_ok());
        if changes && is_on() {
            let why = format!("{} operation rejected by readonly filter", request.name());
            return Err(Error::failed(ErrorCode::NotPermitted, why));
        }
        Ok(())
    }
}

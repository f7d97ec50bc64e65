//! The command's process, from its fork to the shell that it becomes.
//!
//! It is forked first of all, while everything is still as the caller made it, and waits for the word to go. It leaves the
//! caller's session, group, terminal, directory, descriptors and limits alone, and gets back the caller's mask, dispositions
//! and umask; so nothing of ours reaches the command. Source: nbdkit server/captive.c, which runs the command by system(3).

use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;

use crate::inherited::Inherited;

/// What comes before the variables when the command may go. Without it the pipe's end means: never.
const GO: u8 = b'!';

/// The way to say "go". Dropped without it, the command never starts.
#[derive(Debug)]
pub struct Starter(PipeWriter);

impl Starter {
    /// Lets the command go, which sees `prelude` in front of it. Errors: it was killed while it waited.
    pub fn go(mut self, prelude: &[u8]) -> io::Result<()> {
        self.0.write_all(&[&[GO][..], prelude].concat())
    }
}

/// A starter, and what the command's process waits at.
pub fn starter() -> io::Result<(Starter, PipeReader)> {
    let (reader, writer) = io::pipe()?;
    Ok((Starter(writer), reader))
}

/// Waits for the word to go and becomes `/bin/sh -c`. Returns only if it may not go (`Ok`), or cannot.
pub fn become_command(mut wait: PipeReader, run: &OsStr, inherited: &Inherited) -> io::Result<Option<Infallible>> {
    // A signal may end the wait: it was meant for the command, which is not there yet, and the guardian is told.
    inherited.give_back();
    let mut words = Vec::new();
    wait.read_to_end(&mut words)?;
    let Some((&GO, prelude)) = words.split_first() else { return Ok(None) };
    let mut script = prelude.to_vec();
    script.extend_from_slice(run.as_bytes());
    // Neither can hold a NUL: the one is made of command-line words, the other is one.
    let script = CString::new(script)?;
    let (shell, name, flag) = (c"/bin/sh", c"sh", c"-c");
    Err(nix::unistd::execv(shell, &[name, flag, &script]).map_or_else(io::Error::from, |never| match never {}))
}

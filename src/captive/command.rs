//! The command's process, from its fork to the shell that it becomes.
//!
//! It is forked first of all, while everything is still as the caller made it, and waits for the word to go. It leaves the
//! caller's session, group, terminal, directory, descriptors and limits alone, and gets back the caller's mask, dispositions
//! and umask; so nothing of ours reaches the command. Source: nbdkit server/captive.c, which runs the command by system(3).

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;

use crate::cli::{Parameter, split_parameter};
use crate::inherited::Inherited;
use crate::layer::KEPT_FROM_COMMAND;

/// What comes first when the command may go. Without it the pipe's end means: never.
const GO: u8 = b'!';

/// What the command's process is to do before it becomes the command.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Errand {
    /// To be printed on the caller's stdout, which no other process holds.
    pub print: Vec<u8>,
    /// Shell text in front of the command.
    pub prelude: Vec<u8>,
}

impl Errand {
    /// As bytes, to be handed on.
    pub fn encode(&self) -> Vec<u8> {
        let length = (self.print.len() as u32).to_ne_bytes();
        [&length[..], &self.print, &self.prelude].concat()
    }

    /// Whether the command can be started with it. Errors: it is too long to be handed on, or, with the command, for a word that
    /// a process may be given, as a line for people.
    pub fn fits(&self, run: &OsStr) -> Result<(), String> {
        /// The kernel's MAX_ARG_STRLEN, 32 pages of 4 KiB, without the NUL at the end.
        const LONGEST_WORD: usize = 32 * 4096 - 1;
        /// What a message of [`super::link`] says in front of it.
        const HEAD: usize = 9;
        let (told, word) = (HEAD + self.encode().len(), self.prelude.len() + run.len());
        let too_long = |what: &str, length: usize, most: usize| {
            Err(format!("--run: {what} is too long: length {length} > max {most} bytes"))
        };
        if told > super::link::LONGEST {
            too_long("what the command is told of the server", told, super::link::LONGEST)
        } else if word > LONGEST_WORD {
            too_long("the command with its shell variables", word, LONGEST_WORD)
        } else {
            Ok(())
        }
    }

    fn decode(bytes: &[u8]) -> Option<Errand> {
        let (length, rest) = bytes.split_first_chunk()?;
        let (print, prelude) = rest.split_at_checked(u32::from_ne_bytes(*length) as usize)?;
        Some(Errand { print: print.to_vec(), prelude: prelude.to_vec() })
    }
}

/// The way to say "go". Dropped without it, the command never starts.
#[derive(Debug)]
pub struct Starter(PipeWriter);

impl Starter {
    /// Lets the command go, with an [`Errand`] as bytes. Errors: it was killed while it waited.
    pub fn go(mut self, errand: &[u8]) -> io::Result<()> {
        self.0.write_all(&[&[GO][..], errand].concat())
    }
}

/// A starter, and what the command's process waits at.
pub fn starter() -> io::Result<(Starter, PipeReader)> {
    let (reader, writer) = io::pipe()?;
    Ok((Starter(writer), reader))
}

/// Sees to it that the command does not get the descriptors which `parameters` keep from it.
pub fn keep_descriptors(parameters: &[OsString]) {
    for parameter in parameters {
        if let Parameter::KeyValue(key, value) = split_parameter(parameter)
            && KEPT_FROM_COMMAND.contains(&key.as_str())
            && let Some(number) = value.to_str().and_then(|text| text.parse::<i32>().ok())
            && number > 2
        {
            // One that is not open is the server's to complain of.
            crate::inherited::close_at_exec(number);
        }
    }
}

/// Waits for the word to go and becomes `/bin/sh -c`. Returns only if it may not go (`Ok`), or cannot.
pub fn become_command(mut wait: PipeReader, run: &OsStr, inherited: &Inherited) -> io::Result<Option<Infallible>> {
    // A signal may end the wait: it was meant for the command, which is not there yet, and the guardian is told.
    inherited.give_back();
    let mut words = Vec::new();
    wait.read_to_end(&mut words)?;
    let Some((&GO, errand)) = words.split_first() else { return Ok(None) };
    let Errand { print, prelude } = Errand::decode(errand).ok_or(io::ErrorKind::InvalidData)?;
    if !print.is_empty() {
        // The command is more than the line before it.
        let _ = crate::report::print(&print);
    }
    let mut script = prelude;
    script.extend_from_slice(run.as_bytes());
    // Neither can hold a NUL: the one is made of command-line words, the other is one.
    let script = CString::new(script)?;
    let (shell, name, flag) = (c"/bin/sh", c"sh", c"-c");
    Err(nix::unistd::execv(shell, &[name, flag, &script]).map_or_else(io::Error::from, |never| match never {}))
}

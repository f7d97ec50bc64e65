//! Becoming somebody else (`-u`, `-g`): after everything was opened that needs the caller's rights, before any client is taken.
//!
//! Supplementary groups go first, because without them the rest would be a promise half kept. What was made on disk before
//! stays the caller's, and is removed by a process that still is: the guardian or the sweeper.
//! Source: nbdkit server/usergroup.c.

use nix::errno::Errno;
use nix::unistd::{Gid, Group, Uid, User, setgid, setgroups, setuid};

use crate::cli::Options;
use crate::values;

/// Whether the options ask for it.
pub fn is_wanted(options: &Options) -> bool {
    options.user.is_some() || options.group.is_some()
}

/// Whether the user that an option names is root. No where there is no such user.
pub fn is_root(name: &str) -> bool {
    user(name).is_ok_and(|user| user.is_root())
}

/// Changes group and user of the whole process. Errors: an unknown name, or no right to do so, as a line for people.
pub fn change(options: &Options) -> Result<(), String> {
    // Both are looked up first: afterwards the files with the names may be out of reach.
    let group = options.group.as_deref().map(group).transpose()?;
    let user = options.user.as_deref().map(user).transpose()?;
    if let Some(group) = group {
        setgroups(&[group]).map_err(|error| failed("setgroups", options.group.as_deref(), error))?;
        setgid(group).map_err(|error| failed("setgid", options.group.as_deref(), error))?;
    } else if user.is_some_and(|user| user != Uid::current() || user != Uid::effective()) {
        // Who stays who he is has nothing to lose, and may not.
        setgroups(&[]).map_err(|error| failed("setgroups", options.user.as_deref(), error))?;
    }
    if let Some(user) = user {
        setuid(user).map_err(|error| failed("setuid", options.user.as_deref(), error))?;
    }
    Ok(())
}

fn failed(call: &str, name: Option<&str>, error: Errno) -> String {
    let hint = if error == Errno::EPERM { "; only root may become another user or group" } else { "" };
    format!("{call}: {}: {}{hint}", name.unwrap_or_default(), error.desc())
}

fn user(text: &str) -> Result<Uid, String> {
    let named = User::from_name(text);
    let number = || number(text).map(Uid::from_raw);
    known("-u", "user name or uid", text, named.map(|user| user.map(|user| user.uid)), number)
}

fn group(text: &str) -> Result<Gid, String> {
    let named = Group::from_name(text);
    let number = || number(text).map(Gid::from_raw);
    known("-g", "group name or gid", text, named.map(|group| group.map(|group| group.gid)), number)
}

/// A name that looks like a number is a name all the same, as in nbdkit.
fn known<T>(
    option: &str,
    what: &str,
    text: &str,
    named: Result<Option<T>, Errno>,
    number: impl FnOnce() -> Option<T>,
) -> Result<T, String> {
    let (named, why) = match named {
        Ok(named) => (named, String::new()),
        Err(error) => (None, format!(" ({})", error.desc())),
    };
    named.or_else(number).ok_or_else(|| format!("{option} option: {text} is not a valid {what}{why}"))
}

/// An id. All ones is none: to the system it means "no change".
fn number(text: &str) -> Option<u32> {
    values::unsigned("id", text).ok().filter(|number| *number != u32::MAX)
}

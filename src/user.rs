//! Becoming somebody else (`-u`, `-g`): after everything was opened that needs the caller's rights, before any client is taken.
//!
//! Supplementary groups go first, because without them the rest would be a promise half kept. What was made on disk before
//! stays the caller's, and is removed by a process that still is: the guardian or the sweeper.
//! Source: nbdkit server/usergroup.c.

use nix::unistd::{Gid, Group, Uid, User, setgid, setgroups, setuid};

use crate::cli::Options;

/// Whether the options ask for it.
pub fn is_wanted(options: &Options) -> bool {
    options.user.is_some() || options.group.is_some()
}

/// Changes group and user of the whole process. Errors: an unknown name, or no right to do so, as a line for people.
pub fn change(options: &Options) -> Result<(), String> {
    // Both are looked up first: afterwards the files with the names may be out of reach.
    let group = options.group.as_deref().map(group).transpose()?;
    let user = options.user.as_deref().map(user).transpose()?;
    if let Some(group) = group {
        setgroups(&[group]).map_err(|error| format!("setgroups: {}", error.desc()))?;
        setgid(group).map_err(|error| format!("setgid: {group}: {}", error.desc()))?;
    } else if user.is_some() {
        setgroups(&[]).map_err(|error| format!("setgroups: {}", error.desc()))?;
    }
    if let Some(user) = user {
        setuid(user).map_err(|error| format!("setuid: {user}: {}", error.desc()))?;
    }
    Ok(())
}

fn user(text: &str) -> Result<Uid, String> {
    if let Ok(number) = text.parse() {
        return Ok(Uid::from_raw(number));
    }
    match User::from_name(text) {
        Ok(Some(user)) => Ok(user.uid),
        Ok(None) => Err(format!("-u: {text}: no such user")),
        Err(error) => Err(format!("-u: {text}: {}", error.desc())),
    }
}

fn group(text: &str) -> Result<Gid, String> {
    if let Ok(number) = text.parse() {
        return Ok(Gid::from_raw(number));
    }
    match Group::from_name(text) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(format!("-g: {text}: no such group")),
        Err(error) => Err(format!("-g: {text}: {}", error.desc())),
    }
}

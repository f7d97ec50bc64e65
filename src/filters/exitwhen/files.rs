//! Names that are waited for to be there, or to be gone.
//!
//! A name leads through directories, and through those that symbolic links on its way lead through. Each of these is watched
//! for the one name that is looked up in it, from the root on, and each *before* the name is looked up: so whatever changes
//! the way later (an ancestor that appears, goes, is renamed into place; a link that is turned) is told, and the way is then
//! walked anew. What decides is nbdkit's question, access(2) for reading. Two things are seen that no look can see: a file
//! that was created and is gone again, and one that was deleted and is there again.
//!
//! Not told are changes by another host (network file systems), in /proc and /sys, by mounting, and in directories that may
//! be passed but not read: for these there is a look every so often. It also stands in where inotify is not to be had.
//! Source: inotify(7), path_resolution(7); nbdkit filters/exitwhen/exitwhen.c.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_io::{Async, Timer};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{Access, access};
use rustix::io::Errno;
use smol::future::or;

use crate::report::Report;
use crate::unblock::unblock;

/// How many symbolic links a name may lead through, as for the kernel.
const LINKS: u32 = 40;

/// What changes the way of a name: in a directory, and to the directory itself.
fn changes() -> WatchFlags {
    let inside = WatchFlags::CREATE | WatchFlags::MOVE | WatchFlags::DELETE | WatchFlags::ATTRIB;
    inside | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF | WatchFlags::ONLYDIR
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The file is there, and may be read.
    Created,
    /// It is not.
    Deleted,
}

impl Wanted {
    /// Whether it is so now. What was so for a moment is told by [`Files::happens`] alone.
    pub fn is_so(self, path: &Path) -> bool {
        match (self, access(path, Access::READ_OK)) {
            (Wanted::Created, found) => found.is_ok(),
            (Wanted::Deleted, found) => matches!(found, Err(Errno::NOENT | Errno::NOTDIR)),
        }
    }
}

#[derive(Debug)]
struct Target {
    wanted: Wanted,
    path: PathBuf,
    /// Why it could not be looked at the last time: said once, not at each look.
    complaint: Option<Errno>,
}

/// A name that is looked up in a watched directory.
#[derive(Debug)]
struct Step {
    /// Whose way it is on.
    target: usize,
    directory: PathBuf,
    name: OsString,
    /// The way ends here, unless it is a symbolic link.
    last: bool,
}

/// What inotify told.
#[derive(Debug, Default)]
struct News {
    /// The way of some name may be another one.
    look: bool,
    /// What a name ended at was created or moved here: whose, and where.
    came: Vec<(usize, PathBuf)>,
    /// It was deleted or moved away.
    left: HashSet<usize>,
}

/// All names that are waited for.
#[derive(Debug, Default)]
pub struct Files {
    targets: Vec<Target>,
    // Shared with the reactor, which watches it while somebody else looks.
    inotify: Option<Arc<OwnedFd>>,
    watches: HashMap<i32, Vec<Step>>,
}

impl Files {
    /// Waits for this, too.
    pub fn add(&mut self, wanted: Wanted, path: PathBuf) {
        self.targets.push(Target { wanted, path, complaint: None });
    }

    /// All of them.
    pub fn names(&self) -> Vec<(Wanted, PathBuf)> {
        self.targets.iter().map(|target| (target.wanted, target.path.clone())).collect()
    }

    /// Whether there is nothing to wait for.
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// Begins to watch. What has happened already, if anything has; what happens later is told by [`Files::happens`].
    pub fn start(&mut self) -> Option<String> {
        if self.is_empty() {
            return None;
        }
        self.inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok().map(Arc::new);
        self.look(&News::default())
    }

    /// Done when the first of them has happened. Looks without being told every `poll`.
    pub async fn happens(mut self, poll: Duration) -> String {
        let mut source = self.inotify.clone().and_then(|inotify| Async::new_nonblocking(inotify).ok());
        let mut next_look = Timer::after(poll);
        loop {
            let told = async {
                match &source {
                    Some(source) => Some(source.readable().await),
                    None => std::future::pending().await,
                }
            };
            let due = async {
                (&mut next_look).await;
                None
            };
            let news = match or(told, due).await {
                Some(Ok(())) => self.read(),
                Some(Err(_)) => {
                    source = None;
                    News { look: true, ..News::default() }
                }
                None => News { look: true, ..News::default() },
            };
            if !news.look {
                continue;
            }
            // Not on the executor: a file system may keep whoever looks at it waiting. Dropped meanwhile, the look is made to
            // its end and forgotten.
            let line;
            (self, line) = unblock(move || {
                let line = self.look(&news);
                (self, line)
            })
            .await;
            if let Some(line) = line {
                return line;
            }
            next_look = Timer::after(poll);
        }
    }

    /// What was told since the last time. At most one buffer: if there is more, the descriptor stays readable.
    fn read(&self) -> News {
        let mut news = News::default();
        let Some(inotify) = &self.inotify else { return news };
        let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
        let mut reader = inotify::Reader::new(inotify, &mut buffer);
        // Whose way is another one by now: what is told of its old end is not about it.
        let mut astray = HashSet::new();
        while let Ok(event) = reader.next() {
            let what = event.events();
            if what.intersects(ReadFlags::QUEUE_OVERFLOW) {
                news.look = true;
            }
            let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
            for step in self.watches.get(&event.wd()).map(Vec::as_slice).unwrap_or_default() {
                match name {
                    Some(name) if name != step.name => continue,
                    Some(_) if !step.last => {
                        if !what.contains(ReadFlags::ATTRIB) {
                            astray.insert(step.target);
                        }
                    }
                    Some(_) if astray.contains(&step.target) => {}
                    Some(_) if what.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) => {
                        news.came.push((step.target, step.directory.join(&step.name)));
                    }
                    Some(_) if what.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) => {
                        news.left.insert(step.target);
                    }
                    Some(_) => {}
                    None => {
                        if what.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::UNMOUNT) {
                            astray.insert(step.target);
                        }
                    }
                }
                news.look = true;
            }
            if reader.is_buffer_empty() {
                break;
            }
        }
        news
    }

    /// Walks every name's way anew, and looks where it ends: what has happened, if anything has.
    fn look(&mut self, news: &News) -> Option<String> {
        let before = std::mem::take(&mut self.watches);
        for target in 0..self.targets.len() {
            self.walk(target);
        }
        if let Some(inotify) = &self.inotify {
            for watch in before.keys().filter(|watch| !self.watches.contains_key(watch)) {
                // The kernel has dropped those of directories that are gone.
                let _ = inotify::remove_watch(inotify, *watch);
            }
        }
        self.targets.iter_mut().enumerate().find_map(|(index, target)| target.check(index, news))
    }

    /// Watches all that the way of a name depends on.
    fn walk(&mut self, target: usize) {
        let mut ahead = Vec::new();
        put_ahead(&mut ahead, &self.targets[target].path);
        // The directory that the way has come to, without symbolic links.
        let mut here = PathBuf::from("/");
        let mut links = 0;
        while let Some(step) = ahead.pop() {
            let name = match step {
                Ahead::Root => {
                    here = PathBuf::from("/");
                    continue;
                }
                Ahead::Parent => {
                    here.pop();
                    continue;
                }
                Ahead::Name(name) => name,
            };
            let there = here.join(&name);
            self.watch(Step { target, directory: here.clone(), name, last: ahead.is_empty() });
            // Only now: what changes from here on is told.
            match fs::symlink_metadata(&there) {
                Ok(found) if found.is_symlink() => {
                    links += 1;
                    match fs::read_link(&there) {
                        Ok(to) if links <= LINKS => put_ahead(&mut ahead, &to),
                        _ => return,
                    }
                }
                Ok(found) if found.is_dir() => here = there,
                // The end, or the way is blocked by something that is no directory.
                Ok(_) => return,
                // The way ends early.
                Err(_) => return,
            }
        }
    }

    fn watch(&mut self, step: Step) {
        let Some(inotify) = &self.inotify else { return };
        // Not to be watched: gone in this moment, which its own directory tells; or not readable, or there are too many
        // watches, which leaves the look every so often.
        if let Ok(watch) = inotify::add_watch(inotify, &step.directory, changes()) {
            self.watches.entry(watch).or_default().push(step);
        }
    }
}

impl Target {
    fn check(&mut self, index: usize, news: &News) -> Option<String> {
        let path = self.path.display();
        match (self.wanted, access(&self.path, Access::READ_OK)) {
            (Wanted::Created, Ok(())) => return Some(format!("exit-when-file-created: {path} is there")),
            (Wanted::Created, Err(_)) => {
                // What is there but does not count is a dangling link, or may not be read.
                let gone = |place: &Path| {
                    fs::symlink_metadata(place).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
                };
                if news.came.iter().any(|(target, place)| *target == index && gone(place)) {
                    return Some(format!("exit-when-file-created: {path} was there for a moment"));
                }
            }
            (Wanted::Deleted, Err(Errno::NOENT | Errno::NOTDIR)) => {
                return Some(format!("exit-when-file-deleted: {path} is gone"));
            }
            (Wanted::Deleted, _) if news.left.contains(&index) => {
                return Some(format!("exit-when-file-deleted: {path} was gone for a moment"));
            }
            (Wanted::Deleted, Ok(())) => self.complaint = None,
            (Wanted::Deleted, Err(error)) => {
                if self.complaint.replace(error) != Some(error) {
                    Report::early().error(format_args!("exit-when-file-deleted: access: {path}: {error}"));
                }
            }
        }
        None
    }
}

/// A part of a way that is not walked yet.
enum Ahead {
    Root,
    Parent,
    Name(OsString),
}

/// Puts the parts of `path` before what is ahead. The next one is the last of the list.
fn put_ahead(ahead: &mut Vec<Ahead>, path: &Path) {
    ahead.extend(path.components().rev().filter_map(|component| match component {
        Component::RootDir => Some(Ahead::Root),
        Component::ParentDir => Some(Ahead::Parent),
        Component::Normal(name) => Some(Ahead::Name(name.to_owned())),
        Component::CurDir | Component::Prefix(_) => None,
    }));
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::tests::{Room, never, within};
    use super::*;

    /// A look that nobody asks for.
    const NEVER: Duration = Duration::MAX;

    fn waiting(wanted: Wanted, path: &Path) -> Files {
        let mut files = Files::default();
        files.add(wanted, path.to_owned());
        assert_eq!(files.start(), None);
        files
    }

    fn created(path: &Path, state: &str) -> String {
        format!("exit-when-file-created: {} {state}", path.display())
    }

    fn deleted(path: &Path, state: &str) -> String {
        format!("exit-when-file-deleted: {} {state}", path.display())
    }

    /// Waits for a file, does this, and it must have been noticed.
    #[track_caller]
    fn creates(path: &Path, act: impl FnOnce()) {
        let mut happens = Box::pin(waiting(Wanted::Created, path).happens(NEVER));
        never(&mut happens);
        act();
        assert_eq!(within(happens), created(path, "is there"));
    }

    /// The same for the file's end.
    #[track_caller]
    fn deletes(path: &Path, act: impl FnOnce()) {
        let mut happens = Box::pin(waiting(Wanted::Deleted, path).happens(NEVER));
        never(&mut happens);
        act();
        assert_eq!(within(happens), deleted(path, "is gone"));
    }

    fn touch(path: &Path) {
        fs::write(path, "").unwrap();
    }

    /// D1
    #[test]
    fn a_file_that_is_created_is_noticed() {
        let room = Room::new("file");
        let path = room.0.join("stop");
        creates(&path, || touch(&path));
        deletes(&path, || fs::remove_file(&path).unwrap());
        creates(&path, || fs::create_dir(&path).unwrap());
        deletes(&path, || fs::remove_dir(&path).unwrap());
    }

    /// D3: "Renamed into place"
    #[test]
    fn a_file_that_is_moved_is_noticed() {
        let room = Room::new("move");
        let (path, other) = (room.0.join("stop"), room.0.join("other"));
        touch(&other);
        creates(&path, || fs::rename(&other, &path).unwrap());
        deletes(&path, || fs::rename(&path, &other).unwrap());
        creates(&path, || fs::hard_link(&other, &path).unwrap());
    }

    #[test]
    fn what_happens_beside_it_is_nothing() {
        let room = Room::new("beside");
        let (path, other) = (room.0.join("stop"), room.0.join("stop2"));
        let mut created = Box::pin(waiting(Wanted::Created, &path).happens(NEVER));
        touch(&path.with_file_name("sto"));
        touch(&other);
        fs::remove_file(&other).unwrap();
        never(&mut created);
        touch(&path);
        within(created);
        let mut deleted = Box::pin(waiting(Wanted::Deleted, &path).happens(NEVER));
        touch(&other);
        // In its place at once: at no time was it gone.
        fs::rename(&other, &path).unwrap();
        fs::write(&path, "more").unwrap();
        never(&mut deleted);
        fs::remove_file(&path).unwrap();
        within(deleted);
    }

    /// D2: "created and removed again between polls: seen"
    #[test]
    fn a_file_that_was_there_for_a_moment_is_noticed() {
        let room = Room::new("moment");
        let path = room.0.join("stop");
        let files = waiting(Wanted::Created, &path);
        touch(&path);
        fs::remove_file(&path).unwrap();
        assert_eq!(within(files.happens(NEVER)), created(&path, "was there for a moment"));

        touch(&path);
        let files = waiting(Wanted::Deleted, &path);
        fs::remove_file(&path).unwrap();
        touch(&path);
        assert_eq!(within(files.happens(NEVER)), deleted(&path, "was gone for a moment"));
    }

    #[test]
    fn a_file_that_comes_to_be_elsewhere_is_another_one() {
        let room = Room::new("elsewhere");
        let (a, b) = (room.0.join("a"), room.0.join("b"));
        fs::create_dir(&a).unwrap();
        let mut happens = Box::pin(waiting(Wanted::Created, &a.join("stop")).happens(NEVER));
        fs::rename(&a, &b).unwrap();
        touch(&b.join("stop"));
        never(&mut happens);
        fs::rename(&b, &a).unwrap();
        assert_eq!(within(happens), created(&a.join("stop"), "is there"));

        // A link that is turned: where it led is elsewhere now.
        let (way, turned) = (room.0.join("way"), room.0.join("turned"));
        fs::create_dir(&b).unwrap();
        symlink("b", &way).unwrap();
        symlink("nowhere", &turned).unwrap();
        let mut happens = Box::pin(waiting(Wanted::Created, &way.join("stop")).happens(NEVER));
        fs::rename(&turned, &way).unwrap();
        touch(&b.join("stop"));
        fs::remove_file(b.join("stop")).unwrap();
        never(&mut happens);
        fs::rename(&b, room.0.join("nowhere")).unwrap();
        never(&mut happens);
        touch(&way.join("stop"));
        assert_eq!(within(happens), created(&way.join("stop"), "is there"));
    }

    #[test]
    fn ancestors_that_come_and_go_are_followed() {
        let room = Room::new("ancestors");
        let top = room.0.join("a");
        let path = top.join("b/c/stop");
        let aside = room.0.join("aside");
        let mut happens = Box::pin(waiting(Wanted::Created, &path).happens(NEVER));
        for _ in 0..2 {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            never(&mut happens);
            fs::remove_dir_all(&top).unwrap();
            never(&mut happens);
            fs::create_dir_all(aside.join("c")).unwrap();
            fs::create_dir(&top).unwrap();
            fs::rename(&aside, top.join("b")).unwrap();
            never(&mut happens);
            fs::rename(&top, &aside).unwrap();
            never(&mut happens);
            fs::remove_dir_all(&aside).unwrap();
        }
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        never(&mut happens);
        touch(&path);
        assert_eq!(within(happens), created(&path, "is there"));

        deletes(&path, || fs::rename(&top, &aside).unwrap());
        creates(&path, || fs::rename(&aside, &top).unwrap());
        deletes(&path, || fs::remove_dir_all(&top).unwrap());
        creates(&path, || {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            touch(&path);
        });
        // ENOTDIR is as good as ENOENT.
        deletes(&path, || {
            fs::rename(&top, &aside).unwrap();
            touch(&top);
        });
    }

    /// D3: "symlink counts only if it resolves"
    #[test]
    fn symbolic_links_are_followed_wherever_they_lead() {
        let room = Room::new("links");
        let (path, far) = (room.0.join("stop"), room.0.join("far/away/file"));
        let mut happens = Box::pin(waiting(Wanted::Created, &path).happens(NEVER));
        symlink("relative", &path).unwrap();
        never(&mut happens);
        symlink(&far, room.0.join("relative")).unwrap();
        never(&mut happens);
        fs::create_dir_all(far.parent().unwrap()).unwrap();
        never(&mut happens);
        touch(&far);
        assert_eq!(within(happens), created(&path, "is there"));

        deletes(&path, || fs::remove_file(&far).unwrap());
        touch(&far);
        deletes(&path, || fs::remove_file(room.0.join("relative")).unwrap());

        // A directory on the way that is a link, and is turned.
        let (way, one, two) = (room.0.join("way"), room.0.join("one"), room.0.join("two"));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&two).unwrap();
        touch(&two.join("stop"));
        symlink("far/../one", &way).unwrap();
        creates(&way.join("stop"), || {
            symlink("two", room.0.join("new")).unwrap();
            fs::rename(room.0.join("new"), &way).unwrap();
        });
    }

    #[test]
    fn links_in_a_circle_lead_nowhere() {
        let room = Room::new("circle");
        let path = room.0.join("stop");
        symlink("stop", &path).unwrap();
        let mut happens = Box::pin(waiting(Wanted::Created, &path.join("x")).happens(NEVER));
        never(&mut happens);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        touch(&path.join("x"));
        within(happens);
    }

    #[test]
    fn without_inotify_it_is_looked_for_every_so_often() {
        let room = Room::new("poll");
        let path = room.0.join("stop");
        let mut files = waiting(Wanted::Created, &path);
        files.inotify = None;
        let mut happens = Box::pin(files.happens(Duration::from_millis(1)));
        assert_eq!(smol::block_on(smol::future::poll_once(&mut happens)), None);
        touch(&path);
        assert_eq!(within(happens), created(&path, "is there"));
    }

    #[test]
    fn names_may_be_any_bytes() {
        let room = Room::new("bytes");
        let path = room.0.join(OsStr::from_bytes(b"st\xff\xfeop \n"));
        creates(&path, || touch(&path));
    }
}

//! `multi-conn`: whether clients may use several connections at once. Where the plugin does not keep them consistent, a flush
//! on one can be made a flush of all. Source: nbdkit filters/multi-conn/multi-conn.c, nbdkit-multi-conn-filter.pod.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};

use nbdcaptive_actors::device::{
    Call, Capabilities, Client, Device, Error, ErrorCode, Exports, Extents, Result, Support, ThreadModel,
};
use nbdcaptive_actors::filter::{Filtered, Next};

use super::kit::{Gate, Gated, Request, each, optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "multi-conn",
    summary: "let clients use several connections, or not

        A client may only use several connections at once if a flush on one of them is good for what was written on
        all. Plugins say whether it is. Where it is not, `auto` and `emulate` make every flush one of all
        connections; `unsafe` says that it is in any case, and `disable` that it is not.

        # Examples

            nbdcaptive --filter=multi-conn file disk.img \\
                multi-conn-mode=disable \\
                --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[
        optional("multi-conn-mode", "auto|emulate|plugin|disable|unsafe", "emulate where the plugin has it not; auto"),
        optional("multi-conn-track-dirty", "connection|fast|off", "how well is known what must be flushed; connection"),
        optional("multi-conn-exportname", "<BOOL>", "connections to different exports have nothing in common; false"),
        optional("multi-conn-export-name", "<BOOL>", "another name for multi-conn-exportname"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Auto,
    Emulate,
    Plugin,
    Disable,
    Unsafe,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Track {
    /// What each connection has read and written.
    #[default]
    Connection,
    /// Whether any has written.
    Fast,
    /// Every flush is one.
    Off,
}

/// The filter.
#[derive(Clone, Copy, Debug, Default)]
pub struct MultiConn {
    mode: Mode,
    track: Track,
    by_name: bool,
}

impl Filter for MultiConn {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        match key {
            "multi-conn-mode" => {
                self.mode = match text {
                    "auto" => Mode::Auto,
                    "emulate" => Mode::Emulate,
                    "plugin" => Mode::Plugin,
                    "disable" => Mode::Disable,
                    "unsafe" => Mode::Unsafe,
                    _ => return Err(ConfigError(format!("unknown multi-conn mode '{text}'"))),
                }
            }
            "multi-conn-track-dirty" => {
                self.track = match text {
                    "connection" | "conn" => Track::Connection,
                    "fast" => Track::Fast,
                    "off" => Track::Off,
                    _ => return Err(ConfigError(format!("unknown multi-conn track-dirty setting '{text}'"))),
                }
            }
            "multi-conn-exportname" | "multi-conn-export-name" => {
                self.by_name = values::boolean(text).map_err(ConfigError)?;
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let MultiConn { mut mode, track, by_name } = *self;
        if mode == Mode::Auto && next.thread_model() == ThreadModel::SerializeConnections {
            mode = Mode::Disable;
        }
        let groups = Groups::default();
        Ok(each(next, move |next, client: &Client| {
            let (next, mode) = Next::open(next, client)?.look(|next| resolve(mode, next.offered()))?;
            let name = if by_name { client.export_name.clone() } else { Vec::new() };
            let member = Arc::new(Member { next, dirty: AtomicU8::new(0), is_open: RwLock::new(true) });
            let group = groups.join(&name, &member);
            Ok(Filtered(Gated(Disk { member, group, name, mode, track, groups: groups.clone() })))
        }))
    }
}

/// What a mode comes to over this device.
fn resolve(mode: Mode, offered: &Capabilities) -> Result<Mode> {
    let mode = match mode {
        Mode::Auto if offered.multi_conn => Mode::Plugin,
        Mode::Auto => Mode::Emulate,
        mode => mode,
    };
    if mode == Mode::Emulate && !offered.flush {
        return Err(Error::failed(ErrorCode::Invalid, "emulating multi-conn requires working flush"));
    }
    Ok(mode)
}

/// It has written, so that something may wait to be stored.
const WRITE: u8 = 1;
/// It has read, so that something old may be kept.
const READ: u8 = 2;

/// A connection to the next device.
struct Member {
    next: Next,
    /// [`WRITE`] and [`READ`].
    dirty: AtomicU8,
    /// Held while it is flushed for others, so that it is not closed meanwhile.
    is_open: RwLock<bool>,
}

/// The connections that are to see the same data.
#[derive(Default)]
struct Group {
    members: Mutex<Vec<Arc<Member>>>,
    /// One of them has written.
    dirty: AtomicBool,
    /// Held by a flush: one that finds nothing to do may say so only when whatever did it is done.
    flushing: Mutex<()>,
}

impl Group {
    fn members(&self) -> MutexGuard<'_, Vec<Arc<Member>>> {
        // A list that only grows and shrinks is whole whoever panicked.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone, Default)]
struct Groups(Arc<Mutex<HashMap<Vec<u8>, Arc<Group>>>>);

impl Groups {
    fn all(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Arc<Group>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, name: &[u8], member: &Arc<Member>) -> Arc<Group> {
        let mut all = self.all();
        let group = Arc::clone(all.entry(name.to_vec()).or_default());
        group.members().push(Arc::clone(member));
        group
    }

    fn leave(&self, name: &[u8], group: &Group, member: &Arc<Member>) {
        let mut all = self.all();
        let mut members = group.members();
        members.retain(|other| !Arc::ptr_eq(other, member));
        if members.is_empty() {
            all.remove(name);
        }
    }
}

struct Disk {
    member: Arc<Member>,
    group: Arc<Group>,
    groups: Groups,
    name: Vec<u8>,
    mode: Mode,
    track: Track,
}

impl Disk {
    /// A client that sends a flush beside other requests is promised nothing of those, so these marks need no lock.
    fn mark(&self, what: u8) {
        if self.track == Track::Connection {
            self.member.dirty.fetch_or(what, Ordering::SeqCst);
        }
        if self.track != Track::Off && what == WRITE {
            self.group.dirty.store(true, Ordering::SeqCst);
        }
    }

    /// Flushes every connection that may have something to store, or something old.
    fn flush_all(&self, call: &Call) -> Result<()> {
        let members = self.group.members().clone();
        let is_dirty = self.group.dirty.swap(false, Ordering::SeqCst);
        let flush = |member: &Member| {
            let is_open = member.is_open.read().unwrap_or_else(PoisonError::into_inner);
            let dirty = member.dirty.swap(0, Ordering::SeqCst);
            let wants = self.track == Track::Off
                || dirty & WRITE != 0
                || (is_dirty && (self.track == Track::Fast || dirty & READ != 0));
            if !(wants && *is_open) {
                return Ok(());
            }
            member.next.flush(call).inspect_err(|_| {
                member.dirty.fetch_or(dirty, Ordering::SeqCst);
            })
        };
        members.iter().try_for_each(|member| flush(member)).inspect_err(|_| {
            self.group.dirty.fetch_or(is_dirty, Ordering::SeqCst);
        })
    }

    /// Flushes this connection, if there is anything to be flushed.
    fn flush_one(&self, call: &Call) -> Result<()> {
        let next = &self.member.next;
        if self.track != Track::Off && !self.group.dirty.load(Ordering::SeqCst) {
            return Ok(());
        }
        // Before the flush: what is written while it goes on is not in it.
        let shares = next.offered().multi_conn;
        let before = self.member.dirty.load(Ordering::SeqCst);
        match self.track {
            Track::Connection if shares => {
                self.group.members().iter().for_each(|member| member.dirty.store(0, Ordering::SeqCst));
                self.group.dirty.store(false, Ordering::SeqCst);
            }
            Track::Connection => self.member.dirty.store(0, Ordering::SeqCst),
            Track::Fast => self.group.dirty.store(false, Ordering::SeqCst),
            Track::Off => {}
        }
        next.flush(call).inspect_err(|_| {
            self.member.dirty.fetch_or(before, Ordering::SeqCst);
            self.group.dirty.store(true, Ordering::SeqCst);
        })
    }
}

impl Gate for Disk {
    type Pass = ();

    fn next(&self) -> &Next {
        &self.member.next
    }

    /// A flush of others' connections has to wait for them.
    fn answers_at_once(&self) -> bool {
        self.mode != Mode::Emulate && self.member.next.answers_at_once()
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let next = self.member.next.capabilities()?;
        let multi_conn = match self.mode {
            Mode::Emulate | Mode::Unsafe => true,
            Mode::Disable => false,
            Mode::Auto | Mode::Plugin => next.multi_conn,
        };
        // What this connection forces the others do not see: a flush of them all does.
        let fua = match next.fua {
            Support::Emulated | Support::Native if self.mode == Mode::Emulate => Support::Emulate,
            fua => fua,
        };
        Ok(Capabilities { multi_conn, fua, ..next })
    }

    fn before(&self, request: &Request, _call: &Call) -> Result<()> {
        match request {
            Request::Read { .. } | Request::Cache { .. } => self.mark(READ),
            Request::Write { flags, .. } | Request::Trim { flags, .. } | Request::Zero { flags, .. } if !flags.fua => {
                self.mark(WRITE);
            }
            _ => {}
        }
        Ok(())
    }

    fn after(&self, (): (), request: &Request, _result: &Result<()>, _map: Option<&Extents>) {
        // Again, because a flush that came meanwhile may not have covered it.
        if let Request::Write { flags, .. } | Request::Trim { flags, .. } | Request::Zero { flags, .. } = request
            && !flags.fua
        {
            self.mark(WRITE);
        }
    }

    fn flush(&self, call: &Call) -> Result<()> {
        let _turn = match self.group.flushing.try_lock() {
            Err(TryLockError::WouldBlock) if !call.may_block() => return Err(Error::WouldBlock),
            Err(TryLockError::WouldBlock) => self.group.flushing.lock().unwrap_or_else(PoisonError::into_inner),
            // There is nothing behind it that a panic could leave half done.
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Ok(turn) => turn,
        };
        if self.mode == Mode::Emulate { self.flush_all(call) } else { self.flush_one(call) }
    }

    fn close(&self) -> Result<()> {
        self.groups.leave(&self.name, &self.group, &self.member);
        *self.member.is_open.write().unwrap_or_else(PoisonError::into_inner) = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{memory, over, refused};
    use nbdcaptive_actors::device::Flags;
    use nbdcaptive_actors::filter::{Filter as Between, FilterExports, FilteredExports};

    /// Devices that do not see each other's writes; each notes its flushes under its number.
    struct Apart {
        next: Arc<dyn Exports>,
        log: Arc<Mutex<Vec<usize>>>,
        count: Mutex<usize>,
    }

    struct ApartDisk {
        next: Box<dyn Device>,
        log: Arc<Mutex<Vec<usize>>>,
        number: usize,
    }

    impl FilterExports for Apart {
        fn next(&self) -> &dyn Exports {
            &*self.next
        }
        fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
            let mut number = self.count.lock().unwrap();
            *number += 1;
            let next = self.next.open(client)?;
            Ok(Box::new(Filtered(ApartDisk { next, log: Arc::clone(&self.log), number: *number })))
        }
    }

    impl Between for ApartDisk {
        fn next(&self) -> &dyn Device {
            &*self.next
        }
        fn capabilities(&self) -> Result<Capabilities> {
            Ok(Capabilities { multi_conn: false, ..self.next.capabilities()? })
        }
        fn flush(&self, _call: &Call) -> Result<()> {
            self.log.lock().unwrap().push(self.number);
            Ok(())
        }
    }

    type Log = Arc<Mutex<Vec<usize>>>;

    fn apart(parameters: &[(&str, &str)]) -> (Arc<dyn Exports>, Log) {
        let log = Log::default();
        let apart = Apart { next: memory("1M"), log: Arc::clone(&log), count: Mutex::default() };
        (over(Arc::new(FilteredExports(apart)), "multi-conn", parameters).unwrap(), log)
    }

    fn write(device: &dyn Device) {
        device.write(&[1], 0, Flags::default(), &Call::BLOCKING).unwrap();
    }

    /// Who is flushed by the second of three, of whom the first has written and the third has read.
    fn flushed(parameters: &[(&str, &str)]) -> Vec<usize> {
        let (exports, log) = apart(parameters);
        let open = |name: &str| exports.open(&Client { export_name: name.into(), ..Client::default() }).unwrap();
        let (one, two, three) = (open("a"), open("a"), open("b"));
        write(&*one);
        three.read(&mut [0], 0, &Call::BLOCKING).unwrap();
        two.flush(&Call::BLOCKING).unwrap();
        let flushed = std::mem::take(&mut *log.lock().unwrap());
        two.flush(&Call::BLOCKING).unwrap();
        if parameters.iter().all(|(key, value)| *key != "multi-conn-mode" && *value != "off") {
            assert!(log.lock().unwrap().is_empty(), "nothing was done since");
        }
        for device in [one, two, three] {
            device.close().unwrap();
        }
        flushed
    }

    #[test]
    fn a_flush_is_one_of_all_that_need_it() {
        assert_eq!(flushed(&[]), [1, 3]);
        assert_eq!(flushed(&[("multi-conn-track-dirty", "fast")]), [1, 2, 3]);
        assert_eq!(flushed(&[("multi-conn-track-dirty", "off")]), [1, 2, 3]);
        assert_eq!(flushed(&[("multi-conn-exportname", "true")]), [1]);
        assert_eq!(flushed(&[("multi-conn-mode", "unsafe")]), [2]);
        assert_eq!(flushed(&[("multi-conn-mode", "disable"), ("multi-conn-track-dirty", "off")]), [2]);
    }

    #[test]
    fn a_connection_that_is_closed_is_not_flushed() {
        let (exports, log) = apart(&[]);
        let (one, two) = (exports.open(&Client::default()).unwrap(), exports.open(&Client::default()).unwrap());
        write(&*one);
        write(&*two);
        one.close().unwrap();
        two.flush(&Call::BLOCKING).unwrap();
        assert_eq!(*log.lock().unwrap(), [2]);
    }

    #[test]
    fn modes_decide_what_is_offered() {
        let offered = |mode, exports: (Arc<dyn Exports>, Log)| {
            let exports = over(exports.0, "multi-conn", &[("multi-conn-mode", mode)]).unwrap();
            exports.open(&Client::default()).unwrap().capabilities().unwrap()
        };
        let with = || (memory("1M"), Log::default());
        let without = || apart(&[("multi-conn-mode", "disable")]);
        for (mode, has, lacks) in [
            ("auto", true, true),
            ("emulate", true, true),
            ("plugin", true, false),
            ("disable", false, false),
            ("unsafe", true, true),
        ] {
            assert_eq!((offered(mode, with()).multi_conn, offered(mode, without()).multi_conn), (has, lacks), "{mode}");
        }
        assert_eq!(offered("emulate", with()).fua, Support::Emulate);
        assert_eq!(offered("plugin", with()).fua, Support::Native);
        let serial = over(memory("1M"), "noparallel", &[("serialize", "connections")]).unwrap();
        assert!(!offered("auto", (serial, Log::default())).multi_conn);
    }

    #[test]
    fn unknown_modes_are_refused() {
        assert_eq!(refused("multi-conn", &[("multi-conn-mode", "x")]), "unknown multi-conn mode 'x'");
        let why = refused("multi-conn", &[("multi-conn-track-dirty", "x")]);
        assert_eq!(why, "unknown multi-conn track-dirty setting 'x'");
        let example = crate::plugins::testing::ready("example1", &[]).unwrap();
        let exports = over(example, "multi-conn", &[("multi-conn-mode", "emulate")]).unwrap();
        assert!(exports.open(&Client::default()).is_err(), "it has no flush");
    }
}

//! What the parameters mean, and what the tests of all events stand on.

use std::ffi::OsStr;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Waker};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use smol::future::or;

use super::*;

/// How long a test waits for what must come: less than the 60 seconds that a look may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// What an event says. Panics if it does not happen.
pub fn within(event: impl Future<Output = String>) -> String {
    smol::block_on(or(event, async {
        Timer::after(DEADLINE).await;
        panic!("the event was not noticed");
    }))
}

/// The event has not happened: it is waited for until the reactor has told all that it has to tell.
pub fn never(event: &mut Pin<Box<impl Future<Output = String>>>) {
    smol::block_on(async {
        for _ in 0..4 {
            assert_eq!(smol::future::poll_once(&mut *event).await, None, "it has happened");
            // What becomes readable only now is told after all that was before.
            let (reader, mut writer) = std::io::pipe().unwrap();
            writer.write_all(b"now").unwrap();
            Async::new_nonblocking(reader).unwrap().readable().await.unwrap();
            // A look that has begun is likely to be over now.
            smol::unblock(std::thread::yield_now).await;
        }
    });
}

/// Looks until it is so. What this program has closed stays open for a moment in a process that another test is starting.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < DEADLINE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A directory of a test's own.
pub struct Room(pub PathBuf, #[allow(dead_code, reason = "removes it")] tempfile::TempDir);

impl Room {
    pub fn new(name: &str) -> Room {
        let directory = tempfile::Builder::new().prefix(&format!("exitwhen-{name}-")).tempdir().unwrap();
        // As the kernel names it, so that the tests' own links are the only ones.
        Room(directory.path().canonicalize().unwrap(), directory)
    }
}

fn configured(parameters: &[(&str, &str)]) -> Result<Box<ExitWhen>, ConfigError> {
    let mut filter = Box::<ExitWhen>::default();
    for (key, value) in parameters {
        assert!(ABOUT.parameters.iter().any(|parameter| parameter.key == *key), "{key}");
        filter.config(key, Value(OsStr::new(value)))?;
    }
    filter.config_complete()?;
    Ok(filter)
}

fn lifetime(parameters: &[(&str, &str)]) -> Lifetime {
    let next = crate::plugins::testing::ready("null", &[]).unwrap();
    let mut lifetime = Lifetime::default();
    let after = configured(parameters).unwrap().ready(Arc::clone(&next), &mut lifetime).unwrap();
    // It changes nothing in the requests' way; it only looks at who comes, where there is something to look at.
    let names = parameters.iter().any(|(key, _)| key.contains("file") || key.contains("pipe") || key.contains("pid"));
    assert_eq!(Arc::ptr_eq(&next, &after), !names || lifetime.already.is_some());
    assert!(!lifetime.exit_last);
    lifetime
}

fn already(parameters: &[(&str, &str)]) -> String {
    let lifetime = lifetime(parameters);
    assert!(lifetime.exit_when.is_empty(), "who serves nothing waits for nothing");
    lifetime.already.unwrap()
}

/// "If there are no exit-when-* events then the filter does nothing."
#[test]
fn without_an_event_it_does_nothing() {
    let lifetime = lifetime(&[("exit-when-poll", "1")]);
    assert!(lifetime.already.is_none() && lifetime.exit_when.is_empty());
}

/// "You can define multiple exit-when-* events"
#[test]
fn any_of_several_events_counts() {
    let room = Room::new("several");
    let (one, other) = (room.0.join("one"), room.0.join("other"));
    let mut lifetime = lifetime(&[
        ("exit-when-file-created", one.to_str().unwrap()),
        ("exit-when-script", "exit 0"),
        ("exit-when-process-exits", &std::process::id().to_string()),
        ("exit-when-file-created", other.to_str().unwrap()),
        ("exit-when-script", "exit 0"),
    ]);
    assert_eq!(lifetime.already, None);
    assert_eq!(lifetime.exit_when.len(), 4);
    std::fs::write(&other, "").unwrap();
    let line = format!("exit-when-file-created: {} is there", other.display());
    assert_eq!(within(lifetime.exit_when.remove(0)), line);
}

/// D4, D6: "An event that is already true at the start ends the server at once with status 0 and a line that says so."
#[test]
fn what_has_happened_already_is_said() {
    let room = Room::new("already");
    let (there, gone) = (room.0.join("there"), room.0.join("gone"));
    std::fs::write(&there, "").unwrap();
    let (there, gone) = (there.to_str().unwrap(), gone.to_str().unwrap());
    let line = already(&[("exit-when-file-created", gone), ("exit-when-file-created", there)]);
    assert_eq!(line, format!("exit-when-file-created: {there} is there"));
    assert_eq!(already(&[("exit-when-file-deleted", gone)]), format!("exit-when-file-deleted: {gone} is gone"));
    let line = already(&[("exit-when-process-exits", "2147483647"), ("exit-when-script", "sleep 1000")]);
    assert_eq!(line, "exit-when-process-exits: there is no process 2147483647");
    let line = already(&[("exit-when-script", "exit 0"), ("exit-when-script", "exit 88")]);
    assert_eq!(line, "exit-when-script: exit code 88 from: exit 88");

    let (reader, writer) = std::io::pipe().unwrap();
    fcntl(&reader, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    drop(writer);
    let number = reader.as_raw_fd().to_string();
    let line = already(&[("exit-when-fd-closed", &number), ("exit-when-pipe-closed", &number)]);
    assert_eq!(line, format!("exit-when-pipe-closed: the other end of file descriptor {number} was closed"));
}

#[test]
fn the_first_filter_that_says_so_is_heard() {
    let next = crate::plugins::testing::ready("null", &[]).unwrap();
    let mut lifetime = Lifetime { already: Some("something else".to_owned()), ..Lifetime::default() };
    let filter = configured(&[("exit-when-file-deleted", "/no/such/file"), ("exit-when-script", "exit 0")]).unwrap();
    filter.ready(next, &mut lifetime).unwrap();
    assert_eq!(lifetime.already.as_deref(), Some("something else"));
    assert!(lifetime.exit_when.is_empty());
}

/// "A bad value [...] is an error at the start."
#[test]
fn a_bad_value_is_refused() {
    for (key, value, error) in [
        ("exit-when-file-created", "", "cannot convert null or empty path to an absolute path"),
        ("exit-when-poll", "0", "exit-when-poll: must be at least 1 second"),
        ("exit-when-poll", "", "exit-when-poll: empty string where we expected a number"),
        ("exit-when-poll", "-1", "exit-when-poll: negative numbers are not allowed"),
        ("exit-when-poll", "1s", "exit-when-poll: could not parse number: \"1s\": trailing garbage"),
        ("exit-when-process-exits", "0", "exit-when-process-exits: not the number of a process: 0"),
        ("exit-when-process-exits", "-1", "exit-when-process-exits: negative numbers are not allowed"),
        ("exit-when-pid-exits", "init", "exit-when-process-exits: empty string where we expected a number"),
        ("exit-when-process-exits", "2147483648", "exit-when-process-exits: not the number of a process: 2147483648"),
        ("exit-when-pipe-closed", "stdin", "exit-when-pipe-closed: empty string where we expected a number"),
        ("exit-when-pipe-closed", "-1", "exit-when-pipe-closed: invalid file descriptor: -1 is not open"),
        ("exit-when-fd-closed", "999999", "exit-when-pipe-closed: invalid file descriptor: 999999 is not open"),
        ("exit-when-poll", "4294967296", {
            "exit-when-poll: could not parse number: \"4294967296\": Numerical result out of range"
        }),
    ] {
        assert_eq!(configured(&[(key, value)]).unwrap_err().to_string(), error);
    }
    assert!(configured(&[("exit-when-poll", "4294967295"), ("exit-when-poll", "0x10")]).is_ok());
}

/// D14: "script never delays accept, I/O or shutdown"
#[test]
fn a_script_that_hangs_holds_nothing_up() {
    let mut lifetime = lifetime(&[("exit-when-script", "sleep 1000"), ("exit-when-script", "exec sleep 1000; :")]);
    assert_eq!(lifetime.already, None);
    assert_eq!(lifetime.exit_when.len(), 2);
    for event in &mut lifetime.exit_when {
        let mut cx = Context::from_waker(Waker::noop());
        assert!(event.as_mut().poll(&mut cx).is_pending());
    }
}

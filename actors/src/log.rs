//! What the engine has to say to people. It prints nothing itself: whoever embeds it gives a [`Log`].

use std::fmt;
use std::sync::Arc;

use crate::SessionId;

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something failed that a person may have to act on.
    Error,
    /// For finding out what happened (`-v`).
    Debug,
}

/// Takes lines from every actor. Called on executor threads, so it must not block.
pub trait Log: Send + Sync + 'static {
    /// Whether lines of `level` are wanted; spares making them.
    fn wants(&self, level: Level) -> bool;
    /// One line, without a newline. `session` says whose it is, where it is a client's.
    fn line(&self, level: Level, session: Option<SessionId>, line: fmt::Arguments<'_>);
}

/// Says nothing: the default of an embedded server.
#[derive(Debug)]
pub struct Silent;

impl Log for Silent {
    fn wants(&self, _level: Level) -> bool {
        false
    }
    fn line(&self, _level: Level, _session: Option<SessionId>, _line: fmt::Arguments<'_>) {}
}

/// A log, and whose lines these are.
#[derive(Clone)]
pub(crate) struct Speaker {
    log: Arc<dyn Log>,
    session: Option<SessionId>,
}

impl Speaker {
    pub(crate) fn new(log: Arc<dyn Log>) -> Speaker {
        Speaker { log, session: None }
    }

    pub(crate) fn of(&self, session: SessionId) -> Speaker {
        Speaker { log: Arc::clone(&self.log), session: Some(session) }
    }

    pub(crate) fn error(&self, line: fmt::Arguments<'_>) {
        self.log.line(Level::Error, self.session, line);
    }

    pub(crate) fn debug(&self, line: fmt::Arguments<'_>) {
        if self.log.wants(Level::Debug) {
            self.log.line(Level::Debug, self.session, line);
        }
    }
}

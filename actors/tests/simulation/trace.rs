//! What happened in a world, in order. The same seed must give the same trace.

use std::fmt;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// Something that the world did or saw: cheap to note, so it is always noted.
    Fact { at: Duration, client: Option<usize>, what: &'static str, a: u64, b: u64 },
    /// A line of the server's log; only where the whole trace is wanted.
    Line { at: Duration, line: String },
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Entry::Fact { at, client: Some(client), what, a, b } => {
                write!(f, "{:>12.6} client {client}: {what} {a} {b}", at.as_secs_f64())
            }
            Entry::Fact { at, client: None, what, a, b } => write!(f, "{:>12.6} {what} {a} {b}", at.as_secs_f64()),
            Entry::Line { at, line } => write!(f, "{:>12.6} the server says: {line}", at.as_secs_f64()),
        }
    }
}

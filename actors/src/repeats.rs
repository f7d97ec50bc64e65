//! Signals that are sent once more, told from one that reaches several processes.
//!
//! `timeout(1)` signals a process and then its group, systemd every process of a cgroup: where a server is more than one process,
//! each hears of it by itself, and when it does is the scheduler's business. Only who is asked twice was asked a second time.

use std::time::Duration;

/// A process that was asked twice in less time was asked once.
pub const SAME: Duration = Duration::from_millis(250);
/// Two processes that were asked in less time were asked together, however busy the machine is.
const OTHER: Duration = Duration::from_secs(2);

/// Who has got a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Witness {
    /// Whoever is asking here.
    Here,
    /// Another process of the same server, which passed it on.
    Beside,
}

/// What a signal is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nobody had asked so before.
    First,
    /// The same once more, and meant so.
    Again,
    /// The first, for another process or sent double.
    Echo,
}

/// The signals that came, each with who got it and when that one did first. No more than there are kinds of signals.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Repeats(Vec<(i32, Witness, Duration)>);

impl Repeats {
    /// A signal has come; `at` counts from any moment, the same each time.
    pub fn hear(&mut self, number: i32, witness: Witness, at: Duration) -> Heard {
        let of = |who: Option<Witness>| {
            let mut known = self.0.iter().filter(|known| known.0 == number && who.is_none_or(|who| who == known.1));
            known.next().map(|known| at.saturating_sub(known.2))
        };
        let (since_own, since_any) = (of(Some(witness)), of(None));
        if since_own.is_none() {
            self.0.push((number, witness, at));
        }
        match (since_own, since_any) {
            (_, None) => Heard::First,
            (Some(since), _) if since >= SAME => Heard::Again,
            (None, Some(since)) if since >= OTHER => Heard::Again,
            _ => Heard::Echo,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Heard::{Again, Echo, First};
    use Witness::{Beside, Here};

    #[test]
    fn who_is_asked_twice_was_asked_again_and_a_burst_is_once() {
        for (signals, wanted) in [
            (&[(15, Here, 0), (15, Here, 249), (15, Here, 250)][..], &[First, Echo, Again][..]),
            // One to each process, on a machine that is busy.
            (&[(15, Here, 0), (15, Beside, 900)], &[First, Echo]),
            (&[(15, Beside, 0), (15, Here, 1999)], &[First, Echo]),
            // Each of them is asked once more.
            (&[(15, Here, 0), (15, Beside, 900), (15, Beside, 1100), (15, Here, 1101)], &[First, Echo, Echo, Again]),
            (&[(15, Here, 0), (15, Beside, 900), (15, Beside, 1150)], &[First, Echo, Again]),
            // Another process is asked, and it is surely another time.
            (&[(15, Here, 0), (15, Beside, 2000)], &[First, Again]),
            // Each kind for itself.
            (&[(2, Here, 0), (15, Here, 900), (2, Beside, 1000)], &[First, First, Echo]),
        ] {
            let mut repeats = Repeats::default();
            let heard: Vec<_> = signals
                .iter()
                .map(|(number, witness, at)| repeats.hear(*number, *witness, Duration::from_millis(*at)))
                .collect();
            assert_eq!(heard, wanted, "{signals:?}");
        }
    }
}

//! A client's byte stream, in memory: what arrives when, in which pieces, and when it breaks is the world's choice.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read as _};
use std::task::{Context, Poll, Waker};

use nbdcaptive_actors::transport::Transport;

use crate::universe::{Asked, Over, Shared, Stage, lock};

/// The server's end of it.
pub struct Wire {
    pub shared: Shared,
    pub client: usize,
}

/// Leaves word. What was there before is of the same task, which is running, so nothing is dropped with it.
fn leave_word(place: &mut Option<Waker>, cx: &Context<'_>) {
    if !place.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
        *place = Some(cx.waker().clone());
    }
}

impl Transport for Wire {
    fn poll_receive(&mut self, cx: &mut Context<'_>, slices: &mut [IoSliceMut<'_>]) -> Poll<io::Result<usize>> {
        let mut universe = lock(&self.shared);
        let universe = &mut *universe;
        let moody = !universe.generous && universe.chance.one_in(universe.config.moody);
        let client = &mut universe.clients[self.client];
        client.polled = true;
        let ready = client.arrived > 0 || client.over.is_some();
        if moody || !ready {
            client.receive_due = ready && client.is_readable();
            leave_word(&mut client.receiver, cx);
            return Poll::Pending;
        }
        if client.over == Some(Over::Reset) && universe.chance.one_in(2) {
            client.arrived = 0;
        }
        if client.arrived == 0 {
            let over = client.over;
            universe.note(Some(self.client), "the stream is over", u64::from(over == Some(Over::Reset)), 0);
            return match over {
                Some(Over::Reset) => Poll::Ready(Err(ErrorKind::ConnectionReset.into())),
                _ => Poll::Ready(Ok(0)),
            };
        }
        let room: usize = slices.iter().map(|slice| slice.len()).sum();
        if room == 0 {
            universe.break_promise(Some(self.client), "the server receives into nothing".into());
            return Poll::Ready(Ok(0));
        }
        let mut count = client.arrived.min(room);
        if universe.config.in_pieces && !universe.generous {
            count = universe.chance.piece(count);
        }
        let mut left = count;
        for slice in slices {
            while left > 0 && !slice.is_empty() {
                let most = slice.len().min(left);
                let read = client.up.read(&mut slice[..most]).unwrap_or(0);
                left -= read;
                io::IoSliceMut::advance(slice, read);
            }
        }
        client.arrived -= count;
        client.taken += count as u64;
        universe.note(Some(self.client), "the server takes", count as u64, 0);
        universe.has_taken(self.client);
        Poll::Ready(Ok(count))
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut universe = lock(&self.shared);
        let universe = &mut *universe;
        let moody = !universe.generous && universe.chance.one_in(universe.config.moody);
        let client = &mut universe.clients[self.client];
        client.polled = true;
        let ready = client.is_readable();
        // Moody is wrong either way: nothing is there after all, or it is said later.
        if ready != moody {
            return Poll::Ready(Ok(()));
        }
        client.receive_due = ready;
        leave_word(&mut client.receiver, cx);
        Poll::Pending
    }

    fn await_bytes(&mut self, count: usize) {
        lock(&self.shared).clients[self.client].low_water = count;
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let mut universe = lock(&self.shared);
        let universe = &mut *universe;
        let moody = !universe.generous && universe.chance.one_in(universe.config.moody);
        let client = &mut universe.clients[self.client];
        client.polled = true;
        if client.finished {
            universe.break_promise(Some(self.client), "the server sends after it said that it would not".into());
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
        }
        if let Some(kind) = client.broken_pipe {
            return Poll::Ready(Err(kind.into()));
        }
        let room = client.capacity.min(client.room).saturating_sub((client.sent - client.read) as usize);
        let room = if universe.generous && client.is_willing() { usize::MAX } else { room };
        if moody || room == 0 {
            client.send_due = room > 0;
            leave_word(&mut client.sender, cx);
            return Poll::Pending;
        }
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        if length == 0 {
            universe.break_promise(Some(self.client), "the server sends nothing".into());
            return Poll::Ready(Ok(0));
        }
        let mut count = length.min(room);
        if universe.config.in_pieces && !universe.generous && count > 0 {
            count = universe.chance.piece(count);
        }
        if let Some((at, kind)) = client.cut_down {
            count = count.min((at - client.sent) as usize);
            if count == 0 {
                client.broken_pipe = Some(kind);
                client.may_be_closed = true;
                if client.over.is_none() {
                    client.over = Some(if kind == ErrorKind::BrokenPipe { Over::Eof } else { Over::Reset });
                }
                universe.note(Some(self.client), "the connection breaks, downwards", at, 0);
                return Poll::Ready(Err(kind.into()));
            }
        }
        universe.note(Some(self.client), "the server sends", count as u64, length as u64);
        let mut left = count;
        for slice in slices {
            let piece = &slice[..slice.len().min(left)];
            left -= piece.len();
            universe.hear(self.client, piece);
        }
        Poll::Ready(Ok(count))
    }

    fn worth_sending(&self) -> usize {
        lock(&self.shared).clients[self.client].worth_sending
    }

    fn finish(&mut self) {
        let mut universe = lock(&self.shared);
        universe.note(Some(self.client), "the server finishes", 0, 0);
        universe.clients[self.client].finished = true;
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let mut universe = lock(&self.shared);
        universe.note(Some(self.client), "the connection is closed", 0, 0);
        let client = &mut universe.clients[self.client];
        client.alive = false;
        let words = (client.receiver.take(), client.sender.take());
        universe.is_closed(self.client);
        drop(universe);
        drop(words);
    }
}

impl crate::universe::Universe {
    /// Whether the server had a reason to close this client's connection.
    fn is_closed(&mut self, id: usize) {
        let now = self.simulation.elapsed();
        let served = self.clients.iter().filter(|client| client.alive && client.stage == Stage::Transmission).count();
        // The server counts a client before it hears that it was let in.
        let lets_in = |(asked, _): &(Asked, u64)| matches!(asked, Asked::Go { own: true } | Asked::ExportName);
        let unheard = self.config.oldstyle || self.clients[id].asked.iter().any(lets_in);
        self.end.any_counted |= self.end.any_served || unheard;
        let has_left = self.end.any_counted && self.config.exit_last;
        self.end.lonely |= served == 0 && (has_left || self.end.event_fired || self.config.only);
        self.end.lonely_since = self.end.lonely_since.or_else(|| self.end.lonely.then(|| self.simulation.elapsed()));
        let client = &self.clients[id];
        let late = client.stage != Stage::Transmission
            && self.config.handshake_timeout.is_some_and(|limit| now >= client.since + limit);
        if self.may_drain() || client.may_be_closed || late {
            return;
        }
        if client.polled {
            let why = format!("its connection was closed for no reason, in {:?}", client.stage);
            return self.break_promise(Some(id), why);
        }
        // It was turned away. All who came before it have been seen to.
        let others = self.clients[..id].iter().filter(|client| client.alive).count();
        let refusing = self.end.event_fired;
        match self.config.max_clients {
            Some(most) if others >= most => {}
            _ if refusing => {}
            _ => self.break_promise(Some(id), format!("it was turned away while {others} were connected")),
        }
    }
}

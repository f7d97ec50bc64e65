//! Several clients that mostly know what they do, a clock, threads, and an end that may come at any moment.

use arbitrary::{Arbitrary, Result, Unstructured};
use nbdcaptive_actors::Cause;

use crate::disk::{SETTING, Setting};
use crate::play::Play;
use crate::streams::legal_handshake;

const MOST_CLIENTS: usize = 6;
const MOST_STEPS: usize = 400;
/// How many bytes of replies are taken in all: a few bytes can ask for a lot.
const ENOUGH: usize = 70 << 20;

const SIGTERM: i32 = 15;

/// Drives a whole server: three bytes of settings, and then steps.
pub fn session(data: &[u8]) {
    let mut data = Unstructured::new(data);
    // Where the data ends the steps do.
    let _ = run(&mut data);
}

/// What is left to come.
struct Actor<'a, 'b> {
    data: &'a mut Unstructured<'b>,
    play: Play,
    next_cookie: u64,
    enough: usize,
    /// The clock moved, a client was cut off, or a second request came after the end had begun: what had been promised may
    /// have been given up.
    is_excused: bool,
}

fn run(data: &mut Unstructured<'_>) -> Result<()> {
    let setting = Setting::new(<[u8; SETTING]>::arbitrary(data)?);
    let mut actor = Actor { data, play: Play::new(setting), next_cookie: 1, enough: ENOUGH, is_excused: false };
    for _ in 0..MOST_STEPS {
        if actor.data.is_empty() || actor.enough == 0 || actor.step().is_err() {
            break;
        }
        actor.play.look();
    }
    actor.finish();
    Ok(())
}

impl Actor<'_, '_> {
    fn byte(&mut self) -> Result<u8> {
        self.data.arbitrary()
    }

    fn step(&mut self) -> Result<()> {
        let step = self.byte()?;
        // The client, for what a client does.
        let who = usize::from(step >> 4) % self.play.clients.len().max(1);
        let has_client = who < self.play.clients.len() && !self.play.clients[who].is_gone;
        match step & 15 {
            0 => self.connect()?,
            1 if has_client => {
                let manner = self.byte()?;
                let handshake = legal_handshake(self.play.setting, manner);
                // Perhaps its flags have been sent, and some options.
                let begun = if self.begin(who) { 4.min(handshake.len()) } else { 0 };
                self.send(who, &handshake[begun..])?;
            }
            2 if has_client => {
                let mut option = self.option()?;
                if !self.begin(who) && !self.play.setting.oldstyle() {
                    option.splice(0..0, [0, 0, 0, 3]);
                }
                self.send(who, &option)?;
            }
            3..=6 if has_client => {
                if step & 3 != 3 && !self.play.clients[who].talk.is_transmission() {
                    self.everything();
                }
                let request = self.request(who)?;
                self.send(who, &request)?;
            }
            7 if has_client => {
                let count = usize::from(self.byte()?);
                let count = count.min(self.data.len());
                let bytes = self.data.bytes(count)?.to_vec();
                self.send(who, &bytes)?;
            }
            8 if has_client => {
                let count = [1, 20, 1000, 1 << 22][usize::from(self.byte()? % 4)];
                self.enough -= self.play.clients[who].take(count.min(self.enough));
            }
            9 if has_client => self.play.clients[who].leave(),
            10 if has_client => self.play.clients[who].cut(),
            11 => {
                self.is_excused |= self.play.is_ending || self.play.setting.exit_last();
                self.play.stage.simulation.advance();
            }
            12 => {
                let index = usize::from(self.byte()?) % self.play.stage.simulation.calls().max(1);
                self.play.stage.simulation.run_call(index);
            }
            13 => self.play.stage.tick(1 + usize::from(step >> 4)),
            14 if step >> 4 == 0 => {
                let by_signal = self.byte()? & 1 != 0;
                self.is_excused |= self.play.is_ending;
                self.play.shut_down(|handle| match by_signal {
                    true => handle.signal(SIGTERM),
                    false => handle.shut_down(Cause::Requested),
                });
            }
            14 if has_client => {
                let count = usize::MAX;
                self.play.clients[who].send_held(count);
            }
            _ => self.everything(),
        }
        Ok(())
    }

    /// Lets everything happen that can, and looks whether everybody got what they asked for.
    fn everything(&mut self) {
        let most = self.enough.min(32 << 20);
        let more = self.play.exhaust(most);
        self.enough -= most.min(8 << 20);
        if !more && !self.play.is_ending {
            self.play.assert_answered();
        }
    }

    fn connect(&mut self) -> Result<()> {
        let room = [100, 5000, 200_000, 1 << 20][usize::from(self.byte()? % 4)];
        if self.play.clients.len() < MOST_CLIENTS {
            self.play.connect(room);
        }
        Ok(())
    }

    /// Whether the client had begun before.
    fn begin(&mut self, who: usize) -> bool {
        std::mem::replace(&mut self.play.clients[who].has_begun, true)
    }

    /// Sends it, or a part of it and the rest later.
    fn send(&mut self, who: usize, bytes: &[u8]) -> Result<()> {
        let client = &mut self.play.clients[who];
        client.held.extend(bytes);
        let manner: u8 = self.data.arbitrary()?;
        let held = client.held.len();
        client.send_held(match manner {
            0..=127 => held,
            128..=191 => held - (usize::from(manner) - 128).min(held),
            _ => usize::from(manner) - 192,
        });
        if manner & 1 == 0 {
            self.play.stage.settle();
        }
        Ok(())
    }

    fn option(&mut self) -> Result<Vec<u8>> {
        let option = u32::from(self.byte()? % 14);
        let name: &[u8] = [&b""[..], b"", b"name", b"!none"][usize::from(self.byte()? % 4)];
        let mut data = Vec::new();
        match option {
            1 => data.extend(name),
            6 | 7 => {
                let count = self.byte()? % 8;
                data.extend((name.len() as u32).to_be_bytes());
                data.extend(name);
                data.extend(u16::from(count).to_be_bytes());
                (0..count).for_each(|info| data.extend(u16::from(info % 5).to_be_bytes()));
            }
            9 | 10 => {
                let all: [&[u8]; 7] = [
                    b"x-fuzz:wide",
                    b"x-fuzz:",
                    b"qemu:dirty-bitmap:x",
                    b"x-fuzz:narrow",
                    b"",
                    b"base:",
                    b"base:allocation",
                ];
                let queries = &all[usize::from(self.byte()? % 8)..];
                data.extend((name.len() as u32).to_be_bytes());
                data.extend(name);
                data.extend((queries.len() as u32).to_be_bytes());
                for query in queries {
                    data.extend((query.len() as u32).to_be_bytes());
                    data.extend(*query);
                }
            }
            12 => data.resize(usize::from(self.byte()?) * 300, 0),
            _ => {}
        }
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        Ok(bytes)
    }

    fn request(&mut self, who: usize) -> Result<Vec<u8>> {
        let extended = self.play.clients[who].talk.is_extended();
        let size = self.play.setting.size();
        let kind = match self.byte()? % 16 {
            kind @ 0..=7 => u16::from(kind),
            8 => 9,
            9 | 10 => 1,
            11 => 6,
            12 => 7,
            _ => 0,
        };
        // Goodbye comes less often than the others.
        let kind = if kind == 2 && self.byte()? & 7 != 0 { 0 } else { kind };
        let fill = self.byte()?;
        let flags = match self.byte()? {
            flags @ 0..=31 => u16::from(flags),
            32 => 1 << 15,
            33..=63 => 1,
            _ => 0,
        };
        let place = u64::from(self.byte()?);
        let long = self.byte()?;
        let fine = u64::from(self.data.arbitrary::<u16>()?);
        let mut length = match long >> 5 {
            0 => fine & 15,
            1 | 2 => fine,
            3 => 4096 * (1 + (fine & 15)),
            4 => 32768 * (1 + (fine & 7)),
            5 => 65536 + (fine & 255),
            6 => fine << (long & 15),
            _ => size,
        };
        let mut offset = match place {
            0..=63 => place * 4096,
            64..=127 => size / 64 * (place - 64),
            128..=191 => (fine << 8 | place) % size.max(1),
            192..=250 => size.saturating_sub(length),
            251 => size,
            252 => u64::MAX,
            _ => size.saturating_sub(length).wrapping_add(place - 253),
        };
        match kind {
            1 => length = length.min(300_000),
            3 if long & 1 == 0 => (offset, length) = (0, 0),
            _ => {}
        }
        let mut length = if extended { length } else { length.min(u64::from(u32::MAX)) };
        let cookie = self.next_cookie;
        // Two at a time may have the same name.
        self.next_cookie += u64::from(long != 255);
        let mut payload = if kind == 1 { vec![fill; length as usize] } else { Vec::new() };
        // For some contexts alone.
        if extended && kind == 7 && fill & 3 == 0 {
            payload.extend(length.to_be_bytes());
            (1..4u32).filter(|id| fill & 1 << (id + 1) != 0).for_each(|id| payload.extend(id.to_be_bytes()));
            payload.truncate(payload.len() - usize::from(fill >> 6 == 3));
            length = payload.len() as u64;
        }
        let mut bytes = if extended { 0x21e4_1c71u32 } else { 0x2560_9513 }.to_be_bytes().to_vec();
        // Left out for some writes, as QEMU does.
        let says_so = extended && !payload.is_empty() && !(kind == 1 && fill & 7 == 7);
        bytes.extend((flags | if says_so { 1 << 5 } else { 0 }).to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        if extended {
            bytes.extend(length.to_be_bytes());
        } else {
            bytes.extend((length as u32).to_be_bytes());
        }
        bytes.extend(payload);
        Ok(bytes)
    }

    /// The clients that are left take what there is, and then the server ends.
    fn finish(mut self) {
        let is_clean = self.play.is_ending && !self.is_excused;
        let more = self.play.exhaust(self.enough);
        if more {
            self.play.clients.iter_mut().for_each(|client| client.cut());
        } else {
            if !self.play.is_ending {
                self.play.assert_answered();
            } else if is_clean {
                for client in self.play.clients.iter().filter(|client| !client.was_cut) {
                    assert!(client.talk.kept_its_promise(), "a request that was under way was not answered");
                }
            }
        }
        let outcome = self.play.end();
        assert!(self.is_excused || outcome.failure.is_none() || more, "{outcome:?}");
    }
}

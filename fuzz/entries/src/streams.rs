//! Any bytes in any pieces, from one client: in its handshake, or after one that went well.

use nbdcaptive_actors::Cause;

use crate::disk::{SETTING, Setting};
use crate::play::Play;

/// How much one client takes before it has had enough, in bytes: a few bytes can ask for a lot.
const ENOUGH: usize = 70 << 20;

/// The first bytes say what server it is, and how the others come.
struct Given<'a> {
    setting: Setting,
    manner: u8,
    pieces: Pieces<'a>,
}

fn given(data: &[u8]) -> Option<Given<'_>> {
    let (setting, data) = data.split_first_chunk::<SETTING>()?;
    let (&[manner, split], data) = data.split_first_chunk::<2>()?;
    Some(Given { setting: Setting::new(*setting), manner, pieces: Pieces::new(data, split) })
}

/// The bytes in pieces of lengths that follow from `split`; 0 is all at once.
pub struct Pieces<'a> {
    data: &'a [u8],
    split: u64,
}

impl<'a> Pieces<'a> {
    /// Cut as `split` says.
    pub fn new(data: &'a [u8], split: u8) -> Pieces<'a> {
        Pieces { data, split: u64::from(split) }
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        // Source of the constants: Knuth's MMIX.
        let next = self.split.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let length = match self.split {
            0 => usize::MAX,
            split if split < 256 => split as usize,
            // Short ones and long ones.
            split => 1 << (split >> 60) | (split >> 32 & 7) as usize,
        };
        if self.split != 0 {
            self.split = next | 1;
        }
        let (piece, rest) = self.data.split_at(length.min(self.data.len()));
        self.data = rest;
        (!piece.is_empty()).then_some(piece)
    }
}

/// From a client in its handshake. After three bytes of settings, one for how it comes and leaves and one for the lengths of
/// the pieces, the bytes are what it sends, from its flags on.
pub fn handshake(data: &[u8]) {
    if let Some(Given { setting, manner, pieces }) = given(data) {
        one_client(setting, manner, &[], pieces);
    }
}

/// From a client that has negotiated. As [`handshake`], with requests in the place of the handshake; the lowest bits of the
/// fourth byte say what was agreed on.
pub fn transmission(data: &[u8]) {
    if let Some(Given { setting, manner, pieces }) = given(data) {
        one_client(setting, manner, &legal_handshake(setting, manner), pieces);
    }
}

/// A handshake of which nothing is refused by a server that knows all of it.
pub fn legal_handshake(setting: Setting, manner: u8) -> Vec<u8> {
    if setting.oldstyle() {
        return Vec::new();
    }
    let mut bytes = vec![0, 0, 0, 3];
    let mut option = |number: u32, data: &[u8]| {
        bytes.extend(b"IHAVEOPT");
        bytes.extend(number.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
    };
    match manner & 3 {
        0 => {}
        2 => option(11, &[]),
        _ => option(8, &[]),
    }
    if manner & 1 << 2 != 0 {
        option(10, b"\0\0\0\0\0\0\0\x02\0\0\0\x0fbase:allocation\0\0\0\x0bx-fuzz:wide");
    }
    if manner & 1 << 3 != 0 {
        option(1, &[]);
    } else {
        option(7, &[0; 6]);
    }
    bytes
}

fn one_client(setting: Setting, manner: u8, first: &[u8], pieces: Pieces<'_>) {
    let room = if manner & 1 << 4 != 0 { 100 } else { 1 << 20 };
    let mut play = if manner & 1 << 5 != 0 {
        Play::of_one(setting, room)
    } else {
        let mut play = Play::new(setting);
        play.connect(room);
        play
    };
    let mut enough = ENOUGH;
    play.clients[0].held.extend(first);
    play.clients[0].send_held(usize::MAX);
    play.exhaust(1 << 20);
    for (index, piece) in pieces.enumerate() {
        play.clients[0].held.extend(piece);
        play.clients[0].send_held(usize::MAX);
        match (manner >> 6, index % 4) {
            // A client that is slow to take, and threads that are slow to run.
            (1, 1..) => play.stage.settle(),
            (2, 1..) => {
                play.stage.settle();
                enough -= play.clients[0].take(enough.min(1 << 20));
            }
            _ => {
                let most = enough.min(8 << 20);
                play.exhaust(most);
                enough -= most.min(enough);
            }
        }
        play.look();
        if enough == 0 || play.clients[0].is_gone {
            break;
        }
    }
    if manner >> 6 == 3 {
        play.exhaust(1 << 20);
        play.shut_down(|handle| handle.shut_down(Cause::Requested));
    } else if play.exhaust(enough) {
        play.clients[0].cut();
    } else {
        play.assert_answered();
    }
    play.end();
}

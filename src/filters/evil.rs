//! `evil`: bits of what is read are flipped, or stuck at 0 or 1. Source: nbdkit filters/evil/evil.c, nbdkit-evil-filter.pod.
//!
//! Which bits those are follows from a random sequence: from one bit on, the next is up to twice as far as is right on average.
//! Stuck bits are to be the same every time, so the sequence starts again with each block of the disk (or with each request, for
//! wires) from the seed, and not with what has been read before. With the same seed they are those of nbdkit.

use std::sync::{Arc, Mutex, PoisonError};

use nbdcaptive_actors::device::{Call, Client, Device, Exports, Result, ThreadModel};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports, Next};

use super::kit::{optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;
use crate::xoshiro::{self, Xoshiro};

const MODES: &str = "cosmic-rays|stuck-bits|stuck-wires";

/// See the module.
pub static ABOUT: About = About {
    name: "evil",
    summary: "corrupt what is read

        For seeing whether a client notices. Bits are flipped at random (`cosmic-rays`), always read as the same at
        certain places of the disk (`stuck-bits`), or at certain places of each request (`stuck-wires`). The disk
        itself stays as it is, unless the client writes back what it has read.

        # Examples

            nbdcaptive --filter=evil pattern 1M evil-probability=1e-5 \\
                evil-seed=1 \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        optional("evil", MODES, "flipped at random, stuck on the disk, stuck on the way; stuck-bits"),
        optional("evil-mode", MODES, "another name for evil"),
        optional("evil-probability", "<PROB>", "of a bit to be flipped or stuck; 1e-8, or 1e-6 for wires"),
        optional("evil-stuck-probability", "<PROB>", "of a stuck bit to be stuck; 1"),
        optional("evil-seed", "<SEED>", "where the random sequence starts; the time"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// Below this a probability is none.
const LEAST: f64 = 1e-12;

/// Above this all bits are corrupted: the sequence has at most one bit in each byte.
const MOST: f64 = 1.0 / 8.0;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    CosmicRays,
    #[default]
    StuckBits,
    StuckWires,
}

/// The filter.
#[derive(Debug)]
pub struct Evil {
    mode: Mode,
    probability: Option<f64>,
    stuck: f64,
    seed: u32,
}

impl Default for Evil {
    fn default() -> Evil {
        Evil { mode: Mode::default(), probability: None, stuck: 1.0, seed: xoshiro::seed() }
    }
}

fn probability(key: &str, text: &str) -> std::result::Result<f64, ConfigError> {
    let probability = values::probability(key, text).map_err(ConfigError)?;
    if probability > 1.0 {
        return Err(ConfigError(format!("{key}: probability out of range, should be [0..1]")));
    }
    Ok(probability)
}

impl Filter for Evil {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        match key {
            "evil" | "evil-mode" => {
                self.mode = match text {
                    "cosmic-rays" | "cosmic" => Mode::CosmicRays,
                    "stuck-bits" | "stuck-bit" | "stuck" => Mode::StuckBits,
                    "stuck-wires" | "stuck-wire" => Mode::StuckWires,
                    _ => return Err(ConfigError(format!("evil: unknown mode: {text}"))),
                }
            }
            "evil-probability" => self.probability = Some(probability(key, text)?),
            "evil-stuck-probability" => self.stuck = probability(key, text)?,
            "evil-seed" => self.seed = values::unsigned(key, text).map_err(ConfigError)?,
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let Evil { mode, probability, stuck, seed } = *self;
        let probability = probability.unwrap_or(if mode == Mode::StuckWires { 1e-6 } else { 1e-8 });
        let harm = Harm { mode, probability, stuck, seed: seed.into(), rays: Mutex::new(Xoshiro::new(seed.into())) };
        Ok(Arc::new(FilteredExports(Harmed { next, harm: Arc::new(harm) })))
    }
}

struct Harm {
    mode: Mode,
    probability: f64,
    stuck: f64,
    seed: u64,
    /// The sequence of [`Mode::CosmicRays`].
    rays: Mutex<Xoshiro>,
}

impl Harm {
    /// How long a block is, in bytes: so that about 100 bits of it are corrupted. A power of 2.
    fn block(&self) -> u64 {
        if !(LEAST..=MOST).contains(&self.probability) {
            return 1 << 20;
        }
        ((100.0 / self.probability) as u64 / 8).next_power_of_two()
    }

    fn corrupt(&self, mut data: &mut [u8], offset: u64) {
        match self.mode {
            Mode::CosmicRays => {
                // Numbers have no state that a panic could leave half done.
                let mut random = self.rays.lock().unwrap_or_else(PoisonError::into_inner);
                self.corrupt_part(data, 0, &mut random);
            }
            Mode::StuckWires => self.corrupt_part(data, 0, &mut Xoshiro::new(self.seed)),
            Mode::StuckBits => {
                let block = self.block();
                let (mut start, mut offset) = (offset - offset % block, offset);
                while !data.is_empty() {
                    let length = (start + block - offset).min(data.len() as u64);
                    let (part, rest) = data.split_at_mut(length as usize);
                    self.corrupt_part(part, offset - start, &mut Xoshiro::new(self.seed.wrapping_add(start)));
                    start += block;
                    offset += length;
                    data = rest;
                }
            }
        }
    }

    /// Corrupts what is `from` bytes behind where the sequence starts.
    fn corrupt_part(&self, data: &mut [u8], from: u64, random: &mut Xoshiro) {
        if self.probability < LEAST {
            return;
        }
        if self.probability > MOST {
            for byte in data {
                (0..8).for_each(|bit| *byte = self.corrupt_bit(*byte, bit, random.word()));
            }
            return;
        }
        let longest = (2.0 / self.probability) as u64;
        let end = from + data.len() as u64;
        let mut at = 0;
        loop {
            // In bits.
            let step = random.word() % longest;
            // Taken in any case, so that the sequence is the same wherever a request starts.
            let number = random.word();
            at += step / 8;
            if at >= end {
                return;
            }
            if at >= from {
                let byte = &mut data[(at - from) as usize];
                *byte = self.corrupt_bit(*byte, (step % 8) as u32, number);
            }
        }
    }

    fn corrupt_bit(&self, byte: u8, bit: u32, number: u64) -> u8 {
        let mask = 1 << bit;
        let number = number as u32;
        match self.mode {
            Mode::CosmicRays => byte ^ mask,
            _ if self.stuck * 4_294_967_296.0 <= f64::from(number) => byte,
            _ if number & 1 == 1 => byte | mask,
            _ => byte & !mask,
        }
    }
}

struct Harmed {
    next: Arc<dyn Exports>,
    harm: Arc<Harm>,
}

impl FilterExports for Harmed {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn thread_model(&self) -> ThreadModel {
        let model = match self.harm.mode {
            Mode::CosmicRays => ThreadModel::SerializeRequests,
            Mode::StuckBits | Mode::StuckWires => ThreadModel::Parallel,
        };
        model.min(self.next.thread_model())
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        let next = Next::open(&*self.next, client)?;
        Ok(Box::new(Filtered(Disk { next, harm: Arc::clone(&self.harm) })))
    }
}

struct Disk {
    next: Next,
    harm: Arc<Harm>,
}

impl filter::Filter for Disk {
    const CHANGES_DATA: bool = true;

    fn next(&self) -> &dyn Device {
        &self.next
    }

    fn read(&self, buffer: &mut [u8], offset: u64, call: &Call) -> Result<()> {
        self.next.read(buffer, offset, call)?;
        self.harm.corrupt(buffer, offset);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{device, refused};
    use nbdcaptive_actors::device::Flags;

    const SIZE: usize = 1 << 20;

    fn read(device: &dyn Device, offset: usize, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        device.read(&mut data, offset as u64, &Call::BLOCKING).unwrap();
        data
    }

    fn ones(data: &[u8]) -> u32 {
        data.iter().map(|byte| byte.count_ones()).sum()
    }

    #[test]
    fn stuck_bits_are_the_same_however_they_are_read() {
        let parameters = [("evil-seed", "1234"), ("evil-probability", "1e-4")];
        let disk = device("1M", "evil", &parameters);
        let whole = read(&*disk, 0, SIZE);
        // About 839 bits are stuck, half of them at 1.
        assert!((300..550).contains(&ones(&whole)), "{}", ones(&whole));
        for (offset, length) in [(0, 1000), (131_000, 200), (131_072, 1), (100_001, 900_000), (SIZE - 5, 5)] {
            assert_eq!(read(&*disk, offset, length), whole[offset..offset + length], "{offset} {length}");
        }
        assert_eq!(read(&*device("1M", "evil", &parameters), 0, SIZE), whole);
        disk.write(&vec![0xff; SIZE], 0, Flags::default(), &Call::BLOCKING).unwrap();
        let whole = read(&*disk, 0, SIZE);
        assert!((300..550).contains(&(8 * SIZE as u32 - ones(&whole))), "and the others at 0");
    }

    #[test]
    fn stuck_wires_are_the_same_in_every_request() {
        let parameters = [("evil", "stuck-wires"), ("evil-seed", "5"), ("evil-probability", "1e-3")];
        let disk = device("1M", "evil", &parameters);
        let first = read(&*disk, 0, 65536);
        assert!(ones(&first) > 100);
        assert_eq!(read(&*disk, 12345, 65536), first);
    }

    #[test]
    fn cosmic_rays_come_anew() {
        let parameters = [("evil-mode", "cosmic"), ("evil-seed", "5"), ("evil-probability", "1e-3")];
        let disk = device("1M", "evil", &parameters);
        let first = read(&*disk, 0, SIZE);
        // 8389 on average.
        assert!((7500..9500).contains(&ones(&first)), "{}", ones(&first));
        assert_ne!(read(&*disk, 0, SIZE), first);
    }

    #[test]
    fn probabilities_at_both_ends_are_none_and_all() {
        let ones = |probability| ones(&read(&*device("1M", "evil", &[("evil-probability", probability)]), 0, SIZE));
        assert_eq!(ones("0"), 0);
        assert_eq!(ones("1e-13"), 0);
        let all = ones("100%");
        assert!((4_100_000..4_300_000).contains(&all), "half of them are stuck at 1: {all}");
        let never = [("evil-probability", "1"), ("evil-stuck-probability", "0")];
        assert_eq!(read(&*device("1M", "evil", &never), 0, 100), [0; 100]);
    }

    #[test]
    fn what_is_no_mode_or_probability_is_refused() {
        assert_eq!(refused("evil", &[("evil", "good")]), "evil: unknown mode: good");
        let why = refused("evil", &[("evil-probability", "2")]);
        assert_eq!(why, "evil-probability: probability out of range, should be [0..1]");
    }
}

//! Tables and JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::header::Header;
use crate::measure::Sample;
use crate::rows::{Disk, Row, Work};
use crate::servers::{Pin, Server, ratios};

/// How many cpus others may keep busy before a measurement counts as disturbed. An idle machine's own threads, and the
/// kernel's that write a file back, stay below.
const DISTURBED: f64 = 0.2;

/// All that there may be samples of.
const PINS: [Pin; 3] = [Pin::None, Pin::One, Pin::Two];

#[derive(Default)]
pub struct Results {
    /// By pinning, row and server.
    samples: BTreeMap<(Pin, usize, usize), Vec<Sample>>,
}

impl Results {
    pub fn add(&mut self, pin: Pin, row: usize, server: usize, sample: Sample) {
        self.samples.entry((pin, row, server)).or_default().push(sample);
    }
}

struct Summary {
    median: f64,
    min: f64,
    max: f64,
}

impl Summary {
    /// `None` without numbers.
    fn of(numbers: impl Iterator<Item = f64>) -> Option<Summary> {
        let mut numbers: Vec<f64> = numbers.collect();
        numbers.sort_by(f64::total_cmp);
        let (&min, &max) = (numbers.first()?, numbers.last()?);
        let middle = numbers.len() / 2;
        let median =
            if numbers.len() % 2 == 1 { numbers[middle] } else { f64::midpoint(numbers[middle - 1], numbers[middle]) };
        Some(Summary { median, min, max })
    }
}

pub struct Report<'a> {
    pub servers: &'a [Server],
    pub rows: &'a [Row],
    pub results: &'a Results,
}

impl Report<'_> {
    fn samples(&self, pin: Pin, row: usize, server: usize) -> &[Sample] {
        self.results.samples.get(&(pin, row, server)).map_or(&[], Vec::as_slice)
    }

    fn value(&self, pin: Pin, row: usize, server: usize) -> Option<Summary> {
        Summary::of(self.samples(pin, row, server).iter().map(|sample| sample.value))
    }

    fn cpu(&self, pin: Pin, row: usize, server: usize) -> Option<f64> {
        let summary = Summary::of(self.samples(pin, row, server).iter().filter_map(|sample| sample.cpu));
        summary.map(|summary| summary.median)
    }

    fn ratio(&self, pin: Pin, row: usize, (one, other): (usize, usize)) -> Option<f64> {
        let ratio = self.value(pin, row, one)?.median / self.value(pin, row, other)?.median;
        // A server whose memory did not grow has nothing to divide by.
        Some(ratio).filter(|ratio| ratio.is_finite())
    }

    fn ratio_name(&self, (one, other): (usize, usize)) -> String {
        format!("{}/{}", self.servers[one].name, self.servers[other].name)
    }

    /// The rows that were measured so, by their places.
    fn measured(&self, pin: Pin) -> Vec<usize> {
        (0..self.rows.len())
            .filter(|&row| (0..self.servers.len()).any(|one| !self.samples(pin, row, one).is_empty()))
            .collect()
    }

    /// The most memory over all runs of fio or nbdcopy on these disks, in KiB.
    fn peak(&self, disks: &[Disk], server: usize) -> Option<u64> {
        let counts = |&(_, row, number): &(Pin, usize, usize)| {
            let row = &self.rows[row];
            number == server && matches!(row.work, Work::Fio(_) | Work::Copy) && disks.contains(&row.disk)
        };
        let samples = self.results.samples.iter().filter(|(key, _)| counts(key)).flat_map(|(_, samples)| samples);
        samples.map(|sample| sample.peak_kib).max()
    }

    /// The row in which nbdcaptive does least well against nbdkit, and how: of those where more is better, or less.
    fn worst(&self, lower_is_better: bool) -> Option<(f64, String)> {
        let nbdkit = self.servers.iter().position(|server| server.name == "nbdkit")?;
        if self.servers[0].name != "nbdcaptive" {
            return None;
        }
        let mut all = Vec::new();
        for pin in PINS {
            for (number, row) in self.rows.iter().enumerate() {
                if row.unit().lower_is_better == lower_is_better {
                    let name = if pin == Pin::None { row.name() } else { format!("{}, {}", row.name(), pin.title()) };
                    all.extend(self.ratio(pin, number, (0, nbdkit)).map(|ratio| (ratio, name)));
                }
            }
        }
        let all = all.into_iter();
        if lower_is_better {
            all.max_by(|one, other| one.0.total_cmp(&other.0))
        } else {
            all.min_by(|one, other| one.0.total_cmp(&other.0))
        }
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        for lower_is_better in [false, true] {
            let title = if lower_is_better { "Time and memory, lower is better" } else { "Speed, higher is better" };
            for pin in PINS {
                let mut rows = self.measured(pin);
                rows.retain(|&row| self.rows[row].unit().lower_is_better == lower_is_better);
                if rows.is_empty() {
                    continue;
                }
                let _ = write!(text, "\n{title}, median (least..most), {}\n", pin.title());
                text += &table(&self.values(pin, &rows));
                rows.retain(|&row| self.rows[row].unit().cpu.is_some());
                if !rows.is_empty() {
                    let _ = write!(
                        text,
                        "\nThe server's CPU time, median, {}\n{}",
                        pin.title(),
                        table(&self.costs(pin, &rows))
                    );
                }
            }
        }
        let peaks = self.peaks();
        if peaks.len() > 1 {
            let _ = write!(text, "\nThe most resident memory\n{}", table(&peaks));
        }
        text += &self.notes();
        text += "\n";
        text += &self.summary();
        text
    }

    /// The first line of a table: a name, a unit, and each server.
    fn head(&self) -> Vec<String> {
        let mut line = vec![String::new(), "unit".to_string()];
        line.extend(self.servers.iter().map(|server| server.name.clone()));
        line
    }

    fn values(&self, pin: Pin, rows: &[usize]) -> Vec<Vec<String>> {
        let ratios = ratios(self.servers);
        let mut head = self.head();
        head.extend(ratios.iter().map(|&pair| self.ratio_name(pair)));
        let mut lines = vec![head];
        for &row in rows {
            let unit = self.rows[row].unit();
            let mut line = vec![self.rows[row].name(), unit.value.to_string()];
            line.extend((0..self.servers.len()).map(|server| match self.value(pin, row, server) {
                Some(Summary { median, min, max }) => {
                    format!("{} ({}..{})", unit.show(median), unit.show(min), unit.show(max))
                }
                None => dash(),
            }));
            line.extend(
                ratios.iter().map(|&pair| self.ratio(pin, row, pair).map_or_else(dash, |ratio| format!("{ratio:.2}"))),
            );
            lines.push(line);
        }
        lines
    }

    fn costs(&self, pin: Pin, rows: &[usize]) -> Vec<Vec<String>> {
        let mut lines = vec![self.head()];
        for &row in rows {
            let mut line = vec![self.rows[row].name(), self.rows[row].unit().cpu.unwrap_or_default().to_string()];
            line.extend(
                (0..self.servers.len())
                    .map(|server| self.cpu(pin, row, server).map_or_else(dash, |cpu| format!("{cpu:.*}", digits(cpu)))),
            );
            lines.push(line);
        }
        lines
    }

    fn peaks(&self) -> Vec<Vec<String>> {
        let mut lines = vec![self.head()];
        for (disks, name) in [
            (&[Disk::Memory][..], "memory rows, the disk included"),
            (&[Disk::File], "file rows"),
            (&[Disk::Sparse, Disk::Full], "nbdcopy rows"),
        ] {
            let peaks: Vec<_> = (0..self.servers.len()).map(|server| self.peak(disks, server)).collect();
            if peaks.iter().any(Option::is_some) {
                let mut line = vec![name.to_string(), "MiB".to_string()];
                line.extend(
                    peaks.into_iter().map(|peak| peak.map_or_else(dash, |kib| format!("{:.1}", kib as f64 / 1024.0))),
                );
                lines.push(line);
            }
        }
        lines
    }

    /// What is to be said of single measurements, each thing once.
    fn notes(&self) -> String {
        let mut lines: Vec<String> = Vec::new();
        for (&(_, row, server), samples) in &self.results.samples {
            for note in samples.iter().filter_map(|sample| sample.note.as_ref()) {
                let line = format!("{}, {}: {note}\n", self.servers[server].name, self.rows[row].name());
                if !lines.contains(&line) {
                    lines.push(line);
                }
            }
        }
        if lines.is_empty() { String::new() } else { format!("\n{}", lines.concat()) }
    }

    fn summary(&self) -> String {
        let disturbed = self.results.samples.values().flatten().filter(|sample| sample.others > DISTURBED).count();
        let all = self.results.samples.values().map(Vec::len).sum::<usize>();
        let mut text = format!(
            "Measurements during which others kept more than {DISTURBED} of a cpu busy: {disturbed} of {all}\n"
        );
        let mut say = |what: &str, worst: Option<(f64, String)>| match worst {
            Some((ratio, row)) => text += &format!("{what}: {ratio:.2} ({row})\n"),
            None => text += &format!("{what}: not measured\n"),
        };
        say("Smallest nbdcaptive/nbdkit of speeds", self.worst(false));
        say("Largest nbdcaptive/nbdkit of time and memory", self.worst(true));
        text
    }

    pub fn json(&self, header: &Header) -> String {
        let about: Vec<String> =
            header.lines.iter().map(|(name, value)| format!("{}: {}", quoted(name), quoted(value))).collect();
        let mut rows = Vec::new();
        for pin in PINS {
            rows.extend(self.measured(pin).into_iter().map(|row| self.row_json(pin, row)));
        }
        let worst = |lower_is_better| match self.worst(lower_is_better) {
            Some((ratio, row)) => format!("{{\"ratio\": {ratio:.4}, \"row\": {}}}", quoted(&row)),
            None => "null".to_string(),
        };
        format!(
            "{{\n  \"about\": {{{}}},\n  \"ratio_of\": {},\n  \"rows\": [\n{}\n  ],\n  \
             \"smallest\": {},\n  \"largest\": {}\n}}\n",
            about.join(", "),
            quoted(&self.servers[0].name),
            rows.join(",\n"),
            worst(false),
            worst(true)
        )
    }

    fn row_json(&self, pin: Pin, row: usize) -> String {
        let unit = self.rows[row].unit();
        let servers: Vec<_> = (0..self.servers.len()).filter_map(|server| self.server_json(pin, row, server)).collect();
        let ratios: Vec<_> = ratios(self.servers)
            .into_iter()
            .filter_map(|pair| {
                let ratio = self.ratio(pin, row, pair)?;
                Some(format!("{}: {ratio:.4}", quoted(&self.ratio_name(pair))))
            })
            .collect();
        format!(
            "    {{\"row\": {}, \"pin\": {}, \"unit\": {}, \"cpu_unit\": {}, \"lower_is_better\": {}, \
             \"ratios\": {{{}}}, \"servers\": {{\n      {}\n    }}}}",
            quoted(&self.rows[row].name()),
            quoted(pin.name()),
            quoted(unit.value),
            unit.cpu.map_or_else(null, quoted),
            unit.lower_is_better,
            ratios.join(", "),
            servers.join(",\n      ")
        )
    }

    /// `None` if this server was not measured.
    fn server_json(&self, pin: Pin, row: usize, server: usize) -> Option<String> {
        let Summary { median, min, max } = self.value(pin, row, server)?;
        let cost = |cpu: Option<f64>| cpu.map_or_else(null, |cpu| format!("{cpu:.4}"));
        let samples: Vec<String> = self
            .samples(pin, row, server)
            .iter()
            .map(|Sample { value, cpu, peak_kib, others, note }| {
                format!(
                    "{{\"rate\": {value:.3}, \"cpu\": {}, \"peak_kib\": {peak_kib}, \
                     \"others\": {others:.3}, \"note\": {}}}",
                    cost(*cpu),
                    note.as_deref().map_or_else(null, quoted)
                )
            })
            .collect();
        let ratio = self.ratio(pin, row, (0, server)).filter(|_| server > 0);
        Some(format!(
            "{}: {{\"median\": {median:.3}, \"min\": {min:.3}, \"max\": {max:.3}, \"cpu\": {}, \"ratio\": {}, \
             \"samples\": [{}]}}",
            quoted(&self.servers[server].name),
            cost(self.cpu(pin, row, server)),
            ratio.map_or_else(null, |ratio| format!("{ratio:.4}")),
            samples.join(", ")
        ))
    }
}

/// After the point, so that small numbers say something too.
fn digits(number: f64) -> usize {
    if number < 0.1 { 3 } else { 2 }
}

fn dash() -> String {
    "-".to_string()
}

fn null() -> String {
    "null".to_string()
}

/// Columns side by side: the first to the left, the others to the right. All lines have as many cells as the first.
fn table(lines: &[Vec<String>]) -> String {
    let mut widths = Vec::new();
    for line in lines {
        widths.resize(widths.len().max(line.len()), 0);
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    for line in lines {
        let mut shown = String::new();
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let _ = if column == 0 { write!(shown, "{cell:width$}") } else { write!(shown, "  {cell:>width$}") };
        }
        let _ = writeln!(text, "{}", shown.trim_end());
    }
    text
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control < ' ' => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(control));
            }
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}

//! The text of `--help`, made from the tables. Nothing is wider than 80 columns.

use super::options::{OPTIONS, OptionSpec};
use crate::layer::{About, Parameter};
use crate::text;

/// What fits any terminal.
const WIDTH: usize = 80;

/// Where explanations start, if what is explained leaves room.
const COLUMN: usize = 32;

/// The whole of `--help`. `program` is how the program was called; the lists are what it can serve.
pub fn help(program: &str, plugins: &[&About], filters: &[&About]) -> String {
    let mut text = format!(
        "\
Usage: {program} [OPTION ...] PLUGIN [[KEY=]VALUE ...]
       {program} PLUGIN --help
       {program} PLUGIN --dump-plugin
       {program} --dump-config
       {program} --probe=URI [--json]
       {program} --help
       {program} -V|--version

Serves what a plugin makes of files, memory and the like to clients that speak
the Network Block Device (NBD) protocol.

Options:
"
    );
    for spec in OPTIONS.iter().filter(|spec| !spec.help.is_empty()) {
        text += &entry(&option(spec), spec.line());
    }
    for (title, layers) in [("Plugins", plugins), ("Filters", filters)] {
        text += &format!("\n{title}:\n");
        for about in layers {
            text += &entry(&format!("  {}", about.name), about.line());
        }
    }
    text += &format!(
        "
Examples:
  Serve a file for reading, on TCP port 10809:
    {program} -r file disk.img
  Run a command with a scratch disk that is gone afterwards:
    {program} memory 1G --run 'nbdinfo \"$uri\"'
  Serve on a Unix socket, and print the URI of it:
    {program} -f --print-uri -U /tmp/sock null 1T
"
    );
    text
}

/// What `--help` adds for one layer. `program` is how the program was called; `kind` is `plugin` or `filter`.
pub fn layer_help(program: &str, kind: &str, about: &About) -> String {
    let mut text = format!("\n{kind}: {}\n", about.name);
    text += &wrapped("", 0, about.line());
    // As in nbdkit each starts its line, because scripts look for it there; a key that may be left out is in brackets, and other
    // names have no line.
    for (at, parameter) in about.parameters.iter().enumerate().filter(|(_, parameter)| !parameter.is_another_name()) {
        let Parameter { key, value, required, .. } = parameter;
        let key = if about.magic_key == Some(*key) { format!("[{key}=]") } else { format!("{key}=") };
        let required = if *required { "(required) " } else { "" };
        let mut help = format!("{required}{}", parameter.line());
        for other in about.parameters[at + 1..].iter().take_while(|other| other.is_another_name()) {
            help += &format!(" (or {}=)", other.key);
        }
        text += &entry(&format!("{key}{value}"), &help);
    }
    let examples = examples(&text::rest(about.summary));
    if !examples.is_empty() {
        text += &format!("Examples:\n{examples}");
    }
    text += &wrapped("", 0, &format!("More of it: {program} --man=nbdcaptive-{}-{kind} | man -l -", about.name));
    text
}

/// The lines of code in the Markdown of a page, from `# Examples` on.
fn examples(page: &str) -> String {
    let lines = page.lines().skip_while(|line| *line != "# Examples");
    lines.filter_map(|line| line.strip_prefix("    ")).map(|line| format!("  {line}\n")).collect()
}

/// How an option is written: `  -p, --port=PORT`.
fn option(spec: &OptionSpec) -> String {
    let short = spec.short.map_or("    ".to_owned(), |letter| format!("-{letter}, "));
    let value = match spec.value() {
        Some(value) if spec.value_is_optional() => format!("[={value}]"),
        Some(value) => format!("={value}"),
        None => String::new(),
    };
    format!("  {short}--{}{value}", spec.name())
}

/// A term and its explanation; the latter starts on its own line if the term is too long.
fn entry(term: &str, explanation: &str) -> String {
    if term.chars().count() < COLUMN {
        wrapped(&format!("{term:COLUMN$}"), COLUMN, explanation)
    } else {
        format!("{term}\n{}", wrapped(&" ".repeat(COLUMN), COLUMN, explanation))
    }
}

/// `start`, then words up to the width; further lines are indented. A word longer than a line is not broken.
fn wrapped(start: &str, indent: usize, words: &str) -> String {
    let mut text = String::new();
    let mut line = start.to_owned();
    let mut empty = true;
    for word in words.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            text += line.trim_end();
            text.push('\n');
            line = " ".repeat(indent);
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line += word;
        empty = false;
    }
    text += line.trim_end();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::ANOTHER_NAME;

    static ABOUT: About = About {
        name: "sample",
        summary: "a layer that has one parameter of each kind, and a summary that is longer than one line can hold",
        parameters: &[
            Parameter { key: "size", value: "<SIZE>", help: "The size of the disk.", required: true },
            Parameter {
                key: "a-key-that-leaves-no-room",
                value: "<VALUE>",
                help: "What it is, at such a length that it has to go on in the line that follows.",
                required: false,
            },
            Parameter { key: "short", value: "a|b", help: "one or the other", required: false },
            Parameter { key: "brief", value: "a|b", help: ANOTHER_NAME, required: false },
        ],
        thread_model: nbdcaptive_actors::device::ThreadModel::Parallel,
        magic_key: Some("size"),
        dump: &[],
    };

    #[test]
    fn fits_eighty_columns_and_has_no_trailing_space() {
        let text = help("nbdcaptive", &[&ABOUT], &[&ABOUT]) + &layer_help("nbdcaptive", "plugin", &ABOUT);
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH && line.trim_end() == line, "{line:?}");
        }
    }

    #[test]
    fn explains_every_option_once() {
        let text = help("nbdcaptive", &[], &[]);
        for spec in OPTIONS.iter().filter(|spec| !spec.help.is_empty()) {
            assert_eq!(text.matches(&entry(&option(spec), spec.line())).count(), 1, "{spec:?}");
        }
        assert!(!text.contains("short-options"));
    }

    #[test]
    fn a_layer_lists_its_parameters() {
        assert_eq!(
            layer_help("nbdcaptive", "filter", &ABOUT),
            "
filter: sample
a layer that has one parameter of each kind, and a summary that is longer than
one line can hold
[size=]<SIZE>                   (required) The size of the disk.
a-key-that-leaves-no-room=<VALUE>
                                What it is, at such a length that it has to go
                                on in the line that follows.
short=a|b                       one or the other (or brief=)
More of it: nbdcaptive --man=nbdcaptive-sample-filter | man -l -
"
        );
    }
}

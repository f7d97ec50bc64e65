//! `--candidates`: what may stand in place of the last word of a command line that is being typed. The scripts of
//! [`super::completion`] ask; all that they know comes from here, and is read from the tables that the parser and help read.
//!
//! The answer has a line for each candidate, `WORD<TAB>what it is`, or, where names are wanted that the shell knows best, a line
//! that starts with a space: ` files BEFORE`, where BEFORE is what stands before the path in that word (`file=`), or the same with
//! `directories`, `users`, `groups`. More is to follow a word that ends in `=` or `:`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use super::options::{Effect, OPTIONS, OptionSpec};
use super::{Parameter, long_option, man, split_parameter};
use crate::layer::About;
use crate::{filters, plugins};

/// What stands for a value, by its name between `<` and `>`: what the shell or a table can complete. Any other name is no more
/// than a name.
const KNOWN: &[(&str, Kind)] = &[
    ("BOOL", Kind::Switch),
    ("DIR", Kind::Shell("directories")),
    ("DIRNAME", Kind::Shell("directories")),
    ("FILE", Kind::Shell("files")),
    ("FILENAME", Kind::Shell("files")),
    ("FILTER", Kind::Filter),
    ("GROUP", Kind::Shell("groups")),
    ("PAGE", Kind::Page),
    ("PATH", Kind::Shell("files")),
    ("PIDFILE", Kind::Shell("files")),
    ("SOCKET", Kind::Shell("files")),
    ("SOCKNAME", Kind::Shell("files")),
    ("TRIGGER", Kind::Shell("files")),
    ("USER", Kind::Shell("users")),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `true` or `false`.
    Switch,
    /// The name of a filter.
    Filter,
    /// The name of a manual page.
    Page,
    /// Names that the shell knows, by the word that asks for them.
    Shell(&'static str),
}

/// What can be served and put before it.
struct Layers {
    plugins: Vec<&'static About>,
    filters: Vec<&'static About>,
}

/// The answer to `--candidates`: `words` are those after the program's name up to the one that is being typed, which may be
/// empty.
pub fn answer(words: &[OsString]) -> String {
    let layers = Layers {
        plugins: plugins::ALL.iter().map(|entry| entry.about).collect(),
        filters: filters::ALL.iter().map(|entry| entry.about).collect(),
    };
    let (current, before) = match words.split_last() {
        Some((current, before)) => (current.as_os_str(), before),
        None => (OsStr::new(""), &[][..]),
    };
    let mut answer = Answer { layers, text: String::new() };
    answer.complete(&Typed::read(before), current);
    answer.text
}

/// What the words before the current one say, as far as they say it well.
#[derive(Default)]
struct Typed {
    /// The option whose value is to follow.
    wants: Option<&'static OptionSpec>,
    /// After `--` all words are the plugin's.
    options_ended: bool,
    plugin: Option<OsString>,
    filters: Vec<OsString>,
    /// `--man`: the next word is a page, not a plugin.
    man: bool,
}

impl Typed {
    fn read(words: &[OsString]) -> Typed {
        let mut typed = Typed::default();
        for word in words {
            if let Some(spec) = typed.wants.take() {
                typed.option(spec, Some(word));
                continue;
            }
            match word.as_bytes() {
                b"--" if !typed.options_ended => typed.options_ended = true,
                [b'-', b'-', ..] if !typed.options_ended => {
                    if let Ok((_, spec, value)) = long_option(word) {
                        typed.option(spec, value.as_deref());
                    }
                }
                [b'-', _, ..] if !typed.options_ended => {
                    if let Some((spec, _, value)) = letter_with_value(word) {
                        typed.option(spec, Some(value).filter(|value| !value.is_empty()));
                    }
                }
                _ => {
                    typed.plugin.get_or_insert_with(|| word.clone());
                }
            }
        }
        typed
    }

    fn option(&mut self, spec: &'static OptionSpec, value: Option<&OsStr>) {
        match (&spec.effect, value) {
            (Effect::Value(..), None) => self.wants = Some(spec),
            (_, Some(value)) if spec.name() == "filter" => self.filters.push(value.to_owned()),
            _ => self.man |= spec.name() == "man",
        }
    }
}

/// The first letter of a cluster that takes a value: its option, the cluster up to it, and what is glued on.
fn letter_with_value(word: &OsStr) -> Option<(&'static OptionSpec, String, &OsStr)> {
    let bytes = word.as_bytes();
    (1..bytes.len()).find_map(|index| {
        let letter = char::from(bytes[index]);
        let takes = |spec: &&OptionSpec| spec.short == Some(letter) && matches!(spec.effect, Effect::Value(..));
        let spec = OPTIONS.iter().find(takes)?;
        let (head, value) = bytes.split_at(index + 1);
        Some((spec, String::from_utf8_lossy(head).into_owned(), OsStr::from_bytes(value)))
    })
}

/// `a|b[x|y]|c` at its outer bars.
fn alternatives(value: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0usize;
    value.split(move |c| {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == '|' && depth == 0
    })
}

struct Answer {
    layers: Layers,
    text: String,
}

impl Answer {
    fn complete(&mut self, typed: &Typed, current: &OsStr) {
        // What is no UTF-8 can only be a path, which is the shell's to complete.
        let text = current.to_string_lossy();
        if let Some(spec) = typed.wants {
            return self.option_values(spec, "", &text);
        }
        match current.as_bytes() {
            [b'-', b'-', ..] if !typed.options_ended => match text.split_once('=') {
                Some((name, value)) => {
                    if let Ok((_, spec, _)) = long_option(current) {
                        self.option_values(spec, &format!("{name}="), value);
                    }
                }
                None => self.long_names(&text),
            },
            [b'-', ..] if !typed.options_ended => match letter_with_value(current) {
                Some((spec, head, value)) if !value.is_empty() => {
                    self.option_values(spec, &head, &value.to_string_lossy());
                }
                _ => {
                    for spec in OPTIONS {
                        if let Some(letter) = spec.short {
                            self.offer("", &format!("-{letter}"), spec.line(), &text);
                        }
                    }
                    self.long_names(&text);
                }
            },
            _ => match &typed.plugin {
                None if typed.man => self.values("<PAGE>", "", &text),
                None => {
                    for about in self.layers.plugins.clone() {
                        self.offer("", about.name, about.line(), &text);
                    }
                }
                Some(plugin) => self.parameters(plugin, &typed.filters, current),
            },
        }
    }

    /// One candidate, `before` and `word`, if it starts with what was typed behind `before`.
    fn offer(&mut self, before: &str, word: &str, line: &str, typed: &str) {
        if word.starts_with(typed) {
            self.text += &format!("{before}{word}\t{line}\n");
        }
    }

    /// Names that start with `typed`: the one that each option has in help, or nbdkit's others where there is no such.
    fn long_names(&mut self, typed: &str) {
        let specs = || OPTIONS.iter().filter(|spec| !spec.help.is_empty());
        let offered = self.text.len();
        for first in [true, false] {
            for spec in specs() {
                let names = if first { &spec.long[..1] } else { &spec.long[1..] };
                for name in names {
                    let equals = if matches!(spec.effect, Effect::Value(..)) { "=" } else { "" };
                    self.offer("", &format!("--{name}{equals}"), spec.line(), typed);
                }
            }
            if self.text.len() > offered {
                return;
            }
        }
    }

    fn option_values(&mut self, spec: &OptionSpec, before: &str, typed: &str) {
        if let Some(value) = spec.value() {
            let value = if value.contains('|') { value.to_owned() } else { format!("<{value}>") };
            self.values(&value, before, typed);
        }
    }

    /// Keys, values of keys, and words for the plugin's magic key.
    fn parameters(&mut self, plugin: &OsStr, filters: &[OsString], current: &OsStr) {
        let named = |name: &OsStr, among: &[&'static About]| among.iter().copied().find(|about| name == about.name);
        let plugin = named(plugin, &self.layers.plugins);
        let filters = filters.iter().filter_map(|name| named(name, &self.layers.filters));
        // In the order in which they are asked: filters first.
        let layers: Vec<_> = filters.chain(plugin).collect();
        let mut parameters = layers.iter().flat_map(|about| about.parameters);
        match split_parameter(current) {
            Parameter::KeyValue(key, value) => {
                if let Some(parameter) = parameters.find(|parameter| parameter.key == key) {
                    self.values(parameter.value, &format!("{key}="), &value.to_string_lossy());
                }
            }
            Parameter::Bare(typed) => {
                let typed = typed.to_string_lossy();
                for parameter in parameters {
                    self.offer("", &format!("{}=", parameter.key), parameter.line(), &typed);
                }
                let magic = plugin
                    .and_then(|about| about.parameters.iter().find(|parameter| about.magic_key == Some(parameter.key)));
                if let Some(parameter) = magic {
                    self.values(parameter.value, "", &typed);
                }
            }
        }
    }

    /// What is written in help as `keep|none|fixed:<TEXT>` or `<FILENAME>`: words, and what a name stands for.
    fn values(&mut self, value: &str, before: &str, typed: &str) {
        for alternative in alternatives(value) {
            // `malloc[,mlock=true]` is one word or the other.
            let (least, more) = alternative.split_once('[').unwrap_or((alternative, ""));
            match least.split_once('<') {
                Some(("", name)) => self.known(name.trim_end_matches('>'), before, typed),
                Some((word, _)) => self.offer(before, word, "", typed),
                // A path that has to be a whole one.
                None if least.starts_with('/') => {
                    if typed.starts_with('/') {
                        self.known(least.trim_start_matches('/'), before, typed);
                    }
                }
                // From one number to another.
                None if least.contains("..") || least.is_empty() => {}
                None => {
                    self.offer(before, least, "", typed);
                    if !more.is_empty() && !more.contains('<') {
                        self.offer(before, &format!("{least}{}", more.trim_end_matches(']')), "", typed);
                    }
                }
            }
        }
    }

    fn known(&mut self, name: &str, before: &str, typed: &str) {
        match KNOWN.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind) {
            None => {}
            Some(Kind::Switch) => ["true", "false"].iter().for_each(|word| self.offer(before, word, "", typed)),
            Some(Kind::Filter) => {
                for about in self.layers.filters.clone() {
                    self.offer(before, about.name, about.line(), typed);
                }
            }
            Some(Kind::Page) => {
                for page in man::Manual::new().pages() {
                    self.offer(before, &page.name, page.line, typed);
                }
            }
            Some(Kind::Shell(order)) => self.text += &format!(" {order} {before}\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The candidates alone, without what is said of them.
    fn words(line: &[&str]) -> Vec<String> {
        let line: Vec<_> = line.iter().map(OsString::from).collect();
        answer(&line).lines().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect()
    }

    #[test]
    fn a_name_that_is_typed_is_gone_on_with() {
        assert_eq!(words(&["--fil"]), ["--filter="]);
        assert_eq!(words(&["--export-n"]), ["--export-name="], "an alias, where nothing else fits");
        assert_eq!(words(&["--exit"]), ["--exit-with-parent"]);
        assert_eq!(words(&["mem"]), ["memory"]);
        assert_eq!(words(&["-f", "mem"]), ["memory"]);
        assert!(words(&[]).contains(&"memory".to_owned()) && words(&["-"]).contains(&"-f".to_owned()));
        assert_eq!(words(&["--long-op"]), [""; 0], "what is for scripts is not offered");
        assert_eq!(words(&["--", "--f"]), [""; 0], "there are no options after --");
    }

    #[test]
    fn an_option_offers_its_values_wherever_they_stand() {
        assert_eq!(words(&["--filter=exitl"]), ["--filter=exitlast"]);
        assert_eq!(words(&["--filter", "exitl"]), ["exitlast"]);
        assert_eq!(words(&["--filt=exitl"]), ["--filt=exitlast"]);
        assert_eq!(words(&["--tls=r"]), ["--tls=require"]);
        assert_eq!(words(&["--log=s"]), ["--log=stderr", "--log=syslog"]);
        assert_eq!(words(&["--log=/"]), [" files --log="]);
        assert_eq!(words(&["--completion", ""]), ["bash", "zsh", "fish"]);
        assert_eq!(words(&["-U", ""]), [" files "]);
        assert_eq!(words(&["-fU/tm"]), [" files -fU"]);
        assert_eq!(words(&["--user="]), [" users --user="]);
        assert_eq!(words(&["--run", "mem"]), [""; 0], "any word may be a command");
    }

    #[test]
    fn a_plugin_and_its_filters_offer_their_parameters() {
        assert_eq!(words(&["memory", "s"]), ["size="]);
        assert_eq!(words(&["memory", "allocator=m"]), ["allocator=malloc", "allocator=malloc,mlock=true"]);
        assert_eq!(words(&["--filter=cow", "memory", "cow-on-c"]), ["cow-on-cache="]);
        assert_eq!(
            words(&["memory", "--filter", "cow", "1G", "cow-on-cache="]),
            ["cow-on-cache=true", "cow-on-cache=false"]
        );
        assert_eq!(words(&["memory", "cow-on-c"]), [""; 0], "there is no such filter");
        assert_eq!(words(&["--run", "memory", "file", "fil"]), ["file=", " files "]);
        assert_eq!(words(&["file", "file=/t"]), [" files file="]);
        assert_eq!(words(&["file", "dir=/t"]), [" directories dir="]);
        assert_eq!(words(&["file", "./disk=1"]), [" files "], "a word that cannot have a key");
        assert_eq!(words(&["-f", "no-such-plugin", ""]), [""; 0]);
    }

    #[test]
    fn pages_are_offered_after_man() {
        assert_eq!(words(&["--man", "nbdcaptive-file-"]), ["nbdcaptive-file-plugin"]);
        assert_eq!(words(&["--man=nbdcaptive-cap"]), ["--man=nbdcaptive-captive"]);
    }

    #[test]
    fn nothing_that_is_typed_is_a_panic() {
        let odd = OsStr::from_bytes(b"\xff=\xfe");
        for line in [vec![OsStr::new("-")], vec![odd], vec![OsStr::new("file"), odd], vec![OsStr::new("-\u{e9}"), odd]]
        {
            answer(&line.into_iter().map(OsStr::to_owned).collect::<Vec<_>>());
        }
    }
}

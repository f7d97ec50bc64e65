//! `--man`: manual pages, made from what the parser and help read. Prose that is about no single option, plugin or filter is in
//! the Markdown files of this directory; a line `{options}` in them stands for what comes from the table of that name.

mod roff;

use nbdcaptive_actors::device::ThreadModel;

use self::roff::{Roff, Span};
use super::Options;
use super::options::{OPTIONS, OptionSpec};
use crate::layer::{About, Parameter};
use crate::{filters, plugins, text};

/// A manual page of section 1.
pub struct Page<'a> {
    /// `nbdcaptive-file-plugin`
    pub name: String,
    /// What it is about, in one line.
    pub line: &'static str,
    manual: &'a Manual,
    content: Content,
}

enum Content {
    /// Prose with places to be filled in.
    Prose(&'static str),
    Layer(Kind, &'static About),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plugin,
    Filter,
}

/// Who the pages come from, as their last lines have it.
const SOURCE: &str = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));

/// What the pages are about.
pub struct Manual {
    /// The plugins, in the order of lists.
    pub plugins: Vec<&'static About>,
    /// The filters.
    pub filters: Vec<&'static About>,
}

impl Manual {
    /// Of this program.
    pub fn new() -> Manual {
        Manual {
            plugins: plugins::ALL.iter().map(|entry| entry.about).collect(),
            filters: filters::ALL.iter().map(|entry| entry.about).collect(),
        }
    }

    /// Every page.
    pub fn pages(&self) -> Vec<Page<'_>> {
        let captive = "run nbdcaptive for another process, and be sure that it ends";
        let prose = [
            ("nbdcaptive", "an NBD server that lives as long as it is needed", include_str!("nbdcaptive.md")),
            ("nbdcaptive-captive", captive, include_str!("captive.md")),
        ];
        let prose = prose.map(|(name, line, text)| (name.to_owned(), line, Content::Prose(text)));
        let layer = |kind: Kind, about: &'static About| {
            (format!("nbdcaptive-{}-{}", about.name, kind.name()), about.line(), Content::Layer(kind, about))
        };
        let plugins = self.plugins.iter().map(|about| layer(Kind::Plugin, about));
        let filters = self.filters.iter().map(|about| layer(Kind::Filter, about));
        let pages = prose.into_iter().chain(plugins).chain(filters);
        pages.map(|(name, line, content)| Page { name, line, manual: self, content }).collect()
    }
}

impl Default for Manual {
    fn default() -> Manual {
        Manual::new()
    }
}

/// The answer to `--man`: the page that is asked for, as roff, or a line for each page where none is. Errors: there is no such
/// page, as a line.
pub fn answer(options: &Options) -> Result<String, String> {
    let asked = options.man.as_ref().filter(|page| !page.is_empty()).or(options.plugin.as_ref());
    let manual = Manual::new();
    let pages = manual.pages();
    match asked {
        None => {
            let width = pages.iter().map(|page| page.name.len()).max().unwrap_or(0);
            Ok(pages.iter().map(|page| format!("{:width$}  {}\n", page.name, page.line)).collect())
        }
        Some(name) => {
            let name = name.to_string_lossy();
            let found = find(&pages, &name).map(Page::roff);
            found.ok_or_else(|| format!("--man: no page '{name}'; --man alone lists them all"))
        }
    }
}

/// The page of that name, or the only one whose name is `nbdcaptive-NAME-plugin`, `nbdcaptive-NAME-filter` or
/// `nbdcaptive-NAME`.
fn find<'a>(pages: &'a [Page<'a>], name: &str) -> Option<&'a Page<'a>> {
    let bare = name.strip_suffix("(1)").or_else(|| name.strip_suffix(".1")).unwrap_or(name);
    let exact = pages.iter().find(|page| page.name == bare);
    exact.or_else(|| {
        let mut called = pages.iter().filter(|page| {
            let rest = page.name.strip_prefix("nbdcaptive-").and_then(|rest| rest.strip_prefix(bare));
            matches!(rest, Some("" | "-plugin" | "-filter"))
        });
        called.next().filter(|_| called.next().is_none())
    })
}

impl Page<'_> {
    /// The page, for man(1), groff and mandoc.
    pub fn roff(&self) -> String {
        let mut roff = Roff::new(&self.name, 1, SOURCE);
        roff.heading("Name");
        roff.markdown(&format!("{} - {}", self.name, self.line));
        match self.content {
            Content::Prose(text) => fill_in(&mut roff, self.manual, text),
            Content::Layer(kind, about) => layer(&mut roff, kind, about),
        }
        roff.finish()
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Plugin => "plugin",
            Kind::Filter => "filter",
        }
    }
}

/// Prose, with the lines in braces replaced.
fn fill_in(roff: &mut Roff, manual: &Manual, text: &str) {
    let mut prose = String::new();
    for line in text.lines() {
        match line.strip_prefix('{').and_then(|line| line.strip_suffix('}')) {
            None => {
                prose += line;
                prose.push('\n');
            }
            Some(place) => {
                roff.markdown(&std::mem::take(&mut prose));
                match place {
                    "options" => {
                        OPTIONS.iter().filter(|spec| !spec.help.is_empty()).for_each(|spec| option(roff, spec))
                    }
                    "plugins" => list(roff, Kind::Plugin, &manual.plugins),
                    "filters" => list(roff, Kind::Filter, &manual.filters),
                    _ => {}
                }
            }
        }
    }
    roff.markdown(&prose);
}

/// `-p PORT, --port=PORT`, with every other name, and what it does.
fn option(roff: &mut Roff, spec: &OptionSpec) {
    let value = || spec.value().map(|value| if value.contains('|') { literal(value) } else { vec![italic(value)] });
    let mut term = Vec::new();
    if let Some(letter) = spec.short {
        term.push(bold(&format!("-{letter}")));
        if let Some(value) = value() {
            term.push(plain(" "));
            term.extend(value);
        }
    }
    for name in spec.long {
        if !term.is_empty() {
            term.push(plain(", "));
        }
        match value() {
            Some(value) if spec.value_is_optional() => {
                term.extend([bold(&format!("--{name}")), plain("["), bold("=")]);
                term.extend(value);
                term.push(plain("]"));
            }
            Some(value) => {
                term.push(bold(&format!("--{name}=")));
                term.extend(value);
            }
            None => term.push(bold(&format!("--{name}"))),
        }
    }
    roff.term(&term, &sentence(spec.line()), &text::rest(spec.help));
}

fn plain(text: &str) -> Span {
    Span::Plain(text.to_owned())
}

fn bold(text: &str) -> Span {
    Span::Bold(text.to_owned())
}

fn italic(text: &str) -> Span {
    Span::Italic(text.to_owned())
}

/// `keep|fixed:<TEXT>`: what is in `<>` stands for something else, and words are typed as they are.
fn literal(value: &str) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut rest = value;
    while !rest.is_empty() {
        let name = rest.strip_prefix('<').and_then(|rest| rest.split_once('>'));
        if let Some((name, after)) = name {
            spans.push(italic(name));
            rest = after;
            continue;
        }
        // Signs between words are no part of them.
        let is_sign = |c: char| "|[]".contains(c);
        let sign = rest.starts_with(is_sign);
        let end = rest.find(|c| is_sign(c) != sign || c == '<').filter(|end| *end > 0).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        spans.push(if sign { plain(word) } else { bold(word) });
        rest = after;
    }
    spans
}

/// A page of each layer, and what it is.
fn list(roff: &mut Roff, kind: Kind, layers: &[&About]) {
    for about in layers {
        let name = format!("nbdcaptive-{}-{}", about.name, kind.name());
        roff.term(&[Span::Bold(name), plain("(1)")], &sentence(about.line()), "");
    }
}

/// All of a layer's page behind its name.
fn layer(roff: &mut Roff, kind: Kind, about: &About) {
    roff.heading("Synopsis");
    roff.paragraph(&synopsis(kind, about));
    // Sections of its own come behind the parameters.
    let rest = text::rest(about.summary);
    let (description, sections) = match rest.find("\n# ") {
        _ if rest.starts_with("# ") => ("", rest.as_str()),
        Some(at) => rest.split_at(at),
        None => (rest.as_str(), ""),
    };
    roff.heading("Description");
    roff.markdown(&format!("{}\n\n{description}", sentence(about.line())));
    if !about.parameters.is_empty() {
        roff.heading("Parameters");
        for parameter in about.parameters {
            let mut key = vec![Span::Bold(format!("{}=", parameter.key))];
            key.extend(literal(parameter.value));
            roff.term(&key, &said_of(about, parameter), &text::rest(parameter.help));
        }
        roff.markdown("How sizes, times and other values are written is in nbdcaptive(1), under VALUES.");
    }
    if kind == Kind::Plugin {
        roff.heading("Requests at a time");
        roff.markdown(match about.thread_model {
            ThreadModel::Parallel => "Any number, of one client too.",
            ThreadModel::SerializeRequests => "One of each client; those of several clients go on side by side.",
            ThreadModel::SerializeAllRequests => "One, of all clients together.",
            ThreadModel::SerializeConnections => "One, and one client is served at a time.",
        });
    }
    roff.markdown(sections);
    roff.heading("See also");
    let other = match kind {
        Kind::Plugin => "nbdcaptive-captive(1)",
        Kind::Filter => "nbdcaptive-captive(1), which says how the server's life is bound to others'",
    };
    roff.markdown(&format!("nbdcaptive(1), {other}."));
}

/// How it is called, with the parameters that have to be given, and the others as far as they are few.
fn synopsis(kind: Kind, about: &About) -> Vec<Span> {
    /// What fits two lines or three.
    const FEW: usize = 5;
    let further = || [plain(" ["), italic("KEY"), bold("="), italic("VALUE"), plain(" ...]")];
    let mut spans = vec![bold("nbdcaptive")];
    if kind == Kind::Filter {
        spans.push(Span::Bold(format!(" --filter={}", about.name)));
    }
    spans.extend([plain(" ["), italic("OPTION"), plain(" ...] ")]);
    match kind {
        Kind::Plugin => spans.push(bold(about.name)),
        Kind::Filter => {
            spans.push(italic("PLUGIN"));
            spans.extend(further());
        }
    }
    let is_magic = |parameter: &Parameter| about.magic_key == Some(parameter.key);
    let named = |parameter: &&Parameter| parameter.required || is_magic(parameter) || about.parameters.len() <= FEW;
    for parameter in about.parameters.iter().filter(named) {
        spans.push(plain(if parameter.required { " " } else { " [" }));
        if is_magic(parameter) {
            spans.extend([plain("["), Span::Bold(format!("{}=", parameter.key)), plain("]")]);
        } else {
            spans.push(Span::Bold(format!("{}=", parameter.key)));
        }
        spans.extend(literal(parameter.value));
        spans.push(plain(if parameter.required { "" } else { "]" }));
    }
    if kind == Kind::Plugin && about.parameters.iter().any(|parameter| !named(&parameter)) {
        spans.extend(further());
    }
    spans
}

/// The line of a parameter, and what help says in brackets, as sentences.
fn said_of(about: &About, parameter: &Parameter) -> String {
    let mut text = sentence(parameter.line());
    if parameter.required {
        text += " It has to be given.";
    }
    if about.magic_key == Some(parameter.key) {
        text += " A word without a key stands for it.";
    }
    text
}

/// A line of help as a sentence.
fn sentence(line: &str) -> String {
    let mut chars = line.chars();
    let first = chars.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
    let end = if line.ends_with(['.', '!', '?', ':']) { "" } else { "." };
    format!("{first}{}{end}", chars.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_found_by_as_much_of_its_name_as_is_clear() {
        let manual = Manual::new();
        let pages = manual.pages();
        let found = |name: &str| find(&pages, name).map(|page| page.name.as_str());
        assert_eq!(found("nbdcaptive"), Some("nbdcaptive"));
        assert_eq!(found("captive"), Some("nbdcaptive-captive"));
        assert_eq!(found("nbdcaptive-file-plugin(1)"), Some("nbdcaptive-file-plugin"));
        assert_eq!(found("file"), Some("nbdcaptive-file-plugin"));
        assert_eq!(found("cow-filter"), Some("nbdcaptive-cow-filter"));
        assert_eq!(found("fil"), None);
        assert_eq!(found(""), None);
    }

    #[test]
    fn every_declaration_is_in_its_page() {
        let manual = Manual::new();
        let pages = manual.pages();
        let page = |name: &str| find(&pages, name).expect("there is such a page").roff();
        let main = page("nbdcaptive");
        for spec in OPTIONS {
            for name in spec.long {
                assert!(main.contains(&roff::escape(&format!("--{name}"))), "--{name}");
            }
            if let Some(letter) = spec.short {
                assert!(main.contains(&format!("\\fB\\-{letter}\\fR")), "-{letter}");
            }
        }
        for (kind, layers) in [("plugin", &manual.plugins), ("filter", &manual.filters)] {
            for about in layers {
                let name = format!("nbdcaptive-{}-{kind}", about.name);
                assert!(main.contains(&roff::escape(&name)), "{name}");
                let page = page(&name);
                for parameter in about.parameters {
                    assert!(
                        page.contains(&format!("\\fB{}=\\fR", roff::escape(parameter.key))),
                        "{name}: {parameter:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_stands_for_a_value_is_told_from_what_is_typed() {
        let text = |value: &str| {
            let spans = literal(value).into_iter().map(|span| match span {
                Span::Plain(text) => text,
                Span::Bold(text) => format!("*{text}*"),
                Span::Italic(text) => format!("_{text}_"),
            });
            spans.collect::<String>()
        };
        assert_eq!(text("<SIZE>"), "_SIZE_");
        assert_eq!(text("keep|fixed:<TEXT>"), "*keep*|*fixed:*_TEXT_");
        assert_eq!(text("a[,b=<X>]"), "*a*[*,b=*_X_]");
        assert_eq!(text("[~]<START>-<END>"), "[*~*]_START_*-*_END_");
        assert_eq!(text("<"), "*<*");
    }
}

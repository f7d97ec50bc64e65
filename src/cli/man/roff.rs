//! Writes manual pages: Markdown, read by `pulldown-cmark`, becomes roff with the macros of man(7).
//!
//! The `roff` crate would do as a writer but for what is pasted into shells: it leaves `~`, `^` and `` ` `` to be set as accents
//! and curly quotes, and puts no escape before the quotes in the arguments of macros.

use std::fmt::Write;

use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Options, Parser, Tag, TagEnd};

/// A page that is being written.
pub struct Roff {
    page: String,
    /// The line of text that is being put together, as roff.
    inline: String,
    fonts: Vec<char>,
    /// Items of lists, the innermost last.
    items: Vec<Item>,
    /// What stands before each item of a list: nothing, or its number.
    numbers: Vec<Option<u64>>,
    /// The margin has been moved for the lines of code that we are in.
    indented: bool,
}

/// Words of one kind.
pub enum Span {
    /// Prose.
    Plain(String),
    /// To be typed as it is.
    Bold(String),
    /// Stands for something else.
    Italic(String),
}

/// An item of a list, or what is said of a term.
#[derive(Default)]
struct Item {
    /// Something has been said already.
    begun: bool,
    /// The margin has been moved, for all but the first paragraph.
    shifted: bool,
}

impl Roff {
    /// An empty page. `source` is who it comes from, as the last line has it.
    pub fn new(name: &str, section: u8, source: &str) -> Roff {
        let mut page = String::new();
        let title = escape(&name.to_uppercase());
        // No date: the same program prints the same page.
        let _ = writeln!(page, r#".TH "{title}" "{section}" "" "{}" """#, escape(source));
        // Names of options and paths are not to be divided, nor lines filled with blanks. groff turns hyphenation on again at
        // each paragraph unless its register says otherwise.
        page += ".nr HY 0\n.nh\n.ad l\n";
        Roff { page, inline: String::new(), fonts: Vec::new(), items: Vec::new(), numbers: Vec::new(), indented: false }
    }

    /// The page.
    pub fn finish(self) -> String {
        self.page
    }

    /// A section.
    pub fn heading(&mut self, text: &str) {
        let _ = writeln!(self.page, ".SH \"{}\"", escape(&text.to_uppercase()));
    }

    /// A paragraph of spans.
    pub fn paragraph(&mut self, spans: &[Span]) {
        self.block();
        self.spans(spans);
    }

    /// Something to be explained, and the explanation: a plain line, and Markdown.
    pub fn term(&mut self, term: &[Span], line: &str, rest: &str) {
        self.page += ".TP\n";
        self.spans(term);
        self.items.push(Item::default());
        self.block();
        self.page += &guarded(&escape(line));
        self.page.push('\n');
        self.markdown(rest);
        self.end_item();
    }

    fn spans(&mut self, spans: &[Span]) {
        for span in spans {
            match span {
                // A long line may go on behind a bar.
                Span::Plain(text) => self.inline += &escape(text).replace('|', "|\\:"),
                Span::Bold(text) => {
                    let _ = write!(self.inline, "\\fB{}\\fR", escape(text));
                }
                Span::Italic(text) => {
                    let _ = write!(self.inline, "\\fI{}\\fR", escape(text));
                }
            }
        }
        self.end_inline();
    }

    /// Markdown: headings, paragraphs, lists, definitions, code.
    pub fn markdown(&mut self, text: &str) {
        for event in Parser::new_ext(text, Options::ENABLE_DEFINITION_LIST) {
            self.event(event);
        }
        self.end_inline();
    }

    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Start(Tag::Paragraph) => self.block(),
            Event::End(TagEnd::Paragraph) => self.end_inline(),
            Event::Start(Tag::Heading { .. }) => self.end_inline(),
            Event::End(TagEnd::Heading(level)) => {
                let text = std::mem::take(&mut self.inline);
                let text = if level == HeadingLevel::H1 { text.to_uppercase() } else { text };
                let macro_name = if level == HeadingLevel::H1 { "SH" } else { "SS" };
                let _ = writeln!(self.page, ".{macro_name} \"{text}\"");
            }
            Event::Start(Tag::CodeBlock(CodeBlockKind::Indented | CodeBlockKind::Fenced(_))) => {
                self.end_inline();
                self.literal_block();
                self.page += ".EX\n";
                self.fonts.push('L');
            }
            Event::End(TagEnd::CodeBlock) => {
                self.fonts.pop();
                self.page += ".EE\n";
                if std::mem::take(&mut self.indented) {
                    self.page += ".RE\n";
                }
            }
            Event::Text(text) if self.fonts.last() == Some(&'L') => {
                for line in text.lines() {
                    self.page += &guarded(&escape(line));
                    self.page.push('\n');
                }
            }
            Event::Start(Tag::List(first)) => {
                self.end_inline();
                self.shift();
                self.numbers.push(first);
            }
            Event::End(TagEnd::List(_)) => {
                self.numbers.pop();
            }
            Event::Start(Tag::Item) => {
                match self.numbers.last_mut() {
                    Some(Some(number)) => {
                        let _ = writeln!(self.page, ".IP {number}. 4");
                        *number += 1;
                    }
                    _ => self.page += ".IP \\(bu 2\n",
                }
                self.items.push(Item::default());
            }
            Event::Start(Tag::DefinitionList) => {
                self.end_inline();
                self.shift();
            }
            Event::Start(Tag::DefinitionListTitle) => self.page += ".TP\n",
            Event::End(TagEnd::DefinitionListTitle) => self.end_inline(),
            Event::Start(Tag::DefinitionListDefinition) => self.items.push(Item::default()),
            Event::End(TagEnd::Item | TagEnd::DefinitionListDefinition) => self.end_item(),
            Event::Start(Tag::Strong) => self.font('B'),
            Event::Start(Tag::Emphasis) => self.font('I'),
            Event::End(TagEnd::Strong | TagEnd::Emphasis) => self.font_back(),
            Event::Code(text) => {
                self.mark_begun();
                self.font('B');
                self.inline += &escape(&text);
                self.font_back();
            }
            Event::Text(text) => {
                self.mark_begun();
                let text = if self.fonts.is_empty() { references(&text) } else { escape(&text) };
                self.inline += &text;
            }
            Event::SoftBreak | Event::HardBreak => self.inline.push('\n'),
            // Links, images, raw HTML and the like have no place in these pages.
            _ => {}
        }
    }

    /// Says where a paragraph begins.
    fn block(&mut self) {
        match self.items.last_mut() {
            Some(item) if !item.begun => item.begun = true,
            _ => {
                self.shift();
                if !self.after_heading() {
                    self.page += ".PP\n";
                }
            }
        }
    }

    /// A heading makes room behind it.
    fn after_heading(&self) -> bool {
        self.page.lines().last().is_some_and(|line| line.starts_with(".SH ") || line.starts_with(".SS "))
    }

    /// The same for lines that are set as they are.
    fn literal_block(&mut self) {
        match self.items.last_mut() {
            Some(item) if !item.begun => item.begun = true,
            _ => {
                self.shift();
                self.indented = self.after_heading();
                self.page += if self.indented { ".RS 4\n" } else { ".IP \"\" 4\n" };
            }
        }
    }

    /// Moves the margin under the text of the item that we are in, once.
    fn shift(&mut self) {
        if let Some(item) = self.items.last_mut()
            && !item.shifted
        {
            item.begun = true;
            item.shifted = true;
            self.page += ".RS\n";
        }
    }

    /// A short item has text and no paragraph.
    fn mark_begun(&mut self) {
        if let Some(item) = self.items.last_mut() {
            item.begun = true;
        }
    }

    fn end_item(&mut self) {
        self.end_inline();
        if self.items.pop().is_some_and(|item| item.shifted) {
            self.page += ".RE\n";
        }
    }

    fn end_inline(&mut self) {
        if !self.inline.is_empty() {
            for line in std::mem::take(&mut self.inline).lines() {
                self.page += &guarded(line.trim_start());
                self.page.push('\n');
            }
        }
    }

    fn font(&mut self, font: char) {
        self.fonts.push(font);
        let _ = write!(self.inline, "\\f{font}");
    }

    fn font_back(&mut self) {
        self.fonts.pop();
        let font = self.fonts.last().copied().unwrap_or('R');
        let _ = write!(self.inline, "\\f{font}");
    }
}

/// Text in which nothing means anything to roff, and which is printed as it is: ASCII stays ASCII.
pub fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '\\' => escaped += "\\e",
            '-' => escaped += "\\-",
            '~' => escaped += "\\(ti",
            '^' => escaped += "\\(ha",
            '`' => escaped += "\\(ga",
            '\'' => escaped += "\\(aq",
            '"' => escaped += "\\(dq",
            ' '..='~' | '\n' => escaped.push(c),
            c if c.is_control() => escaped.push(' '),
            c => {
                let _ = write!(escaped, "\\[u{:04X}]", u32::from(c));
            }
        }
    }
    escaped
}

/// A line that roff would take for an order.
fn guarded(line: &str) -> String {
    if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line.to_owned() }
}

/// Text, with the names of manual pages, `nbdkit(1)`, in bold.
fn references(text: &str) -> String {
    let mut escaped = String::new();
    let mut rest = text;
    while let Some(open) = rest.find('(') {
        let digits = |c: char| c.is_ascii_digit();
        let start =
            rest[..open].rfind(|c: char| !c.is_ascii_alphanumeric() && !"-_.".contains(c)).map_or(0, |at| at + 1);
        let section = rest[open + 1..].find(')').map(|length| &rest[open + 1..open + 1 + length]);
        // Before the name there may be a character of more than one byte.
        let start = (start..=open).find(|at| rest.is_char_boundary(*at)).unwrap_or(open);
        match section {
            Some(section) if section.len() == 1 && section.starts_with(digits) && start < open => {
                escaped += &escape(&rest[..start]);
                let _ = write!(escaped, "\\fB{}\\fR({section})", escape(&rest[start..open]));
                rest = &rest[open + 3..];
            }
            _ => {
                escaped += &escape(&rest[..=open]);
                rest = &rest[open + 1..];
            }
        }
    }
    escaped + &escape(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Markdown becomes, without the lines that every page starts with.
    fn roff(text: &str) -> String {
        let mut roff = Roff::new("x", 1, "x");
        roff.markdown(text);
        roff.finish().lines().skip(4).map(|line| format!("{line}\n")).collect()
    }

    #[test]
    fn what_is_pasted_stays_as_it_is() {
        assert_eq!(roff("Call `a -b ~/c '$d'`."), ".PP\nCall \\fBa \\-b \\(ti/c \\(aq$d\\(aq\\fR.\n");
        assert_eq!(roff("    .a \\\n"), ".IP \"\" 4\n.EX\n\\&.a \\e\n.EE\n");
        assert_eq!(roff("2^63, μs"), ".PP\n2\\(ha63, \\[u03BC]s\n");
    }

    #[test]
    fn names_of_pages_are_bold() {
        assert_eq!(roff("See nbdkit(1), é(1) and f(x)."), ".PP\nSee \\fBnbdkit\\fR(1), \\[u00E9](1) and f(x).\n");
    }

    #[test]
    fn further_paragraphs_of_an_item_stay_under_its_first() {
        assert_eq!(
            roff("`a`\n: one\n\n  two\n\n      code\n\n`b`\n: *three*\n\nfour\n"),
            ".TP\n\\fBa\\fR\none\n.RS\n.PP\ntwo\n.IP \"\" 4\n.EX\ncode\n.EE\n.RE\n.TP\n\\fBb\\fR\n\\fIthree\\fR\n.PP\nfour\n"
        );
        assert_eq!(roff("- a\n- b\n\nc"), ".IP \\(bu 2\na\n.IP \\(bu 2\nb\n.PP\nc\n");
    }

    #[test]
    fn headings_are_sections() {
        assert_eq!(roff("# Exit status\n\n## Of it\n"), ".SH \"EXIT STATUS\"\n.SS \"Of it\"\n");
    }
}

//! Texts for people, declared beside what they describe: options, parameters, plugins and filters.
//!
//! A text is one line, and may go on after an empty line, as the message of a commit does. Help, lists and completion show the
//! line alone; the rest is for manual pages, and is written in Markdown.

/// The one line.
pub fn line(text: &str) -> &str {
    text.trim_start().lines().next().unwrap_or_default()
}

/// What follows it, in Markdown; empty where nothing does.
pub fn rest(text: &str) -> &str {
    text.trim_start().split_once('\n').map_or("", |(_, rest)| rest.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_a_line_and_what_follows_it() {
        let text = "one line\n\nand more,\nand more\n";
        assert_eq!((line(text), rest(text)), ("one line", "and more,\nand more"));
        assert_eq!((line("one line"), rest("one line")), ("one line", ""));
        assert_eq!((line(""), rest("")), ("", ""));
    }
}

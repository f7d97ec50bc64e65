//! Texts for people, declared beside what they describe: options, parameters, plugins and filters.
//!
//! A text is one line, and may go on after an empty line, as the message of a commit does. Help, lists and completion show the
//! line alone; the rest is for manual pages, and is written in Markdown.

/// The one line.
pub fn line(text: &str) -> &str {
    text.trim_start().lines().next().unwrap_or_default()
}

/// What follows it, in Markdown; empty where nothing does. The indentation that all its lines have is the declaration's, and
/// is taken away.
pub fn rest(text: &str) -> String {
    let rest = text.trim_start().split_once('\n').map_or("", |(_, rest)| rest);
    let depth = |line: &str| line.len() - line.trim_start_matches(' ').len();
    let indent = rest.lines().filter(|line| !line.trim().is_empty()).map(depth).min().unwrap_or(0);
    let lines: Vec<_> = rest.lines().map(|line| line.get(indent..).unwrap_or("").trim_end()).collect();
    lines.join("\n").trim_matches('\n').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_a_line_and_what_follows_it() {
        let text = "one line

            and more,
            and more:

                code
            ";
        assert_eq!((line(text), rest(text)), ("one line", "and more,\nand more:\n\n    code".to_owned()));
        assert_eq!((line("one line"), rest("one line")), ("one line", String::new()));
        assert_eq!((line(""), rest("")), ("", String::new()));
    }
}

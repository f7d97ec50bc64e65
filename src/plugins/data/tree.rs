//! What `-D data.AST=1` shows: the description as nbdkit sees it once it has made it simpler. Nothing is made of this tree;
//! content is made of the expressions as they were written.
//! Source: nbdkit plugins/data/format.c `optimize_ast`, `debug_expr`.

use std::fmt::{Arguments, Write};

use super::parse::Expression;

/// The longest text that a repetition is written out to, in bytes.
const LONGEST: u64 = 4096;
/// How much text is made of repetitions in all, in bytes. What is more stays a repetition.
const LIMIT: usize = 16 << 20;

/// An expression that was made simpler.
#[derive(Debug, PartialEq, Eq)]
enum Tree<'a> {
    Nothing,
    Byte(u8),
    Text(Vec<u8>),
    /// A byte, so many times.
    Fill(u8, u64),
    Offset(u64),
    Move(i64),
    Align(u64),
    File(&'a [u8]),
    Script(&'a [u8]),
    Name(&'a [u8]),
    Assign(&'a [u8], Box<Tree<'a>>),
    Repeat(Box<Tree<'a>>, u64),
    Slice(Box<Tree<'a>>, i64, i64),
    List(Vec<Tree<'a>>),
}

/// Shows a description, a line at a time.
pub fn show(root: &Expression, mut line: impl FnMut(Arguments<'_>)) {
    let tree = Simplifier { made: 0 }.simplify(root);
    line(format_args!("BEGIN AST (-D data.AST=1)"));
    tree.show(0, &mut line);
    line(format_args!("END AST"));
}

struct Simplifier {
    /// Text that was made of repetitions, in bytes.
    made: usize,
}

impl Simplifier {
    /// Expressions are no deeper than the parser lets them be.
    fn simplify<'a>(&mut self, expression: &'a Expression) -> Tree<'a> {
        match expression {
            Expression::Byte(byte) => Tree::Byte(*byte),
            Expression::Text(text) => match text.first() {
                None => Tree::Nothing,
                Some(byte) if text.len() > 1 && text.iter().all(|other| other == byte) => {
                    Tree::Fill(*byte, text.len() as u64)
                }
                Some(_) => Tree::Text(text.clone()),
            },
            Expression::Offset(to) => Tree::Offset(*to),
            Expression::Move(by) => Tree::Move(*by),
            Expression::Align(to) => Tree::Align(*to),
            Expression::File(name) => Tree::File(name),
            Expression::Script(script) => Tree::Script(script),
            Expression::Name(name) => Tree::Name(name),
            Expression::Assign(name, inner) => Tree::Assign(name, Box::new(self.simplify(inner))),
            Expression::Repeat(inner, count) => self.repeat(inner, *count),
            Expression::Slice(_, start, end) if start == end => Tree::Nothing,
            Expression::Slice(inner, start, end) => slice(self.simplify(inner), *start, *end),
            Expression::List(list) => self.list(list.iter().map(|expression| &**expression)),
        }
    }

    fn repeat<'a>(&mut self, inner: &'a Expression, count: u64) -> Tree<'a> {
        if count == 0 {
            return Tree::Nothing;
        }
        let inner = self.simplify(inner);
        match (&inner, inner.single_byte()) {
            (Tree::Nothing, _) => inner,
            _ if count == 1 => inner,
            (Tree::Repeat(_, times) | Tree::Fill(_, times), _) if times.checked_mul(count).is_none() => {
                Tree::Repeat(Box::new(inner), count)
            }
            (Tree::Fill(byte, times), _) => Tree::Fill(*byte, times * count),
            (Tree::Text(text), _) if self.may_make((text.len() as u64).saturating_mul(count)) => {
                Tree::Text(text.repeat(count as usize))
            }
            (_, Some(byte)) => Tree::Fill(byte, count),
            (Tree::Repeat(..), None) => match inner {
                Tree::Repeat(once, times) => Tree::Repeat(once, times * count),
                other => other,
            },
            _ => Tree::Repeat(Box::new(inner), count),
        }
    }

    fn may_make(&mut self, length: u64) -> bool {
        let may = length <= LONGEST && self.made + length as usize <= LIMIT;
        self.made += if may { length as usize } else { 0 };
        may
    }

    fn list<'a>(&mut self, expressions: impl Iterator<Item = &'a Expression>) -> Tree<'a> {
        let mut flat = Vec::new();
        for expression in expressions {
            match self.simplify(expression) {
                Tree::Nothing => {}
                // Whose offsets and names are no longer its own.
                Tree::List(inner) if inner.iter().all(Tree::may_be_inlined) => flat.extend(inner),
                tree => flat.push(tree),
            }
        }
        let mut list: Vec<Tree<'a>> = Vec::new();
        for tree in flat {
            if !list.last_mut().is_some_and(|last| last.joins(&tree)) {
                list.push(tree);
            }
        }
        match list.len() {
            0 => Tree::Nothing,
            1 if list[0].may_be_inlined() => list.remove(0),
            _ => Tree::List(list),
        }
    }
}

/// A part, without what is known not to be in it. One that makes no sense stays, and is an error when content is made of it.
fn slice(inner: Tree<'_>, start: i64, end: i64) -> Tree<'_> {
    // Where it starts is a number without a sign in nbdkit, and where it ends is one with a sign.
    let from = start as u64;
    let part = |length: u64| match end {
        -1 if from <= length => Some((from, length)),
        0.. if from <= end as u64 && end as u64 <= length => Some((from, end as u64)),
        _ => None,
    };
    let is_all = from == 0 && end == -1;
    match &inner {
        Tree::Nothing if end == 0 || is_all => return Tree::Nothing,
        Tree::Byte(byte) if end == 1 || is_all => return Tree::Byte(*byte),
        Tree::Text(text) => {
            if let Some((from, to)) = part(text.len() as u64) {
                let text = &text[from as usize..to as usize];
                return if let [byte] = text { Tree::Byte(*byte) } else { Tree::Text(text.to_vec()) };
            }
        }
        Tree::Fill(byte, count) => {
            if let Some((from, to)) = part(*count) {
                return if to - from == 1 { Tree::Byte(*byte) } else { Tree::Fill(*byte, to - from) };
            }
        }
        _ => {}
    }
    Tree::Slice(Box::new(inner), start, end)
}

impl Tree<'_> {
    /// Whether it means the same in the list around its own.
    fn may_be_inlined(&self) -> bool {
        use Tree::{Align, Assign, Move, Name, Offset};
        !matches!(self, Assign(..) | Name(_) | Offset(_) | Move(_) | Align(_))
    }

    /// The byte that is all there is of it.
    fn single_byte(&self) -> Option<u8> {
        match self {
            Tree::Byte(byte) | Tree::Fill(byte, 1) => Some(*byte),
            Tree::Text(text) if text.len() == 1 => text.first().copied(),
            Tree::List(list) if list.len() == 1 => list[0].single_byte(),
            Tree::Repeat(inner, 1) => inner.single_byte(),
            _ => None,
        }
    }

    /// Becomes both, one behind the other, if one expression can say so.
    fn joins(&mut self, next: &Tree<'_>) -> bool {
        match (&mut *self, next) {
            (Tree::Byte(byte), Tree::Byte(other)) if byte == other => *self = Tree::Fill(*byte, 2),
            (Tree::Byte(byte), Tree::Byte(other)) => *self = Tree::Text(vec![*byte, *other]),
            (Tree::Byte(byte), Tree::Text(text)) => *self = Tree::Text([&[*byte], &text[..]].concat()),
            (Tree::Byte(byte), Tree::Fill(other, count)) if byte == other => {
                *self = Tree::Fill(*byte, count.saturating_add(1));
            }
            (Tree::Text(text), Tree::Byte(byte)) => text.push(*byte),
            (Tree::Text(text), Tree::Text(other)) => text.extend(other),
            (Tree::Fill(byte, count), Tree::Byte(other)) if byte == other => *count = count.saturating_add(1),
            (Tree::Fill(byte, count), Tree::Fill(other, more)) if byte == other => *count = count.saturating_add(*more),
            _ => return false,
        }
        true
    }

    fn show(&self, level: usize, line: &mut dyn FnMut(Arguments<'_>)) {
        let indent = 4 * level.min(10);
        let mut say = |what: Arguments<'_>| line(format_args!("{:indent$}{what}", ""));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (inner, end) = match self {
            Tree::Nothing => return say(format_args!("null")),
            Tree::Byte(byte) => return say(format_args!("{byte}")),
            Tree::Text(text) => return say(format_args!("\"{}\"", printable(text))),
            Tree::Fill(byte, count) => return say(format_args!("fill({byte}*{count})")),
            Tree::Offset(to) => return say(format_args!("@{to}")),
            Tree::Move(by) => return say(format_args!("@{by}")),
            Tree::Align(to) => return say(format_args!("@^{to}")),
            Tree::File(name) => return say(format_args!("<{}", text(name))),
            Tree::Script(script) => return say(format_args!("<({})", text(script))),
            Tree::Name(name) => return say(format_args!("\\{}", text(name))),
            Tree::Assign(name, inner) => (std::slice::from_ref(&**inner), format!(") -> \\{}", text(name))),
            Tree::Repeat(inner, count) => (std::slice::from_ref(&**inner), format!(") *{count}")),
            Tree::Slice(inner, start, end) => {
                (std::slice::from_ref(&**inner), format!(")[{}:{end}]", start.cast_unsigned()))
            }
            Tree::List(list) => (&list[..], ")".to_owned()),
        };
        say(format_args!("("));
        inner.iter().for_each(|tree| tree.show(level + 1, line));
        line(format_args!("{:indent$}{end}", ""));
    }
}

fn printable(text: &[u8]) -> String {
    text.iter().fold(String::new(), |mut shown, byte| {
        if *byte == b' ' || byte.is_ascii_graphic() {
            shown.push(char::from(*byte));
        } else {
            // Into a string nothing is written in vain.
            let _ = write!(shown, "\\x{byte:02x}");
        }
        shown
    })
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    /// What lies between the first line and the last, all in one.
    fn shown(data: &str) -> String {
        let mut lines = Vec::new();
        show(&parse(data.as_bytes(), &|_| None).unwrap(), |line| lines.push(line.to_string()));
        assert_eq!([&*lines[0], &*lines[lines.len() - 1]], ["BEGIN AST (-D data.AST=1)", "END AST"]);
        lines[1..lines.len() - 1].join("\n")
    }

    #[test]
    fn lines_are_indented_up_to_ten_levels() {
        assert_eq!(
            shown(r"(1 @2 <f[3:]) -> \x \x*2"),
            r"(
    (
        (
            1
            @2
            (
                <f
            )[3:-1]
        )
    ) -> \x
    (
        \x
    ) *2
)"
        );
        let deep = shown(&format!("{}@1 1{}", "(2 @3 ".repeat(12), ")".repeat(12)));
        assert_eq!(deep.lines().map(|line| line.len() - line.trim_start().len()).max(), Some(40));
    }

    /// As 1.45 makes it simpler; what it has in common with 1.32 is compared with that.
    #[test]
    fn what_can_be_said_in_one_is() {
        for (data, tree) in [
            ("", "null"),
            ("()*7 (\"\")[0:]", "null"),
            ("7", "7"),
            ("7 7 7*5", "fill(7*7)"),
            ("\"aaa\" 97", "fill(97*4)"),
            ("\"ab\"*2048", &format!("\"{}\"", "ab".repeat(2048))),
            ("\"ab\"*2049", "(\n    \"ab\"\n) *2049"),
            ("\"a\"*5 \"b\"", "\"aaaaab\""),
            ("\"a\"*4097", "fill(97*4097)"),
            ("(<f)*3*5", "(\n    <f\n) *15"),
            ("(<f*9223372036854775807)*9", "(\n    (\n        <f\n    ) *9223372036854775807\n) *9"),
            ("\"hello\"[1:3] 7*100[90:]", "(\n    \"el\"\n    fill(7*10)\n)"),
            ("\"hello\"[1:2]", "101"),
            ("\"hello\"[5:]", "\"\""),
            ("\"hello\"[2:9]", "(\n    \"hello\"\n)[2:9]"),
            ("\"x\\x00\\xff\\\"\"", "\"x\\x00\\xff\"\""),
            ("@+4 @-2 @^8", "(\n    @4\n    @-2\n    @^8\n)"),
            ("<(echo (x))", "<(echo (x))"),
        ] {
            assert_eq!(shown(data), tree, "{data}");
        }
    }

    #[test]
    fn repetitions_are_not_written_out_without_end() {
        let many = format!("({} @0)", "\"ab\"*2048 @0 ".repeat(5000));
        assert_eq!(shown(&many).matches("\n    ) *2048").count(), 5000 - LIMIT / 4096);
    }
}

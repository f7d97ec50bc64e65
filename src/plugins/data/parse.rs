//! The language: text to expressions. Source: nbdkit plugins/data/format.c `parser`.

use std::rc::Rc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::values;

/// How deep expressions may be in each other, variables among them.
const MAX_DEPTH: usize = 200;
/// The most expressions that there may be, also by variables that stand for each other.
const MAX_EXPRESSIONS: usize = 1 << 20;

/// An expression.
#[derive(Debug)]
pub enum Expression {
    /// A byte.
    Byte(u8),
    /// `"TEXT"`, and numbers of several bytes.
    Text(Vec<u8>),
    /// `@OFFSET`
    Offset(u64),
    /// `@+N` and `@-N`
    Move(i64),
    /// `@^ALIGNMENT`, a power of two.
    Align(u64),
    /// `<FILE`
    File(Vec<u8>),
    /// `<(SCRIPT)`
    Script(Vec<u8>),
    /// `\NAME`
    Name(Vec<u8>),
    /// `... -> \NAME`
    Assign(Vec<u8>, Rc<Expression>),
    /// `... * N`
    Repeat(Rc<Expression>, u64),
    /// `...[N:M]`; without M it is -1.
    Slice(Rc<Expression>, i64, i64),
    /// `( ... )`, and the whole.
    List(Vec<Rc<Expression>>),
}

impl Expression {
    /// Whether it stands for data, and not for a move.
    fn is_data(&self) -> bool {
        !matches!(self, Expression::Offset(_) | Expression::Move(_) | Expression::Align(_))
    }
}

/// Reads a description. `lookup` knows `$variables`. Errors: a line for people.
pub fn parse(text: &[u8], lookup: &dyn Fn(&str) -> Option<Vec<u8>>) -> Result<Expression, String> {
    let mut count = 0;
    let mut parser = Parser { text, at: 0, lookup, count: &mut count };
    parser.list(0, 0).map(|(list, _)| list)
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
    lookup: &'a dyn Fn(&str) -> Option<Vec<u8>>,
    count: &'a mut usize,
}

/// What C's `isspace` takes for white space.
fn is_space(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == 0xb
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn rest(&self) -> &'a [u8] {
        &self.text[self.at..]
    }

    /// Takes as many bytes as are so.
    fn take(&mut self, is_so: impl Fn(u8) -> bool) -> &'a [u8] {
        let rest = self.rest();
        let length = rest.iter().position(|byte| !is_so(*byte)).unwrap_or(rest.len());
        self.at += length;
        &rest[..length]
    }

    fn error<T>(&self) -> Result<T, String> {
        Err(format!("data parameter: parsing error at offset {}", self.at))
    }

    /// A number as C's `%i` takes it, with white space and a sign before it. `None`: there is none.
    fn number(&mut self) -> Option<i64> {
        let start = self.at;
        self.take(is_space);
        let negative = self.peek() == Some(b'-');
        if let Some(b'-' | b'+') = self.peek() {
            self.at += 1;
        }
        let is_hexadecimal = matches!(self.rest(), [b'0', b'x' | b'X', digit, ..] if digit.is_ascii_hexdigit());
        let base = match self.peek() {
            _ if is_hexadecimal => 16,
            Some(b'0') => 8,
            _ => 10,
        };
        self.at += if is_hexadecimal { 2 } else { 0 };
        let digits = self.take(|byte| char::from(byte).is_digit(base));
        if digits.is_empty() {
            self.at = start;
            return None;
        }
        let digit = |byte: &u8| i64::from(char::from(*byte).to_digit(base).unwrap_or(0));
        let magnitude =
            digits.iter().fold(0_i64, |sum, byte| sum.saturating_mul(base.into()).saturating_add(digit(byte)));
        Some(if negative { -magnitude } else { magnitude })
    }

    /// Expressions up to the end, or to the `)` of this level; and how deep they are.
    fn list(&mut self, level: usize, depth: usize) -> Result<(Expression, usize), String> {
        if depth > MAX_DEPTH {
            return Err(format!("data parameter: more than {MAX_DEPTH} levels of nesting"));
        }
        // Each with how deep it is.
        let mut list: Vec<(Rc<Expression>, usize)> = Vec::new();
        while let Some(byte) = self.peek() {
            let (expression, deep) = match byte {
                b'#' => {
                    self.take(|byte| byte != b'\n');
                    continue;
                }
                byte if is_space(byte) => {
                    self.at += 1;
                    continue;
                }
                b'@' => (self.offset()?, 0),
                b'(' => {
                    self.at += 1;
                    self.list(level + 1, depth + 1)?
                }
                b')' if level == 0 => return Err("unmatched ')' in data string".to_owned()),
                b')' => {
                    self.at += 1;
                    return self.complete(list);
                }
                b'*' => {
                    self.at += 1;
                    let (inner, deep) = last(&mut list, "*N")?;
                    let count = self.number().ok_or_else(|| "*N not numeric".to_owned())?;
                    let count =
                        u64::try_from(count).map_err(|_| "data parameter @OFFSET must not be negative".to_owned())?;
                    (Expression::Repeat(inner, count), deep)
                }
                b'[' => {
                    self.at += 1;
                    let (inner, deep) = last(&mut list, "[N:M]")?;
                    let (start, end) = self.slice()?;
                    (Expression::Slice(inner, start, end), deep)
                }
                b'<' => (self.file()?, 0),
                b'"' => {
                    self.at += 1;
                    (Expression::Text(self.string()?), 0)
                }
                b'\\' => (Expression::Name(self.name()?), 0),
                b'-' => {
                    self.at += 1;
                    if self.peek() != Some(b'>') {
                        return self.error();
                    }
                    self.at += 1;
                    let (inner, deep) = last(&mut list, "->")?;
                    (Expression::Assign(self.name()?, inner), deep)
                }
                b'$' => self.variable(depth)?,
                b'0'..=b'9' => match self.number().and_then(|number| u8::try_from(number).ok()) {
                    Some(byte) => (Expression::Byte(byte), 0),
                    None => return Err("data parameter BYTE must be in the range 0..255".to_owned()),
                },
                b'l' | b'b' => (Expression::Text(self.word()?), 0),
                _ => return self.error(),
            };
            if depth + deep + 1 > MAX_DEPTH {
                return Err(format!("data parameter: more than {MAX_DEPTH} levels of nesting"));
            }
            self.push(&mut list, expression, deep + 1)?;
        }
        if level > 0 {
            return Err("unmatched '(' in data string".to_owned());
        }
        self.complete(list)
    }

    fn push(
        &mut self,
        list: &mut Vec<(Rc<Expression>, usize)>,
        expression: Expression,
        deep: usize,
    ) -> Result<(), String> {
        *self.count += 1;
        if *self.count > MAX_EXPRESSIONS {
            return Err(format!("data parameter: more than {MAX_EXPRESSIONS} expressions"));
        }
        list.push((Rc::new(expression), deep));
        Ok(())
    }

    fn complete(&self, list: Vec<(Rc<Expression>, usize)>) -> Result<(Expression, usize), String> {
        let deep = list.iter().map(|(_, deep)| *deep).max().unwrap_or(0);
        Ok((Expression::List(list.into_iter().map(|(expression, _)| expression).collect()), deep))
    }

    fn offset(&mut self) -> Result<Expression, String> {
        self.at += 1;
        let sign = self.peek().filter(|byte| matches!(byte, b'+' | b'-' | b'^'));
        self.at += usize::from(sign.is_some());
        let number = match self.peek() {
            Some(b'0') => self.number().unwrap_or(0),
            Some(b'1'..=b'9') => {
                let start = self.at;
                let digits = self.take(|byte| byte.is_ascii_digit()).len();
                let suffix = self.take(|byte| byte.is_ascii_alphabetic()).len().min(1);
                // White space, the end of a list or the end must follow, so `1kb` is an error.
                let end = start + digits + suffix;
                if self.text.get(end).is_some_and(|byte| !is_space(*byte) && *byte != b')') {
                    self.at = end;
                    return self.error();
                }
                self.at = end;
                let text = String::from_utf8_lossy(&self.text[start..end]);
                values::size(&text)? as i64
            }
            _ => return self.error(),
        };
        Ok(match sign {
            Some(b'+') => Expression::Move(number),
            Some(b'-') => Expression::Move(-number),
            Some(_) if number <= 0 || !(number as u64).is_power_of_two() => {
                return Err(format!("data parameter @^{number} must be a power of 2"));
            }
            Some(_) => Expression::Align(number as u64),
            None => Expression::Offset(number as u64),
        })
    }

    fn slice(&mut self) -> Result<(i64, i64), String> {
        let not_numeric = || "enclosed pattern (...)[N:M] not numeric".to_owned();
        let start = self.number();
        if self.peek() != Some(b':') {
            return Err(not_numeric());
        }
        self.at += 1;
        let end = self.number();
        if self.peek() != Some(b']') {
            return Err(not_numeric());
        }
        self.at += 1;
        Ok((start.unwrap_or(0), end.unwrap_or(-1)))
    }

    fn file(&mut self) -> Result<Expression, String> {
        self.at += 1;
        if self.peek() != Some(b'(') {
            let name = self.take(|byte| !b"*[) \t\n".contains(&byte));
            if name.is_empty() {
                return Err("data parameter <FILE not a filename".to_owned());
            }
            return Ok(Expression::File(name.to_vec()));
        }
        self.at += 1;
        let rest = self.rest();
        let mut level = 0;
        for (length, byte) in rest.iter().enumerate() {
            match byte {
                b'(' => level += 1,
                b')' if level > 0 => level -= 1,
                b')' if length > 0 => {
                    self.at += length + 1;
                    return Ok(Expression::Script(rest[..length].to_vec()));
                }
                b')' => break,
                _ => {}
            }
        }
        self.error()
    }

    /// Behind the first quote.
    fn string(&mut self) -> Result<Vec<u8>, String> {
        let mut string = Vec::new();
        let unterminated = || "data parameter: unterminated string".to_owned();
        let mut next = || {
            let byte = self.peek().ok_or_else(unterminated)?;
            self.at += 1;
            Ok::<u8, String>(byte)
        };
        loop {
            let byte = match next()? {
                b'"' => return Ok(string),
                b'\\' => match next()? {
                    b'a' => 7,
                    b'b' => 8,
                    b'f' => 0xc,
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'v' => 0xb,
                    b'x' => {
                        let digits = [next()?, next()?].map(|digit| char::from(digit).to_digit(16));
                        let [Some(high), Some(low)] = digits else {
                            return Err("data: \\xNN must be followed by exactly two hexadecimal characters".to_owned());
                        };
                        (high * 16 + low) as u8
                    }
                    b'0'..=b'9' | b'u' => {
                        return Err("data: string numeric and unicode sequences are not yet implemented".to_owned());
                    }
                    other => other,
                },
                other => other,
            };
            string.push(byte);
        }
    }

    fn name(&mut self) -> Result<Vec<u8>, String> {
        self.take(is_space);
        if self.peek() == Some(b'\\') {
            self.at += 1;
            let name = self.take(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
            if !name.is_empty() {
                return Ok(name.to_vec());
            }
        }
        self.error()
    }

    /// What a variable stands for, as a list of its own, and how deep that is.
    fn variable(&mut self, depth: usize) -> Result<(Expression, usize), String> {
        self.at += 1;
        if !self.peek().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_') {
            return self.error();
        }
        let name = self.take(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let name = String::from_utf8_lossy(name);
        let text = (self.lookup)(&name).ok_or_else(|| format!("${name}: variable not found"))?;
        let mut inner = Parser { text: &text, at: 0, lookup: self.lookup, count: &mut *self.count };
        inner.list(0, depth + 1)
    }

    /// `le16:` and the like, up to white space; or `base64:`, up to what is none. The latter is newer than nbdkit 1.45.
    fn word(&mut self) -> Result<Vec<u8>, String> {
        const BASE64: &[u8] = b"base64:";
        if self.rest().starts_with(BASE64) {
            self.at += BASE64.len();
            let coded = self.take(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte));
            return STANDARD.decode(coded).map_err(|error| format!("data: base64: {error}"));
        }
        let word = self.take(|byte| !is_space(byte));
        let unexpected =
            || format!("data parameter: expected \"le16/32/64:\" or \"be16/32/64:\" at offset {}", self.at);
        let (kind, number) = word.split_at_checked(5).ok_or_else(unexpected)?;
        let bytes = match kind {
            b"le16:" | b"be16:" => 2,
            b"le32:" | b"be32:" => 4,
            b"le64:" | b"be64:" => 8,
            _ => return Err(unexpected()),
        };
        let text = String::from_utf8_lossy(number);
        let number = values::u64("data", &text)?;
        if bytes < 8 && number >> (8 * bytes) > 0 {
            return Err(format!("data: could not parse number: \"{text}\": Numerical result out of range"));
        }
        Ok(match kind[0] {
            b'l' => number.to_le_bytes()[..bytes].to_vec(),
            _ => number.to_be_bytes()[8 - bytes..].to_vec(),
        })
    }
}

/// Takes what an operator is applied to.
fn last(list: &mut Vec<(Rc<Expression>, usize)>, operator: &str) -> Result<(Rc<Expression>, usize), String> {
    match list.pop() {
        None => Err(format!("{operator} must follow an expression")),
        Some((expression, _)) if !expression.is_data() => {
            Err(format!("{operator} cannot be applied to this type of expression"))
        }
        Some(found) => Ok(found),
    }
}

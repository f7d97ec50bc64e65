//! Expressions to content. Source: nbdkit plugins/data/format.c `evaluate`.

use std::cell::OnceCell;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;

use nix::sys::wait::WaitStatus;

use super::LIMIT;
use super::content::{Content, advance};
use super::parse::Expression;
use crate::kept::{self, Phase, Program};

/// How deep names may stand for each other.
const MAX_DEPTH: usize = 400;
/// How much may be done before a description is refused: lists, and names that are passed by in search of another.
const MAX_STEPS: u64 = 100_000_000;

/// The content that a description stands for. Errors: a line for people.
pub fn evaluate(root: &Expression) -> Result<Content, String> {
    let mut evaluator = Evaluator { bindings: Vec::new(), steps: 0, memory: 0 };
    evaluator.evaluate(root, None, 0)
}

/// A name that was given. What it stands for is found out when it is used, with the names that there were before it.
struct Binding<'a> {
    before: Option<usize>,
    name: &'a [u8],
    expression: &'a Expression,
    content: OnceCell<Rc<Content>>,
}

struct Evaluator<'a> {
    /// All there ever were, so that scopes are numbers.
    bindings: Vec<Binding<'a>>,
    steps: u64,
    /// Bytes that were read.
    memory: u64,
}

/// What is kept of a sequence.
struct Slice {
    skip: u64,
    length: Option<u64>,
}

impl<'a> Evaluator<'a> {
    fn step(&mut self, count: u64) -> Result<(), String> {
        self.steps += count;
        if self.steps > MAX_STEPS { Err("data parameter: this takes too long".to_owned()) } else { Ok(()) }
    }

    fn evaluate(&mut self, root: &'a Expression, scope: Option<usize>, depth: usize) -> Result<Content, String> {
        if depth > MAX_DEPTH {
            return Err(format!("data parameter: more than {MAX_DEPTH} levels of nesting"));
        }
        let mut content = Content::default();
        let (mut offset, mut scope) = (0, scope);
        match root {
            Expression::List(list) => {
                for expression in list {
                    self.one(expression, &mut content, &mut offset, &mut scope, depth)?;
                }
            }
            expression => self.one(expression, &mut content, &mut offset, &mut scope, depth)?,
        }
        Ok(content)
    }

    /// Does one expression of a list.
    fn one(
        &mut self,
        expression: &'a Expression,
        content: &mut Content,
        offset: &mut u64,
        scope: &mut Option<usize>,
        depth: usize,
    ) -> Result<(), String> {
        self.step(1)?;
        let put = |content: &mut Content, offset: &mut u64, other: &Content| {
            *offset = content.put(*offset, other, 0..other.size())?;
            Ok(())
        };
        match expression {
            Expression::Byte(byte) => return put(content, offset, &Content::bytes(vec![*byte])),
            Expression::Text(text) => return put(content, offset, &Content::bytes(text.clone())),
            Expression::Offset(to) => *offset = *to,
            Expression::Move(by) if *by < 0 && by.unsigned_abs() > *offset => {
                return Err(format!(
                    "data parameter @-{} must not be larger than the current offset {offset}",
                    by.unsigned_abs()
                ));
            }
            Expression::Move(by) if *by < 0 => *offset -= by.unsigned_abs(),
            Expression::Move(by) => *offset = advance(*offset, by.unsigned_abs())?,
            Expression::Align(to) => *offset = advance(*offset, offset.next_multiple_of(*to) - *offset)?,
            Expression::File(name) => {
                let bytes = self.file(name, Slice { skip: 0, length: None })?;
                return put(content, offset, &bytes);
            }
            Expression::Script(script) => {
                let bytes = self.script(script, None)?;
                return put(content, offset, &bytes);
            }
            Expression::Assign(name, expression) => {
                let binding = Binding { before: *scope, name, expression, content: OnceCell::new() };
                self.bindings.push(binding);
                *scope = Some(self.bindings.len() - 1);
            }
            Expression::Name(name) => {
                let found = self.named(name, *scope, depth)?;
                return put(content, offset, &found);
            }
            Expression::List(_) => {
                let inner = self.evaluate(expression, *scope, depth + 1)?;
                return put(content, offset, &inner);
            }
            Expression::Repeat(_, 0) => {}
            Expression::Repeat(inner, count) => {
                let once = self.evaluate(inner, *scope, depth + 1)?;
                let all = once.repeated(*count)?;
                return put(content, offset, &all);
            }
            // Whatever it is a part of.
            Expression::Slice(_, start, end) if start == end => {}
            Expression::Slice(inner, start, end) => {
                return self.slice(inner, (*start, *end), content, offset, *scope, depth);
            }
        }
        content.reach(*offset);
        Ok(())
    }

    fn slice(
        &mut self,
        inner: &'a Expression,
        (start, end): (i64, i64),
        content: &mut Content,
        offset: &mut u64,
        scope: Option<usize>,
        depth: usize,
    ) -> Result<(), String> {
        let wrong = |what: &str| format!("{what}[N:M] does not describe a valid slice");
        let end = u64::try_from(end).ok();
        let start = u64::try_from(start).map_err(|_| wrong(""))?;
        // Of what may have no end, no more than is wanted is read.
        let part = match inner {
            Expression::File(name) => {
                let length = end.map(|end| end.checked_sub(start).ok_or_else(|| wrong("<FILE"))).transpose()?;
                self.file(name, Slice { skip: start, length })?
            }
            Expression::Script(script) if start == 0 => self.script(script, end)?,
            _ => {
                let whole = self.evaluate(inner, scope, depth + 1)?;
                let end = end.unwrap_or(whole.size());
                if start > end || end > whole.size() {
                    return Err(wrong(""));
                }
                *offset = content.put(*offset, &whole, start..end)?;
                return Ok(());
            }
        };
        *offset = content.put(*offset, &part, 0..part.size())?;
        Ok(())
    }

    fn named(&mut self, name: &[u8], scope: Option<usize>, depth: usize) -> Result<Rc<Content>, String> {
        let mut next = scope;
        while let Some(index) = next {
            self.step(1)?;
            let Binding { before, name: given, expression, content } = &self.bindings[index];
            let (before, expression) = (*before, *expression);
            if *given != name {
                next = before;
                continue;
            }
            if let Some(content) = content.get() {
                return Ok(Rc::clone(content));
            }
            // A name is not known in what it stands for, so this ends.
            let content = Rc::new(self.evaluate(expression, before, depth + 1)?);
            return Ok(Rc::clone(self.bindings[index].content.get_or_init(|| content)));
        }
        Err(format!("\\{} not defined", String::from_utf8_lossy(name)))
    }

    /// Content that was read, if it is not too much with all that was read before.
    fn read(&mut self, bytes: Vec<u8>, from: &str) -> Result<Content, String> {
        self.memory += bytes.len() as u64;
        if self.memory > LIMIT {
            return Err(format!("{from}: more than {LIMIT} bytes"));
        }
        Ok(Content::bytes(bytes))
    }

    fn file(&mut self, name: &[u8], slice: Slice) -> Result<Content, String> {
        let path = OsStr::from_bytes(name);
        let shown = path.to_string_lossy();
        let failed = |error: std::io::Error| format!("{shown}: {error}");
        let mut file = File::open(path).map_err(failed)?;
        if slice.skip > 0 {
            file.seek(SeekFrom::Start(slice.skip)).map_err(failed)?;
        }
        let mut bytes = Vec::new();
        // One more, to see that it is too much.
        let most = slice.length.unwrap_or(u64::MAX).min(LIMIT - self.memory + 1);
        file.take(most).read_to_end(&mut bytes).map_err(failed)?;
        self.read(bytes, &shown)
    }

    fn script(&mut self, script: &[u8], length: Option<u64>) -> Result<Content, String> {
        let failed = |error: std::io::Error| format!("<(SCRIPT): {error}");
        let script = CString::new(script).map_err(|error| failed(error.into()))?;
        let words: [&CStr; 3] = [c"sh", c"-c", &script];
        let environment = kept::environment(&[]);
        let program = Program { path: c"/bin/sh", words: &words, environment: &environment };
        let most = length.unwrap_or(u64::MAX).min(LIMIT - self.memory + 1);
        let ran = kept::run(program, &[], usize::try_from(most).unwrap_or(usize::MAX), false, Phase::Starting);
        let ran = ran.map_err(failed)?;
        let content = self.read(ran.output, "<(SCRIPT)")?;
        // One whose output is cut usually fails by that.
        if length.is_none() && !matches!(ran.status, WaitStatus::Exited(_, 0)) {
            return Err("pclose: external command failed".to_owned());
        }
        Ok(content)
    }
}

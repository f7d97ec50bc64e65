//! `data`: a disk in memory that starts with what the command line says, in a little language, in base64 or as it is.
//!
//! | file | what lives in it |
//! |---|---|
//! | `data.rs` | the parameters |
//! | `data/parse.rs` | the language: text to expressions |
//! | `data/tree.rs` | expressions as nbdkit shows them |
//! | `data/evaluate.rs` | expressions to content, with files and scripts |
//! | `data/content.rs` | content: pieces at offsets, and nothing between them |
//!
//! Text, expressions, steps and memory all have a limit, so that no description, however it refers to itself, makes the server
//! grow or run without end. Source: nbdkit plugins/data/data.c, plugins/data/format.c, plugins/data/nbdkit-data-plugin.pod.

mod content;
mod evaluate;
mod parse;
mod tree;

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nbdcaptive_actors::device::{Exports, Same, ThreadModel};

use super::memory::Allocator;
use crate::layer::{About, ConfigError, Flag, Parameter, Plugin, Server, Value};
use crate::values;
use content::Content;

const fn optional(key: &'static str, value: &'static str, help: &'static str) -> Parameter {
    Parameter { key, value, help, required: false }
}

/// See the module.
pub static ABOUT: About = About {
    name: "data",
    summary: "a disk in memory with content from the command line

        For small disks, in tests above all, whose content is to be seen on the command line. Clients may write to
        it; what they write is lost at the end.

        The language of `data=` is a list of bytes, written as numbers, and of what makes more of them:

        `0x55 85 0125`
        : Bytes, in hexadecimal, decimal and octal.

        `\"text\" le32:1 be64:0x10 base64:aGVsbG8=`
        : The bytes of a text; whole numbers of 16, 32 or 64 bits; what is said in base64.

        `@0x1fe`
        : What follows stands at this offset. `@+N`, `@-N` and `@^N` go on, go back, and go on to a multiple of *N*.

        `( ... )*N`, `( ... )[K:N]`
        : The same again *N* times; a part of it.

        `<FILE`, `<(COMMAND)`
        : The content of a file; what a command of the shell prints.

        `\\NAME`, `$NAME`
        : What `( ... ) -> \\NAME` has been given a name to; the parameter *NAME*, or the environment's.

        # Examples

        The smallest disk that looks like one with a boot sector:

            nbdcaptive data '@0x1fe 0x55 0xaa' --run 'nbdinfo --size \"$uri\"'

        A megabyte in which a pattern repeats:

            nbdcaptive data '(0xde 0xad)*524288' --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        optional(
            "data",
            "<DATA>",
            "the content in a little language: '0 1 @0x1fe 0x55 0xaa'. Other parameters are its $variables",
        ),
        optional("base64", "<BASE64>", "the content in base64"),
        optional("raw", "<BINARY>", "the content as it is"),
        optional("size", "<SIZE>", "cut the content, or fill it with zeroes, to this size"),
        optional("allocator", "sparse|malloc[,mlock=true]|zstd", "how memory is taken, as by the memory plugin"),
    ],
    magic_key: Some("data"),
    thread_model: ThreadModel::Parallel,
    dump: &[("data_base64", "yes"), ("mlock", "yes"), ("zstd", "yes")],
};

/// The most memory that content may take, in bytes.
const LIMIT: u64 = 1 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Raw,
    Base64,
    Data,
}

/// The plugin.
#[derive(Debug, Default)]
pub struct Data {
    given: Option<(Form, Vec<u8>)>,
    size: Option<u64>,
    allocator: Allocator,
    variables: Vec<(String, Vec<u8>)>,
    server: Option<Server>,
    /// `-D data.AST=1`: shows what a description was understood as.
    debug_ast: i32,
}

impl Plugin for Data {
    fn callbacks(&self) -> &'static str {
        "unload dump_plugin config config_complete config_help get_ready open get_size block_size \
         can_fast_zero can_fua can_multi_conn can_cache pread pwrite flush trim zero extents"
    }

    fn meet(&mut self, server: &Server) {
        self.server = Some(server.clone());
    }

    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        vec![("AST", &mut self.debug_ast)]
    }

    fn takes_other_keys(&self) -> bool {
        true
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        let form = match key {
            "size" => {
                self.size = Some(values::size(value.text(key)?).map_err(ConfigError)?);
                return Ok(());
            }
            "allocator" => {
                self.allocator = Allocator::parse(value.text(key)?)?;
                return Ok(());
            }
            "raw" => Form::Raw,
            "base64" => Form::Base64,
            "data" => Form::Data,
            _ => {
                self.variables.push((key.to_owned(), value.bytes().to_vec()));
                return Ok(());
            }
        };
        if self.given.is_some() {
            return Err(ConfigError("raw|base64|data parameter must be specified exactly once".to_owned()));
        }
        self.given = Some((form, value.bytes().to_vec()));
        Ok(())
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        match &self.given {
            None => Err(ConfigError("raw|base64|data parameter was not specified".to_owned())),
            Some((form, _)) if *form != Form::Data && !self.variables.is_empty() => {
                Err(ConfigError("extra parameters passed and not using data='...'".to_owned()))
            }
            Some(_) => Ok(()),
        }
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        let content = match self.given {
            None => Content::default(),
            Some((Form::Raw, bytes)) => Content::bytes(bytes),
            Some((Form::Base64, text)) => {
                // Line ends are no part of it.
                let text: Vec<u8> = text.into_iter().filter(|byte| !byte.is_ascii_whitespace()).collect();
                Content::bytes(STANDARD.decode(text).map_err(|error| ConfigError(format!("base64: {error}")))?)
            }
            Some((Form::Data, text)) => {
                let lookup = |name: &str| {
                    let given = self.variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
                    given.or_else(|| std::env::var_os(name).map(std::os::unix::ffi::OsStringExt::into_vec))
                };
                let expression = parse::parse(&text, &lookup).map_err(ConfigError)?;
                if let (Some(server), true) = (&self.server, self.debug_ast != 0) {
                    tree::show(&expression, |line| server.debug(line));
                }
                evaluate::evaluate(&expression).map_err(ConfigError)?
            }
        };
        let size = self.size.unwrap_or(content.size());
        let disk = self.allocator.disk(size)?;
        content.write_to(&disk, size).map_err(ConfigError)?;
        Ok(Arc::new(Same::new(disk)))
    }
}

#[cfg(test)]
mod tests;

//! `exportname`: which export names there are, which of them is the default, what is said of them.
//! Source: nbdkit filters/exportname/exportname.c, nbdkit-exportname-filter.pod.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use nbdcaptive_actors::device::{Client, Device, Error, ErrorCode, Export, Exports, MetaContext, Result, ThreadModel};
use nbdcaptive_actors::filter::{FilterExports, FilteredExports};

use super::kit::{optional, unknown};
use crate::captive::quote::shell_quote;
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

const LIST: &str = "keep|error|empty|default-only|explicit";

/// See the module.
pub static ABOUT: About = About {
    name: "exportname",
    summary: "change the names of exports and what is said of them

        For plugins that do not look at export names, and for changing what those that do tell of them: which are
        listed, which one is served to a client that asks for none, and the sentence that is said of each. With
        `exportname-strict` other names than those of `exportname=` are refused.

        # Examples

            nbdcaptive --filter=exportname memory 1M exportname=scratch \\
                exportname-strict=true exportname-list=explicit \\
                exportdesc='fixed:lost at the end' -e scratch \\
                --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[
        optional("default-export", "<NAME>", "what a client gets who asks for no name"),
        optional("default_export", "<NAME>", "another name for default-export"),
        optional("exportname-list", LIST, "which exports are listed; keep"),
        optional("exportname_list", LIST, "another name for exportname-list"),
        optional("exportname-strict", "<BOOL>", "serve explicit exports only; false"),
        optional("exportname_strict", "<BOOL>", "another name for exportname-strict"),
        optional("exportname", "<NAME>", "an explicit export; may be given again"),
        optional("exportdesc", "keep|none|fixed:<TEXT>|script:<SCRIPT>", "what is said of exports; keep"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The longest string of the protocol, in bytes.
const MAX_STRING: usize = 4096;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum List {
    #[default]
    Keep,
    Error,
    Empty,
    Default,
    Explicit,
}

#[derive(Clone, Debug, Default)]
enum Description {
    #[default]
    Keep,
    None,
    Fixed(String),
    Script(Vec<u8>),
}

/// The filter.
#[derive(Debug, Default)]
pub struct ExportName {
    default: Option<Vec<u8>>,
    list: List,
    strict: bool,
    explicit: Vec<Vec<u8>>,
    description: Description,
}

fn name(key: &str, value: Value<'_>) -> std::result::Result<Vec<u8>, ConfigError> {
    if value.bytes().len() > MAX_STRING {
        return Err(ConfigError(format!("{key}: a name has at most {MAX_STRING} bytes")));
    }
    Ok(value.bytes().to_owned())
}

impl Filter for ExportName {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "default-export" | "default_export" => self.default = Some(name(key, value)?),
            "exportname-list" | "exportname_list" => {
                self.list = match value.text(key)? {
                    "keep" => List::Keep,
                    "error" => List::Error,
                    "empty" => List::Empty,
                    "defaultonly" | "default-only" => List::Default,
                    "explicit" => List::Explicit,
                    text => return Err(ConfigError(format!("unrecognized exportname-list mode: {text}"))),
                }
            }
            "exportname-strict" | "exportname_strict" => {
                self.strict = values::boolean(value.text(key)?).map_err(ConfigError)?;
            }
            "exportname" => self.explicit.push(name(key, value)?),
            "exportdesc" => {
                let bytes = value.bytes();
                self.description = if bytes == b"keep" {
                    Description::Keep
                } else if bytes == b"none" {
                    Description::None
                } else if let Some(script) = bytes.strip_prefix(b"script:") {
                    Description::Script(script.to_owned())
                } else if let Some(text) = value.text(key)?.strip_prefix("fixed:") {
                    Description::Fixed(shortened(text.to_owned()))
                } else {
                    return Err(ConfigError(format!("unrecognized exportdesc mode: {}", value.text(key)?)));
                }
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Named { next, rules: *self })))
    }
}

struct Named {
    next: Arc<dyn Exports>,
    rules: ExportName,
}

impl Named {
    /// What is said of the export `name`, of which the next layer says `next`.
    fn describe(&self, client: &Client, name: &[u8], next: impl FnOnce() -> Option<String>) -> Option<String> {
        match &self.rules.description {
            Description::Keep => next(),
            Description::None => None,
            Description::Fixed(text) => Some(text.clone()),
            Description::Script(script) => run(client, name, script),
        }
    }

    /// The client, asking for the name that the empty one stands for. Errors: there is none, or it is not served.
    fn resolve(&self, client: &Client) -> Result<Client> {
        let not_found = |why| Error::failed(ErrorCode::Invalid, why);
        let mut client = client.clone();
        if client.export_name.is_empty() {
            let default = self.default_export(&client)?;
            client.export_name = default.ok_or_else(|| not_found("default export (\"\") not permitted".to_owned()))?;
        }
        if self.rules.strict && !self.rules.explicit.contains(&client.export_name) {
            let name = String::from_utf8_lossy(&client.export_name);
            return Err(not_found(format!("export '{name}' not found")));
        }
        Ok(client)
    }
}

/// What a script prints when `$name` is the export's. What goes wrong is for `-v`: the export is served all the same.
fn run(client: &Client, name: &[u8], script: &[u8]) -> Option<String> {
    let command = [b"export name; name=", &shell_quote(name)[..], b"\n", script, b"\n"].concat();
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(OsString::from_vec(command)).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut output = || -> io::Result<Vec<u8>> {
        let mut child = shell.spawn()?;
        let mut text = Vec::new();
        // What says more than may be said finds its pipe closed.
        let read = child.stdout.take().map_or(Ok(0), |stdout| stdout.take(MAX_STRING as u64).read_to_end(&mut text));
        child.wait()?;
        read.map(|_| text)
    };
    match output() {
        Ok(text) => Some(shortened(String::from_utf8_lossy(text.strip_suffix(b"\n").unwrap_or(&text)).into_owned())),
        Err(error) => {
            client.connection.debug(format_args!("exportdesc: {error}"));
            None
        }
    }
}

/// As much of a text as a string of the protocol may have.
fn shortened(mut text: String) -> String {
    let end = (0..=MAX_STRING.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    text.truncate(end.unwrap_or(0));
    text
}

impl FilterExports for Named {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn list(&self, client: &Client) -> Result<Vec<Export>> {
        let exports = match self.rules.list {
            List::Keep => self.next.list(client)?,
            List::Error => return Err(Error::failed(ErrorCode::NotPermitted, "export list restricted by policy")),
            List::Empty => return Ok(Vec::new()),
            List::Default => {
                let name = self.default_export(client)?;
                return Ok(name.into_iter().map(|name| Export { name, description: String::new() }).collect());
            }
            List::Explicit => {
                let names = self.rules.explicit.iter().cloned();
                names.map(|name| Export { name, description: String::new() }).collect()
            }
        };
        let describe = |Export { name, description }| {
            let next = || Some(description);
            let description = self.describe(client, &name, next).unwrap_or_default();
            Export { name, description }
        };
        Ok(exports.into_iter().map(describe).collect())
    }

    fn default_export(&self, client: &Client) -> Result<Option<Vec<u8>>> {
        if self.rules.strict && !self.rules.explicit.iter().any(Vec::is_empty) {
            return Ok(None);
        }
        match (&self.rules.default, self.rules.strict) {
            // Also the empty name: what follows is then not asked what it would have instead.
            (Some(name), _) => Ok(Some(name.clone())),
            (_, true) => Ok(Some(Vec::new())),
            (_, false) => self.next.default_export(client),
        }
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        self.next.open(&self.resolve(client)?)
    }

    fn meta_contexts(&self, client: &Client) -> Result<Vec<MetaContext>> {
        self.next.meta_contexts(&self.resolve(client)?)
    }

    fn description(&self, client: &Client) -> Option<String> {
        let client = self.resolve(client).ok()?;
        self.describe(&client, &client.export_name, || self.next.description(&client))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{memory, over, refused};

    fn exports(parameters: &[(&str, &str)]) -> Arc<dyn Exports> {
        over(memory("1M"), "exportname", parameters).unwrap()
    }

    fn client(name: &str) -> Client {
        Client { export_name: name.into(), ..Client::default() }
    }

    fn names(parameters: &[(&str, &str)]) -> Vec<String> {
        let list = exports(parameters).list(&Client::default()).unwrap();
        list.into_iter().map(|export| String::from_utf8(export.name).unwrap()).collect()
    }

    #[test]
    fn the_list_is_one_of_five() {
        assert_eq!(names(&[("exportname", "a")]), [""]);
        assert!(names(&[("exportname-list", "empty"), ("exportname", "a")]).is_empty());
        let explicit = [("exportname-list", "explicit"), ("exportname", "a"), ("exportname", "b")];
        assert_eq!(names(&explicit), ["a", "b"]);
        assert_eq!(names(&[("exportname_list", "defaultonly"), ("default-export", "x")]), ["x"]);
        assert_eq!(names(&[("exportname-list", "defaultonly"), ("default-export", "")]), [""]);
        let error = exports(&[("exportname-list", "error")]).list(&Client::default()).unwrap_err();
        assert_eq!(error.to_string(), "export list restricted by policy");
    }

    #[test]
    fn strict_serves_explicit_names_only() {
        let opens = |parameters: &[(&str, &str)], name| exports(parameters).open(&client(name)).is_ok();
        assert!(opens(&[("exportname", "a")], "b"));
        let strict = [("exportname-strict", "true"), ("exportname", "a")];
        assert!(opens(&strict, "a"));
        assert!(!opens(&strict, "b"));
        assert!(!opens(&strict, ""));
        assert_eq!(exports(&strict).default_export(&Client::default()).unwrap(), None);
        let with_default = [strict[0], strict[1], ("exportname", ""), ("default-export", "a")];
        assert!(opens(&with_default, ""));
        assert_eq!(exports(&with_default).default_export(&Client::default()).unwrap(), Some(b"a".to_vec()));
    }

    /// Whatever the plugin's own is.
    #[test]
    fn the_empty_name_may_be_the_default() {
        let next = exports(&[("default-export", "the plugin's")]);
        let over_it = |parameters| over(Arc::clone(&next), "exportname", parameters).unwrap();
        let default = |exports: Arc<dyn Exports>| exports.default_export(&Client::default()).unwrap();
        assert_eq!(default(over_it(&[])), Some(b"the plugin's".to_vec()));
        assert_eq!(default(over_it(&[("default-export", "")])), Some(Vec::new()));
    }

    #[test]
    fn descriptions_are_kept_dropped_fixed_or_made() {
        let describe = |mode, name| exports(&[("exportdesc", mode)]).description(&client(name));
        assert_eq!(describe("keep", ""), None);
        assert_eq!(describe("none", ""), None);
        assert_eq!(describe("fixed:a b", ""), Some("a b".to_owned()));
        assert_eq!(describe("script:echo \"<$name>\"; echo", "a'\"$b"), Some("<a'\"$b>\n".to_owned()));
        assert_eq!(describe("script:head -c 5000 /dev/zero | tr '\\0' x", "").map(|text| text.len()), Some(4096));
        assert_eq!(describe("script:yes '\u{b5}'", "").map(|text| text.len()), Some(4095), "and it ends");
        let bytes = "script:head -c 5000 /dev/zero | tr '\\0' '\\377'";
        assert!(
            describe(bytes, "").is_some_and(|text| (4094..=4096).contains(&text.len())),
            "what is no UTF-8 is longer"
        );
        assert_eq!(refused("exportname", &[("exportdesc", "x")]), "unrecognized exportdesc mode: x");
        assert_eq!(refused("exportname", &[("exportname-list", "x")]), "unrecognized exportname-list mode: x");
    }
}

//! `--probe`: what an NBD server offers, for people or as JSON.
//!
//! # The JSON
//!
//! One object. The keys are nbdinfo's, so that scripts read both; what nbdinfo does not have is marked with *.
//!
//! | key | value |
//! |---|---|
//! | `protocol` | `"oldstyle"`, `"newstyle"` or `"newstyle-fixed"` |
//! | `TLS` | whether TLS is spoken |
//! | `structured`, `extended` | whether structured replies, extended headers were agreed on; at most one is true |
//! | `list` * | what the server lists: objects with `export-name` and `description`; left out where it does not |
//! | `list-error` * | why it does not |
//! | `exports` | one object for each export that was looked at: the URI's, or every one that is listed |
//!
//! Of an export:
//!
//! | key | value |
//! |---|---|
//! | `export-name` | its name; bytes that are no UTF-8 become U+FFFD, and `uri` has them |
//! | `uri` | its URI |
//! | `error` * | why the server does not let it be looked at; then nothing of what follows is there |
//! | `description` | left out where there is none |
//! | `export-size`, `export-size-str` | bytes; the same with a unit, `"16M"` |
//! | `contexts` | names of metadata contexts; left out where the server has no options for them |
//! | `is_rotational`, `is_read_only`, `can_block_status_payload`, `can_cache`, `can_df`, `can_fast_zero`, `can_flush`, `can_fua`, `can_multi_conn`, `can_trim`, `can_zero` | the transmission flags |
//! | `block_size_minimum`, `block_size_preferred`, `block_size_maximum` | bytes; left out where the server does not say |
//!
//! Source: libnbd info/nbdinfo.pod for the names.

use std::future::Future;
use std::time::Duration;

use nbdcaptive_actors::client::{Error, Export, Handshake, Headers, Listed, Protocol};
use nbdcaptive_actors::protocol::constants::*;
use serde_json::{Map, Value, json};
use smol::Timer;
use smol::future::{or, zip};

use crate::cli::Options;
use crate::identity;
use crate::report::{print, to_stderr};
use crate::tls::{Failed, Wanted};
use crate::uri::Uri;

/// How long the server may take for a step (to connect, to greet, to answer an option), unless `--timeout` says otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// The transmission flags under the names that nbdinfo has for them.
const FLAGS: [(&str, u16); 11] = [
    ("is_rotational", NBD_FLAG_ROTATIONAL),
    ("is_read_only", NBD_FLAG_READ_ONLY),
    ("can_block_status_payload", NBD_FLAG_BLOCK_STATUS_PAYLOAD),
    ("can_cache", NBD_FLAG_SEND_CACHE),
    ("can_df", NBD_FLAG_SEND_DF),
    ("can_fast_zero", NBD_FLAG_SEND_FAST_ZERO),
    ("can_flush", NBD_FLAG_SEND_FLUSH),
    ("can_fua", NBD_FLAG_SEND_FUA),
    ("can_multi_conn", NBD_FLAG_CAN_MULTI_CONN),
    ("can_trim", NBD_FLAG_SEND_TRIM),
    ("can_zero", NBD_FLAG_SEND_WRITE_ZEROES),
];

/// Answers `--probe` with the exit status: 0, or 1 with a line that says what failed. What was found is printed anyway.
pub fn run(options: &Options) -> i32 {
    let given = options.probe.clone().unwrap_or_default();
    let shown = readable(given.as_encoded_bytes());
    let found = match given.to_str().map(Uri::parse) {
        None => Err("a URI is ASCII: other bytes are written as %XX".to_owned()),
        Some(Err(why)) => Err(why.to_string()),
        Some(Ok(uri)) => smol::block_on(probe(&uri, options.timeout.unwrap_or(PATIENCE))),
    };
    let failure = match found {
        Ok(found) => {
            let text = if options.json { format!("{:#}\n", found.json()) } else { found.text() };
            print(text.as_bytes()).err().map(|error| format!("stdout: {error}")).or(found.failure())
        }
        Err(why) => Some(why),
    };
    let Some(why) = failure else { return 0 };
    to_stderr(&format!("{}: {shown}: {}\n", identity::name(), readable(why.as_bytes())));
    1
}

/// What was found.
struct Found {
    protocol: Protocol,
    headers: Headers,
    is_secure: bool,
    /// What the server lists, or why it does not; nothing where it cannot be asked.
    list: Option<Result<Vec<Listed>, String>>,
    exports: Vec<Entry>,
}

/// An export that was looked at.
struct Entry {
    name: Vec<u8>,
    uri: String,
    facts: Result<Facts, String>,
}

/// What the server tells of an export.
struct Facts {
    export: Export,
    /// Nothing where it cannot be asked.
    contexts: Option<Vec<Vec<u8>>>,
}

/// Errors: there is nothing to be found, as a line for people.
async fn probe(uri: &Uri, patience: Duration) -> Result<Found, String> {
    let mut handshake = open(uri, patience).await?;
    let (protocol, headers, is_secure) = (handshake.protocol(), handshake.headers(), handshake.is_secure());
    let mut list = None;
    if protocol == Protocol::FixedNewstyle {
        list = match within(patience, "listing exports", handshake.list()).await? {
            Ok(listed) => Some(Ok(listed)),
            Err(Error::Refused(error)) => Some(Err(line(&Error::Refused(error)))),
            Err(error) => return Err(line(&error)),
        };
    }
    let names: Vec<_> = match &list {
        Some(Ok(listed)) if uri.export_name.is_empty() && !listed.is_empty() => {
            listed.iter().map(|export| export.name.clone()).collect()
        }
        _ => vec![uri.export_name.clone()],
    };
    let mut exports = Vec::new();
    let mut connection = Some(handshake);
    for name in names {
        let mut is_new = exports.is_empty();
        let facts = loop {
            let mut handshake = match connection.take() {
                Some(handshake) => handshake,
                None => {
                    is_new = true;
                    open(uri, patience).await?
                }
            };
            match look_at(&mut handshake, &name, patience).await? {
                Ok(facts) => {
                    connection = Some(handshake);
                    break Ok(facts);
                }
                Err(Error::Refused(error)) if error.reply == NBD_REP_ERR_UNSUP => {
                    break choose(handshake, &name, patience).await?;
                }
                Err(Error::Refused(error)) => {
                    connection = Some(handshake);
                    break Err(line(&Error::Refused(error)));
                }
                Err(Error::Impossible { .. }) => break choose(handshake, &name, patience).await?,
                // Servers have had enough after so many options; another connection has new ones.
                Err(Error::Ended(_)) if !is_new => {}
                Err(error) => return Err(line(&error)),
            }
        };
        exports.push(Entry { uri: uri.of_export(&name), name, facts });
    }
    if let Some(handshake) = connection {
        // All that was wanted is here: how the server takes a goodbye is all the same.
        let _ = within(patience, "saying goodbye", handshake.abort()).await;
    }
    Ok(Found { protocol, headers, is_secure, list, exports })
}

/// Connects and agrees on the best that there is.
async fn open(uri: &Uri, patience: Duration) -> Result<Handshake, String> {
    let tls = Wanted::by_uri(uri)?.ready()?;
    let transport = within(patience, "connecting", uri.connect()).await??;
    let begin = within(patience, "waiting for the greeting", tls.begin(transport)).await?;
    let mut handshake = begin.map_err(|error| match error {
        Failed::Client(error) => line(&error),
        Failed::Line(line) => line,
    })?;
    let headers = within(patience, "asking for extended headers", handshake.ask_for_headers(Headers::Extended)).await?;
    headers.map_err(|error| line(&error))?;
    Ok(handshake)
}

/// Asks about an export without choosing it. The inner error is of this export, or of the connection.
async fn look_at(handshake: &mut Handshake, name: &[u8], patience: Duration) -> Result<Result<Facts, Error>, String> {
    let mut contexts = None;
    if handshake.headers() > Headers::Simple {
        match within(patience, "listing contexts", handshake.list_meta_contexts(name, &[])).await? {
            Ok(listed) => contexts = Some(listed.into_iter().map(|context| context.name).collect()),
            Err(Error::Refused(_)) => {}
            Err(error) => return Ok(Err(error)),
        }
    }
    let export = within(patience, "asking about the export", handshake.info(name)).await?;
    Ok(export.map(|export| Facts { export, contexts }))
}

/// Chooses an export, where there is no other way to hear of it, and leaves.
async fn choose(handshake: Handshake, name: &[u8], patience: Duration) -> Result<Result<Facts, String>, String> {
    let agreed = match within(patience, "choosing the export", handshake.go(name)).await? {
        Ok(agreed) => agreed,
        Err(error) => return Ok(Err(line(&error))),
    };
    let export = agreed.export.clone();
    let (requests, connection) = agreed.start();
    // All that was wanted is here: how the server takes a goodbye is all the same.
    let _ = within(patience, "saying goodbye", zip(connection.run(), requests.disconnect())).await;
    Ok(Ok(Facts { export, contexts: None }))
}

/// Errors: it takes too long, as a line for people.
async fn within<T>(patience: Duration, what: &str, work: impl Future<Output = T>) -> Result<T, String> {
    let too_long = async {
        Timer::after(patience).await;
        Err(format!("gave up after {} seconds, {what}", patience.as_secs_f64()))
    };
    or(async { Ok(work.await) }, too_long).await
}

fn line(error: &Error) -> String {
    if error.wants_tls() { format!("{error}: nbds:// does that") } else { error.to_string() }
}

impl Found {
    /// The first export that could not be looked at, in a line.
    fn failure(&self) -> Option<String> {
        let failed = self.exports.iter().find_map(|entry| entry.facts.as_ref().err().map(|why| (entry, why)));
        failed.map(|(entry, why)| format!("export \"{}\": {why}", readable(&entry.name)))
    }

    fn protocol(&self) -> &'static str {
        match self.protocol {
            Protocol::Oldstyle => "oldstyle",
            Protocol::Newstyle => "newstyle",
            Protocol::FixedNewstyle => "newstyle-fixed",
        }
    }

    fn json(&self) -> Value {
        let mut all = Map::new();
        all.insert("protocol".into(), self.protocol().into());
        all.insert("TLS".into(), self.is_secure.into());
        all.insert("structured".into(), (self.headers == Headers::Structured).into());
        all.insert("extended".into(), (self.headers == Headers::Extended).into());
        match &self.list {
            Some(Ok(listed)) => {
                let one = |export: &Listed| {
                    let mut one = Map::new();
                    one.insert("export-name".into(), lossy(&export.name));
                    if !export.description.is_empty() {
                        one.insert("description".into(), lossy(&export.description));
                    }
                    Value::Object(one)
                };
                all.insert("list".into(), listed.iter().map(one).collect());
            }
            Some(Err(why)) => drop(all.insert("list-error".into(), why.as_str().into())),
            None => {}
        }
        all.insert("exports".into(), self.exports.iter().map(Entry::json).collect());
        Value::Object(all)
    }

    fn text(&self) -> String {
        let mut text = format!(
            "protocol: {} {} TLS, using {} packets\n",
            self.protocol(),
            if self.is_secure { "with" } else { "without" },
            self.headers
        );
        match &self.list {
            Some(Ok(listed)) => {
                text += &format!("exports listed: {}\n", listed.len());
                for Listed { name, description } in listed {
                    let colon = if description.is_empty() { "" } else { ": " };
                    text += &format!("\t\"{}\"{colon}{}\n", readable(name), readable(description));
                }
            }
            Some(Err(why)) => text += &format!("exports listed: none: {}\n", readable(why.as_bytes())),
            None => {}
        }
        self.exports.iter().for_each(|entry| entry.write(&mut text));
        text
    }
}

impl Entry {
    fn json(&self) -> Value {
        let mut one = Map::new();
        one.insert("export-name".into(), lossy(&self.name));
        one.insert("uri".into(), self.uri.as_str().into());
        let facts = match &self.facts {
            Ok(facts) => facts,
            Err(why) => {
                one.insert("error".into(), why.as_str().into());
                return Value::Object(one);
            }
        };
        let Export { size, flags, description, block_size, .. } = &facts.export;
        if let Some(description) = description {
            one.insert("description".into(), lossy(description));
        }
        one.insert("export-size".into(), json!(size));
        one.insert("export-size-str".into(), with_unit(*size).into());
        if let Some(contexts) = &facts.contexts {
            one.insert("contexts".into(), contexts.iter().map(|name| lossy(name)).collect());
        }
        for (name, flag) in FLAGS {
            one.insert(name.into(), (flags & flag != 0).into());
        }
        if let Some(size) = block_size {
            one.insert("block_size_minimum".into(), size.minimum.into());
            one.insert("block_size_preferred".into(), size.preferred.into());
            one.insert("block_size_maximum".into(), size.maximum.into());
        }
        Value::Object(one)
    }

    fn write(&self, text: &mut String) {
        *text += &format!("export=\"{}\":\n", readable(&self.name));
        let mut fact = |name: &str, value: &str| *text += &format!("\t{name}: {value}\n");
        fact("uri", &self.uri);
        let facts = match &self.facts {
            Ok(facts) => facts,
            Err(why) => return fact("error", &readable(why.as_bytes())),
        };
        let Export { size, flags, description, block_size, .. } = &facts.export;
        if let Some(description) = description {
            fact("description", &readable(description));
        }
        fact("export-size", &format!("{size} ({})", with_unit(*size)));
        if let Some(contexts) = &facts.contexts {
            let names: Vec<_> = contexts.iter().map(|name| readable(name)).collect();
            fact("contexts", if names.is_empty() { "none".to_owned() } else { names.join(" ") }.as_str());
        }
        for (name, flag) in FLAGS {
            fact(name, if flags & flag != 0 { "yes" } else { "no" });
        }
        if let Some(size) = block_size {
            fact("block_size_minimum", &size.minimum.to_string());
            fact("block_size_preferred", &size.preferred.to_string());
            fact("block_size_maximum", &size.maximum.to_string());
        }
    }
}

/// The text of a server, as JSON has it.
fn lossy(bytes: &[u8]) -> Value {
    String::from_utf8_lossy(bytes).into()
}

/// The text of a server for a terminal: whatever it sends moves no cursor and starts no line.
fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
        shown
    })
}

/// Bytes with the largest unit, of powers of 1024, that leaves a whole number.
fn with_unit(size: u64) -> String {
    const UNITS: [&str; 7] = ["", "K", "M", "G", "T", "P", "E"];
    let power = if size == 0 { 0 } else { (size.trailing_zeros() / 10).min(6) };
    format!("{}{}", size >> (10 * power), UNITS[power as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_has_the_unit_that_leaves_a_whole_number() {
        for (size, text) in [
            (0, "0"),
            (1, "1"),
            (1023, "1023"),
            (1024, "1K"),
            (1536, "1536"),
            (3 << 29, "1536M"),
            (1 << 63, "8E"),
            (u64::MAX, "18446744073709551615"),
        ] {
            assert_eq!(with_unit(size), text);
        }
    }

    #[test]
    fn what_a_server_says_starts_no_line() {
        assert_eq!(readable(b"a\n\x1b[2J\xff\xc3\xaf"), "a\\n\\u{1b}[2J\u{fffd}\u{ef}");
    }
}

//! Text that people and programs write: sizes and other numbers, and URIs.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use nbdcaptive::captive::quote::{shell_quote, uri_quote};
use nbdcaptive::captive::uri::{self as builder, Credentials, Endpoint};
use nbdcaptive::cli::Tls;
use nbdcaptive::uri::{Address, Uri};
use nbdcaptive::values;

/// Sizes, switches, numbers, delays and probabilities: `src/values.rs`.
pub fn size(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let size = values::size(text);
    assert_eq!(size.as_ref().ok().copied(), naive_size(text), "{text:?}: {size:?}");
    if let Ok(size) = size {
        assert!(i64::try_from(size).is_ok());
        assert_eq!(values::size(&size.to_string()), Ok(size), "{text:?}");
    }
    // A size in other words.
    if let Ok(number) = values::size(text)
        && number < 1 << 43
        && text.ends_with(|c: char| c.is_ascii_digit())
    {
        assert_eq!(values::size(&format!("{text}k")), Ok(number * 1024));
        assert_eq!(values::size(&format!("{text}M")), values::size(&format!("{}K", number * 1024)));
        assert_eq!(values::size(&format!("{text}s")), Ok(number * 512));
    }
    let one_line = |error: &str| !error.is_empty() && (error.lines().count() == 1 || text.contains(['\n', '\r']));
    for error in [
        size.err(),
        values::boolean(text).err(),
        values::unsigned("n", text).err(),
        values::u64("n", text).err(),
        values::int("n", text).err(),
        values::delay("n", text).err(),
        values::probability("n", text).err(),
    ] {
        assert!(error.is_none_or(|error| one_line(&error)), "{text:?}");
    }
    // What is a number for one is the same number for the others.
    let wide = values::u64("n", text).ok();
    assert_eq!(values::unsigned("n", text).ok(), wide.and_then(|wide| u32::try_from(wide).ok()), "{text:?}");
    let int = values::int("n", text).ok();
    assert_eq!(
        int.and_then(|int| u64::try_from(int).ok()).filter(|_| wide.is_some()),
        wide.filter(|wide| *wide < 1 << 31)
    );
    if let Ok(delay) = values::delay("n", text) {
        assert!(delay <= Duration::from_secs(u64::from(u32::MAX)));
        if text.parse::<f64>().is_ok() {
            assert_eq!(values::delay("n", &format!("{text}s")), Ok(delay), "{text:?}");
            assert!(values::delay("n", &format!("{text}ms")).is_ok_and(|less| less <= delay), "{text:?}");
        }
    }
    if let Ok(probability) = values::probability("n", text) {
        assert!(probability.is_finite() && probability >= 0.0);
        assert!(text.parse::<f64>().is_err() || text.parse() == Ok(probability), "{text:?}");
    }
}

/// The grammar of a size, said another way.
fn naive_size(text: &str) -> Option<u64> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
    let (sign, text) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    let (digits, scale) = match text.char_indices().next_back()? {
        (at, c) if !c.is_ascii_digit() => {
            let scale = match c.to_ascii_lowercase() {
                'b' => 1,
                's' => 512,
                'k' => 1i128 << 10,
                'm' => 1 << 20,
                'g' => 1 << 30,
                't' => 1 << 40,
                'p' => 1 << 50,
                'e' => 1 << 60,
                _ => return None,
            };
            (&text[..at], scale)
        }
        _ => (text, 1),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = digits.trim_start_matches('0');
    if digits.len() > 30 {
        return None;
    }
    let number: i128 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    let number = sign * number;
    // Before the scale, so that what only the scale makes right is an error.
    u64::try_from(number.checked_mul(scale)?).ok().filter(|size| *size <= i64::MAX as u64)
}

/// URIs: what is built can be taken apart again, and means the same to a shell.
pub fn uri(data: &[u8]) {
    let quoted = uri_quote(data);
    assert!(quoted.iter().all(|byte| byte.is_ascii_alphanumeric() || b".-_~/%".contains(byte)));
    assert_eq!(unquote(&quoted), data);
    if !data.contains(&0) {
        assert_eq!(through_a_shell(&shell_quote(data)), data);
    }
    build(data);
    if let Ok(text) = std::str::from_utf8(data) {
        parse(text);
    }
}

/// Text that may be a URI.
fn parse(text: &str) {
    let uri = match Uri::parse(text) {
        Ok(uri) => uri,
        Err(error) => {
            let error = error.to_string();
            assert!(!error.is_empty() && error.lines().count() == 1, "not one line: {error:?}");
            return;
        }
    };
    assert!(uri.export_name.len() <= 4096 && !uri.export_name.contains(&0));
    for name in [&uri.export_name[..], b"", b"/?#%&=\xff\n"] {
        let other = Uri::parse(&uri.of_export(name)).expect("the URI of an export is one");
        let mut expected = uri.clone();
        expected.export_name = name.to_vec();
        assert_eq!(other, expected, "{text}");
    }
}

/// The first byte chooses the form; the rest is a name, a path and another path.
fn build(data: &[u8]) {
    let Some((form, rest)) = data.split_first() else { return };
    let mut parts = rest.splitn(3, |byte| *byte == 0);
    let mut part = || parts.next().unwrap_or_default();
    let (name, path, credentials) = (part(), part(), part());
    let tls = [Tls::Off, Tls::On, Tls::Require][usize::from(form % 3)];
    let is_unix = form & 4 != 0;
    let endpoint = if is_unix {
        Endpoint::Unix(Path::new(OsStr::from_bytes(path)).to_owned())
    } else {
        // A port is digits or a service's name; with a slash in it, it could not be told from the path.
        Endpoint::Tcp { port: (form & 8 != 0).then(|| String::from_utf8_lossy(path).replace('/', "")) }
    };
    let credentials = Path::new(OsStr::from_bytes(credentials));
    let (certificates, psk) = ((form & 16 != 0).then_some(credentials), (form & 32 != 0).then_some(credentials));
    // A name's bytes are as good as any, if there are some.
    let user: &[u8] = if name.is_empty() { b"alice" } else { name };
    let keys = psk.map(|file| (file, user));
    let given = Credentials::of(certificates, keys);
    let uri = builder::uri(&endpoint, OsStr::from_bytes(name), tls, given);

    // Taken apart as RFC 3986 has it.
    let text = std::str::from_utf8(&uri).expect("all else is quoted");
    let (scheme, rest) = text.split_once("://").expect("a scheme");
    let secure = if tls == Tls::Require { "nbds" } else { "nbd" };
    assert_eq!(scheme, if is_unix { format!("{secure}+unix") } else { secure.to_owned() });
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    assert_eq!(unquote(export.as_bytes()), name);
    let has_keys = tls == Tls::Require && psk.is_some();
    let (found, authority) = match authority.split_once('@') {
        Some((user, host)) => (Some(unquote(user.as_bytes())), host),
        None => (None, authority),
    };
    assert_eq!(found.as_deref(), has_keys.then_some(user));
    if let Endpoint::Tcp { port } = &endpoint {
        let (host, found) = authority.split_once(':').unwrap_or((authority, ""));
        assert_eq!(host, "localhost");
        assert_eq!(unquote(found.as_bytes()), port.clone().unwrap_or_default().as_bytes());
    } else {
        assert_eq!(authority, "");
    }
    let mut found = query.split('&').filter(|part| !part.is_empty()).map(|part| part.split_once('=').expect("a value"));
    if is_unix {
        let (key, value) = found.next().expect("the socket");
        assert_eq!((key, unquote(value.as_bytes())), ("socket", path.to_vec()));
    }
    if tls == Tls::Require && (certificates.is_some() || psk.is_some()) {
        let (key, value) = found.next().expect("the credentials");
        assert_eq!(key, if has_keys { "tls-psk-file" } else { "tls-certificates" });
        assert_eq!(unquote(value.as_bytes()), credentials.as_os_str().as_bytes());
    }
    assert_eq!(found.next(), None);
    assert!(builder::print_uri_text(&uri).ends_with(b"\n"));

    // And by our own client.
    let is_number = |port: &String| port.parse::<u16>().is_ok() && !port.starts_with('+');
    let port_is_fine = matches!(&endpoint, Endpoint::Tcp { port } if port.as_ref().is_none_or(is_number));
    let is_long = name.len() > 4096 || text.len() > 32 * 1024;
    if !is_long && (is_unix && !path.is_empty() || port_is_fine) {
        let read = Uri::parse(text).expect("a URI that was built can be read");
        assert_eq!((read.tls, &read.export_name[..]), (tls == Tls::Require, name));
        match (&read.address, &endpoint) {
            (Address::Unix(read), Endpoint::Unix(path)) => assert_eq!(read, path),
            (Address::Tcp { host, port: read }, Endpoint::Tcp { port }) => {
                assert_eq!(host, "localhost");
                assert_eq!(*read, port.as_ref().map_or(10809, |port| port.parse().expect("looked at above")));
            }
            _ => panic!("another kind of address"),
        }
    }
}

/// `%XX` as RFC 3986 has it.
fn unquote(bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut rest = bytes;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte == b'%' {
            let (digits, after) = after.split_at(2);
            let digits = std::str::from_utf8(digits).expect("ASCII");
            plain.push(u8::from_str_radix(digits, 16).expect("two hexadecimal digits"));
            rest = after;
        } else {
            plain.push(*byte);
        }
    }
    plain
}

/// The word that a POSIX shell makes of this. Panics where it is more than one, or something that a shell would act on.
fn through_a_shell(text: &[u8]) -> Vec<u8> {
    let mut word = Vec::new();
    let mut bytes = text.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\'' => word.extend(bytes.by_ref().take_while(|byte| *byte != b'\'')),
            b'"' => loop {
                match bytes.next().expect("the quotes end") {
                    b'"' => break,
                    b'\\' => {
                        let next = bytes.next().expect("something is quoted");
                        if !b"$`\"\\\n".contains(&next) {
                            word.push(b'\\');
                        }
                        if next != b'\n' {
                            word.push(next);
                        }
                    }
                    byte => {
                        assert!(!b"$`".contains(&byte), "a shell would expand that");
                        word.push(byte);
                    }
                }
            },
            b'\\' => word.push(bytes.next().expect("something is quoted")),
            byte => {
                assert!(byte.is_ascii_alphanumeric() || b".-_=,:/".contains(&byte), "a shell would act on that");
                word.push(byte);
            }
        }
    }
    word
}

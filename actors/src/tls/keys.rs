//! Files of pre-shared keys: `user:key` on each line, the key in hexadecimal digits. Source: psktool(1) and GnuTLS
//! lib/auth/psk_passwd.c for what else they may be.

use std::fmt;

/// Users and their keys. Nothing of it is ever shown.
#[derive(Clone)]
pub struct Keys(Vec<(Vec<u8>, Vec<u8>)>);

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys of {} users", self.0.len())
    }
}

/// What is wrong with a file of keys. Nothing of the file is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeysError {
    /// There is no user in it.
    Empty,
    /// A line, from 1, without a colon, or with nothing before it.
    NoUser(usize),
    /// A line, from 1, whose key is not an even number of hexadecimal digits.
    NoKey(usize),
    /// A line, from 1, whose user or key is longer than TLS libraries take.
    TooLong(usize),
}

impl fmt::Display for KeysError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeysError::Empty => f.write_str("there is no USER:KEY in it"),
            KeysError::NoUser(line) => write!(f, "line {line} is not USER:KEY"),
            KeysError::NoKey(line) => write!(f, "line {line}: the key is not in hexadecimal digits, two for each byte"),
            KeysError::TooLong(line) => {
                write!(f, "line {line}: users have at most {MAX_USER} bytes, and keys at most {MAX_KEY}")
            }
        }
    }
}

impl std::error::Error for KeysError {}

/// The longest user, in bytes. Source: OpenSSL `PSK_MAX_IDENTITY_LEN` of 1.1.1; GnuTLS takes as many.
const MAX_USER: usize = 128;
/// The longest key, in bytes. Source: OpenSSL `PSK_MAX_PSK_LEN` of 1.1.1.
const MAX_KEY: usize = 256;

impl Keys {
    /// Reads a file. A user that starts with `#` is in hexadecimal digits; a line that starts so and is no such user says
    /// nothing, and nor does an empty one.
    pub fn parse(file: &[u8]) -> Result<Keys, KeysError> {
        let mut keys = Vec::new();
        for (line, number) in file.split(|byte| *byte == b'\n').zip(1..) {
            let line = line.trim_ascii_end();
            if line.is_empty() {
                continue;
            }
            let colon = line.iter().position(|byte| *byte == b':');
            let (user, key) = match (colon, line[0]) {
                (Some(colon), b'#') => match hexadecimal(&line[1..colon]) {
                    Some(user) => (user, &line[colon + 1..]),
                    None => continue,
                },
                (None, b'#') => continue,
                (Some(colon), _) => (line[..colon].to_vec(), &line[colon + 1..]),
                (None, _) => return Err(KeysError::NoUser(number)),
            };
            if user.is_empty() {
                return Err(KeysError::NoUser(number));
            }
            let key = hexadecimal(key).filter(|key| !key.is_empty()).ok_or(KeysError::NoKey(number))?;
            if user.len() > MAX_USER || key.len() > MAX_KEY {
                return Err(KeysError::TooLong(number));
            }
            keys.push((user, key));
        }
        if keys.is_empty() { Err(KeysError::Empty) } else { Ok(Keys(keys)) }
    }

    /// Who is in it, in the order of the file.
    pub fn users(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|(user, _)| &user[..])
    }

    /// Users and keys, in the order of the file. Of a user that is there twice, the first counts.
    #[cfg_attr(not(feature = "psk"), allow(dead_code, reason = "who is served with keys is not built"))]
    pub(super) fn all(&self) -> &[(Vec<u8>, Vec<u8>)] {
        &self.0
    }
}

fn hexadecimal(digits: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let (pairs, rest) = digits.as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| Some(digit(high)? << 4 | digit(low)?));
    if rest.is_empty() { bytes.collect() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_keys_are_read_as_psktool_writes_them() {
        let keys = Keys::parse(b"alice:00ff10\n\nb b:AB\r\n# a comment\n#616c:01\n#zz:11\ncarol:0a:1").unwrap_err();
        assert_eq!(keys, KeysError::NoKey(7), "a key has no colon");
        let keys = Keys::parse(b"alice:00ff10\n\nb b:AB\r\n# a comment\n#616c:01\n#zz:11\n").unwrap();
        let all: Vec<_> = keys.all().iter().map(|(user, key)| (&user[..], &key[..])).collect();
        assert_eq!(all, [(&b"alice"[..], &[0, 255, 16][..]), (b"b b", &[0xab]), (b"al", &[1])]);
        assert_eq!(format!("{keys:?}"), "Keys of 3 users");
    }

    #[test]
    fn what_is_wrong_with_a_file_of_keys_is_said_by_the_line_and_nothing_of_it_is() {
        let why = |file: &[u8]| Keys::parse(file).unwrap_err();
        assert_eq!(why(b""), KeysError::Empty);
        assert_eq!(why(b"\n# nobody\n"), KeysError::Empty);
        assert_eq!(why(b"a:00\nsecret"), KeysError::NoUser(2));
        assert_eq!(why(b":00"), KeysError::NoUser(1));
        assert_eq!(why(b"a:"), KeysError::NoKey(1));
        assert_eq!(why(b"a:0"), KeysError::NoKey(1));
        assert_eq!(why(b"a:0g"), KeysError::NoKey(1));
        assert_eq!(why(format!("{}:00", "u".repeat(129)).as_bytes()), KeysError::TooLong(1));
        assert_eq!(why(format!("u:{}", "00".repeat(257)).as_bytes()), KeysError::TooLong(1));
    }
}

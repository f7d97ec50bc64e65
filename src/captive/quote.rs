//! Bytes made safe for a shell and for a URI. Source: nbdkit common/utils/quote.c.

/// Quotes bytes for a POSIX shell, so that one word comes out of it again, the same bytes. A NUL cannot be in a shell
/// word; none may be in `bytes`.
///
/// The text is nbdkit's: as it is if nothing in it is special, else in double quotes. One case is left out of that:
/// where a byte that is not ASCII comes with one that needs a backslash, single quotes are used, because in some
/// locales (GBK, Shift JIS) a shell takes the two together for one character and the backslash is lost.
pub fn shell_quote(bytes: &[u8]) -> Vec<u8> {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b".-_=,:/".contains(byte);
    let special = |byte: &u8| b"$`\\\"".contains(byte);
    if !bytes.is_empty() && bytes.iter().all(plain) {
        return bytes.to_vec();
    }
    let mut quoted = Vec::with_capacity(bytes.len() + 2);
    if bytes.iter().any(special) && !bytes.is_ascii() {
        quoted.push(b'\'');
        for byte in bytes {
            match byte {
                b'\'' => quoted.extend_from_slice(br"'\''"),
                byte => quoted.push(*byte),
            }
        }
        quoted.push(b'\'');
    } else {
        quoted.push(b'"');
        for byte in bytes {
            if special(byte) {
                quoted.push(b'\\');
            }
            quoted.push(*byte);
        }
        quoted.push(b'"');
    }
    quoted
}

/// Quotes bytes for the path or the query of a URI: all but RFC 3986's unreserved characters and `/` become `%XX`. What
/// comes out is also safe in a shell.
pub fn uri_quote(bytes: &[u8]) -> Vec<u8> {
    let mut quoted = Vec::with_capacity(bytes.len());
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b".-_~/".contains(byte) {
            quoted.push(*byte);
        } else {
            quoted.extend_from_slice(format!("%{byte:02X}").as_bytes());
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;
    use std::process::Command;

    use super::*;

    /// What each word is after a shell has read its quoted form.
    fn through_the_shell(shell: &str, words: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut script = br"printf '%s\0'".to_vec();
        for word in words {
            script.push(b' ');
            script.extend(shell_quote(word));
        }
        let output = Command::new(shell).arg("-c").arg(std::ffi::OsString::from_vec(script)).output();
        let output = output.expect("the shell starts");
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let mut parts: Vec<_> = output.stdout.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
        assert_eq!(parts.pop(), Some(Vec::new()), "the output ends with a NUL");
        parts
    }

    /// The shells that there are; POSIX wants the first to be everywhere.
    fn shells() -> impl Iterator<Item = &'static str> {
        ["/bin/sh", "/bin/dash", "/bin/bash"].into_iter().filter(|path| std::path::Path::new(path).exists())
    }

    #[test]
    fn every_byte_and_every_pair_with_a_special_one_survives_the_shell() {
        let mut words: Vec<Vec<u8>> = (1..=255).map(|byte| vec![byte]).collect();
        for special in *b"$`\\\"'\n!~ " {
            words.extend((1..=255).map(|byte| vec![byte, special]));
            words.extend((1..=255).map(|byte| vec![special, byte, b'a']));
        }
        words.push((1..=255).collect());
        for shell in shells() {
            assert!(through_the_shell(shell, &words) == words, "{shell}");
        }
    }

    #[test]
    fn nasty_words_survive_the_shell() {
        let words = [
            "",
            " ",
            "a b",
            "$(exit 9)",
            "`exit 9`",
            "${x}",
            "$$",
            "\\",
            "\\\\",
            "\\\n",
            "\n",
            "a\nb\n",
            "'",
            "\"",
            "'\"'",
            "*",
            "~",
            "~root",
            "a;b",
            "a&&b",
            "#",
            "-n",
            "%s",
            "!!",
            "{a,b}",
            "é$",
            "日本\\",
            "\u{1}\u{7f}",
            "\r\n",
            "=",
            "a=b",
        ];
        let words: Vec<_> = words.into_iter().map(|word| word.as_bytes().to_vec()).collect();
        for shell in shells() {
            assert_eq!(through_the_shell(shell, &words), words, "{shell}");
        }
    }

    #[test]
    fn the_shell_text_is_nbdkits() {
        for (word, quoted) in [
            ("", r#""""#),
            ("nbd://localhost:10809/a", "nbd://localhost:10809/a"),
            ("a b", r#""a b""#),
            ("~", r#""~""#),
            (r#"$`\""#, r#""\$\`\\\"""#),
            ("é", r#""é""#),
            ("'$é", r"''\''$é'"),
        ] {
            assert_eq!(String::from_utf8_lossy(&shell_quote(word.as_bytes())), quoted);
        }
    }

    #[test]
    fn the_uri_text_has_only_unreserved_characters_and_slashes() {
        assert_eq!(uri_quote(b""), b"");
        assert_eq!(uri_quote(b"aZ09.-_~/"), b"aZ09.-_~/");
        assert_eq!(uri_quote(b" %?#&=+\n\xff"), b"%20%25%3F%23%26%3D%2B%0A%FF");
        for byte in 0..=255 {
            let quoted = uri_quote(&[byte]);
            assert!(quoted == [byte] || quoted == format!("%{byte:02X}").as_bytes());
        }
    }
}

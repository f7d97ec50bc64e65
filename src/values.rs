//! How values are written on nbdkit's command line: sizes, numbers, switches, delays, probabilities.
//!
//! The grammars and the sentences of their errors are nbdkit's, because scripts and people's habits depend on both.
//! Every error is one line without the program's name. Text comes in as `&str`; what is not UTF-8 is none of these.
//! Source: nbdkit server/public.c `nbdkit_parse_*`, common/include/human-size.h.

use std::time::Duration;

/// What C's `isspace` skips before a number; `char::is_ascii_whitespace` leaves out the vertical tab.
const SPACE: [char; 6] = [' ', '\t', '\n', '\u{b}', '\u{c}', '\r'];

/// The longest delay, in seconds: nbdkit keeps them in an `unsigned`.
const LONGEST_DELAY: f64 = u32::MAX as f64;

/// A whole number as C's `strtol` finds it at the start of a text.
struct Number<'a> {
    negative: bool,
    /// Without the sign. `None` if it does not fit 64 bits.
    magnitude: Option<u64>,
    /// What follows the last digit.
    rest: &'a str,
}

/// Reads white space, a sign and digits. Base 0 is C's: `0x` starts hexadecimal and `0` octal. `None`: no digits.
fn whole_number(text: &str, base: u32) -> Option<Number<'_>> {
    let text = text.trim_start_matches(SPACE);
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    // `0x` without a hexadecimal digit behind it is the number 0 and a rest of `x`.
    let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let (text, base) = match (base, hexadecimal) {
        (0, Some(digits)) if digits.starts_with(|c: char| c.is_ascii_hexdigit()) => (digits, 16),
        (0, _) if text.starts_with('0') => (text, 8),
        (0, _) => (text, 10),
        (base, _) => (text, base),
    };
    let length = text.find(|c: char| !c.is_digit(base)).unwrap_or(text.len());
    let (digits, rest) = text.split_at(length);
    let magnitude = digits
        .chars()
        .try_fold(0u64, |sum, c| sum.checked_mul(u64::from(base))?.checked_add(u64::from(c.to_digit(base)?)));
    (length > 0).then_some(Number { negative, magnitude, rest })
}

/// A size in bytes, at most 2^63-1: decimal digits and at most one suffix, `b` 1, `s` 512, `k m g t p e` powers of
/// 1024, in either case. Nothing may follow the suffix, so `1MB` and `1MiB` are errors, as in nbdkit.
pub fn size(text: &str) -> Result<u64, String> {
    const MAXIMUM: u64 = i64::MAX as u64;
    let Some(number) = whole_number(text, 10) else {
        return Err(format!("could not parse size string: {text}"));
    };
    if number.negative && number.magnitude != Some(0) {
        return Err(format!("size cannot be negative: {text}"));
    }
    let Some(size) = number.magnitude.filter(|size| *size <= MAXIMUM) else {
        return Err(format!("size exceeds maximum value: {text}"));
    };
    let suffix = number.rest.chars().next().map(|c| c.to_ascii_lowercase());
    let (scale, rest) = match suffix {
        Some('s') => (512, &number.rest[1..]),
        Some(c) => match "bkmgtpe".find(c) {
            Some(power) => (1 << (10 * power), &number.rest[1..]),
            None => (1, number.rest),
        },
        None => (1, ""),
    };
    match size.checked_mul(scale).filter(|size| *size <= MAXIMUM) {
        None => Err(format!("could not parse size: size * scale overflows: {text}")),
        Some(_) if !rest.is_empty() => Err(format!("could not parse size: unknown suffix: {rest}")),
        Some(size) => Ok(size),
    }
}

/// A line of a list of extents without white space at its ends and without a comment. `None`: nothing else is in it. nbdkit takes
/// such lines since 1.46.
pub fn extent_line(line: &str) -> Option<&str> {
    let line = line.split('#').next().unwrap_or_default().trim_matches([' ', '\t', '\r']);
    (!line.is_empty()).then_some(line)
}

/// A switch: `1 true t yes y on` or `0 false f no n off`, in either case.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" | "on" => Ok(true),
        "0" | "false" | "f" | "no" | "n" | "off" => Ok(false),
        _ => Err(format!("could not decipher boolean ({text})")),
    }
}

/// A number from 0 to 2^32-1. Base as in C: `0x1f`, `017`, `15`.
pub fn unsigned(what: &str, text: &str) -> Result<u32, String> {
    unsigned_up_to(what, text, u64::from(u32::MAX)).map(|number| number as u32)
}

/// A number from 0 to 255. Base as in C.
pub fn byte(what: &str, text: &str) -> Result<u8, String> {
    unsigned_up_to(what, text, u64::from(u8::MAX)).map(|number| number as u8)
}

/// A number from 0 to 2^64-1. Base as in C.
pub fn u64(what: &str, text: &str) -> Result<u64, String> {
    unsigned_up_to(what, text, u64::MAX)
}

fn unsigned_up_to(what: &str, text: &str, maximum: u64) -> Result<u64, String> {
    // nbdkit quotes what it is left with after looking for the sign.
    let text = text.trim_start_matches(SPACE);
    if text.starts_with('-') {
        return Err(format!("{what}: negative numbers are not allowed"));
    }
    in_full(what, text, |number| number.magnitude.filter(|magnitude| *magnitude <= maximum))
}

/// A number from -2^31 to 2^31-1. Base as in C.
pub fn int(what: &str, text: &str) -> Result<i32, String> {
    in_full(what, text, |number| {
        let magnitude = i64::try_from(number.magnitude?).ok()?;
        i32::try_from(if number.negative { -magnitude } else { magnitude }).ok()
    })
}

/// A whole number and nothing else. `fit` turns it into the wanted type, or into `None` if it is out of range; that is
/// found before what may follow the number, as in nbdkit.
fn in_full<T>(what: &str, text: &str, fit: impl FnOnce(&Number<'_>) -> Option<T>) -> Result<T, String> {
    let Some(number) = whole_number(text, 0) else {
        return Err(format!("{what}: empty string where we expected a number"));
    };
    match fit(&number) {
        None => Err(format!("{what}: could not parse number: \"{text}\": Numerical result out of range")),
        Some(_) if !number.rest.is_empty() => {
            Err(format!("{what}: could not parse number: \"{text}\": trailing garbage"))
        }
        Some(value) => Ok(value),
    }
}

/// A fraction as `scanf("%lg")` finds it at the start of a text, and what follows: decimal, or hexadecimal as C has it (`0x1.8`,
/// `0x1p-3`). Infinity and not-a-number are left out: nbdkit refuses them later.
pub(crate) fn fraction(text: &str) -> Option<(f64, &str)> {
    let text = text.trim_start_matches(SPACE);
    let unsigned = text.trim_start_matches(['+', '-']);
    if let Some(digits) = unsigned.strip_prefix("0x").or_else(|| unsigned.strip_prefix("0X"))
        && text.len() - unsigned.len() <= 1
    {
        let (value, rest) = hexadecimal_fraction(digits)?;
        return Some((if text.starts_with('-') { -value } else { value }, rest));
    }
    let digits = |from: usize| text[from..].bytes().take_while(u8::is_ascii_digit).count();
    let sign = usize::from(text.starts_with(['+', '-']));
    let whole = digits(sign);
    let mut end = sign + whole;
    let mut count = whole;
    if text[end..].starts_with('.') {
        let part = digits(end + 1);
        count += part;
        end += 1 + part;
    }
    if count == 0 {
        return None;
    }
    if text[end..].starts_with(['e', 'E']) {
        let sign = usize::from(text[end + 1..].starts_with(['+', '-']));
        match digits(end + 1 + sign) {
            0 => {}
            exponent => end += 1 + sign + exponent,
        }
    }
    Some((text[..end].parse().ok()?, &text[end..]))
}

/// What follows `0x`: digits, of which some may be behind a point, and a power of two.
fn hexadecimal_fraction(text: &str) -> Option<(f64, &str)> {
    let whole = text.bytes().take_while(u8::is_ascii_hexdigit).count();
    let part = match text[whole..].strip_prefix('.') {
        Some(part) => 1 + part.bytes().take_while(u8::is_ascii_hexdigit).count(),
        None => 0,
    };
    let (digits, rest) = text.split_at(whole + part);
    let places = part.saturating_sub(1);
    if whole + places == 0 {
        return None;
    }
    let value =
        digits.chars().filter_map(|digit| digit.to_digit(16)).fold(0.0, |value, digit| value * 16.0 + f64::from(digit));
    let value = value * 16f64.powi(-i32::try_from(places).ok()?);
    let Some(power) = rest.strip_prefix(['p', 'P']) else { return Some((value, rest)) };
    let sign = usize::from(power.starts_with(['+', '-']));
    let count = power[sign..].bytes().take_while(u8::is_ascii_digit).count();
    if count == 0 {
        return Some((value, rest));
    }
    let (power, rest) = power.split_at(sign + count);
    // Beyond that it is infinite, or nothing.
    let power = power.parse().unwrap_or(if power.starts_with('-') { -9999 } else { 9999 });
    Some((value * 2f64.powi(power), rest))
}

/// A delay: a fraction and a unit, `s` (also without any), `ms`, `us` or `μs`, `ns`. At most 2^32-1 seconds.
pub fn delay(what: &str, text: &str) -> Result<Duration, String> {
    let seconds = fraction(text).and_then(|(number, unit)| match unit {
        "" | "s" => Some(number),
        "ms" => Some(number / 1e3),
        "us" | "μs" => Some(number / 1e6),
        "ns" => Some(number / 1e9),
        _ => None,
    });
    seconds
        .filter(|seconds| seconds.is_sign_positive() && *seconds <= LONGEST_DELAY)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("{what}: could not parse delay or sleep: \"{text}\""))
}

/// A probability, `0.1`, `10%`, `1:10` or `1/10`: never negative, but as in nbdkit it may be more than 1.
pub fn probability(what: &str, text: &str) -> Result<f64, String> {
    let value = fraction(text).and_then(|(number, rest)| match rest {
        "" => Some(number),
        "%" => Some(number / 100.0),
        _ => {
            let (divisor, rest) = fraction(rest.strip_prefix([':', '/'])?)?;
            match (number == 0.0 && divisor == 0.0, rest) {
                (true, "") => Some(number),
                (false, "") => Some(number / divisor),
                _ => None,
            }
        }
    });
    value
        .filter(|value| value.is_finite() && value.is_sign_positive())
        .ok_or_else(|| format!("{what}: could not parse '{text}' as a probability"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_digits_and_one_suffix() {
        for (text, bytes) in [
            ("0", 0),
            ("-0", 0),
            ("+1", 1),
            (" \t\u{b}7", 7),
            ("010", 10),
            ("512b", 512),
            ("2s", 1024),
            ("2S", 1024),
            ("1k", 1 << 10),
            ("1M", 1 << 20),
            ("1g", 1 << 30),
            ("1T", 1 << 40),
            ("1p", 1 << 50),
            ("7E", 7 << 60),
            ("9223372036854775807", i64::MAX as u64),
            ("9223372036854775807B", i64::MAX as u64),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn a_bad_size_is_refused_in_nbdkits_words() {
        for (text, error) in [
            ("", "could not parse size string: "),
            ("M", "could not parse size string: M"),
            ("- 1", "could not parse size string: - 1"),
            ("-1", "size cannot be negative: -1"),
            ("-99999999999999999999", "size cannot be negative: -99999999999999999999"),
            ("9223372036854775808", "size exceeds maximum value: 9223372036854775808"),
            ("99999999999999999999", "size exceeds maximum value: 99999999999999999999"),
            ("8E", "could not parse size: size * scale overflows: 8E"),
            ("36028797018963968s", "could not parse size: size * scale overflows: 36028797018963968s"),
            ("1MB", "could not parse size: unknown suffix: B"),
            ("1.5M", "could not parse size: unknown suffix: .5M"),
            ("1é", "could not parse size: unknown suffix: é"),
            ("1 M", "could not parse size: unknown suffix:  M"),
            ("0x10", "could not parse size: unknown suffix: x10"),
        ] {
            assert_eq!(size(text), Err(error.to_owned()));
        }
    }

    #[test]
    fn a_switch_has_six_words_for_each_side() {
        for text in ["1", "true", "T", "YES", "y", "On"] {
            assert_eq!(boolean(text), Ok(true), "{text}");
        }
        for text in ["0", "False", "f", "no", "N", "OFF"] {
            assert_eq!(boolean(text), Ok(false), "{text}");
        }
        for text in ["", "2", "01", " on", "enable"] {
            assert_eq!(boolean(text), Err(format!("could not decipher boolean ({text})")));
        }
    }

    #[test]
    fn whole_numbers_take_the_bases_of_c() {
        for (text, number) in
            [("0", 0), ("017", 15), ("0x1F", 31), ("0Xff", 255), ("+5", 5), ("\n 5", 5), ("4294967295", u32::MAX)]
        {
            assert_eq!(unsigned("threads", text), Ok(number), "{text}");
            assert_eq!(u64("threads", text), Ok(u64::from(number)), "{text}");
        }
        assert_eq!(u64("n", "0xffffffffffffffff"), Ok(u64::MAX));
        assert_eq!(byte("n", "0xff"), Ok(255));
        assert!(byte("n", "256").is_err());
        assert_eq!(int("n", "-2147483648"), Ok(i32::MIN));
        assert_eq!(int("n", "-0x10"), Ok(-16));
        assert_eq!(int("n", "2147483647"), Ok(i32::MAX));
    }

    #[test]
    fn a_bad_number_is_refused_in_nbdkits_words() {
        for (text, error) in [
            ("", "n: empty string where we expected a number"),
            ("x", "n: empty string where we expected a number"),
            ("+-1", "n: empty string where we expected a number"),
            ("-1", "n: negative numbers are not allowed"),
            ("  -0", "n: negative numbers are not allowed"),
            ("08", "n: could not parse number: \"08\": trailing garbage"),
            ("0x", "n: could not parse number: \"0x\": trailing garbage"),
            (" 1k", "n: could not parse number: \"1k\": trailing garbage"),
            ("4294967296", "n: could not parse number: \"4294967296\": Numerical result out of range"),
            ("4294967296k", "n: could not parse number: \"4294967296k\": Numerical result out of range"),
        ] {
            assert_eq!(unsigned("n", text), Err(error.to_owned()));
        }
        let range = |text| Err(format!("n: could not parse number: \"{text}\": Numerical result out of range"));
        assert_eq!(u64("n", "18446744073709551616"), range("18446744073709551616").map(|()| 0));
        assert_eq!(int("n", "2147483648"), range("2147483648").map(|()| 0));
        assert_eq!(int("n", "-2147483649"), range("-2147483649").map(|()| 0));
        assert_eq!(int("n", " 1 "), Err("n: could not parse number: \" 1 \": trailing garbage".to_owned()));
    }

    #[test]
    fn a_delay_has_a_unit_or_is_in_seconds() {
        for (text, expected) in [
            ("0", Duration::ZERO),
            ("5", Duration::from_secs(5)),
            ("5s", Duration::from_secs(5)),
            (" +1.5", Duration::from_millis(1500)),
            (".5s", Duration::from_millis(500)),
            ("5.s", Duration::from_secs(5)),
            ("1e3ms", Duration::from_secs(1)),
            ("250ms", Duration::from_millis(250)),
            ("7us", Duration::from_micros(7)),
            ("7μs", Duration::from_micros(7)),
            ("9ns", Duration::from_nanos(9)),
            ("4294967295", Duration::from_secs(u64::from(u32::MAX))),
            ("0x10", Duration::from_secs(16)),
            ("+0X1.8s", Duration::from_millis(1500)),
            ("0x1p-2", Duration::from_millis(250)),
            ("0x.8p1ms", Duration::from_millis(1)),
        ] {
            assert_eq!(delay("timeout", text), Ok(expected), "{text}");
        }
        for text in [
            "",
            "s",
            ".",
            "-1",
            "-0",
            "1m",
            "1 s",
            "1e",
            "1ss",
            "inf",
            "nan",
            "1e999",
            "4294967296",
            "e5",
            "0x",
            "0xg",
            "0x.",
            "0x1p",
            "-0x1",
            "0x1p9999",
            "++1",
            "1e+",
        ] {
            assert_eq!(delay("timeout", text), Err(format!("timeout: could not parse delay or sleep: \"{text}\"")));
        }
    }

    #[test]
    fn a_probability_is_a_fraction_a_percentage_or_a_ratio() {
        for (text, expected) in [
            ("0", 0.0),
            ("1e-3", 0.001),
            ("10%", 0.1),
            ("1:10", 0.1),
            ("1/ 4", 0.25),
            ("0/0", 0.0),
            ("200%", 2.0),
            ("0x1/0X10", 0.0625),
        ] {
            assert_eq!(probability("error-rate", text), Ok(expected), "{text}");
        }
        for text in ["", "%", "-1", "-0", "1/0", "1:", "1:2:3", "1::2", "nan", "inf", "10%%", "1 %", "-1:2"] {
            let error = format!("error-rate: could not parse '{text}' as a probability");
            assert_eq!(probability("error-rate", text), Err(error));
        }
    }
}

use nbdcaptive_actors::device::{Call, Client, Extents, HOLE, ZERO};

use crate::plugins::testing::ready;

fn described(data: &str, further: &[(&str, &str)]) -> Result<Vec<u8>, String> {
    let mut parameters: Vec<_> = vec![("data", data.as_ref())];
    parameters.extend(further.iter().map(|(key, value)| (*key, value.as_ref())));
    let exports = ready("data", &parameters).map_err(|error| error.to_string())?;
    let device = exports.open(&Client::default()).map_err(|error| error.to_string())?;
    let size = usize::try_from(device.size().map_err(|error| error.to_string())?).map_err(|error| error.to_string())?;
    let mut buffer = vec![0xee; size.min(1 << 20)];
    if !buffer.is_empty() {
        device.read(&mut buffer, 0, &Call::BLOCKING).map_err(|error| error.to_string())?;
    }
    Ok(buffer)
}

fn is(data: &str, expected: impl AsRef<[u8]>) {
    let got = described(data, &[]).unwrap_or_else(|error| panic!("{data}: {error}"));
    assert_eq!(got.escape_ascii().to_string(), expected.as_ref().escape_ascii().to_string(), "{data}");
}

fn zeroes(count: usize) -> Vec<u8> {
    vec![0; count]
}

/// nbdkit's tests/test-data-format.sh.
#[test]
fn every_kind_of_expression() {
    is("", "");
    is("65 0x31 017 128", b"A1\x0f\x80");
    is("le16:1 be16:1 le32:1 be32:1", b"\x01\0\0\x01\x01\0\0\0\0\0\0\x01");
    is("1 base64:aGVsbG8= (base64:aGk=)*2 base64:+/8=[1:]", b"\x01hellohihi\xff");
    is("le64:0xffffffffffffffff be64:1", b"\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0\0\0\0\x01");
    is(r#" "hello" ( "\"" "\\" )*2 "\x01\x02\x03" "\n" "" "#, b"hello\"\\\"\\\x01\x02\x03\n");
    is(r#""\a\b\f\n\r\t\v""#, b"\x07\x08\x0c\n\r\t\x0b");
    is(r#"@4 "\x00""#, zeroes(5));
    is("@+4 @-1 0", zeroes(4));
    is("1 @^4 0", b"\x01\0\0\0\0");
    for kilobyte in ["@1k", "@1K", "@0x400", "@02000", "@1024"] {
        is(&format!("{kilobyte} 1"), [zeroes(1024), vec![1]].concat());
    }
    is("#", "");
    is("# ignore\n 1 2 3", b"\x01\x02\x03");
    is("( 0x55 0xAA )*4", b"\x55\xaa".repeat(4));
    is("( @4 ( 0x21 ) * 4 )*4", b"\0\0\0\0!!!!".repeat(4));
    is("( \"Hello\" @^8 )*2", b"Hello\0\0\0Hello\0\0\0");
    is("( @4 )*4 1", [zeroes(16), vec![1]].concat());
    is("( @7 )*4", zeroes(28));
    is("1 (@2 2) (@3 3)", b"\x01\0\0\x02\0\0\0\x03");
    is("() ()*2 ( () ) ()*2[:0] ()[:0]*2 (()[:0]*2)[:0]*2 ()*0 ( 1 2 3 )*0 ()*1*2*3", "");
    is(r"() -> \a \a (\a) (\a)*2 (\a \a) (\a*2 \a) \a*2[:0] \a[:0]*2", "");
    is("1*2*3*4", vec![1; 24]);
    is("\"foo\"*2*50", "foo".repeat(100));
    is("1*100000", vec![1; 100_000]);
    is("1*1000 @100 0*100", [vec![1; 100], zeroes(100), vec![1; 800]].concat());
    is("1*1000 @100 0*1000", [vec![1; 100], zeroes(1000)].concat());
    is("1 2 \"3\"*3 4", b"\x01\x02333\x04");
    // Over what is there, with what is nothing in it.
    is("\"abcdefgh\" @2 ( @1 \"x\" @3 )", b"ab\0x\0fgh");
    is("@32766 1*5 @65534 2*5 @32768 0*32768", [zeroes(32766), vec![1; 2], zeroes(32768), vec![2; 3]].concat());
}

#[test]
fn names_have_a_scope_and_know_what_was_before_them() {
    is(
        r"(0x31 0x32) -> \a (0x35 0x36) -> \b ( (0x33 0x34) -> \a (0x37 0x38) -> \c \a \a \b \c ) \a \b",
        "343456781256",
    );
    is(
        r"1 -> \1 42 -> \a-number 2 -> \2 ( \1 ) -> \test \test ( 2 -> \1 ) \test ( 3 -> \1 \test ) 4 -> \1 \test
          ( \1 ) -> \test \test",
        b"\x01\x01\x01\x01\x04",
    );
    // What is not used is not looked at.
    is(r"</nowhere -> \a 1", b"\x01");
}

#[test]
fn slices_of_everything() {
    is(r#"( "Hello" )[:4] "Hello"[3:] "Hello"[3:5] "Hello"[:]"#, ["Hell", "lo", "lo", "Hello"].concat());
    is(r#""Hello"[:0] "Hello"[99:99] </nowhere[3:3]"#, "");
    is("( 1*1000000000000 )[999999999998:]", b"\x01\x01");
    is("(1 @8 2)[1:9]", b"\0\0\0\0\0\0\0\x02");
    is("</dev/zero[:10]*2", zeroes(20));
    is("<( while :; do printf abc; done )[:7]", "abcabca");
    is("( <(echo hello) )", "hello\n");
    is("<( (echo a; (echo b)) )", "a\nb\n");
}

#[test]
fn variables_are_parameters_or_the_environments() {
    let got = described(" $a $b $c ", &[("a", " 1 2 "), ("b", " 3 4 "), ("c", " $d*5 "), ("d", " 5 ")]);
    assert_eq!(got.unwrap(), [1, 2, 3, 4, 5, 5, 5, 5, 5]);
    assert_eq!(described("$hello[:4]", &[("hello", "\"Hello\"")]).unwrap(), b"Hell");
    // One that every process has.
    assert!(described("$PATH", &[]).unwrap_err().contains("parsing error"));
    assert_eq!(described("$unknownvar", &[]).unwrap_err(), "$unknownvar: variable not found");
    assert!(described("$a", &[("a", "( 1")]).unwrap_err().contains("unmatched '('"));
}

/// nbdkit's tests/test-data-bad.sh.
#[test]
fn bad_descriptions_are_errors() {
    let words = ["", ":", ":-1", ":abc", ":0xffffffffffffffffffffffffffffffff"];
    let prefixes = ["le16", "be16", "le32", "be32", "le64", "be64"];
    let mut bad: Vec<String> =
        prefixes.iter().flat_map(|prefix| words.iter().map(move |word| format!("{prefix}{word}"))).collect();
    bad.extend(
        [
            "-1",
            "-",
            "256",
            "0400",
            "0x100",
            "0xffffffffffffffffffffffffffffffff",
            "le16:0x10000",
            "be32:0x100000000",
            "le64:0x10000000000000000",
            "a",
            "x",
            "be",
            "le",
            "be1",
            "le3",
            "¢",
            "?",
            "\\",
            "^",
            "@",
            "@+",
            "@-",
            "@^",
            "@^3",
            "@^0",
            "@1kb",
            "@1x",
            "<",
            "<(",
            "<()",
            "$",
            "$1",
            "*",
            "[",
            ":",
            "]",
            "@-2",
            "@2 @-3",
            "@2 @-2 @-1",
            "@1 @^2 @-3",
            "(",
            ")",
            "( (",
            "( ( )",
            ") ( )",
            "( ) )",
            "\"",
            "\"\\",
            "\"\\\\",
            "\"\\\"",
            "\"\\x\"",
            "\"\\x1g\"",
            "\"\\1\"",
            "*0",
            "*1",
            "0*-1",
            "0*",
            "0*x",
            "0**",
            "0*0x100000000*0x100000000",
            "0[2:]",
            "0[:2]",
            "[:]",
            "[0:1]",
            "\"111\"[4:]",
            "\"123\"[1:0]",
            "\"123\"[-1:0]",
            "</NOFILE",
            "</etc/passwd[5:1]",
            "<(exit 1)",
            "\\a",
            "( 0 -> \\a ) \\a",
            "\\a ( 0 -> \\a )",
            "0 -> \\a \\b",
            "(0 -> \\a) -> \\b \\b \\a",
            "@0 * 10",
            "@0 -> \\a",
            "@0x7fffffffffffffff 1",
            "@0x7fffffffffffffff @+1",
        ]
        .map(str::to_owned),
    );
    for data in bad {
        let error = described(&data, &[]).expect_err(&data);
        assert_eq!(error.lines().count(), 1, "{data}: {error}");
    }
}

/// Nothing that can be said makes it grow or run without end.
#[test]
fn descriptions_are_bounded() {
    let error = |data: &str, further: &[(&str, &str)]| described(data, further).expect_err(&data[..data.len().min(80)]);
    let deep = |open: &str, close: &str| format!("{}{}", open.repeat(100_000), close.repeat(100_000));
    assert!(error(&deep("(", ")"), &[]).contains("levels of nesting"));
    assert!(error(&format!("1{}", "*1".repeat(100_000)), &[]).contains("levels of nesting"));
    assert!(error("$a", &[("a", "$a")]).contains("levels of nesting"));
    // Each stands for two of the next.
    let names: Vec<_> = (0..60).map(|i| (format!("v{i}"), format!("$v{0} $v{0}", i + 1))).collect();
    let mut names: Vec<_> = names.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    names.push(("v60", ""));
    assert!(error("$v0", &names).contains("expressions"));
    let doubled: String = (0..60).map(|i| format!("(\\{i} 1 \\{i} @+9000) -> \\{} ", i + 1)).collect();
    assert!(error(&format!("(1 2) -> \\0 {doubled} \\60"), &[]).contains("pieces"));
    let chain: String = (0..5000).map(|i| format!("(\\{i}) -> \\{} ", i + 1)).collect();
    assert!(error(&format!("1 -> \\0 {chain} \\5000"), &[]).contains("levels of nesting"));
    assert!(error("</dev/zero", &[]).contains("more than"));
    assert!(error("1*2000000000", &[]).contains("takes more than"));
    assert!(error("(1 2)*2000000000", &[]).contains("pieces"));
    // What is cut off is no matter, nor what is nothing.
    assert_eq!(described("1*2000000000000 @0 2", &[("size", "2")]).unwrap(), [2, 1]);
    assert_eq!(described("()*0x7fffffffffffffff (@1)*1000000000000", &[("size", "1")]).unwrap(), [0]);
    // So many that to keep each apart would be dear.
    is("(1 2 3)*100000", [1, 2, 3].repeat(100_000));
}

/// nbdkit's tests/test-data-64b.sh, test-data-7E.sh and test-data-extents.sh.
#[test]
fn large_disks_cost_what_is_in_them() {
    let map = |data: &str, size: &str| {
        let exports = ready("data", &[("data", data.as_ref()), ("size", size.as_ref())]).unwrap();
        let device = exports.open(&Client::default()).unwrap();
        let mut extents = Extents::new(0, device.size().unwrap(), false);
        device.extents(&mut extents, &Call::BLOCKING).unwrap();
        extents.list().iter().map(|extent| (extent.length, extent.flags)).collect::<Vec<_>>()
    };
    let hole = HOLE | ZERO;
    assert_eq!(map("", "1M"), [(1 << 20, hole)]);
    assert_eq!(map("1", "32K"), [(32768, 0)]);
    assert_eq!(map("@32768 1 @65536 1 @131072 0 @163840 0", "1M"), {
        [(32768, hole), (65536, 0), (32768, hole), (65536, ZERO), (851_968, hole)]
    });
    let gigabytes = r"( 0x55 0xAA @0x200000000 @-2 0x55 0xAA ) -> \1 \1 * 4";
    let data = map(gigabytes, "32G").iter().filter(|(_, flags)| *flags == 0).map(|(length, _)| length).sum::<u64>();
    assert_eq!(data, 8 * 32768);
    assert_eq!(map("@0x6ffffffffffffe00 1", "7E").len(), 2);
}

#[test]
fn the_other_forms() {
    let content = |key: &str, value: &str| {
        let exports = ready("data", &[(key, value.as_ref())]).map_err(|error| error.to_string())?;
        let device = exports.open(&Client::default()).unwrap();
        let mut buffer = vec![0; device.size().unwrap() as usize];
        if !buffer.is_empty() {
            device.read(&mut buffer, 0, &Call::BLOCKING).unwrap();
        }
        Ok::<_, String>(buffer)
    };
    assert_eq!(content("raw", "Hello, world!").unwrap(), b"Hello, world!");
    assert_eq!(content("raw", "").unwrap(), b"");
    assert_eq!(content("base64", "MTIz").unwrap(), b"123");
    assert_eq!(content("base64", "aGVsbG8g\nbmJka2l0IHVzZXI=\n").unwrap(), b"hello nbdkit user");
    assert!(content("base64", "M").unwrap_err().starts_with("base64: "));
    let error = |parameters: &[(&str, &str)]| {
        let parameters: Vec<_> = parameters.iter().map(|(key, value)| (*key, (*value).as_ref())).collect();
        ready("data", &parameters).err().expect("it is refused").to_string()
    };
    assert_eq!(error(&[]), "raw|base64|data parameter was not specified");
    assert_eq!(error(&[("raw", ""), ("data", "")]), "raw|base64|data parameter must be specified exactly once");
    assert_eq!(error(&[("raw", ""), ("a", "b")]), "extra parameters passed and not using data='...'");
}

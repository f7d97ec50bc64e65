//! Keeps the tests that pages name true.
//!
//! The last column of docs/lifetimes.md names, for each row of the contract, the tests that pin it. A test pins the rows that
//! the comment right above it names. A row without a test has a reason in that column, in parentheses, which is kept.
//! The other pages are written by hand; each test that they name must exist, and each plugin must be on the page about them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Every source file with tests, in a fixed order.
fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// A row's name at the start of `word`: a letter from A to G and a number, and nothing that would make it another word.
fn rows_in(line: &str) -> Vec<String> {
    line.split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| {
            let (letter, number) = word.split_at(usize::from(!word.is_empty()));
            matches!(letter, "A" | "B" | "C" | "D" | "E" | "F" | "G")
                && (1..=2).contains(&number.len())
                && number.bytes().all(|byte| byte.is_ascii_digit())
        })
        .map(str::to_owned)
        .collect()
}

/// Each test as `file::test`, with the rows that the comment above it names.
fn tests(root: &Path) -> Vec<(String, Vec<String>)> {
    let mut files = Vec::new();
    for directory in ["tests", "actors/tests", "actors/src", "src"] {
        sources(&root.join(directory), &mut files);
    }
    let mut tests = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("a source file is text");
        let stem = file.file_stem().expect("it has a name").to_string_lossy().into_owned();
        let mut rows = Vec::new();
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            if line.starts_with("//") {
                rows.extend(rows_in(line));
            } else if line.starts_with("#[test]") {
                is_test = true;
            } else if line.starts_with("#[") {
            } else {
                if let (true, Some(rest)) = (is_test, line.strip_prefix("fn ")) {
                    let name = rest.split('(').next().unwrap_or_default();
                    tests.push((format!("{stem}::{name}"), std::mem::take(&mut rows)));
                }
                rows.clear();
                is_test = false;
            }
        }
    }
    tests
}

/// Row to tests.
fn pinned(root: &Path) -> BTreeMap<String, Vec<String>> {
    let mut pinned: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (test, rows) in tests(root) {
        for row in rows {
            let tests = pinned.entry(row).or_default();
            if !tests.contains(&test) {
                tests.push(test.clone());
            }
        }
    }
    pinned
}

#[test]
fn every_row_of_the_contract_names_its_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = root.join("docs/lifetimes.md");
    let text = fs::read_to_string(&page).expect("the page is there");
    let pinned = pinned(root);
    let mut bare = Vec::new();
    let mut fresh = String::new();
    for line in text.lines() {
        let cells: Vec<&str> = line.split(" | ").collect();
        let row = cells[0].trim_start_matches("| ").trim();
        if cells.len() == 4 && rows_in(row) == [row] {
            let kept = cells[3].trim_end_matches('|').trim();
            let tests = match pinned.get(row) {
                Some(tests) => tests.iter().map(|test| format!("`{test}`")).collect::<Vec<_>>().join(", "),
                None if kept.starts_with('(') => kept.to_owned(),
                None => {
                    bare.push(row.to_owned());
                    String::new()
                }
            };
            fresh += &format!("{} | {} | {} | {tests} |\n", cells[0], cells[1], cells[2]);
        } else {
            fresh += line;
            fresh.push('\n');
        }
    }
    if std::env::var_os("UPDATE_ROWS").is_some() {
        fs::write(&page, &fresh).expect("the page can be written");
    }
    assert_eq!(bare, Vec::<String>::new(), "rows without a test and without a reason");
    if std::env::var_os("UPDATE_ROWS").is_none() {
        assert!(fresh == text, "the page differs from the tests: run UPDATE_ROWS=1 cargo test --test rows");
    }
}

/// What a page has between back quotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Pages that name tests and are written by hand.
const PAGES: [&str; 3] = ["protocol.md", "plugins.md", "filters.md"];

#[test]
fn every_test_that_a_page_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tests: BTreeSet<String> = tests(root).into_iter().map(|(test, _)| test).collect();
    for page in PAGES {
        let text = fs::read_to_string(root.join("docs").join(page)).expect("the page is there");
        let named = quoted(&text).filter(|code| code.contains("::") && *code != "file::test");
        let missing: Vec<&str> = named.filter(|test| !tests.contains(*test)).collect();
        assert_eq!(missing, Vec::<&str>::new(), "{page} names tests that do not exist");
    }
}

/// docs/plugins.md is written by hand: a row for each plugin, in their order, which names every parameter and at least one test.
#[test]
fn every_plugin_has_a_row_with_all_its_parameters() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/plugins.md")).expect("the page is there");
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect();
    let names: Vec<&str> = rows.iter().map(|row| row[0].trim_matches('`')).collect();
    let plugins = nbdcaptive::plugins::ALL;
    assert_eq!(names, plugins.iter().map(|entry| entry.about.name).collect::<Vec<_>>());
    for (row, entry) in rows.iter().zip(plugins) {
        let name = entry.about.name;
        assert_eq!(row.len(), 4, "{name}");
        let said: BTreeSet<&str> = quoted(row[1]).collect();
        let unsaid: Vec<&str> =
            entry.about.parameters.iter().map(|parameter| parameter.key).filter(|key| !said.contains(key)).collect();
        assert_eq!(unsaid, Vec::<&str>::new(), "the row of {name} does not name these parameters");
        assert!(quoted(row[3]).any(|test| test.contains("::")), "the row of {name} names no test");
    }
}

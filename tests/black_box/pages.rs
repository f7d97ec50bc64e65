//! `--man`: every page, read by the programs that people read pages with; and `--help`, which is made of the same.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nbdcaptive::cli::man::Manual;
use nbdcaptive::cli::{self, Parameter, Request};
use nbdcaptive::layer::About;
use nbdcaptive::{filters, plugins};
use nbdcaptive_actors::device::ThreadModel;

use super::harness::{Room, nbdkit_differs, server_path};
use super::layers::LZIP_PROGRAM;

/// The pages as files of the room, by the program's own word.
fn pages(room: &Room) -> Vec<PathBuf> {
    let list = room.server(["--man"]).run_to(0);
    let names = list.text().lines().map(|line| line.split(' ').next().expect("a line has a name"));
    let pages = names.map(|name| {
        let page = room.server(["--man", name]).run_to(0);
        room.write(&format!("{name}.1"), page.stdout)
    });
    pages.collect()
}

/// Text for a terminal without its bold and underlined letters.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    for c in text.chars() {
        match c {
            '\u{8}' => _ = plain.pop(),
            c => plain.push(c),
        }
    }
    plain
}

#[test]
fn every_page_is_read_without_a_warning_and_fits_a_terminal() {
    if nbdkit_differs("its pages come apart from the program") {
        return;
    }
    let room = Room::new();
    let pages = pages(&room);
    assert!(pages.len() > 2);

    let words = [Path::new("--warnings"), Path::new("-l")];
    let mut man = room.tool("man", words.into_iter().chain(pages.iter().map(PathBuf::as_path)));
    let read = man.env("MANWIDTH", "80").env("MANPAGER", "cat").run_to(0);
    assert_eq!(read.stderr, "");
    for line in plain(read.text()).lines() {
        assert!(line.chars().count() <= 80, "{line:?}");
    }
    // Every page has all of what a page must have.
    for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "SEE ALSO"] {
        assert_eq!(plain(read.text()).lines().filter(|line| *line == section).count(), pages.len(), "{section}");
    }

    for page in &pages {
        let words = ["-man", "-Tutf8", "-ww", "-z"].map(Path::new);
        let output = room.tool("groff", words.into_iter().chain([page.as_path()])).run_to(0);
        assert_eq!(output.stderr, "", "{}", page.display());
    }
    let words = ["-Tlint", "-Wwarning"].map(Path::new);
    let lint = room.tool("mandoc", words.into_iter().chain(pages.iter().map(PathBuf::as_path))).run();
    // There is none on purpose, so that the same program prints the same page.
    let faults: Vec<_> = lint.text().lines().filter(|line| !line.contains("WARNING: missing date")).collect();
    assert!(faults.is_empty() && lint.stderr.is_empty(), "{faults:#?} {}", lint.stderr);
}

/// Examples are there to be pasted: each is a command line that the parser takes, of layers and parameters that there are.
#[test]
fn every_example_is_a_command_line() {
    if nbdkit_differs("its pages come apart from the program") {
        return;
    }
    let room = Room::new();
    let mut examples = 0;
    for page in pages(&room) {
        // A shell takes the lines apart, and writes down the words; with no PATH it can do nothing else.
        let text = fs::read_to_string(&page).expect("it was written");
        let blocks = text.split("\n.EX\n").skip(1).filter_map(|rest| rest.split("\n.EE").next());
        // A line is written at once, as examples with `&` run side by side.
        let mut script = "nbdcaptive() { printf '%s\\0' \"$@\" $'\\n' >>words; }\nPATH=\n".to_owned();
        for block in blocks {
            script += &unescaped(block);
            script += "\n";
        }
        script += "wait\n";
        let _ = fs::remove_file(room.path("words"));
        let check = room.write("script", &script);
        room.tool("bash", [Path::new("-n"), &check]).run_to(0);
        room.tool("bash", [&check]).run();
        let words = fs::read(room.path("words")).unwrap_or_default();
        for example in words.split(|byte| *byte == b'\0').collect::<Vec<_>>().split(|word| *word == b"\n") {
            let line: Vec<_> = example.iter().map(|word| OsString::from_vec(word.to_vec())).collect();
            if line.is_empty() || line == [OsString::new()] {
                continue;
            }
            examples += 1;
            let parsed = cli::parse(line.clone(), Some(Path::new("/")));
            let (request, options) = parsed.unwrap_or_else(|error| panic!("{}: {line:?}: {error}", page.display()));
            if request != Request::Serve {
                continue;
            }
            let known = |name: &OsString| name.to_string_lossy().into_owned();
            let plugin = options.plugin.as_ref().map(known).expect("it serves something");
            let plugin = plugins::find(&plugin).unwrap_or_else(|| panic!("{line:?}: no plugin {plugin}"));
            let filters: Vec<&About> = options
                .filters
                .iter()
                .map(known)
                .map(|name| filters::find(&name).unwrap_or_else(|| panic!("{line:?}: no filter {name}")).about)
                .collect();
            for word in &options.parameters {
                if let Parameter::KeyValue(key, _) = cli::split_parameter(word) {
                    let mut layers = filters.iter().copied().chain([plugin.about]);
                    let is_known = layers.any(|about| about.parameters.iter().any(|parameter| parameter.key == key));
                    assert!(is_known || (plugin.new)().takes_other_keys(), "{}: {line:?}: {key}", page.display());
                }
            }
        }
    }
    assert!(examples > 20);
}

/// The examples of plugins and filters work as they stand, beside a few files of the names that they use. Those that serve
/// until they are told to end are left to the tests of what they show.
#[test]
fn every_example_of_a_plugin_or_filter_works() {
    if nbdkit_differs("its pages come apart from the program") {
        return;
    }
    let room = Room::new();
    fs::create_dir(room.path("bin")).expect("the room is empty");
    std::os::unix::fs::symlink(server_path(), room.path("bin/nbdcaptive")).expect("there is no such file yet");
    let path = format!("{}:/usr/bin:/usr/sbin:/bin:/sbin", room.path("bin").display());
    room.write("lzip.py", LZIP_PROGRAM);
    let files = "mkdir images
        truncate -s 1M disk.img && printf hello | dd of=disk.img conv=notrunc bs=4096 seek=3
        cp disk.img new.img && cp disk.img images/one.img && cp disk.img images/two.img
        gzip -k disk.img && bzip2 -k disk.img && xz -k disk.img && tar -cf data.tar disk.img
        /usr/bin/python3 lzip.py 0 < disk.img > disk.img.lz
        printf '0x0 + 1\\n0x0 0x80000 +\\n0x80000 0x80000 -\\n' > disk.map";
    let mut ran = 0;
    for page in pages(&room) {
        let name = page.file_stem().expect("pages have names").to_string_lossy().into_owned();
        if !name.ends_with("-plugin") && !name.ends_with("-filter") {
            continue;
        }
        let text = fs::read_to_string(&page).expect("it was written");
        let blocks = text.split("\n.EX\n").skip(1).filter_map(|rest| rest.split("\n.EE").next());
        for block in blocks.map(unescaped) {
            // A script that the example that follows runs.
            if !block.contains("nbdcaptive ") {
                room.script("disk.sh", format!("#!/bin/sh\n{block}\n"));
                continue;
            }
            if block.contains("nbdcaptive -f ") {
                continue;
            }
            let fresh = format!("rm -rf images *.img* data.tar; {{ {files}; }} 2>/dev/null; set -e; {block}");
            let mut launch = room.tool("bash", ["-c", &fresh]);
            let output = launch.env("PATH", &path).run();
            assert_eq!(output.status.code(), Some(0), "{name}: {block}: {output:?}");
            ran += 1;
        }
    }
    assert!(ran > 50, "{ran}");
    room.assert_nothing_left();
}

/// A line of an example as it was before it was written for roff.
fn unescaped(text: &str) -> String {
    let signs = [
        ("\\(ti", "~"),
        ("\\(ha", "^"),
        ("\\(ga", "`"),
        ("\\(aq", "'"),
        ("\\(dq", "\""),
        ("\\-", "-"),
        ("\\&", ""),
        ("\\e", "\\"),
    ];
    signs.iter().fold(text.to_owned(), |text, (escape, sign)| text.replace(escape, sign))
}

#[test]
fn help_fits_a_terminal_for_every_plugin_and_filter() {
    if nbdkit_differs("its help knows no parameters") {
        return;
    }
    let room = Room::new();
    let mut lines = vec![vec!["--help".to_owned()]];
    for entry in plugins::ALL {
        lines.push(vec![entry.about.name.to_owned(), "--help".to_owned()]);
        lines.push(vec!["--help".to_owned(), entry.about.name.to_owned()]);
    }
    for entry in filters::ALL {
        lines.push(vec![format!("--filter={}", entry.about.name), "null".to_owned(), "--help".to_owned()]);
    }
    for line in lines {
        let output = room.server(&line).run_to(0);
        assert!(output.text().contains("Examples:"), "{line:?}");
        for said in output.text().lines() {
            assert!(said.chars().count() <= 80, "{line:?}: {said:?}");
        }
    }
}

#[test]
fn a_page_that_is_not_there_is_an_error_that_says_where_to_look() {
    if nbdkit_differs("its pages come apart from the program") {
        return;
    }
    let room = Room::new();
    for line in [&["--man", "no-such-page"][..], &["--man=no-such-page"]] {
        room.server(line).run_to(1).expect_error_line(&["no-such-page", "--man"]);
    }
    assert_eq!(room.server(["--man=file"]).run_to(0).stdout, room.server(["--man", "file"]).run_to(0).stdout);
}

static PLUGIN: About = About {
    name: "sample",
    summary: "a plugin for this test

        It is described in a paragraph, and has an example.

        # Examples

        One gibibyte:

            nbdcaptive sample 1G
        ",
    parameters: &[
        nbdcaptive::layer::Parameter {
            key: "size",
            value: "<SIZE>",
            help: "size of the disk

                What else there is to say of it:

                - one thing
                - and another
                ",
            required: true,
        },
        nbdcaptive::layer::Parameter {
            key: "mode",
            value: "fast|safe|<NAME>",
            help: "what matters more",
            required: false,
        },
    ],
    thread_model: ThreadModel::Parallel,
    magic_key: Some("size"),
    dump: &[],
};
static FILTER: About = About {
    name: "exitlast",
    summary: "end when the last client has left",
    parameters: &[],
    thread_model: ThreadModel::Parallel,
    magic_key: None,
    dump: &[],
};

/// As they are read. The lists of plugins and filters are short, so that another one changes nothing here.
#[test]
fn pages_read_well() {
    if nbdkit_differs("its pages come apart from the program") {
        return;
    }
    let room = Room::new();
    let manual = Manual { plugins: vec![&PLUGIN], filters: vec![&FILTER] };
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../../snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    for name in ["nbdcaptive", "nbdcaptive-captive", "nbdcaptive-sample-plugin", "nbdcaptive-exitlast-filter"] {
        let pages = manual.pages();
        let page = pages.iter().find(|page| page.name == name).expect("there is such a page").roff();
        let file = room.write("page.1", page);
        let words = ["-Tutf8", "-Owidth=78"].map(Path::new);
        let output = room.tool("mandoc", words.into_iter().chain([file.as_path()])).run_to(0);
        let text = plain(output.text()).replace(env!("CARGO_PKG_VERSION"), "[...]");
        settings.bind(|| insta::assert_snapshot!(format!("man-{name}"), text));
    }
}

//! nbd-client, which speaks for the kernel: it negotiates, and hands the socket over.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;

use super::*;
use crate::harness::free_port;

/// The device that it connects, where the kernel has one.
const DEVICE: &str = "/dev/nbd0";

/// Over TCP, its own way to find a server.
#[test]
fn lists_the_exports() {
    for no_sr in [&[][..], &["--no-sr"]] {
        let room = Room::new();
        fs::create_dir(room.path("images")).expect("a directory in the room");
        ["one", "two", "three"].iter().for_each(|name| drop(room.write(&format!("images/{name}"), [1; 4096])));
        let port = free_port();
        let mut launch = room.server(["-f", "-i", "127.0.0.1", "-p", &port]);
        let server = launch.args(no_sr).args(["file", "dir=images"]).start();
        crate::harness::wait_for("the server to listen", || {
            std::net::TcpStream::connect(("127.0.0.1", port.parse().expect("a port"))).ok()
        });
        let output = room.tool("nbd-client", ["-l", "127.0.0.1", &port]).run_to(0);
        let mut names: Vec<&str> = output.text().lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        names.retain(|line| !line.starts_with("Negotiation"));
        names.sort_unstable();
        assert_eq!(names, ["one", "three", "two"], "{output:#?}");
        server.signal(nix::sys::signal::Signal::SIGTERM);
        server.finish().expect(0);
        room.assert_nothing_left();
    }
}

#[test]
fn connects_a_device_of_the_kernel() {
    if !fs::metadata(DEVICE).is_ok_and(|device| device.file_type().is_block_device()) {
        // Not by eprintln, which the test harness keeps to itself where a test passes.
        let _ = writeln!(io::stderr(), "SKIPPED: nbd-client connects no device: {DEVICE} is missing (modprobe nbd)");
        return;
    }
    for replies in [Replies::Structured, Replies::Simple] {
        for plugin in [Plugin::Memory, Plugin::File] {
            let export = Case { plugin, replies }.serve(IMAGE);
            image_file(&export.room);
            export
                .shell(&format!(
                    "
                    PATH=$PATH:/usr/sbin:/sbin
                    nbd-client -unix \"$socket\" {DEVICE} -name any
                    trap 'nbd-client -d {DEVICE}' EXIT
                    dd if=image of={DEVICE} bs=64k oflag=direct conv=fsync 2> log
                    dd if={DEVICE} of=out bs=64k iflag=direct 2> log
                    cmp image out"
                ))
                .run_to(0);
            export.assert_content(&image(), "dd to the kernel's device");
            // The kernel's client knows simple replies only.
            assert!(!export.end_with_errors().contains("error:"));
        }
    }
}

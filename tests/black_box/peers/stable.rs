//! What `NBD_FLAG_CAN_MULTI_CONN`, flush and `NBD_CMD_FLAG_FUA` promise, as a client can rely on it and as strace sees it.
//!
//! "the effects of NBD_CMD_FLUSH and NBD_CMD_FLAG_FUA MUST be visible across all connections when the server sends its reply";
//! "A server MUST NOT reply to a command that has NBD_CMD_FLAG_FUA set in its command flags until the data (if any) written
//! by that command is persisted to non-volatile storage"

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;
use crate::harness::{Running, server_path};
use crate::raw_client::*;

for_each_case! {
    a_write_is_seen_by_all_connections_at_once
    a_flush_of_one_connection_is_for_the_writes_of_all
}

fn connections(export: &Served) -> Vec<Client> {
    let connect = |number: usize| match export.case.structured() && number.is_multiple_of(2) {
        true => export.server.structured(),
        false => export.server.simple(),
    };
    (0..8).map(connect).collect()
}

/// Of every size, also of those that go ways of their own, and of writes, zeroes and trims.
fn a_write_is_seen_by_all_connections_at_once(case: Case) {
    let export = case.serve(IMAGE);
    let mut clients = connections(&export);
    for (round, length) in [1, 511, 4096, 65_537, 300_000, 3 << 20].into_iter().enumerate() {
        // All connections may write all sizes; two of them, one of each kind, are enough for the large ones.
        let writers = if length > 100_000 { 2 } else { clients.len() };
        for writer in 0..writers {
            let offset = round as u64 * MIB + writer as u64;
            let written = data(length, offset);
            assert_eq!(clients[writer].write(0, offset, &written), NBD_SUCCESS);
            for reader in &mut clients {
                assert_same(&reader.read(offset, length), &written, "a write on another connection");
            }
            let kind = if writer % 2 == 0 { NBD_CMD_WRITE_ZEROES } else { NBD_CMD_TRIM };
            let half = length.div_ceil(2);
            assert_eq!(clients[writer].ask(kind, 0, offset, half).error, NBD_SUCCESS);
            let first = clients[writer].read(offset, length);
            if kind == NBD_CMD_WRITE_ZEROES {
                assert!(first[..half as usize].iter().all(|&byte| byte == 0));
            }
            for reader in &mut clients {
                assert_same(&reader.read(offset, length), &first, "zeroes on another connection");
            }
        }
    }
    clients.into_iter().for_each(Client::disconnect);
    let _ = export.end_with_errors();
}

/// The server is killed right after the flush. Of a memory disk nothing can outlive that, so there the other connections
/// and those that come later are asked.
fn a_flush_of_one_connection_is_for_the_writes_of_all(case: Case) {
    let export = case.serve(IMAGE);
    let mut clients = connections(&export);
    let mut expected = vec![0; IMAGE as usize];
    let lengths = [1, 700, 4096, 100_000, 1 << 20, (1 << 20) + 1, 3000, 65_536];
    for (number, length) in lengths.into_iter().enumerate() {
        let offset = number as u64 * 2 * MIB + 77;
        let written = data(length, offset);
        expected[offset as usize..][..written.len()].copy_from_slice(&written);
        assert_eq!(clients[number].write(0, offset, &written), NBD_SUCCESS);
    }
    let flusher = clients.last_mut().expect("there are eight");
    assert_eq!(flusher.ask(NBD_CMD_FLUSH, 0, 0, 0).error, NBD_SUCCESS);
    if case.plugin == Plugin::Memory {
        drop(clients);
        export.assert_content(&expected, "a flush");
        return;
    }
    export.server.running.signal(Signal::SIGKILL);
    export.server.running.finish().expect_signal(Signal::SIGKILL);
    let content = fs::read(export.room.path("disk")).expect("the disk is there");
    assert_same(&content, &expected, "a flush and SIGKILL");
    drop(clients);
}

/// A server on a file whose system calls are watched, or fail.
struct Traced {
    room: Room,
    strace: Running,
    socket: PathBuf,
}

impl Traced {
    fn serve(faults: &[&str], arguments: &[&str]) -> Traced {
        const CALLS: &str = "trace=fdatasync,fsync,sync_file_range,pwritev2,fallocate,write,writev,sendto,sendmsg";
        let room = Room::new();
        fs::File::create(room.path("disk")).and_then(|file| file.set_len(IMAGE)).expect("a sparse file");
        let socket = room.path("socket");
        let mut launch = room.tool("strace", ["-f", "-qqq", "-xx", "-s", "32", "-o", "calls", "-e", CALLS]);
        for fault in faults {
            launch.args(["-e", fault]);
        }
        launch.args([server_path()]).args(["-f", "-U"]).args([&socket]).args(arguments);
        let mut strace = launch.start();
        strace.wait_until_listening(&socket);
        Traced { room, strace, socket }
    }

    fn client(&self, structured: bool) -> Client {
        let mut client = Client::connect(&self.socket);
        client.start();
        if structured {
            client.ask_for_structured_replies();
        }
        client.go(b"");
        client
    }

    /// Ends the server; what its system calls were, in the order in which they began or, if that was later, ended.
    fn end(self) -> String {
        let all = self.room.server_processes();
        // It has a process of its own beside it.
        let server = all.iter().find(|one| one.parent == self.strace.pid()).expect("the server is there");
        kill(Pid::from_raw(server.pid), Signal::SIGTERM).expect("it has not ended");
        self.strace.finish().expect(0);
        fs::read_to_string(self.room.path("calls")).expect("strace wrote it")
    }
}

/// For each reply to a request, whether the disk was waited for between the reply before it and this one.
fn synced_before_replies(calls: &str) -> Vec<bool> {
    // The magic of a simple reply, of a chunk, and of an extended one.
    const MAGICS: [&str; 3] = [r#""\x67\x44\x66\x98"#, r#""\x66\x8e\x33\xef"#, r#""\x6e\x8a\x27\x8c"#];
    const WAITED: [&str; 4] = ["fdatasync(", "fsync(", "fdatasync resumed", "fsync resumed"];
    let mut synced = false;
    let mut replies = Vec::new();
    for line in calls.lines() {
        let done = line.trim_end().ends_with("= 0");
        if MAGICS.iter().any(|magic| line.contains(magic)) {
            replies.push(std::mem::take(&mut synced));
        } else if done && WAITED.iter().any(|call| line.contains(call)) || line.contains("RWF_DSYNC") {
            synced = true;
        }
    }
    replies
}

/// Small, over several pages, and so large that it is received and written in another way.
const LENGTHS: [usize; 3] = [512, 200_000, 3 << 20];

fn fua_waits_for_the_disk(structured: bool) {
    for (faults, arguments) in [
        (&[][..], &["file", "disk"][..]),
        (&[], &["file", "disk", "cache=none"]),
        // Zeroes have to be written.
        (&["inject=fallocate:error=EOPNOTSUPP"], &["file", "disk"]),
    ] {
        let server = Traced::serve(faults, arguments);
        let mut client = server.client(structured);
        let mut asked = Vec::new();
        for fua in [0, NBD_CMD_FLAG_FUA] {
            for length in LENGTHS {
                let offset = 4 * MIB;
                assert_eq!(client.write(fua, offset, &data(length as u64, 1)), NBD_SUCCESS);
                asked.push(("write", fua, length));
                for (name, kind, flags) in [
                    ("write zeroes", NBD_CMD_WRITE_ZEROES, 0),
                    ("write zeroes, no hole", NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE),
                    ("trim", NBD_CMD_TRIM, 0),
                ] {
                    assert_eq!(client.ask(kind, flags | fua, offset, length as u64).error, NBD_SUCCESS, "{name}");
                    asked.push((name, fua, length));
                }
            }
        }
        client.disconnect();
        let calls = server.end();
        let synced = synced_before_replies(&calls);
        assert_eq!(synced.len(), asked.len(), "a reply to each: {calls}");
        for ((name, fua, length), synced) in asked.into_iter().zip(synced) {
            // "If the command does not in fact write data (for instance on an NBD_CMD_TRIM in a situation where the command
            // as a whole is ignored), the server MAY ignore this bit"
            let ignored = name == "trim" && !faults.is_empty();
            assert!(
                synced == (fua != 0) || ignored,
                "{name} of {length}, FUA {fua}, {arguments:?} with {faults:?}: {calls}"
            );
        }
    }
}

#[test]
fn fua_waits_for_the_disk_before_a_simple_reply() {
    fua_waits_for_the_disk(false);
}

#[test]
fn fua_waits_for_the_disk_before_a_structured_reply() {
    fua_waits_for_the_disk(true);
}

#[test]
fn a_flush_on_another_connection_waits_for_the_disk() {
    let server = Traced::serve(&[], &["file", "disk"]);
    let [mut writer, mut other, mut flusher] = [true, false, true].map(|structured| server.client(structured));
    assert_eq!(writer.write(0, 0, &data(100_000, 1)), NBD_SUCCESS);
    assert_eq!(flusher.ask(NBD_CMD_FLUSH, 0, 0, 0).error, NBD_SUCCESS);
    assert_eq!(other.write(0, MIB, &data(100, 1)), NBD_SUCCESS);
    // One that has written nothing itself, and whose last flush is recent.
    assert_eq!(flusher.ask(NBD_CMD_FLUSH, 0, 0, 0).error, NBD_SUCCESS);
    assert_eq!(flusher.ask(NBD_CMD_FLUSH, 0, 0, 0).error, NBD_SUCCESS);
    [writer, other, flusher].into_iter().for_each(Client::disconnect);
    let calls = server.end();
    let replies = synced_before_replies(&calls);
    assert_eq!(replies[..4], [false, true, false, true], "{calls}");
}

/// QEMU and libnbd ask in their own ways. The replies that come first, and whether the disk was waited for before each.
#[test]
fn the_flushes_of_real_clients_reach_the_disk() {
    for (command, expected) in [
        ("qemu-io -f raw -t writeback -c 'write -q -P 1 0 4k' -c flush \"$uri\"", &[false, true][..]),
        ("qemu-io -f raw -t writeback -c 'write -q -f -P 1 0 4k' \"$uri\"", &[true]),
        ("qemu-io -f raw -t writeback -c 'write -q -f -z 0 4k' \"$uri\"", &[true]),
        ("qemu-io -f raw -t writethrough -c 'write -q -P 1 0 4k' \"$uri\"", &[true]),
        ("head -c 4096 /dev/zero | tr '\\0' x > part; nbdcopy --flush part \"$uri\"", &[false, true]),
        (
            "fio --name=x --ioengine=nbd --uri=\"$uri\" --rw=write --size=64k --fsync=4 --output=log",
            &[false, false, false, false, true],
        ),
    ] {
        let server = Traced::serve(&[], &["file", "disk"]);
        let mut launch = server.room.tool("sh", ["-ec", command]);
        launch.env("uri", format!("nbd+unix:///?socket={}", server.socket.display())).run_to(0);
        let calls = server.end();
        assert!(synced_before_replies(&calls).starts_with(expected), "{command}: {calls}");
    }
}

/// A disk that fails when it is waited for: who asked for stable storage hears of it, and who did not does not.
#[test]
fn a_failure_of_the_disk_reaches_who_asked_for_stable_storage() {
    const NBD_EIO: u32 = 5;
    let server = Traced::serve(&["inject=fdatasync,fsync:error=EIO"], &["file", "disk"]);
    for structured in [false, true] {
        let mut client = server.client(structured);
        for length in LENGTHS {
            let written = data(length as u64, 3);
            assert_eq!(client.write(0, 0, &written), NBD_SUCCESS);
            assert_eq!(client.write(NBD_CMD_FLAG_FUA, 0, &written), NBD_EIO, "{length}");
        }
        for kind in [NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM] {
            assert_eq!(client.ask(kind, 0, 0, 4096).error, NBD_SUCCESS);
            assert_eq!(client.ask(kind, NBD_CMD_FLAG_FUA, 0, 4096).error, NBD_EIO, "command {kind}");
        }
        assert_eq!(client.ask(NBD_CMD_FLUSH, 0, 0, 0).error, NBD_EIO);
        client.expect_alive();
        client.disconnect();
    }
}

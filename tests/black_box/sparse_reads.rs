//! Reads of what is not there: holes come as `NBD_REPLY_TYPE_OFFSET_HOLE` to clients that can take them, and all clients get
//! the same bytes. That chunks lie in the request, do not overlap, cover it, and end with the one that says so is checked by
//! `raw_client.rs` for every read. Source: NBD proto.md "Structured reply types", `NBD_CMD_READ`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;

use super::harness::{Room, Server, nbdkit_differs};
use super::protocol::pattern;
use super::raw_client::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// What the memory plugin takes and gives back at a time.
const PAGE: u64 = 32 * KIB;
/// The shortest hole that is worth a chunk of its own.
const MIN_HOLE: u64 = 4 * KIB;
const ZERO: u64 = 2;

/// A server, unless it is nbdkit, which sends no holes.
fn serve(room: &Room, arguments: &[&str]) -> Option<Server> {
    (!nbdkit_differs("it sends no holes")).then(|| room.serve(arguments))
}

/// The kinds of sessions that holes can be sent to.
fn clients(server: &Server) -> [Client; 2] {
    [server.structured(), server.extended()]
}

/// A read and its reply, with the content in the order of the disk.
#[track_caller]
fn read(client: &mut Client, flags: u16, offset: u64, length: u64) -> Reply {
    let mut reply = client.ask(NBD_CMD_READ, flags, offset, length);
    assert_eq!(reply.error, NBD_SUCCESS, "read of {length} at {offset}");
    reply.content.sort();
    for (number, content) in reply.content.iter().enumerate() {
        assert!(!content.is_hole || content.length >= MIN_HOLE, "a hole that is hardly one: {:?}", reply.content);
        // "the server SHOULD use chunks with lengths and offsets as an integer multiple of 512 bytes, where possible"
        assert!(number == 0 || content.offset % 512 == 0, "chunks begin at sectors: {:?}", reply.content);
    }
    reply
}

fn hole(offset: u64, length: u64) -> Content {
    Content { offset, length, is_hole: true }
}

fn data(offset: u64, length: u64) -> Content {
    Content { offset, length, is_hole: false }
}

mod memory {
    use super::*;

    #[test]
    fn what_was_never_written_is_one_hole() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "100M"]) else { return };
        for mut client in clients(&server) {
            for (offset, length) in [(0, 64 * KIB), (0, 64 * MIB), (MIB, 16 * KIB), (99 * MIB, MIB), (0, 100 * KIB)] {
                let reply = read(&mut client, 0, offset, length);
                assert_eq!(reply.content, [hole(offset, length)]);
                assert!(reply.data.iter().all(|&byte| byte == 0));
            }
        }
    }

    #[test]
    fn holes_between_data_are_holes_and_data_is_data() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "16M"]) else { return };
        let islands = [(2, 1), (5, 3), (20, 2)];
        for (page, pages) in islands {
            let island = pattern((pages * PAGE) as usize, page);
            assert_eq!(server.simple().write(0, page * PAGE, &island), NBD_SUCCESS);
        }
        for mut client in clients(&server) {
            let reply = read(&mut client, 0, 0, MIB);
            let wanted = [
                hole(0, 2 * PAGE),
                data(2 * PAGE, PAGE),
                hole(3 * PAGE, 2 * PAGE),
                data(5 * PAGE, 3 * PAGE),
                hole(8 * PAGE, 12 * PAGE),
                data(20 * PAGE, 2 * PAGE),
                hole(22 * PAGE, 10 * PAGE),
            ];
            assert_eq!(joined(&reply), wanted);
            assert!(reply.data == server.simple().read(0, MIB));
            // From the middle of a hole to the middle of data.
            let reply = read(&mut client, 0, PAGE + 100, PAGE + 200);
            assert_eq!(joined(&reply), [hole(PAGE + 100, PAGE - 100), data(2 * PAGE, 300)]);
            let reply = read(&mut client, 0, 2 * PAGE + 512, 2 * PAGE);
            assert_eq!(joined(&reply), [data(2 * PAGE + 512, PAGE - 512), hole(3 * PAGE, PAGE + 512)]);
            // All data.
            let reply = read(&mut client, 0, 5 * PAGE, 3 * PAGE);
            assert_eq!(joined(&reply), [data(5 * PAGE, 3 * PAGE)]);
        }
    }

    /// The content with neighbours of one kind as one: data may come in several chunks.
    fn joined(reply: &Reply) -> Vec<Content> {
        let mut joined: Vec<Content> = Vec::new();
        for content in &reply.content {
            match joined.last_mut() {
                Some(last) if last.is_hole == content.is_hole && !last.is_hole => last.length += content.length,
                _ => joined.push(*content),
            }
        }
        joined
    }

    #[test]
    fn a_short_hole_is_data() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "16M"]) else { return };
        assert_eq!(server.simple().write(0, PAGE, &pattern(PAGE as usize, 1)), NBD_SUCCESS);
        for mut client in clients(&server) {
            for length in [1, 511, 512, MIN_HOLE - 1] {
                assert_eq!(read(&mut client, 0, 0, length).content, [data(0, length)]);
                // What lies in the request counts, not how long the hole is.
                let reply = read(&mut client, 0, PAGE - length, 2 * length);
                assert!(reply.content.iter().all(|content| !content.is_hole), "{:?}", reply.content);
                assert!(reply.data == server.simple().read(PAGE - length, 2 * length));
            }
            let short = read(&mut client, 0, PAGE - MIN_HOLE + 512, PAGE);
            assert_eq!(short.content.iter().filter(|content| content.is_hole).count(), 0, "{:?}", short.content);
            let long_enough = read(&mut client, 0, PAGE - MIN_HOLE, PAGE);
            assert_eq!(long_enough.content[0], hole(PAGE - MIN_HOLE, MIN_HOLE));
        }
    }

    /// "If the area being read contains both data and a hole, the server MUST use NBD_REPLY_TYPE_OFFSET_DATA"
    #[test]
    fn a_read_with_df_is_one_chunk_of_data() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "100M"]) else { return };
        for page in (1..64).step_by(2) {
            assert_eq!(server.simple().write(0, page * PAGE, &pattern(PAGE as usize, page)), NBD_SUCCESS);
        }
        for mut client in clients(&server) {
            for (offset, length) in [(0, 64 * KIB), (100, 2 * MIB), (PAGE, 1), (0, 64 * MIB), (64 * MIB, 64 * KIB)] {
                let reply = read(&mut client, NBD_CMD_FLAG_DF, offset, length);
                assert_eq!(reply.content, [data(offset, length)]);
                assert!(reply.data == client.read(offset, length));
            }
        }
    }

    #[test]
    fn what_is_trimmed_or_zeroed_is_a_hole_again() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "16M"]) else { return };
        for mut client in clients(&server) {
            for kind in [NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES] {
                assert_eq!(client.write(0, 0, &pattern(MIB as usize, 1)), NBD_SUCCESS);
                assert!(read(&mut client, 0, 0, MIB).content.iter().all(|content| !content.is_hole));
                assert_eq!(client.ask(kind, 0, 0, MIB).error, NBD_SUCCESS);
                assert_eq!(read(&mut client, 0, 0, MIB).content, [hole(0, MIB)]);
            }
        }
    }

    /// A hole in a reply is one in block status: zeroes, at least.
    #[test]
    fn holes_are_what_block_status_says() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "16M"]) else { return };
        for page in [0, 1, 7, 100, 101, 102, 300, 511] {
            assert_eq!(server.simple().write(0, page * PAGE, &[0xaa; PAGE as usize]), NBD_SUCCESS);
        }
        for mut client in clients(&server) {
            let holes: Vec<Content> =
                read(&mut client, 0, 0, 16 * MIB).content.into_iter().filter(|content| content.is_hole).collect();
            let mut zeroes = Vec::new();
            let mut offset = 0;
            for (length, flags) in client.blocks(0, 0, 16 * MIB) {
                if flags & ZERO != 0 {
                    zeroes.push(hole(offset, length));
                }
                offset += length;
            }
            assert_eq!(holes, zeroes);
        }
    }

    #[test]
    fn a_client_without_structured_replies_gets_the_zeroes() {
        let room = Room::new();
        let server = room.serve(["--no-sr", "memory", "16M"]);
        let mut client = server.simple();
        assert_eq!(client.write(0, PAGE, b"data"), NBD_SUCCESS);
        let reply = client.ask(NBD_CMD_READ, 0, 0, MIB);
        assert_eq!((reply.error, reply.content.len()), (NBD_SUCCESS, 0));
        let mut wanted = vec![0; MIB as usize];
        wanted[PAGE as usize..PAGE as usize + 4].copy_from_slice(b"data");
        assert!(reply.data == wanted);
    }

    /// "MUST NOT [...] overlap with [...] any earlier content or error chunk"; a read that cannot be done has none of them.
    #[test]
    fn a_read_past_the_end_has_no_content() {
        let room = Room::new();
        let Some(server) = serve(&room, &["memory", "16M"]) else { return };
        for mut client in clients(&server) {
            let reply = client.ask(NBD_CMD_READ, 0, 16 * MIB - 64 * KIB, 65 * KIB);
            assert_eq!((reply.error, reply.content.len()), (NBD_EINVAL, 0));
            client.expect_alive();
        }
    }

    /// Random requests on a small disk, with a copy of it to compare with, in each kind of session.
    #[test]
    fn all_kinds_of_sessions_read_the_same() {
        const SIZE: u64 = 4 * MIB;
        let room = Room::new();
        let server = room.serve(["memory", "4M"]);
        let mut model = vec![0; SIZE as usize];
        let mut sessions = vec![server.simple(), server.structured()];
        if !nbdkit_differs("it has no extended headers") {
            sessions.push(server.extended());
        }
        let mut state = 0x1234_5678_9abc_def1_u64;
        let mut below = |limit: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % limit
        };
        for turn in 0..3000 {
            let offset = below(SIZE);
            let short = [1, 512, 5000, PAGE, MIB, SIZE][below(6) as usize];
            let length = (1 + below(short)).min(SIZE - offset);
            // As often on whole sectors and pages.
            let align = [1, 512, 4096, PAGE][below(4) as usize];
            let (offset, end) = (offset / align * align, (offset + length).next_multiple_of(align).min(SIZE));
            let range = offset as usize..end as usize;
            let session = below(sessions.len() as u64) as usize;
            let client = &mut sessions[session];
            match below(8) {
                0 => {
                    let bytes = pattern(range.len(), turn);
                    assert_eq!(client.write(0, offset, &bytes), NBD_SUCCESS);
                    model[range].copy_from_slice(&bytes);
                }
                1 => {
                    let no_hole = [0, NBD_CMD_FLAG_NO_HOLE][below(2) as usize];
                    assert_eq!(client.ask(NBD_CMD_WRITE_ZEROES, no_hole, offset, end - offset).error, NBD_SUCCESS);
                    model[range].fill(0);
                }
                2 => {
                    assert_eq!(client.ask(NBD_CMD_TRIM, 0, offset, end - offset).error, NBD_SUCCESS);
                    // "a client MUST NOT make any assumptions about the contents": whatever it is, all see the same.
                    let now = client.read(offset, end - offset);
                    model[range].copy_from_slice(&now);
                }
                _ => {
                    let df = client.export.flags & NBD_FLAG_SEND_DF != 0 && below(4) == 0;
                    let reply = client.ask(NBD_CMD_READ, if df { NBD_CMD_FLAG_DF } else { 0 }, offset, end - offset);
                    assert_eq!(reply.error, NBD_SUCCESS);
                    assert!(reply.data == model[range], "turn {turn}: read of {} at {offset}", end - offset);
                }
            }
        }
    }

    /// Chunks of one reply with writes in between: each byte is one that was there at some time.
    #[test]
    fn reads_are_whole_while_others_write_and_trim() {
        let room = Room::new();
        let server = room.serve(["memory", "16M"]);
        thread::scope(|scope| {
            let server = &server;
            scope.spawn(move || {
                let mut client = server.simple();
                for turn in 0..300_u64 {
                    let offset = turn * 7 % 64 * PAGE;
                    assert_eq!(client.write(0, offset, &[0xaa; PAGE as usize]), NBD_SUCCESS);
                    assert_eq!(
                        client.ask(NBD_CMD_TRIM, 0, (offset + 13 * PAGE) % (64 * PAGE), PAGE).error,
                        NBD_SUCCESS
                    );
                }
            });
            for mut client in [server.structured(), server.simple()] {
                scope.spawn(move || {
                    for turn in 0..100 {
                        for _ in 0..4 {
                            client.request(NBD_CMD_READ, 0, turn % 3 * 512, 2 * MIB - 4096, b"");
                        }
                        for _ in 0..4 {
                            let reply = client.next_reply().expect("a reply");
                            assert_eq!(reply.error, NBD_SUCCESS);
                            assert!(reply.data.iter().all(|byte| [0, 0xaa].contains(byte)));
                        }
                    }
                });
            }
        });
    }
}

mod null {
    use super::*;

    #[test]
    fn everything_is_a_hole() {
        let room = Room::new();
        let Some(server) = serve(&room, &["null", "8191P"]) else { return };
        for mut client in clients(&server) {
            for (offset, length) in [(0, 64 * MIB), (1, 65536), ((8191 << 50) - 64 * MIB, 64 * MIB), (1 << 60, 4096)] {
                assert_eq!(read(&mut client, 0, offset, length).content, [hole(offset, length)]);
            }
            assert_eq!(read(&mut client, NBD_CMD_FLAG_DF, 0, 65536).content, [data(0, 65536)]);
        }
    }
}

mod file {
    use super::*;

    /// A file with data where it says, and holes in units of 64 KiB elsewhere.
    fn sparse(room: &Room, size: u64, islands: &[(u64, u64)]) -> Vec<u8> {
        let path = room.path("disk");
        let file = File::create(&path).expect("a file in the room");
        file.set_len(size).expect("room for holes");
        let mut bytes = vec![0; size as usize];
        for &(offset, length) in islands {
            let island = pattern(length as usize, offset);
            file.write_all_at(&island, offset).expect("room for data");
            bytes[offset as usize..(offset + length) as usize].copy_from_slice(&island);
        }
        // Some file systems know where data is only when it has been written out.
        file.sync_all().expect("the file can be written out");
        bytes
    }

    #[test]
    fn holes_of_the_file_are_holes() {
        let room = Room::new();
        let islands = [(MIB, 128 * KIB), (3 * MIB, 64 * KIB), (8 * MIB - 64 * KIB, 64 * KIB)];
        let bytes = sparse(&room, 8 * MIB, &islands);
        let Some(server) = serve(&room, &["file", "disk"]) else { return };
        for mut client in clients(&server) {
            let reply = read(&mut client, 0, 0, 8 * MIB);
            assert!(reply.data == bytes);
            let holes: Vec<_> = reply.content.iter().copied().filter(|content| content.is_hole).collect();
            let end = 3 * MIB + 64 * KIB;
            let gaps = [hole(0, MIB), hole(MIB + 128 * KIB, 2 * MIB - 128 * KIB), hole(end, 5 * MIB - 128 * KIB)];
            assert_eq!(holes, gaps);
            assert_eq!(read(&mut client, 0, 64 * KIB, 64 * KIB).content, [hole(64 * KIB, 64 * KIB)]);
            assert_eq!(read(&mut client, NBD_CMD_FLAG_DF, 0, 8 * MIB).content, [data(0, 8 * MIB)]);
            for (offset, length) in [(1, 2 * MIB), (MIB - 4096, 4097), (MIB + 100, 65536), (0, 65535), (2 * MIB, 512)] {
                let reply = read(&mut client, 0, offset, length);
                assert!(reply.data == bytes[offset as usize..(offset + length) as usize], "{length} at {offset}");
            }
        }
    }

    /// The last sector is not whole, and in a hole.
    #[test]
    fn a_file_may_end_anywhere() {
        let room = Room::new();
        for size in [MIB + 1, MIB + 511, 2 * MIB - 1] {
            let bytes = sparse(&room, size, &[(0, 64 * KIB)]);
            let Some(server) = serve(&room, &["file", "disk"]) else { return };
            for mut client in clients(&server) {
                let whole = client.export.size;
                let reply = read(&mut client, 0, 0, whole);
                assert!(reply.data[..size as usize] == bytes);
                let reply = read(&mut client, 0, 333, size - 333);
                assert!(reply.data == bytes[333..]);
            }
            server.terminate().expect(0);
        }
    }

    #[test]
    fn what_clients_write_trim_and_zero_changes_the_holes() {
        let room = Room::new();
        sparse(&room, 4 * MIB, &[]);
        let Some(server) = serve(&room, &["file", "disk"]) else { return };
        for mut client in clients(&server) {
            assert_eq!(client.ask(NBD_CMD_WRITE_ZEROES, 0, 0, 4 * MIB).error, NBD_SUCCESS);
            let island = pattern(256 * KIB as usize, 5);
            assert_eq!(client.write(NBD_CMD_FLAG_FUA, MIB, &island), NBD_SUCCESS);
            let reply = read(&mut client, 0, 0, 4 * MIB);
            let is_data = |content: &&Content| !content.is_hole;
            let written: u64 = reply.content.iter().filter(is_data).map(|content| content.length).sum();
            assert_eq!(written, 256 * KIB, "{:?}", reply.content);
            assert!(reply.data[MIB as usize..][..256 * KIB as usize] == island);
            assert_eq!(client.ask(NBD_CMD_TRIM, 0, MIB, 256 * KIB).error, NBD_SUCCESS);
            assert_eq!(client.ask(NBD_CMD_FLUSH, 0, 0, 0).error, NBD_SUCCESS);
            assert!(read(&mut client, 0, 0, 4 * MIB).data.iter().all(|&byte| byte == 0));
        }
    }

    /// A client has asked for all of a file and has been sent so much of it that its socket is full when the file becomes shorter.
    /// Only data of 64 KiB and more is sent from the file.
    fn cut_while_it_is_sent(room: &Room, client: &mut Client) -> File {
        client.request(NBD_CMD_READ, 0, 0, SIZE, b"");
        client.await_reply();
        let file = File::options().write(true).open(room.path("disk")).expect("the file is there");
        file.set_len(CUT).expect("the file can be cut");
        file
    }

    fn expect_the_cut(room: &Room, islands: &[(u64, u64)], client: &mut Client) {
        let file = cut_while_it_is_sent(room, client);
        // As it was, for the next client.
        let reply = client.next_reply();
        file.set_len(SIZE).expect("the file can be made longer");
        for &(offset, length) in islands {
            file.write_all_at(&pattern(length as usize, offset), offset).expect("room for data");
        }
        let reply = reply.expect("a reply");
        assert_eq!(reply.error, 5, "{}", reply.message);
        assert!(reply.message.contains("the file ended while it was read"), "{}", reply.message);
    }

    const SIZE: u64 = 16 * MIB;
    /// More than a socket holds.
    const CUT: u64 = 4 * MIB;

    /// The reply has begun, with chunks of data, and ends with an error: the client and its other requests are served on.
    #[test]
    fn a_file_that_is_cut_while_it_is_sent_is_an_error() {
        let room = Room::new();
        for islands in [&[(0, SIZE)][..], &[(0, 6 * MIB), (7 * MIB, MIB), (9 * MIB, 7 * MIB)]] {
            let bytes = sparse(&room, SIZE, islands);
            let Some(server) = serve(&room, &["file", "disk"]) else { return };
            for mut client in clients(&server) {
                // Where the data is gets known.
                assert!(read(&mut client, 0, 0, SIZE).data == bytes);
                expect_the_cut(&room, islands, &mut client);
                assert!(read(&mut client, 0, 0, SIZE).data == bytes);
                assert!(read(&mut client, NBD_CMD_FLAG_DF, 0, SIZE).data == bytes);
            }
            let said = server.terminate().expect(0).stderr;
            assert_eq!(
                said.lines().filter(|line| line.contains("the file ended while it was read")).count(),
                2,
                "{said}"
            );
        }
    }

    /// A simple reply has no place for an error once it has begun: "the server MUST immediately initiate a hard disconnect; it MUST
    /// NOT send any further data". Others are not concerned.
    #[test]
    fn a_file_that_is_cut_while_it_is_sent_ends_a_simple_session() {
        let room = Room::new();
        sparse(&room, SIZE, &[(0, SIZE)]);
        let Some(server) = serve(&room, &["file", "disk"]) else { return };
        let (mut client, mut other) = (server.simple(), server.simple());
        other.read(0, SIZE);
        cut_while_it_is_sent(&room, &mut client);
        let mut received = 0;
        while client.reads_on() {
            received += 1;
        }
        assert!(received > 0);
        other.expect_alive();
        assert_eq!(other.ask(NBD_CMD_READ, 0, SIZE - MIB, MIB).error, 5);
        other.expect_alive();
    }

    /// Somebody else may punch holes into the file while it is read: each page is what it was or what it became.
    #[test]
    fn holes_that_appear_while_it_is_read_are_harmless() {
        let room = Room::new();
        sparse(&room, 4 * MIB, &[]);
        let file = File::options().write(true).open(room.path("disk")).expect("the file was just made");
        let server = room.serve(["file", "disk"]);
        let mut client = server.structured();
        thread::scope(|scope| {
            let (file, client) = (&file, &mut client);
            scope.spawn(move || {
                for turn in 0..160_u64 {
                    let offset = turn * 5 % 16 * 256 * KIB;
                    file.write_all_at(&[0xbb; 256 * KIB as usize], offset).expect("room for data");
                    if turn % 16 == 15 {
                        file.set_len(2 * MIB).expect("the file can be cut");
                        file.set_len(4 * MIB).expect("and made longer");
                    }
                }
            });
            for _ in 0..20 {
                let reply = client.ask(NBD_CMD_READ, 0, 0, 4 * MIB);
                // A file that is shorter for a moment may be an error, which the client hears of; it is no end.
                assert!([NBD_SUCCESS, 5].contains(&reply.error), "{reply:?}");
                assert!(reply.data.iter().all(|byte| [0, 0xbb].contains(byte)));
            }
        });
        client.expect_alive();
    }
}

mod programs {
    use super::*;

    /// libnbd takes structured replies with holes, qemu extended ones.
    #[test]
    fn copies_of_sparse_disks_are_the_disk() {
        let room = Room::new();
        let server = room.serve(["memory", "64M"]);
        let mut client = server.simple();
        for number in 0..40 {
            let offset = number * 1_500_007 % (63 * MIB);
            assert_eq!(client.write(0, offset, &pattern(1 + (number * 9973) as usize % 90_000, number)), NBD_SUCCESS);
        }
        let whole = client.read(0, 64 * MIB);
        let uri = server.uri();
        room.tool("nbdcopy", [uri.as_str(), "by-libnbd"]).run_to(0);
        room.tool("qemu-img", ["convert", "-f", "raw", "-O", "raw", &uri, "by-qemu"]).run_to(0);
        for copy in ["by-libnbd", "by-qemu"] {
            assert!(std::fs::read(room.path(copy)).expect("the copy is there") == whole, "{copy}");
        }
    }
}

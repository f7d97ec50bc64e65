//! `-o`: the handshake of before 2013, which libnbd and QEMU still know. After it there are simple replies, and no block status.

use super::*;
use crate::harness::nbdkit_differs;

/// A server with the oldstyle protocol.
fn serve(plugin: Plugin) -> Served {
    let case = Case { plugin, replies: Replies::Simple };
    let room = Room::new();
    let mut arguments = case.arguments(&room, IMAGE);
    arguments.retain(|argument| argument != "--no-sr");
    arguments.insert(0, "-o".to_owned());
    let server = room.serve(arguments);
    Served { room, server, case, size: IMAGE }
}

fn clients_copy_and_verify(plugin: Plugin) {
    if nbdkit_differs("after the old handshake 1.32 offers flush, FUA and write zeroes, and refuses them") {
        return;
    }
    let export = serve(plugin);
    image_file(&export.room);
    export.run(
        "
        nbdinfo --json \"$uri\" > info
        grep -q '\"protocol\": \"oldstyle\"' info && grep -q '\"structured\": false' info
        grep -q '\"export-size\": 16777216' info && grep -q '\"can_multi_conn\": true' info
        grep -q '\"can_fua\": true' info && grep -q '\"can_df\": false' info
        # It tells of no other exports.
        bad nbdinfo --list \"$uri\" 2> log
        qemu-nbd --list -k \"$socket\" > list && grep -q 'size:  16777216' list
        nbdcopy --flush --connections=4 image \"$uri\"
        nbdcopy --connections=4 \"$uri\" out && cmp image out
        qemu-img compare -f raw -F raw image \"$uri\"
        qemu-io -f raw -t writeback -d unmap -c 'write -P 3 5000001 100001' -c 'write -z -u 1M 512k' -c 'discard 12M 1M' \\
            -c 'write -f -P 4 0 1' -c flush -c 'read -P 3 5000001 100001' -c 'read -P 0 1M 512k' \"$uri\" > log
        ! grep -iE 'fail|error' log
        fio --name=verify --ioengine=nbd --uri=\"$uri\" --rw=randwrite --bsrange=512-64k --ba=512 --iodepth=32 --size=4M \\
            --numjobs=4 --offset_increment=4M --verify=crc32c --verify_fatal=1 --output=log",
    );
    // What fio left is overwritten, also by zeroes.
    export.run("qemu-img convert -n -W -f raw -O raw image \"$uri\"; nbdcopy \"$uri\" - | cmp image -");
    assert!(!export.end_with_errors().contains("error:"));
}

#[test]
fn clients_copy_and_verify_in_memory() {
    clients_copy_and_verify(Plugin::Memory);
}

#[test]
fn clients_copy_and_verify_in_a_file() {
    clients_copy_and_verify(Plugin::File);
}

"""Reads with a callback for each chunk, with and without NBD_CMD_FLAG_DF, over data and holes.

chunks.py URI REPLIES [KIND...]: REPLIES is "structured", "simple" (the server has nothing else) or "declined" (the client does
not ask); the chunks of a large read must be of the KINDs "data" and "hole".
"""

import sys

import nbd

uri, replies, *kinds = sys.argv[1:]
structured = replies == "structured"
MIB = 1 << 20

handle = nbd.NBD()
handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
handle.set_request_structured_replies(replies != "declined")
handle.connect_uri(uri)
assert handle.get_structured_replies_negotiated() == structured
assert handle.can_df() == structured
assert handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION) == structured
size = handle.get_size()

seen = set()
image = bytearray(size)
for at, length in [(0, 65536), (MIB, 4096), (2 * MIB + 1, 100000), (5 * MIB, 2 * MIB), (size - 1, 1)]:
    piece = bytes((at + n * 31) % 255 + 1 for n in range(251)) * (length // 251 + 1)
    image[at : at + length] = piece[:length]
    handle.pwrite(image[at : at + length], at)


def read(at, length, flags):
    chunks = []
    seen.clear()

    def chunk(data, offset, status, error):
        assert error.value == 0
        assert status in (nbd.READ_DATA, nbd.READ_HOLE), status
        assert len(data) > 0
        # A hole's data is not zeroed for the callback; its range in the export must be.
        expected = image[offset : offset + len(data)]
        assert not any(expected) if status == nbd.READ_HOLE else data == expected, (offset, len(data), status)
        seen.add("hole" if status == nbd.READ_HOLE else "data")
        chunks.append((offset, len(data)))
        return 0

    data = handle.pread_structured(length, at, chunk, flags)
    assert data == image[at : at + length], (at, length)
    chunks.sort()
    for offset, size in chunks:
        assert offset == at, f"no gap and no overlap: {chunks}"
        at += size
        length -= size
    assert length == 0, chunks
    return len(chunks)


for at, length in [(0, 1), (0, size), (65535, 2), (MIB - 1, 4098), (2 * MIB, 4 * MIB), (5 * MIB, 2 * MIB), (size - 9, 9)]:
    many = read(at, length, 0)
    assert structured or many == 1, many
    if structured:
        assert read(at, length, nbd.CMD_FLAG_DF) == 1
    assert handle.pread(length, at) == image[at : at + length]

read(0, size, 0)
assert not kinds or seen == set(kinds), seen

# The callback's failure is the read's, and the connection goes on.
def refuse(data, offset, status, error):
    error.value = 28
    return -1


try:
    handle.pread_structured(4096, 0, refuse)
    raise SystemExit("the callback's error was lost")
except nbd.Error as error:
    assert error.errnum == 28, error


def blocks(at, length, flags=0):
    entries = []

    def extent(context, offset, pairs, error):
        assert (context, offset) == (nbd.CONTEXT_BASE_ALLOCATION, at)
        entries.extend(zip(pairs[::2], pairs[1::2]))
        return 0

    handle.block_status(length, at, extent, flags)
    return entries


if structured:
    at, covered = 0, []
    while at < size:
        entries = blocks(at, size - at)
        assert entries
        for length, state in entries:
            assert length > 0
            if state & nbd.STATE_ZERO:
                assert not any(image[at : at + length])
            covered.append(state)
            at += length
    assert at == size
    assert nbd.STATE_HOLE | nbd.STATE_ZERO in covered and 0 in covered
    [one] = blocks(0, size, nbd.CMD_FLAG_REQ_ONE)
    assert one[0] <= size and one[1] == 0
else:
    handle.set_strict_mode(0)
    try:
        blocks(0, size)
        raise SystemExit("block status without structured replies")
    except nbd.Error as error:
        assert error.errno == "EINVAL", error

handle.shutdown()

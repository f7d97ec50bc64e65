"""Sends what libnbd would keep to itself; every request has its answer and the connection goes on.

bad.py URI READONLY-URI
"""

import sys

import nbd

MIB = 1 << 20


def connect(uri):
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.set_strict_mode(0)
    handle.connect_uri(uri)
    return handle


def extent(*_):
    return 0


def refused(expected, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errno == expected, (call, arguments, error)
    else:
        raise SystemExit(f"not refused: {call} {arguments}")


handle = connect(sys.argv[1])
size = handle.get_size()
handle.pwrite(b"kept" * 1024, size - 4096)

for at, length in [(size - 5, 10), (size, 1), (size + 1, 1), ((1 << 63) - 1, 512), (1 << 63, 1), ((1 << 64) - 512, 512)]:
    refused("EINVAL", handle.pread, length, at)
    refused("ENOSPC", handle.pwrite, b"x" * length, at)
    refused("ENOSPC", handle.zero, length, at)
    refused("EINVAL", handle.trim, length, at)
    refused("EINVAL", handle.cache, length, at)
    refused("EINVAL", handle.block_status, length, at, extent)
# libnbd takes no reply to a request of which it has not sent all data yet.
refused("ENOSPC", handle.pwrite, b"x" * (8 * MIB), size - 5)
refused("EINVAL", handle.trim, (1 << 32) - 1, 4096)
refused("ENOSPC", handle.zero, (1 << 32) - 1, 4096)

UNKNOWN = 1 << 9
refused("EINVAL", handle.pread, 512, 0, UNKNOWN)
refused("EINVAL", handle.pwrite, b"x" * 512, 0, UNKNOWN)
refused("EINVAL", handle.zero, 512, 0, UNKNOWN)
refused("EINVAL", handle.trim, 512, 0, UNKNOWN)
refused("EINVAL", handle.cache, 512, 0, UNKNOWN)
refused("EINVAL", handle.flush, UNKNOWN)
# Flags of other commands.
refused("EINVAL", handle.pwrite, b"x", 0, nbd.CMD_FLAG_REQ_ONE)
refused("EINVAL", handle.trim, 512, 0, nbd.CMD_FLAG_FAST_ZERO)

# Requests of no length do no harm.
for call in [lambda: handle.pread(0, 0), lambda: handle.pwrite(b"", 0), lambda: handle.zero(0, 0), lambda: handle.trim(0, 0)]:
    try:
        call()
    except nbd.Error as error:
        assert error.errno in ("EINVAL", "ENOSPC"), error

# The longest that libnbd and nbdkit both carry.
longest = bytes(range(1, 256)) * (64 * MIB // 255 + 1)
longest = longest[: 64 * MIB]
handle.pwrite(longest, 3)
assert handle.pread(64 * MIB, 3) == longest

# Bad and good requests in flight together: each has its own answer.
results = {}


def completed(key):
    def callback(error):
        results[key] = error.value
        return 1

    return callback


buffers = [nbd.Buffer(4096) for _ in range(100)]
for number, buffer in enumerate(buffers):
    at = 3 + 255 * number if number % 2 else size - 1
    handle.aio_pread(buffer, at, completed(number))
while handle.aio_in_flight():
    handle.poll(-1)
assert results == {number: 0 if number % 2 else 22 for number in range(100)}, results
assert all(buffer.to_bytearray() == longest[:4096] for buffer in buffers[1::2])

assert handle.pread(4096, size - 4096) == b"kept" * 1024
handle.shutdown()

handle = connect(sys.argv[2])
assert handle.is_read_only()
before = handle.pread(4096, 0)
refused("EPERM", handle.pwrite, b"x", 0)
refused("EPERM", handle.zero, 512, 0)
refused("EPERM", handle.trim, 512, 0)
assert handle.pread(4096, 0) == before
handle.shutdown()

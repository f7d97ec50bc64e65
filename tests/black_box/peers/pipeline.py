"""Keeps many requests in flight on several connections and checks every byte that comes back.

pipeline.py URI SEED: the export may be overwritten. Prints how many requests there were.
"""

import random
import sys

import nbd

CONNECTIONS = 4
DEPTH = 64
uri, seed = sys.argv[1], int(sys.argv[2])
chance = random.Random(seed)

handles = []
for _ in range(CONNECTIONS):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handles.append(handle)
size = handles[0].get_size()
assert handles[0].can_multi_conn()

requests = 0
failures = []


def completed(check=None):
    """A completion that retires its request, and calls check where that went well."""

    def callback(error):
        if error.value != 0:
            failures.append(error.value)
        elif check is not None:
            check()
        return 1

    return callback


def run(jobs):
    """Issues the jobs, each of which takes a handle, in any order with DEPTH of them in flight on each connection."""
    global requests
    chance.shuffle(jobs)
    left = list(jobs)
    while left or any(handle.aio_in_flight() for handle in handles):
        for handle in handles:
            while left and handle.aio_in_flight() < DEPTH:
                left.pop()(handle)
                requests += 1
            if handle.aio_in_flight():
                handle.poll(-1)
    assert not failures, failures


def slots():
    """The export in pieces of one byte to 128 KiB, with no alignment."""
    at = 0
    while at < size:
        length = min(size - at, chance.choice([1, 511, 512, 4096, 4097, 65536, chance.randrange(1, 131072)]))
        yield at, length
        at += length


def write(at, data, flags):
    buffer = nbd.Buffer.from_bytearray(bytearray(data))
    return lambda handle: handle.aio_pwrite(buffer, at, completed(), flags)


def read(at, expected):
    def issue(handle):
        buffer = nbd.Buffer(len(expected))

        def check():
            if buffer.to_bytearray() != expected:
                failures.append(f"{len(expected)} at {at} on {handle.get_handle_name()}")

        handle.aio_pread(buffer, at, completed(check))

    return issue


def zero(at, length, flags):
    return lambda handle: handle.aio_zero(length, at, completed(), flags)


def trim(at, length):
    return lambda handle: handle.aio_trim(length, at, completed())


image = bytearray(chance.randbytes(size))
run([write(at, image[at : at + length], 0) for at, length in slots()])
run([read(at, image[at : at + length]) for at, length in slots()])

# Reads of what stays, among writes, zeroes and trims of the rest.
jobs = []
after = bytearray(image)
trimmed = []
for at, length in slots():
    kind = chance.randrange(5)
    if kind < 2:
        jobs.append(read(at, image[at : at + length]))
    elif kind == 2:
        after[at : at + length] = chance.randbytes(length)
        jobs.append(write(at, after[at : at + length], chance.choice([0, 0, 0, nbd.CMD_FLAG_FUA])))
    elif kind == 3:
        after[at : at + length] = bytes(length)
        jobs.append(zero(at, length, chance.choice([0, nbd.CMD_FLAG_NO_HOLE])))
    else:
        # What a trim leaves is anybody's guess, so it is written again below.
        trimmed.append((at, length))
        jobs.append(trim(at, length))
run(jobs)
run([write(at, after[at : at + length], 0) for at, length in trimmed])
handles[0].flush()
run([read(at, after[at : at + length]) for at, length in slots()])

for handle in handles:
    handle.shutdown()
print(requests)

"""Asks for a flush and then for reads and writes, and prints the order in which they are answered.

order.py URI
"""

import sys

import nbd

handle = nbd.NBD()
handle.connect_uri(sys.argv[1])
order = []


def completed(name):
    def callback(error):
        order.append(name if error.value == 0 else f"{name}: {error.value}")
        return 1

    return callback


written = nbd.Buffer.from_bytearray(bytearray(b"x" * 4096))
handle.aio_flush(completed("flush"))
handle.aio_pwrite(written, 0, completed("write"))
handle.aio_pread(nbd.Buffer(4096), 65536, completed("read"))
while handle.aio_in_flight():
    handle.poll(-1)
handle.shutdown()
print(" ".join(order))

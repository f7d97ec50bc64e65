"""Packs its input as lzip does: lzip.py DATA-SIZE < DATA > DATA.lz, with a member for so many bytes each, or one of all.

Nothing of Debian's that tests need makes such files, but liblzma makes what is in a member. `xz --format=lzip -d` reads it.
"""

import lzma
import struct
import sys
import zlib

DICTIONARY = 20  # The power of two that it has bytes.
FILTERS = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << DICTIONARY, "lc": 3, "lp": 0, "pb": 2}]


def member(data):
    # With the marker at its end that lzip asks for.
    packed = lzma.compress(data, format=lzma.FORMAT_RAW, filters=FILTERS)
    trailer = struct.pack("<IQQ", zlib.crc32(data), len(data), 6 + len(packed) + 20)
    return b"LZIP\x01" + bytes([DICTIONARY]) + packed + trailer


data = sys.stdin.buffer.read()
size = int(sys.argv[1]) or len(data) or 1
for start in range(0, len(data) or 1, size):
    sys.stdout.buffer.write(member(data[start : start + size]))

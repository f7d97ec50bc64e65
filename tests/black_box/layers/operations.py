"""Carries out operations on a server, one per line of stdin, and prints a line for each, so that two servers can be compared.

operations.py URI. A line is a name and its arguments; numbers are bytes. An error is a result as well: its errno.

  info                         size and flags
  blocks                       the smallest and the preferred block, 0 where nothing is said
  list                         the exports
  export NAME                  a new connection, to this export
  read COUNT OFFSET            up to 64 bytes as they are, of more the first and a checksum
  write DATA OFFSET [fua]      DATA: hex digits, or COUNTxHH for COUNT times the byte HH, or copy:COUNT for what is there
  zero COUNT OFFSET [fua] [nohole] [fast]   nbdkit 1.32 dies of a fast zero where it does not offer that
  trim COUNT OFFSET [fua]
  cache COUNT OFFSET
  flush
  extents COUNT OFFSET         the whole map, neighbours of one kind as one
"""

import hashlib
import sys

import nbd

FLAGS = {"fua": nbd.CMD_FLAG_FUA, "nohole": nbd.CMD_FLAG_NO_HOLE, "fast": nbd.CMD_FLAG_FAST_ZERO}
uri = sys.argv[1]


def connect(name=""):
    handle = nbd.NBD()
    # The server is to say no, not the library.
    handle.set_strict_mode(0)
    handle.set_opt_mode(True)
    handle.set_full_info(True)
    handle.add_meta_context("base:allocation")
    handle.connect_uri(uri)
    handle.set_export_name(name)
    handle.opt_go()
    return handle


def exports():
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    found = []
    handle.opt_list(lambda name, description: found.append((name, description)) or 0)
    handle.opt_abort()
    return sorted(found)


def info(handle):
    can = "cache df fast_zero flush fua multi_conn trim zero".split()
    flags = [name for name in can if getattr(handle, "can_" + name)()]
    flags += [name for name in ("read_only", "rotational") if getattr(handle, "is_" + name)()]
    extents = handle.can_meta_context("base:allocation")
    return f"{handle.get_size()} {' '.join(flags)} extents={extents}"


def shown(data):
    data = bytes(data)
    if len(data) <= 64:
        return data.hex()
    return f"{data[:16].hex()}... {hashlib.sha256(data).hexdigest()[:32]}"


def content(handle, word, offset):
    if word.startswith("copy:"):
        return handle.pread(int(word[5:]), offset)
    if "x" in word:
        count, byte = word.split("x")
        return bytes([int(byte, 16)]) * int(count)
    return bytes.fromhex(word)


def extents(handle, count, offset):
    end = offset + count
    runs = []

    def add(context, at, entries, error):
        nonlocal offset
        for length, flags in zip(entries[::2], entries[1::2]):
            # The last may reach past what was asked for.
            length = min(length, end - offset)
            if length == 0:
                continue
            if runs and runs[-1][1] == flags:
                runs[-1][0] += length
            else:
                runs.append([length, flags])
            offset += length
        return 0

    while offset < end:
        before = offset
        handle.block_status(end - offset, offset, add)
        if offset == before:
            return "no extent"
    return " ".join(f"{length}:{flags}" for length, flags in runs)


def operate(handle, name, *arguments):
    flags = sum(FLAGS.get(word, 0) for word in arguments[2:])
    if name == "info":
        return info(handle)
    if name == "blocks":
        return [handle.get_block_size(kind) for kind in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED)]
    if name == "read":
        return shown(handle.pread(int(arguments[0]), int(arguments[1])))
    if name == "write":
        offset = int(arguments[1])
        return handle.pwrite(content(handle, arguments[0], offset), offset, flags)
    if name == "zero":
        return handle.zero(int(arguments[0]), int(arguments[1]), flags)
    if name == "trim":
        return handle.trim(int(arguments[0]), int(arguments[1]), flags)
    if name == "cache":
        return handle.cache(int(arguments[0]), int(arguments[1]))
    if name == "flush":
        return handle.flush()
    if name == "extents":
        return extents(handle, int(arguments[0]), int(arguments[1]))
    raise SystemExit(f"no such operation: {name}")


handle = None
for line in sys.stdin.read().splitlines():
    name, *arguments = line.split()
    if name == "export" and handle is not None:
        if handle.aio_is_ready():
            handle.shutdown()
        handle = None
    try:
        if name == "export":
            handle = connect(*arguments)
            result = None
        elif name == "list":
            result = exports()
        else:
            handle = handle or connect()
            result = operate(handle, name, *arguments)
    except nbd.Error as error:
        # What a refused connection ends with is the library's.
        result = error.errno if handle is not None or name == "list" else "refused"
    print(f"{line}: {'done' if result is None else result}", flush=True)
if handle is not None and handle.aio_is_ready():
    handle.shutdown()

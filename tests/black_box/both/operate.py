"""Does what its arguments say with the export of a URI, and prints what came of it, one line each.

    operate.py URI OPERATION...

    about                        size, flags, block sizes
    read OFFSET LENGTH           write OFFSET LENGTH BYTE [fua]
    zero OFFSET LENGTH [fua] [no_hole] [fast]
    trim OFFSET LENGTH [fua]     cache OFFSET LENGTH     flush
    map [OFFSET LENGTH [one]]    list                    as NAME (another connection, to that export)
"""

import errno
import hashlib
import sys

import nbd

uri, operations = sys.argv[1], sys.argv[2:]
FLAGS = {"fua": nbd.CMD_FLAG_FUA, "no_hole": nbd.CMD_FLAG_NO_HOLE, "fast": nbd.CMD_FLAG_FAST_ZERO, "one": nbd.CMD_FLAG_REQ_ONE}


def connect(name=None):
    h = nbd.NBD()
    # What the server makes of bad requests is of interest, not what the library does.
    h.set_strict_mode(0)
    h.add_meta_context("base:allocation")
    h.set_full_info(True)
    if name is None:
        h.connect_uri(uri)
        return h
    h.set_opt_mode(True)
    h.connect_uri(uri)
    h.set_export_name(name)
    h.opt_go()
    return h


def about(h):
    facts = ["size %d" % h.get_size()]
    for name in ["is_read_only", "is_rotational", "can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero",
                 "can_multi_conn", "can_cache"]:
        if getattr(h, name)():
            facts.append(name)
    facts.append("blocks %d %d %d" % tuple(h.get_block_size(i) for i in range(3)))
    facts.append("extents %s" % h.can_meta_context("base:allocation"))
    facts.append("name %r" % h.get_canonical_export_name())
    try:
        facts.append("description %r" % h.get_export_description())
    except nbd.Error:
        pass
    return ", ".join(facts)


def show(data):
    runs, start = [], 0
    for i in range(1, len(data) + 1):
        if i == len(data) or data[i] != data[start]:
            runs.append("%02x*%d" % (data[start], i - start))
            start = i
    return " ".join(runs) if len(runs) < 40 else "%d bytes %s" % (len(data), hashlib.sha256(data).hexdigest())


def listed():
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(uri)
    found = []
    h.opt_list(lambda name, description: found.append((name, description)))
    h.opt_abort()
    return repr(found)


def operate(h, words):
    numbers = [int(word, 0) for word in words[1:] if word[0].isdigit()]
    flags = sum(FLAGS.get(word, 0) for word in words[1:])
    kind = words[0]
    if kind == "about":
        return about(h)
    if kind == "read":
        return show(h.pread(numbers[1], numbers[0]))
    if kind == "write":
        h.pwrite(bytes([numbers[2]]) * numbers[1], numbers[0], flags)
    elif kind == "zero":
        h.zero(numbers[1], numbers[0], flags)
    elif kind == "trim":
        h.trim(numbers[1], numbers[0], flags)
    elif kind == "cache":
        h.cache(numbers[1], numbers[0])
    elif kind == "flush":
        h.flush()
    elif kind == "map":
        found = []
        numbers = numbers or [0, h.get_size()]
        h.block_status(numbers[1], numbers[0], lambda m, o, entries, e: found.extend(entries) or 0, flags)
        return repr(list(zip(found[::2], found[1::2])))
    elif kind == "list":
        return listed()
    else:
        raise SystemExit("unknown operation " + kind)
    return "done"


h = None
for operation in operations:
    words = operation.split(" ")
    try:
        if words[0] == "as":
            if h is not None:
                h.shutdown()
            h = None
            h = connect(operation[3:])
            result = "connected"
        else:
            if h is None and words[0] != "list":
                h = connect()
            result = operate(h, words)
    except nbd.Error as error:
        result = "failed: %s" % errno.errorcode.get(error.errnum, error.errnum)
    print("%s: %s" % (operation, result))
if h is not None and h.aio_is_ready():
    h.shutdown()

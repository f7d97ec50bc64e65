"""Looks at exports before it chooses one, as a client does that asks its user.

options.py URI REPLIES NAME...: REPLIES is "structured" or "simple"; the server has exports with exactly these names.
"""

import sys

import nbd

uri, structured, names = sys.argv[1], sys.argv[2] == "structured", sys.argv[3:]


def connect():
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.set_full_info(True)
    handle.connect_uri(uri)
    assert handle.aio_is_negotiating()
    return handle


handle = connect()
assert handle.get_protocol() == "newstyle-fixed"
assert handle.get_structured_replies_negotiated() == structured
found = []
handle.opt_list(lambda name, description: found.append(name) or 0)
# In the directory's own order, as nbdkit lists them.
assert sorted(found) == sorted(names), found

contexts = []
handle.add_meta_context("base:")
if structured:
    handle.set_export_name(names[0])
    handle.opt_list_meta_context(lambda name: contexts.append(name) or 0)
    assert contexts == ["base:allocation"], contexts
handle.clear_meta_contexts()
handle.add_meta_context("base:allocation")
handle.add_meta_context("x-nobody:knows")

for name in names:
    handle.set_export_name(name)
    handle.opt_info()
    assert handle.get_size() == 4096 * len(name.encode()), (name, handle.get_size())
    assert handle.get_canonical_export_name() == name
    assert handle.can_meta_context("base:allocation") == structured
    assert not handle.can_meta_context("x-nobody:knows")

handle.set_export_name("no such export")
for option in [handle.opt_info, handle.opt_go]:
    try:
        option()
        raise SystemExit("an export that is not there")
    except nbd.Error as error:
        assert error.errno in ("ENOENT", "EINVAL"), error
    assert handle.aio_is_negotiating()

handle.set_export_name(names[-1])
handle.opt_go()
assert handle.aio_is_ready()
assert handle.pread(handle.get_size(), 0) == names[-1].encode() * 4096
handle.shutdown()

handle = connect()
handle.opt_abort()
assert handle.aio_is_closed()

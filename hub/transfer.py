"""Moving a file's bytes: read once, and in that one pass hashed, checked and written, each in a thread of its own."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Protocol

from surgery.source import Source

# Large enough that handing a chunk over costs nothing beside its bytes, small enough to stay in the cache.
CHUNK = 2 << 20

# fallocate(2): python's own os.posix_fallocate makes the file longer, and writes zeros where the kernel cannot.
_KEEP_SIZE = 1
_PIECE = 256 << 10

Sink = Callable[[memoryview], object]


class Hasher(Protocol):
    """What `hashlib.new` returns."""

    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


def pump(source: Source, sinks: Sequence[Sink], advance: Callable[[int], None], begin: int = 0) -> None:
    """Hand the bytes of `source` from `begin` on to every sink, in order, each sink in one thread at a time.

    Reading goes on while the sinks work. `advance` is told how many bytes have passed, and may raise to stop.
    """
    size = source.size
    if size - begin <= CHUNK:
        view = memoryview(bytearray(size - begin))
        if view:
            source.read_into(begin, view)
            for sink in sinks:
                sink(view)
        advance(len(view))
        return
    buffers = [memoryview(bytearray(CHUNK)) for _ in range(2)]
    with ThreadPoolExecutor(len(sinks), thread_name_prefix="transfer") as pool:
        working: list[Future[object]] = []
        for number, offset in enumerate(range(begin, size, CHUNK)):
            view = buffers[number % 2][: min(CHUNK, size - offset)]
            source.read_into(offset, view)
            for done in working:
                done.result()
            working = [pool.submit(sink, view) for sink in sinks]
            advance(len(view))
        for done in working:
            done.result()


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data` where the descriptor is.

    In small pieces: for a large one Linux looks for page cache in as large pieces, and finds memory that was never used
    before; on a virtual machine each page of that costs ten times a page that is used again.
    """
    for begin in range(0, len(data), _PIECE):
        view = data[begin : begin + _PIECE]
        while view:
            view = view[os.write(descriptor, view) :]


def reserve(descriptor: int, size: int) -> None:
    """Reserve space for a file that is going to have `size` bytes, without making it longer.

    The file then lies in one piece, its pages take less time to write, and a full disk is known at once. Where
    the file system cannot, nothing happens. Raises `OSError` where there is no room.
    """
    fallocate = getattr(_libc(), "fallocate", None)
    if fallocate is None or size < CHUNK:
        return
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
    if fallocate(descriptor, _KEEP_SIZE, 0, size) and (number := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(number, os.strerror(number))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def git_blob(size: int) -> Hasher:
    """A hasher whose digest is the id git gives to a file of `size` bytes."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def lfs_pointer_oid(sha256: str, size: int) -> str:
    """The id git gives to the pointer that stands for a file kept in LFS. Source: the git-lfs specification, v1."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    hasher = git_blob(len(text))
    hasher.update(memoryview(text))
    return hasher.hexdigest()

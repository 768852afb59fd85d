"""The SHA-256 of a file whose parts come in another order than its own, as they do where several threads read it.

What comes before its turn waits: a little in memory, and the rest in a file that nobody else sees. Its length is the
distance between the threads, and it is read from the page cache mostly.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from pathlib import Path

# Parts that wait in memory; these are blocks that are held for reading anyway.
MEMORY_BYTES = 8 << 20
# And on the disk: beyond this the file is read in an order that has nothing to do with its own, and there is no hash.
DISK_BYTES = 4 << 30


class Sequential:
    """A hash that is fed parts of a file as they come. Safe to use from several threads.

    Args:
        size: of the file, in bytes.
        folder: for what waits.
        memory: bytes that may wait in memory.
        disk: bytes that may wait in `folder`. Where they are more, or cannot be written, there is no hash.
    """

    def __init__(self, size: int, folder: Path, memory: int = MEMORY_BYTES, disk: int = DISK_BYTES) -> None:
        self._size, self._folder, self._memory, self._disk = size, folder, memory, disk
        self._hasher = hashlib.sha256()
        self._position = 0
        self._waiting: dict[int, bytes | bytearray | tuple[int, int]] = {}
        self._held = 0
        self._spilled: int | None = None
        self._free: list[tuple[int, int]] = []
        self._end = 0
        self._given_up = False
        self._mutex, self._turn = threading.Lock(), threading.Lock()

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_spilled", None)) is not None:
            os.close(descriptor)

    def add(self, begin: int, data: bytes | bytearray) -> None:
        """Take the bytes at `begin`; those that were taken before are passed over."""
        with self._mutex:
            if self._given_up or begin < self._position or begin in self._waiting or not data:
                return
            if begin == self._position or self._held + len(data) <= self._memory:
                self._waiting[begin] = data
                self._held += len(data)
            else:
                self._spill(begin, data)
        # One thread at a time hashes, outside the lock: the others go on fetching.
        while self._turn.acquire(blocking=False):
            try:
                while (part := self._next()) is not None:
                    self._hasher.update(part)
                    with self._mutex:
                        self._position += len(part)
            finally:
                self._turn.release()
            with self._mutex:
                if self._position not in self._waiting:
                    return

    def _next(self) -> bytes | bytearray | None:
        """The part whose turn it is, if it is there."""
        with self._mutex:
            part = self._waiting.pop(self._position, None)
            if not isinstance(part, tuple):
                self._held -= len(part or b"")
                return part
            place, count = part
            self._free.append(part)
            assert self._spilled is not None
            data = bytearray(count)
            try:
                if os.preadv(self._spilled, [data], place) == count:
                    return data
            except OSError:
                pass
            self._give_up()
            return None

    def _spill(self, begin: int, data: bytes | bytearray) -> None:
        place = next((free for free in self._free if free[1] >= len(data)), None)
        if place is not None:
            self._free.remove(place)
        elif self._end + len(data) <= self._disk:
            place = (self._end, len(data))
            self._end += len(data)
        try:
            if place is None:
                raise OSError("too much waits")
            if self._spilled is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._spilled, name = tempfile.mkstemp(dir=self._folder)
                os.unlink(name)
            view, offset = memoryview(data), place[0]
            while view:
                count = os.pwrite(self._spilled, view, offset)
                view, offset = view[count:], offset + count
        except OSError:
            self._give_up()
            return
        self._waiting[begin] = (place[0], len(data))

    def _give_up(self) -> None:
        self._given_up = True
        self._waiting.clear()
        if self._spilled is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._spilled, 0)

    @property
    def digest(self) -> str | None:
        """The hash in hexadecimal, once all bytes have come."""
        with self._mutex:
            done = self._position == self._size and not self._given_up
        return self._hasher.hexdigest() if done else None

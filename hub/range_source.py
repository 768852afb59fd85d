"""A file of a Hub as a `Source`: its header on its own, announced ranges ahead of time, everything else as asked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from surgery.errors import FormatError, IntegrityError
from surgery.hashing import cache_folder
from surgery.hub.ahead import Blocks, Expected, blocks_of, shared_blocks
from surgery.hub.ranges import RangeReader
from surgery.hub.sequential import Sequential
from surgery.source import NotAFile

# A header is fetched on its own, in one request where it is no longer than this.
HEAD_BYTES = 64 << 10


class RangeSource(NotAFile):
    """A file behind an address.

    Attributes:
        read: whether any of it was, beyond its head.
        proved: whether all of it was read, and has the SHA-256 that the Hub gives it.
    """

    def __init__(self, reader: RangeReader, version: str = "", sha256: str = "", blocks: Blocks | None = None) -> None:
        self._reader = reader
        self._version, self._sha256 = version, sha256
        self._blocks = blocks or shared_blocks()
        self._expected = Expected()
        self._head = b""
        self._sum: Sequential | None = None
        self.read = False
        self.proved = False

    @property
    def name(self) -> str:
        return self._reader.name

    @property
    def size(self) -> int:
        return self._reader.size

    @property
    def version(self) -> str:
        return self._version

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._blocks.drop(self._expected)
        skipped = len(self._head)
        self._expected = Expected(blocks_of(ranges, skipped))
        self._sum = None
        ends = [(skipped, skipped), *self._expected.blocks]
        whole = all(before[1] == after[0] for before, after in pairwise(ends))
        if self._sha256 and not self.proved and whole and ends[-1][1] == self.size:
            self._sum = Sequential(self.size, cache_folder() / "waiting")
            if self._head:
                self._sum.add(0, self._head)
            self._compare()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        if offset + len(view) > self.size:
            raise FormatError(f"{self.name} has {self.size} bytes, too few for {len(view)} at {offset}.")
        expected = self._expected
        while view:
            number, border = expected.find(offset)
            count = min(len(view), len(view) if border is None else border - offset)
            if number is not None:
                self._blocks.read(expected, number, offset, view[:count], self._fetch)
                self.read = True
            elif offset + count <= len(self._head) or offset == 0:
                # Nothing but a header lies at the very start: fetch that, and not the weights behind it.
                view[:count] = self._start(offset + count)[offset:]
            else:
                self._reader.read(offset, view[:count])
                self.read = True
            view, offset = view[count:], offset + count

    def _start(self, count: int) -> bytes:
        if count > len(self._head):
            more = bytearray(min(max(count, HEAD_BYTES), self.size) - len(self._head))
            self._reader.read(len(self._head), memoryview(more))
            self._head += more
        return self._head[:count]

    def _fetch(self, begin: int, end: int, patient: bool) -> bytearray:
        data = bytearray(end - begin)
        if patient:
            self._reader.read(begin, memoryview(data))
        else:
            self._reader.read(begin, memoryview(data), tries=1)
        if self._sum is not None:
            self._sum.add(begin, data)
            self._compare()
        return data

    def _compare(self) -> None:
        """Raise `IntegrityError` if all of the file came, and is another than it should be."""
        if self._sum is None or (digest := self._sum.digest) is None:
            return
        if digest != self._sha256:
            raise IntegrityError(
                f"{self.name} has the SHA-256 {digest}, expected {self._sha256}: it was damaged on the way, or where "
                "it is kept; nothing is written."
            )
        self.proved = True

    def check_unchanged(self) -> None:
        self._compare()

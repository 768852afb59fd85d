"""Reading ahead: what a plan is going to read is fetched in blocks before it is asked for, with bounded memory.

Ranges that are read one after the other and lie next to each other become one run, runs are cut into blocks, and while
one block is read, threads fetch the next ones. What was read once is dropped.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

from surgery.errors import SurgeryError

# One request moves this much: small enough to hold many at once, large enough to hide what a request costs.
BLOCK_BYTES = 4 << 20
# Of all files of a process together.
HELD_BYTES = 64 << 20
# Requests under way beside those that somebody waits for.
AHEAD = 3
# A gap between two wanted ranges that is cheaper to fetch than a request of its own.
GAP_BYTES = 16 << 10

# Brings the bytes from begin to end; once, or with patience.
Fetch = Callable[[int, int, bool], bytearray]
Range = tuple[int, int]


def blocks_of(ranges: Iterable[Range], skipped: int = 0, size: int = BLOCK_BYTES, gap: int = GAP_BYTES) -> list[Range]:
    """The blocks to fetch for ranges that are going to be read in this order; no byte is in two of them.

    Args:
        ranges: begin and end of each, in bytes; they may overlap and repeat.
        skipped: bytes at the start of the file that are there already.
        size: of a block at most.
        gap: bytes that nobody wants are fetched along where no more of them lie between two ranges.
    """
    pieces: list[tuple[int, int, int]] = []
    reached = skipped
    for begin, end, order in sorted((begin, end, order) for order, (begin, end) in enumerate(ranges)):
        if end > max(begin, reached):
            pieces.append((order, max(begin, reached), end))
            reached = end
    following = {begin: after for (_, begin, _), (_, after, _) in itertools.pairwise(pieces)}
    runs: list[list[int]] = []
    last = -1
    for _, begin, end in sorted(pieces):
        if runs and following.get(last) == begin and begin - runs[-1][1] <= gap:
            runs[-1][1] = end
        else:
            runs.append([begin, end])
        last = begin
    return [(at, min(at + size, end)) for begin, end in runs for at in range(begin, end, size)]


_serials = itertools.count()


class Expected:
    """The blocks of one file that are going to be read, in their order."""

    def __init__(self, blocks: Sequence[Range] = ()) -> None:
        self.serial = next(_serials)
        self.blocks = blocks
        self.finished: set[int] = set()
        self._sorted = sorted((begin, end, number) for number, (begin, end) in enumerate(blocks))

    def find(self, offset: int) -> tuple[int | None, int | None]:
        """The number of the block at an offset and where it ends; without one None, and where the next one begins."""
        place = bisect_right(self._sorted, offset, key=lambda block: block[0])
        if place and offset < self._sorted[place - 1][1]:
            return self._sorted[place - 1][2], self._sorted[place - 1][1]
        return None, self._sorted[place][0] if place < len(self._sorted) else None


@dataclass
class _Held:
    """A block in memory or on its way; `left` bytes of it have not been read yet."""

    size: int
    left: int
    data: Future[bytearray] = field(default_factory=Future)


class Blocks:
    """Blocks of several files: together at most `limit` bytes, and what somebody is waiting for."""

    def __init__(self, limit: int = HELD_BYTES, ahead: int = AHEAD) -> None:
        self._limit, self._ahead = limit, ahead
        self._held: OrderedDict[tuple[int, int], _Held] = OrderedDict()
        self._mutex = threading.Lock()
        self._pool = ThreadPoolExecutor(max(ahead, 1), thread_name_prefix="fetch")

    @property
    def nbytes(self) -> int:
        return sum(held.size for held in self._held.values())

    def read(self, expected: Expected, number: int, offset: int, view: memoryview, fetch: Fetch) -> None:
        """Fill `view` with the bytes at `offset` of a file, which lie in one block; the next ones are fetched beside.

        Raises what `fetch` does when it has lost patience.
        """
        while True:
            with self._mutex:
                held = self._held.get((expected.serial, number))
                mine = held is None
                if held is None:
                    held = self._hold(expected, number)
                self._held.move_to_end((expected.serial, number))
                for other in self._next(expected, number):
                    self._pool.submit(self._bring, expected, other, self._hold(expected, other), fetch, False)
            if mine:
                self._bring(expected, number, held, fetch, True)
            try:
                data = held.data.result()
                break
            except SurgeryError:
                # Reading ahead tries once. Whoever needs the block tries again with patience.
                if mine:
                    raise
        begin = offset - expected.blocks[number][0]
        view[:] = memoryview(data)[begin : begin + len(view)]
        with self._mutex:
            held.left -= len(view)
            if held.left <= 0:
                self._held.pop((expected.serial, number), None)
                expected.finished.add(number)

    def drop(self, expected: Expected) -> None:
        """Forget what was fetched for a file and not read."""
        with self._mutex:
            for key in [key for key in self._held if key[0] == expected.serial]:
                del self._held[key]

    def _bring(self, expected: Expected, number: int, held: _Held, fetch: Fetch, patient: bool) -> None:
        try:
            held.data.set_result(fetch(*expected.blocks[number], patient))
        except BaseException as error:  # whatever it is, it belongs to whoever waits for the block
            with self._mutex:
                self._held.pop((expected.serial, number), None)
            held.data.set_exception(error)

    def _hold(self, expected: Expected, number: int) -> _Held:
        begin, end = expected.blocks[number]
        excess = self.nbytes + end - begin - self._limit
        for key, other in list(self._held.items()):
            if excess <= 0:
                break
            if other.data.done():
                excess -= other.size
                del self._held[key]
        held = self._held[expected.serial, number] = _Held(end - begin, end - begin)
        return held

    def _next(self, expected: Expected, number: int) -> list[int]:
        """The next blocks that nobody has asked for yet, as far as there is room."""
        found: list[int] = []
        room = self._limit - self.nbytes
        for other in range(number + 1, min(number + 1 + self._ahead, len(expected.blocks))):
            begin, end = expected.blocks[other]
            if (room := room - (end - begin)) < 0:
                break
            if (expected.serial, other) not in self._held and other not in expected.finished:
                found.append(other)
        return found


@cache
def shared_blocks() -> Blocks:
    """Those of this process: what reading ahead takes of its memory does not grow with the number of files."""
    return Blocks()

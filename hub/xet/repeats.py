"""Taking in a xorb without the chunks that are stored already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from surgery.hub.xet.placement import Placement, joined, plain
from surgery.hub.xet.shards import Term
from surgery.hub.xet.xorbs import XorbIndex, make_index

# Fewer chunks in a row than this are stored again: half a megabyte in all likelihood. Each run is fetched by itself.
LEAST_RUN = 8


@dataclass(frozen=True)
class Place:
    """A chunk that is stored: which one of a xorb, whose index is given."""

    index: XorbIndex
    number: int


class Sieve:
    """Hands on the chunks of a xorb that are not stored yet, and knows in the end where each one lies.

    Args:
        write: called with the bytes of chunks that are to be kept, in order.
        find: where a chunk of this hash is stored, if it may be referred to.
    """

    def __init__(self, write: Callable[[memoryview], object], find: Callable[[bytes], Place | None]) -> None:
        self._write = write
        self._find = find
        self._kept: list[bytes] = []
        self._packed_ends: list[int] = []
        self._ends: list[int] = []
        # Where the chunks so far lie; None is the xorb that is being made.
        self._runs: list[tuple[XorbIndex | None, int, int]] = []
        # A run of stored chunks that may still turn out too short, and its bytes.
        self._waiting: list[tuple[bytes, bytes, int]] = []
        self._place: Place | None = None

    def take(self, digest: bytes, packed: memoryview, size: int) -> None:
        """The next chunk: its hash, its bytes with their header, its length unpacked."""
        after = self._following(digest)
        if after is None:
            self._release()
            after = self._find(digest)
        self._place = after
        if after is None:
            self._keep(digest, packed, size)
            return
        if not self._waiting and self._runs and self._runs[-1][0] is after.index and self._runs[-1][2] == after.number:
            self._run(after.index, after.number)
            return
        self._waiting.append((digest, bytes(packed), size))
        if len(self._waiting) == LEAST_RUN:
            self._runs.append((after.index, after.number + 1 - LEAST_RUN, after.number + 1))
            self._waiting.clear()

    def _following(self, digest: bytes) -> Place | None:
        """The chunk after the last one, where that one lies, if it is this."""
        last = self._place
        if last is None or last.number + 1 >= len(last.index) or last.index.hash(last.number + 1) != digest:
            return None
        return Place(last.index, last.number + 1)

    def _release(self) -> None:
        """Keep what waited: the run ended too soon."""
        for digest, packed, size in self._waiting:
            self._keep(digest, memoryview(packed), size)
        self._waiting.clear()

    def _keep(self, digest: bytes, packed: memoryview, size: int) -> None:
        self._write(packed)
        self._run(None, len(self._kept))
        self._kept.append(digest)
        self._packed_ends.append((self._packed_ends[-1] if self._packed_ends else 0) + len(packed))
        self._ends.append((self._ends[-1] if self._ends else 0) + size)

    def _run(self, index: XorbIndex | None, number: int) -> None:
        """One more chunk, which lies here."""
        if self._runs and self._runs[-1][0] is index and self._runs[-1][2] == number:
            self._runs[-1] = (index, self._runs[-1][1], number + 1)
        else:
            self._runs.append((index, number, number + 1))

    def finish(self, index: XorbIndex) -> tuple[XorbIndex | None, Placement]:
        """What was kept, as a xorb of its own (None: nothing), and where all chunks of the whole one lie."""
        self._release()
        if len(self._kept) == len(index):
            return index, plain(index)
        kept = make_index(self._kept, self._packed_ends, self._ends) if self._kept else None
        terms = []
        for stored, begin, end in self._runs:
            place = stored or kept
            assert place is not None
            terms.append(Term(place.digest, begin, end, place.size(begin, end)))
        return kept, Placement(index, joined(terms))

"""Finding chunks that are stored already, so that each is stored once for a namespace, whatever its clients know.

Whatever is going to be named in a recipe or a placement is touched first, within `ChunkIndex.keeping`: nothing is
collected meanwhile, and what was touched then is not collected for a long time after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable

from surgery.errors import FormatError
from surgery.hub.interfaces import Content, ContentMissingError, Incoming
from surgery.hub.server.interfaces import ChunkIndex
from surgery.hub.xet import hashes
from surgery.hub.xet.placement import Placement, plain
from surgery.hub.xet.repeats import Place, Sieve
from surgery.hub.xet.shards import Term
from surgery.hub.xet.xorbs import XorbIndex


def placement_of(content: Content, index: ChunkIndex, digest: bytes) -> Placement:
    """Where the chunks of a xorb lie that somebody sent. Raises `FormatError` where it is lost."""
    return index.placement(digest) or plain(content.open_xorb(digest).index)


def lost(content: Content, terms: Iterable[Term]) -> bool:
    """Whether a xorb is missing that these name."""
    return not all(content.has_xorb(xorb) for xorb in {term.xorb for term in terms})


def touch_xorbs(content: Content, xorbs: Collection[bytes]) -> None:
    """Touch xorbs that are going to be named. Raises `ContentMissingError` where one is not there any more."""
    missing = [hashes.text(xorb) for xorb in sorted(xorbs) if not content.touch_xorb(xorb)]
    if missing:
        raise ContentMissingError(f"{len(missing)} xorbs were removed meanwhile; upload them again.", missing)


class Finder:
    """Where chunks of these holders lie: what `Sieve` asks while a xorb comes in."""

    def __init__(self, content: Content, index: ChunkIndex, holders: Collection[str]) -> None:
        self._content = content
        self._index = index
        self._holders = holders
        self._known: dict[bytes, Placement | None] = {}

    def __call__(self, chunk: bytes) -> Place | None:
        for xorb, number in self._index.places(chunk, self._holders):
            placed = self._placement(xorb)
            if placed is None or number >= len(placed.index) or placed.index.hash(number) != chunk:
                continue
            (term,) = placed.within(number, number + 1)
            if not self._content.has_xorb(term.xorb):
                continue
            with contextlib.suppress(FormatError):  # damaged: the chunk is stored again
                stored = self._content.open_xorb(term.xorb).index
                if term.begin < len(stored) and stored.hash(term.begin) == chunk:
                    return Place(stored, term.begin)
        return None

    def _placement(self, xorb: bytes) -> Placement | None:
        if xorb not in self._known:
            try:
                self._known[xorb] = placement_of(self._content, self._index, xorb)
            except FormatError:  # lost or damaged: the chunks are stored again
                self._known[xorb] = None
        return self._known[xorb]


def keep_xorb(
    content: Content, chunks: ChunkIndex, incoming: Incoming, sieve: Sieve, index: XorbIndex, holders: Collection[str]
) -> None:
    """Keep what is left of a xorb, and record where its chunks lie and whose it is.

    Args:
        content: where xorbs are.
        chunks: who has them.
        incoming: what the sieve let through.
        sieve: that has seen all chunks.
        index: of the whole xorb, proved.
        holders: who sent it.

    Raises:
        ContentMissingError: what it relied on is gone; sent again it will be stored.
    """
    kept, placed = sieve.finish(index)
    known = chunks.placement(index.digest)
    if known is not None:
        placed = known
    elif content.has_xorb(index.digest):
        placed = plain(index)
    elif kept is not None and not content.has_xorb(kept.digest):
        incoming.keep_xorb(kept)
    try:
        with chunks.keeping():
            touch_xorbs(content, {term.xorb for term in placed.terms})
            chunks.hold_xorb(placed, holders)
    except ContentMissingError:
        if known is not None:
            chunks.forget_xorb(index.digest, index)
        raise


def place_all(content: Content, chunks: ChunkIndex) -> None:
    """Record the chunks of xorbs that came in before chunks were recorded."""
    for digest, holders in chunks.unplaced():
        if content.has_xorb(digest):
            chunks.hold_xorb(plain(content.open_xorb(digest).index), holders)

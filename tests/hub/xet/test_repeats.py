"""Chunks that are stored already are not stored again, and every chunk is found where its placement has it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import FormatError
from surgery.hub.xet import hashes, placement
from surgery.hub.xet.placement import Placement, joined
from surgery.hub.xet.recipes import StoredXorb, read_chunks
from surgery.hub.xet.repeats import LEAST_RUN, Place, Sieve
from surgery.hub.xet.shards import Term
from surgery.hub.xet.xorbs import XorbIndex, XorbParser
from surgery.source import BytesSource
from tests.hub.xet_tools import xorb


def made(number: int) -> bytes:
    return random.Random(number).randbytes(50 + number % 7)


class Store:
    """Xorbs in memory, each sent by a client and sifted; where each chunk lies, the first time it came."""

    def __init__(self) -> None:
        self.stored: dict[bytes, StoredXorb] = {}
        self.places: dict[bytes, Place] = {}

    def send(self, chunks: Sequence[bytes], step: int = 1 << 20) -> tuple[Placement, bytes]:
        """Take a xorb in. Returns its placement, and the bytes that were kept."""
        digest, data = xorb(chunks)
        written = bytearray()
        sieve = Sieve(written.extend, self.places.get)
        parser = XorbParser(sieve.take)
        for begin in range(0, len(data), step):
            parser.feed(data[begin : begin + step])
        kept, placed = sieve.finish(parser.finish(digest))
        if kept is not None:
            source = BytesSource("xorb", bytes(written))
            self.stored[kept.digest] = StoredXorb(kept, source)
            for number in range(len(kept)):
                self.places.setdefault(kept.hash(number), Place(kept, number))
        else:
            assert not written
        return placed, bytes(written)

    def read(self, placed: Placement, begin: int, end: int) -> list[bytes]:
        found = []
        for term in placed.within(begin, end):
            chunks = [bytes(data) for _, data in read_chunks(self.stored[term.xorb], term.begin, term.end)]
            assert term.size == sum(map(len, chunks))
            found += chunks
        return found


runs = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 25)), min_size=1, max_size=5)


@given(st.lists(runs, min_size=1, max_size=5), st.integers(1, 400), st.data())
def test_any_xorb_is_read_as_it_was_sent(sent: list[list[tuple[int, int]]], step: int, data: st.DataObject) -> None:
    store = Store()
    for parts in sent:
        chunks = [made(number) for begin, count in parts for number in range(begin, begin + count)]
        placed, _ = store.send(chunks, step)
        assert placed.index.chunks(0, len(chunks)) == [(hashes.chunk_hash(data), len(data)) for data in chunks]
        assert store.read(placed, 0, len(chunks)) == chunks
        begin = data.draw(st.integers(0, len(chunks) - 1))
        end = data.draw(st.integers(begin + 1, len(chunks)))
        assert store.read(placed, begin, end) == chunks[begin:end]
        assert placement.check(placed, lambda digest: store.stored[digest].index)
        assert placement.decode(placed.index, placement.encode(placed)) == placed
        # Whatever lies elsewhere lies there in long runs: there are never many more parts than runs that were stored.
        elsewhere = [term for term in placed.terms if term.xorb != placed.index.digest]
        assert len(elsewhere) <= 2 * len(chunks) / LEAST_RUN + 1


def test_what_is_stored_is_not_stored_again() -> None:
    store = Store()
    first = [made(number) for number in range(100)]
    placed, written = store.send(first)
    assert placed == placement.plain(placed.index)
    assert written == xorb(first)[1]
    new = [made(number) for number in range(200, 210)]
    mixed, written = store.send([*first[20:60], *new, *first[60:100]])
    assert written == xorb(new)[1]
    (old,), fresh = store.stored.keys() - {xorb(new)[0]}, xorb(new)[0]
    assert [(t.xorb, t.begin, t.end) for t in mixed.terms] == [(old, 20, 60), (fresh, 0, 10), (old, 60, 100)]
    # All of it.
    again, written = store.send(first[10:50])
    assert (written, [(t.xorb, t.begin, t.end) for t in again.terms]) == (b"", [(old, 10, 50)])


def test_short_runs_are_stored_again() -> None:
    store = Store()
    first = [made(number) for number in range(100)]
    store.send(first)
    parts = [[*first[begin : begin + LEAST_RUN - 1], made(1000 + begin)] for begin in range(0, 90, 10)]
    chunks = [chunk for part in parts for chunk in part]
    placed, written = store.send(chunks)
    assert written == xorb(chunks)[1]
    assert placed == placement.plain(placed.index)
    # One chunk more, and they are not.
    _, written = store.send([made(2000), *first[50 : 50 + LEAST_RUN], made(2001)])
    assert written == xorb([made(2000), made(2001)])[1]


def test_a_wrong_placement_is_found() -> None:
    store = Store()
    first, _ = store.send([made(number) for number in range(30)])
    placed, _ = store.send([made(number) for number in range(5, 25)])
    (term,) = placed.terms
    shifted = Placement(placed.index, (Term(term.xorb, term.begin + 1, term.end + 1, term.size),))
    assert not placement.check(shifted, lambda digest: store.stored[digest].index)
    beyond = Placement(placed.index, (Term(term.xorb, term.begin + 20, term.end + 20, term.size),))
    assert not placement.check(beyond, lambda digest: store.stored[digest].index)
    text = placement.encode(placed)
    for damaged in (
        text[:-1],
        b"[]",
        b"{}",
        b"[[1,2,3,4]]",
        text.replace(b",5,", b",6,"),
        b"[" + text[1:-1] * 2 + b"]",
    ):
        with pytest.raises(FormatError, match=r"What is known of the xorb .* is damaged"):
            placement.decode(placed.index, damaged)
    assert first.index.digest == term.xorb


terms = st.lists(
    st.builds(Term, st.sampled_from([b"a" * 32, b"b" * 32]), st.integers(0, 3), st.integers(4, 9), st.just(7))
)


@given(terms)
def test_joining_keeps_the_chunks(given_terms: list[Term]) -> None:
    def chunks(found: Sequence[Term]) -> list[tuple[bytes, int]]:
        return [(term.xorb, number) for term in found for number in range(term.begin, term.end)]

    found = joined(given_terms)
    assert chunks(found) == chunks(given_terms)
    assert sum(term.size for term in found) == sum(term.size for term in given_terms)
    assert all((a.xorb, a.end) != (b.xorb, b.begin) for a, b in itertools.pairwise(found))


@given(st.binary(max_size=300))
def test_garbage_is_no_placement(data: bytes) -> None:
    digest = hashes.chunk_hash(b"x")
    index = XorbIndex(digest, digest, (9,), (1,))
    with pytest.raises(FormatError):
        placement.decode(index, data)

"""Blocks: what is fetched for what is announced, when it is dropped, and the hash of parts out of order."""

from __future__ import annotations

import hashlib
import random
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import InputError
from surgery.hub.ahead import Blocks, Expected, blocks_of
from surgery.hub.sequential import Sequential

RANGES = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)).map(lambda r: (r[0], r[0] + r[1])), max_size=15)


@given(RANGES, st.integers(0, 50), st.integers(1, 40), st.integers(0, 10))
def test_blocks_cover_what_is_wanted_once(ranges: list[tuple[int, int]], skipped: int, size: int, gap: int) -> None:
    """Every byte in one block, none twice, and nothing beside them but gaps that are small enough."""
    blocks = blocks_of(ranges, skipped, size, gap)
    fetched = [byte for begin, end in blocks for byte in range(begin, end)]
    wanted = {byte for begin, end in ranges for byte in range(begin, end)} - {*range(skipped)}
    assert len(fetched) == len({*fetched})
    assert wanted <= {*fetched}
    assert all(0 < end - begin <= size for begin, end in blocks)
    more = sorted({*fetched} - wanted)
    runs = "".join("x" if byte in more else " " for byte in range(300)).split()
    assert all(len(run) <= gap for run in runs)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(0, 10), (10, 20), (20, 35)], [(0, 30), (30, 35)]),
        ([(10, 20), (0, 10)], [(10, 20), (0, 10)]),
        ([(0, 10), (12, 20), (90, 95)], [(0, 20), (90, 95)]),
        # What lies between is read later, on its own.
        ([(0, 10), (12, 20), (10, 12)], [(0, 10), (12, 20), (10, 12)]),
        ([(0, 10), (0, 10), (5, 12)], [(0, 12)]),
    ],
)
def test_neighbours_become_one_request(ranges: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert blocks_of(ranges, 0, 30, 4) == expected


DATA = bytes(range(100))


def test_what_was_read_is_dropped_and_the_next_is_fetched() -> None:
    blocks = Blocks(limit=60, ahead=1)
    fetched: list[tuple[int, int]] = []

    def fetch(begin: int, end: int, patient: bool) -> bytearray:
        fetched.append((begin, end))
        return bytearray(DATA[begin:end])

    expected = Expected(blocks_of([(0, 100)], 0, 20))
    for number in range(5):
        view = bytearray(20)
        blocks.read(expected, number, 20 * number, memoryview(view), fetch)
        assert view == DATA[20 * number : 20 * number + 20]
    assert sorted(fetched) == [(0, 20), (20, 40), (40, 60), (60, 80), (80, 100)]
    assert blocks.nbytes == 0


def test_memory_is_bounded_whatever_is_left_unread() -> None:
    blocks = Blocks(limit=60, ahead=3)
    expected = Expected(blocks_of([(0, 100)], 0, 20))
    for number in (4, 0, 3, 1, 2, 0, 4):
        blocks.read(expected, number, 20 * number, memoryview(bytearray(1)), lambda b, e, _: bytearray(DATA[b:e]))
    deadline = threading.Event()
    while blocks.nbytes > 60 and not deadline.wait(0.01):
        pass
    assert blocks.nbytes <= 60
    blocks.drop(expected)
    assert blocks.nbytes == 0


def test_a_block_that_two_threads_want_is_fetched_once() -> None:
    blocks, expected = Blocks(ahead=0), Expected([(0, 10)])
    begun, go = threading.Event(), threading.Event()

    def slow(begin: int, end: int, patient: bool) -> bytearray:
        begun.set()
        assert go.wait(10)
        return bytearray(b"0123456789")

    def never(begin: int, end: int, patient: bool) -> bytearray:
        raise AssertionError("a second fetch")

    left, right = bytearray(5), bytearray(5)
    first = threading.Thread(target=blocks.read, args=(expected, 0, 0, memoryview(left), slow))
    first.start()
    assert begun.wait(10)
    second = threading.Thread(target=blocks.read, args=(expected, 0, 5, memoryview(right), never))
    second.start()
    go.set()
    first.join()
    second.join()
    assert left + right == b"0123456789"


def test_a_block_that_could_not_be_fetched_is_tried_again() -> None:
    blocks, expected = Blocks(ahead=0), Expected([(0, 4)])

    def fail(begin: int, end: int, patient: bool) -> bytearray:
        raise InputError("no.")

    data = bytearray(4)
    with pytest.raises(InputError):
        blocks.read(expected, 0, 0, memoryview(data), fail)
    blocks.read(expected, 0, 0, memoryview(data), lambda begin, end, patient: bytearray(b"data"))
    assert data == b"data"


@given(
    data=st.binary(max_size=400),
    cuts=st.sets(st.integers(1, 399), max_size=12),
    order=st.randoms(use_true_random=False),
    memory=st.sampled_from([0, 50, 1000]),
    threads=st.integers(1, 3),
)
def test_parts_in_any_order_have_the_hash_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    data: bytes,
    cuts: set[int],
    order: random.Random,
    memory: int,
    threads: int,
) -> None:
    """From memory and from the disk, some parts twice, from several threads."""
    found = Sequential(len(data), tmp_path_factory.getbasetemp() / "waiting", memory)
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    parts = [(begin, data[begin:end]) for begin, end in pairwise(places)]
    parts += parts[:2]
    order.shuffle(parts)

    def feed(number: int) -> None:
        for begin, part in parts[number::threads]:
            found.add(begin, part)

    workers = [threading.Thread(target=feed, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found.digest == hashlib.sha256(data).hexdigest()
    assert not list((tmp_path_factory.getbasetemp() / "waiting").glob("*"))


def test_there_is_no_hash_before_the_end_or_where_too_much_waits(tmp_path: Path) -> None:
    found = Sequential(30, tmp_path, memory=0, disk=10)
    digests = [found.digest]
    for begin, part in ((10, b"x" * 10), (0, b"y" * 10), (20, b"z" * 10)):
        found.add(begin, part)
        digests.append(found.digest)
    assert digests[:-1] == [None] * 3
    assert digests[-1] == hashlib.sha256(b"y" * 10 + b"x" * 10 + b"z" * 10).hexdigest()
    other = Sequential(30, tmp_path, memory=0, disk=10)
    for begin in (20, 10, 0):
        other.add(begin, b"x" * 10)
    assert other.digest is None
    assert Sequential(30, tmp_path / "file" / "none", memory=0).digest is None

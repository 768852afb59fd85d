"""Sorting a few weights at a time: as numpy sorts, and back again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from surgery.ops.lanes import Network


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_columns_are_sorted_as_numpy_sorts_them(lanes: int, data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 40))
    keys = data.draw(arrays.arrays(np.uint8, (lanes, columns)))
    network = Network(lanes, columns)
    for _ in range(2):  # its memory is used again
        network.keys[...] = keys
        network.learn()
        assert np.array_equal(network.keys, -np.sort(-keys.astype(int), axis=0))
        # What goes along with the keys ends where they do, and comes back.
        network.digits[...] = keys
        network.sort()
        assert np.array_equal(network.digits, network.keys)
        network.unsort()
        assert np.array_equal(network.digits, keys)


def test_every_column_of_zeros_and_ones_is_sorted() -> None:
    """A network that sorts these sorts anything (the zero-one principle)."""
    columns = np.arange(1 << 16)
    network = Network(16, columns.size)
    network.keys[...] = columns >> np.arange(16)[:, None] & 1
    network.learn()
    assert (np.diff(network.keys.astype(int), axis=0) <= 0).all()


def test_any_digits_come_back() -> None:
    random = np.random.default_rng(0)
    network = Network(8, 1000)
    network.keys[...] = random.integers(0, 256, (8, 1000))
    network.learn()
    digits = random.integers(0, 256, (8, 1000)).astype(np.uint8)
    network.digits[...] = digits
    network.sort()
    assert not np.array_equal(network.digits, digits)
    assert np.array_equal(np.sort(network.digits, axis=0), np.sort(digits, axis=0))
    network.unsort()
    assert np.array_equal(network.digits, digits)

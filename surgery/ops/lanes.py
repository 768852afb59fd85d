"""Weights sorted by size a few at a time, and put back, by comparisons of whole arrays.

    keys, digits: (lanes, columns) unsigned bytes, lanes a power of two

Each column is sorted by a network of comparators (Batcher's odd-even merge sort), the largest key first, so that lane 0
holds the largest of each column and the last lane the smallest. What a comparator does depends on keys alone, so who
knows the keys can undo it. Taking weights apart into classes would sort them better, but moves each by its index,
which costs ten times as much as an exchange of whole lanes under a mask: those are a few instructions for 64 weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Network:
    """The comparators for (lanes, columns) of keys, and the memory that they work in.

    Attributes:
        keys: what to sort by; `learn` sorts them, and keeps which comparators exchanged their two sides.
        digits: what `sort` moves as the keys were moved, and `unsort` moves back.
    """

    def __init__(self, lanes: int, columns: int) -> None:
        import numpy as np

        self.keys = np.empty((lanes, columns), np.uint8)
        self.digits = np.empty((lanes, columns), np.uint8)
        spare = np.empty((lanes // 2, columns), np.uint8)
        # Views are made once: each takes as long as comparing some thousand bytes.
        self._layers = [
            _Layer(*sides, *moved, np.empty(sides[0].shape, np.uint8), _like(sides[0], spare))
            for sides, moved in zip(_layers(self.keys), _layers(self.digits), strict=True)
        ]

    def learn(self) -> None:
        import numpy as np

        for layer in self._layers:
            np.less(layer.upper, layer.lower, out=layer.mask.view(bool))
            np.maximum(layer.upper, layer.lower, out=layer.spare)
            np.minimum(layer.upper, layer.lower, out=layer.lower)
            np.copyto(layer.upper, layer.spare)

    def sort(self) -> None:
        for layer in self._layers:
            layer.exchange()

    def unsort(self) -> None:
        for layer in reversed(self._layers):
            layer.exchange()


@dataclass(frozen=True)
class _Layer:
    """Both sides of a layer of comparators, among the keys and among the digits, as views of these."""

    upper: np.ndarray
    lower: np.ndarray
    left: np.ndarray
    right: np.ndarray
    mask: np.ndarray
    spare: np.ndarray

    def exchange(self) -> None:
        import numpy as np

        change = self.spare
        np.bitwise_xor(self.left, self.right, out=change)
        np.multiply(change, self.mask, out=change)
        np.bitwise_xor(self.left, change, out=self.left)
        np.bitwise_xor(self.right, change, out=self.right)


def _like(side: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """As much of some memory as one side of a layer takes, in its shape."""
    return memory.reshape(-1)[: side.size].reshape(side.shape)


def _layers(array: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The two sides of each layer of comparators, as views of `array`.

    Blocks of p sorted lanes are merged to blocks of 2p: first lanes p apart are compared, then, for k = p/2 down to 1,
    those k apart that are not in the same half of a block of 2k.
    """
    lanes, columns = array.shape
    merged = 1
    while merged < lanes:
        blocks = array.reshape(lanes // (2 * merged), 2, merged, columns)
        yield blocks[:, 0], blocks[:, 1]
        apart = merged // 2
        while apart:
            blocks = array.reshape(lanes // (2 * merged), 2 * merged // apart, apart, columns)
            yield blocks[:, 1:-1:2], blocks[:, 2::2]
            apart //= 2
        merged *= 2

"""Which items make up each forward pass, and the tensors of one. All of it follows from the seed: nothing to save.

B: rows of a batch     n: tokens of its longest row
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from surgery.training.examples import Examples
from surgery.training.text import UNSAID

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Schedule:
    """The order of a run: epochs of shuffled items, in forward passes, in steps.

    As transformers' Trainer has it, a step does not reach into the next epoch: the last step of an epoch has fewer
    forward passes if need be, and its last forward pass fewer rows.

    Attributes:
        items: in the data.
        batch: rows of a forward pass over all processes together.
        accumulation: forward passes to a step.
        seed: of the order.
    """

    items: int
    batch: int
    accumulation: int
    seed: int

    @property
    def passes_per_epoch(self) -> int:
        return math.ceil(self.items / self.batch)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.passes_per_epoch / self.accumulation)

    def epoch(self, step: int) -> float:
        """How many times the data have been gone through before a step."""
        whole, part = divmod(step, self.steps_per_epoch)
        return whole + part * self.accumulation / self.passes_per_epoch

    def window(self, step: int) -> list[list[int]]:
        """The items of each forward pass of a step, zero-based."""
        epoch, part = divmod(step, self.steps_per_epoch)
        order = _order(self.items, self.seed, epoch)
        first = part * self.accumulation
        last = min(first + self.accumulation, self.passes_per_epoch)
        return [list(order[number * self.batch : (number + 1) * self.batch]) for number in range(first, last)]


@lru_cache(maxsize=2)
def _order(items: int, seed: int, epoch: int) -> tuple[int, ...]:
    import torch

    key = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest(), "little") >> 1
    return tuple(torch.randperm(items, generator=torch.Generator().manual_seed(key)).tolist())


def share(rows: Sequence[int], process: int, processes: int) -> list[int]:
    """The rows of a batch that one of several processes takes: contiguous, as even as can be."""
    bounds = [len(rows) * number // processes for number in (process, process + 1)]
    return list(rows[bounds[0] : bounds[1]])


def text_batch(examples: Examples, items: Sequence[int], padding: int, packed: bool) -> Batch:
    """Token ids, labels and mask of some items, padded on the right.

    Packed rows have no mask: `position_ids` that begin again at 0 tell transformers where each piece begins, and
    attention stays within it. Padding of such a row is a piece of its own.

    Returns:
        `input_ids`, `labels` and `attention_mask` or `position_ids`, int64 [B, n]; for sequence-to-sequence models
        `labels` is [B, m].
    """
    rows = [[examples.piece(int(piece)) for piece in examples.items[item]] for item in items]
    ids = [np.concatenate([piece[0] for piece in row]) for row in rows]
    labels = [np.concatenate([piece[1] for piece in row]) for row in rows]
    made = {"input_ids": _padded(ids, padding), "labels": _padded(labels, UNSAID)}
    if packed:
        width = made["input_ids"].shape[1]
        made["position_ids"] = np.stack([_positions([len(piece[0]) for piece in row], width) for row in rows])
    else:
        made["attention_mask"] = _padded([np.ones(len(row), np.int64) for row in ids], 0)
    return _tensors(made)


def label_batch(examples: Examples, items: Sequence[int], padding: int, number: bool) -> Batch:
    """Token ids, mask and one label each: a class, int64 [B], or a number, float32 [B]."""
    rows = [int(examples.pieces[examples.items[item][0], 0]) for item in items]
    ids = [examples.piece(int(examples.items[item][0]))[0] for item in items]
    labels = np.array([examples.encoded[row]["label"] for row in rows], np.float32 if number else np.int64)
    mask = _padded([np.ones(len(row), np.int64) for row in ids], 0)
    return _tensors({"input_ids": _padded(ids, padding), "attention_mask": mask, "labels": labels})


def _positions(lengths: Sequence[int], width: int) -> np.ndarray:
    pieces = [np.arange(length) for length in lengths]
    rest = width - sum(lengths)
    return np.concatenate([*pieces, np.arange(rest)]) if rest else np.concatenate(pieces)


def _padded(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    filled = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for number, row in enumerate(rows):
        filled[number, : len(row)] = row
    return filled


def _tensors(arrays: dict[str, np.ndarray]) -> Batch:
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}

"""Examples as the loop takes them: encoded, cut to length, packed into rows, and counted.

An *item* is what takes one row of a batch: one piece of an example, or under packing several. A *piece* is a stretch of
tokens `start` to `stop` of an encoded example.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import InputError, OptionError
from surgery.hashing import new_hash
from surgery.training.options import TrainOptions
from surgery.training.reading import Rows, quiet_datasets
from surgery.training.text import UNSAID, Encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Goes into the name of the cached tokens: encoders of another version give others.
_VERSION = 2
_BATCH = 256


@dataclass(frozen=True)
class Examples:
    """What to train or to evaluate on.

    Attributes:
        rows: where the examples come from.
        encoded: a row for each example: `input_ids` and perhaps `labels`, lists of integers; or an image and its label.
        pieces: int64 [P, 3]: example, start and stop of each piece.
        counts: int64 [P]: how many predictions of a piece the loss is about.
        items: for each item the indices of its pieces.
        shifted: whether a token's label is foretold from the tokens before it.
        longer: examples that were longer than they may be.
        truncated: of them, those that were cut.
        skipped: examples left out.
    """

    rows: Rows
    encoded: Any = field(repr=False)
    pieces: NDArray[np.int64] = field(repr=False)
    counts: NDArray[np.int64] = field(repr=False)
    items: Sequence[NDArray[np.int64]] = field(repr=False)
    shifted: bool = False
    longer: int = 0
    truncated: int = 0
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def count(self, items: Sequence[int]) -> int:
        """The predictions that the loss on some items is about."""
        return int(sum(self.counts[self.items[item]].sum() for item in items))

    def size(self, items: Sequence[int]) -> int:
        """The tokens of some items, padding not counted."""
        return int(sum((self.pieces[self.items[i], 2] - self.pieces[self.items[i], 1]).sum() for i in items))

    def places(self, items: Sequence[int]) -> list[str]:
        """Where the examples of some items lie."""
        return [self.rows.place(int(row)) for item in items for row in self.pieces[self.items[item], 0]]

    def piece(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens and the labels of a piece."""
        row, start, stop = (int(value) for value in self.pieces[index])
        found = self.encoded[row]
        ids = np.asarray(found["input_ids"][start:stop], dtype=np.int64)
        labels = found.get("labels")
        if labels is None:
            labels = ids.copy()
        else:
            labels = np.asarray(labels[start:stop] if self.shifted else labels, dtype=np.int64)
        if self.shifted and len(labels):
            labels[0] = UNSAID  # nothing comes before it, in a packed row neither
        return ids, labels

    def select(self, items: Sequence[int]) -> Examples:
        """Some of the items."""
        return replace(self, items=[self.items[item] for item in items])


def image_examples(rows: Rows, labels: Callable[[Any], float]) -> Examples:
    """Examples of images. `labels` gives an image's label, or raises `ValueError` with what is wrong with it."""
    for row, value in enumerate(rows.dataset["label"]):
        try:
            labels(value)
        except ValueError as error:
            raise InputError(f"{rows.place(row)}: {error}.") from error
    number = len(rows.dataset)
    pieces = np.stack([np.arange(number), np.zeros(number, int), np.ones(number, int)], axis=1)
    return Examples(rows, rows.dataset, pieces, np.ones(number, np.int64), [np.array([i]) for i in range(number)])


def text_examples(
    rows: Rows, encoder: Encoder, limit: int, options: TrainOptions, label: Callable[[Any], float] | None = None
) -> Examples:
    """Examples of text, none longer than `limit` tokens.

    Args:
        rows: as stored.
        encoder: makes tokens of a row.
        limit: tokens of an item at most.
        options: what becomes of longer ones, and whether to pack.
        label: for classification: the value of a row's label, or `ValueError` with what is wrong with it.
    """
    encoded = _encode(rows, encoder, label)
    lengths = np.array(encoded["length"], dtype=np.int64)
    counts = np.array(encoded["count"], dtype=np.int64)
    shifted = not encoder.seq2seq and label is None
    number = len(lengths)
    pieces = np.stack([np.arange(number), np.zeros(number, np.int64), lengths], axis=1)
    found = Examples(rows, encoded.select_columns(_kept(encoded)), pieces, counts, (), shifted)
    long = lengths > limit
    if encoder.seq2seq:
        long |= np.array(encoded["target"], dtype=np.int64) > limit
    if long.any():
        found = _shorten(found, long, limit, options.over_length)
    silent = found.counts == 0
    if silent.all():
        raise InputError(f"No example of {rows.label} has a token to learn, with at most {limit} tokens each.")
    found = replace(found, pieces=found.pieces[~silent], counts=found.counts[~silent])
    found = replace(found, skipped=number - len(np.unique(found.pieces[:, 0])))
    if options.packing:
        if not shifted:
            raise OptionError("--packing is for causal language models.")
        return replace(found, items=pack(found.pieces[:, 2] - found.pieces[:, 1], limit))
    return replace(found, items=[np.array([index]) for index in range(len(found.pieces))])


def pack(lengths: NDArray[np.int64], limit: int) -> list[NDArray[np.int64]]:
    """Pieces to rows of at most `limit` tokens: each goes where it fits most tightly, the longest first.

    Best fit decreasing: never more than 11/9 of the least possible number of rows, and 1 (Johnson, 1974).

    Args:
        lengths: int64 [P], each at most `limit`.
        limit: tokens to a row.

    Returns:
        The pieces of each row, in order, rows in order of their first piece.
    """
    rooms: dict[int, list[int]] = {}  # rows by the room they have left
    sizes: list[int] = []  # those rooms, sorted
    rows: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        position = bisect.bisect_left(sizes, length)
        if position == len(sizes):
            rows.append([])
            row, room = len(rows) - 1, limit
        else:
            room = sizes[position]
            row = rooms[room].pop()
            if not rooms[room]:
                del rooms[room], sizes[position]
        rows[row].append(int(index))
        left = room - length
        if left not in rooms:
            bisect.insort(sizes, left)
        rooms.setdefault(left, []).append(row)
    return sorted((np.array(sorted(row)) for row in rows), key=lambda row: int(row[0]))


def hold_out(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Split off a share of the items, or from 1 on a number of them, drawn by the seed."""
    import torch

    number = len(examples)
    held = int(share) if share >= 1 else max(1, round(share * number))
    if held >= number:
        raise InputError(f"--eval-split holds out {held} of {number} examples; nothing is left to train on.")
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return examples.select(sorted(order[held:])), examples.select(sorted(order[:held]))


def _kept(encoded: Any) -> list[str]:
    return [name for name in encoded.column_names if name in ("input_ids", "labels", "label")]


def _encode(rows: Rows, encoder: Encoder, label: Callable[[Any], float] | None) -> Any:
    """Encode every row once; `datasets` keeps the result under a name made of everything that it depends on."""
    columns = rows.dataset.column_names
    with_labels = encoder.kind in ("completion", "chat", "tokens") and not (encoder.everything and not encoder.seq2seq)

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"input_ids": [], "length": [], "count": [], "target": []}
        if with_labels:
            made["labels"] = []
        if label is not None:
            made["label"] = []
        for position, index in enumerate(indices):
            row = {name: batch[name][position] for name in columns}
            try:
                tokens = encoder(row)
                if not tokens["input_ids"]:
                    raise ValueError("it has no tokens")
                value = None if label is None else label(row.get("label"))
            except ValueError as error:
                raise InputError(f"{rows.place(index)}: {error}.") from error
            ids, said = tokens["input_ids"], tokens.get("labels", tokens["input_ids"])
            made["input_ids"].append(ids)
            made["length"].append(len(ids))
            made["target"].append(len(said))
            first = 0 if encoder.seq2seq else 1
            made["count"].append(1 if label is not None else sum(token != UNSAID for token in said[first:]))
            if with_labels:
                made["labels"].append(said)
            if value is not None:
                made["label"].append(value)
        return made

    hasher = new_hash()
    hasher.update(repr((_VERSION, rows.digest, rows.kind, columns, with_labels, encoder.fingerprint())).encode())
    if label is not None:
        hasher.update(repr(label).encode(errors="surrogatepass"))  # a dataclass, which names the classes
    try:
        with quiet_datasets():
            return rows.dataset.map(
                encode,
                batched=True,
                batch_size=_BATCH,
                with_indices=True,
                remove_columns=columns,
                new_fingerprint=hasher.hexdigest()[:32],
            )
    except UnicodeDecodeError as error:
        raise rows.fault(error) from error


def _shorten(found: Examples, long: NDArray[np.bool_], limit: int, how: str) -> Examples:
    """Deal with the examples that are too long."""
    number = int(long.sum())
    if how == "error":
        worst = int(np.argmax(found.pieces[:, 2]))
        raise InputError(
            f"{number} of {len(long)} examples are longer than {limit} tokens, the longest has "
            f"{int(found.pieces[worst, 2])} ({found.rows.place(worst)}); pass --over-length truncate, skip or split, "
            "or another --max-length."
        )
    if how == "skip":
        return replace(found, pieces=found.pieces[~long], counts=found.counts[~long], longer=number)
    if how == "truncate":
        pieces, counts = found.pieces.copy(), found.counts.copy()
        pieces[:, 2] = np.minimum(pieces[:, 2], limit)
        cut = replace(found, pieces=pieces, counts=counts, longer=number, truncated=number)
        if found.shifted:
            for index in np.flatnonzero(long):
                counts[index] = int((cut.piece(int(index))[1] != UNSAID).sum())
        elif counts.max() > 1:
            raise OptionError("--over-length truncate would cut what is to be said; pass --over-length skip.")
        return cut
    if found.rows.kind != "text":
        raise OptionError("--over-length split is for plain text; its pieces could not stand alone otherwise.")
    starts = [range(0, int(length), limit) for length in found.pieces[:, 2]]
    split = [
        (row, start, min(start + limit, int(found.pieces[row, 2]))) for row, all_ in enumerate(starts) for start in all_
    ]
    pieces = np.array(split, dtype=np.int64)
    return replace(found, pieces=pieces, counts=pieces[:, 2] - pieces[:, 1] - 1, longer=number)

"""The data of `upcycling_curves.py`, as files that `surgery train` reads: to learn from, held out, and another task's.

Text: source of the standard library, and the language reference as the other task. Pictures: scikit-learn's handwritten
digits from 0 to 5, and those from 6 to 9 as the other task, blurred with noise so that they are hard. Each digit is
there several times with other noise, so that a long training does not see the same picture again at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from tiny_models import encode, make_tokenizer, python_manual, python_source
from transformers import PreTrainedTokenizerFast

NOISE = 0.6
SEEN = range(6)
_HELD_OUT_DRAWS = 4


@dataclass(frozen=True)
class Data:
    """Where the files are: of the task, and of the other one that models are tuned on later."""

    train: Path
    held_out: Path
    other_train: Path
    other_held_out: Path


def text_files(folder: Path, vocabulary: int, context: int, characters: int, measured: int) -> Data:
    """Rows of `context` tokens: the source, and as the other task the manual; held out are at most `measured`."""
    found = _places(folder, "jsonl")
    if found.other_held_out.is_file():  # the last one written
        return found
    source, manual = python_source(characters), python_manual()
    tokenizer = make_tokenizer([*source.train[:100], *manual.train[:50]], vocabulary)
    for corpus, learn, test in (
        (source, found.train, found.held_out),
        (manual, found.other_train, found.other_held_out),
    ):
        _write_rows(tokenizer, corpus.train, context, learn)
        _write_rows(tokenizer, corpus.held_out, context, test, measured)
    return found


def picture_files(folder: Path, draws: int, measured: int) -> Data:
    """Digits 0 to 5, and as the other task 6 to 9; of each a quarter is held out, at most `measured` pictures."""
    found = _places(folder, "npz")
    if found.other_held_out.is_file():
        return found
    digits = load_digits()
    random = np.random.default_rng(0)
    order = random.permutation(len(digits.target))
    test, learn = order[: len(order) // 4], order[len(order) // 4 :]
    for rows, task, other, times, most in (
        (learn, found.train, found.other_train, draws, None),
        (test, found.held_out, found.other_held_out, _HELD_OUT_DRAWS, measured),
    ):
        seen = np.isin(digits.target[rows], SEEN)
        for place, chosen in ((task, rows[seen]), (other, rows[~seen])):
            # Draw by draw, so that the first pictures of a file are all of different digits.
            images = np.concatenate([noisy(digits.images[chosen], random) for _ in range(times)])
            np.savez(place, images=images[:most], labels=np.tile(digits.target[chosen], times)[:most])
    return found


def noisy(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Pictures [N, 8, 8] of numbers from 0 to 16, with Gaussian noise, as bytes [N, 1, 8, 8]."""
    blurred = images[:, None] / 16 + NOISE * random.standard_normal((len(images), 1, 8, 8))
    # From -1 to 2, which holds all but one number in twenty of the noise beside black or white.
    return np.round(255 * np.clip((blurred + 1) / 3, 0, 1)).astype(np.uint8)


def _places(folder: Path, suffix: str) -> Data:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("train", "held-out", "other-train", "other-held-out")
    return Data(*(folder / f"{name}.{suffix}" for name in names))


def _write_rows(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], context: int, place: Path, most: int | None = None
) -> None:
    ids = encode(tokenizer, texts).ids
    rows: torch.Tensor = ids[: len(ids) // context * context].view(-1, context)
    with open(place, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"input_ids": row}) + "\n" for row in rows[:most].tolist())

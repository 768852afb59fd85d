"""What experiments on tuning share: a base on disk, the text to tune it on, runs of `surgery.train`, and their loss.

The base is a Llama with biases, so that every method of the LoRA paper can be had with one model. It is trained on the
source of the standard library; tuning is on the reference manual. What is held out of the manual is split in two: the
learning rate is chosen on the one part, losses are reported on the other.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from show import steps
from tiny_models import (
    CONTEXT,
    Tokens,
    Training,
    encode,
    evaluate,
    make_model,
    make_tokenizer,
    python_manual,
    python_source,
    train,
)
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import surgery
from surgery.keywords import TrainKeywords
from surgery.training.methods import load_method

# Neighbours in a search for a learning rate: two to a power of ten.
FACTOR = 10**0.5
MOST_RATES = 6


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is: `characters` of source, the model, its training, and the steps of each tuning.

    Every tuning has batches of `batch` rows. `measured` tokens decide on the learning rate, and `reported` others are
    what losses are told of. With `search` off, a method's first learning rate is taken as it is.
    """

    characters: int
    vocabulary: int
    hidden: int
    layers: int
    pretraining: Training
    steps: int
    batch: int
    measured: int
    reported: int
    search: bool = True


FULL = Scale(
    characters=1_500_000,
    vocabulary=512,
    hidden=96,
    layers=2,
    pretraining=Training(steps=900, batch=8, learning_rate=4e-3, weight_decay=0.1, seed=1),
    steps=80,
    batch=4,
    measured=5_000,
    reported=15_000,
)
QUICK = Scale(
    characters=100_000,
    vocabulary=320,
    hidden=64,
    layers=1,
    pretraining=Training(steps=25, batch=4, learning_rate=8e-3, weight_decay=0.1, seed=1),
    steps=12,
    batch=4,
    measured=512,
    reported=2_000,
    search=False,
)


@dataclass(frozen=True)
class Bench:
    """A base, the text to tune it on, and where to work.

    Attributes:
        folder: for whatever is written.
        base: a checkpoint.
        rows: a file of token ids to train on.
        choice: the same, to choose learning rates by.
        test: tokens that losses are reported on.
        scale: of everything.
    """

    folder: Path
    base: Path
    rows: Path
    choice: Path
    test: Tokens
    scale: Scale

    def run(self, output: str, seed: int, choose: bool = False, **keywords: Any) -> tuple[float | None, int]:
        """Tune into `output`; the loss that rates are chosen by, if it is to be taken, and how many numbers train."""
        given = TrainKeywords(
            steps=self.scale.steps, batch_size=self.scale.batch, eval_every=self.scale.steps, warmup=0.1,
            save_every=self.scale.steps, keep="last", seed=seed, device="cpu", hash=False, overwrite=True,
        )  # fmt: skip
        if choose:
            given["eval_data"] = str(self.choice)
        given.update(keywords)  # type: ignore[typeddict-item]  # surgery.train checks the names
        report = surgery.train(self.base, data=self.rows, output=self.folder / output, **given)
        return report.eval_loss, report.trained

    def loss(self, output: str | None = None) -> float:
        """Nats per token on the test text, of the base or of what is in a folder: a checkpoint, or an adapter."""
        place = self.base if output is None else self.folder / output
        if (place / "config.json").is_file():
            return evaluate(AutoModelForCausalLM.from_pretrained(place), self.test).nats_per_token
        model = load_method(AutoModelForCausalLM.from_pretrained(self.base), place)
        return evaluate(model.eval(), self.test).nats_per_token


@dataclass(frozen=True)
class Tuned:
    """A way of tuning, at the learning rate that was found for it, and the test loss of every seed.

    Attributes:
        name: of the way.
        trained: how many numbers are trained.
        rate: the learning rate.
        tried: the rates that were tried, each with the loss that decided.
        losses: on the test text, by seed, in nats per token.
    """

    name: str
    trained: int
    rate: float
    tried: dict[float, float]
    losses: list[float]

    @property
    def mean(self) -> float:
        return mean(self.losses)

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; 0 for a single one."""
        return stdev(self.losses) if len(self.losses) > 1 else 0.0


def make_bench(folder: Path, scale: Scale) -> Bench:
    """Train the base and write it, and the text to tune it on, into a folder that is made anew."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers annotates little
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source, manual = python_source(scale.characters), python_manual()
    tokenizer = make_tokenizer([*source.train, *manual.train], scale.vocabulary)
    model = make_model(len(tokenizer), scale.hidden, scale.layers, seed=0, biases=True)
    with steps("training the base", scale.pretraining.steps) as step:
        train(model, encode(tokenizer, source.train), scale.pretraining, lambda loss: step(f"loss {loss:.2f}"))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    held_out = encode(tokenizer, manual.held_out).ids
    test = held_out[scale.measured : scale.measured + scale.reported]
    nbytes = len(str(tokenizer.decode(test)).encode())
    return Bench(
        folder,
        folder / "base",
        _write_rows(folder / "rows.jsonl", encode(tokenizer, manual.train).ids),
        _write_rows(folder / "choice.jsonl", held_out[: scale.measured]),
        Tokens(test, nbytes),
        scale,
    )


def tune(bench: Bench, name: str, start: float, seeds: Iterable[int], **keywords: Any) -> Tuned:
    """Find the learning rate with the first seed, by hill climbing from `start`, and tune with every seed at it."""
    first, *others = seeds
    tried: dict[float, float] = {}
    trained = 0

    def attempt(rate: float) -> float:
        nonlocal trained
        try:
            loss, trained = bench.run(f"trial-{rate:g}", first, choose=True, learning_rate=rate, **keywords)
        except surgery.NonFiniteError:
            shutil.rmtree(bench.folder / f".trial-{rate:g}.partial")
            return float("inf")
        return float("inf") if loss is None else loss

    climb(attempt, start, tried, MOST_RATES if bench.scale.search else 1)
    rate = min(tried, key=lambda tried_rate: tried[tried_rate])
    losses = [bench.loss(f"trial-{rate:g}")]
    for tried_rate in tried:
        shutil.rmtree(bench.folder / f"trial-{tried_rate:g}", ignore_errors=True)  # one that diverged has none
    for seed in others:
        bench.run("tuned", seed, learning_rate=rate, **keywords)
        losses.append(bench.loss("tuned"))
    return Tuned(name, trained, rate, tried, losses)


def climb(attempt: Callable[[float], float], start: float, tried: dict[float, float], most: int) -> None:
    """Try `start` and its neighbours, and on in the better direction until the best rate has worse ones on both sides.

    Args:
        attempt: the loss at a rate; infinity where it diverged.
        start: the first rate.
        tried: gets the loss of every rate.
        most: how many may be tried.
    """
    power = 0
    losses: dict[int, float] = {}
    while len(losses) < most:
        power = next((p for p in (power, power - 1, power + 1) if p not in losses), power)
        if power in losses:
            return
        rate = float(f"{start * FACTOR**power:.2g}")
        losses[power] = tried[rate] = attempt(rate)
        power = min(losses, key=lambda found: losses[found])


def write_json(file: Path, content: object) -> None:
    """Results for other programs."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_rows(file: Path, ids: torch.Tensor) -> Path:
    """Rows of `CONTEXT` tokens, as `surgery.train` reads them; the rest is left out."""
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()), encoding="utf-8")
    return file

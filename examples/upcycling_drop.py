"""How much worse an upcycled model is before any training, by layers, experts, router and combine weights.

Sparse Upcycling (Komatsuzaki et al. 2023) reports that quality drops at first, more with more sparse layers and more
experts, and that normalising the combine weights removes the drop. Here are a vision transformer on scikit-learn's
handwritten digits, blurred with noise so that they are hard, and a small Llama on the source of the standard library,
each trained from scratch, upcycled by `surgery upcycle` in every way, and measured on held-out data.

    python examples/upcycling_drop.py [--seeds N] [--quick] [--folder FOLDER]

The tables are printed and written as CSV and as a picture into the folder.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from show import console, heading, steps
from sklearn.datasets import load_digits
from tiny_models import Training, encode, evaluate, make_model, make_tokenizer, python_source, train
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

import surgery
from surgery.moe import mixtures  # importing it makes transformers know the classes that upcycled checkpoints ship

LAYERS = 4
EXPERTS = (2, 8, 32)
SPARSE = (1, 2, 4)
# What varies in one row of the table beside the two above.
Routing = tuple[str, int, str]
ROUTINGS: tuple[Routing, ...] = tuple(
    (router, count, combine)
    for router in ("top-k", "expert-choice")
    for count in (2, 1)
    for combine in ("raw", "normalized")
)


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] and their digits [N]."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Point:
    """One upcycled model: how it was made, its loss and the dense model's, and the share of tokens without expert."""

    model: str
    seed: int
    routing: Routing
    experts: int
    layers: int
    loss: float
    dense: float
    uncovered: float = 0.0

    @property
    def drop(self) -> float:
        """By how much the loss has grown."""
        return self.loss - self.dense


def noisy_digits(seed: int, noise: float = 0.45) -> tuple[Digits, Digits]:
    """Digits to train on and others to measure with, with Gaussian noise on pixels between 0 and 1."""
    found = load_digits()
    random = np.random.default_rng(seed)
    images = found.images[:, None] / 16 + noise * random.standard_normal((len(found.images), 1, 8, 8))
    order = random.permutation(len(images))
    parts = (order[:1300], order[1300:])
    train_set, test_set = (
        Digits(torch.tensor(images[part], dtype=torch.float32), torch.tensor(found.target[part])) for part in parts
    )
    return train_set, test_set


def train_vit(folder: Path, digits: Digits, seed: int, epochs: int) -> None:
    """Train a ViT of four layers on the digits and save it."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    config.num_labels = 10
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    batches = [batch for _ in range(epochs) for batch in torch.split(torch.randperm(len(digits.labels)), 128)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(batches))
    with steps(f"training a ViT, seed {seed}", len(batches)) as step:
        for batch in batches:
            loss = functional.cross_entropy(model(pixel_values=digits.images[batch]).logits, digits.labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step(f"loss {loss.item():.3f}")
    model.save_pretrained(folder)


@torch.no_grad()
def vit_loss(folder: Path, digits: Digits) -> tuple[float, float]:
    """Cross-entropy of a stored ViT, upcycled or not, in nats an image, and the share of tokens without an expert."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    logits = model(pixel_values=digits.images).logits
    shares = [float(layer.routing.uncovered) for layer in mixtures(model).values() if layer.routing is not None]
    return float(functional.cross_entropy(logits, digits.labels)), sum(shares) / max(1, len(shares))


def train_llama(folder: Path, seed: int, count: int) -> list[str]:
    """Train a Llama of four layers on Python source and save it with its tokenizer; returns the held-out documents."""
    corpus = python_source(600_000)
    tokenizer = make_tokenizer(corpus.train, 512)
    model = make_model(512, 64, LAYERS, seed)
    how = Training(steps=count, learning_rate=3e-3, seed=seed)
    with steps(f"training a Llama, seed {seed}", count) as step:
        train(model, encode(tokenizer, corpus.train), how, lambda loss: step(f"loss {loss:.3f}"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return list(corpus.held_out)


def llama_loss(folder: Path, texts: Sequence[str]) -> float:
    """Loss of a stored language model, upcycled or not, in nats a token."""
    tokens = encode(PreTrainedTokenizerFast.from_pretrained(folder), texts)
    return evaluate(AutoModelForCausalLM.from_pretrained(folder), tokens).nats_per_token


def upcycled(dense: Path, output: Path, routing: Routing, experts: int, layers: int, seed: int) -> Path:
    """The dense model with mixtures in its last layers. A top-k of 2 or a capacity of 2 is `count` 2."""
    router, count, combine = routing
    choice = {"top_k": count} if router == "top-k" else {"capacity": float(count), "allow_future": True}
    surgery.upcycle(
        dense,
        output=output,
        overwrite=True,
        hash=False,
        experts=experts,
        layers=f"last:{layers}",
        router=router,
        combine=combine,
        seed=seed,
        **choice,
    )
    return output


def measure_vit(folder: Path, seed: int, epochs: int, routings: Sequence[Routing]) -> list[Point]:
    """Train one ViT and upcycle it in every way."""
    learn, test = noisy_digits(seed)
    dense = folder / f"vit-{seed}"
    train_vit(dense, learn, seed, epochs)
    before, _ = vit_loss(dense, test)
    found = []
    for routing in routings:
        for experts, layers in grid():
            loss, uncovered = vit_loss(upcycled(dense, folder / "moe", routing, experts, layers, seed), test)
            found.append(Point("ViT", seed, routing, experts, layers, loss, before, uncovered))
    return found


def measure_llama(folder: Path, seed: int, count: int, routings: Sequence[Routing]) -> list[Point]:
    """Train one Llama and upcycle it in every way. Expert choice would see the future here, so top-k only."""
    dense = folder / f"llama-{seed}"
    texts = train_llama(dense, seed, count)
    before = llama_loss(dense, texts)
    found = []
    for routing in routings:
        if routing[0] == "top-k":
            for experts, layers in grid():
                loss = llama_loss(upcycled(dense, folder / "moe", routing, experts, layers, seed), texts)
                found.append(Point("Llama", seed, routing, experts, layers, loss, before))
    return found


def grid() -> list[tuple[int, int]]:
    """Experts with two sparse layers, and sparse layers with eight experts."""
    return [*((experts, 2) for experts in EXPERTS), *((8, layers) for layers in SPARSE if layers != 2)]


def show(points: Sequence[Point]) -> None:
    """A table for each model: the mean growth of the loss over the seeds."""
    for model in dict.fromkeys(point.model for point in points):
        own = [point for point in points if point.model == model]
        dense = np.mean([point.dense for point in own])
        seeds = len(seeds_of(own))
        heading(f"{model}: growth of the loss in nats, from {dense:.3f} before, by experts and layers; {seeds} seeds")
        table = Table(box=None, pad_edge=False)
        columns = (f"E={experts}, {layers}" for experts, layers in grid())
        for name in ("router", "C or K", "weights", *columns, "uncovered"):
            table.add_column(name, justify="left" if name in ("router", "weights") else "right")
        for routing in dict.fromkeys(point.routing for point in own):
            cells = [f"{mean_drop(own, routing, experts, layers):+.4f}" for experts, layers in grid()]
            uncovered = np.mean([point.uncovered for point in own if point.routing == routing])
            table.add_row(routing[0], str(routing[1]), routing[2], *cells, f"{uncovered:.1%}")
        console.print(table)


def seeds_of(points: Sequence[Point]) -> list[int]:
    """The seeds that were run."""
    return sorted({point.seed for point in points})


def mean_drop(points: Sequence[Point], routing: Routing, experts: int, layers: int) -> float:
    """The mean over seeds of one cell."""
    return float(np.mean([p.drop for p in points if (p.routing, p.experts, p.layers) == (routing, experts, layers)]))


def write(points: Sequence[Point], folder: Path) -> None:
    """Every point as CSV, and both models as a picture."""
    with open(folder / "drop.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("model", "seed", "router", "count", "weights", "experts", "layers", "loss", "dense", "uncovered")
        )
        writer.writerows(
            (p.model, p.seed, *p.routing, p.experts, p.layers, p.loss, p.dense, p.uncovered) for p in points
        )
    draw(points, folder / "drop.png")


def draw(points: Sequence[Point], file: Path) -> None:
    """The growth of the loss against experts and against layers, a line to a routing."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    kinds = list(dict.fromkeys(point.model for point in points))
    figure, axes = plt.subplots(len(kinds), 2, figsize=(10, 4 * len(kinds)), squeeze=False, layout="constrained")
    for row, model in zip(axes, kinds, strict=True):
        own = [point for point in points if point.model == model]
        for routing in dict.fromkeys(point.routing for point in own):
            style = {
                "marker": "o",
                "linestyle": "-" if routing[2] == "raw" else "--",
                "label": " ".join(map(str, routing)),
            }
            row[0].plot(EXPERTS, [mean_drop(own, routing, experts, 2) for experts in EXPERTS], **style)
            row[1].plot(SPARSE, [mean_drop(own, routing, 8, layers) for layers in SPARSE], **style)
        row[0].set(
            title=f"{model}, last 2 of {LAYERS} layers", xlabel="experts", ylabel="growth of the loss", xscale="log"
        )
        row[0].set_xticks(EXPERTS, [str(experts) for experts in EXPERTS])
        row[1].set(title=f"{model}, 8 experts", xlabel="sparse layers", ylabel="growth of the loss")
        row[1].legend(fontsize=7)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Train, upcycle, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind to train (default 3)")
    parser.add_argument("--quick", action="store_true", help="train less")
    parser.add_argument("--folder", type=Path, default=Path(".demo/upcycling"), help="where to work")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers annotates little
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    points: list[Point] = []
    for seed in range(given.seeds):
        points += measure_vit(given.folder, seed, 12 if given.quick else 60, ROUTINGS)
        points += measure_llama(given.folder, seed, 60 if given.quick else 400, ROUTINGS)
    show(points)
    write(points, given.folder)
    console.print(f"\n{given.folder / 'drop.csv'}, {given.folder / 'drop.png'}")


if __name__ == "__main__":
    main()

"""Pictures of a run, drawn from its log: the loss, and for mixtures of experts who got how many tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Names neither the library's version nor a time.
_METADATA = {"Software": None}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_loss(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss of steps and of evaluations, and the learning rate below."""
    from matplotlib.figure import Figure

    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(8, 5))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot([line["step"] for line in steps], [line["loss"] for line in steps], lw=0.8, label="training")
    if evaluations:
        x, y = [line["step"] for line in evaluations], [line["eval_loss"] for line in evaluations]
        above.plot(x, y, "o-", ms=3, label="held out")
    above.set_ylabel("loss, nats a prediction")
    above.legend()
    below.plot([line["step"] for line in steps], [line["learning_rate"] for line in steps], lw=0.8, color="gray")
    below.set_ylabel("rate")
    below.set_xlabel("step")
    figure.savefig(path, dpi=110, metadata=_METADATA)


def draw_experts(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """For each sparse layer the experts' shares over time; below, entropy and uncovered tokens."""
    from matplotlib.figure import Figure

    seen = [line for line in lines if line.get("load")]
    layers = list(seen[0]["load"])
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(2.6 * columns + 1.2, 1.7 * rows + 3.2), layout="constrained")
    grid = figure.add_gridspec(rows + 2, columns)
    extent = (seen[0]["step"], seen[-1]["step"] + 1)
    image = None
    for number, layer in enumerate(layers):
        shares = np.array([line["load"][layer] for line in seen]).T  # [experts, steps]
        axes = figure.add_subplot(grid[number // columns, number % columns])
        image = axes.imshow(
            shares * len(shares), aspect="auto", vmin=0, vmax=2, cmap="coolwarm", interpolation="nearest",
            extent=(*extent, len(shares) - 0.5, -0.5),
        )  # fmt: skip
        axes.set_title(layer, fontsize=7)
        axes.tick_params(labelsize=6)
    if image is not None:
        bar = figure.colorbar(image, ax=figure.axes, shrink=0.7)
        bar.set_label("tokens of an expert / an even share")
    x = [line["step"] for line in seen]
    for row, (name, title) in enumerate(
        (("router_entropy", "router entropy, nats"), ("uncovered", "uncovered tokens"))
    ):
        axes = figure.add_subplot(grid[rows + row, :])
        for layer in layers:
            axes.plot(x, [line[name][layer] for line in seen], lw=0.8, label=layer)
        axes.set_ylabel(title, fontsize=7)
        axes.tick_params(labelsize=6)
    axes.set_xlabel("step", fontsize=7)
    figure.savefig(path, dpi=110, metadata=_METADATA)

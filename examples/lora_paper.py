"""The comparisons of the LoRA paper (Hu et al. 2021), on text that every Python has.

A small Llama with biases, trained on the source of the standard library, is tuned on the reference manual by
`surgery.train`:

methods   LoRA against full tuning and every baseline, with as many trained parameters as LoRA of a given rank has
          where the method lets one choose (the paper's tables 2 to 4);
ranks     LoRA of rank 1, 2, 4, 8 and 64 on queries, on queries and values, and on all of attention (table 6);
matrices  which matrices to adapt with a fixed number of parameters (table 5).

Every row has a learning rate of its own: found with the first seed, by hill climbing in steps of the root of ten, on
text apart from that whose loss is reported. The other seeds draw other adapters and another order of the data.

    python examples/lora_paper.py [--parts methods,ranks,matrices] [--seeds N] [--quick] [--folder FOLDER]

Tables are printed; `lora_paper.json` and `lora_paper.png` are written into the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from show import console, heading, steps
from tuning import FULL, QUICK, Bench, Scale, Tuned, make_bench, tune, write_json

PARTS = ("methods", "ranks", "matrices")
RANKS = (1, 2, 4, 8, 64)
# LoRA of this rank on queries and values sets the number of parameters that every method gets.
BUDGET_RANK = 8
QV = "q_proj,v_proj"
SWEPT = {"q": "q_proj", "q, v": QV, "q, k, v, o": "attention"}
# The budget of one attention matrix at this rank, to be spent on others.
FIXED_RANK = 28
MATRICES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "q, k": "q_proj,k_proj",
    "q, v": QV,
    "q, k, v, o": "attention",
    "MLP": "mlp",
    "attention and MLP": "all-linear",
}
# Where the search for a learning rate begins.
STARTS = {"full": 3e-3, "bitfit": 3e-2, "prompt": 0.3, "prefix": 0.1}
START = 1e-2
EMBEDDINGS = ("embed_tokens", "lm_head")

Settings = dict[str, Any]
Results = dict[str, list[Tuned]]


def widths(scale: Scale) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear layer of a block, as `tiny_models.make_model` has them."""
    hidden, wide = scale.hidden, -(-scale.hidden * 8 // 3 // 32) * 32
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    return square | {"gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden)}


def cost_of_rank(scale: Scale, targets: str) -> int:
    """Parameters of a LoRA of rank 1 on these targets, over all layers."""
    groups = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    shapes = widths(scale)
    names = [*shapes] if targets == "all-linear" else groups.get(targets, tuple(targets.split(",")))
    return scale.layers * sum(sum(shapes[name]) for name in names)


def matched(scale: Scale) -> dict[str, Settings]:
    """Every method, at the size that comes nearest to the budget where it has a size."""
    hidden, layers = scale.hidden, scale.layers
    budget = BUDGET_RANK * cost_of_rank(scale, QV)
    # Parameters of a bottleneck: 2 d r + r + d, and 2 d for a LayerNorm (Hu et al., 5.1).
    of_h = round((budget / (2 * layers) - hidden) / (2 * hidden + 1))
    of_l = round((budget / layers - 3 * hidden) / (2 * hidden + 1))
    tokens, pairs = round(budget / hidden), round(budget / (2 * layers * hidden))
    half = {"rank": BUDGET_RANK // 2, "targets": QV}
    whole = cost_of_rank(scale, "all-linear")
    return {
        "full": {"method": "full"},
        "full, embeddings frozen": {"method": "full", "freeze": EMBEDDINGS},
        "top:1": {"method": "top:1"},
        "bitfit": {"method": "bitfit"},
        "prompt": {"method": "prompt", "prompt_tokens": tokens},
        "prefix": {"method": "prefix", "prompt_tokens": pairs},
        "adapter-h": {"method": "adapter-h", "rank": of_h},
        "adapter-l": {"method": "adapter-l", "rank": of_l},
        "lora, q and v": {"method": "lora", "rank": BUDGET_RANK, "targets": QV},
        "lora, all linear": {"method": "lora", "rank": max(1, round(budget / whole)), "targets": "all-linear"},
        "lora+prompt": {"method": "lora+prompt", **half, "prompt_tokens": tokens // 2},
        "lora+prefix": {"method": "lora+prefix", **half, "prompt_tokens": pairs // 2},
    }


def ranks(scale: Scale) -> dict[str, Settings]:
    """LoRA of every rank on every choice of attention matrices."""
    swept = SWEPT if scale.search else {"q, v": QV}
    few = RANKS if scale.search else RANKS[::2]
    return {
        f"{name}, r = {rank}": {"method": "lora", "rank": rank, "targets": targets}
        for name, targets in swept.items()
        for rank in few
    }


def matrices(scale: Scale) -> dict[str, Settings]:
    """LoRA on every choice of matrices, at the rank that spends the same budget."""
    budget = FIXED_RANK * cost_of_rank(scale, "q_proj")
    chosen = {
        name: {"method": "lora", "rank": max(1, round(budget / cost_of_rank(scale, targets))), "targets": targets}
        for name, targets in MATRICES.items()
    }
    return {f"{name}, r = {settings['rank']}": settings for name, settings in chosen.items()}


def measure(bench: Bench, parts: Sequence[str], seeds: Sequence[int]) -> Results:
    """Tune in every way of every part."""
    ways = {"methods": matched, "ranks": ranks, "matrices": matrices}
    found: Results = {}
    for part in parts:
        chosen = ways[part](bench.scale)
        with steps(part, len(chosen)) as step:
            found[part] = []
            for name, settings in chosen.items():
                start = STARTS.get(settings["method"], START)
                found[part].append(tune(bench, name, start, seeds, **settings))
                step(f"{name}: {found[part][-1].mean:.3f}")
    return found


def show(base: float, found: Results, seeds: Sequence[int]) -> None:
    """A table for each part, the best way first where there is no order of its own."""
    for part, rows in found.items():
        heading(f"{part}: loss on held-out text, nats per token, from {base:.3f} before; seeds {[*seeds]}")
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("tuned", no_wrap=True)
        for title in ("parameters", "learning rate", "loss", "spread", *(f"seed {seed}" for seed in seeds), "tried"):
            table.add_column(title, justify="right")
        for row in rows if part == "ranks" else sorted(rows, key=lambda row: row.mean):
            losses = [f"{loss:.3f}" for loss in row.losses]
            figures = (f"{row.trained:,}", f"{row.rate:g}", f"{row.mean:.3f}", f"{row.spread:.3f}")
            table.add_row(row.name, *figures, *losses, f"{len(row.tried)}")
        console.print(table)


def draw(base: float, found: Results, file: Path) -> None:
    """Loss against parameters for methods, against rank for ranks, and as bars for matrices."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(6 * len(found), 4.5), squeeze=False, layout="constrained")
    for axis, (part, rows) in zip(axes[0], found.items(), strict=True):
        axis.set(title=part, ylabel="held-out loss, nats per token")
        if part == "methods":
            for row, marker in zip(rows, "os^v<>DPX*hd", strict=True):
                axis.errorbar(row.trained, row.mean, row.spread, fmt=marker, label=row.name)
            axis.axhline(base, color="grey", linestyle=":", label="base")
            axis.set(xlabel="trained parameters", xscale="log")
        elif part == "ranks":
            for name in dict.fromkeys(row.name.partition(", r =")[0] for row in rows):
                own = [row for row in rows if row.name.partition(", r =")[0] == name]
                at = [int(row.name.rpartition("= ")[2]) for row in own]
                axis.errorbar(at, [row.mean for row in own], [row.spread for row in own], fmt="o-", label=name)
            axis.set(xlabel="rank", xscale="log")
        else:
            axis.barh([row.name for row in rows], [base - row.mean for row in rows], xerr=[row.spread for row in rows])
            axis.set(ylabel="", xlabel="fall of the held-out loss, nats per token")
        if part != "matrices":
            axis.legend(fontsize=7)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def as_json(scale: Scale, base: float, found: Results, seeds: Sequence[int]) -> Mapping[str, object]:
    """Everything that was measured, with what it was measured on."""
    rows = {
        part: [asdict(row) | {"mean": row.mean, "spread": row.spread} for row in own] for part, own in found.items()
    }
    return {"scale": asdict(scale), "seeds": [*seeds], "base": base, "parts": rows}


def main() -> None:
    """Train the base, tune it in every way, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which of %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="tunings of each kind (default 3)")
    parser.add_argument("--quick", action="store_true", help="a model too small to be any good, one learning rate each")
    parser.add_argument("--folder", type=Path, default=Path(".demo/lora_paper"), help="where to work")
    given = parser.parse_args()
    parts = given.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    bench = make_bench(given.folder, QUICK if given.quick else FULL)
    seeds, base = range(given.seeds), bench.loss()
    found = measure(bench, parts, seeds)
    show(base, found, seeds)
    write_json(given.folder / "lora_paper.json", as_json(bench.scale, base, found, seeds))
    draw(base, found, given.folder / "lora_paper.png")
    console.print(f"\n{given.folder / 'lora_paper.json'}, {given.folder / 'lora_paper.png'}")


if __name__ == "__main__":
    main()

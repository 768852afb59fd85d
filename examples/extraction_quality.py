"""An adapter extracted from a full fine-tune, against a LoRA trained at the same rank for as many steps.

A small Llama, trained on the source of the standard library, is tuned in full on the reference manual: once in all of
its parameters, and once in its linear layers alone, which is what an adapter of linear layers can express. From both
`surgery extract` takes adapters of ranks 1 to 64, and `surgery merge` adds them to the base again. The loss of what
comes out, on held-out pages, is set beside that of LoRAs of all linear layers, trained on the same data in the same
order. Full tuning, and LoRA at each rank, have each the learning rate that is best for the first seed, found on other
text.

    python examples/extraction_quality.py [--seeds N] [--quick] [--folder FOLDER]

The table is printed; `extraction_quality.json` and `extraction_quality.png` are written into the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from rich.table import Table
from show import console, heading, steps
from tuning import FULL, QUICK, Bench, Scale, Tuned, make_bench, tune, write_json

import surgery

RANKS = (1, 2, 4, 8, 16, 32, 64)
QUICK_RANKS = (1, 8, 64)
# What is no linear layer within a block: full tuning moves it, and factors of linear layers cannot hold it.
OUTSIDE = ("embed_tokens", "lm_head", "norm", "bias")
FULL_START, LORA_START = 3e-3, 3e-3

WHOLE, LINEAR = "full", "full, linear layers"
EXTRACTED = "extracted"
WITH_RESIDUAL = "extracted, residual too"
EXTRACTED_LINEAR = "extracted, linear layers tuned"
LORA = "LoRA"


@dataclass(frozen=True)
class Point:
    """One model: what it is, its rank and seed, its loss in nats per token.

    `energy_kept` is the share of ||dW||^2 of the linear layers that the rank holds, for what was extracted.
    """

    kind: str
    rank: int
    seed: int
    loss: float
    energy_kept: float | None = None


@dataclass(frozen=True)
class Results:
    """Losses of the base, of the fine-tunes and of every adapter, and the learning rates that were found."""

    base: float
    tuned: dict[str, Tuned]
    points: list[Point]

    def mean(self, kind: str, rank: int) -> float:
        """Over the seeds."""
        return mean(point.loss for point in self.points if (point.kind, point.rank) == (kind, rank))


def measure(bench: Bench, ranks: Sequence[int], seeds: Sequence[int]) -> Results:
    """Tune, extract, merge and train at every rank, with every seed."""
    tuned: dict[str, Tuned] = {}
    points: list[Point] = []
    with steps("tuning and extracting", 2 + len(ranks) + 3 * len(ranks) * len(seeds)) as step:
        for kind, frozen in ((WHOLE, ()), (LINEAR, OUTSIDE)):
            tuned[kind] = tune(bench, kind, FULL_START, seeds, method="full", freeze=frozen)
            step(f"{kind}: {tuned[kind].mean:.3f}")
        for rank in ranks:
            name = f"LoRA, r = {rank}"
            tuned[name] = tune(bench, name, LORA_START, seeds, method="lora", rank=rank)
            points += [Point(LORA, rank, *pair) for pair in zip(seeds, tuned[name].losses, strict=True)]
            step(f"{name}: {tuned[name].mean:.3f}")
        for seed in seeds:
            for kind, frozen in ((WHOLE, ()), (LINEAR, OUTSIDE)):
                bench.run(kind, seed, method="full", freeze=frozen, learning_rate=tuned[kind].rate)
            for rank in ranks:
                for made, source in ((EXTRACTED, WHOLE), (WITH_RESIDUAL, WHOLE), (EXTRACTED_LINEAR, LINEAR)):
                    points.append(extracted(bench, made, bench.folder / source, rank, seed))
                    step(f"{made}, r = {rank}: {points[-1].loss:.3f}")
    return Results(bench.loss(), tuned, points)


def extracted(bench: Bench, kind: str, source: Path, rank: int, seed: int) -> Point:
    """Extract an adapter from a fine-tune, merge it into the base, and measure what comes out."""
    adapter = bench.folder / "adapter"
    report = surgery.extract(
        bench.base,
        source,
        output=adapter,
        rank=rank,
        save_residual=kind == WITH_RESIDUAL,
        overwrite=True,
        hash=False,
        device="cpu",
    )
    surgery.merge(bench.base, adapter, output=bench.folder / "merged", overwrite=True, hash=False)
    return Point(kind, rank, seed, bench.loss("merged"), report.energy_kept)


def show(found: Results, seeds: Sequence[int]) -> None:
    """One row for each rank: the mean losses over the seeds, and how often extraction beats training."""
    whole, linear = found.tuned[WHOLE], found.tuned[LINEAR]
    heading(
        f"Loss on held-out text, nats per token: base {found.base:.3f}, tuned {whole.mean:.3f} ± {whole.spread:.3f}, "
        f"linear layers tuned {linear.mean:.3f} ± {linear.spread:.3f}; mean of {len(seeds)} seeds"
    )
    kinds = (EXTRACTED, WITH_RESIDUAL, EXTRACTED_LINEAR, LORA)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("rank", *kinds, "LoRA's spread", "energy kept", "LoRA's rate"):
        table.add_column(title, justify="right")
    for rank in ranks_of(found):
        lora = found.tuned[f"LoRA, r = {rank}"]
        kept = [p.energy_kept for p in found.points if (p.kind, p.rank) == (EXTRACTED_LINEAR, rank) and p.energy_kept]
        losses = [f"{found.mean(kind, rank):.3f}" for kind in kinds]
        table.add_row(str(rank), *losses, f"{lora.spread:.3f}", f"{mean(kept):.1%}", f"{lora.rate:g}")
    console.print(table)


def ranks_of(found: Results) -> list[int]:
    """The ranks that were tried."""
    return sorted({point.rank for point in found.points})


def draw(found: Results, file: Path) -> None:
    """Loss against rank, a line to each kind of adapter, with the base and the fine-tunes as levels."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ranks = ranks_of(found)
    for kind in dict.fromkeys(point.kind for point in found.points):
        axis.plot(ranks, [found.mean(kind, rank) for rank in ranks], marker="o", label=kind)
    levels = {"base": found.base, WHOLE: found.tuned[WHOLE].mean, LINEAR: found.tuned[LINEAR].mean}
    for (name, level), style in zip(levels.items(), (":", "--", "-."), strict=True):
        axis.axhline(level, color="grey", linestyle=style, label=name)
    axis.set(xlabel="rank", ylabel="held-out loss, nats per token", xscale="log")
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def as_json(scale: Scale, found: Results, seeds: Sequence[int]) -> Mapping[str, object]:
    """Everything that was measured, with what it was measured on."""
    return {"scale": asdict(scale), "seeds": [*seeds]} | asdict(found)


def main() -> None:
    """Train the base, tune, extract, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="tunings of each kind (default 3)")
    parser.add_argument("--quick", action="store_true", help="a model too small to be any good, one learning rate each")
    parser.add_argument("--folder", type=Path, default=Path(".demo/extraction_quality"), help="where to work")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = make_bench(given.folder, QUICK if given.quick else FULL)
    seeds = range(given.seeds)
    found = measure(bench, QUICK_RANKS if given.quick else RANKS, seeds)
    show(found, seeds)
    write_json(given.folder / "extraction_quality.json", as_json(bench.scale, found, seeds))
    draw(found, given.folder / "extraction_quality.png")
    console.print(f"\n{given.folder / 'extraction_quality.json'}, {given.folder / 'extraction_quality.png'}")


if __name__ == "__main__":
    main()

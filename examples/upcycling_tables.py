"""The tables and pictures of `upcycling_curves.py`, and how its runs are compared.

Two models are compared at equal steps and at equal operations: those of the whole step, as `upcycling_flops.py` counts
them. Where a run was not measured at just that point, the loss is on the straight line between the evaluations beside
it. Differences are taken seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from show import console, heading
from upcycling_runs import Run


@dataclass(frozen=True)
class Arms:
    """The runs of one comparison and one seed. `dense` is what the others but `scratch` go on from."""

    dense: Run
    continued: Run
    upcycled: Run
    scratch: Run | None = None

    @property
    def equal_steps(self) -> float:
        """Operations of the dense model after as many steps as the upcycled one had."""
        return self.upcycled.last.step * self.continued.step_flops

    def gain(self, at_equal_flops: bool) -> float | None:
        """By how much the upcycled model's loss is lower than that of the dense model trained on."""
        dense = self.continued.at(self.upcycled.flops if at_equal_flops else self.equal_steps)
        return None if dense is None else dense - self.upcycled.last.loss


@dataclass(frozen=True)
class Tuned:
    """What the dense and the upcycled model are worth on the other task, after as many extra operations each."""

    arm: str
    seed: int
    run: Run
    probe: float | None


# Tables ---------------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float | None]) -> str:
    """A mean over seeds, with the standard deviation where there are several."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    spread = f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
    return f"{np.mean(known):.3f}{spread}"


def gains(values: Sequence[float | None]) -> str:
    """Paired differences: their mean and deviation, and in how many seeds they are for the upcycled model."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
    return f"{np.mean(known):+.3f}{spread} ({sum(value > 0 for value in known)}/{len(known)})"


def show_curves(kind: str, found: Sequence[Arms]) -> None:
    """The main table of one kind of model, and when one curve crosses another."""
    first = found[0]
    heading(f"{kind}: held-out loss in nats, mean over {len(found)} seeds, after {first.upcycled.last.step} more steps")
    columns = ("", "parameters", "operations a step", "before", "equal steps", "equal operations", "accuracy then")
    table = _table(columns)
    unit = first.dense.step_flops
    rows: dict[str, list[tuple[Run, float, float]]] = {
        "dense, trained on": [(a.continued, a.equal_steps, a.upcycled.flops) for a in found],
        "upcycled": [(a.upcycled, a.upcycled.flops, a.upcycled.flops) for a in found],
        "mixture from scratch": [(a.scratch, a.upcycled.flops, a.upcycled.flops) for a in found if a.scratch],
    }
    for label, runs in rows.items():
        run = runs[0][0]
        table.add_row(
            label,
            f"{run.parameters:,}",
            f"{run.step_flops / unit:.2f}",
            mean([r.points[0].loss for r, _, _ in runs]),
            mean([r.at(steps) for r, steps, _ in runs]),
            mean([r.at(flops) for r, _, flops in runs]),
            mean([r.at(flops, "accuracy") for r, _, flops in runs]),
        )
    console.print(table)
    console.print(
        f"the dense model took {first.dense.flops:.3e} operations, the continuation {first.upcycled.flops:.3e}"
    )
    for label, equal in (("steps", False), ("operations", True)):
        console.print(f"upcycled below dense at equal {label}: {gains([arms.gain(equal) for arms in found])}")
    for label, value in crossings(found).items():
        console.print(f"{label}: {value}")


def crossings(found: Sequence[Arms]) -> dict[str, str]:
    """Costs at which curves meet, as shares of the dense model's first training, a number for each seed."""
    made: dict[str, list[float | None]] = {
        "upcycled stays below dense from": [stays_below(arms) for arms in found],
        "from scratch reaches the dense model's first loss at": [],
        "from scratch reaches the upcycled model's last loss at": [],
    }
    names = list(made)
    for arms in found:
        if arms.scratch is not None:
            made[names[1]].append(_share(arms.scratch.reaches(arms.dense.last.loss), arms.dense))
            made[names[2]].append(_share(arms.scratch.reaches(arms.upcycled.last.loss), arms.dense))
    limits = [arms.scratch.flops / arms.dense.flops for arms in found if arms.scratch is not None]
    never = {names[0]: "never", **dict.fromkeys(names[1:], f"not within {max(limits, default=0):.0%}")}
    return {
        label: ", ".join(never[label] if value is None else f"{value:.0%}" for value in values)
        for label, values in made.items()
        if values
    }


def stays_below(arms: Arms) -> float | None:
    """From which extra cost on the upcycled model is better at equal operations, as far as it was trained."""
    found: float | None = None
    for point in arms.upcycled.points:
        flops = point.step * arms.upcycled.step_flops
        dense = arms.continued.at(flops)
        if dense is None or point.loss >= dense:
            found = None
        elif found is None:
            found = flops / arms.dense.flops
    return found


def _share(flops: float | None, dense: Run) -> float | None:
    return None if flops is None else flops / dense.flops


def show_ablations(found: Sequence[Mapping[str, Arms]]) -> None:
    """One row for each change: loss before and after, and against the dense model trained on."""
    firsts = [next(iter(arms.values())) for arms in found]
    dense = mean([arms.continued.at(arms.equal_steps) for arms in firsts])
    heading(
        f"ablations on the ViT: held-out loss in nats, mean over {len(found)} seeds, after "
        f"{firsts[0].upcycled.last.step} more steps;\ncost in dense steps; gain: nats below the dense model "
        f"trained on, which is at {dense}"
    )
    columns = (
        "", "parameters", "cost", "before", "after", "gain, equal steps", "equal operations", "uncovered",
    )  # fmt: skip
    table = _table(columns)
    for label in found[0]:
        rows = [arms[label] for arms in found]
        run = rows[0].upcycled
        table.add_row(
            label,
            f"{run.parameters:,}",
            f"{run.step_flops / rows[0].dense.step_flops:.2f}",
            f"{np.mean([arms.upcycled.points[0].loss for arms in rows]):.4f}",
            f"{np.mean([arms.upcycled.last.loss for arms in rows]):.4f}",
            gains([arms.gain(False) for arms in rows]),
            gains([arms.gain(True) for arms in rows]),
            f"{np.mean([arms.upcycled.uncovered for arms in rows]):.1%}",
        )
    console.print(table)


def show_tuning(kind: str, found: Sequence[Tuned]) -> None:
    """What each model is worth on the other task."""
    count = found[0].run.last.step
    heading(f"{kind}, the other task: held-out loss and accuracy before and after {count} steps of tuning")
    probed = [item for item in found if item.probe is not None]
    columns = ("", "before", "after", "accuracy after", *(["10-shot probe"] if probed else []))
    table = _table(columns)
    for arm in dict.fromkeys(item.arm for item in found):
        own = [item for item in found if item.arm == arm]
        cells = [
            mean([item.run.points[0].loss for item in own]),
            mean([item.run.last.loss for item in own]),
            mean([item.run.last.accuracy for item in own]),
        ]
        table.add_row(arm, *cells, *([mean([item.probe for item in own])] if probed else []))
    console.print(table)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table


# Pictures -------------------------------------------------------------------------------------------------------------


def draw_curves(results: Mapping[str, Sequence[Arms]], file: Path) -> None:
    """Loss against operations, the mean over seeds in a band of their extremes."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.5), squeeze=False, layout="constrained")
    for axis, (kind, found) in zip(axes[0], results.items(), strict=True):
        sunk = found[0].dense.flops
        lines = {
            "dense, trained on": ([arms.continued for arms in found], 1.0),
            "upcycled": ([arms.upcycled for arms in found], 1.0),
            "mixture from scratch": ([arms.scratch for arms in found if arms.scratch], 0.0),
            "dense, first training": ([arms.dense for arms in found], 0.0),
        }
        for label, (runs, offset) in lines.items():
            places = [offset + point.step * runs[0].step_flops / sunk for point in runs[0].points]
            losses = np.array([[point.loss for point in run.points] for run in runs])
            (line,) = axis.plot(places, losses.mean(0), marker=".", label=label)
            axis.fill_between(places, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2)
        lowest = min(point.loss for arms in found for run in (arms.upcycled, arms.continued) for point in run.points)
        start = max(arms.dense.last.loss for arms in found)
        axis.set_ylim(lowest - 0.1 * (start - lowest + 0.1), start + 2 * (start - lowest + 0.1))
        axis.set(title=kind, xlabel="operations / those of the dense model's first training", ylabel="held-out loss")
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_ablations(found: Sequence[Mapping[str, Arms]], file: Path) -> None:
    """How far below the dense model each variant is, at equal steps and at equal operations."""
    plt = _pyplot()
    labels = list(found[0])
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(labels) + 1.2), layout="constrained")
    for shift, equal, name in ((-0.2, False, "equal steps"), (0.2, True, "equal operations")):
        values = [[gain for arms in found if (gain := arms[label].gain(equal)) is not None] for label in labels]
        places = np.arange(len(labels)) + shift
        axis.barh(places, [np.mean(value or [0.0]) for value in values], 0.4, label=name, alpha=0.6)
        for place, value in zip(places, values, strict=True):
            axis.plot(value, [place] * len(value), "k.", markersize=3)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("nats below the dense model trained on; a point for each seed")
    axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt

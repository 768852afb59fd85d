"""What analyze reports, as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console

from surgery.cli.formats import percent, plural, some
from surgery.cli.tables import MOST_ROWS, facts, line, notes, shape, table

if TYPE_CHECKING:
    from surgery.analysis.report import AnalyzedModule, AnalyzeReport, Overlap, PairReport, UpdateReport


def analyzed(console: Console, report: AnalyzeReport, every: bool) -> None:
    """Draw what `analyze` returns; with `every`, list all matrices."""
    if report.adapters:
        _adapters(console, report, every)
    else:
        _weights(console, report, every)
    if report.left_out:
        line(console, f"Left out, having no factors: {some(report.left_out)}.")
    if report.plot is not None:
        line(console, f"Drawn in {report.plot}.")
    notes(console, report.notes)


def _weights(console: Console, report: AnalyzeReport, every: bool) -> None:
    columns = ("shape", "norm", "largest", "stable rank", "effective", "90% in", "99% in")
    _tables(console, report.modules, every, columns, _weight_cells)
    line(console, "")
    pairs = [
        ("base", f"{report.label}: {_matrices(len(report.modules))}"),
        ("stable rank", "squared norm over squared largest singular value"),
        ("effective", "exp(entropy of the singular values), of min(out, in)"),
        ("90% in", "share of the directions that hold 90% of the squared norm"),
    ]
    console.print(facts(pairs))


def _weight_cells(found: Sequence[AnalyzedModule]) -> tuple[str, ...]:
    spectra = [module.spectrum for module in found if module.spectrum is not None]
    return (
        _shape(found),
        _three(median(one.norm for one in spectra)),
        _three(median(one.values[0] for one in spectra)),
        _three(median(one.stable_rank for one in spectra)),
        percent(median(one.effective_rank / one.rank for one in spectra)),
        percent(median(one.rank_90 / one.rank for one in spectra)),
        percent(median(one.rank_99 / one.rank for one in spectra)),
    )


def _adapters(console: Console, report: AnalyzeReport, every: bool) -> None:
    columns = ("rank", "effective", "change", "amplified", "by chance", "phi out", "chance", "phi in", "chance")
    for number, name in enumerate(report.adapters):
        weight = report.weights[number]
        line(console, f"{name}{'' if weight == 1 else f' x {weight:g}'}")

        def cells(found: Sequence[AnalyzedModule], number: int = number) -> tuple[str, ...]:
            return _update_cells([one for module in found for one in module.updates if one.adapter == number])

        mine = [module for module in report.modules if any(one.adapter == number for one in module.updates)]
        _tables(console, mine, every, columns, cells)
        line(console, "")
    for left, right in _pairs(report):
        line(console, f"{report.adapters[left]} and {report.adapters[right]}")

        def between(found: Sequence[AnalyzedModule], pair: tuple[int, int] = (left, right)) -> tuple[str, ...]:
            return _pair_cells([one for module in found for one in module.pairs if (one.left, one.right) == pair])

        shared = [module for module in report.modules if any((p.left, p.right) == (left, right) for p in module.pairs)]
        _tables(console, shared, every, ("cosine", "phi out", "chance", "phi in", "chance"), between)
        line(console, "")
    pairs = [
        ("base", f"{report.label}: {_matrices(len(report.modules))} with factors"),
        ("change", "norm of dW over norm of W"),
        ("amplified", "norm of dW over what W has in its directions; by chance, over what random ones would have"),
        ("phi", "share of the directions of dW within as many leading ones of W, or within the other adapter's"),
        ("chance", "what random subspaces of these sizes share"),
    ]
    console.print(facts(pairs))


def _update_cells(updates: Sequence[UpdateReport]) -> tuple[str, ...]:
    ranks = sorted(one.rank for one in updates)
    return (
        str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}..{ranks[-1]}",
        _three(_median(one.spectrum.effective_rank for one in updates)),
        percent(_median(one.change for one in updates)),
        _three(_median(one.amplification for one in updates)),
        _three(_median(one.chance_amplification for one in updates)),
        *_shared([one.output for one in updates]),
        *_shared([one.input for one in updates]),
    )


def _pair_cells(pairs: Sequence[PairReport]) -> tuple[str, ...]:
    cosine = _median(one.cosine for one in pairs)
    return (
        "-" if cosine is None else f"{cosine:.3f}",
        *_shared([one.output for one in pairs]),
        *_shared([one.input for one in pairs]),
    )


def _pairs(report: AnalyzeReport) -> list[tuple[int, int]]:
    return sorted({(one.left, one.right) for module in report.modules for one in module.pairs})


def _tables(
    console: Console,
    modules: Sequence[AnalyzedModule],
    every: bool,
    columns: Sequence[str],
    cells: Callable[[Sequence[AnalyzedModule]], tuple[str, ...]],
) -> None:
    """One row for each matrix where they are few or all are asked for; else medians by group, and by layer."""
    if every or len(modules) <= MOST_ROWS:
        console.print(table(("matrix", *columns), [(_short(module.name), *cells([module])) for module in modules]))
        return
    console.print(table(("medians", *columns), _rows(_grouped(modules, _group), cells)))
    line(console, "")
    layers = _grouped(modules, _layer)
    if len(layers) > 1:
        shown = [place for place, name in enumerate(columns) if name not in ("shape", "rank")]
        rows = [(row[0], *(row[place + 1] for place in shown)) for row in _rows(layers, cells)]
        console.print(table(("medians", *(columns[place] for place in shown)), rows))
    line(console, "--all lists every matrix.")


def _short(name: str) -> str:
    """A name without what all of them end with."""
    tensor, bracket, expert = name.partition("[")
    return tensor.removesuffix(".weight") + bracket + expert


def _grouped(
    modules: Iterable[AnalyzedModule], key: Callable[[AnalyzedModule], str]
) -> dict[str, list[AnalyzedModule]]:
    groups: dict[str, list[AnalyzedModule]] = {}
    for module in modules:
        groups.setdefault(key(module), []).append(module)
    return groups


def _group(module: AnalyzedModule) -> str:
    return module.group


def _layer(module: AnalyzedModule) -> str:
    return "outside of layers" if module.layer is None else f"layer {module.layer}"


def _rows(
    groups: Mapping[str, Sequence[AnalyzedModule]], cells: Callable[[Sequence[AnalyzedModule]], tuple[str, ...]]
) -> list[tuple[str, ...]]:
    return [(f"{name} ({len(found)})", *cells(found)) for name, found in groups.items()]


def _shared(overlaps: Sequence[Overlap | None]) -> tuple[str, str]:
    """What two subspaces share, and what chance gives."""
    known = [one for one in overlaps if one is not None]
    return percent(_median(one.whole for one in known)), percent(_median(one.chance for one in known))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _three(value: float | None) -> str:
    """Three significant digits; a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _shape(found: Sequence[AnalyzedModule]) -> str:
    shapes = {module.shape for module in found}
    return shape(shapes.pop()) if len(shapes) == 1 else "various"


def _matrices(count: int) -> str:
    return plural(count, "matrix") if count == 1 else f"{count} matrices"

"""What a picture of a report shows, as tables and curves: the same for every way of drawing it. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

from surgery.analysis.report import AnalyzedModule, AnalyzeReport, Overlap, PairReport, UpdateReport
from surgery.names import plain

# More columns than this are summed up by part of the model; more pairs of adapters share one table.
MOST_GROUPS = 24
MOST_PAIRS = 3
OUTSIDE = "-"


@dataclass(frozen=True)
class Grid:
    """A table of numbers, each drawn on a colour between those of `low` and `high`.

    Attributes:
        title, note: what it is, and how to read it.
        corner: what rows and columns are, as `layer / module`.
        rows, columns: their names.
        values: one row of numbers for each row; None where there is none.
        low, high: the ends of the colour scale.
        share: whether the numbers are shares of one.
    """

    title: str
    note: str
    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    low: float
    high: float
    share: bool = False


@dataclass(frozen=True)
class Curve:
    """One line of a `Curves`: its name and its points."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Curves:
    """Lines over logarithmic axes."""

    title: str
    note: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]


def panels(report: AnalyzeReport) -> list[Grid | Curves]:
    """What to draw of a report, in order."""
    return _of_adapters(report) if report.adapters else _of_base(report)


def _of_base(report: AnalyzeReport) -> list[Grid | Curves]:
    def spectrum(module: AnalyzedModule) -> Sequence[tuple[float, float]]:
        found = module.spectrum
        if found is None or not found.values[0]:
            return ()
        return [
            (place / found.rank, value / found.values[0]) for place, value in _listed(found.positions, found.values)
        ]

    def needed(module: AnalyzedModule) -> float | None:
        return None if module.spectrum is None else module.spectrum.effective_rank / module.spectrum.rank

    def held(module: AnalyzedModule) -> float | None:
        return None if module.spectrum is None else module.spectrum.rank_99 / module.spectrum.rank

    def stable(module: AnalyzedModule) -> float | None:
        return None if module.spectrum is None else module.spectrum.stable_rank

    return [
        _curves(
            "Singular values of W",
            "Medians over the layers. A straight, low line is a matrix of few directions; a high one uses all.",
            "position, as a share of the rank",
            "sigma / sigma 1",
            report.modules,
            spectrum,
        ),
        _by_layer(
            "Effective rank of W", "As a share of the full rank: 100% is a flat spectrum.", report.modules, needed, True
        ),
        _by_layer("Directions for 99% of the squared norm", "As a share of the full rank.", report.modules, held, True),
        _by_layer("Stable rank of W", "Squared norm over squared largest singular value.", report.modules, stable),
    ]


def _of_adapters(report: AnalyzeReport) -> list[Grid | Curves]:
    drawn: list[Grid | Curves] = []
    for number, adapter in enumerate(_names(report)):
        drawn += _of_adapter(report, number, adapter)
    names = _names(report)
    pairs = list(combinations(range(len(names)), 2))
    if len(pairs) > 1:
        drawn.append(_between(report, names))
    for left, right in pairs if len(pairs) <= MOST_PAIRS else ():
        drawn += _of_pair(report, left, right, f"{names[left]} and {names[right]}")
    return drawn


def _of_adapter(report: AnalyzeReport, number: int, adapter: str) -> list[Grid | Curves]:
    def update(module: AnalyzedModule) -> UpdateReport | None:
        return next((one for one in module.updates if one.adapter == number), None)

    def field(read: Callable[[UpdateReport], float | None]) -> Callable[[AnalyzedModule], float | None]:
        return lambda module: None if (found := update(module)) is None else read(found)

    def spectrum(module: AnalyzedModule) -> Sequence[tuple[float, float]]:
        found = update(module)
        if found is None or not found.directions or not module.norm:
            return ()
        listed = _listed(found.spectrum.positions, found.spectrum.values)
        return [(float(place), value / module.norm) for place, value in listed]

    def relative(found: UpdateReport) -> float | None:
        return found.seen / found.chance if found.chance else None

    modules = [module for module in report.modules if update(module) is not None]
    drawn: list[Grid | Curves] = [
        _by_layer(f"{adapter}: size", "Norm of dW over norm of W.", modules, field(lambda one: one.change), True),
        _by_layer(
            f"{adapter}: amplification",
            "Norm of dW over the norm of what W has in its directions. High: dW strengthens what W does not emphasise.",
            modules,
            field(lambda one: one.amplification),
        ),
        _by_layer(
            f"{adapter}: W in the directions of dW",
            "What W has there, over what it has in random directions. 1: dW knows nothing of W.",
            modules,
            field(relative),
        ),
        _curves(
            f"{adapter}: singular values of dW",
            "Over the norm of W; medians over the layers.",
            "position",
            "sigma / norm of W",
            modules,
            spectrum,
        ),
    ]
    overlaps = [one for module in modules if (found := update(module)) and (one := found.input) is not None]
    table = _mean_phi(f"{adapter}: phi with W, input side", "directions of dW / of W", overlaps)
    return [*drawn, *table]


def _of_pair(report: AnalyzeReport, left: int, right: int, names: str) -> list[Grid | Curves]:
    def pair(module: AnalyzedModule) -> PairReport | None:
        return next((one for one in module.pairs if (one.left, one.right) == (left, right)), None)

    def side(read: Callable[[PairReport], Overlap | None]) -> Callable[[AnalyzedModule], float | None]:
        def value(module: AnalyzedModule) -> float | None:
            found = pair(module)
            overlap = None if found is None else read(found)
            return None if overlap is None else overlap.whole

        return value

    modules = [module for module in report.modules if pair(module) is not None]
    inputs = [one for module in modules if (found := pair(module)) and (one := found.input) is not None]
    if not inputs:
        return []
    chance = fmean(one.chance for one in inputs)
    note = f"Of all their directions. 100%: one subspace holds the other; {chance:.1%} is what chance gives."
    return [
        _by_layer(f"{names}: shared input directions", note, modules, side(lambda one: one.input), True),
        _by_layer(f"{names}: shared output directions", note, modules, side(lambda one: one.output), True),
        *_mean_phi(f"{names}: phi(i, j), input side", "directions of the first / of the second", inputs),
    ]


def _between(report: AnalyzeReport, names: Sequence[str]) -> Grid:
    """Every two adapters: the mean of what they share on the input side."""
    means: dict[tuple[int, int], float] = {}
    for left, right in combinations(range(len(names)), 2):
        found = [
            pair.input.whole
            for module in report.modules
            for pair in module.pairs
            if (pair.left, pair.right) == (left, right) and pair.input is not None
        ]
        if found:
            means[left, right] = means[right, left] = fmean(found)
    values = tuple(tuple(means.get((row, column)) for column in range(len(names))) for row in range(len(names)))
    note = "phi of all their directions, mean over the matrices that both act on."
    return Grid("Shared input directions", note, "adapter", tuple(names), tuple(names), values, 0.0, 1.0, True)


def _mean_phi(title: str, corner: str, overlaps: Sequence[Overlap]) -> list[Grid]:
    """phi(i, j), mean over those matrices that have as many directions as most."""
    if not overlaps:
        return []
    rows = max(len(one.phi) for one in overlaps)
    columns = max(len(one.phi[0]) for one in overlaps)
    full = [one.phi for one in overlaps if (len(one.phi), len(one.phi[0])) == (rows, columns)]
    if not full:
        return []
    values = tuple(tuple(fmean(phi[i][j] for phi in full) for j in range(columns)) for i in range(rows))
    note = f"How much of i leading directions lies in j of the other; mean over {len(full)} matrices."
    numbers = tuple(str(i + 1) for i in range(max(rows, columns)))
    return [Grid(title, note, corner, numbers[:rows], numbers[:columns], values, 0.0, 1.0, True)]


def _names(report: AnalyzeReport) -> list[str]:
    """What to call the adapters; those with the same name are numbered."""
    names = [plain(name) for name in report.adapters]
    return [name if names.count(name) == 1 else f"{name} ({number + 1})" for number, name in enumerate(names)]


def _column(modules: Iterable[AnalyzedModule]) -> Callable[[AnalyzedModule], str]:
    groups = {module.group for module in modules}
    return (lambda module: plain(module.group)) if len(groups) <= MOST_GROUPS else (lambda module: module.part)


def _by_layer(
    title: str,
    note: str,
    modules: Sequence[AnalyzedModule],
    value: Callable[[AnalyzedModule], float | None],
    share: bool = False,
) -> Grid:
    """Medians by layer and group, on colours that begin at zero: small differences look small."""
    column = _column(modules)
    columns = list(dict.fromkeys(column(module) for module in modules))
    layers = sorted({module.layer for module in modules}, key=lambda layer: (layer is None, layer or 0))
    cells: dict[tuple[int | None, str], list[float]] = {}
    for module in modules:
        if (number := value(module)) is not None:
            cells.setdefault((module.layer, column(module)), []).append(number)
    values = tuple(
        tuple(median(found) if (found := cells.get((layer, name))) else None for name in columns) for layer in layers
    )
    known = [number for row in values for number in row if number is not None]
    return Grid(
        title=title,
        note=note,
        corner="layer",
        rows=tuple(OUTSIDE if layer is None else str(layer) for layer in layers),
        columns=tuple(columns),
        values=values,
        low=0.0,
        high=max(known, default=1.0),
        share=share,
    )


def _curves(
    title: str,
    note: str,
    x_label: str,
    y_label: str,
    modules: Sequence[AnalyzedModule],
    points: Callable[[AnalyzedModule], Sequence[tuple[float, float]]],
) -> Curves:
    """For each group the medians of its points, which must be above zero to be on a logarithmic axis."""
    column = _column(modules)
    found: dict[str, dict[float, list[float]]] = {}
    for module in modules:
        for x, y in points(module):
            if y > 0:
                found.setdefault(column(module), {}).setdefault(x, []).append(y)
    curves = []
    for name, by_x in found.items():
        ordered = sorted(by_x.items())
        curves.append(Curve(name, tuple(x for x, _ in ordered), tuple(median(y) for _, y in ordered)))
    return Curves(title, note, x_label, y_label, tuple(curves))


def _listed(positions: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    return list(zip(positions, values, strict=True))

"""What combine and resize report, as text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console

from surgery.cli.formats import number, percent, plural, size, some
from surgery.cli.tables import MOST_ROWS, facts, line, notes, plan, resumed, shape, table

if TYPE_CHECKING:
    from surgery.reports import CombinedModule, CombineReport


def combination(console: Console, report: CombineReport, every: bool) -> None:
    """Draw what `combine` or `resize` returns; with `every`, list all modules."""
    if report.dry_run:
        plan(console, report.plan, report.output)
        notes(console, report.notes)
        return
    listed = every or len(report.modules) <= MOST_ROWS
    rows = [_combined_row(m.name, [m]) for m in report.modules] if listed else _combined_groups(report.modules)
    first = "module" if listed else "medians"
    columns = (first, "shape", "ranks", "rank", "kept", "error", "worst error", "from the sum")
    shown = [place for place, name in enumerate(columns) if not listed or name != "worst error"]
    console.print(table([columns[p] for p in shown], [[row[p] for p in shown] for row in rows], left=2))
    if not listed:
        line(console, "--all lists every module.")
    line(console, "")
    adapters = zip(report.adapters, report.weights, strict=True)
    pairs = [
        ("adapter", f"{report.output}: {number(report.parameters)} parameters, {size(report.nbytes)}"),
        ("made of", ", ".join(name if weight == 1 else f"{name} x {weight:g}" for name, weight in adapters)),
        ("method", report.method),
        ("kept", f"{percent(report.energy_kept)} of the energy of dW"),
        ("error", f"{percent(report.error)} of its norm"),
    ]
    if report.method not in ("sum", "cat"):
        pairs.append(("from the sum", f"{percent(report.from_sum)} of the norm of the weighted sum"))
    if report.stored_whole:
        pairs.append(("stored whole", some(report.stored_whole)))
    console.print(facts([*pairs, *resumed(report.resumed)]))
    notes(console, report.notes)


def _combined_row(name: str, found: Sequence[CombinedModule]) -> tuple[str, ...]:
    """One row for modules of a kind: what they have in common, and the median of the rest."""
    shapes, ranks = {module.shape for module in found}, {module.ranks for module in found}
    result = sorted(module.rank for module in found)
    return (
        name,
        shape(shapes.pop()) if len(shapes) == 1 else "various",
        ", ".join(str(rank) if rank else "-" for rank in ranks.pop()) if len(ranks) == 1 else "various",
        str(result[0]) if result[0] == result[-1] else f"{result[0]}..{result[-1]}",
        percent(median(module.energy_kept for module in found)),
        percent(median(module.error for module in found)),
        percent(max(module.error for module in found)),
        percent(median(module.from_sum or 0.0 for module in found)),
    )


def _combined_groups(modules: Sequence[CombinedModule]) -> Sequence[tuple[str, ...]]:
    groups: dict[str, list[CombinedModule]] = {}
    for module in modules:
        groups.setdefault(module.name.rpartition(".")[2], []).append(module)
    return [_combined_row(f"{name} ({plural(len(found), 'module')})", found) for name, found in groups.items()]

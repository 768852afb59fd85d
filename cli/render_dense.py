"""What dense reports, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from surgery.cli.formats import number, size
from surgery.cli.tables import facts, line, notes, plan, resumed

if TYPE_CHECKING:
    from surgery.upcycling.report import DenseReport


def downcycled(console: Console, report: DenseReport, _every: bool) -> None:
    """Draw what `dense` returns."""
    layers = "; ".join(f"{len(numbers)} of the {stack}" for stack, numbers in report.layers.items())
    pairs = [
        ("dense model", f"{report.output}: {report.architecture or report.target}"),
        ("parameters", f"{number(report.parameters)}; the mixture has {number(report.mixture_parameters)}"),
        ("bytes", size(report.nbytes)),
        ("layers", f"{layers}, each with {report.experts} experts"),
        ("MLP from", _taken(report)),
        ("left out", f"{number(len(report.dropped))} tensors that a {report.target} has no place for: "
                     f"{_shown(report.dropped)}" if report.dropped else "nothing"),
    ]  # fmt: skip
    if report.dry_run:
        plan(console, report.plan, report.output)
        line(console, "")
    console.print(facts([*pairs, *resumed(report.resumed)]))
    notes(console, report.notes)


def _taken(report: DenseReport) -> str:
    if report.taken is None:
        return "the mean of all experts"
    alike = "; all are the same" if report.identical else ""
    return f"expert {report.taken}{alike}"


def _shown(names: tuple[str, ...]) -> str:
    """The first name, and what kinds of others there are: their last two parts."""
    kinds = dict.fromkeys(".".join(name.split(".")[-2:]) for name in names)
    listed = list(kinds)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")

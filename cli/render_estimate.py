"""What estimate reports, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from surgery.cli.formats import number, percent, plural, size
from surgery.cli.tables import facts, line, notes, table

if TYPE_CHECKING:
    from surgery.training.estimate import EstimateReport

_PARTS = ("weights", "master", "gradients", "optimizer", "gathered", "activations", "total")


def estimated(console: Console, report: EstimateReport, _every: bool) -> None:
    """Draw what `estimate` returns."""
    trained, whole = report.trainable_parameters, report.parameters
    rows = f"{plural(report.batch_size, 'row')}" + (f" of {report.length} tokens" if report.length else "")
    share = f", sharing out {report.sharding}" if report.sharding != "none" else ""
    pairs = [
        ("model", f"{report.label}: {report.architecture}, {number(whole)} parameters"),
        (
            "trained",
            f"{number(trained)} ({trained}) by {report.method}, {percent(trained / whole)} of the model's number",
        ),
        ("saved", f"{report.saves} of {size(report.adapter_bytes)}"),
        ("learning rate", f"{report.learning_rate:g} to start from"),
        ("each device", f"{rows}; {plural(report.devices, 'device')}{share}"),
    ]
    console.print(facts(pairs))
    line(console, "")
    memory = {name: getattr(report.memory, name) for name in _PARTS}
    shown = [(name, *_both(count)) for name, count in memory.items() if count or name == "total"]
    console.print(table(("memory", "GB", "GiB"), shown))
    notes(console, report.notes)


def _both(count: int) -> tuple[str, str]:
    """Bytes in units of 10^9 and of 2^30."""
    return _three(count / 1e9), _three(count / 2**30)


def _three(value: float) -> str:
    """Three digits after the point from 1 on, three significant ones below."""
    return f"{value:.3f}" if value >= 1 else f"{value:.3g}"

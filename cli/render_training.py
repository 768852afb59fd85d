"""What train reports, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from surgery.cli.formats import number, plural
from surgery.cli.tables import facts, notes, resumed

if TYPE_CHECKING:
    from surgery.training.report import DataReport, TrainReport


def trained(console: Console, report: TrainReport, _every: bool) -> None:
    """Draw what `train` returns."""
    pairs = [
        ("would write" if report.dry_run else "written", f"{report.output}: {report.kind}"),
        ("task", f"{report.task}, on {report.device}, {report.precision}, {plural(report.processes, 'process')}"),
        ("trained", f"{report.method}: {number(report.trained)} of {number(report.parameters)} parameters"),
        ("data", _data(report.data)),
    ]
    if report.eval_data is not None:
        pairs.append(("held out", _data(report.eval_data)))
    done = f"{report.done} of {report.steps}" if not report.dry_run else f"{report.steps}"
    pairs.append(("steps", f"{done}, {report.epochs:g} times through the data"))
    if report.tokens_per_second is not None:
        pairs.append(("rate", f"{report.tokens_per_second:,.0f} tokens/s"))
    if report.first_loss is not None and report.last_loss is not None:
        pairs.append(("loss", f"{report.first_loss:.4f} in the first step, {report.last_loss:.4f} in the last"))
    if report.best_loss is not None and report.eval_loss is not None:
        pairs.append(
            (
                "held-out loss",
                f"{report.best_loss:.4f} after step {report.best_step}, {report.eval_loss:.4f} at the end",
            )
        )
    if not report.dry_run:
        pairs.append(("weights", f"of step {report.written}"))
    console.print(facts([*pairs, *resumed(report.resumed)]))
    notes(console, report.notes)


def _data(data: DataReport) -> str:
    text = f"{data.source}: {plural(data.examples, 'example')} ({data.kind})"
    if data.rows != data.examples:
        text += f" in {plural(data.rows, 'row')}"
    return f"{text}, {number(data.tokens)} tokens, {number(data.predictions)} predictions"

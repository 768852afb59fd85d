"""Which function draws which report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from surgery.cli.render_adapters import extraction, merged, restored
from surgery.cli.render_algebra import combination
from surgery.cli.render_analysis import analyzed
from surgery.cli.render_dense import downcycled
from surgery.cli.render_estimate import estimated
from surgery.cli.render_evaluation import evaluated, judged
from surgery.cli.render_exchange import converted, linted
from surgery.cli.render_look import adapter, checkpoint, compared, verified
from surgery.cli.render_mixtures import upcycled
from surgery.cli.render_training import trained
from surgery.cli.tables import Reported, network, show

# By the name of the report's class, so that nothing is imported to look it up.
DRAWINGS: dict[str, Callable[[Console, Any, bool], None]] = {
    "AdapterReport": adapter,
    "AnalyzeReport": analyzed,
    "CheckpointReport": checkpoint,
    "CombineReport": combination,
    "CompareReport": compared,
    "ConvertReport": converted,
    "DenseReport": downcycled,
    "EstimateReport": estimated,
    "EvalReport": evaluated,
    "ExtractReport": extraction,
    "LintReport": linted,
    "MergeReport": merged,
    "RestoreReport": restored,
    "TrainReport": trained,
    "UpcycleReport": upcycled,
    "VerdictsReport": judged,
    "VerifyReport": verified,
}


def present(report: Reported, as_json: bool, quiet: bool, every: bool = False) -> None:
    """Print a report in the way that belongs to its class; with `every`, list all that it has."""
    draw = DRAWINGS[type(report).__name__]

    def drawn(console: Console) -> None:
        draw(console, report, every)
        network(console, getattr(report, "fetched", ()))

    show(report, drawn, as_json, quiet)

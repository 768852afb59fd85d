"""What convert and lint report, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from surgery.cli.formats import number, plural, size
from surgery.cli.tables import facts, line, notes, plan, resumed, table

if TYPE_CHECKING:
    from surgery.ops.lint import LintReport
    from surgery.reports import ConvertReport


def converted(console: Console, report: ConvertReport, every: bool = False) -> None:
    """Draw what `convert` returns."""
    del every
    if report.dry_run:
        plan(console, report.plan, report.output)
        notes(console, report.notes)
        return
    computed = report.tensors - report.moved
    pairs = [
        ("adapter", f"{report.output}/{report.file}: {number(report.parameters)} parameters, {size(report.nbytes)}"),
        ("format", f"{report.source_format} to {report.target_format}"),
        ("modules", str(report.modules)),
        ("tensors", f"{report.moved} copied unchanged, {computed} computed"),
        ("scales", _scales(report)),
    ]
    console.print(facts([*pairs, *resumed(report.resumed)]))
    notes(console, report.notes)


def linted(console: Console, report: LintReport, every: bool = False) -> None:
    """Draw what `lint` returns: a verdict for each consumer, then each finding with its source and its remedy."""
    del every  # findings are all listed
    what = f"{report.format} {report.subject}" if report.format else report.subject
    console.print(facts([(what, report.label)]))
    console.print(table(("for", "verdict"), list(report.verdicts.items()), left=2))
    for finding in report.findings:
        line(console, "")
        line(console, f"{finding.rule} ({finding.severity}): {finding.message}.")
        if finding.mend:
            line(console, f"  mend    {finding.mend}")
        line(console, f"  source  {finding.source}")


def _scales(report: ConvertReport) -> str:
    if report.scaled:
        return f"folded into {plural(report.scaled, 'tensor')}, rounded once"
    return f"rounded to float32, by {report.scale_error:.1g} at most" if report.scale_error else "exact"

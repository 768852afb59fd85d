"""What eval and verdicts report, as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console

from surgery.cli.formats import number, percent, plural
from surgery.cli.tables import facts, notes, table

if TYPE_CHECKING:
    from surgery.evaluation.report import EvalLine, EvalReport, Tally, VerdictsReport


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


# Column, field, and how it is written; columns that no line has are left out.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("examples", "examples", str),
    ("predictions", "predictions", str),
    ("loss", "loss", _fixed(4)),
    ("perplexity", "perplexity", lambda value: f"{value:.4g}"),
    ("bits/byte", "bits_per_byte", _fixed(4)),
    ("accuracy", "accuracy", percent),
    ("Matthews", "matthews", _fixed(4)),
    ("F1", "f1", _fixed(4)),
    ("macro F1", "f1_macro", _fixed(4)),
    ("Pearson", "pearson", _fixed(4)),
    ("Spearman", "spearman", _fixed(4)),
    ("exact", "exact_match", percent),
    ("BLEU", "bleu", _fixed(2)),
    ("ROUGE-1", "rouge1", _fixed(4)),
    ("ROUGE-2", "rouge2", _fixed(4)),
    ("ROUGE-L", "rouge_l", _fixed(4)),
)


def evaluated(console: Console, report: EvalReport, _every: bool) -> None:
    """Draw what `eval` returns."""
    data = report.data
    about = f"{data.source}: {plural(data.examples, 'example')} ({data.kind}), {number(data.predictions)} predictions"
    pairs = [("task", f"{report.task}, on {report.device}, {report.precision}"), ("data", about)]
    if report.adapter_field is not None:
        pairs.append(("adapters", f"of each row by its {report.adapter_field!r}"))
    pairs += [("would write" if report.dry_run else "written", path) for path in report.files.values()]
    console.print(facts(pairs))
    used = [column for column in _COLUMNS if any(_cell(line, column) != "-" for line in report.lines)]
    if report.dry_run:
        used = used[:1]
    several = any(line.together or line.reason for line in report.lines)
    left = ["model", "kind", *(["pass"] if several else [])]
    rows = [
        [line.name, line.kind, *([_passes(line)] if several else []), *(_cell(line, column) for column in used)]
        for line in report.lines
    ]
    console.print()
    console.print(table([*left, *(name for name, _, _ in used)], rows, left=len(left)))
    if routed := [line for line in report.lines if line.load]:
        console.print()
        console.print(
            table(["model", "layer", "largest load", "smallest", "entropy", "uncovered"], _routers(routed), 2)
        )
    if report.notes:
        console.print()
    notes(console, report.notes)


def judged(console: Console, report: VerdictsReport, _every: bool) -> None:
    """Draw what `verdicts` returns."""
    console.print(
        facts(
            [
                ("model", report.model),
                ("against", report.against),
                ("judged", f"{report.judged} of {plural(report.pairs, 'pair')}"),
            ]
        )
    )
    console.print()
    rows = [_share(name, share) for name, share in (("win", report.win), ("tie", report.tie), ("lose", report.lose))]
    console.print(table(["verdict", "pairs", "share", "95% from", "to"], rows))
    console.print()
    if report.p_value is not None:
        console.print(facts([("sign test, p", f"{report.p_value:.3g}")]))
    notes(console, report.notes)


def _share(name: str, share: Tally) -> list[str]:
    return [name, str(share.count), *(percent(value) for value in (share.share, share.low, share.high))]


def _passes(line: EvalLine) -> str:
    return "shared" if line.together else "own"


def _cell(line: EvalLine, column: tuple[str, str, Callable[[Any], str]]) -> str:
    value = getattr(line, column[1])
    return "-" if value is None else column[2](value)


def _routers(lines: list[EvalLine]) -> list[list[str]]:
    return [
        [
            line.name,
            layer,
            percent(max(loads)),
            percent(min(loads)),
            f"{(line.router_entropy or {})[layer]:.3f}",
            percent((line.uncovered or {})[layer]),
        ]
        for line in lines
        for layer, loads in (line.load or {}).items()
    ]

"""What inspect and verify report, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from surgery.cli.formats import more, number, percent, plural, size, some
from surgery.cli.tables import MOST_ROWS, facts, line, shape, table

if TYPE_CHECKING:
    from surgery.ops.inspection import AdapterReport, CheckpointReport, Origin, Share
    from surgery.ops.verify import CompareReport, LogitReport, VerifyReport


def checkpoint(console: Console, report: CheckpointReport, every: bool = False) -> None:
    """Draw what `inspect` says of a checkpoint."""
    del every  # `--tensors` decides what the report lists
    known = "" if report.in_table else " (no table row: handled by names and shapes)"
    pairs = [
        ("checkpoint", report.label),
        ("architecture", (report.architecture or "unknown") + known),
        ("size", _whole(report.total)),
        ("layers", str(report.layers)),
    ]
    if report.vocabulary is not None:
        pairs.append(("vocabulary", str(report.vocabulary)))
    if report.tied_head:
        pairs.append(("head", f"tied to {report.tied_head}"))
    if report.experts:
        e = report.experts
        top = "" if e.top_k is None else f", {e.top_k} for each token"
        pairs.append(("experts", f"{e.experts}{top}, in {plural(len(e.layers), 'layer')}, stored {e.stored}"))
    pairs += _origin(report.origin)
    if report.reversible:
        pairs.append(("reversible", "yes: `surgery subtract` restores the base exactly"))
    if report.left_behind:
        pairs.append(("not carried along", some(report.left_behind)))
    console.print(facts(pairs))
    line(console, "")
    console.print(table(("part", "tensors", "parameters", "bytes"), _shares(report.parts)))
    line(console, "")
    console.print(table(("dtype", "tensors", "parameters", "bytes"), _shares(report.dtypes)))
    line(console, "")
    console.print(table(("file", "bytes"), [(name, size(count)) for name, count in report.files.items()]))
    _tensors(console, report)


def adapter(console: Console, report: AdapterReport, every: bool = False) -> None:
    """Draw what `inspect` says of an adapter."""
    del every
    ranks = ", ".join(f"{rank} ({plural(count, 'module')})" for rank, count in report.ranks.items())
    pairs = [
        ("adapter", report.label),
        ("base", report.base or "not named"),
        ("task", report.task or "not named"),
        ("size", _whole(report.total)),
    ]
    if report.method == "LORA":
        pairs += [
            ("ranks", ranks or "no factors"),
            ("lora_alpha", str(report.alpha)),
            ("targets", ", ".join(f"{name} ({count})" for name, count in report.targets.items())),
        ]
    else:
        pairs.append(("method", report.method))
    if report.variants:
        pairs.append(("particulars", ", ".join(report.variants)))
    if report.saved:
        pairs.append(("stored whole", some(report.saved)))
    if report.exact_bytes is not None:
        restores = "`surgery restore` gives the fine-tune back, bit for bit"
        pairs.append(("exact record", f"{size(report.exact_bytes)}: {restores}"))
    pairs += _origin(report.origin)
    console.print(facts(pairs))
    line(console, "")
    console.print(table(("dtype", "tensors", "parameters", "bytes"), _shares(report.dtypes)))
    _tensors(console, report)


def _whole(total: Share) -> str:
    return f"{number(total.parameters)} parameters, {size(total.nbytes)}, {plural(total.tensors, 'tensor')}"


def _shares(shares: Mapping[str, Share]) -> list[tuple[str, ...]]:
    return [(name, str(s.tensors), number(s.parameters), size(s.nbytes)) for name, s in shares.items()]


def _origin(origin: Origin | None) -> list[tuple[str, str]]:
    """Such as `merge of base with adapter=0.5`, or `extract from base, tuned`."""
    if origin is None:
        return []
    names = []
    for item in origin.inputs:
        revision = f"@{item.revision}" if item.revision else ""
        weight = "" if item.weight in (None, 1) else f"={item.weight:g}"
        names.append(f"{item.source}{revision}{weight}")
    if origin.operation == "merge" and len(names) > 1:
        return [("made by", f"merge of {names[0]} with {', '.join(names[1:])}")]
    return [("made by", f"{origin.operation} from {', '.join(names)}" if names else origin.operation)]


def _tensors(console: Console, report: CheckpointReport | AdapterReport) -> None:
    if report.tensors:
        line(console, "")
        rows = [(t.name, t.dtype, shape(t.shape), t.file) for t in report.tensors]
        console.print(table(("tensor", "dtype", "shape", "file"), rows, left=4))


def verified(console: Console, report: VerifyReport, every: bool) -> None:
    """Draw what `verify OUT` found; with `every`, all problems."""
    if report.passed:
        found = f"{plural(report.tensors, 'tensor')} and {plural(report.files, 'file')} match"
        line(console, f"{report.label} is what its surgery.json says: {found}.")
        return
    line(console, f"{report.label} is not what its surgery.json says:")
    shown = report.problems if every else report.problems[:MOST_ROWS]
    for problem in shown:
        line(console, f"  {problem}")
    if len(shown) < len(report.problems):
        line(console, f"  {more(len(report.problems) - len(shown), '--all')}")


def compared(console: Console, report: CompareReport, every: bool) -> None:
    """Draw what `verify A B` found; with `every`, all tensors that differ."""
    if report.passed:
        same = "the one tensor" if report.equal == 1 else f"all {report.equal} tensors"
        line(console, f"{report.left} and {report.right} are the same in {same}.")
    else:
        if report.different:
            shown = report.different if every else report.different[:MOST_ROWS]
            console.print(table(("differs", "by, of its norm"), [(one.name, percent(one.relative)) for one in shown]))
            if len(shown) < len(report.different):
                line(console, more(len(report.different) - len(shown), "--all"))
        for label, names in ((report.left, report.left_only), (report.right, report.right_only)):
            if names:
                line(console, f"only in {label}: {', '.join(names) if every else some(names)}")
        differ = "differs" if len(report.different) == 1 else "differ"
        are = "is" if report.equal == 1 else "are"
        line(console, f"{plural(report.equal, 'tensor')} {are} the same, {len(report.different)} {differ}.")
    if report.logits:
        line(console, _logits(report.logits))


def _logits(found: LogitReport) -> str:
    top = "top token" if "token" in found.inputs else "largest output"
    return (
        f"On {found.inputs} in float32: largest difference {found.largest:.3g}, {percent(found.relative)} of the norm; "
        f"same {top} at {percent(found.agreement)} of positions."
    )

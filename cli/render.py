"""Reports as text: tables for people. Everything here prints to stdout, through rich."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgery.names import plain

if TYPE_CHECKING:
    from surgery.operation import PlanSummary
    from surgery.ops.inspection import AdapterReport, CheckpointReport, Origin, Share
    from surgery.ops.lint import LintReport
    from surgery.ops.verify import CompareReport, VerifyReport
    from surgery.reports import (
        CombinedModule,
        CombineReport,
        ConvertReport,
        ExtractReport,
        MergeReport,
        ModuleReport,
        RestoreReport,
    )

# More rows than this are summed up by the last component of their names, unless every one is asked for.
MOST_ROWS = 60
# Where stdout is no terminal there is no width to fit: wide enough that no name of a tensor is cut.
_WIDTH_OF_A_FILE = 160


class Reported(Protocol):
    """Any report."""

    def as_dict(self) -> dict[str, object]: ...


def show(report: Reported, draw: Callable[[Console], None], as_json: bool, quiet: bool) -> None:
    """Print a report: as one JSON object, as tables, or not at all."""
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2, allow_nan=False))
    elif not quiet:
        console = Console(highlight=False)
        draw(console if console.is_terminal else Console(highlight=False, width=_WIDTH_OF_A_FILE))


def size(count: float) -> str:
    """Bytes for people: 3 digits and a decimal unit.

    >>> size(1234567)
    '1.23 MB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def number(count: float) -> str:
    """A count for people.

    >>> number(4784128)
    '4.78M'
    """
    for unit in ("", "K", "M", "B"):
        if abs(count) < 1000 or unit == "B":
            return f"{count:.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError


def percent(share: float | None) -> str:
    """A share with three significant digits; a dash where there is none.

    >>> percent(0.0290829), percent(0.99915), percent(None)
    ('2.91%', '99.915%', '-')
    """
    if share is None or not math.isfinite(share):
        return "-"
    return f"{share:.3%}" if share > 0.99 else f"{100 * share:.3g}%"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """A table whose first `left` columns are aligned left and the others right. Cells are plain text, never markup."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for position, name in enumerate(columns):
        drawn.add_column(name, justify="left" if position < left else "right", no_wrap=position == 0, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(plain(cell)) for cell in row))
    return drawn


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one to a line."""
    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(style="bold")
    drawn.add_column(overflow="fold")
    for name, value in pairs:
        drawn.add_row(Text(name), Text(plain(value)))
    return drawn


def line(console: Console, text: str) -> None:
    """A line of plain text; where stdout is no terminal it stays one, however long."""
    console.print(Text(plain(text)), soft_wrap=not console.is_terminal)


def notes(console: Console, texts: Iterable[str]) -> None:
    """What a report wants said beside its numbers."""
    for text in texts:
        line(console, f"Note: {text}")


def plan(console: Console, summary: PlanSummary, output: str) -> None:
    """What a dry run shows."""
    pairs = [
        ("would write", output),
        ("read", size(summary.read_bytes)),
        ("written", size(summary.write_bytes)),
        ("of it moved as bytes", size(summary.copied_bytes)),
        ("tensors", f"{summary.tensors}, {summary.computed_tensors} of them computed"),
        ("peak memory", f"about {size(summary.peak_memory_bytes)}"),
        ("free disk", size(summary.free_disk_bytes)),
    ]
    console.print(facts(pairs))


# extract --------------------------------------------------------------------------------------------------------------


def extraction(console: Console, report: ExtractReport, every: bool) -> None:
    """Draw what `extract` returns; with `every`, list all modules."""
    if report.dry_run:
        plan(console, report.plan, report.output)
        if report.estimated_record_bytes is not None:
            line(console, f"The exact record comes on top, with about {size(report.estimated_record_bytes)} at most.")
        notes(console, report.notes)
        return
    columns = ("module", "shape", "rank", "change", "kept", "error", "excess")
    rows = _module_rows(report.modules) if every or len(report.modules) <= MOST_ROWS else _grouped(report.modules)
    console.print(table(columns, rows, left=2))
    line(console, "")
    console.print(
        facts(
            [
                ("adapter", f"{report.output}: {number(report.parameters)} parameters, {size(report.nbytes)}"),
                ("change", f"{percent(report.change)} of the norm of the factored weights"),
                ("kept", f"{percent(report.energy_kept)} of its energy"),
                ("error", f"{percent(report.error)} of its norm"),
                *([("unchanged", f"{report.unchanged} modules, without factors")] if report.unchanged else []),
            ]
        )
    )
    _residual(console, report)
    _exact(console, report)
    notes(console, report.notes)


def _module_rows(modules: Iterable[ModuleReport]) -> Sequence[tuple[str, ...]]:
    return [
        (
            module.name,
            " x ".join(str(side) for side in module.shape),
            str(module.rank),
            percent(module.change),
            percent(module.energy_kept),
            percent(module.error),
            f"{module.excess:.0e}",
        )
        for module in modules
    ]


def _grouped(modules: Sequence[ModuleReport]) -> Sequence[tuple[str, ...]]:
    """One row for all modules of a name, with the median of each column; `--all-modules` lists them."""
    groups: dict[str, list[ModuleReport]] = {}
    for module in modules:
        groups.setdefault(module.name.rpartition(".")[2], []).append(module)
    rows = []
    for name, found in groups.items():
        shapes = {module.shape for module in found}
        ranks = sorted(module.rank for module in found)
        rows.append(
            (
                f"{name} ({len(found)} modules, medians)",
                " x ".join(str(side) for side in shapes.pop()) if len(shapes) == 1 else "various",
                str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}..{ranks[-1]}",
                percent(median(module.change or 0.0 for module in found)),
                percent(median(module.energy_kept for module in found)),
                percent(median(module.error for module in found)),
                f"{max(module.excess for module in found):.0e}",
            )
        )
    return rows


def _residual(console: Console, report: ExtractReport) -> None:
    if not report.residual:
        return
    line(console, "")
    lost = [item for item in report.residual if not item.saved]
    rows = [
        (
            item.name,
            item.part,
            percent(item.change),
            "stored whole" if item.saved else "not in the adapter",
            item.reason,
        )
        for item in report.residual[:MOST_ROWS]
    ]
    console.print(table(("residual", "part", "change", "", ""), rows, left=2))
    if len(report.residual) > MOST_ROWS:
        line(console, f"and {len(report.residual) - MOST_ROWS} more")
    if lost:
        line(
            console, f"{len(lost)} changed parameters have no factors; --save-residual stores those that PEFT can hold."
        )
    if any(item.saved for item in report.residual):
        line(
            console,
            "What is stored whole is read by PEFT and by `surgery merge`. vLLM refuses an adapter with modules_to_save "
            "(other than a classifier's head), and llama.cpp takes norms only.",
        )


def _exact(console: Console, report: ExtractReport) -> None:
    exact = report.exact
    if exact is None:
        return
    line(console, "")
    if len(exact.tensors) <= MOST_ROWS:
        rows = [
            (
                tensor.name,
                tensor.how,
                size(tensor.nbytes),
                size(tensor.tuned_bytes),
                percent(tensor.nbytes / tensor.tuned_bytes if tensor.tuned_bytes else None),
            )
            for tensor in exact.tensors
        ]
        console.print(table(("exact record", "", "kept", "of", "share"), rows, left=2))
        line(console, "")
    together = exact.adapter_bytes + exact.record_bytes
    console.print(
        facts(
            [
                ("fine-tune", f"{size(exact.tuned_bytes)}, restored bit for bit by `surgery restore`"),
                ("adapter", size(exact.adapter_bytes)),
                ("exact record", f"{size(exact.record_bytes)}, of it {size(exact.residual_bytes)} for the weights"),
                ("together", f"{size(together)}, {percent(exact.ratio)} of the fine-tune"),
            ]
        )
    )
    notes(console, exact.notes)


def restored(console: Console, report: RestoreReport) -> None:
    """Draw what `restore` returns."""
    if report.dry_run:
        plan(console, report.plan, report.output)
        return
    console.print(
        facts(
            [
                ("restored", f"{report.output}: {report.tuned}, {size(report.nbytes)} in {report.files} files"),
                ("tensors", f"{report.tensors}, {report.same} of them as they are in the base or the adapter"),
                ("proof", "every tensor and file has the hash it had"),
            ]
        )
    )


# merge, subtract, switch ----------------------------------------------------------------------------------------------


def merged(console: Console, report: MergeReport, every: bool) -> None:
    """Draw what `merge`, `subtract` or `switch` returns; with `every`, list all weights."""
    if report.dry_run:
        plan(console, report.plan, report.output)
        notes(console, report.notes)
        return
    if report.weights:
        rows = [(w.name, percent(w.survived), percent(w.unchanged)) for w in report.weights]
        if not every and len(rows) > MOST_ROWS:
            worst = sorted(report.weights, key=lambda weight: weight.survived if weight.survived is not None else 1.0)
            rows = [(w.name, percent(w.survived), percent(w.unchanged)) for w in worst[:10]]
            rows.append((f"and {len(worst) - 10} that fared better", "", ""))
        console.print(table(("weight", "of dW survived", "weights unchanged"), rows))
        line(console, "")
    pairs = [("checkpoint", f"{report.output}: {size(report.nbytes)}, {report.copied} tensors moved as bytes")]
    if report.removed:
        pairs.append(("taken out", ", ".join(report.removed)))
    if report.exact is not None:
        exact = "exactly, proved by the base's hashes"
        pairs.append(("restored", exact if report.exact else _inexact(report)))
    if report.survived is not None:
        pairs.append(
            ("of dW survived", f"{percent(report.survived)}; {percent(report.unchanged)} of the weights unchanged")
        )
    if report.replaced:
        pairs.append(("replaced", _some(report.replaced)))
    if report.added:
        pairs.append(("added", _some(report.added)))
    if report.record_bytes:
        pairs.append(("undo record", size(report.record_bytes)))
    console.print(facts(pairs))
    if report.survived is not None and report.survived < 0.5:
        line(
            console,
            "Warning: most of the change was lost to rounding: it is smaller than the spacing of the weights' dtype. "
            "Keep the adapter unmerged, or merge it into a float32 base.",
        )
    notes(console, report.notes)


def _inexact(report: MergeReport) -> str:
    share = percent(report.expected_error)
    return f"to within the rounding of the merge, at most about {share} of the norm of the weights"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


# combine, resize ------------------------------------------------------------------------------------------------------


def combination(console: Console, report: CombineReport, every: bool) -> None:
    """Draw what `combine` or `resize` returns; with `every`, list all modules."""
    if report.dry_run:
        plan(console, report.plan, report.output)
        notes(console, report.notes)
        return
    listed = every or len(report.modules) <= MOST_ROWS
    rows = [_combined_row(m.name, [m]) for m in report.modules] if listed else _combined_groups(report.modules)
    console.print(table(("module", "shape", "ranks", "rank", "kept", "error", "from the sum"), rows, left=2))
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
        pairs.append(("stored whole", _some(report.stored_whole)))
    console.print(facts(pairs))
    notes(console, report.notes)


def _combined_row(name: str, found: Sequence[CombinedModule]) -> tuple[str, ...]:
    """One row for modules of a kind: what they have in common, and the median of the rest."""
    shapes, ranks = {module.shape for module in found}, {module.ranks for module in found}
    result = sorted(module.rank for module in found)
    return (
        name,
        " x ".join(str(side) for side in shapes.pop()) if len(shapes) == 1 else "various",
        ", ".join(str(rank) if rank else "-" for rank in ranks.pop()) if len(ranks) == 1 else "various",
        str(result[0]) if result[0] == result[-1] else f"{result[0]}..{result[-1]}",
        percent(median(module.energy_kept for module in found)),
        percent(median(module.error for module in found)),
        percent(median(module.from_sum or 0.0 for module in found)),
    )


def _combined_groups(modules: Sequence[CombinedModule]) -> Sequence[tuple[str, ...]]:
    groups: dict[str, list[CombinedModule]] = {}
    for module in modules:
        groups.setdefault(module.name.rpartition(".")[2], []).append(module)
    return [_combined_row(f"{name} ({len(found)} modules, medians)", found) for name, found in groups.items()]


# convert, lint --------------------------------------------------------------------------------------------------------


def converted(console: Console, report: ConvertReport) -> None:
    """Draw what `convert` returns."""
    if report.dry_run:
        plan(console, report.plan, report.output)
        notes(console, report.notes)
        return
    computed = report.tensors - report.moved
    pairs = [
        ("adapter", f"{report.output}/{report.file}: {number(report.parameters)} parameters, {size(report.nbytes)}"),
        ("format", f"{report.source_format} to {report.target_format}"),
        ("modules", str(report.modules)),
        ("tensors", f"{report.moved} moved as bytes, {computed} computed"),
        ("scales", _scales(report)),
    ]
    console.print(facts(pairs))
    notes(console, report.notes)


def linted(console: Console, report: LintReport) -> None:
    """Draw what `lint` returns: a verdict for each consumer, then each finding with its source and its remedy."""
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
        return f"folded into {report.scaled} tensors, rounded once"
    return f"rounded to float32, by {report.scale_error:.1g} at most" if report.scale_error else "exact"


# inspect, verify ------------------------------------------------------------------------------------------------------


def checkpoint(console: Console, report: CheckpointReport) -> None:
    """Draw what `inspect` says of a checkpoint."""
    known = "" if report.in_table else " (no table row: handled by names and shapes)"
    pairs = [
        ("checkpoint", report.label),
        ("architecture", (report.architecture or "unknown") + known),
        (
            "size",
            _whole(report.total),
        ),
        ("layers", str(report.layers)),
    ]
    if report.vocabulary is not None:
        pairs.append(("vocabulary", str(report.vocabulary)))
    if report.tied_head:
        pairs.append(("head", f"tied to {report.tied_head}"))
    if report.experts:
        e = report.experts
        top = "" if e.top_k is None else f", {e.top_k} for each token"
        pairs.append(("experts", f"{e.experts}{top}, in {len(e.layers)} layers, stored {e.stored}"))
    pairs += _origin(report.origin)
    if report.reversible:
        pairs.append(("reversible", "yes: `surgery subtract` restores the base exactly"))
    if report.left_behind:
        pairs.append(("not carried along", _some(report.left_behind)))
    console.print(facts(pairs))
    line(console, "")
    console.print(table(("part", "tensors", "parameters", "bytes"), _shares(report.parts)))
    line(console, "")
    console.print(table(("dtype", "tensors", "parameters", "bytes"), _shares(report.dtypes)))
    line(console, "")
    console.print(table(("file", "bytes"), [(name, size(count)) for name, count in report.files.items()]))
    _tensors(console, report)


def adapter(console: Console, report: AdapterReport) -> None:
    """Draw what `inspect` says of an adapter."""
    ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in report.ranks.items())
    pairs = [
        ("adapter", report.label),
        ("base", report.base or "not named"),
        ("task", report.task or "not named"),
        (
            "size",
            _whole(report.total),
        ),
        ("ranks", ranks or "no factors"),
        ("lora_alpha", str(report.alpha)),
        ("targets", ", ".join(f"{name} ({count})" for name, count in report.targets.items())),
    ]
    if report.variants:
        pairs.append(("particulars", ", ".join(report.variants)))
    if report.saved:
        pairs.append(("stored whole", _some(report.saved)))
    if report.exact_bytes is not None:
        restores = "`surgery restore` gives the fine-tune back, bit for bit"
        pairs.append(("exact record", f"{size(report.exact_bytes)}: {restores}"))
    pairs += _origin(report.origin)
    console.print(facts(pairs))
    line(console, "")
    console.print(table(("dtype", "tensors", "parameters", "bytes"), _shares(report.dtypes)))
    _tensors(console, report)


def _whole(total: Share) -> str:
    return f"{number(total.parameters)} parameters, {size(total.nbytes)}, {total.tensors} tensors"


def _shares(shares: Mapping[str, Share]) -> list[tuple[str, ...]]:
    return [(name, str(s.tensors), number(s.parameters), size(s.nbytes)) for name, s in shares.items()]


def _origin(origin: Origin | None) -> list[tuple[str, str]]:
    return [] if origin is None else [("made by", f"{origin.operation} from {', '.join(origin.inputs)}")]


def _tensors(console: Console, report: Any) -> None:
    if report.tensors:
        line(console, "")
        rows = [
            (t.name, t.dtype, " x ".join(str(side) for side in t.shape) or "scalar", t.file) for t in report.tensors
        ]
        console.print(table(("tensor", "dtype", "shape", "file"), rows, left=4))


def verified(console: Console, report: VerifyReport) -> None:
    """Draw what `verify OUT` found."""
    if report.passed:
        line(
            console,
            f"{report.label} is what its surgery.json says: {report.tensors} tensors and {report.files} files match.",
        )
        return
    line(console, f"{report.label} is not what its surgery.json says:")
    for problem in report.problems[:MOST_ROWS]:
        line(console, f"  {problem}")
    if len(report.problems) > MOST_ROWS:
        line(console, f"  and {len(report.problems) - MOST_ROWS} more")


def compared(console: Console, report: CompareReport) -> None:
    """Draw what `verify A B` found."""
    if report.passed:
        line(console, f"{report.left} and {report.right} are the same in all {report.equal} tensors.")
    else:
        if report.different:
            rows = [(item.name, percent(item.relative)) for item in report.different[:MOST_ROWS]]
            console.print(table(("differs", "by, of its norm"), rows))
        for label, names in ((report.left, report.left_only), (report.right, report.right_only)):
            if names:
                line(console, f"only in {label}: {_some(names)}")
        line(console, f"{report.equal} tensors are the same, {len(report.different)} differ.")
    if report.logits:
        found = report.logits
        line(
            console,
            f"On {found.inputs} in float32: largest difference {found.largest:.3g}, {percent(found.relative)} of the "
            f"norm; the same first choice in {percent(found.agreement)} of the places.",
        )

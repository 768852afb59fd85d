"""What extract, restore, merge, subtract and switch report, as text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console

from surgery.cli.formats import more, number, percent, plural, size, some
from surgery.cli.tables import MOST_ROWS, facts, line, machine, notes, plan, resumed, shape, table

if TYPE_CHECKING:
    from surgery.reports import ExtractReport, MergeReport, ModuleReport, PlannedAdapter, RestoreReport


# On a terminal narrower than this, an extraction is shown without shapes and certificates.
_NARROW = 80


def extraction(console: Console, report: ExtractReport, every: bool) -> None:
    """Draw what `extract` returns; with `every`, list all modules."""
    if report.dry_run:
        if report.planned is not None:
            console.print(facts(_planned(report, report.planned)))
        if report.estimated_record_bytes is not None:
            line(console, f"The exact record comes on top, with about {size(report.estimated_record_bytes)} at most.")
        notes(console, report.notes)
        return
    if every or len(report.modules) <= MOST_ROWS:
        columns = ["module", "shape", "rank", "change", "kept", "error", "excess"]
        rows = [_module_row(module) for module in report.modules]
    else:
        columns = ["medians", "shape", "rank", "change", "kept", "error", "worst error", "worst excess"]
        rows = _grouped(report.modules)
    if console.width < _NARROW:
        shown = [place for place, name in enumerate(columns) if name not in ("shape", "excess", "worst excess")]
        columns, rows = [columns[place] for place in shown], [[row[place] for place in shown] for row in rows]
    console.print(table(columns, rows, left=2))
    if len(rows) < len(report.modules):
        line(console, "--all lists every module.")
    line(console, "")
    console.print(
        facts(
            [
                ("adapter", f"{report.output}: {number(report.parameters)} parameters, {size(report.nbytes)}"),
                ("change", f"{percent(report.change)} of the norm of the factored weights"),
                ("kept", f"{percent(report.energy_kept)} of its energy"),
                ("error", f"{percent(report.error)} of its norm"),
                *(
                    [("unchanged", f"{plural(report.unchanged, 'module')}, without factors")]
                    if report.unchanged
                    else []
                ),
                *resumed(report.resumed),
            ]
        )
    )
    _residual(console, report, every)
    _exact(console, report, every)
    notes(console, report.notes)


def _planned(report: ExtractReport, planned: PlannedAdapter) -> list[tuple[str, str]]:
    # Factors lie on the disk twice for a while: as each module's result, and in the adapter's one file.
    disk = size(report.plan.write_bytes) if planned.rank else f"at most {size(2 * planned.nbytes)}"
    return [
        ("would write", report.output),
        ("modules", str(planned.modules)),
        ("rank", str(planned.rank) if planned.rank else "chosen for each module"),
        ("parameters", f"at most {number(planned.parameters)}"),
        ("adapter", f"at most {size(planned.nbytes)}"),
        ("read", size(report.plan.read_bytes)),
        ("disk needed", disk),
        *machine(report.plan),
    ]


def _module_row(module: ModuleReport) -> list[str]:
    return [
        module.name,
        shape(module.shape),
        str(module.rank),
        percent(module.change),
        percent(module.energy_kept),
        percent(module.error),
        f"{module.excess:.0e}",
    ]


def _grouped(modules: Sequence[ModuleReport]) -> list[list[str]]:
    """One row for all modules of a name, with the median of each column, the worst error, and the worst certificate."""
    groups: dict[str, list[ModuleReport]] = {}
    for module in modules:
        groups.setdefault(module.name.rpartition(".")[2], []).append(module)
    rows = []
    for name, found in groups.items():
        shapes = {module.shape for module in found}
        ranks = sorted(module.rank for module in found)
        rows.append(
            [
                f"{name} ({plural(len(found), 'module')})",
                shape(shapes.pop()) if len(shapes) == 1 else "various",
                str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}..{ranks[-1]}",
                percent(median(module.change or 0.0 for module in found)),
                percent(median(module.energy_kept for module in found)),
                percent(median(module.error for module in found)),
                percent(max(module.error for module in found)),
                f"{max(module.excess for module in found):.0e}",
            ]
        )
    return rows


def _residual(console: Console, report: ExtractReport, every: bool) -> None:
    if not report.residual:
        return
    line(console, "")
    lost = [item for item in report.residual if not item.saved]
    shown = report.residual if every else report.residual[:MOST_ROWS]
    rows = [
        (
            item.name,
            item.part,
            percent(item.change),
            "stored whole" if item.saved else "not in the adapter",
            item.reason,
        )
        for item in shown
    ]
    console.print(table(("residual", "part", "change", "", ""), rows, left=2))
    if len(shown) < len(report.residual):
        line(console, more(len(report.residual) - len(shown), "--all"))
    if lost:
        have = "has" if len(lost) == 1 else "have"
        what = plural(len(lost), "changed parameter")
        line(console, f"{what} {have} no factors; --save-residual stores what PEFT can hold.")
    if any(item.saved for item in report.residual):
        line(
            console,
            "What is stored whole is read by PEFT and by `surgery merge`. vLLM refuses an adapter with modules_to_save "
            "(other than a classifier's head), and llama.cpp takes norms only.",
        )


def _exact(console: Console, report: ExtractReport, every: bool) -> None:
    exact = report.exact
    if exact is None:
        return
    line(console, "")
    if every or len(exact.tensors) <= MOST_ROWS:
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
    else:
        line(console, "--all lists what the exact record keeps of each tensor.")
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


def restored(console: Console, report: RestoreReport, every: bool = False) -> None:
    """Draw what `restore` returns."""
    del every
    if report.dry_run:
        plan(console, report.plan, report.output)
        return
    console.print(
        facts(
            [
                ("restored", f"{report.output}: {report.tuned}, {size(report.nbytes)} in {report.files} files"),
                ("tensors", f"{report.tensors}, {report.same} of them as they are in the base or the adapter"),
                ("proof", "every tensor and file has the hash it had"),
                *resumed(report.resumed),
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
        found = report.weights
        if not every and len(found) > MOST_ROWS:
            found = tuple(sorted(found, key=lambda one: 1.0 if one.survived is None else one.survived)[:10])
        rows = [(one.name, percent(one.survived), percent(one.unchanged_share)) for one in found]
        console.print(table(("weight", "change kept", "same weights"), rows))
        if len(found) < len(report.weights):
            line(console, f"and {len(report.weights) - len(found)} that fared better; --all lists every one.")
        line(console, "")
    copied = f"{plural(report.copied, 'tensor')} copied unchanged"
    pairs = [("checkpoint", f"{report.output}: {size(report.nbytes)}, {copied}")]
    if report.removed:
        pairs.append(("taken out", ", ".join(report.removed) + ("" if report.exact else _inexact(report))))
    if report.exact:
        pairs.append(_restored(report))
    if report.survived is not None:
        same = f"{percent(report.unchanged_share)} of the weights are the same number as before"
        pairs.append(("change kept", f"{percent(report.survived)}; {same}"))
    if report.replaced:
        pairs.append(("replaced", some(report.replaced)))
    if report.added:
        pairs.append(("added", some(report.added)))
    if report.record_bytes:
        pairs.append(("undo record", size(report.record_bytes)))
    console.print(facts([*pairs, *resumed(report.resumed)]))
    notes(console, report.notes)


def _restored(report: MergeReport) -> tuple[str, str]:
    """What became of the base: it is the output, or what something is merged into."""
    if not report.holds:
        return "restored", "exactly, proved by the base's hashes"
    is_are = "is" if len(report.holds) == 1 else "are"
    return "base", f"found again exactly, proved by its hashes; {some(report.holds)} {is_are} merged into it"


def _inexact(report: MergeReport) -> str:
    it_was = "it was" if len(report.removed) == 1 else "they were"
    return (
        f", subtracted in float32; if {it_was} merged here, the base is met to about {percent(report.expected_error)}"
    )

"""What upcycle reports, as text: the receipt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from surgery.cli.formats import number, percent, plural, size
from surgery.cli.tables import facts, line, notes, plan, resumed, table

if TYPE_CHECKING:
    from surgery.upcycling.report import (
        ChoiceReport,
        ConsumerReport,
        ExpertLoad,
        PreservationReport,
        StackReport,
        UpcycleReport,
    )


def upcycled(console: Console, report: UpcycleReport, _every: bool) -> None:
    """Draw what `upcycle` returns."""
    if report.dry_run:
        plan(console, report.plan, report.output)
        line(console, "")
    console.print(facts(_facts(report)))
    if report.consumers:
        line(console, "")
        rows = [(c.consumer, c.verdict, "; ".join(c.reasons) or "-", _option(c)) for c in report.consumers]
        console.print(table(("program", "verdict", "because", "what would change it"), rows, left=4))
    if report.choices:
        line(console, "")
        _choices(console, report.choices)
    if report.notes:
        line(console, "")
        notes(console, report.notes)


def _facts(report: UpcycleReport) -> Iterator[tuple[str, str]]:
    yield "mixture", f"{report.output}: {report.architecture}"
    yield (
        "parameters",
        f"{number(report.parameters)}, {number(report.active)} of them active for a token; the dense model has "
        f"{number(report.dense_parameters)}",
    )
    if report.kind == "lora":
        yield "in the file", f"{number(report.stored_parameters)}; the MLP under them is the dense model's"
    times = f", {report.nbytes / report.dense_bytes:.1f} times the dense model's" if report.dense_bytes else ""
    yield "bytes", size(report.nbytes) + times
    if not report.dry_run:
        yield "free disk", f"{size(report.plan.free_disk_bytes)} before"
    for stack in report.stacks:
        yield stack.stack, _stack(stack)
    yield "experts from", report.init
    yield from _several(report)
    yield "router from", report.router_init
    yield "function", "kept by construction" if report.preserved else "changed"
    if report.preservation is not None:
        yield from _measured(report.preservation)
    yield from resumed(report.resumed)


def _several(report: UpcycleReport) -> list[tuple[str, str]]:
    """What there is to say where experts come from several models."""
    pairs = []
    if report.rest is not None:
        sources = {"average": "the mean of all", "first": "the first", "base": "the dense checkpoint"}
        pairs.append(("the rest from", sources[report.rest]))
    if report.left_out:
        pairs.append(("left out", f"what the adapters change in {number(len(report.left_out))} other tensors"))
    if report.survived is not None:
        pairs.append(("of the change", f"{percent(max(0.0, report.survived))} survived the rounding"))
    return pairs


def _stack(stack: StackReport) -> str:
    every = len(stack.layers) == stack.depth
    layers = f"all {plural(stack.depth, 'layer')}" if every else f"layers {ranges(stack.layers)} of {stack.depth}"
    routing = (
        f"top {stack.top_k}"
        if stack.top_k is not None
        else f"expert choice, capacity {stack.capacity:g}, per {stack.group}"
    )
    raw = "raw weights" if stack.scale == 1 else f"raw weights times {stack.scale:g}"
    weights = f"weights sum to {stack.scale:g}" if stack.normalized else raw
    rank = "" if stack.rank is None else f" of rank {stack.rank} (alpha {stack.alpha:g})"
    return f"{layers}, {stack.experts} experts{rank} each, {routing}, {weights}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with those that follow each other drawn together.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    found: list[list[int]] = []
    for one in numbers:
        if found and found[-1][-1] == one - 1:
            found[-1].append(one)
        else:
            found.append([one])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)


def _measured(found: PreservationReport) -> Iterator[tuple[str, str]]:
    bound = f" (rounding explains {found.bound:.0e})" if found.bound is not None else ""
    yield "measured on", found.inputs
    yield "difference", f"{found.relative:.1e} of the logits' norm{bound}, {found.largest:.1e} at most"
    yield "same answer", f"for {percent(found.agreement)} of the positions"
    if found.loss is not None and found.dense_loss is not None:
        yield "loss", f"{found.loss:.4f} nats a token; the dense model has {found.dense_loss:.4f}"
    if found.loads:
        yield "expert load", _loads(found.loads)


def _loads(loads: Sequence[ExpertLoad]) -> str:
    """The busiest expert against an even share, those that got nothing, and tokens that no expert took."""
    shares = [share for load in loads for share in load.shares]
    text = f"{percent(max(shares))} at most goes to one expert, {percent(1 / len(loads[0].shares))} would be even"
    idle = sum(share == 0 for share in shares)
    if idle:
        text += f"; {idle} of {plural(len(shares), 'expert')} got nothing"
    uncovered = max(load.uncovered for load in loads)
    if uncovered:
        text += f"; up to {percent(uncovered)} of a layer's tokens go to no expert"
    return text


def _option(report: ConsumerReport) -> str:
    return report.option or ("nothing known" if report.verdict in ("refused", "silently wrong") else "-")


def _choices(console: Console, choices: Sequence[ChoiceReport]) -> None:
    programs = tuple(choices[0].verdicts)
    rows = [
        (
            f"{one.layers} (the paper's)" if one.layers == "last:half" else one.layers,
            str(one.sparse),
            one.target,
            size(one.nbytes),
            *one.verdicts.values(),
        )
        for one in choices
    ]
    console.print(table(("--layers", "sparse", "format", "bytes", *programs), rows))

"""What upcycle reports, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from surgery.cli.formats import number, percent, size
from surgery.cli.tables import facts, line, notes, plan, resumed, table

if TYPE_CHECKING:
    from surgery.upcycling.report import PreservationReport, StackReport, UpcycleReport


def upcycled(console: Console, report: UpcycleReport, _every: bool) -> None:
    """Draw what `upcycle` returns: the receipt."""
    pairs = [
        ("mixture", f"{report.output}: {report.architecture}"),
        ("parameters", f"{number(report.parameters)}, {number(report.active)} of them active for a token; "
                       f"the dense model has {number(report.dense_parameters)}"),
        ("bytes", size(report.nbytes)),
        *((f"{stack.stack}", _stack(stack)) for stack in report.stacks),
        ("experts from", report.init),
        ("router from", report.router_init),
        ("function", "kept by construction" if report.preserved else "changed"),
    ]  # fmt: skip
    if report.preservation is not None:
        pairs.append(("measured", _measured(report.preservation)))
    if report.dry_run:
        plan(console, report.plan, report.output)
        line(console, "")
    console.print(facts([*pairs, *resumed(report.resumed)]))
    if report.consumers:
        line(console, "")
        rows = [(c.consumer, c.verdict, "; ".join(c.reasons), c.option) for c in report.consumers]
        console.print(table(("consumer", "verdict", "because", "what would change it"), rows, left=4))
    notes(console, report.notes)


def _stack(stack: StackReport) -> str:
    layers = f"{len(stack.layers)} of {stack.depth} layers"
    routing = (
        f"top {stack.top_k}"
        if stack.top_k is not None
        else f"expert choice, capacity {stack.capacity:g}, per {stack.group}"
    )
    weights = "weights sum to 1" if stack.normalized else "raw weights"
    return f"{layers} with {stack.experts} experts, {routing}, {weights}"


def _measured(found: PreservationReport) -> str:
    text = (
        f"on {found.inputs}: relative difference {found.relative:.1e}, largest {found.largest:.1e}, "
        f"same top token for {percent(found.agreement)}"
    )
    if found.loss is not None and found.dense_loss is not None:
        text += f", loss {found.loss:.4f} (dense {found.dense_loss:.4f})"
    return text

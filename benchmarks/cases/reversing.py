"""Merging with an undo record and taking the adapter out again. There is no peer, and no bar."""

from __future__ import annotations

import json

from benchmarks.measuring import OUT, Process, Workshop, ours
from benchmarks.models import ALL_LINEAR, LARGE
from benchmarks.table import Result, Row, seconds

PLAIN, REVERSIBLE = "surgery merge", "surgery merge --reversible"
EXACT, APPROXIMATE = "surgery subtract, with the record", "surgery subtract ADAPTER, without a record"


def run(workshop: Workshop) -> Result:
    shape = workshop.shape(LARGE)
    base, adapter = workshop.base(shape), workshop.adapter(shape, ALL_LINEAR)
    found = workshop.alternate(
        Process(PLAIN, ours("merge", base, adapter, "--quiet", "--output", OUT)),
        Process(REVERSIBLE, ours("merge", base, adapter, "--reversible", "--quiet", "--output", OUT)),
    )
    merged, reversible = found[PLAIN].output, found[REVERSIBLE].output
    found |= workshop.alternate(
        Process(EXACT, ours("subtract", reversible, "--quiet", "--output", OUT)),
        Process(APPROXIMATE, ours("subtract", merged, adapter, "--quiet", "--output", OUT)),
    )
    record = (reversible / "undo" / "record.safetensors").stat().st_size
    everything = sum(path.stat().st_size for path in (reversible / "undo").rglob("*") if path.is_file())
    same = json.loads(workshop.unmeasured("check_equal", found[EXACT].output, base))
    restored = f"{same['tensors'] - len(same['different'])} of {same['tensors']}"
    targeted = shape.linear_bytes
    rows = [
        _ratio("CPU, reversible against plain merge", found[REVERSIBLE].cpu, found[PLAIN].cpu),
        _ratio("CPU, subtract with the record against plain merge", found[EXACT].cpu, found[PLAIN].cpu),
        Row("undo record, percent of the targeted bytes", f"{100 * record / targeted:.2f}"),
        Row("undo folder with its copy of the adapter, percent", f"{100 * everything / targeted:.2f}"),
        Row("tensors restored to the base's bits", restored),
    ]
    note = (
        "The same work as in the merging benchmark, with hashing; ‖ΔW‖ is 1.4% of ‖W‖. "
        f"Targeted are {targeted / 1e6:.0f} MB, the record takes {record / 1e6:.1f} MB."
    )
    return Result("Reversible merging and subtraction", [note], list(found.values()), rows)


def _ratio(figure: str, ours: float, other: float) -> Row:
    return Row(figure, seconds(ours), seconds(other), ours / other)

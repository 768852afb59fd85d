"""The size of the undo record by the size of the change. Nothing is timed."""

from __future__ import annotations

import json

from benchmarks.measuring import Workshop
from benchmarks.table import Result, Row

ROWS = 2048


def run(workshop: Workshop) -> Result:
    rows = 128 if workshop.quick else ROWS
    folder = workshop.folder / "outputs" / "undo"
    found = json.loads(workshop.unmeasured("undo_sizes", folder, str(rows)))
    table = [
        Row(f"{case['dtype']} base, ‖ΔW‖ = {100 * case['change']:g}% of ‖W‖", f"{100 * case['share']:.2f}%")
        for case in found
    ]
    note = f"Percent of the targeted bytes, for one matrix of {rows} x {rows}, N(0, 0.02), and a LoRA of rank 16."
    return Result("Size of the undo record", [note], [], table)

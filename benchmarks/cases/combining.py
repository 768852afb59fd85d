"""Two adapters of rank 16 combined to rank 16, against PEFT's `add_weighted_adapter(combination_type="svd")`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from benchmarks.measuring import OUT, Process, Workshop, ours, python
from benchmarks.models import ALL_LINEAR, LARGE
from benchmarks.table import Result, Row, fewer_times, seconds

RANK = 16
WEIGHTS = ("0.7", "0.3")
PEFT, CALL = "PEFT, loading and combining", "a script that calls surgery.combine"
OURS = ("surgery combine", "surgery combine --no-hash")
MOST_DIFFERENCE, MOST_EXCESS = 1e-4, 1e-6


def run(workshop: Workshop) -> Result:
    shape = workshop.shape(LARGE)
    base = workshop.base(shape)
    adapters = [workshop.adapter(shape, ALL_LINEAR, number) for number in (1, 2)]
    calls = {name: workshop.folder / f"calls-{number}.jsonl" for number, name in enumerate((CALL, PEFT))}
    for place in calls.values():
        place.unlink(missing_ok=True)
    weighted = [f"{folder}={weight}" for folder, weight in zip(adapters, WEIGHTS, strict=True)]
    options = ("--rank", str(RANK), "--quiet", "--output", OUT)
    found = workshop.alternate(
        Process(OURS[0], ours("combine", *weighted, *options)),
        Process(OURS[1], ours("combine", *weighted, "--no-hash", *options)),
        Process(CALL, python("combine_call.py", *weighted, OUT, str(RANK), calls[CALL])),
        Process(PEFT, python("peft_combine.py", base, *weighted, OUT, str(RANK), calls[PEFT]), runs=1),
    )
    mine, theirs = (_cpu(calls[name]) for name in (CALL, PEFT))
    rows = [fewer_times("CPU of the call against PEFT's call, surgery.combine", mine, theirs, seconds, 300)]
    rows += [
        fewer_times(f"CPU of the process against PEFT's call, {name}", found[name].cpu, theirs, seconds, 60)
        for name in OURS
    ]
    outputs = {OURS[0]: found[OURS[0]].output, PEFT: found[PEFT].output / "combined"}
    checked = json.loads(
        workshop.unmeasured("check_combination", ",".join(WEIGHTS), str(RANK), *adapters, *outputs.values())
    )
    for name, output in outputs.items():
        worst = checked[str(output)]
        rows += _accuracy(name, worst["difference"], worst["excess"], worst["modules"])
    note = (
        f"Two adapters of rank {RANK} on all linear layers, hidden size {shape.hidden}, {shape.layers} layers, weights "
        f"{' and '.join(WEIGHTS)}, to rank {RANK}. PEFT's call is timed within its process, after the base and both "
        "adapters are loaded; it runs once. Ours reads, combines, writes and hashes."
    )
    return Result(f"Combining, hidden size {shape.hidden}", [note], list(found.values()), rows)


def _cpu(calls: Path) -> float:
    return median(json.loads(line)["cpu"] for line in calls.read_text().splitlines())


def _accuracy(name: str, difference: float, excess: float, modules: int) -> list[Row]:
    limits = [
        ("dW from the nearest of the rank", difference, MOST_DIFFERENCE),
        ("truncation error above the least", excess, MOST_EXCESS),
    ]
    rows = []
    for what, value, limit in limits:
        figure = f"{what}, largest of {modules} modules, {name}"
        if name in OURS:
            rows.append(
                Row(figure, f"{value:.1e}", f"{limit:.0e}", value / limit, f"at most {limit:.0e}", value <= limit)
            )
        else:
            rows.append(Row(figure, "", f"{value:.1e}"))
    return rows

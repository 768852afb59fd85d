"""Training steps, LoRA and full, against transformers' Trainer and TRL's SFTTrainer on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import OUT, ROOT, Measured, Process, Workshop, python
from benchmarks.models import Shape
from benchmarks.table import Result, Row

TINY = Shape(128, 352, 64, 2, 1000, 1)
SMALL = Shape(512, 1408, 256, 4, 4000, 1)
OURS, RESUMED, TRAINER, SFT = "surgery.train", "surgery.train, resumed", "transformers Trainer", "TRL SFTTrainer"
METHODS = ("full", "lora")
BATCH, LENGTH = 8, 128
STEPS, COMPARED = 30, 20
MOST_DIFFERENCE = 1e-5


def run(workshop: Workshop) -> Result:
    shapes = {"tiny": TINY, **({} if workshop.quick else {"small": SMALL})}
    steps = COMPARED if workshop.quick else STEPS
    processes: list[Measured] = []
    rows: list[Row] = []
    for size, shape in shapes.items():
        for method in METHODS:
            calls = {
                name: workshop.folder / f"train-{size}-{method}-{number}.jsonl" for number, name in enumerate(_WHO)
            }
            commands = []
            for name, place in calls.items():
                place.unlink(missing_ok=True)
                if name != SFT or workshop.trl is not None:
                    commands.append(_process(workshop, name, f"{name}, {method}, {size}", shape, method, steps, place))
            processes += workshop.alternate(*commands, keep=False).values()
            found = {name: _lines(place) for name, place in calls.items() if place.exists()}
            rows.append(_resumed(f"{method}, {size}", found[OURS], found[RESUMED]))
            for peer in [name for name in found if name in (TRAINER, SFT)]:
                rows += _compared(f"{method}, {size}, against {peer}", found[OURS], found[peer])
    shown = " and ".join(f"{shape.layers} layers of hidden size {shape.hidden}" for shape in shapes.values())
    note = (
        f"Llamas of {shown}, float32 on one thread, {BATCH} rows of {LENGTH} tokens a step, {steps} steps, the same "
        "rows in the same order. LoRA of rank 16 on all linear layers. Timed within the process, from the third step; "
        "the table of processes has loading and saving in it."
    )
    return Result("Training", [note], processes, rows)


_WHO = {OURS: "ours", RESUMED: "resumed", TRAINER: "trainer", SFT: "sft"}


def _process(workshop: Workshop, who: str, name: str, shape: Shape, method: str, steps: int, calls: Path) -> Process:
    arguments = (_WHO[who], workshop.base(shape), OUT, method, str(steps), str(BATCH), str(LENGTH), calls)
    if who != SFT:
        return Process(name, python("train_call.py", *arguments))
    return Process(name, (str(workshop.trl), str(ROOT / "benchmarks" / "train_call.py"), *map(str, arguments)))


def _lines(calls: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in calls.read_text().splitlines()]


def _resumed(what: str, ours: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> Row:
    """A run that is stopped in its middle, against one that is not: every loss, bit for bit."""
    pairs = list(zip(ours[0]["losses"], resumed[0]["losses"], strict=True))
    other = sum(one != again for one, again in pairs)
    return Row(
        f"losses of {len(pairs)} with other bits after a stop, {what}", str(other), "0", None, "none", other == 0
    )


def _compared(what: str, ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> list[Row]:
    rows = []
    for clock, bar in (("wall", "at least theirs"), ("cpu", "")):
        mine, theirs = (median(call["tokens"] / call[clock] for call in calls) for calls in (ours, peer))
        unit = "tokens a second" if clock == "wall" else "tokens a second of processor"
        met = mine >= theirs if bar else None
        rows.append(Row(f"{unit}, {what}", f"{mine:,.0f}", f"{theirs:,.0f}", mine / theirs, bar, met))
    pairs = zip(ours[0]["losses"][:COMPARED], peer[0]["losses"][:COMPARED], strict=True)
    worst = max(abs(one - other) for one, other in pairs)
    figure = f"largest difference of {COMPARED} losses, {what}"
    limit = f"{MOST_DIFFERENCE:.0e}"
    rows.append(
        Row(figure, f"{worst:.1e}", limit, worst / MOST_DIFFERENCE, f"at most {limit}", worst <= MOST_DIFFERENCE)
    )
    return rows

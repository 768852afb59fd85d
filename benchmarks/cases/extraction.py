"""Extraction of rank 16 from every linear layer, against mergekit and against a plain script."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import OUT, Measured, Process, Workshop, ours, python
from benchmarks.models import LARGE, SMALL, Shape
from benchmarks.table import Result, Row, at_most, fewer_times, megabytes, seconds

RANK = 16
MOST_ERROR = 1.005
MERGEKIT, PLAIN = "mergekit-extract-lora", "plain script"
OURS = ("surgery extract", "surgery extract --no-hash")


@dataclass(frozen=True)
class Bars:
    """What is asked for: how many times less processor time than mergekit, and whether memory and the script count."""

    mergekit: float
    others: bool


def large(workshop: Workshop) -> Result:
    return _run(workshop, LARGE, Bars(25, others=True))


def small(workshop: Workshop) -> Result:
    return _run(workshop, SMALL, Bars(7, others=False))


def _run(workshop: Workshop, asked: Shape, bars: Bars) -> Result:
    shape = workshop.shape(asked)
    base, tuned = workshop.base(shape), workshop.tuned(shape)
    options = ("--rank", str(RANK), "--device", "cpu", "--quiet", "--output", OUT)
    processes = [
        Process(OURS[0], ours("extract", base, tuned, *options)),
        Process(OURS[1], ours("extract", base, tuned, "--no-hash", *options)),
        Process(PLAIN, python("plain_extract.py", base, tuned, OUT, str(RANK))),
    ]
    if workshop.mergekit is not None:
        processes.append(Process(MERGEKIT, _mergekit(workshop.mergekit, base, tuned), runs=1))
    found = workshop.alternate(*processes)
    rows: list[Row] = []
    for name in OURS:
        if MERGEKIT in found:
            mine, peer = found[name], found[MERGEKIT]
            rows.append(fewer_times(f"CPU against mergekit, {name}", mine.cpu, peer.cpu, seconds, bars.mergekit))
            if bars.others:
                rows.append(at_most(f"peak memory against mergekit, {name}", mine.peak, peer.peak, megabytes, 0.5))
        if bars.others:
            mine, peer = found[name], found[PLAIN]
            rows.append(at_most(f"CPU against the script, {name}", mine.cpu, peer.cpu, seconds, 1.3))
            rows.append(at_most(f"peak memory against the script, {name}", mine.peak, peer.peak, megabytes, 0.5))
    note = (
        f"Rank {RANK} from all linear layers, hidden size {shape.hidden}, {shape.layers} layers, "
        f"{shape.nbytes / 1e6:.0f} MB in bfloat16 each, in {shape.shards} files; one process after the other."
    )
    return Result(
        f"Extraction, hidden size {shape.hidden}",
        [note],
        list(found.values()),
        [*rows, *_errors(workshop, base, tuned, list(found.values()))],
    )


def _mergekit(command: Path, base: Path, tuned: Path) -> tuple[str, ...]:
    options = {"--model": str(tuned), "--base-model": str(base), "--out-path": OUT, "--max-rank": str(RANK)}
    return (str(command), *(part for option in options.items() for part in option))


def _errors(workshop: Workshop, base: Path, tuned: Path, found: list[Measured]) -> list[Row]:
    """The worst module of each adapter, as a multiple of the least possible error of the rank."""
    cache = base.parent / f"least-errors-{RANK}.json"
    outputs = [measured.output for measured in found]
    ratios = json.loads(workshop.unmeasured("check_extraction", base, tuned, str(RANK), cache, *outputs))
    rows = []
    for measured in found:
        modules = ratios[str(measured.output)]
        worst = max(modules, key=lambda module: float(modules[module]))
        text = f"{modules[worst]:.6f}"
        figure = f"largest error / least possible, {len(modules)} modules, {measured.name}"
        if measured.name in OURS:
            met = modules[worst] <= MOST_ERROR
            rows.append(Row(figure, text, "1", modules[worst], f"at most {MOST_ERROR}", met))
        else:
            rows.append(Row(figure, "", text))
    return rows

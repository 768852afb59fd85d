"""Exact extraction: what it keeps, against the schemes that keep bits, and how fast it gives the fine-tune back."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

from benchmarks.measuring import OUT, Process, Workshop, ours
from benchmarks.models import LARGE
from benchmarks.table import Result, Row, at_most

WIDTHS = (128, 192, 256)
TUNINGS = ("light", "medium", "heavy")
STEPS = 300
RANKS = ("best", "1", "2", "4", "8", "16", "32")
LEAST_RATE = 300e6
EXTRACT, RESTORE = "surgery extract --exact", "surgery restore --threads 1"


def sizes(workshop: Workshop) -> Result:
    """Real fine-tunes of every parameter, of several widths and learning rates, in two dtypes."""
    widths, steps = (WIDTHS[:1], 10) if workshop.quick else (WIDTHS, STEPS)
    rows: list[Row] = []
    for width in widths:
        place = workshop.folder / "models" / f"trained-{width}"
        if not place.exists():
            workshop.unmeasured("train_models", place, str(width), str(steps))
        for suffix in ("", "-float32"):
            for tuning in TUNINGS:
                folder = workshop.folder / "outputs"
                pair = place / f"base{suffix}", place / f"{tuning}{suffix}"
                found = json.loads(workshop.unmeasured("exact_sizes", folder, *pair, *RANKS))
                name = f"{tuning}{suffix}, width {width}"
                rows += _against(name, found)
                uniform = {rank: found[rank] for rank in RANKS if rank != "best"}
                least = min(uniform, key=uniform.__getitem__)
                row = at_most(f"against the best rank of six: {name}", found["best"], uniform[least], megabytes3, 1.02)
                rows.append(replace(row, other=f"{row.other} (rank {least})"))
    note = (
        "Llamas of two layers trained on the source of the standard library, then on Python's manual, every parameter, "
        "with peak learning rates of 2e-5, 2e-4 and 1e-3. Ours is the whole output, adapter and record, with `--rank "
        "best`; the others are the compressed tensors alone. Zstandard level 3."
    )
    return Result("Exact extraction of real fine-tunes", [note], [], rows)


def _against(name: str, found: dict[str, int]) -> list[Row]:
    return [
        at_most(f"against XOR and zstd: {name}", found["best"], found["xor"], megabytes3, 1),
        at_most(f"against zstd alone: {name}", found["best"], found["alone"], megabytes3, 1),
    ]


def speed(workshop: Workshop) -> Result:
    """The synthetic pair: size, and the rate of restoring."""
    shape = workshop.shape(LARGE)
    base, tuned = workshop.base(shape), workshop.tuned(shape)
    options = ("--exact", "--rank", "16", "--device", "cpu", "--quiet", "--output", OUT)
    found = workshop.alternate(Process(EXTRACT, ours("extract", base, tuned, *options), runs=1))
    adapter = found[EXTRACT].output
    found |= workshop.alternate(
        Process(RESTORE, ours("restore", base, adapter, "--threads", "1", "--quiet", "--output", OUT))
    )
    same = json.loads(workshop.unmeasured("check_equal", found[RESTORE].output, tuned))
    out = workshop.folder / "outputs" / "rate"
    timed = json.loads(workshop.unmeasured("exact_rate", base, adapter, out, str(1 if workshop.quick else 5)))
    rate, cpu_rate = (
        timed["nbytes"] / statistics.median(run[measure] for run in timed["runs"]) for measure in ("wall", "cpu")
    )
    kept = json.loads(workshop.unmeasured("exact_sizes", workshop.folder / "outputs", base, tuned, "16"))
    kept["best"] = kept.pop("16")
    rows = [
        *_against("synthetic pair, rank 16", kept),
        Row(
            "restored on one core, after imports",
            f"{rate / 1e6:.0f} MB/s",
            "300 MB/s",
            rate / LEAST_RATE,
            "at least 300 MB/s",
            rate >= LEAST_RATE,
        ),
        Row("restored per second of processor, after imports", f"{cpu_rate / 1e6:.0f} MB/s"),
        Row("restored, whole process", f"{timed['nbytes'] / found[RESTORE].wall / 1e6:.0f} MB/s"),
        Row("tensors restored to their bits", f"{same['tensors'] - len(same['different'])} of {same['tensors']}"),
    ]
    note = (
        f"The pair of the extraction benchmark, {shape.nbytes / 1e6:.0f} MB in bfloat16. Restoring hashes the result "
        "while it is written, and syncs it. The rate after imports is that of a process tied to one core, the median "
        "by the clock."
    )
    return Result("Exact extraction and restoring, hidden size 2048", [note], list(found.values()), rows)


def megabytes3(value: float) -> str:
    return f"{value / 1e6:.3f} MB"

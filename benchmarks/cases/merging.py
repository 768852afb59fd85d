"""Merging rank 16 into every linear layer, against loading, merging and saving with transformers and PEFT."""

from __future__ import annotations

import json

from benchmarks.measuring import OUT, Process, Workshop, ours, python
from benchmarks.models import ALL_LINEAR, LARGE
from benchmarks.table import Result, Row, fewer_times, megabytes, seconds

PEFT = "transformers and PEFT"
OURS = ("surgery merge", "surgery merge --no-hash")
FIXED_MEMORY, TENSORS = 350e6, 4


def run(workshop: Workshop) -> Result:
    shape = workshop.shape(LARGE)
    base, adapter = workshop.base(shape), workshop.adapter(shape, ALL_LINEAR)
    found = workshop.alternate(
        Process(OURS[0], ours("merge", base, adapter, "--quiet", "--output", OUT)),
        Process(OURS[1], ours("merge", base, adapter, "--no-hash", "--quiet", "--output", OUT)),
        Process(PEFT, python("peft_merge.py", base, adapter, OUT)),
    )
    peer, limit = found[PEFT], FIXED_MEMORY + TENSORS * shape.largest_tensor
    rows = []
    for name in OURS:
        mine = found[name]
        rows.append(fewer_times(f"CPU against PEFT, {name}", mine.cpu, peer.cpu, seconds, 3))
        within = mine.peak <= limit
        figure, bar = f"peak memory, {name}", f"at most 350 MB + {TENSORS} times the largest tensor"
        rows.append(Row(figure, megabytes(mine.peak), megabytes(limit), mine.peak / limit, bar, within))
        same = json.loads(workshop.unmeasured("check_equal", mine.output, peer.output))
        equal = same["tensors"] - len(same["different"])
        rows.append(
            Row(
                f"tensors with PEFT's bits, {name}",
                str(equal),
                str(same["tensors"]),
                equal / same["tensors"],
                "all",
                not same["different"],
            )
        )
    note = (
        f"Rank 16 on all linear layers, hidden size {shape.hidden}, {shape.layers} layers, {shape.nbytes / 1e6:.0f} MB "
        f"in bfloat16. Largest tensor {megabytes(shape.largest_tensor)}."
    )
    return Result(f"Merging, hidden size {shape.hidden}", [note], list(found.values()), rows)

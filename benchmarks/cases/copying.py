"""Merging into few of the weights, against copying the files: the wall time beyond start-up, outputs on disk."""

from __future__ import annotations

import sys

from benchmarks.measuring import OUT, Measured, Process, Workshop, ours
from benchmarks.models import LONG, QUERY_AND_VALUE
from benchmarks.table import Result, Row, seconds

COPY, IMPORT = "cp -r and sync", "python -c 'import torch'"
OURS = ("surgery merge", "surgery merge --no-hash")
MOST = 1.5
# A disk's wall times scatter far more than processor times do.
LEAST_RUNS = 5


def run(workshop: Workshop) -> Result:
    shape = workshop.shape(LONG)
    base, adapter = workshop.base(shape), workshop.adapter(shape, QUERY_AND_VALUE)
    copy = 'cp -r "$1" "$2" && sync "$2"/* "$2"'
    found = workshop.alternate(
        Process(OURS[0], ours("merge", base, adapter, "--quiet", "--output", OUT)),
        Process(COPY, ("sh", "-c", copy, "sh", str(base), OUT)),
        Process(OURS[1], ours("merge", base, adapter, "--no-hash", "--quiet", "--output", OUT)),
        Process(IMPORT, (sys.executable, "-c", "import torch")),
        keep=False,
        least=LEAST_RUNS,
    )
    rows = [_row(found[name], found[IMPORT], found[COPY]) for name in OURS]
    note = (
        f"Rank 16 on q_proj and v_proj, hidden size {shape.hidden}, {shape.layers} layers, {shape.nbytes / 1e9:.2f} GB "
        "in the page cache. Start-up is importing torch: a merge of this kind cannot do without."
    )
    return Result("Merging against copying", [note], list(found.values()), rows)


def _row(mine: Measured, start: Measured, copy: Measured) -> Row:
    beyond = mine.wall - start.wall
    ratio = beyond / copy.wall
    figure = f"wall time beyond start-up against cp, {mine.name}"
    return Row(figure, seconds(beyond), seconds(copy.wall), ratio, f"at most {MOST} times", ratio <= MOST)

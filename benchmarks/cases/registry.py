"""Push to the local registry and pull from it, against copying the files and hashing them: wall time, to the disk."""

from __future__ import annotations

import sys

from benchmarks.measuring import OUT, Measured, Process, Workshop, ours
from benchmarks.models import LARGE
from benchmarks.table import Result, Row, seconds

PUSH, PULL, COPY = "surgery push", "surgery pull", "cp -r, sync, SHA-256"
NAME = "lab/base"
MOST = 1.5
# A disk's wall times scatter far more than processor times do.
LEAST_RUNS = 5
_HASH = """
import hashlib, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    with open(path, "rb") as file:
        print(hashlib.file_digest(file, "sha256").hexdigest(), path.name)
"""


def run(workshop: Workshop) -> Result:
    shape = workshop.shape(LARGE.with_layers(10))
    base = workshop.base(shape)
    registry = workshop.folder / "outputs" / "registry"
    workshop.unmeasured("push", str(base), NAME, str(registry))
    copy = 'cp -r "$1" "$2" && sync "$2"/* "$2" && exec "$3" -c "$4" "$2"'
    found = workshop.alternate(
        Process(PUSH, ("env", f"SURGERY_REGISTRY={OUT}", *ours("push", base, NAME, "--endpoint", "local", "--quiet"))),
        Process(COPY, ("sh", "-c", copy, "sh", str(base), OUT, sys.executable, _HASH)),
        Process(
            PULL,
            ("env", f"SURGERY_REGISTRY={registry}", *ours("pull", NAME, "--endpoint", "local", "-q", "--output", OUT)),
        ),
        keep=False,
        least=LEAST_RUNS,
    )
    rows = [_row(found[name], found[COPY]) for name in (PUSH, PULL)]
    note = (
        f"{shape.nbytes / 1e9:.2f} GB in {shape.shards} files, in the page cache. Push checks every number and hashes "
        "with SHA-256 and, tensor by tensor, with BLAKE3; pull hashes with SHA-256; both sync what they write. The "
        "other hashes the copied files with Python's hashlib. Start-up is included."
    )
    return Result("Push and pull against copying and hashing", [note], list(found.values()), rows)


def _row(mine: Measured, copy: Measured) -> Row:
    ratio = mine.wall / copy.wall
    figure = f"wall time against {COPY}, {mine.name}"
    return Row(figure, seconds(mine.wall), seconds(copy.wall), ratio, f"at most {MOST} times", ratio <= MOST)

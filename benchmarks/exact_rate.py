"""How fast an exact extraction is restored on one core, once everything is imported. Prints JSON.

    python -m benchmarks.exact_rate BASE ADAPTER OUT RUNS

Bytes restored, and for each run seconds of wall clock and of processor. The process is tied to one processor. The
inputs are in the page cache; hashing the result and syncing it to the disk are part of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time

import torch

import surgery


def main() -> None:
    base, adapter, out, runs = sys.argv[1:5]
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    found = []
    nbytes = 0
    for _ in range(int(runs)):
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        wall, cpu = time.perf_counter(), time.process_time()
        nbytes = surgery.restore(base, adapter, output=out, threads=1).nbytes
        found.append({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
    print(json.dumps({"nbytes": nbytes, "runs": found}))


if __name__ == "__main__":
    main()

"""Ours: what the call costs once the library is loaded.

python combine_call.py ADAPTER=WEIGHT ADAPTER=WEIGHT OUT RANK CALLS

Appends the call's seconds to CALLS, as PEFT's script does.
"""

from __future__ import annotations

import json
import sys
import time

import torch

import surgery


def main() -> None:
    *adapters, out, rank, calls = sys.argv[1:]
    torch.empty(1)
    wall, cpu = time.perf_counter(), time.process_time()
    surgery.combine(*adapters, output=out, rank=int(rank))
    used = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    with open(calls, "a") as file:
        file.write(json.dumps(used) + "\n")


if __name__ == "__main__":
    main()

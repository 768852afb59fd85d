"""What a fine-tune takes, kept in several ways. Prints JSON, bytes each.

    python -m benchmarks.exact_sizes FOLDER BASE TUNED RANK...

alone     every tensor of the fine-tune in a Zstandard frame of level 3
xor       every tensor, XOR the base's, in such a frame (what BitX does)
RANK      adapter and exact record of `surgery extract --exact --rank RANK`: the whole output, without `surgery.json`
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

import surgery
from benchmarks.tensors import open_tensors
from surgery.zstd import zstd

LEVEL = 3


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def peers(base: Path, tuned: Path) -> dict[str, int]:
    sizes = {"tuned": 0, "alone": 0, "xor": 0}
    with ExitStack() as stack:
        left, right = (open_tensors(folder, stack) for folder in (base, tuned))
        for name, file in right.items():
            new, old = bits(file.get_tensor(name)), bits(left[name].get_tensor(name))
            sizes["tuned"] += new.nbytes
            sizes["alone"] += len(zstd.compress(new.tobytes(), LEVEL))
            sizes["xor"] += len(zstd.compress((new ^ old).tobytes(), LEVEL))
    return sizes


def ours(base: Path, tuned: Path, output: Path, rank: str) -> int:
    shutil.rmtree(output, ignore_errors=True)
    given = rank if rank == "best" else int(rank)
    surgery.extract(base, tuned, output=output, exact=True, rank=given, device="cpu")
    return sum(p.stat().st_size for p in output.rglob("*") if p.is_file() and p.name != "surgery.json")


def main() -> None:
    folder, base, tuned = (Path(argument) for argument in sys.argv[1:4])
    found = peers(base, tuned) | {rank: ours(base, tuned, folder / "sizes", rank) for rank in sys.argv[4:]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

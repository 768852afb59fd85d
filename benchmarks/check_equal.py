"""Whether two checkpoints have the same tensors, bit for bit, however they are split into files. Prints JSON.

python -m benchmarks.check_equal LEFT RIGHT
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.tensors import open_tensors


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8))
    )


def main() -> None:
    with ExitStack() as stack:
        left, right = (open_tensors(Path(argument), stack) for argument in sys.argv[1:3])
        names = sorted(left.keys() | right.keys())
        different = [
            name
            for name in names
            if name not in left
            or name not in right
            or not same_bits(left[name].get_tensor(name), right[name].get_tensor(name))
        ]
    print(json.dumps({"tensors": len(names), "different": different}))


if __name__ == "__main__":
    main()

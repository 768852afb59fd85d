"""Copy an adapter with the tensors of its last layer changed: `python -m benchmarks.change_layer ADAPTER OUT`.

Prints how many bytes were changed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def main() -> None:
    import torch
    from safetensors.torch import load_file, save_file

    adapter, out = map(Path, sys.argv[1:])
    shutil.copytree(adapter, out)
    path = out / "adapter_model.safetensors"
    tensors = load_file(path)
    layers = sorted({name.split(".layers.")[1].split(".")[0] for name in tensors if ".layers." in name}, key=int)
    changed = [name for name in tensors if f".layers.{layers[-1]}." in name]
    generator = torch.Generator().manual_seed(7)
    for name in changed:
        tensors[name] = torch.randn(tensors[name].shape, generator=generator).to(tensors[name].dtype)
    save_file(tensors, path, {"format": "pt"})
    print(sum(tensors[name].nbytes for name in changed))


if __name__ == "__main__":
    main()

"""Peer: LoRA extraction as one would write it in an afternoon, around safetensors and torch.svd_lowrank.

    python plain_extract.py BASE TUNED OUT [RANK]

It knows Llama's names, checks nothing, reports no error and holds the adapter in memory; what it does, it does well.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

OVERSAMPLING = 16


def weight_map(folder: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return dict(index["weight_map"])


def factors(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, rank) and A (rank, in), with the square root of the singular values on either side."""
    U, S, V = torch.svd_lowrank(change, q=rank + OVERSAMPLING, niter=2)
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).contiguous(), (V[:, :rank] * root).T.contiguous()


def extract(base: Path, tuned: Path, rank: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The adapter's tensors, and the last names of the layers they are for."""
    base_files, tuned_files = weight_map(base), weight_map(tuned)
    tensors, targets = {}, set()
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in {base / file for file in base_files.values()} | {tuned / file for file in tuned_files.values()}
        }
        for name, file in tuned_files.items():
            if not name.endswith("_proj.weight"):
                continue
            old = opened[base / base_files[name]].get_tensor(name)
            new = opened[tuned / file].get_tensor(name)
            module = name.removesuffix(".weight")
            B, A = factors(new.float() - old.float(), rank)
            tensors[f"base_model.model.{module}.lora_A.weight"] = A
            tensors[f"base_model.model.{module}.lora_B.weight"] = B
            targets.add(module.rpartition(".")[2])
    return tensors, sorted(targets)


def main() -> None:
    base, tuned, out = (Path(argument) for argument in sys.argv[1:4])
    rank = int(sys.argv[4]) if len(sys.argv) > 4 else 16
    torch.manual_seed(0)
    tensors, targets = extract(base, tuned, rank)
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()

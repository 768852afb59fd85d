"""How large the undo record of a reversible merge is, by the size of the change. Prints JSON.

    python -m benchmarks.undo_sizes FOLDER ROWS

One square matrix N(0, 0.02), merged with a rank-16 adapter of Gaussian factors scaled to a given ||dW|| / ||W||.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import surgery

RANK = 16
DEVIATION = 0.02
CHANGES = (0.0035, 0.014, 0.055, 0.23)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def write_base(folder: Path, rows: int, dtype: torch.dtype) -> torch.Tensor:
    folder.mkdir(parents=True)
    weight = (DEVIATION * torch.randn(rows, rows, generator=torch.Generator().manual_seed(1))).to(dtype)
    save_file({"layer.weight": weight}, folder / "model.safetensors", metadata={"format": "pt"})
    return weight


def write_adapter(folder: Path, weight: torch.Tensor, change: float) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(2)
    B, A = torch.randn(len(weight), RANK, generator=generator), torch.randn(RANK, len(weight), generator=generator)
    B *= change * weight.float().norm() / (B @ A).norm()
    tensors = {"base_model.model.layer.lora_A.weight": A, "base_model.model.layer.lora_B.weight": B}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["layer"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    found = []
    for name, dtype in DTYPES.items():
        base = folder / name
        weight = write_base(base, rows, dtype)
        for change in CHANGES:
            adapter, merged = folder / f"{name}-{change}-adapter", folder / f"{name}-{change}-merged"
            write_adapter(adapter, weight, change)
            surgery.merge(base, adapter, output=merged, reversible=True)
            record = (merged / "undo" / "record.safetensors").stat().st_size
            found.append({"dtype": name, "change": change, "share": record / weight.nbytes})
    print(json.dumps(found))


if __name__ == "__main__":
    main()

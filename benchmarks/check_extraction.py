"""How far extracted adapters are from the best of their rank, module by module. Prints JSON.

    python -m benchmarks.check_extraction BASE TUNED RANK CACHE ADAPTER...

The least possible error of rank k is the root of the sum of the squared singular values beyond the k-th (Eckart and
Young). It comes from a full SVD of every difference in float64, which takes minutes and is kept in the file CACHE.
An adapter's error is ||D - s B A||, formed in float64 from the factors as they are stored.
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.tensors import open_tensors


def least_error(difference: torch.Tensor, rank: int) -> float:
    """The error of the best approximation of a rank."""
    beyond = torch.linalg.svdvals(difference)[rank:]
    return float(beyond.square().sum().sqrt())


def error(difference: torch.Tensor, module: str, tensors: dict[str, torch.Tensor], scale: float) -> float:
    """The error of an adapter in one module; the whole difference where it has no factors for it."""
    key = f"base_model.model.{module}"
    if f"{key}.lora_A.weight" not in tensors:
        return float(difference.norm())
    A, B = (tensors[f"{key}.lora_{letter}.weight"].double() for letter in "AB")
    return float(torch.addmm(difference, B, A, alpha=-scale).norm())


def scale_of(adapter: Path) -> float:
    """What a reader multiplies B A by."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("use_rslora"):
        raise SystemExit(f"{adapter} scales its modules differently, which this check does not know.")
    return float(config["lora_alpha"] / config["r"])


def main() -> None:
    base, tuned, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    cache, adapters = Path(sys.argv[4]), [Path(argument) for argument in sys.argv[5:]]
    least = json.loads(cache.read_text()) if cache.exists() else {}
    ratios: dict[Path, dict[str, float]] = {adapter: {} for adapter in adapters}
    loaded = {adapter: load_file(adapter / "adapter_model.safetensors") for adapter in adapters}
    scales = {adapter: scale_of(adapter) for adapter in adapters}
    with ExitStack() as stack:
        old, new = open_tensors(base, stack), open_tensors(tuned, stack)
        for name in sorted(name for name in new if name.endswith("_proj.weight")):
            difference = new[name].get_tensor(name).double() - old[name].get_tensor(name).double()
            module = name.removesuffix(".weight")
            if module not in least:
                least[module] = least_error(difference, rank)
            for adapter in adapters:
                found = error(difference, module, loaded[adapter], scales[adapter])
                ratios[adapter][module] = found / least[module] if least[module] else math.inf
    cache.write_text(json.dumps(least))
    print(json.dumps({str(adapter): found for adapter, found in ratios.items()}))


if __name__ == "__main__":
    main()

"""Adapters made by PEFT with factors that do something, and what PEFT makes of them: the reference for merging."""

from __future__ import annotations

import copy
import glob
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.models import FAMILIES, make, perturb, save


def attach(model: Any, config: LoraConfig, seed: int = 3, scale: float = 0.1) -> Any:
    """A PEFT model whose every adapter weight is random, so that no factor is zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator).to(parameter.dtype))
            elif "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            elif (
                "modules_to_save" in name
                or "trainable_tokens" in name
                or (config.bias != "none" and name.endswith("bias"))
            ):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return wrapped


def write_adapter(model: Any, config: LoraConfig, folder: Path, **options: Any) -> Path:
    """Attach an adapter and save it as PEFT does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach(model, config, **options).save_pretrained(folder)
    return folder


def merged_by_peft(
    base: Path, adapters: list[Path], out: Path, family: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Load, merge one adapter after the other, save; the stored tensors."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, FAMILIES[family][0]).from_pretrained(base, dtype=dtype)
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        save(model, out)
    return stored(out)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(glob.glob(f"{folder}/*.safetensors")):
        tensors |= load_file(path)
    return tensors


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
    )


def different(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one has, or whose bits differ."""
    return sorted(
        name
        for name in left.keys() | right.keys()
        if name not in left or name not in right or not same_bits(left[name], right[name])
    )


def write_three(folder: Path) -> None:
    """A small `base` in bfloat16, its fine-tune `tuned`, and an `adapter` of rank 2 on the queries."""
    model = make("llama")
    save(model, folder / "base", torch.bfloat16)
    save(perturb(model, rank=2, scale=0.2), folder / "tuned", torch.bfloat16)
    write_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]), folder / "adapter")

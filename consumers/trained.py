"""Adapters as PEFT writes them, one for each of its options that an engine may not know."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from consumers import models
from consumers.workshop import Workshop, Write

QV = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(family: str, folder: Path, seed: int = 3, **settings: Any) -> None:
    """An adapter as PEFT writes it, with factors that make a difference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = models.make(family)
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, "target_modules": LINEAR, **settings})
        wrapped = get_peft_model(base, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
                elif "lora_" in name and parameter.dim() > 1:
                    parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator))
                elif any(word in name for word in ("modules_to_save", "trainable_tokens", "lora_")) or (
                    config.bias != "none" and name.endswith("bias")
                ):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        wrapped.save_pretrained(str(folder))


def _train(family: str, settings: Mapping[str, Any]) -> Write:
    return lambda out: train(family, out, **settings)


_FUSED: dict[str, Any] = {
    "target_modules": QV,
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}

# Name: (how it came to be, settings of LoraConfig).
_LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("rank 8, alpha 16", {}),
    "rslora": ("`use_rslora`", {"use_rslora": True}),
    "rank-pattern": (
        "`rank_pattern`, one alpha",
        {"rank_pattern": {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.up_proj": 4}},
    ),
    "alpha-pattern": ("`alpha_pattern`", {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 64, "mlp.up_proj": 2}}),
    "patterns": (
        "`rank_pattern` and `alpha_pattern`",
        {"rank_pattern": {"q_proj": 2, "up_proj": 4}, "alpha_pattern": {"q_proj": 2, "up_proj": 32}},
    ),
    "dora": ("`use_dora`", {"use_dora": True}),
    "lora-bias": ("`lora_bias`", {"lora_bias": True}),
    "saved-head": ("`modules_to_save=['lm_head']`", {"modules_to_save": ["lm_head"]}),
    "saved-embeddings": ("`modules_to_save=['embed_tokens']`", {"modules_to_save": ["embed_tokens"]}),
    "saved-norms": ("`modules_to_save=['norm', ...]`", {"modules_to_save": ["input_layernorm", "norm"]}),
    "embeddings": ("`embed_tokens` targeted", {"target_modules": [*LINEAR, "embed_tokens"]}),
    "head": ("`lm_head` targeted", {"target_modules": [*LINEAR, "lm_head"]}),
    "regex": ("`target_modules` a pattern", {"target_modules": r".*layers\.1\.(self_attn|mlp)\.[a-z]+_proj"}),
    "layers": ("`layers_to_transform=[1]`", {"layers_to_transform": [1]}),
    "trainable-tokens": ("`trainable_token_indices`", {"trainable_token_indices": {"embed_tokens": [5, 6, 40]}}),
    "layer-replication": ("`layer_replication`", {"layer_replication": [[0, 2], [0, 2]]}),
    "activated": ("aLoRA, `alora_invocation_tokens`", {"alora_invocation_tokens": [5, 6]}),
    "rank-600": ("rank 600", {"r": 600, "target_modules": QV}),
    "rank-12": ("rank 12", {"r": 12}),
}


# Name: likewise, for other families.
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2/peft-bias": ("`bias='all'`", {"bias": "all", "target_modules": QV}),
    "qwen3/peft-embeddings": (
        "`embed_tokens` targeted, tied embeddings",
        {"target_modules": [*LINEAR, "embed_tokens"]},
    ),
    "qwen3/peft-head": ("`lm_head` targeted, tied embeddings", {"target_modules": [*LINEAR, "lm_head"]}),
    "mixtral/peft-fused": ("`target_parameters`, fused experts", _FUSED),
    "qwen3_moe/peft-fused": ("`target_parameters`, fused experts", _FUSED),
    "gpt2/peft-plain": (
        "Conv1D, `fan_in_fan_out`",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
}


def make_trained(shop: Workshop) -> None:
    """One adapter for each row of the tables."""
    rows = {f"llama/peft-{name}": row for name, row in _LORA.items()} | _OTHERS
    for name, (what, settings) in rows.items():
        family = name.partition("/")[0]
        if shop.wants(family):
            shop.add("trained", name, f"PEFT: {what}", _train(family, settings), shop.base(family))

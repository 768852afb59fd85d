"""Floating-point operations of a stored model, counted from the shapes of its tensors.

    n: positions of an example     d: attention's width (heads times their size)     E: experts     L: layers

A matrix of p numbers that every position goes through costs 2 p n: a multiplication and an addition each. In a mixture
a position goes through K of E experts (top-k), or E ceil(C n / E) / n on average (expert choice, whose experts take
ceil(C n / E) of an example's n positions), so each expert's matrices count by that share of n. Attention adds 4 n n d
for each layer, the masked half included. Look-ups, norms, softmax, additions and the optimiser are not counted.
Training costs three times the forward pass. Activation checkpointing would add to that and is not used here.
"""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from typing import Any

from surgery.checkpoint import StoredTensor, open_checkpoint

# Forward, gradients of the activations, gradients of the weights.
TRAINING = 3
# Looked up or added, never multiplied with.
_TABLES = ("embed_tokens.weight", "position_embeddings", "cls_token")


def forward_flops(folder: Path, context: int) -> int:
    """Operations of the forward pass of one example.

    Args:
        folder: a Llama or a ViT with a classifier, or a mixture made of one, one mixture being like the other.
        context: tokens of an example; ignored for pictures, whose patches count.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    positions = context
    if "patch_size" in config:
        side = int(config["image_size"]) // int(config["patch_size"])
        positions = side * side + 1
    tensors = open_checkpoint(folder).tensors
    total: float = sum(2 * tensor.numel * _uses(name, tensor, config, positions) for name, tensor in tensors.items())
    if config.get("tie_word_embeddings") and "lm_head.weight" not in tensors:
        total += 2.0 * config["vocab_size"] * config["hidden_size"] * positions
    heads = int(config["num_attention_heads"])
    width = heads * int(config.get("head_dim") or config["hidden_size"] // heads)
    return round(total + int(config["num_hidden_layers"]) * 4 * positions * positions * width)


def _uses(name: str, tensor: StoredTensor, config: dict[str, Any], positions: int) -> float:
    """How many positions of an example a tensor is multiplied with."""
    if len(tensor.shape) < 2 or any(table in name for table in _TABLES):
        return 0
    if ".experts." in name:
        return _slots(config, positions) / _experts(config)
    if "patch_embeddings" in name:
        return positions - 1
    return 1 if name.startswith("classifier.") else positions


def _stack(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the mixtures: those of our own format, or transformers' own."""
    stacks = list((config.get("moe_stacks") or {}).values())
    return stacks[0] if stacks else config


def _experts(config: dict[str, Any]) -> int:
    stack = _stack(config)
    return int(stack.get("num_experts") or stack["num_local_experts"])


def _slots(config: dict[str, Any], positions: int) -> int:
    """Pairs of position and expert in an example."""
    stack, experts = _stack(config), _experts(config)
    if stack.get("router") == "expert-choice":
        if stack.get("group") == "batch":  # so many that rounding up does not matter
            return int(stack["capacity_factor"] * positions)
        taken = ceil(float(stack["capacity_factor"]) * positions / experts)
        return experts * min(positions, max(1, taken))
    count: int = stack["num_experts_per_tok"]
    return count * positions

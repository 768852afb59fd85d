"""Upcycled checkpoints made the plain way, in memory, for tests of the code that loads them."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from surgery.moe import modeling_upcycled
from surgery.moe_families import UPCYCLED_FAMILIES, UpcycledFamily
from tests import models

EXPERTS = 4
GROUPED = models._GROUPED
# Those of the shared table, and what it does not have.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: models.FAMILIES[name] for name in models.FAMILIES if name.split("-")[0] in UPCYCLED_FAMILIES},
    "t5-gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**models.FAMILIES["t5"][2], "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 4}),
    "llama-bias": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "bert-lm": ("BertForMaskedLM", "BertConfig", models._TEXT),
}


@cache
def dense(variant: str) -> Any:
    """A tiny dense model; do not change it."""
    class_name, config_name, settings = VARIANTS[variant]
    torch.manual_seed(0)
    return getattr(transformers, class_name)(getattr(transformers, config_name)(**settings)).eval()


def top_k(layers: list[int], k: int = 2, experts: int = EXPERTS, **others: Any) -> dict[str, Any]:
    """An entry of `moe_stacks`."""
    return {"layers": layers, "num_experts": experts, "router": "top-k", "num_experts_per_tok": k, **others}


def expert_choice(
    layers: list[int], capacity: float = EXPERTS, experts: int = EXPERTS, **others: Any
) -> dict[str, Any]:
    """An entry of `moe_stacks`."""
    return {"layers": layers, "num_experts": experts, "router": "expert-choice", "capacity_factor": capacity, **others}


def both_layers(variant: str, entry: Any) -> dict[str, Any]:
    """`moe_stacks` with the same entry for every stack of a family."""
    return {stack: entry([0, 1]) for stack in UPCYCLED_FAMILIES[dense(variant).config.model_type].stacks}


def upcycled_tensors(
    tensors: dict[str, torch.Tensor], family: UpcycledFamily, stacks: dict[str, Any], hidden: int, noise: float = 0.0
) -> dict[str, torch.Tensor]:
    """Copies of each MLP named in `stacks`, noise on every copy but the first, and routers of N(0, 0.25)."""
    generator = torch.Generator().manual_seed(7)
    prefix = rf"(?:{family.base_prefix}\.)?"
    result = dict(tensors)
    for name, entry in stacks.items():
        stack = family.stacks[name]
        for number in entry["layers"]:
            layer = stack.layer.format(layer=number)
            for leaf in stack.leaves:
                pattern = re.compile(rf"({prefix}{re.escape(layer)}\.){re.escape(leaf.dense)}\.(weight|bias)")
                for place, kind in [match.groups() for match in map(pattern.fullmatch, tensors) if match]:
                    weight = result.pop(f"{place}{leaf.dense}.{kind}")
                    for expert in range(entry["num_experts"]):
                        extra = noise * torch.randn(weight.shape, generator=generator) if expert else 0
                        result[f"{place}{stack.mixture}.experts.{expert}.{leaf.expert}.{kind}"] = weight + extra
                    router = f"{place}{stack.mixture}.router.weight"
                    if router not in result:
                        result[router] = 0.5 * torch.randn(entry["num_experts"], hidden, generator=generator)
    return result


def upcycle(variant: str, folder: Path, stacks: dict[str, Any], noise: float = 0.0, **settings: Any) -> Path:
    """Save a tiny dense model and write its upcycled checkpoint to `folder`; `settings` go to the config."""
    source = folder.with_name(folder.name + "-dense")
    models.save(dense(variant), source)
    config = json.loads((source / "config.json").read_text())
    family = UPCYCLED_FAMILIES[config["model_type"]]
    tensors = load_file(source / "model.safetensors")
    folder.mkdir()
    made = upcycled_tensors(tensors, family, stacks, dense(variant).config.hidden_size, noise)
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    config |= {
        "model_type": family.upcycled_type,
        "architectures": ["Upcycled" + config["architectures"][0]],
        "auto_map": family.auto_map(),
        "moe_stacks": stacks,
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(modeling_upcycled.__file__, folder)
    return folder


def auto_class(variant: str) -> str:
    """The auto class that makes a variant's class."""
    name = VARIANTS[variant][0]
    return next(a for a, c in UPCYCLED_FAMILIES[dense(variant).config.model_type].auto_classes.items() if c == name)


def load(variant: str, folder: Path, **options: Any) -> Any:
    """Load through transformers, with the classes of this package."""
    return getattr(transformers, auto_class(variant)).from_pretrained(folder, **options).eval()

"""Tiny dense models to upcycle: of every family that has a native mixture, and of those that ship code."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.operation import RunOptions
from surgery.upcycling.options import UpcycleOptions
from surgery.upcycling.report import UpcycleReport
from surgery.upcycling.upcycle import upcycle
from tests.models import FAMILIES

_TEXT = {**FAMILIES["llama"][2], "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Name: (class, config class, settings).
DENSE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _TEXT),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT, "tie_word_embeddings": True}),
    "llama-3": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT, "rope_parameters": LLAMA3_ROPE, "head_dim": 16}),
    "llama-biased": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT, "attention_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_TEXT, "sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", "MistralConfig", {**_TEXT, "sliding_window": 16}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _TEXT),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**_TEXT, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_TEXT, "head_dim": 8}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**_TEXT, "pad_token_id": 0}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_TEXT, "embedding_multiplier": 4.0, "logits_scaling": 2.0}),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", {**_TEXT, "head_dim": 8}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", {**_TEXT, "head_dim": 8}),
    "t5": ("T5ForConditionalGeneration", "T5Config", FAMILIES["t5"][2]),
    "t5-gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**FAMILIES["t5"][2], "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "qwen3_5": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {
            **_TEXT,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "m2m_100": (
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        {
            "vocab_size": 96,
            "d_model": 32,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_TEXT, "head_dim": 8, "sliding_window": 8}),
    **{name: FAMILIES[name] for name in ("vit", "bert", "roberta", "gpt2", "gpt_neox", "gemma", "gemma2", "phi")},
}  # fmt: skip


@cache
def _made(name: str) -> Any:
    class_name, config_name, settings = DENSE[name]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # As random weights come out, MLPs hardly matter beside the residual; biases start at zero.
            if parameter.dim() >= 2 and not name.startswith("t5"):
                parameter.mul_(4)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def make(name: str) -> Any:
    """A fresh model, the same every time."""
    return copy.deepcopy(_made(name))


def stored(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """The model saved below `folder`, and opened."""
    place = folder / f"{name}-{str(dtype).removeprefix('torch.')}"
    if not place.exists():
        make(name).to(dtype).save_pretrained(place)
    return open_checkpoint(place)


def upcycled(checkpoint: Checkpoint, output: Path, **options: Any) -> UpcycleReport:
    """`upcycle` with nothing but options."""
    return upcycle(checkpoint, output, UpcycleOptions(**options), RunOptions())


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder; nothing may be missing from its file, or left over."""
    from surgery.moe import modeling_upcycled

    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    cls = getattr(transformers, name, None) or getattr(modeling_upcycled, name)
    model, found = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model.eval()


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """What a model takes, seeded."""
    from surgery.ops.running import random_inputs

    return random_inputs(model, 0)[0]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What a model says to `inputs`."""
    found: torch.Tensor = model(**inputs(model)).logits
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())

"""Tiny models of every family, made and saved by transformers, and an architecture that nobody has a table for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 96
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_IMAGE = {key: value for key, value in _TEXT.items() if key not in ("vocab_size", "max_position_embeddings")}
_VIT = {**_IMAGE, "image_size": 8, "patch_size": 4, "num_labels": 5}

# Name: (class, config class, settings).
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_TEXT, "num_labels": 3}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_TEXT, "num_labels": 3}),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT),
    "t5": ("T5ForConditionalGeneration", "T5Config", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
    "qwen3_moe-some-dense": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8, "mlp_only_layers": [0]}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**_GROUPED, "num_local_experts": 4, "head_dim": 8}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**_GROUPED, "num_local_experts": 4}),
    "phi": ("PhiForCausalLM", "PhiConfig", _TEXT),
    "opt": ("OPTForCausalLM", "OPTConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _VIT),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**{k: v for k, v in _VIT.items() if k != "intermediate_size"}}),
}  # fmt: skip
# Those that the issue tracker promises; the others are rows of the same table.
PROMISED = (
    "llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", "bert", "roberta", "vit", "t5", "mixtral",
)  # fmt: skip


@cache
def _made(family: str, seed: int) -> torch.nn.Module:
    class_name, config_name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**settings)
    return getattr(transformers, class_name)(config).eval()


def make(family: str, seed: int = 0) -> Any:
    """A fresh model of a family, the same for the same seed."""
    return copy.deepcopy(_made(family, seed))


def save(model: Any, folder: Path, dtype: torch.dtype | None = None, **options: Any) -> Path:
    """Save with `save_pretrained`, in `dtype` if one is given; returns the folder."""
    model = copy.deepcopy(model)
    (model if dtype is None else model.to(dtype)).save_pretrained(folder, **options)
    return folder


def perturb(
    model: Any,
    scale: float = 0.05,
    rank: int | None = None,
    where: Callable[[str], bool] = lambda name: True,
    seed: int = 1,
) -> Any:
    """A copy with noise added to its matrices, of a rank if one is given: a fine-tune. `where` selects parameters."""
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.dim() < 2 or not where(name):
                continue
            size = float(parameter.double().std()) * scale
            if rank is None:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            else:
                *stack, rows, columns = parameter.shape
                left = torch.randn((*stack, rows, rank), generator=generator)
                right = torch.randn((*stack, rank, columns), generator=generator)
                parameter += (size * left @ right / rank**0.5).to(parameter.dtype)
    tuned.tie_weights()
    return tuned


def is_linear(name: str) -> bool:
    """Whether a parameter is what `--targets all-linear` means, by the names in these tiny models."""
    apart = (
        "embed",
        "wte",
        "wpe",
        "shared",
        "lm_head",
        "score",
        "classifier",
        "bias",
        "norm",
        "ln_",
        "patch",
        "token",
        "position",
    )
    return not any(word in name for word in apart)


def inputs(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs that a model of any of these families takes."""
    from surgery.ops.running import random_inputs

    return random_inputs(model, seed)[0]


@torch.no_grad()
def logits(model: Any, seed: int = 0) -> torch.Tensor:
    """What a model says to `inputs`, in float32."""
    model = model.float().eval()
    return model(**inputs(model, seed)).logits


def invent(folder: Path, seed: int = 0, delta: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint of an architecture that no table knows, with types side by side. `delta` makes a fine-tune of it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "trunk.lookup.table.weight": (VOCABULARY, 24),
        **{
            f"trunk.stage.{layer}.{name}": shape
            for layer in range(2)
            for name, shape in {
                "mixer.into.weight": (40, 24),
                "mixer.out.weight": (24, 40),
                "widen.weight": (64, 24),
                "narrow.weight": (24, 64),
                "widen.bias": (64,),
                "scale_norm.weight": (24,),
                "expert_bank.experts": (3, 24, 20),
            }.items()
        },
        "trunk.final_norm.weight": (24,),
        "reader.weight": (VOCABULARY, 24),
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator) * 0.2
        noise = torch.randn(shape, generator=generator) * 0.02
        changes = len(shape) > 1 and "stage" in name
        tensors[name] = (weight + delta * noise if changes else weight).to(dtype)
    tensors["trunk.steps"] = torch.arange(7)
    tensors["trunk.mask"] = torch.tensor([True, False, True])
    tensors["trunk.table64"] = torch.linspace(0, 1, 5, dtype=torch.float64)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "contraption", "architectures": ["ContraptionForThinking"], "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "notes.txt").write_text("carried along\n")
    return folder

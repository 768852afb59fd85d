"""A base and two fine-tunes of it, small enough to look at: what the README and the documentation work on.

Writes the folders `base`, `tuned` and `other` into the current one: Llama checkpoints of one layer and 0.3M random
parameters, in bfloat16, made with torch and safetensors alone. Each fine-tune moves every linear layer by a twentieth
of its norm, mostly in a few directions, and the last norm a little.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS = 512, 128, 256, 1
CHANGE = 0.05
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.mlp.{name}.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make_base(seed: int) -> dict[str, torch.Tensor]:
    """Random weights, and norms of one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name, shape in shapes()
    }


def fine_tune(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The base with linear layers that moved, by singular values that halve from one to the next, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    tuned = dict(base)
    for name, weight in base.items():
        if "layers" in name and weight.dim() == 2:
            out, wide = weight.shape
            spectrum = 0.5 ** torch.arange(12.0)
            left, right = torch.randn(out, 12, generator=generator), torch.randn(12, wide, generator=generator)
            change = left * spectrum @ right + 0.01 * torch.randn(out, wide, generator=generator)
            tuned[name] = weight + change * (CHANGE * weight.norm() / change.norm())
    tuned["model.norm.weight"] = base["model.norm.weight"] + 0.02 * torch.randn(HIDDEN, generator=generator)
    return tuned


def save(weights: dict[str, torch.Tensor], folder: str) -> None:
    """Write a checkpoint as transformers does."""
    Path(folder).mkdir(exist_ok=True)
    stored = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(stored, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def save_rows(file: str, rows: int = 64, length: int = 32) -> None:
    """Write token ids to train on, one row to a line: each token is the one before it plus 1 to 3."""
    generator = torch.Generator().manual_seed(3)
    steps = torch.randint(1, 4, (rows, length), generator=generator).cumsum(dim=1) % VOCABULARY
    Path(file).write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in steps.tolist()))


def main() -> None:
    """Write the three folders, and a file to train on."""
    base = make_base(seed=0)
    save(base, "base")
    save(fine_tune(base, seed=1), "tuned")
    save(fine_tune(base, seed=2), "other")
    save_rows("rows.jsonl")


if __name__ == "__main__":
    main()

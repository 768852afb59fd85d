"""Make a Llama checkpoint, a fine-tune of it, and a LoRA adapter for it: synthetic, and the same on every run.

    python -m benchmarks.make_models --shape JSON [--base OUT] [--tuned OUT]
        [--adapter OUT --targets q_proj,v_proj [--number N]]

base      weights N(0, 0.02), norms ones, bfloat16
tuned     base + U diag(2 .. 0.5) V^T of rank 16, U and V random and orthonormal, + noise N(0, 5e-5), in bfloat16;
          the toy models of a quick run are changed less, or the change would drown the base
adapter   as PEFT stores it, rank 16, float32, ||dW|| = 1.4% of ||W||

Real weights would not change what is measured, and would have to be downloaded: the time to read, subtract, multiply
and write does not depend on values, but for the spectrum, which decides how many passes a randomised SVD needs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 16
DEVIATION = 0.02
CHANGE = 0.014
HEAD = 64


def generator(name: str, part: str) -> torch.Generator:
    """A random stream of its own for each tensor, whatever else is made."""
    digest = hashlib.blake2b(f"{name}#{part}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def linear_shapes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer within the transformer blocks."""
    hidden, intermediate, kv = shape["hidden"], shape["intermediate"], shape["kv"]
    found: dict[str, tuple[int, int]] = {}
    for layer in range(shape["layers"]):
        prefix = f"model.layers.{layer}"
        found |= {
            f"{prefix}.self_attn.q_proj": (hidden, hidden),
            f"{prefix}.self_attn.k_proj": (kv, hidden),
            f"{prefix}.self_attn.v_proj": (kv, hidden),
            f"{prefix}.self_attn.o_proj": (hidden, hidden),
            f"{prefix}.mlp.gate_proj": (intermediate, hidden),
            f"{prefix}.mlp.up_proj": (intermediate, hidden),
            f"{prefix}.mlp.down_proj": (hidden, intermediate),
        }
    return found


def tensor_shapes(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the order in which transformers saves them."""
    table, norm = (shape["vocab"], shape["hidden"]), (shape["hidden"],)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for name, size in linear_shapes(shape).items():
        found[f"{name}.weight"] = size
        if name.endswith("down_proj"):
            block = name.rpartition(".mlp")[0]
            found |= {f"{block}.input_layernorm.weight": norm, f"{block}.post_attention_layernorm.weight": norm}
    return {**found, "model.norm.weight": norm, "lm_head.weight": table}


def config(shape: dict[str, int]) -> dict[str, object]:
    """What transformers' LlamaForCausalLM needs to load the checkpoint."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"],
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape["hidden"] // HEAD,
        "num_hidden_layers": shape["layers"],
        "num_key_value_heads": shape["kv"] // HEAD,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": shape["vocab"],
    }


def base_weight(name: str, size: tuple[int, ...]) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (DEVIATION * torch.randn(size, generator=generator(name, "base"))).bfloat16()


def tuned_weight(name: str, size: tuple[int, ...]) -> torch.Tensor:
    """The base's weight, and for a linear layer a change of rank 16 and some noise on top."""
    weight = base_weight(name, size)
    if "_proj." not in name:
        return weight
    random = generator(name, "tuned")
    U = torch.linalg.qr(torch.randn(size[0], RANK, generator=random)).Q
    V = torch.linalg.qr(torch.randn(size[1], RANK, generator=random)).Q
    change = (U * torch.linspace(2, 0.5, RANK) * min(1, size[1] / 1024)) @ V.T
    return (weight.float() + change + 5e-5 * torch.randn(size, generator=random)).bfloat16()


def write_checkpoint(folder: Path, shape: dict[str, int], tuned: bool) -> None:
    """Write shards one by one, an index, and the config."""
    folder.mkdir(parents=True)
    sizes = tensor_shapes(shape)
    names, shards = list(sizes), shape["shards"]
    each = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    total = 0
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        make = tuned_weight if tuned else base_weight
        tensors = {name: make(name, sizes[name]) for name in names[shard * each : (shard + 1) * each]}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config(shape), indent=2))


def write_adapter(folder: Path, shape: dict[str, int], targets: list[str], number: int = 1) -> None:
    """Write a PEFT adapter with Gaussian factors for every linear layer named in `targets`."""
    folder.mkdir(parents=True)
    # ||B A|| is about sqrt(rank m n) times both deviations, ||W|| is DEVIATION sqrt(m n).
    deviation = (CHANGE * DEVIATION / RANK**0.5) ** 0.5
    tensors = {}
    for name, (rows, columns) in linear_shapes(shape).items():
        if name.rpartition(".")[2] in targets:
            random = generator(name, "adapter" if number == 1 else f"adapter{number}")
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = deviation * torch.randn(RANK, columns, generator=random)
            tensors[f"{key}.lora_B.weight"] = deviation * torch.randn(rows, RANK, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--tuned", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--targets", type=lambda text: text.split(","))
    parser.add_argument("--number", type=int, default=1)
    given = parser.parse_args()
    if given.base:
        write_checkpoint(given.base, given.shape, tuned=False)
    if given.tuned:
        write_checkpoint(given.tuned, given.shape, tuned=True)
    if given.adapter:
        write_adapter(given.adapter, given.shape, given.targets, given.number)


if __name__ == "__main__":
    main()

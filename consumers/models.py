"""Tiny real checkpoints, made and saved by transformers, and fine-tunes of them.

Their sizes are the smallest that every engine takes: heads of 32, widths that are multiples of 64. The weights are
random but large enough that a prediction depends on every one of them.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 512
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEAD = {**_TEXT, "head_dim": 32}
_TIED = {**_HEAD, "tie_word_embeddings": True}
_NOT_GROUPED = {key: value for key, value in _TEXT.items() if key != "num_key_value_heads"}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {**_TEXT, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
_QWEN2_MOE = {**_ROUTED, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
_QWEN3_MOE = {**_ROUTED, "moe_intermediate_size": 64, "head_dim": 32}
_GLM4_MOE = {
    **_HEAD,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_ERNIE_MOE = {
    **_TEXT,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Name: (class, config class, settings).
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _TEXT),
    "mistral": ("MistralForCausalLM", "MistralConfig", _HEAD),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _TEXT),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _TIED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _HEAD),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_HEAD, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _NOT_GROUPED),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_TEXT, "attention_multiplier": 32**-0.5}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _TEXT),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", _HEAD),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", _HEAD),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_HEAD, **_LOCAL}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _QWEN2_MOE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _QWEN3_MOE),
    "qwen3_moe_part": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_QWEN3_MOE, "mlp_only_layers": [0]}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_ROUTED, "num_key_value_heads": 4}),
    "flex_olmo": ("FlexOlmoForCausalLM", "FlexOlmoConfig", _ROUTED),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**_TEXT, **_LOCAL, "attention_multiplier": 32**-0.5}),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", _GLM4_MOE),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", _ERNIE_MOE),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", {**_HEAD, "num_experts": 4, "moe_topk": 2}),
}
# Those with experts.
MIXTURES = tuple(name for name in FAMILIES if "moe" in name or name in ("mixtral", "flex_olmo"))
# Families whose tokenizer is byte-level BPE and nothing else; the others take a SentencePiece model.
_BYTE_LEVEL = (
    *("gpt2", "gpt_neox", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe", "glm4_moe"),
    *("hunyuan_v1_moe", "hunyuan_v1_dense", "granite", "olmo2"),
)


# Those of GLM are what llama.cpp's converter looks up.
_SPECIAL = ("<unk>", "<s>", "</s>", "[gMASK]", "<|user|>", "<|endoftext|>", "<|observation|>")


def make(family: str, seed: int = 0, **settings: Any) -> Any:
    """A model with random weights in which every matrix has a say: its rows have a norm of about one."""
    class_name, config_name, defaults = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**{**defaults, **settings})
    model = getattr(transformers, class_name)(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        model.tie_weights()
    return model.bfloat16().float()  # what is stored, so that an adapter made with it belongs to the file


def fine_tune(model: Any, change: float = 0.3, everything: bool = False, seed: int = 1) -> Any:
    """A copy whose matrices moved by `change` of their norm, each in its own number of directions, and some noise.

    Embeddings, head and vectors stay, unless `everything` moves.
    """
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(tuned.named_parameters()):
            if parameter.dim() < 2:
                parameter += (0.1 if everything else 0.0) * torch.randn(parameter.shape, generator=generator)
                continue
            if not everything and any(word in name for word in ("embed", "wte", "wpe", "lm_head", "router")):
                continue
            *stack, rows, columns = parameter.shape
            rank = 2 + index % 7
            left = torch.randn((*stack, rows, rank), generator=generator)
            right = torch.randn((*stack, rank, columns), generator=generator)
            moved = left @ right + 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter += change * moved * (parameter.norm() / moved.norm())
        tuned.tie_weights()
    return tuned


def save(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """Save as transformers does, with a tokenizer beside it."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder, **options)
    family = next(name for name, (kind, _, _) in FAMILIES.items() if kind == type(model).__name__)
    if family in _BYTE_LEVEL:
        _byte_level(folder)
    else:
        (folder / "tokenizer.model").write_bytes(_sentencepiece())
        kind = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return folder


def _sentencepiece() -> bytes:
    """A SentencePiece model of `VOCABULARY` pieces: four special ones, the bytes, and invented words.

    It is a protobuf message. Field 1 repeats a piece, which is a string (1), a score (2) and a type (3); field 2 says
    how it was trained: that bytes stand in for what no piece covers (35).
    """
    normal, unknown, control, byte = 1, 2, 3, 6
    pieces = [("<unk>", unknown), ("<s>", control), ("</s>", control), ("<|endoftext|>", control)]
    pieces += [(f"<0x{value:02X}>", byte) for value in range(256)]
    pieces += [(f"\u2581w{index}", normal) for index in range(VOCABULARY - len(pieces))]
    message = b""
    for index, (text, kind) in enumerate(pieces):
        word = text.encode()
        body = (
            b"\x0a" + bytes([len(word)]) + word + b"\x15" + struct.pack("<f", -float(index)) + b"\x18" + bytes([kind])
        )
        message += b"\x0a" + bytes([len(body)]) + body
    return message + b"\x12\x03\x98\x02\x01"


def older_config(base: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose config has the spellings of transformers 4 beside those of 5."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    config |= {"rope_theta": rope.get("rope_theta", 10000.0), "torch_dtype": config.get("dtype", "bfloat16")}
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    if "partial_rotary_factor" in rope:
        config |= {"partial_rotary_factor": rope["partial_rotary_factor"], "rope_scaling": None}
    if config["model_type"] == "hunyuan_v1_moe":
        each = {"moe_intermediate_size": config["intermediate_size"], "moe_topk": config["moe_topk"]}
        config |= {
            name: [value] * config["num_hidden_layers"] for name, value in (each | {"num_shared_expert": 1}).items()
        }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _byte_level(folder: Path) -> None:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens as `tokenizer.json`."""
    alphabet = sorted(_bytes_as_characters())
    words = [*_SPECIAL, *alphabet]
    words += [f"{one}{other}" for one in alphabet[:16] for other in alphabet[:16]][: VOCABULARY - len(words)]
    merges = [[word[0], word[1]] for word in words if word[0] in alphabet and len(word) == 2]
    special = [
        {"id": index, "content": words[index], "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index in range(len(_SPECIAL))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {word: index for index, word in enumerate(words)}, "merges": merges}
    content = {"version": "1.0", "added_tokens": special, "pre_tokenizer": byte_level, "decoder": byte_level}
    (folder / "tokenizer.json").write_text(json.dumps({**content, "model": model}))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


def _bytes_as_characters() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level BPE."""
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())

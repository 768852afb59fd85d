"""What a dense config means where it says nothing: the classes of a mixture have other defaults.

A Llama without `num_key_value_heads` has as many as heads, a Mixtral has 8; without `rms_norm_eps` 1e-6 and 1e-5;
without `rope_theta` 10,000 and 1,000,000. So what a dense config leaves out is written into the mixture's.
Source: the config classes of transformers 5.23; a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping

_COMMON: Mapping[str, object] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}
_QWEN: Mapping[str, object] = {
    "max_position_embeddings": 32_768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
}
_OLMO2: Mapping[str, object] = {
    "rms_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 50_279,
    "attention_bias": False,
}
_GRANITE: Mapping[str, object] = {
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
_ERNIE: Mapping[str, object] = {
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "pad_token_id": 0,
    "use_bias": False,
}
_QWEN3_5: Mapping[str, object] = {
    "max_position_embeddings": 32_768,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "attention_bias": False,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_OWN: Mapping[str, Mapping[str, object]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128, "attention_bias": False},
    "olmo2": _OLMO2,
    "granite": _GRANITE,
    "ernie4_5": _ERNIE,
    "qwen3_5_text": _QWEN3_5,
    "hunyuan_v1_dense": {"rms_norm_eps": 1e-5, "pad_token_id": 0, "eod_token_id": 3, "attention_bias": False},
}
_T5: Mapping[str, object] = {
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "tie_word_embeddings": True,
}
DENSE_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    **{name: {**_COMMON, **own} for name, own in _OWN.items()},
    "t5": _T5,
}


def with_defaults(config: Mapping[str, object], model_type: str) -> dict[str, object]:
    """A dense config in which everything is said that a mixture's class would take otherwise.

    `head_dim` and `num_key_value_heads` follow from the heads where neither the config nor its class names them.
    """
    full: dict[str, object] = {**DENSE_DEFAULTS.get(model_type, {}), **config}
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if full.get("num_key_value_heads") is None and heads is not None:
        full["num_key_value_heads"] = heads
    if full.get("head_dim") is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        full["head_dim"] = hidden // heads
    return full


def with_both_spellings(config: Mapping[str, object]) -> dict[str, object]:
    """A config with rotary settings and dtype as transformers 5 writes them and as everybody else reads them.

    `rope_parameters` holds what used to be `rope_theta`, `rope_scaling` and `partial_rotary_factor`; `dtype` was
    `torch_dtype`. mlx-lm reads the older names only, llama.cpp and vLLM either.
    """
    full = dict(config)
    nested = full.get("rope_parameters")
    older = full.get("rope_scaling")
    theta = full.pop("rope_theta", 10_000.0)
    if not isinstance(nested, dict):
        # The oldest files spell the kind of scaling `type`.
        scaling = (
            {("rope_type" if key == "type" else key): v for key, v in older.items()} if isinstance(older, dict) else {}
        )
        nested = {"rope_type": "default", **scaling, "rope_theta": theta}
        if (share := full.get("partial_rotary_factor")) is not None:
            nested["partial_rotary_factor"] = share
    full["rope_parameters"] = nested
    full["rope_theta"] = nested.get("rope_theta", theta)
    if nested.get("partial_rotary_factor") is not None:
        full["partial_rotary_factor"] = nested["partial_rotary_factor"]
    if nested.get("rope_type", "default") == "default":
        full["rope_scaling"] = None
    else:
        scaling = {key: v for key, v in nested.items() if key not in ("rope_theta", "partial_rotary_factor")}
        full["rope_scaling"] = {**scaling, "type": nested["rope_type"]} if not isinstance(older, dict) else older
    if (dtype := full.get("dtype", full.get("torch_dtype"))) is not None:
        full["dtype"] = full["torch_dtype"] = dtype
    return full

"""The config of a mixture back to that of its dense family: what `planning.new_config` did, undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from surgery.checkpoint import Checkpoint
from surgery.moe_families import CLASS_PREFIX
from surgery.upcycling.mixture import Config, Target

# Settings of mixtures, in the spelling of any format; no dense class has one of them.
_OF_MIXTURES = frozenset(
    (
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok",
        "moe_k", "moe_topk", "norm_topk_prob", "moe_intermediate_size", "shared_expert_intermediate_size",
        "num_shared_expert", "n_shared_experts", "moe_num_shared_experts", "decoder_sparse_step",
        "encoder_sparse_step", "mlp_only_layers", "first_k_dense_replace", "moe_layer_start_index",
        "moe_layer_end_index", "moe_layer_interval", "moe_norm_min", "moe_layer_freq", "output_router_logits",
        "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise", "router_bias", "router_dtype",
        "router_ignore_padding_tokens", "add_router_probs", "routed_scaling_factor", "n_group", "topk_group",
        "topk_method", "scoring_func", "num_nextn_predict_layers", "use_mixed_mlp_moe",
        "num_sparse_encoder_layers", "num_sparse_decoder_layers", "expert_capacity",
        "moe_eval_capacity_token_fraction", "moe_token_dropout", "normalize_router_prob_before_dropping",
        "batch_prioritized_routing", "second_expert_policy", "moe_stacks", "routed_lora_base", "use_qk_norm",
        "auto_map", "transformers_version",
    )
)  # fmt: skip
# What a format says beside these because its class asks for it, and the dense family's does not.
_EXTRA: Mapping[str, tuple[str, ...]] = {
    "switch_transformers": ("dense_act_fn",),
    "glm4_moe": ("partial_rotary_factor",),
    "qwen2_moe": ("qkv_bias",),
}
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_CLASSES: Mapping[str, str] = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_5_text": "Qwen3_5",
    "olmo2": "Olmo2",
    "granite": "Granite",
    "ernie4_5": "Ernie4_5",
    "hunyuan_v1_dense": "HunYuanDenseV1",
    "t5": "T5",
    "m2m_100": "M2M100",
}


def dense_config(config: Config, target: Target, family: str, inner: int) -> dict[str, object]:
    """The config of the dense model.

    Args:
        config: the mixture's.
        target: its format.
        family: the dense model type.
        inner: the intermediate size of the dense MLPs.
    """
    left_out = {*_OF_MIXTURES, *_EXTRA.get(target.name, ())}
    if family == "llama":
        left_out |= set(_WINDOWS)
    if family == "mistral":
        left_out |= set(_WINDOWS[1:])
    dense = {name: value for name, value in config.items() if name not in left_out}
    nested = dense.get("rope_parameters")
    if target.name == "glm4_moe" and isinstance(nested, dict):
        dense["rope_parameters"] = {key: value for key, value in nested.items() if key != "partial_rotary_factor"}
    dense |= {"model_type": family, "architectures": _architectures(config, target, family)}
    if target.name == "switch_transformers":
        dense["feed_forward_proj"] = "relu"
    if "intermediate_size" in config and not target.ships:
        dense["intermediate_size"] = inner
    return dense


def _architectures(config: Config, target: Target, family: str) -> list[str]:
    named = config.get("architectures")
    classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if target.ships:
        return [name.removeprefix(CLASS_PREFIX) for name in classes]
    prefix = target.classes("", "")
    return [_CLASSES[family] + name.removeprefix(prefix) for name in classes if name.startswith(prefix)]


def class_without_a_name(checkpoint: Checkpoint, target: Target, architecture: str) -> str:
    """The class of a dense checkpoint whose config names none, from that of the mixture which was made of it."""
    if target.ships:
        return architecture.removeprefix(CLASS_PREFIX)
    return _CLASSES[checkpoint.model_type] + architecture.removeprefix(target.classes("", ""))


def no_dense_class(checkpoint: Checkpoint, target: Target, family: str) -> Iterator[str]:
    """What of a mixture the dense family's class does not have: the end of a sentence for each."""
    config = checkpoint.config
    if family in ("llama", "mistral"):
        if config.get("use_qk_norm") or any(".q_norm." in name for name in checkpoint.tensors):
            yield "normalises queries and keys"
        if _partial(config) != 1.0:
            yield f"turns only a part of each head (partial_rotary_factor {_partial(config):g})"
        if target.name == "glm4_moe":
            biased = next((name for name in checkpoint.tensors if name.endswith(".q_proj.bias")), None)
            if biased is not None:
                yield f"has attention biases ({biased!r})"
    if family == "llama" and config.get("sliding_window") is not None and config.get("use_sliding_window", True):
        yield f"has a sliding window (of {config['sliding_window']})"
    scale = config.get("routed_scaling_factor")
    if isinstance(scale, int | float) and scale != 1:
        yield f"multiplies what its experts give (routed_scaling_factor {scale:g})"
    if target.name == "qwen2_moe" and family == "qwen2" and config.get("qkv_bias") is False:
        yield "has no attention biases (qkv_bias), and a Qwen2 always has"
    depth = config.get("num_nextn_predict_layers")
    if isinstance(depth, int) and depth > 0:
        yield f"predicts several tokens (num_nextn_predict_layers {depth})"


def _partial(config: Config) -> float:
    nested = config.get("rope_parameters")
    places = (config, nested if isinstance(nested, dict) else {})
    found = [place["partial_rotary_factor"] for place in places if "partial_rotary_factor" in place]
    return next((float(value) for value in found if isinstance(value, int | float)), 1.0)

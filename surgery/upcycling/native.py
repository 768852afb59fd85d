"""The mixtures that transformers 5 has classes for, as data: names, config fields, and what each can express.

Names are those of the Hub's files, one tensor to an expert: transformers 5 stacks them on loading and writes them back.
Source: transformers 5.23, modelling and configuration files of each; the tests load every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from surgery.upcycling.mixture import ABSENT, Asked, Block, Config, Mixture, SharedExpert, Subset, Target
from surgery.upcycling.mlps import DOWN, GATE, UP

_HUB_EXPERTS = {
    GATE: "experts.{e}.gate_proj.weight",
    UP: "experts.{e}.up_proj.weight",
    DOWN: "experts.{e}.down_proj.weight",
}
_MIXTRAL_EXPERTS = {GATE: "experts.{e}.w1.weight", UP: "experts.{e}.w3.weight", DOWN: "experts.{e}.w2.weight"}
_ALL_TASKS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")

# A shared expert that is there for the sake of loaders: small, a multiple of what they cut matrices into.
_LEAST_SHARED = 256


def _least_shared(mixture: Mixture) -> int:
    return min(_LEAST_SHARED, mixture.inner)


def _flag(config: Config, name: str) -> bool:
    return config.get(name) is True


def _no_mlp_bias(asked: Asked) -> Iterator[str]:
    """What no format for Llama-like models has: biases in the MLP, and on the attention's output."""
    biased = [name for name in asked.checkpoint.tensors if ".mlp." in name and name.endswith("_proj.bias")]
    if biased:
        yield f"has no biases in its experts ({biased[0]!r})"


def _no_attention_bias(asked: Asked) -> Iterator[str]:
    yield from _no_mlp_bias(asked)
    biased = [name for name in asked.checkpoint.tensors if name.endswith((".q_proj.bias", ".o_proj.bias"))]
    if biased:
        yield f"has no attention biases ({biased[0]!r})"


def _no_output_bias(asked: Asked) -> Iterator[str]:
    yield from _no_mlp_bias(asked)
    biased = [name for name in asked.checkpoint.tensors if name.endswith(".o_proj.bias")]
    if biased:
        yield f"has no bias on the attention's output ({biased[0]!r})"


def _no_window(asked: Asked) -> Iterator[str]:
    if asked.config.get("sliding_window") is not None and asked.config.get("use_sliding_window", True):
        yield f"has no sliding window (of {asked.config['sliding_window']})"


def _one_window(asked: Asked) -> Iterator[str]:
    yield from _no_mlp_bias(asked)
    if _flag(asked.config, "use_sliding_window") and asked.config.get("sliding_window") is not None:
        yield "has one attention window for all layers, and this model has it in some"


def _glm_objections(asked: Asked) -> Iterator[str]:
    yield from _no_attention_bias(asked)
    yield from _no_window(asked)


def _qwen2_objections(asked: Asked) -> Iterator[str]:
    yield from _no_output_bias(asked)
    if asked.checkpoint.model_type in ("llama", "mistral"):
        yield from _no_attention_bias(asked)
        yield from _no_window(asked)


def _sparse(mixture: Mixture) -> dict[str, object]:
    """What the Qwen mixtures and theirs call the routed experts."""
    return {
        "num_experts": mixture.experts,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
        "norm_topk_prob": mixture.normalized,
        "moe_intermediate_size": mixture.expert_inner,
    }


def _dense_layers(mixture: Mixture) -> list[int]:
    return [layer for layer in range(mixture.depth) if layer not in mixture.layers]


def _mixtral(asked: Asked) -> dict[str, object]:
    return {
        "num_local_experts": asked.mixture.experts,
        "num_experts": asked.mixture.experts,
        "num_experts_per_tok": asked.mixture.top_k,
        "intermediate_size": asked.mixture.expert_inner,
        "sliding_window": asked.config.get("sliding_window"),
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
    }


def _qwen2_moe(asked: Asked) -> dict[str, object]:
    shared = asked.mixture.inner if asked.mixture.shared else _least_shared(asked.mixture)
    fields = {
        **_sparse(asked.mixture),
        "shared_expert_intermediate_size": shared,
        "decoder_sparse_step": 1,
        "mlp_only_layers": _dense_layers(asked.mixture),
        "output_router_logits": False,
        "qkv_bias": True,
    }
    if "use_sliding_window" not in asked.config:  # not a Qwen2: no layer has a window
        return {**fields, "use_sliding_window": False, "sliding_window": None, "max_window_layers": asked.mixture.depth}
    return {
        **fields,
        "layer_types": asked.config.get("layer_types") or _qwen2_windows(asked.config, asked.mixture.depth),
    }


def _qwen2_windows(config: Config, depth: int) -> list[str]:
    """Qwen2's rule: with a window, the layers from `max_window_layers` on have it. Qwen2-MoE's own rule is another."""
    windowed = _flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    first = config.get("max_window_layers")
    start = first if windowed and isinstance(first, int) else depth
    return ["sliding_attention" if layer >= start else "full_attention" for layer in range(depth)]


def _qwen3_moe(asked: Asked) -> dict[str, object]:
    return {
        **_sparse(asked.mixture),
        "decoder_sparse_step": 1,
        "mlp_only_layers": _dense_layers(asked.mixture),
        "output_router_logits": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ABSENT,
        "max_window_layers": ABSENT,
    }


def _glm4_moe(asked: Asked) -> dict[str, object]:
    return {
        "n_routed_experts": asked.mixture.experts,
        "num_local_experts": asked.mixture.experts,
        "num_experts": asked.mixture.experts,
        "num_experts_per_tok": asked.mixture.top_k,
        "norm_topk_prob": asked.mixture.normalized,
        "moe_intermediate_size": asked.mixture.expert_inner,
        "n_shared_experts": 1,
        "first_k_dense_replace": asked.mixture.layers[0],
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": False,
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 0,
        "output_router_logits": False,
        "sliding_window": None,
        "attention_bias": False,
    }


def _flex_olmo(asked: Asked) -> dict[str, object]:
    fields = _sparse(asked.mixture)
    del fields["moe_intermediate_size"]
    return {**fields, "intermediate_size": asked.mixture.expert_inner, "output_router_logits": False}


def _granitemoe(asked: Asked) -> dict[str, object]:
    return {
        "num_local_experts": asked.mixture.experts,
        "num_experts": asked.mixture.experts,
        "num_experts_per_tok": asked.mixture.top_k,
        "intermediate_size": asked.mixture.expert_inner,
        "output_router_logits": False,
    }


def _ernie(asked: Asked) -> dict[str, object]:
    interval = asked.mixture.interval
    assert interval is not None  # `Subset.RANGE`
    first, last, step = interval
    return {
        "moe_num_experts": asked.mixture.experts,
        "num_experts": asked.mixture.experts,
        "num_local_experts": asked.mixture.experts,
        "moe_k": asked.mixture.top_k,
        "num_experts_per_tok": asked.mixture.top_k,
        "moe_intermediate_size": asked.mixture.expert_inner,
        "moe_num_shared_experts": 1 if asked.mixture.shared else 0,
        "moe_layer_start_index": first,
        "moe_layer_end_index": last,
        "moe_layer_interval": step,
        "moe_norm_min": 1e-12,
        "output_router_logits": False,
    }


def _hunyuan(asked: Asked) -> dict[str, object]:
    return {
        "num_experts": asked.mixture.experts,
        "num_local_experts": asked.mixture.experts,
        "moe_topk": [asked.mixture.top_k] * asked.mixture.depth,
        "num_experts_per_tok": asked.mixture.top_k,
        "intermediate_size": asked.mixture.expert_inner,
        "moe_intermediate_size": [asked.mixture.expert_inner] * asked.mixture.depth,
        "num_shared_expert": [1] * asked.mixture.depth,
        "use_mixed_mlp_moe": True,
        "output_router_logits": False,
    }


def _qwen3_5_moe(asked: Asked) -> dict[str, object]:
    fields = _sparse(asked.mixture)
    del fields["norm_topk_prob"]  # it always does
    return {
        **fields,
        "shared_expert_intermediate_size": asked.mixture.inner
        if asked.mixture.shared
        else _least_shared(asked.mixture),
        "output_router_logits": False,
    }


def _qwen3_5_objections(asked: Asked) -> Iterator[str]:
    yield from _no_mlp_bias(asked)
    if any(name.startswith("mtp.") for name in asked.checkpoint.tensors):
        yield "would need a mixture in the multi-token prediction layers, too (`mtp.`)"


_GATED_SHARED = {GATE: "gate_proj.weight", UP: "up_proj.weight", DOWN: "down_proj.weight"}


def _shared(path: str, gate: str = "", required: bool = False, small: bool = False) -> SharedExpert:
    names = {part: f"{path}.{name}" for part, name in _GATED_SHARED.items()}
    if small:
        return SharedExpert(names, gate, required, _least_shared)
    return SharedExpert(names, gate, required)


def _named(prefix: str) -> Callable[[str, str], str]:
    """Classes that are called after the format: `MixtralForCausalLM`."""
    return lambda _, task: f"{prefix}{task}"


# In the order in which `--target auto` tries them.
NATIVE: tuple[Target, ...] = (
    Target(
        "mixtral",
        _named("Mixtral"),
        ("llama", "mistral"),
        Subset.ALL,
        {"decoder": Block("block_sparse_moe", "gate.weight", _MIXTRAL_EXPERTS)},
        _mixtral,
        _no_attention_bias,
        tasks=_ALL_TASKS,
    ),
    Target(
        "glm4_moe",
        _named("Glm4Moe"),
        ("llama", "mistral"),
        Subset.SUFFIX,
        {
            "decoder": Block(
                "mlp",
                "gate.weight",
                _HUB_EXPERTS,
                corrections=(("gate.e_score_correction_bias", lambda experts: (experts,)),),
                shared=_shared("shared_experts", required=True),
            )
        },
        _glm4_moe,
        _glm_objections,
        tasks=("ForCausalLM", "Model"),
    ),
    Target(
        "qwen2_moe",
        _named("Qwen2Moe"),
        ("qwen2", "llama", "mistral"),
        Subset.ANY,
        {
            "decoder": Block(
                "mlp",
                "gate.weight",
                _HUB_EXPERTS,
                shared=_shared("shared_expert", "shared_expert_gate.weight", required=True, small=True),
            )
        },
        _qwen2_moe,
        _qwen2_objections,
        tasks=_ALL_TASKS,
        raw=True,
    ),
    Target(
        "qwen3_moe",
        _named("Qwen3Moe"),
        ("qwen3",),
        Subset.ANY,
        {"decoder": Block("mlp", "gate.weight", _HUB_EXPERTS)},
        _qwen3_moe,
        _one_window,
        tasks=_ALL_TASKS,
        raw=True,
    ),
    Target(
        "qwen3_5_moe_text",
        _named("Qwen3_5Moe"),
        ("qwen3_5_text",),
        Subset.ALL,
        {
            "decoder": Block(
                "mlp",
                "gate.weight",
                _HUB_EXPERTS,
                shared=_shared("shared_expert", "shared_expert_gate.weight", required=True, small=True),
            )
        },
        _qwen3_5_moe,
        _qwen3_5_objections,
        tasks=("ForCausalLM",),
    ),
    Target(
        "flex_olmo",
        _named("FlexOlmo"),
        ("olmo2",),
        Subset.ALL,
        {"decoder": Block("mlp", "gate.weight", _HUB_EXPERTS)},
        _flex_olmo,
        _no_mlp_bias,
        tasks=("ForCausalLM", "Model"),
        raw=True,
    ),
    Target(
        "granitemoe",
        _named("GraniteMoe"),
        ("granite",),
        Subset.ALL,
        {
            "decoder": Block(
                "block_sparse_moe",
                "router.layer.weight",
                stacks={"input_linear.weight": (GATE, UP), "output_linear.weight": (DOWN,)},
            )
        },
        _granitemoe,
        _no_mlp_bias,
        tasks=("ForCausalLM", "Model"),
    ),
    Target(
        "ernie4_5_moe",
        _named("Ernie4_5_Moe"),
        ("ernie4_5",),
        Subset.RANGE,
        {
            "decoder": Block(
                "mlp",
                "gate.weight",
                _HUB_EXPERTS,
                corrections=(("moe_statics.e_score_correction_bias", lambda experts: (1, experts)),),
                shared=_shared("shared_experts"),
            )
        },
        _ernie,
        _no_mlp_bias,
        tasks=("ForCausalLM", "Model"),
        float32_router=True,
    ),
    Target(
        "hunyuan_v1_moe",
        _named("HunYuanMoEV1"),
        ("hunyuan_v1_dense",),
        Subset.ALL,
        {"decoder": Block("mlp", "gate.wg.weight", _HUB_EXPERTS, shared=_shared("shared_mlp", required=True))},
        _hunyuan,
        _no_mlp_bias,
        tasks=("ForCausalLM", "ForSequenceClassification", "Model"),
        float32_router=True,
    ),
)

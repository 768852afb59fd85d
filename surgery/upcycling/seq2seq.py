"""Mixtures of encoder-decoder models that transformers 5 has classes for: Switch Transformers and NLLB-MoE, as data.

Switch sends a token to one expert and multiplies by its probability, so nothing is preserved; it is made when it is
asked for. NLLB-MoE takes two experts whose weights sum to one; but transformers 5.23 runs experts 0 and 1 only,
whichever were chosen: `NllbMoeExperts.forward` takes the mask of the first choice for the numbers of the experts.
Source: transformers 5.23, modelling and configuration files; the tests load both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from surgery.upcycling.mixture import ABSENT, Asked, Block, Mixture, Subset, Target

SWITCH = "switch_transformers"
# Tokens of one sequence that an expert takes: a Switch drops what exceeds it.
_LEAST_CAPACITY = 512

_NLLB_NAMES = (
    (re.compile(r"\.encoder_attn(?=\.|_layer_norm\.)"), ".cross_attention"),
    (re.compile(r"(\.layers\.\d+)\.final_layer_norm\."), r"\1.ff_layer_norm."),
    (re.compile(r"(\.layers\.\d+)\.fc([12])\."), r"\1.ffn.fc\2."),
)
_M2M_NAMES = (
    (re.compile(r"\.cross_attention(?=\.|_layer_norm\.)"), ".encoder_attn"),
    (re.compile(r"(\.layers\.\d+)\.ff_layer_norm\."), r"\1.final_layer_norm."),
    (re.compile(r"(\.layers\.\d+)\.ffn\.fc([12])\."), r"\1.fc\2."),
)


def switch_step(mixture: Mixture) -> int | None:
    """The step by which Switch counts sparse layers, from layer 1 on; None for layers that are not so."""
    for step in range(1, mixture.depth + 1):
        if mixture.layers == tuple(n for n in range(mixture.depth) if n % step == 1 or step == 1):
            return step
    return None


def nllb_step(mixture: Mixture) -> int | None:
    """The step by which NLLB-MoE counts sparse layers, the multiples from 1; None for layers that are not so."""
    for step in range(1, mixture.depth + 1):
        if mixture.layers == tuple(n for n in range(mixture.depth) if (n + 1) % step == 0):
            return step
    return None


def _steps(asked: Asked, of: Callable[[Mixture], int | None]) -> dict[str, object]:
    """Both steps; 0 is a stack without sparse layers, which only config.json itself can say."""
    found = {stack: of(mixture) for stack, mixture in asked.mixtures.items()}
    return {f"{stack}_sparse_step": found.get(stack, 0) for stack in ("encoder", "decoder")}


def _switch(asked: Asked) -> dict[str, object]:
    steps = _steps(asked, switch_step)
    layers, positions = asked.config.get("num_layers"), asked.config.get("n_positions")
    return {
        **steps,
        **{
            f"num_sparse_{stack}_layers": len(asked.mixtures[stack].layers) if stack in asked.mixtures else 0
            for stack in ("encoder", "decoder")
        },
        "num_decoder_layers": asked.config.get("num_decoder_layers") or layers,
        "num_experts": next(iter(asked.mixtures.values())).experts,
        "expert_capacity": max(_LEAST_CAPACITY, positions if isinstance(positions, int) else 0),
        "router_bias": False,
        "router_jitter_noise": 0.0,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "add_router_probs": False,
        "dense_act_fn": "relu",
        "feed_forward_proj": ABSENT,
        "is_gated_act": ABSENT,
    }


def _switch_objections(asked: Asked) -> Iterator[str]:
    if any("wi_0" in name for name in asked.checkpoint.tensors):
        yield "has no gated experts"
    for stack, mixture in asked.mixtures.items():
        if mixture.top_k != 1 or mixture.normalized:
            yield "sends a token to one expert, weighted by its probability (--top-k 1 --combine raw)"
        if switch_step(mixture) is None:
            yield f"can make only every so many layers of the {stack} sparse, from layer 1 on"


def _nllb(asked: Asked) -> dict[str, object]:
    return {
        **_steps(asked, nllb_step),
        "num_experts": next(iter(asked.mixtures.values())).experts,
        "expert_capacity": 64,
        "moe_eval_capacity_token_fraction": 1.0,
        "moe_token_dropout": 0.0,
        "normalize_router_prob_before_dropping": False,
        "batch_prioritized_routing": False,
        "second_expert_policy": "all",
        "router_bias": False,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "output_router_logits": False,
    }


def _nllb_objections(asked: Asked) -> Iterator[str]:
    for stack, mixture in asked.mixtures.items():
        if mixture.top_k != 2:
            yield "sends a token to two experts (--top-k 2)"
        if nllb_step(mixture) is None:
            yield f"can make only every so many layers of the {stack} sparse, the last one of each"


def _nllb_name(name: str) -> str:
    for pattern, replacement in _NLLB_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _m2m_name(name: str) -> str:
    for pattern, replacement in _M2M_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _two_layers(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{role}.{kind}": f"{prefix}{name}.{kind}" for role, name in names.items() for kind in ("weight", "bias")}


_SWITCH_EXPERTS = _two_layers("experts.expert_{e}.", {"in": "wi", "out": "wo"})
_NLLB_BLOCK = Block("ffn", "router.classifier.weight", _two_layers("experts.expert_{e}.", {"in": "fc1", "out": "fc2"}))

SEQ2SEQ: tuple[Target, ...] = (
    Target(
        SWITCH,
        lambda _, task: f"SwitchTransformers{task}",
        ("t5",),
        Subset.ANY,  # which ones, `objections` says: it depends on the stack
        {
            "encoder": Block("layer.1.mlp", "router.classifier.weight", _SWITCH_EXPERTS),
            "decoder": Block("layer.2.mlp", "router.classifier.weight", _SWITCH_EXPERTS),
        },
        _switch,
        _switch_objections,
        tasks=("ForConditionalGeneration", "EncoderModel", "Model"),
        raw=True,
        preserving=False,
        automatic=False,
        rename=lambda name: name.replace(".DenseReluDense.", ".mlp."),
        rename_back=lambda name: name.replace(".mlp.", ".DenseReluDense."),
    ),
    Target(
        "nllb-moe",
        lambda _, task: f"NllbMoe{task}",
        ("m2m_100",),
        Subset.ANY,  # likewise
        {"encoder": _NLLB_BLOCK, "decoder": _NLLB_BLOCK},
        _nllb,
        _nllb_objections,
        tasks=("ForConditionalGeneration", "Model"),
        rename=_nllb_name,
        rename_back=_m2m_name,
        notes=(
            "transformers 5.23 runs experts 0 and 1 of an NLLB-MoE whichever the router chose: nothing is lost while "
            "all are alike, but training in it reaches these two only.",
        ),
    ),
)

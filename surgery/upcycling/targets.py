"""The formats of mixtures that a dense checkpoint can become, as data: names, config fields, and what each can express.

Names are those of the Hub's files, one tensor to an expert: transformers 5 stacks them on loading and writes them back.
Source: transformers 5.23, modelling and configuration files of each; the tests load every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from surgery.checkpoint import Checkpoint
from surgery.upcycling.mlps import DOWN, GATE, UP

Config = Mapping[str, object]
# The value of a field that the new config must not have.
ABSENT = object()


class Subset(Enum):
    """Which sets of layers a format can make sparse."""

    ALL = "all layers"
    ANY = "any layers"
    SUFFIX = "the last layers"
    RANGE = "layers in one piece or at one interval"


@dataclass(frozen=True)
class Mixture:
    """What each chosen MLP of one stack becomes.

    Attributes:
        layers: zero-based, of `depth`.
        experts: routed experts, small ones where `groups` is more than 1.
        top_k: experts to a token, or None under expert choice.
        capacity: the paper's C under expert choice, else None.
        normalized: whether a token's weights sum to one.
        groups: small experts to one copy of the MLP.
        inner: the intermediate size of the dense MLP.
        shared: whether a silent shared expert is asked for.
        group: the tokens that compete under expert choice.
    """

    layers: tuple[int, ...]
    depth: int
    experts: int
    top_k: int | None
    capacity: float | None
    normalized: bool
    groups: int
    inner: int
    shared: bool
    group: str = "sequence"

    @property
    def expert_inner(self) -> int:
        return self.inner // self.groups

    @property
    def all_layers(self) -> bool:
        return len(self.layers) == self.depth

    @property
    def is_suffix(self) -> bool:
        return self.layers == tuple(range(self.depth - len(self.layers), self.depth))

    @property
    def interval(self) -> tuple[int, int, int] | None:
        """First layer, last layer and step, where the layers are so many multiples of the step apart: Ernie's rule."""
        first, last = self.layers[0], self.layers[-1]
        for step in range(1, self.depth + 1):
            if self.layers == tuple(n for n in range(first, last + 1) if (n + 1) % step == 0):
                return first, last, step
        return None


@dataclass(frozen=True)
class Asked:
    """A dense model, its full config, and what is to be made of one stack of it."""

    checkpoint: Checkpoint
    config: Config
    mixture: Mixture


@dataclass(frozen=True)
class SharedExpert:
    """An expert that sees every token, beside the routed ones.

    Attributes:
        block: its path in the sparse block.
        gate: the matrix (1, hidden) whose sigmoid scales it, if there is one.
        required: whether every consumer looks for it, asked for or not.
        size: its intermediate size where it is only there because it has to be; the dense MLP's otherwise.
    """

    block: str
    gate: str = ""
    required: bool = False
    size: Callable[[Mixture], int] = lambda mixture: mixture.expert_inner


@dataclass(frozen=True)
class Target:
    """One format.

    Attributes:
        name: its `model_type`.
        prefix: of its classes: `Mixtral` for `MixtralForCausalLM`.
        sources: dense model types that it can carry.
        subset: which layers can be sparse.
        tasks: the classes it has, by their ending; a file of another task is refused.
        configure: the fields of `config.json` that differ from the dense config's.
        objections: what it cannot express of a checkpoint; a sentence's end for each, after "{target} ".
        block: the sparse block's name in its layer, in place of the dense `mlp`.
        router: the router's weight in the block.
        experts: the dense MLP's parameters to an expert's, with `{e}` for its number; stacked ones have none.
        stacks: where all experts share one tensor: its name in the block, and the dense parameters stacked in it.
        corrections: names in the block and shapes of what balances loads without a loss; zeros, in float32.
        shared: its shared expert, if it has one.
        raw: whether its weights can be the router's probabilities as they are.
        float32_router: whether the router is stored in float32 whatever the others are.
        preserving: whether normalised top-k keeps the dense function.
    """

    name: str
    prefix: str
    sources: tuple[str, ...]
    subset: Subset
    configure: Callable[[Asked], dict[str, object]]
    objections: Callable[[Asked], Iterator[str]]
    tasks: tuple[str, ...] = ("ForCausalLM", "Model")
    block: str = "mlp"
    router: str = "gate.weight"
    experts: Mapping[str, str] | None = None
    stacks: Mapping[str, tuple[str, ...]] | None = None
    corrections: tuple[tuple[str, Callable[[int], tuple[int, ...]]], ...] = ()
    shared: SharedExpert | None = None
    raw: bool = False
    float32_router: bool = False
    preserving: bool = True


_HUB_EXPERTS = {leaf: f"experts.{{e}}.{leaf}" for leaf in (GATE, UP, DOWN)}
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


# In the order in which `--target auto` tries them.
TARGETS: tuple[Target, ...] = (
    Target(
        "mixtral",
        "Mixtral",
        ("llama", "mistral"),
        Subset.ALL,
        _mixtral,
        tasks=_ALL_TASKS,
        objections=_no_attention_bias,
        block="block_sparse_moe",
        experts=_MIXTRAL_EXPERTS,
    ),
    Target(
        "glm4_moe",
        "Glm4Moe",
        ("llama", "mistral"),
        Subset.SUFFIX,
        _glm4_moe,
        objections=_glm_objections,
        experts=_HUB_EXPERTS,
        corrections=(("gate.e_score_correction_bias", lambda experts: (experts,)),),
        shared=SharedExpert("shared_experts", required=True),
    ),
    Target(
        "qwen2_moe",
        "Qwen2Moe",
        ("qwen2", "llama", "mistral"),
        Subset.ANY,
        _qwen2_moe,
        tasks=_ALL_TASKS,
        objections=_qwen2_objections,
        experts=_HUB_EXPERTS,
        shared=SharedExpert("shared_expert", "shared_expert_gate.weight", required=True, size=_least_shared),
        raw=True,
    ),
    Target(
        "qwen3_moe",
        "Qwen3Moe",
        ("qwen3",),
        Subset.ANY,
        _qwen3_moe,
        tasks=_ALL_TASKS,
        objections=_one_window,
        experts=_HUB_EXPERTS,
        raw=True,
    ),
    Target(
        "flex_olmo",
        "FlexOlmo",
        ("olmo2",),
        Subset.ALL,
        _flex_olmo,
        objections=_no_mlp_bias,
        experts=_HUB_EXPERTS,
        raw=True,
    ),
    Target(
        "granitemoe",
        "GraniteMoe",
        ("granite",),
        Subset.ALL,
        _granitemoe,
        objections=_no_mlp_bias,
        block="block_sparse_moe",
        router="router.layer.weight",
        stacks={"input_linear.weight": (GATE, UP), "output_linear.weight": (DOWN,)},
    ),
    Target(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        ("ernie4_5",),
        Subset.RANGE,
        _ernie,
        objections=_no_mlp_bias,
        experts=_HUB_EXPERTS,
        corrections=(("moe_statics.e_score_correction_bias", lambda experts: (1, experts)),),
        shared=SharedExpert("shared_experts"),
        float32_router=True,
    ),
    Target(
        "hunyuan_v1_moe",
        "HunYuanMoEV1",
        ("hunyuan_v1_dense",),
        Subset.ALL,
        _hunyuan,
        tasks=("ForCausalLM", "ForSequenceClassification", "Model"),
        objections=_no_mlp_bias,
        router="gate.wg.weight",
        experts=_HUB_EXPERTS,
        shared=SharedExpert("shared_mlp", required=True),
    ),
)
BY_NAME = {target.name: target for target in TARGETS}


def fits_layers(target: Target, mixture: Mixture) -> bool:
    """Whether the chosen layers are a set that the format can express."""
    if target.subset is Subset.ALL:
        return mixture.all_layers
    if target.subset is Subset.SUFFIX:
        return mixture.is_suffix
    return target.subset is Subset.ANY or mixture.interval is not None

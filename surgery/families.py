"""Architectures as data: what transformers 5 calls in memory what a checkpoint stores under another name.

Nothing here is needed to read, extract or merge: that works on any checkpoint by stored names and shapes. The tables
add the words that people use for parts of a model (`attention`, `mlp`), the module names under which PEFT will look for
an adapter, and where a weight is stored transposed or split by expert.
Source: transformers 5.23, `conversion_mapping.py` and the modelling files; a test compares it with the real thing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Rename = tuple[re.Pattern[str], str]


def _renames(*pairs: tuple[str, str]) -> tuple[Rename, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


@dataclass(frozen=True)
class ExpertNames:
    """Experts stored one by one that live in memory as one stack.

    Attributes:
        pattern: matches a stored parameter; groups `module` (up to the expert's number), `expert` and `projection`.
        fused: in-memory parameter to the stored projections whose rows it stacks, in order.
    """

    pattern: re.Pattern[str]
    fused: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Family:
    """What is particular about some model types.

    Attributes:
        model_types: values of `model_type` in the config.
        base_prefix: where a task model keeps its base model; files saved from the base class come without it.
        renames: applied in order to a stored name, these give the in-memory name.
        experts: how stored experts are stacked in memory, if they are.
        routers: in-memory modules that hold a router as a bare parameter and not as a linear layer (full match).
        taken_for_experts: last parts of names that PEFT takes for projections of transformers 4's experts wherever
            they are in the model; what is called so and is none is targeted as a parameter.
        transposed: stored two-dimensional weights that are (in, out), as transformers' Conv1D has them (full match).
        transposed_stacks: whether stored three-dimensional experts are (expert, in, out).
    """

    model_types: tuple[str, ...]
    base_prefix: str = ""
    renames: tuple[Rename, ...] = ()
    experts: ExpertNames | None = None
    routers: re.Pattern[str] | None = None
    taken_for_experts: frozenset[str] = frozenset()
    transposed: re.Pattern[str] | None = None
    transposed_stacks: bool = False

    def in_memory(self, stored: str) -> str:
        """The in-memory name of a stored parameter, before experts are stacked."""
        for pattern, replacement in self.renames:
            stored = pattern.sub(replacement, stored)
        return stored


_MIXTRAL_EXPERTS = ExpertNames(
    re.compile(r"(?P<module>.*\.experts)\.(?P<expert>\d+)\.(?P<projection>w[123])\.weight"),
    (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))),
)
_GATED_EXPERTS = ExpertNames(
    re.compile(r"(?P<module>.*\.experts)\.(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj)\.weight"),
    (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))),
)
# peft 0.21.2, utils/transformers_weight_conversion.py: _MOE_TARGET_MODULE_MAPPING, without the router.
_GATED = frozenset({"gate_proj", "up_proj", "down_proj"})
_VIT_RENAMES = (
    (r"\bencoder\.layer\.", "layers."),
    (r"\battention\.attention\.query\b", "attention.q_proj"),
    (r"\battention\.attention\.key\b", "attention.k_proj"),
    (r"\battention\.attention\.value\b", "attention.v_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
_DINO_RENAMES = (*_VIT_RENAMES[1:4], (r"\battention\.output\.dense\b", "attention.o_proj"))
CONV1D = re.compile(r"(.*\.)?h\.\d+\..*\b(c_attn|c_proj|c_fc|q_attn)\.weight")

FAMILIES: tuple[Family, ...] = (
    Family(
        (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "opt", "olmo"),
            *("olmo2", "granite", "smollm3", "stablelm", "starcoder2", "cohere", "bart", "mbart", "whisper"),
            "qwen3_5_text",
        ),
        "model",
    ),
    Family(("gpt2", "openai-gpt", "imagegpt"), "transformer", transposed=CONV1D),
    Family(("gpt_neox",), "gpt_neox", _renames((r"^embed_out\.", "lm_head."))),
    Family(("bert",), "bert"),
    Family(("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"), "roberta"),
    Family(("distilbert",), "distilbert"),
    Family(("electra",), "electra"),
    Family(("deberta", "deberta-v2"), "deberta"),
    Family(("bloom", "falcon", "gptj", "mpt", "gpt_neo", "codegen", "gpt_bigcode"), "transformer"),
    Family(("t5", "mt5", "umt5", "longt5"), "transformer"),
    Family(("vit", "vit_mae", "vit_msn"), "vit", _renames(*_VIT_RENAMES)),
    Family(("deit",), "deit", _renames(*_VIT_RENAMES)),
    Family(("vivit",), "vivit", _renames(*_VIT_RENAMES)),
    Family(("audio-spectrogram-transformer",), "audio_spectrogram_transformer", _renames(*_VIT_RENAMES)),
    Family(("dinov2",), "dinov2", _renames(*_DINO_RENAMES)),
    Family(
        ("mixtral", "minimax", "minimax_m2"),
        "model",
        renames=_renames((r"\.block_sparse_moe\.", ".mlp.")),
        experts=_MIXTRAL_EXPERTS,
        routers=re.compile(r".*\.mlp\.gate"),
    ),
    Family(
        ("phimoe",),
        "model",
        renames=_renames((r"\.block_sparse_moe\.", ".mlp."), (r"\.mlp\.gate\.weight", ".mlp.router.weight")),
        experts=_MIXTRAL_EXPERTS,
        routers=re.compile(r".*\.mlp\.router"),
    ),
    Family(("qwen2_moe",), "model", experts=_GATED_EXPERTS, routers=re.compile(r".*\.mlp\.gate")),
    Family(
        (
            *(
                "qwen3_moe",
                "qwen3_next",
                "olmoe",
                "flex_olmo",
                "deepseek_v2",
                "deepseek_v3",
                "deepseek_v32",
            ),
            *("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "dots1", "afmoe", "cohere2_moe", "hunyuan_v1_moe", "mellum"),
            *("longcat_flash", "solar_open"),
        ),
        "model",
        experts=_GATED_EXPERTS,
        routers=re.compile(r".*\.mlp\.gate"),
        taken_for_experts=_GATED,
    ),
    Family(
        ("ernie4_5_moe",),
        "model",
        renames=_renames((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics.")),
        experts=_GATED_EXPERTS,
        routers=re.compile(r".*\.mlp\.gate"),
        taken_for_experts=_GATED,
    ),
    Family(("jamba",), "model", experts=_GATED_EXPERTS),
    Family(("lfm2_moe",), "model", experts=_MIXTRAL_EXPERTS),
    Family(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        "model",
        renames=_renames(
            (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
            (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
            (r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),
        ),
        routers=re.compile(r".*\.block_sparse_moe\.router"),
    ),
    Family(("gpt_oss",), "model", routers=re.compile(r".*\.mlp\.router"), transposed_stacks=True),
)

_PLAIN = Family(())
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(model_type: str) -> Family:
    """The table row of a model type; a row without any particulars where there is none."""
    return _BY_TYPE.get(model_type, _PLAIN)


# The part a weight plays, told from its name alone. Words are matched against whole components of the module path,
# or parts of them joined by underscores: `self_attn`, `EncDecAttention`, `token_mixer_attention`.
_ATTENTION = re.compile(r"attn|attention|qkv|query_key_value", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn?|feed_?forward|denserelu|intermediate|output|experts?|moe|fc_?\d?|c_fc|dense\w*|lin_?\d?|w[123]",
    re.IGNORECASE,
)
_EMBEDDING = re.compile(
    r"embed(?!_out)|(^|_)(wte|wpe|emb)$|^shared$|relative_attention_bias|token_types?$", re.IGNORECASE
)
_HEAD = re.compile(
    r"lm_head|embed_out|score|classifier|pre_classifier|classification_head|qa_outputs|cls|head|proj_out|output|prediction\w*"
    r"|generator|logits?|unembed|cls_classifier|distillation_classifier|summary",
    re.IGNORECASE,
)
_NORM = re.compile(r"norm|(^|_)ln(_|$|\d)|rms", re.IGNORECASE)
_NUMBER = re.compile(r"\.\d+\.")

PARTS = ("embeddings", "attention", "mlp", "experts", "router", "norms", "biases", "convolutions", "head", "other")


def part_of(name: str, shape: Sequence[int], vocabulary: int | None = None) -> str:
    """Which part of a model a parameter belongs to, one of `PARTS`, by its in-memory name and shape.

    `vocabulary` is the config's vocabulary size: a matrix outside the numbered layers that has it as a dimension is an
    embedding or a head even if its name says nothing.

    >>> part_of("model.layers.0.self_attn.q_proj.weight", (64, 64)), part_of("stem.lookup.weight", (512, 64), 512)
    ('attention', 'head')
    """
    module, _, parameter = name.rpartition(".")
    path = module.split(".")
    if parameter == "bias" or parameter.endswith("_bias"):
        return "biases"
    if len(shape) < 2:
        return "norms" if _some(_NORM, path) else "other"
    if len(shape) <= 3 and _some(_EMBEDDING, path) and not _whole(_HEAD, path):
        return "embeddings"
    if len(shape) >= 3 and "expert" not in module and "moe" not in module:
        return "convolutions"
    if not _NUMBER.search(f".{module}.") and (_whole(_HEAD, path) or vocabulary in shape):
        return "head"
    if path[-1] in ("router", "gate") and not _some(_ATTENTION, path):
        return "router"
    if "experts" in path or len(shape) == 3:
        return "experts"
    if _some(_ATTENTION, path):
        return "attention"
    return "mlp" if _whole(_MLP, path) or any("mlp" in word.lower() for word in path) else "other"


def _some(words: re.Pattern[str], path: Sequence[str]) -> bool:
    """Whether any component of a module path contains one of the words."""
    return any(words.search(component) for component in path)


def _whole(words: re.Pattern[str], path: Sequence[str]) -> bool:
    """Whether any component of a module path is one of the words."""
    return any(words.fullmatch(component) for component in path)

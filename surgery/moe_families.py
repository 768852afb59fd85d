"""Which MLPs of a dense architecture can become mixtures, and what the result is called. Data only.

The runtime half is `moe/modeling_upcycled.py`, which is copied into the checkpoint; a test holds the two together.
It lies outside `surgery.moe` because importing that imports transformers.
Source: transformers 5.23, the modelling files and `modeling_auto.py`; a test compares with both.

A stored mixture looks like this, where `<layer>` is the stored name of the transformer layer:

    <layer>.<mixture>.router.weight                 [E, H]    row e scores expert e
    <layer>.<mixture>.experts.<e>.<leaf>.weight     as the dense weight of that leaf, `.bias` likewise

and the dense tensors `<layer>.<dense leaf>.*` are gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MODELING_FILE = "modeling_upcycled.py"
# Routers and low-rank factors, in a folder of routed LoRA experts.
ROUTED_LORA_FILE = "routed_lora.safetensors"
# Put before the dense family's names: `upcycled_gpt2`, `UpcycledGPT2Config`, `UpcycledGPT2LMHeadModel`.
MODEL_TYPE_PREFIX = "upcycled_"
CLASS_PREFIX = "Upcycled"


@dataclass(frozen=True)
class Leaf:
    """One linear map of a dense MLP.

    Attributes:
        dense: stored module name below the layer, without `.weight` and `.bias`.
        expert: module name below the expert.
        role: `in` and `out` for two-layer MLPs; `gate`, `up` and `down` for gated ones.
        transposed: stored as (in, out), as transformers' Conv1D has it.
    """

    dense: str
    expert: str
    role: str
    transposed: bool = False


@dataclass(frozen=True)
class Stack:
    """A stack of transformer layers and the MLP in each.

    Attributes:
        layer: stored name of layer `{layer}` (zero-based), below the base model.
        mixture: where the mixture stands, below the layer.
        leaves: what an MLP may consist of; those that a checkpoint stores are the ones it has.
        depth: name in the config of the number of layers.
        causal: whether tokens see only those before them, so that expert choice would see the future.
    """

    layer: str
    mixture: str
    leaves: tuple[Leaf, ...]
    depth: str = "num_hidden_layers"
    causal: bool = True


@dataclass(frozen=True)
class UpcycledFamily:
    """How a dense model type becomes a mixture that ships its own modelling code.

    Attributes:
        model_type: of the dense config.
        config_class: of the dense config.
        base_prefix: what stored names begin with in a checkpoint of a task model; one of the bare base model (and
            openai-community/gpt2) has none.
        stacks: `encoder`, `decoder` or both.
        auto_classes: transformers' auto class to the dense class that it makes.
        prefixes: of dense classes in which in-memory names begin otherwise than with `base_prefix`.
    """

    model_type: str
    config_class: str
    base_prefix: str
    stacks: dict[str, Stack]
    auto_classes: dict[str, str] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)

    @property
    def upcycled_type(self) -> str:
        """`model_type` of the upcycled config."""
        return MODEL_TYPE_PREFIX + self.model_type

    @property
    def takes_lora(self) -> bool:
        """Whether routed LoRA experts can stand here: not where an MLP is spread over two modules."""
        return not any("." in leaf.expert for stack in self.stacks.values() for leaf in stack.leaves)

    def prefix_of(self, architecture: str) -> str:
        """What in-memory names of the base model begin with in a dense class; nothing in the base model itself."""
        bare = architecture in ("", self.auto_classes["AutoModel"])
        prefix = "" if bare else self.prefixes.get(architecture, self.base_prefix)
        return f"{prefix}." if prefix else ""

    def auto_map(self) -> dict[str, str]:
        """`auto_map` of the upcycled config: every auto class that the dense family has."""
        module = MODELING_FILE.removesuffix(".py")
        classes = {"AutoConfig": self.config_class, **self.auto_classes}
        return {auto: f"{module}.{CLASS_PREFIX}{name}" for auto, name in classes.items()}


def _leaves(module: str, roles: dict[str, str], transposed: bool = False) -> tuple[Leaf, ...]:
    return tuple(Leaf(f"{module}.{name}", name, role, transposed) for name, role in roles.items())


_GATED = _leaves("mlp", {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"})
_LLAMA_LIKE = Stack("layers.{layer}", "mlp", _GATED)
_BERT_LIKE = Stack(
    "encoder.layer.{layer}",
    "intermediate",
    (Leaf("intermediate.dense", "intermediate.dense", "in"), Leaf("output.dense", "output.dense", "out")),
    causal=False,
)


def _t5(stack: str, depth: str, sublayer: int, causal: bool) -> Stack:
    # relu T5 has wi, the gated ones (T5 1.1, FLAN-T5) wi_0 and wi_1.
    module = f"layer.{sublayer}.DenseReluDense"
    roles = {"wi": "in", "wi_0": "gate", "wi_1": "up", "wo": "out"}
    return Stack(f"{stack}.block.{{layer}}", module, _leaves(module, roles), depth, causal)


def _heads(name: str, *tasks: str, base: str = "Model", causal_lm: str = "ForCausalLM") -> dict[str, str]:
    heads = {f"AutoModelFor{task}": f"{name}For{task}" for task in tasks}
    return {"AutoModel": name + base, **({"AutoModelForCausalLM": name + causal_lm} if causal_lm else {}), **heads}


_TEXT = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
_ENCODER = (*_TEXT, "MaskedLM", "MultipleChoice")

_ALL = (
    UpcycledFamily(
        "vit",
        "ViTConfig",
        "vit",
        # transformers 5 renames `encoder.layer` to `layers` on loading and back on saving; the experts' own names stay.
        {
            "encoder": Stack(
                "encoder.layer.{layer}",
                "mlp",
                (Leaf("intermediate.dense", "fc1", "in"), Leaf("output.dense", "fc2", "out")),
                causal=False,
            )
        },
        _heads("ViT", "ImageClassification", "MaskedImageModeling", causal_lm=""),
    ),
    UpcycledFamily(
        "t5",
        "T5Config",
        "transformer",  # only token and sequence classification have it
        {
            "encoder": _t5("encoder", "num_layers", 1, causal=False),
            "decoder": _t5("decoder", "num_decoder_layers", 2, causal=True),
        },
        {
            **_heads("T5", *_TEXT, causal_lm=""),
            "AutoModelForSeq2SeqLM": "T5ForConditionalGeneration",
            "AutoModelForPreTraining": "T5ForConditionalGeneration",
            "AutoModelForTextEncoding": "T5EncoderModel",
        },
        dict.fromkeys(("T5ForConditionalGeneration", "T5ForQuestionAnswering", "T5EncoderModel"), ""),
    ),
    UpcycledFamily(
        "gpt2",
        "GPT2Config",
        "transformer",
        {
            "decoder": Stack(
                "h.{layer}", "mlp", _leaves("mlp", {"c_fc": "in", "c_proj": "out"}, transposed=True), depth="n_layer"
            )
        },
        {**_heads("GPT2", *_TEXT, causal_lm="LMHeadModel"), "AutoModelForPreTraining": "GPT2LMHeadModel"},
    ),
    UpcycledFamily(
        "gpt_neox",
        "GPTNeoXConfig",
        "gpt_neox",
        {"decoder": Stack("layers.{layer}", "mlp", _leaves("mlp", {"dense_h_to_4h": "in", "dense_4h_to_h": "out"}))},
        _heads("GPTNeoX", *_TEXT),
    ),
    UpcycledFamily(
        "phi",
        "PhiConfig",
        "model",
        {"decoder": Stack("layers.{layer}", "mlp", _leaves("mlp", {"fc1": "in", "fc2": "out"}))},
        _heads("Phi", "SequenceClassification", "TokenClassification"),
    ),
    UpcycledFamily(
        "bert",
        "BertConfig",
        "bert",
        {"encoder": _BERT_LIKE},
        {
            **_heads("Bert", *_ENCODER, "NextSentencePrediction", "PreTraining", causal_lm="LMHeadModel"),
            "AutoModelForTextEncoding": "BertModel",
        },
    ),
    UpcycledFamily(
        "roberta",
        "RobertaConfig",
        "roberta",
        {"encoder": _BERT_LIKE},
        {
            **_heads("Roberta", *_ENCODER),
            "AutoModelForPreTraining": "RobertaForMaskedLM",
            "AutoModelForTextEncoding": "RobertaModel",
        },
    ),
    UpcycledFamily(
        "gemma3_text",
        "Gemma3TextConfig",
        "model",
        {"decoder": _LLAMA_LIKE},
        {
            "AutoModel": "Gemma3TextModel",
            "AutoModelForCausalLM": "Gemma3ForCausalLM",
            "AutoModelForSequenceClassification": "Gemma3TextForSequenceClassification",
        },
    ),
    *(
        UpcycledFamily(
            model_type,
            f"{name}Config",
            "model",
            {"decoder": _LLAMA_LIKE},
            _heads(name, *tasks),
            {f"{name}ForQuestionAnswering": "transformer"} if name in ("Llama", "Qwen2", "Qwen3") else {},
        )
        for model_type, name, tasks in (
            ("gemma", "Gemma", _TEXT[:2]),
            ("gemma2", "Gemma2", _TEXT[:2]),
            ("llama", "Llama", _TEXT),
            ("mistral", "Mistral", _TEXT),
            ("qwen2", "Qwen2", _TEXT),
            ("qwen3", "Qwen3", _TEXT),
        )
    ),
)
UPCYCLED_FAMILIES: dict[str, UpcycledFamily] = {family.model_type: family for family in _ALL}

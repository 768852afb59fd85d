"""An adapter as PEFT stores it: keys, shapes and config of what we write.

The profile is the one that PEFT, vLLM and llama.cpp read alike: one `lora_alpha`, no `alpha_pattern`, no rsLoRA flag,
the scale folded into B; mixed ranks as a `rank_pattern` of full names.
Source: peft 0.21 (`tuners/lora/config.py`, `utils/save_and_load.py`, `tuners/lora/layer.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.families import family_of
from surgery.names import natural_key, split_parameter
from surgery.sites import Kind, Site

PREFIX = "base_model.model."

_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)
# PEFT looks for the weights of these heads in every adapter of the task, and fails where they are absent.
_TASKS_WITH_HEAD = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}
_HEADS = ("classifier", "score", "qa_outputs")


@dataclass(frozen=True)
class Residual:
    """What an adapter holds beside factors.

    Attributes:
        tensors: key after `base_model.model.` to the stored tensor.
        modules_to_save: modules that PEFT replaces whole.
        bias: the config's `bias`: `none`, `lora_only` or `all`.
        refused: parameters that no adapter can hold, with the reason.
    """

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    refused: Mapping[str, str] = field(default_factory=dict)


def carry_residual(
    changed: Collection[str],
    parameters: Mapping[str, StoredTensor],
    factored: Collection[str],
    plain: Collection[str],
) -> Residual:
    """Decide how PEFT can hold each changed parameter.

    A parameter stored under its own key is loaded straight into the base model, where tied weights follow; PEFT itself
    stores resized embeddings so. Everything else that is not a bias becomes a module to save.

    Args:
        changed: in-memory names of the parameters to hold.
        parameters: every parameter of the tuned checkpoint by in-memory name.
        factored: modules that have factors.
        plain: names that must be stored under their own key: tied embeddings, and grown vocabularies.
    """
    modules = {split_parameter(name)[0] for name in parameters} | set(factored)
    tensors: dict[str, StoredTensor] = {}
    whole: set[str] = set()
    refused: dict[str, str] = {}
    bias = "none"
    for name in changed:
        module, parameter = split_parameter(name)
        tensor = parameters.get(name)
        if tensor is None or tensor.is_slice:
            refused[name] = "experts, which no module to save can name"
        elif not tensor.dtype.floating:
            refused[name] = "not a weight"
        elif parameter == "bias" and module in factored:
            tensors[f"{module}.base_layer.bias"] = tensor
            bias = "lora_only" if bias == "none" else bias
        elif parameter == "bias" and len(_shape(parameters, f"{module}.weight")) > 1:
            tensors[name] = tensor
            bias = "all"
        elif name in plain or parameter not in ("weight", "bias") or _is_ambiguous(module, modules):
            tensors[name] = tensor
        else:
            whole.add(_head_of(module))
    for module in whole:  # PEFT wants every parameter of a module that it replaces
        tensors |= {name: tensor for name, tensor in parameters.items() if name.startswith(f"{module}.")}
    return Residual(tensors, tuple(sorted(whole, key=natural_key)), bias, refused)


def _shape(parameters: Mapping[str, StoredTensor], name: str) -> tuple[int, ...]:
    return parameters[name].shape if name in parameters else ()


def _head_of(module: str) -> str:
    """The module to save for a part of a model: itself, or for a layer within a task's head the whole head.

    PEFT adds the heads of a task to `modules_to_save` on its own, and a module cannot be saved within another.
    """
    first = module.split(".")[0]
    return first if first in _HEADS else module


def _is_ambiguous(module: str, modules: Collection[str]) -> bool:
    """Whether PEFT, which matches `modules_to_save` by the end of a name, would take other modules for this one."""
    return not module or any(other.endswith(module) and other != module for other in modules if other not in _HEADS)


def factor_keys(sites: Iterable[Site]) -> dict[str, tuple[str, str]]:
    """The keys of A and B for each site that has factors, by the site's name.

    PEFT nests the wrappers of several parameters of one module: the first is innermost and is stored below
    `base_layer`. The order is that of `gate_up_proj` before `down_proj`.
    """
    sites = list(sites)
    parameters: dict[str, list[str]] = {}
    for site in sites:
        if site.kind is Kind.PARAMETER:
            parameters.setdefault(site.module, []).append(site.name)
    keys = {}
    for site in sites:
        inner = ""
        if site.kind is Kind.PARAMETER:
            order = sorted(parameters[site.module], key=nesting_key)
            inner = ".base_layer" * (len(order) - 1 - order.index(site.name))
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if site.kind is Kind.EMBEDDING
            else ("lora_A.weight", "lora_B.weight")
        )
        a, b = (f"{PREFIX}{site.module}{inner}.{name}" for name in names)
        keys[site.name] = (a, b)
    return keys


def nesting_key(parameter: str) -> tuple[int, str]:
    """Sorts the parameters of one module in the order in which transformers registers them, innermost wrapper first."""
    last = parameter.rpartition(".")[2]
    order = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    return (order.index(last) if last in order else len(order), parameter)


def adapter_config(
    ranks: Mapping[str, int],
    sites: Mapping[str, Site],
    modules: Collection[str],
    alpha: int,
    residual: Residual,
    checkpoint: Checkpoint,
    base_name: str,
) -> dict[str, object]:
    """The contents of `adapter_config.json`.

    Args:
        ranks: rank of each site that has factors; its B was divided by alpha / rank.
        sites: those sites, by name.
        modules: every in-memory module of the model, to find out which suffixes are unambiguous.
        alpha: the one `lora_alpha`; also the default rank.
        residual: what is stored whole.
        checkpoint: the tuned checkpoint, for its task.
        base_name: `base_model_name_or_path`.
    """
    mistaken = family_of(checkpoint.model_type).taken_for_experts
    named = {name: _as_parameter(site, mistaken) for name, site in sites.items()}
    targets = [name for name, parameter in named.items() if parameter is None]
    parameters = [parameter for parameter in named.values() if parameter is not None]
    ranks = {named[name] or name: rank for name, rank in ranks.items()}
    fan_in_fan_out = any(piece.transposed for name in targets for matrix in sites[name].matrices for piece in matrix)
    return lora_config(
        alpha,
        ranks,
        base_name=base_name,
        bias=residual.bias,
        fan_in_fan_out=fan_in_fan_out,
        modules_to_save=list(residual.modules_to_save) or None,
        target_modules=shortest_targets(targets, modules),
        target_parameters=sorted(parameters, key=natural_key) or None,
        task_type=task_type(checkpoint, residual),
    )


def _as_parameter(site: Site, mistaken: Collection[str]) -> str | None:
    """The parameter under which PEFT finds a site; None for a module."""
    if site.kind is Kind.PARAMETER:
        return site.name
    last = site.name.rpartition(".")[2]
    return f"{site.name}.weight" if last in mistaken and site.part != "experts" else None


def lora_config(alpha: int, ranks: Mapping[str, int], base_name: str | None, **settings: object) -> dict[str, object]:
    """The profile's config: one alpha, which is the default rank too, and the ranks of modules that have another.

    `settings` take the place of the values that a plain LoRA without anything beside its factors has.
    """
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": alpha,
        "rank_pattern": {_pattern(name, ranks): rank for name, rank in sorted(ranks.items()) if rank != alpha},
        "revision": None,
        "target_modules": [],
        "target_parameters": None,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
        **settings,
    }


def _pattern(name: str, ranks: Collection[str]) -> str:
    """A key of `rank_pattern` that means one module: PEFT takes it for a regular expression for the end of a name."""
    plain = name if re.fullmatch(r"[\w.-]+", name) else re.escape(name)
    return f"^{plain}" if any(other.endswith(f".{name}") for other in ranks) else plain


def needs_head(task: object) -> bool:
    """Whether PEFT wants the head of a task in every adapter for it, and fails where it is absent."""
    return task in _TASKS_WITH_HEAD


def task_type(checkpoint: Checkpoint, residual: Residual) -> str | None:
    """PEFT's task for the checkpoint's class; none where PEFT would look for a head that the adapter does not hold."""
    if checkpoint.config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    task = next((task for ending, task in _TASKS if checkpoint.architecture.endswith(ending)), None)
    if task in _TASKS_WITH_HEAD:
        return task if any(module in _HEADS for module in residual.modules_to_save) else None
    return task


def shortest_targets(targets: Collection[str], modules: Collection[str]) -> list[str]:
    """The fewest, shortest names that select exactly `targets` among `modules`: `q_proj` where every `q_proj` is meant.

    A name selects a module that equals it or ends in a dot and the name, as PEFT matches lists.
    """
    others = set(modules) - set(targets)
    forbidden = {module.split(".", depth)[-1] for module in others for depth in range(module.count(".") + 1)}
    chosen = set()
    for target in targets:
        suffixes = [target.split(".", depth)[-1] for depth in range(target.count("."), -1, -1)]
        chosen.add(next((suffix for suffix in suffixes if suffix not in forbidden), target))
    return sorted(chosen, key=natural_key)

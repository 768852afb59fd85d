"""The parts of a model in memory, told by names and shapes as those of a stored one are: no table of classes.

d: hidden size
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from surgery.errors import OptionError, UnsupportedError
from surgery.families import family_of, part_of
from surgery.names import split_parameter
from surgery.sites import TARGETS, Kind, Site, select

if TYPE_CHECKING:
    from torch import nn


def name_of(model: Any) -> str:
    """What to call a model in an error."""
    return type(model).__name__


def hidden_size(model: Any) -> int:
    """d, of the text model in a multimodal one."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    size: int = config.hidden_size
    return size


def vocabulary(model: Any) -> int | None:
    """The size of the vocabulary, or None for a model of images."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return getattr(config, "vocab_size", None)


def parts(model: Any) -> dict[str, str]:
    """Every parameter's part, one of `families.PARTS`; biases are those of their own, wherever they lie."""
    words = vocabulary(model)
    return {name: part_of(name, parameter.shape, words) for name, parameter in model.named_parameters()}


def head_modules(model: Any) -> dict[str, nn.Module]:
    """The modules of a classifier that are not its base model; none for a language model."""
    if "Classification" not in name_of(model):
        return {}
    prefix = model.base_model_prefix
    return {name: child for name, child in model.named_children() if name != prefix and [*child.parameters()]}


def blocks(model: Any) -> dict[str, nn.Module]:
    """The layers of a transformer by name, in order: members of the outermost lists that hold attention."""
    from torch import nn

    found: dict[str, nn.Module] = {}
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    for name in outermost:
        for number, block in enumerate(model.get_submodule(name)):
            names = [parameter for parameter, _ in block.named_parameters()]
            if any(re.search(r"attn|attention|qkv", parameter, re.IGNORECASE) for parameter in names):
                found[f"{name}.{number}"] = block
    if not found:
        raise UnsupportedError(f"{name_of(model)} has no list of layers with attention, which this method looks for.")
    return found


def mixtures(model: Any) -> dict[str, nn.Module]:
    """Modules that have a child `experts`, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "experts")}


def router_parameters(model: Any) -> list[str]:
    """Every parameter of every router, biases too."""
    whole = parts(model)
    modules = {split_parameter(name)[0] for name, part in whole.items() if part == "router"}
    # Switch keeps a linear layer within the router; Llama-like gates are parameters of MLPs that no mixture holds.
    inside = [f"{name}." if name else "" for name in mixtures(model)]
    routers = re.compile(r"(^|\.)(router|gate)\.")
    return [
        name
        for name in whole
        if any(name.startswith(start) for start in inside)
        and ".experts." not in name
        and (split_parameter(name)[0] in modules or routers.search(name))
    ]


def expert_parameters(model: Any) -> list[str]:
    """Every parameter of every expert, biases too; shared experts are not counted among them."""
    return [name for name, _ in model.named_parameters() if ".experts." in f".{name}"]


def live_sites(model: Any) -> dict[str, Site]:
    """Every place of a model that LoRA can act on, as `sites.find_sites` has them, in the order of modules."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    words = vocabulary(model)
    heads = tuple(head_modules(model))
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found: dict[str, Site] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding | nn.Conv2d) and weight is not None:
            part = part_of(f"{name}.weight", weight.shape, words)
            if module is output or name.split(".")[0] in heads:
                part = "head"
            if isinstance(module, nn.Conv2d):
                out, kernel = weight.shape[0], tuple(weight.shape[2:])
                found[name] = Site(name, Kind.CONV, "convolutions", (), out, weight.numel() // out, kernel)
            else:
                out, wide = reversed(weight.shape) if isinstance(module, Conv1D) else weight.shape
                embedding = isinstance(module, nn.Embedding)
                kind, part = (Kind.EMBEDDING, "embeddings") if embedding else (Kind.LINEAR, part)
                found[name] = Site(name, kind, part, (), out, wide)
            continue
        for parameter, tensor in module.named_parameters(recurse=False):
            whole = f"{name}.{parameter}"
            part = part_of(whole, tensor.shape, words)
            if part in ("experts", "router") and tensor.ndim in (2, 3):
                out, wide = tensor.shape[-2:]
                if tensor.ndim == 3 and family_of(model.config.model_type).transposed_stacks:
                    out, wide = wide, out
                found[whole] = Site(whole, Kind.PARAMETER, part, (), out, wide)
    return found


def chosen_sites(model: Any, targets: str) -> dict[str, Site]:
    """The sites that `targets` names. Raises `OptionError` for an item that names none."""
    sites = live_sites(model)
    chosen, unmatched = select(sites, targets)
    if unmatched:
        raise OptionError(
            f"--targets {', '.join(unmatched)}: {name_of(model)} has no such layer; an item is {TARGETS}."
        )
    return chosen


def shortest_suffixes(chosen: list[str], others: list[str]) -> list[str]:
    """Ends of names, as short as may be, that mean all of `chosen` and none of `others`; whole components only.

    >>> shortest_suffixes(["h.0.attn.c_proj", "h.1.attn.c_proj"], ["h.0.mlp.c_proj"])
    ['attn.c_proj']
    """
    ends: dict[str, None] = {}
    for name in chosen:
        path = name.split(".")
        for length in range(1, len(path) + 1):
            end = ".".join(path[-length:])
            if not any(other == end or other.endswith(f".{end}") for other in others):
                break
        ends[end] = None
    # A longer end that a shorter one means already is not needed.
    return [end for end in ends if not any(end != other and end.endswith(f".{other}") for other in ends)]

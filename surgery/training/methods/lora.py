"""LoRA by PEFT: which modules and parameters, with what beside it, and saved so that every command here reads it.

A: (r, in), B: (out, r); for a stack of E experts (E r, in) and (out, r E)
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import OptionError, UnsupportedError
from surgery.names import split_parameter
from surgery.sites import Kind
from surgery.training.methods import anatomy
from surgery.training.methods.folders import save_peft
from surgery.training.methods.options import MethodOptions

if TYPE_CHECKING:
    import torch

    from surgery.training.methods.prepared import Save, State


def task_type(model: Any) -> str | None:
    """PEFT's name for a model's task, by its class; None for one that PEFT has no special wrapper for."""
    name = anatomy.name_of(model)
    if "ForSequenceClassification" in name:
        return "SEQ_CLS"
    if name.endswith("ForConditionalGeneration") and model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def add_lora(model: Any, options: MethodOptions, whole: list[str]) -> tuple[Any, Save]:
    """Wrap a model.

    Args:
        model: changed in place.
        options: see `MethodOptions`.
        whole: modules that are trained and stored whole.

    Returns:
        PEFT's model, and what saves its adapter.
    """
    from peft import LoraConfig, get_peft_model

    # For a classifier PEFT trains and stores the head, too, asked or not.
    task = None if anatomy.head_modules(model) and not options.head else task_type(model)
    config = LoraConfig(**_settings(model, options, whole), task_type=task)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    with known_warnings():
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    base = base_name(model, options)
    start = _factors(wrapped) if options.pissa and not on_meta else {}

    def save(folder: Path, _dtype: torch.dtype | None, state: State | None) -> None:
        save_peft(wrapped, folder, state, base, (lambda t, c: _without_changed_base(t, c, start)) if start else None)

    return wrapped, save


@contextlib.contextmanager
def known_warnings() -> Iterator[None]:
    """Without what PEFT warns of although it is meant (tied layers, Conv1D), and what it calls that will be renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\.")
        warnings.filterwarnings("ignore", category=FutureWarning, message=r".*gradient_checkpointing")
        yield


def base_name(model: Any, options: MethodOptions) -> str:
    """What the adapter calls its base: never a path of this machine."""
    if options.base_name is not None:
        return options.base_name
    return public_name(getattr(model, "name_or_path", "") or "")


def public_name(name: str) -> str:
    """A name, or of a path on this machine its last part."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _settings(model: Any, options: MethodOptions, whole: list[str]) -> dict[str, Any]:
    sites = anatomy.chosen_sites(model, options.targets or "all-linear")
    sites = {name: site for name, site in sites.items() if split_parameter(name)[0] not in whole and name not in whole}
    if not sites:
        raise UnsupportedError(f"--targets {options.targets}: everything it names is trained whole; leave one out.")
    parameters = [name for name, site in sites.items() if site.kind is Kind.PARAMETER]
    modules = [name for name in sites if name not in parameters]
    if parameters:
        for flag, given in (("--dropout", options.dropout), ("--dora", options.dora), ("--pissa", options.pissa)):
            if given:
                raise OptionError(
                    f"{flag} cannot be had for parameters such as {parameters[0]}, where experts or routers lie in one "
                    "tensor; leave it out, or choose other --targets, such as attention."
                )
    if options.pissa and any(site.kind is Kind.EMBEDDING for site in sites.values()):
        raise OptionError("--pissa acts on linear layers only; leave embeddings out of --targets.")
    names = [name for name, _ in model.named_modules() if name]
    alpha = options.lora_alpha
    settings: dict[str, Any] = {
        "r": options.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": anatomy.shortest_suffixes(modules, [name for name in names if name not in sites]),
        "lora_dropout": options.dropout,
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "init_lora_weights": "pissa" if options.pissa else True,
        "modules_to_save": whole or None,
    }
    if parameters:
        every = [name for name, _ in model.named_parameters()]
        others = [name for name in every if name not in parameters]
        settings["target_parameters"] = anatomy.shortest_suffixes(parameters, others)
    if whole and getattr(model.config, "tie_word_embeddings", False):
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        settings["ensure_weight_tying"] = any(model.get_submodule(name) in ends for name in whole)
    return settings


def _factors(wrapped: Any) -> dict[str, torch.Tensor]:
    """Copies of A and B as they are now."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items() if ".lora_" in name}


def _without_changed_base(
    tensors: dict[str, torch.Tensor], config: Any, start: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The adapter of twice the rank that does to the unchanged base what this one does to the changed base.

    PiSSA took s B0 A0 out of the weights when it began: W + s (B A - B0 A0) is a LoRA with [B, -B0] and [A; A0].
    """
    import torch

    made = dict(tensors)
    for name, first in start.items():
        now = tensors[name].detach().cpu()
        made[name] = torch.cat([now, first] if ".lora_A" in name else [now, -first], dim=0 if ".lora_A" in name else 1)
    # The scale stays: alpha/r, or alpha/sqrt(r).
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.init_lora_weights = True
    return made

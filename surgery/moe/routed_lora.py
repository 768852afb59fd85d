"""Routed LoRA experts in a small folder of their own: saved apart from their dense base, and loaded onto it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file

from surgery.moe import modeling_upcycled
from surgery.moe.modeling_upcycled import ROUTED_LORA_FILE, add_routed_lora, replace_mlps, routed_lora_tensors


def save_routed_lora(model: Any, folder: str | Path, base: str, revision: str | None = None) -> None:
    """Write the routers and low-rank updates of a model, and what it takes to load them, without the dense weights.

    Args:
        model: an upcycled model with mixtures of kind "lora".
        folder: made if it is not there.
        base: the dense checkpoint: a Hub id, or a folder relative to `folder`.
        revision: of the Hub id.
    """
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.base_model_name_or_path, config.base_model_revision = base, revision
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in routed_lora_tensors(model).items()}
    save_file(tensors, folder / ROUTED_LORA_FILE, {"format": "pt"})


def load_routed_lora(base: Any, folder: str | Path) -> Any:
    """Put stored routed LoRA experts onto a dense model.

    Args:
        base: a dense model in memory, which is changed in place; a checkpoint's folder or Hub id; None for the one that
            the folder names.
        folder: as `save_routed_lora` writes it.

    Returns:
        An upcycled model, whose MLPs are those of `base`, frozen.

    Raises:
        ValueError: the model in memory is of another class, or the tensors do not fit it.
    """
    folder = Path(folder)
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    upcycled = getattr(modeling_upcycled, config.architectures[0])
    if not isinstance(base, transformers.PreTrainedModel):
        if base is not None:
            where = Path(base).absolute() if Path(base).is_dir() else base
            config.base_model_name_or_path, config.base_model_revision = str(where), None
        return upcycled.from_pretrained(folder, config=config)
    if upcycled.__bases__ != (type(base),):
        wanted = upcycled.__bases__[0].__name__
        raise ValueError(f"The experts in {folder} belong to a {wanted}, and this model is a {type(base).__name__}.")
    config.base_model_name_or_path = config.base_model_revision = None
    base.__class__, base.config = upcycled, config
    replace_mlps(base)
    for mixture in modeling_upcycled.mixtures(base).values():
        own = ("router.", "experts.")
        mixture.to(next(frozen for name, frozen in mixture.named_parameters() if not name.startswith(own)).device)
    add_routed_lora(base, load_file(folder / ROUTED_LORA_FILE))
    return base.train(base.training)

"""Writing and reading what was trained, without its base: PEFT's folders, and our own for what PEFT does not have.

Our own folder holds `surgery_method.json` (the method and its settings) and `surgery_method.safetensors` (tensors under
the names that the parameters have in the model). LoRA with a prompt is LoRA's folder with the other one in `prompt/`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import FormatError, MismatchError, several

if TYPE_CHECKING:
    import torch

    from surgery.training.methods.prepared import State

SETTINGS = "surgery_method.json"
TENSORS = "surgery_method.safetensors"
PEFT_TENSORS = "adapter_model.safetensors"
FORMAT = 1
# Where the prompt of `lora+prompt` lies in LoRA's folder.
PROMPT_FOLDER = "prompt"


def save_checkpoint(model: Any, folder: Path, dtype: torch.dtype | None, state: State | None) -> None:
    """The whole model, as transformers stores it; in `dtype`, if one is given, which changes the model."""
    if dtype is not None:
        model.to(dtype)
        state = state and _converted(state, dtype)
    model.save_pretrained(folder, state_dict=None if state is None else dict(state))


def save_peft(
    model: Any,
    folder: Path,
    state: State | None,
    base_name: str,
    edit: Callable[[dict[str, torch.Tensor], Any], dict[str, torch.Tensor]] | None = None,
) -> None:
    """A PEFT adapter: its weights and `adapter_config.json`. No model card.

    Args:
        model: PEFT's.
        folder: exists.
        state: of `model`, or None to take it from there.
        base_name: for `base_model_name_or_path`.
        edit: changes the tensors and the config before they are written.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(
        model, state_dict=None if state is None else dict(state), save_embedding_layers=False
    )
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    config.inference_mode, config.base_model_name_or_path = True, base_name
    if edit is not None:
        tensors = edit(tensors, config)
    save_file(_plain(tensors), folder / PEFT_TENSORS, {"format": "pt"})
    for name, value in vars(config).items():
        if isinstance(value, set):  # whose order is another in each process
            setattr(config, name, sorted(value))
    config.save_pretrained(folder)


def save_own(
    parameters: Mapping[str, torch.Tensor], folder: Path, base_name: str, settings: Mapping[str, object]
) -> None:
    """Tensors by their names in the model, and what it takes to put them there."""
    from safetensors.torch import save_file

    save_file(_plain(parameters), folder / TENSORS, {"format": "pt"})
    content = {"format": FORMAT, "base_model_name_or_path": base_name, **settings}
    (folder / SETTINGS).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_own(folder: Path) -> dict[str, Any]:
    """The settings of our own folder. Raises `FormatError`."""
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON ({error}).") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("method"), str):
        raise FormatError(f"{path} is not a method of format {FORMAT}; another version of this program wrote it.")
    return found


def put_own(model: Any, folder: Path) -> set[str]:
    """Copy the tensors of our own folder into the parameters of their names; these. Raises `MismatchError`."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors, parameters = load_file(folder / TENSORS), dict(model.named_parameters())
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{folder / TENSORS} cannot be read ({error}).") from error
    problems = [f"{folder} has a tensor {name!r}, which the model lacks." for name in tensors if name not in parameters]
    problems += [
        f"{folder}: {name} has shape {tuple(tensor.shape)}, and {tuple(parameters[name].shape)} in the model."
        for name, tensor in tensors.items()
        if name in parameters and parameters[name].shape != tensor.shape
    ]
    if problems:
        raise MismatchError(several(f"{folder} on this model", problems), problems)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return set(tensors)


def _converted(state: State, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floats in another dtype; a tensor under several names (tied weights) stays one, and is written once."""
    made: dict[int, torch.Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in made:
            made[id(tensor)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {name: made[id(tensor)] for name, tensor in state.items()}


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU, in the order of names; none shares memory with another."""
    return {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}

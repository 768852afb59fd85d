"""What `apply_method` returns, and the groups of parameters that an optimiser is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

State = Mapping[str, "torch.Tensor"]
Save = Callable[[Path, "State | None"], None]

# Soft prompts are not weights: decaying them pulls towards a token that does not exist.
_UNDECAYED = re.compile(r"prompt|prefix|embed|\bwte\b|\bwpe\b|\bshared\b", re.IGNORECASE)


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained.

    Attributes:
        model: what to call and to train; for PEFT's methods a wrapper around the one that was given.
        method: as asked for, such as `top:2`.
        kind: what `save` writes: an "adapter", or a whole "checkpoint".
        groups: for an optimiser: each has `params`, `names`, `lr` (a factor on the learning rate), and `weight_decay`
            0 where there shall be none.
        trainable: how many numbers are trained; one that is shared counts once.
        learning_rate: to start from where none is given.
        adds_tokens: whether virtual tokens stand between those of the input, so that rows must not be packed.
    """

    model: Any
    method: str
    kind: str
    groups: list[dict[str, Any]] = field(repr=False)
    trainable: int
    learning_rate: float
    adds_tokens: bool = False
    _save: Save = field(default=lambda _folder, _state: None, repr=False, compare=False)

    def save(self, folder: str | Path, state: State | None = None) -> None:
        """Write what was trained.

        Args:
            folder: made if it is not there.
            state: the state dict of `model`, where it has been gathered from several devices.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        self._save(place, state)


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name; a shared one under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def own_name(name: str) -> str:
    """The name that a parameter had before PEFT wrapped its module, which is what a user's pattern means.

    >>> own_name("base_model.model.model.layers.0.mlp.gate.modules_to_save.default.weight")
    'model.layers.0.mlp.gate.weight'
    """
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".base_layer.", ".")


def parameter_groups(
    parameters: Mapping[str, torch.nn.Parameter], factors: Sequence[tuple[str, float]] = ()
) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay.

    Args:
        parameters: those that are trained, by name.
        factors: patterns searched in names, each with a factor on the learning rate; the first that fits counts.

    Returns:
        Groups in order of first appearance. Vectors (biases, norms), embeddings and soft prompts do not decay.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        factor = next((factor for pattern, factor in factors if re.search(pattern, own_name(name))), 1.0)
        decays = parameter.ndim >= 2 and not _UNDECAYED.search(name)
        group = groups.setdefault(
            (factor, decays), {"params": [], "names": [], "lr": factor, **({} if decays else {"weight_decay": 0.0})}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())

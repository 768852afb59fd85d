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
Save = Callable[[Path, "torch.dtype | None", "State | None"], None]

# Soft prompts are not weights: decaying them pulls towards a token that does not exist. Embeddings decay, as they do
# under transformers' Trainer.
_VIRTUAL = re.compile(r"(^|\.)(prompt|infix)$|\bprompt_encoder\b")


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    Attributes:
        params: trained.
        lr: at its highest.
        names: of `params`, in order.
        decays: whether weight decay is for them: not for vectors (biases, norms) and soft prompts.
    """

    params: Sequence[torch.nn.Parameter] = field(repr=False)
    lr: float
    names: Sequence[str] = field(default=(), repr=False)
    decays: bool = True


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained.

    Attributes:
        model: what to call and to train; for PEFT's methods a wrapper around the one that was given.
        method: as asked for, such as `top:2`.
        kind: what `save` writes: an "adapter", or a whole "checkpoint".
        groups: every trained parameter once, with its learning rate.
        trainable: how many numbers are trained; one that is shared counts once.
        adds_tokens: whether virtual tokens stand between those of the input, so that rows must not be packed.
        needs_labels: whether the model must be called with `labels` in training, to know where completions begin.
    """

    model: Any
    method: str
    kind: str
    groups: list[Group] = field(repr=False)
    trainable: int
    adds_tokens: bool = False
    needs_labels: bool = False
    _save: Save = field(default=lambda _folder, _dtype, _state: None, repr=False, compare=False)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None, state: State | None = None) -> None:
        """Write what was trained.

        Args:
            folder: made if it is not there.
            dtype: of a checkpoint's weights, if other than in memory. Adapters are stored as they were trained.
            state: the state dict of `model`, where it has been gathered from several devices.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        self._save(place, dtype, state)

    def optimizer_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The groups as torch's optimisers take them."""
        return [{"params": [*g.params], "lr": g.lr, "weight_decay": weight_decay * g.decays} for g in self.groups]


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
    parameters: Mapping[str, torch.nn.Parameter], rate: float, factors: Sequence[tuple[str, float]] = ()
) -> list[Group]:
    """Parameters by learning rate and weight decay, in order of first appearance.

    Args:
        parameters: those that are trained, by name.
        rate: the learning rate.
        factors: patterns searched in names, each with a factor on it; the first that fits counts.
    """
    found: dict[tuple[float, bool], list[str]] = {}
    for name, parameter in parameters.items():
        factor = next((factor for pattern, factor in factors if re.search(pattern, own_name(name))), 1.0)
        decays = parameter.ndim >= 2 and not _VIRTUAL.search(name)
        found.setdefault((factor, decays), []).append(name)
    return [
        Group([parameters[name] for name in names], rate * factor, tuple(names), decays)
        for (factor, decays), names in found.items()
    ]

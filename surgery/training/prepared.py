"""What a training method makes of a model, as the loop sees it. Full tuning is here; the others are in `methods`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from surgery.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from surgery.training.options import TrainOptions


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    params: Sequence[nn.Parameter]
    lr: float


class Prepared(Protocol):
    """A model that a method has made ready to train.

    The model is called with the batch as keywords, without labels, and gives `logits`; where a method puts positions of
    its own before the text, the loss is taken over the last ones, as many as there are labels.

    Attributes:
        model: what to call; its parameters that require gradients are exactly those in `groups`.
        groups: every trainable parameter once, with its learning rate.
        kind: what `save` writes: `checkpoint` or `adapter`.
    """

    model: Any
    groups: Sequence[Group]
    kind: str

    def save(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Write weights and config into an existing folder, in `dtype` if one is given."""
        ...


@dataclass
class FullTuning:
    """Every parameter of the model is trained; what is saved is a checkpoint."""

    model: Any
    groups: Sequence[Group]
    kind: str = "checkpoint"

    def save(self, folder: Path, dtype: torch.dtype | None) -> None:
        if dtype is not None:
            self.model.to(dtype)
        self.model.save_pretrained(folder)


def prepare(model: Any, options: TrainOptions) -> Prepared:
    """Apply the method that the options name.

    Raises:
        OptionError: no method of that name, or one that trains nothing on this model.
    """
    if options.method != "full":
        raise OptionError(f"--method is {options.method!r}, expected full.")
    # Routed LoRA experts come with the shared MLP frozen; what a model freezes of itself stays so.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return FullTuning(model, [Group(trained, options.rate)])

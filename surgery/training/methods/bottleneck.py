"""Bottleneck adapters: a narrow layer and back, beside a residual. PEFT has none.

AdapterH, Houlsby et al. 2019: two to a block, after the attention and after the MLP, before their residuals are added.
AdapterL, Lin et al. 2020: one to a block, after the MLP, with a LayerNorm of its own.

d: hidden size     r: bottleneck     parameters of one: 2 d r + r + d, and 2 d for a LayerNorm (Hu et al. 2021, 5.1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.errors import UnsupportedError
from surgery.families import part_of
from surgery.training.methods import anatomy

if TYPE_CHECKING:
    from surgery.sites import Site

# The child under which an adapter stands in the module whose output it changes.
CHILD = "surgery_adapter"


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))), or with `normed` x + up(gelu(down(LayerNorm(x)))). Starts as the identity."""

    def __init__(self, hidden: int, width: int, normed: bool, like: nn.Parameter, generator: torch.Generator) -> None:
        super().__init__()
        # What is trained has float32 at least, whatever the model has.
        place: dict[str, Any] = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        self.norm = nn.LayerNorm(hidden, **place) if normed else nn.Identity()
        self.down = nn.Linear(hidden, width, **place)
        self.up = nn.Linear(width, hidden, **place)
        with torch.no_grad():
            if not like.is_meta:
                # Drawn on the CPU, so that a seed means the same wherever the model is.
                self.down.weight.copy_(torch.randn(width, hidden, generator=generator) * hidden**-0.5)
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        change: Tensor = self.up(nn.functional.gelu(self.down(self.norm(x.to(self.down.weight.dtype)))))
        return x + change.to(x.dtype)


def add_bottlenecks(model: Any, rank: int, both: bool, seed: int) -> None:
    """Put adapters into every block: after attention and MLP (`both`), or after the MLP with a LayerNorm."""
    hidden = anatomy.hidden_size(model)
    generator = torch.Generator().manual_seed(seed)
    sites = anatomy.live_sites(model)
    for name in anatomy.blocks(model):
        for place in _places(model, name, hidden, sites)[0 if both else 1 :]:
            module = model.get_submodule(place)
            like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
            module.add_module(CHILD, Bottleneck(hidden, rank, not both, like, generator))
            module.register_forward_hook(_through_adapter)


def _through_adapter(module: Any, _inputs: Any, output: Any) -> Any:
    """A hook without state, so that the model can be copied and pickled."""
    adapter = module.get_submodule(CHILD)
    if isinstance(output, tuple):  # a mixture that returns its router's logits beside
        return adapter(output[0]), *output[1:]
    return adapter(output)


def _places(model: Any, block: str, hidden: int, sites: dict[str, Site]) -> tuple[str, str]:
    """The modules whose outputs are added to the residual stream: the attention's, and the MLP's.

    The last linear map of each back to d; for a mixture of experts the mixture. A decoder's attention over an encoder
    gets none: two to a block are what the paper has.
    """
    start = f"{block}."
    # Names within the block: `layer.1.` of a T5 block is no layer of the model.
    linear = [name for name, site in sites.items() if name.startswith(start) and site.out_features == hidden]
    mixtures = [name for name in anatomy.mixtures(model) if name.startswith(start)]
    found: dict[str, str] = {}
    for name in linear:
        if any(name.startswith(f"{mixture}.") for mixture in mixtures) or "crossattention" in name.lower():
            continue
        part = part_of(f"{name}.weight", (hidden, hidden))
        if part in ("attention", "mlp") and "EncDecAttention" not in name:
            found[part] = name
    if mixtures:
        found["mlp"] = mixtures[-1]
    if len(found) < 2:
        missing = "MLP" if "attention" in found else "attention"
        raise UnsupportedError(
            f"{anatomy.name_of(model)}: no layer of {block} could be told to be the last of its {missing}, where an "
            "adapter goes; use --method lora."
        )
    return found["attention"], found["mlp"]

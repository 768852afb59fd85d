"""Residual dropout that rises over the layers, as LIMA trains (Zhou et al., 2023, section 3)."""

from __future__ import annotations

from typing import Any

from surgery.errors import OptionError

# What a layer's parts are called whose outputs are added to the residual stream, in the families of transformers.
_PARTS = {"self_attn", "attn", "attention", "self_attention", "mlp", "block_sparse_moe", "feed_forward"}


def add_residual_dropout(model: Any, top: float) -> int:
    """Drop outputs of attention and MLP before they are added: none at the bottom layer, a share of `top` at the top.

    Returns:
        How many parts now drop.
    """
    from torch import nn
    from torch.nn import functional

    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    layers = next((stack for stack in stacks if any(name in _PARTS for name, _ in stack[0].named_children())), None)
    if layers is None:
        raise OptionError("--residual-dropout finds no layers with attention and MLP in this model.")

    def dropping(share: float) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            dropped = functional.dropout(first, share, module.training)
            return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

        return hook

    count = 0
    for number, layer in enumerate(layers):
        for name, part in layer.named_children():
            if name in _PARTS:
                part.register_forward_hook(dropping(top * number / (len(layers) - 1)))
                count += 1
    return count

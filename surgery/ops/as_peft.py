"""What PEFT's `add_weighted_adapter` makes of A and B, each for itself. Pure functions.

    s_t = weight * alpha / r of adapter t      A_t: (r, n)      B_t: (m, r), all of one rank

    linear           A = sum of sign(s_t) sqrt|s_t| A_t      B = sum of sqrt|s_t| B_t
    ties and others  the same, with each A_t and each B_t pruned, and signs elected, as `elementwise` does to dW

The product B A has cross terms B_t A_u and is not the weighted sum of the dW_t; that is how PEFT defines these. The
signs are elected before the weights are applied.
Source: peft 0.21, `tuners/lora/model.py` (`_generalized_task_arithmetic_weighted_adapter`), `utils/merge_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from surgery.ops.elementwise import ELECTING, RANDOM, Pruner, drop_at_random, find_cut

if TYPE_CHECKING:
    import torch


def combine_factors(
    products: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scales: Sequence[float],
    method: str,
    density: float,
    seed: Callable[[int, str], int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """B (m, r) and A (r, n) in float32.

    Args:
        products: (B, A) of each adapter, float32.
        scales: weight * alpha / r of each.
        method: `linear`, or one of `elementwise.METHODS`.
        density: share of the entries to keep.
        seed: of the random numbers for an adapter (by position) and a factor (`A` or `B`).
    """
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) if scale else root for root, scale in zip(roots, scales, strict=True)]
    Bs = [_prune(B, method, density, seed(number, "B")) for number, (B, _) in enumerate(products)]
    As = [_prune(A, method, density, seed(number, "A")) for number, (_, A) in enumerate(products)]
    return _merge(Bs, roots, method in ELECTING), _merge(As, signed, method in ELECTING)


def _prune(factor: torch.Tensor, method: str, density: float, seed: int) -> torch.Tensor:
    if method == "linear" or density >= 1:
        return factor
    if method in RANDOM:
        return drop_at_random(factor.clone(), density, seed)
    return Pruner(find_cut(lambda: [factor], int(density * factor.numel())))(factor.clone())


def _merge(pruned: Sequence[torch.Tensor], weights: Sequence[float], elect: bool) -> torch.Tensor:
    """In PEFT's order of operations, so that its bits come out."""
    import torch

    stacked = torch.stack(list(pruned))
    weighted = stacked * torch.tensor(weights, device=stacked.device).view(-1, 1, 1)
    if not elect:
        return weighted.sum(dim=0)
    winner = torch.where(stacked.sum(dim=0) >= 0, 1, -1)
    agrees = stacked.sign() == winner
    return (weighted * agrees).sum(dim=0) / torch.clamp(agrees.sum(dim=0), min=1.0)

"""Learning rates and the optimiser's groups."""

from __future__ import annotations

import math
from typing import Any

from surgery.errors import OptionError
from surgery.training.options import TrainOptions
from surgery.training.prepared import Prepared


def rate(step: int, steps: int, options: TrainOptions) -> float:
    """The learning rate of a step as a share of the highest; the first step is 0, as transformers counts.

    After a warm-up in a straight line from 0, `constant`, `linear`, or half a `cosine`, down to `final_rate`.
    """
    warm = warmup_steps(steps, options)
    if step < warm:
        return step / warm
    part = (step - warm) / max(1, steps - warm)
    shape = {"constant": 1.0, "linear": max(0.0, 1 - part), "cosine": max(0.0, 0.5 * (1 + math.cos(math.pi * part)))}
    return options.final_rate + (1 - options.final_rate) * shape[options.schedule]


def warmup_steps(steps: int, options: TrainOptions) -> int:
    """Steps of the warm-up: a number of them, or a share of all."""
    return math.ceil(options.warmup * steps) if options.warmup < 1 else int(options.warmup)


def optimizer_groups(prepared: Prepared, options: TrainOptions) -> tuple[list[dict[str, Any]], list[float]]:
    """The optimiser's groups, matrices with weight decay and vectors without, and the highest rate of each.

    Raises:
        OptionError: nothing is trained.
    """
    groups, peaks = [], []
    for group in prepared.groups:
        for decay, chosen in (
            (options.weight_decay, [p for p in group.params if p.dim() > 1]),
            (0.0, [p for p in group.params if p.dim() <= 1]),
        ):
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay})
                peaks.append(group.lr)
    if not groups:
        raise OptionError(f"--method {options.method} trains nothing on this model.")
    return groups, peaks


def make_optimizer(groups: list[dict[str, Any]], options: TrainOptions) -> Any:
    """AdamW with the options' settings; learning rates are set before each step."""
    import torch

    settings: dict[str, Any] = {"betas": (options.beta1, options.beta2), "eps": options.epsilon, "lr": 0.0}
    if options.optimizer == "adamw-8bit":
        import bitsandbytes  # type: ignore[import-not-found, unused-ignore]

        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)

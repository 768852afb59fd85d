"""Learning rates and the optimiser's groups."""

from __future__ import annotations

import math
from typing import Any

from surgery.training.options import TrainOptions


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


def make_optimizer(groups: list[dict[str, Any]], options: TrainOptions) -> Any:
    """AdamW with the options' settings; learning rates are set before each step."""
    import torch

    settings: dict[str, Any] = {"betas": (options.beta1, options.beta2), "eps": options.epsilon, "lr": 0.0}
    if options.optimizer == "adamw-8bit":
        import bitsandbytes  # type: ignore[import-not-found, unused-ignore]  # for GPUs only

        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)

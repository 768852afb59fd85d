"""What the report tells about an upcycled checkpoint before anybody trains it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from surgery.upcycling.experts import stream
from surgery.upcycling.mixture import Mixture
from surgery.upcycling.planning import Upcycling
from surgery.upcycling.report import ChoiceReport


def notes_on(work: Upcycling) -> tuple[str, ...]:
    """Sentences on gradients, expected drops, and what the paper would have chosen."""
    notes = [*work.target.notes]
    identical = work.options.expert_init.identical
    for stack, mixture in work.mixtures.items():
        where = f"of the {stack} " if len(work.mixtures) > 1 else ""
        notes += _on_routing(mixture, where, identical, work.options.expert_init.kind)
        if not mixture.normalized:
            notes.append(_on_raw_weights(work, mixture, where))
        notes += _on_layers(mixture, where)
    return tuple(dict.fromkeys(notes))


def _on_routing(mixture: Mixture, where: str, identical: bool, init: str) -> list[str]:
    found = []
    if mixture.top_k is not None and mixture.normalized:
        if mixture.top_k == mixture.groups:
            found.append(
                f"With one expert to a token and normalised weights, the weight {where}is always 1: the router never "
                "gets a gradient from the task. Choose --top-k 2, or --combine raw."
            )
        elif mixture.rank is None and identical:
            found.append(
                f"The experts {where}are identical and their weights sum to 1, so the router gets no gradient from the "
                "task at first: train with a load-balancing loss (router_aux_loss_coef), or start with --init noise:1%."
            )
    if mixture.rank is not None:
        router = "" if mixture.top_k == 1 and mixture.normalized else ", and the router none from experts all alike"
        found.append(
            f"Every B {where}is zero at first, so A gets no gradient in the first step{router}; that ends as soon as B "
            "has moved."
        )
    if init == "noise":
        found.append(
            "The experts differ from the MLP that they come from, so the mixture starts out a little worse than the "
            "dense model."
        )
    if init == "drop":
        found.append(
            "A share of each expert is drawn anew (Drop-Upcycling): the mixture starts out much worse than the dense "
            "model, and its authors found it better after long training."
        )
    if mixture.capacity is not None and mixture.capacity < mixture.experts:
        found.append(
            f"Expert choice {where}leaves some tokens to no expert; they pass the layer by its residual only, and "
            "fewer do with a larger --capacity (the paper takes 2)."
        )
    return found


def _on_raw_weights(work: Upcycling, mixture: Mixture, where: str) -> str:
    share = ""
    if mixture.top_k is not None:
        start = work.options.start_of_router
        hidden = next(mlp.hidden for mlp, other in work.chosen if other is mixture)
        spread = {"normal": start.std, "zeros": 0.0}.get(start.kind)
        if spread is not None:
            expected = expected_sum(mixture.experts, mixture.top_k, spread * math.sqrt(hidden))
            share = f", to about {expected:.2g} for inputs of unit variance"
    return (
        f"Raw weights {where}sum to less than 1{share}, so the MLP's output shrinks by as much and the quality drops "
        "at first, more with every sparse layer and expert; it is the original recipe for vision. --combine normalized "
        "keeps the function."
    )


def expected_sum(experts: int, top_k: int, spread: float) -> float:
    """What the weights of a token's experts sum to if they are not normalised, on average at the start.

    Args:
        experts: E.
        top_k: K.
        spread: standard deviation of the router's scores: that of its weights times sqrt(hidden), for inputs of unit
            variance, as a norm without weights gives them.

    >>> expected_sum(8, 2, 0.0), expected_sum(4, 4, 1.0)
    (0.25, 1.0)
    """
    import numpy as np

    scores = spread * stream(0, "expected sum").standard_normal((1000, experts))
    exponentials = np.sort(np.exp(scores - scores.max(axis=1, keepdims=True)), axis=1)
    return round(float((exponentials[:, -top_k:].sum(axis=1) / exponentials.sum(axis=1)).mean()), 6)


# An output of more bytes than this, and so many times the dense model's, is worth a word.
_LARGE_BYTES, _LARGE_RATIO = 10**10, 4


def notes_on_size(nbytes: int, dense_bytes: int, choices: Sequence[ChoiceReport]) -> tuple[str, ...]:
    """A sentence on an output that is much larger than what it comes from."""
    if nbytes <= max(_LARGE_BYTES, _LARGE_RATIO * dense_bytes):
        return ()
    smaller = min((choice for choice in choices if choice.nbytes < nbytes), key=lambda one: one.nbytes, default=None)
    remedy = f"; --layers {smaller.layers} gives {smaller.nbytes / 1e9:,.0f} GB" if smaller is not None else ""
    return (
        f"The output has {nbytes / 1e9:,.0f} GB, {nbytes / dense_bytes:.1f} times the dense model's; fewer --experts "
        f"or --layers make it smaller{remedy}.",
    )


def _on_layers(mixture: Mixture, where: str) -> list[str]:
    half = max(1, mixture.depth // 2)
    if len(mixture.layers) <= half or mixture.rank is not None:  # the paper is about copies
        return []
    return [
        f"{len(mixture.layers)} of {mixture.depth} layers {where}become sparse; the paper found the last half best "
        f"for quality and cost (--layers last:half: {half})."
    ]

"""What the report tells about an upcycled checkpoint before anybody trains it."""

from __future__ import annotations

from surgery.upcycling.mixture import Mixture
from surgery.upcycling.planning import Upcycling


def notes_on(work: Upcycling) -> tuple[str, ...]:
    """Sentences on gradients, expected drops, and what the paper would have chosen."""
    notes = [*work.target.notes]
    identical = work.options.expert_init.identical
    for stack, mixture in work.mixtures.items():
        where = f"of the {stack} " if len(work.mixtures) > 1 else ""
        notes += _on_routing(mixture, where, identical, work.options.expert_init.kind)
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
        elif identical:
            found.append(
                f"The experts {where}are identical and their weights sum to 1, so the router gets no gradient from the "
                "task at first: train with a load-balancing loss (router_aux_loss_coef), or start with --init noise:1%."
            )
    if not mixture.normalized:
        found.append(
            f"Raw weights {where}sum to less than 1, so the MLP's output shrinks and the quality drops at first, more "
            "with every sparse layer and expert; it is the original recipe for vision. --combine normalized keeps the "
            "function."
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


def _on_layers(mixture: Mixture, where: str) -> list[str]:
    half = max(1, mixture.depth // 2)
    if len(mixture.layers) <= half:
        return []
    return [
        f"{len(mixture.layers)} of {mixture.depth} layers {where}become sparse; the paper found the last half best "
        f"for quality and cost (--layers last:half: {half} layers)."
    ]

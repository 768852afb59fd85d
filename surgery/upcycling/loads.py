"""Where tokens go: what each expert of a running model was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.upcycling.report import ExpertLoad

if TYPE_CHECKING:
    import torch


@dataclass
class _Tally:
    """Of one sparse block: how many tokens each expert took, [E], how many none did, and how many there were."""

    taken: torch.Tensor
    uncovered: int
    tokens: int


class Watch:
    """Counts the tokens of each expert from now on, in every sparse block of a model.

    transformers calls `experts(hidden_states, chosen, weights)` in all of its mixtures; those of `surgery.moe` say in
    `routing` what they decided.
    """

    def __init__(self, model: Any) -> None:
        from surgery.moe import MixtureOfExperts

        self._tallies: dict[str, _Tally] = {}
        for name, module in model.named_modules():
            if isinstance(module, MixtureOfExperts):
                module.register_forward_hook(self._of_ours(name))
            elif type(module).__name__.endswith("Experts") and isinstance(getattr(module, "num_experts", None), int):
                module.register_forward_pre_hook(self._of_theirs(name.removesuffix(".experts"), module.num_experts))

    def _of_ours(self, name: str) -> Callable[..., None]:
        return lambda module, *_: self._add(name, module.routing.taken.flatten(0, -2))

    def _of_theirs(self, name: str, experts: int) -> Callable[..., None]:
        return lambda _, arguments: self._add(name, chosen_experts(arguments[1], arguments[2], experts))

    def _add(self, name: str, taken: torch.Tensor) -> None:
        """Count in a pass: bool [tokens, E]."""
        tally = _Tally(taken.sum(0), int((~taken.any(-1)).sum()), len(taken))
        before = self._tallies.get(name)
        if before is not None:
            tally = _Tally(before.taken + tally.taken, before.uncovered + tally.uncovered, before.tokens + tally.tokens)
        self._tallies[name] = tally

    def loads(self) -> tuple[ExpertLoad, ...]:
        """Of each sparse block that has run, in the order of the model."""
        return tuple(
            ExpertLoad(
                name,
                tuple(count / max(1, int(tally.taken.sum())) for count in tally.taken.tolist()),
                tally.uncovered / tally.tokens,
            )
            for name, tally in self._tallies.items()
        )


def chosen_experts(chosen: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """Which experts take which token, bool [tokens, E], from what transformers hands to its experts.

    Args:
        chosen: the experts of each token [tokens, K]; of Switch Transformers [tokens, 1, E], one where it is the one.
        weights: [tokens, K]; of NLLB [tokens, E], zero for those not chosen.
        experts: E.
    """
    if chosen.dim() == 3:
        return chosen.flatten(0, 1).bool()
    if weights.shape[-1] == experts:
        return weights > 0
    return chosen.new_zeros((len(chosen), experts)).scatter(1, chosen, 1).bool()

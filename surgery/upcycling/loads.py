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
    """Of one sparse block: tokens to an expert, tokens to none, and tokens in all."""

    taken: torch.Tensor
    uncovered: int = 0
    tokens: int = 0


class Watch:
    """Counts the tokens of each expert from now on, in every sparse block of a model.

    transformers calls `experts(hidden_states, indices [tokens, K], weights)` in all of its mixtures; those of
    `surgery.moe` say in `routing` what they decided.
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
        def count(module: Any, *_: object) -> None:
            taken = module.routing.taken.flatten(0, -2)
            self._add(name, taken.sum(0), int((~taken.any(-1)).sum()), len(taken))

        return count

    def _of_theirs(self, name: str, experts: int) -> Callable[..., None]:
        def count(_: Any, arguments: tuple[Any, ...]) -> None:
            indices = arguments[1]
            self._add(name, indices.flatten().bincount(minlength=experts), 0, indices.numel() // indices.shape[-1])

        return count

    def _add(self, name: str, taken: torch.Tensor, uncovered: int, tokens: int) -> None:
        tally = self._tallies.get(name)
        if tally is None:
            self._tallies[name] = _Tally(taken, uncovered, tokens)
            return
        tally.taken, tally.uncovered, tally.tokens = (
            tally.taken + taken, tally.uncovered + uncovered, tally.tokens + tokens,
        )  # fmt: skip

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

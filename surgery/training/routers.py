"""What the routers of a mixture of experts do while it is trained: their losses, and who gets how many tokens.

Both kinds of mixture are seen as `Routing`: that of the modelling code that checkpoints ship keeps it, and for the
native ones of transformers (Mixtral and its like, Switch) it is made from the router logits they return.

    G: groups     n: tokens of a group     E: experts     L: sparse layers
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from surgery.moe import Routing


def has_routers(model: Any) -> bool:
    """Whether a model is a mixture of experts, of either kind."""
    if is_shipped(model) or hasattr(model.config, "output_router_logits"):
        return True
    return "output_router_logits" in inspect.signature(type(model).forward).parameters  # Switch


def is_shipped(model: Any) -> bool:
    """Whether its mixtures are those of our own modelling code."""
    return getattr(model.config, "moe_stacks", None) is not None


@dataclass
class Routers:
    """The routers of one model.

    Attributes:
        model: without wrappers.
        aux, z: coefficients of the load-balancing loss and of the z-loss.
        sums: per layer, since the last figures: tokens of each expert, entropy, uncovered tokens, all tokens.
    """

    model: Any
    aux: float
    z: float
    sums: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, aux: float | None, z: float | None) -> Routers | None:
        """For a model, or None for a dense one; coefficients that are None are those of its config."""
        if not has_routers(model):
            return None
        config = model.config
        if aux is None:
            aux = float(getattr(config, "router_aux_loss_coef", None) or 0.0)
        if z is None:
            z = float(getattr(config, "router_z_loss_coef", None) or 0.0)
        return cls(model, aux, z)

    @property
    def call(self) -> dict[str, bool]:
        """What the model is to be called with so that it tells."""
        return {} if is_shipped(self.model) else {"output_router_logits": True}

    def routings(self, outputs: Any, mask: torch.Tensor | None) -> dict[str, Routing]:
        """What each sparse layer decided in the last forward pass."""
        if is_shipped(self.model):
            from surgery.moe import mixtures

            return {name: mixture.routing for name, mixture in mixtures(self.model).items() if mixture.routing}
        found: dict[str, Routing] = {}
        for field_name, stack in (
            ("router_logits", ""),
            ("encoder_router_logits", "encoder."),
            ("decoder_router_logits", "decoder."),
        ):
            for number, logits in enumerate(getattr(outputs, field_name, None) or ()):
                logits = logits[0] if isinstance(logits, tuple) else logits
                real = mask if stack != "decoder." else None
                found[f"{stack}{number}"] = _native(self.model.config, logits, real)
        return found

    def loss(self, routings: Mapping[str, Routing], outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The load-balancing loss and the z-loss of one forward pass, without coefficients; scalars with gradients.

        The first is the model's own where it has one: for Mixtral and its like it is K times that of Switch.
        """
        import torch

        own = getattr(outputs, "aux_loss", None)
        chosen = [r for name, r in routings.items() if self._tops(name)]
        some = next(iter(routings.values())).logits
        aux = own if own is not None else _mean([r.load_balancing_loss() for r in chosen], some)
        return aux.to(torch.float32), _mean([r.router_z_loss() for r in routings.values()], some)

    def _tops(self, name: str) -> bool:
        """Whether a layer's tokens choose; where experts choose, the load is balanced by construction."""
        if not is_shipped(self.model):
            return True
        return bool(self.model.get_submodule(name).options.router == "top-k")

    def observe(self, routings: Mapping[str, Routing]) -> None:
        """Add one forward pass to the figures."""
        import torch

        for name, routing in routings.items():
            logits, taken = routing.logits.detach(), routing.taken
            if routing.real is not None:
                logits, taken = logits[routing.real], taken[routing.real]
            logits, taken = logits.reshape(-1, logits.shape[-1]).float(), taken.reshape(-1, taken.shape[-1])
            shares = logits.log_softmax(-1)
            entropy = -(shares.exp() * shares).sum(-1)
            sums = torch.cat(
                [
                    taken.sum(0).float(),
                    torch.stack([entropy.sum(), (~taken.any(-1)).sum().float(), entropy.new_tensor(len(entropy))]),
                ]
            )
            self.sums[name] = sums if name not in self.sums else self.sums[name] + sums

    def figures(self, reduce: Any = lambda sums: sums) -> dict[str, Any]:
        """Per layer since the last call: experts' shares of all choices, entropy in nats, share of uncovered tokens.

        `reduce` adds up over processes.
        """
        found: dict[str, Any] = {"load": {}, "router_entropy": {}, "uncovered": {}}
        for name, own in self.sums.items():
            *taken, entropy, none, tokens = reduce(own).tolist()
            total = sum(taken) or 1.0
            found["load"][name] = [round(count / total, 6) for count in taken]
            found["router_entropy"][name] = entropy / max(tokens, 1.0)
            found["uncovered"][name] = none / max(tokens, 1.0)
        self.sums.clear()
        return found


def _mean(losses: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    import torch

    if not losses:
        return like.new_zeros((), dtype=torch.float32)
    return torch.stack([loss.to(like.device, torch.float32) for loss in losses]).mean()


def _native(config: Any, logits: torch.Tensor, mask: torch.Tensor | None) -> Routing:
    """A layer of transformers' own: [tokens, E] or [G, n, E] logits."""
    from surgery.moe import Routing
    from surgery.moe.modeling_upcycled import choose_top_k

    groups = mask.shape[0] if mask is not None else (logits.shape[0] if logits.dim() == 3 else 1)
    shaped = logits.reshape(groups, -1, logits.shape[-1])
    capacity = getattr(config, "expert_capacity", None)
    k = 1 if capacity is not None else config.num_experts_per_tok
    taken = choose_top_k(shaped, k)
    if capacity is not None:  # Switch: an expert takes the first tokens of a sequence, and drops what is too much
        taken &= taken.cumsum(dim=1) <= capacity
    real = None if mask is None or mask.shape != shaped.shape[:2] else mask.bool()
    return Routing(shaped, taken, real)

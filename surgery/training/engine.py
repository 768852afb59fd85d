"""How a model is computed, its gradients gathered and its weights updated: by accelerate, or by DeepSpeed.

The loop knows no more of processes than this. `Engine` is a model on one process, on several that each have all of it,
or on several that share it by FSDP2. `zero.ZeroEngine` is one whose training state DeepSpeed shares out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from surgery.training import state
from surgery.training.options import TrainOptions
from surgery.training.rates import make_optimizer
from surgery.training.sharding import gathered, is_sharded, whole

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


class Engine:
    """A model and its optimiser, prepared by accelerate.

    Attributes:
        model: what computes the outputs of a batch.
        alone: whether each process has weights and optimiser whole.
        stops_anywhere: whether a run may be interrupted between two passes of a step.
        kept: whether the weights are still those before the update where `update` raised.
    """

    kept = True

    def __init__(self, accelerator: Any, model: Any, groups: list[dict[str, Any]], options: TrainOptions) -> None:
        self.accelerator, self.bare = accelerator, model
        self.most = options.max_grad_norm or math.inf
        self.model, self.optimizer = accelerator.prepare(model, make_optimizer(groups, options))
        # After `prepare`, since a model that is spread over processes has other parameters.
        self.trained = [parameter for group in self.groups() for parameter in group["params"]]
        self.alone = not any(map(is_sharded, self.trained))
        self.stops_anywhere = accelerator.num_processes == 1

    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups of parameters, whose learning rates are set before each update."""
        found: list[dict[str, Any]] = self.optimizer.param_groups
        return found

    # A step -----------------------------------------------------------------------------------------------------------

    def passing(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a forward and backward pass; processes add up their gradients in the last one of a step."""
        around: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
        )
        return around

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def update(self, check: Callable[[float], None]) -> float:
        """Clip, and change the weights. Returns the norm of the gradients, which `check` has seen before."""
        import torch

        # accelerate compares sharded parameters by value to find out whose they are, which fails in another order.
        clip = self.accelerator.clip_grad_norm_ if self.alone else torch.nn.utils.clip_grad_norm_
        norm = float(whole(clip(self.trained, self.most)))
        check(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def discard(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    # The state --------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[Tensors, Tensors]:
        """What is common to all processes, of which one stores it, and what each process stores itself."""
        weights = {f"weight/{name}": tensor for name, tensor in state.weights_of(self.bare).items()}
        common = weights | {f"optimizer/{n}": tensor for n, tensor in state.optimizer_tensors(self.optimizer).items()}
        parameters = dict(self.bare.named_parameters())
        own = {f"gradient/{name}": p.grad for name, p in parameters.items() if p.grad is not None}
        return (common, own) if self.alone else ({}, own | common)

    def put_state(self, main: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
        """Go back to what `state` said."""
        common = main if self.alone else own
        state.put_weights(self.bare, state.below(common, "weight/"))
        state.put_optimizer(self.optimizer, state.below(common, "optimizer/"))
        gradients = state.below(own, "gradient/")
        for name, parameter in self.bare.named_parameters():
            parameter.grad = gradients[name].to(parameter.device) if name in gradients else None

    def trained_weights(self) -> Tensors:
        """What training changes, whole, for the first process to store. Every process must ask."""
        return gathered(state.weights_of(self.bare), self.accelerator.is_main_process)

    def weights(self) -> Tensors | None:
        """All weights, by their names, on the first process; None where the model itself has them.

        Every process must ask.
        """
        if self.alone:
            return None
        return gathered(self.bare.state_dict(keep_vars=True), self.accelerator.is_main_process)

"""Training whose optimiser, gradients and weights DeepSpeed shares out over processes (ZeRO, stages 1 to 3).

Which stage, and with which settings, the file says that `accelerate launch` was given; batches, accumulation, clipping
and precision are those of the command. Weights stay in float32 and are computed with in bfloat16 where that is asked
for, as everywhere else: DeepSpeed's own bfloat16 rounds the weights first.

Source: DeepSpeed's engine, and its documents on ZeRO and on `torch_autocast`. accelerate's wrapper is not used, since
it steps within the backward pass, before this loop has looked at the loss.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from surgery.errors import OptionError, UnsupportedError
from surgery.training import state
from surgery.training.engine import Engine
from surgery.training.options import TrainOptions
from surgery.training.rates import make_optimizer

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

_OWN = ("optimizer", "scheduler")


def is_asked() -> bool:
    """Whether `accelerate launch` was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def asked(accelerator: Any) -> str | None:
    """What is shared out, as `zero-2`; None without DeepSpeed."""
    return f"zero-{(_given(accelerator).get('zero_optimization') or {}).get('stage')}" if is_asked() else None


def _given(accelerator: Any) -> Mapping[str, Any]:
    """The configuration that accelerate was launched with. Without a GPU it reads none itself."""
    from accelerate.utils import DeepSpeedPlugin

    plugin = getattr(accelerator.state, "deepspeed_plugin", None) or DeepSpeedPlugin()
    found: Mapping[str, Any] = plugin.deepspeed_config
    return found


def settings(given: Mapping[str, Any], options: TrainOptions, precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration: what the user's says of ZeRO, and the command's own batches and precision.

    Args:
        given: as accelerate read it, from its own file or from one of DeepSpeed's.
        options: of the run.
        precision: `no`, `bf16` or `fp16`.

    Raises:
        OptionError: it says what the command says.
        UnsupportedError: it asks for what is not there.
    """
    if own := [name for name in _OWN if name in given]:
        raise OptionError(
            f"The DeepSpeed configuration has {own[0]!r}; leave it out, --optimizer and --schedule of train say it."
        )
    if precision == "fp16":
        raise UnsupportedError("--precision fp16 does not go with DeepSpeed; use bf16 or fp32.")
    zero = dict(given.get("zero_optimization") or {})
    if zero.get("stage") not in (1, 2, 3):
        raise UnsupportedError(f"zero_stage is {zero.get('stage')}, expected 1, 2 or 3; without ZeRO launch ddp.yaml.")
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.pop(name, None) or {}).get("device", "none")
        if device not in ("none", None):
            raise UnsupportedError(f"{name} to {device} is not there; set {name}_device: none.")
    kept = {name: value for name, value in given.items() if value != "auto" and name not in ("bf16", "fp16")}
    return kept | {
        "zero_optimization": {name: value for name, value in zero.items() if value != "auto"},
        "train_batch_size": None,
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "gradient_clipping": options.max_grad_norm or 0.0,
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        # torch's own AdamW, with the optimiser's memory in float32.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }


class ZeroEngine(Engine):
    """A model in DeepSpeed's hands; see `Engine`."""

    def __init__(self, accelerator: Any, model: Any, groups: list[dict[str, Any]], options: TrainOptions) -> None:
        import deepspeed

        if accelerator.device.type == "cpu":
            # It would compile this first, which takes a compiler and a minute; gloo does the same.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        given = settings(_given(accelerator), options, accelerator.mixed_precision)
        self.accelerator, self.bare = accelerator, model
        self.stage = given["zero_optimization"]["stage"]
        # It calls functions of torch by names that torch gives up; the user can do nothing about it.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(groups, options), config=given, dist_init_required=False
        )
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.alone = self.stops_anywhere = False

    def passing(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def update(self, check: Callable[[float], None]) -> float:
        self.model.step()
        norm = float(self.model.get_global_grad_norm())
        # It makes no step with gradients that are not finite, but for stage 3.
        self.kept = math.isfinite(norm) or self.stage < 3
        check(norm)
        return norm

    def discard(self) -> None:
        self.model.zero_grad()

    # The state: the weights whole, and each process's share of the optimiser's memory.

    def state(self) -> tuple[Tensors, Tensors]:
        common = {f"weight/{name}": tensor for name, tensor in self.trained_weights().items()}
        own = {
            f"optimizer/{number}/{name}": value
            for number, share in enumerate(self._shares())
            for name, value in self.optimizer.optimizer.state[share].items()
        }
        return common, own

    def put_state(self, main: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
        import torch
        from deepspeed.utils import safe_set_full_fp32_param

        places = {**dict(self.bare.named_parameters()), **dict(self.bare.named_buffers())}
        with torch.no_grad():
            for name, tensor in state.below(main, "weight/").items():
                place = places[name]
                value = tensor.to(self.accelerator.device)
                with self._whole(place, change=True):
                    place.copy_(value)
                if place.requires_grad:
                    safe_set_full_fp32_param(place, value)
        memory = self.optimizer.optimizer.state
        for number, share in enumerate(self._shares()):
            memory[share] = {
                name: tensor if name == "step" else tensor.to(share.device)
                for name, tensor in state.below(own, f"optimizer/{number}/").items()
            }

    def _shares(self) -> list[torch.Tensor]:
        """What this process updates: its part of each group of parameters, end to end in one vector."""
        found = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.optimizer, found))

    @contextlib.contextmanager
    def _whole(self, tensor: torch.Tensor, change: bool = False) -> Iterator[None]:
        """While a parameter has all of its rows, on every process."""
        import deepspeed

        spread = self.stage == 3 and hasattr(tensor, "ds_id")
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if change else None, enabled=spread):
            yield

    def _gathered(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Copies on the CPU of the first process; tensors under several names stay one."""
        seen: dict[int, torch.Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) not in seen:
                with self._whole(tensor):
                    full = tensor.detach()
                    seen[id(tensor)] = full.cpu().clone() if self.accelerator.is_main_process else full.new_empty(0)
        if not self.accelerator.is_main_process:
            return {}
        return {name: seen[id(tensor)] for name, tensor in tensors.items()}

    def trained_weights(self) -> Tensors:
        stored = self.bare.state_dict(keep_vars=True)
        buffers = {name for name, _ in self.bare.named_buffers()}
        parameters = {n: p for n, p in self.bare.named_parameters() if p.requires_grad}
        return self._gathered(parameters | {name: stored[name] for name in stored if name in buffers})

    def weights(self) -> Tensors | None:
        return self._gathered(self.bare.state_dict(keep_vars=True))

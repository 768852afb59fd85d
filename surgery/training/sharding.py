"""Models whose weights are spread over processes, by FSDP2: what of a tensor is here, and the whole of it.

Such a tensor is a `DTensor`. Its shard is a plain tensor, the rows that this process has: perhaps none of a vector.
Source: torch's `fully_shard`, as accelerate applies it to the model's blocks, embeddings and head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over processes. Told by what it can do: importing `DTensor` is slow."""
    return hasattr(tensor, "full_tensor")


def shard(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor is on this process: the shard, which shares its memory; a plain tensor is all here."""
    here: torch.Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor
    return here


def like(parameter: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """A shard as a tensor that is spread as `parameter` is; a plain tensor beside a plain parameter, and counters."""
    if not is_sharded(parameter) or not here.dim():
        return here
    from torch.distributed.tensor import DTensor

    spread: Any = parameter
    found: torch.Tensor = DTensor.from_local(
        here.to(spread.device),
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all of its rows. Every process must ask for it, in the same order."""
    found: torch.Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor
    return found.detach()


def gathered(tensors: Mapping[str, torch.Tensor], keep: bool) -> Tensors:
    """Whole tensors on the CPU, where `keep` says so; nothing elsewhere. Every process must ask for them.

    One at a time is whole on the device. A tensor under several names (tied weights) stays one.
    """
    found: Tensors = {}
    seen: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            full = whole(tensor)
            seen[id(tensor)] = full.cpu() if keep else full[:0] if full.dim() else full
        if keep:
            found[name] = seen[id(tensor)]
    return found

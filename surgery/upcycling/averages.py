"""The mean of several stored tensors, gone through side by side: computed in float64 and rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.checkpoint import StoredTensor
from surgery.errors import NonFiniteError
from surgery.execute import StepIO
from surgery.plan import OutputStep, StepResult
from surgery.tiling import TILE_ELEMENTS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AverageStep(OutputStep):
    """The mean of tensors of one shape; their dtypes may differ, and one may be named several times."""

    sources: tuple[StoredTensor, ...]

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return tuple({tensor.key: tensor for tensor in self.sources}.values())

    @property
    def scratch(self) -> int:
        return min(self.output.nbytes, 2 * TILE_ELEMENTS) * (8 * len(self.reads) + 32)

    def run(self, io: StepIO) -> StepResult:
        counts = [sum(tensor.key == other.key for other in self.sources) for tensor in self.reads]
        for begin, _, tiles in io.chunks(*self.reads):
            total = tiles[0].double().mul_(counts[0])
            for tile, count in zip(tiles[1:], counts[1:], strict=True):
                total.add_(tile.double(), alpha=count)
            made = rounded_once(total.div_(len(self.sources)), self.output.dtype.to_torch)
            if not bool(made.double().isfinite().all()):
                raise NonFiniteError(
                    f"The mean of {self.output.name!r} is NaN or infinite as {self.output.dtype}; mend the models that "
                    "it is taken of."
                )
            io.write(self.output, begin, made)
        return StepResult()


def rounded_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float64 values in a narrower dtype, rounded to nearest, ties to even.

    torch (2.13) goes by way of float32, which rounds twice. Here the float32 in between is rounded to odd: where it is
    not exact, the one of its two neighbours whose last bit is 1. A second rounding then gives what one would have.
    Source: Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
    odd" (2008), theorem 1.
    """
    import torch

    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    near = values.to(torch.float32)
    bits = near.view(torch.int32)
    # Where rounding led away from zero, one step back. Then, wherever something was lost, the last bit is set.
    bits = torch.where(near.double().abs() > values.abs(), bits - 1, bits)
    return torch.where(near.double() != values, bits | 1, bits).view(torch.float32).to(dtype)

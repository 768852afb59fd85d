"""An expert that is the dense MLP with an adapter merged into it, by the arithmetic of `merge`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.checkpoint import StoredTensor
from surgery.dtypes import DType
from surgery.errors import NonFiniteError
from surgery.ops.fitting import Block
from surgery.ops.weights import Adder
from surgery.tiling import TILE_ELEMENTS
from surgery.upcycling.experts import CountingRows, Recipe, Rows

if TYPE_CHECKING:
    import torch

    from surgery.execute import StepIO


@dataclass(frozen=True)
class Adapted(Recipe):
    """A dense matrix with what an adapter adds to it. The bits are those that `merge` would store.

    Attributes:
        source: the dense matrix, or what the adapter puts in its place.
        blocks: what is added, by rows.
        dtype: that of the dense matrix.
    """

    source: StoredTensor
    blocks: tuple[Block, ...]
    dtype: DType

    @property
    def whole(self) -> bool:
        return any(contribution.needs_whole for block in self.blocks for contribution in block.contributions)

    @property
    def scratch(self) -> int:
        tile = self.source.numel if self.whole else min(self.source.numel, 2 * TILE_ELEMENTS)
        contributions = [contribution for block in self.blocks for contribution in block.contributions]
        return 20 * tile + sum(8 * tensor.numel for c in contributions for tensor in c.lora.tensors)

    def start(self, io: StepIO, name: str) -> Rows:
        return _Adding(Adder(io, self.blocks, self.dtype), name)


class _Adding(CountingRows):
    def __init__(self, adder: Adder, name: str) -> None:
        self._adder, self._name = adder, name
        self._done = 0

    def __call__(self, dense: torch.Tensor) -> torch.Tensor:
        made = self._adder.rows(dense, self._done)
        self._done += dense.shape[0]
        return made

    def finish(self) -> Mapping[str, object]:
        if not self._adder.finite:
            raise NonFiniteError(
                f"{self._name!r} would hold NaN or infinity; lower the adapter's weight, or mend the dense weights."
            )
        return self._adder.report()

"""The steps that change weights: add adapters to a stored tensor, take them out of it, or both in one pass.

A weight passes through, some rows at a time:

    stored tile -> base (predicted and mended by the undo record, or approximately) -> + adapters -> rounded once
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.adapter import TokenRows
from surgery.checkpoint import StoredTensor
from surgery.dtypes import F64, DType
from surgery.errors import IntegrityError, NonFiniteError
from surgery.hashing import new_hash
from surgery.linalg import squared_norm
from surgery.ops.deltas import Factors, delta_rows, load_factors, merge_tile
from surgery.ops.fitting import Block, Contribution
from surgery.ops.undo import Literals, Recorder, decode, predict, uncertain
from surgery.plan import OutputStep, StepResult
from surgery.tiling import TILE_ELEMENTS

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.execute import StepIO


@dataclass(frozen=True)
class Undo:
    """How to get the base of one merged tensor back.

    Attributes:
        blocks: the contributions that are in it.
        parts: the tensors of its record by their last name: `gaps`, `bits`, `factor.N` (N counts contributions).
        hash: of the base tensor, which proves the result; None without a record, when the result is approximate.
    """

    blocks: tuple[Block, ...]
    parts: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)
    hash: str | None = None

    @property
    def is_exact(self) -> bool:
        return self.hash is not None


@dataclass(frozen=True)
class WeightStep(OutputStep):
    """Write a tensor that is `source` after `undo`, with `rows` replaced and the contributions of `blocks` added.

    Attributes:
        output: what is written; its dtype is that of the base.
        source: what is read.
        record: leave an undo record for what is added.
        allow_nonfinite: let NaN and infinity pass.
    """

    source: StoredTensor
    blocks: tuple[Block, ...] = ()
    rows: tuple[TokenRows, ...] = ()
    undo: Undo | None = None
    record: bool = False
    allow_nonfinite: bool = False

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        found = [self.source]
        for block in (*self.blocks, *(self.undo.blocks if self.undo else ())):
            found += [tensor for c in block.contributions for tensor in c.lora.tensors]
        found += [replaced.values for replaced in self.rows]
        found += list(self.undo.parts.values()) if self.undo else []
        return tuple({tensor.key: tensor for tensor in found}.values())

    @property
    def _contributions(self) -> list[Contribution]:
        blocks = (*self.blocks, *(self.undo.blocks if self.undo else ()))
        return [contribution for block in blocks for contribution in block.contributions]

    @property
    def _whole(self) -> bool:
        return any(contribution.needs_whole for contribution in self._contributions)

    @property
    def scratch(self) -> int:
        exact = self.record or (self.undo is not None and self.undo.is_exact)
        per_element = 60 if exact else 20  # float32 tiles, or float64 ones with bounds and masks
        tile = self.source.numel if self._whole else min(self.source.numel, 2 * TILE_ELEMENTS)
        factors = sum(8 * t.numel // max(c.experts, 1) for c in self._contributions for t in c.lora.tensors)
        literals = 12 * self.source.numel // 8 if exact else 0
        return per_element * tile + factors + literals

    def run(self, io: StepIO) -> StepResult:
        dtype = self.output.dtype.to_torch
        adding = _BlockReader(io, self.blocks, _arithmetic(self.output.dtype))
        removing = _Remover(io, self) if self.undo else None
        recording = _Recording(io, self) if self.record else None
        tally = _Tally()
        for begin, end, (stored,) in io.chunks(self.source, block=self._block_rows, whole=self._whole):
            tile = stored.to(io.device)
            base, wide = (tile.to(dtype), None) if removing is None else removing.base_of(tile, begin, end)
            start = self._with_rows(io, base, begin, end)
            wide = wide if wide is None else self._with_rows(io, wide, begin, end)
            found, first = adding.at(begin)
            rounded = start
            scales: list[torch.Tensor | None] = []
            if found or wide is not None:
                current = _wide(io, start) if wide is None else wide
                space = _space(io, "delta", current, current.dtype)
                merged, delta, scales = merge_tile(current, found, begin - first, end - first, space)
                rounded = _space(io, "rounded", merged, dtype).copy_(merged)
                tally.add(start, merged, rounded, delta)
            if recording is not None:
                recording.add(begin, end, base, rounded, scales)
            io.write(self.output, begin, rounded.cpu())
        if removing is not None:
            removing.check()
        if not tally.finite and not self.allow_nonfinite:
            self._name_nonfinite(io)
        report = tally.report() | (removing.report() if removing is not None else {})
        return StepResult(report, {} if recording is None else recording.tensors())

    @property
    def _block_rows(self) -> int | None:
        """Rows of one block; all blocks of a tensor are of one size, the whole tensor or one expert."""
        blocks = (*self.blocks, *(self.undo.blocks if self.undo else ()))
        return blocks[0].end - blocks[0].begin if blocks else None

    def _with_rows(self, io: StepIO, base: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """The tile with those of its rows replaced that an adapter brings."""
        import torch

        for replaced in self.rows:
            inside = [(place, row) for place, row in enumerate(replaced.indices) if begin <= row < end]
            if inside:
                values = io.shared(replaced.values)
                if not self.allow_nonfinite:
                    _refuse_nonfinite(replaced.values, values)
                values = values.to(base.device, base.dtype)
                base = base.clone()
                base[torch.tensor([row - begin for _, row in inside])] = values[[place for place, _ in inside]]
        return base

    def _name_nonfinite(self, io: StepIO) -> None:
        """Find out where NaN or infinity came from, and say so."""
        for tensor in self.reads:
            for _, _, (tile,) in io.chunks(tensor):
                _refuse_nonfinite(tensor, tile)
        raise NonFiniteError(
            f"The merged weights of {self.name!r} exceed the range of {self.output.dtype}; lower the adapter's weight, "
            "or pass --allow-nonfinite."
        )


@dataclass(frozen=True)
class TakeStep(OutputStep):
    """A tensor that an adapter brings whole, in the dtype of the output, rounded once."""

    source: StoredTensor
    allow_nonfinite: bool = False

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return (self.source,)

    @property
    def scratch(self) -> int:
        return 16 * TILE_ELEMENTS

    def run(self, io: StepIO) -> StepResult:
        for begin, _, (tile,) in io.chunks(self.source):
            if not self.allow_nonfinite:
                _refuse_nonfinite(self.source, tile)
            io.write(self.output, begin, tile.to(self.output.dtype.to_torch))
        return StepResult()


def _refuse_nonfinite(tensor: StoredTensor, values: torch.Tensor) -> None:
    """Raise `NonFiniteError` naming the tensor that some values are from, unless all of them are numbers."""
    if tensor.dtype.arithmetic and not bool(values.double().isfinite().all()):
        raise NonFiniteError(
            f"Tensor {tensor.name!r} in {tensor.source.name} holds NaN or infinity; mend it, or pass --allow-nonfinite."
        )


def _arithmetic(dtype: DType) -> str:
    """The type to compute in: float64 for a float64 weight, else float32."""
    return "float64" if dtype is F64 else "float32"


def _wide(io: StepIO, tile: torch.Tensor) -> torch.Tensor:
    """A tile in the type of the arithmetic, in memory that may be overwritten."""
    import torch

    wanted = torch.float64 if tile.dtype == torch.float64 else torch.float32
    return _space(io, "wide", tile, wanted).copy_(tile)


def _space(io: StepIO, slot: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a tile: this thread's own on the CPU, where fresh memory is dear; fresh on a GPU, where it is not."""
    import torch

    if like.device.type != "cpu":
        return torch.empty_like(like, dtype=dtype)
    return io.buffer(slot, like.numel(), dtype).view(like.shape)


class _BlockReader:
    """Loads the factors of the block that a row belongs to, and keeps those of the current block."""

    def __init__(self, io: StepIO, blocks: Sequence[Block], dtype: str) -> None:
        self._io = io
        self._blocks = blocks
        self._dtype = dtype
        self._current: tuple[Block, list[Factors]] | None = None

    def at(self, row: int) -> tuple[list[Factors], int]:
        """The factors of each contribution to the block that holds `row`, and the block's first row."""
        import torch

        block = next((block for block in self._blocks if block.begin <= row < block.end), None)
        if block is None:
            return [], row
        if self._current is None or self._current[0] is not block:
            dtype = getattr(torch, self._dtype)
            self._current = block, [load_factors(self._io, c, dtype) for c in block.contributions]
        return self._current[1], block.begin


class Adder:
    """Adds contributions to a tensor whose rows come in order, as `WeightStep` does, and counts what rounding leaves.

    Args:
        io: reads the factors.
        blocks: what to add, by rows.
        dtype: of the result.
    """

    def __init__(self, io: StepIO, blocks: Sequence[Block], dtype: DType) -> None:
        self._io, self._dtype = io, dtype
        self._reader = _BlockReader(io, blocks, _arithmetic(dtype))
        self._tally = _Tally()

    def rows(self, tile: torch.Tensor, begin: int) -> torch.Tensor:
        """The rows from `begin` on, rounded once: valid until the next call on this thread."""
        dtype = self._dtype.to_torch
        start = tile.to(self._io.device, dtype)
        found, first = self._reader.at(begin)
        if not found:
            return start.cpu()
        current = _wide(self._io, start)
        space = _space(self._io, "delta", current, current.dtype)
        merged, delta, _ = merge_tile(current, found, begin - first, begin - first + tile.shape[0], space)
        rounded = _space(self._io, "rounded", merged, dtype).copy_(merged)
        self._tally.add(start, merged, rounded, delta)
        return rounded.cpu()

    @property
    def finite(self) -> bool:
        return self._tally.finite

    def report(self) -> dict[str, object]:
        """`energy`, `lost`, `same` and `count`, as `WeightStep` reports them."""
        return self._tally.report()


class _Remover:
    """Takes contributions out of a merged tensor: to the bit with a record, in float32 without."""

    def __init__(self, io: StepIO, step: WeightStep) -> None:
        assert step.undo is not None
        self._io, self._step, self._undo = io, step, step.undo
        self._reader = _BlockReader(io, self._undo.blocks, "float64" if self._undo.is_exact else "float32")
        self._hasher = new_hash()
        self._literals: Literals | None = None
        self._factors: list[torch.Tensor | None] = []
        self._rounding = self._norm = 0.0
        if self._undo.is_exact:
            self._read_record()

    def _read_record(self) -> None:
        parts = {name: self._io.read(tensor) for name, tensor in self._undo.parts.items()}
        output = self._step.output
        try:
            self._literals = decode(parts, math.prod(output.shape), output.dtype.bits // 8)
        except (ValueError, KeyError) as error:
            raise IntegrityError(f"The undo record of {output.name!r} is damaged: {error}.") from error
        count = max((len(block.contributions) for block in self._undo.blocks), default=0)
        self._factors = [parts.get(f"factor.{number}") for number in range(count)]

    def base_of(self, tile: torch.Tensor, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's rows: exact, or the stored rows together with an unrounded approximation of the base's."""
        found, first = self._reader.at(begin)
        if not self._undo.is_exact:
            wide = _wide(self._io, tile)
            self._rounding += _rounding_energy(wide, self._step.output.dtype)
            self._norm += squared_norm(wide)
            for factors in reversed(found):
                wide -= delta_rows(factors, begin - first, end - first)
            return tile, wide
        scales = [self._factor_rows(number, factors, begin, end) for number, factors in enumerate(found)]
        x, _ = predict(tile, found, scales, begin - first, end - first)
        base = x.to(self._step.output.dtype.to_torch)
        assert self._literals is not None
        self._literals.overwrite(base, begin * tile.shape[1])
        self._hasher.update(_bytes(base).data)
        return base, None

    def _factor_rows(self, number: int, factors: Factors, begin: int, end: int) -> torch.Tensor | None:
        if factors.magnitude is None:
            return None
        stored = self._factors[number]
        if stored is None:
            raise IntegrityError(f"The undo record of {self._step.output.name!r} lacks the factors of a DoRA.")
        stored = stored.to(self._io.device)
        return stored[None, :] if factors.transposed else stored[begin:end, None]

    def check(self) -> None:
        """Raise `IntegrityError` unless what came out is the base, by its hash."""
        if self._undo.is_exact and self._hasher.hexdigest() != self._undo.hash:
            raise IntegrityError(
                f"Tensor {self._step.output.name!r} does not come out as the base: {self._step.source.source.name} or "
                "its undo record was changed after the merge; nothing is written."
            )

    def report(self) -> dict[str, object]:
        """For an approximate removal, ||W||^2 and what the rounding of the merge may have left of it."""
        return {} if self._undo.is_exact else {"rounding": self._rounding, "norm": self._norm}


# Bits of the significand, the implicit one included.
_PRECISION = {
    "F64": 53,
    "F32": 24,
    "F16": 11,
    "BF16": 8,
    "F8_E4M3": 4,
    "F8_E4M3FNUZ": 4,
    "F8_E5M2": 3,
    "F8_E5M2FNUZ": 3,
}


def _rounding_energy(tile: torch.Tensor, dtype: DType) -> float:
    """Expected squared error of having rounded every weight of a tile: a twelfth of its last place squared."""
    import torch

    exponents = torch.frexp(tile).exponent
    places = torch.exp2(2.0 * (exponents - _PRECISION[dtype.name]).to(torch.float64))
    return float(torch.where(tile == 0, 0.0, places).sum()) / 12


class _Recording:
    """Makes the undo record of one tensor while it is merged."""

    def __init__(self, io: StepIO, step: WeightStep) -> None:
        self._reader = _BlockReader(io, step.blocks, "float64")
        self._recorder = Recorder()
        self._factors: dict[int, list[torch.Tensor]] = {}

    def add(
        self, begin: int, end: int, base: torch.Tensor, merged: torch.Tensor, scales: list[torch.Tensor | None]
    ) -> None:
        found, first = self._reader.at(begin)
        x, bound = predict(merged, found, scales, begin - first, end - first)
        self._recorder.add(begin * base.shape[1], base, uncertain(base, x, bound))
        for number, scale in enumerate(scales):
            if scale is not None:
                self._factors.setdefault(number, []).append(scale.reshape(-1).cpu())

    def tensors(self) -> dict[str, torch.Tensor]:
        import torch

        factors = {f"factor.{number}": torch.cat(found) for number, found in self._factors.items()}
        return {**self._recorder.tensors(), **factors}


class _Tally:
    """Counts what rounding left of the change. `lost` is || rounded - unrounded ||^2, `energy` is ||dW||^2."""

    def __init__(self) -> None:
        self.energy = self.lost = 0.0
        self.same = self.count = 0

    def add(self, start: torch.Tensor, merged: torch.Tensor, rounded: torch.Tensor, delta: torch.Tensor | None) -> None:
        """Count one tile. `merged` is overwritten."""
        self.energy += squared_norm(merged - start.to(merged.dtype) if delta is None else delta)
        self.lost += squared_norm(merged.sub_(rounded.to(merged.dtype)))
        self.same += _equal_count(rounded, start)
        self.count += start.numel()

    @property
    def finite(self) -> bool:
        return math.isfinite(self.energy) and math.isfinite(self.lost)

    def report(self) -> dict[str, object]:
        if not self.count:
            return {}
        finite = self.finite
        return {
            "energy": self.energy if finite else None,
            "lost": self.lost if finite else None,
            "same": self.same,
            "count": self.count,
        }


def _equal_count(left: torch.Tensor, right: torch.Tensor) -> int:
    """How many elements have the same bits. numpy compares eight times as fast as torch does (2.13, CPU)."""
    import numpy as np

    width = f"i{left.element_size()}"
    return int(np.count_nonzero(_bytes(left).view(width) == _bytes(right).view(width)))


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    import torch

    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()

"""The steps of an exact extraction and of its inverse: one stored tensor of the fine-tune, predicted, and coded.

The code of a tensor is a run of bytes:

    blocks, contributions of each   (2 numbers of 4 bytes)
    exponents                       for each contribution of each block b and a, 2 bytes each (see `prediction`)
    chunks                          predictor (1 byte), whether anything is left (1), rows (4), length (4), the residual

A chunk is predicted by nothing, by the base's bits as they are, or by the base's value with the adapter added. Tensors
that equal the base's have no code at all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

from surgery.checkpoint import StoredTensor
from surgery.dtypes import DType
from surgery.errors import IntegrityError
from surgery.layout import TensorSpec
from surgery.ops import residual
from surgery.ops.deltas import load_factors
from surgery.ops.fitting import Block
from surgery.ops.prediction import Fixed, arithmetic, choose_exponents, fix, predict
from surgery.plan import OutputStep, Step, StepResult
from surgery.tiling import TILE_ELEMENTS, tiles

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.execute import StepIO


class Predictor(IntEnum):
    """What a chunk is predicted by: nothing, the base's bits, or the base's value and the adapter."""

    NOTHING = 0
    BITS = 1
    VALUE = 2


_BLOCKS = struct.Struct("<II")
_EXPONENTS = struct.Struct("<hh")
_CHUNK = struct.Struct("<BBII")
# A contribution of no consequence has these for exponents.
_NONE = (-32768, -32768)


@dataclass(frozen=True)
class Origin:
    """What a tensor of the fine-tune is predicted from.

    Attributes:
        source: a tensor of the base, or one that the adapter puts in its place; None where there is none alike.
        blocks: what the adapter adds to it, by rows.
    """

    source: StoredTensor | None
    blocks: tuple[Block, ...] = ()

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Everything that is read for the prediction."""
        factors = [tensor for block in self.blocks for c in block.contributions for tensor in c.lora.tensors]
        return (*([] if self.source is None else [self.source]), *factors)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the adapter's blocks can be used: they speak of a tensor of the base's own shape."""
        return self.source is not None and self.source.shape == shape

    @property
    def block_rows(self) -> int | None:
        return self.blocks[0].end - self.blocks[0].begin if self.blocks else None

    @property
    def needs_whole(self) -> bool:
        return any(contribution.needs_whole for block in self.blocks for contribution in block.contributions)

    def factor_bytes(self) -> int:
        """Memory for the factors of one block, in float64 and as integers."""
        found = [c for block in self.blocks[:1] for c in block.contributions]
        return sum(24 * tensor.numel // max(c.experts, 1) for c in found for tensor in c.lora.tensors)


def is_coded(tensor: StoredTensor) -> bool:
    """Whether a tensor has a code; packed types and tensors without elements are kept as they are."""
    return tensor.dtype.torch_name is not None and tensor.numel > 0


def scratch(origin: Origin, tensor: TensorSpec | StoredTensor) -> int:
    """Memory of a step: a tile in several forms, the factors, and the code, which is hardly larger than the tensor."""
    columns = max(tensor.shape[-1] if tensor.shape else 1, 1)
    elements = tensor.nbytes * 8 // tensor.dtype.bits
    tile = elements if origin.needs_whole else min(elements, max(2 * TILE_ELEMENTS, 64 * columns))
    # Bits of weights about eight times, and digits, keys and masks of a byte.
    return (24 + tensor.dtype.bits) * tile + origin.factor_bytes() + tensor.nbytes + tensor.nbytes // 32


class _Predictions:
    """Predicts the rows of one tensor, in order of its blocks."""

    def __init__(self, io: StepIO, origin: Origin, result: DType, stored: Sequence[tuple[int, int]] | None) -> None:
        """`stored` are the exponents of a code, or None to choose them."""
        self._io, self._origin, self._result = io, origin, result
        self._kind = "float32" if origin.source is None else arithmetic(origin.source.dtype, result)
        self._stored = list(stored) if stored is not None else None
        self._held: tuple[int, list[Fixed]] | None = None
        self.exponents: list[tuple[int, int]] = []
        if self._stored is None:
            for block in origin.blocks:
                self.exponents += [self._choose(block, number) for number in range(len(block.contributions))]
        else:
            self.exponents = self._stored

    def _choose(self, block: Block, number: int) -> tuple[int, int]:
        import torch

        contribution = block.contributions[number]
        if contribution.is_dora or contribution.is_bias:
            return _NONE
        return choose_exponents(load_factors(self._io, contribution, torch.float64), self._kind) or _NONE

    def write(self, base: torch.Tensor, begin: int, out: torch.Tensor) -> None:
        """Rows of the base from row `begin` on, with the adapter added and rounded, to `out`, which may be `base`."""
        number = next((n for n, b in enumerate(self._origin.blocks) if b.begin <= begin < b.end), None)
        found = [] if number is None else self._factors(number)
        first = 0 if number is None else self._origin.blocks[number].begin
        predict(base, found, begin - first, self._kind, out, self._io.buffer)

    def _factors(self, number: int) -> list[Fixed]:
        import torch

        if self._held is None or self._held[0] != number:
            blocks = self._origin.blocks
            first = sum(len(block.contributions) for block in blocks[:number])
            found = []
            for contribution, exponents in zip(blocks[number].contributions, self.exponents[first:], strict=False):
                if exponents != _NONE:
                    factors = load_factors(self._io, contribution, torch.float64)
                    found.append(fix(factors, exponents, self._kind))
            self._held = number, found
        return self._held[1]

    def changes(self, begin: int) -> bool:
        """Whether the prediction of these rows is another than the base's bits."""
        source = self._origin.source
        assert source is not None
        if source.dtype != self._result:
            return True
        number = next((n for n, b in enumerate(self._origin.blocks) if b.begin <= begin < b.end), None)
        return number is not None and bool(self._factors(number))


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor as a vector of unsigned integers of its width."""
    import torch

    width = tensor.element_size()
    return tensor.view(-1).view(torch.uint8).numpy().view(f"u{width}")


def _cuts(origin: Origin, tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Row ranges of the chunks: no range crosses a block of the adapter, or the end of the base's rows."""
    if origin.needs_whole:
        yield 0, tensor.rows
        return
    common = tensor.rows if origin.source is None else min(tensor.rows, origin.source.rows)
    yield from tiles(common, tensor.columns, origin.block_rows)
    if tensor.rows > common:
        for begin, end in tiles(tensor.rows - common, tensor.columns):
            yield common + begin, common + end


def _first_rows(tensor: StoredTensor, rows: int) -> StoredTensor:
    """The first rows of a tensor seen as a matrix; the tensor itself where these are all."""
    if rows == tensor.rows:
        return tensor
    return replace(tensor, shape=(rows, tensor.columns), is_slice=True)


def _chunks(
    io: StepIO, origin: Origin, tuned: StoredTensor | None, rows: int, columns: int, cuts: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, torch.Tensor | None, torch.Tensor | None]]:
    """Row ranges with the base's rows (None where it has none) and the fine-tune's (None where it is not read)."""
    source = origin.source
    common = 0 if source is None else min(rows, source.rows)
    inner = [cut for cut in cuts if cut[1] <= common]
    rest = [cut for cut in cuts if cut[1] > common]
    if source is not None and inner:
        pair = [_first_rows(source, common), *([] if tuned is None else [_first_rows(tuned, common)])]
        # Restoring proves the result, so the base needs no proof of its own.
        for begin, end, found in io.chunks(*pair, ranges=inner, hashed=tuned is not None):
            yield begin, end, found[0], found[1] if tuned is not None else None
    if tuned is None:
        for begin, end in rest:
            yield begin, end, None, None
    elif rest:
        beyond = tuned
        if common:
            skipped = tuned.dtype.nbytes((common, columns))
            beyond = replace(tuned, shape=(rows - common, columns), offset=tuned.offset + skipped, is_slice=True)
        for begin, end, found in io.chunks(beyond, ranges=[(b - common, e - common) for b, e in rest]):
            yield begin + common, end + common, None, found[0]


@dataclass(frozen=True)
class ResidualStep(Step):
    """Codes what a tensor of the fine-tune has beyond its prediction. Leaves it as the part `code`, or nothing."""

    tuned: StoredTensor
    origin: Origin

    @property
    def name(self) -> str:
        return f"residual {self.tuned.name}"

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return tuple({tensor.key: tensor for tensor in (*self.origin.tensors, self.tuned)}.values())

    @property
    def scratch(self) -> int:
        return scratch(self.origin, self.tuned)

    def run(self, io: StepIO) -> StepResult:
        import torch

        tuned, source = self.tuned, self.origin.source
        predictions = _Predictions(io, self.origin, tuned.dtype, None)
        parts = [_BLOCKS.pack(len(self.origin.blocks), len(predictions.exponents))]
        parts += [_EXPONENTS.pack(*pair) for pair in predictions.exponents]
        exponent_bits = residual.EXPONENT_BITS.get(tuned.dtype.name, 0)
        same = source is not None and source.dtype == tuned.dtype and source.shape == tuned.shape
        cuts = list(_cuts(self.origin, tuned))
        for begin, end, base, wanted in _chunks(io, self.origin, tuned, tuned.rows, tuned.columns, cuts):
            assert wanted is not None
            actual = _bits(wanted)
            predictor, predicted = self._predict(io, predictions, base, begin, actual)
            left = not _equal(predicted, actual)
            data = residual.encode(predicted, actual, exponent_bits) if left else b""
            parts += [_CHUNK.pack(predictor, left, end - begin, len(data)), data]
            same = same and predictor is Predictor.BITS and not left
        if same:
            return StepResult({"bytes": 0})
        code = b"".join(parts)
        return StepResult({"bytes": len(code)}, {"code": torch.frombuffer(bytearray(code), dtype=torch.uint8)})

    def _predict(
        self, io: StepIO, predictions: _Predictions, base: torch.Tensor | None, begin: int, actual: np.ndarray
    ) -> tuple[Predictor, np.ndarray]:
        import numpy as np

        source, result = self.origin.source, self.tuned.dtype
        if source is None or base is None:
            return Predictor.NOTHING, np.zeros_like(actual)
        if source.dtype.arithmetic and result.arithmetic and predictions.changes(begin):
            value = io.buffer("value", base.numel(), result.to_torch).view(base.shape)
            predictions.write(base, begin, value)
            # Machines differ in the bits of what is not a number.
            if bool((value if value.element_size() > 1 else value.float()).isfinite().all()):
                return Predictor.VALUE, _bits(value)
        if source.dtype == result:
            return Predictor.BITS, _bits(base)
        return Predictor.NOTHING, np.zeros_like(actual)


def _equal(left: np.ndarray, right: np.ndarray) -> bool:
    return bool((left == right).all())


@dataclass(frozen=True)
class RestoreStep(OutputStep):
    """Writes a tensor of the fine-tune from its prediction and its code."""

    origin: Origin
    code: StoredTensor

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return tuple({tensor.key: tensor for tensor in (*self.origin.tensors, self.code)}.values())

    @property
    def scratch(self) -> int:
        return scratch(self.origin, self.output)

    def run(self, io: StepIO) -> StepResult:
        data = io.read(self.code).numpy().data
        try:
            self._restore(io, _Code.parse(data, self.output, self.origin))
        except ValueError as error:
            raise IntegrityError(
                f"The exact record of {self.output.name!r} in {self.code.source.name} is damaged ({error}); fetch the "
                "adapter again."
            ) from error
        return StepResult()

    def _restore(self, io: StepIO, code: _Code) -> None:
        output, origin = self.output, self.origin
        predictions = _Predictions(io, origin, output.dtype, code.exponents)
        decoder = residual.Decoder(residual.EXPONENT_BITS.get(output.dtype.name, 0))
        columns = output.shape[-1] if output.shape else 1
        rows = code.chunks[-1].end
        cuts = [(chunk.begin, chunk.end) for chunk in code.chunks]
        found = _chunks(io, origin, None, rows, columns, cuts)
        for chunk, (begin, end, base, _) in zip(code.chunks, found, strict=True):
            if base is not None and base.dtype == output.dtype.to_torch:
                value = base  # it is not needed any more
            else:
                value = io.buffer("value", (end - begin) * columns, output.dtype.to_torch).view(end - begin, columns)
            if chunk.predictor is Predictor.NOTHING:
                _bits(value).fill(0)
            elif base is None:
                raise ValueError("a chunk predicted by rows that the base does not have")
            elif chunk.predictor is Predictor.VALUE:
                if not (origin.source is not None and origin.source.dtype.arithmetic and output.dtype.arithmetic):
                    raise ValueError("a chunk predicted by the value of something that is not a number")
                predictions.write(base, begin, value)
            elif value is not base:
                raise ValueError("a chunk predicted by the bits of another dtype")
            if chunk.data is not None:
                decoder.decode(_bits(value), chunk.data)
            io.write(output, begin, value)


@dataclass(frozen=True)
class _Chunk:
    """`data` is the residual, or None where the prediction is right."""

    predictor: Predictor
    begin: int
    end: int
    data: memoryview | None


@dataclass(frozen=True)
class _Code:
    """A parsed code."""

    exponents: tuple[tuple[int, int], ...]
    chunks: tuple[_Chunk, ...]

    @classmethod
    def parse(cls, data: memoryview, output: TensorSpec, origin: Origin) -> _Code:
        """Check a code against the tensor that it is of. Raises ValueError."""
        position = 0

        def take(form: struct.Struct) -> tuple[int, ...]:
            nonlocal position
            if position + form.size > len(data):
                raise ValueError("it was cut short")
            values = form.unpack_from(data, position)
            position += form.size
            return values

        blocks, contributions = take(_BLOCKS)
        if blocks != len(origin.blocks) or contributions != sum(len(block.contributions) for block in origin.blocks):
            raise ValueError(f"it speaks of {contributions} contributions of the adapter in {blocks} blocks")
        exponents = []
        for _ in range(contributions):
            b, a = take(_EXPONENTS)
            if (b, a) != _NONE and max(abs(b), abs(a)) > 1000:
                raise ValueError(f"exponents {b} and {a}")
            exponents.append((b, a))
        rows, row, chunks = output.nbytes * 8 // output.dtype.bits // (output.shape[-1] if output.shape else 1), 0, []
        common = 0 if origin.source is None else min(rows, origin.source.rows)
        ends = {block.end for block in origin.blocks} | {common}
        while row < rows:
            kind, left, count, length = take(_CHUNK)
            end = row + count
            if not count or end > rows or any(row < edge < end for edge in ends) or kind > 2 or left > 1:
                raise ValueError(f"a chunk of {count} rows from row {row} on")
            if position + length > len(data) or (length and not left):
                raise ValueError("it was cut short")
            chunks.append(_Chunk(Predictor(kind), row, end, data[position : position + length] if left else None))
            position, row = position + length, end
        if position != len(data):
            raise ValueError("bytes after its end")
        return cls(tuple(exponents), tuple(chunks))

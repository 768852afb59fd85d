"""Tensors that are to be: what is stored, seen through views that cost nothing until they are computed.

A recipe has the shape and dtype of its result and the stored tensors it needs. One that is a stored tensor as it lies,
or reshaped, is copied as bytes; every other is computed once, when its step runs.

    A: (r, in)      B: (out, r)      E: experts
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from surgery.checkpoint import StoredTensor
from surgery.dtypes import F32, F64, DType
from surgery.errors import FormatError
from surgery.layout import TensorSpec
from surgery.plan import CopyStep, OutputStep, Step, StepResult
from surgery.source import read_bytes

if TYPE_CHECKING:
    import torch

    from surgery.execute import StepIO

Shape = tuple[int, ...]


class Recipe(ABC):
    """A tensor that is to be."""

    @property
    @abstractmethod
    def shape(self) -> Shape: ...

    @property
    @abstractmethod
    def dtype(self) -> DType: ...

    @property
    @abstractmethod
    def reads(self) -> tuple[StoredTensor, ...]:
        """The stored tensors it is made of, each once."""

    @property
    def stored(self) -> StoredTensor | None:
        """The stored tensor whose bytes are the result's, or None where something has to be computed."""
        return None

    @abstractmethod
    def compute(self, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        """The tensor. What `read` returns is shared and is not written to."""


@dataclass(frozen=True)
class Stored(Recipe):
    """A stored tensor, seen in another shape if one is given."""

    tensor: StoredTensor
    seen_as: Shape | None = None

    def __post_init__(self) -> None:
        if prod(self.shape) != prod(self.tensor.shape):
            raise ValueError(f"{self.tensor.name}: {self.tensor.shape} seen as {self.shape}")

    @property
    def shape(self) -> Shape:
        return self.tensor.shape if self.seen_as is None else self.seen_as

    @property
    def dtype(self) -> DType:
        return self.tensor.dtype

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return (self.tensor,)

    @property
    def stored(self) -> StoredTensor | None:
        return self.tensor

    def compute(self, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        return read(self.tensor).reshape(self.shape)


@dataclass(frozen=True)
class _Of(Recipe):
    """A recipe made of one other."""

    of: Recipe

    @property
    def shape(self) -> Shape:
        return self.of.shape

    @property
    def dtype(self) -> DType:
        return self.of.dtype

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return self.of.reads


@dataclass(frozen=True)
class Reshaped(_Of):
    """The same numbers in the same order, in another shape."""

    to: Shape

    @property
    def shape(self) -> Shape:
        return self.to

    @property
    def stored(self) -> StoredTensor | None:
        return self.of.stored

    def compute(self, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        return self.of.compute(read).reshape(self.to)


@dataclass(frozen=True)
class Rows(_Of):
    """Rows `begin` to `end`."""

    begin: int
    end: int

    @property
    def shape(self) -> Shape:
        return (self.end - self.begin, *self.of.shape[1:])

    def compute(self, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        return self.of.compute(read)[self.begin : self.end]


@dataclass(frozen=True)
class Columns(_Of):
    """Every `step`-th column of a matrix from `begin` on."""

    begin: int
    step: int

    @property
    def shape(self) -> Shape:
        rows, columns = self.of.shape
        return rows, len(range(self.begin, columns, self.step))

    def compute(self, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        return self.of.compute(read)[:, self.begin :: self.step]


@dataclass(frozen=True)
class Permuted(_Of):
    """The tensor with its dimensions in another order."""

    order: Shape

    @property
    def shape(self) -> Shape:
        return tuple(self.of.shape[number] for number in self.order)

    def compute(self, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        return self.of.compute(read).permute(self.order)


@dataclass(frozen=True)
class Scaled(_Of):
    """The tensor times a number, in float32 (float64 stays float64): exact for a power of two, else rounded once."""

    factor: float

    @property
    def dtype(self) -> DType:
        return wide(self.of.dtype)

    def compute(self, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        import torch

        # By way of float64, so that neither the factor nor the product is rounded before the end.
        return (self.of.compute(read).to(torch.float64) * self.factor).to(self.dtype.to_torch)


@dataclass(frozen=True)
class Cast(_Of):
    """The tensor in a wider float type: every number as it was."""

    to: DType

    @property
    def dtype(self) -> DType:
        return self.to

    def compute(self, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        return self.of.compute(read).to(self.to.to_torch)


@dataclass(frozen=True)
class Placed(Recipe):
    """A tensor of zeros with others placed in it, each at its own corner."""

    to: Shape
    kind: DType
    parts: tuple[tuple[Shape, Recipe], ...]

    @property
    def shape(self) -> Shape:
        return self.to

    @property
    def dtype(self) -> DType:
        return self.kind

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return _each_once(tensor for _, part in self.parts for tensor in part.reads)

    def compute(self, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        import torch

        result = torch.zeros(self.to, dtype=self.kind.to_torch)
        for corner, part in self.parts:
            place = tuple(slice(at, at + size) for at, size in zip(corner, part.shape, strict=True))
            result[place] = part.compute(read).to(result.dtype)
        return result


@dataclass(frozen=True)
class Number(Recipe):
    """A scalar."""

    value: float
    kind: DType

    @property
    def shape(self) -> Shape:
        return ()

    @property
    def dtype(self) -> DType:
        return self.kind

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return ()

    def compute(self, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:  # noqa: ARG002 - reads nothing
        import torch

        return torch.tensor(self.value, dtype=self.kind.to_torch)


def turned(matrix: Recipe) -> Recipe:
    """The transpose of a matrix; of a transpose, the matrix."""
    return matrix.of if isinstance(matrix, Permuted) and matrix.order == (1, 0) else Permuted(matrix, (1, 0))


def scaled(tensor: Recipe, factor: float) -> Recipe:
    """The tensor times a number; the tensor itself for 1, or for what float64 makes of 1 on the way."""
    return tensor if abs(factor - 1.0) < 1e-13 else Scaled(tensor, factor)


def padded(tensor: Recipe, shape: Shape) -> Recipe:
    """The tensor with zeros after it up to `shape`; the tensor itself where it has that shape."""
    if tensor.shape == shape:
        return tensor
    return Placed(shape, tensor.dtype, ((tuple(0 for _ in shape), tensor),))


def stacked(parts: tuple[Recipe, ...]) -> Recipe:
    """Matrices of equal width, one above the other."""
    placed, row = [], 0
    for part in parts:
        placed.append(((row, *(0 for _ in part.shape[1:])), part))
        row += part.shape[0]
    return Placed((row, *parts[0].shape[1:]), widest(parts), tuple(placed))


def interleaved(parts: tuple[Recipe, ...]) -> Recipe:
    """E matrices (out, r) as one (out, r*E) in which the expert varies fastest."""
    out, rank = parts[0].shape
    placed = tuple(((0, 0, number), Reshaped(part, (out, rank, 1))) for number, part in enumerate(parts))
    return Reshaped(Placed((out, rank, len(parts)), widest(parts), placed), (out, rank * len(parts)))


def wide(dtype: DType) -> DType:
    """float64 for float64, else float32."""
    return F64 if dtype.name == "F64" else F32


def widest(parts: tuple[Recipe, ...]) -> DType:
    """The one dtype of all parts, or float32 (float64 if one is) where they differ."""
    kinds = {part.dtype.name: part.dtype for part in parts}
    if len(kinds) == 1:
        return next(iter(kinds.values()))
    return kinds.get("F64") or wide(parts[0].dtype)


def _each_once(tensors: Iterable[StoredTensor]) -> tuple[StoredTensor, ...]:
    return tuple({tensor.key: tensor for tensor in tensors}.values())


@dataclass(frozen=True)
class RecipeStep(OutputStep):
    """Computes one output tensor from its recipe."""

    recipe: Recipe

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return self.recipe.reads

    @property
    def scratch(self) -> int:
        return sum(tensor.nbytes for tensor in self.reads) + 5 * self.output.nbytes

    def run(self, io: StepIO) -> StepResult:
        io.write(self.output, 0, self.recipe.compute(io.shared))
        return StepResult()


def step_for(key: str, recipe: Recipe) -> Step:
    """The step that writes a recipe's tensor under `key`: a copy of bytes where that is all it takes."""
    output = TensorSpec(key, recipe.dtype, recipe.shape)
    stored = recipe.stored
    return RecipeStep(output, recipe) if stored is None else CopyStep(output, stored)


_FORMATS = {"F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i", "I16": "<h", "U8": "<B"}


def read_number(tensor: StoredTensor) -> float:
    """The value of a stored scalar, such as an alpha."""
    if tensor.numel != 1 or tensor.dtype.name not in (*_FORMATS, "BF16"):
        raise FormatError(f"Tensor {tensor.name!r} is {tensor.dtype} of shape {list(tensor.shape)}, expected a number.")
    data = read_bytes(tensor.source, tensor.offset, tensor.nbytes)
    if tensor.dtype.name == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    return float(struct.unpack(_FORMATS[tensor.dtype.name], data)[0])

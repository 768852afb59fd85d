"""What an expert's matrix is made of, and the steps that write it.

A plain copy moves as bytes and needs no torch. Everything else is a `Recipe`: it sees the dense matrix some rows at a
time, is asked for one expert after another, and gives that expert's rows. The dense matrix is read once for all.
Random streams are keyed by (seed, name of the tensor written), so that nothing depends on threads or order.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.checkpoint import StoredTensor
from surgery.errors import NonFiniteError
from surgery.execute import StepIO
from surgery.layout import TensorSpec
from surgery.plan import OutputStep, Step, StepResult

if TYPE_CHECKING:
    import numpy as np
    import torch

# The next rows of the dense matrix to the expert's, in float32 or in the dense dtype.
Rows = Callable[["torch.Tensor"], "torch.Tensor"]


class CountingRows(ABC):
    """Rows that have something to say when all of them are made."""

    @abstractmethod
    def __call__(self, dense: torch.Tensor) -> torch.Tensor:
        """The expert's rows for the next rows of the dense matrix."""

    @abstractmethod
    def finish(self) -> Mapping[str, object]:
        """Check what was made; what there is to report, JSON values only."""


def stream(seed: int, name: str) -> np.random.Generator:
    """A random stream of its own for each name: Philox, whose bits are the same on every machine."""
    import numpy as np

    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


class Recipe(ABC):
    """How an expert's matrix comes out of a dense one."""

    source: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the expert's matrix."""
        return self.source.shape

    @abstractmethod
    def start(self, io: StepIO, name: str) -> Rows:
        """Begin the matrix that will be stored under `name`."""

    @property
    def scratch(self) -> int:
        """Bytes held beside the tiles."""
        return 0

    @property
    def whole(self) -> bool:
        """Whether it must see the dense matrix in one piece."""
        return False

    @property
    def drawn(self) -> bool:
        """Whether it draws numbers, from a stream that is named after what is written: no two of its experts agree."""
        return False


@dataclass(frozen=True)
class Same(Recipe):
    """The dense matrix as it is: for stacks, whose experts cannot be copied each for itself."""

    source: StoredTensor

    def start(self, _io: StepIO, _name: str) -> Rows:
        return lambda dense: dense


@dataclass(frozen=True)
class Noisy(Recipe):
    """The dense matrix with Gaussian noise on it, drawn in float32 and rounded once with the sum.

    `std` is absolute, or with `relative` a share of the matrix's own standard deviation.
    """

    source: StoredTensor
    std: float
    relative: bool
    seed: int

    @property
    def drawn(self) -> bool:
        return True

    def start(self, io: StepIO, name: str) -> Rows:
        import torch

        generator = stream(self.seed, name)
        std = self.std * (_deviation(io, self.source) if self.relative else 1.0)

        def rows(dense: torch.Tensor) -> torch.Tensor:
            noise = generator.standard_normal(dense.shape, dtype="float32")
            return dense.to(torch.float32) + std * torch.from_numpy(noise)

        return rows


@dataclass(frozen=True)
class Redrawn(Recipe):
    """The dense matrix with a share of the intermediate dimension drawn anew: Drop-Upcycling (arXiv:2502.19261).

    The positions are the same in gate, up and down of one expert: `positions` names their stream. New entries are
    normal with the mean and the standard deviation of the entries that they replace. The paper also permutes the
    dimension; a permutation of it changes nothing in what an expert computes, so it is left out.

    Attributes:
        axis: 0 where the intermediate dimension counts the rows, 1 where it counts the columns.
        positions: the stream of the positions, one for all matrices of an expert.
    """

    source: StoredTensor
    share: float
    axis: int
    seed: int
    positions: str

    @property
    def scratch(self) -> int:
        return self.source.nbytes

    @property
    def drawn(self) -> bool:
        return True

    def start(self, io: StepIO, name: str) -> Rows:
        import torch

        size = (self.source.rows, self.source.columns)[self.axis]
        count = max(1, round(self.share * size))
        chosen = stream(self.seed, self.positions).choice(size, count, replace=False)
        chosen.sort()
        index = torch.from_numpy(chosen)
        mean, std = _moments(io, self.source, index, self.axis)
        generator = stream(self.seed, name)
        done = 0

        def rows(dense: torch.Tensor) -> torch.Tensor:
            nonlocal done
            made = dense.to(torch.float32, copy=True)
            here = _within(index, done, done + dense.shape[0]) if self.axis == 0 else index
            part = made[here] if self.axis == 0 else made[:, here]
            drawn = mean + std * torch.from_numpy(generator.standard_normal(tuple(part.shape), dtype="float32"))
            if self.axis == 0:
                made[here] = drawn
            else:
                made[:, here] = drawn
            done += dense.shape[0]
            return made

        return rows


@dataclass(frozen=True)
class Columns(Recipe):
    """Some columns of the dense matrix, scaled: `down_proj` of a small expert. Exact if the scale is a power of two."""

    source: StoredTensor
    begin: int
    end: int
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.source.shape[0], self.end - self.begin)

    def start(self, _io: StepIO, _name: str) -> Rows:
        return lambda dense: dense[:, self.begin : self.end].float() * self.scale


def rows_of(tensor: StoredTensor, begin: int, end: int) -> StoredTensor:
    """Rows `begin` to `end` of a stored matrix, as a stored tensor of their own."""
    width = tensor.dtype.nbytes(tensor.shape[1:])
    shape = (end - begin, *tensor.shape[1:])
    return replace(tensor, shape=shape, offset=tensor.offset + begin * width, is_slice=True)


@dataclass(frozen=True)
class ExpertsStep(Step):
    """Experts of one dense matrix, each stored under its own name. `made`: what to write, and its recipe."""

    made: tuple[tuple[TensorSpec, Recipe], ...]

    @property
    def name(self) -> str:
        return self.made[0][0].name

    @property
    def source(self) -> StoredTensor:
        return self.made[0][1].source

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return (self.source,)

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec, _ in self.made)

    @property
    def scratch(self) -> int:
        return _TILE_BYTES + max(recipe.scratch for _, recipe in self.made)

    def run(self, io: StepIO) -> StepResult:
        starts = [(specs, recipe.start(io, specs[0].name)) for specs, recipe in self._together()]
        for begin, _, (dense,) in io.chunks(self.source, whole=any(recipe.whole for _, recipe in self.made)):
            for specs, rows in starts:
                made = _rounded(rows(dense), specs[0])
                for spec in specs:
                    io.write(spec, begin, made)
        return StepResult({specs[0].name: rows.finish() for specs, rows in starts if isinstance(rows, CountingRows)})

    def _together(self) -> list[tuple[list[TensorSpec], Recipe]]:
        """Recipes with the outputs that each of them makes: experts that are alike are computed once."""
        found: list[tuple[list[TensorSpec], Recipe]] = []
        for spec, recipe in self.made:
            known = next((specs for specs, other in found if other == recipe and not recipe.drawn), None)
            if known is not None:
                known.append(spec)
            else:
                found.append(([spec], recipe))
        return found


@dataclass(frozen=True)
class StackStep(OutputStep):
    """Every expert in one tensor (experts, rows, columns): the matrices of an expert one below the other."""

    experts: tuple[tuple[Recipe, ...], ...]

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        found = [recipe.source for expert in self.experts for recipe in expert]
        return tuple({tensor.key: tensor for tensor in found}.values())

    @property
    def scratch(self) -> int:
        return _TILE_BYTES + max(recipe.scratch for expert in self.experts for recipe in expert)

    def run(self, io: StepIO) -> StepResult:
        written = 0
        report = {}
        for number, expert in enumerate(self.experts):
            for part, recipe in enumerate(expert):
                rows = recipe.start(io, f"{self.name}#{number}.{part}")
                for _, _, (dense,) in io.chunks(recipe.source, whole=recipe.whole):
                    made = _rounded(rows(dense), self.output)
                    io.write(self.output, written, made)
                    written += made.shape[0]
                if isinstance(rows, CountingRows):
                    report[f"{number}.{part}"] = rows.finish()
        return StepResult(report)


_TILE_BYTES = 48 << 20


def _rounded(rows: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    dtype = spec.dtype.to_torch
    if rows.dtype == dtype:
        return rows
    made = rows.to(dtype)
    if not bool(made.isfinite().all()):
        raise NonFiniteError(
            f"{spec.name!r} would hold NaN or infinity as {spec.dtype}; give less noise, or mend the dense weights."
        )
    return made


def _deviation(io: StepIO, source: StoredTensor) -> float:
    """The standard deviation of a whole matrix, in float64."""
    count, total, squares = 0, 0.0, 0.0
    for chunk in _pieces(io, source):
        wide = chunk.double()
        count, total, squares = count + wide.numel(), total + float(wide.sum()), squares + float(wide.square().sum())
    mean = total / count
    return math.sqrt(max(squares / count - mean * mean, 0.0))


def _moments(io: StepIO, source: StoredTensor, index: torch.Tensor, axis: int) -> tuple[float, float]:
    """Mean and standard deviation of the chosen rows or columns, in float64."""
    if not len(index):
        return 0.0, 0.0
    count, total, squares, begin = 0, 0.0, 0.0, 0
    for chunk in _pieces(io, source):
        end = begin + chunk.shape[0]
        wide = (chunk[:, index] if axis == 1 else chunk[_within(index, begin, end)]).double()
        count, total, squares = count + wide.numel(), total + float(wide.sum()), squares + float(wide.square().sum())
        begin = end
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean * mean, 0.0))


def _within(index: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Those positions that lie between two rows, counted from the first."""
    return index[(index >= begin) & (index < end)] - begin


def _pieces(io: StepIO, source: StoredTensor) -> Iterator[torch.Tensor]:
    """A stored matrix some rows at a time, from memory that it shares with the other recipes of the step."""
    whole = io.shared(source).view(source.rows, source.columns)
    rows = max(1, (8 << 20) // max(1, 4 * source.columns))
    for begin in range(0, source.rows, rows):
        yield whole[begin : begin + rows]

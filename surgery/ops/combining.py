"""The steps of combining: the spectrum of one module's combination, and its factors at a rank.

M: (out, in) what the method makes of the adapters' dW at a module; for `sum` and `cat` their weighted sum
B: (out, k)      A: (k, in)      scale: what a reader will multiply B A by
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from surgery.checkpoint import StoredTensor
from surgery.errors import NonFiniteError
from surgery.layout import TensorSpec
from surgery.linalg import OVERSAMPLING
from surgery.ops import cores, elementwise
from surgery.ops.as_peft import combine_factors
from surgery.ops.elementwise import HELD_BYTES, MergedMatrix, Task
from surgery.ops.factor import seed_for
from surgery.ops.slots import Slot, load_share, name_nonfinite
from surgery.plan import Step, StepResult
from surgery.tiling import TILE_ELEMENTS

if TYPE_CHECKING:
    import torch

    from surgery.execute import StepIO

# Methods whose result lies in the span of the factors, and all others.
FACTORED = ("sum", "cat", "tsv", "iso")
METHODS = (*FACTORED, *elementwise.METHODS, "linear")


@dataclass(frozen=True)
class Recipe:
    """How matrices are combined.

    Attributes:
        method: one of `METHODS`.
        density: share of the entries that pruning keeps.
        as_peft: work on A and B as PEFT does, see `as_peft`.
        dtype: of the stored factors, a safetensors name.
        seed: of everything random, combined with each module's name.
    """

    method: str = "sum"
    density: float = 0.5
    as_peft: bool = False
    dtype: str = "F32"
    seed: int = 0

    @property
    def on_entries(self) -> bool:
        """Whether M is made entry by entry."""
        return self.method in elementwise.METHODS and not self.as_peft

    def default_rank(self, slot: Slot) -> int:
        """The rank where none is asked for: of `cat` all of them, else the largest among the adapters."""
        ranks = [share.rank for share in slot.shares]
        if self.method == "cat":
            return sum(ranks)
        # What adds A and B has their rank, even where it is more than the matrix can have.
        return max(ranks) if self.as_peft and self.method != "sum" else min(max(ranks), slot.full)

    def most(self, slot: Slot) -> int:
        """The largest rank M can have."""
        return slot.full if self.on_entries else slot.stacked


@dataclass(frozen=True)
class _SlotStep(Step):
    """Reads the factors of one module, matrix by matrix."""

    slot: Slot
    recipe: Recipe

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return tuple(tensor for share in self.slot.shares for tensor in (share.lora.A, share.lora.B))

    def _thin_bytes(self, rank: int) -> int:
        """Bytes of factors: those read, their basis, and `rank` columns of a result with its sketch."""
        sides = self.slot.out_features + self.slot.in_features
        stacked = sum(share.rank for share in self.slot.shares)
        return sides * (32 * stacked + 40 * (rank + OVERSAMPLING))

    @property
    def _entry_bytes(self) -> int:
        """Bytes of tiles, and of M where it is held."""
        if not self.recipe.on_entries:
            return 0
        whole = 4 * self.slot.out_features * self.slot.in_features
        return 4 * TILE_ELEMENTS * (2 * len(self.slot.shares) + 6) + (whole if whole <= HELD_BYTES else 0)

    def _products(self, io: StepIO, expert: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        import torch

        wide = torch.float32 if self.recipe.on_entries or self.recipe.as_peft else torch.float64
        return [load_share(io, self.slot, share, expert, wide) for share in self.slot.shares]

    def _basis(self, io: StepIO, products: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> cores.SharedBasis:
        """The shared basis, whose cores are finite if the factors and their scales are."""
        basis = cores.shared_basis(products, self._scales)
        if not all(bool(core.isfinite().all()) for core in basis.cores):
            name_nonfinite(io, self.slot)
            self._refuse_range()
        return basis

    def _refuse_range(self) -> NoReturn:
        raise NonFiniteError(f"dW at {self.slot.name!r} is beyond the range of numbers; scale the adapters down.")

    @property
    def _scales(self) -> list[float]:
        return [share.weight * share.scale for share in self.slot.shares]

    def _merged(
        self, io: StepIO, products: Sequence[tuple[torch.Tensor, torch.Tensor]], expert: int
    ) -> tuple[MergedMatrix, float]:
        """The matrix of an element-wise method, and its squared norm."""

        def seeds(adapter: int) -> Callable[[int], int]:
            return lambda row: self._seed(f"{self.slot.name}#{expert}#{adapter}#{row}")

        tasks = [
            Task(B, A, share.scale, share.weight, seeds(share.adapter))
            for (B, A), share in zip(products, self.slot.shares, strict=True)
        ]
        merged = MergedMatrix(tasks, self.recipe.method, self.recipe.density, io.still_wanted)
        total = merged.squared_norm()
        if not math.isfinite(total):
            name_nonfinite(io, self.slot)
            self._refuse_range()
        return merged, total

    def _seed(self, stream: str) -> int:
        return seed_for(self.recipe.seed, stream)


@dataclass(frozen=True)
class SpectrumStep(_SlotStep):
    """Learns the leading squared singular values of M, at least `count` to a matrix, to choose ranks by."""

    count: int

    @property
    def name(self) -> str:
        return f"spectrum {self.slot.name} {self.count}"

    @property
    def scratch(self) -> int:
        return self._thin_bytes(self.count) + self._entry_bytes

    def run(self, io: StepIO) -> StepResult:
        import torch

        energies, spectra = [], []
        for expert in range(self.slot.experts):
            products = self._products(io, expert)
            if self.recipe.on_entries:
                merged, total = self._merged(io, products, expert)
                rank = min(self.count, self.slot.full)
                values = merged.truncated(rank, self._seed(f"{self.slot.name}#{expert}"), total).S.to(torch.float64)
            else:
                values = torch.linalg.svdvals(self._basis(io, products).total)
                total = float(values.square().sum())
            energies.append(total)
            spectra.append(values.square().tolist() if total else [])
        return StepResult({"energies": energies, "spectra": spectra})


@dataclass(frozen=True)
class CombineStep(_SlotStep):
    """Writes the factors of one module at a rank, and measures what the stored factors leave out.

    Attributes:
        A, B: what is written.
        rank: of each matrix.
        scale: what a reader will multiply B A by; B is divided by it.
    """

    A: TensorSpec
    B: TensorSpec
    rank: int
    scale: float

    @property
    def name(self) -> str:
        return f"combine {self.slot.name}"

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        return self.A, self.B

    @property
    def scratch(self) -> int:
        stored = self.A.nbytes + self.B.nbytes if self.slot.experts > 1 else 0
        return self._thin_bytes(self.rank) + self._entry_bytes + 2 * stored

    def run(self, io: StepIO) -> StepResult:
        import torch

        found = [self._combine(io, expert) for expert in range(self.slot.experts)]
        # The stack as PEFT stores it: A expert by expert, B with the expert varying fastest; see `sites.Kind`.
        A = torch.cat([one.A for one in found])
        B = torch.stack([one.B for one in found], dim=2).reshape(self.slot.out_features, -1)
        for spec, factor in ((self.A, A), (self.B, B)):
            io.write(spec, 0, factor.cpu().reshape(-1, spec.shape[-1]))
        sums = {
            "energy": sum(one.energy for one in found),
            "error": sum(one.error for one in found),
            "sum_energy": sum(one.sum_energy for one in found),
            "from_sum": sum(one.from_sum for one in found),
        }
        return StepResult({**sums, "excess": max(one.excess for one in found), "rank": self.rank})

    def _combine(self, io: StepIO, expert: int) -> _Combined:
        products = self._products(io, expert)
        basis = self._basis(io, products)
        if self.recipe.as_peft:
            return self._as_peft(products, basis, expert)
        if self.recipe.on_entries:
            return self._on_entries(io, products, basis, expert)
        return self._in_basis(products, basis)

    def _in_basis(self, products: Sequence[tuple[torch.Tensor, torch.Tensor]], basis: cores.SharedBasis) -> _Combined:
        """`sum`, `cat`, `tsv` and `iso`, exactly, in the basis that the factors share."""
        import torch

        target = basis.total
        if self.recipe.method == "cat":
            B = torch.cat([B * scale for (B, _), scale in zip(products, self._scales, strict=True)], dim=1)
            A = torch.cat([A for _, A in products])
        else:
            if self.recipe.method == "tsv":
                ranks = cores.shared_out(self.rank, [min(share.rank, self.slot.full) for share in self.slot.shares])
                found = cores.task_vectors(basis.cores, ranks)
            elif self.recipe.method == "iso":
                found = cores.isotropic(basis.total, self.rank)
            else:
                found = cores.leading(basis.total, self.rank)
            if self.recipe.method != "sum":
                target = found.core
            B, A = cores.balanced(basis, found)
        B, A = self._stored(B), A.to(self._dtype)
        if self.recipe.dtype != "F32" and self.recipe.method != "cat":
            A = cores.refit(basis, target, B.to(torch.float64) * self.scale).to(self._dtype)
        error = cores.squared_distance(basis, target, B.to(torch.float64) * self.scale, A)
        return self._measured(basis, B, A, cores.squared(target), error)

    def _on_entries(
        self,
        io: StepIO,
        products: Sequence[tuple[torch.Tensor, torch.Tensor]],
        basis: cores.SharedBasis,
        expert: int,
    ) -> _Combined:
        """The element-wise methods: M by tiles, then the randomised SVD of it."""
        import torch

        merged, total = self._merged(io, products, expert)
        svd = merged.truncated(self.rank, self._seed(f"{self.slot.name}#{expert}"), total)
        root = svd.S.sqrt()
        B, A = self._stored(svd.U * root), (root[:, None] * svd.V.T).to(self._dtype)
        if self.recipe.dtype != "F32":
            A = merged.refit(B.to(torch.float32) * self.scale).to(self._dtype)
        error = merged.squared_error(B.to(torch.float32) * self.scale, A.to(torch.float32))
        return self._measured(basis, B, A, total, error, svd.excess)

    def _as_peft(
        self, products: Sequence[tuple[torch.Tensor, torch.Tensor]], basis: cores.SharedBasis, expert: int
    ) -> _Combined:
        """What PEFT's `add_weighted_adapter` computes; the error is the distance from the weighted sum."""
        import torch

        if self.recipe.method == "sum":
            B, A = cores.one_sided(basis, cores.leading(basis.total, self.rank))
        elif self.recipe.method == "cat":  # PEFT puts weight and scale into A
            B = torch.cat([B for B, _ in products], dim=1)
            A = torch.cat([A * s.weight * s.scale for (_, A), s in zip(products, self.slot.shares, strict=True)])
        else:

            def seed(number: int, factor: str) -> int:
                return self._seed(f"{self.slot.name}#{expert}#{self.slot.shares[number].adapter}#{factor}")

            B, A = combine_factors(products, self._scales, self.recipe.method, self.recipe.density, seed)
        B, A = self._stored(B), A.to(self._dtype)
        error = cores.squared_distance(basis, basis.total, B.to(torch.float64) * self.scale, A)
        return self._measured(basis, B, A, cores.squared(basis.total), error)

    @property
    def _dtype(self) -> torch.dtype:
        return self.A.dtype.to_torch

    def _stored(self, B: torch.Tensor) -> torch.Tensor:
        return (B / self.scale).to(self._dtype)

    def _measured(
        self,
        basis: cores.SharedBasis,
        B: torch.Tensor,
        A: torch.Tensor,
        energy: float,
        error: float,
        excess: float = 0.0,
    ) -> _Combined:
        import torch

        total = cores.squared(basis.total)
        same = self.recipe.as_peft or self.recipe.method in ("sum", "cat")
        from_sum = error
        if not same:
            from_sum = cores.squared_distance(basis, basis.total, B.to(torch.float64) * self.scale, A)
        if not all(map(math.isfinite, (energy, error, total, from_sum))):
            self._refuse_range()
        return _Combined(B, A, energy, error, total, from_sum, excess)


@dataclass(frozen=True)
class _Combined:
    """One matrix: its stored factors and squared norms; `from_sum` is the squared distance from the weighted sum."""

    B: torch.Tensor
    A: torch.Tensor
    energy: float
    error: float
    sum_energy: float
    from_sum: float
    excess: float

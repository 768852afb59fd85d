"""The steps of an analysis: one matrix of the base each, alone or with the updates that adapters bring to it.

W: (out, in), or (in, out) as stored; float32      B: (out, r)      A: (r, in)      dW = B A, scales folded into B
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from surgery.analysis.measures import (
    GRAM_ROWS,
    cosine,
    describe,
    norm_of,
    overlap,
    ratio,
    singular_values,
    without_zeros,
)
from surgery.analysis.places import Place
from surgery.analysis.report import PairReport, UpdateReport
from surgery.checkpoint import StoredTensor
from surgery.errors import NonFiniteError
from surgery.linalg import OVERSAMPLING, full_svd, truncated_svd
from surgery.ops.deltas import load_factors
from surgery.ops.factor import seed_for
from surgery.ops.subspaces import Update, chance_norm, decompose, projected_norm
from surgery.plan import Step, StepResult
from surgery.tiling import TILE_ELEMENTS, tiles

if TYPE_CHECKING:
    import torch

    from surgery.execute import StepIO
    from surgery.ops.fitting import Contribution

# Up to this smaller side a full decomposition in float64 takes less than a second.
EXACT_SIDE = 512


@dataclass(frozen=True)
class _MatrixStep(Step):
    """Reads one matrix of the base."""

    place: Place

    @property
    def _matrix_bytes(self) -> int:
        return 4 * self.place.tensor.numel

    def _load(self, io: StepIO) -> torch.Tensor:
        """W as it is stored, in float32. Raises `NonFiniteError` for one that holds NaN or infinity."""
        import torch

        stored = self.place.tensor
        W = io.buffer("weight", stored.numel, torch.float32).view(stored.rows, stored.columns)
        for begin, end, (rows,) in io.chunks(stored):
            W[begin:end].copy_(rows)
        if not math.isfinite(norm_of(W)):
            raise NonFiniteError(
                f"Tensor {stored.name!r} in {stored.source.name} holds NaN or infinity, which has no singular values; "
                "mend it, or leave it out with --targets."
            )
        return W.to(io.device)


@dataclass(frozen=True)
class SpectrumStep(_MatrixStep):
    """All singular values of W, of which about `values` are listed."""

    values: int

    @property
    def name(self) -> str:
        return f"spectrum {self.place.name}"

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return (self.place.tensor,)

    @property
    def scratch(self) -> int:
        side = min(self.place.shape)
        return self._matrix_bytes + 8 * (3 * side * side + GRAM_ROWS * side) + 4 * TILE_ELEMENTS

    def run(self, io: StepIO) -> StepResult:
        W = self._load(io)
        io.still_wanted()
        found = describe(singular_values(W), self.values)
        return StepResult({"norm": norm_of(W), "spectrum": asdict(found)})


@dataclass(frozen=True)
class CompareStep(_MatrixStep):
    """What each adapter's dW is beside W, and beside the other adapters' dW.

    Attributes:
        directions: side of the tables phi(i, j), at most.
        values: singular values that are listed, about.
        seed: of the randomised SVD that finds the leading directions of a large W.
    """

    directions: int
    values: int
    seed: int

    @property
    def name(self) -> str:
        return f"compare {self.place.name}"

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        loras = [c.lora for contributions in self.place.factors.values() for c in contributions]
        found = [self.place.tensor, *(tensor for lora in loras for tensor in (lora.A, lora.B))]
        return tuple({tensor.key: tensor for tensor in found}.values())

    @property
    def scratch(self) -> int:
        ranks = [sum(_rank(c) for c in contributions) for contributions in self.place.factors.values()]
        sides = sum(self.place.shape)
        wide = 4 * self._matrix_bytes if min(self.place.shape) <= EXACT_SIDE else 0
        thin = sides * (24 * sum(ranks) + 16 * (max(ranks) + OVERSAMPLING))
        return self._matrix_bytes + wide + thin + 12 * TILE_ELEMENTS

    def run(self, io: StepIO) -> StepResult:
        W = self._load(io)
        norm = norm_of(W)
        updates = {number: self._update(io, number) for number in self.place.factors}
        most = max(len(update.S) for update, _ in updates.values())
        own = self._leading(W, max(most, 1), norm)
        reports = [self._report(W, norm, number, *found, own) for number, found in updates.items()]
        pairs = [
            PairReport(
                left=left,
                right=right,
                cosine=cosine(updates[left][0], updates[right][0]),
                output=overlap(updates[left][0].U, updates[right][0].U, self.directions),
                input=overlap(updates[left][0].V, updates[right][0].V, self.directions),
            )
            for left, right in combinations(updates, 2)
        ]
        return StepResult(
            {"norm": norm, "updates": [asdict(one) for one in reports], "pairs": [asdict(one) for one in pairs]}
        )

    def _update(self, io: StepIO, number: int) -> tuple[Update, int]:
        """The decomposition of an adapter's dW without directions that are zero, and the rank of its factors."""
        import torch

        lefts, rights = [], []
        for contribution in self.place.factors[number]:
            factors = load_factors(io, contribution, torch.float64)
            B, A = factors.B * factors.scale, factors.A
            if not (bool(B.isfinite().all()) and bool(A.isfinite().all())):
                self._name_nonfinite(io, contribution)
            if factors.transposed != self.place.transposed:  # this one has in and out the other way round
                B, A = A.T, B.T
            lefts.append(B)
            rights.append(A)
        found = decompose(torch.cat(lefts, dim=1), torch.cat(rights))
        if not math.isfinite(found.norm):
            raise NonFiniteError(f"dW at {self.place.name!r} is beyond the range of numbers; scale the adapter down.")
        return without_zeros(found), sum(_rank(c) for c in self.place.factors[number])

    def _name_nonfinite(self, io: StepIO, contribution: Contribution) -> None:
        for stored in (contribution.lora.B, contribution.lora.A):
            if not bool(io.read(stored).double().isfinite().all()):
                raise NonFiniteError(
                    f"Tensor {stored.name!r} in {stored.source.name} holds NaN or infinity; mend the adapter or train "
                    "it again."
                )
        raise NonFiniteError(f"dW at {self.place.name!r} is beyond the range of numbers; scale the adapter down.")

    def _leading(self, W: torch.Tensor, rank: int, norm: float) -> Update:
        """The leading singular triplets of W (out, in): by a full decomposition where W is small, else randomised."""
        if min(W.shape) <= EXACT_SIDE:
            found = full_svd(W.double(), rank)
        else:
            found = truncated_svd(W, rank, seed_for(self.seed, self.place.name), norm**2)
        U, V = (found.V, found.U) if self.place.transposed else (found.U, found.V)
        return Update(U.double(), found.S.double(), V.double())

    def _report(
        self, W: torch.Tensor, norm: float, number: int, update: Update, rank: int, own: Update
    ) -> UpdateReport:
        count = len(update.S)
        sides = (update.V, update.U) if self.place.transposed else (update.U, update.V)
        seen = projected_norm(*sides, _tiles(W)) if count else 0.0
        # So little is what sums in float64 leave where W has nothing.
        seen = seen if seen > 1e-12 * norm else 0.0
        chance = chance_norm(count, self.place.shape, norm)
        return UpdateReport(
            adapter=number,
            rank=rank,
            directions=count,
            change=ratio(update.norm, norm),
            spectrum=describe(update.S, self.values),
            seen=seen,
            own=float(own.S[:count].norm()),
            chance=chance,
            amplification=ratio(update.norm, seen) if count else None,
            chance_amplification=ratio(update.norm, chance) if count else None,
            output=overlap(update.U, own.U[:, :count], self.directions) if norm else None,
            input=overlap(update.V, own.V[:, :count], self.directions) if norm else None,
        )


def _rank(contribution: Contribution) -> int:
    return contribution.lora.A.shape[0] // contribution.experts


def _tiles(W: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    for begin, end in tiles(*W.shape):
        yield begin, W[begin:end]

"""The steps of an extraction: the difference of two stored weights, read tile by tile, and its factorisation.

D: (out, in) tuned - base, float32      B: (out, k)      A: (k, in)
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.checkpoint import StoredTensor
from surgery.dtypes import BY_NAME
from surgery.errors import NonFiniteError
from surgery.hashing import hash_tensor
from surgery.linalg import (
    OVERSAMPLING,
    Truncated,
    balanced_factors,
    full_svd,
    refit_A,
    squared_error,
    squared_norm,
    truncated_svd,
)
from surgery.pairing import SitePair, TensorPair
from surgery.plan import Step, StepResult
from surgery.sites import Kind, Piece

if TYPE_CHECKING:
    import torch

    from surgery.execute import StepIO


@dataclass(frozen=True)
class SvdOptions:
    """How a difference is factored.

    Attributes:
        method: `randomized` (subspace iteration with a certificate) or `exact` (LAPACK's full SVD).
        dtype: of the stored factors, a safetensors name; float32 keeps the optimum, bfloat16 halves the file.
        seed: of the random sketches, combined with each site's name.
        allow_nonfinite: take a difference that is not a number for no change, instead of refusing.
    """

    method: str = "randomized"
    dtype: str = "F32"
    seed: int = 0
    allow_nonfinite: bool = False


def seed_for(seed: int, name: str) -> int:
    """A random stream of its own for each name, the same whatever is computed beside it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class _SiteStep(Step):
    """Reads the differences of one site, matrix by matrix."""

    pair: SitePair
    svd: SvdOptions

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return (*self.pair.left.tensors, *self.pair.right.tensors)

    def _difference(self, io: StepIO, number: int) -> tuple[torch.Tensor, float, float]:
        """D of matrix `number`, ||W||^2 of the base and ||D||^2. D is overwritten by the next call."""
        import torch

        site = self.pair.right
        # A weight stored (in, out) on both sides is factored as it lies: D^T has the same singular values.
        D = io.buffer("difference", site.out_features * site.in_features, torch.float32)
        lefts, rights = self.pair.left.matrices[number], site.matrices[number]
        turned = all(piece.transposed for piece in (*lefts, *rights))
        D = D.view(site.in_features, site.out_features).T if turned else D.view(site.out_features, site.in_features)
        base = 0.0
        if [(p.tensor.shape, p.begin, p.transposed) for p in lefts] == [
            (p.tensor.shape, p.begin, p.transposed) for p in rights
        ]:
            for left, right in zip(lefts, rights, strict=True):
                place = _place(D, right)
                for begin, end, (old, new) in io.chunks(left.tensor, right.tensor):
                    base += _subtract(io, place[begin:end], old, new)
        else:
            for left in lefts:
                place = _place(D, left)
                for begin, end, (old,) in io.chunks(left.tensor):
                    place[begin:end].copy_(old)
                    base += squared_norm(place[begin:end])
            for right in rights:
                place = _place(D, right)
                for begin, end, (new,) in io.chunks(right.tensor):
                    place[begin:end].copy_(new.to(torch.float64) - place[begin:end])
        energy = squared_norm(D)
        if not math.isfinite(energy):
            self._name_nonfinite(io, lefts, rights)
            torch.nan_to_num_(D, nan=0.0, posinf=0.0, neginf=0.0)
            base, energy = base if math.isfinite(base) else 0.0, squared_norm(D)
        return D.to(io.device), base, energy

    def _name_nonfinite(self, io: StepIO, lefts: tuple[Piece, ...], rights: tuple[Piece, ...]) -> None:
        if self.svd.allow_nonfinite:
            return
        for role, pieces in (("BASE", lefts), ("TUNED", rights)):
            for piece in pieces:
                for _, _, (tile,) in io.chunks(piece.tensor):
                    if not bool(tile.double().isfinite().all()):
                        raise NonFiniteError(
                            f"{role}: tensor {piece.tensor.name!r} in {piece.tensor.source.name} holds NaN or "
                            "infinity; mend it, or pass --allow-nonfinite to count such entries as unchanged."
                        )
        raise NonFiniteError(
            f"The difference at {self.pair.name!r} is beyond the range of float32; pass --allow-nonfinite to count "
            "such entries as unchanged."
        )

    def _decompose(self, D: torch.Tensor, rank: int, number: int, energy: float) -> Truncated:
        if self.svd.method == "exact":
            return full_svd(D, rank)
        turned = D.stride(0) == 1 and D.stride(1) != 1
        seed = seed_for(self.svd.seed, f"{self.pair.name}#{number}")
        found = truncated_svd(D.T if turned else D, rank, seed, energy)
        return Truncated(found.V, found.S, found.U, found.excess, found.passes) if turned else found

    @property
    def _matrix_bytes(self) -> int:
        return 4 * self.pair.right.out_features * self.pair.right.in_features

    @property
    def _tile_bytes(self) -> int:
        return 16 << 20


def _place(D: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The rows of D that a piece fills, as a view in the orientation in which the piece is stored, as a matrix."""
    rows = D[piece.begin : piece.end]
    return rows.T if piece.transposed else rows.view(piece.tensor.rows, piece.tensor.columns)


def _subtract(io: StepIO, place: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> float:
    """Set place = new - old, in float32 (by way of float64, where an input is float64). Returns ||old||^2."""
    import torch

    if torch.float64 in (old.dtype, new.dtype):
        wide = old.to(torch.float64)
        place.copy_(new.to(torch.float64).sub_(wide))
        return squared_norm(wide)
    narrow = io.buffer("old", old.numel(), torch.float32).view_as(old)
    narrow.copy_(old)
    place.copy_(new)
    place.sub_(narrow)
    flat = narrow.view(-1)
    return float(torch.dot(flat, flat))


@dataclass(frozen=True)
class SpectrumStep(_SiteStep):
    """Learns a site's leading squared singular values, at least `count` to a matrix, to choose ranks by."""

    count: int

    @property
    def name(self) -> str:
        return f"spectrum {self.pair.name} {self.count}"

    @property
    def scratch(self) -> int:
        site = self.pair.right
        return (
            self._matrix_bytes
            + self._tile_bytes
            + 16 * (self.count + OVERSAMPLING) * (site.out_features + site.in_features)
        )

    def run(self, io: StepIO) -> StepResult:
        energies, spectra = [], []
        for number in range(len(self.pair.right.matrices)):
            D, _, energy = self._difference(io, number)
            energies.append(energy)
            spectra.append(
                [value**2 for value in self._decompose(D, self.count, number, energy).S.tolist()] if energy else []
            )
        return StepResult({"energies": energies, "spectra": spectra})


@dataclass(frozen=True)
class FactorStep(_SiteStep):
    """Factors every matrix of a site at one rank, and measures what the stored factors leave out.

    Leaves the tensors that PEFT stores, under the names `A` and `B`, or nothing where nothing changed. `scale` is what
    a reader will multiply B A by; B is divided by it.
    """

    rank: int
    scale: float

    @property
    def name(self) -> str:
        return f"factor {self.pair.name}"

    @property
    def scratch(self) -> int:
        site = self.pair.right
        thin = 4 * (self.rank + OVERSAMPLING) * (site.out_features + site.in_features)
        return self._matrix_bytes + self._tile_bytes + thin * (4 + len(site.matrices))

    def run(self, io: StepIO) -> StepResult:
        import torch

        dtype = BY_NAME[self.svd.dtype].to_torch
        factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        base = energy = error = 0.0
        excess, passes = 0.0, 0
        for number in range(len(self.pair.right.matrices)):
            D, base_here, energy_here = self._difference(io, number)
            svd = self._decompose(D, self.rank, number, energy_here)
            B, A = balanced_factors(svd)
            if dtype != torch.float32:
                B = (B / self.scale).to(dtype)
                A = refit_A(D, B.float() * self.scale).to(dtype)
            else:
                B = B / self.scale
            error += squared_error(D, B.float() * self.scale, A.float())
            base, energy = base + base_here, energy + energy_here
            excess, passes = max(excess, svd.excess), max(passes, svd.passes)
            factors.append((B.cpu(), A.cpu()))
        report = {
            "base": base,
            "energy": energy,
            "error": error,
            "excess": excess,
            "passes": passes,
            "rank": self.rank,
        }
        if energy == 0.0:
            return StepResult(report)
        return StepResult(report, dict(zip("AB", _peft_form(self.pair, factors), strict=True)))


def _peft_form(pair: SitePair, factors: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in the shapes in which PEFT stores them for this kind of site; see `sites.Kind`."""
    import torch

    site = pair.right
    if site.kind is Kind.PARAMETER:
        A = torch.cat([A for _, A in factors])  # (E*r, in), expert by expert
        B = torch.stack([B for B, _ in factors], dim=2)  # (out, r, E): the expert varies fastest
        return A, B.reshape(B.shape[0], -1)
    ((B, A),) = factors
    rank = B.shape[1]
    if site.kind is Kind.EMBEDDING:  # dW (rows, columns) = (lora_embedding_B lora_embedding_A)^T
        return B.T.contiguous(), A.T.contiguous()
    if site.kind is Kind.CONV:
        channels = site.in_features // math.prod(site.kernel)
        return A.reshape(rank, channels, *site.kernel), B.reshape(-1, rank, *(1 for _ in site.kernel))
    return A, B


@dataclass(frozen=True)
class CompareStep(Step):
    """Finds out whether, and by how much, two stored tensors of one shape differ."""

    pair: TensorPair
    allow_nonfinite: bool = True

    @property
    def name(self) -> str:
        return f"compare {self.pair.name}"

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return self.pair.left, self.pair.right

    @property
    def scratch(self) -> int:
        return 64 << 20

    def run(self, io: StepIO) -> StepResult:
        import torch

        left, right = self.pair.left, self.pair.right
        if (
            left.dtype.torch_name is None or right.dtype.torch_name is None
        ):  # packed types: compare what they are stored as
            return StepResult({"changed": left.dtype != right.dtype or hash_tensor(left) != hash_tensor(right)})
        if left.dtype == right.dtype and all(
            torch.equal(old.view(torch.uint8), new.view(torch.uint8)) for _, _, (old, new) in io.chunks(left, right)
        ):
            return StepResult({"changed": False})
        base, energy, changed = 0.0, 0.0, left.dtype == right.dtype
        for _, _, (old, new) in io.chunks(left, right):
            if left.dtype.arithmetic and right.dtype.arithmetic:
                wide, difference = old.to(torch.float64), new.to(torch.float64)
                difference.sub_(wide)
                base, energy = base + squared_norm(wide), energy + squared_norm(difference)
            else:
                changed = changed or not torch.equal(old, new)
        changed = changed or energy != 0.0
        finite = math.isfinite(base) and math.isfinite(energy)
        if not finite and not self.allow_nonfinite:
            raise NonFiniteError(
                f"Tensor {self.pair.name!r} holds NaN or infinity, in BASE or in TUNED; mend it, or pass "
                "--allow-nonfinite."
            )
        return StepResult({"changed": changed, "base": base if finite else None, "energy": energy if finite else None})

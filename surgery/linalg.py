"""Truncated singular value decomposition with a certificate, and the low-rank arithmetic around it. Pure functions.

    D: (m, n) the difference to be factored, float32     k: rank     l: columns of the sketch, k + oversampling
    U: (m, k), S: (k,) descending, V: (n, k), so that D ~ U diag(S) V^T
    B = U sqrt(S): (m, k)     A = sqrt(S) V^T: (k, n)

Sources: Halko, Martinsson, Tropp, *Finding structure with randomness* (2011), algorithms 4.4 and 5.1, with the number
of power iterations chosen on the data as described at `truncated_svd`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from surgery.tiling import tiles

if TYPE_CHECKING:
    import torch

OVERSAMPLING = 16
# Passes over D at most: for pure noise, which has no gap to converge by, the error is then within 1e-3 of the least.
MAX_PASSES = 24
# Stop once the error is expected to be within this factor of the least possible error for the rank.
TOLERANCE = 5e-4
# Below this share of ||D||^2 the squared error can no longer be had as a difference of float32 energies.
RESOLUTION = 1e-5


@dataclass(frozen=True)
class Truncated:
    """A truncated decomposition.

    Attributes:
        U, S, V: orthonormal columns (m, k), descending values (k,), orthonormal columns (n, k); float32.
        excess: estimate of error / least possible error - 1; 0 for a full decomposition.
        passes: how many times D was multiplied by a sketch; 0 for a full decomposition.
    """

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor
    excess: float
    passes: int


class Products(Protocol):
    """A matrix D (m, n) that is known by its products alone: `subspace_svd` asks for no more."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def device(self) -> str | torch.device: ...
    def times(self, right: torch.Tensor) -> torch.Tensor:
        """D right: (m, l) for right (n, l)."""
        ...

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """D^T left: (n, l) for left (m, l)."""
        ...

    def squared_error(self, B: torch.Tensor, A: torch.Tensor) -> float:
        """||D - B A||^2 for B (m, k) and A (k, n)."""
        ...


@dataclass(frozen=True)
class _Held:
    """A matrix in memory."""

    D: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.D.shape[0], self.D.shape[1]

    @property
    def device(self) -> torch.device:
        return self.D.device

    def times(self, right: torch.Tensor) -> torch.Tensor:
        return self.D @ right

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        return (left.T @ self.D).T

    def squared_error(self, B: torch.Tensor, A: torch.Tensor) -> float:
        return squared_error(self.D, B, A)


def full_svd(D: torch.Tensor, rank: int) -> Truncated:
    """LAPACK's full SVD, cut to `rank`: the reference for `truncated_svd`, at 30 to 100 times its cost."""
    import torch

    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return Truncated(U[:, :rank].contiguous(), S[:rank].clone(), Vh[:rank].T.contiguous(), 0.0, 0)


def truncated_svd(D: torch.Tensor, rank: int, seed: int, energy: float | None = None) -> Truncated:
    """The leading `rank` singular triplets of D by subspace iteration, as many passes as the spectrum asks for.

    Each pass multiplies D, from alternating sides, by an orthonormal sketch of l = rank + 16 columns. The squares of
    the sketch's leading singular values sum to what rank k captures of ||D||^2; they grow towards the sum of the
    leading sigma^2, so the squared error falls towards the least. It falls geometrically, which foretells how far it
    has still to fall; iteration stops when that would change the error by less than `TOLERANCE`. The estimate that
    remains is `excess`.

    A matrix hardly larger than the sketch is decomposed in full instead.

    Args:
        D: (m, n) float32.
        rank: at least 1; more than min(m, n) is cut to that.
        seed: of the random sketch; drawn on the CPU whatever device D is on.
        energy: ||D||^2 in float64, if it is known already.
    """
    m, n = D.shape
    rank = min(rank, m, n)
    if is_small(m, n, rank):
        return full_svd(D, rank)
    total = squared_norm(D) if energy is None else energy
    return subspace_svd(_Held(D), rank, seed, total)


def is_small(m: int, n: int, rank: int) -> bool:
    """Whether a matrix is hardly larger than the sketch for `rank`, so that its full SVD is the better choice."""
    return 2 * (rank + OVERSAMPLING) >= min(m, n)


def subspace_svd(D: Products, rank: int, seed: int, total: float) -> Truncated:
    """`truncated_svd` of a matrix by its products. It must not be small (`is_small`); `total` is ||D||^2."""
    import torch

    m, n = D.shape
    width = rank + OVERSAMPLING
    if total == 0.0:
        none = torch.zeros(rank, device=D.device)
        return Truncated(torch.eye(m, rank, device=D.device), none, torch.eye(n, rank, device=D.device), 0.0, 0)
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(n, width, generator=generator, dtype=torch.float32).to(D.device)
    basis = torch.linalg.qr(D.times(sketch)).Q  # (m, l), the range of D seen through random columns
    errors: list[float] = []
    excess = math.inf
    from_left = True
    for passes in range(2, MAX_PASSES + 1):
        image = D.transposed_times(basis) if from_left else D.times(basis)  # (n, l) or (m, l)
        energies = _ritz_energies(image)
        error = total - math.fsum(energies[:rank])
        if error < RESOLUTION * total:  # the difference has drowned in rounding: measure what the sketch leaves out
            left, right = (basis, image.T) if from_left else (image, basis.T)
            error = D.squared_error(left, right) + math.fsum(energies[rank:])
        errors.append(error)
        excess = _excess(errors, energies[-1] / energies[rank - 1] if energies[rank - 1] else 0.0, total)
        if excess <= TOLERANCE or passes == MAX_PASSES:
            break
        basis, from_left = torch.linalg.qr(image).Q, not from_left
    # D ~ basis image^T seen from the left, image basis^T from the right: decompose the thin factor.
    Q, R = torch.linalg.qr(image)
    inner, S, outer = torch.linalg.svd(R)  # (l, l)
    near, far = Q @ inner[:, :rank], basis @ outer[:rank].T
    U, V = (far, near) if from_left else (near, far)
    return Truncated(U, S[:rank].clone(), V, excess, passes)


def _ritz_energies(image: torch.Tensor) -> list[float]:
    """Squared singular values of a thin matrix (m, l), descending, in float64."""
    import torch

    wide = image.to(torch.float64)
    energies: list[float] = torch.linalg.eigvalsh(wide.T @ wide).flip(0).clamp(min=0).tolist()
    return energies


def _excess(errors: list[float], decay: float, total: float) -> float:
    """Foreseen error / least error - 1, by extending the fall of the squared error as a geometric series.

    Its ratio is the last one seen or `decay`, (sigma_l / sigma_k)^2, whichever is larger: the theory's ratio for the
    slowest direction, which the first passes may not show yet.
    """
    if len(errors) < 2:
        return math.inf
    gain = max(errors[-2] - errors[-1], 0.0)
    before = errors[-3] - errors[-2] if len(errors) > 2 else math.inf
    ratio = min(max(gain / before if before > 0 else 0.0, decay), 0.9)
    to_come = gain * ratio / (1 - ratio)
    # The rounding of D's own entries bounds what error still means anything in float32.
    floor = total * 2.0**-46
    error = max(errors[-1], floor)
    least = max(error - to_come, floor)
    return math.sqrt(error / least) - 1


def balanced_factors(svd: Truncated) -> tuple[torch.Tensor, torch.Tensor]:
    """B (m, k) and A (k, n) with the singular values shared evenly, so that both have entries of like size."""
    root = svd.S.sqrt()
    return svd.U * root, root[:, None] * svd.V.T


def refit_A(D: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The A (k, n) that minimises ||D - B A|| for a given B (m, k): least squares by the normal equations in float64.

    B's columns are nearly orthogonal, so the equations are as well conditioned as its singular values squared.
    """
    import torch

    wide = B.to(torch.float64)
    left, right = (wide.T @ wide).cpu(), (B.T @ D).to("cpu", torch.float64)
    # gelsd, which only the CPU has, copes with columns of zeros.
    solution: torch.Tensor = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return solution.to(D.device, D.dtype)


def squared_error(D: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> float:
    """||D - B A||^2 from the factors themselves, tile by tile, summed in float64. B and A in float32."""
    import torch

    rows, columns = D.shape
    rest = torch.empty(max((end - begin for begin, end in tiles(rows, columns)), default=0), columns, device=D.device)
    total = 0.0
    for begin, end in tiles(rows, columns):
        tile = torch.addmm(D[begin:end], B[begin:end], A, alpha=-1, out=rest[: end - begin])
        total += squared_norm(tile)
    return total


def squared_norm(tensor: torch.Tensor) -> float:
    """||tensor||^2: norms of the rows in the tensor's own precision, their squares summed in float64."""
    import torch

    return float(torch.linalg.vector_norm(tensor, dim=-1).to(torch.float64).square().sum())


def factored_squared_norm(B: torch.Tensor, A: torch.Tensor) -> float:
    """||B A||^2 = trace((B^T B) (A A^T)) in float64, without forming the product."""
    import torch

    left, right = B.to(torch.float64), A.to(torch.float64)
    return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)

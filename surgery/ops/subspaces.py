"""How an update relates to the weights it is for: spectra, shared subspaces, amplification. Pure functions, factored.

Hu et al., "LoRA" (2021), section 7 and appendices G and H. Everything is computed from factors in float64; an m x n dW
is never formed.

    B: (m, r), A: (r, n), dW = s B A = U diag(S) V^T     W: (m, n)     k: min(r, m, n)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Rows begin to end of W, in order, for all of W.
RowTiles = Iterable[tuple[int, "torch.Tensor"]]


@dataclass(frozen=True)
class Update:
    """The singular value decomposition of dW: U (m, k), S (k,) descending, V (n, k), all in float64."""

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor

    @property
    def norm(self) -> float:
        """||dW||, Frobenius."""
        return float(self.S.norm())


def decompose(B: torch.Tensor, A: torch.Tensor, scale: float = 1.0) -> Update:
    """The singular values and vectors of `scale` B A, by a thin QR of both factors and an SVD of the r x r core."""
    import torch

    left, L = torch.linalg.qr(B.to(torch.float64))
    right, R = torch.linalg.qr(A.to(torch.float64).T)
    inner, S, outer = torch.linalg.svd(scale * L @ R.T, full_matrices=False)
    return Update(left @ inner, S, right @ outer.T)


def effective_rank(S: torch.Tensor) -> float:
    """The exponential of the entropy of the singular values' shares (Roy and Vetterli 2007): 1 to k, 0 for zeros."""
    total = float(S.sum())
    if total == 0.0:
        return 0.0
    shares = S.double() / total
    shares = shares[shares > 0]  # after the division, in which the smallest can vanish
    return math.exp(-float((shares * shares.log()).sum()))


def similarity(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """phi(i, j) = ||U_i^T V_j||^2 / min(i, j) for all leading i and j columns: the mean squared cosine of the angles.

    Args:
        left: (d, a), orthonormal columns, leading ones first.
        right: (d, b), likewise.

    Returns:
        (a, b), from 0 (orthogonal) to 1 (one holds the other); phi(i, j) is at [i - 1, j - 1]. With p = min(i, j) and
        the projection distance d^2 = p - sum of squared cosines it is 1 - d^2 / p; appendix G misprints that.
    """
    import torch

    squares = (left.T.double() @ right.double()).square().cumsum(0).cumsum(1)
    rows, columns = (torch.arange(1, size + 1, dtype=torch.float64) for size in squares.shape)
    return squares / torch.minimum(rows[:, None], columns[None]).to(squares.device)


def chance_similarity(i: int, j: int, d: int) -> float:
    """The mean of phi(i, j) for random subspaces of d dimensions: max(i, j) / d."""
    return max(i, j) / d


def projected_norm(U: torch.Tensor, V: torch.Tensor, tiles: RowTiles) -> float:
    """||U^T W V||, with W given in tiles of rows: what of W lies in the directions of an update."""
    import torch

    inner = torch.zeros(U.shape[1], V.shape[1], dtype=torch.float64, device=U.device)
    for begin, rows in tiles:
        wide = rows.to(torch.float64)
        inner += U[begin : begin + len(wide)].double().T @ (wide @ V.double())
    return float(inner.norm())


def chance_norm(rank: int, shape: tuple[int, int], norm: float) -> float:
    """The root mean square of ||U^T W V|| for random directions: r ||W|| / sqrt(m n)."""
    return rank * norm / math.sqrt(shape[0] * shape[1])


def amplification(update: Update, rank: int, tiles: Callable[[], RowTiles]) -> float:
    """||dW|| / ||U^T W V|| for the leading `rank` directions of dW: how much the update makes of what W has there.

    Infinite where W has nothing there; NaN for an update of zeros.
    """
    if update.norm == 0.0:
        return math.nan
    inside = projected_norm(update.U[:, :rank], update.V[:, :rank], tiles())
    return update.norm / inside if inside else math.inf

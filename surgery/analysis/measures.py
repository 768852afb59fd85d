"""Numbers about singular values and subspaces, as the report holds them. Pure functions; see `ops.subspaces`.

S: (k,) descending      U: (m, k), V: (n, k) orthonormal columns, leading ones first
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from surgery.analysis.report import Overlap, Spectrum
from surgery.linalg import squared_norm
from surgery.ops.subspaces import Update, chance_similarity, effective_rank, similarity

if TYPE_CHECKING:
    import torch

# Rows of W that are widened to float64 at a time.
GRAM_ROWS = 1024


def positions(count: int, most: int) -> tuple[int, ...]:
    """Up to `most` of the numbers 1 to `count`, the first and the last among them, in even steps of the logarithm.

    >>> positions(5, 8), positions(1000, 7)
    ((1, 2, 3, 4, 5), (1, 2, 3, 10, 32, 100, 316, 1000))
    """
    if count <= most:
        return tuple(range(1, count + 1))
    steps = [count ** (step / (most - 1)) for step in range(most)]
    return tuple(sorted({1, 2, 3, count, *(min(count, round(step)) for step in steps)}))


def describe(S: torch.Tensor, most: int) -> Spectrum:
    """A spectrum with at most about `most` of its values listed."""
    squares = S.double().square()
    total = float(squares.sum())
    first = float(S[0]) if len(S) else 0.0
    listed = positions(len(S), most)
    return Spectrum(
        norm=math.sqrt(total),
        rank=len(S),
        positions=listed,
        values=tuple(float(S[place - 1]) for place in listed),
        stable_rank=total / first**2 if first**2 else 0.0,
        effective_rank=effective_rank(S),
        rank_90=_holding(squares, 0.9),
        rank_99=_holding(squares, 0.99),
    )


def _holding(squares: torch.Tensor, share: float) -> int:
    """How many of the leading squares sum to a share of all; 0 where all are zero."""
    total = float(squares.sum())
    return int((squares.cumsum(0) < share * total).sum()) + 1 if total else 0


def singular_values(W: torch.Tensor) -> torch.Tensor:
    """All singular values of W (m, n), float32, as float64 (min(m, n),), descending.

    From the eigenvalues of the smaller of W W^T and W^T W in float64, which are had in half the time of a decomposition
    of W itself. Values below 1e-7 of the first are rounding, as they are in float32 weights.
    """
    import torch

    m, n = W.shape
    tall = W if m >= n else W.T
    gram = torch.zeros(min(m, n), min(m, n), dtype=torch.float64, device=W.device)
    for begin in range(0, max(m, n), GRAM_ROWS):
        wide = tall[begin : begin + GRAM_ROWS].double()
        gram.addmm_(wide.T, wide)
    found: torch.Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
    return found


def without_zeros(update: Update) -> Update:
    """An update with its true directions only: what lies below rounding is none."""
    m, n = len(update.U), len(update.V)
    real = update.S[:1] * (max(m, n) * 2.0**-52) < update.S
    count = int(real.sum())
    return Update(update.U[:, :count], update.S[:count], update.V[:, :count])


def overlap(left: torch.Tensor, right: torch.Tensor, directions: int) -> Overlap | None:
    """Of two subspaces of one space, (d, a) and (d, b); None where one has no directions."""
    if not left.shape[1] or not right.shape[1]:
        return None
    phi = similarity(left, right).clamp(0, 1)
    grid = tuple(tuple(map(float, row)) for row in phi[:directions, :directions].tolist())
    return Overlap(grid, float(phi[-1, -1]), chance_similarity(left.shape[1], right.shape[1], len(left)))


def cosine(left: Update, right: Update) -> float | None:
    """<dW, dW'> / (||dW|| ||dW'||), from the decompositions alone; None where one is zero."""
    if not left.norm or not right.norm:
        return None
    shared = (left.U.T @ right.U) * (left.V.T @ right.V)
    inner = float((left.S[:, None] * shared * right.S).sum()) / (left.norm * right.norm)
    return min(max(inner, -1.0), 1.0)


def ratio(above: float, below: float) -> float | None:
    """A quotient; None where it is no finite number."""
    value = above / below if below else math.inf
    return value if math.isfinite(value) else None


def norm_of(W: torch.Tensor) -> float:
    """||W||, Frobenius, with its squares summed in float64."""
    return math.sqrt(squared_norm(W))

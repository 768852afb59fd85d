"""Sums of low-rank products in the small basis they share. Pure functions; dW is never formed.

    dW_t = s_t B_t A_t: (m, n)      t: one of T adapters      r_t: its rank      R = r_1 + ... + r_T
    L: (m, min(m, R)), orthonormal columns, from a thin QR of [B_1 ... B_T]
    N: (n, min(n, R)), orthonormal columns, from a thin QR of [A_1; ...; A_T]^T
    C_t: the core, dW_t = L C_t N^T

A singular value decomposition of a core gives that of its matrix. Everything is computed in float64: cores are small.

Sources: TSV: Gargiulo et al., *Task Singular Vectors: Reducing Task Interference in Model Merging* (2025); Iso-C:
Marczak et al., *No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces* (2025); both in
a shared basis: Panariello et al., *Accurate and Efficient Low-Rank Model Merging in Core Space* (2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# A direction this weak beside the strongest is rounding of float32 factors, not something an adapter learnt.
RESOLUTION = 2.0**-22


@dataclass(frozen=True)
class SharedBasis:
    """The matrices of several adapters in one basis: dW_t = `left` `cores[t]` `right`^T, in float64."""

    left: torch.Tensor
    right: torch.Tensor
    cores: tuple[torch.Tensor, ...]

    @cached_property
    def total(self) -> torch.Tensor:
        """The core of the sum of all dW_t."""
        result = self.cores[0]
        for core in self.cores[1:]:
            result = result + core
        return result


@dataclass(frozen=True)
class Triplets:
    """U diag(S) V^T within a shared basis: U (a, k), S (k,) not negative, V (b, k), in float64."""

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor

    @property
    def core(self) -> torch.Tensor:
        return (self.U * self.S) @ self.V.T


def shared_basis(products: Sequence[tuple[torch.Tensor, torch.Tensor]], scales: Sequence[float]) -> SharedBasis:
    """The basis of scales[t] * B A for each (B, A) of `products`, in float64."""
    import torch

    left, upper = torch.linalg.qr(torch.cat([B.to(torch.float64) for B, _ in products], dim=1))
    right, lower = torch.linalg.qr(torch.cat([A.to(torch.float64) for _, A in products]).T)
    cores, begin = [], 0
    for (B, _), scale in zip(products, scales, strict=True):
        end = begin + B.shape[1]
        cores.append((upper[:, begin:end] * scale) @ lower[:, begin:end].T)
        begin = end
    return SharedBasis(left, right, tuple(cores))


def leading(core: torch.Tensor, rank: int) -> Triplets:
    """The `rank` leading singular triplets: the nearest matrix of that rank (Eckart and Young)."""
    import torch

    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return Triplets(U[:, :rank], S[:rank], Vh[:rank].T)


def isotropic(core: torch.Tensor, rank: int) -> Triplets:
    """Iso-C: the `rank` leading singular vectors of the sum, each with the mean of their singular values.

    Directions weaker than rounding are left out of the mean and stay zero: they are no direction of any adapter.
    """
    found = leading(core, rank)
    real = _real(found.S)
    level = found.S[real].mean() if bool(real.any()) else found.S.sum()
    return Triplets(found.U, real * level, found.V)


def task_vectors(cores: Sequence[torch.Tensor], ranks: Sequence[int]) -> Triplets:
    """TSV merging: the leading singular triplets of each adapter, with their vectors made orthogonal to each other's.

    U = [U_1 ... U_T] is replaced by the nearest matrix with orthonormal columns, P Q^T for U = P D Q^T (orthogonal
    Procrustes), and V likewise; the singular values stay. Columns that lie in the span of the others (the same adapter
    twice) leave no direction of their own, and P Q^T is taken over the span only.
    """
    import torch

    found = [leading(core, rank) for core, rank in zip(cores, ranks, strict=True) if rank]
    U, V = (_orthogonal(torch.cat(parts, dim=1)) for parts in ([f.U for f in found], [f.V for f in found]))
    return Triplets(U, torch.cat([f.S for f in found]), V)


def _orthogonal(vectors: torch.Tensor) -> torch.Tensor:
    """The factor of the polar decomposition: orthonormal columns, or a partial isometry where they are dependent."""
    import torch

    P, D, Qh = torch.linalg.svd(vectors, full_matrices=False)
    result: torch.Tensor = (P * _real(D)) @ Qh
    return result


def _real(values: torch.Tensor) -> torch.Tensor:
    """Which of the descending singular values are more than rounding."""
    return values > values[:1] * RESOLUTION


def shared_out(rank: int, ranks: Sequence[int]) -> list[int]:
    """Split `rank` evenly over adapters of the given ranks; what one cannot use goes to the others, first come first.

    >>> shared_out(16, [16, 16]), shared_out(16, [4, 16, 16]), shared_out(5, [4, 4])
    ([8, 8], [4, 6, 6], [3, 2])
    """
    given = [0] * len(ranks)
    for _ in range(min(rank, sum(ranks))):
        open_to = [number for number, most in enumerate(ranks) if given[number] < most]
        given[min(open_to, key=lambda number: given[number])] += 1
    return given


def balanced(basis: SharedBasis, found: Triplets) -> tuple[torch.Tensor, torch.Tensor]:
    """B (m, k) and A (k, n) of `found`, with the singular values shared evenly between them."""
    root = found.S.sqrt()
    return basis.left @ (found.U * root), (root[:, None] * found.V.T) @ basis.right.T


def one_sided(basis: SharedBasis, found: Triplets) -> tuple[torch.Tensor, torch.Tensor]:
    """B = U S and A = V^T, as PEFT's `svd` has them."""
    return basis.left @ (found.U * found.S), found.V.T @ basis.right.T


def refit(basis: SharedBasis, core: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The A (k, n) that minimises ||L core N^T - B A|| for a given B (m, k), in float64: what rounding B asks for."""
    import torch

    wide = B.to(torch.float64)
    left, right = (wide.T @ wide).cpu(), ((wide.T @ basis.left) @ core).cpu()
    # gelsd, which only the CPU has, copes with columns of zeros.
    solution: torch.Tensor = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return solution.to(B.device) @ basis.right.T


def squared_distance(basis: SharedBasis, core: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> float:
    """||L core N^T - B A||^2 for any B (m, k) and A (k, n), in float64 and without cancellation.

    With B = L b + b' and A = a N^T + a', where b' and a' are orthogonal to the basis, the difference falls into four
    parts that are orthogonal to each other: L (core - b a) N^T, L b a', b' a N^T and b' a'.
    """
    import torch

    B, A = B.to(torch.float64), A.to(torch.float64)
    b, a = basis.left.T @ B, A @ basis.right
    b_rest, a_rest = torch.addmm(B, basis.left, b, alpha=-1), torch.addmm(A, a, basis.right.T, alpha=-1)
    inside = squared(core - b @ a)
    grams = {"b": b.T @ b, "b_rest": b_rest.T @ b_rest}
    others = {"a": a @ a.T, "a_rest": a_rest @ a_rest.T}
    pairs = (("b", "a_rest"), ("b_rest", "a"), ("b_rest", "a_rest"))
    return inside + sum(max(float((grams[left] * others[right]).sum()), 0.0) for left, right in pairs)


def squared(core: torch.Tensor) -> float:
    """||core||^2, which is that of the matrix it stands for."""
    return float(core.square().sum())

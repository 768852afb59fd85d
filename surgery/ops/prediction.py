"""A prediction of weights from a base and factors whose bits do not depend on what computes them. Pure functions.

    W: (rows, columns) the base      B: (out, r)      A: (r, in)      s: scale      dW = s B A

Both factors are rounded to integers times a power of two, B' = round(s B 2^b) and A' = round(A 2^a), so coarse that
every product and every partial sum of B' A' is an integer that the floating-point type of the arithmetic holds exactly.
Then order of summation, fused multiply-add, threads and device cannot matter: there is nothing to round. By Cauchy and
Schwarz no partial sum exceeds the norm of a row of B' times that of a column of A', which is kept within 2^24 for
float32 and 2^53 for float64. A power of two changes nothing of this, so A' is multiplied by 2^-(a+b). What follows is
done weight by weight, in a fixed order: the product is added to W, and that is rounded to the dtype of the result.

The exponents a and b are found with sums that do depend on their order, so they are stored, not found again.
In float32 the entries of the factors keep about ten bits; what that costs in accuracy, some 6e-4 of dW, is less than
the rounding of bfloat16 takes. Results of more than eight significant bits are predicted in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from surgery.dtypes import DType
from surgery.ops.deltas import Factors

if TYPE_CHECKING:
    import torch

# Types of at most eight significant bits: float32 predicts them well enough, and twice as fast.
_COARSE = {"BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
# Integers up to this power of two are exact, with a margin for the rounding to integers and of the norms themselves.
_EXACT_BITS = {"float32": 24, "float64": 53}
_MARGIN = 0.05
# What lies beyond is left out: it would be rounded where the type's own exponents end.
_LARGEST_EXPONENT = {"float32": 100, "float64": 500}


# Elements that are predicted at a time: 512 KB in float32, of which there are two.
_TILE_ELEMENTS = 1 << 17


class Memory(Protocol):
    """`count` elements of memory that are valid until the slot is asked for again."""

    def __call__(self, slot: str, count: int, dtype: torch.dtype) -> torch.Tensor: ...


def arithmetic(base: DType, result: DType) -> str:
    """The torch type to predict in: a function of the two dtypes alone."""
    return "float32" if result.name in _COARSE and base.name != "F64" else "float64"


@dataclass(frozen=True)
class Fixed:
    """Factors in the type of the arithmetic, whose product is dW.

    Attributes:
        B: (out, r) integers.
        A: (r, in) integers times 2^-(a + b).
        transposed: whether the block holds the transpose of B A.
        whole: whether rows of the block are no rows of B A: a convolution.
    """

    B: torch.Tensor
    A: torch.Tensor
    transposed: bool
    whole: bool

    def rows(self, begin: int, end: int, out: torch.Tensor) -> torch.Tensor:
        """Rows `begin` to `end` of dW as the block stores it, (end - begin, columns), in `out` unless it is whole."""
        import torch

        if self.transposed:
            return torch.mm(self.A[:, begin:end].T, self.B.T, out=out)
        if self.whole:
            return torch.mm(self.B, self.A).view(-1, out.shape[1])[begin:end]
        return torch.mm(self.B[begin:end], self.A, out=out)


def choose_exponents(factors: Factors, kind: str) -> tuple[int, int] | None:
    """The exponents b and a for float64 factors; None where dW is zero or not finite, so that W alone predicts."""
    rows = float(factors.B.norm(dim=1).amax()) * abs(factors.scale)
    columns = float(factors.A.norm(dim=0).amax())
    if not (math.isfinite(rows) and math.isfinite(columns) and rows and columns):
        return None
    # Rounding to integers moves each of r entries by half at most: the norm of a row by half the root of r.
    slack = math.sqrt(factors.B.shape[1]) / 2
    half = _EXACT_BITS[kind] / 2 - _MARGIN
    room = 2.0**half - slack
    if room < 1:
        return None
    b, a = (math.floor(math.log2(room / norm)) for norm in (rows, columns))
    # Rounding both down may leave room for one more bit in one of them.
    if (rows * 2.0 ** (b + 1) + slack) * (columns * 2.0**a + slack) <= 2.0 ** (2 * half):
        b += 1
    return (b, a) if abs(a + b) <= _LARGEST_EXPONENT[kind] >= max(abs(a), abs(b)) else None


def fix(factors: Factors, exponents: tuple[int, int], kind: str) -> Fixed:
    """Round float64 factors to integers, times a power of two."""
    import torch

    b, a = exponents
    dtype = getattr(torch, kind)
    B = (factors.B * factors.scale).mul_(2.0**b).round_().to(dtype)
    A = (factors.A * 2.0**a).round_().mul_(2.0 ** -(a + b)).to(dtype)
    return Fixed(B, A, factors.transposed, bool(factors.shape))


def predict(W: torch.Tensor, found: Sequence[Fixed], begin: int, kind: str, out: torch.Tensor, memory: Memory) -> None:
    """W plus contributions, rounded to the dtype of `out`.

    Some rows at a time, which stay in a core's cache from the product to the rounding. Any number of rows would do:
    there is no order in which the product could differ.

    Args:
        W: (rows, columns) of the base.
        found: contributions to the block the rows lie in, in order.
        begin: the first row within the block.
        kind: of the arithmetic, see `arithmetic`.
        out: (rows, columns), where the prediction goes; may be W.
        memory: hands out memory that is used again and again.
    """
    import torch

    dtype = getattr(torch, kind)
    rows, columns = W.shape
    step = rows if any(fixed.whole for fixed in found) else max(1, _TILE_ELEMENTS // max(columns, 1))
    for first in range(0, rows, step):
        part = W[first : first + step]
        total = memory("sum", part.numel(), dtype).view(part.shape).copy_(part)
        product = memory("product", part.numel(), dtype).view(part.shape)
        for fixed in found:
            total.add_(fixed.rows(begin + first, begin + first + len(part), product))
        out[first : first + step].copy_(total)

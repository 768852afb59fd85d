"""Experts in their three layouts: one module each, a stack for each projection, a fused stack as PEFT has it.

Whatever the layout, the factors of expert e of a fused `gate_up_proj` are A_e (r, in) and B_e, gate rows over up rows.

    taken apart    gate has A_e and the first rows of B_e, up has A_e and the others: exact, at the same rank
    put together   A_e = [A_gate; A_up] and B_e block-diagonal: exact, at the sum of the ranks; where gate and up have
                   the same A, at its rank

    A3: (E, r, in)      B3: (out, r, E), the expert fastest, as PEFT flattens them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgery.formats.exchange import Factors
from surgery.formats.recipes import (
    Columns,
    Placed,
    Recipe,
    Reshaped,
    Rows,
    interleaved,
    padded,
    scaled,
    stacked,
    widest,
)
from surgery.hashing import hash_tensor
from surgery.sites import Kind, Site


@dataclass(frozen=True)
class Projection:
    """The factors of one projection of all experts: A3 (E, r, in), B3 (out, r, E), and the scale of their product."""

    A3: Recipe
    B3: Recipe
    scale: float

    @property
    def rank(self) -> int:
        return self.A3.shape[1]


def is_per_expert(site: Site) -> bool:
    """Whether a site is a stack in memory whose experts are stored one by one."""
    return (
        site.kind is Kind.PARAMETER
        and len(site.matrices) > 1
        and not any(piece.tensor.is_slice or piece.transposed for matrix in site.matrices for piece in matrix)
    )


def take_apart(fused: Factors, site: Site) -> list[Factors]:
    """One module for each stored projection of each expert, under its stored name; dW is the same, exactly."""
    rank, found = fused.rank, []
    for number, matrix in enumerate(site.matrices):
        A = Rows(fused.A, number * rank, (number + 1) * rank)
        B = Columns(fused.B, number, fused.experts)
        for piece in matrix:
            module = piece.tensor.name.rpartition(".")[0]
            part = B if len(matrix) == 1 else Rows(B, piece.begin, piece.end)
            found.append(replace(fused, module=module, A=A, B=part, experts=0, parameter=False))
    return found


def projections_of(fused: Factors, site: Site) -> list[Projection]:
    """The projections of a fused stack, in the order of the stored pieces; they share A."""
    experts, rank = fused.experts, fused.rank
    A3 = Reshaped(fused.A, (experts, rank, fused.A.shape[1]))
    B3 = Reshaped(fused.B, (fused.B.shape[0], rank, experts))
    pieces = site.matrices[0]
    return [
        Projection(A3, B3 if len(pieces) == 1 else Rows(B3, piece.begin, piece.end), fused.scale) for piece in pieces
    ]


def projection_of(modules: Sequence[Factors | None], out: int, wide: int) -> Projection:
    """One projection of experts that are modules of their own; those without factors get zeros.

    Ranks are filled up with zeros to the largest, and B takes up a scale that differs from the first's.
    """
    present = [factors for factors in modules if factors is not None]
    rank = max(factors.rank for factors in present)
    scale = present[0].scale
    dtype = widest(tuple(factors.A for factors in present))
    nothing = Placed((rank, wide), dtype, ()), Placed((out, rank), widest(tuple(f.B for f in present)), ())
    parts = [
        nothing
        if factors is None
        else (padded(factors.A, (rank, wide)), padded(scaled(factors.B, factors.scale / scale), (out, rank)))
        for factors in modules
    ]
    A = stacked(tuple(A for A, _ in parts))
    B = interleaved(tuple(B for _, B in parts))
    return Projection(Reshaped(A, (len(parts), rank, wide)), Reshaped(B, (out, rank, len(parts))), scale)


def put_together(site: Site, parts: Sequence[Projection | None], same_A: bool) -> Factors:
    """A fused stack of the projections of a site, in the order of its pieces; a missing one gets zeros.

    Args:
        site: the stack in memory.
        parts: a projection for each piece of its matrices.
        same_A: whether all of them have the same A, which is then kept once.
    """
    present = [part for part in parts if part is not None]
    scale = present[0].scale
    experts, wide = len(site.matrices), site.in_features
    rank = present[0].rank if same_A else sum(part.rank for part in present)
    A_parts: list[tuple[tuple[int, ...], Recipe]] = []
    B_parts: list[tuple[tuple[int, ...], Recipe]] = []
    column = 0
    for piece, part in zip(site.matrices[0], parts, strict=True):
        if part is None:
            continue
        if not (same_A and A_parts):
            A_parts.append(((0, column, 0), part.A3))
        B_parts.append(((piece.begin, 0 if same_A else column, 0), scaled(part.B3, part.scale / scale)))
        column += part.rank
    if len(A_parts) == 1:
        A: Recipe = A_parts[0][1]
    else:
        A = Placed((experts, rank, wide), widest(tuple(part for _, part in A_parts)), tuple(A_parts))
    if len(B_parts) == len(site.matrices[0]) == 1:
        B: Recipe = B_parts[0][1]
    else:
        shape = (site.out_features, rank, experts)
        B = Placed(shape, widest(tuple(part for _, part in B_parts)), tuple(B_parts))
    return Factors(
        module=site.name,
        A=Reshaped(A, (experts * rank, wide)),
        B=Reshaped(B, (site.out_features, rank * experts)),
        alpha=scale * rank,
        experts=experts,
        parameter=True,
    )


def same_factors(left: Sequence[Factors | None], right: Sequence[Factors | None]) -> bool:
    """Whether two rows of experts have the same A, one by one, to the bit. Reads both where the names do not tell."""
    for one, other in zip(left, right, strict=True):
        if one is None or other is None or one.A.shape != other.A.shape:
            return False
        first, second = one.A.stored, other.A.stored
        if one.A == other.A:
            continue
        if first is None or second is None or first.dtype != second.dtype:
            return False
        if hash_tensor(first) != hash_tensor(second):
            return False
    return True

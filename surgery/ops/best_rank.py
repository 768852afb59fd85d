"""`--rank best`: for each module the rank that makes adapter and exact record smallest together.

A rank more costs (out + in) numbers of the adapter and saves what the prediction is better by. How many bytes the code
of what is left takes is estimated on a sample of the weights (`residual.estimate`), for ranks that grow by a third to a
half each; in between hardly anything is to be had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from surgery.checkpoint import StoredTensor
from surgery.dtypes import BY_NAME
from surgery.linalg import OVERSAMPLING
from surgery.ops.factor import SvdOptions, _SiteStep
from surgery.ops.residual import EXPONENT_BITS, estimate
from surgery.pairing import SitePair
from surgery.plan import StepResult
from surgery.sites import Piece, Site

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.execute import StepIO

GRID = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
START = 16
_SAMPLES = 1 << 16
_STRETCHES = 4


@dataclass(frozen=True)
class RankStep(_SiteStep):
    """Estimates the bytes of a site's code at each rank of the grid up to `count`, for all its matrices together."""

    count: int

    @property
    def name(self) -> str:
        return f"ranks {self.pair.name} {self.count}"

    @property
    def scratch(self) -> int:
        site = self.pair.right
        thin = 16 * (self.count + OVERSAMPLING) * (site.out_features + site.in_features)
        return self._matrix_bytes + self._tile_bytes + thin + 100 * _SAMPLES

    def run(self, io: StepIO) -> StepResult:
        ranks = grid(self.pair.right, self.count)
        energy, sizes = 0.0, [0.0] * len(ranks)
        for number, (lefts, rights) in enumerate(zip(self.pair.left.matrices, self.pair.right.matrices, strict=True)):
            D, _, found = self._difference(io, number)
            energy += found
            if not found:
                continue
            svd = self._decompose(D, ranks[-1], number, found)
            for left, right in _twins(lefts, rights):
                factors = (svd.U[right.begin : right.end].cpu() * svd.S.cpu(), svd.V.cpu())
                for place, size in enumerate(_sizes(io, left, right, factors, ranks)):
                    sizes[place] += size
        return StepResult({"energy": energy, "sizes": sizes})


def grid(site: Site, count: int) -> list[int]:
    """The ranks that are tried for a site."""
    full = min(site.out_features, site.in_features)
    return [rank for rank in GRID if rank <= min(count, full)]


def _twins(lefts: tuple[Piece, ...], rights: tuple[Piece, ...]) -> list[tuple[Piece, Piece]]:
    """Pieces stored alike on both sides; others are not predicted from one another."""
    pairs = list(zip(lefts, rights, strict=False))
    alike = all((a.tensor.shape, a.begin, a.transposed) == (b.tensor.shape, b.begin, b.transposed) for a, b in pairs)
    return pairs if len(lefts) == len(rights) and alike else []


def _sizes(
    io: StepIO, left: Piece, right: Piece, factors: tuple[torch.Tensor, torch.Tensor], ranks: list[int]
) -> list[float]:
    """Estimated bytes of a piece's code at each rank, from rows at several places."""
    import torch

    # Stored rows are output features, or input features of a transposed weight; both are one product.
    near, far = (factors[1], factors[0]) if right.transposed else factors
    rows, columns = len(near), len(far)
    each = max(1, min(rows, _SAMPLES // columns) // _STRETCHES)
    starts = sorted({(rows - each) * number // max(_STRETCHES - 1, 1) for number in range(_STRETCHES)})
    chosen = torch.tensor(sorted({row for start in starts for row in range(start, start + each)}))
    base, tuned = (
        torch.cat([_rows(io, piece.tensor, int(begin), int(end), columns) for begin, end in _stretches(chosen)])
        for piece in (left, right)
    )
    name = right.tensor.dtype.name
    value = base.float() if base.dtype != torch.float64 else base
    actual = _unsigned(tuned)
    sizes, before = [], 0
    for rank in ranks:
        if rank > before:
            value = value + near[chosen, before:rank] @ far[:, before:rank].T
            before = rank
        predicted = value.to(tuned.dtype)
        sizes.append(estimate(_unsigned(predicted), actual, EXPONENT_BITS.get(name, 0)) * rows / len(chosen))
    return sizes


def _stretches(chosen: torch.Tensor) -> list[tuple[int, int]]:
    """Sorted row numbers as ranges."""
    rows = chosen.tolist()
    cuts = [0, *(n + 1 for n, (a, b) in enumerate(pairwise(rows)) if b != a + 1), len(rows)]
    return [(rows[begin], rows[end - 1] + 1) for begin, end in pairwise(cuts)]


def _rows(io: StepIO, tensor: StoredTensor, begin: int, end: int, columns: int) -> torch.Tensor:
    width = tensor.dtype.bits // 8 * columns
    part = replace(tensor, shape=(end - begin, columns), offset=tensor.offset + begin * width, is_slice=True)
    return io.read(part)


def _unsigned(tensor: torch.Tensor) -> np.ndarray:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().view(f"u{tensor.element_size()}")


def parameter_bytes(site: Site, svd: SvdOptions) -> int:
    """What one rank of a site costs in the adapter."""
    return BY_NAME[svd.dtype].bits // 8 * len(site.matrices) * (site.out_features + site.in_features)


def choose(
    pairs: Mapping[str, SitePair], svd: SvdOptions, found: Mapping[str, Mapping[str, object]], count: Mapping[str, int]
) -> tuple[dict[str, int], list[str]]:
    """For each site that changed its best rank, and the sites whose best rank is the last one tried.

    An adapter has to have factors somewhere: where no site is worth any, the one that loses least gets rank 1.
    """
    ranks: dict[str, int] = {}
    losses: dict[str, float] = {}
    open_ended = []
    for name, report in found.items():
        if not report["energy"]:
            continue
        site = pairs[name].right
        sizes = report["sizes"]
        assert isinstance(sizes, list)
        tried = grid(site, count[name])
        totals = [size + rank * parameter_bytes(site, svd) for size, rank in zip(sizes, tried, strict=True)]
        place = min(range(len(totals)), key=totals.__getitem__)
        ranks[name] = tried[place]
        if len(totals) > 1:
            losses[name] = totals[1] - totals[0]
        if place == len(totals) - 1 and tried != grid(site, GRID[-1]):
            open_ended.append(name)
    if ranks and not any(ranks.values()):
        ranks[min(losses, key=losses.__getitem__)] = 1
    return ranks, open_ended

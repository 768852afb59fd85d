"""Merging several dW entry by entry, in row tiles: TIES, DARE and magnitude pruning. No dW is held whole.

    D_t = s_t B_t A_t: (m, n) of adapter t, float32      w_t: its weight      P_t: D_t after pruning      d: density

    magnitude-prune   sum of w_t P_t, P_t being the d m n largest entries of D_t
    dare-linear       sum of w_t P_t, P_t being a random share d of the entries of D_t, divided by d
    ties, dare-ties   as above, and of each entry only those P_t count whose sign wins; their mean, not their sum

The sign that wins is that of the sum of sign(w_t) P_t: an adapter of negative weight is one whose dW is turned round.
For positive weights this is what PEFT's `ties_svd`, `dare_linear_svd`, `dare_ties_svd` and `magnitude_prune_svd` do to
each dW before they factor it.

The largest entries are found exactly, without sorting or holding D_t: the bits of a float32's magnitude, read as an
integer, are in the order of the magnitudes. A first pass counts them by their upper 16 bits, which tells in which of
65,536 groups the last entry to be kept lies; a second counts that group by the lower 15. Then the bits of the smallest
kept magnitude are known, and how many entries of exactly that magnitude are kept: the first ones in row-major order.

Sources: TIES: Yadav et al. (2023); DARE: Yu et al. (2024); peft 0.21, `utils/merge_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from surgery.linalg import Truncated, full_svd, is_small, squared_norm, subspace_svd
from surgery.tiling import tiles

if TYPE_CHECKING:
    import torch

ELECTING = ("ties", "dare-ties")
RANDOM = ("dare-linear", "dare-ties")
METHODS = ("ties", "dare-ties", "dare-linear", "magnitude-prune")
# Merged matrices up to this size are held while they are factored; larger ones are made anew for each pass.
HELD_BYTES = 96 << 20
_LOW_BITS = 15


@dataclass(frozen=True)
class Cut:
    """The smallest magnitude to keep, as the bits of a float32, and how many entries of just that magnitude."""

    bits: int
    ties: int


def find_cut(parts: Callable[[], Iterable[torch.Tensor]], count: int) -> Cut | None:
    """Where to cut so that exactly `count` entries stay; None where none does.

    Args:
        parts: goes through the entries, float32 and finite, in the same order at every call.
        count: entries to keep, at most as many as there are.
    """
    import torch

    if count <= 0:
        return None
    upper = sum(torch.bincount(magnitude_bits(part) >> _LOW_BITS, minlength=1 << 16) for part in parts())
    group, left = _group_of(upper, count)

    def within(part: torch.Tensor) -> torch.Tensor:
        bits = magnitude_bits(part)
        return bits[(bits >> _LOW_BITS) == group] & ((1 << _LOW_BITS) - 1)

    lower = sum(torch.bincount(within(part), minlength=1 << _LOW_BITS) for part in parts())
    low, ties = _group_of(lower, left)
    return Cut((group << _LOW_BITS) | low, ties)


def _group_of(histogram: torch.Tensor | int, count: int) -> tuple[int, int]:
    """The group that holds the `count`-th entry from above, and how many of that group are still wanted."""
    import torch

    assert isinstance(histogram, torch.Tensor)
    at_least = histogram.flip(0).cumsum(0).flip(0)  # entries of this group and above
    group = int((at_least >= count).nonzero()[-1])
    above = int(at_least[group] - histogram[group])
    return group, count - above


def magnitude_bits(part: torch.Tensor) -> torch.Tensor:
    """The bits of each magnitude, in one row of integers that are ordered as the magnitudes are."""
    import torch

    return part.abs().view(-1).view(torch.int32)


class Pruner:
    """Prunes one matrix to its largest entries, tile after tile from the first."""

    def __init__(self, cut: Cut | None) -> None:
        self._cut = cut
        self._ties = cut.ties if cut else 0

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        """The tile with all but the largest entries set to zero. It may be changed in place."""
        if self._cut is None:
            return tile.zero_()
        bits = magnitude_bits(tile)
        keep = bits > self._cut.bits
        if self._ties:
            equal = (bits == self._cut.bits).nonzero().view(-1)[: self._ties]
            keep[equal] = True
            self._ties -= equal.numel()
        return tile.mul_(keep.view(tile.shape))


def drop_at_random(tile: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    """DARE: keep each entry with probability `density` and divide it by that. Drawn on the CPU, whatever the device."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(tile.shape, generator=generator) < density
    return tile.mul_(keep.to(tile.device)).div_(density)


def merge(pruned: Sequence[torch.Tensor], weights: Sequence[float], elect: bool) -> torch.Tensor:
    """The merged tile of pruned tiles: their weighted sum, or with `elect` the weighted mean of those that agree."""
    import torch

    if not elect:
        result = pruned[0] * weights[0]
        for tile, weight in zip(pruned[1:], weights[1:], strict=True):
            result.add_(tile * weight)
        return result
    signs = [(weight > 0) - (weight < 0) for weight in weights]
    total = pruned[0] * signs[0]
    for tile, sign in zip(pruned[1:], signs[1:], strict=True):
        total.add_(tile * sign)
    winner = torch.where(total >= 0, 1.0, -1.0)
    result, count = torch.zeros_like(total), torch.zeros_like(total)
    for tile, weight, sign in zip(pruned, weights, signs, strict=True):
        agrees = tile.sign().mul_(sign).eq_(winner)
        result.add_(tile * weight * agrees)
        count.add_(agrees)
    return result.div_(count.clamp_(min=1.0))


@dataclass(frozen=True)
class Task:
    """One adapter's matrix: D = scale * B A, with B (m, r) and A (r, n) in float32.

    Attributes:
        weight: multiplies it in the merge, after pruning.
        seed: gives the seed of the random numbers for the tile that begins at a row.
    """

    B: torch.Tensor
    A: torch.Tensor
    scale: float
    weight: float
    seed: Callable[[int], int] = field(repr=False)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return (self.B[begin:end] @ self.A).mul_(self.scale)


class MergedMatrix:
    """What a method makes of several matrices, known by tiles: `linalg.Products`."""

    def __init__(self, tasks: Sequence[Task], method: str, density: float, alive: Callable[[], None]) -> None:
        self._tasks, self._method, self._density, self._alive = tasks, method, density, alive
        self.shape = tasks[0].B.shape[0], tasks[0].A.shape[1]
        self.device = tasks[0].B.device
        self._held: torch.Tensor | None = None
        self._cuts: list[Cut | None] = []
        m, n = self.shape
        if method not in RANDOM and density < 1:
            count = int(density * m * n)
            self._cuts = [find_cut(partial(self._rows_of, task), count) for task in tasks]
        if 4 * m * n <= HELD_BYTES:
            import torch

            held = torch.empty(m, n, device=self.device)
            for begin, end, tile in self.tiles():
                held[begin:end] = tile
            self._held = held

    def _rows_of(self, task: Task) -> Iterator[torch.Tensor]:
        for begin, end in tiles(*self.shape):
            self._alive()
            yield task.rows(begin, end)

    def tiles(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Row range and entries of each tile, in order. A tile is not to be written to."""
        pruners = [Pruner(cut) for cut in self._cuts]
        for begin, end in tiles(*self.shape):
            self._alive()
            if self._held is not None:
                yield begin, end, self._held[begin:end]
                continue
            pruned = []
            for number, task in enumerate(self._tasks):
                tile = task.rows(begin, end)
                if self._density < 1:
                    if self._method in RANDOM:
                        tile = drop_at_random(tile, self._density, task.seed(begin))
                    else:
                        tile = pruners[number](tile)
                pruned.append(tile)
            yield begin, end, merge(pruned, [task.weight for task in self._tasks], self._method in ELECTING)

    def times(self, right: torch.Tensor) -> torch.Tensor:
        result = right.new_empty(self.shape[0], right.shape[1])
        for begin, end, tile in self.tiles():
            result[begin:end] = tile @ right
        return result

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        import torch

        result = torch.zeros(self.shape[1], left.shape[1], dtype=torch.float64, device=self.device)
        for begin, end, tile in self.tiles():
            result += tile.T @ left[begin:end]
        return result.to(left.dtype)

    def squared_error(self, B: torch.Tensor, A: torch.Tensor) -> float:
        import torch

        return sum(squared_norm(torch.addmm(tile, B[b:e], A, alpha=-1)) for b, e, tile in self.tiles())

    def squared_norm(self) -> float:
        return sum(squared_norm(tile) for _, _, tile in self.tiles())

    def refit(self, B: torch.Tensor) -> torch.Tensor:
        """The A that minimises ||M - B A|| for a given B, by the normal equations in float64."""
        import torch

        wide = B.to(torch.float64)
        right = self.transposed_times(B).T.to("cpu", torch.float64)
        solution: torch.Tensor = torch.linalg.lstsq((wide.T @ wide).cpu(), right, driver="gelsd").solution
        return solution.to(B.device, B.dtype)

    def truncated(self, rank: int, seed: int, total: float) -> Truncated:
        """Its leading `rank` singular triplets; `total` is its squared norm."""
        import torch

        m, n = self.shape
        if is_small(m, n, rank):
            return full_svd(torch.cat([tile for _, _, tile in self.tiles()]), rank)
        return subspace_svd(self, rank, seed, total)

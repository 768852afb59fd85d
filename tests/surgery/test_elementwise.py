"""Merging entry by entry, in tiles, against numpy on whole matrices and against PEFT's own functions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peft.utils import merge_utils

from surgery.ops import elementwise
from surgery.ops.elementwise import MergedMatrix, Pruner, Task, drop_at_random, find_cut
from surgery.ops.factor import seed_for
from surgery.tiling import tiles

ARRAYS = hnp.arrays(
    np.float32,
    st.integers(1, 80),
    elements=st.one_of(
        st.floats(-3, 3, width=32),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38]),  # ties, zeros, the ends of the range
    ),
)


@given(array=ARRAYS, data=st.data())
def test_just_the_largest_entries_stay(array: np.ndarray, data: st.DataObject) -> None:
    """In tiles of any size: as many as asked for, none smaller than one that goes, of equals the first."""
    count = data.draw(st.integers(0, array.size))
    cuts = sorted(data.draw(st.lists(st.integers(0, array.size), max_size=4)))
    edges = [0, *cuts, array.size]
    parts = [torch.from_numpy(array[b:e].copy()) for b, e in pairwise(edges) if e > b]
    prune = Pruner(find_cut(lambda: parts, count))
    found = np.concatenate([prune(part.clone()).numpy() for part in parts])
    order = np.argsort(-np.abs(array), kind="stable")
    expected = np.zeros_like(array)
    expected[order[:count]] = array[order[:count]]
    assert np.array_equal(found, expected)


def tasks(seed: int, m: int, n: int, weights: list[float], rank: int = 6) -> list[Task]:
    generator = torch.Generator().manual_seed(seed)

    def task(number: int, weight: float) -> Task:
        B, A = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
        return Task(B, A, 0.25, weight, lambda row: seed_for(7, f"{number}#{row}"))

    return [task(number, weight) for number, weight in enumerate(weights)]


def whole(merged: MergedMatrix) -> torch.Tensor:
    return torch.cat([tile.clone() for _, _, tile in merged.tiles()])


def alive() -> None:
    """Nobody cancels."""


def reference(found: list[Task], method: str, density: float) -> np.ndarray:
    """The same in float64, sorting whole matrices. DARE's masks are drawn as they are drawn there, tile by tile."""
    pruned = []
    for task in found:
        D = (task.B @ task.A * task.scale).double().numpy()
        if method in elementwise.RANDOM:
            ones = [drop_at_random(torch.ones(e - b, D.shape[1]), density, task.seed(b)) for b, e in tiles(*D.shape)]
            pruned.append(D * torch.cat(ones).double().numpy())
        else:
            order = np.argsort(-np.abs((task.B @ task.A * task.scale).numpy()).ravel(), kind="stable")
            mask = np.zeros(D.size)
            mask[order[: int(density * D.size)]] = 1
            pruned.append(D * mask.reshape(D.shape))
    weights = np.array([task.weight for task in found])
    stack = np.stack(pruned)
    weighted = weights[:, None, None] * stack
    if method not in elementwise.ELECTING:
        return np.asarray(weighted.sum(0))
    turned = np.sign(weights)[:, None, None] * stack
    winner = np.where(turned.sum(0) >= 0, 1, -1)
    agrees = np.sign(turned) == winner
    return np.asarray((weighted * agrees).sum(0) / np.maximum(agrees.sum(0), 1))


@pytest.mark.parametrize("method", elementwise.METHODS)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -0.3, 0.5], [1.0]])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_a_merged_matrix_is_that_of_the_whole_matrices(method: str, weights: list[float], density: float) -> None:
    found = tasks(1, 1500, 900, weights)
    merged = MergedMatrix(found, method, density, alive)
    expected = reference(found, method, density)
    wrong = np.abs(whole(merged).double().numpy() - expected) > 1e-5
    # An entry at the edge between two signs or magnitudes may fall the other way in float32.
    assert wrong.mean() < 1e-5
    assert len(list(tiles(1500, 900))) > 1
    assert merged.squared_norm() == pytest.approx(float((expected**2).sum()), rel=1e-4)


PEFT: dict[str, Callable[..., torch.Tensor]] = {
    "ties": merge_utils.ties,
    "magnitude-prune": merge_utils.magnitude_prune,
}


@pytest.mark.parametrize("method", PEFT)
def test_pefts_functions_say_the_same(method: str) -> None:
    """On whole matrices, where all weights are positive."""
    found = tasks(2, 90, 70, [0.7, 0.3, 1.5])
    deltas = [task.B @ task.A * task.scale for task in found]
    expected = PEFT[method](deltas, torch.tensor([0.7, 0.3, 1.5]), density=0.3)
    assert torch.allclose(whole(MergedMatrix(found, method, 0.3, alive)), expected, atol=1e-6)


def test_an_adapter_of_negative_weight_is_one_turned_round() -> None:
    one, other = tasks(3, 80, 60, [1.0, -0.5])
    turned = Task(-other.B, other.A, other.scale, 0.5, other.seed)
    left, right = (whole(MergedMatrix([one, task], "ties", 0.4, alive)) for task in (other, turned))
    assert torch.equal(left, right)


@pytest.mark.parametrize("method", elementwise.METHODS)
def test_a_matrix_too_large_to_hold_has_the_same_bits(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tiles are made anew for each pass, and its factors are those of the matrix in memory."""
    found = tasks(4, 1500, 900, [0.6, 0.4])
    held = MergedMatrix(found, method, 0.3, alive)
    monkeypatch.setattr(elementwise, "HELD_BYTES", 0)
    streamed = MergedMatrix(found, method, 0.3, alive)
    assert streamed._held is None
    assert held._held is not None
    assert torch.equal(whole(held), whole(streamed))
    total = held.squared_norm()
    one, other = held.truncated(8, 5, total), streamed.truncated(8, 5, total)
    assert torch.equal(one.U, other.U)
    least = np.linalg.svd(whole(held).double().numpy(), compute_uv=False)
    error = streamed.squared_error(other.U * other.S, other.V.T.contiguous())
    assert (error / (least[8:] ** 2).sum()) ** 0.5 == pytest.approx(1, abs=2e-3)


def test_a_matrix_of_zeros_has_factors() -> None:
    found = [Task(torch.zeros(200, 4), torch.ones(4, 150), 1.0, 1.0, lambda row: row)]
    merged = MergedMatrix(found, "ties", 0.5, alive)
    svd = merged.truncated(4, 0, merged.squared_norm())
    assert not (svd.U * svd.S @ svd.V.T).any()


def test_dare_keeps_its_share_and_the_mean() -> None:
    tile = torch.ones(2000, 500)
    kept = drop_at_random(tile.clone(), 0.1, 3)
    assert set(kept.unique().tolist()) == {0.0, 10.0}
    assert float(kept.mean()) == pytest.approx(1, abs=5 * (9 / tile.numel()) ** 0.5)
    assert not torch.equal(kept, drop_at_random(tile.clone(), 0.1, 4))


def test_a_refit_is_the_least_squares_solution() -> None:
    found = tasks(6, 90, 70, [1.0, 1.0])
    merged = MergedMatrix(found, "ties", 0.5, alive)
    B = torch.randn(90, 5, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.lstsq(B.double().numpy(), whole(merged).double().numpy(), rcond=None)[0]
    assert np.allclose(merged.refit(B).numpy(), expected, atol=1e-5)

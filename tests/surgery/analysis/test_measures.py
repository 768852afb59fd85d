"""Numbers about spectra and subspaces against numpy in float64, and what must hold of them for any input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.analysis.measures import cosine, describe, overlap, positions, ratio, singular_values, without_zeros
from surgery.ops.subspaces import decompose


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def basis(dimension: int, count: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(draw(dimension, count, seed=seed).double()).Q


@given(st.integers(1, 5000), st.integers(4, 100))
def test_positions_have_both_ends_and_are_not_many(count: int, most: int) -> None:
    found = positions(count, most)
    assert (found[0], found[-1]) == (1, count)
    assert len(found) <= most + 2
    assert list(found) == sorted(set(found))


@given(st.lists(st.just(0.0) | st.floats(1e-100, 1e3), min_size=1, max_size=40))
def test_a_spectrum_is_what_numpy_makes_of_it(values: list[float]) -> None:
    S = np.sort(np.array(values))[::-1]
    found = describe(torch.tensor(S.copy(), dtype=torch.float64), 1000)
    assert found.values == tuple(S)
    assert found.norm == pytest.approx(np.linalg.norm(S))
    if found.norm == 0.0:
        assert (found.stable_rank, found.effective_rank, found.rank_90, found.rank_99) == (0, 0, 0, 0)
        return
    assert found.stable_rank == pytest.approx((S**2).sum() / S[0] ** 2)
    for share, count in ((0.9, found.rank_90), (0.99, found.rank_99)):
        kept = [float((S[:k] ** 2).sum()) for k in range(len(S) + 1)]
        assert kept[count] >= share * kept[-1] * (1 - 1e-12)
        assert kept[count - 1] < share * kept[-1] * (1 + 1e-12)
    shares = S[S > 0] / S.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert found.stable_rank <= len(S) * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (7, 30), (30, 7), (1500, 40), (40, 1500)])
def test_singular_values_are_those_of_numpy(shape: tuple[int, int]) -> None:
    """To 1e-7 of the first: the square root of what float64 resolves."""
    W = draw(*shape)
    expected = np.linalg.svd(W.double().numpy(), compute_uv=False)
    assert singular_values(W).numpy() == pytest.approx(expected, abs=1e-7 * expected[0], rel=1e-7)


def test_singular_values_of_a_matrix_of_few_directions() -> None:
    W = (draw(50, 3).double() @ draw(3, 40, seed=1).double()).float()
    found = singular_values(W)
    assert float(found[3]) < 1e-6 * float(found[0])


@given(st.integers(2, 30), st.data())
def test_overlap_is_between_0_and_1(dimension: int, data: st.DataObject) -> None:
    left, right = (data.draw(st.integers(1, dimension)) for _ in range(2))
    found = overlap(basis(dimension, left, 1), basis(dimension, right, 2), 4)
    assert found is not None
    assert all(0 <= value <= 1 for row in found.phi for value in row)
    assert (len(found.phi), len(found.phi[0])) == (min(left, 4), min(right, 4))
    assert 0 <= found.whole <= 1
    assert found.chance == max(left, right) / dimension
    if left + right > dimension:  # two subspaces that must meet
        assert found.whole >= (left + right - dimension) / min(left, right) - 1e-9
    same = overlap(basis(dimension, left, 1), basis(dimension, left, 1), 4)
    assert same is not None
    assert same.whole == pytest.approx(1)
    turned = overlap(basis(dimension, right, 2), basis(dimension, left, 1), 4)
    assert turned is not None
    assert turned.whole == pytest.approx(found.whole)
    assert np.array(turned.phi) == pytest.approx(np.array(found.phi).T)


def test_overlap_of_subspaces_that_are_known() -> None:
    """One holds the other: 1. They share one direction of two: a half. They are orthogonal: 0."""
    axes = torch.eye(6, dtype=torch.float64)

    def whole(left: list[int], right: list[int]) -> float:
        found = overlap(axes[:, left], axes[:, right], 8)
        assert found is not None
        return found.whole

    assert whole([0, 1], [1, 0, 4]) == 1
    assert whole([0, 1], [1, 2]) == 0.5
    assert whole([0, 1], [2, 3]) == 0
    assert overlap(axes[:, :0], axes, 8) is None
    # 30 degrees apart: cos^2 = 3/4.
    tilted = axes[:, :1] * 0.75**0.5 + axes[:, 1:2] * 0.5
    found = overlap(axes[:, :1], tilted, 8)
    assert found is not None
    assert found.phi[0][0] == pytest.approx(0.75)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 100))
def test_the_cosine_of_two_updates(r: int, q: int, seed: int) -> None:
    factors = [(draw(12, k, seed=seed + k), draw(k, 9, seed=seed + 50 + k)) for k in (r, q + 10)]
    whole = [B.double().numpy() @ A.double().numpy() for B, A in factors]
    expected = (whole[0] * whole[1]).sum() / np.linalg.norm(whole[0]) / np.linalg.norm(whole[1])
    found = [without_zeros(decompose(B, A)) for B, A in factors]
    assert cosine(*found) == pytest.approx(expected, abs=1e-12)
    assert cosine(found[0], found[0]) == pytest.approx(1)
    assert cosine(found[0], without_zeros(decompose(-3 * factors[0][0], factors[0][1]))) == pytest.approx(-1)


def test_directions_that_are_zero_are_none() -> None:
    """A rank padded with zeros, or made of copies, counts for what it spans."""
    B, A = draw(20, 3), draw(3, 15, seed=1)
    padded = decompose(torch.cat([B, torch.zeros(20, 4)], 1), torch.cat([A, draw(4, 15, seed=2)]))
    doubled = decompose(torch.cat([B, B], 1), torch.cat([A, A]))
    assert len(padded.S) == 7
    assert [len(without_zeros(found).S) for found in (padded, doubled)] == [3, 3]
    assert len(without_zeros(decompose(torch.zeros(20, 3), A)).S) == 0
    assert cosine(padded, without_zeros(decompose(torch.zeros(20, 3), A))) is None


def test_quotients_that_are_no_numbers() -> None:
    assert (ratio(1.0, 4.0), ratio(1.0, 0.0), ratio(1e308, 1e-308)) == (0.25, None, None)


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_an_update_is_never_formed() -> None:
    """No tensor of 400 x 300, nor one half its size, on the way from factors to what is reported of them."""
    one, other = ((draw(400, rank, seed=rank), draw(rank, 300, seed=9)) for rank in (4, 8))
    with _Largest() as largest:
        left, right = (without_zeros(decompose(B, A)) for B, A in (one, other))
        cosine(left, right)
        overlap(left.U, right.U, 8)
        overlap(left.V, right.V, 8)
        describe(left.S, 8)
    assert 400 * 4 <= largest.numel <= 400 * 8

"""Subspaces of updates against numpy on the whole matrices, the paper's identities, and chance."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.ops.subspaces import (
    amplification,
    chance_norm,
    chance_similarity,
    decompose,
    effective_rank,
    projected_norm,
    similarity,
)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tiles(W: torch.Tensor, height: int = 7) -> Iterator[tuple[int, torch.Tensor]]:
    for begin in range(0, len(W), height):
        yield begin, W[begin : begin + height]


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20), st.floats(-4, 4))
def test_the_decomposition_is_that_of_the_whole(rank: int, m: int, n: int, scale: float) -> None:
    B, A = _random(m, rank), _random(rank, n, seed=1)
    update = decompose(B, A, scale)
    whole = scale * B.double().numpy() @ A.double().numpy()
    expected = np.linalg.svd(whole, compute_uv=False)
    size = max(1.0, float(np.abs(whole).max()))
    assert update.S.numpy() == pytest.approx(expected[: len(update.S)], abs=1e-12 * size * (m + n))
    assert np.abs((update.U * update.S @ update.V.T).numpy() - whole).max() <= 1e-12 * size * (m + n)
    assert update.norm == pytest.approx(np.linalg.norm(whole), abs=1e-12 * size * (m + n))


def test_similarity_is_the_mean_squared_cosine_of_principal_angles() -> None:
    """And 1 - d^2 / p with the projection distance d^2 = p - sum of squared cosines."""
    U = torch.linalg.qr(_random(30, 6).double()).Q
    V = torch.linalg.qr(_random(30, 4, seed=1).double()).Q
    phi = similarity(U, V)
    for i in range(1, 7):
        for j in range(1, 5):
            cosines = np.linalg.svd(U[:, :i].numpy().T @ V[:, :j].numpy(), compute_uv=False)
            p = min(i, j)
            distance = np.linalg.norm(U[:, :i].numpy() @ U[:, :i].numpy().T - V[:, :j].numpy() @ V[:, :j].numpy().T)
            assert float(phi[i - 1, j - 1]) == pytest.approx((cosines**2).sum() / p)
            assert float(phi[i - 1, j - 1]) == pytest.approx(1 - (p - (cosines**2).sum()) / p)
            # The Frobenius distance of projectors: ||P - Q||^2 = i + j - 2 sum of squared cosines.
            assert distance**2 == pytest.approx(i + j - 2 * p * float(phi[i - 1, j - 1]))
    assert torch.allclose(similarity(U, U).diagonal(), torch.ones(6, dtype=torch.float64))


def test_chance_is_what_random_subspaces_have() -> None:
    found = [
        float(similarity(*(torch.linalg.qr(_random(40, size, seed=seed + size)).Q for size in (3, 8)))[2, 7])
        for seed in range(0, 4000, 20)
    ]
    assert np.mean(found) == pytest.approx(chance_similarity(3, 8, 40), rel=0.05)
    W = _random(40, 24, seed=9)
    norms = [
        projected_norm(torch.linalg.qr(_random(40, 4, seed=s)).Q, torch.linalg.qr(_random(24, 4, seed=-s)).Q, _tiles(W))
        for s in range(1, 300)
    ]
    assert math.sqrt(np.mean(np.square(norms))) == pytest.approx(chance_norm(4, (40, 24), float(W.norm())), rel=0.05)


def test_chance_in_the_papers_table() -> None:
    """Table 7, GPT-3's W_q of layer 48: 0.02 and 0.33 for random directions at r = 4 and 64."""
    assert round(chance_norm(4, (12288, 12288), 61.95), 2) == 0.02
    assert chance_norm(64, (12288, 12288), 61.95) == pytest.approx(0.33, abs=0.01)
    assert pytest.approx(21.5, abs=0.1) == 6.91 / 0.32


def test_amplification_of_a_direction_that_is_known() -> None:
    """dW = 5 u v^T on a W with 0.5 there."""
    U, V = (torch.linalg.qr(_random(12, 12, seed=s).double()).Q for s in (1, 2))
    W = U @ torch.diag(torch.linspace(6, 0.5, 12, dtype=torch.float64)) @ V.T
    update = decompose(U[:, -1:], V[:, -1:].T, 5.0)
    assert amplification(update, 1, lambda: _tiles(W)) == pytest.approx(10.0)
    assert amplification(update, 1, lambda: _tiles(torch.zeros(12, 12))) == math.inf
    assert math.isnan(amplification(decompose(torch.zeros(12, 2), torch.zeros(2, 12)), 1, lambda: _tiles(W)))
    whole = np.linalg.norm(U[:, -1:].numpy().T @ W.numpy() @ V[:, -1:].numpy())
    assert projected_norm(U[:, -1:], V[:, -1:], _tiles(W, 5)) == pytest.approx(whole)


def test_effective_rank() -> None:
    """As many as there are equal values; between 1 and that for others."""
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0.0
    assert effective_rank(torch.tensor([2.0, 5e-324], dtype=torch.float64)) == 1.0
    assert 1 < effective_rank(torch.tensor([2.0, 1.0, 0.5])) < 3

"""Low-rank sums in their shared basis, against numpy on the dense matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.ops import cores


def products(seed: int, m: int, n: int, ranks: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Float32 factors (B, A) of each rank."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)) for r in ranks]


def dense(found: list[tuple[torch.Tensor, torch.Tensor]], scales: list[float]) -> list[np.ndarray]:
    """Each scale * B A in float64."""
    return [s * B.double().numpy() @ A.double().numpy() for (B, A), s in zip(found, scales, strict=True)]


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of a rank."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((U[:, :rank] * S[:rank]) @ Vh[:rank])


def difference(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(left - right)) / max(float(np.linalg.norm(right)), 1e-300)


SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 30), st.lists(st.integers(1, 12), min_size=1, max_size=4))


@given(shape=SHAPES, seed=st.integers(0, 2**20), rank=st.integers(1, 40), data=st.data())
def test_the_leading_triplets_are_the_best_approximation_of_the_sum(
    shape: tuple[int, int, list[int]], seed: int, rank: int, data: st.DataObject
) -> None:
    """For any shapes, wider or narrower than the stack, and scales of any sign: the optimum, and its error."""
    m, n, ranks = shape
    scales = [data.draw(st.sampled_from([-2.0, -0.3, 0.0, 0.5, 1.0, 40.0])) for _ in ranks]
    found = products(seed, m, n, ranks)
    total = np.sum(dense(found, scales), axis=0)
    basis = cores.shared_basis(found, scales)
    B, A = cores.balanced(basis, cores.leading(basis.total, min(rank, m, n, sum(ranks))))
    size = max(float(np.linalg.norm(part)) for part in dense(found, [abs(s) + 1 for s in scales]))
    least = best(total, rank)
    error = float(np.linalg.norm(total - (B @ A).numpy()))
    assert error <= float(np.linalg.norm(total - least)) + 1e-12 * size
    assert cores.squared_distance(basis, basis.total, B, A) ** 0.5 == pytest.approx(error, rel=1e-9, abs=1e-11 * size)
    assert cores.squared(basis.total) ** 0.5 == pytest.approx(float(np.linalg.norm(total)), rel=1e-9, abs=1e-11 * size)


@given(seed=st.integers(0, 2**20), exponent=st.integers(-9, 0))
def test_a_distance_is_measured_without_cancellation(seed: int, exponent: int) -> None:
    """The distance from factors that lie partly outside the basis, however close they are."""
    found = products(seed, 40, 30, [4, 3])
    basis = cores.shared_basis(found, [1.0, -1.0])
    B, A = cores.balanced(basis, cores.leading(basis.total, 7))
    generator = torch.Generator().manual_seed(seed + 1)
    B = B + 10.0**exponent * torch.randn(B.shape, generator=generator, dtype=torch.float64)
    A = A + 10.0**exponent * torch.randn(A.shape, generator=generator, dtype=torch.float64)
    exact = np.linalg.norm(sum(dense(found, [1.0, -1.0])) - B.numpy() @ A.numpy())
    assert cores.squared_distance(basis, basis.total, B, A) ** 0.5 == pytest.approx(float(exact), rel=1e-5)


def test_an_adapter_that_cancels_another_leaves_nothing() -> None:
    ((B, A),) = products(0, 20, 30, [5])
    basis = cores.shared_basis([(B, A), (B, A)], [0.5, -0.5])
    assert cores.squared(basis.total) < 1e-24
    left, right = cores.balanced(basis, cores.leading(basis.total, 3))
    assert left.isfinite().all()
    assert right.isfinite().all()


def test_a_refit_is_the_least_squares_solution() -> None:
    """For a B rounded to bfloat16 no A comes nearer to the sum."""
    found = products(1, 40, 30, [6, 6])
    basis = cores.shared_basis(found, [1.0, 1.0])
    B, _ = cores.balanced(basis, cores.leading(basis.total, 5))
    rounded = B.to(torch.bfloat16).double()
    A = cores.refit(basis, basis.total, rounded)
    expected = np.linalg.lstsq(rounded.numpy(), sum(dense(found, [1.0, 1.0])), rcond=None)[0]
    assert difference(A.numpy(), expected) < 1e-10


def tsv_reference(matrices: list[np.ndarray], ranks: list[int]) -> np.ndarray:
    """TSV merging on dense matrices, by the paper's steps: cut each SVD, stack, Procrustes on both sides."""
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    U = np.concatenate([u[:, :k] for (u, _, _), k in zip(parts, ranks, strict=True)], axis=1)
    S = np.concatenate([s[:k] for (_, s, _), k in zip(parts, ranks, strict=True)])
    V = np.concatenate([vh[:k] for (_, _, vh), k in zip(parts, ranks, strict=True)])
    P, _, Q = np.linalg.svd(U, full_matrices=False)
    P2, _, Q2 = np.linalg.svd(V, full_matrices=False)
    return np.asarray((P @ Q) @ np.diag(S) @ (P2 @ Q2))


@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0], [0.7, -0.4, 2.0]])
def test_task_singular_vectors_are_those_of_the_dense_matrices(scales: list[float]) -> None:
    found = products(2, 50, 40, [6, 4, 8])
    basis = cores.shared_basis(found, scales)
    merged = cores.task_vectors(basis.cores, [5, 4, 5])
    B, A = cores.balanced(basis, merged)
    assert difference((B @ A).numpy(), tsv_reference(dense(found, scales), [5, 4, 5])) < 1e-10
    assert cores.squared_distance(basis, merged.core, B, A) < 1e-18


def test_task_singular_vectors_of_one_adapter_twice_are_its_own() -> None:
    """Dependent vectors leave no direction of their own: the result is the adapter, not noise beside it."""
    ((B, A),) = products(3, 30, 20, [4])
    basis = cores.shared_basis([(B, A), (B, A)], [1.0, 1.0])
    merged = cores.task_vectors(basis.cores, [4, 4])
    left, right = cores.balanced(basis, merged)
    assert difference((left @ right).numpy(), dense([(B, A)], [1.0])[0]) < 1e-10


@pytest.mark.parametrize("rank", [3, 9])
def test_isotropic_merging_gives_every_direction_the_mean(rank: int) -> None:
    found, scales = products(4, 40, 30, [5, 4]), [1.0, 0.5]
    basis = cores.shared_basis(found, scales)
    B, A = cores.balanced(basis, cores.isotropic(basis.total, rank))
    U, S, Vh = np.linalg.svd(sum(dense(found, scales)), full_matrices=False)
    assert difference((B @ A).numpy(), S[:rank].mean() * U[:, :rank] @ Vh[:rank]) < 1e-10


def test_isotropic_merging_does_not_raise_rounding_to_a_direction() -> None:
    """The same adapter twice has four directions, not eight."""
    ((B, A),) = products(5, 40, 30, [4])
    basis = cores.shared_basis([(B, A), (B, A)], [1.0, 1.0])
    S = cores.isotropic(basis.total, 8).S
    assert int((S > 0).sum()) == 4
    expected = np.linalg.svd(2 * dense([(B, A)], [1.0])[0], compute_uv=False)[:4].mean()
    assert float(S[0]) == pytest.approx(float(expected), rel=1e-12)


@given(rank=st.integers(1, 60), ranks=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_a_rank_is_shared_out_evenly(rank: int, ranks: list[int]) -> None:
    given_out = cores.shared_out(rank, ranks)
    assert sum(given_out) == min(rank, sum(ranks))
    assert all(0 <= own <= most for own, most in zip(given_out, ranks, strict=True))
    short = [own for own, most in zip(given_out, ranks, strict=True) if own < most]
    assert not short or max(given_out) - min(short) <= 1 or max(given_out) <= min(short)

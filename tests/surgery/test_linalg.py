"""The truncated SVD against numpy's in float64, over spectra that are kind and spectra that are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from surgery import linalg

M, N = 320, 224


def matrix(singular: list[float], noise: float = 0.0, seed: int = 0, shape: tuple[int, int] = (M, N)) -> torch.Tensor:
    """A float32 matrix with given singular values, and gaussian noise on top."""
    generator = np.random.default_rng(seed)
    rows, columns = shape
    left = np.linalg.qr(generator.standard_normal((rows, len(singular))))[0]
    right = np.linalg.qr(generator.standard_normal((columns, len(singular))))[0]
    found = (left * singular) @ right.T + noise * generator.standard_normal(shape)
    return torch.from_numpy(found.astype(np.float32))


SPECTRA = {
    "a gap": matrix([2.0 - 0.1 * i for i in range(12)], noise=1e-3),
    "a gap, mostly noise": matrix([math.exp(-i / 6) for i in range(16)], noise=2e-3),
    "none: gaussian": matrix([], noise=1.0),
    "i^-1/2": matrix([(i + 1) ** -0.5 for i in range(N)]),
    "i^-1": matrix([(i + 1) ** -1.0 for i in range(N)]),
    "i^-2": matrix([(i + 1) ** -2.0 for i in range(N)]),
    "ten-fold in four": matrix([10 ** (-i / 4) for i in range(24)]),
    "a plateau beyond the rank": matrix([1.0] * 6 + [0.5] * 40 + [0.01] * 100),
    "a plateau across the rank": matrix([1.0] * 30 + [0.9] * 150),
    "one giant": matrix([100.0] + [1e-3 * (i + 1) ** -0.3 for i in range(200)]),
}


def errors(D: torch.Tensor, rank: int, found: linalg.Truncated) -> tuple[float, float]:
    """The error of the factors, and the least possible for their rank, both in float64."""
    B, A = (factor.double().numpy() for factor in linalg.balanced_factors(found))
    exact = D.double().numpy()
    least = math.sqrt(float(np.sum(np.linalg.svd(exact, compute_uv=False)[rank:] ** 2)))
    return float(np.linalg.norm(exact - B @ A)), least


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("name", SPECTRA)
def test_error_is_within_half_a_percent_of_the_least(name: str, rank: int) -> None:
    """On no spectrum does the randomised SVD do worse than 1.005 times the best factors of its rank."""
    D = SPECTRA[name]
    found = linalg.truncated_svd(D, rank, seed=1)
    error, least = errors(D, rank, found)
    floor = 4e-7 * float(D.double().norm())  # what the rounding of float32 factors leaves of any matrix
    assert error <= 1.005 * least + floor


@pytest.mark.parametrize("name", SPECTRA)
def test_certificate_tells_the_excess(name: str) -> None:
    """The excess that is reported is the true one, to within a factor of three and what `TOLERANCE` lets pass."""
    D = SPECTRA[name]
    found = linalg.truncated_svd(D, 8, seed=1)
    error, least = errors(D, 8, found)
    assert error / least - 1 <= 3 * max(found.excess, linalg.TOLERANCE)


def test_easy_spectra_take_few_passes_and_flat_ones_many() -> None:
    """The number of passes follows the data."""
    assert linalg.truncated_svd(SPECTRA["a gap"], 12, seed=1).passes <= 4
    assert linalg.truncated_svd(SPECTRA["none: gaussian"], 12, seed=1).passes >= 12


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_factors_are_orthonormal_and_ordered(shape: tuple[int, int]) -> None:
    """U and V have orthonormal columns, S descends, for tall and for wide matrices."""
    D = matrix([(i + 1) ** -1.0 for i in range(100)], shape=shape)
    found = linalg.truncated_svd(D, 10, seed=0)
    assert found.U.shape == (shape[0], 10)
    assert found.V.shape == (shape[1], 10)
    for factor in (found.U, found.V):
        torch.testing.assert_close(factor.T @ factor, torch.eye(10), atol=1e-5, rtol=0)
    assert bool((found.S[:-1] >= found.S[1:]).all())
    exact = torch.linalg.svdvals(D.double())[:10].float()
    torch.testing.assert_close(found.S, exact, rtol=1e-3, atol=0)


def test_small_matrices_are_decomposed_in_full() -> None:
    """Where the sketch would be as large as the matrix, LAPACK's result is returned, with rank cut to what there is."""
    D = matrix([3.0, 2.0, 1.0], shape=(12, 9))
    found = linalg.truncated_svd(D, 40, seed=0)
    assert found.passes == 0
    assert found.excess == 0.0
    assert found.S.numel() == 9
    B, A = linalg.balanced_factors(found)
    torch.testing.assert_close(B @ A, D, atol=2e-6, rtol=0)


def test_same_seed_same_bits_whatever_the_number_of_threads() -> None:
    """The sketch is drawn from the seed alone; each factorisation runs on one thread."""
    D = SPECTRA["i^-1"]
    first, second = linalg.truncated_svd(D, 8, seed=5), linalg.truncated_svd(D, 8, seed=5)
    other = linalg.truncated_svd(D, 8, seed=6)
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.V, second.V)
    assert not torch.equal(first.U, other.U)


def test_refitted_A_is_the_least_squares_solution() -> None:
    """`refit_A` agrees with numpy's least squares in float64, also where B has a column of zeros."""
    D = SPECTRA["a gap, mostly noise"]
    B, _ = linalg.balanced_factors(linalg.truncated_svd(D, 6, seed=0))
    B = B.bfloat16().float()
    B[:, 3] = 0
    expected = np.linalg.lstsq(B.double().numpy(), D.double().numpy(), rcond=1e-10)[0]
    np.testing.assert_allclose(linalg.refit_A(D, B).numpy(), expected, atol=2e-6)


def test_norms_and_errors_agree_with_float64() -> None:
    """Squared norms and errors are those of float64 to six digits, with or without forming the product."""
    D = SPECTRA["i^-1/2"]
    B, A = linalg.balanced_factors(linalg.truncated_svd(D, 8, seed=0))
    exact = D.double()
    product = B.double() @ A.double()
    assert linalg.squared_norm(D) == pytest.approx(float(exact.norm() ** 2), rel=1e-6)
    assert linalg.factored_squared_norm(B, A) == pytest.approx(float(product.norm() ** 2), rel=1e-6)
    assert linalg.squared_error(D, B, A) == pytest.approx(float((exact - product).norm() ** 2), rel=1e-6)


def test_zero_matrix() -> None:
    """A difference of nothing has singular values of nothing."""
    for shape in ((M, N), (N, M)):
        found = linalg.truncated_svd(torch.zeros(shape), 4, seed=0)
        assert float(found.S.sum()) == 0.0
        assert (found.U.shape, found.V.shape) == ((shape[0], 4), (shape[1], 4))

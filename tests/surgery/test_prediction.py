"""Predictions: the same bits in whatever order anything is summed, and near the true sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.dtypes import BF16, F16, F32, F64, DType
from surgery.ops import prediction
from surgery.ops.deltas import Factors
from surgery.ops.prediction import Fixed, arithmetic, choose_exponents, fix, predict


def factors(rows: int, columns: int, rank: int, size: float, seed: int = 0, scale: float = 0.7) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rows, rank), (rank, columns)))
    return Factors(B * size, A * size, scale, False, None, (), False)


def memory(slot: str, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(count, dtype=dtype)


def predicted(W: torch.Tensor, fixed: Fixed, begin: int, result: DType, kind: str) -> torch.Tensor:
    out = torch.empty(W.shape, dtype=result.to_torch)
    predict(W, [fixed], begin, kind, out, memory)
    return out


def integers(fixed: Fixed, exponents: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Both factors as Python's integers."""
    A = fixed.A.double() * 2.0 ** sum(exponents)
    assert torch.equal(A, A.round())
    assert torch.equal(fixed.B, fixed.B.round())
    return fixed.B.double().numpy().astype(np.int64).astype(object), A.numpy().astype(np.int64).astype(object)


@pytest.mark.parametrize("rank", [1, 16, 100])
@pytest.mark.parametrize("result", [BF16, F16, F32, F64], ids=str)
def test_no_order_of_summation_changes_a_bit(rank: int, result: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = factors(96, 160, rank, 0.03, seed=rank)
    kind = arithmetic(BF16, result)
    exponents = choose_exponents(found, kind)
    assert exponents is not None
    fixed = fix(found, exponents, kind)
    W = 0.02 * torch.randn(96, 160, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16)
    whole = predicted(W, fixed, 0, result, kind)
    # One product after the other, in four orders, without any fused operation.
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(rank)
        total = np.zeros((96, 160), fixed.B.numpy().dtype)
        for number in order:
            total += fixed.B.numpy()[:, number : number + 1] * fixed.A.numpy()[number : number + 1]
        assert np.array_equal(total, fixed.rows(0, 96, torch.empty(96, 160, dtype=fixed.A.dtype)).numpy())
    # In exact arithmetic, too: Python's integers.
    B, A = integers(fixed, exponents)
    assert np.array_equal(
        (B @ A).astype(np.float64) * 2.0 ** -sum(exponents),
        fixed.rows(0, 96, torch.empty(96, 160, dtype=fixed.A.dtype)).double().numpy(),
    )
    # Row by row, in tiles of every size, and with several threads.
    parts = [predicted(W[row : row + 1], fixed, row, result, kind) for row in range(96)]
    assert torch.equal(torch.cat(parts), whole)
    for rows in (1, 7, 64):
        with monkeypatch.context() as patch:
            patch.setattr(prediction, "_TILE_ELEMENTS", rows * 160)
            assert torch.equal(predicted(W, fixed, 0, result, kind), whole)
    if result is BF16:  # in place of the base
        again = W.clone()
        predict(again, [fixed], 0, kind, again, memory)
        assert torch.equal(again, whole)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert torch.equal(predicted(W, fixed, 0, result, kind), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_prediction_is_near_the_sum(transposed: bool) -> None:
    found = factors(64, 80, 8, 0.05)
    for result, relative in ((BF16, 2e-3), (F32, 1e-7)):
        kind = arithmetic(BF16, result)
        exponents = choose_exponents(found, kind)
        assert exponents is not None
        delta = found.scale * (found.B @ found.A)
        rows = fix(Factors(found.B, found.A, found.scale, transposed, None, (), False), exponents, kind)
        out = torch.empty((80, 64) if transposed else (64, 80), dtype=rows.A.dtype)
        given_rows = rows.rows(0, len(out), out)
        given_rows = given_rows.T if transposed else given_rows
        assert float((given_rows.double() - delta).norm() / delta.norm()) < relative


def test_float64_bases_are_predicted_in_float64() -> None:
    assert arithmetic(BF16, BF16) == "float32"
    assert arithmetic(F64, BF16) == "float64"
    assert arithmetic(BF16, F16) == "float64"


@given(size=st.floats(1e-6, 1e6), rank=st.integers(1, 70), kind=st.sampled_from(["float32", "float64"]))
@settings(max_examples=60, deadline=None)
def test_partial_sums_stay_exact(size: float, rank: int, kind: str) -> None:
    """No sum of absolute products exceeds the integers that the type holds."""
    found = factors(7, 9, rank, size, seed=rank)
    exponents = choose_exponents(found, kind)
    assert exponents is not None
    fixed = fix(found, exponents, kind)
    B, A = integers(fixed, exponents)
    largest = max((abs(B) @ abs(A)).ravel())
    assert largest <= 2 ** {"float32": 24, "float64": 53}[kind]
    assert largest >= 2 ** {"float32": 13, "float64": 40}[kind]


def test_what_is_no_number_has_no_exponents() -> None:
    found = factors(4, 4, 2, 1.0)
    found.B[0, 0] = float("nan")
    assert choose_exponents(found, "float32") is None
    assert choose_exponents(factors(4, 4, 2, 0.0), "float32") is None

"""The undo record: its coding, its bound, and that no order of summation gives back anything but the base."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.ops.deltas import Factors, merge_tile
from surgery.ops.undo import (
    Recorder,
    _decode_gaps,
    _encode_gaps,
    decode,
    estimated_share,
    predict,
    uncertain,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@given(st.sets(st.integers(0, 3000)))
def test_gaps_round_trip(positions: set[int]) -> None:
    """Sorted positions survive the coding in bytes, runs of 255 included."""
    found = np.array(sorted(positions), dtype=np.int64)
    assert np.array_equal(_decode_gaps(_encode_gaps(found)), found)


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_literals_round_trip(count: int, share: float, dtype: torch.dtype, seed: int) -> None:
    """What is recorded in tiles is put back exactly, whatever tiles it is read in."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, generator=generator).to(dtype)
    mask = torch.rand(count, generator=generator) < share
    recorder = Recorder()
    middle = count // 3
    recorder.add(0, base[:middle], mask[:middle])
    recorder.add(middle, base[middle:], mask[middle:])
    literals = decode(recorder.tensors(), count, base.element_size())
    assert recorder.count == int(mask.sum())
    guess = torch.zeros(count, dtype=dtype)
    cut = count // 2
    literals.overwrite(guess[:cut], 0)
    literals.overwrite(guess[cut:], cut)
    assert torch.equal(guess, torch.where(mask, base, torch.zeros((), dtype=dtype)))


def damaged(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    recorder = Recorder()
    recorder.add(0, torch.ones(10).bfloat16(), torch.tensor([True, False] * 5))
    return {**recorder.tensors(), **changes}


@pytest.mark.parametrize(
    "record",
    [
        damaged(gaps=torch.zeros(3, dtype=torch.uint8)),
        damaged(bits=damaged()["bits"][:-3]),
        damaged(gaps=damaged()["bits"]),
    ],
)
def test_damaged_record_is_refused(record: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(record, 10, 2)


def test_bomb_is_not_inflated() -> None:
    """A record that would inflate beyond what its tensor can need is refused before it does."""
    import zlib

    bomb = torch.frombuffer(bytearray(zlib.compress(b"\1" * 50_000_000, 9)), dtype=torch.uint8)
    with pytest.raises(ValueError, match="more than 21 bytes"):
        decode(damaged(gaps=bomb), 10, 2)


def factors(
    kind: str, rows: int, columns: int, rank: int, seed: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    if kind == "heavy-tailed":  # Cauchy: the sum over the rank is dominated by a few terms of any size
        B, A = B / torch.randn(rows, rank, generator=generator), A / torch.randn(rank, columns, generator=generator)
        B, A = B.clamp(-1e4, 1e4), A.clamp(-1e4, 1e4)
    if kind == "cancelling":  # large terms of opposite sign: the worst that a bound on |B||A| is there for
        B[:, rank // 2 :] = B[:, : rank - rank // 2] * 1e3
        B[:, : rank - rank // 2] *= 1e3
        A[rank // 2 :] = -A[: rank - rank // 2] * (1 + 1e-7)
    return (B / 50).to(dtype).float(), (A / 50).to(dtype).float()


def lora(
    B: torch.Tensor, A: torch.Tensor, scale: float, magnitude: torch.Tensor | None = None, transposed: bool = False
) -> Factors:
    return Factors(B, A, scale, transposed, magnitude, (), False)


def orders(factor: Factors) -> list[Factors]:
    """The same product with the rank's terms in other orders: what another BLAS, or a GPU, might sum."""
    rank = factor.B.shape[1]
    permutations = [
        torch.arange(rank - 1, -1, -1),
        *(torch.randperm(rank, generator=torch.Generator().manual_seed(n)) for n in range(4)),
    ]
    return [
        Factors(
            factor.B[:, p].contiguous(),
            factor.A[p].contiguous(),
            factor.scale,
            factor.transposed,
            factor.magnitude,
            (),
            False,
        )
        for p in permutations
    ]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "cancelling"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_no_order_of_summation_changes_what_is_restored(
    dtype: torch.dtype, kind: str, transposed: bool, dora: bool, factor_dtype: torch.dtype
) -> None:
    """With the recorded weights put back, every order gives the base's bits; before rounding they differ."""
    rows, columns, rank = 192, 160, 24
    out, wide = (columns, rows) if transposed else (rows, columns)
    B, A = factors(kind, out, wide, rank, 0, factor_dtype)
    base = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(9)) * 0.02).to(dtype)
    magnitude = (torch.rand(out, generator=torch.Generator().manual_seed(8)) + 0.5) if dora else None
    found = lora(B, A, 0.7, magnitude, transposed)
    merged, _, scales = merge_tile(base.float().clone(), [found], 0, rows)
    merged = merged.to(dtype)
    if not bool(merged.isfinite().all()):
        pytest.skip("these factors overflow float16")
    wide_factors = found.to(torch.float64)
    x, bound = predict(merged, [wide_factors], scales, 0, rows)
    recorder = Recorder()
    recorder.add(0, base, uncertain(base, x, bound))
    literals = decode(recorder.tensors(), base.numel(), base.element_size())
    differing = 0
    for other in orders(wide_factors):
        y, _ = predict(merged, [other], scales, 0, rows)
        differing += int((y != x).sum())
        assert bool(((y - x).abs() <= 2 * bound).all())
        restored = y.to(dtype)
        literals.overwrite(restored, 0)
        assert torch.equal(restored.view(-1).view(torch.uint8), base.view(-1).view(torch.uint8))
    if factor_dtype is torch.float32:
        assert differing > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_predictions_near_a_rounding_boundary_are_recorded(dtype: torch.dtype) -> None:
    """A prediction that rounds to the base's bits is certain only if it does so with the bound to spare on both sides.

    Such near misses are too rare to meet in a test (about one in 8 billion float32 weights), so they are made here.
    """
    low, high = 1.0, 1.01  # bisect for where rounding (by way of float32, for 16 bits) leaves 1.0
    for _ in range(60):
        middle = (low + high) / 2
        rounds_down = float(torch.tensor(middle, dtype=torch.float64).to(dtype)) == 1.0
        low, high = (middle, high) if rounds_down else (low, middle)
    base = torch.tensor([[1.0, 1.0, 1.0, 1.0, -1.0]], dtype=dtype)
    bound = torch.tensor(1e-12, dtype=torch.float64)
    x = torch.tensor([[low - 1.9e-12, low - 2.1e-12, low, 1.0, 1e-12 - low]], dtype=torch.float64)
    assert uncertain(base, x, bound).tolist() == [[True, False, True, False, True]]


def test_signs_of_zero_and_what_is_not_finite_are_recorded() -> None:
    """Negative zero and NaN have bits of their own, which no prediction is trusted with."""
    base = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), 1.0]])
    x = torch.tensor([[0.0, 0.0, float("nan"), float("inf"), 1.0]], dtype=torch.float64)
    assert uncertain(base, x, torch.zeros((), dtype=torch.float64)).tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize(
    ("relative", "itemsize", "expected"), [(0.0035, 2, 0.007), (0.014, 4, 0.049), (0.23, 2, 0.139), (0.0, 2, 0.0)]
)
def test_estimated_share_goes_through_the_measured_points(relative: float, itemsize: int, expected: float) -> None:
    assert estimated_share(relative, itemsize) == pytest.approx(expected)


def test_estimated_share_grows_and_ends_at_the_whole() -> None:
    shares = [estimated_share(10.0**exponent, 4) for exponent in range(-5, 4)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize("relative", [0.0035, 0.014, 0.055, 0.23])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_estimate_is_near_the_truth(relative: float, dtype: torch.dtype) -> None:
    """The record of a real merge takes what the plan says it will, to within a half."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(512, 512, generator=generator) * 0.02).to(dtype)
    B, A = torch.randn(512, 16, generator=generator), torch.randn(16, 512, generator=generator)
    size = float((B @ A).norm() / base.float().norm())
    found = lora(B, A, relative / size)
    merged, _, scales = merge_tile(base.float().clone(), [found], 0, 512)
    merged = merged.to(dtype)
    recorder = Recorder()
    recorder.add(0, base, uncertain(base, *predict(merged, [found.to(torch.float64)], scales, 0, 512)))
    taken = sum(t.numel() for t in recorder.tensors().values()) / (base.numel() * base.element_size())
    assert taken == pytest.approx(estimated_share(relative, base.element_size()), rel=0.5)

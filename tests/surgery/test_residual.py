"""The code of what a prediction leaves: whatever the bits, they come back; whatever the code, nothing worse happens."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from surgery.ops.residual import EXPONENT_BITS, decode, encode, estimate
from surgery.zstd import compress, decompress, zstd

DTYPES = {"U8": 1, "BF16": 2, "F16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8, "F8_E4M3": 1, "F8_E5M2": 1}


def bits_of(dtype: str) -> int:
    return EXPONENT_BITS.get(dtype, 0)


def check(predicted: np.ndarray, actual: np.ndarray, dtype: str) -> bytes:
    code = encode(predicted.copy(), actual.copy(), bits_of(dtype))
    found = predicted.copy()
    decode(found, code, bits_of(dtype))
    assert found.tobytes() == actual.tobytes()
    return code


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_bits_come_back(dtype: str, data: st.DataObject) -> None:
    kind = np.dtype(f"u{DTYPES[dtype]}")
    count = data.draw(st.integers(1, 300))
    predicted = data.draw(arrays.arrays(kind, count))
    actual = data.draw(st.one_of(arrays.arrays(kind, count), st.just(predicted.copy())))
    check(predicted, actual, dtype)


@pytest.mark.parametrize(("dtype", "itemsize"), DTYPES.items())
@pytest.mark.parametrize("count", [1, 63, 64, 4097, 70_001, 140_000])
@pytest.mark.parametrize("spread", [0, 1, 3, 40, 400])
def test_differences_of_every_size_come_back(dtype: str, itemsize: int, count: int, spread: int) -> None:
    random = np.random.default_rng(count + spread)
    kind = np.dtype(f"u{itemsize}")
    predicted = random.integers(0, 256, count * itemsize, np.uint8).view(kind)
    step = random.normal(0, spread, count).round().astype(np.int64).astype(f"i{itemsize}").view(kind)
    check(predicted, predicted + step, dtype)


def test_special_values_come_back() -> None:
    """Both zeros, infinities, NaNs with payloads and denormals, each predicted by each."""
    special = np.array(
        [0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0xFFFF, 0x7F81, 0x007F, 0x3F80], np.uint16
    )
    check(np.repeat(special, len(special)), np.tile(special, len(special)), "BF16")


def tuned_like(count: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights N(0, 0.02) in bfloat16, and the same with noise added before they were rounded."""
    random = np.random.default_rng(0)
    weights = random.normal(0, 0.02, count).astype(np.float32)
    found = []
    for values in (weights, weights + random.normal(0, noise, count).astype(np.float32)):
        bits = values.astype(np.float32).view(np.uint32)
        found.append(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))
    return found[0], found[1]


def conditional_entropy(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Bits a weight of the differences where the exponent of the prediction is known, counted plainly."""
    total = 0.0
    exponents = predicted >> 7 & 0xFF
    for exponent in np.unique(exponents):
        chosen = exponents == exponent
        counts = np.unique((actual - predicted)[chosen], return_counts=True)[1]
        total -= float((counts * np.log2(counts / counts.sum())).sum())
    return total / len(predicted)


@pytest.mark.parametrize("noise", [2e-5, 1e-4, 5e-4])
def test_size_is_near_the_entropy(noise: float) -> None:
    predicted, actual = tuned_like(1 << 19, noise)
    least = conditional_entropy(predicted, actual)
    size = 8 * len(check(predicted, actual, "BF16")) / len(predicted)
    # Sorted eight at a time: not quite by exponent.
    assert least < size < 1.15 * least + 0.08
    guess = 8 * estimate(predicted, actual, 8) / len(predicted)
    assert guess == pytest.approx(size, rel=0.08)


def test_sorting_is_worth_it() -> None:
    predicted, actual = tuned_like(1 << 19, 5e-5)
    assert len(encode(predicted, actual, 8)) < 0.9 * len(encode(predicted, actual, 0))


def test_hardly_any_change_costs_hardly_anything() -> None:
    predicted, _ = tuned_like(1 << 19, 0)
    actual = predicted.copy()
    actual[::5000] += 1
    assert 8 * len(check(predicted, actual, "BF16")) < 0.02 * len(predicted)


def test_wrong_codes_are_refused() -> None:
    predicted, actual = tuned_like(30_000, 1e-4)
    code = encode(predicted, actual, 8)
    assert code[0] > 1
    for length in range(0, len(code), 97):
        with pytest.raises(ValueError, match=r"."):
            decode(predicted.copy(), code[:length], 8)
    with pytest.raises(ValueError, match="end where it should"):
        decode(predicted.copy(), code + b"\0", 8)
    assert encode(predicted, actual, 8) == code
    with pytest.raises(ValueError, match=r"."):
        decode(predicted[:-1].copy(), code, 8)


def test_what_is_wrong_is_said() -> None:
    predicted, actual = tuned_like(30_000, 1e-4)
    actual[7] ^= 0x4000  # listed
    code = encode(predicted, actual, 8)
    lanes, places, count = struct.unpack_from("<BBI", code)
    assert (lanes, places, count > 0) == (8, 1, True)

    def refused(message: str, *changes: tuple[int, bytes], bits: int = 8) -> None:
        changed = bytearray(code)
        for position, data in changes:
            changed[position : position + len(data)] = data
        with pytest.raises(ValueError, match=message):
            decode(predicted.copy(), bytes(changed), bits)

    refused("5 lanes", (0, b"\5"))
    refused("8 lanes", bits=0)  # there is nothing to sort by
    refused("3 places", (1, b"\3"))
    refused("0 places", (1, b"\0"))
    refused("31000 weights listed of 30000", (2, struct.pack("<I", 31_000)))
    refused("digits of an unknown width", (6, b"\7"))
    refused("a frame of .* bytes, expected", (2, struct.pack("<I", count + 1)))
    # A position beyond the end: the gaps, byte by byte, lie before what is to be added.
    frame = 6 + lanes
    content = bytearray(decompress(code[frame:], zstd.get_frame_info(code[frame:]).decompressed_size))
    content[len(content) - count * 6 + count] = 255
    with pytest.raises(ValueError, match="a position beyond the end"):
        decode(predicted.copy(), code[:frame] + compress(bytes(content)), 8)


def sorted_code() -> tuple[np.ndarray, np.ndarray, bytes]:
    predicted, actual = tuned_like(20_000, 1e-4)
    return predicted, actual, encode(predicted, actual, 8)


SORTED = sorted_code()


@given(data=st.binary(max_size=400), flip=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_hostile_codes_raise_value_errors_or_decode(data: bytes, flip: int, value: int) -> None:
    """A changed code is refused or gives other bits; it never does anything else."""
    predicted, actual, code = SORTED
    for hostile in (data, bytearray(code)):
        changed = bytearray(hostile)
        if isinstance(hostile, bytearray):
            changed[flip % len(changed)] = value
        found = predicted.copy()
        try:
            decode(found, bytes(changed), 8)
        except ValueError:
            continue
        assert found.shape == actual.shape


def test_frames_are_bounded_before_they_are_read() -> None:
    bomb = compress(bytes(1 << 24))
    assert len(bomb) < 4096
    with pytest.raises(ValueError, match="a frame of 16777216 bytes, expected 1000"):
        decompress(bomb, 1000)
    with pytest.raises(ValueError, match=r"."):
        decompress(compress(b"abc" * 100) + b"rest", 300)
    with pytest.raises(ValueError, match=r"."):
        decompress(zlib.compress(b"abc"), 3)

"""What is left between a prediction of a weight and the weight, coded. Pure functions on numpy arrays of bit patterns.

    predicted, actual: (n,) unsigned integers of the weights' width, N bits     d = actual - predicted, modulo 2^N

For floats of one sign, d counts units in the last place. What a fine-tune and rounding leave is of about the same size
for all weights, so in units of the last place it is large for small weights and small for large ones. The prediction
is known to the decoder, hence weights are sorted by the exponent of their prediction, eight at a time (see `lanes`):
weight i of the chunk is in lane i // (n // 8), and each lane of sorted weights has codes of its own.

d is written in base 256 with digits -128 .. 127, as many as nearly all weights need, each place for itself. Within a
lane the digits of a place are packed in one of these ways, whichever is smallest on a sample:

    width 2, 4   4 or 2 digits to a byte, from -1 .. 2 or -7 .. 8
    width 8      a digit to a byte, with 128 added

Huffman codes lose on a symbol that is more frequent than one half, and several digits to a byte make up for it. What
does not fit, and the weights beyond the last whole column, is listed with its position and added at the end.

    chunk    lanes (1 byte), places (1), weights in the list (4), for each place and lane its width (1)
             a Zstandard frame of: the digits of each place and lane; byte by byte, the lowest of all first, the gap
             before each weight in the list (4 bytes) and what is to be added to it (as many bytes as a weight has)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from surgery.ops.lanes import Network
from surgery.zstd import compress, decompress

if TYPE_CHECKING:
    import numpy as np

# Bits of the exponent, by dtype. Weights of what is not here are not sorted.
EXPONENT_BITS = {
    "BF16": 8, "F16": 5, "F32": 8, "F64": 11, "F8_E4M3": 4, "F8_E5M2": 5, "F8_E4M3FNUZ": 4, "F8_E5M2FNUZ": 5,
}  # fmt: skip
# More lanes make smaller codes: with 4, 8 and 16 they are 12, 16 and 19% smaller than unsorted ones, and each doubling
# doubles the time for sorting (docs/experiments.md).
_SORTED = 8
_LANES = (1, 2, 4, 8, 16)
# Sorting must save this share, and the tables of Huffman codes take about so many bits a lane.
_LEAST_GAIN = 0.01
_TABLE_BITS = 600
_MOST_SAMPLES = 1 << 16
_SYMBOLS = 1024
# Digits of a lane that its width is chosen by, and what a digit takes that does not fit, in bytes.
_TRIAL = 1 << 14
_LISTED_BYTES = 2
# Of more weights than this share of them, one more digit is written.
_LISTED_SHARE = 1 / 128
# Lanes, places, and weights in the list.
_HEAD = struct.Struct("<BBI")
_GAP_BYTES = 4
# What is added to a digit of each width.
_BIAS = {2: 1, 4: 7, 8: 128}


def encode(predicted: np.ndarray, actual: np.ndarray, exponent_bits: int = 0) -> bytes:
    """The difference of two arrays of equal type, in a form that `decode` reverses given `predicted`.

    `exponent_bits` is the width of the exponent below the sign, or 0 for numbers that have none.
    """
    import numpy as np

    lanes = _choose_lanes(predicted, actual, exponent_bits)
    columns = predicted.size // lanes
    network, inner = Network(lanes, columns), slice(0, lanes * columns)
    if lanes > 1:
        _find_keys(predicted[inner], exponent_bits, network.keys)
        network.learn()
    difference = actual - predicted
    places = _choose_places(difference)
    widths, pieces = bytearray(), []
    left = difference.copy()  # what the digits do not say
    for place in range(places):
        network.digits[...] = _digit(difference[inner], place, places).reshape(lanes, columns)
        network.sort()
        for lane in network.digits:
            width = _choose_width(lane)
            widths.append(width)
            pieces.append(_pack(lane, width).tobytes())
            lane[...] = _limit(lane, width)
        network.unsort()
        left[inner] -= _widen(network.digits, place, left.dtype)
    listed = np.flatnonzero(left)
    pieces += _planes(np.diff(listed, prepend=0).astype(np.uint32))
    pieces += _planes(left[listed] + left.dtype.type(_middle(left.itemsize)))
    return _HEAD.pack(lanes, places, listed.size) + bytes(widths) + compress(*pieces)


def decode(predicted: np.ndarray, data: bytes | memoryview, exponent_bits: int = 0) -> None:
    """Turn `predicted` into the actual bits, in place. Raises ValueError for bytes that `encode` cannot have made."""
    Decoder(exponent_bits).decode(predicted, data)


class Decoder:
    """Decodes chunk after chunk in the same memory: new memory takes longer than what is done in it."""

    def __init__(self, exponent_bits: int) -> None:
        self._exponent_bits = exponent_bits
        self._network = Network(1, 0)

    def decode(self, predicted: np.ndarray, data: bytes | memoryview) -> None:
        """See the function."""
        import numpy as np

        if len(data) < _HEAD.size:
            raise ValueError("it was cut short")
        lanes, places, count = _HEAD.unpack_from(data)
        if lanes not in _LANES or (lanes > 1 and not self._exponent_bits):
            raise ValueError(f"{lanes} lanes")
        if not 0 < places <= predicted.itemsize:
            raise ValueError(f"{places} places")
        if count > predicted.size:
            raise ValueError(f"{count} weights listed of {predicted.size}")
        columns = predicted.size // lanes
        begin = _HEAD.size + lanes * places
        widths = bytes(data[_HEAD.size : begin])
        if len(widths) != lanes * places or set(widths) - set(_BIAS):
            raise ValueError("digits of an unknown width")
        packed_sizes = [_packed_size(columns, width) for width in widths]
        listed_size = count * (_GAP_BYTES + predicted.itemsize)
        content = np.frombuffer(decompress(memoryview(data)[begin:], sum(packed_sizes) + listed_size), np.uint8)
        if self._network.keys.shape != (lanes, columns):
            self._network = Network(lanes, columns)
        network, inner = self._network, predicted[: lanes * columns]
        if lanes > 1:
            _find_keys(inner, self._exponent_bits, network.keys)
            network.learn()
        position = 0
        for place in range(places):
            for first, last, width in _alike(widths[place * lanes : (place + 1) * lanes]):
                size = (last - first) * _packed_size(columns, width)
                packed = content[position : position + size].reshape(last - first, -1)
                _unpack(packed, width, network.digits[first:last])
                position += size
            network.unsort()
            if place:
                np.add(inner, _widen(network.digits, place, inner.dtype), out=inner)
            else:
                signed = inner.view(f"i{inner.itemsize}")
                np.add(signed, network.digits.reshape(-1).view(np.int8), out=signed)
        if count:
            gaps = _from_planes(content[position : position + count * _GAP_BYTES], count)
            positions = np.cumsum(gaps, dtype=np.int64)
            if positions[-1] >= predicted.size:
                raise ValueError("a position beyond the end")
            listed = _from_planes(content[position + count * _GAP_BYTES :], count)
            # A hostile code may list a weight twice: then one of the two is added, and the hash does not match.
            predicted[positions] += listed - listed.dtype.type(_middle(listed.itemsize))


def estimate(predicted: np.ndarray, actual: np.ndarray, exponent_bits: int = 0) -> float:
    """Bytes that `encode` would take, about: the entropy of the differences, lane by lane.

    Of a large difference the sign, the place of its first binary digit and the next two are counted as a symbol and the
    others as they are, so that a few thousand samples are enough.
    """
    bits = _entropy(predicted, actual, exponent_bits, 1)
    if exponent_bits and predicted.size >= _SORTED:
        bits = min(bits, _entropy(predicted, actual, exponent_bits, _SORTED))
    return bits / 8


# Choices --------------------------------------------------------------------------------------------------------------


def _choose_lanes(predicted: np.ndarray, actual: np.ndarray, exponent_bits: int) -> int:
    """`_SORTED` where sorting makes a sample smaller, or 1."""
    if not exponent_bits or predicted.size < 64 * _SORTED:
        return 1
    step = -(-predicted.size // _MOST_SAMPLES)
    left, right = predicted[::step], actual[::step]
    scale = predicted.size / left.size
    alone = scale * _entropy(left, right, exponent_bits, 1) + _TABLE_BITS
    together = scale * _entropy(left, right, exponent_bits, _SORTED) + _TABLE_BITS * _SORTED
    return _SORTED if together < (1 - _LEAST_GAIN) * alone else 1


def _choose_places(difference: np.ndarray) -> int:
    """How many digits to write: so many that few weights need more."""
    import numpy as np

    for places in range(1, difference.itemsize):
        half = difference.dtype.type(1 << (8 * places - 1))
        if np.count_nonzero(difference + half >= half + half) <= _LISTED_SHARE * difference.size:
            return places
    return difference.itemsize


def _choose_width(lane: np.ndarray) -> int:
    """The width that a sample of a lane's digits takes fewest bytes in."""
    import numpy as np

    trial = lane[:_TRIAL]
    sizes = {}
    for width in _BIAS:
        lost = int(np.count_nonzero(_limit(trial, width) != trial))
        sizes[width] = len(compress(_pack(trial, width).tobytes())) + _LISTED_BYTES * lost
    return min(sizes, key=sizes.__getitem__)


# Digits ---------------------------------------------------------------------------------------------------------------


def _find_keys(weights: np.ndarray, exponent_bits: int, keys: np.ndarray) -> None:
    """What weights are sorted by goes to `keys` (lanes, columns): their exponents, or the last 8 bits of these."""
    import numpy as np

    found = keys.reshape(-1)
    mantissa_bits = 8 * weights.itemsize - 1 - exponent_bits
    np.right_shift(weights, weights.dtype.type(mantissa_bits), out=found, casting="unsafe")
    if exponent_bits < 8:
        np.bitwise_and(found, np.uint8((1 << exponent_bits) - 1), out=found)


def _digit(difference: np.ndarray, place: int, places: int) -> np.ndarray:
    """A digit of each difference, as a byte; 0 in all places where a difference has more digits than `places`."""
    import numpy as np

    biased = difference + difference.dtype.type(_middle(places))
    found: np.ndarray = (biased >> difference.dtype.type(8 * place)).astype(np.uint8) - np.uint8(128)
    if places < difference.itemsize:
        found[biased >> difference.dtype.type(8 * places) != 0] = 0
    return found


def _widen(digits: np.ndarray, place: int, dtype: np.dtype) -> np.ndarray:
    """What digits of a place are worth, as a vector of a wider type."""
    import numpy as np

    wide: np.ndarray = digits.reshape(-1).view(np.int8).astype(dtype) << dtype.type(8 * place)
    return wide


def _limit(digits: np.ndarray, width: int) -> np.ndarray:
    """Digits with 0 for those that a width does not hold."""
    import numpy as np

    biased = digits + np.uint8(_BIAS[width])
    return digits if width == 8 else np.where(biased >> np.uint8(width), np.uint8(0), digits)


def _middle(places: int) -> int:
    """0x80 in every byte: with it added, the digits -128 .. 127 of a number are its bytes less 128."""
    return int.from_bytes(b"\x80" * places, "little")


def _pack(digits: np.ndarray, width: int) -> np.ndarray:
    """Digits in `width` bits, 8 / width to a byte. Each part of a byte goes through a stretch of the digits."""
    import numpy as np

    each = 8 // width
    length = -(-digits.size // each)
    symbols = np.full(each * length, _BIAS[width], np.uint8)
    symbols[: digits.size] = _limit(digits, width) + np.uint8(_BIAS[width])
    packed = symbols[:length].copy()
    for part in range(1, each):
        packed |= symbols[part * length : (part + 1) * length] << np.uint8(width * part)
    return packed


def _packed_size(count: int, width: int) -> int:
    return -(-count * width // 8)


def _unpack(packed: np.ndarray, width: int, digits: np.ndarray) -> None:
    """The inverse of `_pack`, for several lanes at once, into `digits`."""
    import numpy as np

    length = packed.shape[1]
    for part in range(8 // width):
        stretch = digits[:, part * length : (part + 1) * length]
        source = packed[:, : stretch.shape[1]]
        if width < 8:
            np.right_shift(source, np.uint8(width * part), out=stretch)
            np.bitwise_and(stretch, np.uint8((1 << width) - 1), out=stretch)
            source = stretch
        np.subtract(source, np.uint8(_BIAS[width]), out=stretch)


def _alike(widths: bytes) -> Iterator[tuple[int, int, int]]:
    """Ranges of neighbouring lanes of equal width, with the width."""
    first = 0
    for width, group in groupby(widths):
        last = first + len(list(group))
        yield first, last, width
        first = last


def _planes(numbers: np.ndarray) -> list[bytes]:
    """The bytes of unsigned integers, those of each place together."""
    import numpy as np

    planes = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, numbers.itemsize).T
    return [plane.tobytes() for plane in planes]


def _from_planes(content: np.ndarray, count: int) -> np.ndarray:
    """The inverse of `_planes`."""
    import numpy as np

    found = np.ascontiguousarray(content.reshape(-1, count).T)
    return found.view(f"u{found.shape[1]}").reshape(count)


# Estimates ------------------------------------------------------------------------------------------------------------


def _entropy(predicted: np.ndarray, actual: np.ndarray, exponent_bits: int, lanes: int) -> float:
    """Bits that an ideal code would take with so many lanes."""
    import numpy as np

    columns = predicted.size // lanes
    used = columns * lanes
    symbols, raw = _symbols(predicted[:used], actual[:used])
    if lanes > 1:
        keys = np.empty((lanes, columns), np.uint8)
        _find_keys(predicted[:used], exponent_bits, keys)
        order = np.argsort(~keys, axis=0, kind="stable")
        symbols = np.take_along_axis(symbols.reshape(lanes, columns), order, axis=0)
    counts = np.stack([np.bincount(lane, minlength=_SYMBOLS) for lane in symbols.reshape(lanes, columns)])
    return float((_entropies(counts).sum() + raw.sum()) * (predicted.size / max(used, 1)))


def _symbols(predicted: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each difference as a symbol, and how many binary digits the symbol leaves open."""
    import numpy as np

    signed = (actual - predicted).view(f"i{predicted.itemsize}").astype(np.float64)
    mantissa, exponent = np.frexp(np.abs(signed))
    symbols = (exponent.astype(np.int64) * 4 + ((mantissa * 8).astype(np.int64) & 3)) * 2 + (signed < 0)
    return symbols, np.maximum(exponent - 3, 0)


def _entropies(counts: np.ndarray) -> np.ndarray:
    """Bits that symbols of these counts, along the last axis, take together with an ideal code."""
    import numpy as np

    counts = np.asarray(counts, np.float64)
    bits: np.ndarray = _weigh(counts.sum(axis=-1)) - _weigh(counts).sum(axis=-1)
    return bits


def _weigh(counts: np.ndarray) -> np.ndarray:
    """The values n log2 n, and 0 for n <= 0."""
    import numpy as np

    weighed: np.ndarray = counts * np.log2(np.maximum(counts, 1))
    return weighed

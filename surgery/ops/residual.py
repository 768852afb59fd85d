"""What is left between a prediction of a weight and the weight, coded. Pure functions on numpy arrays of bit patterns.

    predicted, actual: (n,) unsigned integers of the weights' width, N bits     d = actual - predicted, modulo 2^N

For floats of one sign, d counts units in the last place. What a fine-tune and rounding leave is of about the same size
for all weights, so in units of the last place it is large for small weights and small for large ones. The prediction
is known to the decoder, hence weights are sorted into classes by the exponent of their prediction, and each class has
codes of its own. Within a class d is written in one of these ways, whichever is smallest on a sample:

    width 2, 4   d in so many bits, 4 or 2 to a byte; values beyond the range are marked and follow as width 8
    width 8      d in base 256 with digits -128 .. 127, each digit in a plane of its own

and every run of bytes is a constant, raw, or a Zstandard frame of Huffman codes. Several weights to a byte make up for
what a Huffman code loses on a symbol that is more frequent than one half.

    chunk    class count (1 byte), then for each: least exponent (2 bytes), weights in it (4), width (1), its runs
    run      kind (1 byte): 0 constant, its value (1)     1 raw, the bytes     2 frame, its length (4), the frame
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Bits of the exponent, by dtype. What is not here has one class.
EXPONENT_BITS = {
    "BF16": 8, "F16": 5, "F32": 8, "F64": 11, "F8_E4M3": 4, "F8_E5M2": 5, "F8_E4M3FNUZ": 4, "F8_E5M2FNUZ": 5,
}  # fmt: skip
# One more class must save this share: each costs time to take apart again.
_LEAST_GAIN = 0.05
_MOST_CLASSES = 6
_MOST_SAMPLES = 1 << 16
_SYMBOLS = 1024
# Weights that are put in their places at a time: their positions stay in a core's cache.
_STRETCH = 1 << 16
# Weights of a class that its width is chosen by.
_TRIAL = 1 << 14
_CONSTANT, _RAW, _FRAME = range(3)


def encode(predicted: np.ndarray, actual: np.ndarray, exponent_bits: int = 0) -> bytes:
    """The difference of two arrays of equal type, in a form that `decode` reverses given `predicted`.

    `exponent_bits` is the width of the exponent below the sign, or 0 for numbers that have none.
    """
    classes = _choose_classes(predicted, actual, exponent_bits)
    magnitude = _magnitude(predicted, exponent_bits)
    parts = [struct.pack("<B", len(classes))]
    for members in _ranges(classes, predicted.dtype, exponent_bits):
        where = members.find(magnitude)
        difference = actual - predicted if where is None else actual[where] - predicted[where]
        parts.append(struct.pack("<HI", members.least, difference.size))
        parts += _encode_class(difference)
    return b"".join(parts)


def decode(predicted: np.ndarray, data: bytes | memoryview, exponent_bits: int = 0) -> None:
    """Turn `predicted` into the actual bits, in place. Raises ValueError for bytes that `encode` cannot have made."""
    reader = _Reader(memoryview(data))
    classes, decoded = [], []
    left = predicted.size
    for _ in range(reader.number("<B")):
        classes.append(reader.number("<H"))
        count = reader.number("<I")
        left -= count
        if left < 0:
            raise ValueError("more weights than there are")
        decoded.append(_Cursor(count, *_decode_class(reader, count, predicted.itemsize)))
    if left or not reader.at_end or classes[-1:] != [0]:
        raise ValueError("a chunk that does not end where it should")
    ranges = _ranges(classes, predicted.dtype, exponent_bits)
    for begin in range(0, predicted.size, _STRETCH):
        _decode_stretch(predicted[begin : begin + _STRETCH], ranges, decoded, exponent_bits)
    if any(cursor.position != cursor.count for cursor in decoded):
        raise ValueError("classes that another prediction was sorted into")


def _decode_stretch(predicted: np.ndarray, ranges: list[_Members], decoded: list[_Cursor], exponent_bits: int) -> None:
    import numpy as np

    magnitude = _magnitude(predicted, exponent_bits)
    digits = np.empty(predicted.size, np.uint8)
    corrections = []
    for members, cursor in zip(ranges, decoded, strict=True):
        where = members.find(magnitude)
        low, places, high = cursor.take(predicted.size if where is None else where.size)
        if where is None:
            digits = low
        else:
            digits[where] = low
            places = where if places is None else where[places]
        if high is not None:
            corrections.append((places, high))
    np.add(predicted, digits, out=predicted)
    np.subtract(predicted, predicted.dtype.type(128), out=predicted)
    for places, high in corrections:
        if places is None:
            np.add(predicted, high, out=predicted)
        else:
            predicted[places] += high


def estimate(predicted: np.ndarray, actual: np.ndarray, exponent_bits: int = 0) -> float:
    """Bytes that `encode` would take, about: the entropy of the differences, class by class.

    Of a large difference the sign, the place of its first binary digit and the next two are counted as a symbol and the
    others as they are, so that a few thousand samples are enough.
    """
    import numpy as np

    symbols, raw = _symbols(predicted, actual)
    bits = float(raw.sum())
    magnitude = _magnitude(predicted, exponent_bits)
    for members in _ranges(_choose_classes(predicted, actual, exponent_bits), predicted.dtype, exponent_bits):
        where = members.find(magnitude)
        bits += float(_entropies(np.bincount(symbols if where is None else symbols[where])))
    return bits / 8


# Classes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Members:
    """A class: exponents from `least` on, and below `upper` where there is a class above."""

    least: int
    upper: int | None
    shift: int

    def find(self, magnitude: np.ndarray | None) -> np.ndarray | None:
        """Positions of the weights of this class; None for all of them."""
        if magnitude is None or (self.least == 0 and self.upper is None):
            return None
        kind = magnitude.dtype.type
        found: np.ndarray
        if self.upper is None:
            found = magnitude >= kind(self.least << self.shift)
        elif self.least == 0:
            found = magnitude < kind(self.upper << self.shift)
        else:
            width = kind((self.upper - self.least) << self.shift)
            found = magnitude - kind(self.least << self.shift) < width
        return found.nonzero()[0]


def _ranges(classes: list[int], dtype: np.dtype, exponent_bits: int) -> list[_Members]:
    """The classes with these least exponents, which descend to 0."""
    if any(upper <= least for upper, least in pairwise([1 << exponent_bits, *classes])):
        raise ValueError("classes that are out of order")
    shift = 8 * dtype.itemsize - 1 - exponent_bits
    uppers = [None, *classes[:-1]]
    return [_Members(least, upper, shift) for least, upper in zip(classes, uppers, strict=True)]


def _magnitude(predicted: np.ndarray, exponent_bits: int) -> np.ndarray | None:
    """The bits without the sign, or None where all weights are of one class."""
    if not exponent_bits:
        return None
    bits = 8 * predicted.itemsize
    magnitude: np.ndarray = predicted & predicted.dtype.type((1 << (bits - 1)) - 1)
    return magnitude


def _symbols(predicted: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each difference as a symbol, and how many binary digits the symbol leaves open."""
    import numpy as np

    signed = (actual - predicted).view(f"i{predicted.itemsize}").astype(np.float64)
    mantissa, exponent = np.frexp(np.abs(signed))
    symbols = (exponent.astype(np.int64) * 4 + ((mantissa * 8).astype(np.int64) & 3)) * 2 + (signed < 0)
    return symbols, np.maximum(exponent - 3, 0)


def _choose_classes(predicted: np.ndarray, actual: np.ndarray, exponent_bits: int) -> list[int]:
    """The least exponent of each class, descending; the last is 0.

    Of all ways to divide the exponents into k neighbouring classes, the one of least entropy (dynamic programming), for
    the least k that one more class would not make smaller by `_LEAST_GAIN`. Judged by a sample.
    """
    import numpy as np

    if not exponent_bits or predicted.size < 64:
        return [0]
    step = -(-predicted.size // _MOST_SAMPLES)
    predicted, actual = predicted[::step], actual[::step]
    magnitude = _magnitude(predicted, exponent_bits)
    assert magnitude is not None
    exponents = (magnitude >> magnitude.dtype.type(8 * magnitude.itemsize - 1 - exponent_bits)).astype(np.int64)
    counts = np.bincount(exponents)
    bounds = [0]  # groups of neighbouring exponents, each of a sixtieth of the weights at least
    for exponent in range(len(counts) - 1):
        if counts[bounds[-1] : exponent + 1].sum() >= predicted.size / 60 <= counts[exponent + 1 :].sum():
            bounds.append(exponent + 1)
    symbols, raw = _symbols(predicted, actual)
    groups = np.searchsorted(bounds, exponents, side="right") - 1
    table = np.bincount(groups * _SYMBOLS + symbols, minlength=len(bounds) * _SYMBOLS).reshape(len(bounds), _SYMBOLS)
    sums = np.pad(np.cumsum(table[:, table.any(axis=0)], axis=0), ((1, 0), (0, 0)))
    cost = _entropies(sums[None, :] - sums[:, None])  # [i, j]: of groups i up to j together
    best, cuts = np.where(np.arange(len(sums)) > 0, cost[0], np.inf), [np.zeros(len(sums), np.int64)]
    chosen = [0]
    for count in range(2, min(_MOST_CLASSES, len(bounds)) + 1):
        options = np.where(np.tri(len(sums), k=-1, dtype=bool).T, best[:, None] + cost, np.inf)
        before, best = best, options.min(axis=0)
        cuts.append(options.argmin(axis=0))
        if before[-1] - best[-1] <= _LEAST_GAIN * (before[-1] + raw.sum()):
            break
        chosen, end = [], len(bounds)
        for level in range(count - 1, -1, -1):
            end = int(cuts[level][end])
            chosen.append(bounds[end])
    return chosen


# One class ------------------------------------------------------------------------------------------------------------


def _encode_class(difference: np.ndarray) -> list[bytes]:
    """Width and runs of the differences of one class; a sample of them is tried in every width."""
    trial = difference[:_TRIAL]
    coded = min((_encode_width(trial, width) for width in (8, 4, 2)), key=lambda parts: sum(map(len, parts)))
    return coded if trial.size == difference.size else _encode_width(difference, coded[0][0])


def _encode_width(difference: np.ndarray, width: int) -> list[bytes]:
    import numpy as np

    itemsize = difference.itemsize
    biased = difference + difference.dtype.type(_bias(itemsize))
    planes = biased.view(np.uint8).reshape(-1, itemsize).T
    low = np.ascontiguousarray(planes[0])
    if width == 8:
        return [bytes([8]), _run(low), *(_run(np.ascontiguousarray(plane)) for plane in planes[1:])]
    most = (1 << width - 1) - 1
    symbols = low - np.uint8(128 - most)
    escaped = symbols > 2 * most
    if itemsize > 1:
        escaped |= biased >> difference.dtype.type(8) != difference.dtype.type(_bias(itemsize) >> 8)
    symbols[escaped] = 2 * most + 1
    rest = np.ascontiguousarray(planes[:, escaped])
    return [bytes([width]), _run(_pack(symbols, width, most)), *(_run(plane) for plane in rest)]


def _decode_class(
    reader: _Reader, count: int, itemsize: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The lowest digits (count,), and what the higher ones add: at which positions (None for all), and how much."""
    import numpy as np

    width = reader.number("<B")
    if width == 8:
        low = reader.run(count)
        return low, None, _higher(reader, count, itemsize)
    if width not in (2, 4):
        raise ValueError(f"a width of {width}")
    most = (1 << width - 1) - 1
    low = _unpack(reader.run(-(-count * width // 8)), width, count)
    escaped = np.flatnonzero(low == 2 * most + 1)
    low += np.uint8(128 - most)
    low[escaped] = reader.run(escaped.size)
    return low, escaped, _higher(reader, escaped.size, itemsize)


@dataclass
class _Cursor:
    """The decoded differences of a class, handed out in order; see `_decode_class`."""

    count: int
    low: np.ndarray
    places: np.ndarray | None
    high: np.ndarray | None
    position: int = 0

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """The lowest digits of the next `count` weights, and what to add at which of them (None for all)."""
        import numpy as np

        begin, end = self.position, self.position + count
        if end > self.count:
            raise ValueError("classes that another prediction was sorted into")
        self.position = end
        low = self.low[begin:end]
        if self.high is None:
            return low, None, None
        if self.places is None:
            return low, None, self.high[begin:end]
        first, last = np.searchsorted(self.places, [begin, end])
        return low, self.places[first:last] - begin, self.high[first:last]


def _higher(reader: _Reader, count: int, itemsize: int) -> np.ndarray | None:
    """What the digits above the lowest add to a difference, or None where they are all zero."""
    import numpy as np

    total: np.ndarray | None = None
    for place in range(1, itemsize):
        plane = reader.run_or_constant(count)
        if isinstance(plane, int):
            if plane == 128:
                continue
            plane = np.full(count, plane, np.uint8)
        wide = (plane.astype(f"u{itemsize}") - 128) << (8 * place)
        total = wide if total is None else total + wide
    return total


def _bias(itemsize: int) -> int:
    """0x80 in every byte: with it added, the digits -128 .. 127 of a number are its bytes less 128."""
    return int.from_bytes(b"\x80" * itemsize, "little")


def _pack(symbols: np.ndarray, width: int, filler: int) -> np.ndarray:
    """Symbols of `width` bits, 8 / width to a byte. Each part of a byte goes through a stretch of the symbols."""
    import numpy as np

    each = 8 // width
    length = -(-symbols.size // each)
    padded = np.full(each * length, filler, np.uint8)
    padded[: symbols.size] = symbols
    packed = padded[:length].copy()
    for part in range(1, each):
        packed |= padded[part * length : (part + 1) * length] << np.uint8(width * part)
    return packed


def _unpack(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """The inverse of `_pack`, for `count` symbols."""
    import numpy as np

    each, length = 8 // width, packed.size
    symbols = np.empty(each * length, np.uint8)
    for part in range(each):
        stretch = symbols[part * length : (part + 1) * length]
        np.right_shift(packed, np.uint8(width * part), out=stretch)
        np.bitwise_and(stretch, np.uint8((1 << width) - 1), out=stretch)
    return symbols[:count]


def _entropies(counts: np.ndarray) -> np.ndarray:
    """Bits that symbols of these counts, along the last axis, take together with an ideal code."""
    import numpy as np

    counts = np.asarray(counts, np.float64)
    total = counts.sum(axis=-1)
    bits: np.ndarray = _weigh(total) - _weigh(counts).sum(axis=-1)
    return bits


def _weigh(counts: np.ndarray) -> np.ndarray:
    """The values n log2 n, and 0 for n <= 0."""
    import numpy as np

    weighed: np.ndarray = counts * np.log2(np.maximum(counts, 1))
    return weighed


def _run(data: np.ndarray) -> bytes:
    from surgery.zstd import compress

    if not data.size or bool((data == data[0]).all()):
        return bytes([_CONSTANT, int(data[0]) if data.size else 128])
    raw = data.tobytes()
    frame = compress(raw)
    if len(frame) + 4 < len(raw) - len(raw) // 64:
        return bytes([_FRAME]) + struct.pack("<I", len(frame)) + frame
    return bytes([_RAW]) + raw


@dataclass
class _Reader:
    """Takes what `_run` and `struct` wrote, and never more than there is."""

    data: memoryview
    position: int = 0

    @property
    def at_end(self) -> bool:
        return self.position == len(self.data)

    def take(self, count: int) -> memoryview:
        found = self.data[self.position : self.position + count]
        if len(found) != count:
            raise ValueError(f"{count} bytes expected where {len(found)} are left")
        self.position += count
        return found

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def run(self, count: int) -> np.ndarray:
        """A run of `count` bytes."""
        import numpy as np

        found = self.run_or_constant(count)
        return np.full(count, found, np.uint8) if isinstance(found, int) else found

    def run_or_constant(self, count: int) -> np.ndarray | int:
        import numpy as np

        from surgery.zstd import decompress

        kind = self.number("<B")
        if kind == _CONSTANT:
            return self.number("<B")
        if kind == _RAW:
            return np.frombuffer(self.take(count), np.uint8)
        if kind == _FRAME:
            return np.frombuffer(decompress(self.take(self.number("<I")), count), np.uint8)
        raise ValueError(f"a run of kind {kind}")

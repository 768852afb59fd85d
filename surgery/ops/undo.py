"""The undo record: what it takes to get the base's bits back from a merged weight, whatever computes them.

The base is predicted as round(merged - dW), computed in float64. A prediction depends on the order in which a machine
sums B A, but only within a bound: two orders give values at most `2 e` apart, e = (r + 4) 2^-53 s |b||a| and a few
roundings. The record holds the base's bits of every weight whose prediction is wrong, or would be anywhere within that
bound. What is left out is predicted right by any machine, any number of threads and any order of summation.

    gaps    distances between the recorded weights, in row-major order, as bytes: 255 adds 255 and goes on; deflated
    bits    the recorded weights' own bits, byte plane by byte plane; deflated
    factor  for each DoRA contribution m / ||W + dW|| as it was multiplied with, in float32 or float64
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from surgery.ops.deltas import Factors, delta_rows

if TYPE_CHECKING:
    import numpy as np
    import torch

_UNIT = 2.0**-53  # relative rounding error of one float64 operation
_SLACK = 1.001  # for the rounding of the bound itself


def predict(
    merged: torch.Tensor, found: list[Factors], scales: list[torch.Tensor | None], begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take contributions out of a merged tile again, in float64, last first.

    Args:
        merged: (rows, columns) in any dtype.
        found: the factors, in float64.
        scales: the DoRA factor of each contribution, or None.
        begin: the tile's first row within its block.
        end: the row after its last.

    Returns:
        The predicted base x, and the bound e on how far another order of summation may carry it, of a shape that
        broadcasts with x; both float64.
    """
    import torch

    x = merged.to(torch.float64, copy=True)
    bound = x.new_zeros(())
    for factors, scale in reversed(list(zip(found, scales, strict=True))):
        if scale is not None:
            wide = scale.to(torch.float64)
            x = x / wide
            bound = bound / wide.abs() + 2 * _UNIT * _largest(x)
        x = x.sub_(delta_rows(factors, begin, end))
        bound = bound + _summation_bound(factors, begin, end) + 2 * _UNIT * _largest(x)
    return x, bound


def _largest(x: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(x, ord=torch.inf))


def _summation_bound(factors: Factors, begin: int, end: int) -> torch.Tensor:
    """(r + 4) 2^-53 |s| |b||a| for the rows of a tile: what the order of summation, the scale and the sum can change.

    The sum over the rank of |b||a| is at most the product of the norms of b and a (Cauchy and Schwarz); the largest
    column stands for all, so that the bound is one number a row and costs next to nothing.
    """
    if factors.is_bias:
        return 5 * _UNIT * (factors.B * factors.scale).abs()
    rank = factors.B.shape[1]
    ours, theirs = factors.B.norm(dim=1), factors.A.norm(dim=0)
    if factors.transposed:
        ours, theirs = theirs, ours
    largest = theirs.amax() if theirs.numel() else theirs.sum()
    rows = ours.amax() if factors.shape else ours[begin:end, None]
    bound: torch.Tensor = rows * largest * (abs(factors.scale) * (rank + 4) * _UNIT * _SLACK)
    return bound


def uncertain(base: torch.Tensor, x: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Where the base's bits do not follow from x: a mask of the tile's shape.

    Rounding is monotonic, so if both ends of [x - 2e, x + 2e] round to the base's bits, all between them do. What is
    not finite is always recorded, since machines differ in the bits of a NaN.
    """
    low, high = (x - 2 * bound).to(base.dtype), (x + 2 * bound).to(base.dtype)
    bits = _integer_view(base)
    finite = (base if base.element_size() > 1 else base.float()).isfinite()  # torch has no isfinite for float8
    return (_integer_view(low) != bits) | (_integer_view(high) != bits) | ~finite


def _integer_view(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(types[tensor.element_size()])


@dataclass
class Recorder:
    """Gathers the record of one tensor, tile by tile in order."""

    positions: list[np.ndarray] = field(default_factory=list)
    bits: list[np.ndarray] = field(default_factory=list)

    def add(self, offset: int, base: torch.Tensor, mask: torch.Tensor) -> None:
        """Note the bits of `base` where `mask` is set; `offset` is the tile's first element within the tensor."""
        import torch

        flat = mask.view(-1).nonzero().view(-1)
        chosen = base.contiguous().view(-1)[flat]
        self.positions.append((flat + offset).cpu().numpy())
        self.bits.append(chosen.view(torch.uint8).view(-1, base.element_size()).cpu().numpy())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The record as tensors of bytes: `gaps` and `bits`."""
        import numpy as np
        import torch

        positions = np.concatenate(self.positions) if self.positions else np.zeros(0, np.int64)
        bits = np.concatenate(self.bits) if self.bits else np.zeros((0, 1), np.uint8)
        gaps = _deflate(_encode_gaps(positions).tobytes())
        planes = _deflate(np.ascontiguousarray(bits.T).tobytes())
        return {
            "gaps": torch.frombuffer(bytearray(gaps), dtype=torch.uint8),
            "bits": torch.frombuffer(bytearray(planes), dtype=torch.uint8),
        }

    @property
    def count(self) -> int:
        return sum(len(found) for found in self.positions)


@dataclass(frozen=True)
class Literals:
    """The recorded weights of one tensor: sorted positions, and their bits as rows of bytes."""

    positions: np.ndarray
    bits: np.ndarray

    def overwrite(self, predicted: torch.Tensor, offset: int) -> None:
        """Put the recorded bits into a tile of predictions that starts at element `offset` of the tensor."""
        import numpy as np
        import torch

        first, last = np.searchsorted(self.positions, [offset, offset + predicted.numel()])
        if first == last:
            return
        places = torch.from_numpy(self.positions[first:last] - offset).to(predicted.device)
        values = torch.from_numpy(self.bits[first:last].copy()).view(-1).view(predicted.dtype)
        predicted.view(-1)[places] = values.to(predicted.device)


def decode(stored: Mapping[str, torch.Tensor], numel: int, itemsize: int) -> Literals:
    """The inverse of `Recorder.tensors`, for a tensor of `numel` elements. Raises ValueError for what cannot be one."""
    import numpy as np

    positions = _decode_gaps(np.frombuffer(_inflate(stored["gaps"], 2 * numel + 1), np.uint8))
    if positions.size and positions[-1] >= numel:
        raise ValueError(f"position {positions[-1]} in a tensor of {numel}")
    planes = np.frombuffer(_inflate(stored["bits"], numel * itemsize), np.uint8)
    if planes.size != positions.size * itemsize:
        raise ValueError(f"{planes.size} bytes for {positions.size} weights of {itemsize} bytes")
    return Literals(positions, np.ascontiguousarray(planes.reshape(itemsize, positions.size).T))


def _deflate(data: bytes) -> bytes:
    """Deflate without looking for repetitions: there are none in such bytes, and Huffman codes alone make them smaller.

    Measured on the record of a rank-16 merge: 68% of the size at 130 MB/s, where level 6 takes 72% at 9 MB/s.
    """
    stream = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return stream.compress(data) + stream.flush()


def _inflate(data: torch.Tensor, limit: int) -> bytes:
    """Inflate to at most `limit` bytes: a few bytes can announce terabytes."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data.numpy().tobytes(), limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(found) > limit or not stream.eof:
        raise ValueError(f"more than {limit} bytes, or cut short")
    return found


def _encode_gaps(positions: np.ndarray) -> np.ndarray:
    """Sorted positions as bytes: each gap g > 0 as g // 255 times 255, then g % 255.

    >>> import numpy as np
    >>> _encode_gaps(np.array([0, 1, 600])).tolist()
    [1, 1, 255, 255, 89]
    """
    import numpy as np

    gaps = np.diff(positions, prepend=-1)
    runs, rest = np.divmod(gaps, 255)
    ends = np.cumsum(runs + 1)
    encoded = np.full(int(ends[-1]) if ends.size else 0, 255, np.uint8)
    encoded[ends - 1] = rest
    return encoded


def _decode_gaps(encoded: np.ndarray) -> np.ndarray:
    """The inverse of `_encode_gaps`."""
    import numpy as np

    sums = np.cumsum(encoded.astype(np.int64))
    positions: np.ndarray = sums[encoded != 255] - 1
    return positions


# Share of the targeted bytes that a record takes, by ||dW|| / ||W||, as measured: 16-bit weights, and wider ones.
_SHARES = ((0.0035, 0.007, 0.017), (0.014, 0.020, 0.049), (0.055, 0.054, 0.128), (0.23, 0.139, 0.299))


def estimated_share(relative_change: float, itemsize: int) -> float:
    """What share of a tensor's bytes its undo record will take, from ||dW|| / ||W||.

    Between the measured points the logarithms are interpolated; beyond them the last slope goes on, up to the whole.
    """
    if relative_change <= 0:
        return 0.0
    column = 1 if itemsize <= 2 else 2
    points = [(math.log(point[0]), math.log(point[column])) for point in _SHARES]
    x = math.log(relative_change)
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if x <= pair[1][0]), (points[-2], points[-1]))
    return min(1.0, math.exp(y0 + (x - x0) * (y1 - y0) / (x1 - x0)))

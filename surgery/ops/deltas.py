"""The arithmetic of adding LoRA factors to a weight, tile by tile, in PEFT's order. Pure functions on tensors.

    W: (rows, columns) a tile of the weight as stored      B: (out, r)      A: (r, in)      s: scale      m: (out,)

    LoRA   W + (B A) * s                               rows of B A, or columns of it transposed
    DoRA   m / ||W + (B A) s|| * (W + (B A) s)         the norm over the input features of each output feature

Everything is computed in float32 (float64 for a float64 weight) and rounded once, to the weight's dtype, at the end.
The order is fixed: the product first, then the scale, then the sum; a scale folded into B or a fused multiply-add
changes bits.
Source: peft 0.21, `LoraLayer.get_delta_weight` and `merge`, `DoraLinearVariant.merge_unsafe`; DoRA (Liu et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from surgery.checkpoint import StoredTensor
from surgery.linalg import factored_squared_norm, squared_norm
from surgery.ops.fitting import Block, Contribution

if TYPE_CHECKING:
    import torch


class Reader(Protocol):
    """Reads stored tensors: a step's `StepIO`, or `PlainReader` outside of one."""

    device: str

    def read(self, tensor: StoredTensor) -> torch.Tensor: ...

    def shared(self, tensor: StoredTensor) -> torch.Tensor: ...


class PlainReader:
    """Reads tensors one at a time onto the CPU, for what is looked at before a plan runs."""

    device = "cpu"

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        import torch

        raw = bytearray(tensor.nbytes)
        tensor.source.read_into(tensor.offset, memoryview(raw))
        return torch.frombuffer(raw, dtype=torch.uint8).view(tensor.dtype.to_torch).view(tensor.shape)

    def shared(self, tensor: StoredTensor) -> torch.Tensor:
        return self.read(tensor)


@dataclass(frozen=True)
class Factors:
    """The factors of one contribution, loaded.

    Attributes:
        B: (out, r), the rows of the block only; for a bias (1, n), the values themselves.
        A: (r, in); for a bias an empty matrix.
        scale: multiplies the product.
        transposed: whether the block holds the transpose of B A.
        magnitude: DoRA's m for the block's output features, or None.
        shape: shape of a convolution's weight; empty for everything else.
        is_bias: whether this is scale * B, without A.
    """

    B: torch.Tensor
    A: torch.Tensor
    scale: float
    transposed: bool
    magnitude: torch.Tensor | None
    shape: tuple[int, ...]
    is_bias: bool

    def to(self, dtype: torch.dtype) -> Factors:
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype)
        return replace(self, B=self.B.to(dtype), A=self.A.to(dtype), magnitude=magnitude)


def load_factors(io: Reader, contribution: Contribution, dtype: torch.dtype) -> Factors:
    """Read the factors of a contribution in `dtype`, onto the device of `io`."""
    lora, c = contribution.lora, contribution
    if c.is_bias:
        assert lora.bias is not None
        values = io.read(lora.bias).to(io.device, dtype).view(1, -1)
        return Factors(values, values[:0], c.scale, False, None, (), True)
    if c.experts > 1:
        rank = lora.A.shape[0] // c.experts
        A = io.read(_rows_of(lora.A, c.expert * rank, rank))  # (E*r, in): expert by expert
        B = io.shared(lora.B)[c.begin : c.end, c.expert :: c.experts]  # (out, r*E): the expert varies fastest
    else:
        A, B = io.read(lora.A), io.read(lora.B)
        A, B = A.reshape(A.shape[0], -1), B.reshape(B.shape[0], -1)
        if not lora.embedding:
            B = B[c.begin : c.end]
    magnitude = None
    if lora.magnitude is not None:
        magnitude = io.read(lora.magnitude).reshape(-1)[c.begin : c.end if not lora.embedding else None]
        magnitude = magnitude.to(io.device, dtype)
    B, A = B.to(io.device, dtype).contiguous(), A.to(io.device, dtype).contiguous()
    return Factors(B, A, c.scale, c.transposed, magnitude, c.shape, False)


def _rows_of(tensor: StoredTensor, first: int, count: int) -> StoredTensor:
    """Some rows of a stored matrix, as a slice."""
    width = tensor.dtype.nbytes(tensor.shape[1:])
    return replace(tensor, shape=(count, *tensor.shape[1:]), offset=tensor.offset + first * width, is_slice=True)


def delta_rows(factors: Factors, begin: int, end: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows `begin` to `end` of scale * B A as the block stores it: (end - begin, columns).

    A tile of the product has the bits of the whole product as long as tiles are not narrower than `plan.TILE_ROWS`; the
    transposed product must be taken from B A itself, since A^T B^T sums in another order for narrow matrices. `out` is
    memory of the tile's shape that may be used for the result.
    """
    import torch

    if factors.is_bias:
        return factors.B * factors.scale
    if factors.shape:
        return _convolution(factors)
    if factors.transposed:
        return (factors.B @ factors.A[:, begin:end]).T * factors.scale
    product = torch.mm(factors.B[begin:end], factors.A, out=out)
    return product.mul_(factors.scale)


def _convolution(factors: Factors) -> torch.Tensor:
    """Scale * B A of a convolution, as the matrix that a (out, in, *kernel) weight is stored as.

    A kernel of one pixel is a matrix product; a larger one goes through the convolution PEFT uses: its bits differ.
    """
    import torch

    rank = factors.B.shape[1]
    out, channels, *kernel = factors.shape
    if all(size == 1 for size in kernel) and len(kernel) == 2:
        product = (factors.B @ factors.A) * factors.scale
    else:
        convolve = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(kernel)]
        A = factors.A.view(rank, channels, *kernel)
        B = factors.B.view(out, rank, *(1 for _ in kernel))
        product = convolve(A.transpose(0, 1), B).transpose(0, 1) * factors.scale
    return product.reshape(-1, factors.shape[-1])


def dora_factor(factors: Factors, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """DoRA's m / ||W + dW||, shaped so that it multiplies the tile: (rows, 1), or (1, columns) for a transposed block.

    The norm is taken over views of the same strides as PEFT takes it: a sum along strided columns has other bits.
    """
    import torch

    assert factors.magnitude is not None
    if factors.shape:
        whole = weight.view(factors.shape) + delta.view(factors.shape)
        norm: torch.Tensor = whole.norm(p=2, dim=tuple(range(1, len(factors.shape))), keepdim=True).view(-1)
        # As a matrix the weight has out * in * ... rows: the same factor for each run of them.
        repeats = weight.shape[0] // norm.numel()
        return (factors.magnitude / norm).repeat_interleave(repeats)[:, None]
    if factors.transposed:
        norm = torch.linalg.norm(weight.T + delta.T, dim=1)
        return (factors.magnitude / norm)[None, :]
    norm = torch.linalg.norm(weight + delta, dim=1)
    return (factors.magnitude / norm)[:, None]


def dora_rows(factors: Factors, begin: int, end: int) -> Factors:
    """The factors with the magnitudes of some rows only, for a tile of a block that is not transposed."""
    if factors.magnitude is None or factors.transposed or factors.shape:
        return factors
    return replace(factors, magnitude=factors.magnitude[begin:end])


def merge_tile(
    base: torch.Tensor, found: list[Factors], begin: int, end: int, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor | None]]:
    """Add contributions to a tile, in order.

    Args:
        base: (rows, columns) the tile in the dtype of the arithmetic; it is overwritten.
        found: the factors of each contribution to the block.
        begin: the tile's first row within the block.
        end: the row after its last.
        out: memory of the tile's shape that dW may be computed in.

    Returns:
        The sum, still unrounded; the dW of a lone LoRA, which is cheaper to have than the difference; and for each
        contribution its DoRA factor or None. The norm of each DoRA is that of the weight before any was added.
    """
    dora = [dora_rows(factors, begin, end) for factors in found]
    original = base.clone() if len(found) > 1 and any(f.magnitude is not None for f in found) else base
    current = base
    only_delta = None
    scales: list[torch.Tensor | None] = []
    for factors in dora:
        delta = delta_rows(factors, begin, end, out)
        if factors.magnitude is None:
            current = current.add_(delta)
            only_delta = delta
            scales.append(None)
            continue
        scale = dora_factor(factors, original, delta)
        current = scale * (current + delta)
        scales.append(scale)
    plain = len(found) == 1 and scales == [None]
    return current, only_delta if plain else None, scales


_PROBED_ELEMENTS = 1 << 16


def relative_change(base: StoredTensor, blocks: tuple[Block, ...]) -> float:
    """||dW|| / ||W|| of the first block, roughly: from the factors without forming dW, and from the first rows of W.

    A DoRA rescales every weight, so it counts as a change of the size of 0.2 at least.
    """
    import torch

    reader = PlainReader()
    count = min(base.numel, _PROBED_ELEMENTS)
    probe = reader.read(replace(base, shape=(1, count), is_slice=True)).to(torch.float64)
    block = blocks[0]
    elements = (block.end - block.begin) * base.columns
    weight = squared_norm(probe) / max(count, 1) * elements
    change = 0.0
    for contribution in block.contributions:
        factors = load_factors(reader, contribution, torch.float32)
        norm = squared_norm(factors.B) if factors.is_bias else factored_squared_norm(factors.B, factors.A)
        change += norm * factors.scale**2 + (0.04 * weight if contribution.is_dora else 0.0)
    return (change / weight) ** 0.5 if weight > 0 else 1.0

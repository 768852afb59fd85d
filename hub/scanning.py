"""Going through the data of a safetensors file in passing: numbers that are not finite, and the hash of each tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.hashing import new_hash
from surgery.header import Header, TensorInfo

if TYPE_CHECKING:
    from blake3 import blake3

# For each float: bytes of one number, what to mask away (the sign), and the least pattern that is no number. With the
# sign gone, NaN and infinity are the largest patterns of IEEE floats. Source: IEEE 754; OCP 8-bit floating point, 1.0.
_IEEE = {
    "F64": (8, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": (4, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (2, 0x7FFF, 0x7C00),
    "BF16": (2, 0x7FFF, 0x7F80),
    "F8_E5M2": (1, 0x7F, 0x7C),
    "F8_E4M3": (1, 0x7F, 0x7F),
}
# Floats with a single pattern that is no number.
_ONE_NAN = {"F8_E5M2FNUZ": 0x80, "F8_E4M3FNUZ": 0x80, "F8_E8M0": 0xFF}
# Numbers that are looked at together: they and what is computed of them fit the second-level cache.
_BLOCK = 1 << 17


def has_nonfinite(dtype: str, data: memoryview) -> bool:
    """Whether whole numbers of a dtype, as bytes, hold a NaN or an infinity."""
    import numpy as np

    if dtype in _ONE_NAN:
        return bool((np.frombuffer(data, np.uint8) == _ONE_NAN[dtype]).any())
    if dtype not in _IEEE:
        return False
    width, mask, least = _IEEE[dtype]
    numbers = np.frombuffer(data, f"<u{width}")
    kept = numbers.dtype.type(mask)
    blocks = (numbers[begin : begin + _BLOCK] for begin in range(0, len(numbers), _BLOCK))
    return any(int((block & kept).max()) >= least for block in blocks)


@dataclass
class TensorScan:
    """Takes a file's bytes in order, from the first on. Afterwards it knows the hashes, and who has what is no number.

    Attributes:
        finite: whether to look for what is no number.
        nonfinite: names of tensors with a NaN or an infinity.
        hashes: BLAKE3-256 of each tensor.
    """

    header: Header
    finite: bool = True
    nonfinite: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pending: list[TensorInfo] = list(reversed(self.header.tensors))
        self._skip = self.header.data_start
        self._position = 0  # within the data
        self._hash: blake3 = new_hash()
        self._carry = b""  # the beginning of a number that the next bytes complete
        self._found = False
        self._finish_empty()

    def update(self, data: memoryview) -> None:
        """The next bytes of the file."""
        view = data[min(self._skip, len(data)) :]
        self._skip -= len(data) - len(view)
        while view and self._pending:
            info = self._pending[-1]
            part = view[: info.end - self._position]
            self._take(info, part)
            self._position += len(part)
            view = view[len(part) :]
            if self._position == info.end:
                self._finish()
                self._finish_empty()

    def _take(self, info: TensorInfo, part: memoryview) -> None:
        self._hash.update(part)
        if self._found or not self.finite or not info.dtype.floating:
            return
        width = max(info.dtype.bits // 8, 1)
        if self._carry:
            missing = width - len(self._carry)
            self._carry += part[:missing]
            part = part[missing:]
            if len(self._carry) == width:
                self._found = has_nonfinite(info.dtype.name, memoryview(self._carry))
                self._carry = b""
        whole = len(part) // width * width
        self._carry += bytes(part[whole:])
        if whole and not self._found:
            self._found = has_nonfinite(info.dtype.name, part[:whole])

    def _finish(self) -> None:
        info = self._pending.pop()
        self.hashes[info.name] = self._hash.hexdigest()
        if self._found:
            self.nonfinite.append(info.name)
        self._hash, self._carry, self._found = new_hash(), b"", False

    def _finish_empty(self) -> None:
        """Tensors without data end where they begin."""
        while self._pending and self._pending[-1].begin == self._pending[-1].end:
            self._finish()

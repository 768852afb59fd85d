"""Whether a stored tensor is nothing but zeros: what starts out silent and has not been trained."""

from __future__ import annotations

from surgery.checkpoint import StoredTensor

_CHUNK = 4 << 20


def is_zero(tensor: StoredTensor) -> bool:
    """Read a stored tensor until a number turns up that is not zero; -0.0 is zero."""
    import numpy as np

    width = max(1, tensor.dtype.bits // 8)
    sign = 8 * width - 1
    for begin in range(0, tensor.nbytes, _CHUNK):
        raw = bytearray(min(_CHUNK, tensor.nbytes - begin))
        tensor.source.read_into(tensor.offset + begin, memoryview(raw))
        values = np.frombuffer(raw, dtype=f"<u{width}")
        if (values & ~(values.dtype.type(1) << sign) if tensor.dtype.floating else values).any():
            return False
    return True

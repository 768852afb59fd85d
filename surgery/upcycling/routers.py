"""Tensors that a mixture has and the dense model has not: routers, and what starts out at zero. They need no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.checkpoint import StoredTensor
from surgery.dtypes import DType
from surgery.errors import NonFiniteError, UnsupportedError
from surgery.execute import StepIO
from surgery.layout import TensorSpec
from surgery.plan import OutputStep, StepResult
from surgery.upcycling.experts import stream

if TYPE_CHECKING:
    import numpy as np

_ZEROS = bytes(1 << 20)


class _NewStep(OutputStep):
    """A step that makes its tensor of nothing stored, without torch."""

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return ()

    @property
    def computes(self) -> bool:
        return False


@dataclass(frozen=True)
class ZerosStep(_NewStep):
    """A tensor of zeros."""

    def run(self, io: StepIO) -> StepResult:
        for begin in range(0, self.output.nbytes, len(_ZEROS)):
            io.write_bytes(self.output, memoryview(_ZEROS)[: min(len(_ZEROS), self.output.nbytes - begin)])
        return StepResult()


@dataclass(frozen=True)
class RouterStep(_NewStep):
    """A router's weight (experts, hidden): N(0, std), a row to a copy of the MLP, repeated for its `groups` parts.

    Of virtual groups (arXiv:2410.07524): the parts of one copy have one score, so a token goes to all of them or none.
    """

    std: float
    groups: int
    seed: int

    def run(self, io: StepIO) -> StepResult:
        import numpy as np

        experts, hidden = self.output.shape
        rows = stream(self.seed, self.name).standard_normal((experts // self.groups, hidden))
        rows = np.repeat((self.std * rows).astype(np.float32), self.groups, axis=0)
        io.write_bytes(self.output, encoded(rows, self.output.dtype))
        return StepResult()


@dataclass(frozen=True)
class GivenRouterStep(_NewStep):
    """A router's weight (experts, hidden) that was computed before.

    Attributes:
        rows: float32; None in a dry run, which computes none.
        digest: of them, which tells this work from another.
    """

    rows: np.ndarray | None = field(repr=False, compare=False)
    digest: str

    def run(self, io: StepIO) -> StepResult:
        assert self.rows is not None
        io.write_bytes(self.output, encoded(self.rows, self.output.dtype))
        return StepResult()


def given_router(output: TensorSpec, rows: np.ndarray | None, groups: int) -> GivenRouterStep:
    """The step for rows that each stand for a copy of the MLP: repeated for its `groups` parts."""
    import numpy as np

    if rows is None:
        return GivenRouterStep(output, None, "")
    repeated = np.ascontiguousarray(np.repeat(rows, groups, axis=0))
    return GivenRouterStep(output, repeated, hashlib.blake2b(repeated.tobytes(), digest_size=16).hexdigest())


def encoded(values: np.ndarray, dtype: DType) -> memoryview:
    """Finite float32 values as the bytes of a stored dtype, rounded to nearest, ties to even.

    Raises `UnsupportedError` for a dtype that no router is stored in.
    """
    import numpy as np

    largest = 65_504.0 if dtype.name == "F16" else 3.3e38
    if not np.all(np.abs(values) < largest):
        raise NonFiniteError(f"The router's numbers do not fit {dtype}; give --router-init a smaller deviation.")
    if dtype.name == "BF16":  # the upper half of a float32
        bits = values.view(np.uint32)
        return memoryview(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes())
    plain = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(dtype.name)
    if plain is None:
        raise UnsupportedError(
            f"The feed-forward weights are stored as {dtype}, which no router can have; convert the checkpoint to "
            "bfloat16 first."
        )
    return memoryview(values.astype(plain).tobytes())

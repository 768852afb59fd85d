"""Element types as the safetensors format spells them, and what torch calls them.

The order of `DTYPES` is the order of the format's own enumeration: its reference writer lays out a file by descending
position here and then by name, and so do we (`header.layout_key`).
Source: the safetensors format description and its reference implementation, 0.8.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """One element type. `bits` is the stored size of one element; `torch_name` is its name in torch, if it has one."""

    name: str
    bits: int
    torch_name: str | None
    floating: bool = False
    order: int = 0

    def __str__(self) -> str:
        return self.name

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Stored bytes of a tensor of this type; the format requires whole bytes, which the header parser checks."""
        return prod(shape) * self.bits // 8

    @property
    def to_torch(self) -> torch.dtype:
        import torch

        if self.torch_name is None:
            raise KeyError(self.name)
        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype

    @property
    def arithmetic(self) -> bool:
        """Whether weights of this type can be added to: every float of at least eight bits with a sign."""
        return self.floating and self.bits >= 8 and self.name != "F8_E8M0"


DTYPES: tuple[DType, ...] = tuple(
    DType(name, bits, torch_name, floating, order)
    for order, (name, bits, torch_name, floating) in enumerate(
        (
            ("BOOL", 8, "bool", False),
            ("F4", 4, None, True),
            ("F6_E2M3", 6, None, True),
            ("F6_E3M2", 6, None, True),
            ("U8", 8, "uint8", False),
            ("I8", 8, "int8", False),
            ("F8_E5M2", 8, "float8_e5m2", True),
            ("F8_E4M3", 8, "float8_e4m3fn", True),
            ("F8_E8M0", 8, "float8_e8m0fnu", True),
            ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", True),
            ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", True),
            ("I16", 16, "int16", False),
            ("U16", 16, "uint16", False),
            ("F16", 16, "float16", True),
            ("BF16", 16, "bfloat16", True),
            ("I32", 32, "int32", False),
            ("U32", 32, "uint32", False),
            ("F32", 32, "float32", True),
            ("C64", 64, "complex64", False),
            ("F64", 64, "float64", True),
            ("I64", 64, "int64", False),
            ("U64", 64, "uint64", False),
        )
    )
)

BY_NAME: dict[str, DType] = {dtype.name: dtype for dtype in DTYPES}
F32, F64, BF16, F16, U8 = (BY_NAME[name] for name in ("F32", "F64", "BF16", "F16", "U8"))


def from_torch(dtype: torch.dtype) -> DType | None:
    """The stored type of a torch type, or None for one that safetensors cannot hold."""
    name = str(dtype).removeprefix("torch.")
    return next((known for known in DTYPES if known.torch_name == name), None)

"""Legacy `.bin` files, read without executing what they hold.

Only `torch.load(weights_only=True)` touches them: it rebuilds tensors and refuses every other pickled object. The file
is mapped where its format allows (torch 1.6 and later), so that opening it reads no weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.dtypes import DType, from_torch
from surgery.errors import FormatError
from surgery.source import FileSource, NotAFile

if TYPE_CHECKING:
    import torch


class TensorSource(NotAFile):
    """One tensor's bytes, in row-major order, as a `Source` of its own."""

    def __init__(self, file: FileSource, name: str, tensor: torch.Tensor) -> None:
        self._file = file
        self._name = name
        self._tensor = tensor

    @property
    def name(self) -> str:
        return self._name

    @property
    def identity(self) -> tuple[str, int, int] | None:  # of the file that holds the tensor
        return self._file.identity

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    @property
    def size(self) -> int:
        return self._tensor.numel() * self._tensor.element_size()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        import torch

        # A transposed or strided tensor is copied here, for as long as this call lasts.
        data = self._tensor.contiguous().view(-1).view(torch.uint8)
        view = buffer.cast("B")
        target = torch.frombuffer(view, dtype=torch.uint8) if len(view) else torch.empty(0, dtype=torch.uint8)
        target.copy_(data[offset : offset + len(view)])


def load_pickled(file: FileSource) -> dict[str, tuple[DType, tuple[int, ...], TensorSource]]:
    """Every tensor of a `.bin` file: name to dtype, shape and source. Raises `FormatError` for anything but tensors."""
    import torch

    path = file.path
    state = None
    for mmap in (True, False):  # files from before torch 1.6 cannot be mapped
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            break
        except RuntimeError as error:
            failure: Exception = error
        except Exception as error:  # the unpickler raises whatever a hostile stream makes it raise
            failure = error
            break
    if state is None:
        raise FormatError(
            f"{path} could not be read as tensors only, and nothing else in it is executed "
            f"({_first_line(failure)}); save it as safetensors where you trust it."
        ) from failure
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise FormatError(f"{path} holds a {type(state).__name__}, expected a dictionary of tensors.")
    found: dict[str, tuple[DType, tuple[int, ...], TensorSource]] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not name.isprintable() or not isinstance(tensor, torch.Tensor):
            raise FormatError(f"{path}: the entry {name!r} is a {type(tensor).__name__}, expected a named tensor.")
        if name == "__metadata__":
            raise FormatError(f"{path}: a tensor is named {name!r}, which safetensors keep for something else.")
        dtype = from_torch(tensor.dtype)
        if dtype is None or tensor.layout != torch.strided:
            raise FormatError(f"{path}: tensor {name!r} of {tensor.dtype} has no safetensors form.")
        found[name] = (dtype, tuple(tensor.shape), TensorSource(file, f"{path}[{name}]", tensor.detach()))
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")

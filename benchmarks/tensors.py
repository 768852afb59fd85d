"""The tensors of a checkpoint on disk, for the checks."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """For every tensor in a folder the open file that holds it; the files stay open as long as `stack`."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        opened = stack.enter_context(safe_open(path, framework="pt"))
        found |= dict.fromkeys(opened.keys(), opened)
    return found

"""Small files that an evaluation writes: all of them, each whole, or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from surgery.errors import OutputError


def check_files(files: Mapping[str, Path], overwrite: bool, inputs: Mapping[str, Path]) -> None:
    """Raise for a file that exists, stands in for another, or is an input.

    Args:
        files: to be written, by the option that names each.
        overwrite: whether files may be replaced.
        inputs: files that are read, by what they are.
    """
    places: dict[Path, str] = {path.resolve(): f"the {role}" for role, path in inputs.items()}
    for name, path in files.items():
        if (other := places.get(path.resolve())) is not None:
            raise OutputError(f"{name} is {path}, which is {other} too; choose another file.")
        places[path.resolve()] = name
        if path.is_dir():
            raise OutputError(f"{name} is {path}, which is a folder; name a file.")
        if path.exists() and not overwrite:
            raise OutputError(f"{name} is {path}, which exists already; pass --overwrite to replace it.")


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files beside their places, sync them, and move all of them there last."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in contents}
    try:
        for path, part in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        raise OutputError(f"{error.filename or 'A file'} cannot be written: {error.strerror}.") from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):  # a part that could not be made
                part.unlink()

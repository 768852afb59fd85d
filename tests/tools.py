"""Helpers of several test files: running the command, comparing folders, and files that no library would write."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

# The command, with the interpreter and the packages of the tests.
COMMAND = (sys.executable, "-m", "surgery")


def run_cli(
    *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `surgery` in a process of its own and wait for it. `env` is added to the environment."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def start_cli(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `surgery` in a process of its own, its output in pipes."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unequal(left: Path, right: Path) -> list[str]:
    """Names of files that only one folder has, or that differ in a byte."""
    one, other = tree(left), tree(right)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def raw_file(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header at all: JSON text, bytes, or something to make JSON of."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


class Tripwire:
    """Progress that calls `action` once, as soon as `limit` bytes have passed; `passed` counts all of them."""

    def __init__(self, limit: int, action: Callable[[], object]) -> None:
        self.limit, self.action = limit, action
        self.passed = 0
        self._mutex = threading.Lock()

    def start(self, total: int, label: str) -> None: ...

    def advance(self, count: int) -> None:
        with self._mutex:
            before, self.passed = self.passed, self.passed + count
        if before <= self.limit < self.passed:
            self.action()

    def stop(self) -> None: ...


def interrupt() -> None:
    """What Ctrl-C does, to the thread that calls this."""
    raise KeyboardInterrupt


def interrupted(limit: int, call: Callable[[Tripwire], object]) -> bool:
    """Run `call` with progress that interrupts it after `limit` bytes; False if it was done before."""
    try:
        call(Tripwire(limit, interrupt))
    except KeyboardInterrupt:
        return True
    return False


@contextlib.contextmanager
def own_disk(megabytes: float) -> Iterator[Path]:
    """A file system in memory of a fixed size, with nothing on it; skips the test where none can be mounted."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system to fill")
    place = Path(tempfile.mkdtemp(prefix="disk-"))
    size = f"size={int(megabytes * 1_000_000)}"
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", place], capture_output=True, check=False)
        if mounted.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        place.rmdir()


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """An empty folder of a user who may not write elsewhere, and the rights of that user for as long as this lasts.

    Root may do everything, so root becomes somebody else; anybody else stays who they are.
    """
    place = Path(tempfile.mkdtemp(prefix="nobody-"))
    before = os.geteuid()
    try:
        if before == 0:
            os.chown(place, 65534, 65534)
            os.seteuid(65534)
        yield place
    finally:
        os.seteuid(before)
        for path in [place, *place.rglob("*")]:
            if path.is_dir():
                path.chmod(0o700)
        shutil.rmtree(place)


def square_checkpoint(folder: Path, layers: int, side: int) -> Path:
    """A checkpoint of square matrices of no known architecture, and large if need be; made in no time."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"m.{n}.weight": torch.randn(side, side, generator=generator).to(torch.bfloat16) for n in range(layers)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "squares"}')
    return folder


def square_adapter(folder: Path, layers: int, side: int, rank: int = 4) -> Path:
    """An adapter for every matrix of `square_checkpoint`."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    factors = {
        f"base_model.model.m.{n}.lora_{which}.weight": 0.1 * torch.randn(shape, generator=generator)
        for n in range(layers)
        for which, shape in (("A", (rank, side)), ("B", (side, rank)))
    }
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = [f"m.{n}" for n in range(layers)]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

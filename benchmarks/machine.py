"""What the figures were measured on and with."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "safetensors", "transformers", "peft", "numpy", "click")


def describe(mergekit: Path | None) -> str:
    """Processors, memory and versions, in one line."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    parts = [f"{len(os.sched_getaffinity(0))} cores of {_processor()}, {memory:.0f} GiB", f"Python {_python()}"]
    parts += [f"{package} {version(package)}" for package in PACKAGES if _installed(package)]
    if mergekit is not None:
        parts.append(f"mergekit {_mergekit_version(mergekit)}")
    return ", ".join(parts)


def _python() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _mergekit_version(command: Path) -> str:
    code = "from importlib.metadata import version; print(version('mergekit'), 'with torch', version('torch'))"
    try:
        return subprocess.run(
            [command.with_name("python"), "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "of an unknown version"

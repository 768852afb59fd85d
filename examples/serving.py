"""A registry's server in a process of its own, and Hugging Face's own command line on it."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from show import console


@contextmanager
def served(data: Path, token: str) -> Iterator[str]:
    """Serve a registry's folder; yields the address. `token` is the administrator's."""
    command = [sys.executable, "-m", "surgery", "hub", "serve", "--data", str(data), "--port", "0"]
    environment = {**os.environ, "SURGERY_HUB_ADMIN_TOKEN": token, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if "HF_ENDPOINT=" in line), None)
            if line is None:
                raise SystemExit("The server did not start; what it said is above.")
            yield line.strip().rpartition("=")[2]
        finally:
            process.terminate()


def fresh_token() -> str:
    """Such as nobody guesses."""
    return f"hub_{secrets.token_urlsafe(32)}"


def hf(line: str, endpoint: str, token: str, home: Path) -> None:
    """Run Hugging Face's `hf`, with nothing set but the address, the token and an empty home, and show the command."""
    console.print(f"\n[bold green]$[/bold green] [green]hf {line}[/green]")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SURGERY_"))}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    run = subprocess.run(
        [str(Path(sys.executable).parent / "hf"), *line.split()],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(run.stdout + run.stderr)
    said = re.sub(r"\x1b\[\d*m", "", run.stdout).replace(str(Path.cwd()) + os.sep, "")
    console.print(said.strip(), markup=False)

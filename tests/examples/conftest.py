"""The examples are scripts that import one another by bare names, as Python finds them when it runs one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture
def run_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs an example with arguments as if from the command line, in the test's folder; gives back what it shows."""
    import torch

    def run(example: ModuleType, *arguments: str) -> str:
        threads = torch.get_num_threads()
        monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", *arguments, "--folder", str(tmp_path)])
        try:
            example.main()
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run

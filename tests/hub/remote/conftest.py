"""Training by id uses the training tests' models, and draws no pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from surgery.training import plots

# The examples are scripts that import one another by bare names.
sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(_: Any, path: Path) -> None:
        path.write_bytes(b"")

    monkeypatch.setattr(plots, "draw_loss", touch)
    monkeypatch.setattr(plots, "draw_experts", touch)

"""Pictures take longer than these models: they are drawn where a test looks at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surgery.training import plots


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(_: Any, path: Path) -> None:
        path.write_bytes(b"")

    if "pictures" not in request.keywords:
        monkeypatch.setattr(plots, "draw_loss", touch)
        monkeypatch.setattr(plots, "draw_experts", touch)

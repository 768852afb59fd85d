"""A Hub on this machine, and a registry of each test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import fake_hub
from tests.hub.registry_tools import adapter
from tests.tools import square_checkpoint


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.FakeHub]:
    """A running Hub, configured as this process's endpoint."""
    with fake_hub.running() as found:
        fake_hub.configure(found, tmp_path / "hf-home", monkeypatch)
        yield found


@pytest.fixture
def base(here: Path) -> Path:
    """A small checkpoint in the current folder."""
    square_checkpoint(here / "base", 2, 16)
    return Path("base")


@pytest.fixture
def style(here: Path) -> Path:
    """An adapter in the current folder."""
    adapter(here / "style")
    return Path("style")

"""Tiny models are made as the tests of training make them; a thread is enough for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The examples are scripts that import one another by bare names.
sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

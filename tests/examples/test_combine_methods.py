"""The experiment on ways of combining, in its quick form."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import package_descriptions, torch_headers

from tests.examples.conftest import EXAMPLES


@pytest.mark.slow
def test_every_method_has_a_row(tmp_path: Path) -> None:
    """The base, three adapters, and each method; sum and cat of half of each are both the weighted sum."""
    command = [sys.executable, str(EXAMPLES / "combine_methods.py"), "--quick", "--folder", str(tmp_path / "out")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    table = shown.rpartition("each method at its best weight")[2]
    cells = [re.split(r" {2,}", line.strip()) for line in table.strip().splitlines()[1:]]
    rows = {label: [float(number) for number in numbers] for label, *numbers in cells}
    assert [*rows][:4] == ["base", "manual alone", "headers alone", "descriptions alone"]
    assert len(rows) == 4 + 12 + 4
    assert rows["manual alone"][0] < rows["base"][0]
    assert rows["headers alone"][1] < rows["base"][1]
    # A method's row begins with its weight and ends with the mean at it.
    for label, numbers in [*rows.items()][4:]:
        assert numbers[0] == 0.5, label
        assert numbers[5] == numbers[6] == pytest.approx(sum(numbers[1:4]) / 3, abs=2e-3)
    assert rows["cat"][5] == pytest.approx(rows["sum"][5], abs=0.1)
    assert rows["cat"][5] < rows["base"][4]


def test_held_out_text_is_not_trained_on() -> None:
    for corpus in (torch_headers(100_000), package_descriptions()):
        assert corpus.held_out
        assert corpus.train
        assert not set(corpus.held_out) & set(corpus.train)

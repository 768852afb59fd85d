"""The benchmark of lists asks what it says it asks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import hub_lists


def test_every_question_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hub_lists", str(tmp_path), "400"])
    hub_lists.main()
    results = json.loads(capsys.readouterr().out)["results"]
    found = {title: result["found"] for title, result in results.items()}
    assert found["first page"] == found["page in the middle"] == found["tag"] == hub_lists.PAGE
    assert found["search that finds nothing"] == found["shapes that nothing fits"] == 0
    # 75 of a hundred are adapters of the base, of which ten (x9, x odd) are private.
    assert found["base"] == 65
    assert found["lineage of a base"] == 66
    assert found["count"] == 260

"""Adapters that are extracted, against those that are trained, in the quick form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import extraction_quality
import pytest
from extraction_quality import (
    EXTRACTED,
    EXTRACTED_LINEAR,
    LINEAR,
    LORA,
    QUICK_RANKS,
    WHOLE,
    WITH_RESIDUAL,
)


@pytest.mark.slow
def test_extraction_at_full_rank_is_the_fine_tune(run_example: Callable[..., str], tmp_path: Path) -> None:
    """With the residual it is that of everything, without it that of linear layers; less rank holds less of both."""
    shown = run_example(extraction_quality, "--quick", "--seeds", "1")
    found = json.loads((tmp_path / "extraction_quality.json").read_text())
    losses = {(point["kind"], point["rank"]): point["loss"] for point in found["points"]}
    kept = {(point["kind"], point["rank"]): point["energy_kept"] for point in found["points"]}
    lowest, *_, highest = QUICK_RANKS
    assert {rank for _, rank in losses} == {*QUICK_RANKS}
    assert f"base {found['base']:.3f}" in shown

    tuned = {kind: found["tuned"][kind]["losses"][0] for kind in (WHOLE, LINEAR)}
    assert tuned[WHOLE] < tuned[LINEAR] < found["base"] - 0.02
    # Every matrix has 64 rows or columns, so that factors of this rank are exact to float32.
    assert losses[EXTRACTED_LINEAR, highest] == pytest.approx(tuned[LINEAR], abs=1e-4)
    assert losses[WITH_RESIDUAL, highest] == pytest.approx(tuned[WHOLE], abs=1e-4)
    assert losses[EXTRACTED, highest] > tuned[WHOLE] + 0.02, "embeddings were tuned too"
    for kind in (EXTRACTED, WITH_RESIDUAL, EXTRACTED_LINEAR):
        shares = [kept[kind, rank] for rank in QUICK_RANKS]
        assert shares == sorted(shares)
        assert shares[0] < 0.9
        assert shares[-1] == pytest.approx(1, abs=1e-6)
    assert losses[EXTRACTED_LINEAR, lowest] > losses[EXTRACTED_LINEAR, highest] + 0.005
    assert kept[LORA, lowest] is None
    assert (tmp_path / "extraction_quality.png").read_bytes().startswith(b"\x89PNG")

"""The LoRA paper's comparisons, in their quick form, and how learning rates are found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import lora_paper
import pytest
from lora_paper import BUDGET_RANK, FIXED_RANK, MATRICES, RANKS, cost_of_rank, matrices
from tuning import FACTOR, FULL, QUICK, climb


@pytest.mark.slow
def test_every_comparison_is_made_with_parameters_that_match(run_example: Callable[..., str], tmp_path: Path) -> None:
    """Budgets are met by what surgery.train counts, and what trains everything learns the most."""
    shown = run_example(lora_paper, "--quick", "--seeds", "1")
    found = json.loads((tmp_path / "lora_paper.json").read_text())
    parts = {part: {row["name"]: row for row in rows} for part, rows in found["parts"].items()}
    assert all(name in shown for rows in parts.values() for name in rows)
    assert all(math.isfinite(loss) for rows in parts.values() for row in rows.values() for loss in row["losses"])

    methods = parts["methods"]
    budget = BUDGET_RANK * cost_of_rank(QUICK, "q_proj,v_proj")
    alike = ("prompt", "prefix", "adapter-h", "adapter-l", "lora, q and v", "lora+prompt", "lora+prefix")
    for name in alike:
        assert methods[name]["trained"] == pytest.approx(budget, rel=0.08), name
    assert methods["lora, q and v"]["trained"] == budget
    assert methods["full"]["trained"] > methods["full, embeddings frozen"]["trained"] > methods["top:1"]["trained"]
    assert methods["full"]["mean"] < found["base"] - 0.1
    assert methods["full, embeddings frozen"]["mean"] < found["base"] - 0.02
    assert min(row["mean"] for row in methods.values()) == methods["full"]["mean"]

    ranks = parts["ranks"]
    assert [row["trained"] for row in ranks.values()] == [
        rank * cost_of_rank(QUICK, "q_proj,v_proj") for rank in RANKS[::2]
    ]
    for name, settings in matrices(QUICK).items():
        assert parts["matrices"][name]["trained"] == settings["rank"] * cost_of_rank(QUICK, settings["targets"])
    assert (tmp_path / "lora_paper.png").read_bytes().startswith(b"\x89PNG")


def test_a_fixed_budget_is_fixed() -> None:
    """At full scale no choice of matrices gets three per cent more parameters than another."""
    budget = FIXED_RANK * cost_of_rank(FULL, "q_proj")
    chosen = matrices(FULL)
    assert len(chosen) == len(MATRICES)
    for name, settings in chosen.items():
        assert settings["rank"] * cost_of_rank(FULL, settings["targets"]) == pytest.approx(budget, rel=0.03), name


@pytest.mark.parametrize("best", [-4, -1, 0, 1, 3])
def test_the_search_climbs_to_the_best_rate(best: int) -> None:
    """It ends with a rate that has a worse one on each side, wherever that is."""
    tried: dict[float, float] = {}
    climb(lambda rate: (math.log(rate / 1e-2) / math.log(FACTOR) - best) ** 2, 1e-2, tried, most=9)
    assert min(tried, key=lambda rate: tried[rate]) == pytest.approx(1e-2 * FACTOR**best, rel=0.05)
    assert len(tried) <= abs(best) + 3


def test_the_search_ends() -> None:
    """After as many rates as it may try, and it can live with rates that diverge."""
    tried: dict[float, float] = {}
    climb(lambda rate: -rate, 1.0, tried, most=4)
    assert len(tried) == 4
    tried = {}
    climb(lambda rate: rate if rate < 1e-2 else math.inf, 1e-2, tried, most=6)
    assert math.isfinite(min(tried.values()))

"""What the latency example times is what it says, and its quick form has every row."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import latency
import pytest
import torch
from latency import BASE, MERGED, SIZES, Row, Timing, make_base, make_variants, take_turns


def test_variants_are_what_their_names_say(tmp_path: Path) -> None:
    """Merged LoRA has the base's modules, no more, and says what LoRA beside it says; every other adds parameters."""
    size = SIZES["quick"]
    base = make_base(tmp_path / "base", size, 16, seed=0)
    variants = make_variants(tmp_path, size, base, "cpu", torch.float32)
    ids = torch.randint(size.vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = {name: model(input_ids=ids, use_cache=False).logits[:, -16:] for name, (model, _) in variants.items()}
    modules = {name: [type(module) for module in model.modules()] for name, (model, _) in variants.items()}
    assert modules[MERGED] == modules[BASE]
    torch.testing.assert_close(logits[MERGED], logits["LoRA"], rtol=1e-5, atol=1e-5)
    for name, (_, parameters) in variants.items():
        changed = not torch.allclose(logits[name], logits[BASE], rtol=1e-4, atol=1e-4)
        assert changed == (name != BASE), name
        assert (parameters == 0) == (name in (BASE, MERGED))


@pytest.mark.slow
def test_the_quick_form_has_every_row(run_example: Callable[..., str], tmp_path: Path) -> None:
    shown = run_example(latency, "--quick")
    found = json.loads((tmp_path / "latency.json").read_text())
    names = {BASE, MERGED, "LoRA", "adapter-h", "adapter-l", "prefix"}
    assert {(row["name"], row["batch"]) for row in found["forward"]} == {(n, b) for n in names for b in (1, 8)}
    assert [row["name"] for row in found["training"]] == ["full", "LoRA, q k v", "LoRA, all linear"]
    for row in (*found["forward"], *found["training"]):
        for timing in (row["timing"], row["base"]):
            assert len(timing["wall"]) == len(timing["cpu"]) == 5
            assert min(timing["wall"]) > 0
    # More is computed in full tuning than in LoRA of some matrices: no gradients of weights that are frozen.
    assert found["training"][0]["parameters"] > 10 * found["training"][1]["parameters"]
    assert "One training step: GPT-2 quick" in shown
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_turns_are_taken_in_every_round() -> None:
    """Each work runs once a round, the rounds before the first that counts among them, in orders that differ."""
    called: list[str] = []
    works = {name: partial(called.append, name) for name in "abc"}
    found = take_turns("turns", works, rounds=10, device="cpu", seed=0)
    rounds = ["".join(called[start : start + 3]) for start in range(0, len(called), 3)]
    assert len(rounds) == 12
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert all(len(timing.wall) == 10 for timing in found.values())


def test_ratios_are_of_the_same_round() -> None:
    row = Row("x", 1, 1, 0, Timing([2.0, 9.0], [1.0, 1.0]), Timing([1.0, 3.0], [2.0, 4.0]))
    assert row.ratios("wall") == [2.0, 3.0]
    assert row.ratios("cpu") == [0.5, 0.25]

"""What Sparse Upcycling reports of the drop before training, on models trained here, over several seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
from upcycling_drop import EXPERTS, ROUTINGS, SPARSE, draw, mean_drop, measure_vit

SEEDS = range(2)


@pytest.mark.slow
def test_the_drop_is_the_papers(tmp_path: Path) -> None:
    """Raw weights: it grows with experts and layers. Normalised ones take it away. C = 1 leaves tokens out."""
    points = [point for seed in SEEDS for point in measure_vit(tmp_path, seed, 25, ROUTINGS)]
    assert all(point.dense < 1.5 for point in points), "the dense models have learnt much: guessing costs 2.3 nats"
    for router in ("top-k", "expert-choice"):
        for count in (1, 2):
            raw = (router, count, "raw")
            by_experts = [mean_drop(points, raw, experts, 2) for experts in EXPERTS]
            by_layers = [mean_drop(points, raw, 8, layers) for layers in SPARSE]
            assert by_experts == sorted(by_experts), (raw, by_experts)
            assert by_layers == sorted(by_layers), (raw, by_layers)
            assert by_layers[-1] > 0.02, (raw, by_layers)
        # One expert to a token drops more than two.
        assert mean_drop(points, (router, 1, "raw"), 8, 4) > mean_drop(points, (router, 2, "raw"), 8, 4)
    for point in points:
        if point.routing[0] == "top-k" and point.routing[2] == "normalized":
            assert abs(point.drop) < 1e-5, point
        if point.routing[0] == "top-k" or point.experts <= point.routing[1]:
            assert point.uncovered == 0, point
    chosen = {count: mean_drop(points, ("expert-choice", count, "normalized"), 8, 4) for count in (1, 2)}
    assert chosen[2] < 0.25 * mean_drop(points, ("expert-choice", 2, "raw"), 8, 4)
    assert chosen[2] < chosen[1], "fewer tokens are left out at C = 2"
    left_out = {
        count: [
            point.uncovered
            for point in points
            if point.routing == ("expert-choice", count, "raw") and point.experts == 8
        ]
        for count in (1, 2)
    }
    assert all(one > two for one, two in zip(left_out[1], left_out[2], strict=True))
    assert min(left_out[1]) > 0.05
    draw(points, tmp_path / "drop.png")
    assert (tmp_path / "drop.png").read_bytes().startswith(b"\x89PNG")

"""Experts that do not start out alike: noise, and Drop-Upcycling's redrawn units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery.execute import Settings
from surgery.operation import RunOptions
from surgery.upcycling.options import UpcycleOptions
from surgery.upcycling.upcycle import upcycle
from tests.surgery.upcycling.dense import load, logits, make, relative, stored, upcycled
from tests.tools import unequal

E, LAYER = 4, "model.layers.1.mlp"


def experts_of(folder: Path, projection: str) -> list[torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    return [found[f"{LAYER}.experts.{e}.{projection}.weight"] for e in range(E)]


@pytest.mark.parametrize("given", ["noise:0.01", "noise:5%"])
def test_noise_has_the_deviation_asked_for(tmp_path: Path, given: str) -> None:
    upcycled(stored(tmp_path, "qwen3"), tmp_path / "moe", experts=E, init=given)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        dense = make("qwen3").state_dict()[f"{LAYER}.{projection}.weight"]
        std = 0.01 if given == "noise:0.01" else 0.05 * float(dense.double().std(correction=0))
        found = experts_of(tmp_path / "moe", projection)
        noise = torch.stack([expert - dense for expert in found])
        # Within four standard errors of E * n normal numbers.
        assert abs(float(noise.std()) / std - 1) < 4 / (2 * noise.numel()) ** 0.5
        assert abs(float(noise.mean())) < 4 * std / noise.numel() ** 0.5
        corr = torch.corrcoef(noise.flatten(1)) - torch.eye(E)
        assert float(corr.abs().max()) < 6 / dense.numel() ** 0.5  # streams of their own


def test_noise_is_rounded_once(tmp_path: Path) -> None:
    """In bfloat16: the float32 sum, rounded; with the noise that a float32 file gets, too."""
    for dtype in (torch.float32, torch.bfloat16):
        upcycled(stored(tmp_path, "qwen3", dtype), tmp_path / f"{dtype}", experts=E, init="noise:0.01")
    dense = make("qwen3").state_dict()[f"{LAYER}.up_proj.weight"]
    for wide, narrow in zip(
        *(experts_of(tmp_path / f"{d}", "up_proj") for d in (torch.float32, torch.bfloat16)), strict=True
    ):
        noise = wide.double() - dense.double()
        expected = (dense.bfloat16().double() + noise).float()
        # `noise` is known to half a unit of the wide sum only, so a tie may fall either way.
        spacing = 2.0 ** (torch.frexp(expected).exponent - 8)
        assert bool(((narrow.double() - expected.double()).abs() <= spacing * (0.5 + 1e-3)).all())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_drop_redraws_the_same_units_everywhere(tmp_path: Path, ratio: float) -> None:
    """Rows of gate and up and columns of down, the same ones in one expert and others in the next."""
    upcycled(stored(tmp_path, "qwen3"), tmp_path / "moe", experts=E, init=f"drop:{ratio}")
    dense = make("qwen3").state_dict()
    found = {name: experts_of(tmp_path / "moe", name) for name in ("gate_proj", "up_proj", "down_proj")}
    chosen = []
    for e in range(E):
        changed = {
            name: (found[name][e] != dense[f"{LAYER}.{name}.weight"]).any(dim=0 if name == "down_proj" else 1)
            for name in found
        }
        assert all(torch.equal(mask, changed["gate_proj"]) for mask in changed.values())
        assert int(changed["gate_proj"].sum()) == round(48 * ratio)
        chosen.append(changed["gate_proj"])
    if ratio < 1:
        assert len({tuple(mask.tolist()) for mask in chosen}) == E


def test_drop_draws_from_what_it_replaces(tmp_path: Path) -> None:
    """New entries have the mean and the deviation of the entries that they replace, within four standard errors."""
    model = make("qwen3")
    with torch.no_grad():
        model.get_submodule(LAYER).up_proj.weight.add_(0.7)
    model.save_pretrained(tmp_path / "dense")
    from surgery.checkpoint import open_checkpoint

    upcycled(open_checkpoint(tmp_path / "dense"), tmp_path / "moe", experts=E, init="drop:1")
    dense = model.state_dict()[f"{LAYER}.up_proj.weight"]
    drawn = torch.stack(experts_of(tmp_path / "moe", "up_proj"))
    std = float(dense.double().std(correction=0))
    assert abs(float(drawn.mean() - dense.mean())) < 4 * std / drawn.numel() ** 0.5
    assert abs(float(drawn.std()) / std - 1) < 4 / (2 * drawn.numel()) ** 0.5


@pytest.mark.parametrize(
    ("name", "init"),
    [(name, init) for name in ("qwen3", "granite") for init in ("noise:1%", "drop:0.5", "granular:2")]
    + [("gpt2", "drop:0.5")],
)
def test_threads_do_not_change_a_byte(tmp_path: Path, name: str, init: str) -> None:
    dense = stored(tmp_path, name)
    for threads in (1, 4):
        options = UpcycleOptions(experts=4, init=init)
        upcycle(dense, tmp_path / f"{threads}", options, RunOptions(settings=Settings(threads=threads)))
    assert not unequal(tmp_path / "1", tmp_path / "4")


@pytest.mark.parametrize("name", ["gpt2", "bert", "granite"])
@pytest.mark.parametrize("init", ["noise:1%", "drop:0.25"])
def test_other_layouts_start_out_near_the_dense_model(tmp_path: Path, name: str, init: str) -> None:
    """Transposed weights, biases, and experts in one stack: what is computed lands where it belongs."""
    report = upcycled(stored(tmp_path, name), tmp_path / "moe", experts=4, init=init)
    assert not report.preserved
    found = relative(logits(load(tmp_path / "moe")), logits(make(name)))
    assert 1e-5 < found < (0.1 if init.startswith("noise") else 0.95)


def test_a_whole_share_is_larger_than_a_part(tmp_path: Path) -> None:
    """The more is redrawn, the further from the dense model."""
    dense, expected = stored(tmp_path, "qwen3"), logits(make("qwen3"))

    def far(**options: Any) -> float:
        place = tmp_path / "-".join(map(str, options.values()))
        upcycled(dense, place, **options)
        return relative(logits(load(place)), expected)

    assert far(init="drop:0.1") < far(init="drop:0.5") < far(init="drop:1")
    assert far(init="noise:0.5%") < far(init="noise:5%")

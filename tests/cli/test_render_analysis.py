"""What analyze says on a terminal: every matrix where they are few, medians by module and layer where they are many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

import surgery
from surgery.cli.main import run
from tests.cli.test_render import drawn
from tests.models import make, save
from tests.peft_tools import write_adapter
from tests.tools import square_adapter, square_checkpoint


@pytest.fixture
def layered(tmp_path: Path) -> Path:
    """A checkpoint of 40 layers of two matrices each."""
    base = square_checkpoint(tmp_path / "base", 1, 8)
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.{name}.weight" for layer in range(40) for name in ("mlp.up_proj", "mlp.down_proj")]
    save_file({name: torch.randn(8, 8, generator=generator) for name in names}, base / "model.safetensors")
    return base


def test_many_matrices_are_summed_up(layered: Path) -> None:
    """By module, and by layer; the medians are those of the report."""
    report = surgery.analyze(layered)
    lines = drawn(report)
    (up,) = [line for line in lines if line.startswith("mlp.up_proj (40)")]
    norms = sorted(module.norm for module in report.modules if module.group == "mlp.up_proj")
    assert f"{(norms[19] + norms[20]) / 2:.3g}" in up.split()
    assert sum(line.startswith("layer ") for line in lines) == 40
    assert "--all lists every matrix." in lines
    assert len(lines) < 60
    every = drawn(report, every=True)
    assert sum(line.startswith("model.layers.") for line in every) == 80


def test_adapters_are_named_with_their_weights(tmp_path: Path) -> None:
    base, adapter = square_checkpoint(tmp_path / "base", 2, 16), square_adapter(tmp_path / "tuned", 2, 16)
    lines = drawn(surgery.analyze(base, adapter, (adapter, -0.5)))
    assert "tuned" in lines
    assert "tuned x -0.5" in lines
    assert "tuned and tuned" in lines
    (row, _) = [line.split() for line in lines[lines.index("tuned and tuned") :] if line.startswith("m.")]
    assert row[:2] == ["m.0", "-1.000"]
    assert (row[3], row[5]) == ("25.0%", "25.0%")


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make("llama")
    base = save(model, tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
    adapter = write_adapter(model, config, tmp_path / "adapter")
    assert run(["analyze", str(base), str(adapter), "--plot", str(tmp_path / "x.html")]) == 0
    printed = capsys.readouterr().out
    assert "Left out, having no factors: lm_head.weight of adapter.\n" in printed
    assert f"Drawn in {tmp_path / 'x.html'}.\n" in printed


def test_an_adapter_of_zeros_has_dashes(tmp_path: Path) -> None:
    base, adapter = square_checkpoint(tmp_path / "base", 1, 16), square_adapter(tmp_path / "tuned", 1, 16)
    names = "base_model.model.m.0.lora_{}.weight"
    zeros = {names.format("A"): torch.ones(4, 16), names.format("B"): torch.zeros(16, 4)}
    save_file(zeros, adapter / "adapter_model.safetensors")
    (row,) = [line.split() for line in drawn(surgery.analyze(base, adapter)) if line.startswith("m.0")]
    assert row == ["m.0", "4", "0", "0%", *["-"] * 6]

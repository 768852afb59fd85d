"""The command: what it prints, what it writes, and several processes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.cli.main import run
from surgery.errors import OptionError
from tests.surgery.training import making
from tests.tools import tree

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.texts(tmp_path_factory.mktemp("data") / "texts.jsonl", 24)


def command(base: Path, data: Path, output: Path, *others: str) -> list[str]:
    return ["train", str(base), "--data", str(data), "-o", str(output), "--method", "full", "--device", "cpu", *others]


def test_what_it_prints_and_writes(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A report on stdout, progress on stderr; a checkpoint with tokenizer, card, log and provenance that verifies."""
    output = tmp_path / "out"
    how = ["--steps", "4", "--batch-size", "4", "--eval-split", "4", "--set", "learning_rate=1e-3", "--eval-every", "2"]
    assert run(command(base, data, output, *how)) == 0
    printed, said = capsys.readouterr()
    assert "training: step 4 of 4, loss " in said
    assert "4 of 4, 0.8 times through the data" in printed
    assert "texts.jsonl: 20 examples (text)" in printed
    assert set(tree(output)) >= {
        "README.md", "config.json", "model.safetensors", "surgery.json", "tokenizer.json", "training/log.jsonl",
        "training/loss.png",
    }  # fmt: skip
    content = json.loads((output / "surgery.json").read_bytes())
    assert content["operation"] == "train"
    assert content["options"]["learning_rate"] == 1e-3
    assert [entry["role"] for entry in content["inputs"]] == ["base", "data", "held out"]
    assert content["inputs"][1]["source"] == "texts.jsonl"
    assert content["report"]["done"] == 4
    assert str(tmp_path) not in (output / "surgery.json").read_text() + (output / "README.md").read_text()
    assert surgery.verify(output).passed
    card = (output / "README.md").read_text()
    assert card.startswith("---\nbase_model: model\n")
    assert "| data | texts.jsonl: 20 examples" in card


def test_json_and_dry_run(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object, and nothing written."""
    assert run(command(base, data, tmp_path / "out", "--steps", "2", "--json", "--dry-run")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["dry_run"], printed["steps"], printed["done"]) == (True, 2, 0)
    assert printed["data"]["examples"] == 24
    assert printed["trained"] == printed["parameters"]
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is left alone, unless it is to be replaced."""
    output = tmp_path / "out"
    assert run(command(base, data, output, "--steps", "1", "--quiet")) == 0
    before = tree(output)
    assert run(command(base, data, output, "--steps", "1", "--seed", "1", "--quiet")) == 1
    assert "exists already; pass --overwrite" in capsys.readouterr().err
    assert tree(output) == before
    assert run(command(base, data, output, "--steps", "1", "--seed", "1", "--quiet", "--overwrite")) == 0
    assert tree(output)["model.safetensors"] != before["model.safetensors"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--set", "lr=1"], "Error: --set has the option 'lr', which there is not."),
        (["--set", "steps=many"], "Error: steps is 'many', expected int."),
        (["--track", "wandb"], "Error: --track wandb needs the package of that name, which is not installed."),
        (["--track", "paper"], "Error: --track is 'paper', expected tensorboard, wandb"),
        (["--optimizer", "adamw-8bit"], "Error: --optimizer adamw-8bit needs the package 'bitsandbytes'"),
        (["--max-length", "999"], "Error: --max-length is 999, and the model has 320 positions."),
        (["--patience", "2"], "Error: --patience needs evaluations; give --eval-data or --eval-split."),
    ],
)
def test_options_that_make_no_sense(
    given: list[str], sentence: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, status 2, and nothing is left."""
    assert run(command(base, data, tmp_path / "out", "--steps", "1", *given)) == 2
    assert capsys.readouterr().err.startswith(sentence)
    assert list(tmp_path.iterdir()) == []


def test_settings_by_name() -> None:
    from surgery.training.recipe import parse_setting, with_recipe

    assert parse_setting("learning-rate=1e-4") == ("learning_rate", 1e-4)
    assert parse_setting("packing=yes") == ("packing", True)
    assert parse_setting("max_length=none") == ("max_length", None)
    assert with_recipe("lima", {"data": "x", "steps": 3}).epochs is None
    assert with_recipe("upcycle", {"data": "x"}).router_z_loss == 0.001
    with pytest.raises(OptionError, match="--set is 'packing', expected KEY=VALUE"):
        parse_setting("packing")


@pytest.mark.slow
def test_two_processes_are_one(data: Path, tmp_path: Path) -> None:
    """The losses of one process with batches twice as large; the last batch of an epoch leaves one without rows."""
    base = making.checkpoint(tmp_path / "model")
    data = making.texts(tmp_path / "texts.jsonl", 17)
    how: dict[str, Any] = {"steps": 8, "gradient_accumulation": 2, "learning_rate": 1e-3, "save_every": 4}
    making.run(base, data, tmp_path / "one", batch_size=4, **how)
    options = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    train = command(base, data, tmp_path / "two", "--batch-size", "2", "--json", *options)
    done = subprocess.run(
        [*launch, "-m", "surgery", *train], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    assert making.losses(tmp_path / "two") == pytest.approx(making.losses(tmp_path / "one"), abs=1e-5)

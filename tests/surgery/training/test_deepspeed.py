"""Training under DeepSpeed's ZeRO on two processes: the losses and weights of one, saved whole, and resumed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery.errors import OptionError, SurgeryError, UnsupportedError
from surgery.training import zero
from surgery.training.options import TrainOptions
from tests.surgery.training import making
from tests.surgery.training.test_sharded import HOW, close, finish, start
from tests.test_docs import ROOT

CONFIG = ROOT / "examples" / "accelerate" / "deepspeed.yaml"


def stage(number: int, folder: Path) -> Path:
    """The shipped configuration, with another stage."""
    text = CONFIG.read_text()
    assert "zero_stage: 2\n" in text
    (folder / "config.yaml").write_text(text.replace("zero_stage: 2\n", f"zero_stage: {number}\n"))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one matrix for embedding and head, in bfloat16."""
    made = making.model("llama", tie_word_embeddings=True).to(torch.bfloat16)
    return making.checkpoint(tmp_path_factory.mktemp("base") / "model", made=made)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.texts(tmp_path_factory.mktemp("data") / "texts.jsonl", 17)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.texts(tmp_path_factory.mktemp("data") / "held.jsonl", 5)


@pytest.mark.slow
def test_the_shipped_configuration_learns_what_one_process_does(base: Path, data: Path, tmp_path: Path) -> None:
    """ZeRO-2, an adapter, with accumulation, clipping and decay."""
    pytest.importorskip("deepspeed", reason="comes with the extra dev")
    making.run(base, data, tmp_path / "one", batch_size=4, method="lora", **HOW)
    finish(start(base, data, tmp_path / "two", CONFIG, batch_size=2, method="lora", **HOW))
    close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_shared_weights_are_learned_written_and_resumed(base: Path, data: Path, held_out: Path, tmp_path: Path) -> None:
    """ZeRO-3, full tuning: stopped by a signal, it goes on to what one process learns; another stage is refused."""
    pytest.importorskip("deepspeed", reason="comes with the extra dev")
    making.run(base, data, tmp_path / "one", batch_size=4, method="full", eval_data=str(held_out), **HOW)
    how = {**HOW, "batch_size": 2, "method": "full", "eval_data": held_out}
    config = stage(3, tmp_path)
    process = start(base, data, tmp_path / "two", config, **how)
    state = tmp_path / ".two.partial" / "state"
    deadline = time.monotonic() + 200
    while not (state / "latest.json").is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert json.loads((state / "latest.json").read_text())["step"] < HOW["steps"]
    folder = next(path for path in state.iterdir() if path.is_dir())
    whole = load_file(folder / "main.safetensors")
    shares = [load_file(folder / f"process-{number}.safetensors") for number in (0, 1)]
    assert whole["weight/model.layers.0.self_attn.q_proj.weight"].shape == (32, 32)
    moments = sum(tensor.numel() for share in shares for name, tensor in share.items() if name.endswith("/exp_avg"))
    assert moments >= sum(tensor.numel() for name, tensor in whole.items() if name.startswith("weight/"))
    before = [
        line["loss"] for line in map(json.loads, (state / "log.jsonl").read_text().splitlines()) if "loss" in line
    ]
    with pytest.raises(OptionError, match="sharding was 'zero-3' and is None; the number of processes was 2 and is 1"):
        making.run(base, data, tmp_path / "two", **{**how, "eval_data": str(held_out)})
    finish(start(base, data, tmp_path / "two", config, **how))
    close(tmp_path / "two", tmp_path / "one")
    after = [line["loss"] for line in making.log(tmp_path / "two") if "loss" in line]
    assert after[: len(before)] == before


# What is read of a configuration --------------------------------------------------------------------------------------


def test_the_command_says_batches_and_precision() -> None:
    options = TrainOptions(data="x", batch_size=3, gradient_accumulation=5, max_grad_norm=0.5)
    given = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 7,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": False, "offload_param": {"device": "none"}},
    }
    found = zero.settings(given, options, "bf16")
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["gradient_accumulation_steps"] == 5
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert found["torch_autocast"]["enabled"]
    assert "bf16" not in found
    assert not zero.settings(given, options, "no")["torch_autocast"]["enabled"]


@pytest.mark.parametrize(
    ("given", "precision", "error", "sentence"),
    [
        (
            {"optimizer": {}},
            "no",
            OptionError,
            "The DeepSpeed configuration has 'optimizer'; leave it out, --optimizer",
        ),
        ({"scheduler": {}}, "no", OptionError, "The DeepSpeed configuration has 'scheduler'; leave it out, --optimi"),
        ({}, "fp16", UnsupportedError, "--precision fp16 does not go with DeepSpeed; use bf16 or fp32."),
        ({}, "no", UnsupportedError, "zero_stage is None, expected 1, 2 or 3; without ZeRO launch ddp.yaml."),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "no",
            UnsupportedError,
            "offload_param to nvme is not there; set offload_param_device: none.",
        ),
    ],
    ids=["optimizer", "scheduler", "float16", "no stage", "offload"],
)
def test_configurations_that_are_refused(
    given: dict[str, Any], precision: str, error: type[SurgeryError], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        zero.settings(given, TrainOptions(data="x"), precision)
    assert str(caught.value).startswith(sentence)

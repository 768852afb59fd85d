"""Training a model that is spread over two processes: the losses and weights of one, saved whole, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from surgery.errors import OptionError, UnsupportedError
from surgery.training import machine, sharding
from tests.surgery.training import making
from tests.test_docs import ROOT

CONFIG = ROOT / "examples" / "accelerate" / "fsdp2.yaml"
HOW: dict[str, Any] = {
    "steps": 24,
    "gradient_accumulation": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "save_every": 3,
    "eval_every": 8,
    "seed": 5,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one matrix for embedding and head, in bfloat16."""
    made = making.model("llama", tie_word_embeddings=True).to(torch.bfloat16)
    return making.checkpoint(tmp_path_factory.mktemp("tied") / "model", made=made)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.texts(tmp_path_factory.mktemp("data") / "texts.jsonl", 17)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.texts(tmp_path_factory.mktemp("data") / "held.jsonl", 5)


def words(base: Path, data: Path, output: Path, config: Path = CONFIG, **how: Any) -> list[str]:
    """The command of a run on two processes that share the model."""
    options = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "surgery", "train"]
    return [
        *launch,
        str(base),
        "--data",
        str(data),
        "-o",
        str(output),
        "--device",
        "cpu",
        "--precision",
        "fp32",
        *options,
    ]


def start(*arguments: Any, **how: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(words(*arguments, **how), cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err[-4000:]
    return out


def close(found: Path, expected: Path) -> None:
    """Losses, norms of the gradients and held-out losses to 1e-5; weights to what Adam makes of that."""
    for name in ("loss", "gradient_norm", "eval_loss"):
        values = [[line[name] for line in making.log(place) if name in line] for place in (found, expected)]
        assert values[0] or name == "eval_loss"
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    (file,) = [path.name for path in expected.glob("*.safetensors")]
    left, right = load_file(found / file), load_file(expected / file)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.allclose(tensor.float(), right[name].float(), rtol=1e-2, atol=2e-4), name


@pytest.fixture(scope="module")
def undisturbed(tied: Path, data: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full tuning on two processes."""
    output = tmp_path_factory.mktemp("two") / "out"
    finish(start(tied, data, output, batch_size=2, method="full", eval_data=held_out, **HOW))
    return output


@pytest.mark.slow
def test_a_model_on_two_processes_learns_what_one_does(
    undisturbed: Path, tied: Path, data: Path, held_out: Path, tmp_path: Path
) -> None:
    """With accumulation, clipping, decay and evaluation; what is written has every row, under the names of one process.

    The last batch of an epoch leaves a process without rows.
    """
    making.run(tied, data, tmp_path / "one", batch_size=4, method="full", eval_data=str(held_out), **HOW)
    close(undisturbed, tmp_path / "one")
    assert (undisturbed / "surgery.json").is_file()


@pytest.mark.slow
def test_an_adapter_on_two_processes_learns_what_one_does(base: Path, data: Path, tmp_path: Path) -> None:
    making.run(base, data, tmp_path / "one", batch_size=4, method="lora", **HOW)
    finish(start(base, data, tmp_path / "two", batch_size=2, method="lora", **HOW))
    close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_run_on_two_processes_goes_on_bit_for_bit(
    undisturbed: Path, tied: Path, data: Path, held_out: Path, tmp_path: Path
) -> None:
    """Stopped by a signal, it goes on from the shards of each process; processes of another kind are refused."""
    how = {**HOW, "batch_size": 2, "method": "full", "eval_data": held_out}
    process = start(tied, data, tmp_path / "stopped", **how)
    state = tmp_path / ".stopped.partial" / "state"
    deadline = time.monotonic() + 200
    while not (state / "latest.json").is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert json.loads((state / "latest.json").read_text())["step"] < HOW["steps"]
    shards = [load_file(next(state.glob("*-0")) / f"process-{number}.safetensors") for number in (0, 1)]
    for name in ("weight/model.layers.0.self_attn.q_proj.weight", "optimizer/0/exp_avg"):
        assert shards[0][name].shape == shards[1][name].shape
    assert shards[0]["weight/model.layers.0.self_attn.q_proj.weight"].shape == (16, 32)
    with pytest.raises(OptionError, match="sharding was 'fsdp2' and is None; the number of processes was 2 and is 1"):
        making.run(tied, data, tmp_path / "stopped", **{**how, "eval_data": str(held_out)})
    finish(start(tied, data, tmp_path / "stopped", **how))
    numbers = ("step", "loss", "gradient_norm", "eval_loss")
    lines = [
        [{k: line[k] for k in numbers if k in line} for line in making.log(place)]
        for place in (undisturbed, tmp_path / "stopped")
    ]
    assert lines[0] == lines[1]
    weights = [load_file(place / "model.safetensors") for place in (undisturbed, tmp_path / "stopped")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


# What is refused ------------------------------------------------------------------------------------------------------


class Fake:
    """As much of accelerate's accelerator as is asked whether its processes can be trained with."""

    def __init__(self, kind: str, version: int = 2, precision: str = "no", efficient: bool = False) -> None:
        self.distributed_type = DistributedType[kind]
        self.is_fsdp2 = kind == "FSDP" and version == 2
        self.mixed_precision = precision
        plugin = SimpleNamespace(cpu_ram_efficient_loading=efficient, mixed_precision_policy=None)
        self.state = SimpleNamespace(fsdp_plugin=plugin)


@pytest.mark.parametrize(
    ("accelerator", "sentence"),
    [
        (Fake("FSDP", 1), "Training over FSDP1 is not there; set fsdp_version: 2, as examples/accelerate/fsdp2.yaml"),
        (Fake("FSDP", precision="fp16"), "--precision fp16 does not go with FSDP2; use bf16 or fp32."),
        (Fake("FSDP", efficient=True), "fsdp_cpu_ram_efficient_loading leaves all processes but the first without"),
        (
            Fake("MEGATRON_LM"),
            "Training over MEGATRON_LM is not there; shard the model with FSDP2, as examples/acceler",
        ),
    ],
    ids=["FSDP1", "float16", "weights on one process", "Megatron"],
)
def test_processes_that_cannot_be_trained_with(accelerator: Any, sentence: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        machine.check_kind(accelerator)
    assert str(caught.value).startswith(sentence)


def test_gradients_are_added_up_in_float32() -> None:
    """accelerate's own policy adds them up in bfloat16."""
    accelerator = Fake("FSDP", precision="bf16")
    machine.check_kind(accelerator)
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


# Without processes ----------------------------------------------------------------------------------------------------


def test_plain_tensors_are_all_here() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert not sharding.is_sharded(tensor)
    assert sharding.shard(tensor) is tensor
    assert sharding.like(tensor, tensor) is tensor
    kept = sharding.gathered({"one": tensor, "other": tensor}, keep=True)
    assert kept["one"] is kept["other"]
    assert torch.equal(kept["one"], tensor)
    assert sharding.gathered({"one": tensor}, keep=False) == {}

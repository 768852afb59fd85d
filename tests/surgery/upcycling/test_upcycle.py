"""`upcycle` as a whole: the command, resumption, provenance, and inputs that are none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import surgery
from surgery.checkpoint import open_checkpoint
from surgery.errors import FormatError, OutputError, UnsupportedError
from surgery.execute import Progress
from surgery.upcycling.options import UpcycleOptions
from tests.surgery.upcycling.dense import load, logits, make, relative, stored, upcycled
from tests.tools import interrupted, own_disk, read_json, run_cli, unequal


def test_with_nothing_else_on_the_line(tmp_path: Path) -> None:
    """The folder's name is made up, the report says what was done, and transformers loads the result."""
    stored(tmp_path, "llama")
    done = run_cli("upcycle", tmp_path / "llama-float32", "--experts", "4")
    assert done.returncode == 0, done.stderr
    assert "MixtralForCausalLM" in done.stdout
    assert relative(logits(load(tmp_path / "llama-float32-moe-4x")), logits(make("llama"))) < 1e-6
    again = run_cli("upcycle", tmp_path / "llama-float32", "--experts", "4")
    assert again.returncode == 1
    assert again.stderr == (
        f"Error: The output {tmp_path / 'llama-float32-moe-4x'} exists already; pass --overwrite to replace it.\n"
    )


def test_the_same_work_gives_the_same_bytes(tmp_path: Path) -> None:
    dense = stored(tmp_path, "qwen2", torch.bfloat16)
    for name in ("a", "b"):
        upcycled(dense, tmp_path / name, init="noise:1%", layers="1")
    assert not unequal(tmp_path / "a", tmp_path / "b")
    surgery.upcycle(dense, output=tmp_path / "c", init="noise:1%", layers="1", seed=1)
    assert unequal(tmp_path / "a", tmp_path / "c")


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    surgery.upcycle(dense, output=tmp_path / "whole", experts=16)

    def call(progress: Progress) -> object:
        return surgery.upcycle(dense, output=tmp_path / "moe", experts=16, progress=progress)

    assert interrupted(dense.nbytes, call)
    assert not (tmp_path / "moe").exists()
    report = surgery.upcycle(dense, output=tmp_path / "moe", experts=16)
    assert report.resumed > 0
    assert not unequal(tmp_path / "moe", tmp_path / "whole")


def test_provenance(tmp_path: Path) -> None:
    """`surgery.json` names the dense model and its hashes, and `verify` proves the output by it."""
    dense = stored(tmp_path, "llama")
    upcycled(dense, tmp_path / "moe", experts=4, seed=7)
    found = read_json(tmp_path / "moe" / "surgery.json")
    assert found["operation"] == "upcycle"
    assert found["options"]["seed"] == 7
    assert [entry["role"] for entry in found["inputs"]] == ["dense"]
    expert = found["outputs"]["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    assert expert == found["inputs"][0]["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert surgery.verify(tmp_path / "moe").passed


def test_copying_needs_no_torch(tmp_path: Path) -> None:
    """Copies and routers go without torch, and so do its 240 MB; noise needs it."""
    stored(tmp_path, "llama", torch.bfloat16)
    places = f"{str(tmp_path / 'llama-bfloat16')!r}, output={str(tmp_path / 'moe')!r}"
    script = (
        "import sys, surgery\n"
        f"surgery.upcycle({places}, layers='last:2', verify=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "moe" / "model.safetensors").exists()


def test_shards(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    upcycled(dense, tmp_path / "moe", shard_bytes=100_000)
    index = read_json(tmp_path / "moe" / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 5
    assert relative(logits(load(tmp_path / "moe")), logits(make("llama"))) < 1e-6


def test_other_files_come_along(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    (Path(dense.label) / "tokenizer.json").write_text("{}")
    upcycled(open_checkpoint(dense.label), tmp_path / "moe")
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "moe" / "generation_config.json").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    report = surgery.upcycle(dense, output=tmp_path / "moe", experts=32, dry_run=True)
    assert report.dry_run
    assert not (tmp_path / "moe").exists()
    real = surgery.upcycle(dense, output=tmp_path / "moe", experts=32)
    assert (real.nbytes, real.parameters) == (report.nbytes, report.parameters)
    assert report.parameters == open_checkpoint(tmp_path / "moe").parameters


def test_active_parameters(tmp_path: Path) -> None:
    """What one token meets: everything but the experts that it is not sent to."""
    dense = stored(tmp_path, "llama")
    report = surgery.upcycle(dense, output=tmp_path / "moe", experts=8, top_k=2)
    mlp = 3 * 32 * 48
    assert report.parameters == dense.parameters + 3 * (7 * mlp + 8 * 32)
    assert report.active == dense.parameters + 3 * (mlp + 8 * 32)


# Inputs that are none -------------------------------------------------------------------------------------------------


def test_a_mixture_is_none(tmp_path: Path) -> None:
    """One of a type that is known can be enlarged; see `test_enlarge.py`."""
    upcycled(stored(tmp_path, "llama"), tmp_path / "moe")
    config = read_json(tmp_path / "moe" / "config.json") | {"model_type": "llama"}
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError) as caught:
        upcycled(open_checkpoint(tmp_path / "moe"), tmp_path / "twice", combine="raw")
    assert str(caught.value) == (
        f"{tmp_path / 'moe'} is a mixture of experts already, though its config calls it 'llama'; mixtures that can be "
        "enlarged are those of type mixtral, glm4_moe, qwen2_moe, qwen3_moe, qwen3_5_moe_text, flex_olmo, granitemoe, "
        "ernie4_5_moe, hunyuan_v1_moe, and those that ship their code."
    )


def test_an_unknown_family(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    config = read_json(Path(dense.label) / "config.json") | {"model_type": "contraption"}
    (Path(dense.label) / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError) as caught:
        upcycled(open_checkpoint(dense.label), tmp_path / "moe")
    assert str(caught.value).startswith(
        f"{dense.label} is of type 'contraption', for whose feed-forward blocks no names are known; expected one of "
    )


def test_layers_that_are_missing_or_of_another_shape(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dense = stored(tmp_path, "llama")
    file = Path(dense.label) / "model.safetensors"
    whole = load_file(file)
    without = {name: tensor for name, tensor in whole.items() if not name.startswith("model.layers.1.mlp")}
    save_file(without, file, {"format": "pt"})
    with pytest.raises(FormatError) as caught:
        upcycled(open_checkpoint(dense.label), tmp_path / "moe")
    assert str(caught.value) == (
        f"{dense.label} has 2 feed-forward blocks up to layer 2 of its decoder; layers [1] are missing."
    )
    narrow = {**whole, "model.layers.1.mlp.up_proj.weight": whole["model.layers.1.mlp.up_proj.weight"][:40].clone()}
    save_file(narrow, file, {"format": "pt"})
    with pytest.raises(FormatError) as caught:
        upcycled(open_checkpoint(dense.label), tmp_path / "moe")
    assert "a mixture needs layers of one shape" in str(caught.value)
    assert "'model.layers.1'" in str(caught.value)


def test_a_disk_too_small(tmp_path: Path) -> None:
    """Refused before anything is written, with both numbers."""
    dense = stored(tmp_path, "llama")
    with own_disk(1) as disk:
        with pytest.raises(OutputError) as caught:
            upcycled(dense, disk / "moe", experts=64)
        assert "bytes but its disk has" in str(caught.value)
        assert not any(disk.rglob("*.safetensors"))


def test_the_library_takes_what_the_options_have() -> None:
    """The keywords of `surgery.upcycle` are the options and how to run, no more and no less."""
    import dataclasses

    from surgery.keywords import HashingKeywords, UpcycleKeywords

    options = {field.name for field in dataclasses.fields(UpcycleOptions)}
    assert options <= UpcycleKeywords.__optional_keys__
    assert UpcycleKeywords.__optional_keys__ - options >= HashingKeywords.__optional_keys__


def test_an_input_is_never_the_output(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    with pytest.raises(OutputError):
        upcycled(dense, Path(dense.label))
    shutil.rmtree(dense.label)

"""`verify`: an output against its provenance, two checkpoints as bytes, and two checkpoints as functions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint import open_checkpoint
from surgery.dtypes import DTYPES
from surgery.errors import InputError, OptionError
from tests.models import FAMILIES, inputs, invent, make, perturb, save
from tests.peft_tools import write_adapter
from tests.tools import raw_file, read_json, run_cli

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and outputs of every kind."""
    folder = tmp_path_factory.mktemp("outputs")
    model = make("llama")
    base = save(model, folder / "base", torch.bfloat16, max_shard_size="20KB")
    tuned = save(perturb(model, scale=0.2), folder / "tuned", torch.bfloat16)
    adapter = write_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]), folder / "adapter")
    surgery.merge(base, adapter, output=folder / "merged", reversible=True)
    surgery.merge(base, adapter, output=folder / "split", shard_bytes=25_000)
    surgery.subtract(folder / "merged", output=folder / "subtracted")
    surgery.extract(base, tuned, output=folder / "extracted", rank=2, device="cpu")
    return folder


@pytest.fixture
def merged(outputs: Path, tmp_path: Path) -> Path:
    """A copy of an output, to be damaged."""
    return shutil.copytree(outputs / "merged", tmp_path / "merged")


# An output ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["merged", "split", "subtracted", "extracted"])
def test_an_output_is_what_its_provenance_says(outputs: Path, name: str) -> None:
    """Every tensor and every file that was written is counted."""
    report: Any = surgery.verify(outputs / name)
    assert report.passed
    content = read_json(outputs / name / "surgery.json")
    assert (report.tensors, report.files) == (len(content["outputs"]), len(content["files"]))
    run = run_cli("verify", outputs / name)
    assert run.returncode == 0
    assert run.stdout == (
        f"{outputs / name} is what its surgery.json says: {report.tensors} tensors and {report.files} files match.\n"
    )


def shard_of(folder: Path, name: str) -> Path:
    return folder / read_json(folder / "model.safetensors.index.json")["weight_map"][name]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of one shard, and let no index contradict that."""
    shard = shard_of(folder, NAME)
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})
    index = read_json(folder / "model.safetensors.index.json")
    others = {name: file for name, file in index["weight_map"].items() if file != shard.name}
    index["weight_map"] = others | dict.fromkeys(tensors, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def flip_tensor(folder: Path) -> None:
    tensor = open_checkpoint(folder).tensors[NAME]
    flip(Path(tensor.source.name), tensor.offset + tensor.nbytes // 2)


def flip_and_remove(folder: Path) -> None:
    flip_tensor(folder)
    (folder / "generation_config.json").unlink()


INDEX = "File model.safetensors.index.json does not have the hash on record."
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a flipped bit": (flip_tensor, [f"Tensor '{NAME}' in {{shard}} does not have the hash on record."]),
    "a missing tensor": (
        lambda f: rewrite(f, lambda tensors: tensors.pop(NAME)),
        [f"Tensor '{NAME}' is missing.", INDEX],
    ),
    "an extra tensor": (
        lambda f: rewrite(f, lambda tensors: tensors.update(extra=torch.zeros(1))),
        ["Tensor 'extra' is not on record.", INDEX],
    ),
    "another dtype": (
        lambda f: rewrite(f, lambda tensors: tensors.update({NAME: tensors[NAME].float()})),
        [f"Tensor '{NAME}' is F32 [48, 32], expected BF16 [48, 32].", INDEX],
    ),
    "another shape": (
        lambda f: rewrite(f, lambda tensors: tensors.update({NAME: tensors[NAME].view(32, 48)})),
        [f"Tensor '{NAME}' is BF16 [32, 48], expected BF16 [48, 32].", INDEX],
    ),
    "a changed config": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("llama", "lllama", 1)),
        ["File config.json does not have the hash on record."],
    ),
    "a missing file": (lambda f: (f / "generation_config.json").unlink(), ["File generation_config.json is missing."]),
    "a damaged undo record": (
        lambda f: flip(f / "undo" / "record.safetensors", -1),
        ["File undo/record.safetensors does not have the hash on record."],
    ),
    "another adapter in the record": (
        lambda f: flip(f / "undo" / "adapters" / "0" / "adapter_model.safetensors", -1),
        ["File undo/adapters/0/adapter_model.safetensors does not have the hash on record."],
    ),
    "several at once": (
        flip_and_remove,
        [
            f"Tensor '{NAME}' in {{shard}} does not have the hash on record.",
            "File generation_config.json is missing.",
        ],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_differs_is_named(merged: Path, damage: str) -> None:
    """In the report, and on the command line, which ends with status 1; all else is still counted as good."""
    whole: Any = surgery.verify(merged)
    act, expected = DAMAGE[damage]
    shard = shard_of(merged, NAME)
    act(merged)
    problems = [sentence.format(shard=shard) for sentence in expected]
    report: Any = surgery.verify(merged)
    assert not report.passed
    assert sorted(report.problems) == sorted(problems)
    assert report.tensors == whole.tensors - any(NAME in problem for problem in problems)
    run = run_cli("verify", merged)
    assert run.returncode == 1
    assert run.stdout.splitlines() == [
        f"{merged} is not what its surgery.json says:",
        *(f"  {problem}" for problem in report.problems),
    ]


def test_a_file_that_nobody_wrote_is_named(merged: Path) -> None:
    """Code beside the weights is run by whoever trusts the folder."""
    (merged / "modeling_own.py").write_text("print('mine')")
    report: Any = surgery.verify(merged)
    assert report.problems == ("File modeling_own.py is not on record.",)


def test_the_cache_of_hashes_is_no_proof(merged: Path) -> None:
    """A flipped bit under the old size and time is found: everything is read again."""
    tensor = open_checkpoint(merged).tensors[NAME]
    path = Path(tensor.source.name)
    times = path.stat()
    flip(path, tensor.offset)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not surgery.verify(merged).passed


def test_json_says_what_failed(merged: Path) -> None:
    flip_tensor(merged)
    run = run_cli("verify", merged, "--json")
    assert run.returncode == 1
    content = json.loads(run.stdout)
    assert content["passed"] is False
    assert content["kind"] == "provenance"
    assert len(content["problems"]) == 1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda f: (f / "surgery.json").unlink(), "has no surgery.json, so there is nothing to verify it against"),
        (lambda f: (f / "surgery.json").write_text('{"schema": 1}'), "holds no hashes to verify"),
        (lambda f: (f / "surgery.json").write_text('{"schema": 1, "outputs": []}'), "holds no hashes to verify"),
    ],
    ids=["none", "empty", "a list"],
)
def test_without_hashes_there_is_nothing_to_verify(merged: Path, change: Callable[[Path], object], part: str) -> None:
    change(merged)
    with pytest.raises(InputError) as caught:
        surgery.verify(merged)
    assert str(merged) in caught.value.message
    assert part in caught.value.message


def test_an_output_without_hashes(outputs: Path, tmp_path: Path) -> None:
    surgery.merge(outputs / "base", outputs / "adapter", output=tmp_path / "out", hash=False)
    with pytest.raises(InputError, match="was written with --no-hash"):
        surgery.verify(tmp_path / "out")


@pytest.mark.parametrize("entry", [3, None, "x", [], {}, {"blake3": 5}, {"dtype": [], "shape": {}}], ids=repr)
def test_nonsense_in_provenance_is_a_problem_not_a_crash(merged: Path, entry: object) -> None:
    """surgery.json comes with a download like everything else."""
    content = read_json(merged / "surgery.json")
    content["outputs"][NAME] = entry
    content["files"]["config.json"] = entry
    (merged / "surgery.json").write_text(json.dumps(content))
    report: Any = surgery.verify(merged)
    assert not report.passed
    assert any(NAME in problem for problem in report.problems)


# Two checkpoints ------------------------------------------------------------------------------------------------------


def compare(left: Path, right: Path) -> Any:
    return surgery.verify(left, right)


def test_the_same_in_other_files(outputs: Path, tmp_path: Path) -> None:
    """Shards and order do not matter, nor does the format."""
    base = outputs / "base"
    tensors = {name: tensor for shard in base.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    report = compare(base, tmp_path)
    assert report.passed
    assert report.equal == len(tensors)
    run = run_cli("verify", base, tmp_path)
    assert run.returncode == 0
    assert run.stdout == f"{base} and {tmp_path} are the same in all {len(tensors)} tensors.\n"


def test_what_differs_and_by_how_much(outputs: Path) -> None:
    """Exactly the tensors that the merge changed, each with || right - left || / || left ||."""
    report = compare(outputs / "base", outputs / "merged")
    assert not report.passed
    names = [item.name for item in report.different]
    assert sorted(names) == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
    for item in report.different:
        left = load_file(shard_of(outputs / "base", item.name))[item.name].double()
        right = load_file(shard_of(outputs / "merged", item.name))[item.name].double()
        assert item.relative == pytest.approx(float((right - left).norm() / left.norm()), rel=1e-4)
    run = run_cli("verify", outputs / "base", outputs / "merged")
    assert run.returncode == 1
    assert all(name in run.stdout for name in names)
    assert f"{report.equal} tensors are the same, 2 differ." in run.stdout


def test_tensors_of_one_side_are_named(tmp_path: Path) -> None:
    for name, tensors in {"l": ("a", "b"), "r": ("b", "c")}.items():
        (tmp_path / name).mkdir()
        save_file({tensor: torch.ones(2) for tensor in tensors}, tmp_path / name / "model.safetensors")
    report = compare(tmp_path / "l", tmp_path / "r")
    assert (report.equal, report.left_only, report.right_only) == (1, ("a",), ("c",))
    run = run_cli("verify", tmp_path / "l", tmp_path / "r")
    assert run.returncode == 1
    assert f"only in {tmp_path / 'l'}: a" in run.stdout
    assert f"only in {tmp_path / 'r'}: c" in run.stdout


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (torch.ones(3), torch.ones(3, dtype=torch.bfloat16), True),
        (torch.full((3,), 0.1), torch.full((3,), 0.1, dtype=torch.bfloat16), False),
        (torch.arange(3), torch.arange(3, dtype=torch.int32), True),
        (torch.arange(3), torch.arange(3) + 1, False),
        (torch.tensor([2**62, 1]), torch.tensor([2**62 + 1, 1]), False),
        (torch.tensor([True, False]), torch.tensor([True, True]), False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.ones(2, 3), torch.ones(3, 2), False),
        (torch.zeros(0, 3), torch.zeros(0, 3), True),
        (torch.tensor(1.0), torch.tensor(1.5), False),
        (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64) * 1j, False),
        (torch.ones(4).to(torch.float8_e4m3fn), torch.full((4,), 2.0).to(torch.float8_e4m3fn), False),
        (torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64) + 2**-52, False),
    ],
    ids=[
        *("same values", "rounded", "integers of other widths", "integers", "large integers", "booleans", "NaN"),
        *("signed zero", "shape", "empty", "scalar", "complex", "float8", "last bit of float64"),
    ],
)
def test_equal_means_the_same_bytes_or_the_same_values(
    tmp_path: Path, left: torch.Tensor, right: torch.Tensor, equal: bool
) -> None:
    """The bytes where the dtypes agree, the values where they do not."""
    for name, tensor in {"l": left, "r": right}.items():
        (tmp_path / name).mkdir()
        save_file({"t": tensor}, tmp_path / name / "model.safetensors")
    assert compare(tmp_path / "l", tmp_path / "r").passed == equal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_can_be_compared(tmp_path: Path, dtype: Any) -> None:
    """Those that torch does not have are compared as bytes."""
    count = dtype.nbytes((8,))
    header = {"t": {"dtype": dtype.name, "shape": [8], "data_offsets": [0, count]}}
    for name, value in {"l": 0, "same": 0, "r": 1}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(raw_file(header, bytes([value] * count)))
    assert compare(tmp_path / "l", tmp_path / "same").passed
    assert not compare(tmp_path / "l", tmp_path / "r").passed


# As functions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5", "mixtral"])
def test_logits_are_compared(family: str, tmp_path: Path) -> None:
    """Equal to the bit for the same model; for another, as far apart as transformers finds them on the same inputs."""
    model = make(family)
    base = save(model, tmp_path / "base")
    other = save(perturb(model, scale=0.3), tmp_path / "other")
    same: Any = surgery.verify(base, base, logits=True)
    assert (same.logits.largest, same.logits.relative, same.logits.agreement) == (0.0, 0.0, 1.0)
    report: Any = surgery.verify(base, other, logits=True)
    found = []
    for folder in (base, other):
        loaded = getattr(transformers, FAMILIES[family][0]).from_pretrained(folder).eval()
        with torch.no_grad():
            found.append(loaded(**inputs(loaded)).logits.double())
    difference = found[1] - found[0]
    assert report.logits.largest == pytest.approx(float(difference.abs().max()), rel=1e-9)
    assert report.logits.relative == pytest.approx(float(difference.norm() / found[0].norm()), rel=1e-9)
    share = float((found[0].argmax(-1) == found[1].argmax(-1)).double().mean())
    assert report.logits.agreement == pytest.approx(share)
    assert 0 < report.logits.relative < 2


@pytest.mark.parametrize("shown", [True, False])
def test_running_models_draws_no_bars(shown: bool, outputs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The library prints nothing, and leaves transformers as it found it."""
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled()
    set_to: Callable[[], None] = logging.enable_progress_bar if shown else logging.disable_progress_bar
    set_to()
    try:
        capfd.readouterr()
        surgery.verify(outputs / "base", outputs / "merged", logits=True)
        assert capfd.readouterr() == ("", "")
        assert logging.is_progress_bar_enabled() is shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_logits_on_the_command_line(outputs: Path) -> None:
    """One JSON object, whatever transformers has to say."""
    run = run_cli("verify", outputs / "base", outputs / "merged", "--logits", "--json")
    assert run.returncode == 1
    content = json.loads(run.stdout)
    assert content["kind"] == "comparison"
    assert content["logits"]["inputs"] == "2 sequences of 32 random tokens"
    assert 0 < content["logits"]["relative"] < 1


def test_logits_depend_on_the_seed_only(outputs: Path) -> None:
    first, again, other = (
        surgery.verify(outputs / "base", outputs / "merged", logits=True, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_a_file_cannot_be_run(outputs: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(
        InputError, match=r"w\.safetensors is not a folder on disk; only such a checkpoint can be run\."
    ):
        surgery.verify(tmp_path / "w.safetensors", tmp_path / "w.safetensors", logits=True)


@pytest.mark.parametrize("config", ["unknown", "none"])
def test_an_architecture_that_transformers_does_not_have(tmp_path: Path, config: str) -> None:
    """Compared as bytes it can be; as a function it is refused in a sentence."""
    folder = invent(tmp_path / "m")
    if config == "none":
        (folder / "config.json").unlink()
    assert surgery.verify(folder, folder).passed
    with pytest.raises(InputError) as caught:
        surgery.verify(folder, folder, logits=True)
    assert str(folder) in caught.value.message


def test_logits_need_two_checkpoints(outputs: Path) -> None:
    """An option that would do nothing is refused."""
    with pytest.raises(OptionError):
        surgery.verify(outputs / "merged", logits=True)

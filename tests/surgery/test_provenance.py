"""`surgery.json`: what an output was made from and how, the same bytes for the same work, and nothing about where."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import surgery
from surgery.checkpoint import open_checkpoint
from surgery.errors import FormatError
from surgery.folder import LocalFolder
from surgery.provenance import read_provenance
from tests.models import make, perturb, save
from tests.peft_tools import write_adapter
from tests.tools import read_json, run_cli, tree, unequal


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its fine-tune and two adapters, in a folder whose name is easy to find in a text."""
    folder = tmp_path_factory.mktemp("placename")
    model = make("llama")
    save(model, folder / "base", torch.bfloat16)
    (folder / "base" / "tokenizer.json").write_text("{}")
    save(perturb(model, rank=3, scale=0.2), folder / "tuned", torch.bfloat16)
    write_adapter(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"]), folder / "one")
    write_adapter(model, LoraConfig(r=2, target_modules=["v_proj"]), folder / "two", seed=5)
    return folder


Work = Callable[[Path, Path], Any]
WORKS: dict[str, Work] = {
    "extract": lambda f, out: surgery.extract(f / "base", f / "tuned", output=out, rank=2, device="cpu"),
    "merge": lambda f, out: surgery.merge(f / "base", (f / "one", 0.5), f / "two", output=out),
    "merge reversibly": lambda f, out: surgery.merge(f / "base", f / "one", f / "two", output=out, reversible=True),
    "subtract": lambda f, out: surgery.subtract(f / "merged", f / "one", output=out),
    "switch": lambda f, out: surgery.switch(f / "merged", f / "one", f / "two", output=out),
}


def prepare(folder: Path) -> Path:
    """Add a reversible merge to the inputs."""
    if not (folder / "merged").exists():
        surgery.merge(folder / "base", folder / "one", output=folder / "merged", reversible=True)
    return folder


@pytest.mark.parametrize("work", WORKS)
def test_it_says_nothing_about_place_time_or_host(work: str, inputs: Path, tmp_path: Path) -> None:
    """In no text file of an output, and in no header either."""
    out = tmp_path / "outname"
    WORKS[work](prepare(inputs), out)
    year = re.compile(rb"\b20[2-9]\d-\d\d-\d\d")
    foreign = {str(tmp_path), str(inputs), inputs.name, "outname", socket.gethostname(), "pytest", os.getcwd()}
    for name, content in tree(out).items():
        for word in foreign - {"", "localhost"}:
            assert word.encode() not in content, f"{word} in {name}"
        assert not year.search(content), name
    text = (out / "surgery.json").read_text()
    assert getpass.getuser() not in re.findall(r"\w+", text)
    keys = set(re.findall(r'"(\w+)":', text))
    assert not keys & {
        "time",
        "date",
        "created",
        "host",
        "hostname",
        "user",
        "path",
        "cwd",
        "output",
        "threads",
        "seconds",
    }


@pytest.mark.parametrize("work", WORKS)
def test_the_same_inputs_elsewhere_give_the_same_bytes(
    work: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder, with other times, named by a relative path, from another current folder."""
    WORKS[work](prepare(inputs), tmp_path / "here")
    moved = shutil.copytree(inputs, tmp_path / "else" / "where", copy_function=shutil.copyfile)
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))
    monkeypatch.chdir(moved.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    WORKS[work](Path("where"), Path("there"))
    assert unequal(tmp_path / "here", Path("there")) == []


def test_the_command_and_the_library_write_the_same_bytes(inputs: Path, tmp_path: Path) -> None:
    """Whatever else the process has imported or done before."""
    WORKS["merge reversibly"](inputs, tmp_path / "library")
    paths = (inputs / "base", inputs / "one", inputs / "two")
    run = run_cli("merge", *paths, "--reversible", "-o", tmp_path / "command")
    assert run.returncode == 0, run.stderr
    assert unequal(tmp_path / "library", tmp_path / "command") == []


def test_what_it_holds(inputs: Path, tmp_path: Path) -> None:
    """Schema, operation, options with their values, versions, inputs with their parts, outputs, files, numbers."""
    surgery.merge(inputs / "base", (inputs / "one", 0.5), inputs / "two", output=tmp_path / "out")
    content = read_json(tmp_path / "out" / "surgery.json")
    assert list(content) == [
        "schema",
        "operation",
        "options",
        "versions",
        "inputs",
        "outputs",
        "files",
        "report",
    ]
    assert (content["schema"], content["operation"]) == (1, "merge")
    names = {"reversible", "shard_bytes", "allow_nonfinite", "any_base"}
    assert content["options"] == dict.fromkeys(names, False) | {"shard_bytes": None}
    assert content["versions"] == {"checkpoint-surgery": surgery.__version__, "torch": torch.__version__}
    described = [(item["role"], item["source"], item.get("weight")) for item in content["inputs"]]
    assert described == [("base", "base", None), ("adapter", "one", 0.5), ("adapter", "two", 1.0)]
    assert not any("revision" in item for item in content["inputs"])
    assert content["outputs"].keys() == open_checkpoint(inputs / "base").tensors.keys()
    assert content["files"].keys() == {"config.json", "generation_config.json", "tokenizer.json"}
    assert set(content["report"]) >= {"weights", "survived", "unchanged_share", "copied", "nbytes"}
    assert not set(content["report"]) & {"output", "plan", "dry_run", "resumed"}


def test_the_provenance_of_an_input_is_not_carried_along(inputs: Path, tmp_path: Path) -> None:
    """An output has its own, not its base's."""
    prepare(inputs)
    surgery.subtract(inputs / "merged", output=tmp_path / "out")
    assert read_json(tmp_path / "out" / "surgery.json")["operation"] == "subtract"
    surgery.merge(inputs / "merged", inputs / "two", output=tmp_path / "again")
    assert read_json(tmp_path / "again" / "surgery.json")["operation"] == "merge"


def test_a_folder_with_a_name_that_is_not_unicode(inputs: Path, tmp_path: Path) -> None:
    """Linux allows any bytes in a name; the work is done nevertheless."""
    base = tmp_path / os.fsdecode(b"b\xff")
    try:
        shutil.copytree(inputs / "base", base)
    except OSError:
        pytest.skip("this file system has Unicode names only")
    surgery.merge(base, inputs / "one", output=tmp_path / "out")
    json.loads((tmp_path / "out" / "surgery.json").read_bytes())


def test_numbers_that_are_not_numbers_are_still_json(inputs: Path, tmp_path: Path) -> None:
    """With NaN let through, a norm may be NaN: the file must stay valid JSON, which has no NaN."""
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(inputs / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("inf")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    surgery.merge(base, inputs / "one", output=tmp_path / "out", allow_nonfinite=True)

    def refuse(constant: str) -> object:
        raise AssertionError(constant)

    json.loads((tmp_path / "out" / "surgery.json").read_bytes(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"schema": 2}', "has schema 2, expected 1; use a newer version of this tool."),
        ("{}", "has schema None, expected 1"),
        ("[]", "holds a JSON list, expected an object."),
        ("{", "is not valid JSON"),
    ],
)
def test_provenance_that_cannot_be_read(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "surgery.json").write_text(text)
    with pytest.raises(FormatError) as caught:
        read_provenance(LocalFolder(tmp_path))
    assert str(tmp_path / "surgery.json") in caught.value.message
    assert part in caught.value.message


def test_no_provenance_is_none(tmp_path: Path) -> None:
    assert read_provenance(LocalFolder(tmp_path)) is None

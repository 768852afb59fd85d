"""Facts of folders: parents from configs, provenance and cards; and nothing that a stranger sends breaks anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import surgery
from surgery.belonging import weights_id
from surgery.folder import LocalFolder, Overlay
from surgery.hub.facts import FACTS_VERSION, MOST_READ, BoundedFolder, facts_of, parent_facts, relation_of
from surgery.hub.passing import PassingTensors
from surgery.hub.tags import bases_of, tags_of
from tests.hub.registry_tools import adapter
from tests.tools import square_checkpoint


def nothing(_: str) -> None:
    return None


def facts(folder: Path, **files: bytes) -> dict[str, object]:
    """The facts of a folder in which some files are others."""
    contents = {name.replace("_json", ".json"): data for name, data in files.items()}
    return facts_of(Overlay(LocalFolder(folder), contents), nothing)


# Parents --------------------------------------------------------------------------------------------------------------


def parents(base: object, card: Mapping[str, object], inputs: list[dict[str, str]], kind: str = "adapter") -> list[str]:
    found = parent_facts(
        {"kind": kind, "base": base, "inputs": inputs, "operation": "extract" if inputs else None}, {}, card
    )
    listed: Any = found.get("parents", [])
    return [f"{item['source']} {item['relation']}{' #' if 'weights' in item else ''}" for item in listed]


RECORDED = [{"role": "base", "source": "folder", "weights": "f" * 64}, {"role": "tuned", "source": "tuned"}]


@pytest.mark.parametrize(
    ("base", "card", "inputs", "expected"),
    [
        ("lab/base", {}, [], ["lab/base adapter"]),
        ("lab/base", {"base_model": "lab/base"}, [], ["lab/base adapter"]),
        ("lab/base", {"base_model": "LAB/Base"}, [], ["lab/base adapter"]),
        ("lab/base", {"base_model": ["lab/base", "lab/other"]}, [], ["lab/base adapter", "lab/other adapter"]),
        ("/home/me/base", {"base_model": "lab/base"}, [], ["lab/base adapter"]),
        ("/home/me/base", {}, [], ["/home/me/base adapter"]),
        (None, {"base_model": "lab/base"}, [], ["lab/base adapter"]),
        ("lab/base", {}, RECORDED, ["lab/base adapter #", "tuned extract"]),
        ("folder", {"base_model": "lab/base"}, RECORDED, ["lab/base adapter #", "tuned extract"]),
        ("folder", {"base_model": ["a/b", "c/d"]}, RECORDED[:1], ["folder adapter #", "a/b adapter", "c/d adapter"]),
        (None, {}, [], []),
        (7, {"base_model": {"a": 1}, "base_model_relation": 3}, [], []),
    ],
)  # fmt: skip
def test_the_base_of_an_adapter(
    base: object, card: dict[str, object], inputs: list[dict[str, str]], expected: list[str]
) -> None:
    assert parents(base, card, inputs) == expected


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ({}, {}, (None, [])),
        ({"base_model": "a/b"}, {}, ("finetune", ["finetune"])),
        ({"base_model": "a/b"}, {"quantization_config": {"bits": 4}}, ("quantized", ["quantized"])),
        ({"base_model": "a/b", "base_model_relation": "merge"}, {}, ("merge", ["merge"])),
        ({"base_model": ["a/b", "c/d"], "base_model_relation": "nonsense"}, {}, ("finetune", ["finetune"] * 2)),
    ],
)
def test_the_base_of_a_checkpoint(
    card: dict[str, object], config: dict[str, object], expected: tuple[str | None, list[str]]
) -> None:
    found = parent_facts({"kind": "dense"}, config, card)
    listed: Any = found.get("parents", [])
    assert (found.get("relation"), [item["relation"] for item in listed]) == expected


@pytest.mark.parametrize(
    ("operation", "role", "is_adapter", "expected"),
    [
        ("merge", "base", False, "merge"), ("merge", "adapter", False, "merge"), ("switch", "merged", False, "merge"),
        ("upcycle", "dense", False, "upcycle"), ("upcycle", "expert", False, "upcycle"),
        ("upcycle", "mixture", False, "upcycle"), ("dense", "mixture", False, "dense"),
        ("train", "base", False, "finetune"), ("train", "base", True, "adapter"),
        ("restore", "base", False, "finetune"),
        ("extract", "tuned", True, "extract"), ("combine", "adapter", True, "combine"),
    ],
)  # fmt: skip
def test_relations(operation: str, role: str, is_adapter: bool, expected: str) -> None:
    assert relation_of(operation, role, is_adapter) == expected


def test_of_what_the_operations_write(here: Path) -> None:
    """Each role that an operation records gives its relation."""
    square_checkpoint(here / "base", 2, 16)
    adapter(here / "style")
    surgery.merge("base", "style", output="merged", reversible=True)
    surgery.subtract("merged", output="again")
    surgery.combine("style", ("style", 0.5), output="combined", method="cat")
    surgery.resize("style", rank=2, output="small")
    expected = {
        "merged": ("merge", [("base", "base", "merge"), ("adapter", "style", "merge")]),
        "again": ("merge", [("merged", "merged", "merge")]),
        "combined": ("adapter", [("base", "lab/base", "adapter"), ("adapter", "style", "combine")]),
        "small": ("adapter", [("base", "lab/base", "adapter"), ("adapter", "style", "resize")]),
    }
    for name, (relation, recorded) in expected.items():
        found: Any = facts(here / name)
        assert found["relation"] == relation
        listed = [(item["role"], item["source"], item["relation"]) for item in found["parents"]]
        assert list(dict.fromkeys(listed)) == recorded
        assert found["version"] == FACTS_VERSION


# Tags -----------------------------------------------------------------------------------------------------------------


def test_tags() -> None:
    found = tags_of({
        "kind": "adapter", "method": "dora", "ranks": [2, 16], "targets": ["q_proj"], "base": "lab/base",
        "parents": [
            {"source": "lab/base", "role": "base", "relation": "adapter"},
            {"source": "no repository!", "role": "tuned", "relation": "extract"},
        ],
        "card": {
            "tags": ["mine"], "license": "mit", "language": ["en"], "datasets": "lab/data", "pipeline_tag": "text-gen",
        },
    })  # fmt: skip
    assert found == [
        "mine", "peft", "text-gen", "adapter", "lora", "dora", "rank:2", "rank:16", "target:q_proj",
        "base_model:lab/base", "base_model:adapter:lab/base", "license:mit", "en", "dataset:lab/data",
    ]  # fmt: skip
    assert bases_of({"base": "lab/base"}) == ["lab/base"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
_KEYS = ("peft_type", "r", "target_modules", "base_model_name_or_path", "revision", "rank_pattern", "lora_alpha",
         "target_parameters", "modules_to_save", "use_dora", "task_type", "init_lora_weights")  # fmt: skip
_CHECKPOINT = ("model_type", "architectures", "vocab_size", "text_config", "num_experts", "quantization_config",
               "tie_word_embeddings", "num_hidden_layers", "head_dim")  # fmt: skip
_PROVENANCE = ("operation", "inputs", "outputs", "options", "report")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    return adapter(root / "style"), square_checkpoint(root / "base", 2, 16)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=4),
    st.dictionaries(st.sampled_from(_CHECKPOINT), _JSON, max_size=4),
    st.dictionaries(st.sampled_from(_PROVENANCE), _JSON, max_size=3) | st.none(),
    st.text(max_size=60),
)
def test_no_config_breaks_a_commit(
    folders: tuple[Path, Path],
    config: dict[str, object],
    model: dict[str, object],
    provenance: dict[str, object] | None,
    front: str,
) -> None:
    """Whatever the JSON says there are facts, which are JSON themselves, and tags."""
    style, base = folders
    real = json.loads((style / "adapter_config.json").read_text())
    more = {} if provenance is None else {"surgery_json": json.dumps({"schema": 1, **provenance}).encode()}
    card = {"README.md": f"---\n{front}\n---\n".encode(errors="replace")}
    for found in (
        facts(style, adapter_config_json=json.dumps(real | config).encode(), **more, **card),
        facts(base, config_json=json.dumps(model).encode(), **more, **card),
    ):
        assert found["version"] == FACTS_VERSION
        assert "kind" in found or "unread" in found
        json.dumps(found, allow_nan=False)
        assert all(0 < len(tag) <= 256 for tag in tags_of(found))


def test_what_is_wrong_is_kept(folders: tuple[Path, Path]) -> None:
    style, base = folders
    found = facts(style, adapter_config_json=b'{"peft_type": "LORA"')
    assert str(found["unread"]).startswith(f"{style}/adapter_config.json")
    found = facts(base, **{"model.safetensors": b"\xff" * 64})
    assert "announces a header of 18446744073709551615 bytes" in str(found["unread"])
    assert "kind" not in found


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    """Headers yes, data no: of a large file a few kB are read, and too many headers are not read at all."""
    rng = np.random.default_rng(0)
    save_file({"w.weight": rng.standard_normal((512, 512)).astype(np.float32)}, tmp_path / "model.safetensors")
    counted = BoundedFolder(LocalFolder(tmp_path))
    before = counted._budget.left
    found = facts_of(counted, nothing)
    assert found["parameters"] == 512 * 512
    assert before - counted._budget.left < 1000
    found = facts(tmp_path, **{f"m-{n}.json": b"{}" for n in range(3)}, config_json=b"{}" + b" " * (MOST_READ - 1))
    assert str(found["unread"]).endswith(f"has more than {MOST_READ:,} bytes of headers and configs.")


# Hashes in passing ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=5), st.lists(st.integers(1, 400), max_size=20), st.data())
def test_tensors_are_hashed_in_passing(sizes: list[int], cuts: list[int], data: st.DataObject) -> None:
    import tempfile

    tensors = {f"t{n}": np.arange(size, dtype=np.float32) for n, size in enumerate(sizes)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path)
        content = path.read_bytes()
    whole = PassingTensors(len(content))
    begin = 0
    for cut in [*cuts, len(content)]:
        whole.update(content[begin : begin + cut])
        begin += cut
    if begin >= len(content):
        assert whole.hashes == {name: blake3(tensor.tobytes()).hexdigest() for name, tensor in tensors.items()}
    short = PassingTensors(len(content))
    short.update(content[: data.draw(st.integers(0, len(content) - 1))])
    assert short.hashes is None


@given(st.binary(max_size=300))
def test_anything_may_pass(content: bytes) -> None:
    passing = PassingTensors(len(content))
    passing.update(content)
    assert passing.hashes is None or content[8:9] == b"{"


def test_weights_are_the_hash_of_all_files(folders: tuple[Path, Path]) -> None:
    _, base = folders
    hashes = {name: blake3(t.tobytes()).hexdigest() for name, t in load_torch_bytes(base / "model.safetensors").items()}
    assert facts_of(LocalFolder(base), lambda _: hashes)["weights"] == weights_id(hashes)
    some = dict(list(hashes.items())[:1])
    assert "weights" not in facts_of(LocalFolder(base), lambda _: some)


def load_torch_bytes(path: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file as load

    return {name: tensor.view(torch.uint8).numpy() for name, tensor in load(path).items()}

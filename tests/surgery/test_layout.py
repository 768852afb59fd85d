"""How outputs are laid out in files: as the input had them, or split anew; compared with transformers and the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file

import surgery
from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.dtypes import BF16, BY_NAME, DTYPES, F32
from surgery.header import parse_header
from surgery.layout import Layout, TensorSpec, lay_out, mirror, single_file, split
from surgery.names import natural_key
from tests.models import FAMILIES, logits, make, save
from tests.peft_tools import different, stored, write_adapter


def specs_of(checkpoint: Checkpoint) -> list[TensorSpec]:
    return [TensorSpec.like(tensor) for tensor in checkpoint.tensors.values()]


def names(layout: Layout) -> dict[str, list[str]]:
    """Files, and the tensors in them in order."""
    return {file.name: [info.name for info in file.entries] for file in layout.files}


def index(layout: Layout) -> dict[str, Any]:
    assert layout.index is not None
    content: dict[str, Any] = json.loads(layout.index[1])
    return content


# Mirrored -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Checkpoint:
    """A checkpoint that transformers split, with its own metadata in the index."""
    return open_checkpoint(save(make("llama"), tmp_path / "sharded", max_shard_size="20KB"))


def test_what_does_not_change_keeps_every_byte_of_headers_and_index(sharded: Checkpoint) -> None:
    layout = mirror(sharded, specs_of(sharded))
    assert len(layout.files) == len(sharded.shards) > 2
    folder = sharded.path
    assert folder is not None
    for file, shard in zip(layout.files, sharded.shards, strict=True):
        assert (file.name, file.raw_header, file.size) == (shard.name, shard.header.raw, shard.source.size)
    assert layout.index == ("model.safetensors.index.json", (folder / "model.safetensors.index.json").read_bytes())
    assert layout.nbytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_files_of_older_writers_keep_their_order_and_padding(tmp_path: Path) -> None:
    """Here by name and not by dtype, with a header that is not aligned: nothing is rearranged."""
    text = (
        b'{"__metadata__": {"a": "b"}, "z": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}, '
        b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}} '
    )
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    checkpoint = open_checkpoint(tmp_path)
    (file,) = mirror(checkpoint, specs_of(checkpoint)).files
    assert file.raw_header[8:] == text
    # With another dtype the header is new; order and metadata stay.
    wider = [TensorSpec(s.name, F32, s.shape) for s in specs_of(checkpoint)]
    (file,) = mirror(checkpoint, wider).files
    header = parse_header(file.raw_header, file.size - len(file.raw_header), "it")
    assert [info.name for info in header.tensors] == ["z", "a"]
    assert dict(header.metadata) == {"a": "b"}


def test_a_changed_dtype_changes_its_own_file_and_the_index(sharded: Checkpoint) -> None:
    """The other files keep their bytes; the sizes in the index are right again."""
    name = next(iter(sharded.tensors))
    specs = [TensorSpec(s.name, BF16 if s.name == name else s.dtype, s.shape) for s in specs_of(sharded)]
    layout = mirror(sharded, specs)
    changed = [
        file.name
        for file, shard in zip(layout.files, sharded.shards, strict=True)
        if file.raw_header != shard.header.raw
    ]
    assert changed == [Path(sharded.tensors[name].source.name).name]
    assert index(layout)["metadata"]["total_size"] == sharded.nbytes - sharded.tensors[name].nbytes // 2
    assert index(layout)["weight_map"] == {n: Path(t.source.name).name for n, t in sharded.tensors.items()}


def test_new_tensors_go_to_the_end_of_the_last_file(sharded: Checkpoint) -> None:
    layout = mirror(sharded, [*specs_of(sharded), TensorSpec("new.weight", F32, (3,))])
    last = sharded.shards[-1].name
    assert names(layout)[last][-1] == "new.weight"
    assert index(layout)["weight_map"]["new.weight"] == last
    assert index(layout)["metadata"]["total_size"] == sharded.nbytes + 12


def test_a_file_that_loses_every_tensor_is_dropped(sharded: Checkpoint) -> None:
    first = sharded.shards[0]
    gone = {info.name for info in first.header.tensors}
    layout = mirror(sharded, [spec for spec in specs_of(sharded) if spec.name not in gone])
    assert first.name not in names(layout)
    assert first.name not in index(layout)["weight_map"].values()
    assert index(layout)["weight_map"].keys() == sharded.tensors.keys() - gone


def test_one_file_has_no_index(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(make("llama"), tmp_path / "m"))
    assert mirror(checkpoint, specs_of(checkpoint)).index is None


def test_a_lone_file_keeps_its_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    checkpoint = open_checkpoint(tmp_path / "other.safetensors")
    assert list(names(lay_out(checkpoint, specs_of(checkpoint), None))) == ["other.safetensors"]


# Split ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_file_is_laid_out_as_transformers_does(family: str, tmp_path: Path) -> None:
    """The header of `model.safetensors` is the one that `save_pretrained` writes, byte for byte."""
    folder = save(make(family), tmp_path / "m", torch.bfloat16)
    (file,) = split(specs_of(open_checkpoint(folder))).files
    assert file.name == "model.safetensors"
    written = (folder / file.name).read_bytes()
    assert written.startswith(file.raw_header)
    assert file.size == len(written)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_shards_load_in_transformers(family: str, tmp_path: Path) -> None:
    """A merge that splits anew: the same tensors as without, an index, and a model that says the same."""
    model = make(family)
    base = save(model, tmp_path / "base")
    target = {"llama": "q_proj", "gpt2": "c_attn", "mixtral": "q_proj", "t5": "q"}[family]
    config = LoraConfig(r=2, target_modules=[target], fan_in_fan_out=family == "gpt2")
    adapter = write_adapter(model, config, tmp_path / "adapter")
    surgery.merge(base, adapter, output=tmp_path / "whole")
    surgery.merge(base, adapter, output=tmp_path / "split", shard_bytes=30_000)
    assert different(stored(tmp_path / "split"), stored(tmp_path / "whole")) == []
    found = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert sorted(set(found["weight_map"].values())) == files
    assert found["metadata"]["total_size"] == open_checkpoint(base).nbytes
    cls = getattr(transformers, FAMILIES[family][0])
    assert torch.equal(logits(cls.from_pretrained(tmp_path / "split")), logits(cls.from_pretrained(tmp_path / "whole")))


def test_shards_are_joined_again(tmp_path: Path, sharded: Checkpoint) -> None:
    """With a limit above the whole there is one file, and no index is left over."""
    folder = sharded.path
    assert folder is not None
    adapter = write_adapter(make("llama"), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    surgery.merge(folder, adapter, output=tmp_path / "out", shard_bytes=10**9)
    weights = sorted(path.name for path in (tmp_path / "out").iterdir() if "safetensors" in path.name)
    assert weights == ["model.safetensors"]


def test_bin_files_become_safetensors_of_the_usual_name(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert list(names(lay_out(checkpoint, specs_of(checkpoint), None))) == ["model.safetensors"]


dtypes = st.sampled_from([dtype for dtype in DTYPES if dtype.bits >= 8])
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensor_names = st.from_regex(r"[a-c]{1,2}(\.[0-9]{1,2}){0,2}\.weight", fullmatch=True)
tensor_specs = st.lists(
    st.builds(TensorSpec, tensor_names, dtypes, shapes), min_size=1, max_size=20, unique_by=lambda spec: spec.name
)


@given(tensor_specs, st.integers(1, 300))
def test_every_tensor_is_in_one_shard_and_no_shard_is_too_large(specs: list[TensorSpec], limit: int) -> None:
    """Shards follow each other in natural order; a tensor beyond the limit has one to itself."""
    layout = split(specs, "stem", limit)
    found = names(layout)
    assert sorted(name for inside in found.values() for name in inside) == sorted(spec.name for spec in specs)
    sizes = {spec.name: spec.nbytes for spec in specs}
    for file in layout.files:
        inside = found[file.name]
        assert sum(sizes[name] for name in inside) <= limit or len([name for name in inside if sizes[name]]) == 1
        header = parse_header(file.raw_header, file.size - len(file.raw_header), "it")
        assert set(header.tensors) == set(file.entries)
    in_order = [sorted(inside, key=natural_key) for inside in found.values()]
    assert [name for inside in in_order for name in inside] == sorted(sizes, key=natural_key)
    if len(found) == 1:
        assert (list(found), layout.index) == (["stem.safetensors"], None)
    else:
        assert list(found) == [f"stem-{n:05d}-of-{len(found):05d}.safetensors" for n in range(1, len(found) + 1)]
        assert layout.index is not None
        assert layout.index[0] == "stem.safetensors.index.json"
        content = index(layout)
        assert content["metadata"]["total_size"] == sum(sizes.values())
        assert content["weight_map"] == {name: file for file, inside in found.items() for name in inside}


@given(tensor_specs, st.integers(1, 300))
def test_shards_are_those_of_the_hub_client(specs: list[TensorSpec], limit: int) -> None:
    """For tensors in the same order, none above the limit, the grouping is that of `save_pretrained`."""
    limit = max([limit, *(spec.nbytes for spec in specs)])
    ordered = {spec.name: spec for spec in sorted(specs, key=lambda spec: natural_key(spec.name))}
    theirs = split_state_dict_into_shards_factory(
        ordered,
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    ours = names(split(specs, "model", limit))
    assert {file: sorted(inside) for file, inside in ours.items()} == {
        file: sorted(inside) for file, inside in theirs.filename_to_tensors.items()
    }


def test_layouts_do_not_depend_on_the_order_of_the_tensors() -> None:
    specs = [TensorSpec(f"l.{n}.w", BY_NAME["F16"], (n,)) for n in range(12)]
    assert split(specs, "m", 40) == split(specs[::-1], "m", 40)
    assert single_file("m", specs) == single_file("m", specs[::-1])

"""Taking adapters out again: to the bit with a record, proved by hash; without, the error is stated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint import open_checkpoint
from surgery.errors import FormatError, InputError, IntegrityError, MismatchError, UnsupportedError
from tests.models import make, save
from tests.peft_tools import attach, different, stored, write_adapter
from tests.surgery.test_merge import CASES, EXPERTS, TIED


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the provenance, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "surgery.json"
    }


def adapter_for(tmp_path: Path, model: Any, name: str = "adapter", seed: int = 3, **settings: Any) -> Path:
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings})
    return write_adapter(model, config, tmp_path / name, seed=seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_every_file_of_the_base_comes_back(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever PEFT can train, merged reversibly and subtracted, is the base again: every byte of every file."""
    family, settings, _ = CASES[case]
    model = make(family)
    base = save(model, tmp_path / "base", dtype)
    (base / "LICENSE").write_text("text")
    adapter = adapter_for(tmp_path, model, **settings)
    surgery.merge(base, adapter, output=tmp_path / "plain")
    report = surgery.merge(base, adapter, output=tmp_path / "merged", reversible=True)
    assert report.record_bytes > 0
    assert not different(stored(tmp_path / "merged"), stored(tmp_path / "plain"))
    shutil.rmtree(adapter)
    back = surgery.subtract(tmp_path / "merged", output=tmp_path / "back")
    assert back.exact
    assert files(tmp_path / "back") == files(base)


@pytest.mark.parametrize("case", TIED)
def test_untied_heads_are_tied_again(case: str, tmp_path: Path) -> None:
    """A head that the merge had to store on its own is gone after subtracting, and the config says tied."""
    model = make("llama-tied")
    base = save(model, tmp_path / "base", torch.bfloat16)
    surgery.merge(base, adapter_for(tmp_path, model, **TIED[case]), output=tmp_path / "merged", reversible=True)
    surgery.subtract(tmp_path / "merged", output=tmp_path / "back")
    assert files(tmp_path / "back") == files(base)


def test_resized_vocabulary_shrinks_again(tmp_path: Path) -> None:
    """Matrices, vocab_size and tokenizer are the base's after subtracting, and files that came with the adapter go."""
    model, grown = make("llama"), make("llama")
    base = save(model, tmp_path / "base", torch.bfloat16, max_shard_size="15KB")
    (base / "tokenizer.json").write_text("{}")
    grown.resize_token_embeddings(101, mean_resizing=False)
    attach(grown, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    (tmp_path / "adapter/tokenizer.json").write_text('{"more": 1}')
    (tmp_path / "adapter/added_tokens.json").write_text("{}")
    surgery.merge(base, tmp_path / "adapter", output=tmp_path / "merged", reversible=True)
    surgery.subtract(tmp_path / "merged", output=tmp_path / "back")
    assert files(tmp_path / "back") == files(base)


@pytest.mark.parametrize("shard_bytes", [5_000, 10**9])
def test_shards_are_put_together_again(shard_bytes: int, tmp_path: Path) -> None:
    """A merge that laid the weights out anew is undone to the base's own files."""
    model = make("llama")
    base = save(model, tmp_path / "base", torch.bfloat16, max_shard_size="15KB")
    adapter = adapter_for(tmp_path, model)
    surgery.merge(base, adapter, output=tmp_path / "merged", reversible=True, shard_bytes=shard_bytes)
    surgery.subtract(tmp_path / "merged", output=tmp_path / "back")
    assert files(tmp_path / "back") == files(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_several_adapters_and_one_of_them(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of three merged adapters one is taken out: the bits are those of merging the other two, reversibly."""
    model = make("llama")
    base = save(model, tmp_path / "base", dtype)
    one = adapter_for(tmp_path, model, "one", 1)
    two = adapter_for(tmp_path, model, "two", 2, use_dora=True, target_modules=["q_proj", "up_proj"])
    three = adapter_for(tmp_path, model, "three", 3, use_rslora=True, target_modules=["q_proj", "v_proj"])
    given = ((one, 0.5), two, (three, -2.0))
    surgery.merge(base, *given, output=tmp_path / "merged", reversible=True)
    surgery.merge(base, given[0], given[2], output=tmp_path / "expected")
    report = surgery.subtract(tmp_path / "merged", two, output=tmp_path / "without")
    assert report.removed == ("two",)
    assert not different(stored(tmp_path / "without"), stored(tmp_path / "expected"))
    surgery.subtract(tmp_path / "without", output=tmp_path / "back")
    assert files(tmp_path / "back") == files(base)


def test_switch_is_merging_the_new_one_into_the_base(tmp_path: Path) -> None:
    """One pass, the bits of a fresh merge, and reversible again."""
    model = make("mixtral")
    base = save(model, tmp_path / "base", torch.bfloat16)
    old = adapter_for(tmp_path, model, "old", 1, **EXPERTS)
    new = adapter_for(tmp_path, model, "new", 2, target_modules=["q_proj", "o_proj"])
    surgery.merge(base, old, output=tmp_path / "merged", reversible=True)
    surgery.merge(base, (new, 0.5), output=tmp_path / "expected")
    report = surgery.switch(tmp_path / "merged", old, f"{new}=0.5", output=tmp_path / "switched")
    assert report.exact
    assert report.removed == ("old",)
    assert not different(stored(tmp_path / "switched"), stored(tmp_path / "expected"))
    surgery.subtract(tmp_path / "switched", output=tmp_path / "back")
    assert files(tmp_path / "back") == files(base)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_number_of_threads_does_not_matter(threads: int, tmp_path: Path) -> None:
    """Merged with two threads, subtracted with any number, torch's own included: the same bytes."""
    model = make("llama")
    base = save(model, tmp_path / "base", torch.float32)
    surgery.merge(base, adapter_for(tmp_path, model), output=tmp_path / "merged", reversible=True, threads=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        surgery.subtract(tmp_path / "merged", output=tmp_path / "back", threads=threads)
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "back") == files(base)


def merged_reversibly(tmp_path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path, Path]:
    model = make("llama")
    base = save(model, tmp_path / "base", dtype)
    adapter = adapter_for(tmp_path, model, target_modules=["q_proj", "up_proj"])
    surgery.merge(base, adapter, output=tmp_path / "merged", reversible=True)
    return base, adapter, tmp_path / "merged"


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_tensors_changed_after_the_merge_are_found_by_hash(name: str, tmp_path: Path) -> None:
    """Whether the adapter touched it or not, a changed tensor stops it, by name, and nothing is written."""
    _, _, merged = merged_reversibly(tmp_path)
    path = merged / "model.safetensors"
    tensors = load_file(path)
    tensors[name] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=rf"Tensor '{name}' .*changed after the merge; nothing is written"):
        surgery.subtract(merged, output=tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_damaged_records_are_found(tmp_path: Path) -> None:
    """A flipped byte, a missing entry, a foreign schema, a path that leads out: one sentence each."""
    _, _, merged = merged_reversibly(tmp_path)
    record, index = merged / "undo/record.safetensors", merged / "undo/record.json"
    good, content = record.read_bytes(), json.loads(index.read_text())
    record.write_bytes(good[:-40] + bytes(40))
    with pytest.raises(IntegrityError):
        surgery.subtract(merged, output=tmp_path / "back")
    record.write_bytes(good)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"schema": 99}, "has schema 99, expected 1"),
        ({"tensors": None}, "is not an undo record"),
        (
            {"adapters": [{"folder": "../../evil", "weight": 1.0}]},
            r"names the adapter folder '../../evil', expected adapters/N",
        ),
        ({"replaced_files": ["../x"]}, "names the file '../x', outside its folder"),
        ({"restored": {"nowhere": "record"}}, "says nothing about how to restore tensor 'nowhere'"),
    ]
    for change, sentence in changes:
        index.write_text(json.dumps({**content, **change}))
        with pytest.raises(FormatError, match=sentence):
            surgery.subtract(merged, output=tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_adapter_that_was_not_merged(tmp_path: Path) -> None:
    _, _, merged = merged_reversibly(tmp_path)
    other = adapter_for(tmp_path, make("llama"), "other", 7)
    with pytest.raises(MismatchError, match=r"other is not among the adapters merged into .*merged: adapter\."):
        surgery.subtract(merged, other, output=tmp_path / "back")


def test_a_copied_record_needs_nothing_else(tmp_path: Path) -> None:
    """The merged folder alone, moved elsewhere, gives the base back."""
    base, adapter, merged = merged_reversibly(tmp_path)
    moved = tmp_path / "elsewhere/deep"
    moved.parent.mkdir()
    merged.rename(moved)
    expected = files(base)
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    surgery.subtract(moved, output=tmp_path / "back")
    assert files(tmp_path / "back") == expected


def test_record_is_no_part_of_the_model(tmp_path: Path) -> None:
    """The record lies in a folder of its own: the merged checkpoint opens as before, and no later merge carries it."""
    _, adapter, merged = merged_reversibly(tmp_path)
    assert all("undo" not in name for name in open_checkpoint(merged).carried)
    surgery.merge(merged, (adapter, 0.1), output=tmp_path / "again")
    assert not (tmp_path / "again/undo").exists()


# Without a record -----------------------------------------------------------------------------------------------------


def test_without_a_record_the_error_is_stated(tmp_path: Path) -> None:
    """Most weights come back exactly; the stated error bounds the true one and is not far above it."""
    model = make("llama")
    base = save(model, tmp_path / "base", torch.bfloat16)
    adapter = adapter_for(tmp_path, model, target_modules=["q_proj", "up_proj"])
    surgery.merge(base, (adapter, 0.05), output=tmp_path / "merged")
    report = surgery.subtract(tmp_path / "merged", (adapter, 0.05), output=tmp_path / "back")
    assert report.exact is False
    before, after = stored(base), stored(tmp_path / "back")
    changed = [name for name in before if "q_proj" in name or "up_proj" in name]
    error = sum(float((after[n].double() - before[n].double()).norm() ** 2) for n in changed) ** 0.5
    norm = sum(float(before[n].double().norm() ** 2) for n in changed) ** 0.5
    assert report.expected_error is not None
    assert 0 < error / norm <= 1.5 * report.expected_error < 0.01
    same = sum(int((after[n] == before[n]).sum()) for n in changed)
    assert same > 0.8 * sum(before[n].numel() for n in changed)


def test_switch_without_a_record_rounds_once(tmp_path: Path) -> None:
    """Old out and new in, in float32, then one rounding: nearer to the fresh merge than two roundings are."""
    model = make("llama")
    base = save(model, tmp_path / "base", torch.bfloat16)
    old, new = (adapter_for(tmp_path, model, n, s, target_modules=["q_proj"]) for n, s in (("old", 1), ("new", 2)))
    surgery.merge(base, (old, 0.1), output=tmp_path / "merged")
    surgery.merge(base, (new, 0.1), output=tmp_path / "fresh")
    report = surgery.switch(tmp_path / "merged", (old, 0.1), (new, 0.1), output=tmp_path / "switched")
    assert report.exact is False
    fresh, got = stored(tmp_path / "fresh"), stored(tmp_path / "switched")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert float((fresh[name] == got[name]).double().mean()) > 0.6
    assert float((fresh[name].double() - got[name].double()).norm() / fresh[name].double().norm()) < 2.0**-8


def test_what_only_a_record_can_restore_is_refused_by_name(tmp_path: Path) -> None:
    model = make("llama")
    base = save(model, tmp_path / "base", torch.bfloat16)
    dora = adapter_for(tmp_path, model, "dora", use_dora=True, target_modules=["q_proj"])
    saved = adapter_for(tmp_path, model, "saved", target_modules=["v_proj"], modules_to_save=["input_layernorm"])
    surgery.merge(base, dora, saved, output=tmp_path / "merged")
    with pytest.raises(UnsupportedError, match=r"problems with the adapters .*; merge with --rev") as caught:
        surgery.subtract(tmp_path / "merged", dora, saved, output=tmp_path / "back")
    said = "\n".join(caught.value.problems)
    assert "'model.layers.0.self_attn.q_proj.weight' was rescaled by DoRA" in said
    assert "'model.layers.1.input_layernorm.weight' was replaced whole" in said


def test_nothing_to_take_out(tmp_path: Path) -> None:
    base = save(make("llama"), tmp_path / "base")
    with pytest.raises(
        InputError, match=r"base has no undo record \(it was not merged with --reversible\); name the adap"
    ):
        surgery.subtract(base, output=tmp_path / "back")

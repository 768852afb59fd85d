"""Adapters on embeddings and heads: tied pairs, copies that PEFT stores, resized vocabularies, replaced rows."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import MismatchError, NonFiniteError, UnsupportedError
from tests.models import inputs, is_linear, logits, make, perturb, save
from tests.peft_tools import attach, different, stored, write_adapter
from tests.surgery.test_merge import TIED

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def store_twice(folder: Path) -> Path:
    """The same tied model with its matrix under both names, as many tools write it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, path, {"format": "pt"})
    return folder


def unmerged(adapter: Path, family: str = "llama-tied") -> torch.Tensor:
    """What PEFT computes with the adapter beside the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(make(family), adapter).eval()
    with torch.no_grad():
        found: torch.Tensor = wrapped(**inputs(wrapped.get_base_model())).logits
    return found


def without_copies(adapter: Path) -> Path:
    """The adapter as `save_embedding_layers=False` writes it, and as our extraction does."""
    path = adapter / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if ".base_layer." not in name}, path)
    return adapter


# Tied pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*TIED, "replaced rows"])
def test_a_tied_matrix_that_is_stored_twice(case: str, tmp_path: Path) -> None:
    """The merged checkpoint computes what the adapter computed, both matrices agree with the config, and it undoes."""
    settings = TIED.get(case, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 7]})
    model = make("llama-tied")
    base = store_twice(save(model, tmp_path / "base"))
    adapter = write_adapter(model, LoraConfig(r=4, **settings), tmp_path / "adapter")
    surgery.merge(base, adapter, output=tmp_path / "merged", reversible=True)
    found = stored(tmp_path / "merged")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["tie_word_embeddings"] == torch.equal(found[EMBEDDING], found[HEAD])
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), unmerged(adapter), atol=2e-6, rtol=1e-5)
    surgery.subtract(tmp_path / "merged", output=tmp_path / "back")
    for path in base.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_two_matrices_that_the_config_ties_wrongly_stay_two(tmp_path: Path) -> None:
    """Stored twice with different values they are no pair, whatever the config says."""
    model = make("llama-tied")
    base = store_twice(save(model, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors[HEAD] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = write_adapter(model, LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "adapter")
    surgery.merge(base, without_copies(adapter), output=tmp_path / "merged")
    assert different(stored(tmp_path / "merged"), stored(base)) == [EMBEDDING]


@pytest.mark.parametrize("twice", [False, True], ids=["stored once", "stored twice"])
@pytest.mark.parametrize("copies", [False, True], ids=["no copies", "copies"])
@pytest.mark.parametrize(("gone", "kept"), [("q", "e"), ("q", "h"), ("h", "e"), ("e", "h")])
def test_what_stays_merged_is_as_if_merged_alone(
    gone: str, kept: str, copies: bool, twice: bool, tmp_path: Path
) -> None:
    """Taking one adapter out of a tied model leaves the bits of merging the other into the base, on both ends."""
    model = make("llama-tied")
    base = save(model, tmp_path / "base", torch.bfloat16)
    if twice:
        store_twice(base)
    targets = {"q": ["q_proj"], "e": ["embed_tokens"], "h": ["lm_head"]}
    half = model.to(torch.bfloat16)
    adapters = {
        name: write_adapter(half, LoraConfig(r=4, target_modules=targets[name]), tmp_path / name, seed=seed)
        for seed, name in enumerate((gone, kept))
    }
    if not copies:
        for adapter in adapters.values():
            without_copies(adapter)
    surgery.merge(base, adapters[gone], adapters[kept], output=tmp_path / "both", reversible=True)
    surgery.merge(base, adapters[kept], output=tmp_path / "alone", reversible=True)
    surgery.merge(base, adapters[gone], output=tmp_path / "other", reversible=True)
    surgery.subtract(tmp_path / "both", adapters[gone], output=tmp_path / "rest")
    surgery.switch(tmp_path / "other", adapters[gone], adapters[kept], output=tmp_path / "switched")
    for found in ("rest", "switched"):
        assert different(stored(tmp_path / found), stored(tmp_path / "alone")) == []
        assert (tmp_path / found / "config.json").read_bytes() == (tmp_path / "alone/config.json").read_bytes()
        surgery.subtract(tmp_path / found, output=tmp_path / f"{found}-back")
        assert different(stored(tmp_path / f"{found}-back"), stored(base)) == []


# Copies of the base's embedding, which PEFT stores beside the factors -------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_adapters_on_one_embedding(dtype: torch.dtype, tmp_path: Path) -> None:
    """Each brings a copy of the base's matrix, here in float32: both are added to the base, and both come out."""
    model = make("llama")
    base = save(model, tmp_path / "base", dtype)
    trained = make("llama").to(dtype).float()
    adapters = [
        write_adapter(trained, LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / name, seed=seed)
        for seed, name in enumerate(("one", "two"))
    ]
    report = surgery.merge(base, *adapters, output=tmp_path / "merged", reversible=True)
    assert report.replaced == ()
    expected = stored(base)[EMBEDDING].float()
    for adapter in adapters:
        factors = load_file(adapter / "adapter_model.safetensors")
        key = "base_model.model.model.embed_tokens.lora_embedding_"
        expected = expected + (factors[f"{key}B"] @ factors[f"{key}A"]).T * 2.0
    assert torch.equal(stored(tmp_path / "merged")[EMBEDDING], expected.to(dtype))
    surgery.subtract(tmp_path / "merged", output=tmp_path / "back")
    assert different(stored(tmp_path / "back"), stored(base)) == []
    if dtype is torch.float32:  # without a record too, to rounding
        approximate = surgery.merge(base, adapters[0], output=tmp_path / "plain")
        assert approximate.survived is not None


def test_a_copy_that_is_not_the_bases_is_used_and_named(tmp_path: Path) -> None:
    """As PEFT uses it; but it may mean another base."""
    base = save(make("llama"), tmp_path / "base")
    other = perturb(make("llama"), where=lambda name: "embed_tokens" in name)
    adapter = write_adapter(other, LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "adapter")
    report = surgery.merge(base, adapter, output=tmp_path / "merged")
    assert report.replaced == (EMBEDDING,)
    assert any(f"a copy of '{EMBEDDING}' that is not {base}'s" in note for note in report.notes)


def test_a_weight_that_part_of_an_adapter_ignores_is_noted(tmp_path: Path) -> None:
    model = make("llama")
    base = save(model, tmp_path / "base")
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "use_dora": True}
    adapter = write_adapter(model, LoraConfig(r=4, **settings), tmp_path / "adapter")
    assert surgery.merge(base, adapter, output=tmp_path / "whole").notes == ()
    notes = surgery.merge(base, (adapter, 0.5), output=tmp_path / "half").notes
    assert notes == (
        f"The magnitudes of a DoRA have no weight: those of {adapter} apply in full.",
        f"What {adapter} stores whole (1 tensors) has no weight and is taken as it is.",
    )


# Resized vocabularies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["embed_tokens", "lm_head", "q_proj"]),
        ("llama-tied", ["embed_tokens"]),
        ("llama-tied", ["lm_head"]),
        ("llama-tied", ["embed_tokens", "lm_head", "q_proj"]),
    ],
    ids=str,
)
def test_factors_on_a_resized_vocabulary(family: str, targets: list[str], tmp_path: Path) -> None:
    """The adapter's own matrix has the rows that its factors are for; the merge is what PEFT computes unmerged."""
    base = save(make(family), tmp_path / "base")
    grown = make(family)
    grown.resize_token_embeddings(101, mean_resizing=False)
    config = LoraConfig(r=4, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = attach(grown, config).eval()
        wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    surgery.merge(base, tmp_path / "adapter", output=tmp_path / "merged", reversible=True)
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 101
    with torch.no_grad():
        expected = wrapped(**inputs(merged)).logits
    torch.testing.assert_close(logits(merged), expected, atol=2e-6, rtol=1e-5)
    surgery.subtract(tmp_path / "merged", output=tmp_path / "back")
    assert different(stored(tmp_path / "back"), stored(base)) == []


# Replaced rows --------------------------------------------------------------------------------------------------------


def with_rows(folder: Path, indices: list[int], values: torch.Tensor) -> Path:
    """An adapter that replaces rows of the embedding, by hand."""
    folder.mkdir()
    save_file(
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": values},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "trainable_token_indices": {"embed_tokens": indices}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("indices", "values", "part"),
    [
        ([7000], torch.ones(1, 32), r"are rows \[7000\], expected different ones below 96"),
        ([3, 3], torch.ones(2, 32), r"are rows \[3, 3\], expected different ones below 96"),
        ([1], torch.ones(2, 32), r"are F32 \[2, 32\], expected \[1, 32\]: as many as trainable_token_indices names"),
        ([1, 2, 3], torch.ones(2, 32), r"are F32 \[2, 32\], expected \[3, 32\]"),
        ([1, 2], torch.ones(2, 16), r"are F32 \[2, 16\], expected \[2, 32\]"),
        ([1, 2], torch.ones(2, 32, dtype=torch.int64), r"are I64 \[2, 32\]"),
    ],
    ids=["out of range", "twice", "too many", "too few", "too narrow", "integers"],
)
def test_rows_that_do_not_fit(indices: list[int], values: torch.Tensor, part: str, tmp_path: Path) -> None:
    base = save(make("llama"), tmp_path / "base")
    adapter = with_rows(tmp_path / "adapter", indices, values)
    with pytest.raises(MismatchError, match=rf"the replaced rows of 'model\.embed_tokens' {part}"):
        surgery.merge(base, adapter, output=tmp_path / "merged")


def test_rows_after_factors_are_refused(tmp_path: Path) -> None:
    """In PEFT the later rows win over the earlier sum; in one pass they could not."""
    model = make("llama")
    base = save(model, tmp_path / "base")
    rows = with_rows(tmp_path / "rows", [1, 5], torch.ones(2, 32))
    config = LoraConfig(r=4, target_modules=["embed_tokens"])
    factors = without_copies(write_adapter(model, config, tmp_path / "factors"))
    with pytest.raises(MismatchError, match="merge one after the other, in two commands"):
        surgery.merge(base, factors, rows, output=tmp_path / "merged")
    surgery.merge(base, rows, factors, output=tmp_path / "merged")


def test_an_approximate_switch_keeps_the_new_rows(tmp_path: Path) -> None:
    """The old adapter had factors on the embedding that the new one replaces rows of."""
    model = make("llama")
    base = save(model, tmp_path / "base")
    old = without_copies(write_adapter(model, LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "old"))
    new = with_rows(tmp_path / "new", [1, 5, 7], torch.full((3, 32), 0.5))
    surgery.merge(base, old, output=tmp_path / "merged")
    surgery.switch(tmp_path / "merged", old, new, output=tmp_path / "switched")
    expected = stored(base)[EMBEDDING]
    expected[[1, 5, 7]] = 0.5
    torch.testing.assert_close(stored(tmp_path / "switched")[EMBEDDING], expected, atol=1e-7, rtol=0)


NOT_NUMBERS: dict[str, Callable[[Path, Path], tuple[Path, str]]] = {
    "rows": lambda base, folder: (with_rows(folder, [1], torch.full((1, 32), math.nan)), "trainable_tokens_delta"),
    "a saved module": lambda base, folder: (saved_norm(folder, math.inf), "model.norm.weight"),
}


def saved_norm(folder: Path, value: float) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    write_adapter(make("llama"), config, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.norm.weight"][0] = value
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize("case", NOT_NUMBERS)
def test_nonfinite_values_of_what_is_taken_whole_are_named(case: str, tmp_path: Path) -> None:
    base = save(make("llama"), tmp_path / "base")
    adapter, name = NOT_NUMBERS[case](base, tmp_path / "adapter")
    with pytest.raises(NonFiniteError, match=rf"{name}' in .* holds NaN or infinity"):
        surgery.merge(base, adapter, output=tmp_path / "merged")
    surgery.merge(base, adapter, output=tmp_path / "merged", allow_nonfinite=True)


# What subtracting knows -----------------------------------------------------------------------------------------------


def test_the_weight_must_be_that_of_the_merge(tmp_path: Path) -> None:
    model = make("llama")
    base = save(model, tmp_path / "base")
    adapter = write_adapter(model, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    surgery.merge(base, (adapter, 0.5), output=tmp_path / "merged", reversible=True)
    with pytest.raises(MismatchError, match=r"was merged with weight 0\.5, not 0\.25; leave the weight out\."):
        surgery.subtract(tmp_path / "merged", (adapter, 0.25), output=tmp_path / "back")
    surgery.subtract(tmp_path / "merged", (adapter, 0.5), output=tmp_path / "same")
    surgery.subtract(tmp_path / "merged", adapter, output=tmp_path / "back")
    shutil.rmtree(tmp_path / "merged" / "undo")
    with pytest.raises(MismatchError, match=r"with weight 0\.5, not 1; write .*adapter=0\.5\."):
        surgery.subtract(tmp_path / "merged", adapter, output=tmp_path / "rest")


def test_an_adapter_that_was_not_merged_is_refused_or_noted(tmp_path: Path) -> None:
    """By the hashes in surgery.json; without one the report says that nothing shows it."""
    model = make("llama")
    base = save(model, tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"])
    one, two = (write_adapter(model, config, tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    surgery.merge(base, one, output=tmp_path / "merged")
    with pytest.raises(MismatchError, match=r"two is not what was merged into .*merged: one; name that\."):
        surgery.subtract(tmp_path / "merged", two, output=tmp_path / "rest")
    (tmp_path / "merged" / "surgery.json").unlink()
    report = surgery.subtract(tmp_path / "merged", two, output=tmp_path / "rest")
    assert report.notes[0].startswith(f"Nothing shows that {two} was ever merged into {tmp_path / 'merged'};")


def test_an_embedding_that_was_replaced_whole_needs_a_record(tmp_path: Path) -> None:
    base = save(make("llama"), tmp_path / "base")
    other = perturb(make("llama"), where=lambda name: not is_linear(name))
    adapter = write_adapter(other, LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "adapter")
    surgery.merge(base, adapter, output=tmp_path / "merged")
    with pytest.raises(UnsupportedError, match="was replaced whole, and only an undo record holds"):
        surgery.subtract(tmp_path / "merged", adapter, output=tmp_path / "back")

"""Whose base is it: hashes on record decide, and merge, subtract and extract act on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.belonging import judge, recorded_hashes, recorded_outputs, weights_id
from surgery.errors import MismatchError
from tests.models import make, perturb, save
from tests.tools import read_json, unequal


@given(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from("12")),
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from("12")),
)
def test_each_tensor_is_equal_different_or_unknown(recorded: dict[str, str], found: dict[str, str]) -> None:
    verdict = judge(recorded, "abc", found.get, "base")
    assert sorted((*verdict.equal, *verdict.different, *verdict.unknown)) == ["a", "b", "c"]
    both = [name for name in "abc" if name in recorded and name in found]
    assert verdict.refuted == any(recorded[name] != found[name] for name in both)
    assert verdict.proved == (len(both) == 3 and not verdict.refuted)


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        {"inputs": "x"},
        {"inputs": [{"role": "base"}]},
        {"inputs": [{"role": "base", "tensors": {"a": {"blake3": 3}, "b": "x"}}]},
        {"inputs": [{"role": "base", "tensors": {"a": {"blake3": "1"}}}] * 2},
    ],
)
def test_a_record_that_says_nothing_is_no_evidence(content: dict[str, object] | None) -> None:
    assert recorded_hashes(content, "base")[0] == {}
    assert recorded_outputs({"outputs": 3}) == {}


def test_one_hash_stands_for_a_set_of_tensors() -> None:
    assert weights_id({"a": "1", "b": "2"}) == weights_id({"b": "2", "a": "1"})
    assert len({weights_id(h) for h in ({}, {"a": "1"}, {"a": "2"}, {"b": "1"}, {"a": "1", "b": ""})}) == 5


@pytest.fixture
def pair(here: Path) -> Path:
    """A base, a fine-tune with its adapter, and a sibling of the base."""
    model = make("llama")
    save(model, here / "base", torch.bfloat16)
    save(perturb(model, rank=2, scale=0.3), here / "tuned", torch.bfloat16)
    save(make("llama", seed=5), here / "sibling", torch.bfloat16)
    surgery.extract("base", "tuned", output="adapter", rank=2, device="cpu")
    return here


def test_merge_refuses_another_base(pair: Path) -> None:
    with pytest.raises(MismatchError) as error:
        surgery.merge("sibling", "adapter", output="merged")
    assert str(error.value).startswith("adapter was made for another base than sibling: tensor 'model.layers.")
    assert str(error.value).endswith(
        " is not the one of base that its surgery.json has on record; --any-base takes it all the same."
    )
    assert not (pair / "merged").exists()
    surgery.merge("sibling", "adapter", output="merged", any_base=True)


def test_merge_refuses_another_base_that_a_look_at_some_tensors_takes_for_the_right_one(pair: Path) -> None:
    """One bit of the tensor that a glance would leave out; seen when all has been read, before anything appears."""
    from safetensors.torch import load_file, save_file

    tensors = load_file("base/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int16)[-1, -1] ^= 1
    save(make("llama"), pair / "close", torch.bfloat16)
    save_file(tensors, "close/model.safetensors", {"format": "pt"})
    for hashed in (True, False):
        if hashed:
            with pytest.raises(
                MismatchError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is not the one of"
            ):
                surgery.merge("close", "adapter", output="merged")
            assert not (pair / "merged").exists()
            assert not list(pair.glob(".*"))
        else:  # without hashing, the glance is all there is
            surgery.merge("close", "adapter", output="merged", hash=False)


def test_merge_takes_its_own_base_and_what_was_merged_from_it(pair: Path) -> None:
    surgery.merge("base", "adapter", output="once")
    surgery.merge("once", "adapter", output="twice")


def test_merge_takes_an_adapter_without_a_record(pair: Path) -> None:
    (pair / "adapter" / "surgery.json").unlink()
    surgery.merge("sibling", "adapter", output="merged")


def test_switch_and_subtract_still_restore(pair: Path) -> None:
    surgery.merge("base", "adapter", output="merged", reversible=True)
    assert surgery.subtract("merged", output="again").notes == ()
    assert unequal(pair / "base", pair / "again") == ["surgery.json"]


def test_extract_says_that_the_fine_tune_has_another_base(pair: Path) -> None:
    surgery.merge("base", "adapter", output="merged")
    assert surgery.extract("base", "merged", output="one", rank=1, device="cpu").notes == ()
    (note,) = surgery.extract("tuned", "merged", output="two", rank=1, device="cpu", any_base=True).notes
    assert note.startswith("merged was made from another base than tuned: tensor 'model.")
    content = read_json(pair / "merged" / "surgery.json")
    content["inputs"] = []
    (pair / "merged" / "surgery.json").write_text(json.dumps(content))
    assert surgery.extract("tuned", "merged", output="three", rank=1, device="cpu", any_base=True).notes == ()

"""Whether an adapter fits: what PEFT made for a model fits it, by the shapes in the index and by headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import surgery
from surgery.folder import LocalFolder, Overlay
from surgery.hub.examining import examine
from surgery.hub.fits import check_fit
from tests.hub.test_examining import CONFIGS
from tests.models import make, save
from tests.peft_tools import write_adapter


def shapes(folder: Path) -> set[str]:
    found: Any = examine(LocalFolder(folder), check=False).facts["shapes"]
    return set(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_made_for_a_model_fits_it(name: str, tmp_path: Path) -> None:
    family, settings = CONFIGS[name]
    base = save(make(family), tmp_path / "base")
    adapter = write_adapter(make(family), LoraConfig(r=4, **settings), tmp_path / "adapter")
    assert shapes(adapter) <= shapes(base)
    found = check_fit(LocalFolder(adapter), LocalFolder(base))
    assert (found.fits, found.by, found.equal) == ("yes", "shape", 0)
    assert found.changed > 0
    other = save(make("llama" if family == "gpt2" else "gpt2"), tmp_path / "other")
    assert check_fit(LocalFolder(adapter), LocalFolder(other)).fits == "no"


@pytest.fixture
def extracted(tmp_path: Path) -> Path:
    base = save(make("llama"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tuned = save(make("llama"), tmp_path / "tuned")
    changed = {name: tensor * 1.01 if "proj" in name else tensor for name, tensor in tensors.items()}
    save_file(changed, tuned / "model.safetensors", {"format": "pt"})
    surgery.extract(base, tuned, rank=2, output=tmp_path / "extracted")
    return tmp_path / "extracted"


def test_one_tensor_that_is_another_refutes(extracted: Path) -> None:
    """Also where hashes are known for that one alone; and no data of the base are read where they are known."""
    base = extracted.parent / "base"
    hashes = dict.fromkeys(load_file(base / "model.safetensors"), "0" * 64)
    found = check_fit(LocalFolder(extracted), LocalFolder(base), lambda _: hashes)
    assert (found.fits, found.by, found.equal) == ("yes", "shape", 0)
    assert found.different == found.changed
    one = {"model.layers.1.mlp.up_proj.weight": "0" * 64}
    found = check_fit(LocalFolder(extracted), LocalFolder(base), lambda _: one)
    assert (found.by, found.different) == ("shape", 1)
    assert "'model.layers.1.mlp.up_proj.weight' first" in found.reasons[0]


def test_some_hashes_prove_nothing(extracted: Path) -> None:
    """Four tensors are looked at, of fourteen; all of them are right, and ten may be others."""
    found = check_fit(LocalFolder(extracted), LocalFolder(extracted.parent / "base"))
    assert (found.fits, found.by, found.changed, found.equal) == ("yes", "shape", 14, 4)
    assert found.reasons == (
        "All 14 tensors that it changes have the right shape; 4 of them are those it was made for, and of the others "
        "the hashes are not known.",
    )


def test_a_base_cannot_vouch_for_itself(extracted: Path) -> None:
    """What the surgery.json of a base says of its own tensors is no proof."""
    surgery.merge(extracted.parent / "base", extracted, output=extracted.parent / "merged")
    claims = (extracted.parent / "merged" / "surgery.json").read_bytes()
    base = Overlay(LocalFolder(extracted.parent / "base"), {"surgery.json": claims})
    assert check_fit(LocalFolder(extracted), base).by == "shape"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b'{"peft_type": "IA3"}', "is an adapter of type 'IA3', expected 'LORA'; merge it with PEFT."),
        (b'{"peft_type": "LORA", "r": "many"}', "'r' in adapter_config.json is 'many', expected a positive integer."),
        (b"{", "is not valid JSON"),
    ],
)
def test_what_cannot_be_told(extracted: Path, config: bytes, reason: str) -> None:
    adapter = Overlay(LocalFolder(extracted), {"adapter_config.json": config})
    found = check_fit(adapter, LocalFolder(extracted.parent / "base"))
    assert (found.fits, found.by) == ("unknown", None)
    assert reason in found.reasons[0]


def test_patterns_without_end_are_not_tried(extracted: Path) -> None:
    import json

    config = json.loads((extracted / "adapter_config.json").read_text())
    config["rank_pattern"] = {f"module_{number}": 2 for number in range(80_000)}
    adapter = Overlay(LocalFolder(extracted), {"adapter_config.json": json.dumps(config).encode()})
    found = check_fit(adapter, LocalFolder(extracted.parent / "base"))
    assert found.reasons == (f"{extracted} has 80000 patterns for 14 modules, too many to try.",)

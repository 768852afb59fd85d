"""The table of families that can be upcycled, against transformers and against the code that travels."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from surgery.families import family_of
from surgery.moe import modeling_upcycled
from surgery.moe_families import MODELING_FILE, ROUTED_LORA_FILE, UPCYCLED_FAMILIES
from tests import models
from tests.moe_tools import VARIANTS, dense

NAMES = sorted(UPCYCLED_FAMILIES)


def test_table_and_code_know_the_same_families_and_stacks() -> None:
    assert Path(modeling_upcycled.__file__).name == MODELING_FILE
    table = {name: list(family.stacks) for name, family in UPCYCLED_FAMILIES.items()}
    assert table == {name: list(stacks) for name, stacks in modeling_upcycled.FAMILIES.items() if name in NAMES}
    assert sorted(modeling_upcycled.FAMILIES) == NAMES
    assert {VARIANTS[variant][1] for variant in VARIANTS} == {f.config_class for f in UPCYCLED_FAMILIES.values()}


@pytest.mark.parametrize("name", NAMES)
def test_auto_classes_are_those_of_transformers(name: str) -> None:
    family = UPCYCLED_FAMILIES[name]
    assert type(transformers.AutoConfig.for_model(name)).__name__ == family.config_class
    mappings = {
        auto: getattr(transformers, auto)._model_mapping._model_mapping
        for auto in dir(transformers)
        if auto.startswith("AutoModel") and getattr(getattr(transformers, auto), "_model_mapping", None) is not None
    }
    known = {auto: mapping[name] for auto, mapping in mappings.items() if name in mapping}
    known.pop("AutoModelForDecision", None)  # one head on a particular Qwen2 checkpoint
    assert family.auto_classes == known
    base = getattr(transformers, family.auto_classes["AutoModel"])
    assert family.base_prefix == base.base_model_prefix


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_leaves_are_all_of_the_mlp_and_nothing_else(variant: str, tmp_path: Path) -> None:
    model = dense(variant)
    family, layouts = UPCYCLED_FAMILIES[model.config.model_type], modeling_upcycled.FAMILIES[model.config.model_type]
    models.save(model, tmp_path / "dense")
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no dict
    for name, stack in family.stacks.items():
        layer = model.base_model.get_submodule(layouts[name].layers)[1]
        mlp = layer.get_submodule(layouts[name].mlp)
        expected = list(mlp.parameters()) + (list(layer.output.dense.parameters()) if "ert" in variant else [])
        prefix = rf"(?:{family.base_prefix}\.)?" + re.escape(stack.layer.format(layer=1))
        found = {
            stored: leaf
            for leaf in stack.leaves
            for stored in shapes
            if re.fullmatch(rf"{prefix}\.{re.escape(leaf.dense)}\.(weight|bias)", stored)
        }
        assert sorted(map(tuple, (shapes[stored] for stored in found))) == sorted(tuple(p.shape) for p in expected)
        inner = model.config.to_dict().get("d_ff") or getattr(model.config, "intermediate_size", 4 * 32)
        for stored, leaf in found.items():
            if stored.endswith(".weight"):
                widens = (shapes[stored] == [inner, 32]) != leaf.transposed
                assert widens == (leaf.role in ("in", "gate", "up")), stored
        assert getattr(model.config, stack.depth) == 2
        assert stack.causal == (name == "decoder")


@pytest.mark.parametrize("name", NAMES)
def test_classes_have_the_base_prefix_or_not(name: str) -> None:
    """In memory, of every class of the family: where the router of a layer is."""
    family, layouts = UPCYCLED_FAMILIES[name], modeling_upcycled.FAMILIES[name]
    settings = next(VARIANTS[variant][2] for variant in VARIANTS if VARIANTS[variant][1] == family.config_class)
    config = getattr(transformers, family.config_class)(**{**settings, "num_labels": 2})
    stack, table = next(iter(layouts)), next(iter(family.stacks.values()))
    for class_name in set(family.auto_classes.values()):
        with torch.device("meta"):
            model = getattr(transformers, class_name)(config)
        stored = f"{family.prefix_of(class_name)}{table.layer.format(layer=1)}"
        model.get_submodule(f"{family_of(name).in_memory(stored)}.{layouts[stack].mlp}")
    assert family.prefix_of("") == ""  # a file without a class in its config is taken for the base model


def test_the_small_file_has_one_name() -> None:
    assert modeling_upcycled.ROUTED_LORA_FILE == ROUTED_LORA_FILE


def test_routed_lora_is_for_mlps_that_are_one_module() -> None:
    assert [name for name in NAMES if not UPCYCLED_FAMILIES[name].takes_lora] == ["bert", "roberta"]


def test_the_table_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, surgery.moe_families; print({'torch', 'transformers', 'surgery.moe'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

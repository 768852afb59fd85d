"""The table of families against transformers itself: names in memory, transposed weights, stacked experts, prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import transformers_weight_conversion as peft_weights
from transformers import CONFIG_MAPPING, MODEL_MAPPING
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from surgery import families
from surgery.checkpoint import open_checkpoint
from surgery.sites import Kind, find_sites, memory_names
from tests.models import FAMILIES, make, save


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_names_map_to_the_names_in_memory(family: str, tmp_path: Path) -> None:
    """Every stored parameter has the name that the model's own state dict has, experts included."""
    model = make(family)
    checkpoint = open_checkpoint(save(model, tmp_path / "m"))
    in_memory = {name: tuple(p.shape) for name, p in model.named_parameters()}
    sites = find_sites(checkpoint)
    stacked = {site.name for site in sites.values() if site.kind is Kind.PARAMETER and len(site.matrices) > 1}
    used = {tensor.name for name in stacked for tensor in sites[name].tensors}
    names = {name for stored, name in memory_names(checkpoint).items() if stored not in used} | stacked
    tied = set(in_memory) - names
    assert names <= {*in_memory, *(name for name, _ in model.named_buffers())}
    assert not tied, f"not found: {sorted(tied)}"


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_have_the_shapes_of_the_layers(family: str, tmp_path: Path) -> None:
    """A linear layer is (out, in) whatever way it is stored; experts have as many matrices as the model has experts."""
    model = make(family)
    checkpoint = open_checkpoint(save(model, tmp_path / "m"))
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for site in find_sites(checkpoint).values():
        if site.kind is Kind.PARAMETER:
            shape = tuple(parameters[site.name].shape)
            transposed = getattr(modules[site.module], "is_transposed", False)
            expected = (site.in_features, site.out_features) if transposed else (site.out_features, site.in_features)
            assert shape == (expected if len(shape) == 2 else (len(site.matrices), *expected)), site.name
            continue
        module = modules[site.name]
        if isinstance(module, Conv1D):
            assert (site.out_features, site.in_features) == (module.nf, module.nx)
            assert site.matrices[0][0].transposed
        elif isinstance(module, torch.nn.Linear):
            assert (site.out_features, site.in_features) == (module.out_features, module.in_features)
            assert not site.matrices[0][0].transposed
        elif isinstance(module, torch.nn.Embedding):
            assert site.kind is Kind.EMBEDDING
        else:
            assert site.kind is Kind.CONV
            assert isinstance(module, torch.nn.Conv2d)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_are_told_from_embeddings_and_heads(family: str, tmp_path: Path) -> None:
    """What PEFT's `all-linear` would take, and the experts and routers that it would not."""
    from surgery.sites import select

    model = make(family)
    checkpoint = open_checkpoint(save(model, tmp_path / "m"))
    chosen, unmatched = select(find_sites(checkpoint), "all-linear")
    assert not unmatched
    linear = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    heads = {
        name for name, m in model.named_modules() if m is head or name.split(".")[0].endswith(("classifier", "score"))
    }
    assert {site.name for site in chosen.values() if site.kind is Kind.LINEAR} == linear - heads


@pytest.mark.parametrize("model_type", sorted(t for family in families.FAMILIES for t in family.model_types))
def test_base_prefix(model_type: str) -> None:
    """The prefix is the one under which the task classes of that type keep their base model."""
    found = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    base: Any = found[0] if isinstance(found, tuple) else found
    assert families.family_of(model_type).base_prefix == base.base_model_prefix


@pytest.mark.parametrize(
    "model_type", sorted(t for family in families.FAMILIES if family.experts for t in family.model_types)
)
def test_experts_are_stacked_as_transformers_stacks_them(model_type: str) -> None:
    """The projections that make up each fused parameter, and their order, are those of transformers' own conversion."""
    experts = families.family_of(model_type).experts
    assert experts is not None
    conversion = get_checkpoint_conversion_mapping(model_type) or []
    fused = {
        str(entry.target_patterns[0]).rpartition(".")[2]: tuple(str(p).split(".")[-2] for p in entry.source_patterns)
        for entry in conversion
        if isinstance(entry, WeightConverter) and "experts" in str(entry.target_patterns[0])
    }
    assert dict(experts.fused) == fused


@pytest.mark.parametrize(
    "model_type", sorted(t for family in families.FAMILIES if family.experts for t in family.model_types)
)
def test_what_peft_takes_for_experts(model_type: str) -> None:
    """The names that PEFT renames in a config, wherever they stand in the model: what is called so and is no expert
    can't be targeted as a module.
    """
    patterns = vars(peft_weights)["_MODEL_TO_CONVERSION_PATTERN"]
    mapped = peft_weights._MOE_TARGET_MODULE_MAPPING.get(patterns.get(model_type, ""), {})
    # w1, w2 and w3 are experts' names only; the router is a parameter in any case.
    expected = {name for name in mapped if name.endswith("_proj")}
    assert families.family_of(model_type).taken_for_experts == expected

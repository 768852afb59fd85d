"""Sites without a table, the words of --targets, and pairing two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.checkpoint import open_checkpoint
from surgery.families import part_of
from surgery.names import expert_of, layer_of, natural_key
from surgery.pairing import pair
from surgery.sites import Kind, find_sites, select
from tests.models import FAMILIES, invent, make, save


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), "attention"),
        ("decoder.block.1.layer.1.EncDecAttention.k.weight", (8, 8), "attention"),
        ("bert.encoder.layer.0.attention.output.dense.weight", (8, 8), "attention"),
        ("bert.encoder.layer.0.output.dense.weight", (8, 8), "mlp"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", (8, 8), "mlp"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", (8, 8), "experts"),
        ("model.layers.0.mlp.gate.weight", (4, 8), "router"),
        ("model.layers.0.mlp.gate_proj.weight", (4, 8), "mlp"),
        ("model.embed_tokens.weight", (96, 8), "embeddings"),
        ("transformer.wpe.weight", (96, 8), "embeddings"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (8, 8), "embeddings"),
        ("embed_out.weight", (96, 8), "head"),
        ("lm_head.weight", (96, 8), "head"),
        ("classifier.out_proj.weight", (3, 8), "head"),
        ("stem.weight", (96, 8), "head"),  # outside the layers, as wide as the vocabulary
        ("model.layers.0.input_layernorm.weight", (8,), "norms"),
        ("h.0.ln_1.bias", (8,), "biases"),
        ("model.layers.0.self_attn.q_proj.bias", (8,), "biases"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 8), "biases"),
        ("vit.embeddings.patch_embeddings.projection.weight", (8, 3, 4, 4), "convolutions"),
        ("model.encoder.conv1.weight", (8, 8, 3), "convolutions"),
        ("net.3.weight", (8, 8), "other"),
    ],
)
def test_parts_are_told_by_name_and_shape(name: str, shape: tuple[int, ...], expected: str) -> None:
    assert part_of(name, shape, 96) == expected


def test_numbers_in_names() -> None:
    assert layer_of("model.layers.12.mlp.experts.7.w1.weight") == 12
    assert expert_of("model.layers.12.mlp.experts.7.w1.weight") == 7
    assert expert_of("encoder.layers.1.ffn.experts.expert_3.fc1.weight") == 3
    assert layer_of("lm_head.weight") is None
    assert sorted(["a.10.b", "a.9.b", "a.b"], key=natural_key) == ["a.9.b", "a.10.b", "a.b"]
    for names in (["a.1", "a.01"], ["a.01", "a.1"]):  # one number, two names
        assert sorted(names, key=natural_key) == ["a.01", "a.1"]


def test_an_invented_architecture_has_sites(tmp_path: Path) -> None:
    """Matrices are linear, a stack of three dimensions holds experts, vectors and integers are no sites."""
    sites = find_sites(open_checkpoint(invent(tmp_path / "m")))
    assert sites["trunk.stage.0.mixer.into"].kind is Kind.LINEAR
    stack = sites["trunk.stage.0.expert_bank.experts"]
    assert (stack.kind, len(stack.matrices), stack.out_features, stack.in_features) == (Kind.PARAMETER, 3, 24, 20)
    chosen, _ = select(sites, "all-linear")
    assert {name.rpartition(".")[2] for name in chosen} == {"into", "out", "widen", "narrow", "experts"}


def test_uneven_experts_stand_for_themselves(tmp_path: Path) -> None:
    """Experts of different shapes, or with one missing, cannot be stacked; each projection is a layer of its own."""
    path = save(make("mixtral"), tmp_path / "m") / "model.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(path)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    save_file(tensors, path)
    sites = find_sites(open_checkpoint(path.parent))
    assert "model.layers.0.mlp.experts.gate_up_proj" in sites
    assert "model.layers.1.mlp.experts.gate_up_proj" not in sites
    assert sites["model.layers.1.mlp.experts.0.w1"].kind is Kind.LINEAR
    assert "model.layers.1.mlp.experts.down_proj" in sites


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_paired_with_itself(family: str, tmp_path: Path) -> None:
    """A checkpoint and its copy in shards pair completely, every tensor once."""
    left = open_checkpoint(save(make(family), tmp_path / "left"))
    right = open_checkpoint(save(make(family), tmp_path / "right", max_shard_size="20KB"))
    found = pair(left, right)
    assert not found.left_only
    assert not found.right_only
    in_sites = [tensor.name for site in found.sites.values() for tensor in site.right.tensors if not tensor.is_slice]
    stacks = {tensor.name for site in found.sites.values() for tensor in site.right.tensors if tensor.is_slice}
    others = [one.right.name for one in found.tensors.values()]
    assert sorted([*in_sites, *stacks, *others]) == sorted(right.tensors)


def test_inspect_describes_every_family(tmp_path: Path) -> None:
    """Parameters by part add up to the whole, experts and tied heads are seen."""
    for family in FAMILIES:
        model = make(family)
        report: dict[str, Any] = surgery.inspect(save(model, tmp_path / family, torch.bfloat16), tensors=True).as_dict()
        parts, total = report["parts"], report["total"]
        assert sum(share["parameters"] for share in parts.values()) == total["parameters"]
        assert report["in_table"]
        assert (report["experts"] is not None) == ("experts" in parts), family
        assert len(report["tensors"]) == total["tensors"]
    experts = surgery.inspect(tmp_path / "mixtral").as_dict()["experts"]
    assert experts == {"experts": 4, "top_k": 2, "layers": (0, 1), "stored": "per expert"}
    stacked: dict[str, Any] = surgery.inspect(tmp_path / "granitemoe").as_dict()
    assert stacked["experts"]["stored"] == "stacked"
    assert surgery.inspect(tmp_path / "llama-tied").as_dict()["tied_head"] == "model.embed_tokens.weight"
    assert not surgery.inspect(invent(tmp_path / "new")).as_dict()["in_table"]

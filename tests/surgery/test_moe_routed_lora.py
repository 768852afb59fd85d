"""Routed LoRA experts over one frozen MLP: exact at the start, small on disk, loaded onto a base in four ways."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgery import moe
from surgery.moe import modeling_upcycled
from surgery.moe.modeling_upcycled import ROUTED_LORA_FILE, routed_lora_tensors
from surgery.moe_families import UPCYCLED_FAMILIES
from tests import models
from tests.moe_tools import EXPERTS, VARIANTS, auto_class, dense, expert_choice, load, top_k

RANK = 2
LORA: dict[str, Any] = {"kind": "lora", "rank": RANK, "alpha": 6.0}
SUPPORTED = sorted(name for name in VARIANTS if "ert" not in name)


def mixed(variant: str, folder: Path, entry: Any = top_k, noise: float = 0.0) -> Path:
    """Save a dense model at `base` and a folder of routed LoRA experts beside it, made from headers as a tool would."""
    model = dense(variant)
    models.save(model, folder / "base")
    family = UPCYCLED_FAMILIES[model.config.model_type]
    stacks = {stack: entry([0, 1], **LORA) for stack in family.stacks}
    tensors, generator = {}, torch.Generator().manual_seed(5)
    for name, layout in modeling_upcycled.FAMILIES[model.config.model_type].items():
        layers = f"{layout.layers}"
        for number in stacks[name]["layers"]:
            mlp = model.base_model.get_submodule(f"{layers}.{number}.{layout.mlp}")
            place = next(n for n, module in model.named_modules() if module is mlp)
            tensors[f"{place}.router.weight"] = torch.randn(EXPERTS, model.config.hidden_size, generator=generator) / 2
            for leaf, module in mlp.named_modules():
                if not hasattr(module, "weight"):
                    continue
                rows, columns = (
                    module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
                )
                for expert in range(EXPERTS):
                    a, b = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)
                    tensors[f"{place}.experts.{expert}.{leaf}.lora_A.weight"] = a
                    tensors[f"{place}.experts.{expert}.{leaf}.lora_B.weight"] = noise * b
    config = json.loads((folder / "base" / "config.json").read_text())
    config |= {
        "model_type": family.upcycled_type,
        "architectures": ["Upcycled" + config["architectures"][0]],
        "auto_map": family.auto_map(),
        "moe_stacks": stacks,
        "base_model_name_or_path": "../base",
    }
    (folder / "lora").mkdir()
    (folder / "lora" / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "lora" / ROUTED_LORA_FILE, {"format": "pt"})
    shutil.copy(modeling_upcycled.__file__, folder / "lora")
    return folder / "lora"


@pytest.mark.parametrize("variant", SUPPORTED)
def test_it_starts_as_the_dense_model(variant: str, tmp_path: Path) -> None:
    model = load(variant, mixed(variant, tmp_path))
    plain = models.logits(dense(variant))
    assert float((models.logits(model) - plain).abs().max() / plain.abs().max()) < 1e-6
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in dense(variant).state_dict().items())


@pytest.mark.parametrize("variant", ["llama", "gpt2", "t5-gated", "vit"])
def test_an_expert_is_the_mlp_with_its_updates_merged(variant: str, tmp_path: Path) -> None:
    """Against copies of the MLP with B A added to the weights, and the same routers."""
    folder = mixed(variant, tmp_path, noise=0.1)
    model, tensors = load(variant, folder), load_file(folder / ROUTED_LORA_FILE)
    config = copy.deepcopy(model.config)
    for entry in config.moe_stacks.values():
        entry.update(kind="copy")
    merged = type(model)(config).eval()
    state = merged.state_dict()
    for name in state:
        if ".experts." in name:
            place, _, leaf = name.partition(".experts.")
            leaf = leaf.split(".", 1)[1]
            weight = dense(variant).state_dict()[f"{place}.{leaf}"].double()
            if name.endswith(".weight"):
                module = name.removesuffix(".weight")
                a, b = (tensors[f"{module}.lora_{which}.weight"].double() for which in "AB")
                update = 6.0 / RANK * (b @ a)
                weight = weight + (update.T if variant == "gpt2" else update)
            state[name] = weight.float()
        elif ".router." in name:
            state[name] = tensors[name]
        else:
            state[name] = dense(variant).state_dict()[name]
    merged.load_state_dict(state)
    expected = models.logits(merged)
    torch.testing.assert_close(models.logits(model), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float((expected - models.logits(dense(variant))).abs().max()) > 1e-2


def test_the_four_ways_to_load_agree(tmp_path: Path) -> None:
    folder = mixed("llama", tmp_path, noise=0.1)
    by_name = models.logits(load("llama", folder))
    assert torch.equal(models.logits(moe.load_routed_lora(None, folder).eval()), by_name)
    assert torch.equal(models.logits(moe.load_routed_lora(tmp_path / "base", folder).eval()), by_name)
    base = copy.deepcopy(dense("llama"))
    assert moe.load_routed_lora(base, folder) is base
    assert type(base).__name__ == "UpcycledLlamaForCausalLM"
    assert torch.equal(models.logits(base), by_name)


def test_it_loads_where_this_package_is_not_installed(tmp_path: Path) -> None:
    folder = mixed("gpt2", tmp_path, noise=0.1)
    model = load("gpt2", folder)
    torch.save(models.inputs(model), tmp_path / "inputs.pt")
    code = """
import sys
sys.modules["surgery"] = None
import torch, transformers
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained("lora", trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**torch.load("inputs.pt")).logits, "logits.pt")
"""
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), models.logits(model))


def test_only_routers_and_updates_are_trained_and_saved(tmp_path: Path) -> None:
    folder = mixed("llama", tmp_path, noise=0.01)
    model = load("llama", folder).train()
    ids = torch.arange(10).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            assert (parameter.grad is not None) == (name in routed_lora_tensors(model)), name
    with torch.no_grad():
        for tensor in routed_lora_tensors(model).values():
            tensor += 0.01
    moe.save_routed_lora(model, tmp_path / "trained", "../base")
    assert sorted(path.name for path in (tmp_path / "trained").iterdir()) == [
        "config.json",
        "modeling_upcycled.py",
        ROUTED_LORA_FILE,
    ]
    names = load_file(folder / ROUTED_LORA_FILE).keys()
    assert load_file(tmp_path / "trained" / ROUTED_LORA_FILE).keys() == names
    assert torch.equal(models.logits(load("llama", tmp_path / "trained")), models.logits(model))


def test_saved_whole_it_needs_no_base(tmp_path: Path) -> None:
    """The checkpoint is then the dense one and more tensors."""
    folder = mixed("llama", tmp_path, noise=0.1)
    model = load("llama", folder)
    model.save_pretrained(tmp_path / "whole")
    shutil.rmtree(tmp_path / "base")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert whole.keys() - load_file(folder / ROUTED_LORA_FILE).keys() == dense("llama").state_dict().keys()
    assert torch.equal(models.logits(load("llama", tmp_path / "whole")), models.logits(model))


def test_a_loaded_model_can_be_copied(tmp_path: Path) -> None:
    model = load("llama", mixed("llama", tmp_path, noise=0.1))
    expected, twin = models.logits(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(models.logits(twin), expected)


def test_expert_choice_routes_them_too(tmp_path: Path) -> None:
    model = load("vit", mixed("vit", tmp_path, expert_choice))
    plain = models.logits(dense("vit"))
    assert float((models.logits(model) - plain).abs().max() / plain.abs().max()) < 1e-6


def test_a_base_of_another_class_or_shape_is_refused(tmp_path: Path) -> None:
    folder = mixed("llama", tmp_path)
    sentence = r"^The experts in .* belong to a LlamaForCausalLM, and this model is a MistralForCausalLM\.$"
    with pytest.raises(ValueError, match=sentence):
        moe.load_routed_lora(copy.deepcopy(dense("mistral")), folder)
    tensors = load_file(folder / ROUTED_LORA_FILE)
    tensors.pop("model.layers.0.mlp.router.weight")
    save_file(tensors, folder / ROUTED_LORA_FILE)
    sentence = "1 of its tensors are missing, unknown or of another shape, model.layers.0.mlp.router.weight among them"
    with pytest.raises(ValueError, match=sentence):
        load("llama", folder)


def test_bert_is_refused(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(
        "upcycled_bert", **models._TEXT, moe_stacks={"encoder": top_k([0], **LORA)}
    )
    with pytest.raises(ValueError, match="Routed LoRA experts need an MLP that is one module"):
        transformers.AutoModel.from_config(config)
    assert auto_class("bert") == "AutoModelForSequenceClassification"

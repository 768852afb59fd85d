"""What push refuses, and that what transformers and PEFT write is not refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import surgery
from surgery.folder import LocalFolder
from surgery.hub.examining import examine
from tests.models import FAMILIES, invent, make, save
from tests.peft_tools import write_adapter
from tests.tools import read_json


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_in_order(family: str, tmp_path: Path) -> None:
    """Of every family; a mixture of experts is known for one."""
    found = examine(LocalFolder(save(make(family), tmp_path / "model")))
    assert found.problems == ()
    moe = family in ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe-some-dense", "gpt_oss", "granitemoe")
    assert found.facts["kind"] == ("moe" if moe else "dense")
    assert found.facts["architecture"] == FAMILIES[family][0]
    if moe:
        assert found.facts["experts"] == 4


def test_an_architecture_that_nobody_knows_is_in_order(tmp_path: Path) -> None:
    assert examine(LocalFolder(invent(tmp_path / "model"))).problems == ()


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "regex": ("llama", {"target_modules": r".*\.(q_proj|down_proj)"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "ranks": ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"model.layers.0.self_attn.q_proj": 2}}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "experts": ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saves_is_in_order(name: str, tmp_path: Path) -> None:
    family, settings = CONFIGS[name]
    folder = write_adapter(make(family), LoraConfig(r=4, **settings), tmp_path / "adapter")
    config = read_json(folder / "adapter_config.json") | {"base_model_name_or_path": "lab/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = examine(LocalFolder(folder))
    assert found.problems == ()
    assert found.facts["kind"] == "adapter"
    assert found.facts["base"] == "lab/base"
    assert found.facts["method"] == ("dora" if name == "dora" else "lora")
    if name == "ranks":
        assert found.facts["ranks"] == [2, 4]
        assert found.facts["targets"] == ["q_proj", "v_proj"]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], base_model_name_or_path="lab/base")
    return write_adapter(make("llama"), config, tmp_path / "adapter")


def edit(folder: Path, name: str, **values: object) -> None:
    """Change a config."""
    (folder / name).write_text(json.dumps(read_json(folder / name) | values))


BASE = {"base_model_name_or_path": "lab/base"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"base_model_name_or_path": None}, "adapter_config.json does not name the base (base_model_name_or_path), so nobody can tell what it is for."),
        (BASE | {"r": 8}, "'model.layers.0.self_attn.q_proj' has rank 4, which adapter_config.json does not give it (r is 8)."),
        (BASE | {"target_modules": ["q_proj"]}, "'model.layers.0.self_attn.v_proj' has factors, but target_modules does not name it: PEFT would leave them out."),
        (BASE | {"target_modules": r".*\.q_proj"}, "'model.layers.0.self_attn.v_proj' has factors, but target_modules does not name it: PEFT would leave them out."),
        (BASE | {"lora_alpha": "big"}, "{label}: lora_alpha of 'model.layers.0.self_attn.q_proj' is 'big', expected a number."),
        (BASE | {"init_lora_weights": "pissa"}, "{label} was initialised with PiSSA, which changed the base weights, so it does not fit the base on disk; convert it with PEFT first, by save_pretrained(..., path_initial_model_for_weight_conversion=...)."),
    ],
)  # fmt: skip
def test_an_adapter_that_contradicts_its_config_is_refused(
    adapter: Path, values: dict[str, object], problem: str
) -> None:
    edit(adapter, "adapter_config.json", **values)
    assert problem.replace("{label}", str(adapter)) in examine(LocalFolder(adapter)).problems


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"vocab_size": 100}, "model.embed_tokens.weight has 96 rows, but config.json has vocab_size 100."),
        ({"hidden_size": 64}, "model.embed_tokens.weight has 32 columns, but config.json has hidden_size 64."),
        ({"num_hidden_layers": 3}, "The weights have 2 layers, but config.json has 3."),
    ],
)
def test_a_checkpoint_that_contradicts_its_config_is_refused(
    tmp_path: Path, values: dict[str, object], problem: str
) -> None:
    folder = save(make("llama"), tmp_path / "model")
    edit(folder, "config.json", **values)
    assert examine(LocalFolder(folder)).problems == (problem,)


def test_missing_experts_are_missed(tmp_path: Path) -> None:
    folder = save(make("mixtral"), tmp_path / "model")
    edit(folder, "config.json", num_local_experts=8)
    assert examine(LocalFolder(folder)).problems == ("The weights have 4 experts, but config.json has 8.",)


def test_provenance_of_other_weights_is_refused(adapter: Path, tmp_path: Path) -> None:
    """`surgery.json` that was copied beside weights it does not speak of."""
    base = save(make("llama"), tmp_path / "base")
    surgery.merge(base, adapter, output=tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    tensors["model.extra.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    (problem,) = examine(LocalFolder(tmp_path / "merged")).problems
    assert problem == (
        "surgery.json is not of these weights: tensor 'model.extra.weight' is only in one of the two; remove "
        "surgery.json, or make the output again."
    )


def whole_hash(path: Path) -> str:
    tensors = {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    lines = [f"{name}\0{blake3(tensors[name]).hexdigest()}\n".encode() for name in sorted(tensors)]
    return str(blake3(b"".join(lines)).hexdigest())


def test_lineage_comes_from_provenance(adapter: Path, tmp_path: Path) -> None:
    base = save(make("llama"), tmp_path / "base")
    surgery.merge(base, (adapter, 0.5), output=tmp_path / "merged")
    facts = examine(LocalFolder(tmp_path / "merged")).facts
    assert facts["operation"] == "merge"
    # Independent of the code: BLAKE3 over names and hashes of the bytes that safetensors gives.
    weights = {
        "base": whole_hash(base / "model.safetensors"),
        "adapter": whole_hash(adapter / "adapter_model.safetensors"),
    }
    assert facts["inputs"] == [{"role": name, "source": name, "weights": weights[name]} for name in weights]
    assert facts["base"] == "base"


def other_kind(folder: Path) -> None:
    edit(folder, "adapter_config.json", peft_type="IA3")


def mlx(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "num_layers": 2}))
    (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")


@pytest.mark.parametrize(("change", "method"), [(other_kind, "ia3"), (mlx, "unknown")])
def test_adapters_of_other_kinds_are_pushed_with_a_note(
    adapter: Path, change: Callable[[Path], None], method: str
) -> None:
    change(adapter)
    found = examine(LocalFolder(adapter))
    assert found.problems == ()
    assert found.facts["method"] == method
    assert found.notes == ("Only LoRA adapters in PEFT's format are checked against their config.",)


def test_pickles_are_noted(adapter: Path) -> None:
    (adapter / "optimizer.pt").write_bytes(b"")
    assert examine(LocalFolder(adapter)).notes == ("optimizer.pt may hold pickled code; safetensors cannot.",)

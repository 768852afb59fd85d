"""Reading adapters: everything PEFT writes, and everything that is refused, by name and with the remedy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import surgery
from surgery.adapter import open_adapter
from surgery.errors import FormatError, InputError, MismatchError, UnsupportedError
from surgery.hub.resolve import split_weight
from tests.models import make, save
from tests.peft_tools import different, stored, write_adapter
from tests.surgery.test_merge import adapter_folder

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def plain(tmp_path: Path, rank: int = 2, **config: Any) -> Path:
    tensors = {f"{Q}.lora_A.weight": torch.ones(rank, 32), f"{Q}.lora_B.weight": torch.ones(32, rank)}
    return adapter_folder(tmp_path / "adapter", tensors, **{"r": rank, "lora_alpha": 8, **config})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 4.0),
        ({"use_rslora": True}, 8 / math.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 3}}, 1.5),
        ({"alpha_pattern": {"k_proj": 3, r".*layers\.0\..*": 5, "q_proj": 7}}, 2.5),
        ({"alpha_pattern": {"proj": 3}}, 4.0),
        ({"lora_alpha": 0.5}, 0.25),
    ],
)
def test_scale(config: dict[str, Any], expected: float, tmp_path: Path) -> None:
    """alpha / r or alpha / sqrt(r); the first alpha_pattern that matches whole path components at the end wins."""
    adapter = open_adapter(plain(tmp_path, **config))
    assert adapter.scale(adapter.loras[0].module, 2) == pytest.approx(expected)
    assert open_adapter(tmp_path / "adapter", -0.5).scale(adapter.loras[0].module, 2) == pytest.approx(-0.5 * expected)


def test_ranks_follow_the_tensors_where_peft_lost_the_order(tmp_path: Path) -> None:
    """PEFT sorts rank_pattern on saving and cannot load overlapping patterns; the tensors still say what was meant."""
    base = save(make("llama"), tmp_path / "base")
    adapter = plain(tmp_path, rank=4, r=8, rank_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 4})
    surgery.merge(base, adapter, output=tmp_path / "merged")
    adapter = plain(tmp_path / "wrong", rank=4, r=8, rank_pattern={"q_proj": 2})
    with pytest.raises(MismatchError, match=r"q_proj' has rank 4, which adapter_config.json does not give it"):
        surgery.merge(base, adapter, output=tmp_path / "merged2")


@pytest.mark.parametrize(
    ("init", "name"),
    [
        ("pissa", "PiSSA"),
        ("pissa_niter_4", "PiSSA"),
        ("olora", "OLoRA"),
        ("corda", "CorDA"),
        ("lora_ga", "LoRA-GA"),
        ("loftq", "LoftQ"),
    ],
)
def test_initialisations_that_changed_the_base_are_refused(init: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"was initialised with {name}, which changed the base .*path_initial_model"
    ):
        open_adapter(plain(tmp_path, init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_read(init: object, tmp_path: Path) -> None:
    assert len(open_adapter(plain(tmp_path, init_lora_weights=init)).loras) == 1


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"layer_replication": [[0, 2]]}, "is trained on a base with replicated layers \\(layer_replication\\)"),
        ({"alora_invocation_tokens": [1]}, "is an activated LoRA"),
        ({"kasa_config": {"beta": 1}}, "is a KaSA adapter, which truncates the base weights"),
        ({"use_qalora": True}, "is a QA-LoRA"),
        ({"peft_type": "VERA"}, "is an adapter of type 'VERA', expected 'LORA'; merge it with PEFT"),
    ],
)
def test_other_forward_passes_are_refused(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=sentence):
        open_adapter(plain(tmp_path, **config))


def test_another_method_of_peft_is_refused(tmp_path: Path) -> None:
    """A real IA3 adapter, written by PEFT."""
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(make("llama"), config).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(UnsupportedError, match="is an adapter of type 'IA3', expected 'LORA'"):
        open_adapter(tmp_path / "ia3")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"r": 0}, "'r' in adapter_config.json is 0, expected a positive integer"),
        ({"r": "16"}, "'r' in adapter_config.json is '16', expected a positive integer"),
        ({"r": True}, "'r' in adapter_config.json is True"),
        ({"lora_alpha": "x"}, "lora_alpha of 'model.layers.0.self_attn.q_proj' is 'x', expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha of .* is nan, expected a number"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "nests repetitions or has more than 4, which can take for ever"),
        ({"rank_pattern": {"[": 3}}, r"The pattern '.*' is not a valid regular expression"),
    ],
)
def test_hostile_configs(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    base = save(make("llama"), tmp_path / "base")
    with pytest.raises(FormatError, match=sentence):
        surgery.merge(base, plain(tmp_path, **config), output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_hostile_pattern_ends_at_once(tmp_path: Path) -> None:
    """Patterns that would backtrack for ages are refused before they are tried, ordinary ones are not."""
    from surgery.patterns import compile_pattern

    for pattern in ("(a+)+$", "(a|aa)*$", "(.*)*x", ".*" * 40 + "x", "(?:x+y)+", "a" * 2000, "(a{1,20}){1,30}"):
        with pytest.raises(FormatError):
            compile_pattern(pattern)
    for pattern in (r".*\.gate_up_proj", r"model\.layers\.(1|2)\.q_proj", r"(.*\.)?layers\.\d+\.q_proj"):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({f"{Q}.lora_A.weight": (2, 32)}, "has no lora_B"),
        ({f"{Q}.lora_B.weight": (32, 2)}, "has no lora_A"),
        (
            {f"{Q}.lora_A.weight": (2, 32), f"{Q}.lora_B.weight": (32, 3)},
            r"lora_A of shape \[2, 32\] and lora_B of shape \[32, 3\]",
        ),
        ({f"{Q}.lora_A.weight": (0, 32), f"{Q}.lora_B.weight": (32, 0)}, r"has lora_A of shape \[0, 32\]"),
        ({f"{Q}.lora_A.weight": (2,), f"{Q}.lora_B.weight": (32, 2)}, r"has lora_A of shape \[2\]"),
        ({f"{Q}.lora_E.default": (2, 1)}, "belongs to a LoRA variant that is not known"),
    ],
)  # fmt: skip
def test_damaged_adapters(tensors: dict[str, tuple[int, ...]], sentence: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", {n: torch.zeros(s) for n, s in tensors.items()}, r=2, lora_alpha=2)
    with pytest.raises(InputError, match=sentence):
        open_adapter(folder)


def test_integer_factors_are_refused(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, 32, dtype=torch.int8), f"{Q}.lora_B.weight": torch.ones(32, 2)}
    with pytest.raises(FormatError, match="has dtype I8, expected a float"):
        open_adapter(adapter_folder(tmp_path / "adapter", tensors, r=2, lora_alpha=2))


def test_legacy_forms_are_read(tmp_path: Path) -> None:
    """adapter_model.bin, keys with the adapter's name, keys without prefix, `modules_to_save.` in keys: all one."""
    model = make("llama")
    base = save(model, tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    adapter = write_adapter(model, config, tmp_path / "adapter")
    surgery.merge(base, adapter, output=tmp_path / "expected")
    tensors = load_file(adapter / "adapter_model.safetensors")
    forms: dict[str, dict[str, torch.Tensor]] = {
        "named": {
            n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): t for n, t in tensors.items()
        },
        "bare": {n.removeprefix("base_model.model."): t for n, t in tensors.items()},
        "saved": {
            n.replace("layernorm.weight", "layernorm.modules_to_save.default.weight"): t for n, t in tensors.items()
        },
        "bin": tensors,
    }
    for form, found in forms.items():
        folder = tmp_path / form
        folder.mkdir()
        (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
        if form == "bin":
            torch.save(found, folder / "adapter_model.bin")
        else:
            save_file(found, folder / "adapter_model.safetensors")
        surgery.merge(base, folder, output=tmp_path / f"merged-{form}")
        assert not different(stored(tmp_path / f"merged-{form}"), stored(tmp_path / "expected")), form


def test_not_an_adapter(tmp_path: Path) -> None:
    base = save(make("llama"), tmp_path / "base")
    with pytest.raises(InputError, match=r"base is not an adapter: it has no adapter_config.json"):
        open_adapter(base)
    for name in ("nowhere", "nowhere=abc"):
        with pytest.raises(InputError, match=f"{name} does not exist\\.$"):
            open_adapter(tmp_path / name)
    with pytest.raises(InputError, match=r"model.safetensors is not an adapter folder"):
        open_adapter(base / "model.safetensors")
    adapter = plain(tmp_path)
    with pytest.raises(InputError, match=r"adapter is an adapter, but a checkpoint is expected here"):
        surgery.merge(adapter, adapter, output=tmp_path / "merged")
    for weight in ("abc", "1,5", ""):
        with pytest.raises(InputError) as caught:
            surgery.merge(base, f"{adapter}={weight}", output=tmp_path / "merged")
        assert caught.value.message == f"{adapter}={weight} does not exist; a weight is written {adapter}=0.5."
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"adapter_config.json holds a JSON list, expected an object"):
        open_adapter(adapter)


def test_parameter_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    """A saved tensor that the base lacks and modules_to_save does not name is for another base."""
    base = save(make("llama"), tmp_path / "base")
    tensors = {"base_model.model.transformer.h.0.ln_1.weight": torch.ones(32)}
    adapter = adapter_folder(tmp_path / "adapter", tensors, r=2, lora_alpha=2)
    with pytest.raises(
        MismatchError, match=r"has no parameter 'transformer.h.0.ln_1.weight'; is it the adapter's base\?"
    ):
        surgery.merge(base, adapter, output=tmp_path / "merged")


def test_two_adapters_that_replace_the_same_parameter(tmp_path: Path) -> None:
    model = make("llama")
    base = save(model, tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    one, two = (write_adapter(model, config, tmp_path / name) for name in ("one", "two"))
    with pytest.raises(
        MismatchError, match=r"two: 'lm_head.weight' is replaced by another adapter too; merge one of them"
    ):
        surgery.merge(base, one, two, output=tmp_path / "merged")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b=0.5", ("a/b", 0.5)),
        ("a=-1", ("a", -1.0)),
        ("a=1e-3", ("a", 0.001)),
        ("a=.5", ("a", 0.5)),
        ("a=b", ("a=b", 1.0)),
        ("a", ("a", 1.0)),
    ],
)
def test_weights_in_references(text: str, expected: tuple[str, float]) -> None:
    assert split_weight(text) == expected


def test_a_folder_whose_name_looks_like_a_weight(here: Path) -> None:
    """What exists is a path, whatever it looks like."""
    plain(here / "x=0.5")
    assert split_weight("x=0.5/adapter") == ("x=0.5/adapter", 1.0)
    (here / "y=2").mkdir()
    assert split_weight("y=2") == ("y=2", 1.0)


def test_inspect_an_adapter(tmp_path: Path) -> None:
    """What PEFT wrote is described: ranks, targets, variants, what is stored whole."""
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["input_layernorm"],
        use_rslora=True,
        use_dora=True,
        rank_pattern={"q_proj": 2},
        task_type="CAUSAL_LM",
    )
    report = surgery.inspect(write_adapter(make("llama"), config, tmp_path / "adapter"))
    found: dict[str, Any] = report.as_dict()
    assert found["kind"] == "adapter"
    assert found["ranks"] == {"2": 2, "4": 1}
    assert found["targets"] == {"embed_tokens": 1, "q_proj": 2}
    assert set(found["variants"]) == {"rsLoRA", "DoRA", "embeddings", "rank_pattern"}
    assert "model.layers.0.input_layernorm.weight" in found["saved"]
    assert json.dumps(found)

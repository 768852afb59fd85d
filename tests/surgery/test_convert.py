"""Adapters as other tools write them: what each format adds to a weight, by its own definition and in float64."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, InputError, MismatchError, OptionError, UnsupportedError
from tests.models import logits, make, save
from tests.peft_tools import different, same_bits, stored, write_adapter
from tests.surgery.test_merge import adapter_folder
from tests.tools import read_json, run_cli, unequal

Deltas = dict[str, NDArray[np.float64]]
PREFIX = "base_model.model."


# What each format means, straight from its definition ----------------------------------------------------------------


def product(B: torch.Tensor, A: torch.Tensor) -> NDArray[np.float64]:
    """B A in float64, kernels flattened."""
    left, right = B.double().numpy(), A.double().numpy()
    return left.reshape(left.shape[0], -1) @ right.reshape(right.shape[0], -1)


def peft_deltas(folder: Path) -> Deltas:
    """dW of each module of a PEFT folder, by the rules of its config."""
    config, tensors = read_json(folder / "adapter_config.json"), stored(folder)
    found = {}
    for key, A in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        rank = pattern(config["rank_pattern"], module, config["r"])
        assert A.shape[0] == rank
        alpha = pattern(config["alpha_pattern"], module, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        found[module] = scale * product(tensors[key.replace("lora_A", "lora_B")], A)
    return found


def pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's `get_pattern_key`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def kohya_deltas(file: Path) -> Deltas:
    tensors = load_file(file)
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_down.weight"):
            stem = key.removesuffix(".lora_down.weight")
            scale = float(tensors[f"{stem}.alpha"]) / A.shape[0]
            found[stem] = scale * product(tensors[f"{stem}.lora_up.weight"], A)
    return found


def mlx_deltas(folder: Path) -> Deltas:
    """mlx-lm's `fuse`: (scale * lora_b^T) @ lora_a^T."""
    scale, tensors = read_json(folder / "adapter_config.json")["lora_parameters"]["scale"], stored(folder)
    return {
        key.removesuffix(".lora_a"): scale * product(tensors[key.replace("lora_a", "lora_b")].T, A.T)
        for key, A in tensors.items()
        if key.endswith(".lora_a")
    }


def assert_close(left: Deltas, right: Deltas, tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, delta in left.items():
        assert float(np.abs(delta - right[name]).max()) <= tolerance * float(np.abs(delta).max()), name


MODULES = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.self_attn.k_proj": (16, 32),
    "model.layers.0.mlp.down_proj": (32, 48),
    "model.layers.1.mlp.up_proj": (48, 32),
    "lm_head": (96, 32),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("llama"), tmp_path_factory.mktemp("llama") / "base")


def factors(module: str, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out, wide = MODULES[module]
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, wide, generator=generator).to(dtype),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(out, rank, generator=generator).to(dtype),
    }


# There and back -------------------------------------------------------------------------------------------------------

ALPHAS = st.one_of(st.integers(1, 64), st.sampled_from([0.1, 0.5, 1 / 3, 2.5e-3, 1e4]))


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Modules of mixed ranks, types and alphas, with a config that says so in PEFT's ways."""
    chosen = draw(st.lists(st.sampled_from(sorted(MODULES)), min_size=1, unique=True))
    ranks = {module: draw(st.integers(1, 5)) for module in chosen}
    alphas = {module: draw(ALPHAS) for module in draw(st.lists(st.sampled_from(chosen), unique=True))}
    dora = draw(st.booleans())
    tensors: dict[str, torch.Tensor] = {}
    for number, module in enumerate(chosen):
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        tensors |= factors(module, ranks[module], dtype, number)
        if dora:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = torch.rand(MODULES[module][0]) + 0.5
    config = {
        "r": draw(st.integers(1, 5)),
        "lora_alpha": draw(ALPHAS),
        "use_rslora": draw(st.booleans()),
        "use_dora": dora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": chosen,
    }
    return tensors, config


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters(), to=st.sampled_from(["peft", "kohya", "diffusers"]))
def test_factors_go_there_and_back_to_the_bit(
    adapter: Any, to: str, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A, B and magnitudes keep their bytes; scales are the same, or as near as the report says."""
    tmp_path = tmp_path_factory.mktemp("there")
    folder = adapter_folder(tmp_path / "adapter", adapter[0], **adapter[1])
    component = None if to == "peft" else "text_encoder"
    there = surgery.convert(folder, to=to, output=tmp_path / "there", component=component)
    back = surgery.convert(tmp_path / "there", to="peft", base=llama, output=tmp_path / "back")
    assert not different(stored(tmp_path / "back"), adapter[0])
    assert (there.scaled, back.scaled, back.scale_error) == (0, 0, 0.0)
    assert there.scale_error <= 2.0**-24
    assert to == "kohya" or not there.scale_error
    assert there.tensors - there.moved == (len(adapter[1]["target_modules"]) if to == "kohya" else 0)  # the alphas
    assert_close(peft_deltas(folder), peft_deltas(tmp_path / "back"), there.scale_error + 2.0**-50)
    config = read_json(tmp_path / "back" / "adapter_config.json")
    assert config["use_dora"] == adapter[1]["use_dora"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters())
def test_to_mlx_and_back(adapter: Any, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One rank and one scale: zeros fill the ranks, and what other scales there were is in B, rounded once."""
    tmp_path = tmp_path_factory.mktemp("mlx")
    folder = adapter_folder(tmp_path / "adapter", adapter[0], **adapter[1])
    there = surgery.convert(folder, to="mlx", base=llama, output=tmp_path / "mlx")
    expected, found = peft_deltas(folder), mlx_deltas(tmp_path / "mlx")
    scales = {scale_of(adapter[1], module, adapter[0]) for module in expected}
    assert bool(there.scaled) == (len(scales) > 1)
    most = 2.0**-22 if there.scaled else 2.0**-50
    assert_close(expected, found, most)
    config = read_json(tmp_path / "mlx" / "adapter_config.json")
    parameters = config["lora_parameters"]
    rank = max(tensor.shape[0] for name, tensor in adapter[0].items() if "lora_A" in name)
    assert (parameters["rank"], config["num_layers"], parameters["dropout"]) == (rank, 2, 0.0)
    assert config["fine_tune_type"] == ("dora" if adapter[1]["use_dora"] else "lora")
    keys = {re.sub(r"^model\.layers\.\d+\.", "", module) for module in expected}
    assert set(parameters["keys"]) == keys
    shapes = {tuple(t.shape) for n, t in stored(tmp_path / "mlx").items() if n.endswith("lora_a")}
    assert {shape[1] for shape in shapes} == {rank}
    surgery.convert(tmp_path / "mlx", to="peft", output=tmp_path / "back")
    assert_close(found, peft_deltas(tmp_path / "back"), 2.0**-50)


def scale_of(config: dict[str, Any], module: str, tensors: dict[str, torch.Tensor]) -> float:
    rank = tensors[f"{PREFIX}{module}.lora_A.weight"].shape[0]
    alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
    return round(alpha / (rank**0.5 if config["use_rslora"] else rank), 12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters(), pad=st.booleans())
def test_portable(adapter: Any, pad: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One alpha, no patterns of alphas, no rsLoRA, and with --pad-ranks one rank: the same dW, rounded once."""
    tmp_path = tmp_path_factory.mktemp("portable")
    folder = adapter_folder(tmp_path / "adapter", adapter[0], **adapter[1])
    report = surgery.convert(folder, to="peft", portable=True, pad_ranks=pad, output=tmp_path / "out")
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert (config["alpha_pattern"], config["use_rslora"]) == ({}, False)
    assert not pad or config["rank_pattern"] == {}
    assert_close(peft_deltas(folder), peft_deltas(tmp_path / "out"), 2.0**-22 if report.scaled else 2.0**-50)


def test_the_bytes_do_not_depend_on_the_threads(llama: Path, tmp_path: Path) -> None:
    tensors = factors("lm_head", 3) | factors("model.layers.0.mlp.down_proj", 2)
    folder = adapter_folder(tmp_path / "adapter", tensors, r=3, lora_alpha=7, rank_pattern={"down_proj": 2})
    for threads in (1, 4):
        surgery.convert(folder, to="mlx", base=llama, output=tmp_path / str(threads), threads=threads)
    assert not unequal(tmp_path / "1", tmp_path / "4")


def test_what_peft_stores_beside_factors_goes_along_or_is_refused(tmp_path: Path) -> None:
    """To PEFT it is copied; other formats have no place for it and say so by name."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    folder = write_adapter(make("llama"), config, tmp_path / "adapter")
    surgery.convert(folder, to="peft", portable=True, output=tmp_path / "out")
    assert same_bits(stored(tmp_path / "out")[f"{PREFIX}lm_head.weight"], stored(folder)[f"{PREFIX}lm_head.weight"])
    kept = read_json(tmp_path / "out" / "adapter_config.json")
    assert (kept["modules_to_save"], kept["task_type"]) == (["lm_head"], "CAUSAL_LM")
    for to, name in (("kohya", "kohya's"), ("diffusers", "diffusers'"), ("mlx", "mlx-lm's")):
        with pytest.raises(UnsupportedError, match=rf"holds 1 tensors whole \(.*lm_head.*which {name} format has no"):
            surgery.convert(folder, to=to, component=None if to == "mlx" else "unet", output=tmp_path / to)
        assert not (tmp_path / to).exists()


def test_a_folder_that_peft_wrote_and_we_converted_is_the_same_function_in_peft(tmp_path: Path) -> None:
    """Loaded by PEFT itself, with patterns, rsLoRA and an embedding: the same logits to the last bit."""
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"layers.0.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 5},
        use_rslora=True,
    )
    folder = write_adapter(make("llama"), config, tmp_path / "adapter")
    surgery.convert(folder, to="peft", output=tmp_path / "out")
    assert torch.equal(of_peft(folder), of_peft(tmp_path / "out"))


def of_peft(folder: Path, family: str = "llama") -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return logits(PeftModel.from_pretrained(make(family), folder))


# kohya ----------------------------------------------------------------------------------------------------------------

UNET = {
    "conv_in": (8, 4, 3, 3),
    "time_embedding.linear_1": (16, 8),
    "down_blocks.0.resnets.1.conv1": (8, 8, 3, 3),
    "down_blocks.0.resnets.1.time_emb_proj": (8, 16),
    "down_blocks.0.downsamplers.0.conv": (8, 8, 3, 3),
    "down_blocks.1.attentions.0.proj_in": (8, 8, 1, 1),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": (8, 8),
    "mid_block.resnets.1.conv_shortcut": (8, 8, 1, 1),
    "mid_block.attentions.0.proj_in": (8, 8),
    "up_blocks.0.resnets.2.conv2": (8, 8, 3, 3),
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj": (8, 8),
    "up_blocks.0.upsamplers.0.conv": (8, 8, 3, 3),
    "up_blocks.1.upsamplers.0.conv": (8, 8, 3, 3),
}
# What the original U-Net of Stable Diffusion XL calls them (three resnets to a block on the way up).
ORIGINAL = {
    "conv_in": "input_blocks_0_0",
    "time_embedding.linear_1": "time_embed_0",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.0.resnets.1.time_emb_proj": "input_blocks_2_0_emb_layers_1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": (
        "input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    ),
    "mid_block.resnets.1.conv_shortcut": "middle_block_2_skip_connection",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "up_blocks.0.resnets.2.conv2": "output_blocks_2_0_out_layers_3",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj": (
        "output_blocks_1_1_transformer_blocks_0_ff_net_0_proj"
    ),
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_1_conv",
}


def model_folder(folder: Path, shapes: dict[str, tuple[int, ...]], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unet") / "unet"
    return model_folder(folder, UNET, _class_name="UNet2DConditionModel", layers_per_block=2)


def kohya_file(path: Path, names: dict[str, str], rank: int = 3, alpha: object = 2.0) -> dict[str, torch.Tensor]:
    """A LoCon as kohya writes it; returns its tensors."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for module, flat in names.items():
        out, wide, *kernel = UNET[module]
        stem = f"lora_unet_{flat}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, wide, *kernel, generator=generator).half()
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, rank, *(1 for _ in kernel), generator=generator).half()
        if alpha is not None:
            tensors[f"{stem}.alpha"] = alpha if isinstance(alpha, torch.Tensor) else torch.tensor(alpha).half()
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora"})
    return tensors


@pytest.mark.parametrize("names", ["diffusers", "original"])
def test_a_locon_of_a_unet(names: str, unet: Path, tmp_path: Path) -> None:
    """Underscores are undone by the names of the base, in diffusers' numbering or the original's; bytes stay."""
    flat = {name: name.replace(".", "_") for name in UNET} if names == "diffusers" else ORIGINAL
    tensors = kohya_file(tmp_path / "style.safetensors", flat)
    report = surgery.convert(tmp_path / "style.safetensors", to="peft", base=unet, output=tmp_path / "peft")
    assert (report.modules, report.moved, report.scaled) == (len(UNET), 2 * len(UNET), 0)
    found = stored(tmp_path / "peft")
    for module, short in flat.items():
        for mine, theirs in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
            key, other = f"{PREFIX}{module}.{mine}.weight", f"lora_unet_{short}.{theirs}.weight"
            assert same_bits(found[key], tensors[other]), module
    config = read_json(tmp_path / "peft" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (3, 2, {})
    assert sorted(config["target_modules"]) == sorted(UNET)
    surgery.convert(tmp_path / "peft", to="kohya", output=tmp_path / "again")
    again = load_file(tmp_path / "again" / "again.safetensors")
    assert {name.partition(".")[0] for name in again} == {f"lora_unet_{name.replace('.', '_')}" for name in UNET}
    with safe_open(tmp_path / "again" / "again.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "3"
        assert file.metadata()["ss_network_alpha"] == "2"


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (None, 3.0),
        (0.0, 3.0),
        (1.5, 1.5),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor(4), 4.0),
        (torch.tensor([2.0]), 2.0),
    ],
)
def test_alphas(alpha: object, expected: float, unet: Path, tmp_path: Path) -> None:
    """Of any type; absent or zero, alpha is the rank."""
    kohya_file(tmp_path / "k.safetensors", {"conv_in": "conv_in"}, alpha=alpha)
    surgery.convert(tmp_path / "k.safetensors", to="peft", base=unet, output=tmp_path / "peft")
    assert read_json(tmp_path / "peft" / "adapter_config.json")["lora_alpha"] == expected


def test_mixed_alphas_and_ranks_become_patterns_of_whole_names(tmp_path: Path) -> None:
    """`proj` is also the end of `block.proj`: PEFT would take the one for the other without the leading `^`."""
    base = model_folder(tmp_path / "base", {"proj": (4, 4), "block.proj": (4, 4), "other": (4, 4)})
    tensors = {}
    for name, rank, alpha in (("proj", 2, 1.0), ("block_proj", 3, 5.0), ("other", 3, 5.0)):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, 4)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(4, rank)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "k.safetensors")
    surgery.convert(tmp_path / "k.safetensors", to="peft", base=base, output=tmp_path / "peft")
    config = read_json(tmp_path / "peft" / "adapter_config.json")
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, {"^proj": 2}, {"^proj": 1})

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.other = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
            self.block = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4, bias=False)})

    wrapped: Any = PeftModel.from_pretrained(Model(), str(tmp_path / "peft"))
    expected = {
        name.removeprefix("lora_unet_"): delta for name, delta in kohya_deltas(tmp_path / "k.safetensors").items()
    }
    for name, delta in expected.items():
        layer = wrapped.base_model.model.get_submodule(name.replace("_", "."))
        assert np.allclose(layer.get_delta_weight("default").detach().numpy(), delta, atol=1e-5)


def test_names_with_underscores_that_could_mean_two_modules(tmp_path: Path) -> None:
    """Both are named, as is one that the base does not have, in one error."""
    base = model_folder(tmp_path / "base", {"a.b_c": (4, 4), "a_b.c": (4, 4), "d": (4, 4)})
    tensors = {f"lora_unet_{n}.lora_{w}.weight": torch.ones(4, 4) for n in ("a_b_c", "e") for w in ("down", "up")}
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(MismatchError, match="2 problems with the names in") as caught:
        surgery.convert(tmp_path / "k.safetensors", to="peft", base=base, output=tmp_path / "peft")
    assert re.search(r"'lora_unet_a_b_c' can mean 'a.b_c' or 'a_b.c' of ", caught.value.problems[0])
    assert re.search(r"'lora_unet_e' is no module of .*; is it the adapter's base\?", caught.value.problems[1])
    assert not (tmp_path / "peft").exists()
    peft = {f"{PREFIX}{n}.lora_{w}.weight": torch.ones(4, 4) for n in ("a.b_c", "a_b.c") for w in "AB"}
    folder = adapter_folder(tmp_path / "two", peft, r=4, lora_alpha=4)
    with pytest.raises(FormatError, match=r"'unet.a.b_c' and 'unet.a_b.c' would both be called 'lora_unet_a_b_c'"):
        surgery.convert(folder, to="kohya", component="unet", output=tmp_path / "k")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lora_mid.weight", "LoCon with a core tensor"),
        ("oft_blocks", "OFT"),
        ("diff", "whole differences"),
    ],
)
def test_other_parametrisations_are_refused_by_name(key: str, kind: str, unet: Path, tmp_path: Path) -> None:
    tensors = kohya_file(tmp_path / "k.safetensors", {"conv_in": "conv_in"})
    save_file(tensors | {f"lora_unet_conv_in.{key}": torch.ones(2, 2)}, tmp_path / "k.safetensors")
    with pytest.raises(UnsupportedError, match=rf"is .*{kind}.*'lora_unet_conv_in.{key}'"):
        surgery.convert(tmp_path / "k.safetensors", to="peft", base=unet, output=tmp_path / "peft")


def test_damaged_kohya_files(unet: Path, tmp_path: Path) -> None:
    tensors = kohya_file(tmp_path / "k.safetensors", {"conv_in": "conv_in"})
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(3, 4, 3, 3)}, r"'lora_unet_conv_in' has no lora_up.weight"),
        ({**tensors, "lora_unet_conv_in.wat": torch.ones(1)}, r"'lora_unet_conv_in.wat' is none that a kohya LoRA has"),
        ({**tensors, "lora_unet_conv_in.alpha": torch.ones(2)}, r"alpha' is F32 of shape \[2\], expected a number"),
        ({**tensors, "lora_unet_conv_in.alpha": torch.tensor(float("nan"))}, r"alpha of 'unet.conv_in' is nan"),
        (
            {**tensors, "lora_unet_conv_in.lora_up.weight": torch.ones(9, 3, 1, 1)},
            r"the factors of 'lora_unet_conv_in' are \[3, 4, 3, 3\] and \[9, 3, 1, 1\], but 'conv_in' has a weight of",
        ),
        (
            {**tensors, "lora_unet_conv_in.dora_scale": torch.ones(1, 4, 3, 3)},
            r"dora_scale of 'lora_unet_conv_in' has shape .* norm over the outputs \(LyCORIS without wd_on_out\)",
        ),
    ]
    for number, (found, sentence) in enumerate(cases):
        file = tmp_path / f"{number}.safetensors"
        save_file(found, file)
        with pytest.raises(InputError, match=sentence):
            surgery.convert(file, to="peft", base=unet, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"name the base of its unet with --base \(there is none\)"):
        surgery.convert(tmp_path / "k.safetensors", to="peft", output=tmp_path / "out")


def test_dora_of_kohya(unet: Path, tmp_path: Path) -> None:
    """dora_scale is the magnitude, with a column for a matrix and more ones for a kernel; there and back to the bit."""
    tensors = kohya_file(tmp_path / "k.safetensors", {name: name.replace(".", "_") for name in UNET})
    for name, shape in UNET.items():
        tensors[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = torch.rand(shape[0], *(1 for _ in shape[1:]))
    save_file(tensors, tmp_path / "k.safetensors")
    surgery.convert(tmp_path / "k.safetensors", to="peft", base=unet, output=tmp_path / "peft")
    magnitude = stored(tmp_path / "peft")[f"{PREFIX}conv_in.lora_magnitude_vector"]
    assert torch.equal(magnitude, tensors["lora_unet_conv_in.dora_scale"].view(-1))
    assert read_json(tmp_path / "peft" / "adapter_config.json")["use_dora"] is True
    surgery.convert(tmp_path / "peft", to="kohya", output=tmp_path / "again")
    again = load_file(tmp_path / "again" / "again.safetensors")
    alphas = {name: tensor.float() if name.endswith("alpha") else tensor for name, tensor in tensors.items()}
    assert not different(again, alphas)


# diffusers ------------------------------------------------------------------------------------------------------------


def test_old_and_new_names_of_diffusers_are_the_same_adapter(tmp_path: Path) -> None:
    """The three spellings of the past give the modules of the present."""
    generator = torch.Generator().manual_seed(0)
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    modules = {f"{attention}.to_q": "q", f"{attention}.to_out.0": "out", "mid_block.attentions.0.proj_in": ""}
    pairs = {m: (torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)) for m in modules}
    oldest: dict[str, torch.Tensor] = {}
    middle: dict[str, torch.Tensor] = {}
    new: dict[str, torch.Tensor] = {}
    for module, (A, B) in pairs.items():
        which = modules[module]
        old = f"{attention}.processor.to_{which}_lora" if which else f"{module}.lora"
        oldest |= {f"{old}.down.weight": A, f"{old}.up.weight": B}
        middle |= {f"unet.{module}.lora.down.weight": A, f"unet.{module}.lora.up.weight": B}
        new |= {f"unet.{module}.lora_A.weight": A, f"unet.{module}.lora_B.weight": B}
    outputs = []
    for name, tensors in (("oldest", oldest), ("middle", middle), ("new", new)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        surgery.convert(tmp_path / f"{name}.safetensors", to="peft", output=tmp_path / name)
        outputs.append(tmp_path / name)
        assert_close(peft_deltas(tmp_path / name), {m: product(B, A) for m, (A, B) in pairs.items()}, 2.0**-50)
    assert not different(stored(outputs[0]), stored(outputs[2]))
    assert not different(stored(outputs[1]), stored(outputs[2]))


def test_old_text_encoders_of_diffusers(tmp_path: Path) -> None:
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    stem = "text_encoder.text_model.encoder.layers.0"
    tensors = {
        f"{stem}.self_attn.to_q_lora.down.weight": A,
        f"{stem}.self_attn.to_q_lora.up.weight": B,
        f"{stem}.self_attn.out_proj.lora_linear_layer.down.weight": A.clone(),
        f"{stem}.self_attn.out_proj.lora_linear_layer.up.weight": B.clone(),
    }
    save_file(tensors, tmp_path / "te.safetensors")
    surgery.convert(tmp_path / "te.safetensors", to="peft", output=tmp_path / "peft")
    found = {
        name.removeprefix(PREFIX).removeprefix("text_model.encoder.layers.0.self_attn.")
        for name in stored(tmp_path / "peft")
    }
    assert found == {f"{m}.lora_{w}.weight" for m in ("q_proj", "out_proj") for w in "AB"}


def test_a_file_of_diffusers_loads_as_diffusers_loads_it(tmp_path: Path) -> None:
    """The metadata make a LoraConfig, the tensors go into the model by PEFT's own loader: the same function."""
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"up_proj": 7},
    )
    folder = write_adapter(make("llama"), config, tmp_path / "adapter")
    report = surgery.convert(folder, to="diffusers", component="transformer", output=tmp_path / "d")
    assert any("lora_adapter_metadata" in note for note in report.notes)
    file = tmp_path / "d" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    settings_ = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    assert all(key.startswith("transformer.") for key in metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make("llama"), LoraConfig(**settings_))
    tensors = {name.replace("transformer.", PREFIX, 1): tensor for name, tensor in load_file(file).items()}
    result: Any = set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    assert torch.equal(logits(model), of_peft(folder))


def test_without_metadata_the_scale_is_one_for_every_rank(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, rank in (("a", 2), ("b", 3)):
        tensors |= {
            f"unet.{name}.lora_A.weight": torch.randn(rank, 8),
            f"unet.{name}.lora_B.weight": torch.randn(8, rank),
        }
    save_file(tensors, tmp_path / "d.safetensors")
    surgery.convert(tmp_path / "d.safetensors", to="peft", output=tmp_path / "peft")
    expected = {m: product(tensors[f"unet.{m}.lora_B.weight"], tensors[f"unet.{m}.lora_A.weight"]) for m in "ab"}
    assert_close(peft_deltas(tmp_path / "peft"), expected, 2.0**-50)


def test_several_components_and_a_pipeline(tmp_path: Path) -> None:
    """kohya to diffusers carries all; a PEFT folder is for one; the base may be the pipeline's folder."""
    model_folder(tmp_path / "pipe" / "unet", {"down_blocks.0.attentions.0.to_q": (8, 8)})
    model_folder(tmp_path / "pipe" / "text_encoder", {"text_model.encoder.layers.0.mlp.fc1": (8, 8)})
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    tensors: dict[str, torch.Tensor] = {}
    for stem in ("lora_unet_down_blocks_0_attentions_0_to_q", "lora_te_text_model_encoder_layers_0_mlp_fc1"):
        tensors |= {f"{stem}.lora_{w}.weight": torch.randn(8, 8) for w in ("down", "up")}
    save_file(tensors, tmp_path / "k.safetensors")
    surgery.convert(tmp_path / "k.safetensors", to="diffusers", base=tmp_path / "pipe", output=tmp_path / "d")
    found = {name.rpartition(".lora_")[0] for name in stored(tmp_path / "d")}
    te = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert found == {"unet.down_blocks.0.attentions.0.to_q", te}
    with pytest.raises(InputError, match=r"holds the modules of text_encoder, unet, .* choose one with --component"):
        surgery.convert(tmp_path / "d", to="peft", output=tmp_path / "p")
    surgery.convert(tmp_path / "d", to="peft", component="text_encoder", output=tmp_path / "p")
    assert {name.partition(".lora_")[0] for name in stored(tmp_path / "p")} == {PREFIX + te.partition(".")[2]}
    with pytest.raises(InputError, match=r"has no modules of 'transformer'; there are text_encoder, unet"):
        surgery.convert(tmp_path / "d", to="kohya", component="transformer", output=tmp_path / "q")


@pytest.mark.parametrize("raw", ["[1]", "{", '{"unet.lora_alpha": "x"}'])
def test_hostile_metadata(raw: str, tmp_path: Path) -> None:
    tensors = {"unet.a.lora_A.weight": torch.ones(2, 4), "unet.a.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "d.safetensors", metadata={"lora_adapter_metadata": raw})
    with pytest.raises(FormatError, match=r"lora_adapter_metadata|lora_alpha of 'a' is 'x', expected a number"):
        surgery.convert(tmp_path / "d.safetensors", to="peft", output=tmp_path / "p")


# mlx-lm ---------------------------------------------------------------------------------------------------------------


def mlx_folder(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    content = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    return folder


def test_an_adapter_of_mlx(tmp_path: Path) -> None:
    """lora_a (in, r) and lora_b (r, out), one scale and no alpha: alpha becomes scale times rank."""
    a, b = torch.randn(32, 2), torch.randn(2, 16)
    name = "model.layers.0.self_attn.k_proj"
    folder = mlx_folder(tmp_path / "mlx", {f"{name}.lora_a": a, f"{name}.lora_b": b})
    surgery.convert(folder, to="peft", output=tmp_path / "peft")
    assert read_json(tmp_path / "peft" / "adapter_config.json")["lora_alpha"] == 40
    expected = 20.0 * (b.double().T @ a.double().T).numpy()
    assert_close(peft_deltas(tmp_path / "peft"), {name: expected}, 2.0**-50)


@pytest.mark.parametrize(
    ("tensors", "config", "sentence"),
    [
        ({"x.lora_a": (4, 2)}, {}, "'x' has no lora_b"),
        ({"x.lora_a": (4, 2), "x.lora_b": (3, 4)}, {}, r"'x' has factors of shape \[2, 4\] and \[4, 3\]"),
        ({"x.lora_a": (2, 4, 2), "x.lora_b": (2, 4)}, {}, "lora_a and lora_b of different dimensions"),
        ({"x.linear.weight": (4, 4)}, {}, "'x.linear.weight' is none that an mlx-lm adapter has"),
        ({"x.lora_a": (4, 2), "x.lora_b": (2, 4)}, {"lora_parameters": {"alpha": 3}}, "'scale' of lora_pa"),
        ({"x.lora_a": (4, 2), "x.lora_b": (2, 4)}, {"fine_tune_type": "full"}, "fine_tune_type 'full', expected"),
        ({"x.switch_mlp.lora_a": (2, 2, 4), "x.switch_mlp.lora_b": (2, 4, 2)}, {}, "has LoRAs on experts.*--base"),
    ],
)  # fmt: skip
def test_damaged_adapters_of_mlx(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = mlx_folder(tmp_path / "mlx", {name: torch.ones(shape) for name, shape in tensors.items()}, **config)
    with pytest.raises(InputError, match=sentence):
        surgery.convert(folder, to="peft", output=tmp_path / "peft")


def test_what_mlx_cannot_hold(tmp_path: Path) -> None:
    """Convolutions, modules outside the layers that MLX names, a DoRA of some modules only."""
    conv = {f"{PREFIX}model.layers.0.c.lora_A.weight": torch.ones(2, 4, 3, 3)}
    conv[f"{PREFIX}model.layers.0.c.lora_B.weight"] = torch.ones(4, 2, 1, 1)
    cases = {
        "conv": (conv, r"'model.layers.0.c' is a convolution, which mlx-lm's format has no place for"),
        "name": (
            {f"{PREFIX}transformer.h.0.c.lora_{w}.weight": torch.ones(4, 4) for w in "AB"},
            r"'transformer.h.0.c' is no module whose name in MLX is known",
        ),
        "dora": (
            {f"{PREFIX}model.layers.{n}.c.lora_{w}.weight": torch.ones(4, 4) for w in "AB" for n in (0, 1)}
            | {f"{PREFIX}model.layers.0.c.lora_magnitude_vector": torch.ones(4)},
            r"'model.layers.1.c' has no DoRA magnitude and others have",
        ),
    }
    for name, (tensors, sentence) in cases.items():
        folder = adapter_folder(tmp_path / name, tensors, r=4, lora_alpha=4, rank_pattern={"c": tensors_rank(tensors)})
        with pytest.raises(UnsupportedError, match=sentence):
            surgery.convert(folder, to="mlx", output=tmp_path / "out")


def tensors_rank(tensors: dict[str, torch.Tensor]) -> int:
    return next(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)


# Experts --------------------------------------------------------------------------------------------------------------

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_fused_experts_taken_apart_and_put_together(family: str, tmp_path: Path) -> None:
    """Per expert: the merged bits are the same; and together again: the very bytes it was."""
    model = make(family)
    base = save(model, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=FUSED, use_rslora=True)
    fused = write_adapter(model, config, tmp_path / "fused")
    report = surgery.convert(fused, to="peft", experts="per-expert", base=base, output=tmp_path / "per")
    assert report.scaled == 0
    assert report.modules == 2 + 2 * 4 * 3
    assert all(tensor.shape[0] == 4 for name, tensor in stored(tmp_path / "per").items() if "lora_A" in name)
    names = {name.removesuffix(".weight") for name in stored(base)}
    modules = {n.removeprefix(PREFIX).rpartition(".lora_")[0] for n in stored(tmp_path / "per")}
    assert modules <= names
    for adapter in ("fused", "per"):
        surgery.merge(base, tmp_path / adapter, output=tmp_path / f"merged-{adapter}")
    assert not different(stored(tmp_path / "merged-fused"), stored(tmp_path / "merged-per"))
    back = surgery.convert(tmp_path / "per", to="peft", experts="fused", base=base, output=tmp_path / "back")
    assert not different(stored(tmp_path / "back"), stored(fused))
    assert not any("rank" in note for note in back.notes)
    assert torch.equal(of_peft(tmp_path / "back", family), of_peft(fused, family))


def per_expert_adapter(folder: Path, base: Path, skip: tuple[str, ...] = (), **config: Any) -> tuple[Path, Deltas]:
    """A version-4 adapter with factors of its own for each projection of each expert, and its dW by stored name."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    settings_ = {"r": 2, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"], **config}
    deltas = {}
    for name, weight in stored(base).items():
        module = name.removesuffix(".weight")
        if ".experts." not in name or any(module.endswith(end) for end in skip):
            continue
        alpha = pattern(settings_.get("alpha_pattern", {}), module, settings_["lora_alpha"])
        A, B = (
            torch.randn(2, weight.shape[1], generator=generator),
            torch.randn(weight.shape[0], 2, generator=generator),
        )
        tensors |= {f"{PREFIX}{module}.lora_A.weight": A, f"{PREFIX}{module}.lora_B.weight": B}
        deltas[name] = alpha / 2 * product(B, A)
    return adapter_folder(folder, tensors, **settings_), deltas


@pytest.mark.parametrize(
    ("skip", "config", "ranks", "folds"),
    [
        ((), {}, {4, 2}, False),
        (("w3",), {}, {2}, False),
        (("experts.2.w1", "experts.1.w2"), {}, {4, 2}, False),
        ((), {"alpha_pattern": {"w3": 1, "experts.1.w2": 3}}, {4, 2}, True),
    ],
)
def test_experts_of_their_own_become_stacks_of_a_larger_rank(
    skip: tuple[str, ...], config: dict[str, Any], ranks: set[int], folds: bool, tmp_path: Path
) -> None:
    """Block-diagonal: what is merged is base + dW of each expert in float64, also where some are missing."""
    model = make("mixtral")
    base = save(model, tmp_path / "base")
    adapter, deltas = per_expert_adapter(tmp_path / "adapter", base, skip, **config)
    report = surgery.convert(adapter, to="peft", experts="fused", base=base, output=tmp_path / "fused")
    assert any("block-diagonal" in note for note in report.notes) == (4 in ranks)
    assert bool(report.scaled) == folds
    found = {t.shape[0] // 4 for name, t in stored(tmp_path / "fused").items() if "lora_A" in name}
    assert found == ranks
    surgery.merge(base, tmp_path / "fused", output=tmp_path / "merged")
    merged = stored(tmp_path / "merged")
    for name, tensor in stored(base).items():
        exact = tensor.double().numpy() + deltas.get(name, 0.0)
        # Two roundings of float32: of dW, whose entries are sums of at most four products, and of the sum.
        assert float(np.abs(merged[name].double().numpy() - exact).max()) <= 2.0**-22 * float(np.abs(exact).max()), name


def test_peft_reads_both_layouts_alike(tmp_path: Path) -> None:
    """PEFT makes stacks of a version-4 adapter itself when it loads it: ours is the same function."""
    base = save(make("mixtral"), tmp_path / "base")
    adapter, _ = per_expert_adapter(tmp_path / "adapter", base)
    surgery.convert(adapter, to="peft", experts="fused", base=base, output=tmp_path / "fused")
    torch.testing.assert_close(
        of_peft(adapter, "mixtral"), of_peft(tmp_path / "fused", "mixtral"), atol=1e-5, rtol=1e-5
    )


def test_routers_change_their_names_with_the_layout(tmp_path: Path) -> None:
    """`mlp.gate.weight` is a parameter in memory and the module `block_sparse_moe.gate` in the checkpoint."""
    model = make("mixtral")
    base = save(model, tmp_path / "base")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight", *FUSED])
    fused = write_adapter(model, config, tmp_path / "fused")
    surgery.convert(fused, to="peft", experts="per-expert", base=base, output=tmp_path / "per")
    assert f"{PREFIX}model.layers.0.block_sparse_moe.gate.lora_A.weight" in stored(tmp_path / "per")
    surgery.convert(tmp_path / "per", to="peft", experts="fused", base=base, output=tmp_path / "back")
    assert not different(stored(tmp_path / "back"), stored(fused))
    assert "model.layers.0.mlp.gate.weight" in read_json(tmp_path / "back" / "adapter_config.json")["target_parameters"]


def test_experts_to_mlx_and_back(tmp_path: Path) -> None:
    """switch_mlp with stacks for gate, up and down: mlx-lm's fuse gives the dW of each expert; back to the bit."""
    model = make("mixtral")
    base = save(model, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=FUSED)
    fused = write_adapter(model, config, tmp_path / "fused")
    surgery.convert(fused, to="mlx", base=base, output=tmp_path / "mlx")
    surgery.merge(base, fused, output=tmp_path / "merged")
    before, after, found = stored(base), stored(tmp_path / "merged"), stored(tmp_path / "mlx")
    stem = "model.layers.1.block_sparse_moe"
    for projection, w in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        a, b = (found[f"{stem}.switch_mlp.{projection}.lora_{x}"] for x in "ab")
        for expert in range(4):
            name = f"{stem}.experts.{expert}.{w}.weight"
            delta = 1.5 * product(b[expert], a[expert])
            assert np.allclose(before[name].double().numpy() + delta, after[name].double().numpy(), atol=1e-6)
    surgery.convert(tmp_path / "mlx", to="peft", base=base, output=tmp_path / "back")
    assert not different(stored(tmp_path / "back"), stored(fused))


def test_experts_that_have_no_names_of_their_own(tmp_path: Path) -> None:
    """GPT-OSS and GraniteMoE store their experts as stacks; without a base nothing can be told."""
    model = make("granitemoe")
    base = save(model, tmp_path / "base")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    adapter = write_adapter(model, config, tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=r"2 problems with the experts of") as caught:
        surgery.convert(adapter, to="peft", experts="per-expert", base=base, output=tmp_path / "out")
    assert re.search(r"does not store the experts of '.*gate_up_proj' one by one", caught.value.problems[0])
    with pytest.raises(
        InputError, match=r"Where the experts of .* lie depends on the model; name its base with --base"
    ):
        surgery.convert(adapter, to="peft", experts="per-expert", output=tmp_path / "out")
    with pytest.raises(InputError, match=r"how MLX names the experts of .* depends on the model; name its base"):
        surgery.convert(adapter, to="mlx", output=tmp_path / "out")
    with pytest.raises(UnsupportedError, match=r"2 problems with .* as kohya's format") as caught:
        surgery.convert(adapter, to="kohya", component="unet", output=tmp_path / "out")
    assert "has a LoRA on fused experts, which kohya's format has no place for" in caught.value.problems[0]
    assert not (tmp_path / "out").exists()


# Options and errors ---------------------------------------------------------------------------------------------------


def test_what_is_no_adapter(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no adapter that is known: neither a PEFT folder, nor a LoRA file"):
        surgery.convert(llama, to="mlx", output=tmp_path / "out")
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        surgery.convert(tmp_path / "nowhere", to="mlx", output=tmp_path / "out")
    save_file({f"{PREFIX}a.lora_A.weight": torch.ones(1, 1)}, tmp_path / "lone.safetensors")
    with pytest.raises(InputError, match=r"tensors of a PEFT adapter and no adapter_config.json beside them"):
        surgery.convert(tmp_path / "lone.safetensors", to="mlx", output=tmp_path / "out")


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", factors("lm_head", 2), r=2, lora_alpha=2)
    with pytest.raises(OptionError, match=r"--to is 'gguf', expected one of peft, kohya, diffusers, mlx"):
        surgery.convert(folder, to="gguf", output=tmp_path / "out")
    with pytest.raises(OptionError, match=r"--experts chooses a layout of PEFT's, and --to is 'mlx'"):
        surgery.convert(folder, to="mlx", experts="fused", output=tmp_path / "out")
    with pytest.raises(OptionError, match=r"--output is .*x.safetensors, expected a folder"):
        surgery.convert(folder, to="kohya", output=tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"does not say which part of a pipeline it is for; give --component, one of"):
        surgery.convert(folder, to="kohya", output=tmp_path / "out")


def test_the_command(llama: Path, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", factors("lm_head", 2), r=2, lora_alpha=3)
    run = run_cli("convert", folder, "--to", "mlx", "-o", tmp_path / "dry", "--dry-run")
    assert run.returncode == 0
    assert "would write" in run.stdout
    assert not (tmp_path / "dry").exists()
    run = run_cli("convert", folder, "--to", "mlx", "-o", tmp_path / "mlx")
    assert run.returncode == 0, run.stderr
    assert re.search(
        r"format +peft to mlx *\nmodules +1 *\ntensors +0 copied unchanged, 2 computed *\nscales +exact", run.stdout
    )
    run = run_cli("convert", tmp_path / "mlx", "--to", "peft", "-o", tmp_path / "peft", "--json")
    report = json.loads(run.stdout)
    assert (report["source_format"], report["target_format"], report["file"]) == (
        "mlx",
        "peft",
        "adapter_model.safetensors",
    )
    assert surgery.verify(tmp_path / "peft").passed
    run = run_cli("convert", folder, "--to", "kohya", "-o", tmp_path / "k")
    assert run.returncode == 1
    assert "give --component" in run.stderr


def test_a_tied_embedding_is_refused_for_mlx(tmp_path: Path) -> None:
    """mlx-lm would apply its factors to the head as well."""
    base = save(make("llama-tied"), tmp_path / "base")
    adapter = write_adapter(make("llama-tied"), LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if ".base_layer." not in n}, path)
    with pytest.raises(UnsupportedError, match=r"has its head tied to it: MLX would add them to the head too; merge"):
        surgery.convert(adapter, to="mlx", base=base, output=tmp_path / "out")

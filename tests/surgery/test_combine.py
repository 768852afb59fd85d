"""Combining and resizing adapters, against PEFT: its dW of every module, and its own `add_weighted_adapter`."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import MismatchError, NonFiniteError, OptionError, OutputError, UnsupportedError
from surgery.ops.elementwise import drop_at_random
from surgery.ops.factor import seed_for
from tests.models import make, save
from tests.peft_tools import stored, write_adapter
from tests.surgery.test_cores import best, difference, tsv_reference
from tests.tools import read_json, run_cli, square_adapter, tree, unequal

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
Deltas = dict[str, np.ndarray]


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **settings})


def adapters(tmp_path: Path, *configs: LoraConfig, family: str = "llama") -> list[Path]:
    """An adapter for each config, made by PEFT, with other factors each."""
    model = make(family)
    return [write_adapter(model, one, tmp_path / f"a{n}", seed=10 + n) for n, one in enumerate(configs)]


def loaded(*folders: Path, family: str = "llama") -> Any:
    """A model with the adapters in these folders, loaded by PEFT, which must not miss or ignore a tensor."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(make(family), folders[0], adapter_name="0")
        for number, folder in enumerate(folders[1:], start=1):
            model.load_adapter(folder, adapter_name=str(number))
    assert not [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    return model


def deltas(folder: Path, family: str = "llama") -> Deltas:
    """PEFT's dW of each module, as (out, in) in float64."""
    found = {}
    for name, module in loaded(folder, family=family).named_modules():
        if isinstance(module, LoraLayer) and (module.lora_A or module.lora_embedding_A):
            layer: Any = module
            delta = layer.get_delta_weight("0").detach().double()
            transposed = getattr(module, "fan_in_fan_out", False)
            found[name.removeprefix("base_model.model.")] = (delta.T if transposed else delta).flatten(1).numpy()
    return found


def weighted_sum(parts: list[Deltas], weights: list[float]) -> Deltas:
    names = {name for part in parts for name in part}
    return {
        name: np.asarray(sum(w * part[name] for part, w in zip(parts, weights, strict=True) if name in part))
        for name in names
    }


MIXED = [
    config(r=4, lora_alpha=8),
    config(r=6, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    config(r=2, lora_alpha=5, target_modules=ALL, rank_pattern={"q_proj": 5}, alpha_pattern={"down_proj": 1}),
]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -0.4, 2.0]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cat_is_the_weighted_sum(weights: list[float], dtype: str, tmp_path: Path) -> None:
    """Of any ranks, alphas, patterns, targets, rsLoRA or not, and weights of any sign: what PEFT computes with each."""
    folders = adapters(tmp_path, *MIXED)
    report = surgery.combine(*zip(folders, weights, strict=True), output=tmp_path / "out", method="cat", dtype=dtype)
    expected = weighted_sum([deltas(folder) for folder in folders], weights)
    found = deltas(tmp_path / "out")
    limit = 3e-7 if dtype == "float32" else 8e-3
    assert found.keys() == expected.keys()
    assert max(difference(found[name], expected[name]) for name in found) < limit
    by_name = {module.name: module for module in report.modules}
    assert by_name["model.layers.0.self_attn.q_proj"].ranks == (4, 6, 5)
    assert by_name["model.layers.0.mlp.up_proj"].ranks == (0, 6, 2)
    assert by_name["model.layers.0.mlp.up_proj"].rank == 8
    for module in report.modules:
        assert module.error == pytest.approx(difference(found[module.name], expected[module.name]), rel=0.3, abs=3e-7)


@pytest.mark.parametrize("rank", [None, 3, 100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sum_is_the_best_adapter_of_its_rank(rank: int | None, dtype: str, tmp_path: Path) -> None:
    """By default the largest rank at hand; the error of each module is the one reported."""
    weights = [0.7, -0.4, 2.0]
    folders = adapters(tmp_path, *MIXED)
    report = surgery.combine(*zip(folders, weights, strict=True), output=tmp_path / "out", rank=rank, dtype=dtype)
    expected = weighted_sum([deltas(folder) for folder in folders], weights)
    found = deltas(tmp_path / "out")
    for module in report.modules:
        total = expected[module.name]
        own = [one for one in module.ranks if one]
        assert module.rank == (max(own) if rank is None else min(rank, sum(own), *total.shape))
        least = difference(best(total, module.rank), total)
        error = difference(found[module.name], total)
        assert error <= least * (1 + 1e-6) + (3e-7 if dtype == "float32" else 6e-3)
        assert module.error == pytest.approx(error, rel=1e-4, abs=3e-7)
        assert module.energy_kept == pytest.approx(1 - error**2, abs=1e-6)
        assert module.from_sum == module.error
    together = sum(np.linalg.norm(found[n] - expected[n]) ** 2 for n in found)
    assert report.error == pytest.approx(
        (together / sum(np.linalg.norm(expected[n]) ** 2 for n in found)) ** 0.5, rel=1e-4, abs=3e-7
    )


def test_the_output_is_the_portable_profile(tmp_path: Path) -> None:
    """One alpha, the scale in B, no patterns but full names of ranks; targets that name what is there."""
    folders = adapters(tmp_path, *MIXED)
    surgery.combine(*folders, output=tmp_path / "out", base_name="org/base")
    found = read_json(tmp_path / "out" / "adapter_config.json")
    assert found["r"] == found["lora_alpha"] == 6
    assert not found["use_rslora"]
    assert found["alpha_pattern"] == {}
    assert found["rank_pattern"]["model.layers.1.mlp.gate_proj"] == 2
    assert found["target_modules"] == sorted(ALL)
    assert found["base_model_name_or_path"] == "org/base"
    tensors = stored(tmp_path / "out")
    ranks = {name.removesuffix(".lora_A.weight"): t.shape[0] for name, t in tensors.items() if "lora_A" in name}
    for name, rank in ranks.items():
        pattern = found["rank_pattern"].get(name.removeprefix("base_model.model."), found["r"])
        assert (tensors[f"{name}.lora_B.weight"].shape[1], pattern) == (rank, rank)
    assert "base_model: org/base" in (tmp_path / "out" / "README.md").read_text()
    assert surgery.verify(tmp_path / "out").passed


def test_targets_of_a_few_layers_are_named_in_full(tmp_path: Path) -> None:
    """A name that one adapter uses for some layers only must not select all of them."""
    folders = adapters(
        tmp_path, config(target_modules=["q_proj"], layers_to_transform=[1]), config(target_modules=["v_proj"])
    )
    surgery.combine(*folders, output=tmp_path / "out")
    found = read_json(tmp_path / "out" / "adapter_config.json")
    assert found["target_modules"] == ["model.layers.1.self_attn.q_proj", "v_proj"]
    assert len(deltas(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("gpt2", ["c_attn", "wte"]),
        ("vit", ["q_proj", "projection"]),
        ("bert", ["query", "word_embeddings"]),
        ("t5", ["q", "wo"]),
    ],
)
def test_other_kinds_of_layers(family: str, targets: list[str], tmp_path: Path) -> None:
    """Conv1D, embeddings, convolutions."""
    model = make(family)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    here = [name for name in targets if name in names] or ["query", "projection"]
    folders = adapters(tmp_path, config(r=4, target_modules=here), config(r=3, target_modules=here), family=family)
    surgery.combine((folders[0], 0.6), (folders[1], -1.5), output=tmp_path / "out", rank=5)
    expected = weighted_sum([deltas(folder, family) for folder in folders], [0.6, -1.5])
    found = deltas(tmp_path / "out", family)
    assert found.keys() == expected.keys()
    for name, total in expected.items():
        assert difference(found[name], total) <= difference(best(total, 5), total) * (1 + 1e-6) + 3e-7
    if family == "gpt2":
        assert read_json(tmp_path / "out" / "adapter_config.json")["fan_in_fan_out"]


@pytest.mark.parametrize("method", ["sum", "cat", "ties"])
def test_experts(method: str, tmp_path: Path) -> None:
    """Stacked experts: merging the combination is merging all; PEFT loads it."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folders = adapters(
        tmp_path,
        config(target_modules=["q_proj"], target_parameters=parameters[:1]),
        config(r=3, target_modules=["v_proj"], target_parameters=parameters),
        family="mixtral",
    )
    rank = None if method == "cat" else 7
    given = [(folders[0], 0.5), (folders[1], -1.0)]
    report = surgery.combine(*given, output=tmp_path / "out", method=method, rank=rank)
    shapes = {module.name: module.shape for module in report.modules}
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (4, 96, 32)
    assert shapes["model.layers.0.mlp.experts.down_proj"] == (4, 32, 48)
    loaded(tmp_path / "out", family="mixtral")
    if method == "ties":
        return
    base = save(make("mixtral"), tmp_path / "base")
    surgery.merge(base, *given, output=tmp_path / "one")
    surgery.merge(base, tmp_path / "out", output=tmp_path / "other")
    one, other = stored(tmp_path / "one"), stored(tmp_path / "other")
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6
    assert any(not torch.equal(one[name], tensor) for name, tensor in stored(base).items())


# Methods on dW --------------------------------------------------------------------------------------------------------

PEFT_ON_DELTAS = {"ties": "ties_svd", "magnitude-prune": "magnitude_prune_svd", "sum": "svd"}


@pytest.mark.parametrize("method", PEFT_ON_DELTAS)
def test_methods_on_dw_are_pefts(method: str, tmp_path: Path) -> None:
    """With positive weights, what PEFT factors after merging every dW whole."""
    folders = adapters(tmp_path, config(), config(r=6, lora_alpha=3, target_modules=["q_proj", "up_proj"]))
    surgery.combine((folders[0], 0.7), (folders[1], 0.4), output=tmp_path / "out", method=method, density=0.3, rank=5)
    model = loaded(*folders)
    model.add_weighted_adapter(["0", "1"], [0.7, 0.4], "both", PEFT_ON_DELTAS[method], svd_rank=5, density=0.3)
    found = deltas(tmp_path / "out")
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            expected = layer.get_delta_weight("both").detach().double().numpy()
            assert difference(found[name.removeprefix("base_model.model.")], expected) < 1e-4


@pytest.mark.parametrize("method", ["ties", "dare-ties", "dare-linear", "magnitude-prune"])
def test_what_the_rank_loses_is_measured(method: str, tmp_path: Path) -> None:
    """The error is least for the rank, and the distance from the plain sum is that of PEFT's dW."""
    folders = adapters(tmp_path, config(), config(r=6, lora_alpha=3))
    options: dict[str, Any] = {"method": method, "density": 0.4, "seed": 5}
    given = [(folders[0], 0.7), (folders[1], -0.4)]
    report = surgery.combine(*given, output=tmp_path / "out", rank=5, **options)
    surgery.combine(*given, output=tmp_path / "whole", rank=32, **options)
    total = weighted_sum([deltas(folder) for folder in folders], [0.7, -0.4])
    found, whole = deltas(tmp_path / "out"), deltas(tmp_path / "whole")
    for module in report.modules:
        least = difference(best(whole[module.name], 5), whole[module.name])
        assert module.error == pytest.approx(least, rel=1e-3)
        assert module.from_sum == pytest.approx(difference(found[module.name], total[module.name]), rel=1e-4)
    assert any("no low rank of its own" in note for note in report.notes)


@pytest.mark.parametrize("method", ["tsv", "iso"])
def test_methods_on_singular_vectors(method: str, tmp_path: Path) -> None:
    """Against the papers' steps on whole matrices."""
    folders = adapters(tmp_path, config(), config(r=6, lora_alpha=3))
    report = surgery.combine((folders[0], 0.7), (folders[1], -0.4), output=tmp_path / "out", method=method, rank=6)
    parts = [deltas(folder) for folder in folders]
    found = deltas(tmp_path / "out")
    for name in found:
        scaled = [0.7 * parts[0][name], -0.4 * parts[1][name]]
        if method == "tsv":
            expected = tsv_reference(scaled, [3, 3])
        else:
            U, S, Vh = np.linalg.svd(sum(scaled), full_matrices=False)
            expected = S[:6].mean() * U[:, :6] @ Vh[:6]
        assert difference(found[name], expected) < 1e-5
    assert report.error < 1e-6
    assert report.from_sum is not None
    assert report.from_sum > 0.05


@pytest.mark.parametrize("method", ["sum", "ties"])
def test_energy_chooses_the_least_rank(method: str, tmp_path: Path) -> None:
    folders = adapters(tmp_path, config(target_modules=ALL), config(r=6, lora_alpha=3))
    given = [(folders[0], 0.7), (folders[1], -0.4)]
    report = surgery.combine(*given, output=tmp_path / "out", method=method, energy=0.8)
    surgery.combine(*given, output=tmp_path / "whole", method=method, rank=48)
    whole = deltas(tmp_path / "whole")
    for module in report.modules:
        energies = np.linalg.svd(whole[module.name], compute_uv=False) ** 2
        assert module.rank == int(np.searchsorted(np.cumsum(energies) / energies.sum(), 0.8)) + 1
        assert module.energy_kept >= 0.8 - 1e-6
    loaded(tmp_path / "out")


# As PEFT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.5]])
@pytest.mark.parametrize("method", ["linear", "ties", "magnitude-prune", "cat", "sum"])
def test_as_peft(method: str, weights: list[float], tmp_path: Path) -> None:
    """A and B themselves are PEFT's; of `svd`, whose vectors have no sign, the product."""
    folders = adapters(tmp_path, config(), config(lora_alpha=3, use_rslora=True))
    report = surgery.combine(
        *zip(folders, weights, strict=True), output=tmp_path / "out", method=method, as_peft=True, density=0.3
    )
    model = loaded(*folders)
    kind = {"sum": "svd"}.get(method, method.replace("-", "_"))
    model.add_weighted_adapter(["0", "1"], weights, "both", kind, density=0.3)
    tensors = stored(tmp_path / "out")
    total = weighted_sum([deltas(folder) for folder in folders], weights)
    for module in report.modules:
        layer = model.get_submodule(f"base_model.model.{module.name}")
        A, B = layer.lora_A["both"].weight.detach(), layer.lora_B["both"].weight.detach()
        key = f"base_model.model.{module.name}.lora"
        if method == "sum":
            product = tensors[f"{key}_B.weight"] @ tensors[f"{key}_A.weight"]
            assert difference(product.double().numpy(), (B @ A).double().numpy()) < 1e-5
        else:
            assert torch.allclose(tensors[f"{key}_A.weight"], A, rtol=1e-6, atol=1e-8)
            assert torch.allclose(tensors[f"{key}_B.weight"], B, rtol=1e-6, atol=1e-8)
        expected = difference((B.double() @ A.double()).numpy(), total[module.name])
        assert module.error == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
def test_as_peft_at_random(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our draws in place of PEFT's, which cannot be seeded, A and B are PEFT's."""
    only = r"model\.layers\.0\.self_attn\.q_proj"
    folders = adapters(tmp_path, config(target_modules=only), config(target_modules=only))
    surgery.combine((folders[0], 0.7), (folders[1], -0.4), output=tmp_path / "out", method=method, as_peft=True, seed=3)
    calls = iter([(number, factor) for factor in "AB" for number in range(2)])

    def draw(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        number, factor = next(calls)
        seed = seed_for(3, f"model.layers.0.self_attn.q_proj#0#{number}#{factor}")
        return drop_at_random(tensor.clone(), density, seed)

    monkeypatch.setattr(merge_utils, "random_pruning", draw)
    model = loaded(*folders)
    model.add_weighted_adapter(["0", "1"], [0.7, -0.4], "both", method.replace("-", "_"), density=0.5)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    tensors = stored(tmp_path / "out")
    for which in "AB":
        (found,) = [tensor for name, tensor in tensors.items() if f"lora_{which}" in name]
        assert torch.allclose(found, getattr(layer, f"lora_{which}")["both"].weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"method": "cat"}, {"method": "linear", "as_peft": True}, {"method": "tsv"}])
def test_ranks_larger_than_the_matrices(options: dict[str, Any], tmp_path: Path) -> None:
    """A result is no larger than it need be, and PEFT loads it."""
    folders = adapters(tmp_path, config(r=40), config(r=40, lora_alpha=3))
    report = surgery.combine((folders[0], 0.7), (folders[1], 0.4), output=tmp_path / "out", **options)
    rank = {module.name: module.rank for module in report.modules}["model.layers.0.self_attn.k_proj"]
    assert rank == {"cat": 80, "linear": 40}.get(options.get("method", ""), 16)
    found, expected = deltas(tmp_path / "out"), weighted_sum([deltas(folder) for folder in folders], [0.7, 0.4])
    if options.get("method") in (None, "cat"):
        assert max(difference(found[name], expected[name]) for name in found) < 3e-7


# Resizing -------------------------------------------------------------------------------------------------------------


def test_resize_is_the_nearest_adapter_of_the_rank(tmp_path: Path) -> None:
    (folder,) = adapters(tmp_path, config(r=8, use_rslora=True, alpha_pattern={"k_proj": 30}))
    report = surgery.resize(folder, output=tmp_path / "out", rank=3)
    before, after = deltas(folder), deltas(tmp_path / "out")
    for module in report.modules:
        least = difference(best(before[module.name], 3), before[module.name])
        assert difference(after[module.name], before[module.name]) == pytest.approx(least, rel=1e-6)
        assert module.error == pytest.approx(least, rel=1e-6)
    assert read_json(tmp_path / "out" / "surgery.json")["operation"] == "resize"


def test_resize_keeps_what_is_stored_whole(tmp_path: Path) -> None:
    """Heads, biases, and files beside the weights; the same bits."""
    (folder,) = adapters(
        tmp_path,
        config(target_modules=["query"], modules_to_save=["classifier"], bias="lora_only", task_type="SEQ_CLS"),
        family="bert",
    )
    (folder / "notes.txt").write_text("mine\n")
    report = surgery.resize(folder, output=tmp_path / "out", rank=2)
    before, after = stored(folder), stored(tmp_path / "out")
    whole = [name for name in before if "lora" not in name]
    assert sorted(report.stored_whole) == sorted(whole)
    assert all(torch.equal(before[name], after[name]) for name in whole)
    assert any("classifier" in name for name in whole)
    assert any(name.endswith(".bias") for name in whole)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine\n"
    loaded(tmp_path / "out", family="bert")


def test_resize_keeps_replaced_rows(tmp_path: Path) -> None:
    """Rows of the vocabulary that were trained go along with their numbers."""
    (folder,) = adapters(tmp_path, config(target_modules=["q_proj"], trainable_token_indices=[1, 5]))
    surgery.resize(folder, output=tmp_path / "out", rank=2)
    assert read_json(tmp_path / "out" / "adapter_config.json")["trainable_token_indices"] == [1, 5]
    (key,) = [key for key in stored(folder) if "trainable_tokens" in key]
    assert torch.equal(stored(folder)[key], stored(tmp_path / "out")[key])
    loaded(tmp_path / "out")


def test_resize_wants_to_know_to_what(tmp_path: Path) -> None:
    (folder,) = adapters(tmp_path, config())
    with pytest.raises(OptionError, match="Give --rank or --energy"):
        surgery.resize(folder, output=tmp_path / "out")


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sum", "cat", "ties", "dare-ties", "tsv", "iso"])
def test_bytes_do_not_depend_on_threads(method: str, tmp_path: Path) -> None:
    folders = [square_adapter(tmp_path / name, 3, 200, rank) for name, rank in (("a", 4), ("b", 7))]
    for threads in (1, 3):
        surgery.combine(*folders, output=tmp_path / f"out{threads}", method=method, rank=None, threads=threads)
    assert not unequal(tmp_path / "out1", tmp_path / "out3")


def test_seeds_matter_to_dare_only(tmp_path: Path) -> None:
    folders = [square_adapter(tmp_path / name, 1, 40, 4) for name in "ab"]
    weights = {}
    for method in ("dare-linear", "sum"):
        for seed in (0, 1):
            surgery.combine(*folders, output=tmp_path / f"{method}{seed}", method=method, seed=seed)
            weights[method, seed] = (tmp_path / f"{method}{seed}" / "adapter_model.safetensors").read_bytes()
    assert weights["dare-linear", 0] != weights["dare-linear", 1]
    assert weights["sum", 0] == weights["sum", 1]


def test_nothing_in_the_output_names_a_path(tmp_path: Path) -> None:
    folders = [square_adapter(tmp_path / name, 1, 40, 4) for name in "ab"]
    for number, name in enumerate(("org/base", "elsewhere/base")):
        _edit(folders[number], base_model_name_or_path=name)
    surgery.combine(*folders, output=tmp_path / "out")
    assert not [name for name, data in tree(tmp_path / "out").items() if str(tmp_path).encode() in data]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    folders = [square_adapter(tmp_path / name, 2, 40, 4) for name in "ab"]
    report = surgery.combine(*folders, output=tmp_path / "out", dry_run=True)
    assert report.dry_run
    assert report.plan.computed_tensors == 4
    assert report.plan.read_bytes == 2 * 2 * 2 * 4 * 40 * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_memory_of_an_elementwise_method_is_bounded(tmp_path: Path) -> None:
    """A dW of 3.2 GB is planned with tiles, not whole."""
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        factors = {
            f"base_model.model.m.lora_{w}.weight": torch.zeros(s) for w, s in (("A", (1, 28672)), ("B", (28672, 1)))
        }
        save_file(factors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["m"]}'
        )
    report = surgery.combine(tmp_path / "a", tmp_path / "b", output=tmp_path / "out", method="ties", dry_run=True)
    assert report.plan.peak_memory_bytes < 500e6


# Refusals -------------------------------------------------------------------------------------------------------------


def _edit(folder: Path, **settings: Any) -> Path:
    place = folder / "adapter_config.json"
    place.write_text(json.dumps(read_json(place) | settings))
    return folder


def _refused(kind: type[Exception], sentence: str, *folders: Any, **options: Any) -> None:
    place = folders[0] if isinstance(folders[0], Path) else folders[0][0]
    before = {path.name for path in place.parent.iterdir()}
    with pytest.raises(kind) as caught:
        surgery.combine(*folders, output=place.parent / "out", **options)
    problems = getattr(caught.value, "problems", ())
    assert sentence in "\n".join([str(caught.value), *problems])
    assert {path.name for path in place.parent.iterdir()} == before


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [square_adapter(tmp_path / name, 2, 12, 3) for name in "ab"]


def test_other_bases_are_refused(two: list[Path], tmp_path: Path) -> None:
    _edit(two[0], base_model_name_or_path="org/one")
    _edit(two[1], base_model_name_or_path="org/two")
    _refused(MismatchError, f"{two[0]} is for the base 'org/one' and {two[1]} for 'org/two'; pass --any-base", *two)
    report = surgery.combine(*two, output=tmp_path / "out", any_base=True)
    assert report.notes == ("a is for the base 'org/one', b for 'org/two'.",)
    _edit(two[1], base_model_name_or_path="/models/one")
    report = surgery.combine(*two, output=tmp_path / "other")
    assert report.notes == ("a calls its base 'org/one', b '/models/one'; taken for one.",)


def test_shapes_that_differ_are_named(two: list[Path]) -> None:
    shutil.rmtree(two[1])
    square_adapter(two[1], 2, 14, 3)
    _refused(MismatchError, f"'m.0' is linear of 14 x 14 in {two[1]} and linear of 12 x 12 in {two[0]}", *two)


def test_other_names_for_a_module_are_seen(two: list[Path]) -> None:
    tensors = load_file(two[1] / "adapter_model.safetensors")
    renamed = {key.replace("model.m.", "model.trunk.m."): tensor for key, tensor in tensors.items()}
    save_file(renamed, two[1] / "adapter_model.safetensors")
    _refused(MismatchError, f"{two[0]} calls a module 'm.0' and {two[1]} calls it 'trunk.m.0'", *two)


def test_one_stack_and_single_experts_are_told_apart(tmp_path: Path) -> None:
    """They would become wrappers around the same weights, which PEFT does not load."""
    down = ["mlp.experts.down_proj"]
    (stack,) = adapters(tmp_path, config(target_modules=[], target_parameters=down), family="mixtral")
    single = square_adapter(tmp_path / "b", 1, 12, 3)
    tensors = load_file(single / "adapter_model.safetensors")
    renamed = {key.replace("m.0", "model.layers.0.mlp.experts.2.w2"): tensor for key, tensor in tensors.items()}
    save_file(renamed, single / "adapter_model.safetensors")
    sentence = f"{stack} has 'model.layers.0.mlp.experts' in one stack and {single} has parts of it one by one"
    _refused(MismatchError, sentence, stack, single)


def test_a_rank_that_the_config_does_not_give_is_refused(two: list[Path]) -> None:
    _edit(two[1], r=5)
    _refused(MismatchError, "'m.0' has rank 3, which adapter_config.json does not give it.", *two)


def test_what_is_not_a_number_is_refused(two: list[Path]) -> None:
    tensors = load_file(two[1] / "adapter_model.safetensors")
    tensors["base_model.model.m.1.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, two[1] / "adapter_model.safetensors")
    for method in ("sum", "ties"):
        _refused(NonFiniteError, "Tensor 'base_model.model.m.1.lora_B.weight' in", *two, method=method)


def test_an_overflow_is_refused(two: list[Path]) -> None:
    for weight, method in ((1e300, "sum"), (1e80, "sum"), (1e39, "magnitude-prune")):
        sentence = "is beyond the range of numbers; scale the adapters down."  # whichever module comes first
        _refused(NonFiniteError, sentence, (two[0], weight), two[1], method=method)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"use_dora": True}, "is a DoRA adapter (at 'model.layers.0.self_attn.q_proj'), whose change is no product of"),
        ({"lora_bias": True}, "has trained biases of lora_B (lora_bias, at 'model.layers.0.self_attn.q_proj')"),
    ],
)
def test_variants_are_refused_with_the_remedy(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folders = adapters(tmp_path, config(target_modules=["q_proj"]), config(target_modules=["q_proj"], **settings))
    _refused(UnsupportedError, sentence, *folders)
    _refused(UnsupportedError, "merge it into its base with `surgery merge`", *folders)


def test_what_is_stored_whole_has_no_sum(tmp_path: Path) -> None:
    settings = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    folders = adapters(tmp_path, config(**settings), config(**settings), family="bert")
    _refused(UnsupportedError, "whole (modules_to_save, bias or token rows), which has no sum with anything", *folders)
    _refused(UnsupportedError, "pass --drop-saved to leave it out", (folders[0], 0.5))
    report = surgery.combine(*folders, output=tmp_path / "out", drop_saved=True)
    assert any("Left out, as asked: base_model.model.classifier" in note for note in report.notes)
    assert any("task_type is left empty" in note for note in report.notes)
    loaded(tmp_path / "out", family="bert")


def test_the_bases_own_embedding_goes_along(tmp_path: Path) -> None:
    """PEFT stores it beside the factors; the same in both is kept, another in each is refused."""
    base = save(make("llama"), tmp_path / "base")
    folders = []
    for number in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_pretrained(base)
            folders.append(write_adapter(model, config(target_modules=["embed_tokens"]), tmp_path / f"a{number}"))
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in stored(folders[0])
    report = surgery.combine(*folders, output=tmp_path / "out")
    assert report.stored_whole == (key,)
    tensors = stored(folders[1])
    tensors[key] = tensors[key] + 1
    save_file(tensors, folders[1] / "adapter_model.safetensors")
    _refused(UnsupportedError, f"hold different base matrices at {key!r}", *folders, overwrite=True)


def test_as_peft_says_what_peft_cannot(tmp_path: Path) -> None:
    ranks = adapters(tmp_path, config(), config(r=6))
    sentence = "has ranks 4, 6 in these adapters, and --as-peft ties needs one rank"
    _refused(MismatchError, sentence, *ranks, method="ties", as_peft=True)
    experts = adapters(
        tmp_path / "m", config(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]), family="mixtral"
    )
    _refused(MismatchError, "is a parameter, whose adapters PEFT does not combine", *experts, as_peft=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "slerp"}, "--method is 'slerp', expected one of sum, cat, tsv, iso, ties"),
        ({"method": "linear"}, "--method linear adds A and B separately"),
        ({"method": "tsv", "as_peft": True}, "--as-peft has no method 'tsv'"),
        ({"rank": 2, "energy": 0.5}, "--rank and --energy exclude each other"),
        ({"method": "cat", "rank": 2}, "--rank does not go with --method cat, whose rank follows from the adapters"),
        ({"method": "ties", "as_peft": True, "energy": 0.5}, "--energy does not go with --method ties --as-peft"),
        ({"method": "tsv", "energy": 0.5}, "--energy does not go with --method tsv"),
        ({"rank": 0}, "--rank is 0, expected at least 1."),
        ({"energy": 1.5}, "--energy is 1.5, expected a share above 0 and at most 1."),
        ({"density": 0.0}, "--density is 0.0, expected a share above 0 and at most 1."),
        ({"dtype": "float16"}, "--dtype is 'float16', expected 'float32' or 'bfloat16'."),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str, two: list[Path]) -> None:
    _refused(OptionError, sentence, *two, **options)


def test_an_output_that_exists_stays(two: list[Path], tmp_path: Path) -> None:
    surgery.combine(*two, output=tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        surgery.combine(*two, output=tmp_path / "out", rank=1)
    assert tree(tmp_path / "out") == before
    surgery.combine(*two, output=tmp_path / "out", rank=1, overwrite=True)
    assert tree(tmp_path / "out") != before


def test_the_command_line(two: list[Path], tmp_path: Path) -> None:
    """Weights are read from the references; reports are the library's."""
    done = run_cli("combine", f"{two[0]}=0.5", f"{two[1]}=-1", "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] == [0.5, -1.0]
    report = surgery.combine((two[0], 0.5), (two[1], -1.0), output=tmp_path / "again")
    assert json.loads(json.dumps(report.as_dict()))["modules"] == found["modules"]
    assert not unequal(tmp_path / "out", tmp_path / "again")
    shown = run_cli("resize", tmp_path / "out", "--rank", "2", "-o", tmp_path / "small")
    assert shown.returncode == 0, shown.stderr
    assert "of the energy of dW" in shown.stdout
    assert run_cli("resize", two[0], "-o", tmp_path / "none").returncode == 2
    assert run_cli("combine", two[0], tmp_path / "nowhere", "-o", tmp_path / "none").returncode == 1
    assert not (tmp_path / "none").exists()

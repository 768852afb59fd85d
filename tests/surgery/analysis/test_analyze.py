"""`surgery.analyze` against numpy in float64 on the whole dW that PEFT computes, and what it refuses."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import surgery
from surgery.analysis import steps
from surgery.analysis.report import AnalyzedModule, AnalyzeReport
from surgery.errors import MismatchError, NonFiniteError, OptionError, UnsupportedError
from tests.models import invent, make, save
from tests.peft_tools import stored, write_adapter
from tests.tools import square_adapter, square_checkpoint

Array = np.ndarray[Any, Any]


def by_name(report: AnalyzeReport) -> dict[str, AnalyzedModule]:
    return {module.name: module for module in report.modules}


def phi_of(left: Array, right: Array) -> float:
    """By principal angles: the mean squared cosine."""
    cosines = np.linalg.svd(left.T @ right, compute_uv=False)
    return float((cosines**2).sum() / min(left.shape[1], right.shape[1]))


def check_against_numpy(module: AnalyzedModule, W: Array, dW: Array, rank: int, number: int = 0) -> None:
    """Everything that is said of an update, from the dense matrices (out, in)."""
    (found,) = [one for one in module.updates if one.adapter == number]
    U, S, Vh = np.linalg.svd(dW, full_matrices=False)
    U, S, V = U[:, :rank], S[:rank], Vh[:rank].T
    own_U, own_S, own_Vh = np.linalg.svd(W, full_matrices=False)

    def close(value: Any) -> Any:
        return pytest.approx(value, rel=1e-5, abs=1e-7)

    assert (found.rank, found.directions, module.shape) == (rank, rank, W.shape)
    assert found.spectrum.values == close(S)
    assert module.norm == close(np.linalg.norm(W))
    assert found.change == close(np.linalg.norm(dW) / np.linalg.norm(W))
    seen = np.linalg.norm(U.T @ W @ V)
    assert found.seen == close(seen)
    assert found.own == close(np.linalg.norm(own_S[:rank]))
    assert found.chance == close(rank * np.linalg.norm(W) / math.sqrt(W.size))
    assert found.amplification == close(np.linalg.norm(dW) / seen)
    assert found.chance_amplification == close(np.linalg.norm(dW) / found.chance)
    assert found.output is not None
    assert found.input is not None
    for overlap, mine, own in ((found.output, U, own_U), (found.input, V, own_Vh.T)):
        assert overlap.whole == pytest.approx(phi_of(mine, own[:, :rank]), abs=1e-5)
        assert overlap.chance == rank / len(mine)
        for i, row in enumerate(overlap.phi, 1):
            for j, value in enumerate(row, 1):
                assert value == pytest.approx(phi_of(mine[:, :i], own[:, :j]), abs=1e-4)


def deltas(base: Path, adapter: Path, family: str) -> dict[str, Array]:
    """dW (as the weight is stored) of every module that PEFT wraps, in float64, by the module's name."""
    import transformers

    from tests.models import FAMILIES

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, FAMILIES[family][0]).from_pretrained(base, dtype=torch.float32)
        wrapped = PeftModel.from_pretrained(model, adapter)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double().numpy()
        for name, module in wrapped.named_modules()
        if hasattr(module, "get_delta_weight") and not name.endswith("base_layer")
    }


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8}),
    "rsLoRA and patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "r": 4,
            "lora_alpha": 3,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 11},
        },
    ),
    "stored transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "r": 3, "fan_in_fan_out": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens"], "r": 3}),
    "a tied head": ("llama-tied", {"target_modules": ["lm_head"], "r": 3}),
    "a convolution": ("vit", {"target_modules": ["projection"], "r": 2}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_update_is_what_numpy_says_of_it(case: str, tmp_path: Path) -> None:
    family, config = CASES[case]
    model = make(family)
    base = save(model, tmp_path / "base")
    adapter = write_adapter(model, LoraConfig(**config), tmp_path / "adapter")
    report = surgery.analyze(base, adapter)
    expected = deltas(base, adapter, family)
    weights = stored(base)
    assert len(report.modules) == len(expected) > 0
    for module in report.modules:
        name = module.name.removesuffix(".weight")
        dW = expected[name]
        held = weights.get(module.name, weights.get("model.embed_tokens.weight"))
        assert held is not None
        W = held.double().numpy()
        W, dW = W.reshape(len(W), -1), dW.reshape(len(dW), -1)
        if case in ("stored transposed", "embeddings"):
            W, dW = W.T, dW.T
        rank = 2 if "v_proj" in name and config.get("rank_pattern") else config["r"]
        check_against_numpy(module, W, dW, rank)


def test_experts_are_looked_at_one_by_one(tmp_path: Path) -> None:
    """A stack of factors for fused experts: each expert's rows, as it is stored."""
    model = make("mixtral")
    base = save(model, tmp_path / "base")
    config = LoraConfig(target_parameters=["mlp.experts.gate_up_proj"], target_modules=[], r=2, lora_alpha=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = write_adapter(model, config, tmp_path / "adapter")
    found = by_name(surgery.analyze(base, adapter))
    factors = load_file(adapter / "adapter_model.safetensors")
    weights = stored(base)
    assert len(found) == 2 * 4 * 2
    for layer, expert, (half, name) in ((0, 0, (0, "w1")), (1, 3, (1, "w3"))):
        prefix = f"base_model.model.model.layers.{layer}.mlp.experts"
        (a,) = [t for key, t in factors.items() if key.startswith(prefix) and "lora_A" in key]
        (b,) = [t for key, t in factors.items() if key.startswith(prefix) and "lora_B" in key]
        A, B = a[2 * expert : 2 * expert + 2].double().numpy(), b[:, expert::4].double().numpy()
        dW = 2.5 * B @ A
        rows = len(dW) // 2
        module = found[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"]
        assert module.group == f"block_sparse_moe.experts.*.{name}"
        W = weights[module.name].double().numpy()
        check_against_numpy(module, W, dW[half * rows : (half + 1) * rows], 2)


def test_a_stored_stack_names_its_experts(tmp_path: Path) -> None:
    """GPT-OSS stores (experts, in, out): the orientation is turned and the slice is named."""
    base = save(make("gpt_oss"), tmp_path / "base")
    found = by_name(surgery.analyze(base, targets="experts"))
    W = stored(base)["model.layers.1.mlp.experts.down_proj"][2].double().numpy().T
    module = found["model.layers.1.mlp.experts.down_proj[2]"]
    assert module.shape == W.shape
    assert module.spectrum is not None
    assert module.spectrum.values == pytest.approx(np.linalg.svd(W, compute_uv=False), rel=1e-5, abs=1e-6)


# Known subspaces ------------------------------------------------------------------------------------------------------

SIDE = 12


def by_hand(folder: Path, B: torch.Tensor, A: torch.Tensor, **config: object) -> Path:
    """An adapter for the one matrix of `square_checkpoint`."""
    folder.mkdir()
    names = "base_model.model.m.0.lora_{}.weight"
    save_file(
        {names.format("B"): B.contiguous(), names.format("A"): A.contiguous()}, folder / "adapter_model.safetensors"
    )
    rank = len(A)
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["m.0"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def diagonal_base(folder: Path) -> Path:
    """W = diag(12, 11, ..., 1)."""
    square_checkpoint(folder, 1, SIDE)
    save_file({"m.0.weight": torch.diag(torch.arange(SIDE, 0, -1.0))}, folder / "model.safetensors")
    return folder


def axes(*numbers: int) -> torch.Tensor:
    return torch.eye(SIDE)[:, list(numbers)]


def test_directions_that_are_known(tmp_path: Path) -> None:
    """dW = 6 e_11 e_11^T on W = diag(12 ... 1): amplified sixfold, and orthogonal to W's first direction."""
    base = diagonal_base(tmp_path / "base")
    weak = by_hand(tmp_path / "weak", 6 * axes(11), axes(11).T)
    strong = by_hand(tmp_path / "strong", 6 * axes(0, 1), axes(0, 1).T)
    mixed = by_hand(tmp_path / "mixed", axes(0, 5), axes(3, 1).T)
    (module,) = surgery.analyze(base, weak, strong, mixed).modules
    first, second, third = module.updates
    assert first.amplification == pytest.approx(6)
    assert second.amplification == pytest.approx(6 * math.sqrt(2) / math.sqrt(12**2 + 11**2))
    assert third.amplification is None  # W has nothing between e_0 and e_3, nor between e_5 and e_1
    assert third.seen == 0
    assert first.output is not None
    assert second.input is not None
    assert third.output is not None
    assert third.input is not None
    assert [first.output.whole, second.input.whole] == pytest.approx([0, 1])
    assert [third.output.whole, third.input.whole] == pytest.approx([0.5, 0.5])
    pairs = {(pair.left, pair.right): pair for pair in module.pairs}
    assert set(pairs) == {(0, 1), (0, 2), (1, 2)}
    pair = pairs[1, 2]
    assert pair.output is not None
    assert pair.input is not None
    assert [pair.output.whole, pair.input.whole] == pytest.approx([0.5, 0.5])
    assert pair.cosine == pytest.approx(0)


def test_an_adapter_and_itself(tmp_path: Path) -> None:
    """phi is 1 on the diagonal at every rank, whatever weight one of them has; the cosine has its sign."""
    base, adapter = square_checkpoint(tmp_path / "base", 2, 20), square_adapter(tmp_path / "adapter", 2, 20)
    report = surgery.analyze(base, adapter, (adapter, -0.5))
    assert report.weights == (1.0, -0.5)
    for module in report.modules:
        (pair,) = module.pairs
        assert pair.output is not None
        assert pair.input is not None
        for overlap in (pair.output, pair.input):
            assert np.diag(np.array(overlap.phi)) == pytest.approx(np.ones(4))
            assert overlap.whole == pytest.approx(1)
        assert pair.cosine == pytest.approx(-1)
        one, other = module.updates
        assert other.spectrum.norm == pytest.approx(one.spectrum.norm / 2)
        assert other.amplification == pytest.approx(one.amplification / 2 if one.amplification else None)


def test_an_update_of_zeros(tmp_path: Path) -> None:
    """An untrained adapter has no directions, and nothing that depends on them."""
    base = diagonal_base(tmp_path / "base")
    nothing = by_hand(tmp_path / "nothing", torch.zeros(SIDE, 3), axes(1, 2, 3).T)
    (module,) = surgery.analyze(base, nothing, nothing).modules
    found = module.updates[0]
    assert (found.rank, found.directions, found.change) == (3, 0, 0.0)
    assert (found.amplification, found.chance_amplification, found.output, found.input) == (None,) * 4
    assert module.pairs[0].cosine is None
    assert module.pairs[0].input is None


def test_a_weight_of_zeros(tmp_path: Path) -> None:
    base = diagonal_base(tmp_path / "base")
    save_file({"m.0.weight": torch.zeros(SIDE, SIDE)}, base / "model.safetensors")
    adapter = by_hand(tmp_path / "adapter", axes(1), axes(2).T)
    (module,) = surgery.analyze(base, adapter).modules
    (found,) = module.updates
    assert (found.change, found.amplification, found.output) == (None, None, None)
    (alone,) = surgery.analyze(base).modules
    assert alone.spectrum is not None
    assert alone.spectrum.effective_rank == 0


def test_a_large_weight_is_decomposed_at_random(tmp_path: Path) -> None:
    """Above the size for a full decomposition, to what the randomised one promises."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = steps.EXACT_SIDE + 40, steps.EXACT_SIDE + 90
    U, V = (torch.linalg.qr(torch.randn(side, 60, generator=generator)).Q for side in (rows, columns))
    W = U * 0.8 ** torch.arange(60) @ V.T + 1e-5 * torch.randn(rows, columns, generator=generator)
    base = square_checkpoint(tmp_path / "base", 1, 4)
    save_file({"m.0.weight": W}, base / "model.safetensors")
    B, A = U[:, [0, 2]] + 0.01 * torch.randn(rows, 2, generator=generator), V[:, [0, 9]].T
    adapter = by_hand(tmp_path / "adapter", B, A)
    (module,) = surgery.analyze(base, adapter).modules
    check_against_numpy(module, W.double().numpy(), B.double().numpy() @ A.double().numpy(), 2)
    again = surgery.analyze(base, adapter, threads=1)
    assert again == surgery.analyze(base, adapter, threads=3)


# Weights alone --------------------------------------------------------------------------------------------------------


def test_weights_alone(tmp_path: Path) -> None:
    """Singular values of every linear layer, by numpy; bfloat16 as it is stored."""
    base = save(make("llama"), tmp_path / "base", torch.bfloat16)
    report = surgery.analyze(base)
    weights = stored(base)
    assert set(by_name(report)) == {name for name in weights if "layers" in name and weights[name].dim() == 2}
    for module in report.modules:
        S = np.linalg.svd(weights[module.name].double().numpy(), compute_uv=False)
        assert module.spectrum is not None
        assert module.spectrum.values == pytest.approx(S, rel=1e-5, abs=1e-7 * S[0])
        assert module.norm == pytest.approx(np.linalg.norm(S))
        assert not module.updates
        assert not module.pairs
    groups = {(module.layer, module.group) for module in report.modules}
    assert (1, "self_attn.q_proj") in groups
    assert len(groups) == 14


def test_few_values_are_listed_of_many(tmp_path: Path) -> None:
    base = square_checkpoint(tmp_path / "base", 1, 200)
    (module,) = surgery.analyze(base, values=8).modules
    assert module.spectrum is not None
    assert module.spectrum.rank == 200
    assert module.spectrum.positions[0] == 1
    assert module.spectrum.positions[-1] == 200
    assert len(module.spectrum.values) == len(module.spectrum.positions) <= 10


def test_targets_and_layers_choose(tmp_path: Path) -> None:
    model = make("llama")
    base = save(model, tmp_path / "base")
    assert set(by_name(surgery.analyze(base, targets="q_proj", layers="last:1"))) == {
        "model.layers.1.self_attn.q_proj.weight"
    }
    adapter = write_adapter(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2), tmp_path / "adapter")
    assert set(by_name(surgery.analyze(base, adapter, targets="v_proj,o_proj", layers="0"))) == {
        "model.layers.0.self_attn.v_proj.weight"
    }
    assert len(surgery.analyze(base, adapter).modules) == 4


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    base = invent(tmp_path / "base")
    report = surgery.analyze(base)
    assert any(module.name == "trunk.stage.0.expert_bank.experts[2]" for module in report.modules)


def test_every_two_adapters_are_compared(tmp_path: Path) -> None:
    """Where both act; a note says how many matrices only one of them has."""
    model = make("llama")
    base = save(model, tmp_path / "base")
    targets = (["q_proj", "v_proj"], ["q_proj"], ["q_proj", "o_proj"])
    paths = [
        write_adapter(model, LoraConfig(target_modules=names, r=2 + n), tmp_path / f"a{n}", seed=n)
        for n, names in enumerate(targets)
    ]
    report = surgery.analyze(base, *paths)
    assert report.adapters == ("a0", "a1", "a2")
    found = {module.group: [(pair.left, pair.right) for pair in module.pairs] for module in report.modules}
    assert found == {"self_attn.q_proj": [(0, 1), (0, 2), (1, 2)], "self_attn.v_proj": [], "self_attn.o_proj": []}
    assert report.notes == ("Of 6 matrices, 4 have only one of the adapters; there is nothing to compare there.",)
    module = by_name(report)["model.layers.0.self_attn.q_proj.weight"]
    weights = [load_file(path / "adapter_model.safetensors") for path in paths]
    A, B = (
        [w[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight"].double().numpy() for w in weights]
        for x in "AB"
    )
    sides = [np.linalg.svd(b @ a, full_matrices=False) for a, b in zip(A, B, strict=True)]
    pair = module.pairs[2]
    assert pair.output is not None
    assert pair.input is not None
    for i in range(1, 4):
        for j in range(1, 5):
            for overlap, left, right in (
                (pair.output, sides[1][0], sides[2][0]),
                (pair.input, sides[1][2].T, sides[2][2].T),
            ):
                assert overlap.phi[i - 1][j - 1] == pytest.approx(phi_of(left[:, :i], right[:, :j]), abs=1e-6)


def test_what_has_no_factors_is_named(tmp_path: Path) -> None:
    model = make("llama")
    base = save(model, tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
    report = surgery.analyze(base, write_adapter(model, config, tmp_path / "adapter"))
    assert report.left_out == ("lm_head.weight of adapter",)
    assert {module.group for module in report.modules} == {"self_attn.q_proj"}


def test_the_report_is_plain_data(tmp_path: Path) -> None:
    base, adapter = square_checkpoint(tmp_path / "base", 1, 20), square_adapter(tmp_path / "adapter", 1, 20)
    report = surgery.analyze(base, adapter, adapter)
    read = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert read["modules"][0]["updates"][1]["adapter"] == 1
    assert read["modules"][0]["pairs"][0]["input"]["whole"] == pytest.approx(1)


# What is refused ------------------------------------------------------------------------------------------------------


def sentence(call: Any, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_a_dora_is_refused(tmp_path: Path) -> None:
    model = make("llama")
    base = save(model, tmp_path / "base")
    adapter = write_adapter(model, LoraConfig(target_modules=["q_proj"], r=2, use_dora=True), tmp_path / "adapter")
    assert sentence(lambda: surgery.analyze(base, adapter), UnsupportedError) == (
        f"{adapter} is a DoRA adapter (at 'model.layers.0.self_attn.q_proj'), whose change is no product of factors; "
        "merge it into its base with `surgery merge` and take a plain LoRA from the result with `surgery extract`."
    )


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    base = square_checkpoint(tmp_path / "base", 1, 12)
    adapter = square_adapter(tmp_path / "adapter", 1, 16)
    assert "but" in sentence(lambda: surgery.analyze(base, adapter), MismatchError)
    swapped = sentence(lambda: surgery.analyze(adapter, base), surgery.InputError)
    assert swapped == f"{adapter} is an adapter; BASE comes first; did you swap them?"


CHOICES: Mapping[str, tuple[dict[str, Any], str]] = {
    "no targets": ({"targets": " "}, "--targets is empty; leave it out, or name modules."),
    "unknown targets": ({"targets": "zz"}, "--targets: {base} has nothing called 'zz'; expected all-linear, attention"),
    "targets without factors": (
        {"targets": "m.1"},
        "--targets is 'm.1', which names nothing that the adapters act on.",
    ),
    "no layers": ({"layers": "0"}, "--layers is '0', but {base} has no numbered layers; leave it out."),
    "no directions": ({"directions": 0}, "--directions is 0, expected at least 1."),
    "few values": ({"values": 3}, "--values is 3, expected at least 4."),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choices_that_name_nothing(case: str, tmp_path: Path) -> None:
    keywords, expected = CHOICES[case]
    base, adapter = square_checkpoint(tmp_path / "base", 2, 12), square_adapter(tmp_path / "adapter", 1, 12)
    assert sentence(lambda: surgery.analyze(base, adapter, **keywords), OptionError).startswith(
        expected.format(base=base)
    )


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    model = make("llama")
    base = save(model, tmp_path / "base")
    adapter = write_adapter(
        model, LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], r=2), tmp_path / "adapter"
    )
    assert sentence(lambda: surgery.analyze(base, layers="7"), OptionError) == (
        "--layers names layer 7, but the model has the layers 0 to 1; layers count from zero."
    )
    assert sentence(lambda: surgery.analyze(base, adapter, layers="1"), OptionError) == (
        "--layers is '1', and nothing that was chosen to be looked at lies there."
    )


def test_numbers_that_are_none(tmp_path: Path) -> None:
    base, adapter = square_checkpoint(tmp_path / "base", 1, 12), square_adapter(tmp_path / "adapter", 1, 12)
    file = adapter / "adapter_model.safetensors"
    factors = load_file(file)
    key = "base_model.model.m.0.lora_A.weight"
    save_file({**factors, key: factors[key].fill_(math.nan)}, file)
    assert sentence(lambda: surgery.analyze(base, adapter), NonFiniteError) == (
        f"Tensor {key!r} in {file} holds NaN or infinity; mend the adapter or train it again."
    )
    save_file({"m.0.weight": torch.full((12, 12), math.inf)}, base / "model.safetensors")
    assert sentence(lambda: surgery.analyze(base), NonFiniteError) == (
        f"Tensor 'm.0.weight' in {base / 'model.safetensors'} holds NaN or infinity, which has no singular values; "
        "mend it, or leave it out with --targets."
    )


def test_a_weight_that_holds_no_plain_numbers(tmp_path: Path) -> None:
    base = square_checkpoint(tmp_path / "base", 1, 12)
    save_file({"m.0.weight": torch.ones(12, 12, dtype=torch.int8)}, base / "model.safetensors")
    assert sentence(lambda: surgery.analyze(base), UnsupportedError) == (
        f"{base}: tensor 'm.0.weight' has dtype I8, whose values are no plain numbers; dequantise it first, or leave "
        "it out with --targets."
    )

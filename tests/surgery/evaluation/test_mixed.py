"""Rows with adapters of their own, against PEFT with one adapter at a time, and against merged weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel

import surgery
from surgery.adapter import open_adapter
from surgery.errors import MismatchError, OptionError, UnsupportedError
from surgery.evaluation.mixed import Layout, MixedAdapters
from tests.models import FAMILIES, make
from tests.peft_tools import write_adapter

# float32: products of a few hundred terms in another order.
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-6}
# Family: configs of three adapters, of unlike targets, ranks and scales.
CASES: dict[str, list[LoraConfig]] = {
    "llama": [
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        LoraConfig(
            r=8, lora_alpha=4, use_rslora=True, target_modules="all-linear",
            rank_pattern={"layers.0.mlp.down_proj": 2}, alpha_pattern={"o_proj": 32},
        ),
        LoraConfig(r=3, target_modules=["embed_tokens", "down_proj", "lm_head"]),
    ],
    "gpt2": [
        LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
        LoraConfig(r=2, lora_alpha=9, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
        LoraConfig(r=3, target_modules=["wte"]),
    ],
    "mixtral": [
        LoraConfig(r=4, target_modules=["q_proj", "k_proj"]),
        LoraConfig(r=2, target_modules=["o_proj", "v_proj"]),
        LoraConfig(r=1, lora_alpha=3, target_modules=["lm_head"]),
    ],
    "bert": [
        LoraConfig(r=4, target_modules=["query", "value"]),
        LoraConfig(r=2, target_modules=["dense"]),
        LoraConfig(r=5, target_modules=["word_embeddings", "key"]),
    ],
    "vit": [
        LoraConfig(r=4, target_modules=["q_proj"]),
        LoraConfig(r=2, target_modules=["fc1", "fc2"]),
        LoraConfig(r=5, target_modules=["v_proj"]),
    ],
    "t5": [
        LoraConfig(r=4, target_modules=["q", "v"]),
        LoraConfig(r=2, target_modules=["wi", "wo", "o"]),
        LoraConfig(r=5, target_modules=["k", "lm_head"]),
    ],
}  # fmt: skip
ORDERS: dict[str, list[str | None]] = {
    "sorted, of a length": ["a", "a", "b", "b", "c", "c"],
    "two of three": ["a", "a", "c", "c", None, None],
    "uneven": ["a", "b", "b", "b", "c", None],
    "anyhow": ["c", None, "a", "b", "a", "c"],
    "one": ["b"] * 6,
    "none": [None] * 6,
}


def inputs(family: str, rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(1, 96, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[-1, 3:] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    return made | ({"decoder_input_ids": ids.flip(1)[:, :4]} if family == "t5" else {})


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, dict[str, Path]]:
    family = request.param
    model = make(family).eval()
    folder = tmp_path_factory.mktemp(family)
    adapters = {
        name: write_adapter(model, config, folder / name, seed=number, scale=0.4)
        for number, (name, config) in enumerate(zip("abc", CASES[family], strict=True))
    }
    return family, model, adapters


def by_peft(model: Any, adapter: Path | None, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    wrapped = copy.deepcopy(model).to(dtype)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(wrapped, str(adapter))
    with torch.no_grad():
        logits: torch.Tensor = wrapped.eval()(**batch).logits
    return logits


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_those_of_peft(case: tuple[str, Any, dict[str, Path]], order: str) -> None:
    """Each row is what PEFT gives for it with its adapter alone, whatever the order; else the model is the base."""
    family, model, adapters = case
    batch, names = inputs(family), ORDERS[order]
    alone = {name: by_peft(model, adapters[name] if name else None, batch, torch.float32) for name in (*"abc", None)}
    with surgery.mixed_adapters(model, [*adapters.values()]) as mixed, torch.no_grad():
        with mixed.rows(names):
            found = model(**batch).logits
        base = model(**batch).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], alone[name][row], **TOLERANCE)
    assert torch.equal(base, alone[None])
    others = [row for row, name in enumerate(names) if name is not None]
    assert all((found[row] - base[row]).abs().max() > 1e-4 for row in others), "an adapter that does nothing"
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base), "closed, the model is the base again"


def test_rows_are_those_of_merged_weights(tmp_path: Path) -> None:
    """The same through `surgery.merge` and transformers."""
    model = make("llama").eval()
    model.save_pretrained(tmp_path / "base")
    adapters = [
        write_adapter(model, c, tmp_path / n, seed=i)
        for i, (n, c) in enumerate(zip("ab", CASES["llama"], strict=False))
    ]
    batch = inputs("llama", 4)
    with surgery.mixed_adapters(model, [adapters[0], (adapters[1], 0.5)]) as mixed, mixed.rows([*"aabb"]):
        found = model(**batch).logits
    for number, (adapter, weight) in enumerate(zip(adapters, (1.0, 0.5), strict=True)):
        surgery.merge(tmp_path / "base", (adapter, weight), output=tmp_path / f"merged{number}", hash=False)
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{number}")
        rows = slice(2 * number, 2 * number + 2)
        torch.testing.assert_close(found[rows], merged(**batch).logits[rows], rtol=1e-4, atol=1e-5)


def test_answers_of_a_mixed_batch(tmp_path: Path) -> None:
    """`generate` with left padding, greedy and with beams, says for each row what PEFT's model says."""
    model = make("llama").eval()
    adapters = {
        name: write_adapter(model, config, tmp_path / name, seed=number, scale=0.5)
        for number, (name, config) in enumerate(zip("abc", CASES["llama"], strict=True))
    }
    batch = {name: tensor.flip(1) for name, tensor in inputs("llama", 4).items()}
    names: list[str | None] = ["a", None, "b", "c"]
    for how in ({"num_beams": 1}, {"num_beams": 3}):
        settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
        with surgery.mixed_adapters(model, [*adapters.values()]) as mixed, mixed.rows(names):
            found = model.generate(**batch, **settings)
        for row, name in enumerate(names):
            alone: Any = copy.deepcopy(model)
            if name is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    alone = PeftModel.from_pretrained(alone, str(adapters[name]))
            one = {key: tensor[row : row + 1] for key, tensor in batch.items()}
            assert torch.equal(found[row], alone.generate(**one, **settings)[0]), (row, how)


def test_gradients_pass_through(tmp_path: Path) -> None:
    """A batch that is differentiated is not changed in place; the base's gradient is PEFT's."""
    model = make("llama")
    adapter = write_adapter(model, CASES["llama"][0], tmp_path / "a")
    batch = inputs("llama", 2)
    with surgery.mixed_adapters(model, [adapter]) as mixed, mixed.rows(["a", "a"]):
        model(**batch).logits.square().mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), str(adapter))
    wrapped.zero_grad()
    base: Any = wrapped.get_base_model()
    weight = base.model.norm.weight
    weight.requires_grad_(True)
    wrapped(**batch).logits.square().mean().backward()
    torch.testing.assert_close(model.model.norm.weight.grad, weight.grad, rtol=1e-3, atol=1e-6)


def test_other_precisions(tmp_path: Path) -> None:
    """bfloat16 as near as its three digits; float64 to float32's, in which PEFT keeps the factors."""
    model = make("llama").eval()
    adapter = write_adapter(model, CASES["llama"][1], tmp_path / "a")
    batch = inputs("llama", 2)
    exact = by_peft(model, adapter, batch, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.05)):
        other = copy.deepcopy(model).to(dtype)
        with surgery.mixed_adapters(other, [adapter]) as mixed, mixed.rows(["a", "a"]), torch.no_grad():
            found = other(**batch).logits
        assert found.dtype == dtype
        assert (found.double() - exact).norm() <= tolerance * exact.norm()
    with (
        surgery.mixed_adapters(model, [adapter]) as mixed, mixed.rows(["a", "a"]), torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):  # fmt: skip
        found = model(**batch).logits
    assert (found.double() - exact).norm() <= 0.05 * exact.norm()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "is a DoRA, which scales the rows of the weights"),
    "whole": ({"modules_to_save": ["lm_head"]}, r"stores lm_head.weight whole \(modules_to_save\)"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "replaces rows of an embedding"),
    "bias": ({"lora_bias": True}, "has biases beside its factors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_cannot_share_a_batch(name: str, tmp_path: Path) -> None:
    """Are refused by name, with the reason."""
    model = make("llama")
    options, reason = REFUSED[name]
    adapter = write_adapter(model, LoraConfig(r=2, target_modules=["q_proj"], **options), tmp_path / name)
    with pytest.raises(UnsupportedError, match=f"{reason}.*, so it cannot share a batch with other adapters."):
        surgery.mixed_adapters(model, [adapter])
    assert not any(module._forward_hooks for module in model.modules())


def test_experts_and_other_bases(tmp_path: Path) -> None:
    """Factors of expert stacks are refused, and those of another model named."""
    mixtral, llama = make("mixtral"), make("llama")
    experts = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    adapter = write_adapter(mixtral, experts, tmp_path / "experts")
    with pytest.raises(UnsupportedError, match="acts on parameters that hold several experts"):
        surgery.mixed_adapters(mixtral, [adapter])
    adapter = write_adapter(make("gpt2"), CASES["gpt2"][0], tmp_path / "gpt2")
    with pytest.raises(MismatchError) as caught:
        MixedAdapters(llama, [open_adapter(adapter)])
    assert "has factors for 'transformer.h.0.attn.c_attn', which the model lacks" in caught.value.problems[0]
    wide: Any = transformers.LlamaConfig
    wide = transformers.LlamaForCausalLM(wide(**{**FAMILIES["llama"][2], "hidden_size": 64}))
    adapter = write_adapter(wide, CASES["llama"][0], tmp_path / "wide")
    with pytest.raises(MismatchError) as caught:
        surgery.mixed_adapters(llama, [adapter])
    assert "are for 64 to 64 features, and the model has 32 to 32; is it for another base?" in caught.value.problems[0]


def test_names(tmp_path: Path) -> None:
    model = make("llama")
    adapter = write_adapter(model, CASES["llama"][0], tmp_path / "a")
    with pytest.raises(OptionError, match="The adapters are called a, a; each needs a name of its own"):
        surgery.mixed_adapters(model, [adapter, adapter])
    with surgery.mixed_adapters(model, [adapter, (adapter, 2.0)], ["x", "y"]) as mixed:
        assert mixed.names == ("x", "y")
        with pytest.raises(OptionError, match=r"There is no adapter 'a'; there are x, y\."), mixed.rows(["a"]):
            pass
        batch = inputs("llama", 3)
        with pytest.raises(UnsupportedError, match="was called with 3 rows for a batch of 2"), mixed.rows(["x", "y"]):
            model(**batch)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=12))
def test_layouts_cover_every_row_once(slots: list[int]) -> None:
    layout = Layout.of(slots)
    found = [-1] * len(slots)
    for run in layout.runs:
        assert all(found[row] == -1 for row in range(run.begin, run.end))
        found[run.begin : run.end] = [run.slot] * (run.end - run.begin)
    assert found == slots
    if layout.slots is not None:
        assert len({run.end - run.begin for run in layout.runs}) == 1
        assert layout.slots == tuple(run.slot for run in layout.runs)

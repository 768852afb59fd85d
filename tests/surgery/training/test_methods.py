"""Each method trains exactly what it says, lowers the loss, and comes back from disk with the same logits."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import (
    FormatError,
    MismatchError,
    MissingExtraError,
    OptionError,
    UnsupportedError,
)
from surgery.names import natural_key
from surgery.training.methods import METHODS, MethodOptions, Prepared, apply_method, load_method, parse_rate
from surgery.training.methods.anatomy import chosen_sites, shortest_suffixes
from surgery.training.methods.prompts import PromptedModel
from tests import models, moe_tools

R = 4  # rank and bottleneck
D = 32  # hidden size of the tiny models
TOKENS = 8

FAMILIES = ("llama", "gpt2", "bert", "t5", "vit", "mixtral")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A name that transformers and PEFT will change together."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A mixture that transformers knows, and one that ships its code."""
    place = tmp_path_factory.mktemp("upcycled")
    moe_tools.upcycle("gpt2", place / "shipped", moe_tools.both_layers("gpt2", moe_tools.top_k), noise=0.02)
    surgery.upcycle(
        models.save(models.make("llama"), place / "llama"), output=place / "native", experts=4, init="noise:1%"
    )
    import transformers

    return {
        "shipped": moe_tools.load("gpt2", place / "shipped"),
        "native": transformers.AutoModelForCausalLM.from_pretrained(place / "native").eval(),
        "native-folder": place / "native",
    }


def batch(model: Any) -> dict[str, torch.Tensor]:
    """Inputs with labels, for any of the families."""
    found = models.inputs(model)
    rows = len(next(iter(found.values())))
    if "Classification" in type(model).__name__:
        return {**found, "labels": torch.arange(rows) % 2}
    found.pop("decoder_input_ids", None)
    return {**found, "labels": found["input_ids"].clone()}


def steps(prepared: Prepared, given: dict[str, torch.Tensor], count: int = 6, rate: float = 1e-2) -> list[float]:
    """The model's loss, losses of a few steps of AdamW with dropout, and the model's loss after them."""
    groups = [{**group, "lr": rate} for group in prepared.optimizer_groups(0.01)]
    optimizer = torch.optim.AdamW(groups)
    torch.manual_seed(0)
    with torch.no_grad():
        losses = [float(prepared.model.eval()(**given).loss)]
    prepared.model.train()
    for _ in range(count):
        loss = prepared.model(**given).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    prepared.model.eval()
    with torch.no_grad():
        return [*losses, float(prepared.model(**given).loss)]


def logits(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**given).logits


def numel(model: Any, *words: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if any(word in name for word in words))


# Numbers of trained parameters, counted by hand from the shapes of the tiny models (two layers, d = 32, r = 4).
_LINEAR = {
    # (in + out) of every linear layer of one block, summed.
    "llama": 64 + 48 + 48 + 64 + 3 * 80,
    "gpt2": 128 + 64 + 160 + 160,
    "bert": 4 * 64 + 2 * 80,
    "vit": 4 * 64 + 2 * 80,
    "mixtral": 64 + 48 + 48 + 64 + 4 * (128 + 80) + 36,  # four experts, and the router
}
_LORA = {
    **{family: 2 * R * width for family, width in _LINEAR.items()},
    "bert": 2 * R * _LINEAR["bert"] + R * 64 + 99,  # the pooler, and the head whole
    "vit": 2 * R * _LINEAR["vit"] + 165,
    "t5": R * (2 * (4 * 64 + 2 * 80) + 2 * (8 * 64 + 2 * 80)),
}
_ADAPTER = 2 * D * R + R + D
_HEADS = {"bert": 99, "vit": 165}
_BLOCKS = {"t5": 4}
_COUNTS: dict[tuple[str, str], int] = {
    **{(family, "lora"): count for family, count in _LORA.items()},
    **{(f, "adapter-h"): 2 * _BLOCKS.get(f, 2) * _ADAPTER + _HEADS.get(f, 0) for f in FAMILIES},
    **{(f, "adapter-l"): _BLOCKS.get(f, 2) * (_ADAPTER + 2 * D) + _HEADS.get(f, 0) for f in FAMILIES},
    **{(f, "prompt"): TOKENS * D + _HEADS.get(f, 0) for f in FAMILIES if f != "vit"},
    # Keys and values: of half as many heads in models with grouped queries.
    **{(f, "prefix"): TOKENS * 2 * 2 * (16 if f in ("llama", "mixtral") else D) + _HEADS.get(f, 0)
       for f in FAMILIES if f != "vit"},
    **{(f, "lora+prompt"): _LORA[f] + TOKENS * D for f in FAMILIES if f != "vit"},
    ("llama", "top:1"): D * 32 * 2 + 2 * D * 16 + 3 * D * 48 + 2 * D,
    ("gpt2", "top:2"): 2 * (12 * D * D + 13 * D),
    ("gpt2", "bitfit"): 2 * 11 * D + D,
    ("bert", "bitfit"): 2 * (4 * D + D + 48 + D + D) + D + D + 99,  # norms, the embedding's and the pooler's too
    ("mixtral", "router"): 2 * 4 * D,
    ("mixtral", "experts"): 2 * 4 * (96 * D + D * 48),
    ("llama", "lora+prefix"): _LORA["llama"] + TOKENS * 2 * 2 * 16,
}  # fmt: skip


@pytest.mark.parametrize(("family", "method"), _COUNTS, ids=str)
def test_a_method_trains_exactly_its_parameters(family: str, method: str, tmp_path: Path) -> None:
    """As many as the formula says; what is not trained keeps its bits; the loss falls; the saved result is the same."""
    model = models.make(family)
    given = batch(model)
    prepared = apply_method(model, MethodOptions(method, rank=R))
    assert prepared.trainable == _COUNTS[family, method]
    assert sum(p.numel() for group in prepared.groups for p in group.params) == prepared.trainable
    before = {name: p.detach().clone() for name, p in prepared.model.named_parameters()}
    losses = steps(prepared, given)
    assert losses[-1] < losses[0]
    names = {name for group in prepared.groups for name in group.names}
    after = dict(prepared.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in after if name not in names)
    assert any(not torch.equal(before[name], after[name]) for name in names)

    prepared.save(tmp_path)
    if prepared.kind == "checkpoint":
        loaded = type(models.make(family)).from_pretrained(tmp_path)
    else:
        loaded = load_method(models.make(family), tmp_path)
    torch.testing.assert_close(logits(loaded, given), logits(prepared.model, given), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["shipped", "native"])
@pytest.mark.parametrize("method", ["lora", "router", "experts", "adapter-h", "adapter-l"])
def test_mixtures_of_experts(upcycled: dict[str, Any], kind: str, method: str, tmp_path: Path) -> None:
    """LoRA on every expert and router, both alone, and a bottleneck after the mixture."""
    base = upcycled[kind]
    prepared = apply_method(copy.deepcopy(base), MethodOptions(method, rank=R))
    experts, routers = numel(base, ".experts."), numel(base, "router.", "mlp.gate.")
    attention = {"shipped": 128 + 64, "native": 64 + 48 + 48 + 64}[kind]
    inside = {"shipped": 4 * (160 + 160), "native": 4 * (128 + 80)}[kind]
    assert routers == 2 * 4 * D
    assert prepared.trainable == {
        "lora": 2 * R * (attention + inside + 36),
        "router": routers,
        "experts": experts,
        "adapter-h": 4 * _ADAPTER,
        "adapter-l": 2 * (_ADAPTER + 2 * D),
    }[method]  # fmt: skip
    given = batch(base)
    losses = steps(prepared, given)
    assert losses[-1] < losses[0]
    prepared.save(tmp_path)
    if prepared.kind == "adapter":
        loaded = load_method(copy.deepcopy(base), tmp_path)
    else:
        loaded = type(base).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, given), logits(prepared.model, given), rtol=0, atol=0)


# LoRA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gpt2", {"rslora": True, "targets": "c_attn"}),
        ("llama", {"dora": True, "targets": "attention"}),
        ("llama", {"pissa": True}),
        ("gpt2", {"pissa": True, "rslora": True, "targets": "mlp"}),
        ("llama", {"train": (("embed_tokens", 0.5),), "targets": "q_proj"}),
        ("bert", {}),
        ("mixtral", {}),
    ],
    ids=str,
)
def test_a_saved_lora_merges_into_what_was_trained(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """`surgery merge` reads every variant; PiSSA's is stored for the unchanged base."""
    base = models.save(models.make(family), tmp_path / "base")
    prepared = apply_method(models.make(family), MethodOptions("lora", rank=R, **options))
    given = batch(models.make(family))
    start = logits(prepared.model, given)
    torch.testing.assert_close(start, logits(models.make(family), given), rtol=1e-4, atol=1e-5)
    steps(prepared, given)
    trained = logits(prepared.model, given)
    assert (trained - start).abs().max() > 1e-2
    prepared.save(tmp_path / "adapter")
    surgery.merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    merged = type(models.make(family)).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, given), trained, rtol=1e-4, atol=1e-4)


def test_a_saved_lora_on_an_upcycled_model_merges(upcycled: dict[str, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(upcycled["native"])
    prepared = apply_method(model, MethodOptions("lora", rank=R))
    given = batch(upcycled["native"])
    steps(prepared, given)
    prepared.save(tmp_path / "adapter")
    surgery.merge(upcycled["native-folder"], tmp_path / "adapter", output=tmp_path / "merged")
    merged = type(upcycled["native"]).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, given), logits(prepared.model, given), rtol=1e-4, atol=1e-4)


def test_targets_in_the_words_of_the_other_commands(tmp_path: Path) -> None:
    """The config names modules by short ends that mean these and no others."""
    prepared = apply_method(models.make("gpt2"), MethodOptions(rank=R, targets="attention"))
    prepared.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["attn.c_proj", "c_attn"]
    assert config["lora_alpha"] == 32
    assert "README.md" not in {path.name for path in tmp_path.iterdir()}
    with pytest.raises(OptionError, match="--targets nonsense: GPT2LMHeadModel has no such layer"):
        apply_method(models.make("gpt2"), MethodOptions(targets="nonsense"))


def test_the_name_of_the_base_is_no_path_of_this_machine(tmp_path: Path) -> None:
    model = models.make("llama")
    model.name_or_path = str(tmp_path)
    apply_method(model, MethodOptions(rank=R)).save(tmp_path / "a")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["base_model_name_or_path"] == tmp_path.name
    apply_method(models.make("llama"), MethodOptions(rank=R, base_name="org/base")).save(tmp_path / "b")
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


def test_equal_runs_start_from_equal_factors(tmp_path: Path) -> None:
    """A is drawn from torch's stream, which the caller seeds."""
    for name in ("a", "b"):
        torch.manual_seed(5)
        apply_method(models.make("llama"), MethodOptions(rank=R)).save(tmp_path / name)
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()


@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(".".join), unique=True, min_size=1),
    st.data(),
)
def test_short_ends_mean_the_chosen_and_no_others(names: list[str], data: st.DataObject) -> None:
    """PEFT takes a module whose name equals a target or ends with a dot and the target."""
    chosen = [name for name in names if data.draw(st.booleans())]
    ends = shortest_suffixes(chosen, [name for name in names if name not in chosen])
    meant = [name for name in names if any(name == end or name.endswith(f".{end}") for end in ends)]
    # A name that is itself the end of another one cannot be told from it by any end.
    clear = [n for n in chosen if not any(o.endswith(f".{n}") for o in names if o not in chosen)]
    if clear == chosen:
        assert meant == chosen


# Groups ---------------------------------------------------------------------------------------------------------------


def test_learning_rates_and_weight_decay_by_group() -> None:
    """LoRA+ raises that of B; vectors and soft prompts do not decay; the user's patterns come first."""
    plus = apply_method(models.make("llama"), MethodOptions(rank=R, lora_plus=16), 1.0)
    rates = {(name.split(".")[-3], group.lr) for group in plus.groups for name in group.names}
    assert rates == {("lora_A", 1.0), ("lora_B", 16.0)}
    full = apply_method(models.make("gpt2"), MethodOptions("full", train=((r"\.h\.1\.", 0.1),)), 1.0)
    for group in full.groups:
        for name in group.names:
            assert group.lr == (0.1 if ".h.1." in name else 1.0)
            vector = name.endswith("bias") or "ln_" in name
            assert group.decays != vector
    prompt = apply_method(models.make("llama"), MethodOptions("lora+prompt", rank=R))
    (virtual,) = [group for group in prompt.groups if "prompt" in group.names[0]]
    assert virtual.lr == pytest.approx(2e-3)
    assert not virtual.decays


def test_what_to_train_and_to_freeze_by_pattern(tmp_path: Path) -> None:
    chosen = apply_method(
        models.make("llama"), MethodOptions(train=(("norm", 1.0), ("lm_head", 0.5)), freeze=("model.norm",))
    )
    names = {name for group in chosen.groups for name in group.names}
    assert chosen.method == "selected"
    assert names == {
        *(f"model.layers.{layer}.{norm}_layernorm.weight" for layer in (0, 1) for norm in ("input", "post_attention")),
        "lm_head.weight",
    }  # fmt: skip
    frozen = apply_method(models.make("llama"), MethodOptions("full", freeze=("embed_tokens",)))
    assert frozen.trainable == numel(models.make("llama"), "") - 96 * D
    lora = apply_method(
        models.make("mixtral"), MethodOptions("lora", rank=R, targets="attention", train=(("gate.weight", 5.0),)), 1.0
    )
    assert lora.trainable == 2 * R * 224 + 2 * 4 * D
    assert {group.lr for group in lora.groups} == {1.0, 5.0}
    for flag, options in (("--train", {"train": (("nowhere", 1.0),)}), ("--freeze", {"freeze": ("nowhere",)})):
        with pytest.raises(
            OptionError, match=f"{flag} nowhere: no parameter's name contains that; one is called lm_head.weight."
        ):
            apply_method(models.make("llama"), MethodOptions("full", **options))
    with pytest.raises(UnsupportedError, match="leaves nothing to train"):
        apply_method(models.make("llama"), MethodOptions("full", freeze=(".",)))


def test_what_the_model_holds_frozen_stays_frozen() -> None:
    model = models.make("llama")
    model.model.norm.weight.requires_grad_(False)
    assert apply_method(model, MethodOptions("full")).trainable == numel(model, "") - D


def test_default_learning_rates() -> None:
    """LoRA's is ten times full tuning's."""
    assert MethodOptions("lora").default_rate == pytest.approx(10 * MethodOptions("full").default_rate)
    for method in METHODS:
        chosen: tuple[tuple[str, float], ...] = (("x", 1.0),) if method == "selected" else ()
        assert MethodOptions("top:2" if method == "top" else method, train=chosen).default_rate > 0


# Bottlenecks and virtual tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["adapter-h", "adapter-l"])
def test_a_fresh_adapter_changes_nothing(family: str, method: str) -> None:
    given = batch(models.make(family))
    fresh = apply_method(models.make(family), MethodOptions(method, rank=R)).model
    assert torch.equal(logits(fresh, given), logits(models.make(family), given))


@pytest.mark.parametrize("method", ["lora", "adapter-h", "adapter-l", "prompt", "lora+prefix"])
def test_what_is_added_is_trained_in_float32(method: str, tmp_path: Path) -> None:
    """On a model in bfloat16, too, whose own weights keep their dtype; and it is stored so."""
    model = models.make("llama").to(torch.bfloat16)
    prepared = apply_method(model, MethodOptions(method, rank=R))
    assert {p.dtype for group in prepared.groups for p in group.params} == {torch.float32}
    losses = steps(prepared, batch(models.make("llama")))
    assert losses[-1] < losses[0]
    assert model.lm_head.weight.dtype == torch.bfloat16
    prepared.save(tmp_path, torch.bfloat16)
    for file in tmp_path.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


def test_a_checkpoint_is_stored_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    prepared = apply_method(models.make("llama"), MethodOptions("top:1"))
    state = {name: tensor.clone() + 1 for name, tensor in prepared.model.state_dict().items()}
    prepared.save(tmp_path / "a", torch.bfloat16, state)
    stored = load_file(tmp_path / "a/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["lm_head.weight"], state["lm_head.weight"].to(torch.bfloat16))


_ENDS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "bert": ("attention.output.dense", "output.dense"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "opt": ("self_attn.out_proj", "fc2"),
    "vit": ("attention.o_proj", "mlp.fc2"),
    "qwen2_moe": ("self_attn.o_proj", "mlp"),
    "gpt_oss": ("self_attn.o_proj", "mlp"),
    "granitemoe": ("self_attn.o_proj", "block_sparse_moe"),
}


@pytest.mark.parametrize("family", _ENDS)
def test_where_adapters_stand(family: str) -> None:
    """After the last linear map of the attention and of the MLP in each layer."""
    model = apply_method(models.make(family), MethodOptions("adapter-h", rank=R)).model
    found = [name.removesuffix(".surgery_adapter") for name, _ in model.named_modules() if name.endswith("adapter")]
    assert len(found) == 4
    for layer in (0, 1):
        for end in _ENDS[family]:
            assert sum(name.endswith(f".{layer}.{end}") for name in found) == 1


def test_adapters_stand_before_the_residual() -> None:
    """A block computed by hand with x + up(gelu(down(x))) after attention and MLP."""
    model = apply_method(models.make("llama"), MethodOptions("adapter-h", rank=R)).model
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn.o_proj, layer.mlp.down_proj
    for linear in (attention, mlp):
        torch.nn.init.normal_(linear.surgery_adapter.up.weight)

    def adapted(linear: Any, x: torch.Tensor) -> torch.Tensor:
        a = linear.surgery_adapter
        y = torch.nn.functional.linear(x, linear.weight)
        hidden = torch.nn.functional.gelu(y @ a.down.weight.T + a.down.bias)
        return y + hidden @ a.up.weight.T + a.up.bias

    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(mlp(x), adapted(mlp, x))
    x = torch.randn(2, 5, D)
    torch.testing.assert_close(attention(x), adapted(attention, x))
    copied = copy.deepcopy(model)
    assert copied.model.layers[0].mlp.down_proj.surgery_adapter is not mlp.surgery_adapter


def test_an_infix_stands_between_prompt_and_completion(tmp_path: Path) -> None:
    """Row by row, built by hand: [prompt, tokens, infix, completion], and its labels and mask."""
    base = models.make("llama")
    prepared = apply_method(copy.deepcopy(base), MethodOptions("prompt", prompt_tokens=3, infix_tokens=2))
    wrapped = prepared.model
    assert isinstance(wrapped, PromptedModel)
    assert prepared.trainable == 5 * D
    assert prepared.adds_tokens
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, 9, 10], [-100, -100, -100, 14, -100, -100]])
    starts = (2, 3)
    steps(prepared, {"input_ids": ids, "attention_mask": mask, "labels": labels}, count=2)
    embed = base.get_input_embeddings()
    rows, masks, wanted = [], [], []
    for row, start in enumerate(starts):
        words = embed(ids[row])
        rows.append(torch.cat([wrapped.prompt, words[:start], wrapped.infix, words[start:]]))
        masks.append(torch.cat([torch.ones(3), mask[row, :start], torch.ones(2), mask[row, start:]]).long())
        fill = torch.full((5,), -100)
        wanted.append(torch.cat([fill[:3], labels[row, :start], fill[:2], labels[row, start:]]))
    with torch.no_grad():
        expected = base(inputs_embeds=torch.stack(rows), attention_mask=torch.stack(masks), labels=torch.stack(wanted))
        found = wrapped(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.logits.shape == (2, 6, 96)
    for row, start in enumerate(starts):
        # The logits that foretell token j stand at j - 1: for the completion's first token, those after the infix.
        for token in range(1, 6):
            at = 3 + token + 2 * (token >= start) - 1
            assert torch.equal(found.logits[row, token - 1], expected.logits[row, at])

    prepared.save(tmp_path)
    loaded = load_method(copy.deepcopy(base), tmp_path).eval()
    asked = {"input_ids": ids[:, :2], "attention_mask": mask[:, :2]}
    longer = torch.stack([torch.cat([wrapped.prompt, embed(row[:2]), wrapped.infix]) for row in ids])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    said = base.generate(inputs_embeds=longer, attention_mask=torch.ones(2, 7, dtype=torch.long), **options)
    assert torch.equal(loaded.generate(**asked, **options), said)


@pytest.mark.parametrize("method", ["lora+prompt", "lora+prefix"])
def test_lora_with_virtual_tokens_is_two_peft_folders(method: str, tmp_path: Path) -> None:
    """Each is an adapter of its own, and LoRA's merges."""
    prepared = apply_method(models.make("llama"), MethodOptions(method, rank=R))
    steps(prepared, batch(models.make("llama")), count=2)
    prepared.save(tmp_path / "a")
    prepared.save(tmp_path / "b", None, {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()})
    kinds = {"lora+prompt": "PROMPT_TUNING", "lora+prefix": "PREFIX_TUNING"}
    for folder, kind in (("a", "LORA"), ("a/prompt", kinds[method])):
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["peft_type"] == kind
        left, right = (load_file(tmp_path / at / "adapter_model.safetensors") for at in (folder, f"b{folder[1:]}"))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    report = surgery.inspect(tmp_path / "a")
    assert report.as_dict()["kind"] == "adapter"


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "sentence"),
    [
        ("llama", "bitfit", "--method bitfit trains biases, and LlamaForCausalLM has none; use --method lora."),
        ("t5", "bitfit", "trains biases, and T5ForConditionalGeneration has none"),
        (
            "llama",
            "router",
            "trains routers, and LlamaForCausalLM has none: it is no mixture of experts; `surgery upcycle`",
        ),
        ("gpt2", "experts", "trains experts, and GPT2LMHeadModel has none"),
        ("vit", "prompt", "ViTForImageClassification takes no virtual tokens"),
        (
            "vit",
            "lora+prefix",
            "ViTForImageClassification takes no virtual tokens: --method lora\\+prefix is for causal",
        ),
    ],
)
def test_a_method_that_trains_nothing_is_refused(family: str, method: str, sentence: str) -> None:
    with pytest.raises(UnsupportedError, match=sentence):
        apply_method(models.make(family), MethodOptions(method))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "lorra"}, "--method lorra is not known; it is one of full, selected, top:N"),
        ({"method": "top"}, "--method top is not of the form top:N"),
        ({"method": "top:0"}, "--method top:0 is not of the form top:N"),
        ({"rank": 0}, "--rank is 0, expected at least 1."),
        ({"dropout": 1.0}, "--dropout is 1.0, expected a share"),
        ({"alpha": 0.0}, "--alpha is 0.0, expected a number above 0."),
        ({"lora_plus": float("nan")}, "--lora-plus is nan"),
        ({"dora": True, "pissa": True}, "--dora and --pissa exclude each other"),
        ({"method": "full", "dora": True}, "--dora belongs to LoRA, and --method is full; leave it out."),
        ({"method": "lora", "infix_tokens": 2}, "--infix-tokens belongs to --method prompt"),
        ({"method": "prompt", "infix_tokens": -1}, "--infix-tokens is -1"),
        ({"method": "lora", "prompt_tokens": 2}, "--prompt-tokens belongs to the methods prompt and prefix"),
        ({"method": "prompt", "prompt_tokens": 0}, "--prompt-tokens is 0, expected at least 1."),
        ({"method": "selected"}, "--method selected trains what --train names"),
        ({"train": (("x", 0.0),)}, "The learning rate of 'x' is multiplied by 0.0"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        MethodOptions(**options)


def test_hostile_patterns_are_refused() -> None:
    with pytest.raises(FormatError, match="nests repetitions"):
        MethodOptions(train=(("(a+)+$", 1.0),))


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"dora": True}, {"pissa": True}], ids=str)
def test_what_stacked_experts_cannot_have(options: dict[str, Any]) -> None:
    with pytest.raises(
        OptionError, match=f"--{next(iter(options))} cannot be had for parameters such as model.layers.0"
    ):
        apply_method(models.make("mixtral"), MethodOptions(**options))
    apply_method(models.make("mixtral"), MethodOptions(targets="attention", **options))


def test_too_many_layers() -> None:
    with pytest.raises(OptionError, match="LlamaForCausalLM has 2 layers"):
        apply_method(models.make("llama"), MethodOptions("top:3"))


def test_a_prefix_and_the_routers_loss_do_not_go_together() -> None:
    model = models.make("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(UnsupportedError, match="--method prefix cannot be had with output_router_logits"):
        apply_method(model, MethodOptions("prefix"))


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named; what is not PEFT's works."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'checkpoint-surgery\[train\]'"):
        apply_method(models.make("llama"))
    assert apply_method(models.make("llama"), MethodOptions("adapter-h")).trainable


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    prepared = apply_method(models.make("llama"), MethodOptions("adapter-h", rank=R))
    prepared.save(tmp_path / "a")
    with pytest.raises(MismatchError, match="16 problems with") as caught:
        load_method(models.make("gpt2"), tmp_path / "a")
    assert (
        "has a tensor 'model.layers.0.mlp.down_proj.surgery_adapter.down.bias', which the model lacks."
        in (caught.value.problems[0])
    )
    settings = tmp_path / "a/surgery_method.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "rank": 5}))
    with pytest.raises(MismatchError, match="12 problems"):
        load_method(models.make("llama"), tmp_path / "a")
    settings.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(FormatError, match="is not a method of format 1"):
        load_method(models.make("llama"), tmp_path / "a")
    settings.write_text("{")
    with pytest.raises(FormatError, match="is not JSON"):
        load_method(models.make("llama"), tmp_path / "a")
    settings.write_text(json.dumps({**content, "method": "full"}))
    with pytest.raises(FormatError, match="of the method 'full', which has no folder of its own"):
        load_method(models.make("llama"), tmp_path / "a")
    (tmp_path / "none").mkdir()
    with pytest.raises(FormatError, match="it is no adapter"):
        load_method(models.make("llama"), tmp_path / "none")


def test_a_truncated_tensor_file_is_an_error(tmp_path: Path) -> None:
    apply_method(models.make("llama"), MethodOptions("adapter-l", rank=R)).save(tmp_path)
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "surgery_method.safetensors")
    with pytest.raises(MismatchError, match=r"model.norm.weight has shape \(3,\), and \(32,\) in the model"):
        load_method(models.make("llama"), tmp_path)


def test_rates_on_the_command_line() -> None:
    assert parse_rate("a=b") == ("a=b", 1.0)
    assert parse_rate("router=0.5") == ("router", 0.5)
    assert parse_rate("=3") == ("=3", 1.0)


def test_sites_of_a_live_model_are_those_of_the_stored_one(tmp_path: Path) -> None:
    """`--targets` means the same for `extract` and `train`."""
    from surgery.checkpoint import open_checkpoint
    from surgery.sites import find_sites, select

    for family in ("llama", "gpt2", "bert", "vit", "mixtral", "t5", "gpt_oss"):
        stored = find_sites(open_checkpoint(models.save(models.make(family), tmp_path / family)))
        for words in ("all-linear", "attention", "mlp"):
            found = chosen_sites(models.make(family), words)
            live = {name: found[name] for name in sorted(found, key=natural_key)}
            kept = select(stored, words)[0]
            assert [(s.name, s.kind, s.out_features, s.in_features) for s in live.values()] == [
                (s.name, s.kind, s.out_features, s.in_features) for s in kept.values()
            ], family

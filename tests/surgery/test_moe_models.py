"""The code that travels with an upcycled checkpoint, on tiny models of every family, against their dense selves."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgery import moe
from surgery.moe import modeling_upcycled
from surgery.moe_families import UPCYCLED_FAMILIES
from tests import models
from tests.moe_tools import EXPERTS, VARIANTS, auto_class, both_layers, dense, expert_choice, load, top_k, upcycle

ROUTERS = {"top-k": top_k, "expert-choice": expert_choice}


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())


# Loading and saving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_identical_experts_are_the_dense_model(variant: str, router: str, tmp_path: Path) -> None:
    """Weights that sum to 1, and with expert choice a capacity that covers every token."""
    folder = upcycle(variant, tmp_path / "moe", both_layers(variant, ROUTERS[router]))
    model = load(variant, folder)
    assert type(model) is getattr(modeling_upcycled, "Upcycled" + VARIANTS[variant][0])
    assert len(moe.mixtures(model)) == (4 if variant.startswith("t5") else 2)
    assert relative(models.logits(model), models.logits(dense(variant))) < 1e-6
    _, loading = type(model).from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"] | loading["mismatched_keys"]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_saving_gives_the_same_names_and_ships_the_code_again(variant: str, tmp_path: Path) -> None:
    folder = upcycle(
        variant, tmp_path / "moe", both_layers(variant, expert_choice), noise=0.02, router_z_loss_coef=0.25
    )
    model, again = load(variant, folder), tmp_path / "again"
    model.save_pretrained(again)
    stored, saved = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert stored.keys() == saved.keys()
    assert all(torch.equal(stored[name], saved[name]) for name in stored)
    config, before = (json.loads((place / "config.json").read_text()) for place in (again, folder))
    for field in ("model_type", "architectures", "auto_map", "moe_stacks", "router_z_loss_coef"):
        assert config[field] == before[field], field
    assert (again / "modeling_upcycled.py").read_bytes() == Path(modeling_upcycled.__file__).read_bytes()
    assert torch.equal(models.logits(load(variant, again)), models.logits(model))


CHILD = """
import json, sys
sys.modules["surgery"] = None  # as if it were not installed
import torch, transformers
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
for auto, folder, again in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = torch.load(folder + "/inputs.pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, folder + "/logits.pt")
    model.save_pretrained(again)
    model = getattr(transformers, auto).from_pretrained(again, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(**inputs).logits, again + "/logits.pt")
"""


def child(code: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run Python elsewhere, without this package on its path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=home, env=env, capture_output=True, text=True, check=False
    )


def test_checkpoints_load_where_this_package_is_not_installed(tmp_path: Path) -> None:
    work, expected = [], {}
    for variant in ("vit", "bert", "roberta", "t5", "t5-gated", "gpt2", "gpt_neox", "phi", "gemma3_text", "llama"):
        stacks = both_layers(variant, expert_choice if variant != "gpt2" else top_k)
        folder = upcycle(variant, tmp_path / variant, stacks, noise=0.02)
        model = load(variant, folder)
        torch.save(models.inputs(model), folder / "inputs.pt")
        expected[variant] = models.logits(model)
        work.append((auto_class(variant), str(folder), str(tmp_path / f"{variant}-again")))
    done = child(CHILD, json.dumps(work), home=tmp_path)
    assert done.returncode == 0, done.stderr
    for variant, logits in expected.items():
        again = tmp_path / f"{variant}-again"
        assert torch.equal(torch.load(tmp_path / variant / "logits.pt"), logits), variant
        assert torch.equal(torch.load(again / "logits.pt"), logits), variant
        names = (load_file(place / "model.safetensors").keys() for place in (tmp_path / variant, again))
        assert next(names) == next(names), variant
        assert (again / "modeling_upcycled.py").exists()


def test_without_trust_nothing_of_the_folder_is_run(tmp_path: Path) -> None:
    folder = upcycle("gpt2", tmp_path / "moe", both_layers("gpt2", top_k))
    code = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)"
    done = child(code, str(folder), home=tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


def test_the_package_is_used_even_where_the_folder_is_trusted(tmp_path: Path) -> None:
    folder = upcycle("gpt2", tmp_path / "moe", both_layers("gpt2", top_k))
    (folder / "modeling_upcycled.py").write_text("raise AssertionError('this was run')")
    model = load("gpt2", folder, trust_remote_code=True)
    assert type(model).__module__ == "surgery.moe.modeling_upcycled"


def test_every_auto_class_of_a_family_has_its_class() -> None:
    for family in UPCYCLED_FAMILIES.values():
        config = getattr(modeling_upcycled, "Upcycled" + family.config_class)
        assert transformers.AutoConfig.for_model(family.upcycled_type).__class__ is config
        for auto, name in family.auto_classes.items():
            model = getattr(transformers, auto)._model_mapping[config]
            assert model.__name__ == "Upcycled" + name
            assert issubclass(model, getattr(transformers, name))


def test_names_that_are_no_family_of_ours_are_no_attributes() -> None:
    for name in (
        "UpcycledOPTForCausalLM",
        "UpcycledNothing",
        "UpcycledAutoConfig",
        "Whatever",
        "UpcycledMixtralConfig",
    ):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_upcycled, name)


@pytest.mark.parametrize("variant", ["bert-lm", "vit", "gpt2", "llama", "t5"])
def test_the_base_model_loads_alone_and_under_another_head(variant: str, tmp_path: Path) -> None:
    folder = upcycle(variant, tmp_path / "moe", both_layers(variant, top_k), noise=0.02)
    whole, base = load(variant, folder), transformers.AutoModel.from_pretrained(folder)
    expected, found = whole.base_model.state_dict(), base.state_dict()
    names = [name for name in found if ".experts." in name or ".router." in name]
    assert len(names) >= 2 * (EXPERTS + 1)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert len(moe.mixtures(base)) == len(moe.mixtures(whole))
    if variant == "bert-lm":
        other = transformers.AutoModelForSequenceClassification.from_pretrained(folder).base_model.state_dict()
        assert all(torch.equal(other[name], expected[name]) for name in names)


def test_the_base_model_saves_and_loads_its_stored_names(tmp_path: Path) -> None:
    """ViT's are renamed by transformers on loading."""
    folder = upcycle("vit", tmp_path / "moe", both_layers("vit", top_k), noise=0.02)
    base = transformers.AutoModel.from_pretrained(folder)
    base.save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert "encoder.layer.0.mlp.experts.3.fc1.weight" in names
    assert "encoder.layer.0.layernorm_before.weight" in names
    again, loading = transformers.AutoModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    assert torch.equal(
        again.state_dict()["layers.1.mlp.router.weight"], base.state_dict()["layers.1.mlp.router.weight"]
    )


def test_older_names_of_gpt_neox_are_understood(tmp_path: Path) -> None:
    folder = upcycle("gpt_neox", tmp_path / "moe", both_layers("gpt_neox", top_k))
    tensors = load_file(folder / "model.safetensors")
    tensors["embed_out.weight"] = tensors.pop("embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert relative(models.logits(load("gpt_neox", folder)), models.logits(dense("gpt_neox"))) < 1e-6


def test_some_layers_stay_dense(tmp_path: Path) -> None:
    folder = upcycle("llama", tmp_path / "moe", {"decoder": top_k([1])})
    model = load("llama", folder)
    assert list(moe.mixtures(model)) == ["model.layers.1.mlp"]
    assert relative(models.logits(model), models.logits(dense("llama"))) < 1e-6


def test_the_stacks_of_t5_may_have_different_routers(tmp_path: Path) -> None:
    stacks = {"encoder": expert_choice([1], capacity=2), "decoder": top_k([0, 1])}
    folder = upcycle("t5", tmp_path / "moe", stacks, noise=0.02)
    kinds = {name: mixture.options.router for name, mixture in moe.mixtures(load("t5", folder)).items()}
    assert kinds == {
        "encoder.block.1.layer.1.DenseReluDense": "expert-choice",
        "decoder.block.0.layer.2.DenseReluDense": "top-k",
        "decoder.block.1.layer.2.DenseReluDense": "top-k",
    }
    encoder = transformers.AutoModelForTextEncoding.from_pretrained(folder)
    assert list(moe.mixtures(encoder)) == ["encoder.block.1.layer.1.DenseReluDense"]


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = upcycle("gpt2", tmp_path / "moe", both_layers("gpt2", top_k))
    config = transformers.AutoConfig.from_pretrained(folder)
    config.moe_stacks["decoder"]["layers"] = [0, 2]
    sentence = r"^moe_stacks.decoder in config.json names layer 2, but there are only 2 layers\.$"
    with pytest.raises(ValueError, match=sentence):
        transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("variant", ["gpt2", "t5", "bert", "llama"])
def test_from_scratch_experts_differ(variant: str, tmp_path: Path) -> None:
    folder = upcycle(variant, tmp_path / "moe", both_layers(variant, top_k))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(modeling_upcycled, "Upcycled" + VARIANTS[variant][0])(config)
    for mixture in moe.mixtures(model).values():
        one, other = (dict(expert.named_parameters()) for expert in list(mixture.experts)[:2])
        matrices = [name for name, parameter in one.items() if parameter.dim() == 2]
        assert matrices
        for name in matrices:
            assert not torch.equal(one[name], other[name])
            assert 0.5 < float(one[name].detach().std() / other[name].detach().std()) < 2
        assert mixture.router.weight.abs().max() > 0


@pytest.mark.parametrize("variant", ["llama", "bert"])
def test_bfloat16_is_the_dense_model_to_the_bit(variant: str, tmp_path: Path) -> None:
    folder = upcycle(variant, tmp_path / "moe", both_layers(variant, top_k))
    model, plain = (load(variant, place, dtype=torch.bfloat16) for place in (folder, tmp_path / "moe-dense"))
    inputs = models.inputs(plain)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_what_t5_keeps_in_float32_stays_in_float32(tmp_path: Path) -> None:
    """In float16 its MLPs' second half, whose results need not fit float16."""
    folder = upcycle("t5", tmp_path / "moe", both_layers("t5", top_k))
    model, plain = (load("t5", place, dtype=torch.float16) for place in (folder, tmp_path / "moe-dense"))
    for mixture in moe.mixtures(model).values():
        experts: list[Any] = list(mixture.experts)
        for expert in experts:
            expert.wo.weight.data *= 1e6
        out = mixture(torch.ones(1, 3, 32, dtype=torch.float16))
        assert out.dtype == torch.float32
        assert 65504 < out.abs().max() < torch.inf
        for expert in experts:
            expert.wo.weight.data /= 1e6
    inputs = models.inputs(plain)
    with torch.no_grad():
        assert relative(model(**inputs).logits, plain(**inputs).logits) < 4 * 2**-10


# What a token sees ----------------------------------------------------------------------------------------------------


def tokens(batch: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, models.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def hidden(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    last: torch.Tensor = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    return last


@pytest.mark.parametrize(("router", "sees"), [("top-k", False), ("expert-choice", True)])
def test_expert_choice_sees_the_future_and_top_k_does_not(router: str, sees: bool, tmp_path: Path) -> None:
    entry = top_k([0, 1]) if router == "top-k" else expert_choice([0, 1], capacity=1)
    model = load("llama", upcycle("llama", tmp_path / "moe", {"decoder": entry}, noise=0.1))
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % models.VOCABULARY
    before = (hidden(model, ids) - hidden(model, changed))[0, :-1].abs().max()
    assert (float(before) > 1e-3) if sees else (float(before) < 1e-5)


@pytest.mark.parametrize(("group", "depends"), [("sequence", False), ("batch", True)])
def test_a_sequence_does_not_depend_on_its_batch_unless_asked(group: str, depends: bool, tmp_path: Path) -> None:
    entry = expert_choice([0, 1], capacity=1, group=group)
    model = load("bert", upcycle("bert", tmp_path / "moe", {"encoder": entry}, noise=0.1))
    ids = tokens(4, 12)
    difference = float((hidden(model, ids)[:1] - hidden(model, ids[:1])).abs().max())
    assert (difference > 1e-3) == depends
    assert depends or difference < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["bert", "roberta", "t5", "llama"])
def test_padding_takes_no_capacity(variant: str, attention: str, tmp_path: Path) -> None:
    stack = "decoder" if variant == "llama" else "encoder"
    folder = upcycle(variant, tmp_path / "moe", {stack: expert_choice([0, 1], capacity=1)}, noise=0.1)
    model = load(variant, folder, attn_implementation=attention)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    model = model.encoder if variant == "t5" else model
    alone = hidden(model, ids[:1, :8])
    mask[0, 8:] = 0
    torch.testing.assert_close(hidden(model, ids, mask)[:1, :8], alone)
    routing = next(iter(moe.mixtures(model).values())).routing
    assert routing is not None
    assert not routing.taken[0, 8:].any()
    assert routing.tokens_per_expert.sum() == EXPERTS * (2 + 3)  # ceil(8 / 4) and ceil(12 / 4) for each expert
    without_mask = float((hidden(model, ids)[:1, :8] - alone).abs().max())
    assert without_mask > 1e-3


def test_left_padding_takes_no_capacity(tmp_path: Path) -> None:
    model = load("llama", upcycle("llama", tmp_path / "moe", {"decoder": expert_choice([0, 1], 1)}, noise=0.1))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    hidden(model, tokens(2, 12), mask)
    for mixture in moe.mixtures(model).values():
        assert mixture.routing is not None
        assert not mixture.routing.taken[0, :4].any()
        assert mixture.routing.tokens_per_expert.sum() == EXPERTS * (2 + 3)


@pytest.mark.parametrize("variant", ["gpt2", "gpt_neox", "phi", "gemma3_text", "qwen3", "t5"])
def test_top_k_generates_the_same_with_and_without_a_cache(variant: str, tmp_path: Path) -> None:
    folder = upcycle(variant, tmp_path / "moe", both_layers(variant, top_k), noise=0.1)
    model = load(variant, folder)
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    options |= {"pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        one, other = (
            model.generate(tokens(2, 6), attention_mask=mask, use_cache=cached, **options) for cached in (True, False)
        )
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), rtol=1e-4, atol=1e-5)


# Training -------------------------------------------------------------------------------------------------------------


def loss_of(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    value: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    return value


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


@pytest.mark.parametrize(("router", "balancing"), [("top-k", 0.01), ("expert-choice", 0.0)])
def test_training_adds_the_router_losses(router: str, balancing: float, tmp_path: Path) -> None:
    stacks = both_layers("llama", ROUTERS[router])
    model = load("llama", upcycle("llama", tmp_path / "moe", stacks, noise=0.1, router_z_loss_coef=0.5))
    ids = tokens(2, 9)
    with torch.no_grad():
        plain, loss = loss_of(model.eval(), ids), loss_of(model.train(), ids)
        routings: list[Any] = [mixture.routing for mixture in moe.mixtures(model).values()]
        expected = [balancing * r.load_balancing_loss() + 0.5 * r.router_z_loss() for r in routings]
        assert float(loss - plain) == pytest.approx(float(sum(expected)) / 2, rel=1e-4)
        assert model(input_ids=ids).loss is None


def test_padding_does_not_count_in_the_router_losses(tmp_path: Path) -> None:
    model = load("llama", upcycle("llama", tmp_path / "moe", {"decoder": top_k([1])}, noise=0.1)).train()
    ids, mask = tokens(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, 8:] = 0
    with torch.no_grad():
        model(input_ids=ids[:, :8])
        expected = moe.router_loss(model)
        model(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(moe.router_loss(model), expected)


def test_no_coefficients_mean_no_router_loss(tmp_path: Path) -> None:
    folder = upcycle("gpt2", tmp_path / "moe", both_layers("gpt2", top_k), router_aux_loss_coef=0.0)
    model = without_dropout(load("gpt2", folder))
    ids = tokens(1, 5)
    assert torch.equal(loss_of(model.train(), ids), loss_of(model.eval(), ids))
    assert moe.router_loss(model) is None


def gradients(model: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of two forward passes and then one backward pass."""
    torch.stack([loss_of(model, *batch) for batch in batches]).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("variant", "router"), [("bert-lm", "expert-choice"), ("llama", "top-k"), ("t5", "top-k")])
def test_gradient_checkpointing_changes_no_gradient(variant: str, router: str, tmp_path: Path) -> None:
    entry = top_k([0, 1]) if router == "top-k" else expert_choice([0, 1], capacity=1)
    stacks = dict.fromkeys(UPCYCLED_FAMILIES[dense(variant).config.model_type].stacks, entry)
    settings = {"router_z_loss_coef": 0.1, "dropout_rate": 0.0}  # T5 has dropout that is no module
    folder = upcycle(variant, tmp_path / "moe", stacks, noise=0.1, **settings)
    batches = []
    for cut, seed in ((5, 1), (9, 2)):
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, cut:] = 0
        batches.append((tokens(2, 12, seed), mask))
    plain = gradients(without_dropout(load(variant, folder)).train(), batches)
    model = without_dropout(load(variant, folder)).train()
    model.activation_checkpointing_enable()
    repeated = gradients(model, batches)
    assert plain.keys() == repeated.keys()
    assert any(".router." in name for name in plain)
    assert all(float(gradient.abs().max()) > 0 for name, gradient in plain.items() if ".router." in name)
    for name, gradient in plain.items():
        torch.testing.assert_close(repeated[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_a_model_in_training_can_be_copied(tmp_path: Path) -> None:
    model = load("bert-lm", upcycle("bert-lm", tmp_path / "moe", both_layers("bert-lm", expert_choice), noise=0.1))
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    loss_of(model.train(), ids, mask)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(twin, ids, mask), loss_of(model.eval(), ids, mask))
    assert all(mixture.routing and mixture.routing.real is not None for mixture in moe.mixtures(twin).values())


def test_a_few_steps_of_training_lower_the_loss_and_move_the_routers(tmp_path: Path) -> None:
    folder = upcycle("gpt2", tmp_path / "moe", both_layers("gpt2", top_k), noise=0.02)
    model = without_dropout(load("gpt2", folder)).train()
    start = {name: mixture.router.weight.detach().clone() for name, mixture in moe.mixtures(model).items()}
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-2), tokens(4, 12)
    losses = []
    for _ in range(8):
        loss = loss_of(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(mixture.router.weight, start[name]) for name, mixture in moe.mixtures(model).items())


@pytest.mark.parametrize("variant", ["phi", "bert-lm"])
def test_peft_finds_experts_and_routers(variant: str, tmp_path: Path) -> None:
    """Adapters on all linear layers train, and merge into what they said."""
    model = without_dropout(load(variant, upcycle(variant, tmp_path / "moe", both_layers(variant, top_k), noise=0.1)))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted = [name for name, module in tuned.named_modules() if hasattr(module, "lora_A")]
    assert sum(".experts." in name for name in adapted) == 2 * EXPERTS * 2
    assert sum(name.endswith(".router") for name in adapted) == 2
    loss_of(tuned.train(), tokens(2, 9)).backward()
    assert all(p.grad is not None for name, p in tuned.named_parameters() if "lora_" in name and ".experts." in name)
    inputs = models.inputs(model)
    with torch.no_grad():
        said = tuned.eval()(**inputs).logits
        merged = tuned.merge_and_unload()(**inputs).logits
    assert relative(merged, said) < 1e-4

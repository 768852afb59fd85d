"""Mixtures whose code travels with them: of every family, loaded where this package is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgery import moe
from surgery.checkpoint import open_checkpoint
from surgery.errors import OptionError
from surgery.moe import modeling_upcycled
from surgery.moe_families import UPCYCLED_FAMILIES
from tests.surgery.upcycling.dense import DENSE, inputs, load, logits, make, relative, stored, upcycled
from tests.tools import read_json

# Every family, and T5 of both kinds, a GPT-2 whose weights are transposed, a Llama that no native format can hold.
SHIPPED = (
    *("vit", "bert", "roberta", "t5", "t5-gated", "gpt2", "gpt_neox", "phi", "gemma", "gemma2", "gemma3_text"),
    *("llama", "llama-biased", "mistral", "qwen2", "qwen3"),
)


# Heads that transformers has once for all families: they make their base model through AutoModel.
HEADS = {
    "llama": "LlamaForSequenceClassification",
    "qwen3": "Qwen3ForQuestionAnswering",
    "gemma2": "Gemma2ForTokenClassification",
}


def headed(tmp_path: Path, name: str, cls: str) -> Any:
    """A dense model with another head, saved under the name of its class."""
    config = make(name).config
    config.pad_token_id = 0
    torch.manual_seed(0)
    dense = getattr(transformers, cls)(config).eval()
    dense.save_pretrained(tmp_path / cls)
    return dense


def ship(tmp_path: Path, name: str, **options: Any) -> Path:
    """The model as a mixture that ships its code."""
    upcycled(stored(tmp_path, name), tmp_path / "moe", target="shipped", **options)
    return tmp_path / "moe"


def entry(folder: Path, stack: str = "decoder") -> dict[str, Any]:
    """What a config says about one stack."""
    found: dict[str, Any] = read_json(folder / "config.json")["moe_stacks"][stack]
    return found


# Loading --------------------------------------------------------------------------------------------------------------

CHILD = """
import json, sys
sys.modules["surgery"] = None  # as if it were not installed
import torch, transformers
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
for auto, folder in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = torch.load(folder + "/inputs.pt")
    with torch.no_grad():
        torch.save(model(**inputs)[0], folder + "/logits.pt")
"""


@pytest.mark.slow
def test_every_family_loads_where_this_package_is_not_installed(tmp_path: Path) -> None:
    """By `trust_remote_code` alone, and as the dense model: copies, small experts and routed LoRA experts."""
    assert {name.split("-")[0] for name in SHIPPED} == set(UPCYCLED_FAMILIES)
    work, expected = [], {}
    for name, cls in HEADS.items():
        dense = headed(tmp_path, name, cls)
        for kind, options in {"copy": {"target": "shipped"}, "lora": {"kind": "lora"}}.items():
            folder = tmp_path / f"{name}-{cls}-{kind}"
            assert upcycled(open_checkpoint(tmp_path / cls), folder, experts=4, **options).preserved
            torch.save(inputs(dense), folder / "inputs.pt")
            with torch.no_grad():
                expected[folder] = dense(**inputs(dense))[0]
            work.append((f"AutoModel{cls[cls.index('For') :]}", folder))
    for name in SHIPPED:
        dense = stored(tmp_path, name)
        classes = UPCYCLED_FAMILIES[dense.model_type].auto_classes
        auto = next(auto for auto, dense_class in classes.items() if dense_class == DENSE[name][0])
        kinds: dict[str, dict[str, Any]] = {"copy": {"target": "shipped"}}
        if name in ("t5-gated", "gpt2"):
            kinds |= {"small": {"target": "shipped", "init": "granular:2"}}
        if name in ("vit", "t5", "gpt2", "llama"):
            kinds |= {"lora": {"kind": "lora", "rank": 2}}
        for kind, options in kinds.items():
            folder = tmp_path / f"{name}-{kind}"
            assert upcycled(dense, folder, experts=4, **options).preserved
            torch.save(inputs(make(name)), folder / "inputs.pt")
            expected[folder] = logits(make(name))
            work.append((auto, folder))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    listed = json.dumps([(auto, str(folder)) for auto, folder in work])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, listed], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for folder, said in expected.items():
        assert relative(torch.load(folder / "logits.pt"), said) < 1e-6, folder.name


@pytest.mark.parametrize(("name", "cls"), HEADS.items())
def test_heads_that_make_their_base_themselves(tmp_path: Path, name: str, cls: str) -> None:
    """Once: a mixture is not made of mixtures."""
    dense = headed(tmp_path, name, cls)
    upcycled(open_checkpoint(tmp_path / cls), tmp_path / "moe", target="shipped", init="noise:1%", experts=4)
    model = load(tmp_path / "moe")
    assert len(moe.mixtures(model)) == dense.config.num_hidden_layers
    upcycled(open_checkpoint(tmp_path / cls), tmp_path / "same", target="shipped", experts=4)
    with torch.no_grad():
        found, expected = (m(**inputs(dense))[0] for m in (load(tmp_path / "same"), dense))
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("name", SHIPPED)
def test_small_experts_are_the_dense_model(tmp_path: Path, name: str) -> None:
    """Each family's MLP at a third of its width, of which a token gets all three parts of two copies."""
    folder = ship(tmp_path, name, init="granular:4" if name == "gpt2" else "granular:3")
    assert relative(logits(load(folder)), logits(make(name))) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "t5-gated", "bert", "vit"])
def test_small_experts_round_trip(tmp_path: Path, name: str) -> None:
    """Saved again: the same names, shapes and bits, config and code."""
    folder = ship(tmp_path, name, init="granular:2")
    load(folder).save_pretrained(tmp_path / "again")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    stacks, code = (read_json(place / "config.json")["moe_stacks"] for place in (folder, tmp_path / "again"))
    assert stacks == code
    assert relative(logits(load(tmp_path / "again")), logits(make(name))) < 1e-6


def test_small_experts_are_parts_of_the_mlp(tmp_path: Path) -> None:
    """GPT-2's: columns of `c_fc` and its bias, rows of `c_proj` twice as large, and the bias of the output whole."""
    folder = ship(tmp_path, "gpt2", init="granular:2", experts=4)
    found, dense = load_file(folder / "model.safetensors"), make("gpt2").state_dict()
    for expert in range(4):
        part, name = slice(64 * (expert % 2), 64 * (expert % 2 + 1)), f"transformer.h.1.mlp.experts.{expert}"
        old = "transformer.h.1.mlp"
        assert torch.equal(found[f"{name}.c_fc.weight"], dense[f"{old}.c_fc.weight"][:, part])
        assert torch.equal(found[f"{name}.c_fc.bias"], dense[f"{old}.c_fc.bias"][part])
        assert torch.equal(found[f"{name}.c_proj.weight"], 2 * dense[f"{old}.c_proj.weight"][part])
        assert torch.equal(found[f"{name}.c_proj.bias"], dense[f"{old}.c_proj.bias"])
    router = found["transformer.h.1.mlp.router.weight"]
    assert torch.equal(router[::2], router[1::2])


def test_active_parameters_of_small_experts(tmp_path: Path) -> None:
    """Counted on the loaded model: what a token meets is everything but the experts that it is not sent to."""
    report = upcycled(stored(tmp_path, "gpt2"), tmp_path / "moe", init="granular:4", experts=16, top_k=8)
    model = load(tmp_path / "moe")
    experts = [expert for mixture in moe.mixtures(model).values() for expert in mixture.experts[:8]]
    idle = sum(parameter.numel() for expert in experts for parameter in expert.parameters())
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.active == report.parameters - idle


def test_small_experts_under_expert_choice(tmp_path: Path) -> None:
    """The parts of a copy take the same tokens, so that a token has whole copies or none; C counts small experts."""
    folder = ship(tmp_path, "vit", init="granular:2", experts=8, router="expert-choice", router_init="normal:1")
    assert entry(folder, "encoder")["capacity_factor"] == 4.0
    model = load(folder)
    logits(model)
    for mixture in moe.mixtures(model).values():
        assert mixture.routing is not None
        assert torch.equal(mixture.routing.taken[..., ::2], mixture.routing.taken[..., 1::2])


def test_a_folder_without_the_newer_field_loads_as_before(tmp_path: Path) -> None:
    folder = ship(tmp_path, "gpt2")
    config = read_json(folder / "config.json")
    del config["moe_stacks"]["decoder"]["granularity"]
    (folder / "config.json").write_text(json.dumps(config))
    assert relative(logits(load(folder)), logits(make("gpt2"))) < 1e-6


def test_small_experts_become_more(tmp_path: Path) -> None:
    """Twice as many of them, and the same function again."""
    ship(tmp_path, "gpt2", init="granular:2", experts=8)
    report = upcycled(open_checkpoint(tmp_path / "moe"), tmp_path / "more", experts=16)
    assert report.stored_parameters == report.parameters
    assert entry(tmp_path / "more")["granularity"] == 2
    assert relative(logits(load(tmp_path / "more")), logits(make("gpt2"))) < 1e-6


def test_units_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(ship(tmp_path, "gpt2"))
    config.moe_stacks["decoder"]["granularity"] = 5
    sentence = (
        r"^moe_stacks in config.json has granularity 5, and the MLP's 128 intermediate units do not divide by it\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        transformers.AutoModelForCausalLM.from_config(config)


def test_small_experts_from_scratch_differ(tmp_path: Path) -> None:
    """A model that is made from a config and not loaded: every expert is drawn for itself."""
    config = transformers.AutoConfig.from_pretrained(ship(tmp_path, "llama", init="granular:2"))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for mixture in moe.mixtures(model).values():
        experts: list[Any] = list(mixture.experts)
        one, other = (expert.up_proj.weight.detach() for expert in experts[:2])
        assert one.shape == (24, 32)
        assert not torch.equal(one, other)
        assert 0.5 < float(one.std() / other.std()) < 2


# What is written ------------------------------------------------------------------------------------------------------


def test_the_code_that_travels_is_ours(tmp_path: Path) -> None:
    code = (ship(tmp_path, "gpt2") / "modeling_upcycled.py").read_bytes()
    assert code == Path(modeling_upcycled.__file__).read_bytes()


def test_config(tmp_path: Path) -> None:
    dense = stored(tmp_path, "t5")
    report = upcycled(
        dense,
        tmp_path / "moe",
        experts=16,
        layers="encoder=last:1;decoder=all",
        router="encoder=expert-choice,decoder=top-k",
        capacity=1.5,
        top_k=4,
        combine="raw",
        group="batch",
    )
    assert (report.target, report.architecture) == ("upcycled_t5", "UpcycledT5ForConditionalGeneration")
    before, after = read_json(Path(dense.label) / "config.json"), read_json(tmp_path / "moe" / "config.json")
    new = {
        "model_type": "upcycled_t5",
        "architectures": ["UpcycledT5ForConditionalGeneration"],
        "auto_map": UPCYCLED_FAMILIES["t5"].auto_map(),
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
    }
    same = {"num_experts": 16, "normalize": False, "group": "batch", "granularity": 1, "kind": "copy"}
    stacks = {
        "encoder": {
            "layers": [1],
            "router": "expert-choice",
            "num_experts_per_tok": None,
            "capacity_factor": 1.5,
            **same,
        },
        "decoder": {
            "layers": [0, 1],
            "router": "top-k",
            "num_experts_per_tok": 4,
            "capacity_factor": None,
            **same,
        },
    }
    kept = {key: value for key, value in before.items() if key != "transformers_version"}
    assert after == {**kept, **new, "moe_stacks": stacks}


def test_names_are_those_that_transformers_writes(tmp_path: Path) -> None:
    for name in ("vit", "bert"):
        upcycled(stored(tmp_path, name), tmp_path / f"{name}-moe", experts=4)
        load(tmp_path / f"{name}-moe").save_pretrained(tmp_path / "again")
        ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in (f"{name}-moe", "again"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_a_llama_ships_code_only_where_it_must(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    assert upcycled(dense, tmp_path / "auto").target == "mixtral"
    report = upcycled(dense, tmp_path / "moe", target="shipped", layers="0,2")
    assert (report.target, report.preserved) == ("upcycled_llama", True)
    assert entry(tmp_path / "moe")["layers"] == [0, 2]
    assert relative(logits(load(tmp_path / "moe")), logits(make("llama"))) < 1e-6


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
def test_a_config_that_says_little(tmp_path: Path, name: str) -> None:
    """What the dense config leaves to its class is left to it again: Gemma's heads have 256, whatever the rest is."""
    class_name, config_name, settings = DENSE[name]
    defaults = getattr(transformers, config_name)().to_dict()
    settings = {key: value for key, value in settings.items() if key not in ("head_dim", "num_key_value_heads")}
    torch.manual_seed(0)
    settings["num_attention_heads"] = defaults["num_key_value_heads"] * 2
    dense = getattr(transformers, class_name)(getattr(transformers, config_name)(**settings)).eval()
    dense.save_pretrained(tmp_path / "dense")
    config = read_json(tmp_path / "dense" / "config.json")
    for key in ("head_dim", "num_key_value_heads"):
        assert config.pop(key) == defaults[key]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    upcycled(open_checkpoint(tmp_path / "dense"), tmp_path / "moe", experts=4)
    assert relative(logits(load(tmp_path / "moe")), logits(dense)) < 1e-6


def test_a_file_of_the_base_model_alone(tmp_path: Path) -> None:
    """Names without `transformer.`, under the class that has it, as in openai-community/gpt2."""
    dense = stored(tmp_path, "gpt2")
    file = Path(dense.label) / "model.safetensors"
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    upcycled(open_checkpoint(dense.label), tmp_path / "moe")
    assert relative(logits(load(tmp_path / "moe")), logits(make("gpt2"))) < 1e-6


# Expert choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "bert", "roberta"])
def test_experts_that_take_every_token(tmp_path: Path, name: str) -> None:
    report = upcycled(stored(tmp_path, name), tmp_path / "moe", experts=4, router="expert-choice", capacity=4)
    assert report.preserved
    model = load(tmp_path / "moe")
    assert relative(logits(model), logits(make(name))) < 1e-6
    for mixture in moe.mixtures(model).values():
        assert mixture.routing is not None
        assert mixture.routing.taken.all()


def test_experts_that_leave_tokens_uncovered(tmp_path: Path) -> None:
    """At C = 1 five experts take one of an image's five tokens each: some twice, and others get nothing."""
    options: dict[str, Any] = {"experts": 5, "capacity": 1, "router_init": "normal:1"}
    report = upcycled(stored(tmp_path, "vit"), tmp_path / "moe", router="expert-choice", **options)
    assert not report.preserved
    assert any("leaves some tokens to no expert" in note for note in report.notes)
    model = load(tmp_path / "moe")
    assert relative(logits(model), logits(make("vit"))) > 1e-3
    for mixture in moe.mixtures(model).values():
        assert mixture.routing is not None
        assert 0 < float(mixture.routing.uncovered) < 1
        outputs = mixture(torch.randn(8, 5, 32, generator=torch.Generator().manual_seed(0)))
        missed = ~mixture.routing.taken.any(dim=-1)
        assert missed.any()
        assert torch.equal(outputs.any(dim=-1), ~missed)


def test_expert_choice_in_the_encoder_and_top_k_in_the_decoder(tmp_path: Path) -> None:
    """The paper's language model. With C = E it is the dense one."""
    dense = stored(tmp_path, "t5")
    report = upcycled(dense, tmp_path / "moe", router="encoder=expert-choice,decoder=top-k", capacity=8)
    assert report.preserved
    assert [(stack.stack, stack.top_k, stack.capacity) for stack in report.stacks] == [
        ("encoder", None, 8.0),
        ("decoder", 2, None),
    ]
    assert relative(logits(load(tmp_path / "moe")), logits(make("t5"))) < 1e-6


FUTURE = (
    "lets each token's experts depend on the tokens after it, so that training sees the future and generation does "
    "not; use top-k, or pass --allow-future."
)


def test_expert_choice_in_a_decoder_is_refused(tmp_path: Path) -> None:
    dense = stored(tmp_path, "t5")
    for router in ("expert-choice", "encoder=top-k,decoder=expert-choice"):
        with pytest.raises(OptionError) as caught:
            upcycled(dense, tmp_path / "moe", router=router)
        assert str(caught.value) == f"--router expert-choice in a decoder {FUTURE}"
    # Where the decoder stays dense there is nothing to see.
    assert upcycled(dense, tmp_path / "moe", router="expert-choice", layers="encoder=all;decoder=none").stacks
    report = upcycled(dense, tmp_path / "forced", router="expert-choice", allow_future=True)
    assert [stack.capacity for stack in report.stacks] == [2.0, 2.0]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_bert_that_is_a_decoder_sees_no_future(tmp_path: Path, name: str) -> None:
    dense = stored(tmp_path, name)
    config = read_json(Path(dense.label) / "config.json") | {"is_decoder": True}
    (Path(dense.label) / "config.json").write_text(json.dumps(config))
    causal = open_checkpoint(dense.label)
    with pytest.raises(OptionError) as caught:
        upcycled(causal, tmp_path / "moe", router="expert-choice")
    which = " (config.json has is_decoder: true)"
    assert str(caught.value) == f"--router expert-choice in a decoder{which} {FUTURE}"
    assert upcycled(causal, tmp_path / "moe").preserved
    assert upcycled(causal, tmp_path / "forced", router="expert-choice", allow_future=True).stacks

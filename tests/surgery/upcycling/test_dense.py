"""A mixture back to its dense family: byte for byte where nobody trained it, by choice where somebody did."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import OptionError, SurgeryError, UnsupportedError
from surgery.upcycling.averages import rounded_once
from tests.models import make as make_plain
from tests.models import save
from tests.peft_tools import different, same_bits
from tests.peft_tools import stored as tensors_of
from tests.surgery.upcycling.dense import DENSE, load, logits, stored, upcycled
from tests.tools import read_json, run_cli

# Measuring is tested elsewhere.
upcycle = partial(surgery.upcycle, verify=False)

# Each native format, and families of the shipped one, with options that lead there.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama to mixtral": ("llama", {}),
    "tied llama to mixtral": ("llama-tied", {}),
    "llama 3 to mixtral": ("llama-3", {}),
    "mistral to mixtral": ("mistral", {}),
    "mistral with a window to mixtral": ("mistral-window", {}),
    "llama to glm4_moe": ("llama", {"layers": "last:2", "target": "glm4_moe"}),
    "mistral to glm4_moe": ("mistral", {"layers": "last:1"}),
    "llama to qwen2_moe": ("llama", {"layers": "0"}),
    "mistral to qwen2_moe": ("mistral", {"layers": "0,2", "target": "qwen2_moe"}),
    "qwen2 to qwen2_moe": ("qwen2", {}),
    "qwen2 with windows to qwen2_moe": ("qwen2-window", {"layers": "1"}),
    "qwen2 with a shared expert": ("qwen2", {"shared_expert": True}),
    "qwen3 to qwen3_moe": ("qwen3", {"layers": "every:2"}),
    "qwen3_5 to qwen3_5_moe": ("qwen3_5", {}),
    "olmo2 to flex_olmo": ("olmo2", {}),
    "granite to granitemoe": ("granite", {}),
    "ernie4_5 to ernie4_5_moe": ("ernie4_5", {"layers": "last:2", "shared_expert": True}),
    "hunyuan to hunyuan_v1_moe": ("hunyuan", {}),
    "t5 to switch": ("t5", {"target": "switch"}),
    "t5 encoder to switch": ("t5", {"target": "switch", "layers": "encoder=all"}),
    "m2m_100 to nllb-moe": ("m2m_100", {}),
    "biased llama": ("llama-biased", {}),
    "t5 with gates": ("t5-gated", {}),
    **{name: (name, {}) for name in ("vit", "bert", "roberta", "gpt2", "gpt_neox", "gemma", "gemma2", "phi")},
    "vit by expert choice": ("vit", {"router": "expert-choice", "layers": "last:1"}),
    "granular mixtral": ("llama", {"init": "granular:4", "experts": 8}),
    "granular qwen2_moe": ("qwen2", {"init": "granular:2", "layers": "last:1"}),
    "granular granitemoe": ("granite", {"init": "granular:2"}),
    "granular flex_olmo": ("olmo2", {"init": "granular:2"}),
    **{
        f"granular {name}": (name, {"init": "granular:2", "target": "shipped"})
        for name in ("vit", "bert", "gpt2", "gpt_neox", "t5-gated", "llama-biased")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_an_untouched_mixture_gives_the_dense_bits(case: str, tmp_path: Path) -> None:
    """Every tensor, and a config that loads as the same model: the logits are equal to the last bit."""
    name, options = CASES[case]
    source = stored(tmp_path, name, torch.bfloat16)
    made = upcycled(source, tmp_path / "moe", **{"experts": 4, **options})
    report = surgery.dense(tmp_path / "moe", output=tmp_path / "dense")
    assert source.path is not None
    assert different(tensors_of(tmp_path / "dense"), tensors_of(source.path)) == []
    assert (report.target, report.source, report.architecture) == (made.source, made.target, source.architecture)
    assert report.identical
    assert report.taken == 0
    assert report.parameters == source.parameters
    assert (tmp_path / "dense" / "modeling_upcycled.py").exists() is False
    assert torch.equal(logits(load(tmp_path / "dense")), logits(load(source.path)))
    settled, wanted = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (tmp_path / "dense", source.path))
    (settled.get("rope_parameters") or {}).pop("type", None)  # what `rope_type` used to be called
    assert {key: settled.get(key) for key in wanted if key not in _SAID_ANEW} == {
        key: value for key, value in wanted.items() if key not in _SAID_ANEW
    }


# Where it was loaded from; and what a config may say in two ways that mean the same.
_SAID_ANEW = {"_name_or_path", "transformers_version", "num_decoder_layers", "head_dim", "pad_token_id", "dtype"}


@pytest.mark.parametrize("case", ["llama to mixtral", "qwen3 to qwen3_moe", "gpt2", "granular gpt2"])
def test_saved_by_transformers_it_gives_the_dense_bits(case: str, tmp_path: Path) -> None:
    """Without surgery.json, and in files that transformers wrote."""
    name, options = CASES[case]
    source = stored(tmp_path, name)
    upcycled(source, tmp_path / "moe", experts=4, **options)
    load(tmp_path / "moe").save_pretrained(tmp_path / "saved")
    report = surgery.dense(tmp_path / "saved", output=tmp_path / "dense")
    assert source.path is not None
    assert different(tensors_of(tmp_path / "dense"), tensors_of(source.path)) == []
    assert report.target == source.model_type
    assert torch.equal(logits(load(tmp_path / "dense")), logits(load(source.path)))


@pytest.mark.parametrize("found", [-2, "2", [2]])
def test_a_granularity_that_is_none(tmp_path: Path, found: object) -> None:
    upcycled(stored(tmp_path, "gpt2"), tmp_path / "moe", experts=4)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    config["moe_stacks"]["decoder"]["granularity"] = found
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError) as caught:
        surgery.dense(tmp_path / "moe", output=tmp_path / "dense")
    assert str(caught.value) == (
        f"{tmp_path / 'moe'} has moe_stacks in its config with a granularity of {found!r}, expected one number of at "
        "least 1."
    )


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A Mixtral whose experts differ."""
    upcycled(stored(tmp_path, "llama", torch.bfloat16), tmp_path / "moe", experts=4, init="noise:10%")
    return tmp_path / "moe"


def test_one_expert_can_be_chosen(trained: Path, tmp_path: Path) -> None:
    report = surgery.dense(trained, output=tmp_path / "dense", expert=2)
    found, moe = tensors_of(tmp_path / "dense"), tensors_of(trained)
    for layer in range(3):
        for leaf, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            wanted = moe[f"model.layers.{layer}.block_sparse_moe.experts.2.{theirs}.weight"]
            assert same_bits(found[f"model.layers.{layer}.mlp.{leaf}.weight"], wanted)
    assert (report.taken, report.identical) == (2, None)
    load(tmp_path / "dense", torch.bfloat16)


def test_the_mean_of_all_is_rounded_once(trained: Path, tmp_path: Path) -> None:
    report = surgery.dense(trained, output=tmp_path / "dense", average=True)
    found, moe = tensors_of(tmp_path / "dense"), tensors_of(trained)
    own = [moe[f"model.layers.1.block_sparse_moe.experts.{n}.w2.weight"].double() for n in range(4)]
    wanted = rounded_once(sum(own[1:], own[0]) / 4, torch.bfloat16)
    assert same_bits(found["model.layers.1.mlp.down_proj.weight"], wanted)
    assert report.taken is None
    assert report.notes == (
        "The mean of experts that were trained apart is a start for training, seldom a good model by itself.",
    )


def test_stacked_experts_have_a_mean_too(tmp_path: Path) -> None:
    upcycled(stored(tmp_path, "granite"), tmp_path / "moe", experts=3, init="noise:10%")
    surgery.dense(tmp_path / "moe", output=tmp_path / "dense", average=True)
    stack = tensors_of(tmp_path / "moe")["model.layers.0.block_sparse_moe.input_linear.weight"].double()
    found = tensors_of(tmp_path / "dense")
    gate, up = (stack.sum(dim=0) / 3).float().chunk(2)
    assert torch.equal(found["model.layers.0.mlp.gate_proj.weight"], gate)
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], up)


def test_the_mean_of_equal_experts_is_one_of_them(tmp_path: Path) -> None:
    source = stored(tmp_path, "llama", torch.bfloat16)
    upcycled(source, tmp_path / "moe", experts=3)
    surgery.dense(tmp_path / "moe", output=tmp_path / "dense", average=True)
    assert source.path is not None
    assert different(tensors_of(tmp_path / "dense"), tensors_of(source.path)) == []


def changed(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def refused(folder: Path, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(SurgeryError) as caught:
        surgery.dense(folder, output=tmp_path / "dense", **options)
    assert not (tmp_path / "dense").exists()
    return caught.value.message


def test_experts_that_differ_are_counted(trained: Path, tmp_path: Path) -> None:
    assert refused(trained, tmp_path) == (
        f"{trained} has experts that differ from expert 0 in 3 of 3 layers (in 'model.layers.0' 3 of 4); choose one "
        "with --expert, or take their mean with --average."
    )
    assert refused(trained, tmp_path, dry_run=True) == refused(trained, tmp_path)
    assert refused(trained, tmp_path, expert=4) == "--expert is 4, expected one of 0 to 3."


def test_one_bit_in_one_expert_is_seen(tmp_path: Path) -> None:
    upcycled(stored(tmp_path, "qwen3"), tmp_path / "moe", experts=4)

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] *= 1 + 2**-20

    changed(tmp_path / "moe", flip)
    wanted = "has experts that differ from expert 0 in 1 of 3 layers (in 'model.layers.1' 1 of 4)"
    assert wanted in refused(tmp_path / "moe", tmp_path)


def test_small_experts_that_were_trained_do_not_go_together(tmp_path: Path) -> None:
    upcycled(stored(tmp_path, "qwen2"), tmp_path / "moe", experts=4, init="granular:2")
    changed(tmp_path / "moe", lambda tensors: tensors["model.layers.0.mlp.experts.2.up_proj.weight"].mul_(2))
    wanted = (
        f"{tmp_path / 'moe'} has experts that are parts of an MLP (granular:2) and differ from the first copy in 1 of "
        "3 layers (in 'model.layers.0' 1 of 4); parts that were trained do not go together again."
    )
    assert refused(tmp_path / "moe", tmp_path) == wanted
    assert refused(tmp_path / "moe", tmp_path, expert=1) == wanted


def test_thirds_were_rounded(tmp_path: Path) -> None:
    upcycled(stored(tmp_path, "qwen2", torch.bfloat16), tmp_path / "moe", experts=6, init="granular:3")
    assert "multiplied by 3 and rounded, so they cannot be taken back" in refused(tmp_path / "moe", tmp_path)


def test_a_shared_expert_that_speaks(tmp_path: Path) -> None:
    source = stored(tmp_path, "qwen2")
    upcycled(source, tmp_path / "moe", experts=4)
    name = "model.layers.2.mlp.shared_expert.down_proj.weight"
    changed(tmp_path / "moe", lambda tensors: tensors[name].fill_(0.1))
    assert refused(tmp_path / "moe", tmp_path) == (
        f"{tmp_path / 'moe'} has a shared expert that is not silent ({name!r} is not zero), which a dense MLP beside "
        "the routed one cannot hold; --drop-shared leaves it out."
    )
    report = surgery.dense(tmp_path / "moe", output=tmp_path / "dense", drop_shared=True)
    assert source.path is not None
    assert different(tensors_of(tmp_path / "dense"), tensors_of(source.path)) == []
    assert name in report.dropped
    assert "The shared experts are left out" in report.notes[0]


def test_minus_zero_is_silent(tmp_path: Path) -> None:
    upcycled(stored(tmp_path, "qwen2"), tmp_path / "moe", experts=2)
    name = "model.layers.2.mlp.shared_expert.down_proj.weight"
    changed(tmp_path / "moe", lambda tensors: tensors[name].neg_())
    surgery.dense(tmp_path / "moe", output=tmp_path / "dense")


def test_attention_biases_that_were_trained_need_a_family_that_has_them(tmp_path: Path) -> None:
    upcycled(stored(tmp_path, "llama"), tmp_path / "moe", experts=2, layers="0")
    changed(tmp_path / "moe", lambda tensors: tensors["model.layers.1.self_attn.k_proj.bias"].fill_(0.5))
    assert refused(tmp_path / "moe", tmp_path) == (
        f"{tmp_path / 'moe'} cannot become a llama, which it differs from in that it has attention biases that are not "
        "zero ('model.layers.1.self_attn.k_proj.bias'); try --to qwen2 or --to mistral."
    )
    surgery.dense(tmp_path / "moe", output=tmp_path / "dense", to="qwen2")
    assert torch.allclose(logits(load(tmp_path / "dense")), logits(load(tmp_path / "moe")), atol=1e-5)


def test_without_a_record_the_family_is_the_usual_one(tmp_path: Path) -> None:
    for name, wanted in (("mistral-window", "mistral"), ("mistral", "llama")):
        upcycled(stored(tmp_path, name), tmp_path / f"{name}-moe", experts=2)
        (tmp_path / f"{name}-moe" / "surgery.json").unlink()
        report = surgery.dense(tmp_path / f"{name}-moe", output=tmp_path / f"{name}-dense")
        assert report.target == wanted
        before = logits(load(tmp_path / f"{name}-float32"))
        assert torch.equal(logits(load(tmp_path / f"{name}-dense")), before)
    assert refused(tmp_path / "mistral-moe", tmp_path, to="gemma") == (
        f"--to is 'gemma', expected one of llama, mistral: {tmp_path / 'mistral-moe'} is a mixtral."
    )
    wanted = "cannot become a llama, which it differs from in that it has a sliding window (of 16); try --to mistral."
    assert refused(tmp_path / "mistral-window-moe", tmp_path, to="llama").endswith(wanted)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"use_qk_norm": True}, "normalises queries and keys"),
        ({"partial_rotary_factor": 0.5}, "turns only a part of each head (partial_rotary_factor 0.5)"),
        ({"num_nextn_predict_layers": 1}, "predicts several tokens (num_nextn_predict_layers 1)"),
    ],
)
def test_a_glm_that_is_no_llama(setting: dict[str, Any], reason: str, tmp_path: Path) -> None:
    upcycled(stored(tmp_path, "llama"), tmp_path / "moe", experts=2, layers="last:2")
    config = read_json(tmp_path / "moe" / "config.json") | setting
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    assert f"which it differs from in that it {reason}; try --to mistral." in refused(tmp_path / "moe", tmp_path)


def test_mlps_of_two_sizes_have_no_config(tmp_path: Path) -> None:
    """As in the Qwen3-MoE family: dense layers are wider than experts."""
    config = {**DENSE["qwen3"][2], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**config, mlp_only_layers=[1]))
    save(model, tmp_path / "moe")
    assert refused(tmp_path / "moe", tmp_path, expert=0) == (
        f"{tmp_path / 'moe'} would have MLPs of several sizes: [32, 16] in 'model.layers.0' and [32, 48] in "
        "'model.layers.1.mlp.down_proj.weight'; a qwen3 has one."
    )


def test_a_mixture_that_nobody_upcycled(tmp_path: Path) -> None:
    """The intermediate size of the dense model is that of the experts."""
    save(make_plain("qwen3_moe"), tmp_path / "moe")
    surgery.dense(tmp_path / "moe", output=tmp_path / "dense", expert=3)
    assert read_json(tmp_path / "dense" / "config.json")["intermediate_size"] == 16
    load(tmp_path / "dense")


def test_an_adapter_in_each_expert_comes_back_out(tmp_path: Path) -> None:
    """Expert N of a mixture of fine-tunes is fine-tune N, apart from the rest."""
    from tests.models import perturb

    for seed in (1, 2):
        save(perturb(make_plain("llama"), seed=seed), tmp_path / f"tuned{seed}")
    sources = f"{tmp_path / 'tuned1'},{tmp_path / 'tuned2'}"
    upcycle(tmp_path / "tuned1", output=tmp_path / "moe", init=f"from:{sources}", rest="first")
    surgery.dense(tmp_path / "moe", output=tmp_path / "dense", expert=0)
    assert different(tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "tuned1")) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"expert": 1, "average": True}, "--expert and --average exclude each other; give one of them."),
        ({"expert": -1}, "--expert is -1, expected 0 or more; experts count from zero."),
        ({"shard_bytes": 0}, "--shard-size is 0 bytes, expected at least 1."),
    ],
)
def test_wrong_options(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        surgery.dense(tmp_path, output=tmp_path / "dense", **options)
    assert caught.value.message == sentence


def test_routed_lora_experts_are_no_mlps(tmp_path: Path) -> None:
    upcycled(stored(tmp_path, "gpt2"), tmp_path / "moe", experts=2)
    config = read_json(tmp_path / "moe" / "config.json")
    config["moe_stacks"]["decoder"]["kind"] = "lora"
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    wanted = f"{tmp_path / 'moe'} has routed LoRA experts over one frozen MLP, which are no MLPs of their own."
    assert refused(tmp_path / "moe", tmp_path) == wanted


def test_a_dense_checkpoint_is_none(tmp_path: Path) -> None:
    source = stored(tmp_path, "llama")
    with pytest.raises(
        UnsupportedError, match=r"is of type 'llama', which is no mixture of experts known here; expect"
    ):
        surgery.dense(source, output=tmp_path / "dense")


@given(experts=st.integers(2, 5), top=st.integers(1, 5), data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_there_and_back(experts: int, top: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any layers, any number of experts, any way that keeps experts alike, any shards."""
    folder = tmp_path_factory.mktemp("there")
    name = data.draw(st.sampled_from(["qwen3", "gpt2", "qwen2", "granite"]))
    layers = "all" if name == "granite" else data.draw(st.sampled_from(["all", "last:1", "0", "every:2"]))
    groups = data.draw(st.sampled_from([1, 2, 4])) if name != "gpt2" else 1
    options = {"init": f"granular:{groups}", "experts": experts * groups} if groups > 1 else {"experts": experts}
    shard = data.draw(st.sampled_from([None, 20_000]))
    source = stored(folder, name, torch.bfloat16)
    top_k = min(top, experts) * groups
    upcycled(source, folder / "moe", layers=layers, top_k=top_k, shard_bytes=shard, **options)
    surgery.dense(folder / "moe", output=folder / "dense", shard_bytes=shard)
    assert source.path is not None
    assert different(tensors_of(folder / "dense"), tensors_of(source.path)) == []
    shutil.rmtree(folder)


def test_the_command(trained: Path, tmp_path: Path) -> None:
    failed = run_cli("dense", trained, "-o", tmp_path / "dense")
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"Error: {trained} has experts that differ from expert 0")
    run = run_cli("dense", trained, "-o", tmp_path / "dense", "--expert", "1", "--to", "mistral")
    assert run.returncode == 0, run.stderr
    assert "MistralForCausalLM" in run.stdout
    assert "expert 1" in run.stdout
    report = surgery.dense(trained, output=tmp_path / "dry", average=True, dry_run=True).as_dict()
    assert (report["taken"], report["layers"], report["dry_run"]) == (None, {"decoder": (0, 1, 2)}, True)
    assert not (tmp_path / "dry").exists()


def test_a_resumed_run_and_a_whole_one_agree(tmp_path: Path) -> None:
    from tests.tools import Tripwire, interrupt, unequal

    source = stored(tmp_path, "qwen2")
    upcycled(source, tmp_path / "moe", experts=4)
    surgery.dense(tmp_path / "moe", output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        surgery.dense(tmp_path / "moe", output=tmp_path / "again", progress=Tripwire(40_000, interrupt), threads=1)
    assert not (tmp_path / "again").exists()
    surgery.dense(tmp_path / "moe", output=tmp_path / "again", threads=1)
    assert unequal(tmp_path / "whole", tmp_path / "again") == []

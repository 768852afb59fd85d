"""Mixtures in formats that transformers has: the function is kept, names are theirs, bytes the dense ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from surgery.errors import UnsupportedError
from surgery.upcycling.dense_defaults import DENSE_DEFAULTS, with_both_spellings
from surgery.upcycling.native import NATIVE
from surgery.upcycling.seq2seq import SEQ2SEQ
from tests.surgery.upcycling.dense import DENSE, LLAMA3_ROPE, load, logits, make, relative, stored, upcycled

# (dense model, options, the format that `auto` chooses)
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "mixtral"),
    ("llama", {"experts": 32}, "mixtral"),
    ("llama", {"top_k": 1}, "mixtral"),
    ("llama", {"init": "granular:2"}, "mixtral"),
    ("llama", {"init": "granular:4", "experts": 16, "top_k": 8}, "mixtral"),
    ("llama-tied", {}, "mixtral"),
    ("llama-3", {}, "mixtral"),
    ("llama", {"layers": "last:2"}, "glm4_moe"),
    ("llama-3", {"layers": "last:half"}, "glm4_moe"),
    ("llama", {"shared_expert": True}, "glm4_moe"),
    ("llama", {"layers": "0,2"}, "qwen2_moe"),
    ("llama-3", {"layers": "0"}, "qwen2_moe"),
    ("llama-tied", {"layers": "1", "shared_expert": True}, "qwen2_moe"),
    ("mistral", {}, "mixtral"),
    ("mistral-window", {}, "mixtral"),
    ("mistral", {"layers": "last:1"}, "glm4_moe"),
    ("qwen2", {}, "qwen2_moe"),
    ("qwen2", {"layers": "1", "shared_expert": True}, "qwen2_moe"),
    ("qwen2", {"init": "granular:2", "layers": "every:2"}, "qwen2_moe"),
    ("qwen2-window", {}, "qwen2_moe"),
    ("qwen3", {}, "qwen3_moe"),
    ("qwen3", {"layers": "every:2", "experts": 32}, "qwen3_moe"),
    ("qwen3", {"init": "granular:3"}, "qwen3_moe"),
    ("qwen3_5", {}, "qwen3_5_moe_text"),
    ("qwen3_5", {"shared_expert": True, "init": "granular:2"}, "qwen3_5_moe_text"),
    ("m2m_100", {}, "nllb-moe"),
    ("m2m_100", {"layers": "encoder=every:2;decoder=none"}, "nllb-moe"),
    ("m2m_100", {"layers": "encoder=every:4;decoder=every:2"}, "nllb-moe"),
    ("olmo2", {}, "flex_olmo"),
    ("olmo2", {"init": "granular:2"}, "flex_olmo"),
    ("granite", {}, "granitemoe"),
    ("granite", {"init": "granular:2"}, "granitemoe"),
    ("ernie4_5", {}, "ernie4_5_moe"),
    ("ernie4_5", {"layers": "1,2", "shared_expert": True}, "ernie4_5_moe"),
    ("ernie4_5", {"layers": "last:1", "init": "granular:2"}, "ernie4_5_moe"),
    ("hunyuan", {}, "hunyuan_v1_moe"),
    ("hunyuan", {"init": "granular:2"}, "hunyuan_v1_moe"),
]
IDS = [f"{name}-{'-'.join(map(str, options.values())) or 'plain'}" for name, options, _ in CASES]


@pytest.mark.parametrize(("name", "options", "target"), CASES, ids=IDS)
def test_the_function_is_kept(tmp_path: Path, name: str, options: dict[str, Any], target: str) -> None:
    """Identical experts under weights that sum to one: the dense logits, to the rounding of float32."""
    report = upcycled(stored(tmp_path, name), tmp_path / "moe", **options)
    assert (report.target, report.preserved) == (target, True)
    # Parts of an MLP are summed in another order than the whole.
    bound = 2e-6 if report.init.startswith("granular") else 1e-6
    assert relative(logits(load(tmp_path / "moe")), logits(make(name))) < bound


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "qwen3_5", "m2m_100", "olmo2", "granite", "ernie4_5", "hunyuan"]
)
def test_names_are_those_that_transformers_writes(tmp_path: Path, name: str) -> None:
    """What `save_pretrained` writes after loading has the same names, shapes, dtypes and values."""
    upcycled(stored(tmp_path, name, torch.bfloat16), tmp_path / "moe", experts=4)
    load(tmp_path / "moe", torch.bfloat16).save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("moe", "again"))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {"experts": 32}), ("llama", {"layers": "last:2", "experts": 32}), ("hunyuan", {"experts": 32})],
    ids=["mixtral", "glm4_moe", "hunyuan"],
)
def test_bfloat16_is_equal_to_the_bit(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Where the combine weights stay in float32, or sum to one before they are rounded, nothing at all changes."""
    dense = stored(tmp_path, name, torch.bfloat16)
    upcycled(dense, tmp_path / "moe", **options)
    # Both loaded from disk: `.to(torch.bfloat16)` would round the rotary frequencies, too.
    found, expected = (logits(load(place, torch.bfloat16)) for place in (tmp_path / "moe", Path(dense.label)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "olmo2", "granite", "ernie4_5"])
def test_bfloat16_weights_of_the_others_round(tmp_path: Path, name: str) -> None:
    """Their combine weights are rounded to bfloat16 and sum to one only within 2^-8, in each layer."""
    dense = stored(tmp_path, name, torch.bfloat16)
    upcycled(dense, tmp_path / "moe")
    found, expected = (logits(load(place, torch.bfloat16)) for place in (tmp_path / "moe", Path(dense.label)))
    assert relative(found, expected) < 3 * 2**-8


def test_experts_have_the_dense_bytes(tmp_path: Path) -> None:
    """Everything outside the MLPs, and every expert, is the dense tensor bit for bit; only routers are new."""
    dense = stored(tmp_path, "llama", torch.bfloat16)
    upcycled(dense, tmp_path / "moe", experts=4)
    before, after = load_file(Path(dense.label) / "model.safetensors"), load_file(tmp_path / "moe/model.safetensors")
    roles = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for name, tensor in after.items():
        layer, _, rest = name.partition(".block_sparse_moe.")
        if rest.startswith("experts."):
            assert torch.equal(tensor, before[f"{layer}.mlp.{roles[rest.split('.')[2]]}.weight"]), name
        elif rest:
            assert rest == "gate.weight"
        else:
            assert torch.equal(tensor, before[name]), name
    assert len(after) == len(before) - 3 * 3 + 3 * (4 * 3 + 1)


def test_routers_are_normal_and_seeded(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    for folder, options in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"router_init": "normal:0.5"})):
        upcycled(dense, tmp_path / folder, experts=32, **options)
    routers = {
        folder: {
            k: v for k, v in load_file(tmp_path / folder / "model.safetensors").items() if k.endswith("gate.weight")
        }
        for folder in "abcd"
    }
    a = torch.stack([*routers["a"].values()])
    # 3 x 32 x 32 normal numbers: mean and deviation lie within four of their own standard errors.
    assert abs(float(a.mean())) < 4 * 0.02 / a.numel() ** 0.5
    assert abs(float(a.std()) / 0.02 - 1) < 4 / (2 * a.numel()) ** 0.5
    assert len({tuple(router.flatten().tolist()) for router in a}) == len(a)
    assert all(torch.equal(routers["a"][key], routers["b"][key]) for key in routers["a"])
    assert not any(torch.equal(routers["a"][key], routers["c"][key]) for key in routers["a"])
    assert all(torch.allclose(routers["d"][key], 25 * routers["a"][key]) for key in routers["a"])


def test_a_router_of_zeros(tmp_path: Path) -> None:
    upcycled(stored(tmp_path, "qwen3"), tmp_path / "moe", router_init="zeros")
    found = load_file(tmp_path / "moe/model.safetensors")
    assert all(not tensor.any() for name, tensor in found.items() if name.endswith("mlp.gate.weight"))
    assert relative(logits(load(tmp_path / "moe")), logits(make("qwen3"))) < 1e-6


def test_raw_weights_change_the_function_more_with_more_experts_and_layers(tmp_path: Path) -> None:
    dense = stored(tmp_path, "qwen3")
    expected = logits(make("qwen3"))

    def drop(**options: Any) -> float:
        place = tmp_path / "-".join(map(str, options.values()))
        report = upcycled(dense, place, combine="raw", **options)
        assert not report.preserved
        assert json.loads((place / "config.json").read_text())["norm_topk_prob"] is False
        return relative(logits(load(place)), expected)

    assert drop(experts=2, layers="all") < 1e-6  # two of two: the weights sum to one in any case
    assert 0.05 < drop(experts=4, layers="last:1") < drop(experts=32, layers="last:1") < drop(experts=32, layers="all")


def test_virtual_groups_repeat_their_scores(tmp_path: Path) -> None:
    """The parts of a copy are chosen together: equal rows in the router, and the matrix in its parts."""
    dense = stored(tmp_path, "qwen3")
    upcycled(dense, tmp_path / "moe", init="granular:4", experts=16, top_k=8)
    found, before = load_file(tmp_path / "moe/model.safetensors"), make("qwen3").state_dict()
    router = found["model.layers.1.mlp.gate.weight"]
    assert torch.equal(router, router[::4].repeat_interleave(4, dim=0))
    assert len(router[::4].unique(dim=0)) == 4
    for expert in range(16):
        part = slice(12 * (expert % 4), 12 * (expert % 4 + 1))
        prefix = f"model.layers.1.mlp.experts.{expert}"
        assert torch.equal(found[f"{prefix}.gate_proj.weight"], before["model.layers.1.mlp.gate_proj.weight"][part])
        assert torch.equal(found[f"{prefix}.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"][part])
        assert torch.equal(
            found[f"{prefix}.down_proj.weight"], 4 * before["model.layers.1.mlp.down_proj.weight"][:, part]
        )


def test_a_base_model_without_a_head(tmp_path: Path) -> None:
    """A file of LlamaModel, whose names have no `model.` in front, becomes one of MixtralModel."""
    make("llama").model.save_pretrained(tmp_path / "base")
    from surgery.checkpoint import open_checkpoint

    report = upcycled(open_checkpoint(tmp_path / "base"), tmp_path / "moe")
    assert report.architecture == "MixtralModel"
    model, dense = load(tmp_path / "moe"), make("llama").model
    tokens = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        found, expected = (m(input_ids=tokens).last_hidden_state for m in (model, dense))
    assert relative(found, expected) < 1e-6


# Configs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", DENSE_DEFAULTS)
def test_defaults_are_those_of_the_dense_class(model_type: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type]().to_dict()
    config |= config.get("rope_parameters", {})
    if model_type == "mistral":
        config["sliding_window"] = transformers.MistralConfig().sliding_window
    assert {name: config[name] for name in DENSE_DEFAULTS[model_type]} == dict(DENSE_DEFAULTS[model_type])


@pytest.mark.parametrize("target", [*NATIVE, *SEQ2SEQ], ids=lambda target: target.name)
def test_no_default_of_the_mixture_comes_through(target: Any) -> None:
    """Every field on which the two classes disagree is among the defaults that are written, or set by the format."""
    theirs = transformers.CONFIG_MAPPING[target.name]().to_dict()
    about_the_class = {"model_type", "transformers_version", "architectures"}
    sizes = {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "layer_types",
    }
    derived = {"num_key_value_heads", "head_dim", "rope_parameters"}  # see `with_defaults`
    set_by_the_format = {"sliding_window", "num_decoder_layers"}
    for source in target.sources:
        dense = transformers.CONFIG_MAPPING[source]().to_dict()
        differing = {name for name in theirs.keys() & dense.keys() if theirs[name] != dense[name]}
        left = differing - about_the_class - sizes - derived - DENSE_DEFAULTS.get(source, {}).keys()
        assert left <= set_by_the_format, (source, left)


@pytest.mark.parametrize(
    "name", [name for name in DENSE if name.split("-")[0] in ("llama", "mistral", "qwen2", "qwen3")]
)
def test_a_config_that_says_little(tmp_path: Path, name: str) -> None:
    """A config with only what differs from the dense class's defaults, as older tools wrote it, means the same."""
    place = tmp_path / "terse"
    make(name).save_pretrained(place)
    full = json.loads((place / "config.json").read_text())
    defaults = getattr(transformers, DENSE[name][1])().to_dict()
    kept = {key: value for key, value in full.items() if value is not None and defaults.get(key) != value}
    (place / "config.json").write_text(json.dumps({**kept, "model_type": full["model_type"]}))
    from surgery.checkpoint import open_checkpoint

    upcycled(open_checkpoint(place), tmp_path / "moe")
    assert relative(logits(load(tmp_path / "moe")), logits(make(name))) < 1e-6


def test_both_spellings() -> None:
    """Rotary settings and dtype as transformers 5 has them and as everybody else."""
    new = {"rope_parameters": LLAMA3_ROPE, "dtype": "bfloat16"}
    old = {
        "rope_theta": 500_000.0,
        "rope_scaling": {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"},
        "torch_dtype": "bfloat16",
    }
    for given in (new, old):
        found = with_both_spellings(given)
        assert found["rope_theta"] == 500_000.0
        assert found["rope_parameters"] == LLAMA3_ROPE
        scaling = found["rope_scaling"]
        assert isinstance(scaling, dict)
        assert scaling["rope_type"] == "llama3"
        assert scaling["factor"] == 8.0
        assert found["dtype"] == found["torch_dtype"] == "bfloat16"
    oldest = with_both_spellings({"rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert oldest["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    plain = with_both_spellings({"rope_theta": 10_000.0})
    assert (plain["rope_scaling"], plain["rope_parameters"]) == (None, {"rope_type": "default", "rope_theta": 10_000.0})


# What a format cannot express -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "llama-biased",
            {"target": "mixtral"},
            "cannot become mixtral, which has no attention biases ('model.layers.0.self_attn.o_proj.bias'). "
            "`--target shipped` can hold it.",
        ),
        (
            "llama",
            {"target": "mixtral", "layers": "0,2"},
            "cannot become mixtral, which can make only all layers sparse (asked for layers 0, 2 of 3). "
            "`--target qwen2_moe` can hold it.",
        ),
        (
            "llama",
            {"target": "mixtral", "combine": "raw"},
            "cannot become mixtral, which always normalises the weights of a token's experts. "
            "`--target qwen2_moe` can hold it.",
        ),
        (
            "llama",
            {"target": "glm4_moe", "router": "expert-choice", "allow_future": True},
            "cannot become glm4_moe, which has no expert choice. `--target shipped` can hold it.",
        ),
        (
            "qwen2",
            {"target": "mixtral"},
            "is of type qwen2 and cannot become mixtral, which takes llama, mistral. `--target qwen2_moe` can hold it.",
        ),
        (
            "mistral-window",
            {"target": "glm4_moe"},
            "cannot become glm4_moe, which has no sliding window (of 16). `--target mixtral` can hold it.",
        ),
        (
            "granite",
            {"layers": "last:1"},
            "is of type granite, and no format can hold this mixture of it: granitemoe can make only all layers sparse "
            "(asked for layers 2 of 3).",
        ),
    ],
)
def test_what_a_format_cannot_express_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], sentence: str
) -> None:
    dense = stored(tmp_path, name)
    with pytest.raises(UnsupportedError) as caught:
        upcycled(dense, tmp_path / "moe", **options)
    assert str(caught.value) == f"{dense.label} {sentence}"
    assert not (tmp_path / "moe").exists()


# Switch ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["all", "encoder=1;decoder=none", "encoder=none;decoder=all"])
def test_switch_shrinks_each_mlp_by_the_probability(tmp_path: Path, layers: str) -> None:
    """With a router of zeros every probability is 1/E: the dense model with every sparse MLP divided by E."""
    report = upcycled(stored(tmp_path, "t5"), tmp_path / "moe", target="switch", layers=layers, router_init="zeros")
    assert (report.target, report.preserved) == ("switch_transformers", False)
    scaled = make("t5")
    with torch.no_grad():
        for stack, sparse in (
            ("encoder", layers != "encoder=none;decoder=all"),
            ("decoder", "decoder=none" not in layers),
        ):
            chosen = [1] if "encoder=1" in layers and stack == "encoder" else range(2)
            for number in chosen if sparse else ():
                layer = getattr(scaled, stack).block[number].layer[1 if stack == "encoder" else 2]
                layer.DenseReluDense.wo.weight /= 8
    assert relative(logits(load(tmp_path / "moe")), logits(scaled)) < 1e-6


def test_switch_says_what_it_cannot_do(tmp_path: Path) -> None:
    for name, options, sentence in (
        ("t5-gated", {}, "cannot become switch_transformers, which has no gated experts."),
        ("t5", {"top_k": 2}, "cannot become switch_transformers, which sends a token to one expert, weighted by its "),
        ("t5", {"layers": "0"}, "cannot become switch_transformers, which can make only every so many layers of the "),
    ):
        dense = stored(tmp_path, name)
        with pytest.raises(UnsupportedError) as caught:
            upcycled(dense, tmp_path / "moe", target="switch", **options)
        assert str(caught.value).startswith(f"{dense.label} {sentence}")


def test_switch_is_never_chosen_by_itself(tmp_path: Path) -> None:
    report = upcycled(stored(tmp_path, "t5"), tmp_path / "moe", combine="raw", top_k=1)
    assert report.target == "upcycled_t5"


def test_transformers_runs_two_experts_of_an_nllb() -> None:
    """What the report warns of; when this fails, transformers is mended and the warning goes."""
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    torch.manual_seed(0)
    config = transformers.NllbMoeConfig(d_model=32, num_experts=8, moe_token_dropout=0.0)
    block = NllbMoeSparseMLP(config, 48).eval()
    ran: set[int] = set()
    for number in range(8):
        block.experts[f"expert_{number}"].register_forward_hook(lambda *_, number=number: ran.add(number))
    block(torch.randn(1, 64, 32))
    assert ran == {0, 1}

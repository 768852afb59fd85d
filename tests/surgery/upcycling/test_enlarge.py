"""A mixture of more experts is the same function: every format, against the smaller one run by transformers."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, OptionError, UnsupportedError
from surgery.ops.lint import REFUSED, SILENT
from surgery.upcycling.consumers import CONSUMERS
from tests.peft_tools import different, same_bits
from tests.peft_tools import stored as tensors_of
from tests.surgery.upcycling.dense import load, logits, relative, stored, upcycled
from tests.tools import read_json

BAD = (REFUSED, SILENT)
# Measuring is tested elsewhere.
upcycle = partial(surgery.upcycle, verify=False)

# A dense family, and options that lead to each format.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("llama", {}),
    "glm4_moe": ("llama", {"layers": "last:2", "target": "glm4_moe"}),
    "qwen2_moe": ("qwen2", {}),
    "qwen2_moe raw": ("qwen2", {"combine": "raw"}),
    "qwen3_moe": ("qwen3", {"layers": "0,2"}),
    "flex_olmo": ("olmo2", {}),
    "granitemoe": ("granite", {}),
    "ernie4_5_moe": ("ernie4_5", {}),
    "hunyuan_v1_moe": ("hunyuan", {}),
    "qwen3_5_moe_text": ("qwen3_5", {}),
    "gpt2": ("gpt2", {}),
    "bert": ("bert", {}),
    "vit raw": ("vit", {"combine": "raw"}),
    "vit expert choice": ("vit", {"router": "expert-choice", "capacity": 1.5}),
    "t5": ("t5", {"target": "shipped"}),
}


def differing(folder: Path, name: str, options: dict[str, Any]) -> Path:
    """A mixture of 4 experts that differ, with routers that decide and corrections that count."""
    place = folder / "small"
    upcycled(stored(folder, name), place, experts=4, init="noise:20%", router_init="normal:0.3", **options)
    path = place / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(5)
    for key, tensor in tensors.items():
        if "correction_bias" in key:
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    save_file(tensors, path, {"format": "pt"})
    return place


@pytest.mark.parametrize("case", FORMATS)
def test_the_function_is_kept(case: str, tmp_path: Path) -> None:
    name, options = FORMATS[case]
    small = differing(tmp_path, name, options)
    report = upcycle(small, output=tmp_path / "large", experts=12)
    assert relative(logits(load(tmp_path / "large")), logits(load(small))) < 1e-6
    stack = report.stacks[0]
    assert stack.experts == 12
    assert (stack.top_k, stack.capacity) == ((6, None) if "choice" not in case else (None, 4.5))
    assert report.preserved
    assert report.source == read_json(tmp_path / f"{name}-float32" / "config.json")["model_type"]
    assert report.target == read_json(small / "config.json")["model_type"]


def test_copies_stand_one_after_the_other(tmp_path: Path) -> None:
    small = differing(tmp_path, "llama", {})
    upcycle(small, output=tmp_path / "large", experts=8, top_k=4)
    before, after = tensors_of(small), tensors_of(tmp_path / "large")
    for name, tensor in after.items():
        old = re.sub(r"experts\.(\d+)", lambda match: f"experts.{int(match[1]) // 2}", name)
        if "gate.weight" in name:
            assert torch.equal(tensor, before[name].repeat_interleave(2, dim=0))
        else:
            assert same_bits(tensor, before[old])
    config = read_json(tmp_path / "large" / "config.json")
    assert (config["num_local_experts"], config["num_experts"], config["num_experts_per_tok"]) == (8, 8, 4)
    assert [item["role"] for item in read_json(tmp_path / "large" / "surgery.json")["inputs"]] == ["mixture"]
    assert (tmp_path / "small-moe-16x").exists() is False
    assert upcycle(small, experts=16).output == str(tmp_path / "small-moe-16x")


def test_an_enlarged_mixture_goes_back_to_the_dense_bits(tmp_path: Path) -> None:
    """Also where only surgery.json knows the family: a Llama in Qwen2-MoE's format has biases that it had not."""
    source = stored(tmp_path, "llama")
    upcycled(source, tmp_path / "small", experts=2, layers="0")
    upcycle(tmp_path / "small", output=tmp_path / "large", experts=6)
    report = surgery.dense(tmp_path / "large", output=tmp_path / "dense")
    assert source.path is not None
    assert different(tensors_of(tmp_path / "dense"), tensors_of(source.path)) == []
    assert report.target == "llama"


def test_the_difference_is_measured(tmp_path: Path) -> None:
    """From the smaller mixture; it is no theorem, since two scores may be equal to rounding."""
    small = differing(tmp_path, "qwen3", {"layers": "last:1"})
    report = surgery.upcycle(small, output=tmp_path / "large", experts=8, verify=True)
    assert report.preservation is not None
    assert report.preservation.relative < 1e-6
    assert report.preservation.bound is None
    assert len(report.preservation.loads[0].shares) == 8


@pytest.mark.parametrize("case", ["mixtral", "glm4_moe", "ernie4_5_moe", "gpt2"])
def test_who_loads_the_larger_one_is_what_lint_says_of_it(case: str, tmp_path: Path) -> None:
    """Before it is there: corrections of zeros stay zeros, and others are found."""
    name, options = FORMATS[case]
    upcycled(stored(tmp_path, name), tmp_path / "fresh", experts=4, **options)
    for small in (tmp_path / "fresh", differing(tmp_path, name, options)):
        target = tmp_path / f"large-{small.name}"
        report = upcycle(small, output=target, experts=8)
        found = surgery.lint(target, consumers=tuple(CONSUMERS.values()))
        # Without a tokenizer in the folder that is a matter of the folder.
        findings = [finding for finding in found.findings if not finding.rule.endswith("tokenizer")]
        serious = {finding.consumer for finding in findings if finding.severity in BAD}
        assert {CONSUMERS[one.consumer] for one in report.consumers if one.verdict in BAD} == serious
        assert [one.consumer for one in report.consumers] == list(CONSUMERS)


def test_a_factor_on_what_the_experts_give_is_told(tmp_path: Path) -> None:
    small = differing(tmp_path, "llama", FORMATS["glm4_moe"][1])
    config = read_json(small / "config.json")
    (small / "config.json").write_text(json.dumps({**config, "routed_scaling_factor": 2.5}))
    report = upcycle(small, output=tmp_path / "large", experts=8)
    assert (report.stacks[0].normalized, report.stacks[0].scale) == (True, 2.5)
    # No other format knows the word.
    upcycle(stored(tmp_path, "qwen3"), output=tmp_path / "qwen")
    config = read_json(tmp_path / "qwen" / "config.json")
    (tmp_path / "qwen" / "config.json").write_text(json.dumps({**config, "routed_scaling_factor": 2.5}))
    assert upcycle(tmp_path / "qwen", output=tmp_path / "plain", experts=16).stacks[0].scale == 1.0


def test_noise_tells_the_copies_apart(tmp_path: Path) -> None:
    small = differing(tmp_path, "granite", {})
    report = upcycle(small, output=tmp_path / "large", experts=8, init="noise:1%")
    found = tensors_of(tmp_path / "large")["model.layers.0.block_sparse_moe.input_linear.weight"]
    before = tensors_of(small)["model.layers.0.block_sparse_moe.input_linear.weight"]
    assert len({tensor.numpy().tobytes() for tensor in found}) == 8
    for number, expert in enumerate(found):
        spread = float((expert - before[number // 2]).std() / before[number // 2].std())
        assert spread == pytest.approx(0.01, rel=0.1)
    assert not report.preserved


def test_twice_two_is_four(tmp_path: Path) -> None:
    """Enlarged in two steps or in one: the same bytes."""
    small = differing(tmp_path, "ernie4_5", {})
    upcycle(small, output=tmp_path / "twice", experts=8)
    upcycle(tmp_path / "twice", output=tmp_path / "steps", experts=16)
    upcycle(small, output=tmp_path / "once", experts=16)
    one, other = (tensors_of(tmp_path / name) for name in ("steps", "once"))
    assert one.keys() == other.keys()
    assert all(same_bits(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"experts": 6},
            "--experts is 6, {small} is a mixture of 4 experts; to enlarge it, give --experts a multiple of them, such "
            "as 8; `surgery dense` makes a dense checkpoint of it.",
        ),
        (
            {},
            "{small} is a mixture of 4 experts; to enlarge it, give --experts a multiple of them, such as 8; `surgery "
            "dense` makes a dense checkpoint of it.",
        ),
        (
            {"experts": 8, "top_k": 2},
            "--top-k is 2, expected 4: with 2 copies of each expert a token goes to 2 times as many.",
        ),
        (
            {"experts": 8, "layers": "last:1"},
            "--layers is for dense checkpoints; {small} is a mixture, and a larger one is routed as it is.",
        ),
        (
            {"experts": 8, "router_init": "zeros"},
            "--router-init is for dense checkpoints; {small} is a mixture, and a larger one is routed as it is.",
        ),
        (
            {"experts": 8, "init": "drop:0.5"},
            "--init is 'drop:0.5', expected copy or noise:STD: {small} is a mixture already.",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    small = differing(tmp_path, "llama", {})
    with pytest.raises(OptionError) as caught:
        upcycle(small, output=tmp_path / "large", **options)
    assert caught.value.message == sentence.format(small=small)
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"n_group": 2}, "routes by groups of experts (n_group 2), whose scores would change"),
        (
            {"norm_topk_prob": False},
            "takes raw sigmoids for weights (norm_topk_prob false), which copies would multiply",
        ),
    ],
)
def test_what_copies_would_change_is_refused(changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    small = differing(tmp_path, "llama", {"layers": "last:2"})
    config = read_json(small / "config.json")
    assert config["model_type"] == "glm4_moe"
    (small / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UnsupportedError) as caught:
        upcycle(small, output=tmp_path / "large", experts=8)
    wanted = f"{small} cannot be enlarged without changing what it computes: it {reason}."
    assert caught.value.message == wanted


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("t5", {"target": "switch"}, "sends a token to one expert, weighted by its probability"),
        ("m2m_100", {}, "sends a token to two experts, whatever their number"),
    ],
)
def test_formats_with_a_fixed_number_of_choices(
    name: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    upcycled(stored(tmp_path, name), tmp_path / "small", experts=4, **options)
    with pytest.raises(UnsupportedError, match=f"it {reason}"):
        upcycle(tmp_path / "small", output=tmp_path / "large", experts=8)


def broken(small: Path, change: Any) -> Path:
    path = small / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return small


def test_blocks_that_are_not_whole_are_named_together(tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"]
        tensors["model.layers.1.block_sparse_moe.experts.4.w1.weight"] = torch.zeros(48, 32)
        del tensors["model.layers.2.block_sparse_moe.gate.weight"]

    small = broken(differing(tmp_path, "llama", {}), damage)
    with pytest.raises(FormatError) as caught:
        upcycle(small, output=tmp_path / "large", experts=8)
    assert caught.value.problems == (
        f"'model.layers.0' of {small} has an expert 2 that lacks parameters of expert 0, or has them in other shapes.",
        f"'model.layers.1' of {small} holds 'experts.4.w1.weight', which its format does not have.",
        f"'model.layers.2' of {small} has experts and no router 'gate.weight'.",
    )


@pytest.mark.parametrize(
    ("top_k", "found"),
    [(None, "does not say in config.json how many"), ("two", "a token goes to 'two' experts; expected")],
)
def test_a_config_that_does_not_say_how_many(top_k: object, found: str, tmp_path: Path) -> None:
    small = differing(tmp_path, "llama", {})
    config = read_json(small / "config.json")
    del config["num_experts_per_tok"]
    (small / "config.json").write_text(json.dumps(config | ({"num_experts_per_tok": top_k} if top_k else {})))
    with pytest.raises(FormatError, match=found):
        upcycle(small, output=tmp_path / "large", experts=8)

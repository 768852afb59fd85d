"""What a review by fresh eyes found in `upcycle` and `dense`, each with the sentence or figure that it should give."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import surgery
from surgery.checkpoint import open_checkpoint
from surgery.errors import FormatError, InputError, IntegrityError, MismatchError, OptionError, UnsupportedError
from surgery.upcycling.options import parse_router_init
from tests.surgery.upcycling.dense import load, logits, make, relative, stored, upcycled
from tests.tools import read_json


def changed(folder: Path, **settings: Any) -> Path:
    """The folder with other settings in its config."""
    config = read_json(folder / "config.json") | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_biases_of_a_shipped_llama_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**make("llama").config.to_dict() | {"mlp_bias": True})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "dense")
    report = upcycled(open_checkpoint(tmp_path / "dense"), tmp_path / "moe")
    assert report.target == "upcycled_llama"
    assert relative(logits(load(tmp_path / "moe")), logits(model)) < 1e-6


def test_a_mixture_that_cannot_be_loaded_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.upcycling import planning

    monkeypatch.setattr(
        planning, "new_config", lambda work, real=planning.new_config: {**real(work), "model_type": "nonsense"}
    )
    stored(tmp_path, "llama")
    with pytest.raises(IntegrityError) as caught:
        surgery.upcycle(tmp_path / "llama-float32", output=tmp_path / "moe", verify=True)
    assert str(caught.value).startswith("The mixture cannot be run by transformers, and nothing was written")
    assert not (tmp_path / "moe").exists()


def test_rounding_that_the_model_itself_magnifies_is_no_fault(tmp_path: Path) -> None:
    """A T5 whose attention is near a tie at every step: its own float32 is as far from its float64."""
    model = make("t5")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    model.save_pretrained(tmp_path / "dense")
    report = surgery.upcycle(tmp_path / "dense", output=tmp_path / "moe", experts=4, verify=True)
    assert report.preservation is not None
    assert report.preservation.bound is not None
    assert report.preservation.relative <= report.preservation.bound


@pytest.mark.parametrize("depth", [2, 5])
def test_a_config_that_says_another_number_of_layers(tmp_path: Path, depth: int) -> None:
    dense = stored(tmp_path, "llama")
    changed(Path(dense.label), num_hidden_layers=depth)
    with pytest.raises(FormatError) as caught:
        upcycled(open_checkpoint(dense.label), tmp_path / "moe")
    assert str(caught.value) == (
        f"{dense.label} holds 3 layers of its decoder, but config.json says num_hidden_layers {depth}; give the whole "
        "model, or mend the config."
    )


def test_a_lone_file_says_what_is_missing(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    (Path(dense.label) / "config.json").unlink()
    with pytest.raises(InputError) as caught:
        upcycled(open_checkpoint(Path(dense.label) / "model.safetensors"), tmp_path / "moe")
    assert str(caught.value).endswith("has no config.json that names its model_type; give the whole folder.")


@pytest.mark.parametrize("text", ["normal:1e400", "normal:\uff12", "normal:nan", "normal:-1"])
def test_a_deviation_that_is_none(text: str) -> None:
    with pytest.raises(OptionError):
        parse_router_init(text)


def test_the_tokenizer_keeps_its_class(tmp_path: Path) -> None:
    """Where the dense model's files leave it to the model type, which is another now."""
    dense = stored(tmp_path, "gpt2")
    (Path(dense.label) / "tokenizer.json").write_text("{}")
    (Path(dense.label) / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    upcycled(open_checkpoint(dense.label), tmp_path / "moe")
    assert read_json(tmp_path / "moe/tokenizer_config.json") == {
        "model_max_length": 64,
        "tokenizer_class": "GPT2Tokenizer",
    }
    (Path(dense.label) / "tokenizer_config.json").write_text('{"tokenizer_class": "Other"}')
    upcycled(open_checkpoint(dense.label), tmp_path / "again")
    assert (tmp_path / "again/tokenizer_config.json").read_text() == '{"tokenizer_class": "Other"}'


def test_parts_of_an_mlp_stay_side_by_side(tmp_path: Path) -> None:
    """However often a mixture of small experts is enlarged, `dense` finds the MLP again."""
    upcycled(stored(tmp_path, "qwen3"), tmp_path / "moe", init="granular:2", experts=8)
    upcycled(open_checkpoint(tmp_path / "moe"), tmp_path / "more", experts=16)
    upcycled(open_checkpoint(tmp_path / "more"), tmp_path / "most", experts=64)
    surgery.dense(tmp_path / "most", output=tmp_path / "dense")
    before, after = (
        load_file(tmp_path / "qwen3-float32/model.safetensors"),
        load_file(tmp_path / "dense/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_mixture_whose_config_lies_about_its_experts(tmp_path: Path) -> None:
    upcycled(stored(tmp_path, "qwen3"), tmp_path / "moe", experts=4)
    for settings in ({"num_experts_per_tok": 9}, {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 2}):
        changed(tmp_path / "moe", **settings)
        with pytest.raises(MismatchError) as caught:
            upcycled(open_checkpoint(tmp_path / "moe"), tmp_path / "more", experts=8)
        assert "but its routers have 4 rows; mend the config first." in str(caught.value)


def test_a_scale_on_the_experts_is_not_forgotten(tmp_path: Path) -> None:
    upcycled(stored(tmp_path, "llama"), tmp_path / "moe", layers="last:2")
    changed(tmp_path / "moe", routed_scaling_factor=2.5)
    with pytest.raises(UnsupportedError) as caught:
        surgery.dense(tmp_path / "moe", output=tmp_path / "dense")
    assert "multiplies what its experts give (routed_scaling_factor 2.5)" in str(caught.value)


def test_settings_of_attention_are_not_those_of_a_mixture(tmp_path: Path) -> None:
    """`qkv_bias` is a mixture's setting in Qwen2-MoE only."""
    config = transformers.ViTConfig(**make("vit").config.to_dict() | {"qkv_bias": False})
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    upcycled(open_checkpoint(tmp_path / "vit"), tmp_path / "moe")
    surgery.dense(tmp_path / "moe", output=tmp_path / "dense", hash=False)
    assert read_json(tmp_path / "dense/config.json")["qkv_bias"] is False


WRONG = [
    ("llama", "hidden_size", "32", "hidden_size '32', expected a whole number of at least 1."),
    ("llama", "num_hidden_layers", True, "num_hidden_layers True, expected a whole number of at least 1."),
    ("gpt2", "n_head", 0, "n_head 0, expected a whole number of at least 1."),
    ("llama", "rms_norm_eps", "1e-6", "rms_norm_eps '1e-6', expected a number."),
    ("llama", "tie_word_embeddings", "no", "tie_word_embeddings 'no', expected true or false."),
    ("llama", "hidden_act", 7, "hidden_act 7, expected a word."),
    ("llama", "rope_parameters", [10_000], "rope_parameters [10000], expected an object."),
    ("llama", "architectures", "LlamaModel", "architectures 'LlamaModel', expected a list of class names."),
]


@pytest.mark.parametrize(("family", "name", "value", "words"), WRONG, ids=lambda value: str(value)[:20])
def test_a_setting_of_a_wrong_type_is_named_before_any_work(
    family: str, name: str, value: object, words: str, tmp_path: Path
) -> None:
    dense = stored(tmp_path, family)
    surgery.upcycle(dense, output=tmp_path / "moe", experts=2, verify=False)
    calls: tuple[tuple[Path, Callable[..., object]], ...] = (
        (Path(dense.label), partial(surgery.upcycle, experts=2)),
        (tmp_path / "moe", partial(surgery.upcycle, experts=4)),
        (tmp_path / "moe", surgery.dense),
    )
    for place, call in calls:
        changed(place, **{name: value})
        with pytest.raises(FormatError) as caught:
            call(place, output=tmp_path / "out")
        assert str(caught.value) == f"config.json of {place} says {words}"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([Path(dense.label).name, "moe"])


def test_all_settings_of_wrong_types_are_named_at_once(tmp_path: Path) -> None:
    place = Path(stored(tmp_path, "llama").label)
    changed(place, vocab_size="96", rms_norm_eps=None, attention_bias=0)
    with pytest.raises(FormatError, match=r"^2 problems with config.json of ") as caught:
        surgery.upcycle(place, output=tmp_path / "out")
    assert [problem.rpartition(" says ")[2].partition(" ")[0] for problem in caught.value.problems] == [
        "vocab_size",
        "attention_bias",
    ]


def test_dense_says_where_it_is_not_the_mixtures_function(tmp_path: Path) -> None:
    """Raw weights and expert choice are other functions than the MLP, however alike the experts are."""
    raw = "The mixture weighs its experts by raw probabilities"
    choice = "Under expert choice a token goes to as many experts"
    cases: tuple[tuple[str, dict[str, Any], list[str]], ...] = (
        ("llama", {}, []),
        ("qwen2", {"combine": "raw"}, [raw]),
        ("vit", {"combine": "raw"}, [raw]),
        ("vit", {"router": "expert-choice", "capacity": 1.0}, [choice]),
        ("vit", {"router": "expert-choice", "capacity": 4.0}, []),
        ("vit", {"router": "expert-choice", "combine": "raw"}, [raw, choice]),
        ("t5", {"target": "switch"}, [raw]),
    )
    for number, (family, options, expected) in enumerate(cases):
        place = tmp_path / f"moe{number}"
        upcycled(stored(tmp_path, family), place, experts=4, **options)
        report = surgery.dense(place, output=tmp_path / f"dense{number}", dry_run=True)
        assert [words for words in (raw, choice) if any(note.startswith(words) for note in report.notes)] == expected

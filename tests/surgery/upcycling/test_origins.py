"""Experts from several fine-tunes, and from adapters: each expert against the model that it is from."""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import MismatchError, SurgeryError, UnsupportedError
from surgery.upcycling.averages import rounded_once
from tests.models import make, perturb, save
from tests.peft_tools import merged_by_peft, same_bits, stored, write_adapter
from tests.tools import read_json, run_cli

# Measuring is tested elsewhere.
upcycle = partial(surgery.upcycle, verify=False)

MLP = ["gate_proj", "up_proj", "down_proj"]
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16 and three fine-tunes of it."""
    folder = tmp_path_factory.mktemp("models")
    base = make("llama")
    save(base, folder / "base", torch.bfloat16)
    for seed in (1, 2, 3):
        save(perturb(base, seed=seed), folder / f"tuned{seed}", torch.bfloat16)
    return folder


def expert(tensors: dict[str, torch.Tensor], layer: int, number: int, leaf: str) -> torch.Tensor:
    return tensors[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{_MIXTRAL[leaf]}.weight"]


def listed(*paths: Path) -> str:
    return ",".join(map(str, paths))


def mean_of(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """By way of exact fractions, rounded by comparing the two neighbours."""
    flat = [tensor.double().flatten().tolist() for tensor in tensors]
    means = [sum(map(Fraction, values)) / len(tensors) for values in zip(*flat, strict=True)]
    near = torch.tensor([float(mean) for mean in means], dtype=torch.float64).to(dtype)
    for index, mean in enumerate(means):
        around = near[index]
        up, down = (torch.nextafter(around, torch.tensor(side, dtype=dtype)) for side in (torch.inf, -torch.inf))
        off = [abs(Fraction(float(candidate)) - Fraction(mean)) for candidate in (around, up, down)]
        near[index] = (around, up, down)[off.index(min(off))]
    return near.view(tensors[0].shape)


# Several checkpoints --------------------------------------------------------------------------------------------------


def test_each_expert_is_the_mlp_of_its_model(models: Path, tmp_path: Path) -> None:
    """Expert e is that of model e mod n, byte for byte; everything else is the mean, rounded once."""
    paths = [models / f"tuned{seed}" for seed in (1, 2, 3)]
    report = upcycle(models / "base", output=tmp_path / "moe", experts=6, init=f"from:{listed(*paths)}")
    found, own = stored(tmp_path / "moe"), [stored(path) for path in paths]
    for layer in range(2):
        for leaf in MLP:
            for number in range(6):
                wanted = own[number % 3][f"model.layers.{layer}.mlp.{leaf}.weight"]
                assert same_bits(expert(found, layer, number, leaf), wanted)
    rest = [name for name in own[0] if ".mlp." not in name]
    assert rest
    for name in rest:
        assert same_bits(found[name], mean_of([tensors[name] for tensors in own], torch.bfloat16)), name
    assert (report.rest, report.preserved, report.stacks[0].experts) == ("average", False, 6)
    written = (tmp_path / "moe" / "surgery.json").read_text()
    assert [item["role"] for item in json.loads(written)["inputs"]] == ["dense", "expert", "expert", "expert"]
    assert json.loads(written)["options"]["init"] == "from:tuned1,tuned2,tuned3"
    assert str(models) not in written


@pytest.mark.parametrize(("rest", "source"), [("first", "tuned2"), ("base", "base")])
def test_the_rest_can_be_that_of_one_model(rest: str, source: str, models: Path, tmp_path: Path) -> None:
    sources = listed(models / "tuned2", models / "tuned1")
    upcycle(models / "base", output=tmp_path / "moe", init=f"from:{sources}", rest=rest)
    found, wanted = stored(tmp_path / "moe"), stored(models / source)
    names = [name for name in wanted if ".mlp." not in name]
    assert all(same_bits(found[name], wanted[name]) for name in names)
    assert read_json(tmp_path / "moe" / "config.json")["num_local_experts"] == 2


def test_layers_that_stay_dense_are_part_of_the_rest(models: Path, tmp_path: Path) -> None:
    sources = [models / "tuned1", models / "tuned2"]
    upcycle(models / "base", output=tmp_path / "moe", init=f"from:{listed(*sources)}", layers="last:1")
    found, own = stored(tmp_path / "moe"), [stored(path) for path in sources]
    for leaf in MLP:
        name = f"model.layers.0.mlp.{leaf}.weight"
        assert same_bits(found[name], mean_of([tensors[name] for tensors in own], torch.bfloat16))


def test_models_of_another_dtype_are_rounded_once(models: Path, tmp_path: Path) -> None:
    save(perturb(make("llama"), seed=5), tmp_path / "wide")
    sources = listed(models / "tuned1", tmp_path / "wide")
    upcycle(models / "base", output=tmp_path / "moe", init=f"from:{sources}", rest="first")
    found, wide = stored(tmp_path / "moe"), stored(tmp_path / "wide")
    wanted = wide["model.layers.1.mlp.up_proj.weight"].to(torch.bfloat16)
    assert same_bits(expert(found, 1, 1, "up_proj"), wanted)


def test_stacked_experts_come_from_their_models(tmp_path: Path) -> None:
    """Granite keeps all experts in one tensor."""
    import transformers

    config = transformers.GraniteConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.GraniteForCausalLM(config)
    for seed, name in enumerate(("base", "one", "two")):
        save(perturb(base, seed=seed), tmp_path / name)
    upcycle(tmp_path / "base", output=tmp_path / "moe", init=f"from:{listed(tmp_path / 'one', tmp_path / 'two')}")
    found, own = stored(tmp_path / "moe"), [stored(tmp_path / name) for name in ("one", "two")]
    for number, tensors in enumerate(own):
        gate, up, down = (tensors[f"model.layers.1.mlp.{leaf}.weight"] for leaf in MLP)
        assert torch.equal(found["model.layers.1.block_sparse_moe.input_linear.weight"][number], torch.cat([gate, up]))
        assert torch.equal(found["model.layers.1.block_sparse_moe.output_linear.weight"][number], down)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_mean_is_rounded_once(data: st.DataObject) -> None:
    """To the neighbour that exact fractions name, where torch by way of float32 may take the other."""
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    width = data.draw(st.integers(1, 5))
    numbers = st.floats(-1e3, 1e3, width=32) | st.floats(-(2**-24), 2**-24, width=32)
    columns = [torch.tensor(data.draw(st.lists(numbers, min_size=4, max_size=4))) for _ in range(width)]
    exact = torch.stack(columns).double().sum(dim=0) / width
    made = rounded_once(exact, dtype)
    for value, got in zip(exact.tolist(), made, strict=True):
        sides = [torch.nextafter(got, torch.tensor(side, dtype=dtype)) for side in (torch.inf, -torch.inf)]
        distance = abs(Fraction(float(got)) - Fraction(value))
        assert all(distance <= abs(Fraction(float(side)) - Fraction(value)) for side in sides)


def test_rounding_twice_would_show() -> None:
    """Just above the middle between two bfloat16 numbers: float32 alone would land on the middle and then on even."""
    value = torch.tensor([1 + 2**-8 + 2**-40, -1 - 2**-8 - 2**-40, 1 + 2**-8, 0.0, 2.0**-200], dtype=torch.float64)
    assert rounded_once(value, torch.bfloat16).tolist() == [1 + 2**-7, -1 - 2**-7, 1.0, 0.0, 0.0]
    assert value[0].to(torch.bfloat16).item() == 1.0


def test_everything_that_differs_is_named_at_once(models: Path, tmp_path: Path) -> None:
    save(make("qwen2"), tmp_path / "qwen")
    shutil.copytree(models / "tuned1", tmp_path / "odd")
    tensors = load_file(tmp_path / "odd" / "model.safetensors")
    tensors["extra.weight"] = torch.zeros(2, 2)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 32, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "odd" / "model.safetensors")
    config = read_json(tmp_path / "odd" / "config.json") | {"vocab_size": 97, "num_attention_heads": 8}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError) as caught:
        upcycle(models / "base", output=tmp_path / "moe", init=f"from:{listed(tmp_path / 'qwen', tmp_path / 'odd')}")
    base, odd = models / "base", tmp_path / "odd"
    assert caught.value.message == f"6 problems with making experts for {base}:"
    assert sorted(caught.value.problems) == sorted(
        [
            f"{tmp_path / 'qwen'} is of type 'qwen2', expected 'llama' as {base} is.",
            f"{odd} has num_attention_heads 8, expected 4 as in {base}.",
            f"{odd} has vocab_size 97, expected 96 as in {base}.",
            f"{odd} has no tensor 'model.norm.weight', which {base} has.",
            f"{odd} has the tensor 'extra.weight', which {base} has not.",
            f"{odd} has 'model.layers.0.mlp.up_proj.weight' of shape [40, 32], expected [48, 32].",
        ]
    )
    assert not (tmp_path / "moe").exists()


def test_another_tokenizer_of_the_same_size_is_another_vocabulary(models: Path, tmp_path: Path) -> None:
    for name, tokens in (("base", {"a": 0, "b": 1}), ("tuned1", {"a": 0, "b": 1}), ("tuned2", {"a": 1, "b": 0})):
        shutil.copytree(models / name, tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": tokens}, "added_tokens": [name]})
        )
    sources = listed(tmp_path / "tuned1", tmp_path / "tuned2")
    with pytest.raises(MismatchError) as caught:
        upcycle(tmp_path / "base", output=tmp_path / "moe", init=f"from:{sources}")
    wanted = f"{tmp_path / 'tuned2'} has another vocabulary than {tmp_path / 'base'} in tokenizer.json."
    assert caught.value.message == wanted


def test_settings_that_a_model_was_trained_with_are_noted(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "tuned1", tmp_path / "long")
    config = read_json(tmp_path / "long" / "config.json")
    config["max_position_embeddings"] = 128
    (tmp_path / "long" / "config.json").write_text(json.dumps(config))
    report = upcycle(
        models / "base", output=tmp_path / "moe", init=f"from:{listed(tmp_path / 'long', models / 'tuned2')}"
    )
    assert report.notes[-1] == ("long has max_position_embeddings 128; the mixture has 64, as the dense checkpoint.")


# Adapters -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.dtype]:
    """A Llama and two adapters: one for its MLPs, one for MLPs and attention, with DoRA."""
    folder = tmp_path_factory.mktemp("adapted")
    model = make("llama").to(request.param)
    save(model, folder / "base")
    write_adapter(model, LoraConfig(r=4, target_modules=MLP), folder / "a", seed=4)
    write_adapter(model, LoraConfig(r=3, lora_alpha=7, target_modules=[*MLP, "q_proj"]), folder / "b", seed=5)
    write_adapter(model, LoraConfig(r=2, target_modules=MLP, use_dora=True), folder / "c", seed=6)
    return folder, request.param


def test_each_expert_is_the_mlp_with_its_adapter(adapted: tuple[Path, torch.dtype], tmp_path: Path) -> None:
    """The bits that PEFT's merge gives, and `surgery merge`; what adapters change elsewhere is left out by name."""
    folder, dtype = adapted
    sources = [folder / name for name in "abc"]
    report = upcycle(folder / "base", output=tmp_path / "moe", experts=6, init=f"adapters:{listed(*sources)}")
    found, base = stored(tmp_path / "moe"), stored(folder / "base")
    for number, source in enumerate(sources):
        by_peft = merged_by_peft(folder / "base", [source], tmp_path / f"peft{number}", "llama", dtype)
        surgery.merge(folder / "base", source, output=tmp_path / f"merged{number}")
        ours = stored(tmp_path / f"merged{number}")
        for layer in range(2):
            for leaf in MLP:
                name = f"model.layers.{layer}.mlp.{leaf}.weight"
                for copy in (number, number + 3):
                    assert same_bits(expert(found, layer, copy, leaf), ours[name])
                    assert same_bits(expert(found, layer, copy, leaf), by_peft[name])
                assert not torch.equal(ours[name], base[name])
    assert all(same_bits(found[name], base[name]) for name in base if ".mlp." not in name)
    assert report.left_out == ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight")
    assert (
        "2 tensors that the adapters change outside of the MLPs are as in the dense checkpoint "
        "('model.layers.0.self_attn.q_proj.weight', 'model.layers.1.self_attn.q_proj.weight'); --rest average merges "
        "the mean of the changes." in report.notes
    )
    assert report.survived is not None
    assert report.survived > (0.99999 if dtype == torch.float32 else 0.9)
    inputs = read_json(tmp_path / "moe" / "surgery.json")["inputs"]
    assert [(item["role"], item["source"]) for item in inputs[1:]] == [
        ("adapter", "a"),
        ("adapter", "b"),
        ("adapter", "c"),
    ]


def test_the_command(adapted: tuple[Path, torch.dtype], tmp_path: Path) -> None:
    folder, _ = adapted
    init = f"adapters:{folder / 'a'}=0.5,{folder / 'b'}"
    run = run_cli("upcycle", folder / "base", "--init", init, "-o", tmp_path / "moe", "--no-verify")
    assert run.returncode == 0, run.stderr
    assert "adapters:a,b" in run.stdout
    assert "the rest from  the dense checkpoint" in run.stdout
    assert "what the adapters change in 2 other tensors" in run.stdout
    assert "survived the rounding" in run.stdout
    assert surgery.verify(tmp_path / "moe").passed


def test_a_weight_multiplies_the_adapter(adapted: tuple[Path, torch.dtype], tmp_path: Path) -> None:
    folder, _ = adapted
    upcycle(folder / "base", output=tmp_path / "moe", init=f"adapters:{folder / 'a'}=0.5,{folder / 'b'}=-1", layers="0")
    found = stored(tmp_path / "moe")
    for number, source in enumerate(((folder / "a", 0.5), (folder / "b", -1.0))):
        surgery.merge(folder / "base", source, output=tmp_path / f"merged{number}")
        wanted = stored(tmp_path / f"merged{number}")["model.layers.0.mlp.down_proj.weight"]
        assert same_bits(found[f"model.layers.0.mlp.experts.{number}.down_proj.weight"], wanted)
    assert read_json(tmp_path / "moe" / "surgery.json")["inputs"][1]["weight"] == 0.5


def test_the_rest_is_the_mean_of_the_changes(adapted: tuple[Path, torch.dtype], tmp_path: Path) -> None:
    """As merging each with half of its weight; also in MLPs that stay dense."""
    folder, _ = adapted
    sources = listed(folder / "a", folder / "b")
    report = upcycle(
        folder / "base", output=tmp_path / "moe", init=f"adapters:{sources}", rest="average", layers="last:1"
    )
    surgery.merge(folder / "base", (folder / "a", 0.5), (folder / "b", 0.5), output=tmp_path / "merged")
    found, wanted = stored(tmp_path / "moe"), stored(tmp_path / "merged")
    kept = [name for name in wanted if not name.startswith("model.layers.1.mlp.")]
    assert all(same_bits(found[name], wanted[name]) for name in kept)
    assert not same_bits(
        found["model.layers.1.self_attn.q_proj.weight"],
        stored(folder / "base")["model.layers.1.self_attn.q_proj.weight"],
    )
    assert report.left_out == ()


def test_stacked_and_transposed_experts_have_merged_bits(tmp_path: Path) -> None:
    """Conv1D stores (in, out): a DoRA needs the whole matrix there."""
    model = make("gpt2")
    save(model, tmp_path / "base")
    for name, dora in (("a", False), ("b", True)):
        config = LoraConfig(r=3, target_modules=["mlp.c_fc", "mlp.c_proj"], use_dora=dora, fan_in_fan_out=True)
        write_adapter(model, config, tmp_path / name, seed=len(name))
    upcycle(tmp_path / "base", output=tmp_path / "moe", init=f"adapters:{listed(tmp_path / 'a', tmp_path / 'b')}")
    found = stored(tmp_path / "moe")
    for number, name in enumerate("ab"):
        by_peft = merged_by_peft(tmp_path / "base", [tmp_path / name], tmp_path / f"peft{name}", "gpt2", torch.float32)
        for leaf in ("c_fc", "c_proj"):
            mine = found[f"transformer.h.1.mlp.experts.{number}.{leaf}.weight"]
            assert same_bits(mine, by_peft[f"transformer.h.1.mlp.{leaf}.weight"])


def test_what_has_no_mean_is_refused(adapted: tuple[Path, torch.dtype], tmp_path: Path) -> None:
    folder, dtype = adapted
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    write_adapter(make("llama").to(dtype), config, tmp_path / "dora")
    sources = listed(folder / "a", tmp_path / "dora")
    with pytest.raises(UnsupportedError) as caught:
        upcycle(folder / "base", output=tmp_path / "moe", init=f"adapters:{sources}", rest="average")
    assert caught.value.problems[0] == (
        f"{tmp_path / 'dora'} is a DoRA, whose change of 'model.layers.0.self_attn.q_proj.weight' has no mean with the "
        "others; use --rest base, or merge the adapter into the dense checkpoint first."
    )


def test_an_adapter_without_anything_for_the_mlps_is_noted(adapted: tuple[Path, torch.dtype], tmp_path: Path) -> None:
    folder, dtype = adapted
    write_adapter(make("llama").to(dtype), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "q")
    report = upcycle(folder / "base", output=tmp_path / "moe", init=f"adapters:{listed(folder / 'a', tmp_path / 'q')}")
    assert "q changes nothing in the MLPs that become mixtures: its expert is the dense one." in report.notes


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """By the hashes that its surgery.json has on record; `any_base` takes it all the same."""
    base = make("llama")
    save(base, tmp_path / "base")
    save(make("llama", seed=7), tmp_path / "other")
    save(perturb(make("llama", seed=7), rank=2), tmp_path / "tuned")
    surgery.extract(tmp_path / "other", tmp_path / "tuned", output=tmp_path / "adapter", rank=2)
    sources = listed(tmp_path / "adapter", tmp_path / "adapter")
    with pytest.raises(MismatchError, match=r"adapter was made for another base than .*base: tensor 'model.layers"):
        upcycle(tmp_path / "base", output=tmp_path / "moe", init=f"adapters:{sources}")
    upcycle(tmp_path / "base", output=tmp_path / "moe", init=f"adapters:{sources}", any_base=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"init": "from:{base},{adapter}"}, "{adapter} is an adapter; make experts of adapters with --init adapters:..."),
        (
            {"init": "adapters:{base},{base}"},
            "{base} is not an adapter: it has no adapter_config.json; it is a checkpoint. `surgery extract BASE {base} "
            "-o ADAPTER` makes an adapter of it.",
        ),
        ({"init": "from:{base},{base}", "experts": 5}, "--experts is 5, expected a multiple of the 2 models that --init names."),
        ({"init": "from:{base}"}, "--init is 'from:{base}', expected at least two paths after 'from', separated by commas."),
        ({"init": "copy", "rest": "first"}, "--rest goes with --init from:... or adapters:..., where there are several models."),
        ({"init": "adapters:{adapter},{adapter}", "rest": "first"}, "--rest first goes with --init from:...; adapters have base and average."),
        ({"init": "copy", "any_base": True}, "--any-base goes with --init adapters:..."),
    ],
)  # fmt: skip
def test_wrong_options(
    options: dict[str, Any], sentence: str, adapted: tuple[Path, torch.dtype], tmp_path: Path
) -> None:
    folder, _ = adapted
    names = {"base": folder / "base", "adapter": folder / "a"}
    filled: dict[str, Any] = {
        key: value.format(**names) if isinstance(value, str) else value for key, value in options.items()
    }
    with pytest.raises(SurgeryError) as caught:
        upcycle(folder / "base", output=tmp_path / "moe", **filled)
    assert caught.value.message == sentence.format(**names)
    assert not (tmp_path / "moe").exists()


def test_a_dry_run_says_what_there_is_to_do(models: Path, tmp_path: Path) -> None:
    sources = listed(models / "tuned1", models / "tuned2")
    report = upcycle(models / "base", output=tmp_path / "moe", init=f"from:{sources}", dry_run=True)
    assert report.dry_run
    assert report.plan.computed_tensors == sum(".mlp." not in name for name in stored(models / "base"))
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("threads", [1, 4])
def test_the_bytes_do_not_depend_on_threads(threads: int, models: Path, tmp_path: Path) -> None:
    sources = listed(models / "tuned1", models / "tuned2", models / "tuned3")
    upcycle(models / "base", output=tmp_path / "moe", init=f"from:{sources}", threads=threads)
    upcycle(models / "base", output=tmp_path / "again", init=f"from:{sources}")
    assert re.sub(r"\s", "", (tmp_path / "moe" / "surgery.json").read_text()) == re.sub(
        r"\s", "", (tmp_path / "again" / "surgery.json").read_text()
    )

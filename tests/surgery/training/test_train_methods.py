"""Every method through `train`: what is written is read by the other commands, and goes on after an interrupt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import surgery
from surgery.cli.main import run
from surgery.errors import InputError, MismatchError, OptionError, UnsupportedError
from surgery.ops.inspection import AdapterReport
from surgery.training.batches import Schedule, text_batch
from surgery.training.examples import Examples, hold_out, text_examples
from surgery.training.methods import load_method
from surgery.training.options import TrainOptions
from surgery.training.reading import read_rows
from surgery.training.recipe import parse_setting, with_recipe
from surgery.training.text import Encoder, load_tokenizer
from tests.surgery.training import making
from tests.surgery.training.test_resume import figures, interrupted
from tests.tools import read_json, tree

HOW: dict[str, Any] = {
    "steps": 3,
    "batch_size": 4,
    "eval_split": 4,
    "learning_rate": 1e-2,
    "warmup": 0,
    "save_every": 1,
}
EVERY: list[tuple[str, dict[str, Any]]] = [
    ("top:1", {}),
    ("bitfit", {}),
    ("lora", {"rank": 4, "dropout": 0.1}),
    ("lora", {"rank": 4, "rslora": True}),
    ("lora", {"rank": 4, "dora": True, "targets": "attention"}),
    ("lora", {"rank": 4, "pissa": True}),
    ("lora", {"rank": 4, "lora_plus": 4.0, "train": (("ln_f", 0.5),)}),
    ("prompt", {"prompt_tokens": 3}),
    ("prompt", {"prompt_tokens": 2, "infix_tokens": 2}),
    ("prefix", {"prompt_tokens": 3}),
    ("adapter-h", {"rank": 4}),
    ("adapter-l", {"rank": 4}),
    ("lora+prompt", {"rank": 4, "prompt_tokens": 2}),
    ("lora+prefix", {"rank": 4, "prompt_tokens": 2}),
    ("selected", {"train": (("attn", 1.0),), "freeze": ("bias",)}),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.checkpoint(tmp_path_factory.mktemp("base") / "model", "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions, which every method of language models takes."""
    rows = [{"prompt": text[:30], "completion": text[30:90]} for text in making.paragraphs()[:28]]
    return making.jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def examples_of(base: Path, data: Path, config: Any) -> Examples:
    """The rows as the loop sees them."""
    options = TrainOptions(data=str(data))
    encoder = Encoder.of(load_tokenizer(base, options), "completion", "causal-lm", options, config.vocab_size)
    return text_examples(read_rows(str(data)), encoder, 320, options, None)


def held_out_loss(base: Path, output: Path, data: Path, kind: str) -> float:
    """The loss of what was written, loaded as a user would, on the rows that were held out: by hand, row by row."""
    folder = output if kind == "checkpoint" else base
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "adapter":
        model = load_method(model, output)
    model.eval()
    _, held_out = hold_out(examples_of(base, data, model.config), 4, 0)
    total = count = 0.0
    for row in range(len(held_out)):
        batch = text_batch(held_out, [row], padding=0, packed=False)
        labels = batch["labels"]
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], labels=labels).logits[:, -labels.shape[1] :]
        chosen = labels[0, 1:] >= 0
        total += float(cross_entropy(logits[0, :-1][chosen], labels[0, 1:][chosen], reduction="sum"))
        count += int(chosen.sum())
    return total / count


@pytest.mark.parametrize(("method", "options"), EVERY, ids=[f"{name}-{'-'.join(more)}" for name, more in EVERY])
def test_what_is_written_has_the_loss_that_was_logged(
    method: str, options: dict[str, Any], base: Path, data: Path, tmp_path: Path
) -> None:
    report = making.run(base, data, tmp_path / "out", method=method, **options, **HOW)
    assert report.method == method
    assert 0 < report.trained < report.parameters
    kind = "checkpoint" if method in ("top:1", "bitfit", "selected") else "adapter"
    assert report.kind == kind
    evaluations = [line["eval_loss"] for line in making.log(tmp_path / "out") if "eval_loss" in line]
    assert report.best_loss == min(evaluations)
    assert held_out_loss(base, tmp_path / "out", data, kind) == pytest.approx(report.best_loss, abs=2e-5)
    content = read_json(tmp_path / "out" / "surgery.json")
    assert content["outputs"]
    assert surgery.verify(tmp_path / "out").passed


@pytest.mark.parametrize(("method", "options"), [EVERY[index] for index in (1, 2, 5, 8, 10, 12)])
def test_a_method_goes_on_bit_for_bit(
    method: str, options: dict[str, Any], base: Path, data: Path, tmp_path: Path
) -> None:
    how = {**HOW, "method": method, **options, "gradient_accumulation": 2}
    making.run(base, data, tmp_path / "whole", **how)
    interrupted(3, base, data, tmp_path / "out", how)
    making.run(base, data, tmp_path / "out", **how)
    assert figures(tmp_path / "out") == figures(tmp_path / "whole")
    weights = [name for name in tree(tmp_path / "out") if name.endswith(".safetensors")]
    assert weights
    assert all(tree(tmp_path / "out")[name] == tree(tmp_path / "whole")[name] for name in weights)


def test_lora_is_peft_s(data: Path, tmp_path: Path) -> None:
    """The same start and the same steps, by hand on PEFT's own model; and `merge` gives what PEFT's gives."""
    base = making.checkpoint(tmp_path / "llama", "llama")
    how = {**HOW, "eval_split": 0, "schedule": "constant", "max_grad_norm": 0.0, "seed": 3}
    making.run(base, data, tmp_path / "out", method="lora", rank=4, **how)
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 32, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    examples = examples_of(base, data, model.config)
    torch.manual_seed(3)
    wanted = peft.LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM", target_modules="all-linear")
    wrapped: Any = peft.get_peft_model(model, wanted)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(3):
        (rows,) = Schedule(len(examples), 4, 1, 3).window(step)
        loss = wrapped(**text_batch(examples, rows, padding=0, packed=False)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert making.losses(tmp_path / "out") == pytest.approx(losses, abs=1e-5)
    surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
    found, merged = load_file(tmp_path / "merged" / "model.safetensors"), wrapped.merge_and_unload().state_dict()
    # After three steps of 1e-2, what differs is the order of sums in a hundred roundings.
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name].detach(), rtol=1e-4, atol=1e-5)


# An adapter that is trained on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [EVERY[index] for index in (2, 4, 6, 7, 8, 9, 10, 11, 12)])
def test_an_adapter_is_trained_on(method: str, options: dict[str, Any], base: Path, data: Path, tmp_path: Path) -> None:
    """Its first loss is the last run's end, and the result is an adapter of the same kind for the same base."""
    how = {**HOW, "eval_split": 0, "schedule": "constant"}
    making.run(base, data, tmp_path / "first", method=method, **options, **how)
    report = making.run(tmp_path / "first", data, tmp_path / "second", base=base, **{**how, "learning_rate": 0.0})
    assert (report.method, report.kind) == (method, "adapter")
    for name in [name for name in tree(tmp_path / "first") if name.endswith(".safetensors")]:
        one, other = load_file(tmp_path / "first" / name), load_file(tmp_path / "second" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    making.run(tmp_path / "first", data, tmp_path / "third", base=base, **how)
    assert making.losses(tmp_path / "third")[0] < making.losses(tmp_path / "first")[0]
    settings = "adapter_config.json" if (tmp_path / "first" / "adapter_config.json").exists() else "surgery_method.json"
    first, third = read_json(tmp_path / "first" / settings), read_json(tmp_path / "third" / settings)
    # What PEFT notes of the start alone.
    assert {**third, "init_lora_weights": None} == {**first, "init_lora_weights": None}
    roles = [entry["role"] for entry in read_json(tmp_path / "third" / "surgery.json")["inputs"]]
    assert roles == ["base", "adapter", "data"]


def test_training_on_by_the_name_in_the_adapter(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is found by its name; where it is not, one sentence says how to name it."""
    making.run(base, data, tmp_path / "first", method="lora", rank=2, **HOW)
    command = ["train", str(tmp_path / "first"), "--data", str(data), "--steps", "1", "--device", "cpu", "--quiet"]
    assert run([*command, "-o", str(tmp_path / "second")]) == 1
    assert capsys.readouterr().err == (
        f"Error: {tmp_path / 'first'} is an adapter of 'model', which is not here; name its base with --base "
        "CHECKPOINT.\n"
    )
    monkeypatch.chdir(base.parent)
    assert run([*command, "-o", str(tmp_path / "second")]) == 0
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()


def test_training_on_with_another_base_or_other_options(base: Path, data: Path, tmp_path: Path) -> None:
    making.run(base, data, tmp_path / "first", method="lora", rank=2, **HOW)
    other = tmp_path / "other"
    tensors = load_file(base / "model.safetensors")
    making.checkpoint(other, "gpt2")
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match="--any-base takes it all the same"):
        making.run(tmp_path / "first", data, tmp_path / "out", base=other, **HOW)
    surgery.train(
        tmp_path / "first",
        data=data,
        output=tmp_path / "out",
        base=other,
        any_base=True,
        steps=1,
        device="cpu",
        eval_data=data,
    )
    with pytest.raises(OptionError, match=r"^--rank is for a fresh adapter, and .* is trained on as it is; leave it o"):
        making.run(tmp_path / "first", data, tmp_path / "out2", base=base, rank=3, **HOW)
    with pytest.raises(OptionError, match=r"^--base is for an adapter that is trained on, and .* is none\.$"):
        making.run(base, data, tmp_path / "out2", base=base, **HOW)


@pytest.mark.parametrize(
    ("method", "called", "particulars", "tensors"),
    [
        ("prompt", "PROMPT_TUNING", ("5 virtual tokens",), 1),
        ("prefix", "PREFIX_TUNING", ("5 virtual tokens",), 1),
        ("adapter-h", "adapter-h", ("bottleneck of 3",), 16),
    ],
)
def test_what_is_no_lora_is_described(
    method: str, called: str, particulars: tuple[str, ...], tensors: int, base: Path, data: Path, tmp_path: Path
) -> None:
    size = {"rank": 3} if method == "adapter-h" else {"prompt_tokens": 5}
    making.run(base, data, tmp_path / "made", method=method, **size, **HOW)
    report = surgery.inspect(tmp_path / "made", tensors=True)
    assert isinstance(report, AdapterReport)
    assert (report.method, report.variants, report.modules) == (called, particulars, 0)
    assert report.total.tensors == len(report.tensors) == tensors
    assert report.base == "model"
    assert report.origin is not None
    assert report.origin.operation == "train"


@pytest.mark.parametrize("method", ["prompt", "adapter-h"])
def test_what_is_no_lora_is_held_against_its_base_too(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    """By what its surgery.json has on record: refused to train on, noted where it is evaluated."""
    making.run(base, data, tmp_path / "first", method=method, **HOW)
    other = tmp_path / "other"
    tensors = load_file(base / "model.safetensors")
    making.checkpoint(other, "gpt2")
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match=r"was made from another base than .*; --any-base takes it all the same\.$"):
        making.run(tmp_path / "first", data, tmp_path / "out", base=other, **HOW)
    for place, noted in ((base, 0), (other, 1)):
        report = surgery.evaluate(place, data=data, adapters=[tmp_path / "first"], device="cpu", dry_run=True)
        notes = [note for note in report.notes if "was made from another base than" in note]
        assert len(notes) == noted


def test_another_kind_of_adapter_is_not_trained_on(base: Path, data: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True
    )
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(
        UnsupportedError, match=r"is an adapter of type 'IA3', which cannot be trained on here; expecte"
    ):
        making.run(tmp_path / "ia3", data, tmp_path / "out", base=base, **HOW)


def test_a_lora_of_a_merged_base(base: Path, data: Path, tmp_path: Path) -> None:
    """Stacked: the second adapter belongs to what the first was merged into."""
    making.run(base, data, tmp_path / "first", method="lora", rank=2, **HOW)
    surgery.merge(base, tmp_path / "first", output=tmp_path / "merged")
    making.run(tmp_path / "merged", data, tmp_path / "second", method="lora", rank=2, **HOW)
    assert read_json(tmp_path / "second" / "adapter_config.json")["base_model_name_or_path"] == "merged"
    surgery.merge(tmp_path / "merged", tmp_path / "second", output=tmp_path / "both")
    assert (tmp_path / "both" / "model.safetensors").is_file()


# Other tasks and kinds of model ---------------------------------------------------------------------------------------


def test_mixtures_take_lora_routers_and_experts(data: Path, tmp_path: Path) -> None:
    """Of transformers' own kind, and of the kind that ships its code."""
    for kind in ("mixtral", "gpt2"):
        folder = making.checkpoint(tmp_path / kind, kind)
        if kind == "gpt2":
            surgery.upcycle(folder, output=tmp_path / "moe", experts=4)
            folder = tmp_path / "moe"
            making.tokenizer().save_pretrained(folder)
        for method in ("lora", "router", "experts"):
            output = tmp_path / f"{kind}-{method}"
            report = making.run(folder, data, output, method=method, router_aux_loss=0.01, **HOW)
            assert report.kind == ("adapter" if method == "lora" else "checkpoint")
            assert making.log(output)[0]["aux_loss"] > 0
            if method == "router":
                one, other = (load_file(place / "model.safetensors") for place in (folder, output))
                changed = {name for name in one if not torch.equal(one[name], other[name])}
                assert changed
                assert all("gate" in name or "router" in name for name in changed)


def test_classifiers_pictures_and_sequences(tmp_path: Path) -> None:
    """LoRA of each; a classifier's fresh head is stored with it."""
    labels = [{"text": text, "label": int("class" in text)} for text in making.paragraphs()[:16]]
    rows = making.jsonl(tmp_path / "labels.jsonl", labels)
    bert = making.checkpoint(tmp_path / "bert", "bert")
    making.run(bert, rows, tmp_path / "bert-lora", method="lora", rank=2, steps=2)
    tensors = load_file(tmp_path / "bert-lora" / "adapter_model.safetensors")
    assert any("classifier" in name for name in tensors)
    pairs = making.jsonl(
        tmp_path / "pairs.jsonl", ({"prompt": t[:20], "completion": t[20:40]} for t in making.paragraphs()[:9])
    )
    for method in ("lora", "prompt", "prefix", "adapter-h"):
        t5 = making.checkpoint(tmp_path / "t5", "t5")
        report = making.run(t5, pairs, tmp_path / f"t5-{method}", method=method, steps=2)
        assert (report.task, report.kind) == ("seq2seq", "adapter")
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez(tmp_path / "digits.npz", images=digits.images[:32].astype("uint8") * 15, labels=digits.target[:32])
    vit = making.checkpoint(tmp_path / "vit", "vit")
    report = making.run(vit, tmp_path / "digits.npz", tmp_path / "vit-lora", method="lora", rank=2, steps=2)
    assert (report.task, report.kind) == ("image-classification", "adapter")


# The command line and recipes -----------------------------------------------------------------------------------------


def test_the_default_is_lora(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", str(base), "--data", str(data), "-o", str(tmp_path / "out"), "--device", "cpu", "--json"]
    assert (
        run([*command, "--method", "lora", "--steps", "1", "--rank", "2", "--train", "ln_f=0.5", "--freeze", "bias"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert (report["method"], report["kind"]) == ("lora", "adapter")
    content = read_json(tmp_path / "out" / "surgery.json")
    assert content["options"]["rank"] == 2
    assert content["options"]["train"] == [["ln_f", 0.5]]
    assert content["options"]["learning_rate"] == pytest.approx(2e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "PeftModel.from_pretrained(base_model, adapter)" in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--method", "magic"], "Error: --method magic is not known; it is one of full, selected, top:N, bitfit, lora"),
        (["--method", "full", "--rslora"], "Error: --rslora belongs to LoRA, and --method is full; leave it out."),
        (["--method", "prompt", "--packing"], "Error: --packing puts examples into one row, and --method prompt begi"),
        (["--method", "router"], "Error: --method router trains routers, and GPT2LMHeadModel has none"),
        (
            ["--end-token", "<|stop|>"],
            "Error: The end token '<|stop|>' is not in the vocabulary, and an adapter has no",
        ),
    ],
)
def test_options_that_make_no_sense(
    given: list[str], sentence: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(base), "--data", str(data), "-o", str(tmp_path / "out"), "--device", "cpu", "--steps", "1"]
    assert run([*command, *given]) in (1, 2)
    assert capsys.readouterr().err.startswith(sentence)
    assert list(tmp_path.iterdir()) == []


def test_bitfit_trains_nothing_on_a_llama(data: Path, tmp_path: Path) -> None:
    folder = making.checkpoint(tmp_path / "model", "llama")
    with pytest.raises(UnsupportedError, match=r"^--method bitfit trains biases, and LlamaForCausalLM has none; use"):
        making.run(folder, data, tmp_path / "out", method="bitfit", **HOW)


def test_recipes_and_methods() -> None:
    paper = with_recipe("lora-paper", {"data": "x"})
    assert (paper.method, paper.rank, paper.lora_alpha, paper.rate) == ("lora", 4, 32.0, 2e-4)
    other = with_recipe("lora-paper", {"data": "x", "method": "full"})
    assert (other.method, other.targets, other.epochs) == ("full", None, 5)
    assert with_recipe("lima", {"data": "x"}).method == "full"
    assert parse_setting("train=ln_f=0.5") == ("train", (("ln_f", 0.5),))
    assert parse_setting("freeze=bias") == ("freeze", ("bias",))


def test_an_adapter_whose_base_is_no_folder(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        surgery.train(tmp_path / "nothing", data=data, output=tmp_path / "out")


def test_what_is_trained_beside_a_bottleneck_stays(tmp_path: Path) -> None:
    """Going on with an adapter of ours, whatever it stores is trained on and stored again."""
    base, data = making.checkpoint(tmp_path / "base"), making.texts(tmp_path / "t.jsonl", 12)
    how: dict[str, Any] = {"steps": 3, "eval_data": str(data), "batch_size": 4}
    first = making.run(
        base, data, tmp_path / "one", method="adapter-h", rank=2, train=(("norm", 1.0),), learning_rate=0.1, **how
    )
    going = making.run(tmp_path / "one", data, tmp_path / "two", base=base, learning_rate=0.0, **how)
    assert going.trained == first.trained
    one, two = (load_file(tmp_path / name / "surgery_method.safetensors") for name in ("one", "two"))
    assert any("norm" in name for name in one)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", "lora+prompt"])
def test_an_adapter_of_a_base_of_another_size(tmp_path: Path, method: str) -> None:
    """Is one sentence where PEFT loads it, too."""
    base, data = making.checkpoint(tmp_path / "base"), making.texts(tmp_path / "t.jsonl", 4)
    sizes: dict[str, Any] = {**making._CAUSAL, "hidden_size": 64}
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    other = making.checkpoint(tmp_path / "other", made=wide)
    dora = {"dora": True} if method == "lora" else {}
    making.run(base, data, tmp_path / "out", method=method, steps=1, **dora)
    with pytest.raises(MismatchError, match=r"is it for another base|out on this model"):
        surgery.evaluate(other, data=data, adapters=[tmp_path / "out"], device="cpu")


def test_a_damaged_folder_of_ours(tmp_path: Path) -> None:
    base, data = making.checkpoint(tmp_path / "base"), making.texts(tmp_path / "t.jsonl", 4)
    making.run(base, data, tmp_path / "out", method="adapter-l", rank=2, steps=1)
    (tmp_path / "out" / "surgery_method.safetensors").write_bytes(b"xx")
    with pytest.raises(InputError, match=r"surgery_method\.safetensors has 2 bytes, too few for"):
        surgery.evaluate(base, data=data, adapters=[tmp_path / "out"], device="cpu")


def test_a_dora_of_a_deeper_base(tmp_path: Path) -> None:
    """PEFT leaves out the layers that are not there, and says so in a warning at most."""
    base, data = making.checkpoint(tmp_path / "base"), making.texts(tmp_path / "t.jsonl", 4)
    sizes: dict[str, Any] = {**making._CAUSAL, "num_hidden_layers": 1}
    short = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    other = making.checkpoint(tmp_path / "other", made=short)
    making.run(base, data, tmp_path / "out", method="lora", dora=True, steps=1)
    with pytest.raises(MismatchError, match=r"7 problems with .*out on this model"):
        surgery.evaluate(other, data=data, adapters=[tmp_path / "out"], device="cpu")


def test_what_no_weights_can_hold_is_said(base: Path, data: Path, tmp_path: Path) -> None:
    """`merge` and `combine` take no virtual tokens and no bottlenecks, and do not drop them in silence."""
    how = {**HOW, "steps": 1}
    sentences = {
        "lora+prompt": "has virtual tokens beside its LoRA, in the folder prompt, which no weights can hold; delete",
        "prefix": "is an adapter of type 'PREFIX_TUNING': virtual tokens, which cannot be merged into weights.",
        "adapter-h": "is an adapter of a method that PEFT does not have (surgery_method.json), which cannot be merged",
    }
    for method, sentence in sentences.items():
        place = tmp_path / method
        making.run(base, data, place, method=method, **how)
        with pytest.raises(UnsupportedError) as caught:
            surgery.merge(base, place, output=tmp_path / "merged")
        assert sentence in str(caught.value)
        with pytest.raises(UnsupportedError) as caught:
            surgery.combine(place, place, output=tmp_path / "combined")
        assert sentence in str(caught.value)
    with pytest.raises(OptionError, match=r"^--any-base is for an adapter that is trained on, and .* is none\.$"):
        surgery.train(base, data=data, output=tmp_path / "out", any_base=True)

"""The command: several adapters, rows of their own, passes of their own, files, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

import surgery
from surgery.cli.main import run
from surgery.evaluation.report import EvalReport
from surgery.training.methods import MethodOptions, apply_method
from tests.peft_tools import write_adapter
from tests.surgery.training import making
from tests.tools import tree

LORAS = {
    "law": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "code": LoraConfig(r=2, lora_alpha=8, use_rslora=True, target_modules="all-linear", rank_pattern={"q_proj": 5}),
    "words": LoraConfig(r=3, target_modules=["embed_tokens"]),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "up_proj"]),
    "whole": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}
SHARED = ("law", "code", "words")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters of every kind, texts and prompts."""
    folder = tmp_path_factory.mktemp("eval")
    making.checkpoint(folder / "base")
    for number, (name, config) in enumerate(LORAS.items()):
        write_adapter(making.model(), config, folder / name, seed=number, scale=0.5)
    making.texts(folder / "t.jsonl", 10)
    making.jsonl(folder / "p.jsonl", [{"prompt": t[:30], "completion": t[30:]} for t in making.paragraphs()[:6]])
    return folder


def evaluate(place: Path, data: str = "t.jsonl", adapters: tuple[str, ...] = (), **options: Any) -> EvalReport:
    return surgery.evaluate(
        place / "base", data=place / data, adapters=[place / name for name in adapters], device="cpu", **options
    )


def loss_with_peft(place: Path, name: str | None, texts: list[str]) -> float:
    """Row by row, with the adapter loaded by PEFT alone."""
    model: Any = making.model().eval()
    if name is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, str(place / name)).eval()
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*making.tokenizer()(text)["input_ids"], 0]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def test_many_adapters_in_one_pass(place: Path) -> None:
    """A line for the base and for each adapter, all as with PEFT one at a time; those that cannot share say why."""
    report = evaluate(place, adapters=(*LORAS,), batch_size=7)
    texts = making.paragraphs()[:10]
    for line, name in zip(report.lines, (None, *LORAS), strict=True):
        assert line.loss == pytest.approx(loss_with_peft(place, name, texts), rel=2e-6)
        assert line.name == (name or "base")
        assert line.together == (name in (*SHARED, None))
        assert (line.reason is None) == line.together
    assert len({round(line.loss or 0, 4) for line in report.lines}) == 6, "adapters that differ"
    assert report.notes == (
        "dora is a DoRA, which scales the rows of the weights, so it has a pass of its own.",
        "whole stores lm_head.weight whole (modules_to_save), so it has a pass of its own.",
    )


def test_rows_on_adapters_of_their_own(place: Path, tmp_path: Path) -> None:
    """By the column `adapter` or another that is named; and the whole is the mean over all predictions."""
    texts = making.paragraphs()[:9]
    names = ["law", "code", None, "law", "", "dora", "code", "base", "law"]
    rows = [{"text": text, "adapter": name, "tenant": "law"} for text, name in zip(texts, names, strict=True)]
    making.jsonl(place / "own.jsonl", rows)
    report = evaluate(place, "own.jsonl", ("law", "code", "dora", "words"), batch_size=4)
    assert report.adapter_field == "adapter"
    assert [line.name for line in report.lines] == ["base", "law", "code", "dora", "all rows"], "none names words"
    own = {
        name: [t for t, n in zip(texts, names, strict=True) if (n or "base") == name]
        for name in ("base", "law", "code", "dora")
    }
    for line in report.lines[:-1]:
        wanted = loss_with_peft(place, None if line.name == "base" else line.name, own[line.name])
        assert line.loss == pytest.approx(wanted, rel=2e-6)
        assert line.examples == len(own[line.name])
    whole = report.lines[-1]
    assert (whole.kind, whole.examples, whole.predictions) == (
        "total",
        9,
        sum(r.predictions for r in report.lines[:-1]),
    )
    mean = sum((r.loss or 0) * r.predictions for r in report.lines[:-1]) / whole.predictions
    assert whole.loss == pytest.approx(mean, rel=1e-9)
    every = evaluate(place, "own.jsonl", ("law",), adapter_field="")
    assert [(line.name, line.examples) for line in every.lines] == [("base", 9), ("law", 9)]
    other = evaluate(place, "own.jsonl", ("law", "code"), adapter_field="tenant")
    assert [line.name for line in other.lines] == ["law", "all rows"]
    with pytest.raises(
        surgery.InputError, match=r"own.jsonl, line 6: 'adapter' is 'dora', which is none of the adapter"
    ):
        evaluate(place, "own.jsonl", ("law", "code"))
    with pytest.raises(surgery.InputError, match=r"own.jsonl has no column 'who'; it has 'adapter', 'tenant', 'text'"):
        evaluate(place, "own.jsonl", ("law",), adapter_field="who")


def test_weights_of_adapters(place: Path) -> None:
    """`path=0` is the base, and a weight is for those that share a pass."""
    report = surgery.evaluate(place / "base", data=place / "t.jsonl", adapters=[f"{place}/law=0"], device="cpu")
    assert report.lines[1].loss == pytest.approx(report.lines[0].loss, rel=1e-7)
    with pytest.raises(surgery.OptionError, match=r"dora is a DoRA, .*, which cannot be given the weight 0.5\."):
        surgery.evaluate(place / "base", data=place / "t.jsonl", adapters=[(place / "dora", 0.5)])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapter-h", "prompt", "infix", "prefix", "lora+prompt"])
def test_other_methods_have_passes_of_their_own(method: str, place: Path) -> None:
    """The figures are those of the model that `apply_method` has made, asked directly."""
    options = MethodOptions(
        "prompt" if method == "infix" else method, rank=4, infix_tokens=2 if method == "infix" else 0
    )
    prepared = apply_method(making.model(), options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prepared.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    prepared.save(place / method)
    report = evaluate(place, "p.jsonl", ("law", method), batch_size=1)
    total, count, model = 0.0, 0, prepared.model.eval()
    for text in making.paragraphs()[:6]:
        before = making.tokenizer()(text[:30])["input_ids"]
        whole = making.tokenizer()(text)["input_ids"]
        if whole[: len(before)] != before:
            whole = [*before, *making.tokenizer()(text[30:])["input_ids"]]
        labels = torch.tensor([[-100] * len(before) + whole[len(before) :] + [0]])
        said = int((labels != -100).sum())
        with torch.no_grad():
            ids = torch.tensor([[*whole, 0]])
            total += float(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss) * said
        count += said
    assert [line.together for line in report.lines] == [True, True, False]
    assert report.lines[2].loss == pytest.approx(total / count, rel=1e-5)
    out = place / f"{method}.answers"
    answers = evaluate(place, "p.jsonl", (method,), generate=out, max_new_tokens=3).lines
    assert [line.answers for line in answers] == [6, 6]


def test_an_adapter_that_brings_the_head(place: Path, tmp_path: Path) -> None:
    """On a base without one: the base is left out, and a bare LoRA refused."""
    import transformers

    base = making.checkpoint(tmp_path / "bert", "bert")
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=2)
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier", "pooler"])
    write_adapter(model, config, tmp_path / "with")
    write_adapter(model, LoraConfig(r=2, target_modules=["query"]), tmp_path / "without")
    rows = [{"text": text, "label": len(text) % 2} for text in making.paragraphs()[:10]]
    data = making.jsonl(tmp_path / "l.jsonl", rows)
    report = surgery.evaluate(base, data=data, adapters=[tmp_path / "with"], device="cpu")
    assert [line.name for line in report.lines] == ["with"]
    assert report.notes[0] == "bert has no head for classes and is left out; the adapters bring theirs."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone: Any = PeftModel.from_pretrained(model, str(tmp_path / "with")).eval()
    with torch.no_grad():
        said = [int(alone(**making.tokenizer()(r["text"], return_tensors="pt")).logits.argmax()) for r in rows]
    assert report.lines[0].accuracy == pytest.approx(sum(a == r["label"] for a, r in zip(said, rows, strict=True)) / 10)
    with pytest.raises(surgery.InputError, match=r"Neither .*bert nor .*without has a head for classes\."):
        surgery.evaluate(base, data=data, adapters=[tmp_path / "without"], device="cpu")


@pytest.mark.slow
def test_adapters_on_a_mixture(tmp_path: Path) -> None:
    """In one pass, routers are watched for each adapter; LoRA on experts, fused, has a pass of its own."""
    base = making.checkpoint(tmp_path / "mixtral", "mixtral")
    configs = {
        "attention": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        "experts": LoraConfig(r=2, target_modules=["o_proj"], target_parameters=["experts.down_proj"]),
    }
    for name, config in configs.items():
        write_adapter(making.model("mixtral"), config, tmp_path / name, scale=0.5)
    data = making.texts(tmp_path / "t.jsonl", 5)
    report = surgery.evaluate(base, data=data, adapters=[tmp_path / name for name in configs], device="cpu")
    assert [line.reason for line in report.lines] == [
        None, None, "acts on parameters that hold several experts (target_parameters)",
    ]  # fmt: skip
    for found, own in zip(report.lines, (None, *configs), strict=True):
        model: Any = making.model("mixtral").eval()
        if own is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(model, str(tmp_path / own)).eval()
        total, count, taken = 0.0, 0, torch.zeros(4)
        for text in making.paragraphs()[:5]:
            ids = torch.tensor([[*making.tokenizer()(text)["input_ids"], 0]])
            with torch.no_grad():
                outputs = model(input_ids=ids, labels=ids, output_router_logits=True)
                plain = model(input_ids=ids, labels=ids)
            total, count = total + float(plain.loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
            taken += torch.bincount(outputs.router_logits[1].topk(2).indices.flatten(), minlength=4)
        assert found.loss == pytest.approx(total / count, rel=2e-6)
        assert found.load is not None
        assert found.load["1"] == pytest.approx((taken / taken.sum()).tolist(), abs=1e-5)
    assert report.lines[0].load != report.lines[1].load


def test_adapters_of_another_base(place: Path, tmp_path: Path) -> None:
    """By hashes on record, and it fits: a note. An adapter in the base's place: what to write instead."""
    other, tuned = making.model(), making.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        for parameter in tuned.model.layers.parameters():
            parameter.mul_(1.6)
    making.checkpoint(tmp_path / "other", made=other)
    making.checkpoint(tmp_path / "tuned", made=tuned)
    surgery.extract(tmp_path / "other", tmp_path / "tuned", output=tmp_path / "made", rank=2)
    report = surgery.evaluate(place / "base", data=place / "t.jsonl", adapters=[tmp_path / "made"], device="cpu")
    assert len(report.notes) == 1
    assert f"{tmp_path}/made was made for another base than {place}/base: tensor " in report.notes[0]
    assert report.notes[0].endswith(" is not the one of other that its surgery.json has on record.")
    assert report.lines[1].loss is not None
    with pytest.raises(
        surgery.InputError, match=r"law is an adapter, and its base comes first: `surgery eval BASE --ad"
    ):
        surgery.evaluate(place / "law", data=place / "t.jsonl")


def test_another_peft_type(place: Path) -> None:
    """Prefix tuning that PEFT itself has written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = get_peft_model(making.model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        made.save_pretrained(place / "peft-prefix")
    report = evaluate(place, adapters=("peft-prefix",), dry_run=True)
    assert report.lines[1].reason == "is an adapter of type 'PREFIX_TUNING'"
    assert report.lines[1].loss is None


def test_answers_and_pairs(place: Path, tmp_path: Path) -> None:
    """Greedy answers of each model, as transformers gives them row by row; pairs and their key; another checkpoint."""
    out, pairs = tmp_path / "answers.jsonl", tmp_path / "pairs.jsonl"
    report = evaluate(
        place, "p.jsonl", ("law",), against=place / "code", generate=out, pairwise=pairs, max_new_tokens=5, batch_size=4
    )
    answers = [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]
    assert [(a["model"], a["row"]) for a in answers] == [(m, r + 1) for m in ("base", "law", "code") for r in range(6)]
    words = making.tokenizer()
    for name, own in (("law", answers[6:12]), (None, answers[:6])):
        model: Any = making.model().eval()
        if name is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(model, str(place / name)).eval()
        for found in own:
            ids = torch.tensor([words(found["prompt"])["input_ids"]])
            said = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert found["answer"] == words.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    assert report.lines[1].bleu is not None
    key = json.loads((tmp_path / "pairs.key.json").read_bytes())
    assert (key["model"], key["against"], len(key["pairs"])) == ("law", "code", 6)
    by_row = {(a["model"], a["prompt"]): a["answer"] for a in answers}
    for text in pairs.read_text(encoding="utf-8").splitlines():
        pair = json.loads(text)
        who = key["pairs"][pair["id"]]
        assert {side: by_row[who[side], pair["prompt"]] for side in "ab"} == {side: pair[side] for side in "ab"}
    making.checkpoint(tmp_path / "base", "gpt2")
    making.checkpoint(tmp_path / "llama", "llama")
    both = evaluate(place, "p.jsonl", against=(tmp_path / "base", place / "law", tmp_path / "llama")).lines
    assert [(line.name, line.kind) for line in both] == [
        ("base", "base"), ("law", "adapter"), (str(tmp_path / "base"), "checkpoint"), ("llama", "checkpoint")
    ]  # fmt: skip
    found = evaluate(place, "p.jsonl", against=tmp_path / "base").lines
    assert [(line.kind, line.together) for line in found] == [("base", False), ("checkpoint", False)]
    assert found[1].name == str(tmp_path / "base")
    alone = surgery.evaluate(tmp_path / "base", data=place / "p.jsonl", device="cpu").lines[0]
    assert found[1].loss == alone.loss


def test_drawn_answers_follow_the_seed(place: Path, tmp_path: Path) -> None:
    def drawn(name: str, seed: int) -> bytes:
        out = tmp_path / name
        evaluate(place, "p.jsonl", generate=out, max_new_tokens=6, temperature=1.5, seed=seed)
        return out.read_bytes()

    assert drawn("a", 1) == drawn("b", 1) != drawn("c", 2)


# The command line -----------------------------------------------------------------------------------------------------


def command(place: Path, *others: str) -> list[str]:
    return ["eval", str(place / "base"), "--data", str(place / "t.jsonl"), "--device", "cpu", *others]


def test_what_it_prints_and_writes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table, or one object; a file only where one is named, and it holds that object."""
    adapters = ["--adapters", f"{place}/law,{place}/dora"]
    before = tree(place)
    assert run(command(place, *adapters)) == 0
    printed = capsys.readouterr().out.splitlines()
    head = next(line.split() for line in printed if line.startswith("model"))
    assert head == ["model", "kind", "pass", "examples", "predictions", "loss", "perplexity", "bits/byte", "accuracy"]
    lines = {line.split()[0]: line.split()[1:4] for line in printed if line.endswith("%")}
    assert lines == {
        "base": ["base", "shared", "10"],
        "law": ["adapter", "shared", "10"],
        "dora": ["adapter", "own", "10"],
    }
    assert printed[-1].startswith("Note: dora is a DoRA")
    assert tree(place) == before
    assert run(command(place, *adapters, "--json", "-o", str(tmp_path / "report.json"))) == 0
    printed_object = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "report.json").read_bytes()) == printed_object
    assert printed_object["data"]["digest"] == surgery.evaluate(place / "base", data=place / "t.jsonl").data.digest
    assert printed_object["lines"][1]["name"] == "law"
    assert printed_object["files"] == {"--output": str(tmp_path / "report.json")}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_dry_run_writes_and_runs_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    assert run(command(place, "--adapters", f"{place}/law,{place}/dora", "--dry-run", "-o", str(out))) == 0
    printed = capsys.readouterr().out
    assert f"would write  {out}" in printed
    assert "loss" not in printed
    assert not out.exists()


def test_files_are_not_replaced(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless asked; and a file that cannot be written leaves none."""
    out = tmp_path / "r.json"
    out.write_text("mine")
    assert run(command(place, "-o", str(out))) == 1
    assert (
        capsys.readouterr().err == f"Error: --output is {out}, which exists already; pass --overwrite to replace it.\n"
    )
    assert out.read_text() == "mine"
    assert run(command(place, "-o", str(out), "--overwrite", "--quiet")) == 0
    assert json.loads(out.read_bytes())["task"] == "causal-lm"
    assert run(command(place, "-o", str(place / "t.jsonl"), "--overwrite")) == 1
    assert capsys.readouterr().err.startswith(f"Error: --output is {place}/t.jsonl, which is the data too; choose")
    assert run(command(place, "-o", str(out / "under.json"))) == 1
    assert capsys.readouterr().err.startswith("Error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("given", "status", "sentence"),
    [
        (["--adapters", "nowhere"], 1, "Error: nowhere does not exist."),
        (["--adapter-field", "x"], 2, "Error: --adapter-field names a column of adapters; name them with --adapters."),
        (["--pairwise", "p"], 2, "Error: --pairwise compares two models' answers: "),
        (["--key", "k"], 2, "Error: --key says where the key of --pairwise goes; give --pairwise."),
        (["--generate", "g"], 2, "Error: Answers need prompts, and "),
        (["--max-length", "999"], 2, "Error: --max-length is 999, and the model has 320 positions."),
        (["--max-length", "9"], 1, "Error: 10 of 10 examples are longer than 9 tokens, the longest has "),
        (["--task", "seq2seq"], 1, "Error: "),
        (["--end-token", "<|new|>"], 2, "Error: --end-token is '<|new|>', which "),
        (["--device", "cuda:7"], 2, "Error: The device 'cuda:7' is not available here; use cpu or auto."),
    ],
)
def test_what_is_refused(
    given: list[str], status: int, sentence: str, place: Path, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One sentence, and nothing is left."""
    monkeypatch.chdir(tmp_path)
    assert run(command(place, *given)) == status
    said = capsys.readouterr().err
    assert said.startswith(sentence)
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_prompts_without_room(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        surgery.InputError, match=r"6 of 6 prompts leave no room for 320 new tokens, the longest has \d+"
    ):
        evaluate(place, "p.jsonl", generate=tmp_path / "g", max_new_tokens=320)


def test_verdicts_on_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    evaluate(place, "p.jsonl", against=place / "code", pairwise=pairs, max_new_tokens=2)
    judged = [{**json.loads(text), "verdict": "tie"} for text in pairs.read_text(encoding="utf-8").splitlines()]
    making.jsonl(tmp_path / "judged.jsonl", judged)
    assert run(["verdicts", str(tmp_path / "judged.jsonl"), "--key", str(tmp_path / "pairs.key.json")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("model base against code judged 6 of 6 pairs verdict pairs share 95% from to win 0 0% 0%")
    assert "tie 6 100% 61.0% 100%" in printed

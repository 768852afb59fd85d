"""The receipt: the difference from the dense model, where tokens went, and when none of it is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import surgery
from surgery.checkpoint import open_checkpoint
from surgery.errors import InputError, IntegrityError, MissingExtraError, OptionError
from surgery.operation import Run
from surgery.ops import running
from surgery.plan import Plan
from surgery.upcycling import memory, preservation
from surgery.upcycling.advice import expected_sum, notes_on_size
from surgery.upcycling.loads import chosen_experts
from surgery.upcycling.options import UpcycleOptions
from surgery.upcycling.report import ChoiceReport, PreservationReport
from surgery.upcycling.upcycle import prepare
from tests.surgery.upcycling.dense import DENSE, load, make, stored
from tests.tools import read_json, run_cli

TEXT = "the cat sat on the mat and the dog saw the cat run from the mat to the barn " * 12


def with_tokenizer(folder: Path, special: bool = False) -> Path:
    """Give a checkpoint a tokenizer that knows a few words, and the letters of no other."""
    words = ["<unk>", *sorted(set(TEXT.split())), *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def measured(report: Any) -> PreservationReport:
    assert isinstance(report.preservation, PreservationReport)
    return report.preservation


# What is measured -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"layers": "last:1"}),
        ("qwen2", {"combine": "raw"}),
        ("qwen3", {"init": "granular:3", "top_k": 3}),
        ("m2m_100", {"layers": "every:2"}),
        ("t5", {"target": "switch"}),
        ("t5", {"router": "encoder=expert-choice,decoder=top-k"}),
        ("vit", {"router": "expert-choice", "capacity": 1}),
    ],
)
def test_the_difference_is_that_of_a_plain_run(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """Both models loaded and run by hand on the same inputs, in float64 afterwards."""
    dense = stored(tmp_path, family)
    report = surgery.upcycle(dense, output=tmp_path / "moe", experts=6, **options)
    found = measured(report)
    inputs, described = running.random_inputs(make(family), 0)
    with torch.no_grad():
        logits = [model(**inputs).logits.double() for model in (make(family), load(tmp_path / "moe"))]
    difference = logits[1] - logits[0]
    assert found.inputs == described
    # Rounding is not the same with another number of threads.
    assert found.relative == pytest.approx(float(difference.norm() / logits[0].norm()), rel=1e-2, abs=3e-7)
    assert found.largest == pytest.approx(float(difference.abs().max()), rel=1e-2, abs=1e-5)
    assert found.agreement == pytest.approx(
        float((logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()), abs=0.02
    )
    assert found.loss is found.dense_loss is None
    assert (found.bound is not None) is report.preserved
    assert report.preserved or found.relative > 1e-6 or family == "vit"
    assert read_json(tmp_path / "moe" / "surgery.json")["report"]["preservation"]["relative"] == found.relative


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("qwen2", {"layers": "0"}), ("gpt2", {}), ("t5", {})])
def test_a_config_that_names_no_class(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Native or shipped, dense or a mixture that is enlarged: the class is told from the tensors."""
    dense = stored(tmp_path, family)
    without(Path(dense.label))
    report = surgery.upcycle(dense.label, output=tmp_path / "moe", experts=2, verify=True, **options)
    assert measured(report).relative < 1e-5
    assert report.architecture.endswith("ForCausalLM" if family in ("llama", "qwen2") else "Model")
    without(tmp_path / "moe")
    larger = surgery.upcycle(tmp_path / "moe", output=tmp_path / "larger", experts=4, verify=True)
    assert measured(larger).relative < 1e-5


def without(folder: Path) -> None:
    """Take the class out of a config."""
    config = read_json(folder / "config.json")
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))


HEADS = {
    "T5ForSequenceClassification": "t5",
    "T5ForQuestionAnswering": "t5",
    "BertForPreTraining": "bert",
    "BertForQuestionAnswering": "bert",
    "BertForMultipleChoice": "bert",
    "ViTForMaskedImageModeling": "vit",
}


@pytest.mark.parametrize("tokenizer", [False, True], ids=["random", "text"])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_can_be_run(name: str, tokenizer: bool, tmp_path: Path) -> None:
    """Whatever it wants for input, and whatever it calls what it gives."""
    _, config, settings = DENSE[HEADS[name]]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**{**settings, "num_labels": 2}))
    model.save_pretrained(tmp_path / "dense")
    if tokenizer:
        with_tokenizer(tmp_path / "dense")
    report = surgery.upcycle(tmp_path / "dense", output=tmp_path / "moe", experts=2, verify=True)
    assert report.architecture == f"Upcycled{name}"
    assert 0 < measured(report).relative < 1e-5


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("granite", {}),
        ("qwen3_5", {}),
        ("m2m_100", {}),
        ("t5", {"target": "switch"}),
        ("gpt2", {"top_k": 1, "combine": "raw"}),
        ("vit", {"router": "expert-choice", "capacity": 0.5}),
    ],
)
def test_loads_are_shares_of_all_choices(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    report = surgery.upcycle(stored(tmp_path, family), output=tmp_path / "moe", experts=4, **options)
    loads = measured(report).loads
    assert len(loads) == sum(len(stack.layers) for stack in report.stacks)
    assert len({load.layer for load in loads}) == len(loads)
    for one in loads:
        assert len(one.shares) == 4
        assert sum(one.shares) == pytest.approx(1)
        assert min(one.shares) >= 0
    if "capacity" in options:  # each of four experts takes one of five tokens
        assert {share for one in loads for share in one.shares} == {0.25}
        assert all(one.uncovered >= 0.2 for one in loads)
    elif family != "t5":
        assert {one.uncovered for one in loads} == {0}


def test_loads_are_what_the_router_decides(tmp_path: Path) -> None:
    """Against the logits that transformers hands out itself."""
    report = surgery.upcycle(stored(tmp_path, "llama"), output=tmp_path / "moe", experts=5, top_k=2)
    model = load(tmp_path / "moe")
    with torch.no_grad():
        outputs = model(**running.random_inputs(model, 0)[0], output_router_logits=True)
    for one, logits in zip(measured(report).loads, outputs.router_logits, strict=True):
        expected = logits.topk(2, dim=-1).indices.flatten().bincount(minlength=5) / (2 * len(logits))
        assert one.shares == pytest.approx(expected.tolist())


def test_chosen_experts_in_every_form() -> None:
    indices = torch.tensor([[0, 2], [1, 2]])
    expected = [[True, False, True], [False, True, True]]
    assert chosen_experts(indices, torch.ones(2, 2), 3).tolist() == expected
    one_hot = torch.tensor([[[0, 1, 0]], [[0, 0, 0]]])  # Switch: the second token was over the capacity
    assert chosen_experts(one_hot, torch.ones(2, 1), 3).tolist() == [[False, True, False], [False] * 3]
    weights = torch.tensor([[0.4, 0, 0.6], [0, 0.9, 0.1]])  # NLLB
    assert chosen_experts(indices, weights, 3).tolist() == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_the_loss_is_that_of_a_plain_run(tmp_path: Path, family: str) -> None:
    """The mean over all tokens that are foretold, by transformers' own loss for each window."""
    dense = stored(tmp_path, family)
    folder = with_tokenizer(Path(dense.label))
    text = tmp_path / "some.txt"
    text.write_text(TEXT)
    report = surgery.upcycle(open_checkpoint(folder), output=tmp_path / "moe", text=text)
    found = measured(report)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids[0]
    # Of 228 tokens T5 foretells the second half.
    compared = "" if family == "t5" else ", logits at the first 128"
    assert found.inputs == f"{len(ids)} tokens of some.txt{compared}"
    model, total, count = make(family), 0.0, 0
    length = 512 if family == "t5" else 32  # half of the positions
    for begin in range(0, len(ids), length):
        window = ids[begin : begin + length].unsqueeze(0)
        if window.shape[1] < 2:
            continue
        if family == "t5":
            half = window.shape[1] // 2
            inputs, labels = window[:, :half], window[:, half:]
            foretold = labels.numel()
        else:
            inputs, labels, foretold = window, window, window.numel() - 1
        with torch.no_grad():
            total += float(model(input_ids=inputs, labels=labels).loss) * foretold
        count += foretold
    assert found.dense_loss == pytest.approx(total / count, rel=1e-5)
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert measured(surgery.upcycle(dense, output=tmp_path / "b", text=text, combine="raw", target="shipped")).loss != (
        pytest.approx(total / count, rel=1e-3)
    )


def test_real_tokens_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    folder = with_tokenizer(Path(stored(tmp_path, "llama").label))
    assert measured(surgery.upcycle(folder, output=tmp_path / "moe")).inputs == "64 tokens of a built-in text"
    (folder / "tokenizer.json").write_text("{}")
    assert "random tokens" in measured(surgery.upcycle(folder, output=tmp_path / "b")).inputs


def test_ids_beyond_the_vocabulary_are_not_used(tmp_path: Path) -> None:
    """A tokenizer of another model."""
    folder = with_tokenizer(Path(stored(tmp_path, "llama").label))
    content = read_json(folder / "tokenizer.json")
    content["model"]["vocab"] = {word: number + 96 for word, number in content["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "random tokens" in measured(surgery.upcycle(folder, output=tmp_path / "moe")).inputs


def test_pictures_where_there_is_an_image_processor(tmp_path: Path) -> None:
    folder = Path(stored(tmp_path, "vit").label)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    found = measured(surgery.upcycle(folder, output=tmp_path / "moe")).inputs
    try:
        transformers.AutoImageProcessor.from_pretrained(folder)
        expected = "2 drawn images"
    except ImportError:
        expected = "2 random images"
    assert found == expected
    (folder / "preprocessor_config.json").write_text("[]")
    assert measured(surgery.upcycle(folder, output=tmp_path / "b")).inputs == "2 random images"


@pytest.mark.slow
def test_the_number_of_threads_does_not_matter(tmp_path: Path) -> None:
    """Not even for the measured digits in `surgery.json`."""
    stored(tmp_path, "qwen2", torch.bfloat16)
    folder = with_tokenizer(tmp_path / "qwen2-bfloat16")
    text = tmp_path / "some.txt"
    text.write_text(TEXT)
    found = []
    for threads in ("1", "2"):
        out = tmp_path / threads
        done = run_cli("upcycle", folder, "-o", out, "--text", text, env={"OMP_NUM_THREADS": threads})
        assert done.returncode == 0, done.stderr
        found.append((out / "surgery.json").read_bytes())
    assert found[0] == found[1]


# Where it is a theorem ------------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let `change` have the staged weights once they are written."""
    execute = Run.execute

    def run(self: Run, plan: Plan, label: str) -> Any:
        found = execute(self, plan, label)
        path = self.staging.files / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return found

    monkeypatch.setattr(Run, "execute", run)


@pytest.mark.parametrize(("family", "expert"), [("llama", "experts.1.w2"), ("gpt2", "experts.1.c_fc")])
def test_one_wrong_expert_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, expert: str) -> None:
    """Nothing appears at the target, and nothing stays beside it."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        (name, *_) = [name for name in tensors if f"{expert}.weight" in name]
        tensors[name] = tensors[name].flip(0).contiguous()

    spoil(monkeypatch, change)
    dense = stored(tmp_path, family)
    expected = (
        r"The mixture differs from the dense model by \d\.\d\de-0[1-3] of its logits' norm "
        r"\(at most \d\.\d\de[+-]\d\d\) on 2 sequences of 32 random tokens, where "
        r"rounding explains 1\.\d\de-05 at most; nothing was written\."
    )
    with pytest.raises(IntegrityError, match=expected):
        surgery.upcycle(dense, output=tmp_path / "moe", experts=4)
    assert sorted(path.name for path in tmp_path.iterdir() if "moe" in path.name) == []
    report = surgery.upcycle(dense, output=tmp_path / "moe", experts=4, verify=False)
    assert report.preservation is None
    assert report.preserved


def test_where_it_is_no_theorem_a_difference_is_only_reported(tmp_path: Path) -> None:
    report = surgery.upcycle(stored(tmp_path, "llama"), output=tmp_path / "moe", init="noise:20%")
    assert measured(report).bound is None
    assert measured(report).relative > 1e-3


def test_a_tensor_that_transformers_misses_or_leaves_over_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = stored(tmp_path, "llama")
    name = "model.layers.0.block_sparse_moe.gate.weight"
    with monkeypatch.context() as patch:
        spoil(patch, lambda tensors: tensors.update({"model.layers.0.stranger.weight": tensors[name] + 1}))
        with pytest.raises(IntegrityError, match=r"has no use for 'model\.layers\.0\.stranger\.weight' of the mixture"):
            surgery.upcycle(dense, output=tmp_path / "moe")
    spoil(monkeypatch, lambda tensors: tensors.pop(name))
    with pytest.raises(IntegrityError, match=r"The mixture has no 'model\.layers\.0\.mlp\.gate\.weight', which"):
        surgery.upcycle(dense, output=tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_the_bound_follows_depth_width_and_rounding(tmp_path: Path) -> None:
    """16 sqrt(L n) 2^-24, and the rounding of weights where they are multiplied by what is no power of two."""
    dense = stored(tmp_path, "llama", torch.bfloat16)
    bounds = [
        preservation.relative_bound(prepare(dense, UpcycleOptions(init=init)))
        for init in ("copy", "granular:2", "granular:3")
    ]
    assert bounds[0] == bounds[1] == pytest.approx(16 * (3 * 48) ** 0.5 * 2**-24)
    assert bounds[2] == pytest.approx(bounds[0] + 16 * 3**0.5 * 2**-8)


# When nothing is measured ---------------------------------------------------------------------------------------------


def test_a_model_too_large_for_memory_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default; `verify` insists. What depends on the computer is not in `surgery.json`."""
    dense = stored(tmp_path, "llama")
    work = prepare(dense, UpcycleOptions())
    needed = memory.memory_needed(work, 10**9)
    assert needed == pytest.approx(9.6e9, rel=0.01)
    monkeypatch.setattr(preservation, "free_memory", lambda: 700_000_000)
    report = surgery.upcycle(dense, output=tmp_path / "moe")
    assert report.preservation is None
    assert report.notes[-1].startswith("The difference from the dense model was not measured: that takes about 0.6")
    assert report.notes[-1].endswith(" GB of memory, and 0.7 GB are free. --verify insists.")
    assert "measured" not in (tmp_path / "moe" / "surgery.json").read_text()
    assert measured(surgery.upcycle(dense, output=tmp_path / "b", verify=True)).relative < 1e-6


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 10**7 < memory.free_memory() < 10**15


BLOCKED = """
    import sys
    sys.modules["transformers"] = None
    import surgery
    report = surgery.upcycle(sys.argv[1], output=sys.argv[2])
    assert report.preservation is None
    print(report.notes[-1])
    try:
        surgery.upcycle(sys.argv[1], output=sys.argv[2] + "-2", verify=True)
    except surgery.MissingExtraError as error:
        print(error)
    assert "torch" not in sys.modules
"""


def test_without_transformers(tmp_path: Path) -> None:
    """Everything but measuring works, without torch; asking for it says what to install before anything is written."""
    stored(tmp_path, "llama")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BLOCKED), tmp_path / "llama-float32", tmp_path / "moe"],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "The difference from the dense model was not measured: transformers is not installed (`pip install "
        "'checkpoint-surgery[train]'`). --verify insists.",
        str(MissingExtraError("transformers", "train")),
    ]
    assert (tmp_path / "moe").exists()
    assert not (tmp_path / "moe-2").exists()


def test_a_dense_model_that_cannot_be_run_is_no_obstacle(tmp_path: Path) -> None:
    """A head that is not stored would be random: by default a note says so, and `verify` refuses."""
    folder = Path(stored(tmp_path, "bert").label)
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sentence = f"{folder} has no 'classifier.weight', which transformers fills with random numbers, so that there is"
    report = surgery.upcycle(folder, output=tmp_path / "moe")
    assert sentence in report.notes[-1]
    with pytest.raises(InputError, match="classifier"):
        surgery.upcycle(folder, output=tmp_path / "b", verify=True)
    assert not (tmp_path / "b").exists()


def test_weights_that_are_no_numbers_are_no_obstacle(tmp_path: Path) -> None:
    folder = Path(stored(tmp_path, "llama").label)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = surgery.upcycle(folder, output=tmp_path / "moe")
    assert "gives NaN or infinity itself" in report.notes[-1]


def test_a_lone_file_cannot_be_run(tmp_path: Path) -> None:
    folder = Path(stored(tmp_path, "llama").label)
    report = surgery.upcycle(folder / "model.safetensors", output=tmp_path / "moe")
    assert "is not a folder on this disk" in report.notes[-1]
    with pytest.raises(InputError, match=r"is not a folder on this disk.*pull it first, or leave --verify out"):
        surgery.upcycle(folder / "model.safetensors", output=tmp_path / "b", verify=True)


def test_a_text_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    text = tmp_path / "some.txt"
    for call, error, sentence in (
        ({"text": text, "verify": False}, OptionError, "--text goes with --verify, which measures the loss on it."),
        ({"text": text}, InputError, f"{text} cannot be read: No such file or directory."),
        ({"text": tmp_path}, InputError, f"{tmp_path} cannot be read: Is a directory."),
        ({"text": Path(__file__)}, InputError, f"{__file__} cannot be used: {dense.label} has no tokenizer; copy its "),
    ):
        with pytest.raises(error) as caught:
            surgery.upcycle(dense, output=tmp_path / "moe", **call)
        assert str(caught.value).startswith(sentence)
    folder = with_tokenizer(Path(dense.label))
    text.write_text("")
    with pytest.raises(InputError, match=r"some\.txt cannot be used: there is fewer than 2 tokens for it\."):
        surgery.upcycle(folder, output=tmp_path / "moe", text=text)
    assert not (tmp_path / "moe").exists()


def test_a_dry_run_measures_nothing(tmp_path: Path) -> None:
    report = surgery.upcycle(stored(tmp_path, "llama"), output=tmp_path / "moe", dry_run=True, verify=True)
    assert report.preservation is None
    assert report.preserved
    assert report.plan.peak_memory_bytes > 5e8  # with torch, transformers and the model
    assert not (tmp_path / "moe").exists()


# What it says beside --------------------------------------------------------------------------------------------------


def test_nothing_of_transformers_reaches_the_terminal(tmp_path: Path) -> None:
    folder = with_tokenizer(Path(stored(tmp_path, "gpt2").label))
    done = run_cli("upcycle", folder, "-o", tmp_path / "moe", "--quiet", "--verify")
    assert (done.returncode, done.stdout) == (0, "")
    assert all(line.startswith("Note: ") for line in done.stderr.splitlines())


def test_raw_weights_sum_to_what_is_foretold() -> None:
    """Against softmaxes of seeded scores, drawn by torch."""
    generator = torch.Generator().manual_seed(3)
    for experts, top_k, spread in ((8, 2, 0.9), (32, 2, 0.3), (32, 1, 2.0), (4, 4, 1.0)):
        scores = spread * torch.randn(20_000, experts, generator=generator, dtype=torch.float64)
        expected = float(scores.softmax(-1).topk(top_k).values.sum(-1).mean())
        assert expected_sum(experts, top_k, spread) == pytest.approx(expected, rel=0.05)
    assert expected_sum(32, 2, 0.0) == 2 / 32


def test_a_large_output_is_worth_a_word() -> None:
    half = ChoiceReport("last:half", 16, "glm4_moe", 189 * 10**9, {})
    assert notes_on_size(361 * 10**9, 16 * 10**9, [half]) == (
        "The output has 361 GB, 22.6 times the dense model's; fewer --experts or --layers make it smaller; --layers "
        "last:half gives 189 GB.",
    )
    assert notes_on_size(10**9, 10**8, []) == ()
    assert notes_on_size(30 * 10**9, 16 * 10**9, []) == ()

"""Reports as text: numbers, tables on narrow terminals, what is cut and how that is said."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from rich.console import Console

import surgery
from surgery.cli import progress, render
from surgery.cli.formats import more, number, percent, plural, size, some
from surgery.cli.main import run
from surgery.operation import PlanSummary
from surgery.ops.verify import CompareReport, Difference, LogitReport, VerifyReport
from surgery.reports import ExtractReport, MergeReport, ModuleReport, ResidualReport, WeightReport
from surgery.upcycling.report import (
    ChoiceReport,
    ConsumerReport,
    ExpertLoad,
    PreservationReport,
    StackReport,
    UpcycleReport,
)
from tests.models import make, perturb, save
from tests.peft_tools import write_adapter
from tests.test_docs import _reported

PLAN = PlanSummary(0, 0, 0, 0, 0, 0, 0)
NAME = "model.layers.{}.self_attn.q_proj"


def drawn(report: Any, every: bool = False, width: int = 160) -> list[str]:
    """The lines of a report, on a terminal of some width."""
    stream = io.StringIO()
    draw = render.DRAWINGS[type(report).__name__]
    draw(Console(file=stream, width=width, highlight=False, force_terminal=True, color_system=None), report, every)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def module(layer: int, error: float = 0.05) -> ModuleReport:
    return ModuleReport(NAME.format(layer), "attention", (4096, 4096), 16, 0.05, 1 - error**2, error, 3e-4)


def extraction(count: int, **fields: Any) -> ExtractReport:
    modules = tuple(module(layer, 0.9 if layer == 3 else 0.05) for layer in range(count))
    return ExtractReport("out", PLAN, modules=modules, **fields)


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.05, "5.00%"),
        (0.0501, "5.01%"),
        (0.045, "4.50%"),
        (0.967, "96.7%"),
        (0.1, "10.0%"),
        (0.99793, "99.793%"),
        (0.999999, ">99.999%"),
        (0.999994, "99.999%"),
        (1.0, "100%"),
        (1.0000001, ">100%"),
        (1.5, "150%"),
        (23.456, "2346%"),
        (0.0, "0%"),
        (-0.25, "-25.0%"),
        (0.000123, "0.0123%"),
        (1.23e-9, "1.23e-07%"),
        (None, "-"),
        (float("inf"), "-"),
    ],
)
def test_shares(share: float | None, text: str) -> None:
    """Three significant digits, trailing zeros included, and 100% for the whole only."""
    assert percent(share) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234567, "1.23 MB"),
        (999_900, "1 MB"),
        (5e9, "5 GB"),
        (2e15, "2000 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (17_400, "17.4K"), (999_999, "1M"), (7e9, "7B"), (1.2e12, "1200B")]
)
def test_counts(count: float, text: str) -> None:
    assert number(count) == text


def test_words_around_numbers() -> None:
    assert (plural(1, "module"), plural(0, "module"), plural(7, "module")) == ("1 module", "0 modules", "7 modules")
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert more(11, "--all") == "and 11 more; --all lists every one."


# What is cut ----------------------------------------------------------------------------------------------------------


def test_many_modules_are_summed_up_and_it_is_said() -> None:
    """Medians, with the worst error beside them, and the option that lists them all."""
    lines = drawn(extraction(61))
    assert lines[0].split() == [
        "medians",
        "shape",
        "rank",
        "change",
        "kept",
        "error",
        "worst",
        "error",
        "worst",
        "excess",
    ]
    assert re.split(r"\s{2,}", lines[1]) == [
        "q_proj (61 modules)", "4096 x 4096", "16", "5.00%", "99.750%", "5.00%", "90.0%", "3e-04",
    ]  # fmt: skip
    assert lines[2] == "--all lists every module."
    assert sum(NAME.format(0).partition("0")[0] in line for line in drawn(extraction(61), True)) == 61
    assert "--all" not in "\n".join(drawn(extraction(60)))


def test_many_residuals_are_cut_and_it_is_said() -> None:
    residual = tuple(ResidualReport(f"n{number}", "norms", 0.1, False, "changed") for number in range(71))
    lines = drawn(extraction(1, residual=residual))
    assert "and 11 more; --all lists every one." in lines
    assert "71 changed parameters have no factors; --save-residual stores what PEFT can hold." in lines
    lines = drawn(extraction(1, residual=residual), every=True)
    assert sum(line.startswith("n") for line in lines) == 71
    (one,) = [line for line in drawn(extraction(1, residual=residual[:1])) if "--save" in line]
    assert one.startswith("1 changed parameter has no factors;")


def test_many_weights_are_cut_to_the_worst_and_it_is_said() -> None:
    weights = tuple(WeightReport(f"w{number}", number / 100, 0.5) for number in range(80))
    report = MergeReport("out", PLAN, weights=weights, survived=0.9, unchanged_share=0.5)
    lines = drawn(report)
    assert [line.split()[0] for line in lines[1:11]] == [f"w{number}" for number in range(10)]
    assert lines[11] == "and 70 that fared better; --all lists every one."
    assert sum(line.startswith("w") for line in drawn(report, every=True)) == 81


def test_many_differences_are_cut_to_the_largest_and_it_is_said() -> None:
    different = tuple(Difference(f"t{number}", number / 100) for number in reversed(range(71)))
    report = CompareReport("a", "b", 1, different, ("x",), ())
    lines = drawn(report)
    assert lines[1].split() == ["t70", "70.0%"]
    assert "and 11 more; --all lists every one." in lines
    assert lines[-2:] == ["only in a: x", "1 tensor is the same, 71 differ."]
    assert "and 11 more" not in "\n".join(drawn(report, every=True))


def test_many_problems_are_cut_and_it_is_said() -> None:
    report = VerifyReport("out", "merge", 0, 0, tuple(f"Problem {number}." for number in range(71)))
    assert drawn(report)[-1] == "  and 11 more; --all lists every one."
    assert drawn(report, every=True)[-1] == "  Problem 70."


def test_the_largest_difference_comes_first(tmp_path: Path) -> None:
    """In the library's report as well; what cannot be compared before all."""
    model = make("llama")
    base = save(model, tmp_path / "base")
    (tmp_path / "a").mkdir()
    tuned = save(perturb(model, rank=2, scale=0.3), tmp_path / "tuned")
    report = surgery.verify(base, tuned)
    assert isinstance(report, CompareReport)
    shares = [item.relative for item in report.different]
    assert len(shares) > 5
    assert None not in shares
    assert shares == sorted(shares, key=lambda share: -(share or 0.0))


# Tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 79, 80, 120])
def test_numbers_are_never_broken(width: int) -> None:
    """On a narrow terminal names fold and numbers stay whole; shapes and certificates are left out."""
    lines = drawn(extraction(3), width=width)
    assert max(len(line) for line in lines[:6]) <= width
    text = "\n".join(lines)
    assert text.count("99.750%") == 3
    assert ("4096 x 4096" in text) == (width >= 80)
    assert ("3e-04" in text) == (width >= 80)


def test_lines_in_a_file_end_where_their_text_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a name is never folded, however long."""
    model = make("llama")
    save(model, tmp_path / ("long" * 50))
    assert run(["inspect", str(tmp_path / ("long" * 50)), "--tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert f"checkpoint    {tmp_path / ('long' * 50)}" in lines


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters, and merges of them."""
    folder = tmp_path_factory.mktemp("merges")
    model = make("llama")
    save(model, folder / "base", torch.bfloat16)
    write_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]), folder / "style")
    write_adapter(model, LoraConfig(r=2, target_modules=["v_proj"]), folder / "facts")
    both = [(folder / "style", 0.5), (folder / "facts", 1.0)]
    surgery.merge(folder / "base", *both, output=folder / "both", reversible=True)
    surgery.merge(folder / "base", folder / "style", output=folder / "plain")
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert run([str(argument) for argument in arguments]) == 0
    return re.sub(r" {2,}", "  ", capsys.readouterr().out)


def test_what_made_a_checkpoint(merges: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the weights of its adapters, in their order."""
    assert "\nmade by  merge of base with style=0.5, facts\n" in said(capsys, "inspect", merges / "both")


def test_what_is_said_of_the_base(merges: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Restored is only what is the base; with another adapter it is found again; without a record nothing is sure."""
    text = said(capsys, "subtract", merges / "both", "-o", tmp_path / "base")
    assert "\nrestored  exactly, proved by the base's hashes\n" in text
    text = said(capsys, "subtract", merges / "both", merges / "style", "-o", tmp_path / "facts")
    assert "\ntaken out  style\nbase  found again exactly, proved by its hashes; facts is merged into it\n" in text
    text = said(capsys, "switch", merges / "both", merges / "facts", merges / "facts", "-o", tmp_path / "same")
    assert "; style, facts are merged into it\n" in text
    assert "restored" not in text
    text = said(capsys, "subtract", merges / "plain", merges / "style", "-o", tmp_path / "about")
    assert re.search(
        r"\ntaken out  style, subtracted in float32; if it was merged here, the base is met to about 0\.\d+%\n", text
    )
    assert "restored" not in text


def test_what_an_extraction_is_going_to_be(merges: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run's bounds hold, for every way to choose a rank and both dtypes."""
    base, tuned = merges / "base", merges / "both"
    cases = (["--rank", "3"], ["--energy", "0.9"], ["--budget", "400"], ["--energy", "1", "--max-rank", "2"])
    for run_number, options in enumerate([*cases, ["--rank", "3", "--dtype", "bfloat16"]]):
        text = said(capsys, "extract", base, tuned, "-o", tmp_path / "dry", "--device", "cpu", *options, "--dry-run")
        assert f"\nrank  {3 if '--rank' in options else 'chosen for each module'}\n" in text
        planned = surgery.extract(base, tuned, output=tmp_path / "dry", dry_run=True, **_keywords(options)).planned
        assert planned is not None
        assert f"\nmodules  {planned.modules}\n" in text
        assert f"\nparameters  at most {number(planned.parameters)}\n" in text
        assert f"\nadapter  at most {size(planned.nbytes)}\n" in text
        done = surgery.extract(base, tuned, output=tmp_path / f"{run_number}", **_keywords(options))
        assert done.parameters <= planned.parameters
        assert done.nbytes <= planned.nbytes
        assert len(done.modules) + done.unchanged == planned.modules
        assert done.planned is None


def _keywords(options: list[str]) -> dict[str, Any]:
    pairs = zip(options[::2], options[1::2], strict=True)
    return {key[2:].replace("-", "_"): value if key == "--dtype" else float(value) if key == "--energy" else int(value)
            for key, value in pairs}  # fmt: skip


def test_models_of_text_have_tokens() -> None:
    report = CompareReport("a", "b", 0, (), (), (), LogitReport("2 sequences of 64 random tokens", 0.1, 0.02, 0.977))
    assert drawn(report)[-1].endswith("2.00% of the norm; same top token at 97.7% of positions.")
    assert report.logits is not None
    images = replace(report, logits=replace(report.logits, inputs="2 random images"))
    assert drawn(images)[-1].endswith("same largest output at 97.7% of positions.")


def test_every_report_has_a_drawing() -> None:
    """What `--json` can print at the top, the tables can show; registries have drawings of their own."""
    found = [cls for cls in _reported() if hasattr(cls, "as_dict") and not cls.__module__.startswith("surgery.hub")]
    printed = {cls.__name__ for cls in found}
    assert printed - {"Report"} == render.DRAWINGS.keys()


# Receipts -------------------------------------------------------------------------------------------------------------


def receipt(**fields: Any) -> UpcycleReport:
    stack = StackReport("decoder", (0, 1, 2, 5, 7, 8), 12, 4, 2, None, True, None)
    settings: dict[str, Any] = {
        "source": "llama", "target": "mixtral", "architecture": "MixtralForCausalLM", "stacks": (stack,),
        "init": "copy", "router_init": "normal:0.02", "parameters": 10**9, "active": 5 * 10**8,
        "dense_parameters": 25 * 10**7, "nbytes": 2 * 10**9, "dense_bytes": 5 * 10**8, "preserved": True, **fields,
    }  # fmt: skip
    return UpcycleReport("moe", PLAN, **settings)


def test_a_receipt_draws_layers_together() -> None:
    text = "\n".join(drawn(receipt()))
    assert "layers 0-2,5,7-8 of 12, 4 experts each, top 2, weights sum to 1" in text
    assert "2 GB, 4.0 times the dense model's" in text
    assert "measured" not in text
    choice = StackReport("encoder", (0, 1), 2, 4, None, 1.5, False, "sequence")
    for normalized, words in ((True, "weights sum to 2.5"), (False, "raw weights times 2.5")):
        scaled = replace(choice, normalized=normalized, scale=2.5)
        assert f"per sequence, {words}" in "\n".join(drawn(receipt(stacks=(scaled,))))
    text = "\n".join(drawn(receipt(stacks=(choice,), preserved=False)))
    assert "all 2 layers, 4 experts each, expert choice, capacity 1.5, per sequence, raw weights" in text
    assert re.search(r"^function +changed$", text, re.MULTILINE)


def test_a_receipt_sums_up_what_was_measured() -> None:
    loads = (ExpertLoad("a", (0.5, 0.5, 0.0, 0.0)), ExpertLoad("b", (0.25, 0.25, 0.25, 0.25), 0.125))
    found = PreservationReport("64 tokens of a.txt", 0.25, 3e-7, 0.5, 1e-5, 2.5, 2.75, loads)
    text = "\n".join(drawn(receipt(preservation=found)))
    assert "3.0e-07 of the logits' norm (rounding explains 1e-05), 2.5e-01 at most" in text
    assert "for 50.0% of the positions" in text
    assert "2.7500 nats a token; the dense model has 2.5000" in text
    assert (
        "50.0% at most goes to one expert, 25.0% would be even; 2 of 8 experts got nothing; up to 12.5% of a layer's "
        "tokens go to no expert"
    ) in text


def test_a_receipt_has_a_line_for_each_program_and_each_choice() -> None:
    consumers = (
        ConsumerReport("transformers", "loads"),
        ConsumerReport("vLLM", "refused", ("no such type", "no such head"), "--target auto (mixtral)"),
        ConsumerReport("MLX", "silently wrong", ("it does not ask",)),
    )
    half = ChoiceReport("last:half", 6, "glm4_moe", 10**9, {"transformers": "loads", "vLLM": "refused"})
    whole = ChoiceReport("all", 12, "mixtral", 2 * 10**9, {"transformers": "loads", "vLLM": "loads"})
    lines = drawn(receipt(consumers=consumers, choices=(whole, half), notes=("Mind the gap.",)))
    assert any(re.fullmatch(r"transformers +loads +- +-", text) for text in lines)
    assert any(
        re.fullmatch(r"vLLM +refused +no such type; no such head +--target auto \(mixtral\)", text) for text in lines
    )
    assert any(re.fullmatch(r"MLX +silently wrong +it does not ask +nothing known", text) for text in lines)
    assert any(re.fullmatch(r"last:half \(the paper's\) +6 +glm4_moe +1 GB +loads +refused", text) for text in lines)
    assert lines[-1] == "Note: Mind the gap."


# Progress -------------------------------------------------------------------------------------------------------------


def test_progress_ends_at_its_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """More bytes than were foretold, as when what differs is read twice, take neither bar nor lines past 100%."""
    bar = progress.Bar(progress.byte_columns)
    bar.start(100, "comparing")
    for _ in range(5):
        bar.advance(40)
    assert bar._progress is not None
    assert bar._progress.tasks[0].completed == 100
    bar.stop()
    capsys.readouterr()
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    lines = progress.Lines(progress.byte_amounts)
    lines.start(1_234_567, "comparing")
    lines.advance(1_000_000)
    lines.advance(1_000_000)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("comparing: 81% of 1.23 MB, ")
    assert said[1] == "comparing: 100% of 1.23 MB, 0 s left"


@pytest.mark.parametrize(("verb", "label"), [("subtract", "subtracting"), ("switch", "switching")])
def test_progress_names_the_operation(
    verb: str, label: str, merges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Listener:
        def start(self, total: int, label: str) -> None:
            seen.append(label)

        def advance(self, count: int) -> None: ...
        def stop(self) -> None: ...

    adapters = [merges / "style"] if verb == "subtract" else [merges / "style", merges / "facts"]
    getattr(surgery, verb)(merges / "plain", *adapters, output=tmp_path / "out", progress=Listener())
    assert seen == [label]

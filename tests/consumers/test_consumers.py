"""The parts of `make consumers` that need no engine: what it gives them, what it makes of their answers, its page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from consumers.artefacts import make_all
from consumers.engines import ENGINES, Engine, ask
from consumers.jobs import Answer, Job, Work, read_answer, write_answer
from consumers.run_peft import main as run_peft
from consumers.run_truth import main as run_truth
from consumers.table import cell, page, tidy
from consumers.verdicts import REFUSED, SAME, WRONG, Outcome, judge, lint_all, reference

CLEAN = ("clean", ())
VLLM = next(engine for engine in ENGINES if engine.name == "vllm")


def numbers(value: float) -> Answer:
    return Answer(np.full((2, 5), value, np.float32))


def outcome(what: str, lint: str, rules: tuple[str, ...] = (), name: str = "llama/x", setting: str = "") -> Outcome:
    return Outcome(name, "vllm", what, 3e-6, "", setting, lint, rules)


def test_work_survives_its_file(tmp_path: Path) -> None:
    work = Work([[3, 4], [5]], [Job("llama/saved", "/base"), Job("llama/x", "/base", "/x")], {"max_lora_rank": 64})
    work.write(tmp_path / "work.json")
    assert Work.read(tmp_path / "work.json") == work


@pytest.mark.parametrize(
    ("truth", "peft", "untouched", "by_peft", "expected"),
    [
        (numbers(1), numbers(1), numbers(0), False, 1),
        (numbers(1), numbers(2), numbers(0), False, None),  # two readings
        (numbers(1), numbers(0), numbers(0), False, 1),  # PEFT loaded nothing
        (Answer(refusal="UnsupportedError: DoRA"), numbers(2), numbers(0), False, 2),
        (Answer(refusal="MismatchError: rank"), numbers(2), numbers(0), False, None),
        (Answer(refusal="MismatchError: rank"), numbers(2), numbers(0), True, 2),
        (numbers(1), Answer(refusal="RuntimeError"), numbers(0), False, 1),
        (numbers(float("nan")), numbers(float("nan")), numbers(0), False, None),
    ],
)
def test_reference(truth: Answer, peft: Answer, untouched: Answer, by_peft: bool, expected: float | None) -> None:
    right = reference(truth, peft, untouched, by_peft)
    assert right is None if expected is None else right is not None and bool((right == expected).all())


def test_lint_agrees_if_it_lets_pass_what_works_and_names_what_does_not() -> None:
    assert outcome(SAME, "clean").agreed
    assert outcome(SAME, "warning", ("vllm/x",)).agreed
    assert not outcome(SAME, "refused", ("vllm/x",)).agreed
    assert outcome(REFUSED, "refused", ("vllm/x",)).agreed
    assert not outcome(REFUSED, "clean").agreed
    assert not outcome(WRONG, "warning", ("vllm/x",)).agreed
    assert outcome(WRONG, "refused", ("vllm/x",)).agreed
    assert not outcome(WRONG, "refused", ("vllm/x",)).same_kind
    assert not outcome(SAME, "clean", setting="--max-lora-rank 512").agreed
    assert outcome(SAME, "warning", ("vllm/max-lora-rank",), setting="--max-lora-rank 512").agreed


def test_an_engine_that_dies_is_started_anew_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job at which it died is answered with how."""
    from consumers import engines

    def start(engine: Engine, work: Work, folder: Path) -> str:
        for job in work.jobs:
            if job.name == "llama/bad":
                return "the process crashed: SIGSEGV"
            write_answer(folder, job.name, numbers(1))
        return ""

    monkeypatch.setattr(engines, "_start", start)
    names = ("llama/one", "llama/bad", "llama/two")
    ask(VLLM, Work([], [Job(name, "/base", "/x") for name in names]), tmp_path)
    answers = [read_answer(tmp_path, name) for name in names]
    assert [answer.refusal if answer else None for answer in answers] == ["", "the process crashed: SIGSEGV", ""]


def test_errors_are_shown_without_folders_of_this_machine() -> None:
    root = Path(__file__).resolve().parents[2]
    assert tidy(f"no {root}/.consumers/made/x,\n nor /tmp/abc1/model.gguf `here`") == "no made/x, nor model.gguf 'here'"


def test_one_artefact_all_the_way(tmp_path: Path) -> None:
    """Made, computed on two roads that agree, linted, and put on a page."""
    shop = make_all(tmp_path, "qwen2/extract")
    adapter, converted = shop.made
    assert (adapter.name, converted.name) == ("qwen2/extract", "qwen2/mlx-extract")
    work = Work(
        [[3, 4, 5]], [Job("qwen2/saved", str(adapter.base)), Job(adapter.name, str(adapter.base), str(adapter.path))]
    )
    work.write(tmp_path / "work.json")
    for run, name in ((run_peft, "peft"), (run_truth, "truth")):
        run([str(tmp_path / "work.json"), str(tmp_path / name)])
    truth, peft, untouched = (
        read_answer(tmp_path / folder, name)
        for folder, name in (("truth", adapter.name), ("peft", adapter.name), ("truth", "qwen2/saved"))
    )
    right = reference(truth, peft, untouched, by_peft=False)
    assert right is not None
    assert peft is not None
    assert untouched is not None
    assert untouched.logprobs is not None
    assert np.abs(right - untouched.logprobs).max() > 0.1
    linted = lint_all(adapter.path, adapter.base, ["peft", "mlx"])
    same = judge(adapter, ENGINES[0], peft, right, linted["peft"])
    assert (same.what, same.agreed) == (SAME, True)
    refused = judge(adapter, ENGINES[3], Answer(refusal="AttributeError: num_layers"), right, linted["mlx"])
    assert refused.agreed
    assert cell(refused) == "refused format"
    text = page(
        shop, {(adapter.name, "peft"): same, (adapter.name, "mlx"): refused}, {"peft": "1", "mlx": "2"}, "Cheap."
    )
    assert "| qwen2/extract | `extract` | " in text
    assert "`AttributeError: num_layers`" in text

"""The parts of `make consumers` that need no engine: what it gives them, what it makes of their answers, its page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from consumers.artefacts import make_all
from consumers.engines import ENGINES, Engine, ask, forget_changed
from consumers.jobs import Answer, Job, Work, read_answer, write_answer
from consumers.run_peft import main as run_peft
from consumers.run_truth import main as run_truth
from consumers.table import cell, page, tidy
from consumers.verdicts import REFUSED, SAME, UNTRIED, WRONG, Outcome, judge, lint_all, reference
from consumers.workshop import Artefact

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


def test_faults_of_a_build_are_not_held_against_the_engine(tmp_path: Path) -> None:
    """Only where it has the fault; the same family is tried as any other."""
    ernie, llama = (Artefact(name, "", "trained", tmp_path, tmp_path) for name in ("ernie4_5_moe/x", "llama/x"))
    right = np.zeros((2, 5), np.float32)
    found = judge(ernie, VLLM, numbers(2), right, CLEAN)
    assert (found.what, found.agreed) == (UNTRIED, True)
    assert cell(found) == "2e+00: its CPU build leaves out the router's bias"
    assert judge(ernie, VLLM, numbers(0), right, CLEAN).what == SAME
    assert judge(llama, VLLM, numbers(2), right, CLEAN).what == WRONG


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


def test_answers_about_what_has_other_bytes_now_are_forgotten(tmp_path: Path) -> None:
    from consumers import engines

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text('{"r": 2, "target_modules": ["q", "k"]}')
    jobs = [Job("llama/saved", str(base)), Job("llama/x", str(base), str(adapter))]
    folders = [tmp_path / "answers", tmp_path / "answers-again"]

    def asked() -> list[bool]:
        engines._fingerprint.cache_clear()
        forget_changed(jobs, folders)
        kept = [[read_answer(folder, job.name) is not None for folder in folders] for job in jobs]
        assert all(first == second for first, second in kept)
        for job in jobs:
            for folder in folders:
                write_answer(folder, job.name, numbers(1))
        return [first for first, _ in kept]

    assert asked() == [False, False]
    assert asked() == [True, True]
    (adapter / "README.md").write_text("which engines do not read")
    (adapter / "adapter_config.json").write_text('{"target_modules": ["k", "q"], "r": 2}')
    assert asked() == [True, True]
    (adapter / "adapter_config.json").write_text('{"r": 4, "target_modules": ["q", "k"]}')
    assert asked() == [True, False]
    (base / "config.json").write_text('{"vocab_size": 3}')
    assert asked() == [False, False]


def test_what_an_artefact_means_is_made_and_asked_about_too(tmp_path: Path) -> None:
    shop = make_all(tmp_path, "qwen3/kohya-extract")
    assert "qwen3/kohya-extract" in {one.name for one in shop.made}
    assert {one.family for one in shop.all.values()} == {"qwen3"}
    assert {"qwen3/extract", "qwen3/saved"} <= {one.name for one in shop.needed} - {one.name for one in shop.made}


def test_errors_are_shown_without_folders_of_this_machine() -> None:
    root = Path(__file__).resolve().parents[2]
    assert tidy(f"no {root}/.consumers/made/x,\n nor /tmp/abc1/model.gguf `here`") == "no made/x, nor model.gguf 'here'"


def test_one_artefact_all_the_way(tmp_path: Path) -> None:
    """Made, computed on two roads that agree, linted, and put on a page."""
    shop = make_all(tmp_path, "qwen2/extract")
    (adapter,) = shop.made
    assert shop.all["qwen2/mlx-extract"].means == adapter.name == "qwen2/extract"
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

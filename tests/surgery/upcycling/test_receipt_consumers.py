"""Who loads what `upcycle` writes: what the plan says is what `lint` says of the folder, and the remedies remedy."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.ops.lint import CLEAN, lint
from surgery.upcycling.advice import notes_on_size
from surgery.upcycling.consumers import CONSUMERS, LOADS
from surgery.upcycling.report import ConsumerReport, UpcycleReport
from tests.surgery.upcycling.dense import stored

ORDER = (LOADS, "warning", "silently wrong", "refused")
BAD = ORDER[2:]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"layers": "0,2"}),
    ("llama", {"layers": "last:1"}),
    ("llama", {"target": "shipped"}),
    ("llama-tied", {}),
    ("mistral-window", {"layers": "last:1"}),
    ("qwen2", {"combine": "raw"}),
    ("qwen3", {"layers": "0"}),
    ("granite", {}),
    ("olmo2", {}),
    ("ernie4_5", {}),
    ("hunyuan", {}),
    ("gpt2", {}),
    ("t5", {}),
    ("m2m_100", {}),
    ("vit", {"router": "expert-choice"}),
]


def planned(tmp_path: Path, family: str, **options: Any) -> UpcycleReport:
    dense = stored(tmp_path, family, torch.bfloat16)
    return surgery.upcycle(dense, output=tmp_path / "moe", dry_run=True, verify=False, **options)


def verdicts(report: UpcycleReport) -> dict[str, str]:
    return {found.consumer: found.verdict for found in report.consumers}


@pytest.mark.parametrize(("family", "options"), CASES)
def test_the_plan_and_the_folder_get_the_same_verdicts(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    report = planned(tmp_path, family, **options)
    surgery.upcycle(stored(tmp_path, family, torch.bfloat16), output=tmp_path / "moe", verify=False, **options)
    found = lint(tmp_path / "moe", tuple(CONSUMERS.values()))
    for one in report.consumers:
        findings = [f for f in found.findings if f.consumer == CONSUMERS[one.consumer]]
        worst = max(
            (ORDER.index("warning" if f.rule.endswith("tokenizer") else f.severity) for f in findings), default=0
        )
        assert one.verdict == ORDER[worst]
        assert set(one.reasons) <= {f.message for f in findings}
        assert bool(one.reasons) == (one.verdict != LOADS)
        if not findings:
            assert found.verdicts[CONSUMERS[one.consumer]] == CLEAN


@pytest.mark.parametrize(("family", "options"), CASES)
def test_a_remedy_remedies(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """What is given as the option that changes a verdict is typed, and changes it."""
    for one in planned(tmp_path, family, **options).consumers:
        if one.verdict not in BAD:
            assert one.option == ""
        elif one.option:
            match = re.fullmatch(r"(?P<words>--.+) \((?P<target>[\w.-]+)\)", one.option)
            assert match is not None
            words = shlex.split(match["words"])
            changes = dict(zip([name.removeprefix("--") for name in words[::2]], words[1::2], strict=True))
            other = planned(tmp_path, family, **{**options, **changes})
            assert other.target == match["target"]
            assert verdicts(other)[one.consumer] not in BAD


def test_what_llama_becomes_and_who_loads_it(tmp_path: Path) -> None:
    """All layers and the last ones load everywhere; any others not in llama.cpp."""
    everywhere = planned(tmp_path, "llama")
    assert (everywhere.target, set(verdicts(everywhere).values()) & set(BAD)) == ("mixtral", set())
    some = planned(tmp_path, "llama", layers="0,2")
    (refusal,) = [one for one in some.consumers if one.consumer == "llama.cpp"]
    assert refusal.verdict == "refused"
    assert refusal.option == "--layers all (mixtral)"
    assert [(one.layers, one.sparse, one.target) for one in some.choices] == [
        ("0,2", 2, some.target),
        ("last:half", 1, "glm4_moe"),
        ("all", 3, "mixtral"),
    ]
    assert [one.nbytes for one in some.choices] == [
        planned(tmp_path, "llama", layers=layers).nbytes for layers in ("0,2", "last:half", "all")
    ]
    assert some.choices[2].verdicts == verdicts(everywhere)


def test_own_code_is_for_transformers_alone(tmp_path: Path) -> None:
    report = planned(tmp_path, "gpt2")
    assert verdicts(report) == {
        "transformers": "warning", "vLLM": "refused", "llama.cpp": "refused", "MLX": "refused",
    }  # fmt: skip
    assert all(one.option == "" for one in report.consumers)
    first: ConsumerReport = report.consumers[0]
    assert "trust_remote_code=True, or the line `import surgery.moe`" in first.reasons[0]
    shipped = planned(tmp_path, "llama", target="shipped")
    assert {one.option for one in shipped.consumers if one.verdict in BAD} == {"--target auto (mixtral)"}


def test_a_folder_without_a_tokenizer_is_a_warning(tmp_path: Path) -> None:
    found = {one.consumer: one for one in planned(tmp_path, "llama").consumers}["llama.cpp"]
    assert (found.verdict, found.reasons) == ("warning", ("there is no tokenizer in the folder",))
    (tmp_path / "llama-bfloat16" / "vocab.json").write_text("{}")
    found = {one.consumer: one for one in planned(tmp_path, "llama").consumers}["llama.cpp"]
    assert "there is no tokenizer in the folder" not in found.reasons


def test_choices_only_where_there_is_a_choice(tmp_path: Path) -> None:
    assert planned(tmp_path, "t5").choices == ()
    assert planned(tmp_path, "olmo2").choices == ()  # all layers or none
    report = planned(tmp_path, "qwen3")
    assert [one.layers for one in report.choices] == ["all", "last:half"]
    assert notes_on_size(report.nbytes, report.dense_bytes, report.choices) == ()


def test_consumers_are_on_record(tmp_path: Path) -> None:
    report = surgery.upcycle(stored(tmp_path, "llama"), output=tmp_path / "moe", verify=False)
    from tests.tools import read_json

    recorded = read_json(tmp_path / "moe" / "surgery.json")["report"]
    assert [(one["consumer"], one["verdict"]) for one in recorded["consumers"]] == list(verdicts(report).items())

"""The library's verbs: what their keywords are called, and what they say of one that they do not have."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.analysis.analyze import AnalyzeOptions
from surgery.errors import InputError, OptionError
from surgery.keywords import (
    AnalyzeKeywords,
    CombineKeywords,
    ConvertKeywords,
    DenseKeywords,
    EvaluateKeywords,
    ExtractKeywords,
    MergeKeywords,
    ResizeKeywords,
    RunKeywords,
    SubtractKeywords,
    SwitchKeywords,
    TrainKeywords,
    UpcycleKeywords,
    VerifyKeywords,
    WritingKeywords,
)
from surgery.ops.combine import CombineOptions
from surgery.ops.convert import ConvertOptions
from surgery.ops.extract_options import ExtractOptions
from surgery.ops.merge import MergeOptions
from surgery.upcycling.downcycle import DenseOptions
from surgery.upcycling.options import UpcycleOptions
from tests.tools import square_adapter, square_checkpoint

# Each verb with its keywords, the options that these must cover, and the fields that are not for this verb.
VERBS: dict[str, tuple[Any, type | None, set[str]]] = {
    "extract": (ExtractKeywords, ExtractOptions, set()),
    "merge": (MergeKeywords, MergeOptions, set()),
    "subtract": (SubtractKeywords, MergeOptions, {"reversible", "any_base"}),
    "switch": (SwitchKeywords, MergeOptions, {"any_base"}),
    "verify": (VerifyKeywords, None, set()),
    "restore": (WritingKeywords, None, set()),
    "combine": (CombineKeywords, CombineOptions, set()),
    "resize": (ResizeKeywords, CombineOptions, {"method", "density", "as_peft", "any_base", "seed"}),
    "convert": (ConvertKeywords, ConvertOptions, {"to"}),
    "upcycle": (UpcycleKeywords, UpcycleOptions, set()),
    "dense": (DenseKeywords, DenseOptions, set()),
    "analyze": (AnalyzeKeywords, AnalyzeOptions, set()),
}

# Keywords that are no part of what is made.
MEASURING = {"upcycle": {"verify", "text"}, "analyze": {"plot"}}


def test_keywords_of_evaluate_are_its_options() -> None:
    from surgery.evaluation.options import EvalOptions, EvalSettings

    fields = {field.name for options in (EvalOptions, EvalSettings) for field in dataclasses.fields(options)}
    assert names_of(EvaluateKeywords) == fields - {"data"}
    listed = re.findall(r"^ {12}(\w+): \S", surgery.evaluate.__doc__ or "", re.MULTILINE)
    assert set(listed) == names_of(EvaluateKeywords)
    with pytest.raises(TypeError, match=r"evaluate\(\) has no keyword 'generated'\. Did you mean 'generate'\?"):
        surgery.evaluate("base", data="x", generated="y")  # type: ignore[call-arg]  # that is the test


# What and how to train are one list of keywords, with those that say how to run.
HOW_TO_RUN = {"base", "any_base", "recipe", "overwrite", "dry_run", "hash", "device", "trackers", "progress"}


def test_keywords_of_train_are_its_options() -> None:
    from surgery.training.options import TrainOptions

    fields = {field.name for field in dataclasses.fields(TrainOptions)}
    assert names_of(TrainKeywords) - HOW_TO_RUN == fields - {"data"}
    listed = re.findall(r"^ {12}(\w+): \S", surgery.train.__doc__ or "", re.MULTILINE)
    assert set(listed) == names_of(TrainKeywords)
    with pytest.raises(TypeError, match=r"train\(\) has no keyword 'step'\. Did you mean 'steps'\?"):
        surgery.train("base", data="x", output="y", step=2)  # type: ignore[call-arg]  # refused here, too, as it should be


def names_of(keywords: Any) -> set[str]:
    return set(keywords.__optional_keys__)


@pytest.mark.parametrize("verb", VERBS)
def test_keywords_are_the_options(verb: str) -> None:
    """The typed keywords and the fields of the options are one list, and it is the one that the verb checks with."""
    keywords, options, left_out = VERBS[verb]
    assert keywords.__name__ in str(getattr(surgery, verb).__annotations__["keywords"])
    if options is not None:
        fields = {field.name for field in dataclasses.fields(options)} | MEASURING.get(verb, set())
        assert names_of(keywords) - names_of(RunKeywords) == fields - left_out


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_every_keyword(verb: str) -> None:
    """`help(surgery.extract)` is where people look."""
    listed = re.findall(r"^ {12}(\w+): \S", getattr(surgery, verb).__doc__ or "", re.MULTILINE)
    assert set(listed) == names_of(VERBS[verb][0])
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_keyword_is_named(verb: str, tmp_path: Path) -> None:
    """With those that there are, and before anything is opened."""
    call: Callable[..., object] = getattr(surgery, verb)
    arguments = {"switch": ["a", "b", "c"], "resize": ["a"], "convert": ["a"], "upcycle": ["a"], "dense": ["a"]}.get(
        verb, ["a", "b"]
    )
    target: dict[str, object] = {} if verb in ("verify", "analyze") else {"output": tmp_path / "out"}
    target |= {"to": "peft"} if verb == "convert" else {}
    with pytest.raises(TypeError) as caught:
        call(*arguments, **target, treads=2)
    names = ", ".join(sorted(names_of(VERBS[verb][0])))
    assert str(caught.value) == f"{verb}() has no keyword 'treads'. Did you mean 'threads'? It takes {names}."


def test_a_misspelt_keyword_of_verify() -> None:
    with pytest.raises(TypeError, match=r"verify\(\) has no keyword 'logit'\. Did you mean 'logits'\?"):
        surgery.verify("base", "restored", logit=True)  # type: ignore[call-arg]  # refused here, too
    with pytest.raises(TypeError, match=r"verify\(\) has no keyword 'quux'\. It takes logits, progress, seed, threads"):
        surgery.verify("base", "restored", quux=3)  # type: ignore[call-arg]  # likewise


@pytest.mark.slow
def test_type_checkers_see_the_options(tmp_path: Path) -> None:
    """mypy passes what is right, and refuses a misspelt keyword and a value of another type."""
    (tmp_path / "right.py").write_text('import surgery\nsurgery.extract("a", "b", output="c", rank=4, threads=2)\n')
    (tmp_path / "wrong.py").write_text(
        'import surgery\nsurgery.extract("a", "b", output="c", rnk=4)\nsurgery.merge("a", output="c", threads="2")\n'
    )
    root = Path(surgery.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), "--follow-imports=silent"]
    files = [str(tmp_path / "right.py"), str(tmp_path / "wrong.py")]
    found = subprocess.run([*command, *files], capture_output=True, text=True, check=False, cwd=root)
    lines = [line for line in found.stdout.splitlines() if "error:" in line]
    assert [re.findall(r"\w+\.py:\d+", line)[0] for line in lines] == ["wrong.py:2", "wrong.py:3"]


def test_threads_below_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--threads is 0, expected at least 1"):
        surgery.merge("a", "b", output=tmp_path / "out", threads=0)


def test_swapped_arguments(tmp_path: Path) -> None:
    """An adapter where the checkpoint should be and the other way round: one mistake, so named."""
    base, adapter = square_checkpoint(tmp_path / "base", 1, 8), square_adapter(tmp_path / "adapter", 1, 8)
    for verb, role in ((surgery.merge, "BASE"), (surgery.subtract, "MERGED")):
        with pytest.raises(InputError) as caught:
            verb(adapter, base, output=tmp_path / "out")
        assert caught.value.message == f"{adapter} is an adapter; {role} comes first; did you swap them?"
    with pytest.raises(InputError, match="MERGED comes first; did you swap them"):
        surgery.switch(adapter, adapter, base, output=tmp_path / "out")
    with pytest.raises(InputError, match="base is not an adapter"):
        surgery.merge(base, base, output=tmp_path / "out")

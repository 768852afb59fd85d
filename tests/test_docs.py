"""The documentation cannot drift: its commands run, its outputs are compared, what it lists is complete."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import io
import re
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from surgery import operation, reports
from surgery.analysis import report as analysis
from surgery.cli.main import COMMANDS
from surgery.evaluation import report as evaluation
from surgery.hub import account, backup, browsing, checking, collecting, listing, pull, push, reindexing
from surgery.hub.server import administration as serving
from surgery.ops import inspection, lint, verify
from surgery.training import estimate
from surgery.training import report as training
from surgery.upcycling import report as upcycling
from surgery.upcycling.mixture import Target
from surgery.upcycling.native import NATIVE
from surgery.upcycling.seq2seq import SEQ2SEQ

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _generator() -> Any:
    """The module docs/generate.py, which is a script and belongs to no package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generator()


# Pages that are run ---------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def assert_alike(found: str, shown: str) -> None:
    """The same words, and numbers that differ by no more than other BLAS libraries and processors may make them."""
    words = [re.sub(r"\s+", " ", _NUMBER.sub("#", text)).strip() for text in (found, shown)]
    assert words[0] == words[1]
    numbers = [[float(number) for number in _NUMBER.findall(text)] for text in (found, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=2e-3)


@pytest.mark.parametrize("name", generate.PAGES)
def test_what_a_page_shows_is_what_happens(name: str, here: Path) -> None:
    """Commands and snippets of a page run in order in one folder and print what the page prints below them."""
    page = (ROOT / name).read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    seen = 0
    for kind, text in re.findall(r"^```(console|pycon|python)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        if kind == "console":
            for command, shown in generate.transcript(text):
                assert_alike(generate.printed_by(command), shown)
                seen += 1
        elif kind == "python":
            exec(compile(text, name, "exec"), scope)
        else:
            _run_doctest(text, name, scope)
    assert seen


def _run_doctest(text: str, name: str, scope: dict[str, Any]) -> None:
    """Run the `>>>` lines of a snippet in `scope`, and compare what they print to the letter."""
    test = doctest.DocTestParser().get_doctest(text, scope, name, name, 0)
    said = io.StringIO()
    result = doctest.DocTestRunner(verbose=False).run(test, out=said.write, clear_globs=False)
    scope |= test.globs
    assert result.failed == 0, said.getvalue()


def test_the_readme_shows_every_command() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [command for block in generate.blocks(page) for command, _ in generate.transcript(block)]
    assert {line.split()[1] for line in lines if line.startswith("surgery ")} == set(COMMANDS)


def test_a_comparison_of_outputs_sees_what_matters() -> None:
    """Other words, another count, and other shares differ; another last digit and other spaces do not."""
    assert_alike("error  4.52% of 7 modules\n", "error   4.55% of 7 modules")
    for other in ("error 4.52% of 8 modules", "error 5.52% of 7 modules", "fault 4.52% of 7 modules"):
        with pytest.raises(AssertionError):
            assert_alike("error 4.52% of 7 modules", other)


# Generated pages ------------------------------------------------------------------------------------------------------


def test_the_page_of_the_command_line_is_current() -> None:
    """`make docs` brings it up to date."""
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == generate.cli_page()


def test_transcripts_keep_commands_and_outputs_apart() -> None:
    block = "$ surgery a\none\n\ntwo\n\n$ surgery b\n$ surgery c\nthree\n"
    assert generate.transcript(block) == [
        ("surgery a", "one\n\ntwo\n"),
        ("surgery b", ""),
        ("surgery c", "three\n"),
    ]


# JSON -----------------------------------------------------------------------------------------------------------------


def _parts(hint: Any) -> Iterator[type]:
    """The dataclasses that a type hint speaks of."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for argument in typing.get_args(hint):
        yield from _parts(argument)


def _reported() -> list[type]:
    """Every dataclass that `--json` can print: the reports, and what they hold."""
    modules: tuple[types.ModuleType, ...] = (
        reports, inspection, verify, operation, lint, push, pull, browsing, listing, account, serving, reindexing,
        collecting, checking, backup, upcycling, estimate, training, evaluation, analysis,
    )  # fmt: skip
    todo = [
        found
        for module in modules
        for found in vars(module).values()
        if dataclasses.is_dataclass(found) and isinstance(found, type) and hasattr(found, "as_dict")
    ]
    found: list[type] = []
    while todo:
        cls = todo.pop(0)
        if cls not in found:
            found.append(cls)
            todo += [part for hint in typing.get_type_hints(cls).values() for part in _parts(hint)]
    return found


def _documented() -> dict[str, list[str]]:
    """For each object of docs/json.md the fields in its table."""
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE)
    return {name: re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) for name, text in sections}


@pytest.mark.parametrize("cls", _reported(), ids=lambda cls: cls.__name__)
def test_every_field_of_a_report_is_documented(cls: type) -> None:
    """In its own section, or in that of the class it shares the field with."""
    own = [name for name in cls.__annotations__ if not name.startswith("_")]
    computed = ["passed"] if hasattr(cls, "passed") else []
    assert sorted(_documented()[cls.__name__]) == sorted(own + computed)


def test_no_object_is_documented_that_is_never_printed() -> None:
    assert set(_documented()) == {cls.__name__ for cls in _reported()}


# Formats --------------------------------------------------------------------------------------------------------------


def test_every_format_of_upcycling_has_its_row() -> None:
    """In the order in which they are tried, with what each can express."""
    page = (ROOT / "docs" / "upcycling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+) \|$", page, re.MULTILINE)
    assert rows == [" | ".join(_row(target)) for target in (*NATIVE, *SEQ2SEQ)]


def _row(target: Target) -> tuple[str, ...]:
    shared = next(iter(target.blocks.values())).shared
    return (
        ", ".join(f"`{source}`" for source in target.sources),
        f"`{target.name}`",
        target.subset.value,
        "yes" if target.raw else "no",
        "no" if shared is None else "always" if shared.required else "if asked for",
        ", ".join(target.tasks),
    )


# Lists ----------------------------------------------------------------------------------------------------------------


def test_every_dependency_has_a_line() -> None:
    """Under the heading of its extra; what comes with no extra is the core."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {"Core": project["dependencies"]}
    declared |= {f"`[{extra}]`": names for extra, names in project["optional-dependencies"].items()}
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    described = {
        title: re.findall(r"^\| `([\w.-]+)` \| \S.+ \| \S.+ \|$", text, re.MULTILINE) for title, text in sections
    }
    wanted = {title: [re.split(r"[\[<>=~! ]", name)[0] for name in names] for title, names in declared.items()}
    assert {title: sorted(names) for title, names in described.items()} == {
        title: sorted(names) for title, names in wanted.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files that exist, and anchors name headings."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], target


def test_pages_name_no_machine() -> None:
    """Nothing in the documentation depends on where it was written."""
    for page in PAGES:
        found = re.search(r"(?<![\w.])/(?:home|root|tmp|work|opt|Users)/", page.read_text(encoding="utf-8"))
        assert found is None, f"{page.name}: {found}"

"""`--help`: the pages are what `make docs` wrote, and every command explains itself."""

from __future__ import annotations

import shlex

import click
import pytest

from surgery.cli.main import COMMANDS, cli
from tests.test_docs import ROOT, generate

GOLDEN = ROOT / "tests" / "golden" / "help"


NAMES = generate.command_names()


def command(name: str) -> click.Command:
    found: click.Command | None = cli
    for word in name.split():
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), word)
    assert found is not None
    return found


@pytest.mark.parametrize("page", ["surgery.txt", *(f"{name.replace(' ', '-')}.txt" for name in NAMES)])
def test_help_is_golden(page: str) -> None:
    """`make docs` writes these pages; a change of one is to be looked at."""
    assert (GOLDEN / page).read_bytes().decode() == generate.help_pages()[page]


def test_no_golden_page_is_left_over() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(generate.help_pages())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_listed_with_its_own_first_sentence(name: str) -> None:
    """`surgery --help` knows the line of each command without importing it; this holds the two together."""
    written = (command(name).help or "").partition("\n\n")[0].replace("\n", " ")
    assert written == COMMANDS[name][1]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_has_examples_that_parse(name: str) -> None:
    """Every example names options and arguments that exist."""
    epilog = command(name).epilog or ""
    assert "Examples:" in epilog
    lines = [line.strip() for line in epilog.splitlines() if line.strip().startswith("surgery ")]
    assert len(lines) > 1
    for line in lines:
        words = shlex.split(line.partition(" >")[0], comments=True)
        assert words[: 1 + len(name.split())] == ["surgery", *name.split()]
        command(name).make_context(name, words[1 + len(name.split()) :])


@pytest.mark.parametrize("name", NAMES)
def test_a_command_explains_each_option(name: str) -> None:
    found = command(name)
    assert found.help
    for option in found.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts[0]}"

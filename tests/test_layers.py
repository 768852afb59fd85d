"""The package as a whole: who imports whom, what is public, and that what is public is documented."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import surgery
from surgery import errors

ROOT = Path(__file__).parents[1]
MODULES = [
    "surgery",
    *(name for _, name, _ in pkgutil.walk_packages(surgery.__path__, "surgery.") if name != "surgery.__main__"),
]


def test_imports_go_down_only() -> None:
    """The contracts in pyproject.toml hold."""
    command = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 broken" in run.stdout


def test_the_contract_names_every_module() -> None:
    """A module that no layer names could import anything."""
    import tomllib

    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    named = {name.strip() for layer in linter["contracts"][0]["layers"] for name in layer.split("|")}
    top = {".".join(name.split(".")[:2]) for name in MODULES if "." in name}
    assert top - named <= {"surgery.__main__"}
    assert named <= top


def test_all_is_what_is_exported() -> None:
    """No more and no less, and in order."""
    exported = {
        name
        for name, value in vars(surgery).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(surgery.__all__) == exported | {"__version__"}
    assert len(surgery.__all__) == len(set(surgery.__all__))
    assert surgery.__all__ == sorted(surgery.__all__)


def test_every_error_is_exported_and_drawn() -> None:
    """The tree in the docstring has each class, below its base, with the standard class that it also is."""
    found = [
        value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, surgery.SurgeryError)
    ]
    assert {cls.__name__ for cls in found} <= set(surgery.__all__)
    drawn = (errors.__doc__ or "").splitlines()
    for cls in found:
        (line,) = [line for line in drawn if line.lstrip("│├└─ ").split(" ")[0] == cls.__name__]
        depth = len(cls.__mro__[: cls.__mro__.index(surgery.SurgeryError)])
        assert len(line) - len(line.lstrip("│├└─ ")) == 4 * depth
        for base in cls.__bases__:
            assert issubclass(base, surgery.SurgeryError) or base is Exception or f"({base.__name__})" in line


@pytest.mark.parametrize(
    "error",
    [
        surgery.FormatError("one.", ["one.", "two."]),
        surgery.OutputError("full."),
        surgery.OptionError("no."),
        surgery.MissingExtraError("transformers", "train"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes(error: surgery.SurgeryError) -> None:
    """As a pool of processes sends them: the same class, sentence and problems."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.message, copy.problems) == (str(error), error.message, error.problems)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_documented(name: str) -> None:
    """Every module, and every class and function in it that does not begin with an underscore."""
    module = importlib.import_module(name)
    assert module.__doc__, name
    for attribute, value in vars(module).items():
        if attribute.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            text = value.__doc__ or ""
            # Dataclasses without a docstring are given their signature for one.
            assert text, f"{name}.{attribute}"
            assert not text.startswith(f"{attribute}("), f"{name}.{attribute}"


def test_the_library_does_not_print_or_exit() -> None:
    """That is the command line's part: no print, no sys.exit, no logging to the root outside of it."""
    import ast

    for path in sorted((ROOT / "surgery").rglob("*.py")):
        if "cli" in path.relative_to(ROOT).parts or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "exit", "quit", "sys.exit", "os._exit"), f"{path}:{node.lineno}"

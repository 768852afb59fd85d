"""What is shipped: the wheel against the tracked files, and the command with nothing but the base dependencies."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import surgery
from tests.peft_tools import write_three
from tests.tools import unequal

ROOT = Path(__file__).parents[1]
# Folders of the repository, and where they are in the package.
PACKAGES = {"surgery": "surgery", "hub": "surgery/hub", "cli": "surgery/cli"}


def git(*arguments: str | Path) -> str:
    run = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip(f"this is no checkout of the repository: {run.stderr.strip()}")
    return run.stdout


def tracked() -> list[str]:
    """Every tracked file that is there."""
    return [name for name in git("ls-files", "-z").split("\0") if name and (ROOT / name).exists()]


def shipped(root: Path, names: list[str]) -> dict[str, bytes]:
    """The tracked files of the package, under the names they have in it."""
    found = {}
    for name in names:
        folder, _, rest = name.partition("/")
        if folder in PACKAGES and not (ROOT / name).is_symlink():
            found[f"{PACKAGES[folder]}/{rest}"] = (root / name).read_bytes()
    return found


def build(source: Path, out: Path, kind: str) -> Path:
    """Build a wheel or an sdist with the build backend that is installed."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel but its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        return {name: archive.read(name) for name in names}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files as they are now, links as links."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, tmp_path_factory.mktemp("wheel"), "wheel")


def test_the_wheel_holds_the_tracked_files_and_no_others(wheel: Path, checkout: Path) -> None:
    """Byte for byte; `hub` and `cli` within the package and nowhere else."""
    found = contents(wheel)
    assert found == shipped(checkout, tracked())
    assert "surgery/py.typed" in found
    assert {name.split("/")[0] for name in found} == {"surgery"}


def test_the_wheel_says_what_pyproject_says(wheel: Path) -> None:
    """Dependencies, extras, the command and the version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        metadata = importlib.metadata.PathDistribution(zipfile.Path(archive, f"{folder}/")).metadata
    assert entry_points.split() == ["[console_scripts]", "surgery", "=", "surgery.cli.main:main"]
    assert (metadata["Name"], metadata["Version"]) == ("checkpoint-surgery", surgery.__version__)
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    base = {str(requirement) for requirement in required if "extra ==" not in str(requirement.marker)}
    assert base == {str(Requirement(text)) for text in project["dependencies"]}
    assert set(metadata.get_all("Provides-Extra") or []) == set(project["optional-dependencies"])
    assert metadata["Requires-Python"] == project["requires-python"]


def test_the_sdist_makes_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    """Everything that a build needs is in it."""
    (tmp_path / "sdist").mkdir()
    archive = build(checkout, tmp_path / "sdist", "sdist")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = build(source, tmp_path / "wheel", "wheel")
    assert contents(again) == contents(wheel)
    assert (source / "README.md").read_bytes() == (checkout / "README.md").read_bytes()


def test_a_clone_without_links_makes_the_same_wheel(tmp_path: Path) -> None:
    """Where links become text files, as on Windows, the package is whole all the same."""
    git("rev-parse", "HEAD")
    made = {}
    for links in ("true", "false"):
        clone = tmp_path / links
        options = ["--quiet", "--no-hardlinks", "--config", f"core.symlinks={links}"]
        subprocess.run(["git", "clone", *options, ROOT, clone], check=True, capture_output=True)
        assert (clone / "surgery" / "hub").is_symlink() == (links == "true")
        made[links] = contents(build(clone, tmp_path / f"wheel-{links}", "wheel"))
    assert made["true"] == made["false"]
    assert "surgery/hub/remote.py" in made["false"]


# The base dependencies alone ------------------------------------------------------------------------------------------


def closure(names: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions that these requirements lead to, without extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    queue = [Requirement(name) for name in names]
    while queue:
        requirement = queue.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in found or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = importlib.metadata.distribution(name)
        queue += [Requirement(text) for text in found[name].requires or []]
    return found


@pytest.fixture(scope="module")
def base_only(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel and what `pip install checkpoint-surgery` brings, by links; nothing else."""
    folder = tmp_path_factory.mktemp("base-only") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for distribution in closure(project["dependencies"]).values():
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            origin = Path(str(distribution.locate_file(top)))
            if origin.exists() and not (site / top).exists():
                (site / top).symlink_to(origin)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_three(folder)
    return folder


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with another interpreter, from another folder."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), "-m", "surgery", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_the_base_install_has_nothing_else(base_only: Path, tmp_path: Path) -> None:
    """Neither what the extras bring nor the checkout."""
    code = (
        "import importlib.util, surgery; print(surgery.__file__); "
        "print([name for name in ('transformers', 'peft', 'datasets', 'pytest', 'scipy', 'pip', 'tests', 'tokenizers') "
        "if importlib.util.find_spec(name)])"
    )
    found = subprocess.run([base_only, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    place, extra = found.stdout.splitlines()
    assert Path(place).is_relative_to(base_only.parents[1])
    assert extra == "[]"


def test_the_base_install_does_the_work(base_only: Path, inputs: Path, tmp_path: Path) -> None:
    """Extract, merge, subtract, switch, inspect and verify, with the bytes that the full installation gives."""
    base, tuned, adapter = (str(inputs / name) for name in ("base", "tuned", "adapter"))
    surgery.extract(base, tuned, output=tmp_path / "full-extracted", rank=2, device="cpu")
    surgery.merge(base, adapter, output=tmp_path / "full-merged")
    surgery.merge(base, adapter, output=tmp_path / "full-reversible", reversible=True)
    work = {
        "extracted": ("extract", base, tuned, "--rank", "2", "--device", "cpu"),
        "merged": ("merge", base, adapter),
        "reversible": ("merge", base, adapter, "--reversible"),
        "subtracted": ("subtract", "reversible"),
        "switched": ("switch", "reversible", adapter, f"{adapter}=0.5"),
        "whole": ("extract", base, tuned, "--rank", "2", "--device", "cpu", "--exact"),
        "restored": ("restore", base, "whole"),
        "combined": ("combine", adapter, f"{adapter}=0.5"),
        "resized": ("resize", adapter, "--rank", "1"),
        "converted": ("convert", adapter, "--to", "mlx", "--base", base),
    }
    for name, arguments in work.items():
        done = run(base_only, tmp_path, *arguments, "-o", name, "--quiet")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    for name in ("extracted", "merged", "reversible"):
        assert unequal(tmp_path / name, tmp_path / f"full-{name}") == []
    assert (tmp_path / "subtracted" / "model.safetensors").read_bytes() == (
        inputs / "base" / "model.safetensors"
    ).read_bytes()
    assert unequal(tmp_path / "restored", Path(tuned)) == []
    assert run(base_only, tmp_path, "push", "extracted", "lab/adapter", "--quiet").stderr == ""
    assert run(base_only, tmp_path, "pull", "lab/adapter", "-o", "pulled", "--check-base", base, "--quiet").stderr == ""
    assert unequal(tmp_path / "pulled", tmp_path / "extracted") == ["README.md"]
    for looking in (("inspect", "merged"), ("inspect", "extracted"), ("verify", "switched"), ("verify", base, base)):
        done = run(base_only, tmp_path, *looking)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_a_missing_extra_is_named(base_only: Path, inputs: Path, tmp_path: Path) -> None:
    """What needs a model to run says in one sentence what to install."""
    base = str(inputs / "base")
    done = run(base_only, tmp_path, "verify", base, base, "--logits", "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Error: This needs the package 'transformers', which is not installed; "
        "install it with `pip install 'checkpoint-surgery[train]'`.\n"
    )

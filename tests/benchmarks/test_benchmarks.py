"""Every benchmark runs, on tiny models, and leaves the rows that docs/benchmarks.md is made of. Nothing is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_ALL = ROOT / "benchmarks" / "run_all.py"
LAUNCHER = ROOT / "benchmarks" / "launcher.py"

OURS = ("surgery extract", "surgery extract --no-hash")
COMBINES = ("surgery combine", "surgery combine --no-hash")
METHODS = ("full", "lora")
HOMES = ("the same home", "a new home")
MERGES = ("surgery merge", "surgery merge --no-hash")
EXTRACT_ERRORS = [f"largest error / least possible, 14 modules, {name}" for name in (*OURS, "plain script")]
EXPECTED: dict[str, tuple[list[str], list[str]]] = {
    "extract-large": (
        [*OURS, "plain script"],
        [f"{what} against the script, {name}" for name in OURS for what in ("CPU", "peak memory")] + EXTRACT_ERRORS,
    ),
    "extract-small": ([*OURS, "plain script"], EXTRACT_ERRORS),
    "merge": (
        [*MERGES, "transformers and PEFT"],
        [
            f"{what}, {name}"
            for name in MERGES
            for what in ("CPU against PEFT", "peak memory", "tensors with PEFT's bits")
        ],
    ),
    "reversible": (
        [
            "surgery merge",
            "surgery merge --reversible",
            "surgery subtract, with the record",
            "surgery subtract ADAPTER, without a record",
        ],
        [
            "CPU, reversible against plain merge",
            "CPU, subtract with the record against plain merge",
            "undo record, percent of the targeted bytes",
            "undo folder with its copy of the adapter, percent",
            "tensors restored to the base's bits",
        ],
    ),
    "undo-record": (
        [],
        [
            f"{dtype} base, ‖ΔW‖ = {change}% of ‖W‖"
            for dtype in ("bfloat16", "float32")
            for change in ("0.35", "1.4", "5.5", "23")
        ],
    ),
    "exact-sizes": (
        [],
        [
            figure
            for suffix in ("", "-float32")
            for tuning in ("light", "medium", "heavy")
            for figure in (
                f"against XOR and zstd: {tuning}{suffix}, width 128",
                f"against zstd alone: {tuning}{suffix}, width 128",
                f"against the best rank of six: {tuning}{suffix}, width 128",
            )
        ],
    ),
    "exact-speed": (
        ["surgery extract --exact", "surgery restore --threads 1"],
        [
            "against XOR and zstd: synthetic pair, rank 16",
            "against zstd alone: synthetic pair, rank 16",
            "restored on one core, after imports",
            "restored per second of processor, after imports",
            "restored, whole process",
            "tensors restored to their bits",
        ],
    ),
    "memory": (
        [f"{name}, {layers} layers" for name in MERGES for layers in (1, 5)],
        [f"peak memory, 4x against 1x, {name}" for name in MERGES],
    ),
    "combine": (
        [*COMBINES, "a script that calls surgery.combine", "PEFT, loading and combining"],
        [
            "CPU of the call against PEFT's call, surgery.combine",
            *(f"CPU of the process against PEFT's call, {name}" for name in COMBINES),
            *(
                f"{what}, largest of 14 modules, {name}"
                for name in ("surgery combine", "PEFT, loading and combining")
                for what in ("dW from the nearest of the rank", "truncation error above the least")
            ),
        ],
    ),
    "copy": (
        ["surgery merge", "cp -r and sync", "surgery merge --no-hash", "python -c 'import torch'"],
        [f"wall time beyond start-up against cp, {name}" for name in MERGES],
    ),
    "hub": (
        ["hf upload", "hf download", "cp -r and sha256sum"],
        [
            *(f"wall time against cp -r and sha256sum, hf {name}" for name in ("upload", "download")),
            "server's peak memory while that is pushed",
            *(f"growth by a 32-expert mixture (10 MB) after its dense checkpoint, from {home}" for home in HOMES),
            *(f"growth by version 2 of an adapter (0 MB) with one layer changed, from {home}" for home in HOMES),
            "4 clients that pull an adapter at once, against one",
        ],
    ),
    "registry": (
        ["surgery push", "cp -r, sync, SHA-256", "surgery pull"],
        [f"wall time against cp -r, sync, SHA-256, surgery {name}" for name in ("push", "pull")],
    ),
    "training": (
        [
            f"{name}, {method}, tiny"
            for method in METHODS
            for name in ("surgery.train", "surgery.train, resumed", "transformers Trainer")
        ],
        [
            figure
            for method in METHODS
            for figure in (
                f"losses of 20 with other bits after a stop, {method}, tiny",
                f"tokens a second, {method}, tiny, against transformers Trainer",
                f"tokens a second of processor, {method}, tiny, against transformers Trainer",
                f"largest difference of 20 losses, {method}, tiny, against transformers Trainer",
            )
        ],
    ),
    "mixed": (
        [],
        [
            figure
            for tokens in (32, 128)
            for figure in (
                f"CPU against the base alone, {tokens} tokens a row",
                f"CPU against PEFT's adapter_names, {tokens} tokens a row",
                f"difference from one at a time, {tokens} tokens a row",
            )
        ],
    ),
    "startup": (["surgery --help", "python -c 'import click'"], ["CPU against click"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all benchmarks, which use each other's models."""
    return tmp_path_factory.mktemp("bench")


def run(*arguments: str) -> tuple[str, int]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MERGEKIT_BIN", "TRL_PYTHON")}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    return done.stdout + done.stderr, done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_every_benchmark_runs_and_leaves_its_rows(name: str, folder: Path) -> None:
    printed, status = run(str(RUN_ALL), "--quick", "--keep", "--only", name, "--folder", str(folder))
    assert status == 0, printed
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    found = results["benchmarks"][name]
    processes, figures = EXPECTED[name]
    assert results["quick"]
    assert [process["name"] for process in found["processes"]] == processes
    assert [row["figure"] for row in found["rows"]] == figures
    assert all(usage[what] > 0 for p in found["processes"] for usage in p["runs"] for what in ("cpu", "peak", "wall"))
    assert all(figure in printed for figure in figures)
    assert not (folder / "outputs").exists()
    for row in found["rows"]:
        # What is not a matter of time holds for tiny models too.
        if row["figure"].startswith(
            ("largest error", "tensors with", "dW from", "truncation error", "largest difference", "difference from")
        ):
            assert row["met"] is not False, row
        if row["figure"].startswith("tensors restored"):
            assert row["ours"] == "21 of 21"


def test_the_launcher_measures_the_command_and_not_itself(tmp_path: Path) -> None:
    code = "import sys; held = bytearray(200_000_000); print('out'); print('err', file=sys.stderr); sys.exit(3)"
    printed, _ = run(str(LAUNCHER), str(tmp_path / "log"), sys.executable, "-c", code)
    usage = json.loads(printed)
    assert usage["status"] == 3
    assert 200_000_000 < usage["peak"] < 300_000_000
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]
    small = json.loads(run(str(LAUNCHER), str(tmp_path / "log"), "true")[0])
    assert small["peak"] < 30_000_000, "the floor is the launcher itself"


def test_the_measuring_side_imports_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import benchmarks.suite; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['benchmarks']"


@pytest.mark.slow
def test_a_failing_benchmark_is_reported(folder: Path) -> None:
    """With a peer that is not there, the run says so and goes on; its status is 1."""
    fake = folder / "bin" / "mergekit-extract-lora"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho no such model\nexit 7\n")
    fake.chmod(0o755)
    environment = {**os.environ, "MERGEKIT_BIN": str(fake.parent)}
    command = [sys.executable, str(RUN_ALL), "--quick", "--only", "extract-small", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "ended with 7" in done.stdout
    assert "no such model" in done.stdout
    assert not (folder / "models").exists(), "models are left only with --keep"

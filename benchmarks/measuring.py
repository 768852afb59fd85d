"""Measured processes: what one run used, several runs of several processes in turn, and the folder they work in."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.models import Shape

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "benchmarks" / "launcher.py"
# Stands for the output's path in a command.
OUT = "{out}"


class ProcessError(Exception):
    """A process ended with another status than 0; the message has its last lines."""


@dataclass(frozen=True)
class Usage:
    """What one process used: seconds of wall clock and of processor (user and system), and bytes of peak memory."""

    wall: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Process:
    """A command to measure, `OUT` standing for its output; `runs` bounds how often, for one that takes minutes."""

    name: str
    command: Sequence[str]
    runs: int | None = None


@dataclass
class Measured:
    """All runs of one process, and the output of its first if that was kept."""

    name: str
    output: Path
    usages: list[Usage] = field(default_factory=list)

    @property
    def cpu(self) -> float:
        return statistics.median(usage.cpu for usage in self.usages)

    @property
    def peak(self) -> float:
        return statistics.median(usage.peak for usage in self.usages)

    @property
    def wall(self) -> float:
        return statistics.median(usage.wall for usage in self.usages)

    def as_dict(self) -> dict[str, object]:
        return {"name": self.name, "runs": [asdict(usage) for usage in self.usages]}


def ours(*arguments: str | Path) -> tuple[str, ...]:
    """A command of ours, as installed beside this interpreter."""
    return (str(Path(sys.executable).with_name("surgery")), *map(str, arguments))


def python(script: str, *arguments: str | Path) -> tuple[str, ...]:
    """A script of this folder, run by this interpreter."""
    return (sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments))


@dataclass
class Workshop:
    """Where benchmarks work, and how often they measure.

    Attributes:
        folder: for models, outputs, logs; everything in it may be deleted.
        runs: of each process.
        quick: sizes that say nothing, to try the scripts.
        mergekit: the `mergekit-extract-lora` command, if there is one.
        trl: an interpreter that has TRL beside our packages, if there is one.
    """

    folder: Path
    runs: int
    quick: bool
    mergekit: Path | None
    trl: Path | None

    def shape(self, shape: Shape) -> Shape:
        """The shape to work on: the one asked for, or a small one of as many layers as a quick run can afford."""
        return shape.shrunk() if self.quick else shape

    def base(self, shape: Shape) -> Path:
        """A checkpoint of a shape; made if it is not there."""
        return self._model(shape, "base")

    def tuned(self, shape: Shape) -> Path:
        """A fine-tune of `base`."""
        return self._model(shape, "tuned")

    def adapter(self, shape: Shape, targets: str, number: int = 1) -> Path:
        """A LoRA adapter for `base`, for the layers named; each number has other factors."""
        return self._model(shape, "adapter", targets, number)

    def _model(self, shape: Shape, kind: str, targets: str = "", number: int = 1) -> Path:
        name = (kind if number == 1 else f"{kind}{number}") + (f"-{targets.replace(',', '-')}" if targets else "")
        place = self.folder / "models" / shape.name / name
        if not place.exists():
            making = place.with_name(place.name + ".partial")
            shutil.rmtree(making, ignore_errors=True)
            options = ["--targets", targets, "--number", str(number)] if targets else []
            self.unmeasured("make_models", "--shape", json.dumps(asdict(shape)), f"--{kind}", making, *options)
            making.rename(place)
        return place

    def unmeasured(self, module: str, *arguments: str | Path) -> str:
        """Run a script of this folder that prepares or checks. Returns what it printed."""
        command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
        with self._environment() as environment:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ProcessError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout

    def compile(self) -> None:
        """Write our byte code, as pip does when it installs a wheel, so that no measured run has to."""
        folders = [str(ROOT / name) for name in ("surgery", "hub", "cli")]
        with self._environment() as environment:
            subprocess.run([sys.executable, "-m", "compileall", "-q", *folders], env=environment, check=False)

    def alternate(self, *processes: Process, keep: bool = True, least: int = 1) -> dict[str, Measured]:
        """Run processes in turn, A B C A B C, so that a slow minute of the machine falls on all of them.

        Args:
            processes: what to run.
            keep: leave the first output of each for later checks, until `clear`; others are deleted at once.
            least: runs of each, where that is more than asked for; a quick run makes one.
        """
        runs = 1 if self.quick else max(self.runs, least)
        found = {process.name: Measured(process.name, self._output(process.name)) for process in processes}
        for number in range(runs):
            for process in processes:
                if number >= (process.runs or runs):
                    continue
                measured = found[process.name]
                first = keep and number == 0
                output = measured.output if first else measured.output.with_name(measured.output.name + "-again")
                measured.usages.append(self._measure(process, output))
                if not first:
                    shutil.rmtree(output, ignore_errors=True)
        return found

    def _output(self, name: str) -> Path:
        slug = "".join(letter if letter.isalnum() else "-" for letter in name)
        return self.folder / "outputs" / slug

    def _measure(self, process: Process, output: Path) -> Usage:
        output.parent.mkdir(parents=True, exist_ok=True)
        log = self.folder / "log.txt"
        command = [part.replace(OUT, str(output)) for part in process.command]
        os.sync()  # what was written before is not on this run's bill
        with self._environment() as environment:
            done = subprocess.run(
                [sys.executable, str(LAUNCHER), str(log), *command], env=environment, stdout=subprocess.PIPE, check=True
            )
        found = json.loads(done.stdout)
        if found["status"]:
            raise ProcessError(f"{' '.join(command)} ended with {found['status']}:\n{log.read_text()[-2000:]}")
        return Usage(found["wall"], found["cpu"], found["peak"])

    @contextmanager
    def _environment(self) -> Iterator[dict[str, str]]:
        """The same environment for all, with a cache folder that is new: no hash is known from an earlier run."""
        cache = self.folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        try:
            yield environment | {
                "CUDA_VISIBLE_DEVICES": "",
                "HF_HUB_OFFLINE": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
                "XDG_CACHE_HOME": str(cache),
            }
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    def clear(self) -> None:
        """Delete all outputs."""
        shutil.rmtree(self.folder / "outputs", ignore_errors=True)

    def clear_models(self) -> None:
        """Delete all models and what was computed from them."""
        shutil.rmtree(self.folder / "models", ignore_errors=True)

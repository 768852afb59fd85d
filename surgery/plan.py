"""A plan: every tensor an operation will write and how, made from headers alone.

A plan is checked in full before any work, can be shown (`--dry-run`), and is then run by `execute.execute`. Its steps
are independent of each other: each reads stored tensors, applies pure functions, and writes whole output tensors or
leaves intermediate tensors ("parts") for a later plan.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.checkpoint import StoredTensor
from surgery.layout import Layout, TensorSpec
from surgery.source import Source
from surgery.version import versions

if TYPE_CHECKING:
    import torch

    from surgery.execute import StepIO

# What a process holds before its first step: an interpreter, and torch (2.13, CPU) where a step computes.
INTERPRETER_BYTES = 40_000_000
TORCH_BYTES = 240_000_000


@dataclass(frozen=True)
class StepResult:
    """What a step found out (`report`, JSON values only) and the intermediate tensors it leaves (`tensors`)."""

    report: Mapping[str, object] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Step(ABC):
    """One unit of work, run by one thread. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique within the plan, and the same in a later run of the same plan."""

    @property
    @abstractmethod
    def reads(self) -> tuple[StoredTensor, ...]:
        """Stored tensors, or slices of them."""

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        """Output tensors that this step writes whole."""
        return ()

    @property
    def computes(self) -> bool:
        """Whether it needs torch; a step that moves bytes does not."""
        return True

    @property
    def scratch(self) -> int:
        """Bytes it holds at most while it runs."""
        return 0

    @abstractmethod
    def run(self, io: StepIO) -> StepResult:
        """Do the work."""


@dataclass(frozen=True)
class OutputStep(Step):
    """A step that writes one output tensor, by whose name it goes."""

    output: TensorSpec

    @property
    def name(self) -> str:
        return self.output.name

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        return (self.output,)


@dataclass(frozen=True)
class CopyStep(OutputStep):
    """An output tensor that is an input tensor, byte for byte."""

    source: StoredTensor

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return (self.source,)

    @property
    def computes(self) -> bool:
        return False

    def run(self, io: StepIO) -> StepResult:
        io.copy(self.output, self.source)
        return StepResult()


@dataclass(frozen=True)
class Plan:
    """Steps and the files they fill.

    Attributes:
        steps: in the order of the data on disk.
        layout: the safetensors files that the steps write; empty for a plan that only leaves parts.
        files: small files written as given, by name.
        carried: files copied from an input as they are.
        spare: bytes of intermediate and late files, at most; counted when free disk is checked.
        subfolder: where in the output the layout goes, with a trailing slash; empty for the top.
    """

    steps: tuple[Step, ...]
    layout: Layout = field(default_factory=lambda: Layout(()))
    files: Mapping[str, bytes] = field(default_factory=dict)
    carried: tuple[tuple[str, Source], ...] = ()
    spare: int = 0
    subfolder: str = ""

    def check(self) -> None:
        """Every output tensor is written by exactly one step, in the shape laid out, and nothing else is.

        A violation is a bug in the plan's maker, not in its input, so it raises ValueError.
        """
        laid_out = {
            info.name: TensorSpec(info.name, info.dtype, info.shape) for f in self.layout.files for info in f.entries
        }
        written = [spec for step in self.steps for spec in step.writes]
        twice = [name for name, count in Counter(spec.name for spec in written).items() if count > 1]
        names = [name for name, count in Counter(step.name for step in self.steps).items() if count > 1]
        wrong = [spec.name for spec in written if laid_out.get(spec.name) != spec]
        missing = sorted(laid_out.keys() - {spec.name for spec in written})
        if twice or names or wrong or missing:
            raise ValueError(f"plan: {twice=} {names=} {wrong=} {missing=}")

    @property
    def inputs(self) -> tuple[StoredTensor, ...]:
        """Every stored tensor that is read, each once."""
        return tuple({tensor.key: tensor for step in self.steps for tensor in step.reads}.values())

    @property
    def read_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs)

    @property
    def write_bytes(self) -> int:
        return (
            self.layout.nbytes
            + sum(len(data) for data in self.files.values())
            + sum(source.size for _, source in self.carried)
            + self.spare
        )

    @property
    def copied_bytes(self) -> int:
        """Bytes of the tensors that move without being decoded."""
        return sum(spec.nbytes for step in self.steps if not step.computes for spec in step.writes)

    @property
    def computes(self) -> bool:
        return any(step.computes for step in self.steps)

    def peak_bytes(self, threads: int) -> int:
        """Memory at most, with the `threads` largest steps at once."""
        largest = sorted((step.scratch for step in self.steps), reverse=True)[:threads]
        return INTERPRETER_BYTES + (TORCH_BYTES if self.computes else 0) + sum(largest)

    def fingerprint(self, options: object) -> str:
        """What tells this work from every other: inputs, outputs and options. An interrupted run is resumed by it."""
        described = {
            "versions": versions(self.computes),
            "options": repr(options),
            "inputs": [[*tensor.key, tensor.source.version, *(tensor.source.identity or ())] for tensor in self.inputs],
            "steps": [repr(step) for step in self.steps],  # with every number that is not an option
            "outputs": [[f.name, hashlib.blake2b(f.raw_header).hexdigest()] for f in self.layout.files],
            "files": {name: hashlib.blake2b(data).hexdigest() for name, data in self.files.items()},
            "carried": [[name, source.name, source.version, *(source.identity or ())] for name, source in self.carried],
        }
        return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=32).hexdigest()


def copies(tensors: Iterable[StoredTensor]) -> tuple[CopyStep, ...]:
    """A copy step for each tensor."""
    return tuple(CopyStep(TensorSpec.like(tensor), tensor) for tensor in tensors)

"""What every operation that writes has in common: check the target, stage, run, leave provenance, rename."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.execute import Execution, Settings, execute
from surgery.hashing import HashBook
from surgery.layout import Layout
from surgery.plan import Plan
from surgery.provenance import FILE_NAME, Input, describe_input, describe_outputs, document, hash_files
from surgery.source import Source
from surgery.writer import Staging, check_target, free_bytes, open_staging

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class RunOptions:
    """How to run an operation; nothing here is part of what it makes.

    Attributes:
        overwrite: replace an existing output.
        dry_run: plan and check everything, write nothing.
        settings: threads, device, hashing, progress.
        remember: whether hashes of an earlier run may stand for reading a file again.
    """

    overwrite: bool = False
    dry_run: bool = False
    settings: Settings = field(default_factory=Settings)
    remember: bool = True


@dataclass(frozen=True)
class PlanSummary:
    """What an operation is going to do, in bytes; from headers alone."""

    read_bytes: int
    write_bytes: int
    copied_bytes: int
    peak_memory_bytes: int
    free_disk_bytes: int
    tensors: int
    computed_tensors: int


def summarise(plans: Sequence[Plan], target: Path, settings: Settings) -> PlanSummary:
    """Add up plans that run one after the other."""
    return PlanSummary(
        read_bytes=sum(plan.read_bytes for plan in plans),
        write_bytes=sum(plan.write_bytes for plan in plans),
        copied_bytes=sum(plan.copied_bytes for plan in plans),
        peak_memory_bytes=max((plan.peak_bytes(settings.threads) for plan in plans), default=0),
        free_disk_bytes=free_bytes(target),
        tensors=sum(len(step.writes) for plan in plans for step in plan.steps),
        computed_tensors=sum(len(step.writes) for plan in plans for step in plan.steps if step.computes),
    )


def check_paths(target: Path, inputs: Sequence[Input], overwrite: bool) -> None:
    """Refuse an output that exists or overlaps an input."""
    places = [(item.role, item.checkpoint.path) for item in inputs]
    check_target(target, [(role, path) for role, path in places if path is not None], overwrite)


class Run:
    """An operation under way: runs plans into one staging folder and ends by writing `surgery.json`."""

    def __init__(self, staging: Staging, options: RunOptions, hashes: HashBook) -> None:
        self.staging = staging
        self.options = options
        self.hashes = hashes
        self.resumed = 0
        self._layouts: list[Layout] = []
        self._digests: dict[str, str] = {}
        self._computed = False

    def execute(self, plan: Plan, label: str) -> Execution:
        """Run one plan. The tensors of a plan at the top of the output become its recorded outputs."""
        execution = execute(plan, self.staging, self.options.settings, self.hashes, label)
        self.resumed += execution.resumed
        self._computed = self._computed or plan.computes
        if not plan.subfolder:
            self._layouts.append(plan.layout)
            self._digests |= execution.outputs
        return execution

    def execute_part(self, plan: Plan, label: str) -> Execution:
        """Run a plan whose tensors are not recorded as outputs: what lies in a folder of its own, or only looks."""
        execution = execute(plan, self.staging, self.options.settings, self.hashes, label)
        self.resumed += execution.resumed
        self._computed = self._computed or plan.computes
        return execution

    def finish_bare(self) -> None:
        """Rename the output to its target without a `surgery.json`: it is to hold nothing of ours."""
        self.staging.commit(self.options.overwrite)

    def finish(
        self,
        operation: str,
        options: DataclassInstance | Mapping[str, object],
        inputs: Sequence[Input],
        report: Mapping[str, object],
    ) -> None:
        """Write `surgery.json` and rename the output to its target."""
        weights = [file.name for layout in self._layouts for file in layout.files]
        files = hash_files(self.staging.files, weights) if self.hashes.enabled else {}
        described = [describe_input(item, self.hashes) for item in inputs]
        outputs = describe_outputs(self._layouts, self._digests)
        content = document(operation, options, described, outputs, files, report, self._computed)
        self.staging.write_file(FILE_NAME, content)
        self.staging.commit(self.options.overwrite)
        self._remember_outputs()

    def _remember_outputs(self) -> None:
        """What was just hashed while it was written need not be read again when it becomes an input."""
        for file in [file for layout in self._layouts for file in layout.files]:
            for name, tensor in open_checkpoint(self.staging.target / file.name).tensors.items():
                if name in self._digests:
                    self.hashes.put(tensor, self._digests[name])
        self.hashes.save()


@contextmanager
def staged(target: Path, plan: Plan, work: object, options: RunOptions) -> Iterator[Run]:
    """Stage an output whose first plan is `plan`; `work` is everything that tells this work from another."""
    hashes = HashBook(options.settings.hash, options.remember)
    fingerprint = plan.fingerprint((work, options.settings.device, options.settings.hash))
    with open_staging(target, fingerprint) as staging:
        staging.check_space(plan.write_bytes)
        yield Run(staging, options, hashes)


def config_bytes(config: Mapping[str, object]) -> bytes:
    """A config as transformers and PEFT write it: two spaces, keys sorted, a newline at the end."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def carried_files(checkpoint: Checkpoint, replaced: Collection[str] = ()) -> tuple[tuple[str, Source], ...]:
    """The files of an input to carry along, without those that the output replaces."""
    return tuple((name, checkpoint.folder.open(name)) for name in checkpoint.carried if name not in replaced)

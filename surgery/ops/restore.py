"""`restore BASE ADAPTER`: the fine-tune that an exact extraction was made from, every file of it, bit for bit.

What comes out is proved by the hashes of the fine-tune. Another base is known before any work by the beginnings of its
tensors; where it differs further on, or the record is damaged, the proof fails, and only then the whole base is hashed,
to say which. Nothing is added: the folder written holds what the fine-tune's folder held.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import FormatError, IntegrityError, OptionError
from surgery.hashing import hash_source
from surgery.operation import Run, RunOptions, check_paths, staged, summarise
from surgery.ops.exact import Origin, RestoreStep
from surgery.ops.exact_record import CODED, SAME, ExactRecord, file_source, open_exact, origins
from surgery.plan import CopyStep, Plan, Step, StepResult
from surgery.provenance import Input
from surgery.reports import RestoreReport
from surgery.source import FileSource

if TYPE_CHECKING:
    from surgery.execute import StepIO


def restore(
    base: Checkpoint, adapter: Adapter, output: str | os.PathLike[str], run_options: RunOptions
) -> RestoreReport:
    """Write the fine-tune that `adapter` was extracted from with `--exact` to the folder `output`.

    Raises `MismatchError` where `base` is not the base of that extraction, naming its tensors, and `IntegrityError`
    where anything else does not come out as it was.
    """
    inputs = (Input("base", base), Input("adapter", adapter.files))
    output = Path(output)
    check_paths(output, inputs, run_options.overwrite)
    if adapter.weight != 1.0:
        raise OptionError(f"{adapter.label} is given the weight {adapter.weight:g}; restoring takes it as it is.")
    record = open_exact(adapter)
    record.check_headers(base)
    base = replace(base, config=record.config)
    # The proof is in the hashes, so they are made whether or not they were asked for, and none is remembered.
    run_options = replace(run_options, settings=replace(run_options.settings, hash=True), remember=False)
    plan = _plan(base, adapter, record)
    summary = summarise([plan], output, run_options.settings)
    same = sum(entry.how == SAME for entry in record.entries.values())
    report = RestoreReport(str(output), summary, tuned=record.tuned_name, tensors=len(record.entries), same=same)
    if run_options.dry_run:
        return replace(report, dry_run=True)
    with staged(output, plan, ("restore", record.label), run_options) as run:
        record.check_adapter(adapter, run.hashes)
        record.check_beginnings(base)
        try:
            _check_tensors(record, run.execute(plan, "restoring").outputs)
        except IntegrityError:
            record.check_hashes(base, _hash_base(run, base, record))
            raise
        _check_files(run, record)
        run.finish_bare()
    files = sum(file.size for file in plan.layout.files) + sum(source.size for _, source in plan.carried)
    return replace(report, files=len(record.files) + len(plan.layout.files), nbytes=files, resumed=run.resumed)


@dataclass(frozen=True)
class HashStep(Step):
    """Finds out what a stored tensor hashes to."""

    tensor: StoredTensor

    @property
    def name(self) -> str:
        return f"hash {self.tensor.name}"

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return (self.tensor,)

    @property
    def computes(self) -> bool:
        return False

    @property
    def scratch(self) -> int:
        return 4 << 20

    def run(self, io: StepIO) -> StepResult:
        return StepResult({"blake3": io.hash(self.tensor)})


def _hash_base(run: Run, base: Checkpoint, record: ExactRecord) -> dict[str, str]:
    """The hash of every tensor of the base that is needed, read now, several at a time."""
    steps = {name: HashStep(base.tensors[name]) for name in record.base}
    found = run.execute_part(Plan(tuple(steps.values())), "checking the base").reports()
    digests = {name: str(found[step.name]["blake3"]) for name, step in steps.items()}
    for name, digest in digests.items():
        run.hashes.put(base.tensors[name], digest)
    return digests


def _plan(base: Checkpoint, adapter: Adapter, record: ExactRecord) -> Plan:
    specs = {name: entry.spec(name) for name, entry in record.entries.items()}
    names = {name: entry.origin for name, entry in record.entries.items() if entry.origin is not None}
    found = origins(base, adapter, specs, names)
    steps: list[Step] = []
    for file in record.layout.files:
        for info in file.entries:
            entry, spec = record.entries[info.name], specs[info.name]
            if entry.how == CODED:
                steps.append(RestoreStep(spec, found[info.name], record.parts[info.name]))
            else:
                literal = entry.how != SAME
                stored = record.parts[info.name] if literal else _same(record, info.name, found[info.name])
                steps.append(CopyStep(spec, stored))
    carried = tuple((name, file_source(record, base, name)) for name in record.files)
    return Plan(tuple(steps), record.layout, {}, carried)


def _same(record: ExactRecord, name: str, origin: Origin) -> StoredTensor:
    entry, source = record.entries[name], origin.source
    if source is None or (source.dtype.name, source.shape) != (entry.dtype, entry.shape):
        raise FormatError(f"{record.label} says that {name!r} equals {entry.origin!r}, which is not like it.")
    return source


def _check_tensors(record: ExactRecord, outputs: Mapping[str, str]) -> None:
    for name, entry in record.entries.items():
        if outputs.get(name) != entry.blake3:
            raise IntegrityError(
                f"Tensor {name!r} does not come out as it was in {record.tuned_name}: {record.label} was changed after "
                "the extraction; nothing is written, fetch the adapter again."
            )


def _check_files(run: Run, record: ExactRecord) -> None:
    for name, entry in record.files.items():
        if hash_source(FileSource(run.staging.files / name)) != entry.blake3:
            raise IntegrityError(
                f"File {name} does not come out as it was in {record.tuned_name}; nothing is written, fetch the "
                "adapter again."
            )

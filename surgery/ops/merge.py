"""`merge BASE ADAPTER...`: adapters added to the weights of a base, in one pass over its files.

Tensors that no adapter touches move as bytes. The others are read some rows at a time, changed in float32 and rounded
once (`deltas`). With `reversible` an undo record (`undo`, `record`) makes `subtract` exact; it does not change the
merged bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.dtypes import DType
from surgery.errors import OptionError
from surgery.hashing import hash_tensor
from surgery.layout import Layout, TensorSpec, lay_out
from surgery.operation import Run, RunOptions, carried_files, check_paths, config_bytes, staged, summarise
from surgery.ops.consequences import (
    TOKENIZER_FILES,
    notes_on,
    settle_task,
    settle_tying,
    settle_vocabulary,
    with_settings,
)
from surgery.ops.deltas import relative_change
from surgery.ops.fitting import Change, fit
from surgery.ops.kinship import refuse_by_hashes, refuse_by_probe
from surgery.ops.record import record_plan
from surgery.ops.undo import estimated_share
from surgery.ops.weights import TakeStep, Undo, WeightStep
from surgery.pairing import refuse_quantised
from surgery.plan import CopyStep, Plan, Step
from surgery.provenance import Input
from surgery.reports import MergeReport, WeightReport
from surgery.source import Source, read_bytes

_LABELS = {"merge": "merging", "subtract": "subtracting", "switch": "switching"}
# Where less of dW than this survives, merging did more harm than good.
_MOSTLY_LOST = 0.5
_LOST = (
    "Most of the change was lost to rounding: it is smaller than the spacing of the weights' dtype; keep the adapter "
    "unmerged, or merge it into a float32 base."
)


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How to merge.

    Attributes:
        reversible: write the record that makes `subtract` exact.
        shard_bytes: split the output into shards of at most this many bytes, instead of keeping the base's files.
        allow_nonfinite: let NaN and infinity pass.
        any_base: merge an adapter even if hashes prove that it was made for another base.
    """

    reversible: bool = False
    shard_bytes: int | None = None
    allow_nonfinite: bool = False
    any_base: bool = False

    def __post_init__(self) -> None:
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise OptionError(f"--shard-size is {self.shard_bytes} bytes, expected at least 1.")


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write.

    Attributes:
        plan: the weights, and the files beside them.
        changes: by stored name; also those that only take something out.
        replaced: files of the base that the output has in another form, with their bytes in the base.
        added_files: files that the output has and the base has not.
        notes: what the report should say about tying, tasks and vocabulary.
    """

    plan: Plan
    changes: Mapping[str, Change]
    replaced: Mapping[str, bytes]
    added_files: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def layout(self) -> Layout:
        return self.plan.layout


def merge(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    output: str | os.PathLike[str],
    options: MergeOptions,
    run_options: RunOptions,
) -> MergeReport:
    """Write `base` with `adapters` added, in the order given, as a checkpoint folder at `output`."""
    if not adapters:
        raise OptionError("No adapter is given; name at least one.")
    inputs = [Input("base", base), *(Input("adapter", adapter.files, adapter.weight) for adapter in adapters)]
    output = Path(output)
    check_paths(output, inputs, run_options.overwrite)
    check_reversible(options, run_options)
    merging = plan_merge(base, adapters, options)
    if not options.any_base:
        refuse_by_probe(base, adapters, merging.changes)
    summary = summarise([merging.plan], output, run_options.settings)
    if run_options.dry_run:
        return MergeReport(str(output), summary, notes=merging.notes, dry_run=True)
    work = ("merge", options, [adapter.weight for adapter in adapters])
    with staged(output, merging.plan, work, run_options) as run:
        return run_merge(run, "merge", base, adapters, merging, options, inputs)


def check_reversible(options: MergeOptions, run_options: RunOptions) -> None:
    """Refuse an undo record without hashes."""
    if options.reversible and not run_options.settings.hash:
        raise OptionError("--no-hash and --reversible exclude each other: the record proves the base by its hashes.")


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    options: MergeOptions,
    undo: Mapping[str, Undo] | None = None,
) -> MergePlan:
    """Plan the addition of `adapters` to `base`.

    Args:
        base: what is added to; for `subtract` and `switch`, a view of the merged checkpoint as its base.
        adapters: those to add, in order; may be none.
        options: see `MergeOptions`.
        undo: by stored name, what is to be taken out of a tensor first.
    """
    refuse_quantised(base)
    undo = undo or {}
    base_hash = _base_hash(undo)
    changes, tying, notes = settle_tying(base, adapters, fit(base, adapters, base_hash), base_hash)
    notes += notes_on(base, adapters, changes)
    vocabulary = settle_vocabulary(base, changes)
    task, task_notes = settle_task(base, adapters, changes)
    settings = {**tying, **vocabulary, **task}
    specs, steps = [], {}
    dtype = _main_dtype(base)
    for name in dict.fromkeys([*base.tensors, *changes]):
        change = changes.get(name)
        spec = _spec(name, base.tensors.get(name), change, dtype)
        specs.append(spec)
        steps[name] = _step(spec, base, change, undo, options)
    layout = lay_out(base, specs, options.shard_bytes)
    ordered = tuple(steps[info.name] for file in layout.files for info in file.entries)
    tokenizer = dict(_tokenizer(adapters)) if vocabulary else {}
    files: dict[str, bytes] = {}
    if settings and base.config:
        files["config.json"] = config_bytes(with_settings(base.config, settings))
    replaced = {name: _whole_file(base, name) for name in (*files, *tokenizer) if name in base.carried}
    carried = (*carried_files(base, {*files, *tokenizer}), *tokenizer.items())
    spare = sum(_record_bytes(steps[name], base) for name in changes) if options.reversible else 0
    plan = Plan(ordered, layout, files, carried, spare)
    added = tuple(name for name in tokenizer if name not in base.carried)
    return MergePlan(plan, changes, replaced, added, (*notes, *task_notes))


def _spec(name: str, base: StoredTensor | None, change: Change | None, dtype: DType) -> TensorSpec:
    """What is stored under a name: the base's dtype, and the shape of what an adapter may have put in its place."""
    if change is None:
        assert base is not None
        return TensorSpec.like(base)
    fallback = dtype if change.start.dtype.arithmetic else change.start.dtype
    return TensorSpec(name, base.dtype if base is not None else fallback, change.start.shape)


def _main_dtype(base: Checkpoint) -> DType:
    """The dtype that holds most of the base's bytes: what a new tensor is stored in."""
    sizes: dict[DType, int] = {}
    for tensor in base.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype.order))


def _base_hash(undo: Mapping[str, Undo]) -> Callable[[StoredTensor], str]:
    """The hash of a tensor of the base, from the undo record where the base is still to be restored."""

    @cache
    def of(tensor: StoredTensor) -> str:
        known = undo[tensor.name].hash if tensor.name in undo else None
        return known or hash_tensor(tensor)

    return of


def _step(
    spec: TensorSpec, base: Checkpoint, change: Change | None, undo: Mapping[str, Undo], options: MergeOptions
) -> Step:
    start = base.tensors[spec.name] if change is None else change.start
    blocks, rows = ((), ()) if change is None else (change.blocks, change.rows)
    is_base = base.tensors.get(start.name) is start  # else an adapter brings it
    removed = undo.get(start.name) if is_base else None
    if blocks or rows or removed is not None:
        record = options.reversible and change is not None and start is change.base
        return WeightStep(spec, start, blocks, rows, removed, record, options.allow_nonfinite)
    return CopyStep(spec, start) if is_base else TakeStep(spec, start, options.allow_nonfinite)


def _tokenizer(adapters: Sequence[Adapter]) -> tuple[tuple[str, Source], ...]:
    """The tokenizer files of the adapter that resized the vocabulary: of the last one that has any."""
    for adapter in reversed(adapters):
        names = [name for name in adapter.files.carried if name.startswith(TOKENIZER_FILES)]
        if names:
            return tuple((name, adapter.files.folder.open(name)) for name in names)
    return ()


def _whole_file(base: Checkpoint, name: str) -> bytes:
    source = base.folder.open(name)
    return read_bytes(source, 0, source.size)


def _record_bytes(step: Step, base: Checkpoint) -> int:
    """What the undo record of a changed tensor will take, from the size of the change; a literal copy otherwise."""
    original = base.tensors.get(step.name)
    if original is None:
        return 0
    if not isinstance(step, WeightStep) or not step.record:
        return original.nbytes
    change = relative_change(original, step.blocks) if step.blocks else 1.0
    return math.ceil(estimated_share(change, original.dtype.bits // 8) * original.nbytes)


def run_merge(
    run: Run,
    operation: str,
    base: Checkpoint,
    adapters: Sequence[Adapter],
    merging: MergePlan,
    options: MergeOptions,
    inputs: Sequence[Input],
    removal: Removed | None = None,
) -> MergeReport:
    """Run a planned merge, write its record, and finish the output. `removal` says what was taken out first."""
    execution = run.execute(merging.plan, _LABELS[operation])
    if removal is None and not options.any_base:
        refuse_by_hashes(base, adapters, merging.changes, run.hashes)
    if removal is not None:
        removal.check(execution.outputs, merging.changes)
    record_bytes = 0
    if options.reversible:
        digests = removal.digests if removal is not None else {}
        plan = record_plan(run, base, adapters, merging, digests)
        run.execute(plan, "writing the undo record")
        record_bytes = plan.write_bytes
    report = _report(run, merging, execution.reports(), record_bytes)
    if removal is not None:
        report = removal.add_to(report, execution.reports())
    run.finish(operation, options, inputs, report.numbers())
    return report


class Removed(Protocol):
    """What `subtract` and `switch` know of what they took out."""

    @property
    def digests(self) -> Mapping[str, str]:
        """The base's hash of each of its tensors; empty where they are not known."""
        ...

    def check(self, outputs: Mapping[str, str], changes: Mapping[str, Change]) -> None:
        """Raise `IntegrityError` unless every output tensor that nothing was added to is the base's."""
        ...

    def add_to(self, report: MergeReport, found: Mapping[str, Mapping[str, object]]) -> MergeReport:
        """The report with what was removed and how exactly."""
        ...


def _report(run: Run, merging: MergePlan, found: Mapping[str, Mapping[str, object]], record_bytes: int) -> MergeReport:
    weights = []
    totals = {"energy": 0.0, "lost": 0.0, "same": 0.0, "count": 0.0}
    for name, numbers in found.items():
        values = {key: float(value) for key, value in numbers.items() if isinstance(value, int | float)}
        if "energy" not in values or "count" not in values:
            continue
        weights.append(WeightReport(name, *_kept(values)))
        totals = {key: totals[key] + values[key] for key in totals}
    survived, unchanged_share = _kept(totals) if totals["count"] else (None, 0.0)
    plan = merging.plan
    return MergeReport(
        output=str(run.staging.target),
        plan=summarise([plan], run.staging.target, run.options.settings),
        weights=tuple(weights),
        survived=survived,
        unchanged_share=unchanged_share,
        replaced=tuple(n for n, c in merging.changes.items() if c.base is not None and c.start is not c.base),
        added=tuple(n for n, c in merging.changes.items() if c.base is None),
        copied=sum(isinstance(step, CopyStep) for step in plan.steps),
        nbytes=plan.layout.nbytes,
        record_bytes=record_bytes,
        notes=(*merging.notes, *([_LOST] if survived is not None and survived < _MOSTLY_LOST else [])),
        resumed=run.resumed,
    )


def _kept(values: Mapping[str, float]) -> tuple[float | None, float]:
    """The share of dW that survived the rounding, and the share of weights that it left as they were."""
    survived = 1 - math.sqrt(values["lost"] / values["energy"]) if values["energy"] else None
    return survived, values["same"] / values["count"]

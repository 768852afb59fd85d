"""`subtract` and `switch`: adapters taken out of merged weights, and others put in, in one pass.

With the undo record of a reversible merge the base comes back to the bit, proved by its hashes, and whatever is added
is added to the base itself. Without it, dW is subtracted in float32: what the merge's rounding took is not known any
more, and the report says how much that may be.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint
from surgery.errors import InputError, IntegrityError, MismatchError, UnsupportedError, several
from surgery.hashing import HashBook
from surgery.operation import RunOptions, check_paths, staged, summarise
from surgery.ops.fitting import Change, fit
from surgery.ops.merge import MergeOptions, MergePlan, check_reversible, plan_merge, run_merge
from surgery.ops.record import Record, has_record, open_record
from surgery.ops.weights import Undo
from surgery.provenance import Input, read_provenance
from surgery.reports import MergeReport


@dataclass(frozen=True)
class _Removal:
    """What is taken out of a merged checkpoint, and how exactly.

    Attributes:
        base: the base as seen through the merged checkpoint.
        undo: for each changed tensor how to restore it.
        removed, adding: the adapters that go, and those that are merged into the base: what stays, and what is new.
        record: the undo record, or None where the removal is approximate.
        digests: the base's hashes, from the record.
        notes: what the report should say about the removal.
    """

    base: Checkpoint
    undo: Mapping[str, Undo]
    removed: tuple[Adapter, ...]
    adding: tuple[Adapter, ...] = ()
    record: Record | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def check(self, outputs: Mapping[str, str], changes: Mapping[str, Change]) -> None:
        """Every tensor that nothing was added to must have the base's hash."""
        for name, digest in self.digests.items():
            if name not in changes and outputs.get(name) != digest:
                raise IntegrityError(
                    f"Tensor {name!r} of {self.base.label} is not the base's: it was changed after the merge; "
                    "nothing is written."
                )

    def add_to(self, report: MergeReport, found: Mapping[str, Mapping[str, object]]) -> MergeReport:
        rounding = math.fsum(float(str(one["rounding"])) for one in found.values() if "rounding" in one)
        norm = math.fsum(float(str(one["norm"])) for one in found.values() if "norm" in one)
        return replace(
            report,
            notes=(*self.notes, *report.notes),
            exact=self.record is not None,
            removed=_names(self.removed),
            holds=_names(self.adding) if self.record is not None else (),
            expected_error=math.sqrt(rounding / norm) if norm and self.record is None else None,
        )


def _names(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    return tuple(adapter.files.provenance["source"] for adapter in adapters)


def subtract(
    merged: Checkpoint,
    adapters: Sequence[Adapter],
    output: str | os.PathLike[str],
    options: MergeOptions,
    run_options: RunOptions,
    keep_reversible: bool = True,
) -> MergeReport:
    """Write `merged` without `adapters`, or without any where none is named and there is an undo record.

    With `keep_reversible`, what stays merged gets an undo record again if it had one.
    """
    return _replace("subtract", merged, adapters, (), output, options, run_options, keep_reversible)


def switch(
    merged: Checkpoint,
    old: Adapter,
    new: Adapter,
    output: str | os.PathLike[str],
    options: MergeOptions,
    run_options: RunOptions,
    keep_reversible: bool = True,
) -> MergeReport:
    """Write `merged` with `old` taken out and `new` put in, in one pass."""
    return _replace("switch", merged, (old,), (new,), output, options, run_options, keep_reversible)


def _replace(
    operation: str,
    merged: Checkpoint,
    old: Sequence[Adapter],
    new: Sequence[Adapter],
    output: str | os.PathLike[str],
    options: MergeOptions,
    run_options: RunOptions,
    keep_reversible: bool,
) -> MergeReport:
    given = [Input("adapter", adapter.files, adapter.weight) for adapter in (*old, *new)]
    inputs = [Input("merged", merged), *given]
    output = Path(output)
    check_paths(output, inputs, run_options.overwrite)
    if has_record(merged):
        removal = _exact(merged, old)
        # The proof is in the hashes, so they are made whether or not they were asked for, and none is remembered.
        run_options = replace(run_options, settings=replace(run_options.settings, hash=True), remember=False)
        removal = replace(removal, adding=(*removal.adding, *new))
        options = replace(options, reversible=bool(removal.adding) and (options.reversible or keep_reversible))
    else:
        removal = replace(_approximate(merged, old), adding=tuple(new))
    check_reversible(options, run_options)
    merging = plan_merge(removal.base, removal.adding, options, removal.undo)
    _check_literals(removal, merging, options)
    summary = summarise([merging.plan], output, run_options.settings)
    if run_options.dry_run:
        return MergeReport(str(output), summary, notes=merging.notes, dry_run=True, exact=removal.record is not None)
    work = (operation, options, [adapter.weight for adapter in (*old, *new)])
    with staged(output, merging.plan, work, run_options) as run:
        return run_merge(run, operation, removal.base, removal.adding, merging, options, inputs, removal)


def _exact(merged: Checkpoint, old: Sequence[Adapter]) -> _Removal:
    """Restore the base by its record; of the merged adapters, put those back that are not to go."""
    record = open_record(merged)
    base = record.base_view(merged)
    fitted = fit(base, record.adapters, lambda tensor: record.hash(tensor.name))
    blocks = {name: change.blocks for name, change in fitted.items()}
    undo = {name: record.undo(name, blocks.get(name, ())) for name, how in record.restored.items() if how == "record"}
    going = _identify(merged, record, old) if old else set(range(len(record.adapters)))
    removed = tuple(adapter for number, adapter in enumerate(record.adapters) if number in going)
    kept = tuple(adapter for number, adapter in enumerate(record.adapters) if number not in going)
    return _Removal(base, undo, removed, kept, record, {name: record.hash(name) for name in record.tensors})


def _identify(merged: Checkpoint, record: Record, old: Sequence[Adapter]) -> set[int]:
    """Which of the record's adapters the given ones are, by the bytes of their tensors."""
    hashes = HashBook()
    contents = [_content(adapter, hashes) for adapter in record.adapters]
    found: set[int] = set()
    problems = []
    for adapter in old:
        content = _content(adapter, hashes)
        number = next((n for n in range(len(contents)) if contents[n] == content and n not in found), None)
        if number is None:
            names = ", ".join(known.files.provenance["source"] for known in record.adapters)
            problems.append(f"{adapter.label} is not among the adapters merged into {merged.label}: {names}.")
        elif adapter.weight not in (1.0, record.adapters[number].weight):
            problems.append(
                f"{adapter.label} was merged with weight {record.adapters[number].weight:g}, not {adapter.weight:g}; "
                "leave the weight out."
            )
        else:
            found.add(number)
    if problems:
        raise MismatchError(several(merged.label, problems), problems)
    return found


def _content(adapter: Adapter, hashes: HashBook) -> dict[str, str]:
    return {name: hashes.require(tensor) for name, tensor in adapter.files.tensors.items()}


def _approximate(merged: Checkpoint, old: Sequence[Adapter]) -> _Removal:
    """Subtract dW in float32. What only a record can restore is refused, all of it by name."""
    if not old:
        raise InputError(
            f"{merged.label} has no undo record (it was not merged with --reversible); name the adapters to take out."
        )
    problems = []
    undo = {}
    for name, change in fit(merged, old).items():
        if any(contribution.is_dora for block in change.blocks for contribution in block.contributions):
            problems.append(f"{name!r} was rescaled by DoRA, whose norms only an undo record holds.")
        elif change.rows or change.start is not change.base:
            problems.append(f"{name!r} was replaced whole, and only an undo record holds what was there before.")
        else:
            undo[name] = Undo(change.blocks)
    if problems:
        what = f"the adapters cannot be taken out of {merged.label}; merge with --reversible"
        raise UnsupportedError(several(what, problems), problems)
    return _Removal(merged, undo, tuple(old), notes=tuple(_evidence(merged, old)))


def _evidence(merged: Checkpoint, old: Sequence[Adapter]) -> list[str]:
    """Notes on adapters of which nothing shows that they were merged. Raises where `surgery.json` shows otherwise."""
    content = read_provenance(merged.folder)
    if content is None or content.get("operation") != "merge":
        return [
            f"Nothing shows that {adapter.label} was ever merged into {merged.label}; the result is the one minus the "
            "other."
            for adapter in old
        ]
    inputs = content.get("inputs")
    recorded = [
        item for item in (inputs if isinstance(inputs, list) else []) if isinstance(item, dict) and item.get("tensors")
    ]
    merged_ones = [item for item in recorded if item.get("role") == "adapter"]
    if not merged_ones:
        return []  # without hashes nothing can be told
    hashes = HashBook()
    problems = []
    for adapter in old:
        mine = _content(adapter, hashes)
        known = [item for item in merged_ones if _recorded_content(item) == mine]
        weights = {item.get("weight") for item in known}
        if not known:
            names = ", ".join(str(item.get("source")) for item in merged_ones)
            problems.append(f"{adapter.label} is not what was merged into {merged.label}: {names}; name that.")
        elif adapter.weight not in weights:
            found = " or ".join(f"{weight}" for weight in weights)
            problems.append(
                f"{adapter.label} was merged into {merged.label} with weight {found}, not {adapter.weight:g}; write "
                f"{adapter.label}={found}."
            )
    if problems:
        raise MismatchError(several(merged.label, problems), problems)
    return []


def _recorded_content(item: Mapping[str, object]) -> dict[str, object]:
    tensors = item.get("tensors")
    listed = tensors.items() if isinstance(tensors, dict) else ()
    return {name: entry.get("blake3") for name, entry in listed if isinstance(entry, dict)}


def _check_literals(removal: _Removal, merging: MergePlan, options: MergeOptions) -> None:
    """A new record may have to hold a base tensor literally that exists only as a merged tensor and an old record."""
    for name, change in merging.changes.items():
        literal = change.base is not None and change.start is not change.base
        if options.reversible and literal and name in removal.undo:
            raise UnsupportedError(
                f"{name!r} is to be replaced whole, and its base is in the undo record only; subtract, then merge."
            )

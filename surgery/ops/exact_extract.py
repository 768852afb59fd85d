"""`extract --exact`: the record that gives the fine-tune back, made beside an adapter that has just been written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from surgery.adapter import Adapter, read_adapter
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.dtypes import U8
from surgery.errors import UnsupportedError
from surgery.folder import LocalFolder
from surgery.hashing import hash_source
from surgery.layout import TensorSpec, single_file
from surgery.operation import Run
from surgery.ops.deltas import PlainReader
from surgery.ops.exact import ResidualStep, is_coded
from surgery.ops.exact_record import (
    CODED,
    FOLDER,
    LITERAL,
    SAME,
    Entry,
    FileEntry,
    counterparts,
    origins,
    record_bytes,
)
from surgery.ops.residual import EXPONENT_BITS, estimate
from surgery.plan import CopyStep, Plan
from surgery.reports import ExactReport, ExactTensor
from surgery.source import Source
from surgery.writer import PartSource

# Samples of each tensor that a dry run reads.
_PROBED_ELEMENTS = 1 << 16


def check_exact(tuned: Checkpoint) -> None:
    """Raise `UnsupportedError` for a fine-tune whose files cannot be written again."""
    if tuned.weights.pickled:
        raise UnsupportedError(
            f"{tuned.label} has its weights in {tuned.weights.names[0]}; --exact restores safetensors files only, "
            "save the fine-tune as safetensors first."
        )


class _StagedFolder(LocalFolder):
    """The output under way. Its files move at the end, so nothing is remembered of where they are now."""

    def open(self, name: str) -> PartSource:
        return PartSource(self.path / name)


@dataclass(frozen=True)
class _Files:
    """The fine-tune's files beside its weights: those to keep, what is on record of all, and what is left out."""

    kept: Mapping[str, Source]
    entries: Mapping[str, FileEntry]
    notes: tuple[str, ...]


def add_exact(run: Run, base: Checkpoint, tuned: Checkpoint) -> ExactReport:
    """Write `exact/` into an output whose adapter is in place."""
    if not base.config:  # a lone file is read as what the other one is
        base = replace(base, config=tuned.config)
    adapter = read_adapter(_StagedFolder(run.staging.files))
    names = counterparts(base, tuned, adapter)
    coded = {name: tensor for name, tensor in tuned.tensors.items() if is_coded(tensor)}
    found = origins(base, adapter, coded, names)
    run.execute_part(Plan(tuple(ResidualStep(tensor, found[name]) for name, tensor in coded.items())), "coding")
    steps: list[CopyStep] = []
    entries: dict[str, Entry] = {}
    for name, tensor in tuned.tensors.items():
        part = run.staging.read_part(f"residual {name}").get("code") if name in coded else None
        how = CODED if part is not None else SAME if name in coded else LITERAL
        stored = part if part is not None else tensor if how == LITERAL else None
        if stored is not None:
            dtype = U8 if part is not None else tensor.dtype
            steps.append(CopyStep(TensorSpec(f"{FOLDER}/{name}", dtype, stored.shape), stored))
        digest = run.hashes.require(tensor)
        origin = names.get(name) if name in found and found[name].source is not None else None
        entries[name] = Entry(tensor.dtype.name, tensor.shape, digest, how, origin)
    files = _files(base, tuned)
    plan = _record_plan(run, base, tuned, adapter, steps, entries, files)
    run.staging.check_space(plan.write_bytes)
    run.execute_part(plan, "writing the record")
    return _report(run, tuned, entries, steps, files)


def _record_plan(
    run: Run,
    base: Checkpoint,
    tuned: Checkpoint,
    adapter: Adapter,
    steps: list[CopyStep],
    entries: Mapping[str, Entry],
    files: _Files,
) -> Plan:
    layout = single_file("record.safetensors", [step.output for step in steps], {})
    order = {step.output.name: step for step in steps}
    contents = {f"{FOLDER}/headers/{shard.name}": shard.header.raw for shard in tuned.shards}
    contents[f"{FOLDER}/record.json"] = record_bytes(base, tuned, entries, adapter, files.entries, run.hashes)
    carried = tuple((f"{FOLDER}/files/{name}", source) for name, source in files.kept.items())
    ordered = tuple(order[info.name] for file in layout.files for info in file.entries)
    return Plan(ordered, layout, contents, carried, subfolder=f"{FOLDER}/")


def _files(base: Checkpoint, tuned: Checkpoint) -> _Files:
    """Everything in the folder of a fine-tune but its shards; what the base has byte for byte is not kept again."""
    if tuned.path is not None and not tuned.path.is_dir():
        return _Files({}, {}, ())
    kept: dict[str, Source] = {}
    entries: dict[str, FileEntry] = {}
    notes = []
    bases = set(base.folder.names()) if base.path is None or base.path.is_dir() else set()
    for name in tuned.folder.names():
        if name in tuned.weights.names:
            continue
        if isinstance(tuned.folder, LocalFolder) and not tuned.folder.stays_inside(name):
            notes.append(f"{name} of {tuned.label} is a link that leads out of its folder; it is not on record.")
            continue
        source = tuned.folder.open(name)
        digest = hash_source(source)
        twin = base.folder.open(name) if name in bases else None
        in_base = twin is not None and twin.size == source.size and hash_source(twin) == digest
        entries[name] = FileEntry(digest, in_base)
        if not in_base:
            kept[name] = source
    notes += [
        f"The folder {name}/ of {tuned.label} is not on record." for name in ("undo", "exact") if tuned.record(name)
    ]
    return _Files(kept, entries, tuple(notes))


def _report(
    run: Run, tuned: Checkpoint, entries: Mapping[str, Entry], steps: list[CopyStep], files: _Files
) -> ExactReport:
    sizes = {step.output.name.removeprefix(f"{FOLDER}/"): step.output.nbytes for step in steps}
    place = run.staging.files
    adapter = sum(path.stat().st_size for path in place.iterdir() if path.is_file())
    record = sum(path.stat().st_size for path in (place / FOLDER).rglob("*") if path.is_file())
    whole = sum(shard.source.size for shard in tuned.shards)
    whole += sum(tuned.folder.open(name).size for name in files.entries)
    return ExactReport(
        adapter_bytes=adapter,
        residual_bytes=sum(sizes.values()),
        record_bytes=record,
        tuned_bytes=whole,
        ratio=(adapter + record) / whole,
        tensors=tuple(
            ExactTensor(name, entry.how, sizes.get(name, 0), tuned.tensors[name].nbytes)
            for name, entry in entries.items()
        ),
        notes=files.notes,
    )


# Estimates ------------------------------------------------------------------------------------------------------------


def estimate_exact(base: Checkpoint, tuned: Checkpoint) -> int:
    """Bytes that the record takes at most, about, from samples: as if the adapter predicted nothing."""
    total = 0.0
    for name, tensor in tuned.tensors.items():
        source = base.tensors.get(name)
        alike = source is not None and source.shape == tensor.shape and source.dtype == tensor.dtype
        share = 1.0
        if is_coded(tensor) and alike and source is not None:
            share = _estimated_share(source, tensor)
        total += share * tensor.nbytes
    return math.ceil(total)


def _estimated_share(source: StoredTensor, tensor: StoredTensor) -> float:
    """What share of a tensor's bytes its code takes, from some rows in the middle."""
    count = min(tensor.numel, _PROBED_ELEMENTS)
    first = (tensor.numel - count) // 2
    width = tensor.dtype.bits // 8
    reader = PlainReader()
    pieces = [
        reader.read(replace(one, dtype=U8, shape=(count * width,), offset=one.offset + first * width))
        .numpy()
        .view(f"u{width}")
        for one in (source, tensor)
    ]
    return min(1.0, estimate(pieces[0], pieces[1], EXPONENT_BITS.get(tensor.dtype.name, 0)) / (count * width))

"""The undo record on disk, in `undo/` of a reversibly merged checkpoint: enough to give back the base's exact bits.

    undo/record.json           what was merged, how each changed tensor is restored, and the base's hashes
    undo/record.safetensors    `<tensor>/gaps`, `<tensor>/bits`, `<tensor>/factor.N` (see `undo`), `<tensor>/base`
    undo/adapters/N/           byte copies of the adapters
    undo/files/                the base's own form of the files that the merge replaced
    undo/headers/              the headers of the base's files, where the merged ones are laid out in another way

It lies in a folder of its own, so that no loader takes it for weights of the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from surgery.adapter import Adapter, open_adapter
from surgery.checkpoint import Checkpoint, Shard, StoredTensor
from surgery.dtypes import BY_NAME
from surgery.errors import FormatError, InputError
from surgery.folder import LocalFolder, Overlay, WeightFiles, read_json
from surgery.header import parse_header, read_header
from surgery.layout import Layout, TensorSpec, single_file
from surgery.ops.fitting import Block, Change
from surgery.ops.weights import Undo
from surgery.plan import CopyStep, Plan
from surgery.provenance import describe_tensor
from surgery.source import BytesSource, FileSource, read_bytes

if TYPE_CHECKING:
    from surgery.operation import Run

FOLDER = "undo"
SCHEMA = 1


class Merged(Protocol):
    """What a record needs to know of a planned merge (`merge.MergePlan`)."""

    @property
    def changes(self) -> Mapping[str, Change]: ...
    @property
    def replaced(self) -> Mapping[str, bytes]: ...
    @property
    def added_files(self) -> tuple[str, ...]: ...
    @property
    def layout(self) -> Layout: ...


def record_plan(
    run: Run, base: Checkpoint, adapters: Sequence[Adapter], merged: Merged, digests: Mapping[str, str]
) -> Plan:
    """The plan that gathers the record: what the merge steps left, literal copies, the adapters, the index of it all.

    `digests` are the hashes of base tensors whose stored bytes are not the base's; the others are hashed as they lie.
    """
    steps: list[CopyStep] = []
    restored: dict[str, str] = {}
    for name, change in merged.changes.items():
        if change.base is None:
            restored[name] = "added"
            continue
        parts = run.staging.read_part(name)
        restored[name] = "record" if parts else "literal"
        found = parts or {"base": change.base}
        steps += [CopyStep(TensorSpec(f"{name}/{part}", t.dtype, t.shape), t) for part, t in found.items()]
    tensors: dict[str, object] = {
        name: describe_tensor(tensor, digests.get(name) or run.hashes.require(tensor))
        for name, tensor in base.tensors.items()
    }
    headers, index = _lost_layout(base, merged.layout)
    replaced = {**merged.replaced, **index}
    content = {
        "schema": SCHEMA,
        "adapters": [
            {"folder": f"adapters/{number}", "weight": adapter.weight, **adapter.files.provenance}
            for number, adapter in enumerate(adapters)
        ],
        "restored": restored,
        "replaced_files": sorted(replaced),
        "added_files": sorted(merged.added_files),
        "shards": {shard.name: shard.header.data_size for shard in base.shards},
        "index": base.weights.index,
        "headers": sorted(headers),
        "tensors": tensors,
    }
    files = {f"{FOLDER}/files/{name}": data for name, data in replaced.items()}
    files |= {f"{FOLDER}/headers/{name}": data for name, data in headers.items()}
    files[f"{FOLDER}/record.json"] = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(
        errors="backslashreplace"
    )
    carried = [
        (f"{FOLDER}/adapters/{number}/{name}", adapter.files.folder.open(name))
        for number, adapter in enumerate(adapters)
        for name in (*adapter.files.weights.names, "adapter_config.json")
    ]
    record = single_file("record.safetensors", [step.output for step in steps], {})
    order = {step.output.name: step for step in steps}
    ordered = tuple(order[info.name] for file in record.files for info in file.entries)
    return Plan(ordered, record, files, tuple(carried), subfolder=f"{FOLDER}/")


def _lost_layout(base: Checkpoint, layout: Layout) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The headers of the base's shards and its index, where the output is laid out in another way; else nothing."""
    if [(f.name, f.raw_header) for f in layout.files] == [(s.name, s.header.raw) for s in base.shards]:
        return {}, {}
    index = base.weights.index if base.shards else None
    source = base.folder.open(index) if index is not None else None
    found = {} if index is None or source is None else {index: read_bytes(source, 0, source.size)}
    return {shard.name: shard.header.raw for shard in base.shards}, found


@dataclass(frozen=True)
class Record:
    """An undo record, opened.

    Attributes:
        adapters: those that were merged, in order, with their weights.
        restored: for each changed tensor how it is restored: `record`, `literal` (its bytes are kept), `added`.
        parts: the record's tensors, by tensor name and part.
        tensors: dtype, shape and hash of every tensor of the base.
        files: the base's form of the files that the merge replaced.
        added_files: files that the base does not have.
        headers: of the base's shards, with the bytes of data they describe, where the merged checkpoint is laid out in
            another way.
        index: the name of the base's shard index.
    """

    adapters: tuple[Adapter, ...]
    restored: Mapping[str, str]
    parts: Mapping[str, Mapping[str, StoredTensor]]
    tensors: Mapping[str, Mapping[str, object]]
    files: Mapping[str, bytes]
    added_files: tuple[str, ...]
    headers: Mapping[str, tuple[bytes, int]]
    index: str | None

    def hash(self, name: str) -> str:
        """The base's hash of a tensor."""
        value = self.tensors[name].get("blake3")
        if not isinstance(value, str):
            raise FormatError(f"The undo record has no hash of tensor {name!r}.")
        return value

    def undo(self, name: str, blocks: tuple[Block, ...]) -> Undo:
        """How to restore a tensor whose record is not literal."""
        return Undo(blocks, self.parts.get(name, {}), self.hash(name))

    def base_view(self, merged: Checkpoint) -> Checkpoint:
        """The base as seen through the merged checkpoint: its names, shapes and config.

        A changed tensor still has the merged bytes; one that is kept literally has the base's.
        """
        tensors: dict[str, StoredTensor] = {}
        for name, expected in self.tensors.items():
            found = self.parts[name]["base"] if self.restored.get(name) == "literal" else merged.tensors.get(name)
            shape = expected.get("shape")
            if found is None or found.dtype.name != expected.get("dtype") or list(found.shape) != shape:
                raise InputError(
                    f"{merged.label}: tensor {name!r} is not as its undo record says; it was changed after the merge."
                )
            tensors[name] = replace(found, name=name)
        extra = [name for name in merged.tensors if name not in self.tensors and self.restored.get(name) != "added"]
        if extra:
            raise InputError(
                f"{merged.label}: tensor {extra[0]!r} is not in its undo record; it was added after the merge."
            )
        config = merged.config
        if "config.json" in self.files:
            config = json.loads(self.files["config.json"])
        carried = tuple(name for name in merged.carried if name not in self.added_files)
        view = replace(merged, tensors=tensors, config=config, carried=carried)
        view = replace(view, folder=Overlay(merged.folder, self.files, self.added_files))
        return self._base_layout(view) if self.headers else view

    def _base_layout(self, view: Checkpoint) -> Checkpoint:
        """The view with the base's own files in the place of those of the merged checkpoint."""
        shards = []
        for name, (raw, size) in self.headers.items():
            shards.append(Shard(name, BytesSource(name, raw), parse_header(raw, size, f"undo/headers/{name}")))
        weights = WeightFiles(tuple(self.headers), self.index, view.weights.stem, pickled=False)
        return replace(view, shards=tuple(shards), weights=weights)


def has_record(merged: Checkpoint) -> bool:
    """Whether a checkpoint was merged reversibly."""
    return "record.json" in merged.record(FOLDER)


def open_record(merged: Checkpoint) -> Record:
    """Open the undo record of a merged checkpoint. Raises `FormatError` for one that cannot be used."""
    folder = merged.folder.subfolder(FOLDER)
    place = folder.path
    content = read_json(folder.open("record.json"))
    label = f"{place}/record.json"
    if content.get("schema") != SCHEMA:
        raise FormatError(f"{label} has schema {content.get('schema')!r}, expected {SCHEMA}; use a newer version.")
    restored, tensors, listed = (content.get(key) for key in ("restored", "tensors", "adapters"))
    replaced, added, shards = (content.get(key) for key in ("replaced_files", "added_files", "shards"))
    headers, index = content.get("headers"), content.get("index")
    if not (
        isinstance(restored, dict)
        and isinstance(tensors, dict)
        and all(isinstance(entry, dict) and entry.get("dtype") in BY_NAME for entry in tensors.values())
        and isinstance(listed, list)
        and all(isinstance(item, dict) for item in listed)
        and all(isinstance(items, list) for items in (replaced, added, headers))
        and isinstance(shards, dict)
        and all(isinstance(size, int) for size in shards.values())
        and (index is None or isinstance(index, str))
    ):
        raise FormatError(f"{label} is not an undo record: an entry is missing or of another kind.")
    adapters = tuple(_adapter(folder, item, label) for item in listed)
    source = FileSource(place / "record.safetensors")
    header = read_header(source)
    parts: dict[str, dict[str, StoredTensor]] = {}
    for info in header.tensors:
        name, _, part = info.name.rpartition("/")
        parts.setdefault(name, {})[part] = StoredTensor(
            info.name, info.dtype, info.shape, source, header.data_start + info.begin
        )
    lacking = [n for n, how in restored.items() if how != "added" and (n not in parts or n not in tensors)]
    lacking += [n for n, how in restored.items() if how == "literal" and "base" not in parts.get(n, {})]
    if lacking:
        raise FormatError(f"{place} says nothing about how to restore tensor {lacking[0]!r}.")
    assert isinstance(replaced, list)
    assert isinstance(added, list)
    return Record(
        adapters=adapters,
        restored=restored,
        parts=parts,
        tensors=tensors,
        files={str(name): _file(folder, "files", str(name)) for name in replaced},
        added_files=tuple(str(name) for name in added),
        headers={n: (_file(folder, "headers", n), size) for n, size in shards.items()} if headers else {},
        index=index,
    )


def _adapter(folder: LocalFolder, item: Mapping[str, object], label: str) -> Adapter:
    place, weight = item.get("folder"), item.get("weight")
    if not isinstance(place, str) or not place.startswith("adapters/") or not place[9:].isdigit():
        raise FormatError(f"{label} names the adapter folder {place!r}, expected adapters/N.")
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        raise FormatError(f"{label} gives an adapter the weight {weight!r}, expected a number.")
    found = open_adapter(folder.path / place, float(weight))
    source = item.get("source")
    provenance = {"source": source if isinstance(source, str) else place}
    return replace(found, files=replace(found.files, provenance=provenance))


def _file(folder: LocalFolder, kind: str, name: str) -> bytes:
    if "/" in name or name in ("", ".", ".."):
        raise FormatError(f"{folder.label} names the file {name!r}, outside its folder.")
    source = folder.open(f"{kind}/{name}")
    return read_bytes(source, 0, source.size)

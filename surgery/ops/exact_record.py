"""The exact record on disk, in `exact/` of an extracted adapter: with the base, enough to give the fine-tune back.

    exact/record.json           how each tensor and file of the fine-tune is restored, and what everything hashes to
    exact/record.safetensors    the codes (see `exact`), and literally what has none, under `exact/<tensor>`
    exact/headers/              the headers of the fine-tune's safetensors files
    exact/files/                the fine-tune's other files, but for those that the base has byte for byte

It lies in a folder of its own, so that no loader takes it for part of the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.dtypes import BY_NAME
from surgery.errors import FormatError, InputError, IntegrityError, MismatchError, several
from surgery.folder import LocalFolder, read_json
from surgery.hashing import HashBook, hash_source, new_hash
from surgery.header import parse_header, read_header
from surgery.layout import Layout, OutputFile, TensorSpec
from surgery.names import natural_key
from surgery.ops.exact import Origin
from surgery.ops.fitting import Change, fit
from surgery.pairing import pair
from surgery.provenance import describe_tensor
from surgery.source import FileSource, Source, read_bytes

FOLDER = "exact"
SCHEMA = 2
# So much of each tensor of the base is hashed before any work: another base differs there, and is refused at once.
_BEGINNING = 64 << 10
SAME, CODED, LITERAL = "same", "coded", "literal"


@dataclass(frozen=True)
class Entry:
    """How one tensor of the fine-tune is restored.

    Attributes:
        dtype, shape, blake3: of the tensor.
        how: `same` as its origin, `coded`, or kept as a `literal`.
        origin: the stored name, in the base with the adapter, of what it is predicted from; None where nothing is like
            it.
    """

    dtype: str
    shape: tuple[int, ...]
    blake3: str
    how: str
    origin: str | None = None

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, BY_NAME[self.dtype], self.shape)


@dataclass(frozen=True)
class FileEntry:
    """A file beside the weights: its hash, and whether the base has the same."""

    blake3: str
    in_base: bool


@dataclass(frozen=True)
class ExactRecord:
    """An exact record, opened.

    Attributes:
        label: the record's place, for errors.
        base_name, tuned_name: what the two were called.
        entries: every tensor of the fine-tune, by stored name.
        base: dtype, shape and hash of every tensor of the base that is needed, and the hash of its beginning.
        adapter: hash of every tensor of the adapter.
        config: what the base was read as: its own config, or that of the fine-tune where it had none.
        files: the fine-tune's other files, by relative path.
        layout: the fine-tune's safetensors files.
        parts: codes and literals, by tensor.
        folder: `exact/`.
    """

    label: str
    base_name: str
    tuned_name: str
    entries: Mapping[str, Entry]
    base: Mapping[str, Mapping[str, object]]
    adapter: Mapping[str, str]
    config: Mapping[str, object]
    files: Mapping[str, FileEntry]
    layout: Layout = field(repr=False)
    parts: Mapping[str, StoredTensor] = field(repr=False)
    folder: LocalFolder = field(repr=False)

    def check_headers(self, base: Checkpoint) -> None:
        """Raise `MismatchError` naming every tensor of the base that is not as the fine-tune's base had it."""
        problems = []
        for name, expected in self.base.items():
            found = base.tensors.get(name)
            if found is None:
                problems.append(f"{base.label} has no tensor {name!r}, which {self.tuned_name} is restored from.")
            elif (found.dtype.name, list(found.shape)) != (expected["dtype"], expected["shape"]):
                problems.append(
                    f"{base.label}: tensor {name!r} is {found.dtype} {list(found.shape)}, expected {expected['dtype']} "
                    f"{expected['shape']}."
                )
        self._refuse(base, problems)

    def check_beginnings(self, base: Checkpoint) -> None:
        """Raise `MismatchError` naming every tensor whose first bytes, or file that, is not as on record.

        A base that differs further on only is not found here, but by what is restored from it.
        """
        problems = [
            self._other_values(base, name)
            for name, expected in self.base.items()
            if hash_beginning(base.tensors[name]) != expected["beginning"]
        ]
        for name, entry in self.files.items():
            if entry.in_base and (
                name not in base.folder.names() or hash_source(base.folder.open(name)) != entry.blake3
            ):
                problems.append(f"{base.label}: file {name} is not the one that {self.base_name} had.")
        self._refuse(base, problems)

    def check_hashes(self, base: Checkpoint, digests: Mapping[str, str]) -> None:
        """Raise `MismatchError` naming every tensor of the base whose bytes are not those on record."""
        changed = [name for name, expected in self.base.items() if digests.get(name) != expected["blake3"]]
        self._refuse(base, [self._other_values(base, name) for name in changed])

    def _other_values(self, base: Checkpoint, name: str) -> str:
        return f"{base.label}: tensor {name!r} has other values than in {self.base_name}, the base of this extraction."

    def _refuse(self, base: Checkpoint, problems: list[str]) -> None:
        if problems:
            what = f"{base.label}, which is not the base that the adapter was extracted from"
            raise MismatchError(several(what, problems), problems)

    def check_adapter(self, adapter: Adapter, hashes: HashBook) -> None:
        """Raise `IntegrityError` unless the adapter's tensors are those of the extraction."""
        for name in sorted({*self.adapter, *adapter.files.tensors}, key=natural_key):
            tensor = adapter.files.tensors.get(name)
            if tensor is None or name not in self.adapter or hashes.require(tensor) != self.adapter[name]:
                raise IntegrityError(
                    f"{adapter.label}: tensor {name!r} is not as it was extracted, so it does not go with its exact "
                    "record; fetch the adapter again."
                )


def hash_beginning(tensor: StoredTensor) -> str:
    """The hash of a tensor's first bytes."""
    hasher = new_hash()
    hasher.update(read_bytes(tensor.source, tensor.offset, min(tensor.nbytes, _BEGINNING)))
    return hasher.hexdigest()


def origins(
    base: Checkpoint, adapter: Adapter, tensors: Mapping[str, StoredTensor | TensorSpec], names: Mapping[str, str]
) -> dict[str, Origin]:
    """What each tensor of the fine-tune is predicted from.

    Args:
        base: the base.
        adapter: the adapter that was extracted.
        tensors: the fine-tune's tensors, by stored name.
        names: for each the stored name of what corresponds to it in the base with the adapter, where anything does.
    """
    changes = fit(base, [adapter])
    return {name: _origin(base, tensor.shape, names.get(name), changes) for name, tensor in tensors.items()}


def _origin(base: Checkpoint, shape: tuple[int, ...], name: str | None, changes: Mapping[str, Change]) -> Origin:
    if name is None:
        return Origin(None)
    own, change = base.tensors.get(name), changes.get(name)
    if change is not None and _is_alike(change.start, shape):
        usable = change.start.shape == shape and not _has_others(change)
        return Origin(change.start, change.blocks if usable else ())
    return Origin(own if own is not None and _is_alike(own, shape) else None)


def _is_alike(source: StoredTensor, shape: tuple[int, ...]) -> bool:
    """Whether rows of the one are rows of the other."""
    return len(source.shape) == len(shape) and source.shape[1:] == shape[1:] and source.numel > 0


def _has_others(change: Change) -> bool:
    """Whether anything but plain LoRA is added; an extraction makes nothing else."""
    return any(c.is_dora or c.is_bias for block in change.blocks for c in block.contributions)


def counterparts(base: Checkpoint, tuned: Checkpoint, adapter: Adapter) -> dict[str, str]:
    """For every stored tensor of `tuned` what it was tuned from: a stored name of `base`, or one the adapter adds."""
    known = {*base.tensors, *fit(base, [adapter])}
    found = {name: name for name in tuned.tensors if name in known}
    paired = pair(base, tuned)
    twins = [(one.left, one.right) for one in paired.tensors.values()]
    for site in paired.sites.values():
        twins += zip(site.left.tensors, site.right.tensors, strict=False)
    for left, right in twins:
        if not (left.is_slice or right.is_slice or right.name in found):
            found[right.name] = left.name
    return found


# Writing --------------------------------------------------------------------------------------------------------------


def record_bytes(
    base: Checkpoint,
    tuned: Checkpoint,
    entries: Mapping[str, Entry],
    adapter: Adapter,
    files: Mapping[str, FileEntry],
    hashes: HashBook,
) -> bytes:
    """The bytes of `record.json`."""
    used = sorted({e.origin for e in entries.values() if e.origin and e.origin in base.tensors}, key=natural_key)
    content = {
        "schema": SCHEMA,
        "base_name": base.provenance["source"],
        "tuned_name": tuned.provenance["source"],
        "shards": {shard.name: shard.source.size - len(shard.header.raw) for shard in tuned.shards},
        "tensors": {name: {k: v for k, v in asdict(e).items() if v is not None} for name, e in entries.items()},
        "base": {name: _describe_base(base.tensors[name], hashes) for name in used},
        "config": base.config,
        "adapter": {name: hashes.require(tensor) for name, tensor in adapter.files.tensors.items()},
        "files": {name: asdict(entry) for name, entry in files.items()},
    }
    return (json.dumps(content, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def _describe_base(tensor: StoredTensor, hashes: HashBook) -> dict[str, object]:
    return describe_tensor(tensor, hashes.require(tensor)) | {"beginning": hash_beginning(tensor)}


# Reading --------------------------------------------------------------------------------------------------------------


def has_exact(adapter: Adapter) -> bool:
    """Whether an adapter was extracted with `--exact`."""
    return "record.json" in adapter.files.record(FOLDER)


def exact_bytes(adapter: Adapter) -> int | None:
    """Size of an adapter's exact record, or None where it has none."""
    return sum(adapter.files.record(FOLDER).values()) if has_exact(adapter) else None


def open_exact(adapter: Adapter) -> ExactRecord:
    """Open the exact record of an adapter. Raises `FormatError` for one that cannot be used."""
    if not has_exact(adapter):
        raise InputError(
            f"{adapter.label} has no exact record (it was not extracted with --exact); `surgery merge` gives an "
            "approximation of the fine-tune."
        )
    folder = adapter.files.folder.subfolder(FOLDER)
    content = read_json(folder.open("record.json"))
    label = f"{folder.label}/record.json"
    if content.get("schema") != SCHEMA:
        raise FormatError(
            f"{label} has schema {content.get('schema')!r}, expected {SCHEMA}; use the version that made it."
        )
    tensors, base, hashes, config, files, shards = (
        _mapping(content, key, label) for key in ("tensors", "base", "adapter", "config", "files", "shards")
    )
    entries = {name: _entry(name, value, label) for name, value in tensors.items()}
    described = {name: _description(name, value, label) for name, value in base.items()}
    if not all(_is_hash(value) for value in hashes.values()):
        raise FormatError(f"{label} has no hashes of the adapter's tensors.")
    layout = _layout(folder, shards, entries, label)
    known = {name: _file_entry(name, value, label) for name, value in files.items()}
    clash = sorted(known.keys() & {file.name for file in layout.files})
    if clash:
        raise FormatError(f"{label} lists the weight file {clash[0]} as another file too.")
    present = set(folder.names())
    missing = [name for name, entry in known.items() if not entry.in_base and f"files/{name}" not in present]
    if missing:
        raise FormatError(f"{folder.label} lacks files/{missing[0]}; fetch the adapter again.")
    return ExactRecord(
        label=folder.label,
        base_name=str(content.get("base_name")),
        tuned_name=str(content.get("tuned_name")),
        entries=entries,
        base=described,
        adapter={name: str(value) for name, value in hashes.items()},
        config=config,
        files=known,
        layout=layout,
        parts=_parts(folder, entries),
        folder=folder,
    )


def _mapping(content: Mapping[str, object], key: str, label: str) -> dict[str, object]:
    value = content.get(key)
    if not isinstance(value, dict):
        raise FormatError(f"{label} is not an exact record: {key!r} is missing or of another kind.")
    return value


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


def _description(name: str, value: object, label: str) -> Mapping[str, object]:
    known = isinstance(value, dict) and value.get("dtype") in BY_NAME and isinstance(value.get("shape"), list)
    if not isinstance(value, dict) or not known or not all(_is_hash(value.get(key)) for key in ("blake3", "beginning")):
        raise FormatError(f"{label} does not describe the base's tensor {name!r}.")
    return value


def _entry(name: str, value: object, label: str) -> Entry:
    if (
        not isinstance(value, dict)
        or value.get("how") not in (SAME, CODED, LITERAL)
        or not _is_hash(value.get("blake3"))
        or value.get("dtype") not in BY_NAME
        or not isinstance(value.get("shape"), list)
        or not isinstance(value.get("origin"), str | None)
    ):
        raise FormatError(f"{label} does not say how to restore tensor {name!r}.")
    return Entry(value["dtype"], tuple(value["shape"]), value["blake3"], value["how"], value.get("origin"))


def _file_entry(name: str, value: object, label: str) -> FileEntry:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name:
        raise FormatError(f"{label} names the file {name!r}, outside its folder.")
    if not isinstance(value, dict) or not _is_hash(value.get("blake3")) or not isinstance(value.get("in_base"), bool):
        raise FormatError(f"{label} does not say how to restore the file {name!r}.")
    return FileEntry(value["blake3"], value["in_base"])


def _layout(folder: LocalFolder, shards: Mapping[str, object], entries: Mapping[str, Entry], label: str) -> Layout:
    """The fine-tune's files by their headers; every tensor on record is in one of them, as it is on record."""
    files = []
    for name, size in shards.items():
        if "/" in name or "\\" in name or name in ("", ".", "..") or type(size) is not int or size < 0:
            raise FormatError(f"{label} names the weight file {name!r} of {size!r} bytes.")
        source = folder.open(f"headers/{name}")
        raw = read_bytes(source, 0, source.size)
        if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
            raise FormatError(f"{source.name} is not a safetensors header; fetch the adapter again.")
        header = parse_header(raw, size, source.name)
        files.append(OutputFile(name, raw, header.tensors))
    laid_out = {info.name: (info.dtype.name, info.shape) for file in files for info in file.entries}
    wrong = [
        name
        for name in {*laid_out, *entries}
        if name not in entries or laid_out.get(name) != (entries[name].dtype, entries[name].shape)
    ]
    if wrong or len(laid_out) != sum(len(file.entries) for file in files):
        raise FormatError(f"{label} and its headers disagree about tensor {sorted(wrong)[:1]}.")
    return Layout(tuple(files))


def _parts(folder: LocalFolder, entries: Mapping[str, Entry]) -> dict[str, StoredTensor]:
    source = FileSource(folder.path / "record.safetensors")
    header = read_header(source)
    stored = {
        i.name.removeprefix("exact/"): StoredTensor(i.name, i.dtype, i.shape, source, header.data_start + i.begin)
        for i in header.tensors
    }
    for name, entry in entries.items():
        part = stored.get(name)
        if entry.how == CODED and (part is None or part.dtype.name != "U8" or len(part.shape) != 1):
            raise FormatError(f"{source.name} has no code of tensor {name!r}.")
        if entry.how == LITERAL and (part is None or (part.dtype.name, part.shape) != (entry.dtype, entry.shape)):
            raise FormatError(f"{source.name} does not hold tensor {name!r}.")
    return stored


def file_source(record: ExactRecord, base: Checkpoint, name: str) -> Source:
    """Where a file of the fine-tune lies."""
    return base.folder.open(name) if record.files[name].in_base else record.folder.open(f"files/{name}")

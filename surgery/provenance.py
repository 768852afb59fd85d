"""`surgery.json`: what an output was made from, how, and what it must hash to. The same inputs give the same bytes.

    schema      1
    operation   the command
    options     those that shape the output, with their values
    versions    of this package, and of torch where it computed
    inputs      for each: role, source (a folder's name or a Hub id), revision, and the BLAKE3-256 of every tensor
    outputs     dtype, shape and BLAKE3-256 of every tensor written
    files       BLAKE3-256 of every other file written
    report      the numeric report of the operation

Neither time, nor host, nor a path appears in it. Without hashing (`--no-hash`) the hashes are absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import FormatError
from surgery.folder import Folder, read_json
from surgery.hashing import HashBook, new_hash
from surgery.header import TensorInfo
from surgery.layout import Layout
from surgery.version import versions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FILE_NAME = "surgery.json"
SCHEMA = 1


@dataclass(frozen=True)
class Input:
    """An input of an operation, and the part it plays: `base`, `tuned`, `adapter`, `merged`."""

    role: str
    checkpoint: Checkpoint
    weight: float | None = None


def describe_tensor(tensor: StoredTensor | TensorInfo, digest: str | None) -> dict[str, object]:
    """dtype, shape and, where it is known, hash of a tensor."""
    entry: dict[str, object] = {"dtype": tensor.dtype.name, "shape": list(tensor.shape)}
    return entry if digest is None else entry | {"blake3": digest}


def describe_input(item: Input, hashes: HashBook) -> dict[str, object]:
    """The `inputs` entry of a checkpoint or adapter. Tensors that were not hashed on the way are hashed now."""
    entry: dict[str, object] = {"role": item.role, **item.checkpoint.provenance}
    if item.weight is not None:
        entry["weight"] = item.weight
    if hashes.enabled:
        entry["tensors"] = {
            name: describe_tensor(tensor, hashes.require(tensor)) for name, tensor in item.checkpoint.tensors.items()
        }
    item.checkpoint.folder.prove([(n, t.source, hashes.get(t)) for n, t in item.checkpoint.tensors.items()])
    return entry


def describe_outputs(layouts: Iterable[Layout], digests: Mapping[str, str]) -> dict[str, object]:
    """The `outputs` entry: every tensor of the layouts, with its hash where there is one."""
    found: dict[str, object] = {}
    for layout in layouts:
        for file in layout.files:
            for info in file.entries:
                found[info.name] = describe_tensor(info, digests.get(info.name))
    return found


def hash_files(folder: Path, weights: Iterable[str]) -> dict[str, str]:
    """BLAKE3-256 of every file below `folder` that is not a weight file, by relative path."""
    skipped = {*weights, FILE_NAME}
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in skipped:
            hasher = new_hash()
            with open(path, "rb") as file:
                while chunk := file.read(4 << 20):
                    hasher.update(chunk)
            found[name] = hasher.hexdigest()
    return found


def document(
    operation: str,
    options: DataclassInstance | Mapping[str, object],
    inputs: Sequence[Mapping[str, object]],
    outputs: Mapping[str, object],
    files: Mapping[str, str],
    report: Mapping[str, object],
    computed: bool,
) -> bytes:
    """The bytes of `surgery.json`. `options` is a dataclass or a mapping."""
    content = {
        "schema": SCHEMA,
        "operation": operation,
        "options": options if isinstance(options, Mapping) else asdict(options),
        "versions": versions(computed),
        "inputs": list(inputs),
        "outputs": outputs,
        "files": files,
        "report": report,
    }
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")


def read_provenance(folder: Folder) -> dict[str, object] | None:
    """The `surgery.json` of a folder, or None where there is none. Raises `FormatError` for one that cannot be used."""
    if FILE_NAME not in folder.names():
        return None
    source = folder.open(FILE_NAME)
    content = read_json(source)
    if content.get("schema") != SCHEMA:
        raise FormatError(
            f"{source.name} has schema {content.get('schema')!r}, expected {SCHEMA}; use a newer version of this tool."
        )
    return content

"""How the tensors of an output are laid out in files: as the input had them, or split anew into shards.

Mirroring the input keeps file names, order and, where no shape or dtype changed, the very header bytes. So tensors that
do not change keep their place, and taking an adapter out again returns files that are equal byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.dtypes import DType
from surgery.header import TensorInfo, build_header, layout_key
from surgery.names import natural_key
from surgery.source import read_bytes

# transformers 5 and the Hub split at 5 GB (save_pretrained's max_shard_size until 4.x, the Hub's advice since).
DEFAULT_SHARD_BYTES = 5_000_000_000
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)

    @classmethod
    def like(cls, tensor: StoredTensor) -> TensorSpec:
        return cls(tensor.name, tensor.dtype, tensor.shape)


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be written: its opening bytes and where each tensor goes."""

    name: str
    raw_header: bytes = field(repr=False)
    entries: tuple[TensorInfo, ...] = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.raw_header) + (self.entries[-1].end if self.entries else 0)


@dataclass(frozen=True)
class Layout:
    """Every safetensors file of an output, and the shard index with its name, if there is one."""

    files: tuple[OutputFile, ...]
    index: tuple[str, bytes] | None = None

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def _file(name: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> OutputFile:
    raw, entries = build_header(((s.name, s.dtype, s.shape) for s in specs), metadata)
    return OutputFile(name, raw, entries)


def single_file(name: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str] = METADATA) -> Layout:
    """One file, in the order in which the safetensors library itself would write these tensors."""
    return Layout((_file(name, sorted(specs, key=lambda s: layout_key(s.name, s.dtype)), metadata),))


def split(specs: Sequence[TensorSpec], stem: str = "model", shard_bytes: int = DEFAULT_SHARD_BYTES) -> Layout:
    """Fill shards of at most `shard_bytes` (a larger tensor has one to itself) in natural order of names."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in sorted(specs, key=lambda s: natural_key(s.name)):
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    if len(shards) == 1:
        return single_file(f"{stem}.safetensors", shards[0])
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = tuple(
        _file(name, sorted(shard, key=lambda s: layout_key(s.name, s.dtype)), METADATA)
        for name, shard in zip(names, shards, strict=True)
    )
    return Layout(files, (f"{stem}.safetensors.index.json", _index(files)))


def mirror(checkpoint: Checkpoint, specs: Sequence[TensorSpec]) -> Layout:
    """Lay out `specs` as `checkpoint` has them: same files, same order; new names go to the end of the last file."""
    wanted = {spec.name: spec for spec in specs}
    added = [spec for spec in specs if spec.name not in checkpoint.tensors]
    files = []
    for shard in checkpoint.shards:
        is_last = shard is checkpoint.shards[-1]
        before = [TensorSpec(i.name, i.dtype, i.shape) for i in shard.header.tensors]
        after = [wanted[spec.name] for spec in before if spec.name in wanted] + (added if is_last else [])
        if after == before:
            files.append(OutputFile(shard.name, shard.header.raw, shard.header.tensors))
        elif after:
            files.append(_file(shard.name, after, shard.header.metadata or METADATA))
    layout = Layout(tuple(files))
    index = checkpoint.weights.index
    if index is None:
        return layout
    unchanged = all(file.raw_header == shard.header.raw for file, shard in zip(files, checkpoint.shards, strict=False))
    if unchanged and len(files) == len(checkpoint.shards):
        source = checkpoint.folder.open(index)
        return Layout(layout.files, (index, read_bytes(source, 0, source.size)))
    return Layout(layout.files, (index, _index(layout.files)))


def lay_out(checkpoint: Checkpoint, specs: Sequence[TensorSpec], shard_bytes: int | None) -> Layout:
    """Mirror `checkpoint`, or split anew where a shard size is given or the input has no safetensors to mirror."""
    if shard_bytes is None and checkpoint.shards:
        return mirror(checkpoint, specs)
    stem = {"pytorch_model": "model"}.get(checkpoint.weights.stem, checkpoint.weights.stem)
    return split(specs, stem, shard_bytes or DEFAULT_SHARD_BYTES)


def _index(files: Sequence[OutputFile]) -> bytes:
    """A shard index as `save_pretrained` writes it: sizes, then the file of each tensor, keys sorted, two spaces."""
    weight_map = {info.name: file.name for file in files for info in file.entries}
    entries = [info for file in files for info in file.entries]
    total = {
        "total_parameters": sum(prod(info.shape) for info in entries),
        "total_size": sum(info.end - info.begin for info in entries),
    }
    document = {"metadata": total, "weight_map": weight_map}
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode(errors="backslashreplace")

"""A model folder: which files it holds, and which of them hold the weights.

Files are seen through the `Folder` protocol, so that a repository on a Hub is read by the same code as a local folder.
Source of the file names and their precedence: transformers 5 (`from_pretrained`), peft 0.21 (`load_peft_weights`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from surgery.errors import FormatError, InputError
from surgery.source import BytesSource, FileSource, Source, kind_of, read_bytes

# A config, an index or a card beyond this size is hostile; the largest published index has 12 MB.
MAX_JSON_BYTES = 64_000_000

WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data",
    ".tflite", ".ot", ".npz", ".pkl", ".safetensors.index.json", ".bin.index.json", ".h5.index.json",
    ".msgpack.index.json",
)  # fmt: skip
# Caches, and what `merge --reversible` and `extract --exact` keep: no part of the model.
SKIPPED_FOLDERS = {"__pycache__", "undo", "exact"}
_SERIES = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<suffix>safetensors|bin)")


class Folder(Protocol):
    """Named files, readable in ranges."""

    @property
    def label(self) -> str:
        """What to call the folder in an error: the path or id that the user gave."""
        ...

    @property
    def provenance(self) -> Mapping[str, str]:
        """`source` (a name without a path, or a Hub id) and, where there is one, `revision`."""
        ...

    def names(self) -> Sequence[str]:
        """Every file, as a relative path with forward slashes, sorted."""
        ...

    def open(self, name: str) -> Source: ...

    def subfolder_files(self, name: str) -> Mapping[str, int]:
        """The files of a record (`undo`, `exact`) with their sizes, by their paths in it; empty where there is none."""
        ...

    def subfolder(self, name: str) -> LocalFolder:
        """A record that there is, on disk."""
        ...

    def prove(self, tensors: Sequence[tuple[str, Source, str | None]]) -> None:
        """Be told what was read, with hashes where they are known; raise `IntegrityError` if it is not what it was."""
        ...


class WithoutRecords:
    """What a folder has to say of records if it has none."""

    def subfolder_files(self, name: str) -> Mapping[str, int]:  # noqa: ARG002 - there are none, whatever the name
        return {}

    def subfolder(self, name: str) -> LocalFolder:
        raise InputError(f"There is no folder {name} here.")

    def prove(self, tensors: Sequence[tuple[str, Source, str | None]]) -> None:
        pass


class LocalFolder:
    """A folder on disk. Links are followed only while they stay in the folder, or in the Hub cache it belongs to."""

    # Whether it is a cache's, so that no output may refer to it by its path.
    is_cache = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if kind_of(self.path) != "folder":
            raise InputError(f"{self.path} is not a folder.")

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def provenance(self) -> Mapping[str, str]:
        return {"source": self.path.resolve().name}

    def names(self) -> Sequence[str]:
        found = []
        for parent, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
            here = Path(parent).relative_to(self.path)
            linked = [name for name in folders if (Path(parent) / name).is_symlink()]  # not walked into, nor forgotten
            found += [(here / name).as_posix() for name in (*files, *linked)]
        return sorted(found)

    def open(self, name: str) -> FileSource:
        return FileSource(self.path / name)

    def subfolder_files(self, name: str) -> Mapping[str, int]:
        place = self.path / name
        found = sorted(path for path in place.rglob("*") if path.is_file())
        return {path.relative_to(place).as_posix(): path.stat().st_size for path in found}

    def subfolder(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def prove(self, tensors: Sequence[tuple[str, Source, str | None]]) -> None:
        pass  # `verify` does that, on request

    def stays_inside(self, name: str) -> bool:
        """Whether a name is a regular file in the folder, or in the `blobs` of the Hub cache that it is a view of."""
        real = (self.path / name).resolve()
        if real.exists() and not real.is_file():  # a link that leads nowhere is an error for whoever opens it
            return False
        root = self.path.resolve()
        allowed = [root]
        if root.parent.name == "snapshots":  # <cache>/models--org--name/snapshots/<revision> beside .../blobs
            allowed.append(root.parent.parent / "blobs")
        return any(real.is_relative_to(place) for place in allowed)


@dataclass(frozen=True)
class Overlay:
    """A folder in which some files have other contents, and some are hidden."""

    under: Folder
    contents: Mapping[str, bytes]
    hidden: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.under.label

    @property
    def provenance(self) -> Mapping[str, str]:
        return self.under.provenance

    def names(self) -> Sequence[str]:
        return sorted({*self.under.names(), *self.contents} - set(self.hidden))

    def open(self, name: str) -> Source:
        if name in self.contents:
            return BytesSource(f"{self.label}/{name}", self.contents[name])
        return self.under.open(name)

    def subfolder_files(self, name: str) -> Mapping[str, int]:
        return self.under.subfolder_files(name)

    def subfolder(self, name: str) -> LocalFolder:
        return self.under.subfolder(name)

    def prove(self, tensors: Sequence[tuple[str, Source, str | None]]) -> None:
        self.under.prove(tensors)


@dataclass(frozen=True)
class Below(WithoutRecords):
    """A folder in a folder: a component of a pipeline."""

    above: Folder
    name: str

    @property
    def label(self) -> str:
        return f"{self.above.label}/{self.name}"

    @property
    def provenance(self) -> Mapping[str, str]:
        return self.above.provenance

    def names(self) -> Sequence[str]:
        return [name.removeprefix(f"{self.name}/") for name in self.above.names() if name.startswith(f"{self.name}/")]

    def open(self, name: str) -> Source:
        return self.above.open(f"{self.name}/{name}")

    def prove(self, tensors: Sequence[tuple[str, Source, str | None]]) -> None:
        self.above.prove(tensors)


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights, in order; `index` names the shard index, if there is one."""

    names: tuple[str, ...]
    index: str | None
    stem: str
    pickled: bool


def read_json(source: Source) -> dict[str, object]:
    """A JSON object from a small file; `FormatError` for anything else."""
    if source.size > MAX_JSON_BYTES:
        raise FormatError(
            f"{source.name} has {source.size} bytes, more than the {MAX_JSON_BYTES} such a file may have."
        )
    try:
        value = json.loads(read_bytes(source, 0, source.size).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source.name} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise FormatError(f"{source.name} holds a JSON {type(value).__name__}, expected an object.")
    return value


def find_weights(folder: Folder, preferred: Sequence[str] = ("model", "pytorch_model")) -> WeightFiles:
    """Choose the weight files of a folder: safetensors before `.bin`, a whole file before shards, as transformers does.

    `preferred` are the stems that win where several would do. Raises `InputError` where there is none, or no telling.
    """
    names = [name for name in folder.names() if "/" not in name]
    for suffix, pickled in (("safetensors", False), ("bin", True)):
        indexes = [name for name in names if name.endswith(f".{suffix}.index.json")]
        files = [name for name in names if name.endswith(f".{suffix}") and name != "training_args.bin"]
        for stem in preferred:
            if f"{stem}.{suffix}" in files:
                return WeightFiles((f"{stem}.{suffix}",), None, stem, pickled)
            if f"{stem}.{suffix}.index.json" in indexes:
                return _indexed(folder, f"{stem}.{suffix}.index.json", stem, pickled)
        files = [name for name in files if not name.startswith(("adapter_model.", "optimizer.", "scheduler."))]
        if len(indexes) == 1:
            return _indexed(folder, indexes[0], indexes[0].removesuffix(f".{suffix}.index.json"), pickled)
        if len(files) == 1:
            _refuse_lone_shard(folder, files[0])
            return WeightFiles((files[0],), None, files[0].removesuffix(f".{suffix}"), pickled)
        if files and (series := _series(files)) is not None:
            return WeightFiles(tuple(sorted(files)), None, series, pickled)
        if files:
            raise InputError(
                f"{folder.label} holds several weight files and no index that says which belong together: "
                f"{', '.join(sorted(files)[:5])}; name the one to use."
            )
    if "adapter_config.json" in names:
        raise InputError(
            f"{folder.label} is an adapter, but a checkpoint is expected here; merge it first: "
            f"`surgery merge BASE {folder.label} -o MERGED`."
        )
    raise InputError(f"{folder.label} holds no weights: neither .safetensors nor .bin files are in it.")


def _refuse_lone_shard(folder: Folder, name: str) -> None:
    """Raise for one shard of several: without the others, and without an index, it is no checkpoint."""
    match = _SERIES.fullmatch(name)
    if match is not None and int(match["count"]) != 1:
        raise InputError(
            f"{folder.label} holds {name}, one of {int(match['count'])} shards, without the others; fetch them too, or "
            "name the file to use it alone."
        )


def _series(files: Sequence[str]) -> str | None:
    """The stem of a complete series `stem-00001-of-0000n`, or None if the files are not one."""
    matches = [_SERIES.fullmatch(name) for name in files]
    parts = {(m["stem"], int(m["count"]), m["suffix"]) for m in matches if m}
    numbers = sorted(int(m["number"]) for m in matches if m)
    if None in matches or len(parts) != 1:
        return None
    (stem, count, _), *_ = parts
    return stem if numbers == list(range(1, count + 1)) else None


def _indexed(folder: Folder, index: str, stem: str, pickled: bool) -> WeightFiles:
    weight_map = read_weight_map(folder, index)
    shards = sorted(set(weight_map.values()))
    present = set(folder.names())
    problems = [
        f"{folder.label}/{index} names the shard {name!r}, outside the folder."
        for name in shards
        if "/" in name or "\\" in name or name in ("", ".", "..")
    ]
    problems = problems or [
        f"{folder.label}/{index} names the shard {name!r}, which is missing; fetch it again."
        for name in shards
        if name not in present
    ]
    if problems:
        raise FormatError(problems[0] if len(problems) == 1 else f"{len(problems)} problems with {index}:", problems)
    return WeightFiles(tuple(shards), index, stem, pickled)


def read_weight_map(folder: Folder, index: str) -> dict[str, str]:
    """The `weight_map` of a shard index: tensor name to file name."""
    weight_map = read_json(folder.open(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError(f"{folder.label}/{index} has no 'weight_map' from tensor names to file names.")
    if not weight_map:
        raise FormatError(f"{folder.label}/{index} has an empty 'weight_map'.")
    return weight_map


def other_files(folder: Folder, weights: WeightFiles) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files to carry along, and those to leave behind: other weights, folders that hold some, links that lead out.

    A weight file in another format would contradict the result; provenance of an earlier operation is replaced.
    """
    used = {*weights.names, weights.index}
    names = [name for name in folder.names() if name not in used and name != "surgery.json"]
    heavy = {name.split("/")[0] for name in names if "/" in name and name.endswith(WEIGHT_SUFFIXES)}
    carried: list[str] = []
    left: list[str] = []
    for name in names:
        leaves = isinstance(folder, LocalFolder) and not folder.stays_inside(name)
        stays_behind = name.endswith(WEIGHT_SUFFIXES) or ("/" in name and name.split("/")[0] in heavy) or leaves
        (left if stays_behind else carried).append(name)
    return tuple(carried), tuple(left)

"""A stored checkpoint: what tensors it has and where their bytes are. Opening one reads headers only.

Nothing here knows an architecture. Names and shapes come from the safetensors headers (or from the tensors of a legacy
`.bin`), the config from `config.json`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path

from surgery.dtypes import DType
from surgery.errors import FormatError, InputError, UnsupportedError, several
from surgery.folder import Folder, LocalFolder, WeightFiles, find_weights, other_files, read_json, read_weight_map
from surgery.header import Header, read_header
from surgery.names import natural_key
from surgery.pickled import load_pickled
from surgery.source import FileSource, Source, kind_of, unexpanded


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: row-major bytes at `offset` of `source`. Holds no data."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    source: Source = field(repr=False, compare=False)
    offset: int = field(repr=False, compare=False)
    is_slice: bool = field(default=False, repr=False, compare=False)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix: every dimension but the last, or 1."""
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What tells a stored tensor from every other."""
        return self.source.name, self.name, self.offset, f"{self.dtype.name}{list(self.shape)}"

    def __getitem__(self, index: int) -> StoredTensor:
        """Slice `index` along the first dimension: one expert of a stack. It keeps the name of the whole."""
        if not self.shape or not 0 <= index < self.shape[0]:
            raise IndexError(index)
        size = self.dtype.nbytes(self.shape[1:])
        return replace(self, shape=self.shape[1:], offset=self.offset + index * size, is_slice=True)


@dataclass(frozen=True)
class Shard:
    """A safetensors file of a checkpoint, by its name in the folder."""

    name: str
    source: Source = field(repr=False)
    header: Header = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """Headers, config and file list of a stored checkpoint.

    Attributes:
        label: the path or id the user gave, for errors.
        folder: the folder it lies in; for a single file, the folder around it.
        tensors: every tensor by name, in natural order of names.
        shards: the safetensors files in order; empty for a legacy `.bin` checkpoint.
        weights: names of the weight files and of their index.
        config: `config.json`, or `adapter_config.json` of an adapter; empty where there is none.
        carried: other files that belong to the model: tokenizer, generation config, chat template, licence, code.
        left_behind: files that an output must not take along, see `folder.other_files`.
        path: the local folder or file, or None for a checkpoint on a Hub.
        provenance: `source` (a name without its path, or a Hub id) and, on a Hub, `revision`.
    """

    label: str
    folder: Folder = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    shards: tuple[Shard, ...] = field(repr=False)
    weights: WeightFiles = field(repr=False)
    config: Mapping[str, object] = field(repr=False)
    carried: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    path: Path | None = None
    provenance: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def model_type(self) -> str:
        value = self.config.get("model_type")
        return value if isinstance(value, str) else ""

    @property
    def architecture(self) -> str:
        """The first entry of `architectures`, such as `LlamaForCausalLM`; empty where the config names none."""
        value = self.config.get("architectures")
        return value[0] if isinstance(value, list) and value and isinstance(value[0], str) else ""

    def record(self, name: str) -> Mapping[str, int]:
        """The files of a record beside the weights (`undo`, `exact`) with their sizes; empty where there is none."""
        if self.path is not None and not self.path.is_dir():
            return {}  # a lone file brings its tensors only
        return self.folder.subfolder_files(name)

    @cached_property
    def text_config(self) -> Mapping[str, object]:
        """The config of the language model: nested in that of a multimodal model, else the config itself."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config


def expect(tensors: Iterable[StoredTensor]) -> None:
    """Tell the sources of tensors what is going to be read of them, in this order; see `Source.expect`."""
    ranges: dict[int, list[tuple[int, int]]] = {}
    sources: dict[int, Source] = {}
    for tensor in tensors:
        sources[id(tensor.source)] = tensor.source
        ranges.setdefault(id(tensor.source), []).append((tensor.offset, tensor.offset + tensor.nbytes))
    for number, source in sources.items():
        source.expect(ranges[number])


def expect_nothing(tensors: Iterable[StoredTensor]) -> None:
    """Tell the sources of tensors that what was announced is over."""
    for source in {id(tensor.source): tensor.source for tensor in tensors}.values():
        source.expect(())


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint on disk: a folder, a `.safetensors` file or a `.bin` file. Raises `InputError`."""
    place = Path(path)
    kind = kind_of(place)
    if kind == "folder":
        return read_checkpoint(LocalFolder(place))
    if kind is None:
        raise InputError(f"{place} does not exist{unexpanded(place)}.")
    if place.suffix not in (".safetensors", ".bin"):
        raise InputError(f"{place} is neither a folder nor a .safetensors or .bin file.")
    # A lone file brings its tensors only: what else lies beside it may have nothing to do with it.
    weights = WeightFiles((place.name,), None, place.stem, place.suffix == ".bin")
    found = _read(LocalFolder(place.parent), weights, str(place), "config.json")
    return replace(found, carried=(), left_behind=(), path=place, provenance={"source": place.name})


def read_checkpoint(folder: Folder) -> Checkpoint:
    """Open the checkpoint in a folder, local or on a Hub."""
    return _read(folder, find_weights(folder), folder.label, "config.json")


def read_adapter_files(folder: Folder) -> Checkpoint:
    """Open the weights of an adapter folder as a checkpoint whose config is `adapter_config.json`."""
    if "surgery_method.json" in folder.names():
        raise UnsupportedError(
            f"{folder.label} is an adapter of a method that PEFT does not have (surgery_method.json), which cannot be "
            "merged into weights; `surgery eval` and `surgery train` take it beside its base."
        )
    if "adapter_config.json" not in folder.names():
        whole = any(name.endswith((".safetensors", ".bin")) for name in folder.names() if "/" not in name)
        remedy = f"; it is a checkpoint. `surgery extract BASE {folder.label} -o ADAPTER` makes an adapter of it"
        raise InputError(f"{folder.label} is not an adapter: it has no adapter_config.json{remedy if whole else ''}.")
    return _read(folder, find_weights(folder, ("adapter_model",)), folder.label, "adapter_config.json")


def read_foreign_adapter(folder: Folder, preferred: tuple[str, ...], config_name: str = "") -> Checkpoint:
    """Open the weights of an adapter that another tool wrote; `preferred` are the stems of its weight file."""
    return _read(folder, find_weights(folder, preferred), folder.label, config_name)


def _read(folder: Folder, weights: WeightFiles, label: str, config_name: str) -> Checkpoint:
    tensors: dict[str, StoredTensor] = {}
    shards: list[Shard] = []
    problems: list[str] = []
    owner: dict[str, str] = {}
    for file in weights.names:
        found: list[StoredTensor] = []
        source = folder.open(file)
        if weights.pickled:
            if not isinstance(source, FileSource):
                raise InputError(
                    f"{label} has its weights in {file}; a .bin file is read from disk only, fetch it first."
                )
            found = [StoredTensor(n, d, s, data, 0) for n, (d, s, data) in load_pickled(source).items()]
        else:
            header = read_header(source)
            shards.append(Shard(file, source, header))
            found = [
                StoredTensor(i.name, i.dtype, i.shape, source, header.data_start + i.begin) for i in header.tensors
            ]
        for tensor in found:
            if tensor.name in owner:
                problems.append(
                    f"{label}: tensor {tensor.name!r} is stored in {owner[tensor.name]} and again in {file}."
                )
            owner[tensor.name] = file
            tensors[tensor.name] = tensor
    if weights.index is not None:
        problems += _index_problems(f"{label}/{weights.index}", read_weight_map(folder, weights.index), owner)
    if not tensors and not problems:
        problems.append(f"{label} holds no tensors.")
    if problems:
        raise FormatError(several(label, problems), problems)
    names = folder.names()
    carried, left = other_files(folder, weights)
    return Checkpoint(
        label=label,
        folder=folder,
        tensors={name: tensors[name] for name in sorted(tensors, key=natural_key)},
        shards=tuple(shards),
        weights=weights,
        config=read_json(folder.open(config_name)) if config_name in names else {},
        carried=carried,
        left_behind=left,
        path=folder.path if isinstance(folder, LocalFolder) else None,
        provenance=folder.provenance,
    )


def _index_problems(index: str, weight_map: Mapping[str, str], owner: Mapping[str, str]) -> list[str]:
    problems = []
    for name in sorted({*weight_map, *owner}, key=natural_key):
        listed, stored = weight_map.get(name), owner.get(name)
        if stored is None:
            problems.append(f"{index} lists tensor {name!r} in {listed}, which does not hold it.")
        elif listed is None:
            problems.append(f"{index} does not list tensor {name!r} of {stored}; remove the index to read all shards.")
        elif listed != stored:
            problems.append(f"{index} lists tensor {name!r} in {listed}, but {stored} holds it.")
    return problems

"""What a user calls a checkpoint or an adapter: a path, or an id `name/repo[@revision]` in a registry or on a Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.adapter import Adapter, open_adapter, read_adapter
from surgery.checkpoint import (
    Checkpoint,
    open_checkpoint,
    read_adapter_files,
    read_checkpoint,
    read_foreign_adapter,
)
from surgery.errors import InputError
from surgery.folder import Below, Folder, LocalFolder, read_json
from surgery.source import kind_of

# Folders of a diffusers pipeline that LoRAs act on.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

_ID = re.compile(r"(?P<repository>(?:[\w-][\w.-]*/)?[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_WEIGHTED = re.compile(r"(?P<reference>.+)=(?P<weight>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)")

Reference = str | os.PathLike[str]


def resolve_checkpoint(reference: Reference | Checkpoint) -> Checkpoint:
    """Open a checkpoint by path or id. A path that exists comes before an id of the same spelling."""
    if isinstance(reference, Checkpoint):
        return reference
    folder = _folder_of_id(reference)
    return open_checkpoint(reference) if folder is None else read_checkpoint(folder)


def resolve_adapter(reference: Reference | tuple[Reference, float] | Adapter) -> Adapter:
    """Open an adapter by path or id; `reference=0.5`, or a pair, gives it a weight."""
    if isinstance(reference, Adapter):
        return reference
    name, weight = reference if isinstance(reference, tuple) else split_weight(reference)
    folder = _folder_of_id(name)
    return open_adapter(name, weight) if folder is None else read_adapter(folder, weight)


def resolve(reference: Reference | Checkpoint | Adapter) -> Checkpoint | Adapter:
    """Open whichever of the two a path or id means."""
    if isinstance(reference, Checkpoint | Adapter):
        return reference
    folder = _folder_of_id(reference)
    if folder is not None:
        return read_adapter(folder) if _holds_adapter(folder.names()) else read_checkpoint(folder)
    return resolve_adapter(reference) if is_adapter(reference) else resolve_checkpoint(reference)


def resolve_files(reference: Reference | Checkpoint) -> Checkpoint:
    """The tensors of a checkpoint or of an adapter of any kind, by path or id, whatever they mean."""
    if isinstance(reference, Checkpoint):
        return reference
    folder = _folder_of_id(reference)
    if folder is None and kind_of(Path(reference)) == "folder":
        folder = LocalFolder(reference)
    if folder is not None and "surgery_method.json" in folder.names():
        return read_foreign_adapter(folder, ("surgery_method",), "surgery_method.json")
    if folder is not None and _holds_adapter(folder.names()):
        return read_adapter_files(folder)
    return resolve_checkpoint(reference)


def resolve_folder(reference: Reference) -> Folder | Path:
    """The folder that a path or id means, or the file: for adapters of formats that are not PEFT's."""
    if (folder := _folder_of_id(reference)) is not None:
        return folder
    place = Path(reference)
    if kind_of(place) is None:
        raise InputError(f"{place} does not exist.")
    return LocalFolder(place) if place.is_dir() else place


def resolve_config(reference: Reference | Checkpoint) -> tuple[str, Mapping[str, object]]:
    """What to call a checkpoint, and its `config.json`; weights need not be there."""
    if isinstance(reference, Checkpoint):
        return reference.label, reference.config
    place = resolve_folder(reference)
    if isinstance(place, Path):
        raise InputError(f"{place} is a file without a config; name the folder that holds config.json.")
    if "config.json" in place.names():
        return place.label, read_json(place.open("config.json"))
    if "adapter_config.json" in place.names():
        raise InputError(f"{place.label} is an adapter; name the checkpoint that it belongs to.")
    raise InputError(f"{place.label} has no config.json, which says what model it is.")


def stored(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint on a disk, for what loads models from there; one on a Hub is fetched into the Hub's cache."""
    from surgery.hub.remote import HubFolder

    folder = checkpoint.folder
    if not isinstance(folder, HubFolder):
        return checkpoint
    files = {*checkpoint.weights.names, checkpoint.weights.index, *checkpoint.carried, "config.json", "surgery.json"}
    return read_checkpoint(folder.on_disk([name for name in folder.names() if name in files]))


def adapter_on_disk(reference: Reference) -> LocalFolder | None:
    """The folder of the adapter of any kind that an id means, on a disk; None for a path."""
    from surgery.hub.remote import HubFolder

    folder = _folder_of_id(reference)
    if isinstance(folder, HubFolder):
        return folder.on_disk(folder.names())
    return folder if isinstance(folder, LocalFolder) else None


def resolve_bases(reference: Reference | Checkpoint | None) -> dict[str, Checkpoint]:
    """The model that names are looked up in, under ``""``; of a pipeline each component under its name."""
    if reference is None:
        return {}
    if isinstance(reference, Checkpoint):
        return {"": reference}
    place: Folder | None = _folder_of_id(reference)
    if place is None and Path(reference).is_dir():
        place = LocalFolder(reference)
    if place is None or "model_index.json" not in place.names():
        return {"": resolve_checkpoint(reference)}
    parts = {name.partition("/")[0] for name in place.names() if "/" in name}
    if not parts.intersection(COMPONENTS):
        raise InputError(f"{place.label} is a pipeline without {', '.join(COMPONENTS[:3])} or another part known here.")
    names = [name for name in COMPONENTS if name in parts]
    if isinstance(place, LocalFolder):
        return {name: open_checkpoint(place.path / name) for name in names}
    return {name: read_checkpoint(Below(place, name)) for name in names}


def is_adapter(reference: Reference) -> bool:
    """Whether a path or id means an adapter: a folder with `adapter_config.json` and without a checkpoint's weights."""
    if (folder := _folder_of_id(reference)) is not None:
        return _holds_adapter(folder.names()) or "surgery_method.json" in folder.names()
    if kind_of(Path(reference)) != "folder":
        return False
    return _holds_adapter([path.name for path in Path(reference).iterdir()])


def _holds_adapter(names: Sequence[str]) -> bool:
    whole = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"}
    return "adapter_config.json" in names and not set(names) & whole


def split_weight(reference: Reference) -> tuple[Reference, float]:
    """`path=0.5` as a path and a weight; the weight is 1 where none is given, or where the whole is a path."""
    if kind_of(Path(reference)):
        return reference, 1.0
    match = _WEIGHTED.fullmatch(os.fspath(reference))
    return (match["reference"], float(match["weight"])) if match else (reference, 1.0)


def _folder_of_id(reference: Reference) -> Folder | None:
    """The repository that an id means, or None for a path: one that exists, or that no id could be.

    The local registry comes first, and the Hub after it. A name without a namespace can only be in the former.
    """
    text = os.fspath(reference)
    if not text:
        raise InputError("An empty path was given.")
    if kind_of(Path(text)) or text.startswith((".", "/", "~")):
        return None
    match = _ID.fullmatch(text)
    if match is None:
        return None
    if (folder := _local(match["repository"], match["revision"], text)) is not None:
        return folder
    if "/" not in match["repository"]:
        return None
    from surgery.hub.remote import open_folder

    return open_folder(match["repository"], match["revision"])


def _local(repository: str, revision: str | None, label: str) -> Folder | None:
    """A repository of the local registry, read in place."""
    from surgery.hub.naming import parse_repository, why_not_a_repository
    from surgery.hub.store import existing_registry

    if why_not_a_repository(repository) is not None or (registry := existing_registry()) is None:
        return None
    name = parse_repository(repository)
    with registry:
        if registry.metadata.find(name) is None:
            return None
        return registry.folder(registry.find(name, revision), label)

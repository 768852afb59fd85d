"""What a user calls a checkpoint or an adapter: a path, or an id `name/repo[@revision]` on a Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from surgery.adapter import Adapter, open_adapter, read_adapter
from surgery.checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from surgery.errors import InputError
from surgery.folder import Folder, LocalFolder
from surgery.source import kind_of

# Folders of a diffusers pipeline that LoRAs act on.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_WEIGHTED = re.compile(r"(?P<reference>.+)=(?P<weight>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)")

Reference = str | os.PathLike[str]


def resolve_checkpoint(reference: Reference | Checkpoint) -> Checkpoint:
    """Open a checkpoint by path or id. A path that exists comes before an id of the same spelling."""
    if isinstance(reference, Checkpoint):
        return reference
    match = _hub_id(reference)
    if match is None:
        return open_checkpoint(reference)
    from surgery.hub.remote import open_folder

    return read_checkpoint(open_folder(match["repository"], match["revision"]))


def resolve_adapter(reference: Reference | tuple[Reference, float] | Adapter) -> Adapter:
    """Open an adapter by path or id; `reference=0.5`, or a pair, gives it a weight."""
    if isinstance(reference, Adapter):
        return reference
    name, weight = reference if isinstance(reference, tuple) else split_weight(reference)
    match = _hub_id(name)
    if match is None:
        return open_adapter(name, weight)
    from surgery.hub.remote import open_folder

    return read_adapter(open_folder(match["repository"], match["revision"]), weight)


def resolve(reference: Reference | Checkpoint | Adapter) -> Checkpoint | Adapter:
    """Open whichever of the two a path or id means."""
    if isinstance(reference, Checkpoint | Adapter):
        return reference
    return resolve_adapter(reference) if is_adapter(reference) else resolve_checkpoint(reference)


def resolve_folder(reference: Reference) -> Folder | Path:
    """The folder that a path or id means, or the file: for adapters of formats that are not PEFT's."""
    match = _hub_id(reference)
    if match is not None:
        from surgery.hub.remote import open_folder

        return open_folder(match["repository"], match["revision"])
    place = Path(reference)
    if not place.exists():
        raise InputError(f"{place} does not exist.")
    return LocalFolder(place) if place.is_dir() else place


def resolve_bases(reference: Reference | Checkpoint | None) -> dict[str, Checkpoint]:
    """The model that names are looked up in, under ``""``; of a pipeline on disk each component under its name."""
    if reference is None:
        return {}
    if isinstance(reference, Checkpoint):
        return {"": reference}
    place = Path(reference)
    if not (place / "model_index.json").is_file():
        return {"": resolve_checkpoint(reference)}
    found = {name: place / name for name in COMPONENTS if (place / name).is_dir()}
    if not found:
        raise InputError(f"{place} is a pipeline without {', '.join(COMPONENTS[:3])} or another part known here.")
    return {name: open_checkpoint(folder) for name, folder in found.items()}


def is_adapter(reference: Reference) -> bool:
    """Whether a path or id means an adapter: a folder with `adapter_config.json` and without a checkpoint's weights."""
    match = _hub_id(reference)
    if match is not None:
        from surgery.hub.remote import open_folder

        names = set(open_folder(match["repository"], match["revision"]).names())
    elif kind_of(Path(reference)) == "folder":
        names = {path.name for path in Path(reference).iterdir()}
    else:
        return False
    whole = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"}
    return "adapter_config.json" in names and not names & whole


def split_weight(reference: Reference) -> tuple[Reference, float]:
    """`path=0.5` as a path and a weight; the weight is 1 where none is given, or where the whole is a path."""
    if kind_of(Path(reference)):
        return reference, 1.0
    match = _WEIGHTED.fullmatch(os.fspath(reference))
    return (match["reference"], float(match["weight"])) if match else (reference, 1.0)


def _hub_id(reference: Reference) -> re.Match[str] | None:
    """The parts of a Hub id, or None for a path: one that exists, or that no id could be."""
    text = os.fspath(reference)
    if not text:
        raise InputError("An empty path was given.")
    if kind_of(Path(text)) or text.startswith((".", "/", "~")):
        return None
    return _ID.fullmatch(text)

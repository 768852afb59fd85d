"""Which format a path holds, and reading it. Told by names of files, keys of configs and names of tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from surgery.adapter import read_adapter
from surgery.checkpoint import Checkpoint, open_checkpoint, read_foreign_adapter
from surgery.errors import FormatError, InputError
from surgery.folder import Folder, read_json
from surgery.formats.diffusers import FILE as DIFFUSERS_FILE
from surgery.formats.diffusers import is_diffusers, read_diffusers
from surgery.formats.exchange import Exchange
from surgery.formats.kohya import is_kohya, read_kohya
from surgery.formats.mlx import FILE as MLX_FILE
from surgery.formats.mlx import is_mlx, read_mlx
from surgery.formats.peft import read_peft

FORMATS = ("peft", "kohya", "diffusers", "mlx")


def format_of(place: Folder | Path) -> tuple[str, Checkpoint]:
    """The format of an adapter, one of `FORMATS`, and its files. Raises `InputError` for what is none of them."""
    if isinstance(place, Path):
        return _by_names(open_checkpoint(place))
    names = place.names()
    if "adapter_config.json" in names:
        if is_mlx(read_json(place.open("adapter_config.json"))):
            return "mlx", read_foreign_adapter(place, (MLX_FILE.rpartition(".")[0],), "adapter_config.json")
        return "peft", read_foreign_adapter(place, ("adapter_model",), "adapter_config.json")
    return _by_names(read_foreign_adapter(place, (DIFFUSERS_FILE.rpartition(".")[0],)))


def _by_names(files: Checkpoint) -> tuple[str, Checkpoint]:
    if is_kohya(files.tensors):
        return "kohya", files
    if is_diffusers(files.tensors):
        return "diffusers", files
    if any(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in files.tensors):
        raise InputError(f"{files.label} has tensors of a PEFT adapter and no adapter_config.json beside them.")
    if any(name.endswith((".lora_down.weight", ".lora_up.weight")) for name in files.tensors):
        raise FormatError(f"{files.label} has lora_down and lora_up under names that neither kohya nor diffusers uses.")
    raise InputError(
        f"{files.label} is no adapter that is known: neither a PEFT folder, nor a LoRA file of kohya or diffusers, nor "
        "an mlx-lm folder."
    )


def read_exchange(place: Folder | Path, bases: Mapping[str, Checkpoint]) -> Exchange:
    """An adapter of any format in the neutral form.

    Args:
        place: its folder, or its file.
        bases: the models it belongs to by component, see `kohya.read_kohya`; formats that need none ignore them.
    """
    kind, files = format_of(place)
    base = bases.get("")
    if kind == "kohya":
        return read_kohya(files, bases)
    if kind == "diffusers":
        return read_diffusers(files)
    if kind == "mlx":
        return read_mlx(files, base)
    assert not isinstance(place, Path)
    return read_peft(read_adapter(place), base)

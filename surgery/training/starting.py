"""What a run starts from: a checkpoint, or an adapter that is trained on and the checkpoint it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery.adapter import read_adapter
from surgery.checkpoint import Checkpoint, read_adapter_files, read_foreign_adapter
from surgery.errors import InputError, MismatchError
from surgery.folder import LocalFolder
from surgery.ops.fitting import fit
from surgery.ops.kinship import note_other_base, refuse_by_probe
from surgery.provenance import Input
from surgery.training.methods.folders import SETTINGS, TENSORS


@dataclass(frozen=True)
class Start:
    """A checkpoint on disk, and the adapter that is trained on if there is one.

    Attributes:
        checkpoint: the model.
        adapter: a folder that `load_method` reads.
        files: its tensors.
    """

    checkpoint: Checkpoint
    adapter: Path | None = None
    files: Checkpoint | None = None

    @property
    def inputs(self) -> tuple[Input, ...]:
        base = Input("base", self.checkpoint)
        return (base,) if self.files is None else (base, Input("adapter", self.files))


def start_from(checkpoint: Checkpoint) -> Start:
    """A checkpoint that is trained. Raises `InputError` for one that is not on disk."""
    return Start(_on_disk(checkpoint))


def start_on(place: LocalFolder, base: Checkpoint, any_base: bool) -> Start:
    """An adapter that is trained on, and its base.

    Args:
        place: the folder of an adapter of PEFT's or of ours.
        base: what it belongs to.
        any_base: take a base even if hashes prove that the adapter was made for another.

    Raises:
        InputError: the base is not on disk.
        MismatchError: the adapter does not fit the base.
    """
    files, checkpoint = adapter_files(place), _on_disk(base)
    if files.config.get("peft_type") == "LORA":
        adapter = read_adapter(place)
        changes = fit(checkpoint, [adapter])
        if not any_base:
            refuse_by_probe(checkpoint, [adapter], changes)
    elif not any_base and (other := note_other_base(checkpoint, files)):
        raise MismatchError(other[0].removesuffix(".") + "; --any-base takes it all the same.")
    return Start(checkpoint, place.path, files)


def holds_method(place: Path) -> bool:
    """Whether a path is the folder of an adapter: PEFT's, or one of our own methods'."""
    return (place / SETTINGS).is_file() or (
        (place / "adapter_config.json").is_file() and not (place / "config.json").is_file()
    )


def adapter_files(place: Path | LocalFolder) -> Checkpoint:
    """The tensors of an adapter's folder, and its settings as config."""
    folder = place if isinstance(place, LocalFolder) else LocalFolder(place)
    if (folder.path / SETTINGS).is_file():
        return read_foreign_adapter(folder, (Path(TENSORS).stem,), SETTINGS)
    return read_adapter_files(folder)


def _on_disk(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.path is None or not checkpoint.path.is_dir():
        raise InputError(f"{checkpoint.label} is not a folder on disk; fetch it with `surgery pull` first.")
    return checkpoint

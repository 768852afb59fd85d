"""Adapters that are to be evaluated, told apart by whether they can share a forward pass with others.

What can: pairs of factors on linear layers, Conv1D and embeddings, at any rank and scale. All else changes the base in
some other way, and runs in a pass of its own, with PEFT or `training.methods` doing the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.adapter import Adapter, Lora
from surgery.checkpoint import Checkpoint
from surgery.errors import InputError, MismatchError, OptionError, UnsupportedError, several
from surgery.names import plain
from surgery.ops.deltas import PlainReader
from surgery.ops.fitting import fit
from surgery.ops.kinship import note_other_base, refuse_by_probe
from surgery.training.methods.folders import PROMPT_FOLDER, SETTINGS, read_own
from surgery.training.methods.prepared import own_name
from surgery.training.starting import adapter_files


@dataclass(frozen=True)
class AdapterSource:
    """An adapter as it was named.

    Attributes:
        name: what a report calls it: the folder's name.
        label: as given.
        weight: multiplies its scale.
        path: the folder, or None for one that is not on disk.
        adapter: its factors; None for a kind that has none.
        reason: why it cannot share a pass, as the end of a sentence that begins with its name; None if it can, as far
            as its files tell.
    """

    name: str
    label: str
    weight: float
    path: Path | None
    adapter: Adapter | None = field(default=None, repr=False)
    reason: str | None = None

    @classmethod
    def of(cls, label: str, weight: float, opened: Callable[[], Adapter], place: Path | None = None) -> AdapterSource:
        """Look at what is in a folder. `opened` reads it as PEFT's LoRA, or raises what is wrong with that."""
        place = Path(label) if place is None else place
        name = Path(label.rstrip("/")).name or label
        if (place / SETTINGS).is_file():
            method = read_own(place)["method"]
            return cls._alone(cls(name, label, weight, place, None, f"is of the method {method}"))
        try:
            adapter = opened()
        except UnsupportedError as error:
            if not (place / "adapter_config.json").is_file():
                raise
            return cls._alone(cls(name, label, weight, place, None, _kind_of(error.message, label)))
        found = cls(name, label, weight, adapter.files.path, adapter, alone_by_files(adapter))
        return found if found.reason is None else cls._alone(found)

    @classmethod
    def _alone(cls, found: AdapterSource) -> AdapterSource:
        """Checked as one that runs in a pass of its own: PEFT loads it, from a disk and at its own scale."""
        if found.path is None:
            raise InputError(f"{found.label} {found.reason} and is not on disk; fetch it with `surgery pull` first.")
        if found.weight != 1:
            raise OptionError(f"{found.label} {found.reason}, which cannot be given the weight {found.weight:g}.")
        return found


def unique_names(sources: Sequence[AdapterSource]) -> list[AdapterSource]:
    """The same with names that differ: adapters of one folder name are called as they were given."""
    from dataclasses import replace

    names = [source.name for source in sources]
    found = [replace(source, name=source.label) if names.count(source.name) > 1 else source for source in sources]
    labels = [source.name for source in found]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise OptionError(f"--adapters names {twice} twice.")
    return found


def alone_by_files(adapter: Adapter) -> str | None:
    """Why an adapter cannot share a pass, as far as its files tell; None if it can."""
    if adapter.files.path is not None and (adapter.files.path / PROMPT_FOLDER).is_dir():
        return "has virtual tokens beside its factors"
    if any(lora.magnitude is not None for lora in adapter.loras):
        return "is a DoRA, which scales the rows of the weights"
    if whole := sorted({*adapter.saved} - _copies(adapter)):
        more = f" and {len(whole) - 1} more" if len(whole) > 1 else ""
        return f"stores {plain(whole[0])}{more} whole (modules_to_save)"
    if adapter.tokens:
        return "replaces rows of an embedding (trainable_token_indices)"
    if any(lora.bias is not None for lora in adapter.loras):
        return "has biases beside its factors (lora_bias)"
    if adapter.target_parameters or any(lora.depth for lora in adapter.loras):
        return "acts on parameters that hold several experts (target_parameters)"
    if any(".experts." in lora.module for lora in adapter.loras):
        return "acts on single experts, which see tokens of several rows"
    if any(len(lora.A.shape) > 2 for lora in adapter.loras):
        return "acts on convolutions"
    return None


def check_modules(adapter: Adapter, loras: Sequence[Lora], model: Any) -> None:
    """Raise `MismatchError` if some factors are for modules that the model lacks, or of other shapes."""
    modules = dict(model.named_modules())
    problems = [problem for lora in loras if (problem := _misfit(adapter, lora, modules.get(lora.module)))]
    if problems:
        raise MismatchError(several(f"{adapter.label} on this model", problems), problems)


def alone_by_model(adapter: Adapter, model: Any) -> str | None:
    """Why an adapter cannot share a pass over this model; None if it can.

    Raises:
        MismatchError: it has factors for modules that the model lacks, or of other shapes.
    """
    import torch
    from torch import nn

    check_modules(adapter, adapter.loras, model)
    modules = dict(model.named_modules())
    for lora in adapter.loras:
        module = modules[lora.module]
        if not (isinstance(module, nn.Linear) or type(module) is nn.Embedding or is_conv1d(module)):
            return f"acts on {plain(lora.module)}, a {type(module).__name__}"
        if type(module).__name__ == "NonDynamicallyQuantizableLinear":
            return f"acts on {plain(lora.module)}, which a MultiheadAttention uses without calling it"
    for name in sorted(_copies(adapter)):
        weight, stored = modules[name.removesuffix(".weight")].weight, PlainReader().read(adapter.saved[name])
        if not torch.equal(stored.to(weight), weight):
            return f"stores {plain(name)} whole, and another than the base's"
    return None


def _copies(adapter: Adapter) -> set[str]:
    """Weights stored whole beside their own factors: PEFT copies the base's embedding where it is targeted."""
    return {name for lora in adapter.loras if (name := f"{lora.module}.weight") in adapter.saved}


def stored_names(source: AdapterSource) -> list[str]:
    """The parameters that an adapter stores whole, by their names in the model."""
    if source.adapter is not None:
        return [*source.adapter.saved]
    assert source.path is not None
    return [own_name(name) for name in adapter_files(source.path).tensors]


def other_base(checkpoint: Checkpoint, source: AdapterSource) -> list[str]:
    """A sentence if hashes prove that an adapter was made for another base; it is evaluated all the same."""
    adapter = source.adapter
    if adapter is None:
        return [] if source.path is None else list(note_other_base(checkpoint, adapter_files(source.path)))
    try:
        changes = fit(checkpoint, [adapter])
    except InputError:
        return []  # `fit` knows stored names, and what runs goes by those in memory
    try:
        refuse_by_probe(checkpoint, [adapter], changes)
    except MismatchError as error:
        return [error.message.replace("; --any-base takes it all the same", "")]
    return []


def is_conv1d(module: Any) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _misfit(adapter: Adapter, lora: Lora, module: Any) -> str | None:
    if module is None:
        return f"{adapter.label} has factors for {lora.module!r}, which the model lacks; is it for another base?"
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        return None
    turned = is_conv1d(module) or lora.embedding
    out, wide = reversed(weight.shape) if turned else weight.shape
    if (lora.B.shape[0], lora.A.shape[1]) != (out, wide):
        return (
            f"{adapter.label}: the factors of {lora.module!r} are for {lora.A.shape[1]} to {lora.B.shape[0]} features, "
            f"and the model has {wide} to {out}; is it for another base?"
        )
    return None


def _kind_of(message: str, label: str) -> str:
    """What an error says that an adapter is, without its remedy.

    >>> _kind_of("a is an adapter of type 'IA3', expected 'LORA'; merge it with PEFT.", "a")
    "is an adapter of type 'IA3'"
    """
    start = message.removeprefix(f"{label} ")
    for end in (", so it does", ", expected", "; ", ": virtual"):
        start = start.partition(end)[0]
    return start.rstrip(".")

"""The matrices that are looked at: where each is stored, what acts on it, and which of them were asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import MismatchError, OptionError, UnsupportedError, several
from surgery.families import part_of
from surgery.names import layer_of, natural_key
from surgery.ops.fitting import Contribution, fit
from surgery.ops.slots import check_factored, name_of
from surgery.sites import TARGETS, find_sites, memory_names, select, vocabulary_of
from surgery.upcycling.options import parse_layers

_LAYER = re.compile(r"(?P<before>.*?)(?P<layers>(?:^|\.)[A-Za-z_]+\.\d+)\.(?P<rest>.+)")
_EXPERT = re.compile(r"(experts?(?:\.expert)?[._])\d+")


@dataclass(frozen=True)
class Place:
    """A matrix of the base.

    Attributes:
        name: of the stored tensor, with the number of the expert in brackets where it is one of a stack.
        group, part, layer: see `report.AnalyzedModule`.
        tensor: where it is stored, as a matrix of two dimensions.
        transposed: whether it is stored (in, out).
        factors: for each adapter that acts on it, by position, what its factors add; a sum, where there are several.
    """

    name: str
    group: str
    part: str
    layer: int | None
    tensor: StoredTensor = field(repr=False)
    transposed: bool
    factors: Mapping[int, tuple[Contribution, ...]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.tensor.shape
        return (columns, rows) if self.transposed else (rows, columns)


def places_of_base(base: Checkpoint, targets: str | None, layers: str) -> tuple[Place, ...]:
    """The matrices of a base that `targets` (all linear ones by default) and `layers` choose."""
    chosen, unmatched = select(find_sites(base), "all-linear" if targets is None else targets)
    if unmatched or not chosen:
        raise OptionError(_no_targets(base, targets, unmatched))
    parts = _parts(base)
    pieces = [piece for site in chosen.values() for matrix in site.matrices for piece in matrix]
    found = [_place(base, parts, piece.tensor.name, piece.tensor, piece.transposed) for piece in pieces]
    places = _in_layers(base, _grouped({place.name: place for place in found}.values()), layers)
    unfit = [place.tensor for place in places if not place.tensor.dtype.arithmetic]
    if unfit:
        problems = [
            f"{base.label}: tensor {tensor.name!r} has dtype {tensor.dtype}, whose values are no plain numbers; "
            "dequantise it first, or leave it out with --targets."
            for tensor in unfit
        ]
        raise UnsupportedError(several(base.label, problems), problems)
    return places


def places_of_adapters(
    base: Checkpoint, adapters: Sequence[Adapter], targets: str | None, layers: str
) -> tuple[tuple[Place, ...], list[str]]:
    """The matrices of a base that adapters act on, and names of what else the adapters hold.

    Raises `UnsupportedError` for an adapter whose change is no product of factors, such as a DoRA, and `MismatchError`
    for one that does not fit the base.
    """
    for adapter in adapters:
        check_factored(adapter)
    found: dict[str, Place] = {}
    left_out: list[str] = []
    parts = _parts(base)
    for number, adapter in enumerate(adapters):
        label = name_of(adapter)
        for name, change in fit(base, [adapter]).items():
            if change.rows or not change.blocks:
                left_out.append(f"{name} of {label}")
            # What factors are added to is the base's, or a copy that PEFT stores beside those of an embedding.
            for block in change.blocks:
                tensor = _rows(change.start, block.begin, block.end)
                first = block.contributions[0]
                place = _place(base, parts, name, _as_matrix(tensor, first.shape), first.transposed)
                known = found.setdefault(place.name, place)
                if known.shape != place.shape:
                    raise MismatchError(
                        f"{name} has the shape {list(place.shape)} with {adapter.label} and {list(known.shape)} with "
                        "an adapter before it, so nothing in it can be compared; analyze them one at a time."
                    )
                found[place.name] = replace(known, factors={**known.factors, number: block.contributions})
    places = _grouped(found.values())
    if targets is not None:
        chosen, unmatched = select(find_sites(base), targets)
        if unmatched or not chosen:
            raise OptionError(_no_targets(base, targets, unmatched))
        names = {tensor.name for site in chosen.values() for tensor in site.tensors}
        places = tuple(place for place in places if place.name.partition("[")[0] in names)
        if not places:
            raise OptionError(f"--targets is {targets!r}, which names nothing that the adapters act on.")
    return _in_layers(base, places, layers), left_out


def _no_targets(base: Checkpoint, targets: str | None, unmatched: Sequence[str]) -> str:
    if targets is None:
        return f"{base.label} has no linear layers; name other matrices with --targets: {TARGETS}."
    if not unmatched:
        return f"--targets is {targets!r}, expected {TARGETS}."
    return f"--targets: {base.label} has nothing called {', '.join(map(repr, unmatched))}; expected {TARGETS}."


def _parts(base: Checkpoint) -> dict[str, str]:
    """The part of the model that each stored tensor belongs to."""
    vocabulary = vocabulary_of(base)
    return {
        stored: part_of(memory, base.tensors[stored].shape, vocabulary) for stored, memory in memory_names(base).items()
    }


def _place(base: Checkpoint, parts: Mapping[str, str], name: str, tensor: StoredTensor, transposed: bool) -> Place:
    """A stored tensor, or a slice of one, that an output would store as `name`."""
    whole = base.tensors.get(tensor.name, tensor)
    # A head that the base ties to its embedding has no tensor of that name.
    part = parts.get(name, "head")
    expert = f"[{(tensor.offset - whole.offset) // tensor.nbytes}]" if tensor.nbytes < whole.nbytes else ""
    return Place(name + expert, "", part, layer_of(name), _as_matrix(tensor, tensor.shape), transposed)


def _rows(tensor: StoredTensor, begin: int, end: int) -> StoredTensor:
    """Rows of a stored tensor seen as a matrix: the whole, or one expert of a stack."""
    if (begin, end) == (0, tensor.rows):
        return tensor
    width = tensor.dtype.nbytes((tensor.columns,))
    shape = (end - begin, tensor.columns)
    return replace(tensor, shape=shape, offset=tensor.offset + begin * width, is_slice=True)


def _as_matrix(tensor: StoredTensor, shape: Sequence[int]) -> StoredTensor:
    """A stored tensor of two dimensions: a convolution of `shape` (out, in, *kernel) becomes (out, in * kernel)."""
    return tensor if len(tensor.shape) == 2 else replace(tensor, shape=(shape[0], prod(shape[1:])), is_slice=True)


def _in_layers(base: Checkpoint, places: tuple[Place, ...], layers: str) -> tuple[Place, ...]:
    """The places that lie in the layers that `--layers` chooses; all of them, with those outside of layers, for all."""
    if layers == "all":
        return places
    numbers = [number for name in base.tensors if (number := layer_of(name)) is not None]
    if not numbers:
        raise OptionError(f"--layers is {layers!r}, but {base.label} has no numbered layers; leave it out.")
    wanted = parse_layers(layers, max(numbers) + 1)
    chosen = tuple(place for place in places if place.layer in wanted)
    if not chosen:
        raise OptionError(f"--layers is {layers!r}, and nothing that was chosen to be looked at lies there.")
    return chosen


def _grouped(places: Iterable[Place]) -> tuple[Place, ...]:
    """The places in natural order, each with its group: what is left of the name without layer, expert and weight."""
    ordered = sorted(places, key=lambda place: natural_key(place.name))
    stacks = {word for place in ordered for word in ("encoder", "decoder") if place.name.startswith(f"{word}.")}
    return tuple(replace(place, group=_group(place, len(stacks) > 1)) for place in ordered)


def _group(place: Place, several_stacks: bool) -> str:
    name = _EXPERT.sub(r"\1*", place.name.partition("[")[0].removesuffix(".weight"))
    if place.layer is None:
        return name
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    stack = f"{name.partition('.')[0]} " if several_stacks and name.startswith(("encoder.", "decoder.")) else ""
    return stack + match["rest"]

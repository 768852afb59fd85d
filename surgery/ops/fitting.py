"""Fitting adapters to a base: which stored tensors change, and what each adapter contributes to them.

Works from headers alone. An adapter names modules as transformers 5 has them in memory, or as the checkpoint stores
them, with or without the prefix under which a task model keeps its base model; one of these readings has to place every
factor, or the adapter is refused with everything that does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from surgery.adapter import Adapter, Lora, TokenRows
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import MismatchError, several
from surgery.families import FAMILIES, family_of, part_of
from surgery.names import natural_key
from surgery.peft_format import nesting_key
from surgery.sites import Kind, Piece, Site, find_sites, memory_names, vocabulary_of

_ONE_EXPERT = re.compile(r"(?P<module>.*\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)")
_PROJECTIONS = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}


HEAD = "lm_head.weight"


def head_tied_to(base: Checkpoint) -> StoredTensor | None:
    """The embedding that a decoder uses as its output head as well, without storing a head; None where there is one.

    Encoder-decoders are left out: T5 scales its output only while the head is tied, so the two cannot be told apart.
    """
    tied = base.text_config.get("tie_word_embeddings", base.config.get("tie_word_embeddings", True))
    causal = base.architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    if HEAD in base.tensors or not tied or not causal or base.config.get("is_encoder_decoder"):
        return None
    vocabulary = vocabulary_of(base)
    found = [
        tensor
        for name, tensor in base.tensors.items()
        if len(tensor.shape) == 2 and tensor.shape[0] == vocabulary and part_of(name, tensor.shape) == "embeddings"
    ]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Contribution:
    """What one LoRA adds to a block of a stored tensor.

    With B (out, r) and A (r, in) of one expert, the block is rows `begin` to `end` of scale * B A, or of its transpose
    where the weight is stored (in, out) and where it is an embedding.

    Attributes:
        adapter: position of the adapter among those given.
        lora: the stored factors.
        scale: weight * alpha / r, see `Adapter.scale`.
        expert, experts: which slice of the stacked factors, and of how many.
        begin, end: rows of the (out, in) matrix that the block holds.
        transposed: whether the block stores their transpose.
        shape: shape of a convolution's weight; empty for everything else.
        is_bias: the contribution is scale * lora_B.bias, to a bias.
    """

    adapter: int
    lora: Lora
    scale: float
    expert: int = 0
    experts: int = 1
    begin: int = 0
    end: int = 0
    transposed: bool = False
    shape: tuple[int, ...] = ()
    is_bias: bool = False

    @property
    def is_dora(self) -> bool:
        return self.lora.magnitude is not None and not self.is_bias

    @property
    def needs_whole(self) -> bool:
        """Whether it cannot be computed some rows at a time: a norm along stored columns, a convolution, a vector."""
        return bool(self.shape) or self.is_bias or (self.is_dora and self.transposed)


@dataclass(frozen=True)
class Block:
    """Rows `begin` to `end` of a stored tensor, seen as a matrix, and what changes them, in order of the adapters."""

    begin: int
    end: int
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True)
class Change:
    """A stored tensor that changes, or that is new.

    Attributes:
        name: its stored name.
        base: what the base stores under it, or None for a new tensor.
        start: what the contributions are added to: the base's tensor, or one that an adapter puts in its place.
        rows: rows that an adapter replaces before anything is added.
        blocks: what is added, by rows; empty where `start` is all.
    """

    name: str
    base: StoredTensor | None
    start: StoredTensor
    rows: tuple[TokenRows, ...] = ()
    blocks: tuple[Block, ...] = ()


class _Directory:
    """The base's sites and parameters, under every name an adapter may use."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.sites = find_sites(base)
        self.tied_head = head_tied_to(base)
        self.known_family = any(base.model_type in family.model_types for family in FAMILIES)
        self.parameters = {memory: stored for stored, memory in memory_names(base).items()}
        self.stacks: dict[str, list[Site]] = {}
        for site in self.sites.values():
            if site.kind is Kind.PARAMETER:
                self.stacks.setdefault(site.module, []).append(site)
        for stack in self.stacks.values():
            stack.sort(key=lambda site: nesting_key(site.name))

    def site(self, lora: Lora, name: str, targets: Sequence[str]) -> Site | None:
        """The site that a LoRA acts on if its module is called `name`."""
        if (site := self.sites.get(name)) is not None and site.kind is not Kind.PARAMETER:
            return site
        if name in self.stacks:
            named = [s for s in self.stacks[name] if any(s.name == t or s.name.endswith(f".{t}") for t in targets)]
            place = len(named) - 1 - lora.depth
            return named[place] if 0 <= place < len(named) else None
        return self._stored(name) or self._one_expert(name) or self._tied(name)

    def _stored(self, name: str) -> Site | None:
        for parameter in ("weight", "in_proj_weight"):  # the latter is torch's own MultiheadAttention
            tensor = self.base.tensors.get(f"{name}.{parameter}")
            if tensor is not None and len(tensor.shape) >= 2:
                kernel = tensor.shape[2:]
                out, wide = tensor.shape[0], prod(tensor.shape[1:])
                kind = Kind.CONV if kernel else Kind.LINEAR
                return Site(name, kind, "other", ((Piece(tensor, 0, out),),), out, wide, kernel)
        return None

    def _one_expert(self, name: str) -> Site | None:
        """One projection of one expert, where the base stores them fused or the adapter uses in-memory names."""
        match = _ONE_EXPERT.fullmatch(name)
        if match is None or match["projection"] not in _PROJECTIONS:
            return None
        parameter, half = _PROJECTIONS[match["projection"]]
        stack = self.sites.get(f"{match['module']}.{parameter}")
        number = int(match["expert"])
        if stack is None or number >= len(stack.matrices):
            return None
        pieces = stack.matrices[number]
        if half is None:
            return Site(name, Kind.LINEAR, "experts", (pieces,), stack.out_features, stack.in_features)
        if len(pieces) == 2:
            piece = pieces[half]
            own = Piece(piece.tensor, 0, piece.end - piece.begin, piece.transposed)
            return Site(name, Kind.LINEAR, "experts", ((own,),), own.end, stack.in_features)
        return None  # a fused tensor that holds both halves: the fused adapter is the one that fits it

    def _tied(self, name: str) -> Site | None:
        """The output head, where the base has it tied to its embedding and stores nothing of its own."""
        if self.tied_head is None or f"{name}.weight" != HEAD:
            return None
        out, wide = self.tied_head.shape
        return Site(name, Kind.LINEAR, "head", ((Piece(self.tied_head, 0, out),),), out, wide)

    def parameter(self, name: str) -> str | None:
        """The stored name of a parameter."""
        if name == HEAD and self.tied_head is not None:
            return HEAD
        return self.parameters.get(name) or (name if name in self.base.tensors else None)


Reading = Callable[[str], str]


def _readings(base: Checkpoint) -> list[Reading]:
    """Ways to read the module names of an adapter, most literal first."""
    prefix = family_of(base.model_type).base_prefix
    prefixes = [prefix] if prefix else []
    first = {name.split(".", 1)[0] for name in base.tensors if "." in name}
    prefixes += [next(iter(first))] if len(first) == 1 and not prefix else []
    readings: list[Reading] = [lambda name: name]
    for one in [*prefixes, "model", "transformer"]:
        readings.append(lambda name, one=one: name.removeprefix(f"{one}."))  # type: ignore[misc]
        readings.append(lambda name, one=one: f"{one}.{name}")  # type: ignore[misc]
    readings += [
        lambda name: re.sub(r"^model\.(?!language_model\.)", "model.language_model.", name),
        lambda name: re.sub(r"^model\.(?!language_model\.)", "language_model.model.", name),
        lambda name: name.replace("model.language_model.", "model.", 1),
        lambda name: name.replace("language_model.model.", "model.", 1),
    ]
    return readings


def fit(base: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, Change]:
    """Place every tensor of every adapter. Raises `MismatchError` naming all that do not fit."""
    directory = _Directory(base)
    blocks: dict[str, dict[tuple[int, int], list[Contribution]]] = {}
    saved: dict[str, StoredTensor] = {}
    rows: dict[str, list[TokenRows]] = {}
    problems: list[str] = []
    for number, adapter in enumerate(adapters):
        reading = _best_reading(directory, adapter)
        for lora in adapter.loras:
            problems += _place_lora(directory, adapter, number, lora, reading, blocks)
        for name, tensor in adapter.saved.items():
            problems += _place_saved(directory, adapter, name, tensor, reading, saved)
        for module, replaced in adapter.tokens.items():
            stored = directory.parameter(reading(f"{module}.weight"))
            if stored is None:
                problems.append(f"{adapter.label}: {base.label} has no embedding {module!r} for its replaced rows.")
            else:
                rows.setdefault(stored, []).append(replaced)
    if problems:
        raise MismatchError(several(f"fitting onto {base.label}", problems), problems)
    changes = {}
    for name in sorted({*blocks, *saved, *rows}, key=natural_key):
        own = base.tensors.get(name)
        start = saved.get(name, own) or directory.tied_head
        assert start is not None
        ordered = tuple(Block(b, e, tuple(found)) for (b, e), found in sorted(blocks.get(name, {}).items()))
        changes[name] = Change(name, own, start, tuple(rows.get(name, ())), ordered)
    return changes


def _best_reading(directory: _Directory, adapter: Adapter) -> Reading:
    """The first reading that places every LoRA (or, without any, every saved tensor); else the one that places most."""

    def placed(reading: Reading) -> int:
        if not adapter.loras:
            return sum(directory.parameter(reading(name)) is not None for name in adapter.saved)
        targets = adapter.target_parameters
        return sum(directory.site(lora, reading(lora.module), targets) is not None for lora in adapter.loras)

    readings = _readings(directory.base)
    wanted = len(adapter.loras) or len(adapter.saved)
    best, best_count = readings[0], -1
    for reading in readings:
        if (count := placed(reading)) > best_count:
            best, best_count = reading, count
        if best_count == wanted:
            break
    return best


def _place_lora(
    directory: _Directory,
    adapter: Adapter,
    number: int,
    lora: Lora,
    reading: Reading,
    blocks: dict[str, dict[tuple[int, int], list[Contribution]]],
) -> list[str]:
    name = reading(lora.module)
    site = directory.site(lora, name, adapter.target_parameters)
    if site is None:
        return [f"{adapter.label}: {directory.base.label} has no module {lora.module!r}; is it the adapter's base?"]
    experts = len(site.matrices) if site.kind is Kind.PARAMETER else 1
    key = site.name if site.kind is Kind.PARAMETER else lora.module
    rank, left = divmod(lora.A.shape[0], experts)
    transposed = _transposed(directory, adapter, lora, site)
    out, wide = (site.in_features, site.out_features) if lora.embedding else (site.out_features, site.in_features)
    expected_A, expected_B = (rank * experts, wide), (out, rank * experts)
    found_A, found_B = (lora.A.shape[0], prod(lora.A.shape[1:])), (lora.B.shape[0], prod(lora.B.shape[1:]))
    if left or (found_A, found_B) != (expected_A, expected_B):
        return [
            f"{adapter.label}: the factors of {lora.module!r} are {list(lora.A.shape)} and {list(lora.B.shape)}, but "
            f"{directory.base.label} has a weight of {_shape(site)} there; is it the adapter's base?"
        ]
    if not adapter.expected_rank(key, rank):
        return [f"{adapter.label}: {lora.module!r} has rank {rank}, which adapter_config.json does not give it."]
    if lora.magnitude is not None and prod(lora.magnitude.shape) != out:
        return [f"{adapter.label}: the magnitude of {lora.module!r} is {list(lora.magnitude.shape)}, expected {out}."]
    unfit = next((tensor for tensor in site.tensors if not tensor.dtype.arithmetic), None)
    if unfit is not None:
        return [f"{directory.base.label}: tensor {unfit.name!r} has dtype {unfit.dtype}, which cannot be added to."]
    scale = adapter.scale(key, rank)
    for expert, matrix in enumerate(site.matrices):
        for piece in matrix:
            contribution = Contribution(
                adapter=number,
                lora=lora,
                scale=scale,
                expert=expert,
                experts=experts,
                begin=piece.begin,
                end=piece.end,
                transposed=lora.embedding or transposed,
                shape=piece.tensor.shape if site.kind is Kind.CONV else (),
            )
            output = HEAD if site.part == "head" and piece.tensor is directory.tied_head else piece.tensor.name
            blocks.setdefault(output, {}).setdefault(_rows(directory.base, piece.tensor), []).append(contribution)
    return _place_bias(directory, adapter, number, lora, site, scale, blocks)


def _rows(base: Checkpoint, tensor: StoredTensor) -> tuple[int, int]:
    """The rows of a stored tensor that a slice of it holds; all of them for the tensor itself."""
    first = (tensor.offset - base.tensors[tensor.name].offset) // tensor.nbytes * tensor.rows if tensor.is_slice else 0
    return first, first + tensor.rows


def _place_bias(
    directory: _Directory,
    adapter: Adapter,
    number: int,
    lora: Lora,
    site: Site,
    scale: float,
    blocks: dict[str, dict[tuple[int, int], list[Contribution]]],
) -> list[str]:
    if lora.bias is None:
        return []
    weight = directory.base.tensors[site.matrices[0][0].tensor.name]
    bias = directory.base.tensors.get(f"{weight.name.rpartition('.')[0]}.bias")
    if bias is None or bias.shape != lora.bias.shape:
        return [f"{adapter.label}: {lora.module!r} brings a lora_bias, but {directory.base.label} has no bias there."]
    blocks.setdefault(bias.name, {}).setdefault((0, 1), []).append(Contribution(number, lora, scale, is_bias=True))
    return []


def _transposed(directory: _Directory, adapter: Adapter, lora: Lora, site: Site) -> bool:
    """Whether the weight is stored (in, out): by the family's table, for an unknown family by the adapter's flag."""
    known = site.matrices[0][0].transposed
    if known or directory.known_family or lora.embedding or site.kind is not Kind.LINEAR:
        return known
    fits = (lora.A.shape[1], lora.B.shape[0]) == site.matrices[0][0].tensor.shape
    return bool(adapter.config.get("fan_in_fan_out")) and fits


def _shape(site: Site) -> str:
    experts = f"{len(site.matrices)} times " if len(site.matrices) > 1 else ""
    return f"{experts}{[site.out_features, site.in_features]}"


def _place_saved(
    directory: _Directory,
    adapter: Adapter,
    name: str,
    tensor: StoredTensor,
    reading: Reading,
    saved: dict[str, StoredTensor],
) -> list[str]:
    stored = directory.parameter(reading(name)) or directory.parameter(name)
    if stored == HEAD and directory.tied_head is not None:
        pass
    elif stored is None:
        modules = adapter.config.get("modules_to_save")
        listed = isinstance(modules, list) and any(isinstance(m, str) and f".{m}." in f".{name}" for m in modules)
        if not listed:
            return [f"{adapter.label}: {directory.base.label} has no parameter {name!r}; is it the adapter's base?"]
        stored = name  # a new head, such as a classifier
    else:
        old = directory.base.tensors[stored].shape
        if old != tensor.shape and not (len(old) == len(tensor.shape) == 2 and old[1] == tensor.shape[1]):
            return [
                f"{adapter.label}: parameter {name!r} has shape {list(tensor.shape)}, but {directory.base.label} has "
                f"{list(old)}; is it the adapter's base?"
            ]
    if stored in saved:
        return [f"{adapter.label}: {name!r} is replaced by another adapter too; merge one of them at a time."]
    saved[stored] = tensor
    return []


def used_tensors(changes: Iterable[Change]) -> list[StoredTensor]:
    """Every adapter tensor that some changes read, each once."""
    found: dict[tuple[str, str, int, str], StoredTensor] = {}
    for change in changes:
        for block in change.blocks:
            for contribution in block.contributions:
                found |= {tensor.key: tensor for tensor in contribution.lora.tensors}
        found |= {replaced.values.key: replaced.values for replaced in change.rows}
        if change.start is not change.base:
            found[change.start.key] = change.start
    return list(found.values())

"""Fitting adapters to a base: which stored tensors change, and what each adapter contributes to them.

Works from headers alone. An adapter names modules as transformers 5 has them in memory, or as the checkpoint stores
them, with or without the prefix under which a task model keeps its base model; one of these readings has to place every
factor, or the adapter is refused with everything that does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from surgery.adapter import Adapter, Lora, TokenRows
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import MismatchError, several
from surgery.hashing import hash_as, hash_tensor
from surgery.names import natural_key
from surgery.ops.directory import HEAD, Directory, Reading, best_reading
from surgery.sites import Kind, Piece, Site


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


Blocks = dict[str, dict[tuple[int, int], list[Contribution]]]


def fit(
    base: Checkpoint, adapters: Sequence[Adapter], base_hash: Callable[[StoredTensor], str] | None = hash_tensor
) -> dict[str, Change]:
    """Place every tensor of every adapter. Raises `MismatchError` naming all that do not fit.

    Args:
        base: what the adapters are for.
        adapters: in the order in which they are added.
        base_hash: the hash of one of the base's tensors; another than that of its bytes where `base` is a merged
            checkpoint seen as its base. With None no data are read, and a copy of one of the base's tensors counts as
            one that takes its place.
    """
    directory = Directory(base)
    blocks: Blocks = {}
    saved: dict[str, StoredTensor] = {}
    rows: dict[str, list[TokenRows]] = {}
    problems: list[str] = []
    readings = [best_reading(directory, adapter) for adapter in adapters]
    for adapter, reading in zip(adapters, readings, strict=True):
        for name, tensor in adapter.saved.items():
            problems += _place_saved(directory, adapter, name, tensor, reading, saved, base_hash)
    for number, (adapter, reading) in enumerate(zip(adapters, readings, strict=True)):
        for module, replaced in adapter.tokens.items():
            problems += _place_rows(directory, adapter, module, replaced, reading, saved, rows, blocks)
        for lora in adapter.loras:
            problems += _place_lora(directory, adapter, number, lora, reading, saved, blocks)
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


def _place_lora(
    directory: Directory,
    adapter: Adapter,
    number: int,
    lora: Lora,
    reading: Reading,
    saved: Mapping[str, StoredTensor],
    blocks: Blocks,
) -> list[str]:
    name = reading(lora.module)
    site = directory.site(lora, name, adapter.target_parameters)
    if site is None:
        return [f"{adapter.label}: {directory.base.label} has no module {lora.module!r}; is it the adapter's base?"]
    experts = len(site.matrices) if site.kind is Kind.PARAMETER else 1
    key = _pattern_key(adapter, lora, site)
    rank, left = divmod(lora.A.shape[0], experts)
    flagged = _is_flagged(directory, adapter, lora, site)
    rows, columns = site.out_features, site.in_features
    if flagged:
        rows, columns = columns, rows
    resized = saved.get(_output(directory, site.matrices[0][0])) if len(site.tensors) == 1 else None
    if resized is not None:  # a vocabulary of another size: what the adapter brings is what its factors are for
        rows = resized.shape[0]
    out, wide = (columns, rows) if lora.embedding else (rows, columns)
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
            whole = len(site.tensors) == 1
            contribution = Contribution(
                adapter=number,
                lora=lora,
                scale=scale,
                expert=expert,
                experts=experts,
                begin=0 if whole else piece.begin,
                end=rows if whole else piece.end,
                transposed=lora.embedding or piece.transposed or flagged,
                shape=piece.tensor.shape if site.kind is Kind.CONV else (),
            )
            place = (0, resized.rows) if resized is not None else _rows(directory.base, piece.tensor)
            blocks.setdefault(_output(directory, piece), {}).setdefault(place, []).append(contribution)
    return _place_bias(directory, adapter, number, lora, site, scale, blocks)


def _output(directory: Directory, piece: Piece) -> str:
    """The name under which the output stores a piece of a site: its own, or the head's where the base ties that."""
    tied = directory.tied_head
    return HEAD if tied is not None and piece.is_head and piece.tensor is tied else piece.tensor.name


def _pattern_key(adapter: Adapter, lora: Lora, site: Site) -> str:
    """What PEFT matches `rank_pattern` and `alpha_pattern` with: the parameter where that is targeted, or the module.

    A linear layer's weight can be named in `target_parameters` too.
    """
    if site.kind is Kind.PARAMETER:
        return site.name
    weight = f"{lora.module}.weight"
    targeted = any(f".{weight}".endswith(f".{target}") for target in adapter.target_parameters)
    return weight if targeted else lora.module


def _rows(base: Checkpoint, tensor: StoredTensor) -> tuple[int, int]:
    """The rows of a stored tensor that a slice of it holds; all of them for the tensor itself."""
    first = (tensor.offset - base.tensors[tensor.name].offset) // tensor.nbytes * tensor.rows if tensor.is_slice else 0
    return first, first + tensor.rows


def _place_bias(
    directory: Directory,
    adapter: Adapter,
    number: int,
    lora: Lora,
    site: Site,
    scale: float,
    blocks: Blocks,
) -> list[str]:
    if lora.bias is None:
        return []
    weight = directory.base.tensors[site.matrices[0][0].tensor.name]
    bias = directory.base.tensors.get(f"{weight.name.rpartition('.')[0]}.bias")
    if bias is None or bias.shape != lora.bias.shape:
        return [f"{adapter.label}: {lora.module!r} brings a lora_bias, but {directory.base.label} has no bias there."]
    blocks.setdefault(bias.name, {}).setdefault((0, 1), []).append(Contribution(number, lora, scale, is_bias=True))
    return []


def _is_flagged(directory: Directory, adapter: Adapter, lora: Lora, site: Site) -> bool:
    """Whether only the adapter's `fan_in_fan_out` says that a weight is stored (in, out): its family is not known."""
    known = site.matrices[0][0].transposed or directory.known_family
    if known or lora.embedding or site.kind is not Kind.LINEAR:
        return False
    fits = (lora.A.shape[1], lora.B.shape[0]) == site.matrices[0][0].tensor.shape
    return bool(adapter.config.get("fan_in_fan_out")) and fits


def _shape(site: Site) -> str:
    experts = f"{len(site.matrices)} times " if len(site.matrices) > 1 else ""
    return f"{experts}{[site.out_features, site.in_features]}"


def _place_saved(
    directory: Directory,
    adapter: Adapter,
    name: str,
    tensor: StoredTensor,
    reading: Reading,
    saved: dict[str, StoredTensor],
    base_hash: Callable[[StoredTensor], str] | None,
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
    if _is_copy(tensor, directory.base.tensors.get(stored), base_hash):
        return []
    if stored in saved:
        return [f"{adapter.label}: {name!r} is replaced by another adapter too; merge one of them at a time."]
    saved[stored] = tensor
    return []


def _is_copy(tensor: StoredTensor, own: StoredTensor | None, base_hash: Callable[[StoredTensor], str] | None) -> bool:
    """Whether an adapter's tensor is the base's own: PEFT stores the embeddings and heads that it wraps, too.

    Told by its key, and then by its values in the base's dtype.
    """
    if base_hash is None or own is None or ".base_layer." not in tensor.name or tensor.shape != own.shape:
        return False
    if not (tensor.dtype.arithmetic and own.dtype.arithmetic):
        return False
    found = hash_tensor(tensor) if tensor.dtype == own.dtype else hash_as(tensor, own.dtype)
    return found == base_hash(own)


def _place_rows(
    directory: Directory,
    adapter: Adapter,
    module: str,
    replaced: TokenRows,
    reading: Reading,
    saved: Mapping[str, StoredTensor],
    rows: dict[str, list[TokenRows]],
    blocks: Blocks,
) -> list[str]:
    stored = directory.parameter(reading(f"{module}.weight"))
    if stored is None:
        return [f"{adapter.label}: {directory.base.label} has no embedding {module!r} for its replaced rows."]
    whole = saved.get(stored) or directory.base.tensors.get(stored) or directory.tied_head
    assert whole is not None
    values, indices = replaced.values, replaced.indices
    where = f"{adapter.label}: the replaced rows of {module!r}"
    if not values.dtype.arithmetic or values.shape != (len(indices), whole.columns):
        return [
            f"{where} are {values.dtype} {list(values.shape)}, expected [{len(indices)}, {whole.columns}]: as many as "
            "trainable_token_indices names."
        ]
    if len(set(indices)) != len(indices) or max(indices, default=0) >= whole.rows:
        return [f"{where} are rows {list(indices)[:8]}, expected different ones below {whole.rows}."]
    if stored in blocks:
        return [
            f"{where} would replace what an adapter before it adds to them; merge one after the other, in two commands."
        ]
    rows.setdefault(stored, []).append(replaced)
    return []

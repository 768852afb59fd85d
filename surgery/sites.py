"""Sites: the places of a model that an adapter can act on, and where each lies in the stored checkpoint.

A site has the name and orientation that transformers 5 and PEFT give it in memory. Its weight is one matrix, or one for
each expert; each matrix is made of pieces of stored tensors: one tensor as a rule, `w1` over `w3` for a fused
`gate_up_proj`, a slice of a stored stack for an expert.

    out, in: features of the layer, so that its matrix is (out, in) and a LoRA has A (rank, in) and B (out, rank)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import prod

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.families import CONV1D, Family, family_of, part_of
from surgery.names import natural_key, split_parameter
from surgery.patterns import compile_pattern


class Kind(Enum):
    """How PEFT addresses and shapes a LoRA at a site."""

    LINEAR = "linear"  # target_modules; A (r, in), B (out, r)
    EMBEDDING = "embedding"  # target_modules; lora_embedding_A (r, rows), lora_embedding_B (columns, r)
    CONV = "conv"  # target_modules; A (r, in, *kernel), B (out, r, 1, ...)
    PARAMETER = "parameter"  # target_parameters: routers and stacked experts; A (E*r, in), B (out, r*E)


@dataclass(frozen=True)
class Piece:
    """Rows `begin` to `end` of a site's (out, in) matrix, stored as a tensor or as a slice of one.

    With `transposed` the stored matrix is (in, out) of those rows. With `is_head` it is an embedding that serves as the
    output head.
    """

    tensor: StoredTensor
    begin: int
    end: int
    transposed: bool = False
    is_head: bool = False


@dataclass(frozen=True)
class Site:
    """One place for an adapter.

    Attributes:
        name: in-memory module, or module and parameter for `Kind.PARAMETER`.
        kind: how PEFT addresses it.
        part: one of `families.PARTS`.
        matrices: the pieces of each matrix: one matrix, or one for each expert.
        out_features, in_features: shape of each matrix; for a convolution `in_features` spans input and kernel.
        kernel: spatial shape of a convolution, empty otherwise.
    """

    name: str
    kind: Kind
    part: str
    matrices: tuple[tuple[Piece, ...], ...] = field(repr=False)
    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The stored tensors (or slices) it is made of, in order."""
        return tuple(piece.tensor for matrix in self.matrices for piece in matrix)

    @property
    def parameters(self) -> int:
        return len(self.matrices) * self.out_features * self.in_features

    @property
    def module(self) -> str:
        """The module that PEFT wraps: the site itself, or what holds the parameter."""
        return split_parameter(self.name)[0] if self.kind is Kind.PARAMETER else self.name


def vocabulary_of(checkpoint: Checkpoint) -> int | None:
    """`vocab_size` of the config, or of the text model within it."""
    value = checkpoint.text_config.get("vocab_size")
    return value if isinstance(value, int) else None


def memory_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Stored parameter name to in-memory name, before experts are stacked."""
    family = family_of(checkpoint.model_type)
    return {stored: family.in_memory(stored) for stored in checkpoint.tensors}


def find_sites(checkpoint: Checkpoint) -> dict[str, Site]:
    """Every site of a checkpoint by name, in natural order. Needs no table row; see `families` for what one adds."""
    family = family_of(checkpoint.model_type)
    vocabulary = vocabulary_of(checkpoint)
    transposed = _transposed_names(checkpoint, family)
    sites: list[Site] = []
    stacked: dict[str, dict[int, dict[str, StoredTensor]]] = {}
    for stored, tensor in checkpoint.tensors.items():
        name = family.in_memory(stored)
        if family.experts is not None and (match := family.experts.pattern.fullmatch(name)):
            stack = stacked.setdefault(match["module"], {})
            stack.setdefault(int(match["expert"]), {})[match["projection"]] = tensor
        elif (site := _single(name, tensor, family, vocabulary, stored in transposed)) is not None:
            sites.append(site)
    if family.experts is not None:
        for module, experts in stacked.items():
            sites += _stacks(module, experts, family.experts.fused)
    return {site.name: site for site in sorted(sites, key=lambda site: natural_key(site.name))}


def _transposed_names(checkpoint: Checkpoint, family: Family) -> set[str]:
    """Stored matrices that are (in, out), by the family's table; for an unknown family by the lengths of its biases.

    A bias has one value for each output feature. Square matrices tell nothing, so where GPT-2's names are among those
    that do, all of GPT-2's names count.
    """
    tensors = checkpoint.tensors
    if checkpoint.model_type in family.model_types:
        return {
            n for n in tensors if family.transposed is not None and family.transposed.fullmatch(family.in_memory(n))
        }
    proven = set()
    for name, tensor in tensors.items():
        bias = tensors.get(f"{split_parameter(name)[0]}.bias")
        if name.endswith(".weight") and len(tensor.shape) == 2 and bias is not None and bias.shape == tensor.shape[1:]:
            proven |= {name} if tensor.shape[0] != tensor.shape[1] else set()
    return proven | {n for n in tensors if proven and CONV1D.fullmatch(n)}


def _single(name: str, tensor: StoredTensor, family: Family, vocabulary: int | None, transposed: bool) -> Site | None:
    module, parameter = split_parameter(name)
    shape = tensor.shape
    if len(shape) < 2 or not module or 0 in shape:
        return None
    part = part_of(name, shape, vocabulary)
    if part == "biases":
        return None
    if len(shape) == 3 and part != "convolutions":
        return _stored_stack(name, tensor, part, family.transposed_stacks) if part == "experts" else None
    if parameter != "weight":
        return None  # a bare matrix, such as a position table or a state-space A_log: no layer that PEFT could wrap
    if part == "convolutions":
        out, wide = shape[0], prod(shape[1:])
        return Site(module, Kind.CONV, part, ((Piece(tensor, 0, out),),), out, wide, shape[2:])
    if len(shape) != 2:
        return None
    out, wide = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    pieces = ((Piece(tensor, 0, out, transposed),),)
    if family.routers is not None and family.routers.fullmatch(module):
        return Site(name, Kind.PARAMETER, "router", pieces, out, wide)
    kind = Kind.EMBEDDING if part == "embeddings" else Kind.LINEAR
    return Site(module, kind, part, pieces, out, wide)


def _stored_stack(name: str, tensor: StoredTensor, part: str, transposed: bool) -> Site:
    count, first, second = tensor.shape
    out, wide = (second, first) if transposed else (first, second)
    matrices = tuple((Piece(tensor[number], 0, out, transposed),) for number in range(count))
    return Site(name, Kind.PARAMETER, part, matrices, out, wide)


def _stacks(
    module: str, experts: Mapping[int, Mapping[str, StoredTensor]], fused: Iterable[tuple[str, tuple[str, ...]]]
) -> list[Site]:
    sites = []
    for parameter, projections in fused:
        matrices = []
        for number in sorted(experts):
            parts = [experts[number].get(projection) for projection in projections]
            pieces, begin = [], 0
            for tensor in parts:
                if tensor is None or len(tensor.shape) != 2:
                    break
                pieces.append(Piece(tensor, begin, begin + tensor.shape[0]))
                begin += tensor.shape[0]
            if len(pieces) == len(projections):
                matrices.append(tuple(pieces))
        shapes = {(matrix[-1].end, matrix[0].tensor.shape[1]) for matrix in matrices}
        if len(matrices) == len(experts) == max(experts) + 1 and len(shapes) == 1:
            ((out, wide),) = shapes
            sites.append(Site(f"{module}.{parameter}", Kind.PARAMETER, "experts", tuple(matrices), out, wide))
        else:  # experts of different shapes, or some missing: each projection stands for itself
            for number, projected in experts.items():
                for projection, tensor in projected.items():
                    if len(tensor.shape) == 2 and projection in projections:
                        out, wide = tensor.shape
                        name = f"{module}.{number}.{projection}"
                        sites.append(Site(name, Kind.LINEAR, "experts", ((Piece(tensor, 0, out),),), out, wide))
    return sites


# --targets ------------------------------------------------------------------------------------------------------------

_WORDS = {
    "all-linear": ("attention", "mlp", "experts", "router", "other"),
    "attention": ("attention",),
    "mlp": ("mlp", "experts"),
    "experts": ("experts",),
    "router": ("router",),
    "embeddings": ("embeddings",),
    "head": ("head",),
    "convolutions": ("convolutions",),
}

# What an item may be, for a sentence that asks for one.
TARGETS = f"{', '.join(_WORDS)}, a suffix such as q_proj, or re:PATTERN"


def select(sites: Mapping[str, Site], targets: str) -> tuple[dict[str, Site], list[str]]:
    """The sites that a `--targets` value names, and the items of it that name none.

    `targets` is a comma-separated list; each item is a family word (`all-linear`, `attention`, `mlp`, `experts`,
    `router`, `embeddings`, `head`, `convolutions`), a suffix of a module name (`q_proj`), or `re:PATTERN`, matched in
    full. A pattern may hold commas if it comes last. Names are in-memory or stored ones.
    """
    chosen: dict[str, Site] = {}
    unmatched = []
    for item in _items(targets):
        found = {name: site for name, site in sites.items() if _named_by(site, item)}
        chosen |= found
        if not found:
            unmatched.append(item)
    return {name: site for name, site in sites.items() if name in chosen}, unmatched


def _items(targets: str) -> list[str]:
    plain, separator, pattern = targets.partition("re:")
    items = [item.strip() for item in plain.split(",") if item.strip()]
    return [*items, f"re:{pattern}"] if separator else items


def _named_by(site: Site, item: str) -> bool:
    if item in _WORDS:
        linear = item != "all-linear" or site.kind in (Kind.LINEAR, Kind.PARAMETER)
        return linear and site.part in _WORDS[item]
    names = {site.name, site.module, *(split_parameter(tensor.name)[0] for tensor in site.tensors)}
    if item.startswith("re:"):
        pattern = compile_pattern(item[3:])
        return any(pattern.fullmatch(name) for name in names)
    return any(name == item or name.endswith(f".{item}") for name in names)

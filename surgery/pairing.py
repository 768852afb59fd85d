"""Two checkpoints side by side: which tensor of one is which of the other, and what has no counterpart.

Names are compared as transformers has them in memory, without the prefix under which a task model keeps its base model:
`encoder.layer.0...` of a file saved from BertModel pairs with `bert.encoder.layer.0...`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import UnsupportedError
from surgery.families import Family, family_of, part_of
from surgery.names import natural_key
from surgery.sites import Site, find_sites, vocabulary_of

# Suffixes under which quantised checkpoints keep what their packed weights need to be read.
_QUANTISED_SUFFIXES = (
    ".qweight", ".qzeros", ".SCB", ".absmax", ".quant_map", ".weight_scale", ".weight_scale_inv", ".weight_packed",
    "_blocks", ".scale_inv",
)  # fmt: skip


@dataclass(frozen=True)
class SitePair:
    """The same site in two checkpoints, of one shape; how each stores it may differ."""

    left: Site
    right: Site

    @property
    def name(self) -> str:
        return self.right.name


@dataclass(frozen=True)
class TensorPair:
    """The same parameter in two checkpoints, outside the paired sites; shapes may differ."""

    name: str
    part: str
    left: StoredTensor = field(repr=False)
    right: StoredTensor = field(repr=False)

    @property
    def same_shape(self) -> bool:
        return self.left.shape == self.right.shape


@dataclass(frozen=True)
class Pairing:
    """Everything in two checkpoints, each tensor once. Names are those of the right one in memory, prefix included.

    Attributes:
        sites: sites found on both sides with one shape, by name.
        tensors: other parameters found on both sides, by name.
        left_only, right_only: parameters found on one side only, by name.
        tied: names on one side only for which the other side uses its input embedding, so that nothing is missing; they
            are among `tensors`.
    """

    sites: Mapping[str, SitePair]
    tensors: Mapping[str, TensorPair]
    left_only: Mapping[str, StoredTensor]
    right_only: Mapping[str, StoredTensor]
    tied: tuple[str, ...]


def pair(left: Checkpoint, right: Checkpoint) -> Pairing:
    """Pair what two checkpoints hold: sites by name, whatever files and layout they are in, then the other tensors."""
    ours, theirs = {_bare(left, site.name): site for site in find_sites(left).values()}, find_sites(right)
    sites: dict[str, SitePair] = {}
    for site in theirs.values():
        counterpart = ours.get(_bare(right, site.name))
        if counterpart is not None and _shape(counterpart) == _shape(site):
            name = _with_prefix(right, site.name, site.part)
            sites[name] = SitePair(counterpart, replace(site, name=name))
    # A slice of a stack keeps the name of the stored tensor it belongs to.
    used_left = {tensor.name for found in sites.values() for tensor in found.left.tensors}
    used_right = {tensor.name for found in sites.values() for tensor in found.right.tensors}
    lefts = {_bare(left, name): tensor for name, tensor in _rest(left, used_left).items()}
    rights = {_bare(right, name): tensor for name, tensor in _rest(right, used_right).items()}
    tensors: dict[str, TensorPair] = {}
    left_only: dict[str, StoredTensor] = {}
    right_only: dict[str, StoredTensor] = {}
    for bare in sorted({*lefts, *rights}, key=natural_key):
        ours_here, theirs_here = lefts.get(bare), rights.get(bare)
        owner, tensor = (right, theirs_here) if theirs_here is not None else (left, lefts[bare])
        name = family_of(owner.model_type).in_memory(tensor.name)
        part = part_of(name, tensor.shape, vocabulary_of(owner))
        name = _with_prefix(right, name, part) if owner is right else name
        if ours_here is not None and theirs_here is not None:
            tensors[name] = TensorPair(name, part, ours_here, theirs_here)
        else:
            (left_only if theirs_here is None else right_only)[name] = tensor
    tied = []
    for one_sided, other in ((left_only, right), (right_only, left)):
        for name, tensor in list(one_sided.items()):
            if (embedding := tied_embedding(other, name, tensor)) is not None:
                del one_sided[name]
                tied.append(name)
                sides = (tensor, embedding) if other is right else (embedding, tensor)
                tensors[name] = TensorPair(name, "head", *sides)
    return Pairing(sites, tensors, left_only, right_only, tuple(tied))


def _bare(checkpoint: Checkpoint, name: str) -> str:
    family = family_of(checkpoint.model_type)
    prefix = f"{family.base_prefix}." if family.base_prefix else ""
    return family.in_memory(name).removeprefix(prefix)


def _with_prefix(checkpoint: Checkpoint, name: str, part: str) -> str:
    return name if part == "head" else missing_prefix(checkpoint) + name


def _shape(site: Site) -> tuple[object, ...]:
    return site.kind, len(site.matrices), site.out_features, site.in_features, site.kernel


def _rest(checkpoint: Checkpoint, used: set[str]) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name not in used}


def missing_prefix(checkpoint: Checkpoint) -> str:
    """The prefix that transformers will put before the names of a file saved from a base class, or an empty string.

    A config that names a task class (`GPT2LMHeadModel`) over names without `transformer.` is such a file.
    """
    family: Family = family_of(checkpoint.model_type)
    prefix = f"{family.base_prefix}." if family.base_prefix else ""
    # T5ForConditionalGeneration and its like are their own base models.
    is_task = "For" in checkpoint.architecture or "LMHead" in checkpoint.architecture
    is_task = is_task and not checkpoint.architecture.endswith("ForConditionalGeneration")
    has_prefix = any(name.startswith(prefix) for name in checkpoint.tensors)
    return prefix if prefix and is_task and not has_prefix else ""


def tied_embedding(checkpoint: Checkpoint, name: str, tensor: StoredTensor) -> StoredTensor | None:
    """The input embedding that `checkpoint` uses in place of a head (or embedding) `name` that it does not store."""
    tied = checkpoint.text_config.get("tie_word_embeddings", checkpoint.config.get("tie_word_embeddings", True))
    if not tied or len(tensor.shape) != 2 or part_of(name, tensor.shape, tensor.shape[0]) not in ("head", "embeddings"):
        return None
    embeddings = [
        stored
        for stored in checkpoint.tensors.values()
        if stored.shape == tensor.shape and part_of(stored.name, stored.shape) == "embeddings"
    ]
    return embeddings[0] if len(embeddings) == 1 else None


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raise `UnsupportedError` for a checkpoint whose weights are packed: their numbers are not the stored numbers."""
    found = next((name for name in checkpoint.tensors if name.endswith(_QUANTISED_SUFFIXES)), None)
    settings = checkpoint.config.get("quantization_config")
    if found is None and not settings:
        return
    method = settings.get("quant_method", "?") if isinstance(settings, dict) else "?"
    reason = f"tensor {found!r}" if found else f"quantization_config with quant_method {method!r}"
    raise UnsupportedError(
        f"{checkpoint.label} is quantised ({reason}); use the unquantised checkpoint that it was made from, "
        "or save a dequantised one first."
    )

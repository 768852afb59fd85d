"""`inspect PATH`: what a checkpoint or an adapter is, from its headers and configs alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from surgery.adapter import Adapter, Lora
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.families import PARTS, part_of
from surgery.names import expert_of, layer_of
from surgery.ops.directory import head_tied_to
from surgery.ops.exact_record import exact_bytes
from surgery.ops.record import has_record
from surgery.provenance import read_provenance
from surgery.sites import Site, find_sites, memory_names, vocabulary_of


@dataclass(frozen=True)
class TensorSummary:
    """One stored tensor: name, dtype, shape, and the file it lies in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class Share:
    """How many tensors, parameters and bytes something takes."""

    tensors: int
    parameters: int
    nbytes: int

    @classmethod
    def of(cls, tensors: Sequence[StoredTensor]) -> Share:
        return cls(len(tensors), sum(t.numel for t in tensors), sum(t.nbytes for t in tensors))


@dataclass(frozen=True)
class Experts:
    """The layout of a mixture of experts. `stored` is `per expert` or `stacked`; `layers` are those with experts."""

    experts: int
    top_k: int | None
    layers: tuple[int, ...]
    stored: str


@dataclass(frozen=True)
class OriginInput:
    """An input of the operation that made an output; `revision` of a Hub's, `weight` of an adapter."""

    role: str
    source: str
    revision: str | None
    weight: float | None


@dataclass(frozen=True)
class Origin:
    """What `surgery.json` says an output was made by, and from, in the order in which it was used."""

    operation: str
    inputs: tuple[OriginInput, ...]


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint is.

    Attributes:
        architecture: the class that its config names.
        in_table: whether its family has a row of names; without one it is handled by stored names and shapes.
        parts: parameters by part of the model, see `families.PARTS`.
        dtypes: by stored dtype.
        tied_head: the embedding that serves as output head, if none is stored.
        reversible: whether it holds an undo record.
    """

    label: str
    architecture: str
    model_type: str
    in_table: bool
    total: Share
    layers: int
    vocabulary: int | None
    parts: Mapping[str, Share]
    dtypes: Mapping[str, Share]
    files: Mapping[str, int]
    tied_head: str | None
    experts: Experts | None
    origin: Origin | None
    reversible: bool
    left_behind: tuple[str, ...]
    tensors: tuple[TensorSummary, ...] = ()
    kind: str = field(default="checkpoint", kw_only=True)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter is.

    Attributes:
        method: `LORA`, PEFT's name of another type, or the name of a method that PEFT does not have.
        ranks: how many modules have each rank; of stacked experts, the rank of one.
        alpha: the config's `lora_alpha`.
        targets: last components of the modules' names, with how many modules each.
        variants: what is particular: `rsLoRA`, `DoRA`, `lora_bias`, `embeddings`, `target_parameters`, `rank_pattern`,
            `alpha_pattern`.
        saved: parameters stored whole.
        exact_bytes: size of the record by which `restore` gives the fine-tune back, or None where there is none.
    """

    label: str
    base: str | None
    task: str | None
    total: Share
    modules: int
    ranks: Mapping[str, int]
    alpha: object
    targets: Mapping[str, int]
    variants: tuple[str, ...]
    saved: tuple[str, ...]
    dtypes: Mapping[str, Share]
    origin: Origin | None
    tensors: tuple[TensorSummary, ...] = ()
    exact_bytes: int | None = None
    method: str = "LORA"
    kind: str = field(default="adapter", kw_only=True)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def inspect_checkpoint(checkpoint: Checkpoint, tensors: bool = False) -> CheckpointReport:
    """Describe a checkpoint; with `tensors`, list every one of them."""
    from surgery.families import FAMILIES

    vocabulary = vocabulary_of(checkpoint)
    names = memory_names(checkpoint)
    parts: dict[str, list[StoredTensor]] = {}
    dtypes: dict[str, list[StoredTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        parts.setdefault(part_of(names[name], tensor.shape, vocabulary), []).append(tensor)
        dtypes.setdefault(tensor.dtype.name, []).append(tensor)
    layers = {layer for name in checkpoint.tensors if (layer := layer_of(name)) is not None}
    tied = head_tied_to(checkpoint)
    return CheckpointReport(
        label=checkpoint.label,
        architecture=checkpoint.architecture,
        model_type=checkpoint.model_type,
        in_table=any(checkpoint.model_type in family.model_types for family in FAMILIES),
        total=Share.of(list(checkpoint.tensors.values())),
        layers=len(layers),
        vocabulary=vocabulary,
        parts={part: Share.of(parts[part]) for part in PARTS if part in parts},
        dtypes={name: Share.of(found) for name, found in sorted(dtypes.items())},
        files={name: checkpoint.folder.open(name).size for name in checkpoint.weights.names},
        tied_head=None if tied is None else tied.name,
        experts=experts_of(checkpoint, find_sites(checkpoint)),
        origin=_origin(checkpoint),
        reversible=has_record(checkpoint),
        left_behind=checkpoint.left_behind,
        tensors=_tensors(checkpoint) if tensors else (),
    )


def inspect_adapter(adapter: Adapter, tensors: bool = False) -> AdapterReport:
    """Describe an adapter; with `tensors`, list every one of them."""
    files = adapter.files
    config = adapter.config
    found = {
        "rsLoRA": config.get("use_rslora"),
        "DoRA": any(lora.magnitude is not None for lora in adapter.loras),
        "lora_bias": any(lora.bias is not None for lora in adapter.loras),
        "embeddings": any(lora.embedding for lora in adapter.loras),
        "target_parameters": adapter.target_parameters,
        "rank_pattern": config.get("rank_pattern"),
        "alpha_pattern": config.get("alpha_pattern"),
        "replaced token rows": adapter.tokens,
    }
    ranks = Counter(_rank(adapter, lora) for lora in adapter.loras)
    targets = Counter(lora.module.rpartition(".")[2] for lora in adapter.loras)
    base, task = config.get("base_model_name_or_path"), config.get("task_type")
    return AdapterReport(
        label=adapter.label,
        base=base if isinstance(base, str) else None,
        task=task if isinstance(task, str) else None,
        total=Share.of(list(files.tensors.values())),
        modules=len(adapter.loras),
        ranks={str(rank): count for rank, count in sorted(ranks.items())},
        alpha=config.get("lora_alpha"),
        targets=dict(sorted(targets.items())),
        variants=tuple(name for name, value in found.items() if value),
        saved=tuple(adapter.saved),
        dtypes=_by_dtype(files),
        origin=_origin(files),
        tensors=_tensors(files) if tensors else (),
        exact_bytes=exact_bytes(adapter),
    )


def inspect_beside(files: Checkpoint, tensors: bool = False) -> AdapterReport:
    """Describe what is trained beside a base and has no factors: prompts, prefixes, and methods of our own."""
    config = files.config
    base, task, method = (config.get(name) for name in ("base_model_name_or_path", "task_type", "method"))
    virtual, rank = config.get("num_virtual_tokens"), config.get("rank")
    particulars = {f"{virtual} virtual tokens": virtual, f"bottleneck of {rank}": rank}
    return AdapterReport(
        label=files.label,
        base=base if isinstance(base, str) else None,
        task=task if isinstance(task, str) else None,
        total=Share.of(list(files.tensors.values())),
        modules=0,
        ranks={},
        alpha=None,
        targets={},
        variants=tuple(text for text, value in particulars.items() if isinstance(value, int)),
        saved=(),
        dtypes=_by_dtype(files),
        origin=_origin(files),
        tensors=_tensors(files) if tensors else (),
        method=str(config.get("peft_type") or method),
    )


def is_beside(files: Checkpoint) -> bool:
    """Whether that is what lies in a folder, by its settings."""
    kind = files.config.get("peft_type")
    return kind not in (None, "LORA") or "surgery_method.json" in files.folder.names()


def _by_dtype(files: Checkpoint) -> dict[str, Share]:
    dtypes: dict[str, list[StoredTensor]] = {}
    for tensor in files.tensors.values():
        dtypes.setdefault(tensor.dtype.name, []).append(tensor)
    return {name: Share.of(held) for name, held in sorted(dtypes.items())}


def _rank(adapter: Adapter, lora: Lora) -> int:
    """The rank of a pair of factors; of stacked experts the config's, for the stack has that many rows an expert."""
    rows, rank = lora.A.shape[0], adapter.config.get("r")
    holders = {target.rpartition(".")[0] for target in adapter.target_parameters}
    stacked = any(f".{lora.module}".endswith(f".{holder}") for holder in holders)
    return rank if stacked and isinstance(rank, int) and rows % rank == 0 else rows


def _tensors(checkpoint: Checkpoint) -> tuple[TensorSummary, ...]:
    return tuple(
        TensorSummary(name, tensor.dtype.name, tensor.shape, tensor.source.name.rpartition("/")[2])
        for name, tensor in checkpoint.tensors.items()
    )


def experts_of(checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Experts | None:
    """The experts of a checkpoint whose sites are known; None where it has none."""
    stacks = [site for site in sites.values() if len(site.matrices) > 1]
    numbered = [(layer_of(name), expert_of(name)) for name in checkpoint.tensors if expert_of(name) is not None]
    if not stacks and not numbered:
        return None
    count = max([len(site.matrices) for site in stacks] + [1 + number for _, number in numbered if number is not None])
    layers = {layer for layer, _ in numbered} | {layer_of(site.name) for site in stacks}
    config = checkpoint.text_config
    top_k = next((config[key] for key in ("num_experts_per_tok", "moe_k", "top_k_experts") if key in config), None)
    return Experts(
        experts=count,
        top_k=top_k if isinstance(top_k, int) else None,
        layers=tuple(sorted(layer for layer in layers if layer is not None)),
        stored="per expert" if numbered else "stacked",
    )


def _origin(checkpoint: Checkpoint) -> Origin | None:
    content = read_provenance(checkpoint.folder)
    if content is None:
        return None
    inputs = content.get("inputs")
    described = []
    for item in inputs if isinstance(inputs, list) else []:
        if isinstance(item, dict):
            revision, weight = item.get("revision"), item.get("weight")
            number = float(weight) if isinstance(weight, int | float) and not isinstance(weight, bool) else None
            described.append(
                OriginInput(
                    role=str(item.get("role")),
                    source=str(item.get("source")),
                    revision=str(revision) if revision else None,
                    weight=number if number is not None and math.isfinite(number) else None,
                )
            )
    return Origin(str(content.get("operation")), tuple(described))

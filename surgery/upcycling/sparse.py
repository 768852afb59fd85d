"""The sparse blocks of a stored mixture, found by the names of its format: what `upcycle` writes, read back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import FormatError, UnsupportedError, several
from surgery.moe_families import MODEL_TYPE_PREFIX
from surgery.names import plain
from surgery.provenance import read_provenance
from surgery.upcycling.experts import rows_of
from surgery.upcycling.mixture import Block, Config, Target
from surgery.upcycling.mlps import stacks_of
from surgery.upcycling.native import NATIVE
from surgery.upcycling.seq2seq import SEQ2SEQ
from surgery.upcycling.shipped import shipped_target

Parts = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class SparseBlock:
    """One layer's mixture.

    Attributes:
        stack: `encoder` or `decoder`.
        number: zero-based layer.
        layer: the stored path of the layer.
        path: the stored path of the block.
        names: how its format calls what is in it.
        router: the router's weight (experts, hidden).
        experts: the parameters of each expert, by role as an `Mlp` has them; slices where a format stacks them.
        stacked: the tensors that hold all experts, by name below the block.
        corrections: what balances loads without a loss.
        shared: the parameters of the shared expert, by role; empty where there is none.
        gate: what scales the shared expert.
    """

    stack: str
    number: int
    layer: str
    path: str
    names: Block = field(repr=False)
    router: StoredTensor = field(repr=False)
    experts: tuple[Parts, ...] = field(repr=False)
    stacked: Parts = field(repr=False)
    corrections: tuple[StoredTensor, ...] = field(repr=False)
    shared: Parts = field(repr=False)
    gate: StoredTensor | None = field(repr=False)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The stored name of everything in it."""
        own = {tensor.name for expert in self.experts for tensor in expert.values()}
        rest = [self.router, *self.stacked.values(), *self.corrections, *self.shared.values()]
        return (*own, *(tensor.name for tensor in (*rest, *([self.gate] if self.gate else []))))


def known_mixtures() -> tuple[str, ...]:
    """Every model type whose blocks can be found here, but for those that ship their code."""
    return tuple(target.name for target in (*NATIVE, *SEQ2SEQ))


def format_of(checkpoint: Checkpoint) -> Target | None:
    """The format of a stored mixture, by its model type; None for a checkpoint that is not one of these."""
    for target in (*NATIVE, *SEQ2SEQ):
        if target.name == checkpoint.model_type:
            return target
    if checkpoint.model_type.startswith(MODEL_TYPE_PREFIX):
        return shipped_target(checkpoint.model_type.removeprefix(MODEL_TYPE_PREFIX))
    return None


@dataclass(frozen=True)
class StoredRouting:
    """How a stack's tokens find their experts, by its config.

    Attributes:
        normalized: whether a token's weights sum to one.
        capacity: under expert choice: experts to a token on average, else None.
        group: the tokens that compete under expert choice.
    """

    normalized: bool
    capacity: float | None
    group: str


def routing_of(config: Config, target: Target, stack: str) -> StoredRouting:
    """Read it from the config of a format: its own entry where the code is shipped, else what the class does."""
    stacks = config.get("moe_stacks")
    own = stacks.get(stack) if isinstance(stacks, dict) else None
    entry: Config = own if isinstance(own, dict) else {}
    normalized = entry.get("normalize", not target.raw or config.get("norm_topk_prob"))
    capacity = entry.get("capacity_factor")
    capacity = float(capacity) if isinstance(capacity, int | float) else None
    return StoredRouting(bool(normalized), capacity, str(entry.get("group", "sequence")))


def on_record(checkpoint: Checkpoint, target: Target) -> tuple[str | None, int]:
    """The dense family and the parts of an MLP that `surgery.json` tells of, if `upcycle` wrote it; else None and 1.

    A format that ships its code has the parts in its config.
    """
    parts = _granularity(checkpoint) if target.ships else 1
    if checkpoint.path is not None and not checkpoint.path.is_dir():
        return None, parts
    content = read_provenance(checkpoint.folder) or {}
    report = content.get("report")
    if content.get("operation") != "upcycle" or not isinstance(report, dict):
        return None, parts
    source, init = report.get("source"), str(report.get("init"))
    family = source if source in target.sources else None
    if target.ships:
        return family, parts
    groups = init.removeprefix("granular:")
    return family, int(groups) if init.startswith("granular:") and groups.isdecimal() and int(groups) > 0 else 1


def _granularity(checkpoint: Checkpoint) -> int:
    """How many parts of an MLP the experts of a format that ships its code are; 1 for whole ones."""
    stacks = checkpoint.config.get("moe_stacks")
    entries = [entry for entry in stacks.values() if isinstance(entry, dict)] if isinstance(stacks, dict) else []
    found = [entry.get("granularity") or 1 for entry in entries] or [1]
    parts = found[0]
    if not isinstance(parts, int) or parts < 1 or any(other != parts for other in found):
        listed = " and of ".join(map(repr, found))
        raise UnsupportedError(
            f"{checkpoint.label} has moe_stacks in its config with a granularity of {listed}, expected one number of "
            "at least 1."
        )
    return parts


def find_blocks(checkpoint: Checkpoint, target: Target) -> tuple[SparseBlock, ...]:
    """Every sparse block, in order of stack and layer.

    Raises `UnsupportedError` for routed LoRA experts, `FormatError` for blocks that are not as their format has them.
    """
    stacks = checkpoint.config.get("moe_stacks")
    kinds = (
        [stack.get("kind") for stack in stacks.values() if isinstance(stack, dict)] if isinstance(stacks, dict) else []
    )
    if "lora" in kinds:
        raise UnsupportedError(
            f"{checkpoint.label} has routed LoRA experts over one frozen MLP, which are no MLPs of their own."
        )
    problems: list[str] = []
    found = [
        block
        for stack, names in target.blocks.items()
        for block in _of_stack(checkpoint, target, stack, names, problems)
    ]
    if not found and not problems:
        problems.append(
            f"{checkpoint.label} says that it is of type {plain(checkpoint.model_type)}, but no experts of one are "
            "stored in it; give the whole model, in the names that save_pretrained writes."
        )
    if problems:
        raise FormatError(several(f"the mixtures of {checkpoint.label}", problems), problems)
    return tuple(found)


def _of_stack(
    checkpoint: Checkpoint, target: Target, stack: str, names: Block, problems: list[str]
) -> Iterator[SparseBlock]:
    layer = re.escape(stacks_of(target.sources[0])[stack].layer).replace(re.escape("{layer}"), r"(?P<number>\d+)")
    pattern = re.compile(rf"(?P<layer>(?:\w+\.)?{layer})\.{re.escape(names.path)}\.(?P<rest>.+)")
    inside: dict[tuple[int, str], dict[str, StoredTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if (match := pattern.fullmatch(name)) is not None:
            inside.setdefault((int(match["number"]), match["layer"]), {})[match["rest"]] = tensor
    for (number, path), rest in sorted(inside.items()):
        if names.router in rest:
            block, found = _block(stack, number, path, names, dict(rest))
            problems += [f"{path!r} of {checkpoint.label} {problem}." for problem in found]
            if block is not None:
                yield block
        elif any(".experts." in f".{name}" for name in rest):
            problems.append(f"{path!r} of {checkpoint.label} has experts and no router {names.router!r}.")


def _block(
    stack: str, number: int, layer: str, names: Block, rest: dict[str, StoredTensor]
) -> tuple[SparseBlock | None, list[str]]:
    """A block of what is stored below its path, and what is wrong with it: the end of a sentence for each fault."""
    router = rest.pop(names.router)
    count = router.shape[0] if len(router.shape) == 2 else 0
    corrections = tuple(rest.pop(name) for name, _ in names.corrections if name in rest)
    shared = names.shared
    shared_parts = {part: rest.pop(name) for part, name in shared.names.items() if name in rest} if shared else {}
    gate = rest.pop(shared.gate, None) if shared and shared.gate else None
    stacked = {name: rest.pop(name) for name in names.stacks if name in rest}
    problems = []
    if stacked:
        experts = _unstacked(names, stacked, count)
    else:
        wanted = {
            template.format(e=expert): (expert, part)
            for expert in range(count)
            for part, template in names.experts.items()
        }
        found: list[dict[str, StoredTensor]] = [{} for _ in range(count)]
        for name in [name for name in rest if name in wanted]:
            expert, part = wanted[name]
            found[expert][part] = rest.pop(name)
        experts = tuple(found)
    shapes = [{part: tensor.shape for part, tensor in expert.items()} for expert in experts]
    if not shapes or not shapes[0]:
        problems.append(f"has a router for {count} experts, and none of them is stored under the names of the format")
    elif odd := next((n for n, shape in enumerate(shapes) if shape != shapes[0]), None):
        problems.append(f"has an expert {odd} that lacks parameters of expert 0, or has them in other shapes")
    if rest:
        shown = ", ".join(repr(name) for name in sorted(rest)[:3])
        problems.append(f"holds {shown}{', ...' if len(rest) > 3 else ''}, which its format does not have")
    path = f"{layer}.{names.path}"
    block = SparseBlock(stack, number, layer, path, names, router, experts, stacked, corrections, shared_parts, gate)
    return (None if problems else block), problems


def _unstacked(names: Block, stacked: Parts, count: int) -> tuple[Parts, ...]:
    """The experts of tensors (experts, rows, columns) that hold one matrix or several, one below the other."""
    experts: list[dict[str, StoredTensor]] = [{} for _ in range(count)]
    for name, tensor in stacked.items():
        parts = names.stacks[name]
        if len(tensor.shape) != 3 or tensor.shape[0] != count or tensor.shape[1] % len(parts):
            return ()
        rows = tensor.shape[1] // len(parts)
        for number, expert in enumerate(experts):
            for place, part in enumerate(parts):
                expert[part] = rows_of(tensor[number], place * rows, (place + 1) * rows)
    return tuple(experts)

"""`dense CHECKPOINT`: a mixture of experts back to its dense family, with one MLP to a layer.

A mixture that nobody has trained returns the dense bits: its experts are one MLP, E times. Otherwise one expert is
chosen, or the mean of all is taken. Routers, what balances them, and silent shared experts are dropped; everything else
moves as bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import OptionError, UnsupportedError
from surgery.execute import StepIO
from surgery.hashing import HashBook
from surgery.layout import DEFAULT_SHARD_BYTES, TensorSpec, split
from surgery.moe_families import MODELING_FILE
from surgery.names import plain
from surgery.operation import RunOptions, carried_files, check_paths, config_bytes, staged, summarise
from surgery.pairing import refuse_quantised
from surgery.plan import CopyStep, OutputStep, Plan, Step, StepResult
from surgery.provenance import Input
from surgery.tiling import TILE_ELEMENTS
from surgery.upcycling.averages import AverageStep
from surgery.upcycling.dense_configs import dense_config, no_dense_class
from surgery.upcycling.mixture import Target
from surgery.upcycling.mlps import stacks_of
from surgery.upcycling.report import DenseReport
from surgery.upcycling.settings import check_settings
from surgery.upcycling.sparse import SparseBlock, find_blocks, format_of, known_mixtures, on_record, routing_of
from surgery.upcycling.zeros import is_zero

_ATTENTION_BIASES = (".q_proj.bias", ".k_proj.bias", ".v_proj.bias")


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """How to make a dense checkpoint of a mixture.

    Attributes:
        expert: the one to take, from 0; by default the first, if all are the same.
        average: take the mean of all instead, computed in float64 and rounded once.
        to: the dense model type; by default what `surgery.json` has on record, or the first that fits.
        drop_shared: leave out a shared expert that is not silent.
        shard_bytes: the largest weight file.
    """

    expert: int | None = None
    average: bool = False
    to: str | None = None
    drop_shared: bool = False
    shard_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.expert is not None and self.average:
            raise OptionError("--expert and --average exclude each other; give one of them.")
        if self.expert is not None and self.expert < 0:
            raise OptionError(f"--expert is {self.expert}, expected 0 or more; experts count from zero.")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise OptionError(f"--shard-size is {self.shard_bytes} bytes, expected at least 1.")


@dataclass(frozen=True)
class Downcycling:
    """Everything that is decided before a weight is written.

    Attributes:
        family: the dense model type.
        groups: experts that are the parts of one MLP; 1 where each is a whole one.
        identical: whether all experts of each layer are one MLP; None where nobody looked.
        taken: the number of the expert, or of the copy that has `groups` of them; None for the mean.
        dropped: tensors that the dense model has no place for.
    """

    checkpoint: Checkpoint
    target: Target
    family: str
    blocks: tuple[SparseBlock, ...]
    groups: int
    identical: bool | None
    taken: int | None
    dropped: tuple[str, ...]
    options: DenseOptions

    @property
    def inner(self) -> int:
        """The intermediate size of the dense MLPs."""
        expert = self.blocks[0].experts[0]
        weight = expert.get("down.weight") or expert["out.weight"]
        return self.groups * (prod(weight.shape) // self.blocks[0].router.shape[1])


def dense(
    checkpoint: Checkpoint, output: str | os.PathLike[str], options: DenseOptions, run_options: RunOptions
) -> DenseReport:
    """Write the dense model of a mixture at `output`."""
    refuse_quantised(checkpoint)
    check_settings(checkpoint)
    inputs = [Input("mixture", checkpoint)]
    target = Path(output)
    check_paths(target, inputs, run_options.overwrite)
    hashes = HashBook()
    work = _prepare(checkpoint, options, run_options, hashes)
    plan = plan_downcycling(work)
    report = _report(work, plan, target, run_options)
    if run_options.dry_run:
        return replace(report, dry_run=True)
    hashes.save()
    with staged(target, plan, ("dense", options), run_options) as run:
        run.execute(plan, "downcycling")
        report = replace(report, resumed=run.resumed)
        run.finish("dense", options, inputs, report.numbers())
    return report


# Deciding -------------------------------------------------------------------------------------------------------------


def _prepare(checkpoint: Checkpoint, options: DenseOptions, run_options: RunOptions, hashes: HashBook) -> Downcycling:
    target = format_of(checkpoint)
    if target is None:
        raise UnsupportedError(
            f"{checkpoint.label} is of type {plain(checkpoint.model_type or 'unknown')!r}, which is no mixture of "
            f"experts known here; expected one of {', '.join(known_mixtures())}, or one that `upcycle` made."
        )
    family, groups = on_record(checkpoint, target)
    family = _family(checkpoint, target, options.to, family)
    blocks = find_blocks(checkpoint, target)
    _check_shapes(checkpoint, target, family, blocks, groups)
    objections = [*no_dense_class(checkpoint, target, family)]
    dropped = [name for block in blocks for name in _dropped(block)]
    loud = [block.shared[part] for block in blocks for part in block.shared if part.startswith(("down.", "out."))]
    loud = [] if options.drop_shared else [tensor for tensor in loud if not is_zero(tensor)]
    biases = [t for n, t in checkpoint.tensors.items() if n.endswith(_ATTENTION_BIASES)]
    if target.name == "qwen2_moe" and family in ("llama", "mistral"):
        objections += [f"has attention biases that are not zero ({t.name!r})" for t in biases if not is_zero(t)][:1]
        dropped += [tensor.name for tensor in biases]
    if objections:
        others = [source for source in target.sources if source != family]
        remedy = f"; try --to {' or --to '.join(others)}" if others else ""
        raise UnsupportedError(
            f"{checkpoint.label} cannot become a {family}, which it differs from in that it {' and '.join(objections)}"
            f"{remedy}."
        )
    if loud:
        raise UnsupportedError(
            f"{checkpoint.label} has a shared expert that is not silent ({loud[0].name!r} is not zero), which a dense "
            "MLP beside the routed one cannot hold; --drop-shared leaves it out."
        )
    count = min(len(block.experts) for block in blocks) // groups
    if options.expert is not None and options.expert >= count:
        raise OptionError(f"--expert is {options.expert}, expected one of 0 to {count - 1}.")
    identical = None
    if groups > 1 or (options.expert is None and not options.average):
        identical = _compare(checkpoint, blocks, groups, run_options, hashes)
    taken = None if options.average and groups == 1 else options.expert or 0
    return Downcycling(checkpoint, target, family, blocks, groups, identical, taken, tuple(dropped), options)


def _family(checkpoint: Checkpoint, target: Target, wanted: str | None, recorded: str | None) -> str:
    if wanted is not None:
        if wanted not in target.sources:
            raise OptionError(
                f"--to is {wanted!r}, expected one of {', '.join(target.sources)}: {checkpoint.label} is a "
                f"{plain(checkpoint.model_type)}."
            )
        return wanted
    if recorded is not None:
        return recorded
    windowed = checkpoint.config.get("sliding_window") is not None and checkpoint.config.get("use_sliding_window", True)
    return "mistral" if windowed and target.sources[0] == "llama" else target.sources[0]


def _dropped(block: SparseBlock) -> Iterator[str]:
    """What a dense layer has no place for."""
    tensors = (block.router, *block.corrections, *block.shared.values(), *([block.gate] if block.gate else []))
    yield from (tensor.name for tensor in tensors)


def _check_shapes(
    checkpoint: Checkpoint, target: Target, family: str, blocks: Sequence[SparseBlock], groups: int
) -> None:
    """Every layer must get an MLP of one shape: the config of a dense model has one size for all."""
    if groups & (groups - 1):
        raise UnsupportedError(
            f"{checkpoint.label} has experts that are parts of an MLP (granular:{groups}); its output matrices were "
            f"multiplied by {groups} and rounded, so they cannot be taken back: that is exact for powers of two only."
        )
    odd = next((block for block in blocks if len(block.experts) % groups), None)
    if odd is not None:
        raise UnsupportedError(
            f"{odd.layer!r} of {checkpoint.label} has {len(odd.experts)} experts, which its surgery.json says are "
            f"{groups} to a copy of the MLP; remove surgery.json to take them as they are."
        )
    for stack, layout in stacks_of(family).items():
        sizes: dict[tuple[int, ...], str] = {}
        leaves = {leaf.role: leaf for leaf in layout.leaves}
        output = next(leaves[role] for role in ("down", "out") if role in leaves)
        for block in (block for block in blocks if block.stack == stack):
            for role in ("down", "out"):
                if (weight := block.experts[0].get(f"{role}.weight")) is not None:
                    axis = 0 if output.transposed else 1
                    shape = tuple(n * groups if at == axis else n for at, n in enumerate(weight.shape))
                    sizes.setdefault(shape, block.layer)
        layer = re.escape(layout.layer).replace(re.escape("{layer}"), r"\d+")
        pattern = re.compile(rf"(?:\w+\.)?{layer}\.{re.escape(output.dense)}\.weight")
        for name, tensor in checkpoint.tensors.items():
            if pattern.fullmatch(target.rename_back(name)) is not None:
                sizes.setdefault(tensor.shape, name)
        if len(sizes) > 1:
            (one, at), (other, there) = list(sizes.items())[:2]
            raise UnsupportedError(
                f"{checkpoint.label} would have MLPs of several sizes: {list(one)} in {at!r} and {list(other)} in "
                f"{there!r}; a {family} has one."
            )


def _compare(
    checkpoint: Checkpoint,
    blocks: Sequence[SparseBlock],
    groups: int,
    run_options: RunOptions,
    hashes: HashBook,
) -> bool:
    """True if the experts of each layer are one MLP. Raises `UnsupportedError` where they differ."""
    progress = run_options.settings.progress
    tensors = [tensor for block in blocks for expert in block.experts for tensor in expert.values()]
    progress.start(sum(tensor.nbytes for tensor in tensors), "comparing experts")
    differing: list[tuple[SparseBlock, int]] = []
    try:
        for block in blocks:
            found = [
                tuple(hashes.require(tensor, progress.advance) for tensor in expert.values())
                for expert in block.experts
            ]
            other = sum(digests != found[number % groups] for number, digests in enumerate(found))
            differing += [(block, other)] if other else []
    finally:
        progress.stop()
    if not differing:
        return True
    block, other = differing[0]
    where = f"{len(differing)} of {len(blocks)} layers (in {block.layer!r} {other} of {len(block.experts)})"
    if groups > 1:
        raise UnsupportedError(
            f"{checkpoint.label} has experts that are parts of an MLP (granular:{groups}) and differ from the first "
            f"copy in {where}; parts that were trained do not go together again."
        )
    raise UnsupportedError(
        f"{checkpoint.label} has experts that differ from expert 0 in {where}; choose one with --expert, or take their "
        "mean with --average."
    )


# Planning -------------------------------------------------------------------------------------------------------------


def plan_downcycling(work: Downcycling) -> Plan:
    """Every tensor of the dense model and its step."""
    checkpoint = work.checkpoint
    inside = {name for block in work.blocks for name in block.tensors} | set(work.dropped)
    steps: list[Step] = [
        CopyStep(TensorSpec(work.target.rename_back(name), tensor.dtype, tensor.shape), tensor)
        for name, tensor in checkpoint.tensors.items()
        if name not in inside
    ]
    for block in work.blocks:
        steps += _mlp(work, block)
    specs = [spec for step in steps for spec in step.writes]
    layout = split(specs, "model", work.options.shard_bytes or DEFAULT_SHARD_BYTES)
    config = dense_config(checkpoint.config, work.target, work.family, work.inner)
    files = {"config.json": config_bytes(config)}
    replaced = {*files, MODELING_FILE} if work.target.ships else {*files}
    place = {info.name: n for n, info in enumerate(info for file in layout.files for info in file.entries)}
    ordered = tuple(sorted(steps, key=lambda step: place[step.writes[0].name]))
    return Plan(ordered, layout, files, carried_files(checkpoint, replaced))


def _mlp(work: Downcycling, block: SparseBlock) -> Iterator[Step]:
    leaves = {leaf.role: leaf for leaf in stacks_of(work.family)[block.stack].leaves}
    for part in block.experts[0]:
        role, _, kind = part.partition(".")
        leaf = leaves[role]
        name = f"{block.layer}.{leaf.dense}.{kind}"
        own = tuple(expert[part] for expert in block.experts)
        spec = TensorSpec(name, own[0].dtype, own[0].shape)
        if work.groups > 1:
            first = (work.taken or 0) * work.groups
            parts, is_output = own[first : first + work.groups], role in ("down", "out")
            if kind == "bias" and is_output:
                yield CopyStep(spec, parts[0])  # each part has it whole
            else:
                yield _joined(name, parts, is_output, leaf.transposed)
        elif work.taken is None:
            yield AverageStep(spec, own)
        else:
            yield CopyStep(spec, own[work.taken])


def _joined(name: str, parts: Sequence[StoredTensor], output: bool, transposed: bool) -> JoinStep:
    """The parts of a matrix or bias side by side; scaled back for the matrix that leads out."""
    is_bias = len(parts[0].shape) == 1
    axis = 0 if is_bias else int(output != transposed)
    shape = tuple(n * len(parts) if at == axis else n for at, n in enumerate(parts[0].shape))
    # A bias is gone through as one row.
    along = 1 if is_bias else axis
    return JoinStep(TensorSpec(name, parts[0].dtype, shape), tuple(parts), along, len(parts) if output else 1)


@dataclass(frozen=True)
class JoinStep(OutputStep):
    """Matrices of one shape put together along an axis, divided by a power of two, which is exact."""

    parts: tuple[StoredTensor, ...]
    axis: int
    divisor: int

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return self.parts

    @property
    def scratch(self) -> int:
        return 12 * min(self.output.nbytes, 2 * TILE_ELEMENTS * len(self.parts))

    def run(self, io: StepIO) -> StepResult:
        import torch

        if self.axis == 1:
            for begin, _, tiles in io.chunks(*self.parts):
                io.write(self.output, begin, torch.cat(tiles, dim=1) / self.divisor)
            return StepResult()
        written = 0
        for part in self.parts:
            for begin, _, (tile,) in io.chunks(part):
                io.write(self.output, written + begin, tile / self.divisor)
            written += part.rows
        return StepResult()


def _report(work: Downcycling, plan: Plan, target: Path, run_options: RunOptions) -> DenseReport:
    config = dense_config(work.checkpoint.config, work.target, work.family, work.inner)
    architectures = config["architectures"]
    layers: dict[str, list[int]] = {}
    for block in work.blocks:
        layers.setdefault(block.stack, []).append(block.number)
    return DenseReport(
        output=str(target),
        plan=summarise([plan], target, run_options.settings),
        source=work.checkpoint.model_type,
        target=work.family,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        layers={stack: tuple(numbers) for stack, numbers in layers.items()},
        experts=len(work.blocks[0].experts),
        taken=work.taken,
        identical=work.identical,
        dropped=work.dropped,
        parameters=sum(prod(spec.shape) for step in plan.steps for spec in step.writes),
        mixture_parameters=work.checkpoint.parameters,
        nbytes=plan.layout.nbytes,
        notes=tuple(_notes(work)),
    )


def _notes(work: Downcycling) -> Iterator[str]:
    if work.options.average and work.identical is None:
        yield "The mean of experts that were trained apart is a start for training, seldom a good model by itself."
    if work.options.drop_shared and any(block.shared for block in work.blocks):
        yield "The shared experts are left out: the dense model computes something else wherever they were not silent."
    stacks = dict.fromkeys(block.stack for block in work.blocks)
    routings = [routing_of(work.checkpoint.config, work.target, stack) for stack in stacks]
    if not all(routing.normalized for routing in routings):
        yield (
            "The mixture weighs its experts by raw probabilities, which need not sum to 1, and the dense model has the "
            "MLP whole, so it computes something else, however alike the experts are."
        )
    if any(routing.capacity is not None and routing.capacity < len(work.blocks[0].experts) for routing in routings):
        yield (
            "Under expert choice a token goes to as many experts as take it, to none where none does; in the dense "
            "model every token goes through every MLP once, so it computes something else."
        )
    if work.options.average and work.groups > 1:
        yield "All copies of the MLP are the same, so their mean is any of them."

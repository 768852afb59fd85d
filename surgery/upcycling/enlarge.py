"""`upcycle MIXTURE --experts N`: a mixture of more experts, the same function of its inputs.

Each expert and its row of the router are there f times, one after the other, and a token goes to f times as many. The
copies of an expert have one score, so all of them are chosen together: where the K best experts are clear, their copies
are the K f best. Their weights add up to what the one had:

    normalised    exp(z_e) / (f sum of exp(z)) for each of f copies; likewise sigmoid(z_e) / (f sum of sigmoid(z))
    raw softmax   p_e / f for each, since the sum over all experts is f times what it was
    raw sigmoid   sigmoid(z_e) for each: f times too much, so it is refused

A correction that is added to softmax probabilities is divided by f with them; one that is added to sigmoids stays.

Experts that are the G parts of one MLP stay side by side: f copies of the first G, then f of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import FormatError, MismatchError, OptionError, UnsupportedError
from surgery.execute import StepIO
from surgery.layout import DEFAULT_SHARD_BYTES, TensorSpec, split
from surgery.names import plain
from surgery.operation import RunOptions, carried_files, config_bytes, summarise
from surgery.plan import CopyStep, OutputStep, Plan, Step, StepResult
from surgery.upcycling.averages import rounded_once
from surgery.upcycling.experts import ExpertsStep, Noisy, Recipe, Same, StackStep
from surgery.upcycling.mixture import Config, Target
from surgery.upcycling.options import ExpertInit, UpcycleOptions
from surgery.upcycling.report import StackReport, UpcycleReport
from surgery.upcycling.sparse import SparseBlock, find_blocks, on_record, routing_of

# How the formats spell the number of experts, and of those that a token goes to.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk")
# What an enlarged mixture may be told; everything else it takes over.
_ALLOWED = ("experts", "top_k", "init", "seed", "shard_bytes")
# Formats that score by sigmoids: each expert for itself.
_SIGMOID = ("glm4_moe",)
_REFUSED = {
    "switch_transformers": "sends a token to one expert, weighted by its probability",
    "nllb-moe": "sends a token to two experts, whatever their number",
}


@dataclass(frozen=True)
class Enlarging:
    """A mixture and what is to be made of it: `factor` copies of each expert.

    Attributes:
        experts: to each block, so far.
        top_k: experts to a token, so far; None under expert choice.
        parts: experts side by side that are the parts of one MLP; 1 where each is a whole one.
    """

    checkpoint: Checkpoint
    target: Target
    blocks: Sequence[SparseBlock]
    factor: int
    experts: int
    top_k: int | None
    parts: int
    options: UpcycleOptions

    @property
    def copies(self) -> Sequence[int]:
        """Of the larger mixture's experts, in order: which expert each is a copy of."""
        runs = [range(first, first + self.parts) for first in range(0, self.experts, self.parts)]
        return [number for run in runs for _ in range(self.factor) for number in run]

    @property
    def init(self) -> ExpertInit:
        return self.options.expert_init


_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def prepare_enlarging(checkpoint: Checkpoint, target: Target, options: UpcycleOptions) -> Enlarging:
    """Decide everything; raises all that there is to refuse."""
    _check_options(checkpoint, options)
    blocks = find_blocks(checkpoint, target)
    counts = {len(block.experts) for block in blocks}
    if len(counts) > 1:
        raise UnsupportedError(f"{checkpoint.label} has layers of {_listed(counts)} experts; all must have as many.")
    (count,) = counts
    wanted = options.experts
    if wanted is None or wanted % count or wanted == count:
        found = f"--experts is {wanted}, " if wanted is not None else ""
        raise OptionError(
            f"{found}{checkpoint.label} is a mixture of {count} experts; to enlarge it, give --experts a multiple of "
            f"them, such as {2 * count}; `surgery dense` makes a dense checkpoint of it."
        )
    factor = wanted // count
    problems = [*_objections(checkpoint, target)]
    parts = on_record(checkpoint, target)[1]
    if count % parts:
        problems.append(f"has {count} experts, which do not divide into the parts of MLPs (granular:{parts})")
    if problems:
        reasons = " and ".join(problems)
        raise UnsupportedError(
            f"{checkpoint.label} cannot be enlarged without changing what it computes: it {reasons}."
        )
    top_k = _top_k(checkpoint)
    said = next((value for name in _COUNTS if isinstance(value := checkpoint.config.get(name), int)), count)
    if said != count or (top_k or 0) > count:
        raise MismatchError(
            f"config.json of {checkpoint.label} says {said} experts and {top_k} of them to a token, but its routers "
            f"have {count} rows; mend the config first."
        )
    if options.top_k is not None and options.top_k != factor * (top_k or 0):
        raise OptionError(
            f"--top-k is {options.top_k}, expected {factor * (top_k or 0)}: with {factor} copies of each expert a "
            f"token goes to {factor} times as many."
        )
    return Enlarging(checkpoint, target, blocks, factor, count, top_k, parts, options)


def _listed(counts: set[int]) -> str:
    return " and ".join(map(str, sorted(counts)))


def _check_options(checkpoint: Checkpoint, options: UpcycleOptions) -> None:
    default = UpcycleOptions()
    for field in fields(options):
        if field.name not in _ALLOWED and getattr(options, field.name) != getattr(default, field.name):
            raise OptionError(
                f"--{field.name.replace('_', '-')} is for dense checkpoints; {checkpoint.label} is a mixture, and a "
                "larger one is routed as it is."
            )
    if options.expert_init.kind not in ("copy", "noise"):
        raise OptionError(
            f"--init is {options.init!r}, expected copy or noise:STD: {checkpoint.label} is a mixture already."
        )


def _objections(checkpoint: Checkpoint, target: Target) -> Iterator[str]:
    config = checkpoint.config
    if target.name in _REFUSED:
        yield _REFUSED[target.name]
        return
    groups = config.get("n_group")
    if isinstance(groups, int) and groups > 1:
        yield f"routes by groups of experts (n_group {groups}), whose scores would change"
    if target.name in _SIGMOID and config.get("norm_topk_prob") is False:
        yield "takes raw sigmoids for weights (norm_topk_prob false), which copies would multiply"


def _top_k(checkpoint: Checkpoint) -> int | None:
    """K of all layers, or None under expert choice. Raises for a config that does not say it."""
    stacks = checkpoint.config.get("moe_stacks")
    if isinstance(stacks, dict):
        found = {stack.get("num_experts_per_tok") for stack in stacks.values() if isinstance(stack, dict)} - {None}
    else:
        given = [checkpoint.config[name] for name in _TOP_K if name in checkpoint.config]
        found = {k for value in given for k in (value if isinstance(value, list) else [value])}
        if not found:
            raise FormatError(f"{checkpoint.label} does not say in config.json how many experts a token goes to.")
    if any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in found) or len(found) > 1:
        shown = ", ".join(plain(repr(k)) for k in sorted(found, key=repr))
        raise FormatError(
            f"{checkpoint.label} has config.json say that a token goes to {shown} experts; expected one number."
        )
    return next(iter(found), None)


def plan_enlarging(work: Enlarging) -> Plan:
    """Every tensor of the larger mixture and its step."""
    inside = {name for block in work.blocks for name in block.tensors}
    kept = [tensor for name, tensor in work.checkpoint.tensors.items() if name not in inside]
    steps: list[Step] = [CopyStep(TensorSpec.like(tensor), tensor) for tensor in kept]
    for block in work.blocks:
        steps += _block(work, block)
    layout = split(
        [spec for step in steps for spec in step.writes], "model", work.options.shard_bytes or DEFAULT_SHARD_BYTES
    )
    files = {"config.json": config_bytes(enlarged_config(work))}
    place = {info.name: n for n, info in enumerate(info for file in layout.files for info in file.entries)}
    ordered = tuple(sorted(steps, key=lambda step: place[step.writes[0].name]))
    return Plan(ordered, layout, files, carried_files(work.checkpoint, files))


def enlarged_config(work: Enlarging) -> dict[str, object]:
    """The config with f times the experts, to be had and to be chosen; expert choice has f times the capacity."""
    config: dict[str, object] = dict(work.checkpoint.config)
    for name in (*_EXPERTS, *_TOP_K):
        if name in config:
            config[name] = _times(config[name], work.factor)
    stacks = config.get("moe_stacks")
    if isinstance(stacks, dict):
        scaled = ("num_experts", "num_experts_per_tok", "capacity_factor")
        config["moe_stacks"] = {
            stack: {name: _times(value, work.factor) if name in scaled else value for name, value in entry.items()}
            for stack, entry in stacks.items()
        }
    return config


def _times(value: object, factor: int) -> object:
    if isinstance(value, list):
        return [_times(item, factor) for item in value]
    return value * factor if isinstance(value, int | float) and not isinstance(value, bool) else value


def _block(work: Enlarging, block: SparseBlock) -> Iterator[Step]:
    factor, count, runs = work.factor, work.experts, work.experts // work.parts
    router = block.router
    yield RepeatStep(TensorSpec(router.name, router.dtype, (factor * count, *router.shape[1:])), router, runs, factor)
    by_sigmoid = work.target.name in _SIGMOID
    for correction in block.corrections:
        shape = (*correction.shape[:-1], factor * correction.shape[-1])
        spec = TensorSpec(correction.name, correction.dtype, shape)
        yield RepeatStep(spec, correction, runs, factor, 1 if by_sigmoid else factor)
    for tensor in (*block.shared.values(), *([block.gate] if block.gate is not None else [])):
        yield CopyStep(TensorSpec.like(tensor), tensor)
    for name, tensor in block.stacked.items():
        spec = TensorSpec(f"{block.path}.{name}", tensor.dtype, (factor * count, *tensor.shape[1:]))
        if work.init.kind == "copy":
            yield RepeatStep(spec, tensor, runs, factor)
            continue
        yield StackStep(spec, tuple((_recipe(work, tensor[expert]),) for expert in work.copies))
    for number, expert in enumerate(block.experts if not block.stacked else ()):
        for part, tensor in expert.items():
            copies = [new for new, old in enumerate(work.copies) if old == number]
            names = [f"{block.path}.{block.names.experts[part].format(e=copy)}" for copy in copies]
            specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name in names]
            recipe = _recipe(work, tensor)
            if isinstance(recipe, Same):
                yield from (CopyStep(spec, tensor) for spec in specs)
            else:
                yield ExpertsStep(tuple((spec, recipe) for spec in specs))


def _recipe(work: Enlarging, tensor: StoredTensor) -> Recipe:
    if work.init.kind == "noise" and len(tensor.shape) > 1:
        return Noisy(tensor, work.init.amount, work.init.relative, work.options.seed)
    return Same(tensor)


@dataclass(frozen=True)
class RepeatStep(OutputStep):
    """Each of the `count` equal pieces of a tensor `times` times, one after the other, divided by `divisor`.

    Without a division bytes move, and no torch is needed.
    """

    source: StoredTensor
    count: int
    times: int
    divisor: int = 1

    @property
    def reads(self) -> tuple[StoredTensor, ...]:
        return (self.source,)

    @property
    def computes(self) -> bool:
        return self.divisor != 1

    @property
    def scratch(self) -> int:
        return 40 * self.source.nbytes if self.computes else self.source.nbytes // self.count

    def run(self, io: StepIO) -> StepResult:
        if self.computes:
            pieces = io.read(self.source).view(self.count, -1)
            made = rounded_once(pieces.double() / self.divisor, pieces.dtype)
            io.write(self.output, 0, made.repeat_interleave(self.times, dim=0))
            return StepResult()
        size = self.source.nbytes // self.count
        for number in range(self.count):
            piece = memoryview(io.read_range(self.source, number * size, (number + 1) * size))
            for _ in range(self.times):
                io.write_bytes(self.output, piece)
        io.hash_if_wanted(self.source)
        return StepResult()


def report_on(work: Enlarging, plan: Plan, target: Path, run_options: RunOptions) -> UpcycleReport:
    """What there is to say before the work."""
    parameters = sum(prod(spec.shape) for step in plan.steps for spec in step.writes)
    stacks = tuple(_stack_report(work, stack) for stack in dict.fromkeys(block.stack for block in work.blocks))
    idle = 0.0
    for block in work.blocks:
        own = next(stack for stack in stacks if stack.stack == block.stack)
        active = own.top_k if own.top_k is not None else own.capacity or 0.0
        size = sum(tensor.numel for tensor in block.experts[0].values())
        idle += max(0.0, own.experts - active) * size
    noisy = work.init.kind == "noise"
    return UpcycleReport(
        output=str(target),
        plan=summarise([plan], target, run_options.settings),
        source=on_record(work.checkpoint, work.target)[0] or work.checkpoint.model_type,
        target=work.checkpoint.model_type,
        architecture=work.checkpoint.architecture,
        stacks=stacks,
        # `dense` reads here that experts are parts, where the format itself has no word for it.
        init=work.options.init if noisy or work.parts == 1 else f"granular:{work.parts}",
        router_init="copy",
        parameters=parameters,
        active=parameters - round(idle),
        stored_parameters=parameters,
        dense_parameters=work.checkpoint.parameters,
        nbytes=plan.layout.nbytes,
        dense_bytes=work.checkpoint.nbytes,
        preserved=not noisy,
        notes=(_NOISY if noisy else _ALIKE,),
    )


_ALIKE = (
    "The copies of an expert have one row of the router, so they see the same tokens and stay alike in training: "
    "--init noise:1% tells them apart."
)
_NOISY = "The copies of an expert differ by noise, so the mixture starts out a little worse than the smaller one."


def _stack_report(work: Enlarging, stack: str) -> StackReport:
    config: Config = enlarged_config(work)
    layers = tuple(block.number for block in work.blocks if block.stack == stack)
    depth = config.get("num_hidden_layers")
    routing = routing_of(config, work.target, stack)
    scale = config.get("routed_scaling_factor") if work.target.name in _SIGMOID else None
    return StackReport(
        stack=stack,
        layers=layers,
        depth=depth if isinstance(depth, int) else layers[-1] + 1,
        experts=work.factor * work.experts,
        top_k=None if work.top_k is None or routing.capacity is not None else work.factor * work.top_k,
        capacity=routing.capacity,
        normalized=routing.normalized,
        group=routing.group if routing.capacity is not None else None,
        scale=float(scale) if isinstance(scale, int | float) else 1.0,
    )

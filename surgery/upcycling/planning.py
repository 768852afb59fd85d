"""The plan of an upcycled checkpoint: what each tensor is made of, and its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.dtypes import F32
from surgery.layout import DEFAULT_SHARD_BYTES, TensorSpec, split
from surgery.operation import carried_files, config_bytes
from surgery.plan import CopyStep, Plan, Step
from surgery.upcycling.choice import task_of
from surgery.upcycling.dense_defaults import with_both_spellings
from surgery.upcycling.experts import Columns, ExpertsStep, Noisy, Recipe, Redrawn, Same, StackStep, rows_of
from surgery.upcycling.mlps import DOWN, Mlp
from surgery.upcycling.options import UpcycleOptions
from surgery.upcycling.routers import RouterStep, ZerosStep
from surgery.upcycling.targets import ABSENT, Asked, Config, Mixture, Target

# Settings of a dense config that say nothing about a mixture, or that its class would read otherwise.
_DROPPED = ("auto_map", "pretraining_tp", "mlp_bias", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Upcycling:
    """What is to be made of a checkpoint.

    Attributes:
        checkpoint: the dense one.
        config: its config, with everything said that it leaves to its class.
        mlps: every feed-forward block of it.
        mixtures: by stack.
        target: the format.
        options: as given.
    """

    checkpoint: Checkpoint
    config: Config
    mlps: Sequence[Mlp]
    mixtures: Mapping[str, Mixture]
    target: Target
    options: UpcycleOptions

    def mixture_of(self, mlp: Mlp) -> Mixture | None:
        """What an MLP becomes, or None for one that stays dense."""
        mixture = self.mixtures.get(mlp.stack)
        return mixture if mixture is not None and mlp.layer in mixture.layers else None

    @property
    def chosen(self) -> tuple[tuple[Mlp, Mixture], ...]:
        found = ((mlp, self.mixture_of(mlp)) for mlp in self.mlps)
        return tuple((mlp, mixture) for mlp, mixture in found if mixture is not None)


def plan_upcycling(work: Upcycling) -> Plan:
    """Every tensor of the output and its step, in shards of at most 5 GB."""
    steps = [*_kept(work), *_added(work)]
    for mlp, mixture in work.chosen:
        steps += _sparse_block(work, mlp, mixture)
    specs = [spec for step in steps for spec in step.writes]
    layout = split(specs, "model", work.options.shard_bytes or DEFAULT_SHARD_BYTES)
    files = {"config.json": config_bytes(new_config(work))}
    place = {info.name: n for n, info in enumerate(info for file in layout.files for info in file.entries)}
    ordered = tuple(sorted(steps, key=lambda step: place[step.writes[0].name]))
    return Plan(ordered, layout, files, carried_files(work.checkpoint, files))


def new_config(work: Upcycling) -> dict[str, object]:
    """The config of the mixture: the dense one with what differs, in both spellings."""
    config = {name: value for name, value in work.config.items() if name not in _DROPPED}
    (mixture,) = work.mixtures.values()
    config |= work.target.configure(Asked(work.checkpoint, work.config, mixture))
    config |= {"model_type": work.target.name, "architectures": [f"{work.target.prefix}{task_of(work.checkpoint)}"]}
    return {name: value for name, value in with_both_spellings(config).items() if value is not ABSENT}


def _kept(work: Upcycling) -> Iterator[Step]:
    """Every tensor outside the chosen MLPs, byte for byte."""
    replaced = {tensor.name for mlp, _ in work.chosen for tensor in mlp.leaves.values()}
    for name, tensor in work.checkpoint.tensors.items():
        if name not in replaced:
            yield CopyStep(TensorSpec.like(tensor), tensor)


def _added(work: Upcycling) -> Iterator[Step]:
    """Zero biases in attention for Qwen2-MoE: vLLM and mlx-lm expect them whatever the config says."""
    if work.target.name != "qwen2_moe":
        return
    for name, tensor in work.checkpoint.tensors.items():
        if name.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight")):
            bias = name.removesuffix("weight") + "bias"
            if bias not in work.checkpoint.tensors:
                yield ZerosStep(TensorSpec(bias, tensor.dtype, tensor.shape[:1]))


def _sparse_block(work: Upcycling, mlp: Mlp, mixture: Mixture) -> Iterator[Step]:
    """Router, experts and what else one layer's sparse block has."""
    target, seed = work.target, work.options.seed
    block = f"{mlp.parent}.{target.block}"
    down = mlp.leaves[DOWN]
    dtype = F32 if target.float32_router else down.dtype
    start = work.options.start_of_router
    router = TensorSpec(f"{block}.{target.router}", dtype, (mixture.experts, down.shape[0]))
    yield ZerosStep(router) if start.kind == "zeros" else RouterStep(router, start.std, mixture.groups, seed)
    for name, shape in target.corrections:
        yield ZerosStep(TensorSpec(f"{block}.{name}", F32, shape(mixture.experts)))
    if target.stacks is not None:
        yield from _stacks(work, block, mlp, mixture)
    else:
        yield from _separate(work, block, mlp, mixture)
    if target.shared is not None and (mixture.shared or target.shared.required):
        size = mixture.inner if mixture.shared else target.shared.size(mixture)
        yield from _shared(f"{block}.{target.shared.block}", mlp, size)
        if target.shared.gate:
            yield ZerosStep(TensorSpec(f"{block}.{target.shared.gate}", down.dtype, (1, down.shape[0])))


def _separate(work: Upcycling, block: str, mlp: Mlp, mixture: Mixture) -> Iterator[Step]:
    """Experts under names of their own: copies move as bytes, all others share one reading of the dense matrix."""
    assert work.target.experts is not None
    for leaf, template in work.target.experts.items():
        made: list[tuple[TensorSpec, Recipe]] = []
        for expert in range(mixture.experts):
            name = f"{block}.{template.format(e=expert)}"
            found = _recipe(work, mlp, mixture, leaf, expert)
            if isinstance(found, StoredTensor):
                yield CopyStep(TensorSpec(name, found.dtype, found.shape), found)
            else:
                made.append((TensorSpec(name, found.source.dtype, found.shape), found))
        if made:
            yield ExpertsStep(tuple(made))


def _stacks(work: Upcycling, block: str, mlp: Mlp, mixture: Mixture) -> Iterator[Step]:
    """Experts in one tensor of three dimensions."""
    assert work.target.stacks is not None
    for name, leaves in work.target.stacks.items():
        experts = tuple(
            tuple(_as_recipe(_recipe(work, mlp, mixture, leaf, expert)) for leaf in leaves)
            for expert in range(mixture.experts)
        )
        rows = sum(recipe.shape[0] for recipe in experts[0])
        shape = (mixture.experts, rows, experts[0][0].shape[1])
        yield StackStep(TensorSpec(f"{block}.{name}", mlp.leaves[DOWN].dtype, shape), experts)


def _as_recipe(found: StoredTensor | Recipe) -> Recipe:
    return Same(found) if isinstance(found, StoredTensor) else found


def _recipe(work: Upcycling, mlp: Mlp, mixture: Mixture, leaf: str, expert: int) -> StoredTensor | Recipe:
    """What one matrix of one expert is made of: stored bytes as they are, or a recipe."""
    source = mlp.leaves[leaf]
    init, seed = work.options.expert_init, work.options.seed
    if init.kind == "noise":
        return Noisy(source, init.amount, init.relative, seed)
    if init.kind == "drop":
        axis = 1 if leaf == DOWN else 0
        return Redrawn(source, init.amount, axis, seed, f"{mlp.module}#{expert} positions")
    if init.kind == "granular":
        size, part = mixture.expert_inner, expert % mixture.groups
        begin, end = part * size, (part + 1) * size
        return Columns(source, begin, end, mixture.groups) if leaf == DOWN else rows_of(source, begin, end)
    return source


def _shared(block: str, mlp: Mlp, size: int) -> Iterator[Step]:
    """A shared expert of the first `size` intermediate units of the MLP, silent: its `down_proj` is zero."""
    for leaf, tensor in mlp.leaves.items():
        name = f"{block}.{leaf}"
        if leaf == DOWN:
            yield ZerosStep(TensorSpec(name, tensor.dtype, (tensor.shape[0], size)))
        else:
            part = tensor if size == tensor.shape[0] else rows_of(tensor, 0, size)
            yield CopyStep(TensorSpec(name, part.dtype, part.shape), part)

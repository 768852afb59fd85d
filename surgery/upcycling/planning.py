"""The plan of an upcycled checkpoint: what each tensor is made of, and its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.dtypes import F32
from surgery.layout import DEFAULT_SHARD_BYTES, TensorSpec, single_file, split
from surgery.moe_families import MODELING_FILE, ROUTED_LORA_FILE, UPCYCLED_FAMILIES
from surgery.operation import carried_files, config_bytes
from surgery.plan import CopyStep, Plan, Step
from surgery.upcycling.choice import task_of
from surgery.upcycling.dense_defaults import with_both_spellings
from surgery.upcycling.experts import Columns, ExpertsStep, Noisy, Recipe, Redrawn, Same, StackStep, rows_of
from surgery.upcycling.mixture import ABSENT, Asked, Block, Config, Mixture, SharedExpert, Target
from surgery.upcycling.mlps import Mlp
from surgery.upcycling.options import LORA, UpcycleOptions
from surgery.upcycling.origins import Origin
from surgery.upcycling.prompts import Rows
from surgery.upcycling.routed_lora import factor_steps, mixture_path
from surgery.upcycling.routers import RouterStep, ZerosStep, given_router
from surgery.upcycling.shipped import modelling_code
from surgery.upcycling.tokenizers import tokenizer_file

# Settings of a dense config that say nothing about a mixture, or that its class would read otherwise.
_DROPPED = ("auto_map", "transformers_version", "_name_or_path")
# What no native mixture has; the code that travels builds its experts by them.
_NOT_NATIVE = ("pretraining_tp", "mlp_bias")


# Of the gate before a silent shared expert.
_GATE_DEVIATION = 0.02


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
        origin: where experts and everything else come from.
        prompts: of each expert, where routers start from their hidden states.
        rows: the routers that come of them; None before the model has run.
        base: with routed LoRA experts, what the new config says about where the dense weights are.
    """

    checkpoint: Checkpoint
    config: Config
    mlps: Sequence[Mlp]
    mixtures: Mapping[str, Mixture]
    target: Target
    options: UpcycleOptions
    origin: Origin
    prompts: tuple[tuple[str, ...], ...] = ()
    rows: Rows | None = None
    base: Mapping[str, object] = field(default_factory=dict, kw_only=True)

    def mixture_of(self, mlp: Mlp) -> Mixture | None:
        """What an MLP becomes, or None for one that stays dense."""
        mixture = self.mixtures.get(mlp.stack)
        return mixture if mixture is not None and mlp.number in mixture.layers else None

    @property
    def chosen(self) -> tuple[tuple[Mlp, Mixture], ...]:
        found = ((mlp, self.mixture_of(mlp)) for mlp in self.mlps)
        return tuple((mlp, mixture) for mlp, mixture in found if mixture is not None)


def plan_upcycling(work: Upcycling) -> Plan:
    """Every tensor of the output and its step, in shards of at most 5 GB; routed LoRA experts are one small file."""
    small = work.options.kind == LORA
    steps = [] if small else [*_kept(work), *_added(work)]
    for mlp, mixture in work.chosen:
        steps += _low_rank_block(work, mlp, mixture) if small else _sparse_block(work, mlp, mixture)
    specs = [spec for step in steps for spec in step.writes]
    layout = split(specs, "model", work.options.shard_bytes or DEFAULT_SHARD_BYTES)
    if small:
        layout = single_file(ROUTED_LORA_FILE, specs)
    files = {"config.json": config_bytes(new_config(work)), **tokenizer_file(work.checkpoint)}
    if work.target.ships:
        files[MODELING_FILE] = modelling_code()
    place = {info.name: n for n, info in enumerate(info for file in layout.files for info in file.entries)}
    ordered = tuple(sorted(steps, key=lambda step: place[step.writes[0].name]))
    return Plan(ordered, layout, files, carried_files(work.checkpoint, files))


def new_config(work: Upcycling) -> dict[str, object]:
    """The config of the mixture: the dense one with what differs, in both spellings."""
    # Code that is shipped is the dense class's own: what the dense config leaves out means the same there.
    dense = work.checkpoint.config if work.target.ships else work.config
    dropped = _DROPPED if work.target.ships else (*_DROPPED, *_NOT_NATIVE)
    config = {name: value for name, value in dense.items() if name not in dropped}
    architecture = work.target.classes(work.checkpoint.architecture, task_of(work.checkpoint))
    config |= {"model_type": work.target.name, "architectures": [architecture]}
    config |= work.target.configure(Asked(work.checkpoint, work.config, work.mixtures))
    config |= work.base
    if not work.target.ships and ("rope_theta" in config or "rope_parameters" in config):
        config = with_both_spellings(config)
    return {name: value for name, value in config.items() if value is not ABSENT}


def _kept(work: Upcycling) -> Iterator[Step]:
    """Every tensor outside the chosen MLPs: byte for byte, or from wherever the options say."""
    replaced = {tensor.name for mlp, _ in work.chosen for tensor in mlp.parts.values()}
    for name, tensor in work.checkpoint.tensors.items():
        if name not in replaced:
            yield work.origin.rest(tensor, work.target.rename(name))


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
    block = work.target.blocks[mlp.stack]
    path = f"{mlp.layer}.{block.path}"
    dtype = F32 if work.target.float32_router else mlp.output.dtype
    yield _router(work, mlp, mixture, TensorSpec(f"{path}.{block.router}", dtype, (mixture.experts, mlp.hidden)))
    for name, shape in block.corrections:
        yield ZerosStep(TensorSpec(f"{path}.{name}", F32, shape(mixture.experts)))
    yield from _stacked(work, path, block, mlp, mixture) if block.stacks else _separate(work, path, block, mlp, mixture)
    if block.shared is not None and (mixture.shared or block.shared.required):
        yield from _shared(path, block.shared, mlp, mixture, work.options.seed)


def _router(work: Upcycling, mlp: Mlp, mixture: Mixture, router: TensorSpec) -> Step:
    """The router of one layer, as `--router-init` says."""
    start = work.options.start_of_router
    if start.kind == "zeros":
        return ZerosStep(router)
    if start.kind == "hidden":
        return given_router(router, (work.rows or {}).get((mlp.stack, mlp.number)), mixture.groups)
    return RouterStep(router, start.std, mixture.groups, work.options.seed)


def _low_rank_block(work: Upcycling, mlp: Mlp, mixture: Mixture) -> Iterator[Step]:
    """Router and updates of one layer, under the names that they have in memory."""
    path = mixture_path(UPCYCLED_FAMILIES[work.checkpoint.model_type], work.checkpoint.architecture, mlp)
    yield _router(work, mlp, mixture, TensorSpec(f"{path}.router.weight", F32, (mixture.experts, mlp.hidden)))
    assert mixture.rank is not None
    yield from factor_steps(path, mlp, mixture, mixture.rank, work.options.seed)


def _separate(work: Upcycling, path: str, block: Block, mlp: Mlp, mixture: Mixture) -> Iterator[Step]:
    """Experts under names of their own: copies move as bytes, all others share one reading of the dense matrix."""
    for part in mlp.parts:
        made: dict[tuple[object, ...], list[tuple[TensorSpec, Recipe]]] = {}
        for expert in range(mixture.experts):
            name = f"{path}.{block.experts[part].format(e=expert)}"
            found = _recipe(work, mlp, mixture, part, expert)
            if isinstance(found, StoredTensor):
                yield CopyStep(TensorSpec(name, found.dtype, found.shape), found)
            else:
                spec = TensorSpec(name, mlp.parts[part].dtype, found.shape)
                made.setdefault(found.source.key, []).append((spec, found))
        yield from (ExpertsStep(tuple(group)) for group in made.values())


def _stacked(work: Upcycling, path: str, block: Block, mlp: Mlp, mixture: Mixture) -> Iterator[Step]:
    """Experts in one tensor of three dimensions."""
    for name, parts in block.stacks.items():
        experts = tuple(
            tuple(_as_recipe(_recipe(work, mlp, mixture, part, expert)) for part in parts)
            for expert in range(mixture.experts)
        )
        rows = sum(recipe.shape[0] for recipe in experts[0])
        shape = (mixture.experts, rows, experts[0][0].shape[1])
        yield StackStep(TensorSpec(f"{path}.{name}", mlp.output.dtype, shape), experts)


def _as_recipe(found: StoredTensor | Recipe) -> Recipe:
    return Same(found) if isinstance(found, StoredTensor) else found


def _recipe(work: Upcycling, mlp: Mlp, mixture: Mixture, part: str, expert: int) -> StoredTensor | Recipe:
    """What one parameter of one expert is made of: stored bytes as they are, or a recipe."""
    source, axis = mlp.parts[part], mlp.inner_axis(part)
    init, seed = work.options.expert_init, work.options.seed
    if init.kind == "noise" and len(source.shape) > 1:
        return Noisy(source, init.amount, init.relative, seed)
    if init.kind == "drop" and axis is not None:
        axis = axis if len(source.shape) > 1 else 1  # a bias is gone through as one row
        return Redrawn(source, init.amount, axis, seed, f"{mlp.layer} {mlp.stack} #{expert} positions")
    if init.kind == "granular" and axis is not None:
        size, number = mixture.expert_inner, expert % mixture.groups
        scale = mixture.groups if source is mlp.output else 1
        return _slice(source, axis, number * size, (number + 1) * size, scale)
    return work.origin.part(mlp, part, expert)


def _slice(source: StoredTensor, axis: int, begin: int, end: int, scale: int) -> StoredTensor | Recipe:
    """A piece of a parameter along its intermediate dimension: bytes as they lie where nothing is to be computed."""
    if axis == 0 and scale == 1:
        return rows_of(source, begin, end)
    if axis == 0:
        return Columns(rows_of(source, begin, end), 0, source.columns, scale)
    return Columns(source, begin, end, scale)


def _shared(path: str, shared: SharedExpert, mlp: Mlp, mixture: Mixture, seed: int) -> Iterator[Step]:
    """A silent shared expert: the first intermediate units of the MLP, and zeros for what leads out of it."""
    size = mixture.inner if mixture.shared else shared.size(mixture)
    for part, tensor in mlp.parts.items():
        name = f"{path}.{shared.names[part]}"
        if tensor is mlp.output:
            yield ZerosStep(TensorSpec(name, tensor.dtype, (mlp.hidden, size)))
        else:
            piece = tensor if size == tensor.shape[0] else rows_of(tensor, 0, size)
            yield CopyStep(TensorSpec(name, piece.dtype, piece.shape), piece)
    if shared.gate:
        # Any value does, since what it scales is zero; of all zeros llama.cpp makes NaN.
        gate = TensorSpec(f"{path}.{shared.gate}", mlp.output.dtype, (1, mlp.hidden))
        yield RouterStep(gate, _GATE_DEVIATION, 1, seed)

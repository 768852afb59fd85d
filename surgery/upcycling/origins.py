"""Where experts and everything else come from: the dense checkpoint alone, several fine-tunes of it, or adapters.

`Origin` is asked for one parameter of one expert, and for what becomes of a tensor outside of the chosen MLPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import MismatchError, OptionError, UnsupportedError, several
from surgery.hashing import HashBook, hash_tensor
from surgery.layout import TensorSpec
from surgery.names import natural_key
from surgery.ops.consequences import settle_tying
from surgery.ops.fitting import Change, fit
from surgery.ops.kinship import refuse_by_hashes, refuse_by_probe
from surgery.ops.weights import TakeStep, WeightStep
from surgery.pairing import refuse_quantised
from surgery.plan import CopyStep, Step
from surgery.provenance import Input
from surgery.upcycling.adapted import Adapted
from surgery.upcycling.averages import AverageStep
from surgery.upcycling.experts import Recipe, Same
from surgery.upcycling.kin import check_kin, settings_apart
from surgery.upcycling.mlps import Mlp
from surgery.upcycling.options import UpcycleOptions

Sources = Sequence[Checkpoint] | Sequence[Adapter]


@dataclass(frozen=True)
class Origin:
    """The dense checkpoint itself, for all experts and for the rest.

    Attributes:
        dense: the checkpoint that gives config, tokenizer and other files.
        notes: what the report should say.
        left_out: tensors that a source changes and the output does not have changed.
    """

    dense: Checkpoint
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    left_out: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The sources beside the dense checkpoint, for `surgery.json`."""
        return ()

    def part(self, mlp: Mlp, part: str, _expert: int) -> StoredTensor | Recipe:
        """What one parameter of one expert is made of: stored bytes, or a recipe."""
        return mlp.parts[part]

    def rest(self, tensor: StoredTensor, name: str) -> Step:
        """How a tensor outside of the chosen MLPs is written, which the output calls `name`."""
        return CopyStep(TensorSpec(name, tensor.dtype, tensor.shape), tensor)

    def check(self, hashes: HashBook) -> None:
        """Refuse, after the work, what hashes show not to belong together."""


@dataclass(frozen=True)
class FromCheckpoints(Origin):
    """Expert e is the MLP of fine-tune e mod n: branch-train-mix (arXiv:2403.07816)."""

    models: tuple[Checkpoint, ...]
    rest_from: str

    @property
    def inputs(self) -> tuple[Input, ...]:
        return tuple(Input("expert", model) for model in self.models)

    def part(self, mlp: Mlp, part: str, expert: int) -> StoredTensor | Recipe:
        own, dense = self.models[expert % len(self.models)].tensors[mlp.parts[part].name], mlp.parts[part]
        return own if own.dtype is dense.dtype else Same(own)

    def rest(self, tensor: StoredTensor, name: str) -> Step:
        spec = TensorSpec(name, tensor.dtype, tensor.shape)
        if self.rest_from == "base" or not tensor.dtype.arithmetic:
            return CopyStep(spec, tensor)  # `check_kin` saw to it that masks and positions are the same in all
        own = tuple(model.tensors[tensor.name] for model in self.models)
        if self.rest_from == "average":
            return AverageStep(spec, own)
        return CopyStep(spec, own[0]) if own[0].dtype is tensor.dtype else TakeStep(spec, own[0])


@dataclass(frozen=True)
class FromAdapters(Origin):
    """Expert e is the dense MLP with adapter e mod n merged into it.

    Attributes:
        adapters: with their weights.
        changes: by adapter, what it changes, by stored name.
        averaged: with `--rest average`, what becomes of tensors outside of the chosen MLPs; all others are copied.
        any_base: whether evidence of another base is ignored.
    """

    adapters: tuple[Adapter, ...]
    changes: tuple[Mapping[str, Change], ...]
    averaged: Mapping[str, WeightStep | AverageStep]
    any_base: bool

    @property
    def inputs(self) -> tuple[Input, ...]:
        return tuple(Input("adapter", adapter.files, adapter.weight) for adapter in self.adapters)

    def part(self, mlp: Mlp, part: str, expert: int) -> StoredTensor | Recipe:
        dense = mlp.parts[part]
        change = self.changes[expert % len(self.adapters)].get(dense.name)
        if change is None:
            return dense
        if change.blocks:
            return Adapted(change.start, change.blocks, dense.dtype)
        return change.start if change.start.dtype is dense.dtype else Same(change.start)

    def rest(self, tensor: StoredTensor, name: str) -> Step:
        averaged = self.averaged.get(tensor.name)
        return (
            super().rest(tensor, name)
            if averaged is None
            else replace(averaged, output=replace(averaged.output, name=name))
        )

    def check(self, hashes: HashBook) -> None:
        for adapter, changes in zip(self.adapters, self.changes, strict=True):
            if not self.any_base:
                refuse_by_hashes(self.dense, [adapter], changes, hashes)


def origin_of(dense: Checkpoint, chosen: Iterable[Mlp], options: UpcycleOptions, sources: Sources) -> Origin:
    """What the options say that experts come from, checked.

    Args:
        dense: CHECKPOINT.
        chosen: the MLPs that become mixtures.
        options: see `UpcycleOptions`.
        sources: what `--init from:` or `adapters:` names, opened.
    """
    checkpoints = [source for source in sources if isinstance(source, Checkpoint)]
    adapters = [source for source in sources if isinstance(source, Adapter)]
    if options.expert_init.kind == "from":
        return _from_checkpoints(dense, checkpoints, options.rest or "average")
    if options.expert_init.kind == "adapters":
        replaced = {tensor.name for mlp in chosen for tensor in mlp.parts.values()}
        return _from_adapters(dense, adapters, replaced, options)
    return Origin(dense)


def _from_checkpoints(dense: Checkpoint, models: Sequence[Checkpoint], rest: str) -> FromCheckpoints:
    for model in models:
        refuse_quantised(model)
    check_kin(dense, models)
    return FromCheckpoints(dense, tuple(models), rest, notes=settings_apart(dense, models))


def _from_adapters(
    dense: Checkpoint, adapters: Sequence[Adapter], replaced: set[str], options: UpcycleOptions
) -> FromAdapters:
    changes = tuple(fit(dense, [adapter]) for adapter in adapters)
    for adapter, own in zip(adapters, changes, strict=True):
        _check_inside(dense, adapter, own, replaced)
        if not options.any_base:
            refuse_by_probe(dense, [adapter], own)
    outside = [name for name in dict.fromkeys(name for own in changes for name in own) if name not in replaced]
    notes = []
    for adapter, own in zip(adapters, changes, strict=True):
        if not replaced & own.keys():
            notes.append(
                f"{_name(adapter)} changes nothing in the MLPs that become mixtures: its expert is the dense one."
            )
    if options.rest == "average":
        averaged = _averaged(dense, adapters, changes, outside)
        return FromAdapters(dense, tuple(adapters), changes, averaged, options.any_base, notes=tuple(notes))
    if outside:
        shown = ", ".join(repr(name) for name in outside[:3]) + (", ..." if len(outside) > 3 else "")
        notes.append(
            f"{len(outside)} tensors that the adapters change outside of the MLPs are as in the dense checkpoint "
            f"({shown}); --rest average merges the mean of the changes."
        )
    return FromAdapters(
        dense, tuple(adapters), changes, {}, options.any_base, notes=tuple(notes), left_out=tuple(outside)
    )


def _name(adapter: Adapter) -> str:
    """Without the path to it: notes go into the output."""
    return adapter.files.provenance.get("source", adapter.label)


def _check_inside(dense: Checkpoint, adapter: Adapter, changes: Mapping[str, Change], replaced: set[str]) -> None:
    problems = []
    for name in sorted(replaced & changes.keys(), key=natural_key):
        change, own = changes[name], dense.tensors[name]
        if change.rows or change.start.shape != own.shape:
            problems.append(
                f"{adapter.label} gives {name!r} the shape {list(change.start.shape)}, expected {list(own.shape)}: an "
                "expert has the shape of the MLP."
            )
    if problems:
        raise MismatchError(several(f"the experts of {adapter.label}", problems), problems)


def _averaged(
    dense: Checkpoint, adapters: Sequence[Adapter], changes: Sequence[Mapping[str, Change]], outside: Sequence[str]
) -> dict[str, WeightStep | AverageStep]:
    """The dense tensors with the mean of what the adapters change in them: `merge` with each weight divided by n."""
    steps: dict[str, WeightStep | AverageStep] = {}
    problems: list[str] = []
    for adapter, own in zip(adapters, changes, strict=True):
        problems += _no_mean(dense, adapter, own, outside)
    if problems:
        raise UnsupportedError(several("the mean of the adapters' changes", problems), problems)
    shares = [replace(a, weight=a.weight / len(adapters), saved={}, tokens={}) for a in adapters]
    together = fit(dense, shares)
    for name in outside:
        tensor, spec = dense.tensors[name], TensorSpec.like(dense.tensors[name])
        added = together.get(name)
        whole = [own[name].start for own in changes if name in own and own[name].start is not tensor]
        if whole and added is not None:
            raise UnsupportedError(
                f"{name!r} is stored whole by one adapter and has factors in another, which have no mean; use --rest "
                "base, or merge one of them first."
            )
        if added is not None:
            steps[name] = WeightStep(spec, tensor, added.blocks)
        else:
            steps[name] = AverageStep(spec, (*whole, *[tensor] * (len(adapters) - len(whole))))
    return steps


def _no_mean(
    dense: Checkpoint, adapter: Adapter, changes: Mapping[str, Change], outside: Sequence[str]
) -> Iterable[str]:
    remedy = "use --rest base, or merge the adapter into the dense checkpoint first"
    for name in outside:
        change = changes.get(name)
        if change is None:
            continue
        if change.base is None or change.start.shape != change.base.shape:
            yield f"{adapter.label} brings {name!r}, which {dense.label} does not have in this shape; {remedy}."
        elif change.rows:
            yield f"{adapter.label} replaces rows of {name!r}, which have no mean with the others; {remedy}."
        elif any(c.is_dora for block in change.blocks for c in block.contributions):
            yield f"{adapter.label} is a DoRA, whose change of {name!r} has no mean with the others; {remedy}."
    if settle_tying(dense, [adapter], changes, hash_tensor)[1]:
        yield f"{adapter.label} changes one end of a tied head only; {remedy}."


def check_sources(options: UpcycleOptions, sources: Sources) -> None:
    """Raise `OptionError` where a library caller gives other sources than `init` names."""
    if len(sources) != len(options.expert_init.paths):
        raise OptionError(
            f"--init names {len(options.expert_init.paths)} models, and {len(sources)} were opened; name each of them."
        )

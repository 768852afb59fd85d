"""What several adapters have in common: the modules they act on, with the factors of each. Works from headers alone.

No base is needed: adapters that belong together name their modules alike. What cannot be combined is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from math import prod
from typing import TYPE_CHECKING

from surgery.adapter import Adapter, Lora
from surgery.checkpoint import StoredTensor
from surgery.errors import MismatchError, NonFiniteError, UnsupportedError, several
from surgery.names import natural_key
from surgery.ops.deltas import Reader, load_factors
from surgery.ops.fitting import Contribution
from surgery.patterns import first_match
from surgery.peft_format import nesting_key
from surgery.sites import Kind, Site

if TYPE_CHECKING:
    import torch

_REDO = "merge it into its base with `surgery merge` and take a plain LoRA from the result with `surgery extract`"


@dataclass(frozen=True)
class Share:
    """One adapter's factors of a module.

    Attributes:
        adapter: position of the adapter among those given.
        lora: the stored factors.
        rank: of each of its matrices.
        scale: alpha / r, or alpha / sqrt(r) with rsLoRA; without the adapter's weight.
        weight: the adapter's.
    """

    adapter: int
    lora: Lora = field(repr=False)
    rank: int
    scale: float
    weight: float


@dataclass(frozen=True)
class Slot:
    """A module (or a parameter) with the factors that each adapter has for it.

    Attributes:
        name: of the module, or of module and parameter.
        kind: how PEFT shapes the factors, see `sites.Kind`.
        out_features, in_features: shape of each product B A; for an embedding (columns, rows) of the table.
        experts: matrices in the stack; 1 for everything else.
        kernel: spatial shape of a convolution, empty otherwise.
        shares: in order of the adapters; those without this module are left out.
    """

    name: str
    kind: Kind
    out_features: int
    in_features: int
    experts: int
    kernel: tuple[int, ...]
    shares: tuple[Share, ...]

    @property
    def full(self) -> int:
        """The largest rank a product of this shape can have."""
        return min(self.out_features, self.in_features)

    @property
    def stacked(self) -> int:
        """The largest rank that the sum of all shares can have."""
        return min(sum(share.rank for share in self.shares), self.full)

    @property
    def site(self) -> Site:
        """As a place in a model, whose weights are not at hand."""
        return Site(self.name, self.kind, "other", (), self.out_features, self.in_features, self.kernel)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the stored A and B at a rank."""
        if self.kind is Kind.CONV:
            channels = self.in_features // prod(self.kernel)
            return (rank, channels, *self.kernel), (self.out_features, rank, *(1 for _ in self.kernel))
        return (self.experts * rank, self.in_features), (self.out_features, rank * self.experts)


def load_share(
    io: Reader, slot: Slot, share: Share, expert: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, r) and A (r, in) of one adapter's matrix, on the device of `io`."""
    whole = Contribution(share.adapter, share.lora, 1.0, expert, slot.experts, 0, slot.out_features)
    found = load_factors(io, whole, dtype)
    return found.B, found.A


def name_nonfinite(io: Reader, slot: Slot) -> None:
    """Raise `NonFiniteError` naming the first tensor of a slot that holds NaN or infinity, if there is one."""
    for share in slot.shares:
        for stored in (share.lora.B, share.lora.A):
            if not bool(io.read(stored).double().isfinite().all()):
                raise NonFiniteError(
                    f"Tensor {stored.name!r} in {stored.source.name} holds NaN or infinity; mend the adapter or train "
                    "it again."
                )


def gather(adapters: Sequence[Adapter]) -> dict[str, Slot]:
    """Every module that an adapter has factors for, in natural order. Raises `MismatchError` naming all that clash."""
    for adapter in adapters:
        check_factored(adapter)
    slots: dict[str, Slot] = {}
    problems: list[str] = []
    for number, adapter in enumerate(adapters):
        for lora in adapter.loras:
            slot, problem = _slot(number, adapter, lora)
            if slot is None:
                problems.append(problem)
            elif (known := slots.get(slot.name)) is None:
                slots[slot.name] = slot
            elif _form(known) != _form(slot):
                other = adapters[known.shares[0].adapter]
                problems.append(
                    f"{slot.name!r} is {_shape(slot)} in {adapter.label} and {_shape(known)} in {other.label}; "
                    "the adapters belong to different bases."
                )
            else:
                slots[slot.name] = replace(known, shares=(*known.shares, *slot.shares))
    problems += _other_names(adapters)
    if problems:
        raise MismatchError(several("these adapters", problems), problems)
    return {name: slots[name] for name in sorted(slots, key=natural_key)}


def check_factored(adapter: Adapter) -> None:
    """Raise `UnsupportedError` for an adapter whose change is no product of factors, by name and with the remedy."""
    dora = next((lora for lora in adapter.loras if lora.magnitude is not None), None)
    if dora is not None or adapter.config.get("use_dora"):
        where = f" (at {dora.module!r})" if dora else ""
        raise UnsupportedError(
            f"{adapter.label} is a DoRA adapter{where}, whose change is no product of factors; {_REDO}."
        )
    biased = next((lora for lora in adapter.loras if lora.bias is not None), None)
    if biased is not None:
        raise UnsupportedError(
            f"{adapter.label} has trained biases of lora_B (lora_bias, at {biased.module!r}), which factors cannot "
            f"carry; {_REDO}, with --save-residual."
        )
    if not adapter.loras:
        raise UnsupportedError(f"{adapter.label} has no LoRA factors.")


def _slot(number: int, adapter: Adapter, lora: Lora) -> tuple[Slot | None, str]:
    """One adapter's own slot for a LoRA, or None and what is wrong with it."""
    parameter = _parameter_of(adapter, lora)
    name = parameter or lora.module
    rank = stacked = lora.A.shape[0]
    experts, kernel = 1, tuple[int, ...]()
    if parameter is not None:
        patterns = adapter.config.get("rank_pattern")
        named = first_match(patterns if isinstance(patterns, dict) else {}, name, adapter.config.get("r"))
        if not isinstance(named, int) or named < 1 or stacked % named:
            return None, f"{adapter.label}: {name!r} has {stacked} rows of lora_A, no multiple of its rank {named!r}."
        rank, experts = named, stacked // named
        kind = Kind.PARAMETER
    elif lora.embedding:
        kind = Kind.EMBEDDING
    elif len(lora.A.shape) > 2:
        kind, kernel = Kind.CONV, lora.A.shape[2:]
    else:
        kind = Kind.LINEAR
    wide, out = prod(lora.A.shape[1:]), lora.B.shape[0]
    if prod(lora.B.shape) != out * stacked or not wide or not out:
        return None, (
            f"{adapter.label}: the factors of {name!r} are {list(lora.A.shape)} and {list(lora.B.shape)}, which is no "
            "LoRA that is known."
        )
    if not adapter.expected_rank(name, rank):
        return None, f"{adapter.label}: {name!r} has rank {rank}, which adapter_config.json does not give it."
    share = Share(number, lora, rank, replace(adapter, weight=1.0).scale(name, rank), adapter.weight)
    return Slot(name, kind, out, wide, experts, kernel, (share,)), ""


def _parameter_of(adapter: Adapter, lora: Lora) -> str | None:
    """The full name of the parameter that a LoRA acts on; None for one that acts on a module.

    The key of the factors names the module only. Which parameter is meant follows from how deep the wrapper lies: the
    parameters of a module are wrapped in the order of `nesting_key`, the first innermost.
    """
    targets = {target.rpartition(".")[::2] for target in adapter.target_parameters}
    own = {last for module, last in targets if lora.module == module or lora.module.endswith(f".{module}")}
    order = sorted(own, key=nesting_key)
    place = len(order) - 1 - lora.depth
    return f"{lora.module}.{order[place]}" if 0 <= place < len(order) else None


def _form(slot: Slot) -> tuple[object, ...]:
    return slot.kind, slot.out_features, slot.in_features, slot.experts, slot.kernel


def _shape(slot: Slot) -> str:
    stack = f"{slot.experts} x " if slot.experts > 1 else ""
    return f"{slot.kind.value} of {stack}{slot.out_features} x {slot.in_features}"


def _other_names(adapters: Sequence[Adapter]) -> list[str]:
    """Sentences about adapters that name the same modules differently: they would become different modules."""
    names = [{lora.module for lora in adapter.loras} for adapter in adapters]
    problems = []
    for one, other in permutations(range(len(adapters)), 2):
        here, there = names[one], names[other]
        ends = {end: name for name in here - there for end in list(_parents(name, from_left=False))}
        # `lm_head` may be the end of a longer name by chance; `layers.0.q_proj` and `model.layers.0.q_proj` are one.
        shorter = next((name for name in sorted(there - here) if name in ends and "." in name), None)
        if shorter is not None:
            problems.append(
                f"{adapters[other].label} calls a module {shorter!r} and {adapters[one].label} calls it "
                f"{ends[shorter]!r}; save one of them again from the class of model that the other was made with."
            )
        single = {parent for name in there for parent in _parents(name, from_left=True)}
        if fused := sorted(here & single):
            problems.append(
                f"{adapters[one].label} has {fused[0]!r} in one stack and {adapters[other].label} has parts of it one "
                "by one; bring them into one form with `surgery convert --experts`."
            )
    return problems


def _parents(name: str, from_left: bool) -> Iterator[str]:
    """The names that a module's name begins with, or ends with, without itself."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        yield ".".join(parts[:count] if from_left else parts[count:])


def target_modules(adapters: Sequence[Adapter], slots: Iterable[Slot]) -> list[str]:
    """`target_modules` that select just the modules of the slots.

    PEFT saves every module that a name selects, so a name that an adapter without further restrictions was made with
    selects nothing else in its base. Whatever such names leave over is named in full.
    """
    wanted = {slot.name for slot in slots if slot.kind is not Kind.PARAMETER}
    chosen: set[str] = set()
    for adapter in adapters:
        config = adapter.config
        names = config.get("target_modules")
        restricted = any(config.get(key) is not None for key in ("layers_to_transform", "exclude_modules"))
        if isinstance(names, list) and not restricted:
            chosen |= {name for name in names if isinstance(name, str) and any(_selects(name, one) for one in wanted)}
    chosen |= {one for one in wanted if not any(_selects(name, one) for name in chosen)}
    return sorted(chosen, key=natural_key)


def _selects(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")


def target_parameters(slots: Iterable[Slot]) -> list[str] | None:
    """Full names of the parameters among the slots."""
    names = [slot.name for slot in slots if slot.kind is Kind.PARAMETER]
    return sorted(names, key=natural_key) or None


@dataclass(frozen=True)
class Whole:
    """What an adapter stores whole and an output takes along, and the settings it needs for that.

    Attributes:
        tensors: by their keys in the file.
        settings: `bias`, `modules_to_save` and `trainable_token_indices` of the config.
        notes: sentences about what was left out.
    """

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def stored_whole(adapters: Sequence[Adapter], drop: bool) -> Whole:
    """What becomes of `modules_to_save`, biases and replaced rows: kept from one adapter at weight 1, else refused.

    The base's own matrix, which PEFT stores beside the factors of an embedding (`base_layer.weight`), is nothing the
    adapter learnt: it is kept if all that have it have the same.
    """
    found: dict[str, tuple[Adapter, StoredTensor]] = {}
    settings: dict[str, object] = {}
    dropped: list[str] = []
    problems: list[str] = []
    for adapter in adapters:
        learnt = [
            tensor
            for tensor in (*adapter.saved.values(), *(rows.values for rows in adapter.tokens.values()))
            if not tensor.name.endswith(".base_layer.weight")
        ]
        if drop:
            dropped += [f"{tensor.name} of {name_of(adapter)}" for tensor in learnt]
        elif learnt and (len(adapters) > 1 or adapter.weight != 1):
            problems.append(
                f"{adapter.label} stores {_some([tensor.name for tensor in learnt])} whole (modules_to_save, bias or "
                "token rows), which has no sum with anything; pass --drop-saved to leave it out, or merge the adapter "
                "into the base first."
            )
        elif learnt:
            keys = ("bias", "modules_to_save", "trainable_token_indices")
            settings = {key: adapter.config[key] for key in keys if adapter.config.get(key) is not None}
            found |= {tensor.name: (adapter, tensor) for tensor in learnt}
        for tensor in adapter.saved.values():
            if tensor.name.endswith(".base_layer.weight"):
                before = found.setdefault(tensor.name, (adapter, tensor))
                if not _equal(before[1], tensor):
                    problems.append(
                        f"{before[0].label} and {adapter.label} hold different base matrices at {tensor.name!r}; they "
                        "belong to different bases."
                    )
    if problems:
        raise UnsupportedError(several("these adapters", problems), problems)
    notes = (f"Left out, as asked: {_some(dropped)}.",) if dropped else ()
    return Whole({name: tensor for name, (_, tensor) in found.items()}, settings, notes)


def _equal(left: StoredTensor, right: StoredTensor) -> bool:
    from surgery.hashing import hash_tensor

    if left.key == right.key:
        return True
    return (left.dtype, left.shape) == (right.dtype, right.shape) and hash_tensor(left) == hash_tensor(right)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def name_of(adapter: Adapter) -> str:
    """An adapter's name without the path to it: reports and notes go into the output, which holds no path."""
    return adapter.files.provenance.get("source", adapter.label)


def common_base(adapters: Sequence[Adapter], any_base: bool) -> tuple[str | None, list[str]]:
    """The name of the base that all adapters give, and sentences about differences that do not matter.

    Names are free text: a path here and an id there may well mean one model, so only the last part is compared.
    Raises `MismatchError` where they differ, unless `any_base`.
    """
    named = [(adapter, adapter.config.get("base_model_name_or_path")) for adapter in adapters]
    known = [(adapter, name) for adapter, name in named if isinstance(name, str) and name]
    if not known:
        return None, []
    first, base = known[0]
    notes = []
    for adapter, name in known[1:]:
        if name == base:
            continue
        if name.rstrip("/").rpartition("/")[2] == base.rstrip("/").rpartition("/")[2]:
            notes.append(f"{name_of(first)} calls its base {base!r}, {name_of(adapter)} {name!r}; taken for one.")
        elif any_base:
            notes.append(f"{name_of(first)} is for the base {base!r}, {name_of(adapter)} for {name!r}.")
        else:
            raise MismatchError(
                f"{first.label} is for the base {base!r} and {adapter.label} for {name!r}; pass --any-base if these "
                "are the same model."
            )
    return base, notes
